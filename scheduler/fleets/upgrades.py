"""New generations of a fleet's workers: begun by hand, tried on a share of them, widened, finished, or taken back.

A generation is what a fleet's `provider` and `worker` were set to when it began. While the newest is tried out, the fleet's row
keeps those of the one before (`rollout.before`), by which its workers still come, and to which it goes back.
"""

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import Conflict, InvalidInput, NotFound
from millrace.fleet import FleetSettings
from millrace.log import get_logger
from millrace.vocabulary import Reason
from scheduler.db import Database, now_ms
from scheduler.fleets.rollout import Kind, Side, Step, is_infra_failure
from scheduler.models import Attempt, Build, Fleet, Worker

log = get_logger(__name__)
_LONG_MS: Final = 2 * 86_400_000
"""No build that ends after an upgrade began was asked for so long before: it had been over by then."""
_STEPS: Final = 50


def begin(db: Database, name: str, settings: FleetSettings, *, by: str) -> int:
    """Have the fleet's next workers be of a new generation, with the `provider` and `worker` of `settings`; its number.

    Raises NotFound, InvalidInput where the fleet is not scaled, Conflict where one is still tried out.
    """

    def work(session: Session) -> int:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row = _row(session, name)
        if row.generation != row.stable_generation:
            raise Conflict(
                f"generation {row.generation} of fleet {name} is still tried out",
                hint=f"Wait until it has taken over, or give it up: millrace fleet upgrade {name} --back.",
            )
        before = FleetSettings.model_validate(row.settings)
        last = max(row.generation, int((row.rollout or {}).get("last", 0)))
        row.stable_generation, row.generation = row.generation, last + 1
        row.settings = _with(before, settings)
        why = f"begun by {by}: {settings.canary_percent} % of the workers first"
        row.rollout = {
            "state": "running",
            "sharePercent": settings.canary_percent,
            "began": now,
            "since": now,
            "last": row.generation,
            "before": _parts(before),
            "steps": [_step(now, "BEGIN", settings.canary_percent, why)],
        }
        row.modified_ms = now
        return row.generation

    generation = db.run(work)
    log.info("generation.begun", fleet=name, generation=generation, by=by)
    return generation


def take(db: Database, name: str, generation: int, step: Step) -> bool:
    """Do what was judged about a generation that is tried out; False where it is not any more, or nothing is to be done."""

    def work(session: Session) -> bool:
        row = session.get(Fleet, name, with_for_update=True)
        if row is None or row.generation != generation or row.generation == row.stable_generation:
            return False
        _apply(row, step, session.execute(sa.select(now_ms())).scalar_one())
        return True

    done = step.kind is not Kind.HOLD and db.run(work)
    if done:
        log.info("generation.judged", fleet=name, generation=generation, step=step.kind.value, why=step.why)
    return done


def go_back(db: Database, name: str, *, by: str) -> int:
    """Give up the generation that is tried out; the one that the fleet has again. Raises NotFound, Conflict."""

    def work(session: Session) -> int:
        row = _row(session, name)
        if row.generation == row.stable_generation:
            raise Conflict(f"fleet {name} tries out no generation; all its workers are to be of {row.generation}")
        step = Step(kind=Kind.RETURN, share_percent=0, why=f"generation {row.generation}: taken back by {by}")
        _apply(row, step, session.execute(sa.select(now_ms())).scalar_one())
        return row.generation

    return db.run(work)


def sides(
    session: Session, name: str, generations: tuple[int, int], began_ms: int, workers: Mapping[int, int]
) -> tuple[Side, Side]:
    """What the stable and the newest of `generations` have carried since `began_ms`; `workers`: how many of each are there."""
    attempts: dict[int, list[str | None]] = {generation: [] for generation in generations}
    ended = (
        sa.select(Worker.generation, Attempt.reason)
        .select_from(Build)
        .join(Attempt, Attempt.build_id == Build.id)
        .join(Worker, Worker.id == Attempt.worker_id)
        .where(Build.submitted_ms > began_ms - _LONG_MS, Worker.fleet == name, Worker.generation.in_(generations))
        .where(Attempt.ended_ms >= began_ms)
    )
    for generation, reason in session.execute(ended):
        attempts[generation].append(reason)
    stable, newest = (
        Side(
            generation=generation,
            workers=workers.get(generation, 0),
            attempts=len(attempts[generation]),
            infra_failures=sum(reason is not None and is_infra_failure(Reason(reason)) for reason in attempts[generation]),
        )
        for generation in generations
    )
    return stable, newest


def _apply(row: Fleet, step: Step, now: int) -> None:
    rollout = dict(row.rollout or {})
    steps = [*rollout.get("steps", ()), _step(now, step.kind.value, step.share_percent, step.why)]
    rollout |= {"sharePercent": step.share_percent, "since": now, "steps": steps[-_STEPS:]}
    if step.kind is Kind.FINISH:
        row.stable_generation = row.generation
        rollout |= {"state": "finished"}
    elif step.kind is Kind.RETURN:
        row.settings = {**(row.settings or {}), **rollout.get("before", {})}
        row.generation = row.stable_generation
        rollout |= {"state": "returned"}
    row.rollout, row.modified_ms = rollout, now


def _row(session: Session, name: str) -> Fleet:
    row = session.get(Fleet, name, with_for_update=True) if "\x00" not in name else None
    if row is None:
        raise NotFound(f"there is no fleet {name[:100]!r}", hint="GET /v1/fleets lists them.")
    if not (row.settings or {}).get("provider"):
        raise InvalidInput(
            f"fleet {name} is not scaled, so that nobody replaces its workers",
            hint=f"Set where they come from: millrace fleet set {name} --provider ...",
        )
    return row


def _parts(settings: FleetSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", by_alias=True, exclude_none=True, include={"provider", "worker"})


def _with(before: FleetSettings, settings: FleetSettings) -> dict[str, Any]:
    kept = before.model_dump(mode="json", by_alias=True, exclude={"max_running"}, exclude_none=True)
    return {**kept, **_parts(settings)}


def _step(now: int, kind: str, share_percent: int, why: str) -> dict[str, Any]:
    return {"at": now / 1000, "kind": kind, "sharePercent": share_percent, "why": why}
