"""What a race found, as a table of ratios, a page and plots; and what of a machine is looked at while it runs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.farm import children_of

Rows = Sequence[Mapping[str, Any]]
_TARGETS: Final = (
    ("request to first command", "Millrace", "request to verdict", "docker run", 1, 0.15),
    ("request to verdict", "Millrace", "request to verdict", "docker run", 1, 0.4),
    ("builds per minute", "Millrace", "builds per minute", "bare loop", 4, -0.85),
)
"""What of whom, against what of whom, at how many in parallel, and the target of design: at most, or where negative at least."""
_BAR: Final = 22
_WIDTH: Final = 760
_COLOURS: Final = {"docker run": "#8a8f98", "bare loop": "#8a8f98", "Buildbot": "#c08552", "gitlab-ci-local": "#c08552"}


@dataclass(frozen=True, kw_only=True)
class Where:
    """What was measured on what."""

    commit: str
    machine: str
    rounds: int


def busy_s() -> float:
    """CPU seconds that this machine has spent on anything since it started."""
    user, nice, system, _idle, _wait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / 100


def memory_mib(tops: Sequence[int]) -> float:
    """Of these processes and all below them, each page that is shared counted by its share (PSS)."""
    todo, kib = list(tops), 0
    while todo:
        pid = todo.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        todo += children_of(pid)
    return kib / 1024


def values(rows: Rows, what: str, who: str, parallel: int = 1) -> list[float]:
    """The samples of one measure."""
    return [float(row["value"]) for row in rows if (row["what"], row["who"], row["parallel"]) == (what, who, parallel)]


def _whos(rows: Rows, what: str, parallel: int = 1) -> list[str]:
    return list(dict.fromkeys(row["who"] for row in rows if (row["what"], row["parallel"]) == (what, parallel)))


def _measures(rows: Rows) -> list[tuple[str, int, str]]:
    return list(dict.fromkeys((row["what"], row["parallel"], row["unit"]) for row in rows))


def _point(samples: Sequence[float], share: float) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[round(share * 100) - 1] if len(samples) > 1 else samples[0]


def _shown(value: float, unit: str) -> str:
    return f"{value * 1000:.0f} ms" if unit == "s" else f"{value:.0f} {unit}"


def text(rows: Rows, where: Where) -> str:
    """The page."""
    lines = [
        "# How fast it is",
        "",
        "Made by `make race` from `performance.csv`; do not edit it. All take part in one session, in alternation, on one",
        "machine, and run the same thing: `true` in a fresh container of one image that the machine has, on Docker's bridge. So",
        "look at the ratios; the seconds are this machine's.",
        "",
        f"{where.machine}; commit {where.commit}; {where.rounds} rounds, medians.",
        "",
        "## Against the targets",
        "",
        "| what | found | target |",
        "|---|---|---|",
    ]
    for what, who, than, whose, parallel, target in _TARGETS:
        ratio = statistics.median(values(rows, what, who, parallel)) / statistics.median(values(rows, than, whose, parallel))
        held = ratio <= target if target > 0 else ratio >= -target
        bound = f"<= {target}" if target > 0 else f">= {-target}"
        at = f", {parallel} in parallel" if parallel > 1 else ""
        lines.append(f"| {what}{at} | {'' if held else '**missed**: '}{ratio:.2f} x {whose} | {bound} x |")
    for what, parallel, unit in _measures(rows):
        lines += ["", f"## {what[0].upper()}{what[1:]}{f', {parallel} in parallel' if parallel > 1 else ''}", ""]
        lines += ["| | median | p95 | p99 | samples | x Millrace |", "|---|---|---|---|---|---|"]
        ours = statistics.median(values(rows, what, "Millrace", parallel))
        for who in _whos(rows, what, parallel):
            samples = values(rows, what, who, parallel)
            cells = [_shown(statistics.median(samples), unit)]
            cells += [_shown(_point(samples, share), unit) if len(samples) > 1 else "" for share in (0.95, 0.99)]
            lines.append(f"| {who} | {' | '.join(cells)} | {len(samples)} | {statistics.median(samples) / ours:.2f} |")
        if what in ("request to verdict", "builds per minute"):
            lines += ["", f"![{what}]({_picture(what, parallel)})"]
    lines += [
        "",
        "## How it was measured",
        "",
        "- Millrace is as shipped (two containers parked), and is followed by its stream of events, as `millrace run` does; its",
        "  moment of the first command is that of its ledger. Its PostgreSQL has `fsync` off, and its MinIO shares the disk.",
        "- Buildbot: a master with four `DockerLatentWorker`s, `build_wait_timeout=0` for a fresh container each, an image",
        "  with its worker in it, asked and polled (every 20 ms) over its REST interface.",
        "- gitlab-ci-local: from the start of its command to its end, in a new repository of one file; the image that it moves",
        "  files with is stood in for by the one that all use.",
        "- In parallel: so many clients, each of which asks for its next build when the one before has ended. CPU is that of",
        "  the whole machine, the engine's too. Memory is the PSS of what stands by, without the engine's.",
    ]
    return "\n".join(lines) + "\n"


def _picture(what: str, parallel: int) -> str:
    return f"performance-{what.replace(' ', '-')}-{parallel}.svg"


def write(rows: Rows, where: Where, docs: Path) -> None:
    """The page and its plots."""
    (docs / "performance.md").write_text(text(rows, where))
    for what, parallel, unit in _measures(rows):
        if what in ("request to verdict", "builds per minute"):
            (docs / _picture(what, parallel)).write_text(_plot(rows, what, parallel, unit))


def _plot(rows: Rows, what: str, parallel: int, unit: str) -> str:
    """Bars of medians, with a line from the 5th to the 95th percentile."""
    whos = _whos(rows, what, parallel)
    found = {who: values(rows, what, who, parallel) for who in whos}
    most = max(max(_point(samples, 0.95), statistics.median(samples)) for samples in found.values())
    height = len(whos) * (_BAR + 10) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-weight="bold">{what}{f", {parallel} in parallel" if parallel > 1 else ""}</text>',
    ]
    for number, who in enumerate(whos):
        top, middle = 30 + number * (_BAR + 10), statistics.median(found[who])
        scale = (_WIDTH - 330) / most
        parts.append(f'<text x="8" y="{top + 15}">{who}</text>')
        colour = _COLOURS.get(who, "#2f6f9f")
        parts.append(f'<rect x="220" y="{top}" width="{middle * scale:.1f}" height="{_BAR}" fill="{colour}"/>')
        end = middle
        if len(found[who]) > 1:
            low, end = (_point(found[who], share) for share in (0.05, 0.95))
            y = top + _BAR / 2
            parts.append(f'<line x1="{220 + low * scale:.1f}" y1="{y}" x2="{220 + end * scale:.1f}" y2="{y}" stroke="#222"/>')
        parts.append(f'<text x="{228 + max(end, middle) * scale:.1f}" y="{top + 15}">{_shown(middle, unit)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
