"""Which cache answers whom, on real databases: exact keys before beginnings, the newest of these, and nobody else's."""

import io

import pytest
import sqlalchemy as sa

from millrace.contract import CacheQuery, CacheReport, CacheUse
from millrace.errors import AttemptFenced, InvalidInput, NotFound
from millrace.ids import cache_prefix
from millrace.project import BuildOverrides, WebhookCause
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import Reason, Verdict
from scheduler import attempts, caches, intake, lifecycle
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.fsck import invariants
from scheduler.fsck.terms import Scope, Standing
from scheduler.leases import hash_token
from scheduler.models import Attempt, CacheEntry
from scheduler.sweeper import Sweeper
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
    assert found(database, settings, "NPM-1", "NPM-") is None, "small letters are others than large ones"
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


def test_a_build_that_could_not_use_what_it_found_saves_it_anew(database: Database, settings: Settings) -> None:
    a_project(database)
    first = saved(database, settings, "k")
    blind, wary = a_build(database, settings), a_build(database, settings)
    for build_id in (blind, wary):
        claim = a_claim(database, settings)
        token = hash_token(claim.token)
        if build_id == wary:
            hit = attempts.find_cache(database, build_id, 1, token, CacheQuery(version=PATHS, keys=("k",)))
            assert hit is not None and hit.build_id == first, "the key of one that has looked for nothing stands"
        item = CacheReport(key="k", version=PATHS, object_key=cache_prefix(build_id, 1) + "c", size_bytes=1, sha256="0" * 64)
        lifecycle.finish(database, build_id, 1, token, a_report(caches=(item,)))
    assert found(database, settings, "k") == ("k", True, wary)


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


def layered(db: Database, settings: Settings, key: str, base: str | None) -> str:
    """A build that keeps a cache which lies on that of the build `base`; its id."""
    build_id = a_build(db, settings)
    claim = a_claim(db, settings)
    item = CacheReport(
        key=key,
        version=PATHS,
        object_key=cache_prefix(build_id, 1) + "c",
        size_bytes=1,
        sha256="0" * 64,
        base=None if base is None else cache_prefix(base, 1) + "c",
    )
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report(caches=(item,)))
    return build_id


def stack(db: Database, settings: Settings, *, can_layer: bool = True) -> list[str]:
    """The builds whose layers the cache without a key lies on, lowest first, and that which made it last."""
    build_id = a_build(db, settings)
    claim = a_claim(db, settings)
    query = CacheQuery(version=PATHS, keys=("",), layered=can_layer)
    hit = attempts.find_cache(db, build_id, 1, hash_token(claim.token), query)
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report())
    return [] if hit is None else [layer.build_id for layer in hit.below] + [hit.build_id]


def test_layers_stay_as_long_as_a_cache_lies_on_them(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database)
    one = layered(database, settings, "", None)
    two = layered(database, settings, "", one)
    three = layered(database, settings, "", two)
    assert stack(database, settings) == [one, two, three]
    assert stack(database, settings, can_layer=False) == [], "the last release's worker cannot lay layers over one another"
    keys = [cache_prefix(build_id, 1) + "c" for build_id in (one, two, three)]
    for key in keys:
        store.put(settings.bucket, key, io.BytesIO(b"x"))
    age(database)
    caches.drop_replaced(database, store, settings.bucket)
    assert [store.stat(settings.bucket, key) is not None for key in keys] == [True, True, True]
    sweep_losers(database, settings, store)
    assert [store.stat(settings.bucket, key) is not None for key in keys] == [True, True, True]
    four = layered(database, settings, "", None)
    age(database)
    caches.drop_replaced(database, store, settings.bucket)
    assert [store.stat(settings.bucket, key) is not None for key in keys] == [False, False, False]
    assert stack(database, settings) == [four]


def age(db: Database) -> None:
    """As if what was replaced had been so long ago."""
    with db.transaction() as session:
        session.execute(sa.update(CacheEntry).where(CacheEntry.replaced_ms > 0).values(replaced_ms=CacheEntry.id))


def sweep_losers(db: Database, settings: Settings, store: DirectoryStore) -> None:
    """The sweeper was at the attempts, as if they had ended the day before yesterday."""
    with db.transaction() as session:
        session.execute(sa.update(Attempt).values(ended_ms=Attempt.ended_ms - 2 * 86_400_000))
    Sweeper(db, Bell("redis+socket:///nothing.sock"), store, settings)._drop_losers()


def test_what_lies_on_a_cache_that_is_going_is_not_kept(database: Database, settings: Settings) -> None:
    a_project(database)
    one = layered(database, settings, "", None)
    two = layered(database, settings, "", None)
    age(database)
    layered(database, settings, "", one)
    layered(database, settings, "", "demo:00000000-0000-4000-8000-000000000000")
    assert stack(database, settings) == [two]


def sized(db: Database, settings: Settings, key: str, size: int, *, project: str = "demo", pr: int | None = None) -> str:
    """A build that keeps a cache of so many bytes, perhaps one from a fork; its id."""
    build_id = from_fork(db, settings, project, pr)
    claim = a_claim(db, settings)
    item = CacheReport(key=key, version=PATHS, object_key=cache_prefix(build_id, 1) + "c", size_bytes=size, sha256="0" * 64)
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report(caches=(item,)))
    return build_id


def test_forks_of_projects_that_share_a_namespace_have_caches_of_their_own(database: Database, settings: Settings) -> None:
    for name, shared in (("demo", "team"), ("other", "team"), ("third", "Team")):
        a_project(database, name, cache={"type": "S3", "cacheNamespace": shared})
    theirs = sized(database, settings, "k", 1, project="other", pr=7)
    assert asked(database, settings, "k", pr=7) is None, "the seventh pull request of another repository"
    own = sized(database, settings, "k", 1, pr=7)
    assert asked(database, settings, "k", pr=7) == own
    sized(database, settings, "k", 1, project="third", pr=7)
    listed, _ = caches.find_all(database, project=None, shared="team", limit=10, before=None)
    assert [(one.fork, one.build_id) for one in listed] == [("demo pr/7", own), ("other pr/7", theirs)]


def from_fork(db: Database, settings: Settings, project: str, pr: int | None) -> str:
    """A queued build; of a pull request from a fork where that has a number."""
    cause = WebhookCause(provider="github", event="PULL_REQUEST_CREATED", trigger=f"pr/{pr}", pull_request=pr, from_fork=True)
    request = intake.BuildRequest(
        overrides=BuildOverrides(project_name=project), initiator="tests", cause=None if pr is None else cause, by_admin=True
    )
    return intake.submit(db, request, settings).build_id


def asked(db: Database, settings: Settings, *keys: str, pr: int | None = None) -> str | None:
    """Which build's cache a build finds."""
    build_id = from_fork(db, settings, "demo", pr)
    claim = a_claim(db, settings)
    hit = attempts.find_cache(db, build_id, 1, hash_token(claim.token), CacheQuery(version=PATHS, keys=keys))
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report())
    return hit.build_id if hit else None


def test_a_fork_reads_the_trusted_caches_and_nobody_else_finds_its_own(database: Database, settings: Settings) -> None:
    a_project(database)
    trusted = sized(database, settings, "k", 1)
    assert asked(database, settings, "k", pr=7) == trusted
    poisoned, planted = sized(database, settings, "k", 1, pr=7), sized(database, settings, "other", 1, pr=7)
    assert asked(database, settings, "k", pr=7) == poisoned, "its own goes first"
    assert asked(database, settings, "k") == trusted
    assert asked(database, settings, "other") is None
    assert asked(database, settings, "other", pr=8) is None
    assert asked(database, settings, "other", pr=7) == planted
    scope = Scope(db=database, settings=settings)
    assert [one.standing for one in invariants.check(scope, [18])] == [Standing.OK]
    with database.transaction() as session:
        home = session.scalars(sa.select(CacheEntry.namespace).where(CacheEntry.build_id == trusted)).one()
        session.execute(sa.update(CacheEntry).where(CacheEntry.build_id == planted).values(namespace=home))
    (found,) = invariants.check(scope, [18])
    assert found.standing is Standing.VIOLATED
    assert planted in found.faults[0].what


def test_what_was_not_used_for_longest_makes_room_but_for_layers_that_others_need(
    database: Database, settings: Settings, store: DirectoryStore
) -> None:
    a_project(database)
    old, used, new = (sized(database, settings, key, 10) for key in ("old", "used", "new"))
    with database.transaction() as session:
        session.execute(sa.update(CacheEntry).values(used_ms=CacheEntry.used_ms - 5000, created_ms=CacheEntry.created_ms - 5000))
    assert asked(database, settings, "used") == used
    assert caches.make_room(database, 30) == 0
    assert caches.make_room(database, 29) == 1
    assert asked(database, settings, "old") is None
    assert caches.make_room(database, 10) == 1
    assert asked(database, settings, "new") is None
    assert asked(database, settings, "used") == used
    below = layered(database, settings, "", None)
    on_top = layered(database, settings, "top", below)
    keys = {name: cache_prefix(build, 1) + "c" for name, build in (("below", below), ("old", old), ("new", new))}
    for key in keys.values():
        store.put(settings.bucket, key, io.BytesIO(b"x"))
    assert caches.make_room(database, 2) == 1, "two caches of one layer each, where the upper one needs both"
    assert caches.remove(database, project="demo", key="") == 1
    age(database)
    caches.drop_replaced(database, store, settings.bucket)
    assert {name for name, key in keys.items() if store.stat(settings.bucket, key)} == {"below"}
    assert [one.build_id for one in caches.find_all(database, project="demo", limit=10, before=None)[0]] == [on_top]


def test_what_a_build_asked_for_is_kept_with_why(database: Database, settings: Settings) -> None:
    a_project(database)

    def why(*keys: str, version: str = PATHS, can_layer: bool = True) -> str:
        build_id = a_build(database, settings)
        claim = a_claim(database, settings)
        query = CacheQuery(version=version, keys=keys, layered=can_layer)
        attempts.find_cache(database, build_id, 1, hash_token(claim.token), query)
        lifecycle.finish(database, build_id, 1, hash_token(claim.token), a_report())
        (one,), _saved = caches.of_build(database, build_id)
        assert (one["attempt"], one["keys"], "found" in one) == (1, list(keys), not str(one["why"]).startswith(NONE))
        return str(one["why"])

    assert why("k") == "there is no cache yet"
    sized(database, settings, "npm-1", 10)
    assert why("npm-1") == "its key is there"
    assert why("npm-2", "npm-") == "the newest of 'npm-'..."
    assert why("npm-2", "pip-") == "no key fits; the newest are 'npm-1'"
    assert why("npm-1", version=OTHER) == "none of 1 caches was made of these paths"
    base = layered(database, settings, "", None)
    layered(database, settings, "", base)
    assert why("") == "the last one that was saved"
    assert why("", can_layer=False) == "it has several layers, and this worker copies caches"


def test_what_became_of_what_was_found_is_kept_beside_it(database: Database, settings: Settings) -> None:
    a_project(database)
    sized(database, settings, "k", 1)
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)
    for keys in (("none",), ("k",), ("k",)):
        attempts.find_cache(database, build_id, 1, token, CacheQuery(version=PATHS, keys=keys))
    uses = (CacheUse(used=False, says="it came with other\x00 bytes"), CacheUse(used=True, says="copied"))
    lifecycle.finish(database, build_id, 1, token, a_report(Verdict.FAILED, Reason.EXIT_CODE, cache_uses=uses))
    lookups, _saved = caches.of_build(database, build_id)
    assert [(one.get("used"), one.get("became")) for one in lookups] == [
        (None, None),
        (False, "it came with other\ufffd bytes"),
        (True, "copied"),
    ]


NONE = ("there is no", "no key", "none of", "it has several")


def test_caches_that_are_taken_away_are_found_no_more_and_their_bytes_go_later(
    database: Database, settings: Settings, store: DirectoryStore
) -> None:
    for name in ("demo", "other"):
        a_project(database, name)
    one, two = (sized(database, settings, key, 10) for key in ("one", "two"))
    theirs = sized(database, settings, "one", 10, project="other")
    fork = sized(database, settings, "one", 10, pr=3)
    assert caches.remove(database, project="demo", key="one") == 2
    assert caches.remove(database, project="demo", key="one") == 0
    assert asked(database, settings, "one") is None
    assert asked(database, settings, "one", pr=3) is None
    assert asked(database, settings, "two") == two
    assert [record.build_id for record in caches.find_all(database, project=None, limit=10, before=None)[0]] == [theirs, two]
    assert sized(database, settings, "one", 10) not in (one, fork), "a key that was taken away can be saved anew"
    with pytest.raises(NotFound, match="there is no project 'nobody'"):
        caches.remove(database, project="nobody", key=None)
