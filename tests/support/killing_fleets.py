"""Stories of fleets that scale, told while a farm is killed at places: a worker process comes for a build, and goes."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from millrace.errors import MillraceError
from scheduler.models import Fleet
from tests.support.farm import wait_until

if TYPE_CHECKING:
    from tests.support.killing import Stage

SPARE: Final = "spare"
_PATH: Final = f"/v1/fleets/{SPARE}"
_QUIET_MS: Final = 7_200_000
Tell = Callable[["Stage"], None]


def asked(call: Callable[[], Any]) -> Any:
    """What is answered, as soon as the farm is there to do it."""

    def once() -> list[Any]:
        try:
            return [call()]
        except MillraceError:
            return []

    return wait_until(once, 60)[0]


def scaled(stage: "Stage", **settings: Any) -> None:
    """A fleet of at most one worker process, which is not kept."""
    wanted = {"provider": {"type": "process"}, "scaling": {"maximum": 1, "shrinkAfterS": 0}, **settings}
    asked(lambda: stage.farm.client.put(_PATH, wanted))


def emptied(stage: "Stage") -> None:
    """Wait until its worker has left, and nothing is kept of it."""
    wait_until(lambda: not asked(lambda: stage.farm.client.get(_PATH))["instances"], 120)


def comes_and_goes(stage: "Stage") -> None:
    """A worker comes for a build, carries it, and leaves as soon as there is none."""
    scaled(stage)
    emptied(stage)
    stage.arm()
    stage.ended(stage.ask(SPARE))
    emptied(stage)


def resumed(stage: "Stage") -> None:
    """A fleet is resumed while a worker of it is there, which may stay then whatever it was told."""
    scaled(stage, scaling={"minimum": 1, "maximum": 1, "shrinkAfterS": 0})
    wait_until(lambda: any(one["at"] == "idle" for one in asked(lambda: stage.farm.client.get(_PATH))["workersSeen"]), 90)
    stage.arm()
    asked(lambda: stage.farm.client.post(f"{_PATH}/resume"))
    stage.ended(stage.ask(SPARE))
    scaled(stage)
    emptied(stage)


def overflown(stage: "Stage") -> None:
    """A build that the fleet cannot start goes to another, and runs there."""
    scaled(stage, scaling={"maximum": 0}, overflowBehavior="ON_DEMAND", overflowFleet="default")
    emptied(stage)
    stage.arm()
    stage.ended(stage.ask(SPARE))


def forgotten(stage: "Stage") -> None:
    """A scheduler that begins to lead forgets what is old."""
    scaled(stage)
    stage.arm()
    os.kill(wait_until(lambda: _scheduler(stage), 60), signal.SIGTERM)
    stage.ended(stage.ask(SPARE))
    emptied(stage)


def upgraded(stage: "Stage") -> None:
    """A new generation is begun, and taken back or has taken over."""
    client = stage.farm.client
    scaled(stage)
    if ".begin." in stage.point:
        stage.arm()
    _post(stage, {"canaryPercent": 100}, lambda found: found["generation"] > found["stableGeneration"])
    if ".take." not in stage.point:
        if ".go_back." in stage.point:
            stage.arm()
        _post(stage, {"back": True}, lambda found: found["generation"] == found["stableGeneration"])
    else:
        for _ in range(3):
            stage.ended(stage.ask(SPARE))
        rollout = asked(lambda: client.get(_PATH))["rollout"]
        stage.arm()
        stage.change(
            sa.update(Fleet).where(Fleet.name == SPARE).values(rollout={**rollout, "since": rollout["since"] - _QUIET_MS})
        )
    wait_until(lambda: (found := asked(lambda: client.get(_PATH)))["generation"] == found["stableGeneration"], 90)
    stage.ended(stage.ask(SPARE))
    emptied(stage)


def _post(stage: "Stage", body: dict[str, Any], is_so: Callable[[dict[str, Any]], bool]) -> None:
    """Ask for it until it is so: where an answer is lost, it may have been carried out."""

    def once() -> bool:
        with suppress(MillraceError):
            stage.farm.client.post(f"{_PATH}/upgrade", body)
        return is_so(asked(lambda: stage.farm.client.get(_PATH)))

    wait_until(once, 60)


def _scheduler(stage: "Stage") -> int:
    try:
        return stage.farm.pid_of("millrace.cli scheduler")
    except AssertionError:
        return 0  # it is being started


STORIES: Final[dict[str, Tell]] = {
    "commit.fleets.ledger.forget": forgotten,
    "commit.fleets.ledger.note_decision": comes_and_goes,
    "commit.fleets.ledger.note_instances": comes_and_goes,
    "commit.fleets.marks.ask_to_leave": comes_and_goes,
    "commit.fleets.marks.let_go": comes_and_goes,
    "commit.fleets.marks.take_back": resumed,
    "commit.fleets.overflow.move": overflown,
    "commit.fleets.upgrades.begin": upgraded,
    "commit.fleets.upgrades.go_back": upgraded,
    "commit.fleets.upgrades.take": upgraded,
}
