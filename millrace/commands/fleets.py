"""Verbs about the queue: why a build waits, and the fleets that take builds from it."""

from typing import Any, Final
from urllib.parse import quote

import click
from rich.table import Table

from millrace.client import build_path
from millrace.commands.lazy import Verbs
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console, harmless


@click.command()
@click.argument("build_id")
@click.pass_obj
def why(session: Session, build_id: str) -> int:
    """Say why a build waits: who goes before it, what keeps it, and what would start it."""
    client = connect(session)
    found = client.get(f"{build_path(build_id)}/queue")
    client.close()
    place = f", number {found['position']} in the queue" if found["position"] else ""
    console.print(f"{found['buildId']} is {found['state']}{place}", markup=False)
    console.print(harmless(found["says"], colours=False), markup=False)
    for one in found["ahead"]:
        console.print(f"  before it: {one.get('id', 'a build of another project')}", markup=False)
    if found["aheadCount"] > len(found["ahead"]):
        console.print(f"  and {found['aheadCount'] - len(found['ahead'])} more")
    for bound in found["limits"]:
        console.print(f"[bold]{bound['limit']}[/]: ", end="")
        console.print(harmless(bound["lift"], colours=False), markup=False)
    return 0


_VERBS: Final = {
    "set": "fleetset:fleet_set",
    "show": "fleetshow:fleet_show",
    "upgrade": "fleetupgrade:fleet_upgrade",
    "simulate": "simulate:fleet_simulate",
}


@click.group(cls=Verbs, verbs=_VERBS)
def fleet() -> None:
    """Fleets: groups of workers, each with a queue of its own."""


@fleet.command("ls")
@click.pass_obj
def fleet_ls(session: Session) -> int:
    """List fleets."""
    client = connect(session)
    found = client.get("/v1/fleets")["fleets"]
    client.close()
    table = Table(box=None, pad_edge=False)
    for column in ("fleet", "waiting", "running", "limit", "workers", "wanted", "slots", "free", "paused"):
        table.add_column(column)
    for item in found:
        table.add_row(
            item["name"],
            *(str(item[name]) for name in ("waiting", "running")),
            str(item["maxRunning"] or ""),
            str(item["workers"]),
            str(item["scaling"]["wanted"]) if item["scaling"] else "",
            *(str(item[name]) for name in ("slots", "freeSlots")),
            _paused(item),
        )
    console.print(table if found else "No fleets yet: one is there once a worker joins it, or a build waits for it.")
    for item in found:
        for says in item["notClaiming"]:
            console.print(harmless(f"fleet {item['name']}: {says}", colours=False), markup=False)
    return 0


@fleet.command("pause")
@click.argument("name")
@click.option("--why", "reason", default="", help="What people read who wait.")
@click.pass_obj
def fleet_pause(session: Session, name: str, reason: str) -> int:
    """Have the workers of the fleet NAME claim nothing more. Builds that run go on."""
    client = connect(session)
    say(client.post(f"{fleet_path(name)}/pause", {"why": reason}))
    client.close()
    return 0


@fleet.command("resume")
@click.argument("name")
@click.pass_obj
def fleet_resume(session: Session, name: str) -> int:
    """Have the workers of the fleet NAME claim builds again."""
    client = connect(session)
    say(client.post(f"{fleet_path(name)}/resume"))
    client.close()
    return 0


@fleet.command("drain")
@click.argument("name")
@click.option("--worker", help="Only this one; the fleet goes on.")
@click.option("--why", "reason", default="", help="What people read who wait.")
@click.pass_obj
def fleet_drain(session: Session, name: str, worker: str | None, reason: str) -> int:
    """Have the workers of the fleet NAME finish what they run, and leave; it is paused until 'resume'.

    With --worker ID only that one leaves, and another comes where the fleet scales.
    """
    client = connect(session)
    body = {"why": reason, **({"worker": worker} if worker is not None else {})}
    found = client.post(f"{fleet_path(name)}/drain", body)
    client.close()
    leaving = [one for one in found["workersSeen"] if one["at"] == "draining"]
    running = sum(one["running"] for one in leaving)
    say(found)
    workers = "1 worker leaves" if len(leaving) == 1 else f"{len(leaving)} workers leave"
    builds = "its build has ended" if running == 1 else f"{running} builds have ended"
    console.print(f"{workers}{f', once {builds}' if running else ''}")
    return 0


def fleet_path(name: str) -> str:
    """Where the API has a fleet."""
    return f"/v1/fleets/{quote(name, safe='')}"


def _paused(item: dict[str, Any]) -> str:
    paused = item["paused"]
    if paused is None:
        return ""
    return harmless(f"by {paused['by']}" + (f": {paused['why']}" if paused["why"] else ""), colours=False).replace("[", r"\[")


def say(item: dict[str, Any]) -> None:
    """How a fleet is set now, in a line or two."""
    limit = f"at most {item['maxRunning']} at once" if item["maxRunning"] else "no limit of its own"
    state = f"paused {_paused(item)}" if item["paused"] else "taking builds"
    console.print(f"Fleet {item['name']}: {state}, {limit}; {item['waiting']} waiting, {item['running']} running")
    provider = (item["settings"] or {}).get("provider")
    if provider is not None:
        scaling = item["settings"]["scaling"]
        console.print(f"Its workers come from {provider['type']}: {scaling['minimum']} to {scaling['maximum']} of them")
    for warning in item.get("warnings", ()):
        console.print(harmless(f"note: {warning}", colours=False), markup=False)
