"""How long a buildspec of about 200 lines takes to be understood, against the bare YAML reader in the same run."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from buildenv.buildspec import parse
from tests.benchmarks.samples import OURS, Sample, Scale

TEXT = (Path(__file__).parent / "data" / "buildspec.yml").read_text()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def samples(scale: Scale) -> Iterator[Sample]:
    """In alternation."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    scale.about(f"a buildspec of {TEXT.count(chr(10))} lines")
    for _ in range(10 * scale.rounds):
        for who, work in ((OURS, lambda: parse(TEXT)), ("yaml.load", lambda: yaml.load(TEXT, Loader=loader))):  # noqa: S506
            yield Sample(what="to understand a buildspec", who=who, value=_seconds(work), unit="s")
