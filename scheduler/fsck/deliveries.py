"""What git servers delivered, and what was made of it."""

from typing import Any, Final

import sqlalchemy as sa

from millrace.webhook import EventKind
from scheduler.db import now_ms
from scheduler.fsck.terms import Fault, Said, Scope, said
from scheduler.hooks import Outcome
from scheduler.models import Build, Delivery
from scheduler.wishes import GIVE_UP_MS

_KINDS: Final = tuple(kind.value for kind in EventKind)
"""What starts builds; a comment that approves names the build of the pull request's own delivery."""
_LATE_MS: Final = 5 * 60_000
_PAUSE_MS: Final = 30 * 60_000
"""A git server may ask for a pause before the last try at a comment."""
_WHY_LATE: Final = "Is the scheduler running? /readyz says; its log tells what fails."


def one_delivery_one_build(scope: Scope) -> Said:
    """12: a delivery that started a build names one that is there, and no other names it; what is to be acted on is."""
    started = sa.select(Delivery.id, Delivery.delivery_id, Delivery.build_id, Delivery.project_name)
    started = started.where(Delivery.outcome == Outcome.BUILD.value)
    gone = scope.rows(started.outerjoin(Build, Build.id == Delivery.build_id).where(Build.id.is_(None)))
    of_event = sa.select(Delivery.build_id, sa.func.count().label("count")).where(
        Delivery.outcome == Outcome.BUILD.value, Delivery.what.in_(_KINDS)
    )
    twice = scope.rows(of_event.group_by(Delivery.build_id).having(sa.func.count() > 1))
    late: list[Any] = []
    for outcome, after_ms in ((Outcome.ACCEPTED, _LATE_MS), (Outcome.CHECKING, GIVE_UP_MS + _PAUSE_MS)):
        waiting = sa.select(Delivery.delivery_id, Delivery.project_name, Delivery.outcome)
        late += scope.rows(waiting.where(Delivery.outcome == outcome.value, Delivery.received_ms < now_ms() - after_ms))
    return said(
        "all deliveries",
        [
            *(
                Fault(
                    what=f"delivery {row.delivery_id} of {row.project_name} started {row.build_id}, which is not in the records",
                    ids=(row.delivery_id,),
                )
                for row in gone
            ),
            *(Fault(what=f"{row.count} deliveries started {row.build_id}", ids=(row.build_id,)) for row in twice),
            *(
                Fault(
                    what=f"delivery {row.delivery_id} of {row.project_name} is still {row.outcome}",
                    ids=(row.delivery_id,),
                    hint=_WHY_LATE,
                )
                for row in late
            ),
        ],
    )
