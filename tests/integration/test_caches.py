"""Which cache answers whom, on real databases: exact keys before beginnings, the newest of these, and nobody else's."""

import io

import pytest
import sqlalchemy as sa

from millrace.contract import CacheQuery, CacheReport
from millrace.errors import AttemptFenced, InvalidInput
from millrace.ids import cache_prefix
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import Reason, Verdict
from scheduler import attempts, caches, lifecycle
from scheduler.db import Database
from scheduler.leases import hash_token
from scheduler.models import CacheEntry
from tests.support.records import a_build, a_claim, a_project, a_report

PATHS, OTHER = "a" * 64, "b" * 64


def saved(db: Database, settings: Settings, key: str, *, project: str = "demo", version: str = PATHS) -> str:
    """A build that keeps one cache; its id."""
    build_id = a_build(db, settings, project)
    claim = a_claim(db, settings)
    assert claim.build_id == build_id
    item = CacheReport(key=key, version=version, object_key=cache_prefix(build_id, 1) + "c", size_bytes=1, sha256="0" * 64)
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report(caches=(item,)))
    return build_id


def found(
    db: Database, settings: Settings, *keys: str, project: str = "demo", version: str = PATHS
) -> tuple[str, bool, str] | None:
    """What a new build of the project finds: the key, whether it is the first one, and which build made it."""
    build_id = a_build(db, settings, project)
    claim = a_claim(db, settings)
    hit = attempts.find_cache(db, build_id, 1, hash_token(claim.token), CacheQuery(version=version, keys=keys))
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report())
    return (hit.key, hit.exact, hit.build_id) if hit else None


def test_the_exact_key_comes_first_then_the_newest_beginning(database: Database, settings: Settings) -> None:
    a_project(database)
    one, two = saved(database, settings, "npm-1"), saved(database, settings, "npm-2")
    assert found(database, settings, "npm-1", "npm-") == ("npm-1", True, one)
    assert found(database, settings, "npm-3", "npm-") == ("npm-2", False, two)
    assert found(database, settings, "npm-3") is None
    assert found(database, settings, "npm-3", "np%", "npm_") is None, "no character of a key is a wildcard"
    assert found(database, settings, "npm-1", version=OTHER) is None


def test_a_key_is_never_rewritten_and_what_has_none_is_the_last(
    database: Database, settings: Settings, store: DirectoryStore
) -> None:
    a_project(database)
    first = saved(database, settings, "k")
    saved(database, settings, "k")
    assert found(database, settings, "k") == ("k", True, first)
    before, after = saved(database, settings, ""), saved(database, settings, "")
    assert found(database, settings, "") == ("", True, after)
    with database.transaction() as session:
        session.execute(sa.update(CacheEntry).where(CacheEntry.replaced_ms > 0).values(replaced_ms=1))
    key = cache_prefix(before, 1) + "c"
    store.put(settings.bucket, key, io.BytesIO(b"x"))
    caches.drop_replaced(database, store, settings.bucket)
    assert store.stat(settings.bucket, key) is None
    assert found(database, settings, "") == ("", True, after)


def test_projects_share_nothing_unless_they_name_one_namespace(database: Database, settings: Settings) -> None:
    shared = {"cache": {"type": "S3", "cacheNamespace": "team"}}
    for name, more in (("one", {}), ("two", {}), ("three", shared), ("four", shared)):
        a_project(database, name, **more)
    mine, ours = saved(database, settings, "k", project="one"), saved(database, settings, "k", project="three")
    assert found(database, settings, "k", project="one") == ("k", True, mine)
    assert found(database, settings, "k", project="two") is None
    assert found(database, settings, "k", project="four") == ("k", True, ours)


def test_only_a_build_that_succeeds_and_holds_its_attempt_keeps_a_cache(database: Database, settings: Settings) -> None:
    a_project(database)
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)
    foreign = CacheReport(key="k", version=PATHS, object_key="caches/other/1/c", size_bytes=1, sha256="0" * 64)
    with pytest.raises(InvalidInput, match="not an object of attempt"):
        lifecycle.finish(database, build_id, 1, token, a_report(caches=(foreign,)))
    lifecycle.finish(database, build_id, 1, token, a_report(Verdict.STOPPED, Reason.CANCELLED))
    with pytest.raises(AttemptFenced):
        attempts.find_cache(database, build_id, 1, token, CacheQuery(version=PATHS, keys=("k",)))
    own = foreign.model_copy(update={"object_key": cache_prefix(build_id, 1) + "c"})
    with pytest.raises(AttemptFenced):
        lifecycle.finish(database, build_id, 1, token, a_report(caches=(own,)))
    assert found(database, settings, "k") is None
    failed = a_build(database, settings)
    half = own.model_copy(update={"object_key": cache_prefix(failed, 1) + "c"})
    claim = a_claim(database, settings)
    report = a_report(Verdict.FAILED, Reason.EXIT_CODE, caches=(half,))
    lifecycle.finish(database, failed, 1, hash_token(claim.token), report)
    assert found(database, settings, "k") is None
