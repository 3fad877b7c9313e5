"""docs/simulate.md shows what the command really says and draws. `python -m tests.unit.test_simulate_page` writes it anew."""

import os
import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from millrace.commands.simulate import fleet_simulate

TOP = Path(__file__).parents[2]
PAGE = TOP / "docs" / "simulate.md"
_SHOWN = re.compile(r"^```sh\nmillrace fleet simulate ([^\n]*)\n```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown_by(words: str, folder: Path) -> str:
    """What the command says, with pictures below `folder`."""
    said = [str(folder / word) if word.startswith("docs/") else word for word in shlex.split(words)]
    result = CliRunner().invoke(fleet_simulate, said, standalone_mode=False)
    assert result.exception is None, result.exception
    lines = [line.rstrip() for line in result.output.splitlines() if not line.startswith("The picture is in ")]
    return "\n".join(lines).strip() + "\n"


def test_the_page_shows_what_the_command_says(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    examples = _SHOWN.findall(PAGE.read_text())
    assert len(examples) == 3
    for words, shown in examples:
        assert shown == shown_by(words, tmp_path), words
    drawn = {path.name: path.read_text() for path in (tmp_path / "docs").iterdir()}
    assert drawn == {path.name: path.read_text() for path in PAGE.parent.glob("simulate-*.svg")}
    assert all(f"]({name})" in PAGE.read_text() for name in drawn)


if __name__ == "__main__":
    os.chdir(TOP)
    PAGE.write_text(
        _SHOWN.sub(
            lambda found: f"```sh\nmillrace fleet simulate {found[1]}\n```\n\n```text\n{shown_by(found[1], TOP)}```",
            PAGE.read_text(),
        )
    )
