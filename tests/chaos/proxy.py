"""A fault proxy that stands between two parts of a farm: TCP or Unix sockets on either side, and HTTP where it is told so.

`Faults` happen to every byte of every connection; `Rule`s happen to single HTTP requests. Both may be changed at any time.
Where HTTP is read, an upgraded connection (Docker's attach) passes as raw bytes once its upgrade was answered.
"""

import contextlib
import functools
import random
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

Address = tuple[str, int] | Path
UP: Final = "up"
DOWN: Final = "down"
_TICK_S: Final = 0.1
_PIECE_BYTES: Final = 64 * 1024
_RESET: Final = struct.pack("ii", 1, 0)


class Cut(Exception):
    """The connection is at its end, by a fault or because a side left."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What happens to the bytes. `up` is from the client to the server, `down` is what comes back.

    `refuse`: nobody listens. `reset`: connections are taken and reset at once. `silent_up`, `silent_down`: bytes of that way are
    held back, and go on when this is over; connections stay, as behind a dead link. `delay_s` each piece comes later;
    `bytes_per_s` is all that one connection gets each way, 0 for no limit. `cut_up_after`, `cut_down_after`: a connection is
    reset once so many of its bytes went that way, in the middle of whatever they were.
    """

    refuse: bool = False
    reset: bool = False
    silent_up: bool = False
    silent_down: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    cut_up_after: int | None = None
    cut_down_after: int | None = None


@dataclass(kw_only=True)
class Rule:
    """What happens to HTTP requests whose `METHOD /path?query` is found by `match`, to `share` of them, `times` at most.

    `status`: this is answered, with `body` and `headers`, and the server never hears of it. All else is done to the server's
    own answer: `late_s` it comes that much later; `unanswered` the connection is reset instead; `truncate` only that share of
    its body comes, under the right length; `shorten` the same under a length that fits, so that nothing looks wrong; `flip` one
    byte of it is another; `cut_after` the connection is reset after so many bytes of its body, or of the stream behind an
    upgrade. `flip_up` alters one byte of what the client sends.
    """

    match: str = ""
    share: float = 1.0
    times: int | None = None
    status: int | None = None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    late_s: float = 0.0
    unanswered: bool = False
    truncate: float | None = None
    shorten: float | None = None
    flip: bool = False
    flip_up: bool = False
    cut_after: int | None = None
    hits: int = 0


class Proxy:
    """One address that stands for `server`. A context manager; `seed` decides which requests a rule's share falls on.

    `requests`, `connections` and `passed_down` (bytes) say what went through so far.
    """

    def __init__(self, server: Address, listen: Address = ("127.0.0.1", 0), *, http: bool = False, seed: int = 0) -> None:
        self.server = server
        self._http = http
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._faults = Faults()
        self._rules: list[Rule] = []
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self.requests: list[str] = []
        self.connections = 0
        self.passed_down = 0
        self._ended = threading.Event()
        self._listens = True
        self._listener = self._bound(listen)
        self.address: Address = listen if isinstance(listen, Path) else self._listener.getsockname()[:2]

    def __enter__(self) -> "Proxy":
        self._listener.listen(512)
        self._spawn(self._accept, "proxy")
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self.drop()
        for thread in list(self._threads):
            thread.join(10)
        self._listener.close()
        if isinstance(self.address, Path):
            self.address.unlink(missing_ok=True)

    @property
    def port(self) -> int:
        assert not isinstance(self.address, Path)
        return self.address[1]

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        before, self._faults = self._faults, faults
        until = time.monotonic() + 5
        while self._listens == faults.refuse and time.monotonic() < until:
            time.sleep(_TICK_S / 20)
        if faults.refuse and not before.refuse:
            self.drop()

    def heal(self) -> None:
        """No fault any more; connections that are there go on."""
        self.rules = []
        self.faults = Faults()

    @property
    def rules(self) -> list[Rule]:
        return self._rules

    @rules.setter
    def rules(self, rules: list[Rule]) -> None:
        with self._lock:
            self._rules = rules

    def drop(self) -> int:
        """Reset every connection that is there; how many there were."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()
        return len(links)

    def rule_for(self, request: str) -> Rule | None:
        """The first rule that this request falls under, counted as one of its hits."""
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if not re.search(rule.match, request) or (rule.times is not None and rule.hits >= rule.times):
                    continue
                if rule.share < 1 and self._random.random() >= rule.share:
                    continue
                rule.hits += 1
                return rule
        return None

    def _bound(self, listen: Address) -> socket.socket:
        unix = isinstance(listen, Path)
        listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        if isinstance(listen, Path):
            listen.unlink(missing_ok=True)
            listener.bind(str(listen))
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(listen)
        return listener

    def _accept(self) -> None:
        while not self._ended.is_set():
            wanted = not self._faults.refuse
            if self._listens != wanted:
                # A socket that is bound and does not listen refuses, and keeps the address for us.
                self._listener.close()
                self._listener = self._bound(self.address)
                if wanted:
                    self._listener.listen(512)
                self._listens = wanted
            if not self._listens:
                time.sleep(_TICK_S / 5)
                continue
            if not select.select([self._listener], [], [], _TICK_S / 5)[0]:
                continue
            client, _ = self._listener.accept()
            self.connections += 1
            self._spawn(functools.partial(self._carry, client), "proxy-link")

    def _carry(self, client: socket.socket) -> None:
        if self._faults.reset:
            _reset(client)
            return
        link = _Link(self, client)
        with self._lock:
            self._links.add(link)
        try:
            if self._http:
                _Exchange(self, link).carry()
            else:
                link.connect()
                self.both_ways(link)
        except (Cut, OSError):
            link.cut()
        finally:
            link.close()
            with self._lock:
                self._links.discard(link)

    def both_ways(self, link: "_Link") -> None:
        """Bytes as they come, until both sides have said all or the connection is cut."""
        up = self._spawn(lambda: link.pump(UP), "proxy-up")
        link.pump(DOWN)
        up.join()

    def _spawn(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
        thread.start()
        return thread


class _Link:
    """A client's connection and ours to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._ends: dict[str, socket.socket] = {DOWN: client}  # by the way on which it is written to
        client.settimeout(_TICK_S)
        self._over = threading.Event()
        self._passed = {UP: 0, DOWN: 0}
        self._is_cut = False
        self.cut_down_after: int | None = None  # by a rule, counted from now on

    def connect(self) -> None:
        if UP in self._ends:
            return
        self._hold(UP)
        address = self._proxy.server
        server = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
        server.settimeout(5)
        try:
            server.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            server.close()
            raise
        server.settimeout(_TICK_S)
        self._ends[UP] = server

    def cut(self) -> None:
        """Let both sides see a reset, wherever they are."""
        self._is_cut = True
        self._over.set()

    def close(self) -> None:
        self._over.set()
        for end in self._ends.values():
            if self._is_cut:
                _reset(end)
            else:
                end.close()

    def receive(self, way: str) -> bytes:
        """What comes next on its way, b"" where that side has said all. Raises Cut."""
        source = self._ends[DOWN if way == UP else UP]
        while not self._over.is_set():
            try:
                return source.recv(_PIECE_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise Cut from error
        raise Cut

    def send(self, way: str, data: bytes) -> None:
        """Pass bytes on, as the faults of now have it. Raises Cut."""
        self._hold(way)
        faults = self._proxy.faults
        if faults.delay_s:
            self._wait(faults.delay_s)
        view = memoryview(data)
        while view:
            faults = self._proxy.faults
            piece = view
            limit = faults.cut_up_after if way == UP else faults.cut_down_after
            if limit is not None:
                piece = piece[: max(0, limit - self._passed[way])]
            if way == DOWN and self.cut_down_after is not None:
                piece = piece[: self.cut_down_after]
            if not piece:
                self.cut()
                raise Cut
            if faults.bytes_per_s:
                piece = piece[: max(1, int(faults.bytes_per_s * _TICK_S))]
                self._wait(len(piece) / faults.bytes_per_s)
            sent = self._send(self._ends[way], piece)
            self._passed[way] += sent
            if way == DOWN:
                self._proxy.passed_down += sent
            if way == DOWN and self.cut_down_after is not None:
                self.cut_down_after -= sent
            view = view[sent:]
            self._hold(way)

    def pump(self, way: str) -> None:
        """Everything that comes on one way, until that side has said all."""
        try:
            while data := self.receive(way):
                self.send(way, data)
            self._hold(way)
            with contextlib.suppress(OSError):
                self._ends[way].shutdown(socket.SHUT_WR)
        except Cut:
            self.cut()

    def wait(self, seconds: float) -> None:
        """Raises Cut where the connection ends meanwhile."""
        self._wait(seconds)

    def _send(self, end: socket.socket, piece: memoryview) -> int:
        while not self._over.is_set():
            try:
                return end.send(piece)
            except TimeoutError:
                continue
            except OSError as error:
                raise Cut from error
        raise Cut

    def _hold(self, way: str) -> None:
        while self._proxy.faults.silent_up if way == UP else self._proxy.faults.silent_down:
            self._wait(_TICK_S / 4)

    def _wait(self, seconds: float) -> None:
        if self._over.wait(seconds):
            raise Cut


class _Exchange:
    """The HTTP/1.1 requests of one connection, one after another."""

    def __init__(self, proxy: Proxy, link: _Link) -> None:
        self._proxy, self._link = proxy, link
        self._rest = {UP: b"", DOWN: b""}

    def carry(self) -> None:
        while head := self._head(UP):
            line = head.split(b"\r\n", 1)[0].decode("latin-1")
            method, path, _ = line.split(" ", 2)
            rule = self._proxy.rule_for(f"{method} {path}") or Rule()
            if _header(head, "expect"):
                head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
                self._link.send(DOWN, b"HTTP/1.1 100 Continue\r\n\r\n")
            if rule.status is not None:
                for _ in self._body(UP, head, is_request=True):
                    pass
                self._link.send(DOWN, _answer(rule, method))
                continue
            self._link.connect()
            self._link.send(UP, head)
            for piece in _altered(self._body(UP, head, is_request=True), flip=rule.flip_up):
                self._link.send(UP, piece)
            if not self._answer(method, rule):
                return

    def _answer(self, method: str, rule: Rule) -> bool:
        """Pass the server's answer on; False where the connection is no longer HTTP, and has ended."""
        head = self._head(DOWN)
        while head and head.startswith(b"HTTP/1.1 1") and not head.startswith(b"HTTP/1.1 101"):
            self._link.send(DOWN, head)
            head = self._head(DOWN)
        if not head or rule.unanswered:
            raise Cut
        self._link.wait(rule.late_s)
        status = int(head.split(b" ", 2)[1])
        bodiless = method == "HEAD" or status in (204, 304)
        measured = bodiless or _header(head, "content-length") is not None or _header(head, "transfer-encoding") is not None
        self._link.cut_down_after = rule.cut_after and rule.cut_after + len(head)
        if status == 101 or not measured:
            self._link.send(DOWN, head + self._rest[DOWN])
            if self._rest[UP]:
                self._link.send(UP, self._rest[UP])
            self._proxy.both_ways(self._link)
            return False
        body = iter(()) if bodiless else self._body(DOWN, head, is_request=False)
        size = int(_header(head, "content-length") or 0)
        share = rule.truncate if rule.truncate is not None else rule.shorten
        keep = None if share is None or bodiless else int(size * share)
        if keep is not None and rule.shorten is not None:
            head = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % keep, head)
        self._link.send(DOWN, head)
        for piece in _altered(body, flip=rule.flip):
            passed = piece if keep is None else piece[:keep]
            keep = None if keep is None else keep - len(passed)
            if passed:
                self._link.send(DOWN, passed)
        if rule.truncate is not None and not bodiless:
            return False
        self._link.cut_down_after = None
        return True

    def _head(self, way: str) -> bytes:
        """A request's or answer's first line and headers; b"" where none comes any more."""
        while b"\r\n\r\n" not in self._rest[way]:
            more = self._link.receive(way)
            if not more:
                return b""
            self._rest[way] += more
        head, _, self._rest[way] = self._rest[way].partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def _body(self, way: str, head: bytes, *, is_request: bool) -> Iterator[bytes]:
        """The body as it is on the wire, chunks with their frames."""
        if (_header(head, "transfer-encoding") or "").lower() == "chunked":
            while True:
                line = self._line(way)
                yield line
                size = int(line.split(b";")[0], 16)
                yield from self._exactly(way, size + 2)
                if size == 0:
                    return
        length = _header(head, "content-length")
        if length is not None or is_request:
            yield from self._exactly(way, int(length or 0))

    def _line(self, way: str) -> bytes:
        while b"\r\n" not in self._rest[way]:
            self._more(way)
        line, _, self._rest[way] = self._rest[way].partition(b"\r\n")
        return line + b"\r\n"

    def _exactly(self, way: str, count: int) -> Iterator[bytes]:
        while count:
            if not self._rest[way]:
                self._more(way)
            piece, self._rest[way] = self._rest[way][:count], self._rest[way][count:]
            count -= len(piece)
            yield piece

    def _more(self, way: str) -> None:
        more = self._link.receive(way)
        if not more:
            raise Cut
        self._rest[way] += more


def _altered(body: Iterator[bytes], *, flip: bool) -> Iterator[bytes]:
    for piece in body:
        if flip:
            middle = len(piece) // 2
            piece = piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
            flip = False
        yield piece


def _answer(rule: Rule, method: str) -> bytes:
    headers = {"Content-Type": "text/plain", **rule.headers, "Content-Length": str(len(rule.body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {rule.status} Fault\r\n{lines}\r\n".encode()
    return head if method == "HEAD" else head + rule.body


def _header(head: bytes, name: str) -> str | None:
    found = re.search(rb"(?i)\r\n" + name.encode() + rb": *([^\r]*)", head)
    return found[1].decode("latin-1").strip() if found else None


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
