"""Each row of tests/badinput/builds.yaml is a build on the real engine that goes wrong in its way, and ends as the row says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.farm import Farm

pytestmark = pytest.mark.docker
ROWS = yaml.safe_load((Path(__file__).parents[1] / "badinput" / "builds.yaml").read_text())


@pytest.fixture(scope="module")
def started(farm: Farm) -> dict[str, str]:
    """All of them, queued at once; build ids by the rows' names."""
    found = {}
    for row in ROWS:
        more = f"{row['more']}\n" if "more" in row else ""
        found[row["name"]] = farm.build(row["commands"], project="badinput", more=more, cache={"type": "S3"})
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['row']} {row['name']}")
def test_a_build_that_goes_wrong_ends_as_it_should(farm: Farm, started: dict[str, str], row: dict[str, Any]) -> None:
    build_id = started[row["name"]]
    build = farm.ended(build_id, within_s=240)
    log = farm.log_of(build_id)
    assert build["millrace"]["state"] == row["state"], log[-3000:]
    assert row["reason"] in ("", build["millrace"]["reason"])
    assert build["millrace"]["reason"].startswith("user.") or row["state"] == "SUCCEEDED"
    assert len(build["millrace"]["attempts"]) == 1
    for words in row["words"]:
        assert words in log, log[-3000:]
