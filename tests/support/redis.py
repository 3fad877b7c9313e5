"""A real redis-server for tests, on a Unix socket in a folder of its own."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.support.need import missing


class RedisServer:
    """One server. It may be stopped and started again; what it held is then gone, which nothing of ours may mind."""

    def __init__(self, folder: Path) -> None:
        self._program = shutil.which("redis-server")
        if self._program is None:
            missing("redis-server", "apt-get install redis-server")
        self.socket = folder / "redis.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As Celery takes it."""
        return f"redis+socket://{self.socket}"

    def client(self) -> "redis.Redis":
        """A client of our own, to look at what is there."""
        return redis.Redis(unix_socket_path=str(self.socket))

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        command = [str(self._program), "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self._folder)]
        command += options
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


@contextmanager
def running() -> Iterator[RedisServer]:
    """A server for as long as the block takes; its folder's path is short, as a socket's must be."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
