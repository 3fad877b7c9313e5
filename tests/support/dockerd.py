"""A dockerd of a test's own, beside the machine's: its own data, its own socket, and a bridge of its own that leads nowhere.

Told to have no bridge (`--bridge=none`), a dockerd would delete the machine's `docker0`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
from docker.errors import DockerException

from tests.support import engine_images
from tests.support.need import missing


@dataclass
class Dockerd:
    """An engine that may be killed, frozen and started again. Its images are those of `engine_images`."""

    folder: Path
    bridge: str
    live_restore: bool = False
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def socket(self) -> Path:
        return self.folder / "docker.sock"

    @property
    def url(self) -> str:
        """As `MILLRACE_DOCKER_HOST` takes it."""
        return f"unix://{self.socket}"

    def client(self) -> docker.APIClient:
        return docker.APIClient(base_url=self.url, version="auto", timeout=30)

    def start(self, within_s: float = 60) -> None:
        """Start it, and wait until it answers."""
        (self.folder / "docker.pid").unlink(missing_ok=True)
        command = ["dockerd", "--data-root", self.folder / "data", "--exec-root", self.folder / "run"]
        command += ["--pidfile", self.folder / "docker.pid", "--host", self.url, f"--bridge={self.bridge}", "--iptables=false"]
        command += ["--ip-forward=false", "--ip-masq=false", *(["--live-restore"] if self.live_restore else [])]
        with open(self.folder / "dockerd.log", "ab") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + within_s
        while True:
            with contextlib.suppress(DockerException, OSError):
                client = self.client()
                client.close()
                return
            if self.process.poll() is not None or time.monotonic() > until:
                said = (self.folder / "dockerd.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"dockerd did not start: {said}")
            time.sleep(0.1)

    def kill(self) -> None:
        """As a crash would: its containerd goes with it, its containers do not."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)
        self.process = None

    def stop(self) -> None:
        """In good order, with its containers."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process = None


@contextlib.contextmanager
def running(*, live_restore: bool = False) -> Iterator[Dockerd]:
    """An engine for as long as the block takes, with small images in it."""
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        missing("a dockerd that this user may start", "apt-get install docker.io, and be root")
    with (
        tempfile.TemporaryDirectory(prefix="mr-engine-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as stack,
    ):
        engine = Dockerd(Path(folder), stack.enter_context(_bridge()), live_restore)
        engine.start()
        try:
            client = engine.client()
            engine_images.make(client, engine.url)
            client.close()
            yield engine
        finally:
            with contextlib.suppress(DockerException, OSError):
                client = engine.client()
                for one in client.containers(all=True):
                    client.remove_container(one["Id"], force=True)
                client.close()
            engine.stop()
            for mount in sorted(_mounts_below(folder), reverse=True):
                subprocess.run(["umount", "-l", mount], check=False)


@contextlib.contextmanager
def _bridge() -> Iterator[str]:
    number = secrets.randbelow(250) + 1
    name = f"mr-{secrets.token_hex(4)}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "address", "add", f"10.213.{number}.1/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)


def _mounts_below(folder: str) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]
