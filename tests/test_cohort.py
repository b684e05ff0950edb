"""What a scan makes of whole directories: trees, Sunnybrook cohorts, and both in one."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.dicom.decoders import quiet
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.geometry import normal_of
from parallel_dicomseg.phantoms import make_rtstruct_series, rectangle
from parallel_dicomseg.records import Cohort, Problem, Progress, Reason, ScanOptions
from parallel_dicomseg.saved import load_scan, save_scan
from parallel_dicomseg.synthetic import make_sunnybrook_cohort
from parallel_dicomseg.volumes import natural_key

SHAPE = (4, 20, 24)
SQUARE = rectangle(3.2, 4.1, 12.4, 15.3)
ALL = ScanOptions(include_unannotated=True)

Rings = Mapping[str, list[int]]
"""Slices by structure."""


def series(folder: Path, rings: Rings, patient: str = "P1", seed: int = 0, **more: Any) -> Path:
    """A series of four slices; a structure set where there are rings."""
    structures = {name: [(k, SQUARE) for k in slices] for name, slices in rings.items()}
    phantom = make_rtstruct_series(
        folder, shape=SHAPE, structures=structures, patient_id=patient, seed=seed, **more
    )
    if not rings:
        (folder / phantom.structure_set_path).unlink()
    return folder


def edit(path: Path, **values: Any) -> None:
    """Change attributes of a DICOM file."""
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


def scan(root: Path, **options: Any) -> Cohort:
    """A scan with these options."""
    return scan_cohort(root, options=ScanOptions(**options))


def reasons(problems: Iterable[Problem]) -> dict[str, set[str]]:
    """Reasons by path."""
    found: dict[str, set[str]] = defaultdict(set)
    for problem in problems:
        found[problem.path].add(problem.reason.value)
    return dict(found)


def drawn(cohort: Cohort) -> set[tuple[str, str, str]]:
    """Image, structure and annotation file of every ring."""
    table = cohort.annotations
    return {
        (
            os.fsdecode(cohort.slices.path[row]),
            cohort.structures[structure],
            os.fsdecode(table.path[k]),
        )
        for k, (row, structure) in enumerate(
            zip(table.slice.tolist(), table.structure.tolist(), strict=True)
        )
    }


def assert_in_order(cohort: Cohort) -> None:
    """Patients in natural order; series and volumes in one piece; positions ascending."""
    slices = cohort.slices
    patients = [os.fsdecode(name) for name in slices.patient_id.tolist()]
    assert patients == sorted(patients, key=natural_key)
    steps = np.diff(slices.volume)
    assert slices.volume[0] == 0
    assert set(steps.tolist()) <= {0, 1}
    uids = list(zip(patients, slices.series_instance_uid.tolist(), strict=True))
    runs = [uids[0], *(b for a, b in pairwise(uids) if a != b)]
    assert len(runs) == len(set(runs))
    for volume in range(slices.volume[-1] + 1):
        rows = slices.volume == volume
        normal = normal_of(slices.image_orientation_patient[rows][0])
        heights = slices.image_position_patient[rows] @ normal
        assert np.isnan(heights).all() or (np.diff(heights) > 0).all()


# ------------------------------------------------------------------------------- trees of DICOM


def test_whole_series_are_converted(tmp_path: Path) -> None:
    """All slices of each annotated series, patients by number; what is not drawn is looked for."""
    series(tmp_path / "ten/a", {"Heart": [1, 2]}, "P10", 1)
    series(tmp_path / "two/b", {"Lung": [3], "Heart": [0]}, "P2", 2)
    cohort = scan(tmp_path)
    bits = {name: 1 << k for k, name in enumerate(cohort.structures)}

    assert_in_order(cohort)
    assert cohort.source == "dicom"
    assert cohort.structures == ("Heart", "Lung")
    assert cohort.slices.path.tolist() == [
        f"{folder}/images/{k:04d}.dcm".encode() for folder in ("two/b", "ten/a") for k in range(4)
    ]
    assert cohort.slices.volume.tolist() == [0] * 4 + [1] * 4
    assert cohort.slices.annotated.tolist() == [3] * 4 + [bits["Heart"]] * 4
    assert drawn(cohort) == {
        ("two/b/images/0000.dcm", "Heart", "two/b/rtstruct.dcm"),
        ("two/b/images/0003.dcm", "Lung", "two/b/rtstruct.dcm"),
        ("ten/a/images/0001.dcm", "Heart", "ten/a/rtstruct.dcm"),
        ("ten/a/images/0002.dcm", "Heart", "ten/a/rtstruct.dcm"),
    }
    assert set(cohort.annotations.kind.tolist()) == {b"rtstruct"}
    assert cohort.found_by == {"reference": 3}
    assert cohort.problems == ()
    assert all(len(column.code) == 8 for column in cohort.headers.values())
    assert cohort.nested == ()


def test_names_and_folders_mean_nothing(tmp_path: Path) -> None:
    """Files without extension, all in one folder, in any order of names: the same cohort."""
    series(tmp_path / "tidy", {"Heart": [1, 2]}, "P1", 1)
    series(tmp_path / "tidy2", {"Heart": [0]}, "P2", 2)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    (tmp_path / "flat").mkdir()
    for k, path in enumerate(files):
        shutil.copy(path, tmp_path / "flat" / f"{(7 * k) % 16:02x}{k}")
    for name in ("tidy", "tidy2"):
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / name, tmp_path / "tree" / name)
    tidy, flat = scan(tmp_path / "tree"), scan(tmp_path / "flat")

    assert flat.problems == ()
    for name in ("sop_instance_uid", "volume", "annotated", "patient_id"):
        assert getattr(tidy.slices, name).tolist() == getattr(flat.slices, name).tolist()
    for name in ("slice", "structure", "offset", "length"):
        assert getattr(tidy.annotations, name).tolist() == getattr(flat.annotations, name).tolist()


def test_series_without_annotation_come_only_on_request(tmp_path: Path) -> None:
    """One line for each of them, or all their slices with nothing looked for."""
    series(tmp_path / "a", {"Heart": [1]}, "P1", 1)
    series(tmp_path / "b", {}, "P1", 2)
    some, every = scan(tmp_path), scan_cohort(tmp_path, options=ALL)

    assert (len(some.slices), len(every.slices)) == (4, 8)
    assert reasons(some.problems) == {"b/images/0000.dcm": {"images-without-annotation"}}
    assert "4 CT image(s) of 20 x 24" in some.problems[0].detail
    assert not some.problems[0].is_rejection
    assert every.problems == ()
    assert (some.include_unannotated, every.include_unannotated) == (False, True)
    by_folder = defaultdict(set)
    for path, bits in zip(every.slices.path, every.slices.annotated, strict=True):
        by_folder[path[:1]].add(int(bits))
    assert by_folder == {b"a": {1}, b"b": {0}}
    assert_in_order(every)


def test_localizers_come_only_where_somebody_drew_on_them(tmp_path: Path) -> None:
    """Not even with all images; an annotated one is an image like others."""
    series(tmp_path / "a", {"Heart": [1]}, "P1", 1)
    series(tmp_path / "b", {}, "P1", 2)
    for path in (tmp_path / "b/images").iterdir():
        edit(path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    without = scan_cohort(tmp_path, options=ALL)
    for path in (tmp_path / "a/images").iterdir():
        edit(path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    drawn_on = scan(tmp_path)

    assert {path.split(b"/")[0] for path in without.slices.path} == {b"a"}
    assert reasons(without.problems) == {"b/images/0000.dcm": {"localizer"}}
    assert {path.split(b"/")[0] for path in drawn_on.slices.path} == {b"a"}


def test_a_tree_without_annotation_says_how_to_convert_it(tmp_path: Path) -> None:
    """How many images and series there are, and the option that takes them."""
    series(tmp_path / "a", {}, "P1", 1)
    series(tmp_path / "b", {}, "P2", 2)
    with pytest.raises(
        LayoutError,
        match=r"among 8 image\(s\) in 2 series and 0 annotation\(s\); --include-unannotated takes",
    ):
        scan(tmp_path)

    assert len(scan_cohort(tmp_path, options=ALL).slices) == 8


def test_a_tree_without_images_says_so(tmp_path: Path) -> None:
    """Annotations alone, or nothing that may be an image."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("x")
    with pytest.raises(
        LayoutError, match=r"no image was found in 0 file\(s\) that may be one; 1 p"
    ):
        scan(tmp_path)
    series(tmp_path / "b", {"Heart": [1]})
    shutil.rmtree(tmp_path / "b/images")
    with pytest.raises(
        LayoutError, match=r"no image was found in 1 .* b/rtstruct.dcm: for the source rtstruct"
    ):
        scan(tmp_path)


def test_patients_without_a_name_are_their_studies(tmp_path: Path) -> None:
    """No PatientID: the study; no study either: the folder. Never one patient for all."""
    for k, name in enumerate("abc"):
        series(tmp_path / name, {"Heart": [1]}, "", k)
    for path in (tmp_path / "c/images").iterdir():
        edit(path, StudyInstanceUID="")
    cohort = scan(tmp_path)
    patients = {
        path.split(b"/")[0]: patient
        for path, patient in zip(cohort.slices.path, cohort.slices.patient_id, strict=True)
    }

    assert len(set(patients.values())) == 3
    assert patients[b"c"] == b"c/images"
    assert_in_order(cohort)


def test_a_series_without_a_patient_is_not_torn_apart(tmp_path: Path) -> None:
    """Studies that share a series are one patient, over any chain of them; others are not."""
    for k, name in enumerate("abc"):
        series(tmp_path / name, {"Heart": [1]}, "", k)
    of_a, of_b = (sorted((tmp_path / name / "images").iterdir()) for name in "ab")
    shared = pydicom.dcmread(of_a[0]).SeriesInstanceUID
    for k, path in enumerate(of_a):
        edit(path, StudyInstanceUID=f"1.2.3.{9 - k}")
    edit(of_b[-1], SeriesInstanceUID=shared)
    cohort = scan(tmp_path, include_unannotated=True, split=(0.5, 0.5))
    patients: dict[str, set[bytes]] = {}
    for path, patient in zip(cohort.slices.path, cohort.slices.patient_id, strict=True):
        patients.setdefault("c" if path.startswith(b"c") else "a and b", set()).add(patient)

    assert [len(names) for names in patients.values()] == [1, 1]
    assert patients["c"] != patients["a and b"]
    assert_in_order(cohort)


def test_copies_of_images_are_told_and_left_out(tmp_path: Path) -> None:
    """An image that lies there twice is converted once, whole series included."""
    series(tmp_path / "a", {"Heart": [1]}, "P1", 1)
    shutil.copytree(tmp_path / "a/images", tmp_path / "copy")
    cohort = scan(tmp_path)

    assert len(cohort.slices) == 4
    assert reasons(cohort.problems) == {f"copy/{k:04d}.dcm": {"repeated"} for k in range(4)}


def test_other_images_under_one_uid_are_rejected_only_where_something_is_converted(
    tmp_path: Path,
) -> None:
    """A rival of an image is a rejection; that of a series nobody asked for harms nobody."""
    series(tmp_path / "a", {"Heart": [1]}, "P1", 1)
    rival = tmp_path / "rival.dcm"
    shutil.copy(tmp_path / "a/images/0002.dcm", rival)
    edit(rival, ImagePositionPatient=[0, 0, 999])
    series(tmp_path / "b", {"Liver": [1]}, "P2", 2)
    heart, liver = (scan(tmp_path, structures=(name,)) for name in ("Heart", "Liver"))
    told = {problem.path: problem for problem in liver.problems}[rival.name]

    assert reasons(heart.problems)[rival.name] == {"duplicate"}
    assert not told.is_rejection
    assert told.detail.endswith("nothing of its series is converted")


def test_problems_of_structures_that_nobody_asked_for_are_not_told(tmp_path: Path) -> None:
    """A bad contour costs a run only where its structure is asked for, however it is spelled, and
    also where nothing of its file is left.
    """
    series(tmp_path / "a", {"Heart": [1], "Lung": [1]}, "P1", 1)
    series(tmp_path / "b", {"HEART ": [1]}, "P2", 2)
    for name, roi in (("a", 1), ("b", 0)):
        path = tmp_path / name / "rtstruct.dcm"
        dataset = pydicom.dcmread(path)
        for contour in dataset.ROIContourSequence[roi].ContourSequence:
            contour.ContourGeometricType = "CIRCLE"
        dataset.save_as(path)
    lost = {
        name: {p.path for p in scan(tmp_path, structures=(name,)).problems if p.is_rejection}
        for name in ("heart", "/lung/", "new=Heart")
    }

    assert lost == {
        "heart": {"b/rtstruct.dcm"},
        "/lung/": {"a/rtstruct.dcm"},
        "new=Heart": {"b/rtstruct.dcm"},
    }


def test_a_real_series_of_three_studies_is_one_volume(shared_data: Path) -> None:
    """No PatientID, a study per image: one patient all the same, in the order of positions."""
    options = ScanOptions(include_unannotated=True)
    cohort = scan_cohort(shared_data / "rtstruct_odd/rt_utils", options=options)
    studies = cohort.slices.study_instance_uid
    mine = np.isin(cohort.slices.rows, [50]) & (cohort.slices.columns == 100)

    assert len(set(studies[mine].tolist())) == 3
    assert len(set(cohort.slices.patient_id[mine].tolist())) == 1
    assert len(set(cohort.slices.volume[mine].tolist())) == 1
    assert np.ptp(np.flatnonzero(mine)) == 2


def test_one_bad_file_costs_itself(tmp_path: Path) -> None:
    """Cut, foreign and misnamed files are told; the others are converted."""
    series(tmp_path / "a", {"Heart": [1, 2]}, "P1", 1)
    broken = tmp_path / "a/images/0003.dcm"
    broken.write_bytes(broken.read_bytes()[:600])
    (tmp_path / "a/x.dcm").write_bytes(b"no DICOM at all")
    (tmp_path / "a/README").write_bytes(b"text")
    (tmp_path / "a/mask.nii.gz").write_bytes(b"text")
    cohort = scan(tmp_path)

    assert len(cohort.slices) == 3
    assert {path for path, found in reasons(cohort.problems).items() if found - {"stray-file"}} == {
        "a/images/0003.dcm",
        "a/x.dcm",
    }
    assert {path for path, found in reasons(cohort.problems).items() if "stray-file" in found} == {
        "a/README",
        "a/mask.nii.gz",
    }


# ------------------------------------------------------------------------------------ structures


def test_structures_are_chosen_over_all_files(tmp_path: Path) -> None:
    """By name, renamed, by pattern, by a table; series without them are left out."""
    series(tmp_path / "a", {"Heart": [1], "Lung": [2]}, "P1", 1)
    series(tmp_path / "b", {"HEART ": [1]}, "P2", 2)
    series(tmp_path / "c", {"Coeur": [0]}, "P3", 3)
    table = tmp_path.parent / f"{tmp_path.name}.toml"
    table.write_text('[structures]\nheart = ["Heart", "coeur"]\nliver = ["Liver"]\n')
    either = scan(tmp_path, structures=("Heart",))
    renamed = scan(tmp_path, structures=("x=/lung|coeur/", "Heart"))
    by_table = scan(tmp_path, aliases=str(table))

    assert either.structures == ("Heart",)
    assert set(either.slices.patient_id.tolist()) == {b"P1", b"P2"}
    assert reasons(either.problems) == {
        "c/images/0000.dcm": {"images-without-annotation"},
        "c/rtstruct.dcm": {"stray-file"},
    }
    assert renamed.structures == ("x", "Heart")
    assert len(drawn(renamed)) == 4
    assert by_table.structures == ("heart", "liver")
    assert {(image.split("/")[0], name) for image, name, _ in drawn(by_table)} == {
        ("a", "heart"),
        ("b", "heart"),
        ("c", "heart"),
    }
    assert set(by_table.slices.annotated.tolist()) == {1}
    with pytest.raises(ConfigurationError, match=r"'Hart'.*'Coeur', 'Lung'"):
        scan(tmp_path, structures=("Hart",))


def test_sources_can_be_chosen(tmp_path: Path) -> None:
    """One kind of annotation, DICOM trees without Sunnybrook, or Sunnybrook alone."""
    series(tmp_path / "a", {"Heart": [1]}, "P1", 1)
    make_sunnybrook_cohort(tmp_path / "s", patients=1, slices=2, rows=32, columns=32)
    with pytest.raises(
        ConfigurationError,
        match="'pacs' is unknown; there are: auto, dicom, sunnybrook, rtstruct, seg, lidc",
    ):
        scan(tmp_path, source="pacs")
    with pytest.raises(LayoutError, match=r"among .* 0 annotation"):
        scan(tmp_path / "a", source="seg")

    assert scan(tmp_path, source="rtstruct").structures == ("Heart",)
    assert scan(tmp_path, source="dicom").structures == ("Heart",)
    assert scan(tmp_path / "s", source="sunnybrook").structures == ("i", "o")
    assert scan(tmp_path).structures == ("Heart", "i", "o")
    for name, message in (("gone", "no such directory"), ("a/rtstruct.dcm", "not a directory")):
        with pytest.raises(LayoutError, match=message):
            scan(tmp_path / name)


# ------------------------------------------------------------------------------------ Sunnybrook


@pytest.mark.parametrize("layout", ["arterys", "sunnybrook"])
def test_a_sunnybrook_directory_is_scanned_as_such(tmp_path: Path, layout: str) -> None:
    """By itself and by name: the same cohort, cine phases apart, slices with an outline only."""
    truth = make_sunnybrook_cohort(
        tmp_path, patients=2, slices=3, phases=3, rows=32, columns=32, layout=layout
    )
    found, named = scan(tmp_path), scan(tmp_path, source="sunnybrook")
    every = scan_cohort(tmp_path, options=ALL)

    assert found.source == named.source == "sunnybrook"
    assert len(found.annotations) == len(truth.outlines)
    assert found.annotations.path.tolist() == named.annotations.path.tolist()
    assert found.slices.path.tolist() == named.slices.path.tolist()
    assert found.structures == ("i", "o")
    assert found.nested == ((0, 1),)
    assert set(found.annotations.kind.tolist()) == {b"sunnybrook"}
    assert set(found.annotations.length.tolist()) == {-1}
    assert not found.slices.annotated.any()
    assert found.found_by == {"number": len(truth.outlines)}
    assert {problem.reason for problem in found.problems} == {Reason.SERIES_IRREGULAR}
    assert len(every.slices) == 2 * 3 * 3
    assert len(np.unique(every.slices.volume)) == 2 * 3
    for cohort in (found, every):
        assert_in_order(cohort)


def test_real_outlines_lie_in_their_volumes(shared_data: Path) -> None:
    """96 images of 5 patients, end diastole and end systole in volumes of their own."""
    cohort = scan(shared_data / "sunnybrook_arterys" / "final_data")
    slices = cohort.slices

    assert_in_order(cohort)
    assert (len(slices), len(cohort.annotations)) == (96, 142)
    assert np.bincount(cohort.annotations.structure).tolist() == [96, 46]
    assert np.bincount(slices.volume).tolist() == [9, 9, 9, 9, 10, 10, 9, 9, 11, 11]
    numbers = {
        (volume, int(number) % 20)
        for volume, number in zip(slices.volume, slices.instance_number, strict=True)
    }
    assert len(numbers) == 10  # InstanceNumber counts the 20 phases of a position fastest


def test_sunnybrook_structures_are_chosen_like_others(tmp_path: Path) -> None:
    """In the order asked, renamed, united, with their nesting; the others are not told of."""
    make_sunnybrook_cohort(tmp_path, patients=1, slices=2, rows=48, columns=48, papillary=True)
    (contour,) = tmp_path.rglob("IM-*-0001-ocontour-manual.txt")
    rival = contour.with_name(contour.name.replace("IM-0001", "IM-0009"))
    rival.write_text("1 1\n1 5\n5 5\n")
    every = scan(tmp_path)
    some = scan(tmp_path, structures=("p1", "i"))
    united = scan(tmp_path, structures=("muscle=/p[12]/", "cavity=i"))

    assert every.structures == ("i", "p1", "p2")  # of o nothing is left: nobody knows which
    assert [problem.reason for problem in every.problems] == [Reason.DUPLICATE] * 2
    assert (some.structures, some.nested) == (("p1", "i"), ((0, 1),))
    assert some.problems == ()
    assert (united.structures, united.nested) == (("muscle", "cavity"), ((0, 1),))
    assert sorted(united.annotations.layer.tolist()) == [0, 0, 0, 1]
    assert united.problems == ()
    with pytest.raises(ConfigurationError, match=r"'heart'.*'i', 'p1'"):
        scan(tmp_path, structures=("heart",))


def test_a_copy_of_an_image_does_not_hide_its_outline(tmp_path: Path) -> None:
    """Two files of one image and number: the first is taken, the outline lies on it."""
    make_sunnybrook_cohort(tmp_path, patients=1, slices=2, rows=32, columns=32)
    image = min(tmp_path.glob("dicoms/*/*.dcm"))
    shutil.copy(image, image.with_name(f"{image.stem} copy.dcm"))
    cohort = scan(tmp_path)

    assert [problem.reason for problem in cohort.problems] == [Reason.REPEATED]
    assert len(cohort.annotations) == 3


def test_other_objects_take_no_place_of_an_image(tmp_path: Path) -> None:
    """A file that is no DICOM among the images is rejected; a structure set is merely told."""
    make_sunnybrook_cohort(tmp_path, patients=1, slices=2, rows=32, columns=32)
    folder = next(tmp_path.glob("dicoms/*"))
    (folder / "77").write_bytes(b"no DICOM")
    series(tmp_path.parent / f"{tmp_path.name}x", {"Heart": [1]})
    shutil.copy(tmp_path.parent / f"{tmp_path.name}x/rtstruct.dcm", folder / "78.dcm")
    cohort = scan(tmp_path, source="sunnybrook")
    place = folder.relative_to(tmp_path).as_posix()

    assert reasons(cohort.problems) == {
        f"{place}/77": {"not-dicom"},
        f"{place}/78.dcm": {"not-an-image"},
    }


def test_a_sunnybrook_cohort_with_nothing_right_names_what_is_wrong(tmp_path: Path) -> None:
    """Missing patients and images that are not DICOM, before what is harmless."""
    make_sunnybrook_cohort(tmp_path, patients=1, slices=4, rows=32, columns=32)
    for image in tmp_path.glob("dicoms/*/*.dcm"):
        image.write_bytes(b"no DICOM")
    with pytest.raises(
        LayoutError,
        match=r"no image was found in 4 file\(s\) that may be one; 10 problem\(s\): "
        r"dicoms/\w+/1\.dcm: .*; dicoms/\w+/2\.dcm: .*; dicoms/\w+/3\.dcm: .*; and 7 more$",
    ):
        scan(tmp_path)
    (tmp_path / "link.csv").write_text("patient_id,original_id\nQ1,SC-HF-I-1\n")
    with pytest.raises(
        LayoutError, match=r"in 0 file\(s\) that may be one; 2 problem\(s\): dicoms/Q1: no images"
    ):
        scan(tmp_path)


def test_everything_in_one_tree(tmp_path: Path) -> None:
    """Two Sunnybrook cohorts, structure sets and strays: one cohort, each with its own patients."""
    one = make_sunnybrook_cohort(tmp_path / "a/scd", patients=2, slices=2, rows=32, columns=32)
    two = make_sunnybrook_cohort(
        tmp_path / "b", patients=1, slices=2, rows=32, columns=32, seed=1, layout="sunnybrook"
    )
    series(tmp_path / "c", {"Heart": [1], "i": [2]}, "P1", 1)
    (tmp_path / "a/scd/notes.txt").write_text("x")
    cohort = scan(tmp_path, split=(0.5, 0.5), seed=3)
    kinds = Counter(cohort.annotations.kind.tolist())

    assert_in_order(cohort)
    assert cohort.source == "sunnybrook+dicom"
    assert cohort.structures == ("Heart", "i", "o")
    assert cohort.nested == ((1, 2),)
    assert kinds == {b"sunnybrook": len(one.outlines) + len(two.outlines), b"rtstruct": 2}
    assert len(cohort.slices) == 2 * 2 + 2 + 4
    assert set(cohort.slices.patient_id.tolist()) == {
        *(patient.patient_id.encode() for patient in (*one.patients, *two.patients)),
        b"P1",
    }
    assert reasons(cohort.problems) == {"a/scd/notes.txt": {"stray-file"}}
    assert cohort.found_by == {"number": len(one.outlines) + len(two.outlines), "reference": 2}
    assert set(cohort.slices.split.tolist()) == {b"train", b"validation"}
    for image, _, annotation in drawn(cohort):
        assert image.split("/")[0] == annotation.split("/")[0]


def test_no_patient_is_on_two_sides(tmp_path: Path) -> None:
    """One PatientID in several folders, studies and modalities is one patient of the split."""
    for k in range(8):
        series(tmp_path / f"s{k}", {"Heart": [1]}, f"P{k % 4}", k, modality=("CT", "MR")[k % 2])
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 1, "stratify": True}):
        cohort = scan(tmp_path, split=(0.5, 0.25, 0.25), **options)
        parts = defaultdict(set)
        for patient, part in zip(cohort.slices.patient_id, cohort.slices.split, strict=True):
            parts[patient].add(part)
        assert {len(part) for part in parts.values()} == {1}
        assert Counter(b"".join(part) for part in parts.values()) == {
            b"train": 2,
            b"validation": 1,
            b"test": 1,
        }
    assert set(scan(tmp_path).slices.split.tolist()) == {b""}


def test_threads_change_nothing_but_the_time(tmp_path: Path) -> None:
    """One thread or many: equal in every column; progress counts every file once."""
    for k in range(3):
        series(tmp_path / f"s{k}", {"Heart": [1, 3], f"x{k}": [0]}, f"P{k}", k)
    events: list[Progress] = []
    one = scan(tmp_path, workers=1)
    many = scan_cohort(tmp_path, options=ScanOptions(workers=7), progress=events.append)

    for table, twin in ((one.slices, many.slices), (one.annotations, many.annotations)):
        for field in fields(table):
            np.testing.assert_array_equal(getattr(table, field.name), getattr(twin, field.name))
    assert one.problems == many.problems
    assert (events[-1].done, events[-1].total) == (15, 15)


# ------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("folder", "images", "rings", "structures"),
    [
        ("sts_rtstruct", 308, 3 * 47 + 3, 3),
        ("sts_raw_mr_t2", 40, 52, 2),
        ("ibsi_digital_phantom", 4, 4, 1),
    ],
)
def test_real_annotations_are_found(
    shared_data: Path, folder: str, images: int, rings: int, structures: int
) -> None:
    """Every slice of the annotated series, and every ring or frame on it; nothing is rejected."""
    cohort = scan(shared_data / folder)

    assert_in_order(cohort)
    assert len(cohort.slices) == images
    assert len(cohort.annotations) == rings
    assert len(cohort.structures) == structures
    assert cohort.slices.annotated.all()
    assert not any(problem.is_rejection for problem in cohort.problems)


def test_no_file_of_a_large_mixed_tree_is_lost(shared_data: Path) -> None:
    """Every file below the real data is an image, an annotation, a link table, or is told by path.

    A series of localizers is told by the path of its first image.
    """
    cohort = scan_cohort(shared_data, options=ALL)
    there = {
        path.relative_to(shared_data).as_posix()
        for path in shared_data.rglob("*")
        if path.is_file()
    }
    images = {os.fsdecode(path) for path in cohort.slices.path.tolist()}
    annotations = {os.fsdecode(path) for path in cohort.annotations.path.tolist()}
    told = {problem.path for problem in cohort.problems}
    tables = {path for path in there if path.endswith("/link.csv")}
    localizers = {
        other
        for problem in cohort.problems
        if problem.reason is Reason.LOCALIZER
        for other in same_series(shared_data, problem.path, there)
    }

    assert_in_order(cohort)
    assert cohort.source == "sunnybrook+dicom"
    assert there - images - annotations - told - tables - localizers == set()
    assert (images | annotations | told) - there == set()
    assert not images & annotations
    assert len(images) > 1500


def same_series(root: Path, path: str, paths: Iterable[str]) -> set[str]:
    """Images in the folder of an image that have its series."""
    folder = path.rpartition("/")[0]
    beside = [other for other in paths if other.rpartition("/")[0] == folder]
    with quiet():
        uids = {
            other: dataset.get("SeriesInstanceUID")
            for other in beside
            for dataset in [pydicom.dcmread(root / other, stop_before_pixels=True, force=True)]
        }
    return {other for other in beside if uids[other] == uids[path]}


def test_what_is_told_names_nobody(shared_data: Path) -> None:
    """No PatientID, name, date or UID of any image is in a problem's detail."""
    cohort = scan_cohort(shared_data, options=ALL)
    details = "\n".join(problem.detail for problem in cohort.problems)
    secrets = {*cohort.slices.patient_id.tolist()}
    for name in ("study", "series", "sop"):
        secrets |= set(getattr(cohort.slices, f"{name}_instance_uid").tolist())
    for keyword in ("StudyDate", "SeriesDate"):
        secrets |= set(cohort.headers[keyword].values.tolist())
    long_enough = {os.fsdecode(secret) for secret in secrets if len(secret) > 5}

    assert len(long_enough) > 1000
    assert not [secret for secret in long_enough if secret in details]


def test_a_scan_of_everything_is_saved_and_read_back(shared_data: Path, tmp_path: Path) -> None:
    """All columns of all images of the real data, with their headers and problems."""
    cohort = scan_cohort(shared_data, options=ALL)
    save_scan(cohort, tmp_path / "scan")
    again = load_scan(tmp_path / "scan")

    for table, twin in ((cohort.slices, again.slices), (cohort.annotations, again.annotations)):
        for field in fields(table):
            np.testing.assert_array_equal(
                getattr(table, field.name), getattr(twin, field.name), err_msg=field.name
            )
    assert again.problems == cohort.problems
    assert list(again.headers) == list(cohort.headers)
    for keyword, column in cohort.headers.items():
        twin_column = again.headers[keyword]
        assert column.values[column.code].tolist() == (
            twin_column.values[twin_column.code].tolist()
        )
