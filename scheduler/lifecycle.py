"""The sole writer of a build's state. Compare-and-set, with the event row in the same commit and one log line."""

import hashlib
import json
from collections.abc import Sequence
from typing import Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.contract import FinishReport, PhaseReport
from millrace.errors import AttemptFenced, InvalidInput
from millrace.ids import staging_prefix
from millrace.log import get_logger
from millrace.project import BuildSettings
from millrace.vocabulary import COMMAND_PHASES, BuildState, PhaseType, Reason, StatusType, Verdict
from scheduler import caches, logs, notices, publication
from scheduler.db import Database, now_ms
from scheduler.models import Attempt, Build, Event, LogChunk, Phase, Project
from scheduler.queue import Origin, enqueue, put_bell
from scheduler.states import HELD, TERMINAL, BuildEvent, after

log = get_logger(__name__)

_VERDICT_EVENTS: Final = {
    Verdict.SUCCEEDED: BuildEvent.SUCCEEDED,
    Verdict.FAILED: BuildEvent.FAILED,
    Verdict.TIMED_OUT: BuildEvent.TIMED_OUT,
}
_UNCHARGED: Final = frozenset({Reason.WORKER_SHUTDOWN})
"""Reasons for which an attempt does not count against the build's cap: nobody's fault, and sure to pass."""
_LIKELY_AGAIN: Final = frozenset(
    {Reason.ENGINE_LOST, Reason.IMAGE_PULL, Reason.SOURCE_UNREACHABLE, Reason.STORAGE, Reason.SECRETS_AWAY}
)
"""Reasons that another attempt at once would likely meet again; one by one, they are tried later and later."""
_NEVER_AGAIN: Final = frozenset({Reason.BUG})
"""Reasons of ours that a second attempt would only meet again."""
MAX_BACKOFF_MS: Final = 120_000
MAX_PHASE_RETRIES: Final = 100
"""CodeBuild's own limit of `on-failure: RETRY-n`; the worker keeps to the count of the buildspec."""
_RETRIED: Final = frozenset({BuildState.FAILED, BuildState.TIMED_OUT, BuildState.FAULT})
_CONTEXTS: Final = {StatusType.TIMED_OUT: {"statusCode": "BUILD_TIMED_OUT", "message": "Build has timed out. "}}
_FREE_RETURNS: Final = 20
"""So many attempts of one build may end uncharged; then they count, as a build that never ends is worse than one that faults."""
_OURS: Final = frozenset(reason for reason in Reason if reason.startswith(("infra.", "internal.")))
_REASONS: Final[dict[Verdict, frozenset[Reason]]] = {
    Verdict.SUCCEEDED: frozenset({Reason.SUCCEEDED}),
    Verdict.FAILED: frozenset(r for r in Reason if r.startswith("user."))
    - {Reason.TIMEOUT, Reason.CANCELLED, Reason.PHASE_RETRY},
    Verdict.TIMED_OUT: frozenset({Reason.TIMEOUT}),
    Verdict.STOPPED: frozenset({Reason.CANCELLED}),
    Verdict.FAULT: _OURS,
    Verdict.HANDED_BACK: _OURS | {Reason.PHASE_RETRY},
}
"""Which Reasons a verdict may have, so that FAILED stays the user's and FAULT ours."""
_FARMS_OWN: Final = frozenset({PhaseType.SUBMITTED, PhaseType.QUEUED, PhaseType.COMPLETED})
"""Phases that the farm tells from the build's own times; no worker reports them."""
_MAX_VERSION_CHARS: Final = 256


def apply(session: Session, build: Build, event: BuildEvent, *, reason: Reason | None = None, message: str = "") -> None:
    """Move `build` (read in this session) by `event`. A terminal move needs a `reason`; CLAIMED begins the next attempt.

    Raises IllegalTransition where the table knows no such move, AttemptFenced where another moved it meanwhile.
    """
    before = BuildState(build.state)
    then = after(before, event)
    last = sa.select(sa.func.max(Event.at_ms)).where(Event.build_id == build.id).scalar_subquery()
    now, last_ms = session.execute(sa.select(now_ms(), last)).one()
    at_ms = max(now, last_ms or 0, build.submitted_ms, build.first_claimed_ms or 0)  # the clock may have been set back
    values: dict[str, object] = {"state": then.value}
    if then in TERMINAL:
        if reason is None:
            raise AssertionError(f"{event} ends a build, and so needs a reason")
        values |= {
            "reason": reason.value,
            "message": message,
            "finished_ms": at_ms,
            "lease_owner": None,
            "lease_expires_ms": None,
        }
    elif event is BuildEvent.CLAIMED:
        values |= {"attempt_no": build.attempt_no + 1}
    elif event is BuildEvent.REQUEUED:  # it waits anew, and so has its whole queue time-out again
        waits_ms = int(build.settings["queuedTimeoutInMinutes"]) * 60_000
        values |= {"lease_owner": None, "lease_expires_ms": None, "deadline_ms": None, "queue_deadline_ms": now + waits_ms}
        if reason is not Reason.PHASE_RETRY:  # that one was asked for, and keeps its place
            values |= {"queued_ms": max(now, build.submitted_ms)}
    moved = session.execute(
        sa.update(Build)
        .where(Build.id == build.id, Build.state == before.value, Build.attempt_no == build.attempt_no)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if moved.rowcount != 1:  # type: ignore[attr-defined]  # an update's result is a cursor's
        raise AttemptFenced(f"build {build.id} was moved by another while it was {before}")
    for name, value in values.items():
        sa.orm.attributes.set_committed_value(build, name, value)
    session.add(
        Event(
            build_id=build.id,
            attempt_no=build.attempt_no,
            at_ms=at_ms,
            event=event.value,
            before=before.value,
            after=then.value,
            reason=reason.value if reason else None,
        )
    )
    session.flush()
    notices.note(session, build)
    if then in _RETRIED and reason is not None:
        _retry_by_itself(session, build, reason)
    facts = {"build_id": build.id, "attempt_no": build.attempt_no, "before": before.value, "after": then.value}
    if reason:
        facts["reason"] = reason.value
    _log_after_commit(session, f"build.{event.lower()}", facts)


def _retry_by_itself(session: Session, build: Build, reason: Reason) -> None:
    """Queue the next build of one that failed, where its autoRetryLimit leaves one (CodeBuild: autoRetryConfig).

    In the commit that ends the build, so that none is lost and none comes twice. What failed for its buildspec or waited in vain
    would only do so again, and is retried all the same, as the limit is the user's word; a build whose record is damaged is not.
    """
    if reason is Reason.BUG:
        return
    limit = build.settings.get("autoRetryLimit") or 0
    if not isinstance(limit, int) or build.auto_retry_number >= limit:
        return
    project = session.get(Project, build.project_name, with_for_update=True)
    if project is None or project.deleted_ms is not None:
        return
    try:
        wanted = repeated(build)
    except ValidationError:
        return
    origin = Origin(
        initiator=build.initiator,
        level=build.level,
        priority=build.priority,
        max_attempts=build.max_attempts,
        retry_of=build.id,
        auto_retry_number=build.auto_retry_number + 1,
    )
    following = enqueue(session, project, wanted, origin)
    build.next_auto_retry = following.id
    session.flush()
    _log_after_commit(session, "build.queued", {"build_id": following.id, "initiator": build.initiator, "retry_of": build.id})


def repeated(build: Build) -> BuildSettings:
    """The settings of a build that repeats this one: its own, and of git the very commit that it built.

    CodeBuild: RetryBuild takes the same source version; of a branch that has moved on meanwhile that would be other source.
    Raises pydantic's ValidationError where this release cannot read them.
    """
    wanted = BuildSettings.model_validate(build.settings)
    if wanted.source.is_git and build.resolved_source_version:
        return wanted.model_copy(update={"source_commit": build.resolved_source_version})
    return wanted


def end_attempt(session: Session, build: Build, verdict: Verdict, reason: Reason, message: str) -> Attempt | None:
    """Close the row of the build's present attempt, which also kills its token; None where there is none."""
    attempt = session.get(Attempt, (build.id, build.attempt_no))
    if attempt is None or attempt.ended_ms is not None:
        return attempt
    at_ms: int = session.execute(sa.select(now_ms())).scalar_one()
    attempt.ended_ms = max(at_ms, attempt.claimed_ms)
    attempt.verdict, attempt.reason, attempt.message = verdict.value, reason.value, message
    logs.close(session, attempt)
    status = StatusType.FAULT if verdict is Verdict.HANDED_BACK else StatusType(verdict.value)
    context = _CONTEXTS.get(status, {"statusCode": "", "message": ""})
    if status is StatusType.FAULT:
        context = {"statusCode": "INTERNAL_SERVICE_ERROR", "message": message}
    still_open = sa.select(Phase).where(
        Phase.build_id == build.id, Phase.attempt_no == build.attempt_no, Phase.ended_ms.is_(None)
    )
    for phase in session.scalars(still_open):
        phase.ended_ms = max(at_ms, phase.started_ms)  # the beginning is by the worker's clock
        phase.duration_ms = phase.ended_ms - phase.started_ms
        phase.status = status.value
        phase.contexts = [context]
    session.flush()
    return attempt


def give_back(session: Session, build: Build, reason: Reason, message: str) -> None:
    """An attempt is over through no fault of the user's: STOPPED if that was asked for, queued again, or FAULT at the cap."""
    if build.cancel_requested_ms is not None:
        apply(session, build, BuildEvent.STOPPED, reason=Reason.CANCELLED, message=stopped_message(build))
        return
    if reason is Reason.PHASE_RETRY:
        retries, spent_ms = phase_retries(session, build)
        if spent_ms >= build.settings["timeoutInMinutes"] * 60_000:
            time_out(session, build, "the build's attempts together ran longer than its time-out")
            return
        if retries <= MAX_PHASE_RETRIES:
            apply(session, build, BuildEvent.REQUEUED, reason=reason)
            put_bell(session, build)
            return
        reason, message = Reason.BUG, f"its workers began it anew more than {MAX_PHASE_RETRIES} times"
    if reason not in _UNCHARGED or build.attempt_no - build.faults > _FREE_RETURNS:
        build.faults += 1
        session.flush()
    if reason not in _NEVER_AGAIN and build.faults < build.max_attempts and _may_repeat(session, build):
        apply(session, build, BuildEvent.REQUEUED, reason=reason)
        if reason in _LIKELY_AGAIN:
            build.not_before_ms = build.queued_ms + backoff_ms(build.faults)
            session.flush()
        put_bell(session, build)
        return
    apply(session, build, BuildEvent.FAULTED, reason=reason, message=message)


def backoff_ms(faults: int) -> int:
    """How long a build waits at least after its `faults`th fault of a kind that may last: 2, 8, 32 s, at most two minutes."""
    return int(min(MAX_BACKOFF_MS, 500 * 4**faults))


def _may_repeat(session: Session, build: Build) -> bool:
    """Whether the project lets a build that our side failed run again: what its commands did outside is not undone by that."""
    rule = session.scalar(sa.select(Project.infra_retry).where(Project.name == build.project_name))
    if rule == "before_commands":
        begun = sa.select(Phase.phase_type).where(
            Phase.build_id == build.id,
            Phase.attempt_no == build.attempt_no,
            Phase.phase_type.in_([phase.value for phase in COMMAND_PHASES]),
        )
        return session.scalar(sa.select(begun.exists())) is False
    return rule != "never"


def phase_retries(session: Session, build: Build) -> tuple[int, int]:
    """How many attempts of this build have ended by `on-failure: RETRY`, and how many milliseconds they took together.

    All of them share the build's time-out, as the build's own commands asked for them.
    """
    ended = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(Attempt.ended_ms - Attempt.claimed_ms), 0)).where(
        Attempt.build_id == build.id, Attempt.reason == Reason.PHASE_RETRY.value
    )
    count, spent_ms = session.execute(ended).one()
    return int(count), int(spent_ms)


def time_out(session: Session, build: Build, message: str) -> None:
    """End a held build whose time is over."""
    if build.state != BuildState.FINALIZING:
        apply(session, build, BuildEvent.FINALIZING)
    apply(session, build, BuildEvent.TIMED_OUT, reason=Reason.TIMEOUT, message=message)


def finish(db: Database, build_id: str, attempt_no: int, token_hash: str, report: FinishReport) -> BuildState:
    """Take an attempt's report: verdict, Reason and visible artifacts in one commit. The build's state afterwards.

    The same report twice does nothing the second time. Raises AttemptFenced where the attempt no longer holds the build,
    InvalidInput where verdict and Reason contradict each other, or an artifact is not this attempt's.
    """
    if report.reason not in _REASONS[report.verdict]:
        raise InvalidInput(f"{report.reason} is no reason for an attempt to end {report.verdict}")
    digest = hashlib.sha256(json.dumps(report.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    foreign = [item.key for item in report.artifacts if not item.key.startswith(staging_prefix(build_id, attempt_no))]
    if foreign:
        raise InvalidInput(f"{foreign[0]!r} is not an object of attempt {attempt_no} of {build_id}")
    caches.check(build_id, attempt_no, report)
    check_phases(report.phases)

    def work(session: Session) -> BuildState:
        build, attempt = held(session, build_id, attempt_no, token_hash, finished_with=digest)
        if attempt.report_sha256 == digest:
            return BuildState(build.state)
        attempt.report_sha256 = digest
        footer = report.log
        if footer is not None and footer.size_bytes >= attempt.log_bytes:  # less is the last release's word for a lost process
            attempt.log_sha256, attempt.log_footer = footer.sha256, footer.model_dump()
        if report.resolved_source_version:
            build.resolved_source_version = plain(report.resolved_source_version)[:_MAX_VERSION_CHARS]
        note_phases(session, build, report.phases)
        caches.note_uses(attempt, [(one.used, plain(one.says)) for one in report.cache_uses])
        build.marks = {**build.marks, **report.marks}
        build.exit_code = report.exit_code
        session.flush()
        end_attempt(session, build, report.verdict, report.reason, plain(report.message))
        _conclude(session, build, report, plain(report.message))
        return BuildState(build.state)

    return db.run(work)


def check_phases(reports: Sequence[PhaseReport]) -> None:
    """Raises InvalidInput for a phase that is not the worker's to report."""
    for report in reports:
        if report.phase_type in _FARMS_OWN:
            raise InvalidInput(f"the phase {report.phase_type} is told by the farm, not by a worker")


def note_phases(session: Session, build: Build, reports: Sequence[PhaseReport]) -> None:
    """Write down that phases of the attempt that holds the build began or ended, and move the build along with them."""
    unknown = notices.commit_of(build) is None
    for report in reports:
        if build.state == BuildState.CLAIMED:
            apply(session, build, BuildEvent.STARTED)
        if report.phase_type in (PhaseType.UPLOAD_ARTIFACTS, PhaseType.FINALIZING) and build.state == BuildState.RUNNING:
            apply(session, build, BuildEvent.FINALIZING)
        phase = session.get(Phase, (build.id, build.attempt_no, report.phase_type.value))
        if phase is None:
            phase = Phase(build_id=build.id, attempt_no=build.attempt_no, phase_type=report.phase_type.value, contexts=[])
            session.add(phase)
        elif phase.ended_ms is not None and report.ended_at_ms is None:
            continue  # a late repeat of the beginning
        phase.started_ms = report.started_at_ms
        phase.ended_ms, phase.duration_ms = report.ended_at_ms, report.duration_ms
        phase.status = report.status.value if report.status else None
        phase.contexts = [context.model_dump(by_alias=True) for context in report.contexts]
        if report.resolved_source_version:
            build.resolved_source_version = plain(report.resolved_source_version)[:_MAX_VERSION_CHARS]
    session.flush()
    if unknown:
        notices.note(session, build)


def plain(text: str) -> str:
    """`text` as both databases can keep it: PostgreSQL knows no NUL, and neither of them half a surrogate pair."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()


def _conclude(session: Session, build: Build, report: FinishReport, message: str) -> None:
    if build.cancel_requested_ms is not None or report.verdict is Verdict.STOPPED:
        apply(
            session,
            build,
            BuildEvent.STOPPED,
            reason=Reason.CANCELLED,
            message=stopped_message(build, message or "stopped on request"),
        )
        return
    event = _VERDICT_EVENTS.get(report.verdict)
    if event is None:  # FAULT or HANDED_BACK
        give_back(session, build, report.reason, message)
        return
    if build.state != BuildState.FINALIZING:
        apply(session, build, BuildEvent.FINALIZING)
    publication.keep(session, build, report)
    if report.verdict is Verdict.SUCCEEDED:
        caches.keep(session, build, report)
    build.exported = [variable.model_dump() for variable in report.exported_variables]
    session.flush()
    apply(session, build, event, reason=report.reason, message=message)


def request_stop(db: Database, build_id: str) -> bool:
    """Ask for `build_id` to stop: a queued build ends at once, a held one when its worker next renews. False if there is none.

    A finished build stays as it is.
    """

    def work(session: Session) -> bool:
        build = session.get(Build, build_id, with_for_update=True)
        if build is None:
            return False
        if BuildState(build.state) in TERMINAL:
            return True
        _wish_stop(session, build)
        return True

    return db.run(work)


def supersede(session: Session, newer: Build) -> None:
    """Stop the older builds of the branch or pull request that `newer` is of, in the commit that queues it."""
    older = (
        sa.select(Build)
        .where(Build.project_name == newer.project_name, Build.line == newer.line, Build.finished_ms.is_(None))
        .where(Build.number < newer.number)
        .order_by(Build.id)
        .with_for_update()
    )
    for build in session.scalars(older):
        if build.superseded_by is None:
            build.superseded_by = newer.id
        _wish_stop(session, build)


def _wish_stop(session: Session, build: Build) -> None:
    """A queued build ends at once, a held one when its worker next renews."""
    if build.cancel_requested_ms is None:
        build.cancel_requested_ms = session.execute(sa.select(now_ms())).scalar_one()
        session.flush()
    if build.state == BuildState.QUEUED:
        apply(
            session,
            build,
            BuildEvent.STOPPED,
            reason=Reason.CANCELLED,
            message=stopped_message(build, "stopped before it started"),
        )


def stopped_message(build: Build, otherwise: str = "stopped on request") -> str:
    """Why a build was stopped."""
    return f"superseded by {build.superseded_by}" if build.superseded_by else otherwise


def held(
    session: Session, build_id: str, attempt_no: int, token_hash: str, *, finished_with: str | None = None
) -> tuple[Build, Attempt]:
    """The build and attempt that this token may write to, locked until the commit.

    Raises AttemptFenced where the attempt is over or was never this one; `finished_with` lets the very report that ended it pass.
    """
    if not 0 < attempt_no < 2**31 or "\x00" in build_id:
        raise AttemptFenced("there is no such attempt")
    build = session.get(Build, build_id, with_for_update=True)
    attempt = session.get(Attempt, (build_id, attempt_no))
    if build is None or attempt is None or attempt.token_hash != token_hash:
        raise AttemptFenced(f"attempt {attempt_no} of {build_id} is not held with this token")
    if finished_with is not None and attempt.report_sha256 == finished_with:
        return build, attempt
    if build.attempt_no != attempt_no or attempt.ended_ms is not None or BuildState(build.state) not in HELD:
        raise AttemptFenced(f"attempt {attempt_no} of {build_id} is over: the build is {build.state}, attempt {build.attempt_no}")
    return build, attempt


def forget_log(session: Session, build_id: str, attempt_no: int) -> None:
    """Drop the chunks of a log that now lies in the object store."""
    session.execute(sa.delete(LogChunk).where(LogChunk.build_id == build_id, LogChunk.attempt_no == attempt_no))


def _log_after_commit(session: Session, event: str, facts: dict[str, object]) -> None:
    def tell(_session: Session) -> None:
        log.info(event, **facts)

    sa.event.listen(session, "after_commit", tell, once=True)
