"""A stand-in for EC2's instance metadata service: it gives nothing without a token (IMDSv2), and tokens only for a PUT.

EC2 user guide: "Use the Instance Metadata Service to access instance metadata".
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TTL, _TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"
SPOT = "spot/instance-action"
LIFECYCLE = "autoscaling/target-lifecycle-state"
REBALANCE = "events/recommendations/rebalance"


@dataclass
class Metadata:
    """The service. `paths` is what is there below latest/meta-data; `status` other than 200 is all that it answers."""

    url: str = ""
    paths: dict[str, str] = field(default_factory=lambda: {LIFECYCLE: "InService"})
    status: int = 200
    tokens: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    without_token: int = 0

    def take_back(self, in_s: float = 120) -> None:
        """Give notice that the spot instance ends."""
        when = datetime.now(UTC) + timedelta(seconds=in_s)
        self.paths[SPOT] = json.dumps({"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")})

    def stay(self) -> None:
        """Take the notice back, as no real one ever is."""
        self.paths.pop(SPOT, None)


class _Handler(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        service: Metadata = self.server.service  # type: ignore[attr-defined]
        seconds = self.headers.get(_TTL, "")
        if self.path != "/latest/api/token" or not seconds.isdecimal() or not 1 <= int(seconds) <= 21_600:
            return self._say(400, "")
        if service.status != 200:
            return self._say(service.status, "")
        token = secrets.token_urlsafe(40)
        service.tokens[token] = time.monotonic() + int(seconds)
        self._say(200, token)

    def do_GET(self) -> None:
        service: Metadata = self.server.service  # type: ignore[attr-defined]
        path = self.path.removeprefix("/latest/meta-data/")
        service.asked.append(path)
        if service.tokens.get(self.headers.get(_TOKEN, ""), 0) < time.monotonic():
            service.without_token += 1
            return self._say(401, "")
        if service.status != 200:
            return self._say(service.status, "")
        found = service.paths.get(path)
        self._say(404 if found is None else 200, found or "")

    def _say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_args: Any) -> None:
        pass


@contextlib.contextmanager
def running() -> Iterator[Metadata]:
    """The service, on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    service = Metadata(url=f"http://127.0.0.1:{server.server_port}")
    server.service = service  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
