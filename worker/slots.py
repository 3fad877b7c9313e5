"""A worker's slots: each carries one attempt at a time, in a process of its own."""

import math
import signal
import threading
import time
from dataclasses import dataclass
from typing import Final, Literal

from buildenv.engine import Engine, EngineInfo
from millrace import __version__
from millrace.contract import Claim, ClaimRequest, FinishReport
from millrace.errors import AttemptFenced, MillraceError
from millrace.ids import new_secret
from millrace.log import get_logger
from millrace.settings import Settings
from millrace.vocabulary import Reason, Verdict
from worker.attempt import REPORTED, TROUBLED
from worker.control import AttemptControl, Control
from worker.headroom import lack_of_room
from worker.janitor import Janitor
from worker.leaving import Leaving
from worker.lot import Lot
from worker.nursery import Child
from worker.order import make_order, mould_of

log = get_logger(__name__)
IDLE_POLL_S: Final = 10.0
"""A free slot asks for work this often even when no bell rings, so that a lost message or a dead Redis only costs time."""
_HOST_S: Final = 15.0
"""How long what the engine said of its host holds: it is asked anew with each poll, so that no claim has to wait for it."""
_END_S: Final = 45.0
"""How long attempts that were told to hand their builds back have for it, before they are killed."""
_LOOK_S: Final = 0.2
"""How soon a worker that is leaving sees that it is to leave faster."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    claim: Claim
    child: Child
    place: str


class Slots:
    """Claims builds while slots are free, and watches over the attempts' processes."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        control: Control,
        engine: Engine,
        janitor: Janitor,
        lot: Lot,
        leaving: Leaving,
    ) -> None:
        self._settings, self._worker_id, self._asked = settings, worker_id, leaving
        self._control, self._engine, self._janitor, self._lot = control, engine, janitor, lot
        self._claiming = threading.Lock()
        self._changed = threading.Condition()
        self._running: dict[tuple[str, int], _Running] = {}
        self._leaving: dict[tuple[str, int], _Running] = {}
        self._killed: set[str] = set()
        """The places of attempts that did not end in time when this worker left."""
        self._draining = False
        self._trouble = ""
        self.turned_s = self.heard_s = time.monotonic()
        """When builds were last asked for, or found not to be, and when a bell was last heard, by the monotonic clock."""
        self._token = new_secret("att")
        self._seen: tuple[float, EngineInfo] | None = None

    @property
    def busy(self) -> int:
        """How many attempts run."""
        with self._changed:
            return len(self._running)

    def fill(self) -> int:
        """Claim builds until no slot is free or no build waits; how many were claimed. Safe from several threads."""
        claimed = 0
        with self._claiming:
            while self._may_claim():
                self.turned_s = time.monotonic()
                try:
                    claim = self._control.claim(self._request())
                except MillraceError as error:
                    self._note(f"cannot claim: {error.message}")
                    break
                self._token = new_secret("att")
                self._note("")
                if claim is None:
                    self._heed()
                    break
                self._start(claim, time.monotonic())
                claimed += 1
        return claimed

    def rang(self) -> None:
        """A bell rang."""
        self.heard_s = time.monotonic()
        self.fill()

    def poll_forever(self, stop: threading.Event) -> None:
        """Ask for work every `IDLE_POLL_S`, whatever the bell does."""
        while not stop.is_set():
            began = time.monotonic()
            self._seen = None
            self.fill()
            if self.turned_s < began:  # full, or short of something: then it says so
                self._say("up")
            self.turned_s = time.monotonic()
            stop.wait(IDLE_POLL_S)

    def drain(self) -> None:
        """Claim nothing more; give the attempts the time that there is, then have them hand their builds back.

        Returns when all ended. The time may be shortened meanwhile.
        """
        with self._changed:
            self._draining = True
            running, left_s = len(self._running), self._asked.left_s
        log.info("worker.draining", running=running, why=self._asked.why, within_s=left_s if math.isfinite(left_s) else None)
        with self._claiming:
            pass  # what was being claimed is there now
        self._say("draining")
        said = time.monotonic()
        while not self._await_end(min(_LOOK_S, self._asked.left_s)) and self._asked.left_s > 0:
            if time.monotonic() - said > IDLE_POLL_S:
                self._say("draining")
                said = time.monotonic()
        with self._changed:
            left = [*self._running.values(), *self._leaving.values()]
        for running_one in left:
            running_one.child.signal(signal.SIGTERM)
        if self._await_end(_END_S):
            return
        with self._changed:
            left = [*self._running.values(), *self._leaving.values()]
        for running_one in left:
            log.error("attempt.killed", build_id=running_one.claim.build_id, attempt_no=running_one.claim.attempt_no)
            self._killed.add(running_one.place)
            running_one.child.signal(signal.SIGKILL)
        self._await_end(10)

    def leave(self) -> None:
        """Say goodbye, so that nobody waits for this worker."""
        self._say("gone")

    def _say(self, state: Literal["up", "draining", "gone"]) -> None:
        """How this worker is, where it does not ask for a build."""
        said = self._request().model_copy(
            update={"state": state, "free_slots": 0, "not_claiming": self._trouble[:500], "token": None}
        )
        try:
            self._control.claim(said)
        except MillraceError as error:
            log.debug("worker.not_heard", state=state, why=error.message)  # it stops counting as there, by and by
        else:
            self._heed()

    def _heed(self) -> None:
        """Leave, where the farm asks for it: it gives no more builds, and what runs may take as long as it takes."""
        why = self._control.leave
        if why and not self._asked.begun.is_set():
            self._asked.ask(f"the farm asks for it: {why}")

    def _await_end(self, within_s: float) -> bool:
        """Whether all attempts ended within that."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and not self._leaving, within_s)

    def _host(self) -> EngineInfo:
        """What the engine said of its host within the last few seconds. Raises InfraProblem(ENGINE_LOST)."""
        if self._seen is None or time.monotonic() - self._seen[0] > _HOST_S:
            self._seen = (time.monotonic(), self._engine.info())
        return self._seen[1]

    def _may_claim(self) -> bool:
        with self._changed:
            behind = max(0, len(self._leaving) - self._settings.slots)  # clean-up that does not keep up takes slots
            if self._draining or len(self._running) + behind >= self._settings.slots:
                return False
        try:
            host = self._host()
        except MillraceError as error:
            self._note(f"the engine does not answer: {error.message}")
            return False
        self._settings.workspaces.mkdir(parents=True, exist_ok=True, mode=0o700)
        lack = lack_of_room(
            [self._settings.workspaces, *([host.folder] if host.folder else [])],
            min_free_bytes=self._settings.min_free_bytes,
            min_free_inodes_percent=self._settings.min_free_inodes_percent,
        )
        if lack:
            self._note(lack)
            return False
        return True

    def _request(self) -> ClaimRequest:
        with self._changed:
            free = self._settings.slots - len(self._running)
        return ClaimRequest(
            worker_id=self._worker_id,
            fleet=self._settings.fleet,
            slots=self._settings.slots,
            free_slots=free,
            version=__version__,
            token=self._token,  # the same until there was an answer: what an answer that was lost told of comes again
            generation=self._settings.generation,
            cpus=self._settings.cpus,
            memory_bytes=self._settings.memory_offered_bytes,
            labels=self._settings.labels,
        )

    def _start(self, claim: Claim, claimed_at_s: float) -> None:
        try:
            mould = mould_of(claim, self._host(), self._settings)
            waiting = self._lot.take(mould)
        except MillraceError as error:
            log.error("attempt.not_started", build_id=claim.build_id, why=error.message)
            self._hand_back(claim, error.message)
            return
        running = _Running(claim=claim, child=waiting.child, place=waiting.place)
        with self._changed:
            self._running[claim.build_id, claim.attempt_no] = running
        log.info(
            "attempt.spawned",
            build_id=claim.build_id,
            attempt_no=claim.attempt_no,
            pid=waiting.child.pid,
            place=waiting.place,
            parked=waiting.mould is not None,
        )
        waiting.child.send(make_order(claim, claimed_at_s, mould, self._settings).model_dump_json().encode())
        threading.Thread(target=self._watch, args=(running,), name="slot", daemon=True).start()

    def _watch(self, running: _Running) -> None:
        claim, key = running.claim, (running.claim.build_id, running.claim.attempt_no)
        said = running.child.receive()
        if said == TROUBLED:
            self._seen = None  # the engine may have failed: it is asked before the next claim
        if said in (REPORTED, TROUBLED):
            with self._changed:
                self._leaving[key] = self._running.pop(key)
                self._changed.notify_all()
            self.fill()  # what is left of it goes meanwhile
        while running.child.receive() is not None:
            pass
        running.child.close()
        if said not in (REPORTED, TROUBLED):
            self._seen = None
            log.warning("attempt.lost", build_id=claim.build_id, attempt_no=claim.attempt_no, place=running.place)
            self._clear(running.place)
            how = "its report was not taken" if said else "it ended without a word"
            self._hand_back(claim, how, Reason.WORKER_SHUTDOWN if running.place in self._killed else Reason.WORKER_LOST)
        with self._changed:
            self._running.pop(key, None)
            self._leaving.pop(key, None)
            self._changed.notify_all()
        self.fill()

    def _clear(self, place: str) -> None:
        try:
            self._janitor.clear(place)
        except MillraceError as error:
            log.warning("janitor.failed", why=error.message)

    def _hand_back(self, claim: Claim, how: str, reason: Reason = Reason.WORKER_LOST) -> None:
        report = FinishReport(
            verdict=Verdict.HANDED_BACK,
            reason=reason,
            message=f"the process of attempt {claim.attempt_no} is lost: {how}",
        )
        control = AttemptControl(self._settings.api, claim.build_id, claim.attempt_no, claim.token)
        try:
            control.finish(report, patience_s=claim.lease_ttl_s)
        except AttemptFenced:
            return  # the lease was faster
        except MillraceError as error:
            log.warning("attempt.unreported", why=error.message)
        finally:
            control.close()

    def _note(self, trouble: str) -> None:
        """Say what keeps this worker from claiming, once when it begins and once when it is over."""
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                log.warning("worker.not_claiming", why=trouble)
            else:
                log.info("worker.claiming_again")
