"""The load that a fleet had, from its records: read by the API, and tried again by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace.errors import NotFound
from millrace.fleet import FleetSettings
from millrace.settings import Settings, for_children
from scheduler.db import Database
from scheduler.fleets import history
from scheduler.fleets.history import Held
from scheduler.fleets.loads import read_csv
from scheduler.models import Attempt, Build, Fleet, Instance
from tests.support.apiserver import ApiServer, serving
from tests.support.records import a_build, a_project

BEGIN = 1_764_000_000_000


def a_past_build(db: Database, settings: Settings, at_s: float, *attempts: tuple[float, float | None]) -> None:
    """A build that came at `at_s` and was tried from and until these moments; None: it still is."""
    build_id = a_build(db, settings)
    with db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == build_id).values(submitted_ms=BEGIN + round(at_s * 1000)))
        for number, (begin_s, end_s) in enumerate(attempts, 1):
            session.add(
                Attempt(
                    build_id=build_id,
                    attempt_no=number,
                    worker_id="w1",
                    token_hash="x",
                    claimed_ms=BEGIN + round(begin_s * 1000),
                    ended_ms=None if end_s is None else BEGIN + round(end_s * 1000),
                )
            )


def a_past(db: Database, settings: Settings) -> None:
    """Six builds: one before all others, one that was tried twice, one that runs, one that waits."""
    a_project(db)
    a_past_build(db, settings, -100, (-90, -80))
    a_past_build(db, settings, 0, (5, 25))
    a_past_build(db, settings, 10, (12, 20), (50, 95.5))
    a_past_build(db, settings, 60, (61, None))
    a_past_build(db, settings, 70)
    a_past_build(db, settings, 80, (80, 90))


def test_each_attempt_held_a_slot_and_the_next_came_when_it_ended(database: Database, settings: Settings) -> None:
    a_past(database, settings)
    found = history.of(database, "default", BEGIN, BEGIN + 100_000)
    assert [(one.at_ms - BEGIN, one.waited_ms, one.length_ms) for one in found.held] == [
        (0, 5000, 20_000),
        (10_000, 2000, 8000),
        (20_000, 30_000, 45_500),
        (80_000, 0, 10_000),
    ]
    assert (found.open, found.cut, found.boot_s, found.settings) == (2, False, None, FleetSettings())
    assert [one.at_ms for one in history.of(database, "default", BEGIN, BEGIN + 10_000).held] == [BEGIN]


def test_how_the_fleet_is_set_and_how_long_its_workers_take_to_come_is_told(database: Database, settings: Settings) -> None:
    a_past(database, settings)
    with database.transaction() as session:
        session.add(Fleet(name="default", settings={"scaling": {"maximum": 7}, "worker": {"slots": 3}}))
        for number, boot_s in enumerate((10, 20, 90, None)):
            joined = None if boot_s is None else BEGIN + boot_s * 1000
            session.add(
                Instance(
                    fleet="default",
                    id=f"i{number}",
                    provider="process",
                    state="running",
                    found_ms=BEGIN,
                    seen_ms=BEGIN,
                    joined_ms=joined,
                )
            )
    found = history.of(database, "default", BEGIN, BEGIN + 100_000)
    assert found.boot_s == 20
    assert (found.settings.scaling.maximum, found.settings.worker.slots) == (7, 3)


def test_no_more_builds_are_told_of_than_the_limit(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_past(sqlite_database, settings)
    monkeypatch.setattr(history, "MOST", 2)
    found = history.of(sqlite_database, "default", BEGIN, BEGIN + 100_000)
    assert found.cut
    assert found.held == [
        Held(at_ms=BEGIN, waited_ms=5000, length_ms=20_000),
        Held(at_ms=BEGIN + 10_000, waited_ms=2000, length_ms=8000),
        Held(at_ms=BEGIN + 20_000, waited_ms=30_000, length_ms=45_500),
    ]


def test_a_fleet_that_is_not_there_has_no_load(sqlite_database: Database) -> None:
    with pytest.raises(NotFound, match="there is no fleet 'nobody'"):
        history.of(sqlite_database, "nobody", 0, 1)


def simulated(server: ApiServer, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**for_children(os.environ), "MILLRACE_API_URL": server.url, "MILLRACE_TOKEN": server.token}
    return subprocess.run(
        [sys.executable, "-m", "millrace.cli", "fleet", "simulate", *words],
        env={**environment, "MILLRACE_DATA_DIR": str(server.settings.home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_recorded_load_is_told_and_tried_again(sqlite_database: Database, settings: Settings, tmp_path: Path) -> None:
    a_past(sqlite_database, settings)
    with sqlite_database.transaction() as session:
        session.add(Fleet(name="default", settings={"scaling": {"maximum": 5}, "worker": {"slots": 1}}))
    window = f"since={BEGIN / 1000}&until={BEGIN / 1000 + 100}"
    with serving(sqlite_database, settings) as server:
        told: dict[str, Any] = server.get(f"/v1/fleets/default/load?{window}").json()
        assert told["builds"][2] == {"submitted": BEGIN / 1000 + 20, "lengthS": 45.5, "waitS": 30.0}
        assert (told["fleet"], told["open"], told["cut"], told["bootS"]) == ("default", 2, False, None)
        assert told["settings"]["scaling"]["maximum"] == 5
        assert "provider" not in told["settings"]
        answer = server.get(f"/v1/fleets/default/load?{window}&format=csv")
        assert answer.headers["Content-Type"].startswith("text/csv")
        assert [one.at_s for one in read_csv("load", answer.text.splitlines()).arrivals] == [0, 10, 20, 80]

        times = ("--since", str(BEGIN / 1000), "--until", str(BEGIN / 1000 + 100))
        done = simulated(server, "default", *times, "--json", "--maximum", "2", "--boot-time", "0")
        assert done.returncode == 0, done.stderr
        outcome = json.loads(done.stdout)
        assert outcome["load"]["builds"] == 4
        assert outcome["load"]["waitedS"]["max"] == 30
        (variant,) = outcome["variants"]
        assert (variant["slots"], variant["scaling"]["maximum"]) == (1, 2)

        kept = tmp_path / "load.csv"
        assert simulated(server, "default", *times, "--save-load", str(kept)).returncode == 0
        again = simulated(server, "--load", str(kept), "--slots", "1", "--maximum", "2", "--boot-time", "0", "--json")
        assert json.loads(again.stdout)["variants"] == [variant]

        for words, message in (
            (("nobody",), "there is no fleet 'nobody'"),
            (("default", "--since", "1h"), "the recorded load of fleet default holds no build"),
            (("default", "--since", "yesterday"), "--since is 'yesterday'"),
            (("default", "--since", "2026-01-02", "--until", "2026-01-01"), "since is not before until"),
        ):
            done = simulated(server, *words)
            assert done.returncode == 1, words
            assert message in " ".join(done.stderr.split()), done.stderr
