"""Whether a delivery comes from who has the webhook's secret: over the raw bytes, in constant time, before anything is read.

Every secret that is valid is tried, so that the time taken does not tell which one it was.
"""

import base64
import binascii
import hmac
from collections.abc import Sequence
from typing import Final

from werkzeug.datastructures import Headers

from millrace.errors import Unauthenticated
from millrace.webhook import Provider

_PREFIX: Final = "whsec_"


def check(provider: Provider, headers: Headers, body: bytes, secrets: Sequence[str]) -> None:
    """Raises Unauthenticated unless the delivery is signed with one of `secrets`."""
    {
        Provider.GITHUB: _check_github,
        Provider.BITBUCKET: _check_bitbucket,
        Provider.GITLAB: _check_gitlab,
        Provider.GIT: _check_standard,
    }[provider](headers, body, secrets)


def standard(secret: str, ident: str, timestamp: str, body: bytes) -> str:
    """The signature of Standard Webhooks, version 1, which GitLab and our own script use: `v1,<base64>`."""
    signed = f"{ident}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(_key(secret), signed, 'sha256')).decode()}"


def _check_github(headers: Headers, body: bytes, secrets: Sequence[str]) -> None:
    given = headers.get("X-Hub-Signature-256", "")
    if not given and headers.get("X-Hub-Signature"):
        raise _refused("the delivery is signed with SHA-1 alone, which proves nothing any more: X-Hub-Signature-256 is missing")
    _check_hub("X-Hub-Signature-256", given, body, secrets)


def _check_bitbucket(headers: Headers, body: bytes, secrets: Sequence[str]) -> None:
    _check_hub("X-Hub-Signature", headers.get("X-Hub-Signature", ""), body, secrets)


def _check_hub(header: str, given: str, body: bytes, secrets: Sequence[str]) -> None:
    if not given:
        raise _refused(f"the delivery is not signed: {header} is missing")
    _check_any(given, [f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}" for secret in secrets])


def _check_gitlab(headers: Headers, body: bytes, secrets: Sequence[str]) -> None:
    if headers.get("webhook-signature"):
        _check_standard(headers, body, secrets)
    elif headers.get("X-Gitlab-Token"):
        _check_any(headers["X-Gitlab-Token"], secrets)
    else:
        raise _refused("the delivery is not signed: webhook-signature and X-Gitlab-Token are missing")


def _check_standard(headers: Headers, body: bytes, secrets: Sequence[str]) -> None:
    """The timestamp is signed but not judged: a delivery's id is signed as well and remembered for good, so that an old one does
    nothing twice, and a server whose clock is wrong is heard all the same.
    """
    ident, timestamp, given = (headers.get(f"webhook-{part}", "") for part in ("id", "timestamp", "signature"))
    if not (ident and timestamp and given):
        raise _refused("the delivery is not signed: webhook-id, webhook-timestamp or webhook-signature is missing")
    expected = [standard(secret, ident, timestamp, body) for secret in secrets]
    for one in given.split(" ")[:10]:
        if _is_any(one, expected):
            return
    raise _wrong()


def _check_any(given: str, expected: Sequence[str]) -> None:
    if not _is_any(given, expected):
        raise _wrong()


def _is_any(given: str, expected: Sequence[str]) -> bool:
    found = [hmac.compare_digest(given.encode(errors="replace"), one.encode()) for one in expected]
    return any(found)


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return secret.encode()


def _wrong() -> Unauthenticated:
    return _refused("the signature is wrong: the delivery was signed with another secret, or was altered on its way")


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(
        why,
        hint="Set the webhook's secret at the git server to the one of this project; 'millrace webhook rotate' makes a new one.",
    )
