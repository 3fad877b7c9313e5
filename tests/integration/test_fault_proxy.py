"""The fault proxy of the chaos rows: each fault is what it says, seen from a client's side."""

import http.client
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.proxy import Address, Faults, Proxy, Rule
from tests.support.farm import wait_until

BODY = bytes(range(256)) * 400


@contextmanager
def echoing(address: Address = ("127.0.0.1", 0)) -> Iterator[Address]:
    """A server that sends back what it gets, until its client has said all."""
    listener = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
    listener.bind(str(address) if isinstance(address, Path) else address)
    listener.listen()
    threads = []

    def echo(end: socket.socket) -> None:
        with end:
            try:
                while data := end.recv(65536):
                    end.sendall(data)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=echo, args=(end,)))
            threads[-1].start()

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield address if isinstance(address, Path) else listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        server.join(10)
        for thread in threads:
            thread.join(10)


@contextmanager
def dial(proxy: Proxy) -> Iterator[socket.socket]:
    unix = isinstance(proxy.address, Path)
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as end:
        end.settimeout(5)
        end.connect(str(proxy.address) if unix else proxy.address)
        yield end


def exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


class Answers(http.server.BaseHTTPRequestHandler):
    """GET gives BODY; PUT gives back what it was sent; POST asks for an upgrade, and then sends BODY."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_words: object) -> None: ...

    def do_GET(self) -> None:
        self._say(BODY)

    def do_PUT(self) -> None:
        self._say(self.rfile.read(int(self.headers["Content-Length"])))

    def do_POST(self) -> None:
        self.wfile.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n" + BODY)
        self.close_connection = True

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Proxy]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with Proxy(("127.0.0.1", server.server_port), http=True) as proxy:
            yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def ask(proxy: Proxy, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    try:
        connection.request(method, "/thing?x=1", body=body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("unix", [False, True])
def test_bytes_pass_both_ways_and_so_does_the_end(tmp_path: Path, unix: bool) -> None:
    listen = tmp_path / "proxy" if unix else ("127.0.0.1", 0)
    with echoing(tmp_path / "server" if unix else ("127.0.0.1", 0)) as server, Proxy(server, listen) as proxy, dial(proxy) as end:
        end.sendall(BODY)
        end.shutdown(socket.SHUT_WR)
        assert exactly(end, len(BODY)) == BODY
        assert end.recv(1) == b""


@pytest.mark.parametrize("unix", [False, True])
def test_refusing_drops_what_is_there_and_refuses_what_comes(tmp_path: Path, unix: bool) -> None:
    with echoing() as server, Proxy(server, tmp_path / "proxy" if unix else ("127.0.0.1", 0)) as proxy:
        with dial(proxy) as end:
            end.sendall(b"x")
            assert end.recv(1) == b"x"
            proxy.faults = Faults(refuse=True)
            _is_cut(end)
        wait_until(lambda: _refuses(proxy))
        proxy.heal()
        wait_until(lambda: not _refuses(proxy))
        with dial(proxy) as end:
            end.sendall(b"y")
            assert end.recv(1) == b"y"


def _refuses(proxy: Proxy) -> bool:
    try:
        with dial(proxy):
            return False
    except ConnectionRefusedError:
        return True


def _is_cut(end: socket.socket) -> None:
    """The end of a connection, as a reset or, between Unix sockets, as its end."""
    try:
        assert end.recv(1) == b""
    except ConnectionResetError:
        return


def test_a_reset_is_one() -> None:
    with echoing() as server, Proxy(server) as proxy:
        proxy.faults = Faults(reset=True)
        with pytest.raises(ConnectionResetError), dial(proxy) as end:
            end.sendall(b"x")
            end.recv(1)


@pytest.mark.parametrize("way", ["silent_up", "silent_down"])
def test_what_was_held_back_comes_when_the_silence_is_over(way: str) -> None:
    with echoing() as server, Proxy(server) as proxy, dial(proxy) as end:
        proxy.faults = Faults(**{way: True})
        end.sendall(b"hello")
        end.settimeout(0.4)
        with pytest.raises(TimeoutError):
            end.recv(1)
        proxy.heal()
        end.settimeout(5)
        assert exactly(end, 5) == b"hello"


def test_a_silent_proxy_still_takes_connections_and_drops_them_on_demand() -> None:
    with echoing() as server, Proxy(server) as proxy:
        proxy.faults = Faults(silent_up=True, silent_down=True)
        with dial(proxy) as end:
            end.sendall(b"x")
            wait_until(lambda: proxy.connections == 1)
            wait_until(lambda: proxy.drop() == 1)
            _is_cut(end)


def test_bytes_come_late_and_slowly() -> None:
    with echoing() as server, Proxy(server) as proxy, dial(proxy) as end:
        proxy.faults = Faults(delay_s=0.2)
        began = time.monotonic()
        end.sendall(b"x")
        assert end.recv(1) == b"x"
        assert time.monotonic() - began >= 0.4  # once each way
        proxy.faults = Faults(bytes_per_s=10_000)
        began = time.monotonic()
        end.sendall(b"y" * 5000)
        assert exactly(end, 5000) == b"y" * 5000
        assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("way", ["cut_up_after", "cut_down_after"])
def test_a_connection_is_cut_at_the_very_byte(way: str) -> None:
    with echoing() as server, Proxy(server) as proxy, dial(proxy) as end:
        proxy.faults = Faults(**{way: 1000})
        end.sendall(b"z" * 900)
        assert exactly(end, 900) == b"z" * 900
        end.sendall(b"z" * 900)
        got = b""
        with pytest.raises((ConnectionResetError, EOFError)):
            while True:
                more = end.recv(1)
                if not more:
                    raise EOFError
                got += more
        assert len(got) <= 100


def test_requests_pass_one_after_another_on_one_connection(site: Proxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=5)
    for _ in range(3):
        connection.request("PUT", "/a", body=BODY)
        assert connection.getresponse().read() == BODY
    connection.request("GET", "/b")
    assert connection.getresponse().read() == BODY
    connection.close()
    assert site.requests == ["PUT /a"] * 3 + ["GET /b"]
    assert site.connections == 1


def test_a_share_of_requests_is_answered_with_an_error_and_the_seed_says_which(site: Proxy) -> None:
    site.rules = [Rule(match="^GET", share=0.3, status=503, headers={"Retry-After": "1"}, body=b"no")]
    seen = [ask(site)[0] for _ in range(40)]
    assert 4 <= seen.count(503) <= 20
    assert seen.count(503) + seen.count(200) == 40
    site.rules = [Rule(status=429, times=2)]
    assert [ask(site, "PUT", BODY)[0] for _ in range(3)] == [429, 429, 200]


def test_a_body_is_truncated_under_the_right_length(site: Proxy) -> None:
    site.rules = [Rule(truncate=0.5)]
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(site)
    assert caught.value.partial == BODY[: len(BODY) // 2]


def test_a_body_is_shortened_so_that_nothing_looks_wrong(site: Proxy) -> None:
    site.rules = [Rule(shorten=0.5)]
    assert ask(site) == (200, BODY[: len(BODY) // 2])


def test_a_byte_is_flipped_either_way(site: Proxy) -> None:
    for rule in (Rule(flip=True), Rule(flip_up=True)):
        site.rules = [rule]
        status, body = ask(site, "PUT", BODY)
        assert status == 200
        assert len(body) == len(BODY)
        assert sum(a != b for a, b in zip(body, BODY, strict=True)) == 1


def test_an_answer_is_late_or_never_comes_though_the_server_heard(site: Proxy) -> None:
    site.rules = [Rule(late_s=0.3, times=1), Rule(unanswered=True, times=1)]
    began = time.monotonic()
    assert ask(site)[0] == 200
    assert time.monotonic() - began >= 0.3
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask(site)


def test_an_upgraded_stream_is_raw_and_can_be_cut(site: Proxy) -> None:
    for cut, rules in ((None, []), (1000, [Rule(match="^POST /attach", cut_after=1000)])):
        site.rules = rules
        with socket.create_connection(("127.0.0.1", site.port), timeout=5) as end:
            end.sendall(b"POST /attach HTTP/1.1\r\nHost: x\r\nUpgrade: tcp\r\n\r\n")
            got = b""
            try:
                while more := end.recv(65536):
                    got += more
            except ConnectionResetError:
                assert cut is not None
        body = got.partition(b"\r\n\r\n")[2]
        assert body == BODY[:cut]
