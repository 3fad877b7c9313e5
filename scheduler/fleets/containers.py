"""Workers in containers of a Docker engine, as compose.yaml has them; the engine is also that of their builds.

A container's name is the instance's id and its worker's. What belongs to whom is said by labels, so that farms and fleets may
share an engine. A container that has ended is removed by whoever looks next: a worker that left leaves nothing.
"""

import ipaddress
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final
from urllib.parse import urlsplit

import docker
import requests
import sqlalchemy as sa
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Mount

from millrace import clock
from millrace.errors import FieldProblem, InvalidInput, ProviderTrouble
from millrace.fleet import ContainersProvider
from millrace.log import get_logger
from millrace.settings import Settings
from millrace.vocabulary import Trouble
from scheduler.fleets.provider import Instance, InstanceState, Order, WaitingBuild

log = get_logger(__name__)
LABEL_FARM: Final = "millrace.farm"
LABEL_FLEET: Final = "millrace.fleet"
LABEL_GENERATION: Final = "millrace.generation"
LABEL_GROWING: Final = "millrace.growing"
"""Of the container by whose name those exclude each other who start workers; it is never started. Since when, in ms."""
ENGINE_SOCKET: Final = "/var/run/docker.sock"
STOP_S: Final = 120
"""How long the engine gives a worker whom it stops for others, or with itself: as compose.yaml has it."""
RELEASE_S: Final = 15.0
"""How long a worker that we end has to hand its builds back and go. It has none by then: it left, or it never came."""
CALL_S: Final = 60
GROW_S: Final = 60.0
"""How long one call starts workers; what is wanted then, the next one starts."""
GROWING_MS: Final = 180_000
"""When whoever grew has died: later than a call, and the last answer that it may still wait for."""
_OURS: Final = ("WORKER_ID", "WORKER_TOKEN", "FLEET", "GENERATION", "API_URL", "BROKER_URL", "WORK_DIR")


@dataclass(frozen=True, kw_only=True)
class _Container:
    """One container of this fleet, as the engine lists it."""

    id: str
    name: str
    state: str
    created_ms: int
    labels: Mapping[str, str]


def farm_of(settings: Settings) -> str:
    """What tells the containers of this farm from those of others: made from where its records and its API are."""
    records = sa.make_url(settings.database).set(password=None)
    said = str(records) if settings.database_url is None else f"{records} {settings.public}"
    return sha256(said.encode()).hexdigest()[:12]


class Containers:
    """See `provider.Provider`."""

    def __init__(self, fleet: str, shape: ContainersProvider, settings: Settings) -> None:
        self._fleet, self._shape, self._settings = fleet, shape, settings
        self._farm = farm_of(settings)
        self._client: docker.APIClient | None = None

    def close(self) -> None:
        """Hang up."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def check(self) -> None:
        if problems := [*self._wrong_settings()]:
            lines = "".join(f"\n  {problem.field} {problem.what}" for problem in problems)
            raise InvalidInput(f"no workers can be started in containers like this:{lines}", fields=problems)
        with self._talking() as engine:
            engine.inspect_image(self._shape.image)  # type: ignore[no-untyped-call]  # the types leave it out
            if self._shape.network not in ("bridge", "host"):
                engine.inspect_network(self._shape.network)

    def find(self) -> Sequence[Instance]:
        with self._talking() as engine:
            return [_instance(one) for one in self._there(engine)]

    def grow_to(self, total: int, order: Order, waiting: Sequence[WaitingBuild] = ()) -> None:
        with self._talking() as engine:
            if len([one for one in self._there(engine) if one.state != "created"]) >= total:
                return
            with self._growing(engine) as alone:
                if alone:
                    self._grow(engine, total, order)

    def release(self, ids: Sequence[str]) -> None:
        with self._talking() as engine:
            ending = [one for one in self._listed(engine) if one.name in ids]
            for one in ending:
                if one.state in ("running", "paused"):
                    _unless_gone(engine.kill, one.id, "SIGTERM")
            until = time.monotonic() + RELEASE_S
            ended = {one.id for one in ending}
            while time.monotonic() < until and any(one.id in ended and one.state == "running" for one in self._listed(engine)):
                time.sleep(0.1)
            for one in ending:
                _remove(engine, one.id)
                log.info("instance.released", fleet=self._fleet, instance=one.name)

    def protect(self, ids: Sequence[str]) -> None:
        """Nothing: an engine ends no container by itself, and starts none again that has ended."""

    def _wrong_settings(self) -> Iterator[FieldProblem]:
        if self._settings.worker_token is None:
            yield FieldProblem(field="MILLRACE_WORKER_TOKEN", what="is not set for the scheduler, which gives it to the workers")
        for field, address in (("provider.apiUrl", self._api_url), ("provider.brokerUrl", self._broker_url)):
            if problem := _unreachable(address, self._shape.network):
                yield FieldProblem(field=field, what=problem)
        if not self._shape.work_dir.startswith("/"):
            yield FieldProblem(field="provider.workDir", what="is no absolute path")
        if self._shape.network == "none":
            yield FieldProblem(field="provider.network", what="none lets no worker reach the farm")
        for name in self._shape.environment:
            if name.removeprefix("MILLRACE_") in _OURS and name.startswith("MILLRACE_"):
                yield FieldProblem(field=f"provider.environment.{name}", what="is set by the farm itself")

    @property
    def _api_url(self) -> str:
        return self._shape.api_url or self._settings.api

    @property
    def _broker_url(self) -> str:
        return self._shape.broker_url or self._settings.broker

    def _listed(self, engine: docker.APIClient) -> list[_Container]:
        """All of this fleet, oldest first."""
        wanted = [f"{LABEL_FARM}={self._farm}", f"{LABEL_FLEET}={self._fleet}"]
        said = [_container(one) for one in engine.containers(all=True, filters={"label": wanted})]
        return sorted((one for one in said if LABEL_GROWING not in one.labels), key=lambda one: (one.created_ms, one.name))

    def _there(self, engine: docker.APIClient) -> list[_Container]:
        """Those that have not ended; those that have are removed, and those that whoever made them did not live to start."""
        there = []
        for one in self._listed(engine):
            forgotten = one.state == "created" and clock.now_ms() - one.created_ms > GROWING_MS
            if one.state in ("exited", "dead") or forgotten:
                self._bury(engine, one)
            else:
                there.append(one)
        return there

    def _bury(self, engine: docker.APIClient, one: _Container) -> None:
        """Remove a container that ended by itself; where its worker did not just leave, say what it said last."""
        try:
            state = engine.inspect_container(one.id)["State"]
            if state["ExitCode"] == 0:
                log.info("instance.ended", fleet=self._fleet, instance=one.name)
            else:
                said = engine.logs(one.id, tail=5).decode(errors="replace").strip()
                log.warning("instance.ended", fleet=self._fleet, instance=one.name, status=state["ExitCode"], said=said[-1000:])
        except NotFound:
            return
        _remove(engine, one.id)

    @contextmanager
    def _growing(self, engine: docker.APIClient) -> Iterator[bool]:
        """Whether we are alone in starting workers of this fleet. The engine gives a name once only, and that is the lock."""
        name = f"millrace-{self._farm}-{self._fleet}.growing"
        labels = {LABEL_FARM: self._farm, LABEL_FLEET: self._fleet, LABEL_GROWING: str(clock.now_ms())}
        try:
            lock = engine.create_container(self._shape.image, name=name, labels=labels)["Id"]
        except APIError as error:
            if error.status_code != requests.codes.conflict:
                raise
            self._forget_dead_grower(engine, name)
            yield False
            return
        try:
            yield True
        finally:
            _remove(engine, lock)

    def _forget_dead_grower(self, engine: docker.APIClient, name: str) -> None:
        try:
            found = engine.inspect_container(name)
        except NotFound:
            return
        since = int((found["Config"].get("Labels") or {}).get(LABEL_GROWING, "0"))
        if clock.now_ms() - since > GROWING_MS:
            _remove(engine, found["Id"])  # by its id: another may have the name by now

    def _grow(self, engine: docker.APIClient, total: int, order: Order) -> None:
        until = time.monotonic() + GROW_S
        there = self._there(engine)
        for one in there:
            if one.state == "created":  # by one that died before it was started, or whose order was another: made anew
                _remove(engine, one.id)
        for _ in range(total - sum(one.state != "created" for one in there)):
            if time.monotonic() > until:
                return
            self._start(engine, order)

    def _start(self, engine: docker.APIClient, order: Order) -> None:
        name = f"millrace-{self._fleet[:40]}-g{order.generation}-{self._farm[:6]}-{secrets.token_hex(5)}"
        made = engine.create_container(
            self._shape.image,
            command=["worker"],
            name=name,
            environment=self._environment(name, order),
            labels={LABEL_FARM: self._farm, LABEL_FLEET: self._fleet, LABEL_GENERATION: str(order.generation)},
            stop_timeout=STOP_S,
            host_config=engine.create_host_config(
                init=True,
                restart_policy={"Name": "no"},
                network_mode=self._shape.network,
                log_config=LogConfig(type="json-file", config={"max-size": "10m", "max-file": "3"}),
                # A work folder that is not there is made; a socket must be there, and not become a folder.
                binds=[f"{self._shape.work_dir}:{self._shape.work_dir}"],
                mounts=[Mount(target=ENGINE_SOCKET, source=self._shape.socket, type="bind")],
            ),
        )["Id"]
        try:
            engine.start(made)
        except (DockerException, requests.RequestException):
            _remove(engine, made)
            raise
        log.info("instance.started", fleet=self._fleet, instance=name, generation=order.generation)

    def _environment(self, name: str, order: Order) -> dict[str, str]:
        token = self._settings.worker_token
        if token is None:
            raise ProviderTrouble(
                Trouble.CREDENTIALS,
                "the scheduler has no token for the workers that it starts",
                hint="Set MILLRACE_WORKER_TOKEN for the scheduler, too.",
            )
        return {
            **self._shape.environment,
            **order.environment,
            "MILLRACE_FLEET": self._fleet,
            "MILLRACE_WORKER_ID": name,
            "MILLRACE_API_URL": self._api_url,
            "MILLRACE_BROKER_URL": self._broker_url,
            "MILLRACE_WORKER_TOKEN": token.get_secret_value(),
            "MILLRACE_WORK_DIR": self._shape.work_dir,
        }

    @contextmanager
    def _talking(self) -> Iterator[docker.APIClient]:
        """The engine, and its errors as ProviderTrouble."""
        host = self._shape.docker_host or self._settings.docker_host
        try:
            if self._client is None:
                self._client = docker.APIClient(base_url=host, version="auto", timeout=CALL_S)
            yield self._client
        except ImageNotFound as error:
            raise ProviderTrouble(
                Trouble.MISSING,
                f"the engine has no image {self._shape.image}",
                hint=f"Load it on the engine's host: 'docker pull {self._shape.image}', or make it as docs/fleets.md says.",
            ) from error
        except NotFound as error:
            raise ProviderTrouble(Trouble.MISSING, f"the engine lacks what a worker needs: {_words(error)}") from error
        except APIError as error:
            refused = error.status_code is not None and error.status_code < 500
            raise ProviderTrouble(
                Trouble.MISSING if refused else Trouble.AWAY,
                f"the engine did not do it: {_words(error)}",
                hint="Do the fleet's socket, workDir and network fit the engine's host?",
            ) from error
        except (DockerException, requests.RequestException) as error:
            raise ProviderTrouble(
                Trouble.AWAY,
                f"the Docker engine at {host or ENGINE_SOCKET} does not answer: {str(error)[:300]}",
                hint="The scheduler needs its socket, or dockerHost in the fleet's provider.",
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ProviderTrouble(Trouble.AWAY, f"the engine's answer cannot be read: {error!r}") from error


def _container(said: Mapping[str, Any]) -> _Container:
    return _Container(
        id=said["Id"],
        name=str(said["Names"][0]).lstrip("/"),
        state=said["State"],
        created_ms=int(said["Created"]) * 1000,
        labels=said["Labels"],
    )


def _instance(one: _Container) -> Instance:
    states = {"created": InstanceState.BOOTING, "removing": InstanceState.STOPPING}
    generation = one.labels.get(LABEL_GENERATION, "")
    return Instance(
        id=one.name,
        state=states.get(one.state, InstanceState.RUNNING),
        launched_ms=one.created_ms,
        generation=int(generation) if generation.isdecimal() else None,
    )


def _unreachable(address: str, network: str) -> str:
    """Why a worker in a container reaches nothing at this address; "" where it may."""
    parts = urlsplit(address)
    if parts.scheme in ("redis+socket", "unix") or parts.hostname is None:
        return "is a socket on this box, which no container reaches: give one of the network"
    if network == "host":
        return ""
    try:
        is_loopback = ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        is_loopback = parts.hostname == "localhost"
    return (
        f"{parts.hostname} is the container itself, inside one: give the host's address, or use network host"
        if is_loopback
        else ""
    )


def _unless_gone(call: Any, *arguments: Any, **options: Any) -> None:
    """Do it; a container that is not there, does not run, or is being removed, is fine."""
    try:
        call(*arguments, **options)
    except APIError as error:
        if error.status_code not in (requests.codes.not_found, requests.codes.conflict):
            raise


def _remove(engine: docker.APIClient, container_id: str) -> None:
    _unless_gone(engine.remove_container, container_id, v=True, force=True)


def _words(error: APIError) -> str:
    return str(error.explanation or error)[:300]
