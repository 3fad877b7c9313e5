"""A build whose source wants credentials: from the secret store to git on the host and, where asked for, to git inside."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from buildenv.fake_engine import FakeEngine
from buildenv.run import StopSignal, run
from millrace.vocabulary import Reason, Verdict
from tests.support.gitserver import GitServer, http_server, make_repository
from tests.unit.buildenv.test_run import Recorder, job

SPEC = "version: 0.2\n{env}phases:\n  build:\n    commands: [cat README, echo helper $GIT_CONFIG_VALUE_0]\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    repository = make_repository(tmp_path / "git" / "team" / "app.git")
    for env, name in (("", "plain.yml"), ("env: {git-credential-helper: yes}\n", "helper.yml")):
        repository.commit("main", {name: SPEC.format(env=env)})
    with http_server(tmp_path / "git") as running:
        running.wants_password, running.password = True, "x-access-token:t0ken-value"
        yield running


@pytest.mark.parametrize(("buildspec", "helps"), [("plain.yml", False), ("helper.yml", True)])
def test_the_secret_of_the_sources_auth_opens_it(tmp_path: Path, server: GitServer, buildspec: str, helps: bool) -> None:
    recorder = Recorder(tmp_path)
    recorder.kept_secrets = {"team/git": "t0ken-value"}
    seen: list[str] = []

    def look(text: bytes) -> None:
        kept = tmp_path / "work" / "readonly" / "git-credentials"
        if b"Entering phase BUILD" in text and kept.exists():
            seen.append(kept.read_text())

    recorder.on_log = look
    source = {"type": "GIT", "location": f"{server.url}/team/app.git", "buildspec": buildspec}
    auth = {"type": "SECRETS_MANAGER", "resource": "team/git"}
    wanted = job(tmp_path, "", source={**source, "auth": auth})
    result = run(wanted, FakeEngine({}), recorder, recorder, StopSignal(), ExitStack())
    assert result.verdict is Verdict.SUCCEEDED, recorder.text.decode()
    assert b"t0ken-value" not in recorder.text
    assert set(server.given) == {server.password}
    host = server.url.removeprefix("http://")
    assert set(seen) == ({f"{host} x-access-token t0ken-value\n"} if helps else set())
    assert (b"git-credential-millrace" in recorder.text) is helps


def test_a_secret_that_is_not_there_ends_the_build_before_git_is_asked(tmp_path: Path, server: GitServer) -> None:
    recorder = Recorder(tmp_path)
    auth = {"type": "SECRETS_MANAGER", "resource": "team/git"}
    source = {"type": "GIT", "location": f"{server.url}/team/app.git", "auth": auth}
    result = run(job(tmp_path, "", source=source), FakeEngine({}), recorder, recorder, StopSignal(), ExitStack())
    assert (result.verdict, result.reason) == (Verdict.FAILED, Reason.SECRET_UNAVAILABLE)
    assert server.seen == []
