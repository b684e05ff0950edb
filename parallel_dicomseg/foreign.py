"""Objects of an HDF5 file from elsewhere, looked at before HDF5 may follow what they say.

HDF5 opens other files for external links, external storage and virtual datasets, and allocates
what a header claims. Nothing here reads values, asks for the shape of a virtual dataset before its
sources are known, or follows a link that is not seen to stay inside the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py

#: Bytes of one decoded chunk, or of one slice: 16,384 x 16,384 float32.
MAX_CHUNK_BYTES = 1 << 30
#: How many times larger than the file all values of a dataset may be: what zstd makes of zeros.
MAX_RATIO = 1 << 15
#: Values of one attribute, and the size of each in the file.
MAX_ATTRIBUTE_VALUES = 1 << 16
MAX_ATTRIBUTE_BYTES = 1 << 24

# deflate, shuffle, fletcher32; LZF of h5py; blosc, lz4, bitshuffle, zstd, blosc2 of hdf5plugin
_FILTERS = (1, 2, 3, 32000, 32001, 32004, 32008, 32015, 32026)
_NUMBERS = (h5py.h5t.INTEGER, h5py.h5t.FLOAT)
_ATTRIBUTES = (*_NUMBERS, h5py.h5t.STRING, h5py.h5t.ENUM)
_KINDS = {
    h5py.h5t.COMPOUND: "compounds",
    h5py.h5t.VLEN: "values of any length",
    h5py.h5t.REFERENCE: "references",
    h5py.h5t.OPAQUE: "opaque bytes",
    h5py.h5t.BITFIELD: "bit fields",
    h5py.h5t.ARRAY: "arrays",
}
_LINKS = {
    h5py.h5l.TYPE_EXTERNAL: "an external link, which leads into another file",
    h5py.h5l.TYPE_SOFT: "a soft link",
}
_MOST_SOFT_LINKS = 16
_MOST_VIEWS = 1 << 12
# Bytes that a filter may add to those that it cannot shrink.
_OVERHEAD_BYTES = 4096


class RefusedError(ValueError):
    """An object is not read; the words say which one and why, without the file's name."""


def group_of(file: h5py.File, name: str) -> h5py.Group:
    """A group of the file that no link leads out of.

    Raises
    ------
    RefusedError
        It is behind an external link, or is no group.
    KeyError
        There is none.
    """
    opened, place = _resolve(file.id, name)
    if not isinstance(opened, h5py.h5g.GroupID):
        raise RefusedError(f"{place} is no group")
    return h5py.Group(opened)


def object_of(file: h5py.File, name: str, *, inflated: bool = True) -> h5py.Group | h5py.Dataset:
    """A group or a dataset of the file, as `group_of` and `dataset_of` give it."""
    opened, _ = _resolve(file.id, name)
    is_dataset = isinstance(opened, h5py.h5d.DatasetID)
    return dataset_of(file, name, inflated=inflated) if is_dataset else group_of(file, name)


def dataset_of(file: h5py.File, name: str, *, inflated: bool = True) -> h5py.Dataset:
    """A dataset whose every byte is in the file, and which claims no more than the file can hold.

    Parameters
    ----------
    file
        Open for reading; nothing but descriptions is read from it.
    name
        From the root, with or without the first slash.
    inflated
        Whether HDF5 is to decode chunks, so that their stored sizes matter.

    Raises
    ------
    RefusedError
        A link on the way, or the data itself, leads out of the file; its type, filters or chunks
        are none that images, masks and tables have; or its size is absurd.
    KeyError
        There is no such object.
    """
    file_bytes = Path(file.filename).stat().st_size
    dataset, place = _opened_dataset(file.id, name)
    for source in _sources(dataset, place):
        shown, shown_place = _opened_dataset(file.id, source)
        if _sources(shown, shown_place):
            raise RefusedError(f"{place} is a view of the view {shown_place}")
        _check(shown, shown_place, file_bytes, inflated)
    _check(dataset, place, file_bytes, inflated)
    return h5py.Dataset(dataset)


def check_attributes(owner: h5py.HLObject) -> None:
    """Look at the attributes of an object before they are read.

    Raises
    ------
    RefusedError
        One is neither numbers nor texts, or claims too many of them. Those in which HDF5 keeps
        dimension scales are no exception: they are not among what this program reads.
    """
    for name in owner.attrs:
        if name in SCALE_ATTRIBUTES:
            continue
        attribute = owner.attrs.get_id(name)
        count = attribute.get_space().get_simple_extent_npoints()
        stored = attribute.get_type()
        if stored.get_class() not in _ATTRIBUTES:
            kind = _KINDS.get(stored.get_class(), "of an unknown type")
            raise RefusedError(f"the attribute {name!r} holds {kind}")
        if count > MAX_ATTRIBUTE_VALUES or count * stored.get_size() > MAX_ATTRIBUTE_BYTES:
            raise RefusedError(f"the attribute {name!r} has {count} values")


#: In which HDF5 keeps the names and scales of axes.
SCALE_ATTRIBUTES = ("DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST", "CLASS", "NAME")


# --- links ---------------------------------------------------------------------------------------


def _resolve(root: Any, name: str) -> tuple[Any, str]:
    """An object by links that are followed here, and where it lies."""
    left = [part for part in name.split("/") if part and part != "."]
    top = h5py.h5g.open(root, b"/")
    opened, place, soft = top, "", 0
    while left:
        part, *left = left
        if not isinstance(opened, h5py.h5g.GroupID):
            raise RefusedError(f"{place} is no group")
        encoded = part.encode()
        link = opened.links.get_info(encoded)
        if link.type == h5py.h5l.TYPE_HARD:
            opened, place = h5py.h5o.open(opened, encoded), f"{place}/{part}"
            continue
        soft += 1
        if link.type != h5py.h5l.TYPE_SOFT or soft > _MOST_SOFT_LINKS:
            kind = _LINKS.get(link.type, "a link of a program's own kind")
            raise RefusedError(f"{place}/{part} is {kind}")
        target = opened.links.get_val(encoded).decode()
        left = [each for each in target.split("/") if each and each != "."] + left
        if target.startswith("/"):
            opened, place = top, ""
    return opened, place or "/"


def _opened_dataset(root: Any, name: str) -> tuple[h5py.h5d.DatasetID, str]:
    opened, place = _resolve(root, name)
    if not isinstance(opened, h5py.h5d.DatasetID):
        raise RefusedError(f"{place} is no dataset")
    return opened, place


# --- what a dataset says of itself ---------------------------------------------------------------


def _sources(dataset: h5py.h5d.DatasetID, place: str) -> tuple[str, ...]:
    """The datasets of this file that a virtual one shows; none of a real one."""
    created = dataset.get_create_plist()
    if created.get_layout() != h5py.h5d.VIRTUAL:
        return ()
    count = created.get_virtual_count()
    if count > _MOST_VIEWS:
        raise RefusedError(f"{place} is a view of {count} pieces")
    shown: dict[str, None] = {}
    for piece in range(count):
        if created.get_virtual_filename(piece) != ".":
            raise RefusedError(f"{place} is a view of another file")
        shown[created.get_virtual_dsetname(piece)] = None
    return tuple(shown)


def _check(dataset: h5py.h5d.DatasetID, place: str, file_bytes: int, inflated: bool) -> None:
    """What is said before values are; the sources of a virtual dataset are in this file."""
    created = dataset.get_create_plist()
    if created.get_external_count():
        raise RefusedError(f"{place} has its values in another file")
    stored = dataset.get_type()
    _check_type(stored, place)
    for k in range(created.get_nfilters()):
        number = created.get_filter(k)[0]
        if number not in _FILTERS:
            raise RefusedError(f"{place} is filtered by {number}, which is not among {_FILTERS}")
    shape, itemsize = dataset.shape, stored.get_size()
    chunk_bytes = 0
    if created.get_layout() == h5py.h5d.CHUNKED:
        chunk_bytes = math.prod(created.get_chunk()) * itemsize
    for what, size in (("chunks", chunk_bytes), ("rows", math.prod(shape[1:]) * itemsize)):
        if size > MAX_CHUNK_BYTES:
            raise RefusedError(f"{place} has {what} of {size} bytes, more than {MAX_CHUNK_BYTES}")
    if math.prod(shape) * itemsize > file_bytes * MAX_RATIO:
        raise RefusedError(f"{place} claims shape {shape}, in a file of {file_bytes} bytes")
    if chunk_bytes and inflated:
        _check_stored(dataset, place, chunk_bytes)


def _check_type(stored: h5py.h5t.TypeID, place: str) -> None:
    """Numbers, truth values, and texts of fixed length."""
    kind = stored.get_class()
    if kind == h5py.h5t.STRING and stored.is_variable_str():
        raise RefusedError(f"{place} holds texts of any length")
    if kind not in _ATTRIBUTES:
        raise RefusedError(f"{place} holds {_KINDS.get(kind, 'values of an unknown type')}")


def _check_stored(dataset: h5py.h5d.DatasetID, place: str, chunk_bytes: int) -> None:
    """No chunk is stored in more bytes than it can need.

    HDF5 inflates all that is there, whatever the chunk's size: a longer one would be a bomb.
    """
    longest = 0

    def note(chunk: Any) -> None:
        nonlocal longest
        longest = max(longest, chunk.size)

    if 0 not in dataset.shape:
        dataset.chunk_iter(note)
    if longest > chunk_bytes + chunk_bytes // 4 + _OVERHEAD_BYTES:
        raise RefusedError(f"{place} has a chunk of {longest} bytes for {chunk_bytes} decoded ones")
