"""Single points, kept apart from the masks: from LIDC and RTSTRUCT files to /marks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.cli import only_slice
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.geometry import to_patient
from parallel_dicomseg.phantoms import ExtraContour, Phantom, make_rtstruct_series
from parallel_dicomseg.records import Cohort, ConvertOptions, MarkTable, Reason, ScanOptions
from parallel_dicomseg.report.inspection import inspect_file
from parallel_dicomseg.saved import load_scan, save_scan
from parallel_dicomseg.store import open_dataset, verify_file

Marked = tuple[str, int, tuple[float, float]]
"""Name, slice of the phantom, (column, row)."""

SMALL: list[Marked] = [("nodule-reader-1", 2, (20, 31)), ("nodule-reader-2", 5, (40, 11))]
OTHERS: list[Marked] = [("non-nodule-reader-2", 5, (3, 60)), ("non-nodule-reader-1", 9, (33, 30))]
POINT: Marked = ("iso", 4, (30.5, 22.25))
SQUARE = ((28, 28), (31, 28), (31, 31), (28, 31), (28, 28))
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def phantom(folder: Path, iso: Marked = POINT, **options) -> Phantom:
    """Ten slices of 64 x 64, pixels of 1.5 x 0.75 mm; 'disc', 'ring' and a point of its own ROI."""
    planes = make_rtstruct_series(folder, pixel_spacing=(1.5, 0.75), **options).planes
    shutil.rmtree(folder)  # the planes say where the point is in the patient
    point = ExtraContour(iso[0], [to_patient(iso[2], planes[iso[1]])], "POINT")
    return make_rtstruct_series(folder, pixel_spacing=(1.5, 0.75), extra=[point], **options)


def region(phantom: Phantom, tag: str, k: int, points: Sequence[tuple[float, float]]) -> str:
    """What stands in a <roi> or <nonNodule> of slice k."""
    dataset = pydicom.dcmread(Path(phantom.directory, phantom.image_paths[k]))
    coordinates = "".join(
        f"<{tag}><xCoord>{x}</xCoord><yCoord>{y}</yCoord></{tag}>" for x, y in points
    )
    return (
        f"<imageZposition>{dataset.ImagePositionPatient[2]}</imageZposition>"
        f"<imageSOP_UID>{dataset.SOPInstanceUID}</imageSOP_UID>"
        f"<inclusion>TRUE</inclusion>{coordinates}"
    )


def write_reading(phantom: Phantom, marks: Sequence[Marked], extra: str = "") -> None:
    """Two readers, the first of whom also outlined a nodule on slice 3; their marks."""
    sessions = ""
    for reader in (1, 2):
        drawn = [("edgeMap", 3, SQUARE)] if reader == 1 else []
        mine = [mark for mark in marks if mark[0].endswith(str(reader))]
        drawn += [("edgeMap", k, (at,)) for name, k, at in mine if name.startswith("nodule")]
        loci = [("locus", k, (at,)) for name, k, at in mine if name.startswith("non-")]
        nodules = "".join(
            f"<unblindedReadNodule><roi>{region(phantom, *one)}</roi></unblindedReadNodule>"
            for one in drawn
        )
        others = "".join(f"<nonNodule>{region(phantom, *one)}</nonNodule>" for one in loci)
        sessions += f"<readingSession>{nodules}{others}{extra}</readingSession>"
    first = pydicom.dcmread(Path(phantom.directory, phantom.image_paths[0]))
    header = (
        f"<ResponseHeader><SeriesInstanceUid>{first.SeriesInstanceUID}</SeriesInstanceUid>"
        f"<StudyInstanceUID>{first.StudyInstanceUID}</StudyInstanceUID></ResponseHeader>"
    )
    Path(phantom.directory, "reading.xml").write_text(
        f'<LidcReadMessage xmlns="http://www.nih.gov">{header}{sessions}</LidcReadMessage>'
    )


def found(cohort: Cohort) -> list[Marked]:
    """The marks of a cohort of one volume, all of whose slices are there."""
    marks = cohort.marks
    rows = zip(marks.name, marks.slice, marks.points_column_row, strict=True)
    return sorted((n.decode(), int(k), (float(p[0]), float(p[1]))) for n, k, p in rows)


@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions(),
        ConvertOptions(size=(40, 48)),
        ConvertOptions(spacing=(1.1, 0.9)),
        ConvertOptions(spacing=(2.0,), size=(20, 32), fit="structure"),
    ],
)
def test_marks_keep_their_place_in_the_patient(tmp_path: Path, options: ConvertOptions) -> None:
    """Cropped or resampled, a mark's pixel of the file is where it is in the patient."""
    series = phantom(tmp_path / "data")
    write_reading(series, [*SMALL, *OTHERS])
    cohort = scan_cohort(tmp_path / "data")
    expected = sorted([*SMALL, *OTHERS, POINT])
    assert [mark[:2] for mark in found(cohort)] == [mark[:2] for mark in expected]
    np.testing.assert_allclose(
        [mark[2] for mark in found(cohort)], [mark[2] for mark in expected], atol=1e-3
    )

    convert_cohort(cohort, tmp_path / "out.h5", options=options)

    assert verify_file(tmp_path / "out.h5").problems == ()
    assert inspect_file(tmp_path / "out.h5").marks == 5
    with open_dataset(tmp_path / "out.h5") as dataset:
        names, slices, points = (
            dataset.column(name, "marks") for name in ("name", "slice", "column_row")
        )
        geometry = [
            dataset.column(name)
            for name in ("image_position_patient", "image_orientation_patient", "pixel_spacing")
        ]
    planes = np.concatenate(geometry, axis=1)
    assert (np.diff(slices) >= 0).all()
    assert sorted(names.tolist()) == [name.encode() for name, *_ in expected]
    for name, k, point in zip(names.tolist(), slices.tolist(), points, strict=True):
        ((_, source, place),) = [m for m in expected if (m[0].encode(), m[1]) == (name, k)]
        # a structure set says mm with 4 digits
        tolerance = 1e-4 if name == b"iso" else 1e-6
        truth = to_patient(place, series.planes[source])
        np.testing.assert_allclose(to_patient(point, planes[k]), truth, rtol=0, atol=tolerance)


def test_marks_are_told_and_drawn_nowhere(tmp_path: Path) -> None:
    """The line about what has no area stays harmless, and the masks are those without marks."""
    series = phantom(tmp_path / "data")
    write_reading(series, [])
    without = scan_cohort(tmp_path / "data")
    write_reading(series, [*SMALL, *OTHERS])
    cohort = scan_cohort(tmp_path / "data")

    for name in ("slice", "structure", "offset", "length"):
        np.testing.assert_array_equal(
            getattr(cohort.annotations, name), getattr(without.annotations, name)
        )
    details = {p.path: p.detail for p in cohort.problems if p.reason is Reason.NO_AREA}
    assert not any(problem.is_rejection for problem in cohort.problems)
    assert details["reading.xml"].startswith("2 marks; 2 non-nodules; ")
    assert details["reading.xml"].endswith("; 1 outlines are used; /marks has the single points")
    assert "ContourGeometricType is POINT, and /marks has it" in details["rtstruct.dcm"]


def test_a_mark_alone_does_not_convert_an_image(tmp_path: Path) -> None:
    """A series without a structure that is asked for is left out with its marks."""
    phantom(tmp_path / "data/a")
    series = phantom(tmp_path / "data/b", iso=("other", 4, (1.0, 2.0)), seed=1, patient_id="Q")
    Path(series.directory, series.structure_set_path).unlink()
    write_reading(series, [*SMALL, *OTHERS])
    everything = scan_cohort(tmp_path / "data")
    one = scan_cohort(tmp_path / "data", options=ScanOptions(structures=("disc",)))

    assert (len(everything.slices), len(everything.marks)) == (20, 5)
    assert (len(one.slices), len(one.marks)) == (10, 0)


def test_marks_of_structures_that_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    """Those of a reader or ROI that was not chosen; non-nodules are of no structure and stay."""
    write_reading(phantom(tmp_path / "data"), [*SMALL, *OTHERS])
    options = ScanOptions(structures=("nodule-reader-1",))
    cohort = scan_cohort(tmp_path / "data", options=options)
    consensus = ScanOptions(structures=("nodule",), readers="consensus")

    assert found(cohort) == sorted([SMALL[0], *OTHERS])
    assert found(scan_cohort(tmp_path / "data", options=consensus)) == sorted([*SMALL, *OTHERS])


def test_marks_without_an_image_or_a_place_are_rejected(tmp_path: Path) -> None:
    """One beyond the series, one whose UID and z disagree, and one without a locus are told."""
    series = phantom(tmp_path / "data")
    write_reading(series, SMALL, extra="<nonNodule></nonNodule>")
    file = Path(series.directory, "reading.xml")
    uid = pydicom.dcmread(Path(series.directory, series.image_paths[0])).SOPInstanceUID
    lost = "".join(
        f"<nonNodule><imageZposition>{z}</imageZposition><imageSOP_UID>{name}</imageSOP_UID>"
        "<locus><xCoord>1</xCoord><yCoord>2</yCoord></locus></nonNodule>"
        for z, name in ((900, "1.2.3"), (3.0, uid))
    )
    text = file.read_text().replace("</readingSession>", f"{lost}</readingSession>", 1)
    file.write_text(text)
    cohort = scan_cohort(tmp_path / "data")

    assert [mark for mark in found(cohort) if mark[0] != "iso"] == sorted(SMALL)
    assert sorted((p.reason, p.detail[:24]) for p in cohort.problems if p.is_rejection) == [
        (Reason.BAD_CONTOUR, "2 regions without whole "),
        (Reason.CONTOUR_WITHOUT_IMAGE, "2 of the 4 marks lie on "),
    ]


def test_points_of_an_oblique_series(tmp_path: Path) -> None:
    """A POINT is in pixels of its slice; written twice it is one; between slices it is none."""
    folder = tmp_path / "data"
    series = phantom(folder, image_orientation_patient=OBLIQUE)
    file = Path(series.directory, series.structure_set_path)
    dataset = pydicom.dcmread(file)
    contours = dataset.ROIContourSequence[-1].ContourSequence
    between = pydicom.Dataset()
    between.ContourGeometricType = "POINT"
    between.NumberOfContourPoints = 1
    middle = (series.planes[4, :3] + series.planes[5, :3]) / 2
    between.ContourData = [f"{number:.4f}" for number in middle]
    contours.extend([contours[0], between])
    dataset.save_as(file)
    cohort = scan_cohort(folder)

    ((name, k, point),) = found(cohort)
    assert (name, k) == POINT[:2]
    np.testing.assert_allclose(point, POINT[2], atol=2e-4)
    (problem,) = [p for p in cohort.problems if p.structure == "iso"]
    assert problem.detail.startswith("3 of 3 contours of 'iso' enclose no area")


def test_marks_go_where_their_slices_go(tmp_path: Path) -> None:
    """Saved and loaded, one slice alone, and in a plan that leaves slices out."""
    write_reading(phantom(tmp_path / "data"), [*SMALL, *OTHERS])
    cohort = scan_cohort(tmp_path / "data")
    save_scan(cohort, tmp_path / "scan")
    spacing = cohort.slices.pixel_spacing.copy()
    spacing[2] = np.nan
    odd = replace(cohort, slices=replace(cohort.slices, pixel_spacing=spacing))
    convert_cohort(odd, tmp_path / "out.h5", options=ConvertOptions(spacing=(1.0,)))

    assert found(load_scan(tmp_path / "scan")) == found(cohort)
    assert [mark[:2] for mark in found(only_slice(cohort, 5))] == [
        ("nodule-reader-2", 0),
        ("non-nodule-reader-2", 0),
    ]
    with open_dataset(tmp_path / "out.h5") as dataset:
        assert len(dataset) == 9
        assert dataset.column("slice", "marks").tolist() == [3, 4, 4, 8]


ROWS = st.lists(st.integers(0, 9), max_size=12)


@given(slices=ROWS, keep=st.lists(st.booleans(), min_size=10, max_size=10))
def test_marks_on_slices_are_those_of_the_slow_twin(slices: list[int], keep: list[bool]) -> None:
    """Booleans and integers select the same rows, which are counted anew."""
    slices = sorted(slices)
    marks = MarkTable(
        slice=np.array(slices, np.int64),
        name=np.array([f"{k}".encode() for k in range(len(slices))], "S2"),
        points_column_row=np.arange(2.0 * len(slices)).reshape(-1, 2),
    )
    rows = [row for row, kept in enumerate(keep) if kept]
    twin = [(rows.index(k), f"{place}".encode()) for place, k in enumerate(slices) if keep[k]]

    for selected in (np.array(keep), np.array(rows, np.int64)):
        mine = marks.on_slices(selected)
        assert list(zip(mine.slice.tolist(), mine.name.tolist(), strict=True)) == twin
        assert mine.points_column_row.tolist() == [
            [2.0 * int(n), 2.0 * int(n) + 1] for _, n in twin
        ]
