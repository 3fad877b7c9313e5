"""The page of what waits for an approval, and where one signs in for it."""

import re
from datetime import UTC, datetime
from typing import Final

from flask import Blueprint, Response, g, make_response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as AnyResponse

from api import sessions
from api.auth import Scope, needs, principal, require_project, visit
from api.context import here
from api.pages.words import changes_at, plain
from millrace.errors import InfraProblem, InvalidInput, MillraceError
from scheduler import approvals, hooks, projects

blueprint = Blueprint("pages", __name__, template_folder="templates")
_MAX_FORM_BYTES: Final = 16 * 1024
_COMMIT: Final = re.compile(r"[0-9a-f]{7,64}")
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # without one, our own forms would not say where they come from
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
blueprint.add_app_template_filter(plain)


@blueprint.after_request
def _guard(answer: Response) -> Response:
    for name, value in _HEADERS.items():
        answer.headers.setdefault(name, value)
    return answer


@blueprint.errorhandler(MillraceError)
def _problem(error: MillraceError) -> tuple[str, int]:
    status = 503 if isinstance(error, InfraProblem) else error.status
    page = render_template(
        "problem.html", title="That did not work", message=error.message, hint=error.hint, visit=g.get("visit")
    )
    return page, status


@blueprint.get("/pages/style.css")
@needs(Scope.PUBLIC)
def style() -> Response:
    """How the pages look."""
    answer = Response(render_template("style.css"), mimetype="text/css")
    answer.headers["Cache-Control"] = "max-age=3600"
    return answer


@blueprint.get("/signin")
@needs(Scope.PUBLIC)
def signin() -> str:
    """Where a token is asked for. A link from elsewhere brings no cookie along: who follows one is first sent on by ourselves."""
    back = _back(request.args.get("next", ""))
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and "again" not in request.args:
        return render_template("again.html", title="One moment", back=back)
    return render_template("signin.html", title="Sign in", back=back, wrong=False)


@blueprint.post("/signin")
@needs(Scope.PUBLIC)
def sign_in() -> AnyResponse:
    """Take a token, and give a session for it."""
    request.max_content_length = _MAX_FORM_BYTES
    sessions.require_own_form()
    back = _back(request.form.get("next", ""))
    answer = make_response(redirect(back, 303))
    if sessions.sign_in(request.form.get("token", "").strip(), answer):
        return answer
    return make_response(render_template("signin.html", title="Sign in", back=back, wrong=True), 401)


@blueprint.post("/signout")
@needs(Scope.PAGE)
def sign_out() -> AnyResponse:
    """End the session."""
    request.max_content_length = _MAX_FORM_BYTES
    sessions.require_own_form(visit())
    answer = make_response(redirect(url_for("pages.signin"), 303))
    sessions.sign_out(answer)
    return answer


@blueprint.get("/approvals")
@needs(Scope.PAGE)
def everything() -> str:
    """What waits, of all projects that this token sees."""
    only = principal().project
    return _listed(only, f"Pull requests of {only} that wait" if only else "Pull requests that wait")


@blueprint.get("/approvals/<name>")
@needs(Scope.PAGE)
def of_project(name: str) -> str:
    """What waits of one project."""
    require_project(name)
    projects.get(here().db, name)
    return _listed(name, f"Pull requests of {name} that wait")


@blueprint.post("/approvals/<name>")
@needs(Scope.PAGE)
def approve(name: str) -> AnyResponse:
    """Start the build of the very commit that the form holds."""
    request.max_content_length = _MAX_FORM_BYTES
    require_project(name)
    sessions.require_own_form(visit())
    context, commit = here(), request.form.get("commit", "")
    if not _COMMIT.fullmatch(commit):
        raise InvalidInput("this is no commit", hint="Load the page anew, and send its own form.")
    result = hooks.approve(context.db, name, commit, by=f"{principal().name} (page)", settings=context.settings)
    if result.build_id is not None and result.fleet is not None:
        context.ringer.ring(result.build_id, result.fleet)
    return redirect(url_for("pages.of_project", name=name), 303)


def _listed(project: str | None, title: str) -> str:
    waiting = [
        {
            "at": _time(one.received_ms),
            "changes": changes_at(one.provider, one.event),
            "event": one.event,
            "moved_to": one.moved_to,
            "project": one.project,
        }
        for one in approvals.waiting(here().db, project)
    ]
    done = approvals.approved(here().db, project)
    return render_template("approvals.html", title=title, waiting=waiting, done=done, visit=visit(), project=project)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _back(wanted: str) -> str:
    """Where to go after signing in: a page of ours, and nowhere else."""
    inside = wanted.startswith("/approvals") and not any(char in wanted for char in "\\\r\n\t")
    return wanted if inside else url_for("pages.everything")
