"""The table of states: what is terminal, what can be reached, and that the page in the docs is its print."""

from pathlib import Path

import pytest

from millrace.errors import IllegalTransition
from millrace.vocabulary import BuildState, StatusType
from scheduler.states import HELD, TERMINAL, TRANSITIONS, BuildEvent, after, page

DOCS = Path(__file__).parents[3] / "docs"


def test_what_is_terminal_has_no_way_out() -> None:
    assert {state.value for state in TERMINAL} == {"SUCCEEDED", "FAILED", "TIMED_OUT", "STOPPED", "FAULT"}
    for state in TERMINAL:
        for event in BuildEvent:
            with pytest.raises(IllegalTransition, match=event):
                after(state, event)


def test_every_state_is_reached_from_queued() -> None:
    reached = {BuildState.QUEUED}
    while more := {then for (before, _), then in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == set(BuildState)


def test_every_event_happens_somewhere() -> None:
    assert {event for _, event in TRANSITIONS} == set(BuildEvent)


def test_a_held_build_can_be_stopped_requeued_and_faulted() -> None:
    for state in HELD:
        assert after(state, BuildEvent.STOPPED) is BuildState.STOPPED
        assert after(state, BuildEvent.REQUEUED) is BuildState.QUEUED
        assert after(state, BuildEvent.FAULTED) is BuildState.FAULT


def test_each_terminal_state_is_a_status_of_codebuild() -> None:
    assert {state.value for state in TERMINAL} <= set(StatusType.__members__)


def test_the_docs_show_this_table() -> None:
    assert (DOCS / "states.md").read_text() == page()
