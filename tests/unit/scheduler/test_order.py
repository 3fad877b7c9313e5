"""Which of two events is the newer."""

import pytest

from millrace.webhook import EventKind, SourceEvent
from scheduler.models import Delivery
from scheduler.order import newest_after

A, B, C, D = ("a" * 40, "b" * 40, "c" * 40, "d" * 40)


def push(before: str, after: str, at: str = "") -> SourceEvent:
    return SourceEvent(kind=EventKind.PUSH, ref="refs/heads/main", before=before, commit=after, stamp=f"{before} {at}".strip())


def came(*events: SourceEvent) -> list[Delivery]:
    """Rows as they are noted, newest first."""
    rows = [Delivery(what=one.kind.value, ref=one.place, commit_id=one.commit, stamp=one.stamp[:100]) for one in events]
    return rows[::-1]


def later_than(event: SourceEvent, *events: SourceEvent) -> str | None:
    found = newest_after(event, came(*events))
    return found.commit_id if found else None


@pytest.mark.parametrize(
    "times", [("1700000001", "1700000002"), ("2026-01-01T00:00:00Z", "2026-01-01T09:30:00+0900"), ("9", "10")]
)
def test_times_tell_where_there_are_any(times: tuple[str, str]) -> None:
    early, late = push(A, B, times[0]), push(C, D, times[1])
    assert later_than(early, late) == D
    assert later_than(late, early) is None


@pytest.mark.parametrize("at", ["", "None", "1700000000"])
def test_else_the_commits_tell(at: str) -> None:
    first, second, third = push(A, B, at), push(B, C, at), push(C, D, at)
    assert later_than(first, second) == C
    assert later_than(first, second, third) == C
    assert later_than(second, third) == D
    assert later_than(third, first, second) is None
    assert later_than(second, first) is None
    assert later_than(push(A, C), push(A, B)) is None, "nothing says that it is older"


def test_a_push_back_to_an_old_commit_and_forth_again_is_new() -> None:
    assert later_than(push(A, B), push(A, B), push(B, A)) is None


def test_pull_requests_go_by_when_they_were_changed() -> None:
    early, late = (
        SourceEvent(kind=EventKind.PULL_REQUEST_UPDATED, pull_request=2, commit=one, stamp=f"2026-01-0{day}T00:00:00Z")
        for one, day in ((A, 1), (B, 2))
    )
    assert later_than(early, late) == B
    assert later_than(late, early) is None
    assert later_than(late, late) is None
