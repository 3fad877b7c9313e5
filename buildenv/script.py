"""What one command of a buildspec leaves to the next: read from what its shell wrote, and written as shell text. Pure.

CodeBuild runs each command as a script of its own and carries the environment and the working directory over (CodeBuild:
build-spec-ref, version 0.2). Its own samples also set a plain variable in one command and read it in the next, so plain variables
are carried too, and functions and arrays where the shell is bash. Options (`set -e`), traps, aliases, `IFS` and whether a
variable is read-only are not.

The shell writes its state in one of two forms, each of parts that end with a line of the one byte 0x1e:
  sh     `pwd`, then `umask`, then `set`, then `export -p`
  bash   `pwd`, then `umask`, then `declare -p`, then `declare -f; declare -Fx`
Both print values quoted so that a shell reads them again. Everything is bytes: a shell's values need not be UTF-8.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

NAME: Final = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")

MAX_STATE_BYTES: Final = 16 * 1024 * 1024
"""Variables and functions beyond this are refused, not cut."""

NOT_CARRIED: Final = frozenset(
    b"BASH BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_ARGV0 BASH_CMDS BASH_COMMAND BASH_EXECUTION_STRING BASH_LINENO "
    b"BASH_LOADABLES_PATH BASH_MONOSECONDS BASH_REMATCH BASH_SOURCE BASH_SUBSHELL BASH_TRAPSIG BASH_VERSINFO BASH_VERSION "
    b"COMPWORDBREAKS DIRSTACK EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME GROUPS HISTCMD IFS LINENO OLDPWD OPTARG OPTERR OPTIND "
    b"PIPESTATUS PPID PS1 PS2 PS3 PS4 PWD RANDOM SECONDS SHELLOPTS SHLVL SRANDOM UID _".split()
)
"""Variables that a shell keeps by itself. `PWD` and `OLDPWD` come back by `cd`."""

OURS: Final = b"__mr_"

_SINGLE = rb"'[^']*+'"
_DOUBLE = rb'"(?:[^"\\]|\\.)*+"'
_ANSI = rb"\$'(?:[^'\\]|\\.)*+'"
_QUOTED = rb"(?:" + _SINGLE + rb"|" + _DOUBLE + rb"|" + _ANSI + rb"|\\."
WORD = _QUOTED + rb"|\$(?!')|[^\s'\"\\$()])*+"
_ARRAY = rb"\(" + _QUOTED + rb"|\$(?!')|[^'\"\\$()])*+\)"
_VALUE = rb"(?:" + _ARRAY + rb"|" + WORD + rb")"
SET_LINE = re.compile(rb"(?P<name>[A-Za-z_]\w*)=(?P<value>" + WORD + rb")\n", re.ASCII | re.DOTALL)
EXPORT_LINE = re.compile(
    rb"(?:export|declare -(?P<flags>[A-Za-z-]+)) (?P<name>[A-Za-z_]\w*)(?:=(?P<value>" + _VALUE + rb"))?\n", re.ASCII | re.DOTALL
)
_SEGMENT = re.compile(
    rb"(?P<single>" + _SINGLE + rb")|(?P<double>" + _DOUBLE + rb")|(?P<ansi>" + _ANSI + rb")|\\(?P<escaped>.)|(?P<bare>[^'\"\\])",
    re.DOTALL,
)
_ANSI_ESCAPE = re.compile(
    rb"\\(?:(?P<octal>[0-7]{1,3})|x(?P<hex>[0-9A-Fa-f]{1,2})|u(?P<u4>[0-9A-Fa-f]{1,4})|U(?P<u8>[0-9A-Fa-f]{1,8})|c(?P<control>.)|(?P<char>.))",
    re.DOTALL,
)
_ANSI_CHARS = {
    b"a": b"\a",
    b"b": b"\b",
    b"e": b"\x1b",
    b"E": b"\x1b",
    b"f": b"\f",
    b"n": b"\n",
    b"r": b"\r",
    b"t": b"\t",
    b"v": b"\v",
}
_END_OF_PART = b"\x1e\n"


class BadState(ValueError):
    """What a shell wrote of its state cannot be read: it was ended while it wrote, or the build touched the file."""


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One variable. `text` is its value as the shell wrote it, quoted; None where it has none yet. `flags` are bash's."""

    text: bytes | None
    exported: bool
    flags: str = ""

    @property
    def value(self) -> bytes | None:
        """What the variable holds; None for arrays, and where it has no value."""
        return None if self.text is None or self.text.startswith(b"(") else unquote(self.text)


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a shell stood when a command ended. `cwd` and `umask` are None where they are the container's own."""

    cwd: bytes | None = None
    umask: bytes | None = None
    variables: Mapping[bytes, Variable] = field(default_factory=dict)
    functions: bytes = b""
    bash: bool = False

    def exported(self) -> dict[str, str]:
        """The exported variables that hold text, by name; bytes that are no UTF-8 are replaced."""
        values = {name: variable.value for name, variable in self.variables.items() if variable.exported}
        return {name.decode(): value.decode(errors="replace") for name, value in values.items() if value is not None}

    def with_exported(self, values: Mapping[str, str]) -> "State":
        """This state and `values`, exported. Raises ValueError for what cannot be a variable."""
        added = {name.encode(): Variable(text=quote(value.encode()), exported=True) for name, value in values.items()}
        wrong = [name for name, value in values.items() if not NAME.fullmatch(name.encode()) or "\0" in value]
        if wrong:
            raise ValueError(f"these cannot be variables of a shell: {', '.join(map(repr, wrong))}")
        return replace(self, variables={**self.variables, **added})


def quote(value: bytes) -> bytes:
    """`value` as one word of any shell."""
    return b"'" + value.replace(b"'", b"'\"'\"'") + b"'"


def unquote(word: bytes) -> bytes:
    """What a shell makes of one word that a shell quoted."""
    return b"".join(_segment(found) for found in _SEGMENT.finditer(word))


def _segment(found: re.Match[bytes]) -> bytes:
    if (single := found["single"]) is not None:
        return single[1:-1]
    if (double := found["double"]) is not None:
        return re.sub(rb'\\(?:\n|([\\"$`]))', lambda escape: escape[1] or b"", double[1:-1])
    if (ansi := found["ansi"]) is not None:
        return _ANSI_ESCAPE.sub(_ansi_escape, ansi[2:-1])
    return found["escaped"] or found["bare"] or b""


def _ansi_escape(found: re.Match[bytes]) -> bytes:
    if (octal := found["octal"]) is not None:
        return bytes([int(octal, 8) & 0xFF])
    if (digits := found["hex"]) is not None:
        return bytes([int(digits, 16)])
    if (code := found["u4"] or found["u8"]) is not None:
        return chr(int(code, 16)).encode(errors="replace")
    if (control := found["control"]) is not None:
        return bytes([control[0] & 0x1F])
    char: bytes = found["char"]
    return _ANSI_CHARS.get(char, char)


def parse_exports(raw: bytes) -> dict[bytes, Variable]:
    """What `export -p` of any shell prints. Raises BadState."""
    return {name: replace(variable, exported=True) for name, variable in _lines(raw, EXPORT_LINE)}


def parse(raw: bytes) -> State:
    """What a shell wrote of its state. Raises BadState where it is not whole."""
    kind, _, rest = raw.partition(b"\n")
    if kind not in (b"sh", b"bash") or not rest.endswith(b"end\n"):
        raise BadState("the state is not whole")
    cwd, found, rest = rest.removesuffix(b"end\n").partition(b"\n" + _END_OF_PART)
    umask, _, rest = rest.partition(b"\n")
    if not found or not re.fullmatch(rb"[0-7]{1,4}", umask):
        raise BadState("the state has no working directory or umask")
    if kind == b"bash":
        variables, at = _until_end(rest, EXPORT_LINE)
        functions = rest[at:]
        if not functions.endswith(_END_OF_PART):
            raise BadState("the state has no end of its functions")
        return State(cwd=cwd, umask=umask, variables=dict(variables), functions=functions.removesuffix(_END_OF_PART), bash=True)
    plain, at = _until_end(rest, SET_LINE)
    exported = parse_exports(rest[at:].removesuffix(_END_OF_PART))
    merged = {name: replace(variable, exported=name in exported) for name, variable in plain}
    return State(cwd=cwd, umask=umask, variables={**exported, **merged})


def _until_end(raw: bytes, line: re.Pattern[bytes]) -> tuple[list[tuple[bytes, Variable]], int]:
    variables: list[tuple[bytes, Variable]] = []
    at = 0
    while not raw.startswith(_END_OF_PART, at):
        found = line.match(raw, at)
        if found is None:
            raise BadState(f"the state cannot be read at {raw[at : at + 40]!r}")
        fields = found.groupdict()
        flags = (fields.get("flags") or b"").decode().strip("-")
        variables.append((found["name"], Variable(text=found["value"], exported="x" in flags, flags=flags)))
        at = found.end()
    return variables, at + len(_END_OF_PART)


def _lines(raw: bytes, line: re.Pattern[bytes]) -> Iterable[tuple[bytes, Variable]]:
    return _until_end(raw + _END_OF_PART, line)[0]


# The shell's own part. It holds no single quote, as it is itself put between two. `command` and `builtin` step around functions
# of the user's that carry a builtin's name; a redirection that fails ends no shell when it stands at a group.
_DUMP: Final = rb"""__mr_status=$?
set +xvuefC
if [ -z "${__mr_done-}" ]; then
__mr_done=1
if [ -n "${BASH_VERSION-}" ]; then
{ builtin printf "bash\n"; builtin pwd || builtin printf "%s\n" "$PWD"
builtin printf "\036\n"; builtin umask; builtin declare -p
builtin printf "\036\n"; builtin declare -f; builtin declare -Fx
builtin printf "\036\nend\n"; } >"$__mr_state"
else
{ command printf "sh\n"; command pwd || command printf "%s\n" "$PWD"
command printf "\036\n"; command umask; set
command printf "\036\n"; export -p
command printf "\036\nend\n"; } >"$__mr_state"
fi
fi"""


def wrapper(state: State, *, baseline: Iterable[bytes], script: bytes, dump: bytes, fallback: bytes) -> bytes:
    """The script that one shell runs: it restores `state`, runs `script` and writes the state that follows to `dump`.

    `baseline` names the variables that the shell gets from the container and that `state` may have unset. `fallback` is where it
    goes when the working directory is gone. All are paths inside the container. The wrapper ends as `script` does. Where
    `script` replaces its process, is killed, or calls `exit` under an EXIT trap of its own, nothing is written, and the state
    stays as it was.
    """
    lines = [b"__mr_state=" + quote(dump), b"__mr_dump='" + _DUMP + b"'"]
    if state.umask is not None:
        lines.append(b"umask " + state.umask)
    if state.cwd is not None:
        note = b"millrace: the working directory " + state.cwd + b" is gone; going on in " + fallback
        lines.append(
            b"cd "
            + quote(state.cwd)
            + b" 2>/dev/null || { cd "
            + quote(fallback)
            + b"; printf '%s\\n' "
            + quote(note)
            + b" >&2; }"
        )
    gone = [name for name in baseline if name not in NOT_CARRIED and not _is_exported(state, name)]
    lines += [b"unset -v " + name for name in gone]
    kept = {name: kept for name, kept in state.variables.items() if name not in NOT_CARRIED and not name.startswith(OURS)}
    lines += [_assignment(name, variable, bash=state.bash) for name, variable in kept.items()]
    if (before := state.variables.get(b"OLDPWD")) is not None and before.text is not None:
        lines.append(_assignment(b"OLDPWD", before, bash=False))
    if state.functions:
        lines += [b"shopt -s extglob", state.functions.rstrip(b"\n"), b"shopt -u extglob"]
    lines += [
        b"trap '{ eval \"$__mr_dump\"; } 2>/dev/null' EXIT",
        b"{ . " + quote(script),
        b'{ eval "$__mr_dump"; } 2>/dev/null',
        b'exit "$__mr_status"; }',
    ]
    return b"\n".join(lines) + b"\n"


def _is_exported(state: State, name: bytes) -> bool:
    variable = state.variables.get(name)
    return variable is not None and variable.exported


def _assignment(name: bytes, variable: Variable, *, bash: bool) -> bytes:
    value = b"" if variable.text is None else b"=" + variable.text
    if bash and variable.flags:
        flags = variable.flags.replace("r", "")
        return b"declare -" + (flags.encode() or b"-") + b" " + name + value
    if variable.exported:
        return b"export " + name + value
    return name + value if value else b":"
