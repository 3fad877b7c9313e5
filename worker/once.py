"""The worker that carries one build and ends: its fleet starts one for each build that waits.

It has no bell, no slots and no processes of attempts; with the engine `own` it is also the build's sandbox, and then keeps what
it knows from the build: the variables that it was started with are wiped, and its memory cannot be read.
"""

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from buildenv import images
from buildenv.engine import Engine
from buildenv.own.engine import NOT_FOR_BUILDS, OwnEngine
from buildenv.run import StopSignal
from millrace import __version__, clock
from millrace import log as logging
from millrace.contract import Claim, ClaimRequest
from millrace.errors import InvalidInput, MillraceError, Unavailable
from millrace.failpoints import guard
from millrace.ids import is_build_id, new_secret, new_worker_id
from millrace.settings import Settings, for_children
from millrace.vocabulary import Reason
from worker import ecs, secrecy
from worker.attempt import EXIT_UNREPORTED, UNREPORTED, alive, execute, lock_of
from worker.control import Control
from worker.engines import guarded, make_engine
from worker.headroom import lack_of_room
from worker.leaving import Leaving
from worker.order import ParkOrder, make_order, make_park_order, mould_of

log = logging.get_logger(__name__)
EXIT_NOTHING: Final = 75
"""There was nothing to claim."""
_WORKSPACE: Final = Path("/codebuild")
"""The workspace of a build in the worker's own container: where the build is to see it, so that nothing needs to be mounted."""
_POLL_S: Final = 2.0
_LOOK_S: Final = 0.2
_MOST_DRAIN_S: Final = 60.0
"""Who is told to leave has two minutes on Fargate, and after this needs up to forty seconds to hand its build back."""


def _see_to_leaving(leaving: Leaving, stop: StopSignal, drain_s: float) -> None:
    """Have the build that runs end in time once this worker is asked to leave; the second time it is told to, at once."""
    heard: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        leaving.ask(f"{signal.Signals(number).name} came", 0 if heard else min(drain_s, _MOST_DRAIN_S))
        heard.append(number)

    def watch() -> None:
        leaving.begun.wait()
        while leaving.left_s > 0:
            time.sleep(min(leaving.left_s, _LOOK_S))
        log.info("worker.leaving", why=leaving.why)
        stop.set(Reason.WORKER_SHUTDOWN)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    threading.Thread(target=watch, name="leaving", daemon=True).start()


def main(settings: Settings, environ: Mapping[str, str], *, build: str | None, within_s: float) -> int:
    """Claim one build, `build` where one is named, and carry it.

    The exit status: 0 whatever the verdict, 75 where nothing could be claimed within `within_s`, 70 where the verdict could not
    be told. Raises InvalidInput, Unavailable.
    """
    only = build or settings.build
    if settings.worker_token is None or not settings.worker_token.get_secret_value():
        raise InvalidInput("a worker needs MILLRACE_WORKER_TOKEN", hint="'millrace token create --scope worker NAME' makes one.")
    if only is not None and not is_build_id(only):
        raise InvalidInput(
            f"{only[:200]!r} is no id of a build", hint="It looks like project:uuid; 'millrace builds' lists them."
        )
    if settings.engine == "own" and os.geteuid() != 0:
        raise InvalidInput(
            "the engine 'own' runs builds as root, and this worker is not root", hint="Start its container as root."
        )
    task = ecs.read(environ)
    worker_id = settings.worker_id or (task.id if task else None) or new_worker_id(settings.host)
    if settings.engine == "own":
        secrecy.keep(name for name in environ if name.startswith(NOT_FOR_BUILDS))
    engine = _engine(settings, environ, task)
    stop = StopSignal()
    leaving = Leaving()
    _see_to_leaving(leaving, stop, settings.drain_s)
    control = guard(Control(settings.api, settings.worker_token.get_secret_value()), "verb", Unavailable)
    ask = _Ask(settings, worker_id, control, only)
    log.info("worker.started", worker_id=worker_id, fleet=settings.fleet, engine=settings.engine, only=only or "")
    try:
        claim = ask.for_build(engine, leaving, within_s)
        if claim is None:
            log.warning("worker.nothing_to_do", only=only or "", within_s=within_s)
            return EXIT_NOTHING
        return _carry(claim, settings, worker_id, engine, stop)
    finally:
        ask.leave()
        control.close()
        log.info("worker.stopped", worker_id=worker_id)


def _engine(settings: Settings, environ: Mapping[str, str], task: ecs.Task | None) -> Engine:
    if settings.engine != "own":
        return make_engine(settings.engine, settings.docker_host, for_children(environ))
    return guarded(
        OwnEngine(
            environ,
            image=images.resolve_alias(settings.own_image) if settings.own_image else None,
            digest=task.image_digest if task else None,
            alone=os.getpid() == 1,
        )
    )


class _Ask:
    """Asks for the one build."""

    def __init__(self, settings: Settings, worker_id: str, control: Control, only: str | None) -> None:
        self._settings, self._worker_id, self._control, self._only = settings, worker_id, control, only
        self._token = new_secret("att")

    def for_build(self, engine: Engine, leaving: Leaving, within_s: float) -> Claim | None:
        """The claim; None where nothing may be claimed for so long, or who asks is to leave. Raises Unavailable, InfraProblem."""
        host = engine.info()
        folders = [folder for folder in (self._settings.workspaces, host.folder, Path("/")) if folder is not None]
        lack = lack_of_room(
            folders,
            min_free_bytes=self._settings.min_free_bytes,
            min_free_inodes_percent=self._settings.min_free_inodes_percent,
        )
        if lack:
            raise Unavailable(lack, hint="Give the worker a larger disk.")
        until = time.monotonic() + within_s
        while not leaving.begun.is_set():
            away: Unavailable | None = None
            try:
                claim = self._control.claim(self._request())
            except Unavailable as error:
                away = error
            else:
                if claim is not None:
                    return claim
                if self._control.leave:
                    leaving.ask(self._control.leave)
            if time.monotonic() > until:
                if away is not None:
                    raise away
                return None
            leaving.begun.wait(_POLL_S)
        return None

    def leave(self) -> None:
        """Say goodbye, so that nobody waits for this worker."""
        try:
            self._control.claim(self._request().model_copy(update={"state": "gone", "free_slots": 0, "token": None}))
        except MillraceError as error:
            log.debug("worker.not_heard", state="gone", why=error.message)  # it stops counting as there, by and by

    def _request(self) -> ClaimRequest:
        return ClaimRequest(
            worker_id=self._worker_id,
            fleet=self._settings.fleet,
            slots=1,
            free_slots=1,
            version=__version__,
            token=self._token,  # the same each time: what an answer that was lost told of comes again
            only=self._only,
            generation=self._settings.generation,
            cpus=self._settings.cpus,
            memory_bytes=self._settings.memory_offered_bytes,
            labels=self._settings.labels,
        )


def _carry(claim: Claim, settings: Settings, worker_id: str, engine: Engine, stop: StopSignal) -> int:
    claimed_at_s = time.monotonic()
    if claim.now_ms is not None:
        clock.go_by(claim.now_ms, claimed_at_s)
    with (
        logging.bound(build_id=claim.build_id, attempt_no=claim.attempt_no, project=claim.settings.project_name),
        _place(settings, worker_id) as here,
        ExitStack() as later,
    ):
        log.info("attempt.started", pid=os.getpid())
        mould = mould_of(claim, engine.info(), settings)
        order = make_order(claim, claimed_at_s, mould, settings).model_copy(update={"mirrors": None, "layers": None})
        reported = execute(order, here, None, engine, stop, later)
    return EXIT_UNREPORTED if reported == UNREPORTED else 0


@contextmanager
def _place(settings: Settings, worker_id: str) -> Iterator[ParkOrder]:
    """Where the build's workspace is to be."""
    if settings.engine == "own":
        at = make_park_order(_WORKSPACE.name, None, worker_id, settings)
        yield at.model_copy(update={"workspaces": _WORKSPACE.parent})
        return
    here = make_park_order(f"place-{secrets.token_hex(8)}", None, worker_id, settings)
    with alive(lock_of(here.workspaces, here.place)):
        yield here
