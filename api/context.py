"""What the routes work with: one record per application."""

import threading
from dataclasses import dataclass, field
from typing import cast

from flask import current_app

from api.readiness import Readiness
from millrace.secrets import SecretProvider
from millrace.settings import Settings
from millrace.storage import Store
from scheduler.db import Database
from scheduler.dispatch import Bell, Ringer
from scheduler.drain import Drain
from scheduler.hooks import OpenHooks
from scheduler.inbox import Inbox


@dataclass(frozen=True, kw_only=True)
class Context:
    """The parts that `create_app` was given.

    `closing` is set when the server stops, so that open streams end. `streams` counts the places for those who follow a log:
    each holds a thread, and some must stay free for the workers, whose leases run out while they wait.
    """

    settings: Settings
    db: Database
    store: Store
    bell: Bell
    streams: threading.BoundedSemaphore
    readiness: Readiness
    secrets: SecretProvider
    ringer: Ringer
    hooks: OpenHooks
    inbox: Inbox
    drain: Drain
    closing: threading.Event = field(default_factory=threading.Event)


def places_for_streams(threads: int) -> int:
    """How many of a server's threads may follow logs at once: a quarter stays free, two at least."""
    return max(1, threads - max(2, threads // 4))


def here() -> Context:
    """The context of the application that serves this request."""
    return cast(Context, current_app.extensions["millrace"])
