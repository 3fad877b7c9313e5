"""AWS and Vault as stores of secrets. AWS by moto; Vault by a server that speaks its documented API (tests/support/vault.py)."""

import socket
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from millrace.contract import SecretReference
from millrace.errors import SecretUnavailable, Unavailable
from millrace.secrets import SecretProvider, values_of
from millrace.secrets.aws import AwsSecrets
from millrace.secrets.vault import VaultSecrets
from tests.support import vault as vaults
from tests.support.vault import Vault


def asked(**references: str) -> list[SecretReference]:
    """NAME="P:name" for a parameter, NAME="S:reference" for a secret."""
    kinds = {"P": "PARAMETER_STORE", "S": "SECRETS_MANAGER"}
    return [
        SecretReference.model_validate({"name": name, "type": kinds[value[0]], "value": value[2:]})
        for name, value in references.items()
    ]


def refused(provider: SecretProvider, **references: str) -> list[str]:
    with pytest.raises(SecretUnavailable) as caught:
        values_of(provider, "demo", asked(**references))
    return caught.value.message.split("; ")


def nobody() -> str:
    """An address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# AWS


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsSecrets]:
    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with mock_aws():
        yield AwsSecrets("us-east-1")


def test_aws_parameters_of_every_kind_are_had_in_batches(aws: AwsSecrets) -> None:
    ssm = boto3.client("ssm", region_name="us-east-1")
    for number in range(23):
        ssm.put_parameter(Name=f"/team/p{number}", Value=f"value {number}", Type="SecureString")
    ssm.put_parameter(Name="/team/p0", Value="newer", Type="SecureString", Overwrite=True)
    elsewhere = boto3.client("ssm", region_name="eu-west-1")
    elsewhere.put_parameter(Name="far", Value="away", Type="String")
    arn = elsewhere.get_parameter(Name="far")["Parameter"]["ARN"]
    wanted = {f"V{number}": f"P:/team/p{number}" for number in range(23)}
    values = values_of(aws, "demo", asked(**wanted, OLD="P:/team/p0:1", SAME="P:/team/p1", ARN=f"P:{arn}"))
    assert values == {
        **{f"V{number}": f"value {number}" for number in range(1, 23)},
        "V0": "newer",
        "OLD": "value 0",
        "SAME": "value 1",
        "ARN": "away",
    }
    for client in (ssm, elsewhere):
        client.close()


def test_aws_secrets_are_had_by_name_arn_key_stage_and_version(aws: AwsSecrets) -> None:
    manager = boto3.client("secretsmanager", region_name="eu-west-1")
    made = manager.create_secret(Name="team/db", SecretString='{"password": "first"}')
    manager.put_secret_value(SecretId="team/db", SecretString='{"password": "second"}')
    manager.create_secret(Name="binary", SecretBinary=b"\x00\x01")
    here = AwsSecrets("eu-west-1")
    arn, first = made["ARN"], made["VersionId"]
    assert values_of(aws, "demo", asked(A=f"S:{arn}:password", B=f"S:{arn}")) == {"A": "second", "B": '{"password": "second"}'}
    by_name = asked(A="S:team/db:password", B="S:team/db:password:AWSPREVIOUS", C=f"S:team/db:password::{first}")
    assert values_of(here, "demo", by_name) == {"A": "second", "B": "first", "C": "first"}
    assert refused(here, A="S:team/db:user", B="S:gone", C="S:binary", D="S:team/db::NOSUCH") == [
        "secret has no key: team/db:user",
        "secret does not exist: gone",
        "secret is binary, not text: binary",
        "secret does not exist in this version: team/db::NOSUCH",
    ]
    manager.close()


def test_aws_parameters_that_are_missing_are_all_named(aws: AwsSecrets) -> None:
    ssm = boto3.client("ssm", region_name="us-east-1")
    ssm.put_parameter(Name="there", Value="v", Type="String")
    ssm.close()
    wanted = {f"V{number}": f"P:/gone/{number:02}" for number in range(12)}
    assert refused(aws, **wanted, FINE="P:there") == [
        "parameter does not exist: " + ", ".join(f"/gone/{number:02}" for number in range(12))
    ]
    assert values_of(aws, "demo", asked(FINE="P:there")) == {"FINE": "v"}


def test_aws_that_does_not_answer_or_know_us_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody())
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "x")
    for reference in ("P:a", "S:a"):
        with pytest.raises(Unavailable, match="AWS could not be asked for secrets: Could not connect"):
            values_of(AwsSecrets("us-east-1"), "demo", asked(A=reference))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(Unavailable, match="Unable to locate credentials"):
        values_of(AwsSecrets("us-east-1"), "demo", asked(A="S:a"))


# Vault


@pytest.fixture(scope="module")
def vault() -> Iterator[Vault]:
    with vaults.running() as server:
        yield server


def provider(vault: Vault, **changes: object) -> VaultSecrets:
    options = {"token": vault.token, "token_file": None, "mount": "secret", "namespace": None, **changes}
    return VaultSecrets(vault.address, **options)  # type: ignore[arg-type]


def test_vault_gives_fields_as_keys_and_values_as_parameters(vault: Vault) -> None:
    vault.write("team/db", user="u", password="first", port=5432)
    vault.write("team/db", user="u", password="s\u00e9cond", port=5432)
    vault.write("token", value="t", note="n")
    vault.write("single", anything="one")
    values = values_of(
        provider(vault),
        "demo",
        asked(
            A="S:team/db:password",
            B="S:/team/db:password:AWSCURRENT",
            C="S:team/db:password::1",
            D="S:team/db",
            E="S:team/db:port",
            F="P:/token",
            G="P:single",
        ),
    )
    assert values == {
        "A": "s\u00e9cond",
        "B": "s\u00e9cond",
        "C": "first",
        "D": values["D"],
        "E": "5432",
        "F": "t",
        "G": "one",
    }
    assert '"password": "s\u00e9cond"' in values["D"]


def test_vault_names_what_is_not_there(vault: Vault) -> None:
    vault.write("several", a="1", b="2")
    vault.write("deleted", value="x")
    vault.delete("deleted")
    assert refused(
        provider(vault),
        A="P:/gone",
        B="S:gone/too",
        C="P:several",
        D="P:deleted",
        E="S:several:c",
        F="S:several:a::9",
        G="S:several:a:AWSPREVIOUS",
        H="S:sys/../../sys/seal-status",
        J="P:a+b",
    ) == [
        "this is no name of a secret: sys/../../sys/seal-status",
        "parameter does not exist: /gone, deleted",
        "secret does not exist: gone/too",
        "parameter has none or several fields, of which SECRETS_MANAGER with NAME:FIELD names one: several",
        "secret has no key: several:c",
        "secret does not exist in this version: several:a::9",
        "Vault has numbers as versions, and no stages: several:a:AWSPREVIOUS",
        "this is no name of a parameter: a+b",
    ]


def test_vault_takes_the_token_that_its_agent_wrote_last(vault: Vault, tmp_path: Path) -> None:
    vault.write("mine", value="v")
    file = tmp_path / "token"
    from_file = provider(vault, token=None, token_file=file)
    with pytest.raises(Unavailable, match="token cannot be read"):
        values_of(from_file, "demo", asked(A="P:mine"))
    file.write_text("hvs.old\n")
    assert refused(from_file, A="P:mine") == ["Vault does not let the farm read the parameter: mine"]
    file.write_text(f"{vault.token}\n")
    assert values_of(from_file, "demo", asked(A="P:mine")) == {"A": "v"}


def test_vault_that_is_sealed_or_gone_is_away(vault: Vault) -> None:
    gone = VaultSecrets(nobody(), token="x", token_file=None, mount="secret", namespace=None)
    with pytest.raises(Unavailable, match="could not be asked for secrets: ConnectionError"):
        values_of(gone, "demo", asked(A="P:a"))
    if vault.real:
        return
    vault.sealed = True
    try:
        with pytest.raises(Unavailable, match="could not be asked for secrets: VaultDown, Vault is sealed") as caught:
            values_of(provider(vault), "demo", asked(A="P:a"))
    finally:
        vault.sealed = False
    assert vault.token not in caught.value.message
    vault.write("mine", value="v")
    values_of(provider(vault, namespace="team"), "demo", asked(A="P:mine"))
    assert "team" in vault.namespaces
