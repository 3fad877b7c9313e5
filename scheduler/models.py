"""The tables. Times are milliseconds since 1970 by the database's clock, or None; JSON columns hold CodeBuild's own names.

`builds.state` is written by `scheduler.lifecycle` and by nothing else.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from millrace import packing
from millrace.contract import MAX_LOG_CHUNK_BYTES


class _Members(sa.types.TypeDecorator[dict[str, Any]]):
    """A JSON object. A damaged one is read as one without members, which who needs them finds wrong, and nobody else."""

    impl = sa.JSON
    cache_ok = True

    def process_result_value(self, value: object, dialect: sa.Dialect) -> dict[str, Any]:
        """Nothing but an object."""
        return value if isinstance(value, dict) else {}


class _Chunk(sa.types.TypeDecorator[bytes]):
    """Bytes of a log, which may lie there packed. A damaged frame is read as it is, which who holds it against its hash finds."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: bytes | None, dialect: sa.Dialect) -> bytes | None:
        """What is no frame of ours, and looks like one, is made one."""
        if value is None or isinstance(value, packing.Packed):
            return None if value is None else bytes(value)
        return bytes(packing.pack(value)) if value.startswith(packing.MAGIC) else value

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> bytes | None:
        """Always as the build wrote them."""
        if value is None or not value.startswith(packing.MAGIC):
            return value
        try:
            return packing.unpack(value, MAX_LOG_CHUNK_BYTES)
        except ValueError:
            return value


Json = sa.JSON
Ms = sa.BigInteger
_LOG_HERE = sa.text("log_key IS NULL AND log_bytes > 0")
IS_QUEUED = sa.text("builds.state = 'QUEUED'")
IS_HELD = sa.text("builds.state IN ('CLAIMED', 'RUNNING', 'FINALIZING')")
IS_ACCEPTED = sa.text("deliveries.outcome = 'accepted'")
"""Written out, as a condition with parameters is not seen to be that of a partial index."""
_SMALL = "2000/4294967296/"
"""The need of a build that was queued by a release that knew of none: that of BUILD_GENERAL1_SMALL."""
_AUTO = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _index(name: str, *columns: Any, only: sa.TextClause) -> sa.Index:
    """An index of those rows alone for which `only` holds."""
    condition = sa.text(str(only).replace("builds.", "").replace("deliveries.", ""))
    return sa.Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


class Base(DeclarativeBase):
    """The parent of all tables; constraint names are fixed, so that migrations can name them."""

    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Project(Base):
    """A project. A deleted one stays as a row, so that a build number is never used twice."""

    __tablename__ = "projects"
    name: Mapped[str] = mapped_column(sa.String(150), primary_key=True)
    uuid: Mapped[str] = mapped_column(sa.String(36), index=True)
    settings: Mapped[dict[str, Any]] = mapped_column(Json)
    concurrent_build_limit: Mapped[int | None]
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    weight: Mapped[int] = mapped_column(default=1, server_default="1")
    cancel_superseded: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    infra_retry: Mapped[str] = mapped_column(sa.String(20), default="always", server_default="always")
    last_build_number: Mapped[int] = mapped_column(default=0)
    created_ms: Mapped[int] = mapped_column(Ms)
    modified_ms: Mapped[int] = mapped_column(Ms)
    deleted_ms: Mapped[int | None] = mapped_column(Ms)


class Build(Base):
    """A build: what was asked for, where it stands, who holds it. `deadline_ms` is None while it waits, and where it ended so.

    `level` orders it among all builds of its fleet, `priority` among those of its project and level; `rank` is both, the least
    first. `not_before_ms`: it waits until then at least. `line` names the branch or pull request that it is of, where one is.
    `need` is the key of a `millrace.need.Need`; `passed_ms`: since when others go before it only for its need.
    """

    __tablename__ = "builds"
    id: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    project_name: Mapped[str] = mapped_column(sa.ForeignKey("projects.name"))
    number: Mapped[int]
    settings: Mapped[dict[str, Any]] = mapped_column(_Members)
    initiator: Mapped[str] = mapped_column(sa.String(200))
    fleet: Mapped[str] = mapped_column(sa.String(100))
    priority: Mapped[int]
    state: Mapped[str] = mapped_column(sa.String(20))
    reason: Mapped[str | None] = mapped_column(sa.String(50))
    message: Mapped[str] = mapped_column(sa.Text, default="")
    exit_code: Mapped[int | None]
    attempt_no: Mapped[int] = mapped_column(default=0)
    faults: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int]
    lease_owner: Mapped[str | None] = mapped_column(sa.String(100))
    lease_expires_ms: Mapped[int | None] = mapped_column(Ms)
    cancel_requested_ms: Mapped[int | None] = mapped_column(Ms)
    submitted_ms: Mapped[int] = mapped_column(Ms)
    queued_ms: Mapped[int] = mapped_column(Ms)
    queue_deadline_ms: Mapped[int] = mapped_column(Ms)
    first_claimed_ms: Mapped[int | None] = mapped_column(Ms)
    deadline_ms: Mapped[int | None] = mapped_column(Ms)
    finished_ms: Mapped[int | None] = mapped_column(Ms)
    resolved_source_version: Mapped[str | None] = mapped_column(sa.String(256))
    exported: Mapped[list[dict[str, str]]] = mapped_column(Json, default=list)
    marks: Mapped[dict[str, int]] = mapped_column(Json, default=dict)
    retry_of: Mapped[str | None] = mapped_column(sa.String(200))
    auto_retry_number: Mapped[int] = mapped_column(default=0, server_default="0")
    next_auto_retry: Mapped[str | None] = mapped_column(sa.String(200))
    level: Mapped[int] = mapped_column(default=0, server_default="0")
    rank: Mapped[int] = mapped_column(default=0, server_default="0")
    not_before_ms: Mapped[int] = mapped_column(Ms, default=0, server_default="0")
    line: Mapped[str | None] = mapped_column(sa.String(256))
    superseded_by: Mapped[str | None] = mapped_column(sa.String(200))
    need: Mapped[str] = mapped_column(sa.String(1000), default=_SMALL, server_default=_SMALL)
    passed_ms: Mapped[int | None] = mapped_column(Ms)
    __table_args__ = (
        sa.UniqueConstraint("project_name", "number"),
        _index("ix_builds_waiting_best", "fleet", "need", "project_name", "rank", "number", only=IS_QUEUED),
        _index("ix_builds_waiting_oldest", "fleet", "need", "project_name", "number", only=IS_QUEUED),
        _index("ix_builds_waiting_deadline", "queue_deadline_ms", only=IS_QUEUED),
        _index("ix_builds_held", "fleet", "project_name", only=IS_HELD),
        _index("ix_builds_line", "project_name", "line", only=sa.text("finished_ms IS NULL")),
        sa.Index("ix_builds_state_lease", "state", "lease_expires_ms"),
        sa.Index("ix_builds_submitted", "submitted_ms", "id"),
        sa.Index("ix_builds_project_submitted", "project_name", "submitted_ms", "id"),
        sa.CheckConstraint("(finished_ms IS NULL) = (reason IS NULL)", name="one_reason_when_ended"),
    )


class Attempt(Base):
    """One try at a build. `token_hash` lets its worker in until the attempt ends.

    Of its log, `log_sha256` and `log_footer` are the worker's word; all else is what the farm itself stored and counted.
    `in_parts`: keys and names of what it began to send in parts.
    """

    __tablename__ = "attempts"
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"), primary_key=True)
    attempt_no: Mapped[int] = mapped_column(primary_key=True)
    worker_id: Mapped[str] = mapped_column(sa.String(100))
    token_hash: Mapped[str] = mapped_column(sa.String(64))
    claimed_ms: Mapped[int] = mapped_column(Ms)
    ended_ms: Mapped[int | None] = mapped_column(Ms)
    verdict: Mapped[str | None] = mapped_column(sa.String(20))
    reason: Mapped[str | None] = mapped_column(sa.String(50))
    message: Mapped[str] = mapped_column(sa.Text, default="")
    report_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    log_chunks: Mapped[int] = mapped_column(default=0)
    log_bytes: Mapped[int] = mapped_column(Ms, default=0)
    log_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    log_complete: Mapped[bool] = mapped_column(default=False)
    log_key: Mapped[str | None] = mapped_column(sa.String(300))
    log_root: Mapped[str | None] = mapped_column(sa.String(64))
    log_footer: Mapped[dict[str, Any] | None] = mapped_column(Json)
    swept: Mapped[bool] = mapped_column(default=False)
    cache_lookups: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)
    in_parts: Mapped[list[list[str]] | None] = mapped_column(Json)
    __table_args__ = (
        sa.Index("ix_attempts_log_here", "ended_ms", sqlite_where=_LOG_HERE, postgresql_where=_LOG_HERE),
        sa.Index("ix_attempts_unswept", "ended_ms", sqlite_where=sa.text("swept = 0"), postgresql_where=sa.text("swept = false")),
    )


class Event(Base):
    """Every move of every build, written in the same commit as the move."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(_AUTO, primary_key=True, autoincrement=True)
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"), index=True)
    attempt_no: Mapped[int]
    at_ms: Mapped[int] = mapped_column(Ms)
    event: Mapped[str] = mapped_column(sa.String(20))
    before: Mapped[str] = mapped_column(sa.String(20))
    after: Mapped[str] = mapped_column(sa.String(20))
    reason: Mapped[str | None] = mapped_column(sa.String(50))


class Phase(Base):
    """One phase of one attempt, as its worker reported it."""

    __tablename__ = "phases"
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"), primary_key=True)
    attempt_no: Mapped[int] = mapped_column(primary_key=True)
    phase_type: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    status: Mapped[str | None] = mapped_column(sa.String(20))
    started_ms: Mapped[int] = mapped_column(Ms)
    ended_ms: Mapped[int | None] = mapped_column(Ms)
    duration_ms: Mapped[int | None] = mapped_column(Ms)
    contexts: Mapped[list[dict[str, str]]] = mapped_column(Json, default=list)


class LogChunk(Base):
    """A piece of a build's log, until the sweeper moves the whole log to the object store."""

    __tablename__ = "log_chunks"
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"), primary_key=True)
    attempt_no: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    offset: Mapped[int] = mapped_column(Ms)
    size: Mapped[int]
    sha256: Mapped[str] = mapped_column(sa.String(64))
    data: Mapped[bytes] = mapped_column(_Chunk)


class Artifact(Base):
    """An object that the build's winning attempt made visible, in the commit that ended the build.

    `published`: no copy to `public_bucket` is due any more. `public_problem` says why it is not there, or no longer.
    `public_round` counts how often it had to be copied anew, so that a copy that was overtaken does not pass for the last.
    """

    __tablename__ = "artifacts"
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"), primary_key=True)
    identifier: Mapped[str] = mapped_column(sa.String(128), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(1024), primary_key=True)
    attempt_no: Mapped[int]
    key: Mapped[str] = mapped_column(sa.String(1200))
    size_bytes: Mapped[int] = mapped_column(Ms)
    sha256: Mapped[str] = mapped_column(sa.String(64))
    md5: Mapped[str] = mapped_column(sa.String(32))
    packaging: Mapped[str] = mapped_column(sa.String(10))
    file_count: Mapped[int]
    public_bucket: Mapped[str | None] = mapped_column(sa.String(63))
    public_key: Mapped[str | None] = mapped_column(sa.String(1200))
    published: Mapped[bool] = mapped_column(default=True, server_default=sa.true())
    public_problem: Mapped[str | None] = mapped_column(sa.Text)
    public_round: Mapped[int] = mapped_column(default=0, server_default="0")
    __table_args__ = (
        sa.Index("ix_artifacts_public", "public_bucket", "public_key"),
        sa.Index(
            "ix_artifacts_unpublished",
            "build_id",
            sqlite_where=sa.text("published = 0"),
            postgresql_where=sa.text("published = false"),
        ),
    )


class CacheEntry(Base):
    """A cache that a winning attempt made. One with a key is never replaced; one without has `replaced_ms` when the next came.

    `replaced_ms` is also set where it was removed, or had to make room. `used_ms`: when it answered a build, at last.
    """

    __tablename__ = "cache_entries"
    id: Mapped[int] = mapped_column(_AUTO, primary_key=True, autoincrement=True)
    namespace: Mapped[str] = mapped_column(sa.String(300))
    version: Mapped[str] = mapped_column(sa.String(64))
    key: Mapped[str] = mapped_column(sa.String(512))
    object_key: Mapped[str] = mapped_column(sa.String(1200))
    size_bytes: Mapped[int] = mapped_column(Ms)
    sha256: Mapped[str] = mapped_column(sa.String(64))
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"))
    attempt_no: Mapped[int]
    created_ms: Mapped[int] = mapped_column(Ms)
    replaced_ms: Mapped[int] = mapped_column(Ms, default=0)
    used_ms: Mapped[int] = mapped_column(Ms, default=0, server_default="0")
    __table_args__ = (
        sa.UniqueConstraint("namespace", "version", "key", "replaced_ms"),
        sa.Index("ix_cache_entries_build", "build_id", "attempt_no"),
        sa.Index("ix_cache_entries_replaced", "replaced_ms"),
    )


class CacheLayerBelow(Base):
    """A layer that a cache's own lies on, lowest first by `seq`. It stays as long as a cache needs it."""

    __tablename__ = "cache_layers"
    entry_id: Mapped[int] = mapped_column(sa.ForeignKey("cache_entries.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    object_key: Mapped[str] = mapped_column(sa.String(1200))
    size_bytes: Mapped[int] = mapped_column(Ms)
    sha256: Mapped[str] = mapped_column(sa.String(64))
    build_id: Mapped[str] = mapped_column(sa.String(200))
    attempt_no: Mapped[int]
    __table_args__ = (sa.Index("ix_cache_layers_build", "build_id", "attempt_no"),)


class Secret(Base):
    """A secret of the farm's own store, sealed. `project_name` is "" for one that all projects may use."""

    __tablename__ = "secrets"
    project_name: Mapped[str] = mapped_column(sa.String(150), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(512), primary_key=True)
    version: Mapped[int]
    sealed: Mapped[bytes] = mapped_column(sa.LargeBinary)
    description: Mapped[str] = mapped_column(sa.String(1024))
    created_ms: Mapped[int] = mapped_column(Ms)
    modified_ms: Mapped[int] = mapped_column(Ms)


class Webhook(Base):
    """A project's webhook. `id` stands in its address; its secrets are sealed, the previous one holds until `previous_until_ms`.

    `repository_id` is the git server's own, learnt from the first delivery: a repository keeps it when it is renamed.
    `looked_ms`: when its branches were looked for, `seen_ms` when they were found. `provider_hook_id` is what the git server
    calls this webhook, where we made it there; `listed_ms`: when its list of deliveries was read.
    """

    __tablename__ = "webhooks"
    id: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    project_name: Mapped[str] = mapped_column(sa.ForeignKey("projects.name"), unique=True)
    provider: Mapped[str] = mapped_column(sa.String(20))
    settings: Mapped[dict[str, Any]] = mapped_column(_Members)
    sealed: Mapped[bytes] = mapped_column(sa.LargeBinary)
    previous: Mapped[bytes | None] = mapped_column(sa.LargeBinary)
    previous_until_ms: Mapped[int] = mapped_column(Ms, default=0)
    repository_id: Mapped[str | None] = mapped_column(sa.String(100))
    looked_ms: Mapped[int] = mapped_column(Ms, default=0, server_default="0")
    seen_ms: Mapped[int] = mapped_column(Ms, default=0, server_default="0")
    provider_hook_id: Mapped[str | None] = mapped_column(sa.String(100))
    listed_ms: Mapped[int] = mapped_column(Ms, default=0, server_default="0")
    created_ms: Mapped[int] = mapped_column(Ms)
    modified_ms: Mapped[int] = mapped_column(Ms)
    secret_ms: Mapped[int] = mapped_column(Ms)


class Delivery(Base):
    """What a webhook was told, and what was decided; one row an event, as a delivery may tell of several (`part`).

    `same` is a hash of what makes an event that very event, set where one may start a build. `event` is what waits: a pull
    request's event (`approval`), what a comment asks for (`checking`, see `scheduler.wishes`), or a delivery that is only noted
    so far (`accepted`, see `scheduler.inbox`). `stamp`: when the pull request was as the event tells, in the server's own
    words, which sort by time; of a push the commit that it goes from, and its time where that is told.
    """

    __tablename__ = "deliveries"
    id: Mapped[int] = mapped_column(_AUTO, primary_key=True, autoincrement=True)
    webhook_id: Mapped[str] = mapped_column(sa.String(40))
    project_name: Mapped[str] = mapped_column(sa.String(150))
    delivery_id: Mapped[str] = mapped_column(sa.String(100))
    part: Mapped[int] = mapped_column(default=0)
    same: Mapped[str | None] = mapped_column(sa.String(64))
    received_ms: Mapped[int] = mapped_column(Ms)
    what: Mapped[str] = mapped_column(sa.String(100))
    ref: Mapped[str | None] = mapped_column(sa.String(320))
    commit_id: Mapped[str | None] = mapped_column(sa.String(64))
    outcome: Mapped[str] = mapped_column(sa.String(20))
    why: Mapped[str] = mapped_column(sa.Text)
    build_id: Mapped[str | None] = mapped_column(sa.String(200))
    event: Mapped[dict[str, Any] | None] = mapped_column(Json)
    stamp: Mapped[str | None] = mapped_column(sa.String(100))
    __table_args__ = (
        sa.UniqueConstraint("webhook_id", "delivery_id", "part", name="uq_deliveries_delivery_id"),
        sa.UniqueConstraint("webhook_id", "same", name="uq_deliveries_same"),
        sa.Index("ix_deliveries_project", "project_name", "id"),
        sa.Index("ix_deliveries_ref", "webhook_id", "ref", "id"),
        _index("ix_deliveries_checking", "id", only=sa.text("outcome = 'checking'")),
        _index("ix_deliveries_waiting", "project_name", "id", only=sa.text("outcome = 'approval'")),
        _index("ix_deliveries_accepted", "webhook_id", "id", only=IS_ACCEPTED),
    )


class Head(Base):
    """Where a branch of a webhook's repository was when it was looked at; `moved_to` where it is, as long as nobody told us."""

    __tablename__ = "heads"
    webhook_id: Mapped[str] = mapped_column(sa.ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True)
    ref: Mapped[str] = mapped_column(sa.String(320), primary_key=True)
    commit_id: Mapped[str | None] = mapped_column(sa.String(64))
    moved_to: Mapped[str | None] = mapped_column(sa.String(64))


class Outbox(Base):
    """What must be told to the outside after a commit. `key` makes telling twice one row."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(_AUTO, primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(sa.String(30))
    key: Mapped[str] = mapped_column(sa.String(300), unique=True)
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    created_ms: Mapped[int] = mapped_column(Ms)
    sent_ms: Mapped[int | None] = mapped_column(Ms)
    tries: Mapped[int] = mapped_column(default=0)
    next_try_ms: Mapped[int] = mapped_column(Ms)
    __table_args__ = (
        sa.Index(
            "ix_outbox_unsent",
            "next_try_ms",
            sqlite_where=sa.text("sent_ms IS NULL"),
            postgresql_where=sa.text("sent_ms IS NULL"),
        ),
    )


class Notice(Base):
    """What a git server is to be told of a build, written in the commit of the move (`scheduler.notices`).

    Of a `topic`, the newest by `asked_ms` (when the build was asked for) and `id` counts. `outcome` is set once it is settled;
    `known_as` is what the server calls the status.
    """

    __tablename__ = "notices"
    id: Mapped[int] = mapped_column(_AUTO, primary_key=True, autoincrement=True)
    project_name: Mapped[str] = mapped_column(sa.String(150))
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"))
    topic: Mapped[str] = mapped_column(sa.String(64))
    asked_ms: Mapped[int] = mapped_column(Ms)
    commit_id: Mapped[str] = mapped_column(sa.String(64))
    context: Mapped[str] = mapped_column(sa.String(255))
    state: Mapped[str] = mapped_column(sa.String(20))
    created_ms: Mapped[int] = mapped_column(Ms)
    due_ms: Mapped[int] = mapped_column(Ms)
    tries: Mapped[int] = mapped_column(default=0, server_default="0")
    settled_ms: Mapped[int | None] = mapped_column(Ms)
    outcome: Mapped[str | None] = mapped_column(sa.String(20))
    why: Mapped[str] = mapped_column(sa.Text, default="", server_default="")
    known_as: Mapped[str | None] = mapped_column(sa.String(50))
    __table_args__ = (
        sa.Index("ix_notices_topic", "topic", "asked_ms", "id"),
        sa.Index("ix_notices_build", "build_id", "id"),
        sa.Index("ix_notices_project", "project_name", "id"),
        _index("ix_notices_due", "due_ms", only=sa.text("settled_ms IS NULL")),
    )


class Idempotency(Base):
    """A request's key and what it made, for 24 hours."""

    __tablename__ = "idempotency"
    scope: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    key: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(sa.String(64))
    build_id: Mapped[str] = mapped_column(sa.ForeignKey("builds.id"))
    created_ms: Mapped[int] = mapped_column(Ms)


class Worker(Base):
    """A worker as it last showed itself. `keeps`: the build for which it keeps room, where it does."""

    __tablename__ = "workers"
    id: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    fleet: Mapped[str] = mapped_column(sa.String(100))
    version: Mapped[str] = mapped_column(sa.String(50))
    slots: Mapped[int]
    free_slots: Mapped[int]
    first_seen_ms: Mapped[int] = mapped_column(Ms)
    last_seen_ms: Mapped[int] = mapped_column(Ms)
    state: Mapped[str] = mapped_column(sa.String(20), default="up", server_default="up")
    not_claiming: Mapped[str] = mapped_column(sa.String(500), default="", server_default="")
    generation: Mapped[int | None]
    cpu_millis: Mapped[int | None]
    memory_bytes: Mapped[int | None] = mapped_column(Ms)
    labels: Mapped[list[str] | None] = mapped_column(Json)
    idle_since_ms: Mapped[int | None] = mapped_column(Ms)
    leave_ms: Mapped[int | None] = mapped_column(Ms)
    leave_why: Mapped[str] = mapped_column(sa.String(500), default="", server_default="")
    keeps: Mapped[str | None] = mapped_column(sa.String(200))


class Fleet(Base):
    """A fleet as it is set: paused or not, and how many of its builds may run at once. One without a row has no such limits.

    `settings` is a `millrace.fleet.FleetSettings`. Workers of `generation` are the newest; `stable_generation` is the one before
    it as long as the newest is tried out, else the same. `decision` is what was decided last, `decided_ms` when.
    """

    __tablename__ = "fleets"
    name: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    paused_ms: Mapped[int | None] = mapped_column(Ms)
    paused_by: Mapped[str | None] = mapped_column(sa.String(200))
    paused_why: Mapped[str | None] = mapped_column(sa.String(500))
    max_running: Mapped[int | None]
    modified_ms: Mapped[int] = mapped_column(Ms, default=0, server_default="0")
    settings: Mapped[dict[str, Any] | None] = mapped_column(Json)
    generation: Mapped[int] = mapped_column(default=1, server_default="1")
    stable_generation: Mapped[int] = mapped_column(default=1, server_default="1")
    rollout: Mapped[dict[str, Any] | None] = mapped_column(Json)
    decision: Mapped[dict[str, Any] | None] = mapped_column(Json)
    decided_ms: Mapped[int | None] = mapped_column(Ms)


class Instance(Base):
    """An instance of a fleet as it was seen last: what a worker runs in, whether it came or not (`scheduler.fleets.provider`).

    Its worker, once there is one, has the same id. `gone_ms`: when it was no longer there.
    """

    __tablename__ = "instances"
    fleet: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    id: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    provider: Mapped[str] = mapped_column(sa.String(20))
    state: Mapped[str] = mapped_column(sa.String(20))
    generation: Mapped[int | None]
    build_id: Mapped[str | None] = mapped_column(sa.String(200))
    found_ms: Mapped[int] = mapped_column(Ms)
    seen_ms: Mapped[int] = mapped_column(Ms)
    joined_ms: Mapped[int | None] = mapped_column(Ms)
    released_ms: Mapped[int | None] = mapped_column(Ms)
    gone_ms: Mapped[int | None] = mapped_column(Ms)
    why: Mapped[str] = mapped_column(sa.String(500), default="", server_default="")
    __table_args__ = (_index("ix_instances_there", "fleet", only=sa.text("gone_ms IS NULL")),)


class Decision(Base):
    """How many workers a fleet was to have, and why: one row where that changed, and one a minute. `load` is what it rests on."""

    __tablename__ = "decisions"
    id: Mapped[int] = mapped_column(_AUTO, primary_key=True, autoincrement=True)
    fleet: Mapped[str] = mapped_column(sa.String(100))
    at_ms: Mapped[int] = mapped_column(Ms)
    wanted: Mapped[int]
    why: Mapped[str] = mapped_column(sa.String(500))
    load: Mapped[dict[str, Any]] = mapped_column(Json)
    __table_args__ = (sa.Index("ix_decisions_fleet", "fleet", "id"),)


class Turn(Base):
    """How many claims a fleet has had, and its clock (`scheduler.fairness`).

    Counted apart by what the workers offer that claimed: `claims` where that was nothing, else `offers`, by the offer's key.
    """

    __tablename__ = "turns"
    fleet: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    claims: Mapped[int] = mapped_column(Ms, default=0)
    clock: Mapped[int] = mapped_column(Ms, default=0)
    offers: Mapped[dict[str, Any]] = mapped_column(_Members, default=dict, server_default="{}")


class Served(Base):
    """Where a fleet's clock stands for one project (`scheduler.fairness`)."""

    __tablename__ = "served"
    fleet: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    project_name: Mapped[str] = mapped_column(sa.String(150), primary_key=True)
    clock: Mapped[int] = mapped_column(Ms, default=0)


class Token(Base):
    """An API or worker token. Only its hash is kept."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(100))
    scope: Mapped[str] = mapped_column(sa.String(20))
    project_name: Mapped[str | None] = mapped_column(sa.String(150))
    hash: Mapped[str] = mapped_column(sa.String(64), unique=True)
    created_ms: Mapped[int] = mapped_column(Ms)
    expires_ms: Mapped[int | None] = mapped_column(Ms)
    revoked_ms: Mapped[int | None] = mapped_column(Ms)


class Leader(Base):
    """Which scheduler acts, by lease; the others look on."""

    __tablename__ = "leaders"
    name: Mapped[str] = mapped_column(sa.String(50), primary_key=True)
    owner: Mapped[str] = mapped_column(sa.String(100))
    expires_ms: Mapped[int] = mapped_column(Ms)
