"""What a worker hears of its machine's end on EC2, by a service that demands tokens as EC2's does, and what it does then."""

import json
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.chaos.rows_worker import FAR, far_worker
from tests.support import metadata as stand_in
from tests.support.farm import Farm, running_farm, wait_until
from tests.support.metadata import LIFECYCLE, REBALANCE, SPOT
from worker.notices import HAND_BACK_S, STOPPING_S, Metadata, Notice, Notices


@pytest.fixture
def service() -> Iterator[stand_in.Metadata]:
    with stand_in.running() as made:
        yield made


HASTY = """
import os, sys
from millrace import log
from millrace.settings import load
from worker import app, slots
log.configure("json", "INFO", service="worker")
slots._END_S = 2.0
sys.exit(app.main(load(os.environ), os.environ))
"""
"""A worker that gives its attempts two seconds to hand their builds back."""


class Heard:
    """Notices of a service, and what they told."""

    def __init__(self, url: str) -> None:
        self.told: list[Notice] = []
        self.metadata = Metadata(url)
        self.notices = Notices(self.metadata, self.told.append)

    def look(self) -> list[Notice]:
        self.notices.look()
        return self.told


@pytest.fixture
def heard(service: stand_in.Metadata) -> Iterator[Heard]:
    made = Heard(service.url)
    yield made
    made.metadata.close()


def test_the_service_gives_nothing_without_a_token(service: stand_in.Metadata) -> None:
    assert httpx.get(f"{service.url}/latest/meta-data/{LIFECYCLE}").status_code == 401
    assert httpx.get(f"{service.url}/latest/api/token").status_code != 200


def test_a_machine_that_stays_tells_nothing_and_is_asked_with_one_token(service: stand_in.Metadata, heard: Heard) -> None:
    for _ in range(3):
        assert heard.look() == []
    assert (len(service.tokens), service.without_token) == (1, 0)
    assert set(service.asked) == {SPOT, LIFECYCLE, REBALANCE}


def test_a_notice_of_spot_is_told_once_and_leaves_builds_time_to_be_handed_back(service: stand_in.Metadata, heard: Heard) -> None:
    service.take_back(in_s=120)
    (notice,) = heard.look()
    assert "takes this spot instance back: terminate" in notice.why
    assert notice.builds_within_s is not None
    assert HAND_BACK_S - STOPPING_S - 2 < notice.builds_within_s <= HAND_BACK_S - STOPPING_S
    assert heard.look() == [notice]


@pytest.mark.parametrize(("in_s", "least", "most"), [(90, 14, 15), (30, 0, 0), (-5, 0, 0)])
def test_a_notice_that_is_heard_late_leaves_less(
    service: stand_in.Metadata, heard: Heard, in_s: float, least: float, most: float
) -> None:
    service.take_back(in_s)
    (notice,) = heard.look()
    assert notice.builds_within_s is not None
    assert least - 1 <= notice.builds_within_s <= most


@pytest.mark.parametrize(
    "said", ["", "{}", "[]", '{"action": "terminate", "time": "soon"}', '{"action": 1, "time": "2026-11-25"}']
)
def test_a_notice_that_cannot_be_read_is_one_all_the_same(service: stand_in.Metadata, heard: Heard, said: str) -> None:
    service.paths[SPOT] = said
    (notice,) = heard.look()
    assert notice.builds_within_s == HAND_BACK_S - STOPPING_S


def test_the_end_that_a_group_has_in_mind_is_told_and_spot_after_it_again(service: stand_in.Metadata, heard: Heard) -> None:
    service.paths[LIFECYCLE] = "Terminated"
    (notice,) = heard.look()
    assert (notice.why, notice.builds_within_s) == ("its Auto Scaling group ends this machine", None)
    service.take_back()
    assert len(heard.look()) == 2


def test_a_recommendation_is_only_noted(service: stand_in.Metadata, heard: Heard, capsys: pytest.CaptureFixture[str]) -> None:
    service.paths[REBALANCE] = '{"noticeTime": "2026-11-25T08:22:00Z"}'
    assert heard.look() == heard.look() == []
    said = capsys.readouterr()
    assert (said.out + said.err).count("machine.at_risk") == 1


def test_a_token_that_is_over_is_asked_for_anew(service: stand_in.Metadata, heard: Heard) -> None:
    heard.look()
    service.tokens.clear()
    service.take_back()
    assert len(heard.look()) == 1
    assert service.without_token == 1


def test_a_service_that_fails_is_said_once_and_asked_again(
    service: stand_in.Metadata, heard: Heard, capsys: pytest.CaptureFixture[str]
) -> None:
    for status in (503, 403):
        service.status = status
        assert heard.look() == []
    service.status = 200
    service.take_back()
    assert len(heard.look()) == 1
    said = capsys.readouterr()
    assert (said.out + said.err).count("metadata.silent") == 1
    assert (said.out + said.err).count("metadata.heard_again") == 1


def test_nobody_there_is_no_end_of_the_worker() -> None:
    heard = Heard("http://127.0.0.1:9")
    assert heard.look() == []
    heard.metadata.close()


def state_of(farm: Farm, build: str) -> str:
    return str(farm.show(build)["millrace"]["state"])


@pytest.mark.docker
@pytest.mark.slow
def test_a_worker_on_spot_hands_its_build_back_in_time_and_without_a_charge(service: stand_in.Metadata) -> None:
    notices = {"MILLRACE_NOTICES": "ec2", "MILLRACE_METADATA_URL": service.url, "MILLRACE_DRAIN_S": "3600"}
    with running_farm() as farm:
        with far_worker(farm, farm.api_url, FAKE_SLEEP_S="300", **notices) as worker:
            build = farm.build(["work"], **FAR)
            wait_until(lambda: state_of(farm, build) == "RUNNING", 60)
            service.take_back(in_s=85)  # 10 s for builds, then they are handed back
            began = time.monotonic()
            wait_until(lambda: state_of(farm, build) == "QUEUED", 60)
            took = time.monotonic() - began
            assert worker.wait(60) == 0, "it left by itself"
        assert 5 < took < 30
        with far_worker(farm, farm.api_url):
            ended = farm.ended(build)
        assert [attempt["reason"] for attempt in ended["millrace"]["attempts"]] == ["infra.worker_shutdown", "succeeded"]


@pytest.mark.docker
@pytest.mark.slow
def test_an_attempt_that_does_not_end_is_killed_and_its_build_not_charged_for_it() -> None:
    with running_farm() as farm:
        with far_worker(farm, farm.api_url, command=("-c", HASTY), FAKE_SLEEP_S="300", MILLRACE_DRAIN_S="0") as worker:
            build = farm.build(["work"], **FAR)
            wait_until(lambda: state_of(farm, build) == "RUNNING", 60)
            events = [json.loads(line) for line in (farm.home / "far.log").read_text().splitlines() if line.startswith("{")]
            (attempt,) = [event["pid"] for event in events if event["event"] == "attempt.spawned"]
            os.kill(attempt, signal.SIGSTOP)
            worker.terminate()
            assert worker.wait(30) == 0
        (first,) = farm.show(build)["millrace"]["attempts"]
        assert first["reason"] == "infra.worker_shutdown"
        assert "attempt.killed" in (farm.home / "far.log").read_text()
        with far_worker(farm, farm.api_url):
            assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
