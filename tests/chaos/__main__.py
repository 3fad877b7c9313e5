"""`python -m tests.chaos [F-07 ...]`: run rows of the fault matrix, all without names; then write docs/faults.md anew.

What each row found is kept in docs/faults.json, a row a time, so that rows may be run one by one.
"""

import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos.harness import ROWS, Chaos

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs"
RESULTS = DOCS / "faults.json"


NOT_RUN = {
    "F-21": "with F-20: the kills come before the commit as well as behind it",
    "F-42": "a worker signs nothing: it is given signed addresses by the API",
    "F-49": "in `make test`: tests/integration/test_notices.py has a git server fail for an hour",
    "F-53": "in `make test`: tests/integration/test_upgrade.py runs the last release's worker under this release",
    "F-54": "in `make test`: tests/integration/test_backup.py restores a farm that was at work",
}
"""The rows of the matrix that this does not run, and why."""


def main(names: list[str]) -> int:
    """Run the rows of these names, or all; the exit status is how many failed."""
    for module in sorted(FOLDER.glob("rows_*.py")):
        importlib.import_module(f"tests.chaos.{module.stem}")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"no such row: {', '.join(unknown)}; there are {', '.join(sorted(ROWS))}")  # noqa: T201
        return 2
    failed = 0
    for name in names or sorted(ROWS):
        result = carry(name)
        failed += bool(result["problem"])
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known = dict(sorted({**known, name: result}.items()))
        RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        (DOCS / "faults.md").write_text(page(known))
    return failed


def carry(name: str) -> dict[str, Any]:
    """Run one row; what it found."""
    row = ROWS[name]
    chaos = Chaos(seed=int(os.environ.get("SEED", time.time())))
    print(f"{name}: {row.done}", flush=True)  # noqa: T201
    began = time.monotonic()
    problem = ""
    try:
        row.run(chaos)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:500]
        print(chaos.logs, flush=True)  # noqa: T201
    print(f"  {problem or 'held'} {chaos.measured}", flush=True)  # noqa: T201
    return {
        "done": row.done,
        "holds": row.holds,
        "target": row.target,
        "measured": chaos.measured,
        "problem": problem,
        "took_s": round(time.monotonic() - began),
        "seed": chaos.seed,
        "commit": _commit(),
        "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
    }


def _commit() -> str:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=DOCS, capture_output=True, text=True, check=False)
    return said.stdout.strip()


def page(results: dict[str, Any]) -> str:
    """The text of docs/faults.md."""
    lines = [
        "# What Millrace bears",
        "",
        "Made by `make chaos` from what its last run of each row found (`docs/faults.json`); do not edit it. Each row does what",
        "it says to real processes, waits until the farm is at rest, and then has `millrace fsck` look for anything lost,",
        "doubled or left behind, against the list of what the farm had accepted.",
        "",
        "| row | what is done | what must hold | target | what was found |",
        "|---|---|---|---|---|",
    ]
    for name, one in results.items():
        found = "; ".join(f"{what}: {value}" for what, value in one["measured"].items())
        verdict = f"**did not hold**: {one['problem']}" if one["problem"] else "held"
        cells = (name, one["done"], one["holds"], one["target"], f"{verdict}. {found}")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "Not run here:", "", "| row | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in NOT_RUN.items() if name not in results]
    missing = [name for name in (f"F-{n:02}" for n in range(1, 56)) if name not in results and name not in NOT_RUN]
    if missing:
        lines += ["", f"Not run since it was written: {', '.join(missing)}."]
    lines += ["", "| row | took | commit | seed | machine |", "|---|---|---|---|---|"]
    for name, one in results.items():
        lines.append(f"| {name} | {one['took_s']} s | {one['commit']} | {one['seed']} | {one['machine']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
