"""The batch section, read and checked in full, though nothing acts on it yet (CodeBuild: batch-build-buildspec)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from math import prod
from typing import Final

from buildenv import yamltree
from buildenv.specreader import IDENTIFIER, Reader, did_you_mean, is_null
from buildenv.yamltree import Node

MAX_TASKS: Final = 100
_KINDS: Final = ("build-list", "build-graph", "build-matrix", "build-fanout")


@dataclass(frozen=True, kw_only=True)
class TaskEnv:
    """What differs in a task's environment; None and empty where nothing does."""

    compute_type: str | None = None
    fleet: str | None = None
    image: str | None = None
    privileged_mode: bool | None = None
    type: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a build-list or build-graph."""

    identifier: str
    buildspec: str | None = None
    debug_session: bool = False
    ignore_failure: bool = False
    env: TaskEnv = field(default_factory=TaskEnv)
    depend_on: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A build-matrix: every combination of the lists is a task with `env` in common."""

    ignore_failure: bool = False
    env: TaskEnv = field(default_factory=TaskEnv)
    buildspecs: tuple[str, ...] = ()
    compute_types: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    variables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def lists(self) -> list[Sequence[str]]:
        """The lists that have values."""
        every = [self.buildspecs, self.compute_types, self.images, *self.variables.values()]
        return [values for values in every if values]

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return prod(len(values) for values in self.lists)


@dataclass(frozen=True, kw_only=True)
class Fanout:
    """A build-fanout: the same task `parallelism` times."""

    parallelism: int
    ignore_failure: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """The batch section; one of the last four is there. `tasks` of a build-graph may depend on each other."""

    kind: str
    fast_fail: bool = False
    tasks: tuple[Task, ...] = ()
    matrix: Matrix | None = None
    fanout: Fanout | None = None


def read(reader: Reader, node: Node | None) -> BatchSpec | None:
    """The batch section, or None where there is none."""
    if reader.is_absent(node, "batch") or node is None:
        return None
    entries = reader.section(node, "batch")
    kinds = [kind for kind in _KINDS if kind in entries]
    if len(kinds) > 1 or (not kinds and all(reader.lacks(node, kind) for kind in _KINDS)):
        found = f"has {' and '.join(kinds)}" if kinds else "says no kind of batch"
        reader.problem(node, "batch-kind", f"batch {found}", f"write just one of {', '.join(_KINDS)}")
    kind = kinds[0] if kinds else ""
    tasks: tuple[Task, ...] = ()
    for name in ("build-list", "build-graph"):
        if name in entries:
            tasks = _tasks(reader, entries[name], name)
    return BatchSpec(
        kind=kind,
        fast_fail=reader.flag(entries.get("fast-fail"), "fast-fail"),
        tasks=tasks,
        matrix=_matrix(reader, entries["build-matrix"]) if "build-matrix" in entries else None,
        fanout=_fanout(reader, entries["build-fanout"]) if "build-fanout" in entries else None,
    )


def _tasks(reader: Reader, node: Node, kind: str) -> tuple[Task, ...]:
    if not isinstance(node, yamltree.Sequence) or not node.value:
        reader.problem(node, "wrong-kind", f"{kind} is no list of tasks", "begin each task with '- identifier: NAME'")
        return ()
    if len(node.value) > MAX_TASKS:
        reader.problem(node, "too-large", f"{kind} has {len(node.value)} tasks", f"at most {MAX_TASKS}")
    tasks: list[Task] = []
    places: dict[str, Node] = {}
    for number, item in enumerate(node.value[:MAX_TASKS]):
        task = _task(reader, item, f"{kind}[{number}]", "graph task" if kind == "build-graph" else "task")
        if task.identifier in places:
            first = yamltree.place(places[task.identifier]).line
            what = f"the identifier {task.identifier} stands twice in {kind}; the first is on line {first}"
            reader.problem(item, "duplicate-key", what, "give each task a name of its own")
        elif task.identifier:
            places[task.identifier] = item
        tasks.append(task)
    if len(node.value) <= MAX_TASKS:
        _check_graph(reader, tasks, places)
    return tuple(tasks)


def _task(reader: Reader, node: Node, what: str, kind: str) -> Task:
    entries = reader.section(node, kind, what)
    identifier = reader.text(entries.get("identifier"), "identifier") or ""
    if "identifier" in entries and not IDENTIFIER.fullmatch(identifier):
        reader.problem(entries["identifier"], "bad-name", f"{identifier!r} is no task identifier", "use letters, digits and _")
    return Task(
        identifier=identifier,
        buildspec=reader.text(entries.get("buildspec"), "buildspec"),
        debug_session=reader.flag(entries.get("debug-session"), "debug-session"),
        ignore_failure=reader.flag(entries.get("ignore-failure"), "ignore-failure"),
        env=_env(reader, entries.get("env")),
        depend_on=tuple(reader.list_of(entries.get("depend-on"), "depend-on")),
    )


def _check_graph(reader: Reader, tasks: Sequence[Task], places: Mapping[str, Node]) -> None:
    known = {task.identifier for task in tasks}
    graph: dict[str, set[str]] = {}
    for task in tasks:
        unknown = [name for name in task.depend_on if name not in known]
        if unknown and task.identifier in places:
            what = f"task {task.identifier} depends on {', '.join(unknown)}, which is no task"
            hint = did_you_mean(unknown[0], known) or f"known: {', '.join(sorted(known))}"
            reader.problem(places[task.identifier], "unknown-value", what, hint)
        graph[task.identifier] = set(task.depend_on) & known
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        reader.problem(
            places.get(circle[0]), "cycle", f"tasks wait for each other: {' -> '.join(circle)}", "remove one of these depend-on"
        )


def _env(reader: Reader, node: Node | None) -> TaskEnv:
    if node is None:
        return TaskEnv()
    entries = reader.section(node, "task env", "env")
    privileged = entries.get("privileged-mode")
    return TaskEnv(
        compute_type=reader.text(entries.get("compute-type"), "compute-type"),
        fleet=reader.text(entries.get("fleet"), "fleet"),
        image=reader.text(entries.get("image"), "image"),
        privileged_mode=reader.flag(privileged, "privileged-mode") if privileged is not None else None,
        type=reader.text(entries.get("type"), "type"),
        variables=reader.variables(entries.get("variables"), "variables"),
    )


def _matrix(reader: Reader, node: Node) -> Matrix:
    already = len(reader.problems)
    entries = reader.section(node, "build-matrix")
    static = reader.section(entries.get("static"), "static")
    dynamic = reader.section(entries.get("dynamic"), "dynamic")
    env = reader.section(dynamic.get("env"), "dynamic env")
    variables: dict[str, tuple[str, ...]] = {}
    if "variables" in env:
        for name, value in reader.entries(env["variables"], "variables").items():
            reader.check_name(reader.name_of(env["variables"], name), name)
            variables[name] = tuple(reader.list_of(value, name))
    matrix = Matrix(
        ignore_failure=reader.flag(static.get("ignore-failure"), "ignore-failure"),
        env=_env(reader, static.get("env")),
        buildspecs=tuple(reader.list_of(dynamic.get("buildspec"), "buildspec")),
        compute_types=tuple(reader.list_of(env.get("compute-type"), "compute-type")),
        images=tuple(reader.list_of(env.get("image"), "image")),
        variables=variables,
    )
    if not matrix.lists and len(reader.problems) == already:
        reader.problem(node, "missing-key", "build-matrix has nothing that differs", "add lists below 'dynamic:'")
    if matrix.size > MAX_TASKS:
        count = matrix.size if matrix.size < 10**9 else "more than a thousand million"
        reader.problem(node, "too-large", f"build-matrix has {count} combinations", f"at most {MAX_TASKS}")
    return matrix


def _fanout(reader: Reader, node: Node) -> Fanout:
    entries = reader.section(node, "build-fanout")
    text = reader.text(entries.get("parallelism"), "parallelism")
    hint = f"write a number from 1 to {MAX_TASKS}"
    parallelism = int(text[:9]) if text and text.isascii() and text.isdigit() else 0
    if text is not None and not 1 <= parallelism <= MAX_TASKS:
        reader.problem(entries["parallelism"], "unknown-value", f"parallelism is {text[:40]!r}", hint)
    elif "parallelism" in entries and is_null(entries["parallelism"]):
        reader.problem(node, "missing-value", "build-fanout says no parallelism", hint)
    return Fanout(parallelism=parallelism, ignore_failure=reader.flag(entries.get("ignore-failure"), "ignore-failure"))
