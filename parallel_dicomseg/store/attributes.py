"""Attributes of a file as plain values, and a checksum of those that say what the arrays mean.

HDF5 guards its own structures with checksums, but not the heap in which texts of any length lie.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import google_crc32c
import h5py
import numpy as np

from parallel_dicomseg.foreign import SCALE_ATTRIBUTES, check_attributes, object_of

#: Attribute of the root in files of version 2: the checksum of all others of `_CHECKED`.
CHECKSUM = "attributes_crc32c"

_CHECKED = ("/", "images", "masks", "table/flags", "table/intensity")


def attributes_crc32c(file: h5py.File) -> int:
    """CRC-32C of the attributes of root, arrays and bit columns, as JSON sorted by name."""
    said = {}
    for name in _CHECKED:
        with suppress(KeyError):
            # `in` and `[]` of h5py would follow a link out of the file
            said[name] = plain_attributes(object_of(file, name, inflated=False))
    said["/"].pop(CHECKSUM, None)
    return int(google_crc32c.value(json.dumps(said, sort_keys=True).encode()))


def plain_attributes(owner: h5py.HLObject) -> dict[str, Any]:
    """Attributes as Python numbers, texts, bools or lists of them, without dimension scales."""
    check_attributes(owner)
    names = [name for name in owner.attrs if name not in SCALE_ATTRIBUTES]
    return {name: _plain(owner.attrs[name]) for name in names}


def _plain(value: Any) -> Any:
    plain = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return [_text(item) for item in plain] if isinstance(plain, list) else _text(plain)


def _text(value: Any) -> Any:
    """Text of fixed length as str; damaged text, which h5py reads as surrogates, is refused."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        value.encode()
    return value
