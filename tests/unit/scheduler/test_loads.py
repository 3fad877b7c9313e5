"""Loads to simulate: files are read strictly, with the line of whatever is wrong; made-up ones are what they say."""

import pytest

from millrace.errors import InvalidInput
from scheduler.fleets.loads import FIRST_MONDAY, moment_of, read_csv, synthetic, trace_of


def test_a_file_is_read_in_order_from_its_first_build() -> None:
    text = "submitted,length_s,wait_s\n2026-11-25T09:01:00Z,5,\n2026-11-25T10:00:30+01:00,7.5,2\n\n"
    trace = read_csv("load.csv", text.splitlines())
    assert [(one.at_s, one.length_s, one.waited_s) for one in trace.arrivals] == [(0, 7.5, 2), (30, 5, None)]
    assert trace.start_ms == 1000 * moment_of("2026-11-25T09:00:30Z")  # type: ignore[operator]


def test_seconds_that_are_no_dates_begin_on_a_monday() -> None:
    trace = read_csv("load.csv", ["submitted,length_s", "0,1", "90,1"])
    assert trace.start_ms == FIRST_MONDAY.timestamp() * 1000
    assert [one.at_s for one in trace.arrivals] == [0, 90]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "load.csv, line 1: the columns are none"),
        ("at,length\n0,1\n", "load.csv, line 1: the columns are at, length"),
        ("submitted,length_s\n", "load.csv holds no build"),
        ("submitted,length_s\n0,1\n0\n", "load.csv, line 3: 1 values, not 2"),
        ("submitted,length_s\nyesterday,1\n", "load.csv, line 2: submitted is 'yesterday', neither a time like"),
        ("submitted,length_s\n0,1\n\n0,-1\n", "load.csv, line 4: length_s is '-1', not seconds from 0 to 604800"),
        ("submitted,length_s\n0,nan\n", "load.csv, line 2: length_s is 'nan'"),
        ("submitted,length_s\n0,inf\n", "load.csv, line 2: length_s is 'inf'"),
        ("submitted,length_s\n-5,1\n", "load.csv, line 2: submitted is '-5'"),
        ("submitted,length_s\n1e300,1\n", "load.csv, line 2: submitted is '1e300'"),
        ("submitted,length_s,wait_s\n0,1,long\n", "load.csv, line 2: wait_s is 'long', not seconds"),
        ('submitted,length_s\n0,"1\n', "load.csv, line 3: this is no CSV text"),
        ("submitted,length_s\n" + "x,1\n" * 9, "and 4 more"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_csv("load.csv", text.splitlines(keepends=True))
    assert said in error.value.message


def test_an_empty_load_is_none() -> None:
    with pytest.raises(InvalidInput, match="the recorded load holds no build"):
        trace_of("the recorded load", [])


def test_a_burst_comes_at_once() -> None:
    trace = synthetic("burst:200,length=20,spread=0", 1)
    assert {(one.at_s, one.length_s) for one in trace.arrivals} == {(0.0, 20.0)}
    assert len(trace.arrivals) == 200
    several = synthetic("burst:10,times=3,every=60", 1)
    assert sorted({one.at_s for one in several.arrivals}) == [0, 60, 120]


def test_random_arrivals_come_at_their_rate_and_lengths_are_about_their_median() -> None:
    trace = synthetic("poisson:600,hours=10,length=30", 1)
    lengths = sorted(one.length_s for one in trace.arrivals)
    assert len(trace.arrivals) == pytest.approx(6000, rel=0.05)
    assert lengths[len(lengths) // 2] == pytest.approx(30, rel=0.05)
    assert trace.arrivals[-1].at_s < 36_000


def test_an_office_works_by_its_own_clock() -> None:
    utc, india = (synthetic(f"office-day:1000,zone={zone}", 1) for zone in ("UTC", "Asia/Kolkata"))
    assert len(utc.arrivals) == len(india.arrivals) == 1000
    middle = [sorted(one.at_s + trace.start_ms / 1000 for one in trace.arrivals)[500] for trace in (utc, india)]
    assert middle[0] - middle[1] == pytest.approx(5.5 * 3600, abs=60)
    week = synthetic("office-day:100,days=7", 1)
    assert len(week.arrivals) == 5 * 100 + 2 * 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("storm:5", "'storm' is no kind of load"),
        ("burst", "burst is '', not a number of builds from 1 to 200000"),
        ("burst:0", "burst is '0', not a number of builds"),
        ("burst:many", "burst is 'many'"),
        ("burst:5,length=-1", "length is '-1', not a number to 604800"),
        ("burst:5,length=0", "length is '0', not a number"),
        ("burst:5,colour=red", "colour is unknown of burst; there are times, every, length, spread"),
        ("burst:5,zone=UTC", "zone is unknown of burst"),
        ("office-day:5,zone=Mars", "zone 'Mars' is no time zone"),
        ("burst:200000,times=2", "makes more builds than the limit of 200000"),
        ("poisson:200000,hours=999999", "hours is '999999', not a number to 8784"),
    ],
)
def test_a_made_up_load_that_cannot_be_made_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        synthetic(text, 1)
    assert said in error.value.message + error.value.hint
