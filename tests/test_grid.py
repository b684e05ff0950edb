"""The grid that all images share: where every stored pixel lies in its source."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from usual import slice_table

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.grid import is_cropped, make_grids
from parallel_dicomseg.records import ConvertOptions

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4)


def table_of(sizes, spacing=(1.0, 1.0)):
    """Images of these sizes (rows, columns)."""
    rows, columns = np.array(sizes).T
    return slice_table(len(sizes), rows=rows, columns=columns, pixel_spacing=spacing)


def covered(grid, shape, size):
    """Source rows and columns that some stored pixel is, one by one."""
    row, column, row_step, column_step = grid
    rows = {row + k * row_step for k in range(shape[0])} & set(range(size[0]))
    columns = {column + k * column_step for k in range(shape[1])} & set(range(size[1]))
    return len(rows), len(columns)


@given(SIZES)
def test_padding_loses_no_pixel(sizes):
    """Without options every source pixel is a stored one, and steps are 1."""
    grids = make_grids(table_of(sizes), ConvertOptions())

    assert not grids.resampled
    assert (grids.rows, grids.columns) == tuple(np.array(sizes).max(axis=0))
    for grid, size in zip(grids.grid, sizes, strict=True):
        assert covered(grid, (grids.rows, grids.columns), size) == size


@given(SIZES, st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_a_size_crops_and_pads_about_the_centre(sizes, wanted):
    """Margins on both sides differ by at most one pixel, and origins are whole."""
    grids = make_grids(table_of(sizes), ConvertOptions(size=wanted))

    assert (grids.rows, grids.columns) == wanted
    for (row, column, *steps), size in zip(grids.grid.tolist(), sizes, strict=True):
        assert steps == [1.0, 1.0]
        for origin, stored, source in ((row, wanted[0], size[0]), (column, wanted[1], size[1])):
            assert origin == int(origin)
            assert abs(-origin - (stored - source + origin)) <= 1


@given(SIZES, st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_a_spacing_keeps_the_whole_image_and_its_centre(sizes, row_mm, column_mm):
    """The stored image covers the source's area and has its middle in the same place."""
    grids = make_grids(table_of(sizes, (0.7, 1.3)), ConvertOptions(spacing=(row_mm, column_mm)))

    shape = np.array([grids.rows, grids.columns])
    for grid, size in zip(grids.grid, sizes, strict=True):
        origin, step = grid[:2], grid[2:]
        middle = origin + (shape - 1) / 2 * step
        rounding = np.where(step == 1, 0.5, 1e-9)
        assert np.all(np.abs(middle - (np.array(size) - 1) / 2) <= rounding + 1e-9)
        assert np.all(shape * step >= np.array(size) - 1e-4 * step)
        assert step == pytest.approx([row_mm / 0.7, column_mm / 1.3], rel=2e-5)


def test_a_spacing_that_differs_by_rounding_only_leaves_pixels_alone():
    """0.9765625 and 0.976562 are one spacing."""
    table = table_of([(10, 10)], (0.9765625, 0.9765625))

    assert not make_grids(table, ConvertOptions(spacing=(0.976562,))).resampled


def test_a_center_moves_the_image_by_whole_pixels():
    """The stored image's middle is where it was asked for, rounded."""
    centers = np.array([[3.2, 7.9], [np.nan, np.nan]])

    grids = make_grids(table_of([(20, 20)] * 2), ConvertOptions(size=(5, 5)), centers)

    assert grids.grid[:, :2].tolist() == [[2.0, 6.0], [8.0, 8.0]]


@given(SIZES, st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_is_cropped_where_a_pixel_is_missing(sizes, wanted):
    """As the slow twin counts it."""
    grids = make_grids(table_of(sizes), ConvertOptions(size=wanted))

    cropped = is_cropped(grids.grid, np.array(sizes), wanted)

    twins = [
        covered(grid, wanted, size) != size for grid, size in zip(grids.grid, sizes, strict=True)
    ]
    assert cropped.tolist() == twins
    assert any("cropped" in note for note in grids.notes) == any(twins)


def test_one_impossible_spacing_costs_its_image_only():
    """At 1 mm an image of 1e9 mm wide pixels would make all others as large as itself."""
    spacing = np.array([[1.0, 1.0], [1e9, 1e9], [np.nan, np.nan]])

    grids = make_grids(table_of([(10, 12)] * 3, spacing), ConvertOptions(spacing=(1.0,)))

    assert (grids.rows, grids.columns) == (10, 12)
    assert [problem.path for problem in grids.problems] == ["1.dcm", "2.dcm"]
    assert "10 x 12 pixels with (0028,0030) Pixel Spacing 1e+09 x 1e+09" in grids.problems[0].detail


def test_an_output_beyond_all_measure_is_refused():
    """Where no image fits it is the spacing asked for that is wrong."""
    with pytest.raises(ConfigurationError, match=r"10000000 x 12000000 pixels is larger"):
        make_grids(table_of([(10, 12)]), ConvertOptions(spacing=(1e-6,)))


@pytest.mark.parametrize("size", [(0,), (0.5,), (10, 2.5), (-3,), (1, 2, 3), (np.inf,)])
def test_a_size_is_one_or_two_whole_numbers(size):
    """Anything else is said before anything is made."""
    with pytest.raises(ConfigurationError, match=r"size is .*: it takes one or two whole numbers"):
        make_grids(table_of([(10, 12)]), ConvertOptions(size=size))
