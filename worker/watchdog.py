"""Ends a worker that lives and hears nothing, so that its supervisor starts a fresh one. The attempts go on without it.

Two things can make it deaf: the loop that asks for builds does not turn any more (a call that never comes back), or the bells
that Redis holds for its fleet do not reach it (its consumer has died, or hangs on a connection that carries nothing).
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from millrace.log import get_logger

log = get_logger(__name__)
EXIT_DEAF: Final = 75
"""EX_TEMPFAIL: try it again."""
_ROUND_S: Final = 5.0
STUCK_S: Final = 180.0
"""How long one turn of the loop may take: longer than the calls in it, which all have a time limit."""
DEAF_S: Final = 120.0
"""How long bells may wait, while none is heard: longer than most troubles of Redis last, as it asks for builds all the same."""


class Watchdog:
    """`turned_s` says when the loop last turned, `heard_s` when a bell was last heard (both monotonic), `waiting` how many bells
    wait in Redis (None: it does not say), and `end` ends the process.
    """

    def __init__(
        self,
        *,
        turned_s: Callable[[], float],
        heard_s: Callable[[], float],
        waiting: Callable[[], int | None],
        end: Callable[[], object] = lambda: os._exit(EXIT_DEAF),
    ) -> None:
        self._turned_s, self._heard_s, self._waiting, self._end = turned_s, heard_s, waiting, end
        self._unheard_since_s: float | None = None

    def look(self, now_s: float) -> str:
        """What is wrong at this moment, for people; empty where nothing is."""
        if now_s - self._turned_s() > STUCK_S:
            return f"it has not asked for builds for {now_s - self._turned_s():.0f} s"
        if not self._waiting():
            self._unheard_since_s = None
            return ""
        since = self._unheard_since_s = max(self._unheard_since_s or now_s, self._heard_s())
        return f"bells have waited for {now_s - since:.0f} s and none reaches it" if now_s - since > DEAF_S else ""

    def watch(self, stop: threading.Event) -> None:
        """Look every few seconds until `stop`."""
        while not stop.wait(_ROUND_S):
            wrong = self.look(time.monotonic())
            if wrong:
                log.error("worker.deaf", why=wrong, hint="It ends, so that its supervisor starts it again.")
                faulthandler.dump_traceback(sys.stderr)
                self._end()
                return
