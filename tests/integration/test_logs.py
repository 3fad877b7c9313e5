"""Logs that are provably whole, over real API, database and store: the proof, the line that stands for a gap, and resuming."""

import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace import packing
from millrace.chunks import Tally
from millrace.client import Client
from millrace.commands import proof
from millrace.contract import Claim, LogFooter
from millrace.errors import Conflict, MillraceError
from millrace.ids import log_key, log_list_key
from millrace.settings import Settings, load
from millrace.storage import open_store
from millrace.vocabulary import Reason, Verdict
from scheduler import leases, lifecycle
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.models import Attempt, Build, LogChunk
from scheduler.sweeper import Sweeper
from tests.chaos.proxy import Proxy, Rule
from tests.support.apiserver import ApiServer, serving
from tests.support.farm import wait_until
from tests.support.minio import minio_server, require_program
from tests.support.records import a_build, a_claim, a_project, a_report, log_footer, store_log
from worker.control import AttemptControl

PIECES = (b"first line\n", "grün\n".encode(), b"x" * 3000 + b"\n", b"the end\n")
WHOLE = b"".join(PIECES)
MARK = "[Millrace] "
LOST = f"{MARK}the log ends here: the worker was lost, and what it wrote after byte %d never came\n"


@pytest.fixture
def server(sqlite_database: Database, settings: Settings) -> Iterator[ApiServer]:
    with serving(sqlite_database, settings) as up:
        a_project(up.db)
        yield up


@pytest.fixture
def either(database: Database, settings: Settings) -> Iterator[ApiServer]:
    """Once on each database."""
    with serving(database, settings) as up:
        a_project(up.db)
        yield up


@pytest.fixture
def client(server: ApiServer) -> Iterator[Client]:
    made = Client(server.url, server.token)
    yield made
    made.close()


def begun(server: ApiServer, *pieces: bytes) -> Claim:
    """A build that a worker holds, with this much of its log."""
    a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    store_log(server.db, claim, *pieces)
    return claim


def sent(server: ApiServer, *pieces: bytes) -> Claim:
    """The same, with the log on the road that a worker's takes."""
    claim = begun(server)
    control, tally = AttemptControl(server.url, claim.build_id, claim.attempt_no, claim.token), Tally()
    try:
        for data in pieces:
            control.log(tally.take(data), data, patience_s=5)
    finally:
        control.close()
    return claim


def finish(server: ApiServer, claim: Claim, footer: LogFooter | None, **changes: Any) -> None:
    token = leases.hash_token(claim.token)
    lifecycle.finish(server.db, claim.build_id, claim.attempt_no, token, a_report(log=footer, **changes))


def lose(server: ApiServer, claim: Claim) -> None:
    """Its worker is killed, and the lease runs out."""
    with server.db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == claim.build_id).values(lease_expires_ms=now_ms() - 1))
    assert leases.expire(server.db) == [claim.build_id]


def ended(server: ApiServer, *pieces: bytes) -> str:
    """A build whose worker wrote these chunks and reported them."""
    claim = begun(server, *pieces)
    finish(server, claim, log_footer(*pieces))
    return claim.build_id


def put_away(server: ApiServer, build: str, attempt: int = 1) -> None:
    """What the scheduler does some seconds after the end."""
    with server.db.transaction() as session:
        session.execute(sa.update(Attempt).values(ended_ms=Attempt.ended_ms - 6000))
    sweeper = Sweeper(server.db, Bell("redis+socket:///nothing.sock"), server.store, server.settings)

    def is_away() -> bool:
        sweeper.sweep()
        with server.db.reading() as session:
            return session.get_one(Attempt, (build, attempt)).log_key is not None

    wait_until(is_away)


def stays(_server: ApiServer, _build: str) -> None:
    """The log is still in the database."""


WHERE = pytest.mark.parametrize("move", [stays, put_away], ids=["in the database", "in the store"])


def followed(client: Client, build: str, attempt: int | None = None) -> tuple[str, list[dict[str, Any]], bool]:
    """The text, the gaps and whether the log is said to be complete, as a client that follows gets them."""
    text, gaps, complete = "", [], False
    for event in client.follow(build, attempt):
        if event.kind == "log":
            text += event.data["text"]
        elif event.kind == "gap":
            gaps.append(dict(event.data))
        elif event.kind == "end":
            complete = event.data["logComplete"]
    return text, gaps, complete


def seeded() -> random.Random:
    """Chance that can be had again."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201  # a failing test shows it
    return random.Random(seed)


# The proof


@WHERE
def test_a_whole_log_is_proved_by_client_and_by_hand(
    server: ApiServer, client: Client, move: Callable[[ApiServer, str], None]
) -> None:
    build = ended(server, *PIECES)
    move(server, build)
    root = log_footer(*PIECES).root
    assert proof.verify(client, build, None) == (True, f"whole: {len(WHOLE)} bytes, 4 chunks, root {root}")
    listed = server.get(f"/v1/builds/{build}/logs/chunks")
    assert listed.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert hashlib.sha256(listed.content).hexdigest() == root
    assert server.get(f"/v1/builds/{build}/logs/footer?attempt=1").json() == {
        "attempt": 1,
        "ended": True,
        "complete": True,
        "stored": {"bytes": len(WHOLE), "chunks": 4, "root": root},
        "written": {"bytes": len(WHOLE), "chunks": 4, "sha256": hashlib.sha256(WHOLE).hexdigest(), "root": root},
        "gap": None,
    }
    assert server.get(f"/v1/builds/{build}/logs").content == WHOLE
    assert followed(client, build) == (WHOLE.decode(), [], True)


def test_what_the_last_releases_worker_wrote_is_proved_by_its_hash(server: ApiServer, client: Client) -> None:
    claim = begun(server, *PIECES)
    finish(server, claim, log_footer(*PIECES).model_copy(update={"root": None}))
    is_whole, says = proof.verify(client, claim.build_id, 1)
    assert (is_whole, says) == (True, f"whole: {len(WHOLE)} bytes, 4 chunks, root {log_footer(*PIECES).root}")


def test_a_log_that_goes_on_cannot_be_proved_yet(server: ApiServer, client: Client) -> None:
    claim = begun(server, *PIECES)
    with pytest.raises(Conflict, match="goes on"):
        proof.verify(client, claim.build_id, None)
    said = client.log_footer(claim.build_id)
    assert (said["ended"], said["stored"], said["written"], said["gap"]) == (
        False,
        {"bytes": len(WHOLE), "chunks": 4, "root": None},
        None,
        None,
    )


def test_a_build_that_never_began_has_no_log_and_is_whole(server: ApiServer, client: Client) -> None:
    build = a_build(server.db, server.settings)
    with pytest.raises(Conflict):
        proof.verify(client, build, None)
    lifecycle.request_stop(server.db, build)
    assert proof.verify(client, build, None) == (True, f"whole: {build} was never begun, and has no log")


def test_chunks_come_and_lie_packed_where_that_is_smaller_and_nobody_sees_it(either: ApiServer) -> None:
    frame, lines = bytes(packing.pack(b"a build may print a frame" * 400)), b"the same line again and again\n" * 50_000
    pieces = (b"short\n", lines, frame, seeded().randbytes(100_000), packing.MAGIC)
    claim = sent(either, *pieces)
    finish(either, claim, log_footer(*pieces))
    build = claim.build_id
    with either.db.reading() as session:
        query = sa.select(sa.func.length(sa.type_coerce(LogChunk.data, sa.LargeBinary))).order_by(LogChunk.seq)
        stored = session.scalars(query).all()
    assert stored[1] < len(lines) / 100
    assert (stored[0], stored[3]) == (6, 100_000)
    client = Client(either.url, either.token)
    try:
        for move in (stays, put_away):
            move(either, build)
            is_whole, says = proof.verify(client, build, None)
            assert (is_whole, says.split(",")[0]) == (True, f"whole: {sum(map(len, pieces))} bytes")
            assert either.get(f"/v1/builds/{build}/logs").content == b"".join(pieces)
            assert either.get(f"/v1/builds/{build}/logs?offset={len(lines)}").content == b"".join(pieces)[len(lines) :]
    finally:
        client.close()


@WHERE
@pytest.mark.parametrize("wrong", range(4))
def test_the_chunk_whose_bytes_were_changed_is_named(
    server: ApiServer, client: Client, move: Callable[[ApiServer, str], None], wrong: int
) -> None:
    build = ended(server, *PIECES)
    move(server, build)
    changed = [bytes(reversed(piece)) if seq == wrong else piece for seq, piece in enumerate(PIECES)]
    server.store.put(server.settings.bucket, log_key(build, 1), io.BytesIO(b"".join(changed)))
    with server.db.transaction() as session:
        session.execute(sa.update(LogChunk).where(LogChunk.seq == wrong).values(data=changed[wrong]))
    start = len(b"".join(PIECES[:wrong]))
    where = f"chunk {wrong} (bytes {start} to {start + len(PIECES[wrong])})"
    assert proof.verify(client, build, None) == (False, f"not whole: {where} is not what its SHA-256 says")


def test_a_chunk_that_is_gone_from_the_database_is_a_gap_and_not_skipped(server: ApiServer, client: Client) -> None:
    build = ended(server, *PIECES)
    with server.db.transaction() as session:
        session.execute(sa.delete(LogChunk).where(LogChunk.seq == 1))
    assert proof.verify(client, build, None) == (
        False,
        f"not whole: chunk 1 at byte {len(PIECES[0])} is missing from the list, chunk 2 follows at {len(PIECES[0] + PIECES[1])}",
    )
    missing = len(WHOLE) - len(PIECES[0])
    says = f"the log ends here: {missing} bytes from byte {len(PIECES[0])} on were lost after they had been stored"
    assert server.get(f"/v1/builds/{build}/logs").text == f"{PIECES[0].decode()}{MARK}{says}\n"
    gap = {"attempt": 1, "offset": len(PIECES[0]), "missingBytes": missing, "says": says}
    assert followed(client, build) == (PIECES[0].decode(), [gap], False)


@pytest.mark.parametrize(
    "change", [None, lambda text: text[:-1], lambda text: b"".join(reversed(text.splitlines(True))), lambda _: b""]
)
def test_a_list_that_was_changed_in_the_store_proves_nothing(
    server: ApiServer, client: Client, change: Callable[[bytes], bytes] | None
) -> None:
    build = ended(server, *PIECES)
    put_away(server, build)
    key = log_list_key(build, 1)
    with server.store.open(server.settings.bucket, key) as body:
        text = body.read()
    if change is None:
        server.store.delete(server.settings.bucket, key)
        with pytest.raises(MillraceError, match=r"the list of chunks .* is not in the object store"):
            proof.verify(client, build, None)
        return
    server.store.put(server.settings.bucket, key, io.BytesIO(change(text)))
    is_whole, says = proof.verify(client, build, None)
    assert not is_whole
    assert says.startswith("not whole: ")


def test_list_and_log_changed_together_do_not_fit_the_footer(server: ApiServer, client: Client) -> None:
    build = ended(server, b"told the truth\n")
    put_away(server, build)
    forged = b"told the lies!\n"
    server.store.put(server.settings.bucket, log_key(build, 1), io.BytesIO(forged))
    line = f"0 0 15 {hashlib.sha256(forged).hexdigest()}\n".encode()
    server.store.put(server.settings.bucket, log_list_key(build, 1), io.BytesIO(line))
    is_whole, says = proof.verify(client, build, None)
    assert not is_whole
    assert "is not what its worker wrote" in says


def test_a_log_that_an_older_release_put_away_says_that_it_has_no_list(server: ApiServer, client: Client) -> None:
    build = ended(server, *PIECES)
    put_away(server, build)
    with server.db.transaction() as session:
        session.execute(sa.update(Attempt).values(log_root=None, log_footer=None))
    with pytest.raises(MillraceError, match="put away by an older release"):
        proof.verify(client, build, None)
    assert server.get(f"/v1/builds/{build}/logs").content == WHOLE


# Gaps


@WHERE
@pytest.mark.parametrize("pieces", [PIECES, (b"no end of line",), ()], ids=["lines", "half a line", "nothing"])
def test_the_log_of_a_killed_worker_is_a_prefix_and_ends_with_one_line_that_says_so(
    server: ApiServer, client: Client, pieces: tuple[bytes, ...], move: Callable[[ApiServer, str], None]
) -> None:
    claim = begun(server, *pieces)
    build, text = claim.build_id, b"".join(pieces).decode()
    lose(server, claim)
    second = a_claim(server.db, server.settings)
    store_log(server.db, second, b"again\n")
    finish(server, second, log_footer(b"again\n"))
    if pieces:
        move(server, build)
    size = len(text.encode())
    shown = text + ("" if text.endswith("\n") or not text else "\n") + LOST % size
    assert server.get(f"/v1/builds/{build}/logs?attempt=1").text == shown
    for offset in (*range(max(0, size - 3), len(shown.encode()) + 2), 0):
        assert server.get(f"/v1/builds/{build}/logs?attempt=1&offset={offset}").content == shown.encode()[offset:]
    says = (LOST % size).removeprefix(MARK).strip()
    gap = {"attempt": 1, "offset": size, "missingBytes": None, "says": says}
    assert followed(client, build, 1) == (f"{text}again\n", [gap], True)
    if pieces:
        before = f"{size} bytes, {len(pieces)} chunks, root {log_footer(*pieces).root}"
        assert proof.verify(client, build, 1) == (False, f"not whole: {says}; before that: {before}")
    assert proof.verify(client, build, 2)[0]
    assert server.get(f"/v1/builds/{build}/logs").text == "again\n"


def test_who_follows_while_the_worker_dies_is_told_once_though_the_connection_breaks(server: ApiServer) -> None:
    claim = begun(server, b"begun\n")
    with Proxy(("127.0.0.1", int(server.url.rpartition(":")[2])), http=True) as proxy:
        client = Client(f"http://127.0.0.1:{proxy.port}", server.token)
        seen: list[str] = []
        for event in client.follow(claim.build_id):
            if event.kind in ("log", "gap", "attempt"):
                seen.append(event.kind)
                if seen == ["log"]:
                    lose(server, claim)
                elif event.kind == "gap":
                    proxy.drop()
                    lifecycle.request_stop(server.db, claim.build_id)
        client.close()
    assert seen == ["log", "gap"]
    assert len(proxy.requests) >= 2


@WHERE
def test_how_much_never_came_is_said_where_it_is_known(
    server: ApiServer, client: Client, move: Callable[[ApiServer, str], None]
) -> None:
    claim = begun(server, *PIECES[:2])
    finish(server, claim, log_footer(*PIECES), verdict=Verdict.FAILED, reason=Reason.EXIT_CODE)
    build, came = claim.build_id, b"".join(PIECES[:2])
    move(server, build)
    missing = len(WHOLE) - len(came)
    says = f"the log ends here: {missing} bytes that were written after byte {len(came)} never came"
    assert server.get(f"/v1/builds/{build}/logs").text == f"{came.decode()}{MARK}{says}\n"
    assert client.log_footer(build)["gap"] == {"offset": len(came), "missingBytes": missing, "says": says}
    gap = {"attempt": 1, "offset": len(came), "missingBytes": missing, "says": says}
    assert followed(client, build) == (came.decode(), [gap], False)


# Resuming


def test_a_log_comes_whole_over_connections_that_break_anywhere_while_it_moves_to_the_store(
    either: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.client._PAUSE_S", 0.01)
    rng = seeded()
    lines = ["".join(rng.choices("abcdefghij ü日\n", k=rng.randint(1, 60_000))).encode() for _ in range(40)]
    build, whole = ended(either, *lines), b"".join(lines)
    with Proxy(("127.0.0.1", int(either.url.rpartition(":")[2])), http=True) as proxy:
        client = Client(f"http://127.0.0.1:{proxy.port}", either.token)
        cuts = [Rule(match=r"^GET .*/logs", times=1, cut_after=rng.randint(1, 250_000)) for _ in range(30)]
        proxy.rules = cuts
        got = b""
        for event in client.follow(build):
            if event.kind == "log":
                assert event.data["offset"] == len(got)
                got += event.data["text"].encode()
        assert got == whole
        assert sum(rule.hits for rule in cuts) > 5
        proxy.rules = [Rule(match=r"^GET .*/logs", times=1, cut_after=rng.randint(1, 250_000)) for _ in range(30)]
        got, moved = b"", False
        for data in client.log_text(build):
            got += data
            if not moved and len(got) > len(whole) // 3:
                put_away(either, build)
                moved = True
        assert got == whole
        assert sum(rule.hits for rule in proxy.rules) > 5
        client.close()


def test_a_live_log_comes_whole_over_connections_that_break_anywhere_while_it_moves_to_the_store(
    either: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millrace.client._PAUSE_S", 0.01)
    rng = seeded()
    lines = ["".join(rng.choices("abcdefghij ü日\n", k=rng.randint(1, 90_000))).encode() for _ in range(30)]
    claim = begun(either, *lines)
    whole = b"".join(lines)
    with Proxy(("127.0.0.1", int(either.url.rpartition(":")[2])), http=True) as proxy:
        client = Client(f"http://127.0.0.1:{proxy.port}", either.token)
        proxy.rules = [Rule(match=r"^GET .*/logs", times=1, cut_after=rng.randint(1, 250_000)) for _ in range(40)]
        got, steps = b"", itertools.count()
        for event in client.follow(claim.build_id):
            if event.kind == "log":
                assert event.data["offset"] == len(got)
                got += event.data["text"].encode()
                step = next(steps)
                if step == 4:
                    finish(either, claim, log_footer(*lines))
                if step == 8:
                    put_away(either, claim.build_id)
        assert got == whole
        assert next(steps) > 8
        client.close()


@pytest.mark.minio
def test_a_log_that_moved_to_s3_is_proved_and_resumed_there(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    require_program()
    with minio_server(tmp_path) as minio:
        where = {
            "MILLRACE_STORE_URL": minio.url,
            "MILLRACE_STORE_ACCESS_KEY": minio.access_key,
            "MILLRACE_STORE_SECRET_KEY": minio.secret_key,
        }
        with serving(sqlite_database, settings, **where) as up:
            server = replace(up, store=open_store(load({**where, "MILLRACE_BUCKET": up.settings.bucket})))
            a_project(server.db)
            build = ended(server, *PIECES)
            put_away(server, build)
            client = Client(server.url, server.token)
            root = log_footer(*PIECES).root
            assert proof.verify(client, build, None) == (True, f"whole: {len(WHOLE)} bytes, 4 chunks, root {root}")
            client.close()
            for offset in (0, 1, 17, len(WHOLE) - 1, len(WHOLE), len(WHOLE) + 1):
                assert server.get(f"/v1/builds/{build}/logs?offset={offset}").content == WHOLE[offset:]


def test_a_text_that_is_taken_up_again_is_of_the_same_attempt(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.client._PAUSE_S", 0.01)
    claim = begun(server, b"1" * 100_000)
    with Proxy(("127.0.0.1", int(server.url.rpartition(":")[2])), http=True) as proxy:
        client = Client(f"http://127.0.0.1:{proxy.port}", server.token)
        proxy.rules = [Rule(match=r"^GET .*/logs", times=1, cut_after=40_000)]
        pieces = client.log_text(claim.build_id)
        got = next(pieces)
        assert len(got) < 100_000
        lose(server, claim)
        second = a_claim(server.db, server.settings)
        store_log(server.db, second, b"2" * 200_000)
        got += b"".join(pieces)
        client.close()
    assert got == b"1" * 100_000 + b"\n" + (LOST % 100_000).encode()
