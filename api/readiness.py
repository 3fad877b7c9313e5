"""How the parts are that the API stands on."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from millrace.errors import MillraceError

_PATIENCE_S: Final = 1.0
_FRESH_S: Final = 1.0
_ABSENT: Final = "does not answer"


class Readiness:
    """What each part last said of itself: None for well, else what is wrong.

    Anybody may ask, as often as they like: a part is asked once a second at most, and never again while it has not answered.
    """

    def __init__(self, checks: Mapping[str, Callable[[], str | None]], *, patience_s: float = _PATIENCE_S) -> None:
        self._checks = dict(checks)
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._asked: dict[str, float] = {}
        self._said: dict[str, tuple[float, str | None]] = {}
        self._busy: set[str] = set()

    def look(self) -> dict[str, str | None]:
        """The state of every part, at most a second old. A part that is silent for too long counts as away."""
        now = time.monotonic()
        with self._changed:
            for name in self._checks:
                if name not in self._busy and now - self._asked.get(name, -_FRESH_S) >= _FRESH_S:
                    self._asked[name] = now
                    self._busy.add(name)
                    threading.Thread(target=self._ask, args=(name,), name=f"ready-{name}", daemon=True).start()
            self._changed.wait_for(lambda: all(self._answered(name) for name in self._checks), timeout=self._patience_s)
            return {name: self._said[name][1] if self._answered(name) else _ABSENT for name in self._checks}

    def _answered(self, name: str) -> bool:
        return name in self._said and self._said[name][0] >= self._asked[name]

    def _ask(self, name: str) -> None:
        said: str | None = _ABSENT
        try:
            said = self._checks[name]()
        except MillraceError as error:
            said = error.message
        finally:
            with self._changed:
                self._said[name] = (time.monotonic(), said)
                self._busy.discard(name)
                self._changed.notify_all()


def silent(check: Callable[[], None]) -> Callable[[], str | None]:
    """A check that raises where something is wrong, as one that says so."""

    def ask() -> str | None:
        check()
        return None

    return ask
