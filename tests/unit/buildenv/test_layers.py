"""The layers that a worker keeps: made once, whoever asks; never removed while they are used; nothing from wrong bytes."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buildenv import cache, layers, seals
from buildenv.layers import Layers

SIZE = 100_000


def packed(tmp_path: Path, name: str) -> cache.Packed:
    folder = tmp_path / name / "source" / "deps"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(name[:1].encode() * SIZE)
    os.utime(folder / name, ns=(1, 981_173_106_123_456_789))
    os.link(folder / name, folder / "hard")
    return layers.pack(tmp_path / name, ["source/deps"], tmp_path / f"{name}.zst", max_bytes=10**6)


def fetched(made: cache.Packed, times: list[int]) -> Callable[[Path], None]:
    def fetch(path: Path) -> None:
        times.append(1)
        path.write_bytes(made.path.read_bytes())

    return fetch


def test_a_layer_is_fetched_once_however_many_ask(tmp_path: Path) -> None:
    made, times, got = packed(tmp_path, "one"), list[int](), list[tuple[Path, bool]]()
    keepers = [Layers(tmp_path / "store") for _ in range(8)]

    def ask(keeper: Layers) -> None:
        got.append(keeper.use(made.sha256, fetched(made, times), lambda: None))

    threads = [threading.Thread(target=ask, args=(keeper,)) for keeper in keepers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for keeper in keepers:
        keeper.close()
    assert times == [1]
    assert sorted(is_new for _, is_new in got) == [False] * 7 + [True]
    files = [got[0][0] / "source" / "deps" / name for name in ("one", "hard")]
    assert files[0].stat().st_mtime_ns == 981_173_106_123_456_789
    assert files[0].samefile(files[1])


def test_the_same_files_make_the_same_layer(tmp_path: Path) -> None:
    made = packed(tmp_path, "one")
    again = layers.pack(tmp_path / "one", ["source/deps"], tmp_path / "again.zst", max_bytes=10**6)
    assert again.sha256 == made.sha256


def test_the_least_recently_used_goes_and_what_is_used_stays(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number, name in enumerate(("old", "used", "fresh")):
        made = packed(tmp_path, name)
        keeper = Layers(store)
        path, _ = keeper.use(made.sha256, fetched(made, []), lambda: None)
        keeper.close()
        os.utime(path.with_suffix(".lock"), (number, number))
    used, times = Layers(store), list[int]()
    made = layers.pack(tmp_path / "old", ["source/deps"], tmp_path / "old2.zst", max_bytes=10**6)
    path, is_new = used.use(made.sha256, fetched(made, times), lambda: None)
    assert (is_new, times) == (False, [])
    assert layers.evict(store, 10**9) == 0
    assert layers.evict(store, 0) == 2
    assert [one.name for one in store.iterdir() if one.is_dir()] == [path.name]
    used.close()
    assert layers.evict(store, 2 * SIZE) == 0
    assert layers.evict(store, 0) == 1
    assert list(store.iterdir()) == []


def test_a_layer_whose_size_was_lost_goes_and_keeps_no_other_from_going(tmp_path: Path) -> None:
    made, store = packed(tmp_path, "one"), tmp_path / "store"
    keeper = Layers(store)
    path, _ = keeper.use(made.sha256, fetched(made, []), lambda: None)
    keeper.close()
    path.with_suffix(".lock").write_bytes(bytes(6))  # as a file system may leave it when the power fails
    assert layers.evict(store, 10**9) == 1
    assert list(store.iterdir()) == []


def _overwritten(layer: Path) -> None:
    """With as many bytes, and the time that it had."""
    time.sleep(0.02)  # the kernel's times have ticks, of 10 ms at most
    file = layer / "source" / "deps" / "one"
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.write(b"X")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten": _overwritten,
    "another mode": lambda layer: (layer / "source" / "deps" / "one").chmod(0o777),
    "added": lambda layer: (layer / "source" / "deps" / "new").write_text("x"),
    "removed": lambda layer: (layer / "source" / "deps" / "hard").unlink(),
    "renamed": lambda layer: (layer / "source" / "deps" / "hard").rename(layer / "source" / "deps" / "soft"),
    "a folder": lambda layer: (layer / "source" / "new").mkdir(),
    "without a seal": lambda layer: seals.of(layer).unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_was_changed_is_fetched_anew_and_said(tmp_path: Path, change: Callable[[Path], object]) -> None:
    made, store, times, said = packed(tmp_path, "one"), tmp_path / "store", list[int](), list[str]()
    first, second = Layers(store), Layers(store)
    path, _ = first.use(made.sha256, fetched(made, times), lambda: None)
    change(path)
    if seals.of(path).exists():
        os.utime(seals.of(path), (0, 0))
    kept = os.open(path, os.O_RDONLY)
    path, is_new = second.use(made.sha256, fetched(made, times), lambda: None, said.append)
    assert (is_new, times) == (True, [1, 1])
    assert said == [f"layer {made.sha256[:12]} of the cache was changed on the worker; it is fetched anew"]
    assert (path / "source" / "deps" / "one").read_bytes() == b"o" * SIZE
    assert sorted(file.name for file in (path / "source" / "deps").iterdir()) == ["hard", "one"]
    assert os.listdir(kept), "the build that has the changed one keeps it"
    os.close(kept)
    assert second.use(made.sha256, fetched(made, times), lambda: None) == (path, False)
    first.close()
    assert layers.evict(store, 10**9) == 1, "the changed one goes once no build has it"
    assert [one.name for one in store.iterdir() if one.is_dir()] == [made.sha256]
    second.close()


def test_a_layer_is_looked_at_once_a_minute_at_most_and_between_builds(tmp_path: Path) -> None:
    made, store, times = packed(tmp_path, "one"), tmp_path / "store", list[int]()
    keeper = Layers(store)
    path, _ = keeper.use(made.sha256, fetched(made, times), lambda: None)
    seal = seals.of(path)
    assert keeper.use(made.sha256, fetched(made, times), lambda: None) == (path, False)
    os.utime(seal, (0, 0))
    assert keeper.use(made.sha256, fetched(made, times), lambda: None) == (path, False)
    assert seal.stat().st_mtime > 1_000_000, "it was looked at, and is trusted for another minute"
    before = seal.stat().st_mtime - seals.TRUST_S
    os.utime(seal, (before, before))
    assert layers.look_after(store) == 0
    assert seal.stat().st_mtime > before + 1
    _overwritten(path)
    os.utime(seal, (before, before))
    assert layers.look_after(store) == 1
    keeper.close()
    assert keeper.use(made.sha256, fetched(made, times), lambda: None)[1]
    keeper.close()


def test_of_many_who_see_a_change_at_once_all_get_the_new_layer(tmp_path: Path) -> None:
    made, store, times = packed(tmp_path, "one"), tmp_path / "store", list[int]()
    holder = Layers(store)
    path, _ = holder.use(made.sha256, fetched(made, times), lambda: None)
    _overwritten(path)
    os.utime(seals.of(path), (0, 0))
    keepers, got = [Layers(store) for _ in range(8)], list[bytes]()

    def ask(keeper: Layers) -> None:
        layer, _is_new = keeper.use(made.sha256, fetched(made, times), lambda: None)
        got.append((layer / "source" / "deps" / "one").read_bytes()[:1])

    threads = [threading.Thread(target=ask, args=(keeper,)) for keeper in keepers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [b"o"] * 8
    assert times == [1, 1]
    for keeper in (holder, *keepers):
        keeper.close()


@pytest.mark.parametrize("spoil", [lambda data: data[:-30], lambda data: data + b"x", lambda _data: b""], ids=range(3))
def test_wrong_bytes_are_no_layer_and_leave_nothing(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    made, store = packed(tmp_path, "one"), tmp_path / "store"
    keeper = Layers(store)
    with pytest.raises(cache.Unusable, match="other bytes"):
        keeper.use(made.sha256, lambda path: path.write_bytes(spoil(made.path.read_bytes())) and None, lambda: None)
    layers.evict(store, 10**9)
    assert list(store.iterdir()) == []
    path, _ = keeper.use(made.sha256, fetched(made, []), lambda: None)
    assert (path / "source" / "deps" / "one").stat().st_size == SIZE
    keeper.close()


def test_what_is_no_archive_and_what_is_too_large_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"no zstd")
    (tmp_path / "into").mkdir()
    with pytest.raises(cache.Unusable, match="cannot be read"):
        layers.unpack(tmp_path / "bad", hashlib.sha256(b"no zstd").hexdigest(), tmp_path / "into")
    packed(tmp_path, "one")
    with pytest.raises(cache.Unusable, match="more than 1 bytes"):
        layers.pack(tmp_path / "one", ["source/deps"], tmp_path / "large.zst", max_bytes=1)
    with pytest.raises(cache.Unusable, match="tar ended with 2"):
        layers.pack(tmp_path / "one", ["source/none"], tmp_path / "none.zst", max_bytes=10**6)


@pytest.mark.parametrize(
    ("patterns", "folders"),
    [
        (("deps/**/*", "/root/.m2/"), ["/src/deps", "/root/.m2"]),
        (("deps/", "deps/inner/**"), ["/src/deps"]),
        (("deps",), []),
        (("deps/**/*", "file.txt"), []),
        (("deps/*",), []),
        (("**/*",), []),
        (("/**/*",), []),
        (("../**/*",), []),
        (("/proc/x/**",), []),
        (("/codebuild/**",), []),
        (("a:b/**",), []),
    ],
    ids=str,
)
def test_which_caches_are_mounted(patterns: tuple[str, ...], folders: list[str]) -> None:
    assert cache.Paths(patterns=patterns, source_inside="/src").folders() == folders
