"""A name server of a test's own, which knows no name, one, or is silent; and processes for which it is the only one."""

import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESS = "127.0.0.77"
_SERVFAIL = 2


@dataclass
class Resolver:
    """Answers every A query with 127.0.0.1, but the next `failing` queries with SERVFAIL; none while it is `silent`.

    `prefix` is put before a command that shall ask nobody else.
    """

    prefix: tuple[str, ...]
    failing: int = 0
    silent: bool = False
    asked: int = 0

    def answer(self, query: bytes) -> bytes | None:
        """What is sent back (RFC 1035, section 4); None for silence."""
        self.asked += 1
        if self.silent:
            return None
        question = query[12 : query.index(b"\0", 12) + 5]
        kind = struct.unpack("!H", question[-4:-2])[0]
        if self.failing > 0:
            self.failing -= 1
            return query[:2] + struct.pack("!5H", 0x8180 | _SERVFAIL, 1, 0, 0, 0) + question
        record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton("127.0.0.1") if kind == 1 else b""
        return query[:2] + struct.pack("!5H", 0x8180, 1, 1 if record else 0, 0, 0) + question + record


@contextmanager
def running() -> Iterator[Resolver]:
    """A server on port 53 of a loopback address, for as long as the block takes. Needs root."""
    with tempfile.TemporaryDirectory(prefix="mr-dns-") as folder, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        conf = Path(folder) / "resolv.conf"
        conf.write_text(f"nameserver {ADDRESS}\noptions timeout:1 attempts:1\n")
        mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        server = Resolver(("unshare", "--mount", "--propagation", "private", "sh", "-c", mount, str(conf)))
        end.bind((ADDRESS, 53))
        end.settimeout(0.1)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    query, client = end.recvfrom(4096)
                except TimeoutError:
                    continue
                if (said := server.answer(query)) is not None:
                    end.sendto(said, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            over.set()
            thread.join()
