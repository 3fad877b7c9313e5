"""The policy of fleets: its limits hold whatever comes, it settles, it reaches zero, and it never starts the same worker
twice."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from millrace.fleet import Scaling
from scheduler.fleets.policy import Decision, Load, Memory, decide

NOW = int(datetime(2026, 11, 25, 12, 0, tzinfo=UTC).timestamp() * 1000)  # a Wednesday
MINUTE = 60_000


@st.composite
def scalings(draw: st.DrawFn, *, to_zero: bool = False) -> Scaling:
    maximum = draw(st.integers(0, 30))
    warm = [] if to_zero or maximum == 0 else draw(st.lists(warm_times(maximum), max_size=2))
    return Scaling(
        minimum=0 if to_zero else draw(st.integers(0, maximum)),
        maximum=maximum,
        target_wait_s=draw(st.sampled_from([0, 5, 30, 600])),
        headroom_slots=0 if to_zero else draw(st.integers(0, 5)),
        utilization_percent=draw(st.none() | st.floats(1, 100)),
        warm=tuple(warm),
        shrink_after_s=draw(st.sampled_from([0, 30, 300])),
    )


@st.composite
def warm_times(draw: st.DrawFn, maximum: int) -> Any:
    times = st.sampled_from(["00:00", "06:30", "11:59", "12:00", "12:01", "23:59"])
    days = draw(st.sets(st.sampled_from(["MON", "TUE", "WED", "THU"]), min_size=1))
    zone = draw(st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York"]))
    return {
        "days": sorted(days),
        "from": draw(times),
        "to": draw(times),
        "timezone": zone,
        "minimum": draw(st.integers(1, maximum)),
    }


@st.composite
def loads(draw: st.DrawFn) -> Load:
    queued, running = draw(st.integers(0, 300)), draw(st.integers(0, 60))
    return Load(
        now_ms=NOW,
        known_ms=NOW - draw(st.integers(0, 60_000)),
        queued=queued,
        oldest_wait_s=draw(st.floats(0, 1000)) if queued else 0,
        running=running,
        on_draining=draw(st.integers(0, running)),
        idle=draw(st.integers(0, 30)),
        busy=draw(st.integers(0, 30)),
        booting=draw(st.integers(0, 30)),
        draining=draw(st.integers(0, 5)),
        build_s=draw(st.none() | st.floats(0.1, 1000)),
        boot_s=draw(st.none() | st.floats(0, 300)),
        starts_ms=draw(st.lists(st.integers(NOW - 120_000, NOW), max_size=4)),
    )


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    if draw(st.booleans()):
        return Memory()
    ages_ms = sorted(draw(st.lists(st.integers(0, 600_000), max_size=4, unique=True)), reverse=True)
    sizes = sorted(draw(st.sets(st.integers(0, 40), min_size=len(ages_ms), max_size=len(ages_ms))), reverse=True)
    recent = [(NOW - age_ms, size) for age_ms, size in zip(ages_ms, sizes, strict=True)]
    return Memory(recent=recent, wanted=draw(st.integers(0, 40)))


SLOTS = st.integers(1, 8)


@given(scalings(), SLOTS, loads(), memories())
def test_the_limits_hold_whatever_is_known(scaling: Scaling, slots: int, load: Load, memory: Memory) -> None:
    decision = decide(scaling, slots, load, memory)
    assert scaling.minimum <= decision.wanted <= scaling.maximum
    assert decision.why and len(decision.why) <= 500


@given(scalings(), SLOTS, loads(), memories(), st.integers(0, 200), st.integers(0, 200))
def test_more_load_never_wants_fewer(
    scaling: Scaling, slots: int, load: Load, memory: Memory, more_queued: int, more_running: int
) -> None:
    more = replace(load, queued=load.queued + more_queued, running=load.running + more_running)
    assert decide(scaling, slots, more, memory).wanted >= decide(scaling, slots, load, memory).wanted


@given(scalings(), SLOTS, loads(), memories(), st.integers(1, 30))
def test_what_boots_is_never_started_twice(scaling: Scaling, slots: int, load: Load, memory: Memory, more: int) -> None:
    def to_start(known: Load) -> int:
        return max(0, decide(scaling, slots, known, memory).wanted - known.present)

    booting = replace(load, booting=load.booting + more)
    assert to_start(booting) <= max(0, to_start(load) - more)
    unseen = replace(load, starts_ms=[*load.starts_ms, load.known_ms + 1])
    assert to_start(unseen) <= max(0, to_start(load) - 1)


@given(scalings(), SLOTS, loads(), memories(), st.integers(60_001, 600_000))
def test_nothing_changes_on_stale_data(scaling: Scaling, slots: int, load: Load, memory: Memory, age_ms: int) -> None:
    stale = replace(load, known_ms=NOW - age_ms)
    decision = decide(scaling, slots, stale, memory)
    assert decision.wanted == stale.present
    assert decision.memory == memory
    assert f"{age_ms / 1000:.0f} s old" in decision.why


def follow(scaling: Scaling, slots: int, load: Load, times: int, every_ms: int = 10_000) -> list[Decision]:
    """Decisions on a load that does not change, each carried out at once; booting workers come with the next one."""
    memory, found = Memory(), []
    for number in range(times):
        at_ms = load.now_ms + number * every_ms
        known = replace(load, now_ms=at_ms, known_ms=at_ms)
        decision = decide(scaling, slots, known, memory)
        memory = decision.memory
        found.append(decision)
        stay = min(load.idle + load.busy + load.booting, decision.wanted)
        load = replace(load, busy=min(load.busy, stay), idle=stay - min(load.busy, stay), booting=decision.wanted - stay)
    return found


@given(scalings(), SLOTS, loads())
def test_it_settles_on_a_load_that_does_not_change(scaling: Scaling, slots: int, load: Load) -> None:
    assume(not scaling.warm)
    load = replace(load, starts_ms=())
    sizes = [decision.wanted for decision in follow(scaling, slots, load, 120)]
    grown = next(number for number, size in enumerate(sizes) if size == max(sizes))
    assert sizes[: grown + 1] == sorted(sizes[: grown + 1])
    assert sizes[grown:] == sorted(sizes[grown:], reverse=True)
    assert len(set(sizes[-50:])) == 1


@given(scalings(to_zero=True), SLOTS, loads())
def test_it_reaches_zero_when_nothing_is_to_do(scaling: Scaling, slots: int, load: Load) -> None:
    nothing = replace(load, queued=0, oldest_wait_s=0, running=0, on_draining=0, starts_ms=())
    found = follow(scaling, slots, nothing, 40)
    assert found[-1].wanted == 0
    assert found[-1].why == "nothing waits or runs: no worker"


@given(scalings(), SLOTS, loads(), st.integers(0, 100))
def test_the_size_is_linear_in_what_waits(scaling: Scaling, slots: int, load: Load, more: int) -> None:
    """No jumps: each build that waits wants one more slot at most."""
    assume(load.oldest_wait_s == 0 or load.queued)
    fresh = replace(load, starts_ms=(), on_draining=0)
    grown = replace(fresh, queued=fresh.queued + more)
    percent = scaling.utilization_percent or 100
    few, many = (decide(scaling, slots, known, Memory()).wanted for known in (fresh, grown))
    assert many - few <= -(-more * 100 / percent // slots) + 1


def a_load(**known: Any) -> Load:
    return Load(**{"now_ms": NOW, "known_ms": NOW, **known})


def wants(known: Load, *, slots: int = 2, memory: Memory | None = None, **scaling: Any) -> tuple[int, str]:
    decision = decide(Scaling(**{"maximum": 50, **scaling}), slots, known, memory or Memory())
    return decision.wanted, decision.why


@pytest.mark.parametrize(
    ("known", "scaling", "wanted", "why"),
    [
        (a_load(), {}, 0, "nothing waits or runs: no worker"),
        (a_load(queued=1), {}, 1, "1 build waits: 1 worker of 2 slots"),
        (replace(a_load(queued=6), waiting=2), {}, 3, "2 builds wait for 6 slots: 3 workers of 2 slots"),
        (replace(a_load(queued=6), waiting=6), {}, 3, "6 builds wait: 3 workers of 2 slots"),
        (
            a_load(queued=3, booting=1),
            {},
            2,
            "3 builds wait and 2 slots are free or booting: 2 workers of 2 slots",
        ),
        (a_load(queued=3, running=2, busy=1), {}, 3, "3 builds wait and 2 run: 3 workers of 2 slots"),
        (a_load(queued=9), {"maximum": 2}, 2, "the maximum is 2; 9 builds wait: 5 workers of 2 slots"),
        (a_load(), {"minimum": 2}, 2, "the minimum is 2; nothing waits or runs: no worker"),
        (a_load(running=2, busy=1), {"headroom_slots": 3}, 3, "2 builds run and 3 slots are to be free: 3 workers of 2 slots"),
        (
            a_load(running=8, busy=4),
            {"utilization_percent": 80},
            5,
            "8 builds run and 80 % of the slots are to be used: 5 workers of 2 slots",
        ),
        (
            a_load(queued=60, build_s=10),
            {"target_wait_s": 50},
            5,
            "60 builds wait and they may wait 50 s more at 10 s each: 5 workers of 2 slots",
        ),
        (  # those that come late have less time
            a_load(queued=60, build_s=10, boot_s=30),
            {"target_wait_s": 50},
            10,
            "60 builds wait and they may wait 50 s more at 10 s each: 10 workers of 2 slots",
        ),
        (  # what is there is enough
            a_load(queued=10, running=2, busy=1, build_s=5, boot_s=60),
            {"target_wait_s": 30},
            1,
            "10 builds wait, 2 run and they may wait 30 s more at 5 s each: 1 worker of 2 slots",
        ),
        (  # the target is missed: each wants its slot
            a_load(queued=10, oldest_wait_s=31, build_s=5),
            {"target_wait_s": 30},
            5,
            "10 builds wait: 5 workers of 2 slots",
        ),
        (a_load(queued=10), {"target_wait_s": 30}, 5, "10 builds wait: 5 workers of 2 slots"),  # no length is known
    ],
)
def test_each_rule_says_what_it_wants(known: Load, scaling: dict[str, Any], wanted: int, why: str) -> None:
    assert wants(known, **scaling) == (wanted, why)


def test_it_never_has_fewer_than_were_wanted_in_the_last_minutes() -> None:
    scaling, memory, found = Scaling(maximum=10, shrink_after_s=300), Memory(), []
    for minute, running in enumerate([16, 4, 2, 6, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0]):
        present = found[-1][0] if found else 8
        at_ms = NOW + minute * MINUTE
        known = Load(now_ms=at_ms, known_ms=at_ms, running=running, busy=present)
        decision = decide(scaling, 2, known, memory)
        memory = Memory(**json.loads(json.dumps(asdict(decision.memory))))
        found.append((decision.wanted, decision.why))
    assert [size for size, _why in found] == [8, 8, 8, 8, 8, 3, 3, 3, 1, 1, 1, 1, 1, 1, 0, 0]
    assert found[1][1] == "held: 8 wanted fewer since 60 s, it shrinks after 300 s; now: 4 builds run: 2 workers of 2 slots"
    assert found[5][1] == "held: 3 wanted fewer since 120 s, it shrinks after 300 s; now: 2 builds run: 1 worker of 2 slots"
    assert found[8][1] == "2 builds run: 1 worker of 2 slots"


def test_a_lower_maximum_is_not_waited_for() -> None:
    wanted, why = wants(a_load(running=16, busy=8), maximum=3)
    assert (wanted, why) == (3, "the maximum is 3; 16 builds run: 8 workers of 2 slots")


def test_a_worker_that_was_lost_is_not_replaced_where_fewer_are_wanted() -> None:
    memory = Memory(recent=[(NOW - MINUTE, 8), (NOW - 1000, 1)], wanted=8)
    assert wants(a_load(running=2, idle=6, busy=1), memory=memory)[0] == 7


def test_workers_that_leave_are_no_reason_for_others_to_leave_or_come() -> None:
    """Of four builds three run on workers that stay: the fourth needs no new slot, and will be followed by others."""
    known = a_load(running=4, on_draining=1, busy=2, draining=1)
    assert wants(known, memory=Memory(wanted=2))[0] == 2
    known = a_load(running=4, on_draining=2, busy=2, draining=1)
    wanted, why = wants(known, memory=Memory(wanted=2), shrink_after_s=0)
    assert (wanted, why) == (2, "held: 2 builds run on workers that leave; 4 builds run: 2 workers of 2 slots")


WARM = {"days": ["WED"], "from": "09:00", "to": "18:00", "timezone": "Europe/Berlin", "minimum": 4}


def at(text: str) -> Load:
    moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return Load(now_ms=int(moment.timestamp() * 1000), known_ms=int(moment.timestamp() * 1000))


@pytest.mark.parametrize(
    ("moment", "warm", "wanted"),
    [
        ("2026-11-25T07:59", WARM, 0),
        ("2026-11-25T08:00", WARM, 4),  # 09:00 in Berlin's winter
        ("2026-11-25T16:59", WARM, 4),
        ("2026-11-25T17:00", WARM, 0),
        ("2026-11-26T12:00", WARM, 0),  # a Thursday
        ("2026-07-01T07:00", WARM, 4),  # 09:00 in Berlin's summer
        ("2026-07-01T06:59", WARM, 0),
        ("2026-11-25T21:30", WARM | {"from": "22:00", "to": "02:00"}, 4),  # past midnight
        ("2026-11-26T00:59", WARM | {"from": "22:00", "to": "02:00"}, 4),
        ("2026-11-26T01:00", WARM | {"from": "22:00", "to": "02:00"}, 0),
        ("2026-11-24T23:30", WARM | {"from": "00:00", "to": "00:00"}, 4),  # all of Berlin's Wednesday
        ("2026-11-25T23:30", WARM | {"from": "00:00", "to": "00:00"}, 0),
    ],
)
def test_warm_hours_go_by_their_zones_clock(moment: str, warm: dict[str, Any], wanted: int) -> None:
    scaling = Scaling.model_validate({"maximum": 9, "warm": [warm]})
    assert decide(scaling, 2, at(moment), Memory()).wanted == wanted


def test_warm_workers_are_started_so_that_they_are_there_in_time() -> None:
    scaling = Scaling.model_validate({"maximum": 9, "warm": [WARM]})
    decision = decide(scaling, 2, replace(at("2026-11-25T07:58"), boot_s=180), Memory())
    assert decision.wanted == 4
    assert decision.why.startswith("4 are to be warm from 09:00 to 18:00 (Europe/Berlin); ")


@pytest.mark.parametrize(
    "zone", ["Mars/Olympus", "", "Europe", "../../etc/passwd", "/etc/passwd", "Europe/\x00Berlin", "x" * 300]
)
def test_a_time_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(ValidationError, match="is no time zone that this machine knows: write one like UTC or Europe/Berlin"):
        Scaling.model_validate({"maximum": 9, "warm": [WARM | {"timezone": zone}]})
