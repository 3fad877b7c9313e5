"""One attempt, in a process of its own, forked by `worker.nursery`. It waits for its build, carries it, and ends.

Over its connection come a `ParkOrder` and an `Order`. It answers `parked` or `bare` to the first where that names a mould, and
`reported` to the second when the API took the attempt's report, or the attempt was fenced and has nothing to say any more; for
one that says `unreported`, or nothing, the worker reports.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Final

from buildenv.engine import LABEL_ATTEMPT, LABEL_BUILD, LABEL_PLACE, LABEL_WORKER, LABEL_WORKSPACES, Engine
from buildenv.parking import Parked, park
from buildenv.run import Job, Result, StopSignal, run
from buildenv.workspace import Workspace
from millrace import clock, failpoints
from millrace import log as logging
from millrace.contract import FinishReport, LogFooter, PhaseReport
from millrace.errors import AttemptFenced, MillraceError, Unavailable
from millrace.failpoints import guard
from millrace.locks import held
from millrace.vocabulary import Reason, Verdict
from worker.control import AttemptControl
from worker.engines import make_engine
from worker.heartbeat import Heartbeat
from worker.logship import LogShipper
from worker.order import Order, ParkOrder
from worker.phases import PhaseTeller

log = logging.get_logger(__name__)
_LAST_LOG_S: Final = 60.0
"""How long the end of a log is still tried to be sent before the verdict goes without it."""
EXIT_UNREPORTED: Final = 70
REPORTED: Final = b"reported"
TROUBLED: Final = b"troubled"
"""It reported, and that our side failed."""
UNREPORTED: Final = b"unreported"


class _Sink:
    """Where `buildenv.run` sends what happens: log bytes to the shipper, phases to their teller, moments to the ledger."""

    def __init__(self, phases: PhaseTeller, shipper: LogShipper) -> None:
        self._phases, self._shipper = phases, shipper
        self.marks: dict[str, int] = {}

    def phase(self, report: PhaseReport) -> None:
        self._phases.tell(report)

    def log(self, data: bytes) -> None:
        self._shipper.write(data)

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, clock.now_ms())

    def mark_again(self, name: str) -> None:
        self.marks[name] = clock.now_ms()


def execute(order: Order, here: ParkOrder, parked: Parked | None, engine: Engine, stop: StopSignal, later: ExitStack) -> bytes:
    """Carry the attempt from its claim to its report: REPORTED, TROUBLED, or UNREPORTED where the API was not reached.

    What is left of it when the report is made goes when `later` is closed.
    """
    claim = order.claim
    control = guard(AttemptControl(order.api_url, claim.build_id, claim.attempt_no, claim.token), "verb", Unavailable)
    shipper = LogShipper(lambda chunk, data: control.log(chunk, data, patience_s=10))
    phases = PhaseTeller(control.phases, stop)
    heartbeat = Heartbeat(
        lambda patience_s: control.renew(draining=stop.reason is Reason.WORKER_SHUTDOWN, patience_s=patience_s),
        stop,
        renew_every_s=claim.renew_every_s,
        self_fence_s=claim.self_fence_s,
    )
    sink = _Sink(phases, shipper)
    sink.mark("attempt_started")
    shipper.start()
    phases.start()
    heartbeat.start()
    try:
        result = _result(_job(order, here, parked), engine, sink, control, stop, later)
        if result is None:
            return REPORTED
        footer = shipper.close(_LAST_LOG_S)
        if not _report(control, result, footer, phases.close(_LAST_LOG_S), sink.marks):
            return UNREPORTED
        return TROUBLED if result.verdict in (Verdict.FAULT, Verdict.HANDED_BACK) else REPORTED
    finally:
        heartbeat.end()
        control.close()


def _result(job: Job, engine: Engine, sink: _Sink, control: AttemptControl, stop: StopSignal, later: ExitStack) -> Result | None:
    """What `run` made of the build; None where another attempt holds it now."""
    try:
        return run(job, engine, sink, control, stop, later)
    except AttemptFenced as error:
        log.warning("attempt.fenced", why=error.message)
        return None
    except Exception as error:  # the one broad except: a bug of ours must end the build as ours, with its traceback in our log
        log.exception("attempt.bug")
        sink.log(b"[Container] The farm failed this build by a fault of its own; its operator finds more in the worker's log.\n")
        problem = f"{type(error).__name__}: {error}"
        return Result(verdict=Verdict.FAULT, reason=Reason.BUG, message=f"a fault of the farm's own: {problem[:500]}")


def _report(
    control: AttemptControl, result: Result, footer: LogFooter, phases: tuple[PhaseReport, ...], marks: Mapping[str, int]
) -> bool:
    report = FinishReport(
        verdict=result.verdict,
        reason=result.reason,
        message=result.message[:10_000],
        exit_code=result.exit_code,
        artifacts=result.artifacts,
        caches=result.caches,
        cache_uses=result.cache_uses,
        log=footer,
        resolved_source_version=result.resolved_source_version,
        exported_variables=result.exported_variables,
        marks={**marks, "verdict": clock.now_ms()},
        phases=phases,
    )
    try:
        state = control.finish(report)
    except AttemptFenced as error:
        log.warning("attempt.fenced", why=error.message)
        return True
    except MillraceError as error:
        log.error("attempt.unreported", why=error.message)
        return False
    log.info("attempt.finished", verdict=result.verdict.value, reason=result.reason.value, state=state.value)
    return True


def _job(order: Order, here: ParkOrder, parked: Parked | None) -> Job:
    claim = order.claim
    return Job(
        claim=claim,
        workspace=here.workspaces / here.place,
        labels={
            **labels_of(here),
            LABEL_BUILD: claim.build_id,
            LABEL_ATTEMPT: str(claim.attempt_no),
        },
        mould=order.mould,
        parked=parked,
        git_roots=order.git_roots,
        max_artifact_bytes=order.max_artifact_bytes,
        part_bytes=order.part_bytes,
        mirrors=order.mirrors,
        layers=order.layers,
    )


def labels_of(here: ParkOrder) -> dict[str, str]:
    """What says to whom a container belongs, before it is known for which build it is."""
    return {LABEL_WORKER: here.worker_id, LABEL_WORKSPACES: str(here.workspaces), LABEL_PLACE: here.place}


def lock_of(workspaces: Path, place: str) -> Path:
    """The file that the process at a place holds locked while it lives; the janitor tries this lock."""
    return workspaces / f"{place}.lock"


@contextmanager
def alive(lock: Path) -> Iterator[None]:
    """Hold the place's lock. The file goes with the process."""
    lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with held(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def serve(talk: Connection) -> int:
    """The process's body: wait at a place, with a container ready if one is asked for, and carry the build that comes."""
    os.umask(0o022)  # what a build reads as another user than root must be readable, whatever started the worker
    here = ParkOrder.model_validate_json(talk.recv_bytes())
    logging.configure(here.log_format, here.log_level, service="attempt")
    failpoints.arm(here.failpoint, here.home)
    stop = StopSignal()

    def leave(_number: int, _frame: FrameType | None) -> None:
        stop.set(Reason.WORKER_SHUTDOWN)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = make_engine(here.engine, here.docker_host, os.environ)
    with logging.bound(worker_id=here.worker_id), alive(lock_of(here.workspaces, here.place)):
        parked = _park(here, engine)
        if here.mould is not None:
            talk.send_bytes(b"parked" if parked else b"bare")
        try:
            order = Order.model_validate_json(talk.recv_bytes())
        except (EOFError, OSError):  # dismissed, or the worker has gone
            _leave_place(here, parked, engine)
            return 0
        return _carry(order, here, parked, engine, stop, talk)


def _park(here: ParkOrder, engine: Engine) -> Parked | None:
    """The container that waits; None where none is asked for, or none can be had: then a build will find out why."""
    if here.mould is None:
        return None
    try:
        return park(engine, here.mould, here.workspaces / here.place, name=f"millrace-{here.place}", labels=labels_of(here))
    except MillraceError as error:
        log.warning("parking.failed", image=here.mould.image, why=error.message)
        return None


def _leave_place(here: ParkOrder, parked: Parked | None, engine: Engine) -> None:
    if parked is None:
        return
    try:
        parked.drop(engine)
        Workspace(here.workspaces / here.place).remove(engine, parked.mould.image)
    except (MillraceError, OSError) as error:
        log.warning("cleanup.failed", what="parked container", why=str(error))  # the janitor comes back for it


def _carry(order: Order, here: ParkOrder, parked: Parked | None, engine: Engine, stop: StopSignal, talk: Connection) -> int:
    claim = order.claim
    if claim.now_ms is not None:
        clock.go_by(claim.now_ms, order.claimed_at_s)
    with logging.bound(build_id=claim.build_id, attempt_no=claim.attempt_no, project=claim.settings.project_name):
        log.info("attempt.started", pid=os.getpid(), parked=parked is not None)
        with ExitStack() as later:
            reported = execute(order, here, parked, engine, stop, later)
            with suppress(OSError):  # the worker has gone; the API knows all the same
                talk.send_bytes(reported)
    return EXIT_UNREPORTED if reported == UNREPORTED else 0
