"""Every error of ours, in one tree.

    MillraceError
      RequestError            400  the request is wrong; nothing was done
        Unauthenticated       401  no token, or one that is not known
        Forbidden             403  a known token that may not do this
        NotFound              404  no such thing, or not for this token
          SecretUnavailable        a secret that a build asks for cannot be had; names all of those
        UnsupportedMedia      415  a body of the wrong content type
        TooLarge              413  a body or file over its limit
        InvalidInput          422  well-formed, but a field's value is wrong
      Conflict                409  the thing is not in the state that this needs
        AlreadyExists
        IdempotencyMismatch        one key, two different requests
        AttemptFenced              another attempt holds the build now: stop, and upload nothing
        IllegalTransition          a move that the table of states does not know
      Unavailable             503  a part of ours is away; the same request works later
      ProviderTrouble         503  where a fleet's workers come from did not do it, or not all of it
      BuildProblem            ->   the build ends FAILED, with the problem's Reason
        BadBuildspec
      InfraProblem            ->   the attempt ends FAULT or is tried again, with its Reason
      BuildStopped            ->   the build was stopped or timed out while it ran

A class says what happened in its message and what to do next in `hint`. They are translated at the edges only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from millrace.vocabulary import Reason, Trouble


class MillraceError(Exception):
    """Something that we foresaw. `hint` is a sentence that says what to do next."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        if hint:
            self.hint = hint


class RequestError(MillraceError):
    """The request is wrong, and nothing was done."""

    code = "bad_request"
    status = 400


class Unauthenticated(RequestError):
    """No token came with the request, or one that is not known."""

    code = "unauthenticated"
    status = 401
    hint = "Send 'Authorization: Bearer TOKEN'; make a token with 'millrace token create'."


class Forbidden(RequestError):
    """The token is known, but may not do this."""

    code = "forbidden"
    status = 403
    hint = "Use an admin token, or one made for this project."


class NotFound(RequestError):
    """There is no such thing, or none that this token may see."""

    code = "not_found"
    status = 404


class SecretUnavailable(NotFound):
    """A build asks for secrets that it cannot have; the message names all of them, and holds no value."""

    code = "secret_unavailable"


class TooLarge(RequestError):
    """The body or file is over its limit."""

    code = "too_large"
    status = 413


class UnsupportedMedia(RequestError):
    """The body has another content type than this route reads."""

    code = "unsupported_media_type"
    status = 415


class LimitExceeded(RequestError):
    """So many builds of the project wait or run that another is refused."""

    code = "limit_exceeded"
    status = 429


@dataclass(frozen=True, kw_only=True)
class FieldProblem:
    """One wrong field: `field` is its path in the request (`environment.image`), `what` says what is wrong with it."""

    field: str
    what: str


class InvalidInput(RequestError):
    """Well-formed, but with wrong values; `fields` lists all of them."""

    code = "invalid_input"
    status = 422

    def __init__(self, message: str, *, hint: str = "", fields: Sequence[FieldProblem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.fields = tuple(fields)


class Conflict(MillraceError):
    """The thing is not in the state that this needs."""

    code = "conflict"
    status = 409


class AlreadyExists(Conflict):
    """The name is taken."""

    code = "already_exists"


class IdempotencyMismatch(Conflict):
    """An idempotency key came again with another request."""

    code = "idempotency_mismatch"
    hint = "Use a new key for a new request."


class AttemptFenced(Conflict):
    """Another attempt holds the build now, or it has ended: stop, and upload nothing."""

    code = "attempt_fenced"


class IllegalTransition(Conflict):
    """The table of states knows no such move."""

    code = "illegal_transition"


class Unavailable(MillraceError):
    """A part of ours does not answer; the same request works later."""

    code = "unavailable"
    status = 503


class ProviderTrouble(MillraceError):
    """A fleet's provider did not do what it was asked to, or not all of it. Asked again later, it may."""

    code = "provider_trouble"
    status = 503
    hint = "Asked again later, it may; 'millrace fleet show' says what it answers."

    def __init__(self, trouble: Trouble, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.trouble = trouble


class BuildProblem(MillraceError):
    """The user's part of a build is wrong: the build ends FAILED with `reason`.

    `status_code` is CodeBuild's phase-context code (`YAML_FILE_ERROR`, `CLIENT_ERROR`, ...).
    """

    code = "build_problem"
    reason: Reason

    def __init__(self, message: str, *, reason: Reason, status_code: str = "CLIENT_ERROR", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.status_code = status_code


@dataclass(frozen=True, kw_only=True)
class SpecProblem:
    """One problem of a buildspec. `line` and `column` count from 1; `hint` says what to write instead, or is empty.

    `rule` is a stable name for programs; docs/buildspec.md lists them.
    """

    line: int
    column: int
    what: str
    hint: str = ""
    rule: str = "yaml"

    def __str__(self) -> str:
        text = f"line {self.line}, column {self.column}: {self.what}"
        return f"{text} ({self.hint})" if self.hint else text


class BadBuildspec(BuildProblem):
    """The buildspec is wrong; `problems` lists everything that is, in the order of the file, `warnings` what is only odd."""

    code = "bad_buildspec"
    status = 422

    def __init__(self, where: str, problems: Sequence[SpecProblem], *, warnings: Sequence[SpecProblem] = ()) -> None:
        lines = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__(f"{where} has {count}:\n{lines}", reason=Reason.BAD_BUILDSPEC, status_code="YAML_FILE_ERROR")
        self.where = where
        self.problems = tuple(problems)
        self.warnings = tuple(warnings)


class InfraProblem(MillraceError):
    """A part of ours failed a build: the attempt ends FAULT, or is tried again, with `reason`."""

    code = "infra_problem"
    reason: Reason

    def __init__(self, message: str, *, reason: Reason, status_code: str = "INTERNAL_SERVICE_ERROR", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.status_code = status_code


class BuildStopped(MillraceError):
    """The build was told to stop while it ran: by the user, by its time-out, by a lost lease, or by a leaving worker."""

    code = "build_stopped"

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason
