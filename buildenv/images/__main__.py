"""`python -m buildenv.images [build|tag|list] [NAME...]`: make the build images, say their tags, or what is there."""

import argparse
import sys
import time

import docker
import requests.exceptions
from docker.errors import DockerException

from buildenv.images import LABEL_RECIPE, NAMES, runtimes_from_labels, tag_of
from buildenv.images.make import ensure
from millrace.errors import MillraceError


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m buildenv.images", description="Make the build images, each once.")
    parser.add_argument("verb", nargs="?", default="build", choices=("build", "tag", "list"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(NAMES)}; all where none is given")
    parser.add_argument("--docker-host", help="address of the Docker engine; absent: Docker's own default")
    asked = parser.parse_args(arguments)
    names: list[str] = asked.names or list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        parser.error(f"no such image: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if asked.verb == "tag":
        print("\n".join(tag_of(name) for name in names))
        return 0
    try:
        if asked.verb == "list":
            _list(names, asked.docker_host)
        else:
            _build(names, asked.docker_host)
    except MillraceError as error:
        print(f"error: {error.message}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1
    except (DockerException, requests.exceptions.RequestException) as error:
        print(f"error: the Docker engine does not answer: {error}", file=sys.stderr)
        return 1
    return 0


def _build(names: list[str], docker_host: str | None) -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    for name in names:
        say(f"{ensure(name, say=say, docker_host=docker_host)} is there")


def _list(names: list[str], docker_host: str | None) -> None:
    """What is on this engine, with its size; one of another recipe than ours is of no use to this checkout."""
    client = docker.DockerClient(base_url=docker_host)
    try:
        for image in client.images.list(filters={"label": LABEL_RECIPE}):
            for tag in sorted(tag for tag in image.tags if not tag.endswith(":latest")):
                name = tag.partition(":")[0].removeprefix("millrace/")
                if name in names:
                    runtimes = runtimes_from_labels(image.labels) or {}
                    has = ", ".join(f"{runtime} {' '.join(versions)}" for runtime, versions in runtimes.items())
                    recipe = "this recipe" if tag == tag_of(name) else "another recipe"
                    print(f"{tag:<32} {image.attrs['Size'] // 10**6:>5} MB  {recipe:<14}  {has}".rstrip())
    finally:
        client.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
