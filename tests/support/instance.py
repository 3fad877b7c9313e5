"""An EC2 instance for tests of its user data: a container with systemd as its first process, and with a Docker engine of its own.

What AWS has around an instance is served in a network namespace, on the container's network (`linklocal`).
"""

import contextlib
import io
import json
import re
import secrets
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
import docker

from buildenv.images import tag_of
from tests.support.linklocal import METADATA, PORT
from tests.support.worker_image import make_stand_in

ROOT: Final = Path(__file__).resolve().parents[2]
IMAGE: Final = "millrace-test/instance:2"
REGION: Final = "eu-central-1"
REGISTRY: Final = "127.0.0.1:5000"
KEYS: Final = {"access_key": "ASIATEST", "secret_key": "a/secret+key", "token": "a/long+token=="}
_NAMES: Final = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST "
    "NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE "
    "SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM "
    "BLOCK_SUSPEND AUDIT_READ"
)
CAPABILITIES: Final = tuple(_NAMES.split())
"""By their numbers (linux/capability.h)."""
_PACKAGES: Final = "ca-certificates curl docker.io docker-registry iproute2 iptables jq systemd-sysv"
_REGISTRY: Final = (
    r"version: 0.1\nstorage: {filesystem: {rootdirectory: /var/lib/docker-registry}}\nhttp: {addr: 127.0.0.1:5000}\n"
)
_DOCKERFILE: Final = f"""
FROM {tag_of("base")}
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {_PACKAGES} \\
    && systemctl mask docker.service docker.socket docker-registry.service systemd-networkd.service systemd-resolved.service \\
    && printf '{_REGISTRY}' > /etc/docker/registry/config.yml
STOPSIGNAL SIGRTMIN+3
CMD ["/lib/systemd/systemd"]
"""


@dataclass
class Instance:
    """The running instance, and the address at which its AWS answers."""

    container: str
    aws: str

    def run(self, *command: str, stdin: bytes = b"", within_s: float = 300) -> "subprocess.CompletedProcess[bytes]":
        """Run a command on the instance."""
        return subprocess.run(
            ["docker", "exec", "-i", self.container, *command], input=stdin, capture_output=True, timeout=within_s, check=False
        )

    def says(self, *command: str) -> str:
        """What a command prints. Raises AssertionError where it fails."""
        done = self.run(*command)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout.decode().strip()

    def client(self, service: str) -> Any:
        """A client of the instance's AWS."""
        return boto3.session.Session(
            aws_access_key_id=KEYS["access_key"], aws_secret_access_key=KEYS["secret_key"], aws_session_token=KEYS["token"]
        ).client(service, region_name=REGION, endpoint_url=self.aws)  # type: ignore[call-overload]

    def boot(self, head: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
        """Do what cloud-init does with user data: `head`, which the launch template adds, and deploy/user-data.sh."""
        script = head.encode() + (ROOT / "deploy" / "user-data.sh").read_bytes()
        self.run("sh", "-c", "umask 077; cat > /root/user-data", stdin=script)
        given = [f"{name}={value}" for name, value in environment.items()]
        return self.run("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *given, "bash", "/root/user-data", within_s=600)


@contextlib.contextmanager
def running(metadata: dict[str, str]) -> Iterator[Instance]:
    """An instance that has come up, whose metadata are these, and whose registry holds a stand-in for the worker's image."""
    engine = docker.APIClient(timeout=600)
    name = f"millrace-test-{secrets.token_hex(4)}"
    network = engine.create_network(name, driver="bridge", check_duplicate=True)["Id"]
    try:
        _make_image(engine)
        stand_in = make_stand_in(engine)
        container = engine.create_container(
            IMAGE, name=name, host_config=_like_a_host(engine, name), volumes=["/var/lib/docker"]
        )["Id"]
        try:
            engine.start(container)
            pool = engine.inspect_network(network)["IPAM"]["Config"][0]
            with _surroundings(network, pool["Subnet"], metadata) as address:
                one = Instance(container, f"http://{address}:{PORT}")
                _come_up(one)
                one.says("mount", "-o", "remount,rw", "/sys")
                one.says("ip", "route", "add", f"{METADATA}/32", "via", address)
                _fill_registry(one, stand_in)
                yield one
        finally:
            engine.remove_container(container, force=True, v=True)
    finally:
        engine.remove_network(network)
        engine.close()


def _like_a_host(engine: docker.APIClient, network: str) -> dict[str, Any]:
    """As near to `privileged` as this machine's own rights allow: more than it has itself, an engine gives to no container."""
    bound = int(re.search(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)  # type: ignore[index]
    made: dict[str, Any] = engine.create_host_config(
        network_mode=network,
        cap_drop=["ALL"],
        cap_add=[name for number, name in enumerate(CAPABILITIES) if bound >> number & 1],
        security_opt=["seccomp=unconfined", "apparmor=unconfined"],
        tmpfs={"/run": "exec", "/run/lock": "", "/tmp": ""},
        binds=["/sys/fs/cgroup:/sys/fs/cgroup:rw"],
        device_cgroup_rules=["a *:* rwm"],
    )
    return {**made, "CgroupnsMode": "host", "MaskedPaths": [], "ReadonlyPaths": []}


def _make_image(engine: docker.APIClient) -> None:
    if engine.images(IMAGE):
        return
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(_DOCKERFILE.encode())
        tar.addfile(entry, io.BytesIO(_DOCKERFILE.encode()))
    said = [*engine.build(fileobj=io.BytesIO(context.getvalue()), custom_context=True, tag=IMAGE, rm=True, decode=True)]
    assert engine.images(IMAGE), said[-20:]


@contextlib.contextmanager
def _surroundings(network: str, subnet: str, metadata: dict[str, str]) -> Iterator[str]:
    """AWS, on the bridge of a network of the engine; its address there."""
    name, bridge = f"mr{secrets.token_hex(4)}", f"br-{network[:12]}"
    address = subnet.partition("/")[0].rpartition(".")[0] + ".250"
    width = subnet.partition("/")[2]
    _ip("netns", "add", name)
    try:
        _ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        _ip("link", "set", f"{name}a", "master", bridge, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("link", "set", f"{name}b", "up"),
            ("addr", "add", f"{address}/{width}", "dev", f"{name}b"),
            ("addr", "add", f"{METADATA}/32", "dev", f"{name}b"),
        ):
            _ip("-n", name, *command)
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "tests.support.linklocal"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"metadata": metadata, **KEYS}) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ready\n"
            yield address
        finally:
            process.stdin.close()
            process.wait(30)
            process.stdout.close()
    finally:
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _come_up(one: Instance) -> None:
    until = time.monotonic() + 60
    while one.run("systemctl", "is-system-running").stdout.strip() not in (b"running", b"degraded"):
        assert time.monotonic() < until, one.run("systemctl", "list-jobs").stdout
        time.sleep(0.2)


def _fill_registry(one: Instance, image: str) -> None:
    """Put the image where the user data finds it: in a registry on the instance itself, the one kind that asks for no TLS."""
    one.says("systemctl", "unmask", "docker.service", "docker.socket", "docker-registry.service")
    one.says("systemctl", "start", "docker.service", "docker-registry.service")
    saved = subprocess.run(["docker", "save", image], capture_output=True, check=True).stdout
    assert one.run("docker", "load", stdin=saved).returncode == 0
    one.says("docker", "tag", image, f"{REGISTRY}/millrace-worker:1")
    until = time.monotonic() + 60
    while one.run("docker", "push", f"{REGISTRY}/millrace-worker:1").returncode != 0:
        assert time.monotonic() < until, one.says("journalctl", "-u", "docker-registry", "-n", "20")
        time.sleep(0.5)
    one.says("docker", "rmi", image, f"{REGISTRY}/millrace-worker:1")
    one.says("systemctl", "stop", "docker.service", "docker.socket")
    one.says("systemctl", "disable", "docker.service", "docker.socket")
