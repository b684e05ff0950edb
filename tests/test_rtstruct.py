"""Structure sets: what is read from them, bit for bit, and what is said about what is wrong."""

from __future__ import annotations

import csv
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from parallel_dicomseg.geometry import to_patient
from parallel_dicomseg.phantoms import ExtraContour, Phantom, ellipse, make_rtstruct_series
from parallel_dicomseg.records import (
    Limits,
    Problem,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceTable,
)
from parallel_dicomseg.sources import rtstruct, rtstruct_files
from parallel_dicomseg.sources.base import Found

BIG = ellipse(30, 30, 20, 20, points=3000)
SMALL = ellipse(31.3, 30.2, 7.1, 5.2, points=24)


def find(root: Path, images: SliceTable, files: list[ScannedFile]) -> Found:
    """What the source finds."""
    return rtstruct.find(str(root), files, images, ScanOptions())


def voxels(root: Path, folder: str = "") -> dict[tuple[str, str], NDArray[np.bool_]]:
    """(n, rows, columns) by file and structure, through find, read and the rasterizer."""
    images, files = tables.scan(root, folder)
    found = find(root, images, files)
    drawn = tables.read(root, images, found.annotations)
    assert drawn.problems == ()
    masks = tables.draw(drawn.contours, images)
    return {
        (one.path, one.name): (masks >> np.uint64(k) & np.uint64(1)).astype(np.bool_)
        for k, one in enumerate(found.annotations)
    }


def expected_counts(file: Path) -> dict[tuple[str, str], int]:
    """Voxels by case and structure from an expected_voxels.csv."""
    with file.open(newline="") as lines:
        return {(row["case"], row["roi"]): int(row["evenodd_vox"]) for row in csv.DictReader(lines)}


# ---------------------------------------------------------------------------------- third parties


@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
@pytest.mark.parametrize("patient", ["STS_001", "STS_002"])
def test_masks_equal_the_published_ones(patient: str, modality: str, shared_data: Path) -> None:
    """Soft-tissue sarcoma: 0 voxels differ from the NIfTI masks that others made."""
    nibabel = pytest.importorskip("nibabel")
    root = shared_data / "sts_rtstruct"
    (found,) = voxels(root, f"dicom/{patient}/{modality}").values()
    nifti = nibabel.load(root / "nifti" / patient / f"{modality}_mask.nii.gz")
    published = np.asarray(nifti.dataobj).astype(np.bool_)
    # (x, y, z) to (z, y, x); NIfTI's x and y run to the right and to the front, DICOM's against
    signs = np.sign(np.diag(nifti.affine)[:3])
    for axis, wanted in enumerate((-1, -1, 1)):
        if signs[axis] != wanted:
            published = np.flip(published, axis)
    published = published.transpose(2, 1, 0)

    assert found.shape == published.shape
    assert np.count_nonzero(found != published) == 0


def test_series_of_one_frame_of_reference_are_told_apart(shared_data: Path) -> None:
    """All of a patient in one tree: each structure set finds its own modality."""
    root = shared_data / "sts_rtstruct"
    images, files = tables.scan(root)
    found = find(root, images, files)

    assert len(found.annotations) == 6
    assert found.problems == ()
    for one in found.annotations:
        folders = {Path(images.path[row].decode()).parts[:3] for row in one.looked_at.tolist()}
        assert folders == {Path(one.path).parts[:3]}


def test_overlapping_structures_of_an_oblique_series(shared_data: Path) -> None:
    """GTV_Mass and GTV_Edema on an oblique MR have the known voxels, slice by slice."""
    root = shared_data / "sts_raw_mr_t2"
    expected = expected_counts(root / "expected_voxels.csv")
    found = {name: mask for (_, name), mask in voxels(root).items()}

    assert {name: mask.sum() for name, mask in found.items()} == {
        name: count for (_, name), count in expected.items()
    }
    where = np.flatnonzero(found["GTV_Mass"].any(axis=(1, 2)))
    assert (where[0], where[-1], len(where)) == (11, 30, 20)


def test_a_clinical_structure_set_on_one_slice(shared_data: Path) -> None:
    """4 of 141 BODY contours lie on the only image; the others are counted, ROI by ROI."""
    root = shared_data / "rtstruct_odd" / "dicompyler"
    expected = expected_counts(root.parent / "expected_voxels.csv")
    images, files = tables.scan(root)
    found = find(root, images, files)

    assert {name: mask.sum() for (_, name), mask in voxels(root).items()} == {
        name: count for (case, name), count in expected.items() if case == "dicompyler"
    }
    missing = [p.detail for p in found.problems if p.reason is Reason.CONTOUR_WITHOUT_IMAGE]
    assert "137 of 141 contours of 'BODY' lie on no image" in missing[0]
    assert "165 of 165 contours of 'Lt Lung' lie on no image" in " ".join(missing)
    assert len(missing) == 9
    (areola,) = [p for p in found.problems if p.reason is Reason.NO_AREA]
    assert "1 ROI(s) have no contours: 'Areola'" in areola.detail
    assert all(one.looked_at.tolist() == [0] for one in found.annotations)


def test_references_to_images_that_do_not_exist(shared_data: Path) -> None:
    """rt_utils' files: the third slice is missing, so one of three contours has no image."""
    root = shared_data / "rtstruct_odd" / "rt_utils"
    images, files = tables.scan(root, "mock_data")
    found = find(root, images, files)

    assert Counter(one.path.rpartition("/")[2] for one in found.annotations) == {
        "rt.dcm": 1,
        "invalid_reference_rt.dcm": 4,
        "non_existent_reference_rt.dcm": 4,
    }
    assert all(len(one.slice) == 2 for one in found.annotations)
    assert len(found.problems) == 8
    assert all("1 of 3 contours" in problem.detail for problem in found.problems)


def shared_structure_sets(root: Path) -> list[Path]:
    """All structure sets of the real data."""
    names = ("sts_rtstruct/**/RS.dcm", "sts_raw_mr_t2/**/mask/*", "rtstruct_odd/**/*rt*.dcm")
    return [file for name in names for file in sorted(root.glob(name)) if file.is_file()]


def contours_of(file: Path) -> Iterator[tuple[Any, bytes]]:
    """What pydicom makes of the numbers of each ContourData of a file, and their raw bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for roi in pydicom.dcmread(file, force=True).ROIContourSequence:
            for contour in roi.get("ContourSequence") or ():
                raw = contour.get_item("ContourData").value
                yield contour.ContourData, raw


def test_points_are_bit_equal_to_pydicoms(shared_data: Path) -> None:
    """Every number of every real structure set, as float64."""
    files = shared_structure_sets(shared_data)
    pairs = [pair for file in files for pair in contours_of(file)]
    points, offsets, errors = rtstruct_files.parse_points([raw for _, raw in pairs])

    assert len(files) == 12
    assert errors == {}
    for k, (numbers, _) in enumerate(pairs):
        expected = np.array([float(number) for number in numbers])
        assert points[offsets[k] : offsets[k + 1]].tobytes() == expected.tobytes()


DECIMALS = st.one_of(
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: f"{x:.4f}"),
    st.floats(-1e5, 1e5, allow_nan=False).map(lambda x: f"{x:.9g}"),
    st.integers(-(10**6), 10**6).map(str),
    st.sampled_from([" 1.5", "+2.", "-.25 ", "1e-3", "-0", "1234567.12345678"]),
)


@given(st.lists(st.lists(st.tuples(DECIMALS, DECIMALS, DECIMALS), min_size=1), max_size=5))
def test_generated_points_are_bit_equal_to_pydicoms(
    contours: list[list[tuple[str, str, str]]],
) -> None:
    """Any spelling that DS allows, padded to even length."""
    texts = ["\\".join(number for point in ring for number in point) for ring in contours]
    raws = [text.encode() + b" " * (len(text) % 2) for text in texts]
    points, offsets, errors = rtstruct_files.parse_points(raws)

    assert errors == {}
    for k, text in enumerate(texts):
        element = pydicom.DataElement(0x30060050, "DS", text.split("\\"))
        expected = np.array([float(number) for number in element.value]).reshape(-1, 3)
        assert points[offsets[k] : offsets[k + 1]].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"1\\2\\3\\4", "4 number"),
        (b"1\\2\\", "value 3"),
        (b"1\\x\\3", "not a number"),
        (b"1\\\\3", "empty"),
        (b"1 2\\2\\3", "something else than a backslash"),
        (b"1,5\\2\\3", "something else than a backslash"),
        (b"1\\nan\\3", "not finite"),
        (b"1\\2\\1e30", "beyond any image"),
        (b"\xff\\2\\3", "not a number"),
    ],
)
def test_a_value_that_is_no_list_of_points_is_an_error_of_its_own(raw: bytes, message: str) -> None:
    """The others are read as if it were not there."""
    good = b"1\\2\\3\\4\\5\\6 "
    points, offsets, errors = rtstruct_files.parse_points([good, raw, good])

    assert points.tolist() == [[1, 2, 3], [4, 5, 6]] * 2
    assert offsets.tolist() == [0, 2, 2, 4]
    assert list(errors) == [1]
    assert message in errors[1]


# ---------------------------------------------------------------------------- places in the file


@pytest.mark.parametrize("undefined_lengths", [False, True])
@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        pydicom.uid.ExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    ],
)
def test_offsets_are_those_of_the_values(
    syntax: str, undefined_lengths: bool, tmp_path: Path
) -> None:
    """The bytes at offset are ContourData, also where it is too long for an explicit DS."""
    phantom = make_rtstruct_series(
        tmp_path / "phantom",
        shape=(3, 64, 64),
        structures={"A": [(1, BIG), (2, SMALL)], "B": [(0, SMALL)]},
        transfer_syntax=syntax,
        undefined_lengths=undefined_lengths,
    )
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    found = find(root, images, files)
    file = root / phantom.structure_set_path
    content = file.read_bytes()
    if syntax == DeflatedExplicitVRLittleEndian:
        meta = pydicom.filereader.read_file_meta_info(file)
        content = zlib.decompress(content[144 + meta.FileMetaInformationGroupLength :], wbits=-15)
    expected = [raw for _, raw in contours_of(file)]
    offsets = np.concatenate([one.offset for one in found.annotations])
    lengths = np.concatenate([one.length for one in found.annotations])
    if syntax == DeflatedExplicitVRLittleEndian:
        assert (offsets < 0).all()
        offsets = -1 - offsets

    assert len(expected[0]) > 65536
    assert [content[o : o + n] for o, n in zip(offsets, lengths, strict=True)] == expected
    drawn = tables.read(root, images, found.annotations)
    assert drawn.problems == ()
    assert drawn.contours.plane.tolist() == [0, 1, 2]
    assert len(set(drawn.digest.tolist())) == 3


@pytest.fixture
def phantom(tmp_path: Path) -> Phantom:
    """Two structures on six slices."""
    return make_rtstruct_series(tmp_path / "phantom")


def test_points_come_out_in_pixels_of_their_images(phantom: Phantom) -> None:
    """As drawn, to the digits that were written, sorted by slice and structure."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    drawn = tables.read(root, images, find(root, images, files).annotations)
    rings = drawn.contours
    assert rings.layer is not None
    truth = sorted(
        (k, structure, number)
        for structure, group in enumerate(phantom.rings)
        for number, (k, _) in enumerate(group)
    )

    assert list(zip(rings.plane, rings.structure, strict=True)) == [t[:2] for t in truth]
    assert not rings.layer.any()
    for k, (_, structure, number) in enumerate(truth):
        points = rings.points_column_row[rings.offsets[k] : rings.offsets[k + 1]]
        np.testing.assert_allclose(points, phantom.rings[structure][number][1], atol=1e-4)


def test_what_one_task_reads_does_not_depend_on_the_others(phantom: Phantom) -> None:
    """All contours at once or one by one: the same bits and digests."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    refs = tables.annotation_refs(find(root, images, files).annotations)
    slices = tables.slice_refs(images)
    together = rtstruct.read(str(root), slices, refs, contour_origin=0.0)

    for k in range(len(refs)):
        alone = rtstruct.read(str(root), slices, refs.take([k]), contour_origin=1.0)
        begin, end = together.contours.offsets[k : k + 2]
        expected = together.contours.points_column_row[begin:end]
        assert alone.contours.points_column_row.tobytes() == expected.tobytes()
        assert alone.digest[0] == together.digest[k] != 0


def shorter(file: Path) -> None:
    """The file ends in the middle of its contours."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def moved(file: Path) -> None:
    """Everything lies two bytes farther on."""
    file.write_bytes(b"\0\0" + file.read_bytes())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shorter, Reason.FILE_CHANGED),
        (moved, Reason.FILE_CHANGED),
        (Path.unlink, Reason.UNREADABLE_FILE),
    ],
)
def test_a_file_that_has_changed_is_noticed(
    change: Callable[[Path], None], reason: Reason, phantom: Phantom
) -> None:
    """Each contour that is not at its place is a problem; the others are read."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    found = find(root, images, files)
    before = tables.read(root, images, found.annotations)
    change(root / phantom.structure_set_path)
    after = tables.read(root, images, found.annotations)

    lost = [k for k, _, _ in after.problems]
    assert 0 < len(lost) == len(before.contours) - len(after.contours)
    assert {why for _, why, _ in after.problems} == {reason}
    assert not after.digest[lost].any()
    kept = np.setdiff1d(np.arange(len(before.digest)), lost)
    assert (after.digest[kept] == before.digest[kept]).all()


@pytest.mark.parametrize("change", [shorter, moved, Path.unlink])
def test_a_deflated_file_that_has_changed_is_noticed(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    """What cannot be inflated any more, or to less, is a problem of each contour."""
    phantom = make_rtstruct_series(
        tmp_path / "phantom", transfer_syntax=DeflatedExplicitVRLittleEndian
    )
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    found = find(root, images, files)
    change(root / phantom.structure_set_path)
    drawn = tables.read(root, images, found.annotations)

    assert len(drawn.problems) + len(drawn.contours) == 18
    assert {why for _, why, _ in drawn.problems} <= {Reason.FILE_CHANGED, Reason.UNREADABLE_FILE}
    assert drawn.problems


def test_damaged_numbers_are_noticed_in_the_worker(phantom: Phantom) -> None:
    """The place is right, the text is not: a problem of that contour."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    found = find(root, images, files)
    file = root / phantom.structure_set_path
    content = bytearray(file.read_bytes())
    content[int(found.annotations[0].offset[0])] = ord("x")
    file.write_bytes(content)
    drawn = tables.read(root, images, found.annotations)

    ((number, reason, detail),) = drawn.problems
    assert (number, reason) == (0, Reason.BAD_CONTOUR)
    assert "value 1 (line 1): not a number" in detail


# ------------------------------------------------------------------------------------- problems


def change(phantom: Phantom, edit: Callable[[pydicom.Dataset], None]) -> Found:
    """What is found after an edit of the structure set."""
    root = Path(phantom.directory)
    file = root / phantom.structure_set_path
    dataset = pydicom.dcmread(file)
    edit(dataset)
    dataset.save_as(file)
    images, files = tables.scan(root)
    return find(root, images, files)


def bad_contour(found: Found, reason: Reason = Reason.BAD_CONTOUR) -> str:
    """The one problem, where everything but one contour of 'disc' is as before."""
    assert [len(one.slice) for one in found.annotations] == [5, 12]
    (problem,) = found.problems
    assert problem.reason is reason
    assert problem.detail.startswith("1 of 6 contours of 'disc' ")
    return problem.detail


def first_contour(dataset: pydicom.Dataset) -> pydicom.Dataset:
    """The first contour of 'disc'."""
    contour: pydicom.Dataset = dataset.ROIContourSequence[0].ContourSequence[0]
    return contour


def raw_points(text: str) -> Callable[[pydicom.Dataset], None]:
    """Put a text in the place of the first contour's points."""

    def edit(dataset: pydicom.Dataset) -> None:
        contour = first_contour(dataset)
        contour._dict[pydicom.tag.Tag(0x30060050)] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(0x30060050), "DS", len(text), text.encode(), 0, False, True
        )

    return edit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\\2\\3\\4 ", "contour 1: ContourData: 4 number(s), not three for each point"),
        ("1\\2\\3x", "contour 1: ContourData: value 3 (line 1): not a number"),
        ("", "contour 1: ContourData is empty or absent"),
        ("1\\2\\3\\1\\2\\9 ", "ContourData has 2 point(s), NumberOfContourPoints is 72"),
    ],
)
def test_one_bad_contour_never_costs_its_roi(text: str, message: str, phantom: Phantom) -> None:
    """The five others of the ROI are there, what is wrong is said, and its image is not called
    empty.
    """
    found = change(phantom, raw_points(text))
    disc, ring = found.annotations

    assert message in bad_contour(found)
    assert disc.looked_at.tolist() == [0, 1, *range(3, 10)]
    assert ring.looked_at.tolist() == list(range(10))


@pytest.mark.parametrize("kind", ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR"])
def test_what_encloses_no_area_is_counted(kind: str, phantom: Phantom) -> None:
    """Points and open lines are no outlines."""

    def edit(dataset: pydicom.Dataset) -> None:
        first_contour(dataset).ContourGeometricType = kind

    detail = bad_contour(change(phantom, edit), Reason.NO_AREA)
    assert detail.endswith(f"enclose no area; contour 1: ContourGeometricType is {kind}")


def test_an_unknown_geometric_type_is_refused(phantom: Phantom) -> None:
    """Nobody can say what it draws."""

    def edit(dataset: pydicom.Dataset) -> None:
        first_contour(dataset).ContourGeometricType = "SPLINE"

    assert "none of those that DICOM defines" in bad_contour(change(phantom, edit))


@pytest.mark.parametrize("points", [1, 2, 5])
def test_degenerate_contours_are_counted(points: int, phantom: Phantom) -> None:
    """One point, two points, and five of which only two are different."""

    def edit(dataset: pydicom.Dataset) -> None:
        contour = first_contour(dataset)
        contour.NumberOfContourPoints = points
        contour.ContourData = (list(contour.ContourData[:6]) * 3)[: 3 * points]

    detail = bad_contour(change(phantom, edit), Reason.NO_AREA)
    assert detail.endswith("contour 1: fewer than 3 different points")


def test_a_copy_of_a_contour_does_not_undo_it(phantom: Phantom) -> None:
    """The same contour twice in one ROI would draw nothing by parity: the copy is left out."""

    def edit(dataset: pydicom.Dataset) -> None:
        contours = dataset.ROIContourSequence[0].ContourSequence
        contours[1] = contours[0]

    detail = bad_contour(change(phantom, edit), Reason.REPEATED)
    assert "repeat another one byte for byte and are left out; contour 2" in detail


def test_rois_without_contours_were_looked_for(phantom: Phantom) -> None:
    """No ContourSequence, or no ROIContourSequence item at all: no ring, on any slice."""

    def edit(dataset: pydicom.Dataset) -> None:
        del dataset.ROIContourSequence[1].ContourSequence
        roi = pydicom.Dataset()
        roi.ROINumber, roi.ROIName = 7, "  never drawn "
        dataset.StructureSetROISequence.append(roi)

    found = change(phantom, edit)
    rings = {one.name: len(one.slice) for one in found.annotations}

    assert rings == {"disc": 6, "ring": 0, "never drawn": 0}
    (problem,) = found.problems
    assert problem.reason is Reason.NO_AREA
    assert problem.detail == "2 ROI(s) have no contours: 'ring', 'never drawn'"


@pytest.mark.parametrize(
    ("character_set", "roi_name"),
    [
        ("ISO_IR 100", "Prostàta ÉÜ"),
        ("ISO_IR 144", "Лёгкое"),
        ("ISO_IR 192", "肺 Lunge ß"),
        ("GB18030", "左肺"),
        (["", "ISO 2022 IR 87"], "左肺 Lung"),
        (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾀﾛｳ 左肺"),
        (["", "ISO 2022 IR 149"], "폐"),
    ],
)
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_names_are_read_in_every_character_set(
    character_set: str | list[str], roi_name: str, syntax: str, tmp_path: Path
) -> None:
    """PS3.5 6.1: also with escapes (ISO 2022), and without the blanks round them."""
    phantom = make_rtstruct_series(tmp_path / "phantom", shape=(3, 16, 16), transfer_syntax=syntax)

    def edit(dataset: pydicom.Dataset) -> None:
        dataset.SpecificCharacterSet = character_set
        dataset.StructureSetROISequence[0].ROIName = f" {roi_name} "

    assert [one.name for one in change(phantom, edit).annotations] == [roi_name, "ring"]


def test_rois_are_joined_by_number(phantom: Phantom) -> None:
    """Neither order nor a gap in the numbers mixes names up; an unknown number is refused."""

    def edit(dataset: pydicom.Dataset) -> None:
        dataset.StructureSetROISequence[0].ROINumber = 41
        dataset.ROIContourSequence[0].ReferencedROINumber = 41
        dataset.ROIContourSequence[1].ReferencedROINumber = 3
        dataset.ROIContourSequence = list(reversed(dataset.ROIContourSequence))

    found = change(phantom, edit)

    assert {one.name: len(one.slice) for one in found.annotations} == {"disc": 6, "ring": 0}
    assert found.problems[0].reason is Reason.BAD_CONTOUR
    assert (
        "12 contour(s) of a ReferencedROINumber that no ROI has alone" in found.problems[0].detail
    )


def test_a_number_that_two_rois_have_stands_for_neither(phantom: Phantom) -> None:
    """Nobody can say whose contours they are."""

    def edit(dataset: pydicom.Dataset) -> None:
        roi = pydicom.Dataset()
        roi.ROINumber, roi.ROIName = 2, "other"
        dataset.StructureSetROISequence.append(roi)

    found = change(phantom, edit)

    assert [one.name for one in found.annotations] == ["disc"]
    assert [p.reason for p in found.problems] == [Reason.DUPLICATE, Reason.BAD_CONTOUR]


def test_a_structure_set_without_images_is_one_problem(phantom: Phantom) -> None:
    """Not one per contour; and nothing was looked at."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    elsewhere = replace(images, image_position_patient=images.image_position_patient + 1000.0)
    found = find(root, elsewhere, files)

    assert found.annotations == ()
    (problem,) = found.problems
    assert problem.reason is Reason.ANNOTATION_WITHOUT_IMAGES
    assert "none of its 18 contours lies on an image: 10 of the 10 images" in problem.detail


def twins(root: Path, second: dict[str, Any], **both: Any) -> Found:
    """A structure set beside two series that lie in the same place."""
    first = make_rtstruct_series(root / "a", **both)
    other = make_rtstruct_series(root / "b", seed=1, **second)
    (Path(other.directory) / other.structure_set_path).unlink()
    (Path(first.directory) / first.structure_set_path).rename(root / "rs.dcm")
    images, files = tables.scan(root)
    return find(root, images, files)


def test_two_series_that_fit_equally_well_are_ambiguous(tmp_path: Path) -> None:
    """Neither is guessed: a rejection that says how many there are."""
    found = twins(tmp_path, {}, references="absent", frame_of_reference="another")

    assert found.annotations == ()
    (problem,) = found.problems
    assert problem.reason is Reason.AMBIGUOUS_IMAGE
    assert problem.detail.startswith("2 series fit its 18 contours equally well")


def test_a_reference_or_a_frame_decides_between_series(tmp_path: Path) -> None:
    """Either is enough where both series have the planes."""
    by_reference = twins(tmp_path / "1", {})
    by_frame = twins(tmp_path / "2", {}, references="absent")

    for found, how in ((by_reference, "reference"), (by_frame, "frame-of-reference")):
        assert found.problems == ()
        assert {one.found_by for one in found.annotations} == {how}


def test_contours_on_two_series_find_both(tmp_path: Path) -> None:
    """One structure set drawn on an axial and on a sagittal series: an Annotation for each."""
    first = make_rtstruct_series(tmp_path / "a")
    other = make_rtstruct_series(
        tmp_path / "b", seed=1, image_orientation_patient=(0, 1, 0, 0, 0, -1)
    )
    one, two = (pydicom.dcmread(Path(p.directory) / p.structure_set_path) for p in (first, other))
    for here, there in zip(one.ROIContourSequence, two.ROIContourSequence, strict=True):
        here.ContourSequence.extend(there.ContourSequence)
    (tmp_path / "b" / "rtstruct.dcm").unlink()
    one.save_as(tmp_path / "a" / "rtstruct.dcm")
    images, files = tables.scan(tmp_path)
    found = find(tmp_path, images, files)

    assert found.problems == ()
    assert [(a.name, len(a.slice), len(a.looked_at)) for a in found.annotations] == [
        ("disc", 6, 10),
        ("ring", 12, 10),
    ] * 2


def test_slabs_with_as_many_contours_are_both_found(tmp_path: Path) -> None:
    """One stack in two series, and every contour refers to its image: nothing is ambiguous."""
    phantom = make_rtstruct_series(tmp_path / "phantom", references="valid")
    dataset = pydicom.dcmread(tmp_path / "phantom" / "rtstruct.dcm")
    del dataset.ReferencedFrameOfReferenceSequence
    dataset.save_as(tmp_path / "phantom" / "rtstruct.dcm")
    images, files = tables.scan(Path(phantom.directory))
    upper = np.arange(len(images)) >= 5
    series = np.where(upper, b"1.2.3", images.series_instance_uid)
    slabs = replace(images, series_instance_uid=series, volume=upper.astype(np.int32))
    found = find(Path(phantom.directory), slabs, files)

    assert found.problems == ()
    assert [(a.name, sorted(set(a.slice.tolist()))) for a in found.annotations] == [
        ("disc", [2, 3, 4]),
        ("ring", [2, 3, 4]),
        ("disc", [5, 6, 7]),
        ("ring", [5, 6, 7]),
    ]


def phases(phantom: Phantom) -> tuple[SliceTable, list[ScannedFile]]:
    """The series three times in one place; the second is the one that is referred to."""
    images, files = tables.scan(Path(phantom.directory))
    parts = []
    for phase in range(3):
        uids = [uid + b"" if phase == 1 else b"%d" % phase for uid in images.sop_instance_uid]
        changed = {"sop_instance_uid": np.array(uids), "volume": np.full(len(images), phase)}
        parts.append(replace(images, **changed))
    return SliceTable.concatenate(parts), files


def test_of_several_phases_the_one_that_is_referred_to(phantom: Phantom) -> None:
    """Cine: contours lie on the phase of their reference, and only there was looked."""
    images, files = phases(phantom)
    found = find(Path(phantom.directory), images, files)

    assert found.problems == ()
    for one in found.annotations:
        assert one.looked_at.tolist() == list(range(10, 20))
        assert set(one.slice.tolist()) <= set(range(10, 20))


def test_phases_without_a_reference_are_ambiguous(tmp_path: Path) -> None:
    """Nobody can say which phase was outlined, so none is."""
    phantom = make_rtstruct_series(tmp_path / "phantom", references="absent")
    images, files = phases(phantom)
    found = find(Path(phantom.directory), images, files)

    assert [len(one.slice) for one in found.annotations] == [0, 0]
    assert [p.reason for p in found.problems] == [Reason.AMBIGUOUS_IMAGE] * 2
    assert "6 of 6 contours of 'disc' lie on more than one image" in found.problems[0].detail
    # contours on slices 2 to 7 of some phase: only the others are empty for certain
    certain = [10 * phase + k for phase in range(3) for k in (0, 1, 8, 9)]
    assert [one.looked_at.tolist() for one in found.annotations] == [certain] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xfe\xff\x00\xe0\0\0\0\0" * (Limits().header_elements + 1), "524289 elements and items"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_none_is_a_problem(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    """Empty, a bomb of items, or gone since the scan."""
    if content is not None:
        (tmp_path / "rs.dcm").write_bytes(content)
    images = tables.slice_table(path=["a"])
    found = find(tmp_path, images, [ScannedFile("rs.dcm", tables.RTSTRUCT, 1)])

    assert found.annotations == ()
    (problem,) = found.problems
    assert (problem.path, problem.reason) == ("rs.dcm", Reason.UNREADABLE_FILE)
    assert message in problem.detail


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_never_raise(seed: int, phantom: Phantom) -> None:
    """Cut off, and with bytes changed at random: problems, or contours, but no exception."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    file = root / phantom.structure_set_path
    content = bytearray(file.read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(content), 12 if seed % 2 else 400).tolist():
        content[place] = int(rng.integers(256))
    file.write_bytes(content[: int(rng.integers(1, len(content)))] if seed % 3 == 0 else content)
    found = find(root, images, files)
    drawn = tables.read(root, images, found.annotations)

    assert found.annotations or found.problems
    assert all(len(one.looked_at) for one in found.annotations)
    assert np.isfinite(drawn.contours.points_column_row).all()


def test_problems_tell_nothing_about_the_patient(shared_data: Path, tmp_path: Path) -> None:
    """No PatientID, name, UID, date or free text of any structure set in any detail."""
    problems: list[Problem] = []
    secrets: set[str] = set()
    for file in shared_structure_sets(shared_data):
        images, files = tables.scan(file.parent.parent)
        problems += find(file.parent.parent, images, files).problems
        problems += find(file.parent.parent, images.take(np.zeros(0, np.int64)), files).problems
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(file, force=True)
            names = {roi.ROIName for roi in dataset.StructureSetROISequence}
            del dataset.ROIContourSequence
            for element in dataset.iterall():
                if element.VR in ("PN", "LO", "SH", "UI", "DA", "TM"):
                    secrets.update(set(str(element.value).split("\\")) - names)
    text = " ".join(problem.detail for problem in problems)

    assert len(problems) > 20
    assert not {s for s in secrets if len(s) > 3 and re.search(rf"\b{re.escape(s)}\b", text)}


def test_recognized_by_its_class() -> None:
    """RT Structure Set Storage, and nothing else; the name does not matter."""
    assert rtstruct.recognizes(ScannedFile("a", tables.RTSTRUCT, 1))
    assert not rtstruct.recognizes(ScannedFile("RS.dcm", "1.2.840.10008.5.1.4.1.1.66.4", 1))


def test_contours_of_other_rois_stay_when_one_is_outside(phantom: Phantom) -> None:
    """A ROI whose contours all lie elsewhere was looked for, and has no ring."""
    root = Path(phantom.directory) / ".." / "far"
    far = [to_patient(SMALL, phantom.planes[k]) + np.array([0, 0, 500]) for k in (2, 3)]
    extra = [ExtraContour("far", ring) for ring in far]
    other = make_rtstruct_series(root, extra=extra)
    images, files = tables.scan(Path(other.directory))
    found = find(Path(other.directory), images, files)

    assert {one.name: len(one.slice) for one in found.annotations} == {
        "disc": 6,
        "ring": 12,
        "far": 0,
    }
    assert "2 of 2 contours of 'far' lie on no image" in found.problems[0].detail
