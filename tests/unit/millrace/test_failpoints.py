"""Failpoints: the registry is the code's, they are refused outside tests, and each action does what it says, once."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from buildenv.engine import Engine
from millrace import failpoints
from millrace.errors import InvalidInput, Unavailable
from millrace.settings import load
from millrace.storage import Store
from scheduler.db import Database
from worker.control import AttemptControl, Control

ROOT = Path(__file__).parents[3]
_OPERATORS = ("backup", "fsck")
"""Modules of `scheduler` whose commits no part of a farm makes."""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None, Path())


def _commits(module: str, node: ast.AST, path: tuple[str, ...] = (), inside: bool = False) -> Iterator[str]:
    """The functions of a module that call `Database.run`, by their names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from _commits(
                module, child, path if inside else (*path, child.name), inside or isinstance(child, ast.FunctionDef)
            )
            continue
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in ("run", "transaction"):
            holder = ast.unparse(child.func.value).split(".")[-1]
            if holder in ("db", "_db", "database", "_database"):
                yield ".".join((module, *path))
        yield from _commits(module, child, path, inside)


def test_the_registry_has_every_commit_of_the_farm() -> None:
    found = set()
    for part in ("api", "scheduler"):
        for file in sorted((ROOT / part).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("scheduler.")
            if module != "db" and module.split(".")[0] not in _OPERATORS:
                found |= set(_commits(module, ast.parse(file.read_text())))
    assert found == set(failpoints.COMMITS)


def _methods(*kinds: type) -> set[str]:
    return {name for kind in kinds for name in vars(kind) if not name.startswith("_") and name != "close"}


def test_the_registry_has_every_call_to_the_outside() -> None:
    assert set(failpoints.ENGINE) == _methods(Engine)
    assert set(failpoints.STORE) == _methods(Store)
    assert set(failpoints.VERBS) == _methods(Control, AttemptControl)
    literal = {
        node.args[0].value
        for part in ("api", "scheduler", "worker", "buildenv")
        for file in (ROOT / part).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoint" and isinstance(node.args[0], ast.Constant)
    }
    assert literal == {name for name in failpoints.POINTS if name.startswith(("bell.", "notice."))}


def test_a_farm_that_is_no_tests_refuses_them() -> None:
    with pytest.raises(InvalidInput, match=r"MILLRACE_FAILPOINT .* needs MILLRACE_TESTING=1"):
        load({"MILLRACE_FAILPOINT": "bell.ring.before"})
    assert load({"MILLRACE_FAILPOINT": "bell.ring.before", "MILLRACE_TESTING": "1"}).failpoint == "bell.ring.before"


@pytest.mark.parametrize("text", ["bell", "bell.ring.before:0", "bell.ring.before:x", "bell.ring.before:1:kill:1", ""])
def test_a_failpoint_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="failpoint"):
        failpoints.parse(text)


def test_an_error_is_raised_at_the_pass_that_was_named_and_once(tmp_path: Path) -> None:
    failpoints.arm("bell.ring.before:2:raise", tmp_path)
    failpoints.failpoint("bell.ring.before", OSError)
    failpoints.failpoint("bell.ring.after", OSError)
    with pytest.raises(OSError, match=r"failpoint bell\.ring\.before"):
        failpoints.failpoint("bell.ring.before", OSError)
    failpoints.arm("bell.ring.before:1:raise", tmp_path)
    failpoints.failpoint("bell.ring.before", OSError)
    assert (tmp_path / failpoints.MARK).read_text() == "bell.ring.before:2:raise"


def test_a_farm_that_is_watched_notes_what_it_passes_and_takes_orders(tmp_path: Path) -> None:
    failpoints.arm(failpoints.WATCH, tmp_path)
    for _ in range(2):
        failpoints.failpoint("bell.ring.before", OSError)
    (tmp_path / failpoints.ORDER).write_text("bell.ring.after:raise")
    failpoints.failpoint("bell.ring.before", OSError)
    with pytest.raises(OSError, match=r"failpoint bell\.ring\.after"):
        failpoints.failpoint("bell.ring.after", OSError)
    failpoints.failpoint("bell.ring.after", OSError)
    assert (tmp_path / failpoints.MARK).read_text() == "bell.ring.after:raise"
    assert (tmp_path / failpoints.PASSED).read_text().split() == ["bell.ring.before", "bell.ring.after"]


def test_a_kill_ends_the_process_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\nfrom millrace import failpoints as f\n"
        "f.arm('bell.ring.after', pathlib.Path(sys.argv[1]))\nf.failpoint('bell.ring.after', OSError)\nprint('alive')"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert (first.returncode, first.stdout) == (-9, b"")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert again.stdout == b"alive\n"


@pytest.mark.parametrize(("side", "kept"), [("before", 0), ("after", 1)])
def test_a_commit_that_fails_before_leaves_nothing_and_after_leaves_all(
    sqlite_database: Database, tmp_path: Path, side: str, kept: int
) -> None:
    from millrace.vocabulary import TokenScope
    from scheduler import tokens

    failpoints.arm(f"commit.tokens.create.{side}:1:raise", tmp_path)
    with pytest.raises(Unavailable, match="failpoint"):
        tokens.create(sqlite_database, "t", TokenScope.ADMIN)
    failpoints.arm(None, tmp_path)
    assert len(tokens.find(sqlite_database)) == kept


def test_a_guarded_call_fails_before_or_after_it_is_made(tmp_path: Path) -> None:
    class Box:
        def __init__(self) -> None:
            self.items: list[int] = []

        def put(self, item: int) -> int:
            self.items.append(item)
            return item

    box = Box()
    assert failpoints.guard(box, "store", OSError) is box
    for side, kept in (("before", []), ("after", [1])):
        home = tmp_path / side
        home.mkdir()
        failpoints.arm(f"store.put.{side}:1:raise", home)
        guarded = failpoints.guard(box, "store", OSError)
        assert isinstance(guarded, Box)
        with pytest.raises(OSError, match="failpoint"):
            guarded.put(1)
        assert box.items == kept
    assert guarded.put(2) == 2
