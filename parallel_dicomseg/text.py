"""Numbers out of text: contour files and decimal strings, parsed in compiled code without the GIL.

The kernels know the usual spelling and no more. Whatever they do not know for certain (an
over-long number, a word, a file that cannot be opened) goes to plain Python, which decides it and
words the error; so there is one place that says what is valid, and it is easy to read.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg import posix
from parallel_dicomseg.files import read_regular
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import Float64, Int64

#: No image has a pixel out there, and a mask of such an outline takes arithmetic of many digits.
MAX_COORDINATE = 2.0**31

# No point takes as many characters.
_LONGEST_LINE = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANKS = b" \t\v\f"
_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_VALUE = re.compile(rb"[^\s,\\]*")
_SEPARATOR = re.compile(rb"[ \t\v\f]*,[ \t\v\f]*|[ \t\v\f]+")

_POWERS_OF_TEN = 10.0 ** np.arange(23)
"""Exact: 10**22 is the largest power of ten that a float64 holds without rounding."""
_POWERS_OF_FIVE = 5 ** np.arange(27, dtype=np.int64)
"""5**26 < 2**62, so that a remainder can be doubled in an int64."""

# Odd factors of XXH64 (Collet 2012).
_PRIME_1 = np.uint64(0x9E3779B185EBCA87)
_PRIME_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_ONE, _EIGHT, _TURN, _REST, _HALF = (np.uint64(bits) for bits in (1, 8, 27, 37, 32))


@dataclass(frozen=True, slots=True)
class ContourFiles:
    """The outlines of r text files, flat, as the files have them."""

    points_column_row: Float64
    """(p, 2) pixels, column first; the first point repeated at the end is left out."""
    offsets: Int64
    """(r + 1,) file k is points[offsets[k]:offsets[k + 1]]; no points where it has an error."""
    digest: NDArray[np.uint64]
    """(r,) digest of each file's raw bytes; 0 only where the file could not be read."""
    errors: tuple[tuple[int, str], ...]
    """Index of the file and what is wrong with it; the text names no path."""


def parse_decimals(raw: NDArray[np.uint8]) -> Float64:
    r"""All decimal numbers in raw text bytes, each bit-equal to Python's `float` of its token.

    Parameters
    ----------
    raw : (b,) uint8
        ASCII text; values stand apart by white space, or by one comma or backslash with or without
        white space round it. DICOM decimal strings (PS3.5 6.2, VR DS) are such text.

    Returns
    -------
    (n,) float64

    Raises
    ------
    ValueError
        If a value is empty, not a number or not finite: its place and line are named, its text
        (which may be anybody's name) is not.

    Notes
    -----
    Up to 15 digits take the exact division by a power of ten of Clinger (1990), up to 17 an
    integer division; the rare rest is left to Python.
    """
    values, starts, known = _decimals(np.ascontiguousarray(raw))
    unknown = np.flatnonzero(~known).tolist()
    if unknown:
        text = raw.tobytes()
        for index in unknown:
            values[index] = _decided(text, index, int(starts[index]))
    return values


def parse_decimal_lists(
    raw: NDArray[np.uint8], offsets: Int64
) -> tuple[Float64, Int64, NDArray[np.bool_]]:
    r"""The numbers of r decimal strings that stand one after another, in one go.

    Parameters
    ----------
    raw : (b,) uint8
        Bytes of all strings: numbers with one backslash between them, blanks round each, and blanks
        or NULs at the end (DICOM PS3.5 6.2, VR DS).
    offsets : (r + 1,) int64
        String k is raw[offsets[k]:offsets[k + 1]].

    Returns
    -------
    (n,) float64
        All numbers, each bit-equal to Python's `float` of its token.
    (r + 1,) int64
        Where the numbers of each string begin; none where it is not known.
    (r,) bool
        Whether it is known. It is not where the string is empty or anything else than said above,
        where a number is beyond `MAX_COORDINATE`, or needs more than the kernel's arithmetic:
        `parse_decimals` decides.
    """
    return _decimal_lists(raw, offsets)


def read_contour_files(paths: Sequence[str], folder: str = "") -> ContourFiles:
    """Read text files of one outline each: a line per point, column then row.

    A line is two numbers separated by white space or one comma. Blank lines, any kind of line end,
    a UTF-8 byte order mark and the first point repeated at the end are tolerated. Anything else,
    a coordinate beyond `MAX_COORDINATE` and fewer than three points are an error of that file,
    never of the call.

    Parameters
    ----------
    paths : sequence of str
        r paths, relative to `folder` where that is given.
    folder : str
        Directory of all of them.

    Returns
    -------
    ContourFiles
    """
    if not posix.AVAILABLE:
        return _joined([_read_outline(os.path.join(folder, path)) for path in paths])  # noqa: PTH118
    most = limits()
    points, offsets, digest, known = _read_outlines(
        *posix.pack_paths(paths, folder), most.contour_bytes, most.contour_points
    )
    if known.all():
        return ContourFiles(points, offsets, digest, ())
    return _joined(
        [
            _Outline(points[start:stop], value)
            if good
            else _read_outline(os.path.join(folder, path))  # noqa: PTH118
            for path, (start, stop), value, good in zip(
                paths, pairwise(offsets.tolist()), digest.tolist(), known.tolist(), strict=True
            )
        ]
    )


def parse_contour(raw: bytes) -> Float64:
    """The outline in the bytes of one contour file; the plain twin of the kernel.

    Returns
    -------
    (p, 2) float64
        Column and row of each point, p >= 3, without a closing repetition of the first.

    Raises
    ------
    ValueError
        Naming the line and the value on it, or the number of points; never what the file says.
    """
    most = limits().contour_points
    if max(raw.count(b"\n"), raw.count(b"\r")) > most + 1:
        raise ValueError(f"more than {most} lines")
    lines = raw.removeprefix(_BYTE_ORDER_MARK).splitlines()
    points = [
        _point(line.strip(_BLANKS), number)
        for number, line in enumerate(lines, start=1)
        if line.strip(_BLANKS)
    ]
    if not points:
        raise ValueError("the file is empty")
    if len(points) > 1 and points[0] == points[-1]:
        points.pop()
    if len(points) < 3:
        raise ValueError(f"{len(points)} point(s), a closed outline needs 3")
    return np.array(points, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Outline:
    """One contour file as read."""

    points: Float64
    digest: int
    error: str = ""


def _read_outline(path: str) -> _Outline:
    """One contour file by plain Python: the twin of `_read_outlines`, and what words the errors."""
    nothing = np.empty((0, 2), dtype=np.float64)
    try:
        raw = _read_small_file(path)
    except OSError as error:
        return _Outline(nothing, 0, f"cannot be read: {error.strerror}")
    except ValueError as error:
        return _Outline(nothing, 0, str(error))
    digest = int(digest_bytes(np.frombuffer(bytearray(raw), dtype=np.uint8)))
    try:
        return _Outline(parse_contour(raw), digest)
    except ValueError as error:
        return _Outline(nothing, digest, str(error))


def _read_small_file(path: str) -> bytes:
    """The bytes of a regular file within the size limit; anything else is an error."""
    try:
        return read_regular(path, limits().contour_bytes)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ValueError(f"too large for a contour file: {error.strerror}") from None
        if error.errno == errno.EINVAL:
            raise ValueError("not a regular file") from None
        raise


def _joined(outlines: list[_Outline]) -> ContourFiles:
    """Outlines one after another."""
    sizes = [len(outline.points) for outline in outlines]
    return ContourFiles(
        points_column_row=np.concatenate(
            [np.empty((0, 2), dtype=np.float64), *(outline.points for outline in outlines)]
        ),
        offsets=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
        digest=np.array([outline.digest for outline in outlines], dtype=np.uint64),
        errors=tuple((k, outline.error) for k, outline in enumerate(outlines) if outline.error),
    )


def _point(line: bytes, number: int) -> tuple[float, float]:
    """Column and row on a line that is not blank."""
    if len(line) > _LONGEST_LINE:
        raise ValueError(f"line {number}: {len(line)} characters, 2 values are needed (column row)")
    fields = _SEPARATOR.split(line)
    if len(fields) != 2:
        raise ValueError(f"line {number}: {len(fields)} value(s), 2 are needed (column row)")
    column, row = (
        _coordinate(field, f"line {number}: value {k}") for k, field in enumerate(fields, start=1)
    )
    return column, row


def _coordinate(token: bytes, place: str) -> float:
    """A number that may be one of an outline's."""
    try:
        value = _number(token)
    except ValueError as error:
        raise ValueError(f"{place} is {error}") from None
    if abs(value) > MAX_COORDINATE:
        raise ValueError(f"{place} is beyond any image (limit {MAX_COORDINATE:.0f})")
    return value


def _decided(text: bytes, index: int, start: int) -> float:
    """The value that starts at `start`, where the kernel was not certain."""
    found = _VALUE.match(text, start)
    try:
        return _number(found.group() if found else b"")
    except ValueError as error:
        line = text.count(b"\n", 0, start) + 1
        raise ValueError(f"value {index + 1} (line {line}): {error}") from None


def _number(token: bytes) -> float:
    """Python's float of a plain decimal number; no names, underscores or overflow."""
    if not token:
        raise ValueError("empty, a number is needed")
    if token.lstrip(b"+-").lower() in (b"nan", b"inf", b"infinity"):
        raise ValueError("not finite")
    if not _NUMBER.fullmatch(token):
        raise ValueError("not a number")
    value = float(token)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


@kernel
def _divided(mantissa: int, places: int) -> float:
    """`mantissa / 10**places` correctly rounded, for 0 < mantissa < 10**18 and 0 <= places <= 26.

    Long division by 5**places until the quotient has 53 bits, one to round and one that stands for
    all the rest ("sticky"); its conversion to float64 is then the only rounding.
    """
    divisor = _POWERS_OF_FIVE[places]
    quotient = mantissa // divisor
    remainder = mantissa - quotient * divisor
    exponent = -places
    while quotient < 1 << 54:
        remainder <<= 1
        quotient <<= 1
        exponent -= 1
        if remainder >= divisor:
            remainder -= divisor
            quotient |= 1
    if remainder > 0:
        quotient |= 1
    return math.ldexp(float(quotient), exponent)


@kernel
def _composed(mantissa: int, exponent: int) -> tuple[float, bool]:
    """`mantissa * 10**exponent`, and whether this is certainly the nearest float64."""
    if mantissa <= 1 << 53 and -22 <= exponent <= 22:
        if exponent < 0:
            return mantissa / _POWERS_OF_TEN[-exponent], True
        return mantissa * _POWERS_OF_TEN[exponent], True
    if -26 <= exponent <= 0 and mantissa > 0:
        return _divided(mantissa, -exponent), True
    return 0.0, False


@kernel
def _scan_exponent(raw: NDArray[np.uint8], start: int, stop: int) -> tuple[int, int]:
    """The integer after an 'e' and where it ends; it ends at `start` if there is none."""
    position = start
    sign = 1
    if position < stop and (raw[position] == ord("-") or raw[position] == ord("+")):
        sign = -1 if raw[position] == ord("-") else 1
        position += 1
    first = position
    power = 0
    while position < stop and ord("0") <= raw[position] <= ord("9"):
        # Saturates far outside of what a float64 can hold.
        power = min(power * 10 + int(raw[position]) - ord("0"), 10**6)
        position += 1
    return sign * power, (start if position == first else position)


@kernel
def _scan_number(raw: NDArray[np.uint8], start: int, stop: int) -> tuple[float, int, bool]:
    """The decimal number at `raw[start:stop]`: value, where it ends, whether that is certain."""
    position = start
    negative = raw[position] == ord("-")
    if negative or raw[position] == ord("+"):
        position += 1
    mantissa = 0
    digits = 0
    exponent = 0
    step = 0
    while position < stop:
        digit = int(raw[position]) - ord("0")
        if 0 <= digit <= 9:
            mantissa = mantissa * 10 + digit
            digits += 1
            exponent -= step
        elif raw[position] == ord(".") and step == 0:
            step = 1
        else:
            break
        position += 1
    # Beyond 18 digits the mantissa may have overflowed.
    if digits < 1 or digits > 18:
        return 0.0, position, False
    if position < stop and (raw[position] == ord("e") or raw[position] == ord("E")):
        power, end = _scan_exponent(raw, position + 1, stop)
        if end == position + 1:
            return 0.0, position, False
        position = end
        exponent += power
    value, certain = _composed(mantissa, exponent)
    return (-value if negative else value), position, certain


@kernel
def _is_blank(character: int) -> bool:
    """Space, tab, vertical tab, form feed."""
    return character in (32, 9, 11, 12)


@kernel
def _is_line_end(character: int) -> bool:
    """Line feed or carriage return."""
    return character in (10, 13)


@kernel
def _skip_space(raw: NDArray[np.uint8], start: int, stop: int, line_ends: bool) -> int:
    """The first position that is not blank (nor, where wanted, a line end)."""
    position = start
    while position < stop and (
        _is_blank(raw[position]) or (line_ends and _is_line_end(raw[position]))
    ):
        position += 1
    return position


@kernel
def _decimals(
    raw: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Values, where each starts, and whether it is certain; see `parse_decimals`."""
    stop = raw.size
    values = np.empty(stop + 1, np.float64)
    starts = np.empty(stop + 1, np.int64)
    known = np.empty(stop + 1, np.bool_)
    count = 0
    position = _skip_space(raw, 0, stop, True)
    expected = position < stop
    while expected:
        starts[count] = position
        known[count] = False
        if position < stop:
            values[count], position, known[count] = _scan_number(raw, position, stop)
        while position < stop and not (
            raw[position] == ord(",")
            or raw[position] == ord("\\")
            or _is_blank(raw[position])
            or _is_line_end(raw[position])
        ):
            known[count] = False
            position += 1
        count += 1
        position = _skip_space(raw, position, stop, True)
        expected = position < stop
        if expected and (raw[position] == ord(",") or raw[position] == ord("\\")):
            position = _skip_space(raw, position + 1, stop, True)
    return values[:count].copy(), starts[:count].copy(), known[:count].copy()


@kernel
def _decimal_lists(
    raw: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """See `parse_decimal_lists`.

    The usual number is read here and not in a function of its own: calls would double the time.
    """
    # a number takes two bytes, the last one of each string one
    values = np.empty((raw.size + offsets.size) // 2 + 1, np.float64)
    starts = np.zeros_like(offsets)
    known = np.zeros(offsets.size - 1, np.bool_)
    for k in range(known.size):
        position, stop = offsets[k], offsets[k + 1]
        while stop > position and (raw[stop - 1] == ord(" ") or raw[stop - 1] == 0):
            stop -= 1
        count = starts[k]
        # so that a backslash at the very end is followed by a number that is not there
        known[k] = position < stop and raw[stop - 1] != ord("\\")
        while known[k] and position < stop:
            first = position
            negative = raw[position] == ord("-")
            position += negative
            mantissa, digits, places = 0, 0, 0
            while position < stop and ord("0") <= raw[position] <= ord("9"):
                mantissa = mantissa * 10 + int(raw[position]) - ord("0")
                digits += 1
                position += 1
            if position < stop and raw[position] == ord("."):
                position += 1
                places = position
                while position < stop and ord("0") <= raw[position] <= ord("9"):
                    mantissa = mantissa * 10 + int(raw[position]) - ord("0")
                    position += 1
                places = position - places
            if 1 <= digits + places <= 15 and (position == stop or raw[position] == ord("\\")):
                value = mantissa / _POWERS_OF_TEN[places]
                values[count] = -value if negative else value
            else:
                values[count], position, known[k] = _scan_item(raw, first, stop)
            known[k] &= abs(values[count]) <= MAX_COORDINATE
            count += 1
            position += 1
        starts[k + 1] = count if known[k] else starts[k]
    return values[: starts[-1]], starts, known


@kernel
def _scan_item(raw: NDArray[np.uint8], start: int, stop: int) -> tuple[float, int, bool]:
    """The number at `raw[start:stop]` up to a backslash, blanks round it: as `_scan_number`."""
    first = _skip_space(raw, start, stop, False)
    if first == stop:
        return 0.0, stop, False
    value, end, certain = _scan_number(raw, first, stop)
    end = _skip_space(raw, end, stop, False)
    return value, end, certain and (end == stop or raw[end] == ord("\\"))


@kernel
def _parse_outline(
    raw: NDArray[np.uint8], length: int, points: NDArray[np.float64], first: int
) -> int:
    """Write the outline in `raw[:length]` to `points[first:]`; the row after it.

    -1 where the text is not certainly a good outline: `parse_contour` decides.
    """
    position = 0
    if length >= 3 and raw[0] == 0xEF and raw[1] == 0xBB and raw[2] == 0xBF:
        position = 3
    row = first
    while True:
        position = _skip_space(raw, position, length, True)
        if position == length:
            break
        points[row, 0], end, certain = _scan_number(raw, position, length)
        position = _skip_space(raw, end, length, False)
        if position < length and raw[position] == ord(","):
            position = _skip_space(raw, position + 1, length, False)
        if not certain or position in (end, length):
            return -1
        points[row, 1], end, certain = _scan_number(raw, position, length)
        position = _skip_space(raw, end, length, False)
        if not certain or (position < length and not _is_line_end(raw[position])):
            return -1
        if max(abs(points[row, 0]), abs(points[row, 1])) > MAX_COORDINATE:
            return -1
        row += 1
    if row - first > 1 and np.all(points[row - 1] == points[first]):
        row -= 1
    return row if row - first >= 3 else -1


@kernel
def _stirred(state: np.uint64, word: np.uint64) -> np.uint64:
    """The state after one more word: a bijection of either, as in the tail of XXH64."""
    state ^= word * _PRIME_2
    return ((state << _TURN) | (state >> _REST)) * _PRIME_1


@kernel
def digest_bytes(raw: NDArray[np.uint8]) -> np.uint64:
    """64-bit digest of a contiguous array of bytes, never 0.

    It tells files apart that differ by accident, not by malice; the same on all machines of one
    byte order.
    """
    whole = raw.size // 8
    words = raw[: 8 * whole].view(np.uint64)
    state = np.uint64(raw.size) * _PRIME_1
    for k in range(whole):
        state = _stirred(state, words[k])
    tail = _ONE
    for k in range(8 * whole, raw.size):
        tail = (tail << _EIGHT) | np.uint64(raw[k])
    state = _stirred(state, tail)
    state = (state ^ (state >> _HALF)) * _PRIME_2
    return max(state ^ (state >> _HALF), _ONE)


@kernel
def _read_whole(
    packed: NDArray[np.uint8], start: int, buffer: NDArray[np.uint8], most: int
) -> tuple[int, NDArray[np.uint8]]:
    """Bytes in the file, or -1, and the buffer that holds them (a larger one where needed)."""
    descriptor = posix.open_read_only(packed, start)
    if descriptor < 0:
        return -1, buffer
    size = posix.file_size(descriptor)
    length = -1
    if 0 <= size <= most:
        if size > buffer.size:
            buffer = np.empty(2 * size, np.uint8)
        length = posix.read_at(descriptor, buffer, size, 0)
    posix.close(descriptor)
    return (length if length == size else -1), buffer


@kernel
def _read_outlines(
    packed: NDArray[np.uint8], starts: NDArray[np.int64], most_bytes: int, most_points: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.bool_]]:
    """Read and parse all files in one call: points, offsets, digests, and which are certain."""
    files = starts.size
    offsets = np.zeros(files + 1, np.int64)
    digest = np.zeros(files, np.uint64)
    known = np.zeros(files, np.bool_)
    points = np.empty((512 * files + 4096, 2), np.float64)
    buffer = np.empty(1 << 16, np.uint8)
    for k in range(files):
        count = offsets[k]
        offsets[k + 1] = count
        length, buffer = _read_whole(packed, starts[k], buffer, most_bytes)
        if length < 0:
            continue
        # The shortest point takes four bytes ("1 2" and a line end), the last one three.
        if count + length // 4 + 2 > points.shape[0]:
            larger = np.empty((2 * points.shape[0] + length // 4, 2), np.float64)
            larger[:count] = points[:count]
            points = larger
        digest[k] = digest_bytes(buffer[:length])
        row = _parse_outline(buffer, length, points, count)
        if 0 <= row <= count + most_points:
            known[k] = True
            offsets[k + 1] = row
    return points[: offsets[files]].copy(), offsets, digest, known
