"""A scan as tables: nothing is lost on the way, what may be edited may, and mistakes are told."""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.records import (
    AnnotationTable,
    Cohort,
    HeaderColumn,
    MarkTable,
    Problem,
    Reason,
    SliceTable,
)
from parallel_dicomseg.saved import is_saved_scan, load_scan, save_scan

WIDTHS = {
    "value_range": 2,
    "image_position_patient": 3,
    "image_orientation_patient": 6,
    "pixel_spacing": 2,
}
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

Edit = Callable[[list[dict[str, str]]], Any]


def slice_table(count: int, **columns: Any) -> SliceTable:
    """A SliceTable of `count` slices of one patient's one volume; `columns` replace what it has."""
    kinds = {"Bytes": "S1", "Int32": "i4", "Int64": "i8", "Float64": "f8"}
    made: dict[str, Any] = {}
    for field in fields(SliceTable):
        name, kind = field.name, str(field.type)
        shape = (count, WIDTHS[name]) if name in WIDTHS else (count,)
        made[name] = np.zeros(shape, kinds.get(kind) or kind.split(".")[1].rstrip("_]"))
    made["rows"] += 4
    made["columns"] += 5
    made["number_of_frames"] += 1
    made["bits_allocated"] += 16
    made["bits_stored"] += 12
    made["samples_per_pixel"] += 1
    made["path"] = np.array([f"P/{k}.dcm".encode() for k in range(count)], "S")
    made["patient_id"] = np.full(count, b"P1")
    made["image_orientation_patient"][:] = AXIAL
    made["image_position_patient"][:, 2] = np.arange(count)
    return SliceTable(**made | columns)


def cohort_of(slices: SliceTable, places: list[tuple[int, int]], **more: Any) -> Cohort:
    """A cohort of these slices with one ring per (slice, structure)."""
    places = sorted(places)
    table = AnnotationTable(
        slice=np.array([place[0] for place in places], np.int64),
        structure=np.array([place[1] for place in places], np.int32),
        layer=np.zeros(len(places), np.int32),
        kind=np.full(len(places), b"rtstruct"),
        path=np.full(len(places), b"P/rt.dcm"),
        offset=np.arange(len(places)) * 100,
        length=np.full(len(places), 100),
    )
    code = np.arange(len(slices), dtype=np.int32) % 2
    made = {
        "root": "/data",
        "source": "dicom",
        "include_unannotated": False,
        "structures": ("Heart", 'a "b",\n;c'),
        "nested": ((0, 1),),
        "slices": slices,
        "annotations": table,
        "headers": {"EchoTime": HeaderColumn(np.array([b"", b"1.50\\2"]), code)},
        "found_by": {"reference": 2},
        "problems": (Problem("P/x.txt", Reason.STRAY_FILE, "a, b"),),
    }
    return Cohort(**made | more)


def assert_same(one: Cohort, other: Cohort) -> None:
    """Equal in every field of every record, NaN equal to NaN."""
    for name in ("root", "source", "include_unannotated", "structures", "nested", "found_by"):
        assert getattr(one, name) == getattr(other, name)
    assert one.problems == other.problems
    for name in ("slices", "annotations", "marks"):
        table, twin = getattr(one, name), getattr(other, name)
        for field in fields(table):
            left, right = getattr(table, field.name), getattr(twin, field.name)
            np.testing.assert_array_equal(left, right, err_msg=field.name)
            assert left.dtype.kind == right.dtype.kind
            assert left.dtype.kind == "S" or left.dtype == right.dtype
    assert list(one.headers) == list(other.headers)
    for keyword in one.headers:
        assert header(one, keyword) == header(other, keyword)


def header(cohort: Cohort, keyword: str) -> list[bytes]:
    """An attribute's value of every image."""
    column = cohort.headers[keyword]
    return [bytes(value) for value in column.values[column.code]]


def edit(folder: Path, name: str, change: Edit) -> None:
    """Read a table as a spreadsheet does, change its rows, write it again."""
    path = folder / name
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows, columns = list(reader), list(reader.fieldnames or ())
    changed = change(rows)
    rows = rows if changed is None else changed
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def set_cell(row: int, column: str, value: str) -> Edit:
    """An edit of one cell."""

    def change(rows: list[dict[str, str]]) -> None:
        rows[row][column] = value

    return change


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved scan of four slices, each with a ring, all but the last of structure 0."""
    cohort = cohort_of(slice_table(4), [(0, 0), (1, 0), (2, 0), (3, 1)])
    save_scan(cohort, tmp_path / "scan")
    return tmp_path / "scan"


# --------------------------------------------------------------------------------- nothing is lost

text = st.binary(max_size=6).map(lambda raw: raw.rstrip(b"\0"))
number = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Cohorts with any text and numbers that a header may hold, in the order of a scan."""
    count = draw(st.integers(0, 4))
    listed = {name: st.lists(s, min_size=count, max_size=count) for name, s in COLUMNS.items()}
    columns = {name: draw(strategy) for name, strategy in listed.items()}
    places = st.tuples(st.integers(0, max(count - 1, 0)), st.integers(0, 1))
    slices = slice_table(
        count,
        study_instance_uid=np.array(columns["text"], "S6"),
        modality=np.array(columns["text"][::-1], "S6"),
        rescale_slope=np.array(columns["number"], np.float64),
        pixel_spacing=np.array([columns["number"], columns["number"][::-1]]).reshape(-1, 2),
        annotated=np.array(columns["mask"], np.uint64),
        instance_number=np.array(columns["integer"], np.int64),
        value_is_whole=np.array(columns["truth"], np.bool_),
    )
    rings = draw(st.lists(places, max_size=5)) if count else []
    code = np.array(columns["code"], np.int32)
    values = np.unique(np.array(["", *map(str, range(3))], "S"))
    return cohort_of(slices, rings, headers={"X": HeaderColumn(values, code)})


COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "text": text,
    "number": number,
    "mask": st.integers(0, 2**64 - 1),
    "integer": st.integers(-(2**63), 2**63 - 1),
    "truth": st.booleans(),
    "code": st.integers(0, 3),
}


@given(cohorts())
def test_a_saved_scan_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, cohort: Cohort
) -> None:
    """Every column of every record, to the last bit of every float."""
    folder = tmp_path_factory.mktemp("saved") / "scan"
    save_scan(cohort, folder)

    assert is_saved_scan(folder)
    assert_same(cohort, load_scan(folder))


def test_long_tables_are_read_whole(tmp_path: Path) -> None:
    """More rows than are read at a time, and not a multiple of that."""
    cohort = cohort_of(slice_table(2500), [(k, k % 2) for k in range(2500)])
    save_scan(cohort, tmp_path / "scan")

    assert_same(cohort, load_scan(tmp_path / "scan"))


def test_names_of_files_may_be_any_bytes(tmp_path: Path) -> None:
    """Paths that are no UTF-8, with quotes and line ends, come back as they were."""
    paths = np.array([b"a/\xff\xfe.dcm", b'"a",\r\nb', "größe".encode(), b"=1+1"])
    cohort = cohort_of(slice_table(4, path=paths), [(0, 0)], root=os.fsdecode(b"/data/\xff"))
    save_scan(cohort, tmp_path / "scan")

    assert_same(cohort, load_scan(tmp_path / "scan"))


def test_the_tables_open_in_pandas(saved: Path) -> None:
    """Every file is a plain CSV table with one row per thing and a column `id` where it counts."""
    pandas = pytest.importorskip("pandas")
    read = {
        path.stem: pandas.read_csv(path, dtype=str, keep_default_na=False)
        for path in saved.glob("*.csv")
    }

    assert set(read) == {"slices", "annotations", "marks", "headers", "problems", "series"}
    assert read["slices"].columns[0] == "id"
    assert read["slices"]["id"].tolist() == ["0", "1", "2", "3"]
    assert read["slices"]["image_position_patient_2"].tolist() == ["0.0", "1.0", "2.0", "3.0"]
    assert read["annotations"]["structure"].tolist()[:2] == ["Heart", "Heart"]
    assert read["headers"]["EchoTime"].tolist() == ["", "1.50\\2", "", "1.50\\2"]
    assert read["series"][["images", "images_with_annotation", "rows"]].values.tolist() == [
        ["4", "4", "4"]
    ]


def marked_cohort() -> Cohort:
    """Four slices, points on the first and two on the last."""
    marks = MarkTable(
        slice=np.array([0, 3, 3]),
        name=np.array([b"nodule-reader-1", 'Größe, "x"'.encode(), b"non-nodule-reader-2"]),
        points_column_row=np.array([[1.0, 2.0], [0.1 + 0.2, -1e300], [5.0, 1 / 3]]),
    )
    return cohort_of(slice_table(4), [(0, 0), (3, 1)], marks=marks)


def test_marks_come_back_and_go_with_their_slices(tmp_path: Path) -> None:
    """Names and numbers to the bit; rows may be deleted in any order, and slices with theirs."""
    cohort = marked_cohort()
    save_scan(cohort, tmp_path / "scan")
    assert_same(cohort, load_scan(tmp_path / "scan"))

    edit(tmp_path / "scan", "marks.csv", lambda rows: [rows[2], rows[0]])
    edit(tmp_path / "scan", "slices.csv", lambda rows: rows[1:])
    marks = load_scan(tmp_path / "scan").marks

    assert (marks.slice.tolist(), marks.name.tolist()) == ([2], [b"non-nodule-reader-2"])
    assert marks.points_column_row.tolist() == [[5.0, 1 / 3]]


@pytest.mark.parametrize("cell", ["", "nan", "inf", "x"])
def test_a_mark_without_a_place_is_told(tmp_path: Path, cell: str) -> None:
    """File, line and column of the first cell that is no finite number."""
    save_scan(marked_cohort(), tmp_path / "scan")
    edit(tmp_path / "scan", "marks.csv", set_cell(1, "row", cell))

    with pytest.raises(LayoutError, match=r"marks\.csv, line 3, column row: needs a finite number"):
        load_scan(tmp_path / "scan")


def test_nobody_else_may_read_it(saved: Path) -> None:
    """The tables name patients: folder 0700, files 0600, and cohort.json says so."""
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}

    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600}
    assert "identities" in json.loads((saved / "cohort.json").read_text())["note"]


def test_only_a_saved_scan_is_replaced_and_only_when_asked(saved: Path, tmp_path: Path) -> None:
    """A folder of somebody's is never touched; nothing half-written is left behind."""
    (tmp_path / "mine").mkdir()
    cohort = load_scan(saved)
    for folder, overwrite, message in (
        (saved, False, "exists; --overwrite replaces it"),
        (tmp_path / "mine", True, "mine exists$"),
        (tmp_path / "gone/scan", False, "gone: there is no such directory"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            save_scan(cohort, folder, overwrite=overwrite)
    save_scan(replace(cohort, source="other"), saved, overwrite=True)

    assert load_scan(saved).source == "other"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "scan"}
    assert not is_saved_scan(tmp_path / "mine")


# ------------------------------------------------------------------------------ what may be edited


def test_deleted_rows_take_their_annotations_with_them(saved: Path) -> None:
    """Slices 0 and 2 are gone, with rings and headers; the others keep theirs."""
    before = load_scan(saved)
    edit(saved, "slices.csv", lambda rows: [rows[1], rows[3]])
    after = load_scan(saved)

    assert after.slices.path.tolist() == [b"P/1.dcm", b"P/3.dcm"]
    assert after.annotations.slice.tolist() == [0, 1]
    assert after.annotations.structure.tolist() == [0, 1]
    assert after.annotations.offset.tolist() == before.annotations.offset[[1, 3]].tolist()
    assert header(after, "EchoTime") == [b"1.50\\2", b"1.50\\2"]


def test_rings_may_be_deleted(saved: Path) -> None:
    """A row of annotations.csv less is a ring less, and nothing else changes."""
    edit(saved, "annotations.csv", lambda rows: rows[1:])
    after = load_scan(saved)

    assert len(after.slices) == 4
    assert after.annotations.slice.tolist() == [1, 2, 3]


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_the_order_of_rows_does_not_count(
    tmp_path_factory: pytest.TempPathFactory, slices: list[int], rings: list[int]
) -> None:
    """However a spreadsheet sorts the tables, the cohort is the same."""
    folder = tmp_path_factory.mktemp("sorted") / "scan"
    cohort = cohort_of(slice_table(4), [(0, 0), (1, 0), (2, 0), (3, 1)])
    save_scan(cohort, folder)
    edit(folder, "slices.csv", lambda rows: [rows[k] for k in slices])
    edit(folder, "headers.csv", lambda rows: [rows[k] for k in slices])
    edit(folder, "annotations.csv", lambda rows: [rows[k] for k in rings])

    assert_same(cohort, load_scan(folder))


def test_patients_may_be_renamed(saved: Path) -> None:
    """The new names decide the order, by number; a volume of two patients becomes two."""
    for row, name in enumerate(("P10", "P10", "P2", "P2")):
        edit(saved, "slices.csv", set_cell(row, "patient_id", name))
    after = load_scan(saved)

    assert after.slices.patient_id.tolist() == [b"P2", b"P2", b"P10", b"P10"]
    assert after.slices.path.tolist() == [b"P/2.dcm", b"P/3.dcm", b"P/0.dcm", b"P/1.dcm"]
    assert after.slices.volume.tolist() == [0, 0, 1, 1]
    assert after.annotations.slice.tolist() == [0, 1, 2, 3]
    assert after.annotations.structure.tolist() == [0, 1, 0, 0]


def test_volumes_may_be_joined_and_are_sorted_by_position(tmp_path: Path) -> None:
    """Two volumes with one number are one, in the order of their positions along the normal."""
    sagittal = np.tile((0.0, 1.0, 0.0, 0.0, 0.0, -1.0), (4, 1))  # normal along -x
    position = np.array([[5.0, 0, 0], [1.0, 0, 0], [3.0, 0, 0], [-2.0, 0, 0]])
    slices = slice_table(
        4,
        volume=np.array([0, 0, 1, 1], np.int32),
        image_orientation_patient=sagittal,
        image_position_patient=position,
    )
    save_scan(cohort_of(slices, [(2, 0)]), tmp_path / "scan")
    for row in (2, 3):
        edit(tmp_path / "scan", "slices.csv", set_cell(row, "volume", "0"))
    after = load_scan(tmp_path / "scan")

    assert after.slices.image_position_patient[:, 0].tolist() == [5.0, 3.0, 1.0, -2.0]
    assert after.slices.volume.tolist() == [0, 0, 0, 0]
    assert after.annotations.slice.tolist() == [1]


def test_the_split_may_be_chosen_by_hand(saved: Path) -> None:
    """A patient is on one side; two sides are refused with both lines."""
    edit(saved, "slices.csv", lambda rows: [row | {"split": "train"} for row in rows])
    assert load_scan(saved).slices.split.tolist() == [b"train"] * 4
    edit(saved, "slices.csv", set_cell(2, "split", "test"))
    with pytest.raises(LayoutError, match=r"line 4, .*split: .* in test here and in train in line"):
        load_scan(saved)


def test_columns_of_ones_own_and_byte_order_marks_do_no_harm(saved: Path) -> None:
    """What spreadsheets and their users add is ignored."""
    path = saved / "slices.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    noted = [f"{line},{'remark' if k == 0 else 'good, I think'!r}" for k, line in enumerate(lines)]
    path.write_text(
        "\ufeff" + "\n".join(line.replace("'good, I think'", '"good, I think"') for line in noted),
        encoding="utf-8",
    )
    edit(saved, "slices.csv", set_cell(0, "value_is_whole", "TRUE"))

    assert load_scan(saved).slices.value_is_whole.tolist() == [True, False, False, False]


# --------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("slices.csv", "id", "x7", "id: needs an integer from 0 to .*holds text of 2 character"),
        ("slices.csv", "id", "4", "column id: 4 was never given, the scan has 4 image"),
        ("slices.csv", "id", "0", "line 3, column id: 0 again, as in line 2"),
        ("slices.csv", "rows", "4.5", "rows: needs an integer .*holds a number with a fraction"),
        ("slices.csv", "rows", "0", "rows: needs an integer from 1 to 65535, holds an integer"),
        ("slices.csv", "columns", "", "columns: needs an integer from 1 to 65535, holds nothing"),
        ("slices.csv", "volume", "9" * 30, "volume: needs an integer"),
        ("slices.csv", "frame", "1", r"column frame: 1 of a file with 1 frame"),
        (
            "slices.csv",
            "rescale_slope",
            "one",
            "rescale_slope: needs a number, or nothing, holds t",
        ),
        ("slices.csv", "value_is_whole", "maybe", "needs true or false, holds text of 5 character"),
        (
            "slices.csv",
            "annotated",
            "3",
            r"annotated: needs a hexadecimal number \(0x5\), holds an",
        ),
        ("slices.csv", "split", "half", "split: needs one of train, validation, test, or nothing"),
        ("slices.csv", "path", "../../x", "path: needs a path below the data directory, holds te"),
        ("slices.csv", "path", "/etc/x", "path: needs a path below the data directory"),
        ("annotations.csv", "id", "17", "column id: 17 was never given"),
        ("annotations.csv", "structure", "Smith", "structure: needs one of the 2 structures of c"),
        ("annotations.csv", "path", "a/../../b", "path: needs a path below the data directory"),
        ("annotations.csv", "layer", "-1", "layer: needs an integer from 0"),
        ("headers.csv", "id", "0", "line 3, column id: 0 again"),
        ("problems.csv", "reason", "dunno", "reason: needs a reason as the scan wrote it, holds"),
    ],
)
def test_a_wrong_cell_is_named_without_its_value(
    saved: Path, name: str, column: str, value: str, message: str
) -> None:
    """File, line, column, what is needed and the kind of what is there."""
    row = 1 if name != "problems.csv" else 0
    edit(saved, name, set_cell(row, column, value))
    with pytest.raises(LayoutError, match=message) as raised:
        load_scan(saved)

    assert f"{name}, line {row + 2}" in str(raised.value)
    assert not value or len(value) < 3 or value not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("slices.csv", "", "there is no column 'id'"),
        ("slices.csv", "id,path\n0,a\n", "there is no column 'patient_id'"),
        ("slices.csv", "id,path\n0\n", "line 2: 1 cells, the header has 2"),
        ("slices.csv", "id,id\n", "line 1: a column is named twice"),
        ("headers.csv", "id\n0\n1\n2\n", "there is no row for id 3"),
        ("cohort.json", "{", "line 1 is not JSON"),
        ("cohort.json", "[]", "needs version 1 of a saved scan"),
        ("cohort.json", '{"version": 2}', "needs version 1"),
    ],
)
def test_a_wrong_file_is_named(saved: Path, name: str, content: str, message: str) -> None:
    """Cut off, emptied or of another version: said with the file."""
    (saved / name).write_text(content)
    with pytest.raises(LayoutError, match=f"{name}.*{message}"):
        load_scan(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("root", 5),
        ("source", None),
        ("include_unannotated", "yes"),
        ("structures", "Heart"),
        ("nested", [[0, 2]]),
        ("nested", [[0]]),
        ("found_by", {"number": -1}),
        ("images", True),
    ],
)
def test_a_wrong_setting_is_named(saved: Path, key: str, value: Any) -> None:
    """Each key of cohort.json must be what it was."""
    path = saved / "cohort.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LayoutError, match=f"cohort.json: {key} must be"):
        load_scan(saved)


def test_a_missing_file_is_named(saved: Path) -> None:
    """A folder that lost a table is not converted by halves."""
    (saved / "headers.csv").unlink()
    with pytest.raises(LayoutError, match=r"headers\.csv: cannot be read \(No such file"):
        load_scan(saved)
