"""One chunk's bytes back to its elements, by the compressors' own packages: no numba is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.records import UInt8

CODECS = ("deflate", "lz4", "zstd", "none")


def decode(chunk: bytes | UInt8, codec: str, out: NDArray[Any]) -> None:
    """Decode one chunk.

    Parameters
    ----------
    chunk
        Its bytes.
    codec
        One of CODECS.
    out
        Of the chunk's dtype and shape (or flat), C-contiguous, filled.

    Raises
    ------
    ValueError
        The bytes do not decode, or not to the size of `out`.
    """
    raw = out.reshape(-1).view(np.uint8)
    if codec == "none":
        _copy(np.frombuffer(chunk, np.uint8), raw)
    elif codec == "deflate":
        unshuffle(_inflated(chunk, raw), out.reshape(-1))
    else:
        _unblosc(chunk, raw)


def _inflated(chunk: bytes | UInt8, raw: UInt8) -> UInt8:
    from isal import isal_zlib

    try:
        plain = np.frombuffer(isal_zlib.decompress(chunk, bufsize=len(raw)), np.uint8)
    except isal_zlib.error as error:  # type: ignore[misc]  # a variable in isal's stubs
        raise ValueError(f"the chunk is no deflate stream: {error}") from error
    _check_length(plain, raw)
    return plain


def _unblosc(chunk: bytes | UInt8, raw: UInt8) -> None:
    import numcodecs.blosc

    # one chunk per thread is the parallelism here; blosc's own pool would fight with it
    numcodecs.blosc.use_threads = False
    # a blosc frame says how long it is and what it becomes; the library believes it
    claims = np.frombuffer(chunk, "<u4", 4).tolist() if len(chunk) >= 16 else [0] * 4
    if (claims[1], claims[3]) != (len(raw), len(chunk)):
        raise ValueError(f"the chunk is no blosc frame of {len(raw)} bytes")
    try:
        numcodecs.blosc.decompress(chunk, raw)
    except RuntimeError as error:
        raise ValueError(f"the chunk is no blosc frame: {error}") from error


def unshuffle(planes: UInt8, out: NDArray[Any]) -> None:
    """Undo HDF5's shuffle with NumPy: planes (count x itemsize,) to elements (count,)."""
    itemsize = out.dtype.itemsize
    unsigned = out.view(f"<u{itemsize}")
    by_byte = planes.reshape(itemsize, -1)
    unsigned[:] = by_byte[-1]
    for plane in by_byte[-2::-1]:
        np.left_shift(unsigned, 8, out=unsigned)
        np.bitwise_or(unsigned, plane, out=unsigned)


def _copy(plain: UInt8, raw: UInt8) -> None:
    _check_length(plain, raw)
    raw[:] = plain


def _check_length(plain: UInt8, raw: UInt8) -> None:
    if len(plain) != len(raw):
        raise ValueError(f"the chunk decodes to {len(plain)} bytes, not {len(raw)}")
