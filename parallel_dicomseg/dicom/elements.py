"""Which elements of a header the scan keeps, and how their values become columns.

Both walks, the compiled one and pydicom's, give the raw bytes of these elements and where each
lies (`Values`); what they mean is decided here, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.attributes import ALLOWED_ATTRIBUTES, DATE_ATTRIBUTES
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.records import Bytes, Float64, HeaderColumn, Headers, Int32, Int64, UInt8
from parallel_dicomseg.text import parse_decimals

MEDIA_STORAGE_SOP_CLASS_UID = 0x00020002
TRANSFER_SYNTAX_UID = 0x00020010
SOP_CLASS_UID = 0x00080016
FRAME_TYPE = 0x00089007
ROWS = 0x00280010
MODALITY_LUT_SEQUENCE = 0x00283000
SHARED_GROUPS = 0x52009229
PER_FRAME_GROUPS = 0x52009230
NUMBER_OF_FRAMES = 0x00280008
FLOAT_PIXEL_DATA = 0x7FE00008
DOUBLE_FLOAT_PIXEL_DATA = 0x7FE00009
PIXEL_DATA = 0x7FE00010

_TEXT: dict[str, tuple[int, str]] = {
    "media_storage_sop_class_uid": (MEDIA_STORAGE_SOP_CLASS_UID, "UI"),
    "transfer_syntax_uid": (TRANSFER_SYNTAX_UID, "UI"),
    "image_type": (0x00080008, "CS"),
    "sop_class_uid": (SOP_CLASS_UID, "UI"),
    "sop_instance_uid": (0x00080018, "UI"),
    "modality": (0x00080060, "CS"),
    "frame_type": (FRAME_TYPE, "CS"),
    "patient_id": (0x00100020, "LO"),
    "study_instance_uid": (0x0020000D, "UI"),
    "series_instance_uid": (0x0020000E, "UI"),
    "frame_of_reference_uid": (0x00200052, "UI"),
    "photometric_interpretation": (0x00280004, "CS"),
}
# name -> (tag, VR, value where absent); -1 stands for one that is malformed too
_WHOLE: dict[str, tuple[int, str, int]] = {
    "temporal_position_index": (0x00209128, "UL", -1),
    "frame_acquisition_number": (0x00209156, "US", -1),
    "samples_per_pixel": (0x00280002, "US", 1),
    "rows": (ROWS, "US", -1),
    "columns": (0x00280011, "US", -1),
    "bits_allocated": (0x00280100, "US", -1),
    "bits_stored": (0x00280101, "US", -1),
    "high_bit": (0x00280102, "US", -1),
    "pixel_representation": (0x00280103, "US", 0),
}
# name -> (tag, VR, how many numbers, value where absent); NaN for what is malformed
_DECIMAL: dict[str, tuple[int, str, int, float]] = {
    "slice_thickness": (0x00180050, "DS", 1, np.nan),
    "trigger_time": (0x00181060, "DS", 1, np.nan),
    "acquisition_number": (0x00200012, "IS", 1, np.nan),
    "instance_number": (0x00200013, "IS", 1, np.nan),
    "image_position_patient": (0x00200032, "DS", 3, np.nan),
    "image_orientation_patient": (0x00200037, "DS", 6, np.nan),
    "temporal_position_identifier": (0x00200100, "IS", 1, np.nan),
    "number_of_frames": (NUMBER_OF_FRAMES, "IS", 1, 1.0),
    "pixel_spacing": (0x00280030, "DS", 2, np.nan),
    "rescale_intercept": (0x00281052, "DS", 1, 0.0),
    "rescale_slope": (0x00281053, "DS", 1, 1.0),
}
_TRIGGER_DELAY = 0x00209153  # Nominal Cardiac Trigger Delay Time of enhanced images, ms
_PALETTE_DESCRIPTOR = 0x00281101  # Red Palette Color Lookup Table Descriptor
_NEEDED: dict[int, str] = {
    _TRIGGER_DELAY: "FD",
    _PALETTE_DESCRIPTOR: "US",
    **dict(_TEXT.values()),
    **{tag: vr for tag, vr, _ in _WHOLE.values()},
    **{tag: vr for tag, vr, _, _ in _DECIMAL.values()},
}
#: What says that a header cannot be understood from its top level alone.
SEQUENCES = (MODALITY_LUT_SEQUENCE, SHARED_GROUPS, PER_FRAME_GROUPS)
#: keyword -> (tag, VR) of the dictionary.
ATTRIBUTES = {**DATE_ATTRIBUTES, **ALLOWED_ATTRIBUTES}

_ATTRIBUTE_VRS: dict[int, str] = dict(ATTRIBUTES.values())
#: tag -> VR of everything that is kept; ascending as in every DICOM file (PS3.5 7.1).
KEPT = dict(sorted((_ATTRIBUTE_VRS | _NEEDED | dict.fromkeys(SEQUENCES, "SQ")).items()))
TAGS = np.array(list(KEPT), dtype=np.int64)
#: The column of each tag in what the walks return.
SLOT = {tag: slot for slot, tag in enumerate(KEPT)}

LONGEST_NEEDED, LONGEST_ATTRIBUTE = 256, 64
#: (s,) longest value in bytes that a walk keeps; negative: a longer one is merely left out,
#: 0: a sequence, of which only the place is kept.
LIMITS = np.array(
    [
        0 if vr == "SQ" else LONGEST_NEEDED if tag in _NEEDED else -LONGEST_ATTRIBUTE
        for tag, vr in KEPT.items()
    ],
    dtype=np.int64,
)
#: No header fills more, so that nothing needs to be checked while it is read.
MOST_BYTES = int(np.abs(LIMITS).sum())

#: What may stand in a functional group and then holds for a frame (PS3.3 C.7.6.16); never what
#: identifies the image or says how its pixels are stored.
PER_FRAME = frozenset(
    {
        FRAME_TYPE,
        _TRIGGER_DELAY,
        *(
            _DECIMAL[name][0]
            for name in (
                "slice_thickness",
                "trigger_time",
                "acquisition_number",
                "image_position_patient",
                "image_orientation_patient",
                "temporal_position_identifier",
                "pixel_spacing",
                "rescale_intercept",
                "rescale_slope",
            )
        ),
        *(_WHOLE[name][0] for name in ("temporal_position_index", "frame_acquisition_number")),
        *(tag for tag, _ in ALLOWED_ATTRIBUTES.values()),
    }
)

_TEXT_VRS = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI")
) | {"UR", "UT"}
BINARY_DTYPE = {"US": "<u2", "SS": "<i2", "UL": "<u4", "SL": "<i4", "FL": "<f4", "FD": "<f8"}
_NUMBER = rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CODE = rb"[A-Za-z0-9 _.+/-]{0,16}"
_CONFORMING = {
    "DS": re.compile(rb"%b(?:\\%b)*" % (_NUMBER, _NUMBER)),
    "IS": re.compile(rb"[+-]?\d+(?:\\[+-]?\d+)*"),
    "CS": re.compile(rb"%b(?:\\%b)*" % (_CODE, _CODE)),
    "DA": re.compile(rb"\d{8}"),
}


def vr_code(vr: str) -> int:
    """The two letters as the walks compare them."""
    return ord(vr[0]) | ord(vr[1]) << 8


def vr_kind(vr: str) -> int:
    """VRs of one kind are written alike: all text 1, each binary one its own, 0 for no VR."""
    if vr in _TEXT_VRS:
        return 1
    return 2 + list(BINARY_DTYPE).index(vr) if vr in BINARY_DTYPE else 0


@dataclass(frozen=True, slots=True)
class Values:
    """Raw values of the kept elements of m headers."""

    raw: UInt8
    """(b,) bytes, numbers in little-endian order."""
    spans: Int64
    """(m, s, 2) where in `raw` each value begins, and its length; 0 for none. Of SEQUENCES: where
    in the file the value begins, and its length there, -1 for an undefined one."""

    def of_row(self, row: int) -> Values:
        """One header as (1, s, 2) spans into bytes of its own."""
        spans = np.zeros_like(self.spans[:1])
        parts = []
        filled = 0
        for slot in np.flatnonzero((self.spans[row, :, 1] > 0) & (LIMITS != 0)).tolist():
            start, length = self.spans[row, slot].tolist()
            parts.append(self.raw[start : start + length])
            spans[0, slot] = filled, length
            filled += length
        return Values(np.concatenate([np.empty(0, np.uint8), *parts]), spans)


def value_of(values: Values, row: int, tag: int) -> bytes:
    """One value without its padding."""
    start, length = values.spans[row, SLOT[tag]].tolist()
    return values.raw[start : start + length].tobytes().strip(b" \0")


def overlay(below: Values, above: Values) -> Values:
    """What `above` has goes before what `below` has; the one with a single row holds for all."""
    shift = np.zeros(2, np.int64)
    shift[0] = len(below.raw)
    spans = np.where(above.spans[:, :, 1:] > 0, above.spans + shift, below.spans)
    return Values(np.concatenate([below.raw, above.raw]), spans)


def pack(elements: list[dict[int, bytes]]) -> Values:
    """Headers as dictionaries from tag to raw value, one under the other."""
    spans = np.zeros((len(elements), len(TAGS), 2), np.int64)
    filled = 0
    for row, header in enumerate(elements):
        for tag, value in header.items():
            spans[row, SLOT[tag]] = filled, len(value)
            filled += len(value)
    joined = bytearray().join(value for header in elements for value in header.values())
    return Values(np.frombuffer(joined, np.uint8), spans)


def concatenate_values(parts: list[Values]) -> Values:
    """Several tables of values under one another."""
    if len(parts) == 1:
        return parts[0]
    parts = parts or [pack([])]
    starts = np.cumsum([0, *(len(part.raw) for part in parts)])
    spans = np.concatenate([part.spans for part in parts])
    shift = np.repeat(starts[:-1], [len(part.spans) for part in parts])
    spans[:, LIMITS != 0, 0] += shift[:, None]
    return Values(np.concatenate([part.raw for part in parts]), spans)


@dataclass(frozen=True, slots=True)
class Distinct:
    """The values of `Values`, each different one once: most are the same in a whole series."""

    values: Values
    code: Int32
    """(s, m) which of the different values each header has."""
    first: Int32
    """(s, m) the first header that has a value, for `count` values."""
    count: Int32
    """(s,) how many different values there are."""

    def spread(self, tag: int, convert: Callable[[UInt8, Int64], Any]) -> Any:
        """(m, …) column of a tag: `convert` of the different values (raw, (k, 2)), spread out."""
        slot = SLOT[tag]
        spans = self.values.spans[self.first[slot, : self.count[slot]], slot]
        return convert(self.values.raw, spans)[self.code[slot]]


def find_distinct(values: Values) -> Distinct:
    """Find equal values among the headers, tag by tag."""
    rows, slots, _ = values.spans.shape
    code = np.zeros((slots, rows), np.int32)
    first = np.zeros((slots, rows), np.int32)
    count = np.zeros(slots, np.int32)
    _find_distinct(values.raw, values.spans, LIMITS, code, first, count)
    return Distinct(values, code, first, count)


@kernel
def _is_same(raw: UInt8, start: int, other: int, length: int) -> bool:
    """Whether two values of one length are equal; backwards, as UIDs differ at their ends."""
    k = length - 1
    while k >= 0 and raw[start + k] == raw[other + k]:
        k -= 1
    return k < 0


@kernel
def _hash(raw: UInt8, start: int, length: int) -> int:
    """A hash of 31 bits (FNV-1a)."""
    state = np.int64(2166136261)
    for k in range(length):
        state = ((state ^ np.int64(raw[start + k])) * np.int64(16777619)) & 0xFFFFFFFF
    return int(state >> 1)


@kernel
def _find_distinct(
    raw: UInt8, spans: Int64, limits: Int64, code: Int32, first: Int32, count: Int32
) -> None:
    """Number the different values of each tag in the order of their first header."""
    rows = len(spans)
    size = 16
    while size < 2 * rows:
        size *= 2
    table = np.empty(size, np.int32)
    for slot in range(len(limits)):
        if limits[slot] == 0:
            continue
        table[:] = -1
        known = 0
        for i in range(rows):
            start, length = spans[i, slot, 0], spans[i, slot, 1]
            if (
                i > 0
                and length == spans[i - 1, slot, 1]
                and _is_same(raw, start, spans[i - 1, slot, 0], length)
            ):
                code[slot, i] = code[slot, i - 1]
                continue
            place = _hash(raw, start, length) & (size - 1)
            while table[place] >= 0:
                row = first[slot, table[place]]
                if length == spans[row, slot, 1] and _is_same(
                    raw, start, spans[row, slot, 0], length
                ):
                    break
                place = (place + 1) & (size - 1)
            if table[place] < 0:
                table[place] = known
                first[slot, known] = i
                known += 1
            code[slot, i] = table[place]
        count[slot] = known


def columns_of(distinct: Distinct) -> dict[str, Any]:
    """Every needed element as a column (m,) or (m, count)."""
    columns: dict[str, Any] = {
        name: distinct.spread(tag, text_column) for name, (tag, _) in _TEXT.items()
    }
    for name, (tag, vr, absent) in _WHOLE.items():
        columns[name] = distinct.spread(tag, partial(_whole_column, vr, absent))
    for name, (tag, _, count, fill) in _DECIMAL.items():
        column = distinct.spread(tag, partial(decimal_column, count, fill))
        columns[name] = column[:, 0] if count == 1 else column
    columns["trigger_delay"] = distinct.spread(_TRIGGER_DELAY, _double_column)
    columns["palette_bits"] = distinct.spread(_PALETTE_DESCRIPTOR, _descriptor_bits)
    return columns


def headers_of(distinct: Distinct) -> Headers:
    """The attributes for the dictionary that at least one header has."""
    raw = distinct.values.raw.tobytes()
    headers: Headers = {}
    absent = (distinct.count == 1) & ~distinct.values.spans[:1, :, 1].any(axis=0)
    for keyword, (tag, vr) in ATTRIBUTES.items():
        slot = SLOT[tag]
        if absent[slot]:
            continue
        count = int(distinct.count[slot])
        spans = distinct.values.spans[distinct.first[slot, :count], slot]
        texts = [attribute_text(vr, raw[at : at + size]) for at, size in spans.tolist()]
        if any(texts):
            headers[keyword] = number_values(texts, distinct.code[slot])
    return headers


def number_values(texts: list[bytes], code: Int32) -> HeaderColumn:
    """A column of the values that `code` chooses from `texts`: each once, ascending."""
    used = np.bincount(code, minlength=len(texts)) > 0
    values = sorted({text for text, is_used in zip(texts, used.tolist(), strict=True) if is_used})
    number = {text: k for k, text in enumerate(values)}
    renumbered = np.array([number.get(text, 0) for text in texts], np.int32)
    return HeaderColumn(np.array(values or [b""], np.bytes_), renumbered[code])


def attribute_text(vr: str, raw: bytes) -> bytes:
    r"""A value as text, several separated by a backslash; b'' for what its VR does not allow.

    So that a name which somebody typed into a field for a number goes nowhere.
    """
    if vr in BINARY_DTYPE:
        return _number_text(vr, raw)
    text = raw.strip(b" \0")
    if b"\\" in text:
        text = b"\\".join(part.strip(b" \0") for part in text.split(b"\\"))
    return text if _CONFORMING[vr].fullmatch(text) else b""


def _number_text(vr: str, raw: bytes) -> bytes:
    dtype = np.dtype(BINARY_DTYPE[vr])
    if len(raw) % dtype.itemsize:
        return b""
    numbers = np.frombuffer(raw, dtype)
    return b"\\".join(str(n).encode() for n in numbers) if np.isfinite(numbers).all() else b""


def narrowed(column: Bytes) -> Bytes:
    """Text in a column that is no wider than the longest of it."""
    return column.astype(f"S{max(int(np.char.str_len(column).max(initial=1)), 1)}")


@kernel
def _trim(raw: UInt8, spans: Int64) -> Int64:
    """The places of values (k, 2) without the padding round them."""
    trimmed = np.empty_like(spans)
    for i in range(len(spans)):
        start, length = spans[i, 0], spans[i, 1]
        while length > 0 and raw[start + length - 1] <= 32:
            length -= 1
        while length > 0 and raw[start] == 32:
            start += 1
            length -= 1
        trimmed[i, 0] = start
        trimmed[i, 1] = length
    return trimmed


@kernel
def _gather(raw: UInt8, spans: Int64, separator: int, out: UInt8) -> None:
    """Copy one value per row into `out` (k, width), padded on the right with `separator`."""
    for i in range(len(out)):
        start, length = spans[i, 0], spans[i, 1]
        for k in range(length):
            out[i, k] = raw[start + k]
        for k in range(length, out.shape[1]):
            out[i, k] = separator


def text_column(raw: UInt8, spans: Int64) -> Bytes:
    """(k,) values without the padding of the file, and no wider than the longest."""
    trimmed = _trim(raw, spans)
    width = max(int(trimmed[:, 1].max(initial=0)), 1)
    out = np.empty((len(spans), width), np.uint8)
    _gather(raw, trimmed, 0, out)
    column: Bytes = out.view(f"S{width}")[:, 0]
    return column


def _whole_column(vr: str, absent: int, raw: UInt8, spans: Int64) -> Int64:
    """(k,) numbers of a US or UL element; `absent` without one, -1 where it has another length."""
    size = np.dtype(BINARY_DTYPE[vr]).itemsize
    numbers = [
        int.from_bytes(raw[at : at + size].tobytes(), "little") if length == size else -1
        for at, length in spans.tolist()
    ]
    return np.where(spans[:, 1] == 0, absent, np.array(numbers, np.int64))


def _double_column(raw: UInt8, spans: Int64) -> Float64:
    """(k,) numbers of an FD element; NaN where it is absent or malformed."""
    numbers = [
        float(raw[at : at + 8].view("<f8")[0]) if length == 8 else np.nan
        for at, length in spans.tolist()
    ]
    return np.array(numbers, np.float64)


def _descriptor_bits(raw: UInt8, spans: Int64) -> Int64:
    """(k,) third number of a lookup table's descriptor (PS3.3 C.7.6.3.1.5); -1 without one."""
    numbers = [int(raw[at + 4]) if length == 6 else -1 for at, length in spans.tolist()]
    return np.array(numbers, np.int64)


def decimal_column(count: int, absent: float, raw: UInt8, spans: Int64) -> Float64:
    """Numbers of a DS or IS element, (k, count); `absent` without one, NaN where malformed.

    All plain rows are parsed in one go, so each of them must hold exactly `count` numbers: one
    more or less would move those of every row below. The others are decided one by one.
    """
    trimmed = _trim(raw, spans)
    out = np.full((len(spans), count), absent)
    text = np.empty((len(spans), int(trimmed[:, 1].max(initial=0)) + 1), np.uint8)
    _gather(raw, trimmed, 32, text)
    filled = text > 32
    plain = _is_plain(text, filled, count)
    try:
        out[plain] = parse_decimals(text[plain].ravel()).reshape(-1, count)
    except ValueError:
        plain[:] = False
    for i in np.flatnonzero(filled.any(axis=1) & ~plain):
        out[i] = _floats(text[i].tobytes(), count)
    return out


def _is_plain(text: UInt8, filled: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """(k,) rows of `count` values with a backslash between two and nothing else around them."""
    length = filled.sum(axis=1)
    unbroken = np.arange(text.shape[1]) < length[:, None]
    backslash = text == 92
    lonely = backslash & (np.roll(backslash, 1, axis=1) | ~np.roll(filled, -1, axis=1))
    plain: NDArray[np.bool_] = (
        (length > 0)
        & (filled == unbroken).all(axis=1)
        & (backslash.sum(axis=1) == count - 1)
        & ~backslash[:, 0]
        & ~lonely.any(axis=1)
        & ~(text == 44).any(axis=1)
    )
    return plain


def _floats(text: bytes, count: int) -> list[float]:
    """The values of one element; all NaN unless there are `count` finite numbers."""
    try:
        numbers = [float(part) for part in text.decode("ascii").split("\\")]
    except ValueError:
        return [np.nan] * count
    good = len(numbers) == count and bool(np.isfinite(numbers).all())
    return numbers if good else [np.nan] * count
