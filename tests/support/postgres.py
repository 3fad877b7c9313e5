"""A real PostgreSQL server for tests, on a spare port of this machine, with its data in a folder of its own."""

import os
import pwd
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from tests.support.need import missing

_HOME = Path("/usr/lib/postgresql")


def spare_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PostgresServer:
    """One server with many databases. It may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        versions = sorted(_HOME.glob("*/bin/postgres")) if _HOME.is_dir() else []
        if not versions:
            missing("PostgreSQL's server", "apt-get install postgresql")
        self._bin = versions[-1].parent
        self._data = folder / "data"
        self._log = folder / "postgres.log"
        self.port = spare_port()
        self._user: dict[str, int] = {}
        if os.geteuid() == 0:  # the server refuses to run as root
            who = pwd.getpwnam("postgres")
            self._user = {"user": who.pw_uid, "group": who.pw_gid}
            os.chown(folder, who.pw_uid, who.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--pgdata", str(self._data))

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            env={"LC_ALL": "C.UTF-8"},
            check=False,
            **self._user,
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-c", "fsync=off", "-c", "max_connections=300"]
        with open(self._log, "ab") as out:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", str(self._data), *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                env={"LC_ALL": "C.UTF-8"},
                **self._user,
            )
        until = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres", connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: immediate shutdown
            self._process.wait(20)
            self._process = None

    def pids(self) -> list[int]:
        """The server's first process and its children."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return [self._process.pid, *map(int, children)]

    def log(self) -> str:
        """What the server said."""
        return self._log.read_text(errors="replace")

    def revive(self) -> bool:
        """Start it again where it ended by itself, as its supervisor would; False where it runs."""
        assert self._process is not None
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            return False
        self.start()
        return True

    @staticmethod
    def dsn(url: str) -> str:
        """A database's SQLAlchemy address as psycopg takes it."""
        return url.replace("postgresql+psycopg:", "postgresql:")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Every process of it stands still for as long as the block takes: it takes connections, and never answers."""
        assert self._process is not None
        top = self._process.pid
        children = Path(f"/proc/{top}/task/{top}/children").read_text().split()
        pids = [top, *(int(child) for child in children)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """A new database like `template`, empty by default; its SQLAlchemy address. The server may be stopped and started
        meanwhile."""
        name = f"t{uuid.uuid4().hex}"
        self._administer(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        try:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"
        finally:
            self._administer(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _administer(self, statement: str) -> None:
        with psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)


@contextmanager
def running(within: Path | None = None) -> Iterator[PostgresServer]:
    """A server for as long as the block takes, in a folder (`within` another) that its own user can reach."""
    with tempfile.TemporaryDirectory(prefix="mr-pg-", dir=within) as folder:
        Path(folder).chmod(0o755)
        server = PostgresServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
