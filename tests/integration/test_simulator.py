"""The simulator against a fleet of worker processes that really run: the same load, the same settings, the same outcome."""

import pytest

from tests.support.replay import beside

CLOSE = 0.15


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(600)
def test_the_simulator_says_what_happens() -> None:
    happened, said, both = beside()
    assert said.wait(50) == pytest.approx(happened.wait(50), rel=CLOSE), both
    assert said.peak == pytest.approx(happened.peak, rel=CLOSE), both
    assert said.worker_s == pytest.approx(happened.worker_s, rel=CLOSE), both
