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
import written
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from parallel_dicomseg.deidentify import Policy
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.records import FLAGS, Problem, Reason
from parallel_dicomseg.report.inspection import (
    Flagged,
    Inspection,
    SeriesValues,
    SizeCount,
    SpacingCount,
    SplitCount,
    Spread,
    StructureSummary,
    ThicknessCount,
    describe,
    inspect_file,
    printable,
    render,
    render_tag,
    tag_values,
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
            "format_version": 2,
            "source": "sunnybrook",
            "codec": "deflate",
            "rule": "center",
            "contour_origin": 0.5,
            "resampled": True,
            "keep_identity": False,
            "pseudonyms": "keyed-hash",
            "dates": "shifted",
            "hashed_paths": True,
        }
    )
    rejected: tuple[Problem, ...] = (
        Problem("a/1.dcm", Reason.UNREADABLE_FILE, "cannot be opened"),
        Problem("a/2.dcm", Reason.UNREADABLE_FILE, "cannot be opened"),
        Problem("b/x.txt", Reason.STRAY_FILE, "neither an image nor an outline"),
        Problem("b/c.txt", Reason.BAD_CONTOUR, "line 3 has one number, two are needed"),
    )
    stored_bytes: tuple[int, int] = (1800, 36)
    samples: int = 1
    decoders: dict[str, str] = field(
        default_factory=lambda: {"1.2.840.10008.1.2.4.50": "pylibjpeg 2"}
    )

    def columns(self, group: str = "table") -> tuple[str, ...]:
        """No attribute varies."""
        return ()

    def series_header(self, series: int) -> dict[str, Any]:
        """Nothing is known of any series."""
        return {}

    def column(self, name: str, group: str = "table") -> NDArray[Any]:
        """One column of the table, of /series, /volumes or /marks."""
        spacing = [[1.5, 1.25]] * 2 + [[NAN, NAN]] * 3 + [[1.0, 2.0]]
        annotated = [[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
        area = np.array([[10, 50, 0], [20, 0, 0], [40, 80, 0], [30, 0, 0], [0, 0, 0], [0, 60, 0]])
        columns: dict[str, Any] = {
            "patient_id": np.array([b"patient-1"] * 4 + [b"patient-2"] * 2),
            "series_index": np.array([0, 0, 1, 1, 2, 2], np.int32),
            "structure_annotated": np.array(annotated, bool) | [False, False, True],
            "outlined": np.array(annotated, bool),
            "cropped": np.array([[0, 0, 0]] * 4 + [[5, 0, 0], [0, 2, 0]]),
            "split": np.array([b"train"] * 4 + [b"test"] * 2),
            "source_pixel_spacing": np.array([[0.7, 0.7]] * 4 + [[0.5, 0.5]] * 2),
            "source_rows": np.array([20] * 5 + [40]),
            "source_columns": np.array([30] * 5 + [50]),
            "modality": np.array([b"MR", b"CT", b"MR"]),
            "regular": np.array([True, False, True]),
            "slice_distance": np.array([8.0, np.nan, 10.0]),
            "area": area,
            "area_mm2": area * np.array(spacing).prod(axis=1, keepdims=True),
            "pixel_spacing": np.array(spacing),
            "slice_thickness": np.array([8.0, 8.0, 8.0, 8.0, NAN, 10.0]),
            "intensity": np.array([[-5.0, 90.0, 20.0, 3.0], [0.0, 1200.0, 80.0, 9.0]] * 3),
            "slice": np.array([2, 2, 5]),
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
        format_version=2,
        source="sunnybrook",
        slices=6,
        annotated_slices=6,
        outlined_slices=5,
        patients=2,
        series=3,
        volumes=3,
        irregular_volumes=1,
        slice_distance=Spread(8, 9, 10),
        split={"train": SplitCount(1, 4), "test": SplitCount(1, 2)},
        rows=20,
        columns=30,
        samples=1,
        modalities={"MR": 2, "CT": 1},
        image_dtype="int16",
        mask_dtype="uint8",
        structures=(
            StructureSummary("i", 4, 4, Spread(10, 25, 40), Spread(18.75, 28.125, 37.5)),
            StructureSummary("o", 3, 3, Spread(50, 60, 80), Spread(93.75, 106.875, 120)),
            StructureSummary("never", 6, 0, None, None),
        ),
        rule="center",
        contour_origin=0.5,
        codec="deflate",
        keep_identity=False,
        pseudonyms="keyed-hash",
        dates="shifted",
        hashed_paths=True,
        decoders={"1.2.840.10008.1.2.4.50": "pylibjpeg 2"},
        resampled=True,
        cropped_pixels=7,
        marks=3,
        source_pixel_spacings=(SpacingCount(0.7, 0.7, 4), SpacingCount(0.5, 0.5, 2)),
        source_sizes=(SizeCount(20, 30, 5), SizeCount(40, 50, 1)),
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
        def column(self, name: str, group: str = "table") -> NDArray[Any]:
            values = super().column(name, group)
            if name in {"structure_annotated", "outlined", "split"}:
                return np.zeros_like(values)
            return np.full_like(values, NAN) if values.dtype.kind == "f" else values

    found = describe(Empty(dataset.path, stored_bytes=(0, 0), rejected=()))

    assert found.intensity is None
    assert found.image_compression is None
    assert found.pixel_spacings == (SpacingCount(None, None, 6),)
    assert [s.area for s in found.structures] == [None] * 3
    assert (found.slice_distance, found.split) == (None, {})
    assert "rejected: nothing" in printed(found)


def test_print_shows_what_is_there(dataset: SmallDataset) -> None:
    """All the numbers that a person looks for, in words."""
    text = " ".join(printed(describe(dataset)).split())

    for words in (
        "version 2, from sunnybrook",
        "removed: keyed hashes, dates shifted, paths hashed",
        "6 of 20 x 30, 6 annotated, 5 drawn on",
        "2 with 3 series (MR 2, CT 1)",
        "3, slices 8 to 10 mm apart, 1 with gaps or without positions",
        "train 1 (4 slices), test 1 (2 slices)",
        "was 0.7 x 0.7 mm (4), 0.5 x 0.5 mm (2)",
        "size was 20 x 30 (5), 40 x 50 (1)",
        "cropped 7 pixels of masks",
        "1.2.840.10008.1.2.4.50 by pylibjpeg 2",
        "int16, values -5 to 1200",
        "uint8, rule center, contour origin 0.5",
        "deflate, images 4.0 times smaller, masks 100.0 times smaller",
        "unknown (3), 1.5 x 1.25 mm (2), 1 x 2 mm (1)",
        "8 mm (4), 10 mm (1), unknown (1)",
        "i 4 4 pixels 10 25 40 mm2 18.8 28.1 37.5",
        "o 3 3 pixels 50 60 80 mm2 93.8 107 120",
        "never 6 0 pixels - - - mm2 - - -",
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
            StructureSummary(
                f"[red]ROI {'very long name ' * 4}{k}", 1_234_567, 1_234_567, areas, areas
            )
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
    structure = StructureSummary("i\x1b", 0, 0, None, None)
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten slices of two series, by the writer itself."""
    path = tmp_path_factory.mktemp("inspection") / "small.h5"
    written.write(path, headers=written.headers())
    return path


def test_a_written_file_is_described(small: Path) -> None:
    """Patients, series, volumes and parts of the split as they were written."""
    found = inspect_file(small)

    assert (found.slices, found.rows, found.columns) == (10, 40, 56)
    assert (found.patients, found.series, found.volumes) == (2, 2, 3)
    assert found.irregular_volumes == 1
    assert found.split == {"train": SplitCount(1, 5), "test": SplitCount(1, 5)}
    assert found.modalities == {"CT": 1, "MR": 1}
    assert {s.name: (s.annotated, s.outlined) for s in found.structures} == {
        "i": (10, 10),
        "o": (10, 10),
    }
    assert found.flagged == {"gap-before-slice": Flagged(1, (9,))}
    assert found.source_pixel_spacings == found.pixel_spacings == (SpacingCount(1.5, 1.25, 10),)
    assert found.file_bytes == small.stat().st_size
    text = " ".join(printed(found).split())
    assert "removed: running numbers, dates dropped" in text
    assert "size was" not in text


def test_colour_and_kept_identity_are_said(tmp_path: Path) -> None:
    """Samples count in the size and in the compression."""
    path = tmp_path / "x.h5"
    plan = written.layout(samples=3, codec="none")
    written.write(path, plan=plan, identity=Policy(keep_identity=True))

    found = inspect_file(path)

    assert (found.samples, found.image_compression) == (3, 1.0)
    text = " ".join(printed(found).split())
    assert "10 of 40 x 56 x 3 samples" in text
    assert "identity kept" in text


@pytest.mark.parametrize("tag", ["EchoTime", "echotime", "0018,0081", "(0018, 0081)", "00180081"])
def test_a_tag_is_found_however_it_is_written(small: Path, tag: str) -> None:
    """Keyword in any case, or number; a series without it says so."""
    found = tag_values(small, tag)

    assert (found.keyword, found.place) == ("EchoTime", "headers")
    assert found.series == (
        SeriesValues(0, "patient-1", "CT", 5, 5, (), 0, None, None),
        SeriesValues(1, "patient-2", "MR", 5, 0, (("2.5", 5),), 1, 2.5, 2.5),
    )


def test_what_varies_has_a_range(small: Path) -> None:
    """Each series its own; a person sees the range, a program the values."""
    found = tag_values(small, "SliceLocation")

    assert [(s.minimum, s.maximum, s.distinct) for s in found.series] == [
        (0.5, 4.5, 5),
        (5.5, 9.5, 5),
    ]
    assert found.series[0].values[0] == ("0.5", 1)
    stream = io.StringIO()
    render_tag(found, Console(file=stream, width=80))
    assert "5.5 to 9.5, 5 values" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= 80
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["keyword"] == "SliceLocation"


def test_codes_are_listed_and_columns_of_the_table_are_found(small: Path) -> None:
    """Values of several parts are one value; geometry and pseudonyms are in the table."""
    image_type, spacing = tag_values(small, "ImageType"), tag_values(small, "PixelSpacing")
    instance = tag_values(small, "SOPInstanceUID")

    assert image_type.series[0].values == (("ORIGINAL\\PRIMARY", 5),)
    assert image_type.series[0].minimum is None
    assert spacing.place == "table/pixel_spacing"
    assert spacing.series[1].values == (("1.5\\1.25", 5),)
    assert (spacing.series[1].minimum, spacing.series[1].maximum) == (1.25, 1.5)
    assert instance.series[0].values[0] == ("instance-01", 1)
    stream = io.StringIO()
    render_tag(instance, Console(file=stream, width=120))
    assert "1 more" in stream.getvalue()


def test_unknown_tags_are_told_with_what_is_there(small: Path) -> None:
    """A misspelt keyword, and one that no image of the file has."""
    with pytest.raises(
        ConfigurationError, match=r"'EchTime' is no DICOM keyword .* is it EchoTime"
    ):
        tag_values(small, "EchTime")
    with pytest.raises(LayoutError, match=r"small\.h5: no image has FlipAngle; .* EchoTime, Image"):
        tag_values(small, "FlipAngle")
