"""A build's log: the farm's own lines in CodeBuild's form, and the commands' output as it comes, with the secrets hidden."""

from collections.abc import Callable, Iterable
from typing import Final

from buildenv.redact import Redactor
from millrace import clock

_TAIL_BYTES: Final = 64 * 1024


class BuildLog:
    """`send` takes the bytes of the log in order. One thread writes."""

    def __init__(self, send: Callable[[bytes], None], first_output: Callable[[], None]) -> None:
        self._send, self._first_output = send, first_output
        self._secrets: tuple[str, ...] = ()
        self._redactor = Redactor(())
        self._last = b"\n"
        self._after_output = False
        self._tail = bytearray()

    def hide(self, secrets: Iterable[str]) -> None:
        """Show `secrets` as `***` from here on, too; before anything that may write them runs."""
        self.end()
        self._secrets += tuple(secrets)
        self._redactor = Redactor(self._secrets)

    def hidden(self, text: str) -> str:
        """`text` as the log would show it, for messages that travel beside the log."""
        once = Redactor(self._secrets)
        return (once.feed(text.encode(errors="surrogateescape")) + once.flush()).decode(errors="surrogateescape")

    def say(self, text: str) -> None:
        """A line of the farm's own: `[Container] 2026/11/23 11:00:00.123456 text`."""
        gap = ("" if self._last == b"\n" else "\n") + ("\n" if self._after_output else "")
        stamp = clock.now().strftime("%Y/%m/%d %H:%M:%S.%f")
        line = f"{gap}[Container] {stamp} {text}\n".encode(errors="surrogateescape")
        self._put(self._redactor.feed(line) + self._redactor.flush())
        self._last, self._after_output = b"\n", False

    def output(self, data: bytes) -> None:
        """What a command wrote."""
        if not self._after_output:
            self._first_output()
        self._tail += data[-_TAIL_BYTES:]
        if len(self._tail) > 2 * _TAIL_BYTES:
            del self._tail[:-_TAIL_BYTES]
        self._put(self._redactor.feed(data))
        self._last, self._after_output = data[-1:], True

    def end(self) -> None:
        """Send what was held back."""
        self._put(self._redactor.flush())

    def forget_tail(self) -> None:
        """Begin to remember output anew."""
        self._tail.clear()

    def tail(self) -> str:
        """The end of what commands wrote since `forget_tail`, at most 64 KiB."""
        return self._tail[-_TAIL_BYTES:].decode(errors="replace")

    def _put(self, data: bytes) -> None:
        if data:
            self._send(data)
