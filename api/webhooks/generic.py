"""Any git server that has our `post-receive` script (`post_receive.py`), which tells of one moved branch or tag at a time."""

from typing import Final

from werkzeug.datastructures import Headers

from api.webhooks.payload import MAX_PATHS, Payload, at, commit, text
from millrace.webhook import EventKind, Heard, SourceEvent

EVENT_HEADER: Final = "X-Millrace-Event"


def delivery_id(headers: Headers) -> str | None:
    """The delivery's own id, which is signed."""
    return headers.get("webhook-id")


def guess(payload: Payload) -> str:
    """The event of a payload: a push, or the test that `post-receive --ping` sends."""
    return "ping" if at(payload, "ping") is True else "push"


def heard(_event: str, payload: Payload) -> Heard:
    """What a payload comes down to."""
    if guess(payload) == "ping":
        return Heard(what="ping", ping=True)
    ref = text(payload, "ref")
    if ref is None or not ref.startswith(("refs/heads/", "refs/tags/")):
        return Heard(what="push", why=f"{ref or 'what was pushed'} is no branch and no tag")
    after, before = commit(payload, "after"), commit(payload, "before")
    if after is None:
        return Heard(what="push", why=f"{ref} was deleted")
    listed = at(payload, "paths")
    told = isinstance(listed, list) and len(listed) <= MAX_PATHS and all(isinstance(path, str) for path in listed)
    event = SourceEvent(
        kind=EventKind.PUSH,
        ref=ref,
        commit=after,
        before=before,
        actor_id=text(payload, "actor", most=100),
        message=text(payload, "message", most=10_000),
        paths=tuple(listed) if told else None,
        stamp=f"{before} {text(payload, 'at', most=50)}",
    )
    return Heard(what=EventKind.PUSH.value, events=(event,))
