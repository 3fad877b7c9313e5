"""The API on gunicorn: threads, since a followed log holds one; streams end when the server stops."""

import ctypes
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from gunicorn.workers.gthread import TConn, ThreadWorker

from api.app import create_app
from api.context import Context
from millrace.log import get_logger
from millrace.settings import Settings
from millrace.storage import open_store
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.secrets import open_provider

log = get_logger(__name__)
_PR_SET_PDEATHSIG: Final = 1
_STALLED_S: Final = 60
"""How long a thread waits for a client that neither sends nor takes a byte in the middle of a request."""


def make_app(settings: Settings) -> Flask:
    """The API with parts of its own, made in the process that serves it. It acts on the deliveries that one before it left."""
    app = create_app(settings, Database(settings.database), open_store(settings), Bell(settings.broker))
    app.extensions["millrace"].drain.wake()
    return app


def serve(settings: Settings, *, ready_file: Path | None = None) -> int:
    """Serve until SIGTERM or SIGINT. `ready_file` is given the address, also where `bind` left the port open."""
    database = Database(settings.database)
    database.require_schema()
    open_provider(settings, database)
    database.dispose()
    open_store(settings)
    _Server(settings, ready_file).run()
    return 0


class _Threads(ThreadWorker):
    """Gunicorn's threads; those who follow a log are let go when the server is told to stop, and the stalled in any case."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._end_streams()
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        self._end_streams()
        super().handle_quit(sig, frame)

    def _end_streams(self) -> None:
        context = _context(self)
        if context is not None:
            context.closing.set()

    def enqueue_req(self, conn: TConn) -> None:
        limit = struct.pack("ll", _STALLED_S, 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            conn.sock.setsockopt(socket.SOL_SOCKET, option, limit)
        super().enqueue_req(conn)


class _Server(BaseApplication):
    def __init__(self, settings: Settings, ready_file: Path | None) -> None:
        self._settings, self._ready_file = settings, ready_file
        super().__init__()

    def load_config(self) -> None:
        options: dict[str, Any] = {
            "bind": self._settings.bind,
            "workers": self._settings.api_workers,
            "threads": self._settings.api_threads,
            "worker_class": _Threads,
            "graceful_timeout": 5,
            "timeout": 120,
            "keepalive": 75,  # longer than a balancer keeps an idle connection (60 s), which else calls into one that closes
            "preload_app": False,
            "worker_tmp_dir": "/dev/shm" if Path("/dev/shm").is_dir() else None,  # noqa: S108  # gunicorn's own advice for its heartbeat
            "errorlog": "-",
            "loglevel": "warning",
            "when_ready": self._when_ready,
            "post_fork": _die_with_master,
            "worker_exit": _close,
        }
        for name, value in options.items():
            if value is not None:
                self.cfg.set(name, value)

    def load(self) -> Flask:  # type: ignore[override]  # a Flask application is the callable that is asked for
        return make_app(self._settings)

    def _when_ready(self, server: Arbiter) -> None:
        host, port = server.LISTENERS[0].sock.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("api.ready", address=address)
        if self._ready_file is not None:
            written = self._ready_file.with_name(f".{self._ready_file.name}.{os.getpid()}")
            written.write_text(address)
            written.replace(self._ready_file)  # whoever waits for the file finds all of it


def _die_with_master(server: Arbiter, _worker: Worker) -> None:
    """A server process whose master was killed would hold the port, and keep the next server from starting; end it at once."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server.pid:  # the master died before that held
            os._exit(1)


def _context(worker: Worker) -> Context | None:
    app = getattr(worker, "wsgi", None)
    return app.extensions["millrace"] if isinstance(app, Flask) else None


def _close(_server: Arbiter, worker: Worker) -> None:
    context = _context(worker)
    if context is not None:
        context.closing.set()
        context.drain.join()
        context.ringer.join()
        context.db.dispose()
