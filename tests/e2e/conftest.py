"""One farm for all scenarios of a test process."""

from collections.abc import Iterator

import pytest

from tests.support.farm import Farm, running_farm


@pytest.fixture(scope="session")
def farm() -> Iterator[Farm]:
    with running_farm() as up:
        yield up
        assert up.containers() == []
