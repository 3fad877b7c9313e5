"""Small images of our own for tests of the engine: made from this machine's programs, so that no registry is needed.

Each has busybox and differs in what its /bin/sh is. `bash` also has a real bash next to it.
"""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker

BUSYBOX = "millrace-test/busybox:latest"
DASH = "millrace-test/dash:latest"
BASH = "millrace-test/bash:latest"
NO_SHELL = "millrace-test/no-shell:latest"
FOREIGN = "millrace-test/foreign:latest"
HOSTILE = "millrace-test/hostile:latest"

FOREIGN_ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00\x01\x00\x00\x00" + bytes(44)
"""The head of a program for arm64: enough for the kernel to refuse it."""


def make(client: docker.APIClient, host: str | None = None) -> None:
    """Make those that are not at `host` yet. Raises FileNotFoundError where this machine has no busybox, dash or bash."""
    busybox = {"bin/busybox": _program("busybox")}
    _import(client, BUSYBOX, busybox, {"bin/sh": "busybox"}, host=host)
    dash = busybox | _with_libraries("dash") | _with_libraries("bash")
    _import(client, DASH, dash, {"bin/sh": "dash"}, host=host)
    _import(client, BASH, dash, {"bin/sh": "bash"}, host=host)
    _import(client, NO_SHELL, {"hello": b"hello"}, {}, host=host)
    _import(client, FOREIGN, {"bin/sh": FOREIGN_ELF}, {}, platform="linux/arm64", host=host)
    if not client.images(HOSTILE):
        _commit(client, BUSYBOX, HOSTILE, SURPRISES)


SURPRISES: dict[str, object] = {
    "Entrypoint": ["/bin/false"],
    "Cmd": ["x"],
    "User": "1234",
    "WorkingDir": "/surprise",
    "StopSignal": "SIGUSR1",
    "Volumes": {"/volume": {}},
    "Healthcheck": {"Test": ["CMD", "/bin/touch", "/healthcheck-ran"], "Interval": 1_000_000_000},
    "Env": ["FROM_IMAGE=yes", "PATH=/bin"],
}
"""All that an image can set to get in the way of a build."""


def _commit(client: docker.APIClient, base: str, name: str, config: dict[str, object]) -> None:
    made = client.create_container(base, command=["/bin/sh"])
    client.commit(made["Id"], repository=name.partition(":")[0], tag="latest", conf=config)
    client.remove_container(made["Id"])


def _import(
    client: docker.APIClient,
    name: str,
    files: dict[str, bytes],
    links: dict[str, str],
    *,
    platform: str | None = None,
    host: str | None = None,
) -> None:
    if client.images(name):
        return
    if "bin/busybox" in files:
        links = {f"bin/{applet}": "busybox" for applet in _applets() if f"bin/{applet}" not in files} | links
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for path in ("tmp", "proc", "sys", "dev", "etc", "root", "data"):
            folder = tarfile.TarInfo(path)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
        for path, target in links.items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    arguments = ["docker", *(["--host", host] if host else []), "import", *([f"--platform={platform}"] if platform else [])]
    subprocess.run([*arguments, "-", name], input=body.getvalue(), check=True, capture_output=True)


def _program(name: str) -> bytes:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"this machine has no {name}")
    return Path(found).read_bytes()


def _applets() -> list[str]:
    said = subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True)
    return said.stdout.split()


def _with_libraries(name: str) -> dict[str, bytes]:
    program = shutil.which(name)
    files = {f"bin/{name}": _program(name)}
    said = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True)
    for library in _paths(said.stdout):
        files[library.lstrip("/")] = Path(library).read_bytes()
    return files


def _paths(text: str) -> Iterator[str]:
    return (word for word in text.split() if word.startswith("/"))
