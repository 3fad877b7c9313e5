"""Builds public projects of several languages on the farm of this box: `python -m examples FOLDER [NAME...]`; see README.md."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.fetch import Example, fetch
from millrace.errors import MillraceError

HERE = Path(__file__).resolve().parent
MINUTES = 15
console = Console(highlight=False)


def build(example: Example, work: Path) -> tuple[bool, str, str, str]:
    """Fetch and build one; whether it succeeded, its state, how many tests ran, and its artifacts."""
    project = fetch(example, work)
    command = [sys.executable, "-m", "millrace.cli", "run", str(project), "--timeout", str(MINUTES)]
    done = subprocess.run(
        [*command, "--artifacts", str(work / "artifacts" / example.folder.name)],
        capture_output=True,
        text=True,
        timeout=MINUTES * 60 + 300,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    said = done.stdout + done.stderr
    (work / f"{example.folder.name}.log").write_text(said)
    counted = re.findall(example.tests, said)
    kept = ", ".join(re.findall(r"^artifact (\S+)", said, re.MULTILINE))
    return done.returncode == 0, "SUCCEEDED" if done.returncode == 0 else "FAILED", str(sum(map(int, counted))), kept


def main(arguments: list[str]) -> int:
    """Build all examples, or those named; the exit status."""
    parser = argparse.ArgumentParser(description="Build public projects of several languages on the farm of this box.")
    parser.add_argument("work", type=Path, help="folder for sources, logs and artifacts")
    parser.add_argument("names", nargs="*", help="only these examples")
    chosen = parser.parse_args(arguments)
    known = {path.parent.name: Example.read(path.parent) for path in sorted(HERE.glob("*/source.json"))}
    if unknown := [name for name in chosen.names if name not in known]:
        parser.error(f"there is no example {', '.join(unknown)}; known: {', '.join(known)}")
    work: Path = chosen.work.expanduser().resolve()
    table = Table(box=None, pad_edge=False)
    for column in ("example", "language", "version", "state", "tests", "took", "artifacts"):
        table.add_column(column)
    failed = 0
    for name in chosen.names or known:
        example = known[name]
        console.print(f"building {name} ({example.language})")
        began = time.monotonic()
        try:
            well, state, tests, kept = build(example, work)
        except (MillraceError, OSError, subprocess.TimeoutExpired) as error:
            well, state, tests, kept = False, str(error), "", ""
        failed += not well
        took = f"{time.monotonic() - began:.0f} s"
        table.add_row(name, example.language, example.version, state, tests, took, kept, style="" if well else "red")
        if not well:
            console.print(f"  failed: {state}; its log is {work / (name + '.log')}", markup=False)
    console.print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
