"""What a cache of 30,000 small files costs to restore and to save, against archives and a plain copy in the same run, in memory.

Run by `make bench`, as root. The targets: to restore what the worker has, 0.05 x unpacking a tar.zst; to save a change of one
file in a hundred, 0.05 x packing the whole as one.
"""

import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from buildenv import layers, mounts

FILES, SEED, ROUNDS, MOST = 30_000, 20261123, 3, 10**10

PLACE = "/dev/shm"  # a disk that trees are removed from again and again grows slow, and differs from round to round


def make_tree(root: Path) -> list[Path]:
    """A tree like `node_modules`: folders of some thirty files, most of them of a few KiB."""
    random.seed(SEED)
    words = [random.randbytes(6).hex() for _ in range(2000)]
    made = []
    for number in range(FILES):
        folder = root / f"package{number // 300}" / f"lib{number // 30 % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"f{number}.js"
        path.write_text(" ".join(random.choices(words, k=int(random.lognormvariate(5, 1)))))
        made.append(path)
    return made


def seconds(work: Callable[..., object], *given: str) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began


def shell(line: str) -> None:
    """Run it."""
    subprocess.run(line, shell=True, check=True)  # noqa: S602  # our own words


def measure(root: Path) -> dict[str, float]:
    """One round: each way once, in seconds."""
    tree, store = root / "tree", root / "store"
    took = {}
    for name, pack, unpack in (
        ("tar.gz", "tar -czf {a} -C {t} .", "tar -xzf {a} -C {o}"),
        ("tar.zst", "tar -c -C {t} . | zstd -q -3 -T0 -f -o {a}", "zstd -qdc {a} | tar -x -C {o}"),
        ("cp -a", "cp -a {t} {a}", "cp -a {a}/. {o}"),
    ):
        archive, out = root / "archive", root / "out"
        out.mkdir()
        took[f"save {name}"] = seconds(shell, pack.format(t=tree, a=archive))
        took[f"restore {name}"] = seconds(shell, unpack.format(o=out, a=archive))
        shutil.rmtree(out)
        shutil.rmtree(archive) if archive.is_dir() else archive.unlink()
    whole: list[layers.Packed] = []
    took["save, all"] = seconds(lambda: whole.append(layers.pack(root, ["tree"], root / "whole", max_bytes=MOST)))
    keeper = layers.Layers(store)

    def use() -> None:
        keeper.use(whole[0].sha256, lambda path: shutil.copyfile(root / "whole", path) and None, lambda: None)

    took["restore, first time on a worker"] = seconds(use)
    places = [root / name for name in ("merged", "upper/tree", "work")]
    for place in places:
        place.mkdir(parents=True)
    merged, upper, work = places

    def restore() -> None:
        use()
        mounts.overlay(merged, [store / whole[0].sha256 / "tree"], upper, work)

    took["restore, on a worker that has it"] = seconds(restore)
    for path in random.Random(SEED).sample(sorted(merged.rglob("*.js")), FILES // 100):
        path.write_text("changed")
    took["save, 1 % changed"] = seconds(lambda: layers.pack(root / "upper", ["tree"], root / "layer", max_bytes=MOST))
    mounts.unmount(merged)
    keeper.close()
    layers.evict(store, 0)
    for place in ("whole", "layer"):
        (root / place).unlink()
    for folder in ("merged", "upper", "work"):
        shutil.rmtree(root / folder)
    return took


def main() -> None:
    """Measure in alternation; the medians, and what they are of tar.zst."""
    if not mounts.are_possible():
        print("caches: not measured, only root can mount")  # noqa: T201
        return
    mounts.leave_the_hosts()
    with tempfile.TemporaryDirectory(dir=PLACE) as name:
        root = Path(name)
        make_tree(root / "tree")
        rounds = [measure(root) for _ in range(ROUNDS)]
    for what in rounds[0]:
        took = statistics.median(one[what] for one in rounds)
        yardstick = "save tar.zst" if what.startswith("save") else "restore tar.zst"
        ratio = took / statistics.median(one[yardstick] for one in rounds)
        print(f"cache of {FILES} files: {what}: {took * 1000:.0f} ms, {ratio:.3f} x {yardstick}")  # noqa: T201


if __name__ == "__main__":
    main()
