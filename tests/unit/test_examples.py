"""The examples are whole: each has a pinned source and a buildspec without a fault. `make examples` builds them."""

import re
from pathlib import Path

import pytest

from buildenv.buildspec import parse
from examples.fetch import Example

ROOT = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/buildspec.yml"))


def test_there_are_fourteen_and_the_page_names_them() -> None:
    named = re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert named == [folder.name for folder in FOLDERS]
    assert len(FOLDERS) == 14


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_is_pinned_and_well_formed(folder: Path) -> None:
    example = Example.read(folder)
    assert re.fullmatch(r"[0-9a-f]{64}", example.sha256)
    assert re.compile(example.tests).groups == 1
    parse((folder / "buildspec.yml").read_bytes())
