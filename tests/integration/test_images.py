"""The build images, as the engine on this machine has them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import requests.exceptions
from docker.errors import DockerException

from buildenv.images import LABEL_RECIPE, NAMES, make, resolve_runtimes, runtimes_from_labels, tag_of
from buildenv.images.make import ImageBuildError, ensure
from buildenv.workspace import INSIDE

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    try:
        client = docker.DockerClient(timeout=120)
    except (DockerException, requests.exceptions.RequestException) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no Docker engine: {error}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def standard(engine: docker.DockerClient) -> str:
    assert engine.ping()
    return ensure("standard", say=print)


def inside(image: str, script: str, *options: str) -> str:
    """What a script says in a fresh container without network; it must succeed."""
    command = ["docker", "run", "--rm", "--network=none", *options, image, "sh", "-ec", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("git --version", r"git version 2\."),
        ("curl --version", r"curl \d"),
        ("unzip -v", r"UnZip \d"),
        ("zip -v", r"Zip \d"),
        ("jq --version", r"jq-1\."),
        ("bash --version", r"GNU bash"),
        ("gcc --version", r"gcc .*\d"),
        ("g++ --version", r"g\+\+ .*\d"),
        ("make --version", r"GNU Make"),
        ("cmake --version", r"cmake version 3\."),
        ("python3 --version", r"Python 3\."),
        ("python --version", r"Python 3\."),
        ("pip --version", r"pip \d.*python3|pip \d.*python 3"),
        ("node --version", r"v\d+\."),
        ("npm --version", r"^\d+\."),
        ("javac --version", r"javac \d+\."),
        ("java --version", r"openjdk \d+\."),
        ("go version", r"go version go1\."),
        ("ruby --version", r"ruby 3\."),
        ("gem --version", r"^\d+\."),
        ("aws --version", r"aws-cli/"),
        ("ssh -V", r"OpenSSH"),
        ("tar --version", r"GNU tar"),
        ("xz --version", r"xz \("),
        ("ps --version", r"procps"),
    ],
)
def test_the_standard_image_has_the_tool(standard: str, command: str, expected: str) -> None:
    assert re.search(expected, inside(standard, command))


def test_its_programs_are_compiled_and_run_in_each_language(standard: str) -> None:
    script = r"""
    cd "$(mktemp -d)"
    printf '#include <stdio.h>\nint main(){puts("c");}' > a.c && gcc a.c -o a && ./a
    printf '#include <iostream>\nint main(){std::cout << "cpp\\n";}' > b.cc && g++ b.cc -o b && ./b
    printf 'class A { public static void main(String[] a) { System.out.println("java"); } }' > A.java && javac A.java && java A
    printf 'package main\nimport "fmt"\nfunc main() { fmt.Println("go") }' > m.go && go run m.go
    node -e 'console.log("node")'
    ruby -e 'puts "ruby"'
    python -m venv v && v/bin/python -c 'print("python")'
    printf '#include <Python.h>\n' | gcc $(python3-config --includes) -fsyntax-only -xc - && echo headers
    """
    said = inside(standard, script).split()
    assert said == ["c", "cpp", "java", "go", "node", "ruby", "python", "headers"]


def test_pip_installs_system_wide_without_network(standard: str) -> None:
    script = r"""
    mkdir -p /tmp/p/hello && cd /tmp/p && echo 'WORD = "installed"' > hello/__init__.py
    printf '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n' > pyproject.toml
    printf '[project]\nname = "hello"\nversion = "1"\n[tool.setuptools]\npackages = ["hello"]\n' >> pyproject.toml
    pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist .
    pip install --quiet --no-index dist/hello-1-*.whl
    cd / && python -c 'import hello; print(hello.WORD)'
    """
    assert inside(standard, script) == "installed\n"


def test_git_trusts_a_source_that_belongs_to_another_user(standard: str) -> None:
    script = "git init -q /tmp/repo; chown -R 4711:4711 /tmp/repo; git -C /tmp/repo status --short; echo trusted"
    assert inside(standard, script) == "trusted\n"


def test_it_lists_the_runtimes_that_are_installed(engine: docker.DockerClient, standard: str) -> None:
    declared = runtimes_from_labels(engine.images.get(standard).labels)
    assert declared is not None
    assert set(declared) == {"python", "nodejs", "java", "golang", "ruby"}
    said = inside(standard, "python --version; node --version; java -version; go version; ruby --version")
    for versions in declared.values():
        assert len(versions) == 1
        assert versions[0] in said
    chosen, problems = resolve_runtimes(declared, {"python": "3.x", "java": "corretto17", "nodejs": "latest"}, image=standard)
    assert set(chosen) == {"python", "java", "nodejs"}
    assert problems == []
    listed = inside(standard, "cat /codebuild/image/config/runtimes.yml")
    assert all(f"{runtime}:" in listed for runtime in declared)


def test_it_starts_no_login_and_has_a_plain_locale(standard: str) -> None:
    assert inside(standard, 'id -u; echo "$LANG"; pwd') == "0\nC.UTF-8\n/\n"


@pytest.mark.skipif(not CA_BUNDLE.is_file(), reason="this machine has no CA bundle to mount")
def test_a_bundle_of_certificates_may_be_mounted_anywhere(standard: str) -> None:
    script = "python -c 'import ssl; print(len(ssl.create_default_context().get_ca_certs()) > 0)'; test -r \"$SSL_CERT_FILE\""
    elsewhere = "/codebuild/readonly/ca.crt"
    for target in (elsewhere, str(CA_BUNDLE)):
        options = (f"--volume={CA_BUNDLE}:{target}:ro", f"--env=SSL_CERT_FILE={target}")
        assert inside(standard, script, *options) == "True\n"
    # A mount over the system's own file keeps a build from installing certificates; one beside it does not.
    inside(standard, "update-ca-certificates", f"--volume={CA_BUNDLE}:{elsewhere}:ro")


def test_files_are_hashed_with_what_the_image_has(standard: str) -> None:
    script = """
    PATH=$PATH:/inside; cd /tmp && mkdir -p h/sub && echo 1 > h/a.lock && echo 2 > h/sub/b.lock && export CODEBUILD_SRC_DIR=/tmp/h
    codebuild-hash-files '**/*.lock'
    codebuild-hash-files a.lock sub/b.lock
    echo 3 > h/a.lock; codebuild-hash-files '**/*.lock'
    codebuild-hash-files '*.none' 2>&1 || echo "exit $?"
    """
    one, two, changed, *nothing = inside(standard, script, f"--volume={INSIDE}:/inside:ro").splitlines()
    assert one == two != changed
    assert nothing == ["codebuild-hash-files: no file matches *.none", "exit 1"]


def test_an_image_that_is_there_is_not_made_again(engine: docker.DockerClient, standard: str) -> None:
    before = [engine.images.get(tag_of(name)).id for name in NAMES]
    said: list[str] = []
    began = time.monotonic()
    assert ensure("standard", say=said.append) == standard == tag_of("standard")
    assert time.monotonic() - began < 1
    assert said == []
    assert [engine.images.get(tag_of(name)).id for name in NAMES] == before


def test_latest_is_moved_to_the_recipe_in_force(engine: docker.DockerClient, standard: str) -> None:
    engine.images.get(tag_of("base")).tag("millrace/standard", "latest")  # As another checkout's recipe might have left it.
    ensure("standard", say=print)
    latest = engine.images.get("millrace/standard:latest")
    assert latest.id == engine.images.get(standard).id
    assert latest.labels[LABEL_RECIPE] == standard.rpartition(":")[2]


def test_nothing_half_made_is_left_behind(engine: docker.DockerClient, standard: str) -> None:
    assert standard
    assert [tag for image in engine.images.list() for tag in image.tags if tag.endswith("-raw")] == []


def test_an_engine_that_is_away_gives_a_problem_that_says_what_to_do() -> None:
    with pytest.raises(ImageBuildError) as caught:
        ensure("base", say=print, docker_host="tcp://127.0.0.1:9")
    assert "Docker engine does not answer" in caught.value.message
    assert "doctor" in caught.value.hint


def test_a_step_that_fails_shows_all_that_it_said(engine: docker.DockerClient, standard: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {standard}\nRUN seq 1 200; echo the reason >&2; exit 3\n")
    said: list[str] = []
    with pytest.raises(ImageBuildError) as caught:
        make._build(engine, tmp_path, "millrace-test/broken:1", {}, {}, said.append)
    output = caught.value.message.splitlines()
    assert [str(number) for number in range(1, 201)] == [line for line in output if line.isdigit()]
    assert "the reason" in output
    assert not any(line.startswith("Step 1") for line in output)
    assert "code: 3" in output[0]
    assert [line.split(" :")[0] for line in said] == ["Step 1/2", "Step 2/2"]


def test_the_command_says_tags_and_what_is_there(standard: str) -> None:
    command = [sys.executable, "-m", "buildenv.images"]
    tags = subprocess.run([*command, "tag"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert tags == [tag_of(name) for name in NAMES]
    listed = subprocess.run([*command, "list", "standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^{standard} .* this recipe .*python 3\.", listed, re.MULTILINE)
    wrong = subprocess.run([*command, "build", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "there are base, standard" in wrong.stderr
