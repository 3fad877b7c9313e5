"""Whether there is room for another build, on real file systems."""

from pathlib import Path

from tests.support.disks import tmpfs
from worker.headroom import lack_of_room


def test_where_there_is_room_nothing_is_said(tmp_path: Path) -> None:
    assert lack_of_room([tmp_path], min_free_bytes=0, min_free_inodes_percent=0) == ""


def test_what_is_short_is_said_with_its_folder(tmp_path: Path) -> None:
    wants = 1024**6
    said = lack_of_room([Path("/not/there"), tmp_path], min_free_bytes=wants, min_free_inodes_percent=0)
    assert said.startswith("only ")
    assert said.endswith(f"MiB of disk are free below {tmp_path}, {wants // 1024**2} are asked for")


def test_a_disk_without_inodes_has_no_room() -> None:
    with tmpfs("16m", nr_inodes="50") as disk:
        assert lack_of_room([disk], min_free_bytes=0, min_free_inodes_percent=5) == ""
        for number in range(48):
            (disk / f"f{number}").touch()
        said = lack_of_room([disk], min_free_bytes=0, min_free_inodes_percent=5)
        assert said == f"only 2.0 % of inodes are free below {disk}, 5 % are asked for"
