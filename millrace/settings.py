"""All settings, read once from `MILLRACE_*` variables in `millrace.cli` and passed down. Nothing else reads the environment."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from millrace import failpoints
from millrace.errors import FieldProblem, InvalidInput
from millrace.need import Label


class Settings(BaseSettings):
    """One frozen record; each field is documented, and `docs/settings.md` is made from it. Defaults are the embedded farm's."""

    model_config = SettingsConfigDict(env_prefix="MILLRACE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    data_dir: Annotated[
        Path, Field(description="Folder of the embedded farm: database, objects, sockets, secrets, workspaces.")
    ] = Path("~/.millrace")
    database_url: Annotated[
        SecretStr | None,
        Field(
            description="SQLAlchemy address of the records; absent: SQLite in the data folder. PostgreSQL: postgresql+psycopg://..."
        ),
    ] = None
    broker_url: Annotated[
        SecretStr | None,
        Field(description="Redis address of the bell; absent: the embedded farm's own redis-server on a Unix socket."),
    ] = None
    store_url: Annotated[
        str | None,
        Field(
            description="Object store: file:///folder, or http(s)://host:port of any S3; absent: a directory in the data folder."
        ),
    ] = None
    store_access_key: Annotated[
        str | None, Field(description="Access key of the S3 store; absent, with AWS's own: that of the role.")
    ] = None
    store_secret_key: Annotated[SecretStr | None, Field(description="Secret key of the S3 store.")] = None
    store_region: Annotated[str, Field(description="Region of the S3 store.")] = "us-east-1"
    bucket: Annotated[str, Field(description="Bucket that holds what the farm itself stores: artifacts, uploads, logs.")] = (
        "millrace"
    )

    bind: Annotated[str, Field(description="Address that the API listens on, host:port; port 0 picks a free one.")] = (
        "127.0.0.1:8420"
    )
    api_url: Annotated[
        str | None,
        Field(description="Address at which workers and the command line reach the API; absent: from `bind`."),
    ] = None
    public_url: Annotated[
        str | None,
        Field(description="Address at which git servers and people reach the API, as it stands in webhooks; absent: `api_url`."),
    ] = None
    api_workers: Annotated[int, Field(ge=1, le=64, description="Processes of the API server.")] = 2
    api_threads: Annotated[int, Field(ge=1, le=512, description="Threads of each; a followed log holds one.")] = 32
    webhooks_at_once: Annotated[
        int,
        Field(
            ge=0,
            description="Deliveries of webhooks within half a second that each process of the API acts on before it answers; "
            "those beyond are noted, answered with 202, and acted on behind.",
        ),
    ] = 4
    token: Annotated[SecretStr | None, Field(description="API token of the command line; absent: the embedded farm's own.")] = (
        None
    )
    worker_token: Annotated[SecretStr | None, Field(description="Token with which a worker claims builds.")] = None
    signing_key: Annotated[
        SecretStr | None, Field(description="Key that signs grants for the directory store, 32 bytes or more.")
    ] = None
    secrets_provider: Annotated[
        Literal["builtin", "aws", "vault"],
        Field(description="Where builds' secrets come from: the farm's own store, AWS, or HashiCorp Vault."),
    ] = "builtin"
    secrets_names: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Names that a build may ask for: patterns, comma-separated; `{project}` stands for its project's name."
        ),
    ] = ("*",)
    secrets_key: Annotated[
        SecretStr | None,
        Field(description="Keys of the farm's own store, comma-separated, 32 bytes each in hex or base64; the first one seals."),
    ] = None
    secrets_key_file: Annotated[
        Path | None,
        Field(description="File with these keys, one a line; absent: `secrets.key` in the data folder, made when it is needed."),
    ] = None
    vault_address: Annotated[str | None, Field(description="Address of Vault, http(s)://host:port.")] = None
    vault_token: Annotated[SecretStr | None, Field(description="Token with which the API reads from Vault.")] = None
    vault_token_file: Annotated[
        Path | None, Field(description="File with that token, read each time, as Vault's agent keeps it up to date.")
    ] = None
    vault_mount: Annotated[str, Field(description="Where the KV engine (version 2) is mounted.")] = "secret"
    vault_namespace: Annotated[str | None, Field(description="Namespace in Vault, where it has them.")] = None
    max_body_bytes: Annotated[int, Field(ge=1024, description="Largest JSON body the API reads.")] = 2 * 1024**2
    part_bytes: Annotated[
        int,
        Field(
            ge=5 * 1024**2,
            le=5 * 1024**3,
            description="Artifacts and caches that are larger go to the store in parts of so many bytes.",
        ),
    ] = 64 * 1024**2
    max_upload_bytes: Annotated[int, Field(ge=1024, description="Largest source folder or artifact, in bytes.")] = 5 * 1024**3

    region: Annotated[str, Field(description="Region named in ARNs and AWS_REGION.")] = "us-east-1"
    account_id: Annotated[str, Field(pattern=r"^[0-9]{12}$", description="Account id named in ARNs.")] = "000000000000"
    default_image: Annotated[str, Field(description="Image of projects that name none (`millrace run`).")] = (
        "millrace/standard:latest"
    )
    git_roots: Annotated[
        tuple[Path, ...],
        NoDecode,
        Field(description="Folders below which a local path may be a git source, colon-separated."),
    ] = ()

    fleet: Annotated[str, Field(description="Fleet that a worker belongs to.")] = "default"
    worker_id: Annotated[str | None, Field(description="Name of a worker; absent: made from the host's name at each start.")] = (
        None
    )
    workers: Annotated[
        int, Field(ge=0, le=256, description="Workers that `millrace up` always keeps on its box; 0 leaves all to fleets.")
    ] = 1
    slots: Annotated[int, Field(ge=1, le=256, description="Builds that a worker runs at once.")] = 2
    generation: Annotated[
        int | None,
        Field(ge=1, description="Generation of its fleet that a worker is of; what starts workers for a fleet sets it."),
    ] = None
    cpus: Annotated[
        float | None, Field(gt=0, le=1024, description="CPUs that a worker has for builds; absent: its slots alone bound them.")
    ] = None
    memory_offered_bytes: Annotated[
        int | None, Field(ge=0, description="Memory that a worker has for builds; absent: its slots alone bound them.")
    ] = None
    labels: Annotated[
        tuple[Label, ...],
        NoDecode,
        Field(max_length=50, description="What a worker is or has, comma-separated, for builds that ask for it."),
    ] = ()
    parked: Annotated[
        int,
        Field(ge=0, le=256, description="Containers that a worker keeps waiting, started, for the images it used last; 0: none."),
    ] = 2
    work_dir: Annotated[
        Path | None,
        Field(description="Workspaces of a worker; must be the same path for the engine; absent: in the data folder."),
    ] = None
    build: Annotated[
        str | None, Field(description="The only build that a worker may claim that runs one (`millrace worker --once`).")
    ] = None
    engine: Annotated[
        Literal["docker", "own", "fake"],
        Field(description="What runs builds: Docker; `own`, the worker's own container, for one build; `fake` only rehearses."),
    ] = "docker"
    own_image: Annotated[
        str | None,
        Field(description="What builds call the image that a worker of the engine `own` runs in; absent: whatever they ask for."),
    ] = None
    docker_host: Annotated[str | None, Field(description="Address of the Docker engine; absent: Docker's own default.")] = None
    network: Annotated[str, Field(description="Docker network mode of build containers: bridge, none or a network's name.")] = (
        "bridge"
    )
    ca_bundle: Annotated[
        Path | None,
        Field(description="CA bundle mounted into build containers; absent: the host's, where its operator has added to it."),
    ] = None
    memory_bytes: Annotated[
        int | None, Field(description="Memory limit of a container, over the compute type's; absent: by type.")
    ] = None
    pids_limit: Annotated[int, Field(ge=16, description="Processes that a build may have.")] = 4096

    mirrors_bytes: Annotated[
        int,
        Field(ge=0, description="Disk that a worker's mirrors of git repositories may take; 0: no mirrors."),
    ] = 20 * 1024**3
    mirrors_days: Annotated[float, Field(gt=0, description="Days without use after which a mirror is removed.")] = 14

    privileged: Annotated[
        bool,
        Field(
            description="Builds of projects with privilegedMode run in privileged containers, and so own this worker's host; "
            "else they are refused."
        ),
    ] = False
    cache_bytes: Annotated[
        int,
        Field(ge=0, description="Unpacked layers of caches that a worker keeps, in bytes; 0: caches are copied, not mounted."),
    ] = 20 * 1024**3
    cache_store_bytes: Annotated[
        int, Field(ge=0, description="Caches kept in the object store, in bytes; those not used for longest make room.")
    ] = 100 * 1024**3
    min_free_bytes: Annotated[int, Field(ge=0, description="Free disk below which a worker claims nothing.")] = 2 * 1024**3
    min_free_inodes_percent: Annotated[
        float, Field(ge=0, le=100, description="Share of free inodes, in percent, below which a worker claims nothing.")
    ] = 5

    max_running: Annotated[
        int | None, Field(ge=1, description="Builds that run at once on the whole farm, over all fleets; absent: no limit.")
    ] = None
    concurrency_overflow: Annotated[
        Literal["queue", "reject"],
        Field(description="What a build over its project's concurrentBuildLimit does: wait, or be refused as CodeBuild does."),
    ] = "queue"
    max_attempts: Annotated[int, Field(ge=1, le=10, description="Attempts of a build where our side fails.")] = 3
    lease_ttl_s: Annotated[float, Field(gt=0, description="Seconds that a claim lasts without renewal.")] = 30
    renew_every_s: Annotated[
        float, Field(gt=0, description="Seconds between renewals, and so until a running build hears that it should stop.")
    ] = 5
    self_fence_s: Annotated[float, Field(gt=0, description="Seconds without a renewal after which a worker stops by itself.")] = (
        25
    )
    sweep_every_s: Annotated[float, Field(gt=0, description="Seconds between rounds of the sweeper.")] = 5
    look_every_s: Annotated[
        float,
        Field(
            ge=0, description="Seconds between looks at a repository with a webhook, for pushes that nobody told of; 0: never."
        ),
    ] = 120
    drain_s: Annotated[float, Field(ge=0, description="Seconds that a leaving worker gives its builds.")] = 60
    notices: Annotated[
        Literal["off", "ec2"],
        Field(description="Who tells a worker that its machine goes, beside SIGTERM: `ec2`, the metadata of EC2, or nobody."),
    ] = "off"
    metadata_url: Annotated[str, Field(description="Address of that metadata.")] = "http://169.254.169.254"

    log_format: Annotated[Literal["auto", "json", "console"], Field(description="Form of the farm's own log.")] = "auto"
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(description="Least level of the farm's own log.")
    ] = "INFO"

    testing: Annotated[bool, Field(description="This farm is a test's, and may be told to fail.")] = False
    failpoint: Annotated[
        str | None,
        Field(description="Where a farm under test dies: NAME[:NTH][:ACTION] or `watch`; refused without `MILLRACE_TESTING=1`."),
    ] = None

    @field_validator("failpoint")
    @classmethod
    def _only_in_tests(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            if not info.data.get("testing"):
                raise ValueError("makes a farm fail, and is for tests only: it needs MILLRACE_TESTING=1")
            if value != failpoints.WATCH:
                failpoints.parse(value)
        return value

    def __init__(self, **values: object) -> None:
        if isinstance(values.get("git_roots"), str):
            values["git_roots"] = _paths(str(values["git_roots"]))
        for name in ("secrets_names", "labels"):
            if isinstance(values.get(name), str):
                values[name] = tuple(part.strip() for part in str(values[name]).split(",") if part.strip())
        super().__init__(**values)  # type: ignore[arg-type]  # pydantic-settings types its private arguments only

    @property
    def home(self) -> Path:
        """The data folder, absolute."""
        return self.data_dir.expanduser().resolve()

    @property
    def database(self) -> str:
        """The SQLAlchemy address of the records."""
        return self.database_url.get_secret_value() if self.database_url else f"sqlite:///{self.home / 'millrace.db'}"

    @property
    def broker(self) -> str:
        """The address of Redis, as Celery takes it."""
        if self.broker_url:
            return self.broker_url.get_secret_value()
        return f"redis+socket://{self.home / 'redis' / 'redis.sock'}"

    @property
    def store(self) -> str:
        """The address of the object store."""
        return self.store_url or (self.home / "objects").as_uri()

    @property
    def api(self) -> str:
        """Where the API is reached, without a slash at the end."""
        return (self.api_url or f"http://{self.bind}").rstrip("/")

    @property
    def public(self) -> str:
        """Where others than our own parts reach the API, without a slash at the end."""
        return (self.public_url or self.api).rstrip("/")

    @property
    def layers(self) -> Path:
        """The folder of a worker's layers of caches."""
        return (self.home / "layers").expanduser().resolve()

    @property
    def workspaces(self) -> Path:
        """The folder of a worker's workspaces."""
        return (self.work_dir or self.home / "work").expanduser().resolve()

    @property
    def mirrors(self) -> Path:
        """The folder of a worker's mirrors of git repositories."""
        return self.home / "mirrors"

    @property
    def host(self) -> str:
        """This machine's name."""
        return socket.gethostname()


def _default(name: str) -> str:
    value = Settings.model_fields[name].default
    if value in (None, (), ""):
        return ""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def table() -> str:
    """All settings as a Markdown table: the one in the README and in docs/settings.md."""
    lines = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{_default(name)}`" if _default(name) else ""
        lines.append(f"| `MILLRACE_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The text of docs/settings.md."""
    return (
        "# Settings\n\n"
        "Made from `millrace/settings.py` by `python -m millrace.settings > docs/settings.md`; a test compares the two.\n\n"
        "Millrace reads its settings once at start, from the environment. All that is wrong with them is told together, by\n"
        "name; a name that begins with `MILLRACE_` and is no setting is wrong, too. `millrace config` prints what is in force,\n"
        "without the secrets.\n\n" + table()
    )


def for_children(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that a process started by us may see: everything but our own settings, which hold secrets."""
    return {name: value for name, value in environ.items() if not name.startswith("MILLRACE_")}


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser() for part in text.split(":") if part)


def load(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`. Raises InvalidInput that lists every wrong variable by its name."""
    prefix = "MILLRACE_"
    known = {f"{prefix}{name.upper()}": name for name in Settings.model_fields}
    given: dict[str, object] = {}
    unknown: list[FieldProblem] = []
    for variable, value in environ.items():
        if not variable.startswith(prefix):
            continue
        if variable not in known:
            unknown.append(FieldProblem(field=variable, what="is no setting"))
        elif value != "":
            given[known[variable]] = value
    try:
        settings = Settings(**given)
    except ValidationError as error:
        wrong = [FieldProblem(field=f"{prefix}{str(item['loc'][0]).upper()}", what=item["msg"]) for item in error.errors()]
        raise _wrong([*unknown, *wrong]) from error
    if unknown:
        raise _wrong(unknown)
    return settings


def _wrong(problems: list[FieldProblem]) -> InvalidInput:
    lines = "".join(f"\n  {problem.field} {problem.what}" for problem in problems)
    return InvalidInput(f"the settings are wrong:{lines}", hint="docs/settings.md lists them all.", fields=problems)


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201  # this is the command that makes the page
