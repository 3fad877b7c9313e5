"""References to secrets, what is made of a store's answers, and the keys of the farm's own store."""

import base64
import stat
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from structlog.testing import capture_logs

from millrace.contract import SecretReference
from millrace.errors import InvalidInput, SecretUnavailable, Unavailable
from millrace.secrets import Refusal, keyring, values_of
from millrace.secrets.keyring import Keyring, WrongKey
from millrace.secrets.reference import BadReference, Wanted, canonical, read
from millrace.settings import Settings

ARN = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:team/db-AbCdEf"


def secret(value: str, name: str = "X") -> SecretReference:
    return SecretReference(name=name, type="SECRETS_MANAGER", value=value)


def parameter(value: str, name: str = "X") -> SecretReference:
    return SecretReference(name=name, type="PARAMETER_STORE", value=value)


@pytest.mark.parametrize(
    ("text", "name", "key", "stage", "version"),
    [
        ("db", "db", "", "", ""),
        ("team/db:password", "team/db", "password", "", ""),
        ("db:password:AWSPREVIOUS", "db", "password", "AWSPREVIOUS", ""),
        ("db:password::v-1", "db", "password", "", "v-1"),
        ("db:::v-1", "db", "", "", "v-1"),
        ("db::AWSCURRENT:", "db", "", "AWSCURRENT", ""),
        (ARN, ARN, "", "", ""),
        (f"{ARN}:password", ARN, "password", "", ""),
        (f"{ARN}:::v-1", ARN, "", "", "v-1"),
        (f"{ARN}:a key with blanks", ARN, "a key with blanks", "", ""),
    ],
)
def test_a_secrets_reference_is_read_as_codebuild_does(text: str, name: str, key: str, stage: str, version: str) -> None:
    wanted, json_key = read(secret(text))
    assert (wanted.name, json_key, wanted.stage, wanted.version) == (name, key, stage, version)


@pytest.mark.parametrize(
    ("text", "name", "version", "plain"),
    [
        ("/team/db", "/team/db", "", "/team/db"),
        ("db:3", "db", "3", "db"),
        (
            "arn:aws:ssm:eu-west-1:123456789012:parameter/team/db",
            "arn:aws:ssm:eu-west-1:123456789012:parameter/team/db",
            "",
            "/team/db",
        ),
    ],
)
def test_a_parameters_reference_is_a_name_or_arn_and_its_version(text: str, name: str, version: str, plain: str) -> None:
    wanted, key = read(parameter(text))
    assert (wanted.name, wanted.version, wanted.plain_name, key) == (name, version, plain, "")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (secret("db:k:stage:id"), "not both"),
        (secret("db:k:s:i:more"), "more parts"),
        (secret(f"{ARN}:k:s:i:more"), "more parts"),
        (secret("arn:aws:secretsmanager:eu-west-1"), "no ARN of a secret"),
        (secret("arn:aws:ssm:eu-west-1:123456789012:parameter/a:b"), "no ARN of a secret"),
        (parameter(ARN), "NAME:VERSION|no ARN"),
        (parameter("arn:aws:ssm:../evil:123456789012:parameter/a"), "no ARN of a parameter"),
        (parameter("a:b:c"), "NAME:VERSION"),
        (secret(""), "no name of a secret"),
        (secret(":key"), "no name of a secret"),
        (parameter("/team/../other/db"), "no name of a parameter"),
        (parameter("./db"), "no name of a parameter"),
        (parameter("db?version=1#x"), "no name of a parameter"),
        (parameter("db\n"), "no name of a parameter"),
        (parameter("d\u00e9"), "no name of a parameter"),
        (parameter("db:1/../2 3"), "no version of a parameter"),
    ],
)
def test_a_reference_that_can_mean_nothing_says_why(reference: SecretReference, says: str) -> None:
    with pytest.raises(BadReference, match=says):
        read(reference)


@given(st.text(max_size=80), st.sampled_from(["PARAMETER_STORE", "SECRETS_MANAGER"]))
def test_whatever_a_reference_says_is_read_or_refused(text: str, kind: str) -> None:
    try:
        wanted, _key = read(SecretReference.model_validate({"name": "X", "type": kind, "value": text}))
    except BadReference:
        return
    assert text.startswith(wanted.name)
    assert ".." not in wanted.plain_name.split("/")


def test_names_are_one_with_and_without_the_slash_in_front() -> None:
    assert canonical("/team/db") == canonical("team/db") == "team/db"
    for name in ("", "/", "//a", "a//b", "a/", "../a", "a/../b", "a/./b", "a b", "a:b", "a%2fb", "a\\b", "a\n", "x" * 600):
        with pytest.raises(InvalidInput, match="no name of a secret"):
            canonical(name)


# What is made of a store's answers


class Shelf:
    """A store that has what it is given."""

    def __init__(self, **values: str | Refusal) -> None:
        self.values, self.asked = values, 0

    def fetch(self, project: str, wanted: Collection[Wanted]) -> Mapping[Wanted, str | Refusal]:
        self.asked += 1
        return {one: self.values.get(one.plain_name, Refusal(f"{one.noun} does not exist")) for one in wanted}


def test_values_come_by_variable_name_whole_or_by_key() -> None:
    shelf = Shelf(db='{"user": "u", "port": 5432, "on": true, "more": {"a": [1]}}', plain="p")
    asked = [
        secret("db", "ALL"),
        secret("db:user", "USER"),
        secret("db:port", "PORT"),
        secret("db:on", "ON"),
        secret("db:more", "MORE"),
        parameter("plain", "P"),
    ]
    assert values_of(shelf, "demo", asked) == {
        "ALL": shelf.values["db"],
        "USER": "u",
        "PORT": "5432",
        "ON": "true",
        "MORE": '{"a": [1]}',
        "P": "p",
    }
    assert shelf.asked == 1


def test_all_that_cannot_be_had_is_named_at_once_and_no_value_is() -> None:
    shelf = Shelf(
        text="hunter22", list='["hunter22"]', db='{"user": "hunter22"}', nul="hunter22\0", odd='{"k": "\\ud800hunter22"}'
    )
    asked = [
        parameter("/a", "A"),
        parameter("/b", "B"),
        parameter("/b", "B2"),
        secret("gone", "C"),
        secret("text:k", "D"),
        secret("list:k", "E"),
        secret("db:passwd", "F"),
        secret("db:k:s:i", "G"),
        parameter("nul", "H"),
        secret("odd:k", "I"),
        secret("db:user", "FINE"),
    ]
    with pytest.raises(SecretUnavailable) as caught:
        values_of(shelf, "demo", asked)
    assert caught.value.message.split("; ") == [
        "a secret is given a version stage or a version id, not both: db:k:s:i",
        "parameter does not exist: /a, /b",
        "secret does not exist: gone",
        "secret is not JSON, and so has no key: text:k",
        "secret is JSON, but no object, and so has no key: list:k",
        "secret has no key: db:passwd",
        "value has a NUL, which no variable can hold: nul",
        "value is no text: odd:k",
    ]


def test_long_references_are_cut_in_what_is_said() -> None:
    with pytest.raises(SecretUnavailable) as caught:
        values_of(Shelf(), "demo", [parameter("x" * 200_000, f"V{number}") for number in range(200)])
    assert len(caught.value.message) < 200


def test_a_project_asks_only_for_the_names_that_are_open_to_it() -> None:
    shelf = Shelf(**{"/web/db": "w", "/api/db": "a", "/shared/x": "s"})
    allowed = ["/{project}/*", "/shared/*"]
    asked = [parameter("/web/db", "A"), parameter("/shared/x", "B")]
    assert values_of(shelf, "web", asked, allowed=allowed) == {"A": "w", "B": "s"}
    arn = "arn:aws:ssm:eu-west-1:123456789012:parameter/api/db"
    with pytest.raises(SecretUnavailable, match=f"project web may not ask for the parameter: /api/db, {arn}"):
        values_of(shelf, "web", [parameter("/api/db", "A"), parameter(arn, "B")], allowed=allowed)


# Keys

ONE, TWO = bytes(range(32)), bytes(range(32, 64))


@given(st.text(max_size=200))
def test_what_was_sealed_is_opened_in_its_place_only(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    ring = Keyring([ONE])
    sealed = ring.seal(text, "demo\na")
    assert ring.unseal(sealed, "demo\na") == text
    assert ring.seal(text, "demo\na") != sealed
    for context in ("demo\nb", "\na"):
        with pytest.raises(WrongKey, match="was changed"):
            ring.unseal(sealed, context)
    with pytest.raises(WrongKey, match="was changed"):
        ring.unseal(sealed[:-1] + bytes([sealed[-1] ^ 1]), "demo\na")


def test_the_first_key_seals_and_all_open() -> None:
    old = Keyring([ONE]).seal("x", "c")
    both = Keyring([TWO, ONE])
    assert both.unseal(old, "c") == "x"
    assert not both.is_of_first(old)
    new = both.seal("x", "c")
    assert both.is_of_first(new)
    assert Keyring([TWO]).unseal(new, "c") == "x"
    with pytest.raises(WrongKey, match=f"sealed with the key {new[1:5].hex()}, and the farm has {old[1:5].hex()}"):
        Keyring([ONE]).unseal(new, "c")
    for short in (b"", b"\x01", b"\x01abcd", new[:10]):
        with pytest.raises(WrongKey):
            both.unseal(short, "c")


def test_keys_are_read_from_settings_in_hex_or_base64(tmp_path: Path) -> None:
    text = f"{TWO.hex()}, {base64.b64encode(ONE).decode()}"
    ring = keyring.from_settings(Settings(data_dir=tmp_path, secrets_key=SecretStr(text)))
    assert ring is not None
    assert ring.unseal(Keyring([ONE]).seal("x", "c"), "c") == "x"
    for wrong in ("hunter2", TWO.hex() + "00", ",", base64.b64encode(b"x" * 16).decode()):
        with pytest.raises(InvalidInput, match="MILLRACE_SECRETS_KEY is no list of keys") as caught:
            keyring.from_settings(
                Settings(data_dir=tmp_path, secrets_key=SecretStr(f"{ONE.hex()},{wrong}" if wrong != "," else wrong))
            )
        assert wrong == "," or wrong not in caught.value.message


def test_a_key_file_is_made_once_for_its_owner_by_whoever_is_first(tmp_path: Path) -> None:
    path = tmp_path / "farm" / "secrets.key"
    rings: list[Keyring] = []
    makers = [threading.Thread(target=lambda: rings.append(keyring.load(path, make=True))) for _ in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    sealed = rings[0].seal("x", "c")
    assert [ring.unseal(sealed, "c") for ring in rings] == ["x"] * 8
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_key_file_that_others_may_read_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "secrets.key"
    path.write_text(f"# the new one\n{TWO.hex()}\n\n{ONE.hex()}  # until June\n")
    path.chmod(0o644)
    with capture_logs() as lines:
        ring = keyring.load(path, make=False)
    assert [(line["event"], line["mode"]) for line in lines] == [("secrets.key_exposed", "0644")]
    assert ring.unseal(Keyring([ONE]).seal("x", "c"), "c") == "x"
    path.chmod(0o600)
    with capture_logs() as lines:
        keyring.load(path, make=False)
    assert lines == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has none"),
        (b"# nothing\n", "has none"),
        (f"{ONE.hex()}\nhunter22\n".encode(), "has none in its line 2"),
        (b"\xff\xfe\x00", "it is no text"),
        (b"\x00\x01\x80", "secrets"),
    ],
)
def test_a_key_file_that_is_none_is_told_without_what_it_holds(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "secrets.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(Unavailable, match=says) as caught:
        keyring.load(path, make=True)
    assert "hunter22" not in caught.value.message
    assert path.read_bytes() == content


def test_a_lost_key_file_is_not_made_anew_by_reading(tmp_path: Path) -> None:
    path = tmp_path / "secrets.key"
    with pytest.raises(Unavailable, match="is not there") as caught:
        keyring.load(path, make=False)
    assert "Put the file back" in caught.value.hint
    assert not path.exists()
    path.mkdir()
    with pytest.raises(Unavailable, match="cannot be read"):
        keyring.load(path, make=True)
