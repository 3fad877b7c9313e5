"""The worker's side of the six verbs, over HTTP. Every verb may be sent twice, so whatever fails on the way is sent again."""

import hashlib
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import httpx

from millrace import packing
from millrace.chunks import Chunk
from millrace.contract import (
    LEAVE_HEADER,
    LOG_OFFSET_HEADER,
    LOG_SHA256_HEADER,
    MAX_SECRETS,
    MAX_SECRETS_BYTES,
    CacheHit,
    CacheQuery,
    Claim,
    ClaimRequest,
    FinishReport,
    Grant,
    GrantRequest,
    PartGrant,
    PartsDone,
    PhaseReport,
    PhaseReports,
    RenewReply,
    RenewRequest,
    SecretReference,
    SecretsReply,
    SecretsRequest,
)
from millrace.errors import (
    AttemptFenced,
    BuildProblem,
    BuildStopped,
    InfraProblem,
    MillraceError,
    NotFound,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from millrace.log import get_logger
from millrace.vocabulary import BuildState, Reason

log = get_logger(__name__)
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_TIMEOUT: Final = httpx.Timeout(10, connect=3, pool=10)
_MOVE_TIMEOUT: Final = httpx.Timeout(60, connect=5, pool=10)
_PIECE_BYTES: Final = 1024 * 1024
_SECRETS_PATIENCE_S: Final = 30.0
_DETAIL_CHARS: Final = 32_768
"""A refusal may name two hundred secrets; what is no answer of ours is cut shorter."""
MOVE_PATIENCE_S: Final = 330.0
"""How long bytes are tried to be moved to or from the object store: it may be away for five minutes and fail no build."""
_BRIEF_S: Final = 30.0
"""The same for what a build can do without."""
_PARTS_AT_ONCE: Final = 4
_WRONG_TRIES: Final = 3
"""How often an object may come with wrong bytes."""


class Refused(MillraceError):
    """The API understood a verb and said no, with this HTTP status."""

    code = "refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status_seen = status


class _Wrong(Exception):
    """An object that came with other bytes than were stored."""


@cache
def trusted() -> ssl.SSLContext:
    """Whom HTTPS trusts. Read once, as that takes longer than many a build's whole way through the farm."""
    return httpx.create_ssl_context()


def warm_up() -> None:
    """Have all loaded and read that a client needs, which otherwise its first use does."""
    Wire("http://127.0.0.1", "").close()


class Wire:
    """One HTTP client with retries. Safe from several threads."""

    def __init__(self, api_url: str, token: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._client = httpx.Client(
            base_url=api_url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT,
            transport=transport,
            trust_env=True,
            verify=trusted(),
        )

    def send(
        self,
        method: str,
        path: str,
        *,
        patience_s: float,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        pause: Callable[[float], object] = time.sleep,
    ) -> httpx.Response:
        """The answer to a request, tried for `patience_s`, with a `pause` between tries.

        Raises Unavailable, AttemptFenced, Unauthenticated, NotFound or Refused.
        """
        end = time.monotonic() + patience_s
        tries = 0
        while True:
            tries += 1
            try:
                answer = self._client.request(method, path, content=content, headers=headers)
                if answer.status_code not in _PASSING:
                    return _checked(answer)
                why = _detail(answer)
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            except RuntimeError as error:
                if not self._client.is_closed:
                    raise
                raise Unavailable(f"the attempt is over; {method} {path} is not sent any more") from error
            pause_s = random.uniform(0.05, min(5.0, 0.1 * 2**tries))  # noqa: S311  # jitter, not a secret
            if time.monotonic() + pause_s > end:
                raise Unavailable(f"the API did not take {method} {path} in {patience_s:.0f} s: {why}")
            pause(pause_s)

    def close(self) -> None:
        """Let the connections go."""
        self._client.close()


class Control:
    """What a worker may do before it holds a build."""

    def __init__(self, api_url: str, worker_token: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._wire = Wire(api_url, worker_token, transport=transport)
        self.leave = ""
        """Why the farm asked this worker to leave, with its last answer to a claim; empty where it did not."""

    def claim(self, request: ClaimRequest) -> Claim | None:
        """The best build of the fleet; None where none waits. Raises Unavailable at once where the API is away."""
        answer = self._wire.send("POST", "/worker/v1/claim", patience_s=3, **_body(request))
        self.leave = unquote(answer.headers.get(LEAVE_HEADER, ""))
        return None if answer.status_code == 204 else Claim.model_validate_json(answer.content, extra="ignore")

    def close(self) -> None:
        """Let the connections go."""
        self._wire.close()


class AttemptControl:
    """What an attempt may do: the other five verbs, and moving the bytes that were granted.

    Bytes are moved until `stop` is set or the build's time is over; that raises BuildStopped.
    """

    def __init__(
        self,
        api_url: str,
        build_id: str,
        attempt_no: int,
        token: str,
        *,
        stop: threading.Event | None = None,
        deadline_in_s: float = float("inf"),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._stop = stop or threading.Event()
        self._deadline = time.monotonic() + deadline_in_s
        self._wire = Wire(api_url, token, transport=transport)
        self._api_url, self._transport = api_url, transport
        self._made: httpx.Client | None = None
        self._making = threading.Lock()
        self._path = f"/worker/v1/attempts/{quote(build_id, safe='')}/{attempt_no}"

    def renew(self, *, draining: bool, patience_s: float) -> RenewReply:
        """Another lease."""
        answer = self._wire.send(
            "POST", f"{self._path}/renew", patience_s=patience_s, **_body(RenewRequest(worker_draining=draining))
        )
        return RenewReply.model_validate_json(answer.content, extra="ignore")

    def phases(self, reports: Sequence[PhaseReport]) -> None:
        """Phases began or ended."""
        self._wire.send("POST", f"{self._path}/phases", patience_s=10, **_body(PhaseReports(reports=tuple(reports))))

    def log(self, chunk: Chunk, data: bytes, *, patience_s: float) -> None:
        """One chunk of the log."""
        headers = {
            LOG_OFFSET_HEADER: str(chunk.offset),
            LOG_SHA256_HEADER: chunk.sha256,
            "Content-Type": "application/octet-stream",
        }
        packed = packing.smaller(data)
        if packed is not None:
            headers["Content-Encoding"] = "zstd"
        self._wire.send("PUT", f"{self._path}/log/{chunk.seq}", patience_s=patience_s, content=packed or data, headers=headers)

    def finish(self, report: FinishReport, *, patience_s: float = MOVE_PATIENCE_S) -> BuildState:
        """The attempt is over; what became of the build."""
        answer = self._wire.send("POST", f"{self._path}/finish", patience_s=patience_s, **_body(report))
        return BuildState(answer.json()["state"])

    def grant(self, request: GrantRequest) -> Grant:
        """An address for one object."""
        try:
            patience_s = _BRIEF_S if request.kind == "cache" else MOVE_PATIENCE_S
            answer = self._wire.send("POST", f"{self._path}/grant", patience_s=patience_s, pause=self._pause, **_body(request))
        except Unavailable as error:
            raise InfraProblem(error.message, reason=Reason.STORAGE, status_code="CLIENT_ERROR") from error
        except Refused as error:
            reason = Reason.ARTIFACT_TOO_LARGE if error.status_seen == TooLarge.status else Reason.ARTIFACTS_NOT_FOUND
            raise BuildProblem(
                f"the farm takes no {request.kind} named {request.name!r}: {error.message}", reason=reason
            ) from error
        return Grant.model_validate_json(answer.content, extra="ignore")

    def secrets(self, references: Sequence[SecretReference]) -> dict[str, str]:
        """The values of secrets by variable name. Raises BuildProblem that names those that cannot be had, InfraProblem."""
        values: dict[str, str] = {}
        missing: list[str] = []
        for at in range(0, len(references), MAX_SECRETS):
            try:
                values |= self._some_secrets(SecretsRequest(references=tuple(references[at : at + MAX_SECRETS])))
            except Unavailable as error:
                raise InfraProblem(f"the secrets could not be had: {error.message}", reason=Reason.SECRETS_AWAY) from error
            except (NotFound, Refused) as error:
                missing.append(error.message)
        size = sum(len(value.encode(errors="surrogateescape")) for value in values.values())
        if size > MAX_SECRETS_BYTES:
            missing.append(f"the secrets of a build have at most {MAX_SECRETS_BYTES} bytes together, these have {size}")
        if missing:
            raise BuildProblem(
                "; ".join(missing),
                reason=Reason.SECRET_UNAVAILABLE,
                status_code="Decrypted Variables Error",
                hint="docs/secrets.md says where a build's secrets are looked for.",
            )
        return values

    def _some_secrets(self, request: SecretsRequest) -> dict[str, str]:
        answer = self._wire.send("POST", f"{self._path}/grant/secrets", patience_s=_SECRETS_PATIENCE_S, **_body(request))
        return SecretsReply.model_validate_json(answer.content, extra="ignore").values

    def find_cache(self, query: CacheQuery) -> CacheHit | None:
        """The cache that answers, or None."""
        try:
            answer = self._wire.send("POST", f"{self._path}/grant/cache", patience_s=10, **_body(query))
        except (Unavailable, Refused) as error:
            raise InfraProblem(error.message, reason=Reason.STORAGE) from error
        return None if answer.status_code == 204 else CacheHit.model_validate_json(answer.content, extra="ignore")

    def upload(self, grant: Grant, path: Path, sha256: str, *, brief: bool = False) -> None:
        """Send a file to where it was granted, some of its parts at once where it was granted in parts."""
        size = path.stat().st_size

        def send() -> httpx.Response:
            headers = {**grant.headers, "Content-Length": str(size)}
            return self._mover.request(grant.method, grant.url, content=self._file(path, 0, size), headers=headers)

        if grant.parts:
            self._upload_parts(grant, path, size, sha256, brief=brief)
        else:
            self._move(f"take {grant.key}", send, brief=brief)
        log.info("artifact.stored", key=grant.key, size_bytes=size, sha256=sha256)

    def _upload_parts(self, grant: Grant, path: Path, size: int, sha256: str, *, brief: bool) -> None:
        part_bytes = grant.part_bytes or size

        def send(numbered: tuple[int, PartGrant]) -> str:
            number, part = numbered
            offset = number * part_bytes
            count = min(part_bytes, size - offset)
            tags: list[str] = []

            def put() -> httpx.Response:
                headers = {**part.headers, "Content-Length": str(count)}
                answer = self._mover.request("PUT", part.url, content=self._file(path, offset, count), headers=headers)
                tags.append(answer.headers.get("ETag", "").strip('"'))
                return answer

            self._move(f"take part {number + 1} of {len(grant.parts)} of {grant.key}", put, brief=brief)
            return tags[-1]

        with ThreadPoolExecutor(_PARTS_AT_ONCE, "parts") as pool:
            tags = tuple(pool.map(send, enumerate(grant.parts)))
        done = PartsDone(key=grant.key, upload=grant.upload or "", size_bytes=size, sha256=sha256, tags=tags)
        try:
            patience_s = _BRIEF_S if brief else MOVE_PATIENCE_S
            self._wire.send("POST", f"{self._path}/grant/complete", patience_s=patience_s, pause=self._pause, **_body(done))
        except (Unavailable, Refused, NotFound) as error:
            raise InfraProblem(
                f"the object store did not put {grant.key} together: {error.message}",
                reason=Reason.STORAGE,
                status_code="CLIENT_ERROR",
            ) from error

    def download(self, grant: Grant, path: Path, *, brief: bool = False) -> None:
        """Fetch a granted object into a file. What broke off is gone on with where it did."""
        seen = hashlib.sha256()
        done = 0

        def fetch() -> httpx.Response:
            nonlocal seen, done
            headers = {**grant.headers, **({"Range": f"bytes={done}-"} if done else {})}
            with self._mover.stream(grant.method, grant.url, headers=headers) as answer:
                if not answer.is_success:
                    answer.read()
                    if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                        done = 0
                    return answer
                if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                    seen, done = hashlib.sha256(), 0
                with open(path, "r+b" if done else "wb") as file:
                    file.seek(done)
                    for piece in answer.iter_raw():  # as they come, so that what came before an end is kept
                        self._check_stop()
                        file.write(piece)
                        seen.update(piece)
                        done += len(piece)
                wanted = answer.headers.get("X-Millrace-Sha256") or answer.headers.get("x-amz-meta-sha256")
                if wanted is not None and wanted != seen.hexdigest():
                    done = 0
                    raise _Wrong(f"{grant.key} came with other bytes than were stored")
                return answer

        self._move(f"give {grant.key}", fetch, brief=brief)

    @property
    def _mover(self) -> httpx.Client:
        """What moves bytes to and from the store, made when it is needed first: many a build has none."""
        with self._making:
            if self._made is None:
                self._made = httpx.Client(
                    base_url=self._api_url, timeout=_MOVE_TIMEOUT, transport=self._transport, verify=trusted()
                )
            return self._made

    def close(self) -> None:
        """Let the connections go."""
        self._wire.close()
        with self._making:
            if self._made is not None:
                self._made.close()

    def _move(self, what: str, work: Callable[[], httpx.Response], *, brief: bool) -> None:
        patience_s = _BRIEF_S if brief else MOVE_PATIENCE_S
        end = time.monotonic() + patience_s
        tries = wrong = 0
        self._check_stop()
        while True:
            tries += 1
            try:
                answer = work()
                if answer.is_success:
                    return
                why = f"it answered {answer.status_code}: {_detail(answer)}"
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            except _Wrong as error:
                why = str(error)
                wrong += 1
            log.warning("store.failed", what=what, tries=tries, why=why[:300])
            pause_s = min(10.0, 0.25 * 2**tries) * random.uniform(0.5, 1)  # noqa: S311  # jitter, not a secret
            if time.monotonic() + pause_s > end or wrong == _WRONG_TRIES:
                raise InfraProblem(
                    f"the object store did not {what} in {tries} tries within {patience_s:.0f} s: {why[:300]}",
                    reason=Reason.STORAGE,
                    status_code="CLIENT_ERROR",
                    hint="Is the object store up, and is there room?",
                )
            self._pause(pause_s)

    def _pause(self, pause_s: float) -> None:
        self._stop.wait(min(pause_s, max(0.0, self._deadline - time.monotonic())))
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise BuildStopped("the build was stopped", reason=Reason.CANCELLED)
        if time.monotonic() > self._deadline:
            raise BuildStopped("the build's time was over", reason=Reason.TIMEOUT)

    def _file(self, path: Path, offset: int, count: int) -> Iterator[bytes]:
        with open(path, "rb") as file:
            file.seek(offset)
            while piece := file.read(min(count, _PIECE_BYTES)):
                count -= len(piece)
                self._check_stop()
                yield piece


def _body(model: Any) -> dict[str, Any]:
    return {
        "content": model.model_dump_json(by_alias=True, exclude_none=True).encode(),
        "headers": {"Content-Type": "application/json"},
    }


def _detail(answer: httpx.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return answer.text[:300]
    detail = body.get("detail") if isinstance(body, dict) else None
    return detail[:_DETAIL_CHARS] if isinstance(detail, str) else str(body)[:300]


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    detail = _detail(answer)
    if answer.status_code == 401:
        raise Unauthenticated(f"the API does not know this worker: {detail}", hint="Check MILLRACE_WORKER_TOKEN.")
    if answer.status_code == 404:
        raise NotFound(detail)
    try:
        code = answer.json().get("code")
    except ValueError:
        code = None
    if code == AttemptFenced.code:
        raise AttemptFenced(detail)
    raise Refused(f"the API answered {answer.status_code}: {detail}", answer.status_code)
