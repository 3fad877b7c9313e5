"""The shapes of projects and builds: what they take, what they refuse, and how overrides are applied."""

from typing import Any

import botocore.session
import pytest
from pydantic import ValidationError

from millrace.project import BuildOverrides, ProjectSettings, check_image, check_source_version, effective


def a_project(**changes: Any) -> dict[str, Any]:
    return {
        "name": "demo",
        "source": {"type": "GITHUB", "location": "https://git.example/a/b.git", "buildspec": "ci/spec.yml"},
        "sourceVersion": "main",
        "artifacts": {"type": "S3", "packaging": "ZIP"},
        "environment": {
            "type": "LINUX_CONTAINER",
            "image": "millrace/standard:latest",
            "computeType": "BUILD_GENERAL1_SMALL",
            "environmentVariables": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
        },
        **changes,
    }


def wrong(data: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        ProjectSettings.model_validate(data)
    return str(caught.value)


def test_a_project_comes_back_as_it_was_sent() -> None:
    data = a_project()
    dumped = ProjectSettings.model_validate(data).model_dump(mode="json", by_alias=True, exclude_none=True)
    for member in ("name", "source", "sourceVersion", "artifacts"):
        assert dumped[member] == data[member]
    assert dumped["timeoutInMinutes"] == 60
    assert dumped["queuedTimeoutInMinutes"] == 480
    assert dumped["cache"] == {"type": "NO_CACHE"}


def test_an_unknown_member_is_refused_by_name() -> None:
    assert "sorce" in wrong(a_project(sorce={}))


@pytest.mark.parametrize("name", ["", "a", "-lead", "a/b", "../x", "x" * 151, "naïve", "a\n"])
def test_a_project_name_outside_the_grammar_is_refused(name: str) -> None:
    assert "name" in wrong(a_project(name=name))


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ({"type": "GITHUB"}, "location is required"),
        ({"type": "S3", "location": "bucket-only"}, "bucket/key"),
        ({"type": "CODEPIPELINE"}, "not served"),
        ({"type": "SVN", "location": "x"}, "Input should be"),
        ({"type": "GIT", "location": "a\x00b"}, "NUL"),
    ],
)
def test_a_source_that_cannot_work_is_refused(source: dict[str, Any], word: str) -> None:
    assert word in wrong(a_project(source=source))


@pytest.mark.parametrize("name", ["1A", "A-B", "A=B", "", "CODEBUILD_X", "MILLRACE_X", "A\x00"])
def test_a_variable_name_that_no_shell_can_carry_is_refused(name: str) -> None:
    environment = a_project()["environment"] | {"environmentVariables": [{"name": name, "value": "x"}]}
    assert "environmentVariables" in wrong(a_project(environment=environment))


def test_variables_over_the_limit_are_refused() -> None:
    environment = a_project()["environment"]
    environment["environmentVariables"] = [{"name": "A", "value": "x" * 40_000}]
    assert "32768 bytes" in wrong(a_project(environment=environment))
    environment["environmentVariables"] = [{"name": f"A{n}", "value": "x" * 30_000} for n in range(5)]
    assert "131072 bytes" in wrong(a_project(environment=environment))


@pytest.mark.parametrize(
    "image", ["ubuntu", "a/b:1", "localhost:5000/x/y:tag", "aws/codebuild/standard:7.0", "x@sha256:" + "0" * 64]
)
def test_an_image_reference_is_taken(image: str) -> None:
    assert check_image(image) == image


@pytest.mark.parametrize("image", ["ubuntu:", "UPPER", "a b", "-v", "", "x" * 2000, "x@sha256:12", "a\n"])
def test_what_is_no_image_reference_is_refused(image: str) -> None:
    with pytest.raises(ValueError, match="image reference"):
        check_image(image)


@pytest.mark.parametrize(
    "version", ["main", "v1.2", "pr/25", "refs/heads/x", "feature/a-b", "0" * 40, "refs/heads/b^{" + "0" * 40 + "}"]
)
def test_a_source_version_is_taken(version: str) -> None:
    assert check_source_version(version) == version


@pytest.mark.parametrize("version", ["--upload-pack=x", "a..b", "@{1}", "x" * 300, "0" * 39, "0" * 41, "a b", "$(x)", "a\n"])
def test_a_source_version_that_git_could_misread_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r"source version|digits"):
        check_source_version(version)


def test_overrides_win_and_variables_merge_by_name() -> None:
    project = ProjectSettings.model_validate(a_project())
    wanted = BuildOverrides.model_validate(
        {
            "projectName": "demo",
            "environmentVariablesOverride": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
            "imageOverride": "other:1",
            "timeoutInMinutesOverride": 7,
            "buildspecOverride": "x.yml",
        }
    )
    settings = effective(project, wanted)
    assert {v.name: v.value for v in settings.environment.environment_variables} == {"A": "1", "B": "3", "C": "4"}
    assert settings.environment.image == "other:1"
    assert settings.timeout_in_minutes == 7
    assert settings.source.buildspec == "x.yml"
    assert settings.source_version == "main"


def test_a_moved_source_drops_the_projects_version() -> None:
    project = ProjectSettings.model_validate(a_project())
    wanted = BuildOverrides.model_validate({"projectName": "demo", "sourceLocationOverride": "https://git.example/c/d.git"})
    assert effective(project, wanted).source_version is None


def test_a_moved_secondary_source_drops_its_version_and_no_other() -> None:
    def source(name: str, location: str) -> dict[str, str]:
        return {"type": "GITHUB", "location": f"https://git.example/{location}.git", "sourceIdentifier": name}

    versions = [{"sourceIdentifier": name, "sourceVersion": "v1"} for name in ("one", "two", "three")]
    sources = [source("one", "a"), source("two", "b"), source("three", "c")]
    project = ProjectSettings.model_validate(a_project(secondarySources=sources, secondarySourceVersions=versions))
    moved = [source("one", "a"), source("two", "elsewhere")]
    wanted = BuildOverrides.model_validate({"projectName": "demo", "secondarySourcesOverride": moved})
    assert [one.source_identifier for one in effective(project, wanted).secondary_source_versions] == ["one"]
    assert len(effective(project, BuildOverrides(project_name="demo")).secondary_source_versions) == 3


def test_an_override_that_does_not_fit_its_project_is_refused() -> None:
    project = ProjectSettings.model_validate(a_project(source={"type": "NO_SOURCE", "buildspec": "version: 0.2"}))
    wanted = BuildOverrides.model_validate({"projectName": "demo", "sourceTypeOverride": "GIT"})
    with pytest.raises(ValidationError, match="location is required"):
        effective(project, wanted)


_NOT_SERVED = {"hostKernelOverride": "no fleet has a choice of kernels"}


def test_every_member_of_start_build_is_served_or_named_with_its_reason() -> None:
    model = botocore.session.get_session().get_service_model("codebuild").operation_model("StartBuild").input_shape
    ours = {field.alias or name for name, field in BuildOverrides.model_fields.items()}
    assert set(model.members) - ours == set(_NOT_SERVED)
    assert ours - set(model.members) == {"priority", "computeConfigurationOverride", "workerLabelsOverride"}


def test_every_override_changes_its_member() -> None:
    project = ProjectSettings.model_validate(a_project())
    wanted = {
        "sourceTypeOverride": "GITHUB",
        "sourceLocationOverride": "https://git.example/x.git",
        "sourceAuthOverride": {"type": "SECRETS_MANAGER", "resource": "r"},
        "gitCloneDepthOverride": 3,
        "gitSubmodulesConfigOverride": {"fetchSubmodules": True},
        "buildspecOverride": "b.yml",
        "insecureSslOverride": True,
        "reportBuildStatusOverride": True,
        "buildStatusConfigOverride": {"context": "c"},
        "environmentTypeOverride": "ARM_CONTAINER",
        "imageOverride": "i:2",
        "computeTypeOverride": "BUILD_GENERAL1_LARGE",
        "certificateOverride": "cert",
        "privilegedModeOverride": True,
        "registryCredentialOverride": {"credential": "c", "credentialProvider": "SECRETS_MANAGER"},
        "imagePullCredentialsTypeOverride": "SERVICE_ROLE",
        "fleetOverride": {"fleetArn": "big"},
        "secondarySourcesOverride": [{"type": "S3", "location": "b/k", "sourceIdentifier": "two"}],
        "secondarySourcesVersionOverride": [{"sourceIdentifier": "two", "sourceVersion": "v"}],
        "artifactsOverride": {"type": "NO_ARTIFACTS"},
        "secondaryArtifactsOverride": [{"type": "S3", "artifactIdentifier": "more"}],
        "cacheOverride": {"type": "S3"},
        "serviceRoleOverride": "role",
        "encryptionKeyOverride": "key",
        "logsConfigOverride": {"s3Logs": {"status": "DISABLED"}},
        "timeoutInMinutesOverride": 5,
        "queuedTimeoutInMinutesOverride": 6,
        "autoRetryLimitOverride": 2,
    }
    got = effective(project, BuildOverrides.model_validate({"projectName": "demo", **wanted, "debugSessionEnabled": True}))
    shape = got.model_dump(mode="json", by_alias=True, exclude_none=True)
    places = {"sourceType": ("source", "type"), "sourceLocation": ("source", "location"), "sourceAuth": ("source", "auth")} | {
        "environmentType": ("environment", "type"),
        "secondarySourcesVersion": ("", "secondarySourceVersions"),
    }
    for name, value in wanted.items():
        member = name.removesuffix("Override")
        holder, inner = places.get(member, ("", member))
        holders = [shape[holder]] if holder else [shape, shape["source"], shape["environment"]]
        assert any(one.get(inner) == value for one in holders), name
    assert shape["debugSessionEnabled"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"secondarySources": [{"type": "S3", "location": "b/k"}]},
            "secondarySources.*each of them needs its own sourceIdentifier",
        ),
        (
            {"secondarySources": [{"type": "S3", "location": "b/k", "sourceIdentifier": "a"}] * 2},
            "secondarySources.*sourceIdentifier a comes twice",
        ),
        ({"secondaryArtifacts": [{"type": "S3"}]}, "secondaryArtifacts.*each of them needs its own artifactIdentifier"),
        ({"source": {"type": "S3", "location": "b/k", "sourceIdentifier": "a"}}, "source.*the primary one has none"),
        ({"artifacts": {"type": "S3", "location": "a..b"}}, "is no bucket name"),
        ({"secondaryArtifacts": [{"type": "S3", "artifactIdentifier": "a b"}]}, "artifactIdentifier takes letters"),
        ({"secondarySourceVersions": [{"sourceIdentifier": "a", "sourceVersion": "v"}]}, "none of secondarySources"),
        ({"secondarySourceVersions": [{"sourceIdentifier": "a", "sourceVersion": "--x"}]}, "no source version"),
    ],
)
def test_secondary_members_must_be_told_apart(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        ProjectSettings.model_validate(a_project(**changes))
