"""Containers that stand for tasks of ECS on Fargate: the bundle's volume, and one container for each build that waits.

They are made as ECS makes them of the task definition in docs/fargate.md: the bundle's container fills the volume and ends; the
build's container is of the build's image, has the volume at /millrace, and starts `/millrace/millrace worker --once` as its first
process, with Docker's default rights. They share the host's network, as the farm listens on loopback.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import docker
from docker.errors import APIError, ImageNotFound, NotFound

from millrace.client import Client
from tests.support.farm import Farm
from tests.support.need import missing

BUNDLE = "millrace/bundle:local"
LABEL = "millrace.test.task"
LOOK_EVERY_S = 0.2


@dataclass
class Tasks:
    """Starts them. `environment` is laid over what each is told; `pulled` renames images, as a registry does."""

    farm: Farm
    token: str
    engine: Any
    volume: str
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    label: str = field(default_factory=lambda: uuid4().hex)
    logs: dict[str, str] = field(default_factory=dict)

    def start(self, build_id: str, image: str, **changes: Any) -> Any:
        """A task for a build."""
        options: dict[str, Any] = {
            "detach": True,
            "entrypoint": ["/millrace/millrace", "worker", "--once"],
            "environment": {
                "MILLRACE_API_URL": self.farm.api_url,
                "MILLRACE_WORKER_TOKEN": self.token,
                "MILLRACE_ENGINE": "own",
                "MILLRACE_OWN_IMAGE": image,
                "MILLRACE_BUILD": build_id,
                "MILLRACE_LOG_FORMAT": "json",
                **self.environment,
            },
            "volumes": {self.volume: {"bind": "/millrace", "mode": "ro"}},
            "network_mode": "host",
            "mem_limit": "1g",
            "memswap_limit": "1g",
            "labels": {LABEL: self.label},
            **self.options,
            **changes,
        }
        return self.engine.containers.run(image, **options)

    def log_of(self, task: Any) -> str:
        """What the worker wrote."""
        text: str = task.logs().decode(errors="replace")
        return text

    def all(self) -> list[Any]:
        """Those that are there, ended or not."""
        found: list[Any] = self.engine.containers.list(all=True, filters={"label": f"{LABEL}={self.label}"})
        return found

    def remove(self) -> None:
        """End and remove them all."""
        for task in self.all():
            with suppress(NotFound, APIError):
                task.remove(force=True)

    @contextmanager
    def for_each_build(self) -> Iterator[None]:
        """While this lasts, each attempt of a build that waits gets a task."""
        over = threading.Event()
        client = Client(self.farm.api_url, self.farm.token)
        thread = threading.Thread(target=self._serve, args=(client, over), name="tasks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(60)
            client.close()
            self.remove()

    def _serve(self, client: Client, over: threading.Event) -> None:
        started: dict[tuple[str, int], Any] = {}
        while not over.wait(LOOK_EVERY_S):
            for build in client.get("/v1/builds", state="QUEUED", limit=20)["builds"]:
                key = build["id"], len(build["millrace"]["attempts"])
                if key not in started:
                    started[key] = self.start(build["id"], build["environment"]["image"])
            for key, task in list(started.items()):
                with suppress(NotFound):
                    task.reload()
                    if task.status == "exited":
                        self.logs[key[0]] = self.log_of(task)
                        task.remove()


@contextmanager
def tasks_of(farm: Farm, environment: Mapping[str, str] | None = None) -> Iterator[Tasks]:
    """Those of a farm. Skips or fails where the bundle is not made."""
    engine = docker.from_env(timeout=120)
    try:
        try:
            engine.images.get(BUNDLE)
        except ImageNotFound:
            missing(f"the image {BUNDLE}", "make bundle")
        made = farm.cli("token", "create", "tasks", "--scope", "worker")
        volume = engine.volumes.create()
        tasks = Tasks(farm, made.stdout.strip(), engine, volume.name, dict(environment or {}))
        try:
            engine.containers.run(BUNDLE, remove=True, volumes={volume.name: {"bind": "/millrace", "mode": "rw"}})
            yield tasks
        finally:
            tasks.remove()
            volume.remove(force=True)
    finally:
        engine.close()
