"""Pushes that no webhook told of are found by looking at the real repository, once, and not before a delivery had its time."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from millrace.commands.looking import by_git
from millrace.settings import Settings
from millrace.webhook import EventKind, Heard, SourceEvent, WebhookSettings
from scheduler import hooks, queries
from scheduler.db import Database
from scheduler.missed import INITIATOR, CatchUp
from scheduler.models import Webhook
from scheduler.secrets import keys_of, open_provider
from tests.support.gitserver import Repository, git, make_repository
from tests.support.records import a_project


@dataclass
class Place:
    """A repository, a project of it with a webhook, and who looks at it."""

    db: Database
    settings: Settings
    repository: Repository
    catch_up: CatchUp

    def look(self) -> list[str]:
        """Whose turn has come."""
        with self.db.transaction() as session:
            session.execute(sa.update(Webhook).where(Webhook.looked_ms > 0).values(looked_ms=1))
        return self.catch_up.run()

    def tell(self, ref: str, commit: str) -> None:
        """A delivery, as the git server would have sent it."""
        event = SourceEvent(kind=EventKind.PUSH, ref=ref, commit=commit)
        record = hooks.get(self.db, "demo")
        heard = Heard(what="PUSH", events=(event,))
        hooks.receive(self.db, record, heard, delivery_id=commit, initiator="x", settings=self.settings)

    def builds(self) -> list[tuple[str | None, str]]:
        """Commit and initiator, oldest first."""
        found = queries.find_builds(self.db, project="demo", states=[], limit=100, cursor=None)[0]
        return [(build.settings.source_version, build.initiator) for build in reversed(found)]


@pytest.fixture
def place(database: Database, tmp_path: Path) -> Iterator[Place]:
    repository = make_repository(tmp_path / "git" / "app.git")
    settings = Settings(data_dir=tmp_path / "farm", git_roots=(tmp_path / "git",), signing_key=SecretStr("k" * 64))
    a_project(database, source={"type": "GIT", "location": str(repository.path)})
    hooks.create(database, keys_of(settings), "demo", WebhookSettings())
    look = by_git(settings, open_provider(settings, database), threading.Event())
    yield Place(database, settings, repository, CatchUp(database, settings, look))


def test_what_was_there_before_is_no_push_and_neither_is_what_was_told(place: Place) -> None:
    assert place.look() == []
    told = place.repository.commit("main", {"README": "told\n"})
    place.tell("refs/heads/main", told)
    for _ in range(3):
        assert place.look() == []
    assert place.builds() == [(told, "x")]


def test_a_push_that_nobody_told_of_is_built_at_the_second_look_and_once(place: Place) -> None:
    place.look()
    missed = place.repository.commit("main", {"README": "missed\n"})
    git(place.repository.path, "branch", "fresh", place.repository.first)
    assert place.look() == []
    assert len(place.look()) == 2
    for _ in range(3):
        assert place.look() == []
    place.tell("refs/heads/main", missed)  # late
    assert sorted(place.builds(), key=str) == sorted([(missed, INITIATOR), (place.repository.first, INITIATOR)], key=str)
    found = {item.result.ref: item for item in hooks.deliveries(place.db, "demo", limit=10)[0] if item.result.build_id}
    assert found["refs/heads/main"].delivery_id.startswith(f"missed-{missed}-")


def test_a_delivery_that_comes_between_two_looks_is_in_time(place: Place) -> None:
    place.look()
    late = place.repository.commit("main", {"README": "late\n"})
    assert place.look() == []
    place.tell("refs/heads/main", late)
    assert place.look() == []
    assert place.builds() == [(late, "x")]


def test_a_branch_that_moves_between_looks_is_built_where_it_stands(place: Place) -> None:
    place.look()
    place.repository.commit("main", {"README": "one\n"})
    assert place.look() == []
    last = place.repository.commit("main", {"README": "two\n"})
    assert place.look() == []
    assert len(place.look()) == 1
    git(place.repository.path, "update-ref", "refs/heads/main", place.repository.first)  # back to where it was never told of
    git(place.repository.path, "update-ref", "-d", "refs/heads/feature/x")
    place.look()
    assert len(place.look()) == 1
    assert place.builds() == [(last, INITIATOR), (place.repository.first, INITIATOR)]


def test_filters_judge_it_and_what_is_not_known_passes_none(place: Place) -> None:
    place.look()
    groups = [[{"type": "EVENT", "pattern": "PUSH"}, {"type": "ACTOR_ACCOUNT_ID", "pattern": "7"}]]
    hooks.update(place.db, "demo", WebhookSettings.model_validate({"filterGroups": groups}))
    place.repository.commit("main", {"README": "missed\n"})
    place.look()
    assert place.look() == []
    ((item,), _cursor) = hooks.deliveries(place.db, "demo", limit=10)
    assert (item.result.outcome, "who did it is not known" in item.result.why) == (hooks.Outcome.IGNORED, True)
    assert place.look() == []


def test_a_repository_that_cannot_be_read_keeps_nobody_waiting_and_is_looked_at_later(place: Place) -> None:
    moved = place.repository.path.with_name("elsewhere.git")
    place.repository.path.rename(moved)
    assert place.look() == []
    assert place.catch_up.run() == []
    moved.rename(place.repository.path)
    assert place.look() == []
    missed = place.repository.commit("main", {"README": "missed\n"})
    place.look()
    assert len(place.look()) == 1
    assert place.builds() == [(missed, INITIATOR)]
    hooks.delete(place.db, "demo")
    assert place.look() == []
