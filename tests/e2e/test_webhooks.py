"""A real bare repository with our hook: `git push` starts builds, and what people type into git stays text."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.farm import Farm, wait_until
from tests.support.gitserver import git, http_server, make_repository
from tests.support.webhooks import github_pull_request, sent

pytestmark = pytest.mark.docker
SPEC = """version: 0.2
phases:
  build:
    commands:
      - echo "head <$CODEBUILD_WEBHOOK_HEAD_REF> by <$CODEBUILD_WEBHOOK_ACTOR_ACCOUNT_ID> of <$CODEBUILD_INITIATOR>"
      - echo "event <$CODEBUILD_WEBHOOK_EVENT> <$CODEBUILD_WEBHOOK_TRIGGER> was <$CODEBUILD_WEBHOOK_PREV_COMMIT>"
      - echo "built $(git rev-parse HEAD)"
      - ls /tmp
"""
FILTERS = {
    "filterGroups": [
        [{"type": "EVENT", "pattern": "PUSH"}, {"type": "FILE_PATH", "pattern": "^docs/", "excludeMatchedPattern": True}],
        [{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "^refs/(tags/|heads/[$])"}],
    ]
}


class Clone:
    """Where somebody works, and pushes from."""

    def __init__(self, folder: Path, farm: Farm) -> None:
        self.folder, self.farm = folder, farm

    def git(self, *arguments: str, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
        who = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
        environment = {**os.environ, "REMOTE_USER": "mona", "no_proxy": "127.0.0.1"}
        return subprocess.run(
            ["git", *who, *arguments], cwd=folder or self.folder, env=environment, capture_output=True, text=True, check=True
        )

    def commit(self, message: str, name: str = "file") -> str:
        """A new commit; its id."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(message)
        self.git("add", ".")
        self.git("commit", "-q", "-m", message)
        return self.git("rev-parse", "HEAD").stdout.strip()

    def push(self, *refs: str) -> str:
        """What the server says to it."""
        return self.git("push", "--force", "origin", *refs).stderr


def deliveries(farm: Farm) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = farm.client.get("/v1/projects/pushed/webhook/deliveries")["deliveries"]
    return found


@pytest.fixture
def clone(farm: Farm, git_root: Path, tmp_path: Path) -> Clone:
    """A clone of a bare repository whose hook tells the farm, set up as docs/webhooks.md says."""
    bare, here = git_root / "pushed.git", Clone(tmp_path / "clone", farm)
    here.git("init", "-q", "--bare", str(bare), folder=git_root)
    project = {
        "name": "pushed",
        "source": {"type": "GIT", "location": str(bare)},
        "artifacts": {"type": "NO_ARTIFACTS"},
        "environment": {"type": "LINUX_CONTAINER", "image": "millrace/standard:latest", "computeType": "BUILD_GENERAL1_SMALL"},
    }
    farm.client.post("/v1/projects", project)
    (tmp_path / "filters.json").write_text(json.dumps(FILTERS))
    made = farm.cli("webhook", "create", "pushed", "--file", str(tmp_path / "filters.json"))
    assert made.returncode == 0, made.stderr
    words = dict(line.split(None, 1) for line in made.stdout.splitlines()[:2])
    assert "is searched for" in made.stdout
    here.git("config", "millrace.url", words["address:"], folder=bare)
    (bare / "millrace.secret").write_text(words["secret:"] + "\n")
    (bare / "hooks").mkdir(exist_ok=True)
    (bare / "hooks" / "post-receive").write_text(farm.cli("webhook", "script").stdout)
    (bare / "hooks" / "post-receive").chmod(0o755)
    here.git("clone", "-q", str(bare), str(here.folder), folder=tmp_path)
    (here.folder / "buildspec.yml").write_text(SPEC)
    return here


def test_a_push_starts_builds_and_what_people_type_stays_text(farm: Farm, clone: Clone, tmp_path: Path) -> None:
    bare = Path(clone.git("remote", "get-url", "origin").stdout.strip())
    for mode, warned in ((0o644, True), (0o600, False)):
        (bare / "millrace.secret").chmod(mode)
        tried = subprocess.run(["hooks/post-receive", "--ping"], cwd=bare, capture_output=True, text=True)
        assert (tried.returncode, "ping: the git server reaches us" in tried.stderr) == (0, True), tried.stderr
        assert ("others than its owner may use" in tried.stderr) is warned

    first = clone.commit("first")
    assert "FILE_PATH: the list of changed files is not known" in clone.push("main")  # of a new branch it is not
    second = clone.commit("second")
    said = clone.push("main")
    assert "remote: millrace: refs/heads/main: build: filter group 1 matches, pushed:" in said
    docs = clone.commit("third", "docs/page")
    assert "which excludes it" in clone.push("main")
    hostile = "$(touch${IFS}pwned)`touch${IFS}/tmp/pwned`;id"
    clone.git("branch", hostile, second)
    clone.git("tag", "-a", "v1", "-m", "one", second)
    said = clone.push(hostile, "v1")
    assert said.count("filter group 2 matches") == 2
    assert "v1 was deleted" in clone.push(":v1")

    came = {one["ref"]: one for one in deliveries(farm) if one["outcome"] == "build"}
    assert {ref: one["commit"] for ref, one in came.items()} == {
        "refs/heads/main": second,
        f"refs/heads/{hostile}": second,
        "refs/tags/v1": second,
    }
    for ref, trigger, before in (
        ("refs/heads/main", "branch/main", first),
        (f"refs/heads/{hostile}", f"branch/{hostile}", ""),
        ("refs/tags/v1", "tag/v1", ""),
    ):
        ended = farm.ended(came[ref]["buildId"], within_s=120)
        log = farm.log_of(ended["id"])
        assert ended["buildStatus"] == "SUCCEEDED", log
        assert ended["resolvedSourceVersion"] == second
        assert f"head <{ref}> by <mona> of <millrace-post-receive>" in log
        assert f"event <PUSH> <{trigger}> was <{before}>" in log
        assert f"built {second}" in log
        assert "pwned" not in log.partition("ls /tmp")[2]
    listed = farm.cli("webhook", "deliveries", "pushed").stdout
    assert listed.count("ignored") >= 3 and "ping" in listed
    payload = tmp_path / "payload.json"
    payload.write_text(json.dumps({"ref": "refs/heads/x", "after": docs, "paths": ["docs/page", "a"]}))
    judged = farm.cli("webhook", "test", "pushed", str(payload))
    assert (judged.returncode, "NO  FILE_PATH '^docs/' matches 'docs/page'" in judged.stdout) == (1, True), judged.stdout
    gone_before_it_ran(farm, clone)


def gone_before_it_ran(farm: Farm, clone: Clone) -> None:
    """A commit that is forced away while its build waits."""
    farm.client.post("/v1/fleets/default/pause", {"why": "a test"})
    lost = clone.commit("lost")
    clone.git("tag", "lost")
    said = clone.push("lost")
    clone.push(":lost")
    bare = Path(clone.git("remote", "get-url", "origin").stdout.strip())
    clone.git("gc", "--quiet", "--prune=now", folder=bare)
    farm.client.post("/v1/fleets/default/resume")
    build = said.rpartition("pushed:")[2].split()[0]
    ended = wait_until(lambda: farm.ended(f"pushed:{build}", within_s=60), 60)
    assert ended is not None
    assert ended["millrace"]["reason"] == "user.source_not_found"
    assert f"commit gone: it has no commit {lost}" in ended["millrace"]["message"]


def test_an_approved_pull_request_from_a_fork_is_built_by_the_buildspec_of_the_base_and_sees_no_secret(
    farm: Farm, tmp_path: Path
) -> None:
    canary = f"canary-{os.urandom(16).hex()}"
    repository = make_repository(tmp_path / "git" / "team" / "app.git")
    spec = """version: 0.2
env:
  secrets-manager:
    FROM_SPEC: canary
  git-credential-helper: yes
phases:
  build:
    commands:
      - echo "{who} <$FROM_SPEC> <$FROM_PROJECT>"
      - env
      - cat README
      - git config --get credential.helper || echo no helper
"""
    repository.commit("main", {"buildspec.yml": spec.format(who="base")})
    fork = repository.commit("stranger", {"buildspec.yml": spec.format(who="stranger"), "README": "a stranger's\n"})
    git(repository.path, "update-ref", "refs/pull/2/head", fork)
    git(repository.path, "branch", "-D", "stranger")
    assert farm.cli("secret", "set", "canary", text=canary).returncode == 0
    with http_server(tmp_path / "git") as server:
        location = f"{server.url}/team/app.git"
        variables = [{"name": "FROM_PROJECT", "value": "canary", "type": "SECRETS_MANAGER"}]
        project = {
            "name": "forked",
            "source": {"type": "GITHUB", "location": location},
            "artifacts": {"type": "NO_ARTIFACTS"},
            "environment": {
                "type": "LINUX_CONTAINER",
                "image": "millrace/standard:latest",
                "computeType": "BUILD_GENERAL1_SMALL",
                "privilegedMode": True,
                "environmentVariables": variables,
            },
        }
        farm.client.post("/v1/projects", project)
        groups = {"filterGroups": [[{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED"}]]}
        made = farm.client.post("/v1/projects/forked/webhook", groups)
        head = {"ref": "changes", "sha": fork, "repo": {"id": 99}}
        payload = {
            **github_pull_request(head=head),
            "repository": {"id": 186853002, "full_name": "team/app", "clone_url": location},
        }
        delivery = sent("github", made["secret"], payload, event="pull_request")
        place = f"{farm.api_url}/webhooks/github/{made['payloadUrl'].rpartition('/')[2]}"
        assert httpx.post(place, content=delivery["data"], headers=delivery["headers"]).status_code == 202
        approved = farm.cli("webhook", "approve", "forked", fork)
        assert approved.returncode == 0, approved.stderr
        build = approved.stdout.split()[1]
        ended = farm.ended(build, within_s=120)
        log = farm.log_of(build)
        assert ended["buildStatus"] == "SUCCEEDED", log
        assert ended["resolvedSourceVersion"] == fork
        assert ended["environment"]["privilegedMode"] is False
        for words in (
            "buildspec.yml at refs/heads/main",
            "gets no secrets: not set are FROM_PROJECT, FROM_SPEC",
            "base <> <>",
            "a stranger's",
            "\nno helper\n",
            "CODEBUILD_WEBHOOK_TRIGGER=pr/2",
        ):
            assert words in log, log
        assert canary not in log
        assert "canary" not in log.partition("base <>")[2]
        trusted = farm.client.post("/v1/builds", {"projectName": "forked", "privilegedModeOverride": False})
        log = farm.log_of(farm.ended(trusted["id"], within_s=120)["id"])
        assert "base <***> <***>" in log
        assert "\nno helper\n" not in log
