"""What the records keep of a scaled fleet: its instances, what was decided, and what trouble there is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.fleet import FleetSettings
from millrace.log import get_logger
from scheduler.db import Database, now_ms
from scheduler.fleets.observe import Sight
from scheduler.fleets.plan import Generations
from scheduler.fleets.policy import Decision, Load, Memory
from scheduler.models import Decision as DecisionRow
from scheduler.models import Fleet, Instance, Worker

log = get_logger(__name__)
_MINUTE_MS: Final = 60_000
_FRESH_MS: Final = 15_000
"""How old what the records say may be, so that a scheduler that begins to lead goes on with what was wanted of late."""
_REASON_MS: Final = 3_000
"""How soon another reason for the same size is kept: it may be another one each second."""
_DAY_MS: Final = 86_400_000
KEEP_DECISIONS_MS: Final = 30 * _DAY_MS
_KEEP_INSTANCES_MS: Final = 7 * _DAY_MS


@dataclass(frozen=True, kw_only=True)
class ScaledFleet:
    """A fleet with a provider, as it is set."""

    name: str
    settings: FleetSettings
    paused: bool
    generations: Generations
    rollout: Mapping[str, Any] | None
    memory: Memory
    said: Mapping[str, Any]

    def settings_of(self, generation: int) -> FleetSettings:
        """By which workers of a generation come: while a newer one is tried out, those of the one before are as they were."""
        if self.rollout is None or generation != self.generations.stable:
            return self.settings
        return FleetSettings.model_validate({**self.settings.model_dump(by_alias=True), **self.rollout.get("before", {})})


@dataclass(frozen=True, kw_only=True)
class Said:
    """What was decided, and what stands in its way. `troubles`: by what the provider was asked for. `judged`: what was said last
    of the generation that is tried out."""

    decision: Decision
    load: Load
    troubles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()
    judged: str = ""

    def as_json(self) -> dict[str, Any]:
        """As the fleet's row holds it."""
        return {
            "wanted": self.decision.wanted,
            "why": self.decision.why,
            "memory": asdict(self.decision.memory),  # JSON makes lists of its tuples, which are as good
            "load": load_json(self.load),
            "troubles": {verb: dict(trouble) for verb, trouble in self.troubles.items()},
            "strangers": list(self.strangers),
            "judged": self.judged,
        }


def load_json(load: Load) -> dict[str, Any]:
    """A load as it is kept."""
    return {**asdict(load), "starts_ms": list(load.starts_ms)}


def scaled(session: Session) -> list[ScaledFleet]:
    """All fleets that have a provider, by name. One whose settings this release cannot read is left alone, and logged."""
    found = []
    for row in session.scalars(sa.select(Fleet).where(Fleet.settings.is_not(None)).order_by(Fleet.name)):
        try:
            settings = FleetSettings.model_validate(row.settings)
        except ValueError as error:
            log.error("fleet.unreadable", fleet=row.name, why=str(error)[:300])
            continue
        if settings.provider is not None:
            found.append(_scaled(row, settings))
    return found


def _scaled(row: Fleet, settings: FleetSettings) -> ScaledFleet:
    said = row.decision or {}
    known = {name: value for name, value in (said.get("memory") or {}).items() if name in Memory.__dataclass_fields__}
    rollout = row.rollout if row.generation != row.stable_generation else None
    return ScaledFleet(
        name=row.name,
        settings=settings,
        paused=row.paused_ms is not None,
        generations=Generations(
            stable=row.stable_generation,
            newest=row.generation,
            share_percent=int((rollout or {}).get("sharePercent", 100)),
        ),
        rollout=rollout,
        memory=Memory(**known),
        said=said,
    )


def note_instances(db: Database, fleet: ScaledFleet, sight: Sight) -> None:
    """Keep what is there, what joined, and what is there no longer."""
    provider = fleet.settings.provider.type if fleet.settings.provider is not None else ""

    def work(session: Session) -> list[tuple[str, str]]:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        told: list[tuple[str, str]] = []
        for seen in sight.instances:
            if not seen.news:
                continue
            row = session.get(Instance, (fleet.name, seen.id))
            if row is None:
                row = Instance(fleet=fleet.name, id=seen.id, provider=provider, state=seen.state.value, found_ms=now, why="")
                session.add(row)
                told.append(("instance.found", seen.id))
            row.state, row.generation, row.seen_ms, row.gone_ms = seen.state.value, seen.generation, now, None
            if seen.joined and row.joined_ms is None:
                worker = session.get(Worker, seen.id)
                row.joined_ms = max(row.found_ms, worker.first_seen_ms if worker is not None else now)
                told.append(("instance.joined", seen.id))
        for gone in sight.unlisted:
            row = session.get(Instance, (fleet.name, gone))
            if row is not None and row.gone_ms is None:
                row.gone_ms = now
                told.append(("instance.gone", gone))
        return told

    if sight.unlisted or any(seen.news for seen in sight.instances):
        for event, instance_id in db.run(work):
            log.info(event, fleet=fleet.name, instance=instance_id)


def note_decision(db: Database, fleet: str, said: Said, before: Mapping[str, Any], noted_ms: int | None) -> bool:
    """Keep a decision, where it says something else than the one `before`, or that is some time old. Whether it was kept."""
    body, now = said.as_json(), said.load.now_ms
    is_new = body["wanted"] != before.get("wanted")
    says_more = any(body[name] != before.get(name) for name in ("troubles", "strangers", "judged"))
    old_ms = _FRESH_MS if body["why"] == before.get("why") else _REASON_MS
    if not (is_new or says_more or noted_ms is None or now - noted_ms >= old_ms):
        return False

    def work(session: Session) -> None:
        row = session.get(Fleet, fleet, with_for_update=True)
        if row is None:
            return
        of_fleet = sa.select(DecisionRow.at_ms).where(DecisionRow.fleet == fleet)
        last = session.scalar(of_fleet.order_by(DecisionRow.id.desc()).limit(1))
        if is_new or last is None or now - last >= _MINUTE_MS:
            why = said.decision.why[:500]
            session.add(DecisionRow(fleet=fleet, at_ms=now, wanted=said.decision.wanted, why=why, load=body["load"]))
        row.decision, row.decided_ms = body, now

    db.run(work)
    return True


def forget(db: Database) -> None:
    """Drop decisions after 30 days, and instances a week after they went."""

    def work(session: Session) -> None:
        session.execute(sa.delete(DecisionRow).where(DecisionRow.at_ms < now_ms() - KEEP_DECISIONS_MS))
        session.execute(sa.delete(Instance).where(Instance.gone_ms < now_ms() - _KEEP_INSTANCES_MS))

    db.run(work)
