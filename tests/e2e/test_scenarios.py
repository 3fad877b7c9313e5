"""A folder below `scenarios/` is a test: `millrace run` builds it, and `expect.json` says what must come of it.

expect.json: `state`, `reason`, `exit` (of the command), `phases` (type -> status), `absent` (phases that must not be there),
`log` and `no_log` (words), `artifacts` (names), `zip` (names in the one zip), `args` (for the command), `message` (words).
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from millrace.client import build_path
from tests.support.farm import Farm

pytestmark = pytest.mark.docker
SCENARIOS = sorted(path.parent for path in (Path(__file__).parent / "scenarios").glob("*/expect.json"))


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda path: path.name)
def test_scenario(farm: Farm, folder: Path, tmp_path: Path) -> None:
    expected: dict[str, Any] = json.loads((folder / "expect.json").read_text())
    done = farm.cli("run", str(folder), "--artifacts", str(tmp_path / "out"), *expected.get("args", []))
    output = done.stdout + done.stderr
    assert "Traceback" not in output
    assert done.returncode == expected["exit"], output
    found = re.search(r"^Build (\S+)", output, re.MULTILINE)
    if "state" not in expected:
        assert found is None, output
        for words in expected.get("log", []):
            assert words in output
        return
    assert found is not None, output
    build = farm.show(found[1])
    ours = build["millrace"]
    assert (ours["state"], ours["reason"]) == (expected["state"], expected["reason"]), output
    statuses = {phase["phaseType"]: phase.get("phaseStatus") for phase in build["phases"]}
    assert {name: statuses.get(name) for name in expected.get("phases", {})} == expected.get("phases", {})
    assert not set(expected.get("absent", [])) & set(statuses)
    assert build["phases"][-1]["phaseType"] == "COMPLETED"
    log = farm.log_of(found[1])
    for words in expected.get("log", []):
        assert words in log, log
    for words in expected.get("no_log", []):
        assert words not in log, log
    assert expected.get("message", "") in ours["message"]
    names = sorted(item["name"] for item in farm.client.get(f"{build_path(found[1])}/artifacts")["artifacts"])
    assert names == sorted(expected.get("artifacts", [])), names
    if "zip" in expected:
        (name,) = names
        with zipfile.ZipFile(tmp_path / "out" / name) as archive:
            assert sorted(archive.namelist()) == sorted(expected["zip"])
