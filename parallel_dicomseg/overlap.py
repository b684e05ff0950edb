"""What two outlines of one structure that partly overlap mean: a policy, and always a report.

Rings of one structure on one slice are combined by parity, so a ring inside another one is a hole.
Two rings of which each has pixels of the other and pixels of its own are neither a hole nor
islands: parity leaves out what they share, which is rarely what was meant. So are two rings that
draw the same pixels. Which pixels a ring has is decided by the rule `center`.

See docs/geometry.md, "Partial overlap".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.rasterize import rasterize_contours
from parallel_dicomseg.records import Contours, Float64, Int64

#: What two rings that partly overlap give.
POLICIES = ("xor", "union", "refuse")

# Pixels beyond the image that still count, so that what a crop cuts off can be counted; rings
# farther out are cut there.
_REACH = 1024

Ring = tuple[int, int, NDArray[np.bool_]]
"""First row, first column, and the pixels from there on."""


@dataclass(frozen=True, slots=True)
class _Clusters:
    """Rings of one plane, structure and layer that partly overlap, directly or through others."""

    first: int
    """First ring of the plane, structure and layer."""
    end: int
    """One past the last ring."""
    members: tuple[tuple[int, ...], ...]
    """Ring numbers, ascending; each cluster has at least two."""


def resolve_overlaps(
    contours: Contours, shape: tuple[int, int], policy: str = "xor"
) -> tuple[Contours, list[tuple[int, int]]]:
    """Apply a policy to rings that partly overlap.

    Parameters
    ----------
    contours
        In pixels of the grid on which overlap is decided, sorted by (plane, structure, layer).
    shape
        Rows and columns of that grid.
    policy
        'xor' leaves the rings as they are: what two of them share is out. 'union' draws each
        cluster of partly overlapping rings as one ring round all of their pixels; rings inside it
        that overlap none of them remain holes. 'refuse' drops all rings of that plane, structure
        and layer.

    Returns
    -------
    Contours
        The same object where nothing overlaps partly.
    list of (plane, structure)
        Where something does, whatever the policy; sorted, each once.

    Raises
    ------
    ValueError
        If the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
    clusters = _find_clusters(contours, shape)
    places = [(contours.plane[one.first], contours.structure[one.first]) for one in clusters]
    affected = sorted({(int(plane), int(structure)) for plane, structure in places})
    if policy == "xor" or not clusters:
        return contours, affected
    dropped = np.zeros(len(contours), np.bool_)
    replaced: dict[int, Float64] = {}
    for one in clusters:
        if policy == "refuse":
            dropped[one.first : one.end] = True
            continue
        for members in one.members:
            dropped[list(members[1:])] = True
            replaced[members[0]] = _outline(_united([_pixels(contours, k, shape) for k in members]))
    return _with_rings(contours, ~dropped, replaced), affected


def _with_rings(
    contours: Contours, kept: NDArray[np.bool_], replaced: dict[int, Float64]
) -> Contours:
    """The rings that are kept, with other points where some are given."""
    numbers = np.flatnonzero(kept)
    points = [replaced.get(k, _points(contours, k)) for k in numbers.tolist()]
    return Contours(
        points_column_row=np.concatenate([np.empty((0, 2)), *points]),
        offsets=np.cumsum([0, *map(len, points)], dtype=np.int64),
        plane=contours.plane[numbers],
        structure=contours.structure[numbers],
        layer=None if contours.layer is None else contours.layer[numbers],
    )


def _points(contours: Contours, ring: int) -> Float64:
    return contours.points_column_row[contours.offsets[ring] : contours.offsets[ring + 1]]


# ---------------------------------------------------------------------------- who overlaps whom


def _find_clusters(contours: Contours, shape: tuple[int, int]) -> list[_Clusters]:
    """Clusters by plane, structure and layer, only where there are any."""
    group = _groups(contours)
    candidates = _pairs_of_boxes(contours, group)
    pixels = {k: _pixels(contours, k, shape) for k in {k for pair in candidates for k in pair}}
    partly: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for one, other in candidates:
        if _overlap_partly(pixels[one], pixels[other]):
            partly[int(group[one])].append((one, other))
    return [
        _Clusters(
            first=int(np.searchsorted(group, number)),
            end=int(np.searchsorted(group, number, side="right")),
            members=_connected(pairs),
        )
        for number, pairs in partly.items()
    ]


def _groups(contours: Contours) -> Int64:
    """(r,) number of the plane, structure and layer that each ring belongs to, ascending."""
    layer = np.zeros_like(contours.structure) if contours.layer is None else contours.layer
    keys = np.stack([contours.plane, contours.structure, layer])
    new = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    return np.concatenate([np.zeros(min(1, keys.shape[1]), np.int64), np.cumsum(new)])


def _pairs_of_boxes(contours: Contours, group: Int64) -> list[tuple[int, int]]:
    """Pairs of rings of one group whose bounding boxes overlap."""
    drawn = np.flatnonzero(np.diff(contours.offsets) > 2)
    lonely = np.bincount(group[drawn], minlength=1) < 2
    drawn = drawn[~lonely[group[drawn]]]
    if not len(drawn):
        return []
    lowest, highest = _boxes(contours, drawn)
    pairs: list[tuple[int, int]] = []
    for step in range(1, len(drawn)):
        same = group[drawn[step:]] == group[drawn[:-step]]
        if not same.any():
            break
        apart = (lowest[step:] > highest[:-step]) | (lowest[:-step] > highest[step:])
        near = np.flatnonzero(same & ~apart.any(axis=1))
        pairs += zip(drawn[near].tolist(), drawn[near + step].tolist(), strict=True)
    return pairs


def _boxes(contours: Contours, rings: Int64) -> tuple[Float64, Float64]:
    """(k, 2) lowest and highest column and row of rings that have points."""
    filled = np.flatnonzero(np.diff(contours.offsets) > 0)
    starts = contours.offsets[:-1][filled]
    places = np.searchsorted(filled, rings)
    lowest = np.minimum.reduceat(contours.points_column_row, starts, axis=0)
    highest = np.maximum.reduceat(contours.points_column_row, starts, axis=0)
    return lowest[places], highest[places]


def _connected(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Clusters of numbers that pairs connect, each ascending."""
    clusters: list[set[int]] = []
    for pair in pairs:
        touched = [one for one in clusters if not one.isdisjoint(pair)]
        clusters = [one for one in clusters if one.isdisjoint(pair)]
        clusters.append(set(pair).union(*touched))
    return tuple(tuple(sorted(one)) for one in sorted(clusters, key=min))


# ------------------------------------------------------------------------------------- pixels


def _pixels(contours: Contours, ring: int, shape: tuple[int, int]) -> Ring:
    """The pixels of one ring in its bounding box, on the image and within reach of it."""
    points = _points(contours, ring)
    size = np.array(shape)
    first = np.clip(np.floor(points.min(axis=0)[::-1]), -_REACH, size + _REACH).astype(np.int64)
    end = np.clip(np.ceil(points.max(axis=0)[::-1]) + 1, -_REACH, size + _REACH).astype(np.int64)
    rows, columns = np.maximum(end - first, 0).tolist()
    mask = rasterize_contours(points - first[::-1], [0, len(points)], (rows, columns))
    return int(first[0]), int(first[1]), mask.astype(np.bool_)


def _overlap_partly(one: Ring, other: Ring) -> bool:
    """Whether both have pixels in common and pixels of their own, or are the same."""
    shared = int((_window(one, other) & _window(other, one)).sum())
    sizes = int(one[2].sum()), int(other[2].sum())
    return shared > 0 and (shared < min(sizes) or sizes[0] == sizes[1])


def _window(ring: Ring, other: Ring) -> NDArray[np.bool_]:
    """The pixels of a ring where its box and the other one's overlap."""
    row, column = max(ring[0], other[0]), max(ring[1], other[1])
    end_row = min(ring[0] + ring[2].shape[0], other[0] + other[2].shape[0])
    end_column = min(ring[1] + ring[2].shape[1], other[1] + other[2].shape[1])
    rows = slice(row - ring[0], max(end_row, row) - ring[0])
    return ring[2][rows, column - ring[1] : max(end_column, column) - ring[1]]


def _united(rings: Sequence[Ring]) -> Ring:
    """All pixels of some rings."""
    row, column = min(ring[0] for ring in rings), min(ring[1] for ring in rings)
    end_row = max(ring[0] + ring[2].shape[0] for ring in rings)
    end_column = max(ring[1] + ring[2].shape[1] for ring in rings)
    mask = np.zeros((end_row - row, end_column - column), np.bool_)
    for first_row, first_column, pixels in rings:
        rows, columns = pixels.shape
        top, left = first_row - row, first_column - column
        mask[top : top + rows, left : left + columns] |= pixels
    return row, column, mask


def _outline(ring: Ring) -> Float64:
    """(p, 2) one ring, as (column, row), that has exactly these pixels.

    Round one run of pixels of a row after the other, along the half-way lines between pixels, and
    back the same way: what is passed twice changes no parity.
    """
    row, column, mask = ring
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, begins = np.nonzero(edges == 1)
    top, bottom = rows + row - 0.5, rows + row + 0.5
    left, right = begins + column - 0.5, np.nonzero(edges == -1)[1] + column - 0.5
    corners = np.stack(
        [left, top, right, top, right, bottom, left, bottom, left, top], axis=1
    ).reshape(-1, 2)
    return np.concatenate([corners, corners[::5][::-1]])
