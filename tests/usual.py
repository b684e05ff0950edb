"""Usual slices and cohorts for tests that need no files."""

from dataclasses import fields

import numpy as np

from parallel_dicomseg.records import AnnotationTable, Cohort, HeaderColumn, SliceTable

DEFAULTS = {
    "file_size": 1 << 20,
    "pixel_offset": 1000,
    "pixel_length": 8192,
    "number_of_frames": 1,
    "rows": 64,
    "columns": 64,
    "samples_per_pixel": 1,
    "bits_allocated": 16,
    "bits_stored": 16,
    "pixel_representation": 1,
    "rescale_slope": 1.0,
    "rescale_intercept": 0.0,
    "value_is_whole": True,
    "photometric_interpretation": b"MONOCHROME2",
    "annotated": np.uint64(0),
}
VECTORS = {
    "value_range": (-32768.0, 32767.0),
    "image_position_patient": (0.0, 0.0, 0.0),
    "image_orientation_patient": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "pixel_spacing": (1.0, 1.0),
}


def slice_table(n, **columns):
    """A table of n usual slices, with some columns given."""
    paths = np.array([f"{k}.dcm".encode() for k in range(n)], np.bytes_)
    table = {field.name: np.zeros(n) for field in fields(SliceTable)} | {"path": paths}
    for name, value in (DEFAULTS | VECTORS | columns).items():
        shape = (n, len(VECTORS[name])) if name in VECTORS else (n,)
        table[name] = np.broadcast_to(np.asarray(value), shape).copy()
    return SliceTable(**table)


def cohort(slices, outlines=()):
    """A cohort with outlines given as (slice, structure)."""
    place = np.array(outlines, np.int64).reshape(-1, 2)
    n = len(place)
    annotations = AnnotationTable(
        slice=place[:, 0],
        structure=place[:, 1].astype(np.int32),
        layer=np.zeros(n, np.int32),
        kind=np.full(n, b"sunnybrook"),
        path=np.array([f"{s}-{k}.txt".encode() for s, k in outlines], "S16"),
        offset=np.zeros(n, np.int64),
        length=np.full(n, -1, np.int64),
    )
    return Cohort(
        root="/cohort",
        source="test",
        include_unannotated=False,
        structures=("i", "o"),
        nested=((0, 1),),
        slices=slices,
        annotations=annotations,
        headers={"EchoTime": HeaderColumn(np.array([b"1"]), np.zeros(len(slices), np.int32))},
        found_by={},
        problems=(),
    )
