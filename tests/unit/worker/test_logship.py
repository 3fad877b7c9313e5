"""The log shipper: every byte, in order, once, whatever the API does; memory stays bounded."""

import hashlib
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.chunks import Chunk
from millrace.contract import MAX_LOG_CHUNK_BYTES
from millrace.errors import AttemptFenced, TooLarge, Unavailable
from tests.support.farm import wait_until
from worker import logship
from worker.logship import LogShipper


def root_of(chunks: list[bytes]) -> str:
    """A log's root as docs/logs.md tells it, by other means than the code's."""
    lines, offset = "", 0
    for seq, data in enumerate(chunks):
        lines += f"{seq} {offset} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
        offset += len(data)
    return hashlib.sha256(lines.encode()).hexdigest()


class Api:
    """Takes chunks as the API does, and fails when told to."""

    def __init__(self, failures: int = 0) -> None:
        self.chunks: list[bytes] = []
        self.failures = failures
        self.fenced = False
        self.gate = threading.Event()
        self.gate.set()

    def take(self, chunk: Chunk, data: bytes) -> None:
        self.gate.wait()
        if self.fenced:
            raise AttemptFenced("over")
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        assert 0 < len(data) <= MAX_LOG_CHUNK_BYTES
        assert (chunk.seq, chunk.offset, chunk.size_bytes) == (len(self.chunks), sum(map(len, self.chunks)), len(data))
        assert chunk.sha256 == hashlib.sha256(data).hexdigest()
        self.chunks.append(data)


@given(
    st.lists(st.one_of(st.binary(max_size=2000), st.integers(0, 300_000).map(lambda size: b"." * size)), max_size=30),
    st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_what_is_written_arrives_whole(pieces: list[bytes], failures: int) -> None:
    api = Api(failures)
    shipper = LogShipper(api.take)
    shipper.start()
    for piece in pieces:
        shipper.write(piece)
    footer = shipper.close(10)
    whole = b"".join(pieces)
    assert b"".join(api.chunks) == whole
    assert footer.size_bytes == len(whole)
    assert footer.chunks == len(api.chunks)
    assert footer.sha256 == hashlib.sha256(whole).hexdigest()
    assert footer.root == root_of(api.chunks)


def test_a_write_larger_than_the_buffer_passes_through() -> None:
    api = Api()
    shipper = LogShipper(api.take)
    shipper.start()
    data = bytes(range(256)) * 100_000
    shipper.write(data)
    shipper.close(30)
    assert b"".join(api.chunks) == data


def test_an_api_that_takes_nothing_holds_the_writer_up_and_memory_down() -> None:
    api = Api()
    api.gate.clear()
    shipper = LogShipper(api.take)
    shipper.start()
    written = threading.Event()

    def write() -> None:
        for _ in range(64):
            shipper.write(b"x" * 1024 * 1024)
        written.set()

    threading.Thread(target=write, daemon=True).start()
    assert not written.wait(0.5)
    assert shipper._held == sum(map(len, shipper._pieces)) < logship._BUFFER_BYTES + logship._PIECE_BYTES
    api.gate.set()
    assert written.wait(30)
    assert shipper.close(30).size_bytes == 64 * 1024 * 1024


def test_after_a_fence_nothing_is_sent_and_nobody_waits() -> None:
    api = Api()
    api.fenced = True
    shipper = LogShipper(api.take)
    shipper.start()
    shipper.write(b"first")
    began = time.monotonic()
    for _ in range(20):
        shipper.write(b"x" * 1024 * 1024)
    footer = shipper.close(5)
    assert time.monotonic() - began < 5
    assert (api.chunks, footer.chunks) == ([], 0)


def test_a_close_that_cannot_send_all_says_what_was_written() -> None:
    api = Api()
    api.gate.clear()
    shipper = LogShipper(api.take)
    shipper.start()
    shipper.write(b"lost")
    footer = shipper.close(0.3)
    assert (footer.chunks, footer.size_bytes, api.chunks) == (1, 4, [])
    assert footer.root == root_of([b"lost"])
    api.gate.set()


def test_a_chunk_whose_answer_was_lost_is_sent_again_as_it_was() -> None:
    """Else the API, which has it, would find other bytes under its number, and take no more of the log."""
    taken: list[tuple[int, int, bytes]] = []
    more = threading.Event()

    def take(chunk: Chunk, data: bytes) -> None:
        taken.append((chunk.seq, chunk.offset, data))
        if len(taken) == 1:
            more.wait(10)
            raise Unavailable("taken, and the answer is lost")

    shipper = LogShipper(take)
    shipper.start()
    shipper.write(b"first")
    wait_until(lambda: bool(taken))
    shipper.write(b"second")
    more.set()
    footer = shipper.close(10)
    assert taken == [(0, 0, b"first"), (0, 0, b"first"), (1, 5, b"second")]
    assert (footer.chunks, footer.root) == (2, root_of([b"first", b"second"]))


def test_what_is_still_on_its_way_at_the_close_may_arrive_later_and_fit_the_root() -> None:
    api = Api()
    api.gate.clear()
    shipper = LogShipper(api.take)
    shipper.start()
    shipper.write(b"on its way")
    wait_until(lambda: not shipper._pieces)
    shipper.write(b"x" * (2 * MAX_LOG_CHUNK_BYTES + 1))
    footer = shipper.close(0.1)
    api.gate.set()
    wait_until(lambda: len(api.chunks) == 4)
    assert (footer.chunks, footer.root) == (4, root_of(api.chunks))


def test_a_log_that_is_refused_has_no_root() -> None:
    def refuse(_chunk: Chunk, _data: bytes) -> None:
        raise TooLarge("full")

    shipper = LogShipper(refuse)
    shipper.start()
    shipper.write(b"lost")
    wait_until(lambda: shipper._given_up)
    shipper.write(b" too")
    footer = shipper.close(5)
    assert (footer.chunks, footer.size_bytes, footer.root) == (0, 8, None)
    assert footer.sha256 == hashlib.sha256(b"lost too").hexdigest()


def test_a_log_that_comes_byte_by_byte_takes_no_more_memory_than_its_bytes() -> None:
    api = Api()
    api.gate.clear()
    shipper = LogShipper(api.take)
    shipper.start()
    for _ in range(300_000):
        shipper.write(b"\n")
    assert len(shipper._pieces) <= 2
    api.gate.set()
    footer = shipper.close(30)
    assert b"".join(api.chunks) == b"\n" * 300_000
    assert footer.root == root_of(api.chunks)
