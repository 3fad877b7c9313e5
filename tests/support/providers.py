"""A stand-in for the REST APIs of git servers: takes a request only in the shape that its server's description asks for.

`tests.support.forge` says what it answers of repositories, people, webhooks and deliveries.
"""

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import jsonschema

_DATA = Path(__file__).parent.parent / "data" / "statuses"
_OPERATIONS: dict[str, dict[str, Any]] = {
    name: operation
    for part in ("github", "others", "github-more", "others-more")
    for name, operation in json.loads((_DATA / f"{part}.json").read_text()).items()
}


@dataclass(frozen=True)
class Told:
    """A request that fits its operation. `where` are the parts of the path by their names."""

    operation: str
    where: dict[str, str]
    body: dict[str, Any]
    headers: dict[str, str]
    query: dict[str, str] = field(default_factory=dict)


Says = Callable[[Told], tuple[int, dict[str, str], Any]]


def example_of(operation: str) -> Any:
    """What the server's own description answers as an example, to be changed at will."""
    return json.loads(json.dumps(_OPERATIONS[operation]["example"]))


@dataclass
class Standin:
    """What was told, in order, and what is answered instead of 201: `answers` in turn, then `always`, each with headers.

    While `open` is not set, it takes requests and does not answer. `says` answers operations by name. With `tls` it is also a
    proxy that stands for every host behind it. `public`: git is shown an empty repository, whatever its name.
    """

    url: str
    told: list[Told] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    asked: int = 0
    public: bool = False
    answers: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    always: tuple[int, dict[str, str], Any] | None = None
    open: threading.Event = field(default_factory=threading.Event)
    says: dict[str, Says] = field(default_factory=dict)

    def told_of(self, operation: str) -> list[Told]:
        """The requests of one operation."""
        return [one for one in self.told if one.operation == operation]

    def states(self, name: str = "state") -> list[str]:
        """What each request said of the build."""
        return [one.body[name] for one in self.told]


@contextmanager
def standing_in(tls: tuple[Path, Path] | None = None) -> Iterator[Standin]:
    """A stand-in on a port of its own; `tls` is a certificate and its key."""

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

        def do_GET(self) -> None:
            """A repository that everybody may read, empty, to git; else as any other."""
            if not standin.public or "/info/refs?service=git-upload-pack" not in self.path:
                return self._take()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-git-upload-pack-advertisement")
            self.send_header("Content-Length", "38")
            self.end_headers()
            self.wfile.write(b"001e# service=git-upload-pack\n00000000")
            return None

        do_POST = do_PATCH = do_PUT = _take

        def do_CONNECT(self) -> None:
            """Be the host that is asked for (RFC 9110, CONNECT)."""
            assert tls is not None
            self.send_response(200)
            self.end_headers()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            with context.wrap_socket(self.connection, server_side=True) as connection:
                self.rfile, self.wfile = connection.makefile("rb"), connection.makefile("wb", buffering=0)  # type: ignore[assignment]
                self.close_connection = False
                while not self.close_connection:
                    self.handle_one_request()

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
    if path.startswith("http://"):  # as a proxy is asked
        path = "/" + path.partition("://")[2].partition("/")[2]
    path, _, asked = path.partition("?")
    query = dict(parse_qsl(asked, strict_parsing=True)) if asked else {}
    for name, operation in _OPERATIONS.items():
        place = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", operation["path"]), path.removeprefix("/api/v3"))
        if operation["method"] != method or place is None:
            continue
        document = json.loads(body) if body else {}
        schema = operation.get("schema", {"maxProperties": 0})
        problems = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
        problems += [f"{one} is no query parameter" for one in query if one not in operation.get("query", ())]
        if problems:
            standin.wrong.append(f"{name}: {'; '.join(problems)}")
            return 422, {}, {"message": problems[0]}
        refused = standin.answers.pop(0) if standin.answers else standin.always
        if refused is not None:
            return refused
        where = {part: unquote(value) for part, value in place.groupdict().items()}
        told = Told(name, where, document, headers, query)
        standin.told.append(told)
        if name not in standin.says:
            return 201, {}, {"id": len(standin.told)}
        status, more, answer = standin.says[name](told)
        if status < 300 and "answer" in operation:  # what we answer must fit the description, too
            found = jsonschema.Draft202012Validator(operation["answer"]).iter_errors(answer)
            standin.wrong += [f"the answer of {name}: {error.message}" for error in found]
        return status, more, answer
    standin.wrong.append(f"{method} {path}")
    return 404, {}, {"message": "Not Found"}
