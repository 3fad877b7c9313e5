"""What a worker's machine says of its own end: on EC2 by its metadata, anywhere by SIGTERM (`worker.app`).

EC2 user guide: spot instance interruption notices (two minutes before), rebalance recommendations; EC2 Auto Scaling user guide:
retrieve the target lifecycle state through instance metadata. All is asked for with a token (IMDSv2).
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import httpx

from millrace import clock
from millrace.log import get_logger

log = get_logger(__name__)
EVERY_S: Final = 5.0
"""EC2 user guide: interruption notices should be looked for every five seconds."""
HAND_BACK_S: Final = 100.0
"""Builds are back in the queue so long after a notice of spot, which comes 120 s before the end."""
LAST_S: Final = 20.0
"""So long before the end they are, where the notice was heard late."""
STOPPING_S: Final = 55.0
"""What is kept of it for ending: 45 s until attempts that do not end are killed (`worker.slots`), what the worker then has to
report for them, and the five seconds in which nobody looked."""
_CALL_S: Final = 2.0
_TOKEN_S: Final = 600
_SPOT: Final = "spot/instance-action"
_LIFECYCLE: Final = "autoscaling/target-lifecycle-state"
_REBALANCE: Final = "events/recommendations/rebalance"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """The machine goes. `builds_within_s`: how long builds may go on; None: as long as a leaving worker gives them anyway."""

    why: str
    builds_within_s: float | None = None


class Metadata:
    """EC2's instance metadata at an address. What is not there is None; raises httpx.HTTPError where nothing is to be had."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=_CALL_S, trust_env=False)  # link-local: never by a proxy
        self._token: tuple[str, float] | None = None

    def get(self, path: str) -> str | None:
        """What stands at a path below `latest/meta-data`."""
        answer = self._ask(path)
        if answer.status_code == httpx.codes.UNAUTHORIZED:  # the token is over, before its time
            self._token = None
            answer = self._ask(path)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return answer.raise_for_status().text

    def _ask(self, path: str) -> httpx.Response:
        return self._client.get(f"/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": self._current_token()})

    def _current_token(self) -> str:
        if self._token is None or time.monotonic() > self._token[1]:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            token = self._client.put("/latest/api/token", headers=header).raise_for_status().text
            self._token = token, time.monotonic() + _TOKEN_S / 2
        return self._token[0]

    def close(self) -> None:
        """Hang up."""
        self._client.close()


class Notices:
    """Looks for notices, and tells of each kind once. A recommendation to go elsewhere is only noted: the machine may stay."""

    def __init__(self, metadata: Metadata, told: Callable[[Notice], None]) -> None:
        self._metadata, self._told = metadata, told
        self._heard: set[str] = set()
        self._trouble = ""

    def watch(self, stop: threading.Event) -> None:
        """Look every five seconds. It goes on after a notice: one of spot may follow, and leaves less time."""
        while not stop.is_set():
            self.look()
            stop.wait(EVERY_S)

    def look(self) -> None:
        """Look once."""
        try:
            if (action := self._metadata.get(_SPOT)) is not None:
                self._tell(_SPOT, _of_spot(action))
            if (state := self._metadata.get(_LIFECYCLE)) is not None and state.strip().endswith("Terminated"):
                self._tell(_LIFECYCLE, Notice(why="its Auto Scaling group ends this machine"))
            if _REBALANCE not in self._heard and self._metadata.get(_REBALANCE) is not None:
                self._heard.add(_REBALANCE)
                log.info("machine.at_risk", why="EC2 recommends to be elsewhere: spot capacity runs short")
            self._note("")
        except httpx.HTTPError as error:
            self._note(f"{type(error).__name__}: {error}")

    def _tell(self, kind: str, notice: Notice) -> None:
        if kind not in self._heard:
            self._heard.add(kind)
            log.warning("machine.going", why=notice.why, builds_within_s=notice.builds_within_s)
            self._told(notice)

    def _note(self, trouble: str) -> None:
        """Say that nothing is heard, once when that begins and once when it is over."""
        if trouble and not self._trouble:
            log.warning("metadata.silent", why=trouble)
        elif self._trouble and not trouble:
            log.info("metadata.heard_again")
        self._trouble = trouble


def _of_spot(action: str) -> Notice:
    """`{"action": "terminate", "time": "2026-11-25T08:22:00Z"}`; whatever it holds, the machine goes."""
    left_s = HAND_BACK_S
    try:
        said = json.loads(action)
        what, when = str(said["action"]), datetime.fromisoformat(str(said["time"]))
        left_s = min(left_s, (when - clock.now()).total_seconds() - LAST_S)
        why = f"EC2 takes this spot instance back: {what} at {when:%H:%M:%S} UTC"
    except (ValueError, KeyError, TypeError):
        why = f"EC2 takes this spot instance back: {action[:100]}"
    return Notice(why=why, builds_within_s=max(0.0, left_s - STOPPING_S))
