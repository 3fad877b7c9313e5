"""The simulator: nothing is lost, it costs what is there, the same seed gives the same, and queues wait as theory says they
do."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import InvalidInput
from millrace.fleet import Scaling
from scheduler.fleets import observe
from scheduler.fleets.loads import Arrival, Trace, synthetic
from scheduler.fleets.outcome import Result, Setting, slices
from scheduler.fleets.simulate import BOOTS_SEEN, BUILDS_SEEN, _Run, simulate


def a_trace(*arrivals: tuple[float, float]) -> Trace:
    return Trace(start_ms=0, arrivals=[Arrival(at_s=at, length_s=length) for at, length in arrivals], what="a test")


def a_setting(**changes: Any) -> Setting:
    scaling = {name: changes.pop(name) for name in list(changes) if name in Scaling.model_fields}
    return Setting(scaling=Scaling(**{"maximum": 50, **scaling}), **changes)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    arrivals = draw(st.lists(st.tuples(st.floats(0, 600), st.floats(0, 120)), min_size=1, max_size=60))
    return a_trace(*sorted(arrivals))


@st.composite
def settings_(draw: st.DrawFn) -> Setting:
    maximum = draw(st.integers(1, 12))
    return a_setting(
        maximum=maximum,
        minimum=draw(st.integers(0, maximum)),
        target_wait_s=draw(st.sampled_from([0, 20, 200])),
        headroom_slots=draw(st.integers(0, 3)),
        shrink_after_s=draw(st.sampled_from([0, 30, 300])),
        slots=draw(st.integers(1, 4)),
        boot_s=draw(st.sampled_from([0.0, 7.0, 60.0])),
        leave_s=draw(st.sampled_from([0.0, 2.5, 20.0])),
        cost=draw(st.sampled_from([0.0, 1.0])),
    )


def integral(result: Result, name: str) -> float:
    """What a figure takes over the whole time."""
    ends = [moment.at_s for moment in result.moments[1:]] + [result.ended_s]
    pairs = zip(result.moments, ends, strict=True)
    return math.fsum(getattr(moment, name) * (end - moment.at_s) for moment, end in pairs)


@settings(max_examples=150, deadline=None)
@given(traces(), settings_())
def test_every_build_is_served_and_every_worker_paid_for(trace: Trace, setting: Setting) -> None:
    result = simulate(trace, setting)
    assert len(result.waits_s) == len(trace.arrivals)
    assert all(wait >= 0 for wait in result.waits_s)
    last = result.moments[-1]
    assert (last.queued, last.running, last.booting, last.draining) == (0, 0, 0, 0)
    lengths = math.fsum(arrival.length_s for arrival in trace.arrivals)
    assert integral(result, "running") == pytest.approx(lengths, abs=1e-6)
    assert integral(result, "queued") == pytest.approx(math.fsum(result.waits_s), abs=1e-6)
    assert result.worker_s == pytest.approx(integral(result, "workers"), abs=1e-6)
    assert result.worker_s >= integral(result, "ready") - 1e-6
    assert result.cost == pytest.approx(result.worker_s / 3600 * setting.cost)


@settings(max_examples=150, deadline=None)
@given(traces(), settings_())
def test_limits_hold_at_every_moment(trace: Trace, setting: Setting) -> None:
    result = simulate(trace, setting)
    scaling = setting.scaling
    for moment in result.moments:
        assert scaling.minimum <= moment.wanted <= scaling.maximum
        assert moment.ready + moment.booting <= scaling.maximum
        assert moment.running <= (moment.ready + moment.draining) * setting.slots
        assert not moment.queued or moment.running >= moment.ready * setting.slots, "a slot was free, and a build waited"
    assert result.moments[-1].workers == result.moments[-1].wanted


@settings(max_examples=100, deadline=None)
@given(traces(), settings_())
def test_never_more_are_there_than_were_wanted(trace: Trace, setting: Setting) -> None:
    result = simulate(trace, setting)
    most = 0
    for moment in result.moments:
        most = max(most, moment.wanted)
        assert moment.ready + moment.booting <= most
        assert moment.ready <= moment.wanted or moment.booting


@settings(max_examples=50, deadline=None)
@given(traces(), settings_())
def test_the_slices_add_up(trace: Trace, setting: Setting) -> None:
    result = simulate(trace, setting)
    parts = slices(result, 7)
    assert sum(part.came for part in parts) == len(trace.arrivals)
    assert max(part.longest_s or 0 for part in parts) == max(result.waits_s)
    assert max(part.workers for part in parts) == result.peak
    assert parts[-1].worker_s == pytest.approx(result.worker_s)
    assert [part.worker_s for part in parts] == sorted(part.worker_s for part in parts)


@pytest.mark.parametrize("text", ["burst:50", "poisson:120,hours=1", "office-day:60"])
def test_the_same_seed_gives_the_same(text: str) -> None:
    setting = a_setting(target_wait_s=30, boot_s=20.0)
    first, second, other = (simulate(synthetic(text, seed), setting) for seed in (3, 3, 4))
    assert first == second
    assert first.trace.arrivals != other.trace.arrivals
    assert first.worker_s != other.worker_s


def test_one_server_that_gets_more_than_it_can_do_falls_behind_by_the_difference() -> None:
    """D/D/1: a build each second, two seconds each: the n-th waits n seconds."""
    trace = a_trace(*((float(number), 2.0) for number in range(100)))
    result = simulate(trace, a_setting(minimum=1, maximum=1, slots=1, boot_s=0.0))
    assert list(result.waits_s) == pytest.approx([float(number) for number in range(100)])


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.5), (4, 0.6)])
def test_random_loads_wait_as_theory_says(servers: int, busy: float) -> None:
    """M/M/c: each build as the recursion of Kiefer and Wolfowitz says, and all together as Erlang's formula C does."""
    length_s = 10.0
    rate = busy * servers / length_s
    trace = _markov(rate, length_s, 40_000)
    result = simulate(trace, a_setting(minimum=servers, maximum=servers, slots=1, boot_s=0.0, every_s=600.0))
    assert list(result.waits_s) == pytest.approx(_waits_by_recursion(trace, servers), abs=1e-6)
    offered = rate * length_s
    whole = math.fsum(offered**k / math.factorial(k) for k in range(servers))
    tail = offered**servers / math.factorial(servers) / (1 - busy)
    waiting = tail / (whole + tail)
    expected_s = waiting * length_s / (servers * (1 - busy))
    assert math.fsum(result.waits_s) / len(result.waits_s) == pytest.approx(expected_s, rel=0.05)
    assert sum(wait > 0 for wait in result.waits_s) / len(result.waits_s) == pytest.approx(waiting, rel=0.05)


def _markov(rate: float, length_s: float, count: int) -> Trace:
    draw, at, arrivals = random.Random(1), 0.0, []
    for _ in range(count):
        arrivals.append((at, draw.expovariate(1 / length_s)))
        at += draw.expovariate(rate)
    return a_trace(*arrivals)


def _waits_by_recursion(trace: Trace, servers: int) -> list[float]:
    """How long each server has work, seen by each build that comes: it waits for the one that is free first."""
    work, last_s, waits = [0.0] * servers, 0.0, []
    for arrival in trace.arrivals:
        work = sorted(max(0.0, left - (arrival.at_s - last_s)) for left in work)
        waits.append(work[0])
        work[0] += arrival.length_s
        last_s = arrival.at_s
    return waits


def test_a_burst_waits_for_its_workers_to_boot_and_goes_back_to_zero() -> None:
    """Counted by hand: 8 builds of 10 s on 2 workers of 2 slots that boot for 30 s: half wait 30 s, half 40 s."""
    result = simulate(a_trace(*[(0.0, 10.0)] * 8), a_setting(maximum=2, boot_s=30.0, shrink_after_s=60))
    assert sorted(result.waits_s) == [30.0] * 4 + [40.0] * 4
    assert result.peak == 2
    assert result.started == 2
    assert result.moments[-1].workers == 0
    # The last ends at 50 s; that it runs is seen at 49 s, they stay for 60 s after that, and leave in 5 s.
    assert result.worker_s == 2 * 114.0
    assert result.used_percent == pytest.approx(100 * 80 / 456)


def test_a_worker_that_is_wanted_no_more_when_it_comes_leaves_then() -> None:
    """The second build is served by the first worker, as that comes before its own."""
    trace = a_trace((0.0, 1.0), (3.0, 1.0))
    result = simulate(trace, a_setting(slots=1, boot_s=4.0, leave_s=0.0, shrink_after_s=0, every_s=1.0))
    assert list(result.waits_s) == [4.0, 2.0]
    assert result.started == 2
    assert result.worker_s == (6 - 0) + (7 - 3)


def test_a_target_trades_waiting_for_workers() -> None:
    trace = synthetic("burst:200,length=10,spread=0", 1)
    peaks, waits = [], []
    for target_s in (0, 30, 120):
        result = simulate(trace, a_setting(target_wait_s=target_s, boot_s=5.0, maximum=200, slots=1))
        peaks.append(result.peak)
        waits.append(result.wait(100))
    assert peaks == sorted(peaks, reverse=True) and peaks[0] == 200
    assert waits == sorted(waits)


def test_hours_that_are_warm_have_their_workers_without_a_load() -> None:
    warm = {"from": "08:00", "to": "18:00", "minimum": 3}
    scaling = Scaling.model_validate({"maximum": 5, "warm": [warm]})
    trace = a_trace((0.0, 1.0), (86_400.0, 1.0))
    result = simulate(trace, Setting(scaling=scaling, boot_s=0.0))
    at_noon = next(moment for moment in result.moments if moment.at_s > 12 * 3600)
    assert result.peak == 3
    assert at_noon.workers == 3


@settings(max_examples=40, deadline=None)
@given(traces(), settings_())
def test_looks_that_are_passed_over_would_have_changed_nothing(trace: Trace, setting: Setting) -> None:
    quick = simulate(trace, setting)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_next_look_s", lambda run: run._now_s + setting.every_s)
        slow = simulate(trace, setting)
    assert quick.waits_s == slow.waits_s
    assert (quick.worker_s, quick.started) == (pytest.approx(slow.worker_s), slow.started)


def test_a_fleet_of_no_worker_is_refused() -> None:
    with pytest.raises(InvalidInput, match="maximum is 0: no build would ever start"):
        simulate(a_trace((0.0, 1.0)), a_setting(maximum=0))


def test_what_is_not_wanted_any_more_changes_nothing_of_the_past() -> None:
    """Longer decisions' intervals only make things later."""
    trace = synthetic("burst:40,length=20", 1)
    fast = simulate(trace, a_setting(boot_s=5.0, every_s=1.0))
    slow = simulate(trace, replace(a_setting(boot_s=5.0), every_s=30.0))
    assert fast.wait(50) <= slow.wait(50) + 1e-9


def test_medians_are_taken_over_as_many_as_in_life() -> None:
    assert (BUILDS_SEEN, BOOTS_SEEN) == (observe._LENGTHS, observe._BOOTS)
