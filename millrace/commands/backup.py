"""Verbs that copy the records, and put copies back. docs/backup.md has the whole way, also with PostgreSQL."""

from pathlib import Path

import click
import sqlalchemy as sa

from millrace.commands import terminal
from millrace.commands.records import records
from millrace.commands.session import Session
from millrace.commands.terminal import console
from millrace.errors import Conflict, InvalidInput
from millrace.locks import is_held
from millrace.settings import Settings
from scheduler import backup as copies
from scheduler.db import Database

_GAP = click.option(
    "--gap",
    type=click.IntRange(0, 10_000_000),
    default=1000,
    show_default=True,
    help="So many build numbers are left out in each project: more than it has had builds since the backup.",
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.pass_obj
def backup(session: Session, file: Path) -> int:
    """Copy the records (SQLite) to FILE, whole, while the farm works.

    Objects and keys are not in it: docs/backup.md.
    """
    size = copies.copy_sqlite(_sqlite(session.settings, "pg_dump --format=custom --file=FILE DATABASE"), file)
    console.print(f"The records are in {file} ({terminal.size(size)})")
    return 0


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_GAP
@click.pass_obj
def restore(session: Session, file: Path, gap: int) -> int:
    """Put the copy FILE in the place of the records (SQLite), while the farm is stopped.

    What the farm did after the copy was made is forgotten; what ran then runs again. The records before are kept beside.
    """
    path = _sqlite(session.settings, "pg_restore --dbname=DATABASE FILE, then 'millrace restored'")
    _not_up(session.settings)
    aside = copies.put_back_sqlite(file, path)
    console.print(f"The records of {file} are in place" + (f"; those before lie in {aside}" if aside else ""))
    database = Database(session.settings.database)
    try:
        database.migrate()
        _make_good(database, gap)
    finally:
        database.dispose()
    return 0


@click.command()
@_GAP
@click.pass_obj
def restored(session: Session, gap: int) -> int:
    """Make records good that were restored by other means, as by pg_restore, before the farm is started.

    No build number is given out twice, and no attempt that ran at the time of the backup may write any more. Call it once.
    """
    _not_up(session.settings)
    database = records(session)
    try:
        _make_good(database, gap)
    finally:
        database.dispose()
    return 0


def _make_good(database: Database, gap: int) -> None:
    waiting = copies.after_restore(database, gap=gap)
    console.print(f"{len(waiting)} builds that were running wait again; {gap} build numbers are left out in each project")
    console.print("Start the farm, and look at it with 'millrace fsck'.")


def _sqlite(settings: Settings, instead: str) -> Path:
    address = sa.make_url(settings.database)
    if address.get_backend_name() != "sqlite" or not address.database:
        raise InvalidInput("the records are not in SQLite", hint=f"With PostgreSQL: {instead}; see docs/backup.md.")
    return Path(address.database)


def _not_up(settings: Settings) -> None:
    if is_held(settings.home / "up.lock"):
        raise Conflict(f"the farm in {settings.home} is running", hint="'millrace down' stops it.")
