"""A scan as a folder of tables that a spreadsheet and pandas open, to be edited and converted.

    slices.csv       one row per image, one column per field of the SliceTable, first an `id`
    annotations.csv  one row per ring or frame; `id` is the image that it lies on
    marks.csv        one row per point that somebody set; `column` and `row` in pixels, from 0
    headers.csv      one row per image: the DICOM attributes that are kept, by keyword
    problems.csv     what does not belong together
    series.csv       what there is per series, to look at; never read back
    cohort.json      the data directory, the structures and how the scan was made

The tables hold patient identities, as the images do: the folder is made with mode 0700 and the
files with mode 0600.

What may be edited: rows of slices.csv may be deleted (what is drawn on them goes with them), and
`patient_id`, `split` and everything else may be changed; rows of annotations.csv, marks.csv and
problems.csv may be deleted; `root` in cohort.json is the data directory, wherever it lies now.
Columns of one's own are ignored. The order of rows does not count: images are sorted by patient in
natural order, then by `volume` and position, and volumes are numbered anew; a volume whose rows
name two patients becomes two. Read the tables as text (`pandas.read_csv(path, dtype=str,
keep_default_na=False)`), or identifiers such as 001 lose their zeros.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.geometry import normal_of
from parallel_dicomseg.private import open_private
from parallel_dicomseg.records import (
    AnnotationTable,
    Bytes,
    Cohort,
    HeaderColumn,
    Headers,
    Int32,
    Int64,
    MarkTable,
    Problem,
    Reason,
    SliceTable,
)
from parallel_dicomseg.sources.base import leaves_directory
from parallel_dicomseg.volumes import natural_key

VERSION = 1
SETTINGS, SLICES, ANNOTATIONS = "cohort.json", "slices.csv", "annotations.csv"
MARKS = "marks.csv"
HEADERS, PROBLEMS, SERIES = "headers.csv", "problems.csv", "series.csv"
_FILES = {SETTINGS, SLICES, ANNOTATIONS, MARKS, HEADERS, PROBLEMS, SERIES}
PARTS = ("", "train", "validation", "test")
_NOTE = "holds patient identities: keep it as you keep the images"

_WIDTHS = {
    "value_range": 2,
    "image_position_patient": 3,
    "image_orientation_patient": 6,
    "pixel_spacing": 2,
}
_TYPES: dict[str, Any] = {
    "Bytes": np.bytes_,
    "Int32": np.int32,
    "Int64": np.int64,
    "Float64": np.float64,
    "NDArray[np.bool_]": np.bool_,
    "NDArray[np.uint64]": np.uint64,
}
# Smallest and largest value of the integers that a conversion relies on.
_RANGES = {
    "id": (0, 2**63 - 1),
    "rows": (1, 65535),
    "columns": (1, 65535),
    "frame": (0, 2**31 - 2),
    "number_of_frames": (1, 2**31 - 1),
    "file_size": (0, 2**63 - 1),
    "pixel_offset": (-1, 2**63 - 1),
    "pixel_length": (-1, 2**63 - 1),
    "samples_per_pixel": (1, 3),
    "bits_allocated": (1, 64),
    "bits_stored": (1, 64),
    "pixel_representation": (0, 1),
    "volume": (0, 2**31 - 1),
    "layer": (0, 2**31 - 1),
}
_ROWS_AT_ONCE = 1024

_Columns = dict[str, list[str]]
"""Cells by the column's name, all of equal length."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_MASK = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class _Table:
    """A CSV file in memory, column by column."""

    name: str
    """The file's name, for messages."""
    lines: list[int]
    """(n,) the line of the file on which each row ends, from 1."""
    columns: dict[str, list[str]]
    """(n,) cells by the column's name."""

    def __len__(self) -> int:
        return len(self.lines)

    def cells(self, column: str) -> list[str]:
        """The cells of a column that must be there."""
        if column not in self.columns:
            raise LayoutError(f"{self.name}: there is no column {column!r}")
        return self.columns[column]

    def error(self, row: int, column: str, needed: str, cell: str) -> LayoutError:
        """A cell that is not what it must be; what it holds is told by its kind alone."""
        return LayoutError(
            f"{self.name}, line {self.lines[row]}, column {column}: needs {needed}, "
            f"holds {_kind(cell)}"
        )

    def parsed(self, column: str, parse: Callable[[str], Any], needed: str) -> list[Any]:
        """The values of a column; the first that is none is an error."""
        cells = self.cells(column)
        values: dict[str, Any] = {}  # most columns hold few different cells
        for row, cell in enumerate(cells):
            if cell not in values:
                try:
                    values[cell] = parse(cell)
                except ValueError:
                    raise self.error(row, column, needed, cell) from None
        return [values[cell] for cell in cells]


# --- writing -------------------------------------------------------------------------------------


def is_saved_scan(path: str | Path) -> bool:
    """Whether a folder looks like one that `save_scan` wrote, though a table may be missing."""
    return sum((Path(path) / name).is_file() for name in (SETTINGS, SLICES, ANNOTATIONS)) > 1


def check_target(directory: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that `save_scan` could not make or may not replace.

    Raises
    ------
    ConfigurationError
        It exists and may not be replaced, or there is no folder to make it in.
    """
    directory = Path(directory)
    if not directory.parent.is_dir():
        raise ConfigurationError(f"{directory.parent}: there is no such directory")
    if not directory.exists():
        return
    if not (is_saved_scan(directory) and overwrite):
        hint = "; --overwrite replaces it" if is_saved_scan(directory) else ""
        raise ConfigurationError(f"{directory} exists{hint}")
    foreign = sorted({path.name for path in directory.iterdir()} - _FILES)
    if foreign:
        raise ConfigurationError(f"{directory} also holds {foreign[0]}, which is not of a scan")


def save_scan(cohort: Cohort, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write a scan as a folder of tables, readable by its owner alone (see the module).

    Parameters
    ----------
    cohort
        What `scan_cohort` found.
    directory
        The folder to make. It appears under this name only when it is whole.
    overwrite
        Replace a saved scan that is there and holds nothing else; else nothing is replaced.

    Raises
    ------
    ConfigurationError
        The folder exists and may not be replaced, or cannot be made there.
    """
    directory = Path(directory)
    check_target(directory, overwrite=overwrite)
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise ConfigurationError(f"{directory}: cannot be made ({error.strerror})") from None
    try:
        _write_all(cohort, made)
        if directory.exists():
            shutil.rmtree(directory)
        made.rename(directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_all(cohort: Cohort, folder: Path) -> None:
    slices, drawn = cohort.slices, cohort.annotations
    _write_csv(folder / SLICES, _in_blocks(len(slices), lambda rows: _slice_columns(slices, rows)))
    _write_csv(
        folder / ANNOTATIONS,
        _in_blocks(len(drawn), lambda rows: _annotation_columns(cohort, drawn.take(rows))),
    )
    _write_csv(folder / MARKS, [_mark_columns(cohort.marks)])
    _write_csv(
        folder / HEADERS,
        _in_blocks(len(slices), lambda rows: _header_columns(cohort.headers, rows)),
    )
    _write_csv(
        folder / PROBLEMS,
        [
            {
                "path": [problem.path for problem in cohort.problems],
                "reason": [problem.reason.value for problem in cohort.problems],
                "detail": [problem.detail for problem in cohort.problems],
                "structure": [problem.structure for problem in cohort.problems],
            }
        ],
    )
    _write_csv(folder / SERIES, [_series_columns(slices, drawn)])
    _write_text(folder / SETTINGS, [json.dumps(_settings(cohort), indent=2), "\n"])


def _in_blocks(rows: int, columns: Callable[[slice], _Columns]) -> Iterator[_Columns]:
    """The columns of a table block by block, so that not all of its text is in memory at once."""
    for start in range(0, max(rows, 1), _ROWS_AT_ONCE):
        yield columns(slice(start, min(start + _ROWS_AT_ONCE, rows)))


_ANNOTATION_COLUMNS = ("layer", "kind", "path", "offset", "length")


def _settings(cohort: Cohort) -> dict[str, Any]:
    return {
        "version": VERSION,
        "note": _NOTE,
        "root": cohort.root,
        "source": cohort.source,
        "include_unannotated": cohort.include_unannotated,
        "structures": list(cohort.structures),
        "nested": [list(pair) for pair in cohort.nested],
        "found_by": dict(cohort.found_by),
        "spelled": {name: list(called) for name, called in cohort.spelled.items()},
        "unmatched": cohort.unmatched,
        "scanned_with": list(cohort.scanned_with),
        "images": len(cohort.slices),
    }


def _slice_columns(slices: SliceTable, rows: slice) -> _Columns:
    """Every column of the table as text; one of several numbers becomes several, name_0 and on."""
    columns = {"id": _ids_of(rows)}
    for field in fields(slices):
        values = getattr(slices, field.name)[rows]
        if field.name in _WIDTHS:
            for k in range(_WIDTHS[field.name]):
                columns[f"{field.name}_{k}"] = _texts(values[:, k])
        else:
            columns[field.name] = _texts(values)
    return columns


def _annotation_columns(cohort: Cohort, drawn: AnnotationTable) -> _Columns:
    structures = [cohort.structures[k] for k in drawn.structure.tolist()]
    columns = {name: _texts(getattr(drawn, name)) for name in _ANNOTATION_COLUMNS}
    return {"id": _texts(drawn.slice), "structure": structures, **columns}


def _mark_columns(marks: MarkTable) -> _Columns:
    column, row = marks.points_column_row.T
    return {
        "id": _texts(marks.slice),
        "name": _texts(marks.name),
        "column": _texts(column),
        "row": _texts(row),
    }


def _header_columns(headers: Headers, rows: slice) -> _Columns:
    columns = {
        keyword: _texts(column.values[column.code[rows]]) for keyword, column in headers.items()
    }
    return {"id": _ids_of(rows), **columns}


def _ids_of(rows: slice) -> list[str]:
    return [str(k) for k in range(rows.start, rows.stop)]


def _texts(values: NDArray[Any]) -> list[str]:
    """Values as cells: floats that read back exactly, NaN empty, bit masks hexadecimal."""
    kind = values.dtype.kind
    if kind == "S":
        return [_decoded(value) for value in values.tolist()]
    if kind == "f":
        return ["" if math.isnan(value) else repr(value) for value in values.tolist()]
    if kind == "u":
        return [hex(value) for value in values.tolist()]
    return [str(value).lower() for value in values.tolist()]


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _series_columns(slices: SliceTable, drawn: AnnotationTable) -> dict[str, list[str]]:
    """One row per series, for a person to look at."""
    has_outline = np.zeros(len(slices), bool)
    has_outline[drawn.slice] = True
    names = ("patient_id", "study_instance_uid", "series_instance_uid", "modality")
    keys = list(zip(*(_texts(getattr(slices, name)) for name in names), strict=True))
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for row, key in enumerate(keys):
        rows_of.setdefault(key, []).append(row)
    groups = [np.array(rows) for rows in rows_of.values()]
    columns = {name: [key[k] for key in rows_of] for k, name in enumerate(names)}
    columns["volumes"] = [str(len(np.unique(slices.volume[rows]))) for rows in groups]
    columns["images"] = [str(len(rows)) for rows in groups]
    columns["images_with_annotation"] = [str(int(has_outline[rows].sum())) for rows in groups]
    for name in ("rows", "columns"):
        values = getattr(slices, name)
        columns[name] = [_spread(values[rows]) for rows in groups]
    for k in range(2):
        columns[f"pixel_spacing_{k}"] = [_spread(slices.pixel_spacing[rows, k]) for rows in groups]
    columns["first_path"] = [_decoded(slices.path[rows[0]]) for rows in groups]
    return columns


def _spread(values: NDArray[Any]) -> str:
    """The only value, or the lowest and the highest."""
    known = values[values == values]  # noqa: PLR0124 (NaN)
    if not len(known):
        return ""
    low, high = known.min().item(), known.max().item()
    return f"{low}" if low == high else f"{low}..{high}"


def _write_csv(path: Path, blocks: Iterable[_Columns]) -> None:
    """One block of rows after another; the first one's names are the header."""
    with _private(path) as stream:
        writer = csv.writer(stream)
        for k, columns in enumerate(blocks):
            if k == 0:
                writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def _write_text(path: Path, parts: Iterable[str]) -> None:
    with _private(path) as stream:
        stream.writelines(parts)


def _private(path: Path) -> Any:
    """A new text file that only its owner may read."""
    descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    return open(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: PTH123


# --- reading -------------------------------------------------------------------------------------


def load_scan(directory: str | Path) -> Cohort:
    """Read a saved scan, edited or not (see the module for what may be edited).

    Parameters
    ----------
    directory
        A folder that `save_scan` made.

    Returns
    -------
    The cohort, its images sorted by patient, volume and position.

    Raises
    ------
    LayoutError
        A file is missing, a cell is not what it must be, an annotation or header names an image
        twice or one that never was, or a patient is in two parts of the split. The message names
        file, line and column, and never the value.
    """
    directory = Path(directory)
    settings = _read_settings(directory / SETTINGS)
    table = _read_csv(directory / SLICES)
    ids = _ids(table, settings.images)
    _check_each_once(table, ids)
    slices = _slices(table)
    _check_split(table)
    order, volume = _output_order(slices, ids)
    row_of = {identifier: row for row, identifier in enumerate(ids[order].tolist())}
    drawn = _read_csv(directory / ANNOTATIONS)
    return Cohort(
        root=settings.root,
        source=settings.source,
        include_unannotated=settings.include_unannotated,
        structures=settings.structures,
        nested=settings.nested,
        slices=replace(slices.take(order), volume=volume),
        annotations=_annotations(drawn, row_of, settings),
        headers=_headers(_read_csv(directory / HEADERS), row_of, settings.images),
        spelled=settings.spelled,
        unmatched=settings.unmatched,
        scanned_with=settings.scanned_with,
        found_by=settings.found_by,
        problems=_problems(_read_csv(directory / PROBLEMS)),
        marks=_marks(_read_csv(directory / MARKS), row_of, settings.images),
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """What cohort.json says."""

    root: str
    source: str
    include_unannotated: bool
    structures: tuple[str, ...]
    nested: tuple[tuple[int, int], ...]
    spelled: dict[str, tuple[str, ...]]
    unmatched: dict[str, int]
    scanned_with: tuple[str, ...]
    found_by: dict[str, int]
    images: int
    """How many were saved: an `id` is below it."""


def _read_settings(path: Path) -> _Settings:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise LayoutError(f"{path}: line {error.lineno} is not JSON") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise LayoutError(f"{path}: needs version {VERSION} of a saved scan")
    structures = _setting(path, content, "structures", _is_list_of(_is_text), "a list of names")
    count = len(structures)
    pairs = _setting(
        path,
        content,
        "nested",
        _is_list_of(lambda p: _is_list_of(lambda k: _is_count(k) and k < count)(p) and len(p) == 2),
        f"a list of pairs of numbers below {count}, the number of structures",
    )
    found_by = _setting(path, content, "found_by", _is_counter, "counts by name")
    spelled = _setting(path, content, "spelled", _is_names_by_name, "lists of names by name")
    return _Settings(
        root=_setting(path, content, "root", _is_text, "a directory"),
        source=_setting(path, content, "source", _is_text, "a name"),
        include_unannotated=_setting(
            path, content, "include_unannotated", lambda x: isinstance(x, bool), "true or false"
        ),
        structures=tuple(structures),
        nested=tuple((inner, outer) for inner, outer in pairs),
        spelled={name: tuple(called) for name, called in spelled.items()},
        unmatched=_setting(path, content, "unmatched", _is_counter, "counts by name"),
        scanned_with=tuple(
            _setting(path, content, "scanned_with", _is_list_of(_is_text), "a list of texts")
        ),
        found_by=found_by,
        images=_setting(path, content, "images", _is_count, "a count"),
    )


def _setting(
    path: Path, content: Mapping[str, Any], key: str, fits: Callable[[Any], bool], needed: str
) -> Any:
    if key not in content or not fits(content[key]):
        raise LayoutError(f"{path}: {key} must be {needed}")
    return content[key]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_names_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_list_of(_is_text), value.values()))


def _is_counter(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _read_text(path: Path) -> str:
    with _opened(path) as stream:
        return stream.read()


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file; bytes that are no UTF-8 come back as they were on writing."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            yield stream
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read ({error.strerror})") from None


def _read_csv(path: Path) -> _Table:
    """A table whose first line names the columns; blank lines are left out."""
    with _opened(path) as stream:
        reader = csv.reader(stream)
        try:
            return _read_table(path, reader)
        except csv.Error as error:
            line = reader.line_num
            raise LayoutError(f"{path}, line {line}: not a CSV table ({error})") from None


def _read_table(path: Path, reader: Any) -> _Table:
    header: list[str] = next(reader, [])
    if len(set(header)) != len(header):
        raise LayoutError(f"{path}, line 1: a column is named twice")
    lines: list[int] = []
    columns: list[list[str]] = [[] for _ in header]
    known: dict[str, str] = {}  # equal cells are kept once: most columns hold few different ones
    for rows in _blocks(path, reader, len(header), lines):
        for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
            column.extend(map(known.setdefault, cells, cells))
    return _Table(str(path), lines, dict(zip(header, columns, strict=True)))


def _blocks(path: Path, reader: Any, width: int, lines: list[int]) -> Iterator[list[list[str]]]:
    """Rows in blocks, their lines appended to `lines`; a million rows at once are slow to make."""
    rows: list[list[str]] = []
    for row in reader:
        if not row:
            continue
        if len(row) != width:
            line = reader.line_num
            raise LayoutError(f"{path}, line {line}: {len(row)} cells, the header has {width}")
        rows.append(row)
        lines.append(reader.line_num)
        if len(rows) == _ROWS_AT_ONCE:
            yield rows
            rows = []
    if rows:
        yield rows


def _ids(table: _Table, images: int) -> Int64:
    """(n,) the `id` column: numbers of images that were saved."""
    ids = _integers(table, "id", np.int64)
    for row in np.flatnonzero(ids >= images).tolist():
        raise LayoutError(
            f"{table.name}, line {table.lines[row]}, column id: {ids[row]} was never given, "
            f"the scan has {images} image(s)"
        )
    return ids


def _check_each_once(table: _Table, ids: Int64) -> None:
    first: dict[int, int] = {}
    for row, identifier in enumerate(ids.tolist()):
        if (other := first.setdefault(identifier, row)) != row:
            raise LayoutError(
                f"{table.name}, line {table.lines[row]}, column id: {identifier} again, as in "
                f"line {table.lines[other]}"
            )


def _slices(table: _Table) -> SliceTable:
    columns: dict[str, Any] = {}
    for field in fields(SliceTable):
        kind = _TYPES[str(field.type)]
        if field.name in _WIDTHS:
            parts = [_column(table, f"{field.name}_{k}", kind) for k in range(_WIDTHS[field.name])]
            columns[field.name] = np.stack(parts, axis=1)
        else:
            columns[field.name] = _column(table, field.name, kind)
    _check_paths(table)
    _check_frames(table, columns["frame"], columns["number_of_frames"])
    return SliceTable(**columns)


def _column(table: _Table, name: str, kind: Any) -> NDArray[Any]:
    """One column of the SliceTable."""
    if kind is np.bytes_:
        return _encoded(table.cells(name))
    if kind is np.float64:
        return np.array(table.parsed(name, _number, "a number, or nothing"), np.float64)
    if kind is np.bool_:
        return np.array(table.parsed(name, _truth, "true or false"), np.bool_)
    if kind is np.uint64:
        return np.array(table.parsed(name, _mask, "a hexadecimal number (0x5)"), np.uint64)
    return _integers(table, name, kind)


def _encoded(cells: Sequence[str]) -> Bytes:
    values: Bytes = np.array([cell.encode("utf-8", "surrogateescape") for cell in cells], "S")
    return values if len(cells) else np.empty(0, "S1")


def _integers(table: _Table, name: str, kind: Any) -> NDArray[Any]:
    limits = np.iinfo(kind)
    low, high = _RANGES.get(name, (int(limits.min), int(limits.max)))

    def parse(cell: str) -> int:
        value = int(cell) if _INTEGER.fullmatch(cell) else high + 1
        if not low <= value <= high:
            raise ValueError
        return value

    return np.array(table.parsed(name, parse, f"an integer from {low} to {high}"), kind)


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


def _finite(cell: str) -> float:
    if not math.isfinite(value := float(cell)):
        raise ValueError
    return value


def _truth(cell: str) -> bool:
    if cell.lower() not in _TRUTH:
        raise ValueError
    return _TRUTH[cell.lower()]


def _mask(cell: str) -> int:
    if not _MASK.fullmatch(cell):
        raise ValueError
    return int(cell, 16)


def _kind(cell: str) -> str:
    """What a cell holds, without its value."""
    if not cell:
        return "nothing"
    if _INTEGER.fullmatch(cell):
        return "an integer"
    try:
        float(cell)
    except ValueError:
        return f"text of {len(cell)} character(s)"
    return "a number with a fraction"


def _check_paths(table: _Table) -> None:
    """Nothing outside the data directory is named."""
    for row, path in enumerate(table.cells("path")):
        if not path or leaves_directory(path):
            raise table.error(row, "path", "a path below the data directory", path)


def _check_frames(table: _Table, frame: NDArray[Any], number_of_frames: NDArray[Any]) -> None:
    for row in np.flatnonzero(frame >= number_of_frames).tolist():
        raise LayoutError(
            f"{table.name}, line {table.lines[row]}, column frame: {frame[row]} of a file with "
            f"{number_of_frames[row]} frame(s), counted from 0"
        )


def _check_split(table: _Table) -> None:
    """Every part exists, and no patient is in two."""
    first: dict[str, tuple[str, int]] = {}
    for row, cells in enumerate(zip(table.cells("patient_id"), table.cells("split"), strict=True)):
        patient, part = cells
        if part not in PARTS:
            raise table.error(row, "split", f"one of {', '.join(PARTS[1:])}, or nothing", part)
        other, line = first.setdefault(patient, (part, table.lines[row]))
        if other != part:
            raise LayoutError(
                f"{table.name}, line {table.lines[row]}, column split: the patient is in "
                f"{part or 'no part'} here and in {other or 'no part'} in line {line}"
            )


def _output_order(slices: SliceTable, ids: Int64) -> tuple[Int64, Int32]:
    """(n,) rows by patient, volume and position, and (n,) the volume of each, from 0."""
    patients, patient = np.unique(slices.patient_id, return_inverse=True)
    by_name = sorted(range(len(patients)), key=lambda k: natural_key(_decoded(bytes(patients[k]))))
    rank = np.argsort(np.array(by_name, np.int64))[patient]
    both = np.stack([rank, slices.volume], axis=1)
    _, first, group = np.unique(both, axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    normal = normal_of(slices.image_orientation_patient[first])[group]
    height = np.einsum("ij,ij->i", slices.image_position_patient, normal)
    order = np.lexsort((ids, np.where(np.isfinite(height), height, 0.0), group))
    return order, group[order].astype(np.int32)


def _annotations(table: _Table, row_of: Mapping[int, int], settings: _Settings) -> AnnotationTable:
    """What lies on images that are still there, in the order that the record demands."""
    place = {name: k for k, name in enumerate(settings.structures)}
    needed = f"one of the {len(place)} structures of {SETTINGS}"
    _check_paths(table)
    ids = _ids(table, settings.images)
    columns: dict[str, Any] = {
        "slice": np.array([row_of.get(k, -1) for k in ids.tolist()], np.int64),
        "structure": np.array(
            table.parsed("structure", lambda name: _place(name, place), needed), np.int32
        ),
        "layer": _integers(table, "layer", np.int32),
        "kind": _encoded(table.cells("kind")),
        "path": _encoded(table.cells("path")),
        "offset": _integers(table, "offset", np.int64),
        "length": _integers(table, "length", np.int64),
    }
    drawn = AnnotationTable(**columns)
    keys = ("offset", "path", "kind", "layer", "structure", "slice")
    order = np.lexsort([columns[key] for key in keys])
    return drawn.take(order[drawn.slice[order] >= 0])


def _marks(table: _Table, row_of: Mapping[int, int], images: int) -> MarkTable:
    """The points on images that are still there."""
    ids = _ids(table, images)
    points = [table.parsed(name, _finite, "a finite number") for name in ("column", "row")]
    marks = MarkTable(
        slice=np.array([row_of.get(k, -1) for k in ids.tolist()], np.int64),
        name=_encoded(table.cells("name")),
        points_column_row=np.array(points, np.float64).T.reshape(-1, 2),
    )
    order = np.argsort(marks.slice, kind="stable")
    return marks.take(order[marks.slice[order] >= 0])


def _place(name: str, place: Mapping[str, int]) -> int:
    if name not in place:
        raise ValueError
    return place[name]


def _headers(table: _Table, row_of: Mapping[int, int], images: int) -> Headers:
    """The attributes of the images that are still there, each different value once."""
    ids = _ids(table, images)
    _check_each_once(table, ids)
    row_in_table = {identifier: row for row, identifier in enumerate(ids.tolist())}
    if missing := row_of.keys() - row_in_table.keys():
        raise LayoutError(f"{table.name}: there is no row for id {min(missing)}")
    rows = [row_in_table[identifier] for identifier in row_of]
    headers = {}
    for keyword in table.columns.keys() - {"id"}:
        cells = table.columns[keyword]
        values, code = np.unique(_encoded([cells[row] for row in rows]), return_inverse=True)
        headers[keyword] = HeaderColumn(values, code.reshape(-1).astype(np.int32))
    return {keyword: headers[keyword] for keyword in table.columns if keyword in headers}


def _problems(table: _Table) -> tuple[Problem, ...]:
    reasons = table.parsed("reason", Reason, "a reason as the scan wrote it")
    texts = [table.cells(name) for name in ("detail", "structure")]
    return tuple(map(Problem, table.cells("path"), reasons, *texts))
