"""What came of simulations, for people, for programs, and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from millrace import drawing
from millrace.commands.terminal import harmless
from millrace.drawing import Line, Panel
from scheduler.fleets.loads import Trace
from scheduler.fleets.outcome import Result, Setting, point, slices

PARTS: Final = 12
_PERCENTS: Final = {"median": 50, "p95": 95, "p99": 99, "max": 100}
_DRAWN: Final = 120
_MOST_DRAWN: Final = 8
"""So many variants are drawn, the first ones; more lines tell nobody anything."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to set the fleet, and what it is called."""

    name: str
    setting: Setting


Results = Sequence[tuple[Variant, Result]]


def show(console: Console, trace: Trace, results: Results) -> None:
    """What was tried, a row for each variant, and where there is only one, how it went."""
    lengths = [arrival.length_s for arrival in trace.arrivals]
    over = seconds(trace.arrivals[-1].at_s)
    console.print(
        harmless(f"{trace.what}: {len(lengths)} builds over {over}, ", colours=False)
        + f"of {seconds(point(lengths, 50))} in the middle and {seconds(max(lengths))} at most",
        markup=False,
    )
    if len(results) == 1:
        console.print(_described(results[0][0].setting), markup=False)
    table = Table(box=None, pad_edge=False)
    columns = ("", "wait: median", "p95", "p99", "max", "workers at most", "started", "worker hours", "slots used", "cost")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    recorded = [arrival.waited_s for arrival in trace.arrivals if arrival.waited_s is not None]
    if recorded:
        table.add_row("as it was", *(seconds(point(recorded, percent)) for percent in _PERCENTS.values()))
    for variant, result in results:
        table.add_row(
            variant.name,
            *(seconds(result.wait(percent)) for percent in _PERCENTS.values()),
            str(result.peak),
            str(result.started),
            f"{result.worker_s / 3600:.2f}",
            f"{result.used_percent:.0f} %",
            f"{result.cost:.2f}",
        )
    console.print(table)
    if len(results) == 1:
        console.print()
        console.print(_over_time(trace, results[0][1]))


def _described(setting: Setting) -> str:
    scaling = setting.scaling
    said = [
        f"{scaling.minimum} to {scaling.maximum} workers of {setting.slots} slot{'s' if setting.slots > 1 else ''}",
        f"there {seconds(setting.boot_s)} after they are asked for",
        f"gone {seconds(setting.leave_s)} after they may go",
        f"decided every {seconds(setting.every_s)}",
        f"shrinking after {seconds(scaling.shrink_after_s)}",
    ]
    if scaling.target_wait_s:
        said.append(f"builds may wait {seconds(scaling.target_wait_s)}")
    if scaling.headroom_slots:
        said.append(f"{scaling.headroom_slots} slots free")
    if scaling.utilization_percent is not None:
        said.append(f"{scaling.utilization_percent:g} % of the slots used")
    said += [f"{warm.minimum} warm from {warm.start} to {warm.end} {warm.timezone}" for warm in scaling.warm]
    return ", ".join(said)


def _over_time(trace: Trace, result: Result) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = (
        "from",
        "builds came",
        "wait: median",
        "max",
        "waiting at most",
        "running",
        "workers",
        "wanted at its end",
        "cost so far",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    dated = result.ended_s > 86_400
    for part in slices(result, PARTS):
        moment = datetime.fromtimestamp(trace.start_ms / 1000 + part.from_s, UTC)
        table.add_row(
            f"{moment:%a %H:%M}" if dated else f"{moment:%H:%M:%S}",
            str(part.came),
            "" if part.wait_s is None else seconds(part.wait_s),
            "" if part.longest_s is None else seconds(part.longest_s),
            *(str(number) for number in (part.queued, part.running, part.workers, part.wanted)),
            f"{part.cost:.2f}",
        )
    return table


def as_json(trace: Trace, results: Results) -> dict[str, Any]:
    """The same for programs. Times are seconds, those of `overTime` since the load's beginning at `start` (since 1970)."""
    recorded = [arrival.waited_s for arrival in trace.arrivals if arrival.waited_s is not None]
    load = {
        "what": trace.what,
        "start": trace.start_ms / 1000,
        "builds": len(trace.arrivals),
        "overS": trace.arrivals[-1].at_s,
        "waitedS": _points(recorded) if recorded else None,
    }
    return {"load": load, "variants": [_variant(variant, result) for variant, result in results]}


def _points(samples: Sequence[float]) -> dict[str, float]:
    return {name: round(point(samples, percent), 3) for name, percent in _PERCENTS.items()}


def _variant(variant: Variant, result: Result) -> Mapping[str, Any]:
    setting = variant.setting
    return {
        "name": variant.name,
        "scaling": setting.scaling.model_dump(mode="json", by_alias=True),
        "slots": setting.slots,
        "bootS": setting.boot_s,
        "leaveS": setting.leave_s,
        "costPerHour": setting.cost,
        "everyS": setting.every_s,
        "waitS": _points(result.waits_s),
        "mostWorkers": result.peak,
        "mostWanted": result.most_wanted,
        "startedWorkers": result.started,
        "workerS": round(result.worker_s, 3),
        "usedPercent": round(result.used_percent, 3),
        "cost": round(result.cost, 6),
        "endedS": round(result.ended_s, 3),
        "overTime": [
            {
                "fromS": round(part.from_s, 3),
                "came": part.came,
                "waitS": None if part.wait_s is None else round(part.wait_s, 3),
                "longestS": None if part.longest_s is None else round(part.longest_s, 3),
                "queued": part.queued,
                "running": part.running,
                "workers": part.workers,
                "wanted": part.wanted,
                "cost": round(part.cost, 6),
            }
            for part in slices(result, PARTS)
        ],
    }


def picture(trace: Trace, results: Results) -> str:
    """Waiting time, size and cost over time; of one variant with what makes them up, of several to compare them."""
    until_s = max(result.ended_s for _variant, result in results)
    several = len(results) > 1
    drawn = results[:_MOST_DRAWN]

    def of_each(title: str, points: Mapping[str, Sequence[tuple[float, float]]]) -> Panel:
        return Panel(title=title, lines=[Line(name=name if several else title, points=line) for name, line in points.items()])

    waits = {variant.name: list(_longest(result)) for variant, result in drawn}
    costs = {variant.name: list(_costs(result)) for variant, result in drawn}
    if several:
        sizes = {variant.name: [(float(m.at_s), float(m.workers)) for m in result.moments] for variant, result in drawn}
        middle = [of_each("workers", sizes)]
    else:
        moments = results[0][1].moments
        middle = [
            Panel(
                title="builds",
                lines=[
                    Line(name="waiting", points=[(m.at_s, m.queued) for m in moments]),
                    Line(name="running", points=[(m.at_s, m.running) for m in moments]),
                ],
            ),
            Panel(
                title="workers",
                lines=[
                    Line(name="there, booting and leaving", points=[(m.at_s, m.workers) for m in moments]),
                    Line(name="wanted", points=[(m.at_s, m.wanted) for m in moments], dashed=True),
                    Line(name="taking builds", points=[(m.at_s, m.ready) for m in moments]),
                ],
            ),
        ]
    spent = "cost so far" if results[0][0].setting.cost else "worker hours so far"
    panels = [of_each("longest wait of the builds that started then, s", waits), *middle, of_each(spent, costs)]
    return drawing.charts(f"{trace.what}: {len(trace.arrivals)} builds", panels, until_s)


def _longest(result: Result) -> Iterator[tuple[float, float]]:
    """The longest that builds had waited which started in each stretch of the time."""
    wide = result.ended_s / _DRAWN or 1.0
    longest = [0.0] * (_DRAWN + 1)
    for arrival, wait_s in zip(result.trace.arrivals, result.waits_s, strict=True):
        number = min(_DRAWN, int((arrival.at_s + wait_s) / wide))
        longest[number] = max(longest[number], wait_s)
    last_s = 0.0
    for number, part in enumerate(slices(result, _DRAWN)):
        last_s = longest[number] or (last_s if part.queued else 0.0)  # none started, though some waited
        yield part.from_s, last_s
    yield result.ended_s, longest[_DRAWN]


def _costs(result: Result) -> Iterator[tuple[float, float]]:
    yield 0.0, 0.0
    for part in slices(result, _DRAWN):
        hours = part.worker_s / 3600
        yield part.to_s, hours * result.setting.cost if result.setting.cost else hours


def seconds(value: float) -> str:
    """A time for people."""
    if value < 60:
        return f"{value:.1f} s" if value % 1 else f"{value:.0f} s"
    if value < 3600:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h"
