"""One request to a git server's REST API: bounded in time and size, and its answer as what is to be done next."""

import email.utils
import ipaddress
import json
import re
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from millrace import __version__
from millrace.project import ProjectSource
from millrace.settings import Settings
from millrace.vocabulary import BuildState

TIMEOUT_S: Final = 10.0
_MAX_ANSWER: Final = 4 * 1024 * 1024
_MAX_REDIRECTS: Final = 3
_SHOWN_CHARS: Final = 300
_METADATA_6: Final = ipaddress.IPv6Address("fd00:ec2::254")
_SCP: Final = re.compile(r"(?:[^@/]+@)?([^:/]+):(?!//)(.+)")


class Refused(Exception):
    """The server will say the same again: a wrong token, an unknown commit."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.why, self.status = why, status


class Later(Exception):
    """It may be told later: the server is away, or asks for a pause of `wait_s` from all that this token sends."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.why, self.wait_s = why, wait_s


@dataclass(frozen=True, kw_only=True)
class Access:
    """What opens the server's API: a token, and the user's name where the server wants one."""

    username: str
    token: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A repository at its server. `origin` is scheme and host, `path` the rest of the clone address without `.git`."""

    origin: str
    host: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is told: the state of one build, for one context of one commit. `known_as`: what the server called it before."""

    place: Place
    state: BuildState
    commit: str
    context: str
    description: str
    url: str
    build_id: str
    known_as: str | None = None


def place_of(source: ProjectSource) -> Place:
    """Where a source's repository is. Its API is asked by https, unless the source itself is fetched by plain http."""
    location = source.location or ""
    short = _SCP.fullmatch(location) if "://" not in location else None
    if short is not None:
        location = f"ssh://{short[1]}/{short[2]}"
    try:
        address = urlsplit(location)
    except ValueError as error:
        raise Refused(f"{location[:100]!r} is no address of a repository at a git server: {error}") from error
    path = address.path.strip("/").removesuffix(".git")
    if not address.hostname or "/" not in path or ".." in path.split("/"):
        raise Refused(f"{(source.location or '')[:100]!r} is no address of a repository at a git server")
    plain = address.scheme == "http"
    host = address.netloc.rpartition("@")[2] if address.scheme in ("http", "https") else address.hostname
    return Place(origin=f"{'http' if plain else 'https'}://{host}", host=address.hostname, path=path)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server answered: its JSON, None where it is none; and the address of the next page, where there is one."""

    data: Any
    next: str | None = None


def trust_of(settings: Settings) -> ssl.SSLContext:
    """Whose certificates are believed: the host's, and those of `ca_bundle`."""
    trust = ssl.create_default_context()
    if settings.ca_bundle is not None:
        trust.load_verify_locations(settings.ca_bundle)
    return trust


def is_metadata(address: str) -> bool:
    """Whether an IP address is one of those at which clouds tell machines of themselves."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6 and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_link_local or found == _METADATA_6


def segment(text: str) -> str:
    """`text` as one segment of a path."""
    return quote(text, safe="")


class Rest:
    """Asks one server with one token. Close it."""

    def __init__(self, access: Access, trust: ssl.SSLContext, *, timeout_s: float = TIMEOUT_S) -> None:
        self.access = access
        self._timeout_s = timeout_s
        self._client = httpx.Client(verify=trust, timeout=timeout_s, follow_redirects=False)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def send(self, method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]) -> Any:
        """The answer's JSON, None where it is none. Raises Refused or Later."""
        return self.ask(method, url, body, headers).data

    def ask(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer. A `body` of None sends none. Raises Refused or Later."""
        headers = {"User-Agent": f"millrace/{__version__}", "Accept": "application/json"} | dict(headers)
        try:
            url = str(httpx.URL(url, params=params) if params else httpx.URL(url))
            for _ in range(_MAX_REDIRECTS):
                status, answered, content = self._ask(method, url, body, headers)
                moved = httpx.URL(url).join(answered.get("location", "")) if status in (301, 307, 308) else None
                if moved is None:
                    # What echoes a token must not have it shown to people.
                    data = _judged(status, answered, content.replace(self.access.token.encode(), b"***"))
                    return Answer(data=data, next=self._next(url, answered))
                self._stay_at(url, moved, status)
                url = str(moved)  # a renamed repository
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise Refused(f"the address is none: {error}") from error
        raise Refused("the server sends us in a circle")

    @staticmethod
    def _check_address(url: str) -> None:
        """Raises Refused for addresses at which clouds keep their machines' credentials: no git server lives there."""
        address = httpx.URL(url)
        try:
            found = {one[4][0] for one in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)}
        except OSError:
            return  # asking it says so in better words
        for one in found:
            if is_metadata(str(one)):
                raise Refused(f"{address.host} is at {one}, where no git server is: it gets no token")

    @staticmethod
    def _stay_at(url: str, other: httpx.URL, status: int) -> None:
        if (other.scheme, other.netloc) != (httpx.URL(url).scheme, httpx.URL(url).netloc):
            raise Refused(f"the server sends us on to {other.host}, which gets no token", status)

    def _next(self, url: str, answered: httpx.Headers) -> str | None:
        """GitHub names the next page in a header `Link`."""
        link = httpx.Response(200, headers={"link": answered.get("link", "")}).links.get("next", {}).get("url")
        if link is None:
            return None
        self._stay_at(url, httpx.URL(url).join(link), 200)
        return str(httpx.URL(url).join(link))

    def _ask(
        self, method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> tuple[int, httpx.Headers, bytes]:
        until = time.monotonic() + 2 * self._timeout_s
        content = b""
        self._check_address(url)
        try:
            with self._client.stream(method, url, json=body, headers=dict(headers)) as answer:
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > _MAX_ANSWER or time.monotonic() > until:
                        raise Later("the server's answer is too large, or comes too slowly")
                return answer.status_code, answer.headers, content
        except httpx.TimeoutException as error:
            raise Later(f"the server does not answer within {self._timeout_s:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Later(f"the server cannot be reached: {str(error) or type(error).__name__}") from error


def _judged(status: int, headers: httpx.Headers, content: bytes) -> Any:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if 200 <= status < 300:
        return answer
    why = f"the server answered {status}{_said(answer)}"
    spent = headers.get("x-ratelimit-remaining") == "0" or headers.get("ratelimit-remaining") == "0"
    if status == 429 or (status == 403 and (spent or "retry-after" in headers)):
        raise Later(why, _pause_s(headers))
    if status >= 500:
        raise Later(why, _pause_s(headers) if "retry-after" in headers else None)
    if status in (408, 425):
        raise Later(why)
    raise Refused(why, status)


def _pause_s(headers: httpx.Headers) -> float:
    """How long to wait: Retry-After in seconds or as a date, else until the server's limit begins anew, else a minute."""
    said = headers.get("retry-after", "").strip()
    if said.isdecimal():
        return float(said[:9])
    if said:
        try:
            return max(1.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
        except ValueError:
            return 60.0
    reset = headers.get("x-ratelimit-reset", headers.get("ratelimit-reset", ""))
    return max(1.0, int(reset) - time.time()) if reset.isdecimal() and len(reset) < 12 else 60.0


def _said(answer: object) -> str:
    """The server's own words, in one line, where it has some."""
    words = answer
    for name in ("message", "error", "errors"):
        if isinstance(answer, dict) and answer.get(name):
            words = answer[name]
            break
    if not words:
        return ""
    text = words if isinstance(words, str) else json.dumps(words)
    return ": " + "".join(char if char.isprintable() else " " for char in text)[:_SHOWN_CHARS]
