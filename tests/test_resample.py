"""Images on another grid: nothing lost by shifts, nothing moved by interpolation."""

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.resample import is_shift, place, resample, resample_mask, to_dtype

NAN = float("nan")


def centred_grid(shape, target, step):
    """The grid of a target size whose centre is the centre of the source."""
    first = [
        (size - 1) / 2 - (wanted - 1) / 2 * step for size, wanted in zip(shape, target, strict=True)
    ]
    return (*first, step, step)


def disc(shape, centre_row, centre_column, radius):
    """A disc of 100 on 10 whose border pixels hold the share of them inside, 16 x 16 sampled."""
    fine = (np.arange(16) + 0.5) / 16 - 0.5
    rows = (np.arange(shape[0])[:, None] + fine).ravel()[:, None] - centre_row
    columns = (np.arange(shape[1])[:, None] + fine).ravel() - centre_column
    inside = (rows**2 + columns**2 < radius**2).reshape(shape[0], 16, shape[1], 16)
    return 10 + 90 * inside.mean(axis=(1, 3))


def centroid(image, background):
    """Row and column of the centre of what lies above the background."""
    weight = image.astype(np.float64) - background
    rows, columns = np.indices(image.shape)
    return np.array([(weight * rows).sum(), (weight * columns).sum()]) / weight.sum()


def obvious_place(image, grid, shape, pad_value):
    """Pixel by pixel."""
    pad = image.min() if np.isnan(pad_value) else pad_value
    placed = np.full((*shape, *image.shape[2:]), pad, image.dtype)
    for row in range(shape[0]):
        for column in range(shape[1]):
            at = row + int(grid[0]), column + int(grid[1])
            if 0 <= at[0] < image.shape[0] and 0 <= at[1] < image.shape[1]:
                placed[row, column] = image[at]
    return placed


sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(sizes, sizes, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([NAN, 0.0, 7.0, -3.0]))
@pytest.mark.parametrize("samples", [(), (3,)])
def test_shifted_images_equal_those_placed_pixel_by_pixel(samples, size, shape, row, column, pad):
    """Crops, pads and images that lie wholly outside; every pixel as it was."""
    image = np.arange(np.prod([*size, *samples]), dtype=np.int16).reshape(*size, *samples) - 5
    grid = (float(row), float(column), 1.0, 1.0)

    placed = place(image, grid, shape, pad)

    assert is_shift(grid)
    assert placed.dtype == image.dtype
    np.testing.assert_array_equal(placed, obvious_place(image, grid, shape, pad))


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((0.0, 0.0, 1.0, 1.0), True),
        ((-3.0, 17.0, 1.0, 1.0), True),
        ((0.5, 0.0, 1.0, 1.0), False),
        ((0.0, 0.0, 1.0, 2.0), False),
    ],
)
def test_only_whole_steps_of_one_are_shifts(grid, expected):
    """Anything else has to be interpolated."""
    assert is_shift(grid) is expected


def test_padding_is_clipped_to_the_images_type():
    """-1000 around unsigned pixels is 0, not 64536."""
    placed = place(np.full((1, 1), 9, np.uint16), (-1.0, 0.0, 1.0, 1.0), (2, 1), -1000.0)

    assert placed.tolist() == [[0], [9]]


@pytest.mark.parametrize(
    ("step", "target"), [(2.0, (60, 70)), (0.5, (240, 280)), (1.37, (88, 102))]
)
def test_a_disc_stays_where_it_is_and_keeps_its_area(step, target):
    """0.7 to 1.4 mm and back: centroid within 0.005 pixels of the truth, area within 0.1 %."""
    shape = (120, 140)
    truth = np.array([57.3, 71.9])
    image = disc(shape, *truth, 31.25)
    grid = centred_grid(shape, target, step)

    resampled = resample(image, grid, target, NAN)

    expected = (truth - grid[:2]) / step
    assert np.abs(centroid(resampled, 10) - expected).max() < 0.005
    area = (resampled.astype(np.float64) - 10).sum() / 90 * step**2
    assert area == pytest.approx(np.pi * 31.25**2, rel=1e-3)


@pytest.mark.parametrize("step", [2.0, 0.5])
def test_image_and_truth_on_the_target_grid_align_by_phase_correlation(step):
    """The disc drawn on the target grid is found at a shift of less than 0.05 target pixels."""
    skimage = pytest.importorskip("skimage.registration")
    shape = (128, 128)
    target = (int(128 / step), int(128 / step))
    grid = centred_grid(shape, target, step)
    centre, radius = np.array([60.4, 66.7]), 30.0

    resampled = resample(disc(shape, *centre, radius), grid, target, NAN)
    drawn = disc(target, *((centre - grid[:2]) / step), radius / step)
    shift, _, _ = skimage.phase_cross_correlation(drawn, resampled, upsample_factor=200)

    assert np.abs(shift).max() < 0.05


@given(
    st.floats(-30, 30),
    st.floats(-30, 30),
    st.floats(0.3, 4),
    st.floats(0.3, 4),
    sizes,
    st.sampled_from([-1024.0, 0.0, 3.5, 4095.0]),
)
def test_a_constant_image_stays_constant(row, column, row_step, column_step, shape, value):
    """Also at its borders and beyond them, on any grid."""
    image = np.full((9, 13), value)

    resampled = resample(image, (row, column, row_step, column_step), shape, NAN)

    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, value, rtol=1e-6)


@given(st.floats(-3, 12), st.floats(0.4, 2.5), st.floats(-3, 12), st.floats(0.4, 2.5), sizes)
def test_exactly_the_pixels_whose_centres_lie_outside_are_padding(row, rs, column, cs, shape):
    """Half-open as the nearest-neighbour mask is: of an image of ones the padding stays 7."""
    grid = (row, column, rs, cs)

    resampled = resample(np.ones((9, 8)), grid, shape, 7.0)

    inside = resample_mask(np.ones((9, 8), bool), grid, shape)
    np.testing.assert_allclose(resampled, np.where(inside, 1.0, 7.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "largest"), [((2.0, 0.6), 1e-3), ((0.5, 2.0), 1e-3), ((1.3, 1.6), 0.013)]
)
def test_a_ramp_shows_where_every_pixel_came_from(steps, largest):
    """Positions are exact within 1e-3 pixels; where a fraction shrinks the image, on average."""
    for axis, step in enumerate(steps):
        truth = 10.2 + step * np.arange(40)
        ramp = np.broadcast_to(np.expand_dims(np.arange(120.0), 1 - axis), (120, 120))
        grid = [0.0, 0.0, 1.0, 1.0]
        grid[axis], grid[axis + 2] = 10.2, step
        shape = (40, 120) if axis == 0 else (120, 40)

        found = resample(ramp, grid, shape, NAN).astype(np.float64).mean(axis=1 - axis)

        assert np.abs(found - truth).max() < largest
        assert np.abs((found - truth).mean()) < 1e-3


def test_shrinking_filters_what_would_alias():
    """A pattern finer than the target grid becomes its mean instead of a coarser pattern."""
    columns = np.arange(256)
    image = np.tile(100 * (1 + np.cos(2 * np.pi * columns * 0.45)), (256, 1))
    grid = centred_grid((256, 256), (128, 128), 2.0)

    resampled = resample(image, grid, (128, 128), NAN)[8:-8, 8:-8]
    subsampled = scipy.ndimage.map_coordinates(
        image, np.mgrid[0:112, 0:112] * 2.0 + 16.5, order=3, mode="nearest"
    )

    assert subsampled.std() > 20
    assert resampled.std() < 5
    assert resampled.mean() == pytest.approx(100, abs=1)


def test_colour_is_resampled_sample_by_sample():
    """Three samples equal three grey images."""
    image = np.random.default_rng(0).uniform(0, 255, (20, 30, 3))
    grid = (0.5, 0.25, 2.0, 1.5)

    resampled = resample(image, grid, (12, 22), NAN)

    for sample in range(3):
        alone = resample(image[..., sample], grid, (12, 22), image.min())
        np.testing.assert_array_equal(resampled[..., sample], alone)


def test_an_image_wholly_outside_the_grid_gives_padding():
    """Nothing to interpolate is no error."""
    assert (resample(np.ones((4, 4)), (50.0, 0.0, 2.0, 2.0), (3, 3), -5.0) == -5).all()


@given(st.floats(-6, 12), st.floats(0.2, 3), st.floats(-6, 12), st.floats(0.2, 3), sizes)
def test_masks_take_the_pixel_in_which_the_centre_lies(row, row_step, column, column_step, shape):
    """Against a loop over the stored pixels."""
    mask = np.random.default_rng(3).random((9, 8)) < 0.5

    resampled = resample_mask(mask, (row, column, row_step, column_step), shape)

    for r in range(shape[0]):
        for c in range(shape[1]):
            at = (
                int(np.floor(row + row_step * r + 0.5)),
                int(np.floor(column + column_step * c + 0.5)),
            )
            inside = 0 <= at[0] < 9 and 0 <= at[1] < 8
            assert resampled[r, c] == (inside and mask[at])


def test_a_centre_on_a_border_belongs_to_the_second_pixel():
    """Position 0.5 lies in pixel 1, -0.5 in pixel 0, the far border in none."""
    mask = np.array([[False, True, True]])

    assert resample_mask(mask, (0.0, -0.5, 1.0, 1.0), (1, 4)).tolist() == [
        [False, True, True, False]
    ]


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("|u1", [-3.2, 0.5, 1.5, 254.6, 300.0], [0, 0, 2, 255, 255]),
        ("<i2", [-40000.0, 40000.0, -0.6], [-32768, 32767, -1]),
        ("<i4", [3e9, -3e9], [2**31 - 1, -(2**31)]),
        ("<f4", [0.25, -1e9], [0.25, -1e9]),
    ],
)
def test_values_are_rounded_and_clipped_never_wrapped(dtype, values, expected):
    """What overshoots ends at the limit of the type."""
    converted = to_dtype(np.array(values, np.float32), np.dtype(dtype))

    assert converted.dtype == dtype
    assert converted.tolist() == pytest.approx(expected)
