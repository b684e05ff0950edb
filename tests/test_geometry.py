"""Pixels and millimetres: both ways, against SimpleITK, and independent of what goes together."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 its own short name
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel_dicomseg.geometry import (
    heights_above,
    normal_of,
    stored_plane,
    to_patient,
    to_pixels,
    volume_affine,
)

LENGTHS = st.floats(-500, 500)
SPACINGS = st.floats(0.05, 20)


@st.composite
def planes(draw: st.DrawFn) -> NDArray[np.float64]:
    """Any plane, its cosines rounded as in a header."""
    frame = np.linalg.qr(np.reshape([draw(st.floats(-1, 1)) for _ in range(9)], (3, 3)))[0]
    cosines = np.round(np.concatenate([frame[:, 0], frame[:, 1]]), draw(st.integers(5, 9)))
    corner = [draw(LENGTHS) for _ in range(3)]
    return np.array([*corner, *cosines, draw(SPACINGS), draw(SPACINGS)])


def slow_pixels(point: NDArray[np.float64], plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """(column, row): the least squares solution of C.7.6.2.1-1 for one point."""
    steps = np.stack([plane[3:6] * plane[10], plane[6:9] * plane[9]], axis=1)
    return np.linalg.lstsq(steps, point - plane[:3], rcond=None)[0]


@given(planes(), st.lists(st.tuples(LENGTHS, LENGTHS, LENGTHS), min_size=1, max_size=5))
def test_pixels_equal_the_least_squares_solution(
    plane: NDArray[np.float64], points: list[tuple[float, float, float]]
) -> None:
    """Column and row of any point over any plane, as one would solve for them."""
    found = to_pixels(points, plane)
    expected = [slow_pixels(np.array(point), plane) for point in points]

    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-6)


@given(planes(), st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=5))
def test_pixels_and_patient_are_inverse(
    plane: NDArray[np.float64], points: list[tuple[float, float]]
) -> None:
    """From pixels to mm and back nothing changes, and the points lie on the plane."""
    there = to_patient(points, plane)
    normal = normal_of(plane[3:9])

    np.testing.assert_allclose(to_pixels(there, plane), points, rtol=1e-7, atol=1e-5)
    above = heights_above(there, normal) - heights_above(plane[:3], normal)
    np.testing.assert_allclose(above, 0.0, atol=1e-6)


@given(planes(), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pixels_do_not_depend_on_what_goes_together(
    plane: NDArray[np.float64], count: int, seed: int
) -> None:
    """A point gets the same bits alone as among others, however the work is cut up."""
    points = np.random.default_rng(seed).normal(0, 200, (count, 3))
    normal = normal_of(plane[3:9])
    together, heights = to_pixels(points, plane), heights_above(points, normal)

    for k, point in enumerate(points):
        assert to_pixels(point[None], plane)[0].tobytes() == together[k].tobytes()
        assert heights_above(point, normal) == heights[k]


@given(planes())
def test_pixels_equal_those_of_simpleitk(plane: NDArray[np.float64]) -> None:
    """Column, row and height of a point are ITK's continuous index of it."""
    image = sitk.Image(4, 4, 4, sitk.sitkUInt8)
    normal = normal_of(plane[3:9])
    image.SetDirection(np.stack([plane[3:6], plane[6:9], normal], axis=1).ravel().tolist())
    image.SetOrigin(plane[:3].tolist())
    image.SetSpacing([plane[10], plane[9], 1.0])
    point = plane[:3] + np.array([12.5, -7.25, 3.0])
    index = image.TransformPhysicalPointToContinuousIndex(point.tolist())
    height = heights_above(point - plane[:3], normal)

    np.testing.assert_allclose([*to_pixels(point, plane), height], index, rtol=1e-6, atol=1e-4)


def test_axial_pixels_are_not_rounded() -> None:
    """On an axial image with a spacing of 1 mm the pixels are the differences themselves."""
    plane = [-7.0, 3.0, 11.0, 1, 0, 0, 0, 1, 0, 1, 1]

    assert to_pixels([[0.1, 0.2, 11.0]], plane).tolist() == [[0.1 + 7.0, 0.2 - 3.0]]


def test_spacing_is_between_rows_first() -> None:
    """PixelSpacing [4, 6.4]: rows are 4 mm apart, columns 6.4 mm."""
    plane = [0, 0, 0, 1, 0, 0, 0, 1, 0, 4.0, 6.4]

    assert to_patient([1, 0], plane).tolist() == [6.4, 0, 0]
    assert to_patient([0, 1], plane).tolist() == [0, 4.0, 0]


def test_normals_are_right_handed_and_absent_where_there_is_no_plane() -> None:
    """Row direction x column direction, of unit length; NaN for parallel or missing directions."""
    found = normal_of([[1, 0, 0, 0, 2, 0], [1, 0, 0, 1, 0, 0], [np.nan] * 6])

    assert found[0].tolist() == [0, 0, 1]
    assert np.isnan(found[1:]).all()
    assert heights_above([[3, 4, 5], [0, 0, -1]], found[0]).tolist() == [5, -1]


@given(planes(), st.integers(1, 6), st.floats(0.5, 10))
def test_affine_leads_to_the_same_points(
    plane: NDArray[np.float64], count: int, distance: float
) -> None:
    """(column, row, slice, 1) times the affine is where the plane of that slice has the pixel."""
    normal = normal_of(plane[3:9])
    volume = np.array([[*(plane[:3] + k * distance * normal), *plane[3:]] for k in range(count)])
    affine = volume_affine(volume)

    for k in range(count):
        expected = to_patient([2.5, -3.0], volume[k])
        np.testing.assert_allclose((affine @ [2.5, -3.0, k, 1])[:3], expected, atol=1e-6)
    step = distance if count > 1 else 1.0
    np.testing.assert_allclose(affine[:3, 2], step * normal, atol=1e-6)


@given(planes(), st.tuples(LENGTHS, LENGTHS), st.tuples(SPACINGS, SPACINGS))
def test_stored_pixels_are_where_the_grid_says(
    plane: NDArray[np.float64], first: tuple[float, float], step: tuple[float, float]
) -> None:
    """Stored pixel (row r, column c) lies at source pixel first + (r, c) * step."""
    stored = stored_plane(plane, [*first, *step])
    row, column = first[0] + 3 * step[0], first[1] + 5 * step[1]

    np.testing.assert_allclose(
        to_patient([5, 3], stored), to_patient([column, row], plane), rtol=1e-9, atol=1e-6
    )
    assert stored[9:] == pytest.approx(plane[9:] * step)
