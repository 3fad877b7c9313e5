"""Instances that are worker processes on the box of the embedded farm. Here notes are written; `millrace up` starts them."""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from millrace.errors import InvalidInput, ProviderTrouble
from millrace.locks import held, is_held
from millrace.vocabulary import Trouble
from scheduler.fleets import notes
from scheduler.fleets.provider import Instance, InstanceState, Order, WaitingBuild

_NEEDS: Final = "the provider 'process' starts workers on the box of 'millrace up', and none runs in {home}"


class ProcessProvider:
    """See `scheduler.fleets.provider`."""

    def __init__(self, fleet: str, home: Path) -> None:
        self._fleet, self._home = fleet, home

    def check(self) -> None:
        """A supervisor must be there."""
        if not is_held(self._home / "up.lock"):
            raise InvalidInput(
                _NEEDS.format(home=self._home),
                hint="Start the farm with 'millrace up', or choose another provider: docs/fleets.md lists them.",
            )

    def find(self) -> Sequence[Instance]:
        """Those that are ordered, and those that still run though their order was taken away."""
        if not is_held(self._home / "up.lock"):
            raise ProviderTrouble(Trouble.AWAY, _NEEDS.format(home=self._home), hint="Start the farm with 'millrace up'.")
        runs, orders = notes.runs(self._home), notes.orders(self._home)
        notes_of: dict[str, notes.OrderNote | notes.RunNote] = {**runs, **orders}
        here = {process_id: note for process_id, note in notes_of.items() if note.fleet == self._fleet}
        return [
            Instance(
                id=process_id,
                state=_state(process_id in orders, process_id in runs),
                launched_ms=runs[process_id].started_ms if process_id in runs else None,
                generation=note.generation,
            )
            for process_id, note in sorted(here.items())
        ]

    def grow_to(self, total: int, order: Order, waiting: Sequence[WaitingBuild] = ()) -> None:
        """Write as many notes as are missing."""
        notes.folder_of(self._home).mkdir(exist_ok=True, mode=0o700)
        with held(self._home / "fleet.lock", wait=True):  # so that a scheduler that no longer leads and the one that does add up
            for _ in range(total - len(self.find())):
                notes.put_order(self._home, f"process-{secrets.token_hex(6)}", _note_of(order))

    def release(self, ids: Sequence[str]) -> None:
        """Take the notes away."""
        for process_id in ids:
            note = notes.order(self._home, process_id)
            if note is not None and note.fleet == self._fleet:
                notes.drop_order(self._home, process_id)

    def protect(self, ids: Sequence[str]) -> None:
        """Nobody else ends them."""


def _note_of(order: Order) -> notes.OrderNote:
    return notes.OrderNote(
        fleet=order.fleet,
        generation=order.generation,
        environment=dict(order.environment),
        ordered_ms=int(time.time() * 1000),
    )


def _state(wanted: bool, runs: bool) -> InstanceState:
    if not wanted:
        return InstanceState.STOPPING
    return InstanceState.RUNNING if runs else InstanceState.BOOTING
