"""What others know: a client's journal, the broker, a worker's host; and where strings stand that must stand nowhere."""

import base64
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy as sa

from millrace.ids import uuid_of
from millrace.storage import PIECE_BYTES
from scheduler import attempts
from scheduler.db import now_ms
from scheduler.fsck.objects import the_store
from scheduler.fsck.terms import SHOWN, Fault, NotHere, Said, Scope, Thing, said
from scheduler.models import Attempt, Base, Build, LogChunk, Notice, Outbox, Secret

RING: Final = "ring"
CLEAN_HOST: Final = "clean-host"
GONE_S: Final = 90.0
"""How long after its attempt's end a thing may still be on its host."""
_UNSENT_MS: Final = 300_000
_DUE_MS: Final = 60_000
_UNTOLD_MS: Final = 300_000
"""A git server that answers slowly may take as long as this for those before it."""
_TOGETHER: Final = 500
_TEXT: Final = (sa.String, sa.Text, sa.JSON, sa.types.TypeDecorator)


# The journal of a client: one JSON object a line, {"op": "start", "key": ..., "status": 201, "build": ...}


def _accepted(scope: Scope) -> list[Mapping[str, Any]]:
    """The requests for a build that were answered by 2xx."""
    if scope.journal is None:
        raise NotHere("it takes a client's journal (--journal FILE)")
    starts = [line for line in scope.journal if line.get("op") in ("start", "retry")]
    return [line for line in starts if isinstance(line.get("status"), int) and 200 <= line["status"] < 300]


def nothing_lost(scope: Scope) -> Said:
    """1: what was accepted is in the records."""
    accepted = _accepted(scope)
    told = list(dict.fromkeys(str(line.get("build")) for line in accepted))
    there: set[str] = set()
    with scope.db.reading() as session:
        for start in range(0, len(told), _TOGETHER):
            there.update(session.scalars(sa.select(Build.id).where(Build.id.in_(told[start : start + _TOGETHER]))))
    lost = [build for build in told if build not in there]
    hint = "Was the database restored, or is it another one? A build that is lost must be sent again."
    return said(
        f"{len(accepted)} accepted requests",
        [Fault(what=f"{build} was accepted, and is not in the records", ids=(build,), hint=hint) for build in lost],
    )


def one_key_one_build(scope: Scope) -> Said:
    """11: an idempotency key means one build, and one request."""
    by_key: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in _accepted(scope):
        if line.get("key") is not None:
            by_key[str(line["key"])].append(line)
    faults = []
    for key, lines in by_key.items():
        builds = sorted({str(line.get("build")) for line in lines})
        if len(builds) > 1:
            faults.append(Fault(what=f"key {key!r} was answered with {len(builds)} builds", ids=tuple(builds)))
        if len({str(line["body"]) for line in lines if "body" in line}) > 1:
            faults.append(Fault(what=f"key {key!r} was accepted with different requests", ids=tuple(builds)))
    return said(f"{len(by_key)} keys", faults)


# The broker


def _broker_problem(scope: Scope) -> str | None:
    if scope.bell is None:
        raise NotHere("no broker was given")
    return scope.bell.check()


def outbox_is_sent(scope: Scope) -> Said:
    """16: nothing that can be told to the broker or a git server waits; what is tried again and again is not late."""
    late = scope.rows(
        sa.select(Outbox.key, Outbox.tries).where(
            Outbox.sent_ms.is_(None), Outbox.created_ms < now_ms() - _UNSENT_MS, Outbox.next_try_ms < now_ms() - _DUE_MS
        )
    )
    untold = [
        Fault(
            what=f"notice {row.id} of {row.build_id} ({row.state}) is not sent after {row.tries} tries",
            ids=(row.build_id,),
            hint="Is the scheduler running? /readyz says; its log tells of messenger's troubles.",
        )
        for row in scope.rows(
            sa.select(Notice.id, Notice.build_id, Notice.state, Notice.tries).where(
                Notice.settled_ms.is_(None), Notice.created_ms < now_ms() - _UNSENT_MS, Notice.due_ms < now_ms() - _UNTOLD_MS
            )
        )
    ]
    problem = _broker_problem(scope)
    if problem is not None:
        return said(f"all notices not sent; the broker is away ({problem}), and so no message is late", untold)
    return said(
        "all messages and notices not sent",
        [
            *untold,
            *(
                Fault(
                    what=f"message {row.key} is not sent after {row.tries} tries",
                    ids=(row.key,),
                    repair=RING,
                    hint="Is the scheduler running? /readyz says.",
                )
                for row in late
            ),
        ],
    )


# A worker's host


def _things(scope: Scope) -> list[Thing]:
    """What is on the host and should not be. What its worker may be about to remove is given the time for that."""

    def look() -> list[Thing]:
        until = time.monotonic() + scope.host_patience_s
        while (left := _unheld(scope)) and time.monotonic() < until:
            time.sleep(min(2.0, scope.host_patience_s))
        return left

    found: list[Thing] = scope.once("things", look)
    return found


def _unheld(scope: Scope) -> list[Thing]:
    """What is of no living process, of no attempt that lives or ended just now, and not just made."""
    if scope.host is None:
        raise NotHere("it takes a worker's host (--host)")
    things = scope.host.things()  # before the records, so that what begins meanwhile is in them
    allowed = {(uuid_of(build_id), number) for build_id, number in attempts.live(scope.db)}
    just_now = sa.select(Attempt.build_id, Attempt.attempt_no).where(
        Attempt.ended_ms > now_ms() - int(GONE_S * 1000), Attempt.swept == sa.false()
    )
    with scope.db.reading() as session:
        allowed |= {(uuid_of(row.build_id), row.attempt_no) for row in session.execute(just_now)}
    return [thing for thing in things if not thing.lives and thing.age_s > GONE_S and thing.attempt not in allowed]


def _left(things: list[Thing], hint: str) -> list[Fault]:
    return [
        Fault(
            what=f"{thing.kind} {thing.name} belongs to no living attempt, and is {thing.age_s:.0f} s old",
            ids=(thing.name,),
            repair=CLEAN_HOST,
            hint=hint,
        )
        for thing in things
    ]


def nothing_in_the_engine(scope: Scope) -> Said:
    """14: no container, volume or network is left."""
    left = [thing for thing in _things(scope) if thing.kind != "workspace"]
    return said("containers, volumes and networks of this farm on this host", _left(left, "Is the worker running?"))


def nothing_in_the_workspaces(scope: Scope) -> Said:
    """15: no workspace is left."""
    left = [thing for thing in _things(scope) if thing.kind == "workspace"]
    return said(f"workspaces in {scope.settings.workspaces}", _left(left, "Is the worker running?"))


def disk_is_given_back(scope: Scope) -> Said:
    """21: the workspaces hold no byte of an attempt that has ended."""
    left = [thing for thing in _things(scope) if thing.size_bytes]
    size = sum(thing.size_bytes for thing in left)
    faults = [Fault(what=f"{size} bytes of ended attempts", ids=tuple(thing.name for thing in left), repair=CLEAN_HOST)]
    return said(f"bytes in {scope.settings.workspaces}", faults if size else ())


# Strings that must stand nowhere


def _forms(canary: str) -> Iterator[bytes]:
    raw = canary.encode()
    once = base64.b64encode(raw)
    yield from (raw, once, base64.b64encode(once), quote(canary, safe="").encode(), raw.hex().encode(), raw[::-1])


def canaries_sing_nowhere(scope: Scope) -> Said:
    """17: the given strings are, in no usual spelling, in records, logs or the broker. What is found is not repeated."""
    if not scope.canaries:
        raise NotHere("it takes strings that must stand nowhere (--canaries FILE)")
    forms = {form: number for number, canary in enumerate(scope.canaries, 1) for form in _forms(canary)}
    faults = _in_the_records(scope, forms)
    store = the_store(scope)
    logs = (
        sa.select(Attempt.log_key).join(Build, Build.id == Attempt.build_id).where(*scope.recent(), Attempt.log_key.is_not(None))
    )
    with scope.db.reading() as session:
        keys = session.scalars(logs.order_by(Build.submitted_ms.desc()).limit(scope.objects)).all()
    for key in keys:
        with store.open(scope.settings.bucket, str(key)) as body:
            faults += _in_pieces(iter(partial(body.read, PIECE_BYTES), b""), forms, f"the log {key}")
    with scope.db.reading() as session:
        chunks = sa.select(LogChunk.build_id, LogChunk.attempt_no, LogChunk.data).order_by(
            LogChunk.build_id, LogChunk.attempt_no, LogChunk.seq
        )
        held: dict[tuple[str, int], bytes] = {}
        for row in session.execute(chunks).yield_per(8):
            data = held.get((row.build_id, row.attempt_no), b"") + bytes(row.data)
            faults += _in_pieces(iter([data]), forms, f"the log of attempt {row.attempt_no} of {row.build_id}")
            held = {(row.build_id, row.attempt_no): data[-_longest(forms) :]}
        for secret in session.scalars(sa.select(Secret)):
            faults += _in_pieces(iter([bytes(secret.sealed)]), forms, f"the sealed secret {secret.name}")
    if scope.bell is not None and scope.bell.check() is None:
        for name, data in scope.bell.contents():
            faults += _in_pieces(iter([data]), forms, f"the broker's key {name}")
    return said(f"{len(scope.canaries)} strings in six spellings: records, broker, {len(keys)} logs, newest first", faults)


def _longest(forms: dict[bytes, int]) -> int:
    return max(len(form) for form in forms) - 1


def _in_pieces(pieces: Iterator[bytes], forms: dict[bytes, int], where: str) -> list[Fault]:
    held, found = b"", set()
    for piece in pieces:
        held += piece
        found |= {number for form, number in forms.items() if form in held}
        held = held[-_longest(forms) :]
    return [Fault(what=f"string {number} stands in {where}", ids=(where,)) for number in sorted(found)]


def _in_the_records(scope: Scope, forms: dict[bytes, int]) -> list[Fault]:
    faults = []
    for table in Base.metadata.sorted_tables:
        for column in table.columns:
            if not isinstance(column.type, _TEXT):
                continue
            text = sa.cast(column, sa.Text)
            for form, number in forms.items():
                query = sa.select(*table.primary_key.columns).where(text.contains(form.decode(), autoescape=True))
                faults += [
                    Fault(what=f"string {number} stands in {table.name}.{column.name}", ids=tuple(str(part) for part in row))
                    for row in scope.rows(query)
                ]
    return faults[:SHOWN]
