"""Checks: what is measured on a batch of slices, and the flags that follow from it."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from parallel_dicomseg.checks import (
    count_rings,
    ellipse_residuals,
    identical_contours,
    measure,
    measure_intensity,
    measure_masks,
    raise_flags,
    worst_rings,
)
from parallel_dicomseg.rasterize import rasterize_batch
from parallel_dicomseg.records import FLAGS, Checks, Contours

MASK_DTYPES = (np.uint8, np.uint16, np.uint32, np.uint64)
IMAGE_DTYPES = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64)


# ---------------------------------------------------------------------------------------- masks


def slow_measure_masks(
    masks: NDArray[Any], annotated: NDArray[np.bool_], nested: tuple[tuple[int, int], ...]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The twin: one structure of one slice at a time, pieces by scipy."""
    structures = annotated.shape[1]
    area = np.zeros(annotated.shape, np.int64)
    components = np.zeros(annotated.shape, np.int32)
    outside = np.zeros((len(masks), len(nested)), np.int64)
    for i, mask in enumerate(masks):
        planes = [(mask >> mask.dtype.type(s)) & mask.dtype.type(1) for s in range(structures)]
        for s in range(structures):
            area[i, s] = planes[s].sum()
            components[i, s] = ndimage.label(planes[s], np.ones((3, 3)))[1]
        for k, (inner, outer) in enumerate(nested):
            if annotated[i, inner] and annotated[i, outer]:
                outside[i, k] = ((planes[inner] == 1) & (planes[outer] == 0)).sum()
    return area, components, outside


@st.composite
def batches_of_masks(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """Masks of any type and any density, with annotations and nested pairs."""
    dtype = np.dtype(draw(st.sampled_from(MASK_DTYPES)))
    structures = draw(st.integers(1, min(8 * dtype.itemsize, 4)))
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(1, 14)))
    density = draw(st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.95]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    masks = np.zeros(shape, dtype)
    for s in range(structures):
        masks |= (random.random(shape) < density).astype(dtype) << dtype.type(s)
    annotated = random.random((shape[0], structures)) < 0.8
    pair = st.tuples(st.integers(0, structures - 1), st.integers(0, structures - 1))
    return masks, annotated, tuple(draw(st.lists(pair, max_size=3)))


@given(batches_of_masks())
@settings(max_examples=300)
def test_masks_are_measured_as_scipy_labels_them(batch: tuple[Any, Any, Any]) -> None:
    """Areas, 8-connected components and pixels outside equal those of the slow twin."""
    for fast, slow in zip(measure_masks(*batch), slow_measure_masks(*batch), strict=True):
        np.testing.assert_array_equal(fast, slow)
        assert fast.dtype == slow.dtype


def test_pieces_of_a_large_dense_mask_are_those_of_scipy() -> None:
    """Thousands of components that join and part from row to row come out right."""
    random = np.random.default_rng(1)
    masks = np.stack([random.random((200, 301)) < p for p in (0.2, 0.4, 0.6)]).astype(np.uint8)
    annotated = np.ones((3, 1), bool)

    _, components, _ = measure_masks(masks, annotated)

    np.testing.assert_array_equal(slow_measure_masks(masks, annotated, ())[1], components)
    assert components.max() > 1000


def test_a_spiral_is_one_piece_and_its_background_does_not_count() -> None:
    """Runs that meet again only many rows later are joined."""
    spiral = [
        "#########",
        "........#",
        "#######.#",
        "#.....#.#",
        "#.###.#.#",
        "#.#...#.#",
        "#.#####.#",
        "#.......#",
        "#########",
    ]
    mask = np.array([[pixel == "#" for pixel in row] for row in spiral], np.uint8)

    area, components, _ = measure_masks(mask[None], np.ones((1, 1), bool))

    assert (mask.sum(), 1) == (area[0, 0], components[0, 0])


def test_the_last_bit_of_the_widest_mask_is_measured() -> None:
    """64 structures fit, and each is told from the others."""
    masks = (np.uint64(1) << np.arange(64, dtype=np.uint64)).reshape(1, 8, 8)

    area, components, outside = measure_masks(masks, np.ones((1, 64), bool), ((63, 0), (63, 63)))

    assert (area == 1).all()
    assert (components == 1).all()
    assert outside.tolist() == [[1, 0]]


def test_nothing_is_outside_where_a_structure_has_no_outline() -> None:
    """An inner structure alone says nothing about the outer one."""
    masks = np.full((3, 4, 4), 1, np.uint8)
    annotated = np.array([[True, True], [True, False], [False, True]])

    _, _, outside = measure_masks(masks, annotated, ((0, 1),))

    assert outside.tolist() == [[16], [0], [0]]


def test_masks_need_not_be_contiguous() -> None:
    """A view of every other column is measured as its copy is."""
    masks = np.random.default_rng(2).integers(0, 4, (2, 9, 20)).astype(np.uint8)[:, :, ::2]
    annotated = np.ones((2, 2), bool)

    for view, copy in zip(
        measure_masks(masks, annotated), measure_masks(masks.copy(), annotated), strict=True
    ):
        np.testing.assert_array_equal(view, copy)


# ------------------------------------------------------------------------------------ intensity


def exact_statistics(image: NDArray[Any]) -> list[float]:
    """The twin: in rational numbers, rounded once."""
    values = [Fraction(value) for value in image.ravel().tolist()]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [float(min(values)), float(max(values)), float(mean), math.sqrt(variance)]


@st.composite
def batches_of_images(draw: st.DrawFn) -> NDArray[Any]:
    """Images of every type, from constant ones to such as use its whole range."""
    dtype = np.dtype(draw(st.sampled_from(IMAGE_DTYPES)))
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)))
    if dtype.kind == "f":
        numbers = st.floats(-1e6, 1e6, width=32)
    else:
        limits = np.iinfo(dtype)
        lowest = draw(st.integers(limits.min, limits.max))
        numbers = st.integers(lowest, draw(st.integers(lowest, limits.max)))
    return draw(arrays(dtype, shape, elements=numbers))


@given(batches_of_images())
@settings(max_examples=300)
def test_intensity_is_that_of_rational_arithmetic(images: NDArray[Any]) -> None:
    """Minimum and maximum are exact; mean and deviation are right to the last few digits."""
    statistics = measure_intensity(images)

    for image, found in zip(images, statistics, strict=True):
        low, high, mean, deviation = exact_statistics(image)
        scale = max(abs(low), abs(high))
        assert [low, high] == found[:2].tolist()
        assert math.isclose(mean, found[2], rel_tol=1e-15, abs_tol=1e-15 * scale)
        assert math.isclose(deviation, found[3], rel_tol=1e-14, abs_tol=1e-15 * scale)


@pytest.mark.parametrize("dtype", IMAGE_DTYPES)
def test_intensity_does_not_overflow(dtype: type[np.generic]) -> None:
    """More pixels than one block, all at either end of the type's range."""
    ends = (-3e38, 3e38) if dtype == np.float32 else (-1e150, 1e150)
    low, high = ends if np.dtype(dtype).kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    image = np.full((1, 257, 300), low, dtype)
    image[:, :, ::2] = high
    low, high = float(image.min()), float(image.max())

    statistics = measure_intensity(image)[0]

    np.testing.assert_allclose(
        statistics, [low, high, (low + high) / 2, (high - low) / 2], rtol=1e-14, atol=1e-9
    )


@pytest.mark.parametrize("dtype", IMAGE_DTYPES)
def test_a_constant_image_has_no_deviation(dtype: type[np.generic]) -> None:
    """Nothing of the mean's square is left by cancellation."""
    statistics = measure_intensity(np.full((1, 200, 300), 107, dtype))

    assert statistics.tolist() == [[107.0, 107.0, 107.0, 0.0]]


@pytest.mark.parametrize("dtype", IMAGE_DTYPES)
def test_no_image_has_no_statistics(dtype: type[np.generic]) -> None:
    """An empty batch gives an empty table."""
    assert measure_intensity(np.empty((0, 5, 6), dtype)).shape == (0, 4)


def test_one_odd_pixel_on_a_bright_image_gives_its_exact_deviation() -> None:
    """The sums are taken about the mean: sqrt(n - 1) / n, to the last digits."""
    image = np.full((1, 512, 512), 32_000, np.int16)
    image[0, 100, 100] += 1
    pixels = image.size

    statistics = measure_intensity(image)[0]

    assert math.isclose(math.sqrt(pixels - 1) / pixels, statistics[3], rel_tol=1e-14)


def test_a_nan_makes_all_four_nan() -> None:
    """An image with a hole in its values is told at once, and its neighbour is not touched."""
    images = np.ones((2, 5, 5), np.float32)
    images[0, 2, 3] = np.nan

    assert np.isnan(measure_intensity(images)).tolist() == [[True] * 4, [False] * 4]


def test_intensity_of_real_images_is_that_of_numpy(shared_data: Path) -> None:
    """Twenty real slices, against NumPy in float64."""
    folder = shared_data / "sunnybrook_arterys" / "final_data" / "dicoms" / "SCD0000101"
    raw = [path.read_bytes()[-2 * 256 * 256 :] for path in sorted(folder.glob("*.dcm"))[:20]]
    images = np.stack([np.frombuffer(pixels, "<i2").reshape(256, 256) for pixels in raw])

    statistics = measure_intensity(images)

    wide = images.astype(np.float64).reshape(20, -1)
    expected = np.stack((wide.min(1), wide.max(1), wide.mean(1), wide.std(1)), axis=1)
    np.testing.assert_allclose(statistics, expected, rtol=1e-12)
    assert (statistics[:, 3] > 10).all()


# ------------------------------------------------------------------------------------- outlines


def rings(*outlines: Any, plane: Any = None, structure: Any = None) -> Contours:
    """Contours of these outlines, each on a slice of its own unless said otherwise."""
    points = [np.asarray(outline, np.float64).reshape(-1, 2) for outline in outlines]
    return Contours(
        points_column_row=np.concatenate(points) if points else np.empty((0, 2)),
        offsets=np.cumsum([0, *map(len, points)]),
        plane=np.arange(len(points)) if plane is None else np.asarray(plane),
        structure=np.asarray(np.zeros(len(points)) if structure is None else structure, np.int32),
    )


def on_ellipse(a: float, b: float, tilt: float = 0.0, count: int = 40) -> NDArray[np.float64]:
    """Points of an ellipse about the origin, evenly spaced in its parameter."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return np.stack((a * np.cos(t), b * np.sin(t)), axis=1) @ turn.T


def textbook_residual(points: NDArray[np.float64]) -> float:
    """The twin: Fitzgibbon's six by six eigenproblem, then distances with a numerical gradient."""
    x, y = ((points - points.mean(axis=0)) / points.std()).T
    design = np.stack((x * x, x * y, y * y, x, y, np.ones_like(x)), axis=1)
    constraint = np.zeros((6, 6))
    constraint[0, 2] = constraint[2, 0] = 2
    constraint[1, 1] = -1
    vectors = np.linalg.eig(np.linalg.inv(design.T @ design) @ constraint).eigenvectors.real
    a, b, c, d, e, f = vectors[:, np.argmax(4 * vectors[0] * vectors[2] - vectors[1] ** 2)]
    matrix = np.array([[a, b / 2], [b / 2, c]])
    centre = np.linalg.solve(matrix, [-d / 2, -e / 2])
    matrix /= centre @ matrix @ centre - f

    def radius(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        offset = np.stack((x, y), axis=1) - centre
        return np.sqrt(np.einsum("pi,ij,pj->p", offset, matrix, offset))

    step = 1e-5
    slope_x = (radius(x + step, y) - radius(x - step, y)) / (2 * step)
    slope_y = (radius(x, y + step) - radius(x, y - step)) / (2 * step)
    distance = (radius(x, y) - 1) / np.hypot(slope_x, slope_y)
    return float(np.sqrt((distance**2).mean()) * np.linalg.det(matrix) ** 0.25)


@st.composite
def rough_outlines(draw: st.DrawFn) -> NDArray[np.float64]:
    """Anything from a noisy ellipse to a star, anywhere in an image."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    a, b = draw(st.floats(2, 100)), draw(st.floats(2, 100))
    points = on_ellipse(a, b, draw(st.floats(0, 3)), draw(st.integers(12, 80)))
    points *= 1 + draw(st.floats(0.02, 0.4)) * random.uniform(-1, 1, (len(points), 1))
    return points + draw(st.floats(-20, 500))


@given(rough_outlines())
@settings(max_examples=200)
def test_residual_is_that_of_the_textbook_fit(points: NDArray[np.float64]) -> None:
    """The stable three by three form gives what the original six by six one gives."""
    assert math.isclose(
        textbook_residual(points), ellipse_residuals(rings(points))[0], rel_tol=1e-4
    )


@given(
    st.floats(3, 200), st.floats(0.05, 1), st.floats(0, 3), st.floats(-1e3, 1e3), st.integers(6, 90)
)
@settings(max_examples=200)
def test_points_of_an_ellipse_have_no_residual(
    a: float, ratio: float, tilt: float, shift: float, count: int
) -> None:
    """Exact points fit to rounding, from a circle to one of ratio 1 to 20, from six points on."""
    points = on_ellipse(a, a * ratio, tilt, count) + shift

    assert ellipse_residuals(rings(points))[0] < 1e-6


def test_residual_of_a_circle_with_teeth_is_the_closed_formula() -> None:
    """Radii 21 and 19 in turn: the best circle has the root mean square of them as its radius."""
    points = on_ellipse(1, 1, count=48) * np.tile([21.0, 19.0], 24)[:, None] + 100
    best = math.sqrt((21**2 + 19**2) / 2)
    expected = math.sqrt(((21 - best) ** 2 + (19 - best) ** 2) / 2) / best

    assert math.isclose(expected, ellipse_residuals(rings(points))[0], rel_tol=1e-9)


@given(rough_outlines(), st.floats(0.01, 100), st.floats(0, 6), st.floats(-1e3, 1e3))
def test_residual_does_not_depend_on_place_size_or_direction(
    points: NDArray[np.float64], factor: float, tilt: float, shift: float
) -> None:
    """It is a property of the shape: moved, scaled, turned and reversed outlines have the same."""
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    moved = (points @ turn.T * factor + shift)[::-1]

    here, there = ellipse_residuals(rings(points, moved))

    assert math.isclose(here, there, rel_tol=1e-5)


@given(st.lists(rough_outlines(), min_size=1, max_size=5))
def test_residual_of_a_ring_does_not_depend_on_its_batch(
    outlines: list[NDArray[np.float64]],
) -> None:
    """Bit for bit: the output may not depend on the number of slices in a task."""
    together = ellipse_residuals(rings(*outlines))
    alone = [ellipse_residuals(rings(outline))[0] for outline in outlines]

    assert alone == together.tolist()


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, 1)],
        [(0, 0), (4, 0), (5, 3), (2, 5), (-1, 3)] * 4,
        [(k, 2 * k + 1) for k in range(20)],
        [(7, 7)] * 30,
        [*on_ellipse(5, 3).tolist(), (np.nan, 1.0)],
        [*on_ellipse(5, 3).tolist(), (np.inf, 1.0)],
        (on_ellipse(5, 3) * 1e200).tolist(),
        (on_ellipse(5, 3) * 1e-200).tolist(),
    ],
    ids=["empty", "one", "five-distinct", "line", "same", "nan", "infinite", "huge", "tiny"],
)
def test_what_cannot_be_fitted_has_no_residual(points: list[tuple[float, float]]) -> None:
    """NaN for such a ring, and the ring beside it is measured all the same."""
    residuals = ellipse_residuals(rings(points, on_ellipse(9, 4)))

    assert np.isnan(residuals[0])
    assert residuals[1] < 1e-9


def test_a_point_on_the_very_centre_is_one_radius_away() -> None:
    """The distance stays finite where the elliptical radius has no gradient."""
    circle = on_ellipse(10, 10, count=200)

    residual = ellipse_residuals(rings(np.concatenate((circle, [(0.0, 0.0)]))))[0]

    assert 0.05 < residual < 0.1


def test_residuals_tell_shapes_apart() -> None:
    """The default threshold lies between a distorted heart chamber and a square."""
    corners = np.array([(0, 0), (20, 0), (20, 20), (0, 20), (0, 0)], float)
    t = np.linspace(0, 1, 60, endpoint=False)[:, None]
    square = np.concatenate([p + (q - p) * t for p, q in itertools.pairwise(corners)])
    dented = on_ellipse(20, 16, count=100) * (1 + 0.08 * np.cos(np.arange(100) * 0.19))[:, None]

    low, high = ellipse_residuals(rings(dented, square))

    assert low < 0.1 < high < 0.12


def test_rings_are_counted_and_the_worst_one_kept() -> None:
    """Per slice and structure; a ring without a residual hides none that has one."""
    contours = rings(*[on_ellipse(3, 2)] * 5, plane=[0, 0, 0, 2, 2], structure=[0, 0, 1, 1, 1])

    counted = count_rings(contours, (3, 2))
    worst = worst_rings(contours, np.array([0.1, 0.3, np.nan, np.nan, 0.2]), (3, 2))

    assert counted.tolist() == [[2, 1], [0, 0], [0, 2]]
    np.testing.assert_array_equal(worst, [[0.3, np.nan], [np.nan, np.nan], [np.nan, 0.2]])


# ---------------------------------------------------------------------------------------- flags


def flag_names(flags: NDArray[np.uint16]) -> list[list[str]]:
    """The names of each slice's flags."""
    return [[name for k, name in enumerate(FLAGS) if flag >> k & 1] for flag in flags.tolist()]


class Slice(NamedTuple):
    """One slice with an inner and an outer structure; the defaults raise no flag."""

    area: tuple[int, int] = (50, 80)
    components: tuple[int, int] = (1, 1)
    outside: int = 0
    residual: tuple[float, float] = (0.02, 0.02)
    rings: tuple[int, int] = (1, 1)
    longer: bool = False
    cropped: int = 0


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (Slice(), []),
        (Slice(area=(0, 0), components=(0, 0), rings=(0, 0), residual=(math.nan,) * 2), []),
        (Slice(area=(50, 501)), ["mask-too-large"]),
        (Slice(area=(50, 500)), []),
        (Slice(area=(50, 0), components=(1, 0)), ["empty-mask"]),
        (Slice(components=(2, 1)), ["several-components"]),
        (Slice(components=(2, 1), rings=(2, 1)), []),
        (Slice(residual=(math.nan, 0.11)), ["not-an-ellipse"]),
        (Slice(residual=(math.nan, 0.1)), []),
        (Slice(area=(200, 300), outside=2), []),
        (Slice(area=(200, 300), outside=3), ["inner-not-inside-outer"]),
        (Slice(longer=True), ["pixel-data-longer-than-header"]),
        (
            Slice((900, 0), (3, 0), 900, (0.5, 0.5), (1, 1), True, 1),
            [name for name in FLAGS if name not in ("identical-contours", "gap-before-slice")],
        ),
    ],
)
def test_each_flag_has_its_reason(one: Slice, expected: list[str]) -> None:
    """A flag is raised above its threshold, not at it, and none without its reason."""
    flags = raise_flags(
        area=np.array([one.area]),
        components=np.array([one.components], np.int32),
        outside=np.array([[one.outside]]),
        ellipse_residual=np.array([one.residual]),
        ring_count=np.array([one.rings], np.int32),
        nested=((0, 1),),
        pixels=1000,
        longer_than_header=np.array([one.longer]),
        cropped=np.array([[one.cropped, 0]]),
        checks=Checks(max_mask_fraction=0.5, max_ellipse_residual=0.1, max_outside_fraction=0.01),
    )

    assert np.uint16 == flags.dtype
    assert [expected] == flag_names(flags)


def slow_identical_contours(digest: list[list[int]], patient: list[int]) -> list[bool]:
    """The twin: every outline with every other one."""
    outlines = [(d, p) for row, p in zip(digest, patient, strict=True) for d in row if d]
    return [
        any(d == other and p != q for d in row for other, q in outlines)
        for row, p in zip(digest, patient, strict=True)
    ]


@given(st.integers(1, 3), st.lists(st.integers(0, 4), max_size=12), st.data())
def test_identical_contours_are_found_across_patients(
    structures: int, patient: list[int], data: st.DataObject
) -> None:
    """Equal digests under two patients count, under one they do not, and 0 never does."""
    value = st.sampled_from([0, 0, 1, 2, 3, 2**63, 2**64 - 1])
    row = st.lists(value, min_size=structures, max_size=structures)
    digest = data.draw(st.lists(row, min_size=len(patient), max_size=len(patient)))

    found = identical_contours(
        np.array(digest, np.uint64).reshape(-1, structures), np.array(patient, np.int32)
    )

    assert slow_identical_contours(digest, patient) == found.tolist()


def test_bitmaps_and_other_organs_get_no_flags_of_rings() -> None:
    """Pixels may come in many pieces, and only what should be an ellipse is compared with one."""
    masks = np.zeros((2, 9, 9), np.uint8)
    masks[0, ::4, ::4] = 1
    cross = [(2, 0), (4, 0), (3, 3), (6, 2), (6, 4), (3, 5), (4, 8), (2, 8), (2, 5), (0, 4), (0, 2)]
    contours = rings(np.array(cross, float), plane=[1], structure=[0])
    masks[1, :2, :2] = 1

    def flagged(elliptic: bool) -> list[list[str]]:
        measured = measure(
            np.ones(masks.shape, np.int16),
            masks,
            contours,
            contour_digest=np.zeros((2, 1), np.uint64),
            longer_than_header=np.zeros(2, bool),
            cropped=np.array([[0], [3]]),
            elliptic=np.array([elliptic]),
            bitmaps=np.array([[0, 0]]),
            looked_at=np.zeros((2, 1), bool),
            nested=(),
            checks=Checks(max_ellipse_residual=1e-6),
        )
        assert measured.annotated.all()
        assert measured.components.tolist() == [[9], [1]]
        return flag_names(measured.flags)

    assert flagged(elliptic=False) == [[], ["cut-by-crop"]]
    assert flagged(elliptic=True) == [[], ["not-an-ellipse", "cut-by-crop"]]


def test_measure_takes_a_task_without_any_outline() -> None:
    """A batch of images alone gives their intensities, and no flag."""
    measured = measure(
        np.ones((2, 6, 7), np.int16),
        np.zeros((2, 6, 7), np.uint8),
        rings(),
        contour_digest=np.zeros((2, 3), np.uint64),
        longer_than_header=np.zeros(2, bool),
        cropped=np.zeros((2, 3), np.int64),
        elliptic=np.empty(0, bool),
        bitmaps=np.empty((0, 2), np.int64),
        looked_at=np.array([[False] * 3, [False, True, False]]),
        nested=((0, 1),),
        checks=Checks(),
    )

    assert measured.annotated.tolist() == [[False] * 3, [False, True, False]]
    assert np.isnan(measured.ellipse_residual).all()
    assert measured.intensity.tolist() == [[1.0, 1.0, 1.0, 0.0]] * 2
    assert measured.flags.tolist() == [0, 0]
    assert [a.shape for a in (measured.area, measured.components, measured.outside)] == [
        (2, 3),
        (2, 3),
        (2, 1),
    ]


# ------------------------------------------------------------------------------ the real cohort


class Outline(NamedTuple):
    """One real outline."""

    patient: str
    frame: int
    structure: int
    points: NDArray[np.float64]
    digest: int


@pytest.fixture(scope="module")
def outlines(shared_data: Path) -> list[Outline]:
    """The 142 outlines of the five Sunnybrook patients, sorted by patient, frame, structure."""
    folder = shared_data / "sunnybrook_arterys" / "final_data" / "contourfiles"
    found = [
        Outline(
            path.parts[-3],
            int(path.name.split("-")[2]),
            "io".index(path.parent.name[0]),
            np.loadtxt(path),
            hash(path.read_bytes()) % 2**64,
        )
        for path in folder.glob("SC-HF-I-*/[io]-contours/IM-*.txt")
    ]
    assert len(found) == 142
    return sorted(found, key=lambda outline: outline[:3])


def test_real_outlines_are_flagged_where_something_is_wrong(outlines: list[Outline]) -> None:
    """The copied o-contours of SC-HF-I-6 are found twice over, and hardly anything else."""
    planes = sorted({outline[:2] for outline in outlines})
    plane = [planes.index(outline[:2]) for outline in outlines]
    structure = [outline.structure for outline in outlines]
    contours = rings(*[outline.points for outline in outlines], plane=plane, structure=structure)
    masks = np.zeros((len(planes), 256, 256), np.uint8)
    rasterize_batch(contours, masks, rule="center")
    digest = np.zeros((len(planes), 2), np.uint64)
    digest[plane, structure] = [outline.digest for outline in outlines]
    longer = np.zeros(len(planes), bool)
    checks = Checks(max_ellipse_residual=0.1, max_outside_fraction=0.01)

    measured = measure(
        np.zeros(masks.shape, np.int16),
        masks,
        contours,
        contour_digest=digest,
        longer_than_header=longer,
        cropped=np.zeros((len(planes), 2), np.int64),
        elliptic=np.ones(len(plane), bool),
        bitmaps=np.empty((0, 2), np.int64),
        looked_at=np.zeros_like(digest, bool),
        nested=((0, 1),),
        checks=checks,
    )

    patients = sorted({patient for patient, _ in planes})
    index = np.array([patients.index(patient) for patient, _ in planes])
    copied = identical_contours(measured.contour_digest, index)
    both = measured.annotated.all(axis=1)
    of = {patient: index == k for k, patient in enumerate(patients)}
    np.testing.assert_array_equal(copied, both & (of["SC-HF-I-1"] | of["SC-HF-I-6"]))
    assert (copied & of["SC-HF-I-6"]).sum() == 9

    names = flag_names(measured.flags)
    not_inside = np.array(["inner-not-inside-outer" in flags for flags in names])
    np.testing.assert_array_equal(not_inside, both & of["SC-HF-I-6"])
    artefacts = dict(zip(planes, measured.outside[:, 0].tolist(), strict=True))
    assert artefacts["SC-HF-I-1", 59] == 1
    assert 0 < artefacts["SC-HF-I-5", 40] < 10

    others = {plane: flags for plane, flags in zip(planes, names, strict=True) if flags}
    for wrong in np.flatnonzero(not_inside):
        assert others.pop(planes[wrong]) == ["inner-not-inside-outer"]
    assert others == {("SC-HF-I-2", 220): ["not-an-ellipse"]}


def test_real_areas_and_pieces_are_those_of_the_twin(outlines: list[Outline]) -> None:
    """Every real mask is one piece, of as many pixels as scipy and NumPy count."""
    contours = rings(*[outline.points for outline in outlines])
    masks = np.zeros((len(outlines), 256, 256), np.uint8)
    rasterize_batch(contours, masks, rule="center")
    annotated = np.ones((len(outlines), 1), bool)

    area, components, _ = measure_masks(masks, annotated)

    np.testing.assert_array_equal(slow_measure_masks(masks, annotated, ())[0], area)
    assert (components == 1).all()


def test_real_residuals_are_those_of_the_textbook(outlines: list[Outline]) -> None:
    """All 142, against the six by six eigenproblem."""
    residuals = ellipse_residuals(rings(*[outline.points for outline in outlines]))

    expected = [textbook_residual(outline.points) for outline in outlines]
    np.testing.assert_allclose(residuals, expected, rtol=1e-4)
    assert np.median(residuals) == pytest.approx(0.027, abs=0.001)
