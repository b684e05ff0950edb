"""Files that may be anything: only regular ones are opened, and only so much of them is read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# O_NONBLOCK: what was a file a moment ago may be a FIFO now
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def open_regular(file: str | Path, most: int) -> Iterator[BinaryIO]:
    """Open a regular file of at most so many bytes.

    Raises
    ------
    OSError
        It cannot be read, is larger, or is no regular file; a FIFO, socket or device is not opened.
    """
    _check(os.stat(file), most)  # noqa: PTH116
    descriptor = os.open(file, _FLAGS)
    try:
        _check(os.fstat(descriptor), most)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(descriptor)


def read_regular(file: str | Path, most: int) -> bytes:
    """The bytes of such a file; it raises as `open_regular`.

    A file that says it is empty and is not (those of /proc) is cut off, never read without end.
    """
    with open_regular(file, most) as stream:
        return stream.read(most)


def _check(status: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes, limit {most}")


def read_fully(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes of an open file, or what there is; a single read may give fewer."""
    pieces: list[bytes] = []
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return b"".join(pieces)
