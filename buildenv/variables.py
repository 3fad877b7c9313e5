"""The environment of a build's commands (CodeBuild: environment variables in build environments)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from buildenv.buildspec import Buildspec
from millrace.contract import Claim
from millrace.errors import BuildProblem
from millrace.ids import uuid_of
from millrace.vocabulary import Reason

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


def source_folder(claim: Claim) -> str:
    """Where the source lies below `/codebuild/output`, in the form that CodeBuild uses: `src<N>/src[/github.com/owner/repo]`."""
    number = int(uuid_of(claim.build_id)[:8], 16) % 1_000_000_000
    folder = f"src{number}/src"
    source = claim.settings.source
    if source.is_git and source.location and "://" in source.location:
        address = urlsplit(source.location)
        path = address.path.strip("/").removesuffix(".git")
        if address.hostname == "github.com" and path.count("/") == 1:
            folder += f"/github.com/{path}"
    return folder


def fixed(claim: Claim, *, src_dir: str, image: str, api_url: str = "") -> dict[str, str]:
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
        "CODEBUILD_INITIATOR": claim.initiator,
        "CODEBUILD_KMS_KEY_ID": settings.encryption_key or "",
        "CODEBUILD_LOG_PATH": uuid_of(claim.build_id),
        "CODEBUILD_START_TIME": str(claim.submitted_at_ms),
        "CODEBUILD_SRC_DIR": src_dir,
        "CODEBUILD_SOURCE_VERSION": settings.source_version or "",
        "CODEBUILD_SOURCE_REPO_URL": settings.source.location or "",
        "MILLRACE_BUILD_ID": claim.build_id,
        "MILLRACE_ATTEMPT": str(claim.attempt_no),
    }
    if api_url:
        values["CODEBUILD_BUILD_URL"] = f"{api_url}/v1/builds/{claim.build_id}"
    return values


def environment(claim: Claim, spec: Buildspec, given: Mapping[str, str], *, ca_bundle: Path | None) -> dict[str, str]:
    """All variables that the first command sees: the farm's, and below them the request's, the project's, the buildspec's.

    The request's and the project's are merged in the claim already. Raises BuildProblem(SECRET_UNAVAILABLE) for a reference to
    a secret, as no secret store is set up: a build never runs without a secret that it asked for.
    """
    values: dict[str, str] = {}
    if ca_bundle is not None:
        values.update(dict.fromkeys(_CA_VARIABLES, CA_INSIDE))
    references = {**spec.env.parameter_store, **spec.env.secrets_manager}
    values.update(spec.env.variables)
    for variable in claim.settings.environment.environment_variables:
        if variable.type == "PLAINTEXT":
            references.pop(variable.name, None)
            values[variable.name] = variable.value
        else:
            references[variable.name] = variable.value
    if references:
        names = ", ".join(sorted(references))
        raise BuildProblem(
            f"parameter does not exist: {names} (this farm has no secret store yet)",
            reason=Reason.SECRET_UNAVAILABLE,
            status_code="Decrypted Variables Error",
            hint="Give the value as a plain variable for now, or remove the reference.",
        )
    values.update(given)
    return values
