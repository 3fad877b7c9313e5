"""The route of a fleet's load: what came, how long it waited and how long it held a slot, to be tried again with other
settings."""

import csv
import io
from typing import Any

from flask import Blueprint, Response, request

from api.auth import Scope, needs
from api.context import here
from api.paging import only
from millrace import clock
from millrace.errors import InvalidInput
from scheduler.fleets import history
from scheduler.fleets.history import History
from scheduler.fleets.loads import CSV_HEADER, moment_of

blueprint = Blueprint("loads", __name__, url_prefix="/v1/fleets")
_DAY_S = 86_400.0


@blueprint.get("/<name>/load")
@needs(Scope.ADMIN)
def load(name: str) -> Any:
    """Builds that came from `since` on and before `until` (times or seconds since 1970), by default of the last 24 hours."""
    only("since", "until", "format")
    kind = request.args.get("format", "json")
    if kind not in ("json", "csv"):
        raise InvalidInput(f"format is {kind[:40]!r}, neither json nor csv")
    until_s = _moment("until", clock.now_ms() / 1000)
    since_s = _moment("since", until_s - _DAY_S)
    if since_s >= until_s:
        raise InvalidInput("since is not before until", hint="Both are times like 2026-11-25T09:00:00Z, or seconds since 1970.")
    found = history.of(here().db, name, round(since_s * 1000), round(until_s * 1000))
    return Response(_as_csv(found), mimetype="text/csv") if kind == "csv" else _as_json(name, since_s, until_s, found)


def _moment(name: str, default: float) -> float:
    text = request.args.get(name)
    if text is None:
        return default
    moment = moment_of(text)
    if moment is None:
        raise InvalidInput(f"{name} is {text[:40]!r}, neither a time like 2026-11-25T09:00:00Z nor seconds since 1970")
    return moment


def _as_json(name: str, since_s: float, until_s: float, found: History) -> dict[str, Any]:
    return {
        "fleet": name,
        "since": since_s,
        "until": until_s,
        "builds": [
            {"submitted": one.at_ms / 1000, "lengthS": one.length_ms / 1000, "waitS": one.waited_ms / 1000} for one in found.held
        ],
        "open": found.open,
        "cut": found.cut,
        "bootS": found.boot_s,
        "settings": found.settings.model_dump(mode="json", by_alias=True, exclude={"provider"}),
    }


def _as_csv(found: History) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    writer.writerows((one.at_ms / 1000, one.length_ms / 1000, one.waited_ms / 1000) for one in found.held)
    return text.getvalue()
