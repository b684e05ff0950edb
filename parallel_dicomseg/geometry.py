"""Where pixels lie in the patient: planes, volumes and their affines. Pure, no file is touched.

DICOM PS3.3 C.7.6.2.1.1: ImagePositionPatient is the centre of the first pixel,
ImageOrientationPatient the direction of a row (in which the column number grows), then of a
column; PixelSpacing the distance between rows, then between columns. Lengths are mm, coordinates
those of the patient (x to the left, y to the back, z to the head).

A plane is 11 numbers: ImagePositionPatient (3), ImageOrientationPatient (6), PixelSpacing (2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from parallel_dicomseg.records import Float64, SliceTable


def planes_of(images: SliceTable) -> Float64:
    """(n, 11) the planes of images; NaN where the file does not say."""
    parts = (images.image_position_patient, images.image_orientation_patient, images.pixel_spacing)
    return np.concatenate(parts, axis=1)


def normal_of(image_orientation_patient: ArrayLike) -> Float64:
    """(…, 3) unit vector across the plane: row direction x column direction, (…, 6) given."""
    orientation = np.asarray(image_orientation_patient, np.float64)
    across = np.cross(orientation[..., :3], orientation[..., 3:])
    with np.errstate(invalid="ignore", divide="ignore"):
        unit: Float64 = across / np.linalg.norm(across, axis=-1, keepdims=True)
    return unit


def heights_above(points_patient: ArrayLike, normal: ArrayLike) -> Float64:
    """(…,) mm of points (…, 3) along a unit vector (3,), from the patient's origin."""
    return _along(np.asarray(points_patient, np.float64), np.asarray(normal, np.float64))


def _along(vectors: Float64, direction: Float64) -> Float64:
    """(…,) scalar products, summed term by term.

    A matrix product rounds differently depending on how many points go together; a mask must not
    depend on which slices share a task.
    """
    terms = [vectors[..., k] * direction[k] for k in range(3)]
    total: Float64 = terms[0] + terms[1] + terms[2]
    return total


def to_pixels(points_patient: ArrayLike, plane: ArrayLike) -> Float64:
    """Project points onto one plane along its normal.

    Parameters
    ----------
    points_patient
        (p, 3) mm in patient coordinates.
    plane
        (11,), see the module.

    Returns
    -------
    (p, 2) pixels as (column, row), integers at pixel centres. The inverse of DICOM PS3.3 equation
    C.7.6.2.1-1.
    """
    plane = np.asarray(plane, np.float64)
    relative = np.asarray(points_patient, np.float64) - plane[:3]
    along_row, along_column = _duals(plane[3:6], plane[6:9])
    columns_rows = np.empty((*relative.shape[:-1], 2))
    columns_rows[..., 0] = _along(relative, along_row) / plane[10]
    columns_rows[..., 1] = _along(relative, along_column) / plane[9]
    return columns_rows


def _duals(row_direction: Float64, column_direction: Float64) -> tuple[Float64, Float64]:
    """What to multiply a vector with to get its parts along the two directions.

    Solved, not projected: the cosines of real headers are rounded and not quite orthogonal.
    """
    cross = _along(row_direction, column_direction)
    row_square = _along(row_direction, row_direction)
    column_square = _along(column_direction, column_direction)
    norm = row_square * column_square - cross * cross
    return (
        (row_direction * column_square - column_direction * cross) / norm,
        (column_direction * row_square - row_direction * cross) / norm,
    )


def to_patient(points_column_row: ArrayLike, plane: ArrayLike) -> Float64:
    """(p, 3) mm of pixel positions (p, 2), as (column, row), on one plane (11,) or each
    on its own (p, 11).

    DICOM PS3.3 equation C.7.6.2.1-1.
    """
    points, plane = np.asarray(points_column_row, np.float64), np.asarray(plane, np.float64)
    columns, rows = points[..., :1] * plane[..., 10:11], points[..., 1:] * plane[..., 9:10]
    patient: Float64 = plane[..., :3] + columns * plane[..., 3:6] + rows * plane[..., 6:9]
    return patient


def volume_affine(planes: ArrayLike) -> Float64:
    """(4, 4) from (column, row, slice, 1) to patient mm of a volume whose planes (k, 11) are
    ordered by position; the step between slices is the mean one, or 1 mm for a single slice.
    """
    planes = np.asarray(planes, np.float64)
    first, last = planes[0], planes[-1]
    affine = np.eye(4)
    affine[:3, 0] = first[3:6] * first[10]
    affine[:3, 1] = first[6:9] * first[9]
    many = len(planes) > 1
    affine[:3, 2] = (last[:3] - first[:3]) / (len(planes) - 1) if many else normal_of(first[3:9])
    affine[:3, 3] = first[:3]
    return affine


def stored_plane(plane: ArrayLike, grid: ArrayLike) -> Float64:
    """The planes (…, 11) of images on other grids (…, 4): first pixel and spacing move.

    `grid` is the row and column of the new first pixel's centre in pixels of `plane`, then the
    steps between new rows and between new columns.
    """
    plane, grid = np.asarray(plane, np.float64), np.asarray(grid, np.float64)
    origin = to_patient(grid[..., 1::-1], plane)
    return np.concatenate([origin, plane[..., 3:9], plane[..., 9:11] * grid[..., 2:4]], axis=-1)
