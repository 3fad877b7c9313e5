"""The database: SQLite for one box, PostgreSQL for many. Short transactions, the database's own clock, bounded retries."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from millrace import failpoints
from millrace.errors import InvalidInput, MillraceError, Unavailable
from millrace.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")
_TRIES = 5
_PATIENCE_S = 10.0
"""How long a transaction is tried again; one try may itself wait as long as the database lets it wait for a lock."""
_READ_ONLY = "millrace_read_only"
_MIGRATION_LOCK = 0x4D696C6C  # any number that only we use
_migrating = threading.Lock()


_POSTGRESQL = {
    "connect_timeout": 5,
    # A process of ours that was frozen inside a transaction loses it, and with it the locks that all others wait for.
    "options": "-c statement_timeout=30000 -c lock_timeout=10000 -c idle_in_transaction_session_timeout=20000",
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25000,
}


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


def _readable(text: str) -> Any:
    """What a damaged row holds must bar no other: it is nothing, which who needs it finds wrong."""
    try:
        return json.loads(text)
    except ValueError:
        log.error("record.damaged", size_chars=len(text))  # not the text: it may hold a secret
        return {}


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
                url,
                connect_args={"timeout": 5, "check_same_thread": False},
                pool_size=20,
                max_overflow=60,
                json_deserializer=_readable,
            )
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
            # SQLite's own waiters sleep and look again, so that many keep one another waiting; those of one process form a line.
            self._writing: AbstractContextManager[object] = threading.RLock()
        else:
            self.engine = sa.create_engine(
                url,
                pool_size=10,
                max_overflow=60,
                pool_pre_ping=True,
                connect_args=_POSTGRESQL,
            )
            self._writing = nullcontext()
        self._reader = self.engine.execution_options(**{_READ_ONLY: True})
        if not self.is_sqlite:  # a reader's statements all see one moment, as they do on SQLite
            self._reader = self._reader.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A writing transaction, committed at the end of the block. Raises Unavailable where the database is away or locked."""
        with self._writing, _translating(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads, and so waits for no writer. All of it sees the records of one moment."""
        with _translating(), Session(self._reader, expire_on_commit=False) as session, session.begin():
            yield session

    def run(self, work: Callable[[Session], T]) -> T:
        """`work` in a writing transaction; tried again a few times where the database asks for that. `work` may run twice.

        Raises Unavailable where the database is away or stays locked, InvalidInput for a value that it cannot hold.
        """
        give_up = time.monotonic() + _PATIENCE_S
        attempt = 0
        while True:
            attempt += 1
            try:
                with self._writing, _translating(), Session(self.engine, expire_on_commit=False) as session, session.begin():
                    done = work(session)
                    failpoints.around_commit(work, "before", Unavailable)
                failpoints.around_commit(work, "after", Unavailable)
                return done
            except Unavailable as error:
                if not isinstance(error.__cause__, DBAPIError) or not _worth_another_try(error.__cause__):
                    raise
                if attempt == _TRIES or time.monotonic() > give_up:
                    raise
                time.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311  # jitter, not a secret

    def check(self) -> None:
        """Raises Unavailable unless the database answers."""
        with self.reading() as session:
            session.execute(sa.text("SELECT 1"))

    def migrate(self) -> None:
        """Bring the schema up to this release. Two starters at once are safe; a schema of a later release is refused."""
        with _translating(), _migrating, self._alone() as connection:
            config = _alembic()
            config.attributes["connection"] = connection
            self._refuse_newer(connection, config)
            command.upgrade(config, "head")

    def require_schema(self, *, or_later: bool = False) -> None:
        """Raises OldSchema unless the database has exactly this release's schema, or a later release's, where that will do."""
        scripts = ScriptDirectory.from_config(_alembic())
        head = scripts.get_current_head()
        with _translating(), self._reader.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        if current != head and not (or_later and current and not _knows(scripts, current)):
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
                connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            yield connection

    @staticmethod
    def _refuse_newer(connection: sa.Connection, config: Config) -> None:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is None:
            return
        if not _knows(ScriptDirectory.from_config(config), current):
            raise OldSchema(
                f"the database has the schema {current} of a later release",
                hint="Run that release, or restore a backup taken before its migration.",
            )


def _knows(scripts: ScriptDirectory, revision: str) -> bool:
    try:
        scripts.get_revision(revision)
    except CommandError:
        return False
    return True


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _prepare_sqlite(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, so that writers can say IMMEDIATE
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A deferred transaction that reads and then writes fails at once when another wrote meanwhile, whatever busy_timeout says.
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _worth_another_try(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    return state in ("40001", "40P01", "55P03") or "database is locked" in str(error.orig)


@contextmanager
def _translating() -> Iterator[None]:
    """The database's errors as ours."""
    try:
        yield
    except (DataError, OverflowError) as error:  # OverflowError: how SQLite's driver says it
        raise InvalidInput(f"the database cannot hold a value of this request: {_first_line(error)}") from error
    except DBAPIError as error:
        if isinstance(error, OperationalError) or error.connection_invalidated or _worth_another_try(error):
            raise _away(error) from error
        raise
    except PoolTimeout as error:
        raise _away(error) from error


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"the database does not answer: {_first_line(error)}", hint="Try again in a few seconds.")


def _first_line(error: Exception) -> str:
    origin = error.orig if isinstance(error, DBAPIError) else error
    return (str(origin).strip().splitlines() or [type(origin).__name__])[0]
