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

_LONG = [
    "test_fleets.py",
    "test_scenarios.py",
    "test_farm.py",
    "test_upgrade.py",
    "test_api_server.py",
    "test_logs.py",
    "test_worker_process.py",
    "test_backup.py",
    "test_fsck.py",
    "test_secrets.py",
    "test_inbox.py",
    "test_user_data.py",
    "test_health.py",
    "test_source.py",
    "test_worker_notices.py",
    "test_failpoints.py",
    "test_git_source.py",
    "test_scaler_machine.py",
    "test_parking.py",
    "test_once.py",
    "test_full_disk.py",
]
"""Files of more than 25 s, the longest first: where files go to several processes, none of them is left for one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by file as in `_LONG`; within a file they stay as they are."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


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
    """Settings of a farm in a folder of this test's. Deliveries are acted on before they are answered, however fast a test is."""
    return Settings(data_dir=tmp_path / "farm", signing_key=SecretStr(SIGNING_KEY), webhooks_at_once=1000)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    """An empty directory store."""
    return DirectoryStore(tmp_path / "objects", SIGNING_KEY.encode())
