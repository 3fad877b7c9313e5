"""A folder below `scenarios/` is a test: `millrace run` builds it, and `expect.json` says what must come of it.

expect.json: `state`, `reason`, `exit` (of the command), `phases` (type -> status), `absent` (phases that must not be there),
`log` and `no_log` (words), `artifacts` (names), `zip` (names in the one zip), `args` (for the command), `message` (words),
`attempts` (how many), `context` (phase type -> status code), `exported` (name -> value),
`published` (addresses in the project's bucket, with UUID for the build's).

With `project` (settings that are laid over the scenario's own) or `overrides` (of StartBuild) it is built through the API;
`@upload/NAME` in them stands for the location of the folder NAME of the scenario, uploaded by itself. `secrets` are kept in the
farm's store before. `then` lists further builds of the same project, each with its own expectations and overrides.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from buildenv.folder import pack
from millrace.client import build_path
from millrace.ids import uuid_of
from tests.support.farm import Farm, wait_until

pytestmark = pytest.mark.docker
SCENARIOS = sorted(path.parent for path in (Path(__file__).parent / "scenarios").glob("*/expect.json"))


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda path: path.name)
def test_scenario(farm: Farm, folder: Path, tmp_path: Path) -> None:
    expected: dict[str, Any] = json.loads((folder / "expect.json").read_text())
    for name, value in expected.get("secrets", {}).items():
        kept = farm.cli("secret", "set", name, text=value)
        assert kept.returncode == 0, kept.stderr
    if "project" in expected or "overrides" in expected:
        name = f"scenario-{folder.name}"
        make_project(farm, folder, name, expected.get("project", {}))
        for number, wanted in enumerate([expected, *expected.get("then", [])]):
            overrides = at_their_places(farm, folder, wanted.get("overrides", {}))
            build_id = farm.client.post("/v1/builds", {"projectName": name, **overrides})["id"]
            farm.ended(build_id, within_s=120)
            check(farm, build_id, wanted)
            check_artifacts(farm, build_id, wanted, tmp_path / str(number))
        return
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
    check(farm, found[1], expected)
    check_artifacts(farm, found[1], expected, tmp_path / "again")


def check(farm: Farm, build_id: str, expected: dict[str, Any]) -> None:
    """What the API says of the build, and its log, are as expected."""
    build = farm.show(build_id)
    log = farm.log_of(build_id)
    ours = build["millrace"]
    assert (ours["state"], ours["reason"]) == (expected["state"], expected["reason"]), log
    statuses = {phase["phaseType"]: phase.get("phaseStatus") for phase in build["phases"]}
    assert {name: statuses.get(name) for name in expected.get("phases", {})} == expected.get("phases", {})
    assert not set(expected.get("absent", [])) & set(statuses)
    assert build["phases"][-1]["phaseType"] == "COMPLETED"
    for words in expected.get("log", []):
        assert words in log, log
    for words in expected.get("no_log", []):
        assert words not in log, log
    assert expected.get("message", "") in ours["message"]
    codes = {phase["phaseType"]: phase["contexts"][0]["statusCode"] for phase in build["phases"] if phase.get("contexts")}
    assert {name: codes.get(name) for name in expected.get("context", {})} == expected.get("context", {})
    exported = {item["name"]: item["value"] for item in build["exportedEnvironmentVariables"]}
    assert exported == expected.get("exported", exported)
    if expected["state"] != "FAULT" or "attempts" in expected:
        assert len(ours["attempts"]) == expected.get("attempts", 1)


def check_artifacts(farm: Farm, build_id: str, expected: dict[str, Any], out: Path) -> None:
    """The artifacts have the names that are expected, and the one zip holds what it should."""
    found = farm.client.get(f"{build_path(build_id)}/artifacts")["artifacts"]
    names = sorted(f"{item['identifier']}:{item['name']}" if item["identifier"] else item["name"] for item in found)
    assert names == sorted(expected.get("artifacts", [])), names
    if "published" in expected:

        def published() -> list[str]:
            listed = farm.client.get(f"{build_path(build_id)}/artifacts")["artifacts"]
            return sorted(str(item["published"]).replace(uuid_of(build_id), "UUID") for item in listed)

        wait_until(lambda: published() == sorted(expected["published"]))
    if "zip" in expected:
        (item,) = found
        farm.client.download(build_id, item["name"], item["identifier"], out / "the.zip")
        with zipfile.ZipFile(out / "the.zip") as archive:
            assert sorted(archive.namelist()) == sorted(expected["zip"])


def make_project(farm: Farm, folder: Path, name: str, changes: dict[str, Any]) -> None:
    """The scenario's project: its folder as an uploaded source, and `changes` laid over."""
    settings: dict[str, Any] = {
        "name": name,
        "source": {"type": "S3", "location": uploaded(farm, folder)},
        "artifacts": {"type": "S3", "packaging": "ZIP", "name": f"{name}.zip"},
        "environment": {"type": "LINUX_CONTAINER", "image": "millrace/standard:latest", "computeType": "BUILD_GENERAL1_SMALL"},
    }
    for member, value in at_their_places(farm, folder, changes).items():
        settings[member] = {**settings[member], **value} if isinstance(settings.get(member), dict) else value
    if any(item["name"] == name for item in farm.client.get("/v1/projects", limit=100)["projects"]):
        farm.client.put(f"/v1/projects/{name}", settings)
    else:
        farm.client.post("/v1/projects", settings)


def at_their_places(farm: Farm, folder: Path, value: Any) -> Any:
    """`value` with each `@upload/NAME` replaced by where that folder lies now."""
    if isinstance(value, dict):
        return {key: at_their_places(farm, folder, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_their_places(farm, folder, inner) for inner in value]
    if isinstance(value, str) and value.startswith("@upload/"):
        return uploaded(farm, folder / value.removeprefix("@upload/"))
    return value


def uploaded(farm: Farm, folder: Path) -> str:
    """The location of `folder`, sent to the farm."""
    with io.BytesIO() as body:
        packed = pack(folder, body)
        body.seek(0)
        return farm.client.upload(body, packed.size_bytes, packed.sha256)
