"""A digest of what a file says, object by object: the same wherever HDF5 has put the bytes.

The pixels are in it by the checksums of their chunks, which are columns of the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from parallel_dicomseg.store.attributes import plain_attributes

#: Attributes of the root: the digest of each object, as texts "name digest", and that of them all.
CONTENTS, DIGEST = "contents", "content_sha256"

# Their values are not read: pixels are known by their chunks, views show the pixels.
_PIXELS = ("/images", "/masks")


def contents(file: h5py.File) -> dict[str, str]:
    """The SHA-256 of each group and dataset, by its name, hexadecimal.

    Of a group: what it links to, and its attributes. Of a dataset: type, shape, layout, filters,
    fill value, what a view shows, names and scales of the axes, attributes, values.
    """
    places = {h5py.h5o.get_info(file.id).addr: "/"}
    names: list[str] = []
    file.visit(names.append)
    objects = {"/": file["/"]} | {f"/{name}": file[name] for name in names}
    places |= {h5py.h5o.get_info(each.id).addr: name for name, each in objects.items()}
    return {name: _digest(name, each, places) for name, each in objects.items()}


def content_sha256(told: Mapping[str, str]) -> str:
    """The digest of all objects' digests."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def write_contents(file: h5py.File) -> None:
    """Digest a file that is complete but for this."""
    told = contents(file)
    file.attrs[CONTENTS] = [f"{name} {digest}" for name, digest in sorted(told.items())]
    file.attrs[DIGEST] = content_sha256(told)


def _digest(name: str, each: Any, places: Mapping[int, str]) -> str:
    attributes = plain_attributes(each)
    for own in (CONTENTS, DIGEST):
        attributes.pop(own, None)
    if isinstance(each, h5py.Group):
        said: dict[str, Any] = {"links": _links(each)}
    else:
        said = _described(each, places)
    said["attributes"] = attributes
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    if _has_values(name, each):
        digest.update(each[()].tobytes())
    return digest.hexdigest()


def _has_values(name: str, each: Any) -> bool:
    """Whether values are in the digest; those of scales were never written."""
    return isinstance(each, h5py.Dataset) and not (
        name in _PIXELS or not each.id.get_storage_size() or each.is_virtual
    )


def _links(group: h5py.Group) -> list[tuple[str, str, Any]]:
    found = []
    for name in sorted(group):
        link = group.get(name, getlink=True)
        target = [getattr(link, part, "") for part in ("filename", "path")]
        found.append((name, type(link).__name__, target))
    return found


def _described(dataset: h5py.Dataset, places: Mapping[int, str]) -> dict[str, Any]:
    created = dataset.id.get_create_plist()
    layout, space, dtype = created.get_layout(), dataset.id.get_space(), dataset.dtype
    filters = [created.get_filter(k) for k in range(created.get_nfilters())]
    text = h5py.check_string_dtype(dtype)
    views = dataset.virtual_sources() if layout == h5py.h5d.VIRTUAL else []
    fill = np.zeros((), dtype)
    created.get_fill_value(fill)
    return {
        "type": [dtype.str, text.encoding if text else ""],
        "shape": [space.get_simple_extent_dims(), space.get_simple_extent_dims(maxdims=1)],
        "layout": layout,
        "chunks": created.get_chunk() if layout == h5py.h5d.CHUNKED else None,
        "filters": [(number, values) for number, _, values, _ in filters],
        "fill": fill.tobytes().hex(),
        "shows": [
            (v.file_name, v.dset_name, _selection(v.vspace), _selection(v.src_space)) for v in views
        ],
        "axes": _axes(dataset, places),
    }


def _selection(space: Any) -> tuple[int, Any]:
    """What a piece of a view selects: everything, or the corners of a part."""
    kind = space.get_select_type()
    return kind, space.get_select_bounds() if kind == h5py.h5s.SEL_HYPERSLABS else None


def _axes(dataset: h5py.Dataset, places: Mapping[int, str]) -> list[tuple[str, list[str]]]:
    """The name of each axis, and the scales of it."""
    labels = dataset.attrs.get("DIMENSION_LABELS", ())
    scales = dataset.attrs.get("DIMENSION_LIST", ())
    named = [label.decode() if isinstance(label, bytes) else str(label) for label in labels]
    return [
        (label, [_place_of(dataset, reference, places) for reference in references])
        for label, references in zip(named, scales, strict=False)
    ]


def _place_of(dataset: h5py.Dataset, reference: Any, places: Mapping[int, str]) -> str:
    opened = h5py.h5r.dereference(reference, dataset.id)
    return places[h5py.h5o.get_info(opened).addr]
