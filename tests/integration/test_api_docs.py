"""The commands of docs/api.md, carried out as they stand there."""

import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from flask import Flask

from api import artifacts, builds, caches, fleets, health, hooks, loads, logs, notices, projects, secrets, uploads
from millrace.settings import Settings, for_children
from scheduler import leases, lifecycle
from scheduler.db import Database
from tests.support.apiserver import serving
from tests.support.need import missing
from tests.support.records import a_build, a_claim, a_project, a_report

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_page_work(sqlite_database: Database, settings: Settings, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        missing("curl", "apt-get install curl")
    assert len(COMMANDS) == 4
    folder = tmp_path / "folder"
    folder.mkdir()
    with serving(sqlite_database, settings) as server:
        a_project(server.db, "earlier")
        build = a_build(server.db, server.settings, "earlier")
        claim = a_claim(server.db, server.settings)
        data = b"PK the artifact"
        key = f"artifacts/{build.partition(':')[2]}/1/web.zip"
        stored = server.store.put(server.settings.bucket, key, io.BytesIO(data))
        item = {"name": "web.zip", "key": key, "sizeBytes": len(data), "sha256": stored.sha256, "md5": "0" * 32}
        report = a_report(artifacts=({**item, "packaging": "ZIP", "fileCount": 1},))
        lifecycle.finish(server.db, build, 1, leases.hash_token(claim.token), report)
        environment = {**for_children(os.environ), "API": server.url, "TOKEN": server.token, "BUILD": build}
        said = ""
        for block in COMMANDS:
            done = subprocess.run(
                ["sh", "-euc", block], env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, (block, done.stdout, done.stderr)
            said += done.stdout
        assert '"projectName":"web"' in said
        assert "event: end" in said
        assert (folder / "web.zip").read_bytes() == data
        assert f'"location":"{server.settings.bucket}/uploads/' in said


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_the_page_names_every_route(method: str) -> None:

    app = Flask("routes")
    for part in (projects, builds, caches, fleets, loads, secrets, hooks, notices, logs, artifacts, uploads, health):
        app.register_blueprint(part.blueprint)
    for rule in app.url_map.iter_rules():
        if rule.endpoint == "static" or method not in (rule.methods or set()):
            continue
        path = rule.rule.replace("<path:name>", "NAME").replace("<build_id>", "ID").replace("<name>", "NAME")
        named = f"{method} {path}" in PAGE or (method == "GET" and path.replace("ID", "$BUILD") in PAGE)
        assert named, f"{method} {path}"
