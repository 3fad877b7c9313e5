"""The farm's database, for the verbs that speak to it directly."""

from millrace.commands.session import Session
from millrace.errors import NotFound
from scheduler.db import Database


def records(session: Session) -> Database:
    """The database, spoken to directly: who may read its file or has its password may make tokens."""
    database = Database(session.settings.database)
    if database.is_sqlite and not (session.settings.home / "millrace.db").exists() and session.settings.database_url is None:
        raise NotFound(f"there is no farm in {session.settings.home} yet", hint="'millrace up' makes one.")
    database.require_schema()
    return database
