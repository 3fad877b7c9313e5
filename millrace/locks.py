"""Files that say whether somebody lives: locked as long as their process does, whatever ends it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def held(lock: Path, *, wait: bool = False) -> Iterator[IO[str]]:
    """Hold the lock; the open file may be written to. Raises BlockingIOError where another holds it, unless it is to `wait`."""
    with open(lock, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


def is_held(lock: Path) -> bool:
    """True where a living process holds the lock. The file is not made."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
