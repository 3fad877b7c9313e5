"""`millrace fleet set`: how a fleet is set, by options or from a file."""

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

import click

from millrace.commands.fleets import fleet_path, say
from millrace.commands.scaling import changed, scaling_options
from millrace.commands.session import Session, connect
from millrace.errors import InvalidInput, NotFound
from millrace.fleet import ProviderSettings, Scaling
from millrace.project import Shape

_PROVIDERS: Final[dict[str, type[Shape]]] = {
    kind.model_fields["type"].default: kind for kind in get_args(get_args(ProviderSettings)[0])
}


@click.command("set")
@click.argument("name")
@click.option("--max-running", type=click.IntRange(1), help="How many of its builds may run at once.")
@click.option("--no-limit", is_flag=True, help="No such limit.")
@click.option("--provider", type=click.Choice(sorted(_PROVIDERS)), help="Where its workers come from.")
@click.option(
    "--provider-option", "options", multiple=True, metavar="KEY=VALUE", help="A setting of its provider; may be repeated."
)
@click.option("--no-provider", is_flag=True, help="Its workers come and go by other hands; nothing is scaled.")
@scaling_options
@click.option("--no-warm", is_flag=True, help="No warm times.")
@click.option("--slots", type=int, help="Builds that one worker runs at once.")
@click.option("--cpus", type=float, help="CPUs that one worker has for builds.")
@click.option("--memory", "memory_bytes", type=int, help="Bytes of memory that one worker has for builds.")
@click.option("--label", "labels", multiple=True, help="What its workers are or have; may be repeated.")
@click.option("--overflow-to", metavar="FLEET", help="Move builds that it cannot start at its maximum to this fleet.")
@click.option("--no-overflow", is_flag=True, help="Have them wait.")
@click.option("--canary-percent", type=int, help="Share of workers that a new generation begins with.")
@click.option("--file", "path", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="All settings, as JSON.")
@click.pass_obj
def fleet_set(session: Session, /, name: str, path: Path | None, **given: Any) -> int:
    """Set the fleet NAME: how many of its builds may run, where its workers come from, and how many there are.

    What is not named stays as it is. Where anything is wrong, nothing is changed.
    """
    named = {option: value for option, value in given.items() if not (value is None or value is False or value == ())}
    if path is None and not named:
        raise click.UsageError("say what is to be set; 'millrace fleet set --help' lists the options")
    if path is not None and named:
        raise click.UsageError("--file holds all settings; give it, or options")
    for one, other in (
        ("max_running", "no_limit"),
        ("provider", "no_provider"),
        ("warm", "no_warm"),
        ("overflow_to", "no_overflow"),
    ):
        if one in named and other in named:
            raise click.UsageError(f"--{one.replace('_', '-')} and --{other.replace('_', '-')} say different things")
    client = connect(session)
    if path is not None:
        body = _from_file(path)
    elif named.keys() <= {"max_running", "no_limit"}:
        body = {"maxRunning": given["max_running"]}
    else:
        try:
            before = client.get(fleet_path(name))["settings"] or {}
        except NotFound:
            before = {}
        body = _body(before, named)
    say(client.put(fleet_path(name), body))
    client.close()
    return 0


def _from_file(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidInput(
            f"{path} holds no JSON object", hint="'millrace fleet show NAME --json' shows what settings look like."
        )
    return body


def _body(before: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of before, with what was named."""
    body = dict(before)
    if "no_limit" in named or "max_running" in named:
        body["maxRunning"] = named.get("max_running")
    if "no_provider" in named:
        body["provider"] = None
    elif "provider" in named or "options" in named:
        body["provider"] = provider_of(body.get("provider"), named.get("provider"), named.get("options", ()))
    scaling = Scaling.model_validate(body.get("scaling", {}))
    if "no_warm" in named:
        scaling = scaling.model_copy(update={"warm": ()})
    body["scaling"] = changed(scaling, named).model_dump(mode="json", by_alias=True, exclude_none=True)
    worker = dict(body.get("worker", {}))
    for option, field in (("slots", "slots"), ("cpus", "cpus"), ("memory_bytes", "memoryBytes"), ("labels", "labels")):
        if option in named:
            worker[field] = list(named[option]) if option == "labels" else named[option]
    body["worker"] = worker
    if "overflow_to" in named:
        body |= {"overflowBehavior": "ON_DEMAND", "overflowFleet": named["overflow_to"]}
    if "no_overflow" in named:
        body |= {"overflowBehavior": "QUEUE", "overflowFleet": None}
    if "canary_percent" in named:
        body["canaryPercent"] = named["canary_percent"]
    return {field: value for field, value in body.items() if value is not None or field in ("maxRunning", "provider")}


def provider_of(before: Mapping[str, Any] | None, kind: str | None, options: tuple[str, ...]) -> dict[str, Any]:
    """A provider's settings: those of before where it is of the same kind, with the options `KEY=VALUE`. Raises InvalidInput."""
    if kind is None:
        kind = before["type"] if before else None
    if kind is None:
        raise InvalidInput("--provider-option is for a provider, and the fleet has none", hint="Give --provider, too.")
    shape = _PROVIDERS[kind]
    found: dict[str, Any] = dict(before) if before and before["type"] == kind else {"type": kind}
    for option in options:
        key, sign, value = option.partition("=")
        field, _, inner = key.partition(".")
        known = {info.alias or name: info for name, info in shape.model_fields.items() if name != "type"}
        by_name = {name: info.alias or name for name, info in shape.model_fields.items() if name != "type"}
        field = by_name.get(field.replace("-", "_"), field)
        if not sign or field not in known:
            raise InvalidInput(
                f"{option!r} is no option of the provider {kind!r}",
                hint=f"It has: {', '.join(sorted(known)) or 'none'}; as KEY=VALUE.",
            )
        if inner:
            found[field] = {**found.get(field, {}), inner: value}
        else:
            found[field] = _typed(known[field].annotation, value)
    return found


def _typed(annotation: Any, value: str) -> Any:
    """A value as its field has it: lists are comma-separated. What does not fit is left for the farm to refuse."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if annotation is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if annotation in (int, float) and value.replace(".", "", 1).isdigit():
        return annotation(value)
    if get_origin(annotation) is tuple:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value
