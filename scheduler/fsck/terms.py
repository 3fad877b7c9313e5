"""What the checks are given, and what they say."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import sqlalchemy as sa

from millrace.errors import MillraceError
from millrace.settings import Settings
from millrace.storage import Store
from millrace.vocabulary import BuildState
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.models import Build
from scheduler.states import HELD, TERMINAL

SHOWN: Final = 50
"""So many faults of one invariant are told; more are only said to be there."""
HELD_NAMES: Final = tuple(state.value for state in HELD)
TERMINAL_NAMES: Final = tuple(sorted(state.value for state in TERMINAL))
QUEUED: Final = BuildState.QUEUED.value


class Standing(StrEnum):
    """How an invariant stands."""

    OK = "ok"
    VIOLATED = "violated"
    UNCHECKED = "cannot be checked here"
    NOT_BUILT = "not built yet"


class NotHere(MillraceError):
    """The check needs what this call was not given; not a failure."""

    code = "not_here"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong, with the ids of what it is about.

    `repair` names the repair that `--repair` carries out, "" where none is safe; `hint` says what else to do.
    """

    what: str
    ids: tuple[str, ...] = ()
    repair: str = ""
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How one invariant stands. `note` says how much was looked at, or why it was not; `away`: a part did not answer."""

    number: int
    name: str
    standing: Standing
    note: str = ""
    faults: tuple[Fault, ...] = ()
    away: bool = False


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A container, volume, network or workspace on a worker's host that carries our mark.

    `lives`: a process of a worker holds it, with a build or waiting for one. `attempt` is the UUID of its build and the attempt's
    number, None where its mark does not say.
    """

    kind: str
    name: str
    attempt: tuple[str, int] | None
    age_s: float
    lives: bool = False
    size_bytes: int = 0


class Host(Protocol):
    """A worker's host. Raises MillraceError where its engine does not answer."""

    def things(self) -> Sequence[Thing]:
        """Everything there that an attempt could have left."""

    def clean(self) -> int:
        """Remove what belongs to no living attempt; how many things that were."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is looked at, and with what. None: not given, so that what needs it cannot be checked.

    `since_ms`: builds that were submitted before and have ended are left out. `objects`: so many objects are read back, newest
    first; None for all. `at_rest`: nothing is meant to run any more.
    `look_again_s`: how long after a doubt about the queue it is looked at again; `host_patience_s`: how long what nobody holds on
    a host may take to go.
    """

    db: Database
    settings: Settings
    store: Store | None = None
    bell: Bell | None = None
    host: Host | None = None
    journal: Sequence[Mapping[str, Any]] | None = None
    canaries: Sequence[str] = ()
    since_ms: int | None = None
    objects: int | None = 200
    at_rest: bool = False
    look_again_s: float = 12.0
    host_patience_s: float = 90.0
    memo: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, look: Callable[[], Any]) -> Any:
        """What `look` returned the first time."""
        if name not in self.memo:
            self.memo[name] = look()
        return self.memo[name]

    def recent(self) -> Sequence[sa.ColumnElement[bool]]:
        """The builds that are looked at, as conditions."""
        if self.since_ms is None:
            return ()
        return (sa.or_(Build.submitted_ms >= self.since_ms, Build.state.not_in(TERMINAL_NAMES)),)

    def rows(self, query: sa.Select[Any]) -> Sequence[Any]:
        """The first rows of a query that finds what is wrong."""
        with self.db.reading() as session:
            return session.execute(query.limit(SHOWN + 1)).all()


Said = tuple[str, Sequence[Fault]]
"""What a check says: how much it looked at, and what is wrong."""
Check = Callable[[Scope], Said]


def said(note: str, faults: Iterable[Fault]) -> Said:
    """A check's answer."""
    return note, list(faults)
