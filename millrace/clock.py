"""The one place that asks for the wall clock. Durations use `time.monotonic`, leases the database's clock.

The process of an attempt goes by the farm's clock: what the farm said the time was when it gave the build away, and what has
passed since. So a host whose clock is wrong, or is set while a build runs, dates nothing wrongly.
"""

import time
from datetime import UTC, datetime

_ahead_s: float | None = None
"""What the clock that was agreed on is ahead of this host's monotonic one; None where the host's own clock is used."""


def go_by(then_ms: int, monotonic_s: float) -> None:
    """From here on, go by a clock that showed `then_ms` (since 1970) when this host's monotonic one showed `monotonic_s`."""
    global _ahead_s
    _ahead_s = then_ms / 1000 - monotonic_s


def now() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.fromtimestamp(_now_s(), UTC)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(_now_s() * 1000)


def _now_s() -> float:
    return time.time() if _ahead_s is None else _ahead_s + time.monotonic()
