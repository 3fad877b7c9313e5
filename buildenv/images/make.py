"""Makes the build images with the Docker engine, each once per recipe."""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any, Final

import docker
import requests.exceptions
import yaml
from docker.errors import APIError, ContainerError, DockerException, ImageNotFound

from buildenv.images import LABEL_RECIPE, LABEL_RUNTIMES, NAMES, tag_of
from millrace.errors import InfraProblem
from millrace.vocabulary import Reason

_HERE: Final = Path(__file__).parent
_ENGINE_S: Final = 600
_PULL_S: Final = 30
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")  # The engine paints what a step says on stderr.
_RUNTIMES_FILE: Final = "/codebuild/image/config/runtimes.yml"
Say = Callable[[str], None]


class ImageBuildError(InfraProblem):
    """An image could not be made."""

    code = "image_build_failed"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, reason=Reason.IMAGE_PULL, hint=hint)


def ensure(name: str, *, say: Say, docker_host: str | None = None) -> str:
    """The tag of `name`, which is there when this returns; it and its parents are made where they are missing.

    `docker_host` as in DOCKER_HOST; None is Docker's own default. Raises ImageBuildError that says what to do.
    """
    try:
        client = docker.DockerClient(base_url=docker_host, timeout=_ENGINE_S)
    except (DockerException, requests.exceptions.RequestException) as error:
        raise ImageBuildError(
            f"the Docker engine does not answer: {error}", hint="'millrace doctor --install' sets it up."
        ) from error
    try:
        if _missing(client, name):
            with _one_at_a_time(say):
                for step in NAMES[: NAMES.index(name) + 1]:
                    if _missing(client, step):
                        _make(client, step, say)
        for step in NAMES[: NAMES.index(name) + 1]:
            _call_latest(client, step)
    except APIError as error:
        raise ImageBuildError(f"the Docker engine refused: {error.explanation or error}") from error
    except (DockerException, requests.exceptions.RequestException) as error:
        raise ImageBuildError(f"the Docker engine failed while {tag_of(name)} was made: {error}") from error
    finally:
        client.close()
    return tag_of(name)


def _missing(client: docker.DockerClient, name: str) -> bool:
    try:
        client.images.get(tag_of(name))
    except ImageNotFound:
        return True
    return False


def _call_latest(client: docker.DockerClient, name: str) -> None:
    """Move `latest` to the recipe in force; a parent may be gone where its child is there, which does no harm."""
    with suppress(ImageNotFound):
        client.images.get(tag_of(name)).tag(f"millrace/{name}", "latest")


@contextmanager
def _one_at_a_time(say: Say) -> Iterator[None]:
    """Two that want the same image at once would make it twice; the second one waits, and then finds it there."""
    with (Path(tempfile.gettempdir()) / f"millrace-images-{os.getuid()}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process makes images; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(client: docker.DockerClient, name: str, say: Say) -> None:
    tag = tag_of(name)
    began = time.monotonic()
    say(f"making {tag}")
    if name == NAMES[0]:
        _make_base(client, tag, say)
    else:
        _make_child(client, name, tag, tag_of(NAMES[NAMES.index(name) - 1]), say)
    size_mb = client.images.get(tag).attrs["Size"] // 10**6
    say(f"made {tag}: {size_mb} MB in {time.monotonic() - began:.0f} s")


def _make_base(client: docker.DockerClient, tag: str, say: Say) -> None:
    bootstrap = shutil.which("mmdebstrap")
    if bootstrap is None or _registry_answers(client):
        try:
            _build(client, _HERE / "base", tag, {}, {LABEL_RECIPE: _hash(tag)}, say)
        except ImageBuildError as error:
            if bootstrap is None:
                raise ImageBuildError(
                    f"{error.message}\nWithout a registry that has debian:bookworm-slim, mmdebstrap is needed.",
                    hint="apt-get install mmdebstrap debian-archive-keyring",
                ) from error
            say("that did not work; making it from Debian's packages instead")
        else:
            return
    else:
        say("no registry answers; making it from Debian's packages with mmdebstrap")
    _bootstrap(client, tag)


def _bootstrap(client: docker.DockerClient, tag: str) -> None:
    recipe = _HERE / "base"
    with tempfile.TemporaryDirectory(prefix="millrace-base-") as folder:
        tree = Path(folder) / "base.tar"
        command = [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join((recipe / 'packages.txt').read_text().split())}",
            f"--dpkgopt={recipe / 'lean.conf'}",
            f'--customize-hook=chroot "$1" sh -e < {shlex.quote(str(recipe / "finish.sh"))}',
            "bookworm",
            str(tree),
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=PIPE, stderr=STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise ImageBuildError(
                f"mmdebstrap failed:\n{done.stdout}",
                hint="Is a Debian mirror reachable, and is debian-archive-keyring installed?",
            )
        changes = [f"LABEL {LABEL_RECIPE}={_hash(tag)}", "ENV LANG=C.UTF-8", 'CMD ["/bin/bash"]']
        repository, _, version = tag.rpartition(":")
        client.api.import_image_from_file(str(tree), repository=repository, tag=version, changes=changes)


def _hash(tag: str) -> str:
    return tag.rpartition(":")[2]


def _registry_answers(client: docker.DockerClient) -> bool:
    """True where the engine has, or can pull, the image that Debian publishes; asked with little patience."""
    patient = client.api.timeout
    client.api.timeout = _PULL_S
    try:
        client.images.pull("debian", tag="bookworm-slim")
    except (DockerException, requests.exceptions.RequestException):
        return False
    finally:
        client.api.timeout = patient
    return True


def _make_child(client: docker.DockerClient, name: str, tag: str, parent: str, say: Say) -> None:
    """Made in two steps: what it declares of its runtimes is read from what was installed, and not from a list of wishes."""
    raw = f"{tag}-raw"
    _build(client, _HERE / name, raw, {"BASE": parent}, {}, say)
    try:
        runtimes = _read_runtimes(client, raw, (_HERE / name / "runtimes.sh").read_text())
        say("has " + ", ".join(f"{runtime} {' '.join(versions)}" for runtime, versions in runtimes.items()))
        with tempfile.TemporaryDirectory(prefix="millrace-image-") as folder:
            (Path(folder) / "Dockerfile").write_text(f'FROM {raw}\nCOPY runtimes.yml {_RUNTIMES_FILE}\nCMD ["/bin/bash"]\n')
            (Path(folder) / "runtimes.yml").write_text(_as_codebuild_lists_them(runtimes))
            labels = {LABEL_RUNTIMES: json.dumps(runtimes), LABEL_RECIPE: _hash(tag)}
            _build(client, Path(folder), tag, {}, labels, lambda _: None)
    finally:
        client.images.remove(raw, noprune=True)


def _read_runtimes(client: docker.DockerClient, image: str, questions: str) -> dict[str, list[str]]:
    try:
        output = client.containers.run(image, ["sh", "-ec", questions], remove=True, network_mode="none")
    except ContainerError as error:
        raise ImageBuildError(f"{image} does not say what it has:\n{error.stderr!r}") from error
    runtimes: dict[str, list[str]] = {}
    for line in output.decode().splitlines():
        runtime, _, version = line.partition(" ")
        runtimes.setdefault(runtime, []).append(version)
    return runtimes


def _as_codebuild_lists_them(runtimes: Mapping[str, Sequence[str]]) -> str:
    """The file in which CodeBuild's images list their runtimes, for scripts that look there. They are all installed already."""
    listed = {
        runtime: {"versions": {version: {"commands": [f"echo {runtime} {version}"]} for version in versions}}
        for runtime, versions in runtimes.items()
    }
    text: str = yaml.safe_dump({"version": 0.1, "runtimes": listed}, sort_keys=False)
    return text


def _build(
    client: docker.DockerClient, context: Path, tag: str, args: Mapping[str, str], labels: Mapping[str, str], say: Say
) -> None:
    """Raises ImageBuildError with the whole output of the step that failed."""
    output: list[str] = []
    problem: str | None = None
    events: Iterator[dict[str, Any]] = client.api.build(
        path=str(context),
        tag=tag,
        buildargs=dict(args),
        labels=dict(labels),
        rm=True,
        forcerm=True,
        decode=True,
        nocache=True,  # Who makes an image again wants today's packages in it.
        network_mode="bridge",
    )
    for event in events:
        text = _COLOUR.sub("", str(event.get("stream") or event.get("status") or ""))
        if text.startswith("Step "):
            output.clear()
            say(text.split("     ")[0].rstrip())
        output.append(text)
        problem = event.get("error", problem)
    if problem is not None:  # Only now, when the engine's answer is read to its end: that frees the connection.
        raise ImageBuildError(f"{tag} could not be made: {problem}\n{''.join(output)}")
