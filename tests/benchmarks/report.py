"""The page of what the benchmarks found: the targets first, then who is better and who is worse, then all figures and plots."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from millrace import drawing
from tests.benchmarks import caches, checkout, claims, logpath, starts
from tests.benchmarks.samples import MORE_IS_BETTER, OURS, Sample

About = Mapping[str, Mapping[str, Any]]
"""Of each part: `about` (lines), `commit`, `machine`, `seed`, `took_s`; `incomplete`: why it ended before its time."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One median against another of the same run: at most `bound` times, or `least` so much."""

    label: str
    what: str
    who: str = OURS
    at: str = ""
    than: str
    than_what: str = ""
    bound: float
    least: bool = False


TARGETS: Final = (
    Target(label="request to first command", what=starts.FIRST, than="docker run", than_what=starts.WHOLE, bound=0.15),
    Target(label="request to verdict", what=starts.WHOLE, than="docker run", bound=0.4),
    Target(label="the same, image never used before", what=starts.COLD, than="docker run", bound=1.3),
    Target(
        label="builds per minute, 4 in parallel",
        what=starts.PER_MINUTE,
        at="4 in parallel",
        than="bare loop",
        bound=0.85,
        least=True,
    ),
    Target(
        label="restore of node_modules that the worker has",
        what=caches.RESTORE,
        who=caches.WARM,
        at="node_modules",
        than="tar.zst",
        bound=0.05,
    ),
    Target(
        label="save of node_modules after a change of 1 %",
        what=caches.AGAIN,
        at="node_modules",
        than="tar.zst of all",
        bound=0.05,
    ),
    Target(label="output of a build", what=logpath.OUTPUT, than="bare attach", bound=0.7, least=True),
    *(
        Target(
            label=f"claim with 100,000 queued, {kind}",
            what=claims.CLAIM,
            who=claims.who(100_000),
            at=kind,
            than=claims.who(100),
            bound=1.5,
        )
        for kind in claims.KINDS
    ),
)
PLOTTED: Final = (
    (starts.WHOLE, ""),
    (starts.PER_MINUTE, "4 in parallel"),
    (caches.RESTORE, "node_modules"),
    (caches.AGAIN, "node_modules"),
    (checkout.CHECKOUT, "whole"),
    (claims.CLAIM, "SQLite"),
)
HOW: Final = """
- Millrace is as shipped (two containers parked), and is followed by its stream of events, as `millrace run` does; its moment of
  the first command is that of its ledger. Its PostgreSQL has `fsync` off, and its MinIO shares the disk.
- Buildbot: a master with four `DockerLatentWorker`s, `build_wait_timeout=0` for a fresh container each, an image with its worker
  in it, asked and polled (every 20 ms) over its REST interface.
- gitlab-ci-local: from the start of its command to its end, in a new repository of one file; the image that it moves files with
  is stood in for by the one that all use.
- In parallel: so many clients, each of which asks for its next build when the one before has ended. CPU and memory are those of
  the whole machine, the engine's and the containers' too; memory of what stands by is the PSS of its own processes.
- Caches are measured as the worker handles them, without the way to the object store, which an archive would have to go, too.
- The output of a build is lines of one letter, which compress better than most logs do.
- p95 is given from 20 samples on, p99 from 30.
""".strip()
_BAR: Final = 22
_WIDTH: Final = 760
_NAMES_WIDE: Final = 250


class Figures:
    """The samples, by measure."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
        for one in samples:
            self._found.setdefault((one.what, one.at, one.unit), {}).setdefault(one.who, []).append(one.value)

    def measures(self) -> list[tuple[str, str, str]]:
        """What, at, unit."""
        return list(self._found)

    def of(self, what: str, at: str) -> tuple[str, dict[str, list[float]]]:
        """The unit, and the samples of each; ours first."""
        for (its_what, its_at, unit), whos in self._found.items():
            if (its_what, its_at) == (what, at):
                return unit, dict(sorted(whos.items(), key=lambda item: not item[0].startswith(OURS)))
        return "", {}

    def median(self, what: str, at: str, who: str) -> float | None:
        """None where it was not measured."""
        samples = self.of(what, at)[1].get(who)
        return statistics.median(samples) if samples else None


def text(samples: Sequence[Sample], parts: Mapping[str, str], about: About) -> str:
    """The page. `parts`: the part of each measure's name."""
    figures = Figures(samples)
    page = [
        "# How fast it is",
        "",
        "Made by `make bench` from `performance.csv`; do not edit it. Whatever is compared was run in one session, in",
        "alternation, on one machine: so look at the ratios of medians; the seconds are this machine's.",
        "",
        "## Against the targets",
        "",
        "| what | found | target |",
        "|---|---|---|",
        *(line for target in TARGETS for line in _against(figures, target)),
        "",
        "What is lost, doubled or late under faults stands in [faults.md](faults.md).",
        "",
        "## Worse than others",
        "",
        *_compared(figures, worse=True),
        "",
        "## Better than others",
        "",
        *_compared(figures, worse=False),
        "",
        "## How it was measured",
        "",
        HOW,
    ]
    for part, known in about.items():
        page += ["", f"## {part[0].upper()}{part[1:]}", ""]
        page += [f"{line[0].upper()}{line[1:]}." for line in known["about"]]
        page += [f"Commit {known['commit']}; {known['machine']}; it took {known['took_s']} s."]
        if "incomplete" in known:
            page += [f"**Incomplete**: it ended before its time ({known['incomplete']}); these are the samples that it had."]
        for what, at, unit in figures.measures():
            if parts[what] == part:
                page += _table(figures, what, at, unit)
    return "\n".join(page) + "\n"


def _against(figures: Figures, target: Target) -> list[str]:
    mine = figures.median(target.what, target.at, target.who)
    other = figures.median(target.than_what or target.what, target.at, target.than)
    bound = f"{'>=' if target.least else '<='} {target.bound} x"
    if mine is None or other is None:
        return [f"| {target.label} | not measured | {bound} |"]
    ratio = mine / other
    held = ratio >= target.bound if target.least else ratio <= target.bound
    return [f"| {target.label} | {'' if held else '**missed**: '}{_ratio(ratio)} x {target.than} | {bound} |"]


def _compared(figures: Figures, *, worse: bool) -> list[str]:
    """Of each measure the others that do better than we do, or worse, and how many times."""
    found = []
    for what, at, unit in figures.measures():
        whos = figures.of(what, at)[1]
        for mine in (who for who in whos if who.startswith(OURS)):
            middle, said = statistics.median(whos[mine]), []
            for other in (who for who in whos if not who.startswith(OURS)):
                theirs = statistics.median(whos[other])
                if theirs != middle and (theirs > middle) == ((unit in MORE_IS_BETTER) == worse):
                    said.append(f"{other} {_shown(theirs, unit)} ({_ratio(theirs / middle)} x)")
            if said:
                found.append(f"- {_title(what, at)}: {mine} {_shown(middle, unit)}, {', '.join(said)}")
    return found or ["- nothing"]


def _title(what: str, at: str) -> str:
    return f"{what}, {at}" if at else what


def _table(figures: Figures, what: str, at: str, unit: str) -> list[str]:
    whos = figures.of(what, at)[1]
    base = next(iter(whos))
    title = _title(what, at)
    rows = [
        "",
        f"### {title[0].upper()}{title[1:]}",
        "",
        f"| | median | p95 | p99 | samples | x {base} |",
        "|---|---|---|---|---|---|",
    ]
    for who, samples in whos.items():
        cells = [_shown(statistics.median(samples), unit)]
        cells += [
            _shown(_point(samples, share), unit) if len(samples) >= least else "" for share, least in ((0.95, 20), (0.99, 30))
        ]
        rows.append(
            f"| {who} | {' | '.join(cells)} | {len(samples)} | {_ratio(statistics.median(samples) / _base(whos[base]))} |"
        )
    if (what, at) in PLOTTED:
        rows += ["", f"![{title}]({picture(what, at)})"]
    return rows


def _base(samples: Sequence[float]) -> float:
    return statistics.median(samples) or 1e-9


def _point(samples: Sequence[float], share: float) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[round(share * 100) - 1] if len(samples) > 1 else samples[0]


def _shown(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.0f} {unit}"
    return f"{value:.1f} s" if value >= 10 else f"{value * 1000:.{2 if value < 0.01 else 0}f} ms"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def picture(what: str, at: str) -> str:
    """The name of a plot's file."""
    return f"performance-{'-'.join(f'{what} {at}'.replace('%', '').replace(',', '').split())}.svg".lower()


def pictures(samples: Sequence[Sample]) -> dict[str, str]:
    """The plots, by the names of their files."""
    figures = Figures(samples)
    known = [(what, at) for what, at, _unit in figures.measures()]
    return {picture(what, at): _plot(*figures.of(what, at), _title(what, at)) for what, at in PLOTTED if (what, at) in known}


def _plot(unit: str, whos: Mapping[str, Sequence[float]], title: str) -> str:
    """Bars of medians, with a line from the 5th to the 95th percentile."""
    scale = (_WIDTH - _NAMES_WIDE - 110) / max(_point(samples, 0.95) for samples in whos.values())
    height = len(whos) * (_BAR + 10) + 34
    parts = []
    for number, (who, samples) in enumerate(whos.items()):
        left, top, middle = _NAMES_WIDE, 30 + number * (_BAR + 10), statistics.median(samples)
        low, high = _point(samples, 0.05), _point(samples, 0.95)
        colour = "#2f6f9f" if who.startswith(OURS) or OURS not in "".join(whos) else "#a9a39a"
        y = top + _BAR / 2
        parts += [
            f'<text x="8" y="{top + 15}">{who}</text>',
            f'<rect x="{left}" y="{top}" width="{middle * scale:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<line x1="{left + low * scale:.1f}" y1="{y}" x2="{left + high * scale:.1f}" y2="{y}" stroke="#222222"/>',
            f'<text x="{left + 8 + max(middle, high) * scale:.1f}" y="{top + 15}">{_shown(middle, unit)}</text>',
        ]
    return drawing.page(_WIDTH, height, title, parts)
