"""All real data in one tree: converted in one run, nothing lost, nobody named."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result

from parallel_dicomseg.cli import main
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.records import Reason, ScanOptions
from parallel_dicomseg.store import open_dataset, verify_file

# What names a person, an examination or a moment (PS3.5 6.2: value representations).
IDENTIFYING_VRS = ("PN", "UI", "DA", "DT")
IDENTIFYING_KEYWORDS = (
    "PatientID",
    "OtherPatientIDs",
    "AccessionNumber",
    "StudyID",
    "InstitutionName",
    "StationName",
    "DeviceSerialNumber",
)
# Many of the files that show what encodings there are are secondary captures.
EVERYTHING = ScanOptions(include_unannotated=True, allow_burned_in=True)
# Registered by the standard: they say what something is, not whose it is.
STANDARD_UIDS = "1.2.840.10008."


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The output of one run over everything, and what it printed."""
    output = tmp_path_factory.mktemp("all") / "all.h5"
    options = ["--include-unannotated", "--allow-burned-in", "--size", "256", "256"]
    options += ["--hash-paths"]
    result = CliRunner().invoke(main, ["convert", str(shared_data), "-o", str(output), *options])
    return output, result


def test_everything_in_one_tree_converts(run: tuple[Path, Result]) -> None:
    """The status says that something was rejected; the file is sound."""
    output, result = run
    assert result.exit_code == 1, result.output
    assert verify_file(output).is_sound


def test_no_file_is_lost(shared_data: Path) -> None:
    """Each is an image, an annotation, or in the list with a reason."""
    cohort = scan_cohort(shared_data, options=EVERYTHING)
    used = {os.fsdecode(path) for path in cohort.slices.path.tolist()}
    drawn = {os.fsdecode(path) for path in cohort.annotations.path.tolist()}
    listed = {problem.path for problem in cohort.problems}

    files = {
        path.relative_to(shared_data).as_posix()
        for path in shared_data.rglob("*")
        if path.is_file()
    }
    links = {name for name in files if name.endswith("/link.csv")}
    assert files - used - drawn - listed - links == set()


def test_images_that_pydicom_reads_are_in_the_file(
    run: tuple[Path, Result], shared_data: Path
) -> None:
    """What is rejected is what pydicom does not decode either, or a second copy."""
    cohort = scan_cohort(shared_data, options=EVERYTHING)
    scanned = len(cohort.slices)
    with open_dataset(run[0]) as dataset:
        converted = len(dataset)
        undecoded = sum(p.reason == Reason.UNDECODABLE_PIXELS for p in dataset.rejected)
    rejected = [p for p in cohort.problems if p.is_rejection]

    assert converted + undecoded == scanned
    for problem in rejected:
        if problem.reason in (Reason.DUPLICATE, Reason.CONTOUR_WITHOUT_IMAGE):
            continue
        if problem.reason in (Reason.ANNOTATION_WITHOUT_IMAGES, Reason.AMBIGUOUS_IMAGE):
            continue
        assert not can_decode(shared_data / problem.path), problem


def test_copies_that_are_called_repeated_show_the_same_image(shared_data: Path) -> None:
    """What is harmless loses nothing: pydicom decodes copy and kept image to equal pixels."""
    root = shared_data / "transfer_syntax"
    cohort = scan_cohort(root, options=EVERYTHING)
    uids, paths = cohort.slices.sop_instance_uid.tolist(), cohort.slices.path.tolist()
    kept = dict(zip(uids, paths, strict=True))
    compared = 0
    for path in (p.path for p in cohort.problems if p.reason == Reason.REPEATED):
        if not can_decode(root / path):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = pydicom.dcmread(root / path)
            image = pydicom.dcmread(root / os.fsdecode(kept[copy.SOPInstanceUID.encode()]))
            assert np.array_equal(copy.pixel_array, image.pixel_array), path
        compared += 1

    assert compared > 20


def can_decode(path: Path) -> bool:
    """Whether pydicom gives pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(pydicom.dcmread(path).pixel_array.size)
        except Exception:  # noqa: BLE001 broken files make pydicom raise anything
            return False


def identities(folder: Path) -> set[str]:
    """Every name, number, date and UID of every DICOM file that is long enough to be told from the
    numbers of a table: four characters, six digits.
    """
    found: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in folder.rglob("*"):
            if path.is_file():
                found |= set(identities_of(path))
    return {value for value in found if len(value) >= (6 if value.isdecimal() else 4)}


def identities_of(path: Path) -> Iterator[str]:
    """Of one file; nothing where it is no DICOM file."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        elements = list(dataset.iterall())
    except Exception:  # noqa: BLE001 broken files make pydicom raise anything
        return
    for element in elements:
        if element.VR in IDENTIFYING_VRS or element.keyword in IDENTIFYING_KEYWORDS:
            values = element.value if element.VM > 1 else [element.value]
            for value in values:
                text = str(value).strip()
                if text.strip("0") and not text.startswith(STANDARD_UIDS):
                    yield text


def texts_of(file: h5py.File) -> Iterator[str]:
    """All text of a converted file: names, attributes and columns."""
    names: list[str] = []
    file.visit(names.append)
    for name in ["/", *names]:
        yield name
        for key, value in file[name].attrs.items():
            yield key
            if not isinstance(value, np.ndarray) or value.dtype.kind in "SUO":
                yield str(value)
        if isinstance(file[name], h5py.Dataset) and file[name].dtype.kind in "SO":
            yield from (
                value.decode("utf-8", "replace") for value in np.unique(file[name][()]).tolist()
            )


def test_nobody_is_named(run: tuple[Path, Result], shared_data: Path) -> None:
    """No name, number, date or UID of the input is in the file, its list or what was printed."""
    output, result = run
    with h5py.File(output) as file:
        text = "\n".join([*texts_of(file), result.output])
    words = set(re.split(r"[^\w.^ -]+|(?<=\W) | (?=\W)", text)) | set(re.findall(r"[\w.-]+", text))
    wanted = identities(shared_data)
    assert len(wanted) > 3000

    assert wanted & words == set()
    long = [value for value in wanted if len(value) >= 6]
    assert [value for value in long if value in text] == []
