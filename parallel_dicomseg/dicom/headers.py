"""The header scan: what every DICOM file of a cohort is, and one row per frame of its images.

Two paths lead to the same columns. The fast one (`walk`) reads little-endian headers of many
files in one call without the GIL (measured: a header walk in batches is 20 times as fast as
pydicom). Whatever it does not understand to the letter takes the slow one through pydicom
(`slow_headers`), which is also its twin in the tests. Both give raw values; `elements` makes the
columns of them, `guards` says what cannot be decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.decoders import codestream_size
from parallel_dicomseg.dicom.derived import complete, frame_offsets
from parallel_dicomseg.dicom.elements import (
    MEDIA_STORAGE_SOP_CLASS_UID,
    MODALITY_LUT_SEQUENCE,
    PER_FRAME_GROUPS,
    ROWS,
    SEQUENCES,
    SHARED_GROUPS,
    SLOT,
    SOP_CLASS_UID,
    TRANSFER_SYNTAX_UID,
    Values,
    columns_of,
    concatenate_values,
    find_distinct,
    headers_of,
    narrowed,
    number_values,
    overlay,
    value_of,
)
from parallel_dicomseg.dicom.guards import find_problems, pixel_bytes
from parallel_dicomseg.dicom.opened import FrameError, find_frames
from parallel_dicomseg.dicom.slow_headers import (
    IMPLICIT_LITTLE_ENDIAN,
    FileHeader,
    claims_dicom,
    frames_of,
    read_header,
)
from parallel_dicomseg.dicom.walk import PIXELS, UNKNOWN, Walked, walk_files, walk_groups
from parallel_dicomseg.files import open_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.posix import AVAILABLE
from parallel_dicomseg.records import (
    Bytes,
    Float64,
    HeaderColumn,
    Headers,
    Int64,
    Problem,
    Reason,
    ScannedFile,
    SliceTable,
)

#: SOP classes with pixel data that is no image: segmentations (66.4, 66.7) and dose.
NOT_IMAGES = (
    b"1.2.840.10008.5.1.4.1.1.66.4",
    b"1.2.840.10008.5.1.4.1.1.66.7",
    b"1.2.840.10008.5.1.4.1.1.481.2",
)

#: Secondary Capture Image Storage; its multi-frame relatives are numbered below it (PS3.4 B.5).
SECONDARY_CAPTURE = b"1.2.840.10008.5.1.4.1.1.7"

_FILES_AT_ONCE = 4096
_ROWS_AT_ONCE = 16384
# Encoded pixels that claim to be this many times as large are compared with their codestream.
_SUSPICIOUS = 100
_CODESTREAM_HEAD = 2**16


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a list of files is."""

    slices: SliceTable
    """One row per frame, in the order of the files; `volume` is not assigned yet."""
    headers: Headers
    """Row by row those of `slices`; only attributes that at least one image has."""
    files: tuple[ScannedFile, ...]
    """Files without an image to convert, in the order given."""
    problems: list[Problem]
    """One per file that cannot be converted, in the order given."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Some of the files, consecutive in the list."""

    root: str
    paths: Sequence[str]
    patients: Sequence[str] | None
    start: int
    """Place of the first one in the list."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Headers of images: one row per file, or one per frame where functional groups differ."""

    values: Values
    file: Int64
    """(m,) place of the file in the list."""
    frame: Int64
    """(m,) 0 where the row holds for all frames."""
    items: Int64
    """(m,) in the per-frame functional groups; 0: the row holds for all frames."""
    size: Int64
    pixels: Int64
    """(m, 3) tag, offset and length of the pixel data."""
    lut_range: Float64
    """(m, 2) of the modality lookup table; NaN without one."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of the images."""

    slices: SliceTable
    headers: Headers
    file: Int64
    """(n,) place in the list of each row's file."""


_Others = dict[int, ScannedFile | Problem]
"""What is no image, by its place in the list."""


def scan_headers(
    root: str | Path, paths: Sequence[str], patients: Sequence[str] | None = None
) -> Scanned:
    """Read the headers of files, in one call without the GIL where they are usual.

    Parameters
    ----------
    root
        Directory that the paths are relative to.
    paths
        n files, '/' between the parts.
    patients
        n names, the cohort's own, one per file; None: each file's PatientID, stripped.

    Returns
    -------
    Scanned
        Every file is either in the table, with all its frames, or in `files`, or has one Problem.
        Position, orientation and spacing are in mm in patient coordinates. DICOM PS3.3 C.7.6.2
        (image plane), C.7.6.3 (image pixel), C.7.6.16 (functional groups: what a frame says goes
        before what all share, and that before the top level).
    """
    others: _Others = {}
    parts: list[_Part] = []
    for start in range(0, len(paths), _FILES_AT_ONCE):
        chosen = slice(start, start + _FILES_AT_ONCE)
        named = None if patients is None else patients[chosen]
        parts += _scan_block(_Names(os.fspath(root), paths[chosen], named, start), others)
    joined = _joined(parts or [_part_of(_single_rows([]), _Names("", (), None, 0), others)])
    not_images = [others[i] for i in sorted(others)]
    return Scanned(
        joined.slices,
        joined.headers,
        tuple(other for other in not_images if isinstance(other, ScannedFile)),
        [other for other in not_images if isinstance(other, Problem)],
    )


def concatenate_headers(parts: Sequence[tuple[Headers, int]]) -> Headers:
    """Headers under one another; b'' where a part lacks an attribute that another one has.

    Parameters
    ----------
    parts
        Each the attributes of some images, and how many images there are.
    """
    keywords = dict.fromkeys(keyword for headers, _ in parts for keyword in headers)
    return {keyword: _concatenate_column(keyword, parts) for keyword in keywords}


def _concatenate_column(keyword: str, parts: Sequence[tuple[Headers, int]]) -> HeaderColumn:
    texts: list[bytes] = []
    codes = []
    for headers, count in parts:
        column = headers.get(keyword) or HeaderColumn(
            np.array([b""], np.bytes_), np.zeros(count, np.int32)
        )
        codes.append(column.code + np.int32(len(texts)))
        texts += column.values.tolist()
    return number_values(texts, np.concatenate(codes))


def _joined(parts: list[_Part]) -> _Part:
    """Parts as one, in the order of the files."""
    if len(parts) == 1:
        return parts[0]
    file = np.concatenate([part.file for part in parts])
    order = np.argsort(file, kind="stable")
    headers = concatenate_headers([(part.headers, len(part.file)) for part in parts])
    return _Part(
        SliceTable.concatenate([part.slices for part in parts]).take(order),
        {keyword: column.take(order) for keyword, column in headers.items()},
        file[order],
    )


def _scan_block(names: _Names, others: _Others) -> Iterator[_Part]:
    """Scan a few thousand files; those that are no image are added to `others`."""
    walked = walk_files(names.root, names.paths) if AVAILABLE else None
    alone = np.ones(len(names.paths), bool)
    if walked is not None:
        sequences = walked.values.spans[:, [SLOT[tag] for tag in SEQUENCES], 1]
        alone = (walked.status != PIXELS) | (sequences != 0).any(axis=1)
        if not alone.all():
            yield _part_of(_plain_rows(walked, ~alone), names, others)
    single: list[tuple[int, FileHeader]] = []
    rows = 0
    for i in np.flatnonzero(alone).tolist():
        found = _read_alone(names.root, names.paths[i], walked, i)
        if not isinstance(found, FileHeader):
            others[names.start + i] = found
            continue
        single.append((i, found))
        rows += len(found.values.spans)
        if rows >= _ROWS_AT_ONCE:
            yield _part_of(_single_rows(single), names, others)
            single, rows = [], 0
    if single:
        yield _part_of(_single_rows(single), names, others)


def _plain_rows(walked: Walked, chosen: NDArray[np.bool_]) -> _Rows:
    """The files that the walk has read to their pixels, without sequences that change them."""
    file = np.flatnonzero(chosen)
    all_of_them = len(file) == len(chosen)
    spans = walked.values.spans if all_of_them else walked.values.spans[file]
    return _Rows(
        values=Values(walked.values.raw, spans),
        file=file,
        frame=np.zeros(len(file), np.int64),
        items=np.zeros(len(file), np.int64),
        size=walked.size[file],
        pixels=walked.pixels[file],
        lut_range=np.full((len(file), 2), np.nan),
    )


def _single_rows(single: list[tuple[int, FileHeader]]) -> _Rows:
    """Headers that were read one by one, under one another."""
    headers = [header for _, header in single]
    counts = [len(header.values.spans) for header in headers]
    frames = [np.arange(count, dtype=np.int64) for count in counts]
    return _Rows(
        values=concatenate_values([header.values for header in headers]),
        file=np.repeat(np.array([i for i, _ in single], np.int64), counts),
        frame=np.concatenate([np.empty(0, np.int64), *frames]),
        items=np.repeat(np.array([header.items for header in headers], np.int64), counts),
        size=np.repeat(np.array([header.size for header in headers], np.int64), counts),
        pixels=np.repeat(
            np.array([header.pixels for header in headers], np.int64).reshape(-1, 3), counts, axis=0
        ),
        lut_range=np.repeat(
            np.array([header.lut_range for header in headers]).reshape(-1, 2), counts, axis=0
        ),
    )


def _read_alone(
    root: str, path: str, walked: Walked | None, i: int
) -> FileHeader | ScannedFile | Problem:
    """A file that is not a plain image of one header for all its frames."""
    if walked is not None and walked.status[i] != UNKNOWN:
        size, has_pixels = int(walked.size[i]), walked.status[i] == PIXELS
        other = _judge_kind(path, walked.values, i, size, bool(has_pixels))
        found = other or read_groups(root, path, walked, i)
        if found is not None:
            return found
    found = read_header(root, path)
    if not isinstance(found, FileHeader):
        return found
    return _judge_kind(path, found.values, 0, found.size, found.pixels[0] >= 0) or found


def _judge_kind(
    path: str, values: Values, row: int, size: int, has_pixels: bool
) -> ScannedFile | Problem | None:
    """None for an image; what else a DICOM file is, by its SOP class."""
    sop_class = value_of(values, row, SOP_CLASS_UID)
    sop_class = sop_class or value_of(values, row, MEDIA_STORAGE_SOP_CLASS_UID)
    if sop_class in NOT_IMAGES:
        return ScannedFile(path, sop_class.decode(), size)
    if has_pixels:
        return None
    if is_image_class(sop_class) or (not sop_class and value_of(values, row, ROWS)):
        return Problem(path, Reason.MISSING_TAG, "(7FE0,0010) Pixel Data is missing")
    if not sop_class and claims_dicom(path):
        return Problem(path, Reason.MISSING_TAG, "(0008,0016) SOP Class UID is missing")
    return ScannedFile(path, sop_class.decode("ascii", "replace"), size)


@cache
def is_image_class(sop_class_uid: bytes) -> bool:
    """Whether the standard calls a SOP class an image storage."""
    from pydicom import config
    from pydicom.uid import UID

    uid = UID(sop_class_uid.decode("ascii", "replace"), config.IGNORE)
    return "Image Storage" in uid.name


def is_secondary_capture(sop_class_uid: Bytes) -> NDArray[np.bool_]:
    """(n,) whether images are pictures of screens, scanned films and the like (PS3.3 A.8)."""
    below = np.char.startswith(sop_class_uid, SECONDARY_CAPTURE + b".")
    captured: NDArray[np.bool_] = (sop_class_uid == SECONDARY_CAPTURE) | below
    return captured


def read_groups(root: str, path: str, walked: Walked, i: int) -> FileHeader | Problem | None:
    """The header of a walked file with its functional groups; None where that takes pydicom."""
    top = walked.values.of_row(i)
    if walked.values.spans[i, SLOT[MODALITY_LUT_SEQUENCE], 1] != 0:
        return None
    explicit = value_of(top, 0, TRANSFER_SYNTAX_UID) != IMPLICIT_LITTLE_ENDIAN
    tag, pixel_offset, pixel_length = walked.pixels[i].tolist()
    items, values = 0, top
    for group in (SHARED_GROUPS, PER_FRAME_GROUPS):
        start, length = walked.values.spans[i, SLOT[group]].tolist()
        if length == 0:
            continue
        stop = pixel_offset if length < 0 else start + length
        if stop - start > limits().header_bytes:
            detail = f"functional groups of {stop - start} bytes, limit {limits().header_bytes}"
            return Problem(path, Reason.UNSUPPORTED_PIXELS, detail)
        try:
            raw = _read_bytes(Path(root) / path, start, stop)
        except OSError as error:
            return Problem(path, Reason.UNREADABLE_FILE, error.strerror or "cannot be read")
        rows = 1 if group == SHARED_GROUPS else min(frames_of(top), 1 + len(raw) // 8)
        found = walk_groups(raw, length, explicit, rows)
        if found is None:
            return None
        if found[1].spans.any():
            values = overlay(values, found[1])
            items = found[0] if group == PER_FRAME_GROUPS else 0
    return FileHeader(values, items, int(walked.size[i]), (tag, pixel_offset, pixel_length))


def _read_bytes(file: Path, start: int, stop: int) -> bytes:
    with open_regular(file, limits().file_bytes) as stream:
        stream.seek(start)
        return stream.read(stop - start)


def _part_of(rows: _Rows, names: _Names, others: _Others) -> _Part:
    """Make the table of some headers; those that cannot be in it are added to `others`."""
    distinct = find_distinct(rows.values)
    columns = columns_of(distinct)
    columns |= {"file_size": rows.size, "items": rows.items, "lut_range": rows.lut_range}
    columns |= dict(zip(("pixel_tag", "pixel_offset", "pixel_length"), rows.pixels.T, strict=True))
    complete(columns)
    good = _judge(columns, rows, names, others)
    repeats = np.where(rows.items == 0, columns["number_of_frames"], 1.0)
    repeats = np.where(good, repeats, 0.0).astype(np.int64)
    index = np.repeat(np.arange(len(good)), repeats)
    frame = rows.frame[index] + np.arange(len(index)) - (repeats.cumsum() - repeats)[index]
    headers = headers_of(distinct)
    if not (repeats == 1).all():
        columns = {name: _taken(column, index) for name, column in columns.items()}
        headers = _chosen(headers, index)
    table = _table(columns, rows.file[index], frame, names)
    return _Part(table, headers, rows.file[index] + names.start)


def _taken(column: NDArray[Any], index: Int64) -> NDArray[Any]:
    """Some rows of a column, in no more width than they need."""
    return narrowed(column[index]) if column.dtype.kind == "S" else column[index]


def _judge(
    columns: dict[str, Any], rows: _Rows, names: _Names, others: _Others
) -> NDArray[np.bool_]:
    """(m,) which rows are of images that can be converted; the files of the rest go to `others`."""
    paths = [names.paths[i] for i in rows.file.tolist()]
    classes = columns["sop_class_uid"]
    rejected: dict[int, ScannedFile | Problem] = {
        **_find_false_sizes(names.root, columns, paths),
        **_find_false_frames(names.root, columns, rows, paths),
        **find_problems(columns, paths),
    }
    for k in np.flatnonzero(np.isin(classes, NOT_IMAGES)).tolist():
        rejected[k] = ScannedFile(paths[k], classes[k].decode(), int(rows.size[k]))
    for k in sorted(rejected):
        others.setdefault(names.start + int(rows.file[k]), rejected[k])
    return ~np.isin(rows.file, rows.file[sorted(rejected)])


def _find_false_sizes(
    root: str, columns: dict[str, Any], paths: Sequence[str]
) -> dict[int, Problem]:
    """Images whose header claims far more than the file holds, and whose codestream says so.

    One such claim would make all images of a cohort as large.
    """
    size = np.maximum(columns["file_size"], 1)
    encoded = (columns["pixel_length"] < 0) & (columns["pixel_offset"] >= 0)
    problems = {}
    for i in np.flatnonzero(encoded & (pixel_bytes(columns) > _SUSPICIOUS * size)).tolist():
        claimed = _first_codestream_size(Path(root) / paths[i], int(columns["pixel_offset"][i]))
        expected = int(columns["rows"][i]), int(columns["columns"][i])
        if claimed is not None and claimed != expected:
            detail = (
                f"the frame holds {claimed[0]} x {claimed[1]} pixels, (0028,0010) Rows x "
                f"(0028,0011) Columns is {expected[0]} x {expected[1]}"
            )
            problems[i] = Problem(paths[i], Reason.IMAGE_SIZE_DIFFERS, detail)
    return problems


def _find_false_frames(
    root: str, columns: dict[str, Any], rows: _Rows, paths: Sequence[str]
) -> dict[int, Problem]:
    """Files of several encoded frames whose fragments cannot be these frames.

    Once for each file: a task that opened it would find out again.
    """
    frames = columns["number_of_frames"]
    several = (frames > 1) & (frames <= limits().frames) & (columns["pixel_length"] < 0)
    several &= columns["pixel_offset"] >= 0
    several[1:] &= np.diff(rows.file) != 0
    problems = {}
    for i in np.flatnonzero(several).tolist():
        try:
            with open_regular(Path(root) / paths[i], limits().file_bytes) as stream:
                stream.seek(int(columns["pixel_offset"][i]))
                find_frames(stream, int(frames[i]), int(columns["file_size"][i]))
        except FrameError as error:
            problems[i] = Problem(paths[i], error.reason, error.detail)
        except OSError:
            continue  # whoever reads the pixels tells
    return problems


def _first_codestream_size(file: Path, pixel_offset: int) -> tuple[int, int] | None:
    """Rows and columns in the first fragment of encapsulated pixels (PS3.5 A.4); None: unknown."""
    try:
        table = _read_bytes(file, pixel_offset, pixel_offset + 8)
        first = pixel_offset + 16 + int.from_bytes(table[4:], "little")
        return codestream_size(_read_bytes(file, first, first + _CODESTREAM_HEAD))
    except OSError:
        return None


def _chosen(headers: Headers, index: Int64) -> Headers:
    """Some rows, without values and attributes that none of them has."""
    chosen = {
        keyword: number_values(column.values.tolist(), column.code[index])
        for keyword, column in headers.items()
    }
    return {keyword: column for keyword, column in chosen.items() if column.values.any()}


def _table(columns: dict[str, Any], file: Int64, frame: Int64, names: _Names) -> SliceTable:
    """The rows of a table; what is not in a header yet is left open."""
    n = len(file)
    patients = columns["patient_id"] if names.patients is None else _encoded(names.patients, file)
    own = {
        "path": _encoded(names.paths, file),
        "patient_id": patients,
        "frame": frame,
        "samples_per_pixel": columns["decoded_samples"],
        "pixel_offset": frame_offsets(columns, frame),
        "volume": np.full(n, -1),
        "annotated": np.zeros(n, np.uint64),
        "split": np.zeros(n, "S1"),
    }
    return SliceTable(
        **{
            f.name: _typed(f.name, own[f.name] if f.name in own else columns[f.name])
            for f in fields(SliceTable)
        }
    )


_INT32 = (
    *("frame", "number_of_frames", "rows", "columns", "samples_per_pixel"),
    *("bits_allocated", "bits_stored", "pixel_representation", "volume"),
)


def _typed(name: str, column: NDArray[Any]) -> NDArray[Any]:
    """A column with the dtype that the table has it in."""
    return column.astype(np.int32) if name in _INT32 else column


def _encoded(texts: Sequence[str], index: Int64) -> NDArray[np.bytes_]:
    """Some of the names, as the file system has them."""
    # joined, as one call per name costs more than reading the header
    return np.array(os.fsencode("\0".join(texts)).split(b"\0"), dtype=np.bytes_)[index]
