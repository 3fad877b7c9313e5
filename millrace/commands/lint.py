"""The verb lint: what is wrong with buildspecs, for people, programs and code scanners. Needs no farm."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click
from rich.cells import cell_len
from rich.text import Text

from buildenv.buildspec import parse
from buildenv.specreader import RULES
from millrace import __version__
from millrace.commands.terminal import console, harmless
from millrace.errors import BadBuildspec, SpecProblem

_SARIF: Final = "https://json.schemastore.org/sarif-2.1.0.json"
_MOST_BYTES: Final = 1024 * 1024
_LINE_END: Final = re.compile("\r\n|[\n\x85\u2028\u2029]")
"""What ends a line for YAML."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One file, and what was found in it."""

    name: str
    lines: Sequence[str]
    problems: Sequence[SpecProblem]
    warnings: Sequence[SpecProblem]


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(allow_dash=True))
@click.option("--strict", is_flag=True, help="Warnings count as problems.")
@click.option("--json", "form", flag_value="json", help="Say it as JSON.")
@click.option("--sarif", "form", flag_value="sarif", help="Say it as SARIF 2.1.0, for code scanners.")
def lint(files: tuple[str, ...], strict: bool, form: str | None) -> int:
    """Check buildspec FILES; of a folder its buildspec.yml, of - what comes on stdin.

    Exit status: 0 where all are fine, 1 where one has problems, 2 where one cannot be read.
    """
    found: list[Looked] = []
    unreadable = False
    for name in files:
        try:
            found.append(_look(name))
        except OSError as error:
            unreadable = True
            click.echo(
                f"error: {harmless(str(error.filename or name), colours=False)} cannot be read: {error.strerror}", err=True
            )
    if form == "json":
        click.echo(json.dumps([_plain(one) for one in found], indent=2))
    elif form == "sarif":
        click.echo(json.dumps(sarif(found), indent=2))
    else:
        for one in found:
            _show(one)
    if unreadable:
        return 2
    return int(any(one.problems or (strict and one.warnings) for one in found))


def _look(name: str) -> Looked:
    if name == "-":
        data, shown = sys.stdin.buffer.read(_MOST_BYTES), "stdin"
    else:
        path = Path(name)
        path = path / "buildspec.yml" if path.is_dir() else path
        with open(path, "rb") as file:
            data, shown = file.read(_MOST_BYTES), str(path)
    lines = _LINE_END.split(data.decode("utf-8-sig", errors="replace"))
    try:
        spec = parse(data, where=shown)
    except BadBuildspec as bad:
        return Looked(name=shown, lines=lines, problems=bad.problems, warnings=bad.warnings)
    return Looked(name=shown, lines=lines, problems=(), warnings=spec.warnings)


def _show(one: Looked) -> None:
    name = harmless(one.name, colours=False)
    for problem in one.problems:
        _show_one(name, one, problem, "error", "red")
    for warning in one.warnings:
        _show_one(name, one, warning, "warning", "yellow")
    if one.problems:
        count = len(one.problems)
        console.print(f"[red]{count} problem{'s' if count != 1 else ''}[/]", "in", Text(name))
    else:
        rest = f", with {len(one.warnings)} warning{'s' if len(one.warnings) != 1 else ''}" if one.warnings else ""
        console.print(Text(f"{name} is fine{rest}"))


def _show_one(name: str, one: Looked, problem: SpecProblem, kind: str, colour: str) -> None:
    line = Text(f"{name}:{problem.line}:{problem.column}: ", style="bold")
    line.append(f"{kind}: ", style=colour)
    line.append(harmless(problem.what, colours=False), style="not bold")
    line.append(f" [{problem.rule}]", style="dim")
    console.print(line, soft_wrap=True)
    if problem.line <= len(one.lines) and one.lines[problem.line - 1].strip():
        source = one.lines[problem.line - 1].replace("\t", " ")
        begin = max(0, problem.column - 60)
        number = f"{problem.line:>5} | "
        before = harmless(source[begin : problem.column - 1], colours=False)
        console.print(Text(number + before + harmless(source[problem.column - 1 : begin + 100], colours=False)), soft_wrap=True)
        console.print(Text(" " * (len(number) + cell_len(before)) + "^", style=colour), soft_wrap=True)
    if problem.hint:
        console.print(Text(f"        {harmless(problem.hint, colours=False)}"), soft_wrap=True)


def _plain(one: Looked) -> dict[str, Any]:
    def plain(found: Sequence[SpecProblem]) -> list[dict[str, Any]]:
        return [{"line": p.line, "column": p.column, "rule": p.rule, "what": p.what, "hint": p.hint} for p in found]

    return {"file": one.name, "problems": plain(one.problems), "warnings": plain(one.warnings)}


def sarif(found: Sequence[Looked]) -> dict[str, Any]:
    """What was found, as SARIF (OASIS, Static Analysis Results Interchange Format 2.1.0)."""
    results = [
        {
            "ruleId": problem.rule,
            "level": level,
            "message": {"text": f"{problem.what}. {problem.hint}" if problem.hint else problem.what},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(one.name)},
                        "region": {"startLine": problem.line, "startColumn": problem.column},
                    }
                }
            ],
        }
        for one in found
        for level, problems in (("error", one.problems), ("warning", one.warnings))
        for problem in problems
    ]
    rules = [{"id": rule, "shortDescription": {"text": says}} for rule, says in RULES.items()]
    driver = {"name": "millrace lint", "semanticVersion": __version__, "rules": rules}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [run]}


def _uri(name: str) -> str:
    path = Path(name)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
