"""The API is killed around the commit of a build (reliability.md F-20, F-21), and the client's word stays good."""

import pytest

from millrace.failpoints import MARK
from tests.support.farm import new_farm, wait_until
from tests.support.history import RecordingClient, check, read_records
from tests.support.killing import WATCHED, Stage, strike_all
from tests.support.records import a_project_json


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize(("side", "made"), [("before", 0), ("after", 1)])
def test_an_api_that_is_killed_around_a_commit_makes_one_build_of_one_key(side: str, made: int) -> None:
    point = f"commit.intake._once.{side}"
    with new_farm(MILLRACE_ENGINE="fake", MILLRACE_TESTING="1", MILLRACE_FAILPOINT=point) as farm:
        farm.start()
        farm.client.post("/v1/projects", a_project_json())
        asked = RecordingClient(farm.client)
        assert asked.start("demo", "k") is None
        assert (farm.home / "data" / MARK).read_text() == point
        records, _moves = read_records(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")
        assert len(records) == made
        build = wait_until(lambda: asked.start("demo", "k"))
        farm.ended(build)
        assert asked.start("demo", "k") == build
        asked.read(build)
        assert check(asked.journal, *read_records(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")) == []
        assert [record.build for record in read_records(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")[0]] == [build]


@pytest.mark.docker
@pytest.mark.slow
def test_a_farm_bears_kills_one_after_another() -> None:
    """A few of all the places; `make chaos ROW=failpoints` has every one."""
    with new_farm(**WATCHED) as farm:
        farm.start()
        stage = Stage(farm)
        stage.prepare()
        strike_all(
            stage,
            (
                "commit.leases.claim.after",
                "commit.lifecycle.finish.before",
                "commit.sweeper.Sweeper._lead.after",
                "engine.create.after",
                "verb.finish.after",
                "store.put.before",
                "bell.ring.after",
            ),
        )
