"""Files of a build in this very container, as an engine gives them out and takes them in: as tar streams.

A build with a mount namespace of its own has a `view` of it (`mounts.view_of`); None: it sees what the worker sees.
"""

import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Final, cast

from buildenv import mounts
from buildenv.tarstream import Pieces
from millrace.errors import BuildProblem
from millrace.vocabulary import Reason

_PIECE_BYTES: Final = 256 * 1024


def copy_out(path: str, view: int | None) -> Iterator[bytes]:
    """`path`, a link as itself, as a tar stream whose names begin with its own. Raises FileNotFoundError where there is none."""
    there: list[bool] = []
    _seen(view, lambda: there.append(os.path.lexists(path)))
    if not there[0]:
        raise FileNotFoundError(f"the container has no {path}")
    return _stream(Path(path), view)


def _stream(path: Path, view: int | None) -> Iterator[bytes]:
    out, into = os.pipe()
    failed: list[OSError] = []

    def pack() -> None:
        with open(into, "wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            tar.add(path, arcname=path.name or ".")

    def write() -> None:
        try:
            _seen(view, pack)
        except BrokenPipeError:
            return  # who reads has enough
        except OSError as error:
            failed.append(error)

    writer = threading.Thread(target=write, name="copy-out", daemon=True)
    writer.start()
    with open(out, "rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
    writer.join()
    if failed:
        raise failed[0]


def copy_in(folder: str, pieces: Iterable[bytes], view: int | None) -> None:
    """Unpack a tar stream into `folder`, owners and all, as root of a container does. Raises BuildProblem."""
    wrong: list[tarfile.TarError] = []

    def unpack() -> None:
        try:
            _unpack(folder, pieces)
        except tarfile.TarError as error:
            wrong.append(error)

    try:
        _seen(view, unpack)
        if wrong:
            raise wrong[0]
    except (OSError, tarfile.TarError) as error:
        raise BuildProblem(f"the worker cannot unpack into {folder}: {error}", reason=Reason.BAD_IMAGE) from error


def _unpack(folder: str, pieces: Iterable[bytes]) -> None:
    with tarfile.open(fileobj=cast(IO[bytes], Pieces(iter(pieces))), mode="r|") as tar:
        tar.extraction_filter = lambda member, _path: member  # it goes where the build itself may write anything
        tar.extractall(folder, numeric_owner=True)  # noqa: S202  # the same


def _seen(view: int | None, work: Callable[[], None]) -> None:
    if view is None:
        work()
    else:
        mounts.within(view, work)
