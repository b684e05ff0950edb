"""Synthetic cohorts: what their truth says is what is in the files."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Cohort, Reason, ScanOptions
from parallel_dicomseg.synthetic import (
    LAYOUTS,
    SyntheticOutline,
    SyntheticTruth,
    make_sunnybrook_cohort,
    replicate_cohort,
)
from parallel_dicomseg.text import read_contour_files


@pytest.fixture(scope="module", params=LAYOUTS)
def truth(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SyntheticTruth:
    """A cine cohort with non-square images in each layout."""
    return make_sunnybrook_cohort(
        tmp_path_factory.mktemp("cohort"),
        patients=3,
        slices=4,
        phases=3,
        rows=64,
        columns=80,
        papillary=True,
        seed=5,
        layout=request.param,
    )


def shoelace(polygon: np.ndarray) -> float:
    """Area of a polygon."""
    x, y = polygon.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def inside(polygon: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The obvious even-odd test of every pixel centre."""
    row, column = np.mgrid[:rows, :columns]
    odd = np.zeros((rows, columns), dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (row < y0) != (row < y1)
            odd ^= crosses & (column < x0 + (row - y0) * (x1 - x0) / (y1 - y0))
    return odd


def digest(root: Path) -> str:
    """All names and bytes below a directory."""
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        whole.update(str(file.relative_to(root)).encode())
        whole.update(file.read_bytes() if file.is_file() else b"")
    return whole.hexdigest()


def pairs(cohort: Cohort) -> set[tuple[str, str, str]]:
    """Contour path, image path and structure of every outline of a scan."""
    images = cohort.slices.path[cohort.annotations.slice]
    names = np.array(cohort.structures)[cohort.annotations.structure]
    return {
        (path.decode(), image.decode(), str(name))
        for path, image, name in zip(cohort.annotations.path, images, names, strict=True)
    }


def by_structure(truth: SyntheticTruth) -> dict[tuple[str, str], SyntheticOutline]:
    """Outlines by image and structure."""
    return {(outline.image_path, outline.structure): outline for outline in truth.outlines}


def test_a_scan_finds_what_the_truth_says(truth: SyntheticTruth) -> None:
    """Every outline is paired with the image that it was drawn on, without any problem."""
    cohort = scan_cohort(truth.root)
    every = scan_cohort(truth.root, options=ScanOptions(include_unannotated=True))

    assert cohort.problems == every.problems
    assert {problem.reason for problem in cohort.problems} == {Reason.SERIES_IRREGULAR}  # cine
    assert cohort.structures == ("i", "o", "p1", "p2")
    assert (
        pairs(cohort)
        == pairs(every)
        == {(outline.path, outline.image_path, outline.structure) for outline in truth.outlines}
    )
    assert len(every.slices) == 3 * 4 * 3 == sum(patient.images for patient in truth.patients)
    assert (
        len(cohort.slices) == len({outline.image_path for outline in truth.outlines}) == 3 * 4 * 2
    )
    assert set(every.slices.patient_id.tolist()) == {
        patient.patient_id.encode() for patient in truth.patients
    }


def test_contour_files_hold_the_true_polygons(truth: SyntheticTruth) -> None:
    """Each file gives back the polygon bit for bit, with the area of the ellipse."""
    root = Path(truth.root)
    files = read_contour_files([str(root / outline.path) for outline in truth.outlines])

    assert files.errors == ()
    for k, outline in enumerate(truth.outlines):
        points = files.points_column_row[files.offsets[k] : files.offsets[k + 1]]
        assert np.array_equal(points, outline.polygon_column_row)
        # Each of the points is off by at most half a hundredth of a pixel.
        length = np.linalg.norm(np.diff(points, axis=0, append=points[:1]), axis=1).sum()
        assert shoelace(points) == pytest.approx(outline.area, abs=0.005 * length)


def test_structures_lie_inside_one_another(truth: SyntheticTruth) -> None:
    """Papillary muscles in the cavity, the cavity in the epicardium, all in the image."""
    found = by_structure(truth)
    for (image, structure), outline in found.items():
        mask = inside(outline.polygon_column_row, truth.rows, truth.columns)
        outer = {"i": "o", "o": "", "p1": "i", "p2": "i"}[structure]
        assert mask.any()
        assert outline.polygon_column_row.min() > 0
        assert (outline.polygon_column_row < (truth.columns - 1, truth.rows - 1)).all()
        if (image, outer) in found:
            wider = found[image, outer].polygon_column_row
            assert not (mask & ~inside(wider, truth.rows, truth.columns)).any()


def test_images_show_what_was_outlined(truth: SyntheticTruth) -> None:
    """Blood is bright, the ring round it dark, and (column, row) is not (row, column)."""
    found = by_structure(truth)
    images = {image for image, structure in found if structure == "o"}
    assert images
    for image in images:
        pixels = pydicom.dcmread(Path(truth.root) / image).pixel_array
        i, o, p1 = (
            inside(found[image, structure].polygon_column_row, truth.rows, truth.columns)
            for structure in ("i", "o", "p1")
        )
        assert pixels.shape == (truth.rows, truth.columns)
        assert np.median(pixels[i]) > 3 * np.median(pixels[o & ~i])
        assert np.median(pixels[p1]) < 0.7 * np.median(pixels[i])


def test_headers_are_valid_and_complete(truth: SyntheticTruth) -> None:
    """What a scan needs is there, UIDs are legal and unique, and nothing tells the time."""
    root = Path(truth.root)
    instances: set[str] = set()
    series: set[str] = set()
    for patient in truth.patients:
        files = sorted((root / patient.image_folder).glob("*.dcm"))
        positions = set()
        for file in files:
            dataset = pydicom.dcmread(file)
            assert dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
            assert (dataset.BitsAllocated, dataset.BitsStored) == (16, 16)
            assert dataset.PixelRepresentation == 1
            assert dataset.PatientID == patient.patient_id
            assert [float(x) for x in dataset.PixelSpacing] == [patient.pixel_spacing] * 2
            assert int(file.stem.split("-")[-1]) == dataset.InstanceNumber
            row, column = np.reshape([float(x) for x in dataset.ImageOrientationPatient], (2, 3))
            assert np.dot(row, column) == pytest.approx(0, abs=1e-12)
            assert np.dot(row, row) == pytest.approx(1, abs=1e-12)
            assert UID(dataset.SOPInstanceUID).is_valid
            assert not [element for element in dataset if element.VR in ("DA", "TM", "DT")]
            instances.add(dataset.SOPInstanceUID)
            series.add(dataset.SeriesInstanceUID)
            positions.add(tuple(dataset.ImagePositionPatient))
        assert len(files) == patient.images
        assert len(positions) == 4
    assert len(instances) == sum(patient.images for patient in truth.patients)
    assert len(series) == len(truth.patients)
    assert len({patient.pixel_spacing for patient in truth.patients}) == len(truth.patients)


def test_positions_are_a_slice_distance_apart(tmp_path: Path) -> None:
    """Slices follow one another along the normal, at the distance that the header gives."""
    truth = make_sunnybrook_cohort(tmp_path / "c", patients=1, slices=5, rows=16, columns=16)
    folder = Path(truth.root) / truth.patients[0].image_folder
    headers = [pydicom.dcmread(folder / f"{number}.dcm") for number in range(1, 6)]
    positions = np.array([[float(x) for x in h.ImagePositionPatient] for h in headers])
    row, column = np.reshape([float(x) for x in headers[0].ImageOrientationPatient], (2, 3))
    steps = np.diff(positions, axis=0) @ np.cross(row, column)

    assert steps == pytest.approx([float(headers[0].SpacingBetweenSlices)] * 4, abs=2e-4)
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1) == pytest.approx(steps, abs=2e-4)


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    """Equal seeds give equal trees, another seed other images."""
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make_sunnybrook_cohort(
            tmp_path / name, patients=2, slices=2, rows=24, columns=20, seed=seed
        )

    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_a_patient_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """The first patients are the same in a larger cohort."""
    small = make_sunnybrook_cohort(tmp_path / "a", patients=1, slices=3, rows=32, columns=32)
    make_sunnybrook_cohort(tmp_path / "b", patients=3, slices=3, rows=32, columns=32)

    for place in (small.patients[0].image_folder, small.patients[0].contour_folder):
        assert digest(tmp_path / "a" / place) == digest(tmp_path / "b" / place)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_patients_have_names_of_their_own(tmp_path: Path, layout: str) -> None:
    """Names stay different, and natural order is the order in which they were made."""
    truth = make_sunnybrook_cohort(
        tmp_path / "c", patients=9, slices=1, rows=16, columns=16, layout=layout
    )

    assert len({patient.patient_id for patient in truth.patients}) == 9
    reasons = {problem.reason for problem in scan_cohort(truth.root).problems}
    assert reasons <= {Reason.SERIES_IRREGULAR}  # cine


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A directory that holds something, an unknown layout, and numbers that are too small."""
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"the directory is not empty$"):
        make_sunnybrook_cohort(tmp_path)
    with pytest.raises(ConfigurationError, match="layout 'bids' is unknown; there are: arterys"):
        make_sunnybrook_cohort(tmp_path / "a", layout="bids")
    with pytest.raises(ConfigurationError, match="columns=8: at least 16 is needed"):
        make_sunnybrook_cohort(tmp_path / "a", columns=8)
    with pytest.raises(ConfigurationError, match="patients=0: at least 1 is needed"):
        make_sunnybrook_cohort(tmp_path / "a", patients=0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_replicas_are_byte_copies_under_new_patients(tmp_path: Path) -> None:
    """Only annotated images and their contours, copied until there are enough, paired as before."""
    source = make_sunnybrook_cohort(
        tmp_path / "source", patients=2, slices=3, phases=3, rows=16, columns=16
    )
    replicate_cohort(source.root, tmp_path / "copy", 30)
    cohort = scan_cohort(tmp_path / "copy")
    original = {
        (outline.path, outline.image_path, outline.structure) for outline in source.outlines
    }
    copied = pairs(cohort)
    with (tmp_path / "copy" / "link.csv").open(newline="") as file:
        links = list(csv.DictReader(file))

    assert {problem.reason for problem in cohort.problems} == {
        Reason.SERIES_IRREGULAR,  # cine
        Reason.REPEATED,  # the same SOP Instance UIDs under several patients
    }
    assert len(cohort.slices) == 12 * math.ceil(30 / 12)
    assert len(links) == len(set(cohort.slices.patient_id.tolist())) == 2 * 3
    assert len(copied) == 3 * len(original)
    for copy in (1, 2, 3):
        renamed = {
            (_without_copy(path), _without_copy(image), structure)
            for path, image, structure in copied
            if path.split("/")[1].endswith(f"-{copy:04d}")
        }
        assert renamed == original
    for path, image, _ in copied:
        for file in (path, image):
            assert (tmp_path / "copy" / file).read_bytes() == (
                Path(source.root) / _without_copy(file)
            ).read_bytes()


def _without_copy(path: str) -> str:
    """The path in the source of a replica."""
    top, patient, rest = path.split("/", 2)
    return f"{top}/{patient[:-5]}/{rest}"


def test_replicas_need_an_empty_directory(tmp_path: Path) -> None:
    """A directory in use is refused."""
    source = make_sunnybrook_cohort(tmp_path / "source", patients=1, slices=1, rows=16, columns=16)
    with pytest.raises(ConfigurationError, match="the directory is not empty"):
        replicate_cohort(source.root, tmp_path, 3)
