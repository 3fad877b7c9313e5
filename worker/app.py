"""The worker: a Celery consumer that only wakes the slots, and the slots themselves."""

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Final

from celery import Celery
from celery.worker import WorkController
from celery.worker import state as celery_state

from buildenv.layers import evict
from buildenv.mirror import prune
from millrace.errors import InvalidInput, Unavailable
from millrace.failpoints import guard
from millrace.ids import new_worker_id
from millrace.log import get_logger
from millrace.settings import Settings, for_children
from worker.control import Control
from worker.engines import make_engine
from worker.headroom import lack_of_room
from worker.janitor import Janitor
from worker.leaving import Leaving
from worker.lot import Lot
from worker.notices import Metadata, Notice, Notices
from worker.nursery import Nursery
from worker.order import make_park_order
from worker.slots import Slots
from worker.watchdog import Watchdog

log = get_logger(__name__)
TASK: Final = "worker.run_build"


def make_celery(settings: Settings, slots: Slots) -> Celery:
    """The Celery application. Acknowledged at once, no results, no remote control, JSON only: a message is just a bell."""
    app = Celery("millrace.worker", broker=settings.broker, set_as_current=False)
    app.conf.update(
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 300,
            "unacked_restore_throttle": 1,
            "health_check_interval": 10,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
        },
    )

    @app.task(name=TASK)
    def run_build(build_id: str) -> None:
        """The bell rang. Which build is claimed, if any, the database decides; `build_id` is for the log."""
        log.debug("bell.rang", build_id=build_id)
        slots.rang()

    return app


def main(settings: Settings, environ: Mapping[str, str]) -> int:
    """Be a worker until SIGTERM or SIGINT; a second one does not wait for the builds."""
    if settings.worker_token is None:
        raise InvalidInput("a worker needs MILLRACE_WORKER_TOKEN", hint="'millrace token create --scope worker NAME' makes one.")
    children = for_children(environ)
    worker_id = settings.worker_id or new_worker_id(settings.host)
    engine = make_engine(settings.engine, settings.docker_host, children)
    janitor = Janitor(
        engine,
        settings.workspaces,
        lambda: prune_mirrors(settings),
        lambda: evict(settings.layers, settings.cache_bytes),
    )
    control = guard(Control(settings.api, settings.worker_token.get_secret_value()), "verb", Unavailable)
    nursery = Nursery(children)
    lot = Lot(nursery, lambda place, mould: make_park_order(place, mould, worker_id, settings), settings.parked)
    leaving = Leaving()
    slots = Slots(settings, worker_id, control, engine, janitor, lot, leaving)
    heard: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        leaving.ask(f"{signal.Signals(number).name} came", 0 if heard else settings.drain_s)
        heard.append(number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    log.info("worker.started", worker_id=worker_id, fleet=settings.fleet, slots=settings.slots, engine=settings.engine)
    for name, work in (("janitor", janitor.run_forever), ("poll", slots.poll_forever), ("lot", lot.tend_forever)):
        threading.Thread(target=work, args=(leaving.begun,), name=name, daemon=True).start()
    celery = make_celery(settings, slots)
    watchdog = Watchdog(
        turned_s=lambda: slots.turned_s, heard_s=lambda: slots.heard_s, waiting=lambda: bells_waiting(celery, settings.fleet)
    )
    threading.Thread(target=watchdog.watch, args=(leaving.begun,), name="watchdog", daemon=True).start()
    threading.Thread(target=_listen, args=(celery, settings), name="bell", daemon=True).start()
    if settings.notices == "ec2":
        notices = Notices(Metadata(settings.metadata_url), lambda notice: _heed(notice, leaving, settings.drain_s))
        threading.Thread(target=notices.watch, args=(threading.Event(),), name="notices", daemon=True).start()
    leaving.begun.wait()
    celery_state.should_stop = os.EX_OK  # type: ignore[assignment]  # its consumer ends: bells that ring for others must not come here
    slots.drain()
    lot.close()
    nursery.close()
    slots.leave()
    control.close()
    log.info("worker.stopped", worker_id=worker_id)
    return 0


def _heed(notice: Notice, leaving: Leaving, drain_s: float) -> None:
    """The machine goes: leave, as after a signal or sooner."""
    leaving.ask(notice.why, drain_s if notice.builds_within_s is None else min(drain_s, notice.builds_within_s))


def prune_mirrors(settings: Settings) -> int:
    """Remove the mirrors of repositories that are too old or too much, or in the way of builds; how many went."""

    def is_short() -> bool:
        percent = settings.min_free_inodes_percent
        return bool(lack_of_room([settings.mirrors], min_free_bytes=settings.min_free_bytes, min_free_inodes_percent=percent))

    return prune(
        settings.mirrors, most_bytes=settings.mirrors_bytes, most_age_s=settings.mirrors_days * 86_400, is_short=is_short
    )


def bells_waiting(app: Celery, fleet: str) -> int | None:
    """How many messages the broker holds for the fleet that no worker has taken; None where it does not say."""
    with app.connection_for_read() as connection:
        try:
            channel: Any = connection.default_channel
            return int(channel.queue_declare(_queue(fleet), passive=True).message_count)
        except (*connection.connection_errors, *connection.channel_errors):
            return None  # away, or it holds none and so knows of no such queue


def _queue(fleet: str) -> str:
    return f"millrace.{fleet}"


def _listen(app: Celery, settings: Settings) -> None:
    """Hear the bell, for ever: where Redis is away, Celery comes back to it, and the slots' own poll goes on meanwhile."""
    options: dict[str, Any] = {
        "pool_cls": "solo",
        "concurrency": 1,
        "queues": [_queue(settings.fleet)],
        "without_mingle": True,
        "without_gossip": True,
        "without_heartbeat": True,
        "loglevel": "WARNING",
    }
    WorkController(app=app, **options).start()
