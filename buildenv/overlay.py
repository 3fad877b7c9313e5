"""The folders of a cache as overlays over its layers, seen by the container and, for its artifacts, by the worker.

All that a build changes comes to lie in one folder of the workspace, which is what a layer on top is packed from.
"""

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from buildenv import layers, mounts
from buildenv.cache import Packed, Paths, Unusable
from buildenv.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """One folder of a cache: from `/` on inside, as layers call it, and below the source, where it lies there."""

    inside: str
    stored: str
    in_source: str | None


class Overlay:
    """The mounts of one cache. Made for one attempt, whose process may mount."""

    def __init__(self, folders: Sequence[_Folder], workspace: Workspace, pid: int) -> None:
        self._folders, self._workspace, self._pid = folders, workspace, pid
        self._root = workspace.scratch / "cache"
        self._mounted: list[Path] = []

    @classmethod
    def of(cls, paths: Paths, workspace: Workspace, pid: int | None) -> "Overlay | None":
        """Overlays for all that `paths` name; None where they name something else than folders, or a mount cannot be had."""
        roots = paths.folders()
        if not roots or pid is None or not mounts.are_possible():
            return None
        source = f"{workspace.source_inside}/"
        folders = [
            _Folder(
                inside=root, stored=paths.stored(root), in_source=root.removeprefix(source) if root.startswith(source) else None
            )
            for root in roots
        ]
        return cls(folders, workspace, pid)

    def is_free(self) -> bool:
        """True where all folders are there now and empty: what came with the source or the image would be hidden."""
        empty: list[bool] = []

        def look_inside() -> None:
            for folder in self._folders:
                os.makedirs(folder.inside, exist_ok=True)
                empty.append(not os.listdir(folder.inside))

        try:
            for folder in self._folders:
                if folder.in_source is not None:
                    os.close(mounts.open_below(self._workspace.source, folder.in_source))
            mounts.inside(self._pid, look_inside)
        except OSError:
            return False
        return all(empty)

    def mount(self, below: Sequence[Path]) -> None:
        """Lay the folders over `below`, the lowest first. Raises Unusable; then nothing is mounted."""
        lent: list[int] = []
        try:
            mounts.leave_the_hosts()
            for number, folder in enumerate(self._folders):
                merged = self._lay(number, folder, below)
                if folder.in_source is not None:
                    self._show(merged, folder.in_source)
                lent.append(mounts.lend(merged))
            mounts.inside(self._pid, lambda: self._attach(lent))
        except OSError as error:
            self.close()
            raise Unusable(f"it cannot be mounted: {error}") from error
        finally:
            for one in lent:
                os.close(one)

    def _lay(self, number: int, folder: _Folder, below: Sequence[Path]) -> Path:
        upper, merged = self._root / "upper" / folder.stored, self._root / "merged" / folder.stored
        work, nothing = self._root / f"work{number}", self._root / "nothing"
        for made in (upper, merged, work, nothing):
            made.mkdir(parents=True, exist_ok=True)
        lower = [layer / folder.stored for layer in reversed(below) if _is_folder(layer, folder.stored)]
        if lower:
            seen = lower[0].stat()
            os.chown(upper, seen.st_uid, seen.st_gid)
            upper.chmod(stat.S_IMODE(seen.st_mode))
            os.utime(upper, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        mounts.overlay(merged, list(dict.fromkeys(lower)) or [nothing], upper, work)  # none twice: that is a loop to the kernel
        self._mounted.append(merged)
        return merged

    def _show(self, merged: Path, in_source: str) -> None:
        """In the source as the worker sees it: artifacts are packed from there."""
        folder = mounts.open_below(self._workspace.source, in_source)
        lent = mounts.lend(merged)
        try:
            mounts.attach(lent, folder)
        finally:
            os.close(lent)
            os.close(folder)
        self._mounted.append(self._workspace.source / in_source)

    def _attach(self, lent: Sequence[int]) -> None:
        done: list[str] = []
        try:
            for one, folder in zip(lent, self._folders, strict=True):
                target = os.open(folder.inside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    mounts.attach(one, target)
                finally:
                    os.close(target)
                done.append(folder.inside)
        except OSError:
            for inside in done:
                mounts.unmount(inside)
            raise

    def is_changed(self) -> bool:
        """True where the build made, changed or removed anything in one of the folders."""
        return any(any((self._root / "upper" / folder.stored).iterdir()) for folder in self._folders)

    def pack(self, target: Path, *, whole: bool, max_bytes: int, least_part_bytes: int) -> Packed:
        """What the build changed, or all there is, as a layer. Raises Unusable."""
        root = self._root / ("merged" if whole else "upper")
        names = [folder.stored for folder in self._folders]
        return layers.pack(root, names, target, max_bytes=max_bytes, least_part_bytes=least_part_bytes)

    def host_path(self, inside: str) -> Path | None:
        """Where the worker sees a path inside, if it lies in one of the folders: an engine does not see mounts of ours."""
        for folder in self._folders:
            if inside == folder.inside or inside.startswith(f"{folder.inside}/"):
                return self._root / "merged" / folder.stored / inside[len(folder.inside) :].lstrip("/")
        return None

    def close(self) -> None:
        """Unmount all, for this process; the container keeps what it has."""
        while self._mounted:
            mounts.unmount(self._mounted.pop())
        with suppress(OSError):
            shutil.rmtree(self._root / "merged")


def _is_folder(layer: Path, stored: str) -> bool:
    """Whether a layer has a folder there, and no link on the way to it."""
    path = layer
    for name in stored.split("/"):
        path = path / name
        if path.is_symlink() or not path.is_dir():
            return False
    return True
