"""`python -m tests.support.embed` puts deploy/user-data.sh into the template that carries it; a test compares the two."""

import re
import textwrap
from typing import Final

from tests.support.cloudformation import ROOT

_TEMPLATE: Final = ROOT / "deploy" / "cloudformation" / "ec2-fleet.yaml"
_BODY: Final = re.compile(r"^( +)- \|\n(?:\1  .*\n|\n)+(?=  Group:\n)", re.MULTILINE)


def embedded(template: str, script: str) -> str:
    """The template with the script in the place of the one that it had."""

    def body(found: re.Match[str]) -> str:
        return f"{found[1]}- |\n" + textwrap.indent(script, found[1] + "  ")

    text, times = _BODY.subn(body, template)
    if times != 1:
        raise ValueError(f"{_TEMPLATE} has {times} places for a script")
    return text


if __name__ == "__main__":
    _TEMPLATE.write_text(embedded(_TEMPLATE.read_text(), (ROOT / "deploy" / "user-data.sh").read_text()))
