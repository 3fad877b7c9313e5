"""The engine of the worker's own container, beyond what every engine must do. `shared`: without namespaces for the build."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from buildenv.engine import Console, ContainerSpec, Mount
from buildenv.own.engine import OwnEngine
from buildenv.shell import RUNNER, RUNNER_COMMAND, Shell
from millrace.errors import BuildProblem, InfraProblem
from millrace.vocabulary import Reason
from tests.support.farm import wait_until
from tests.support.need import missing


@dataclass
class Sandbox:
    engine: OwnEngine
    container: str
    console: Console
    shell: Shell

    def ran(self, command: str) -> tuple[int, str]:
        said = bytearray()
        status = self.shell.run(command, on_output=said.extend, stop=threading.Event(), deadline=time.monotonic() + 20)
        return status, said.decode(errors="replace")


def spec_of(folder: Path, **changes: object) -> ContainerSpec:
    mounts = tuple(Mount(source=folder / name, target=f"/codebuild/{name}") for name in ("output", "readonly"))
    values: dict[str, object] = {"name": "build", "image": "any", "command": RUNNER_COMMAND, "mounts": mounts, **changes}
    return ContainerSpec(**values)  # type: ignore[arg-type]


@pytest.fixture(params=["isolated", "shared"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if os.geteuid() != 0:
        missing("the rights of root", "run the tests as root")
    isolated = request.param == "isolated"
    folder = Path(tempfile.mkdtemp(prefix="mr-own-")) if isolated else Path("/codebuild")
    for name in ("output/tmp", "readonly"):
        (folder / name).mkdir(parents=True)
    shutil.copy(RUNNER, folder / "readonly")
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "MILLRACE_WORKER_TOKEN": "secret", "ECS_AGENT_URI": "http://x"}
    engine = OwnEngine(environ, isolate=isolated)
    container = engine.create(spec_of(folder))
    console = engine.attach(container)
    engine.start(container)
    made = Sandbox(engine, container, console, Shell(engine, container, console, folder / "output/tmp", cwd="/tmp", grace_s=1))
    yield made
    engine.remove(container)
    shutil.rmtree(folder)


def running(words: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if words.encode() in (entry / "cmdline").read_bytes().replace(b"\0", b" "):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_the_build_gets_its_own_environment_only(sandbox: Sandbox) -> None:
    status, said = sandbox.ran("env")
    assert status == 0
    assert "LANG=C.UTF-8" in said
    assert "HOME=/root" in said
    assert "MILLRACE" not in said
    assert "ECS_" not in said


def test_the_build_has_no_more_rights_than_in_a_container_of_docker(sandbox: Sandbox) -> None:
    _, said = sandbox.ran("grep -E 'Cap(Prm|Eff|Bnd)|NoNewPrivs' /proc/self/status; cat /proc/self/oom_score_adj; ulimit -c")
    assert [line.split()[-1] for line in said.splitlines()] == [*["00000000a00404fb"] * 3, "1", "500", "0"]


def test_whatever_a_build_started_goes_with_it(sandbox: Sandbox) -> None:
    sandbox.ran("for n in 1 2 3; do setsid sh -c 'trap : TERM HUP; sleep 4711 & sleep 4711' & done; sleep 0.3")
    assert running("sleep 4711")
    sandbox.engine.stop(sandbox.container, 0)
    assert not running("sleep 4711")
    state = sandbox.engine.state(sandbox.container)
    assert (state.running, state.exit_code) == (False, 137)


def test_what_never_stays_the_same_process_is_ended_too(sandbox: Sandbox) -> None:
    """Each puts another in its place and ends, faster than a list of processes can be read."""
    hopper = Path("/tmp/4712.sh")
    hopper.write_text("sh /tmp/4712.sh &\n")
    sandbox.ran("for n in 1 2 3 4 5; do sh /tmp/4712.sh & done; sleep 0.2")
    began = time.monotonic()
    sandbox.engine.stop(sandbox.container, 0)
    assert time.monotonic() - began < 10
    hopper.unlink()
    assert not running("/tmp/4712.sh")


def test_the_last_output_is_read_though_a_process_keeps_the_stream_open(sandbox: Sandbox) -> None:
    sandbox.ran("true")
    sandbox.console.write(b"hello again\n")
    wait_until(lambda: b"ready" in (sandbox.console.read(1) or b""), 5)
    sandbox.engine.stop(sandbox.container, 0)
    assert sandbox.console.read(5) is None
    assert sandbox.console.read(5) is None


def test_a_worker_that_goes_leaves_nothing_running(sandbox: Sandbox) -> None:
    sandbox.ran("setsid sleep 4713 &")
    sandbox.console.close()  # what the kernel does when the worker is killed
    wait_until(lambda: not running("sleep 4713"), 10)
    wait_until(lambda: not sandbox.engine.state(sandbox.container).running, 10)


def test_a_program_that_cannot_run_is_the_images_fault(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    for command, why in ((("/no/such/sh",), "No such file"), (("/etc/passwd",), "Permission denied")):
        container = sandbox.engine.create(spec_of(tmp_path, name="other", mounts=(), command=command))
        with pytest.raises(BuildProblem, match=why) as caught:
            sandbox.engine.start(container)
        assert caught.value.reason is Reason.BAD_IMAGE
        sandbox.engine.remove(container)


def test_without_mounts_a_folder_elsewhere_is_refused_and_a_file_is_copied(tmp_path: Path) -> None:
    engine = OwnEngine({}, isolate=False)
    (tmp_path / "folder").mkdir()
    mount = Mount(source=tmp_path / "folder", target=str(tmp_path / "there"))
    container = engine.create(spec_of(tmp_path, mounts=(mount,), command=("/bin/sh", "-c", "true")))
    with pytest.raises(InfraProblem, match="nothing can be mounted here"):
        engine.start(container)
    engine.remove(container)
    (tmp_path / "bundle.crt").write_text("trusted\n")
    mount = Mount(source=tmp_path / "bundle.crt", target=str(tmp_path / "inside/ca.crt"), read_only=True)
    container = engine.create(spec_of(tmp_path, mounts=(mount,), command=("/bin/cat", str(tmp_path / "inside/ca.crt"))))
    console = engine.attach(container)
    engine.start(container)
    assert console.read(5) == b"trusted\n"
    engine.remove(container)


def test_an_image_that_this_container_is_not_made_from_is_refused() -> None:
    engine = OwnEngine({}, image="millrace/base:latest", digest="sha256:1")
    assert engine.ensure_image("millrace/base:latest").digest == "sha256:1"
    with pytest.raises(InfraProblem, match="runs no build in other:1"):
        engine.ensure_image("other:1")
    assert OwnEngine({}).ensure_image("any:1").digest
