"""A stand-in for the REST APIs of git servers: takes a status only in the shape that its server's description asks for."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema

_DATA = Path(__file__).parent.parent / "data" / "statuses"
_OPERATIONS: dict[str, dict[str, Any]] = {
    name: operation
    for part in ("github", "others")
    for name, operation in json.loads((_DATA / f"{part}.json").read_text()).items()
}


@dataclass(frozen=True)
class Told:
    """A request that fits its operation. `where` are the parts of the path by their names."""

    operation: str
    where: dict[str, str]
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class Standin:
    """What was told, in order, and what is answered instead of 201: `answers` in turn, then `always`, each with headers.

    While `open` is not set, it takes requests and does not answer.
    """

    url: str
    told: list[Told] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    asked: int = 0
    answers: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    always: tuple[int, dict[str, str], Any] | None = None
    open: threading.Event = field(default_factory=threading.Event)

    def states(self, name: str = "state") -> list[str]:
        """What each request said of the build."""
        return [one.body[name] for one in self.told]


@contextmanager
def standing_in() -> Iterator[Standin]:
    """A stand-in on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def _take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, answer = _answer(standin, self.command, self.path, body, dict(self.headers.items()))
            standin.open.wait(9)
            data = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PATCH = _take

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    standin = Standin(url=f"http://127.0.0.1:{server.server_port}")
    standin.open.set()
    thread = threading.Thread(target=lambda: server.serve_forever(0.02))
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(standin: Standin, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
    standin.asked += 1
    for name, operation in _OPERATIONS.items():
        place = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", operation["path"]), path.removeprefix("/api/v3"))
        if operation["method"] != method or place is None:
            continue
        document = json.loads(body)
        problems = [error.message for error in jsonschema.Draft202012Validator(operation["schema"]).iter_errors(document)]
        if problems:
            standin.wrong.append(f"{name}: {'; '.join(problems)}")
            return 422, {}, {"message": problems[0]}
        refused = standin.answers.pop(0) if standin.answers else standin.always
        if refused is not None:
            return refused
        where = {part: unquote(value) for part, value in place.groupdict().items()}
        standin.told.append(Told(name, where, document, headers))
        return 201, {}, {"id": len(standin.told)}
    standin.wrong.append(f"{method} {path}")
    return 404, {}, {"message": "Not Found"}
