"""Artifacts in the bucket that their project names (CodeBuild: ProjectArtifacts location, path, namespaceType and name).

An attempt stages its objects in the farm's own bucket, where nobody sees them. The commit that ends the build says where each
is to be published; the copies follow, at once or by the sweeper, until all are there. So a fenced attempt publishes nothing.
"""

from contextlib import suppress
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import ArtifactReport
from millrace.errors import InfraProblem, InvalidInput
from millrace.ids import uuid_of
from millrace.log import get_logger
from millrace.project import BuildSettings, ProjectArtifacts
from millrace.settings import Settings
from millrace.storage import Store
from scheduler.db import Database
from scheduler.models import Artifact

log = get_logger(__name__)
_AT_ONCE_BYTES: Final = 64 * 1024**2
"""So much is copied while the worker waits for its answer; more is left to the sweeper."""
_ROUND: Final = 1000


def place(settings: BuildSettings, build_id: str, report: ArtifactReport) -> tuple[str, str] | None:
    """Bucket and key under which an artifact is published; None where its project names no bucket."""
    wanted = _wanted(settings, report.identifier)
    if wanted is None or not wanted.location:
        return None
    return wanted.bucket, key_of(wanted, settings.project_name, build_id, report)


def _wanted(settings: BuildSettings, identifier: str | None) -> ProjectArtifacts | None:
    if identifier is None:
        return settings.artifacts
    return next((one for one in settings.secondary_artifacts if one.artifact_identifier == identifier), None)


def key_of(wanted: ProjectArtifacts, project: str, build_id: str, report: ArtifactReport) -> str:
    """CodeBuild's key rule: path, the build's uuid if BUILD_ID, name; empty parts dropped. Without packaging, files lie below.

    The buildspec's s3-prefix stands in the place of the path where the build's id follows. Parts `.` and `..` are dropped, too.
    """
    own_namespace = wanted.namespace_type == "BUILD_ID"
    path = report.s3_prefix if own_namespace and report.s3_prefix else wanted.path
    name = report.set_name or wanted.name or project
    parts = [*_parts(path or ""), *([uuid_of(build_id)] if own_namespace else []), *_parts(name)]
    if report.packaging == "NONE" or not parts:
        parts += _parts(report.name)
    return "/".join(parts)


def _parts(text: str) -> list[str]:
    return [part for part in text.split("/") if part not in ("", ".", "..")]


def publish(db: Database, store: Store, settings: Settings, build_id: str | None = None) -> int:
    """Copy what is to be published and is not yet, of one build or of all; how many that were.

    Raises InfraProblem where the store fails; what is left is copied in a later round.
    """
    # In any order, so that what a broken bucket keeps waiting does not stand before all else.
    waiting = sa.select(Artifact).where(Artifact.published == sa.false()).order_by(sa.func.random()).limit(_ROUND)
    with db.reading() as session:
        rows = session.scalars(waiting if build_id is None else waiting.where(Artifact.build_id == build_id)).all()
    if build_id is not None and sum(row.size_bytes for row in rows) > _AT_ONCE_BYTES:
        return 0
    failed: InfraProblem | None = None
    for row in rows:
        try:
            _copy(store, settings, row)
        except InfraProblem as problem:
            log.warning("artifact.publication_waits", build_id=row.build_id, bucket=row.public_bucket, why=problem.message)
            failed = problem
            continue
        where = (Artifact.build_id == row.build_id, Artifact.identifier == row.identifier, Artifact.name == row.name)

        def done(session: Session, where: tuple[sa.ColumnElement[bool], ...] = where) -> None:
            session.execute(sa.update(Artifact).where(*where).values(published=True))

        db.run(done)
    if failed is not None:
        raise failed
    return len(rows)


def _copy(store: Store, settings: Settings, row: Artifact) -> None:
    metadata = {
        "codebuild-buildarn": f"arn:aws:codebuild:{settings.region}:{settings.account_id}:build/{row.build_id}",
        "codebuild-content-md5": row.md5,
        "codebuild-content-sha256": row.sha256,
    }
    if row.public_bucket is None or row.public_key is None or row.public_bucket == settings.bucket:
        log.error("artifact.unpublishable", build_id=row.build_id, name=row.name, bucket=row.public_bucket)
        return
    try:
        store.copy(settings.bucket, row.key, row.public_bucket, row.public_key, metadata=metadata)
    except (FileNotFoundError, InvalidInput) as error:  # it will not get better by waiting
        log.error("artifact.unpublishable", build_id=row.build_id, name=row.name, key=row.public_key, why=str(error))
        return
    log.info("artifact.published", build_id=row.build_id, bucket=row.public_bucket, key=row.public_key)


def publish_soon(db: Database, store: Store, settings: Settings, build_id: str) -> None:
    """As `publish`, for a build that has just ended: what fails is the sweeper's."""
    with suppress(InfraProblem):  # it is logged
        publish(db, store, settings, build_id)
