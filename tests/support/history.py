"""A history checker: what a client was told, against what the farm's records say became of it.

`check` is pure. A `RecordingClient` keeps the journal, `read_records` reads the other side.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from millrace.client import Client, build_path
from millrace.errors import MillraceError, Unavailable
from millrace.vocabulary import BuildState
from scheduler.db import Database
from scheduler.models import Artifact, Build, Event
from scheduler.states import TERMINAL

_ORDER = {BuildState.CLAIMED: 1, BuildState.RUNNING: 2, BuildState.FINALIZING: 3, BuildState.QUEUED: 4}
_LAST = 5


@dataclass(frozen=True, kw_only=True)
class Op:
    """One call of a client. `unknown`: no answer came, so that it may have been carried out or not.

    Times are milliseconds since 1970 by the client's clock. `shown` are a read build's artifacts, as SHA-256.
    """

    op: Literal["start", "retry", "stop", "read"]
    outcome: Literal["ok", "fail", "unknown"]
    began_ms: int
    ended_ms: int
    build: str | None = None
    key: str | None = None
    body: str | None = None
    state: str | None = None
    reason: str | None = None
    attempt: int = 0
    shown: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Move:
    """One row of the event log, in its order."""

    build: str
    at_ms: int
    after: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A build as it is at the end. `asked`: a client wanted it; the farm did not make it by itself.

    `visible` are its artifacts: the attempt each is of, and its SHA-256.
    """

    build: str
    state: str
    reason: str | None
    attempt: int
    asked: bool = True
    visible: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A promise that was broken, and how."""

    promise: Literal["lost", "ghost", "ended", "key", "fenced", "backwards", "changed", "stop"]
    build: str | None
    what: str


def check(
    journal: Sequence[Op], records: Iterable[Record], moves: Iterable[Move], *, at_rest: bool = True, skew_ms: int = 50
) -> list[Violation]:
    """What the farm promised and did not keep. `at_rest`: every build should have ended by now.

    `skew_ms`: by how much the client's clock and the database's may differ. The journal must be of all clients there were.
    """
    known = {record.build: record for record in records}
    history: dict[str, list[Move]] = defaultdict(list)
    for move in moves:
        history[move.build].append(move)
    reads: dict[str, list[Op]] = defaultdict(list)
    for op in journal:
        if op.op == "read" and op.outcome == "ok" and op.build is not None:
            reads[op.build].append(op)
    found = [*_lost(journal, known), *_ghosts(journal, known), *_keys(journal)]
    for build, record in known.items():
        found += _ended(record, history[build], at_rest=at_rest)
        found += _fenced(record, reads[build])
        found += _backwards(build, reads[build])
        found += _changed(record, reads[build])
    return [*found, *_stopped(journal, known, history, at_rest=at_rest, skew_ms=skew_ms)]


def _lost(journal: Sequence[Op], known: dict[str, Record]) -> list[Violation]:
    told = {op.build for op in journal if op.outcome == "ok" and op.build is not None}
    return [
        Violation(promise="lost", build=build, what="a client was told of it, and it is not there")
        for build in sorted(told - set(known))
    ]


def _ghosts(journal: Sequence[Op], known: dict[str, Record]) -> list[Violation]:
    """Builds that nobody was told of are as many as there were calls without an answer, at most; those of one key count once."""
    asked = [op for op in journal if op.op in ("start", "retry")]
    told = {op.build for op in asked if op.outcome == "ok"}
    answered = {op.key for op in asked if op.key is not None and op.outcome == "ok"}
    unknown = [op for op in asked if op.outcome == "unknown" and (op.key is None or op.key not in answered)]
    may_be = sum(op.key is None for op in unknown) + len({op.key for op in unknown if op.key is not None})
    untold = sorted(record.build for record in known.values() if record.asked and record.build not in told)
    if len(untold) <= may_be:
        return []
    what = f"{len(untold)} builds that nobody was told of, but {may_be} calls without an answer: {', '.join(untold)}"
    return [Violation(promise="ghost", build=None, what=what)]


def _keys(journal: Sequence[Op]) -> list[Violation]:
    by_key: dict[str, list[Op]] = defaultdict(list)
    for op in journal:
        if op.op in ("start", "retry") and op.outcome == "ok" and op.key is not None:
            by_key[op.key].append(op)
    found = []
    for key, ops in by_key.items():
        builds, bodies = sorted({str(op.build) for op in ops}), {op.body for op in ops}
        if len(builds) > 1:
            found.append(Violation(promise="key", build=builds[0], what=f"key {key} made {', '.join(builds)}"))
        if len(bodies) > 1:
            found.append(Violation(promise="key", build=builds[0], what=f"key {key} was taken with {len(bodies)} requests"))
    return found


def _ended(record: Record, moves: list[Move], *, at_rest: bool) -> list[Violation]:
    def wrong(what: str) -> Violation:
        return Violation(promise="ended", build=record.build, what=what)

    ends = [move for move in moves if move.after in TERMINAL]
    found = []
    if record.state not in TERMINAL:
        if at_rest:
            found.append(wrong(f"it is {record.state} although all is at rest"))
        if ends:
            found.append(wrong(f"it is {record.state}, but was {ends[0].after}"))
        return found
    if len(ends) != 1:
        found.append(wrong(f"it ended {len(ends)} times"))
    elif moves[-1] is not ends[0]:
        found.append(wrong(f"it went on after it was {ends[0].after}"))
    elif ends[0].after != record.state:
        found.append(wrong(f"it is {record.state}, its event says {ends[0].after}"))
    if record.reason is None:
        found.append(wrong("it ended without a reason"))
    return found


def _fenced(record: Record, reads: list[Op]) -> list[Violation]:
    found = [
        Violation(promise="fenced", build=record.build, what=f"an artifact of attempt {attempt} of {record.attempt} is visible")
        for attempt, _sha256 in record.visible
        if attempt != record.attempt
    ]
    final = {sha256 for _attempt, sha256 in record.visible}
    for read in reads:
        if set(read.shown) - final:
            what = f"a client saw artifacts, while it was {read.state}, that are not its own in the end"
            found.append(Violation(promise="fenced", build=record.build, what=what))
    return found


def _rank(read: Op) -> tuple[int, int]:
    """How far a build had come: QUEUED with the number n is after attempt n was lost."""
    return read.attempt, _LAST if read.state in TERMINAL else _ORDER[BuildState(str(read.state))]


def _backwards(build: str, reads: list[Op]) -> list[Violation]:
    """Of two reads, the later one where the first had ended before it began, shows no less."""
    by_end = iter(sorted(reads, key=lambda read: read.ended_ms))
    upcoming = next(by_end, None)
    furthest: Op | None = None
    for read in sorted(reads, key=lambda read: read.began_ms):
        while upcoming is not None and upcoming.ended_ms < read.began_ms:
            furthest = upcoming if furthest is None or _rank(upcoming) > _rank(furthest) else furthest
            upcoming = next(by_end, None)
        if furthest is not None and _rank(read) < _rank(furthest):
            what = f"it was {furthest.state} of attempt {furthest.attempt}, then {read.state} of attempt {read.attempt}"
            return [Violation(promise="backwards", build=build, what=what)]
    return []


def _changed(record: Record, reads: list[Op]) -> list[Violation]:
    for read in reads:
        final = (record.state, record.reason, record.attempt)
        if read.state in TERMINAL and (read.state, read.reason, read.attempt) != final:
            what = f"a client read {read.state} for {read.reason}, and in the end it is {record.state} for {record.reason}"
            return [Violation(promise="changed", build=record.build, what=what)]
    return []


def _stopped(
    journal: Sequence[Op], known: dict[str, Record], history: dict[str, list[Move]], *, at_rest: bool, skew_ms: int
) -> list[Violation]:
    found = []
    for op in journal:
        record = known.get(op.build or "")
        if op.op != "stop" or op.outcome != "ok" or record is None or record.state == BuildState.STOPPED:
            continue
        ends = [move.at_ms for move in history[record.build] if move.after in TERMINAL]
        if ends and ends[0] <= op.ended_ms + skew_ms:
            continue
        if ends or at_rest:
            what = f"a client was told that it stops, and later it became {record.state}"
            found.append(Violation(promise="stop", build=record.build, what=what))
    return found


def read_records(database_url: str) -> tuple[list[Record], list[Move]]:
    """All builds and their event log."""
    database = Database(database_url)
    try:
        with database.reading() as session:
            visible: dict[str, list[tuple[int, str]]] = defaultdict(list)
            for row in session.scalars(sa.select(Artifact)):
                visible[row.build_id].append((row.attempt_no, row.sha256))
            records = [
                Record(
                    build=row.id,
                    state=row.state,
                    reason=row.reason,
                    attempt=row.attempt_no,
                    asked=row.auto_retry_number == 0,
                    visible=tuple(visible[row.id]),
                )
                for row in session.scalars(sa.select(Build))
            ]
            events = session.scalars(sa.select(Event).order_by(Event.id))
            return records, [Move(build=row.build_id, at_ms=row.at_ms, after=row.after) for row in events]
    finally:
        database.dispose()


@dataclass
class RecordingClient:
    """A client that writes down what it asked and was told. A call that failed returns nothing. Safe from several threads."""

    client: Client
    journal: list[Op] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, project: str, key: str | None = None, **overrides: Any) -> str | None:
        """Ask for a build; its id."""
        body = {"projectName": project, **overrides}
        return self._make("start", "/v1/builds", body, key)

    def retry(self, build: str, key: str | None = None) -> str | None:
        """Ask for a build like another; its id."""
        return self._make("retry", f"{build_path(build)}/retry", {}, key)

    def stop(self, build: str) -> bool:
        """Ask for a build's end; True where that was taken."""
        return self._call("stop", lambda: self.client.post(f"{build_path(build)}/stop"), build=build) is not None

    def read(self, build: str) -> dict[str, Any] | None:
        """The build."""
        return self._call("read", lambda: self.client.get(build_path(build)), build=build)

    def _make(self, op: str, path: str, body: dict[str, Any], key: str | None) -> str | None:
        headers = {} if key is None else {"Idempotency-Key": key}
        said = json.dumps([path, body], sort_keys=True)
        answer = self._call(op, lambda: self.client.post(path, body, **headers), key=key, body=said)
        return None if answer is None else str(answer["id"])

    def _call(self, op: str, work: Callable[[], dict[str, Any]], **facts: Any) -> dict[str, Any] | None:
        began_ms, answer, outcome = _now_ms(), None, "ok"
        try:
            answer = work()
        except Unavailable:
            outcome = "unknown"
        except MillraceError:
            outcome = "fail"
        if answer is not None:
            facts["build"] = answer["id"]
            facts |= {"state": answer["millrace"]["state"], "reason": answer["millrace"]["reason"]}
            facts |= {"attempt": answer["millrace"]["attempt"], "shown": _shown(answer)}
        with self._lock:
            self.journal.append(Op(op=op, outcome=outcome, began_ms=began_ms, ended_ms=_now_ms(), **facts))
        return answer

    def write(self, path: Path) -> Path:
        """The journal as a file: one JSON object a line, as `millrace fsck --journal` reads it."""
        with self._lock:
            lines = [{**asdict(op), "status": {"ok": 201, "fail": 400, "unknown": 0}[op.outcome]} for op in self.journal]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


def _shown(build: dict[str, Any]) -> tuple[str, ...]:
    return tuple(item["sha256"] for item in build["millrace"].get("artifacts", ()))


def _now_ms() -> int:
    return int(time.time() * 1000)
