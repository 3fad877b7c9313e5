"""Which state may follow which: one table, pure. `python -m scheduler.states` prints it as the diagram of docs/states.md."""

from enum import StrEnum
from typing import Final

from millrace.errors import IllegalTransition
from millrace.vocabulary import REASON_MEANS, Reason
from millrace.vocabulary import BuildState as S


class BuildEvent(StrEnum):
    """What can happen to a build."""

    CLAIMED = "CLAIMED"
    STARTED = "STARTED"
    FINALIZING = "FINALIZING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    STOPPED = "STOPPED"
    REQUEUED = "REQUEUED"
    FAULTED = "FAULTED"


E = BuildEvent
HELD: Final = (S.CLAIMED, S.RUNNING, S.FINALIZING)
"""The states in which an attempt holds the build by a lease."""

VERDICTS: Final = {E.SUCCEEDED: S.SUCCEEDED, E.FAILED: S.FAILED, E.TIMED_OUT: S.TIMED_OUT}

TRANSITIONS: Final[dict[tuple[S, E], S]] = {
    (S.QUEUED, E.CLAIMED): S.CLAIMED,
    (S.QUEUED, E.TIMED_OUT): S.TIMED_OUT,
    (S.CLAIMED, E.STARTED): S.RUNNING,
    **{(s, E.FINALIZING): S.FINALIZING for s in (S.CLAIMED, S.RUNNING)},
    **{(s, E.STOPPED): S.STOPPED for s in (S.QUEUED, *HELD)},
    **{(s, E.REQUEUED): S.QUEUED for s in HELD},
    **{(s, E.FAULTED): S.FAULT for s in HELD},
    **{(S.FINALIZING, e): s for e, s in VERDICTS.items()},
}
TERMINAL: Final = frozenset(S) - {before for before, _ in TRANSITIONS}


def after(state: S, event: BuildEvent) -> S:
    """The state that follows `state` on `event`. Raises IllegalTransition where there is none."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"a build that is {state} cannot become {event}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {S.QUEUED}"]
    lines += [f"    {before} --> {then}: {event}" for (before, event), then in TRANSITIONS.items()]
    lines += [f"    {state} --> [*]" for state in S if state in TERMINAL]
    return "\n".join(lines)


def page() -> str:
    """The text of docs/states.md."""
    return (
        "# The states of a build\n\n"
        "Made from `scheduler/states.py` by `python -m scheduler.states > docs/states.md`; a test compares the two.\n\n"
        f"```mermaid\n{diagram()}\n```\n\n"
        "CLAIMED, RUNNING and FINALIZING are held by one attempt through a lease. REQUEUED happens when a lease is\n"
        "lost or handed back, or when our side failed, and attempts are left. A wish to stop is not a state but a\n"
        "column, `cancel_requested_ms`: whoever next moves the build sees it, and the build ends STOPPED; a worker\n"
        "that does not answer to it is fenced after three minutes. CodeBuild's `buildStatus` is IN_PROGRESS in every state\n"
        "that is not terminal.\n\n"
        "`MILLRACE_MAX_ATTEMPTS` counts the attempts that failed through us. One that was handed back because its worker\n"
        "left (`infra.worker_shutdown`) is not counted, the first twenty times. A bug (`internal.bug`) is not tried again.\n\n"
        "## Reasons\n\n"
        "Every ended build has exactly one. `user.*` is the build's own doing, `infra.*` and `internal.*` are ours.\n\n"
        "| reason | what it means |\n|---|---|\n" + "".join(f"| `{reason}` | {REASON_MEANS[reason]} |\n" for reason in Reason)
    )


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201  # this is the command that makes the page
