"""What git servers send: payloads in the shapes that they document, and real signatures."""

import gzip
import hmac
import json
import uuid
from pathlib import Path
from typing import Any

from api.webhooks.signatures import standard

SHA = "6113728f27ae82c7b1a177c8d03f9e96e0adf246"
OTHER_SHA = "4ae5b9e6f8a2c1d0e3b4a5968778695a4b3c2d1e"
ZERO = "0" * 40
SOURCES = {
    "github": {"type": "GITHUB", "location": "https://github.com/Codertocat/Hello-World.git"},
    "bitbucket": {"type": "BITBUCKET", "location": "https://bitbucket.org/team_name/repo_name.git"},
    "center": {"type": "BITBUCKET", "location": "https://bitbucket.corp.example/scm/web/app.git"},
    "gitlab": {"type": "GITLAB", "location": "https://gitlab.example/mike/diaspora.git"},
    "git": {"type": "GIT", "location": "https://git.example/team/app.git"},
}


def examples() -> list[dict[str, Any]]:
    """GitHub's examples: `event`, `number` and `payload` (tests/data/webhooks/README.md says where they are from)."""
    path = Path(__file__).parents[1] / "data" / "webhooks" / "github.json.gz"
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def sent(
    provider: str, secret: str, payload: Any, *, event: str = "push", delivery: str | None = None, body: bytes | None = None
) -> dict[str, Any]:
    """A delivery as `provider` sends it: `data` and `headers`."""
    data = json.dumps(payload).encode() if body is None else body
    ident = delivery or str(uuid.uuid4())
    signature = f"sha256={hmac.digest(secret.encode(), data, 'sha256').hex()}"
    headers = {
        "github": {
            "X-GitHub-Event": event,
            "X-GitHub-Delivery": ident,
            "X-Hub-Signature-256": signature,
            "User-Agent": "GitHub-Hookshot/044aadd",
        },
        "bitbucket": {
            "X-Event-Key": event,
            "X-Request-UUID": ident,
            "X-Hub-Signature": signature,
            "User-Agent": "Bitbucket-Webhooks/2.0",
        },
        "gitlab": {
            "X-Gitlab-Event": event,
            "X-Gitlab-Event-UUID": ident,
            "X-Gitlab-Token": secret,
            "User-Agent": "GitLab/18.1.0",
        },
        "git": {
            "webhook-id": ident,
            "webhook-timestamp": "1780000000",
            "webhook-signature": standard(secret, ident, "1780000000", data),
        },
    }[provider]
    return {"data": data, "headers": {"Content-Type": "application/json", **headers}}


def github_push(**changes: Any) -> dict[str, Any]:
    """A push to a branch, in GitHub's shape."""
    sha = changes.get("after", SHA)
    return {
        "ref": "refs/heads/main",
        "before": OTHER_SHA,
        "after": sha,
        "deleted": False,
        "forced": False,
        "head_commit": {"id": sha, "message": "Update README.md"},
        "commits": [{"id": sha, "message": "Update README.md", "added": [], "modified": ["README.md"], "removed": []}],
        "repository": {
            "id": 186853002,
            "full_name": "Codertocat/Hello-World",
            "clone_url": "https://github.com/Codertocat/Hello-World.git",
            "pushed_at": 1557933657,
        },
        "sender": {"id": 21031067, "login": "Codertocat"},
        **changes,
    }


def github_pull_request(action: str = "opened", *, head_repo: Any = 186853002, **changes: Any) -> dict[str, Any]:
    """A pull request's event, in GitHub's shape. `head_repo` None: a fork that is gone."""
    push = github_push()
    return {
        "action": action,
        "number": 2,
        "pull_request": {
            "number": 2,
            "title": "Update the README",
            "merged": False,
            "merge_commit_sha": None,
            "updated_at": "2019-05-15T15:20:33Z",
            "head": {"ref": "changes", "sha": SHA, "repo": None if head_repo is None else {"id": head_repo}},
            "base": {"ref": "main", "sha": OTHER_SHA, "repo": {"id": 186853002}},
            **changes,
        },
        "repository": push["repository"],
        "sender": push["sender"],
    }


def a_comment(
    provider: str, body: str, *, by: tuple[Any, str] = (7, "mona"), number: int = 2, ident: int = 501, **changes: Any
) -> tuple[str, dict[str, Any]]:
    """A new comment below a pull request, as each git server tells of it: the event's name and the payload."""
    person, name = by
    if provider == "github":
        user = {"id": person, "login": name, "type": "User"}
        payload = {
            "action": "created",
            "issue": {"number": number, "pull_request": {"url": "x"}, "user": {"id": 99, "login": "stranger"}},
            "comment": {"id": ident, "body": body, "user": user},
            "repository": github_push()["repository"],
            "sender": user,
        }
        return "issue_comment", {**payload, **changes}
    if provider == "gitlab":
        at = "2026-07-01 10:00:00 UTC"
        note = {
            "id": ident,
            "note": body,
            "noteable_type": "MergeRequest",
            "author_id": person,
            "created_at": at,
            "updated_at": at,
        }
        payload = {
            "object_kind": "note",
            "user": {"id": person, "username": name},
            "project": {
                "id": 186853002,
                "path_with_namespace": "o/r",
                "git_http_url": "https://gitlab.example/mike/diaspora.git",
            },
            "object_attributes": {**note, "action": "create"},
            "merge_request": {"iid": number},
        }
        return "Note Hook", {**payload, **changes}
    if provider == "cloud":
        user = {"uuid": person, "account_id": "557058:x", "nickname": name}
        payload = {
            "actor": user,
            "repository": {"uuid": "{1}", "full_name": "team_name/repo_name"},
            "pullrequest": {"id": number},
            "comment": {"id": ident, "content": {"raw": body}, "user": user},
        }
        return "pullrequest:comment_created", {**payload, **changes}
    user = {"id": person, "name": name}
    repository = {"id": 1, "slug": "app", "project": {"key": "web"}}
    payload = {
        "eventKey": "pr:comment:added",
        "actor": user,
        "pullRequest": {"id": number, "toRef": {"repository": repository}},
        "comment": {"id": ident, "text": body, "author": user},
    }
    return "pr:comment:added", {**payload, **changes}
