"""Reads the tar streams in which an engine gives out files of a container, entry by entry, trusting nothing."""

import copy
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, cast

CopyOut = Callable[[str], Iterator[bytes]]
"""`Engine.copy_out` of one container: a path to a tar stream; FileNotFoundError where there is none."""
_WILD = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a stream: where it lies in the container, from `/` on, and what it is. `body` is read before the next one."""

    path: str
    info: tarfile.TarInfo
    body: IO[bytes] | None


class Pieces:
    """An iterator of bytes, as the file that `tarfile` reads."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._held = pieces, b""

    def read(self, size: int) -> bytes:
        while len(self._held) < size and (piece := next(self._pieces, None)) is not None:
            self._held += piece
        data, self._held = self._held[:size], self._held[size:]
        return data


def root_of(glob: str) -> str:
    """The longest folder, or the file, that an absolute pattern names without a wildcard."""
    names: list[str] = []
    for name in glob.strip("/").split("/"):
        if _WILD & set(name):
            break
        names.append(name)
    return "/" + "/".join(names)


def entries(copy_out: CopyOut, root: str) -> Iterator[Entry]:
    """Everything at and below `root` of a container. Raises FileNotFoundError, tarfile.TarError, and what `copy_out` raises."""
    parent = root.rpartition("/")[0]
    with tarfile.open(fileobj=cast(IO[bytes], Pieces(copy_out(root))), mode="r|") as tar:
        for info in tar:
            path = f"{parent}/{info.name.strip('/')}"
            if ".." not in path.split("/"):
                yield Entry(path=path, info=info, body=tar.extractfile(info) if info.isreg() else None)


def renamed(info: tarfile.TarInfo, name: str, link: str) -> tarfile.TarInfo:
    """`info` for another archive, under another name. Its extended headers go before its members, so names leave them."""
    other = copy.copy(info)
    other.name, other.linkname = name, link
    other.pax_headers = {key: value for key, value in info.pax_headers.items() if key not in ("path", "linkpath", "size")}
    return other
