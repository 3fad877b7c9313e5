"""From the last release to this one: its worker under our API and schema, and a farm that is upgraded while a build runs."""

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.db import Database
from tests.support import release
from tests.support.farm import need_engine, wait_until
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tests.support.release import Parts

pytestmark = [pytest.mark.docker, pytest.mark.redis]


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.unpack(tmp_path_factory.mktemp("last"))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def farm(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Parts]:
    """A farm of which nothing runs yet, once on each database."""
    need_engine()
    with redis_server.client() as client:
        client.flushall()
    with tempfile.TemporaryDirectory(prefix="mr-up-") as folder:
        if request.param == "sqlite":
            with release.parts(Path(folder), f"sqlite:///{folder}/records.db", redis_server.url) as parts:
                yield parts
            return
        server: PostgresServer = request.getfixturevalue("postgres_server")
        with server.database() as url, release.parts(Path(folder), url, redis_server.url) as parts:
            yield parts


def test_the_last_releases_worker_works_for_this_releases_farm(farm: Parts, last: Path) -> None:
    farm.call("bootstrap")
    farm.start("api")
    farm.start("scheduler")
    farm.start("worker", release=last)
    users = farm.farm
    assert users.cli("secret", "set", "word", text="open-sesame").returncode == 0
    artifacts = "artifacts:\n  files: ['made.txt']\n"
    secret = "env:\n  secrets-manager:\n    WORD: word\n"
    build = users.build(["echo hello", "echo $WORD | sha256sum", "echo $WORD > made.txt"], more=artifacts + secret)
    ended = users.ended(build)
    assert ended["buildStatus"] == "SUCCEEDED", users.log_of(build)
    assert [(phase["phaseType"], phase.get("phaseStatus")) for phase in ended["phases"]][:-1] == [
        (name, "SUCCEEDED")
        for name in (
            "SUBMITTED",
            "QUEUED",
            "PROVISIONING",
            "DOWNLOAD_SOURCE",
            "INSTALL",
            "PRE_BUILD",
            "BUILD",
            "POST_BUILD",
            "UPLOAD_ARTIFACTS",
            "FINALIZING",
        )
    ]
    log = users.log_of(build)
    assert "\nhello\n" in log
    assert hashlib.sha256(b"open-sesame\n").hexdigest() in log
    assert "open-sesame" not in log
    assert users.cli("logs", build, "--verify").stdout.startswith(f"whole: {len(log.encode())} bytes, ")
    fetched = farm.farm.home / "fetched"
    assert users.cli("artifacts", build, "--out", str(fetched)).returncode == 0
    (archive,) = [path for path in fetched.rglob("*") if path.is_file()]
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.read("made.txt") == b"open-sesame\n"

    failing = users.build(["false"], project="fails")
    assert users.ended(failing)["millrace"]["reason"] == "user.exit_code"

    stopped = users.build(["echo begun", "sleep 300"], project="stops")
    users.await_log(stopped, "begun")
    assert users.cli("stop", stopped).returncode == 0
    assert users.ended(stopped)["buildStatus"] == "STOPPED"
    assert "cannot claim" not in farm.log("worker").read_text()
    checked = users.cli("fsck", "--at-rest")
    assert checked.returncode == 0, checked.stdout


def test_a_build_that_runs_while_the_farm_is_upgraded_ends_well(farm: Parts, last: Path) -> None:
    farm.call("bootstrap", release=last)
    for part in ("api", "scheduler", "worker"):
        farm.start(part, release=last)
    users = farm.farm
    before = users.build(["echo before"], project="before")
    assert users.ended(before)["buildStatus"] == "SUCCEEDED"
    build = users.build(["for n in $(seq 1 100); do echo line-$n; sleep 0.15; done"])
    users.await_log(build, "line-3\n")
    waiting = users.build(["echo late"], project="waits")
    farm.stop("scheduler")
    farm.stop("api")
    farm.call("migrate")
    farm.start("api")
    farm.start("scheduler")
    ended = users.ended(build)
    assert ended["buildStatus"] == "SUCCEEDED", users.log_of(build)
    assert len(ended["millrace"]["attempts"]) == 1
    lines = [line for line in users.log_of(build).splitlines() if line.startswith("line-")]
    assert lines == [f"line-{n}" for n in range(1, 101)]
    assert users.cli("logs", build, "--verify").stdout.startswith("whole: ")
    assert users.ended(waiting)["buildStatus"] == "SUCCEEDED"
    assert users.show(before)["buildStatus"] == "SUCCEEDED"
    assert "before" in users.log_of(before)
    farm.stop("worker")
    farm.start("worker")
    assert users.ended(users.build(["echo new"], project="new"))["buildStatus"] == "SUCCEEDED"
    checked = users.cli("fsck", "--at-rest")
    assert checked.returncode == 0, checked.stdout


def test_a_worker_that_is_too_old_or_too_new_is_told_so(farm: Parts, last: Path, tmp_path: Path) -> None:
    other = release.unpack(tmp_path / "other")
    contract = other / "millrace" / "contract.py"
    contract.write_text(contract.read_text().replace("PROTOCOL: Final = 1", "PROTOCOL: Final = 99"))
    farm.call("bootstrap")
    farm.start("api")
    farm.start("worker", release=other)
    wait_until(lambda: "speaks protocol 99, this farm speaks" in farm.log("worker").read_text())
    assert "run workers of the same release as the API, or of the one before it" in farm.log("worker").read_text()
    assert "Traceback" not in farm.log("worker").read_text()


def test_this_release_refuses_a_schema_that_it_does_not_know(farm: Parts, last: Path) -> None:
    farm.call("migrate")
    database = Database(farm.environment["MILLRACE_DATABASE_URL"])
    database.dispose()
    with pytest.raises(AssertionError, match="of a later release"):
        farm.call("migrate", release=last)
