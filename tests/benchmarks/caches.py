"""What dependencies cost to restore and to save as a cache, against archives and a plain copy in the same run, in memory.

The trees are real: what npm and pip install. `scripts/bench-trees` gets them, once.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from buildenv import layers, mounts, seals
from tests.benchmarks.samples import OURS, Sample, Scale

_ROOT: Final = Path(__file__).parents[2]
SEED, MOST = 20261123, 10**10
PLACE: Final = "/dev/shm"  # a disk that trees are removed from again and again grows slow, and differs from round to round
TREES: Final = ("node_modules", "site-packages")
RESTORE, SAVE, AGAIN = "restore of a cache", "save of a cache", "save after a change of 1 % of the files"
WARM: Final = f"{OURS}, on a worker that has it"
LOOKED: Final = f"{OURS}, on a worker that has it, and has not looked at it for a minute"


def seconds(work: Callable[..., object], *given: str) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began


def shell(line: str) -> None:
    """Run it."""
    subprocess.run(line, shell=True, check=True)  # noqa: S602  # our own words


def measure(root: Path, changed: list[str]) -> Iterator[tuple[str, str, float]]:
    """One round: each way once; what, who, seconds. `changed` are the files that a build writes to."""
    tree, store = root / "tree", root / "store"
    for name, pack, unpack in (
        ("tar.gz", "tar -czf {a} -C {t} .", "tar -xzf {a} -C {o}"),
        ("tar.zst", "tar -c -C {t} . | zstd -q -3 -T0 -f -o {a}", "zstd -qdc {a} | tar -x -C {o}"),
        ("cp -a", "cp -a {t} {a}", "cp -a {a}/. {o}"),
    ):
        archive, out = root / "archive", root / "out"
        out.mkdir()
        took = seconds(shell, pack.format(t=tree, a=archive))
        yield SAVE, name, took
        yield AGAIN, f"{name} of all", took
        yield RESTORE, name, seconds(shell, unpack.format(o=out, a=archive))
        shutil.rmtree(out)
        shutil.rmtree(archive) if archive.is_dir() else archive.unlink()
    whole: list[layers.Packed] = []
    yield SAVE, OURS, seconds(lambda: whole.append(layers.pack(root, ["tree"], root / "whole", max_bytes=MOST)))
    keeper = layers.Layers(store)

    def use() -> None:
        keeper.use(whole[0].sha256, lambda path: shutil.copyfile(root / "whole", path) and None, lambda: None)

    yield RESTORE, f"{OURS}, first time on a worker", seconds(use)
    places = [root / name for name in ("merged", "upper/tree", "work")]
    for place in places:
        place.mkdir(parents=True)
    merged, upper, work = places

    def look() -> None:
        """What is added where nobody has looked at the layer for a while."""
        seal = seals.of(store / whole[0].sha256)
        os.utime(seal, (0, 0))
        use()

    def restore() -> None:
        use()
        mounts.overlay(merged, [store / whole[0].sha256 / "tree"], upper, work)

    yield RESTORE, WARM, seconds(restore)
    yield RESTORE, LOOKED, seconds(look)
    for relative in changed:
        (merged / relative).write_text("changed")
    yield AGAIN, OURS, seconds(lambda: layers.pack(root / "upper", ["tree"], root / "layer", max_bytes=MOST))
    mounts.unmount(merged)
    keeper.close()
    layers.evict(store, 0)
    for file in ("whole", "layer"):
        (root / file).unlink()
    for folder in ("merged", "upper", "work"):
        shutil.rmtree(root / folder)


def samples(scale: Scale) -> Iterator[Sample]:
    """In alternation. In a process of its own, as its mounts are not to be seen outside."""
    if not mounts.are_possible():
        raise AssertionError("only root can mount")
    mounts.leave_the_hosts()
    names = TREES if scale.peers else TREES[1:]
    said = subprocess.run([_ROOT / "scripts" / "bench-trees", *names], check=True, capture_output=True, text=True)
    for name, tree in zip(names, said.stdout.split(), strict=True):
        with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
            root = Path(scratch)
            shutil.copytree(tree, root / "tree", symlinks=True)
            files = sorted(
                os.path.relpath(os.path.join(where, file), root / "tree")
                for where, _folders, inside in os.walk(root / "tree")
                for file in inside
                if not os.path.islink(os.path.join(where, file))
            )
            size = sum((root / "tree" / file).stat().st_size for file in files)
            scale.about(f"{name}: {len(files):,} files of {size / 1e6:.0f} MB; {scale.heavy} rounds, in memory, seed {SEED}")
            changed = random.Random(SEED).sample(files, len(files) // 100)
            for _ in range(scale.heavy):
                for what, who, took in measure(root, changed):
                    yield Sample(what=what, who=who, at=name, value=took, unit="s")
