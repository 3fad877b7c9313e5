"""`millrace fleet show`: what a fleet wants, why, and who is there."""

import json
from datetime import UTC, datetime
from typing import Any, Final

import click
from rich.table import Table

from millrace.commands.fleets import fleet_path, say
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console, harmless, size

_DECISIONS: Final = 8


@click.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def fleet_show(session: Session, name: str, as_json: bool) -> int:
    """Show the fleet NAME: how many workers it wants and why, who is there, and what was decided."""
    client = connect(session)
    found = client.get(fleet_path(name))
    client.close()
    if as_json:
        console.print_json(json.dumps(found))
        return 0
    say(found)
    _say_scaling(found)
    _say_workers(found)
    _say_decisions(found)
    return 0


def _say_scaling(found: dict[str, Any]) -> None:
    scaling = found["scaling"]
    if scaling is None:
        console.print("It is not scaled: 'millrace fleet set NAME --provider ...' says where its workers come from.")
        return
    workers = "worker" if scaling["wanted"] == 1 else "workers"
    _plain(f"Wanted: {scaling['wanted']} {workers}, as of {_time(scaling['at'])}: {scaling['why']}")
    for verb, trouble in sorted(scaling["troubles"].items()):
        _plain(
            f"Trouble: the provider does not {verb} ({trouble['kind']}, {trouble['failures']} times"
            f" since {_time(trouble['since'])}): {trouble['message']}"
        )
    for stranger in scaling["strangers"]:
        _plain(f"Stranger: nobody here asked for the instance {stranger}; it is left alone")
    if found["generation"] != found["stableGeneration"]:
        share = (found["rollout"] or {}).get("sharePercent", 0)
        _plain(f"Generation {found['generation']} is tried out on {share} % of the workers; before: {found['stableGeneration']}")
        if scaling["judged"]:
            _plain(f"  now: {scaling['judged']}")
    for step in ((found["rollout"] or {}).get("steps") or [])[-3:]:
        _plain(f"  {_time(step['at'])} {step['kind'].lower()}: {step['why']}")


def _say_workers(found: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "is", "running", "slots", "free", "generation", "idle", "why"):
        table.add_column(column)
    seen = {worker["id"] for worker in found["workersSeen"]}
    for worker in found["workersSeen"]:
        idle_s = worker["idleSeconds"]
        table.add_row(
            worker["id"],
            worker["at"],
            str(worker["running"]),
            str(worker["slots"]),
            _free(worker),
            str(worker["generation"] or ""),
            f"{idle_s:.0f} s" if idle_s is not None else "",
            harmless(worker["why"], colours=False).replace("[", r"\["),
        )
    for instance in found["instances"]:
        if instance["id"] not in seen:
            state = "stopping" if instance["state"] == "stopping" or instance["released"] else "booting"
            table.add_row(instance["id"], state, "", "", "", str(instance["generation"] or ""), "", instance["why"])
    if table.row_count:
        console.print(table)
    else:
        console.print("No workers are there.")


def _free(worker: dict[str, Any]) -> str:
    """What of its processors and memory no build has reserved."""
    offer, room = worker["offer"] or {}, worker["room"] or {}
    parts = []
    if offer.get("cpus") is not None:
        parts.append(f"{room['cpus']:g} of {offer['cpus']:g} cpus")
    if offer.get("memoryBytes") is not None:
        parts.append(f"{size(max(0, room['memoryBytes']))} of {size(offer['memoryBytes'])}")
    return ", ".join(parts)


def _say_decisions(found: dict[str, Any]) -> None:
    if found["decisions"]:
        console.print("Decided of late:")
    for decision in found["decisions"][:_DECISIONS]:
        _plain(f"  {_time(decision['at'])} {decision['wanted']} wanted: {decision['why']}")


def _plain(text: str) -> None:
    console.print(harmless(text, colours=False), markup=False)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
