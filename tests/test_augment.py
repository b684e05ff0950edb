"""Augmentation: against slow obvious twins, SciPy's interpolation, and what its objects promise."""

from __future__ import annotations

import hashlib
import math
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.interpolate import BSpline

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.augment import (
    KINDS,
    Augmentation,
    Blur,
    Brightness,
    Contrast,
    Crop,
    Dihedral,
    Elastic,
    Flip,
    Function,
    Gamma,
    LowResolution,
    Noise,
    Plan,
    Rotate,
    Shift,
    Zoom,
    augment_into,
    compile_plan,
    named,
    warm_up,
)
from parallel_dicomseg.loader.windows import (
    UNCHANGED,
    MinMax,
    Percentiles,
    Statistics,
    Window,
    ZScore,
    intensity_maps,
    map_into,
    percentiles,
    window_of,
)

Array = NDArray[Any]

#: Pairs of image and mask types that the tests compile the kernel for.
DTYPES = (("int16", "uint8"), ("float32", "uint64"), ("uint8", "uint32"), ("uint16", "uint16"))
EVERYTHING = named(",".join(kind for kind in KINDS if kind != "crop"))


def sample(
    shape: tuple[int, int, int], dtypes: tuple[str, str] = DTYPES[0], seed: int = 0
) -> tuple[Array, Array]:
    """A random image and a random mask of all bits."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 255, shape).astype(dtypes[0])
    most = np.iinfo(dtypes[1]).max
    return image, generator.integers(0, most, shape, dtypes[1], endpoint=True)


def augmented(
    image: Array, mask: Array, seed: int, plan: Plan, intensity: Array | None = None
) -> tuple[Array, Array]:
    """What `augment_into` writes."""
    out_image = np.full((len(image), *plan.shape), np.nan, np.float32)
    out_mask = np.full((len(mask), *plan.shape), 77, mask.dtype)
    augment_into(image, mask, out_image, out_mask, seed, plan, intensity)
    return out_image, out_mask


def plan_for(image: Array, *objects: Augmentation | str, **options: Any) -> Plan:
    """A plan for images of this size."""
    return compile_plan(objects, (image.shape[1], image.shape[2]), **options)


# --------------------------------------------------------------------------------------------
# The twin: matrices that move pixels forwards, SciPy's interpolation, and plain formulas


def mix(value: int) -> int:
    """The finalizer of splitmix64 in Python's integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


class Stream:
    """The random numbers of one object for one sample, by their place."""

    def __init__(self, seed: int, name: str) -> None:
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
        self.state = mix(seed ^ key)

    def bits(self, place: int) -> int:
        """64 of them."""
        return mix((self.state + (place + 1) * 0x9E3779B97F4A7C15) % 2**64)

    def uniform(self, place: int) -> float:
        """In [0, 1)."""
        return (self.bits(place) >> 11) / 2**53

    def between(self, place: int, limits: tuple[float, float]) -> float:
        """Uniform in a range."""
        return limits[0] + (limits[1] - limits[0]) * self.uniform(place)

    def ratio(self, place: int, limits: tuple[float, float]) -> float:
        """Uniform in the logarithm."""
        return math.exp(self.between(place, (math.log(limits[0]), math.log(limits[1]))))

    def normals(self, count: int) -> Array:
        """Box and Muller, in blocks of 256 cosines and 256 sines."""
        blocks = []
        for block in range(-(-count // 512)):
            bits = [self.bits(16 + 256 * block + k) for k in range(256)]
            fraction = np.array([((b >> 40) + 0.5) / 2**24 for b in bits])
            angle = np.array([((b % 2**24) + 0.5 - 2**23) * math.pi / 2**24 for b in bits])
            sign = np.array([1 - 2 * ((b >> 24) & 1) for b in bits])
            radius = sign * np.sqrt(-2 * np.log(fraction))
            blocks += [radius * np.cos(angle), radius * np.sin(angle)]
        return np.concatenate(blocks)[:count]


def forward_matrix(
    each: Augmentation, stream: Stream, size: tuple[int, int], aspect: float
) -> Array:
    """(3, 3): where an object moves a pixel (row, column, 1), relative to the centre."""
    matrix = np.eye(3)
    if isinstance(each, Flip):
        matrix[0, 0] = -1 if stream.uniform(1) < each.rows else 1
        matrix[1, 1] = -1 if stream.uniform(2) < each.columns else 1
    elif isinstance(each, Dihedral):
        may_turn = size[0] == size[1] and aspect == 1
        pose = int(stream.uniform(1) * (8 if may_turn else 4))
        flip = np.diag([-1.0 if pose & 1 else 1.0, -1.0 if pose & 2 else 1.0, 1.0])
        turn = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]) if pose & 4 else np.eye(3)
        matrix = turn @ flip
    elif isinstance(each, Rotate):
        angle = math.radians(stream.between(1, each.degrees))
        # in mm, with rows downwards: counter-clockwise as displayed
        turn = np.array(
            [
                [math.cos(angle), -math.sin(angle), 0],
                [math.sin(angle), math.cos(angle), 0],
                [0, 0, 1],
            ]
        )
        mm = np.diag([aspect, 1.0, 1.0])
        matrix = np.linalg.inv(mm) @ turn @ mm
    elif isinstance(each, Shift):
        matrix[0, 2] = stream.between(1, each.rows) * size[0]
        matrix[1, 2] = stream.between(2, each.columns) * size[1]
    elif isinstance(each, Zoom):
        matrix[0, 0] = matrix[1, 1] = stream.ratio(1, each.factor)
    return matrix


def first_pixel(each: Crop, stream: Stream, axis: int, extra: int) -> int:
    """Where a crop begins along an axis."""
    if extra > 0 and each.random:
        return int(stream.uniform(axis + 1) * (extra + 1))
    return extra // 2


def displacements(each: Elastic, stream: Stream, size: tuple[int, int]) -> Array:
    """(2, rows, columns) pixels, from SciPy's B-splines."""
    amplitude = stream.between(1, each.displacement)
    basis = BSpline.basis_element(np.arange(5.0), extrapolate=False)
    matrices = []
    for length in size:
        knots = int((length - 1) / each.spacing) + 4
        place = np.arange(length)[:, None] / each.spacing - np.arange(knots) + 3
        matrices.append(np.nan_to_num(basis(place)))
    shape = (2, matrices[0].shape[1], matrices[1].shape[1])
    draws = [stream.between(16 + k, (-amplitude, amplitude)) for k in range(math.prod(shape))]
    return np.einsum("rk,akl,cl->arc", matrices[0], np.reshape(draws, shape), matrices[1])


def twin_coordinates(seed: int, plan: Plan) -> tuple[Array, bool]:
    """(2, rows, columns) source coordinates of every pixel, and whether slices are reversed."""
    size, source = plan.shape, plan.source_shape
    aspect = float(plan.settings[3])
    first = [(source[axis] - size[axis]) // 2 for axis in (0, 1)]
    forward, reverse, bend = np.eye(3), False, np.zeros((2, *size))
    for each in plan.augmentations:
        stream = Stream(seed, each.kind)
        if stream.uniform(0) >= getattr(each, "probability", 1.0):
            continue
        forward = forward_matrix(each, stream, size, aspect) @ forward
        if isinstance(each, Flip):
            reverse = stream.uniform(3) < each.slices
        elif isinstance(each, Elastic):
            bend = displacements(each, stream, size)
        elif isinstance(each, Crop):
            first = [first_pixel(each, stream, k, source[k] - size[k]) for k in (0, 1)]
    center = (np.array(size) - 1) / 2
    place = np.indices(size) + bend - center[:, None, None]
    back = np.linalg.inv(forward)
    moved = np.einsum("ab,brc->arc", back[:2, :2], place) + back[:2, 2, None, None]
    return moved + (center + first)[:, None, None], reverse


def cubic(image: Array, where: Array, outside: Callable[[Array, Array, Array], Array]) -> Array:
    """Keys' convolution (a = -1/2), written as its kernel: one term per neighbour."""

    def kernel(x: Array) -> Array:
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    base = np.floor(where).astype(int)
    total = np.zeros(where.shape[1:])
    for a in range(-1, 3):
        for b in range(-1, 3):
            r, c = base[0] + a, base[1] + b
            total += kernel(where[0] - r) * kernel(where[1] - c) * outside(image, r, c)
    return total


def twin_geometry(image: Array, mask: Array, seed: int, plan: Plan) -> tuple[Array, Array]:
    """The geometry of a sample through SciPy."""
    where, reverse = twin_coordinates(seed, plan)
    samples, is_edge = int(plan.settings[4]), plan.settings[1] == 0
    fill = float(image.min()) if plan.settings[1] == 2 else float(plan.settings[2])
    mode = "nearest" if is_edge else "grid-constant"

    def outside(plane: Array, r: Array, c: Array) -> Array:
        rows, columns = plane.shape
        pixels = plane[r.clip(0, rows - 1), c.clip(0, columns - 1)]
        is_in = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
        return pixels if is_edge else np.where(is_in, pixels, fill)

    def interpolate(plane: Array) -> Array:
        if plan.settings[0] == 3:
            return cubic(plane, where, outside)
        return scipy.ndimage.map_coordinates(plane, where, order=1, mode=mode, cval=fill)

    moved = np.stack([interpolate(plane.astype(np.float64)) for plane in image])
    r, c = np.floor(where + 0.5).astype(int)
    is_in = (r >= 0) & (r < mask.shape[1]) & (c >= 0) & (c < mask.shape[2])
    masks = mask[:, r.clip(0, mask.shape[1] - 1), c.clip(0, mask.shape[2] - 1)]
    masks = masks if is_edge else np.where(is_in, masks, np.zeros((), mask.dtype))
    if reverse:
        slices = moved.reshape(-1, samples, *moved.shape[1:])
        moved, masks = slices[::-1].reshape(moved.shape), masks[::-1]
    return moved, masks


def low_resolution(plane: Array, factor: float) -> Array:
    """Area means onto fewer pixels and linear interpolation back, as matrices."""
    for axis in (0, 1):
        length = plane.shape[axis]
        few = max(1, int(length / factor + 0.5))
        edges = np.arange(few + 1) * length / few
        overlap = np.minimum(edges[1:, None], np.arange(length) + 1.0) - np.maximum(
            edges[:-1, None], np.arange(length)
        )
        shrink = overlap.clip(0) * few / length
        place = ((np.arange(length) + 0.5) * few / length - 0.5).clip(0, few - 1)
        stretch = (1 - np.abs(place[:, None] - np.arange(few))).clip(0)
        plane = np.moveaxis(np.tensordot(stretch @ shrink, plane, (1, axis)), 0, axis)
    return plane


def twin_intensities(image: Array, seed: int, plan: Plan) -> Array:
    """The intensities of a sample by plain formulas in float64."""
    x = image.astype(np.float64)
    for each in plan.augmentations:
        stream = Stream(seed, each.kind)
        if stream.uniform(0) >= getattr(each, "probability", 1.0):
            continue
        if isinstance(each, Contrast):
            x = x.mean() + (x - x.mean()) * stream.ratio(1, each.factor)
        elif isinstance(each, Brightness):
            x = x + stream.between(1, each.shift) * (x.std() if each.relative else 1)
        elif isinstance(each, Noise):
            sd = stream.between(1, each.sd) * (x.std() if each.relative else 1)
            x = x + sd * stream.normals(x.size).reshape(x.shape)
        elif isinstance(each, Gamma) and np.ptp(x) > 0:
            fraction = (x - x.min()) / np.ptp(x)
            x = x.min() + np.ptp(x) * fraction ** stream.ratio(1, each.exponent)
        elif isinstance(each, Blur):
            sd = stream.between(1, each.sd)
            x = scipy.ndimage.gaussian_filter(x, (0, sd, sd), mode="nearest")
        elif isinstance(each, LowResolution):
            factor = stream.between(1, each.factor)
            x = np.stack([low_resolution(plane, factor) for plane in x])
    return x


GEOMETRY: tuple[Augmentation, ...] = (
    Flip(slices=0.5),
    Dihedral(),
    Rotate((-180.0, 180.0)),
    Shift(probability=0.7),
    Zoom((0.5, 2.0)),
    Elastic((0.0, 4.0), spacing=16.0, probability=0.5),
)
INTENSITIES: tuple[Augmentation, ...] = (
    Blur(probability=0.5),
    LowResolution((1.0, 3.0), probability=0.5),
    Contrast(),
    Brightness(),
    Gamma(probability=0.5),
    Noise(),
)


@st.composite
def geometries(draw: Any) -> tuple[Array, Array, int, Plan]:
    """A sample of any size and type, and a plan that moves its pixels."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    if draw(st.booleans()):
        columns = rows
    slices, samples = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3]))
    dtypes = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**64 - 1))
    image, _ = sample((slices * samples, rows, columns), dtypes, seed)
    _, mask = sample((draw(st.sampled_from([1, slices])), rows, columns), dtypes, seed)
    objects = draw(st.lists(st.sampled_from(GEOMETRY), unique=True, max_size=4))
    if draw(st.booleans()):
        size = draw(st.integers(1, 20)), draw(st.integers(1, 20))
        objects.insert(0, Crop(*size, random=draw(st.booleans())))
    plan = compile_plan(
        objects,
        (rows, columns),
        samples=samples,
        interpolation=draw(st.sampled_from(["linear", "cubic"])),
        outside=draw(st.sampled_from(["minimum", "edge", -5.0])),
        aspect=draw(st.sampled_from([1.0, 1.0, 0.6])),
    )
    return image, mask, seed, plan


@given(geometries())
def test_geometry_equals_scipy_on_the_map_of_its_twin(
    case: tuple[Array, Array, int, Plan],
) -> None:
    """Images are interpolated as SciPy does; masks are the nearest pixel, whatever the order."""
    image, mask, seed, plan = case
    before = image.copy(), mask.copy()

    found, found_mask = augmented(image, mask, seed, plan)
    expected, expected_mask = twin_geometry(image, mask, seed, plan)

    np.testing.assert_allclose(found, expected, atol=0.02)
    where, _ = twin_coordinates(seed, plan)
    # where two pixels are equally near, rounding decides
    is_tie = (np.abs(np.mod(where, 1) - 0.5) < 1e-9).any(axis=0)
    assert np.array_equal(expected_mask[:, ~is_tie], found_mask[:, ~is_tie])
    assert np.array_equal(before[0], image)
    assert np.array_equal(before[1], mask)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    objects=st.lists(st.sampled_from(INTENSITIES), unique=True, max_size=5),
    seed=st.integers(0, 2**64 - 1),
    is_constant=st.booleans(),
)
def test_intensities_equal_plain_formulas(
    shape: tuple[int, int, int], objects: list[Augmentation], seed: int, is_constant: bool
) -> None:
    """Contrast, brightness, gamma, noise, blur and low resolution in any order."""
    image, mask = sample(shape, DTYPES[0], seed)
    image[...] = image[0, 0, 0] if is_constant else image
    plan = plan_for(image, *objects)

    found, found_mask = augmented(image, mask, seed, plan)

    expected = twin_intensities(image, seed, plan)
    np.testing.assert_allclose(found, expected, atol=0.01, rtol=1e-4)
    assert np.array_equal(mask, found_mask)


@pytest.mark.parametrize(
    ("shape", "count"), [((6, 6), 8), ((5, 8), 4)], ids=["square", "not square"]
)
def test_every_pose_is_equally_likely(shape: tuple[int, int], count: int) -> None:
    """All 8 poses of a square image, and the 4 of another that keep its shape, exactly."""
    image, mask = sample((1, *shape))
    poses = [np.rot90(turned, k) for turned in (image[0], image[0].T) for k in range(4)]
    kept = {pose.tobytes() for pose in poses if pose.shape == shape}
    plan = plan_for(image, Dihedral())

    seen = Counter(
        augmented(image, mask, mix(seed), plan)[0][0].astype(image.dtype).tobytes()
        for seed in range(2000)
    )

    assert kept == set(seen)
    assert len(seen) == count
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_a_square_crop_of_another_image_has_all_poses() -> None:
    """What counts is whether the output is square."""
    image, mask = sample((1, 9, 5))
    plan = plan_for(image, Crop(3, 3, random=False), Dihedral())

    seen = {augmented(image, mask, seed, plan)[0].tobytes() for seed in range(200)}

    assert len(seen) == 8


@pytest.mark.parametrize(
    ("flip", "axis"),
    [(Flip(1.0, 0.0), 1), (Flip(0.0, 1.0), 2), (Flip(0.0, 0.0, 1.0), 0)],
    ids=["rows", "columns", "slices"],
)
def test_flips_reverse_the_axis_that_they_name(flip: Flip, axis: int) -> None:
    """Rows, columns and slices of a non-square image, exactly, with its mask."""
    image, mask = sample((3, 5, 8))

    found, found_mask = augmented(image, mask, 1, plan_for(image, flip))

    assert np.array_equal(np.flip(image, axis), found)
    assert np.array_equal(np.flip(mask, axis), found_mask)


def test_half_of_the_samples_are_flipped_along_each_axis() -> None:
    """The two axes are independent: four outcomes, a quarter each."""
    image, mask = sample((1, 3, 4))
    plan = plan_for(image, "flip")

    seen = Counter(augmented(image, mask, mix(k), plan)[0].tobytes() for k in range(2000))

    assert len(seen) == 4
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_flipped_slices_keep_red_green_and_blue() -> None:
    """The planes of one slice stay in their order when slices are reversed."""
    image, mask = sample((6, 4, 5))
    plan = plan_for(image, Flip(0.0, 0.0, 1.0), samples=3)

    found, found_mask = augmented(image, mask[:2], 1, plan)

    assert np.array_equal(image.reshape(2, 3, 4, 5)[::-1].reshape(6, 4, 5), found)
    assert np.array_equal(mask[1::-1], found_mask)


def test_rotation_is_counter_clockwise_as_displayed() -> None:
    """A quarter turn equals NumPy's."""
    image, mask = sample((1, 7, 7))

    found, found_mask = augmented(image, mask, 1, plan_for(image, Rotate((90.0, 90.0))))

    np.testing.assert_allclose(np.rot90(image[0]), found[0], atol=1e-3)
    assert np.array_equal(np.rot90(mask[0]), found_mask[0])


def test_shift_goes_down_and_to_the_right() -> None:
    """Whole pixels are copied, what comes in is the sample's minimum, and no mask."""
    image, mask = sample((1, 10, 20))

    found, found_mask = augmented(image, mask, 1, plan_for(image, Shift((0.2, 0.2), (0.1, 0.1))))

    np.testing.assert_allclose(image[:, :-2, :-2], found[:, 2:, 2:], atol=1e-3)
    assert np.array_equal(mask[:, :-2, :-2], found_mask[:, 2:, 2:])
    np.testing.assert_allclose(found[:, :2], image.min(), atol=1e-3)
    assert not found_mask[:, :, :2].any()


def test_zoom_enlarges_about_the_centre() -> None:
    """Twice the size: a box of 4 x 6 pixels becomes one of 8 x 12."""
    image = np.zeros((1, 20, 30), np.int16)
    image[:, 8:12, 12:18] = 1

    _, found = augmented(image, image.astype(np.uint8), 1, plan_for(image, Zoom((2.0, 2.0))))

    expected = np.zeros((1, 20, 30), np.uint8)
    expected[:, 6:14, 9:21] = 1
    assert np.array_equal(expected, found)


def test_crops_are_copies_from_every_place() -> None:
    """A random crop is a part of the image; all places occur, about equally often."""
    image, mask = sample((1, 6, 9), seed=3)
    plan = plan_for(image, Crop(4, 8))
    places = {
        image[0, r : r + 4, c : c + 8].astype(np.float32).tobytes(): (r, c)
        for r in range(3)
        for c in range(2)
    }

    seen = Counter(places[augmented(image, mask, mix(k), plan)[0].tobytes()] for k in range(1200))

    assert len(seen) == 6
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_crops_larger_than_the_image_pad_it() -> None:
    """The image lies in the middle, its minimum round it."""
    image, mask = sample((1, 4, 6))

    found, found_mask = augmented(image, mask, 1, plan_for(image, Crop(8, 6)))

    assert np.array_equal(np.pad(image[0], ((2, 2), (0, 0)), constant_values=image.min()), found[0])
    assert np.array_equal(np.pad(mask[0], ((2, 2), (0, 0))), found_mask[0])


@given(st.integers(0, 2**64 - 1))
@settings(max_examples=20)
def test_elastic_moves_no_pixel_further_than_it_says_and_does_not_fold(seed: int) -> None:
    """A ramp shows where each pixel came from: within the amplitude, and in the same order."""
    rows = np.repeat(np.arange(60, dtype=np.float32)[:, None], 50, axis=1)[None]
    mask = np.zeros(rows.shape, np.uint64)
    plan = plan_for(rows, Elastic((8.0, 8.0)), outside="edge")

    found, _ = augmented(rows, mask, seed, plan)

    assert np.abs(found - rows).max() <= 8
    assert (np.diff(found, axis=1)[:, 10:-10] > 0).all()
    assert np.abs(found - rows).max() > 0.1


@given(st.integers(0, 2**64 - 1), st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_masks_hold_no_value_that_was_not_there(seed: int, dtypes: tuple[str, str]) -> None:
    """All bits travel together: the values after augmentation are values of before, or nothing."""
    image, mask = sample((2, 17, 23), dtypes, seed % 1000)

    _, found = augmented(image, mask, seed, plan_for(image, *EVERYTHING))

    assert set(np.unique(found)) <= {0, *np.unique(mask)}


def test_image_and_mask_stay_together() -> None:
    """A mask that is the thresholded image still is after flips, poses and crops."""
    image, _ = sample((3, 32, 32))
    plan = plan_for(image, "flip", "dihedral", Crop(20, 20))

    for seed in range(30):
        found, found_mask = augmented(image, (image > 99).astype(np.uint8), mix(seed), plan)
        assert np.array_equal(found > 99, found_mask.astype(bool))


def test_all_slices_of_a_stack_move_alike() -> None:
    """One geometry for all: equal slices stay equal."""
    image, mask = sample((1, 20, 30))
    plan = plan_for(image, *GEOMETRY)

    found, _ = augmented(np.repeat(image, 3, axis=0), mask, 5, plan)

    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_noise_is_normal() -> None:
    """A million numbers against the normal distribution, and neighbours against each other."""
    image = np.zeros((4, 512, 512), np.float32)
    plan = plan_for(image, Noise((1.0, 1.0), relative=False))

    found, _ = augmented(image, np.zeros((1, 512, 512), np.uint64), 11, plan)

    values = found.reshape(-1).astype(np.float64)
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(scipy.stats.kurtosis(values)) < 0.02
    for lag in (1, 2, 255, 256, 257, 512):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4e-3


def test_noise_differs_between_seeds_and_planes() -> None:
    """No plane and no sample has the noise of another."""
    image = np.zeros((3, 64, 64), np.float32)
    plan = plan_for(image, Noise((1.0, 1.0), relative=False))
    mask = np.zeros((1, 64, 64), np.uint64)

    planes = [p.reshape(-1) for seed in range(3) for p in augmented(image, mask, seed, plan)[0]]

    apart = np.corrcoef(planes) - np.eye(9)
    assert np.abs(apart).max() < 0.08


def test_same_on_every_number_of_threads() -> None:
    """Bytes depend on seed and objects, not on who serves the sample or after which other one."""
    image, mask = sample((2, 40, 30))
    plan = plan_for(image, *EVERYTHING)
    seeds = [mix(k) for k in range(40)]

    def run(threads: int) -> list[bytes]:
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda seed: augmented(image, mask, seed, plan), seeds)
            return [i.tobytes() + m.tobytes() for i, m in found]

    one = run(1)

    assert one == run(2)
    assert one == run(8)
    assert one == [b"".join(a.tobytes() for a in augmented(image, mask, s, plan)) for s in seeds]
    assert len(set(one)) == len(one)


def test_same_in_another_process() -> None:
    """Neither hash randomisation nor the process changes a byte."""
    image, mask = sample((1, 20, 30))
    plan = plan_for(image, *EVERYTHING)
    program = (
        "import pickle, sys, hashlib, numpy as np\n"
        "from parallel_dicomseg.loader.augment import augment_into\n"
        "image, mask, plan = pickle.load(sys.stdin.buffer)\n"
        "out, out_mask = np.empty(image.shape, np.float32), np.empty_like(mask)\n"
        "augment_into(image, mask, out, out_mask, 5, plan)\n"
        "print(hashlib.sha256(out.tobytes() + out_mask.tobytes()).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((image, mask, plan)),
        capture_output=True,
        check=True,
    )

    found, found_mask = augmented(image, mask, 5, plan)

    expected = hashlib.sha256(found.tobytes() + found_mask.tobytes()).hexdigest()
    assert expected == done.stdout.decode().strip()


def test_an_object_does_not_change_the_draws_of_another() -> None:
    """Adding a flip that never flips, a bend of nothing or another order leaves all as it is."""
    image, mask = sample((1, 20, 30))
    rotate, noise = Rotate(), Noise(relative=False)

    alone, _ = augmented(image, mask, 9, plan_for(image, rotate, noise))

    for objects in (
        (noise, rotate),
        (Flip(0.0, 0.0), rotate, noise),
        (rotate, noise, Contrast(probability=0.0), Gamma(probability=0.0)),
    ):
        assert np.array_equal(alone, augmented(image, mask, 9, plan_for(image, *objects))[0])


def test_two_of_a_kind_draw_different_numbers() -> None:
    """A second noise is not the first again, and a named one has a stream of its own."""
    image = np.zeros((1, 32, 32), np.float32)
    mask = np.zeros((1, 32, 32), np.uint64)
    noise = Noise((1.0, 1.0), relative=False)

    one, _ = augmented(image, mask, 9, plan_for(image, noise))
    two, _ = augmented(image, mask, 9, plan_for(image, noise, noise))
    other, _ = augmented(
        image, mask, 9, plan_for(image, Noise((1.0, 1.0), relative=False, name="scanner"))
    )

    assert abs(np.corrcoef(one.reshape(-1), (two - one).reshape(-1))[0, 1]) < 0.2
    assert abs(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) < 0.2


def test_probability_is_how_often_an_object_is_applied() -> None:
    """Three samples of ten."""
    image = np.zeros((1, 2, 2), np.float32)
    mask = np.zeros((1, 2, 2), np.uint64)
    plan = plan_for(image, Brightness((1.0, 1.0), relative=False, probability=0.3))

    changed = sum(bool(augmented(image, mask, mix(k), plan)[0].any()) for k in range(2000))

    assert scipy.stats.binomtest(changed, 2000, 0.3).pvalue > 1e-4


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float64", "float32"])
def test_output_has_the_type_that_was_asked_for(dtype: str) -> None:
    """Images are rounded and stopped at the limits of integers, into any memory order."""
    image, mask = sample((2, 12, 16))
    plan = plan_for(image, "rotate", "contrast")
    expected, _ = augmented(image, mask, 3, plan)
    memory = np.empty((12, 16, 2), dtype)

    augment_into(image, mask, np.moveaxis(memory, -1, 0), mask.copy(), 3, plan)

    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        expected = np.rint(expected).clip(limits.min, limits.max)
    assert np.array_equal(expected.astype(dtype), np.moveaxis(memory, -1, 0))


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", ">f4"])
def test_images_of_other_types_are_converted(dtype: str) -> None:
    """What the kernel is not compiled for is served as float32."""
    kept, mask = sample((1, 12, 16), ("float32", "uint64"))
    image = (kept % 2).astype(dtype) if dtype == "bool" else kept.astype(dtype)
    plan = plan_for(image, *EVERYTHING)

    found, _ = augmented(image, mask, 3, plan)

    assert np.array_equal(augmented(image.astype(np.float32), mask, 3, plan)[0], found)


@pytest.mark.parametrize(
    ("dtype", "image_dtype"),
    [("bool", "int16"), ("int8", "int16"), ("float32", "uint8"), ("int64", "float32")],
)
def test_masks_of_any_type_are_moved(dtype: str, image_dtype: str) -> None:
    """Label maps, truth values and coverages: the nearest pixel's bytes."""
    image, mask = sample((1, 12, 16), (image_dtype, "uint8"))
    labels = (mask % 2).astype(dtype)
    plan = plan_for(image, "flip,rotate,elastic")

    _, found = augmented(image, labels, 3, plan)

    _, expected = twin_geometry(image, labels, 3, plan)
    assert found.dtype == labels.dtype
    assert np.array_equal(expected, found)


def test_inputs_that_are_not_contiguous_are_read_rightly() -> None:
    """A view of every other column and a transposed one."""
    image, mask = sample((1, 12, 32))
    plan = plan_for(image[:, :, ::2], *EVERYTHING)

    found = augmented(image[:, :, ::2], mask[:, :, ::2], 3, plan)
    expected = augmented(image[:, :, ::2].copy(), mask[:, :, ::2].copy(), 3, plan)

    assert np.array_equal(expected[0], found[0])
    assert np.array_equal(expected[1], found[1])


def test_window_comes_between_geometry_and_intensities() -> None:
    """Interpolated stored values are clipped and scaled, then contrast works on what is left."""
    image, mask = sample((1, 20, 30))
    window = intensity_maps((50, 150), None, statistics_of(image))[0]
    moved, _ = augmented(image, mask, 4, plan_for(image, "rotate"))

    found, _ = augmented(image, mask, 4, plan_for(image, "rotate", "contrast"), window)

    expected = twin_intensities((moved.clip(50, 150) - 50) / 100, 4, plan_for(image, "contrast"))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_python_function_has_the_last_word_and_its_own_random_numbers() -> None:
    """It sees what is served, and gets the same numbers whenever the sample is served."""
    image, mask = sample((2, 6, 7))

    def invert(image: Array, mask: Array, generator: np.random.Generator) -> None:
        image *= -generator.random()
        mask[...] = 0

    found, found_mask = augmented(image, mask, 3, plan_for(image, Function(invert)))
    again, _ = augmented(image, mask, 3, plan_for(image, Function(invert)))
    other, _ = augmented(image, mask, 4, plan_for(image, Function(invert)))

    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)
    assert not found_mask.any()


def test_errors_of_a_python_function_reach_the_caller() -> None:
    """As they were raised."""
    image, mask = sample((1, 6, 7))

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of mine")

    with pytest.raises(ZeroDivisionError, match="of mine"):
        augmented(image, mask, 3, plan_for(image, Function(fail)))


def test_objects_are_had_by_name() -> None:
    """One by one, or as a list with commas; crop needs a size."""
    assert (Flip(), Noise(), Blur()) == named("flip, noise", "blur")
    assert compile_plan("flip,noise", (4, 4)).augmentations == (Flip(), Noise())
    with pytest.raises(ConfigurationError, match=r"no augmentation 'flop'; there are flip, "):
        named("flop")
    with pytest.raises(ConfigurationError, match="crop: it needs a size"):
        named("crop")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flip(rows=1.5), "flip: a probability of 1.5"),
        (lambda: Noise(probability=-1.0), "noise: a probability of -1"),
        (lambda: Rotate((5.0, -5.0)), "rotate: from 5.0 to -5.0; it takes an ascending range"),
        (lambda: Zoom((0.0, 1.0)), "zoom: from 0.0 to 1.0"),
        (lambda: Shift(rows=(-2.0, 0.0)), "shift: from -2.0 to 0.0"),
        (lambda: Noise((-1.0, 1.0)), "noise: from -1.0 to 1.0"),
        (lambda: Gamma((math.nan, 1.0)), "gamma: from nan to 1.0"),
        (lambda: Blur((0.0, 1.0)), "blur: from 0.0 to 1.0"),
        (lambda: LowResolution((0.5, 1.0)), "low-resolution: from 0.5 to 1.0"),
        (lambda: Contrast((-1.0, 1.0)), "contrast: from -1.0 to 1.0"),
        (lambda: Brightness((0.0, math.inf)), "brightness: from 0.0 to inf"),
        (lambda: Elastic((0.0, 9.0)), "folds a grid of 32"),
        (Function, "function: it needs a function"),
        (lambda: Window(3, 3), "a window from 3 to 3 holds nothing"),
        (lambda: ZScore("patient"), "statistics per 'patient'"),
        (lambda: ZScore(mean=1.0), "a mean and a standard deviation, or neither"),
        (lambda: ZScore(mean=1.0, sd=0.0), "a standard deviation of 0"),
        (lambda: Percentiles(50, 50), "percentiles from 50 to 50"),
        (lambda: window_of("spleen"), "no window 'spleen'; there are abdomen"),
        (lambda: compile_plan([Crop(2, 2), Crop(3, 3)], (4, 4)), "crop: only one"),
        (lambda: compile_plan([Elastic(), Elastic()], (4, 4)), "elastic: only one"),
        (lambda: compile_plan([Noise(name="a"), Blur(name="a")], (4, 4)), "two .* named 'a'"),
        (lambda: compile_plan([3], (4, 4)), "3 is no augmentation"),  # type: ignore[list-item]
        (lambda: compile_plan([], (4, 4), interpolation="sinc"), "no interpolation 'sinc'"),
        (lambda: compile_plan([], (4, 4), outside="wrap"), "outside is 'wrap'"),
        (lambda: compile_plan([], (4, 4), outside=math.inf), "outside is inf"),
        (lambda: compile_plan([], (4, 4), samples=0), "0 samples of a pixel"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    """When the object is made, with its name, the number and what is allowed."""
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 5, 6), (1, 6, 6), (1, 6, 6), (1, 6, 6)), "the image has shape"),
        (((1, 6, 6), (1, 6, 5), (1, 6, 6), (1, 6, 6)), "the mask has shape"),
        (((1, 6, 6), (1, 6, 6), (2, 6, 6), (1, 6, 6)), "the augmented image has shape"),
        (((1, 6, 6), (1, 6, 6), (1, 6, 6), (1, 6, 7)), "the augmented mask has shape"),
        (((0, 6, 6), (1, 6, 6), (0, 6, 6), (1, 6, 6)), "0 planes are not whole slices"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, int, int], ...], message: str
) -> None:
    """The kernel never sees an array that it would read or write beyond its end."""
    arrays = [
        np.zeros(shape, dtype)
        for shape, dtype in zip(shapes, ("i2", "u1", "f4", "u1"), strict=True)
    ]

    with pytest.raises(ConfigurationError, match=message):
        augment_into(*arrays, 1, compile_plan("flip", (6, 6)))


def test_masks_of_another_type_are_refused() -> None:
    """No conversion of masks behind the caller's back."""
    image, mask = sample((1, 6, 6))

    with pytest.raises(ConfigurationError, match="masks of uint8 cannot become uint16"):
        augment_into(
            image, mask, image.astype("f4"), mask.astype("u2"), 1, compile_plan("flip", (6, 6))
        )


def test_nothing_is_compiled_before_a_sample_is_augmented() -> None:
    """Describing augmentations, and mapping intensities alone, does without numba."""
    program = (
        "import sys, numpy as np\n"
        "from parallel_dicomseg.loader.augment import augment_into, compile_plan\n"
        "plan = compile_plan('flip,noise', (4, 4))\n"
        "image = np.zeros((1, 4, 4), np.float32)\n"
        "augment_into(image, image, image.copy(), image.copy(), 0, compile_plan((), (4, 4)))\n"
        "print('numba' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert done.stdout.decode().strip() == "False"


def test_warm_up_can_be_called_from_several_threads() -> None:
    """Whoever comes first compiles, nobody fails."""
    threads = [threading.Thread(target=warm_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --------------------------------------------------------------------------------------------
# Windows and normalisation


def statistics_of(slices: Array, volume: Array | None = None) -> Statistics:
    """What a converted file would keep of these slices."""
    axes = tuple(range(1, slices.ndim))
    columns = [f(slices, axis=axes) for f in (np.min, np.max, np.mean, np.std)]
    return Statistics.from_columns(
        np.stack(columns, axis=1), np.zeros(len(slices)) if volume is None else volume
    )


def mapped(slices: Array, maps: Array) -> Array:
    """All slices through their maps."""
    out = np.empty(slices.shape, np.float32)
    for source, target, intensity in zip(slices, out, maps, strict=True):
        map_into(source, target, intensity)
    return out


@pytest.mark.parametrize(("per", "groups"), [("slice", 6), ("volume", 2), ("file", 1)])
def test_z_scores_are_exact_over_slices_volumes_and_files(per: str, groups: int) -> None:
    """Pooled from the statistics of slices: mean 0 and standard deviation 1 in every group."""
    slices, _ = sample((6, 8, 9))
    slices[3:] += 1000

    found = mapped(
        slices, intensity_maps(None, ZScore(per), statistics_of(slices, np.arange(6) // 3))
    )

    for part in np.split(found, groups):
        assert abs(part.mean()) < 1e-4
        assert abs(part.std() - 1) < 1e-4


def test_windows_map_to_the_unit_interval() -> None:
    """By name, as limits, or as centre and width; what lies outside is clipped."""
    slices = np.array([[[-2000.0, -1000, 0, 1000]]], np.float32)

    for window in ((-1000.0, 1000.0), Window.centered(0, 2000)):
        found = mapped(slices, intensity_maps(window, None, statistics_of(slices)))
        assert found.tolist() == [[[0.0, 0.0, 0.5, 1.0]]]
    assert window_of("lung") == Window(-1350, 150)


def test_a_window_clips_before_a_z_score() -> None:
    """Of stored statistics: those of the values before they are clipped."""
    slices = np.array([[[0.0, 10, 20, 30]]], np.float32)

    found = mapped(slices, intensity_maps((5, 15), ZScore(mean=10, sd=5), statistics_of(slices)))

    assert found.tolist() == [[[-1.0, 0.0, 1.0, 1.0]]]


@pytest.mark.parametrize("per", ["slice", "volume", "file"])
def test_minimum_and_maximum_become_0_and_1(per: str) -> None:
    """In every group."""
    slices, _ = sample((4, 8, 9))
    statistics = statistics_of(slices, np.array([0, 0, 7, 7]))

    found = mapped(slices, intensity_maps(None, MinMax(per), statistics))

    groups = {"slice": found.reshape(4, -1), "volume": found.reshape(2, -1)}
    for part in groups.get(per, found.reshape(1, -1)):
        assert part.min() == 0
        assert part.max() == pytest.approx(1, abs=1e-6)


@given(
    st.sampled_from(["u1", "i1", "<i2", "<u2", "<i4", "<f4"]),
    st.integers(1, 3),
    st.integers(1, 50),
    st.tuples(st.floats(0, 100), st.floats(0, 100)),
    st.integers(0, 99),
)
def test_counted_percentiles_are_numpys(
    dtype: str, arrays: int, count: int, wanted: tuple[float, float], seed: int
) -> None:
    """Of one value and of many, of every type, at any place."""
    values = np.random.default_rng(seed).integers(-90, 120, (arrays, count)).astype(dtype)
    # as numbers without a limit: NumPy's own difference of two int8 overflows
    expected = np.percentile(values.astype(np.float64), wanted)

    np.testing.assert_allclose(percentiles(values, wanted), expected, rtol=1e-12, atol=1e-9)


def test_percentiles_are_measured_on_the_slices() -> None:
    """Clipped there; they become 0 and 1."""
    slices, _ = sample((4, 30, 30))

    found = mapped(
        slices, intensity_maps(None, Percentiles(10, 90), statistics_of(slices), slices.__getitem__)
    )

    low, high = np.percentile(slices, [10, 90])
    np.testing.assert_allclose(found, (slices.clip(low, high) - low) / (high - low), atol=1e-5)
    with pytest.raises(ConfigurationError, match="percentiles are measured on the slices"):
        intensity_maps(None, Percentiles(), statistics_of(slices))


@pytest.mark.parametrize("normalize", [None, ZScore(), MinMax(), ZScore("file")])
@pytest.mark.parametrize("window", [None, (300.0, 400.0), "brain"])
def test_constant_slices_and_empty_windows_stay_finite(normalize: Any, window: Any) -> None:
    """Nothing is divided by 0."""
    slices = np.full((2, 3, 4), 7, np.int16)

    found = mapped(slices, intensity_maps(window, normalize, statistics_of(slices)))

    assert np.isfinite(found).all()


@given(st.integers(0, 1000), st.sampled_from(DTYPES))
@settings(max_examples=20)
def test_mapping_without_numba_gives_the_same_bits(seed: int, dtypes: tuple[str, str]) -> None:
    """A loader without augmentation serves what one whose augmentations do nothing serves."""
    image, mask = sample((2, 9, 13), dtypes, seed)
    intensity = intensity_maps((20, 170), ZScore(), statistics_of(image))[0]

    for each in (intensity, UNCHANGED, None):
        found, _ = augmented(image, mask, 1, plan_for(image, Flip(0.0, 0.0)), each)
        expected, _ = augmented(image, mask, 1, plan_for(image), each)
        assert np.array_equal(expected, found)
