"""The columns of the file's tables, /table to /rejected: pure functions of what was converted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.checks import identical_contours
from parallel_dicomseg.deidentify import IDENTITIES, Policy, cleaned, pseudonyms, ranks
from parallel_dicomseg.geometry import normal_of, planes_of, stored_plane
from parallel_dicomseg.records import (
    FLAGS,
    WHOLE_IMAGE,
    Bytes,
    Float64,
    Int32,
    Int64,
    MarkTable,
    Measured,
    Problem,
    SliceTable,
)
from parallel_dicomseg.volumes import gap_before

Columns = dict[str, NDArray[Any]]

_FROM_HEADER = (
    "frame",
    "instance_number",
    "acquisition_number",
    "temporal_position",
    "image_orientation_patient",
    "slice_thickness",
    "rescale_slope",
    "rescale_intercept",
)
_STANDARD_UID = re.compile(rb"1\.2\.840\.10008[0-9.]+")


# --- /table --------------------------------------------------------------------------------------


def table_columns(
    slices: SliceTable, measured: Measured, grid: Float64, identity: Policy
) -> Columns:
    """The columns of /table for the n slices that are in the file.

    Parameters
    ----------
    slices, measured
        Of those slices, in their order.
    grid
        (n, 4) where each stored image lies on its source, as in `SliceRefs.grid`.
    identity
        What the columns may say of patients.
    """
    names = {
        name: pseudonyms(getattr(slices, name), kind, identity) for name, kind in IDENTITIES.items()
    }
    if identity.keep_identity:
        names["source_path"] = slices.path
    series = series_index(slices)
    position, spacing = stored_geometry(slices, grid)
    return {
        **names,
        "series_index": series,
        "volume": volume_index(slices, series),
        "split": slices.split,
        **{name: getattr(slices, name) for name in _FROM_HEADER},
        "image_position_patient": position,
        "pixel_spacing": spacing,
        "source_pixel_spacing": slices.pixel_spacing,
        "source_rows": slices.rows,
        "source_columns": slices.columns,
        "grid_origin": grid[:, :2],
        "grid_step": grid[:, 2:],
        "annotated": measured.annotated.any(axis=1),
        "structure_annotated": measured.annotated,
        "outlined": measured.outlined,
        "area": measured.area,
        "area_mm2": measured.area * spacing.prod(axis=1, keepdims=True),
        "components": measured.components,
        "cropped": measured.cropped,
        "outside": measured.outside,
        "ellipse_residual": measured.ellipse_residual,
        "intensity": measured.intensity,
        "flags": measured.flags | _flags_of_the_whole(slices, measured),
    }


def _flags_of_the_whole(slices: SliceTable, measured: Measured) -> NDArray[np.uint16]:
    """(n,) the flags that no task can raise, because they need other slices."""
    patient, _ = ranks(slices.patient_id)
    raised = {
        "identical-contours": identical_contours(measured.contour_digest, patient),
        "gap-before-slice": gap_before(slices),
    }
    flags = np.zeros(len(slices), np.uint16)
    for name, where in raised.items():
        flags |= where.astype(np.uint16) << np.uint16(FLAGS.index(name))
    return flags


def series_index(slices: SliceTable) -> Int32:
    """(n,) which series of the file, from 0: runs of one patient and series UID.

    A UID may be copied into two patients, or missing: then each folder is a series.
    """
    starts = _changes(slices.patient_id) | _changes(slices.series_instance_uid)
    nameless = np.flatnonzero(slices.series_instance_uid == b"")
    if len(nameless):
        folder = np.char.rpartition(slices.path[nameless], b"/")[:, 0]
        starts[nameless[_changes(folder)]] = True
    return _numbered(starts)


def volume_index(slices: SliceTable, series: Int32) -> Int32:
    """(n,) which volume of the file, from 0; the volumes of a series follow one another."""
    return _numbered(_changes(slices.volume) | _changes(series))


def _changes(column: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) whether a row differs from the one before; the first one does."""
    return np.append(np.ones(min(len(column), 1), np.bool_), column[1:] != column[:-1])


def _numbered(starts: NDArray[np.bool_]) -> Int32:
    return np.cumsum(starts, dtype=np.int32) - np.int32(1)


def stored_geometry(slices: SliceTable, grid: Float64) -> tuple[Float64, Float64]:
    """ImagePositionPatient (n, 3) and PixelSpacing (n, 2) of the stored images, mm.

    `geometry.stored_plane` for n planes; an image that is stored as it is keeps its position even
    where its spacing is unknown.
    """
    position, spacing = slices.image_position_patient, slices.pixel_spacing
    moved = np.flatnonzero((grid != WHOLE_IMAGE).any(axis=1))
    if not len(moved):
        return position, spacing
    stored = stored_plane(planes_of(slices)[moved], grid[moved])
    position, spacing = position.copy(), spacing.copy()
    position[moved], spacing[moved] = stored[:, :3], stored[:, 9:]
    return position, spacing


# --- /series, /volumes ---------------------------------------------------------------------------


def runs(index: Int32) -> tuple[Int64, Int64]:
    """Where each run of equal values starts, and how long it is."""
    first = np.flatnonzero(_changes(index))
    return first, np.diff(first, append=len(index))


def series_columns(slices: SliceTable, table: Columns) -> Columns:
    """One row per series, in the order of the output: what its images have in common."""
    first, count = runs(table["series_index"])
    photometric = slices.photometric_interpretation[first]
    return {
        "patient_id": table["patient_id"][first],
        "study_instance_uid": table["study_instance_uid"][first],
        "series_instance_uid": table["series_instance_uid"][first],
        # codes by the standard; anything else in their place is not carried on
        "modality": _codes(slices.modality[first]),
        "photometric_interpretation": _codes(photometric),
        "transfer_syntax_uid": _standard_uids(slices.transfer_syntax_uid[first]),
        **{name: getattr(slices, name)[first] for name in ("rows", "columns", "bits_stored")},
        "first_slice": first,
        "slices": count,
    }


def _codes(column: Bytes) -> Bytes:
    return np.array([cleaned(value, "CS") for value in column.tolist()], np.bytes_)


def _standard_uids(column: Bytes) -> Bytes:
    standard = [uid if _STANDARD_UID.fullmatch(uid) else b"" for uid in column.tolist()]
    return np.array(standard, np.bytes_)


def volume_columns(table: Columns) -> Columns:
    """One row per volume, in the order of the output, as it follows from /table.

    `slice_distance` is the median distance along the normal, mm, the lower of two middle ones;
    NaN for a single slice, and where a position is unknown. A `regular` volume has positions and
    no slice with the flag 'gap-before-slice'.
    """
    first, count = runs(table["volume"])
    gap = table["flags"] >> np.uint16(FLAGS.index("gap-before-slice")) & np.uint16(1)
    placed = np.isfinite(table["image_position_patient"]).all(axis=1)
    return {
        "series_index": table["series_index"][first],
        "patient_id": table["patient_id"][first],
        "first_slice": first,
        "slices": count,
        "slice_distance": _median_distances(table, first, count),
        "regular": np.logical_and.reduceat(placed & (gap == 0), first),
    }


def _median_distances(table: Columns, first: Int64, count: Int64) -> Float64:
    """(v,) mm along the normal of each volume's first slice."""
    volume, position = table["volume"], table["image_position_patient"]
    normal = normal_of(table["image_orientation_patient"][first])
    step = np.diff(position, axis=0, prepend=position[:1])
    distance = np.einsum("ij,ij->i", step, np.repeat(normal, count, axis=0))
    distance[first] = -np.inf
    # behind the first slice's stand count - 1 distances, NaN at the end
    ascending = distance[np.lexsort((distance, volume))]
    known = (count > 1) & ~np.isnan(ascending[first + count - 1])
    return np.where(known, ascending[first + count // 2], np.nan)


# --- /marks --------------------------------------------------------------------------------------


def mark_columns(marks: MarkTable, grid: Float64) -> Columns:
    """One row per point on the images of the file.

    Parameters
    ----------
    marks
        On the n slices that are in the file.
    grid
        (n, 4) of those slices, as in `SliceRefs.grid`.

    Returns
    -------
    `column_row` is in pixels of the stored images, so it may lie outside one that was cropped.
    """
    origin, step = grid[marks.slice, 1::-1], grid[marks.slice, :1:-1]
    return {
        "slice": marks.slice,
        "name": marks.name,
        "column_row": (marks.points_column_row - origin) / step,
    }


# --- /rejected -----------------------------------------------------------------------------------


def rejected_columns(problems: Sequence[Problem]) -> Columns:
    """One row per problem: the relative path, the reason code, and what is wrong in words."""
    return {
        "path": texts([problem.path for problem in problems]),
        "reason": texts([problem.reason for problem in problems]),
        "detail": texts([problem.detail for problem in problems]),
        "rejection": np.array([problem.is_rejection for problem in problems], bool),
    }


def texts(values: Sequence[str]) -> Bytes:
    """UTF-8; what a file name holds beyond it is escaped."""
    encoded = [value.encode("utf-8", "backslashreplace") for value in values]
    return np.array(encoded, np.bytes_) if encoded else np.empty(0, "S1")
