"""`millrace fleet upgrade`: a new generation of a fleet's workers, some first."""

from typing import Any

import click

from millrace.commands.fleets import fleet_path, say
from millrace.commands.fleetset import provider_of
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console


@click.command("upgrade")
@click.argument("name")
@click.option("--provider-option", "options", multiple=True, metavar="KEY=VALUE", help="What its workers come by from now on.")
@click.option("--slots", type=int, help="Builds that one of the new workers runs at once.")
@click.option("--canary-percent", type=int, help="Share of workers that it begins with; by default as the fleet is set.")
@click.option("--back", is_flag=True, help="Give up the generation that is tried out.")
@click.pass_obj
def fleet_upgrade(
    session: Session, name: str, options: tuple[str, ...], slots: int | None, canary_percent: int | None, back: bool
) -> int:
    """Replace the workers of the fleet NAME by new ones: some first, more while these do as well as the old ones.

    Old workers end what they run before they go. Where the new ones fail by the farm's fault more often, the old generation is
    taken again by itself; --back does that by hand.
    """
    if back and (options or slots is not None or canary_percent is not None):
        raise click.UsageError("--back goes to the generation that was, as it was; give it alone")
    client = connect(session)
    body: dict[str, Any] = {"back": True} if back else {}
    if options or slots is not None:
        settings = client.get(fleet_path(name))["settings"] or {}
        if options:
            body["provider"] = provider_of(settings.get("provider"), None, options)
        if slots is not None:
            body["worker"] = {**settings.get("worker", {}), "slots": slots}
    if canary_percent is not None:
        body["canaryPercent"] = canary_percent
    found = client.post(f"{fleet_path(name)}/upgrade", body)
    client.close()
    say(found)
    if found["generation"] == found["stableGeneration"]:
        console.print(f"All its workers are to be of generation {found['generation']}")
    else:
        share = found["rollout"]["sharePercent"]
        console.print(
            f"Generation {found['generation']} begins with {share} % of the workers; 'millrace fleet show' tells how it does"
        )
    return 0
