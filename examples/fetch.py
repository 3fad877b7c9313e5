"""Gets the sources of an example from the registries that this machine's images reach, checked against their hashes.

They are fetched by each registry's own program (pip, npm, go, apt-get), inside `millrace/standard`, so that nothing need be
installed here and no address is known to us.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from millrace.errors import Unavailable
from worker.order import host_bundle

IMAGE: Final = "millrace/standard:latest"
_BUNDLE: Final = "/tmp/ca-certificates.crt"  # noqa: S108  # inside a container of ours
_COMMANDS: Final = {
    "pypi": "pip download --quiet --no-deps --no-binary :all: '{package}=={version}'",
    "npm": "npm pack --silent '{package}@{version}'",
    "go": "go mod download '{package}@{version}' && cp \"$(go env GOMODCACHE)/cache/download/{package}/@v/{version}.zip\" .",
    # What Debian adds to the sources may be missing where a mirror is not whole; only the original archive is wanted.
    "debian": "sed -i 's/^deb /deb-src /' /etc/apt/sources.list && apt-get update -qq"
    " && (apt-get source -qq --download-only {package} || true)",
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example: its folder, and what its `source.json` says. `tests` finds how many tests ran, in the log."""

    folder: Path
    language: str
    registry: str
    package: str
    version: str
    archive: str
    sha256: str
    tests: str
    license: str

    @classmethod
    def read(cls, folder: Path) -> "Example":
        """The example in `folder`."""
        return cls(folder=folder, **json.loads((folder / "source.json").read_text()))


def fetch(example: Example, into: Path) -> Path:
    """The project's folder below `into`, fresh, with our buildspec in it. Raises Unavailable where it cannot be had."""
    kept = into / "archives" / example.archive
    if not (kept.is_file() and _sha256(kept) == example.sha256):
        _download(example, kept)
    project = into / example.folder.name
    shutil.rmtree(project, ignore_errors=True)
    unpacked = into / f".{example.folder.name}"
    shutil.rmtree(unpacked, ignore_errors=True)
    if kept.suffix == ".zip":
        with zipfile.ZipFile(kept) as archive:
            archive.extractall(unpacked)  # noqa: S202  # its content was checked against a hash of ours
    else:
        with tarfile.open(kept) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 of Debian 12 has none yet
            tar.extractall(unpacked)  # noqa: S202  # as above
    top = unpacked
    while len(inside := list(top.iterdir())) == 1 and inside[0].is_dir():
        top = inside[0]
    top.replace(project)
    shutil.rmtree(unpacked, ignore_errors=True)
    shutil.copyfile(example.folder / "buildspec.yml", project / "buildspec.yml")
    return project


def _download(example: Example, kept: Path) -> None:
    folder = kept.parent / f".{example.folder.name}"
    folder.mkdir(parents=True, exist_ok=True)
    bundle = host_bundle()
    trust = ["-v", f"{bundle}:{_BUNDLE}:ro"] if bundle else []
    for name in ("SSL_CERT_FILE", "PIP_CERT", "NODE_EXTRA_CA_CERTS") if bundle else ():
        trust += ["-e", f"{name}={_BUNDLE}"]
    command = _COMMANDS[example.registry].format(package=example.package, version=example.version)
    script = f"cd /out && ({command}) && chmod -R a+rwX /out"
    done = subprocess.run(
        ["docker", "run", "--rm", "-v", f"{folder.resolve()}:/out", *trust, IMAGE, "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    got = folder / example.archive
    if done.returncode != 0 or not got.is_file():
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise Unavailable(
            f"{example.package} {example.version} could not be had from its registry ({example.registry}): {last}",
            hint="Is the registry reachable from containers of this machine?",
        )
    if _sha256(got) != example.sha256:
        raise Unavailable(f"{example.archive} has SHA-256 {_sha256(got)}, and not the one in {example.folder.name}/source.json")
    got.replace(kept)
    shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
