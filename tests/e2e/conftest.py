"""One farm for all scenarios of a test process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.locks import is_held
from tests.support.farm import Farm, running_farm, wait_until


@pytest.fixture(scope="session")
def git_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which this farm takes local repositories."""
    return tmp_path_factory.mktemp("repositories")


@pytest.fixture(scope="session")
def farm(git_root: Path) -> Iterator[Farm]:
    """When it goes, its work folder holds nothing but the lock of the process that waits for the next build."""
    with running_farm(MILLRACE_GIT_ROOTS=str(git_root)) as up:
        yield up
        wait_until(lambda: up.containers() == [])
        wait_until(lambda: all(left.is_file() and is_held(left) for left in (up.home / "data" / "work").iterdir()))
