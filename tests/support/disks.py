"""Small disks of a test's own."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.need import missing


@contextmanager
def tmpfs(size: str, **options: str) -> Iterator[Path]:
    """A disk of `size`; more options of the kernel's tmpfs by name, as `nr_inodes`."""
    if os.geteuid() != 0:
        missing("the right to mount a disk", "be root")
    with tempfile.TemporaryDirectory(prefix="mr-disk-") as folder:
        more = "".join(f",{name}={value}" for name, value in options.items())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755{more}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
