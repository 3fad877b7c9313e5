"""Gets the project that the demonstration builds: `python demo/fetch.py FOLDER` prints the project's folder.

It is the source distribution of simplejson, by pip from whatever package index pip is set up for, checked against the hash in
`demo/requirements.txt`. Our buildspec goes beside it. Only the first call needs the index. Standard library only.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Pinned(NamedTuple):
    """The one source distribution that is wanted."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"


def pinned(requirements: Path) -> Pinned:
    """What the requirements file names. Raises ValueError where it does not name one version with one hash."""
    found = re.findall(r"^([\w.-]+)==(\S+) \\\n\s+--hash=sha256:([0-9a-f]{64})$", requirements.read_text(), re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"{requirements} should pin one package with one hash, and pins {len(found)}")
    return Pinned(*found[0])


def fetch(folder: Path, requirements: Path = HERE / "requirements.txt", buildspec: Path = HERE / "buildspec.yml") -> Path:
    """The unpacked project below `folder`, fresh, with our buildspec in its root.

    Raises ValueError where the archive is not the pinned one, subprocess.CalledProcessError where pip fails (it has said why).
    """
    wanted = pinned(requirements)
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / wanted.archive
    if not (archive.is_file() and _sha256(archive) == wanted.sha256):
        _download(requirements, wanted, archive)
    return _unpack(archive, folder / f"{wanted.name}-{wanted.version}", buildspec)


def _download(requirements: Path, wanted: Pinned, archive: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".download-", dir=archive.parent) as temporary:
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--no-binary", wanted.name, "--require-hashes", "--requirement", str(requirements)]
        subprocess.run([*command, "--dest", temporary], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        got = Path(temporary) / wanted.archive
        if _sha256(got) != wanted.sha256:
            raise ValueError(f"{wanted.archive} is not the one that {requirements} pins")
        got.replace(archive)


def _unpack(archive: Path, project: Path, buildspec: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=project.parent) as temporary:
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 of Debian 12 has none yet
            tar.extractall(temporary)  # noqa: S202  # its content was checked against a hash of ours
        unpacked = Path(temporary) / project.name
        shutil.copyfile(buildspec, unpacked / "buildspec.yml")
        if project.exists():
            shutil.rmtree(project)
        unpacked.replace(project)
    return project


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Get the project that the demonstration builds, and print its folder.")
    parser.add_argument("folder", type=Path, help="where to keep it; made if it is not there")
    folder: Path = parser.parse_args(arguments).folder
    try:
        print(fetch(folder.expanduser().resolve()))
    except subprocess.CalledProcessError as error:
        print(f"error: pip could not get the project (exit {error.returncode}); is a package index reachable?", file=sys.stderr)
        return 1
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
