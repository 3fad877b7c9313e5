"""One attempt, in a process of its own: `python -m worker.attempt`, with an `Order` on stdin.

Exit status 0: the API took the attempt's report, or the attempt was fenced and has nothing to say any more. Otherwise the
worker that started this process reports for it.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from buildenv.engine import LABEL_ATTEMPT, LABEL_BUILD, LABEL_WORKER, LABEL_WORKSPACES, Engine
from buildenv.run import Job, Result, StopSignal, run
from millrace import log as logging
from millrace.contract import FinishReport, LogFooter, PhaseReport
from millrace.errors import AttemptFenced, InfraProblem, MillraceError
from millrace.ids import uuid_of
from millrace.locks import held
from millrace.vocabulary import COMPUTE_TYPES, Reason, Verdict
from worker.control import AttemptControl
from worker.engines import make_engine
from worker.heartbeat import Heartbeat
from worker.logship import LogShipper
from worker.order import Order

log = logging.get_logger(__name__)
_LAST_LOG_S: Final = 60.0
"""How long the end of a log is still tried to be sent before the verdict goes without it."""
EXIT_UNREPORTED: Final = 70


class _Sink:
    """Where `buildenv.run` sends what happens: log bytes to the shipper, phases and marks as they come."""

    def __init__(self, control: AttemptControl, shipper: LogShipper) -> None:
        self._control, self._shipper = control, shipper
        self.marks: dict[str, int] = {}

    def phase(self, report: PhaseReport) -> None:
        self._control.phase(report)

    def log(self, data: bytes) -> None:
        self._shipper.write(data)

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, int(time.time() * 1000))

    def mark_again(self, name: str) -> None:
        self.marks[name] = int(time.time() * 1000)


def execute(order: Order, engine: Engine, stop: StopSignal) -> bool:
    """Carry the attempt from its claim to its report. False where the report did not reach the API."""
    claim = order.claim
    control = AttemptControl(
        order.api_url, claim.build_id, claim.attempt_no, claim.token, stop=stop.event, deadline_in_s=claim.deadline_in_s
    )
    shipper = LogShipper(lambda seq, offset, data: control.log(seq, offset, data, patience_s=10))
    heartbeat = Heartbeat(
        lambda patience_s: control.renew(draining=stop.reason is Reason.WORKER_SHUTDOWN, patience_s=patience_s),
        stop,
        renew_every_s=claim.renew_every_s,
        self_fence_s=claim.self_fence_s,
    )
    sink = _Sink(control, shipper)
    sink.mark("attempt_started")
    shipper.start()
    heartbeat.start()
    try:
        result = _result(order, engine, sink, control, stop)
        if result is None:
            return True
        footer = shipper.close(_LAST_LOG_S)
        return _report(control, result, footer, sink.marks)
    finally:
        heartbeat.end()
        control.close()


def _result(order: Order, engine: Engine, sink: _Sink, control: AttemptControl, stop: StopSignal) -> Result | None:
    """What `run` made of the build; None where another attempt holds it now."""
    try:
        return run(_job(order, engine), engine, sink, control, stop)
    except AttemptFenced as error:
        log.warning("attempt.fenced", why=error.message)
        return None
    except InfraProblem as lost:  # before `run` could begin
        return Result(verdict=Verdict.FAULT, reason=lost.reason, message=lost.message)
    except Exception as error:  # the one broad except: a bug of ours must end the build as ours, with its traceback in our log
        log.exception("attempt.bug")
        sink.log(b"[Container] The farm failed this build by a fault of its own; its operator finds more in the worker's log.\n")
        problem = f"{type(error).__name__}: {error}"
        return Result(verdict=Verdict.FAULT, reason=Reason.BUG, message=f"a fault of the farm's own: {problem[:500]}")


def _report(control: AttemptControl, result: Result, footer: LogFooter, marks: Mapping[str, int]) -> bool:
    report = FinishReport(
        verdict=result.verdict,
        reason=result.reason,
        message=result.message[:10_000],
        exit_code=result.exit_code,
        artifacts=result.artifacts,
        caches=result.caches,
        log=footer,
        resolved_source_version=result.resolved_source_version,
        exported_variables=result.exported_variables,
        marks={**marks, "verdict": int(time.time() * 1000)},
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


def _job(order: Order, engine: Engine) -> Job:
    claim = order.claim
    host = engine.info()
    cpus, memory = COMPUTE_TYPES[claim.settings.environment.compute_type]
    return Job(
        claim=claim,
        workspace=workspace_of(order.workspaces, claim.build_id, claim.attempt_no),
        labels={
            LABEL_BUILD: claim.build_id,
            LABEL_ATTEMPT: str(claim.attempt_no),
            LABEL_WORKER: order.worker_id,
            LABEL_WORKSPACES: str(order.workspaces),
        },
        cpus=min(cpus, host.cpus),
        memory_bytes=min(order.memory_bytes or memory, host.memory_bytes),
        pids=order.pids_limit,
        network=order.network,
        ca_bundle=order.ca_bundle,
        git_roots=order.git_roots,
        max_artifact_bytes=order.max_artifact_bytes,
    )


def workspace_of(workspaces: Path, build_id: str, attempt_no: int) -> Path:
    """The folder of one attempt."""
    return workspaces / f"{uuid_of(build_id)}-{attempt_no}"


def lock_of(workspaces: Path, build_id: str, attempt_no: int) -> Path:
    """The file that the attempt's process holds locked while it lives; the janitor tries this lock."""
    return workspaces / f"{uuid_of(build_id)}-{attempt_no}.lock"


@contextmanager
def alive(lock: Path) -> Iterator[None]:
    """Hold the attempt's lock. The file goes with the attempt."""
    lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with held(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def main(environ: Mapping[str, str]) -> int:
    """The process's body."""
    os.umask(0o022)  # what a build reads as another user than root must be readable, whatever started the worker
    order = Order.model_validate_json(sys.stdin.buffer.read())
    claim = order.claim
    logging.configure(order.log_format, order.log_level, service="attempt")
    stop = StopSignal()

    def leave(_number: int, _frame: FrameType | None) -> None:
        stop.set(Reason.WORKER_SHUTDOWN)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with (
        logging.bound(
            build_id=claim.build_id,
            attempt_no=claim.attempt_no,
            project=claim.settings.project_name,
            worker_id=order.worker_id,
        ),
        alive(lock_of(order.workspaces, claim.build_id, claim.attempt_no)),
    ):
        log.info("attempt.started", pid=os.getpid())
        engine = make_engine(order.engine, order.docker_host, environ)
        reported = execute(order, engine, stop)
    return 0 if reported else EXIT_UNREPORTED


if __name__ == "__main__":
    sys.exit(main(dict(os.environ)))
