"""Routes of fleets: how they are set, paused and resumed."""

from typing import Any

from flask import Blueprint
from pydantic import Field

from api import jsonbody
from api.auth import Scope, needs, principal
from api.context import here
from api.paging import only
from millrace.project import Shape
from scheduler import dispatch
from scheduler.fleets import records
from scheduler.fleets.records import FleetRecord

blueprint = Blueprint("fleets", __name__, url_prefix="/v1/fleets")


class FleetInput(Shape):
    """How a fleet is set. `maxRunning` null: no limit."""

    max_running: int | None = Field(default=None, ge=1, le=1_000_000)


class PauseInput(Shape):
    """Why a fleet is paused; people who wait read it."""

    why: str = Field(default="", max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")


@blueprint.get("")
@needs(Scope.ADMIN)
def find() -> dict[str, Any]:
    """All fleets by name."""
    only()
    return {"fleets": [_rendered(record) for record in records.find(here().db)]}


@blueprint.get("/<name>")
@needs(Scope.ADMIN)
def show(name: str) -> dict[str, Any]:
    """One fleet."""
    only()
    return _rendered(records.get(here().db, name))


@blueprint.put("/<name>")
@needs(Scope.ADMIN)
def put(name: str) -> dict[str, Any]:
    """Set a fleet's limit."""
    only()
    record = records.change(here().db, name, max_running=jsonbody.read(FleetInput).max_running)
    dispatch.wake(here().db, here().bell, name)
    return _rendered(record)


@blueprint.post("/<name>/pause")
@needs(Scope.ADMIN)
def pause(name: str) -> dict[str, Any]:
    """Claim nothing of the fleet any more; what runs goes on."""
    only()
    return _rendered(records.pause(here().db, name, by=principal().name, why=jsonbody.read(PauseInput).why))


@blueprint.post("/<name>/resume")
@needs(Scope.ADMIN)
def resume(name: str) -> dict[str, Any]:
    """Claim again."""
    only()
    record = records.resume(here().db, name)
    dispatch.wake(here().db, here().bell, name)
    return _rendered(record)


def _rendered(record: FleetRecord) -> dict[str, Any]:
    paused = None
    if record.paused_ms is not None:
        paused = {"since": record.paused_ms / 1000, "by": record.paused_by, "why": record.paused_why}
    return {
        "name": record.name,
        "paused": paused,
        "maxRunning": record.max_running,
        "waiting": record.waiting,
        "running": record.running,
        "workers": record.workers,
        "slots": record.slots,
        "freeSlots": record.free_slots,
        "notClaiming": list(record.not_claiming),
    }
