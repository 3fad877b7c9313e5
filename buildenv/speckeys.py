"""Every key of the buildspec language, once: what the parser knows, and what the JSON Schema is made from (`buildenv.schema`).

Source: CodeBuild, build-spec-ref and batch-build-buildspec.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal[
    "text",
    "flag",
    "list",
    "globs",
    "commands",
    "texts by name",
    "lists by name",
    "section",
    "sections by name",
    "list of sections",
]
"""What a key holds. `list`, `globs` and `commands` may be written as one text; `texts by name` is a mapping of plain values."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key: its kind, a sentence for people, the section that it opens, and the values that it may have (in lower case)."""

    kind: Kind
    says: str
    section: str = ""
    values: tuple[str, ...] = ()
    needed: bool = False


FORMATS: Final = (
    *("JUNITXML", "CUCUMBERJSON", "NUNITXML", "NUNIT3XML", "TESTNGXML", "VISUALSTUDIOTRX"),
    *("CLOVERXML", "COBERTURAXML", "JACOCOXML", "SIMPLECOV"),
)
SHELLS: Final = ("bash", "/bin/bash", "sh", "/bin/sh")
YES: Final = frozenset({"yes", "true", "on", "y"})
NO: Final = frozenset({"no", "false", "off", "n"})


def _key(kind: Kind, says: str, section: str = "", values: tuple[str, ...] = (), *, needed: bool = False) -> Key:
    return Key(kind=kind, says=says, section=section, values=values, needed=needed)


_ARTIFACTS: Final = {
    "files": _key("globs", "What to keep: patterns relative to the source folder, or to base-directory."),
    "name": _key("text", "The artifact's name, made out by the shell; used where the project sets overrideArtifactName."),
    "discard-paths": _key("flag", "Keep every file under its base name."),
    "base-directory": _key("text", "The folder, or pattern of folders, that files and exclude-paths are relative to."),
    "exclude-paths": _key("globs", "What to leave out of what files names."),
    "enable-symlinks": _key("flag", "Keep links as links, in a zip."),
    "s3-prefix": _key("text", "The beginning of the key where the project's namespaceType is BUILD_ID."),
    "type": _key("text", "Has no effect: the project says how artifacts are stored."),
}
_TASK: Final = {
    "identifier": _key("text", "The task's name: letters, digits and _.", needed=True),
    "buildspec": _key("text", "Path of the task's own buildspec."),
    "debug-session": _key("flag", "Start the task with a debug session."),
    "ignore-failure": _key("flag", "The batch goes on, and may succeed, when this task fails."),
    "env": _key("section", "What differs in the task's environment.", "task env"),
}
SECTIONS: Final[Mapping[str, Mapping[str, Key]]] = {
    "the buildspec": {
        "version": _key("text", "The version of the language: 0.2, or 0.1 with a fresh shell for each command.", needed=True),
        "run-as": _key("text", "The user of the image that runs the commands; root by default."),
        "env": _key("section", "Variables and where they come from.", "env"),
        "environment_variables": _key("section", "The variables of version 0.1.", "environment_variables"),
        "proxy": _key("section", "What goes through an explicit proxy.", "proxy"),
        "batch": _key("section", "The tasks of a batch build; just one kind of them.", "batch"),
        "phases": _key("section", "What is run.", "phases"),
        "reports": _key("sections by name", "Report groups: test and coverage results.", "report group"),
        "artifacts": _key("section", "What is kept of the build.", "artifacts"),
        "cache": _key("section", "What later builds find again.", "cache"),
    },
    "env": {
        "shell": _key("text", "The shell that runs the commands; /bin/sh by default.", values=SHELLS),
        "variables": _key("texts by name", "Plain values; nothing in them is expanded."),
        "parameter-store": _key("texts by name", "Variables whose values are parameters of the secret store, by their names."),
        "secrets-manager": _key("texts by name", "Variables whose values are secrets: ID[:JSON-KEY[:STAGE[:VERSION]]]."),
        "exported-variables": _key("list", "Variables whose values the build shows when it has ended."),
        "git-credential-helper": _key("flag", "Let git inside the build use the credentials of its sources."),
    },
    "environment_variables": {"plaintext": _key("texts by name", "Plain values.")},
    "proxy": {
        "upload-artifacts": _key("flag", "Artifacts go through the proxy."),
        "logs": _key("flag", "Logs go through the proxy."),
    },
    "phases": {
        "install": _key("section", "Only for packages that the build needs.", "phase"),
        "pre_build": _key("section", "Before the build.", "phase"),
        "build": _key("section", "The build.", "phase"),
        "post_build": _key("section", "After the build, also where it failed.", "phase"),
    },
    "phase": {
        "run-as": _key("text", "The user of the image that runs this phase's commands."),
        "on-failure": _key("text", "ABORT, CONTINUE, RETRY, RETRY-COUNT, RETRY-REGEX or RETRY-COUNT-REGEX."),
        "runtime-versions": _key("texts by name", "Runtimes of the image and their versions; in install only."),
        "commands": _key("commands", "One after another; the first that fails ends the phase."),
        "finally": _key("commands", "Run after the commands, also where one failed."),
    },
    "artifacts": {
        **_ARTIFACTS,
        "secondary-artifacts": _key(
            "sections by name", "Further artifacts, by the artifactIdentifier of the project.", "secondary artifact"
        ),
    },
    "secondary artifact": _ARTIFACTS,
    "cache": {
        "key": _key("text", "The cache's key, made out by the shell; such a cache is never rewritten."),
        "fallback-keys": _key("list", "Beginnings of keys, tried in order where there is no cache of the key; at most 5."),
        "action": _key("text", "Only restore, or only save; both by default.", values=("restore", "save")),
        "paths": _key("globs", "What is cached; relative to the source folder, or absolute.", needed=True),
    },
    "report group": {
        "files": _key("globs", "The report files.", needed=True),
        "file-format": _key("text", "What they are; JUNITXML by default.", values=tuple(name.lower() for name in FORMATS)),
        "base-directory": _key("text", "The folder that files are relative to."),
        "discard-paths": _key("flag", "Keep every file under its base name."),
    },
    "batch": {
        "fast-fail": _key("flag", "Stop all tasks when one fails."),
        "build-list": _key("list of sections", "Tasks that run side by side.", "task"),
        "build-graph": _key("list of sections", "Tasks that wait for others.", "graph task"),
        "build-matrix": _key("section", "A task for each combination of values.", "build-matrix"),
        "build-fanout": _key("section", "The same task several times, for tests in parts.", "build-fanout"),
    },
    "task": _TASK,
    "graph task": {**_TASK, "depend-on": _key("list", "Identifiers of the tasks that must end first.")},
    "task env": {
        "compute-type": _key("text", "The task's compute type."),
        "fleet": _key("text", "The task's fleet."),
        "image": _key("text", "The task's image."),
        "privileged-mode": _key("flag", "Run a Docker daemon in the task."),
        "type": _key("text", "The task's environment type."),
        "variables": _key("texts by name", "Plain values, over those of the build."),
    },
    "build-matrix": {
        "static": _key("section", "What all tasks have in common.", "static"),
        "dynamic": _key("section", "Lists of values, of which every combination is a task.", "dynamic"),
    },
    "static": {
        "ignore-failure": _TASK["ignore-failure"],
        "env": _key("section", "What is the same in all tasks' environments.", "task env"),
    },
    "dynamic": {
        "buildspec": _key("list", "Paths of buildspecs."),
        "env": _key("section", "Lists of values of the environment.", "dynamic env"),
    },
    "dynamic env": {
        "compute-type": _key("list", "Compute types."),
        "image": _key("list", "Images."),
        "variables": _key("lists by name", "Variables, each with the values that it takes in turn."),
    },
    "build-fanout": {
        "parallelism": _key("text", "How many tasks, 1 to 100.", needed=True),
        "ignore-failure": _TASK["ignore-failure"],
    },
}
