"""Images that may name somebody in their pixels are left out, unless they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

from parallel_dicomseg.cli import main
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.dicom.headers import is_secondary_capture
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.phantoms import make_rtstruct_series, rectangle
from parallel_dicomseg.records import Cohort, Reason, ScanOptions
from parallel_dicomseg.store import open_dataset, verify_file
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

SHAPE = (4, 20, 24)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SQUARE = rectangle(3.2, 4.1, 12.4, 15.3)


def series(folder: Path, drawn: bool = True, seed: int = 0) -> Path:
    """A series of four slices, all of them with an outline where it is drawn on."""
    rings = {"heart": [(k, SQUARE) for k in range(SHAPE[0])]}
    phantom = make_rtstruct_series(folder, shape=SHAPE, structures=rings, seed=seed)
    if not drawn:
        (folder / phantom.structure_set_path).unlink()
    return folder


def edit(path: Path, **values: Any) -> None:
    """Change attributes of a DICOM file."""
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    if "SOPClassUID" in values:
        dataset.file_meta.MediaStorageSOPClassUID = values["SOPClassUID"]
    dataset.save_as(path)


def scan(root: Path, **options: Any) -> Cohort:
    """A scan with these options."""
    return scan_cohort(root, options=ScanOptions(**options))


def quarantined(cohort: Cohort) -> dict[str, str]:
    """What was left out, and why."""
    return {p.path: p.detail for p in cohort.problems if p.reason is Reason.BURNED_IN_ANNOTATION}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"BurnedInAnnotation": "YES"}, "(0028,0301) Burned In Annotation is YES"),
        ({"BurnedInAnnotation": "yes "}, "(0028,0301) Burned In Annotation is YES"),
        ({"SOPClassUID": SECONDARY_CAPTURE}, "a secondary capture (0008,0016)"),
        ({"SOPClassUID": f"{SECONDARY_CAPTURE}.2"}, "a secondary capture (0008,0016)"),
        (
            {"SOPClassUID": SECONDARY_CAPTURE, "BurnedInAnnotation": "NO"},
            "a secondary capture (0008,0016)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_an_image_that_may_name_somebody_is_left_out(
    tmp_path: Path, values: dict[str, str], why: str
) -> None:
    """Of a drawn series that one alone, with its outline; it is a rejection that names the option;
    with the option all is there.
    """
    root = series(tmp_path / "a")
    edit(root / "images" / "0002.dcm", **values)

    cohort, allowed = scan(root), scan(root, allow_burned_in=True)

    (detail,) = quarantined(cohort).values()
    assert [*quarantined(cohort)] == ["images/0002.dcm"]
    assert detail.startswith(why)
    assert detail.endswith("--allow-burned-in takes it")
    assert all(p.is_rejection for p in cohort.problems)
    assert b"images/0002.dcm" not in cohort.slices.path.tolist()
    assert cohort.annotations.slice.tolist() == [0, 1, 2]
    assert quarantined(allowed) == {}
    assert allowed.annotations.slice.tolist() == [0, 1, 2, 3]


def test_other_images_stay(tmp_path: Path) -> None:
    """Neither NO nor a class that merely begins with the same digits is left out."""
    root = series(tmp_path / "a")
    edit(root / "images" / "0001.dcm", BurnedInAnnotation="NO")
    edit(root / "images" / "0002.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.4")

    assert len(scan(root).slices) == 4
    classes = np.array([b"1.2.840.10008.5.1.4.1.1.7.4", b"1.2.840.10008.5.1.4.1.1.77.1.1", b""])
    assert is_secondary_capture(classes).tolist() == [True, False, False]


def test_a_by_product_costs_no_exit_status(tmp_path: Path) -> None:
    """A dose report on which nobody drew would not be converted anyway: it is a series without
    annotation. Where all images are asked for it is missing from the output, and counts.
    """
    root = tmp_path
    series(root / "a")
    series(root / "report", drawn=False, seed=7)
    for path in (root / "report" / "images").iterdir():
        edit(path, SOPClassUID=SECONDARY_CAPTURE)

    usual, every = scan(root), scan(root, include_unannotated=True)

    assert {p.reason for p in usual.problems} == {Reason.IMAGES_WITHOUT_ANNOTATION}
    assert not any(p.is_rejection for p in usual.problems)
    assert len(quarantined(every)) == 4
    assert len(usual.slices) == len(every.slices) == 4
    assert len(scan(root, include_unannotated=True, allow_burned_in=True).slices) == 8


def test_a_localizer_that_nobody_drew_on_is_none_of_them(tmp_path: Path) -> None:
    """It would be left out anyway."""
    root = tmp_path
    series(root / "a")
    series(root / "scout", drawn=False, seed=7)
    for path in (root / "scout" / "images").iterdir():
        edit(path, BurnedInAnnotation="YES", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])

    assert quarantined(scan(root, include_unannotated=True)) == {}


def test_images_of_a_link_table_are_left_out_too(tmp_path: Path) -> None:
    """The layout promises images, not that they are clean."""
    truth = make_sunnybrook_cohort(tmp_path / "c", patients=1, slices=3, rows=32, columns=32)
    image = truth.outlines[0].image_path
    edit(tmp_path / "c" / image, BurnedInAnnotation="YES")

    cohort = scan(tmp_path / "c")

    assert [*quarantined(cohort)] == [image]
    assert image.encode() not in cohort.slices.path.tolist()
    assert len(cohort.annotations) == sum(o.image_path != image for o in truth.outlines)


def test_nothing_but_such_images_says_what_to_do(tmp_path: Path) -> None:
    """The sentence that ends the run names the option."""
    root = series(tmp_path / "a")
    for path in (root / "images").iterdir():
        edit(path, BurnedInAnnotation="YES")

    with pytest.raises(LayoutError, match=r"Burned In Annotation is YES.*--allow-burned-in"):
        scan(root)


def test_the_file_lists_what_was_left_out(tmp_path: Path) -> None:
    """The status is 1, the list has the reason, the option gives 0 and is told by the file."""
    root = series(tmp_path / "a")
    edit(root / "images" / "0000.dcm", BurnedInAnnotation="YES")
    there, all_of_it = tmp_path / "x.h5", tmp_path / "y.h5"

    summary = convert_cohort(scan(root), there)
    command = ["convert", str(root), "-o", str(all_of_it), "--allow-burned-in"]
    result = CliRunner().invoke(main, command)

    assert (summary.exit_status, summary.slices) == (1, 3)
    assert result.exit_code == 0, result.output
    assert verify_file(there).is_sound
    with open_dataset(there) as dataset:
        (problem,) = dataset.rejected
        assert (problem.path, problem.reason) == ("images/0000.dcm", "burned-in-annotation")
        assert "allow_burned_in false" in dataset.attributes["scanned_with"]
    with open_dataset(all_of_it) as dataset:
        assert len(dataset) == 4
        assert dataset.header(0)["BurnedInAnnotation"] == "YES"
        assert "allow_burned_in true" in dataset.attributes["scanned_with"]


def test_reasons_are_few() -> None:
    """At most 25; a reason of older files is still read."""
    assert len(Reason) <= 25
    assert Reason("unlinked-folder") is Reason.STRAY_FILE
    with pytest.raises(ValueError, match="is not a valid Reason"):
        Reason("nonsense")
