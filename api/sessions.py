"""Who has signed in at the pages: a sealed cookie that names a token, and opens what that token opens, as long as it holds.

No other site may send it (SameSite=Strict), no script may read it, and what changes something has to repeat a word that only our
own forms hold.
"""

import base64
import binascii
import hmac
import json
import secrets as randomness
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from flask import Response, request

from api.context import here
from millrace.clock import now
from millrace.errors import Forbidden
from millrace.secrets.keyring import WrongKey
from millrace.vocabulary import TokenScope
from scheduler import tokens
from scheduler.secrets import keys_of
from scheduler.tokens import Principal

COOKIE: Final = "millrace_session"
LASTS_S: Final = 12 * 3600
_CONTEXT: Final = "session\npages"
_MAX_CHARS: Final = 2000
_SCOPES: Final = (TokenScope.ADMIN, TokenScope.PROJECT)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Somebody who has signed in, and the word that their forms carry."""

    who: Principal
    word: str


def current() -> Visit | None:
    """Who asks for a page; None where nobody has signed in, or no longer may."""
    given = request.cookies.get(COOKIE, "")
    if not given or len(given) > _MAX_CHARS:
        return None
    try:
        kept = json.loads(keys_of(here().settings)(False).unseal(base64.urlsafe_b64decode(given), _CONTEXT))
    except (WrongKey, binascii.Error, ValueError):  # somebody else's cookie, or of keys that are gone
        return None
    if kept["until"] < now().timestamp():
        return None
    who = tokens.get(here().db, kept["token"])
    return Visit(who=who, word=kept["word"]) if who is not None and who.scope in _SCOPES else None


def sign_in(token: str, answer: Response) -> bool:
    """Let `answer` carry a new session; False where the token opens nothing that has pages."""
    who = tokens.verify(here().db, token)
    if who is None or who.scope not in _SCOPES:
        return False
    kept = {"token": who.token_id, "until": now().timestamp() + LASTS_S, "word": randomness.token_urlsafe(32)}
    sealed = keys_of(here().settings)(True).seal(json.dumps(kept), _CONTEXT)
    _set(answer, base64.urlsafe_b64encode(sealed).decode(), LASTS_S)
    return True


def sign_out(answer: Response) -> None:
    """Take the session away."""
    _set(answer, "", 0)


def _set(answer: Response, value: str, max_age_s: int) -> None:
    secure = here().settings.public.startswith("https://")
    answer.set_cookie(COOKIE, value, max_age=max_age_s, httponly=True, samesite="Strict", secure=secure)


def require_own_form(visit: Visit | None = None) -> None:
    """Raises Forbidden unless a form of ours was sent: from our own address, and with the visit's word."""
    origin = request.headers.get("Origin")
    ours = {_origin(request.host_url), _origin(here().settings.public)}
    if origin is not None and _origin(origin) not in ours:
        raise Forbidden("this form was sent from another site", hint="Open the page itself, and send it from there.")
    if visit is not None and not hmac.compare_digest(request.form.get("word", "").encode(), visit.word.encode()):
        raise Forbidden("this form is not of this visit", hint="Load the page anew, and send it again.")


def _origin(url: str) -> str:
    try:
        address = urlsplit(url)
        return f"{address.scheme}://{address.hostname}:{address.port or {'http': 80, 'https': 443}.get(address.scheme)}"
    except ValueError:
        return ""
