"""One attempt against the fake engine: what follows from each way to fail, phase by phase."""

import hashlib
import io
import secrets
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buildenv import cache, daemonstore
from buildenv.daemonstore import DaemonStore
from buildenv.fake_engine import FakeEngine
from buildenv.parking import Mould
from buildenv.run import Job, Result, StopSignal, run
from millrace.contract import (
    LEAST_PART_BYTES,
    CacheHit,
    CacheQuery,
    Claim,
    Grant,
    GrantRequest,
    PhaseReport,
    SecretReference,
)
from millrace.errors import AttemptFenced, BuildProblem, InfraProblem
from millrace.project import BuildSettings
from millrace.vocabulary import PhaseType, Reason, StatusType, Verdict

HEAD = "version: 0.2\nphases:\n"
BUILD_ID = "demo:00000001-0000-4000-8000-000000000001"


class Recorder:
    """A sink and a depot in one; `fence_at` raises AttemptFenced at the beginning of that phase."""

    def __init__(self, tmp_path: Path) -> None:
        self.phases: dict[PhaseType, PhaseReport] = {}
        self.order: list[PhaseType] = []
        self.text = b""
        self.marks: list[str] = []
        self.uploaded: dict[str, bytes] = {}
        self.fence_at: PhaseType | None = None
        self.store_away = False
        self.on_log: Any = None
        self.kept_secrets: dict[str, str] = {}
        self.asked: CacheQuery | None = None
        self.hit: CacheHit | None = None
        self.stored: dict[str, bytes] = {}
        self.granted: list[GrantRequest] = []

    def phase(self, report: PhaseReport) -> None:
        if report.phase_type is self.fence_at:
            raise AttemptFenced("another holds it")
        if report.phase_type not in self.phases:
            self.order.append(report.phase_type)
        self.phases[report.phase_type] = report

    def log(self, data: bytes) -> None:
        self.text += data
        if self.on_log is not None:
            self.on_log(self.text)

    def mark(self, name: str) -> None:
        self.marks.append(name)

    def mark_again(self, name: str) -> None:
        self.marks.append(name)

    def grant(self, request: GrantRequest) -> Grant:
        self.granted.append(request)
        return Grant(method="PUT", url="/x", key=f"artifacts/{request.name}", expires_in_s=60)

    def upload(self, grant: Grant, path: Path, sha256: str, *, brief: bool = False) -> None:
        if self.store_away:
            raise InfraProblem("the object store is away", reason=Reason.STORAGE)
        self.uploaded[grant.key] = path.read_bytes()

    def download(self, grant: Grant, path: Path, *, brief: bool = False) -> None:
        path.write_bytes(self.stored[grant.key])

    def secrets(self, references: Sequence[SecretReference]) -> Mapping[str, str]:
        missing = [one.value for one in references if one.value not in self.kept_secrets]
        if missing:
            raise BuildProblem(f"parameter does not exist: {missing[0]}", reason=Reason.SECRET_UNAVAILABLE)
        return {one.name: self.kept_secrets[one.value] for one in references}

    def find_cache(self, query: CacheQuery) -> CacheHit | None:
        self.asked = query
        return self.hit

    def statuses(self) -> dict[str, str | None]:
        return {name.value: report.status.value if report.status else None for name, report in self.phases.items()}


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def job(tmp_path: Path, spec: str, deadline_in_s: float = 60, **settings: Any) -> Job:
    wanted = BuildSettings.model_validate(
        {
            "projectName": "demo",
            "source": {"type": "NO_SOURCE", "buildspec": spec},
            "artifacts": {"type": "S3", "packaging": "ZIP"},
            "environment": {"type": "LINUX_CONTAINER", "image": "some/image:1", "computeType": "BUILD_GENERAL1_SMALL"},
            **settings,
        }
    )
    claim = Claim(
        build_id=BUILD_ID,
        build_arn="arn",
        build_number=7,
        attempt_no=1,
        token="t",
        lease_ttl_s=30,
        renew_every_s=10,
        self_fence_s=25,
        deadline_in_s=deadline_in_s,
        submitted_at_ms=1,
        initiator="tests",
        region="us-east-1",
        settings=wanted,
    )
    return Job(
        claim=claim,
        workspace=tmp_path / "work",
        labels={},
        mould=Mould(image="some/image:1", cpus=1, memory_bytes=1024**3, pids=100, network="none"),
        git_roots=(),
        max_artifact_bytes=10**6,
        part_bytes=64 * 1024 * 1024,
    )


def carried(
    tmp_path: Path,
    recorder: Recorder,
    spec: str,
    *,
    fake: Mapping[str, str] | None = None,
    stop: StopSignal | None = None,
    **more: Any,
) -> Result:
    engine = FakeEngine(fake or {})
    with ExitStack() as later:
        result = run(job(tmp_path, spec, **more), engine, recorder, recorder, stop or StopSignal(), later)
    assert not (tmp_path / "work").exists()
    assert list(engine.leftovers({})) == []
    return result


def test_a_build_that_succeeds_goes_through_all_phases(tmp_path: Path, recorder: Recorder) -> None:
    result = carried(tmp_path, recorder, HEAD + "  build:\n    commands:\n      - echo hello\n")
    assert (result.verdict, result.reason, result.exit_code) == (Verdict.SUCCEEDED, Reason.SUCCEEDED, None)
    names = ["PROVISIONING", "DOWNLOAD_SOURCE", "INSTALL", "PRE_BUILD", "BUILD", "POST_BUILD", "UPLOAD_ARTIFACTS", "FINALIZING"]
    assert [phase.value for phase in recorder.order] == names
    assert set(recorder.statuses().values()) == {"SUCCEEDED"}
    assert b"hello\n\n[Container] " in recorder.text
    assert recorder.marks[:5] == ["source_ready", "container_ready", "first_command", "first_output", "last_command"]


@pytest.mark.parametrize(
    ("phases", "statuses", "code"),
    [
        (
            "  install:\n    commands: [exit 2]\n  build:\n    commands: [echo b]\n",
            {"INSTALL": "FAILED", "FINALIZING": "SUCCEEDED"},
            2,
        ),
        ("  pre_build:\n    commands: [exit 3]\n", {"INSTALL": "SUCCEEDED", "PRE_BUILD": "FAILED", "FINALIZING": "SUCCEEDED"}, 3),
        (
            "  build:\n    commands: [exit 4]\n  post_build:\n    commands: [exit 5]\n",
            {"BUILD": "FAILED", "POST_BUILD": "FAILED", "UPLOAD_ARTIFACTS": "SUCCEEDED", "FINALIZING": "SUCCEEDED"},
            4,
        ),
        (
            "  post_build:\n    commands: [echo a]\n    finally: [exit 6]\n",
            {"POST_BUILD": "FAILED", "UPLOAD_ARTIFACTS": "SUCCEEDED"},
            6,
        ),
        ("  build:\n    on-failure: ABORT\n    commands: [exit 7]\n", {"BUILD": "FAILED", "FINALIZING": "SUCCEEDED"}, 7),
    ],
)
def test_what_runs_after_a_failed_phase(
    tmp_path: Path, recorder: Recorder, phases: str, statuses: dict[str, str], code: int
) -> None:
    result = carried(tmp_path, recorder, HEAD + phases)
    assert (result.verdict, result.reason, result.exit_code) == (Verdict.FAILED, Reason.EXIT_CODE, code)
    seen = recorder.statuses()
    assert {name: seen.get(name) for name in statuses} == statuses
    failed = [phase.value for phase in recorder.order].index(next(name for name in seen if seen[name] == "FAILED"))
    assert len(recorder.order) - failed - 1 == len([name for name in list(seen)[failed + 1 :]])
    context = next(report.contexts[0] for report in recorder.phases.values() if report.status is StatusType.FAILED)
    assert context.status_code == "COMMAND_EXECUTION_ERROR"
    assert context.message == f"Error while executing command: exit {code}. Reason: exit status {code}"


def test_continue_leaves_the_build_unharmed(tmp_path: Path, recorder: Recorder) -> None:
    spec = (
        HEAD
        + "  install:\n    on-failure: CONTINUE\n    commands: [exit 2]\n"
        + "  build:\n    commands: [echo $CODEBUILD_BUILD_SUCCEEDING]\n"
    )
    result = carried(tmp_path, recorder, spec)
    assert (result.verdict, result.exit_code) == (Verdict.SUCCEEDED, 2)
    assert (recorder.statuses()["INSTALL"], b"\n0\n" in recorder.text) == ("FAILED", True)


def test_a_broken_buildspec_ends_before_anything_runs(tmp_path: Path, recorder: Recorder) -> None:
    result = carried(tmp_path, recorder, "version: 0.2\nphase: x\n")
    assert (result.verdict, result.reason) == (Verdict.FAILED, Reason.BAD_BUILDSPEC)
    assert recorder.order[-2:] == [PhaseType.DOWNLOAD_SOURCE, PhaseType.FINALIZING]
    assert recorder.phases[PhaseType.DOWNLOAD_SOURCE].contexts[0].status_code == "YAML_FILE_ERROR"
    assert b"did you mean phases?" in recorder.text
    assert "container_ready" not in recorder.marks


@pytest.mark.parametrize(
    ("fake", "verdict", "reason", "last"),
    [
        ({"FAKE_PULL_FAILS": "not_found"}, Verdict.FAILED, Reason.IMAGE_NOT_FOUND, "PROVISIONING"),
        ({"FAKE_PULL_FAILS": "unreachable"}, Verdict.FAULT, Reason.IMAGE_PULL, "PROVISIONING"),
        ({"FAKE_OOM": "1"}, Verdict.FAILED, Reason.OOM, "BUILD"),
        ({"FAKE_DIES": "1"}, Verdict.FAILED, Reason.KILLED, "BUILD"),
        ({"FAKE_ENGINE_LOST": "run"}, Verdict.FAULT, Reason.ENGINE_LOST, "BUILD"),
        ({"FAKE_EXIT_CODE": "9"}, Verdict.FAILED, Reason.EXIT_CODE, "FINALIZING"),
    ],
)
def test_each_fault_has_its_verdict_and_reason(
    tmp_path: Path, recorder: Recorder, fake: dict[str, str], verdict: Verdict, reason: Reason, last: str
) -> None:
    engine = FakeEngine(fake)
    result = run(
        job(tmp_path, HEAD + "  build:\n    commands: [make all]\n"), engine, recorder, recorder, StopSignal(), ExitStack()
    )
    assert (result.verdict, result.reason) == (verdict, reason)
    assert recorder.order[-1].value == last
    assert all(report.ended_at_ms is not None for report in recorder.phases.values())


def test_the_fake_engine_heeds_a_builds_own_variables_first(tmp_path: Path, recorder: Recorder) -> None:
    spec = "version: 0.2\nenv: {variables: {FAKE_EXIT_CODE: '9'}}\nphases: {build: {commands: [make all]}}\n"
    result = carried(tmp_path, recorder, spec, fake={"FAKE_EXIT_CODE": "0"})
    assert (result.verdict, result.exit_code) == (Verdict.FAILED, 9)


def test_a_stop_ends_the_phase_without_contexts(tmp_path: Path, recorder: Recorder) -> None:
    stop = StopSignal()
    threading.Timer(0.5, stop.set, [Reason.CANCELLED]).start()
    began = time.monotonic()
    result = carried(tmp_path, recorder, HEAD + "  build:\n    commands: [make all]\n", fake={"FAKE_SLEEP_S": "60"}, stop=stop)
    assert time.monotonic() - began < 20
    assert (result.verdict, result.reason) == (Verdict.STOPPED, Reason.CANCELLED)
    report = recorder.phases[PhaseType.BUILD]
    assert (report.status, report.contexts) == (StatusType.STOPPED, ())
    assert recorder.order[-1] is PhaseType.BUILD


@pytest.mark.parametrize("reason", [Reason.WORKER_SHUTDOWN, Reason.WORKER_LOST])
def test_a_worker_that_leaves_hands_the_build_back(tmp_path: Path, recorder: Recorder, reason: Reason) -> None:
    stop = StopSignal()
    stop.set(reason)
    result = carried(tmp_path, recorder, HEAD + "  build:\n    commands: [make all]\n", stop=stop)
    assert (result.verdict, result.reason) == (Verdict.HANDED_BACK, reason)


def test_a_build_over_its_time_is_timed_out(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [make all]\n"
    result = carried(tmp_path, recorder, spec, fake={"FAKE_SLEEP_S": "60"}, deadline_in_s=0.6)
    assert (result.verdict, result.reason) == (Verdict.TIMED_OUT, Reason.TIMEOUT)
    report = recorder.phases[PhaseType.BUILD]
    assert report.status is StatusType.TIMED_OUT
    assert (report.contexts[0].status_code, report.contexts[0].message) == ("BUILD_TIMED_OUT", "Build has timed out. ")


def test_a_fenced_attempt_uploads_nothing_and_cleans_up(tmp_path: Path, recorder: Recorder) -> None:
    recorder.fence_at = PhaseType.UPLOAD_ARTIFACTS
    engine = FakeEngine({})
    with pytest.raises(AttemptFenced):
        run(job(tmp_path, HEAD + "  build:\n    commands: [echo a]\n"), engine, recorder, recorder, StopSignal(), ExitStack())
    assert recorder.uploaded == {}
    assert list(engine.leftovers({})) == []
    assert not (tmp_path / "work").exists()


def test_an_upload_that_fails_never_hides_a_commands_exit_code(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [exit 3]\nartifacts:\n  files: [nothing]\n"
    result = carried(tmp_path, recorder, spec)
    assert (result.verdict, result.reason, result.exit_code) == (Verdict.FAILED, Reason.EXIT_CODE, 3)
    assert recorder.statuses()["UPLOAD_ARTIFACTS"] == "FAILED"
    again = Recorder(tmp_path)
    result = carried(tmp_path, again, spec.replace("exit 3", "echo fine"))
    assert (result.verdict, result.reason) == (Verdict.FAILED, Reason.ARTIFACTS_NOT_FOUND)


def test_a_secret_that_cannot_be_had_stops_the_build(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [echo a]\nenv:\n  parameter-store: {TOKEN: /x}\n"
    result = carried(tmp_path, recorder, spec)
    assert (result.verdict, result.reason) == (Verdict.FAILED, Reason.SECRET_UNAVAILABLE)
    assert b"Running command" not in recorder.text


def test_what_is_not_acted_on_yet_is_said(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [echo a]\nreports:\n  r: {files: [a]}\n"
    carried(tmp_path, recorder, spec)
    assert b"reports in the buildspec is understood, but not acted on yet" in recorder.text


def test_secrets_reach_the_build_and_not_its_log(tmp_path: Path, recorder: Recorder) -> None:
    recorder.kept_secrets = {"/prod/token": "s3cr3t-value", "prod/db:password": "another-one"}
    spec = (
        HEAD
        + "  build:\n    commands:\n      - echo got $TOKEN and $DB\n      - test $TOKEN\n"
        + "env:\n  parameter-store: {TOKEN: /prod/token}\n  secrets-manager: {DB: 'prod/db:password'}\n"
        + "  exported-variables: [TOKEN, COPY]\n  variables: {COPY: made-of-s3cr3t-value}\n"
    )
    result = carried(tmp_path, recorder, spec)
    assert b"got *** and ***" in recorder.text
    assert b"s3cr3t" not in recorder.text
    assert [(one.name, one.value) for one in result.exported_variables] == [("COPY", "made-of-***")]
    assert b"Warning: TOKEN is not exported: it is a secret" in recorder.text


def test_a_secret_that_is_too_short_to_be_hidden_is_named(tmp_path: Path, recorder: Recorder) -> None:
    recorder.kept_secrets = {"/pin": "12", "/long": "long-enough"}
    spec = HEAD + "  build:\n    commands: [echo a]\nenv:\n  parameter-store: {PIN: /pin, LONG: /long}\n"
    carried(tmp_path, recorder, spec)
    assert b"Warning: PIN is too short to be hidden in the log" in recorder.text
    assert b"LONG is too short" not in recorder.text


def test_a_secret_in_a_failed_command_is_hidden_in_its_message(tmp_path: Path, recorder: Recorder) -> None:
    recorder.kept_secrets = {"/t": "abcdefgh"}
    spec = HEAD + "  build:\n    commands: ['echo abcdefgh && exit 3']\nenv:\n  parameter-store: {T: /t}\n"
    result = carried(tmp_path, recorder, spec)
    assert result.message == "Error while executing command: echo *** && exit 3. Reason: exit status 3"
    assert recorder.phases[PhaseType.BUILD].contexts[0].message == result.message


@pytest.mark.parametrize(
    ("wanted", "done", "retried"),
    [
        ("RETRY", 0, True),
        ("RETRY", 3, False),
        ("retry-1", 0, True),
        ("RETRY-0", 0, False),
        ("RETRY-2-status 4$", 1, True),
        ("RETRY-2-status 5", 0, False),
        ("Retry-printed by", 0, True),
    ],
)
def test_a_phase_may_ask_for_a_fresh_attempt(tmp_path: Path, recorder: Recorder, wanted: str, done: int, retried: bool) -> None:
    spec = HEAD + f"  build:\n    on-failure: {wanted}\n    commands: [echo printed by it, exit 4]\n    finally: [echo last]\n"
    one = job(tmp_path, spec)
    one = replace(one, claim=one.claim.model_copy(update={"retries": done}))
    result = run(one, FakeEngine({}), recorder, recorder, StopSignal(), ExitStack())
    assert b"\nlast\n" in recorder.text
    if retried:
        assert (result.verdict, result.reason) == (Verdict.HANDED_BACK, Reason.PHASE_RETRY)
        assert "POST_BUILD" not in recorder.statuses()
    else:
        assert (result.verdict, result.reason) == (Verdict.FAILED, Reason.EXIT_CODE)
        assert recorder.statuses()["POST_BUILD"] == "SUCCEEDED"


def test_a_cache_that_the_store_cannot_give_costs_nothing_but_a_line(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [mkdir c, echo x > c/f]\ncache:\n  key: k-1\n  paths: ['c/**/*']\n"
    recorder.store_away = True
    result = carried(tmp_path, recorder, spec, cache={"type": "S3"}, artifacts={"type": "NO_ARTIFACTS"})
    assert result.verdict is Verdict.SUCCEEDED
    assert recorder.asked is not None
    assert recorder.asked.keys == ("k-1",)
    assert b"Warning: the cache is not saved: the object store is away" in recorder.text
    assert result.caches == ()


def test_a_privileged_build_finds_what_its_projects_daemon_kept_and_others_go_without(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [mkdir -p /var/lib/docker/image, echo kept > /var/lib/docker/image/one, "
    spec += "mkdir -p /var/lib/docker/volumes, echo x > /var/lib/docker/volumes/v]\n"
    reads = HEAD + "  build:\n    commands: [cat /var/lib/docker/image/one]\n"
    settings = {"cache": {"type": "LOCAL", "modes": ["LOCAL_DOCKER_LAYER_CACHE"]}, "artifacts": {"type": "NO_ARTIFACTS"}}

    def wanted(text: str, *, served: bool = True) -> Job:
        one = job(tmp_path, text, **settings)
        environment = one.claim.settings.environment.model_copy(update={"privileged_mode": True})
        claim = one.claim.model_copy(update={"settings": one.claim.settings.model_copy(update={"environment": environment})})
        mould = one.mould.model_copy(update={"privileged": served})
        return replace(one, claim=claim, layers=tmp_path / "layers", mould=mould)

    def carry(one: Job) -> Result:
        recorder.text = b""
        with ExitStack() as later:
            return run(one, FakeEngine({}), recorder, recorder, StopSignal(), later)

    refused = carry(wanted(spec, served=False))
    assert (refused.verdict, refused.reason) == (Verdict.FAILED, Reason.BAD_IMAGE)
    assert carry(wanted(reads)).verdict is Verdict.FAILED
    assert carry(wanted(spec)).verdict is Verdict.SUCCEEDED
    assert b"The project's Docker layer cache is at /var/lib/docker" in recorder.text
    assert carry(wanted(reads)).verdict is Verdict.SUCCEEDED
    assert b"\nkept\n" in recorder.text
    holder = DaemonStore(tmp_path / "layers" / daemonstore.FOLDER)
    root = holder.take("demo")
    assert root is not None and sorted(path.name for path in root.rglob("*")) == ["image", "one"]
    assert carry(wanted(reads)).verdict is Verdict.FAILED
    assert b"No Docker layer cache: another build of this project has it; going on without" in recorder.text
    holder.close()
    carry(replace(job(tmp_path, spec, **settings), layers=tmp_path / "layers"))
    assert b"LOCAL_DOCKER_LAYER_CACHE has no effect: privilegedMode is not set" in recorder.text


def test_what_became_of_a_cache_that_was_found_is_told(tmp_path: Path, recorder: Recorder) -> None:
    spec = HEAD + "  build:\n    commands: [mkdir -p c, echo x > c/f]\ncache:\n  paths: [c/f]\n"
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    first = carried(tmp_path / "first", recorder, spec, cache={"type": "S3"}, artifacts={"type": "NO_ARTIFACTS"})
    (saved,) = first.caches
    assert first.cache_uses == ()
    (recorder.stored[saved.object_key],) = (data for key, data in recorder.uploaded.items() if key == saved.object_key)
    grant = Grant(method="GET", url="/x", key=saved.object_key, expires_in_s=60)
    hit = {"size_bytes": saved.size_bytes, "sha256": saved.sha256, "build_id": BUILD_ID, "grant": grant}
    recorder.hit = CacheHit(key="", exact=True, **hit)
    second = carried(tmp_path / "second", recorder, spec, cache={"type": "S3"}, artifacts={"type": "NO_ARTIFACTS"})
    (use,) = second.cache_uses
    assert use.used and use.says.startswith(f"copied 1 file(s), {saved.size_bytes} bytes in ")
    recorder.stored[saved.object_key] = b"spoilt"
    third = carried(tmp_path / "third", recorder, spec.replace("echo x", "false"), cache={"type": "S3"})
    assert third.verdict is Verdict.FAILED
    assert [(use.used, use.says) for use in third.cache_uses] == [(False, "it came with other bytes than were stored")]


def test_a_large_cache_is_sent_in_parts(tmp_path: Path, recorder: Recorder) -> None:
    """What it found is large, and is saved again beside what it made."""
    spec = HEAD + "  build:\n    commands: [mkdir -p c, echo x > c/g]\ncache:\n  paths: ['c/*']\n"
    info = tarfile.TarInfo("c/f")
    info.size = 2 * LEAST_PART_BYTES
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        tar.addfile(info, io.BytesIO(secrets.token_bytes(info.size)))
    paths = cache.Paths(patterns=("c/*",), source_inside="/src")
    made = cache.pack(paths, lambda _path: iter([body.getvalue()]), tmp_path / "made", max_bytes=10**8, say=lambda _text: None)
    assert made is not None
    recorder.stored["k"] = made.path.read_bytes()
    grant = Grant(method="GET", url="/x", key="k", expires_in_s=60)
    recorder.hit = CacheHit(key="", exact=True, size_bytes=made.size_bytes, sha256=made.sha256, build_id=BUILD_ID, grant=grant)
    wanted = job(tmp_path, spec, cache={"type": "S3"}, artifacts={"type": "NO_ARTIFACTS"})
    wanted = replace(wanted, part_bytes=LEAST_PART_BYTES, max_artifact_bytes=10**8)
    with ExitStack() as later:
        (saved,) = run(wanted, FakeEngine({}), recorder, recorder, StopSignal(), later).caches
    (request,) = (one for one in recorder.granted if one.kind == "cache")
    data, size = recorder.uploaded[saved.object_key], request.part_bytes or 0
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    assert request.parts == tuple(hashlib.md5(part, usedforsecurity=False).hexdigest() for part in parts)
    assert len(parts) == 3


@pytest.mark.parametrize(("action", "asks", "saves"), [("restore", True, False), ("save", False, True)])
def test_a_cache_may_be_restored_only_or_saved_only(
    tmp_path: Path, recorder: Recorder, action: str, asks: bool, saves: bool
) -> None:
    spec = HEAD + f"  build:\n    commands: [echo x > f]\ncache:\n  key: k\n  action: {action}\n  paths: [f]\n"
    result = carried(tmp_path, recorder, spec, cache={"type": "S3"})
    assert (recorder.asked is not None, len(result.caches)) == (asks, int(saves))


def test_a_container_that_was_not_parked_begins_while_the_sources_are_fetched(tmp_path: Path, recorder: Recorder) -> None:
    begun = threading.Event()

    class Watched(FakeEngine):
        def start(self, container_id: str) -> None:
            super().start(container_id)
            begun.set()

    def secrets(references: Sequence[SecretReference]) -> Mapping[str, str]:
        assert begun.wait(10), "it waits for the sources"
        return {one.name: "s3cret" for one in references}

    recorder.secrets = secrets  # type: ignore[method-assign]
    spec = "version: 0.2\nenv:\n  parameter-store: {A: /a}\nphases:\n  build:\n    commands: [echo a]\n"
    result = run(job(tmp_path, spec), Watched({}), recorder, recorder, StopSignal(), ExitStack())
    assert result.verdict is Verdict.SUCCEEDED


def test_a_container_that_cannot_begin_fails_the_download_of_the_source(tmp_path: Path, recorder: Recorder) -> None:
    class Broken(FakeEngine):
        def start(self, container_id: str) -> None:
            raise BuildProblem("it has no /bin/sh", reason=Reason.BAD_IMAGE)

    engine = Broken({})
    one = job(tmp_path, HEAD + "  build:\n    commands: [echo a]\n")
    with ExitStack() as later:
        result = run(one, engine, recorder, recorder, StopSignal(), later)
    assert (result.verdict, result.reason) == (Verdict.FAILED, Reason.BAD_IMAGE)
    assert recorder.statuses()["DOWNLOAD_SOURCE"] == "FAILED"
    assert list(engine.leftovers({})) == []
