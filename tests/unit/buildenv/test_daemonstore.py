"""What Docker daemons of builds keep: one build at a time has it, and nothing of its containers is there for the next."""

import os
import threading
from pathlib import Path

from buildenv import daemonstore, layers
from buildenv.daemonstore import DaemonStore, kept

MIB = 1024 * 1024


def a_daemon_ran(root: Path) -> None:
    """As dockerd leaves its data root with overlay2: one image's layer, and a container with a volume on top of it."""
    for name in ("image-layer/diff", "writable/diff", "writable-init/diff", "l"):
        (root / "overlay2" / name).mkdir(parents=True)
    (root / "overlay2" / "image-layer" / "diff" / "lib").write_bytes(b"x" * MIB)
    (root / "overlay2" / "writable" / "diff" / "secret").write_text("of build n")
    (root / "overlay2" / "l" / "ABC").symlink_to("../image-layer/diff")
    mounts = root / "image" / "overlay2" / "layerdb" / "mounts" / "0123"
    mounts.mkdir(parents=True)
    (mounts / "mount-id").write_text("writable")
    (mounts / "init-id").write_text("writable-init\n")
    (mounts.parent / "4567").mkdir()
    (mounts.parent / "4567" / "mount-id").write_text("../../../outside")
    (root / "image" / "overlay2" / "repositories.json").write_text("{}")
    (root / "buildkit").mkdir()
    for name in ("containers/0123", "volumes/data/_data", "network/files", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "volumes" / "data" / "_data" / "file").write_text("of build n")
    (root / "engine-id").write_text("id")
    (root / "swarm").symlink_to("/nowhere")


def test_images_stay_and_nothing_of_containers_does(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    store = DaemonStore(tmp_path / "docker")
    root = store.take("demo")
    assert root is not None
    a_daemon_ran(root)
    store.close()
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()) == [
        "image/overlay2/repositories.json",
        "overlay2/image-layer/diff/lib",
        "overlay2/l/ABC",
    ]
    assert sorted(path.name for path in root.iterdir()) == ["buildkit", "image", "overlay2"]
    assert outside.is_dir()
    assert store.take("demo") == root
    store.close()


def test_one_build_at_a_time_has_it_and_other_projects_have_their_own(tmp_path: Path) -> None:
    first, second, other = (DaemonStore(tmp_path / "docker") for _ in range(3))
    mine = first.take("demo")
    assert mine is not None
    assert second.take("demo") is None
    assert other.take("demo2") not in (None, mine)
    (shown,) = (one for one in kept(tmp_path / "docker") if one.project == "demo")
    assert shown.size_bytes is None
    first.close()
    assert second.take("demo") == mine
    second.close()
    other.close()
    assert all(one.size_bytes is not None for one in kept(tmp_path / "docker"))


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    stores = [DaemonStore(tmp_path / "docker") for _ in range(8)]
    got: list[Path | None] = []
    begun = threading.Barrier(8)

    def take(store: DaemonStore) -> None:
        begun.wait(10)
        got.append(store.take("demo"))

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(path is not None for path in got) == 1
    for store in stores:
        store.close()


def test_what_a_killed_worker_left_is_cleaned_before_it_is_used(tmp_path: Path) -> None:
    killed = DaemonStore(tmp_path / "docker")
    root = killed.take("demo")
    assert root is not None and killed._lock is not None
    a_daemon_ran(root)
    killed._lock.close()  # as its end does
    following = DaemonStore(tmp_path / "docker")
    assert following.take("demo") == root
    following.close()
    assert not (root / "volumes").exists() and not (root / "overlay2" / "writable").exists()


def test_the_least_recently_used_and_the_old_go_but_none_that_a_build_has(tmp_path: Path) -> None:
    folder = tmp_path / "layers" / daemonstore.FOLDER
    for number, project in enumerate(("old", "used", "fresh")):
        store = DaemonStore(folder)
        root = store.take(project)
        assert root is not None
        (root / "overlay2").mkdir()
        (root / "overlay2" / "layer").write_bytes(os.urandom(MIB))
        store.close()
        lock = root.with_suffix(".lock")
        os.utime(lock, (lock.stat().st_atime, lock.stat().st_mtime - 100 + number))
    holder = DaemonStore(folder)
    assert holder.take("used") is not None
    assert layers.evict(tmp_path / "layers", 3 * MIB // 2) == 0
    assert sorted(one.project for one in kept(folder)) == ["fresh", "used"]
    holder.close()
    assert daemonstore.evict(folder, 10 * MIB, most_age_s=50) == 1
    assert [one.project for one in kept(folder)] == ["used"]
    assert daemonstore.evict(folder, 0) == 1
    assert list(folder.iterdir()) == []
