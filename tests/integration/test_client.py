"""How the command line follows a log over connections that break."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from millrace.client import Client
from millrace.errors import Unavailable

LOG = b'id: 1:%d\nevent: log\ndata: {"attempt": 1, "offset": %d, "text": "x"}\n\n'
END = b'event: end\ndata: {"state": "SUCCEEDED", "reason": "succeeded"}\n\n'
ERROR = b'event: error\ndata: {"code": "infra_problem", "detail": "the store is away"}\n\n'


@contextmanager
def scripted(answer: Callable[[int, str | None], Iterator[bytes]]) -> Iterator[tuple[str, list[str | None]]]:
    """A server whose n-th answer is `answer(n, last_id)` and which then hangs up; its address, and the ids that it was sent."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            last_id = self.headers.get("Last-Event-ID")
            seen.append(last_id)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for piece in answer(len(seen), last_id):
                self.wfile.write(piece)
                self.wfile.flush()

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()
            thread.join(10)


def test_a_quiet_build_is_followed_over_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.client._RECONNECT_S", 1.0)

    def answer(number: int, _last_id: str | None) -> Iterator[bytes]:
        if number == 1:
            yield LOG % (1, 0)
            time.sleep(1.5)  # longer quiet than an API may be away
        elif number == 2:
            yield LOG % (2, 1) + END

    with scripted(answer) as (address, seen):
        client = Client(address, "token")
        assert [event.kind for event in client.follow("demo:x")] == ["log", "log", "end"]
        client.close()
    assert seen == [None, "1:1"]


def test_a_stream_that_only_breaks_is_given_up_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.client._RECONNECT_S", 1.0)

    with scripted(lambda _number, _last_id: iter([ERROR])) as (address, seen):
        client = Client(address, "token")
        with pytest.raises(Unavailable, match="the store is away"):
            list(client.follow("demo:x"))
        client.close()
    assert 2 <= len(seen) <= 5
