"""The log shipper: every byte, in order, once, whatever the API does; memory stays bounded."""

import hashlib
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.contract import MAX_LOG_CHUNK_BYTES
from millrace.errors import AttemptFenced, Unavailable
from worker import logship
from worker.logship import LogShipper


class Api:
    """Takes chunks as the API does, and fails when told to."""

    def __init__(self, failures: int = 0) -> None:
        self.chunks: list[bytes] = []
        self.failures = failures
        self.fenced = False
        self.gate = threading.Event()
        self.gate.set()

    def take(self, seq: int, offset: int, data: bytes) -> None:
        self.gate.wait()
        if self.fenced:
            raise AttemptFenced("over")
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        assert 0 < len(data) <= MAX_LOG_CHUNK_BYTES
        assert (seq, offset) == (len(self.chunks), sum(map(len, self.chunks)))
        self.chunks.append(data)


@given(st.lists(st.binary(max_size=2000), max_size=30), st.integers(0, 3))
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
    assert len(shipper._buffer) <= logship._BUFFER_BYTES
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
    assert (footer.chunks, footer.size_bytes) == (0, 4)
    api.gate.set()
