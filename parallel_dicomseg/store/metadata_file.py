"""What HDF5 takes for its file while an output is made: a Python object (h5py's fileobj driver).

HDF5 decides where each chunk lies and keeps the index, but the bytes of chunks do not pass through
it, and its metadata (some 15 bytes per chunk, and the tables at the end) stays in memory until the
output is finished. So HDF5 never meets a full disk, after which it loses the thread and may crash,
and what lies on the disk before is chunks only.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.records import UInt8

_BLOCK = 1 << 16
# Metadata begins with a signature of four letters, or as the superblock: a write that is as long as
# a chunk and begins alike is the chunk. One byte tells, but where the chunk begins with such one.
_HEAD = 16
_FIRST_OF_METADATA = frozenset(b"BDEFGHOSTV\x89")


class MetadataFile:
    """The file object: writes of expected chunks are noted, all else is kept."""

    def __init__(self) -> None:
        self._position = 0
        self._blocks: dict[int, tuple[UInt8, NDArray[np.bool_]]] = {}
        self._expected = -1
        self._first = -1
        self._head = b""
        self._noted: list[int] = []
        self._failure: BaseException | None = None
        self.size = 0
        """Bytes that HDF5 believes its file to have."""

    # --- for the writer --------------------------------------------------------------------------

    def expect(self, chunk: memoryview) -> None:
        """What is written next with this length and beginning is a chunk, of a byte or more."""
        self._expected, self._first = len(chunk), chunk[0]
        self._head = bytes(chunk[:_HEAD]) if self._first in _FIRST_OF_METADATA else b""

    def noted(self) -> int:
        """Where the expected chunk lies; -1 where HDF5 wrote none, or more than one like it."""
        at = self._noted.pop() if len(self._noted) == 1 else -1
        self._noted.clear()
        self._expected = -1
        return at

    @contextmanager
    def check(self) -> Iterator[None]:
        """Raise what failed below HDF5, which is not told of it, within the block."""
        try:
            yield
        finally:
            if self._failure is not None:
                raise self._failure from None

    def pieces(self) -> Iterator[tuple[int, UInt8]]:
        """All that was written and is no chunk: offset and bytes, ascending."""
        for number in sorted(self._blocks):
            content, is_written = self._blocks[number]
            edges = np.flatnonzero(np.diff(is_written, prepend=False, append=False))
            for start, end in edges.reshape(-1, 2).tolist():
                yield number * _BLOCK + start, content[start:end]

    # --- for HDF5 --------------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Of a file object."""
        if whence == io.SEEK_SET:
            base = 0
        else:
            base = self.size if whence == io.SEEK_END else self._position
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Of a file object."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Of a file object."""
        room = bytearray(max(size, 0))
        self.readinto(memoryview(room))
        return bytes(room)

    def readinto(self, room: memoryview) -> int:
        """Of a file object; what was never written reads as zeros."""
        into = np.frombuffer(room, np.uint8)
        try:
            for number, here, there in self._parts(self._position, len(into)):
                block = self._blocks.get(number)
                into[there] = 0 if block is None else block[0][here]
        except BaseException as error:  # noqa: BLE001  Ctrl-C is not for HDF5, but for `check`
            self._failure = self._failure or error
        self._position += len(into)
        return len(into)

    def write(self, piece: memoryview) -> int:
        """Of a file object."""
        at, size = self._position, len(piece)
        try:
            if size == self._expected and self._is_chunk(piece):
                self._noted.append(at)
            else:
                self._keep(at, np.frombuffer(piece, np.uint8))
        except BaseException as error:  # noqa: BLE001  Ctrl-C is not for HDF5, but for `check`
            self._failure = self._failure or error
        self._position = at + size
        self.size = max(self.size, self._position)
        return size

    def truncate(self, size: int | None = None) -> int:
        """Of a file object."""
        self.size = self._position if size is None else size
        return self.size

    def flush(self) -> None:
        """Of a file object."""

    def _is_chunk(self, piece: memoryview) -> bool:
        """Whether a write of the expected length is the expected chunk."""
        if piece[0] != self._first:
            return False
        return not self._head or bytes(piece[:_HEAD]) == self._head

    def _keep(self, at: int, content: UInt8) -> None:
        for number, here, there in self._parts(at, len(content)):
            if number not in self._blocks:
                self._blocks[number] = np.zeros(_BLOCK, np.uint8), np.zeros(_BLOCK, np.bool_)
            block, is_written = self._blocks[number]
            block[here] = content[there]
            is_written[here] = True

    @staticmethod
    def _parts(at: int, size: int) -> Iterator[tuple[int, slice, slice]]:
        """Blocks of a range of the file: number, which part of the block, and of the range."""
        done = 0
        while done < size:
            number, start = divmod(at + done, _BLOCK)
            count = min(_BLOCK - start, size - done)
            yield number, slice(start, start + count), slice(done, done + count)
            done += count
