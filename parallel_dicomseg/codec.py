"""Arrays to chunk bytes and back, and the HDF5 filters and zarr codecs that these bytes are.

Every codec makes exactly what HDF5's own filters make, so that a chunk goes into the file as it
is. 'deflate' is HDF5's shuffle and deflate, which every reader has; it is made by ISA-L at level 1
(about ten times zlib's speed). 'lz4' and 'zstd' are blosc with bit shuffle, HDF5 filter 32001
and a core codec of zarr v3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numcodecs.blosc
import numpy as np
from isal import isal_zlib
from numcodecs.blosc import BITSHUFFLE, Blosc
from numpy.typing import NDArray

from parallel_dicomseg.jit import kernel
from parallel_dicomseg.records import UInt8

# One chunk per thread is the parallelism here; blosc's own pool would fight with it.
numcodecs.blosc.use_threads = False

CODECS = ("deflate", "lz4", "zstd", "none")

DEFLATE_LEVEL = 1
BLOSC_LEVEL = {"lz4": 5, "zstd": 1}
_BLOSC_COMPRESSOR_CODE = {"lz4": 1, "zstd": 5}

SHUFFLE_FILTER = 2
DEFLATE_FILTER = 1
BLOSC_FILTER = 32001
# Versions of the blosc filter and of its format, as its HDF5 plugin writes them.
_BLOSC_FILTER_VERSION = (2, 2)


@dataclass(frozen=True, slots=True)
class Filter:
    """One stage of an HDF5 filter pipeline."""

    number: int
    """HDF5's registered filter number."""
    values: tuple[int, ...]
    """Client data of the filter."""


def filters(codec: str, itemsize: int, chunk_bytes: int) -> tuple[Filter, ...]:
    """The HDF5 filter pipeline that decodes what `encode` makes.

    Parameters
    ----------
    codec
        One of CODECS.
    itemsize
        Bytes per element.
    chunk_bytes
        Bytes of one decoded chunk.
    """
    if codec == "none":
        return ()
    if codec == "deflate":
        deflate = Filter(DEFLATE_FILTER, (DEFLATE_LEVEL,))
        return (deflate,) if itemsize == 1 else (Filter(SHUFFLE_FILTER, (itemsize,)), deflate)
    values = (
        *_BLOSC_FILTER_VERSION,
        itemsize,
        chunk_bytes,
        BLOSC_LEVEL[codec],
        BITSHUFFLE,
        _BLOSC_COMPRESSOR_CODE[codec],
    )
    return (Filter(BLOSC_FILTER, values),)


def mirror_codec(codec: str) -> str:
    """The codec of the zarr mirror of a file: its own, where zarr has it as a core codec."""
    return "lz4" if codec == "deflate" else codec


@kernel
def shuffle_bytes(elements: NDArray[Any], out: UInt8) -> None:
    """HDF5's shuffle of each row: all lowest bytes, all second bytes, ….

    Parameters
    ----------
    elements
        (n, count) unsigned integers, little-endian.
    out
        (n, count x itemsize) uint8.
    """
    count = elements.shape[1]
    for i in range(elements.shape[0]):
        row = elements[i]
        for byte in range(elements.itemsize):
            # one loop per byte: LLVM turns each into vector instructions, a joint one not
            plane = out[i, byte * count : (byte + 1) * count]
            shift = elements.dtype.type(8 * byte)
            for k in range(count):
                plane[k] = np.uint8(row[k] >> shift)


@kernel
def unshuffle_bytes(planes: UInt8, elements: NDArray[Any]) -> None:
    """Undo `shuffle_bytes` for one chunk: planes (count x itemsize,) to elements (count,)."""
    count = len(elements)
    elements[:] = 0
    for byte in range(elements.itemsize):
        plane = planes[byte * count : (byte + 1) * count]
        shift = elements.dtype.type(8 * byte)
        for k in range(count):
            elements[k] |= elements.dtype.type(plane[k]) << shift


def encode(arrays: NDArray[Any], codec: str, scratch: UInt8 | None = None) -> list[bytes]:
    """Encode n chunks.

    Parameters
    ----------
    arrays
        (n, rows, columns), C-contiguous, little-endian; each `arrays[i]` is one chunk.
    codec
        One of CODECS.
    scratch
        Room for the shuffled bytes, (n, bytes of a chunk) uint8, so that it is not allocated anew.

    Returns
    -------
    n byte strings that HDF5's filters of `filters(codec, …)` decode.
    """
    itemsize = arrays.dtype.itemsize
    rows = arrays.reshape(len(arrays), -1)
    if codec == "none":
        return [row.tobytes() for row in rows]
    if codec == "deflate":
        raw = rows.view(np.uint8)
        if itemsize > 1:
            scratch = np.empty_like(raw) if scratch is None else scratch
            shuffle_bytes(rows.view(f"<u{itemsize}"), scratch)
            raw = scratch
        return [isal_zlib.compress(row, DEFLATE_LEVEL) for row in raw]
    blosc = _blosc(codec)
    return [bytes(blosc(row)) for row in rows]


def _blosc(codec: str) -> Callable[[NDArray[Any]], bytes]:
    encoder: Callable[[NDArray[Any]], bytes] = Blosc(
        cname=codec, clevel=BLOSC_LEVEL[codec], shuffle=BITSHUFFLE
    ).encode
    return encoder


def decode(chunk: bytes | UInt8, codec: str, out: NDArray[Any]) -> None:
    """Decode one chunk into `out`, C-contiguous, the dtype and shape of the chunk.

    Raises
    ------
    ValueError
        The bytes do not decode, or not to the size of `out`.
    """
    raw = out.reshape(-1).view(np.uint8)
    if codec == "none":
        _copy(np.frombuffer(chunk, np.uint8), raw)
    elif codec == "deflate":
        try:
            plain = np.frombuffer(isal_zlib.decompress(chunk, bufsize=len(raw)), np.uint8)
        except isal_zlib.error as error:  # type: ignore[misc]  # a variable in isal's stubs
            raise ValueError(f"the chunk is no deflate stream: {error}") from error
        if out.dtype.itemsize == 1:
            _copy(plain, raw)
        elif len(plain) != len(raw):
            raise ValueError(f"the chunk decodes to {len(plain)} bytes, not {len(raw)}")
        else:
            unshuffle_bytes(plain, raw.view(f"<u{out.dtype.itemsize}"))
    else:
        try:
            _copy(np.frombuffer(numcodecs.blosc.decompress(chunk), np.uint8), raw)
        except RuntimeError as error:
            raise ValueError(f"the chunk is no blosc frame: {error}") from error


def _copy(plain: UInt8, raw: UInt8) -> None:
    if len(plain) != len(raw):
        raise ValueError(f"the chunk decodes to {len(plain)} bytes, not {len(raw)}")
    raw[:] = plain
