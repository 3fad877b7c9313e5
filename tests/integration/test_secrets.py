"""Secrets from end to end: the farm's own store on both databases, its routes and command line, and what attempts are granted."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from api.app import create_app
from millrace.contract import SecretReference
from millrace.errors import AttemptFenced, BuildProblem, Conflict, InfraProblem, InvalidInput, NotFound, TooLarge, Unavailable
from millrace.secrets import values_of
from millrace.settings import Settings, for_children
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import Reason, TokenScope
from scheduler import lifecycle, projects, secrets, tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.models import Secret
from scheduler.secrets import FarmSecrets, keys_of
from tests.support import vault as vaults
from tests.support.apiserver import ApiServer, serving
from tests.support.records import a_build, a_claim, a_project
from worker import control
from worker.control import AttemptControl

CANARY = "c4nary/Vögel+42"


def parameter(value: str, name: str = "X") -> SecretReference:
    return SecretReference(name=name, type="PARAMETER_STORE", value=value)


def secret(value: str, name: str = "X") -> SecretReference:
    return SecretReference(name=name, type="SECRETS_MANAGER", value=value)


def had(db: Database, settings: Settings, project: str, *references: SecretReference) -> dict[str, str]:
    return values_of(FarmSecrets(db, keys_of(settings)), project, references)


# The farm's own store


def test_a_build_finds_its_projects_secret_then_the_farms(database: Database, settings: Settings) -> None:
    keys = keys_of(settings)
    for name in ("one", "two"):
        a_project(database, name)
    assert secrets.put(database, keys, "/team/db", "the farm's")[1] is True
    secrets.put(database, keys, "team/db", "of one", project="one")
    record, new = secrets.put(database, keys, "team/db", "of one, again", project="one", description="d")
    assert (record.name, record.project, record.version, record.description, new) == ("/team/db", "one", 2, "d", False)
    assert had(database, settings, "one", parameter("/team/db")) == {"X": "of one, again"}
    assert had(database, settings, "two", parameter("team/db")) == {"X": "the farm's"}
    secrets.delete(database, "/team/db")
    with pytest.raises(NotFound, match="parameter does not exist: /team/db"):
        had(database, settings, "two", parameter("/team/db"))
    projects.delete(database, "one")
    a_project(database, "one")
    with pytest.raises(NotFound, match="secret does not exist: team/db"):
        had(database, settings, "one", secret("team/db"))


def test_references_of_every_form_are_answered(database: Database, settings: Settings) -> None:
    secrets.put(database, keys_of(settings), "web/db", '{"password": "p", "user": "ü"}')
    arn = "arn:aws:secretsmanager:us-east-1:000000000000:secret:web/db"
    assert had(
        database,
        settings,
        "any",
        secret("web/db:password", "A"),
        secret(f"{arn}-AbCdEf:user:AWSCURRENT", "B"),
        secret(f"{arn}:password::1", "C"),
        parameter("arn:aws:ssm:us-east-1:000000000000:parameter/web/db", "D"),
        parameter("/web/db:1", "E"),
    ) == {"A": "p", "B": "ü", "C": "p", "D": '{"password": "p", "user": "ü"}', "E": '{"password": "p", "user": "ü"}'}
    for reference in (secret("web/db::AWSPREVIOUS"), parameter("web/db:2")):
        with pytest.raises(NotFound, match="does not exist in this version; the farm keeps only the newest"):
            had(database, settings, "any", reference)


def test_what_is_no_secret_is_not_kept(database: Database, settings: Settings) -> None:
    keys = keys_of(settings)
    for name, value, kind in (
        ("../etc", "v", InvalidInput),
        ("a", "", InvalidInput),
        ("a", "v\0", InvalidInput),
        ("a", "é" * 32_769, TooLarge),
    ):
        with pytest.raises(kind):
            secrets.put(database, keys, name, value)
    with pytest.raises(NotFound, match="no project"):
        secrets.put(database, keys, "a", "v", project="nobody")
    with pytest.raises(InvalidInput):
        secrets.put(database, keys, "a", "v", description="\0")
    assert secrets.find(database)[0] == []
    assert not (settings.home / "secrets.key").exists()


def test_a_secret_that_is_set_from_many_sides_is_set(database: Database, settings: Settings) -> None:
    keys = keys_of(settings)
    said: list[str] = []

    def set_it(number: int) -> None:
        try:
            secrets.put(database, keys, "db", f"value {number}")
            said.append(f"value {number}")
        except Conflict:
            pass

    threads = [threading.Thread(target=set_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (record,) = secrets.find(database)[0]
    assert record.version == len(said) >= 1
    assert had(database, settings, "any", parameter("db"))["X"] in said


def test_secrets_are_listed_in_pages_without_their_values(database: Database, settings: Settings) -> None:
    keys = keys_of(settings)
    a_project(database, "web")
    for name in ("b/1", "a", "c"):
        secrets.put(database, keys, name, CANARY)
    secrets.put(database, keys, "a", CANARY, project="web")
    seen, cursor = [], None
    while True:
        page, cursor = secrets.find(database, limit=2, after=cursor)
        seen += [(record.project, record.name) for record in page]
        assert CANARY not in repr(page)
        if cursor is None:
            break
    assert seen == [(None, "a"), (None, "/b/1"), (None, "c"), ("web", "a")]
    assert [record.name for record in secrets.find(database, project="web")[0]] == ["a"]
    with pytest.raises(InvalidInput, match="cursor"):
        secrets.find(database, after="nonsense")


def test_a_lost_or_other_key_is_told_with_the_secrets_name_and_what_to_do(database: Database, settings: Settings) -> None:
    secrets.put(database, keys_of(settings), "team/db", CANARY)
    key = settings.home / "secrets.key"
    kept = key.read_text()
    key.unlink()
    with pytest.raises(Unavailable, match=r"the secret /team/db cannot be read: .*secrets\.key") as caught:
        had(database, settings, "any", parameter("/team/db"))
    assert "Put the file back" in caught.value.hint
    assert not key.exists()
    key.write_text("ab" * 32)
    with pytest.raises(
        Unavailable, match=r"the secret /team/db cannot be read: it was sealed with the key [0-9a-f]{8}"
    ) as caught:
        had(database, settings, "any", parameter("/team/db"))
    assert "millrace secret set /team/db" in caught.value.hint
    key.write_text(f"{'ab' * 32}\n{kept}")
    assert had(database, settings, "any", parameter("/team/db")) == {"X": CANARY}


def test_keys_are_changed_by_listing_the_new_one_first(database: Database, settings: Settings) -> None:
    assert secrets.reseal(database, keys_of(settings)) == (0, [])
    for name in ("a", "b"):
        secrets.put(database, keys_of(settings), name, CANARY)
    key = settings.home / "secrets.key"
    old = key.read_text().strip()
    both = settings.model_copy(update={"secrets_key": SecretStr(f"{'cd' * 32},{old}")})
    secrets.put(database, keys_of(both), "c", CANARY)
    assert secrets.reseal(database, keys_of(both)) == (2, [])
    assert secrets.reseal(database, keys_of(both)) == (0, [])
    only_new = settings.model_copy(update={"secrets_key": SecretStr("cd" * 32)})
    assert set(had(database, only_new, "any", *(parameter(name, name) for name in "abc")).values()) == {CANARY}
    with pytest.raises(Unavailable, match="the secret a cannot be read"):
        had(database, settings, "any", parameter("a"))
    done, failed = secrets.reseal(database, keys_of(settings))
    assert (done, len(failed)) == (0, 3)


def test_a_sealed_value_cannot_be_put_in_anothers_place(database: Database, settings: Settings) -> None:
    a_project(database, "web")
    secrets.put(database, keys_of(settings), "admin", CANARY)
    secrets.put(database, keys_of(settings), "mine", "x", project="web")
    with database.transaction() as session:
        sealed = session.execute(sa.select(Secret.sealed).where(Secret.name == "admin")).scalar_one()
        session.execute(sa.update(Secret).where(Secret.name == "mine").values(sealed=sealed))
    with pytest.raises(Unavailable, match="the secret mine cannot be read: what is kept of it was changed"):
        had(database, settings, "web", parameter("mine"))


# The routes and the command line, on a real server


@pytest.fixture
def server(database: Database, settings: Settings) -> Iterator[ApiServer]:
    with serving(database, settings) as up:
        a_project(up.db)
        yield up


def millrace(server: ApiServer, *arguments: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {**for_children(os.environ), "MILLRACE_API_URL": server.url, "MILLRACE_TOKEN": server.token}
    return subprocess.run(
        [sys.executable, "-m", "millrace.cli", *arguments],
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def as_project(server: ApiServer, project: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens.create(server.db, 'p', TokenScope.PROJECT, project=project)}"}


def test_secrets_are_set_shown_and_removed_over_http(server: ApiServer) -> None:
    with httpx.Client(base_url=server.url, headers=server.headers) as http:
        made = http.put("/v1/secrets/web/db", json={"value": CANARY, "project": "demo", "description": "of the shop"})
        assert made.status_code == 201
        assert {key: made.json()[key] for key in ("name", "project", "version", "description")} == {
            "name": "/web/db",
            "project": "demo",
            "version": 1,
            "description": "of the shop",
        }
        assert http.put("/v1/secrets/web/db", json={"value": CANARY, "project": "demo"}).status_code == 200
        assert http.put("/v1/secrets/token", json={"value": CANARY}).status_code == 201
        listed = http.get("/v1/secrets", params={"limit": 1}).json()
        rest = http.get("/v1/secrets", params={"cursor": listed["nextCursor"]}).json()
        assert [item["name"] for item in listed["secrets"] + rest["secrets"]] == ["token", "/web/db"]
        assert http.delete("/v1/secrets/web/db").status_code == 404
        assert http.delete("/v1/secrets/web/db", params={"project": "demo"}).status_code == 204
        assert http.get("/v1/secrets/token").status_code == 405


def test_a_project_token_has_its_own_projects_secrets_and_no_others(server: ApiServer) -> None:
    a_project(server.db, "other")
    with httpx.Client(base_url=server.url, headers=server.headers) as admin:
        for body in ({"value": "v"}, {"value": "v", "project": "demo"}, {"value": "v", "project": "other"}):
            admin.put("/v1/secrets/db", json=body).raise_for_status()
    with httpx.Client(base_url=server.url, headers=as_project(server, "demo")) as mine:
        for path in ("/v1/secrets", "/v1/secrets?project=demo"):
            assert [item.get("project") for item in mine.get(path).json()["secrets"]] == ["demo"], path
        for path in ("/v1/secrets?project=other", "/v1/secrets?project=", "/v1/secrets?project=%00"):
            assert mine.get(path).status_code == 404, path
        assert mine.get("/v1/secrets?cursor=demo%20").json()["secrets"][0]["project"] == "demo"
        assert mine.get("/v1/secrets?cursor=demo%20zz").json()["secrets"] == []
        assert mine.put("/v1/secrets/db", json={"value": "w"}).status_code == 403
        assert mine.put("/v1/secrets/db", json={"value": "w", "project": "other"}).status_code == 404
        assert mine.delete("/v1/secrets/db").status_code == 403
        assert mine.delete("/v1/secrets/db?project=other").status_code == 404
        assert mine.put("/v1/secrets/db", json={"value": "w", "project": "demo"}).json()["version"] == 2
        assert mine.delete("/v1/secrets/db?project=demo").status_code == 204
    assert [record.project for record in secrets.find(server.db)[0]] == [None, "other"]


REFUSED: list[tuple[str, dict[str, Any], int]] = [
    ("a", {"value": CANARY, "vlaue": CANARY}, 422),
    ("a", {"vlaue": CANARY}, 422),
    ("a", {"value": [CANARY]}, 422),
    ("a", {"value": {"x": CANARY}}, 422),
    ("a", {"value": CANARY, "project": 7}, 422),
    ("a", {"value": CANARY, "project": "no-such"}, 404),
    ("a", {"value": CANARY, "description": "x" * 2000}, 422),
    ("a", {"value": CANARY * 6000}, 413),
    ("a", {"value": CANARY + "\0"}, 422),
    ("a", {"value": ""}, 422),
    ("a%00b", {"value": CANARY}, 422),
    ("a%0Ab", {"value": CANARY}, 404),
    ("a/%2e%2e/b", {"value": CANARY}, 422),
    ("..%2f..%2fadmin", {"value": CANARY}, 422),
    ("a%5Cb", {"value": CANARY}, 422),
    ("%C3%A9", {"value": CANARY}, 422),
    ("x" * 600, {"value": CANARY}, 422),
    ("a?project=demo", {"value": CANARY}, 422),
]


def test_what_is_refused_is_told_without_the_value(server: ApiServer) -> None:
    with httpx.Client(base_url=server.url, headers=server.headers) as http:
        for path, body, status in REFUSED:
            answer = http.put(httpx.URL(server.url).copy_with(raw_path=f"/v1/secrets/{path}".encode()), json=body)
            assert answer.status_code == status, (path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert "c4nary" not in answer.text
    assert "c4nary" not in server.log.read_text()
    assert secrets.find(server.db)[0] == []


def test_a_farm_with_another_store_says_where_its_secrets_are_set(database: Database, settings: Settings) -> None:
    aws = settings.model_copy(update={"secrets_provider": "aws"})
    bell = Bell(f"redis+socket://{settings.home}/nothing.sock")
    client = create_app(aws, database, DirectoryStore(settings.home / "objects", b"k" * 64), bell).test_client()
    headers = {"Authorization": f"Bearer {tokens.create(database, 'a', TokenScope.ADMIN)}"}
    for answer in (
        client.get("/v1/secrets", headers=headers),
        client.put("/v1/secrets/a", headers=headers, json={"value": "v"}),
        client.delete("/v1/secrets/a", headers=headers),
    ):
        assert answer.status_code == 409
        assert "kept in AWS" in answer.get_json()["detail"]
    with pytest.raises(InvalidInput, match="MILLRACE_VAULT_ADDRESS"):
        secrets.open_provider(settings.model_copy(update={"secrets_provider": "vault"}), database)


def test_the_command_line_takes_values_from_everywhere_but_argv(server: ApiServer, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_bytes(b"two\nlines\n")
    assert millrace(server, "secret", "set", "/web/file", "--project", "demo", "--value-file", str(file)).returncode == 0
    assert millrace(server, "secret", "set", "piped", text=f"{CANARY}\n").stdout == "Secret piped is set (version 1)\n"
    found = had(server.db, server.settings, "demo", parameter("web/file", "FILE"), parameter("piped", "PIPED"))
    assert found == {"FILE": "two\nlines\n", "PIPED": CANARY}
    listed = millrace(server, "secret", "list").stdout
    assert "/web/file" in listed and "piped" in listed
    assert millrace(server, "secret", "rm", "/web/file", "--project", "demo").returncode == 0
    file.write_bytes(b"c4nary\xff")
    for arguments, text, says in (
        (("set", "x", CANARY), "", "never given on the command line"),
        (("set", "x"), "", "the value is empty"),
        (("set", "x"), "\n", "the value is empty"),
        (("set", "x"), f"{CANARY}\0", "has a NUL"),
        (("set", "x"), CANARY * 6000, "longer than 65536 bytes"),
        (("set", "x", "--value-file", str(file)), "", "no text in UTF-8"),
        (("set", "x", "--value-file", str(tmp_path / "none")), "", "cannot be read"),
        (("set", "a/../b"), CANARY, "no name of a secret"),
        (("set", "x", "--project", "nobody"), CANARY, "no project 'nobody'"),
        (("rm", "nothing"), "", "has no secret nothing"),
    ):
        done = millrace(server, "secret", *arguments, text=text)
        assert done.returncode == 1, done
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert "c4nary" not in done.stdout + done.stderr


# What attempts are granted


@pytest.fixture
def attempt(server: ApiServer) -> Iterator[AttemptControl]:
    a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    control = AttemptControl(server.url, claim.build_id, claim.attempt_no, claim.token)
    yield control
    control.close()


def test_an_attempt_is_granted_what_is_there_and_told_all_that_is_not(server: ApiServer, attempt: AttemptControl) -> None:
    keys = keys_of(server.settings)
    secrets.put(server.db, keys, "db", '{"password": "p"}', project="demo")
    assert attempt.secrets([secret("db:password", "P")]) == {"P": "p"}
    many = [parameter("db", f"V{number}") for number in range(450)]
    assert len(attempt.secrets(many)) == 450
    with pytest.raises(BuildProblem) as caught:
        attempt.secrets([parameter("/gone/1", "A"), secret("db:user", "B"), parameter("/gone/2", "C"), parameter("db", "D")])
    assert (caught.value.reason, caught.value.status_code) == (Reason.SECRET_UNAVAILABLE, "Decrypted Variables Error")
    assert caught.value.message == "parameter does not exist: /gone/1, /gone/2; secret has no key: db:user"
    gone = [parameter(f"/gone/{number:03}", f"V{number}") for number in range(250)]
    with pytest.raises(BuildProblem) as caught:
        attempt.secrets(gone)
    assert all(reference.value in caught.value.message for reference in gone)
    secrets.put(server.db, keys, "big", "x" * 65_536)
    with pytest.raises(BuildProblem, match="at most 262144 bytes together, these have 327680"):
        attempt.secrets([parameter("big", f"V{number}") for number in range(5)])


def test_references_of_a_megabyte_are_refused_and_the_farm_goes_on(server: ApiServer, attempt: AttemptControl) -> None:
    with pytest.raises(BuildProblem, match="parameter does not exist: x/x/x") as caught:
        attempt.secrets([parameter("x/" * 100_000, f"V{number}") for number in range(5)])
    assert len(caught.value.message) < 500
    with pytest.raises(BuildProblem, match="413"):
        attempt.secrets([parameter("x" * 200_000, f"V{number}") for number in range(50)])
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_fenced_attempt_is_granted_nothing(server: ApiServer) -> None:
    secrets.put(server.db, keys_of(server.settings), "db", CANARY)
    build = a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    mine = AttemptControl(server.url, build, 1, claim.token)
    assert mine.secrets([parameter("db")]) == {"X": CANARY}
    forged = AttemptControl(server.url, build, 1, "mr_att_forged")
    with pytest.raises(AttemptFenced):
        forged.secrets([parameter("db")])
    lifecycle.request_stop(server.db, build)
    with server.db.transaction() as session:
        session.execute(sa.text("UPDATE builds SET attempt_no = 2"))
    with pytest.raises(AttemptFenced):
        mine.secrets([parameter("db")])
    for one in (mine, forged):
        one.close()


def test_a_store_that_is_away_is_the_farms_fault(
    server: ApiServer, attempt: AttemptControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_SECRETS_PATIENCE_S", 0.5)
    secrets.put(server.db, keys_of(server.settings), "db", CANARY)
    (server.settings.home / "secrets.key").write_text("ab" * 32)
    with pytest.raises(InfraProblem, match="the secret db cannot be read: it was sealed with the key") as caught:
        attempt.secrets([parameter("db")])
    assert caught.value.reason is Reason.SECRETS_AWAY


def test_an_attempt_is_granted_what_vault_has_as_far_as_its_project_may_ask(
    sqlite_database: Database, settings: Settings, store: DirectoryStore
) -> None:
    a_project(sqlite_database)
    a_build(sqlite_database, settings)
    claim = a_claim(sqlite_database, settings)
    with vaults.running() as vault:
        vault.write("demo/db", password="p")
        vault.write("other/db", password="q")
        changes = {"vault_address": vault.address, "vault_token": SecretStr(vault.token), "secrets_names": ("{project}/*",)}
        of_vault = settings.model_copy(update={"secrets_provider": "vault", **changes})
        app = create_app(of_vault, sqlite_database, store, Bell(f"redis+socket://{settings.home}/nothing.sock"))
        mine = AttemptControl("http://api", claim.build_id, 1, claim.token, transport=httpx.WSGITransport(app=app))
        assert mine.secrets([secret("demo/db:password")]) == {"X": "p"}
        with pytest.raises(BuildProblem, match="project demo may not ask for the secret: other/db:password"):
            mine.secrets([secret("other/db:password")])
        mine.close()


# The canary


def test_a_secret_is_found_nowhere_but_with_the_attempt_that_asked(server: ApiServer, attempt: AttemptControl) -> None:
    """A secret goes the whole way; then every GET route is read, with every token, and all that the farm wrote."""
    assert millrace(server, "secret", "set", "canary", text=CANARY).returncode == 0
    settings = server.settings
    reference = {"name": "BIRD", "value": "canary", "type": "PARAMETER_STORE"}
    with httpx.Client(base_url=server.url, headers=server.headers) as http:
        environment = {"environmentVariablesOverride": [reference]}
        build = http.post("/v1/builds", json={"projectName": "demo", **environment}).json()
        assert build["environment"]["environmentVariables"] == [reference]
        assert attempt.secrets([parameter("canary", "BIRD")]) == {"BIRD": CANARY}
        (settings.home / "secrets.key").chmod(0o644)
        with pytest.raises(BuildProblem):
            attempt.secrets([secret("canary:key")])
        http.put("/v1/secrets/canary", json={"value": CANARY, "project": "nobody"})
        http.put("/v1/secrets/canary", content=json.dumps({"value": CANARY})[:-1], headers={"Content-Type": "application/json"})
        seen = []
        app = create_app(settings, server.db, server.store, Bell(f"redis+socket://{settings.home}/none.sock"))
        for rule in app.url_map.iter_rules():
            if "GET" not in (rule.methods or ()):
                continue
            path = rule.rule.replace("<build_id>", build["id"]).replace("<name>", "demo").replace("<path:name>", "a")
            for headers in (server.headers, server.worker_headers, as_project(server, "demo")):
                seen.append(http.get(path.replace("<token>", "x"), headers=headers).text)
    assert len(seen) > 20
    where = {f"GET {number}": text.encode() for number, text in enumerate(seen)}
    where |= {str(path): path.read_bytes() for path in settings.home.rglob("*") if path.is_file()}
    if server.db.is_sqlite:
        where |= {str(path): path.read_bytes() for path in Path(server.db.url.removeprefix("sqlite:///")).parent.glob("*.db*")}
    with server.db.reading() as session:
        for table in sa.inspect(server.db.engine).get_table_names():
            where[table] = "\n".join(map(repr, session.execute(sa.text(f"SELECT * FROM {table}")))).encode()  # noqa: S608
    forms = (CANARY.encode(), base64.b64encode(CANARY.encode()), json.dumps(CANARY)[1:-1].encode(), b"c4nary")
    assert [(place, form) for place, text in where.items() for form in forms if form in text] == []
    assert any(b"secrets.key_exposed" in text for place, text in where.items() if place.endswith("api.log"))
