"""Webhooks: a project's address and secret at its git server, and what became of each delivery.

A delivery's row, the build that it starts and the build's bell come in one commit. The same delivery starts nothing twice, nor
does the same event under another id, as the ids of most git servers are not signed.
"""

import base64
import hashlib
import json
import re
import secrets as randomness
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import AlreadyExists, Conflict, InvalidInput, NotFound, RequestError, Unavailable
from millrace.log import get_logger
from millrace.project import BuildOverrides, ProjectFleet, ProjectSettings, WebhookCause
from millrace.secrets.keyring import Keyring, WrongKey
from millrace.settings import Settings
from millrace.webhook import PROVIDERS, EventKind, Heard, Provider, SourceEvent, WebhookSettings, Wish
from scheduler import approvers, filters, inbox, order
from scheduler.db import Database, now_ms
from scheduler.inbox import ACCEPTED, Arrival
from scheduler.intake import BuildRequest, queue
from scheduler.models import Delivery, Project, Webhook
from scheduler.secrets import Keys

log = get_logger(__name__)
OVERLAP_MS: Final = 24 * 3_600_000
"""How long the old secret holds beside a new one, where nothing else is said."""
KEPT_S: Final = 1.0
"""How long a change of a webhook may take to reach all processes of the API."""
_MOST_KEPT: Final = 1000
APPROVED_BY: Final = "approved by "
_SKIP: Final = re.compile(r"\[(?:skip ci|ci skip|no ci|skip actions|actions skip)\]|\*\*\*NO_CI\*\*\*", re.IGNORECASE)
_SKIP_TRAILER: Final = re.compile(r"^skip-checks:\s*true\s*$", re.IGNORECASE | re.MULTILINE)


class Outcome(StrEnum):
    """What became of an event. APPROVAL: it waits for somebody to approve it; CHECKING: it is a comment that approves, if who
    wrote it may (`scheduler.wishes`); REFUSED: it was to start a build, and could not; ACCEPTED: it is noted, to be acted on.
    """

    BUILD = "build"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"
    APPROVAL = "approval"
    CHECKING = "checking"
    REFUSED = "refused"
    PING = "ping"
    ACCEPTED = ACCEPTED


SETTLED: Final = frozenset({Outcome.BUILD, Outcome.APPROVAL, Outcome.CHECKING})
"""What a delivery that comes again does not change. One that started nothing is judged anew, as filters may have been mended."""


@dataclass(frozen=True, kw_only=True)
class HookRecord:
    """A webhook as it may be shown: everything but its secrets."""

    id: str
    project: str
    provider: Provider
    settings: WebhookSettings
    repository_id: str | None
    provider_hook_id: str | None
    created_ms: int
    modified_ms: int
    secret_ms: int
    previous_until_ms: int


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A webhook as a delivery is checked against it. `secrets` are those that hold now."""

    record: HookRecord
    secrets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one event of a delivery. `fleet` is set where a build was queued just now."""

    outcome: Outcome
    what: str
    why: str
    ref: str | None = None
    commit: str | None = None
    build_id: str | None = None
    fleet: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeliveryRecord:
    """A row of what came."""

    id: int
    delivery_id: str
    received_ms: int
    result: Result


def create(
    db: Database, keys: Keys, project: str, wanted: WebhookSettings, *, repository_id: str | None = None
) -> tuple[HookRecord, str]:
    """Make the project's webhook; with the secret, which is never shown again.

    Raises NotFound, AlreadyExists, InvalidInput for filters and for sources that have no webhooks, Unavailable for the keys.
    """
    filters.check(wanted)
    approvers.check(wanted.pull_request_build_policy)
    secret, ident = _new_secret(), randomness.token_urlsafe(24)
    sealed = keys(True).seal(secret, _context(ident))

    def work(session: Session) -> HookRecord:
        row = _project(session, project)
        source = ProjectSettings.model_validate(row.settings).source
        provider = PROVIDERS.get(source.type)
        if provider is None:
            raise InvalidInput(f"a source of type {source.type} has no webhooks", hint="They are for sources that git fetches.")
        if session.scalar(sa.select(Webhook.id).where(Webhook.project_name == project)) is not None:
            raise AlreadyExists(
                f"project {project} has a webhook already", hint="Change it ('millrace webhook update'), or delete it first."
            )
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        hook = Webhook(
            id=ident,
            project_name=project,
            provider=provider.value,
            settings=wanted.model_dump(mode="json", by_alias=True, exclude_none=True),
            sealed=sealed,
            previous_until_ms=0,
            repository_id=repository_id,
            created_ms=now,
            modified_ms=now,
            secret_ms=now,
        )
        session.add(hook)
        session.flush()
        return record_of(hook)

    record = db.run(work)
    log.info("webhook.created", project=project, provider=record.provider.value)
    return record, secret


def get(db: Database, project: str) -> HookRecord:
    """The project's webhook. Raises NotFound."""
    with db.reading() as session:
        _project(session, project, lock=False)
        return record_of(_of_project(session, project, lock=False))


def update(db: Database, project: str, changes: WebhookSettings) -> HookRecord:
    """Replace what starts builds. Raises NotFound, InvalidInput."""
    filters.check(changes)
    approvers.check(changes.pull_request_build_policy)

    def work(session: Session) -> HookRecord:
        row = _of_project(session, project)
        row.settings = changes.model_dump(mode="json", by_alias=True, exclude_none=True)
        row.modified_ms = session.execute(sa.select(now_ms())).scalar_one()
        return record_of(row)

    return db.run(work)


def set_provider_hook(db: Database, project: str, ident: str) -> HookRecord:
    """Note what the git server calls the project's webhook. Raises NotFound."""

    def work(session: Session) -> HookRecord:
        row = _of_project(session, project)
        if row.provider_hook_id != ident:
            row.provider_hook_id, row.modified_ms = ident, session.execute(sa.select(now_ms())).scalar_one()
        return record_of(row)

    return db.run(work)


def rotate(db: Database, keys: Keys, project: str, *, overlap_ms: int = OVERLAP_MS) -> tuple[HookRecord, str]:
    """A new secret; the old one holds for `overlap_ms` more. Of two that were replaced, the older one ends now."""
    secret, ring = _new_secret(), keys(True)

    def work(session: Session) -> HookRecord:
        row = _of_project(session, project)
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row.previous, row.sealed = row.sealed, ring.seal(secret, _context(row.id))
        row.previous_until_ms, row.secret_ms, row.modified_ms = now + overlap_ms, now, now
        if not overlap_ms:
            row.previous = None
        return record_of(row)

    record = db.run(work)
    log.info("webhook.rotated", project=project)
    return record, secret


def delete(db: Database, project: str) -> None:
    """Remove the project's webhook; what it was told stays. Raises NotFound."""
    db.run(lambda session: session.delete(_of_project(session, project)))
    log.info("webhook.deleted", project=project)


class OpenHooks:
    """Webhooks with their secrets, as deliveries are checked against them; kept for a moment, as deliveries come in bursts."""

    def __init__(self, db: Database, keys: Keys) -> None:
        self._db, self._keys = db, keys
        self._kept: dict[str, tuple[float, Hook]] = {}

    def get(self, provider: Provider, ident: str) -> Hook:
        """The webhook of an address. Raises NotFound, Unavailable where no key opens its secrets."""
        kept_s, hook = self._kept.get(ident, (0.0, None))
        if hook is None or time.monotonic() - kept_s > KEPT_S:
            hook = self._open(ident)
            if len(self._kept) >= _MOST_KEPT:
                self.forget()
            self._kept[ident] = (time.monotonic(), hook)
        if hook.record.provider is not provider:
            raise _no_hook()
        return hook

    def forget(self) -> None:
        """One was changed."""
        self._kept.clear()

    def _open(self, ident: str) -> Hook:
        with self._db.reading() as session:
            found = None if "\x00" in ident else session.execute(sa.select(Webhook, now_ms()).where(Webhook.id == ident)).first()
        if found is None:
            raise _no_hook()
        row, now = found
        sealed = [row.sealed] + ([row.previous] if row.previous is not None and now < row.previous_until_ms else [])
        ring = self._keys(False)
        return Hook(record=record_of(row), secrets=tuple(_unsealed(ring, one, row) for one in sealed))


def _no_hook() -> NotFound:
    return NotFound("there is no webhook of this address", hint="'millrace webhook show PROJECT' says the address.")


def receive(
    db: Database, hook: HookRecord, heard: Heard, *, delivery_id: str, initiator: str, settings: Settings
) -> Sequence[Result]:
    """Note what came, and queue what it starts, in one commit; where something of this webhook still waits, line up behind it."""
    arrival = Arrival(webhook_id=hook.id, project=hook.project, heard=heard, delivery_id=delivery_id, initiator=initiator)

    def work(session: Session) -> Sequence[Result]:
        if not heard.ping and inbox.waits(session, hook.id):
            inbox.note(session, [arrival])
            return [accepted(arrival)]
        return settle(session, hook, arrival, settings)

    try:
        results = db.run(work)
    except sa.exc.IntegrityError:  # the same came twice at once: the other was first, and is found now
        results = db.run(work)
    tell(hook.project, results)
    return results


def settle(session: Session, hook: HookRecord, arrival: Arrival, settings: Settings) -> Sequence[Result]:
    """Note what became of each event of a delivery, and queue what it starts."""
    heard = arrival.heard
    stranger = _other_repository(session, hook, heard)
    taking = _Taking(session, hook, heard, arrival.delivery_id, arrival.initiator, settings)
    if heard.wish is not None and stranger is None:
        return [taking.wish(heard.wish)]
    if not heard.events:
        silent = (
            (Outcome.PING, stranger or "the git server reaches us")
            if heard.ping
            else (Outcome.IGNORED, heard.why or stranger or "")
        )
        return [taking.take(0, None, *silent)]
    if stranger is not None:
        return [taking.take(part, event, Outcome.IGNORED, stranger) for part, event in enumerate(heard.events)]
    return [taking.take(part, event, *_judged(hook.settings, event)) for part, event in enumerate(heard.events)]


def accepted(arrival: Arrival) -> Result:
    """What is said of a delivery that is only noted so far."""
    return Result(outcome=Outcome.ACCEPTED, what=arrival.what, why=inbox.WHY, ref=arrival.ref, commit=arrival.commit)


def tell(project: str, results: Sequence[Result]) -> None:
    """A line in the farm's log for each event."""
    for one in results:
        log.info("webhook.delivery", project=project, what=one.what, outcome=one.outcome.value, build_id=one.build_id)


def _waiting(row: Webhook, commit: str, pull_request: int | None) -> sa.Select[tuple[Delivery]]:
    """The newest pull request of a webhook that waits at this commit, of which Bitbucket Cloud told the beginning."""
    told = {commit} | ({commit[:12]} if row.provider == Provider.BITBUCKET else set())
    those = sa.select(Delivery).where(
        Delivery.webhook_id == row.id,
        Delivery.outcome == Outcome.APPROVAL.value,
        Delivery.commit_id.in_(told),
        Delivery.event.is_not(None),
    )
    if pull_request is not None:
        those = those.where(Delivery.ref == f"pr/{pull_request}")
    return those.order_by(Delivery.id.desc()).limit(1)


def waits(db: Database, project: str, commit: str, *, pull_request: int) -> bool:
    """Whether this pull request waits for approval at this very commit."""
    with db.reading() as session:
        row = session.scalar(sa.select(Webhook).where(Webhook.project_name == project))
        return row is not None and session.scalar(_waiting(row, commit, pull_request)) is not None


def approve(
    db: Database,
    project: str,
    commit: str,
    *,
    by: str,
    settings: Settings,
    pull_request: int | None = None,
    also: Callable[[Session, Result], None] | None = None,
) -> Result:
    """Start the build of the pull request that waits at this very commit, and in the same commit do what `also` does.

    Where the server told us the beginning of its commit alone (Bitbucket Cloud), what is built is `commit` as it is given here.
    Raises NotFound where none waits there, Conflict where it has moved on since, and as `intake.submit` does.
    """

    def work(session: Session) -> Result:
        row = _of_project(session, project)
        waiting = session.scalar(_waiting(row, commit, pull_request))
        if waiting is None:
            which = "pull request" if pull_request is None else f"pull request {pull_request}"
            raise NotFound(
                f"no {which} of {project} waits for approval at commit {commit[:100]!r}",
                hint=f"'millrace webhook deliveries {project}' shows those that wait, with their whole commits.",
            )
        now_at = session.scalar(commit_of(waiting))
        if now_at != waiting.commit_id:
            raise Conflict(
                f"{waiting.ref} is at {now_at} by now, and no longer at {commit}",
                hint="Look at what is new, and approve that commit.",
            )
        event = replace(kept_event(waiting.event or {}), commit=commit)
        build = queue(session, _request(record_of(row), event, by[:200]), settings)
        waiting.outcome, waiting.why = Outcome.BUILD.value, f"{APPROVED_BY}{by}"
        waiting.build_id, waiting.event = build.id, None
        others = sa.update(Delivery).where(
            Delivery.webhook_id == row.id,
            Delivery.outcome == Outcome.APPROVAL.value,
            Delivery.ref == waiting.ref,
            Delivery.commit_id == waiting.commit_id,
            Delivery.id != waiting.id,
        )
        why = f"the same commit was approved as {waiting.what}"
        session.execute(others.values(outcome=Outcome.DUPLICATE.value, why=why, build_id=build.id, event=None))
        session.flush()
        result = _result(waiting, fleet=build.fleet)
        if also is not None:
            also(session, result)
        return result

    result = db.run(work)
    log.info("webhook.approved", project=project, commit=commit, by=by, build_id=result.build_id)
    return result


def commit_of(waiting: Delivery) -> sa.Select[tuple[str | None]]:
    """Where the pull request of `waiting` is by now: an older event may have come after a newer one."""
    of_request = sa.select(Delivery.commit_id).where(
        Delivery.webhook_id == waiting.webhook_id, Delivery.ref == waiting.ref, Delivery.commit_id.is_not(None)
    )
    return of_request.order_by(sa.func.coalesce(Delivery.stamp, "").desc(), Delivery.id.desc()).limit(1)


def kept_event(kept: dict[str, Any]) -> SourceEvent:
    """An event as it was kept with its delivery."""
    known = {name: value for name, value in kept.items() if name in SourceEvent.__dataclass_fields__}
    return SourceEvent(**{**known, "kind": EventKind(known["kind"]), "clone_urls": tuple(known.get("clone_urls", ()))})


def judge(hook: HookRecord, heard: Heard) -> list[tuple[SourceEvent, filters.Decision, Result]]:
    """What a delivery would do, and why, by its filters; nothing is noted, and nothing looked up."""
    judged = []
    for event in heard.events:
        decision = filters.decide(hook.settings, event)
        outcome, why = _judged(hook.settings, event)
        judged.append(
            (event, decision, Result(outcome=outcome, what=event.kind.value, why=why, ref=event.ref, commit=event.commit))
        )
    return judged


def deliveries(
    db: Database, project: str, *, limit: int, before: int | None = None
) -> tuple[Sequence[DeliveryRecord], int | None]:
    """What came for the project, newest first, from before the row `before`; and where to go on, or None."""
    query = sa.select(Delivery).where(Delivery.project_name == project).order_by(Delivery.id.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(Delivery.id < before)
    with db.reading() as session:
        _project(session, project, lock=False)
        rows = session.scalars(query).all()
    found = [
        DeliveryRecord(id=row.id, delivery_id=row.delivery_id, received_ms=row.received_ms, result=_result(row))
        for row in rows[:limit]
    ]
    return found, rows[limit - 1].id if len(rows) > limit else None


def reseal(db: Database, keys: Keys) -> tuple[int, list[str]]:
    """Seal with the first key what another one sealed: how many webhooks there were, and why others could not be read."""
    with db.reading() as session:
        rows = session.scalars(sa.select(Webhook)).all()
    done, failed = 0, []
    for row in rows:
        ring = keys(False)
        old = {
            name: one for name in ("sealed", "previous") if (one := getattr(row, name)) is not None and not ring.is_of_first(one)
        }
        if not old:
            continue
        try:
            new = {name: ring.seal(_unsealed(ring, one, row), _context(row.id)) for name, one in old.items()}
        except Unavailable as error:
            failed.append(error.message)
            continue

        def work(session: Session, row: Webhook = row, new: dict[str, bytes] = new) -> None:
            session.execute(sa.update(Webhook).where(Webhook.id == row.id, Webhook.sealed == row.sealed).values(**new))

        db.run(work)
        done += 1
    return done, failed


@dataclass(frozen=True)
class _Taking:
    """One delivery on its way into the records."""

    session: Session
    hook: HookRecord
    heard: Heard
    delivery_id: str
    initiator: str
    settings: Settings

    def take(self, part: int, event: SourceEvent | None, outcome: Outcome, why: str) -> Result:
        """Do what was judged, unless the same was done before, and note what became of it."""
        same = _same(event) if event is not None else ""
        old, earlier = self._before(part, event, same)
        if old is not None and Outcome(old.outcome) in SETTLED:
            return _result(old, outcome=Outcome.DUPLICATE, why=f"this delivery came before: {old.why}")
        if event is None or outcome not in SETTLED:
            return self._note(part, event, old, outcome, why)
        if earlier is not None:
            why = f"the same was told by delivery {earlier.delivery_id}"
            return self._note(part, event, old, Outcome.DUPLICATE, why, build_id=earlier.build_id)
        if outcome is not Outcome.BUILD:
            return self._note(part, event, old, outcome, why, same=same)
        if (late := self._superseded(event)) is not None:
            why = f"superseded: {event.place} was built as it was later, {late.commit_id}"
            return self._note(part, event, old, Outcome.IGNORED, why, same=same, build_id=late.build_id)
        try:
            build = queue(self.session, _request(self.hook, event, self.initiator), self.settings)
        except (RequestError, ValidationError) as error:  # before anything was changed
            said = error.message if isinstance(error, RequestError) else "; ".join(one["msg"] for one in error.errors())
            return self._note(part, event, old, Outcome.REFUSED, f"no build could be queued: {said}")
        noted = self._note(part, event, old, outcome, why, same=same, build_id=build.id, at_ms=build.submitted_ms)
        return replace(noted, fleet=build.fleet)

    def _superseded(self, event: SourceEvent) -> Delivery | None:
        """Who started a newer build, where newer ones are to stop older ones: this one would only stop it."""
        project = self.session.get(Project, self.hook.project)
        if project is None or not project.cancel_superseded:
            return None
        return order.newer(self.session, self.hook.id, event)

    def wish(self, wish: Wish) -> Result:
        """Note a comment that approves, to be checked behind this; the same comment counts once, however often it is told."""
        same = hashlib.sha256(json.dumps(["comment", wish.comment_id]).encode()).hexdigest()
        ways = sa.or_(Delivery.delivery_id == self.delivery_id, Delivery.same == same)
        mine = sa.select(Delivery).where(Delivery.webhook_id == self.hook.id, Delivery.part == 0)
        rows = self.session.scalars(mine.where(ways)).all()
        old = next((row for row in rows if row.same == same), rows[0] if rows else None)
        if old is not None and Outcome(old.outcome) in SETTLED:
            return _result(old, outcome=Outcome.DUPLICATE, why=f"this comment came before: {old.why}")
        why = f"whether {wish.person} may approve {wish.commit} is being looked up"
        self._note(0, None, old, Outcome.CHECKING, why, same=same)
        row = self.session.scalars(sa.select(Delivery).where(Delivery.webhook_id == self.hook.id, Delivery.same == same)).one()
        row.ref, row.event = (
            f"pr/{wish.pull_request}",
            {"wish": asdict(wish), "due_ms": 0, "tries": 0, "since_ms": row.received_ms},
        )
        self.session.flush()
        return _result(row)

    def _before(self, part: int, event: SourceEvent | None, same: str) -> tuple[Delivery | None, Delivery | None]:
        """What is noted of this part of this delivery; and of the same event under another id. A push is the same, too, where
        the last one to its branch was to the very commit.
        """
        mine = Delivery.webhook_id == self.hook.id
        ways = [sa.and_(mine, Delivery.delivery_id == self.delivery_id)]
        if event is not None:
            ways.append(sa.and_(mine, Delivery.same == same))
        if event is not None and event.kind is EventKind.PUSH:
            pushes = sa.select(Delivery.id).where(mine, Delivery.ref == event.ref, Delivery.what == event.kind.value)
            last = pushes.where(Delivery.same.is_not(None)).order_by(Delivery.id.desc()).limit(1)
            ways.append(Delivery.id == last.scalar_subquery())
        old = earlier = None
        for row in self.session.scalars(sa.select(Delivery).where(sa.or_(*ways))):
            if (row.delivery_id, row.part) == (self.delivery_id, part):
                old = row
            elif event is not None and (row.same == same or (row.ref, row.commit_id) == (event.ref, event.commit)):
                earlier = row if row.same is not None else earlier
        return old, earlier

    def _note(
        self,
        part: int,
        event: SourceEvent | None,
        old: Delivery | None,
        outcome: Outcome,
        why: str,
        *,
        same: str | None = None,
        build_id: str | None = None,
        at_ms: int | None = None,
    ) -> Result:
        """The row of one event."""
        row = old or Delivery(webhook_id=self.hook.id, project_name=self.hook.project, delivery_id=self.delivery_id, part=part)
        row.received_ms = at_ms if at_ms is not None else self.session.execute(sa.select(now_ms())).scalar_one()
        row.what = (event.kind.value if event else self.heard.what)[:100]
        row.same, row.outcome, row.why, row.build_id = same, outcome.value, why, build_id
        row.ref, row.commit_id = (event.place, event.commit) if event else (None, None)
        row.stamp = event.stamp[:100] if event else None
        row.event = {**asdict(event), "paths": None} if event and outcome is Outcome.APPROVAL else None
        if old is None:
            self.session.add(row)
        self.session.flush()
        return _result(row)


def _judged(settings: WebhookSettings, event: SourceEvent) -> tuple[Outcome, str]:
    """What an event does by itself, whatever came before."""
    if event.kind is EventKind.WORKFLOW_JOB_QUEUED:
        return Outcome.IGNORED, "a job waits for a runner, and this farm starts no runners yet"
    decision = filters.decide(settings, event)
    if not decision.matched:
        return Outcome.IGNORED, decision.says
    if event.fork_gone:
        return Outcome.IGNORED, "the fork that the pull request comes from is gone"
    if skips(event):
        return Outcome.IGNORED, "its message says that nothing is to be built ([skip ci])"
    policy = settings.pull_request_build_policy.requires_comment_approval
    if event.pull_request is not None and policy == "ALL_PULL_REQUESTS":
        return Outcome.APPROVAL, "pull requests of this project wait for approval"
    if event.from_fork and policy != "DISABLED":
        return Outcome.APPROVAL, "it comes from a fork, and waits for approval"
    return Outcome.BUILD, decision.says


def skips(event: SourceEvent) -> bool:
    """True where a commit's message, or a pull request's title, says that nothing is to be built."""
    if event.tag is not None:
        return False
    return any(text and (_SKIP.search(text) or _SKIP_TRAILER.search(text)) for text in (event.message, event.title))


def _request(hook: HookRecord, event: SourceEvent, initiator: str) -> BuildRequest:
    version = f"pr/{event.pull_request}" if event.pull_request is not None else event.ref if event.tag else event.commit
    cause = WebhookCause(
        provider=hook.provider.value,
        event=event.kind.value,
        trigger=event.trigger,
        head_ref=event.ref,
        base_ref=event.base_ref,
        commit=event.commit,
        prev_commit=event.before if event.kind is EventKind.PUSH else None,
        merge_commit=event.merge_commit,
        actor_account_id=event.actor_id,
        pull_request=event.pull_request,
        from_fork=event.from_fork,
        buildspec_ref=event.base_ref if event.from_fork and hook.settings.millrace.fork_buildspec == "base" else None,
    )
    fleet = hook.settings.millrace.fork_fleet if event.from_fork else None
    overrides = BuildOverrides(
        project_name=hook.project,
        source_version=version,
        fleet_override=ProjectFleet(fleet_arn=fleet) if fleet is not None else None,
    )
    return BuildRequest(overrides=overrides, initiator=initiator, cause=cause, commit=event.commit, line=event.line)


def _same(event: SourceEvent) -> str:
    parts = [event.kind.value, event.place, event.commit, event.stamp]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _other_repository(session: Session, hook: HookRecord, heard: Heard) -> str | None:
    """Why a delivery is about another repository than the project's; the first that is not teaches us the repository's id."""
    if heard.looked_up or hook.provider is Provider.GIT or (heard.ping and heard.repository_id is None):
        return None
    if heard.repository_id is None:
        return "it names no repository"
    known = hook.repository_id
    if known is None:
        row = session.get(Webhook, hook.id, with_for_update=True)
        project = session.get(Project, hook.project)
        if row is None or project is None:
            raise _no_hook()
        location = ProjectSettings.model_validate(project.settings).source.location or ""
        if row.repository_id is None and heard.clone_urls and _place(location) not in {_place(url) for url in heard.clone_urls}:
            return f"it is about the repository {heard.repository}, and the project's source is {location}"
        row.repository_id = known = row.repository_id or heard.repository_id
    if heard.repository_id == known:
        return None
    return f"it is about the repository {heard.repository} ({heard.repository_id}), this webhook's is {known}"


def _place(url: str) -> str:
    """Host and path of a clone address, whatever the protocol."""
    if "://" not in url:
        host, _, path = url.partition(":")
        url = f"ssh://{host}/{path}"
    try:
        address = urlsplit(url)
        return f"{address.hostname}/{address.path.strip('/').removesuffix('.git')}".lower()
    except ValueError:
        return url


def _project(session: Session, name: str, *, lock: bool = True) -> Project:
    row = None if "\x00" in name else session.get(Project, name, with_for_update=lock)
    if row is None or row.deleted_ms is not None:
        raise NotFound(f"there is no project {name!r}", hint="POST /v1/projects makes one; GET /v1/projects lists them.")
    return row


def _of_project(session: Session, name: str, *, lock: bool = True) -> Webhook:
    row = None
    if "\x00" not in name:
        mine = sa.select(Webhook).where(Webhook.project_name == name)
        row = session.scalar(mine.with_for_update() if lock else mine)
    if row is None:
        raise NotFound(f"project {name!r} has no webhook", hint="'millrace webhook create' makes one.")
    return row


def _new_secret() -> str:
    """256 random bits, in the form that GitLab takes for its signing token; the others take any."""
    return f"whsec_{base64.b64encode(randomness.token_bytes(32)).decode()}"


def _context(ident: str) -> str:
    return f"webhook\n{ident}"


def _unsealed(ring: Keyring, sealed: bytes, row: Webhook) -> str:
    try:
        return ring.unseal(sealed, _context(row.id))
    except WrongKey as error:
        raise Unavailable(
            f"the secret of the webhook of {row.project_name} cannot be read: {error}",
            hint=f"Add that key to the farm's keys, or make a new secret: millrace webhook rotate {row.project_name}",
        ) from error


def record_of(row: Webhook) -> HookRecord:
    return HookRecord(
        id=row.id,
        project=row.project_name,
        provider=Provider(row.provider),
        settings=WebhookSettings.model_validate(row.settings),
        repository_id=row.repository_id,
        provider_hook_id=row.provider_hook_id,
        created_ms=row.created_ms,
        modified_ms=row.modified_ms,
        secret_ms=row.secret_ms,
        previous_until_ms=row.previous_until_ms if row.previous is not None else 0,
    )


def _result(row: Delivery, *, outcome: Outcome | None = None, why: str | None = None, fleet: str | None = None) -> Result:
    return Result(
        outcome=outcome or Outcome(row.outcome),
        what=row.what,
        why=row.why if why is None else why,
        ref=row.ref,
        commit=row.commit_id,
        build_id=row.build_id,
        fleet=fleet,
    )
