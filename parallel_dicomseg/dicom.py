"""DICOM files: headers for the scan, pixels for the conversion; the only room that knows pydicom.

Two paths lead to the same columns. The fast one reads little-endian headers and native pixels
of many files in one call without the GIL (measured: a header walk in batches is 20 times as fast
as pydicom). Whatever it does not understand to the letter takes the slow one through pydicom,
which is also its twin in the tests.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.jit import kernel
from parallel_dicomseg.posix import AVAILABLE, close, file_size, open_read_only, pack_paths, read_at
from parallel_dicomseg.records import (
    Bytes,
    Float64,
    Int64,
    Problem,
    Reason,
    SliceRefs,
    SliceTable,
    UInt8,
)
from parallel_dicomseg.text import parse_decimals

# Header tags that the scan keeps, ascending as in every DICOM file (PS3.5 7.1).
TRANSFER_SYNTAX_UID = 0x00020010
SOP_INSTANCE_UID = 0x00080018
MODALITY = 0x00080060
SLICE_THICKNESS = 0x00180050
STUDY_INSTANCE_UID = 0x0020000D
SERIES_INSTANCE_UID = 0x0020000E
INSTANCE_NUMBER = 0x00200013
IMAGE_POSITION_PATIENT = 0x00200032
IMAGE_ORIENTATION_PATIENT = 0x00200037
FRAME_OF_REFERENCE_UID = 0x00200052
SAMPLES_PER_PIXEL = 0x00280002
PHOTOMETRIC_INTERPRETATION = 0x00280004
NUMBER_OF_FRAMES = 0x00280008
ROWS = 0x00280010
COLUMNS = 0x00280011
PIXEL_SPACING = 0x00280030
BITS_ALLOCATED = 0x00280100
BITS_STORED = 0x00280101
HIGH_BIT = 0x00280102
PIXEL_REPRESENTATION = 0x00280103
RESCALE_INTERCEPT = 0x00281052
RESCALE_SLOPE = 0x00281053

# What changes pixel values in ways that this program does not apply, or would not notice.
_UNSUPPORTED_SEQUENCES = {
    0x00283000: "(0028,3000) Modality LUT Sequence",
    0x52009229: "(5200,9229) Shared Functional Groups Sequence",
    0x52009230: "(5200,9230) Per-frame Functional Groups Sequence",
}
_GREY = (b"", b"MONOCHROME1", b"MONOCHROME2")

_TEXT_TAGS = {
    "transfer_syntax_uid": TRANSFER_SYNTAX_UID,
    "sop_instance_uid": SOP_INSTANCE_UID,
    "modality": MODALITY,
    "study_instance_uid": STUDY_INSTANCE_UID,
    "series_instance_uid": SERIES_INSTANCE_UID,
    "frame_of_reference_uid": FRAME_OF_REFERENCE_UID,
    "photometric_interpretation": PHOTOMETRIC_INTERPRETATION,
}
# name -> (tag, value where absent); None: the file is rejected without it
_SHORT_TAGS: dict[str, tuple[int, int | None]] = {
    "rows": (ROWS, None),
    "columns": (COLUMNS, None),
    "samples_per_pixel": (SAMPLES_PER_PIXEL, 1),
    "bits_allocated": (BITS_ALLOCATED, None),
    "bits_stored": (BITS_STORED, None),
    "high_bit": (HIGH_BIT, -1),
    "pixel_representation": (PIXEL_REPRESENTATION, 0),
}
# name -> (tag, how many numbers, value where absent)
_DECIMAL_TAGS = {
    "slice_thickness": (SLICE_THICKNESS, 1, np.nan),
    "instance_number": (INSTANCE_NUMBER, 1, -1.0),
    "image_position_patient": (IMAGE_POSITION_PATIENT, 3, np.nan),
    "image_orientation_patient": (IMAGE_ORIENTATION_PATIENT, 6, np.nan),
    "number_of_frames": (NUMBER_OF_FRAMES, 1, 1.0),
    "pixel_spacing": (PIXEL_SPACING, 2, np.nan),
    "rescale_intercept": (RESCALE_INTERCEPT, 1, 0.0),
    "rescale_slope": (RESCALE_SLOPE, 1, 1.0),
}
_WANTED = np.array(
    sorted(
        [
            *_TEXT_TAGS.values(),
            *(tag for tag, _ in _SHORT_TAGS.values()),
            *(tag for tag, _, _ in _DECIMAL_TAGS.values()),
            *_UNSUPPORTED_SEQUENCES,
        ]
    ),
    dtype=np.int64,
)
_SLOT = {int(tag): slot for slot, tag in enumerate(_WANTED)}

_KEYWORDS = {
    ROWS: "(0028,0010) Rows",
    COLUMNS: "(0028,0011) Columns",
    BITS_ALLOCATED: "(0028,0100) Bits Allocated",
    BITS_STORED: "(0028,0101) Bits Stored",
}

IMPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2"
EXPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2.1"
_NATIVE = (IMPLICIT_LITTLE_ENDIAN, EXPLICIT_LITTLE_ENDIAN)

# How a header walk ended.
_OK, _UNREADABLE, _SLOW = 0, 1, 2

_UNDEFINED_LENGTH = 0xFFFFFFFF
_WINDOW_BYTES = 8192
_VALUE_BYTES = 2048
_LONGEST_VALUE = 256
# A sequence of one empty item: the Arterys files have such functional groups.
_EMPTY_ITEM_BYTES = 8
_PIXEL_DATA = 0x7FE00010
_ITEM_GROUP = 0xFFFE
_ITEM = 0xFFFEE000
_SEQUENCE_DELIMITATION = 0xFFFEE0DD
_SEQUENCE_VR = ord("S") | ord("Q") << 8

# Explicit VRs whose length takes four bytes after two reserved ones (PS3.5 7.1.2).
_LONG_VR = np.zeros(65536, np.uint8)
for _name in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"):
    _LONG_VR[ord(_name[0]) | ord(_name[1]) << 8] = 1


@kernel
def _u2(raw: UInt8, at: int) -> int:
    return int(np.int64(raw[at]) | np.int64(raw[at + 1]) << 8)


@kernel
def _u4(raw: UInt8, at: int) -> int:
    return _u2(raw, at) | _u2(raw, at + 2) << 16


@kernel
def _is_upper(byte: int) -> bool:
    return 65 <= byte <= 90


@kernel
def _syntax_of(values: UInt8, span: Int64) -> int:
    """0 explicit, 1 implicit, 2 one whose header this walk cannot read (big endian, deflated)."""
    start, length = span[0], span[1]
    while length > 0 and (values[start + length - 1] == 0 or values[start + length - 1] == 32):
        length -= 1
    if length == 17:  # 1.2.840.10008.1.2
        return 1
    if length == 19 and values[start + 18] == 50:  # 1.2.840.10008.1.2.2
        return 2
    if length == 22 and values[start + 18] == 49:  # 1.2.840.10008.1.2.1.99
        return 2
    return 0 if length > 0 else 2


@kernel
def _keep_value(
    fd: int,
    start: int,
    length: int,
    window: UInt8,
    base: int,
    held: int,
    slot: int,
    filled: int,
    values: UInt8,
    spans: Int64,
) -> int:
    """Copy a value into `values`; return the bytes filled so far, or -1 where it cannot be.

    Mostly it lies in the window; where not, it is read from the file.
    """
    if length > _LONGEST_VALUE or filled + length > len(values):
        return -1
    if start + length <= base + held:
        for k in range(length):
            values[filled + k] = window[start - base + k]
    elif read_at(fd, values[filled : filled + length], length, start) != length:
        return -1
    spans[slot, 0] = filled
    spans[slot, 1] = length
    return filled + length


@kernel
def _has_prefix(window: UInt8, held: int) -> bool:
    """Whether 'DICM' follows the preamble of 128 bytes, and at least one element follows it."""
    magic = window[128:132]
    return held >= 144 and magic[0] == 68 and magic[1] == 73 and magic[2] == 67 and magic[3] == 77


@kernel
def _element_head(
    window: UInt8, here: int, explicit: bool, long_vr: UInt8
) -> tuple[int, int, bool]:
    """Value length, bytes before the value, and whether it may be a sequence (PS3.5 7.1).

    The head is -1 where there is no VR although there must be one.
    """
    if not explicit:
        return _u4(window, here + 4), 8, True
    if not (_is_upper(window[here + 4]) and _is_upper(window[here + 5])):
        return 0, -1, False
    vr = _u2(window, here + 4)
    if long_vr[vr]:
        return _u4(window, here + 8), 12, vr == _SEQUENCE_VR
    return _u2(window, here + 6), 8, False


@kernel
def _item_step(tag: int, length: int) -> tuple[int, int]:
    """Change of depth, and bytes to skip after the head, of an item or delimiter (PS3.5 7.5)."""
    if tag == _SEQUENCE_DELIMITATION:
        return -1, 0
    if tag == _ITEM and length != _UNDEFINED_LENGTH:
        return 0, length
    return 0, 0


@kernel
def _walk(  # noqa: C901, PLR0912 one pass over the elements; cut up, it would pass ten variables on
    fd: int,
    size: int,
    window: UInt8,
    wanted: Int64,
    long_vr: UInt8,
    values: UInt8,
    spans: Int64,
    pixels: Int64,
) -> int:
    """Walk one header up to the pixel data: values of the wanted tags, offset and length of it.

    Returns _OK or _SLOW. A window of the file slides along, so that large private elements are
    stepped over without being read.
    """
    base = 0
    held = read_at(fd, window, min(size, len(window)), 0)
    if not _has_prefix(window, held):
        return _SLOW
    at, filled, slot, depth, previous = 132, 0, 0, 0, -1
    meta, explicit = True, True
    while at + 12 <= size:
        if at + 12 > base + held:
            base = at
            held = read_at(fd, window, min(size - at, len(window)), at)
            if held < 12:
                break
        tag = _u2(window, at - base) << 16 | _u2(window, at - base + 2)
        if meta and tag >> 16 != 2:
            meta = False
            syntax = _syntax_of(values, spans[0])
            explicit = syntax == 0
            if syntax == 2:
                break
        if tag >> 16 == _ITEM_GROUP:
            change, skip = _item_step(tag, _u4(window, at - base + 4))
            if depth == 0:
                break
            depth += change
            at += 8 + skip
            continue
        length, head, nests = _element_head(window, at - base, explicit, long_vr)
        if head < 0 or (length == _UNDEFINED_LENGTH and not nests and tag != _PIXEL_DATA):
            break
        if depth == 0:
            if tag <= previous:
                break
            previous = tag
            if tag == _PIXEL_DATA:
                pixels[0] = at + head
                pixels[1] = -1 if length == _UNDEFINED_LENGTH else length
                return _OK
            while slot < len(wanted) and wanted[slot] < tag:
                slot += 1
            if slot < len(wanted) and wanted[slot] == tag:
                filled = _keep_value(
                    fd, at + head, length, window, base, held, slot, filled, values, spans
                )
                if filled < 0:
                    break
        at += head
        if length == _UNDEFINED_LENGTH:
            depth += 1
        else:
            at += length
    return _SLOW


@kernel
def _walk_files(
    path_bytes: UInt8,
    path_offsets: Int64,
    wanted: Int64,
    long_vr: UInt8,
    sizes: Int64,
    status: Int64,
    values: UInt8,
    spans: Int64,
    pixels: Int64,
) -> None:
    """Walk the headers of many files; see _walk."""
    window = np.empty(_WINDOW_BYTES, np.uint8)
    for i in range(len(path_offsets)):
        fd = open_read_only(path_bytes, path_offsets[i])
        if fd < 0:
            status[i] = _UNREADABLE
            continue
        sizes[i] = file_size(fd)
        if sizes[i] < 0:
            status[i] = _UNREADABLE
        else:
            status[i] = _walk(fd, sizes[i], window, wanted, long_vr, values[i], spans[i], pixels[i])
        close(fd)


@kernel
def _gather(values: UInt8, spans: Int64, separator: int, out: UInt8) -> None:
    """Copy one value per row into `out` (n, width), padded on the right with `separator`."""
    for i in range(len(out)):
        start, length = spans[i, 0], max(spans[i, 1], 0)
        while length > 0 and values[i, start + length - 1] <= 32:
            length -= 1
        while length > 0 and values[i, start] == 32:
            start += 1
            length -= 1
        out[i, :length] = values[i, start : start + length]
        out[i, length:] = separator


def _text_column(values: UInt8, spans: Int64) -> Bytes:
    width = max(int(spans[:, 1].max(initial=0)), 1)
    out = np.empty((len(spans), width), np.uint8)
    _gather(values, spans, 0, out)
    padded: Bytes = out.view(f"S{width}")[:, 0]
    # The padding of the file is not part of the value, so it does not widen the column either.
    return padded.astype(f"S{max(int(np.char.str_len(padded).max(initial=1)), 1)}")


def _short_column(values: UInt8, spans: Int64, absent: int) -> Int64:
    row = np.arange(len(spans))
    start = spans[:, 0]
    number = values[row, start].astype(np.int64) | values[row, start + 1].astype(np.int64) << 8
    return np.where(spans[:, 1] == 2, number, absent)


def _decimal_column(values: UInt8, spans: Int64, count: int, absent: float) -> Float64:
    """Numbers of a DS or IS element, (n, count); `absent` without one, NaN where malformed.

    All plain rows are parsed in one go, so each of them must hold exactly `count` numbers: one
    more or less would move those of every row below. The others are decided one by one.
    """
    out = np.full((len(spans), count), absent)
    width = int(spans[:, 1].max(initial=0)) + 1
    raw = np.empty((len(spans), width), np.uint8)
    _gather(values, spans, 32, raw)
    filled = raw > 32
    plain = _is_plain(raw, filled, count)
    try:
        out[plain] = parse_decimals(raw[plain].ravel()).reshape(-1, count)
    except ValueError:
        plain[:] = False
    for i in np.flatnonzero(filled.any(axis=1) & ~plain):
        out[i] = _floats(raw[i].tobytes(), count)
    return out


def _is_plain(raw: UInt8, filled: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """(n,) rows of `count` values with a backslash between two and nothing else around them."""
    length = filled.sum(axis=1)
    unbroken = np.arange(raw.shape[1]) < length[:, None]
    backslash = raw == 92
    lonely = backslash & (np.roll(backslash, 1, axis=1) | ~np.roll(filled, -1, axis=1))
    plain: NDArray[np.bool_] = (
        (length > 0)
        & (filled == unbroken).all(axis=1)
        & (backslash.sum(axis=1) == count - 1)
        & ~backslash[:, 0]
        & ~lonely.any(axis=1)
        & ~(raw == 44).any(axis=1)
    )
    return plain


def _floats(raw: bytes, count: int) -> list[float]:
    """The values of one element; all NaN unless there are `count` finite numbers."""
    try:
        numbers = [float(part) for part in raw.decode("ascii").split("\\")]
    except ValueError:
        return [np.nan] * count
    good = len(numbers) == count and bool(np.isfinite(numbers).all())
    return numbers if good else [np.nan] * count


def scan_headers(
    root: str | Path, paths: Sequence[str], patients: Sequence[str]
) -> tuple[SliceTable, list[Problem]]:
    """Read the headers of DICOM files, in one call without the GIL where they are usual.

    Parameters
    ----------
    root
        Directory that the paths are relative to.
    paths
        n files, '/' between the parts.
    patients
        n names, the cohort's own, one per file.

    Returns
    -------
    The rows of the files that hold one native or encapsulated frame, in the order given, and one
    Problem for every other file. DICOM PS3.3 C.7.6.3 (image pixel), C.7.6.2 (image plane).
    """
    n = len(paths)
    values = np.zeros((n, _VALUE_BYTES), np.uint8)
    spans = np.zeros((n, len(_WANTED), 2), np.int64)
    pixels = np.full((n, 2), -1, np.int64)
    sizes = np.zeros(n, np.int64)
    status = np.zeros(n, np.int64)
    if AVAILABLE:
        packed, offsets = pack_paths(paths, os.fspath(root))
        _walk_files(packed, offsets, _WANTED, _LONG_VR, sizes, status, values, spans, pixels)
    else:
        status[:] = _SLOW
    columns = _columns(values, spans)
    columns["file_size"] = sizes
    columns["pixel_offset"] = pixels[:, 0]
    columns["pixel_length"] = pixels[:, 1]
    problems: dict[int, Problem] = {}
    for i in np.flatnonzero(status != _OK).tolist():
        row = _slow_row(Path(root) / paths[i], paths[i])
        if isinstance(row, Problem):
            problems[i] = row
        else:
            for name, value in row.items():
                columns[name] = _with(columns[name], i, value)
    _find_problems(columns, paths, problems)
    columns["instance_number"] = _whole_numbers(columns["instance_number"])
    table = SliceTable(
        path=np.array([os.fsencode(path) for path in paths], dtype=np.bytes_),
        patient_id=np.array([os.fsencode(patient) for patient in patients], dtype=np.bytes_),
        frame=np.zeros(n, np.int32),
        **{f.name: columns[f.name] for f in fields(SliceTable) if f.name in columns},
    )
    good = np.ones(n, bool)
    good[list(problems)] = False
    return table.take(good), [problems[i] for i in sorted(problems)]


def _columns(values: UInt8, spans: Int64) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: _text_column(values, spans[:, _SLOT[tag]]) for name, tag in _TEXT_TAGS.items()
    }
    for name, (tag, absent) in _SHORT_TAGS.items():
        short = _short_column(values, spans[:, _SLOT[tag]], -1 if absent is None else absent)
        columns[name] = short.astype(np.int32)
    for name, (tag, count, fill) in _DECIMAL_TAGS.items():
        column = _decimal_column(values, spans[:, _SLOT[tag]], count, fill)
        columns[name] = column[:, 0] if count == 1 else column
    present = [spans[:, _SLOT[tag], 1] > _EMPTY_ITEM_BYTES for tag in _UNSUPPORTED_SEQUENCES]
    columns["unsupported_sequence"] = _first_of(np.array(present))
    return columns


def _first_of(present: NDArray[np.bool_]) -> Int64:
    """(n,) which of the unsupported sequences (k, n) is there, -1: none."""
    return np.where(present.any(axis=0), present.argmax(axis=0), -1)


def _whole_numbers(column: Float64) -> Int64:
    """Integers within 31 bits; -1 for whatever is none."""
    whole = (column == np.rint(column)) & (np.abs(column) < 2**31)
    return np.where(whole, column, -1).astype(np.int64)


def _with(column: NDArray[Any], row: int, value: Any) -> NDArray[Any]:
    """The column with one value replaced, widened where it holds text that is shorter."""
    if column.dtype.kind == "S" and len(value) > column.dtype.itemsize:
        column = column.astype(f"S{len(value)}")
    column[row] = value
    return column


def _slow_row(file: Path, path: str) -> dict[str, Any] | Problem:
    """The same columns for one file, through pydicom."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        size = file.stat().st_size
        if not file.is_file():
            return Problem(path, Reason.UNREADABLE_FILE, "not a regular file")
        with warnings.catch_warnings():
            # pydicom's warnings print tag values, and there is one per illegal UID
            warnings.simplefilter("ignore")
            dataset = dcmread(file, stop_before_pixels=False, defer_size=1024)
            row = _row_of(dataset)
    except InvalidDicomError:
        return Problem(path, Reason.NOT_DICOM, f"no 'DICM' at byte 128 of {size} bytes")
    except OSError as error:
        return Problem(path, Reason.UNREADABLE_FILE, error.strerror or type(error).__name__)
    except Exception as error:  # noqa: BLE001 broken files make pydicom raise anything
        # only the kind of the error: pydicom's texts quote values of the header
        kind = type(error).__name__
        return Problem(path, Reason.NOT_DICOM, f"the header cannot be read ({kind})")
    if row is None:
        return Problem(path, Reason.MISSING_TAG, "(7FE0,0010) Pixel Data is missing")
    return {**row, "file_size": size, "pixel_offset": -1, "pixel_length": -1}


def _row_of(dataset: Any) -> dict[str, Any] | None:
    """Columns of a pydicom dataset; None where it has no pixels."""
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        return None
    row: dict[str, Any] = {}
    for name, tag in _TEXT_TAGS.items():
        element = (dataset.file_meta if tag >> 16 == 2 else dataset).get(tag)
        row[name] = str(element.value).encode() if element is not None else b""
    for name, (tag, absent) in _SHORT_TAGS.items():
        element = dataset.get(tag)
        value = absent if element is None or element.value is None else int(element.value)
        row[name] = -1 if value is None else value
    for name, (tag, count, fill) in _DECIMAL_TAGS.items():
        element = dataset.get(tag)
        raw = "" if element is None or element.value is None else element.value
        parts = [raw] if count == 1 else list(raw)
        text = "\\".join(str(part) for part in parts).encode()
        numbers = _floats(text, count) if text.strip() else [fill] * count
        row[name] = numbers[0] if count == 1 else numbers
    present = [
        [any(map(len, dataset[tag].value or ()))] if tag in dataset else [False]
        for tag in _UNSUPPORTED_SEQUENCES
    ]
    row["unsupported_sequence"] = int(_first_of(np.array(present))[0])
    return row


def _find_problems(
    columns: dict[str, Any], paths: Sequence[str], problems: dict[int, Problem]
) -> None:
    """Add a Problem for every row whose header rules out decoding (guards of PS3.3 C.7.6.3)."""

    def add(wrong: NDArray[np.bool_], reason: Reason, text: Any) -> None:
        for i in np.flatnonzero(wrong).tolist():
            problems.setdefault(i, Problem(paths[i], reason, text(i)))

    _find_missing_tags(columns, add)
    _find_unsupported_kinds(columns, add)
    _find_impossible_bits(columns, add)
    _find_short_pixels(columns, add)
    _find_scale_problems(columns, add)


_Add = Callable[[NDArray[np.bool_], Reason, Callable[[int], str]], None]
"""Takes which rows are wrong, why, and the words for a row."""


def _missing(label: str, column: NDArray[Any], i: int) -> str:
    return f"{label} is missing or malformed" if column[i] < 0 else f"{label} is 0"


def _find_missing_tags(columns: dict[str, Any], add: _Add) -> None:
    """Reject what has no size or depth."""
    for name, (tag, absent) in _SHORT_TAGS.items():
        if absent is None:
            label = _KEYWORDS[tag]
            add(
                columns[name] <= 0,
                Reason.MISSING_TAG,
                partial(_missing, label, columns[name]),
            )


def _find_unsupported_kinds(columns: dict[str, Any], add: _Add) -> None:
    """Reject several frames or samples, colour, and lookup tables."""
    frames = columns["number_of_frames"]
    add(
        frames != 1,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"(0028,0008) Number of Frames is {frames[i]:g}, 1 is supported",
    )
    grey = np.isin(columns["photometric_interpretation"], _GREY)
    add(
        ~grey,
        Reason.UNSUPPORTED_PIXELS,
        lambda _: "(0028,0004) Photometric Interpretation is neither MONOCHROME1 nor MONOCHROME2",
    )
    sequence = columns["unsupported_sequence"]
    names = list(_UNSUPPORTED_SEQUENCES.values())
    add(
        sequence >= 0,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"{names[sequence[i]]} is there and not supported",
    )
    samples = columns["samples_per_pixel"]
    add(
        samples != 1,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"(0028,0002) Samples per Pixel is {samples[i]}, 1 is supported",
    )


def _find_impossible_bits(columns: dict[str, Any], add: _Add) -> None:
    """Reject bits that are not where they are usual, or cannot be."""
    add(
        columns["bits_stored"] > columns["bits_allocated"],
        Reason.UNSUPPORTED_PIXELS,
        lambda i: (
            f"(0028,0101) Bits Stored is {columns['bits_stored'][i]}, "
            f"(0028,0100) Bits Allocated {columns['bits_allocated'][i]}"
        ),
    )
    high_bit, bits_stored = columns["high_bit"], columns["bits_stored"]
    add(
        (high_bit >= 0) & (high_bit != bits_stored - 1),
        Reason.UNSUPPORTED_PIXELS,
        lambda i: (
            f"(0028,0102) High Bit is {high_bit[i]}, (0028,0101) Bits Stored {bits_stored[i]}; "
            f"{bits_stored[i] - 1} is supported"
        ),
    )
    representation = columns["pixel_representation"]
    add(
        (representation != 0) & (representation != 1),
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"(0028,0103) Pixel Representation is {representation[i]}, it can be 0 or 1",
    )


def _find_short_pixels(columns: dict[str, Any], add: _Add) -> None:
    """Reject native pixels that end too early; others have no offset from here on."""
    native = np.isin(columns["transfer_syntax_uid"], _NATIVE) & (columns["pixel_offset"] >= 0)
    columns["pixel_offset"] = np.where(native, columns["pixel_offset"], -1)
    bits = columns["bits_allocated"].astype(np.int64)
    pixels = columns["rows"].astype(np.int64) * columns["columns"] * columns["samples_per_pixel"]
    expected = (pixels * bits + 7) // 8
    held = np.minimum(columns["pixel_length"], columns["file_size"] - columns["pixel_offset"])
    held = np.maximum(held, 0)
    add(
        native & (held < expected),
        Reason.PIXEL_DATA_SHORT,
        lambda i: (
            f"(7FE0,0010) Pixel Data holds {held[i]} bytes, Rows x Columns x Bits Allocated = "
            f"{columns['rows'][i]} x {columns['columns'][i]} x {bits[i]} need {expected[i]}"
        ),
    )


def _always(text: str, _: int) -> str:
    return text


def _find_scale_problems(columns: dict[str, Any], add: _Add) -> None:
    """Reject slopes and intercepts that are no numbers, or make numbers that nothing holds."""
    slope, intercept = columns["rescale_slope"], columns["rescale_intercept"]
    for label, column in (
        ("(0028,1052) Rescale Intercept", intercept),
        ("(0028,1053) Rescale Slope", slope),
    ):
        text = f"{label} is no finite number"
        add(~np.isfinite(column), Reason.UNSUPPORTED_PIXELS, partial(_always, text))
    add(slope == 0, Reason.UNSUPPORTED_PIXELS, lambda _: "(0028,1053) Rescale Slope is 0")
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.exp2(columns["bits_stored"].astype(float)) * np.abs(slope) + np.abs(intercept)
    add(
        largest > np.finfo(np.float32).max,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"Rescale Slope {slope[i]:g}, Intercept {intercept[i]:g}: beyond float32",
    )


# --- pixels ---------------------------------------------------------------------------------------

# How reading the pixels of one file ended.
_READ, _NOT_OPENED, _SIZE_CHANGED, _SHORT = 0, 1, 2, 3


@kernel
def _read_pixels(
    path_bytes: UInt8,
    path_offsets: Int64,
    sizes: Int64,
    pixel_offsets: Int64,
    out: UInt8,
    status: Int64,
) -> None:
    """Read the native pixels of many files straight into the rows of `out` (n, bytes)."""
    length = out.shape[1]
    for i in range(len(path_offsets)):
        fd = open_read_only(path_bytes, path_offsets[i])
        if fd < 0:
            status[i] = _NOT_OPENED
            continue
        if file_size(fd) != sizes[i]:
            status[i] = _SIZE_CHANGED
        elif read_at(fd, out[i], length, pixel_offsets[i]) != length:
            status[i] = _SHORT
        close(fd)


def read_images(
    root: str, slices: SliceRefs, out: NDArray[Any]
) -> tuple[NDArray[np.bool_], list[Problem]]:
    """Decode one frame per slice and rescale it: stored x slope + intercept (PS3.3 C.11.1).

    Parameters
    ----------
    root
        Directory that the paths of `slices` are relative to.
    slices
        n frames of rows x columns pixels.
    out
        (n, rows, columns), C-contiguous, the layout's image dtype; filled in place.

    Returns
    -------
    (n,) which slices were read, and a Problem for each of the others.
    """
    failed: dict[int, Problem] = {}
    for dtype in sorted(set(slices.stored_dtype)):
        index = [i for i, stored in enumerate(slices.stored_dtype) if stored == dtype]
        read = _read_native if dtype else _decode_files
        failed |= read(root, slices, index, out)
    good = np.ones(len(slices), bool)
    good[list(failed)] = False
    return good, [failed[i] for i in sorted(failed)]


def _read_native(
    root: str, slices: SliceRefs, index: list[int], out: NDArray[Any]
) -> dict[int, Problem]:
    """Read frames of one stored type; the problems by place."""
    direct = len(index) == len(slices) and _are_stored_as(slices, out.dtype)
    stored_dtype = slices.stored_dtype[index[0]]
    raw = out if direct else np.empty((len(index), *out.shape[1:]), stored_dtype)
    rows = raw.reshape(len(index), -1).view(np.uint8)
    packed, offsets = pack_paths([slices.path[i] for i in index], root)
    sizes = np.array(slices.file_size, np.int64)[index]
    starts = np.array(slices.pixel_offset, np.int64)[index]
    status = np.zeros(len(index), np.int64)
    _read_pixels(packed, offsets, sizes, starts, rows, status)
    if not direct:
        for k, i in enumerate(index):
            _rescale_into(out[i], mask_bits(raw[k], slices.bits_stored[i]), slices, i)
    wrong = np.flatnonzero(status).tolist()
    return {index[k]: _read_problem(root, slices, index[k], int(status[k])) for k in wrong}


def _are_stored_as(slices: SliceRefs, dtype: np.dtype[Any]) -> bool:
    """Whether the bytes of all files are those of the output."""
    return (
        {np.dtype(stored) for stored in set(slices.stored_dtype)} == {dtype}
        and set(slices.bits_stored) == {8 * dtype.itemsize}
        and set(slices.rescale_slope) == {1.0}
        and set(slices.rescale_intercept) == {0.0}
    )


def _read_problem(root: str, slices: SliceRefs, i: int, status: int) -> Problem:
    path = slices.path[i]
    if status == _NOT_OPENED:
        try:
            os.close(os.open(Path(root) / path, os.O_RDONLY))
            text = "could not be opened"
        except OSError as error:
            text = error.strerror or type(error).__name__
        return Problem(path, Reason.UNREADABLE_FILE, text)
    if status == _SIZE_CHANGED:
        text = f"the file had {slices.file_size[i]} bytes when it was scanned and has changed since"
        return Problem(path, Reason.FILE_CHANGED, text)
    text = f"the pixels at byte {slices.pixel_offset[i]} could not be read to their end"
    return Problem(path, Reason.UNREADABLE_FILE, text)


def mask_bits(stored: NDArray[Any], bits_stored: int) -> NDArray[Any]:
    """Drop what lies above Bits Stored (old overlays) and extend the sign (PS3.5 8.1.1)."""
    spare = 8 * stored.dtype.itemsize - bits_stored
    if spare == 0 or stored.dtype.kind not in "iu":
        return stored
    return (stored << spare) >> spare


def _rescale_into(out: NDArray[Any], stored: NDArray[Any], slices: SliceRefs, i: int) -> None:
    """Write stored x slope + intercept of slice i into `out`, computed in float64."""
    slope, intercept = slices.rescale_slope[i], slices.rescale_intercept[i]
    if (slope, intercept) == (1.0, 0.0):
        out[...] = stored
    else:
        out[...] = stored.astype(np.float64) * slope + intercept


def _decode_files(
    root: str, slices: SliceRefs, index: list[int], out: NDArray[Any]
) -> dict[int, Problem]:
    """Decode frames one by one through pydicom; the problems by place."""
    failed: dict[int, Problem] = {}
    for i in index:
        path = slices.path[i]
        try:
            stored = decode_file(Path(root) / path)
        except OSError as error:
            text = error.strerror or type(error).__name__
            failed[i] = Problem(path, Reason.UNREADABLE_FILE, text)
            continue
        except Exception as error:  # noqa: BLE001 broken files make pydicom raise anything
            kind = type(error).__name__
            text = f"no decoder could read the frame ({kind}); is one for its syntax installed?"
            failed[i] = Problem(path, Reason.UNDECODABLE_PIXELS, text)
            continue
        if stored.shape == out.shape[1:]:
            _rescale_into(out[i], stored, slices, i)
        else:
            text = (
                f"decoded to {' x '.join(map(str, stored.shape))} pixels, "
                f"the header says {out.shape[1]} x {out.shape[2]}"
            )
            failed[i] = Problem(path, Reason.IMAGE_SIZE_DIFFERS, text)
    return failed


def decode_file(file: Path) -> NDArray[Any]:
    """Stored values of a file's frame through pydicom: the slow, obvious twin of the fast path."""
    from pydicom import dcmread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = dcmread(file)
        stored: NDArray[Any] = dataset.pixel_array
        bits = int(dataset.get("BitsStored", 8 * stored.dtype.itemsize))
    return mask_bits(stored, bits)
