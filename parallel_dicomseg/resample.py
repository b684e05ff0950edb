"""Images on another grid: shifted without loss, or interpolated. Pure, no file is touched.

A grid is four numbers: the row and column, in pixels of the source image, of the centre of the
stored image's first pixel, then the step between stored rows and between stored columns. Integer
coordinates are pixel centres (DICOM PS3.3 C.7.6.2.1.1), so pixel k covers [k - 0.5, k + 0.5): a
position on the border of two pixels belongs to the second, here as in the rasterizer.

Interpolation is Pillow's bicubic (Keys, a = -0.5): its kernel grows with the step when an image
shrinks, which is the low-pass filter against aliasing, and is the cubic itself when it grows.
Against Lanczos, the other choice there: a ramp is exact where the image grows or shrinks to half
(Lanczos: off by up to 0.02 pixels), an edge overshoots by 3 to 7 % of its height (6 to 12 %), and
it takes two thirds of the time. What Lanczos wins, a steeper cut-off, masks do not need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# Pixels on either side that Pillow's bicubic kernel reaches, in steps where these are above 1.
_BICUBIC_REACH = 2


def is_shift(grid: Sequence[float]) -> bool:
    """Whether every stored pixel is a source pixel, or none: steps 1, whole first pixel."""
    row, column, row_step, column_step = grid
    return row_step == column_step == 1 and row == math.floor(row) and column == math.floor(column)


def place(
    image: NDArray[Any], grid: Sequence[float], shape: tuple[int, int], pad_value: float
) -> NDArray[Any]:
    """Crop and pad an image without touching a pixel.

    Parameters
    ----------
    image
        (rows, columns) or (rows, columns, samples), any type.
    grid
        See the module; `is_shift` must hold.
    shape
        Rows and columns of the result.
    pad_value
        What lies outside the image, clipped to its type; NaN: the image's own minimum.

    Returns
    -------
    (*shape) or (*shape, samples) of the image's type.
    """
    (source_rows, rows), (source_columns, columns) = (
        _overlap(int(first), size, length)
        for first, size, length in zip(grid[:2], shape, image.shape[:2], strict=True)
    )
    if (rows.stop - rows.start, columns.stop - columns.start) == shape:
        return image[source_rows, source_columns]
    placed = np.full((*shape, *image.shape[2:]), _padding(image, pad_value), image.dtype)
    placed[rows, columns] = image[source_rows, source_columns]
    return placed


def resample(
    image: NDArray[Any], grid: Sequence[float], shape: tuple[int, int], pad_value: float
) -> Float32:
    """Interpolate an image on another grid, low-pass filtered where the step is above 1.

    Parameters
    ----------
    image
        (rows, columns) or (rows, columns, samples), numbers.
    grid
        See the module; steps above 0.
    shape
        Rows and columns of the result.
    pad_value
        What a stored pixel gets whose centre lies in no source pixel; NaN: the minimum of the
        image. Beyond its border the image counts as continued by its last row or column.

    Returns
    -------
    (*shape) or (*shape, samples) float32. The position of what is in the image is kept to 1e-4 of
    a source pixel (Pillow holds the box in float32); where the image shrinks by no whole number,
    single edges lie up to 0.012 source pixels to either side of it, since the kernel is sampled.
    A constant image stays constant.
    """
    rows = _inside(grid[0], grid[2], shape[0], image.shape[0])
    columns = _inside(grid[1], grid[3], shape[1], image.shape[1])
    resampled = np.full((*shape, *image.shape[2:]), _padding(image, pad_value), np.float32)
    if rows.start < rows.stop and columns.start < columns.stop:
        part = (
            *(
                grid[axis] + inside.start * grid[axis + 2]
                for axis, inside in ((0, rows), (1, columns))
            ),
            *grid[2:],
        )
        size = (rows.stop - rows.start, columns.stop - columns.start)
        planes = np.atleast_3d(image)
        for sample in range(planes.shape[2]):
            target = resampled if image.ndim == 2 else resampled[..., sample]
            target[rows, columns] = _interpolate(planes[..., sample], part, size)
    return resampled


def resample_mask(
    mask: NDArray[np.bool_], grid: Sequence[float], shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """The pixel of a mask (rows, columns) in which each stored pixel's centre lies; (*shape).

    Half-open, see the module; outside the mask nothing is set. Read-only use: it may be a view.
    """
    if is_shift(grid):
        return place(mask, grid, shape, 0.0)
    row, in_rows = _nearest(grid[0], grid[2], shape[0], mask.shape[0])
    column, in_columns = _nearest(grid[1], grid[3], shape[1], mask.shape[1])
    resampled = np.zeros(shape, bool)
    resampled[np.ix_(in_rows, in_columns)] = mask[np.ix_(row[in_rows], column[in_columns])]
    return resampled


def to_dtype(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in another type: rounded and clipped, never wrapped, where that holds integers.

    Interpolation overshoots at edges, so a range that holds the source may not hold the result.
    """
    if dtype.kind not in "iu":
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    # a float32 cannot hold the ends of 32-bit types
    whole = np.rint(values.astype(np.float64, copy=False))
    return np.clip(whole, limits.min, limits.max).astype(dtype)


def _overlap(first: int, size: int, length: int) -> tuple[slice, slice]:
    """Along one axis: what of the source is stored, and where."""
    start = min(max(first, 0), length)
    stop = max(min(first + size, length), start)
    at = min(max(start - first, 0), size)
    return slice(start, stop), slice(at, at + stop - start)


def _padding(image: NDArray[Any], pad_value: float) -> Any:
    """The value around an image, in its type."""
    if math.isnan(pad_value):
        return np.fmin.reduce(image, axis=None) if image.size else 0
    return to_dtype(np.float64(pad_value).reshape(1), image.dtype)[0]


def _nearest(
    first: float, step: float, size: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Along one axis: the source pixel of each stored pixel, and whether there is one."""
    pixel = np.floor(first + step * np.arange(size) + 0.5)
    return pixel.astype(np.int64), (pixel >= 0) & (pixel < length)


def _inside(first: float, step: float, size: int, length: int) -> slice:
    """Along one axis: the stored pixels whose centres lie in the source image."""
    places = np.flatnonzero(_nearest(first, step, size, length)[1])
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _interpolate(plane: NDArray[Any], grid: Sequence[float], shape: tuple[int, int]) -> Float32:
    """Pillow's resize of a plane that is continued beyond its border by what the kernel reaches."""
    from PIL import Image

    row, column, row_step, column_step = grid
    margins = [math.ceil((_BICUBIC_REACH + 1) * max(step, 1.0)) for step in (row_step, column_step)]
    padded = np.pad(plane.astype(np.float32), [(margin, margin) for margin in margins], "edge")
    # Pillow counts from the border of the first pixel, and its box ends at borders as well.
    top, left = (
        first + 0.5 - step / 2 + margin
        for first, step, margin in zip((row, column), (row_step, column_step), margins, strict=True)
    )
    box = (left, top, left + shape[1] * column_step, top + shape[0] * row_step)
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC, box))
