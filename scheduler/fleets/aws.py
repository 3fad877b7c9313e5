"""AWS as the providers of fleets talk to it: clients with little patience, and its errors as ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
from botocore.loaders import Loader
from botocore.parsers import ResponseParserError

from millrace.errors import ProviderTrouble
from millrace.vocabulary import Trouble

_CONFIG: Final = Config(connect_timeout=3, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 3})
"""A scaler asks again in its next round: what does not answer holds it up no longer than this."""
_THROTTLED: Final = ("Throttl", "RequestLimitExceeded", "TooManyRequests", "SlowDown", "ScalingActivityInProgress")
_CAPACITY: Final = (
    "InsufficientInstanceCapacity",
    "InsufficientHostCapacity",
    "InsufficientReservedInstanceCapacity",
    "LimitExceeded",
    "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow",
    "RESOURCE:",
    "Capacity is unavailable",
    "limit on the number of",
)
_CREDENTIALS: Final = (
    "AccessDenied",
    "UnauthorizedOperation",
    "AuthFailure",
    "UnrecognizedClient",
    "InvalidClientToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "IncompleteSignature",
    "InvalidSignature",
    "MissingAuthentication",
    "ExpiredToken",
    "RequestExpired",
    "OptInRequired",
)
_KINDS: Final = ((Trouble.THROTTLED, _THROTTLED), (Trouble.CAPACITY, _CAPACITY), (Trouble.CREDENTIALS, _CREDENTIALS))
"""By what AWS says, in its code or else in its words: the first that fits counts."""
_HINTS: Final = {
    Trouble.CREDENTIALS: "The scheduler needs credentials as boto3 finds them, and a role that allows this call.",
    Trouble.MISSING: "Is what the fleet's provider names there, in this region and account?",
    Trouble.AWAY: "The scheduler needs the network, and the right region or endpointUrl.",
}


def client(service: str, region: str, endpoint_url: str | None = None) -> Any:
    """A client of one service. Credentials are found as boto3 finds them, at the first call. Raises ProviderTrouble."""
    with translated(f"{service} of {region}"):
        session = botocore.session.get_session()
        session.register_component("data_loader", _loader())
        made = boto3.session.Session(botocore_session=session)
        return made.client(service, region_name=region, endpoint_url=endpoint_url, config=_CONFIG)


@cache
def _loader() -> Loader:
    """What reads the descriptions of AWS's services, and keeps them: EC2's takes longer than many a call."""
    return botocore.session.get_session().get_component("data_loader")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Errors of AWS as ProviderTrouble; `what` says what was asked, for people: `the group NAME`."""
    try:
        yield
    except ClientError as error:
        said = error.response.get("Error", {})
        code, message = str(said.get("Code", "")), str(said.get("Message", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        raise trouble(what, code, message, refused=400 <= status < 500) from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError) as error:
        raise _trouble(Trouble.CREDENTIALS, what, str(error)) from error
    except (BotoCoreError, ResponseParserError, ValueError) as error:  # an answer that breaks off; an address that is none
        raise _trouble(Trouble.AWAY, what, str(error)) from error


def part_of(said: Mapping[str, Any], name: str, kind: type) -> Any:
    """A member that AWS never leaves out. Raises ProviderTrouble where it did: half an answer is none."""
    value = said.get(name)
    if not isinstance(value, kind):
        raise ProviderTrouble(Trouble.AWAY, f"AWS gave half an answer: it lacks {name}")
    return value


def trouble(what: str, code: str, message: str = "", *, refused: bool = True) -> ProviderTrouble:
    """What AWS answered, by its code or reason. `refused`: it found fault with the request, and so with what it names."""
    said = f"{code}: {message}" if message else code
    for kind, words in _KINDS:
        if any(word in said for word in words):
            return _trouble(kind, what, said)
    return _trouble(Trouble.MISSING if refused else Trouble.AWAY, what, said)


def _trouble(kind: Trouble, what: str, said: str) -> ProviderTrouble:
    return ProviderTrouble(kind, f"{what}: {said[:500]}", hint=_HINTS.get(kind, ""))
