"""`millrace doctor`: what this machine has of what Millrace needs, what is missing, and the exact commands that bring it."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import docker
from docker.errors import DockerException
from rich.console import Console
from rich.table import Table

from millrace.settings import Settings

_ENGINE_S: Final = 60
_POSTGRES: Final = Path("/usr/lib/postgresql")
_FREE_BYTES: Final = 10 * 1024**3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. `packages` are Debian's packages that bring it; `commands` what else to do."""

    what: str
    ok: bool
    says: str
    packages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def diagnose(settings: Settings, purpose: str) -> list[Finding]:
    """Look at everything that `purpose` needs: `run` (a farm on this box), `demo`, `test` or `compose`."""
    findings = [
        _python(),
        _program("git", "git", "git", "--version"),
        _program("redis-server", "redis-server", "redis-server", "--version"),
        engine(settings),
        _disk(settings),
        _data_folder(settings),
    ]
    if purpose in ("demo", "test", "compose"):
        findings.append(_program("mmdebstrap", "mmdebstrap", "mmdebstrap", "--version"))
    if purpose == "compose":
        findings.append(_compose())
    if purpose == "test":
        findings.append(_postgres())
        findings.append(_program("openssl", "openssl", "openssl", "version"))
        findings.append(_sshd())
        findings.append(_program("busybox", "busybox", "busybox-static", "--help"))
        findings.append(_program("shellcheck", "shellcheck", "shellcheck", "--version"))
        findings.append(_program("systemd-analyze", "systemd-analyze", "systemd", "--version"))
        findings.append(_program("chromium", "chromium", "chromium", "--version"))
    return findings


def treat(findings: Sequence[Finding], settings: Settings, say: Callable[[str], None]) -> bool:
    """Bring what is missing, where that may be done: as root on Debian or Ubuntu. False where it may not."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    packages = sorted({package for finding in findings if not finding.ok for package in finding.packages})
    if packages:
        say(f"installing {' '.join(packages)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                say(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout)[-3000:]}")
                return False
    if not engine(settings).ok and settings.docker_host is None and shutil.which("dockerd") is not None:
        _start_dockerd(say)
    return True


def show(findings: Sequence[Finding], console: Console) -> bool:
    """Print the findings, and how to mend them. True where nothing is missing."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found"):
        table.add_column(column)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.ok else "[red]missing[/]", finding.what, finding.says)
    console.print(table)
    missing = [finding for finding in findings if not finding.ok]
    if not missing:
        return True
    packages = sorted({package for finding in missing for package in finding.packages})
    console.print("\nTo mend this, as root:")
    if packages:
        console.print(f"  apt-get update && apt-get install -y --no-install-recommends {' '.join(packages)}", soft_wrap=True)
    for finding in missing:
        for command in finding.commands:
            console.print(f"  {command}", soft_wrap=True)
    console.print("or, on Debian and Ubuntu: millrace doctor --install")
    return False


def _python() -> Finding:
    version = platform.python_version()
    return Finding(
        what="Python 3.11 or later", ok=sys.version_info >= (3, 11), says=version, packages=("python3", "python3-venv")
    )


def _program(what: str, program: str, package: str, question: str) -> Finding:
    path = shutil.which(program)
    if path is None:
        return Finding(what=what, ok=False, says="not installed", packages=(package,))
    try:
        done = subprocess.run([path, question], capture_output=True, text=True, check=False, timeout=10)
        says = (done.stdout or done.stderr).strip().splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(what=what, ok=False, says=f"does not run: {error}", packages=(package,))
    return Finding(what=what, ok=True, says=says[0][:70] if says else path)


def _sshd() -> Finding:
    there = any(Path(folder, "sshd").exists() for folder in ("/usr/sbin", "/usr/local/sbin"))
    return Finding(what="sshd", ok=there, says="there" if there else "not installed", packages=("openssh-server",))


def _compose() -> Finding:
    what = "Compose"
    for command in (["docker", "compose", "version", "--short"], ["docker-compose", "version", "--short"]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return Finding(what=what, ok=True, says=done.stdout.strip())
    return Finding(what=what, ok=False, says="not installed", packages=("docker-compose",))


def _postgres() -> Finding:
    servers = sorted(_POSTGRES.glob("*/bin/postgres")) if _POSTGRES.is_dir() else []
    if servers:
        return Finding(what="PostgreSQL server", ok=True, says=str(servers[-1].parent.parent.name))
    return Finding(what="PostgreSQL server", ok=False, says="not installed", packages=("postgresql",))


def engine(settings: Settings) -> Finding:
    """Whether the Docker engine answers."""
    what = "Docker engine"
    try:
        client = (
            docker.DockerClient(base_url=settings.docker_host, timeout=10)
            if settings.docker_host
            else docker.from_env(timeout=10)
        )
        try:
            version = client.version()
            options = " ".join(client.info().get("SecurityOptions") or [])
        finally:
            client.close()
    except DockerException as error:
        if shutil.which("dockerd") is None:
            return Finding(
                what=what,
                ok=False,
                says="not installed",
                packages=("docker.io", "iptables"),
                commands=("service docker start || dockerd &",),
            )
        why = "not for this user to use" if "Permission denied" in str(error) else "not running"
        mend = (
            f"usermod -aG docker {os.environ.get('USER', 'YOU')}"
            if "Permission" in str(error)
            else "service docker start || dockerd &"
        )
        return Finding(what=what, ok=False, says=why, commands=(mend,))
    says = f"{version.get('Version')} (API {version.get('ApiVersion')})"
    if "seccomp" not in options:
        says += ", without seccomp: builds are less confined than they should be"
    return Finding(what=what, ok=True, says=says)


def _disk(settings: Settings) -> Finding:
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return Finding(what="free disk", ok=free > settings.min_free_bytes, says=f"{free // 1024**3} GiB below {folder}")


def _data_folder(settings: Settings) -> Finding:
    folder = settings.home
    what = "data folder"
    if not folder.exists():
        return Finding(what=what, ok=True, says=f"{folder}, made at the first start")
    if not os.access(folder, os.W_OK):
        return Finding(what=what, ok=False, says=f"{folder} may not be written", commands=(f"chown {os.geteuid()} {folder}",))
    if folder.stat().st_mode & 0o077:
        return Finding(what=what, ok=False, says=f"{folder} may be read by others", commands=(f"chmod 700 {folder}",))
    return Finding(what=what, ok=True, says=str(folder))


def _start_dockerd(say: Callable[[str], None]) -> None:
    """By the machine's own service manager where there is one, else by itself, in a session of its own."""
    say("starting the Docker engine")
    if Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "start", "docker"], check=False, capture_output=True)
    else:
        _forget_dead_dockerd()
        with open("/var/log/dockerd.log", "ab") as out:
            subprocess.Popen(["dockerd"], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/")
    until = time.monotonic() + _ENGINE_S
    while time.monotonic() < until:
        try:
            client = docker.from_env(timeout=5)
            try:
                client.ping()
                return
            finally:
                client.close()
        except DockerException:
            time.sleep(0.3)
    say("the Docker engine did not come up in a minute; its log is /var/log/dockerd.log")


def _forget_dead_dockerd() -> None:
    """A dockerd that was killed leaves its pid file, and a new one would not start."""
    for name in ("/var/run/docker.pid", "/var/run/docker/containerd/containerd.pid"):
        pid_file = Path(name)
        if not pid_file.exists():
            continue
        number = pid_file.read_text().strip()
        try:
            command = Path(f"/proc/{number}/comm").read_text()
        except OSError:
            command = ""
        if command.strip() not in ("dockerd", "containerd"):
            pid_file.unlink()
