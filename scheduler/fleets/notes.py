"""Notes by which the scheduler orders worker processes of the supervisor of `millrace up`, which alone can start them.

`<data>/fleet/ID.json` is an order: a process is to be there as long as it lies there. `ID.run` is the supervisor's answer: which
process it is. Who orders writes and removes the first, the supervisor (`millrace.keeper`) the second; and where a worker has
left by itself, the supervisor takes the order away, too. Both appear and vanish whole.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import Field, ValidationError

from millrace.log import get_logger
from millrace.project import Shape

log = get_logger(__name__)
_ORDER, _RUN = ".json", ".run"


class OrderNote(Shape):
    """A process that is wanted. `environment`: settings of its worker, over those that all workers of this box have."""

    fleet: str
    generation: int | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    ordered_ms: int


class RunNote(Shape):
    """The process of an order, as it runs now."""

    fleet: str
    generation: int | None = None
    pid: int
    started_ms: int


N = TypeVar("N", OrderNote, RunNote)


def folder_of(home: Path) -> Path:
    """Where a farm's notes lie."""
    return home / "fleet"


def orders(home: Path) -> dict[str, OrderNote]:
    """All processes that are wanted, by id."""
    return dict(_read(folder_of(home), _ORDER, OrderNote))


def ordered(home: Path) -> list[str]:
    """Their ids alone, in the order in which they were asked for as far as names tell."""
    return sorted(path.stem for path in folder_of(home).glob(f"*{_ORDER}"))


def order(home: Path, process_id: str) -> OrderNote | None:
    """One of them; None where it is not wanted any more, or cannot be read."""
    return _load(folder_of(home) / f"{process_id}{_ORDER}", OrderNote)


def runs(home: Path) -> dict[str, RunNote]:
    """All processes that run, by id."""
    return dict(_read(folder_of(home), _RUN, RunNote))


def put_order(home: Path, process_id: str, note: OrderNote) -> None:
    """Want a process."""
    _write(folder_of(home) / f"{process_id}{_ORDER}", note)


def put_run(home: Path, process_id: str, note: RunNote) -> None:
    """Say which process it is."""
    _write(folder_of(home) / f"{process_id}{_RUN}", note)


def drop_order(home: Path, process_id: str) -> None:
    """Want it no longer."""
    (folder_of(home) / f"{process_id}{_ORDER}").unlink(missing_ok=True)


def drop_run(home: Path, process_id: str) -> None:
    """It runs no longer."""
    (folder_of(home) / f"{process_id}{_RUN}").unlink(missing_ok=True)


def clear(home: Path) -> None:
    """Away with all notes: no process of theirs outlives the supervisor that started it."""
    for path in folder_of(home).glob("*"):
        path.unlink(missing_ok=True)


def _write(path: Path, note: Shape) -> None:
    path.parent.mkdir(exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(note.model_dump_json(by_alias=True))
    temporary.replace(path)


def _read(folder: Path, suffix: str, kind: type[N]) -> Iterator[tuple[str, N]]:
    for path in sorted(folder.glob(f"*{suffix}")):
        note = _load(path, kind)
        if note is not None:
            yield path.stem, note


def _load(path: Path, kind: type[N]) -> N | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None  # it was taken away just now
    except ValidationError as error:
        log.warning("note.unreadable", note=path.name, why=f"{error.error_count()} problems")
        return None
