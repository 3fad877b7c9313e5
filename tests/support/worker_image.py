"""Images of workers: the farm's own, and one that stands in for it, a shell that says who it is, waits, and leaves on SIGTERM.

FAKE_EXIT=N in its environment has it end at once with this status; FAKE_DEAF=1 has it hear no SIGTERM.
"""

import io
import tarfile
from pathlib import Path

import docker

from tests.support import engine_images
from tests.support.need import missing

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = "millrace-test/worker:latest"
_SCRIPT = b"""#!/bin/sh
echo "worker $MILLRACE_WORKER_ID of $MILLRACE_FLEET, told to be a $1"
if [ -n "$FAKE_EXIT" ]; then exit "$FAKE_EXIT"; fi
if [ -n "$FAKE_DEAF" ]; then trap '' TERM; else trap 'exit 0' TERM; fi
while :; do sleep 0.05; done
"""


def make_stand_in(client: docker.APIClient) -> str:
    """Make it unless it is there; its name."""
    if client.images(STAND_IN):
        return STAND_IN
    engine_images.make(client)
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        entry = tarfile.TarInfo("bin/millrace")
        entry.size, entry.mode = len(_SCRIPT), 0o755
        tar.addfile(entry, io.BytesIO(_SCRIPT))
    made = client.create_container(engine_images.BUSYBOX, command=["/bin/sh"])["Id"]
    try:
        client.put_archive(made, "/", body.getvalue())
        name, _, tag = STAND_IN.partition(":")
        client.commit(made, repository=name, tag=tag, conf={"Entrypoint": ["/bin/millrace"]})
    finally:
        client.remove_container(made, force=True)
    return STAND_IN


REAL = "millrace/millrace:local"
OF_THIS_TREE = "millrace-test/millrace:latest"
_PACKAGES = ("millrace", "api", "scheduler", "worker", "buildenv")


def make_real(client: docker.APIClient) -> str:
    """The farm's own image with this tree's code in it; its name. The image itself is made by `make compose-test`."""
    if not client.images(REAL):
        missing(f"the image {REAL}", "make compose-test makes it")
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for package in _PACKAGES:
            tar.add(ROOT / package, package, filter=lambda entry: None if "__pycache__" in entry.name else entry)
    made = client.create_container(REAL)["Id"]
    try:
        client.put_archive(made, "/opt/millrace/lib/python3.11/site-packages", body.getvalue())
        name, _, tag = OF_THIS_TREE.partition(":")
        client.commit(made, repository=name, tag=tag)
    finally:
        client.remove_container(made, force=True)
    return OF_THIS_TREE
