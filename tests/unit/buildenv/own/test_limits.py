from pathlib import Path

import pytest

from buildenv.own import limits
from millrace.vocabulary import GIB


def laid_out(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


NEWER = "0::/ecs/task\n"
OLDER = "5:memory:/ecs/task\n4:cpu,cpuacct:/ecs/task\n"


@pytest.mark.parametrize(
    ("files", "groups"),
    [
        ({"memory_dot_events": "low 0\noom 3\noom_kill 2\n"}, NEWER),
        ({"ecs__task__memory_dot_events": "oom_kill 2\n", "memory_dot_events": "oom_kill 9\n"}, NEWER),
        ({"memory__memory_dot_oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"}, OLDER),
    ],
)
def test_the_kernels_count_is_read_in_both_versions(tmp_path: Path, files: dict[str, str], groups: str) -> None:
    assert limits.ooms(laid_out(tmp_path, **files), groups) == 2


def test_without_a_count_nothing_is_proven(tmp_path: Path) -> None:
    assert limits.ooms(tmp_path, NEWER) is None
    assert limits.ooms(laid_out(tmp_path, memory__memory_dot_oom_control="oom_kill_disable 0\n"), OLDER) is None


def test_memory_is_the_groups_limit_and_no_more_than_there_is(tmp_path: Path) -> None:
    assert limits.memory_bytes(laid_out(tmp_path, memory_dot_max="134217728\n"), NEWER) == 128 * 1024**2
    whole = limits.memory_bytes(tmp_path / "none", NEWER)
    assert whole > GIB // 8
    assert limits.memory_bytes(laid_out(tmp_path, memory_dot_max="max\n"), NEWER) == whole
    older = laid_out(tmp_path / "older", memory__memory_dot_limit_in_bytes="9223372036854771712\n")
    assert limits.memory_bytes(older, OLDER) == whole


def test_cpus_are_the_groups_quota_rounded_and_one_at_least(tmp_path: Path) -> None:
    assert limits.cpus(laid_out(tmp_path, cpu_dot_max="25000 100000\n"), NEWER) == 1
    whole = limits.cpus(tmp_path / "none", NEWER)
    assert limits.cpus(laid_out(tmp_path, cpu_dot_max="max 100000\n"), NEWER) == whole
    assert limits.cpus(laid_out(tmp_path, cpu_dot_max="99900000 100000\n"), NEWER) == whole
    older = laid_out(
        tmp_path, **{"cpu,cpuacct__cpu_dot_cfs_quota_us": "100000\n", "cpu,cpuacct__cpu_dot_cfs_period_us": "100000\n"}
    )
    assert limits.cpus(older, OLDER) == 1
    unlimited = laid_out(tmp_path / "unlimited", cpu__cpu_dot_cfs_quota_us="-1\n", cpu__cpu_dot_cfs_period_us="100000\n")
    assert limits.cpus(unlimited, OLDER) == whole
