"""Who is asking, and what they may. Every route declares its scope; a test looks at all of them."""

from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Final, ParamSpec, TypeVar, cast

from flask import g, redirect, request, url_for

from api import sessions
from api.context import here
from api.sessions import Visit
from millrace.errors import Forbidden, NotFound, Unauthenticated
from millrace.ids import project_of
from millrace.vocabulary import TokenScope
from scheduler import tokens
from scheduler.leases import hash_token
from scheduler.tokens import Principal

P = ParamSpec("P")
R = TypeVar("R")


class Scope(StrEnum):
    """What a route asks for. ATTEMPT: the token of the attempt itself; PUBLIC: nothing, or a signature in the address; PAGE: that
    somebody has signed in (`api.sessions`), by a token that USER routes take. Who has not is sent to where one does.
    """

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"
    WORKER = "worker"
    ATTEMPT = "attempt"
    PAGE = "page"


_HINTS: Final = {
    Scope.USER: "Use an admin token, or one made for the project.",
    Scope.ADMIN: "Use an admin token.",
    Scope.WORKER: "Use a worker token: 'millrace token create NAME --scope worker'.",
}


def needs(scope: Scope) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare and enforce a route's scope. USER takes admin tokens and project tokens; `require_project` narrows them."""

    def wrap(view: Callable[P, R]) -> Callable[P, R]:
        @wraps(view)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if scope is Scope.PAGE:
                found = sessions.current()
                if found is None:
                    back = request.path if request.method == "GET" else ""
                    return cast(R, redirect(url_for("pages.signin", next=back), 303))
                g.principal, g.visit = found.who, found
            elif scope is not Scope.PUBLIC:
                _admit(scope)
            return view(*args, **kwargs)

        checked.millrace_scope = scope  # type: ignore[attr-defined]  # read by the test that looks at all routes
        return checked

    return wrap


def bearer() -> str:
    """The token of this request. Raises Unauthenticated."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise Unauthenticated("this needs a token")
    return token.strip()


def principal() -> Principal:
    """Who is asking, on a USER, ADMIN, WORKER or PAGE route."""
    return cast(Principal, g.principal)


def visit() -> Visit:
    """Who looks at a page, on a PAGE route."""
    return cast(Visit, g.visit)


def attempt_token_hash() -> str:
    """The hash of the attempt token, on an ATTEMPT route; the records decide whether it holds."""
    return cast(str, g.token_hash)


def require_project(name: str) -> None:
    """Raises NotFound where the token is for another project: what one may not see is not there."""
    who = principal()
    if who.scope is TokenScope.PROJECT and who.project != name:
        raise NotFound(f"there is no project {name!r}")


def require_build(build_id: str) -> None:
    """As `require_project`, for a build of it."""
    who = principal()
    if who.scope is TokenScope.PROJECT and who.project != project_of(build_id):
        raise NotFound(f"there is no build {build_id!r}")


def _admit(scope: Scope) -> None:
    token = bearer()
    if scope is Scope.ATTEMPT:
        g.token_hash = hash_token(token)
        return
    who = tokens.verify(here().db, token)
    if who is None:
        raise Unauthenticated("this token is not known, or has ended")
    allowed = {
        Scope.USER: (TokenScope.ADMIN, TokenScope.PROJECT),
        Scope.ADMIN: (TokenScope.ADMIN,),
        Scope.WORKER: (TokenScope.WORKER,),
    }[scope]
    if who.scope not in allowed:
        raise Forbidden(f"a token of scope {who.scope} may not do this", hint=_HINTS[scope])
    g.principal = who
