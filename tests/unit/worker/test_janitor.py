"""The janitor, with an engine that loses some of its words."""

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from buildenv.engine import LABEL_PLACE, LABEL_WORKSPACES, Leftover
from buildenv.fake_engine import FakeEngine
from millrace.errors import InfraProblem
from millrace.locks import held
from millrace.settings import Settings
from millrace.vocabulary import Reason
from worker.app import prune_mirrors
from worker.attempt import lock_of
from worker.janitor import Janitor


class Host(FakeEngine):
    """Has containers at `places`; it cannot remove what is in `stuck`, and lists nothing while it is `lost`."""

    def __init__(self, workspaces: Path, places: list[str]) -> None:
        super().__init__({})
        self.workspaces, self.places, self.stuck, self.lost = workspaces, places, set[str](), False

    def leftovers(self, labels: Mapping[str, str]) -> Iterable[Leftover]:
        if self.lost:
            raise InfraProblem("the engine is away", reason=Reason.ENGINE_LOST)
        wanted = labels.get(LABEL_PLACE, "")
        found = [
            Leftover(container_id=place, labels={LABEL_WORKSPACES: str(self.workspaces), LABEL_PLACE: place}, created_at_s=0)
            for place in self.places
        ]
        return [one for one in found if wanted in ("", one.container_id)]

    def remove(self, container_id: str) -> None:
        if container_id in self.stuck:
            raise InfraProblem("it cannot be removed", reason=Reason.ENGINE_LOST)
        self.places.remove(container_id)


def dead(folder: Path, place: str) -> Path:
    """A workspace that is old enough to be nobody's."""
    workspace = folder / place
    workspace.mkdir()
    (workspace / "file").write_text("x")
    os.utime(workspace, (0, 0))
    return workspace


def test_one_removal_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    host = Host(tmp_path, ["place-a", "place-b", "place-c"])
    host.stuck.add("place-a")
    left = dead(tmp_path, "place-b")
    assert Janitor(host, tmp_path).clean() == 3
    assert (host.places, left.exists()) == (["place-a"], False)
    host.stuck.clear()
    assert Janitor(host, tmp_path).clean() == 1
    assert host.places == []


def test_workspaces_go_though_the_engine_is_away(tmp_path: Path) -> None:
    host = Host(tmp_path, ["place-a"])
    host.lost = True
    left = dead(tmp_path, "place-b")
    assert Janitor(host, tmp_path).clean() == 1
    assert not left.exists()


def test_nothing_of_an_attempt_that_lives_is_touched(tmp_path: Path) -> None:
    host = Host(tmp_path, ["place-a"])
    alive = dead(tmp_path, "place-a")
    with held(lock_of(tmp_path, "place-a")):
        assert Janitor(host, tmp_path).clean() == 0
        assert (host.places, alive.exists()) == (["place-a"], True)
    assert Janitor(host, tmp_path).clean() == 2


def test_a_place_whose_container_stays_keeps_its_folder_for_the_next_round(tmp_path: Path) -> None:
    host = Host(tmp_path, ["place-a"])
    host.stuck.add("place-a")
    left = dead(tmp_path, "place-a")
    janitor = Janitor(host, tmp_path)
    janitor.clear("place-a")
    assert left.exists()
    host.stuck.clear()
    janitor.clear("place-a")
    assert (host.places, left.exists()) == ([], False)


def test_a_round_prunes_though_the_engine_is_away(tmp_path: Path) -> None:
    class Gone(Host):
        def leftovers(self, labels: Mapping[str, str]) -> Iterable[Leftover]:
            raise OSError("no engine at all")

    stop, rounds = threading.Event(), []

    def prune() -> None:
        rounds.append(1)
        stop.set()

    Janitor(Gone(tmp_path, []), tmp_path, prune).run_forever(stop)
    assert rounds == [1]


def test_mirrors_go_where_they_are_too_much_too_old_or_in_the_way(tmp_path: Path) -> None:
    def left(**settings: object) -> bool:
        packs = tmp_path / "mirrors" / "a" / "objects" / "pack"
        packs.mkdir(parents=True, exist_ok=True)
        (packs / "one.pack").write_bytes(b"x" * 100)
        (tmp_path / "mirrors" / "a.lock").touch()
        removed = prune_mirrors(Settings(data_dir=tmp_path, **settings))
        assert removed == (not packs.exists())
        return packs.exists()

    assert left(min_free_bytes=0, min_free_inodes_percent=0)
    assert not left(mirrors_bytes=99, min_free_bytes=0, min_free_inodes_percent=0)
    assert not left(mirrors_days=1e-9, min_free_bytes=0, min_free_inodes_percent=0)
    assert not left(min_free_bytes=2**60, min_free_inodes_percent=0)
