"""The Arterys cohort end to end: every figure here was made by somebody else."""

import csv
import os
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
from PIL import Image

from parallel_dicomseg import ConvertOptions, ScanOptions, convert_cohort, open_dataset, scan_cohort
from parallel_dicomseg.records import FLAGS


@pytest.fixture(scope="module")
def cohort_directory(shared_data):
    """Five patients, 1,140 images, 96 i- and 46 o-contours."""
    return shared_data / "sunnybrook_arterys" / "final_data"


@pytest.fixture(scope="module")
def expected(shared_data):
    """(patient, image number, structure) -> the row of expected_areas.csv."""
    with (shared_data / "sunnybrook_arterys" / "expected_areas.csv").open() as file:
        return {
            (row["patient"], int(row["image"]), row["kind"]): row for row in csv.DictReader(file)
        }


@pytest.fixture(scope="module")
def converted(cohort_directory, tmp_path_factory):
    """The cohort converted under each rule, with its identities: rule -> (path, summary)."""
    folder = tmp_path_factory.mktemp("converted")
    cohort = scan_cohort(cohort_directory)
    outputs = {}
    for rule in ("center", "pil-outline0", "pil-outline1"):
        path = folder / f"{rule}.h5"
        options = ConvertOptions(rule=rule, keep_identity=True)
        outputs[rule] = path, convert_cohort(cohort, path, options=options)
    return outputs


def annotated(dataset):
    """Yield (row, structure index, patient, image number) of every annotated structure."""
    patients = dataset.column("patient_id").astype(str)
    numbers = dataset.column("instance_number")
    for row, bit in np.argwhere(dataset.column("structure_annotated")):
        yield row, bit, patients[row], int(numbers[row])


def test_every_contour_is_on_the_image_it_was_drawn_on(converted, cohort_directory, expected):
    """142 of 142: pixels equal those of the file whose InstanceNumber is the contour's number."""
    path, summary = converted["center"]
    assert (summary.slices, summary.structures, summary.annotated) == (96, ("i", "o"), (96, 46))
    assert summary.exit_status == 0
    assert [p.detail for p in summary.problems] == [
        f"cine: {positions} position(s) x 20 images: 20 volumes"
        for positions in (12, 13, 10, 11, 11)
    ]
    with open_dataset(path) as dataset:
        pairs = {
            (patient, number, dataset.structures[bit]): row
            for row, bit, patient, number in annotated(dataset)
        }
        paths = dataset.column("source_path")
        assert pairs.keys() == expected.keys()
        for (patient, number, _), row in pairs.items():
            image = pydicom.dcmread(cohort_directory / os.fsdecode(paths[row]))
            assert (image.InstanceNumber, f"dicoms/{patient}/{number}.dcm") == (
                number,
                os.fsdecode(paths[row]),
            )
            np.testing.assert_array_equal(dataset.images[row], image.pixel_array)


def test_center_masks_lie_between_the_open_and_the_closed_polygon(converted, expected):
    """Every area is the frozen half-open one, between `strict` and `closed`; 142 masks."""
    path, _ = converted["center"]
    relative = []
    with open_dataset(path) as dataset:
        areas = dataset.column("area")
        for row, bit, patient, number in annotated(dataset):
            truth = expected[patient, number, dataset.structures[bit]]
            area = int(((dataset.masks[row] >> bit) & 1).sum())
            assert area == areas[row, bit] == int(truth["evenodd_px"])
            assert int(truth["strict_px"]) <= area <= int(truth["closed_px"])
            exact = float(truth["shoelace_px"])
            relative.append((area - exact) / exact)
    assert len(relative) == 142
    assert abs(np.mean(relative)) <= 0.001
    assert np.abs(relative).max() <= 0.02


def test_pil_outline1_masks_equal_the_published_ones(converted, shared_data):
    """All 96 third-party PNG masks, pixel for pixel."""
    link = shared_data / "sunnybrook_arterys" / "final_data" / "link.csv"
    with link.open() as file:
        originals = {row["patient_id"]: row["original_id"] for row in csv.DictReader(file)}
    folder = shared_data / "sunnybrook_arterys" / "reference_masks_segnetcmr"
    published = {}
    for png in folder.rglob("*.png"):
        published[png.name] = png
    path, _ = converted["pil-outline1"]
    equal = 0
    with open_dataset(path) as dataset:
        for row, bit, patient, number in annotated(dataset):
            if dataset.structures[bit] != "i":
                continue
            stem, place = originals[patient].rsplit("-", 1)
            (name,) = [
                name
                for name in published
                if name.startswith(f"{stem}-{int(place):02d}-") and f"-{number:04d}" in name
            ]
            mask = np.asarray(Image.open(published[name]).convert("L")) > 0
            np.testing.assert_array_equal((dataset.masks[row] >> bit) & 1, mask)
            equal += 1
    assert equal == len(published) == 96


def test_pil_outline0_areas_are_those_of_the_original_script(converted, expected):
    """The frozen areas of Pillow's polygon with outline=0, all 142."""
    path, _ = converted["pil-outline0"]
    with open_dataset(path) as dataset:
        areas = dataset.column("area")
        found = {
            (patient, number, dataset.structures[bit]): int(areas[row, bit])
            for row, bit, patient, number in annotated(dataset)
        }
    assert found == {key: int(row["pil_seed_px"]) for key, row in expected.items()}


def test_spacing_is_kept_per_slice(converted):
    """Three spacings in one cohort, as the headers have them."""
    path, _ = converted["center"]
    with open_dataset(path) as dataset:
        spacing = dataset.column("pixel_spacing")
        patient = dataset.column("patient_id").astype(str)
        area_mm2, area = dataset.column("area_mm2"), dataset.column("area")
    by_patient = {name: np.unique(spacing[patient == name]).tolist() for name in set(patient)}
    assert by_patient == {
        "SCD0000101": [1.367188],
        "SCD0000201": [1.367188],
        "SCD0000301": [1.2891],
        "SCD0000401": [1.3672],
        "SCD0000501": [1.3672],
    }
    np.testing.assert_allclose(area_mm2, area * spacing.prod(axis=1, keepdims=True))


def test_wrong_contours_of_one_patient_are_flagged_twice_over(converted):
    """All nine SC-HF-I-6 o-contours are copies of another patient's, and i sticks out of them."""
    path, summary = converted["center"]
    with open_dataset(path) as dataset:
        flags = dataset.column("flags")
        patient = dataset.column("patient_id").astype(str)
        has_o = dataset.column("structure_annotated")[:, 1]
    copied = (flags >> FLAGS.index("identical-contours")) & 1 == 1
    outside = (flags >> FLAGS.index("inner-not-inside-outer")) & 1 == 1
    wrong = (patient == "SCD0000501") & has_o
    assert wrong.sum() == 9
    assert (copied & outside)[wrong].all()
    np.testing.assert_array_equal(np.flatnonzero(outside), np.flatnonzero(wrong))
    # the nine that were copied from are suspicious too: which is the copy, the bytes cannot tell
    np.testing.assert_array_equal(
        np.flatnonzero(copied),
        np.flatnonzero(has_o & np.isin(patient, ["SCD0000101", "SCD0000501"])),
    )
    assert summary.flagged["inner-not-inside-outer"] == 9
    assert summary.flagged["identical-contours"] == 18


def test_the_original_loader_reads_the_default_file(cohort_directory, tmp_path):
    """Sorted fancy indexing, `lshape` and reshape, with plain h5py and no plugin."""
    path = tmp_path / "default.h5"
    convert_cohort(scan_cohort(cohort_directory), path)
    index = np.sort(np.random.default_rng(0).permutation(96)[:16])
    with h5py.File(path) as file:
        shape = (16, *file["input"].attrs["lshape"])
        images = file["input"][index, :].reshape(shape)
        masks = file["output"][index, :].reshape(shape)
        assert (file["input"].shape, shape) == ((96, 65536), (16, 256, 256, 1))
        np.testing.assert_array_equal(images[..., 0], file["images"][:][index])
        np.testing.assert_array_equal(masks[..., 0], file["masks"][:][index])
        assert masks.any()


def test_images_without_contours_come_with_empty_masks_on_request(cohort_directory, tmp_path):
    """1,140 slices, of which 96 are annotated; the others' masks are empty and say so."""
    cohort = scan_cohort(cohort_directory, options=ScanOptions(include_unannotated=True))
    summary = convert_cohort(cohort, tmp_path / "all.h5")
    with open_dataset(tmp_path / "all.h5") as dataset:
        has_outline = dataset.column("annotated")
        assert (len(dataset), has_outline.sum()) == (1140, 96)
        assert summary.annotated == (96, 46)
        assert dataset.column("area")[~has_outline].sum() == 0
        row = int(np.flatnonzero(~has_outline)[500])
        assert not dataset.masks[row].any()
        assert dataset.images[row].any()


def test_nothing_identifies_a_patient_by_default(cohort_directory, tmp_path):
    """No identifier of the input occurs in the file, not even as raw bytes."""
    path = tmp_path / "default.h5"
    cohort = scan_cohort(cohort_directory)
    convert_cohort(cohort, path, options=ConvertOptions(codec="none"))
    raw = path.read_bytes()
    slices = cohort.slices
    image = pydicom.dcmread(Path(cohort.root) / os.fsdecode(slices.path[0]))
    secrets = {str(image.PatientName).encode(), str(image.PatientID).encode()} - {b""}
    for column in (slices.patient_id, slices.series_instance_uid, slices.sop_instance_uid):
        secrets |= set(column.tolist())
    assert len(secrets) > 100
    assert [secret for secret in secrets if secret in raw] == []
    with open_dataset(path) as dataset:
        assert sorted(set(dataset.column("patient_id").tolist())) == [
            f"patient-{k}".encode() for k in range(1, 6)
        ]
        assert len(set(dataset.column("sop_instance_uid").tolist())) == 96
