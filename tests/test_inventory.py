"""What a scan tells: counts of everything, decoders that are missing, nobody's identity."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.phantoms import make_rtstruct_series, rectangle
from parallel_dicomseg.records import Cohort, Problem, Reason, ScanOptions
from parallel_dicomseg.terminal import (
    NAMED_VALUES,
    Extent,
    Inventory,
    print_json,
    render_inventory,
    take_inventory,
)

SQUARE = rectangle(3.2, 4.1, 12.4, 15.3)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Two patients with three series of 3, 4 and 5 slices; Heart in all, Lung in one."""
    root = tmp_path_factory.mktemp("tree")
    cases: list[dict[str, Any]] = [
        {"patient_id": "SMITH", "slice_distance": 2.5, "modality": "CT"},
        {"patient_id": "SMITH", "slice_distance": 4.0, "modality": "MR"},
        {"patient_id": "JONES", "slice_distance": 4.0, "modality": "CT"},
    ]
    for k, case in enumerate(cases):
        structures = {"Heart": [(1, SQUARE), (2, SQUARE)]}
        if k == 2:
            structures["Lung"] = [(0, SQUARE)]
        shape = (3 + k, 20, 20 + 4 * k)
        make_rtstruct_series(
            root / f"s{k}", shape=shape, structures=structures, seed=k, pixel_spacing=(1, 2), **case
        )
    (root / "notes.txt").write_text("x")
    return scan_cohort(root, options=ScanOptions(split=(0.5, 0.5)))


def fact(text: str, name: str) -> str:
    """A line of the facts by its name."""
    found = re.search(rf"^{name} +(.*)$", text, re.MULTILINE)
    assert found, f"{name} is not in\n{text}"
    return found[1]


def test_everything_is_counted(cohort: Cohort) -> None:
    """Patients, series, volumes, images, and what they are by kind."""
    found = take_inventory(cohort)

    assert (found.patients, found.series, found.volumes, found.images) == (2, 3, 3, 12)
    assert found.modalities == {"CT": 8, "MR": 4}
    assert found.sizes == {"20 x 28": 5, "20 x 24": 4, "20 x 20": 3}
    assert found.pixel_spacings == {"1 x 2 mm": 12}
    assert found.slice_distances == {"4 mm": 2, "2.5 mm": 1}
    assert found.transfer_syntaxes == {"Explicit VR Little Endian": 12}
    assert found.missing_decoders == {}
    assert found.structures == {"Heart": Extent(6, 3, 2), "Lung": Extent(1, 1, 1)}
    assert found.looked_for == {"Heart": 12, "Lung": 5}
    assert found.found_by == {"reference": 4}
    assert sum(part.patients for part in found.split.values()) == 2
    assert sum(part.images for part in found.split.values()) == 12
    assert found.split["test"] == Extent(0, 0, 0)
    assert (found.annotations_without_images, found.images_without_annotation) == (0, 0)
    assert [problem.reason for problem in found.problems] == [Reason.STRAY_FILE]


def test_a_person_reads_what_a_program_reads(
    cohort: Cohort, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers in words and as JSON."""
    inventory = take_inventory(cohort)
    text = render_inventory(inventory)
    print_json(inventory)
    found = json.loads(capsys.readouterr().out)

    assert found["structures"]["Heart"] == {"images": 6, "volumes": 3, "patients": 2}
    assert fact(text, "patients") == str(found["patients"])
    assert fact(text, "modalities") == "CT: 8, MR: 4"
    assert fact(text, "slice distances") == "4 mm: 2, 2.5 mm: 1"
    assert fact(text, "Heart").split() == ["6", "3", "2", "12"]
    assert fact(text, "Lung").split() == ["1", "1", "1", "5"]
    assert fact(text, "annotations found by") == "reference: 4"
    assert "not decodable here" not in text
    assert "stray-file: 1 (harmless)" in text
    assert "  notes.txt: " in text


def test_nobody_is_named(cohort: Cohort, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither patients nor UIDs, in words or as JSON."""
    inventory = take_inventory(cohort)
    print_json(inventory)
    text = capsys.readouterr().out + render_inventory(inventory)
    slices = cohort.slices
    names = {*slices.patient_id.tolist(), *slices.sop_instance_uid.tolist()}
    names |= {*slices.series_instance_uid.tolist(), *slices.study_instance_uid.tolist()}

    assert len(names) > 12
    assert not [name for name in names if os.fsdecode(name) in text]


def test_missing_decoders_are_told_before_anything_is_converted(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer syntax by name, and what to install; one that nobody knows by its UID."""
    from parallel_dicomseg.dicom import decoders

    monkeypatch.setattr(decoders, "_is_importable", lambda package: package != "imagecodecs")
    uids = np.full(12, b"1.2.840.10008.1.2.4.90")
    uids[3:5] = b"1.2.3.4"
    found = take_inventory(replace(cohort, slices=replace(cohort.slices, transfer_syntax_uid=uids)))
    text = render_inventory(found)

    assert found.transfer_syntaxes == {"JPEG 2000 Lossless": 10, "1.2.3.4": 2}
    assert set(found.missing_decoders) == {"JPEG 2000 Lossless", "1.2.3.4"}
    assert re.search(
        r'^not decodable here +JPEG 2000 Lossless: pip install "parallel_dicomseg',
        text,
        re.MULTILINE,
    )


def test_images_without_a_place_are_unknown_and_not_wrong(cohort: Cohort) -> None:
    """No spacing, position or modality; a volume of one slice; nothing drawn at all."""
    slices = replace(
        cohort.slices,
        pixel_spacing=np.full((12, 2), np.nan),
        image_position_patient=np.full((12, 3), np.nan),
        modality=np.full(12, b""),
        volume=np.array([0] * 11 + [1], np.int32),
    )
    nothing = cohort.annotations.take(np.zeros(0, np.int64))
    found = take_inventory(replace(cohort, slices=slices, annotations=nothing, structures=()))
    text = render_inventory(found)

    assert found.pixel_spacings == {"unknown": 12}
    assert found.slice_distances == {"unknown": 1, "single slice": 1}
    assert fact(text, "modalities") == "unknown: 12"
    assert "structures  none" in text


def test_problems_are_listed_by_reason_and_no_longer_than_can_be_read(cohort: Cohort) -> None:
    """The first ten of each reason; names of any bytes cannot steer the terminal."""
    many = [Problem(f"{k:02}.txt", Reason.STRAY_FILE, "x") for k in range(14)]
    rejected = [
        Problem("a\x1b[2J", Reason.CONTOUR_WITHOUT_IMAGE, "y"),
        Problem("b", Reason.ANNOTATION_WITHOUT_IMAGES, "z"),
        Problem("c", Reason.IMAGES_WITHOUT_ANNOTATION, "z"),
    ]
    found = take_inventory(replace(cohort, problems=(*many, *rejected)))
    lines = render_inventory(found).splitlines()

    assert (found.annotations_without_images, found.images_without_annotation) == (2, 1)
    assert "problems  17" in lines
    assert "stray-file: 14 (harmless)" in lines
    assert "contour-without-image: 1" in lines
    assert "  09.txt: x" in lines
    assert "  10.txt: x" not in lines
    assert "  and 4 more, see --json" in lines
    assert "\x1b" not in "".join(lines)


def test_long_lists_are_cut_for_a_person_only(cohort: Cohort) -> None:
    """Many sizes: the first few and how many more."""
    sizes = {f"{k} x {k}": 1 for k in range(NAMED_VALUES + 3)}
    found: Inventory = replace(take_inventory(cohort), sizes=sizes)

    assert fact(render_inventory(found), "sizes").endswith(" and 3 more")


def test_real_data_is_counted_as_its_description(shared_data: Path) -> None:
    """Counts of the whole of the real data agree with a plain count of the cohort's columns."""
    cohort = scan_cohort(shared_data, options=ScanOptions(include_unannotated=True))
    found = take_inventory(cohort)
    slices = cohort.slices
    places = {
        (int(structure), int(row))
        for structure, row in zip(
            cohort.annotations.structure, cohort.annotations.slice, strict=True
        )
    }

    assert found.images == len(slices)
    assert found.modalities == dict(Counter(slices.modality.astype(str).tolist()))
    for structure, name in enumerate(cohort.structures):
        rows = [row for bit, row in places if bit == structure]
        assert found.structures[name].images == len(rows)
        assert found.structures[name].patients == len({slices.patient_id[row] for row in rows})
    assert found.structures["GTV_Mass_CT"] == Extent(47, 2, 2)
    assert found.structures["i"] == Extent(96, 10, 5)
    assert sum(found.slice_distances.values()) == found.volumes
