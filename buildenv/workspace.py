"""The folders of one attempt on the host, and how a build sees them.

`output` is the build's to write (source and the runner's control files), `readonly` is not, `scratch` it never sees.
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from buildenv.engine import ContainerSpec, Engine, Mount
from buildenv.shell import RUNNER
from millrace.errors import BuildProblem
from millrace.log import get_logger
from millrace.vocabulary import Reason

log = get_logger(__name__)
OUTPUT_INSIDE: Final = "/codebuild/output"
READONLY_INSIDE: Final = "/codebuild/readonly"
INSIDE: Final = Path(__file__).with_name("inside")
"""The programs that every build finds on its PATH; `runner.sh` puts their folder behind the image's own."""
_NO_ROOM_BYTES: Final = 64 * 1024
_NO_ROOM_FILES: Final = 16
"""With less than this left a disk counts as full: the runner takes its own few files away after each command."""


class Workspace:
    """`root` need not be there yet. `source_folder` and those of secondary sources, by identifier, are relative to `output`."""

    def __init__(self, root: Path, source_folder: str = "", secondary: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.output = root / "output"
        self.readonly = root / "readonly"
        self.scratch = root / "scratch"
        self.source = self.output / source_folder
        self.control = self.output / "tmp"
        self.source_inside = f"{OUTPUT_INSIDE}/{source_folder}"
        self._secondary = dict(secondary or {})

    def make(self) -> None:
        """Lay the folders out; what an earlier process of the same attempt left is removed first."""
        for folder in (self.output, self.readonly, self.scratch):
            shutil.rmtree(folder, ignore_errors=True)
        self.root.mkdir(parents=True, mode=0o700, exist_ok=True)
        for folder in (self.output, self.readonly, self.scratch, self.control):
            folder.mkdir()
        shutil.copyfile(RUNNER, self.readonly / RUNNER.name)
        shutil.copytree(INSIDE, self.readonly / "bin")

    def is_full(self) -> bool:
        """True where nothing more can be written: no room is left on the disk below, or no inode."""
        try:
            disk = os.statvfs(self.root)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize < _NO_ROOM_BYTES or (disk.f_files > 0 and disk.f_favail < _NO_ROOM_FILES)

    def add_sources(self) -> None:
        """Make the folders of the sources, in a workspace that is laid out."""
        for folder in (self.source, *(self.output / name for name in self._secondary.values())):
            folder.mkdir(parents=True, exist_ok=True)

    def secondary(self, identifier: str) -> tuple[Path, str]:
        """Where a secondary source lies: on the host, and inside."""
        folder = self._secondary[identifier]
        return self.output / folder, f"{OUTPUT_INSIDE}/{folder}"

    def let_all_read(self) -> None:
        """Let users that are not root read the sources, and run what may be run (CodeBuild: run-as)."""
        for folder in (self.source, *(self.output / name for name in self._secondary.values())):
            for parent, _folders, files in os.walk(folder):
                for path in (parent, *(os.path.join(parent, name) for name in files)):
                    if not os.path.islink(path):
                        mode = os.stat(path).st_mode
                        os.chmod(path, mode | 0o444 | (0o111 if mode & 0o111 else 0))

    def keep_credentials(self, credentials: Sequence[tuple[str, str, str]]) -> None:
        """Let git inside use them: host, user name and password of each (CodeBuild: env.git-credential-helper)."""
        lines = "".join(" ".join(parts) + "\n" for parts in credentials)
        (self.readonly / "git-credentials").write_text(lines, encoding="utf-8")

    def keep_buildspec(self, text: str) -> None:
        """Put an inline buildspec where builds may read it."""
        (self.readonly / "buildspec.yml").write_text(text, encoding="utf-8", errors="surrogateescape")

    def read_source_file(self, path: str, most: int) -> bytes | None:
        """Up to `most` bytes of a file of the source; None where there is none. Raises BuildProblem for a path that leaves it."""
        real = os.path.realpath(self.source / path)
        if path.startswith("/") or not Path(real).is_relative_to(os.path.realpath(self.source)):
            raise BuildProblem(
                f"the buildspec's path {path!r} leaves the source",
                reason=Reason.BAD_BUILDSPEC,
                status_code="YAML_FILE_ERROR",
                hint="Name a path relative to the source's root.",
            )
        if not os.path.isfile(real):
            return None
        with open(real, "rb") as file:
            return file.read(most)

    def remove(self, engine: Engine, image: str | None) -> None:
        """Remove all folders. What only root may remove, where the worker is not root, a container of `image` removes."""
        try:
            shutil.rmtree(self.root)
        except FileNotFoundError:
            return
        except PermissionError:
            if image is None:
                raise
            self._remove_as_root(engine, image)
            shutil.rmtree(self.root)

    def _remove_as_root(self, engine: Engine, image: str) -> None:
        container = engine.create(
            ContainerSpec(
                name=f"millrace-clean-{self.root.name}",
                image=image,
                command=("/bin/sh", "-c", "rm -rf /mnt/output/* /mnt/output/.[!.]* /mnt/output/..?*"),
                mounts=(Mount(source=self.root, target="/mnt"),),
                network="none",
            )
        )
        try:
            engine.start(container)
            until = time.monotonic() + 60
            while engine.state(container).running and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            engine.remove(container)
