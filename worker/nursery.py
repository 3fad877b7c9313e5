"""Where attempts' processes come from: forked from a parent that has imported all they need, which a start of Python has not.

`Nursery` is the worker's side; `python -m worker.nursery` is the parent, which has one thread and does nothing but fork. A child
talks with the worker over a connection of its own, and its end is the end of that connection.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

from millrace.errors import Unavailable
from millrace.log import get_logger

log = get_logger(__name__)
_HELLO_S: Final = 60.0


class Child:
    """A process of an attempt. `pid` is its own; `send` and `receive` are whole messages."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        if not connection.poll(_HELLO_S):
            raise EOFError("it does not answer")
        self.pid = int(connection.recv_bytes())
        self._process = os.pidfd_open(self.pid)  # a number may be used again, this may not
        self._closing = threading.Lock()

    def send(self, message: bytes) -> bool:
        """False where it has ended."""
        try:
            self._connection.send_bytes(message)
        except OSError:
            return False
        return True

    def receive(self) -> bytes | None:
        """Its next message; None when it has ended."""
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with self._closing, suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._process, number)

    def dismiss(self) -> None:
        """No message will come any more: what waits for one ends."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as stream:
            stream.shutdown(socket.SHUT_WR)

    def has_word(self) -> bool:
        """Whether `receive` would answer at once."""
        try:
            return self._connection.poll(0)
        except OSError:
            return True

    def close(self) -> None:
        """Let go of it, once it has ended."""
        with self._closing:
            self._connection.close()
            if self._process >= 0:
                os.close(self._process)
                self._process = -1


class Nursery:
    """Starts children. Begins anew where its parent process has ended. Safe from several threads."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)
        self._lock = threading.Lock()
        self._parent: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def child(self) -> Child:
        """A new one. Raises Unavailable where none can be had."""
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        with theirs:
            try:
                with self._lock:
                    self._ask(theirs)
            except OSError as error:
                connection.close()
                raise Unavailable(f"no process could be started for an attempt: {error}") from error
        try:
            return Child(connection)  # only now, as its end shows once the other end is closed here
        except (OSError, EOFError, ValueError) as error:
            connection.close()
            raise Unavailable(f"no process could be started for an attempt: {error}") from error

    def _ask(self, connection: socket.socket) -> None:
        for last in (False, True):
            control = self._running()
            try:
                socket.send_fds(control, [b"c"], [connection.fileno()])
            except OSError:
                self._end()
                if last:
                    raise
            else:
                return

    def _running(self) -> socket.socket:
        if self._parent is not None and self._control is not None and self._parent.poll() is None:
            return self._control
        self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "worker.nursery"], stdin=theirs.fileno(), start_new_session=True, env=self._environ
            )
        self._control = ours
        log.info("nursery.started", pid=self._parent.pid)
        return ours

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._parent is not None:
            self._parent.kill()
            self._parent.wait()
            self._parent = None

    def close(self) -> None:
        """End the parent. Children that live go on."""
        with self._lock:
            self._end()


def main() -> int:
    """Fork a child for each connection that comes, until the worker has gone."""
    from worker import attempt, control  # here, as what they import is what is to be there before the fork

    control.warm_up()
    worker = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children leave nothing to be waited for
    while True:
        message, files, _flags, _address = socket.recv_fds(worker, 1, 1)
        if not message:
            return 0
        if not files:
            continue
        if os.fork() == 0:
            worker.close()
            _be(files[0], attempt.serve)
        os.close(files[0])


def _be(connection: int, serve: Callable[[Connection], int]) -> None:
    """The child's whole life."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with Connection(connection) as talk:
            talk.send_bytes(str(os.getpid()).encode())
            status = serve(talk)
    except BaseException:  # as nothing is above this that could say it
        logging.getLogger(__name__).exception("the attempt's process failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
