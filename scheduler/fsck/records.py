"""What the records alone tell. Every query sees one moment of them, and stops after the first faults."""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import aliased

from millrace.need import Need, Offer
from millrace.project import BuildSettings
from millrace.vocabulary import BuildState, Reason
from scheduler import caches, guard
from scheduler.db import now_ms
from scheduler.fleets.capacity import offer_of
from scheduler.fsck.terms import HELD_NAMES, QUEUED, TERMINAL_NAMES, Fault, Said, Scope, said
from scheduler.leases import DEADLINE_GRACE_MS, STOP_GRACE_MS
from scheduler.models import Artifact, Attempt, Build, CacheEntry, CacheLayerBelow, Event, Fleet, Phase, Project, Worker
from scheduler.states import TRANSITIONS

_HAS_RESULTS: Final = tuple(state.value for state in (BuildState.SUCCEEDED, BuildState.FAILED, BuildState.TIMED_OUT))
_REASONS: Final = {
    BuildState.SUCCEEDED: (Reason.SUCCEEDED.value,),
    BuildState.TIMED_OUT: (Reason.TIMEOUT.value, Reason.QUEUE_TIMEOUT.value),
    BuildState.FAILED: tuple(reason.value for reason in Reason if reason.startswith("user.")),
    BuildState.STOPPED: tuple(reason.value for reason in Reason if reason.startswith("user.")),
    BuildState.FAULT: tuple(reason.value for reason in Reason if reason.startswith(("infra.", "internal."))),
}
_LIMITS_SETTLE_MS: Final = 5_000
END_OVERDUE: Final = "end-overdue"
MAKE_GUARD: Final = "make-guard"


def sweep_slack_ms(scope: Scope) -> int:
    """How long what is due may lie before the scheduler has seen to it."""
    return int(max(30.0, 6 * scope.settings.sweep_every_s) * 1000)


def _count(scope: Scope) -> str:
    def look() -> int:
        with scope.db.reading() as session:
            return session.execute(sa.select(sa.func.count()).select_from(Build).where(*scope.recent())).scalar_one()

    return f"{scope.once('builds', look)} builds"


def none_overdue(scope: Scope) -> Said:
    """2: what has not ended is in time."""
    slack = sweep_slack_ms(scope)
    lease_slack = slack + int(scope.settings.lease_ttl_s * 1000)  # a scheduler that comes back spares all leases once
    held = Build.state.in_(HELD_NAMES)
    late: list[tuple[sa.ColumnElement[bool], str, str]] = [
        (sa.and_(held, Build.deadline_ms + DEADLINE_GRACE_MS + slack < now_ms()), "ran past its deadline", END_OVERDUE),
        (sa.and_(held, Build.lease_expires_ms + lease_slack < now_ms()), "has a lease that ran out", END_OVERDUE),
        (
            sa.and_(Build.state == QUEUED, Build.queue_deadline_ms + slack < now_ms()),
            "waited longer than its queued time-out",
            END_OVERDUE,
        ),
        (
            sa.and_(held, sa.or_(Build.lease_owner.is_(None), Build.lease_expires_ms.is_(None), Build.deadline_ms.is_(None))),
            "is held, but has no owner, lease or deadline",
            "",
        ),
    ]
    faults = [
        Fault(
            what=f"{row.id} is {row.state} and {why}",
            ids=(row.id,),
            repair=repair,
            hint="Is the scheduler running? /readyz says." if repair else "'millrace stop' ends it.",
        )
        for due, why, repair in late
        for row in scope.rows(sa.select(Build.id, Build.state).where(due))
    ]
    if scope.at_rest:
        known = {fault.ids[0] for fault in faults}
        going = scope.rows(sa.select(Build.id, Build.state).where(Build.state.not_in(TERMINAL_NAMES)))
        faults += [Fault(what=f"{row.id} is {row.state}, at rest", ids=(row.id,)) for row in going if row.id not in known]
    return said("all builds that have not ended", faults)


def _moves(scope: Scope) -> list[Any]:
    """The moves that cannot have followed the one before, each with the one before; read once for three invariants."""

    def over(column: Any) -> Any:
        return sa.func.lag(column).over(partition_by=Event.build_id, order_by=Event.id)

    move = (
        sa.select(
            Event.id,
            Event.build_id,
            Event.attempt_no,
            Event.event,
            Event.before,
            Event.after,
            Event.at_ms,
            Build.state,
            over(Event.after).label("last_after"),
            over(Event.attempt_no).label("last_attempt_no"),
            over(Event.at_ms).label("last_at_ms"),
            sa.func.lead(Event.id).over(partition_by=Event.build_id, order_by=Event.id).label("next_id"),
        )
        .join(Build, Build.id == Event.build_id)
        .where(*scope.recent())
        .subquery()
    )
    c = move.c
    step = sa.case((c.event == "CLAIMED", 1), else_=0)
    legal = [(before.value, event.value, then.value) for (before, event), then in TRANSITIONS.items()]
    wrong = sa.or_(
        c.before != sa.func.coalesce(c.last_after, QUEUED),
        sa.tuple_(c.before, c.event, c.after).not_in(legal),
        sa.and_(c.next_id.is_(None), c.after != c.state),
        c.attempt_no != sa.func.coalesce(c.last_attempt_no, 0) + step,
        c.at_ms < c.last_at_ms,
    )
    found: list[Any] = scope.once("moves", lambda: list(scope.rows(sa.select(move).where(wrong).order_by(c.id))))
    return found


def one_end(scope: Scope) -> Said:
    """3: one terminal move for each ended build, none for others, and a database that refuses changes after it."""
    ends = sa.func.count(Event.id)
    is_end = sa.and_(Event.build_id == Build.id, Event.after.in_(TERMINAL_NAMES))
    counted = (
        sa.select(Build.id, Build.state, ends.label("ends"))
        .outerjoin(Event, is_end)
        .where(*scope.recent())
        .group_by(Build.id, Build.state)
        .having(ends != sa.case((Build.state.in_(TERMINAL_NAMES), 1), else_=0))
    )
    faults = [
        Fault(what=f"{row.id} is {row.state} and has {row.ends} terminal events", ids=(row.id,)) for row in scope.rows(counted)
    ]
    known = {fault.ids[0] for fault in faults}
    for row in _moves(scope):
        first = row.last_after or QUEUED
        if row.before != first or (row.before, row.event, row.after) not in {(b, e, t) for (b, e), t in TRANSITIONS.items()}:
            what = f"event {row.id} of {row.build_id} moves it by {row.event} from {row.before} to {row.after}, it was {first}"
        elif row.next_id is None and row.after != row.state:
            what = f"{row.build_id} is {row.state}, its last event {row.id} left it {row.after}"
        else:
            continue
        if row.build_id not in known:
            faults.append(Fault(what=what, ids=(row.build_id,)))
    ended = (
        sa.select(Build.id, Build.reason, Event.reason.label("said"))
        .join(Event, is_end)
        .where(*scope.recent(), Build.state.in_(TERMINAL_NAMES), Build.reason != Event.reason)
    )
    faults += [
        Fault(what=f"{row.id} has the reason {row.reason}, its event said {row.said}", ids=(row.id,)) for row in scope.rows(ended)
    ]
    with scope.db.reading() as session:
        guarded = guard.is_there(session)
    if not guarded:
        faults.append(Fault(what=f"the database lacks the trigger {guard.NAME}, which refuses such changes", repair=MAKE_GUARD))
    return said(_count(scope), faults)


def one_reason(scope: Scope) -> Said:
    """4: a reason of the closed list that fits the state; none is a bug of ours."""
    fits = sa.or_(*(sa.and_(Build.state == state.value, Build.reason.in_(names)) for state, names in _REASONS.items()))
    ended = Build.state.in_(TERMINAL_NAMES)
    rows = scope.rows(
        sa.select(Build.id, Build.state, Build.reason, Build.message, Build.finished_ms)
        .where(*scope.recent())
        .where(
            sa.or_(
                sa.and_(ended, sa.or_(Build.reason.is_(None), Build.finished_ms.is_(None), sa.not_(fits))),
                sa.and_(sa.not_(ended), sa.or_(Build.reason.is_not(None), Build.finished_ms.is_not(None))),
                Build.reason == Reason.BUG.value,
            )
        )
    )
    faults = []
    for row in rows:
        if row.reason == Reason.BUG.value:
            hint = "Please report it, with the logs of API, scheduler and worker of that time."
            faults.append(Fault(what=f"{row.id} met a bug of the farm's: {row.message}", ids=(row.id,), hint=hint))
        else:
            faults.append(Fault(what=f"{row.id} is {row.state} with the reason {row.reason}", ids=(row.id,)))
    return said(_count(scope), faults)


def attempts_in_a_row(scope: Scope) -> Said:
    """5: attempts are numbered from 1 without a gap, and the build's number is the last one's."""
    counts = (sa.func.count(Attempt.attempt_no), sa.func.min(Attempt.attempt_no), sa.func.max(Attempt.attempt_no))
    count, least, most = counts
    odd = (
        sa.select(Build.id, Build.attempt_no, count.label("count"), least.label("least"), most.label("most"))
        .outerjoin(Attempt, Attempt.build_id == Build.id)
        .where(*scope.recent())
        .group_by(Build.id, Build.attempt_no)
        .having(sa.or_(count != Build.attempt_no, sa.and_(count > 0, sa.or_(least != 1, most != Build.attempt_no))))
    )
    faults = [
        Fault(
            what=f"{row.id} is at attempt {row.attempt_no}, and has {row.count} attempts ({row.least} to {row.most})",
            ids=(row.id,),
        )
        for row in scope.rows(odd)
    ]
    known = {fault.ids[0] for fault in faults}
    for row in _moves(scope):
        before = row.last_attempt_no or 0
        if row.attempt_no != before + (1 if row.event == "CLAIMED" else 0) and row.build_id not in known:
            what = f"event {row.id} ({row.event}) of {row.build_id} is of attempt {row.attempt_no}, the one before of {before}"
            faults.append(Fault(what=what, ids=(row.build_id,)))
    return said(_count(scope), faults)


def one_writer(scope: Scope) -> Said:
    """6: attempts do not overlap, and only the last one's results are there to be seen."""
    later = aliased(Attempt)
    pairs = (
        sa.select(Attempt.build_id, Attempt.attempt_no, Attempt.ended_ms, later.claimed_ms)
        .join(later, sa.and_(later.build_id == Attempt.build_id, later.attempt_no == Attempt.attempt_no + 1))
        .join(Build, Build.id == Attempt.build_id)
        .where(*scope.recent(), later.attempt_no > 1)
        .where(sa.or_(Attempt.ended_ms.is_(None), Attempt.ended_ms > later.claimed_ms))
    )
    faults = [
        Fault(what=f"attempt {r.attempt_no} of {r.build_id} had not ended when the next one began", ids=(r.build_id,))
        for r in scope.rows(pairs)
    ]
    of_build = sa.and_(Attempt.build_id == Build.id, Attempt.attempt_no == Build.attempt_no)
    torn = (
        sa.select(Build.id, Build.state, Attempt.attempt_no, Attempt.ended_ms)
        .join(Attempt, of_build)
        .where(*scope.recent())
        .where((Attempt.ended_ms.is_(None)) != Build.state.in_(HELD_NAMES))
    )
    faults += [
        Fault(what=f"{r.id} is {r.state}, its attempt {r.attempt_no} has {'' if r.ended_ms else 'not '}ended", ids=(r.id,))
        for r in scope.rows(torn)
    ]
    kinds: tuple[tuple[Any, Any, tuple[str, ...]], ...] = (
        (Artifact, Artifact.name, _HAS_RESULTS),
        (CacheEntry, CacheEntry.object_key, (BuildState.SUCCEEDED.value,)),
    )
    for table, name, states in kinds:
        stray = (
            sa.select(Build.id, Build.state, name.label("name"), table.attempt_no)
            .join(table, table.build_id == Build.id)
            .where(*scope.recent())
            .where(sa.or_(table.attempt_no != Build.attempt_no, Build.state.not_in(states)))
        )
        kind = "artifact" if table is Artifact else "cache"
        faults += [
            Fault(
                what=f"{kind} {r.name} of attempt {r.attempt_no} of {r.id} is visible, though the build is {r.state}", ids=(r.id,)
            )
            for r in scope.rows(stray)
        ]
    return said(_count(scope), faults)


def stops_are_heeded(scope: Scope) -> Said:
    """10: a build that was told to stop is STOPPED, soon, unless it had ended before."""
    slack = sweep_slack_ms(scope)
    rows = scope.rows(
        sa.select(Build.id, Build.state)
        .where(*scope.recent(), Build.cancel_requested_ms.is_not(None))
        .where(
            sa.or_(
                sa.and_(Build.state.in_(HELD_NAMES), Build.cancel_requested_ms + STOP_GRACE_MS + slack < now_ms()),
                Build.state == QUEUED,
                sa.and_(
                    Build.state.in_(TERMINAL_NAMES),
                    Build.state != BuildState.STOPPED.value,
                    Build.finished_ms >= Build.cancel_requested_ms,
                ),
            )
        )
    )
    return said(
        _count(scope),
        [
            Fault(
                what=f"{row.id} was told to stop and is {row.state}",
                ids=(row.id,),
                repair=END_OVERDUE if row.state in HELD_NAMES else "",
                hint="'millrace stop' once more." if row.state == QUEUED else "",
            )
            for row in rows
        ],
    )


def within_limits(scope: Scope) -> Said:
    """13: no worker and no project has more builds than it may.

    A lease that was not renewed lately may be of a worker that has gone; a limit that was lowered binds later claims only.
    """
    settings = scope.settings
    fresh_ms = int(max(settings.lease_ttl_s - 3 * settings.renew_every_s, 0) * 1000)
    held = Build.state.in_(HELD_NAMES)
    builds = sa.func.count()
    crowded = (
        sa.select(Worker.id, Worker.slots, builds.label("builds"))
        .join(Build, Build.lease_owner == Worker.id)
        .where(held, Build.lease_expires_ms > now_ms() + fresh_ms)
        .group_by(Worker.id, Worker.slots)
        .having(builds > Worker.slots)
    )
    faults = [
        Fault(what=f"worker {row.id} has {row.slots} slots and holds {row.builds} builds", ids=(row.id,))
        for row in scope.rows(crowded)
    ]
    newest = sa.func.max(Attempt.claimed_ms)
    greedy = (
        sa.select(Project.name, Project.concurrent_build_limit, builds.label("builds"))
        .join(Build, Build.project_name == Project.name)
        .join(Attempt, sa.and_(Attempt.build_id == Build.id, Attempt.attempt_no == Build.attempt_no))
        .where(held)
        .group_by(Project.name, Project.concurrent_build_limit, Project.modified_ms)
        .having(builds > Project.concurrent_build_limit, newest > Project.modified_ms + _LIMITS_SETTLE_MS)
    )
    faults += [
        Fault(
            what=f"project {row.name} may run {row.concurrent_build_limit} builds at once and runs {row.builds}", ids=(row.name,)
        )
        for row in scope.rows(greedy)
    ]
    full = (
        sa.select(Fleet.name, Fleet.max_running, builds.label("builds"))
        .join(Build, Build.fleet == Fleet.name)
        .join(Attempt, sa.and_(Attempt.build_id == Build.id, Attempt.attempt_no == Build.attempt_no))
        .where(held)
        .group_by(Fleet.name, Fleet.max_running, Fleet.modified_ms)
        .having(builds > Fleet.max_running, newest > Fleet.modified_ms + _LIMITS_SETTLE_MS)
    )
    faults += [
        Fault(what=f"fleet {row.name} may run {row.max_running} builds at once and runs {row.builds}", ids=(row.name,))
        for row in scope.rows(full)
    ]
    return said("workers, projects and fleets", faults)


def within_offers(scope: Scope) -> Said:
    """25: no worker holds builds that need more than it offers, or labels that it has not. Fresh leases count, as with 13."""
    settings = scope.settings
    fresh_ms = int(max(settings.lease_ttl_s - 3 * settings.renew_every_s, 0) * 1000)
    held = (
        sa.select(Worker, Build.id, Build.need)
        .join(Build, Build.lease_owner == Worker.id)
        .where(Build.state.in_(HELD_NAMES), Build.lease_expires_ms > now_ms() + fresh_ms)
        .order_by(Build.id)
    )
    of_worker: dict[str, tuple[Offer, list[str], list[Need]]] = {}
    faults = []
    with scope.db.reading() as session:
        rows = session.execute(held).all()
    for worker, build_id, key in rows:
        offer, ids, needs = of_worker.setdefault(worker.id, (offer_of(worker), [], []))
        need = Need.parse(key)
        if need is None:
            faults.append(Fault(what=f"{build_id} needs {key!r}, which cannot be read", ids=(build_id,)))
            continue
        if not offer.has_labels(need):
            lacks = ", ".join(sorted(need.labels - offer.labels))
            faults.append(Fault(what=f"worker {worker.id} holds {build_id} and has no label {lacks}", ids=(build_id,)))
        ids.append(build_id)
        needs.append(need)
    for worker_id, (offer, ids, needs) in of_worker.items():
        left = offer.less(needs)
        if min(left.cpu_millis or 0, left.memory_bytes or 0) < 0:
            taken = Need(cpu_millis=sum(one.cpu_millis for one in needs), memory_bytes=sum(one.memory_bytes for one in needs))
            faults.append(Fault(what=f"worker {worker_id} offers {offer} and holds builds that need {taken}", ids=tuple(ids)))
    return said("workers that hold builds", faults)


def in_order_of_time(scope: Scope) -> Said:
    """22: nothing ends before it begins, and moves go forward in time."""
    recent = scope.recent()
    builds = sa.select(Build.id, sa.literal("its times are out of order").label("why")).where(
        *recent,
        sa.or_(
            Build.queued_ms < Build.submitted_ms,
            Build.first_claimed_ms < Build.submitted_ms,
            Build.finished_ms < sa.func.coalesce(Build.first_claimed_ms, Build.submitted_ms),
        ),
    )
    attempts = (
        sa.select(Build.id, sa.literal("an attempt ended before it was claimed").label("why"))
        .join(Attempt, Attempt.build_id == Build.id)
        .where(*recent, sa.or_(Attempt.ended_ms < Attempt.claimed_ms, Attempt.claimed_ms < Build.submitted_ms))
    )
    phases = (
        sa.select(Build.id, (sa.literal("negative time in phase ") + Phase.phase_type).label("why"))
        .join(Phase, Phase.build_id == Build.id)
        .where(*recent, sa.or_(Phase.ended_ms < Phase.started_ms, Phase.duration_ms < 0))
    )
    faults = [
        Fault(what=f"{row.id}: {row.why}", ids=(row.id,)) for query in (builds, attempts, phases) for row in scope.rows(query)
    ]
    faults += [
        Fault(what=f"event {row.id} of {row.build_id} is earlier than the one before it", ids=(row.build_id,))
        for row in _moves(scope)
        if row.last_at_ms is not None and row.at_ms < row.last_at_ms
    ]
    return said(_count(scope), faults)


def no_fork_in_a_trusted_cache(scope: Scope) -> Said:
    """Invariant 18."""
    with scope.db.reading() as session:
        mine = session.execute(
            sa.select(CacheEntry.namespace, CacheEntry.object_key, Build.id, Build.settings).join(
                Build, Build.id == CacheEntry.build_id
            )
        ).all()
        under = session.execute(
            sa.select(CacheEntry.namespace, CacheLayerBelow.object_key, Build.id, Build.settings)
            .join(CacheEntry, CacheEntry.id == CacheLayerBelow.entry_id)
            .join(Build, Build.id == CacheLayerBelow.build_id)
        ).all()
    faults = [
        Fault(
            what=f"{key} was made by {build}, which comes from a fork, and trusted builds find it",
            ids=(build,),
            hint="Take it away: millrace cache rm.",
        )
        for namespace, key, build, settings in (*mine, *under)
        if caches.is_trusted(namespace) and BuildSettings.model_validate(settings).fork is not None
    ]
    return said(f"{len(mine)} caches", faults)
