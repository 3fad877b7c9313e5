"""The lot: processes, and in them containers, that wait for their builds. Each is used once."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from buildenv.parking import Mould
from millrace.errors import MillraceError
from millrace.log import get_logger
from worker.nursery import Child, Nursery
from worker.order import ParkOrder

log = get_logger(__name__)
HOT_S: Final = 1800.0
"""How long after its last build a mould is still parked for."""
OLD_S: Final = 600.0
"""How long a container waits before a fresh one takes its place."""
_MOST_HOT: Final = 4
_SHY_S: Final = 30.0
"""How long nothing is parked for a mould after that failed."""
_ROUND_S: Final = 10.0
_AFTER_S: Final = 0.25
"""How long the next container waits to be parked after one was taken, so that the build that took it has the host to itself."""
_AFTER_COLD_S: Final = 1.0
"""The same after a mould that was not asked for of late: its build makes a container of its own first."""
_LEAST_MEMORY_BYTES: Final = 1024**3
"""What must be available on the host for another container to be parked."""
PARKED: Final = b"parked"


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A process that waits for its order, at its place; `mould` is that of the container in it, None where it has none."""

    child: Child
    place: str
    mould: Mould | None
    since: float


class Lot:
    """Keeps up to `most` containers parked, for the moulds that were asked for last, and one process without a container."""

    def __init__(self, nursery: Nursery, make_order: Callable[[str, Mould | None], ParkOrder], most: int) -> None:
        self._nursery, self._make_order, self._most = nursery, make_order, most
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._hot: dict[Mould, float] = {}
        self._shy: dict[Mould, float] = {}
        self._stirred = True
        self._closed = False
        self._calm_at = 0.0

    def take(self, mould: Mould) -> Waiting:
        """A process for a build: with a container from `mould`, or without one. Raises Unavailable."""
        with self._changed:
            now = time.monotonic()
            if mould not in self._hot:
                self._calm_at = now + _AFTER_COLD_S
            self._hot[mould] = now
            self._stirred = True
            self._changed.notify_all()
        for wanted in (mould, None):
            while (found := self._pick(wanted)) is not None:
                if not found.child.has_word():  # nothing is said while one waits, but by its end
                    return found
                found.child.close()
        return self._start(None)

    def tend_forever(self, stop: threading.Event) -> None:
        """Park what is asked for, and let go of what is not, until `stop`."""
        while not stop.is_set():
            try:
                self.tend()
            except MillraceError as error:
                log.warning("parking.failed", why=error.message)
            with self._changed:
                until_calm = self._calm_at - time.monotonic()
                self._changed.wait_for(lambda: self._stirred or self._closed, until_calm if until_calm > 0 else _ROUND_S)
                self._changed.wait_for(lambda: self._closed, _AFTER_S)
                self._stirred = False

    def tend(self) -> None:
        """One round: let go of what is old or not asked for any more, then start what is missing, the hottest first."""
        for surplus in self._surplus():
            surplus.child.dismiss()
            threading.Thread(target=_see_off, args=(surplus,), name="parking", daemon=True).start()
        while (missing := self._missing()) is not None:
            mould = missing[0]
            started = self._start(mould)
            with self._changed:
                if started.mould is None and mould is not None:
                    self._shy[mould] = time.monotonic() + _SHY_S
                if self._closed:
                    started.child.dismiss()
                self._waiting.append(started)
            if started.mould is not None:
                log.info("container.parked", place=started.place, image=started.mould.image)

    def close(self) -> None:
        """Let go of all of them; what waits removes its container and ends."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for one in waiting:
            one.child.dismiss()
        for one in waiting:
            _see_off(one)

    def _start(self, mould: Mould | None) -> Waiting:
        place = f"place-{secrets.token_hex(8)}"
        child = self._nursery.child()
        child.send(self._make_order(place, mould).model_dump_json().encode())
        parked = mould is not None and child.receive() == PARKED
        return Waiting(child=child, place=place, mould=mould if parked else None, since=time.monotonic())

    def _pick(self, mould: Mould | None) -> Waiting | None:
        with self._changed:
            for one in self._waiting:
                if one.mould == mould:
                    self._waiting.remove(one)
                    return one
        return None

    def _wanted(self) -> dict[Mould | None, int]:
        """How many should wait of each mould; of None, processes without a container."""
        now = time.monotonic()
        self._hot = {mould: at for mould, at in self._hot.items() if at > now - HOT_S}
        hot = sorted(self._hot, key=lambda mould: -self._hot[mould])[: min(_MOST_HOT, self._most)]
        wanted: dict[Mould | None, int] = dict.fromkeys(hot, 1)
        if hot:
            wanted[hot[0]] = self._most - len(hot) + 1
        wanted[None] = 1
        return wanted

    def _surplus(self) -> list[Waiting]:
        with self._changed:
            wanted, kept, gone = self._wanted(), [], []
            for one in sorted(self._waiting, key=lambda one: -one.since):
                old = one.mould is not None and one.since < time.monotonic() - OLD_S
                if old or one.child.has_word() or wanted.get(one.mould, 0) < 1:
                    gone.append(one)
                else:
                    wanted[one.mould] -= 1
                    kept.append(one)
            self._waiting = kept
            return gone

    def _missing(self) -> tuple[Mould | None] | None:
        """What to start next, in a tuple of one, as it may be None; None where nothing is missing."""
        with self._changed:
            if self._closed:
                return None
            wanted = self._wanted()
            for one in self._waiting:
                wanted[one.mould] = wanted.get(one.mould, 0) - 1
            for mould, count in wanted.items():
                if count < 1:
                    continue
                if mould is None or self._may_park(mould):
                    return (mould,)
            return None

    def _may_park(self, mould: Mould) -> bool:
        now = time.monotonic()
        return now > max(self._calm_at, self._shy.get(mould, 0)) and _available_bytes() > _LEAST_MEMORY_BYTES


def _see_off(one: Waiting) -> None:
    """Wait for its end."""
    while one.child.receive() is not None:
        pass
    one.child.close()


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _LEAST_MEMORY_BYTES + 1
