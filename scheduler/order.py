"""Which of two events of one branch or pull request is the newer, in whatever order they came.

A delivery may come late: sent again by hand, or fetched after the farm was down.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.webhook import EventKind, SourceEvent
from scheduler.models import Delivery

_LOOKED_AT: Final = 50


def newer(session: Session, webhook_id: str, event: SourceEvent) -> Delivery | None:
    """The last delivery that started a build of the branch or pull request as it was after `event`; None where there is none.

    Pull requests and pushes are told apart by the server's own time where it tells one (GitHub, Bitbucket Data Center, our
    post-receive script), else pushes by the commits that they go from and to. What cannot be told is taken for the newest.
    """
    if event.pull_request is None and event.kind is not EventKind.PUSH:
        return None
    those = sa.select(Delivery).where(
        Delivery.webhook_id == webhook_id,
        Delivery.ref == event.place,
        Delivery.build_id.is_not(None),
        Delivery.outcome == "build",
        Delivery.stamp.is_not(None),
    )
    return newest_after(event, session.scalars(those.order_by(Delivery.id.desc()).limit(_LOOKED_AT)).all())


def newest_after(event: SourceEvent, rows: Iterable[Delivery]) -> Delivery | None:
    """The same of `rows`, newest first as they came."""
    rows = [row for row in rows if (row.what == EventKind.PUSH) == (event.kind is EventKind.PUSH)]
    if event.pull_request is not None:
        return next((row for row in rows if (row.stamp or "") > event.stamp[:100]), None)
    mine = _moment(event.stamp)
    for row in rows:
        other = _moment(row.stamp or "")
        if mine is not None and other is not None and mine != other:
            if other > mine:
                return row
            continue
        if row.commit_id == event.before:  # it goes on from there
            return None
        if (row.stamp or "").partition(" ")[0] == event.commit:  # that went on from here
            return row
    return None


def _moment(stamp: str) -> float | None:
    """When a push was, by what its stamp has behind the commit that it goes from. Only those of one server compare."""
    told = stamp.partition(" ")[2]
    if told.isascii() and told.isdigit():
        return float(told)
    try:
        return datetime.fromisoformat(told).timestamp()
    except (ValueError, OverflowError):
        return None
