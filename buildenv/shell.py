"""The host's side of the phase runner: commands in, output and exit status out. One `Shell` per container.

Inside runs `runner.sh`. Commands are handed over as files in the control folder, which the build may write to: so the folder is
looked up anew for each command below the workspace's own folder, no link is ever followed, nothing but plain files is read, and
never more than a bound.
"""

import errno
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from buildenv import script
from buildenv.engine import Console, Engine
from millrace.errors import BuildProblem, BuildStopped, InfraProblem
from millrace.log import get_logger
from millrace.vocabulary import Reason

log = get_logger(__name__)

RUNNER: Final = Path(__file__).with_name("runner.sh")
"""The runner, to be mounted read-only inside; its folder there is `READONLY_INSIDE`."""

READONLY_INSIDE: Final = "/codebuild/readonly"
CONTROL_INSIDE: Final = "/codebuild/output/tmp"
RUNNER_COMMAND: Final = ("/bin/sh", f"{READONLY_INSIDE}/{RUNNER.name}")
"""The container's command, for `ContainerSpec.command`."""

GREETING_S: Final = 60.0
"""A container that has not answered by then cannot run builds."""

DEATH_S: Final = 10.0
"""The engine notices the end of a container later than the end of its output."""

POLL_S: Final = 0.2
"""How often a quiet command's stop and deadline are looked at."""

MAX_MARK_BYTES: Final = 80
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""How the system says that there is no room."""
MAX_VALUE_BYTES: Final = 64 * 1024


class ContainerDied(BuildProblem):
    """The build's container ended while a command ran. `oom` only where it is proven; `exit_code` None where unknown."""

    code = "container_died"

    def __init__(self, message: str, *, oom: bool, exit_code: int | None) -> None:
        super().__init__(message, reason=Reason.OOM if oom else Reason.KILLED, status_code="COMMAND_EXECUTION_ERROR")
        self.oom = oom
        self.exit_code = exit_code


class Marks:
    """Finds the runner's marks in the output, wherever it is cut. Holds back only what may be the beginning of a mark."""

    def __init__(self, nonce: str) -> None:
        self._start = b"\x1e" + nonce.encode() + b" "
        self._mark = re.compile(re.escape(self._start) + rb"([0-9]{1,9}) ([a-z0-9]{1,10})\x1e")
        self._held = b""

    def feed(self, data: bytes, number: int) -> tuple[bytes, str | None]:
        """The output in `data` up to the mark of command `number`, and that mark's word, or None where it has not come.

        What follows the mark is kept for the next call, which may be given b"".
        """
        data = self._held + data
        self._held = b""
        at = data.find(self._start)
        while at >= 0:
            found = self._mark.match(data, at)
            if found is not None and int(found[1]) == number:
                self._held = data[found.end() :]
                return data[:at], found[2].decode()
            if found is None and len(data) - at < MAX_MARK_BYTES and b"\x1e" not in data[at + 1 :]:
                self._held = data[at:]
                return data[:at], None
            at = data.find(self._start, at + 1)
        keep = _overlap(data, self._start)
        if keep:
            self._held = data[-keep:]
            return data[:-keep], None
        return data, None

    def rest(self) -> bytes:
        """What is held back, when no more will come."""
        held, self._held = self._held, b""
        return held


def _overlap(data: bytes, start: bytes) -> int:
    """How many bytes at the end of `data` are the beginning of `start`."""
    at = data.rfind(start[:1], max(0, len(data) - len(start) + 1))
    while at >= 0:
        if start.startswith(data[at:]):
            return len(data) - at
        at = data.rfind(start[:1], 0, at)
    return 0


class Shell:
    """Runs the commands of one build, one after another, in its container. One thread uses it.

    `control` is the host's folder that is `inside` in the container; its parent is the workspace's `output` folder, the root of
    a bind mount. `shell` is the buildspec's `env.shell`. `cwd` is where the first command starts, and where a command starts
    whose working directory is gone. `grace_s` is what a command gets between TERM and KILL.
    """

    def __init__(
        self,
        engine: Engine,
        container_id: str,
        console: Console,
        control: Path,
        *,
        shell: str = "/bin/sh",
        cwd: str = "/",
        inside: str = CONTROL_INSIDE,
        grace_s: float = 10.0,
    ) -> None:
        self._engine = engine
        self._container_id = container_id
        self._console = console
        self._files = _Files(control)
        self._shell = shell
        self._cwd = cwd.encode()
        self._inside = inside
        self._grace_s = grace_s
        self._nonce = secrets.token_hex(16)
        self._marks = Marks(self._nonce)
        self._greeted = False
        self._count = 0
        self._baseline: frozenset[bytes] = frozenset()
        self._state = script.State(cwd=self._cwd)

    def run(
        self,
        command: str,
        *,
        on_output: Callable[[bytes], None],
        stop: threading.Event,
        deadline: float,
        user: str | None = None,
        fresh: bool = False,
    ) -> int:
        """Run one command text, as `user` of the image (None: root); its exit status, 128 + N where signal N ended it.

        A `fresh` command leaves nothing to the next one (CodeBuild: buildspec version 0.1).
        `on_output` gets every byte that it writes, in order; output of background processes is given to the command that runs
        when it comes. It ends when its shell does, not when all that it started has ended. `deadline` is of `time.monotonic`.
        Raises ContainerDied, InfraProblem(ENGINE_LOST), BuildProblem(BAD_IMAGE) where the image lacks the shell or the user, and
        BuildStopped when `stop` is set (CANCELLED) or `deadline` has come (TIMEOUT): by then all processes of the build have
        been ended.
        """
        if not self._greeted:
            self._greet(on_output, stop, deadline)
        self._count += 1
        number = self._count
        names = {kind: f"{number}.{kind}" for kind in ("run.sh", "state", "status")}
        wrapper = script.wrapper(
            self._state,
            baseline=self._baseline,
            script=f"{self._inside}/script.sh".encode(),
            dump=f"{self._inside}/{names['state']}".encode(),
            fallback=self._cwd,
        )
        self._files.write("script.sh", command.encode(errors="surrogateescape") + b"\n")
        self._files.write(names["run.sh"], wrapper)
        self._console.write(f"run {number} {self._shell} {user or ''}".rstrip().encode() + b"\n")
        word = self._await(number, on_output, stop, deadline)
        if word.startswith("no"):
            raise self._lacking(word, user)
        status = self._status(names["status"], word)
        if not fresh:
            self._take_state(names["state"])
        for name in names.values():
            self._files.remove(name)
        return status

    def evaluate(self, text: str, *, on_output: Callable[[bytes], None], stop: threading.Event, deadline: float) -> str | None:
        """What the shell makes of `text`: variables and `$(commands)` replaced, quotes kept, as in a here-document.

        None where it cannot be made out. What the commands write to stderr goes to `on_output`; their state is not kept.
        """
        if not re.search(r"[$`\\]", text):
            return text
        end = f"__mr_{secrets.token_hex(8)}"
        command = f"cat >{self._inside}/value <<{end}\n{text}\n{end}\n"
        self._files.remove("value")
        status = self.run(command, on_output=on_output, stop=stop, deadline=deadline, fresh=True)
        raw = self._files.read("value", MAX_VALUE_BYTES)
        self._files.remove("value")
        return raw.decode(errors="replace").strip() if status == 0 and raw is not None else None

    def _lacking(self, word: str, user: str | None) -> BuildProblem:
        if word == "noshell":
            return BuildProblem(
                f"the image has no {self._shell}, which the buildspec's env.shell asks for",
                reason=Reason.BAD_IMAGE,
                hint="Use an image that has it, or leave env.shell out to get /bin/sh.",
            )
        what = f"user {user!r}" if word == "nouser" else "su"
        return BuildProblem(
            f"the image has no {what}, which the buildspec's run-as {user!r} needs",
            reason=Reason.BAD_IMAGE,
            hint="Use an image that has it, make the user in an install phase that runs as root, or leave run-as out.",
        )

    def variables(self) -> dict[str, str]:
        """The exported variables as the last command left them; before the first, those of `set_variables`."""
        return self._state.exported()

    def set_variables(self, values: Mapping[str, str]) -> None:
        """Export `values` from the next command on. Raises ValueError for names and values that no shell can have."""
        self._state = self._state.with_exported(values)

    def _greet(self, on_output: Callable[[bytes], None], stop: threading.Event, deadline: float) -> None:
        said = bytearray()

        def listen(data: bytes) -> None:
            said.extend(data[: 4096 - len(said)])
            on_output(data)

        until = time.monotonic() + GREETING_S
        try:
            self._console.write(f"hello {self._nonce}\n".encode())
            self._await(0, listen, stop, min(deadline, until))
        except ContainerDied as died:
            raise _cannot_run(bytes(said), died.exit_code) from died
        except BuildStopped as stopped:
            if stopped.reason is Reason.TIMEOUT and deadline > until:
                raise InfraProblem(
                    f"the container did not answer within {GREETING_S:.0f} s", reason=Reason.ENGINE_LOST
                ) from stopped
            raise
        self._greeted = True
        raw = self._files.read("0.env", script.MAX_STATE_BYTES)
        if raw is not None:
            self._files.remove("0.env")
            inherited = script.parse_exports(raw)
            self._baseline = frozenset(inherited)
            self._state = replace(self._state, variables={**inherited, **self._state.variables})

    def _await(self, number: int, on_output: Callable[[bytes], None], stop: threading.Event, deadline: float) -> str:
        """Pass output on until the mark of command `number`; its word."""
        data: bytes | None = b""
        while data is not None:
            output, word = self._marks.feed(data, number)
            if output:
                on_output(output)
            if word is not None:
                return word
            left = deadline - time.monotonic()
            if stop.is_set() or left <= 0:
                raise self._end(number, on_output, cancelled=stop.is_set())
            data = self._console.read(min(left, POLL_S))
        if rest := self._marks.rest():
            on_output(rest)
        raise self._death()

    def _end(self, number: int, on_output: Callable[[bytes], None], *, cancelled: bool) -> BuildStopped:
        """End the command, and the container where the command will not end. What it still says is passed on."""
        with suppress(InfraProblem):  # A console that takes nothing more: the engine's own stop, below, is what counts.
            self._console.write(b"term\n")
        until = time.monotonic() + self._grace_s
        data: bytes | None = b""
        ended = False
        while data is not None and not ended and (left := until - time.monotonic()) > 0:
            data = self._console.read(min(left, POLL_S))
            output, word = self._marks.feed(data or b"", number)
            if output:
                on_output(output)
            ended = word is not None
        if not ended:
            self._engine.stop(self._container_id, 0)
        what = "the build was stopped" if cancelled else "the build's time was over"
        return BuildStopped(f"{what} while a command ran", reason=Reason.CANCELLED if cancelled else Reason.TIMEOUT)

    def _death(self) -> ContainerDied | InfraProblem:
        """Why the output ended: asked of the engine, as an end of the stream says nothing."""
        until = time.monotonic() + DEATH_S
        state = self._engine.state(self._container_id)
        while state.running and time.monotonic() < until:
            time.sleep(0.05)
            state = self._engine.state(self._container_id)
        if state.running:
            return InfraProblem("the container's output ended while it runs", reason=Reason.ENGINE_LOST)
        if state.exit_code is None:
            return InfraProblem("the container is gone", reason=Reason.ENGINE_LOST)
        log.info("container.died", exit_code=state.exit_code, oom=state.oom_killed)
        if state.oom_killed:
            message = "the build used more memory than its limit, and the kernel ended its container"
        else:
            message = f"the build's container ended with status {state.exit_code} while a command ran"
        return ContainerDied(message, oom=state.oom_killed, exit_code=state.exit_code)

    def _status(self, name: str, word: str) -> int:
        """The exit status in a mark; the status file, where it was left alone and there was room for it, must say the same."""
        raw = self._files.read(name, 100)
        if not word.isdigit() or int(word) > 255 or (raw and raw.strip() != word.encode()):
            raise BuildProblem(
                f"a command's exit status is reported in two ways, {word} and {raw!r}: the build has touched the runner's files",
                reason=Reason.KILLED,
                status_code="COMMAND_EXECUTION_ERROR",
            )
        return int(word)

    def _take_state(self, name: str) -> None:
        """The state that the last command left, where it left one."""
        raw = self._files.read(name, script.MAX_STATE_BYTES)
        if raw is None:
            return
        try:
            self._state = script.parse(raw)
        except script.BadState as bad:
            log.warning("state.unreadable", problem=str(bad))


def _cannot_run(said: bytes, exit_code: int | None) -> BuildProblem:
    text = said.decode(errors="replace").strip()
    return BuildProblem(
        f"the image cannot run /bin/sh (status {exit_code}){': ' + text if text else ''}",
        reason=Reason.BAD_IMAGE,
        hint="The image must have /bin/sh and be of the worker's architecture.",
    )


class _Files:
    """The control folder, as seen from outside by one who trusts nothing in it."""

    def __init__(self, folder: Path) -> None:
        self._parent = folder.parent
        self._name = folder.name

    def _open_folder(self) -> int:
        """The control folder, made where it is missing. A link or a file in its place is put out of the way first."""
        parent = os.open(self._parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with suppress(FileExistsError):
                os.mkdir(self._name, 0o755, dir_fd=parent)
            if not stat.S_ISDIR(os.stat(self._name, dir_fd=parent, follow_symlinks=False).st_mode):
                os.unlink(self._name, dir_fd=parent)
                os.mkdir(self._name, 0o755, dir_fd=parent)
            return os.open(self._name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)

    def write(self, name: str, data: bytes) -> None:
        """A new file, in place of what has that name. Raises BuildProblem where the build is in the way, OSError(FULL)."""
        try:
            folder = self._open_folder()
            try:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(name, flags, 0o644, dir_fd=folder), "wb") as file:
                    file.write(data)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise BuildProblem(
                f"the next command cannot be handed to the container: {error.strerror} ({name})",
                reason=Reason.KILLED,
                status_code="COMMAND_EXECUTION_ERROR",
                hint="Commands must leave /codebuild/output/tmp alone.",
            ) from error

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """The content of a plain file, None where there is none. Raises BuildProblem where it holds more than `max_bytes`."""
        try:
            folder = self._open_folder()
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
                    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        return None
                    data = file.read(max_bytes + 1)
            finally:
                os.close(folder)
        except OSError:
            return None
        if len(data) > max_bytes:
            raise BuildProblem(
                f"the variables and functions that a command left take more than {max_bytes // 1024**2} MiB",
                reason=Reason.KILLED,
                status_code="COMMAND_EXECUTION_ERROR",
                hint="Keep large data in files.",
            )
        return data

    def remove(self, name: str) -> None:
        """Take a file away, if it can be; the workspace goes as a whole in the end."""
        with suppress(OSError):
            folder = self._open_folder()
            try:
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
