"""The history checker finds each kind of broken promise where it is planted, and nothing where there is none."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from millrace.errors import NotFound, Unavailable
from tests.support.history import Move, Op, Record, RecordingClient, check

GOOD_RECORD = Record(build="b", state="SUCCEEDED", reason="succeeded", attempt=2, visible=((2, "good"),))
GOOD_MOVES = [
    Move(build="b", at_ms=at_ms, after=after)
    for at_ms, after in enumerate(("CLAIMED", "RUNNING", "QUEUED", "CLAIMED", "RUNNING", "FINALIZING", "SUCCEEDED"), start=100)
]


def op(kind: str, at_ms: int, outcome: str = "ok", build: str | None = "b", **facts: Any) -> Op:
    return Op(op=kind, outcome=outcome, began_ms=at_ms, ended_ms=at_ms + 5, build=build, **facts)  # type: ignore[arg-type]


def read(at_ms: int, state: str, attempt: int, **facts: Any) -> Op:
    return op("read", at_ms, state=state, attempt=attempt, **facts)


GOOD_JOURNAL = [
    op("start", 50, "unknown", build=None, key="k"),
    op("start", 60, key="k"),
    read(70, "QUEUED", 0),
    read(80, "RUNNING", 1),
    read(90, "QUEUED", 1),
    read(100, "CLAIMED", 2),
    read(110, "SUCCEEDED", 2, reason="succeeded", shown=("good",)),
    op("stop", 200),
]


def promises(journal: list[Op], records: list[Record], moves: list[Move], **how: Any) -> list[str]:
    return [found.promise for found in check(journal, records, moves, **how)]


def changed(**changes: Any) -> list[Record]:
    return [dataclasses.replace(GOOD_RECORD, **changes)]


def test_a_good_history_breaks_no_promise() -> None:
    assert check(GOOD_JOURNAL, [GOOD_RECORD], GOOD_MOVES) == []


def test_an_accepted_build_that_is_not_there_is_lost() -> None:
    assert promises([op("start", 1)], [], []) == ["lost"]


def test_a_build_that_nobody_asked_for_is_a_ghost() -> None:
    refused = [op("start", 1, "fail", build=None, key="k")]
    assert promises(refused, [GOOD_RECORD], GOOD_MOVES) == ["ghost"]


@pytest.mark.parametrize("asked", [{"outcome": "unknown"}, {"outcome": "unknown", "key": "k"}])
def test_a_call_without_an_answer_may_have_made_one_build(asked: dict[str, Any]) -> None:
    calls = [op("start", at_ms, build=None, **asked) for at_ms in ((1,) if "key" not in asked else (1, 2))]
    assert promises(calls, [GOOD_RECORD], GOOD_MOVES) == []
    twin = dataclasses.replace(GOOD_RECORD, build="c")
    moves = [*GOOD_MOVES, *(dataclasses.replace(move, build="c") for move in GOOD_MOVES)]
    assert promises(calls, [GOOD_RECORD, twin], moves) == ["ghost"]


def test_a_build_that_the_farm_made_by_itself_is_no_ghost() -> None:
    assert promises([], changed(asked=False), GOOD_MOVES) == []


def test_one_key_makes_one_build_of_one_request() -> None:
    other = dataclasses.replace(GOOD_RECORD, build="c")
    moves = [*GOOD_MOVES, *(dataclasses.replace(move, build="c") for move in GOOD_MOVES)]
    twice = [op("start", 1, key="k", body="x"), op("start", 2, key="k", body="x", build="c")]
    assert promises(twice, [GOOD_RECORD, other], moves) == ["key"]
    mixed = [op("start", 1, key="k", body="x"), op("start", 2, key="k", body="y")]
    assert promises(mixed, [GOOD_RECORD], GOOD_MOVES) == ["key"]


@pytest.mark.parametrize(
    ("records", "moves"),
    [
        ([GOOD_RECORD], [*GOOD_MOVES, GOOD_MOVES[-1]]),
        ([GOOD_RECORD], GOOD_MOVES[:-1]),
        ([GOOD_RECORD], [*GOOD_MOVES, GOOD_MOVES[0]]),
        (changed(state="FAILED"), GOOD_MOVES),
        (changed(reason=None), GOOD_MOVES),
        (changed(state="RUNNING", reason=None), GOOD_MOVES[:-2]),
        (changed(state="QUEUED", reason=None), GOOD_MOVES),
    ],
    ids=["twice", "never", "went on", "other state", "no reason", "still runs", "back again"],
)
def test_a_build_ends_exactly_once(records: list[Record], moves: list[Move]) -> None:
    assert set(promises([op("start", 1)], records, moves)) == {"ended"}


def test_a_build_may_run_while_the_farm_is_at_work() -> None:
    running = changed(state="RUNNING", reason=None, visible=())
    assert promises([op("start", 1), op("stop", 2)], running, GOOD_MOVES[:-2], at_rest=False) == []


def test_nothing_of_a_fenced_attempt_is_visible() -> None:
    assert promises([op("start", 1)], changed(visible=((1, "good"),)), GOOD_MOVES) == ["fenced"]
    seen = read(90, "FINALIZING", 1, shown=("stale",))
    assert promises([op("start", 1), seen], [GOOD_RECORD], GOOD_MOVES) == ["fenced"]


@pytest.mark.parametrize(
    "reads",
    [
        [read(10, "RUNNING", 1), read(20, "CLAIMED", 1)],
        [read(10, "RUNNING", 2), read(20, "QUEUED", 1)],
        [read(10, "QUEUED", 1), read(20, "RUNNING", 1)],
        [read(10, "SUCCEEDED", 2, reason="succeeded"), read(20, "QUEUED", 2)],
    ],
)
def test_reads_do_not_go_back(reads: list[Op]) -> None:
    assert promises([op("start", 1), *reads], [GOOD_RECORD], GOOD_MOVES) == ["backwards"]


def test_reads_at_once_may_answer_in_either_order() -> None:
    slow = dataclasses.replace(read(10, "CLAIMED", 1), ended_ms=40)
    assert promises([op("start", 1), slow, read(20, "RUNNING", 1)], [GOOD_RECORD], GOOD_MOVES) == []


@pytest.mark.parametrize("seen", [("FAILED", 2, "user.exit_code"), ("SUCCEEDED", 2, "other"), ("SUCCEEDED", 1, "succeeded")])
def test_an_end_that_was_read_never_changes(seen: tuple[str, int, str]) -> None:
    state, attempt, reason = seen
    assert promises([op("start", 1), read(300, state, attempt, reason=reason)], [GOOD_RECORD], GOOD_MOVES) == ["changed"]


def test_a_stop_that_was_acknowledged_stops_the_build_or_came_too_late() -> None:
    assert promises([op("start", 1), op("stop", 10)], [GOOD_RECORD], GOOD_MOVES, skew_ms=0) == ["stop"]
    assert promises([op("start", 1), op("stop", 10, "unknown")], [GOOD_RECORD], GOOD_MOVES, skew_ms=0) == []
    assert promises([op("start", 1), op("stop", 101)], [GOOD_RECORD], GOOD_MOVES, skew_ms=0) == []
    stopped = [*GOOD_MOVES[:2], Move(build="b", at_ms=102, after="STOPPED")]
    ended = changed(state="STOPPED", reason="user.cancelled", attempt=1, visible=())
    assert promises([op("start", 1), op("stop", 10)], ended, stopped) == []


class _Scripted:
    """Stands for the wire: each call's answer, in order."""

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)

    def post(self, _path: str, _body: object = None, **_headers: str) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    get = post


def test_a_recording_client_writes_down_what_it_was_told(tmp_path: Path) -> None:
    build = {
        "id": "b",
        "millrace": {"state": "SUCCEEDED", "reason": "succeeded", "attempt": 2, "artifacts": [{"sha256": "good"}]},
    }
    client = RecordingClient(_Scripted(Unavailable("gone"), build, NotFound("no"), build))  # type: ignore[arg-type]
    assert client.start("demo", "k") is None
    assert client.start("demo", "k") == "b"
    assert not client.stop("b")
    assert client.read("b") == build
    assert [(one.op, one.outcome, one.build, one.shown) for one in client.journal] == [
        ("start", "unknown", None, ()),
        ("start", "ok", "b", ("good",)),
        ("stop", "fail", "b", ()),
        ("read", "ok", "b", ("good",)),
    ]
    lines = [json.loads(line) for line in client.write(tmp_path / "journal").read_text().splitlines()]
    assert [(line["op"], line["key"], line["status"], line["build"]) for line in lines[:2]] == [
        ("start", "k", 0, None),
        ("start", "k", 201, "b"),
    ]
