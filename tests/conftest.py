"""Fixtures that all suites share: real services, each once per process, and clean parts of them per test."""

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


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with this release's schema, once on each kind."""
    if request.param == "sqlite":
        yield from _migrated(f"sqlite:///{tmp_path / 'records.db'}")
        return
    server: postgres.PostgresServer = request.getfixturevalue("postgres_server")
    with server.database() as url:
        yield from _migrated(url)


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """An empty SQLite database, for tests that are not about the database."""
    yield from _migrated(f"sqlite:///{tmp_path / 'records.db'}")


def _migrated(url: str) -> Iterator[Database]:
    made = Database(url)
    made.migrate()
    yield made
    made.dispose()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a farm in a folder of this test's."""
    return Settings(data_dir=tmp_path / "farm", signing_key=SecretStr(SIGNING_KEY))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """An empty directory store."""
    return DirectoryStore(tmp_path / "objects", SIGNING_KEY.encode())
