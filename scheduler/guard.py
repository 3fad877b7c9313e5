"""The trigger by which the database itself refuses to change a build that has ended.

What may still come to such a row is not named here, and so is free: the build that repeats it (`next_auto_retry`). Publication
and the move of logs change other tables.
"""

from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

NAME: Final = "builds_end_once"
_FROZEN: Final = (
    "id",
    "project_name",
    "number",
    "initiator",
    "state",
    "reason",
    "message",
    "exit_code",
    "attempt_no",
    "lease_owner",
    "cancel_requested_ms",
    "submitted_ms",
    "first_claimed_ms",
    "finished_ms",
    "resolved_source_version",
    "retry_of",
    "settings",
    "exported",
    "marks",
)
_JSON: Final = ("settings", "exported", "marks")
_SAYS: Final = "an ended build does not change"


def is_there(session: Session) -> bool:
    """True where the database has the trigger."""
    if _is_sqlite(session):
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name = :name"
    else:
        query = "SELECT count(*) FROM pg_trigger WHERE tgname = :name AND tgrelid = 'builds'::regclass AND tgenabled <> 'D'"
    return bool(session.execute(sa.text(query), {"name": NAME}).scalar_one())


def make(session: Session) -> None:
    """Make the trigger, anew where it is there."""
    for statement in statements(sqlite=_is_sqlite(session)):
        session.connection().exec_driver_sql(statement)


def statements(*, sqlite: bool) -> list[str]:
    """What makes the trigger. A migration calls it, so it only ever names columns that were there at that migration."""
    differs = "IS NOT" if sqlite else "IS DISTINCT FROM"
    changes = []
    for name in _FROZEN:
        cast = "::text" if name in _JSON and not sqlite else ""  # PostgreSQL cannot compare JSON
        changes.append(f"NEW.{name}{cast} {differs} OLD.{name}{cast}")
    changed = f"OLD.finished_ms IS NOT NULL AND ({' OR '.join(changes)})"
    if sqlite:
        return [
            f"DROP TRIGGER IF EXISTS {NAME}",
            f"CREATE TRIGGER {NAME} BEFORE UPDATE ON builds WHEN {changed} BEGIN SELECT RAISE(ABORT, '{_SAYS}'); END",
        ]
    return [
        f"CREATE OR REPLACE FUNCTION {NAME}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_SAYS}' USING ERRCODE = 'integrity_constraint_violation'; END $$",
        f"DROP TRIGGER IF EXISTS {NAME} ON builds",
        f"CREATE TRIGGER {NAME} BEFORE UPDATE ON builds FOR EACH ROW WHEN ({changed}) EXECUTE FUNCTION {NAME}()",
    ]


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"
