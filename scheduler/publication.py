"""Artifacts in the bucket that their project names (CodeBuild: ProjectArtifacts location, path, namespaceType and name).

An attempt stages its objects in the farm's own bucket, where nobody sees them. The commit that ends the build says where each
is to be published; the copies follow, at once or by the scheduler, until all are there. So a fenced attempt publishes nothing.
An address belongs to the build that ended last: a copy that was late, and overtaken, is made good by copying that one again.
"""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import ArtifactReport, FinishReport
from millrace.errors import InfraProblem, InvalidInput
from millrace.ids import uuid_of
from millrace.log import get_logger
from millrace.project import BuildSettings, ProjectArtifacts
from millrace.settings import Settings
from millrace.storage import Store, check_key
from millrace.vocabulary import ArtifactsType
from scheduler.db import Database
from scheduler.models import Artifact, Build, Project

log = get_logger(__name__)
_AT_ONCE_BYTES: Final = 64 * 1024**2
_AT_ONCE_OBJECTS: Final = 50
"""So much is copied while the worker waits for its answer; more is left to the scheduler."""
_ROUND: Final = 1000
_FAILURES: Final = 3
"""After so many failures a bucket is left alone for this round, so that it does not hold up the others."""
_REST_S: Final = 300
"""How long at most a bucket that keeps failing is left alone."""
_TOGETHER: Final = 500


def keep(session: Session, build: Build, report: FinishReport) -> None:
    """Make the artifacts of a report visible, and say where they are to be published, in the report's commit."""
    wanted = BuildSettings.model_validate(build.settings)
    rows = [_row(wanted, build, item) for item in report.artifacts]
    by_address: dict[tuple[str, str], Artifact] = {}
    for row in rows:
        if row.public_bucket is None or row.public_key is None:
            continue
        before = by_address.get((row.public_bucket, row.public_key))
        if before is not None:
            before.published, before.public_problem = True, f"artifact {row.name} of the same build has the same address"
        by_address[row.public_bucket, row.public_key] = row
    if by_address:  # one build of a project after the other, so that each sees whom it replaces
        session.get(Project, build.project_name, with_for_update=True)
        _replace(session, build, list(by_address))
    session.add_all(rows)


def _row(wanted: BuildSettings, build: Build, item: ArtifactReport) -> Artifact:
    bucket, key, problem = None, None, None
    named = _wanted(wanted, item.identifier)
    if named is not None and named.location and named.type is ArtifactsType.S3:
        bucket, key = named.bucket, key_of(named, wanted.project_name, build.id, item)
        try:
            check_key(bucket, key)
        except InvalidInput as error:
            bucket, key, problem = None, None, error.message
            log.error("artifact.unpublishable", build_id=build.id, name=item.name, why=error.message)
    return Artifact(
        build_id=build.id,
        identifier=item.identifier or "",
        attempt_no=build.attempt_no,
        public_bucket=bucket,
        public_key=key,
        published=key is None,
        public_problem=problem,
        public_round=0,
        **item.model_dump(exclude={"identifier", "set_name", "s3_prefix"}),
    )


def _wanted(settings: BuildSettings, identifier: str | None) -> ProjectArtifacts | None:
    if identifier is None:
        return settings.artifacts
    return next((one for one in settings.secondary_artifacts if one.artifact_identifier == identifier), None)


def _replace(session: Session, build: Build, addresses: Sequence[tuple[str, str]]) -> None:
    """What builds before this one have at these addresses is there no longer, or soon."""
    for bucket in {bucket for bucket, _key in addresses}:
        keys = [key for its, key in addresses if its == bucket]
        for start in range(0, len(keys), _TOGETHER):
            session.execute(
                sa.update(Artifact)
                .where(Artifact.public_bucket == bucket, Artifact.public_key.in_(keys[start : start + _TOGETHER]))
                .where(Artifact.public_problem.is_(None))
                .values(published=True, public_problem=f"replaced by build {build.id}")
            )


def key_of(wanted: ProjectArtifacts, project: str, build_id: str, report: ArtifactReport) -> str:
    """CodeBuild's key rule: path, the build's uuid if BUILD_ID, name; empty parts dropped. Without packaging, files lie below.

    The buildspec's s3-prefix stands in the place of the path where the build's id follows. Parts `.` and `..` are dropped, too.
    """
    own_namespace = wanted.namespace_type == "BUILD_ID"
    path = report.s3_prefix if own_namespace and report.s3_prefix else wanted.path
    name = (report.set_name if wanted.override_artifact_name else None) or wanted.name or project
    parts = [*_parts(path or ""), *([uuid_of(build_id)] if own_namespace else []), *_parts(name)]
    if report.packaging == "NONE" or not parts:
        parts += _parts(report.name)
    return "/".join(parts)


def _parts(text: str) -> list[str]:
    return [part for part in text.split("/") if part not in ("", ".", "..")]


class Publisher:
    """Copies what is to be published. One that is kept leaves a bucket that fails alone for a while, longer each time."""

    def __init__(self, db: Database, store: Store, settings: Settings) -> None:
        self._db, self._store, self._settings = db, store, settings
        self._failures: Counter[str] = Counter()
        self._rests_until: dict[str, float] = {}

    def due(self) -> bool:
        """True where something waits that `publish` would try."""
        with self._db.reading() as session:
            return session.execute(self._waiting().limit(1)).first() is not None

    def publish(self, build_id: str | None = None, stop: threading.Event | None = None) -> int:
        """Copy what waits, of one build or of all, until `stop`; how many objects that were.

        Raises InfraProblem where the store fails; what is left is copied in a later round.
        """
        # In any order, so that what keeps failing does not stand before all else.
        waiting = self._waiting().order_by(sa.func.random()).limit(_ROUND)
        with self._db.reading() as session:
            rows = session.scalars(waiting if build_id is None else waiting.where(Artifact.build_id == build_id)).all()
        if build_id is not None and (len(rows) > _AT_ONCE_OBJECTS or sum(row.size_bytes for row in rows) > _AT_ONCE_BYTES):
            return 0
        failed: InfraProblem | None = None
        failures: Counter[str | None] = Counter()
        done = 0
        for row in rows:
            if stop is not None and stop.is_set():
                break
            if failures[row.public_bucket] >= _FAILURES:
                continue
            try:
                self._publish(row)
            except InfraProblem as problem:
                failures[row.public_bucket] += 1
                failed = problem
                continue
            done += 1
        if done:
            log.info("artifacts.published", objects=done, builds=len({row.build_id for row in rows}))
        self._rest(failures, {row.public_bucket for row in rows}, failed)
        if failed is not None:
            raise failed
        return done

    def _waiting(self) -> sa.Select[tuple[Artifact]]:
        resting = [bucket for bucket, until in self._rests_until.items() if until > time.monotonic()]
        return sa.select(Artifact).where(Artifact.published == sa.false(), Artifact.public_bucket.not_in(resting))

    def _rest(self, failures: Counter[str | None], tried: set[str | None], last: InfraProblem | None) -> None:
        for bucket in tried:
            if bucket is None:
                continue
            if not failures[bucket]:
                self._failures.pop(bucket, None)
                continue
            self._failures[bucket] += 1
            rest_s = min(_REST_S, 5 * 2 ** min(self._failures[bucket], 10))
            self._rests_until[bucket] = time.monotonic() + rest_s
            log.warning("artifact.publication_waits", bucket=bucket, rest_s=rest_s, why=last.message if last else "")

    def _publish(self, row: Artifact) -> None:
        problem: str | None = None
        try:
            self._copy(row)
        except FileNotFoundError:
            problem = "it is no longer in the farm's bucket"
        except InvalidInput as error:  # it will not get better by waiting
            problem = error.message
        if problem is not None:
            log.error("artifact.unpublishable", build_id=row.build_id, name=row.name, key=row.public_key, why=problem)
        self._db.run(lambda session: _note(session, row, problem))

    def _copy(self, row: Artifact) -> None:
        bucket, key = row.public_bucket or "", row.public_key or ""
        if bucket == self._settings.bucket:
            raise InvalidInput(f"{bucket} is the farm's own bucket")
        metadata = {
            "codebuild-buildarn": f"arn:aws:codebuild:{self._settings.region}:{self._settings.account_id}:build/{row.build_id}",
            "codebuild-content-md5": row.md5,
            "codebuild-content-sha256": row.sha256,
        }
        self._store.copy(self._settings.bucket, row.key, bucket, key, metadata=metadata)


def _note(session: Session, row: Artifact, problem: str | None) -> None:
    """The copy is made, or never will be. Where another build has taken the address meanwhile, its artifact is copied again."""
    its = sa.update(Artifact).where(Artifact.public_problem.is_(None)).execution_options(synchronize_session=False)
    mine = (Artifact.build_id == row.build_id, Artifact.identifier == row.identifier, Artifact.name == row.name)
    noted = session.execute(
        its.where(*mine, Artifact.public_round == row.public_round).values(published=True, public_problem=problem)
    )
    if noted.rowcount or problem is not None:  # type: ignore[attr-defined]  # an update's result is a cursor's
        return
    session.execute(
        its.where(Artifact.public_bucket == row.public_bucket, Artifact.public_key == row.public_key).values(
            published=False, public_round=Artifact.public_round + 1
        )
    )


def publish_soon(db: Database, store: Store, settings: Settings, build_id: str) -> None:
    """Publish what a build that has just ended leaves, if it is little; what fails is the scheduler's."""
    with suppress(InfraProblem):  # it is logged
        Publisher(db, store, settings).publish(build_id)
