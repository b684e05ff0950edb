"""Check a finished file: everything decodes, and the table tells the truth about the pixels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.checks import measure_intensity, measure_masks, raise_flags
from parallel_dicomseg.codec import checksums_of_file
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import FLAGS, Checks, Int64, Progress
from parallel_dicomseg.seal import Seal, damaged, read_seal
from parallel_dicomseg.store.attributes import CHECKSUM
from parallel_dicomseg.store.contents import CONTENTS, DIGEST, content_sha256
from parallel_dicomseg.store.dataset import Dataset, open_dataset
from parallel_dicomseg.store.hdf5 import view_shape
from parallel_dicomseg.store.table import Columns, volume_columns

# The version of files that have neither a seal nor a digest of their contents.
_UNSEALED = 2
_UNSEALED_NOTE = (
    "the file has format version 2, which has no seal: a bit that was flipped outside of pixels, "
    "table and attributes may go unnoticed; --overwrite writes the current version"
)
_CHUNKS_PER_BLOCK = 256
_SLICES_PER_BLOCK = 64
# Of the decoded images of a block; every thread holds one.
_BYTES_PER_BLOCK = 64 << 20

# Flags that follow from other columns of the table. "several-components" needs the number of
# outlines, of which the table knows only whether there is one: it can be refuted, not confirmed.
_CONFIRMED_FLAGS = (
    "mask-too-large",
    "empty-mask",
    "not-an-ellipse",
    "inner-not-inside-outer",
    "cut-by-crop",
)
_REFUTED_FLAGS = ("several-components",)

_SERIES_COLUMNS = ("patient_id", "first_slice", "slices", "header")
_VOLUME_COLUMNS = (
    "series_index",
    "patient_id",
    "first_slice",
    "slices",
    "slice_distance",
    "regular",
)
_SPLITS = frozenset({b"", b"train", b"validation", b"test"})
_MARK_COLUMNS = ("slice", "name", "column_row")
_REJECTED_COLUMNS = ("path", "reason", "detail", "rejection")


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_file` found."""

    path: str
    slices: int
    """Slices looked at."""
    problems: tuple[str, ...]
    """One sentence each; empty when the file is what it should be."""
    notes: tuple[str, ...] = ()
    """What could not be looked at, a sentence each."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify_file(
    path: str | Path,
    *,
    checksums_only: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Verification:
    """Read everything in a file, and compare what is said twice.

    First all bytes outside the pixels are compared with the seal. Where they differ, HDF5 never
    sees the file: the problems name the objects, and the slices whose chunks differ as well. Then
    every chunk is compared with its checksum and decoded; area, components, nesting and intensity
    are measured again; the columns that follow from others are computed again; /series, /volumes,
    /headers, /marks, /rejected and the views are compared with the table, every object with its
    digest; no patient may be in two parts of the split.

    Parameters
    ----------
    path
        A file that `convert_cohort` made.
    checksums_only
        Compare every byte with the seal, and leave it at that.
    progress
        Called after each block of slices.

    Raises
    ------
    LayoutError
        The file cannot be opened as one of ours, or has no seal where only that is asked for.
        Whatever else is wrong is a problem of the result.
    """
    slices, problems = _check_seal(Path(path), checksums_only)
    if problems or checksums_only:
        return Verification(str(path), slices, tuple(f"{path}: {text}" for text in problems))
    with open_dataset(path) as dataset:
        table, problems = _read_table(dataset)
        problems += _check_table(dataset, table)
        problems += _check_split(table)
        problems += _check_series(dataset, table)
        problems += _check_volumes(dataset, table)
        problems += _check_headers(dataset)
        problems += _check_marks(dataset)
        problems += _check_rejected(dataset)
        problems += _check_views(dataset)
        version = dataset.attributes["format_version"]
        problems += _check_attributes(dataset) if version == _UNSEALED else _check_contents(dataset)
        if dataset.masks.shape != dataset.images.shape[:3]:
            problems.append(f"/masks is {dataset.masks.shape}, /images is {dataset.images.shape}")
        else:
            problems += _check_pixels(dataset, table, progress)
        notes = (_UNSEALED_NOTE,) if version == _UNSEALED else ()
        return Verification(str(path), len(dataset), tuple(problems), notes)


# --- all bytes -----------------------------------------------------------------------------------


def _check_seal(path: Path, pixels: bool) -> tuple[int, list[str]]:
    """Compare the bytes with the seal, where there is one, and count slices.

    Chunks are read where `pixels` says so, or something else differs: otherwise they are compared
    with the same checksums when they are decoded.
    """
    if not path.is_file():
        return 0, []  # whoever opens it says so
    with path.open("rb") as file:
        descriptor = file.fileno()
        try:
            seal = read_seal(descriptor)
        except ValueError as error:
            return 0, [str(error)]
        if seal is None:
            if pixels:
                raise LayoutError(f"{path} has no seal")
            return 0, []
        problems = damaged(descriptor, seal, np.flatnonzero(~seal.holds_pixels))
        if problems or pixels:
            problems += _damaged_chunks(descriptor, seal)
        return int(np.count_nonzero(seal.extents["owner"] == 0)), problems


def _damaged_chunks(descriptor: int, seal: Seal) -> list[str]:
    places = np.flatnonzero(seal.holds_pixels)
    blocks = np.array_split(places, max(1, len(places) // _CHUNKS_PER_BLOCK))
    sizes = seal.extents["size"].astype(np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = np.concatenate(
            list(
                pool.map(
                    lambda block: checksums_of_file(descriptor, seal.offsets[block], sizes[block]),
                    blocks,
                )
            )
        )
    differ = np.flatnonzero(found != seal.extents["crc32c"][places])
    return [seal.difference(places[k], int(found[k])) for k in differ]


def _check_contents(dataset: Dataset) -> list[str]:
    """Every object has the digest that the root says, and there are no others."""
    problems = [] if dataset.seal else ["it has no seal: another program wrote to it, or cut it"]
    problems = [f"{dataset.path}: {text}" for text in problems]
    with _noting(problems):
        found = dataset.contents()
        listed = dataset.attributes.get(CONTENTS)
        told = dict(text.rsplit(" ", 1) for text in listed) if isinstance(listed, list) else {}
        if content_sha256(told) != dataset.attributes.get(DIGEST):
            problems.append(f"/: {DIGEST} is not that of the digests in {CONTENTS}")
        for name in sorted(found.keys() | told.keys()):
            if name not in told:
                problems.append(f"{name} was not in the file when it was written")
            elif name not in found:
                problems.append(f"{name} is missing")
            elif found[name] != told[name]:
                problems.append(f"{name}: its contents have another digest than {CONTENTS} says")
    return problems


# --- what is said about the slices ---------------------------------------------------------------


def _expected_columns(dataset: Dataset) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Kind of type and shape of the columns that are compared with others or with the pixels."""
    slices, structures = len(dataset), len(dataset.structures)
    return {
        "patient_id": ("S", (slices,)),
        "split": ("S", (slices,)),
        "series_index": ("i", (slices,)),
        "volume": ("i", (slices,)),
        "image_position_patient": ("f", (slices, 3)),
        "image_orientation_patient": ("f", (slices, 6)),
        "pixel_spacing": ("f", (slices, 2)),
        "annotated": ("b", (slices,)),
        "structure_annotated": ("b", (slices, structures)),
        "outlined": ("b", (slices, structures)),
        "cropped": ("i", (slices, structures)),
        "area": ("i", (slices, structures)),
        "area_mm2": ("f", (slices, structures)),
        "components": ("i", (slices, structures)),
        "outside": ("i", (slices, len(dataset.nested))),
        "ellipse_residual": ("f", (slices, structures)),
        "intensity": ("f", (slices, 4)),
        "flags": ("u", (slices,)),
    }


def _read_table(dataset: Dataset) -> tuple[Columns, list[str]]:
    """The columns that are what they should be, and what is wrong with the others."""
    expected = _expected_columns(dataset)
    required = [name for name, (_, shape) in expected.items() if 0 not in shape]
    found, problems = _read_columns(dataset, "table", required)
    table = {name: np.empty(shape, kind) for name, (kind, shape) in expected.items() if 0 in shape}
    checksum = ("u", (len(dataset),))
    expected |= {"image_crc32c": checksum, "mask_crc32c": checksum}
    for name, column in found.items():
        shape = (len(dataset), *column.shape[1:])
        wanted = expected.get(name, (column.dtype.kind, shape))
        if column.shape[:1] != shape[:1]:
            rows = len(column) if column.ndim else "no"
            problems.append(f"/table/{name} has {rows} rows, /images has {len(dataset)}")
        elif (column.dtype.kind, column.shape) != wanted:
            problems.append(
                f"/table/{name} is {column.dtype} {column.shape}, "
                f"it should be of kind {wanted[0]!r} {wanted[1]}"
            )
        else:
            table[name] = column
    return table, problems


def _read_columns(
    dataset: Dataset, group: str, required: Iterable[str]
) -> tuple[Columns, list[str]]:
    """All columns of a group that can be read, and why others cannot."""
    columns: Columns = {}
    problems: list[str] = []
    with _noting(problems):
        for name in dict.fromkeys((*dataset.columns(group), *required)):
            with _noting(problems):
                columns[name] = dataset.column(name, group)
    return columns, problems


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except LayoutError as error:
        problems.append(str(error))


def _check_table(dataset: Dataset, table: Columns) -> list[str]:
    """Compare the columns that follow from others with what follows."""
    if not _expected_columns(dataset).keys() <= table.keys():
        return []
    pixel_area = table["pixel_spacing"].prod(axis=1, keepdims=True)
    derived = {
        "annotated": table["structure_annotated"].any(axis=1),
        "structure_annotated": table["structure_annotated"] | table["outlined"],
        "outlined": table["outlined"] | (table["area"] > 0),
        "area_mm2": table["area"] * pixel_area,
    }
    rows = np.arange(len(dataset))
    return _differences(table, rows, derived, "the table gives") + _check_flags(dataset, table)


def _check_flags(dataset: Dataset, table: Columns) -> list[str]:
    _, rows, columns = dataset.shape
    derived = raise_flags(
        area=table["area"],
        components=table["components"],
        outside=table["outside"],
        ellipse_residual=table["ellipse_residual"],
        ring_count=table["outlined"].astype(np.int32),
        nested=dataset.nested,
        pixels=rows * columns,
        longer_than_header=np.zeros(len(dataset), np.bool_),
        cropped=table["cropped"],
        checks=Checks(**{f.name: dataset.attributes[f"check_{f.name}"] for f in fields(Checks)}),
    ).astype(np.int64)
    stored = table["flags"].astype(np.int64)
    impossible = _bits(_REFUTED_FLAGS) | ~_bits(FLAGS)
    wrong = ((stored ^ derived) & _bits(_CONFIRMED_FLAGS)) | (stored & ~derived & impossible)
    return [
        f"/table/flags[{row}] is {stored[row]:#x}, the table contradicts {_names(wrong[row])}"
        for row in np.flatnonzero(wrong)
    ]


def _bits(flags: Iterable[str]) -> int:
    return sum(1 << FLAGS.index(name) for name in flags)


def _names(bits: np.int64) -> str:
    return ", ".join(
        FLAGS[bit] if bit < len(FLAGS) else f"bit {bit}" for bit in range(63) if bits >> bit & 1
    )


def _differences(
    table: Columns, rows: Int64, truth: Columns, source: str, group: str = "/table"
) -> list[str]:
    """A sentence for each of `rows` where a column of a group is not what `source` gives."""
    problems = []
    for name, values in truth.items():
        stored = table[name][rows]
        same = values == stored
        if values.dtype.kind == stored.dtype.kind == "f":
            same |= np.isnan(values) & np.isnan(stored)
        wrong = np.flatnonzero(~same.all(axis=tuple(range(1, same.ndim))))
        problems += [
            f"{group}/{name}[{rows[k]}] is {stored[k].tolist()}, {source} {values[k].tolist()}"
            for k in wrong
        ]
    return problems


# --- what stands beside the table ----------------------------------------------------------------


def _check_split(table: Columns) -> list[str]:
    """Only parts that there are, and no patient in two of them."""
    if not {"split", "patient_id"} <= table.keys():
        return []
    unknown = sorted(set(np.unique(table["split"]).tolist()) - _SPLITS)
    problems = [f"/table/split has {part!r}, which is no part of a split" for part in unknown]
    pairs = np.unique(np.rec.fromarrays([table["patient_id"], table["split"]]))
    patients, parts = np.unique(pairs["f0"], return_counts=True)
    return problems + [
        f"/table/split has {patient.decode('utf-8', 'replace')} in {count} parts"
        for patient, count in zip(patients[parts > 1].tolist(), parts[parts > 1], strict=True)
    ]


def _check_series(dataset: Dataset, table: Columns) -> list[str]:
    """The series lie one after another, cover all slices, and are those of the table."""
    series, problems = _read_columns(dataset, "series", _SERIES_COLUMNS)
    problems += _check_lengths("series", series)
    problems = problems or _check_cover(dataset, "series", series)
    if problems:
        return problems
    if "series_index" in table:
        problems += _differences(table, *_index_of(series, "series_index"), "/series gives")
    for row in range(len(series["header"])):
        with _noting(problems):
            dataset.series_header(row)
    first = series["first_slice"]
    return problems + [
        f"/series/{name}[{row}] is not that of slice {first[row]}"
        for name in series.keys() & table.keys()
        for row in np.flatnonzero(series[name] != table[name][first])
    ]


def _check_volumes(dataset: Dataset, table: Columns) -> list[str]:
    """The volumes lie one after another, cover all slices, and follow from the table."""
    volumes, problems = _read_columns(dataset, "volumes", _VOLUME_COLUMNS)
    problems += _check_lengths("volumes", volumes)
    problems = problems or _check_cover(dataset, "volumes", volumes)
    if problems or not _expected_columns(dataset).keys() <= table.keys():
        return problems
    problems = _differences(table, *_index_of(volumes, "volume"), "/volumes gives")
    return problems or _differences(
        volumes,
        np.arange(len(volumes["slices"])),
        volume_columns(table),
        "the table gives",
        "/volumes",
    )


def _check_cover(dataset: Dataset, group: str, columns: Columns) -> list[str]:
    """What starts at `first_slice` and is `slices` long covers the file without gap or overlap."""
    first, slices = columns["first_slice"], columns["slices"]
    if first.dtype.kind != "i" or slices.dtype.kind != "i":
        return [f"/{group}/first_slice and slices are {first.dtype} and {slices.dtype}"]
    end = np.cumsum(slices)
    if (slices < 1).any() or (first != end - slices).any() or end[-1:].tolist() != [len(dataset)]:
        return [f"/{group} does not cover slices 0 to {len(dataset) - 1} in order"]
    return []


def _index_of(columns: Columns, name: str) -> tuple[Int64, Columns]:
    """All rows of the table, and the column that counts what they belong to."""
    index = np.repeat(np.arange(len(columns["slices"])), columns["slices"])
    return np.arange(len(index)), {name: index}


def _check_headers(dataset: Dataset) -> list[str]:
    """Every attribute that varies has a value for every slice."""
    columns, problems = _read_columns(dataset, "headers", ())
    return problems + [
        f"/headers/{keyword} is {column.dtype} {column.shape}, it should be text ({len(dataset)},)"
        for keyword, column in columns.items()
        if column.shape != (len(dataset),) or column.dtype.kind != "S"
    ]


def _check_marks(dataset: Dataset) -> list[str]:
    """Every mark has a place on a slice of the file."""
    marks, problems = _read_columns(dataset, "marks", _MARK_COLUMNS)
    if problems:
        return problems
    count = len(marks["slice"])
    for name, kind, shape in (
        ("slice", "i", (count,)),
        ("name", "S", (count,)),
        ("column_row", "f", (count, 2)),
    ):
        column = marks[name]
        if (column.dtype.kind, column.shape) != (kind, shape):
            problems.append(
                f"/marks/{name} is {column.dtype} {column.shape}, "
                f"it should be of kind {kind!r} {shape}"
            )
    if problems:
        return problems
    slices = marks["slice"]
    off = np.flatnonzero((slices < 0) | (slices >= len(dataset)))
    nowhere = np.flatnonzero(~np.isfinite(marks["column_row"]).all(axis=1))
    return [
        *(f"/marks/slice[{k}] is {slices[k]}, /images has {len(dataset)}" for k in off),
        *(f"/marks/column_row[{k}] is not finite" for k in nowhere),
    ]


def _check_rejected(dataset: Dataset) -> list[str]:
    rejected, problems = _read_columns(dataset, "rejected", _REJECTED_COLUMNS)
    problems += _check_lengths("rejected", rejected)
    if problems:
        return problems
    with _noting(problems):
        flags = zip(dataset.rejected, rejected["rejection"].tolist(), strict=True)
        problems += [
            f"/rejected/rejection[{row}] is {flag}, the reason is {problem.reason}"
            for row, (problem, flag) in enumerate(flags)
            if flag != problem.is_rejection
        ]
    return problems


def _check_lengths(group: str, columns: Columns) -> list[str]:
    shapes = {column.shape for column in columns.values()}
    if len(shapes) <= 1 and all(len(shape) == 1 for shape in shapes):
        return []
    sizes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
    return [f"/{group} has columns of different lengths: {sizes}"]


def _check_views(dataset: Dataset) -> list[str]:
    problems: list[str] = []
    for name, source in (("input", dataset.images), ("output", dataset.masks)):
        with _noting(problems):
            shape, shown = dataset.view(name)
            lshape = dataset.attributes_of(name).get("lshape")
            pixels = view_shape(source.shape)
            wanted = (len(source), math.prod(pixels)), source.name, list(pixels)
            if (shape, shown, lshape) != wanted:
                problems.append(
                    f"/{name} is {shape} of {shown} with lshape {lshape}, "
                    f"it should be {wanted[0]} of {wanted[1]} with lshape {wanted[2]}"
                )
    return problems


def _check_attributes(dataset: Dataset) -> list[str]:
    """Every object opens, with its attributes; those with a checksum agree with it.

    Names of axes are not read: damaged ones make HDF5 end the process.
    """
    problems: list[str] = []
    with _noting(problems):
        for name in dataset.objects():
            with _noting(problems):
                dataset.attributes_of(name)
    if problems:
        return problems
    with _noting(problems):
        found, wanted = dataset.attributes_crc32c(), dataset.attributes.get(CHECKSUM)
        if found != wanted:
            problems.append(f"attributes have checksum {found}, {CHECKSUM} of / is {wanted}")
    return problems


# --- the pixels ----------------------------------------------------------------------------------


def _check_pixels(
    dataset: Dataset, table: Columns, progress: Callable[[Progress], None] | None
) -> list[str]:
    slice_bytes = math.prod(dataset.images.shape[1:]) * dataset.image_dtype.itemsize
    step = max(1, min(_SLICES_PER_BLOCK, _BYTES_PER_BLOCK // max(1, slice_bytes)))
    starts = range(0, len(dataset), step)
    problems: list[str] = []
    # The threads see pread and arrays; h5py is not to be shared among them.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = pool.map(lambda start: _check_block(dataset, table, start, step), starts)
        for start, found in zip(starts, blocks, strict=True):
            problems += found
            if progress:
                progress(Progress("verify", min(start + step, len(dataset)), len(dataset)))
    return problems


def _check_block(dataset: Dataset, table: Columns, start: int, step: int) -> list[str]:
    rows = range(start, min(start + step, len(dataset)))
    images = np.empty((len(rows), *dataset.images.shape[1:]), dataset.image_dtype)
    masks = np.empty((len(rows), *dataset.masks.shape[1:]), dataset.mask_dtype)
    sound: list[int] = []
    problems: list[str] = []
    for row in rows:
        found: list[str] = []
        for array, name, out in (
            (dataset.images, "image_crc32c", images),
            (dataset.masks, "mask_crc32c", masks),
        ):
            with _noting(found):
                checksum = int(table[name][row]) if name in table else None
                array.read_into(row, out[len(sound)], checksum)
        problems += found
        if not found:
            sound.append(row)
    index = np.array(sound, np.int64)
    return problems + _check_measurements(
        dataset, table, index, images[: len(index)], masks[: len(index)]
    )


def _check_measurements(
    dataset: Dataset, table: Columns, rows: Int64, images: NDArray[Any], masks: NDArray[Any]
) -> list[str]:
    """Compare the pixels of the slices `rows` with the table, as far as it can be relied on."""
    used = sum(1 << bit for bit in range(len(dataset.structures)))
    stray = (masks & ~masks.dtype.type(used)).any(axis=(1, 2))
    problems = [f"/masks[{row}] has bits beyond its structures" for row in rows[stray]]
    if not _expected_columns(dataset).keys() <= table.keys():
        return problems
    area, components, outside = measure_masks(masks, table["outlined"][rows], dataset.nested)
    flat = images.reshape(*images.shape[:2], math.prod(images.shape[2:]))
    measured: Columns = {
        "area": area,
        "components": components,
        "outside": outside,
        "intensity": measure_intensity(flat),
    }
    return _differences(table, rows, measured, "the pixels give") + problems
