"""What people see: colours, tables, and build output that cannot take the terminal over."""

import re
import sys
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

_ESCAPES: Final = re.compile(
    r"(?P<sgr>\x1b\[[0-9;:]*m)"
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[PX^_][^\x1b]*(?:\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]?|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
STATE_STYLES: Final = {
    "SUCCEEDED": "green",
    "FAILED": "red",
    "FAULT": "magenta",
    "TIMED_OUT": "yellow",
    "STOPPED": "yellow",
}


def harmless(text: str, *, colours: bool) -> str:
    """`text` without what moves the cursor, sets titles, hides or turns text round; colours stay where they are wanted."""
    return _ESCAPES.sub(lambda found: found["sgr"] or "" if colours else "", text)


def styled(state: str) -> str:
    """A state or status with its colour."""
    style = STATE_STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


class LogPrinter:
    """Prints a build's log as it comes: the farm's own lines in another colour, the build's as they are."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty()
        self._rest = ""

    def feed(self, text: str) -> None:
        """More of the log; only whole lines are printed at once."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._print(line)
        if len(self._rest) > 65_536:
            self.end()

    def end(self) -> None:
        """Print what is left."""
        if self._rest:
            self._print(self._rest)
            self._rest = ""

    def _print(self, line: str) -> None:
        shown = harmless(line.rstrip("\r").rpartition("\r")[2], colours=self._colours)
        if self._colours and shown.startswith(("[Container] ", "[Millrace] ")):
            console.print(Text(shown, style="cyan" if shown.startswith("[C") else "yellow"))
        else:
            sys.stdout.write(shown + ("\x1b[0m\n" if self._colours and "\x1b[" in shown else "\n"))
        sys.stdout.flush()


def duration(ms: int | None) -> str:
    """Milliseconds for people."""
    if ms is None:
        return ""
    return f"{ms} ms" if ms < 1000 else f"{ms / 1000:.1f} s" if ms < 60_000 else f"{ms // 60_000} min {ms % 60_000 // 1000} s"


def phases(build: Mapping[str, Any]) -> Table:
    """A build's phases with their times."""
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    table.add_column("status")
    table.add_column("time", justify="right")
    table.add_column("")
    for phase in build["phases"]:
        if phase["phaseType"] == "COMPLETED":
            continue
        ms = build["millrace"]["phaseMs"].get(phase["phaseType"])
        context = next((item for item in phase.get("contexts", []) if item["message"].strip()), None)
        why = harmless(f"{context['statusCode']}: {context['message'].splitlines()[0]}", colours=False) if context else ""
        table.add_row(phase["phaseType"], styled(phase.get("phaseStatus", "running")), duration(ms), Text(why))
    return table


_STAGES: Final = {
    "claimed": "queue",
    "attempt_started": "process",
    "source_ready": "source",
    "container_ready": "container",
    "first_command": "first command",
    "last_command": "commands",
    "verdict": "artifacts and caches",
}
"""What a build waited for until each moment of its ledger."""


def ledger(marks: Mapping[str, int]) -> str:
    """Where a build's time went, stage by stage; what did not happen is left out, so that the stages add up."""
    parts, last = [], marks.get("accepted")
    for until, name in _STAGES.items():
        if last is not None and until in marks:
            parts.append(f"{name} {duration(max(0, marks[until] - last))}")
            last = marks[until]
    return ", ".join(parts)


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")
