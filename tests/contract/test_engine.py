"""One suite for every engine: the fake one, Docker's, and that of the worker's own container. What a build needs is so on each.

`own` gives a build namespaces of its own; `own-shared` is the same engine where it may not, as on Fargate. There, nothing can be
mounted: the workspace lies where a build is to see it, and what it may only read it could write all the same.
"""

import os
import shutil
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import pytest

from buildenv.docker_engine import DockerEngine
from buildenv.engine import LABEL_BUILD, Console, ContainerSpec, Engine, Mount
from buildenv.fake_engine import FakeEngine
from buildenv.own.engine import OwnEngine
from buildenv.shell import RUNNER, RUNNER_COMMAND, Shell
from millrace.errors import BuildProblem, BuildStopped, InfraProblem
from millrace.vocabulary import Reason
from tests.support.farm import need_engine
from tests.support.need import missing

IMAGE = "millrace/base:latest"


@cache
def one_docker_engine() -> DockerEngine:
    """One for all tests: an engine keeps its connections."""
    return DockerEngine()


@dataclass
class Bench:
    """An engine, a workspace, and what was made on it."""

    engine: Engine
    folder: Path
    label: str
    can_mount: bool = True

    def spec(self, **changes: object) -> ContainerSpec:
        values: dict[str, object] = {
            "name": f"millrace-test-{uuid.uuid4().hex[:12]}",
            "image": IMAGE,
            "command": RUNNER_COMMAND,
            "mounts": (
                Mount(source=self.folder / "output", target="/codebuild/output"),
                Mount(source=self.folder / "readonly", target="/codebuild/readonly", read_only=True),
            ),
            "labels": {LABEL_BUILD: self.label},
            "memory_bytes": 256 * 1024**2,
            "cpus": 1,
            "network": "none",
            **changes,
        }
        return ContainerSpec(**values)  # type: ignore[arg-type]

    def shell(self, **changes: object) -> tuple[Shell, str, Console]:
        container = self.engine.create(self.spec(**changes))
        console = self.engine.attach(container)
        self.engine.start(container)
        return Shell(self.engine, container, console, self.folder / "output" / "tmp", cwd="/tmp", grace_s=1), container, console


def engine_of(kind: str) -> Engine:
    """One of the implementations. Skips or fails where this machine cannot have it."""
    if kind == "fake":
        return FakeEngine()
    if kind == "docker":
        need_engine()
        return one_docker_engine()
    if os.geteuid() != 0:
        missing("the rights of root", "run the tests as root")
    return OwnEngine(os.environ, image=IMAGE, isolate=kind == "own")


@pytest.fixture(params=["fake", pytest.param("docker", marks=pytest.mark.docker), "own", "own-shared"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    engine = engine_of(request.param)
    can_mount = request.param != "own-shared"
    folder = Path(tempfile.mkdtemp(prefix="mr-engine-")) if can_mount else Path("/codebuild")
    for name in ("output/tmp", "readonly"):
        (folder / name).mkdir(parents=True)
    shutil.copy(RUNNER, folder / "readonly")
    made = Bench(engine=engine, folder=folder, label=f"test:{uuid.uuid4()}", can_mount=can_mount)
    yield made
    for leftover in engine.leftovers({LABEL_BUILD: made.label}):
        engine.remove(leftover.container_id)
    shutil.rmtree(folder)


def ran(shell: Shell, command: str, *, within_s: float = 20, stop: threading.Event | None = None) -> tuple[int, str]:
    said = bytearray()
    status = shell.run(command, on_output=said.extend, stop=stop or threading.Event(), deadline=time.monotonic() + within_s)
    return status, said.decode(errors="replace")


def test_it_says_what_it_is(bench: Bench) -> None:
    info = bench.engine.info()
    assert info.cpus >= 1
    assert info.memory_bytes > 0
    assert info.name


def test_an_image_that_is_there_has_a_digest_and_one_that_is_not_is_named(bench: Bench) -> None:
    assert bench.engine.ensure_image(IMAGE).digest
    began = time.monotonic()
    with pytest.raises((BuildProblem, InfraProblem)) as caught:
        engine = FakeEngine({"FAKE_PULL_FAILS": "not_found"}) if isinstance(bench.engine, FakeEngine) else bench.engine
        engine.ensure_image("nowhere/at-all:1")
    assert time.monotonic() - began < 30
    assert caught.value.reason in (Reason.IMAGE_NOT_FOUND, Reason.IMAGE_PULL)
    assert "nowhere/at-all:1" in caught.value.message


def test_commands_give_their_output_and_status(bench: Bench) -> None:
    shell, container, console = bench.shell()
    assert ran(shell, "echo hello") == (0, "hello\n")
    assert ran(shell, "exit 7")[0] == 7
    assert ran(shell, "echo still here") == (0, "still here\n")
    assert bench.engine.state(container).running
    console.close()


def test_variables_and_the_folder_carry_over(bench: Bench) -> None:
    shell, _container, console = bench.shell()
    shell.set_variables({"GIVEN": 'it\'s "quoted" $HOME'})
    assert ran(shell, 'echo "$GIVEN"') == (0, 'it\'s "quoted" $HOME\n')
    assert ran(shell, "export A=1")[0] == 0
    assert ran(shell, "B=2")[0] == 0
    assert ran(shell, "cd /")[0] == 0
    assert ran(shell, "echo $A $B; pwd") == (0, "1 2\n/\n")
    assert shell.variables()["A"] == "1"
    assert "B" not in shell.variables()
    console.close()


def test_a_stop_ends_a_command_that_would_go_on(bench: Bench) -> None:
    shell, container, console = bench.shell()
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(BuildStopped) as caught:
        ran(shell, "sleep 60", stop=stop, within_s=90)
    assert time.monotonic() - began < 15
    assert caught.value.reason is Reason.CANCELLED
    bench.engine.stop(container, 0)
    console.close()


def test_a_deadline_ends_a_command(bench: Bench) -> None:
    shell, _container, console = bench.shell()
    with pytest.raises(BuildStopped) as caught:
        ran(shell, "sleep 60", within_s=0.5)
    assert caught.value.reason is Reason.TIMEOUT
    console.close()


def test_a_container_can_be_stopped_and_removed_twice(bench: Bench) -> None:
    shell, container, console = bench.shell()
    ran(shell, "echo up")
    for _ in range(2):
        bench.engine.stop(container, 0)
    state = bench.engine.state(container)
    assert not state.running
    assert state.exit_code is not None
    assert not state.oom_killed
    while console.read(5) is not None:
        pass
    console.close()
    for _ in range(2):
        bench.engine.remove(container)
    gone = bench.engine.state(container)
    assert (gone.running, gone.exit_code) == (False, None)
    bench.engine.stop(container, 0)


def test_containers_are_found_by_their_labels(bench: Bench) -> None:
    container = bench.engine.create(bench.spec(labels={LABEL_BUILD: bench.label, "millrace.attempt": "2"}))
    for labels in ({LABEL_BUILD: bench.label}, {LABEL_BUILD: bench.label, "millrace.attempt": ""}):
        (found,) = bench.engine.leftovers(labels)
        assert found.labels["millrace.attempt"] == "2"
        assert abs(time.time() - found.created_at_s) < 60
    assert list(bench.engine.leftovers({LABEL_BUILD: bench.label, "millrace.attempt": "3"})) == []
    bench.engine.remove(container)
    assert list(bench.engine.leftovers({LABEL_BUILD: bench.label})) == []


def test_a_name_that_is_taken_is_taken_over(bench: Bench) -> None:
    name = f"millrace-test-{uuid.uuid4().hex[:12]}"
    bench.engine.create(bench.spec(name=name))
    again = bench.engine.create(bench.spec(name=name))
    assert len(list(bench.engine.leftovers({LABEL_BUILD: bench.label}))) == 1
    assert bench.engine.state(again).exit_code is None


def test_files_come_out_of_a_stopped_container(bench: Bench) -> None:
    shell, container, console = bench.shell()
    ran(shell, "mkdir -p /codebuild/output/deep")
    ran(shell, "echo inside > /codebuild/output/deep/file")
    bench.engine.stop(container, 0)
    stream = b"".join(bench.engine.copy_out(container, "/codebuild/output/deep"))
    with tarfile.open(fileobj=BytesIO(stream)) as tar:
        (member,) = [item for item in tar.getmembers() if item.isfile()]
        extracted = tar.extractfile(member)
        assert extracted is not None
        assert extracted.read() == b"inside\n"
    with pytest.raises(FileNotFoundError):
        list(bench.engine.copy_out(container, "/codebuild/output/nothing"))
    console.close()


def test_files_go_into_a_container_that_runs(bench: Bench) -> None:
    shell, container, console = bench.shell()
    ran(shell, "true")
    body = BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name in ("codebuild/output/cached/deep/a", "tmp/b"):
            entry = tarfile.TarInfo(name)
            entry.size = 5
            tar.addfile(entry, BytesIO(b"kept\n"))
    bench.engine.copy_in(container, "/", (body.getvalue()[at : at + 100] for at in range(0, len(body.getvalue()), 100)))
    assert (bench.folder / "output/cached/deep/a").read_text() == "kept\n"
    assert ran(shell, "cat /tmp/b") == (0, "kept\n")
    with pytest.raises(BuildProblem):
        bench.engine.copy_in(container, "/", [b"no tar at all " * 100])
    console.close()


def test_what_is_mounted_is_shared_and_read_only_is_kept(bench: Bench) -> None:
    shell, _container, console = bench.shell()
    ran(shell, "echo out > /codebuild/output/made.txt")
    assert (bench.folder / "output" / "made.txt").read_text() == "out\n"
    status, _said = ran(shell, "echo no > /codebuild/readonly/made.txt")
    assert (status != 0) == bench.can_mount
    assert (bench.folder / "readonly" / "made.txt").exists() != bench.can_mount
    console.close()


@pytest.fixture
def docker_bench() -> Iterator[Bench]:
    need_engine()
    folder = Path(tempfile.mkdtemp(prefix="mr-engine-"))
    for name in ("output/tmp", "readonly"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    shutil.copy(RUNNER, folder / "readonly")
    made = Bench(engine=one_docker_engine(), folder=folder, label=f"test:{uuid.uuid4()}")
    yield made
    for leftover in made.engine.leftovers({LABEL_BUILD: made.label}):
        made.engine.remove(leftover.container_id)
    shutil.rmtree(folder)


def as_user(shell: Shell, user: str | None, command: str, *, fresh: bool = False) -> tuple[int, str]:
    said = bytearray()
    until = time.monotonic() + 20
    status = shell.run(command, on_output=said.extend, stop=threading.Event(), deadline=until, user=user, fresh=fresh)
    return status, said.decode()


@pytest.mark.docker
def test_a_command_runs_as_the_user_asked_for_and_state_crosses_users(docker_bench: Bench) -> None:
    shell, _container, console = docker_bench.shell()
    assert as_user(shell, None, "export A=from-root; useradd -m worker 2>/dev/null || adduser -D worker; cd /tmp") == (0, "")
    assert as_user(shell, "worker", 'id -un; echo "$A $HOME"; export B=from-worker; cd /') == (0, "worker\nfrom-root /root\n")
    assert as_user(shell, None, 'id -un; echo "$B"; pwd') == (0, "root\nfrom-worker\n/\n")
    assert as_user(shell, "worker", "touch /root/x")[0] != 0
    assert as_user(shell, "worker", "exit 7") == (7, "")
    assert as_user(shell, "worker", "kill -9 $$")[0] == 137
    with pytest.raises(BuildProblem, match="no user 'nobody-knows'"):
        as_user(shell, "nobody-knows", "true")
    console.close()


@pytest.mark.docker
def test_a_fresh_command_leaves_nothing(docker_bench: Bench) -> None:
    shell, _container, console = docker_bench.shell()
    assert as_user(shell, None, "export A=1; cd /", fresh=True) == (0, "")
    assert as_user(shell, None, 'echo "<${A-}>"; pwd') == (0, "<>\n/tmp\n")
    console.close()


@pytest.mark.docker
def test_text_is_made_out_as_in_a_here_document(docker_bench: Bench) -> None:
    shell, _container, console = docker_bench.shell()
    shell.set_variables({"V": "1.0"})
    said = bytearray()

    def evaluate(text: str) -> str | None:
        return shell.evaluate(text, on_output=said.extend, stop=threading.Event(), deadline=time.monotonic() + 20)

    assert evaluate("plain \"quotes\" 'kept'") == "plain \"quotes\" 'kept'"
    assert evaluate('app-$V-$(echo "a b")-${UNKNOWN}') == "app-1.0-a b-"
    assert evaluate("a\\$b `echo c`") == "a$b c"
    assert not said
    assert evaluate("x-$(no-such-program)") == "x-"
    assert b"not found" in said
    assert evaluate("${V") is None
    console.close()
