"""From the text of a buildspec to a `Buildspec`, or to a list of everything that is wrong with it. Pure.

The language is CodeBuild's (build-spec-ref, versions 0.1 and 0.2). Values keep the words that the author wrote: `true`, `3.10`
and `007` reach the shell as they stand in the file.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from buildenv import yamltree
from buildenv.yamltree import Node, Place, Unreadable, place
from millrace.errors import BadBuildspec, SpecProblem
from millrace.project import ENV_NAME
from millrace.vocabulary import COMMAND_PHASES, PhaseType

_PHASES: Final = {phase.value.lower(): phase for phase in COMMAND_PHASES}
_YES: Final = frozenset({"yes", "true", "on", "y"})
_NO: Final = frozenset({"no", "false", "off", "n"})
_TOP: Final = ("version", "run-as", "env", "proxy", "batch", "phases", "reports", "artifacts", "cache")
_ENV: Final = ("shell", "variables", "parameter-store", "secrets-manager", "exported-variables", "git-credential-helper")
_PHASE: Final = ("run-as", "on-failure", "runtime-versions", "commands", "finally")
_ARTIFACTS: Final = (
    "files",
    "name",
    "discard-paths",
    "base-directory",
    "exclude-paths",
    "enable-symlinks",
    "s3-prefix",
    "type",
    "secondary-artifacts",
)
_CACHE: Final = ("key", "fallback-keys", "action", "paths")
_REPORT: Final = ("files", "file-format", "base-directory", "discard-paths")
_FORMATS: Final = (
    *("JUNITXML", "CUCUMBERJSON", "NUNITXML", "NUNIT3XML", "TESTNGXML", "VISUALSTUDIOTRX"),
    *("CLOVERXML", "COBERTURAXML", "JACOCOXML", "SIMPLECOV"),
)
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9_]{1,127}")
MAX_VALUE_BYTES: Final = 32 * 1024


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command text, and the line where it stands."""

    text: str
    line: int


@dataclass(frozen=True, kw_only=True)
class OnFailure:
    """What a failed phase leads to: ABORT, CONTINUE, or RETRY up to `count` times where the message matches `pattern`."""

    action: str
    count: int = 0
    pattern: str = ".*"

    def matches(self, message: str) -> bool:
        """True where the pattern is found in `message`, in any of its lines."""
        return re.search(self.pattern, message, re.MULTILINE) is not None


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """One of install, pre_build, build, post_build."""

    commands: tuple[Command, ...] = ()
    finally_: tuple[Command, ...] = ()
    run_as: str | None = None
    on_failure: OnFailure | None = None
    runtime_versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """The env section; `shell` is as written, or None for /bin/sh."""

    shell: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    parameter_store: Mapping[str, str] = field(default_factory=dict)
    secrets_manager: Mapping[str, str] = field(default_factory=dict)
    exported_variables: tuple[str, ...] = ()
    git_credential_helper: bool = False


@dataclass(frozen=True, kw_only=True)
class ArtifactsSpec:
    """The artifacts section, or one of its secondary-artifacts. `name` is shell text, evaluated when it is used."""

    files: tuple[str, ...]
    name: str | None = None
    discard_paths: bool = False
    base_directory: str | None = None
    exclude_paths: tuple[str, ...] = ()
    enable_symlinks: bool = False
    s3_prefix: str | None = None
    secondary: Mapping[str, "ArtifactsSpec"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The cache section. `key` and `fallback_keys` are shell text."""

    paths: tuple[str, ...]
    key: str | None = None
    fallback_keys: tuple[str, ...] = ()
    action: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReportSpec:
    """One report group of the reports section."""

    files: tuple[str, ...]
    file_format: str = "JUNITXML"
    base_directory: str | None = None
    discard_paths: bool = False


@dataclass(frozen=True, kw_only=True)
class Buildspec:
    """A buildspec without a fault. `warnings` say what was assumed where CodeBuild's rules leave room."""

    version: str
    run_as: str | None = None
    env: EnvSpec = field(default_factory=EnvSpec)
    phases: Mapping[PhaseType, PhaseSpec] = field(default_factory=dict)
    artifacts: ArtifactsSpec | None = None
    cache: CacheSpec | None = None
    reports: Mapping[str, ReportSpec] = field(default_factory=dict)
    has_batch: bool = False
    warnings: tuple[SpecProblem, ...] = ()


def looks_inline(value: str) -> bool:
    """True where a project's `buildspec` is the text itself, not a path or an object's address."""
    if value.startswith(("arn:", "s3://")):
        return False
    return "\n" in value or value.lstrip().startswith("{") or re.match(r"\s*(version|phases)\s*:", value) is not None


def parse(text: str | bytes, *, where: str = "buildspec.yml") -> Buildspec:
    """The buildspec in `text`. Raises BadBuildspec with all problems; `where` is what they call the file."""
    reader = _Reader()
    try:
        root = yamltree.compose(yamltree.decode(text) if isinstance(text, bytes) else text)
        spec = reader.buildspec(root)
    except Unreadable as error:
        raise BadBuildspec(where, [error.problem]) from error
    if reader.problems:
        raise BadBuildspec(where, sorted(reader.problems, key=lambda problem: (problem.line, problem.column)))
    return spec


class _Reader:
    """Walks the tree once; a fault is noted and reading goes on, so that all are told at once."""

    def __init__(self) -> None:
        self.problems: list[SpecProblem] = []
        self.warnings: list[SpecProblem] = []
        self._keys: dict[tuple[int, str], Node] = {}
        self._with_unknown: set[int] = set()

    def buildspec(self, root: Node | None) -> Buildspec:
        if root is None:
            raise Unreadable(1, 1, "the buildspec is empty", "it needs at least 'version: 0.2' and 'phases:'")
        if not isinstance(root, yamltree.Mapping):
            raise Unreadable(place(root).line, place(root).column, "the buildspec is not a mapping", "begin with 'version: 0.2'")
        top = self._mapping(root, "the buildspec", _TOP, also=("environment_variables",))
        version = self._version(root, top.get("version"))
        phases = self._phases(root, top.get("phases"), optional="batch" in top)
        return Buildspec(
            version=version,
            run_as=self._text(top.get("run-as"), "run-as"),
            env=self._env_01(top.get("environment_variables"))
            if version == "0.1" and "env" not in top
            else self._env(top.get("env")),
            phases=phases,
            artifacts=self._artifacts(top.get("artifacts"), "artifacts", secondary_allowed=True),
            cache=self._cache(top.get("cache")),
            reports=self._reports(top.get("reports")),
            has_batch=self._batch(top.get("batch")),
            warnings=tuple(self.warnings),
        )

    # Sections

    def _version(self, root: Node, node: Node | None) -> str:
        if node is None:
            self._problem(root, "'version' is missing", "begin the file with 'version: 0.2'")
            return "0.2"
        text = self._text(node, "version")
        if text not in ("0.1", "0.2"):
            self._problem(node, f"version {text} is not known", "write 'version: 0.2'")
            return "0.2"
        return text

    def _env(self, node: Node | None) -> EnvSpec:
        if self._absent(node, "env"):
            return EnvSpec()
        entries = self._mapping(node, "env", _ENV)
        shell = self._text(entries.get("shell"), "shell")
        if shell is not None and shell not in ("bash", "/bin/sh", "sh", "/bin/bash"):
            hint = (
                "PowerShell and cmd.exe are for Windows builds" if "." in shell or "power" in shell else "write bash or /bin/sh"
            )
            self._problem(entries["shell"], f"shell {shell!r} is not known", hint)
        exported = self._list(entries.get("exported-variables"), "exported-variables")
        return EnvSpec(
            shell=shell,
            variables=self._variables(entries.get("variables"), "variables"),
            parameter_store=self._variables(entries.get("parameter-store"), "parameter-store"),
            secrets_manager=self._variables(entries.get("secrets-manager"), "secrets-manager"),
            exported_variables=tuple(exported),
            git_credential_helper=self._flag(entries.get("git-credential-helper"), "git-credential-helper"),
        )

    def _env_01(self, node: Node | None) -> EnvSpec:
        if self._absent(node, "environment_variables"):
            return EnvSpec()
        entries = self._mapping(node, "environment_variables", ("plaintext",))
        return EnvSpec(variables=self._variables(entries.get("plaintext"), "plaintext"))

    def _variables(self, node: Node | None, what: str) -> dict[str, str]:
        if self._absent(node, what):
            return {}
        values: dict[str, str] = {}
        for name, value in self._mapping(node, what, None).items():
            key = self._keys[id(node), name]
            if not ENV_NAME.fullmatch(name):
                self._problem(key, f"{name!r} is no variable name", "use letters, digits and _, not beginning with a digit")
            elif name.startswith(("CODEBUILD_", "MILLRACE_")):
                self._problem(key, f"{name} is reserved", "names that begin with CODEBUILD_ or MILLRACE_ are set by the farm")
            text = self._text(value, name)
            if text is not None and len(text.encode()) > MAX_VALUE_BYTES:
                self._problem(value, f"the value of {name} has more than {MAX_VALUE_BYTES // 1024} KiB", "put it into a file")
            values[name] = text or ""
        return values

    def _phases(self, root: Node, node: Node | None, *, optional: bool) -> dict[PhaseType, PhaseSpec]:
        if node is None:
            if not optional:
                self._problem(root, "'phases' is missing", "add 'phases:' with at least 'build:' and its 'commands:'")
            return {}
        if _is_null(node):
            self._problem(node, "'phases' is empty", "add 'build:' with 'commands:' below it")
            return {}
        phases: dict[PhaseType, PhaseSpec] = {}
        for name, value in self._mapping(node, "phases", tuple(_PHASES)).items():
            if name in _PHASES:
                if _is_null(value):
                    self._warn(value, f"phase {name} is empty, and does nothing")
                else:
                    phases[_PHASES[name]] = self._phase(name, value)
        if not phases and not self.problems and not optional:
            self._problem(node, "no phase has anything to do", "add 'build:' with 'commands:' below it")
        return phases

    def _phase(self, name: str, node: Node) -> PhaseSpec:
        if isinstance(node, yamltree.Sequence):
            self._problem(node, f"phase {name} is a list", "put the commands below 'commands:'")
            return PhaseSpec()
        entries = self._mapping(node, f"phase {name}", _PHASE)
        if "runtime-versions" in entries and name != "install":
            self._problem(self._keys[id(node), "runtime-versions"], f"runtime-versions stands in {name}", "it belongs in install")
        if "commands" not in entries and name != "install" and not self._unknown(node):
            self._problem(node, f"phase {name} has no 'commands'", "add 'commands:' with a list below it")
        return PhaseSpec(
            commands=self._commands(entries.get("commands"), "commands"),
            finally_=self._commands(entries.get("finally"), "finally"),
            run_as=self._text(entries.get("run-as"), "run-as"),
            on_failure=self._on_failure(entries.get("on-failure")),
            runtime_versions=self._runtimes(entries.get("runtime-versions")),
        )

    def _commands(self, node: Node | None, what: str) -> tuple[Command, ...]:
        if node is None:
            return ()
        if _is_null(node):
            self._warn(node, f"{what} is empty")
            return ()
        if isinstance(node, yamltree.Scalar):
            self._warn(node, f"{what} is one text, not a list; it is taken as one command")
            return (Command(text=node.value, line=place(node).line),)
        if not isinstance(node, yamltree.Sequence):
            self._problem(node, f"{what} is a mapping, not a list", "begin each command with '- '")
            return ()
        commands = []
        for number, item in enumerate(node.value):
            if _is_null(item):
                self._warn(item, f"{what}[{number}] is empty, and is left out")
            elif isinstance(item, yamltree.Scalar):
                commands.append(Command(text=item.value, line=place(item).line))
            else:
                self._not_a_command(what, number, item)
        return tuple(commands)

    def _not_a_command(self, what: str, number: int, item: Node) -> None:
        at = place(item)
        if isinstance(item, yamltree.Mapping):
            label = what.capitalize()
            self._problem(
                item,
                f"Expected {label}[{number}] to be of string type: found subkeys instead at line {at.line}, "
                f"value of the key tag on line {max(1, at.line - 1)} might be empty",
                "quote the whole command: its ': ' or '{' makes YAML read a mapping",
            )
        else:
            self._problem(item, f"{what}[{number}] is a list, not a command", "write each command as an item of its own")

    def _on_failure(self, node: Node | None) -> OnFailure | None:
        text = self._text(node, "on-failure")
        if node is None or text is None:
            return None
        word, _, rest = text.strip().partition("-")
        action = word.upper()
        if action in ("ABORT", "CONTINUE") and not rest:
            return OnFailure(action=action)
        if action != "RETRY":
            self._problem(node, f"on-failure {text!r} is not known", "write ABORT, CONTINUE, RETRY, RETRY-3 or RETRY-3-REGEX")
            return None
        found = re.fullmatch(r"([0-9]+)(?:-(.*))?", rest, re.DOTALL)
        count, pattern = (int(found[1][:9]), found[2] or ".*") if found else (3, rest or ".*")
        if count > 100:
            self._problem(node, f"on-failure retries {count} times", "at most 100")
        try:
            re.compile(pattern)
        except re.error as error:
            self._problem(node, f"on-failure has the regular expression {pattern!r}, which is wrong: {error}")
        return OnFailure(action="RETRY", count=count, pattern=pattern)

    def _runtimes(self, node: Node | None) -> dict[str, str]:
        if node is None:
            return {}
        entries = self._mapping(node, "runtime-versions", None)
        if not entries and not self._unknown(node):
            self._problem(node, "runtime-versions names no runtime", "name one, as 'python: 3.11', or remove it")
        runtimes = {}
        for name, value in entries.items():
            text = self._text(value, name)
            if text:
                runtimes[name] = text
            else:
                self._problem(value, f"runtime {name} has no version", "write one, or 'latest'")
        return runtimes

    def _artifacts(self, node: Node | None, what: str, *, secondary_allowed: bool) -> ArtifactsSpec | None:
        if self._absent(node, what):
            return None
        allowed = _ARTIFACTS if secondary_allowed else tuple(name for name in _ARTIFACTS if name != "secondary-artifacts")
        entries = self._mapping(node, what, allowed)
        if "type" in entries:
            self._warn(entries["type"], f"'type' in {what} has no effect: the project says how artifacts are stored")
        secondary: dict[str, ArtifactsSpec] = {}
        if "secondary-artifacts" in entries and not _is_null(entries["secondary-artifacts"]):
            section = entries["secondary-artifacts"]
            for name, value in self._mapping(section, "secondary-artifacts", None).items():
                if not _IDENTIFIER.fullmatch(name):
                    self._problem(
                        self._keys[id(section), name], f"{name!r} is no artifact identifier", "use letters, digits and _"
                    )
                one = self._artifacts(value, f"secondary-artifacts.{name}", secondary_allowed=False)
                if one is not None:
                    secondary[name] = one
        files = self._list(entries.get("files"), "files", globs=True)
        if not files and not secondary and not self._unknown(node):
            self._problem(node, f"{what} has no 'files'", "list what to keep, as '- dist/*' or '- **/*' in quotes")
        return ArtifactsSpec(
            files=tuple(files),
            name=self._text(entries.get("name"), "name"),
            discard_paths=self._flag(entries.get("discard-paths"), "discard-paths"),
            base_directory=self._text(entries.get("base-directory"), "base-directory"),
            exclude_paths=tuple(self._list(entries.get("exclude-paths"), "exclude-paths", globs=True)),
            enable_symlinks=self._flag(entries.get("enable-symlinks"), "enable-symlinks"),
            s3_prefix=self._text(entries.get("s3-prefix"), "s3-prefix"),
            secondary=secondary,
        )

    def _cache(self, node: Node | None) -> CacheSpec | None:
        if self._absent(node, "cache"):
            return None
        entries = self._mapping(node, "cache", _CACHE)
        paths = self._list(entries.get("paths"), "paths", globs=True)
        if not paths and not self._unknown(node):
            self._problem(node, "cache has no 'paths'", "list what to cache, as '- node_modules/**/*' in quotes")
        fallbacks = self._list(entries.get("fallback-keys"), "fallback-keys")
        if len(fallbacks) > 5:
            self._problem(entries["fallback-keys"], f"cache has {len(fallbacks)} fallback-keys", "at most 5")
        action = self._text(entries.get("action"), "action")
        if action is not None and action not in ("restore", "save"):
            self._problem(
                entries["action"], f"cache action {action!r} is not known", "write restore or save, or leave it out for both"
            )
        if fallbacks and "key" not in entries:
            self._warn(entries["fallback-keys"], "fallback-keys have no effect without 'key'")
        return CacheSpec(
            paths=tuple(paths), key=self._text(entries.get("key"), "key"), fallback_keys=tuple(fallbacks), action=action
        )

    def _reports(self, node: Node | None) -> dict[str, ReportSpec]:
        if self._absent(node, "reports"):
            return {}
        groups: dict[str, ReportSpec] = {}
        for name, value in self._mapping(node, "reports", None).items():
            entries = self._mapping(value, f"report group {name}", _REPORT)
            files = self._list(entries.get("files"), "files", globs=True)
            if not files and not self._unknown(value):
                self._problem(
                    value, f"report group {name} has no 'files'", "list the report files, as '- reports/*.xml' in quotes"
                )
            wanted = self._text(entries.get("file-format"), "file-format") or "JUNITXML"
            if wanted.upper() not in _FORMATS:
                close = _close(wanted.upper(), _FORMATS)
                self._problem(
                    entries["file-format"], f"file-format {wanted!r} is not known", close or f"one of {', '.join(_FORMATS)}"
                )
            groups[name] = ReportSpec(
                files=tuple(files),
                file_format=wanted.upper(),
                base_directory=self._text(entries.get("base-directory"), "base-directory"),
                discard_paths=self._flag(entries.get("discard-paths"), "discard-paths"),
            )
        return groups

    def _batch(self, node: Node | None) -> bool:
        if self._absent(node, "batch"):
            return False
        self._mapping(node, "batch", ("fast-fail", "build-list", "build-graph", "build-matrix", "build-fanout"))
        return True

    # Values

    def _mapping(
        self, node: Node | None, what: str, allowed: Iterable[str] | None, *, also: Iterable[str] = ()
    ) -> dict[str, Node]:
        """The entries of a mapping, name -> node; other kinds of node, unknown names and duplicates are noted."""
        if not isinstance(node, yamltree.Mapping):
            if node is not None and not _is_null(node):
                kind = "a list" if isinstance(node, yamltree.Sequence) else f"the text {_short(node.value)}"
                self._problem(node, f"{what} is {kind}, not a mapping", "put 'name: value' lines below it, indented")
                self._with_unknown.add(id(node))
            return {}
        entries: dict[str, Node] = {}
        for key, value in self._merged(node, what):
            if not isinstance(key, yamltree.Scalar):
                self._problem(key, f"a name in {what} is a list or a mapping", "write plain names")
                continue
            name = str(key.value)
            if name in entries:
                first = place(self._keys[id(node), name])
                self._problem(key, f"'{name}' stands twice in {what}; the first is on line {first.line}", "keep one of them")
                continue
            if allowed is not None and name not in allowed and name not in also:
                self._with_unknown.add(id(node))
                self._problem(key, f"'{name}' is not known in {what}", _close(name, allowed) or f"known: {', '.join(allowed)}")
                continue
            entries[name] = value
            self._keys[id(node), name] = key
        return entries

    def _merged(self, node: yamltree.Mapping, what: str) -> list[tuple[Node, Node]]:
        """The pairs of a mapping, with those of a merge key `<<` behind its own, where they are not overridden."""
        pairs: list[tuple[Node, Node]] = [pair for pair in node.value if pair[0].value != "<<"]
        own = {key.value for key, _ in pairs if isinstance(key, yamltree.Scalar)}
        for key, value in node.value:
            if key.value != "<<":
                continue
            for source in value.value if isinstance(value, yamltree.Sequence) else [value]:
                if not isinstance(source, yamltree.Mapping):
                    self._problem(key, f"'<<' in {what} merges something that is no mapping", "write '<<: *name-of-an-anchor'")
                    continue
                for inner, inherited in source.value:
                    if isinstance(inner, yamltree.Scalar) and inner.value not in own and inner.value != "<<":
                        own.add(inner.value)
                        pairs.append((inner, inherited))
        return pairs

    def _unknown(self, node: Node | None) -> bool:
        """True where a name in this mapping was not known: what is missing may be what was misspelt."""
        return id(node) in self._with_unknown

    def _absent(self, node: Node | None, what: str) -> bool:
        if node is not None and _is_null(node):
            self._warn(node, f"{what} is empty")
        return node is None or _is_null(node)

    def _text(self, node: Node | None, what: str) -> str | None:
        if node is None or _is_null(node):
            return None
        if not isinstance(node, yamltree.Scalar):
            self._problem(node, f"{what} is not a single value", "quote it if it holds ': ' or begins with [ or {")
            return None
        return str(node.value)

    def _list(self, node: Node | None, what: str, *, globs: bool = False) -> list[str]:
        if node is None or _is_null(node):
            return []
        if isinstance(node, yamltree.Scalar):
            self._warn(node, f"{what} is one text, not a list; it is taken as a list of one")
            items: list[Node] = [node]
        elif isinstance(node, yamltree.Sequence):
            items = node.value
        else:
            self._problem(node, f"{what} is a mapping, not a list", "begin each item with '- '")
            return []
        texts = []
        for number, item in enumerate(items):
            text = self._text(item, f"{what}[{number}]")
            if text is None:
                if _is_null(item):
                    self._warn(item, f"{what}[{number}] is empty, and is left out")
                continue
            if globs:
                self._check_glob(item, text)
            texts.append(text)
        return texts

    def _check_glob(self, node: Node, pattern: str) -> None:
        if ".." in pattern.split("/"):
            self._problem(node, f"the pattern {pattern!r} leaves the source folder", "use paths below it, or an absolute path")
        if pattern.count("[") != pattern.count("]"):
            self._problem(node, f"the pattern {pattern!r} has a bracket that is not closed", "write [[] for a bracket itself")

    def _flag(self, node: Node | None, what: str) -> bool:
        text = self._text(node, what)
        if node is None or text is None:
            return False
        if text.lower() not in _YES | _NO:
            self._problem(node, f"{what} is {text!r}", "write yes or no")
        return text.lower() in _YES

    def _problem(self, node: Node | None, what: str, hint: str = "") -> None:
        self.problems.append(_at(place(node) if node is not None else Place(line=1, column=1), what, hint))

    def _warn(self, node: Node, what: str) -> None:
        self.warnings.append(_at(place(node), what, ""))


def _at(where: Place, what: str, hint: str) -> SpecProblem:
    return SpecProblem(line=where.line, column=where.column, what=what, hint=hint)


def _is_null(node: Node) -> bool:
    return isinstance(node, yamltree.Scalar) and node.tag == "tag:yaml.org,2002:null"


def _close(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name.replace("_", "-"), list(known), n=1) or difflib.get_close_matches(
        name, list(known), n=1
    )
    return f"did you mean {found[0]}?" if found else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
