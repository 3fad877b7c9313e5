"""The few shell words that the fake engine understands, run on made-up variables and files. Nothing here starts a process."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

NOT_RUN: Final = "[fake engine] not run: "

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPANSION: Final = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\}|(\?))")
_RESERVED: Final = frozenset(
    [
        "if",
        "then",
        "else",
        "elif",
        "fi",
        "for",
        "while",
        "until",
        "do",
        "done",
        "case",
        "esac",
        "in",
        "function",
        "select",
        "time",
        "{",
        "}",
        "!",
        "[[",
        "]]",
    ]
)


class NotUnderstood(Exception):
    """The text is more shell than this is."""


class Exit(Exception):
    """`exit` was called."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Folders(Protocol):
    """The container's files. Paths are absolute; every method raises OSError as the real thing would."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes, *, append: bool) -> None: ...
    def make_folder(self, path: str, *, parents: bool) -> None: ...
    def is_folder(self, path: str) -> bool: ...


@dataclass(kw_only=True)
class FakeShell:
    """One shell's variables and place. `say` takes output; `wait` sleeps, and is where a command can be ended.

    What is not understood is not run: it says so, takes `unknown_s` and gives `unknown_status`.
    """

    files: Folders
    say: Callable[[bytes], None]
    wait: Callable[[float], None]
    unknown_status: int = 0
    unknown_s: float = 0.0
    variables: dict[str, str] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    cwd: str = "/"
    status: int = 0

    def run(self, text: str) -> int:
        """Run a script; its exit status."""
        try:
            for line in _parse(text):
                self._line(line)
        except NotUnderstood:
            self.status = self._unknown(text.strip().partition("\n")[0])
        except Exit as left:
            self.status = left.status
        return self.status

    def _line(self, line: "_Line") -> None:
        for joint, simple in line:
            if (joint == "&&" and self.status != 0) or (joint == "||" and self.status == 0):
                continue
            self.status = self._simple(simple)

    def _simple(self, simple: "_Simple") -> int:
        words = [word for part in simple.words for word in self._expand(part)]
        assigned: list[tuple[str, str]] = []
        while words and (found := re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", words[0], re.DOTALL)):
            assigned.append((found[1], found[2]))
            words.pop(0)
        if not words:
            self.variables.update(assigned)
            return 0
        command, arguments = words[0], words[1:]
        known = _COMMANDS.get(command)
        if known is None or assigned:
            return self._unknown(" ".join(words))
        if simple.target is None:
            return known(self, arguments, self.say)
        said: list[bytes] = []
        status = known(self, arguments, said.append)
        target = "".join(self._expand(simple.target))
        return self._try(lambda: self.files.write(self._path(target), b"".join(said), append=simple.append)) or status

    def _unknown(self, what: str) -> int:
        self.say(f"{NOT_RUN}{what}\n".encode())
        self.wait(self.unknown_s)
        return self.unknown_status

    def _try(self, action: Callable[[], None]) -> int:
        try:
            action()
        except OSError as error:
            self.say(f"sh: {error.strerror}: {error.filename}\n".encode())
            return 1
        return 0

    def _path(self, path: str) -> str:
        parts: list[str] = []
        for part in (path if path.startswith("/") else f"{self.cwd}/{path}").split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        return "/" + "/".join(parts)

    def _expand(self, word: "_Word") -> list[str]:
        def value(found: re.Match[str]) -> str:
            return str(self.status) if found[3] else self.variables.get(found[1] or found[2], "")

        if len(word) == 1 and not word[0].quoted:
            return _EXPANSION.sub(value, word[0].text).split()
        return ["".join(part.text if part.literal else _EXPANSION.sub(value, part.text) for part in word)]

    def _echo(self, arguments: list[str], say: Callable[[bytes], None]) -> int:
        newline = "" if arguments[:1] == ["-n"] else "\n"
        words = arguments[1:] if not newline else arguments
        say((" ".join(words) + newline).encode(errors="surrogateescape"))
        return 0

    def _exit(self, arguments: list[str], _: Callable[[bytes], None]) -> int:
        raise Exit(int(arguments[0]) & 255 if arguments and arguments[0].isdigit() else self.status)

    def _sleep(self, arguments: list[str], _: Callable[[bytes], None]) -> int:
        self.wait(float(arguments[0]) if arguments and re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", arguments[0]) else 0.0)
        return 0

    def _export(self, arguments: list[str], _: Callable[[bytes], None]) -> int:
        for argument in arguments:
            name, given, value = argument.partition("=")
            if not _NAME.fullmatch(name):
                return 2
            self.exported.add(name)
            if given:
                self.variables[name] = value
        return 0

    def _unset(self, arguments: list[str], _: Callable[[bytes], None]) -> int:
        for name in arguments:
            self.variables.pop(name, None)
            self.exported.discard(name)
        return 0

    def _cd(self, arguments: list[str], say: Callable[[bytes], None]) -> int:
        path = self._path(arguments[0] if arguments else self.variables.get("HOME", "/"))
        if not self.files.is_folder(path):
            say(f"sh: cd: can't cd to {path}\n".encode())
            return 2
        self.cwd = path
        return 0

    def _pwd(self, _: list[str], say: Callable[[bytes], None]) -> int:
        say(f"{self.cwd}\n".encode())
        return 0

    def _env(self, _: list[str], say: Callable[[bytes], None]) -> int:
        for name in sorted(self.exported & self.variables.keys()):
            say(f"{name}={self.variables[name]}\n".encode(errors="surrogateescape"))
        return 0

    def _cat(self, arguments: list[str], say: Callable[[bytes], None]) -> int:
        statuses = [self._try(lambda path=path: say(self.files.read(self._path(path)))) for path in arguments]  # type: ignore[misc]
        return max(statuses, default=0)

    def _mkdir(self, arguments: list[str], _: Callable[[bytes], None]) -> int:
        parents = "-p" in arguments
        folders = [argument for argument in arguments if argument != "-p"]
        return max((self._try(lambda path=path: self._make(path, parents=parents)) for path in folders), default=0)  # type: ignore[misc]

    def _make(self, path: str, *, parents: bool) -> None:
        self.files.make_folder(self._path(path), parents=parents)

    def _nothing(self, _: list[str], __: Callable[[bytes], None]) -> int:
        return 0

    def _false(self, _: list[str], __: Callable[[bytes], None]) -> int:
        return 1


_Command = Callable[[FakeShell, list[str], Callable[[bytes], None]], int]

_COMMANDS: Final[Mapping[str, _Command]] = {
    ":": FakeShell._nothing,
    "true": FakeShell._nothing,
    "set": FakeShell._nothing,
    "false": FakeShell._false,
    "exit": FakeShell._exit,
    "echo": FakeShell._echo,
    "sleep": FakeShell._sleep,
    "export": FakeShell._export,
    "unset": FakeShell._unset,
    "cd": FakeShell._cd,
    "pwd": FakeShell._pwd,
    "env": FakeShell._env,
    "cat": FakeShell._cat,
    "mkdir": FakeShell._mkdir,
}
"""What is understood; besides `VAR=value`, `$VAR`, quotes, `;`, `&&`, `||`, `>` and `>>`."""


@dataclass(frozen=True)
class _Part:
    text: str
    quoted: bool = False
    literal: bool = False


_Word = list[_Part]


@dataclass
class _Simple:
    words: list[_Word] = field(default_factory=list)
    target: _Word | None = None
    append: bool = False


_Line = list[tuple[str, _Simple]]

_TOKEN: Final = re.compile(
    r"(?P<blank>(?:[ \t]|\\\n)+|(?<![^\s;])\#[^\n]*)|(?P<end>[\n;])|(?P<joint>&&|\|\|)|(?P<redirect>>>?)"
    r"|'(?P<single>[^']*)'|\"(?P<double>(?:[^\"\\`$]|\\.|\$(?![({])|\$\{[A-Za-z_]\w*\})*)\""
    r"|(?P<bare>(?:[^\s'\"\\`$;&|<>()]|\\[^\n]|\$(?=[A-Za-z_?])|\$\{[A-Za-z_]\w*\})+)",
    re.DOTALL,
)


def _parse(text: str) -> Iterator[_Line]:
    """The lines of a script, all of them read before the first is run. Raises NotUnderstood."""
    lines: list[_Line] = []
    line: _Line = []
    simple = _Simple()
    word: _Word = []
    redirecting = False
    joint = ""

    def end_word() -> None:
        nonlocal word, redirecting
        if not word:
            return
        if redirecting:
            simple.target, redirecting = word, False
        else:
            simple.words.append(word)
        word = []

    def end_simple() -> None:
        nonlocal simple, joint
        end_word()
        if redirecting or (simple.target and not simple.words):
            raise NotUnderstood
        if simple.words:
            first = simple.words[0]
            if len(first) == 1 and not first[0].quoted and first[0].text in _RESERVED:
                raise NotUnderstood
            line.append((joint, simple))
        elif joint:
            raise NotUnderstood
        simple, joint = _Simple(), ""

    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotUnderstood
        at = found.end()
        if found["blank"] is not None:
            end_word()
        elif found["end"] is not None:
            end_simple()
            if line:
                lines.append(line)
            line = []
        elif found["joint"] is not None:
            end_simple()
            if not line:
                raise NotUnderstood
            joint = found["joint"]
        elif found["redirect"] is not None:
            if word or simple.target or redirecting:  # `2>` and the like
                raise NotUnderstood
            redirecting, simple.append = True, found["redirect"] == ">>"
        elif found["single"] is not None:
            word.append(_Part(found["single"], quoted=True, literal=True))
        elif found["double"] is not None:
            word.append(_Part(re.sub(r'\\([\\"])', r"\1", found["double"]), quoted=True))
        else:
            word.append(_Part(re.sub(r"\\(.)", r"\1", found["bare"])))
    end_simple()
    if line:
        lines.append(line)
    return iter(lines)
