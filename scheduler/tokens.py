"""API and worker tokens: shown once, kept as hashes, scoped."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import InvalidInput, NotFound
from millrace.ids import new_secret
from millrace.vocabulary import TokenScope
from scheduler.db import Database, now_ms
from scheduler.leases import hash_token
from scheduler.models import Project, Token


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who is asking. `project` is set for a PROJECT token only."""

    token_id: str
    name: str
    scope: TokenScope
    project: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """A token as it may be listed: everything but the token."""

    principal: Principal
    created_ms: int
    expires_ms: int | None
    revoked_ms: int | None


def create(
    db: Database, name: str, scope: TokenScope, *, project: str | None = None, days: int | None = None, secret: str | None = None
) -> str:
    """Make a token and return it, for the only time. `days` None: it does not expire. `secret` None: made here.

    Raises InvalidInput where scope and project do not go together, NotFound for an unknown project.
    """
    if (scope is TokenScope.PROJECT) != (project is not None):
        raise InvalidInput("a token of scope 'project' names its project, others name none")
    if not name or len(name) > 100:
        raise InvalidInput("a token's name has 1 to 100 characters")
    secret = secret or new_secret("wrk" if scope is TokenScope.WORKER else "pat")

    def work(session: Session) -> None:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        if project is not None:
            row = session.get(Project, project)
            if row is None or row.deleted_ms is not None:
                raise NotFound(f"there is no project {project!r}")
        if session.scalar(sa.select(Token.id).where(Token.hash == hash_token(secret))):
            return
        session.add(
            Token(
                id=str(uuid.uuid4()),
                name=name,
                scope=scope.value,
                project_name=project,
                hash=hash_token(secret),
                created_ms=now,
                expires_ms=None if days is None else now + days * 86_400_000,
            )
        )

    db.run(work)
    return secret


def verify(db: Database, secret: str) -> Principal | None:
    """Whose token this is; None where it is unknown, expired or revoked. The look-up is by hash, so its time tells nothing."""
    with db.reading() as session:
        row = session.scalars(sa.select(Token).where(Token.hash == hash_token(secret), *_holds())).first()
        return None if row is None else _principal(row)


def get(db: Database, token_id: str) -> Principal | None:
    """Whose token has this id; None where there is none that holds."""
    with db.reading() as session:
        row = session.scalars(sa.select(Token).where(Token.id == token_id, *_holds())).first()
        return None if row is None else _principal(row)


def _holds() -> tuple[sa.ColumnElement[bool], ...]:
    return Token.revoked_ms.is_(None), sa.or_(Token.expires_ms.is_(None), Token.expires_ms > now_ms())


def find(db: Database) -> Sequence[TokenRecord]:
    """All tokens, oldest first."""
    with db.reading() as session:
        rows = session.scalars(sa.select(Token).order_by(Token.created_ms)).all()
    return [
        TokenRecord(principal=_principal(row), created_ms=row.created_ms, expires_ms=row.expires_ms, revoked_ms=row.revoked_ms)
        for row in rows
    ]


def revoke(db: Database, token_id: str) -> None:
    """End a token now. Raises NotFound."""

    def work(session: Session) -> None:
        row = session.get(Token, token_id)
        if row is None:
            raise NotFound(f"there is no token {token_id!r}", hint="'millrace token ls' lists them.")
        row.revoked_ms = row.revoked_ms or session.execute(sa.select(now_ms())).scalar_one()

    db.run(work)


def _principal(row: Token) -> Principal:
    return Principal(token_id=row.id, name=row.name, scope=TokenScope(row.scope), project=row.project_name)
