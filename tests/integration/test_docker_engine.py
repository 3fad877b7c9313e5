"""The Docker engine and the phase runner for real: shells of every kind, hostile commands, limits, much output."""

import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import docker
import pytest

from buildenv import daemonstore
from buildenv.daemonstore import DaemonStore
from buildenv.docker_engine import DockerEngine
from buildenv.engine import LABEL_BUILD, ContainerSpec, Mount
from buildenv.shell import RUNNER, RUNNER_COMMAND, ContainerDied, Shell
from millrace.errors import BuildProblem
from millrace.vocabulary import Reason
from tests.support import engine_images
from tests.support.farm import need_engine
from tests.support.need import missing

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def images() -> None:
    need_engine()
    for program in ("busybox", "dash", "bash"):
        if shutil.which(program) is None:
            missing(program, f"apt-get install {'busybox-static' if program == 'busybox' else program}")
    client = docker.APIClient(version="auto")
    engine_images.make(client)
    client.close()


@cache
def one_docker_engine() -> DockerEngine:
    """One for all tests: an engine keeps its connections."""
    return DockerEngine()


class Box:
    """A started container with a shell in it."""

    def __init__(self, image: str, *, language: str = "/bin/sh", more: tuple[Mount, ...] = (), **changes: object) -> None:
        self.engine = one_docker_engine()
        self.folder = Path(tempfile.mkdtemp(prefix="mr-box-"))
        (self.folder / "output" / "tmp").mkdir(parents=True)
        (self.folder / "readonly").mkdir()
        shutil.copy(RUNNER, self.folder / "readonly")
        self.label = f"test:{uuid.uuid4()}"
        values: dict[str, object] = {
            "name": f"millrace-test-{uuid.uuid4().hex[:12]}",
            "image": image,
            "command": RUNNER_COMMAND,
            "mounts": (
                Mount(source=self.folder / "output", target="/codebuild/output"),
                Mount(source=self.folder / "readonly", target="/codebuild/readonly", read_only=True),
                *more,
            ),
            "labels": {LABEL_BUILD: self.label},
            "memory_bytes": 128 * 1024**2,
            "cpus": 0.5,
            "pids": 64,
            "network": "none",
            "hostname": "build",
            **changes,
        }
        self.container = self.engine.create(ContainerSpec(**values))  # type: ignore[arg-type]
        self.console = self.engine.attach(self.container)
        try:
            self.engine.start(self.container)
        except BuildProblem:
            self.close()
            raise
        self.shell = Shell(
            self.engine, self.container, self.console, self.folder / "output" / "tmp", shell=language, cwd="/tmp", grace_s=1
        )

    def run(self, command: str, within_s: float = 30) -> tuple[int, str]:
        said = bytearray()
        status = self.shell.run(command, on_output=said.extend, stop=threading.Event(), deadline=time.monotonic() + within_s)
        return status, said.decode(errors="replace")

    def close(self) -> None:
        self.console.close()
        self.engine.remove(self.container)
        shutil.rmtree(self.folder)


@contextmanager
def opened(image: str, **changes: object) -> Iterator[Box]:
    """A box that is closed whatever happens in it."""
    box = Box(image, **changes)  # type: ignore[arg-type]
    try:
        yield box
    finally:
        box.close()


SHELLS = [
    (engine_images.BUSYBOX, "/bin/sh"),
    (engine_images.DASH, "/bin/sh"),
    (engine_images.BASH, "/bin/sh"),
    (engine_images.BASH, "bash"),
]


@pytest.fixture(params=SHELLS, ids=lambda pair: f"{pair[0].partition('/')[2].partition(':')[0]}-{pair[1].rpartition('/')[2]}")
def box(request: pytest.FixtureRequest, images: None) -> Iterator[Box]:
    image, shell = request.param
    made = Box(image, language=shell)
    yield made
    made.close()


def test_values_of_any_kind_survive_from_command_to_command(box: Box) -> None:
    value = "a 'single' \"double\" $DOLLAR `tick` \\back\nline two\n\tünï €\n\n end "
    box.shell.set_variables({"GIVEN": value})
    assert box.run("KEPT=$GIVEN; export SENT=$GIVEN; EMPTY=; export UNSET_LATER=x") == (0, "")
    assert box.run('printf %s "$KEPT"') == (0, value)
    assert box.run('printf %s "$SENT" && sh -c \'printf %s "$SENT"\'') == (0, value + value)
    assert box.run("unset UNSET_LATER; echo [${EMPTY-unset}] ${UNSET_LATER-unset}") == (0, "[] unset\n")
    assert box.run("echo ${UNSET_LATER-unset}") == (0, "unset\n")
    assert box.shell.variables()["SENT"] == value


def test_nothing_but_state_leaks_from_one_command_to_the_next(box: Box) -> None:
    assert box.run("set -e; set -u; trap 'echo trapped' EXIT; IFS=,; umask 027")[0] == 0
    status, said = box.run("false; echo $NOT_SET; set -- a,b; for x in $1; do echo $x; done")
    assert (status, said) == (0, "\na,b\n")


def test_each_way_to_end_a_command_has_its_status(box: Box) -> None:
    assert box.run("exit 3")[0] == 3
    assert box.run("(exit 4)")[0] == 4
    assert box.run("kill -9 $$")[0] == 137
    assert box.run("no-such-command-here")[0] == 127
    assert box.run("touch /tmp/x && /tmp/x")[0] == 126
    assert box.run("exec echo replaced") == (0, "replaced\n")
    assert box.run("if then")[0] != 0
    assert box.run("echo fine") == (0, "fine\n")


def test_a_folder_that_is_gone_is_survived(box: Box) -> None:
    assert box.run("mkdir -p /tmp/gone && cd /tmp/gone && rmdir /tmp/gone")[0] == 0
    status, said = box.run("pwd")
    assert (status, said.splitlines()[-1]) == (0, "/tmp")
    assert "the working directory /tmp/gone is gone" in said


def test_stdin_is_empty_and_background_processes_hold_nothing_up(box: Box) -> None:
    assert box.run("cat; read -r x || echo no input") == (0, "no input\n")
    began = time.monotonic()
    assert box.run("sleep 30 & echo begun") == (0, "begun\n")
    assert time.monotonic() - began < 5


def test_output_of_any_bytes_arrives_unchanged(box: Box) -> None:
    said = bytearray()
    command = "i=0; while [ $i -lt 3 ]; do printf '\\036\\000\\377no mark 1 0\\036'; i=$((i+1)); done; printf end"
    status = box.shell.run(command, on_output=said.extend, stop=threading.Event(), deadline=time.monotonic() + 20)
    assert (status, bytes(said)) == (0, b"\x1e\x00\xffno mark 1 0\x1e" * 3 + b"end")


def test_much_output_streams_whole(box: Box) -> None:
    total = 0

    def count(data: bytes) -> None:
        nonlocal total
        assert len(data) < 4 * 1024 * 1024
        total += len(data)

    status = box.shell.run("head -c 50000000 /dev/zero", on_output=count, stop=threading.Event(), deadline=time.monotonic() + 60)
    assert (status, total) == (0, 50_000_000)


def test_bash_keeps_functions_and_arrays(images: None) -> None:
    box = Box(engine_images.BASH, language="bash")
    assert box.run("greet() { echo \"hi $1\"; }; list=(a 'b c'); declare -A map=([k]=v)")[0] == 0
    assert box.run('greet you; echo "${list[1]} ${map[k]}"') == (0, "hi you\nb c v\n")
    box.close()


def test_a_shell_or_program_that_the_image_lacks_is_named(images: None) -> None:
    box = Box(engine_images.BUSYBOX, language="bash")
    with pytest.raises(BuildProblem, match="has no bash") as caught:
        box.run("echo x")
    assert caught.value.reason is Reason.BAD_IMAGE
    box.close()
    for image in (engine_images.NO_SHELL, engine_images.FOREIGN):
        with pytest.raises(BuildProblem) as caught, opened(image) as foreign:
            foreign.run("echo x")
        assert caught.value.reason is Reason.BAD_IMAGE


def test_an_images_entry_point_user_and_folder_are_set_aside(images: None) -> None:
    box = Box(engine_images.HOSTILE)
    assert box.run("id -u; pwd; echo $FROM_IMAGE") == (0, "0\n/tmp\nyes\n")
    box.close()


def test_what_a_daemon_in_a_container_kept_is_there_in_the_next_but_for_its_containers(images: None, tmp_path: Path) -> None:
    """As far as this goes without privileges, which a daemon needs: its files are written by hand."""
    for number in (1, 2):
        store = DaemonStore(tmp_path / "docker")
        folder = store.take("demo")
        assert folder is not None
        box = Box(engine_images.BUSYBOX, more=(Mount(source=folder, target=daemonstore.INSIDE),))
        status, said = box.run(
            "cd /var/lib/docker && find . -type f && mkdir -p image volumes && echo x > image/a && echo x > volumes/b"
        )
        assert (status, said) == (0, "" if number == 1 else "./image/a\n")
        box.close()
        store.close()


def test_a_privileged_container_is_made_as_one_and_no_other_is(images: None) -> None:
    """Made, not started: this is not the place for one."""
    engine, client = one_docker_engine(), docker.APIClient(version="auto")
    name = f"millrace-test-{uuid.uuid4().hex[:12]}"
    made = engine.create(ContainerSpec(name=name, image=engine_images.BUSYBOX, command=("/bin/sh",), privileged=True))
    try:
        host = client.inspect_container(made)["HostConfig"]
        assert (host["Privileged"], host["CapDrop"], host["Init"]) == (True, None, True)
        assert "no-new-privileges" not in " ".join(host["SecurityOpt"] or [])
    finally:
        engine.remove(made)
        client.close()


def test_a_live_container_is_confined(images: None) -> None:
    box = Box(engine_images.BUSYBOX)
    client = docker.APIClient(version="auto")
    facts = client.inspect_container(box.container)
    client.close()
    host = facts["HostConfig"]
    assert host["Privileged"] is False
    assert "ALL" in host["CapDrop"]
    assert not {"SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "NET_RAW", "SYS_MODULE"} & {
        c.removeprefix("CAP_") for c in host["CapAdd"]
    }
    assert "no-new-privileges" in " ".join(host["SecurityOpt"])
    assert (host["PidsLimit"], host["Memory"], host["MemorySwap"]) == (64, 128 * 1024**2, 128 * 1024**2)
    assert host["CpuQuota"] == host["CpuPeriod"] // 2
    assert (host["NanoCpus"], host["LogConfig"]["Type"], host["AutoRemove"], host["Init"]) == (0, "none", False, True)
    assert not host["Devices"]
    assert facts["Config"]["Labels"][LABEL_BUILD] == box.label
    assert box.run("ls /var/run/docker.sock 2>/dev/null; mount -t tmpfs none /data 2>/dev/null")[0] != 0
    box.close()


def test_a_fork_bomb_meets_the_limit_of_processes(images: None) -> None:
    box = Box(engine_images.BUSYBOX)
    status, _said = box.run("i=0; while [ $i -lt 200 ]; do sleep 5 & i=$((i+1)); done; echo all")
    assert status != 0
    box.close()


def test_memory_beyond_the_limit_is_known_as_such(images: None) -> None:
    box = Box(engine_images.BUSYBOX)
    try:
        status, _said = box.run("tail /dev/zero", within_s=60)
        assert status == 137
        assert box.engine.state(box.container).oom_killed
    except ContainerDied as died:
        assert died.oom
        assert died.reason is Reason.OOM
    box.close()


def test_killing_every_process_ends_in_a_clear_error(images: None) -> None:
    box = Box(engine_images.BUSYBOX)
    with pytest.raises(ContainerDied, match="container ended"):
        box.run("kill -9 -1; sleep 5")
    box.close()
