"""Write the HDF5 file: one writer, ready chunks, and an atomic rename as the last act.

docs/format.md is the contract of what is written here. Nothing in it depends on a clock, a host,
an absolute path or the order in which workers finished.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import checksums_of_file, filters
from parallel_dicomseg.deidentify import Policy, conceal_paths
from parallel_dicomseg.errors import ConversionError, VerificationError
from parallel_dicomseg.records import (
    FLAGS,
    WHOLE_IMAGE,
    Bytes,
    EncodedChunk,
    Float64,
    Headers,
    Int64,
    Layout,
    MarkTable,
    Measured,
    Problem,
    Reason,
    SliceTable,
    Summary,
)
from parallel_dicomseg.store.contents import write_contents
from parallel_dicomseg.store.headers import (
    Fragment,
    full_header,
    method_of,
    series_json,
    varying_headers,
)
from parallel_dicomseg.store.lock import locked
from parallel_dicomseg.store.sealing import seal_file
from parallel_dicomseg.store.table import (
    Columns,
    mark_columns,
    rejected_columns,
    series_columns,
    table_columns,
    texts,
    volume_columns,
)

FORMAT = "parallel_dicomseg"
FORMAT_VERSION = 3
#: Versions that are read: the second one has neither seal nor digest of its contents.
READABLE_VERSIONS = (2, FORMAT_VERSION)
PARTIAL_SUFFIX = ".partial"

_COLUMN_CHUNK_ROWS = 16384
# Of a column's chunk, where rows are long texts.
_COLUMN_CHUNK_BYTES = 1 << 20
# Chunks that one thread reads back at a time.
_CHUNKS_PER_CHECK = 256

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


class Hdf5Writer:
    """Puts encoded chunks into `OUT.h5.partial` in plan order; `publish` makes it OUT.h5.

    Rejected slices leave no gap: rows of the file are the good slices, in plan order. Not
    thread-safe; leaving the context without `publish` removes the partial file.
    """

    def __init__(
        self,
        output: Path,
        layout: Layout,
        slices: SliceTable,
        *,
        headers: Headers | None = None,
        grid: Float64 | None = None,
        marks: MarkTable | None = None,
        identity: Policy | None = None,
        root: str = "",
        provenance: Mapping[str, Sequence[str]] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Prepare; nothing is written before the context is entered.

        Parameters
        ----------
        output
            The file that `publish` makes.
        layout, slices
            Of the plan, n slices.
        headers
            Attributes of the n slices; none by default.
        grid
            (n, 4) where each stored image lies on its source, as in `SliceRefs.grid`; by default
            all are stored as they are.
        marks
            Points on the n slices; none by default.
        identity
            What the file may say of patients; `layout.keep_identity` alone by default.
        root
            The data directory, from which headers are read in full where identity is kept.
        provenance
            Further attributes of the root that say how the file was made: lists of texts, as
            docs/format.md names them.
        overwrite
            Replace an existing output.
        """
        self._output = output
        self._partial = output.with_name(output.name + PARTIAL_SUFFIX)
        self._layout = layout
        self._slices = slices
        self._headers = headers or {}
        self._grid = np.tile(WHOLE_IMAGE, (len(slices), 1)) if grid is None else grid
        self._marks = marks or MarkTable.empty()
        self._identity = identity or Policy(keep_identity=layout.keep_identity)
        self._root = root
        self._provenance = provenance or {}
        self._overwrite = overwrite
        self._held = ExitStack()
        self._file: h5py.File | None = None
        self._kept: list[Int64] = []
        self._measured: list[Measured] = []
        self._problems: list[Problem] = []
        self._chunks = _Chunks([], [])
        self._rows = 0
        self.slices_seen = 0
        """Slices put so far, rejected ones among them."""

    def __enter__(self) -> Self:
        layout = self._layout
        with ExitStack() as held:
            held.enter_context(locked(self._output))
            with _as_conversion_error(self._partial):
                self._file = _create(self._partial)
            shape = (layout.slices, layout.rows, layout.columns)
            samples = (layout.samples,) if layout.samples > 1 else ()
            codec = layout.codec
            self._images = _chunked(
                self._file, b"images", (*shape, *samples), layout.image_dtype, codec
            )
            self._masks = _chunked(self._file, b"masks", shape, layout.mask_dtype, codec)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            if self._file is not None:
                try:
                    # on a full disk HDF5 cannot flush; what it holds is not wanted anyway
                    with contextlib.suppress(OSError, RuntimeError):
                        self._file.close()
                finally:
                    self._partial.unlink(missing_ok=True)

    def put(self, chunk: EncodedChunk) -> None:
        """Write the chunks of one task; tasks come in plan order."""
        if chunk.first != self.slices_seen:
            raise ConversionError(
                f"slices from {chunk.first} on came where {self.slices_seen} is next"
            )
        self.slices_seen += len(chunk.image_sizes)
        good = np.flatnonzero(chunk.image_sizes)
        sizes = np.stack([chunk.image_sizes[good], chunk.mask_sizes[good]])
        with _as_conversion_error(self._partial):
            self._write_chunks(chunk, sizes[0], sizes[1])
        self._rows += len(good)
        self._kept.append(good + chunk.first)
        self._measured.append(_rows_of(chunk.measured, good))
        self._problems += chunk.problems
        self._chunks.sizes.append(sizes)
        self._chunks.crc32c.append(np.stack([chunk.image_crc32c[good], chunk.mask_crc32c[good]]))

    def _write_chunks(self, chunk: EncodedChunk, image_sizes: Int64, mask_sizes: Int64) -> None:
        # A slice's image and mask lie side by side: one read ahead gets both, and the bytes of
        # the file do not depend on how many slices a task has.
        image_end, mask_end = 0, 0
        corner = (0,) * (self._images.rank - 1)
        sizes = zip(image_sizes.tolist(), mask_sizes.tolist(), strict=True)
        for row, (image_size, mask_size) in enumerate(sizes, self._rows):
            image_start, image_end = image_end, image_end + image_size
            mask_start, mask_end = mask_end, mask_end + mask_size
            image = chunk.image_bytes[image_start:image_end]
            self._images.write_direct_chunk((row, *corner), image)
            self._masks.write_direct_chunk((row, 0, 0), chunk.mask_bytes[mask_start:mask_end])

    def publish(self, problems: Sequence[Problem]) -> Summary:
        """Write the tables, check the chunk index, and give the file its name.

        Parameters
        ----------
        problems
            What was found before the conversion; those of the chunks are added.
        """
        file = self._file
        if file is None:
            raise ConversionError("the writer is not open")
        found = conceal_paths((*problems, *self._problems), self._slices.path, self._identity)
        if not self._rows:
            first = next((problem for problem in found if problem.is_rejection), None)
            raise ConversionError(
                f"none of {self.slices_seen} slices could be converted; the first reason: "
                + (f"{first.path}: {first.detail}" if first else "unknown")
            )
        kept = np.concatenate(self._kept)
        whole = len(kept) == len(self._slices)
        slices = self._slices if whole else self._slices.take(kept)
        measured = _joined(self._measured)
        sizes = np.concatenate(self._chunks.sizes, axis=1)
        crc32c = np.concatenate(self._chunks.crc32c, axis=1)
        table = table_columns(slices, measured, self._grid[kept], self._identity)
        table |= {"image_crc32c": crc32c[0], "mask_crc32c": crc32c[1]}
        with _as_conversion_error(self._partial):
            for dataset in (self._images, self._masks):
                dataset.set_extent((self._rows, *dataset.shape[1:]))
            found = self._write_metadata(file, table, slices, kept, found)
            file.close()
            offsets = _check_chunks(self._partial, sizes, crc32c)
            seal_file(self._partial, offsets, sizes, crc32c)
            if self._output.exists() and not self._overwrite:
                raise ConversionError(f"{self._output} has appeared meanwhile, it is left alone")
            _rename_durably(self._partial, self._output)
        self._file = None
        return self._summary(slices, measured, table, found)

    def _write_metadata(
        self,
        file: h5py.File,
        table: Columns,
        slices: SliceTable,
        kept: Int64,
        problems: tuple[Problem, ...],
    ) -> tuple[Problem, ...]:
        """Everything but the chunks; the problems, and those of headers that cannot be read."""
        images, masks = file["images"], file["masks"]
        _write_attributes(file, self._layout, self._identity, self._provenance)
        _describe_arrays(images, masks, self._layout)
        scales = _Scales(file)
        scales.attach(images, *IMAGE_AXES[: images.ndim])
        scales.attach(masks, *IMAGE_AXES[: masks.ndim])
        _write_columns(file, "table", table, scales, "slice")
        series = series_columns(slices, table)
        headers, unread = self._write_headers(file, scales, slices, kept, series["first_slice"])
        _write_columns(file, "series", series | {"header": headers}, scales, "series_number")
        _write_columns(file, "volumes", volume_columns(table), scales, "volume_number")
        marks = mark_columns(self._marks.on_slices(kept), self._grid[kept])
        _write_columns(file, "marks", marks, scales, "mark")
        problems = (*problems, *unread)
        _write_columns(file, "rejected", rejected_columns(problems), scales, "rejection")
        file["table/flags"].attrs["flag_names"] = list(FLAGS)
        file["table/intensity"].attrs["statistics"] = list(INTENSITY_STATISTICS)
        for name, source in (("input", images), ("output", masks)):
            _write_view(file, name, source, scales)
        write_contents(file)
        return problems

    def _write_headers(
        self, file: h5py.File, scales: _Scales, slices: SliceTable, kept: Int64, first: Int64
    ) -> tuple[Bytes, tuple[Problem, ...]]:
        """Write /headers; the JSON of each series (k,), and what could not be read for it."""
        _new_group(file, "headers")
        constant = [method_of(self._identity) for _ in first.tolist()]
        # one by one: the codes of all attributes are larger than the rest of the cohort
        headers = ((keyword, column.take(kept)) for keyword, column in self._headers.items())
        varying = varying_headers(headers, slices.patient_id, first, self._identity, constant)
        for keyword, column in varying:
            _write_column(file["headers"], keyword, column, scales, "slice")
        unread: list[Problem] = []
        if not self._identity.keep_identity:
            return texts([series_json(members) for members in constant]), ()
        described = [
            self._full_header(os.fsdecode(path), members, unread)
            for path, members in zip(slices.path[first].tolist(), constant, strict=True)
        ]
        return texts(described), tuple(unread)

    def _full_header(self, path: str, known: list[Fragment], unread: list[Problem]) -> str:
        try:
            return full_header(f"{self._root}/{path}")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            detail = (
                f"the full header cannot be read again, only listed attributes are kept: {reason}"
            )
            unread.append(Problem(path, Reason.UNREADABLE_FILE, detail))
            return series_json(known)

    def _summary(
        self, slices: SliceTable, measured: Measured, table: Columns, problems: tuple[Problem, ...]
    ) -> Summary:
        counts = {
            name: int(np.count_nonzero(table["flags"] & (1 << bit)))
            for bit, name in enumerate(FLAGS)
        }
        return Summary(
            output=str(self._output),
            slices=self._rows,
            patients=len(np.unique(slices.patient_id)),
            rows=self._layout.rows,
            columns=self._layout.columns,
            structures=self._layout.structures,
            annotated=tuple(measured.outlined.sum(axis=0).tolist()),
            problems=problems,
            flagged={name: count for name, count in counts.items() if count},
            seconds=0.0,
            bytes_written=self._output.stat().st_size,
        )


class _Chunks(NamedTuple):
    """What was put, to compare with what is on the disk."""

    sizes: list[Int64]
    """(2, rows) encoded bytes of images and masks."""
    crc32c: list[NDArray[np.uint32]]
    """(2, rows)."""


@contextmanager
def _as_conversion_error(path: Path) -> Iterator[None]:
    """Tell what HDF5 and the system report about a file that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ConversionError(f"{path} cannot be written: {reason}") from error


def _check_chunks(path: Path, sizes: Int64, crc32c: NDArray[np.uint32]) -> Int64:
    """Read every chunk back from the closed file and compare it with what the workers made.

    Returns (2, n) where they lie.
    """
    rows = sizes.shape[1]
    with h5py.File(path, "r") as file:
        index = [chunk_index(file[name].id, rows) for name in ("images", "masks")]
    offsets, stored = np.stack([of for of, _ in index]), np.stack([size for _, size in index])
    blocks = [slice(at, at + _CHUNKS_PER_CHECK) for at in range(0, rows, _CHUNKS_PER_CHECK)]
    found = np.zeros_like(crc32c)
    with path.open("rb") as raw, ThreadPoolExecutor(os.cpu_count()) as pool:

        def read(place: int, block: slice) -> None:
            here = offsets[place, block], stored[place, block]
            found[place, block] = checksums_of_file(raw.fileno(), *here)

        list(pool.map(read, *zip(*itertools.product((0, 1), blocks), strict=True)))
    wrong = np.argwhere((stored != sizes) | (found != crc32c))
    if len(wrong):
        place, row = wrong[0].tolist()
        raise VerificationError(
            f"{path}: chunk {row} of /{('images', 'masks')[place]} has {stored[place, row]} bytes "
            f"of checksum {found[place, row]:08x}, {sizes[place, row]} bytes of "
            f"{crc32c[place, row]:08x} were written"
        )
    return offsets


def _create(path: Path) -> h5py.File:
    """A new file that HDF5 1.10 reads, without the time at which its objects were made.

    The format of 1.10 needs 15 bytes of index per chunk; older ones need a B-tree.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    create = _timeless(h5py.h5p.FILE_CREATE)
    return h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, create, access))


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


def _rows_of(measured: Measured, index: Int64) -> Measured:
    return Measured(**{f.name: getattr(measured, f.name)[index] for f in fields(Measured)})


def _joined(measured: Sequence[Measured]) -> Measured:
    return Measured(
        **{
            f.name: np.concatenate([getattr(part, f.name) for part in measured])
            for f in fields(Measured)
        }
    )


# --- everything but the chunks -------------------------------------------------------------------


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
        file.attrs[name] = list(listed)


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


def _rename_durably(partial: Path, output: Path) -> None:
    """Bytes to the disk, then the name, then the name to the disk."""
    _sync(partial, os.O_RDWR)
    partial.replace(output)
    with contextlib.suppress(PermissionError):  # Windows cannot open a directory
        _sync(output.parent, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
