"""What deploy/ holds, as the tools see it that will read it: systemd, shellcheck and Terraform."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from millrace.settings import Settings
from tests.support.need import missing

ROOT: Final = Path(__file__).resolve().parents[2]
UNITS: Final = ROOT / "deploy" / "systemd"
INSTANCES: Final = {"millrace-worker@.service": "millrace-worker@1.service"}
EXPOSURE: Final = {"millrace-api.service": 2.0, "millrace-scheduler.service": 2.0, "millrace-worker@.service": 7.5}
"""How open `systemd-analyze security` may find a unit, of 10. A worker is root: it holds the socket of its engine."""
each_unit = pytest.mark.parametrize("unit", sorted(EXPOSURE))


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        missing(name, f"apt-get install {package}")
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with the units, and with what they start."""
    for program in ("opt/millrace/bin/millrace", "usr/bin/dockerd"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch(0o755)
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    for path in UNITS.iterdir():
        shutil.copy(path, folder)
    (folder / "docker.service").write_text("[Unit]\nDescription=Docker\n[Service]\nExecStart=/usr/bin/dockerd\n")
    targets = tmp_path / "usr/lib/systemd/system"
    targets.mkdir(parents=True)
    for path in [*Path("/lib/systemd/system").glob("*.target"), *Path("/lib/systemd/system").glob("*.slice")]:
        shutil.copy(path, targets)
    return tmp_path


def test_all_units_are_looked_at() -> None:
    assert {path.name for path in UNITS.iterdir()} == set(EXPOSURE)


@each_unit
def test_systemd_finds_nothing_wrong_with_a_unit(unit: str, root: Path) -> None:
    command = [tool("systemd-analyze", "systemd"), "verify", f"--root={root}", INSTANCES.get(unit, unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@each_unit
def test_a_unit_is_as_closed_as_it_can_be(unit: str, root: Path) -> None:
    command = [tool("systemd-analyze", "systemd"), "security", "--offline=yes", f"--root={root}", INSTANCES.get(unit, unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE[unit]


def test_a_worker_that_left_stays_away_and_has_time_to_leave() -> None:
    text = (UNITS / "millrace-worker@.service").read_text()
    said = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert said["Restart"] == "on-failure"  # status 0 is final
    assert float(said["TimeoutStopSec"]) >= Settings().drain_s + 45
    assert said["KillMode"] == "process"


@pytest.mark.parametrize("script", ["user-data.sh", "postgres-start"])
def test_shellcheck_finds_nothing_in_a_script(script: str) -> None:
    command = [tool("shellcheck", "shellcheck"), "--severity=warning", str(ROOT / "deploy" / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_terraform_would_write_the_modules_as_they_are() -> None:
    """Not more where there is no Terraform: no package of Debian's or PyPI's has it. tests/unit/deploy reads them without it."""
    terraform = shutil.which("terraform")
    if terraform is None:
        for path in sorted((ROOT / "deploy" / "terraform").rglob("*.tf")):
            text = path.read_text()
            assert "\t" not in text and text.endswith("}\n"), path
        return
    command = [terraform, "fmt", "-check", "-recursive", "-diff", str(ROOT / "deploy" / "terraform")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
