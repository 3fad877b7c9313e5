"""Routes that git servers call. Nothing is read of a delivery before its signature holds."""

import hashlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

from flask import Blueprint, Response, jsonify, request

from api.auth import Scope, needs
from api.context import here
from api.webhooks import bitbucket, generic, github, gitlab, signatures
from api.webhooks.payload import Payload, parse
from millrace.errors import NotFound
from millrace.webhook import Heard, Provider
from scheduler import hooks
from scheduler.hooks import Outcome, Result
from scheduler.inbox import Arrival

blueprint = Blueprint("webhooks", __name__, url_prefix="/webhooks")
MAX_BYTES: Final = 25 * 1024**2
"""The most that GitHub sends (GitHub: webhook payloads, payload cap)."""
_READERS: Final[dict[Provider, ModuleType]] = {
    Provider.GITHUB: github,
    Provider.BITBUCKET: bitbucket,
    Provider.GITLAB: gitlab,
    Provider.GIT: generic,
}
_STATUSES: Final = {
    Outcome.BUILD: 201,
    Outcome.APPROVAL: 202,
    Outcome.CHECKING: 202,
    Outcome.ACCEPTED: 202,
    Outcome.DUPLICATE: 200,
    Outcome.PING: 200,
}
_INITIATOR: Final = re.compile(r"[A-Za-z0-9._/-]{1,100}")


@blueprint.post("/<provider>/<ident>")
@needs(Scope.PUBLIC)
def receive(provider: str, ident: str) -> tuple[Response, int]:
    """Take a delivery. 201 where it started a build, 202 where it waits for approval, is a comment that approves, or is noted and
    will be acted on, 200 for a ping and for one that came before, 204 where it starts nothing: the header `Millrace-Outcome`
    says why. 401 for a wrong signature, 404 for an unknown address.
    """
    with here().inbox.place() as room:
        return _receive(provider, ident, room=room)


def _receive(provider: str, ident: str, *, room: bool) -> tuple[Response, int]:
    context = here()
    if provider not in list(Provider):
        raise NotFound("there is no webhook of this address", hint=f"Known are {', '.join(Provider)}.")
    hook = context.hooks.get(Provider(provider), ident)
    request.max_content_length = MAX_BYTES
    body = request.get_data(cache=False)
    signatures.check(Provider(provider), request.headers, body, hook.secrets)
    reader = _READERS[Provider(provider)]
    heard = read(Provider(provider), parse(body, request.mimetype), request.headers.get(reader.EVENT_HEADER))
    ident = (reader.delivery_id(request.headers) or f"sha256:{hashlib.sha256(body).hexdigest()}")[:100]
    who = {"delivery_id": ident, "initiator": _initiator(Provider(provider))}
    results = (
        hooks.receive(context.db, hook.record, heard, settings=context.settings, **who)
        if room or heard.ping
        else _note(Arrival(webhook_id=hook.record.id, project=hook.record.project, heard=heard, **who))
    )
    for one in results:
        if one.outcome is Outcome.ACCEPTED:
            context.drain.wake()
        if one.build_id is not None and one.fleet is not None:
            context.ringer.ring(one.build_id, one.fleet)
    answer = jsonify({"deliveryId": ident, "events": [rendered(one) for one in results]})
    answer.headers["Millrace-Outcome"] = "; ".join(f"{one.outcome}: {_header(one.why)}" for one in results[:5])
    return answer, _status({one.outcome for one in results})


def _note(arrival: Arrival) -> Sequence[Result]:
    here().inbox.put(arrival)
    return [hooks.accepted(arrival)]


def read(provider: Provider, payload: Payload, event: str | None) -> Heard:
    """What a payload comes down to; `event` is what its header says, None where it is not at hand."""
    reader = _READERS[provider]
    heard: Heard = reader.heard(reader.guess(payload) if event is None else event[:100], payload)
    return heard


def rendered(result: Result) -> dict[str, Any]:
    """A result as it is shown."""
    return {
        "outcome": result.outcome.value,
        "event": result.what,
        "why": result.why,
        **({"ref": result.ref} if result.ref else {}),
        **({"commit": result.commit} if result.commit else {}),
        **({"buildId": result.build_id} if result.build_id else {}),
    }


def _status(outcomes: set[Outcome]) -> int:
    for outcome, status in _STATUSES.items():
        if outcome in outcomes:
            return status
    return 204


def _initiator(provider: Provider) -> str:
    """As CodeBuild has it: who called, such as `GitHub-Hookshot/044aadd`."""
    agent = request.headers.get("User-Agent", "")
    return agent if _INITIATOR.fullmatch(agent) else f"{provider}-webhook"


def _header(text: str) -> str:
    return "".join(char if " " <= char <= "~" else "?" for char in text[:300])
