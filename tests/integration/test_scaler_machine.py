"""A scaler at random: a thousand decisions, anything between two of them, and nothing is ended that runs a build."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from millrace.errors import ProviderTrouble
from millrace.settings import Settings
from millrace.vocabulary import Trouble
from scheduler import leases
from scheduler.fleets import marks
from scheduler.fleets.provider import InstanceState
from scheduler.models import Build
from tests.support.fleets import FLEET, World, run_all
from tests.support.records import a_build, a_project

pytestmark = pytest.mark.slow
FARM = Settings(data_dir=Path("unused"))
QUICK: dict[str, Any] = {"maximum": 10, "shrinkAfterS": 0}


class Random(RuleBasedStateMachine):
    """Anything may happen between two rounds; what is let go runs nothing, and in the end all is gone."""

    template: Path

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mr-scaler-"))
        shutil.copyfile(self.template, self.folder / "records.db")
        self.world = World(self.folder / "records.db", FARM)
        a_project(self.world.db)
        self.world.configure(scaling=QUICK)
        self.decisions = 0
        self.accepted: list[str] = []

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            if sys.exc_info()[0] is None:
                self.end_all()
        finally:
            self.world.db.dispose()
            shutil.rmtree(self.folder)

    def end_all(self) -> None:
        world = self.world
        world.box.trouble.clear()
        world.configure(scaling=QUICK)
        run_all(world)
        for _ in range(40):
            world.advance(400)
            leases.expire(world.db)
            self.round()
            world.boot()
            run_all(world)
            for worker in list(world.held):
                if worker in world.box.instances:
                    world.ask(worker)
                else:
                    del world.held[worker]
            self.round()
            if not world.box.instances and all(self.state_of(build) == "SUCCEEDED" for build in self.accepted):
                break
        assert {self.state_of(build) for build in self.accepted} <= {"SUCCEEDED"}
        assert world.box.instances == {}

    def state_of(self, build: str) -> str:
        with self.world.db.reading() as session:
            return str(session.get_one(Build, build).state)

    def round(self) -> None:
        before = len(self.world.box.released)
        self.world.scaler.round()
        self.decisions += 1
        ended = set(self.world.box.released[before:])
        assert not ended & self.world.holders(), "a worker was ended that holds a build"

    @rule(seconds=st.sampled_from([1, 5, 20]))
    def time_passes(self, seconds: int) -> None:
        self.world.advance(seconds)

    @rule()
    def another_leads(self) -> None:
        self.world.scaler = self.world.another()

    @rule(count=st.integers(1, 4))
    def submit(self, count: int) -> None:
        if len(self.accepted) < 40:
            self.accepted += [a_build(self.world.db, FARM) for _ in range(count)]

    @rule(least=st.integers(0, 3), more=st.integers(0, 4), shrink_s=st.sampled_from([0, 3]))
    def configure(self, least: int, more: int, shrink_s: int) -> None:
        self.world.configure(scaling={"minimum": least, "maximum": least + more, "shrinkAfterS": shrink_s, "joinWithinS": 30})

    @rule(which=st.integers(0, 9))
    def boot(self, which: int) -> None:
        ids = [one.id for one in self.world.box.instances.values() if one.state is InstanceState.BOOTING]
        if ids:
            self.world.boot(ids[which % len(ids)])

    @rule(which=st.integers(0, 9))
    def ask(self, which: int) -> None:
        workers = [w for w in self.world.held if w not in self.world.left and len(self.world.held[w]) < 2]
        if workers:
            self.world.ask(workers[which % len(workers)])

    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        workers = [worker for worker, held in self.world.held.items() if held]
        if workers:
            self.world.end(workers[which % len(workers)])

    @rule(which=st.integers(0, 9))
    def host_dies(self, which: int) -> None:
        idle = [worker for worker in self.world.held if not self.world.held[worker] and worker in self.world.box.instances]
        if idle:
            self.world.box.vanish(idle[which % len(idle)])
            del self.world.held[idle[which % len(idle)]]

    @rule(verb=st.sampled_from(["find", "grow", "release", "protect"]), kind=st.sampled_from(sorted(Trouble)))
    def trouble(self, verb: str, kind: Trouble) -> None:
        self.world.box.trouble = {verb: ProviderTrouble(kind, "no")}

    @precondition(lambda self: self.world.box.trouble)
    @rule()
    def no_trouble(self) -> None:
        self.world.box.trouble.clear()

    @rule()
    def drain_one(self) -> None:
        if self.world.held:
            marks.ask_to_leave(self.world.db, FLEET, [next(iter(self.world.held))], f"{marks.BY_HAND}ann")

    @invariant()
    def it_decides_and_every_build_is_there(self) -> None:
        if hasattr(self, "world"):
            self.round()
            with self.world.db.reading() as session:
                assert session.scalar(sa.select(sa.func.count()).select_from(Build)) == len(self.accepted)


def test_a_thousand_decisions_end_nothing_that_runs(sqlite_template: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    made: list[Random] = []

    class Seen(Random):
        template = sqlite_template

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    try:
        run_state_machine_as_test(
            Seen,
            settings=settings(
                max_examples=30,
                stateful_step_count=40,
                phases=[Phase.generate],  # what fails is long, and to make it shorter takes longer still
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=True,
            ),
        )
    finally:
        structlog.reset_defaults()
    assert sum(getattr(one, "decisions", 0) for one in made) >= 1000
