"""Restores a build's cache before its commands and saves it behind them. Whatever goes wrong is a line in the log, no more."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from buildenv import cache
from buildenv.buildspec import CacheSpec
from buildenv.depot import Depot
from buildenv.engine import Engine
from buildenv.workspace import Workspace
from millrace.contract import CacheQuery, CacheReport, GrantRequest
from millrace.errors import BuildProblem, InfraProblem, NotFound, Unavailable
from millrace.vocabulary import Reason

_KEYLESS: Final = ""


@dataclass(kw_only=True)
class BuildCache:
    """The cache section of one build. `evaluate` has the shell make a key out, None where it cannot."""

    spec: CacheSpec
    engine: Engine
    container_id: str
    workspace: Workspace
    depot: Depot
    max_bytes: int
    say: Callable[[str], None]
    evaluate: Callable[[str], str | None]
    _keys: list[str] = field(default_factory=list)
    _is_kept: bool = False

    def __post_init__(self) -> None:
        self._paths = cache.Paths(patterns=self.spec.paths, source_inside=self.workspace.source_inside)

    def restore(self) -> None:
        """Find the cache and unpack it into the container. The keys are made out here, once."""
        try:
            self._keys = self._made_out()
        except BuildProblem as problem:
            self.say(f"Warning: no cache: {problem.message}")
            return
        if self.spec.action == "save":
            return
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

    def _restore(self) -> None:
        began = time.monotonic()
        self.say("Downloading S3 cache...")
        hit = self.depot.find_cache(CacheQuery(version=self._paths.version(), keys=tuple(self._keys)))
        if hit is None:
            self.say(f"No cache was found{f' for key {self._keys[0]}' if self._keys[0] else ''}; going on without")
            return
        archive, plain = self.workspace.scratch / "cache.tar.zst", self.workspace.scratch / "cache.tar"
        self.depot.download(hit.grant, archive, brief=True)
        self.say("Unarchiving cache...")
        count = cache.unpack(self._paths, archive, hit.sha256, plain, has=self._came_with_source, say=self.say)
        self.engine.copy_in(self.container_id, "/", cache.pieces(plain))
        plain.unlink()
        archive.unlink()
        self._is_kept = hit.exact and bool(self.spec.key)
        how = f"key {hit.key}" if hit.key else "no key"
        took_ms = int((time.monotonic() - began) * 1000)
        self.say(f"Restored {count} file(s) from the cache of {how} by {hit.build_id}: {hit.size_bytes} bytes in {took_ms} ms")

    def _save(self) -> list[CacheReport]:
        began = time.monotonic()
        target = self.workspace.scratch / "saved.tar.zst"
        packed = cache.pack(
            self._paths,
            lambda path: self.engine.copy_out(self.container_id, path),
            target,
            max_bytes=self.max_bytes,
            say=self.say,
        )
        if packed is None:
            self.say("There is nothing to cache")
            return []
        granted = self.depot.grant(
            GrantRequest(kind="cache", name=target.name, size_bytes=packed.size_bytes, sha256=packed.sha256)
        )
        self.depot.upload(granted, packed.path, packed.sha256, brief=True)
        took_ms = int((time.monotonic() - began) * 1000)
        how = f"key {self._keys[0]}" if self._keys[0] else "no key"
        self.say(f"Saved {packed.file_count} file(s) as the cache of {how}: {packed.size_bytes} bytes in {took_ms} ms")
        return [
            CacheReport(
                key=self._keys[0],
                version=self._paths.version(),
                object_key=granted.key,
                size_bytes=packed.size_bytes,
                sha256=packed.sha256,
            )
        ]

    def _came_with_source(self, relative: str) -> bool:
        path = self.workspace.source / relative
        return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink())

    def _carefully(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except cache.Unusable as error:
            self.say(f"Warning: the cache is not {what}: {error}")
        except (BuildProblem, InfraProblem, NotFound, Unavailable) as error:
            self.say(f"Warning: the cache is not {what}: {error.message}")
