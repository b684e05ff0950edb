"""The grid that all images of an output share: where each stored pixel lies in its source image.

A grid is four numbers per slice: row and column, in pixels of the source image, of the centre of
the first stored pixel, then the steps between stored rows and between stored columns. Steps of 1
and whole origins move pixels without touching their values. Pure: numbers in, numbers out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import (
    ConvertOptions,
    Float64,
    Int64,
    Problem,
    Reason,
    SliceTable,
)

FITS = ("center", "structure")
MAX_PIXELS = 1 << 31
# Spacings that agree to this fraction are the same: headers round them.
_SAME_STEP = 1e-5
# More rows than any image has, and still an integer.
_ENDLESS = 2.0**40


@dataclass(frozen=True, slots=True)
class Grids:
    """Where the images of a cohort come to lie."""

    rows: int
    columns: int
    grid: Float64
    """(n, 4), see the module; NaN where a slice has no place."""
    resampled: bool
    """Whether any step differs from 1."""
    notes: tuple[str, ...]
    """What was done to the images, in words."""
    problems: tuple[Problem, ...]
    """Slices without a place."""


def make_grids(
    slices: SliceTable, options: ConvertOptions, centers_row_column: Float64 | None = None
) -> Grids:
    """Choose the size of the output and the place of every image in it.

    Parameters
    ----------
    slices
        The n images.
    options
        `spacing`, `size` and `fit` count.
    centers_row_column
        (n, 2) what each stored image is centred on, in pixels of its source; NaN, or None: the
        image's centre.

    Raises
    ------
    ConfigurationError
        A spacing or a size that is no number above 0, one number too many, or an output of more
        than 2 Gi pixels a slice.
    """
    spacing, size = _per_axis("spacing", options.spacing), _per_axis("size", options.size)
    if options.fit not in FITS:
        raise ConfigurationError(f"fit is {options.fit!r}, it can be {' or '.join(FITS)}")
    source = np.stack([slices.rows, slices.columns], axis=1).astype(np.int64)
    step = _steps(slices.pixel_spacing, spacing)
    known: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(step), axis=1)
    with np.errstate(over="ignore"):
        fits = known if size else known & ((source / step).prod(axis=1) <= MAX_PIXELS)
    # where none fits it is not the images that are wrong
    placed = fits if fits.any() else known
    shape = _output_size(source[placed], step[placed], size)
    if math.prod(shape) > MAX_PIXELS:
        raise ConfigurationError(
            f"a slice of {shape[0]} x {shape[1]} pixels is larger than {MAX_PIXELS} pixels"
        )
    center = (source - 1) / 2.0
    if centers_row_column is not None:
        center = np.where(np.isfinite(centers_row_column), centers_row_column, center)
    origin = center - (np.array(shape) - 1) / 2.0 * step
    origin = np.where(step == 1, np.ceil(origin), origin) + 0.0  # no negative zero
    return Grids(
        rows=shape[0],
        columns=shape[1],
        grid=np.concatenate([origin, step], axis=1),
        resampled=bool((step[placed] != 1).any()),
        notes=_notes(source[placed], step[placed], origin[placed], shape),
        problems=_left_out(slices, known, placed),
    )


def _per_axis(name: str, values: Sequence[float]) -> tuple[float, float] | None:
    """The two numbers of an option; one stands for both axes, none for no wish."""
    if not values:
        return None
    whole = name == "size"
    if len(values) > 2 or not all(
        math.isfinite(value) and value > 0 and not (whole and value % 1) for value in values
    ):
        given = " ".join(f"{value:g}" for value in values)
        numbers = "whole numbers" if whole else "numbers"
        raise ConfigurationError(f"{name} is {given}: it takes one or two {numbers} above 0")
    return float(values[0]), float(values[-1])


def _steps(pixel_spacing: Float64, spacing: tuple[float, float] | None) -> Float64:
    """(n, 2) source pixels between two stored ones; NaN where the image's spacing is unknown."""
    if spacing is None:
        return np.ones_like(pixel_spacing)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = np.array(spacing) / np.where(pixel_spacing > 0, pixel_spacing, np.nan)
    return np.where(np.abs(step - 1) < _SAME_STEP, 1.0, step)


def _output_size(source: Int64, step: Float64, size: tuple[float, float] | None) -> tuple[int, int]:
    """Rows and columns: as asked for, or enough for the largest image."""
    if size is not None:
        return int(size[0]), int(size[1])
    if not len(source):
        return 1, 1
    with np.errstate(over="ignore"):
        most = np.ceil(source / step - _SAME_STEP).max(axis=0).clip(max=_ENDLESS)
    return int(most[0]), int(most[1])


def _notes(
    source: Int64, step: Float64, origin: Float64, shape: tuple[int, int]
) -> tuple[str, ...]:
    """What happened to how many of the images."""
    n = len(source)
    if not n:
        return ()
    stored = f"{shape[0]} x {shape[1]}"
    extent = np.ceil(source / step - _SAME_STEP)
    smaller = int((extent < shape).any(axis=1).sum())
    cropped = int(is_cropped(np.concatenate([origin, step], axis=1), source, shape).sum())
    resampled = int((step != 1).any(axis=1).sum())
    sizes = Counter(map(tuple, source.tolist()))
    notes = []
    if resampled:
        notes.append(f"{resampled} of {n} images were resampled to the spacing asked for")
    if smaller:
        common = ", ".join(f"{r} x {c}" for (r, c), _ in sizes.most_common(3))
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        notes.append(f"{smaller} of {n} images were padded to {stored} (sizes {common}{more})")
    if cropped:
        notes.append(f"{cropped} of {n} images were cropped to {stored}")
    return tuple(notes)


def is_cropped(grid: Float64, source: Int64, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(n,) whether a pixel's centre of the source (n, 2 sizes) lies off the stored image."""
    origin, step = grid[:, :2], grid[:, 2:]
    first, last = origin - step / 2, origin + (np.array(shape) - 0.5) * step
    cropped: NDArray[np.bool_] = np.logical_or.reduce((first > 0) | (last < source - 1), axis=1)
    return cropped


def _left_out(
    slices: SliceTable, known: NDArray[np.bool_], placed: NDArray[np.bool_]
) -> tuple[Problem, ...]:
    """Slices without a spacing, and those that would be too large at the one asked for."""
    missing = "(0028,0030) Pixel Spacing is missing or not above 0, and a spacing is asked for"
    problems = []
    for i in np.flatnonzero(~placed).tolist():
        reason, detail = Reason.MISSING_TAG, missing
        if known[i]:
            row_mm, column_mm = slices.pixel_spacing[i].tolist()
            reason = Reason.UNSUPPORTED_PIXELS
            detail = (
                f"{slices.rows[i]} x {slices.columns[i]} pixels with (0028,0030) Pixel Spacing "
                f"{row_mm:g} x {column_mm:g} are more than {MAX_PIXELS} at the spacing asked for"
            )
        problems.append(Problem(os.fsdecode(slices.path[i]), reason, detail))
    return tuple(problems)
