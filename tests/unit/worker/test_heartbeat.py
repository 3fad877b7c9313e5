"""The heartbeat, with a clock that the test owns."""

from buildenv.run import StopSignal
from millrace.contract import RenewReply
from millrace.errors import AttemptFenced, MillraceError, Unavailable
from millrace.vocabulary import Reason
from worker.heartbeat import Heartbeat


class Lease:
    """Answers renewals; `error` is raised instead, where it is set."""

    def __init__(self) -> None:
        self.now = 100.0
        self.error: MillraceError | None = None
        self.cancel = False

    def renew(self, _patience_s: float) -> RenewReply:
        if self.error is not None:
            raise self.error
        return RenewReply(lease_ttl_s=30, cancel_requested=self.cancel, deadline_in_s=60)


def made(lease: Lease) -> tuple[Heartbeat, StopSignal]:
    stop = StopSignal()
    return Heartbeat(lease.renew, stop, renew_every_s=10, self_fence_s=25, clock=lambda: lease.now), stop


def test_a_wish_to_stop_arrives_with_the_renewal() -> None:
    lease = Lease()
    beat, stop = made(lease)
    beat.beat()
    assert not stop.event.is_set()
    lease.cancel = True
    beat.beat()
    assert stop.reason is Reason.CANCELLED


def test_a_fenced_attempt_stops_at_once() -> None:
    lease = Lease()
    beat, stop = made(lease)
    lease.error = AttemptFenced("another holds it")
    beat.beat()
    assert stop.reason is Reason.WORKER_LOST


def test_an_api_out_of_reach_is_borne_until_the_self_fence() -> None:
    lease = Lease()
    beat, stop = made(lease)
    lease.error = Unavailable("away")
    lease.now += 24
    beat.beat()
    assert not stop.event.is_set()
    lease.now += 2
    beat.beat()
    assert stop.reason is Reason.WORKER_LOST


def test_one_renewal_in_time_starts_the_count_anew() -> None:
    lease = Lease()
    beat, stop = made(lease)
    lease.now += 24
    beat.beat()
    lease.error = Unavailable("away")
    lease.now += 24
    beat.beat()
    assert not stop.event.is_set()


def test_the_first_reason_to_stop_counts() -> None:
    stop = StopSignal()
    stop.set(Reason.CANCELLED)
    stop.set(Reason.WORKER_LOST)
    assert stop.reason is Reason.CANCELLED


def test_a_renewal_that_hangs_does_not_hold_up_the_fence() -> None:
    lease = Lease()
    beat, stop = made(lease)
    for _ in range(49):  # no answer, good or bad, comes all the while
        lease.now += 0.5
        beat.look()
    assert not stop.event.is_set()
    for _ in range(2):
        lease.now += 0.5
        beat.look()
    assert stop.reason is Reason.WORKER_LOST


def test_a_process_that_was_halted_asks_once_before_it_fences_itself() -> None:
    lease = Lease()
    beat, stop = made(lease)
    lease.now += 27  # the lease is good for 30
    beat.look()
    assert not stop.event.is_set()
    beat.beat()
    for _ in range(20):
        lease.now += 0.5
        beat.look()
    assert not stop.event.is_set()


def test_a_process_that_was_halted_and_gets_no_answer_fences_itself() -> None:
    lease = Lease()
    beat, stop = made(lease)
    lease.now += 300
    for _ in range(20):
        beat.look()
        lease.now += 0.5
    assert stop.reason is Reason.WORKER_LOST
