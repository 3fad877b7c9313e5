"""A real MinIO server for tests, on a spare port of this machine, with its data in a folder of its own.

The program is looked for at `$MILLRACE_MINIO`, in `~/.cache/millrace/bin` and on PATH.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException
from urllib3.exceptions import HTTPError

from tests.support.need import missing


@dataclass
class MinioServer:
    """A server that may be stopped and started again; its port and data stay."""

    program: Path
    folder: Path
    port: int
    access_key: str
    secret_key: str
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        """As `MILLRACE_STORE_URL` takes it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, within_s: float = 30) -> None:
        """Start it, and wait until it takes requests."""
        environment = {
            "PATH": os.defpath,
            "HOME": str(self.folder),
            "MINIO_ROOT_USER": self.access_key,
            "MINIO_ROOT_PASSWORD": self.secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
            "MINIO_CI_CD": "1",  # lets the data lie on the disk of the system
        }
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "minio.log", "ab") as log:
            self.process = subprocess.Popen(
                [self.program, "server", "--quiet", "--address", f"127.0.0.1:{self.port}", data],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + within_s
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                said = (self.folder / "minio.log").read_text(errors="replace")[-2000:]
                self.stop()
                raise RuntimeError(f"MinIO did not start: {said}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it, at once and without ceremony. Its data stay."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            self.process = None

    def _healthy(self) -> bool:
        """True when it takes a signed request: its own health routes say so a moment too early."""
        http = urllib3.PoolManager(timeout=2, retries=False)
        client = Minio(
            f"127.0.0.1:{self.port}",
            access_key=self.access_key,
            secret_key=self.secret_key,
            secure=False,
            region="us-east-1",
            http_client=http,
        )
        try:
            client.bucket_exists("is-it-up")
        except (MinioException, HTTPError):
            return False
        finally:
            http.clear()
        return True


def find_program() -> Path | None:
    """The MinIO program of this machine, or None."""
    named = os.environ.get("MILLRACE_MINIO")
    if named:
        return Path(named)
    kept = sorted((Path.home() / ".cache/millrace/bin").glob("minio-*"))
    if kept:
        return kept[-1]
    found = shutil.which("minio")
    return Path(found) if found else None


def spare_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def minio_server(folder: Path) -> Iterator[MinioServer]:
    """A running server with its data in `folder`. Raises RuntimeError where there is no program for it."""
    program = find_program()
    if program is None:
        raise RuntimeError("there is no MinIO server program on this machine: name one in MILLRACE_MINIO")
    server = MinioServer(program, folder, spare_port(), "millrace", secrets.token_hex(16))
    server.start()
    try:
        yield server
    finally:
        server.stop()


def require_program() -> None:
    """Skip the test where there is no MinIO; fail it in CI."""
    if find_program() is None:
        missing("a MinIO server program", "name one in MILLRACE_MINIO")
