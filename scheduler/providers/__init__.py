"""Git servers as they are told of a build's state: one function each, which may be called again with the same word."""

from collections.abc import Callable, Mapping
from typing import Final

from millrace.vocabulary import SourceType
from scheduler.providers import bitbucket, github, gitlab
from scheduler.providers.rest import Access, Later, Place, Refused, Report, Rest, place_of

TELL: Final[Mapping[SourceType, Callable[[Rest, Report], str | None]]] = {
    SourceType.GITHUB: github.tell,
    SourceType.GITHUB_ENTERPRISE: github.tell,
    SourceType.BITBUCKET: bitbucket.tell,
    SourceType.GITLAB: gitlab.tell,
    SourceType.GITLAB_SELF_MANAGED: gitlab.tell,
}
"""How each source's server is told. They answer what the server calls the status where it must be named again, and raise Refused
or Later."""

__all__ = ["TELL", "Access", "Later", "Place", "Refused", "Report", "Rest", "place_of"]
