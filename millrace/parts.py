"""Processes that the supervisor of `millrace up` starts, and starts again when they end."""

import ctypes
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from millrace.log import get_logger

log = get_logger(__name__)
_PR_SET_PDEATHSIG: Final = 1
_STEADY_S: Final = 60.0
_MOST_WAIT_S: Final = 30.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(kw_only=True)
class Part:
    """One process of the farm. `log_name`: the file that it writes to, its name where it is None. `again_at` is when it may be
    started again after it ended by itself."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log_name: str | None = None
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    failures: int = 0
    again_at: float = 0.0

    @property
    def log_file(self) -> str:
        """The file in the folder of logs that it writes to."""
        return f"{self.log_name or self.name}.log"

    def start(self, logs: Path) -> bool:
        """Start it, unless this host has no room for another process now; then it is tried again later."""
        now = time.monotonic()
        try:
            with open(logs / self.log_file, "ab") as out:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=dict(self.environment),
                    cwd="/",
                    start_new_session=True,  # a Ctrl-C on the terminal is the supervisor's alone to answer
                    preexec_fn=_die_with_parent,  # the supervisor has one thread
                )
        except OSError as error:
            log.error("part.not_started", part=self.name, why=str(error))
            self._wait(now)
            return False
        self.started_at = now
        log.info("part.started", part=self.name, pid=self.process.pid)
        return True

    def ended(self) -> int | None:
        """Its status where it has just ended by itself; then it waits a while before it may be started again."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        now = time.monotonic()
        if now - self.started_at > _STEADY_S:
            self.failures = 0
        self.process = None
        self._wait(now)
        return status

    def may_start(self) -> bool:
        """Whether it does not run, and has waited long enough."""
        return self.process is None and time.monotonic() >= self.again_at

    def terminate(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def await_end(self, within_s: float) -> None:
        """Wait until it has ended, and end it where that takes too long."""
        if self.process is None:
            return
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            log.error("part.killed", part=self.name)
            self.process.kill()
            self.process.wait()
        log.info("part.stopped", part=self.name)

    def _wait(self, now: float) -> None:
        self.failures += 1
        self.again_at = now + min(_MOST_WAIT_S, 0.25 * 2**self.failures)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
