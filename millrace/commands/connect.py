"""`millrace project connect URL`: a repository set up in one go. Run again, it changes only what is not as it should be."""

import getpass
import re
import sys
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import click

from buildenv.git import Credential
from buildenv.source import heads
from millrace.client import Client
from millrace.commands import builds
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console, harmless
from millrace.commands.webhooks import PLACES
from millrace.errors import (
    BuildProblem,
    BuildStopped,
    Conflict,
    InfraProblem,
    InvalidInput,
    MillraceError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from millrace.ids import PROJECT_NAME
from millrace.project import ProjectSource
from millrace.vocabulary import SourceType
from scheduler.providers import Access, Later, Place, Refused, Rest, place_of
from scheduler.providers.rest import trust_of
from scheduler.providers.webhooks import Repository, Server, ServerHook, server_of

_TYPES: Final = {
    "github": SourceType.GITHUB,
    "github-enterprise": SourceType.GITHUB_ENTERPRISE,
    "bitbucket": SourceType.BITBUCKET,
    "gitlab": SourceType.GITLAB,
    "gitlab-self-managed": SourceType.GITLAB_SELF_MANAGED,
    "git": SourceType.GIT,
}
_HOSTS: Final = {"github.com": SourceType.GITHUB, "gitlab.com": SourceType.GITLAB, "bitbucket.org": SourceType.BITBUCKET}
_MAX_TOKEN_BYTES: Final = 4096
_PATIENCE_S: Final = 20.0
_ODD: Final = re.compile(r"[\x00-\x20\x7f\\]|%(?:[01][0-9a-f]|7f)", re.IGNORECASE)
_HERE: Final = re.compile(r"localhost|127\.|\[?::1")
_FILTERS: Final = [
    [{"type": "EVENT", "pattern": "PUSH"}],
    [{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED, PULL_REQUEST_UPDATED, PULL_REQUEST_REOPENED"}],
]


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is to be set up. `token` None: none was given now. `secret` names it in the farm's store."""

    name: str
    source: ProjectSource
    place: Place
    token: str | None
    secret: str
    image: str
    branches: str | None


@click.command("connect")
@click.argument("url")
@click.option("--name", help="The project's name; by default the repository's.")
@click.option("--type", "kind", type=click.Choice(list(_TYPES)), help="What the git server is, where its address does not say.")
@click.option(
    "--token-file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), help="A file with the token; - for stdin."
)
@click.option("--token-env", metavar="VARIABLE", help="The environment variable that holds the token, such as GITHUB_TOKEN.")
@click.option("--no-token", is_flag=True, help="Ask for none: the repository is public, and you set its webhook up yourself.")
@click.option("--image", help="Image to build in; by default MILLRACE_DEFAULT_IMAGE.")
@click.option("--buildspec", help="Path of the buildspec in the repository; by default buildspec.yml.")
@click.option(
    "--branches", help="A pattern for the branches whose pushes build, such as ^main$; by default all, and pull requests."
)
@click.option("--build/--no-build", default=None, help="Start a build now; by default where the project has none yet.")
@click.pass_obj
def project_connect(
    session: Session,
    url: str,
    name: str | None,
    kind: str | None,
    token_file: Path | None,
    token_env: str | None,
    no_token: bool,
    image: str | None,
    buildspec: str | None,
    branches: str | None,
    build: bool | None,
) -> int:
    """Set the repository at URL up: a project, its token, a webhook here and at the git server, and a first build.

    Run again, it mends what is not as it should be, and leaves the rest. Exit status: that of the first build, 0 without one.
    """
    source = _source(url, kind, buildspec)
    place = _place(source)
    token = _token(session, token_file, token_env, no_token, place)
    name = name or _name(place)
    if not PROJECT_NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is no name of a project", hint="Give one: --name NAME.")
    wanted = _Wanted(
        name=name,
        source=source,
        place=place,
        token=token,
        secret=f"git/{name}",
        image=image or session.settings.default_image,
        branches=branches,
    )
    client = connect(session)
    try:
        return _Connecting(session, client, wanted).run(build)
    finally:
        client.close()


class _Connecting:
    """One run. `done` is what was made so far, to be told where it ends early."""

    def __init__(self, session: Session, client: Client, wanted: _Wanted) -> None:
        self._session, self._client, self._wanted = session, client, wanted
        self._server: Server | None = server_of(wanted.source.type, wanted.place)
        self._path = f"/v1/projects/{quote(wanted.name, safe='')}"
        self._done: list[str] = []

    def run(self, build: bool | None) -> int:
        """All steps, in an order in which each holds by itself."""
        wanted = self._wanted
        rest = self._rest()
        try:
            repository = self._look(rest)
            self._project()
            self._keep_token()
            hook = self._webhook(repository)
            if rest is not None and self._server is not None:
                self._at_server(rest, self._server, hook)
            elif "secret" in hook:
                _say_by_hand(hook)
        except MillraceError as error:
            if self._done:
                done = "; ".join(self._done)
                error.hint = f"{error.hint} Done so far: {done}. Run it again, once that is mended.".strip()
            raise
        finally:
            if rest is not None:
                rest.close()
        if build is False or (build is None and self._client.get("/v1/builds", project=wanted.name, limit=1)["builds"]):
            return 0
        return self._build()

    def _say(self, what: str) -> None:
        self._done.append(what)
        console.print(harmless(what, colours=False), markup=False)

    def _rest(self) -> Rest | None:
        """The server's API, where a token was given for it."""
        wanted = self._wanted
        if wanted.token is None or self._server is None:
            return None
        found = Credential.read(wanted.token, wanted.source)
        return Rest(Access(username=found.username, token=found.password), trust_of(self._session.settings))

    def _look(self, rest: Rest | None) -> Repository | None:
        """The repository, before anything is made."""
        if rest is None or self._server is None:
            self._look_by_git()
            return None
        server, place = self._server, self._wanted.place
        try:
            return server.look(rest, place)
        except Later as problem:
            raise Unavailable(
                f"{place.host} cannot be asked for {place.path}: {problem.why}", hint="Nothing was made."
            ) from problem
        except Refused as refusal:
            raise _of_refusal(refusal, place) from refusal

    def _look_by_git(self) -> None:
        """Read the branches, as a build would. A server that cannot be reached from here may be reached by the workers."""
        wanted, settings = self._wanted, self._session.settings
        if not wanted.place.origin or self._is_there():  # a folder of the farm's host, which may be another; or set up before
            return
        credential = None if wanted.token is None else Credential.read(wanted.token, wanted.source)
        try:
            heads(
                wanted.source,
                git_roots=settings.git_roots,
                ca_bundle=settings.ca_bundle,
                stop=threading.Event(),
                patience_s=_PATIENCE_S,
                credential=credential,
            )
        except (InfraProblem, BuildStopped) as problem:
            why = harmless(problem.message, colours=False)
            console.print(f"note: whether the repository is there cannot be seen from here: {why}", markup=False)
        except BuildProblem as problem:
            given = "with this token" if wanted.token is not None else "without a token"
            raise NotFound(
                f"{wanted.place.host} shows no repository {wanted.place.path} {given}: {problem.message}",
                hint="Look at the address; a private repository wants a token: --token-file, --token-env. Nothing was made.",
            ) from problem

    def _is_there(self) -> bool:
        try:
            self._client.get(self._path)
        except NotFound:
            return False
        return True

    def _project(self) -> None:
        wanted, source = self._wanted, self._wanted.source
        auth = {"type": "SECRETS_MANAGER", "resource": wanted.secret} if wanted.token is not None else None
        try:
            there = self._client.get(self._path)
        except NotFound:
            shape = source.model_dump(mode="json", by_alias=True, exclude_none=True)
            settings = {
                "name": wanted.name,
                "source": {
                    **shape,
                    **({"auth": auth} if auth else {}),
                    **({"reportBuildStatus": True} if auth and self._server else {}),
                },
                "artifacts": {"type": "NO_ARTIFACTS"},
                "environment": {
                    "type": "LINUX_CONTAINER",
                    "image": wanted.image,
                    "computeType": "BUILD_GENERAL1_SMALL",
                },
            }
            self._client.post("/v1/projects", settings)
            self._say(f"project {wanted.name} is made, of {source.location}")
            return
        theirs = ProjectSource.model_validate(there["source"])
        if theirs.type is not source.type or not _same_place(theirs, wanted.place):
            raise Conflict(
                f"there is a project {wanted.name} already, of {theirs.type} {theirs.location or ''}".strip(),
                hint="Give this one another name: --name NAME.",
            )
        if auth is not None and theirs.auth is None:
            kept = {
                key: value for key, value in there.items() if key not in ("arn", "created", "lastModified", "badge", "webhook")
            }
            self._client.put(self._path, {**kept, "source": {**there["source"], "auth": auth}})
            self._say(f"project {wanted.name} has a credential now")
        else:
            console.print(f"project {wanted.name} is there already", markup=False)

    def _keep_token(self) -> None:
        """The token as a secret of the project's, which git and the scheduler read; where the project names it so."""
        wanted = self._wanted
        if wanted.token is None:
            return
        auth = self._client.get(self._path)["source"].get("auth") or {}
        if auth.get("resource") != wanted.secret:
            console.print(f"the project's own credential, {auth.get('resource')}, stays as it is", markup=False)
            return
        body = {"value": wanted.token, "project": wanted.name, "description": f"of {wanted.place.host}"}
        made = self._client.put(f"/v1/secrets/{wanted.secret}", body)
        self._say(f"the token is kept as secret {made['name']} of the project (version {made['version']})")

    def _webhook(self, repository: Repository | None) -> dict[str, Any]:
        """The project's webhook; with its secret where it is new."""
        path = f"{self._path}/webhook"
        try:
            found = self._client.get(path)
        except NotFound:
            chosen = {"branchFilter": self._wanted.branches} if self._wanted.branches else {"filterGroups": _FILTERS}
            made = self._client.post(path, {**chosen, **({"repositoryId": repository.id} if repository else {})})
            self._say("its webhook is made")
            return made
        if repository is not None and found["millrace"]["repositoryId"] not in (None, repository.id):
            raise Conflict(
                f"the webhook of {self._wanted.name} is of repository {found['millrace']['repositoryId']}, and "
                f"{repository.name} is {repository.id}",
                hint="Delete that webhook ('millrace webhook delete'), or give another --name.",
            )
        console.print("its webhook is there already", markup=False)
        return found

    def _at_server(self, rest: Rest, server: Server, hook: dict[str, Any]) -> None:
        """Have the server call the webhook; where it will not be told by us, say what is to be typed there."""
        place, address = self._wanted.place, hook["payloadUrl"]
        if _HERE.match(urlsplit(address).netloc):
            console.print(f"note: {address} is no address that others reach; set MILLRACE_PUBLIC_URL", markup=False)
        try:
            known = self._find(rest, server, hook)
            if known is not None and not known.lacks:
                console.print(f"{place.host} calls it already (webhook {known.id})", markup=False)
            elif known is not None:
                secret = self._secret(hook)
                known = server.mend(rest, place, known.id, address, secret)
                self._say(f"at {place.host} webhook {known.id} is mended")
            else:
                known = server.make(rest, place, address, self._secret(hook))
                self._say(f"at {place.host} webhook {known.id} is made")
        except (Refused, Later) as problem:
            console.print(harmless(f"{place.host} did not take the webhook: {problem.why}", colours=False), markup=False)
            _say_by_hand(hook)
            return
        if hook["millrace"]["providerHookId"] != known.id:
            self._client.put(f"{self._path}/webhook", {"providerHookId": known.id})

    def _find(self, rest: Rest, server: Server, hook: dict[str, Any]) -> ServerHook | None:
        return next((one for one in server.find(rest, self._wanted.place) if one.url == hook["payloadUrl"]), None)

    def _secret(self, hook: dict[str, Any]) -> str:
        """The webhook's secret: that of a new one, else a new secret, as none can be read; the old one holds for a day more."""
        if "secret" not in hook:
            hook["secret"] = self._client.put(f"{self._path}/webhook", {"rotateSecret": True})["secret"]
        return str(hook["secret"])

    def _build(self) -> int:
        key = {"Idempotency-Key": str(uuid.uuid4())}
        made = self._client.post("/v1/builds", {"projectName": self._wanted.name}, **key)
        console.print(f"Build {made['id']} (number {made['buildNumber']})")
        builds.stop_on_interrupt(self._client, made["id"])
        return builds.follow_build(self._session, self._client, made["id"], None)


def _source(url: str, kind: str | None, buildspec: str | None) -> ProjectSource:
    url = url.strip().rstrip("/")
    try:
        address = urlsplit(url) if "://" in url else None
        host = (address.hostname or "") if address else url.partition(":")[0].rpartition("@")[2]
    except ValueError as error:
        raise InvalidInput(f"{url[:100]!r} is no address of a repository: {error}") from error
    if _ODD.search(url) or (address is not None and (address.query or address.fragment or "?" in url or "#" in url)):
        raise InvalidInput(
            f"{url[:100]!r} is no address of a repository: it has a query, a fragment, or signs that no name has",
            hint="Give the address that 'git clone' takes.",
        )
    has_password = address is not None and address.password is not None
    if has_password or (address is not None and address.scheme in ("http", "https") and address.username):
        raise InvalidInput(
            "the address holds a name or a password, which would be kept where others read it",
            hint="Leave it out, and give the token with --token-file, --token-env, or when asked.",
        )
    found = _TYPES[kind] if kind else _HOSTS.get(host.lower())
    if found is None:
        raise InvalidInput(
            f"what kind of git server {host or url!r} is cannot be told from its name", hint=f"Give --type: {', '.join(_TYPES)}."
        )
    return ProjectSource(type=found, location=url, buildspec=buildspec)


def _place(source: ProjectSource) -> Place:
    if source.type is SourceType.GIT and (source.location or "").startswith("/"):
        return Place(origin="", host="this host", path=(source.location or "").strip("/").removesuffix(".git"))
    try:
        return place_of(source)
    except Refused as error:
        raise InvalidInput(
            f"{(source.location or '')[:100]!r} is no address of a repository at a git server",
            hint="Such as https://github.com/OWNER/REPOSITORY.",
        ) from error


def _same_place(theirs: ProjectSource, place: Place) -> bool:
    try:
        other = _place(theirs)
    except InvalidInput:
        return False
    return (other.host.lower(), other.path.lower()) == (place.host.lower(), place.path.lower())


def _name(place: Place) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", place.path.rpartition("/")[2]).strip("-_")


def _token(session: Session, file: Path | None, variable: str | None, no_token: bool, place: Place) -> str | None:
    """The token, from where it was said to be; else asked for at a terminal. None: none is given."""
    if sum((file is not None, variable is not None, no_token)) > 1:
        raise click.UsageError("give one of --token-file, --token-env and --no-token")
    if no_token:
        return None
    try:
        if variable is not None:
            token = session.environ.get(variable, "")
        elif file is not None:
            with click.open_file(str(file), "rb") as body:
                token = body.read(_MAX_TOKEN_BYTES + 1).decode()
        elif sys.stdin.isatty():
            token = getpass.getpass(f"Token for {place.host} (empty for none): ")
            if not token.strip():
                return None
        else:
            return None
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidInput("the token is no text in UTF-8") from None  # the error holds it
    token = token.strip()
    if not token or len(token) > _MAX_TOKEN_BYTES:
        where = f"the variable {variable}" if variable else str(file or "what was typed")
        raise InvalidInput(f"{where} holds no token" if not token else f"{where} is too long for a token")
    return token


def _of_refusal(refusal: Refused, place: Place) -> MillraceError:
    nothing = "Nothing was made."
    if refusal.status == 401:
        return Unauthenticated(
            f"{place.host} does not take this token: {refusal.why}", hint=f"docs/statuses.md says what it needs. {nothing}"
        )
    if refusal.status in (403, 404):
        return NotFound(
            f"{place.host} shows this token no repository {place.path}: {refusal.why}",
            hint=f"Look at the address, and at what the token may read. {nothing}",
        )
    return InvalidInput(f"{place.host} cannot be asked for {place.path}: {refusal.why}", hint=nothing)


def _say_by_hand(hook: dict[str, Any]) -> None:
    click.echo("Set the webhook up at the git server yourself:")
    click.echo(f"address: {hook['payloadUrl']}")
    if "secret" in hook:
        click.echo(f"secret:  {hook['secret']}")
    else:  # a new one would end the one that may stand there already
        click.echo("secret:  it was shown when the webhook was made; 'millrace webhook rotate' makes another")
    click.echo(PLACES[hook["millrace"]["provider"]])
