"""Archives that nobody vouches for. Each hostile one is made here, and a tree outside must look the same after it."""

import bz2
import gzip
import hashlib
import io
import os
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from buildenv.archive import Limits, is_odd_name, stays_inside, unpack
from millrace.errors import BuildProblem, InfraProblem
from millrace.vocabulary import Reason


class Place:
    """A folder to unpack into, next to a tree that must not change."""

    def __init__(self, top: Path) -> None:
        self.dest = top / "outer" / "src"
        self.archive = top / "archive"
        self.outside = top / "outer"
        (self.outside / "sentinel").mkdir(parents=True)
        (self.outside / "flag").write_text("as it was")
        (self.outside / "sentinel" / "passwd").write_text("root:x")
        (top / "flag").write_text("as it was")
        self.top = top

    def seen_outside(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.top.rglob("*")):
            if path.is_relative_to(self.dest) or path == self.archive:
                continue
            digest.update(f"{path} {path.lstat().st_mode}".encode())
            if path.is_file():
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def refuses(self, data: bytes, limits: Limits | None = None) -> BuildProblem:
        """Unpack, and be refused with nothing changed outside."""
        before = self.seen_outside()
        self.archive.write_bytes(data)
        with pytest.raises(BuildProblem) as caught:
            unpack(self.archive, self.dest, limits=limits)
        assert caught.value.reason is Reason.BAD_SOURCE
        assert "source archive" in caught.value.message
        assert len(caught.value.message) < 1000
        assert self.seen_outside() == before
        return caught.value

    def takes(self, data: bytes, limits: Limits | None = None) -> int:
        """Unpack; how many entries."""
        before = self.seen_outside()
        self.archive.write_bytes(data)
        count = unpack(self.archive, self.dest, limits=limits)
        assert self.seen_outside() == before
        return count

    def written(self) -> dict[str, str]:
        """What lies in `dest`: path -> content or link."""
        return {
            p.relative_to(self.dest).as_posix(): f"-> {os.readlink(p)}" if p.is_symlink() else p.read_text()
            for p in sorted(self.dest.rglob("*"))
            if p.is_symlink() or p.is_file()
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


type_of = {
    "dir": tarfile.DIRTYPE,
    "sym": tarfile.SYMTYPE,
    "lnk": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "chr": tarfile.CHRTYPE,
    "blk": tarfile.BLKTYPE,
}


def tar(*entries: tuple[str, str, str] | tuple[str, bytes] | tuple[str, bytes, int], packed: bool = False) -> bytes:
    """A tar of (name, kind, link) or (name, content[, mode])."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if packed else "w") as file:
        for entry in entries:
            info = tarfile.TarInfo(entry[0])
            info.mtime = 1_700_000_000
            if isinstance(entry[1], bytes):
                info.mode = entry[2] if len(entry) > 2 else 0o644  # type: ignore[misc, assignment]
                info.size = len(entry[1])
                file.addfile(info, io.BytesIO(entry[1]))
            else:
                info.type, info.linkname = type_of[entry[1]], str(entry[2])
                file.addfile(info)
    return out.getvalue()


def zipped(*entries: tuple[str, bytes] | tuple[str, bytes, int], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of (name, content[, unix mode])."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for entry in entries:
            info = zipfile.ZipInfo("x", (2023, 11, 14, 22, 13, 20))
            info.filename = entry[0]
            info.compress_type = method
            info.create_system = 3
            info.external_attr = (entry[2] if len(entry) > 2 else 0) << 16
            file.writestr(info, entry[1])
    return out.getvalue()


LINK = stat.S_IFLNK | 0o777


@pytest.mark.parametrize("form", ["zip", "zip-stored", "tar", "tar.gz", "zip-bzip2", "zip-lzma"])
def test_honest_archives_are_known_by_their_content(place: Place, form: str) -> None:
    files = (("buildspec.yml", b"version: 0.2\n"), ("src/deep/a.py", b"print()\n"), ("ü/日本.txt", b"x"), ("empty", b""))
    data = {
        "zip": zipped(*files),
        "zip-stored": zipped(*files, method=zipfile.ZIP_STORED),
        "zip-bzip2": zipped(*files, method=zipfile.ZIP_BZIP2),
        "zip-lzma": zipped(*files, method=zipfile.ZIP_LZMA),
        "tar": tar(*files),
        "tar.gz": tar(*files, packed=True),
    }[form]
    assert place.takes(data) == 4
    assert place.written() == {name: content.decode() for name, content in files}
    assert (place.dest / "empty").stat().st_mtime == 1_700_000_000, "times are kept, for make"


def test_folders_links_inside_and_the_right_to_run_are_kept(place: Place) -> None:
    data = tar(
        ("./", "dir", ""),
        ("./bin", "dir", ""),
        ("./bin/run", b"#!/bin/sh\n", 0o4755),
        ("./bin/plain", b"x", 0o666),
        ("lib/a/link", "sym", "../../bin/run"),
        ("top", "sym", "lib/a"),
        ("dangling", "sym", "not/there"),
        ("none", "dir", ""),
    )
    assert place.takes(data) == 5
    assert (place.dest / "lib/a/link").resolve() == place.dest / "bin/run"
    assert stat.S_IMODE((place.dest / "bin/run").stat().st_mode) == 0o755, "no setuid"
    assert stat.S_IMODE((place.dest / "bin/plain").stat().st_mode) == 0o644
    assert (place.dest / "none").is_dir()


def test_a_zip_keeps_the_right_to_run_and_links(place: Place) -> None:
    data = zipped(
        ("gradlew", b"#!/bin/sh\n", stat.S_IFREG | 0o755),
        ("setuid", b"x", stat.S_IFREG | 0o6711),
        ("plain", b"x", stat.S_IFREG | 0o600),
        ("from-windows", b"x"),
        ("folder/", b"", stat.S_IFDIR | 0o700),
        ("folder/link", b"../plain", LINK),
    )
    assert place.takes(data) == 5
    modes = {name: stat.S_IMODE((place.dest / name).stat().st_mode) for name in ("gradlew", "setuid", "plain", "from-windows")}
    assert modes == {"gradlew": 0o755, "setuid": 0o755, "plain": 0o644, "from-windows": 0o644}
    assert os.readlink(place.dest / "folder/link") == "../plain"


def test_of_a_file_that_stands_twice_the_last_one_counts(place: Place) -> None:
    place.takes(tar(("a", b"first"), ("b", "sym", "a"), ("a", b"last"), ("b", "sym", "c")))
    assert place.written() == {"a": "last", "b": "-> c"}


def test_days_that_do_not_exist_are_no_damage(place: Place) -> None:
    data = bytearray(zipped(("a", b"x")))
    central = data.rfind(b"PK\x01\x02")
    data[central + 12 : central + 16] = b"\0\0\0\0"
    assert place.takes(bytes(data)) == 1


NAMES = [
    "../flag",
    "/etc/x",
    "a/../../flag",
    "..",
    "a/..",
    "C:/x",
    "..\\flag",
    "a\\b",
    "x\ny",
    "x\x1b[2J",
    "n" * 256,
    "d/" * 65 + "x",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(place: Place, name: str) -> None:
    for data in (tar(("ok", b"x"), (name, b"evil")), zipped(("ok", b"x"), (name, b"evil"))):
        place.refuses(data)
        assert place.written() == {}, "judged before anything was written"


def test_a_path_is_no_longer_than_the_system_takes(place: Place) -> None:
    place.refuses(tar(("/".join(["x" * 200] * 21), b"")))


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "..", "../flag", "a/../../flag", "./../flag", "x/..", "", "../" * 40 + "etc/passwd", "y" * 4096],
)
def test_links_that_lead_out_are_refused(place: Place, target: str) -> None:
    place.refuses(tar(("ok", b"x"), ("link", "sym", target)))
    if target:
        place.refuses(zipped(("ok", b"x"), ("link", target.encode(), LINK)))
    assert place.written() == {}


def test_nothing_is_written_through_a_link(place: Place) -> None:
    for target in ("sentinel", "inside"):
        place.refuses(tar(("inside/x", b""), ("link", "sym", target), ("link/passwd", b"evil")))
        place.refuses(tar(("link/passwd", b"evil"), ("link", "sym", target)))
        place.refuses(zipped(("link", target.encode(), LINK), ("link/passwd", b"evil")))
    place.refuses(tar(("a", "sym", "b"), ("a", b"evil")))
    place.refuses(tar(("a", b"file"), ("a/b", b"evil")))
    place.refuses(tar(("a/b", b"x"), ("a", b"evil")))
    place.refuses(tar(("a", "dir", ""), ("a", b"evil")))


def test_nothing_is_written_through_a_link_that_was_there_before(place: Place) -> None:
    place.dest.mkdir()
    (place.dest / "link").symlink_to(place.outside / "sentinel")
    (place.dest / "file").symlink_to(place.outside / "flag")
    place.refuses(tar(("link/passwd", b"evil")))
    assert place.takes(tar(("file", b"new"))) == 1
    assert not (place.dest / "file").is_symlink()


def test_the_long_chain_of_cve_2025_4517_is_refused(place: Place) -> None:
    """The public pattern: a path of links that grows beyond PATH_MAX, so that realpath gives up, then a way up and out."""
    entries: list[tuple[str, str, str] | tuple[str, bytes]] = []
    long = "d" * 247
    path = ""
    for step in "abcdefghijklmnop":
        entries += [(f"{path}{long}", "dir", ""), (f"{path}{step}", "sym", long)]
        path += f"{long}/"
    chain = "/".join("abcdefghijklmnop")
    entries += [
        (f"{chain}/{'l' * 254}", "sym", "../" * 16),
        ("escape", "sym", f"{chain}/{'l' * 254}/../../outer"),
        ("flaglink", "lnk", "escape/flag"),
        ("flaglink", b"overwritten"),
    ]
    place.refuses(tar(*entries))
    assert (place.outside / "flag").read_text() == "as it was"


def test_chains_of_honest_links_never_resolve_outside(place: Place) -> None:
    """Whatever passes the rule for links stays inside, however it is chained (the rule of `stays_inside`, tried at random)."""
    chance = random.Random(4517)
    for turn in range(60):
        dest = place.top / f"turn{turn}" / "a" / "b" / "src"
        entries: list[tuple[str, str, str] | tuple[str, bytes]] = []
        for number in range(12):
            folder = "/".join(chance.choices("pqr", k=chance.randint(0, 3)))
            target = "../" * chance.randint(0, 3) + "/".join(chance.choices(["p", "q", "r", "l0", "l1", "l2", "l3"], k=3))
            depth = len(folder.split("/")) if folder else 0
            if stays_inside(target, depth):
                entries.append((f"{folder}/l{number % 4}".lstrip("/"), "sym", target))
        entries += [(f"{'/'.join(chance.choices('pqr', k=3))}/f", b"x")]
        place.archive.write_bytes(tar(*entries))
        try:
            unpack(place.archive, dest)
        except BuildProblem:
            continue
        for path in dest.rglob("*"):
            try:
                assert path.resolve(strict=True).is_relative_to(dest)
            except (OSError, RuntimeError):  # dangling, or a circle
                continue


@pytest.mark.parametrize("kind", ["lnk", "fifo", "chr", "blk"])
def test_hard_links_and_devices_are_refused(place: Place, kind: str) -> None:
    problem = place.refuses(tar(("ok", b"x"), ("odd", kind, "ok")))
    assert "'odd'" in problem.message
    assert place.written() == {}


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_a_zip_has_no_devices(place: Place, kind: int) -> None:
    place.refuses(zipped(("odd", b"", kind | 0o644)))


def test_more_entries_than_allowed_are_refused(place: Place) -> None:
    files = [(f"f{number}", b"") for number in range(101)]
    few = Limits(entries=100)
    for data in (tar(*files), tar(*files, packed=True), zipped(*files), tar(*[("./", "dir", "")] * 101)):
        assert "more than 100 entries" in place.refuses(data, few).message
    assert place.takes(zipped(*files[:100]), few) == 100


def test_too_many_entries_are_found_before_the_zip_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zipped(*[(f"f{number}", b"") for number in range(101)])

    def never(*_: object) -> None:
        raise AssertionError("the list was read whole")

    monkeypatch.setattr(zipfile, "ZipFile", never)
    place.refuses(data, Limits(entries=100))
    place.refuses(data[:-2] + b"\x04\0note", Limits(entries=100))


def test_a_zip_with_more_entries_than_16_bits_count_works(place: Place) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for number in range(65_600):
            file.writestr(f"{number % 200}/{number}", b"")
    place.archive.write_bytes(out.getvalue())
    with pytest.raises(BuildProblem, match="more than 65599 entries"):
        unpack(place.archive, place.dest, limits=Limits(entries=65_599))
    assert not place.dest.exists()


def test_bombs_are_refused(place: Place) -> None:
    zeros = bytes(80 * 1024**2)
    limit = Limits(total_bytes=10 * 1024**2)
    for data in (zipped(("bomb", zeros)), tar(("bomb", zeros), packed=True)):
        assert "unpacks to more than" in place.refuses(data).message, "1000:1"
        assert "unpacks to more than" in place.refuses(data, limit).message
    small = zeros[: 11 * 1024**2]
    for data in (zipped(("bomb", small)), tar(("bomb", small)), tar(("bomb", small), packed=True)):
        assert "unpacks to more than" in place.refuses(data, limit).message
    assert place.written() == {}


def test_a_zip_whose_files_lie_on_one_another_is_a_bomb(place: Place) -> None:
    """Many entries of the list point at one body (the trick of overlapping files)."""
    one = zipped(("a", bytes(8 * 1024**2)))
    central = one.rfind(b"PK\x01\x02")
    end = one.rfind(b"PK\x05\x06")
    entries = one[central:end] * 2000
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2000, 2000, len(entries), central, 0)
    place.refuses(one[:central] + entries + record)


def test_a_file_larger_than_it_says_is_refused(place: Place) -> None:
    data = bytearray(zipped(("a", b"x" * 1000)))
    central = data.rfind(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<L", 10)
    place.refuses(bytes(data))


def test_a_header_that_asks_for_much_memory_is_refused(place: Place) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.SOLARIS_XHDTYPE):
        info = tarfile.TarInfo("header")
        info.type, info.size = kind, 50 * 1024**2
        data = info.tobuf(tarfile.USTAR_FORMAT) + bytes(50 * 1024**2)
        assert "header" in place.refuses(gzip.compress(data, 1)).message


def test_sparse_files_are_refused(place: Place) -> None:
    info = tarfile.TarInfo("sparse")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"17777777777\0"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    problem = place.refuses(bytes(header) + bytes(1024))
    assert "sparse" in problem.message


def test_what_is_no_archive_says_so(place: Place) -> None:
    assert "empty" in place.refuses(b"").message
    assert "neither zip nor tar" in place.refuses(b"hello world, this is text").message
    assert "neither zip nor tar" in place.refuses(bytes(10_240)).message
    assert "zstd" in place.refuses(b"\x28\xb5\x2f\xfd" + bytes(100)).message
    assert "neither zip nor tar" in place.refuses(bz2.compress(b"x" * 100)).message
    place.refuses(gzip.compress(b"no tar at all"))
    assert "empty" in place.refuses(gzip.compress(b"")).message
    place.refuses(b"\x1f\x8b" + b"garbage that is no gzip")
    place.refuses(b"PK\x03\x04" + b"garbage that is no zip")


def test_an_encrypted_zip_is_refused(place: Place) -> None:
    data = bytearray(zipped(("secret", b"x" * 50)))
    data[6] |= 1
    central = data.rfind(b"PK\x01\x02")
    data[central + 8] |= 1
    assert "encrypted" in place.refuses(bytes(data)).message


def test_a_damaged_byte_in_a_file_is_found(place: Place) -> None:
    data = bytearray(zipped(("a", b"some content " * 10), method=zipfile.ZIP_STORED))
    data[60] ^= 1
    place.refuses(bytes(data))
    packed = bytearray(tar(("a", random.Random(1).randbytes(5000)), packed=True))
    packed[2000] ^= 1
    place.refuses(bytes(packed))


def test_a_tar_that_breaks_off_is_never_taken_for_a_smaller_one(place: Place) -> None:
    whole = tar(("a", b"x" * 600), ("b", b"y" * 600), ("c", b"z" * 600))
    for length in range(1, 3 * (512 + 1024) + 1, 256):
        place.refuses(whole[:length])
        place.refuses(gzip.compress(whole[:length]))
    packed = gzip.compress(whole)
    for length in range(1, len(packed) - 1, 7):
        place.refuses(packed[:length])
    damaged = bytearray(whole)
    damaged[2 * (512 + 1024) + 3] ^= 0xFF  # the header of c: tarfile alone would stop there, and say nothing
    assert "damaged" in place.refuses(bytes(damaged)).message


def test_a_gzip_may_have_members_padding_and_much_air(place: Place) -> None:
    for size in (4 * 1024**2 - 3 * 512, 4 * 1024**2, 12_345_678):
        whole = tar(("zeros", bytes(size)), ("a", b"x"))
        halves = gzip.compress(whole[:700]) + bytes(600) + gzip.compress(whole[700:], 9) + bytes(2 * 1024**2)
        for data in (gzip.compress(whole, 9), gzip.compress(whole, 1), halves):
            assert place.takes(data) == 2
            assert (place.dest / "zeros").stat().st_size == size


def test_a_full_disk_is_the_farms_fault(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.archive.write_bytes(tar(("a", b"x")))
    place.dest.parent.joinpath("src").write_text("a file where the folder should be")
    with pytest.raises(InfraProblem) as caught:
        unpack(place.archive, place.dest)
    assert caught.value.reason is Reason.STORAGE


@pytest.mark.parametrize(
    "make", [lambda f: tar(*f), lambda f: tar(*f, packed=True), lambda f: zipped(*f)], ids=["tar", "gz", "zip"]
)
def test_random_damage_is_refused_or_harmless_and_never_a_fault_of_ours(place: Place, make: Callable[..., bytes]) -> None:
    chance = random.Random(20_260_612)
    good = make([(f"d{n}/file{n}", bytes([65 + n]) * 300) for n in range(5)])
    before = place.seen_outside()
    for turn in range(400):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if turn % 5 == 0:
            del data[chance.randrange(len(data)) :]
        place.archive.write_bytes(data)
        try:
            unpack(place.archive, place.top / "fuzz" / f"{turn}")
        except BuildProblem as problem:
            assert problem.reason is Reason.BAD_SOURCE
    for left in sorted((place.top / "fuzz").rglob("*"), reverse=True):
        assert left.resolve().is_relative_to(place.top / "fuzz")
        left.rmdir() if left.is_dir() and not left.is_symlink() else left.unlink()
    (place.top / "fuzz").rmdir()
    assert place.seen_outside() == before


def test_the_rules_for_names_and_links_on_their_own() -> None:
    assert not any(map(is_odd_name, ["a", "a/b c", "a:b", "ü", ".x", "-rf", "C:x"]))
    assert all(map(is_odd_name, ["/a", "a\\b", "C:/x", "a\0", "a\tb"]))
    assert all([stays_inside("a", 0), stays_inside("../a", 1), stays_inside(".././../a", 2), stays_inside("..", 1)])
    assert not any([stays_inside("..", 0), stays_inside("../..", 1), stays_inside("a/..", 5), stays_inside("", 1)])
