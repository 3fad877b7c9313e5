"""Which source locations are taken. Grammar only: nothing is fetched here."""

from pathlib import Path

import pytest

from buildenv.source import check_location
from millrace.errors import InvalidInput
from millrace.project import ProjectSource
from millrace.vocabulary import SourceType


def source(location: str, kind: SourceType = SourceType.GIT) -> ProjectSource:
    return ProjectSource(type=kind, location=location)


@pytest.mark.parametrize(
    "location",
    [
        "https://github.com/o/r.git",
        "https://git.example.com:8443/team/r",
        "https://10.0.0.5/r.git",
        "https://[2001:db8::5]/r.git",
        "https://[fd12:3456::1]:8443/r.git",
        "http://localhost:3000/r.git",
        "http://127.0.0.1:3000/r.git",
        "http://[::1]:3000/r.git",
        "ssh://git@git.example.com/r.git",
        "ssh://git@192.168.1.7:2222/~me/r.git",
        "ssh://git.internal/r.git",
        "git@github.com:o/r.git",
        "git@host-1.example.com:/srv/git/r.git",
        "me@host:~/r.git",
    ],
)
def test_honest_locations_are_taken(location: str) -> None:
    check_location(source(location), ())
    if not location.startswith("/"):
        check_location(source(location, SourceType.GITHUB_ENTERPRISE), ())


HOSTILE = [
    "ext::sh -c touch% /tmp/pwned",
    "ext::sh",
    "fd::17",
    "file:///etc",
    "file://localhost/etc",
    "git://git.example.com/r.git",
    "ftp://git.example.com/r.git",
    "http://git.example.com/r.git",
    "http://localhost.example.com/r.git",
    "-oProxyCommand=touch /tmp/pwned",
    "--upload-pack=touch",
    "-u@host:path",
    "ssh://-oProxyCommand=x/r.git",
    "ssh://-oProxyCommand=x@host/r.git",
    "git@-oProxyCommand=x:r.git",
    "git@host:-r.git",
    "https://git.example.com/r.git\n--upload-pack=x",
    "https://git.example.com/r .git",
    "https://git.example.com/\x00r",
    "https://",
    "https://git.example.com",
    "https://git.example.com/",
    "https://git.example.com:99999/r",
    "https://git.example.com:port/r",
    "https://[::1/r",
    "https://exa$mple.com/r",
    "https://.example.com/r",
    "https://example.com./r",
    "host:path",
    "r.git",
    "../r.git",
    "./r.git",
    "",
]


@pytest.mark.parametrize("location", HOSTILE)
def test_hostile_locations_are_refused(location: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_location(ProjectSource.model_construct(type=SourceType.GIT, location=location), (Path("/"),))
    assert caught.value.hint


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.43518",
        "169.16689406",
        "2852039166",
        "0xA9FEA9FE",
        "0xa9.0xfe.0xa9.0xfe",
        "0251.0376.0251.0376",
        "169.254.0xa9.0376",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "[FD00:EC2:0:0::254]",
        "[::ffff:169.254.169.254]",
        "[::ffff:a9fe:a9fe]",
        "0.0.0.0",  # noqa: S104  # a location, not a listener
        "0",
        "[::]",
        "224.0.0.1",
        "[ff02::1]",
        "169.254.169.254.",
    ],
)
def test_addresses_of_no_git_server_are_refused_however_they_are_written(host: str) -> None:
    locations = [f"https://{host}/r.git", f"ssh://git@{host}/r.git", f"https://{host}:8443/r.git"]
    locations += [] if "[" in host else [f"git@{host}:r.git"]
    for location in locations:
        with pytest.raises(InvalidInput):
            check_location(source(location), ())


@pytest.mark.parametrize(
    "location",
    [
        "https://me:s3cr3t@git.example.com/r.git",
        "https://s3cr3t@git.example.com/r.git",
        "ssh://git:s3cr3t@git.example.com/r.git",
        "ftp://me:s3cr3t@git.example.com/r.git",
        "https://me:s3cr3t@git.example.com:99999/r.git",
        "https://me:s3cr3t@/r.git",
        "https://me:s3cr3t@git.example.com/r .git",
        "https://me:s3@cr3t@git.example.com:x/",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(location: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_location(source(location), ())
    assert "cr3t" not in f"{caught.value.message} {caught.value.hint}"


def test_local_paths_are_taken_only_below_what_the_operator_allows(tmp_path: Path) -> None:
    roots = (tmp_path / "git",)
    (tmp_path / "git").mkdir()
    (tmp_path / "git" / "out").symlink_to("/etc")
    check_location(source(f"{tmp_path}/git/r.git"), roots)
    for path in ("git/out", "git/../other", "gitx", "other", "git/out/../../etc"):
        with pytest.raises(InvalidInput, match="MILLRACE_GIT_ROOTS"):
            check_location(source(f"{tmp_path}/{path}"), roots)
    with pytest.raises(InvalidInput, match="MILLRACE_GIT_ROOTS"):
        check_location(source(f"{tmp_path}/git/r.git"), ())
    with pytest.raises(InvalidInput):
        check_location(source(f"{tmp_path}/git/r.git", SourceType.GITHUB), roots)


@pytest.mark.parametrize("location", ["bucket/a/b.zip", "s3://bucket/b.zip", "arn:aws:s3:::bucket/b.zip"])
def test_objects_are_named_by_bucket_and_key(location: str) -> None:
    check_location(source(location, SourceType.S3), ())


@pytest.mark.parametrize("location", ["bucket/folder/", "bucket/../other/x", "Bad_Bucket/x", ".meta/x", "bucket/a\n", "b/x"])
def test_objects_with_odd_names_are_refused(location: str) -> None:
    with pytest.raises(InvalidInput):
        check_location(source(location, SourceType.S3), ())


def test_no_source_needs_no_location() -> None:
    check_location(ProjectSource(type=SourceType.NO_SOURCE), ())
