"""The seal behind a file's last byte of HDF5: whose each byte is, and a checksum of it.

HDF5 readers stop at the end that the file's first bytes tell them, and never see the seal. It is
looked at before libhdf5 gets the file, which may loop or crash over damaged indices and heaps.
docs/format.md says how it is laid out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.files import read_fully
from parallel_dicomseg.records import Int64

#: One extent: how long it is, the CRC-32C of its bytes, whose it is (a place in the names), and
#: which slice or piece of that. Extents lie end to end from byte 0 on.
EXTENT = np.dtype([("size", "<u4"), ("crc32c", "<u4"), ("owner", "<u4"), ("number", "<u4")])
#: The first owners; the second holds the masks.
PIXELS = ("/images", "/masks")
#: The owner of what is no object's own data: names, attributes, indices, and unused bytes.
STRUCTURE = "names, attributes and indices"

_MAGIC = b"\x89PDSEAL\n"
_COUNTS = struct.Struct("<QQ")
_FOOTER_BYTES = _COUNTS.size + 4 + len(_MAGIC)
_PIECE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Seal:
    """What a file's seal says."""

    offsets: Int64
    """(e,) where each extent starts."""
    extents: NDArray[Any]
    """(e,) of EXTENT."""
    names: tuple[str, ...]
    """Of the owners."""

    @property
    def holds_pixels(self) -> NDArray[np.bool_]:
        """(e,) which extents are chunks of slices."""
        owner: NDArray[np.uint32] = self.extents["owner"]
        return owner < len(PIXELS)

    def difference(self, place: int, found: int) -> str:
        """What to say about an extent with another checksum."""
        extent = self.extents[place]
        name, number = self.names[extent["owner"]], int(extent["number"])
        start, known = int(self.offsets[place]), int(extent["crc32c"])
        if extent["owner"] < len(PIXELS):
            return f"{name}[{number}]: checksum {found:#010x} differs from the seal's {known:#010x}"
        end = start + int(extent["size"])
        return f"{name}: bytes {start} to {end} have checksum {found:#010x}, not {known:#010x}"


def encode(extents: NDArray[Any], names: Sequence[str]) -> bytes:
    """The bytes of a seal, to be written behind HDF5's own; extents and names as in `Seal`."""
    body = extents.tobytes() + "\0".join(names).encode()
    body += _COUNTS.pack(len(extents), len(body) - extents.nbytes)
    return body + struct.pack("<I", google_crc32c.value(body)) + _MAGIC


def read_seal(descriptor: int) -> Seal | None:
    """The seal of an open file; None where it ends without one.

    Raises
    ------
    ValueError
        The seal itself is damaged.
    """
    size = os.fstat(descriptor).st_size
    footer = os.pread(descriptor, _FOOTER_BYTES, max(0, size - _FOOTER_BYTES))
    if len(footer) < _FOOTER_BYTES or not footer.endswith(_MAGIC):
        return None
    count, name_bytes = _COUNTS.unpack_from(footer)
    end = size - _FOOTER_BYTES - name_bytes - count * EXTENT.itemsize
    if end < 0:
        raise ValueError("the seal at its end is longer than the file")
    body = read_fully(descriptor, size - end, end)
    checksum = struct.unpack_from("<I", body, len(body) - len(_MAGIC) - 4)[0]
    if google_crc32c.value(body[: -len(_MAGIC) - 4]) != checksum:
        raise ValueError("the seal at its end is damaged")
    extents = np.frombuffer(body, EXTENT, count)
    names = body[extents.nbytes : extents.nbytes + name_bytes].decode().split("\0")
    ends = np.cumsum(extents["size"], dtype=np.int64)
    if ends[-1:].tolist() != [end] or int(extents["owner"].max()) >= len(names):
        raise ValueError("the seal at its end does not fit the file")
    return Seal(ends - extents["size"], extents, tuple(names))


def check_structure(path: Path) -> Seal | None:
    """Compare all bytes outside the slices' chunks with the seal, before HDF5 sees the file.

    Returns
    -------
    The seal; None where there is none: the file is older, or another program wrote to it.

    Raises
    ------
    ValueError
        Something differs; the words name the first object and the bytes.
    OSError
        The file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        seal = read_seal(descriptor)
        damage = seal and damaged(descriptor, seal, np.flatnonzero(~seal.holds_pixels))
    finally:
        os.close(descriptor)
    if damage:
        raise ValueError(f"it is damaged: {damage[0]}")
    return seal


def damaged(descriptor: int, seal: Seal, places: Int64) -> list[str]:
    """What differs among these extents of an open file."""
    found = ((place, _checksum(descriptor, seal, place)) for place in places.tolist())
    known = seal.extents["crc32c"]
    return [seal.difference(place, crc32c) for place, crc32c in found if crc32c != known[place]]


def _checksum(descriptor: int, seal: Seal, place: int) -> int:
    return checksum_at(descriptor, int(seal.offsets[place]), int(seal.extents["size"][place]))


def checksum_at(descriptor: int, offset: int, size: int) -> int:
    """CRC-32C of a piece of an open file."""
    return int(google_crc32c.value(read_fully(descriptor, size, offset)))


def covering(end: int, offsets: Int64, extents: NDArray[Any], structure: int) -> NDArray[Any]:
    """Extents that cover a file of `end` bytes: the given ones, and what lies between them.

    Parameters
    ----------
    end
        Bytes of the file.
    offsets, extents
        (m,) those that belong to objects, in any order.
    structure
        The owner of what lies between; it is cut into pieces of at most 4 KiB.

    Returns
    -------
    (e,) of EXTENT, with checksums only where they were given.

    Raises
    ------
    ValueError
        Two extents overlap, or one leads out of the file.
    """
    order = np.argsort(offsets, kind="stable")
    offsets, extents = offsets[order], extents[order]
    ends = offsets + extents["size"]
    gaps = np.append(offsets, end) - np.append(np.int64(0), ends)
    if (gaps < 0).any():
        raise ValueError("two objects share bytes, or lie beyond the end of the file")
    pieces = -(-gaps // _PIECE_BYTES)
    between = np.zeros(int(pieces.sum()), EXTENT)
    between["size"] = _PIECE_BYTES
    between["owner"] = structure
    last = np.cumsum(pieces)[pieces > 0] - 1
    between["size"][last] = (gaps - (pieces - 1) * _PIECE_BYTES)[pieces > 0]
    between["number"] = np.arange(len(between))
    return np.insert(between, np.cumsum(pieces)[:-1], extents)
