"""Loads to try a fleet's settings with: when builds come and how long each holds a slot. Recorded, from a file, or made up.
Pure."""

import csv
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from millrace.errors import FieldProblem, InvalidInput
from millrace.fleet import zone_of

MOST_BUILDS: Final = 200_000
LONGEST_S: Final = 7 * 86_400.0
FIRST_MONDAY: Final = datetime(2026, 1, 5, tzinfo=UTC)
"""When loads begin that are made up, or whose times are no dates."""
_A_DATE: Final = 1e9
"""Seconds from here on are since 1970, those below since the load's beginning."""

CSV_HEADER: Final = ("submitted", "length_s", "wait_s")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A build comes at `at_s` after the load's beginning and holds a slot for `length_s`. `waited_s`: how long it really
    waited."""

    at_s: float
    length_s: float
    waited_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A load: arrivals in order, the first at 0 or later; `start_ms` is when it begins, `what` says what it is."""

    start_ms: int
    arrivals: Sequence[Arrival]
    what: str


def trace_of(what: str, found: Iterable[tuple[float, float, float | None]]) -> Trace:
    """A trace of (seconds since 1970, length, wait or None), in any order. Raises InvalidInput where there are none, or too
    many."""
    rows = sorted(found, key=lambda row: row[0])
    if not rows:
        raise InvalidInput(f"{what} holds no build", hint="Take a longer time, or a made-up load: --synthetic burst:200.")
    if len(rows) > MOST_BUILDS:
        raise InvalidInput(f"{what} holds {len(rows)} builds, over the limit of {MOST_BUILDS}", hint="Take a shorter time.")
    begin = rows[0][0]
    offset = FIRST_MONDAY.timestamp() if begin < _A_DATE else 0
    arrivals = [Arrival(at_s=at - begin, length_s=length, waited_s=waited) for at, length, waited in rows]
    return Trace(start_ms=round((begin + offset) * 1000), arrivals=arrivals, what=what)


def read_csv(name: str, lines: Iterable[str]) -> Trace:
    """A load from a CSV file: `submitted` (a time, or seconds), `length_s`, and `wait_s` where it is known.

    Raises InvalidInput that names up to five wrong lines.
    """
    reader = csv.reader(lines, strict=True)
    problems: list[str] = []
    rows: list[tuple[float, float, float | None]] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if tuple(header) not in (CSV_HEADER, CSV_HEADER[:2]):
            raise InvalidInput(
                f"{name}, line 1: the columns are {', '.join(header)[:100] or 'none'}",
                hint=f"They must be {', '.join(CSV_HEADER)}; the last may be left out.",
            )
        for row in reader:
            if row:
                _read_row(row, len(header), f"{name}, line {reader.line_num}", rows, problems)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidInput(f"{name}, line {reader.line_num + 1}: this is no CSV text: {error}") from error
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InvalidInput(
            "the load is wrong:" + "".join(f"\n  {problem}" for problem in problems[:5]) + more,
            hint="A line is like 2026-11-25T09:00:00Z,42.5 or, in seconds, 0,42.5.",
        )
    return trace_of(name, rows)


def _read_row(
    row: Sequence[str], width: int, place: str, rows: list[tuple[float, float, float | None]], problems: list[str]
) -> None:
    if len(row) != width:
        problems.append(f"{place}: {len(row)} values, not {width}")
        return
    at, length = moment_of(row[0].strip()), _seconds(row[1])
    waited = _seconds(row[2]) if width > 2 and row[2].strip() else None
    if at is None:
        problems.append(f"{place}: submitted is {row[0][:40]!r}, neither a time like 2026-11-25T09:00:00Z nor seconds")
    elif length is None or length > LONGEST_S:
        problems.append(f"{place}: length_s is {row[1][:40]!r}, not seconds from 0 to {LONGEST_S:.0f}")
    elif width > 2 and row[2].strip() and waited is None:
        problems.append(f"{place}: wait_s is {row[2][:40]!r}, not seconds")
    else:
        rows.append((at, length, waited))


def _seconds(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def moment_of(text: str) -> float | None:
    """Seconds since 1970, of seconds or a time, which is UTC where it does not say."""
    number = _seconds(text)
    if number is not None:
        return number if number < 4e9 else None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_Numbers = Mapping[str, float]


def _burst(numbers: _Numbers, draw: random.Random, count: int, _zone: str) -> Iterator[float]:
    """All at once, `times` times."""
    del draw
    for number in range(int(numbers["times"])):
        yield from [number * numbers["every"]] * count


def _poisson(numbers: _Numbers, draw: random.Random, count: int, _zone: str) -> Iterator[float]:
    """So many an hour, none knowing of another."""
    at = draw.expovariate(count / 3600)
    while at < numbers["hours"] * 3600:
        yield at
        at += draw.expovariate(count / 3600)


_HOURS: Final = (1, 1, 1, 1, 1, 1, 3, 10, 40, 80, 100, 90, 50, 70, 100, 95, 80, 50, 25, 12, 8, 5, 3, 2)
"""How busy an office is, hour by hour, midnight first; on Saturdays and Sundays a tenth of it."""


def _office_day(numbers: _Numbers, draw: random.Random, count: int, zone: str) -> Iterator[float]:
    """So many a working day, by the hours that people work."""
    share = sum(_HOURS)
    midnight = FIRST_MONDAY.replace(tzinfo=None)
    for day in range(int(numbers["days"])):
        date = midnight + timedelta(days=day)
        builds = count if date.weekday() < 5 else count // 10
        for hour in draw.choices(range(24), weights=[busy / share for busy in _HOURS], k=builds):
            local = (date + timedelta(hours=hour, seconds=draw.uniform(0, 3600))).replace(tzinfo=zone_of(zone))
            yield local.timestamp() - FIRST_MONDAY.timestamp()


_KINDS: Final[
    dict[str, tuple[Callable[[_Numbers, random.Random, int, str], Iterator[float]], dict[str, tuple[float, float]]]]
] = {
    "burst": (_burst, {"times": (1, 1000), "every": (3600, 30 * 86_400)}),
    "poisson": (_poisson, {"hours": (1, 24 * 366)}),
    "office-day": (_office_day, {"days": (1, 366)}),
}
"""Of each kind of made-up load: what makes it, and its own numbers with their default and their most."""

_LENGTH: Final = {"length": (60.0, LONGEST_S), "spread": (0.5, 3.0)}
"""Of all kinds: the median length of a build in seconds, and how much lengths differ (sigma of the log-normal law; 0: not at
all)."""


def synthetic(text: str, seed: int) -> Trace:
    """A made-up load: `burst:200`, `poisson:30,hours=4` (an hour), `office-day:400,days=5,zone=Europe/Berlin`.

    The same text and seed give the same load. Raises InvalidInput.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise InvalidInput(f"{kind[:40]!r} is no kind of load", hint=f"There are {', '.join(_KINDS)}: --synthetic burst:200.")
    make, own = _KINDS[kind]
    known = own | _LENGTH
    count_text, *more = rest.split(",")
    numbers = {name: default for name, (default, _most) in known.items()}
    zone, problems = "UTC", []
    if not count_text.strip().isdecimal() or not 0 < int(count_text) <= MOST_BUILDS:
        problems.append(FieldProblem(field=kind, what=f"is {count_text[:40]!r}, not a number of builds from 1 to {MOST_BUILDS}"))
    for part in more:
        name, _, value = (piece.strip() for piece in part.partition("="))
        number = _seconds(value)
        if name == "zone" and kind == "office-day":
            zone = value
        elif name not in known:
            names = ", ".join(known) + (", zone" if kind == "office-day" else "")
            problems.append(FieldProblem(field=name[:40], what=f"is unknown of {kind}; there are {names}"))
        elif number is None or number > known[name][1] or (number == 0 and name != "spread"):
            problems.append(FieldProblem(field=name, what=f"is {value[:40]!r}, not a number to {known[name][1]:g}"))
        else:
            numbers[name] = number
    try:
        zone_of(zone)
    except ValueError as error:
        problems.append(FieldProblem(field="zone", what=str(error)))
    if problems:
        said = "; ".join(f"{problem.field} {problem.what}" for problem in problems)
        raise InvalidInput(f"the made-up load is wrong: {said}", fields=problems)
    draw = random.Random(seed)  # noqa: S311  # nothing secret: the same seed must give the same load
    begin = FIRST_MONDAY.timestamp()
    rows: list[tuple[float, float, float | None]] = []
    for at in make(numbers, draw, int(count_text), zone):
        if len(rows) == MOST_BUILDS:
            raise InvalidInput(f"{text} makes more builds than the limit of {MOST_BUILDS}", hint="Make it shorter.")
        rows.append((begin + at, numbers["length"] * math.exp(draw.gauss(0, numbers["spread"])), None))
    return trace_of(text, rows)
