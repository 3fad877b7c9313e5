"""The one place that asks for the wall clock. Durations use `time.monotonic`, leases the database's clock."""

from datetime import UTC, datetime


def now() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(UTC)


def epoch_ms(moment: datetime) -> int:
    """Milliseconds since 1970, as log lines and `CODEBUILD_START_TIME` use."""
    return int(moment.timestamp() * 1000)
