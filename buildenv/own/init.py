"""The init of a build that runs in the worker's own container: a script, which needs the standard library only.

It gives the build namespaces of its own where it may, takes from it what no build needs, starts the runner, reaps, and ends
with it and with all that it left. The runner asks for signals to all of the build's processes by USR1 (TERM) and USR2 (KILL),
as the kernel's own way, `kill -1`, would reach the worker too where both share a namespace.

Its argument is JSON, as `engine.py` makes it. What became of the start it writes as JSON to the file descriptor named there:
`isolated` and `why` not, `failed`, the number of the error where the command could not be run, and `trouble`.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from typing import Any, Final

_NEWNS, _NEWUTS, _NEWIPC, _NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x20000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 0x4000, 1 << 18
_PDEATHSIG, _SECUREBITS, _CAPBSET_READ, _CAPBSET_DROP, _NO_NEW_PRIVS, _SUBREAPER = 1, 28, 23, 24, 38, 36
_NUMBERS: Final = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "NET_BIND_SERVICE": 10,
    "SYS_CHROOT": 18,
    "AUDIT_WRITE": 29,
    "SETFCAP": 31,
}
_ASKED: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_ROUNDS: Final = 1000
_QUIET_ROUNDS: Final = 3
_NOT_FOUND: Final = 127
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def descendants(root: int) -> dict[int, int]:
    """The living processes below `root`, as they are seen in this namespace, each with its group."""
    parents: dict[int, int] = {}
    groups: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent, group = file.read().rpartition(b") ")[2].split()[:3]
                if state not in (b"Z", b"X"):
                    parents[int(name)], groups[int(name)] = int(parent), int(group)
    below = {root}
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        below |= more
        grew = bool(more)
    return {pid: groups[pid] for pid in below - {root}}


def _group(pid: int) -> int:
    """Its group; 0, which is none, where it has gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def signal_all(root: int, number: int) -> None:
    """Send a signal to each process below `root`."""
    for pid in descendants(root):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_all(root: int) -> bool:
    """Kill all processes below `root`, however fast they multiply; whether none is left. `root` must reap, or be reaped.

    A list of processes is old when it is read, and one that forks and ends meanwhile is in none. So the first process of a
    namespace has the kernel kill all others at once; else whole groups are killed, which the kernel does at once, too, and
    what is left is halted first. `root` leads a session, so there is nobody else in the groups.
    """
    if root == 1 == os.getpid():
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return True
    none = 0
    for _ in range(_ROUNDS):
        found = descendants(root)
        for group in set(found.values()) - {os.getpgid(0), _group(root)}:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        none = 0 if found else none + 1
        if none == _QUIET_ROUNDS:
            return True
        time.sleep(0.005)
    return False


def _isolate(mounts: list[tuple[str, str, bool]], hostname: str) -> None:
    """In the first process of a new namespace: its own /proc, and the mounts. Raises OSError."""
    _check(_libc.mount(None, b"/", None, _REC | _PRIVATE, None), "mount /")
    for source, target, read_only in mounts:
        where = os.fsencode(target)
        _check(_libc.mount(os.fsencode(source), where, None, _BIND, None), f"mount {target}")
        if read_only:
            _check(_libc.mount(None, where, None, _BIND | _REMOUNT | _RDONLY, None), f"mount {target} read-only")
    _check(_libc.mount(b"proc", b"/proc", b"proc", _NOSUID | _NODEV | _NOEXEC, None), "mount /proc")
    name = hostname.encode()
    _check(_libc.sethostname(name, len(name)), "sethostname")


def _leave_namespaces() -> None:
    _check(_libc.unshare(_NEWNS | _NEWUTS | _NEWIPC | _NEWPID), "unshare")


def _why_not_isolated(mounts: list[tuple[str, str, bool]], hostname: str) -> str:
    """What bars the way to namespaces of its own, tried by a process that ends with the answer; empty where nothing does."""
    told, tell = os.pipe()
    probe = os.fork()
    if probe == 0:
        why = "it ended"
        try:
            _leave_namespaces()
            inner = os.fork()
            if inner == 0:
                try:
                    _isolate(mounts, hostname)
                    os._exit(0)
                except OSError as error:
                    os.write(tell, str(error).encode())
                    os._exit(1)
            os.waitpid(inner, 0)
            os._exit(0)
        except OSError as error:
            why = str(error)
        os.write(tell, why.encode())
        os._exit(1)
    os.close(tell)
    with open(told, "rb") as file:
        why = file.read().decode(errors="replace")
    os.waitpid(probe, 0)
    return why


def _give_up_rights(keep: list[str]) -> None:
    """What the build is to have of root's rights, from its next program on. Where they cannot be dropped, they stay."""
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    kept = {_NUMBERS[name] for name in keep}
    number = 0
    while (has := _libc.prctl(_CAPBSET_READ, number, 0, 0, 0)) >= 0:
        if has and number not in kept:
            _libc.prctl(_CAPBSET_DROP, number, 0, 0, 0)
        number += 1
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # the kernel ends builds before the worker


def _stand_in(mounts: list[tuple[str, str, bool]]) -> None:
    """What can be done without mounting: nothing where a thing lies in its place already, a copy of a file. Raises OSError."""
    for source, target, _ in mounts:
        if os.path.isfile(source):
            if source != target:
                shutil.copyfile(source, target)
        elif source != target:
            raise OSError(f"{source} is to be seen at {target}, and nothing can be mounted here")


def _tell(status: int, *, isolated: bool, why: str, failed: int | None = None, trouble: str = "") -> None:
    said = {"isolated": isolated, "why": why, "failed": failed, "trouble": trouble}
    with suppress(OSError):
        os.write(status, json.dumps(said).encode())
    os.close(status)


def _serve(plan: dict[str, Any], status: int, *, isolated: bool, why: str) -> int:
    """Start the command, and look after all that comes of it, until it ends; its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED)
    _check(_libc.prctl(_SUBREAPER, 1, 0, 0, 0), "prctl")
    _give_up_rights(plan["keep"])
    command: list[str] = plan["command"]
    if plan["runner"] and not isolated:
        command = [*command, plan["control"], str(os.getpid())]
    try:
        child = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, 1, 2)],
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, *_ASKED],
            setpgroup=0,
        )
    except OSError as error:
        _tell(status, isolated=isolated, why=why, failed=error.errno or 0)
        return _NOT_FOUND
    for number in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)  # the console is the build's alone, and ends with it
    _tell(status, isolated=isolated, why=why)
    ended = _watch(child)
    end_all(os.getpid())
    return ended


def _watch(child: int) -> int:
    """Reap, and pass on signals, until `child` ends; its exit status."""
    while True:
        number = signal.sigwait(_ASKED)
        if number == signal.SIGUSR1:
            signal_all(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGUSR2:
            end_all(os.getpid())
        elif number == signal.SIGTERM:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        with suppress(ChildProcessError):
            while (done := os.waitpid(-1, os.WNOHANG))[0]:
                if done[0] == child:
                    return _status(done[1])


def _status(waited: int) -> int:
    code = os.waitstatus_to_exitcode(waited)
    return code if code >= 0 else 128 - code


def main(argument: str) -> int:
    """Be the init of one build."""
    plan: dict[str, Any] = json.loads(argument)
    status: int = plan["status"]
    mounts: list[tuple[str, str, bool]] = plan["mounts"]
    os.set_inheritable(status, False)
    os.umask(0o022)
    os.chdir("/")
    why = _why_not_isolated(mounts, plan["hostname"]) if plan["isolate"] else "it was not asked for"
    if why:
        try:
            _stand_in(mounts)
        except OSError as error:
            _tell(status, isolated=False, why=why, trouble=f"{error} ({why})")
            return _NOT_FOUND
        return _serve(plan, status, isolated=False, why=why)
    _leave_namespaces()
    first = os.fork()
    if first == 0:
        _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _isolate(mounts, plan["hostname"])
        os._exit(_serve(plan, status, isolated=True, why=""))
    os.close(status)
    for number in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(first, signal.SIGTERM))
    return _status(os.waitpid(first, 0)[1])


if __name__ == "__main__":
    os._exit(main(sys.argv[1]))
