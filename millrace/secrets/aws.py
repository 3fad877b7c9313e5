"""Secrets from AWS: Parameter Store and Secrets Manager. Credentials are found as boto3 finds them."""

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from millrace.errors import Unavailable
from millrace.secrets import Refusal, each
from millrace.secrets.reference import Wanted

_CONFIG: Final = Config(connect_timeout=2, read_timeout=4, retries={"mode": "standard", "total_max_attempts": 2})
_BATCH: Final = 10
"""So many names GetParameters takes."""
_NO_SUCH: Final = frozenset({"ParameterNotFound", "ParameterVersionNotFound", "ResourceNotFoundException"})
_DENIED: Final = frozenset({"AccessDeniedException", "AccessDenied", "KMSAccessDeniedException", "DecryptionFailure"})
_WRONG: Final = frozenset({"ValidationException", "InvalidParameterException", "InvalidRequestException", "InvalidKeyId"})


class AwsSecrets:
    """A SecretProvider. A reference by ARN is asked for in the ARN's own region."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def fetch(self, project: str, wanted: Collection[Wanted]) -> Mapping[Wanted, str | Refusal]:
        """As the protocol has it."""
        found: dict[Wanted, str | Refusal] = {}
        for batch in _batches(one for one in wanted if one.type == "PARAMETER_STORE"):
            found |= self._parameters(batch)
        return found | each([one for one in wanted if one.type == "SECRETS_MANAGER"], self._secret)

    def _parameters(self, wanted: list[Wanted]) -> dict[Wanted, str | Refusal]:
        names = [f"{one.name}:{one.version}" if one.version else one.name for one in wanted]
        try:
            answer = self._client("ssm", wanted[0].region).get_parameters(Names=names, WithDecryption=True)
        except ClientError as error:
            if len(wanted) > 1 and _code(error) in _DENIED | _WRONG | _NO_SUCH:  # one of them spoils it for all
                return {name: said for one in wanted for name, said in self._parameters([one]).items()}
            return {one: _refusal(error, one) for one in wanted}
        except BotoCoreError as error:
            raise _away(error) from error
        found: dict[Wanted, str | Refusal] = dict.fromkeys(wanted, Refusal("parameter does not exist"))
        for one in wanted:
            for item in answer["Parameters"]:
                if one.name in (item["Name"], item.get("ARN")):
                    found[one] = item["Value"]
        return found

    def _secret(self, one: Wanted) -> str | Refusal:
        version = {"VersionId": one.version} if one.version else {"VersionStage": one.stage} if one.stage else {}
        try:
            answer = self._client("secretsmanager", one.region).get_secret_value(SecretId=one.name, **version)
        except ClientError as error:
            return _refusal(error, one)
        except BotoCoreError as error:
            raise _away(error) from error
        value: str | None = answer.get("SecretString")
        return Refusal("secret is binary, not text") if value is None else value

    def _client(self, service: str, region: str) -> Any:
        with self._lock:
            key = service, region or self._region
            if key not in self._clients:
                self._clients[key] = boto3.session.Session().client(service, region_name=key[1], config=_CONFIG)
            return self._clients[key]


def _batches(wanted: Iterable[Wanted]) -> list[list[Wanted]]:
    """Of one region each, as many as one call takes, and of no parameter two versions."""
    batches: list[list[Wanted]] = []
    for one in wanted:
        for batch in batches:
            if len(batch) < _BATCH and one.region == batch[0].region and all(one.name != other.name for other in batch):
                batch.append(one)
                break
        else:
            batches.append([one])
    return batches


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refusal(error: ClientError, one: Wanted) -> Refusal:
    code = _code(error)
    if code in _NO_SUCH:
        return Refusal(f"{one.noun} does not exist" + (" in this version" if one.version or one.stage else ""))
    if code in _DENIED:
        return Refusal(f"AWS does not let the farm read the {one.noun}")
    if code in _WRONG:
        return Refusal(f"AWS refuses the {one.noun} ({code})")
    raise _away(error) from error


def _away(error: Exception) -> Unavailable:
    what = _code(error) if isinstance(error, ClientError) else str(error)
    return Unavailable(
        f"AWS could not be asked for secrets: {what[:300]}",
        hint="The API needs the network, and credentials as boto3 finds them.",
    )
