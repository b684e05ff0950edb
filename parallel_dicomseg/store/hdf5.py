"""What is in the HDF5 file; writer.py puts the chunks there and gives it its name.

docs/format.md is the contract of what is written here. Nothing in it depends on a clock, a host,
an absolute path or the order in which workers finished.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import filters
from parallel_dicomseg.deidentify import Policy
from parallel_dicomseg.records import (
    FLAGS,
    Bytes,
    Float64,
    Headers,
    Int64,
    Layout,
    MarkTable,
    Problem,
    Reason,
    SliceTable,
)
from parallel_dicomseg.store.contents import write_contents
from parallel_dicomseg.store.headers import (
    Fragment,
    full_header,
    method_of,
    series_json,
    varying_headers,
)
from parallel_dicomseg.store.metadata_file import MetadataFile
from parallel_dicomseg.store.table import (
    Columns,
    mark_columns,
    rejected_columns,
    series_columns,
    texts,
    volume_columns,
)

FORMAT = "parallel_dicomseg"
FORMAT_VERSION = 3
#: Versions that are read: the second one has neither seal nor digest of its metadata.
READABLE_VERSIONS = (2, FORMAT_VERSION)

_COLUMN_CHUNK_ROWS = 16384
# Of a column's chunk, where rows are long texts.
_COLUMN_CHUNK_BYTES = 1 << 20

#: Names of the axes of /images, of which a grey one lacks the last.
IMAGE_AXES = ("slice", "row", "column", "sample")
#: The attribute pad_value where each slice is padded with its own smallest value.
SLICE_MINIMUM = "minimum"

INTENSITY_STATISTICS = ("minimum", "maximum", "mean", "standard_deviation")

# netCDF's way of naming a dimension that has no coordinate values, so that xarray opens the file.
_NO_COORDINATE = "This is a netCDF dimension but not a netCDF variable.%10d"

#: Names of the second axis of the table's columns.
_SECOND_AXES = {
    "image_position_patient": "patient_axis",
    "image_orientation_patient": "direction_cosine",
    "pixel_spacing": "spacing_axis",
    "source_pixel_spacing": "spacing_axis",
    "grid_origin": "spacing_axis",
    "grid_step": "spacing_axis",
    "structure_annotated": "structure",
    "outlined": "structure",
    "cropped": "structure",
    "area": "structure",
    "area_mm2": "structure",
    "components": "structure",
    "ellipse_residual": "structure",
    "outside": "nested_pair",
    "intensity": "statistic",
    "column_row": "pixel_axis",
}
_UNITS = {
    "image_position_patient": "mm",
    "pixel_spacing": "mm",
    "source_pixel_spacing": "mm",
    "grid_origin": "source pixel",
    "grid_step": "source pixel",
    "slice_distance": "mm",
    "slice_thickness": "mm",
    "area": "pixel",
    "area_mm2": "mm2",
    "cropped": "pixel",
    "outside": "pixel",
    "ellipse_residual": "mean radius",
    "column_row": "pixel",
}


def create(
    content: MetadataFile, layout: Layout
) -> tuple[h5py.File, h5py.h5d.DatasetID, h5py.h5d.DatasetID]:
    """A new file that HDF5 1.10 reads, without the time at which its objects were made.

    The format of 1.10 needs 15 bytes of index per chunk; older ones need a B-tree.

    Returns
    -------
    The file, and its datasets /images and /masks of one chunk per slice.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, content)
    properties = _timeless(h5py.h5p.FILE_CREATE)
    # the name is for nobody, but two open files may not have the same
    name = repr(content).encode()
    file = h5py.File(h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, properties, access))
    shape = (layout.slices, layout.rows, layout.columns)
    samples = (layout.samples,) if layout.samples > 1 else ()
    images = _chunked(file, b"images", (*shape, *samples), layout.image_dtype, layout.codec)
    masks = _chunked(file, b"masks", shape, layout.mask_dtype, layout.codec)
    return file, images, masks


def _timeless(kind: Any) -> Any:
    """Creation properties of an object that does not record when it was made."""
    properties = h5py.h5p.create(kind)
    properties.set_obj_track_times(False)
    return properties


def _chunked(
    file: h5py.File, name: bytes, shape: tuple[int, ...], dtype: str, codec: str
) -> h5py.h5d.DatasetID:
    """Create a dataset of one chunk per slice, without asking for the filter to be installed."""
    itemsize = np.dtype(dtype).itemsize
    properties = _timeless(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((1, *shape[1:]))
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    for stage in filters(codec, itemsize, math.prod(shape[1:]) * itemsize):
        properties.set_filter(stage.number, h5py.h5z.FLAG_OPTIONAL, stage.values)
    return h5py.h5d.create(
        file.id,
        name,
        h5py.h5t.py_create(np.dtype(dtype)),
        h5py.h5s.create_simple(shape, shape),
        properties,
    )


def chunk_index(dataset: h5py.h5d.DatasetID, rows: int) -> tuple[Int64, Int64]:
    """(n,) byte offset in the file and (n,) encoded size of each slice's chunk; 0 where missing."""
    offsets = np.zeros(rows, np.int64)
    sizes = np.zeros(rows, np.int64)

    def note(chunk: Any) -> None:
        row = chunk.chunk_offset[0]
        offsets[row] = chunk.byte_offset
        sizes[row] = chunk.size

    if rows:
        dataset.chunk_iter(note)
    return offsets, sizes


# --- everything but the chunks -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metadata:
    """All that a finished file says, but for its chunks."""

    layout: Layout
    slices: SliceTable
    """The n slices of the file."""
    kept: Int64
    """(n,) which of the plan's slices they are."""
    headers: Headers
    """Of all of the plan's slices."""
    grid: Float64
    """(n, 4) as in `SliceRefs.grid`."""
    marks: MarkTable
    """On the n slices."""
    table: Columns
    """Of /table."""
    identity: Policy
    root: str
    """The data directory, from which headers are read in full where identity is kept."""
    provenance: Mapping[str, Sequence[str]]
    problems: tuple[Problem, ...]


def write_metadata(file: h5py.File, metadata: Metadata) -> tuple[Problem, ...]:
    """Write everything but the chunks.

    Returns
    -------
    The problems, and those of headers that could not be read again.
    """
    images, masks = file["images"], file["masks"]
    table, slices = metadata.table, metadata.slices
    _write_attributes(file, metadata.layout, metadata.identity, metadata.provenance)
    _describe_arrays(images, masks, metadata.layout)
    scales = _Scales(file)
    scales.attach(images, *IMAGE_AXES[: images.ndim])
    scales.attach(masks, *IMAGE_AXES[: masks.ndim])
    _write_columns(file, "table", table, scales, "slice")
    series = series_columns(slices, table)
    headers, unread = _write_headers(file, scales, metadata, series["first_slice"])
    _write_columns(file, "series", series | {"header": headers}, scales, "series_number")
    _write_columns(file, "volumes", volume_columns(table), scales, "volume_number")
    marks = mark_columns(metadata.marks, metadata.grid)
    _write_columns(file, "marks", marks, scales, "mark")
    problems = (*metadata.problems, *unread)
    _write_columns(file, "rejected", rejected_columns(problems), scales, "rejection")
    file["table/flags"].attrs["flag_names"] = list(FLAGS)
    file["table/intensity"].attrs["statistics"] = list(INTENSITY_STATISTICS)
    for name, source in (("input", images), ("output", masks)):
        _write_view(file, name, source, scales)
    write_contents(file)
    return problems


def _write_headers(
    file: h5py.File, scales: _Scales, metadata: Metadata, first: Int64
) -> tuple[Bytes, tuple[Problem, ...]]:
    """Write /headers; the JSON of each series (k,), and what could not be read for it."""
    slices, identity = metadata.slices, metadata.identity
    _new_group(file, "headers")
    constant = [method_of(identity) for _ in first.tolist()]
    # one by one: the codes of all attributes are larger than the rest of the cohort
    headers = ((name, column.take(metadata.kept)) for name, column in metadata.headers.items())
    varying = varying_headers(headers, slices.patient_id, first, identity, constant)
    for keyword, column in varying:
        _write_column(file["headers"], keyword, column, scales, "slice")
    unread: list[Problem] = []
    if not identity.keep_identity:
        return texts([series_json(members) for members in constant]), ()
    described = [
        _full_header(metadata.root, os.fsdecode(path), members, unread)
        for path, members in zip(slices.path[first].tolist(), constant, strict=True)
    ]
    return texts(described), tuple(unread)


def _full_header(root: str, path: str, known: list[Fragment], unread: list[Problem]) -> str:
    try:
        return full_header(f"{root}/{path}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        detail = f"the full header cannot be read again, only listed attributes are kept: {reason}"
        unread.append(Problem(path, Reason.UNREADABLE_FILE, detail))
        return series_json(known)


def _write_attributes(
    file: h5py.File, layout: Layout, identity: Policy, provenance: Mapping[str, Sequence[str]]
) -> None:
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "software_version": version("parallel_dicomseg"),
        "source": layout.source,
        "codec": layout.codec,
        "rule": layout.rule,
        "contour_origin": layout.contour_origin,
        "partial_overlap": layout.partial_overlap,
        "include_unannotated": layout.include_unannotated,
        "resampled": layout.resampled,
        "pad_value": SLICE_MINIMUM if math.isnan(layout.pad_value) else layout.pad_value,
        "invert_monochrome1": layout.invert_monochrome1,
        "keep_identity": identity.keep_identity,
        "pseudonyms": identity.pseudonyms,
        "dates": identity.dates,
        "hashed_paths": identity.hash_paths and not identity.keep_identity,
        **{f"check_{name}": threshold for name, threshold in asdict(layout.checks).items()},
    }
    for name, value in attributes.items():
        file.attrs[name] = value
    for name, listed in provenance.items():
        # HDF5 ends a text at a NUL, and damaged files spell names with one
        file.attrs[name] = [text.replace("\0", " ") for text in listed]


def _describe_arrays(images: h5py.Dataset, masks: h5py.Dataset, layout: Layout) -> None:
    images.attrs["long_name"] = "rescaled pixel values"
    if images.ndim == len(IMAGE_AXES):
        images.attrs["samples"] = ["red", "green", "blue"]
    masks.attrs["long_name"] = "bit s is structure s"
    masks.attrs["encoding"] = "bits"
    masks.attrs["structures"] = list(layout.structures)
    if layout.nested:
        pairs = [f"{layout.structures[i]} inside {layout.structures[o]}" for i, o in layout.nested]
        masks.attrs["nested"] = pairs


class _Scales:
    """Dimension scales, each made when a dataset first needs it."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._made: dict[str, h5py.Dataset] = {}

    def attach(self, dataset: h5py.Dataset, *names: str) -> None:
        """Name the axes of a dataset."""
        for axis, name in enumerate(names):
            dataset.dims[axis].attach_scale(self._scale(name, dataset.shape[axis]))
            dataset.dims[axis].label = name

    def _scale(self, name: str, size: int) -> h5py.Dataset:
        if name not in self._made:
            scale = self._file.create_dataset(name, shape=(size,), dtype=">f4", track_times=False)
            scale.make_scale(_NO_COORDINATE % size)
            self._made[name] = scale
        return self._made[name]


def _new_group(file: h5py.File, name: str) -> None:
    h5py.h5g.create(file.id, name.encode(), gcpl=_timeless(h5py.h5p.GROUP_CREATE))


def _write_columns(
    file: h5py.File, group: str, columns: Columns, scales: _Scales, axis: str
) -> None:
    _new_group(file, group)
    for name, column in columns.items():
        _write_column(file[group], name, column, scales, axis)


def _write_column(
    group: h5py.Group, name: str, column: NDArray[Any], scales: _Scales, axis: str
) -> None:
    dtype = column.dtype
    if dtype.kind == "S":
        dtype = h5py.string_dtype("utf-8", dtype.itemsize)
    row_bytes = max(1, column.nbytes // max(1, len(column)))
    rows = max(1, min(len(column), _COLUMN_CHUNK_ROWS, _COLUMN_CHUNK_BYTES // row_bytes))
    chunked = (
        {"chunks": (rows, *column.shape[1:])}
        | {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        if column.size
        else {}
    )
    dataset = group.create_dataset(name, data=column.astype(dtype), track_times=False, **chunked)
    axes = (axis,) if column.ndim == 1 else (axis, _SECOND_AXES[name])
    scales.attach(dataset, *axes)
    if name in _UNITS:
        dataset.attrs["units"] = _UNITS[name]


def _write_view(file: h5py.File, name: str, source: h5py.Dataset, scales: _Scales) -> None:
    """A virtual dataset: the same pixels, flattened, as the original loader reads them.

    Source and target select equally many points in the same order, which is all that HDF5 asks
    of a mapping; h5py's own VirtualLayout wants equal ranks, so this goes below it.
    """
    properties = _timeless(h5py.h5p.DATASET_CREATE)
    target = h5py.h5s.create_simple((len(source), math.prod(source.shape[1:])))
    properties.set_virtual(target, b".", source.name.encode(), source.id.get_space())
    h5py.h5d.create(file.id, name.encode(), source.id.get_type(), target, properties)
    scales.attach(file[name], "slice", "value" if source.ndim == len(IMAGE_AXES) else "pixel")
    file[name].attrs["lshape"] = np.array(view_shape(source.shape), np.int64)


def view_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(rows, columns, samples) of a slice of an array of this shape."""
    rows, columns, samples = (*shape[1:], 1)[:3]
    return rows, columns, samples
