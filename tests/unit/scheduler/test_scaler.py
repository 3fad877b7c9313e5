"""The scaler in a small world: it grows, shrinks, forgets nothing and ends nothing that runs, whatever happens in between."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace.errors import Conflict, ProviderTrouble
from millrace.fleet import FleetSettings
from millrace.settings import Settings
from millrace.vocabulary import BuildState, Trouble
from scheduler import waiting
from scheduler.fleets import faces, ledger, marks, records
from scheduler.fleets.provider import Instance, InstanceState
from scheduler.models import Build, Fleet
from scheduler.models import Decision as DecisionRow
from scheduler.models import Instance as InstanceRow
from tests.support.fleets import FLEET, World, run_all
from tests.support.records import a_build, a_project

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
