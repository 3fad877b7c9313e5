"""Who may run a build: claim, renew, expire. The lease is columns of the build's row; `attempt_no` is the fencing number."""

import hashlib
from collections.abc import Callable
from typing import Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.contract import OLDEST_PROTOCOL, PROTOCOL, Claim, ClaimRequest, RenewReply
from millrace.errors import InvalidInput, Unavailable
from millrace.ids import new_secret
from millrace.log import get_logger
from millrace.need import Offer
from millrace.project import BuildSettings
from millrace.settings import Settings
from millrace.vocabulary import BuildState, PhaseType, Reason, Verdict
from scheduler import fairness, lanes, placement
from scheduler.db import Database, now_ms
from scheduler.fairness import Lane
from scheduler.lifecycle import MAX_BACKOFF_MS, apply, end_attempt, give_back, held, phase_retries, stopped_message, time_out
from scheduler.models import IS_HELD, Attempt, Build, Instance, Outbox, Phase, Served, Turn, Worker
from scheduler.states import HELD, BuildEvent

log = get_logger(__name__)
_CLAIM_LOCK: Final = 0x436C616D
DEADLINE_GRACE_MS: Final = 60_000
"""How long after a build's deadline its worker may still report before the farm ends the build itself."""
STOP_GRACE_MS: Final = 180_000
"""How long a worker has to end a build that it was told to stop, before the farm ends it and fences the worker."""
_TRIES: Final = 20
"""How many builds a claim looks at that cannot be claimed after all, before it leaves the rest to the next one."""
_HELD_NAMES: Final = tuple(state.value for state in HELD)


def hash_token(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_arn(settings: Settings, build_id: str) -> str:
    """CodeBuild: the build's ARN."""
    return f"arn:aws:codebuild:{settings.region}:{settings.account_id}:build/{build_id}"


def claim(db: Database, request: ClaimRequest, settings: Settings) -> Claim | None:
    """The waiting build of the worker's fleet whose turn it is, now held by it; None where nothing waits that may run.

    Whose turn it is, `scheduler.fairness` says.
    """
    if not OLDEST_PROTOCOL <= request.protocol <= PROTOCOL:
        raise InvalidInput(
            f"worker {request.worker_id} speaks protocol {request.protocol}, this farm speaks {OLDEST_PROTOCOL} to {PROTOCOL}; "
            "run workers of the same release as the API, or of the one before it",
        )

    def work(session: Session) -> Claim | None:
        worker = _see_worker(session, request)
        if (again := _again(session, request, settings)) is not None:
            return again
        if worker.leave_ms is not None or request.free_slots < 1 or request.state != "up":
            return None
        if not db.is_sqlite:  # claims queue up behind one another, so that limits and shares are counted, not guessed
            session.execute(sa.select(sa.func.pg_advisory_xact_lock(_CLAIM_LOCK)))
        lanes.keep_plans(session)
        claimed = (
            _next(session, worker, request, settings)
            if request.only is None
            else _only(session, worker, request.only, request, settings)
        )
        if claimed is not None:
            worker.idle_since_ms = None
        return claimed

    return db.run(work)


def leave_why(db: Database, worker_id: str) -> str:
    """Why a worker that got no build just now is to leave; empty where it is to stay."""
    with db.reading() as session:
        told = sa.select(Worker.leave_why).where(Worker.id == worker_id, Worker.leave_ms.is_not(None), Worker.state != "up")
        why: str | None = session.scalar(told)
    return "" if why is None else why or "its fleet is to have fewer workers"


def _next(session: Session, worker: Worker, request: ClaimRequest, settings: Settings) -> Claim | None:
    fleet = request.fleet
    load = lanes.load_of(session, fleet)
    if not lanes.limits_of(session, fleet, settings).leave_room(load):
        return None
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    turn, place = lanes.turn_of(session, fleet), placement.place_of(session, worker)
    fair = fairness.is_fair(placement.claims_of(turn, place.offer))
    moved: set[str] = set()
    for _ in range(_TRIES):
        picked = placement.choose(session, place, load, now, fair=fair, without=moved)
        if picked.keep is not None:
            worker.keeps = picked.keep.build_id
            log.info("worker.keeps_room", worker_id=worker.id, build_id=worker.keeps)
        lane = picked.lane
        if lane is None:
            return None
        build = session.get(Build, lane.build_id, with_for_update={"skip_locked": True}, populate_existing=True)
        if build is None or build.state != BuildState.QUEUED or build.cancel_requested_ms is not None:
            moved.add(lane.project)  # it is being stopped, or timed out, this very moment
            continue
        claimed = _take(session, build, request, settings)
        if claimed is None:
            continue
        if picked.passed is not None:
            placement.pass_over(session, picked.passed, now)
        worker.keeps = None
        _serve(session, turn, place.offer, lane)
        return claimed
    return None


def _only(session: Session, worker: Worker, build_id: str, request: ClaimRequest, settings: Settings) -> Claim | None:
    """The claim to the one build that a worker was started for; None where it does not wait, or may not run now."""
    load = lanes.load_of(session, request.fleet)
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    lane = lanes.read_lane(session, request.fleet, load, now, build_id)
    if lane is None or not lanes.limits_of(session, request.fleet, settings).leave_room(load):
        return None
    place = placement.place_of(session, worker)
    build = session.get(Build, build_id, with_for_update={"skip_locked": True}, populate_existing=True)
    if build is None or build.state != BuildState.QUEUED or build.cancel_requested_ms is not None or not place.takes(build.need):
        return None
    claimed = _take(session, build, request, settings)
    if claimed is not None:
        _serve(session, lanes.turn_of(session, request.fleet), place.offer, lane)
    return claimed


def _serve(session: Session, turn: Turn, offer: Offer, lane: Lane) -> None:
    """Note that a worker of this offer claimed from the lane, for those whose turn comes after it."""
    session.add(turn)
    placement.count_claim(turn, offer)
    clock, turn.clock = fairness.serve(lane.served, lane.weight, turn.clock)
    session.merge(Served(fleet=turn.fleet, project_name=lane.project, clock=clock))
    session.flush()


def _again(session: Session, request: ClaimRequest, settings: Settings) -> Claim | None:
    """The claim that this very request was granted before, where its attempt still holds its build."""
    if request.token is None:
        return None
    build = session.scalars(
        sa.select(Build)
        .join(Attempt, sa.and_(Attempt.build_id == Build.id, Attempt.attempt_no == Build.attempt_no))
        .where(IS_HELD, Build.lease_owner == request.worker_id)
        .where(Attempt.token_hash == hash_token(request.token), Attempt.ended_ms.is_(None))
        .with_for_update(of=Build)
    ).first()
    if build is None:
        return None
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    build.lease_expires_ms = now + int(settings.lease_ttl_s * 1000)
    return _claim(session, build, request.token, BuildSettings.model_validate(build.settings), now, settings)


def _take(session: Session, build: Build, request: ClaimRequest, settings: Settings) -> Claim | None:
    """The claim to `build`; None where its record cannot be read, which ends it, lest it bar the way for all behind it."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    apply(session, build, BuildEvent.CLAIMED)
    build.passed_ms = None
    token = request.token or new_secret("att")
    session.add(
        Attempt(
            build_id=build.id,
            attempt_no=build.attempt_no,
            worker_id=request.worker_id,
            token_hash=hash_token(token),
            claimed_ms=max(now, build.submitted_ms),
        )
    )
    # Until the worker tells of it, so that a claimed build has a phase that runs, and one that is lost a phase that failed.
    session.add(
        Phase(
            build_id=build.id,
            attempt_no=build.attempt_no,
            phase_type=PhaseType.PROVISIONING.value,
            started_ms=now,
            contexts=[],
        )
    )
    session.flush()
    try:
        wanted = BuildSettings.model_validate(build.settings)
    except ValidationError as error:
        message = f"this release cannot read the build's settings: {error.error_count()} problems"
        end_attempt(session, build, Verdict.FAULT, Reason.BUG, message)
        apply(session, build, BuildEvent.FAULTED, reason=Reason.BUG, message=message)
        return None
    build.lease_owner = request.worker_id
    build.lease_expires_ms = now + int(settings.lease_ttl_s * 1000)
    build.first_claimed_ms = build.first_claimed_ms or max(now, build.submitted_ms)
    _retries, spent_ms = phase_retries(session, build)
    build.deadline_ms = now + max(wanted.timeout_in_minutes * 60_000 - spent_ms, 0)
    build.resolved_source_version = None
    build.marks = {"accepted": build.submitted_ms, "claimed": now}
    session.flush()
    claim = _claim(session, build, token, wanted, now, settings)
    if request.token is None:  # a worker of the last release, which takes no member that it does not know
        return claim.model_copy(update={"now_ms": None})
    return claim


def _claim(session: Session, build: Build, token: str, wanted: BuildSettings, now: int, settings: Settings) -> Claim:
    """What a worker is told of the build that it holds."""
    retries, _spent_ms = phase_retries(session, build)
    return Claim(
        build_id=build.id,
        build_arn=build_arn(settings, build.id),
        build_number=build.number,
        attempt_no=build.attempt_no,
        token=token,
        lease_ttl_s=settings.lease_ttl_s,
        renew_every_s=settings.renew_every_s,
        self_fence_s=settings.self_fence_s,
        deadline_in_s=max((build.deadline_ms or now) - now, 0) / 1000,
        submitted_at_ms=build.submitted_ms,
        now_ms=now,
        initiator=build.initiator,
        region=settings.region,
        retries=retries,
        build_url=f"{settings.api}/v1/builds/{build.id}",
        settings=wanted,
    )


def _see_worker(session: Session, request: ClaimRequest) -> Worker:
    """The worker as it shows itself. One that is to leave counts as leaving from the answer on that says so."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    worker = session.get(Worker, request.worker_id, with_for_update=True)
    if worker is None:
        worker = Worker(id=request.worker_id, first_seen_ms=now, state=request.state)
        session.add(worker)
    if worker.state == "gone" and request.state == "up" and request.generation is None:
        worker.leave_ms, worker.leave_why = None, ""  # it left as it was asked to, and somebody started it again
    worker.fleet, worker.version = request.fleet, request.version[:50]
    worker.slots, worker.free_slots, worker.last_seen_ms = request.slots, request.free_slots, now
    worker.state, worker.not_claiming = request.state, request.not_claiming
    worker.generation, worker.labels = request.generation, sorted(set(request.labels)) or None
    worker.cpu_millis = None if request.cpus is None else round(request.cpus * 1000)
    worker.memory_bytes = request.memory_bytes
    if request.generation is not None and worker.leave_ms is None:
        instance = session.get(Instance, (request.fleet, request.worker_id), with_for_update=True)
        if instance is not None and instance.released_ms is not None:
            worker.leave_ms, worker.leave_why = now, instance.why
    if worker.leave_ms is not None and worker.state == "up":
        worker.state = "draining"
    mine = sa.select(Build.id).where(IS_HELD, Build.fleet == request.fleet, Build.lease_owner == worker.id).limit(1)
    worker.idle_since_ms = None if session.scalar(mine) is not None else worker.idle_since_ms or now
    session.flush()
    return worker


def renew(db: Database, build_id: str, attempt_no: int, token_hash: str, settings: Settings) -> RenewReply:
    """Another `lease_ttl_s` for the attempt. Raises AttemptFenced where it no longer holds the build."""

    def work(session: Session) -> RenewReply:
        build, _attempt = held(session, build_id, attempt_no, token_hash)
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        build.lease_expires_ms = now + int(settings.lease_ttl_s * 1000)
        return RenewReply(
            lease_ttl_s=settings.lease_ttl_s,
            cancel_requested=build.cancel_requested_ms is not None,
            deadline_in_s=((build.deadline_ms or now) - now) / 1000,
        )

    return db.run(work)


def expire(db: Database, *, as_of_ms: int | None = None) -> list[str]:
    """Take back every build whose lease ran out: queued again, STOPPED where that was asked for, FAULT at the cap.

    `as_of_ms`, where given, is the moment that counts in the place of now: a query may wait for a database that stands still,
    and what ran out meanwhile nobody could renew.
    """
    return _end_each(
        db,
        sa.and_(Build.state.in_(_HELD_NAMES), Build.lease_expires_ms < (now_ms() if as_of_ms is None else as_of_ms)),
        lambda session, build: _lost(session, build),
    )


def _lost(session: Session, build: Build) -> None:
    message = f"worker {build.lease_owner} went silent while it ran attempt {build.attempt_no}"
    end_attempt(session, build, Verdict.HANDED_BACK, Reason.WORKER_LOST, message)
    give_back(session, build, Reason.WORKER_LOST, message)


def enforce_deadlines(db: Database) -> list[str]:
    """End what waited or ran too long, or would not stop: queue time-outs, and builds that their worker did not end in time."""
    queued = _end_each(
        db,
        sa.and_(Build.state == BuildState.QUEUED.value, Build.queue_deadline_ms < now_ms()),
        lambda session, build: apply(
            session,
            build,
            BuildEvent.TIMED_OUT,
            reason=Reason.QUEUE_TIMEOUT,
            message=f"waited longer than {build.settings.get('queuedTimeoutInMinutes')} minutes in the queue",
        ),
    )
    running = _end_each(
        db,
        sa.and_(Build.state.in_(_HELD_NAMES), Build.deadline_ms + DEADLINE_GRACE_MS < now_ms()),
        _overdue,
    )
    stopping = _end_each(
        db,
        sa.and_(Build.state.in_(_HELD_NAMES), Build.cancel_requested_ms + STOP_GRACE_MS < now_ms()),
        _unheard,
    )
    return queued + running + stopping


def bound_waits(session: Session, now: int, *, lease_ms: int) -> None:
    """No lease and no back-off lasts longer than one can from `now`: the clock may have been set back while nobody looked."""
    session.execute(
        sa.update(Build).where(IS_HELD, Build.lease_expires_ms > now + lease_ms).values(lease_expires_ms=now + lease_ms)
    )
    most = now + MAX_BACKOFF_MS
    waits = Build.state == BuildState.QUEUED.value
    session.execute(sa.update(Build).where(waits, Build.not_before_ms > most).values(not_before_ms=most))
    session.execute(sa.update(Outbox).where(Outbox.sent_ms.is_(None), Outbox.next_try_ms > most).values(next_try_ms=now))


def follow_clock(session: Session, now: int, step_ms: int, *, lease_ms: int) -> None:
    """The clock that moments are noted by was set by `step_ms`, and shows `now`: nothing may be over for that, nor wait for that.

    What is held gets a whole lease. Forward, time-outs move along, but for what was noted since. Backward they stay, as nothing
    ends too early by that, and the worker keeps to the time-out by itself; back-offs and messages do not wait for longer.
    """
    session.execute(sa.update(Build).where(IS_HELD).values(lease_expires_ms=now + lease_ms))
    if step_ms > 0:
        before = now - step_ms
        session.execute(
            sa.update(Build)
            .where(Build.state == BuildState.QUEUED.value, Build.queued_ms <= before)
            .values(queue_deadline_ms=Build.queue_deadline_ms + step_ms)
        )
        claimed = sa.select(Attempt.build_id).where(Attempt.ended_ms.is_(None), Attempt.claimed_ms <= before)
        session.execute(
            sa.update(Build)
            .where(IS_HELD, Build.id.in_(claimed))
            .values(
                deadline_ms=Build.deadline_ms + step_ms,
                cancel_requested_ms=sa.case(
                    (Build.cancel_requested_ms <= before, Build.cancel_requested_ms + step_ms), else_=Build.cancel_requested_ms
                ),
            )
        )
        return
    waits = Build.state == BuildState.QUEUED.value
    session.execute(sa.update(Build).where(waits, Build.not_before_ms > now).values(not_before_ms=now))
    session.execute(sa.update(Outbox).where(Outbox.sent_ms.is_(None), Outbox.next_try_ms > now).values(next_try_ms=now))
    session.execute(sa.update(Build).where(IS_HELD, Build.cancel_requested_ms > now).values(cancel_requested_ms=now))


def _unheard(session: Session, build: Build) -> None:
    message = f"{stopped_message(build)}; its worker did not answer to that"
    end_attempt(session, build, Verdict.STOPPED, Reason.CANCELLED, message)
    apply(session, build, BuildEvent.STOPPED, reason=Reason.CANCELLED, message=message)


def _overdue(session: Session, build: Build) -> None:
    message = "the build ran past its time-out, and its worker did not end it"
    end_attempt(session, build, Verdict.TIMED_OUT, Reason.TIMEOUT, message)
    if build.cancel_requested_ms is not None:
        apply(session, build, BuildEvent.STOPPED, reason=Reason.CANCELLED, message=stopped_message(build))
        return
    time_out(session, build, message)


def _end_each(db: Database, due: sa.ColumnElement[bool], end: Callable[[Session, Build], object]) -> list[str]:
    """`end` each build that is `due`, each in a commit of its own, so that one that fails holds up no other."""
    with db.reading() as session:
        ids = session.scalars(sa.select(Build.id).where(due).limit(500)).all()
    ended = []
    for build_id in ids:

        def work(session: Session, build_id: str = build_id) -> bool:
            build = session.scalars(sa.select(Build).where(Build.id == build_id, due).with_for_update()).first()
            if build is None:  # it moved meanwhile
                return False
            end(session, build)
            return True

        try:
            if db.run(work):
                ended.append(build_id)
        except Unavailable:
            raise
        except Exception:  # a damaged record must not keep the others, which would wait for ever
            log.exception("build.not_ended", build_id=build_id)
    return ended
