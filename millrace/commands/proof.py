"""Whether a log is whole, computed anew by the client from what it is given: bytes, list of chunks, and the worker's footer."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from millrace.chunks import Unsound, compare, read_list
from millrace.client import Client
from millrace.errors import Conflict


def verify(client: Client, build_id: str, attempt: int | None) -> tuple[bool, str]:
    """Whether an ended attempt's log is whole, and one line that says so or names what is not.

    Raises Conflict where the attempt goes on, NotFound where an older release kept no list.
    """
    footer = client.log_footer(build_id, attempt)
    number = footer["attempt"]
    if not footer["ended"]:
        raise Conflict(f"the log of {build_id} goes on", hint="Verify it when the attempt has ended; --follow waits for that.")
    if number == 0:
        return True, f"whole: {build_id} was never begun, and has no log"
    written, stored = footer["written"], footer["stored"]
    lines = client.log_list(build_id, number)
    try:
        with closing(client.log_text(build_id, number)) as pieces:
            tally, sha256 = compare(read_list(lines), _Start(pieces, stored["bytes"]).read)
    except Unsound as problem:
        return False, f"not whole: {problem}"
    came = f"{tally.size_bytes} bytes, {tally.chunks} chunks, root {tally.root}"
    if footer["gap"] is not None:
        return False, f"not whole: {footer['gap']['says']}; before that: {came}"
    if written is None:  # ended under a release that did not keep it
        return _against(came, {"root": (tally.root, stored["root"])}, "counted when the attempt ended")
    said = {"bytes": (tally.size_bytes, written["bytes"]), "sha256": (sha256, written["sha256"])}
    if written["root"] is not None:  # the last release's worker knows none; the SHA-256 of the whole says as much
        said["root"] = (tally.root, written["root"])
    return _against(came, said, "what its worker wrote")


def _against(came: str, said: dict[str, tuple[Any, Any]], what: str) -> tuple[bool, str]:
    for name, (found, wanted) in said.items():
        if found != wanted:
            return False, f"not whole: {name} {found} is not {what}: {wanted}; {came}"
    return True, f"whole: {came}"


class _Start:
    """The first `size_bytes` of a stream of pieces, as a file. What is behind them is the line that tells of a gap."""

    def __init__(self, pieces: Iterator[bytes], size_bytes: int) -> None:
        self._pieces, self._left = pieces, size_bytes
        self._rest = b""

    def read(self, size: int) -> bytes:
        """As a file's `read`; may give less."""
        if not self._rest:
            self._rest = next(self._pieces, b"")
        data, self._rest = self._rest[: min(size, self._left)], self._rest[size:]
        self._left -= len(data)
        return data
