"""Options that set how a fleet scales, the same for all verbs that take them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import click
from pydantic import ValidationError

from millrace.errors import FieldProblem, InvalidInput
from millrace.fleet import Scaling, Weekday

F = TypeVar("F", bound=Callable[..., Any])

_DAYS: Final = "|".join(Weekday)
_WARM: Final = re.compile(
    rf"(?:(?P<days>(?:{_DAYS})(?:-(?:{_DAYS}))?(?:,(?:{_DAYS})(?:-(?:{_DAYS}))?)*) +)?"
    r"(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)(?: +(?P<zone>[A-Za-z][^ ]*))? +(?P<minimum>\d+)"
)


class WarmTime(click.ParamType[Any]):
    """A warm minimum in a line: `MON-FRI 08:00-18:00 Europe/Berlin 4`; without days all days, without a zone UTC."""

    name = "[DAYS] FROM-TO [ZONE] WORKERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As a JSON object, which `Scaling` checks."""
        found = _WARM.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is not like 'MON-FRI 08:00-18:00 Europe/Berlin 4'", param, ctx)
        days = [day for part in found["days"].split(",") for day in _days(part)] if found["days"] else list(Weekday)
        named = {"from": found["start"], "to": found["end"], "timezone": found["zone"] or "UTC"}
        return {"days": days, "minimum": int(found["minimum"]), **named}


def _days(part: str) -> list[Weekday]:
    """A day, or all from one to another, over the end of the week where need be."""
    order = list(Weekday)
    first, _, last = part.partition("-")
    begin, end = order.index(Weekday(first)), order.index(Weekday(last or first))
    return [order[number % 7] for number in range(begin, end + 1 if end >= begin else end + 8)]


FIELDS: Final[dict[str, tuple[str, click.ParamType[Any], str]]] = {
    "minimum": ("minimum", click.INT, "Workers that are always there."),
    "maximum": ("maximum", click.INT, "Workers that there may be."),
    "target-wait": ("target_wait_s", click.FLOAT, "Seconds that a build may wait for slots that are there; 0: none."),
    "headroom": ("headroom_slots", click.INT, "Slots kept free beside those that are used."),
    "utilization": ("utilization_percent", click.FLOAT, "Share of the slots that is to be used, in percent."),
    "shrink-after": ("shrink_after_s", click.FLOAT, "Seconds that fewer must have been wanted before one leaves."),
    "stale-after": ("stale_after_s", click.FLOAT, "Age in seconds of what is known from which on nothing is changed."),
    "join-within": ("join_within_s", click.FLOAT, "Seconds after which a worker that has not come is ended."),
}
"""Each option without its dashes: its field, its type, and what it is."""

_NAMES: Final = {field: option for option, (field, _kind, _help) in FIELDS.items()}


def scaling_options(command: F) -> F:
    """Give a verb an option for each field; they come as keywords named like the fields, None where they were not given."""
    warm = "Workers that are there at some hours, as 'MON-FRI 08:00-18:00 Europe/Berlin 4'; may be given several times."
    command = click.option("--warm", "warm", type=WarmTime(), multiple=True, help=warm)(command)
    for name, (field, kind, text) in reversed(FIELDS.items()):
        command = click.option(f"--{name}", field, type=kind, help=text)(command)
    return command


def changed(scaling: Scaling, given: Mapping[str, Any]) -> Scaling:
    """`scaling` with those fields of `given` that are not None, and its warm times where there are any. Raises
    InvalidInput."""
    values = {name: value for name, value in given.items() if name in _NAMES and value is not None}
    if given.get("warm"):
        values["warm"] = tuple(given["warm"])
    try:
        return Scaling.model_validate(scaling.model_dump(by_alias=False) | values)
    except ValidationError as error:
        fields = []
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"])
            fields.append(FieldProblem(field=_option_of(path), what=item["msg"].removeprefix("Value error, ")))
        said = "; ".join(f"{problem.field}: {problem.what}" if problem.field else problem.what for problem in fields)
        raise InvalidInput(f"this cannot be set: {said}", fields=fields) from error


def _option_of(path: str) -> str:
    """The option that a path of `Scaling` was given by."""
    for field, option in _NAMES.items():
        if path in (field, re.sub(r"_(\w)", lambda found: found[1].upper(), field)):
            return f"--{option}"
    return f"--{path}" if path else ""
