"""Seal a finished file: whose each of its bytes is, from what HDF5 tells of its objects."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg import seal
from parallel_dicomseg.errors import VerificationError
from parallel_dicomseg.records import Int64
from parallel_dicomseg.store.disk import SYSTEM, Disk, write_fully

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Of a superblock of version 2 or 3, up to the checksum.
_SUPERBLOCK = struct.Struct("<8sBBBBQQQQ")


def seal_file(
    path: Path,
    offsets: Int64,
    sizes: Int64,
    crc32c: NDArray[np.uint32],
    *,
    disk: Disk = SYSTEM,
) -> None:
    """Append the seal to a closed file, or replace the one that is there.

    Only what is not pixels is read: chunks are described by what is known of them. Nothing is
    forced to the disk; the caller does that before the file gets its name.

    Parameters
    ----------
    path
        A file of `Hdf5Writer`, closed.
    offsets, sizes, crc32c
        (2, n) where the chunks of /images and /masks lie, how long they are, and their checksums.
    disk
        How to write.

    Raises
    ------
    OSError
        The file cannot be written.
    VerificationError
        HDF5 says of it what cannot be: two objects share bytes.
    """
    descriptor = disk.open(path, fresh=False)
    try:
        end = end_of_hdf5(os.pread(descriptor, _SUPERBLOCK.size, 0))
        with h5py.File(path, "r") as file:
            extents, names = _extents(file, end, offsets, sizes, crc32c)
        starts = np.cumsum(extents["size"], dtype=np.int64) - extents["size"]
        for place in np.flatnonzero(extents["owner"] >= len(seal.PIXELS)).tolist():
            size = int(extents["size"][place])
            extents["crc32c"][place] = seal.checksum_at(descriptor, int(starts[place]), size)
        disk.truncate(descriptor, end)
        write_fully(disk, descriptor, [seal.encode(extents, names)], end)
    except ValueError as error:
        raise VerificationError(f"{path}: {error}") from error
    finally:
        disk.close(descriptor)


def end_of_hdf5(superblock: bytes) -> int:
    """Where HDF5 says that its bytes end.

    Raises
    ------
    ValueError
        These are not the first bytes of a file that `Hdf5Writer` makes.
    """
    signature, version, *_, end, _root = _SUPERBLOCK.unpack(superblock)
    if signature != _SIGNATURE or version not in {2, 3}:
        raise ValueError("it does not start as a file of this program")
    return int(end)


def _extents(
    file: h5py.File, end: int, offsets: Int64, sizes: Int64, crc32c: NDArray[np.uint32]
) -> tuple[NDArray[Any], list[str]]:
    """Extents that cover the file, those outside of pixels without checksums; owners' names."""
    pixels = np.zeros(offsets.shape, seal.EXTENT)
    pixels["size"], pixels["crc32c"] = sizes, crc32c
    pixels["owner"] = np.arange(len(seal.PIXELS))[:, None]
    pixels["number"] = np.arange(offsets.shape[1])
    names = [*seal.PIXELS, seal.STRUCTURE]
    others: list[tuple[int, int, int, int]] = []
    for name, opened in _objects(file):
        pieces = _header(opened) + (_data(opened) if name not in seal.PIXELS else [])
        owner = len(names)
        names.append(f"{name} (its description)" if name in seal.PIXELS else name)
        others += [(at, size, owner, k) for k, (at, size) in enumerate(pieces)]
    told = np.array(others, np.int64).reshape(-1, 4)
    columns = np.zeros(len(told), seal.EXTENT)
    for k, field in enumerate(("size", "owner", "number"), 1):
        columns[field] = told[:, k]
    every = np.concatenate([pixels.ravel(), columns])
    at = np.concatenate([offsets.ravel(), told[:, 0]])
    return seal.covering(end, at, every, names.index(seal.STRUCTURE)), names


def _objects(file: h5py.File) -> list[tuple[str, Any]]:
    """All groups and datasets, by their names."""
    names: list[str] = []
    file.visit(names.append)
    return [("/", file.id)] + [
        (f"/{name}", h5py.h5o.open(file.id, name.encode())) for name in names
    ]


def _header(opened: Any) -> list[tuple[int, int]]:
    """Where an object's description lies: what it is and most of its attributes.

    One that grew is in several places, of which HDF5 tells only the first.
    """
    info = h5py.h5o.get_info(opened)
    return [(info.addr, info.hdr.space.total)] if info.hdr.nchunks == 1 else []


def _data(opened: Any) -> list[tuple[int, int]]:
    """Where the bytes of a dataset lie."""
    if not isinstance(opened, h5py.h5d.DatasetID):
        return []
    layout = opened.get_create_plist().get_layout()
    if layout == h5py.h5d.CHUNKED:
        pieces: list[tuple[int, int]] = []
        opened.chunk_iter(lambda chunk: pieces.append((chunk.byte_offset, chunk.size)))
        return pieces
    offset = opened.get_offset() if layout == h5py.h5d.CONTIGUOUS else None
    return [] if offset is None else [(offset, opened.get_storage_size())]
