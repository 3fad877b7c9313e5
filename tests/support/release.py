"""The last release, as its own processes: its packages lie as an archive in tests/data/releases, and run in this environment."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from millrace.ids import new_secret
from millrace.settings import for_children
from tests.support.farm import QUICK, Farm, wait_until
from tests.support.postgres import spare_port

ROOT = Path(__file__).parents[2]
LAST = ROOT / "tests" / "data" / "releases" / "0.1.tar.xz"


def unpack(folder: Path) -> Path:
    """The packages of the last release."""
    with tarfile.open(LAST) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Parts:
    """A farm of which each part is of the release that a test says. `farm` is it for those who use it."""

    def __init__(self, home: Path, database: str, broker: str) -> None:
        data = home / "data"
        data.mkdir(parents=True)
        self.token, worker_token = new_secret("pat"), new_secret("wrk")
        address = f"127.0.0.1:{spare_port()}"
        self.environment = {
            **for_children(os.environ),
            **QUICK,
            "MILLRACE_LEASE_TTL_S": "30",  # an API that is restarted is away for some seconds
            "MILLRACE_SELF_FENCE_S": "25",
            "MILLRACE_DATA_DIR": str(data),
            "MILLRACE_DATABASE_URL": database,
            "MILLRACE_BROKER_URL": broker,
            "MILLRACE_BIND": address,
            "MILLRACE_API_URL": f"http://{address}",
            "MILLRACE_SIGNING_KEY": "k" * 64,
            "MILLRACE_TOKEN": self.token,
            "MILLRACE_WORKER_TOKEN": worker_token,
            "MILLRACE_DRAIN_S": "2",
        }
        (data / "farm.json").write_text(json.dumps({"api": f"http://{address}", "pid": 0}))
        (data / "admin.token").write_text(self.token)
        self.farm = Farm(home=home, environment=self.environment)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def call(self, *arguments: str, release: Path = ROOT) -> None:
        """One command of `release`, which must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "millrace.cli", *arguments],
            env=self._environment(release),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, part: str, *, release: Path = ROOT) -> None:
        """Start the API, scheduler or worker of `release`; the API is waited for."""
        with open(self.log(part), "ab") as out:
            self._running[part] = subprocess.Popen(
                [sys.executable, "-m", "millrace.cli", part],
                env=self._environment(release),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        if part == "api":
            wait_until(lambda: self.farm.client.alive() or self._died(part))

    def _environment(self, release: Path) -> dict[str, str]:
        """What a part of `release` sees: a setting that it does not know would be refused."""
        known = (release / "millrace" / "settings.py").read_text()
        ours = {name for name in self.environment if name.startswith("MILLRACE_")}
        unknown = {name for name in ours if f"    {name.removeprefix('MILLRACE_').lower()}: " not in known}
        return {name: value for name, value in self.environment.items() if name not in unknown} | {"PYTHONPATH": str(release)}

    def log(self, part: str) -> Path:
        """Where a part's own log lies."""
        return self.farm.home / f"{part}.log"

    def _died(self, part: str) -> bool:
        assert self._running[part].poll() is None, self.log(part).read_text()
        return False

    def stop(self, part: str, *, number: int = signal.SIGTERM) -> None:
        """End a part, and wait for that."""
        process = self._running.pop(part)
        process.send_signal(number)
        process.wait(60)

    def stop_all(self) -> None:
        """The worker first, as it hands its builds back."""
        self.farm.hang_up()
        for part in ("worker", "scheduler", "api"):
            if part in self._running:
                self.stop(part)


@contextlib.contextmanager
def parts(home: Path, database: str, broker: str) -> Iterator[Parts]:
    """No part runs yet; at the end, none does."""
    made = Parts(home, database, broker)
    try:
        yield made
    finally:
        made.stop_all()
