"""Webhooks at git servers: whether a repository is there, and a webhook of ours made, found and mended, each server in its words.

GitHub: repos and repos/webhooks. GitLab: projects and project webhooks. Bitbucket Cloud: repositories/.../hooks; Data Center:
repos/.../webhooks. Their secrets can be set and never read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from millrace.vocabulary import SourceType
from scheduler.providers import bitbucket, github, gitlab
from scheduler.providers.rest import Answer, Place, Refused, Rest, segment

NAME: Final = "Millrace"
_MOST_PAGES: Final = 20
_GITHUB: Final = ("push", "pull_request", "release", "issue_comment")
_GITLAB: Final = ("push_events", "tag_push_events", "merge_requests_events", "note_events", "releases_events")
_CLOUD: Final = (
    "repo:push",
    *(f"pullrequest:{what}" for what in ("created", "updated", "fulfilled", "rejected", "comment_created")),
)
_CENTER: Final = (
    "repo:refs_changed",
    *(f"pr:{what}" for what in ("opened", "from_ref_updated", "merged", "declined", "comment:added")),
)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository as its server knows it: by a number that a rename does not change, and by name."""

    id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ServerHook:
    """A webhook at the server. `lacks`: what it does not tell us of, and should; or that it is off."""

    id: str
    url: str
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Server:
    """What can be asked of one kind of git server. All raise Refused and Later; `make` and `mend` take address and secret."""

    events: tuple[str, ...]
    look: Callable[[Rest, Place], Repository]
    find: Callable[[Rest, Place], Iterator[ServerHook]]
    make: Callable[[Rest, Place, str, str], ServerHook]
    mend: Callable[[Rest, Place, str, str, str], ServerHook]


def server_of(kind: SourceType, place: Place) -> Server | None:
    """How the server of a source is asked; None where it is not."""
    if kind is SourceType.BITBUCKET:
        return _ON_CLOUD if bitbucket.is_cloud(place) else _ON_DATA_CENTER
    return _SERVERS.get(kind)


def _look_github(rest: Rest, place: Place) -> Repository:
    found = _object(github.ask(rest, "GET", github.repository(place)))
    return Repository(id=_text(found, "id"), name=_text(found, "full_name"))


def _find_github(rest: Rest, place: Place) -> Iterator[ServerHook]:
    answer = github.ask(rest, "GET", f"{github.repository(place)}/hooks", per_page="100")
    for _ in range(_MOST_PAGES):
        yield from map(_github_hook, _objects(answer.data))
        if answer.next is None:
            return
        answer = github.ask(rest, "GET", answer.next)


def _make_github(rest: Rest, place: Place, url: str, secret: str) -> ServerHook:
    body = {"name": "web", **_for_github(url, secret)}
    return _github_hook(_object(github.ask(rest, "POST", f"{github.repository(place)}/hooks", body)))


def _mend_github(rest: Rest, place: Place, ident: str, url: str, secret: str) -> ServerHook:
    where = f"{github.repository(place)}/hooks/{segment(ident)}"
    return _github_hook(_object(github.ask(rest, "PATCH", where, _for_github(url, secret))))


def _for_github(url: str, secret: str) -> dict[str, Any]:
    config = {"url": url, "content_type": "json", "secret": secret, "insecure_ssl": "0"}
    return {"active": True, "events": list(_GITHUB), "config": config}


def _github_hook(found: Mapping[str, Any]) -> ServerHook:
    config, events = found.get("config"), found.get("events")
    told = set(events) if isinstance(events, list) else set()
    lacks = () if "*" in told else tuple(one for one in _GITHUB if one not in told)
    url = config.get("url") if isinstance(config, dict) else None
    return ServerHook(id=_text(found, "id"), url=str(url or ""), lacks=lacks if found.get("active") else ("active", *lacks))


def _look_gitlab(rest: Rest, place: Place) -> Repository:
    found = _object(gitlab.ask(rest, "GET", gitlab.repository(place)))
    return Repository(id=_text(found, "id"), name=_text(found, "path_with_namespace"))


def _find_gitlab(rest: Rest, place: Place) -> Iterator[ServerHook]:
    answer = gitlab.ask(rest, "GET", f"{gitlab.repository(place)}/hooks", per_page="100")
    for _ in range(_MOST_PAGES):
        yield from map(_gitlab_hook, _objects(answer.data))
        if answer.next is None:
            return
        answer = gitlab.ask(rest, "GET", answer.next)


def _make_gitlab(rest: Rest, place: Place, url: str, secret: str) -> ServerHook:
    return _gitlab_hook(_object(gitlab.ask(rest, "POST", f"{gitlab.repository(place)}/hooks", _for_gitlab(url, secret))))


def _mend_gitlab(rest: Rest, place: Place, ident: str, url: str, secret: str) -> ServerHook:
    where = f"{gitlab.repository(place)}/hooks/{segment(ident)}"
    return _gitlab_hook(_object(gitlab.ask(rest, "PUT", where, _for_gitlab(url, secret))))


def _for_gitlab(url: str, secret: str) -> dict[str, Any]:
    return {"url": url, "token": secret, "enable_ssl_verification": True, **dict.fromkeys(_GITLAB, True)}


def _gitlab_hook(found: Mapping[str, Any]) -> ServerHook:
    lacks = tuple(one for one in _GITLAB if found.get(one) is not True)
    is_off = found.get("alert_status", "executable") == "disabled"
    return ServerHook(id=_text(found, "id"), url=str(found.get("url") or ""), lacks=("active", *lacks) if is_off else lacks)


def _look_cloud(rest: Rest, place: Place) -> Repository:
    found = _object(bitbucket.ask(rest, "GET", bitbucket.repository(place)))
    return Repository(id=_text(found, "uuid"), name=_text(found, "full_name"))


def _find_cloud(rest: Rest, place: Place) -> Iterator[ServerHook]:
    page = _object(bitbucket.ask(rest, "GET", f"{bitbucket.repository(place)}/hooks", pagelen="100"))
    for _ in range(_MOST_PAGES):
        yield from map(_cloud_hook, _objects(page.get("values")))
        following = page.get("next")
        if not isinstance(following, str) or not following.startswith(f"{bitbucket.CLOUD}/"):
            return
        page = _object(bitbucket.ask(rest, "GET", following))


def _make_cloud(rest: Rest, place: Place, url: str, secret: str) -> ServerHook:
    return _cloud_hook(_object(bitbucket.ask(rest, "POST", f"{bitbucket.repository(place)}/hooks", _for_cloud(url, secret))))


def _mend_cloud(rest: Rest, place: Place, ident: str, url: str, secret: str) -> ServerHook:
    where = f"{bitbucket.repository(place)}/hooks/{segment(ident)}"
    return _cloud_hook(_object(bitbucket.ask(rest, "PUT", where, _for_cloud(url, secret))))


def _for_cloud(url: str, secret: str) -> dict[str, Any]:
    return {"description": NAME, "url": url, "secret": secret, "active": True, "events": list(_CLOUD)}


def _cloud_hook(found: Mapping[str, Any]) -> ServerHook:
    return _bitbucket_hook(found, "uuid", _CLOUD)


def _look_center(rest: Rest, place: Place) -> Repository:
    found = _object(bitbucket.ask(rest, "GET", bitbucket.repository(place)))
    project = found.get("project")
    return Repository(
        id=_text(found, "id"), name=f"{_text(project if isinstance(project, dict) else {}, 'key')}/{_text(found, 'slug')}"
    )


def _find_center(rest: Rest, place: Place) -> Iterator[ServerHook]:
    params = {"limit": "100"}
    for _ in range(_MOST_PAGES):
        page = _object(bitbucket.ask(rest, "GET", f"{bitbucket.repository(place)}/webhooks", None, **params))
        yield from map(_center_hook, _objects(page.get("values")))
        if page.get("isLastPage", True) or not isinstance(page.get("nextPageStart"), int):
            return
        params["start"] = str(page["nextPageStart"])


def _make_center(rest: Rest, place: Place, url: str, secret: str) -> ServerHook:
    where = f"{bitbucket.repository(place)}/webhooks"
    return _center_hook(_object(bitbucket.ask(rest, "POST", where, _for_center(url, secret))))


def _mend_center(rest: Rest, place: Place, ident: str, url: str, secret: str) -> ServerHook:
    where = f"{bitbucket.repository(place)}/webhooks/{segment(ident)}"
    return _center_hook(_object(bitbucket.ask(rest, "PUT", where, _for_center(url, secret))))


def _for_center(url: str, secret: str) -> dict[str, Any]:
    return {
        "name": NAME,
        "url": url,
        "active": True,
        "events": list(_CENTER),
        "configuration": {"secret": secret},
        "sslVerificationRequired": True,
    }


def _center_hook(found: Mapping[str, Any]) -> ServerHook:
    return _bitbucket_hook(found, "id", _CENTER)


def _bitbucket_hook(found: Mapping[str, Any], ident: str, wanted: tuple[str, ...]) -> ServerHook:
    events = found.get("events")
    told = events if isinstance(events, list) else []
    lacks = tuple(one for one in wanted if one not in told)
    url = str(found.get("url") or "")
    return ServerHook(id=_text(found, ident), url=url, lacks=lacks if found.get("active") else ("active", *lacks))


def _object(answer: Answer) -> dict[str, Any]:
    if not isinstance(answer.data, dict):
        raise Refused("the server's answer is no JSON object: is this the address of a git server's API?")
    return answer.data


def _objects(data: Any) -> list[dict[str, Any]]:
    if not isinstance(data, list):
        raise Refused("the server's answer has no list")
    return [one for one in data if isinstance(one, dict)]


def _text(found: Mapping[str, Any], member: str) -> str:
    value = found.get(member)
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value):
        raise Refused(f"the server's answer has no {member!r}")
    return str(value)[:300]


_SERVERS: Final = {
    **dict.fromkeys(
        (SourceType.GITHUB, SourceType.GITHUB_ENTERPRISE),
        Server(events=_GITHUB, look=_look_github, find=_find_github, make=_make_github, mend=_mend_github),
    ),
    **dict.fromkeys(
        (SourceType.GITLAB, SourceType.GITLAB_SELF_MANAGED),
        Server(events=_GITLAB, look=_look_gitlab, find=_find_gitlab, make=_make_gitlab, mend=_mend_gitlab),
    ),
}
_ON_CLOUD: Final = Server(events=_CLOUD, look=_look_cloud, find=_find_cloud, make=_make_cloud, mend=_mend_cloud)
_ON_DATA_CENTER: Final = Server(events=_CENTER, look=_look_center, find=_find_center, make=_make_center, mend=_mend_center)
