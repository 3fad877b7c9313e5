"""Sends what git servers are to be told (`scheduler.notices`): of each topic the newest, until it is known to have arrived.

A server that is away is asked again after 2, 4, 8 s and so on, two minutes at most, for a day. What it refuses is not sent again.
Sending twice is harmless, and happens where an answer is lost.
"""

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import Unavailable
from millrace.failpoints import failpoint
from millrace.log import get_logger
from millrace.project import BuildSettings
from millrace.settings import Settings
from millrace.vocabulary import BuildState
from scheduler import notices
from scheduler.db import Database, now_ms
from scheduler.door import Credentials, Door
from scheduler.models import Build, Notice
from scheduler.notices import Outcome
from scheduler.providers import TELL, Access, Later, Place, Refused, Report, Rest, place_of

log = get_logger(__name__)
_ROUND: Final = 500
_AT_ONCE: Final = 8
_FAILURES: Final = 3
"""After so many failures a server is left alone for this round, so that its silence takes little time."""
_REST_MS: Final = 30_000
"""And what else is to be sent there is not tried for so long."""
_MAX_WAIT_MS: Final = 120_000
_MAX_PAUSE_MS: Final = 3_600_000
GIVE_UP_MS: Final = 24 * 3_600_000


@dataclass(frozen=True, kw_only=True)
class _Word:
    """A notice that is to be sent, with what is known of its build."""

    notice: Notice
    build: Build
    wanted: BuildSettings
    place: Place


class Messenger:
    """Tells git servers, each from a thread of its own; used by one thread. `clock` is the database's, or a test's."""

    def __init__(
        self, db: Database, settings: Settings, credentials: Credentials, *, clock: Callable[[], int] | None = None
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._door = Door(settings, credentials)
        self._pauses: dict[tuple[str, str], int] = {}

    def due(self) -> bool:
        """True where something waits that `run` would try."""
        with self._db.reading() as session:
            return session.scalar(sa.select(self._waiting(self._now(session)).exists())) is True

    def run(self, stop: threading.Event | None = None) -> int:
        """Send what is due, until `stop`; how much arrived. Raises Unavailable where the database is away."""
        stop = stop or threading.Event()
        by_host: dict[str, list[_Word]] = defaultdict(list)
        for word in self._words():
            by_host[word.place.origin].append(word)
        if not by_host:
            return 0
        with ThreadPoolExecutor(min(_AT_ONCE, len(by_host)), thread_name_prefix="messenger") as pool:
            return sum(pool.map(lambda words: self._tell_all(words, stop), by_host.values()))

    def _now(self, session: Session) -> int:
        return self._clock() if self._clock is not None else session.execute(sa.select(now_ms())).scalar_one()

    @staticmethod
    def _waiting(now: int) -> sa.Select[tuple[str]]:
        return sa.select(Notice.topic).where(sa.text("settled_ms IS NULL"), Notice.due_ms <= now)

    def _words(self) -> list[_Word]:
        """The newest of each topic, oldest topics first; what it overtook is settled."""
        found, hopeless = [], []
        with self._db.reading() as session:
            now = self._now(session)
            topics = session.scalars(
                self._waiting(now).group_by(Notice.topic).order_by(sa.func.min(Notice.id)).limit(_ROUND)
            ).all()
            newest = [row for row in (_newest(session, topic) for topic in topics) if row is not None]
            for row in newest:
                build = session.get(Build, row.build_id)
                if row.settled_ms is not None or row.due_ms > now or build is None:
                    continue
                try:
                    wanted = BuildSettings.model_validate(build.settings)
                    found.append(_Word(notice=row, build=build, wanted=wanted, place=place_of(wanted.source)))
                except ValidationError:
                    hopeless.append((row, "the build's record cannot be read"))
                except Refused as refusal:
                    hopeless.append((row, refusal.why))
        for row in newest:
            if row.settled_ms is not None or row.due_ms > now:
                self._settle_older(row)
        for row, why in hopeless:
            self._note(row, Outcome.REFUSED, why)
        return found

    def _settle_older(self, newest: Notice) -> None:
        def work(session: Session) -> None:
            _overtake(session, newest, self._now(session))

        self._db.run(work)

    def _tell_all(self, words: Sequence[_Word], stop: threading.Event) -> int:
        """One server's, one after another, as GitHub asks for."""
        told = failures = 0
        rests: dict[Access, Rest] = {}
        try:
            for place, word in enumerate(words):
                if stop.is_set():
                    break
                if failures >= _FAILURES:
                    self._hold(words[place:], self._read_clock() + _REST_MS, "the server fails for others, too")
                    break
                try:
                    access = self._door.access(word.build.project_name, word.wanted.source)
                    paused_until = self._pauses.get((word.place.origin, access.token), 0)
                    if paused_until > self._read_clock():
                        self._hold([word], paused_until, "the server asked for a pause")
                        continue
                    if access not in rests:
                        rests[access] = self._door.ask(access)
                    known_as = self._tell(rests[access], word)
                except Refused as refusal:
                    self._note(word.notice, Outcome.REFUSED, refusal.why)
                except Later as problem:
                    failures += problem.wait_s is None
                    self._postpone(word, problem)
                except Unavailable:
                    raise
                except Exception as error:  # whatever it is: it must hold up no other
                    log.exception("notice.failed", build_id=word.build.id)
                    self._postpone(word, Later(f"it could not be sent: {type(error).__name__}"))
                else:
                    self._note(word.notice, Outcome.SENT, "", known_as=known_as)
                    told += 1
        finally:
            for rest in rests.values():
                rest.close()
        return told

    def _hold(self, words: Sequence[_Word], until_ms: int, why: str) -> None:
        """Try these no sooner; that they were not tried now is no try."""

        def work(session: Session) -> None:
            mine = sa.update(Notice).where(Notice.id.in_([word.notice.id for word in words]), Notice.settled_ms.is_(None))
            session.execute(mine.values(due_ms=until_ms, why=why))

        self._db.run(work)

    def _read_clock(self) -> int:
        with self._db.reading() as session:
            return self._now(session)

    def _tell(self, rest: Rest, word: _Word) -> str | None:
        report = self._report(word)
        try:
            failpoint("notice.send.before", OSError)
            try:
                return TELL[word.wanted.source.type](rest, report)
            except Later as problem:
                if problem.wait_s is not None:  # nothing goes there with this token until then
                    pause_ms = int(min(_MAX_PAUSE_MS, problem.wait_s * 1000))
                    self._pauses[word.place.origin, rest.access.token] = self._read_clock() + pause_ms
                raise
            finally:
                failpoint("notice.send.after", OSError)
        except OSError as error:
            raise Later(f"it could not be sent: {error}") from error

    def _report(self, word: _Word) -> Report:
        settings, build = self._settings, word.build
        link = f"{settings.public}/v1/builds/{quote(build.id, safe=':')}"
        config = word.wanted.source.build_status_config
        variables: Mapping[str, str] = {}
        if config is not None:
            variables = notices.variables(word.wanted, build, region=settings.region, account=settings.account_id, link=link)
        context = notices.expand((config.context if config else None) or "", variables)
        with self._db.reading() as session:
            known_as = _known_as(session, word.notice)
        state = BuildState(word.notice.state)
        return Report(
            place=word.place,
            state=state,
            commit=word.notice.commit_id,
            context=context or f"AWS CodeBuild {settings.region} ({build.project_name})",
            description=notices.describe(state, build.project_name),
            url=notices.expand((config.target_url if config else None) or "", variables) or link,
            build_id=build.id,
            known_as=known_as,
        )

    def _postpone(self, word: _Word, problem: Later) -> None:
        """Try again later, each time after longer."""
        notice, now = word.notice, self._read_clock()
        if now - notice.created_ms > GIVE_UP_MS:
            self._note(notice, Outcome.GIVEN_UP, problem.why)
            return
        tries = notice.tries + 1
        wait_ms = min(_MAX_WAIT_MS, 1000 * 2 ** min(tries, 10)) * random.uniform(0.5, 1)  # noqa: S311  # jitter, not a secret
        if problem.wait_s is not None:
            wait_ms += min(_MAX_PAUSE_MS, problem.wait_s * 1000)

        def work(session: Session) -> None:
            later = sa.update(Notice).where(Notice.id == notice.id, Notice.settled_ms.is_(None))
            session.execute(later.values(tries=tries, due_ms=now + int(wait_ms), why=problem.why))
            _overtake(session, notice, now)

        self._db.run(work)
        log.info("notice.postponed", build_id=notice.build_id, state=notice.state, tries=tries, why=problem.why)

    def _note(self, notice: Notice, outcome: Outcome, why: str, *, known_as: str | None = None) -> None:
        def work(session: Session) -> None:
            now = self._now(session)
            session.execute(
                sa.update(Notice)
                .where(Notice.id == notice.id, Notice.settled_ms.is_(None))
                .values(tries=Notice.tries + 1, settled_ms=now, outcome=outcome.value, why=why, known_as=known_as)
            )
            _overtake(session, notice, now)
            newest = _newest(session, notice.topic)
            if newest is not None and newest.id != notice.id and newest.outcome == Outcome.SENT and outcome is Outcome.SENT:
                # Another scheduler told the newer word while we told this one: it is said again, and so stands last.
                newest.settled_ms, newest.outcome, newest.due_ms = None, None, now

        self._db.run(work)
        if outcome is Outcome.SENT:
            log.info("notice.sent", build_id=notice.build_id, state=notice.state)
        else:
            log.warning("notice.not_sent", build_id=notice.build_id, state=notice.state, outcome=outcome.value, why=why)


def _newest(session: Session, topic: str) -> Notice | None:
    newest = sa.select(Notice).where(Notice.topic == topic).order_by(Notice.asked_ms.desc(), Notice.id.desc())
    return session.scalar(newest.limit(1))


def _known_as(session: Session, notice: Notice) -> str | None:
    """What the server called the status of this build when it was told last."""
    last = sa.select(Notice.known_as).where(
        Notice.topic == notice.topic, Notice.build_id == notice.build_id, Notice.known_as.is_not(None)
    )
    return session.scalar(last.order_by(Notice.id.desc()).limit(1))


def _overtake(session: Session, than: Notice, now: int) -> None:
    """Settle what waits of the topic and is older."""
    older = sa.or_(Notice.asked_ms < than.asked_ms, sa.and_(Notice.asked_ms == than.asked_ms, Notice.id < than.id))
    session.execute(
        sa.update(Notice)
        .where(Notice.topic == than.topic, Notice.settled_ms.is_(None), older)
        .values(settled_ms=now, outcome=Outcome.SUPERSEDED.value)
        .execution_options(synchronize_session=False)
    )
