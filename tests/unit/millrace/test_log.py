"""The farm's own log tells where a fault was, and no values: they may be secrets."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from millrace import log

def broken(token):
    raise ZeroDivisionError("by zero")

log.configure(sys.argv[1])
try:
    broken("mr_pat_" + "secret"[::-1])
except ZeroDivisionError as error:
    log.get_logger("x").error("request.bug", id="17", exc_info=error)
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_local_values(form: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, form], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    for word in ("request.bug", "ZeroDivisionError", "by zero", "in broken"):
        assert word in done.stderr, done.stderr
    assert "terces" not in done.stderr
