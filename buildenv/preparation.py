"""DOWNLOAD_SOURCE: the sources fetched, the buildspec found and understood, the environment put together, secrets and all."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from buildenv import buildspec, images, source, variables, workspace, yamltree
from buildenv.buildlog import BuildLog
from buildenv.buildspec import Buildspec, PhaseSpec
from buildenv.depot import Depot
from buildenv.engine import Image
from buildenv.git import Credential
from buildenv.mirror import Mirrors
from buildenv.redact import not_hidden
from buildenv.source import FetchedSource
from buildenv.workspace import Workspace
from millrace.contract import SOURCE_AUTH, Claim, GrantRequest, SecretReference
from millrace.errors import BuildProblem, NotFound
from millrace.project import ProjectSource
from millrace.vocabulary import PhaseType, Reason, SourceType

_BUILDSPEC: Final = "buildspec.yml"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the commands need: the buildspec, the environment of the first one, and which of it are secrets."""

    spec: Buildspec
    variables: Mapping[str, str]
    secret_names: frozenset[str]


class Preparation:
    """Of one attempt. `resolved_version` is the commit of the primary source, None before it is known and for what is not git."""

    def __init__(
        self,
        *,
        claim: Claim,
        workspace: Workspace,
        depot: Depot,
        log: BuildLog,
        git_roots: tuple[Path, ...],
        mirrors: Path | None,
        ca_bundle: Path | None,
        stop: threading.Event,
        deadline: float,
    ) -> None:
        self._claim, self._workspace, self._depot, self._log = claim, workspace, depot, log
        self._mirrors = None if mirrors is None else Mirrors(root=mirrors, project=claim.settings.project_name)
        self._git_roots, self._ca_bundle, self._stop, self._deadline = git_roots, ca_bundle, stop, deadline
        self.resolved_version: str | None = None
        self._buildspec: str | None = None

    def prepare(self, image: Image) -> Prepared:
        """Fetch and understand everything. Raises BuildProblem, InfraProblem or BuildStopped."""
        self._log.say("Waiting for DOWNLOAD_SOURCE")
        self._log.say("Phase is DOWNLOAD_SOURCE")
        self._log.say(f"CODEBUILD_SRC_DIR={self._workspace.source_inside}")
        credentials = self._credentials()
        settings = self._claim.settings
        fetched = self._fetch(
            settings.source,
            settings.source_version,
            self._workspace.source,
            credentials.get(""),
            commit=settings.source_commit,
            other=self._other_buildspec(),
        )
        self.resolved_version, self._buildspec = fetched.resolved_version, fetched.other
        ours = variables.fixed(self._claim, src_dir=self._workspace.source_inside, image=settings.environment.image)
        if self.resolved_version:
            ours["CODEBUILD_RESOLVED_SOURCE_VERSION"] = self.resolved_version
        versions = {one.source_identifier: one.source_version for one in settings.secondary_source_versions}
        for secondary in settings.secondary_sources:
            identifier = secondary.source_identifier or ""
            folder, inside = self._workspace.secondary(identifier)
            version = versions.get(identifier)
            self._log.say(f"CODEBUILD_SRC_DIR_{identifier}={inside}")
            self._fetch(secondary, version, folder, credentials.get(identifier))
            ours |= variables.of_secondary(secondary, version, inside)
        spec = self._understood()
        self._log.say("Processing environment variables")
        values, secret_names = self._resolved(spec)
        values |= ours
        if spec.env.git_credential_helper and settings.fork is None:
            self._workspace.keep_credentials([one.line() for one in credentials.values()])
            values |= variables.GIT_CREDENTIAL_HELPER
        self._select_runtimes(spec, image, values)
        self._log.say(f"Moving to directory {self._workspace.source_inside}")
        self._log.say("Registering with agent")
        self._log.say(f"Phases found in YAML: {len(spec.phases)}")
        for phase, section in spec.phases.items():
            self._log.say(f" {phase}: {len(section.commands)} commands")
        return Prepared(spec=spec, variables=values, secret_names=secret_names)

    def _credentials(self) -> dict[str, Credential]:
        """What the sources' `auth` of type SECRETS_MANAGER names, by source identifier; "" is the primary source."""
        primary = self._claim.settings.source
        wanted: dict[str, tuple[ProjectSource, str]] = {}
        for one in (primary, *self._claim.settings.secondary_sources):
            if one.is_git and one.auth is not None and one.auth.type == "SECRETS_MANAGER" and one.auth.resource:
                wanted["" if one is primary else one.source_identifier or ""] = one, one.auth.resource
        if not wanted:
            return {}
        names = {f"{SOURCE_AUTH}_{number}": identifier for number, identifier in enumerate(wanted)}
        values = self._depot.secrets(
            [
                SecretReference(name=name, type="SECRETS_MANAGER", value=wanted[identifier][1])
                for name, identifier in names.items()
            ]
        )
        found = {identifier: Credential.read(values[name], wanted[identifier][0]) for name, identifier in names.items()}
        self._log.hide([one.password for one in found.values()])
        return found

    def _fetch(
        self,
        one: ProjectSource,
        version: str | None,
        folder: Path,
        credential: Credential | None,
        *,
        commit: str | None = None,
        other: tuple[str, str] | None = None,
    ) -> FetchedSource:
        return source.fetch(
            one,
            version,
            folder,
            grant=self._depot.grant,
            download=self._depot.download,
            git_roots=self._git_roots,
            ca_bundle=self._ca_bundle,
            say=self._log.say,
            stop=self._stop,
            deadline=self._deadline,
            credential=credential,
            mirrors=self._mirrors,
            commit=commit,
            other=other,
        )

    def _other_buildspec(self) -> tuple[str, str] | None:
        """The branch whose buildspec is used, and its path; None where it is the one that is built."""
        settings = self._claim.settings
        wanted = settings.source.buildspec or _BUILDSPEC
        if settings.webhook is None or settings.webhook.buildspec_ref is None or not settings.source.is_git:
            return None
        if buildspec.looks_inline(wanted) or wanted.startswith(("s3://", "arn:")):
            return None
        return settings.webhook.buildspec_ref, wanted

    def _understood(self) -> Buildspec:
        text, where = self._read_buildspec()
        self._log.say(f"YAML location is {where}")
        spec = buildspec.parse(text, where=where)
        self._tell_about(spec)
        if spec.run_as or any(section.run_as for section in spec.phases.values()):
            self._workspace.let_all_read()
        return spec

    def _resolved(self, spec: Buildspec) -> tuple[dict[str, str], frozenset[str]]:
        """What users set, with the values of secrets, which the log hides from here on; and the names of those."""
        values, references = variables.given(self._claim, spec, ca_bundle=self._ca_bundle)
        secrets: Mapping[str, str] = {}
        if references and self._claim.settings.fork is not None:
            names = ", ".join(sorted(one.name for one in references))
            self._log.say(f"This build comes from a fork, and gets no secrets: not set are {names}")
        elif references:
            secrets = self._depot.secrets(references)
            self._log.hide(secrets.values())
            for name in not_hidden(secrets):
                self._log.say(f"Warning: {name} is too short to be hidden in the log")
        return values | dict(secrets), frozenset(secrets)

    def _read_buildspec(self) -> tuple[str | bytes, str]:
        wanted = self._claim.settings.source.buildspec or ""
        if buildspec.looks_inline(wanted):
            self._workspace.keep_buildspec(wanted)
            return wanted, f"{workspace.READONLY_INSIDE}/buildspec.yml"
        if wanted.startswith(("s3://", "arn:")):
            return self._fetch_buildspec(wanted), wanted
        if self._claim.settings.source.type is SourceType.NO_SOURCE:
            raise BuildProblem(
                "a build without a source needs its buildspec as text",
                reason=Reason.BAD_BUILDSPEC,
                status_code="YAML_FILE_ERROR",
                hint="Put the buildspec itself into source.buildspec or buildspecOverride.",
            )
        path = wanted or _BUILDSPEC
        if (other := self._other_buildspec()) is not None:
            return self._of_base(*other)
        text = self._workspace.read_source_file(path, yamltree.MAX_BYTES + 1)
        if text is None:
            at = f" at {self.resolved_version}" if self.resolved_version else ""
            raise BuildProblem(
                f"YAML file does not exist: looked for {path} in the source{at}",
                reason=Reason.BAD_BUILDSPEC,
                status_code="YAML_FILE_ERROR",
                hint="Add it, or name another path in source.buildspec.",
            )
        return text, f"{self._workspace.source_inside}/{path}"

    def _of_base(self, ref: str, path: str) -> tuple[str, str]:
        if self._buildspec is None:
            raise BuildProblem(
                f"YAML file does not exist: looked for {path} at {ref}, as the build comes from a fork",
                reason=Reason.BAD_BUILDSPEC,
                status_code="YAML_FILE_ERROR",
                hint="Add it there, or set the webhook's forkBuildspec to 'head'.",
            )
        return self._buildspec, f"{path} at {ref}"

    def _fetch_buildspec(self, address: str) -> bytes:
        name = address.removeprefix("arn:aws:s3:::").removeprefix("s3://")
        try:
            granted = self._depot.grant(GrantRequest(kind="source", name=name))
        except NotFound as error:
            raise BuildProblem(
                f"YAML file does not exist: {address}", reason=Reason.BAD_BUILDSPEC, status_code="YAML_FILE_ERROR"
            ) from error
        file = self._workspace.scratch / "buildspec.yml"
        self._depot.download(granted, file)
        with open(file, "rb") as opened:
            return opened.read(yamltree.MAX_BYTES + 1)

    def _tell_about(self, spec: Buildspec) -> None:
        """What was assumed, and what is understood but not acted on yet."""
        for warning in spec.warnings:
            self._log.say(f"Warning: buildspec {warning}")
        idle = {"reports": bool(spec.reports), "batch": spec.has_batch, "proxy": spec.proxy is not None}
        for name in (name for name, there in idle.items() if there):
            self._log.say(f"Warning: {name} in the buildspec is understood, but not acted on yet")

    def _select_runtimes(self, spec: Buildspec, image: Image, values: Mapping[str, str]) -> None:
        install = spec.phases.get(PhaseType.INSTALL, PhaseSpec())
        if not install.runtime_versions:
            self._log.say("No runtime version selected in buildspec.")
            return
        declared = images.runtimes_from_labels(image.labels)
        if declared is None:
            self._log.say("Skipping install of runtimes. Runtime version selection is not supported by this build image.")
            return
        asked = {
            name: values.get(v[1:].strip("{}"), v) if v.startswith("$") else v for name, v in install.runtime_versions.items()
        }
        chosen, problems = images.resolve_runtimes(declared, asked, image=self._claim.settings.environment.image)
        if problems:
            raise BuildProblem("; ".join(problems), reason=Reason.BAD_BUILDSPEC, status_code="YAML_FILE_ERROR")
        for name, version in chosen.items():
            self._log.say(f"Selecting '{name}' runtime version '{version}' based on manual selections...")
