"""The scaler in a small world: it grows, shrinks, forgets nothing and ends nothing that runs, whatever happens in between."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace.errors import Conflict, InvalidInput, NotFound, ProviderTrouble
from millrace.fleet import FleetSettings
from millrace.settings import Settings
from millrace.vocabulary import BuildState, Reason, Trouble, Verdict
from scheduler import leases, waiting
from scheduler.fleets import faces, ledger, marks, records, upgrades
from scheduler.fleets.observe import At
from scheduler.fleets.provider import Instance, InstanceState
from scheduler.models import Build, Fleet
from scheduler.models import Decision as DecisionRow
from scheduler.models import Instance as InstanceRow
from tests.support.fleets import FLEET, World, run_all
from tests.support.records import a_build, a_claim_request, a_project, a_report

FARM = Settings(data_dir=Path("unused"))
QUICK: dict[str, Any] = {"maximum": 10, "shrinkAfterS": 0}


@pytest.fixture
def world(sqlite_template: Path, tmp_path: Path) -> Iterator[World]:
    path = tmp_path / "records.db"
    shutil.copyfile(sqlite_template, path)
    made = World(path, FARM)
    a_project(made.db)
    yield made
    made.db.dispose()


def builds(world: World, count: int) -> list[str]:
    return [a_build(world.db, FARM) for _ in range(count)]


def said(world: World) -> dict[str, Any]:
    with world.db.reading() as session:
        return dict(session.get_one(Fleet, FLEET).decision or {})


def test_a_fleet_grows_from_nothing_to_what_waits_and_back_to_nothing(world: World) -> None:
    world.configure(scaling=QUICK)
    world.round(3)
    assert world.box.instances == {}
    builds(world, 7)
    world.round(3)
    assert len(world.box.instances) == 4, "two builds for each"
    world.round(20)
    assert len(world.box.instances) == 4, "those that boot are not asked for again"
    world.boot()
    run_all(world)
    for _ in range(4):
        world.round(2)
        for worker in list(world.held):
            world.ask(worker)
    world.round(2)
    assert world.box.instances == {}
    assert sorted(world.box.released) == ["i-1", "i-2", "i-3", "i-4"]
    with world.db.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(InstanceRow).where(InstanceRow.gone_ms.is_(None))) == 0
        wanted = list(session.scalars(sa.select(DecisionRow.wanted).order_by(DecisionRow.id)))
    assert (wanted[0], max(wanted), wanted[-1]) == (0, 4, 0)


def test_a_busy_worker_is_asked_and_not_ended(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 2})
    world.round()
    world.boot()
    builds(world, 2)
    assert world.ask("i-1") is not None
    assert world.ask("i-2") is not None
    world.configure(scaling={**QUICK, "maximum": 1})
    world.round(3)
    for worker in ("i-1", "i-2"):
        world.ask(worker, free=0)
    world.round(5)
    assert world.box.released == []
    leaving = [worker for worker in ("i-1", "i-2") if worker in world.left]
    assert len(leaving) == 1, "one of the two is to stay"
    world.end(leaving[0])
    world.round(2)
    assert world.box.released == leaving


def test_one_that_others_end_is_waited_for_until_its_worker_is_gone(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 1})
    world.round()
    world.boot()
    builds(world, 1)
    assert world.ask("i-1") is not None
    world.box.instances["i-1"] = Instance(id="i-1", state=InstanceState.STOPPING, generation=1)
    world.round(5)
    assert world.box.released == [], "its build runs"
    world.end("i-1")
    world.go("i-1")
    world.round(2)
    assert set(world.box.released) == {"i-1"}


def test_of_idle_workers_the_one_leaves_that_was_idle_for_longest(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 3})
    world.round()
    for each in ("i-2", "i-1", "i-3"):
        world.boot(each)
        world.advance(2)
    world.configure(scaling={**QUICK, "minimum": 2})
    world.round(2)
    for worker in list(world.held):
        world.ask(worker)
    world.round(2)
    assert world.box.released == ["i-2"]


def minutes(world: World, times: int) -> None:
    """Every half minute the scaler looks, instances boot, and workers ask."""
    for _ in range(2 * times):
        world.round(every_s=30)
        world.boot()
        for worker in list(world.held):
            if worker in world.held and worker not in world.left:
                world.ask(worker)


def test_a_worker_that_takes_no_builds_is_replaced_once_it_had_time_to_mend(world: World) -> None:
    world.configure(scaling={"minimum": 2, "maximum": 4, "shrinkAfterS": 0})
    minutes(world, 1)
    world.unfit.add("i-1")
    minutes(world, 3)
    assert sorted(world.box.instances) == ["i-1", "i-2"], "a full disk may be emptied"
    minutes(world, 5)
    assert sorted(world.box.instances) == ["i-2", "i-3"]
    assert world.box.most == 3
    with world.db.reading() as session:
        why = session.scalar(sa.select(InstanceRow.why).where(InstanceRow.id == "i-1"))
    assert why is not None and "it takes no builds: the disk is full" in why
    minutes(world, 10)
    assert sorted(world.box.instances) == ["i-2", "i-3"]


def test_where_none_takes_builds_they_are_replaced_one_by_one_and_never_many(world: World) -> None:
    world.configure(scaling={"minimum": 2, "maximum": 3, "shrinkAfterS": 0})
    world.all_unfit = True
    minutes(world, 60)
    assert world.box.most <= 4, "the maximum, and one that is on its way out"
    assert len(world.box.started) <= 2 + 2 * 60 / 5
    world.all_unfit = False
    minutes(world, 12)
    assert len(world.box.instances) == 2


def test_a_worker_that_takes_no_more_builds_ends_those_that_it_has(world: World) -> None:
    world.configure(scaling={"minimum": 1, "maximum": 2, "shrinkAfterS": 0})
    minutes(world, 1)
    builds(world, 1)
    assert world.ask("i-1") is not None
    world.unfit.add("i-1")
    minutes(world, 20)
    assert "i-1" in world.box.instances
    world.end("i-1")
    minutes(world, 8)
    assert sorted(world.box.instances) == ["i-2"]


def test_a_mark_is_taken_back_before_another_worker_is_asked_for(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 3})
    world.round()
    world.boot()
    world.configure(scaling=QUICK)
    world.round()
    assert sum(worker.marked for worker in faces.face_of(world.db, FLEET).workers) == 3
    builds(world, 6)
    world.round()
    assert not any(worker.marked for worker in faces.face_of(world.db, FLEET).workers)
    assert len(world.box.instances) == 3


def test_what_a_person_drained_is_not_taken_back(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 1})
    world.round()
    world.boot()
    marks.ask_to_leave(world.db, FLEET, ["i-1"], f"{marks.BY_HAND}ann")
    builds(world, 2)
    world.round(2)
    assert world.ask("i-1") is None
    assert sorted(world.box.instances) == ["i-1", "i-2"]


def test_a_worker_that_never_comes_is_ended_and_asked_for_anew(world: World) -> None:
    world.configure(scaling={**QUICK, "joinWithinS": 60})
    builds(world, 1)
    world.round(30, every_s=2)
    assert world.box.released == []
    world.round(5)
    assert world.box.released == ["i-1"]
    assert list(world.box.instances) == ["i-2"]
    assert world.ask("i-1") is None, "where it comes after all, it gets nothing"


def test_an_instance_that_nobody_asked_for_is_told_of_and_left_alone(world: World) -> None:
    world.configure(scaling=QUICK)
    world.box.instances["x-1"] = Instance(id="x-1", state=InstanceState.RUNNING)
    world.round(8, every_s=100)
    assert world.box.released == []
    assert said(world)["strangers"] == ["x-1"]
    builds(world, 1)
    world.round()
    assert "i-1" in world.box.instances, "it is not counted as one that boots"


def test_an_instance_that_vanished_is_made_up_for(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 1})
    world.round()
    world.boot()
    world.round()
    world.box.vanish("i-1")
    world.advance(31)
    world.round(2)
    assert list(world.box.instances) == ["i-2"]


def test_a_worker_that_falls_silent_with_its_instance_there_is_ended_at_last(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 2})
    world.round()
    world.boot()
    for _ in range(8):
        world.round(every_s=10)
        world.ask("i-2")
    assert world.box.released == []
    for _ in range(3):
        world.round(every_s=10)
        world.ask("i-2")
    world.round()
    assert world.box.released == ["i-1"]
    assert sorted(world.box.instances) == ["i-2", "i-3"]


def test_where_no_worker_is_heard_at_all_none_is_ended_for_it(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 2})
    world.round()
    world.boot()
    world.round(30, every_s=10)
    assert world.box.released == []
    assert len(world.box.instances) == 2


@pytest.mark.parametrize("trouble", sorted(Trouble))
def test_trouble_is_told_waited_for_and_lost_nothing_by(world: World, trouble: Trouble) -> None:
    world.configure(scaling=QUICK)
    builds(world, 2)
    world.box.trouble["grow"] = ProviderTrouble(trouble, "the sky is full")
    world.round(5)
    told = said(world)["troubles"]["grow"]
    assert (told["kind"], told["message"]) == (trouble.value, "the sky is full")
    assert told["failures"] <= 3, "it is not asked each second"
    world.box.trouble.clear()
    world.round(40, every_s=10)
    assert len(world.box.instances) == 1
    assert said(world)["troubles"] == {}


def test_where_instances_cannot_be_listed_nothing_is_changed(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 2})
    world.round()
    world.boot()
    world.box.trouble["find"] = ProviderTrouble(Trouble.AWAY, "no answer")
    builds(world, 20)
    before = len(world.box.orders)
    for _ in range(20):
        world.round(1, every_s=10)
        for worker in world.held:
            world.ask(worker, free=0)
    assert len(world.box.orders) <= before + 1, "at most by what was known a moment ago"
    assert world.box.released == []
    assert "find" in said(world)["troubles"]


def test_a_new_leader_goes_on_where_the_last_one_died(world: World) -> None:
    world.configure(scaling={**QUICK, "shrinkAfterS": 100})
    builds(world, 6)
    world.round()
    world.scaler = world.another()
    world.round(3)
    assert len(world.box.instances) == 3
    world.boot()
    run_all(world)
    world.round(12, every_s=5)
    for worker in list(world.held):
        world.ask(worker)
    world.scaler = world.another()
    world.round(7, every_s=5)
    assert len(world.box.instances) == 3
    for worker in list(world.held):
        world.ask(worker)
    world.round(10)
    for worker in list(world.held):
        world.ask(worker)
    world.round(2)
    assert world.box.instances == {}, "the time of the first leader counted"


def test_a_paused_fleet_needs_no_workers(world: World) -> None:
    world.configure(scaling={**QUICK, "minimum": 2})
    world.round()
    world.boot()
    builds(world, 4)
    records.pause(world.db, FLEET, by="ann", why="maintenance")
    world.round(2)
    for worker in list(world.held):
        world.ask(worker)
    world.round(2)
    assert world.box.instances == {}
    records.resume(world.db, FLEET)
    world.round(2)
    assert len(world.box.instances) == 2


def test_what_is_too_much_for_a_fleet_at_its_maximum_goes_to_another(world: World) -> None:
    world.configure(scaling={**QUICK, "maximum": 2}, overflowBehavior="ON_DEMAND", overflowFleet="more")
    assert leases.claim(world.db, a_claim_request(fleet="more"), FARM) is None  # somebody is there
    made = builds(world, 7)
    world.round()
    with world.db.reading() as session:
        moved = list(session.scalars(sa.select(Build.id).where(Build.fleet == "more").order_by(Build.number)))
    assert moved == made[4:], "those that came last"
    assert sorted(world.bell.rang) == sorted((build, "more") for build in moved)
    explained = waiting.explain(world.db, moved[0], FARM)
    assert explained is not None
    assert f"fleet {FLEET} was full" in explained.says
    world.round(5)
    with world.db.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).where(Build.fleet == FLEET, Build.state == BuildState.QUEUED)) == 4


def test_limits_of_projects_and_fleets_are_no_reason_to_grow(world: World) -> None:
    a_project(world.db, "narrow", concurrentBuildLimit=2)
    world.configure(scaling=QUICK)
    for _ in range(20):
        a_build(world.db, FARM, project="narrow")
    world.round(2)
    assert len(world.box.instances) == 1
    world.configure(scaling=QUICK, maxRunning=3)
    builds(world, 20)
    world.round(2)
    assert len(world.box.instances) == 2


def test_the_provider_is_not_changed_while_instances_of_it_are_there(world: World) -> None:
    world.configure(scaling=QUICK)
    builds(world, 1)
    world.round(2)
    with pytest.raises(Conflict, match="still has 1 instance of the provider 'process'"):
        records.put(world.db, FLEET, FleetSettings())


def test_old_decisions_and_instances_are_forgotten(world: World) -> None:
    world.configure(scaling=QUICK)
    world.round()
    world.advance(31 * 86_400)
    world.round()
    ledger.forget(world.db)
    with world.db.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(DecisionRow)) == 1


def generations(world: World) -> Counter[int | None]:
    """How many workers of each generation take builds."""
    seen = faces.face_of(world.db, FLEET).workers
    return Counter(worker.generation for worker in seen if worker.at in (At.IDLE, At.BUSY))


def upgrade(world: World, **changes: Any) -> None:
    record = records.get(world.db, FLEET)
    upgrades.begin(world.db, FLEET, FleetSettings.model_validate({**(record.settings or {}), **changes}), by="ann")


def turns(world: World, times: int, *, every_s: float = 5, failing: int | None = None) -> None:
    """Builds come and end, instances boot, workers ask; those of the generation `failing` lose what they run by our fault."""
    for _ in range(times):
        builds(world, len(world.held))  # one for each
        world.round(every_s=every_s)
        world.boot()
        for worker in list(world.held):
            if worker in world.held and worker not in world.left:
                world.ask(worker)
        for worker in [worker for worker, held in world.held.items() if held]:
            fails = world.box.started[worker] == failing
            world.end(worker, a_report(Verdict.FAULT, Reason.ENGINE_LOST) if fails else None)


def test_a_new_generation_takes_a_fleet_over_step_by_step_and_no_build_is_lost(world: World) -> None:
    world.configure(scaling={"minimum": 4, "maximum": 6, "shrinkAfterS": 0}, canaryPercent=25)
    world.round()
    world.boot()
    world.round()
    assert generations(world) == {1: 4}
    upgrade(world, worker={"slots": 2, "labels": ["new"]})
    with pytest.raises(Conflict, match="generation 2 of fleet default is still tried out"):
        upgrade(world)
    turns(world, 6)
    assert generations(world) == {1: 3, 2: 1}
    assert {order.environment.get("MILLRACE_LABELS") for order in world.box.orders if order.generation == 2} == {"new"}
    assert {order.environment.get("MILLRACE_LABELS") for order in world.box.orders if order.generation == 1} == {None}
    for _ in range(20):
        turns(world, 4)
        if records.get(world.db, FLEET).stable_generation == 2:
            break
    turns(world, 4)
    assert generations(world) == {2: 4}
    record = records.get(world.db, FLEET)
    assert record.rollout is not None
    assert [step["kind"] for step in record.rollout["steps"]] == ["BEGIN", "WIDEN", "WIDEN", "FINISH"]
    assert world.box.most <= 6
    with world.db.reading() as session:
        assert session.scalar(sa.select(sa.func.max(Build.attempt_no))) == 1


def test_a_generation_that_fails_builds_is_given_up_and_the_old_one_comes_back(world: World) -> None:
    world.configure(scaling={"minimum": 4, "maximum": 6, "shrinkAfterS": 0}, canaryPercent=25)
    world.round()
    world.boot()
    turns(world, 4)
    upgrade(world, worker={"slots": 2, "labels": ["broken"]})
    for _ in range(20):
        turns(world, 2, failing=2)
        if records.get(world.db, FLEET).generation == 1:
            break
    record = records.get(world.db, FLEET)
    assert record.rollout is not None
    assert [step["kind"] for step in record.rollout["steps"]] == ["BEGIN", "RETURN"]
    assert "failed by our fault" in record.rollout["steps"][-1]["why"]
    assert record.settings is not None
    assert record.settings["worker"] == {"slots": 2, "labels": []}
    turns(world, 6)
    assert set(generations(world)) == {1}
    assert upgrades.begin(world.db, FLEET, FleetSettings.model_validate(record.settings), by="ann") == 3, "2 is not used again"


def test_a_generation_is_taken_back_by_hand(world: World) -> None:
    world.configure(scaling={"minimum": 2, "maximum": 3, "shrinkAfterS": 0})
    with pytest.raises(Conflict, match="tries out no generation"):
        upgrades.go_back(world.db, FLEET, by="ann")
    world.round()
    world.boot()
    upgrade(world)
    turns(world, 5)
    assert generations(world)[2] == 1
    assert upgrades.go_back(world.db, FLEET, by="ann") == 1
    turns(world, 8)
    assert generations(world) == {1: 2}


def test_where_there_is_no_room_for_more_one_leaves_before_another_comes(world: World) -> None:
    world.configure(scaling={"minimum": 2, "maximum": 2, "shrinkAfterS": 0}, canaryPercent=100)
    world.round()
    world.boot()
    upgrade(world)
    turns(world, 12)
    assert generations(world) == {2: 2}
    assert world.box.most <= 3, "the one that leaves still counts"


def test_a_fleet_that_is_not_scaled_has_no_generations(world: World) -> None:
    records.change(world.db, FLEET, max_running=2)
    with pytest.raises(InvalidInput, match="is not scaled"):
        upgrades.begin(world.db, FLEET, FleetSettings(), by="ann")
    with pytest.raises(NotFound):
        upgrades.begin(world.db, "nowhere", FleetSettings(), by="ann")
