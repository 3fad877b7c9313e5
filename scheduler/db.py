"""The database: SQLite for one box, PostgreSQL for many. Short transactions, the database's own clock, bounded retries."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from millrace.errors import MillraceError, Unavailable
from millrace.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")
_TRIES = 5
_READ_ONLY = "millrace_read_only"
_MIGRATION_LOCK = 0x4D696C6C  # any number that only we use
_migrating = threading.Lock()


class now_ms(FunctionElement[int]):
    """The database's clock, in milliseconds since 1970. Named as the SQL function that it is."""

    type = sa.BigInteger()
    inherit_cache = True


@compiles(now_ms, "sqlite")
def _now_ms_sqlite(_element: now_ms, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER)"


@compiles(now_ms, "postgresql")
def _now_ms_postgresql(_element: now_ms, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


class OldSchema(MillraceError):
    """The database's schema is not the one of this release."""

    code = "schema_mismatch"


class Database:
    """One database and its pool of connections; shared by the threads of a process, never across a fork."""

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = sa.make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            if parsed.database and parsed.database != ":memory:":
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.engine = sa.create_engine(
                url, connect_args={"timeout": 10, "check_same_thread": False}, pool_size=20, max_overflow=60
            )
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = sa.create_engine(
                url,
                pool_size=10,
                max_overflow=60,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 5, "options": "-c statement_timeout=30000 -c lock_timeout=10000"},
            )
        self._reader = self.engine.execution_options(**{_READ_ONLY: True})

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A writing transaction, committed at the end of the block. Raises Unavailable where the database is away or locked."""
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                yield session
        except DBAPIError as error:
            raise _translated(error) from error

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads, and so waits for no writer."""
        try:
            with Session(self._reader, expire_on_commit=False) as session, session.begin():
                yield session
        except DBAPIError as error:
            raise _translated(error) from error

    def run(self, work: Callable[[Session], T]) -> T:
        """`work` in a writing transaction; tried again a few times where the database asks for that. `work` may run twice."""
        for attempt in range(1, _TRIES + 1):
            try:
                with Session(self.engine, expire_on_commit=False) as session, session.begin():
                    return work(session)
            except DBAPIError as error:
                if not _worth_another_try(error) or attempt == _TRIES:
                    raise _translated(error) from error
                time.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311  # jitter, not a secret
        raise AssertionError("unreachable")

    def check(self) -> None:
        """Raises Unavailable unless the database answers."""
        with self.reading() as session:
            session.execute(sa.text("SELECT 1"))

    def migrate(self) -> None:
        """Bring the schema up to this release. Two starters at once are safe; a schema of a later release is refused."""
        try:
            with _migrating, self._alone() as connection:
                config = _alembic()
                config.attributes["connection"] = connection
                self._refuse_newer(connection, config)
                command.upgrade(config, "head")
        except DBAPIError as error:
            raise _translated(error) from error

    def require_schema(self) -> None:
        """Raises OldSchema unless the database has exactly this release's schema."""
        head = ScriptDirectory.from_config(_alembic()).get_current_head()
        try:
            with self._reader.connect() as connection:
                current = MigrationContext.configure(connection).get_current_revision()
        except DBAPIError as error:
            raise _translated(error) from error
        if current != head:
            raise OldSchema(
                f"the database's schema is {current or 'empty'}, this release needs {head}", hint="Run 'millrace migrate'."
            )

    def dispose(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def _alone(self) -> Iterator[sa.Connection]:
        """A connection in one transaction that no other migrator can hold meanwhile."""
        with self.engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            yield connection

    @staticmethod
    def _refuse_newer(connection: sa.Connection, config: Config) -> None:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is None:
            return
        try:
            ScriptDirectory.from_config(config).get_revision(current)
        except CommandError as error:
            raise OldSchema(
                f"the database has the schema {current} of a later release",
                hint="Run that release, or restore a backup taken before its migration.",
            ) from error


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, so that writers can say IMMEDIATE
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that reads and then writes fails at once when another wrote meanwhile, whatever busy_timeout says.
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _worth_another_try(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    return state in ("40001", "40P01", "55P03") or "database is locked" in str(error.orig)


def _translated(error: DBAPIError) -> Exception:
    if isinstance(error, OperationalError) or error.connection_invalidated or _worth_another_try(error):
        return Unavailable(
            f"the database does not answer: {str(error.orig).strip().splitlines()[0]}", hint="Try again in a few seconds."
        )
    return error
