"""`millrace fleet simulate`: try a fleet's settings on a load, without a worker."""

import csv
import difflib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TextIO
from urllib.parse import quote

import click

from millrace import clock
from millrace.commands import simulated
from millrace.commands.scaling import FIELDS, changed, scaling_options
from millrace.commands.session import Session, connect
from millrace.commands.simulated import Variant
from millrace.commands.terminal import console
from millrace.errors import InvalidInput
from millrace.fleet import FleetSettings, Scaling
from scheduler.fleets import loads
from scheduler.fleets.loads import CSV_HEADER, Trace
from scheduler.fleets.outcome import Setting
from scheduler.fleets.simulate import simulate

MOST_VARIANTS: Final = 64
BOOT_S: Final = 30.0

_OF_WORKERS: Final[dict[str, tuple[str, click.ParamType[Any]]]] = {
    "slots": ("slots", click.IntRange(1, 256)),
    "boot-time": ("boot_s", click.FloatRange(0, 86_400)),
    "leave-time": ("leave_s", click.FloatRange(0, 86_400)),
    "cost": ("cost", click.FloatRange(0, 1_000_000)),
    "every": ("every_s", click.FloatRange(0.1, 3600)),
}
"""What can be tried beside the fields of `Scaling`: the option without its dashes, its field in `Setting`, and its type."""

_AGO: Final = re.compile(r"(\d{1,6})([mhdw])")
_UNITS: Final = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@click.command("simulate")
@click.argument("name", required=False)
@click.option("--synthetic", metavar="KIND:COUNT[,NAME=VALUE]...", help="A made-up load: burst, poisson (an hour) or office-day.")
@click.option("--load", "file", type=click.File(encoding="utf-8-sig"), help="A load from a CSV file: submitted, length_s.")
@click.option("--since", help="The load that the fleet had since then: 90m, 24h, 7d, 2w or a time. By default 24h.")
@click.option("--until", help="The end of that; by default now.")
@scaling_options
@click.option("--slots", type=_OF_WORKERS["slots"][1], help="Builds that a worker runs at once.")
@click.option(
    "--boot-time", "boot_s", type=_OF_WORKERS["boot-time"][1], help="Seconds until a worker that was asked for is there."
)
@click.option(
    "--leave-time", "leave_s", type=_OF_WORKERS["leave-time"][1], default=5, help="Seconds until one that leaves is gone."
)
@click.option("--cost", type=_OF_WORKERS["cost"][1], default=0, help="Price of a worker for an hour, in any currency.")
@click.option("--every", "every_s", type=_OF_WORKERS["every"][1], default=1, help="Seconds between decisions.")
@click.option("--seed", type=int, default=1, help="Which of the made-up loads of this kind.")
@click.option(
    "--what-if", "what_if", multiple=True, metavar="OPTION=VALUE[,VALUE]...", help="Try these, too; may be given several times."
)
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw it into this file.")
@click.option("--save-load", "save", type=click.Path(dir_okay=False, path_type=Path), help="Write the load into this CSV file.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def fleet_simulate(
    session: Session,
    /,
    name: str | None,
    synthetic: str | None,
    file: TextIO | None,
    since: str | None,
    until: str | None,
    slots: int | None,
    boot_s: float | None,
    leave_s: float,
    cost: float,
    every_s: float,
    seed: int,
    what_if: tuple[str, ...],
    svg: Path | None,
    save: Path | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Try how a fleet would do on a load: how long builds wait, how many workers there are, what they cost.

    With NAME, it is tried as that fleet is set, and on the load that it had, unless another one is named. What decides is the
    very policy that runs live.
    """
    recorded = since is not None or until is not None
    if sum((synthetic is not None, file is not None, recorded)) > 1:
        raise click.UsageError("give one load: --synthetic, --load, or --since and --until")
    if name is None and recorded:
        raise click.UsageError("--since and --until are about the load of a fleet: name it")
    if name is None and synthetic is None and file is None:
        raise click.UsageError("name a fleet, or a load by --synthetic or --load")
    live: Mapping[str, Any] = _ask(session, name, since, until) if name is not None else {}
    fleet = _settings(live)
    if synthetic is not None:
        trace = loads.synthetic(synthetic, seed)
    elif file is not None:
        trace = loads.read_csv(file.name, file)
    else:
        trace = _recorded(live)
    base = Setting(
        scaling=changed(fleet.scaling, given),
        slots=slots or fleet.worker.slots,
        boot_s=_first(boot_s, live.get("bootS"), BOOT_S),
        leave_s=leave_s,
        cost=cost,
        every_s=every_s,
    )
    variants = [Variant(name="as set", setting=base)] if not what_if else list(_variants(base, what_if))
    if save is not None:
        _save(trace, save)
    results = [(variant, simulate(trace, variant.setting)) for variant in variants]
    if svg is not None:
        _write(svg, simulated.picture(trace, results))
    if as_json:
        print(json.dumps(simulated.as_json(trace, results), indent=2))  # noqa: T201  # for programs: not wrapped, not coloured
        return 0
    simulated.show(console, trace, results)
    if live.get("cut"):
        console.print(f"The load is cut: there were more than {len(trace.arrivals)} builds. Take a shorter time.")
    for path, what in ((svg, "picture"), (save, "load")):
        if path is not None:
            console.print(f"The {what} is in {path}", markup=False)
    return 0


def _ask(session: Session, name: str, since: str | None, until: str | None) -> dict[str, Any]:
    """What the farm knows of the fleet."""
    now_s = clock.now_ms() / 1000
    until_s = _moment("--until", until, now_s) if until is not None else now_s
    since_s = _moment("--since", since, now_s) if since is not None else until_s - _UNITS["d"]
    client = connect(session)
    try:
        return client.get(f"/v1/fleets/{quote(name, safe='')}/load", since=f"{since_s:.3f}", until=f"{until_s:.3f}")
    finally:
        client.close()


def _moment(option: str, text: str, now_s: float) -> float:
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return max(0.0, now_s - int(ago[1]) * _UNITS[ago[2]])
    moment = loads.moment_of(text)
    if moment is None:
        raise InvalidInput(
            f"{option} is {text[:40]!r}", hint="Write how long ago, 90m, 24h, 7d or 2w, or a time like 2026-11-25T09:00."
        )
    return moment


def _settings(live: Mapping[str, Any]) -> FleetSettings:
    return FleetSettings.model_validate(live["settings"]) if live else FleetSettings()


def _recorded(live: Mapping[str, Any]) -> Trace:
    return loads.trace_of(
        f"the recorded load of fleet {live['fleet']}",
        [(one["submitted"], one["lengthS"], one["waitS"]) for one in live["builds"]],
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _variants(base: Setting, what_if: Sequence[str]) -> Iterator[Variant]:
    """The base, and every combination of what is asked. Raises InvalidInput."""
    yield Variant(name="as set", setting=base)
    axes = [_axis(text) for text in what_if]
    names = [name for name, _values in axes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidInput(f"--what-if names {twice} twice", hint=f"Write all its values in one: --what-if {twice}=1,2.")
    grid = list(itertools.product(*(values for _name, values in axes)))
    if len(grid) > MOST_VARIANTS:
        raise InvalidInput(f"these are {len(grid)} variants, over the limit of {MOST_VARIANTS}", hint="Try fewer values at once.")
    for values in grid:
        setting = base
        for name, value in zip(names, values, strict=True):
            if name in FIELDS:
                setting = replace(setting, scaling=_with(setting.scaling, name, value))
            else:
                setting = replace(setting, **{_OF_WORKERS[name][0]: value})
        label = ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))
        yield Variant(name=label, setting=setting)


def _with(scaling: Scaling, option: str, value: Any) -> Scaling:
    return changed(scaling, {FIELDS[option][0]: value})


def _axis(text: str) -> tuple[str, list[Any]]:
    """What is to be tried: an option's name and its values."""
    name, equals, rest = text.partition("=")
    name = name.strip().lstrip("-")
    kinds = {**{option: kind for option, (_field, kind, _help) in FIELDS.items()}, **{n: k for n, (_f, k) in _OF_WORKERS.items()}}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise InvalidInput(f"--what-if {name[:40]!r} is no parameter{guess}", hint=f"There are {', '.join(kinds)}.")
    if not equals or not rest.strip():
        raise InvalidInput(f"--what-if {name} has no values", hint=f"Write --what-if {name}=1,2,4.")
    try:
        return name, [kinds[name].convert(value.strip(), None, None) for value in rest.split(",")]
    except click.BadParameter as error:
        raise InvalidInput(f"--what-if {name}: {error.message}") from error


def _save(trace: Trace, path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for arrival in trace.arrivals:
        waited = "" if arrival.waited_s is None else f"{arrival.waited_s:.3f}"
        writer.writerow((f"{trace.start_ms / 1000 + arrival.at_s:.3f}", f"{arrival.length_s:.3f}", waited))
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}") from error
