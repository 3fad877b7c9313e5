"""Whether the file systems that builds fill have room for another one."""

import os
from collections.abc import Iterable
from pathlib import Path


def lack_of_room(folders: Iterable[Path], *, min_free_bytes: int, min_free_inodes_percent: float) -> str:
    """What is short below the first of `folders` that is, for people; empty where nothing is, or where it is not there."""
    for folder in folders:
        try:
            disk = os.statvfs(folder)
        except OSError:  # the engine's folder, where the engine is on another host
            continue
        free = disk.f_bavail * disk.f_frsize
        if free < min_free_bytes:
            return f"only {free // 1024**2} MiB of disk are free below {folder}, {min_free_bytes // 1024**2} are asked for"
        if disk.f_files and 100 * disk.f_favail / disk.f_files < min_free_inodes_percent:  # some file systems have no such limit
            share = 100 * disk.f_favail / disk.f_files
            return f"only {share:.1f} % of inodes are free below {folder}, {min_free_inodes_percent:g} % are asked for"
    return ""
