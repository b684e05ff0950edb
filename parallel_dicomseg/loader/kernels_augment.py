"""One pass over a sample: geometry composed to one inverse map, then intensities.

Every random number is a function of (seed, key of the operation, place in its stream): no state,
so that nothing depends on which thread serves a sample, or after which other one. The generator is
splitmix64, addressed by counter. Logarithm, exponential, sine and cosine of whole images are
made of additions, multiplications, divisions and square roots, which IEEE 754 rounds the same way
everywhere and which the compiler turns into vector instructions; the C library's are neither.

Images are (planes, rows, columns), C-contiguous; a plane is one sample (red, green, blue) of one
slice, those of a slice beside each other. Masks are (slices, rows, columns) of any unsigned type,
whose values are moved and never combined. All kernels release the GIL and hold no state.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from parallel_dicomseg.jit import kernel
from parallel_dicomseg.loader.operations import (
    ASPECT,
    BLUR,
    BRIGHTNESS,
    CENTER,
    CONTRAST,
    CROP,
    DIHEDRAL,
    EDGE,
    ELASTIC,
    FILL,
    FLIP,
    GAMMA,
    HIGH,
    INTERPOLATION,
    LAST_GEOMETRY,
    LINEAR,
    LOW,
    MINIMUM,
    NOISE,
    OUTSIDE,
    ROTATE,
    SAMPLES,
    SCALE,
    SHIFT,
)

# splitmix64 (Steele, Lea and Flood 2014): the increment of its state, and its finalizer.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_TO_UNIT = 2.0**-53

# The first draw of a stream decides whether the operation is applied; arrays of draws start here.
_ARRAY_DRAWS = 16

# Pixels that are worked on at a time: what is intermediate stays in the first-level cache.
_BLOCK = 256
_40, _24, _24_BITS = np.uint64(40), np.uint64(24), np.uint64((1 << 24) - 1)
_ONE_64, _TWO_64, _THREE_64 = np.uint64(1), np.uint64(2), np.uint64(3)
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_TO_UNIT_24 = np.float32(2.0**-24)
_MIDDLE_24 = np.float32(2.0**23)
_TO_HALF_TURN = np.float32(math.pi / 2**24)
_LN2, _PER_LN2 = np.float32(math.log(2)), np.float32(1 / math.log(2))
# The bits of sqrt(1/2): taken as an integer, what is above it by whole exponents.
_SQRT_HALF_BITS, _MANTISSA_BITS = np.int32(0x3F3504F3), np.int32(23)
_EXPONENT_BIAS, _SMALLEST_EXPONENT = np.int32(127), np.float32(-126)
_3_2, _5_2 = np.float32(1.5), np.float32(2.5)
_1_3, _1_5, _1_7, _1_9 = (np.float32(1 / n) for n in (3, 5, 7, 9))
# Taylor: sine to x^11 and cosine to x^12 are good to 6e-8 up to a quarter turn.
_S3, _S5, _S7, _S9, _S11 = (
    np.float32((-1) ** (n // 2) / math.factorial(n)) for n in (3, 5, 7, 9, 11)
)
_C2, _C4, _C6, _C8, _C10, _C12 = (
    np.float32((-1) ** (n // 2) / math.factorial(n)) for n in (2, 4, 6, 8, 10, 12)
)
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / math.factorial(n)) for n in (2, 3, 4, 5, 6, 7))
# The smallest fraction of an image's range that gamma tells from nothing.
_TINY = np.float32(1e-30)

# Places in the state of the intensity pass: what is still to be done to every pixel (x * gain +
# bias), and what is known of the pixels after that.
_GAIN, _BIAS, _MEAN, _SD, _MIN, _MAX, _KNOWN = range(7)

# Columns that are turned together: a cache line of the widest stored pixels and then some.
_TILE = 16


# --------------------------------------------------------------------------------------------
# Random numbers


@kernel
def mix(value: Any) -> Any:
    """The finalizer of splitmix64: uint64 -> uint64."""
    value = (value ^ (value >> _30)) * _MIX_1
    value = (value ^ (value >> _27)) * _MIX_2
    return value ^ (value >> _31)


@kernel
def uniform(stream: Any, place: Any) -> float:
    """Number `place` of a stream, in [0, 1)."""
    return np.float64(mix(stream + (np.uint64(place) + _ONE_64) * _GOLDEN) >> _11) * _TO_UNIT


@kernel
def _between(stream: Any, place: Any, low: float, high: float) -> float:
    return low + (high - low) * uniform(stream, place)


@kernel
def _between_ratios(stream: Any, place: Any, low: float, high: float) -> float:
    """Uniform in the logarithm: half and double are equally likely."""
    return math.exp(_between(stream, place, math.log(low), math.log(high)))


# --------------------------------------------------------------------------------------------
# Geometry: from the rows of the plan to one inverse map


@kernel
def _then(inverse: Any, a: float, b: float, c: float, d: float) -> None:
    """Put the matrix ((a, b), (c, d)) in front of an inverse map (2, 3)."""
    for k in range(3):
        row, column = inverse[0, k], inverse[1, k]
        inverse[0, k] = a * row + b * column
        inverse[1, k] = c * row + d * column


@kernel
def _flip(inverse: Any, stream: Any, numbers: Any) -> bool:
    """Flip rows and columns; whether to flip slices too."""
    rows = -1.0 if uniform(stream, 1) < numbers[0] else 1.0
    columns = -1.0 if uniform(stream, 2) < numbers[1] else 1.0
    _then(inverse, rows, 0.0, 0.0, columns)
    return bool(uniform(stream, 3) < numbers[2])


@kernel
def _pose(inverse: Any, stream: Any, may_turn: bool) -> None:
    """One of the 8 poses of a square, or of the 4 that keep rows rows."""
    pose = int(uniform(stream, 1) * (8 if may_turn else 4))
    rows = -1.0 if pose & 1 else 1.0
    columns = -1.0 if pose & 2 else 1.0
    if pose & 4:
        _then(inverse, 0.0, rows, columns, 0.0)
    else:
        _then(inverse, rows, 0.0, 0.0, columns)


@kernel
def _move(inverse: Any, code: int, stream: Any, numbers: Any, size: Any, aspect: float) -> None:
    """Rotate, shift or zoom; the map goes from where a pixel is to where it was."""
    if code == ROTATE:
        angle = math.radians(_between(stream, 1, numbers[0], numbers[1]))
        sine, cosine = math.sin(angle), math.cos(angle)
        _then(inverse, cosine, sine / aspect, -sine * aspect, cosine)
    elif code == SHIFT:
        inverse[0, 2] -= _between(stream, 1, numbers[0], numbers[1]) * size[0]
        inverse[1, 2] -= _between(stream, 2, numbers[2], numbers[3]) * size[1]
    else:
        factor = 1 / _between_ratios(stream, 1, numbers[0], numbers[1])
        _then(inverse, factor, 0.0, 0.0, factor)


@kernel
def _first_pixel(stream: Any, place: int, extra: int, is_random: bool) -> int:
    """Where along an axis the output begins in the source; `extra` pixels are left over."""
    if extra <= 0 or not is_random:
        return extra // 2
    return int(uniform(stream, place) * (extra + 1))


@kernel
def draw_map(
    seed: Any, operations: Any, keys: Any, settings: Any, source: Any, size: Any, inverse: Any
) -> bool:
    """The affine part of the inverse map, and whether the slices change their order.

    Parameters
    ----------
    source, size
        (rows, columns) of the source and of the output.
    inverse
        (2, 3) float64, written: source = inverse @ (row, column, 1) of the output.
    """
    inverse[:] = 0
    inverse[0, 0] = inverse[1, 1] = 1
    first_row, first_column = (source[0] - size[0]) // 2, (source[1] - size[1]) // 2
    reversed_slices = False
    may_turn = size[0] == size[1] and settings[ASPECT] == 1
    # From the output back to the source: the last operation is undone first.
    for k in range(len(operations) - 1, -1, -1):
        code, numbers = int(operations[k, 0]), operations[k, 2:]
        stream = mix(seed ^ keys[k])
        if code > LAST_GEOMETRY or code == ELASTIC or uniform(stream, 0) >= operations[k, 1]:
            continue
        if code == FLIP:
            reversed_slices = reversed_slices != _flip(inverse, stream, numbers)
        elif code == DIHEDRAL:
            _pose(inverse, stream, may_turn)
        elif code == CROP:
            first_row = _first_pixel(stream, 1, source[0] - size[0], numbers[2] != 0)
            first_column = _first_pixel(stream, 2, source[1] - size[1], numbers[2] != 0)
        else:
            _move(inverse, code, stream, numbers, size, settings[ASPECT])
    row, column = (size[0] - 1) / 2, (size[1] - 1) / 2
    inverse[0, 2] += first_row + row - inverse[0, 0] * row - inverse[0, 1] * column
    inverse[1, 2] += first_column + column - inverse[1, 0] * row - inverse[1, 1] * column
    return reversed_slices


@kernel
def draw_knots(seed: Any, operations: Any, keys: Any, size: Any) -> Any:
    """Displacements (2, knots, knots) float64 in pixels of a coarse grid, and its spacing.

    Uniform within the amplitude; a cubic B-spline is an average of its coefficients, so that no
    pixel moves further.
    """
    for k in range(len(operations)):
        stream = mix(seed ^ keys[k])
        if operations[k, 0] != ELASTIC or uniform(stream, 0) >= operations[k, 1]:
            continue
        spacing = operations[k, 4]
        amplitude = _between(stream, 1, operations[k, 2], operations[k, 3])
        rows = int((size[0] - 1) / spacing) + 4
        columns = int((size[1] - 1) / spacing) + 4
        knots = np.empty((2, rows, columns))
        place = _ARRAY_DRAWS
        for axis in range(2):
            for row in range(rows):
                for column in range(columns):
                    knots[axis, row, column] = _between(stream, place, -amplitude, amplitude)
                    place += 1
        return knots, spacing
    return np.empty((2, 0, 0)), 1.0


@kernel
def _spline_weights(fraction: float, weights: Any) -> None:
    """The four weights of a uniform cubic B-spline."""
    rest = 1 - fraction
    weights[0] = rest * rest * rest / 6
    weights[1] = (4 - fraction * fraction * (6 - 3 * fraction)) / 6
    weights[2] = (4 - rest * rest * (6 - 3 * rest)) / 6
    weights[3] = fraction * fraction * fraction / 6


@kernel
def _column_weights(columns: int, spacing: float) -> Any:
    """First knot (columns,) and weights (4, columns) of every column."""
    first, weights = np.empty(columns, np.uint64), np.empty((4, columns))
    four = np.empty(4)
    for column in range(columns):
        knot = int(column / spacing)
        first[column] = np.uint64(knot)
        _spline_weights(column / spacing - knot, four)
        weights[:, column] = four
    return first, weights


@kernel
def _bend(row: int, knots: Any, spacing: float, first: Any, weights: Any, where: Any) -> None:
    """Add the displacements of one row to its coordinates `where` (2, columns)."""
    line, down = np.empty(knots.shape[2]), np.empty(4)
    knot = int(row / spacing)
    _spline_weights(row / spacing - knot, down)
    for axis in range(2):
        for k in range(len(line)):
            line[k] = 0.0
            for a in range(4):
                line[k] += down[a] * knots[axis, knot + a, k]
        for column in range(where.shape[1]):
            k = first[column]
            where[axis, column] += (
                weights[0, column] * line[k]
                + weights[1, column] * line[k + _ONE_64]
                + weights[2, column] * line[k + _TWO_64]
                + weights[3, column] * line[k + _THREE_64]
            )


@kernel
def _trace(
    row: int, inverse: Any, knots: Any, spacing: float, first: Any, weights: Any, where: Any
) -> None:
    """Source coordinates `where` (2, columns) of one row of the output."""
    for column in range(where.shape[1]):
        where[0, column], where[1, column] = row, column
    if knots.shape[1]:
        _bend(row, knots, spacing, first, weights, where)
    for column in range(where.shape[1]):
        r, c = where[0, column], where[1, column]
        where[0, column] = inverse[0, 0] * r + inverse[0, 1] * c + inverse[0, 2]
        where[1, column] = inverse[1, 0] * r + inverse[1, 1] * c + inverse[1, 2]


# --------------------------------------------------------------------------------------------
# Moving pixels that meet pixels


@kernel
def _on_lattice(inverse: Any) -> bool:
    """Whether the map is a pose and a shift by whole pixels: copies, exactly."""
    a, b, c, d = inverse[0, 0], inverse[0, 1], inverse[1, 0], inverse[1, 1]
    straight = abs(a) == 1 and abs(d) == 1 and b == 0 and c == 0
    turned = abs(b) == 1 and abs(c) == 1 and a == 0 and d == 0
    whole = inverse[0, 2] == math.floor(inverse[0, 2]) and inverse[1, 2] == math.floor(
        inverse[1, 2]
    )
    return bool((straight or turned) and whole)


@kernel
def _stays_inside(inverse: Any, source: Any, size: Any) -> bool:
    """Whether no pixel of the output comes from outside the source (an affine map: its corners)."""
    for corner in range(4):
        row = (size[0] - 1) * (corner & 1)
        column = (size[1] - 1) * (corner >> 1)
        for axis in range(2):
            place = inverse[axis, 0] * row + inverse[axis, 1] * column + inverse[axis, 2]
            if not 0 <= place <= source[axis] - 1:
                return False
    return True


@kernel
def _copy_rows(source: Any, out: Any, inverse: Any) -> None:
    """Rows stay rows; nothing comes from outside."""
    rows, columns = out.shape
    for row in range(rows):
        line = source[int(inverse[0, 0] * row + inverse[0, 2])]
        first = int(inverse[1, 2])
        if inverse[1, 1] > 0:
            part = line[first : first + columns]
            for column in range(columns):
                out[row, column] = part[column]
        else:
            part, last = line[first + 1 - columns : first + 1], np.uint64(columns - 1)
            for column in range(columns):
                out[row, column] = part[last - np.uint64(column)]


@kernel
def _copy_turned(source: Any, out: Any, inverse: Any) -> None:
    """Rows become columns; nothing comes from outside. In tiles, for the sake of the cache."""
    rows, columns = out.shape
    step_r, first_r = int(inverse[0, 1]), int(inverse[0, 2])
    step_c, first_c = int(inverse[1, 0]), int(inverse[1, 2])
    for top in range(0, rows, _TILE):
        bottom = min(top + _TILE, rows)
        for column in range(columns):
            line = source[step_r * column + first_r]
            for row in range(top, bottom):
                out[row, column] = line[np.uint64(step_c * row + first_c)]


@kernel
def _copy(source: Any, out: Any, inverse: Any) -> None:
    if inverse[0, 0] != 0:
        _copy_rows(source, out, inverse)
    else:
        _copy_turned(source, out, inverse)


# --------------------------------------------------------------------------------------------
# Moving pixels that fall between pixels


@kernel
def _split(where: Any, places: Any, fractions: Any) -> None:
    """Whole pixels (2, columns) int64 and fractions (2, columns) float32 of a row's coordinates."""
    for axis in range(2):
        for column in range(where.shape[1]):
            whole = np.floor(where[axis, column])
            fractions[axis, column] = np.float32(where[axis, column] - whole)
            places[axis, column] = int(whole)


@kernel
def _inside(places: Any, source: Any, reach: int) -> Any:
    """First and last + 1 of a run of pixels whose neighbours are all in the source (rows, columns).

    Those from `reach` before to ``reach + 1`` after. A straight line has one such run, and it is
    found whole; of a bent one the first is.
    """
    rows, columns, count = source[0] - 1 - reach, source[1] - 1 - reach, places.shape[1]
    begin = 0
    while begin < count and not (
        reach <= places[0, begin] < rows and reach <= places[1, begin] < columns
    ):
        begin += 1
    end = begin
    while end < count and reach <= places[0, end] < rows and reach <= places[1, end] < columns:
        end += 1
    return begin, end


@kernel
def _nearest_row(source: Any, where: Any, outside: int, out: Any) -> None:
    """One row of a mask; outside it is as at the edge, or nothing."""
    rows, columns = source.shape
    flat = source.reshape(rows * columns)
    for column in range(len(out)):
        r = int(np.floor(where[0, column] + 0.5))
        c = int(np.floor(where[1, column] + 0.5))
        if not (0 <= r < rows and 0 <= c < columns):
            if outside != EDGE:
                out[column] = 0
                continue
            r, c = min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)
        out[column] = flat[np.uint64(r * columns + c)]


@kernel
def _pixel(source: Any, r: int, c: int, outside: int, fill: Any) -> Any:
    """A pixel of the image continued beyond its borders, float32."""
    rows, columns = source.shape
    if not (0 <= r < rows and 0 <= c < columns):
        if outside != EDGE:
            return fill
        r, c = min(max(r, 0), rows - 1), min(max(c, 0), columns - 1)
    return np.float32(source[r, c])


@kernel
def _between_four(nw: Any, ne: Any, sw: Any, se: Any, v: Any, h: Any) -> Any:
    north, south = nw + h * (ne - nw), sw + h * (se - sw)
    return north + v * (south - north)


@kernel
def _linear_inside(
    source: Any, places: Any, fractions: Any, begin: int, end: int, out: Any
) -> None:
    """Columns of one row of an image, interpolated between four pixels that are all there."""
    flat, next_row = source.reshape(source.size), np.uint64(source.shape[1])
    for column in range(begin, end):
        place = np.uint64(places[0, column] * source.shape[1] + places[1, column])
        nw, ne = np.float32(flat[place]), np.float32(flat[place + _ONE_64])
        place += next_row
        sw, se = np.float32(flat[place]), np.float32(flat[place + _ONE_64])
        out[column] = _between_four(nw, ne, sw, se, fractions[0, column], fractions[1, column])


@kernel
def _linear_row(
    source: Any, places: Any, fractions: Any, begin: int, end: int, outside: int, fill: Any,
    out: Any,
) -> None:  # fmt: skip
    """Columns of one row of an image, interpolated between four pixels."""
    for column in range(begin, end):
        r, c = places[0, column], places[1, column]
        nw, ne = _pixel(source, r, c, outside, fill), _pixel(source, r, c + 1, outside, fill)
        r += 1
        sw, se = _pixel(source, r, c, outside, fill), _pixel(source, r, c + 1, outside, fill)
        out[column] = _between_four(nw, ne, sw, se, fractions[0, column], fractions[1, column])


@kernel
def _cubic_weights(f: Any) -> Any:
    """Keys' cubic convolution with a = -1/2 (1981): exact for parabolas."""
    one = f * (f * (_ONE - _HALF * f) - _HALF)
    two = _ONE + f * f * (_3_2 * f - _5_2)
    three = f * (_HALF + f * (_TWO - _3_2 * f))
    four = f * f * (_HALF * f - _HALF)
    return one, two, three, four


@kernel
def _cubic_inside(source: Any, places: Any, fractions: Any, begin: int, end: int, out: Any) -> None:
    """Columns of one row of an image, interpolated between sixteen pixels that are all there."""
    flat, next_row = source.reshape(source.size), np.uint64(source.shape[1])
    for column in range(begin, end):
        down, right = _cubic_weights(fractions[0, column]), _cubic_weights(fractions[1, column])
        place = np.uint64((places[0, column] - 1) * source.shape[1] + places[1, column] - 1)
        total = np.float32(0)
        for a in range(4):
            line = right[0] * np.float32(flat[place])
            line += right[1] * np.float32(flat[place + _ONE_64])
            line += right[2] * np.float32(flat[place + _TWO_64])
            line += right[3] * np.float32(flat[place + _THREE_64])
            total += down[a] * line
            place += next_row
        out[column] = total


@kernel
def _cubic_row(
    source: Any, places: Any, fractions: Any, begin: int, end: int, outside: int, fill: Any,
    out: Any,
) -> None:  # fmt: skip
    """Columns of one row of an image, interpolated between sixteen pixels."""
    for column in range(begin, end):
        down, right = _cubic_weights(fractions[0, column]), _cubic_weights(fractions[1, column])
        r, c = places[0, column] - 1, places[1, column] - 1
        total = np.float32(0)
        for a in range(4):
            line = np.float32(0)
            for b in range(4):
                line += right[b] * _pixel(source, r + a, c + b, outside, fill)
            total += down[a] * line
        out[column] = total


@kernel
def _resample(
    image: Any, mask: Any, out_image: Any, out_mask: Any, inverse: Any, knots: Any, spacing: float,
    settings: Any, fill: Any,
) -> None:  # fmt: skip
    """Fill the output row by row; image and mask share every coordinate."""
    rows, columns = out_mask.shape[1:]
    where, places = np.empty((2, columns)), np.empty((2, columns), np.int64)
    fractions = np.empty((2, columns), np.float32)
    first, weights = _column_weights(columns, spacing)
    outside, is_linear = int(settings[OUTSIDE]), settings[INTERPOLATION] == LINEAR
    for row in range(rows):
        _trace(row, inverse, knots, spacing, first, weights, where)
        _split(where, places, fractions)
        begin, end = _inside(places, mask.shape[1:], 0 if is_linear else 1)
        for plane in range(len(image)):
            source, out = image[plane], out_image[plane, row]
            if is_linear:
                _linear_inside(source, places, fractions, begin, end, out)
            else:
                _cubic_inside(source, places, fractions, begin, end, out)
            for first_out, last_out in ((0, begin), (end, columns)):
                if is_linear:
                    _linear_row(source, places, fractions, first_out, last_out, outside, fill, out)
                else:
                    _cubic_row(source, places, fractions, first_out, last_out, outside, fill, out)
        for plane in range(len(mask)):
            _nearest_row(mask[plane], where, outside, out_mask[plane, row])


@kernel
def _reverse(planes: Any, samples: int) -> None:
    """Turn the order of the slices round, in place; the samples of a slice keep theirs."""
    slices, count = len(planes) // samples, planes.shape[1] * planes.shape[2]
    for z in range(slices // 2):
        for s in range(samples):
            one = planes[z * samples + s].reshape(count)
            other = planes[(slices - 1 - z) * samples + s].reshape(count)
            for k in range(count):
                one[k], other[k] = other[k], one[k]


@kernel
def _fill_value(image: Any, settings: Any) -> Any:
    """What lies outside the image, float32."""
    if settings[OUTSIDE] == MINIMUM:
        return np.float32(image.min())
    return np.float32(settings[FILL])


# --------------------------------------------------------------------------------------------
# Logarithms, exponentials and normal numbers of a block of pixels


@kernel
def _logarithms(values: Any, bits: Any, logarithms: Any) -> None:
    """Natural logarithms of positive normal float32; `bits` is `values` seen as int32.

    ``x = 2**e * m`` with m from sqrt(1/2) to sqrt(2), and ``log(m) = 2 artanh((m-1)/(m+1))``, whose
    series is cut where the rest is below 1e-9. `values` is lost.
    """
    for k in range(len(values)):
        exponent = np.int32((bits[k] - _SQRT_HALF_BITS) >> _MANTISSA_BITS)
        bits[k] -= exponent << _MANTISSA_BITS
        logarithms[k] = np.float32(exponent)
    for k in range(len(values)):
        s = np.divide(values[k] - _ONE, values[k] + _ONE)
        z = s * s
        series = _ONE + z * (_1_3 + z * (_1_5 + z * (_1_7 + z * _1_9)))
        logarithms[k] = logarithms[k] * _LN2 + _TWO * s * series


@kernel
def _exponentials(values: Any, powers: Any, scales: Any, exponentials: Any) -> None:
    """Exponentials of float32 up to 80, from -87 on; below that 1e-38.

    ``exp(x) = 2**k * exp(x - k log(2))``; `powers` is room for the bits of 2**k, `scales` the same
    room as float32.
    """
    for k in range(len(values)):
        power = max(_SMALLEST_EXPONENT, np.floor(values[k] * _PER_LN2 + _HALF))
        x = max(-_ONE, values[k] - power * _LN2)
        tail = _E4 + x * (_E5 + x * (_E6 + x * _E7))
        exponentials[k] = _ONE + x * (_ONE + x * (_E2 + x * (_E3 + x * tail)))
        powers[k] = np.int32(power)
    for k in range(len(values)):
        powers[k] = (powers[k] + _EXPONENT_BIAS) << _MANTISSA_BITS
    for k in range(len(values)):
        exponentials[k] *= scales[k]


@kernel
def _normals(stream: Any, first: Any, work: Any, bits: Any, normals: Any) -> None:
    """Normal numbers 2 * first … of a stream into a block (2 * _BLOCK,) by Box and Muller (1958).

    One 64-bit number makes two of them: radius times cosine and radius times sine, the halves of
    the block. The largest possible one is 5.9. `work` is (4, _BLOCK) float32, `bits` its first row
    as int32: rows apart from each other, or the compiler could not tell that they do not overlap.
    """
    fractions, angles, signs, radii = work[0], work[1], work[2], work[3]
    for k in range(_BLOCK):
        number = mix(stream + (first + np.uint64(k) + _ONE_64) * _GOLDEN)
        fractions[k] = (np.float32(np.int32(number >> _40)) + _HALF) * _TO_UNIT_24
        angles[k] = (np.float32(np.int32(number & _24_BITS)) + _HALF - _MIDDLE_24) * _TO_HALF_TURN
        signs[k] = _ONE - _TWO * np.float32(np.int32((number >> _24) & _ONE_64))
    _logarithms(fractions, bits, radii)
    cosines, sines = normals[:_BLOCK], normals[_BLOCK:]
    for k in range(_BLOCK):
        radius = np.sqrt(-_TWO * radii[k]) * signs[k]
        x = angles[k]
        z = x * x
        sine = _ONE + z * (_S3 + z * (_S5 + z * (_S7 + z * (_S9 + z * _S11))))
        cosine = _C4 + z * (_C6 + z * (_C8 + z * (_C10 + z * _C12)))
        cosines[k] = radius * (_ONE + z * (_C2 + z * cosine))
        sines[k] = radius * x * sine


# --------------------------------------------------------------------------------------------
# Intensities


@kernel
def _is_mapped(intensity: Any) -> bool:
    """Whether served intensities are not the stored ones."""
    is_clipped = intensity[LOW] > -np.inf or intensity[HIGH] < np.inf
    return bool(is_clipped or intensity[CENTER] != 0 or intensity[SCALE] != 1)


@kernel
def _map(out: Any, intensity: Any) -> None:
    """Clip and rescale: from stored to served intensities."""
    low, high = np.float32(intensity[LOW]), np.float32(intensity[HIGH])
    center, scale = np.float32(intensity[CENTER]), np.float32(intensity[SCALE])
    for k in range(len(out)):
        value = out[k]
        value = max(low, value)
        value = min(high, value)
        out[k] = (value - center) * scale


@kernel
def _measure(out: Any, state: Any) -> None:
    """Mean, standard deviation, minimum and maximum of the pixels as the state makes them."""
    rows, columns = out.shape
    sums, squares = np.zeros(columns), np.zeros(columns)
    lows, highs = out[0].copy(), out[0].copy()
    for row in range(rows):
        for column in range(columns):
            value = out[row, column]
            sums[column] += value
            squares[column] += np.float64(value) * np.float64(value)
        for column in range(columns):
            value = out[row, column]
            lows[column] = min(lows[column], value)
            highs[column] = max(highs[column], value)
    mean = sums.sum() / (rows * columns)
    variance = squares.sum() / (rows * columns) - mean * mean
    gain, bias = state[_GAIN], state[_BIAS]
    state[_MEAN], state[_SD] = mean * gain + bias, math.sqrt(max(variance, 0.0)) * gain
    state[_MIN], state[_MAX] = lows.min() * gain + bias, highs.max() * gain + bias
    state[_KNOWN] = 1


@kernel
def _rescale(state: Any, gain: float, bias: float) -> None:
    """Note that every pixel x is to become x * gain + bias, gain above 0."""
    state[_GAIN], state[_BIAS] = state[_GAIN] * gain, state[_BIAS] * gain + bias
    state[_SD] *= gain
    for place in (_MEAN, _MIN, _MAX):
        state[place] = state[place] * gain + bias


@kernel
def _settle(state: Any) -> None:
    """Note that the pixels are now as noted, and are no longer what was measured."""
    state[_GAIN], state[_BIAS], state[_KNOWN] = 1.0, 0.0, 0.0


@kernel
def _apply_rescale(out: Any, state: Any) -> None:
    gain, bias = np.float32(state[_GAIN]), np.float32(state[_BIAS])
    for k in range(len(out)):
        out[k] = out[k] * gain + bias
    _settle(state)


@kernel
def _add_noise(out: Any, sd: float, stream: Any, state: Any) -> None:
    """What is noted, and white noise on top, in one go."""
    gain, bias, amount = np.float32(state[_GAIN]), np.float32(state[_BIAS]), np.float32(sd)
    work, normals = np.empty((4, _BLOCK), np.float32), np.empty(2 * _BLOCK, np.float32)
    bits = work[0].view(np.int32)
    for start in range(0, len(out), 2 * _BLOCK):
        _normals(stream, np.uint64(_ARRAY_DRAWS + start // 2), work, bits, normals)
        part = out[start : start + 2 * _BLOCK]
        for k in range(len(part)):
            part[k] = part[k] * gain + bias + amount * normals[k]
    _settle(state)


@kernel
def _bend_intensities(out: Any, exponent: float, state: Any) -> None:
    """Gamma: the range of the sample stays, its fraction is raised to a power."""
    low, high = state[_MIN], state[_MAX]
    if not high > low:
        return
    gain = np.float32(state[_GAIN] / (high - low))
    bias = np.float32((state[_BIAS] - low) / (high - low))
    span, floor, power = np.float32(high - low), np.float32(low), np.float32(exponent)
    work, logarithms = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    scales = np.empty(_BLOCK, np.float32)
    bits, powers = work.view(np.int32), scales.view(np.int32)
    for start in range(0, len(out), _BLOCK):
        part = out[start : start + _BLOCK]
        work[:] = _ONE
        for k in range(len(part)):
            work[k] = max(_TINY, part[k] * gain + bias)
        _logarithms(work, bits, logarithms)
        for k in range(_BLOCK):
            logarithms[k] *= power
        _exponentials(logarithms, powers, scales, work)
        for k in range(len(part)):
            part[k] = work[k] * span + floor
    _settle(state)


@kernel
def _gaussian(sd: float) -> Any:
    """Weights (2 * radius + 1,) float32 up to four standard deviations."""
    radius = int(4 * sd + 0.5)
    weights = np.empty(2 * radius + 1)
    for k in range(len(weights)):
        weights[k] = math.exp(-0.5 * ((k - radius) / sd) ** 2)
    return (weights / weights.sum()).astype(np.float32)


@kernel
def _blur(plane: Any, weights: Any, work: Any) -> None:
    """Convolve the columns and the rows of a plane; beyond its borders it is as at them."""
    rows, columns = plane.shape
    radius = len(weights) // 2
    padded = np.empty(columns + 2 * radius, np.float32)
    for row in range(rows):
        line = work[row]
        line[:] = np.float32(0)
        for k in range(len(weights)):
            other, weight = plane[min(max(row + k - radius, 0), rows - 1)], weights[k]
            for column in range(columns):
                line[column] += weight * other[column]
    for row in range(rows):
        padded[:radius], padded[radius + columns :] = work[row, 0], work[row, columns - 1]
        padded[radius : radius + columns] = work[row]
        line = plane[row]
        line[:] = np.float32(0)
        for k in range(len(weights)):
            part, weight = padded[k : k + columns], weights[k]
            for column in range(columns):
                line[column] += weight * part[column]


@kernel
def _coarse(length: int, factor: float) -> int:
    """How many pixels are left along an axis."""
    return max(1, int(length / factor + 0.5))


@kernel
def _shrink(lines: Any, out: Any) -> None:
    """Means over equal intervals of the first axis: (n, m) -> (fewer, m), exact areas."""
    count, coarse = len(lines), len(out)
    for k in range(coarse):
        line = out[k]
        line[:] = np.float32(0)
        low, high = k * count / coarse, (k + 1) * count / coarse
        for i in range(int(low), min(math.ceil(high), count)):
            weight = np.float32((min(high, i + 1.0) - max(low, float(i))) * coarse / count)
            other = lines[i]
            for j in range(len(line)):
                line[j] += weight * other[j]


@kernel
def _stretch(lines: Any, out: Any) -> None:
    """Linear interpolation along the first axis: (n, m) -> (more, m), as at the edge beyond it."""
    count, coarse = len(out), len(lines)
    for i in range(count):
        place = (i + 0.5) * coarse / count - 0.5
        k = math.floor(place)
        fraction = np.float32(place - k)
        one, other = lines[max(k, 0)], lines[min(k + 1, coarse - 1)]
        line = out[i]
        for j in range(len(line)):
            line[j] = one[j] + fraction * (other[j] - one[j])


@kernel
def _turn(plane: Any, out: Any) -> None:
    for top in range(0, out.shape[0], _TILE):
        for column in range(out.shape[1]):
            line = plane[column]
            for row in range(top, min(top + _TILE, out.shape[0])):
                out[row, column] = line[row]


@kernel
def _lose_resolution(plane: Any, factor: float) -> None:
    """Replace a plane by one of fewer pixels, stretched to its size again."""
    rows, columns = plane.shape
    few_rows, few_columns = _coarse(rows, factor), _coarse(columns, factor)
    low = np.empty((few_rows, columns), np.float32)
    _shrink(plane, low)
    turned = np.empty((columns, few_rows), np.float32)
    _turn(low, turned)
    small = np.empty((few_columns, few_rows), np.float32)
    _shrink(turned, small)
    _stretch(small, turned)
    _turn(turned, low)
    _stretch(low, plane)


@kernel
def _soften(out: Any, code: int, amount: float) -> None:
    """Blur or low resolution, plane by plane; neither changes a mean by design."""
    if code == BLUR:
        weights = _gaussian(amount)
        work = np.empty(out.shape[1:], np.float32)
        for plane in range(len(out)):
            _blur(out[plane], weights, work)
    else:
        for plane in range(len(out)):
            _lose_resolution(out[plane], amount)


@kernel
def _change(out: Any, code: int, numbers: Any, stream: Any, state: Any) -> None:
    """One operation on the intensities of a sample (planes, rows, columns)."""
    if not state[_KNOWN] and (code in (CONTRAST, GAMMA) or numbers[2] != 0):
        _measure(out.reshape(-1, out.shape[2]), state)
    if code == CONTRAST:
        factor = _between_ratios(stream, 1, numbers[0], numbers[1])
        _rescale(state, factor, state[_MEAN] * (1 - factor))
    elif code == BRIGHTNESS:
        unit = state[_SD] if numbers[2] != 0 else 1.0
        _rescale(state, 1.0, _between(stream, 1, numbers[0], numbers[1]) * unit)
    elif code == NOISE:
        unit = state[_SD] if numbers[2] != 0 else 1.0
        amount = _between(stream, 1, numbers[0], numbers[1]) * unit
        _add_noise(out.reshape(-1), amount, stream, state)
    elif code == GAMMA:
        exponent = _between_ratios(stream, 1, numbers[0], numbers[1])
        _bend_intensities(out.reshape(-1), exponent, state)
    else:
        # linear, with weights that sum to one: what is noted may be done afterwards
        _soften(out, code, _between(stream, 1, numbers[0], numbers[1]))
        state[_KNOWN] = 0


@kernel
def change_intensities(out: Any, seed: Any, operations: Any, keys: Any) -> None:
    """All operations on intensities, in their order, in place: (planes, rows, columns) float32."""
    state = np.zeros(7)
    _settle(state)
    for k in range(len(operations)):
        code = int(operations[k, 0])
        stream = mix(seed ^ keys[k])
        if code > LAST_GEOMETRY and uniform(stream, 0) < operations[k, 1]:
            _change(out, code, operations[k, 2:], stream, state)
    if state[_GAIN] != 1 or state[_BIAS] != 0:
        _apply_rescale(out.reshape(-1), state)


@kernel
def augment_sample(
    image: Any, mask: Any, out_image: Any, out_mask: Any, seed: Any, operations: Any, keys: Any,
    settings: Any, intensity: Any,
) -> None:  # fmt: skip
    """Move the pixels of a sample, map its intensities to the served ones, and change those.

    Parameters
    ----------
    image, mask
        (planes, rows, columns) and (slices, rows, columns).
    out_image, out_mask
        The same of the output's rows and columns; float32, and the mask's type.
    seed, operations, keys, settings
        uint64, and the arrays of a plan.
    intensity
        (4,) float64: low, high, center, scale.
    """
    source, size = mask.shape[1:], out_mask.shape[1:]
    inverse = np.empty((2, 3))
    reversed_slices = draw_map(seed, operations, keys, settings, source, size, inverse)
    knots, spacing = draw_knots(seed, operations, keys, size)
    is_inside = knots.shape[1] == 0 and _stays_inside(inverse, source, size)
    if is_inside and _on_lattice(inverse):
        for plane in range(len(image)):
            _copy(image[plane], out_image[plane], inverse)
        for plane in range(len(mask)):
            _copy(mask[plane], out_mask[plane], inverse)
    else:
        # sixteen pixels reach beyond the border where four do not
        is_needed = not is_inside or settings[INTERPOLATION] != LINEAR
        fill = _fill_value(image, settings) if is_needed else np.float32(0)
        _resample(image, mask, out_image, out_mask, inverse, knots, spacing, settings, fill)
    if reversed_slices:
        _reverse(out_image, int(settings[SAMPLES]))
        _reverse(out_mask, 1)
    if _is_mapped(intensity):
        _map(out_image.reshape(-1), intensity)
    change_intensities(out_image, seed, operations, keys)
