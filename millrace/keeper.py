"""Keeps the worker processes that fleets order of this box (`scheduler.fleets.notes`), as a part of the supervisor.

A process is there as long as its order lies there: one that crashes is started again. One that ends by itself with status 0 has
left, as it was asked to or as somebody told it to, and with it goes its order; who wants another orders another.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from millrace.log import get_logger
from millrace.parts import Part
from scheduler.fleets import notes

log = get_logger(__name__)


class Keeper:
    """`command` and `environment` are those of any worker of this box; their output goes to the log of the worker."""

    def __init__(self, home: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._home, self._command, self._environment = home, list(command), dict(environment)
        self._kept: dict[str, Part] = {}
        self._fleets: dict[str, notes.OrderNote] = {}
        self._unreadable: set[str] = set()
        self._ending: set[str] = set()
        notes.clear(home)

    @property
    def parts(self) -> list[Part]:
        """All that run, or will again."""
        return list(self._kept.values())

    def tend(self) -> None:
        """Start what is ordered, end what no longer is, and note what ended by itself. Next to free where nothing is new."""
        wanted = set(notes.ordered(self._home))
        self._unreadable &= wanted
        for process_id in sorted(wanted - set(self._kept) - self._unreadable):
            self._take(process_id)
        for process_id, part in list(self._kept.items()):
            self._tend(process_id, part, process_id in wanted)

    def _take(self, process_id: str) -> None:
        note = notes.order(self._home, process_id)
        if note is None:
            self._unreadable.add(process_id)  # or taken away again, which the next look shows
            return
        environment = {**self._environment, **note.environment, "MILLRACE_WORKER_ID": process_id}
        self._kept[process_id] = Part(name=process_id, command=self._command, environment=environment, log_name="worker")
        self._fleets[process_id] = note

    def _tend(self, process_id: str, part: Part, wanted: bool) -> None:
        status = part.ended()
        if status is not None:
            was_told = process_id in self._ending  # it may hear that after its last word, and ends by it
            log.log(20 if status == 0 or was_told else 40, "instance.ended", instance=process_id, status=status, wanted=wanted)
            notes.drop_run(self._home, process_id)
            if status == 0:
                notes.drop_order(self._home, process_id)
                wanted = False
        if not wanted:
            if part.process is None:
                notes.drop_run(self._home, process_id)
                del self._kept[process_id], self._fleets[process_id]
                self._ending.discard(process_id)
            elif process_id not in self._ending:  # once: a second signal would not let it finish
                self._ending.add(process_id)
                part.terminate()
        elif part.may_start() and part.start(self._home / "logs") and part.process is not None:
            note = self._fleets[process_id]
            notes.put_run(
                self._home,
                process_id,
                notes.RunNote(
                    fleet=note.fleet, generation=note.generation, pid=part.process.pid, started_ms=int(time.time() * 1000)
                ),
            )
