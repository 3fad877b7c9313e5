"""Places at which a test has the farm die, fail or wait: before and after each commit, and each call to what lies outside.

Nothing happens at them unless `arm` was called, which `MILLRACE_FAILPOINT=NAME[:NTH][:ACTION]` does, and only together with
`MILLRACE_TESTING=1`. NAME is a place of `POINTS` with `.before` or `.after`; NTH counts a process's passes, from 1; ACTION is
`kill` (SIGKILL to the own process), `raise` (an error as that call raises it) or `delay` (two seconds). It happens once in a
farm, also where the process is started again.

`MILLRACE_FAILPOINT=watch` has all processes of a farm note the places that they pass, a line each in `failpoints.passed`, and do
what the file `failpoint.armed` says while it is there, once: so that one farm is killed at many places, one after another.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")
_DELAY_S: Final = 2.0
ACTIONS: Final = ("kill", "raise", "delay")
MARK: Final = "failpoint.fired"
"""The file in the farm's data folder that says that it happened: what was asked for."""
WATCH: Final = "watch"
ORDER: Final = "failpoint.armed"
PASSED: Final = "failpoints.passed"

COMMITS: Final = (
    "attempts.find_cache",
    "attempts.has_parts",
    "attempts.note_parts",
    "attempts.record_phase",
    "attempts.settings_of",
    "attempts.store_log",
    "caches.drop",
    "caches.lose",
    "caches.make_room",
    "caches.remove",
    "dispatch._note",
    "dispatch._note_rung",
    "drain.Clerk._give_up",
    "drain.Clerk._take",
    "fleets.ledger.forget",
    "fleets.ledger.note_decision",
    "fleets.ledger.note_instances",
    "fleets.marks.ask_to_leave",
    "fleets.marks.let_go",
    "fleets.marks.take_back",
    "fleets.overflow.move",
    "fleets.records._write",
    "fleets.upgrades.begin",
    "fleets.upgrades.go_back",
    "fleets.upgrades.take",
    "held.Held._note",
    "hooks.approve",
    "hooks.create",
    "hooks.delete",
    "hooks.receive",
    "hooks.reseal",
    "hooks.rotate",
    "hooks.set_provider_hook",
    "hooks.update",
    "inbox.Inbox._commit",
    "intake._once",
    "leases._end_each",
    "leases.claim",
    "leases.renew",
    "lifecycle.finish",
    "lifecycle.request_stop",
    "messenger.Messenger._hold",
    "messenger.Messenger._note",
    "messenger.Messenger._postpone",
    "messenger.Messenger._settle_older",
    "missed.CatchUp._moved",
    "notices.resend",
    "projects.create",
    "projects.delete",
    "projects.update",
    "publication.Publisher._publish",
    "redelivery.Redelivery._note",
    "secrets.delete",
    "secrets.put",
    "secrets.reseal",
    "sweeper.Sweeper._drop_loser",
    "sweeper.Sweeper._forget_old_rows",
    "sweeper.Sweeper._lead",
    "sweeper.Sweeper._now_in_store",
    "sweeper.Sweeper._resign",
    "tokens.create",
    "tokens.revoke",
    "wishes.Wishes._postpone",
    "wishes.Wishes._settle",
)
"""Functions of `scheduler` that commit by `Database.run`, but for those of `millrace backup` and `millrace fsck`."""
ENGINE: Final = (
    "attach",
    "copy_in",
    "copy_out",
    "create",
    "ensure_image",
    "info",
    "leftovers",
    "pid",
    "remove",
    "rename",
    "start",
    "state",
    "stop",
)
STORE: Final = (
    "abort_parts",
    "begin_parts",
    "check",
    "complete_parts",
    "copy",
    "delete",
    "delete_prefix",
    "list",
    "open",
    "presign",
    "presign_part",
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
    for kind, names in (
        ("commit", COMMITS),
        ("bell", ("ring",)),
        ("notice", ("send",)),
        ("store", STORE),
        ("engine", ENGINE),
        ("verb", VERBS),
    )
    for name in names
    for side in ("before", "after")
)


@dataclass
class _Armed:
    """What this process does at failpoints. `order` None: what the file `ORDER` says at that moment."""

    home: Path
    order: str | None
    noted: set[str] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def passing(self, name: str) -> str | None:
        """The action that is due here, which from then on is due nowhere."""
        with self.lock:
            order = self.order or self._watched(name)
            if order is None:
                return None
            due, nth, action = parse(order)
            if name != due:
                return None
            self.seen[order] += 1
            return action if self.seen[order] == nth and self._take(order) else None

    def _watched(self, name: str) -> str | None:
        if name not in self.noted:
            self.noted.add(name)
            with open(self.home / PASSED, "a") as file:
                file.write(f"{name}\n")
        try:
            return (self.home / ORDER).read_text()
        except FileNotFoundError:
            return None

    def _take(self, order: str) -> bool:
        try:
            if self.order is None:
                os.rename(self.home / ORDER, self.home / MARK)
                return True
            with open(self.home / MARK, "x") as file:
                file.write(order)
        except (FileExistsError, FileNotFoundError):
            return False
        return True


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
    _armed = None if text is None else _Armed(home, None if text == WATCH else text)


def failpoint(name: str, error: Callable[[str], Exception]) -> None:
    """A place where the process may be made to die. `error` makes what the call here raises when it fails."""
    if _armed is None:
        return
    action = _armed.passing(name)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise error(f"failpoint {name}")
    if action == "delay":
        time.sleep(_DELAY_S)


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
        if not callable(found) or name == "close":
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            failpoint(f"{self._kind}.{name}.before", self._error)
            done = found(*args, **kwargs)
            failpoint(f"{self._kind}.{name}.after", self._error)
            return done

        return call
