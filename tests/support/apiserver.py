"""The API as its own processes on a real socket, over records and a store that the test works on, too."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from millrace.settings import Settings, for_children
from millrace.storage import Store
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import TokenScope
from scheduler import tokens
from scheduler.db import Database
from tests.support.farm import wait_until


@dataclass
class ApiServer:
    """A server that runs, and what it serves."""

    process: subprocess.Popen[bytes]
    url: str
    settings: Settings
    db: Database
    store: Store
    token: str
    worker_token: str
    log: Path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def worker_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.worker_token}"}

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=20, **options)  # type: ignore[arg-type]

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, headers=self.headers, json=body, timeout=20)

    def stop(self) -> None:
        """Tell it to stop, and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0


@contextlib.contextmanager
def serving(db: Database, settings: Settings, *, threads: int = 8, processes: int = 1, **more: str) -> Iterator[ApiServer]:
    """A server on a port of its own, with an admin token and a worker's, and `more` settings. Else its Redis is not there."""
    home = settings.home
    home.mkdir(parents=True, exist_ok=True)
    key = settings.signing_key
    assert key is not None
    ready, log = home / "ready", home / "api.log"
    environment = {
        **for_children(os.environ),
        "MILLRACE_DATA_DIR": str(home),
        "MILLRACE_DATABASE_URL": db.url,
        "MILLRACE_STORE_URL": (home / "objects").as_uri(),
        "MILLRACE_SIGNING_KEY": key.get_secret_value(),
        "MILLRACE_BIND": "127.0.0.1:0",
        "MILLRACE_API_WORKERS": str(processes),
        "MILLRACE_API_THREADS": str(threads),
        "MILLRACE_LOG_FORMAT": "json",
        **more,
    }
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "millrace.cli", "api", "--ready-file", str(ready)],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield ApiServer(
            process=process,
            url=ready.read_text(),
            settings=settings,
            db=db,
            store=DirectoryStore(home / "objects", key.get_secret_value().encode()),
            token=tokens.create(db, "admin", TokenScope.ADMIN),
            worker_token=tokens.create(db, "worker", TokenScope.WORKER),
            log=log,
        )
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        ready.unlink(missing_ok=True)
