"""Git servers that stand in: a repository, people with rights, webhooks, a list of deliveries, each in its server's shapes."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.support.providers import Standin, Told, example_of

Answer = tuple[int, dict[str, str], Any]
_LAST = {"code": 200, "status": "active", "message": "OK"}
_LEVELS = {"guest": 10, "reporter": 20, "developer": 30, "maintainer": 40, "owner": 50}


@dataclass
class Forge:
    """One repository at a server. `people` are name and role (None: none) by number; `may_hook`: the token may see webhooks."""

    standin: Standin
    kind: str
    name: str = "o/r"
    number: str = "186853002"
    people: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    hooks: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    may_hook: bool = True

    def __post_init__(self) -> None:
        self.standin.says.update({f"{self.kind}/{name}": getattr(self, f"_{name}") for name in _ANSWERS})
        if self.kind == "github":
            self.standin.says |= {"github/deliveries": self._deliveries, "github/redeliver": self._redeliver}

    # What is answered

    def _repository(self, _told: Told) -> Answer:
        found = example_of(f"{self.kind}/repository")
        owner, _, name = self.name.rpartition("/")
        number: Any = self.number if self.kind == "cloud" else int(self.number)
        found |= {
            "github": {"id": number, "full_name": self.name},
            "gitlab": {"id": number, "path_with_namespace": self.name},
            "cloud": {"uuid": number, "full_name": self.name},
            "center": {"id": number, "slug": name, "project": {**found.get("project", {}), "key": owner}},
        }[self.kind]
        return 200, {}, found

    def _role(self, told: Told) -> Answer:
        if self.kind == "github":
            return self._collaborator(told.where["username"])
        if self.kind == "gitlab":
            return self._member(told.where["user_id"])
        found = []
        for number, (name, role) in self.people.items():
            if self.kind == "cloud" and role and told.query["q"] == f'user.uuid="{number}"':
                found.append({"type": "repository_permission", "permission": role, "user": {"type": "user", "uuid": number}})
            ranks = {"REPO_READ": ("read", "write", "admin"), "REPO_WRITE": ("write", "admin"), "REPO_ADMIN": ("admin",)}
            if self.kind == "center" and told.query["filter"] in name and role in ranks[told.query["permission"]]:
                assert (told.query["permission.projectKey"], told.query["permission.repositorySlug"]) == tuple(
                    self.name.split("/")
                )
                found.append({"id": int(number), "name": name, "slug": name, "active": True, "type": "NORMAL"})
        return 200, {}, {"values": found, "isLastPage": True, "size": len(found)}

    def _collaborator(self, name: str) -> Answer:
        for number, (known, role) in self.people.items():
            if known == name:
                found = example_of("github/role")
                least = {"maintain": "write", "triage": "read", None: "none"}.get(role, role)
                found |= {
                    "permission": least,
                    "role_name": role or "none",
                    "user": {**found["user"], "id": int(number), "login": name, "role_name": role or "none"},
                }
                return 200, {}, found
        return 404, {}, {"message": "Not Found"}

    def _member(self, number: str) -> Answer:
        name, role = self.people.get(number, ("", None))
        if role is None:
            return 404, {}, {"message": "404 Not found"}
        found = {**example_of("gitlab/role"), "id": int(number), "username": name, "access_level": _LEVELS[role]}
        return 200, {}, found

    def _hooks(self, _told: Told) -> Answer:
        if not self.may_hook:
            return self._forbidden()
        shown = [{**one, **_without_secret(one)} for one in self.hooks]
        return 200, {}, shown if self.kind in ("github", "gitlab") else {"values": shown, "isLastPage": True}

    def _make_hook(self, told: Told) -> Answer:
        if not self.may_hook:
            return self._forbidden()
        number = len(self.hooks) + 101
        made: dict[str, Any] = {"uuid": f"{{{number}}}"} if self.kind == "cloud" else {"id": number}
        base = {**example_of("github/make_hook"), "last_response": _LAST} if self.kind == "github" else {}
        self.hooks.append({**base, **told.body, **made})
        return 201, {}, _without_secret(self.hooks[-1])

    def _mend_hook(self, told: Told) -> Answer:
        for one in self.hooks:
            if str(one.get("id", one.get("uuid"))) == told.where["hook_id"]:
                one.update(told.body)
                return 200, {}, _without_secret(one)
        return 404, {}, {"message": "Not Found"}

    def _forbidden(self) -> Answer:
        return (404, {}, {"message": "Not Found"}) if self.kind == "github" else (403, {}, {"message": "403 Forbidden"})

    def _deliveries(self, told: Told) -> Answer:
        """Newest first, two a page, so that pages are turned."""
        if not self.may_hook:
            return self._forbidden()
        newest, start = list(reversed(self.attempts)), int(told.query.get("cursor", 0))
        here = f"{self.standin.url}/api/v3/repos/{self.name}/hooks/{told.where['hook_id']}"
        where = f"{here}/deliveries?per_page=100&cursor={start + 2}"
        more = {"Link": f'<{where}>; rel="next"'} if start + 2 < len(newest) else {}
        return 200, more, newest[start : start + 2]

    def _redeliver(self, told: Told) -> Answer:
        assert told.where["delivery_id"] in {str(one["id"]) for one in self.attempts}
        return 202, {}, {}

    # What happens there

    def delivered(self, guid: str, status: int, at_ms: int, event: str = "push") -> int:
        """GitHub tried to deliver something; its number."""
        at = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        row = {**example_of("github/deliveries")[0], "id": 12345670 + len(self.attempts), "guid": guid, "delivered_at": at}
        self.attempts.append(
            {**row, "status_code": status, "status": "OK" if status < 300 else "Invalid HTTP Response", "event": event}
        )
        return int(self.attempts[-1]["id"])


def _without_secret(hook: dict[str, Any]) -> dict[str, Any]:
    """As a server shows it."""
    shown = {name: value for name, value in hook.items() if name not in ("secret", "token")}
    for part in ("config", "configuration"):
        if part in shown:
            shown[part] = {**shown[part], "secret": "********"}
    return shown


_ANSWERS = ("repository", "role", "hooks", "make_hook", "mend_hook")
