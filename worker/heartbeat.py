"""Keeps an attempt's lease while it runs, brings it the wish to stop, and fences it when the farm is out of reach."""

import contextvars
import threading
import time
from collections.abc import Callable

from buildenv.run import StopSignal
from millrace.contract import RenewReply
from millrace.errors import AttemptFenced, MillraceError
from millrace.log import get_logger
from millrace.vocabulary import Reason

log = get_logger(__name__)


class Heartbeat:
    """Renews every `renew_every_s`. Without a renewal for `self_fence_s` the attempt must stop: another may hold its build.

    `renew(patience_s)` is the verb; `clock` is monotonic seconds.
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
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="heartbeat", daemon=True
        )  # its log lines name the build, too

    def start(self) -> None:
        """Begin; the claim counts as the first renewal."""
        self._thread.start()

    def end(self) -> None:
        """No more renewals."""
        self._over.set()

    def beat(self) -> None:
        """One renewal, and what follows from its answer. False alarms are borne until `self_fence_s`."""
        try:
            reply = self._renew(max(0.5, self._renew_every_s / 2))
        except AttemptFenced as error:
            log.warning("attempt.fenced", why=error.message)
            self._stop.set(Reason.WORKER_LOST)
            self._over.set()
            return
        except MillraceError as error:
            silent_s = self._clock() - self._last
            log.warning("lease.not_renewed", silent_s=round(silent_s, 1), why=error.message)
            if silent_s >= self._self_fence_s:
                log.warning("attempt.self_fenced", silent_s=round(silent_s, 1))
                self._stop.set(Reason.WORKER_LOST)
            return
        self._last = self._clock()
        if reply.cancel_requested:
            self._stop.set(Reason.CANCELLED)

    def _run(self) -> None:
        pause_s = self._renew_every_s
        while not self._over.wait(pause_s):
            before = self._last
            self.beat()
            renewed = self._last != before
            pause_s = self._renew_every_s if renewed else min(1.0, self._renew_every_s)
