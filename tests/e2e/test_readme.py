"""The README's own text, carried out."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.farm import Farm

pytestmark = pytest.mark.docker
README = (Path(__file__).parents[2] / "README.md").read_text()


def test_curl_alone_drives_a_build(farm: Farm, tmp_path: Path) -> None:
    (block,) = [text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "Idempotency-Key" in text]
    script = block.replace("API=http://127.0.0.1:8420", f"API={farm.api_url}")
    script = script.replace("TOKEN=$(cat ~/.millrace/admin.token)", f"TOKEN={farm.token}")
    assert script.count(farm.api_url) == 1
    assert script.count(farm.token) == 1
    done = subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "event: end" in done.stdout
    assert '"buildStatus":"SUCCEEDED"' in done.stdout.replace(" ", "")
    with zipfile.ZipFile(tmp_path / "hello.zip") as archive:
        assert archive.read("out.txt") == b"hello\n"
