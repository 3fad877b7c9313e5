"""Builds whose source is a git repository, through the whole farm."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from millrace.client import ApiRefused, build_path
from tests.support.farm import Farm

pytestmark = pytest.mark.docker
SPEC = "version: 0.2\nphases:\n  build:\n    commands:\n      - echo on $(git rev-parse HEAD)\n      - cat file.txt\n"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(git_root: Path) -> Path:
    folder = git_root / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    for number, branch in ((1, None), (2, "feature/x")):
        if branch:
            git(folder, "checkout", "-q", "-b", branch)
        (folder / "file.txt").write_text(f"content {number}\n")
        (folder / "buildspec.yml").write_text(SPEC)
        (folder / "ci").mkdir(exist_ok=True)
        (folder / "ci" / "other.yml").write_text(SPEC.replace("cat file.txt", "echo the other spec"))
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", f"change {number}")
    git(folder, "checkout", "-q", "main")
    git(folder, "tag", "v1")
    return folder


def build(farm: Farm, location: str, **overrides: Any) -> dict[str, Any]:
    settings = {
        "name": "git",
        "source": {"type": "GIT", "location": location},
        "artifacts": {"type": "NO_ARTIFACTS"},
        "environment": {"type": "LINUX_CONTAINER", "image": "millrace/standard:latest", "computeType": "BUILD_GENERAL1_SMALL"},
    }
    if any(item["name"] == "git" for item in farm.client.get("/v1/projects")["projects"]):
        farm.client.put("/v1/projects/git", settings)
    else:
        farm.client.post("/v1/projects", settings)
    started = farm.client.post("/v1/builds", {"projectName": "git", **overrides})
    return farm.ended(started["id"], within_s=120)


@pytest.mark.parametrize(
    ("version", "content"),
    [(None, "content 1"), ("v1", "content 1"), ("feature/x", "content 2"), ("refs/heads/feature/x", "content 2")],
)
def test_each_form_of_version_is_checked_out(farm: Farm, repository: Path, version: str | None, content: str) -> None:
    ended = build(farm, str(repository), **({"sourceVersion": version} if version else {}))
    assert ended["buildStatus"] == "SUCCEEDED", farm.log_of(ended["id"])
    commit = git(repository, "rev-parse", f"{version or 'main'}^{{commit}}")
    assert ended["resolvedSourceVersion"] == commit
    log = farm.log_of(ended["id"])
    assert f"on {commit}" in log
    assert content in log


def test_a_commit_and_another_buildspec(farm: Farm, repository: Path) -> None:
    commit = git(repository, "rev-parse", "feature/x")
    ended = build(farm, str(repository), sourceVersion=commit, buildspecOverride="ci/other.yml")
    assert ended["resolvedSourceVersion"] == commit
    assert "the other spec" in farm.log_of(ended["id"])


def test_a_missing_branch_and_a_missing_repository_say_so(farm: Farm, repository: Path, git_root: Path) -> None:
    ended = build(farm, str(repository), sourceVersion="nowhere")
    assert (ended["buildStatus"], ended["millrace"]["reason"]) == ("FAILED", "user.source_not_found")
    assert "no branch and no tag named 'nowhere'" in ended["millrace"]["message"]
    ended = build(farm, str(git_root / "nothing"))
    assert ended["millrace"]["reason"] == "user.source_not_found"
    ended = build(farm, str(repository), buildspecOverride="ci/missing.yml")
    assert ended["millrace"]["reason"] == "user.bad_buildspec"
    assert "looked for ci/missing.yml" in ended["millrace"]["message"]


def test_a_server_that_cannot_be_reached_is_not_the_users_fault(farm: Farm) -> None:
    ended = build(farm, "https://127.0.0.1:1/team/project.git")
    assert (ended["buildStatus"], ended["millrace"]["reason"]) == ("FAULT", "infra.source_unreachable")
    assert len(ended["millrace"]["attempts"]) == 3


def test_a_path_that_is_not_allowed_is_refused_at_once(farm: Farm) -> None:
    with pytest.raises(ApiRefused, match="MILLRACE_GIT_ROOTS"):
        build(farm, "/etc")


def test_a_retry_builds_the_commit_though_the_branch_moved_on(farm: Farm, repository: Path) -> None:
    git(repository, "branch", "moving", "main")
    spec = SPEC + "      - echo version $CODEBUILD_SOURCE_VERSION\n"
    first = build(farm, str(repository), sourceVersion="moving", buildspecOverride=spec)
    git(repository, "branch", "-f", "moving", "feature/x")
    retried = farm.ended(farm.client.post(f"{build_path(first['id'])}/retry")["id"], within_s=120)
    assert (retried["sourceVersion"], retried["resolvedSourceVersion"]) == ("moving", first["resolvedSourceVersion"])
    log = farm.log_of(retried["id"])
    assert f"on {first['resolvedSourceVersion']}" in log
    assert "version moving" in log


def test_a_build_that_wrecks_its_checkout_leaves_the_mirror_as_it_was(farm: Farm, repository: Path) -> None:
    def mirrored() -> dict[str, str]:
        files = (farm.home / "data" / "mirrors").rglob("*.pack")
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    wreck = (
        "      - for f in $(find .git -type f); do chmod u+w $f && echo wrecked > $f; done\n"
        "      - rm -rf .git/objects && cat /proc/self/mountinfo\n"
    )
    for depth in (0, 1):
        source = {"gitCloneDepthOverride": depth}
        build(farm, str(repository), **source)
        assert (before := mirrored())
        wrecked = build(farm, str(repository), **source, buildspecOverride=SPEC + wreck)
        assert wrecked["buildStatus"] == "SUCCEEDED"
        assert "/data/mirrors" not in farm.log_of(wrecked["id"])
        assert before.items() <= mirrored().items()  # a fetch of nothing leaves an empty pack
        after = build(farm, str(repository), **source)
        log = farm.log_of(after["id"])
        assert (after["buildStatus"], "mirror of the repository: 0 bytes were new" in log) == ("SUCCEEDED", True)
        assert "content 1" in log
