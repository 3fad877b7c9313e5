"""Bare mirrors of repositories on a worker's disk, so that a build fetches from the server only what is new there.

A mirror belongs to one project and one address, as what may be read there follows from the project's credentials; and the server
is asked at each build with those of today. There are two of a repository: a whole one, of its branches and tags, and a
shallow one, of the commits that builds with a depth asked for. Whoever fetches holds the mirror's lock, and so does its git, so
that what a killed attempt began is never disturbed. No build sees a mirror: it gets a copy, never a link.

A mirror never fails a build: one that is damaged is made anew, and where that does not help the build fetches by itself.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar

from buildenv.git import Git, HarmfulRepository, ServerRefused
from millrace.errors import BuildProblem, InfraProblem
from millrace.locks import held
from millrace.log import get_logger

log = get_logger(__name__)
T = TypeVar("T")
_WAIT_S: Final = 120.0
"""How long a build waits for another's fetch before it fetches by itself."""
_LOOK_EVERY_S: Final = 0.05
_MOST_PACKS: Final = 20
_MOST_REFS: Final = 64
"""A shallow mirror with more begins anew, as it keeps what each of them needs."""
_CHUNK: Final = 1024 * 1024
_EMPTY: Final = 1104
"""The bytes of a pack and its index that hold nothing, as a server answers where nothing is new."""
_GONE: Final = ".gone"


class _Damaged(Exception):
    """What lies there is no sound mirror."""


@dataclass(frozen=True, kw_only=True)
class Mirrors:
    """The mirrors of one project, below a worker's folder of them."""

    root: Path
    project: str

    def folder(self, url: str, kind: str) -> Path:
        """Where the mirror of an address lies; its lock is beside it."""
        return self.root / hashlib.sha256("\n".join((self.project, url, kind)).encode()).hexdigest()[:32]


class Mirror:
    """What a checkout in `dest` has of the mirrors of its address."""

    def __init__(self, mirrors: Mirrors, url: str, git: Git, dest: Path, say: Callable[[str], None]) -> None:
        self._mirrors, self._url, self._git, self._dest, self._say = mirrors, url, git, dest, say
        self._used: Path | None = None

    def fetch_all(self) -> bool:
        """Put all branches and tags of the server into the checkout; False where the mirror cannot be used."""
        refs = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")

        def fetch(git: Git, folder: Path) -> None:
            self._fetch(git, "--prune", "--force", refs=refs)
            self._tidy(git, folder, "--geometric=2", "-d")

        return self._use("whole", fetch, lambda git, folder: self._copy(folder), shared=True) is not None

    def fetch_ref(self, ref: str, depth: int) -> str | None:
        """Put a ref, or a commit, into the checkout, with `depth` commits; its id, or None where the mirror cannot be used."""
        kept = f"refs/millrace/{hashlib.sha256(ref.encode()).hexdigest()[:16] if ref.startswith('refs/') else 'other'}"

        def fetch(git: Git, folder: Path) -> None:
            if _lines(folder / "packed-refs") > _MOST_REFS:
                raise _Damaged("it keeps too much")
            self._fetch(git, f"--depth={depth}", refs=(f"+{ref}:{kept}",))
            self._tidy(git, folder, "-a", "-d")

        def take(git: Git, folder: Path) -> str:
            found = git.run("rev-parse", "--verify", "--quiet", kept).strip()
            branch = ref.removeprefix("refs/heads/")
            wanted = kept if branch == ref else f"+{kept}:refs/remotes/origin/{branch}"
            here = self._git.elsewhere(self._dest, protocols="file")
            here.run("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", f"--depth={depth}", "--", str(folder), wanted)
            return found

        return self._use("shallow", fetch, take, shared=False)

    def discard(self, why: str) -> bool:
        """Have the mirror that was used made anew by the next build; False where none was."""
        if self._used is None:
            return False
        with ExitStack() as stack:
            try:
                self._lock(stack, self._used)
                self._anew(self._used, why)
            except (_Damaged, OSError) as error:
                log.warning("mirror.unusable", mirror=self._used.name, why=str(error))
        return True

    def _use(self, kind: str, fetch: Callable[[Git, Path], None], take: Callable[[Git, Path], T], *, shared: bool) -> T | None:
        """Fetch into the mirror, then take from it; None where it cannot be used. `shared` lets others take at the same time."""
        folder = self._mirrors.folder(self._url, kind)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with ExitStack() as stack:
                lock = self._lock(stack, folder)
                while True:
                    was_there = folder.exists()
                    try:
                        taken = self._once(lock, folder, fetch, take, shared)
                        break
                    except _Damaged as error:
                        self._wait(lock, folder)
                        self._anew(folder, str(error))
                        if not was_there:
                            raise
        except (_Damaged, OSError) as error:
            log.warning("mirror.unusable", mirror=folder.name, why=str(error))
            self._say(f"Going on without this worker's mirror of the repository: {error}")
            return None
        self._used = folder
        return taken

    def _once(
        self, lock: IO[str], folder: Path, fetch: Callable[[Git, Path], None], take: Callable[[Git, Path], T], shared: bool
    ) -> T:
        """Raises _Damaged for all that is not the server's own word."""
        git = self._git.elsewhere(folder, bare=True, keep=lock.fileno())
        was_there, before, began = folder.exists(), _size(folder, _EMPTY), time.monotonic()
        try:
            _clean(folder)
            if not was_there:
                folder.mkdir(mode=0o700)
                git.run("init", "--quiet", "--bare", "--template=", ".")
            fetch(git, folder)
            new = max(0, _size(folder, _EMPTY) - before)
            os.utime(lock.name)
            if shared:
                fcntl.flock(lock, fcntl.LOCK_SH)
            taken = take(git, folder)
        except InfraProblem as problem:
            if folder.exists() and git.attempt("fsck", "--connectivity-only", "--no-dangling")[0] == 0:
                raise
            raise _Damaged(problem.message) from problem
        except (BuildProblem, OSError) as problem:
            if isinstance(problem, ServerRefused) and not isinstance(problem, HarmfulRepository):
                if not was_there:
                    _remove(folder)
                raise
            raise _Damaged(problem.message if isinstance(problem, BuildProblem) else str(problem)) from problem
        verb = "Used" if was_there else "Made"
        took_ms = round((time.monotonic() - began) * 1000)
        self._say(f"{verb} this worker's mirror of the repository: {new} bytes were new, {took_ms} ms")
        return taken

    def _anew(self, folder: Path, why: str) -> None:
        """The mirror goes; the next to come makes another."""
        _remove(folder)
        log.warning("mirror.rebuilt", mirror=folder.name, why=why)
        self._say(f"This worker's mirror of the repository was removed, to be made anew: {why}")

    def _fetch(self, git: Git, *options: str, refs: tuple[str, ...]) -> None:
        """Ask the server. Everything stays packed, so that a copy takes few files; no address is written down."""
        git.remote(
            "-c",
            "fetch.unpackLimit=1",
            "fetch",
            "--quiet",
            "--no-tags",
            "--no-write-fetch-head",
            *options,
            "--",
            self._url,
            *refs,
        )
        git.run("pack-refs", "--all")

    @staticmethod
    def _tidy(git: Git, folder: Path, *how: str) -> None:
        if len(list((folder / "objects" / "pack").glob("*.pack"))) > _MOST_PACKS:
            git.run("repack", "--quiet", *how)

    def _copy(self, folder: Path) -> bool:
        """The mirror's packs, checked on the way, and its branches as those of `origin`."""
        where = self._dest / ".git"
        refs = (folder / "packed-refs").read_bytes() if (folder / "packed-refs").exists() else b""
        packs = folder / "objects" / "pack"
        for index in sorted(packs.glob("*.idx")):
            for file in (index.with_suffix(".pack"), index):
                self._copy_file(file, where / "objects" / "pack" / file.name)
        (where / "packed-refs").write_bytes(refs.replace(b" refs/heads/", b" refs/remotes/origin/"))
        return True

    def _copy_file(self, file: Path, target: Path) -> None:
        """Both kinds of file end with the SHA-1 of what is before it. A link would do, were no build root in its container."""
        digest = hashlib.sha1(usedforsecurity=False)
        with open(file, "rb") as source, open(target, "wb") as copy:
            left = os.fstat(source.fileno()).st_size - digest.digest_size
            while left > 0 and (chunk := source.read(min(_CHUNK, left))):
                self._git.check_time()
                digest.update(chunk)
                copy.write(chunk)
                left -= len(chunk)
            end = source.read()
            copy.write(end)
        if end != digest.digest():
            raise _Damaged(f"{file.name} is not what was written")

    def _lock(self, stack: ExitStack, folder: Path) -> IO[str]:
        """The mirror's open lock file, held alone."""
        lock: IO[str] = stack.enter_context(folder.with_suffix(".lock").open("a+"))
        self._wait(lock, folder)
        return lock

    def _wait(self, lock: IO[str], folder: Path) -> None:
        until = time.monotonic() + _WAIT_S
        said = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise _Damaged("another build's fetch takes too long") from error
            if not said:
                self._say("Waiting for another build's fetch of the repository")
                said = True
            self._git.pause(_LOOK_EVERY_S)
        if os.fstat(lock.fileno()).st_ino != os.stat(lock.name).st_ino:
            raise _Damaged("it was just removed")


def prune(root: Path, *, most_bytes: int, most_age_s: float, is_short: Callable[[], bool]) -> int:
    """Remove the mirrors that were not used for so long, then those used least lately until the others fit and the disk is not
    short; none that is in use. How many went.
    """
    found: list[tuple[float, int, Path]] = []
    for name in sorted({entry.name.partition(".")[0] for entry in root.iterdir()} if root.is_dir() else ()):
        folder = root / name
        with suppress(FileNotFoundError, BlockingIOError):
            if folder.with_suffix(_GONE).exists():
                with held(folder.with_suffix(".lock")):
                    shutil.rmtree(folder.with_suffix(_GONE))
            found.append((folder.with_suffix(".lock").stat().st_mtime, _size(folder), folder))
    total, removed = sum(size for _used, size, _folder in found), 0
    for used, size, folder in sorted(found):
        if time.time() - used <= most_age_s and total <= most_bytes and not is_short():
            break
        with suppress(BlockingIOError), held(folder.with_suffix(".lock")):
            _remove(folder)
            folder.with_suffix(".lock").unlink()
            log.info("mirror.pruned", mirror=folder.name, size_bytes=size)
            total, removed = total - size, removed + 1
    return removed


def _remove(folder: Path) -> None:
    """At once for whoever looks, whenever we are killed: half a mirror could pass for a whole one."""
    gone = folder.with_suffix(_GONE)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone)


def _clean(folder: Path) -> None:
    """What a killed git left; none is at work, as the lock is ours."""
    for parent, _folders, files in os.walk(folder):
        for name in files:
            if name.endswith(".lock") or (Path(parent).is_relative_to(folder / "objects") and name.startswith(("tmp_", ".tmp-"))):
                os.unlink(os.path.join(parent, name))


def _size(folder: Path, empty_bytes: int = 0) -> int:
    """The bytes of its packs and their indexes, which are all that counts, over what each pair of them has when it is empty."""
    try:
        return sum(entry.stat().st_size - empty_bytes // 2 for entry in os.scandir(folder / "objects" / "pack"))
    except FileNotFoundError:
        return 0


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
