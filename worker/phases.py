"""What became of an attempt's phases, on its way to the API: beside the build, in order, and only the last word of each."""

import threading
from collections.abc import Callable, Sequence
from typing import Final

from buildenv.run import StopSignal
from millrace.contract import PhaseReport
from millrace.errors import AttemptFenced, MillraceError, Unavailable
from millrace.log import get_logger
from millrace.vocabulary import PhaseType, Reason

log = get_logger(__name__)
_LINGER_S: Final = 0.1
"""How long a report waits for more, and for the verdict, which then takes it along."""


class PhaseTeller:
    """Takes reports from the build's thread and sends them from its own. `send(reports)` blocks and raises ours."""

    def __init__(self, send: Callable[[Sequence[PhaseReport]], None], stop: StopSignal) -> None:
        self._send, self._stop = send, stop
        self._changed = threading.Condition()
        self._waiting: dict[PhaseType, PhaseReport] = {}
        self._closed = False
        self._fenced: AttemptFenced | None = None
        self._thread = threading.Thread(target=self._run, name="phases", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def tell(self, report: PhaseReport) -> None:
        """A phase began or ended. Raises AttemptFenced where an earlier report was refused so."""
        with self._changed:
            if self._fenced is not None:
                raise self._fenced
            self._waiting[report.phase_type] = report
            self._changed.notify_all()

    def close(self, within_s: float) -> tuple[PhaseReport, ...]:
        """Send no more; what was not sent yet. What is on its way is waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(within_s)
        with self._changed:
            return tuple(self._waiting.values())

    def _run(self) -> None:
        while reports := self._take():
            try:
                self._send(reports)
            except AttemptFenced as error:
                with self._changed:
                    self._fenced = error
                self._stop.set(Reason.WORKER_LOST)
                return
            except Unavailable as error:  # the heartbeat says when it is enough
                log.warning("phases.delayed", why=error.message)
                with self._changed:
                    self._waiting = {one.phase_type: one for one in reports} | self._waiting
                    self._changed.wait(1)
            except MillraceError as error:
                log.error("phases.refused", why=error.message)

    def _take(self) -> tuple[PhaseReport, ...]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._changed.wait_for(lambda: self._closed, _LINGER_S)
            if self._closed:
                return ()
            reports, self._waiting = tuple(self._waiting.values()), {}
            return reports
