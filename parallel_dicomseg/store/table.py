"""The columns of /table, /series and /rejected: pure functions of the cohort and the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.checks import identical_contours
from parallel_dicomseg.records import FLAGS, Bytes, Int64, Layout, Measured, Problem, SliceTable

Columns = dict[str, NDArray[Any]]

#: Columns of the SliceTable that name a person or an examination.
_IDENTITIES = {
    "patient_id": "patient",
    "study_instance_uid": "study",
    "series_instance_uid": "series",
    "sop_instance_uid": "instance",
    "frame_of_reference_uid": "frame-of-reference",
}
_FROM_HEADER = (
    "instance_number",
    "image_position_patient",
    "image_orientation_patient",
    "pixel_spacing",
    "slice_thickness",
    "rescale_slope",
    "rescale_intercept",
)
_OF_SERIES = (
    "transfer_syntax_uid",
    "photometric_interpretation",
    "rows",
    "columns",
    "bits_stored",
)


def without_identity(slices: SliceTable) -> Columns:
    """Running numbers, in the order of the output, in the place of names and UIDs.

    Equal ones stay equal: two series of one patient keep one patient number (PS3.15 Annex E
    asks for consistent replacement).
    """
    return {name: _numbered(getattr(slices, name), word) for name, word in _IDENTITIES.items()}


def _numbered(column: Bytes, word: str) -> Bytes:
    number, count = _running_number(column)
    digits = len(str(count))
    names = np.array([f"{word}-{k:0{digits}d}".encode() for k in range(1, count + 1)], np.bytes_)
    return names[number]


def _running_number(column: Bytes) -> tuple[Int64, int]:
    """(n,) the rank of each value by first appearance, and how many values there are."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse], len(first)


def _series_key(slices: SliceTable) -> Bytes:
    """(n,) patient and series UID: a UID may be missing, or copied into two patients."""
    separated: Bytes = np.char.add(slices.patient_id, b"/")
    key: Bytes = np.char.add(separated, slices.series_instance_uid)
    return key


def table_columns(slices: SliceTable, measured: Measured, layout: Layout) -> Columns:
    """The columns of /table for the n slices that are in the file."""
    identity = (
        {name: getattr(slices, name) for name in _IDENTITIES}
        if layout.keep_identity
        else without_identity(slices)
    )
    if layout.keep_identity:
        identity["source_path"] = slices.path
    patient, _ = _running_number(slices.patient_id)
    series, _ = _running_number(_series_key(slices))
    copied = identical_contours(measured.contour_digest, patient)
    bit = np.uint16(1 << FLAGS.index("identical-contours"))
    pixel_area = slices.pixel_spacing.prod(axis=1, keepdims=True)
    return {
        **identity,
        "series_index": series.astype(np.int32),
        **{name: getattr(slices, name) for name in _FROM_HEADER},
        "annotated": measured.annotated.any(axis=1),
        "structure_annotated": measured.annotated,
        "area": measured.area,
        "area_mm2": measured.area * pixel_area,
        "components": measured.components,
        "outside": measured.outside,
        "ellipse_residual": measured.ellipse_residual,
        "intensity": measured.intensity,
        "flags": measured.flags | np.where(copied, bit, np.uint16(0)),
    }


def series_columns(slices: SliceTable, table: Columns) -> Columns:
    """One row per series, in the order of the output: what its images have in common."""
    index = table["series_index"]
    _, first, count = np.unique(index, return_index=True, return_counts=True)
    modality = slices.modality[first]
    return {
        "patient_id": table["patient_id"][first],
        "study_instance_uid": table["study_instance_uid"][first],
        "series_instance_uid": table["series_instance_uid"][first],
        # a code string by the standard; anything else in its place is not carried on
        "modality": np.where(np.char.isalnum(modality), modality, b""),
        **{name: getattr(slices, name)[first] for name in _OF_SERIES},
        "first_slice": first.astype(np.int64),
        "slices": count.astype(np.int64),
    }


def rejected_columns(problems: Sequence[Problem]) -> Columns:
    """One row per problem: the relative path, the reason code, and what is wrong in words."""
    return {
        "path": _texts([problem.path for problem in problems]),
        "reason": _texts([problem.reason for problem in problems]),
        "detail": _texts([problem.detail for problem in problems]),
        "rejection": np.array([problem.is_rejection for problem in problems], bool),
    }


def _texts(values: list[str]) -> Bytes:
    """UTF-8; what a file name holds beyond it is escaped."""
    encoded = [value.encode("utf-8", "backslashreplace") for value in values]
    return np.array(encoded, np.bytes_) if encoded else np.empty(0, "S1")
