"""What is measured on every slice, and which of it is worth a flag. Pure; a batch per call.

Nothing here rejects a slice: the measurements go into the table, the flags beside them. Whatever
walks over pixels or points is one kernel call per batch that releases the GIL.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.jit import kernel
from parallel_dicomseg.records import FLAGS, Checks, Contours, Float64, Int32, Int64, Measured

Bool = NDArray[np.bool_]
UInt16 = NDArray[np.uint16]
Ellipse = tuple[float, float, float, float, float]

#: Five points always lie on a conic, so a fit through fewer than six says nothing.
FEWEST_POINTS = 6

#: Centre and Q of a ring that no ellipse fits.
NO_ELLIPSE = (0.0, 0.0, 0.0, 0.0, 0.0)

#: Newton's method converges quadratically; a double root, which halves the error, takes about 50.
MOST_NEWTON_STEPS = 100

#: Pixels whose 16-bit values, and the 16-bit halves of their squares, sum up within 32 bits.
BLOCK = 32_768

#: A fit needs these sums over a ring's points: x⁴ x³y x²y² xy³ y⁴, x³ x²y xy² y³, x² xy y², x y, 1.
#: Here stands which of them is the sum of the product of two of (x², xy, y², x, y, 1).
MOMENT = np.array(
    [
        [0, 1, 2, 5, 6, 9],
        [1, 2, 3, 6, 7, 10],
        [2, 3, 4, 7, 8, 11],
        [5, 6, 7, 9, 10, 12],
        [6, 7, 8, 10, 11, 13],
        [9, 10, 11, 12, 13, 14],
    ]
)


def measure(
    images: NDArray[Any],
    masks: NDArray[Any],
    contours: Contours,
    *,
    contour_digest: NDArray[np.uint64],
    longer_than_header: Bool,
    cropped: Int64,
    elliptic: Bool,
    bitmaps: Int64,
    looked_at: Bool,
    nested: tuple[tuple[int, int], ...],
    checks: Checks,
) -> Measured:
    """Everything this module knows about the n slices of a task.

    Parameters
    ----------
    images : (n, rows, columns) or (n, rows, columns, samples)
        As `measure_intensity` takes them.
    masks : (n, rows, columns) uint8 … uint64
        Bit s is structure s.
    contours : Contours
        The outlines, `plane` in 0 … n - 1, in the pixel coordinates of the masks.
    contour_digest : (n, s) uint64
        Passed through; its shape tells the number of structures.
    longer_than_header : (n,) bool
        Whether the pixel data is longer than rows, columns and frames account for.
    cropped : (n, s) int64
        Pixels of the source's mask that lie outside the stored one; passed through.
    elliptic : (r,) bool
        Which rings are of organs that should be nearly elliptic.
    bitmaps : (k, 2) int64
        Slice and structure of what was not drawn as rings: it may have any number of pieces.
    looked_at : (n, s) bool
        Where a structure without outline is absent, and not merely not annotated.
    nested : pairs (inner, outer) of structures
    checks : Checks
        The thresholds.
    """
    shape = contour_digest.shape
    ring_count = count_rings(contours, shape)
    ring_count[bitmaps[:, 0], bitmaps[:, 1]] = np.iinfo(np.int32).max
    drawn = ring_count > 0
    area, components, outside = measure_masks(masks, drawn, nested)
    rounds = contours if elliptic.all() else contours.take(elliptic)
    residual = worst_rings(rounds, ellipse_residuals(rounds), shape)
    flags = raise_flags(
        area=area,
        components=components,
        outside=outside,
        ellipse_residual=residual,
        ring_count=ring_count,
        nested=nested,
        pixels=images.shape[1] * images.shape[2],
        longer_than_header=longer_than_header,
        cropped=cropped,
        checks=checks,
    )
    return Measured(
        annotated=drawn | looked_at,
        outlined=drawn,
        area=area,
        components=components,
        outside=outside,
        ellipse_residual=residual,
        contour_digest=contour_digest,
        intensity=measure_intensity(images.reshape(*images.shape[:2], -1)),
        flags=flags,
        cropped=cropped,
    )


# ---------------------------------------------------------------------------------------- masks


def measure_masks(
    masks: NDArray[Any], annotated: Bool, nested: tuple[tuple[int, int], ...] = ()
) -> tuple[Int64, Int32, Int64]:
    """Size, number of pieces, and nesting of the structures in a batch of bit masks.

    Parameters
    ----------
    masks : (n, rows, columns) uint8 … uint64
        Bit s of a pixel is structure s.
    annotated : (n, s) bool
        Whether structure s has an outline on the slice.
    nested : pairs (inner, outer) of structures

    Returns
    -------
    area : (n, s) int64
        Pixels of each structure.
    components : (n, s) int32
        8-connected components of each structure.
    outside : (n, len(nested)) int64
        Pixels of the inner structure that the outer one does not cover; 0 where one of the two
        is not annotated, since nothing is known there.
    """
    slices, structures = annotated.shape
    bits = np.left_shift(1, np.arange(structures, dtype=np.uint64)).astype(masks.dtype)
    pairs = np.array(nested, np.int64).reshape(-1, 2)
    area = np.zeros((slices, structures), np.int64)
    components = np.zeros((slices, structures), np.int32)
    outside = np.zeros((slices, len(pairs)), np.int64)
    _measure_masks(np.ascontiguousarray(masks), annotated, bits, pairs, area, components, outside)
    return area, components, outside


@kernel
def _measure_masks(
    masks: NDArray[Any],
    annotated: Bool,
    bits: NDArray[Any],
    pairs: Int64,
    area: Int64,
    components: Int32,
    outside: Int64,
) -> None:
    slices, rows, columns = masks.shape
    in_row = np.empty(rows, masks.dtype)
    in_column = np.empty(columns, masks.dtype)
    boxes = np.empty((len(bits), 4), np.int64)
    spans = np.empty((2, columns // 2 + 1, 2), np.int64)
    parents = np.empty(columns + 2, np.int64)
    for i in range(slices):
        mask = masks[i]
        _profiles(mask, in_row, in_column)
        for s in range(len(bits)):
            boxes[s, 0], boxes[s, 1] = _extent(in_row, bits[s])
            boxes[s, 2], boxes[s, 3] = _extent(in_column, bits[s])
            area[i, s], components[i, s] = _count(mask, bits[s], boxes[s], spans, parents)
        for k in range(len(pairs)):
            inner, outer = pairs[k]
            if annotated[i, inner] and annotated[i, outer]:
                outside[i, k] = _outside(mask, bits[inner], bits[outer], boxes[inner])


@kernel
def _profiles(mask: NDArray[Any], in_row: NDArray[Any], in_column: NDArray[Any]) -> None:
    """Which structures occur in each row, and in each column.

    Both loops over pixels vectorise; a search for the first and last pixel of a row would not.
    """
    rows, columns = mask.shape
    in_column[:] = 0
    for row in range(rows):
        union = mask.dtype.type(0)
        for column in range(columns):
            # Back to the mask's type, lest the vectors be as wide as numba's integers.
            union = mask.dtype.type(union | mask[row, column])
        in_row[row] = union
        if union:
            for column in range(columns):
                in_column[column] |= mask[row, column]


@kernel
def _extent(profile: NDArray[Any], bit: Any) -> tuple[int, int]:
    """First, and one past the last, place where a structure occurs; (0, 0) for nowhere."""
    stop = len(profile)
    while stop and not profile[stop - 1] & bit:
        stop -= 1
    start = 0
    while start < stop and not profile[start] & bit:
        start += 1
    return start, stop


@kernel
def _count(
    mask: NDArray[Any], bit: Any, box: Int64, spans: Int64, parents: Int64
) -> tuple[int, int]:
    """Pixels and 8-connected components of one structure, by union-find over runs of pixels.

    Every run counts as a component of its own until it is joined to another one. Only two rows
    are held, their runs alternately in spans[0] and spans[1] (run, start and stop): which runs of
    the upper row belong together is all that the lower one has to know of what lies above.
    """
    pixels = pieces = runs_above = 0
    for row in range(box[0], box[1]):
        here = row & 1
        runs = _find_runs(mask, row, bit, box, spans, here)
        for run in range(runs):
            pixels += spans[here, run, 1] - spans[here, run, 0]
        pieces += runs - _join_rows(spans, here, runs, runs_above, parents)
        for run in range(runs):
            parents[run] = parents[runs_above + run] - runs_above
        runs_above = runs
    return pixels, pieces


@kernel
def _find_runs(mask: NDArray[Any], row: int, bit: Any, box: Int64, spans: Int64, here: int) -> int:
    """Runs [start, stop) of set pixels in a row, into spans[here]; how many."""
    runs = 0
    inside = False
    for column in range(box[2], box[3]):
        if ((mask[row, column] & bit) != 0) != inside:
            inside = not inside
            if inside:
                spans[here, runs, 0] = column
            else:
                spans[here, runs, 1] = column
                runs += 1
    if inside:
        spans[here, runs, 1] = box[3]
        runs += 1
    return runs


@kernel
def _join_rows(spans: Int64, here: int, runs: int, runs_above: int, parents: Int64) -> int:
    """Join the runs of two rows that touch, corners included; how many components that saved.

    Node k < runs_above is a run of the upper row, node runs_above + k one of the lower row. The
    root of a class is its last node, so that parents of lower runs are lower runs, and the upper
    ones can be left behind.
    """
    above = 1 - here
    joined = first = 0
    for run in range(runs):
        parents[runs_above + run] = runs_above + run
        # Stops are exclusive: where a stop equals a start, two corners touch.
        while first < runs_above and spans[above, first, 1] < spans[here, run, 0]:
            first += 1
        other = first
        while other < runs_above and spans[above, other, 0] <= spans[here, run, 1]:
            one, two = _root(parents, runs_above + run), _root(parents, other)
            if one != two:
                parents[min(one, two)] = max(one, two)
                joined += 1
            other += 1
    return joined


@kernel
def _root(parents: Int64, node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@kernel
def _outside(mask: NDArray[Any], inner: Any, outer: Any, box: Int64) -> int:
    """Pixels of one structure, within its box, that another one does not cover."""
    outside = 0
    for row in range(box[0], box[1]):
        for column in range(box[2], box[3]):
            pixel = mask[row, column]
            outside += ((pixel & inner) != 0) & ((pixel & outer) == 0)
    return outside


# ------------------------------------------------------------------------------------ intensity


def measure_intensity(images: NDArray[Any]) -> Float64:
    """Minimum, maximum, mean and population standard deviation of every image of a batch.

    Parameters
    ----------
    images : (n, rows, columns)
        Integers of up to 16 bits are summed up in integers, exactly; any other type in float64,
        in two passes.

    Returns
    -------
    (n, 4) float64
        NaN in all four where an image holds a NaN.
    """
    statistics = np.empty((len(images), 4), np.float64)
    images = np.ascontiguousarray(images)
    if images.dtype.kind in "iu" and images.dtype.itemsize <= 2:
        # A value less this fits 16 bits with sign.
        shift = 32_768 if images.dtype == np.uint16 else 0
        pixels = images.shape[1] * images.shape[2]
        _integer_statistics(images.reshape(len(images), pixels), shift, statistics)
    else:
        _float_statistics(images, statistics)
    return statistics


@kernel
def _integer_statistics(images: NDArray[Any], shift: int, statistics: Float64) -> None:
    pixels = images.shape[1]
    for i in range(len(images)):
        lowest, highest, total, squares = 32_767, -32_768, 0, 0
        for start in range(0, pixels, BLOCK):
            block = _block_sums(images[i, start : start + BLOCK], np.int32(shift))
            lowest, highest = min(lowest, block[0]), max(highest, block[1])
            total += block[2]
            squares += block[3]
        # About the nearest integer to the mean: exact in 64 bits, and the one subtraction in
        # floating point cancels at most one bit (squares >= |rest| >= 2 * rest**2 / pixels).
        middle = int(np.floor(total / pixels + 0.5))
        rest = total - middle * pixels
        squares += (middle * pixels - 2 * total) * middle
        variance = (squares - rest * (rest / pixels)) / pixels
        statistics[i, 0] = lowest + shift
        statistics[i, 1] = highest + shift
        statistics[i, 2] = (total + shift * pixels) / pixels
        statistics[i, 3] = np.sqrt(max(variance, 0.0))


@kernel
def _block_sums(block: NDArray[Any], shift: Any) -> tuple[int, int, int, int]:
    """Minimum, maximum, sum and sum of squares of at most BLOCK values, each less `shift`.

    All sums fit 32 bits, so that the loop runs in the widest vectors; the squares (up to 2**30)
    are summed up in two halves.
    """
    lowest, highest = np.int32(32_767), np.int32(-32_768)
    total, high, low = np.int32(0), np.int32(0), np.int32(0)
    for k in range(len(block)):
        value = np.int32(np.int32(block[k]) - shift)
        square = np.int32(value * value)
        lowest = min(lowest, value)
        highest = max(highest, value)
        total = np.int32(total + value)
        high = np.int32(high + np.int32(square >> 16))
        low = np.int32(low + np.int32(square & 0xFFFF))
    return int(lowest), int(highest), int(total), int(high) * 65_536 + int(low)


@kernel
def _float_statistics(images: NDArray[Any], statistics: Float64) -> None:
    slices, rows, columns = images.shape
    # One sum per column: additions keep their order, and a row is added in one vector loop.
    sums = np.empty((2, columns), np.float64)
    extremes = np.empty((2, columns), images.dtype)
    for i in range(slices):
        sums[:] = 0
        extremes[:] = images[i, 0]
        for row in range(rows):
            for column in range(columns):
                value = images[i, row, column]
                sums[0, column] += value
                extremes[0, column] = min(extremes[0, column], value)
                extremes[1, column] = max(extremes[1, column], value)
        mean = sums[0].sum() / (rows * columns)
        sums[0] = 0
        for row in range(rows):
            for column in range(columns):
                deviation = images[i, row, column] - mean
                sums[0, column] += deviation
                sums[1, column] += deviation * deviation
        rest = sums[0].sum()
        variance = (sums[1].sum() - rest * (rest / (rows * columns))) / (rows * columns)
        statistics[i, 0] = extremes[0].min()
        statistics[i, 1] = extremes[1].max()
        statistics[i, 2] = mean
        statistics[i, 3] = np.sqrt(max(variance, 0.0))
        if np.isnan(mean):
            statistics[i] = np.nan


# ------------------------------------------------------------------------------------- outlines


def ellipse_residuals(contours: Contours) -> Float64:
    """How far each ring is from the ellipse that fits it best.

    The fit is the direct least-squares one of Fitzgibbon, Pilu and Fisher (1999), in the
    numerically stable form of Halir and Flusser (1998). All points weigh the same, so an outline
    that has its points denser on one side is fitted better there.

    Parameters
    ----------
    contours : Contours
        r rings.

    Returns
    -------
    (r,) float64
        Root mean square distance of the ring's points from the ellipse, in units of its mean
        radius sqrt(a * b); NaN where fewer than six points are distinct or no ellipse fits. The
        distance is the first-order one, |s - 1| / |grad s| with the elliptical radius s (1 on the
        ellipse): exact for a circle, finite everywhere; the centre itself counts as one radius.

    References
    ----------
    Fitzgibbon, Pilu, Fisher: Direct least square fitting of ellipses. IEEE TPAMI 21 (1999) 476.
    Halir, Flusser: Numerically stable direct least squares fitting of ellipses. WSCG 1998, 125.
    """
    residuals = np.empty(len(contours.offsets) - 1)
    _ellipse_residuals(contours.points_column_row, contours.offsets, residuals)
    return residuals


# Only + - * / and sqrt, which IEEE 754 fixes to the last bit, and one ring at a time: so that the
# file does not depend on the worker's LAPACK, nor on how many slices a task has.


@kernel
def _ellipse_residuals(points: Float64, offsets: Int64, residuals: Float64) -> None:
    distinct = np.empty((FEWEST_POINTS, 2))
    standard = np.empty((_longest(offsets), 2))
    moments = np.empty(15)
    for ring in range(len(residuals)):
        outline = points[offsets[ring] : offsets[ring + 1]]
        residuals[ring] = np.nan
        if _has_enough_points(outline, distinct) and _standardise(outline, standard):
            _sum_moments(standard[: len(outline)], moments)
            residuals[ring] = _rms_distance(standard[: len(outline)], _fit_ellipse(moments))


@kernel
def _longest(offsets: Int64) -> int:
    longest = 0
    for ring in range(len(offsets) - 1):
        longest = max(longest, offsets[ring + 1] - offsets[ring])
    return longest


@kernel
def _has_enough_points(points: Float64, distinct: Float64) -> bool:
    """Whether FEWEST_POINTS of them are distinct; `distinct` is scratch."""
    count = 0
    for point in range(len(points)):
        known = False
        for k in range(count):
            known |= distinct[k, 0] == points[point, 0] and distinct[k, 1] == points[point, 1]
        if not known:
            distinct[count] = points[point]
            count += 1
            if count == FEWEST_POINTS:
                return True
    return False


@kernel
def _standardise(points: Float64, standard: Float64) -> bool:
    """Points about their centroid, in units of their RMS distance from it.

    False where they are on a line, or one is not finite.
    """
    count = len(points)
    x, y = 0.0, 0.0
    for point in range(count):
        x += points[point, 0]
        y += points[point, 1]
    x, y = x / count, y / count
    xx, xy, yy = 0.0, 0.0, 0.0
    for point in range(count):
        u, v = points[point, 0] - x, points[point, 1] - y
        standard[point, 0], standard[point, 1] = u, v
        xx, xy, yy = xx + u * u, xy + u * v, yy + v * v
    # A comparison with NaN is false: what is not finite is not usable either.
    if not (xx * yy - xy * xy > 1e-12 * (xx + yy) * (xx + yy) and np.isfinite(xx + yy)):
        return False
    scale = np.sqrt(count / (xx + yy))
    for point in range(count):
        standard[point, 0] *= scale
        standard[point, 1] *= scale
    return True


@kernel
def _sum_moments(points: Float64, moments: Float64) -> None:
    """Sums over standardised points, each in a variable of its own and so in a register."""
    x4 = x3y = x2y2 = xy3 = y4 = x3 = x2y = xy2 = y3 = x2 = xy = y2 = 0.0
    for point in range(len(points)):
        x, y = points[point, 0], points[point, 1]
        u, v, w = x * x, x * y, y * y
        x4, x3y, x2y2, xy3, y4 = x4 + u * u, x3y + u * v, x2y2 + u * w, xy3 + v * w, y4 + w * w
        x3, x2y, xy2, y3 = x3 + u * x, x2y + u * y, xy2 + w * x, y3 + w * y
        x2, xy, y2 = x2 + u, xy + v, y2 + w
    # x and y sum up to zero.
    moments[:] = (x4, x3y, x2y2, xy3, y4, x3, x2y, xy2, y3, x2, xy, y2, 0.0, 0.0, len(points) * 1.0)


@kernel
def _fit_ellipse(moments: Float64) -> Ellipse:
    """Centre x, y and matrix Q (xx, xy, yy): (p - centre)' Q (p - centre) = 1; Q = 0 for none.

    Halir and Flusser: eliminate the linear part of the conic ax² + bxy + cy² + dx + ey + f = 0;
    of what is left, R, find (a, b, c) with R (a, b, c)' = lambda C (a, b, c)' and 4ac - b² > 0.
    """
    eliminated, reduced = _eliminate_linear_part(moments)
    multiplier = _largest_eigenvalue(reduced)
    # R - lambda C with C = [[0, 0, 2], [0, -1, 0], [2, 0, 0]]; (a, b, c) is its null vector.
    reduced[0, 2] -= 2.0 * multiplier
    reduced[2, 0] -= 2.0 * multiplier
    reduced[1, 1] += multiplier
    a, b, c = _null_vector(reduced)
    discriminant = 4.0 * a * c - b * b
    if not discriminant > 0.0:
        return NO_ELLIPSE
    d = eliminated[0, 0] * a + eliminated[0, 1] * b + eliminated[0, 2] * c
    e = eliminated[1, 0] * a + eliminated[1, 1] * b + eliminated[1, 2] * c
    f = eliminated[2, 0] * a + eliminated[2, 1] * b + eliminated[2, 2] * c
    x = (b * e - 2.0 * c * d) / discriminant
    y = (b * d - 2.0 * a * e) / discriminant
    level = -f - (d * x + e * y) / 2.0
    if level == 0.0:
        return NO_ELLIPSE
    return x, y, a / level, b / (2.0 * level), c / level


@kernel
def _eliminate_linear_part(moments: Float64) -> tuple[Float64, Float64]:
    """The (3, 3) matrix that gives (d, e, f) from (a, b, c), and the scatter that remains."""
    eliminated = np.empty((3, 3))
    reduced = np.empty((3, 3))
    x2, xy, y2, count = moments[9], moments[10], moments[11], moments[14]
    determinant = x2 * y2 - xy * xy
    for k in range(3):
        with_x, with_y = moments[MOMENT[k, 3]], moments[MOMENT[k, 4]]
        eliminated[0, k] = (xy * with_y - y2 * with_x) / determinant
        eliminated[1, k] = (xy * with_x - x2 * with_y) / determinant
        eliminated[2, k] = -moments[MOMENT[k, 5]] / count
    for row in range(3):
        for column in range(3):
            reduced[row, column] = moments[MOMENT[row, column]]
            for k in range(3):
                reduced[row, column] += moments[MOMENT[row, 3 + k]] * eliminated[k, column]
    return eliminated, reduced


@kernel
def _largest_eigenvalue(r: Float64) -> float:
    """The largest root of det(R - lambda C), which is the only positive one.

    All three are real, so Newton's method descends to the largest from any bound above it; the
    bound is Samuelson's, from the mean and the standard deviation of the roots.
    """
    determinant = (
        r[0, 0] * (r[1, 1] * r[2, 2] - r[1, 2] * r[1, 2])
        - r[0, 1] * (r[0, 1] * r[2, 2] - r[1, 2] * r[0, 2])
        + r[0, 2] * (r[0, 1] * r[1, 2] - r[1, 1] * r[0, 2])
    )
    second = r[1, 1] - r[0, 2]
    first = (r[0, 2] * r[0, 2] - r[0, 0] * r[2, 2]) / 4 + r[0, 1] * r[1, 2] - r[0, 2] * r[1, 1]
    root: float = (2.0 * math.sqrt(max(second * second - 3.0 * first, 0.0)) - second) / 3.0
    for _ in range(MOST_NEWTON_STEPS):
        value = ((root + second) * root + first) * root - determinant / 4.0
        slope = (3.0 * root + 2.0 * second) * root + first
        if not (value > 0.0 and slope > 0.0):
            break
        root -= value / slope
    return root


@kernel
def _null_vector(matrix: Float64) -> tuple[float, float, float]:
    """The longest cross product of two rows of a (3, 3) matrix of rank 2."""
    longest, a, b, c = -1.0, 0.0, 0.0, 0.0
    for k in range(3):
        one, two = matrix[k], matrix[(k + 1) % 3]
        x = one[1] * two[2] - one[2] * two[1]
        y = one[2] * two[0] - one[0] * two[2]
        z = one[0] * two[1] - one[1] * two[0]
        length = x * x + y * y + z * z
        if length > longest:
            longest, a, b, c = length, x, y, z
    return a, b, c


@kernel
def _rms_distance(points: Float64, ellipse: Ellipse) -> float:
    """RMS over the points of the first-order distance from an ellipse, in its mean radii.

    NaN where Q is not that of an ellipse.
    """
    centre_x, centre_y, xx, xy, yy = ellipse
    determinant = xx * yy - xy * xy
    if not (xx > 0.0 and determinant > 0.0):
        return math.nan
    radius = 1.0 / math.sqrt(math.sqrt(determinant))
    total = 0.0
    for point in range(len(points)):
        x, y = points[point, 0] - centre_x, points[point, 1] - centre_y
        u, v = xx * x + xy * y, xy * x + yy * y
        level = x * u + y * v  # the elliptical radius, squared
        steepness = u * u + v * v
        if steepness > 0.0:
            excess = math.sqrt(level) - 1.0
            total += excess * excess * level / steepness
        else:  # the centre
            total += radius * radius
    return math.sqrt(total / len(points)) / radius


def count_rings(contours: Contours, shape: tuple[int, int]) -> Int32:
    """Rings of each structure on each slice, (n, s) int32; `shape` is (n, s)."""
    rings = np.zeros(shape, np.int32)
    np.add.at(rings, (contours.plane, contours.structure), 1)
    return rings


def worst_rings(contours: Contours, residuals: Float64, shape: tuple[int, int]) -> Float64:
    """The largest residual of each structure on each slice, (n, s); NaN where there is none."""
    worst = np.full(shape, np.nan)
    np.fmax.at(worst, (contours.plane, contours.structure), residuals)
    return worst


# ---------------------------------------------------------------------------------------- flags


def raise_flags(
    *,
    area: Int64,
    components: Int32,
    outside: Int64,
    ellipse_residual: Float64,
    ring_count: Int32,
    nested: tuple[tuple[int, int], ...],
    pixels: int,
    longer_than_header: Bool,
    cropped: Int64,
    checks: Checks,
) -> UInt16:
    """The flags of n slices, from what was measured on them; bit k is FLAGS[k].

    "identical-contours" and "gap-before-slice" need the whole table: the store adds them.

    Parameters
    ----------
    area, components : (n, s)
        As from `measure_masks`. More components than rings give "several-components"; a structure
        of two rings may well have two.
    outside : (n, len(nested)) int64
    ellipse_residual : (n, s) float64
        Mean radii; NaN, where nothing could be fitted, gives no flag.
    ring_count : (n, s) int32
        0 where the structure is not annotated.
    nested : pairs (inner, outer) of structures
    pixels : int
        Pixels of a slice.
    longer_than_header : (n,) bool
    cropped : (n, s) int64
    checks : Checks
        A value equal to its threshold gives no flag.

    Returns
    -------
    (n,) uint16
    """
    inner_area = area[:, [inner for inner, _ in nested]]
    flagged = {
        "mask-too-large": area > checks.max_mask_fraction * pixels,
        "empty-mask": (ring_count > 0) & (area == 0),
        "several-components": components > ring_count,
        "not-an-ellipse": ellipse_residual > checks.max_ellipse_residual,
        "inner-not-inside-outer": outside > checks.max_outside_fraction * inner_area,
        "pixel-data-longer-than-header": longer_than_header[:, None],
        "cut-by-crop": cropped > 0,
    }
    flags = np.zeros(len(area), np.uint16)
    for name, where in flagged.items():
        flags |= where.any(axis=1).astype(np.uint16) << np.uint16(FLAGS.index(name))
    return flags


def identical_contours(digest: NDArray[np.uint64], patient_index: NDArray[Any]) -> Bool:
    """Which slices have an outline whose bytes occur under another patient as well.

    Parameters
    ----------
    digest : (n, s) uint64
        Digest of each outline's bytes; 0 for no outline. All structures are compared with all.
    patient_index : (n,) int

    Returns
    -------
    (n,) bool
    """
    slices, structures = digest.shape
    flat = digest.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.searchsorted(flat, 1, sorter=order) :]
    identical = np.zeros(slices, np.bool_)
    if not len(order):
        return identical
    found, patient = flat[order], patient_index[order // structures]
    first = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
    shared = np.minimum.reduceat(patient, first) != np.maximum.reduceat(patient, first)
    lengths = np.diff(np.append(first, len(order)))
    identical[order[np.repeat(shared, lengths)] // structures] = True
    return identical
