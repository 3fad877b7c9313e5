"""The environment of a build's commands (CodeBuild: environment variables in build environments)."""

from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from buildenv.buildspec import Buildspec
from millrace.contract import Claim, SecretReference
from millrace.ids import container_name, uuid_of
from millrace.project import ProjectSource
from millrace.vocabulary import SourceType

CA_INSIDE: Final = "/codebuild/ca-certificates.crt"
"""Not over the image's own file, which a build may want to renew."""
_CA_VARIABLES: Final = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
)


GIT_CREDENTIAL_HELPER: Final = {
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "credential.helper",
    "GIT_CONFIG_VALUE_0": "/codebuild/readonly/bin/git-credential-millrace",
}
"""How git inside is told of its helper, without a file of the user's being touched (git-config: GIT_CONFIG_COUNT)."""


def source_folder(build_id: str, source: ProjectSource, number: int = 0) -> str:
    """Where a source lies below `/codebuild/output`, in the form that CodeBuild uses: `src<N>/src[/github.com/owner/repo]`.

    `number` is 0 for the primary source, and counts the secondary ones.
    """
    folder = f"src{(int(uuid_of(build_id)[:8], 16) + number) % 1_000_000_000}/src"
    if source.is_git and source.location and "://" in source.location:
        address = urlsplit(source.location)
        path = address.path.strip("/").removesuffix(".git")
        if address.hostname == "github.com" and path.count("/") == 1:
            folder += f"/github.com/{path}"
    return folder


def repo_url(source: ProjectSource) -> str:
    """CODEBUILD_SOURCE_REPO_URL: the clone URL, or `s3://bucket/key`."""
    location = source.location or ""
    return f"s3://{location.removeprefix('arn:aws:s3:::').removeprefix('s3://')}" if source.type is SourceType.S3 else location


def fixed(claim: Claim, *, src_dir: str, image: str) -> dict[str, str]:
    """What the farm sets, and the user may not."""
    settings = claim.settings
    values = {
        "HOME": "/root",
        "AWS_REGION": claim.region,
        "AWS_DEFAULT_REGION": claim.region,
        "CODEBUILD_CI": "true",
        "CODEBUILD_BUILD_ID": claim.build_id,
        "CODEBUILD_BUILD_ARN": claim.build_arn,
        "CODEBUILD_BUILD_NUMBER": str(claim.build_number),
        "CODEBUILD_BUILD_IMAGE": image,
        "CODEBUILD_BUILD_SUCCEEDING": "1",
        "CODEBUILD_BUILD_URL": claim.build_url,
        "CODEBUILD_CONTAINER_NAME": "default",
        "CODEBUILD_INITIATOR": claim.initiator,
        "CODEBUILD_KMS_KEY_ID": settings.encryption_key or "",
        "CODEBUILD_LAST_EXIT": "0",
        "CODEBUILD_LOG_PATH": uuid_of(claim.build_id),
        "CODEBUILD_START_TIME": str(claim.submitted_at_ms),
        "CODEBUILD_SRC_DIR": src_dir,
        "CODEBUILD_SOURCE_VERSION": settings.source_version or "",
        "CODEBUILD_SOURCE_REPO_URL": repo_url(settings.source),
        "MILLRACE_BUILD_ID": claim.build_id,
        "MILLRACE_ATTEMPT": str(claim.attempt_no),
        "MILLRACE_CONTAINER": container_name(claim.build_id, claim.attempt_no),
    }
    if settings.debug_session_enabled:
        values["MILLRACE_DEBUG_SESSION"] = "1"
    return values if settings.webhook is None else values | settings.webhook.variables()


def of_secondary(source: ProjectSource, version: str | None, src_dir: str) -> dict[str, str]:
    """What the farm sets for one secondary source; its identifier keeps its case."""
    identifier = source.source_identifier or ""
    return {
        f"CODEBUILD_SRC_DIR_{identifier}": src_dir,
        f"CODEBUILD_SOURCE_VERSION_{identifier}": version or "",
        f"CODEBUILD_SOURCE_REPO_URL_{identifier}": repo_url(source),
    }


def given(claim: Claim, spec: Buildspec, *, ca_bundle: Path | None) -> tuple[dict[str, str], tuple[SecretReference, ...]]:
    """What users set: plain values, and the references whose values are secrets.

    Of one name the request counts, then the project, then the buildspec (CodeBuild: environment variables in build
    environments); the first two are merged in the claim already.
    """
    values: dict[str, str] = dict.fromkeys(_CA_VARIABLES, CA_INSIDE) if ca_bundle is not None else {}
    references: dict[str, SecretReference] = {}
    for name, value in spec.env.parameter_store.items():
        references[name] = SecretReference(name=name, type="PARAMETER_STORE", value=value)
    for name, value in spec.env.secrets_manager.items():
        references[name] = SecretReference(name=name, type="SECRETS_MANAGER", value=value)
    values.update(spec.env.variables)
    for variable in claim.settings.environment.environment_variables:
        values.pop(variable.name, None)
        references.pop(variable.name, None)
        if variable.type == "PLAINTEXT":
            values[variable.name] = variable.value
        else:
            references[variable.name] = SecretReference(name=variable.name, type=variable.type, value=variable.value)
    return {name: value for name, value in values.items() if name not in references}, tuple(references.values())
