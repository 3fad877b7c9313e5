"""The farm on one box: `millrace up` makes its folder, starts its parts, watches over them, and stops them together.

No part outlives the supervisor: the kernel ends them with it (`PR_SET_PDEATHSIG`), also where it is killed.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

from millrace.client import Client
from millrace.errors import Conflict, NotFound, Unavailable
from millrace.ids import new_secret
from millrace.keeper import Keeper
from millrace.local import START_S, STOP_S, Say, prepare_home
from millrace.locks import held
from millrace.log import get_logger
from millrace.parts import Part
from millrace.settings import Settings
from millrace.vocabulary import TokenScope
from scheduler import tokens
from scheduler.db import Database

log = get_logger(__name__)
_ME: Final = (sys.executable, "-m", "millrace.cli")
_NOT_THE_WORKERS: Final = ("MILLRACE_SIGNING_KEY", "MILLRACE_SECRETS_", "MILLRACE_VAULT_")


def up(settings: Settings, environ: Mapping[str, str], say: Say) -> int:
    """Be the farm's supervisor until SIGTERM or SIGINT. Raises Conflict where one runs already in this folder."""
    prepare_home(settings)
    if shutil.which("redis-server") is None:
        raise NotFound("redis-server is not installed", hint="'millrace doctor --install' installs it.")
    with _only_one(settings.home / "up.lock"):
        address = _free_address(settings.bind)
        secret = _secrets(settings)
        farm_settings = settings.model_copy(update={"bind": address})
        _prepare_records(farm_settings, secret)
        parts = _parts(farm_settings, secret, environ)
        keeper = Keeper(settings.home, [*_ME, "worker"], _worker_environment(farm_settings, secret, environ))
        return _Supervisor(farm_settings, parts, keeper, say).run(secret["admin_token"])


def _secrets(settings: Settings) -> dict[str, str]:
    """The farm's secrets, made at its first start."""
    path = settings.home / "secrets.json"
    if path.exists():
        known: dict[str, str] = json.loads(path.read_text())
        return known
    made = {"signing_key": secrets.token_hex(32), "worker_token": new_secret("wrk"), "admin_token": new_secret("pat")}
    _write_private(path, json.dumps(made))
    return made


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    temporary.replace(path)


def _prepare_records(settings: Settings, secret: Mapping[str, str]) -> None:
    database = Database(settings.database)
    database.migrate()
    tokens.create(database, "embedded worker", TokenScope.WORKER, secret=secret["worker_token"])
    tokens.create(database, "admin", TokenScope.ADMIN, secret=secret["admin_token"])
    database.dispose()
    _write_private(settings.home / "admin.token", secret["admin_token"] + "\n")


def _free_address(bind: str) -> str:
    """`bind` with a port; raises Conflict where it is taken."""
    host, _, port = bind.rpartition(":")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except (OSError, ValueError, OverflowError) as error:
            raise Conflict(
                f"cannot listen on {bind}: {error}", hint="Set MILLRACE_BIND to another address; port 0 picks a free one."
            ) from error
        return f"{host}:{probe.getsockname()[1]}"


def _shared(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    shared = {
        **environ,
        "MILLRACE_DATA_DIR": str(settings.home),
        "MILLRACE_BIND": settings.bind,
        "MILLRACE_API_URL": f"http://{settings.bind}",
    }
    shared.setdefault("MILLRACE_LOG_FORMAT", "json")
    return shared


def _worker_environment(settings: Settings, secret: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    shared = _shared(settings, environ)
    worker = {name: value for name, value in shared.items() if not name.startswith(_NOT_THE_WORKERS)}
    worker["MILLRACE_WORKER_TOKEN"] = secret["worker_token"]
    worker.setdefault("MILLRACE_DRAIN_S", "2")
    return worker


def _parts(settings: Settings, secret: Mapping[str, str], environ: Mapping[str, str]) -> list[Part]:
    home = settings.home
    shared = _shared(settings, environ)
    worker = _worker_environment(settings, secret, environ)
    # They start workers elsewhere, too, and give them their token.
    trusted = {**shared, "MILLRACE_SIGNING_KEY": secret["signing_key"], "MILLRACE_WORKER_TOKEN": secret["worker_token"]}
    redis = ["redis-server", "--port", "0", "--unixsocket", str(home / "redis" / "redis.sock"), "--unixsocketperm", "700"]
    redis += [
        "--dir",
        str(home / "redis"),
        "--appendonly",
        "yes",
        "--save",
        "",
        "--maxmemory-policy",
        "noeviction",
        "--daemonize",
        "no",
    ]
    parts = [
        Part(name="api", command=[*_ME, "api"], environment=trusted),
        Part(name="scheduler", command=[*_ME, "scheduler"], environment=trusted),
        *_workers(settings.workers, [*_ME, "worker"], worker),
    ]
    if settings.broker_url is None:
        parts.insert(0, Part(name="redis", command=redis, environment={"PATH": environ.get("PATH", os.defpath)}))
    return parts


def _workers(count: int, command: list[str], environment: Mapping[str, str]) -> list[Part]:
    """Those that are always there. A name that is set is the first one's; the others' names are made from it."""
    parts = []
    for number in range(1, count + 1):
        own = dict(environment)
        if number > 1 and own.get("MILLRACE_WORKER_ID"):
            own["MILLRACE_WORKER_ID"] += f"-{number}"
        name = "worker" if number == 1 else f"worker-{number}"
        parts.append(Part(name=name, command=command, environment=own, log_name="worker"))
    return parts


class _Supervisor:
    """Starts the parts, starts again what ends, and stops all of them; and so with what fleets order of this box."""

    def __init__(self, settings: Settings, parts: list[Part], keeper: Keeper, say: Say) -> None:
        self._settings, self._parts, self._keeper, self._say = settings, parts, keeper, say
        self._logs = settings.home / "logs"
        self._leaving = False

    def run(self, token: str) -> int:
        """Until a signal comes."""
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGINT, self._leave)
        note = self._settings.home / "farm.json"
        address = f"http://{self._settings.bind}"
        try:
            for part in self._parts:
                part.start(self._logs)
            client = Client(address, token)
            self._await_api(client)
            client.close()
            _write_private(note, json.dumps({"api": address, "pid": os.getpid()}))
            if not self._leaving:
                self._say(f"The farm is up at {address}; its data lies in {self._settings.home}")
                self._say(f"Its admin token is in {self._settings.home / 'admin.token'}")
                self._say("Try: millrace run DIR       Stop: Ctrl-C, or millrace down")
            while not self._leaving:
                self._watch()
                self._keeper.tend()
                time.sleep(0.2)
        finally:
            note.unlink(missing_ok=True)
            self._stop_all()
        self._say("The farm has stopped")
        return 0

    def _leave(self, _number: int, _frame: FrameType | None) -> None:
        self._leaving = True

    def _watch(self) -> None:
        for part in self._parts:
            status = part.ended()
            if status is not None:
                log.error("part.ended", part=part.name, status=status, failures=part.failures)
                self._say(f"{part.name} ended with status {status}; starting it again (see logs/{part.log_file})")
            if part.may_start() and not self._leaving:
                part.start(self._logs)

    def _await_api(self, client: Client) -> None:
        until = time.monotonic() + START_S
        while not self._leaving:
            if client.alive():
                return
            for part in self._parts:
                if part.process is not None and part.process.poll() is not None:
                    said = (self._logs / part.log_file).read_text(errors="replace")[-2000:]
                    raise Unavailable(f"{part.name} ended at its start:\n{said}", hint="'millrace doctor' says what is missing.")
            if time.monotonic() > until:
                raise Unavailable("the API did not come up in a minute", hint=f"See {self._settings.home / 'logs' / 'api.log'}.")
            time.sleep(0.05)

    def _stop_all(self) -> None:
        """The workers first, so that they can still hand their builds back; then the rest, Redis last."""
        static = [part for part in self._parts if part.log_name == "worker"]
        workers = [*self._keeper.parts, *static]
        for part in workers:
            part.terminate()
        for part in workers:
            part.await_end(STOP_S)
        for part in reversed(self._parts):
            if part not in static:
                part.terminate()
                part.await_end(STOP_S)


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(held(lock))
        except BlockingIOError as error:
            raise Conflict(
                f"a farm runs already in {lock.parent} (process {lock.read_text()})",
                hint="'millrace down' stops it; MILLRACE_DATA_DIR names another folder.",
            ) from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
