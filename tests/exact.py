"""The rasterizer's slow twin: the rule `center` in rational arithmetic, as one would say it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]


def crossings(rings: Sequence[Sequence[Point]], row: int) -> list[Fraction]:
    """Exact columns where a row of pixel centres meets the closed rings' edges.

    A row meets an edge where ``low_y <= row < high_y``.
    """
    found = []
    for ring in rings:
        for start, end in zip(ring, [*ring[1:], *ring[:1]], strict=True):
            (low_x, low_y), (high_x, high_y) = sorted(
                [tuple(map(Fraction, start)), tuple(map(Fraction, end))],
                key=lambda point: point[1],
            )
            if low_y <= row < high_y:
                found.append(low_x + (row - low_y) * (high_x - low_x) / (high_y - low_y))
    return found


def mask(rings: Sequence[Sequence[Point]], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """A pixel is in where an odd number of crossings lies at its centre or left of it."""
    rows, columns = shape
    result = np.zeros(shape, np.uint8)
    for row in range(rows):
        found = crossings(rings, row)
        for column in range(columns):
            result[row, column] = sum(x <= column for x in found) % 2
    return result
