"""What a project and a build are made of, in CodeBuild's own shapes and names (CodeBuild API reference, data types).

Inside we write snake_case; on the wire and in the database the names are CodeBuild's camelCase: `model_dump(by_alias=True)`.
Members that are absent stay None, so that what was not sent is not sent back.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo, field_validator, model_validator
from pydantic.alias_generators import to_camel

from millrace.ids import PROJECT_NAME
from millrace.need import GIB, Label, Need
from millrace.vocabulary import (
    ATTRIBUTE_BASED,
    COMPUTE_TYPES,
    CUSTOM_INSTANCE,
    GIT_SOURCES,
    ArtifactPackaging,
    ArtifactsType,
    SourceType,
)

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE = re.compile(
    r"(?:[a-zA-Z0-9][a-zA-Z0-9.-]*(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_VERSION = re.compile(r"[A-Za-z0-9_./+@^{}#=~-]{1,256}")
BUCKET_NAME = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*(\.\.|\.-|-\.))[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_]{1,127}")
MAX_ENV_VALUE_BYTES = 32 * 1024
MAX_ENV_TOTAL_BYTES = 128 * 1024


class Shape(BaseModel):
    """A frozen record with camelCase names on the wire; unknown members are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, hide_input_in_errors=True
    )


def _plain(name: str, text: str) -> str:
    """Refuse what PostgreSQL, JSON or a shell cannot carry."""
    if "\x00" in text:
        raise ValueError(f"{name} must not contain a NUL byte")
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise ValueError(f"{name} must not contain a lone surrogate")
    return text


Text = Annotated[str, StringConstraints(max_length=262_144)]
ProjectName = Annotated[str, StringConstraints(pattern=rf"^{PROJECT_NAME.pattern}$")]


class _Checked(Shape):
    @model_validator(mode="after")
    def _strings_are_plain(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str):
                _plain(to_camel(name), value)
        return self


class EnvironmentVariable(_Checked):
    """CodeBuild: EnvironmentVariable. `value` of the two secret types is a reference, never the secret."""

    name: str
    value: Text
    type: Literal["PLAINTEXT", "PARAMETER_STORE", "SECRETS_MANAGER"] = "PLAINTEXT"

    @field_validator("name")
    @classmethod
    def _name_is_usable(cls, name: str) -> str:
        if not ENV_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no variable name: use letters, digits and _, not starting with a digit")
        if name.startswith(("CODEBUILD_", "MILLRACE_")):
            raise ValueError(f"{name} has a reserved prefix: CODEBUILD_ and MILLRACE_ are set by the farm")
        return name

    @field_validator("value")
    @classmethod
    def _value_fits(cls, value: str) -> str:
        if len(value.encode(errors="surrogatepass")) > MAX_ENV_VALUE_BYTES:
            raise ValueError(f"is over {MAX_ENV_VALUE_BYTES} bytes")
        return value


class GitSubmodulesConfig(Shape):
    """CodeBuild: GitSubmodulesConfig."""

    fetch_submodules: bool


class SourceAuth(_Checked):
    """CodeBuild: SourceAuth. Kept and returned; credentials themselves are not read from here yet."""

    type: Literal["OAUTH", "CODECONNECTIONS", "SECRETS_MANAGER"]
    resource: Text | None = None


class BuildStatusConfig(_Checked):
    """CodeBuild: BuildStatusConfig."""

    context: Text | None = None
    target_url: Text | None = None


class ProjectSource(_Checked):
    """CodeBuild: ProjectSource. `location` of S3 is `bucket/key`, of git a clone URL, or for `GIT` a local path.

    `buildspec`: inline YAML, a path in the source, or an `arn:aws:s3:::` or `s3://` address; absent means `buildspec.yml`.
    """

    type: SourceType
    location: Text | None = None
    git_clone_depth: Annotated[int, Field(ge=0)] | None = None
    git_submodules_config: GitSubmodulesConfig | None = None
    buildspec: Text | None = None
    auth: SourceAuth | None = None
    report_build_status: bool | None = None
    build_status_config: BuildStatusConfig | None = None
    insecure_ssl: bool | None = None
    source_identifier: str | None = None

    @model_validator(mode="after")
    def _location_fits_type(self) -> Self:
        if self.type is SourceType.CODEPIPELINE:
            raise ValueError("CODEPIPELINE sources are not served: upload the source and use S3")
        if self.type is not SourceType.NO_SOURCE and not self.location:
            raise ValueError(f"location is required for a source of type {self.type}")
        if self.type is SourceType.S3 and self.location and "/" not in self.location.strip("/"):
            raise ValueError("location of an S3 source is bucket/key")
        if self.source_identifier is not None and not _IDENTIFIER.fullmatch(self.source_identifier):
            raise ValueError("sourceIdentifier takes letters, digits and _, at most 127")
        return self

    @property
    def is_git(self) -> bool:
        """True where the source is fetched by git."""
        return self.type in GIT_SOURCES


class ProjectSourceVersion(_Checked):
    """CodeBuild: ProjectSourceVersion."""

    source_identifier: str
    source_version: str

    @field_validator("source_version")
    @classmethod
    def _version_is_plain(cls, version: str) -> str:
        return check_source_version(version)


class ProjectArtifacts(_Checked):
    """CodeBuild: ProjectArtifacts. How they are named and packed; `location` is a bucket."""

    type: ArtifactsType
    location: Text | None = None
    path: Text | None = None
    namespace_type: Literal["NONE", "BUILD_ID"] | None = None
    name: Text | None = None
    packaging: ArtifactPackaging | None = None
    override_artifact_name: bool | None = None
    encryption_disabled: bool | None = None
    artifact_identifier: str | None = None
    bucket_owner_access: Literal["NONE", "READ_ONLY", "FULL"] | None = None

    @model_validator(mode="after")
    def _type_is_served(self) -> Self:
        if self.type is ArtifactsType.CODEPIPELINE:
            raise ValueError("CODEPIPELINE artifacts are not served: use S3")
        if self.type is ArtifactsType.NO_ARTIFACTS and self.encryption_disabled is not None:
            raise ValueError("artifact type NO_ARTIFACTS should have null encryptionDisabled")
        if self.artifact_identifier is not None and not _IDENTIFIER.fullmatch(self.artifact_identifier):
            raise ValueError("artifactIdentifier takes letters, digits and _, at most 127")
        if self.location is not None and not BUCKET_NAME.fullmatch(self.bucket):
            raise ValueError(f"location {self.location[:80]!r} is no bucket name: 3 to 63 of a-z, 0-9, '-' and '.', as S3 has it")
        for member in (self.path, self.name):
            if member is not None and (len(member.encode(errors="surrogatepass")) > 300 or any(ord(c) < 32 for c in member)):
                raise ValueError("path and name have at most 300 bytes, and no control characters")
        return self

    @property
    def bucket(self) -> str:
        """The bucket that `location` names, by itself or by its ARN."""
        return (self.location or "").removeprefix("arn:aws:s3:::")


class ProjectCache(_Checked):
    """CodeBuild: ProjectCache."""

    type: Literal["NO_CACHE", "S3", "LOCAL"] = "NO_CACHE"
    location: Text | None = None
    modes: tuple[Literal["LOCAL_DOCKER_LAYER_CACHE", "LOCAL_SOURCE_CACHE", "LOCAL_CUSTOM_CACHE"], ...] | None = None
    cache_namespace: Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")] | None = None


class RegistryCredential(_Checked):
    """CodeBuild: RegistryCredential."""

    credential: Text
    credential_provider: Literal["SECRETS_MANAGER"]


class ProjectFleet(_Checked):
    """CodeBuild: ProjectFleet. An ARN or a bare fleet name."""

    fleet_arn: Text | None = None


class ComputeConfiguration(_Checked):
    """CodeBuild: ComputeConfiguration. `memory` and `disk` are in GiB; `disk` and `machine_type` place nothing."""

    v_cpu: Annotated[int, Field(ge=1, le=1024)] | None = None
    memory: Annotated[int, Field(ge=1, le=32_768)] | None = None
    disk: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    machine_type: Literal["GENERAL", "NVME"] | None = None
    instance_type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,40}$")] | None = None

    def size(self) -> tuple[int, int] | None:
        """vCPU and memory in GiB. Of one that is not said, so much that there are 2 GiB to a vCPU; None where neither is."""
        if self.v_cpu is None and self.memory is None:
            return None
        return self.v_cpu or -(-(self.memory or 0) // 2), self.memory or 2 * (self.v_cpu or 0)


EnvironmentType = Literal["LINUX_CONTAINER", "ARM_CONTAINER", "LINUX_GPU_CONTAINER", "LINUX_EC2", "ARM_EC2"]


class ProjectEnvironment(_Checked):
    """CodeBuild: ProjectEnvironment, and of our own `worker_labels`: its worker must have them all (docs/placement.md).

    `compute_configuration` counts with the two compute types that need it.
    """

    type: EnvironmentType = "LINUX_CONTAINER"
    image: str
    compute_configuration: ComputeConfiguration | None = None
    compute_type: str = "BUILD_GENERAL1_SMALL"
    worker_labels: Annotated[tuple[Label, ...], Field(max_length=10)] | None = None
    environment_variables: tuple[EnvironmentVariable, ...] = ()
    privileged_mode: bool = False
    certificate: Text | None = None
    registry_credential: RegistryCredential | None = None
    image_pull_credentials_type: Literal["CODEBUILD", "SERVICE_ROLE"] = "CODEBUILD"
    fleet: ProjectFleet | None = None

    @field_validator("image")
    @classmethod
    def _image_is_a_reference(cls, image: str) -> str:
        return check_image(image)

    @field_validator("compute_type")
    @classmethod
    def _compute_type_is_known(cls, compute_type: str, info: ValidationInfo) -> str:
        known = (*COMPUTE_TYPES, ATTRIBUTE_BASED, CUSTOM_INSTANCE)
        if compute_type not in known:
            raise ValueError(f"unknown compute type {compute_type!r}; known: {', '.join(known)}")
        if "compute_configuration" in info.data:  # else it is wrong itself
            given: ComputeConfiguration | None = info.data["compute_configuration"]
            if compute_type == ATTRIBUTE_BASED and (given is None or given.size() is None):
                raise ValueError(f"{compute_type} needs a computeConfiguration with vCpu, memory (in GiB), or both")
            if compute_type == CUSTOM_INSTANCE and (given is None or given.instance_type is None):
                raise ValueError(f"{compute_type} needs a computeConfiguration with instanceType")
        return compute_type

    @field_validator("environment_variables")
    @classmethod
    def _variables_fit(cls, variables: tuple[EnvironmentVariable, ...]) -> tuple[EnvironmentVariable, ...]:
        if sum(len(v.name) + len(v.value.encode(errors="surrogatepass")) for v in variables) > MAX_ENV_TOTAL_BYTES:
            raise ValueError(f"together are over {MAX_ENV_TOTAL_BYTES} bytes")
        return variables

    @property
    def need(self) -> Need:
        """What a build takes of its worker: by its compute type, or what is said in the configuration of the two that need one.

        An instance type is a label, `instance-type=NAME`; without a size beside it, it takes as much as the smallest type.
        """
        labels = set(self.worker_labels or ())
        cpus, memory = COMPUTE_TYPES.get(self.compute_type, COMPUTE_TYPES["BUILD_GENERAL1_SMALL"])
        if self.compute_type in (ATTRIBUTE_BASED, CUSTOM_INSTANCE) and self.compute_configuration is not None:
            if (size := self.compute_configuration.size()) is not None:
                cpus, memory = size[0], size[1] * GIB
            if self.compute_type == CUSTOM_INSTANCE:
                labels.add(f"instance-type={self.compute_configuration.instance_type}")
        return Need(cpu_millis=round(cpus * 1000), memory_bytes=memory, labels=frozenset(labels))


def check_image(image: str) -> str:
    """`image` if it is an image reference, else ValueError (Docker: image reference grammar)."""
    if len(image) > 1024 or not _IMAGE.fullmatch(image):
        raise ValueError(f"{image[:80]!r} is no image reference: use [registry/]name[:tag][@sha256:digest], in lower case")
    return image


def check_source_version(version: str) -> str:
    """`version` if git can take it as a branch, tag, commit or `pr/N` without reading it as an option, else ValueError."""
    if not _VERSION.fullmatch(version) or version.startswith("-") or ".." in version or "@{" in version:
        raise ValueError(f"{version[:80]!r} is no source version: give a branch, tag, commit id or pr/NUMBER")
    if re.fullmatch(r"[0-9a-f]{39}|[0-9a-f]{41}", version):
        raise ValueError(f"{version!r} looks like a commit id with {len(version)} digits; a full one has 40")
    return version


class CloudWatchLogsConfig(_Checked):
    """CodeBuild: CloudWatchLogsConfig."""

    status: Literal["ENABLED", "DISABLED"]
    group_name: Text | None = None
    stream_name: Text | None = None


class S3LogsConfig(_Checked):
    """CodeBuild: S3LogsConfig."""

    status: Literal["ENABLED", "DISABLED"]
    location: Text | None = None
    encryption_disabled: bool | None = None


class LogsConfig(Shape):
    """CodeBuild: LogsConfig."""

    cloud_watch_logs: CloudWatchLogsConfig | None = None
    s3_logs: S3LogsConfig | None = None


class Tag(_Checked):
    """CodeBuild: Tag."""

    key: Annotated[str, StringConstraints(min_length=1, max_length=127)]
    value: Annotated[str, StringConstraints(max_length=255)]


def _told_apart(what: str, identifiers: Sequence[str | None]) -> None:
    """Raises ValueError where one of them is missing, or comes twice."""
    if not all(identifiers):
        raise ValueError(f"each of them needs its own {what}")
    twice = sorted({str(name) for name in identifiers if identifiers.count(name) > 1})
    if twice:
        raise ValueError(f"the {what} {', '.join(twice)} comes twice")


class _Sources(_Checked):
    """What projects and builds have in common: their sources and artifacts, which must be told apart and fit together."""

    source: ProjectSource
    secondary_sources: Annotated[tuple[ProjectSource, ...], Field(max_length=12)] = ()
    source_version: str | None = None
    secondary_source_versions: Annotated[tuple[ProjectSourceVersion, ...], Field(max_length=12)] = ()
    artifacts: ProjectArtifacts
    secondary_artifacts: Annotated[tuple[ProjectArtifacts, ...], Field(max_length=12)] = ()

    @field_validator("source")
    @classmethod
    def _primary_has_no_identifier(cls, source: ProjectSource) -> ProjectSource:
        if source.source_identifier is not None:
            raise ValueError("sourceIdentifier is for secondary sources; the primary one has none")
        return source

    @field_validator("secondary_sources")
    @classmethod
    def _sources_are_told_apart(cls, sources: tuple[ProjectSource, ...]) -> tuple[ProjectSource, ...]:
        _told_apart("sourceIdentifier", [one.source_identifier for one in sources])
        return sources

    @field_validator("secondary_artifacts")
    @classmethod
    def _artifacts_are_told_apart(cls, artifacts: tuple[ProjectArtifacts, ...]) -> tuple[ProjectArtifacts, ...]:
        _told_apart("artifactIdentifier", [one.artifact_identifier for one in artifacts])
        return artifacts

    @field_validator("secondary_source_versions")
    @classmethod
    def _versions_fit(cls, versions: tuple[ProjectSourceVersion, ...], info: ValidationInfo) -> tuple[ProjectSourceVersion, ...]:
        _told_apart("sourceIdentifier", [one.source_identifier for one in versions])
        if "secondary_sources" in info.data:  # else they are wrong themselves
            known = {one.source_identifier for one in info.data["secondary_sources"]}
            unknown = sorted({one.source_identifier for one in versions} - known)
            if unknown:
                raise ValueError(f"{', '.join(unknown)} is the sourceIdentifier of none of secondarySources")
        return versions


class ProjectFarm(_Checked):
    """What CodeBuild does not have, below a project's `millrace`: its place among others, and what the farm does by itself.

    `priority` goes before all shares, `weight` is the project's share. `cancelSuperseded`: a new build of a branch or pull
    request stops the older ones. `infraRetry`: whether a build that our side failed is tried again: `always`, `never`, or only
    where none of its commands had begun (`before_commands`).
    """

    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    weight: Annotated[int, Field(ge=1, le=100)] = 1
    cancel_superseded: bool = False
    infra_retry: Literal["always", "before_commands", "never"] = "always"


class ProjectSettings(_Sources):
    """What a user says of a project (CodeBuild: CreateProject). The farm adds its arn and times."""

    name: ProjectName
    description: Annotated[str, StringConstraints(max_length=255)] | None = None
    cache: ProjectCache = ProjectCache()
    environment: ProjectEnvironment
    service_role: Text | None = None
    timeout_in_minutes: Annotated[int, Field(ge=1, le=2160)] = 60
    queued_timeout_in_minutes: Annotated[int, Field(ge=1, le=480)] = 480
    encryption_key: Text | None = None
    tags: Annotated[tuple[Tag, ...], Field(max_length=50)] = ()
    badge_enabled: bool | None = None
    logs_config: LogsConfig | None = None
    concurrent_build_limit: Annotated[int, Field(ge=1)] | None = None
    auto_retry_limit: Annotated[int, Field(ge=0, le=10)] | None = None
    millrace: ProjectFarm = ProjectFarm()

    @field_validator("source_version")
    @classmethod
    def _version_is_plain(cls, version: str | None) -> str | None:
        return check_source_version(version) if version else version


class WebhookCause(Shape):
    """What happened at a git server that a build is of. The names are the server's word: any text may stand in them.

    `buildspec_ref` is the branch whose buildspec is used, where that is not the one that is built.
    """

    provider: Literal["github", "bitbucket", "gitlab", "git"]
    event: str
    trigger: str
    head_ref: str | None = None
    base_ref: str | None = None
    commit: str | None = None
    prev_commit: str | None = None
    merge_commit: str | None = None
    actor_account_id: str | None = None
    pull_request: int | None = None
    from_fork: bool = False
    buildspec_ref: str | None = None

    def variables(self) -> dict[str, str]:
        """What the farm sets for a build that a webhook started. The values are whatever somebody named a branch."""
        values = {
            "EVENT": self.event,
            "TRIGGER": self.trigger,
            "HEAD_REF": self.head_ref,
            "BASE_REF": self.base_ref,
            "ACTOR_ACCOUNT_ID": self.actor_account_id,
            "PREV_COMMIT": self.prev_commit,
            "MERGE_COMMIT": self.merge_commit,
        }
        return {f"CODEBUILD_WEBHOOK_{name}": value for name, value in values.items() if value is not None}


class BuildSettings(_Sources):
    """The effective settings of one build: its project's, with the request's overrides already applied."""

    project_name: ProjectName
    cache: ProjectCache = ProjectCache()
    environment: ProjectEnvironment
    service_role: Text | None = None
    timeout_in_minutes: int = 60
    queued_timeout_in_minutes: int = 480
    encryption_key: Text | None = None
    logs_config: LogsConfig | None = None
    debug_session_enabled: bool = False
    auto_retry_limit: Annotated[int, Field(ge=0, le=10)] | None = None
    source_commit: str | None = None
    """What git checks out of the primary source, whatever `source_version` has come to mean: the commit of the build retried, or
    of the push or pull request."""
    webhook: WebhookCause | None = None

    @property
    def fork(self) -> str | None:
        """Where an untrusted build comes from: its caches are for builds from there alone. None: it is trusted."""
        if self.webhook is None or not self.webhook.from_fork:
            return None
        return f"pr/{self.webhook.pull_request}"


class BuildOverrides(_Checked):
    """What one request changes of its project (CodeBuild: StartBuild). Variables are merged by name; all else replaces."""

    project_name: ProjectName
    source_version: str | None = None
    source_type_override: SourceType | None = None
    source_location_override: Text | None = None
    source_auth_override: SourceAuth | None = None
    git_clone_depth_override: Annotated[int, Field(ge=0)] | None = None
    git_submodules_config_override: GitSubmodulesConfig | None = None
    buildspec_override: Text | None = None
    insecure_ssl_override: bool | None = None
    report_build_status_override: bool | None = None
    build_status_config_override: BuildStatusConfig | None = None
    secondary_sources_override: Annotated[tuple[ProjectSource, ...], Field(max_length=12)] | None = None
    secondary_sources_version_override: Annotated[tuple[ProjectSourceVersion, ...], Field(max_length=12)] | None = None
    artifacts_override: ProjectArtifacts | None = None
    secondary_artifacts_override: Annotated[tuple[ProjectArtifacts, ...], Field(max_length=12)] | None = None
    environment_variables_override: tuple[EnvironmentVariable, ...] = ()
    environment_type_override: EnvironmentType | None = None
    image_override: str | None = None
    compute_type_override: str | None = None
    compute_configuration_override: ComputeConfiguration | None = None
    worker_labels_override: Annotated[tuple[Label, ...], Field(max_length=10)] | None = None
    certificate_override: Text | None = None
    privileged_mode_override: bool | None = None
    registry_credential_override: RegistryCredential | None = None
    image_pull_credentials_type_override: Literal["CODEBUILD", "SERVICE_ROLE"] | None = None
    fleet_override: ProjectFleet | None = None
    cache_override: ProjectCache | None = None
    service_role_override: Text | None = None
    encryption_key_override: Text | None = None
    logs_config_override: LogsConfig | None = None
    timeout_in_minutes_override: Annotated[int, Field(ge=1, le=2160)] | None = None
    queued_timeout_in_minutes_override: Annotated[int, Field(ge=1, le=480)] | None = None
    debug_session_enabled: bool | None = None
    auto_retry_limit_override: Annotated[int, Field(ge=0, le=10)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    idempotency_token: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None

    @field_validator("source_version")
    @classmethod
    def _version_is_plain(cls, version: str | None) -> str | None:
        return check_source_version(version) if version else version

    @field_validator("image_override")
    @classmethod
    def _image_is_a_reference(cls, image: str | None) -> str | None:
        return check_image(image) if image is not None else None


class RetryWish(_Checked):
    """What may be said of a retry (CodeBuild: RetryBuild). What is built is what was built before."""

    idempotency_token: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None


_OF_SOURCE = {
    "type": "source_type_override",
    "location": "source_location_override",
    "auth": "source_auth_override",
    "git_clone_depth": "git_clone_depth_override",
    "git_submodules_config": "git_submodules_config_override",
    "buildspec": "buildspec_override",
    "insecure_ssl": "insecure_ssl_override",
    "report_build_status": "report_build_status_override",
    "build_status_config": "build_status_config_override",
}
_OF_ENVIRONMENT = {
    "type": "environment_type_override",
    "image": "image_override",
    "compute_type": "compute_type_override",
    "compute_configuration": "compute_configuration_override",
    "worker_labels": "worker_labels_override",
    "certificate": "certificate_override",
    "privileged_mode": "privileged_mode_override",
    "registry_credential": "registry_credential_override",
    "image_pull_credentials_type": "image_pull_credentials_type_override",
    "fleet": "fleet_override",
}
_OF_BUILD = {
    "secondary_sources": "secondary_sources_override",
    "secondary_source_versions": "secondary_sources_version_override",
    "artifacts": "artifacts_override",
    "secondary_artifacts": "secondary_artifacts_override",
    "cache": "cache_override",
    "service_role": "service_role_override",
    "encryption_key": "encryption_key_override",
    "logs_config": "logs_config_override",
    "timeout_in_minutes": "timeout_in_minutes_override",
    "queued_timeout_in_minutes": "queued_timeout_in_minutes_override",
    "auto_retry_limit": "auto_retry_limit_override",
}
"""Which override stands for which member."""


def _overridden(shape: Shape, wanted: BuildOverrides, table: Mapping[str, str]) -> dict[str, Any]:
    """The members of `shape` as they are, with what the request says of those in `table`."""
    members = {name: getattr(shape, name) for name in type(shape).model_fields}
    said = {name: getattr(wanted, override) for name, override in table.items()}
    return members | {name: value for name, value in said.items() if value is not None}


def _still_meant(project: ProjectSettings, sources: Sequence[ProjectSource]) -> tuple[ProjectSourceVersion, ...]:
    """The project's versions of those secondary sources that `sources` leave where they are."""
    places = {(one.source_identifier, one.type, one.location) for one in sources}
    same = {
        one.source_identifier for one in project.secondary_sources if (one.source_identifier, one.type, one.location) in places
    }
    return tuple(one for one in project.secondary_source_versions if one.source_identifier in same)


def effective(project: ProjectSettings, wanted: BuildOverrides) -> BuildSettings:
    """The settings that a build of `project` runs with. Raises pydantic's ValidationError where an override does not fit.

    CodeBuild: StartBuild; variables are merged by name, and a changed source drops the project's version of it.
    """
    moved = wanted.source_type_override is not None or wanted.source_location_override is not None
    variables = {v.name: v for v in project.environment.environment_variables}
    variables.update((v.name, v) for v in wanted.environment_variables_override)
    environment = _overridden(project.environment, wanted, _OF_ENVIRONMENT)
    kept = {name: getattr(project, name) for name in BuildSettings.model_fields if name in ProjectSettings.model_fields}
    said = {name: getattr(wanted, override) for name, override in _OF_BUILD.items()}
    if wanted.secondary_sources_override is not None and wanted.secondary_sources_version_override is None:
        said["secondary_source_versions"] = _still_meant(project, wanted.secondary_sources_override)
    return BuildSettings.model_validate(
        kept
        | {name: value for name, value in said.items() if value is not None}
        | {
            "project_name": project.name,
            "source": ProjectSource.model_validate(_overridden(project.source, wanted, _OF_SOURCE)),
            "source_version": wanted.source_version or (None if moved else project.source_version),
            "environment": ProjectEnvironment.model_validate(environment | {"environment_variables": tuple(variables.values())}),
            "debug_session_enabled": bool(wanted.debug_session_enabled),
        }
    )
