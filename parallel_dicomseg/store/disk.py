"""The system calls by which an output is written, in one place.

Whatever is promised about crashes and full disks (docs/reliability.md) rests on these few calls
and their order. Tests put another object in the place of `Disk`: one that records them, one that
fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel_dicomseg.private import open_private
from parallel_dicomseg.records import UInt8

# The most buffers that one call takes (IOV_MAX is 1024 on Linux and macOS).
_MOST_BUFFERS = 1024
_FULL_SYNC = 51  # F_FULLFSYNC: on macOS only this reaches the disk


class Disk:
    """The calls, as the system offers them."""

    def open(self, path: Path, *, fresh: bool) -> int:
        """A descriptor to read and write; `fresh`: the file is made, or emptied."""
        return open_private(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0))

    def write(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write buffers one after another from `offset` on; the bytes written may be fewer."""
        if hasattr(os, "pwritev"):
            return os.pwritev(descriptor, buffers, offset)
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, buffers[0])

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes are on the disk."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, _FULL_SYNC)
        else:
            getattr(os, "fdatasync", os.fsync)(descriptor)

    def sync_directory(self, directory: Path) -> None:
        """Wait until the names in a directory are on the disk."""
        if sys.platform == "win32":
            return  # a directory cannot be opened there
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        """Make the file as long as that."""
        os.ftruncate(descriptor, size)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name, atomically."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a name, if it is there."""
        path.unlink(missing_ok=True)

    def close(self, descriptor: int) -> None:
        """Close it."""
        os.close(descriptor)


SYSTEM = Disk()


def write_fully(
    disk: Disk, descriptor: int, buffers: Sequence[bytes | memoryview | UInt8], offset: int
) -> None:
    """Write all bytes of all buffers, one after another.

    A full disk takes a part of a write without an error, and only the next one fails.
    """
    # numpy tells type checkers that its arrays are buffers from Python 3.12 on only
    left = [memoryview(buffer) for buffer in buffers if len(buffer)]  # type: ignore[arg-type]
    at = 0
    while at < len(left):
        try:
            written = disk.write(descriptor, left[at : at + _MOST_BUFFERS], offset)
        except InterruptedError:
            continue
        offset += written
        while at < len(left) and written >= len(left[at]):
            written -= len(left[at])
            at += 1
        if written:
            left[at] = left[at][written:]
