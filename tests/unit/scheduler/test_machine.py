"""The records against a model: claims, renewals, reports, lost leases and stops in any order, doubled, late or lost.

Old claims stay in play for ever, so that every message can come at any later moment, and more than once. The clock is the
machine's own: SQLite asks this process for the time. In the end time passes with a worker at work, and all builds must end.
"""

import hashlib
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from millrace.contract import ArtifactReport, Claim, FinishReport, PhaseReport
from millrace.errors import AttemptFenced
from millrace.ids import new_secret, staging_prefix
from millrace.need import GIB
from millrace.project import BuildOverrides
from millrace.settings import Settings
from millrace.vocabulary import BuildState, PhaseType, Reason, Verdict
from scheduler import attempts, intake, leases, lifecycle, queries
from scheduler.db import Database
from scheduler.fairness import is_fair
from scheduler.fleets import records
from scheduler.fleets.capacity import SILENT_MS
from scheduler.leases import STOP_GRACE_MS, hash_token
from scheduler.models import Build, Event, Outbox, Worker
from scheduler.placement import KEEP_AFTER_MS
from scheduler.states import HELD, TERMINAL
from tests.support.records import a_claim_request, a_project, a_report

FARM = Settings(data_dir=Path("unused"), max_attempts=2)
PROJECTS = {"branch": None, "free": None, "narrow": 1}
BRANCH = {
    "source": {"type": "GITHUB", "location": "https://github.com/o/r.git"},
    "millrace": {"cancelSuperseded": True},
}
NEEDS: dict[str, dict[str, Any]] = {
    "small": {},
    "medium": {"computeTypeOverride": "BUILD_GENERAL1_MEDIUM"},
    "gpu": {"workerLabelsOverride": ["gpu"]},
}
SIZES = {"small": (2, 4 * GIB), "medium": (4, 8 * GIB), "gpu": (2, 4 * GIB)}
WORKERS: dict[str, dict[str, Any]] = {
    "any": {},
    "big": {"cpus": 5, "memory_bytes": 16 * GIB, "labels": ("gpu", "ssd")},
    "twin": {"cpus": 5, "memory_bytes": 16 * GIB, "labels": ("ssd", "gpu")},
    "little": {"memory_bytes": 6 * GIB},
}
KINDS = {"any": "any", "big": "big", "twin": "big", "little": "little"}
"""Of which kind a worker is: those of one kind have their fair turns together."""
_LEASE_MS = int(FARM.lease_ttl_s * 1000)
WHICH = st.integers(0, 3)
_ENDS: dict[Verdict, tuple[Reason, BuildState | None]] = {
    Verdict.SUCCEEDED: (Reason.SUCCEEDED, BuildState.SUCCEEDED),
    Verdict.FAILED: (Reason.EXIT_CODE, BuildState.FAILED),
    Verdict.TIMED_OUT: (Reason.TIMEOUT, BuildState.TIMED_OUT),
    Verdict.STOPPED: (Reason.CANCELLED, BuildState.STOPPED),
    Verdict.FAULT: (Reason.STORAGE, None),
    Verdict.HANDED_BACK: (Reason.ENGINE_LOST, None),
}


@dataclass
class Model:
    """What a build should be."""

    project: str
    priority: int
    need: str = "small"
    owner: str = ""
    passed_ms: int | None = None
    state: BuildState = BuildState.QUEUED
    attempt_no: int = 0
    faults: int = 0
    stop_wished_ms: int | None = None
    not_before_ms: int = 0
    lease_until_ms: int = 0
    token: str = ""
    waits_too_long: bool = False
    reason: Reason | None = None
    visible: str | None = None
    logged: int = 0
    reported: dict[int, FinishReport] = field(default_factory=dict)

    @property
    def stop_wished(self) -> bool:
        return self.stop_wished_ms is not None

    @property
    def held(self) -> bool:
        return self.state in HELD

    @property
    def size(self) -> tuple[int, int]:
        return SIZES[self.need]

    def end(self, state: BuildState, reason: Reason) -> None:
        self.state, self.reason = state, reason

    def give_back(self, reason: Reason, now: int) -> None:
        if self.stop_wished:
            self.end(BuildState.STOPPED, Reason.CANCELLED)
            return
        self.faults += 1
        if self.faults < FARM.max_attempts:
            self.state = BuildState.QUEUED
            if reason is not Reason.WORKER_LOST:
                self.not_before_ms = now + lifecycle.backoff_ms(self.faults)
        else:
            self.end(BuildState.FAULT, reason)


class Records(RuleBasedStateMachine):
    """One farm."""

    template: Path

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mr-machine-"))
        shutil.copy(self.template, self.folder / "records.db")
        self.clock_ms = 1_800_000_000_000
        self.paused = False
        self.last_token = ""
        self.db = self.open()
        self.model: dict[str, Model] = {}
        self.keys: dict[str, str] = {}
        self.claims: list[Claim] = []
        self.turns = dict.fromkeys(WORKERS, 0)
        self.keeps: dict[str, str | None] = dict.fromkeys(WORKERS)
        self.seen_ms = dict.fromkeys(WORKERS, 0)
        for project in PROJECTS:
            self.submit(project, None, 0, "small")
            self.claim(True, False, "any")

    def open(self) -> Database:
        db = Database(f"sqlite:///{self.folder / 'records.db'}")

        @sa.event.listens_for(db.engine, "connect")
        def set_clock(connection: sqlite3.Connection, _record: object) -> None:
            connection.create_function("julianday", -1, lambda *_: 2440587.5 + self.clock_ms / 86_400_000)

        return db

    def teardown(self) -> None:
        if not hasattr(self, "db"):
            return
        try:
            if sys.exc_info()[0] is None:
                self.drain()
        finally:
            self.db.dispose()
            shutil.rmtree(self.folder)

    def drain(self) -> None:
        """Time passes, and a worker is there: then every build ends."""
        self.pause(False)
        for _ in range(6 * len(self.model)):
            if all(model.state in TERMINAL for model in self.model.values()):
                break
            self.advance(130)
            self.sweep(False)
            for worker in WORKERS:
                known = len(self.claims)
                self.claim(True, False, worker)
                if len(self.claims) > known:
                    self.finish(0, Verdict.SUCCEEDED, False)
        assert all(model.state in TERMINAL for model in self.model.values())
        self.the_records_are_as_the_model_says()
        self.each_build_has_one_unbroken_history()

    # What clients do

    @precondition(lambda self: sum(m.state not in TERMINAL for m in self.model.values()) < 4)
    @rule(
        project=st.sampled_from(sorted(PROJECTS)),
        key=st.sampled_from([None, "k"]),
        priority=st.integers(0, 1),
        need=st.sampled_from(sorted(NEEDS)),
    )
    def submit(self, project: str, key: str | None, priority: int, need: str) -> None:
        wanted = BuildOverrides.model_validate({"projectName": project, "priority": priority, **NEEDS[need]})
        scope = f"{project}{priority}{need}"
        request = intake.BuildRequest(
            overrides=wanted, initiator="t", by_admin=True, idempotency_scope=scope, idempotency_key=key
        )
        submitted = intake.submit(self.db, request, FARM)
        known = self.keys.get(scope) if key else None
        assert submitted.created == (known is None)
        if known is not None:
            assert submitted.build_id == known
            return
        if key:
            self.keys[scope] = submitted.build_id
        if project == "branch":  # the newest of a branch is the one that counts
            for older in self.model.values():
                if older.project == project:
                    self.wish_stop(older)
        self.model[submitted.build_id] = Model(project=project, priority=priority, need=need)

    @rule(which=WHICH)
    def stop(self, which: int) -> None:
        build, model = list(self.model.items())[-1 - which % len(self.model)]
        assert lifecycle.request_stop(self.db, build)
        self.wish_stop(model)

    def wish_stop(self, model: Model) -> None:
        if model.state is BuildState.QUEUED:
            model.end(BuildState.STOPPED, Reason.CANCELLED)
        elif model.held:
            model.stop_wished_ms = model.stop_wished_ms or self.clock_ms

    # What workers do

    @rule(answer_arrives=st.booleans(), repeats=st.booleans(), worker=st.sampled_from(sorted(WORKERS)))
    def claim(self, answer_arrives: bool, repeats: bool, worker: str) -> None:
        if not repeats or not self.last_token:
            self.last_token = new_secret("att")
        token = self.last_token
        mine = [build for build, m in self.model.items() if m.held and m.token == token and m.owner == worker]
        if any(m.held and m.token == token and m.owner != worker for m in self.model.values()):
            token = self.last_token = new_secret("att")  # it is another worker's
        busy = {name: sum(m.held for m in self.model.values() if m.project == name) for name in PROJECTS}
        could = {
            build: model
            for build, model in self.model.items()
            if model.state is BuildState.QUEUED
            and not self.paused
            and model.not_before_ms <= self.clock_ms
            and busy[model.project] < (PROJECTS[model.project] or 99)
            and self.has_room(worker, model, empty=True)
        }
        fit = {build: model for build, model in could.items() if self.has_room(worker, model)}
        kept = self.keeps[worker]
        elsewhere = {
            build
            for other, build in self.keeps.items()
            if other != worker and build is not None and self.seen_ms[other] > self.clock_ms - SILENT_MS
        }
        claimed = leases.claim(self.db, a_claim_request(worker, token=token, **WORKERS[worker]), FARM)
        self.seen_ms[worker] = self.clock_ms
        if mine:  # the same request again: the same answer, and a whole lease
            assert claimed is not None
            model = self.model[mine[0]]
            assert (claimed.build_id, claimed.attempt_no) == (mine[0], model.attempt_no)
            model.lease_until_ms = self.clock_ms + _LEASE_MS
            self.claims.append(claimed)
            return
        self.keeps[worker], passed = self.notes(worker)
        if kept in fit or kept in could.keys() - elsewhere:  # nothing else, until it fits
            assert claimed is None or claimed.build_id == kept
            assert (claimed is None) == (kept not in fit)
            assert not passed
        elif claimed is None:
            assert not passed
            now_kept = self.keeps[worker]
            if fit:
                assert now_kept is not None
                assert now_kept in could.keys() - fit.keys() - elsewhere
                assert self.model[now_kept].passed_ms is not None
                assert self.clock_ms - (self.model[now_kept].passed_ms or 0) >= KEEP_AFTER_MS
        else:
            assert self.keeps[worker] is None
            assert len(passed) <= 1
            assert passed <= could.keys() - fit.keys()
            self.is_whose_turn_it_is(worker, claimed, fit, busy)
        for build in passed:
            self.model[build].passed_ms = self.clock_ms
        if claimed is None:
            return
        model = self.model[claimed.build_id]
        self.turns[KINDS[worker]] += 1
        model.state, model.attempt_no, model.logged = BuildState.CLAIMED, model.attempt_no + 1, 0
        model.token, model.lease_until_ms = token, self.clock_ms + _LEASE_MS
        model.owner, model.passed_ms = worker, None
        assert claimed.attempt_no == model.attempt_no
        if answer_arrives:
            self.claims.append(claimed)

    def has_room(self, worker: str, model: Model, *, empty: bool = False) -> bool:
        """Whether the worker could hold a build of this need, beside what it holds or by itself."""
        offer = WORKERS[worker]
        held = [] if empty else [m.size for m in self.model.values() if m.held and m.owner == worker]
        cpus, memory = (sum(sizes) for sizes in zip(model.size, *held, strict=True))
        return (
            (model.need != "gpu" or "gpu" in offer.get("labels", ()))
            and cpus <= offer.get("cpus", 99)
            and memory <= offer.get("memory_bytes", 99 * GIB)
        )

    def notes(self, worker: str) -> tuple[str | None, set[str]]:
        """For which build the worker keeps room now, and which builds it was that were just passed over for the first time."""
        with self.db.reading() as session:
            row = session.get(Worker, worker)
            rows = session.execute(sa.select(Build.id).where(Build.state == "QUEUED", Build.passed_ms.is_not(None)))
            passed = {build for (build,) in rows if self.model[build].passed_ms is None}
            return row.keeps if row is not None else None, passed

    def is_whose_turn_it_is(self, worker: str, claimed: Claim, fit: dict[str, Model], busy: dict[str, int]) -> None:
        """Of those that fit, the claimed one goes first by level and share, and is the oldest of its project."""
        model = fit[claimed.build_id]
        fair = is_fair(self.turns[KINDS[worker]])
        best = {build: m for build, m in fit.items() if fair or m.priority == max(m.priority for m in fit.values())}
        assert claimed.build_id in best
        assert busy[model.project] == min(busy[m.project] for m in best.values())
        assert claimed.build_id == next(build for build, m in best.items() if m.project == model.project)

    def told(self, which: int) -> Claim:
        """One of all claims that were ever answered, often the newest."""
        return self.claims[-1 - which % len(self.claims)]

    def live(self, claim: Claim) -> Model | None:
        """The model of the build, where this claim still holds it."""
        model = self.model[claim.build_id]
        return model if model.held and model.attempt_no == claim.attempt_no else None

    @rule(which=WHICH)
    def renew(self, which: int) -> None:
        claim = self.told(which)
        model = self.live(claim)
        if model is None:
            with pytest.raises(AttemptFenced):
                leases.renew(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), FARM)
            return
        reply = leases.renew(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), FARM)
        assert reply.cancel_requested == model.stop_wished
        model.lease_until_ms = self.clock_ms + _LEASE_MS

    @rule(which=WHICH, verdict=st.sampled_from(Verdict))
    def forge(self, which: int, verdict: Verdict) -> None:
        claim, wrong = self.told(which), hash_token("another")
        with pytest.raises(AttemptFenced):
            leases.renew(self.db, claim.build_id, claim.attempt_no, wrong, FARM)
        with pytest.raises(AttemptFenced):
            lifecycle.finish(self.db, claim.build_id, claim.attempt_no, wrong, a_report(verdict, _ENDS[verdict][0]))

    @rule(which=WHICH, phase=st.sampled_from([PhaseType.BUILD, PhaseType.UPLOAD_ARTIFACTS]))
    def phase(self, which: int, phase: PhaseType) -> None:
        claim = self.told(which)
        model, report = self.live(claim), PhaseReport(phase_type=phase, started_at_ms=1)
        if model is None:
            with pytest.raises(AttemptFenced):
                attempts.record_phase(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)
            return
        attempts.record_phase(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)
        if phase is PhaseType.UPLOAD_ARTIFACTS:
            model.state = BuildState.FINALIZING
        elif model.state is BuildState.CLAIMED:
            model.state = BuildState.RUNNING

    @rule(which=WHICH, twice=st.booleans())
    def log(self, which: int, twice: bool) -> None:
        claim = self.told(which)
        model, data = self.live(claim), b"line\n"
        seq = model.logged if model else 0
        for _ in range(1 + twice):
            try:
                attempts.store_log(
                    self.db,
                    claim.build_id,
                    claim.attempt_no,
                    hash_token(claim.token),
                    seq=seq,
                    offset=seq * len(data),
                    data=data,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            except AttemptFenced:
                assert model is None
                return
        assert model is not None
        model.logged += 1

    @rule(which=WHICH, verdict=st.sampled_from(Verdict), twice=st.booleans())
    def finish(self, which: int, verdict: Verdict, twice: bool) -> None:
        claim = self.told(which)
        reason, then = _ENDS[verdict]
        item = ArtifactReport(
            name=f"from-{claim.attempt_no}",
            key=staging_prefix(claim.build_id, claim.attempt_no) + "a",
            size_bytes=1,
            sha256="0" * 64,
            md5="0" * 32,
            packaging="NONE",
            file_count=1,
        )
        report = a_report(verdict, reason, artifacts=(item,))
        owner, model = self.model[claim.build_id], self.live(claim)
        if model is not None:
            model.reported[claim.attempt_no] = report
            if model.stop_wished or verdict is Verdict.STOPPED:
                model.end(BuildState.STOPPED, Reason.CANCELLED)
            elif then is None:
                model.give_back(reason, self.clock_ms)
            else:
                model.end(then, reason)
                model.visible = item.name
        elif owner.reported.get(claim.attempt_no) != report:
            with pytest.raises(AttemptFenced):
                lifecycle.finish(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)
            return
        for _ in range(1 + twice):
            state = lifecycle.finish(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)
            assert state is owner.state

    # What the farm does

    @rule(seconds=st.sampled_from([1, 3, 9, 31, 130]))
    def advance(self, seconds: int) -> None:
        self.clock_ms += 1000 * seconds

    @rule(on=st.booleans())
    def pause(self, on: bool) -> None:
        if on:
            records.pause(self.db, "default", by="t", why="")
        else:
            records.resume(self.db, "default")
        self.paused = on

    @rule(twins=st.booleans())
    def sweep(self, twins: bool) -> None:
        """One round, or two schedulers that both believe that they lead."""
        lost = {build for build, m in self.model.items() if m.held and m.lease_until_ms < self.clock_ms}
        assert self.by_both(twins, leases.expire) == sorted(lost)
        for build in lost:
            self.model[build].give_back(Reason.WORKER_LOST, self.clock_ms)
        late = {build for build, m in self.model.items() if m.waits_too_long and m.state is BuildState.QUEUED}
        deaf = {
            build
            for build, m in self.model.items()
            if m.held and m.stop_wished_ms is not None and m.stop_wished_ms + STOP_GRACE_MS < self.clock_ms
        }
        assert self.by_both(twins, leases.enforce_deadlines) == sorted(late | deaf)
        for build in late:
            self.model[build].end(BuildState.TIMED_OUT, Reason.QUEUE_TIMEOUT)
        for build in deaf:
            self.model[build].end(BuildState.STOPPED, Reason.CANCELLED)

    def by_both(self, twins: bool, act: Callable[[Database], list[str]]) -> list[str]:
        """What one scheduler ended, or two at the same time did together; none twice."""
        if not twins:
            return sorted(act(self.db))
        with ThreadPoolExecutor(2) as pool:
            return sorted(build for ended in pool.map(act, [self.db, self.db]) for build in ended)

    @rule(which=WHICH)
    def wait_too_long(self, which: int) -> None:
        fit = [build for build, m in self.model.items() if m.state is BuildState.QUEUED]
        if not fit or which:
            return
        self.model[fit[0]].waits_too_long = True
        with self.db.transaction() as session:
            session.execute(sa.update(Build).where(Build.id == fit[0]).values(queue_deadline_ms=self.clock_ms - 1))
        self.sweep(False)

    @rule(when=st.integers(0, 3))
    def restart(self, when: int) -> None:
        if when:
            return
        before = [queries.get_build(self.db, build) for build in self.model]
        self.db.dispose()
        self.db = self.open()
        assert [queries.get_build(self.db, build) for build in self.model] == before

    # What must always hold

    @invariant()
    def no_worker_holds_more_than_it_offers(self) -> None:
        for worker, offer in WORKERS.items():
            held = [m for m in self.model.values() if m.held and m.owner == worker]
            assert sum(m.size[0] for m in held) <= offer.get("cpus", 999)
            assert sum(m.size[1] for m in held) <= offer.get("memory_bytes", 999 * GIB)
            assert not any(m.need == "gpu" for m in held) or "gpu" in offer.get("labels", ())

    @invariant()
    def one_worker_at_most_keeps_room_for_a_build(self) -> None:
        alive = {w: b for w, b in self.keeps.items() if b is not None and self.seen_ms[w] > self.clock_ms - SILENT_MS}
        assert len(set(alive.values())) == len(alive)

    @invariant()
    def the_records_are_as_the_model_says(self) -> None:
        records, _ = queries.find_builds(self.db, limit=1000)
        assert {record.id for record in records} == set(self.model)
        for record in records:
            model = self.model[record.id]
            assert (record.state, record.reason, record.attempt_no) == (model.state, model.reason, model.attempt_no)
            assert [item.name for item in record.artifacts] == ([model.visible] if model.visible else [])
            numbers = [attempt.attempt_no for attempt in record.attempts]
            assert numbers == list(range(1, model.attempt_no + 1))
            assert sum(attempt.ended_ms is None for attempt in record.attempts) == model.held

    @invariant()
    def each_build_has_one_unbroken_history(self) -> None:
        with self.db.reading() as session:
            events = session.scalars(sa.select(Event).order_by(Event.id)).all()
            bells = session.scalars(sa.select(Outbox.key)).all()
        for build, model in self.model.items():
            state, number, endings, waits = BuildState.QUEUED, 0, 0, 1
            for event in events:
                if event.build_id == build:
                    assert event.before == state
                    state = BuildState(event.after)
                    number += event.event == "CLAIMED"
                    assert event.attempt_no == number
                    endings += state in TERMINAL
                    waits += state is BuildState.QUEUED
            assert (state, number, endings) == (model.state, model.attempt_no, model.state in TERMINAL)
            assert sum(build in key for key in bells) == waits


@pytest.fixture
def quiet() -> Iterator[None]:
    """The farm's own log, which would be long here, is dropped."""
    before = structlog.get_config()
    structlog.configure(processors=[_drop])
    yield
    structlog.configure(**before)


def _drop(_logger: object, _name: str, _event: object) -> "structlog.typing.EventDict":
    raise structlog.DropEvent


def test_no_order_of_calls_loses_doubles_or_contradicts_a_build(tmp_path: Path, quiet: None) -> None:
    template = Database(f"sqlite:///{tmp_path / 'template.db'}")
    template.migrate()
    for name, limit in PROJECTS.items():
        a_project(template, name, concurrentBuildLimit=limit, **(BRANCH if name == "branch" else {}))
    template.dispose()
    Records.template = tmp_path / "template.db"
    run_state_machine_as_test(
        Records,
        settings=settings(
            max_examples=int(os.environ.get("EXAMPLES", "40")),
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
