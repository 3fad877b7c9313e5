"""Fixtures that all suites share: real services, each once per process, and clean parts of them per test."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from pydantic import SecretStr

from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from scheduler.db import Database
from tests.support import postgres, redis

SIGNING_KEY = "k" * 64
BESIDE = {"store", "publisher", "deliveries", "missed", "messenger", "redelivery", "held", "wishes"}
"""What a sweeper does beside its rounds: it holds a connection, which would be left open behind a pool that is gone."""

hypothesis.settings.register_profile("short", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile("short")  # `--hypothesis-profile=long`, as in `make fuzz`, comes after this


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.PostgresServer]:
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[redis.RedisServer]:
    with redis.running() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with this release's schema, which is copied: it takes far longer to make."""
    path = tmp_path_factory.mktemp("template") / "records.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres_server: postgres.PostgresServer) -> Iterator[str]:
    """The same as the name of a database."""
    with postgres_server.database() as url:
        _migrate(url)
        yield url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An empty database with this release's schema, once on each kind."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_database")
        return
    server: postgres.PostgresServer = request.getfixturevalue("postgres_server")
    with server.database(request.getfixturevalue("postgres_template")) as url:
        yield from _opened(url)


@pytest.fixture
def sqlite_database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """An empty SQLite database, for tests that are not about the database."""
    path = tmp_path / "records.db"
    shutil.copyfile(sqlite_template, path)
    yield from _opened(f"sqlite:///{path}")


def _migrate(url: str) -> None:
    for made in _opened(url):
        made.migrate()


def _opened(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    for thread in threading.enumerate():
        if thread.name in BESIDE:
            thread.join(10)
    opened.dispose()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a farm in a folder of this test's."""
    return Settings(data_dir=tmp_path / "farm", signing_key=SecretStr(SIGNING_KEY))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """An empty directory store."""
    return DirectoryStore(tmp_path / "objects", SIGNING_KEY.encode())
