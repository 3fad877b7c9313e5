"""How long a buildspec of about 200 lines takes to be understood, against the bare YAML reader in the same run.

Run by `make bench`; the target is under 20 ms.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from buildenv.buildspec import parse

TEXT = (Path(__file__).parent / "data" / "buildspec.yml").read_text()
ROUNDS = 50


def median_ms(work: Callable[[], object]) -> float:
    """The median of `ROUNDS` runs, in milliseconds."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def main() -> None:
    """Measure, in alternation with the yardstick."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    bare, ours = [], []
    for _ in range(5):
        bare.append(median_ms(lambda: yaml.load(TEXT, Loader=loader)))  # noqa: S506  # a safe loader
        ours.append(median_ms(lambda: parse(TEXT)))
    yardstick, took = statistics.median(bare), statistics.median(ours)
    ratio = f"{took / yardstick:.1f} x yaml.load ({yardstick:.2f} ms)"
    print(f"parse a buildspec of {TEXT.count(chr(10))} lines: {took:.2f} ms, {ratio}; target < 20 ms")  # noqa: T201


if __name__ == "__main__":
    main()
