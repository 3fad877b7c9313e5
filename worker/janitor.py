"""Removes what dead attempts left on this host, containers with our labels and workspaces, and what mirrors take too much room.

An attempt lives as long as its process holds the lock of its workspace. A container or workspace whose lock is free, and
which is older than a start takes, belongs to nobody.
"""

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from buildenv.engine import LABEL_ATTEMPT, LABEL_BUILD, LABEL_PLACE, LABEL_WORKSPACES, Engine, Leftover
from millrace.errors import MillraceError
from millrace.ids import uuid_of
from millrace.locks import is_held
from millrace.log import get_logger
from worker.attempt import lock_of

log = get_logger(__name__)
ROUND_S: Final = 30.0
"""So that with a round that fails, and what is `YOUNG_S`, a leftover is gone within 90 s."""
YOUNG_S: Final = 15.0
"""What is younger may belong to an attempt that has not locked its workspace yet."""


class Janitor:
    """Looks after one host's `workspaces` folder and its containers. Other farms on the host are left alone.

    Each round does the `chores`, too.
    """

    def __init__(self, engine: Engine, workspaces: Path, *chores: Callable[[], object]) -> None:
        self._engine, self._workspaces, self._chores = engine, workspaces, chores

    def run_forever(self, stop: threading.Event) -> None:
        """A round at once, and one each `ROUND_S`."""
        while not stop.is_set():
            for chore in (self.clean, *self._chores):
                try:
                    chore()
                except (MillraceError, OSError) as error:
                    log.warning("janitor.failed", why=str(error))
            stop.wait(ROUND_S)

    def clean(self, *, young_s: float = YOUNG_S) -> int:
        """One round; how many containers and workspaces were removed. What cannot be removed holds up nothing else."""
        removed = 0
        for leftover in self._leftovers({LABEL_WORKSPACES: str(self._workspaces)}):
            if abs(time.time() - leftover.created_at_s) > young_s and not self._lives(leftover.labels) and self._end(leftover):
                log.warning(
                    "container.orphan_removed",
                    container=leftover.container_id[:12],
                    build_id=leftover.labels.get(LABEL_BUILD, ""),
                )
                removed += 1
        return removed + self._clean_workspaces(young_s)

    def clear(self, place: str) -> None:
        """Remove what a process left that is known to be dead."""
        gone = [self._end(one) for one in self._leftovers({LABEL_WORKSPACES: str(self._workspaces), LABEL_PLACE: place})]
        if not all(gone):
            return  # its folder is still in use; the next round comes back for both
        self._remove(self._workspaces / place)
        lock_of(self._workspaces, place).unlink(missing_ok=True)

    def _leftovers(self, labels: Mapping[str, str]) -> list[Leftover]:
        try:
            return list(self._engine.leftovers(labels))
        except MillraceError as error:
            log.warning("janitor.failed", what="containers", why=error.message)
            return []

    def _end(self, leftover: Leftover) -> bool:
        try:
            self._engine.remove(leftover.container_id)
        except MillraceError as error:
            log.warning("container.not_removed", container=leftover.container_id[:12], why=error.message)
            return False
        return True

    def _lives(self, labels: Mapping[str, str]) -> bool:
        place = labels.get(LABEL_PLACE) or f"{uuid_of(labels.get(LABEL_BUILD, ''))}-{labels.get(LABEL_ATTEMPT, '')}"
        return "/" not in place and is_held(lock_of(self._workspaces, place))

    def _clean_workspaces(self, young_s: float) -> int:
        if not self._workspaces.is_dir():
            return 0
        removed = 0
        for entry in sorted(self._workspaces.iterdir()):
            with suppress(FileNotFoundError):
                if abs(time.time() - entry.stat().st_mtime) < young_s:  # what lies ahead was made before the clock was set back
                    continue
                lock = entry if entry.suffix == ".lock" else entry.with_name(f"{entry.name}.lock")
                if is_held(lock):
                    continue
                if entry.suffix == ".lock":
                    entry.unlink()
                else:
                    self._remove(entry)
                    log.warning("workspace.orphan_removed", workspace=entry.name)
                    removed += 1
        return removed

    @staticmethod
    def _remove(workspace: Path) -> None:
        try:
            shutil.rmtree(workspace)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("workspace.not_removed", workspace=workspace.name, why=str(error))
