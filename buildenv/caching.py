"""Restores a build's cache before its commands and saves it behind them. Whatever goes wrong is a line in the log, no more."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from buildenv import cache
from buildenv.buildspec import CacheSpec
from buildenv.cache import Packed
from buildenv.depot import Depot
from buildenv.engine import Engine
from buildenv.layers import Layers
from buildenv.overlay import Overlay
from buildenv.workspace import Workspace
from millrace.contract import CacheHit, CacheLayer, CacheQuery, CacheReport, CacheUse, GrantRequest
from millrace.errors import BuildProblem, InfraProblem, NotFound, Unavailable
from millrace.vocabulary import Reason

_KEYLESS: Final = ""
_AT_ONCE: Final = 4
"""How many layers are fetched at the same time."""
_DEEPEST: Final = 8
"""How many layers a cache has at most: then all of it is packed into one."""
_MOST_TIMES: Final = 2
_ALWAYS_BYTES: Final = 1024 * 1024
"""A stack that has more than so many times its largest layer, and this, is packed into one, too."""


@dataclass(kw_only=True)
class BuildCache:
    """The cache section of one build. Without `layers`, caches are copied.

    `evaluate` has the shell make a key out, None where it cannot; `check` raises where the build is to end.
    """

    spec: CacheSpec
    engine: Engine
    container_id: str
    workspace: Workspace
    depot: Depot
    layers: Layers | None
    max_bytes: int
    part_bytes: int
    say: Callable[[str], None]
    check: Callable[[], None]
    evaluate: Callable[[str], str | None]
    uses: list[CacheUse] = field(default_factory=list)
    """What became of each cache that was found."""
    _is_found: bool = False
    _keys: list[str] = field(default_factory=list)
    _is_kept: bool = False
    _overlay: Overlay | None = None
    _stack: tuple[CacheLayer, ...] = ()
    """What the folders lie on, lowest first."""

    def __post_init__(self) -> None:
        self._paths = cache.Paths(patterns=self.spec.paths, source_inside=self.workspace.source_inside)

    def restore(self) -> None:
        """Find the cache and unpack it into the container. The keys are made out here, once."""
        try:
            self._keys = self._made_out()
        except BuildProblem as problem:
            self.say(f"Warning: no cache: {problem.message}")
            return
        self._carefully("mounted", self._open)
        if self._overlay is None and self.spec.action != "save":
            self._carefully("restored", self._restore)

    def save(self) -> CacheReport | None:
        """Pack and send the cache, where there is something to be kept that is not kept yet."""
        if not self._keys or self.spec.action == "restore":
            return None
        if self._is_kept:
            self.say(f"Cache {self._keys[0]} is there already; a cache is never rewritten")
            return None
        saved: list[CacheReport] = []
        self._carefully("saved", lambda: saved.extend(self._save()))
        return saved[0] if saved else None

    def _made_out(self) -> list[str]:
        if self.spec.key is None:
            return [_KEYLESS]
        keys = []
        for text in (self.spec.key, *self.spec.fallback_keys):
            key = self.evaluate(text)
            if key is None:
                raise BuildProblem(f"the shell cannot make out the key {text!r}", reason=Reason.BAD_BUILDSPEC)
            keys.append(cache.check_key(key))
        return keys

    def host_path(self, inside: str) -> Path | None:
        """Where the worker finds a path of the container that the engine does not see, as it lies in a mounted folder."""
        return self._overlay.host_path(inside) if self._overlay is not None else None

    def close(self) -> None:
        """Let go of all that was mounted. Nothing can be saved any more."""
        if self._overlay is not None:
            self._overlay.close()
        if self.layers is not None:
            self.layers.close()

    def _open(self) -> None:
        """Mount the folders over the layers of the cache, or over nothing where there is none. Else they are copied."""
        if self.layers is None or (overlay := Overlay.of(self._paths, self.workspace, self._pid())) is None:
            return
        if not overlay.is_free():
            self.say("The cache is copied, not mounted: its folders hold files that came with the source or the image")
            return
        began = time.monotonic()
        found: list[tuple[CacheHit, list[Path], int]] = []
        if self.spec.action != "save":
            self._carefully("restored", lambda: found.extend(self._found(self.layers)))
        if not found:
            overlay.mount([])
            self._overlay = overlay
            return
        hit, below, fetched = found[0]
        overlay.mount(below)
        self._overlay = overlay
        self._stack = _stack(hit)
        self._is_kept = hit.exact and bool(self.spec.key)
        took_ms = int((time.monotonic() - began) * 1000)
        size = sum(layer.size_bytes for layer in self._stack)
        how = (
            f"mounted {len(below)} layer(s) of {size} bytes in {took_ms} ms; {size - fetched} bytes were on the worker, "
            f"{fetched} were fetched"
        )
        self.say(f"Restored the cache of {_named(hit.key)} by {hit.build_id}: {how}")
        self._note_use(used=True, says=how)

    def _pid(self) -> int | None:
        return self.engine.pid(self.container_id)

    def _found(self, store: Layers | None) -> list[tuple[CacheHit, list[Path], int]]:
        """The cache that answers, its unpacked layers, and how many bytes of them were fetched; nothing where there is none."""
        hit = self._hit(layered=True)
        if hit is None or store is None:
            return []

        def use(layer: CacheLayer) -> tuple[Path, int]:
            def fetch(path: Path) -> None:
                self.depot.download(layer.grant, path, brief=True)

            path, is_new = store.use(layer.sha256, fetch, self.check, lambda text: self.say(f"Warning: {text}"))
            return path, layer.size_bytes if is_new else 0

        with ThreadPoolExecutor(_AT_ONCE, "layers") as pool:
            got = list(pool.map(use, _stack(hit)))
        return [(hit, [path for path, _ in got], sum(size for _, size in got))]

    def _hit(self, *, layered: bool) -> CacheHit | None:
        self.say("Downloading S3 cache...")
        hit = self.depot.find_cache(CacheQuery(version=self._paths.version(), keys=tuple(self._keys), layered=layered))
        if hit is None:
            self.say(f"No cache was found{f' for key {self._keys[0]}' if self._keys[0] else ''}; going on without")
        self._is_found = hit is not None
        return hit

    def _restore(self) -> None:
        began = time.monotonic()
        hit = self._hit(layered=False)
        if hit is None:
            return
        archive, plain = self.workspace.scratch / "cache.tar.zst", self.workspace.scratch / "cache.tar"
        self.depot.download(hit.grant, archive, brief=True)
        self.say("Unarchiving cache...")
        count = cache.unpack(self._paths, archive, hit.sha256, plain, has=self._came_with_source, say=self.say)
        self.engine.copy_in(self.container_id, "/", cache.pieces(plain))
        plain.unlink()
        archive.unlink()
        self._is_kept = hit.exact and bool(self.spec.key)
        took_ms = int((time.monotonic() - began) * 1000)
        what = f"Restored {count} file(s) from the cache of {_named(hit.key)} by {hit.build_id}"
        self.say(f"{what}: {hit.size_bytes} bytes in {took_ms} ms")
        self._note_use(used=True, says=f"copied {count} file(s), {hit.size_bytes} bytes in {took_ms} ms")

    def _save(self) -> list[CacheReport]:
        began = time.monotonic()
        target = self.workspace.scratch / "saved.tar.zst"
        base: str | None = None
        if self._overlay is not None:
            if not self._overlay.is_changed() and (not self._stack or not self._keys[0]):
                self.say("The cache has not changed" if self._stack else "There is nothing to cache")
                return []
            packed, base = self._pack_layer(self._overlay, target)
            what = "what changed" if base else "all"
        else:
            copied = self._pack_copy(target)
            if copied is None:
                self.say("There is nothing to cache")
                return []
            packed, what = copied, f"{copied.file_count} file(s)"
        granted = self.depot.grant(
            GrantRequest(
                kind="cache",
                name=target.name,
                size_bytes=packed.size_bytes,
                sha256=packed.sha256,
                part_bytes=packed.part_bytes if len(packed.parts) > 1 else None,
                parts=packed.parts if len(packed.parts) > 1 else None,
            )
        )
        self.depot.upload(granted, packed.path, packed.sha256, brief=True)
        took_ms = int((time.monotonic() - began) * 1000)
        self.say(f"Saved {what} as the cache of {_named(self._keys[0])}: {packed.size_bytes} bytes in {took_ms} ms")
        return [
            CacheReport(
                key=self._keys[0],
                version=self._paths.version(),
                object_key=granted.key,
                size_bytes=packed.size_bytes,
                sha256=packed.sha256,
                base=base,
            )
        ]

    def _pack_layer(self, overlay: Overlay, target: Path) -> tuple[Packed, str | None]:
        """What changed, and the object that it lies on; or all there is, where the stack would be too deep or too large."""
        if 0 < len(self._stack) < _DEEPEST:
            packed = self._packed(overlay, target, whole=False)
            size = sum(layer.size_bytes for layer in self._stack) + packed.size_bytes
            if size <= _MOST_TIMES * max(layer.size_bytes for layer in self._stack) + _ALWAYS_BYTES:
                return packed, self._stack[-1].grant.key
            target.unlink()
        return self._packed(overlay, target, whole=True), None

    def _packed(self, overlay: Overlay, target: Path, *, whole: bool) -> Packed:
        return overlay.pack(target, whole=whole, max_bytes=self.max_bytes, least_part_bytes=self.part_bytes)

    def _pack_copy(self, target: Path) -> Packed | None:
        return cache.pack(
            self._paths,
            lambda path: self.engine.copy_out(self.container_id, path),
            target,
            max_bytes=self.max_bytes,
            say=self.say,
            least_part_bytes=self.part_bytes,
        )

    def _came_with_source(self, relative: str) -> bool:
        path = self.workspace.source / relative
        return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink())

    def _carefully(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
            return
        except cache.Unusable as error:
            why = str(error)
        except (BuildProblem, InfraProblem, NotFound, Unavailable) as error:
            why = error.message
        self.say(f"Warning: the cache is not {what}: {why}")
        self._note_use(used=False, says=why)

    def _note_use(self, *, used: bool, says: str) -> None:
        if self._is_found:
            self.uses.append(CacheUse(used=used, says=says[:1000]))
        self._is_found = False


def _stack(hit: CacheHit) -> tuple[CacheLayer, ...]:
    return (*hit.below, CacheLayer(size_bytes=hit.size_bytes, sha256=hit.sha256, grant=hit.grant))


def _named(key: str) -> str:
    return f"key {key}" if key else "no key"
