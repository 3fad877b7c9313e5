"""What the records know of a log's wholeness: its chunks, its root, what the worker said of it, and what is missing."""

from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.chunks import Chunk, Tally
from millrace.contract import LogFooter
from millrace.log import get_logger
from scheduler.models import Attempt, LogChunk

log = get_logger(__name__)
MAX_LOG_BYTES: Final = 1024**3
"""How long an attempt's log may be: it lies in the database while the build runs. What is beyond is refused, and the log
marked as incomplete."""


def listed(session: Session, build_id: str, attempt_no: int) -> Iterator[Chunk]:
    """The chunks of a log that lies in the database, in order."""
    rows = session.execute(
        sa.select(LogChunk.seq, LogChunk.offset, LogChunk.size, LogChunk.sha256)
        .where(LogChunk.build_id == build_id, LogChunk.attempt_no == attempt_no)
        .order_by(LogChunk.seq)
    )
    for row in rows.yield_per(1000):
        yield Chunk(row.seq, row.offset, row.size, row.sha256)


def root_of(session: Session, build_id: str, attempt_no: int) -> str:
    """The root of what was stored of a log that lies in the database."""
    tally = Tally()
    for chunk in listed(session, build_id, attempt_no):
        tally.add(chunk)
    return tally.root


def close(session: Session, attempt: Attempt) -> None:
    """The attempt is over: count what is there of its log, and hold it against the worker's word, if there is one."""
    attempt.log_root = root_of(session, attempt.build_id, attempt.attempt_no)
    footer = footer_of(attempt)
    attempt.log_complete = (
        footer is not None and footer.size_bytes == attempt.log_bytes and footer.root in (None, attempt.log_root)
    )
    if not attempt.log_complete:
        log.warning(
            "log.gap",
            build_id=attempt.build_id,
            attempt_no=attempt.attempt_no,
            said_bytes=footer.size_bytes if footer else None,
            stored_bytes=attempt.log_bytes,
        )


def footer_of(attempt: Attempt) -> LogFooter | None:
    """What the worker said it wrote; None where it never did."""
    return LogFooter.model_validate(attempt.log_footer) if attempt.log_footer else None


def missing_bytes(attempt: Attempt) -> int | None:
    """How many bytes at its end never came; None where nobody knows."""
    footer = footer_of(attempt)
    return footer.size_bytes - attempt.log_bytes if footer else None


def gap(attempt: Attempt) -> str | None:
    """What is missing of an ended attempt's log, in one line; None where all is there."""
    if attempt.log_complete or attempt.ended_ms is None:
        return None
    missing, end = missing_bytes(attempt), attempt.log_bytes
    if missing is None and attempt.log_sha256 is not None:  # it ended under the last release, which did not keep the footer
        return f"the log ends here: some of what its worker wrote after byte {end} never came"
    if missing is None:
        return f"the log ends here: the worker was lost, and what it wrote after byte {end} never came"
    if missing > 0 and is_full(attempt):
        return f"the log ends here: it is at its limit of {_limit()}, and {missing} bytes after byte {end} were not kept"
    if missing > 0:
        return f"the log ends here: {missing} bytes that were written after byte {end} never came"
    return "this log is damaged: by its hash, it is not what its worker wrote"


def is_full(attempt: Attempt) -> bool:
    """True where a log is at its limit, to the byte."""
    return attempt.log_bytes >= MAX_LOG_BYTES


def full() -> str:
    """What is said of a full log to those who follow it."""
    return f"the log is at its limit of {_limit()}: the build goes on, and what it writes from here on is not kept"


def _limit() -> str:
    return f"{MAX_LOG_BYTES // 1024**3} GiB" if MAX_LOG_BYTES % 1024**3 == 0 else f"{MAX_LOG_BYTES} bytes"
