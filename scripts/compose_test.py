"""`make compose-test`: the demonstration project through PostgreSQL, Redis, MinIO and two workers in containers; then once more
through workers that the scheduler starts, and ends when there is no more to do (compose.fleet.yaml).
`make compose-images`: only the images.

Makes the images, brings the stack up with the Compose tool, builds the project several times at once, checks that both workers
took part and that the artifact's object in MinIO is what the record says, and takes everything down again.
"""

import hashlib
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO, cast

import docker
from minio import Minio

from buildenv.folder import pack
from buildenv.images import tag_of
from millrace.client import Client, build_path
from millrace.errors import MillraceError

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = ROOT / "build" / "compose"
PROJECT = "millrace-test"
BUILDS = 4
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "MINIO_ROOT_PASSWORD", "MILLRACE_TOKEN", "MILLRACE_WORKER_TOKEN")


def say(text: str) -> None:
    print(f"compose-test: {text}", flush=True)


def run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-5000:]}")
    return done.stdout


def compose_tool() -> list[str]:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    sys.exit("the Compose tool is not installed; as root: apt-get install docker-compose")


def prepare_wheels() -> None:
    """What an image with Millrace in it is made of: wheels by their hashes, and our own wheel."""
    CONTEXT.mkdir(parents=True, exist_ok=True)
    wheels = CONTEXT / "wheels"
    lock = (ROOT / "requirements" / "runtime.txt").read_bytes()
    stamp = wheels / ".lock"
    if not stamp.exists() or stamp.read_bytes() != lock:
        say("fetching wheels")
        shutil.rmtree(wheels, ignore_errors=True)
        machine = platform.machine()
        platforms = [
            f"--platform={tag}_{machine}" for tag in ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34")
        ]
        run(
            *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version=3.11", *platforms),
            *("--require-hashes", "-r", "requirements/runtime.txt", "-d", str(wheels)),
        )
        stamp.write_bytes(lock)
    shutil.rmtree(CONTEXT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(CONTEXT / "dist"), ".")


def prepare_context() -> None:
    """What the Dockerfiles copy: the same, and the MinIO program."""
    prepare_wheels()
    shutil.copy(run("scripts/minio").strip(), CONTEXT / "minio")


def spare_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_until_ready(client: Client) -> None:
    until = time.monotonic() + 120
    answer: dict[str, Any] = {}
    while time.monotonic() < until:
        try:
            answer = client.ready()
            if answer["status"] == "ok":
                return
        except MillraceError as error:
            answer = {"error": error.message}
        time.sleep(0.5)
    sys.exit(f"the stack is not ready after two minutes: {answer}")


def make_project(client: Client, folder: Path) -> None:
    with tempfile.TemporaryFile() as body:
        packed = pack(folder, cast(BinaryIO, body))
        body.seek(0)
        location = client.upload(cast(BinaryIO, body), packed.size_bytes, packed.sha256)
    client.post(
        "/v1/projects",
        {
            "name": "demo",
            "source": {"type": "S3", "location": location},
            "artifacts": {"type": "S3", "packaging": "NONE"},
            "environment": {
                "type": "LINUX_CONTAINER",
                "image": "millrace/standard:latest",
                "computeType": "BUILD_GENERAL1_SMALL",
            },
        },
    )


def build_demo(client: Client) -> list[dict[str, Any]]:
    ids = [client.post("/v1/builds", {"projectName": "demo"})["id"] for _ in range(BUILDS)]
    say(f"{len(ids)} builds are queued")
    ended = []
    for build_id in ids:
        for event in client.follow(build_id):
            if event.kind == "end":
                say(f"{build_id} {event.data['state']} ({event.data['reason']})")
        ended.append(client.get(build_path(build_id)))
    return ended


def check(builds: list[dict[str, Any]], store: Minio) -> None:
    failed = [build["id"] for build in builds if build["millrace"]["state"] != "SUCCEEDED"]
    if failed:
        sys.exit(f"these builds did not succeed: {failed}")
    workers = {build["millrace"]["workerId"] for build in builds}
    say(f"workers: {', '.join(sorted(workers))}")
    if len(workers) != 2:
        sys.exit(f"{len(workers)} of 2 workers took part")
    for build in builds:
        (artifact,) = build["millrace"]["artifacts"]
        with store.get_object("millrace", artifact["key"]) as answer:
            data = answer.read()
        if (len(data), hashlib.sha256(data).hexdigest()) != (artifact["sizeBytes"], artifact["sha256"]):
            sys.exit(f"the object {artifact['key']} in MinIO is not what the record says")
        say(f"{artifact['name']}: {len(data)} bytes in MinIO, sha256 {artifact['sha256']}")


def grow_and_shrink(client: Client, compose: list[str], environment: dict[str, str]) -> None:
    """From no worker to some, by the overlay, and back to none; no build knows of it."""
    run(*compose, "-f", "compose.fleet.yaml", "up", "-d", "--scale=worker-1=0", "--scale=worker-2=0", env=environment)
    wait_until_ready(client)
    client.put(
        "/v1/fleets/default",
        {
            "provider": {
                "type": "containers",
                "image": "millrace/worker:local",
                "network": f"{PROJECT}_default",
                "workDir": environment["MILLRACE_WORK_DIR"],
                "apiUrl": "http://api:8420",
            },
            "scaling": {"minimum": 0, "maximum": 2, "shrinkAfterS": 5},
            "worker": {"slots": 1},
        },
    )
    say("the scheduler starts and ends workers from here on")
    builds = build_demo(client)
    if failed := [build["id"] for build in builds if build["millrace"]["state"] != "SUCCEEDED"]:
        sys.exit(f"these builds did not succeed: {failed}")
    if again := [build["id"] for build in builds if build["millrace"]["attempt"] != 1]:
        sys.exit(f"these builds had more than one attempt: {again}")
    workers = {build["millrace"]["workerId"] for build in builds}
    say(f"workers that came: {', '.join(sorted(workers))}")
    if not workers or not all(worker.startswith("millrace-default-g") for worker in workers):
        sys.exit("these are not workers that the scheduler started")
    engine = docker.from_env()
    until = time.monotonic() + 120
    while left := engine.containers.list(all=True, filters={"label": "millrace.fleet=default", "network": f"{PROJECT}_default"}):
        if time.monotonic() > until:
            sys.exit(f"{len(left)} workers did not leave")
        time.sleep(0.5)
    say("and all have left")


def make_images() -> int:
    """What a stack or a fleet needs: millrace/millrace:local, millrace/worker:local, and those of its servers."""
    prepare_context()
    say("making the images")
    unused = dict.fromkeys((*SECRETS, "MINIO_ROOT_USER"), "unused")  # compose wants all that the file names
    base = os.environ.get("BASE_IMAGE", tag_of("base"))
    run(*compose_tool(), "build", env={**os.environ, **unused, "DOCKER_BUILDKIT": "0", "BASE_IMAGE": base})
    return 0


def main() -> int:
    if sys.argv[1:] == ["images"]:
        return make_images()
    tool = compose_tool()
    prepare_context()
    work_dir = Path(tempfile.mkdtemp(prefix="millrace-compose-"))
    secret = {name: secrets.token_hex(20) for name in SECRETS}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")},
        **secret,
        "COMPOSE_PROJECT_NAME": PROJECT,
        "DOCKER_BUILDKIT": "0",
        "BASE_IMAGE": tag_of("base"),
        "MINIO_ROOT_USER": "millrace",
        "API_PORT": spare_port(),
        "MINIO_PORT": spare_port(),
        "MILLRACE_SLOTS": "1",
        "MILLRACE_WORK_DIR": str(work_dir),
    }
    compose = [*tool, "-f", "compose.yaml"]
    say("making the images")
    run(*compose, "build", env=environment)
    try:
        say("bringing the stack up")
        run(*compose, "up", "-d", env=environment)
        client = Client(f"http://127.0.0.1:{environment['API_PORT']}", secret["MILLRACE_TOKEN"])
        wait_until_ready(client)
        folder = Path(run(sys.executable, "demo/fetch.py", ".millrace/demo").strip())
        make_project(client, folder)
        builds = build_demo(client)
        store = Minio(
            f"127.0.0.1:{environment['MINIO_PORT']}",
            access_key="millrace",
            secret_key=secret["MINIO_ROOT_PASSWORD"],
            secure=False,
        )
        check(builds, store)
        grow_and_shrink(client, compose, environment)
    except (Exception, SystemExit):
        print(run(*compose, "logs", "--tail=60", env=environment), file=sys.stderr)
        raise
    finally:
        say("taking it down")
        run(*compose, "down", "--volumes", "--timeout", "20", env=environment)
        shutil.rmtree(work_dir, ignore_errors=True)
    left = docker.from_env().containers.list(all=True, filters={"label": f"millrace.workspaces={work_dir}"})
    if left:
        sys.exit(f"{len(left)} build containers are left")
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
