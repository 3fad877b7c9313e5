"""Secrets from HashiCorp Vault, its KV engine of version 2."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import hvac
import requests
from hvac import exceptions

from millrace.errors import InvalidInput, Unavailable
from millrace.secrets import Refusal, each
from millrace.secrets.reference import CURRENT, Wanted, canonical

_TIMEOUT_S: Final = 4
_VALUE: Final = "value"


class VaultSecrets:
    """A SecretProvider. A secret's fields are its JSON's keys; of a parameter, the field `value` counts, or the only one.

    `token_file` is read each time, so that an agent may renew what is in it.
    """

    def __init__(self, address: str, *, token: str | None, token_file: Path | None, mount: str, namespace: str | None) -> None:
        self._address, self._mount, self._namespace = address, mount, namespace
        self._token, self._token_file = token, token_file

    def fetch(self, project: str, wanted: Collection[Wanted]) -> Mapping[Wanted, str | Refusal]:
        """As the protocol has it."""
        client = hvac.Client(
            url=self._address, token=self._current_token(), namespace=self._namespace, timeout=_TIMEOUT_S, strict_http=True
        )
        try:
            return each(wanted, lambda one: self._ask(client, one))
        finally:
            client.adapter.close()

    def _ask(self, client: hvac.Client, one: Wanted) -> str | Refusal:
        if one.stage not in ("", CURRENT) or (one.version and not one.version.isdigit()):
            return Refusal("Vault has numbers as versions, and no stages")
        try:
            path = canonical(one.plain_name)
        except InvalidInput:
            return Refusal(f"this is no name of a {one.noun}")
        try:
            answer = client.secrets.kv.v2.read_secret_version(
                path=path,
                version=int(one.version) if one.version else None,
                mount_point=self._mount,
                raise_on_deleted_version=True,
            )
            fields = answer["data"]["data"]
        except exceptions.InvalidPath:
            return Refusal(f"{one.noun} does not exist" + (" in this version" if one.version else ""))
        except exceptions.Forbidden:
            return Refusal(f"Vault does not let the farm read the {one.noun}")
        except exceptions.VaultError as error:
            raise self._away(f"{type(error).__name__}, {'; '.join(error.errors or [])}"[:300]) from error
        except (requests.RequestException, KeyError, TypeError, ValueError) as error:
            raise self._away(type(error).__name__) from error
        if one.type == "SECRETS_MANAGER":
            return json.dumps(fields, ensure_ascii=False)
        field = _VALUE if _VALUE in fields else next(iter(fields), _VALUE)
        if field not in fields or (field != _VALUE and len(fields) > 1):
            return Refusal("parameter has none or several fields, of which SECRETS_MANAGER with NAME:FIELD names one")
        value = fields[field]
        return value if isinstance(value, str) else json.dumps(value)

    def _current_token(self) -> str:
        if self._token_file is None:
            return self._token or ""
        try:
            return self._token_file.expanduser().read_text().strip()
        except (OSError, ValueError) as error:
            raise Unavailable(f"the file with Vault's token cannot be read: {self._token_file}") from error

    def _away(self, why: str) -> Unavailable:
        return Unavailable(
            f"Vault at {self._address} could not be asked for secrets: {why}",
            hint="Is it up and unsealed, and MILLRACE_VAULT_* right?",
        )
