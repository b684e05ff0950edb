"""Inspection: a finished file in a few numbers, for a person and for a program."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import FLAGS, ConvertOptions, Problem, Reason
from parallel_dicomseg.report.inspection import (
    Flagged,
    Inspection,
    SpacingCount,
    Spread,
    StructureSummary,
    ThicknessCount,
    describe,
    inspect_file,
    printable,
    render,
)

NAN = float("nan")
INT16, UINT8 = np.dtype("<i2"), np.dtype("u1")


@dataclass(frozen=True)
class SmallDataset:
    """Six slices of two patients in memory, with one of everything that an inspection counts."""

    path: Path
    shape: tuple[int, int, int] = (6, 20, 30)
    image_dtype: np.dtype[Any] = INT16
    mask_dtype: np.dtype[Any] = UINT8
    structures: tuple[str, ...] = ("i", "o", "never")
    attributes: dict[str, Any] = field(
        default_factory=lambda: {
            "format": "parallel_dicomseg",
            "format_version": 1,
            "source": "sunnybrook",
            "codec": "deflate",
            "rule": "center",
            "contour_origin": 0.5,
            "keep_identity": False,
        }
    )
    rejected: tuple[Problem, ...] = (
        Problem("a/1.dcm", Reason.UNREADABLE_FILE, "cannot be opened"),
        Problem("a/2.dcm", Reason.UNREADABLE_FILE, "cannot be opened"),
        Problem("b/x.txt", Reason.STRAY_FILE, "neither an image nor an outline"),
        Problem("b/c.txt", Reason.BAD_CONTOUR, "line 3 has one number, two are needed"),
    )
    stored_bytes: tuple[int, int] = (1800, 36)

    def column(self, name: str) -> NDArray[Any]:
        """One column of the table."""
        spacing = [[1.5, 1.25]] * 2 + [[NAN, NAN]] * 3 + [[1.0, 2.0]]
        annotated = [[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
        area = np.array([[10, 50, 0], [20, 0, 0], [40, 80, 0], [30, 0, 0], [0, 0, 0], [0, 60, 0]])
        columns: dict[str, Any] = {
            "patient_id": np.array([b"patient-1"] * 4 + [b"patient-2"] * 2),
            "series_index": np.array([0, 0, 1, 1, 2, 2], np.int32),
            "structure_annotated": np.array(annotated, bool),
            "area": area,
            "area_mm2": area * np.array(spacing).prod(axis=1, keepdims=True),
            "pixel_spacing": np.array(spacing),
            "slice_thickness": np.array([8.0, 8.0, 8.0, 8.0, NAN, 10.0]),
            "intensity": np.array([[-5.0, 90.0, 20.0, 3.0], [0.0, 1200.0, 80.0, 9.0]] * 3),
            "flags": np.array([0, 1 << 4 | 1 << 5, 1 << 5, 0, 1 << 1, 0], np.uint16),
        }
        return columns[name]


@pytest.fixture
def dataset(tmp_path: Path) -> SmallDataset:
    """The small dataset, with a file of 4321 bytes under its path."""
    path = tmp_path / "cohort.h5"
    path.write_bytes(bytes(4321))
    return SmallDataset(path)


def printed(inspection: Inspection, width: int = 80) -> str:
    """What `render` prints on a terminal of this width."""
    stream = io.StringIO()
    render(inspection, Console(file=stream, width=width))
    return stream.getvalue()


def test_every_number_is_counted_from_the_columns(dataset: SmallDataset) -> None:
    """Counts, ranges and ratios of the small dataset, one by one."""
    found = describe(dataset)

    assert found == Inspection(
        path=str(dataset.path),
        format_version=1,
        source="sunnybrook",
        slices=6,
        annotated_slices=5,
        patients=2,
        series=3,
        rows=20,
        columns=30,
        image_dtype="int16",
        mask_dtype="uint8",
        structures=(
            StructureSummary("i", 4, Spread(10, 25, 40), Spread(18.75, 28.125, 37.5)),
            StructureSummary("o", 3, Spread(50, 60, 80), Spread(93.75, 106.875, 120)),
            StructureSummary("never", 0, None, None),
        ),
        rule="center",
        contour_origin=0.5,
        codec="deflate",
        keep_identity=False,
        pixel_spacings=(
            SpacingCount(None, None, 3),
            SpacingCount(1.5, 1.25, 2),
            SpacingCount(1.0, 2.0, 1),
        ),
        slice_thicknesses=(
            ThicknessCount(8.0, 4),
            ThicknessCount(10.0, 1),
            ThicknessCount(None, 1),
        ),
        intensity=(-5.0, 1200.0),
        flagged={
            "empty-mask": Flagged(1, (4,)),
            "inner-not-inside-outer": Flagged(1, (1,)),
            "identical-contours": Flagged(2, (1, 2)),
        },
        rejected=(dataset.rejected[0], dataset.rejected[1], dataset.rejected[3]),
        reported=(dataset.rejected[2],),
        file_bytes=4321,
        image_bytes=1800,
        mask_bytes=36,
        image_compression=4.0,
        mask_compression=100.0,
    )


def test_an_inspection_is_json(dataset: SmallDataset) -> None:
    """Strict JSON without NaN, and the same again when it is read."""
    record = asdict(describe(dataset))

    text = json.dumps(record, allow_nan=False)

    assert json.loads(text)["flagged"]["identical-contours"] == {"slices": 2, "first_rows": [1, 2]}
    assert json.loads(text)["rejected"][2]["reason"] == "bad-contour"


def test_an_inspection_names_nobody(dataset: SmallDataset) -> None:
    """The patients' keys are counted, not shown."""
    inspection = describe(dataset)

    assert "patient-1" not in json.dumps(asdict(inspection)) + printed(inspection)


def test_a_file_without_any_known_value_is_described(dataset: SmallDataset) -> None:
    """No spacing, no intensity, no outline, nothing stored: None, and a text all the same."""

    class Empty(SmallDataset):
        def column(self, name: str) -> NDArray[Any]:
            values = super().column(name)
            if name == "structure_annotated":
                return np.zeros_like(values)
            return np.full_like(values, NAN) if values.dtype.kind == "f" else values

    found = describe(Empty(dataset.path, stored_bytes=(0, 0), rejected=()))

    assert found.intensity is None
    assert found.image_compression is None
    assert found.pixel_spacings == (SpacingCount(None, None, 6),)
    assert [s.area for s in found.structures] == [None] * 3
    assert "rejected: nothing" in printed(found)


def test_print_shows_what_is_there(dataset: SmallDataset) -> None:
    """All the numbers that a person looks for, in words."""
    text = " ".join(printed(describe(dataset)).split())

    for words in (
        "version 1, from sunnybrook, identity removed",
        "6 of 20 x 30, 5 annotated",
        "2 with 3 series",
        "int16, values -5 to 1200",
        "uint8, rule center, contour origin 0.5",
        "deflate, images 4.0 times smaller, masks 100.0 times smaller",
        "unknown (3), 1.5 x 1.25 mm (2), 1 x 2 mm (1)",
        "8 mm (4), 10 mm (1), unknown (1)",
        "i 4 pixels 10 25 40 mm2 18.8 28.1 37.5",
        "o 3 pixels 50 60 80 mm2 93.8 107 120",
        "never 0 pixels - - - mm2 - - -",
        "inner-not-inside-outer 1 1",
        "identical-contours 1, 2 2",
        "rejected: 3",
        "unreadable-file: 2",
        "a/2.dcm: cannot be opened",
        "b/c.txt: line 3 has one number, two are needed",
        "reported beside it: 1",
    ):
        assert words in text


def crowded(dataset: SmallDataset) -> Inspection:
    """An inspection with many, long and odd values."""
    found = describe(dataset)
    problems = tuple(
        Problem(f"[bold]{'folder/' * 12}{k}.dcm", Reason.UNDECODABLE_PIXELS, "[/] wrong" * 9)
        for k in range(14)
    )
    areas = Spread(1.0, 123_456.0, 1_048_576.0)
    return replace(
        found,
        slices=12_345_678,
        structures=tuple(
            StructureSummary(f"[red]ROI {'very long name ' * 4}{k}", 1_234_567, areas, areas)
            for k in range(3)
        ),
        pixel_spacings=tuple(SpacingCount(0.1 + k / 7, 0.2 + k / 7, 10**k) for k in range(7)),
        flagged={name: Flagged(10**6, tuple(range(10**6, 10**6 + 8))) for name in FLAGS},
        rejected=problems,
    )


@pytest.mark.parametrize("width", [80, 100, 200])
def test_print_fits_its_width(dataset: SmallDataset, width: int) -> None:
    """No line is longer than the terminal, whatever the names and numbers."""
    lines = printed(crowded(dataset), width).splitlines()

    assert max(map(len, lines)) <= width


def test_print_cuts_nothing_off(dataset: SmallDataset) -> None:
    """Long texts are folded, square brackets are no markup, and what is left out is counted."""
    text = printed(crowded(dataset))
    folded = "".join(text.split())

    assert "…" not in text
    assert f"[bold]{'folder/' * 12}0.dcm:[/]wrong[/]wrong" in folded
    assert "[red]ROI" in folded
    assert "and 4 more" in text
    assert "3 more" in " ".join(text.split())
    assert "1,048,576" in text
    assert "1,234,567" in text


def test_names_of_any_bytes_are_printed(dataset: SmallDataset) -> None:
    """Bytes that are not UTF-8, line ends and steering codes come out as escapes."""
    odd = "caf\udce9\n\x1b[2J/ü.dcm"
    structure = StructureSummary("i\x1b", 0, None, None)
    found = replace(
        describe(dataset),
        path=odd,
        structures=(structure,),
        rejected=(Problem(odd, Reason.NOT_DICOM, odd),),
    )
    shown = printed(found, 200).encode().decode()

    assert shown.count(r"caf\udce9\n\x1b[2J/ü.dcm") == 3
    assert r"i\x1b" in shown
    assert "\x1b" not in shown


@given(st.text(), st.binary())
def test_printable_text_is_one_line_and_plain_text_stays(text: str, name: bytes) -> None:
    """Any text and any name fit UTF-8 and one line; what prints already is not touched."""
    for one in (text, os.fsdecode(name)):
        shown = printable(one)

        assert shown.encode().decode() == shown
        assert shown.isprintable()
        assert one == shown or not one.isprintable()


def test_spacings_are_shown_as_written(dataset: SmallDataset) -> None:
    """Seven digits, as DICOM writers give: two spacings that differ in the last are two."""
    spacings = (SpacingCount(1.367188, 1.367188, 2), SpacingCount(1.367189, 1.367189, 1))
    text = printed(replace(describe(dataset), pixel_spacings=spacings))

    assert "1.367188 x 1.367188 mm (2), 1.367189 x 1.367189 mm (1)" in " ".join(text.split())


def test_print_is_plain_text_elsewhere(dataset: SmallDataset) -> None:
    """Into a file or a pipe go no escape sequences, and an ASCII terminal gets ASCII."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")

    render(describe(dataset), Console(file=stream, width=80))
    stream.flush()

    assert b"\x1b" not in raw.getvalue()
    assert b"inner-not-inside-outer" in raw.getvalue()


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    """The message names the file."""
    path = tmp_path / "other.h5"
    path.write_bytes(b"no HDF5 file")

    with pytest.raises(LayoutError, match=r"other\.h5 is no readable HDF5 file"):
        inspect_file(path)
    with pytest.raises(LayoutError, match=r"missing\.h5: no such file"):
        inspect_file(tmp_path / "missing.h5")


def test_the_real_cohort_is_described(shared_data: Path, tmp_path: Path) -> None:
    """Five patients, 96 slices, three spacings, and the copied outlines are flagged."""
    path = tmp_path / "real.h5"
    cohort = scan_cohort(shared_data / "sunnybrook_arterys" / "final_data")
    convert_cohort(cohort, path, options=ConvertOptions(scheduler="synchronous"))

    found = inspect_file(path)

    assert (found.slices, found.rows, found.columns) == (96, 256, 256)
    assert (found.patients, found.series) == (5, 5)
    assert {s.name: s.annotated for s in found.structures} == {"i": 96, "o": 46}
    assert {(s.between_rows, s.slices) for s in found.pixel_spacings} == {
        (1.367188, 36),
        (1.2891, 20),
        (1.3672, 40),
    }
    assert {(t.thickness, t.slices) for t in found.slice_thicknesses} == {(10.0, 36), (8.0, 60)}
    assert found.flagged["identical-contours"].slices == 18
    assert found.flagged["inner-not-inside-outer"].slices == 9
    assert found.rejected == ()
    assert found.file_bytes == path.stat().st_size
    assert found.image_compression is not None
    assert 2 < found.image_compression < 4
    assert "96 of 256 x 256, 96 annotated" in printed(found)
