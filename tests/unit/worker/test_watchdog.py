"""When a worker counts as deaf."""

from worker.watchdog import DEAF_S, STUCK_S, Watchdog


class Ears:
    def __init__(self) -> None:
        self.turned_s = self.heard_s = 1000.0
        self.bells: int | None = 0
        self.dog = Watchdog(turned_s=lambda: self.turned_s, heard_s=lambda: self.heard_s, waiting=lambda: self.bells)

    def at(self, now_s: float, *, turned: bool = True) -> str:
        if turned:
            self.turned_s = now_s
        return self.dog.look(now_s)


def test_silence_is_not_deafness() -> None:
    ears = Ears()
    for bells in (0, None):
        ears.bells = bells
        assert ears.at(1000 + 10 * DEAF_S) == ""


def test_bells_that_wait_unheard_are() -> None:
    ears = Ears()
    ears.bells = 3
    assert ears.at(5000) == "", "they may have come this moment"
    assert ears.at(5000 + DEAF_S - 1) == ""
    assert "bells have waited for 121 s" in ears.at(5000 + DEAF_S + 1)


def test_a_bell_that_is_heard_among_many_is_a_sign_of_life() -> None:
    ears = Ears()
    ears.bells = 1000
    for now in range(2000, 4000, 10):
        ears.heard_s = now - 5.0
        assert ears.at(now) == ""


def test_bells_that_another_takes_begin_the_wait_anew() -> None:
    ears = Ears()
    ears.bells = 1
    assert ears.at(2000) == ""
    ears.bells = 0
    assert ears.at(2100) == ""
    ears.bells = 1
    assert ears.at(2110) == ""
    assert ears.at(2110 + DEAF_S - 1) == ""


def test_a_loop_that_does_not_turn_is_deaf_whatever_rings() -> None:
    ears = Ears()
    assert ears.at(1000 + STUCK_S - 1, turned=False) == ""
    assert "has not asked for builds" in ears.at(1000 + STUCK_S + 1, turned=False)
