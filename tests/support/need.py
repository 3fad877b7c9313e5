"""A service that a test needs and that is not here: skipped on a laptop, a failure in CI."""

import os
from typing import NoReturn

import pytest


def missing(what: str, hint: str) -> NoReturn:
    """Skip this test, or fail it where CI=true: there, everything has to be."""
    message = f"{what} is not here; {hint}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)
