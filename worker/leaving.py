"""That a worker leaves: who asked for it, and how long the builds that it has may still take."""

import math
import threading
import time
from collections.abc import Callable


class Leaving:
    """May be asked for by many: the farm, a signal, a notice of the host's. The first says why, the one in most haste how long.

    It waits for no lock, as the handler of a signal may be what asks.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._asked: list[tuple[str, float]] = []
        self.begun = threading.Event()

    def ask(self, why: str, within_s: float = math.inf) -> None:
        """Claim nothing more, finish what is there within `within_s`, hand back the rest, and go."""
        self._asked.append((why, self._monotonic() + within_s))
        self.begun.set()

    @property
    def why(self) -> str:
        """What was asked first; empty where nobody did."""
        return self._asked[0][0] if self._asked else ""

    @property
    def left_s(self) -> float:
        """How long builds may still take."""
        return max(0.0, min((until for _why, until in list(self._asked)), default=math.inf) - self._monotonic())
