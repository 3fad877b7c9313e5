"""The application: wiring, nothing else."""

import threading

from flask import Flask

from api import (
    artifacts,
    attempts,
    badges,
    builds,
    caches,
    errors,
    fleets,
    health,
    hooks,
    loads,
    logs,
    notices,
    objects,
    projects,
    secrets,
    uploads,
)
from api.context import Context, places_for_streams
from api.pages import routes as pages
from api.readiness import Readiness, silent
from api.webhooks import routes as webhooks
from millrace.settings import Settings
from millrace.storage import Store
from scheduler import health as scheduler_health
from scheduler.db import Database
from scheduler.dispatch import Bell, Ringer
from scheduler.drain import Drain
from scheduler.hooks import OpenHooks
from scheduler.inbox import Inbox
from scheduler.secrets import keys_of, open_provider


def create_app(settings: Settings, db: Database, store: Store, bell: Bell) -> Flask:
    """The API over these parts. The caller migrates the database, and closes the parts."""
    app = Flask("millrace.api", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the default provider has it
    streams = threading.BoundedSemaphore(places_for_streams(settings.api_threads))
    readiness = Readiness(
        {
            "database": silent(db.check),
            "schema": silent(lambda: db.require_schema(or_later=True)),
            "broker": bell.check,
            "store": silent(store.check),
            "scheduler": lambda: scheduler_health.scheduler(db),
            "workers": lambda: scheduler_health.workers(db),
        }
    )
    ringer, inbox = Ringer(db, bell), Inbox(db, settings.webhooks_at_once)
    app.extensions["millrace"] = Context(
        settings=settings,
        db=db,
        store=store,
        bell=bell,
        streams=streams,
        readiness=readiness,
        secrets=open_provider(settings, db),
        ringer=ringer,
        hooks=OpenHooks(db, keys_of(settings)),
        inbox=inbox,
        drain=Drain(db, settings, ringer.ring, inbox),
    )
    for part in (
        projects,
        builds,
        fleets,
        loads,
        caches,
        secrets,
        hooks,
        notices,
        logs,
        artifacts,
        uploads,
        attempts,
        objects,
        health,
        webhooks,
        badges,
        pages,
    ):
        app.register_blueprint(part.blueprint)
    errors.install(app)
    return app
