"""The API on real sockets: live logs that are resumed, broken off and crowded, hostile bodies, and leaving in good order."""

import contextlib
import hashlib
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from millrace.contract import Claim, LogFooter, PhaseReport
from millrace.settings import Settings
from millrace.vocabulary import PhaseType, Reason, StatusType, Verdict
from scheduler import attempts, leases, lifecycle
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.leases import hash_token
from scheduler.sweeper import Sweeper
from tests.support.apiserver import ApiServer, serving
from tests.support.farm import wait_until
from tests.support.records import a_build, a_claim, a_claim_request, a_project, a_report


@pytest.fixture
def server(sqlite_database: Database, settings: Settings) -> Iterator[ApiServer]:
    with serving(sqlite_database, settings) as up:
        a_project(up.db)
        yield up


class Journal:
    """A build's log as its worker would write it."""

    def __init__(self, server: ApiServer, claim: Claim) -> None:
        self._db, self._claim = server.db, claim
        self.text = b""
        self._chunks = 0

    def write(self, data: bytes) -> None:
        claim = self._claim
        sha256 = hashlib.sha256(data).hexdigest()
        attempts.store_log(
            self._db,
            claim.build_id,
            claim.attempt_no,
            hash_token(claim.token),
            seq=self._chunks,
            offset=len(self.text),
            data=data,
            sha256=sha256,
        )
        self._chunks += 1
        self.text += data

    def finish(self, verdict: Verdict = Verdict.SUCCEEDED, reason: Reason = Reason.SUCCEEDED, **changes: Any) -> None:
        footer = LogFooter(chunks=self._chunks, size_bytes=len(self.text), sha256=hashlib.sha256(self.text).hexdigest())
        report = a_report(verdict, reason, **{"log": footer, **changes})
        lifecycle.finish(self._db, self._claim.build_id, self._claim.attempt_no, hash_token(self._claim.token), report)


def begun(server: ApiServer) -> tuple[str, Journal]:
    """A build that is held by a worker; its id and its log."""
    build = a_build(server.db, server.settings)
    return build, Journal(server, a_claim(server.db, server.settings))


def events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kind, id and data of each event, read as any client of server-sent events reads them."""
    kind, ident, data = "", "", ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line and data:
            yield kind, ident, json.loads(data)
        if not line:
            kind, ident, data = "", "", ""
        elif name == "event":
            kind = value
        elif name == "id":
            ident = value
        elif name == "data":
            data += value


def follow(server: ApiServer, build: str, last_id: str = "") -> Any:
    headers = {**server.headers, "Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
    return httpx.stream("GET", f"{server.url}/v1/builds/{build}/logs", headers=headers, timeout=15)


# Live logs


def test_a_log_arrives_within_a_second_of_being_written(server: ApiServer) -> None:
    build, journal = begun(server)
    with follow(server, build) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        told = events(answer.iter_lines())
        for n in range(3):
            written = time.monotonic()
            journal.write(f"line {n}\n".encode())
            data = next(data for kind, _, data in told if kind == "log")
            assert time.monotonic() - written < 1
            assert data["text"] == f"line {n}\n"
        journal.finish()
        rest = list(told)
    assert rest[-1] == ("end", "", {"state": "SUCCEEDED", "reason": "succeeded", "logComplete": True})


def test_a_stream_cut_anywhere_resumes_without_gap_or_repetition(server: ApiServer) -> None:
    build, journal = begun(server)
    pieces = ["grün ".encode()[:3], "grün ".encode()[3:], "日本語\n".encode()[:4], "日本語\n".encode()[4:], b"end\n"]
    for piece in pieces:
        journal.write(piece)
    text, last_id, connections = b"", "", 0
    writer = threading.Thread(target=lambda: [time.sleep(0.4), journal.write(b"later\n"), time.sleep(0.4), journal.finish()])
    writer.start()
    over = False
    while not over and connections < 50:
        connections += 1
        with follow(server, build, last_id) as answer:
            assert answer.status_code == 200
            for kind, ident, data in events(answer.iter_lines()):
                if kind == "log":
                    assert data["offset"] == len(text)
                    text += data["text"].encode()
                    last_id = ident
                    break  # cut off after each piece
                if kind == "end":
                    over = True
                    break
    writer.join(10)
    assert text == journal.text == server.get(f"/v1/builds/{build}/logs").content
    assert connections > 2
    for offset in (0, 3, 7, len(text), len(text) + 5):
        assert server.get(f"/v1/builds/{build}/logs?offset={offset}").content == text[offset:]


def test_a_second_attempt_is_announced_and_followed(server: ApiServer) -> None:
    build, first = begun(server)
    first.write(b"first try\n")
    first.finish(Verdict.HANDED_BACK, Reason.WORKER_SHUTDOWN)
    second = Journal(server, a_claim(server.db, server.settings))
    second.write(b"second try\n")
    second.finish()
    with follow(server, build, "1:0") as answer:
        told = [(kind, data) for kind, _, data in events(answer.iter_lines()) if kind != "phase"]
    assert told == [
        ("log", {"attempt": 1, "offset": 0, "text": "first try\n"}),
        ("attempt", {"attempt": 2}),
        ("log", {"attempt": 2, "offset": 0, "text": "second try\n"}),
        ("end", {"state": "SUCCEEDED", "reason": "succeeded", "logComplete": True}),
    ]


def test_phases_are_told_as_they_change_and_all_before_the_end(server: ApiServer) -> None:
    build = a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    hashed = hash_token(claim.token)
    started = PhaseReport(phase_type=PhaseType.BUILD, started_at_ms=1_000)
    with follow(server, build) as answer:
        told = events(answer.iter_lines())
        attempts.record_phase(server.db, build, 1, hashed, started)
        running = next(data for kind, _, data in told if kind == "phase" and data["phaseType"] == "BUILD")
        assert "phaseStatus" not in running
        ended = started.model_copy(update={"status": StatusType.SUCCEEDED, "ended_at_ms": 2_500, "duration_ms": 1_500})
        attempts.record_phase(server.db, build, 1, hashed, ended)
        Journal(server, claim).finish()
        rest = [(kind, data) for kind, _, data in told]
    assert rest[-1][0] == "end"
    phases = {data["phaseType"]: data for kind, data in rest if kind == "phase"}
    assert phases["BUILD"]["phaseStatus"] == "SUCCEEDED"
    assert "COMPLETED" in phases


def test_a_stream_goes_on_over_a_log_that_was_put_away(server: ApiServer) -> None:
    build, journal = begun(server)
    journal.write(b"one\ntwo\n")
    journal.finish()
    sweeper = Sweeper(server.db, Bell("redis+socket:///nothing.sock"), server.store, server.settings)
    key = f"logs/{build.partition(':')[2]}/1.log"
    wait_until(lambda: sweeper.sweep() and server.store.stat(server.settings.bucket, key) is not None)
    with follow(server, build, "1:4") as answer:
        told = [(kind, data) for kind, _, data in events(answer.iter_lines()) if kind != "phase"]
    assert told[0] == ("log", {"attempt": 1, "offset": 4, "text": "two\n"})
    assert told[-1][1]["logComplete"] is True
    server.store.put(server.settings.bucket, key, io.BytesIO(b"one\n"))
    with follow(server, build) as answer:
        told = [(kind, data) for kind, _, data in events(answer.iter_lines()) if kind != "phase"]
    assert told[-1] == ("end", {"state": "SUCCEEDED", "reason": "succeeded", "logComplete": False})
    server.store.delete(server.settings.bucket, key)
    gone = server.get(f"/v1/builds/{build}/logs")
    assert (gone.status_code, gone.json()["code"]) == (503, "infra_problem")


def test_those_who_follow_logs_leave_room_for_the_workers(server: ApiServer) -> None:
    build, journal = begun(server)
    journal.write(b"x\n")
    open_streams: list[Any] = []
    refused = 0
    try:
        for _ in range(12):  # of 8 threads, 6 may follow
            stream = follow(server, build)
            answer = stream.__enter__()
            if answer.status_code == 200:
                open_streams.append(stream)
            else:
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
                refused += 1
                stream.__exit__(None, None, None)
        assert (len(open_streams), refused) == (6, 6)
        began = time.monotonic()
        assert server.get("/healthz").status_code == 200
        body = a_claim_request().model_dump_json(by_alias=True)
        claimed = httpx.post(
            f"{server.url}/worker/v1/claim",
            headers={**server.worker_headers, "Content-Type": "application/json"},
            content=body,
            timeout=10,
        )
        assert claimed.status_code == 204
        assert time.monotonic() - began < 5
    finally:
        for stream in open_streams:
            stream.__exit__(None, None, None)
    journal.finish()

    def let_in() -> bool:
        with follow(server, build) as answer:
            return bool(answer.status_code == 200)

    wait_until(let_in)  # the places come back


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_server_that_is_told_to_stop_lets_streams_go_at_once(server: ApiServer, number: signal.Signals) -> None:
    build, journal = begun(server)
    journal.write(b"x\n")
    with follow(server, build) as answer:
        told = events(answer.iter_lines())
        assert next(kind for kind, _, _ in told if kind == "log") == "log"
        began = time.monotonic()
        server.process.send_signal(number)
        with contextlib.suppress(httpx.RemoteProtocolError):  # SIGQUIT may cut it off
            assert [kind for kind, _, _ in told if kind in ("end", "error")] == []
        assert time.monotonic() - began < 3
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()


def test_no_process_holds_the_port_when_the_master_is_killed(server: ApiServer) -> None:
    build, _journal = begun(server)
    address = urlsplit(server.url)
    with follow(server, build) as answer:
        assert answer.status_code == 200
        server.process.kill()
        server.process.wait(10)

        def is_free() -> bool:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError):
                    probe.bind((address.hostname, address.port))
                    return True
            return False

        wait_until(is_free, within_s=1)


# Bytes in and out


def artifact(server: ApiServer, recorded: bytes, stored: bytes) -> str:
    """A build with the artifact `a.bin`, which the store now holds as `stored`."""
    build, journal = begun(server)
    key = f"artifacts/{build.partition(':')[2]}/1/a.bin"
    server.store.put(server.settings.bucket, key, io.BytesIO(stored))
    item = {
        "name": "a.bin",
        "key": key,
        "sizeBytes": len(recorded),
        "sha256": hashlib.sha256(recorded).hexdigest(),
        "md5": hashlib.md5(recorded, usedforsecurity=False).hexdigest(),
        "packaging": "NONE",
        "fileCount": 1,
    }
    journal.finish(artifacts=(item,))
    return build


GOOD = bytes(range(256)) * 10_000  # more than two pieces


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(GOOD[:-1] + b"!", id="the last byte"),
        pytest.param(b"!" + GOOD[1:], id="the first byte"),
        pytest.param(GOOD[:-1], id="too short"),
        pytest.param(GOOD + b"x", id="too long"),
        pytest.param(GOOD + b"x" * 3_000_000, id="far too long"),
    ],
)
def test_a_damaged_artifact_is_broken_off_and_never_looks_whole(server: ApiServer, stored: bytes) -> None:
    build = artifact(server, GOOD, stored)
    with pytest.raises(httpx.RemoteProtocolError):
        server.get(f"/v1/builds/{build}/artifacts/a.bin")
    assert "artifact.damaged" in server.log.read_text()


@pytest.mark.parametrize("stored", [b"", b"small", b"smal!", b"small and more"])
def test_a_small_damaged_artifact_is_an_error_from_the_start(server: ApiServer, stored: bytes) -> None:
    build = artifact(server, b"smell", stored)
    answer = server.get(f"/v1/builds/{build}/artifacts/a.bin")
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert "damaged" in answer.json()["detail"]


def test_a_good_artifact_comes_whole(server: ApiServer) -> None:
    build = artifact(server, GOOD, GOOD)
    answer = server.get(f"/v1/builds/{build}/artifacts/a.bin")
    assert answer.content == GOOD
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    head = httpx.head(f"{server.url}/v1/builds/{build}/artifacts/a.bin", headers=server.headers)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(GOOD)))


def test_a_granted_object_is_given_in_parts(server: ApiServer) -> None:
    server.store.put("millrace", "uploads/x", io.BytesIO(b"0123456789"))
    address = server.url + server.store.presign("GET", "millrace", "uploads/x", expires_in_s=60).url
    whole = httpx.get(address)
    assert (whole.status_code, whole.content) == (200, b"0123456789")
    assert whole.headers["X-Millrace-Sha256"] == hashlib.sha256(b"0123456789").hexdigest()
    for asked, content, where in (
        ("2-4", b"234", "2-4"),
        ("7-", b"789", "7-9"),
        ("-3", b"789", "7-9"),
        ("5-99", b"56789", "5-9"),
    ):
        part = httpx.get(address, headers={"Range": f"bytes={asked}"})
        assert (part.status_code, part.content) == (206, content)
        assert part.headers["Content-Range"] == f"bytes {where}/10"
    beyond = httpx.get(address, headers={"Range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["Content-Type"]) == (416, "application/problem+json")


def test_an_upload_may_come_in_chunks_and_goes_on_to_the_store(server: ApiServer) -> None:
    data = b"\x1f\x8b" + GOOD
    answer = httpx.post(
        f"{server.url}/v1/uploads",
        headers={**server.headers, "Content-Type": "application/gzip"},
        content=iter([data[:70_000], data[70_000:]]),
        timeout=20,
    )
    sha256 = hashlib.sha256(data).hexdigest()
    assert answer.status_code == 201, answer.text
    assert (answer.status_code, answer.json()["location"]) == (201, f"millrace/uploads/{sha256}.tar.gz")
    with server.store.open("millrace", f"uploads/{sha256}.tar.gz") as body:
        assert body.read() == data


def test_bodies_over_the_limit_for_json_pass_where_bytes_are_stored(server: ApiServer) -> None:
    sha256 = hashlib.sha256(GOOD).hexdigest()
    assert len(GOOD) > server.settings.max_body_bytes
    answer = httpx.post(f"{server.url}/v1/uploads", headers=server.headers, content=GOOD, timeout=20)
    assert (answer.status_code, answer.json().get("sha256")) == (201, sha256)
    for number, body in enumerate((GOOD, iter([GOOD[:99], GOOD[99:]]))):
        grant = server.store.presign(
            "PUT", "millrace", f"artifacts/x/1/{number}", expires_in_s=60, size_bytes=len(GOOD), sha256=sha256
        )
        put = httpx.put(server.url + grant.url, content=body, headers={"Content-Length": str(len(GOOD))}, timeout=20)
        assert (put.status_code, put.json()) == (200, {"sha256": sha256, "sizeBytes": len(GOOD)})


def test_a_report_of_very_many_artifacts_is_taken(server: ApiServer) -> None:
    build = a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    facts = {"sizeBytes": 1, "sha256": "0" * 64, "md5": "0" * 32, "packaging": "NONE", "fileCount": 1}
    prefix = f"artifacts/{build.partition(':')[2]}/1/"
    items = [{"name": f"f{n:05}" + "x" * 200, "key": f"{prefix}f{n:05}" + "x" * 200, **facts} for n in range(4_000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: server.store.put("millrace", str(item["key"]), io.BytesIO(b"x")), items))
    body = a_report(artifacts=tuple(items)).model_dump_json(by_alias=True, exclude_none=True)
    assert len(body) > server.settings.max_body_bytes
    for token, status in (("mr_att_wrong", 413), (claim.token, 200), (claim.token, 200)):
        answer = httpx.post(
            f"{server.url}/worker/v1/attempts/{build}/1/finish",
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            content=body,
            timeout=60,
        )
        assert answer.status_code == status, answer.text
    assert len(server.get(f"/v1/builds/{build}/artifacts").json()["artifacts"]) == 4_000
    (brief,) = server.get("/v1/builds").json()["builds"]
    assert "artifacts" not in brief["millrace"]


def raw(server: ApiServer, data: bytes, *, then_close: bool = False) -> bytes:
    """What the server answers to these bytes; with `then_close`, nothing more will be sent."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=15) as connection:
        connection.sendall(data)
        if then_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"}\n"):
            piece = connection.recv(65536)
            if not piece:
                break
            answer += piece
    return answer


@pytest.mark.parametrize("path", ["/v1/builds", "/v1/uploads"])
@pytest.mark.parametrize(
    ("framing", "body", "closes"),
    [
        pytest.param("Transfer-Encoding: chunked", b"zz\r\n{}\r\n0\r\n\r\n", False, id="chunk size"),
        pytest.param("Transfer-Encoding: chunked", b"2\r\n{}XX0\r\n\r\n", False, id="chunk end"),
        pytest.param("Transfer-Encoding: chunked", b"9999\r\n{}", True, id="chunk cut off"),
        pytest.param("Content-Length: 50", b'{"projectName"', True, id="body cut off"),
        pytest.param("Content-Length: nine", b"{}", False, id="length no number"),
        pytest.param("Content-Length: -1", b"{}", False, id="length negative"),
        pytest.param("Content-Length: 2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n", False, id="two lengths"),
    ],
)
def test_bodies_that_are_sent_wrong_are_refused_and_harm_nobody(
    server: ApiServer, path: str, framing: str, body: bytes, closes: bool
) -> None:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {server.token}", "Content-Type: application/json"]
    head = "\r\n".join([*lines, framing, "", ""])
    answer = raw(server, head.encode() + body, then_close=closes)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    assert server.get("/healthz").status_code == 200
    assert "request.bug" not in server.log.read_text()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: ApiServer) -> None:
    head = (
        f"POST /v1/uploads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\nContent-Length: {10 * 1024**4}\r\n\r\n"
    )
    began = time.monotonic()
    assert raw(server, head.encode()).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - began < 3


# Many at once


def test_many_at_once_get_what_one_gets(database: Database, settings: Settings) -> None:
    with serving(database, settings, processes=2) as server:
        a_project(server.db)

        def start(n: int) -> str:
            key = {"Idempotency-Key": f"key-{n % 10}"}
            answer = httpx.post(
                f"{server.url}/v1/builds", headers={**server.headers, **key}, json={"projectName": "demo"}, timeout=30
            )
            assert answer.status_code in (200, 201), answer.text
            return str(answer.json()["id"])

        def look(_n: int) -> int:
            return server.get("/v1/builds?limit=5").status_code

        with ThreadPoolExecutor(12) as pool:
            started = pool.map(start, range(40))
            looked = pool.map(look, range(20))
            builds = set(started)
            assert set(looked) == {200}
        assert len(builds) == 10
        found = server.get("/v1/builds?limit=100").json()["builds"]
        assert {item["id"] for item in found} == builds
        assert sorted(item["buildNumber"] for item in found) == list(range(1, 11))


def test_the_road_over_both_databases(database: Database, settings: Settings) -> None:
    with serving(database, settings, processes=2) as server:
        a_project(server.db)
        started = server.post(
            "/v1/builds", {"projectName": "demo", "environmentVariablesOverride": [{"name": "A", "value": "ü"}]}
        )
        assert started.status_code == 201, started.text
        build = started.json()["id"]
        claimed = httpx.post(
            f"{server.url}/worker/v1/claim",
            headers={**server.worker_headers, "Content-Type": "application/json"},
            content=a_claim_request().model_dump_json(by_alias=True),
        )
        claim = Claim.model_validate_json(claimed.content)
        assert claim.build_id == build
        journal = Journal(server, claim)
        journal.write(b"hello\n")
        journal.finish()
        with follow(server, build) as answer:
            told = list(events(answer.iter_lines()))
        assert [data["text"] for kind, _, data in told if kind == "log"] == ["hello\n"]
        assert told[-1][0] == "end"
        assert server.get(f"/v1/builds/{build}").json()["buildStatus"] == "SUCCEEDED"
        for path in ("/v1/builds?project=%00", "/v1/projects?cursor=%00", "/v1/builds?cursor=MSAA", "/v1/projects/%00"):
            assert server.get(path).status_code in (200, 404, 422), path
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["parts"]["database"]["status"]) == (200, "ok")
        assert leases.expire(server.db) == []
        server.stop()
        assert "request.bug" not in server.log.read_text()
