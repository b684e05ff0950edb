"""Segmentations that highdicom writes, end to end: every voxel of the finished file is known."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from highdicom import PaletteColorLUTTransformation, PixelMeasuresSequence, PlanePositionSequence
from highdicom.content import PlaneOrientationSequence
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.sr.codedict import codes

from parallel_dicomseg import (
    ConvertOptions,
    ScanOptions,
    convert_cohort,
    open_dataset,
    scan_cohort,
)
from parallel_dicomseg.phantoms import make_rtstruct_series
from parallel_dicomseg.store import Dataset

SHAPE = (5, 32, 24)
SPACING = (1.3, 0.9)
RANDOM = np.random.default_rng(11)
LABELS = RANDOM.integers(0, 4, SHAPE).astype(np.uint8)
LABELS[1] = 0
PROBABILITY = RANDOM.random(SHAPE).astype(np.float32)
TEN = RANDOM.integers(0, 2, (*SHAPE, 10)).astype(np.uint8)
FINE = RANDOM.integers(0, 2, (SHAPE[0], 2 * SHAPE[1] - 1, 2 * SHAPE[2] - 1)).astype(np.uint8)


def grid(spacing: tuple[float, float], orientation: tuple[float, ...], left: float) -> Any:
    """Arguments that lay a segmentation on a grid of its own."""
    where = [(left, -40.0, 30.0 + 3.0 * k) for k in range(SHAPE[0])]
    return {
        "pixel_measures": PixelMeasuresSequence(spacing, slice_thickness=3.0),
        "plane_orientation": PlaneOrientationSequence("PATIENT", orientation),
        "plane_positions": [PlanePositionSequence("PATIENT", position) for position in where],
    }


def palette() -> PaletteColorLUTTransformation:
    """Colours of a label map."""
    colours = ["black", "red", "green", "blue"]
    uid = highdicom.UID.from_uuid("00000000-0000-4000-8000-000000000001")
    return PaletteColorLUTTransformation.from_colors(colours, palette_color_lut_uid=uid)


# Type, pixels, labels, further arguments; the series' orientation where it is not axial.
CASES: dict[str, tuple[str, NDArray[Any], str, dict[str, Any]]] = {
    "binary": ("BINARY", LABELS, "abc", {}),
    "labelmap": ("LABELMAP", LABELS, "abc", {}),
    "palette": ("LABELMAP", LABELS, "abc", {"palette_color_lut_transformation": palette()}),
    "sagittal": ("BINARY", LABELS, "abc", {}),
    "ten": ("BINARY", TEN, "n" * 10, {}),
    "fractional": (
        "FRACTIONAL",
        PROBABILITY,
        "p",
        {"fractional_type": "PROBABILITY", "max_fractional_value": 200},
    ),
    "finer": ("BINARY", FINE, "f", grid((0.65, 0.45), (1, 0, 0, 0, 1, 0), -50.0)),
    "flipped": (
        "BINARY",
        np.ascontiguousarray(LABELS[:, :, ::-1]),
        "abc",
        grid(SPACING, (-1, 0, 0, 0, 1, 0), -50.0 + 0.9 * (SHAPE[2] - 1)),
    ),
}
TRUTH: dict[str, dict[str, NDArray[np.bool_]]] = {
    **{
        case: {name: number == LABELS for number, name in enumerate("abc", start=1)}
        for case in ("binary", "labelmap", "palette", "sagittal", "flipped")
    },
    "ten": {"n": TEN.any(axis=-1)},
    "fractional": {"p": np.around(PROBABILITY * 200) > 100},
    "finer": {"f": FINE[:, ::2, ::2] == 1},
}


def write(folder: Path, number: int, case: str) -> None:
    """A series of its own and its segmentation."""
    kind, pixels, labels, further = CASES[case]
    phantom = make_rtstruct_series(
        folder,
        patient_id=case,
        seed=number,
        shape=SHAPE,
        pixel_spacing=SPACING,
        image_orientation_patient=(0, 1, 0, 0, 0, -1) if case == "sagittal" else (1, 0, 0, 0, 1, 0),
    )
    (folder / phantom.structure_set_path).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        segmentation = Segmentation(
            source_images=[pydicom.dcmread(folder / path) for path in phantom.image_paths],
            pixel_array=pixels,
            segmentation_type=kind,
            segment_descriptions=[
                SegmentDescription(k, name, codes.SCT.Organ, codes.SCT.Lung, "MANUAL")
                for k, name in enumerate(labels, start=1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=2,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="nobody",
            manufacturer_model_name="none",
            software_versions="1",
            device_serial_number="1",
            **further,
        )
        segmentation.save_as(folder / "seg")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """All cases as patients of one tree."""
    root = tmp_path_factory.mktemp("tree")
    for number, case in enumerate(CASES):
        write(root / case, number, case)
    cohort = scan_cohort(root, options=ScanOptions(fractional_threshold=0.5))
    assert cohort.problems == ()
    output = tmp_path_factory.mktemp("converted") / "out.h5"
    summary = convert_cohort(cohort, output, options=ConvertOptions(keep_identity=True))
    assert summary.exit_status == 0
    with open_dataset(output) as dataset:
        yield dataset


@pytest.mark.parametrize("case", CASES)
def test_masks_are_the_pixels_that_highdicom_was_given(case: str, converted: Dataset) -> None:
    """Of every type, on every grid; segments of one label are united."""
    paths = converted.column("source_path").tolist()
    for k in range(SHAPE[0]):
        row = paths.index(f"{case}/images/{k:04d}.dcm".encode())
        for bit, structure in enumerate(converted.structures):
            mask = (converted.masks[row] >> bit & 1).astype(np.bool_)
            if structure in TRUTH[case]:
                np.testing.assert_array_equal(mask, TRUTH[case][structure][k])
            else:
                assert not mask.any()
