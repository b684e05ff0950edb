"""What rules an image out before anything of it is decoded (PS3.3 C.7.6.3, C.11.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.slow_headers import (
    DEFLATED,
    EXPLICIT_BIG_ENDIAN,
    EXPLICIT_LITTLE_ENDIAN,
    IMPLICIT_LITTLE_ENDIAN,
)
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import Int64, Problem, Reason

NATIVE_LITTLE_ENDIAN = (IMPLICIT_LITTLE_ENDIAN, EXPLICIT_LITTLE_ENDIAN)
_NATIVE = (*NATIVE_LITTLE_ENDIAN, EXPLICIT_BIG_ENDIAN)

_DEFLATED = (*DEFLATED, b"1.2.840.10008.1.2.8.1")

GREY = (b"", b"MONOCHROME1", b"MONOCHROME2")
PALETTE = b"PALETTE COLOR"
# photometric interpretation -> samples per pixel that a file without compression holds, times two
_COLOR = {
    b"RGB": 6,
    b"YBR_FULL": 6,
    b"YBR_RCT": 6,
    b"YBR_ICT": 6,
    b"YBR_FULL_422": 4,
    b"YBR_PARTIAL_422": 4,
    b"YBR_PARTIAL_420": 3,
}
# How many times its own size an encoding can unpack to at most: two bytes of RLE are 128 (PS3.5
# G.3.1), deflate's longest match is 258 bytes for two bits (RFC 1951).
_MOST_UNPACKED = ((b"1.2.840.10008.1.2.5", 64), *((uid, 1032) for uid in _DEFLATED))
# The head of a fragment and the shortest content (PS3.5 A.4).
_LEAST_FRAME = 10
#: Smaller frames may be any number of times as large as their file: an empty one takes few bytes.
LARGE_FRAME_BYTES = 2**25
_BITS_ALLOCATED = (1, 8, 16, 24, 32, 40, 48, 56, 64)
_NEEDED = {
    "rows": "(0028,0010) Rows",
    "columns": "(0028,0011) Columns",
    "bits_allocated": "(0028,0100) Bits Allocated",
    "bits_stored": "(0028,0101) Bits Stored",
}

_Add = Callable[[NDArray[np.bool_], Reason, Callable[[int], str]], None]
"""Takes which rows are wrong, why, and the words for a row."""


def find_problems(columns: dict[str, Any], paths: Sequence[str]) -> dict[int, Problem]:
    """The first thing that is wrong with each of n headers, by their place.

    `columns` are those of `elements.columns_of` and of the files: `pixel_offset`, `pixel_length`,
    `file_size`, `pixels_are_float`, `items`, each (n,).
    """
    problems: dict[int, Problem] = {}

    def add(wrong: NDArray[np.bool_], reason: Reason, text: Callable[[int], str]) -> None:
        for i in np.flatnonzero(wrong).tolist():
            problems.setdefault(i, Problem(paths[i], reason, text(i)))

    _find_large_files(columns, add)
    _find_missing_tags(columns, add)
    _find_wrong_frames(columns, add)
    _find_wrong_samples(columns, add)
    _find_impossible_bits(columns, add)
    _find_short_pixels(columns, add)
    _find_impossible_sizes(columns, add)
    _find_large_frames(columns, add)
    _find_scale_problems(columns, add)
    return problems


def _missing(label: str, column: NDArray[Any], i: int) -> str:
    return f"{label} is missing or malformed" if column[i] < 0 else f"{label} is 0"


def _find_large_files(columns: dict[str, Any], add: _Add) -> None:
    """Reject what is larger than the limits allow before any of its pixels are read."""
    size, offset = columns["file_size"], columns["pixel_offset"]
    most, most_header = limits().file_bytes, limits().header_bytes
    add(
        size > most,
        Reason.UNREADABLE_FILE,
        lambda i: f"{size[i]} bytes, limit {most}",
    )
    add(
        offset > most_header,
        Reason.UNREADABLE_FILE,
        lambda i: f"a header of {offset[i]} bytes, limit {most_header}",
    )


def _find_large_frames(columns: dict[str, Any], add: _Add) -> None:
    """Reject frames that are large as such, or far too large for their file."""
    rows, width, size = columns["rows"], columns["columns"], columns["file_size"]
    most, expansion = limits().image_pixels, limits().expansion
    add(
        rows.astype(np.int64) * width > most,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"Rows x Columns = {rows[i]} x {width[i]} pixels, limit {most}",
    )
    frames, encoded = columns["number_of_frames"], columns["pixel_length"] < 0
    add(
        encoded & (frames * _LEAST_FRAME > size),
        Reason.PIXEL_DATA_SHORT,
        lambda i: f"(0028,0008) Number of Frames is {frames[i]:g} in a file of {size[i]} bytes",
    )
    frame = pixel_bytes(columns, np.ones(len(rows)))
    add(
        frame > np.maximum(LARGE_FRAME_BYTES, expansion * size),
        Reason.PIXEL_DATA_SHORT,
        lambda i: (
            f"Rows x Columns = {rows[i]} x {width[i]} need {frame[i]} bytes, more than "
            f"{expansion} times the file's {size[i]}"
        ),
    )


def _find_missing_tags(columns: dict[str, Any], add: _Add) -> None:
    """Reject what has no size or depth."""
    for name, label in _NEEDED.items():
        add(columns[name] <= 0, Reason.MISSING_TAG, partial(_missing, label, columns[name]))


def _find_wrong_frames(columns: dict[str, Any], add: _Add) -> None:
    """Reject numbers of frames that are none, too many, or not those of the functional groups."""
    frames, items = columns["number_of_frames"], columns["items"]
    most = limits().frames
    possible = (frames >= 1) & (frames <= most) & (frames == np.rint(frames))
    add(
        ~possible,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"(0028,0008) Number of Frames is {frames[i]:g}, 1 to {most} are read",
    )
    add(
        (items > 0) & (items != frames),
        Reason.UNSUPPORTED_PIXELS,
        lambda i: (
            f"(5200,9230) Per-frame Functional Groups Sequence has {items[i]} items, "
            f"(0028,0008) Number of Frames is {frames[i]:g}"
        ),
    )


def _find_wrong_samples(columns: dict[str, Any], add: _Add) -> None:
    """Reject colours that are not known, and another number of samples than they have."""
    interpretation, samples = columns["photometric_interpretation"], columns["samples_per_pixel"]
    single = np.isin(interpretation, (*GREY, PALETTE))
    add(
        ~single & ~np.isin(interpretation, tuple(_COLOR)),
        Reason.UNSUPPORTED_PIXELS,
        lambda _: "(0028,0004) Photometric Interpretation is neither grey, palette, RGB nor YBR",
    )
    needed = np.where(single, 1, 3)
    add(
        samples != needed,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: (
            f"(0028,0002) Samples per Pixel is {samples[i]}, "
            f"(0028,0004) Photometric Interpretation needs {needed[i]}"
        ),
    )


def _find_impossible_bits(columns: dict[str, Any], add: _Add) -> None:
    """Reject bits that cannot be where the header says."""
    allocated, stored = columns["bits_allocated"], columns["bits_stored"]
    high_bit = columns["high_bit"]
    add(
        ~np.isin(allocated, _BITS_ALLOCATED),
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"(0028,0100) Bits Allocated is {allocated[i]}, it can be 1 or 8 to 64 by eights",
    )
    add(
        stored > allocated,
        Reason.UNSUPPORTED_PIXELS,
        lambda i: (
            f"(0028,0101) Bits Stored is {stored[i]}, (0028,0100) Bits Allocated {allocated[i]}"
        ),
    )
    add(
        (high_bit >= 0) & ((high_bit < stored - 1) | (high_bit >= allocated)),
        Reason.UNSUPPORTED_PIXELS,
        lambda i: (
            f"(0028,0102) High Bit is {high_bit[i]}, with (0028,0101) Bits Stored {stored[i]} and "
            f"(0028,0100) Bits Allocated {allocated[i]}"
        ),
    )
    representation = columns["pixel_representation"]
    add(
        ~np.isin(representation, (0, 1)),
        Reason.UNSUPPORTED_PIXELS,
        lambda i: f"(0028,0103) Pixel Representation is {representation[i]}, it can be 0 or 1",
    )


def _find_short_pixels(columns: dict[str, Any], add: _Add) -> None:
    """Reject native pixels that end too early."""
    native = np.isin(columns["transfer_syntax_uid"], _NATIVE)
    expected = pixel_bytes(columns)
    held = np.where(
        columns["pixel_offset"] < 0,
        columns["pixel_length"],
        np.minimum(columns["pixel_length"], columns["file_size"] - columns["pixel_offset"]),
    )
    held = np.maximum(held, 0)
    frames, bits = columns["number_of_frames"], columns["bits_allocated"]
    add(
        native & (held < expected),
        Reason.PIXEL_DATA_SHORT,
        lambda i: (
            f"(7FE0,0010) Pixel Data holds {held[i]} bytes, "
            f"Rows x Columns x Bits Allocated = "
            f"{columns['rows'][i]} x {columns['columns'][i]} x {bits[i]} "
            f"in {frames[i]:g} frame(s) need {expected[i]}"
        ),
    )


def _find_impossible_sizes(columns: dict[str, Any], add: _Add) -> None:
    """Reject more pixels than the whole file could unpack to: one claim makes all images large."""
    expected, size = pixel_bytes(columns), columns["file_size"]
    for syntax, most in _MOST_UNPACKED:
        add(
            (columns["transfer_syntax_uid"] == syntax) & (expected > most * size),
            Reason.PIXEL_DATA_SHORT,
            lambda i: (
                f"Rows x Columns = {columns['rows'][i]} x {columns['columns'][i]} in "
                f"{columns['number_of_frames'][i]:g} frame(s) need {expected[i]} bytes, more than "
                f"a file of {size[i]} bytes can unpack to"
            ),
        )


def pixel_bytes(columns: dict[str, Any], frames: NDArray[Any] | None = None) -> Int64:
    """(n,) bytes of native pixels in all frames of a file, or in as many as given (PS3.5 8.1.1)."""
    halves = np.full(len(columns["rows"]), 2, np.int64)
    for name, count in _COLOR.items():
        halves[columns["photometric_interpretation"] == name] = count
    counts = columns["number_of_frames"] if frames is None else frames
    # out of range here is out of every file too; and the guards before have told what is no number
    whole = np.clip(np.nan_to_num(counts, nan=1.0), 1, limits().frames).astype(np.int64)
    pixels = columns["rows"].astype(np.int64) * columns["columns"]
    bits: Int64 = pixels * halves // 2 * whole * columns["bits_allocated"]
    return np.maximum((bits + 7) // 8, 0)


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
