"""Which deliveries are acted on before they are answered."""

from typing import cast

import pytest

from scheduler import inbox
from scheduler.db import Database
from scheduler.inbox import Inbox


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(inbox, "time", found)
    return found


def came(one: Inbox) -> bool:
    """Whether a delivery that comes now, and is answered at once, is acted on."""
    with one.place() as room:
        return room


def rooms(at_once: int) -> Inbox:
    return Inbox(cast(Database, None), at_once)


def test_so_many_within_half_a_second_are_acted_on_and_those_beyond_only_noted(clock: Clock) -> None:
    one = rooms(2)
    assert [came(one), came(one), came(one)] == [True, True, False]
    clock.now += 0.5
    assert came(one)


def test_a_rush_lasts_as_long_as_they_come(clock: Clock) -> None:
    one = rooms(2)
    found = []
    for _ in range(20):
        found.append(came(one))
        clock.now += 0.1
    assert found == [True, True, *[False] * 18]
    clock.now += 0.5
    assert came(one)


def test_slow_ones_take_the_places_of_others_however_far_apart_they_come(clock: Clock) -> None:
    one = rooms(2)
    with one.place() as first:
        clock.now += 10
        with one.place() as second:
            clock.now += 10
            assert (first, second, came(one)) == (True, True, False)
    assert came(one)


def test_with_no_places_all_are_only_noted(clock: Clock) -> None:
    one = rooms(0)
    assert not came(one)
    clock.now += 1000
    assert not came(one)


def test_it_is_pressed_while_they_are_answered_and_a_moment_longer(clock: Clock) -> None:
    one = rooms(2)
    assert not one.is_pressed()
    with one.place():
        clock.now += 10
        assert one.is_pressed()
    assert not one.is_pressed()
    came(one)
    assert one.is_pressed()
    clock.now += 0.1
    assert not one.is_pressed()
