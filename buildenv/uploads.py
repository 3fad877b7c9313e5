"""UPLOAD_ARTIFACTS: the primary artifact and the secondary ones, a zip each or file by file, into the attempt's staging place."""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from buildenv import artifacts
from buildenv.artifacts import Outside
from buildenv.buildspec import ArtifactsSpec, Buildspec
from buildenv.depot import Depot
from millrace.contract import ArtifactReport, GrantRequest
from millrace.errors import BuildProblem
from millrace.project import BuildSettings, ProjectArtifacts
from millrace.vocabulary import ArtifactPackaging, ArtifactsType, Reason

_AT_ONCE: Final = 4
_UNPACKED_FILES: Final = 20_000
"""Each is a record and an object of its own; more belong into a zip."""
_VARIABLE: Final = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ArtifactSet:
    """The primary artifact (`identifier` None) or a secondary one: what to find, and what to call it.

    `set_name` is the buildspec's own name for it, where the project lets it have one.
    """

    spec: ArtifactsSpec
    name: str
    whole: bool
    identifier: str | None
    set_name: str | None


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`text` with `$NAME` and `${NAME}` replaced; a name that is not known stays as it is, so that the log shows it."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), text)


def sets(
    spec: Buildspec,
    settings: BuildSettings,
    evaluate: Callable[[str], str | None],
    variables: Mapping[str, str],
    say: Say,
) -> list[ArtifactSet]:
    """What project and buildspec together want kept. Raises BuildProblem where the buildspec leaves out what is wanted."""
    found = []
    wanted = settings.artifacts
    if wanted.type is ArtifactsType.S3:
        if spec.artifacts is None:
            say("No artifacts section in the buildspec; nothing is uploaded")
        elif spec.artifacts.files:
            found.append(_set(spec.artifacts, wanted, None, settings, evaluate, variables))
    for secondary in settings.secondary_artifacts:
        if secondary.type is not ArtifactsType.S3:
            continue
        identifier = secondary.artifact_identifier or ""
        part = spec.artifacts.secondary.get(identifier) if spec.artifacts else None
        if part is None:
            raise artifacts.nothing_found(f"the buildspec has no secondary artifact {identifier!r}")
        found.append(_set(part, secondary, identifier, settings, evaluate, variables))
    known = {secondary.artifact_identifier for secondary in settings.secondary_artifacts}
    for identifier in spec.artifacts.secondary if spec.artifacts else ():
        if identifier not in known:
            say(f"Skipping secondary artifact {identifier}: the project has none of that artifactIdentifier")
    return found


def _set(
    spec: ArtifactsSpec,
    wanted: ProjectArtifacts,
    identifier: str | None,
    settings: BuildSettings,
    evaluate: Callable[[str], str | None],
    variables: Mapping[str, str],
) -> ArtifactSet:
    set_name = None
    if wanted.override_artifact_name and spec.name:
        set_name = evaluate(spec.name)
        if not set_name:
            raise BuildProblem(
                f"the artifact's name {spec.name!r} cannot be made out by the shell",
                reason=Reason.ARTIFACTS_NOT_FOUND,
                hint="The log has what its commands said.",
            )
        artifacts.check_name(set_name)
    name = (set_name or wanted.name or "").strip("/") or identifier or settings.project_name
    expanded = replace(
        spec,
        files=tuple(expand(pattern, variables) for pattern in spec.files),
        exclude_paths=tuple(expand(pattern, variables) for pattern in spec.exclude_paths),
        base_directory=expand(spec.base_directory, variables) if spec.base_directory is not None else None,
        s3_prefix=expand(spec.s3_prefix, variables) if spec.s3_prefix is not None else None,
    )
    whole = wanted.packaging is ArtifactPackaging.ZIP
    return ArtifactSet(spec=expanded, name=name, whole=whole, identifier=identifier, set_name=set_name)


@dataclass(frozen=True, kw_only=True)
class Uploader:
    """Packs and sends sets. `check` is asked before each object, and raises to end it all."""

    depot: Depot
    source: Path
    scratch: Path
    outside: Outside
    max_bytes: int
    part_bytes: int
    say: Say
    check: Callable[[], None]

    def upload(self, one: ArtifactSet) -> list[ArtifactReport]:
        """Find, pack and send one set. Raises BuildProblem and InfraProblem."""
        found = artifacts.collect(one.spec, self.source, self.outside, self.say)
        folder = self.scratch / f"artifacts-{one.identifier or 'primary'}"
        folder.mkdir()
        if one.whole:
            packed = artifacts.pack_zip(
                found, folder / "artifact.zip", max_bytes=self.max_bytes, least_part_bytes=self.part_bytes
            )
            return [self._send(packed, one.name, one)]
        if len(found) > _UNPACKED_FILES:
            raise BuildProblem(
                f"there are {len(found)} artifacts to keep file by file, and at most {_UNPACKED_FILES} are taken",
                reason=Reason.ARTIFACT_TOO_LARGE,
                hint="Use packaging ZIP.",
            )
        if sum(item.size_bytes for item in found) > self.max_bytes:
            raise artifacts.too_large(sum(item.size_bytes for item in found), self.max_bytes)

        def send(numbered: tuple[int, artifacts.Found]) -> ArtifactReport:
            number, item = numbered
            packed = artifacts.pack_file(item, folder / str(number), max_bytes=self.max_bytes, least_part_bytes=self.part_bytes)
            report = self._send(packed, item.name, one)
            packed.path.unlink()
            return report

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload") as pool:
            return list(pool.map(send, enumerate(found)))

    def _send(self, packed: artifacts.Packed, name: str, one: ArtifactSet) -> ArtifactReport:
        self.check()
        artifacts.check_name(name)
        staged = f"{one.identifier}/{name}" if one.identifier else name
        granted = self.depot.grant(
            GrantRequest(
                kind="artifact",
                name=staged,
                size_bytes=packed.size_bytes,
                sha256=packed.sha256,
                part_bytes=packed.part_bytes if len(packed.parts) > 1 else None,
                parts=packed.parts if len(packed.parts) > 1 else None,
            )
        )
        self.depot.upload(granted, packed.path, packed.sha256)
        return ArtifactReport(
            name=name,
            key=granted.key,
            size_bytes=packed.size_bytes,
            sha256=packed.sha256,
            md5=packed.md5,
            packaging="ZIP" if one.whole else "NONE",
            file_count=packed.file_count,
            identifier=one.identifier,
            set_name=one.set_name,
            s3_prefix=one.spec.s3_prefix,
        )
