"""`python -m tests.benchmarks.bench [--quick] [--only PART,...] [--write]`: measure, against a bare yardstick in the same run.

The raw figures go to docs/performance.csv, what they were measured on to docs/performance.json, and docs/performance.md with
its plots is made from them, where --write asks for that. A part that is measured anew replaces what was known of it alone; of one
that fails in the midst, what it found until then is kept, and the page says so.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import caches, checkout, claims, hooks, lines, logpath, parser, report, starts
from tests.benchmarks.samples import Part, Sample, Scale

_ROOT: Final = Path(__file__).parents[2]
DOCS: Final = _ROOT / "docs"
PARTS: Final[dict[str, Part]] = {
    "starts": starts.samples,
    "caches": caches.samples,
    "checkout": checkout.samples,
    "output": logpath.samples,
    "lines": lines.samples,
    "claims": claims.samples,
    "hooks": hooks.samples,
    "parser": parser.samples,
}
_MARK: Final = "bench: "
"""What a line of a part's process begins with that is meant for us."""
_COLUMNS: Final = ("part", "what", "who", "at", "value", "unit")


def read(docs: Path = DOCS) -> tuple[list[tuple[str, Sample]], dict[str, Any]]:
    """What is known: samples with their parts, and what each part was measured on."""
    if not (docs / "performance.csv").exists():
        return [], {}
    with open(docs / "performance.csv", newline="") as file:
        rows = [(row.pop("part"), Sample(**row | {"value": float(row["value"])})) for row in csv.DictReader(file)]
    return rows, json.loads((docs / "performance.json").read_text())


def page(rows: Sequence[tuple[str, Sample]], about: dict[str, Any]) -> str:
    """docs/performance.md, made of what is known."""
    return report.text([one for _part, one in rows], {one.what: part for part, one in rows}, about)


def write(rows: Sequence[tuple[str, Sample]], about: dict[str, Any], docs: Path = DOCS) -> None:
    """All that is known, and the page."""
    with open(docs / "performance.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((part, one.what, one.who, one.at, one.value, one.unit) for part, one in rows)
    (docs / "performance.json").write_text(json.dumps(about, indent=1) + "\n")
    (docs / "performance.md").write_text(page(rows, about))
    for name, drawn in report.pictures([one for _part, one in rows]).items():
        (docs / name).write_text(drawn)


def measure(name: str, *, quick: bool) -> tuple[list[tuple[str, Sample]], dict[str, Any]]:
    """One part, in a process of its own: some leave namespaces, set up logs, or keep what they loaded."""
    command = [sys.executable, "-m", __spec__.name, "--carry", name, *(["--quick"] if quick else [])]
    began = time.monotonic()
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=False)
    samples, about = heard(done.stdout, done.returncode)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=False)
    about |= {
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Docker {_engine()}",
        "took_s": round(time.monotonic() - began),
    }
    return [(name, one) for one in samples], about


def carry(name: str, *, quick: bool) -> None:
    """Measure here, and tell what is found line by line: should it end in the midst, that much is known."""

    def tell(what: str, said: object) -> None:
        sys.stdout.write(f"{_MARK}{json.dumps({what: said})}\n")
        sys.stdout.flush()

    scale = Scale(
        rounds=5 if quick else 30,
        heavy=1 if quick else 5,
        queued=(100, 10_000) if quick else (100, 10_000, 100_000),
        peers=not quick,
        about=lambda line: tell("about", line),
    )
    try:
        for one in PARTS[name](scale):
            tell("sample", {**vars(one), "value": round(one.value, 6)})
    except Exception as error:
        tell("incomplete", f"{type(error).__name__}: {error}"[:300])
        raise


def heard(output: str, status: int) -> tuple[list[Sample], dict[str, Any]]:
    """What a part has told until it ended with `status`. `incomplete` says why, where it did not come to its end."""
    told = [json.loads(line.removeprefix(_MARK)) for line in output.splitlines() if line.startswith(_MARK)]
    samples = [Sample(**one["sample"]) for one in told if "sample" in one]
    about: dict[str, Any] = {"about": [one["about"] for one in told if "about" in one]}
    if status:
        why = [one["incomplete"] for one in told if "incomplete" in one]
        about["incomplete"] = why[0] if why else f"it ended with status {status}"
    return samples, about


def main() -> int:
    """Measure, print, and write where asked to. The exit status is how many parts failed."""
    options = argparse.ArgumentParser(
        prog="bench", description="Measure Millrace beside bare yardsticks and other build systems."
    )
    options.add_argument("--quick", action="store_true", help="without other build systems, and few samples")
    options.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas between them: {', '.join(PARTS)}")
    options.add_argument("--write", action="store_true", help="make docs/performance.* anew")
    options.add_argument("--carry", choices=PARTS, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.carry:
        carry(asked.carry, quick=asked.quick)
        return 0
    names = asked.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        options.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    known, about = read() if asked.write else ([], {})
    failed = 0
    for name in names:
        sys.stderr.write(f"measuring {name}\n")
        try:
            found, its = measure(name, quick=asked.quick)
        except Exception:  # what the other parts find is not to be lost
            traceback.print_exc()
            failed += 1
            continue
        failed += "incomplete" in its
        if not found:
            sys.stderr.write(f"{name}: nothing was found: {its.get('incomplete', 'it has no samples')}\n")
            continue
        known = [row for row in known if row[0] != name] + found
        about[name] = its
        known.sort(key=lambda row: list(PARTS).index(row[0]))
        about = {part: about[part] for part in PARTS if part in about}
        if asked.write:
            write(known, about)
    sys.stdout.write(page(known, about))
    return failed


def _engine() -> str:
    said = subprocess.run(["docker", "version", "-f", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
    return said.stdout.strip() if shutil.which("docker") else "?"


if __name__ == "__main__":
    sys.exit(main())
