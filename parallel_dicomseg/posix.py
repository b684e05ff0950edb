"""Open, read and close files from compiled code, so that a batch of files needs the GIL once.

The C library is reached through numba's `ExternalFunction`, which (unlike a ctypes pointer) can be
cached on disk. Every kernel is an ordinary function call for other kernels.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from parallel_dicomseg.jit import kernel

_ERRNO_SYMBOLS = {"linux": "__errno_location", "darwin": "__error"}

#: Whether the kernels of this module can be called here; elsewhere callers use plain Python.
AVAILABLE = sys.platform in _ERRNO_SYMBOLS

# O_NONBLOCK so that a FIFO among the images cannot hang the run; for regular files it does nothing.
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_EINTR = errno.EINTR

_c_open = types.ExternalFunction("open", types.int32(types.intp, types.int32))
_c_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.intp, types.uintp, types.int64)
)
_c_lseek = types.ExternalFunction("lseek", types.int64(types.int32, types.int64, types.int32))
_c_close = types.ExternalFunction("close", types.int32(types.int32))
_c_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC = getattr(time, "CLOCK_MONOTONIC", 1)
_c_errno = types.ExternalFunction(
    _ERRNO_SYMBOLS.get(sys.platform, "errno"), types.CPointer(types.int32)()
)


@kernel
def _interrupted() -> bool:
    """Whether the last call of this thread failed only because a signal came in."""
    return bool(numba.carray(_c_errno(), (1,))[0] == _EINTR)


@kernel
def open_read_only(paths: NDArray[np.uint8], offset: int) -> int:
    """Open the NUL-terminated path at `paths[offset:]`; the descriptor, or -1."""
    while True:
        descriptor = int(_c_open(paths.ctypes.data + offset, _FLAGS))
        if descriptor >= 0 or not _interrupted():
            return descriptor


@kernel
def file_size(descriptor: int) -> int:
    """Size in bytes; negative where the descriptor cannot seek (a FIFO, a socket, a terminal).

    A directory may claim an absurd size and a device 0: a caller with a size limit that reads
    what it was promised refuses both.
    """
    return int(_c_lseek(descriptor, 0, os.SEEK_END))


@kernel
def read_at(descriptor: int, out: NDArray[np.uint8], length: int, file_offset: int) -> int:
    """Read up to `length` bytes at `file_offset` into the contiguous 1-D `out`.

    Returns the number of bytes read: less than `length` only at the end of the file (or of
    `out`), -1 where the system reports an error. Short and interrupted reads are continued.
    """
    wanted = min(length, out.size)
    done = 0
    while done < wanted:
        count = _c_pread(descriptor, out.ctypes.data + done, wanted - done, file_offset + done)
        if count > 0:
            done += count
        elif count == 0:
            return done
        elif not _interrupted():
            return -1
    return done


@kernel
def close(descriptor: int) -> int:
    """Close the descriptor; never repeated, since even an interrupted close has closed it."""
    return int(_c_close(descriptor))


@kernel
def seconds_now(room: NDArray[np.int64]) -> float:
    """A clock that only goes forward, seconds; `room` are two numbers that it may write to."""
    _c_clock_gettime(_MONOTONIC, room.ctypes.data)
    return float(room[0]) + 1e-9 * float(room[1])


def pack_paths(
    paths: Sequence[str], folder: str = ""
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Paths as kernels take them: NUL-terminated bytes one after another, and where each starts.

    Parameters
    ----------
    paths
        n paths, relative to `folder` where that is given.

    Raises
    ------
    ValueError
        If a path holds a NUL character.
    """
    if not paths:
        return np.empty(0, np.uint8), np.empty(0, np.int64)
    # one operation on all of them: a join and an encoding per path cost more than the file access
    prefix = os.path.join(folder, "")  # noqa: PTH118
    joined = prefix + ("\0" + prefix).join(paths) + "\0"
    packed = np.frombuffer(os.fsencode(joined), dtype=np.uint8).copy()
    ends = np.flatnonzero(packed == 0).astype(np.int64) + 1
    if len(ends) != len(paths):
        raise ValueError("a path holds a NUL character")
    return packed, np.concatenate((np.zeros(1, np.int64), ends[:-1]))
