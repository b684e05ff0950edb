"""Records made by hand, with pydicom alone, so that one room can be tested without the others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from parallel_dicomseg.rasterize import rasterize_batch
from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
    Contours,
    Drawn,
    ScannedFile,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources import rtstruct

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"

_NUMBERS = {"f": np.nan, "i": -1, "u": 0, "b": False}
_DTYPES = {
    "frame": "i4", "number_of_frames": "i4", "file_size": "i8", "pixel_offset": "i8",
    "pixel_length": "i8", "rows": "i4", "columns": "i4", "samples_per_pixel": "i4",
    "bits_allocated": "i4", "bits_stored": "i4", "pixel_representation": "i4",
    "rescale_slope": "f8", "rescale_intercept": "f8", "value_is_whole": "?",
    "instance_number": "i8", "acquisition_number": "i8", "temporal_position": "f8",
    "slice_thickness": "f8", "volume": "i4", "annotated": "u8",
}  # fmt: skip
_WIDE = {
    "image_position_patient": 3,
    "image_orientation_patient": 6,
    "pixel_spacing": 2,
    "value_range": 2,
}


def slice_table(**columns: Any) -> SliceTable:
    """A table of the given columns; the others hold nothing."""
    count = len(next(iter(columns.values())))
    made: dict[str, NDArray[Any]] = {}
    for one in fields(SliceTable):
        if one.name in columns and one.name not in _DTYPES and one.name not in _WIDE:
            made[one.name] = np.array(columns[one.name], np.bytes_)
        elif one.name in _WIDE:
            empty = np.full((count, _WIDE[one.name]), np.nan)
            made[one.name] = np.array(columns.get(one.name, empty), np.float64)
        elif one.name in _DTYPES:
            dtype = np.dtype(_DTYPES[one.name])
            empty = np.full(count, _NUMBERS.get(dtype.kind, 0))
            made[one.name] = np.array(columns.get(one.name, empty), dtype)
        else:
            made[one.name] = np.zeros(count, "S1")
    return SliceTable(**made)


def scan(root: Path, folder: str = "") -> tuple[SliceTable, list[ScannedFile]]:
    """Images below a folder, sorted by volume (one per series) and position; structure sets."""
    rows: list[dict[str, Any]] = []
    files = []
    for file in sorted(path for path in (root / folder).rglob("*") if path.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(file, force=True, stop_before_pixels=True)
            path = file.relative_to(root).as_posix()
            if dataset.get("SOPClassUID") == RTSTRUCT:
                files.append(ScannedFile(path, RTSTRUCT, file.stat().st_size))
            elif "ImagePositionPatient" in dataset:
                rows.append(_row(path, dataset))
    series = {uid: k for k, uid in enumerate(dict.fromkeys(r["series_instance_uid"] for r in rows))}
    for row in rows:
        row["volume"] = series[row["series_instance_uid"]]
        orientation = row["image_orientation_patient"]
        normal = np.cross(orientation[:3], orientation[3:])
        row["height"] = float(normal @ row["image_position_patient"])
    rows.sort(key=lambda row: (row["volume"], row.pop("height")))
    return slice_table(**{key: [row[key] for row in rows] for key in rows[0]}), files


def _row(path: str, dataset: pydicom.Dataset) -> dict[str, Any]:
    return {
        "path": path,
        "patient_id": str(dataset.get("PatientID") or ""),
        "rows": dataset.Rows,
        "columns": dataset.Columns,
        "modality": str(dataset.get("Modality") or ""),
        "study_instance_uid": str(dataset.get("StudyInstanceUID") or ""),
        "series_instance_uid": str(dataset.get("SeriesInstanceUID") or ""),
        "sop_instance_uid": str(dataset.SOPInstanceUID),
        "frame_of_reference_uid": str(dataset.get("FrameOfReferenceUID") or ""),
        "image_position_patient": np.array(dataset.ImagePositionPatient, np.float64),
        "image_orientation_patient": np.array(dataset.ImageOrientationPatient, np.float64),
        "pixel_spacing": np.array(dataset.PixelSpacing, np.float64),
        "slice_thickness": float(dataset.get("SliceThickness") or np.nan),
    }


def slice_refs(images: SliceTable) -> SliceRefs:
    """All images of a table as those of one task."""
    nothing = (0,) * len(images)
    planes = np.concatenate(
        [images.image_position_patient, images.image_orientation_patient, images.pixel_spacing],
        axis=1,
    )
    return SliceRefs(
        path=tuple(images.path.astype(str).tolist()),
        frame=nothing,
        file_size=nothing,
        pixel_offset=nothing,
        pixel_length=nothing,
        stored_dtype=("",) * len(images),
        bits_stored=nothing,
        rescale_slope=(1.0,) * len(images),
        rescale_intercept=(0.0,) * len(images),
        rows=tuple(images.rows.tolist()),
        columns=tuple(images.columns.tolist()),
        photometric_interpretation=("MONOCHROME2",) * len(images),
        plane_geometry=tuple(map(tuple, planes.tolist())),
        grid=((0.0, 0.0, 1.0, 1.0),) * len(images),
        annotated=nothing,
    )


def annotation_refs(annotations: Sequence[Annotation]) -> AnnotationRefs:
    """Annotation k as structure k of one task that has all images."""
    rows = sorted(
        (int(row), k, 0, one.kind, one.path, int(offset), int(length))
        for k, one in enumerate(annotations)
        for row, offset, length in zip(one.slice, one.offset, one.length, strict=True)
    )
    columns = tuple(zip(*rows, strict=True)) or ((),) * 7
    plane, structure, layer, kind, path, offset, length = columns
    return AnnotationRefs(plane, structure, layer, kind, path, offset, length)


def read(root: Path, images: SliceTable, annotations: Sequence[Annotation]) -> Drawn:
    """What a worker reads for all annotations at once."""
    refs = annotation_refs(annotations)
    return rtstruct.read(str(root), slice_refs(images), refs, contour_origin=0.0)


def draw(contours: Contours, images: SliceTable) -> NDArray[np.uint64]:
    """(n, rows, columns) bit s is structure s; all images have the size of the largest."""
    shape = (len(images), int(images.rows.max()), int(images.columns.max()))
    masks = np.zeros(shape, np.uint64)
    rasterize_batch(contours, masks)
    return masks
