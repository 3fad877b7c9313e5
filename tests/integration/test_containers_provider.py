"""Workers in containers of the real engine: what the contract (tests/contract/test_providers.py) does not say of them."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import pytest
from pydantic import SecretStr

from millrace.errors import InvalidInput, ProviderTrouble
from millrace.fleet import ContainersProvider
from millrace.settings import Settings
from millrace.vocabulary import Trouble
from scheduler.fleets import containers
from scheduler.fleets.containers import LABEL_FARM, LABEL_FLEET, LABEL_GROWING, Containers, farm_of
from scheduler.fleets.provider import InstanceState, Order
from tests.support.farm import need_engine, wait_until
from tests.support.worker_image import make_stand_in

pytestmark = pytest.mark.docker
FLEET = "builders"
ORDER = Order(fleet=FLEET, generation=7, environment={"MILLRACE_SLOTS": "3"})
TOKEN = "mr_wrk_very-secret"


@dataclass
class Host:
    engine: docker.APIClient
    settings: Settings
    made: list[Containers]

    def provider(self, **changes: Any) -> Containers:
        shape = {
            "image": make_stand_in(self.engine),
            "workDir": str(self.settings.home / "work"),
            "apiUrl": "http://192.0.2.1:8420",
            "brokerUrl": "redis://:pass-word@192.0.2.1:6379/0",
            **changes,
        }
        self.made.append(Containers(FLEET, ContainersProvider.model_validate(shape), self.settings))
        return self.made[-1]

    def there(self) -> list[dict[str, Any]]:
        """All of this farm, as the engine shows them."""
        label = f"{LABEL_FARM}={farm_of(self.settings)}"
        return [self.engine.inspect_container(one["Id"]) for one in self.engine.containers(all=True, filters={"label": label})]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    need_engine()
    made = Host(docker.APIClient(timeout=60), Settings(data_dir=tmp_path, worker_token=SecretStr(TOKEN)), [])
    try:
        yield made
    finally:
        for one in made.there():
            made.engine.remove_container(one["Id"], force=True)
        for provider in made.made:
            provider.close()
        made.engine.close()


def test_a_worker_gets_what_compose_gives_it_and_secrets_stay_out_of_labels_and_logs(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    provider = host.provider(environment={"MILLRACE_LOG_LEVEL": "DEBUG", "MILLRACE_SLOTS": "9"})
    provider.grow_to(1, ORDER)
    (one,) = host.there()
    (found,) = provider.find()
    assert found.id == one["Name"].lstrip("/")
    assert (found.state, found.generation) == (InstanceState.RUNNING, 7)
    assert FLEET in found.id
    environment = dict(line.split("=", 1) for line in one["Config"]["Env"])
    assert (
        environment.items()
        >= {
            "MILLRACE_WORKER_ID": found.id,
            "MILLRACE_FLEET": FLEET,
            "MILLRACE_SLOTS": "3",
            "MILLRACE_LOG_LEVEL": "DEBUG",
            "MILLRACE_API_URL": "http://192.0.2.1:8420",
            "MILLRACE_BROKER_URL": "redis://:pass-word@192.0.2.1:6379/0",
            "MILLRACE_WORKER_TOKEN": TOKEN,
            "MILLRACE_WORK_DIR": str(host.settings.home / "work"),
        }.items()
    )
    limits = one["HostConfig"]
    assert (limits["RestartPolicy"]["Name"], limits["Init"], limits["Privileged"]) == ("no", True, False)
    assert one["Config"]["StopTimeout"] == 120
    mounts = {(mount["Source"], mount["Destination"]) for mount in one["Mounts"]}
    work = str(host.settings.home / "work")
    assert mounts == {("/var/run/docker.sock", "/var/run/docker.sock"), (work, work)}
    assert one["Config"]["Labels"].items() >= {LABEL_FLEET: FLEET, LABEL_FARM: farm_of(host.settings)}.items()
    told = json.dumps(one["Config"]["Labels"]) + json.dumps(one["Config"]["Cmd"]) + str(one["Args"])
    provider.release([found.id])
    said = capsys.readouterr()
    for secret in (TOKEN, "pass-word"):
        assert secret not in told + said.out + said.err


def test_a_worker_that_is_ended_hears_of_it_first(host: Host) -> None:
    provider = host.provider()
    provider.grow_to(1, ORDER)
    (one,) = host.there()
    wait_until(lambda: b"worker" in host.engine.logs(one["Id"]))
    began = time.monotonic()
    provider.release([one["Name"].lstrip("/")])
    assert time.monotonic() - began < 5, "it left by itself"
    assert host.there() == []


def test_a_worker_that_hears_nothing_is_ended_all_the_same(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "RELEASE_S", 1.0)
    provider = host.provider(environment={"FAKE_DEAF": "1"})
    provider.grow_to(1, ORDER)
    (one,) = host.there()
    wait_until(lambda: b"worker" in host.engine.logs(one["Id"]))
    provider.release([one["Name"].lstrip("/")])
    assert host.there() == []


def test_a_worker_that_fails_is_removed_and_its_last_words_are_kept(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    provider = host.provider(environment={"FAKE_EXIT": "3"})
    provider.grow_to(2, ORDER)
    wait_until(lambda: not provider.find())
    assert host.there() == []
    said = capsys.readouterr()
    assert "told to be a worker" in said.out + said.err


def test_who_died_while_it_started_workers_holds_up_nobody_for_long(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = host.provider()
    labels = {LABEL_FARM: farm_of(host.settings), LABEL_FLEET: FLEET}
    image = make_stand_in(host.engine)
    host.engine.create_container(image, name=f"millrace-half-made-{time.time_ns()}", labels=labels)
    lock = f"millrace-{farm_of(host.settings)}-{FLEET}.growing"
    host.engine.create_container(image, name=lock, labels={**labels, LABEL_GROWING: str(int(time.time() * 1000))})
    provider.grow_to(2, ORDER)
    assert [one.state for one in provider.find()] == [InstanceState.BOOTING], "another is at it"
    monkeypatch.setattr(containers, "GROWING_MS", -1)
    assert provider.find() == [], "what was never started is gone"
    provider.grow_to(2, ORDER)
    monkeypatch.undo()
    provider.grow_to(2, ORDER)
    assert [one.state for one in provider.find()] == [InstanceState.RUNNING] * 2
    assert len(host.there()) == 2


def test_an_image_or_a_network_that_is_missing_is_named(host: Host) -> None:
    for changes, words in (({"image": "millrace/none:1"}, "no image millrace/none:1"), ({"network": "no-such"}, "no-such")):
        provider = host.provider(**changes)
        for ask in (provider.check, lambda provider=provider: provider.grow_to(1, ORDER)):
            with pytest.raises(ProviderTrouble, match=words) as caught:
                ask()
            assert caught.value.trouble is Trouble.MISSING
    assert host.there() == []


def test_a_socket_that_is_missing_does_not_become_a_folder(host: Host, tmp_path: Path) -> None:
    provider = host.provider(socket=str(tmp_path / "no.sock"))
    with pytest.raises(ProviderTrouble, match=r"no\.sock") as caught:
        provider.grow_to(1, ORDER)
    assert caught.value.trouble is Trouble.MISSING
    assert not (tmp_path / "no.sock").exists()
    assert host.there() == []


def test_an_engine_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, worker_token=SecretStr(TOKEN))
    shape = ContainersProvider(docker_host="tcp://127.0.0.1:9", api_url="http://192.0.2.1", broker_url="redis://x")
    provider = Containers(FLEET, shape, settings)
    for ask in (provider.find, provider.check, lambda: provider.grow_to(1, ORDER), lambda: provider.release(["x"])):
        with pytest.raises(ProviderTrouble, match=r"127\.0\.0\.1:9 does not answer") as caught:
            ask()
        assert caught.value.trouble is Trouble.AWAY


def test_settings_that_cannot_work_are_all_named(tmp_path: Path) -> None:
    shape = ContainersProvider(work_dir="work", network="none", environment={"MILLRACE_FLEET": "other", "FINE": "x"})
    with pytest.raises(InvalidInput) as caught:
        Containers(FLEET, shape, Settings(data_dir=tmp_path)).check()
    assert [problem.field for problem in caught.value.fields] == [
        "MILLRACE_WORKER_TOKEN",
        "provider.apiUrl",
        "provider.brokerUrl",
        "provider.workDir",
        "provider.network",
        "provider.environment.MILLRACE_FLEET",
    ]
    assert "127.0.0.1 is the container itself" in caught.value.message


def test_farms_that_share_an_engine_are_told_apart(tmp_path: Path) -> None:
    here, there = Settings(data_dir=tmp_path / "a"), Settings(data_dir=tmp_path / "b")
    one = Settings(database_url=SecretStr("postgresql+psycopg://u:first@db/x"), api_url="http://one")
    same = Settings(database_url=SecretStr("postgresql+psycopg://u:second@db/x"), api_url="http://one")
    other = Settings(database_url=SecretStr("postgresql+psycopg://u:first@db/x"), api_url="http://two")
    assert farm_of(one) == farm_of(same), "a new password makes no other farm"
    assert len({farm_of(settings) for settings in (here, there, one, other)}) == 4


def test_starting_is_not_held_up_by_one_that_starts_at_the_same_time(host: Host) -> None:
    providers = [host.provider() for _ in range(4)]
    threads = [threading.Thread(target=provider.grow_to, args=(3, ORDER)) for provider in providers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(host.there()) == 3
