"""The keys of S3 where none are set: those that AWS gives to a role, which are others every few hours."""

import boto3
from botocore.exceptions import BotoCoreError
from minio.credentials.credentials import Credentials
from minio.credentials.providers import Provider

from millrace.errors import InvalidInput


class RoleKeys(Provider):
    """The keys of the role of a task, of an instance or of a profile, as boto3 finds them; fetched anew before they expire.

    What is signed with them is good until they expire, be that earlier than it says.
    """

    def __init__(self) -> None:
        """Raises InvalidInput where there are none."""
        try:
            self._found = boto3.session.Session().get_credentials()
        except BotoCoreError as error:
            raise _none(str(error)) from error
        if self._found is None:
            raise _none("AWS gives none to this machine")

    def retrieve(self) -> Credentials:
        """As minio's SDK asks for them, at each request. Raises OSError where AWS does not answer."""
        try:
            keys = self._found.get_frozen_credentials()
        except BotoCoreError as error:
            raise OSError(f"AWS gives no keys: {error}") from error
        return Credentials(keys.access_key, keys.secret_key, keys.token)


def _none(why: str) -> InvalidInput:
    return InvalidInput(
        f"an S3 store of AWS needs keys: {why}",
        hint="Give the task or instance a role, or set MILLRACE_STORE_ACCESS_KEY and MILLRACE_STORE_SECRET_KEY.",
    )
