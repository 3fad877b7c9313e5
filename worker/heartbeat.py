"""Keeps an attempt's lease while it runs, brings it the wish to stop, and fences it when the farm is out of reach."""

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Final

from buildenv.run import StopSignal
from millrace.contract import RenewReply
from millrace.errors import AttemptFenced, MillraceError
from millrace.log import get_logger
from millrace.vocabulary import Reason

log = get_logger(__name__)
_LOOK_EVERY_S: Final = 0.5
_HALTED_S: Final = 3.0
"""A longer time between two looks means that the whole process stood still."""


class Heartbeat:
    """Renews every `renew_every_s`. Without a renewal for `self_fence_s` the attempt must stop: another may hold its build.

    `renew(patience_s)` is the verb; `clock` is monotonic seconds. The fence has a thread of its own, as a renewal may hang.
    """

    def __init__(
        self,
        renew: Callable[[float], RenewReply],
        stop: StopSignal,
        *,
        renew_every_s: float,
        self_fence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._renew, self._stop, self._clock = renew, stop, clock
        self._renew_every_s, self._self_fence_s = renew_every_s, self_fence_s
        self._over = threading.Event()
        self._last = clock()
        self._looked = self._awake_since = clock()

    def start(self) -> None:
        """Begin; the claim counts as the first renewal."""
        for name, work in (("heartbeat", self._run), ("fence", self._fence_forever)):
            run = contextvars.copy_context().run  # its log lines name the build, too
            threading.Thread(target=run, args=(work,), name=name, daemon=True).start()

    def end(self) -> None:
        """No more renewals."""
        self._over.set()

    def beat(self) -> None:
        """One renewal, and what follows from its answer. False alarms are borne until `self_fence_s`."""
        try:
            reply = self._renew(self._patience_s)
        except AttemptFenced as error:
            log.warning("attempt.fenced", why=error.message)
            self._stop.set(Reason.WORKER_LOST)
            self._over.set()
            return
        except MillraceError as error:
            silent_s = self._clock() - self._last
            log.warning("lease.not_renewed", silent_s=round(silent_s, 1), why=error.message)
            if silent_s >= self._self_fence_s:
                self._self_fence(silent_s)
            return
        self._last = self._clock()
        if reply.cancel_requested:
            self._stop.set(Reason.CANCELLED)

    def look(self) -> None:
        """Fence where no renewal came for `self_fence_s`, whatever became of the one that is under way.

        A process that was halted finds much time gone when it wakes; its lease may still be good, so it may ask once first.
        """
        now = self._clock()
        if now - self._looked > _HALTED_S:
            self._awake_since = now
        self._looked = now
        silent_s = now - self._last
        if silent_s >= self._self_fence_s and now - self._awake_since > self._patience_s + _LOOK_EVERY_S:
            self._self_fence(silent_s)
            self._over.set()

    @property
    def _patience_s(self) -> float:
        return max(0.5, self._renew_every_s / 2)

    def _self_fence(self, silent_s: float) -> None:
        log.warning("attempt.self_fenced", silent_s=round(silent_s, 1))
        self._stop.set(Reason.WORKER_LOST)

    def _fence_forever(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            self.look()

    def _run(self) -> None:
        pause_s = self._renew_every_s
        while not self._over.wait(pause_s):
            before = self._last
            self.beat()
            renewed = self._last != before
            pause_s = self._renew_every_s if renewed else min(1.0, self._renew_every_s)
