"""Badges: what they say, who sees them, and that nothing of an address comes back in them."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from pydantic import SecretStr

from api.app import create_app
from api.badges import drawn
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import TokenScope
from scheduler import lifecycle, projects, tokens
from scheduler.badges import Badge
from scheduler.db import Database
from scheduler.dispatch import Bell
from tests.support.records import a_build, a_project, a_project_json

SOURCE = {"type": "GITHUB", "location": "https://github.com/o/r.git"}


@pytest.fixture
def client(sqlite_database: Database, tmp_path: Path) -> FlaskClient:
    settings = Settings(data_dir=tmp_path, signing_key=SecretStr("k" * 64))
    store = DirectoryStore(tmp_path / "objects", b"k" * 32)
    return create_app(settings, sqlite_database, store, Bell(f"redis+socket://{tmp_path}/none")).test_client()


def test_a_badge_is_of_the_newest_build_of_its_branch_or_tag(
    client: FlaskClient, sqlite_database: Database, tmp_path: Path
) -> None:
    db, settings = sqlite_database, Settings(data_dir=tmp_path)
    a_project(db, badgeEnabled=True, source=SOURCE)
    address = f"/badges?uuid={projects.get(db, 'demo').uuid}"

    def says(query: str = "") -> str:
        return ET.fromstring(client.get(address + query).text)[0].text or ""  # noqa: S314  # it is ours

    assert says("&branch=main") == "build: unknown"
    build = a_build(db, settings, sourceVersion="main")
    assert says() == says("&branch=main") == says("&branch=refs/heads/main") == "build: in progress"
    lifecycle.request_stop(db, build)
    assert says("&branch=main") == "build: failing"
    assert says("&branch=other") == says("&tag=v1") == "build: unknown"
    a_build(db, settings, sourceVersion="refs/tags/v1")
    assert says("&tag=v1") == "build: in progress"
    assert says("&branch=%3Cscript%3E") == "build: unknown"
    assert {drawn(badge).count("passing") for badge in Badge} == {0, 3}
    first = client.get(address)
    assert first.headers["Cache-Control"] == "no-cache" and first.mimetype == "image/svg+xml"
    assert client.get(address, headers={"If-None-Match": first.headers["ETag"]}).status_code == 304


def test_only_who_knows_the_address_of_a_project_that_has_one_sees_it(client: FlaskClient, sqlite_database: Database) -> None:
    a_project(sqlite_database, source=SOURCE)
    uuid = projects.get(sqlite_database, "demo").uuid
    for query in (f"uuid={uuid}", "uuid=demo", "uuid=", "uuid=%00", "branch=main"):
        assert client.get(f"/badges?{query}").status_code == 404
    assert client.get(f"/badges?uuid={uuid}&branch=a&tag=b").status_code == 422
    assert client.get(f"/badges?uuid={uuid}&brunch=a").status_code == 422


def test_a_project_shows_the_address_of_its_badge(client: FlaskClient, sqlite_database: Database) -> None:
    token = {"Authorization": f"Bearer {tokens.create(sqlite_database, 'a', TokenScope.ADMIN)}"}
    made = client.post("/v1/projects", json=a_project_json(badgeEnabled=True, source=SOURCE), headers=token).get_json()
    address = made["badge"]["badgeRequestUrl"]
    assert client.get(address[address.index("/badges") :]).text.count("build: unknown") == 2
    refused = client.post("/v1/projects", json=a_project_json("plain", badgeEnabled=True), headers=token)
    assert refused.status_code == 422 and "badgeEnabled" in refused.text
