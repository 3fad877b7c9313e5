"""Routes of fleets: how they are set, what they have, paused, drained and resumed."""

from typing import Any, Final

from flask import Blueprint
from pydantic import Field

from api import jsonbody
from api.auth import Scope, needs, principal
from api.context import here
from api.fleetinput import FleetInput
from api.paging import only
from millrace.errors import InvalidInput, ProviderTrouble
from millrace.fleet import ContainersProvider, FargateProvider, FleetSettings, ProviderSettings, WorkerShape
from millrace.need import Offer
from millrace.project import Shape
from millrace.vocabulary import Trouble
from scheduler import dispatch
from scheduler.fleets import faces, marks, records, upgrades
from scheduler.fleets.capacity import Living
from scheduler.fleets.faces import Face
from scheduler.fleets.observe import WorkerSeen
from scheduler.fleets.providers import open_provider
from scheduler.fleets.records import FleetRecord

blueprint = Blueprint("fleets", __name__, url_prefix="/v1/fleets")
_PASSING: Final = (Trouble.THROTTLED, Trouble.AWAY)


class PauseInput(Shape):
    """Why a fleet is paused; people who wait read it."""

    why: str = Field(default="", max_length=300, pattern=r"^[^\x00-\x1f\x7f]*$")


class DrainInput(PauseInput):
    """`worker`: the one that is to leave; None: all of them, and the fleet is paused."""

    worker: str | None = Field(default=None, min_length=1, max_length=100)


class UpgradeInput(Shape):
    """What workers of the new generation come by, where that is to change; `back`: the one that is tried out is given up."""

    back: bool = False
    provider: ProviderSettings | None = None
    worker: WorkerShape | None = None
    canary_percent: int | None = Field(default=None, ge=1, le=100)


@blueprint.get("")
@needs(Scope.ADMIN)
def find() -> dict[str, Any]:
    """All fleets by name."""
    only()
    return {"fleets": [_rendered(record) for record in records.find(here().db)]}


@blueprint.get("/<name>")
@needs(Scope.ADMIN)
def show(name: str) -> dict[str, Any]:
    """One fleet, with its workers and what was decided."""
    only()
    record = records.get(here().db, name)
    return {**_rendered(record), **_face(faces.face_of(here().db, name))}


@blueprint.put("/<name>")
@needs(Scope.ADMIN)
def put(name: str) -> dict[str, Any]:
    """Set a fleet, all of it; or only its limit, where the body says nothing else."""
    only()
    wanted = jsonbody.read(FleetInput)
    warnings: list[str] = []
    if wanted.is_limit_only:
        record = records.change(here().db, name, max_running=wanted.max_running)
    else:
        settings = wanted.settings
        warnings = _check(name, settings)
        record = records.put(here().db, name, settings)
    dispatch.wake(here().db, here().bell, name)
    return {**_rendered(record), "warnings": warnings}


def _check(name: str, settings: FleetSettings) -> list[str]:
    """Whether its workers can be had at all, asked before anything is changed; what is odd, for people.

    Raises InvalidInput, ProviderTrouble.
    """
    records.check_name(name)
    return [*_overflows(name, settings), *_starts_nothing(settings), *_is_unknown(name, settings)]


def _overflows(name: str, settings: FleetSettings) -> list[str]:
    to = settings.overflow_fleet
    if to is None:
        return []
    road = [name, *records.overflow_road(here().db, to)]
    if to == name:
        raise InvalidInput(f"fleet {name} cannot overflow into itself", hint="Name another fleet as overflowFleet.")
    if name in road[1:]:
        raise InvalidInput(
            f"builds would flow in a circle: {' to '.join(road[: road.index(name, 1) + 1])}", hint="Name another overflowFleet."
        )
    if records.has_workers(here().db, to):
        return []
    return [f"the fleet {to} has neither a worker nor a provider: until it has, no build is moved there"]


def _starts_nothing(settings: FleetSettings) -> list[str]:
    scaling = settings.scaling
    given = {"minimum": scaling.minimum, "warm": scaling.warm, "headroomSlots": scaling.headroom_slots}
    named = [field for field, value in given.items() if value]
    if not isinstance(settings.provider, FargateProvider) or not named:
        return []
    return [f"a task of fargate is started for a build that waits: {', '.join(named)} of scaling start none"]


def _is_unknown(name: str, settings: FleetSettings) -> list[str]:
    """Ask the provider; what it is where it cannot be asked from here, and need not be."""
    if settings.provider is None:
        return []
    try:
        open_provider(name, settings, here().settings).check()
    except ProviderTrouble as trouble:
        if trouble.trouble is Trouble.AWAY and isinstance(settings.provider, ContainersProvider):
            return [f"the engine cannot be asked from the API, the scheduler will ask it: {trouble.message}"]
        if trouble.trouble in _PASSING:
            raise
        raise InvalidInput(
            f"nothing was changed, as the provider {settings.provider.type!r} answers: {trouble.message}", hint=trouble.hint
        ) from trouble
    return []


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
    marks.take_back(here().db, name, faces.workers_of(here().db, name), "the fleet was resumed")
    dispatch.wake(here().db, here().bell, name)
    return _rendered(record)


@blueprint.post("/<name>/drain")
@needs(Scope.ADMIN)
def drain(name: str) -> dict[str, Any]:
    """Have workers finish what they run, and leave."""
    only()
    wanted, db = jsonbody.read(DrainInput), here().db
    record = records.get(db, name)
    why = f"{marks.BY_HAND}{principal().name}" + (f": {wanted.why}" if wanted.why else "")
    if wanted.worker is not None:
        faces.need_worker(db, name, wanted.worker)
        marks.ask_to_leave(db, name, [wanted.worker], why)
    else:
        record = records.pause(db, name, by=principal().name, why=wanted.why or "drained")
        marks.ask_to_leave(db, name, faces.workers_of(db, name), why)
    dispatch.wake(db, here().bell, name)
    return {**_rendered(record), **_face(faces.face_of(db, name))}


@blueprint.post("/<name>/upgrade")
@needs(Scope.ADMIN)
def upgrade(name: str) -> dict[str, Any]:
    """Begin a new generation of workers, or go back to the one before."""
    only()
    wanted, db = jsonbody.read(UpgradeInput), here().db
    if wanted.back:
        if wanted.model_fields_set != {"back"}:
            raise InvalidInput("back goes to the generation that was, as it was: send it alone")
        upgrades.go_back(db, name, by=principal().name)
        return _rendered(records.get(db, name))
    before = records.get(db, name)
    changes = {
        field: getattr(wanted, field) for field in wanted.model_fields_set - {"back"} if getattr(wanted, field) is not None
    }
    settings = FleetSettings.model_validate(before.settings or {}).model_copy(update=changes)
    settings = FleetSettings.model_validate(settings.model_dump(by_alias=True))  # once more, as parts must fit together
    warnings: list[str] = []
    if settings.provider is not None:
        records.refuse_orphans(db, name, settings)
        warnings = _check(name, settings)
    upgrades.begin(db, name, settings, by=principal().name)
    return {**_rendered(records.get(db, name)), "warnings": warnings}


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
        "settings": {**record.settings, "maxRunning": record.max_running} if record.settings else None,
        "generation": record.generation,
        "stableGeneration": record.stable_generation,
        "rollout": record.rollout,
        "scaling": _scaling(record),
    }


def _scaling(record: FleetRecord) -> dict[str, Any] | None:
    """What was decided last, and what stands in its way; None where nothing is scaled."""
    said = record.decision
    if not record.is_scaled or said is None or record.decided_ms is None:
        return None
    return {
        "wanted": said["wanted"],
        "why": said["why"],
        "at": record.decided_ms / 1000,
        "troubles": said.get("troubles", {}),
        "strangers": said.get("strangers", []),
        "judged": said.get("judged", ""),
    }


def _face(face: Face) -> dict[str, Any]:
    return {
        "workersSeen": [_worker(worker, face.living.get(worker.id), face.now_ms) for worker in face.workers],
        "instances": [
            {
                "id": one.id,
                "provider": one.provider,
                "state": one.state,
                "generation": one.generation,
                "found": one.found_ms / 1000,
                "joined": one.joined_ms / 1000 if one.joined_ms is not None else None,
                "released": one.released_ms / 1000 if one.released_ms is not None else None,
                "why": one.why,
            }
            for one in face.instances
        ],
        "decisions": [{"at": one.at_ms / 1000, "wanted": one.wanted, "why": one.why} for one in face.decisions],
    }


def _offer(offer: Offer) -> dict[str, Any]:
    """None: it says nothing of it, and takes builds by its slots alone."""
    return {
        "cpus": offer.cpu_millis / 1000 if offer.cpu_millis is not None else None,
        "memoryBytes": offer.memory_bytes,
    }


def _worker(worker: WorkerSeen, living: Living | None, now: int) -> dict[str, Any]:
    idle_s = max(0, now - worker.idle_since_ms) / 1000 if worker.idle_since_ms is not None else None
    return {
        "id": worker.id,
        "at": worker.at.value,
        "running": worker.held,
        "slots": worker.slots,
        "offer": _offer(living.offer) if living is not None else None,
        "room": _offer(living.room) if living is not None else None,
        "generation": worker.generation,
        "idleSeconds": idle_s,
        "silentSeconds": worker.silent_ms / 1000,
        "why": worker.why or worker.not_claiming,
    }
