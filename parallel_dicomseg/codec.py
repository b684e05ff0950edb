"""Arrays to chunk bytes, many at a time back, and the HDF5 filters and zarr codecs that they are.

Every codec makes exactly what HDF5's own filters make, so that a chunk goes into the file as it
is. 'deflate' is HDF5's shuffle and deflate, which every reader has; it is made by ISA-L at level 1
(about ten times zlib's speed). 'lz4' and 'zstd' are blosc, HDF5 filter 32001 and a core codec of
zarr v3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from isal import isal_zlib
from numcodecs.blosc import BITSHUFFLE, SHUFFLE, Blosc
from numpy.typing import NDArray

from parallel_dicomseg.compressors import (
    HAS_BLOSC,
    HAS_CRC32C,
    HAS_ISAL,
    NO_WAY,
    blosc_rows,
    crc32c_of,
    crc32c_of_rows,
    decode_chunks,
    deflate_rows,
    room_for,
    way_of,
)
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.posix import AVAILABLE, read_at
from parallel_dicomseg.records import Int64, UInt8

# One chunk per thread is the parallelism here; blosc's own pool would fight with it.
numcodecs.blosc.use_threads = False

DEFLATE_LEVEL = 1


@dataclass(frozen=True, slots=True)
class BloscSettings:
    """How blosc is used for a codec."""

    level: int
    shuffle: int
    """1 bytes, 2 bits."""
    compressor_code: int
    """The compressor's number in HDF5's client data."""


# Measured on MR images: with bytes shuffled lz4 is 1.7 times as fast both ways as with bits
# shuffled and packs as well; zstd, chosen for its ratio, packs 2 % better with bits.
BLOSC = {"lz4": BloscSettings(5, SHUFFLE, 1), "zstd": BloscSettings(1, BITSHUFFLE, 5)}

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
    blosc = BLOSC[codec]
    used = (blosc.level, blosc.shuffle, blosc.compressor_code)
    values = (*_BLOSC_FILTER_VERSION, itemsize, chunk_bytes, *used)
    return (Filter(BLOSC_FILTER, values),)


def mirror_codec(codec: str) -> str:
    """The codec of the zarr mirror of a file: its own, where zarr has it as a core codec."""
    return "lz4" if codec == "deflate" else codec


def encode(
    arrays: NDArray[Any],
    codec: str,
    keep: NDArray[np.bool_] | None = None,
    room: UInt8 | None = None,
) -> tuple[UInt8, Int64]:
    """Encode n chunks, without the GIL where the compressors can be called from compiled code.

    Parameters
    ----------
    arrays
        (n, rows, columns), C-contiguous, little-endian; each `arrays[i]` is one chunk.
    codec
        One of CODECS.
    keep
        (n,) chunks to encode; the others have size 0. All by default.
    room
        `room_for(n, bytes of a chunk)` bytes to encode into before what is used of them is copied:
        memory that is used again costs less than that copy.

    Returns
    -------
    The chunks one after another, 1-D, and (n,) bytes of each. HDF5's filters of
    `filters(codec, …)` decode them.
    """
    itemsize = arrays.dtype.itemsize
    rows = arrays.reshape(len(arrays), -1).view(f"<u{itemsize}")
    keep = np.ones(len(rows), bool) if keep is None else keep
    if codec == "none":
        return rows[keep].view(np.uint8).reshape(-1), keep * np.int64(rows.shape[1] * itemsize)
    out = (
        np.empty(room_for(len(rows), rows.shape[1] * itemsize), np.uint8) if room is None else room
    )
    sizes = np.zeros(len(rows), np.int64)
    if codec == "deflate" and HAS_ISAL:
        used = deflate_rows(rows, keep, DEFLATE_LEVEL, out, sizes)
    elif codec in BLOSC and HAS_BLOSC:
        blosc = BLOSC[codec]
        name = np.frombuffer(codec.encode() + b"\0", np.uint8)
        used = blosc_rows(rows, keep, blosc.level, blosc.shuffle, name, out, sizes)
    else:
        return encode_one_by_one(rows, codec, keep)
    if used < 0:
        raise MemoryError(f"the compressor of codec {codec} failed")
    return (out[:used] if room is None else out[:used].copy()), sizes


def encode_one_by_one(
    rows: NDArray[Any], codec: str, keep: NDArray[np.bool_]
) -> tuple[UInt8, Int64]:
    """Encode by the functions of the packages: the plain twin of the kernels, byte for byte."""
    one = _one_encoder(codec, rows.dtype.itemsize)
    chunks = [one(row) if wanted else b"" for row, wanted in zip(rows, keep.tolist(), strict=True)]
    sizes = np.array([len(chunk) for chunk in chunks], np.int64)
    return np.frombuffer(b"".join(chunks), np.uint8), sizes


def _one_encoder(codec: str, itemsize: int) -> Callable[[NDArray[Any]], bytes]:
    """The function that encodes one row."""
    if codec == "deflate":
        return lambda row: isal_zlib.compress(
            row.view(np.uint8).reshape(-1, itemsize).T.tobytes(), DEFLATE_LEVEL
        )
    blosc = BLOSC[codec]
    encoder = Blosc(cname=codec, clevel=blosc.level, shuffle=blosc.shuffle)
    return lambda row: bytes(encoder.encode(row))


def checksums(flat: UInt8, sizes: Int64) -> NDArray[np.uint32]:
    """CRC-32C of chunks that lie one after another, (n,); 0 for those without bytes."""
    if not HAS_CRC32C:
        starts = np.cumsum(sizes) - sizes
        pieces = [flat[at : at + size].tobytes() for at, size in zip(starts, sizes, strict=True)]
        return np.array([google_crc32c.value(piece) for piece in pieces], np.uint32)
    out = np.zeros(len(sizes), np.uint32)
    crc32c_of_rows(flat, sizes, out)
    return out


def checksums_of_file(descriptor: int, offsets: Int64, sizes: Int64) -> NDArray[np.uint32]:
    """CRC-32C of pieces of an open file, (n,), read without the GIL; wrong where it is short."""
    if not (HAS_CRC32C and AVAILABLE):
        pairs = zip(sizes.tolist(), offsets.tolist(), strict=True)
        pieces = [os.pread(descriptor, size, at) for size, at in pairs]
        return np.array([google_crc32c.value(piece) for piece in pieces], np.uint32)
    out = np.zeros(len(sizes), np.uint32)
    _read_checksums(descriptor, offsets, sizes, out)
    return out


@kernel
def _read_checksums(descriptor: int, offsets: Int64, sizes: Int64, out: NDArray[np.uint32]) -> None:
    longest = 1
    for size in sizes:
        longest = max(longest, int(size))
    room = np.empty(longest, np.uint8)
    for i in range(len(sizes)):
        held = read_at(descriptor, room, sizes[i], offsets[i])
        out[i] = crc32c_of(room, 0, max(held, 0))


def decode_rows(encoded: UInt8, starts: Int64, sizes: Int64, codec: str, rows: NDArray[Any]) -> int:
    """Decode n chunks by the kernels, without the GIL.

    Parameters
    ----------
    encoded, starts, sizes
        The chunks, where each begins, and its bytes.
    codec
        One of CODECS; `can_decode_rows(codec)` holds.
    rows
        (n, count) of the chunks' dtype, C-contiguous, filled.

    Returns
    -------
    How many were decoded: n, or the place of the first one that is no chunk of this codec.
    """
    itemsize = rows.dtype.itemsize
    way = way_of(codec, itemsize)
    return int(decode_chunks(way, encoded, starts, sizes, itemsize, rows.view(np.uint8)))


def can_decode_rows(codec: str) -> bool:
    """Whether the kernels that read and decode this codec can be called here."""
    return AVAILABLE and NO_WAY not in (way_of(codec, 1), way_of(codec, 2))
