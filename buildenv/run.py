"""One attempt at a build, from its claim to its result: the phases in CodeBuild's order, and what follows from each failure.

Events go out through a `Sink`, bytes through a `Depot`, the wish to end comes in by a `StopSignal`. Nothing else passes
sideways; `run` knows no database, no queue and no API.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from buildenv import daemonstore, parking, uploads, variables
from buildenv.artifacts import Outside
from buildenv.buildlog import BuildLog
from buildenv.buildspec import Buildspec, Command, OnFailure, PhaseSpec
from buildenv.caching import BuildCache
from buildenv.depot import Depot
from buildenv.engine import Console, Engine, Image, Mount
from buildenv.layers import Layers, stream
from buildenv.parking import Mould, Parked
from buildenv.preparation import Preparation
from buildenv.shell import FULL, Shell
from buildenv.workspace import Workspace
from millrace import clock
from millrace.contract import (
    ArtifactReport,
    CacheReport,
    CacheUse,
    Claim,
    ExportedVariable,
    PhaseContext,
    PhaseReport,
)
from millrace.errors import BadBuildspec, BuildProblem, BuildStopped, InfraProblem, Unavailable
from millrace.ids import container_name
from millrace.log import get_logger
from millrace.vocabulary import (
    COMMAND_PHASES,
    PhaseType,
    Reason,
    StatusType,
    Verdict,
)

log = get_logger(__name__)
_GRACE_S: Final = 10.0
_ENDS_THE_BUILD: Final = frozenset({PhaseType.INSTALL, PhaseType.PRE_BUILD})
"""Phases whose failure leaves nothing to go on with (CodeBuild: build phase transitions)."""
_STATUS_MEANS: Final = {
    126: "the command is there, but cannot be executed",
    127: "a command was not found",
    134: "SIGABRT ended it",
    137: "SIGKILL ended it; if that was for want of memory, nothing proves it",
    139: "SIGSEGV ended it",
    143: "SIGTERM ended it",
}


class StopSignal:
    """The wish that the attempt ends, with its reason. The first reason counts."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.reason: Reason | None = None

    def set(self, reason: Reason) -> None:
        """Ask for the end."""
        if self.reason is None:
            self.reason = reason
        self.event.set()


class Sink(Protocol):
    """Where an attempt tells what happens. `phase` may raise AttemptFenced, which ends the attempt."""

    def phase(self, report: PhaseReport) -> None:
        """A phase began or ended."""

    def log(self, data: bytes) -> None:
        """More of the build's log; may block."""

    def mark(self, name: str) -> None:
        """A moment of the ledger is now; the first time counts."""

    def mark_again(self, name: str) -> None:
        """A moment of the ledger is now; the last time counts."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that one attempt needs to know. `workspace` is a folder of its own on the host, which is made and removed.

    `parked` is a container that waits in that workspace; one that does not fit is dropped, and another made. `mirrors` is the
    host's folder of mirrors of git repositories, if it keeps any.
    """

    claim: Claim
    workspace: Path
    labels: Mapping[str, str]
    mould: Mould
    parked: Parked | None = None
    git_roots: tuple[Path, ...]
    max_artifact_bytes: int
    part_bytes: int
    """Artifacts and caches that are larger are sent in parts of at least so many bytes."""
    mirrors: Path | None = None
    layers: Path | None = None
    """Where the worker keeps layers of caches; None where caches are copied."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the attempt ended."""

    verdict: Verdict
    reason: Reason
    message: str = ""
    exit_code: int | None = None
    artifacts: tuple[ArtifactReport, ...] = ()
    caches: tuple[CacheReport, ...] = ()
    cache_uses: tuple[CacheUse, ...] = ()
    resolved_source_version: str | None = None
    exported_variables: tuple[ExportedVariable, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """A command that failed, and so its phase."""

    message: str
    exit_code: int
    reason: Reason = Reason.EXIT_CODE


class _Retry(Exception):
    """A phase failed, and the build is to begin anew in a fresh container (CodeBuild: on-failure RETRY)."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(kw_only=True)
class _Progress:
    """What is known so far of an attempt's outcome."""

    failure: _Failure | None = None
    exit_code: int | None = None
    resolved_version: str | None = None
    exported: tuple[ExportedVariable, ...] = ()
    artifacts: list[ArtifactReport] = field(default_factory=list)
    caches: list[CacheReport] = field(default_factory=list)


def run(job: Job, engine: Engine, sink: Sink, depot: Depot, stop: StopSignal, later: ExitStack) -> Result:
    """Carry one attempt. Raises AttemptFenced only; all else that a build, the engine or the store can do is in the result.

    When it returns, the container and the workspace are gone; where the build went through all its phases, they go when `later`
    is closed, so that nobody waits for that to hear the verdict.
    """
    attempt = _Attempt(job, engine, sink, depot, stop)
    with ExitStack() as now:
        now.callback(attempt.clean_up)
        result = _carried(attempt)
        attempt.end_log()
        if result.verdict in (Verdict.SUCCEEDED, Verdict.FAILED):
            later.push(now.pop_all())
    return result


def _carried(attempt: "_Attempt") -> Result:
    try:
        attempt.carry()
        return attempt.verdict()
    except _Retry as retry:
        return attempt.retried(retry.failure)
    except BuildProblem as problem:
        attempt.finalize()
        return attempt.result(Verdict.FAILED, problem.reason, problem.message)
    except BuildStopped as stopped:
        return attempt.stopped(stopped)
    except InfraProblem as problem:
        return attempt.result(Verdict.FAULT, problem.reason, problem.message)
    except Unavailable as problem:
        return attempt.result(Verdict.HANDED_BACK, Reason.WORKER_LOST, problem.message)


class _Attempt:
    """The state of one attempt; its methods are the phases, in order."""

    def __init__(self, job: Job, engine: Engine, sink: Sink, depot: Depot, stop: StopSignal) -> None:
        self._job, self._engine, self._sink, self._depot, self._stop = job, engine, sink, depot, stop
        self._claim = job.claim
        self._settings = job.claim.settings
        self._deadline = time.monotonic() + job.claim.deadline_in_s
        self._log = BuildLog(sink.log, lambda: sink.mark("first_output"))
        self._workspace = Workspace(
            job.workspace,
            variables.source_folder(job.claim.build_id, self._settings.source),
            {
                one.source_identifier or "": variables.source_folder(job.claim.build_id, one, number)
                for number, one in enumerate(self._settings.secondary_sources, 1)
            },
        )
        self._progress = _Progress()
        self._container: str | None = None
        self._console: Console | None = None
        self._image: Image | None = None
        self._variables: Mapping[str, str] = {}
        self._secret_names: frozenset[str] = frozenset()
        self._cache: BuildCache | None = None
        self._daemon: daemonstore.DaemonStore | None = None
        self._last_phase: PhaseType | None = None
        self._commands_ran = False
        self._oom_said = False
        self._frozen = False
        self._asides: list[threading.Thread] = []
        self._fits: Future[bool] = Future()
        self._begun: Future[None] | None = None

    def carry(self) -> None:
        """All phases. Raises what ends the attempt early; failed commands are noted in the progress."""
        with self._phase(PhaseType.PROVISIONING):
            image = self._provision()
        with self._phase(PhaseType.DOWNLOAD_SOURCE):
            spec = self._download(image)
            shell = self._start(spec)
            self._restore_cache(spec, shell)
        upload = self._run_commands(spec, shell)
        self._export(spec, shell)
        if upload:
            self._upload(spec, shell)
        with self._phase(PhaseType.FINALIZING):
            self._save_cache()

    def finalize(self) -> None:
        """FINALIZING after a source or an upload that failed (CodeBuild: build phase transitions)."""
        if self._last_phase in (PhaseType.DOWNLOAD_SOURCE, PhaseType.UPLOAD_ARTIFACTS):
            with self._phase(PhaseType.FINALIZING):
                pass

    def verdict(self) -> Result:
        """The result of an attempt that went through all its phases."""
        failure = self._progress.failure
        if failure is not None:
            return self.result(Verdict.FAILED, failure.reason, failure.message)
        return self.result(Verdict.SUCCEEDED, Reason.SUCCEEDED, "")

    def result(self, verdict: Verdict, reason: Reason, message: str) -> Result:
        """A result with what is known so far. A command that failed before stays the reason, whatever failed after it."""
        failure = self._progress.failure
        if failure is not None and verdict in (Verdict.FAILED, Verdict.FAULT) and reason is not Reason.ENGINE_LOST:
            verdict, reason, message = Verdict.FAILED, failure.reason, failure.message
        return Result(
            verdict=verdict,
            reason=reason,
            message=self._log.hidden(message),
            exit_code=self._progress.exit_code,
            artifacts=tuple(self._progress.artifacts) if verdict in (Verdict.SUCCEEDED, Verdict.FAILED) else (),
            caches=tuple(self._progress.caches) if verdict is Verdict.SUCCEEDED else (),
            cache_uses=tuple(self._cache.uses) if self._cache is not None else (),
            resolved_source_version=self._progress.resolved_version,
            exported_variables=self._progress.exported,
        )

    def retried(self, failure: _Failure) -> Result:
        """The result of an attempt whose failed phase asks for another."""
        self._progress.failure = None
        return self.result(Verdict.HANDED_BACK, Reason.PHASE_RETRY, failure.message)

    def stopped(self, stopped: BuildStopped) -> Result:
        """The result of an attempt that was told to end."""
        reason = self._why_stopped(stopped)
        if reason is Reason.TIMEOUT:
            return self.result(
                Verdict.TIMED_OUT, reason, f"the build ran longer than {self._settings.timeout_in_minutes} minutes"
            )
        if reason is Reason.CANCELLED:
            return self.result(Verdict.STOPPED, reason, "stopped on request")
        return self.result(Verdict.HANDED_BACK, reason, "the worker left, or lost its lease, while the build ran")

    def _why_stopped(self, stopped: BuildStopped) -> Reason:
        return stopped.reason if stopped.reason is Reason.TIMEOUT else self._stop.reason or stopped.reason

    # Phases

    def _provision(self) -> Image:
        """The image is on the host, the workspace is laid out, the container is made, and runs or begins to."""
        if self._settings.environment.privileged_mode and not self._job.mould.privileged:
            raise BuildProblem(
                "privilegedMode is not served by this fleet",
                reason=Reason.BAD_IMAGE,
                hint="Set privilegedMode to false, or have the operator set MILLRACE_PRIVILEGED for its workers.",
            )
        self._check_stop()
        mould, parked = self._job.mould, self._job.parked
        name = container_name(self._claim.build_id, self._claim.attempt_no)
        more = self._daemon_store()
        if parked is not None and parked.mould == mould and not more:
            self._container, self._console, self._image = parked.container_id, parked.console, parked.image
            self._aside("rename", lambda: self._adopt(parked, name))
        else:
            if parked is not None:
                parked.drop(self._engine)
            self._image = self._engine.ensure_image(mould.image)
            self._workspace.make()
            self._container = parking.make(self._engine, mould, self._workspace, name=name, labels=self._job.labels, more=more)
            self._begun = self._begin(self._container)
        self._workspace.add_sources()
        return self._image

    def _begin(self, container: str) -> "Future[None]":
        """Start the container while its sources are fetched, as it does nothing before it is told to. Raises in `_start`."""
        begun: Future[None] = Future()

        def work() -> None:
            try:
                self._console = self._engine.attach(container)
                self._engine.start(container)
            except (InfraProblem, BuildProblem) as problem:
                begun.set_exception(problem)
            else:
                begun.set_result(None)

        self._aside("start", work)
        return begun

    def _daemon_store(self) -> list[Mount]:
        """What a Docker daemon of the build's own finds of the project's last build, where the project wants that."""
        wanted = self._settings.cache
        if wanted.type != "LOCAL" or daemonstore.MODE not in (wanted.modes or ()):
            return []
        if not self._job.mould.privileged or self._job.layers is None:
            why = "MILLRACE_CACHE_BYTES is 0" if self._job.mould.privileged else "privilegedMode is not set"
            self._log.say(f"{daemonstore.MODE} has no effect: {why}")
            return []
        self._daemon = daemonstore.DaemonStore(self._job.layers / daemonstore.FOLDER)
        try:
            folder = self._daemon.take(self._settings.project_name)
        except OSError as error:
            self._log.say(f"Warning: no Docker layer cache: {error}")
            return []
        if folder is None:
            self._log.say("No Docker layer cache: another build of this project has it; going on without")
            return []
        self._log.say(f"The project's Docker layer cache is at {daemonstore.INSIDE}")
        return [Mount(source=folder, target=daemonstore.INSIDE)]

    def _adopt(self, parked: Parked, name: str) -> None:
        """Look whether the parked container is still what this build would be given, while its sources are fetched."""
        try:
            self._fits.set_result(parked.fits(self._engine.ensure_image(parked.mould.image), self._engine))
        except (InfraProblem, BuildProblem) as problem:
            self._fits.set_exception(problem)
            return
        if self._fits.result():
            self._engine.rename(parked.container_id, name)

    def _replace(self, parked: Parked) -> None:
        """The parked container has died, or the image has another content by now: a fresh one takes its place."""
        parked.drop(self._engine)
        self._console = None
        name = container_name(self._claim.build_id, self._claim.attempt_no)
        self._image = self._engine.ensure_image(parked.mould.image)
        self._container = parking.make(self._engine, parked.mould, self._workspace, name=name, labels=self._job.labels)

    def _download(self, image: Image) -> Buildspec:
        """The sources are there, and the buildspec is understood: every problem is found before anything runs."""
        preparation = Preparation(
            claim=self._claim,
            workspace=self._workspace,
            depot=self._depot,
            log=self._log,
            git_roots=self._job.git_roots,
            mirrors=self._job.mirrors,
            ca_bundle=self._job.mould.ca_bundle,
            stop=self._stop.event,
            deadline=self._deadline,
        )
        try:
            prepared = preparation.prepare(image)
        finally:
            self._progress.resolved_version = preparation.resolved_version
        self._variables, self._secret_names = prepared.variables, prepared.secret_names
        self._sink.mark("source_ready")
        return prepared.spec

    def _start(self, spec: Buildspec) -> Shell:
        """The container runs, and waits for commands."""
        if self._container is None:
            raise AssertionError("provisioned before")
        self._check_stop()
        if self._console is not None and self._job.parked is not None and not self._fits.result():
            self._replace(self._job.parked)
        if self._begun is not None:
            self._begun.result()
        if self._console is None:
            self._console = self._engine.attach(self._container)
            self._engine.start(self._container)
        shell = Shell(
            self._engine,
            self._container,
            self._console,
            self._workspace.control,
            shell=spec.env.shell if spec.env.shell in ("bash", "/bin/bash") else "/bin/sh",
            cwd=self._workspace.source_inside,
            grace_s=_GRACE_S,
        )
        shell.set_variables(self._variables)
        self._sink.mark("container_ready")
        return shell

    def _restore_cache(self, spec: Buildspec, shell: Shell) -> None:
        if spec.cache is None or self._container is None:
            self._log.say("Cache is not defined in the buildspec")
            return
        if self._settings.cache.type == "NO_CACHE":
            self._log.say("The cache section has no effect: the project's cache type is NO_CACHE")
            return
        self._cache = BuildCache(
            spec=spec.cache,
            engine=self._engine,
            container_id=self._container,
            workspace=self._workspace,
            depot=self._depot,
            layers=Layers(self._job.layers) if self._job.layers is not None else None,
            max_bytes=self._job.max_artifact_bytes,
            part_bytes=self._job.part_bytes,
            say=self._log.say,
            check=self._check_stop,
            evaluate=lambda text: self._evaluate(text, shell),
        )
        self._cache.restore()

    def _save_cache(self) -> None:
        """Only of a build that went well: what a failed one leaves may be half done."""
        if self._cache is None or self._progress.failure is not None:
            return
        self._freeze()
        saved = self._cache.save()
        if saved is not None:
            self._progress.caches.append(saved)

    def _run_commands(self, spec: Buildspec, shell: Shell) -> bool:
        """The four command phases; True where the artifacts are to be uploaded (CodeBuild: build phase transitions)."""
        for phase in COMMAND_PHASES:
            section = spec.phases.get(phase, PhaseSpec())
            failure = self._run_phase(phase, section, spec, shell)
            if failure is None:
                continue
            action = section.on_failure.action if section.on_failure else ""
            if action == "CONTINUE":
                continue
            if section.on_failure is not None and action == "RETRY":
                self._retry(phase, section.on_failure, failure)
            self._progress.failure = self._progress.failure or failure
            if phase in _ENDS_THE_BUILD or action == "ABORT":
                return False
        return True

    def _retry(self, phase: PhaseType, wanted: OnFailure, failure: _Failure) -> None:
        """Raises _Retry where the phase's on-failure lets the build begin anew; its pattern looks at the output, too."""
        done = self._claim.retries
        if not wanted.matches(f"{failure.message}\n{self._log.tail()}"):
            self._log.say(f"Phase {phase} is not retried: its failure does not match {wanted.pattern}")
        elif done >= wanted.count:
            self._log.say(f"Phase {phase} is not retried: the build began anew {done} time(s) of {wanted.count}")
        else:
            self._log.say(f"Phase {phase} failed; retry {done + 1} of {wanted.count} begins in a fresh container")
            raise _Retry(failure)

    def _run_phase(self, phase: PhaseType, section: PhaseSpec, spec: Buildspec, shell: Shell) -> _Failure | None:
        failure: _Failure | None = None
        user = section.run_as or spec.run_as
        with self._phase(phase) as outcome:
            self._log.forget_tail()
            for number, command in enumerate(section.commands, 1):
                failure = self._run_command(command, spec, user, shell)
                if failure is not None:
                    at = f"command {number} of {len(section.commands)} of phase {phase}, line {command.line} of the buildspec"
                    self._log.say(f"That was {at}")
                    break
            for command in section.finally_:
                failed = self._run_command(command, spec, user, shell)
                failure = failure or failed
            if section.commands or section.finally_:
                self._warn_of_oom()
            if failure is not None:
                outcome.fail(PhaseContext(status_code="COMMAND_EXECUTION_ERROR", message=failure.message))
        return failure

    def _warn_of_oom(self) -> None:
        """Tell of a process that the kernel ended and no command failed for."""
        with suppress(InfraProblem):
            if not self._oom_said and self._container is not None and self._engine.state(self._container).oom_killed:
                self._oom_said = True
                self._log.say("Warning: the kernel ended a process of this build for want of memory; its command went on")

    def _run_command(self, command: Command, spec: Buildspec, user: str | None, shell: Shell) -> _Failure | None:
        text = command.text.rstrip("\n")
        self._commands_ran = True
        self._log.say(f"Running command {text}")
        self._sink.mark("first_command")
        status = shell.run(
            command.text,
            on_output=self._log.output,
            stop=self._stop.event,
            deadline=self._deadline,
            user=None if user == "root" else user,
            fresh=spec.version == "0.1",
        )
        self._sink.mark_again("last_command")
        shell.set_variables({"CODEBUILD_LAST_EXIT": str(status)})
        if status == 0:
            return None
        self._log.say(f"Command did not exit successfully {text} exit status {status}")
        shell.set_variables({"CODEBUILD_BUILD_SUCCEEDING": "0"})
        if self._progress.exit_code is None:
            self._progress.exit_code = status
        message = f"Error while executing command: {text}. Reason: exit status {status}"
        if status == 137 and self._container is not None and self._engine.state(self._container).oom_killed:
            self._oom_said = True
            return _Failure(message=f"{message} (it was killed for want of memory)", exit_code=status, reason=Reason.OOM)
        if self._workspace.is_full():
            return _Failure(message=f"{message} (its disk is full)", exit_code=status, reason=Reason.DISK_LIMIT)
        if status in _STATUS_MEANS:
            self._log.say(f"Exit status {status}: {_STATUS_MEANS[status]}")
        return _Failure(message=message, exit_code=status)

    def _export(self, spec: Buildspec, shell: Shell) -> None:
        """CodeBuild: exported-variables; what a secret store gave, and AWS_*, is never exported."""
        barred = [name for name in spec.env.exported_variables if name.startswith("AWS_") or name in self._secret_names]
        for name in barred:
            self._log.say(f"Warning: {name} is not exported: it is {'a secret' if name in self._secret_names else 'reserved'}")
        names = [name for name in dict.fromkeys(spec.env.exported_variables) if name not in barred]
        values = shell.variables() if names else {}
        self._progress.exported = tuple(
            ExportedVariable(name=name, value=self._log.hidden(values.get(name, ""))) for name in names
        )

    def _upload(self, spec: Buildspec, shell: Shell) -> None:
        """UPLOAD_ARTIFACTS. What fails here fails the build, unless a command failed before."""
        try:
            with self._phase(PhaseType.UPLOAD_ARTIFACTS):
                sets = uploads.sets(
                    spec, self._settings, lambda text: self._evaluate(text, shell), shell.variables(), self._log.say
                )
                container = self._container or ""
                if sets:
                    self._freeze()
                uploader = uploads.Uploader(
                    depot=self._depot,
                    source=self._workspace.source,
                    scratch=self._workspace.scratch,
                    outside=Outside(lambda path: self._copy_out(container, path), self._workspace.scratch / "outside"),
                    max_bytes=self._job.max_artifact_bytes,
                    part_bytes=self._job.part_bytes,
                    say=self._log.say,
                    check=self._check_stop,
                )
                for one in sets:
                    self._progress.artifacts += uploader.upload(one)
                if sets:
                    self._sink.mark("artifacts_stored")
        except (BuildProblem, InfraProblem):
            self._progress.artifacts.clear()
            if self._progress.failure is None:
                raise

    def _copy_out(self, container: str, path: str) -> Iterator[bytes]:
        """`Engine.copy_out`, also of what is mounted from a cache."""
        on_host = self._cache.host_path(path) if self._cache is not None else None
        return self._engine.copy_out(container, path) if on_host is None else stream(on_host)

    def _freeze(self) -> None:
        """End all processes of the build: nothing may change what is being packed."""
        if not self._frozen:
            self._engine.stop(self._container or "", 0)
            self._frozen = True

    def _evaluate(self, text: str, shell: Shell) -> str | None:
        """What the shell makes of `text` (CodeBuild: artifacts.name, cache.key); what its commands complain of is in the log."""
        return shell.evaluate(text, on_output=self._log.output, stop=self._stop.event, deadline=self._deadline)

    # What holds it together

    @contextmanager
    def _phase(self, phase: PhaseType) -> Iterator["_Outcome"]:
        """A phase, told when it begins and when it ends, however it ends."""
        began, began_ms = time.monotonic(), clock.now_ms()
        outcome = _Outcome()
        self._last_phase = phase
        self._sink.phase(PhaseReport(phase_type=phase, started_at_ms=began_ms))
        if phase in COMMAND_PHASES:
            self._log.say(f"Entering phase {phase}")
        try:
            with self._room():
                yield outcome
        except BadBuildspec as problem:
            self._log.say(problem.message)
            outcome.fail(PhaseContext(status_code=problem.status_code, message=problem.message))
            raise
        except BuildProblem as problem:
            outcome.fail(PhaseContext(status_code=problem.status_code, message=_with_hint(problem)))
            raise
        except InfraProblem as problem:
            outcome.end(StatusType.FAULT, PhaseContext(status_code=problem.status_code, message=_with_hint(problem)))
            raise
        except BuildStopped as stopped:
            if self._why_stopped(stopped) is Reason.TIMEOUT:
                outcome.end(StatusType.TIMED_OUT, PhaseContext(status_code="BUILD_TIMED_OUT", message="Build has timed out. "))
            else:
                outcome.end(StatusType.STOPPED, None)
            raise
        finally:
            duration_ms = int((time.monotonic() - began) * 1000)
            self._end_phase(phase, outcome, began_ms, duration_ms)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """A disk that is full is a problem of the build where its commands have run, and ours before that."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            what = f"the disk of the build's workspace is full: {error.strerror}"
            if self._commands_ran:
                raise BuildProblem(what, reason=Reason.DISK_LIMIT, hint="Leave less behind on the disk.") from error
            raise InfraProblem(what, reason=Reason.STORAGE, hint="Is there room on the worker's disk?") from error

    def _end_phase(self, phase: PhaseType, outcome: "_Outcome", began_ms: int, duration_ms: int) -> None:
        if phase is not PhaseType.FINALIZING:
            self._log.say(f"Phase complete: {phase} State: {outcome.status}")
            context = outcome.context or PhaseContext()
            if outcome.status is not StatusType.STOPPED:
                self._log.say(f"Phase context status code: {context.status_code} Message: {context.message}")
        self._sink.phase(
            PhaseReport(
                phase_type=phase,
                status=outcome.status,
                started_at_ms=began_ms,
                ended_at_ms=began_ms + duration_ms,
                duration_ms=duration_ms,
                contexts=(self._hidden(outcome.context),) if outcome.context else (),
                resolved_source_version=self._progress.resolved_version,
            )
        )

    def _hidden(self, context: PhaseContext) -> PhaseContext:
        return PhaseContext(status_code=context.status_code, message=self._log.hidden(context.message))

    def _check_stop(self) -> None:
        if self._stop.event.is_set():
            raise BuildStopped("the build was stopped", reason=Reason.CANCELLED)
        if time.monotonic() > self._deadline:
            raise BuildStopped("the build's time was over", reason=Reason.TIMEOUT)

    def end_log(self) -> None:
        """Nothing more is written."""
        self._log.end()

    def clean_up(self) -> None:
        """Whatever happened, and whether or not the build was stopped: the container and the workspace go."""
        self._log.end()
        for thread in self._asides:
            thread.join()
        if self._console is not None:
            self._console.close()
        if self._container is not None:
            self._without_failing("container", lambda: self._engine.remove(self._container or ""))
        if self._cache is not None:
            self._cache.close()
        if self._daemon is not None:
            self._without_failing("daemon store", self._daemon.close)
        image = self._image.reference if self._image else None
        self._without_failing("workspace", lambda: self._workspace.remove(self._engine, image))

    def _aside(self, what: str, work: Callable[[], None]) -> None:
        """Do what nobody waits for, and what may fail, beside the build."""
        thread = threading.Thread(target=self._without_failing, args=(what, work), name=what, daemon=True)
        self._asides.append(thread)
        thread.start()

    @staticmethod
    def _without_failing(what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (InfraProblem, BuildProblem, OSError) as error:
            log.warning("cleanup.failed", what=what, why=str(error))  # the janitor comes back for it


class _Outcome:
    """How a phase ends; SUCCEEDED unless something says otherwise."""

    def __init__(self) -> None:
        self.status = StatusType.SUCCEEDED
        self.context: PhaseContext | None = None

    def fail(self, context: PhaseContext) -> None:
        """The user's part failed."""
        self.end(StatusType.FAILED, context)

    def end(self, status: StatusType, context: PhaseContext | None) -> None:
        """It ended so."""
        self.status, self.context = status, context


def _with_hint(problem: BuildProblem | InfraProblem) -> str:
    return f"{problem.message}. {problem.hint}" if problem.hint else problem.message
