"""What every provider of workers keeps (`scheduler.fleets.provider`). A provider joins by a line in PLACES."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException
from pydantic import SecretStr

from millrace.fleet import ContainersProvider, Ec2Provider, Scaling
from millrace.settings import Settings
from scheduler.fleets import notes
from scheduler.fleets.containers import LABEL_FARM, Containers, farm_of
from scheduler.fleets.ec2 import Ec2
from scheduler.fleets.fargate import Fargate
from scheduler.fleets.process import ProcessProvider
from scheduler.fleets.provider import InstanceState, Order, Provider, WaitingBuild
from tests.support import aws as clouds
from tests.support.autoscaling import a_group
from tests.support.aws import Aws
from tests.support.cluster import a_cluster, shape_of
from tests.support.farm import Farm, running_farm, wait_until
from tests.support.need import missing
from tests.support.worker_image import make_stand_in

_numbers = itertools.count(1)


@dataclass(kw_only=True)
class Place:
    """Where a provider is tried. `new` makes one for a fleet by its name; `vanish` has an instance go by itself."""

    new: Callable[[str], Provider]
    vanish: Callable[[str], None]
    environment: dict[str, str] = field(default_factory=dict)
    for_each_build: bool = False
    """Whether it starts an instance for each build that waits."""

    def order(self, fleet: str) -> Order:
        return Order(fleet=fleet, generation=3, environment=self.environment)

    def waiting(self, count: int) -> Sequence[WaitingBuild]:
        builds = [f"demo:{number:032x}" for number in range(count)] if self.for_each_build else []
        return [
            WaitingBuild(build_id=build, attempt_no=1, image="millrace/standard:latest", cpus=1, memory_bytes=2**30)
            for build in builds
        ]


@contextmanager
def of_process(request: pytest.FixtureRequest) -> Iterator[Place]:
    farm: Farm = request.getfixturevalue("farm")
    home = farm.home / "data"
    fleets: set[str] = set()

    def new(fleet: str) -> Provider:
        fleets.add(fleet)
        return ProcessProvider(fleet, home)

    def vanish(instance: str) -> None:
        run = wait_until(lambda: notes.runs(home).get(instance))
        assert run is not None
        wait_until(lambda: f'"worker_id": "{instance}"' in farm.part_log("worker"), 60)  # before that, a signal is a crash
        os.kill(run.pid, signal.SIGTERM)

    try:
        yield Place(new=new, vanish=vanish, environment={"MILLRACE_ENGINE": "fake"})
    finally:
        for fleet in fleets:
            provider = ProcessProvider(fleet, home)
            provider.release([one.id for one in provider.find()])


@contextmanager
def of_containers(request: pytest.FixtureRequest) -> Iterator[Place]:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    try:
        engine = docker.APIClient(timeout=60)
    except DockerException:
        missing("a Docker engine", "millrace doctor --install")
    settings = Settings(data_dir=tmp_path, worker_token=SecretStr("mr_wrk_x"))
    shape = ContainersProvider(
        image=make_stand_in(engine),
        work_dir=str(tmp_path / "work"),
        api_url="http://192.0.2.1:8420",
        broker_url="redis://192.0.2.1:6379/0",
    )
    with ExitStack() as stack:
        stack.callback(engine.close)

        def new(fleet: str) -> Provider:
            made = Containers(fleet, shape, settings)
            stack.callback(made.close)
            return made

        try:
            yield Place(new=new, vanish=lambda name: engine.kill(name))
        finally:
            for one in engine.containers(all=True, filters={"label": f"{LABEL_FARM}={farm_of(settings)}"}):
                engine.remove_container(one["Id"], force=True)


@contextmanager
def of_ec2(request: pytest.FixtureRequest) -> Iterator[Place]:
    aws: Aws = request.getfixturevalue("aws")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, value in clouds.CREDENTIALS.items():
            patch.setenv(name, value)
        groups: dict[str, str] = {}

        def new(fleet: str) -> Provider:
            if fleet not in groups:
                groups[fleet] = stack.enter_context(a_group(aws, fleet))
            shape = Ec2Provider(group=groups[fleet], region=clouds.REGION, endpoint_url=aws.url)
            made = Ec2(fleet, shape, Scaling(maximum=10))
            stack.callback(made.close)
            return made

        yield Place(new=new, vanish=lambda instance: _end(aws, instance))


def _end(aws: Aws, instance: str) -> None:
    """A machine ends, and its group has noticed and wants none in its place."""
    groups = aws.client("autoscaling")
    groups.terminate_instance_in_auto_scaling_group(InstanceId=instance, ShouldDecrementDesiredCapacity=True)


@contextmanager
def of_fargate(request: pytest.FixtureRequest) -> Iterator[Place]:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    aws: Aws = request.getfixturevalue("aws")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, value in clouds.CREDENTIALS.items():
            patch.setenv(name, value)
        cluster = stack.enter_context(a_cluster(aws))
        farm = Settings(data_dir=tmp_path, api_url="http://192.0.2.1:8420")

        def new(fleet: str) -> Provider:
            made = Fargate(fleet, shape_of(aws, cluster), farm)
            stack.callback(made.close)
            return made

        def vanish(task: str) -> None:
            aws.client("ecs").stop_task(cluster=cluster, task=task)

        yield Place(new=new, vanish=vanish, for_each_build=True)


PLACES: dict[str, Callable[[pytest.FixtureRequest], AbstractContextManager[Place]]] = {
    "process": of_process,
    "containers": of_containers,
    "ec2": of_ec2,
    "fargate": of_fargate,
}


MARKS = {"process": [pytest.mark.redis, pytest.mark.docker], "containers": [pytest.mark.docker]}


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    """One that has no workers but those that are ordered."""
    with running_farm(MILLRACE_WORKERS="0") as started:
        yield started


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    with clouds.running() as server:
        yield server


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in PLACES])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with PLACES[request.param](request) as made:
        yield made


@pytest.fixture
def fleet() -> str:
    return f"builders-{next(_numbers)}"


def ids_of(provider: Provider) -> list[str]:
    """Of those that are there and not on their way out."""
    return sorted(one.id for one in provider.find() if one.state is not InstanceState.STOPPING)


def grown(place: Place, provider: Provider, fleet: str, total: int) -> list[str]:
    """So many instances that are there."""
    provider.grow_to(total, place.order(fleet), place.waiting(total))
    wait_until(lambda: len(ids_of(provider)) == total)
    return ids_of(provider)


def test_it_can_work_as_it_is_set(place: Place, fleet: str) -> None:
    place.new(fleet).check()
    assert list(place.new(fleet).find()) == []


def test_it_starts_what_is_wanted_and_no_more_when_asked_again(place: Place, fleet: str) -> None:
    provider = place.new(fleet)
    first = grown(place, provider, fleet, 2)
    provider.grow_to(2, place.order(fleet), place.waiting(2))
    provider.grow_to(1, place.order(fleet), place.waiting(1))
    assert ids_of(provider) == first, "growing never ends one"
    assert set(first) < set(grown(place, provider, fleet, 3))


def test_instances_say_when_and_for_which_generation_they_were_started(place: Place, fleet: str) -> None:
    provider = place.new(fleet)
    grown(place, provider, fleet, 1)
    (one,) = wait_until(lambda: [one for one in provider.find() if one.launched_ms])
    assert (one.generation, len(one.id) <= 100) == (3, True)
    assert one.launched_ms is not None
    assert one.launched_ms > 1_700_000_000_000


def test_two_that_grow_at_once_do_not_double(place: Place, fleet: str) -> None:
    providers = [place.new(fleet) for _ in range(3)]
    go = threading.Barrier(len(providers))

    def grow(provider: Provider) -> None:
        go.wait()
        provider.grow_to(4, place.order(fleet), place.waiting(4))

    threads = [threading.Thread(target=grow, args=(provider,)) for provider in providers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids_of(providers[0])) == 4


def test_it_ends_those_that_are_named_and_none_comes_for_them(place: Place, fleet: str) -> None:
    provider = place.new(fleet)
    one, other, last = grown(place, provider, fleet, 3)
    provider.release([one, last])
    wait_until(lambda: [instance.id for instance in provider.find()] == [other])
    provider.release([one, last])
    provider.grow_to(1, place.order(fleet), place.waiting(1))
    assert ids_of(provider) == [other]
    provider.release([other])
    wait_until(lambda: not provider.find())


def test_what_nobody_knows_is_none_to_end_or_to_protect(place: Place, fleet: str) -> None:
    provider = place.new(fleet)
    there = grown(place, provider, fleet, 1)
    provider.release(["i-00000000000000000", "no such thing"])
    provider.protect(["i-00000000000000000", *there])
    provider.protect(there)
    provider.release([])
    assert ids_of(provider) == there


def test_it_remembers_nothing_so_another_object_knows_as_much(place: Place, fleet: str) -> None:
    there = grown(place, place.new(fleet), fleet, 2)
    another = place.new(fleet)
    assert ids_of(another) == there
    another.release(there)
    wait_until(lambda: not place.new(fleet).find())


def test_fleets_leave_one_another_alone(place: Place, fleet: str) -> None:
    one, other = place.new(fleet), place.new(f"{fleet}-b")
    mine, theirs = grown(place, one, fleet, 1), grown(place, other, f"{fleet}-b", 2)
    assert not set(mine) & set(theirs)
    one.release(theirs)
    assert ids_of(other) == theirs


def test_one_that_ended_by_itself_is_not_there(place: Place, fleet: str) -> None:
    provider = place.new(fleet)
    one, other = grown(place, provider, fleet, 2)
    place.vanish(one)
    wait_until(lambda: ids_of(provider) == [other])
    assert len(grown(place, provider, fleet, 2)) == 2
