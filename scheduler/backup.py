"""Copies of the records: made of a farm at work, put back, and made good for what was forgotten between."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Unavailable
from millrace.log import get_logger
from millrace.vocabulary import Reason, Verdict
from scheduler.db import Database
from scheduler.lifecycle import end_attempt, give_back
from scheduler.models import Build, Leader, Project
from scheduler.states import HELD

log = get_logger(__name__)
_SIDES: Final = ("", "-wal", "-shm")
_MESSAGE: Final = "the records were restored from a backup, which knows nothing of what this attempt did since"


def copy_sqlite(source: Path, target: Path) -> int:
    """Copy a database that is in use to `target`, whole and checked; its bytes. Raises AlreadyExists, NotFound, Unavailable."""
    if not source.exists():
        raise NotFound(f"there is no database {source}", hint="MILLRACE_DATA_DIR names the farm's data folder.")
    if target.exists():
        raise AlreadyExists(f"{target} is there already", hint="Name a new file, or remove that one.")
    part = target.with_name(f".{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # the records name people and their code
        with _complaining(source), closing(sqlite3.connect(source, timeout=30)) as db, closing(sqlite3.connect(part)) as copy:
            db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        _check(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise Unavailable(f"the copy {target} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return target.stat().st_size


def put_back_sqlite(copy: Path, target: Path) -> Path | None:
    """Put a copy in the place of a database that nobody uses; where that one lies now, None if there was none.

    Raises Conflict where it is in use, NotFound and InvalidInput for a copy that is none.
    """
    if not copy.is_file():
        raise NotFound(f"there is no file {copy}")
    part = target.with_name(f".{target.name}.part")
    aside: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.unlink(missing_ok=True)
        with open(copy, "rb") as source, os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            while piece := source.read(1024 * 1024):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _check(part)
        if target.exists():
            _alone(target)
            aside = target.with_name(f"{target.name}.before-restore-{time.strftime('%Y%m%dT%H%M%S')}")
            for side in _SIDES:
                with_side = target.with_name(target.name + side)
                if with_side.exists():
                    with_side.rename(aside.with_name(aside.name + side))
        part.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise Unavailable(f"the database {target} cannot be put back: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return aside


def after_restore(db: Database, *, gap: int) -> list[str]:
    """Make records good that come from a backup: no number is given out twice, and nobody writes to what it forgot.

    Every project's next build has a number `gap` higher. Attempts that were running are over, whatever has become of them since;
    their builds wait again, without that being counted against them. The ids of these builds.
    """
    with db.reading() as session:
        ids = session.scalars(sa.select(Build.id).where(Build.state.in_([state.value for state in HELD]))).all()
    for build_id in ids:
        db.run(lambda session, build_id=build_id: _take_back(session, build_id))  # type: ignore[misc]  # it cannot infer a default

    def skip(session: Session) -> None:
        session.execute(sa.update(Project).values(last_build_number=Project.last_build_number + gap))
        session.execute(sa.delete(Leader))

    db.run(skip)
    log.warning("records.restored", gap=gap, taken_back=len(ids))
    return list(ids)


def _take_back(session: Session, build_id: str) -> None:
    build = session.get(Build, build_id, with_for_update=True)
    if build is not None and build.state in HELD:
        end_attempt(session, build, Verdict.HANDED_BACK, Reason.WORKER_SHUTDOWN, _MESSAGE)
        give_back(session, build, Reason.WORKER_SHUTDOWN, _MESSAGE)


def _alone(path: Path) -> None:
    """Raises Conflict where another process has the database open; one that is damaged is nobody's."""
    with closing(sqlite3.connect(path, timeout=1)) as db:
        try:
            db.execute("PRAGMA journal_mode=DELETE").fetchall()  # SQLite leaves WAL only for the last that has it open
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise Conflict(f"the database {path} is in use", hint="Stop API, scheduler and 'millrace up' first.") from error
        except sqlite3.DatabaseError as error:
            log.warning("records.damaged", path=str(path), why=str(error))


def _check(path: Path) -> None:
    """Raises InvalidInput unless the file is a database of ours, and whole."""
    hint = "Take another backup."
    try:
        with closing(sqlite3.connect(path)) as db:
            said = db.execute("PRAGMA integrity_check").fetchone()[0]
            db.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise InvalidInput(f"this is no copy of a farm's records: {error}", hint=hint) from error
    if said != "ok":
        raise InvalidInput(f"the copy is damaged: {said}", hint=hint)


@contextmanager
def _complaining(source: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise Unavailable(f"the database {source} cannot be copied: {error}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
