"""Where a token is not taken."""

import ssl

import pytest

from scheduler.providers.rest import Access, Later, Refused, Rest, is_metadata


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        ("169.254.169.254", True),
        ("169.254.170.2", True),
        ("::ffff:169.254.169.254", True),
        ("fe80::1%eth0", True),
        ("fd00:ec2::254", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("fd00::1", False),
        ("140.82.121.3", False),
    ],
)
def test_addresses_of_metadata_are_known(address: str, is_one: bool) -> None:
    assert is_metadata(address) is is_one


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "[::ffff:a9fe:a9fe]", "0xa9fea9fe", "2852039166"])
def test_no_token_goes_there_however_it_is_written(host: str) -> None:
    rest = Rest(Access(username="x", token="t"), ssl.create_default_context(), timeout_s=0.2)
    with pytest.raises((Refused, Later)) as told:
        rest.send("GET", f"http://{host}/repos/o/r", None, {})
    rest.close()
    assert isinstance(told.value, Refused), told.value
    assert "where no git server is" in told.value.why
