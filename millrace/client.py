"""The command line's side of the REST API."""

import json
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote

import httpx

from millrace.errors import MillraceError, NotFound, Unauthenticated, Unavailable

_RECONNECT_S: Final = 60.0
_PAUSE_S: Final = 0.5
_PIECE_BYTES: Final = 1024 * 1024


class ApiRefused(MillraceError):
    """The API said no; the message and hint are its own."""

    code = "refused"


@dataclass(frozen=True, kw_only=True)
class LogEvent:
    """One event of a followed log: `kind` is log, gap, phase, attempt or end."""

    kind: str
    data: Mapping[str, Any]


class Client:
    """One API, with one token. Errors are of our tree, with the API's own words."""

    def __init__(self, api_url: str, token: str) -> None:
        self._api = api_url
        self._http = httpx.Client(
            base_url=api_url, headers={"Authorization": f"Bearer {token}"}, timeout=httpx.Timeout(60, connect=5)
        )

    def get(self, path: str, **params: str | int | list[str]) -> dict[str, Any]:
        """The JSON at `path`."""
        answer: dict[str, Any] = self._send("GET", path, params=params).json()
        return answer

    def post(self, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> dict[str, Any]:
        """The JSON that comes back from posting `body`."""
        answer: dict[str, Any] = self._send("POST", path, json=body or {}, headers=headers).json()
        return answer

    def put(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON that comes back from putting `body`."""
        answer: dict[str, Any] = self._send("PUT", path, json=body).json()
        return answer

    def delete(self, path: str) -> Any:
        """Delete what is at `path`; what is answered, None for nothing."""
        answer = self._send("DELETE", path)
        return answer.json() if answer.content else None

    def upload(self, body: BinaryIO, size_bytes: int, sha256: str) -> str:
        """Send a packed source; its location for `sourceLocationOverride`."""
        headers = {"Content-Type": "application/gzip", "Content-Length": str(size_bytes), "X-Millrace-Sha256": sha256}
        location: str = self._send("POST", "/v1/uploads", content=_pieces(body), headers=headers).json()["location"]
        return location

    def log_text(self, build_id: str, attempt: int | None = None) -> Generator[bytes, None, None]:
        """The log so far. A broken connection is taken up again at the byte where it broke."""
        offset = 0
        break_ = _Break(self)
        while True:
            params = {"offset": offset, **_of(attempt)}
            try:
                with self._http.stream("GET", f"{build_path(build_id)}/logs", params=params) as answer:
                    _check(answer)
                    attempt = int(answer.headers.get("X-Millrace-Log-Attempt", 0)) or attempt  # a newer one may begin
                    for data in answer.iter_bytes():
                        break_.mended()
                        offset += len(data)
                        yield data
                return
            except (httpx.TransportError, Unavailable) as error:
                if offset == 0:
                    raise error if isinstance(error, Unavailable) else self.away(error) from error
                break_.wait(error)

    def log_footer(self, build_id: str, attempt: int | None = None) -> dict[str, Any]:
        """What is stored of a log, what its worker says it wrote, and what is missing."""
        return self.get(f"{build_path(build_id)}/logs/footer", **_of(attempt))

    def log_list(self, build_id: str, attempt: int) -> list[bytes]:
        """The lines of the list of a log's chunks. Raises NotFound where an older release kept none."""
        answer = self._send("GET", f"{build_path(build_id)}/logs/chunks", params=_of(attempt))
        return answer.content.splitlines(keepends=True)

    def follow(self, build_id: str, attempt: int | None = None) -> Iterator[LogEvent]:
        """The build's events until it has ended. A broken connection is taken up again where it broke."""
        last_id = ""
        break_ = _Break(self)
        while True:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
            why: Exception = Unavailable("it breaks the log off")
            try:
                with self._http.stream(
                    "GET",
                    f"{build_path(build_id)}/logs",
                    params=_of(attempt),
                    headers=headers,
                    timeout=httpx.Timeout(30, connect=5),
                ) as answer:
                    _check(answer)
                    for ident, event in _events(answer.iter_lines()):
                        if event.kind == "error":
                            why = Unavailable(str(event.data.get("detail")))
                            break
                        break_.mended()
                        last_id = ident or last_id
                        yield event
                        if event.kind == "end":
                            return
            except (httpx.TransportError, Unavailable) as error:
                why = error
            break_.wait(why)

    def download(self, build_id: str, name: str, identifier: str | None, target: Path) -> None:
        """Fetch one artifact into a file; whole or not at all."""
        part = target.with_name(f".{target.name}.part")
        params = {"identifier": identifier} if identifier else {}
        try:
            with self._http.stream("GET", f"{build_path(build_id)}/artifacts/{quote(name)}", params=params) as answer:
                _check(answer)
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(part, "wb") as file:
                    for piece in answer.iter_bytes(_PIECE_BYTES):
                        file.write(piece)
            part.replace(target)
        except httpx.TransportError as error:
            part.unlink(missing_ok=True)
            raise self.away(error) from error

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def alive(self) -> bool:
        """True where the API answers."""
        try:
            return self._http.get("/healthz", timeout=2).is_success
        except httpx.TransportError:
            return False

    def ready(self) -> dict[str, Any]:
        """What `/readyz` says, whatever its status."""
        try:
            answer: dict[str, Any] = self._http.get("/readyz", timeout=10).json()
        except (httpx.TransportError, ValueError) as error:
            raise self.away(error) from error
        return answer

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        tries = 2 if method in ("GET", "PUT", "DELETE") else 1  # an API that was restarted leaves dead connections behind
        while True:
            tries -= 1
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                if tries:
                    continue
                raise self.away(error) from error
            _check(answer)
            return answer

    def away(self, error: Exception) -> Unavailable:
        """The error to raise where the API does not answer."""
        return Unavailable(
            f"the API at {self._api} does not answer: {error}",
            hint="'millrace up' starts a farm here; MILLRACE_API_URL names another.",
        )


class _Break:
    """How long a connection has been broken that is taken up again and again."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._since: float | None = None

    def mended(self) -> None:
        """Something came."""
        self._since = None

    def wait(self, why: Exception) -> None:
        """Broken, or still so. Raises Unavailable where it has been so for too long."""
        self._since = self._since or time.monotonic()
        if time.monotonic() - self._since > _RECONNECT_S:
            raise self._client.away(why) from why
        time.sleep(_PAUSE_S)


def _of(attempt: int | None) -> dict[str, int]:
    return {} if attempt is None else {"attempt": attempt}


def build_path(build_id: str) -> str:
    """Where a build is."""
    return f"/v1/builds/{quote(build_id, safe=':')}"


def _pieces(body: BinaryIO) -> Iterator[bytes]:
    while piece := body.read(_PIECE_BYTES):
        yield piece


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    answer.read()
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    detail = str(problem.get("detail") or f"the API answered {answer.status_code}")
    for item in problem.get("errors", []):
        line = f"{item['field']}: {item['what']}"
        detail += "" if line in detail else f"\n  {line}"
    hint = str(problem.get("hint", ""))
    kinds: dict[int, type[MillraceError]] = {401: Unauthenticated, 404: NotFound, 502: Unavailable, 503: Unavailable}
    raise kinds.get(answer.status_code, ApiRefused)(detail, hint=hint)


def _events(lines: Iterator[str]) -> Iterator[tuple[str, LogEvent]]:
    """Server-sent events (WHATWG HTML, server-sent events), as far as the API uses them."""
    ident, kind, data = "", "", ""
    for line in lines:
        if not line:
            if data:
                yield ident, LogEvent(kind=kind, data=json.loads(data))
            ident, kind, data = "", "", ""
        elif line.startswith("id: "):
            ident = line[4:]
        elif line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            data += line[6:]
