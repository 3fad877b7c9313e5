"""How long a leaving worker's builds may take: as long as the one in most haste says."""

import math

from worker.leaving import Leaving


def test_nobody_asked_for_it() -> None:
    leaving = Leaving()
    assert (leaving.begun.is_set(), leaving.why, leaving.left_s) == (False, "", math.inf)


def test_the_farm_gives_all_the_time_there_is_and_a_signal_does_not() -> None:
    clock = [100.0]
    leaving = Leaving(lambda: clock[0])
    leaving.ask("the farm asks for it")
    assert (leaving.begun.is_set(), leaving.left_s) == (True, math.inf)
    leaving.ask("SIGTERM came", 60)
    clock[0] += 20
    assert leaving.left_s == 40
    leaving.ask("a notice came", 100)
    assert leaving.left_s == 40
    leaving.ask("SIGTERM came", 0)
    assert leaving.left_s == 0
    assert leaving.why == "the farm asks for it"
