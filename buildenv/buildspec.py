"""From the text of a buildspec to a `Buildspec`, or to a list of everything that is wrong with it. Pure.

The language is CodeBuild's (build-spec-ref, versions 0.1 and 0.2). Values keep the words that the author wrote: `true`, `3.10`
and `007` reach the shell as they stand in the file. The keys are listed in `speckeys`, sections are read by `specreader`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import re2

from buildenv import batchspec, yamltree
from buildenv.batchspec import BatchSpec
from buildenv.globs import matches
from buildenv.specreader import IDENTIFIER, MAX_FOUND, EnoughFound, Reader, direction_marks, is_null, shown
from buildenv.yamltree import Node, Unreadable, place
from millrace.errors import BadBuildspec, SpecProblem
from millrace.vocabulary import COMMAND_PHASES, PhaseType

_PHASES: Final = {phase.value.lower(): phase for phase in COMMAND_PHASES}
_USER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?|[0-9]{1,10}")
_NOT_IN_01: Final = ("run-as", "env", "reports", "batch", "proxy")
_NOT_CACHED: Final = ("proc", "sys", "dev", "codebuild")
MAX_REPORT_GROUPS: Final = 5
MAX_RETRIES: Final = 100


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
        """True where the pattern is found in a line of `message`. Takes time in proportion to both, whatever they are."""
        return re2.search(f"(?m){self.pattern}", message) is not None


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
class ProxySpec:
    """The proxy section."""

    upload_artifacts: bool = False
    logs: bool = False


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
    batch: BatchSpec | None = None
    proxy: ProxySpec | None = None
    warnings: tuple[SpecProblem, ...] = ()

    @property
    def has_batch(self) -> bool:
        """True where there is a batch section."""
        return self.batch is not None


def looks_inline(value: str) -> bool:
    """True where a project's `buildspec` is the text itself, not a path or an object's address."""
    if value.startswith(("arn:", "s3://")):
        return False
    return "\n" in value or value.lstrip().startswith("{") or re.match(r"\s*(version|phases)\s*:", value) is not None


def parse(text: str | bytes, *, where: str = "buildspec.yml") -> Buildspec:
    """The buildspec in `text`. Raises BadBuildspec with all problems; `where` is what they call the file."""
    reader = Reader()
    try:
        root = yamltree.compose(yamltree.decode(text) if isinstance(text, bytes) else text)
        spec = _buildspec(reader, root)
    except Unreadable as error:
        found = error.problem
        raise BadBuildspec(where, [replace(found, what=shown(found.what), hint=shown(found.hint))]) from error
    except EnoughFound:
        reader.problems[-1] = replace(reader.problems[-1], hint=f"reading ended here, after {MAX_FOUND} problems")
    if reader.problems:
        raise BadBuildspec(where, _in_order(reader.problems), warnings=_in_order(reader.warnings))
    return spec


def _in_order(found: list[SpecProblem]) -> tuple[SpecProblem, ...]:
    return tuple(sorted(found, key=lambda one: (one.line, one.column)))


def _buildspec(reader: Reader, root: Node | None) -> Buildspec:
    if root is None or is_null(root):
        raise Unreadable(1, 1, "the buildspec is empty", "it needs at least 'version: 0.2' and 'phases:'")
    if not isinstance(root, yamltree.Mapping):
        raise Unreadable(place(root).line, place(root).column, "the buildspec is not a mapping", "begin with 'version: 0.2'")
    top = reader.section(root, "the buildspec")
    version = _version(reader, root, top.get("version"))
    _check_version(reader, root, top, version)
    is_batch = "batch" in top and not is_null(top["batch"])
    phases = _phases(reader, root, top.get("phases"), optional=is_batch, version=version)
    return Buildspec(
        version=version,
        run_as=_user(reader, top.get("run-as")),
        env=_env(reader, top),
        phases=phases,
        artifacts=_artifacts(reader, top.get("artifacts"), "artifacts"),
        cache=_cache(reader, top.get("cache")),
        reports=_reports(reader, top.get("reports")),
        batch=batchspec.read(reader, top.get("batch")),
        proxy=_proxy(reader, top.get("proxy")),
        warnings=_in_order(reader.warnings),
    )


def _version(reader: Reader, root: Node, node: Node | None) -> str:
    text = reader.text(node, "version")
    if text is None:
        if node is None and reader.lacks(root, "version"):
            reader.problem(root, "missing-key", "'version' is missing", "begin the file with 'version: 0.2'")
        elif node is not None and is_null(node):
            reader.problem(node, "missing-value", "'version' has no value", "write 'version: 0.2'")
        return "0.2"
    if text not in ("0.1", "0.2"):
        reader.problem(node, "unknown-value", f"version {text} is not known", "write 'version: 0.2'")
        return "0.2"
    return text


def _check_version(reader: Reader, root: Node, top: Mapping[str, Node], version: str) -> None:
    """What belongs to the other version of the language."""
    if version == "0.1":
        for name in _NOT_IN_01:
            if name in top:
                reader.warn(
                    reader.name_of(root, name), f"'{name}' is not part of version 0.1; it is acted on all the same", "version"
                )
    elif "environment_variables" in top:
        at = reader.name_of(root, "environment_variables")
        hint = "write 'env:' with 'variables:' below it, or 'version: 0.1'"
        reader.problem(at, "unknown-key", "'environment_variables' belongs to version 0.1", hint)


def _env(reader: Reader, top: Mapping[str, Node]) -> EnvSpec:
    plain: dict[str, str] = {}
    if "environment_variables" in top and not reader.is_absent(top["environment_variables"], "environment_variables"):
        old = reader.section(top["environment_variables"], "environment_variables")
        plain = reader.variables(old.get("plaintext"), "plaintext")
    node = top.get("env")
    if reader.is_absent(node, "env") or node is None:
        return EnvSpec(variables=plain)
    entries = reader.section(node, "env")
    exported = reader.list_of(entries.get("exported-variables"), "exported-variables", partial(_check_exported, reader))
    variables = plain | reader.variables(entries.get("variables"), "variables")
    parameters = reader.variables(entries.get("parameter-store"), "parameter-store", references=True)
    secrets = reader.variables(entries.get("secrets-manager"), "secrets-manager", references=True)
    for name, reference in secrets.items():
        _check_reference(reader, reader.name_of(entries["secrets-manager"], name), name, reference)
    for first, second, section in (
        (variables, parameters, "parameter-store"),
        (variables, secrets, "secrets-manager"),
        (parameters, secrets, "secrets-manager"),
    ):
        for name in first.keys() & second.keys():
            reader.warn(reader.name_of(entries[section], name), f"{name} is set twice; that of {section} counts")
    return EnvSpec(
        shell=_lower(reader.text(entries.get("shell"), "shell")),
        variables=variables,
        parameter_store=parameters,
        secrets_manager=secrets,
        exported_variables=tuple(exported),
        git_credential_helper=reader.flag(entries.get("git-credential-helper"), "git-credential-helper"),
    )


def _lower(text: str | None) -> str | None:
    return text.lower() if text is not None else None


def _check_exported(reader: Reader, node: Node, name: str) -> None:
    if name.startswith("AWS_"):
        reader.warn(node, f"{name} is not exported by CodeBuild, nor is any name that begins with AWS_")
    elif not name.startswith("CODEBUILD_"):
        reader.check_name(node, name)


def _check_reference(reader: Reader, node: Node, name: str, reference: str) -> None:
    """ID[:JSON-KEY[:STAGE[:VERSION]]], where the ID may be an ARN, of seven parts itself (CodeBuild: build-spec-ref)."""
    parts = reference.split(":")
    secret, rest = (parts[:7], parts[7:]) if parts[0] == "arn" else (parts[:1], parts[1:])
    hint = "write ID, ID:JSON-KEY, ID:JSON-KEY:STAGE or ID:JSON-KEY::VERSION"
    if reference and not secret[-1]:
        reader.problem(node, "bad-name", f"{name} in secrets-manager names no secret before its ':'", hint)
    elif len(rest) > 3:
        reader.problem(node, "bad-name", f"{name} in secrets-manager has {len(rest) + 1} parts", hint)
    elif len(rest) == 3 and rest[1] and rest[2]:
        reader.warn(node, f"{name} in secrets-manager has a stage and a version; they must be of the same value")


def _user(reader: Reader, node: Node | None) -> str | None:
    text = reader.text(node, "run-as")
    if node is not None and text is not None and not _USER.fullmatch(text):
        reader.problem(node, "bad-name", f"run-as {text[:40]!r} is no user name", "name a user of the image, as 'root'")
    return text


def _proxy(reader: Reader, node: Node | None) -> ProxySpec | None:
    if reader.is_absent(node, "proxy") or node is None:
        return None
    entries = reader.section(node, "proxy")
    return ProxySpec(
        upload_artifacts=reader.flag(entries.get("upload-artifacts"), "upload-artifacts"),
        logs=reader.flag(entries.get("logs"), "logs"),
    )


def _phases(reader: Reader, root: Node, node: Node | None, *, optional: bool, version: str) -> dict[PhaseType, PhaseSpec]:
    if node is None:
        if not optional and reader.lacks(root, "phases"):
            hint = "add 'phases:' with at least 'build:' and its 'commands:'"
            reader.problem(root, "missing-key", "'phases' is missing", hint)
        return {}
    if is_null(node):
        reader.problem(node, "missing-value", "'phases' is empty", "add 'build:' with 'commands:' below it")
        return {}
    phases: dict[PhaseType, PhaseSpec] = {}
    for name, value in reader.section(node, "phases").items():
        if is_null(value):
            reader.warn(value, f"phase {name} is empty, and does nothing")
        else:
            phases[_PHASES[name]] = _phase(reader, name, value, version)
    if not phases and not reader.problems and not optional:
        reader.problem(node, "missing-value", "no phase has anything to do", "add 'build:' with 'commands:' below it")
    return phases


def _phase(reader: Reader, name: str, node: Node, version: str) -> PhaseSpec:
    if isinstance(node, yamltree.Sequence):
        reader.problem(node, "wrong-kind", f"phase {name} is a list", "put the commands below 'commands:'")
        return PhaseSpec()
    entries = reader.section(node, "phase", f"phase {name}")
    if "runtime-versions" in entries and name != "install":
        at = reader.name_of(node, "runtime-versions")
        reader.problem(at, "misplaced", f"runtime-versions stands in {name}", "it belongs in install")
    if name != "install" and reader.lacks(node, "commands"):
        reader.problem(node, "missing-key", f"phase {name} has no 'commands'", "add 'commands:' with a list below it")
    if version == "0.1":
        for later in ("finally", "run-as"):
            if later in entries:
                at = reader.name_of(node, later)
                reader.warn(at, f"'{later}' is not part of version 0.1; it is acted on all the same", "version")
    return PhaseSpec(
        commands=_commands(reader, entries.get("commands"), "commands"),
        finally_=_commands(reader, entries.get("finally"), "finally"),
        run_as=_user(reader, entries.get("run-as")),
        on_failure=_on_failure(reader, entries.get("on-failure")),
        runtime_versions=_runtimes(reader, entries.get("runtime-versions")),
    )


def _commands(reader: Reader, node: Node | None, what: str) -> tuple[Command, ...]:
    if node is None:
        return ()
    if is_null(node):
        reader.warn(node, f"{what} is empty")
        return ()
    if isinstance(node, yamltree.Scalar):
        reader.warn(node, f"{what} is one text, not a list; it is taken as one command")
        return (_command(reader, node),)
    if not isinstance(node, yamltree.Sequence):
        reader.problem(node, "wrong-kind", f"{what} is a mapping, not a list", "begin each command with '- '")
        return ()
    commands = []
    for number, item in enumerate(node.value):
        if is_null(item):
            reader.warn(item, f"{what}[{number}] is empty, and is left out")
        elif isinstance(item, yamltree.Scalar):
            commands.append(_command(reader, item))
        else:
            _not_a_command(reader, what, number, item)
    return tuple(commands)


def _command(reader: Reader, node: Node) -> Command:
    if shown := direction_marks(node.value):
        short = shown if len(shown) <= 200 else shown[:200] + "..."
        what = f"the command has characters that turn the direction of writing, and may not be what it looks like: {short}"
        reader.warn(node, what, "direction-marks")
    return Command(text=node.value, line=place(node).line)


def _not_a_command(reader: Reader, what: str, number: int, item: Node) -> None:
    at = place(item)
    if isinstance(item, yamltree.Mapping):
        label = what.capitalize()
        reader.problem(
            item,
            "not-a-command",
            f"Expected {label}[{number}] to be of string type: found subkeys instead at line {at.line}, "
            f"value of the key tag on line {max(1, at.line - 1)} might be empty",
            "quote the whole command: its ': ' or '{' makes YAML read a mapping",
        )
    else:
        what_is = f"{what}[{number}] is a list, not a command"
        reader.problem(item, "not-a-command", what_is, "write each command as an item of its own")


def _on_failure(reader: Reader, node: Node | None) -> OnFailure | None:
    text = reader.text(node, "on-failure")
    if node is None or text is None:
        return None
    word, dash, rest = text.strip().partition("-")
    action = word.upper()
    if action in ("ABORT", "CONTINUE") and not dash:
        return OnFailure(action=action)
    if action != "RETRY" or (dash and not rest):
        hint = "write ABORT, CONTINUE, RETRY, RETRY-3 or RETRY-3-REGEX"
        reader.problem(node, "unknown-value", f"on-failure {text[:80]!r} is not known", hint)
        return None
    found = re.fullmatch(r"([0-9]+)(?:-(.*))?", rest, re.DOTALL)
    count, pattern = (int(found[1][:9]), found[2] or ".*") if found else (3, rest or ".*")
    if count > MAX_RETRIES:
        reader.problem(node, "too-large", f"on-failure retries {rest.split('-')[0]} times", f"at most {MAX_RETRIES}")
    try:
        re2.compile(pattern, _quiet())
    except re2.error as error:
        what = f"on-failure has the regular expression {pattern[:80]!r}, which cannot be used: {_said(error)}"
        reader.problem(node, "bad-pattern", what, "RE2's syntax is taken: no look-around and no back-references")
    return OnFailure(action="RETRY", count=count, pattern=pattern)


def _quiet() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    return options


def _said(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _runtimes(reader: Reader, node: Node | None) -> dict[str, str]:
    if node is None:
        return {}
    entries = reader.entries(node, "runtime-versions")
    if not entries and (is_null(node) or isinstance(node, yamltree.Mapping)):
        hint = "name one, as 'python: 3.11', or remove it"
        reader.problem(node, "missing-value", "runtime-versions names no runtime", hint)
    runtimes = {}
    for name, value in entries.items():
        text = reader.text(value, name)
        if text:
            runtimes[name] = text
        elif is_null(value) or isinstance(value, yamltree.Scalar):
            reader.problem(value, "missing-value", f"runtime {name} has no version", "write one, or 'latest'")
    return runtimes


def _artifacts(reader: Reader, node: Node | None, what: str, kind: str = "artifacts") -> ArtifactsSpec | None:
    if reader.is_absent(node, what) or node is None:
        return None
    entries = reader.section(node, kind, what)
    if reader.text(entries.get("type"), "type") is not None:
        reader.warn(entries["type"], f"'type' in {what} has no effect: the project says how artifacts are stored")
    secondary: dict[str, ArtifactsSpec] = {}
    section = entries.get("secondary-artifacts")
    if section is not None and not is_null(section):
        for name, value in reader.entries(section, "secondary-artifacts").items():
            if not IDENTIFIER.fullmatch(name):
                at = reader.name_of(section, name)
                reader.problem(at, "bad-name", f"{name!r} is no artifact identifier", "use letters, digits and _")
            one = _artifacts(reader, value, f"secondary-artifacts.{name}", "secondary artifact")
            if one is not None:
                secondary[name] = one
    files = reader.list_of(entries.get("files"), "files", reader.check_glob)
    if not files and secondary:
        reader.warn(node, "artifacts has no 'files'; CodeBuild asks for it even where there are secondary artifacts only")
    elif not files and ("files" in entries or reader.lacks(node, "files")):
        hint = "list what to keep, as '- dist/*' or '- **/*' in quotes"
        reader.problem(node, "missing-key", f"{what} has no 'files'", hint)
    return ArtifactsSpec(
        files=tuple(files),
        name=reader.text(entries.get("name"), "name"),
        discard_paths=reader.flag(entries.get("discard-paths"), "discard-paths"),
        base_directory=_base(reader, entries.get("base-directory")),
        exclude_paths=tuple(reader.list_of(entries.get("exclude-paths"), "exclude-paths", reader.check_glob)),
        enable_symlinks=reader.flag(entries.get("enable-symlinks"), "enable-symlinks"),
        s3_prefix=reader.text(entries.get("s3-prefix"), "s3-prefix"),
        secondary=secondary,
    )


def _base(reader: Reader, node: Node | None) -> str | None:
    text = reader.text(node, "base-directory")
    if node is not None and text is not None:
        reader.check_glob(node, text)
    return text


def _cache(reader: Reader, node: Node | None) -> CacheSpec | None:
    if reader.is_absent(node, "cache") or node is None:
        return None
    entries = reader.section(node, "cache")
    paths = reader.list_of(entries.get("paths"), "paths", partial(_check_cached, reader))
    if not paths and "paths" in entries:
        reader.problem(
            entries["paths"], "missing-value", "cache has no 'paths'", "list what to cache, as '- node_modules/**/*' in quotes"
        )
    fallbacks = reader.list_of(entries.get("fallback-keys"), "fallback-keys", partial(_check_key, reader))
    if len(fallbacks) > 5:
        reader.problem(entries["fallback-keys"], "too-large", f"cache has {len(fallbacks)} fallback-keys", "at most 5")
    key = reader.text(entries.get("key"), "key")
    if key is not None:
        _check_key(reader, entries["key"], key)
    if fallbacks and "key" not in entries:
        reader.warn(entries["fallback-keys"], "fallback-keys have no effect without 'key'")
    action = _lower(reader.text(entries.get("action"), "action"))
    return CacheSpec(paths=tuple(paths), key=key, fallback_keys=tuple(fallbacks), action=action)


def _check_cached(reader: Reader, node: Node, path: str) -> None:
    reader.check_glob(node, path)
    top = next((name for name in path.split("/") if name not in ("", ".")), "**")
    if path.startswith("/") and any(matches(top, name) for name in _NOT_CACHED):
        hint = "name folders of tools, as /root/.m2/**/*"
        reader.problem(node, "bad-pattern", f"no cache can hold {path}: it is, or holds, what belongs to the system", hint)


def _check_key(reader: Reader, node: Node, key: str) -> None:
    """What can be said of a cache key before the shell has made it out."""
    if not key.strip() or len(key.encode()) > 512 or ".." in key.split("/") or any(ord(char) < 32 for char in key.rstrip("\n")):
        hint = "write one line of 1 to 512 bytes, as deps-$(codebuild-hash-files package-lock.json)"
        reader.problem(node, "bad-name", f"{key[:80]!r} is no cache key", hint)


def _reports(reader: Reader, node: Node | None) -> dict[str, ReportSpec]:
    if reader.is_absent(node, "reports") or node is None:
        return {}
    groups: dict[str, ReportSpec] = {}
    for name, value in reader.entries(node, "reports").items():
        if is_null(value):
            hint = "list the report files below it, as 'files:'"
            reader.problem(value, "missing-value", f"report group {name} is empty", hint)
            continue
        entries = reader.section(value, "report group", f"report group {name}")
        files = reader.list_of(entries.get("files"), "files", reader.check_glob)
        if not files and "files" in entries:
            reader.problem(
                entries["files"],
                "missing-value",
                f"report group {name} has no 'files'",
                "list the report files, as '- reports/*.xml' in quotes",
            )
        groups[name] = ReportSpec(
            files=tuple(files),
            file_format=(reader.text(entries.get("file-format"), "file-format") or "JUNITXML").upper(),
            base_directory=_base(reader, entries.get("base-directory")),
            discard_paths=reader.flag(entries.get("discard-paths"), "discard-paths"),
        )
    if len(groups) > MAX_REPORT_GROUPS:
        reader.problem(node, "too-large", f"there are {len(groups)} report groups", f"at most {MAX_REPORT_GROUPS}")
    return groups
