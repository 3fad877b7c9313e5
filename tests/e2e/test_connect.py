"""A repository on a real git server is set up in one go, its first build is shown as it runs, and a comment approves a fork."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.farm import Farm, running_farm, wait_until
from tests.support.forge import Forge
from tests.support.gitserver import GitServer, Repository, git, http_server, make_repository
from tests.support.providers import Told, standing_in
from tests.support.webhooks import a_comment, github_pull_request, sent

pytestmark = pytest.mark.docker
SPEC = 'version: 0.2\nphases:\n  build:\n    commands:\n      - cat README\n      - echo "built <$CODEBUILD_WEBHOOK_TRIGGER>"\n'


def test_connect_follows_the_first_build_and_a_comment_has_a_fork_built(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "git" / "team" / "connected.git")
    repository.commit("main", {"buildspec.yml": SPEC})
    with http_server(tmp_path / "git") as server, standing_in() as api:
        forge = Forge(api, "github", "team/connected", people={"7": ("mona", "maintain")})
        with running_farm(HTTP_PROXY=api.url, NO_PROXY="127.0.0.1", GIT_TOKEN="open-sesame") as farm:
            carry_out(farm, server, repository, forge)
        assert api.wrong == []


def carry_out(farm: Farm, server: GitServer, repository: Repository, forge: Forge) -> None:
    """The story: git goes to the real server, and what is asked of its API goes to the one that stands in."""
    server.wants_password, server.password = True, "x-access-token:open-sesame"
    location = f"{server.url}/team/connected.git"
    command = ["project", "connect", location, "--type", "github-enterprise", "--token-env", "GIT_TOKEN"]
    first = farm.cli(*command, within_s=180)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "third" in first.stdout and "built <>" in first.stdout and "SUCCEEDED" in first.stdout
    assert "open-sesame" not in first.stdout + first.stderr
    again = farm.cli(*command)
    assert (again.returncode, "Build" in again.stdout, "calls it already" in again.stdout) == (0, False, True), again.stdout
    (hook,) = [one["config"] for one in forge.hooks]
    place = f"{farm.api_url}/webhooks/github/{hook['url'].rpartition('/')[2]}"
    about = {"repository": {"id": int(forge.number), "full_name": "team/connected", "clone_url": location}}

    def tell(event: str, payload: dict[str, Any]) -> int:
        delivery = sent("github", hook["secret"], {**payload, **about}, event=event)
        return httpx.post(place, content=delivery["data"], headers=delivery["headers"]).status_code

    fork = repository.commit("stranger", {"README": "a stranger's\n"})
    git(repository.path, "update-ref", "refs/pull/2/head", fork)
    git(repository.path, "branch", "-D", "stranger")
    assert tell("pull_request", github_pull_request(head={"ref": "changes", "sha": fork, "repo": {"id": 99}})) == 202
    event, payload = a_comment("github", f"/codebuild_run({fork})")
    assert tell(event, payload) == 202

    def build() -> str | None:
        found = farm.client.get("/v1/projects/connected/webhook/deliveries")["deliveries"]
        return next((str(one["buildId"]) for one in found if one["event"] == event_name and "buildId" in one), None)

    event_name = "issue_comment created"
    approved = wait_until(build, 60)
    assert approved is not None
    ended = farm.ended(approved, within_s=120)
    log = farm.log_of(approved)
    assert (ended["buildStatus"], ended["initiator"]) == ("SUCCEEDED", "mona (GITHUB_MAINTAIN)"), log
    assert "a stranger's" in log and "built <pr/2>" in log
    told = {(one.body["state"], one.where["sha"]) for one in wait_until(lambda: statuses(forge, fork), 60)}
    assert ("success", fork) in told


def statuses(forge: Forge, commit: str) -> list[Told]:
    """What the server was told of a commit, once it ended well."""
    found = [one for one in forge.standin.told_of("repos/create-commit-status") if one.where["sha"] == commit]
    return found if any(one.body["state"] == "success" for one in found) else []
