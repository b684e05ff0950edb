"""Read slices of a file, all that a piece of a batch needs in one call without the GIL.

Slice by slice, while its bytes are in the processor's cache: read, compare the checksum, decode,
undo the shuffle, convert, into its place in the batch. Each function stops at the first slice that
is not as it should be and says which; whoever called reads that one again by `readers`' plain way,
which knows what to complain about.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.compressors import (
    HAS_CRC32C,
    NO_WAY,
    RAW,
    crc32c_of,
    decode_chunk,
    drop_decoder,
    new_decoder,
    way_of,
)
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.loader.operations import CENTER, HIGH, LOW, SCALE
from parallel_dicomseg.posix import AVAILABLE, read_at, seconds_now
from parallel_dicomseg.records import Float64, Int64, UInt8

#: Places in the seconds that are added up: reading, decoding (checksums too), converting.
READING, DECODING, CONVERTING = range(3)


class Place(NamedTuple):
    """Where the chunks of one array lie, for all n slices of the file."""

    offsets: Int64
    """(n,) in the chunk's file."""
    sizes: Int64
    """(n,) encoded bytes."""
    checks: NDArray[np.uint32]
    """(n,) CRC-32C of the encoded bytes; (0,): not looked at."""
    way: int
    """See `compressors.way_of`."""
    itemsize: int
    """Bytes per element."""


class Room(NamedTuple):
    """Memory that is used again for every slice."""

    encoded: UInt8
    """As long as the longest chunk that may be read."""
    planes: UInt8
    """As long as a decoded slice."""


def has_kernels(codec: str, itemsize: int, *, verify: bool) -> bool:
    """Whether these kernels can read arrays of this codec."""
    return AVAILABLE and way_of(codec, itemsize) != NO_WAY and (HAS_CRC32C or not verify)


@kernel
def _read_slice(
    descriptor: int,
    row: int,
    place: Place,
    decoder: tuple[NDArray[np.uint64], int],
    room: Room,
    out: UInt8,
    times: tuple[Float64, Int64],
) -> bool:
    """One slice as bytes, all of `out`; whether it is as it should be."""
    seconds, instant = times
    size, offset = place.sizes[row], place.offsets[row]
    start = seconds_now(instant)
    # uncompressed, it need not lie anywhere else first
    encoded = out if place.way == RAW else room.encoded
    if size <= 0 or size > len(encoded) or (place.way == RAW and size != len(out)):
        return False
    if read_at(descriptor, encoded, size, offset) != size:
        return False
    read = seconds_now(instant)
    seconds[READING] += read - start
    if len(place.checks) and crc32c_of(encoded, 0, size) != place.checks[row]:
        return False
    if place.way != RAW and not decode_chunk(
        place.way, decoder, encoded[:size], place.itemsize, room.planes, out
    ):
        return False
    seconds[DECODING] += seconds_now(instant) - read
    return True


@kernel
def read_stored(
    descriptors: Int64, rows: Int64, place: Place, room: Room, out: UInt8, seconds: Float64
) -> int:
    """Slices as they are stored.

    Parameters
    ----------
    descriptors
        (1,) of the file, or (m,) of the file of each slice.
    rows
        (m,) which slices.
    place, room
        Of the array.
    out
        (m, bytes of a slice), C-contiguous, filled.
    seconds
        (3,) increased by what reading, decoding and converting took.

    Returns
    -------
    How many are there: m, or the place of the first one that is not as it should be.
    """
    decoder = new_decoder(place.way)
    times = (seconds, np.empty(2, np.int64))
    done = 0
    while done < len(rows):
        descriptor = descriptors[done % len(descriptors)]
        if not _read_slice(descriptor, rows[done], place, decoder, room, out[done], times):
            break
        done += 1
    drop_decoder(decoder)
    return done


@kernel
def read_mapped(
    descriptors: Int64,
    rows: Int64,
    place: Place,
    room: Room,
    stored: NDArray[Any],
    maps: Float64,
    out: NDArray[np.float32],
    seconds: Float64,
) -> int:
    """Slices as float32, mapped as `windows.map_into` does, bit for bit.

    Parameters
    ----------
    stored
        (count,) of the array's type; memory that is used again.
    maps
        (m, 4) low, high, center and scale of each slice; (0, 4): values stay as they are.
    out
        (m, count) C-contiguous, filled.

    The others, and what is returned, are those of `read_stored`.
    """
    decoder = new_decoder(place.way)
    times = (seconds, np.empty(2, np.int64))
    done = 0
    while done < len(rows):
        descriptor = descriptors[done % len(descriptors)]
        raw = stored.view(np.uint8)
        if not _read_slice(descriptor, rows[done], place, decoder, room, raw, times):
            break
        start = seconds_now(times[1])
        if len(maps):
            _map(stored, maps[done], out[done])
        else:
            for k in range(len(stored)):
                out[done, k] = np.float32(stored[k])
        seconds[CONVERTING] += seconds_now(times[1]) - start
        done += 1
    drop_decoder(decoder)
    return done


@kernel
def _map(stored: NDArray[Any], intensity: Float64, out: NDArray[np.float32]) -> None:
    low, high = np.float32(intensity[LOW]), np.float32(intensity[HIGH])
    center, scale = np.float32(intensity[CENTER]), np.float32(intensity[SCALE])
    for k in range(len(stored)):
        value = np.float32(stored[k])
        # in this order, as np.clip: where low exceeds high it gives high. nan stays; numba's max
        # and min would lose it
        value = low if value < low else value  # noqa: FURB136
        value = high if value > high else value  # noqa: FURB136
        out[k] = (value - center) * scale


@kernel
def read_channels(
    descriptors: Int64,
    rows: Int64,
    place: Place,
    room: Room,
    stored: NDArray[Any],
    bits: Int64,
    out: UInt8,
    seconds: Float64,
) -> int:
    """Masks with one plane of 0 and 1 for each of some bits.

    Parameters
    ----------
    stored
        (count,) of the array's type; memory that is used again.
    bits
        (s,) which.
    out
        (m, s, count), in any order in memory, filled.

    The others, and what is returned, are those of `read_stored`.
    """
    decoder = new_decoder(place.way)
    times = (seconds, np.empty(2, np.int64))
    one = stored.dtype.type(1)
    done = 0
    while done < len(rows):
        descriptor = descriptors[done % len(descriptors)]
        raw = stored.view(np.uint8)
        if not _read_slice(descriptor, rows[done], place, decoder, room, raw, times):
            break
        start = seconds_now(times[1])
        for channel in range(len(bits)):
            shift = stored.dtype.type(bits[channel])
            plane = out[done, channel]
            for k in range(len(stored)):
                plane[k] = np.uint8((stored[k] >> shift) & one)
        seconds[CONVERTING] += seconds_now(times[1]) - start
        done += 1
    drop_decoder(decoder)
    return done


@kernel
def read_recoded(
    descriptors: Int64,
    rows: Int64,
    place: Place,
    room: Room,
    stored: UInt8,
    table: NDArray[Any],
    out: NDArray[Any],
    seconds: Float64,
) -> int:
    """Masks of at most 8 structures, each value replaced.

    Parameters
    ----------
    stored
        (count,) memory that is used again.
    table
        (256,) what each stored value becomes.
    out
        (m, count) of the table's type, C-contiguous, filled.

    The others, and what is returned, are those of `read_stored`.
    """
    decoder = new_decoder(place.way)
    times = (seconds, np.empty(2, np.int64))
    done = 0
    while done < len(rows):
        descriptor = descriptors[done % len(descriptors)]
        if not _read_slice(descriptor, rows[done], place, decoder, room, stored, times):
            break
        start = seconds_now(times[1])
        for k in range(len(stored)):
            out[done, k] = table[stored[k]]
        seconds[CONVERTING] += seconds_now(times[1]) - start
        done += 1
    drop_decoder(decoder)
    return done
