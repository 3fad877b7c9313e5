"""Places at which a test has the farm die, fail or wait: before and after each commit, and each call to what lies outside.

Nothing happens at them unless `arm` was called, which `MILLRACE_FAILPOINT=NAME[:NTH][:ACTION]` does, and only together with
`MILLRACE_TESTING=1`. NAME is a place of `POINTS` with `.before` or `.after`; NTH counts a process's passes, from 1; ACTION is
`kill` (SIGKILL to the own process), `raise` (an error as that call raises it) or `delay` (two seconds). It happens once in a
farm, also where the process is started again.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
_DELAY_S: Final = 2.0
ACTIONS: Final = ("kill", "raise", "delay")
MARK: Final = "failpoint.fired"
"""The file in the farm's data folder that says that it happened."""

COMMITS: Final = (
    "attempts.find_cache",
    "attempts.record_phase",
    "attempts.settings_of",
    "attempts.store_log",
    "caches.drop_replaced",
    "dispatch._note",
    "dispatch.ring_now",
    "fleets._write",
    "intake._once",
    "leases._end_each",
    "leases.claim",
    "leases.renew",
    "lifecycle.finish",
    "lifecycle.request_stop",
    "projects.create",
    "projects.delete",
    "projects.update",
    "publication.Publisher._publish",
    "secrets.delete",
    "secrets.put",
    "secrets.reseal",
    "sweeper.Sweeper._drop_losers",
    "sweeper.Sweeper._forget_old_rows",
    "sweeper.Sweeper._lead",
    "sweeper.Sweeper._now_in_store",
    "sweeper.Sweeper._resign",
    "tokens.create",
    "tokens.revoke",
)
"""Functions of `scheduler` that commit by `Database.run`, but for those that only an operator's command calls."""
ENGINE: Final = (
    "attach",
    "copy_in",
    "copy_out",
    "create",
    "ensure_image",
    "info",
    "leftovers",
    "remove",
    "rename",
    "start",
    "state",
    "stop",
)
STORE: Final = (
    "check",
    "copy",
    "delete",
    "delete_prefix",
    "list",
    "open",
    "presign",
    "put",
    "stat",
)
VERBS: Final = (
    "claim",
    "download",
    "find_cache",
    "finish",
    "grant",
    "log",
    "phases",
    "renew",
    "secrets",
    "upload",
)
"""What a worker asks of the API, and of the object store by a grant."""
POINTS: Final = tuple(
    f"{kind}.{name}.{side}"
    for kind, names in (("commit", COMMITS), ("bell", ("ring",)), ("store", STORE), ("engine", ENGINE), ("verb", VERBS))
    for name in names
    for side in ("before", "after")
)


@dataclass
class _Armed:
    name: str
    nth: int
    action: str
    mark: Path
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_armed: _Armed | None = None


def parse(text: str) -> tuple[str, int, str]:
    """Name, number and action. Raises ValueError that says what is wrong."""
    name, *rest = text.split(":")
    nth, action = 1, "kill"
    if rest and rest[0].isdecimal():
        nth = int(rest.pop(0))
    if rest:
        action = rest.pop(0)
    if name not in POINTS:
        raise ValueError(f"there is no failpoint {name!r}; millrace/failpoints.py lists them")
    if rest or action not in ACTIONS or nth < 1:
        raise ValueError(f"a failpoint is NAME[:NTH][:ACTION], with NTH from 1 and ACTION one of {', '.join(ACTIONS)}")
    return name, nth, action


def arm(text: str | None, home: Path) -> None:
    """From now on this process acts at the failpoint of `text`; at none where that is None. `home`: the farm's data folder."""
    global _armed
    _armed = None if text is None else _Armed(*parse(text), mark=home / MARK)


def failpoint(name: str, error: Callable[[str], Exception]) -> None:
    """A place where the process may be made to die. `error` makes what the call here raises when it fails."""
    if _armed is not None and _armed.name == name:
        _act(_armed, error)


def around_commit(work: Callable[..., object], side: str, error: Callable[[str], Exception]) -> None:
    """The failpoint of a commit, named after the function that `work` is written in."""
    if _armed is not None:
        inside = str(getattr(work, "__qualname__", "")).split(".<locals>")[0]
        failpoint(f"commit.{work.__module__.removeprefix('scheduler.')}.{inside}.{side}", error)


def guard(target: T, kind: str, error: Callable[[str], Exception]) -> T:
    """`target`, with failpoints before and after each call of its methods where this process is armed."""
    return target if _armed is None else _Guarded(target, kind, error)  # type: ignore[return-value]  # it has the same methods


class _Guarded:
    def __init__(self, target: object, kind: str, error: Callable[[str], Exception]) -> None:
        self._target, self._kind, self._error = target, kind, error

    @property  # type: ignore[misc]  # so that isinstance sees what is guarded
    def __class__(self) -> type:
        return type(self._target)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            failpoint(f"{self._kind}.{name}.before", self._error)
            done = found(*args, **kwargs)
            failpoint(f"{self._kind}.{name}.after", self._error)
            return done

        return call


def _act(armed: _Armed, error: Callable[[str], Exception]) -> None:
    with armed.lock:
        armed.seen += 1
        if armed.seen != armed.nth:
            return
        try:
            handle = os.open(armed.mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return
        os.write(handle, f"{armed.name} {armed.action}\n".encode())
        os.close(handle)
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if armed.action == "raise":
        raise error(f"failpoint {armed.name}")
    time.sleep(_DELAY_S)
