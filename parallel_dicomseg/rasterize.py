"""From outlines to masks: an exact scanline rule, and the two rules of masks drawn with Pillow.

docs/geometry.md tells with pictures what the rules draw. In short, the rule `center`: pixel
(row, column) is inside where its centre is, by even-odd parity over all rings of the structure; a
row meets an edge iff ``low_y <= row < high_y``, and an edge that it meets at the exact column
``x`` toggles all pixels from ``ceil(x)`` on. A scanline therefore needs nothing but
``ceil(x)``, and that is certain from rounded arithmetic wherever no integer lies within the
rounding error's bound of the rounded crossing. Where one does, the sign of

    (n - low_x) * (high_y - low_y) - (row - low_y) * (high_x - low_x)

decides whether ``x <= n``: in float64 where the differences are exact and the products are
compared with their rounding errors, else in integers of as many digits as it takes.

All kernels hold no state and release the GIL: call them from as many threads as you like.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parallel_dicomseg.jit import kernel

if TYPE_CHECKING:
    from parallel_dicomseg.records import Contours, Float64, Int32, Int64, UInt8

_UINT8, _INT64 = np.dtype(np.uint8), np.dtype(np.int64)

#: The rules by which an outline becomes a mask.
RULES = ("center", "pil-outline0", "pil-outline1")

# Crossings that a row holds before they are filled: one cache line of int32.
_SLOTS = 16

# Rounding a double moves it by at most this fraction (half a unit in the last place).
_ROUNDOFF = 2.0**-53
# Within these limits neither the filter nor the products of two differences over- or underflow.
_LARGEST = 2.0**500
_SMALLEST = 2.0**-400
# More than all underflow errors of the filter together.
_UNDERFLOW = 2.0**-500

# Digits of the long integers: two of them, multiplied, and a carry fit into int64.
_DIGIT_BITS = 30
_DIGIT_MASK = 2**30 - 1

# Pillow's own 32-bit arithmetic holds (in C: is defined) for coordinates up to this.
_PIL_LARGEST = 2.0**29

_STATUS_MESSAGES = (
    "",
    "offsets do not cut the points into rings: from 0, ascending, to the number of points",
    "points are not finite: a coordinate is NaN or infinite",
    "rings are not sorted by plane, then structure",
    "a ring's plane is not one of the masks",
    "a ring's structure has no bit in the masks' dtype",
    "masks have more than 2**31 - 1 columns",
)
# What the drawing kernels may take for granted about the pixels of a mask. (As NumPy integers,
# because numba compiles a callee once per literal of Python's.)
_ANYTHING, _BLANK, _TO_CLEAR = np.int64(0), np.int64(1), np.int64(2)

_OK, _BAD_OFFSETS, _NOT_FINITE, _NOT_SORTED, _NO_PLANE, _NO_BIT, _TOO_WIDE = range(7)


# --------------------------------------------------------------------------------------------
# Public entries


def rasterize_contours(
    points_column_row: ArrayLike,
    offsets: ArrayLike,
    shape: tuple[int, int],
    *,
    rule: str = "center",
    out: UInt8 | None = None,
) -> UInt8:
    """Draw the outlines of ONE structure on ONE slice.

    Parameters
    ----------
    points_column_row : (p, 2) float64
        Vertices in pixels, column first, integer coordinates at pixel centres. They may lie
        anywhere, off the image too.
    offsets : (r + 1,) int64
        Ring k is ``points_column_row[offsets[k]:offsets[k + 1]]``; it is closed implicitly, and
        a repeated first point does no harm.
    shape : (rows, columns)
        Size of the mask in pixels.
    rule : {"center", "pil-outline0", "pil-outline1"}
        See docs/geometry.md; only "center" is unbiased, and exact.
    out : (rows, columns) uint8, C-contiguous, optional
        Cleared, filled and returned instead of a new array.

    Returns
    -------
    (rows, columns) uint8
        1 inside, 0 outside.

    Raises
    ------
    ValueError
        For an unknown rule, points that are not finite or not (p, 2), offsets that do not fit
        the points, and an `out` of another shape, dtype or memory order.
    """
    points = np.ascontiguousarray(points_column_row, dtype=np.float64)
    ring_offsets = np.ascontiguousarray(offsets)
    if ring_offsets.dtype != _INT64:
        if ring_offsets.dtype.kind not in "iu":
            raise ValueError(f"offsets are {ring_offsets.dtype}, not integers")
        ring_offsets = ring_offsets.astype(np.int64)
    if points.shape[1:] != (2,) or ring_offsets.ndim != 1:
        raise ValueError(
            f"points_column_row has shape {points.shape} and offsets {ring_offsets.shape}, "
            "not (points, 2) and (rings + 1,)"
        )
    if out is None:
        mask = np.empty(shape, np.uint8)
    elif out.shape == tuple(shape) and out.dtype == _UINT8 and out.flags.carray:
        mask = out
    else:
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}, not a writable C-contiguous uint8 array "
            f"of shape {tuple(shape)}"
        )
    if rule == "center":
        status = _center_slice(points, ring_offsets, mask)
    else:
        status = _pil_slice(points, ring_offsets, mask, _erodes(rule))
    if status:
        raise ValueError(_STATUS_MESSAGES[status])
    return mask


def rasterize_batch(
    contours: Contours, masks: NDArray[Any], *, rule: str = "center", clear: bool = False
) -> None:
    """Draw all outlines of a batch of slices: bit ``1 << structure`` of each slice's mask.

    One call of one kernel that holds no GIL.

    Parameters
    ----------
    contours : Contours
        Points in pixels (column, row), finite; rings sorted by plane, structure and layer. The
        layers of a structure are drawn apart and united.
    masks : (n, rows, columns) uint8, uint16, uint32 or uint64, C-contiguous
        Filled in place; all 0, unless `clear` is given.
    rule : {"center", "pil-outline0", "pil-outline1"}
        See docs/geometry.md.
    clear : bool
        Whether the masks may hold anything. Clearing each as it is drawn is faster than clearing
        all of them beforehand.

    Raises
    ------
    ValueError
        For an unknown rule, masks of another dtype or memory order, rings that are not sorted,
        and a plane or a structure that the masks do not have.
    """
    if masks.ndim != 3 or masks.dtype.kind != "u" or not masks.flags.carray:
        raise ValueError(
            f"masks are {masks.dtype} of shape {masks.shape}, not a writable C-contiguous array "
            "of unsigned integers (slices, rows, columns)"
        )
    above = _layers_above(contours)
    if above.any():
        _draw_batch(contours.take(above == 0), masks, rule, clear)
        for place in range(1, int(above.max()) + 1):
            _draw_over(contours.take(above == place), masks, rule)
    else:
        _draw_batch(contours, masks, rule, clear)


def _draw_batch(contours: Contours, masks: NDArray[Any], rule: str, clear: bool) -> None:
    """Draw rings of which each structure has one layer."""
    points, offsets = contours.points_column_row, contours.offsets
    plane, structure = contours.plane, contours.structure
    if rule == "center":
        status = _center_batch(points, offsets, plane, structure, masks, clear)
    else:
        status = _pil_batch(points, offsets, plane, structure, masks, clear, _erodes(rule))
    if status:
        raise ValueError(_STATUS_MESSAGES[status])


def _draw_over(contours: Contours, masks: NDArray[Any], rule: str) -> None:
    """Unite what the rings draw with what is there; only their slices are touched."""
    planes, place = np.unique(contours.plane, return_inverse=True)
    drawn = np.zeros((len(planes), *masks.shape[1:]), masks.dtype)
    _draw_batch(replace(contours, plane=place.astype(np.int64)), drawn, rule, clear=False)
    masks[planes] |= drawn


def _layers_above(contours: Contours) -> Int64:
    """(r,) how many layers of its structure and slice lie before each ring's own."""
    above = np.zeros(len(contours.plane), np.int64)
    layer = contours.layer
    if layer is None or not len(layer):
        return above
    same = (np.diff(contours.plane) == 0) & (np.diff(contours.structure) == 0)
    steps = (np.diff(layer) != 0) & same
    if steps.any():
        total = np.concatenate([[0], np.cumsum(steps)])
        starts = np.concatenate([[True], ~same])
        above = total - total[starts][np.cumsum(starts) - 1]
    return above


def _erodes(rule: str) -> bool:
    """Whether a Pillow rule draws the outline over the fill, with 0."""
    if rule not in RULES[1:]:
        raise ValueError(f"unknown rule {rule!r}: choose one of {', '.join(RULES)}")
    return rule == "pil-outline0"


# --------------------------------------------------------------------------------------------
# Checks inside the kernels: a status, because raising costs more than the whole check


@kernel
def _check_rings(points: Float64, offsets: Int64, columns: int) -> int:
    """Status of the rings' offsets, and of the width (columns are held in 32 bits)."""
    if columns >= 2**31:
        return _TOO_WIDE
    rings = offsets.shape[0] - 1
    if rings < 0 or offsets[0] != 0 or offsets[rings] != points.shape[0]:
        return _BAD_OFFSETS
    for ring in range(rings):
        if offsets[ring] > offsets[ring + 1]:
            return _BAD_OFFSETS
    return _OK


@kernel
def _check_finite(points: Float64) -> int:
    """Status of the points' values."""
    for i in range(points.shape[0]):
        if not (math.isfinite(points[i, 0]) and math.isfinite(points[i, 1])):
            return _NOT_FINITE
    return _OK


@kernel
def _check_batch(
    points: Float64, offsets: Int64, plane: Int64, structure: Int32, masks: NDArray[Any]
) -> int:
    """Status of a batch; only what would write to the wrong place or forget a ring."""
    rings = plane.shape[0]
    if offsets.shape[0] != rings + 1 or structure.shape[0] != rings:
        return _BAD_OFFSETS
    for ring in range(rings):
        if not 0 <= plane[ring] < masks.shape[0]:
            return _NO_PLANE
        if not 0 <= structure[ring] < 8 * masks.itemsize:
            return _NO_BIT
        if ring > 0 and (
            plane[ring] < plane[ring - 1]
            or (plane[ring] == plane[ring - 1] and structure[ring] < structure[ring - 1])
        ):
            return _NOT_SORTED
    return _check_rings(points, offsets, masks.shape[2])


@kernel
def _group_end(plane: Int64, structure: Int32, first: int) -> int:
    """One past the last ring of the structure and slice that ring `first` belongs to."""
    end = first + 1
    while (
        end < plane.shape[0] and plane[end] == plane[first] and structure[end] == structure[first]
    ):
        end += 1
    return end


# --------------------------------------------------------------------------------------------
# Rule "center". Pixels go about as one flat array and rows as numbers: a view per row or an
# array handed on per edge costs more (reference counts) than the edge itself.


@kernel
def _center_slice(points: Float64, offsets: Int64, mask: UInt8) -> int:
    """One structure on one mask, cleared first; returns a status."""
    status = _check_rings(points, offsets, mask.shape[1])
    if status == _OK:
        status = _check_finite(points)
    if status != _OK:
        return status
    rows, columns = mask.shape
    slots, filled = np.empty((rows, _SLOTS), np.int32), np.zeros(rows, np.int32)
    bit, rings = np.uint64(1), offsets.shape[0] - 1
    _draw_group(points, offsets, 0, rings, mask.reshape(-1), columns, bit, _TO_CLEAR, slots, filled)
    return status


@kernel
def _center_batch(
    points: Float64,
    offsets: Int64,
    plane: Int64,
    structure: Int32,
    masks: NDArray[Any],
    clear: bool,
) -> int:
    """All structures of all slices; returns a status."""
    status = _check_batch(points, offsets, plane, structure, masks)
    if status != _OK:
        return status
    slices, rows, columns = masks.shape
    slots, filled = np.empty((rows, _SLOTS), np.int32), np.zeros(rows, np.int32)
    first = 0
    for i in range(slices):
        pixels = masks[i].reshape(-1)
        state = _TO_CLEAR if clear else _BLANK
        while first < plane.shape[0] and plane[first] == i:
            end = _group_end(plane, structure, first)
            bit = np.uint64(1) << np.uint64(structure[first])
            _draw_group(points, offsets, first, end, pixels, columns, bit, state, slots, filled)
            state, first = _ANYTHING, end
        if state == _TO_CLEAR:
            pixels[:] = 0
    return _OK


@kernel
def _draw_group(
    points: Float64,
    offsets: Int64,
    first_ring: int,
    end_ring: int,
    pixels: NDArray[Any],
    columns: int,
    bit: np.uint64,
    state: np.int64,
    slots: Int32,
    filled: Int32,
) -> None:
    """Draw the pixels whose centres are inside an odd number of rings.

    `filled[row]` crossings wait in `slots[row]`, in ascending order; none before and after.
    """
    top, bottom = filled.shape[0], 0
    for ring in range(first_ring, end_ring):
        begin, end = offsets[ring], offsets[ring + 1]
        if begin < end:
            start, stop, state = _note_crossings(
                points, begin, end, pixels, columns, bit, state, slots, filled
            )
            top, bottom = min(top, start), max(bottom, stop)
    if state == _TO_CLEAR:
        pixels[: top * columns] = 0
        pixels[max(top, bottom) * columns :] = 0
    _draw_rows(pixels, columns, bit, state, slots, filled, top, bottom)


@kernel
def _note_crossings(
    points: Float64,
    begin: int,
    end: int,
    pixels: NDArray[Any],
    columns: int,
    bit: np.uint64,
    state: np.int64,
    slots: Int32,
    filled: Int32,
) -> tuple[int, int, np.int64]:
    """Note from which column on each crossing of a ring and a row toggles the row's pixels.

    A row whose slots are full is drawn at once: parity does not ask for the order. Returns the
    range of rows that the ring crosses, and the state in which that leaves the mask.
    """
    rows = filled.shape[0]
    top, bottom = rows, 0
    x1, y1 = points[end - 1, 0], points[end - 1, 1]
    for i in range(begin, end):
        x0, y0, x1, y1 = x1, y1, points[i, 0], points[i, 1]
        low_x, low_y, high_x, high_y = (x0, y0, x1, y1) if y0 < y1 else (x1, y1, x0, y0)
        start, stop = _clamped_ceil(low_y, rows), _clamped_ceil(high_y, rows)
        if start >= stop:
            continue
        top, bottom = min(top, start), max(bottom, stop)
        slope, bound = _slope_and_bound(low_x, low_y, high_x, high_y)
        for row in range(start, stop):
            rise = row - low_y
            x = low_x + rise * slope
            slack = bound if rise > 0.0 else 0.0  # at its lower end the edge meets the vertex
            column = _clamped_ceil(x - slack, columns)
            if not x + slack <= np.ceil(x - slack):
                highest = _clamped_ceil(x + slack, columns)
                column = _exact_column(low_x, low_y, high_x, high_y, row, column, highest)
            if filled[row] == _SLOTS:
                if state == _TO_CLEAR:
                    pixels[:] = 0
                state = _ANYTHING
                _draw_rows(pixels, columns, bit, state, slots, filled, row, row + 1)
            line, k = np.uint64(row), filled[row]
            filled[line] = k + 1
            while k > 0 and slots[line, k - 1] > column:
                slots[line, k] = slots[line, k - 1]
                k -= 1
            slots[line, k] = column
    return top, bottom, state


@kernel
def _draw_rows(
    pixels: NDArray[Any],
    columns: int,
    bit: np.uint64,
    state: np.int64,
    slots: Int32,
    filled: Int32,
    top: int,
    bottom: int,
) -> None:
    """Toggle the pixels right of an odd number of crossings, and empty the rows' slots.

    Where the mask is blank the bit is stored, which is a memset if a pixel is a byte, and what is
    to be cleared is cleared row by row, so that it is still in the cache. Indices are
    unsigned: negative ones would count from the end, and that check hinders vectorizing.
    """
    width = np.uint64(columns)
    for row in range(np.uint64(top), np.uint64(bottom)):
        if state == _TO_CLEAR:
            pixels[row * width : (row + np.uint64(1)) * width] = 0
        for i in range(0, filled[row] - 1, 2):
            start = row * width + np.uint64(slots[row, i])
            stop = row * width + np.uint64(slots[row, i + 1])
            if state == _ANYTHING:
                for pixel in range(start, stop):
                    pixels[pixel] ^= bit
            else:
                pixels[start:stop] = bit
        filled[row] = 0


@kernel
def _clamped_ceil(value: float, limit: int) -> int:
    """The ceiling, clamped to 0 … limit before it becomes an integer; 0 for NaN."""
    return int(min(limit, max(0.0, np.ceil(value))))


@kernel
def _slope_and_bound(
    low_x: float, low_y: float, high_x: float, high_y: float
) -> tuple[float, float]:
    """Columns per row of an edge, and how far ``low_x + (row - low_y) * slope`` can be off.

    With u = 2**-53 and s = abs(low_x) + abs(high_x), which bounds every number on the way, the
    three differences, the quotient, the product and the sum err by less than 6.1 u s together,
    and adding or subtracting the bound itself by less than 1.2 u s: 16 u s leaves room for the
    bound's own rounding. Outside the limits where this holds the bound is infinite.
    """
    slope = (high_x - low_x) / (high_y - low_y)
    reach = max(abs(low_x), abs(high_x), abs(low_y), abs(high_y), abs(slope))
    if not reach <= _LARGEST:
        return 0.0, math.inf
    if slope == 0.0 and low_x == high_x:
        return 0.0, 0.0
    return slope, 16.0 * _ROUNDOFF * (abs(low_x) + abs(high_x)) + _UNDERFLOW


# --------------------------------------------------------------------------------------------
# Exact decisions, for the crossings that the filter leaves open


@kernel
def _exact_column(
    low_x: float,
    low_y: float,
    high_x: float,
    high_y: float,
    row: int,
    lowest: int,
    highest: int,
) -> int:
    """The clamped ceiling of the exact crossing, which is one of `lowest` … `highest`.

    The filter leaves two neighbours; where it does not hold all columns are bisected.
    """
    while lowest < highest:
        middle = (lowest + highest) // 2
        if _crosses_by(low_x, low_y, high_x, high_y, row, middle):
            highest = middle
        else:
            lowest = middle + 1
    return lowest


@kernel
def _crosses_by(
    low_x: float, low_y: float, high_x: float, high_y: float, row: int, column: int
) -> bool:
    """Whether an edge crosses the row at this column or left of it, exactly."""
    if low_x <= column and high_x <= low_x:
        return True
    if low_x > column and high_x >= low_x:
        return False
    # What is left: column and high_x lie on the same side of low_x.
    r, n = float(row), float(column)
    if low_x < high_x:
        return _compare_products(n, low_x, high_y, low_y, r, low_y, high_x, low_x) >= 0
    return _compare_products(low_x, n, high_y, low_y, r, low_y, low_x, high_x) <= 0


@kernel
def _compare_products(
    a1: float, a0: float, b1: float, b0: float, c1: float, c0: float, d1: float, d0: float
) -> int:
    """Exact sign of ``(a1 - a0) * (b1 - b0) - (c1 - c0) * (d1 - d0)``; no difference negative."""
    a, b, c, d = a1 - a0, b1 - b0, c1 - c0, d1 - d0
    if max(a, b, c, d) <= _LARGEST and (
        _difference_error(a1, a0) == 0.0
        and _difference_error(b1, b0) == 0.0
        and _difference_error(c1, c0) == 0.0
        and _difference_error(d1, d0) == 0.0
    ):
        left, right = a * b, c * d
        if left != right:  # rounding keeps the order
            return 1 if left > right else -1
        if min(a, b, c, d) >= _SMALLEST:
            left, right = _product_error(a, b, left), _product_error(c, d, right)
            return int(left > right) - int(left < right)
    return _compare_long_products(a1, a0, b1, b0, c1, c0, d1, d0)


@kernel
def _difference_error(a: float, b: float) -> float:
    """What rounding took from ``a - b`` (TwoDiff: Knuth; Shewchuk 1997, theorem 7)."""
    difference = a - b
    b_virtual = a - difference
    a_virtual = difference + b_virtual
    return (a - a_virtual) + (b_virtual - b)


@kernel
def _product_error(a: float, b: float, product: float) -> float:
    """What rounding took from ``a * b`` (TwoProduct: Dekker, Veltkamp; Shewchuk's theorem 18)."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


@kernel
def _split(value: float) -> tuple[float, float]:
    """Two halves of 26 bits whose sum is the value, so that their products are exact."""
    scaled = 134217729.0 * value  # 2**27 + 1
    high = scaled - (scaled - value)
    return high, value - high


@kernel
def _compare_long_products(
    a1: float, a0: float, b1: float, b0: float, c1: float, c0: float, d1: float, d0: float
) -> int:
    """As `_compare_products`, in integers of the last bit's unit: right for all finite values."""
    lowest = highest = math.frexp(a1)[1]
    for value in (a0, b1, b0, c1, c0, d1, d0):
        exponent = math.frexp(value)[1]
        lowest, highest = min(lowest, exponent), max(highest, exponent)
    unit = lowest - 53
    digits = (highest - unit) // _DIGIT_BITS + 4
    left = _long_product(
        _long_difference(a1, a0, unit, digits), _long_difference(b1, b0, unit, digits)
    )
    right = _long_product(
        _long_difference(c1, c0, unit, digits), _long_difference(d1, d0, unit, digits)
    )
    for i in range(2 * digits - 1, -1, -1):
        if left[i] != right[i]:
            return 1 if left[i] > right[i] else -1
    return 0


@kernel
def _long_difference(larger: float, smaller: float, unit: int, digits: int) -> Int64:
    """``larger - smaller >= 0`` in digits of 30 bits, lowest first, times ``2**unit``."""
    result = np.zeros(digits, np.int64)
    _add_long(result, larger, 1, unit)
    _add_long(result, smaller, -1, unit)
    carry = 0
    for i in range(digits):
        total = result[i] + carry
        result[i] = total & _DIGIT_MASK
        carry = total >> _DIGIT_BITS
    return result


@kernel
def _add_long(result: Int64, value: float, sign: int, unit: int) -> None:
    """Add a double to three neighbouring digits, which may become negative or too large."""
    if value == 0.0:
        return
    fraction, exponent = math.frexp(abs(value))
    significand = int(fraction * 2.0**53)
    place, shift = divmod(exponent - 53 - unit, _DIGIT_BITS)
    sign = sign if value > 0.0 else -sign
    low = (significand & _DIGIT_MASK) << shift
    high = (significand >> _DIGIT_BITS) << shift
    result[place] += sign * (low & _DIGIT_MASK)
    result[place + 1] += sign * ((low >> _DIGIT_BITS) + (high & _DIGIT_MASK))
    result[place + 2] += sign * (high >> _DIGIT_BITS)


@kernel
def _long_product(a: Int64, b: Int64) -> Int64:
    """Product of two long integers of equally many digits, in twice as many."""
    digits = a.shape[0]
    result = np.zeros(2 * digits, np.int64)
    for i in range(digits):
        carry = 0
        for j in range(digits):
            total = result[i + j] + a[i] * b[j] + carry
            result[i + j] = total & _DIGIT_MASK
            carry = total >> _DIGIT_BITS
        result[i + digits] = carry
    return result


# --------------------------------------------------------------------------------------------
# Rules "pil-outline0" and "pil-outline1": what ImageDraw.polygon(fill=1, outline=0 or 1) draws.
# An edge is the number of its first vertex; x and y repeat the first vertex at their ends.


@kernel
def _pil_slice(points: Float64, offsets: Int64, mask: UInt8, erode: bool) -> int:
    """One structure on one mask, cleared first; returns a status."""
    status = _check_rings(points, offsets, mask.shape[1])
    if status == _OK:
        status = _check_finite(points)
    if status == _OK:
        mask[:] = 0
        canvas = np.zeros(mask.shape, np.uint8)
        for ring in range(offsets.shape[0] - 1):
            outline = points[offsets[ring] : offsets[ring + 1]]
            _pil_ring(outline, mask, np.uint64(1), canvas, erode)
    return status


@kernel
def _pil_batch(
    points: Float64,
    offsets: Int64,
    plane: Int64,
    structure: Int32,
    masks: NDArray[Any],
    clear: bool,
    erode: bool,
) -> int:
    """All structures of all slices; returns a status."""
    status = _check_batch(points, offsets, plane, structure, masks)
    if status != _OK:
        return status
    if clear:
        masks[:] = 0
    canvas = np.zeros(masks.shape[1:], np.uint8)
    for ring in range(plane.shape[0]):
        bit = np.uint64(1) << np.uint64(structure[ring])
        outline = points[offsets[ring] : offsets[ring + 1]]
        _pil_ring(outline, masks[plane[ring]], bit, canvas, erode)
    return _OK


@kernel
def _pil_ring(
    outline: Float64, mask: NDArray[Any], bit: np.uint64, canvas: UInt8, erode: bool
) -> None:
    """Draw one ring on the canvas, OR it into the mask, and wipe the canvas.

    Pillow refuses fewer than two points; here they draw nothing.
    """
    if outline.shape[0] < 2 or canvas.size == 0:
        return
    x, y = _pil_vertices(outline[:, 0]), _pil_vertices(outline[:, 1])
    top, bottom = max(int(y.min()), 0), min(max(int(y.max()), 0), canvas.shape[0])
    _pil_fill(x, y, canvas, top, bottom)
    if erode:
        _pil_erase(x, y, canvas)
    for row in range(top, min(bottom + 1, canvas.shape[0])):
        drawn, target = canvas[row], mask[row]
        for column in range(drawn.shape[0]):
            target[column] |= bit * drawn[column]
            drawn[column] = 0


@kernel
def _pil_vertices(values: Float64) -> Int64:
    """Coordinates cut off towards zero, the first once more at the end."""
    count = values.shape[0]
    result = np.empty(count + 1, np.int64)
    for i in range(count):
        value = values[i]
        if not abs(value) <= _PIL_LARGEST:
            value = math.copysign(_PIL_LARGEST, value)
        result[i] = int(value)
    result[count] = result[0]
    return result


@kernel
def _pil_fill(x: Int64, y: Int64, canvas: UInt8, top: int, bottom: int) -> None:
    """Fill the rows `top` to `bottom` between the edges, edges included."""
    edges = x.shape[0] - 1
    if x[edges - 1] == x[0] and y[edges - 1] == y[0]:
        edges -= 1  # the outline closes itself
    for edge in range(edges):
        if y[edge] == y[edge + 1]:
            first, last = min(x[edge], x[edge + 1]), max(x[edge], x[edge + 1])
            _pil_span(canvas, y[edge], first, last)
    crossings, corners = np.empty(2 * edges, np.float32), np.empty(edges, np.int64)
    for row in range(top, min(bottom + 1, canvas.shape[0])):
        count = _pil_crossings(x, y, edges, row, bottom, crossings, corners)
        found = crossings[:count]
        _sort(found)
        for i in range(0, count - 1, 2):
            _pil_span(canvas, row, _pil_left(found[i]), _pil_right(found[i + 1]))


@kernel
def _sort(values: NDArray[np.float32]) -> None:
    """Ascending, in place; quickly for the few that a row usually has."""
    if values.shape[0] > _SLOTS:
        values.sort()
        return
    for i in range(1, values.shape[0]):
        value, j = values[i], i
        while j > 0 and values[j - 1] > value:
            values[j] = values[j - 1]
            j -= 1
        values[j] = value


@kernel
def _pil_crossings(
    x: Int64,
    y: Int64,
    edges: int,
    row: int,
    bottom: int,
    crossings: NDArray[np.float32],
    corners: Int64,
) -> int:
    """Note the columns where edges meet the row, in single precision; returns how many.

    An edge that ends in this row, but not in the bottom row, counts twice, so that the number
    stays even where the next edge starts here. The other ends of slanted edges may be moved.
    """
    count = touching = 0
    for edge in range(edges):
        low, high = min(y[edge], y[edge + 1]), max(y[edge], y[edge + 1])
        if low == high or not low <= row <= high:
            continue
        crossing = _pil_crossing(x, y, edge, row)
        is_end = (row in {low, high}) and x[edge] != x[edge + 1]
        if row == high and row < bottom:
            crossings[count] = crossing
            count += 1
        elif is_end:
            step = -1 if row == high else 1
            crossing = _pil_corner(x, y, edge, row, step, corners[:touching])
        crossings[count] = crossing
        count += 1
        if is_end:
            corners[touching] = edge
            touching += 1
    return count


@kernel
def _pil_corner(x: Int64, y: Int64, edge: int, row: int, step: int, corners: Int64) -> np.float32:
    """Column of a slanted edge's end, drawn in where it is the tip of a flat corner.

    `corners` are the earlier slanted edges that end in this row. The first of them that meets
    this edge here and goes on into the same next row decides: where both go to the same side by
    more than a pixel, the corner starts right beside the nearer one's column in the next row.
    """
    here, ahead = _pil_crossing(x, y, edge, row), _pil_crossing(x, y, edge, row + step)
    one = np.float32(1.0)
    for other in corners:
        low, high = min(y[other], y[other + 1]), max(y[other], y[other + 1])
        meets = _round_half_away(_pil_crossing(x, y, other, row)) == _round_half_away(here)
        if not (meets and low <= row + step <= high):
            continue
        other_ahead = _pil_crossing(x, y, other, row + step)
        if here > ahead + one and here > other_ahead + one:
            return _round_half_away(max(ahead, other_ahead)) + one
        if here < ahead - one and here < other_ahead - one:
            return _round_half_away(min(ahead, other_ahead)) - one
        return here
    return here


@kernel
def _pil_crossing(x: Int64, y: Int64, edge: int, row: int) -> np.float32:
    """Column where an edge meets the row, every step rounded to single precision."""
    slope = np.float32(x[edge + 1] - x[edge]) / np.float32(y[edge + 1] - y[edge])
    return np.float32(row - y[edge]) * slope + np.float32(x[edge])


@kernel
def _round_half_away(value: np.float32) -> np.float32:
    """C's roundf."""
    size = np.floor(abs(np.float64(value)) + 0.5)
    return np.float32(size if value >= 0.0 else -size)


@kernel
def _pil_left(crossing: np.float32) -> int:
    """First column of a span; right of 0 the sum is rounded to single precision."""
    if crossing >= 0.0:
        return math.floor(crossing + np.float32(0.5))
    return -math.floor(0.5 - np.float64(crossing))


@kernel
def _pil_right(crossing: np.float32) -> int:
    """Last column of a span; right of 0 the difference is rounded to single precision."""
    if crossing >= 0.0:
        return math.ceil(crossing - np.float32(0.5))
    return -math.ceil(-0.5 - np.float64(crossing))


@kernel
def _pil_span(canvas: UInt8, row: int, first: int, last: int) -> None:
    """Draw the columns `first` to `last`, both included, as far as they are on the canvas."""
    if 0 <= row < canvas.shape[0]:
        canvas[row, min(max(first, 0), canvas.shape[1]) : max(last + 1, 0)] = 1


@kernel
def _pil_erase(x: Int64, y: Int64, canvas: UInt8) -> None:
    """Draw the outline with 0: Bresenham's lines, each without its last pixel.

    After i steps along its longer axis a line has made ``floor(i * minor / major + 1 / 2)``
    along the other, so that only the steps on the canvas need be taken.
    """
    rows, columns = canvas.shape
    for edge in range(x.shape[0] - 1):
        dx, dy = x[edge + 1] - x[edge], y[edge + 1] - y[edge]
        flat = abs(dx) > abs(dy)
        major, minor = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
        if flat:
            start, stop = _steps_inside(x[edge], dx, columns)
        else:
            start, stop = _steps_inside(y[edge], dy, rows)
        for step in range(start, stop):
            across = (2 * minor * step + major) // (2 * major)
            column = x[edge] + _sign(dx) * (step if flat else across)
            row = y[edge] + _sign(dy) * (across if flat else step)
            if 0 <= row < rows and 0 <= column < columns:
                canvas[row, column] = 0


@kernel
def _steps_inside(start: int, distance: int, size: int) -> tuple[int, int]:
    """Which of the unit steps 0 … abs(distance) - 1 from `start` lie within 0 … size - 1."""
    if distance >= 0:
        return max(0, -start), min(distance, size - start)
    return max(0, start - size + 1), min(-distance, start + 1)


@kernel
def _sign(value: int) -> int:
    """-1, 0 or 1."""
    return int(value > 0) - int(value < 0)
