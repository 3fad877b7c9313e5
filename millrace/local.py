"""The farm that runs on this box, seen from outside: find it, start it in the background, stop it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from millrace.client import Client
from millrace.errors import Conflict, Unavailable
from millrace.locks import is_held
from millrace.settings import Settings

START_S: Final = 60.0
STOP_S: Final = 20.0
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Farm:
    """A farm that runs on this box."""

    api_url: str
    token: str
    pid: int


def running(settings: Settings) -> Farm | None:
    """The farm that runs in the data folder; None where none does."""
    try:
        note = json.loads((settings.home / "farm.json").read_text())
        token = (settings.home / "admin.token").read_text().strip()
    except (FileNotFoundError, ValueError):
        return None
    farm = Farm(api_url=note["api"], token=token, pid=note["pid"])
    if not is_held(settings.home / "up.lock"):
        return None
    client = Client(farm.api_url, farm.token)
    try:
        return farm if client.alive() else None
    finally:
        client.close()


def start_detached(settings: Settings, environ: Mapping[str, str], say: Say) -> Farm:
    """The farm of the data folder, started in the background unless it runs. Raises Unavailable with what its log says."""
    farm = running(settings)
    if farm is not None:
        return farm
    say(f"starting the farm in {settings.home}")
    prepare_home(settings)
    out = settings.home / "logs" / "up.log"
    with open(out, "ab") as log_file:
        began = out.stat().st_size
        process = subprocess.Popen(
            [sys.executable, "-m", "millrace.cli", "up"],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            env={**environ, "MILLRACE_DATA_DIR": str(settings.home)},
            cwd="/",
            start_new_session=True,
        )
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        farm = running(settings)
        if farm is not None:
            return farm
        if process.poll() is not None and not is_held(settings.home / "up.lock"):
            break  # where it is held, another was faster, and its farm is on the way
        time.sleep(0.1)
    with open(out, "rb") as log_file:
        log_file.seek(began)
        said = log_file.read(20_000).decode(errors="replace").strip()
    raise Unavailable(f"the farm did not start:\n{said[-3000:]}", hint="'millrace doctor' says what is missing.")


def stop_detached(settings: Settings) -> bool:
    """Stop the farm of the data folder; False where none runs. Raises Unavailable where it does not stop."""
    lock = settings.home / "up.lock"
    if not is_held(lock):
        return False
    os.kill(int(lock.read_text()), signal.SIGTERM)
    until = time.monotonic() + STOP_S + 10
    while time.monotonic() < until:
        if not is_held(lock):
            return True
        time.sleep(0.1)
    raise Unavailable(f"the farm in {settings.home} does not stop", hint=f"Its log is {settings.home / 'logs' / 'up.log'}.")


def prepare_home(settings: Settings) -> None:
    """The data folder, for its owner only."""
    for folder in (settings.home, settings.home / "logs", settings.home / "redis", settings.home / "objects"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if len(str(settings.home / "redis" / "redis.sock")) > 100:
        raise Conflict(
            f"the data folder's path is too long for a socket: {settings.home}", hint="Set MILLRACE_DATA_DIR to a shorter one."
        )
