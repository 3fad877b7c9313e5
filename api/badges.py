"""Badges: how the newest build of a branch or tag stands, as a picture (CodeBuild: build badges). Its address is the key."""

from typing import Final

from flask import Blueprint, Response, request

from api.auth import Scope, needs
from api.context import here
from api.paging import only
from millrace.errors import InvalidInput, NotFound
from scheduler import badges
from scheduler.badges import Badge

blueprint = Blueprint("badges", __name__)
_LABEL: Final = "build"
_COLOURS: Final = {Badge.PASSING: "#2c7a32", Badge.FAILING: "#c0392b", Badge.IN_PROGRESS: "#2769a8", Badge.UNKNOWN: "#6b6b6b"}
_LEFT: Final = 37
_SVG: Final = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {word}">
<title>{label}: {word}</title>
<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#444"/>
<rect x="{left}" width="{right}" height="20" fill="{colour}"/></g>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{label_x}" y="14">{label}</text><text x="{word_x}" y="14">{word}</text></g>
</svg>
"""
"""Nothing of a request or a project ever stands in it."""


@blueprint.get("/badges")
@needs(Scope.PUBLIC)
def show() -> Response:
    """The badge of the project with this `uuid`, for a `branch` or a `tag`."""
    only("uuid", "branch", "tag")
    branch, tag = request.args.get("branch"), request.args.get("tag")
    if branch and tag:
        raise InvalidInput("a badge is of a branch or of a tag, not of both")
    badge = badges.find(here().db, request.args.get("uuid", ""), branch=branch or None, tag=tag or None)
    if badge is None:
        raise NotFound(
            "there is no badge of this address", hint="badge.badgeRequestUrl of a project has it, where badgeEnabled is set."
        )
    answer = Response(drawn(badge), mimetype="image/svg+xml")
    answer.headers["Cache-Control"] = "no-cache"
    answer.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.add_etag()
    answer.make_conditional(request)
    return answer


def drawn(badge: Badge) -> str:
    """The picture."""
    word = badge.value.lower().replace("_", " ")
    right = 7 * len(word) + 8
    return _SVG.format(
        width=_LEFT + right,
        left=_LEFT,
        right=right,
        colour=_COLOURS[badge],
        label=_LABEL,
        label_x=_LEFT / 2,
        word=word,
        word_x=_LEFT + right / 2,
    )
