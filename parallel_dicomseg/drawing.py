"""From the annotations of a task to its masks on the stored grid: read, move, rasterize, count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.overlap import resolve_overlaps
from parallel_dicomseg.plan import annotation_refs, slice_refs
from parallel_dicomseg.rasterize import rasterize_batch
from parallel_dicomseg.records import (
    HARMLESS_REASONS,
    AnnotationRefs,
    Bitmap,
    ChunkTask,
    Cohort,
    Contours,
    Drawn,
    Float64,
    Int64,
    Problem,
    Reason,
    SliceRefs,
)
from parallel_dicomseg.resample import resample_mask
from parallel_dicomseg.sources.base import Reader
from parallel_dicomseg.sources.registry import readers

# Sources of organs whose outlines are nearly ellipses: elsewhere that check has no meaning.
_ELLIPTIC = frozenset({"sunnybrook"})
# Slices whose annotations are read at a time to find out where the structures are.
_SLICES_PER_LOOK = 256


@dataclass(frozen=True, slots=True)
class Drawing:
    """What was drawn on the n slices of a task; s structures."""

    contours: Contours
    """On the stored grid."""
    elliptic: NDArray[np.bool_]
    """(r,) whether a ring should be nearly an ellipse."""
    bitmaps: Int64
    """(k, 2) slice and structure of what came as pixels."""
    digest: NDArray[np.uint64]
    """(n, s) of what was read; 0 without an annotation."""
    cropped: Int64
    """(n, s) pixels of the mask that lie in the source image but off the stored one."""
    looked_at: NDArray[np.bool_]
    """(n, s) whether the structure was looked for on the slice, and what was found could be
    read."""
    problems: tuple[Problem, ...]


def draw_masks(task: ChunkTask, masks: NDArray[Any]) -> Drawing:
    """Read what is drawn on the slices of a task and fill the masks (n, rows, columns).

    An annotation that cannot be read is a problem of the result; nothing is drawn for it.
    """
    layout, slices = task.layout, task.slices
    parts = read_annotations(task.root, slices, task.annotations, layout.contour_origin)
    contours, elliptic = _joined([(kind, read.contours) for kind, _, read in parts])
    shape = (layout.rows, layout.columns)
    source_shape = (max(slices.rows), max(slices.columns))
    contours, elliptic, overlapping = _without_overlaps(
        contours, elliptic, source_shape, layout.partial_overlap
    )
    grid = np.array(slices.grid)
    moved = on_grid(contours, grid)
    rasterize_batch(moved, masks, rule=layout.rule, clear=True)
    structures = len(layout.structures)
    cropped = _cropped_by_rings(contours, slices, shape, structures, layout.rule)
    places = []
    for _, _, read in parts:
        for bitmap in read.bitmaps:
            places.append((bitmap.plane, bitmap.structure))
            cropped[places[-1]] += _draw_bitmap(bitmap, slices, masks)
    return Drawing(
        contours=moved,
        elliptic=elliptic,
        bitmaps=np.array(places, np.int64).reshape(-1, 2),
        digest=_digests(parts, len(slices), structures),
        cropped=cropped,
        looked_at=_looked_at(parts, slices, structures),
        problems=(
            *(problem for _, refs, read in parts for problem in _problems(refs, read)),
            *_overlap_problems(task, overlapping),
        ),
    )


def read_annotations(
    root: str, slices: SliceRefs, annotations: AnnotationRefs, contour_origin: float
) -> list[tuple[str, AnnotationRefs, Drawn]]:
    """What each source reads of its annotations, in pixels of the source images."""
    by_kind: dict[str, list[int]] = {}
    for place, kind in enumerate(annotations.kind):
        by_kind.setdefault(kind, []).append(place)
    known: Mapping[str, Reader] = readers()
    parts = []
    for kind, places in by_kind.items():
        refs = annotations if len(by_kind) == 1 else annotations.take(places)
        drawn = known[kind].read(root, slices, refs, contour_origin=contour_origin)
        parts.append((kind, refs, drawn))
    return parts


def structure_centers(cohort: Cohort, contour_origin: float) -> Float64:
    """(n, 2) row and column of the middle of what is drawn on each slice's volume.

    In pixels of the source image, the middle of the bounding box of all structures on all slices
    of the volume, so that a volume stays one; NaN where nothing is drawn.
    """
    slices = cohort.slices
    as_they_are = np.tile((0.0, 0.0, 1.0, 1.0), (len(slices), 1))
    low, high = np.full((len(slices), 2), np.inf), np.full((len(slices), 2), -np.inf)
    starts = range(0, len(slices), _SLICES_PER_LOOK)
    for first in starts:
        rows = slice(first, min(first + _SLICES_PER_LOOK, len(slices)))
        drawn = slice(*np.searchsorted(cohort.annotations.slice, (rows.start, rows.stop)).tolist())
        refs = slice_refs(slices, rows, as_they_are)
        annotations = annotation_refs(cohort.annotations, drawn, first)
        for _, _, read in read_annotations(cohort.root, refs, annotations, contour_origin):
            for plane, points_row_column in _points(read):
                at = first + plane
                low[at] = np.minimum(low[at], points_row_column.min(axis=0))
                high[at] = np.maximum(high[at], points_row_column.max(axis=0))
    _, volume = np.unique(slices.volume, return_inverse=True)
    lowest, highest = (
        np.full((volume.max() + 1, 2), np.inf),
        np.full((volume.max() + 1, 2), -np.inf),
    )
    np.minimum.at(lowest, volume, low)
    np.maximum.at(highest, volume, high)
    middle = np.where(np.isfinite(lowest), lowest + highest, np.nan) / 2
    return middle[volume]


def _points(read: Drawn) -> Iterator[tuple[int, Float64]]:
    """The slice, and points (p, 2) as (row, column), of everything that was read."""
    contours = read.contours
    for k, plane in enumerate(contours.plane.tolist()):
        ring = contours.points_column_row[contours.offsets[k] : contours.offsets[k + 1]]
        if len(ring):
            yield plane, ring[:, ::-1]
    for bitmap in read.bitmaps:
        if bitmap.mask.any():
            yield bitmap.plane, np.argwhere(bitmap.mask).astype(np.float64)


def _joined(parts: list[tuple[str, Contours]]) -> tuple[Contours, NDArray[np.bool_]]:
    """The rings of all sources in the order of the rasterizer, and which should be ellipses."""
    if not parts:
        return Contours.empty(), np.empty(0, bool)
    elliptic = np.concatenate([np.full(len(rings), kind in _ELLIPTIC) for kind, rings in parts])
    if len(parts) == 1:
        return parts[0][1], elliptic
    every = [rings for _, rings in parts]
    starts = np.cumsum([0, *(len(rings.points_column_row) for rings in every)])
    offsets = [rings.offsets[:-1] + start for rings, start in zip(every, starts[:-1], strict=True)]
    layer = np.concatenate(
        [np.zeros(len(rings), np.int32) if rings.layer is None else rings.layer for rings in every]
    )
    together = Contours(
        points_column_row=np.concatenate([rings.points_column_row for rings in every]),
        offsets=np.concatenate([*offsets, starts[-1:]]),
        plane=np.concatenate([rings.plane for rings in every]),
        structure=np.concatenate([rings.structure for rings in every]),
        layer=layer,
    )
    order = np.lexsort((layer, together.structure, together.plane))
    return together.take(order), elliptic[order]


def _without_overlaps(
    contours: Contours, elliptic: NDArray[np.bool_], shape: tuple[int, int], policy: str
) -> tuple[Contours, NDArray[np.bool_], list[tuple[int, int]]]:
    """The policy for rings that partly overlap; united rings are no ellipses any more."""
    resolved, overlapping = resolve_overlaps(contours, shape, policy)
    if len(resolved) != len(contours):
        elliptic = np.zeros(len(resolved), bool)
    return resolved, elliptic, overlapping


def on_grid(contours: Contours, grid: Float64) -> Contours:
    """Rings in pixels of their source images, brought to the stored grids (n, 4)."""
    if not len(contours) or (grid == (0.0, 0.0, 1.0, 1.0)).all():
        return contours
    row, column, row_step, column_step = np.repeat(
        grid[contours.plane], np.diff(contours.offsets), axis=0
    ).T
    points = contours.points_column_row
    moved = np.stack([(points[:, 0] - column) / column_step, (points[:, 1] - row) / row_step], 1)
    return replace(contours, points_column_row=moved)


# --- what the stored image cuts off ---------------------------------------------------------------

Margins = tuple[int, int, int, int]
"""Stored rows above and below, and columns left and right, of the stored image that the source
image would still fill."""


def _margins(slices: SliceRefs, plane: int, shape: tuple[int, int]) -> Margins:
    row, column, row_step, column_step = slices.grid[plane]
    top, bottom = _overhang(row, row_step, slices.rows[plane], shape[0])
    left, right = _overhang(column, column_step, slices.columns[plane], shape[1])
    return top, bottom, left, right


def _overhang(origin: float, step: float, source: int, stored: int) -> tuple[int, int]:
    """Stored pixels before the first and after the last whose centres lie in the source image."""
    before = math.floor((origin + 0.5) / step)
    after = math.ceil((source - 0.5 - origin) / step) - stored
    return max(before, 0), max(after, 0)


def _widened(
    slices: SliceRefs, plane: int, shape: tuple[int, int]
) -> tuple[tuple[float, float, float, float], tuple[int, int], tuple[slice, slice]]:
    """The grid and shape with the margins added, and where the stored image lies in it."""
    row, column, row_step, column_step = slices.grid[plane]
    top, bottom, left, right = _margins(slices, plane, shape)
    grid = (row - top * row_step, column - left * column_step, row_step, column_step)
    wide = (shape[0] + top + bottom, shape[1] + left + right)
    return grid, wide, (slice(top, top + shape[0]), slice(left, left + shape[1]))


def _draw_bitmap(bitmap: Bitmap, slices: SliceRefs, masks: NDArray[Any]) -> int:
    """Add one bitmap to the masks; returns its pixels that the stored image cuts off."""
    target = masks[bitmap.plane]
    bit = target.dtype.type(1 << bitmap.structure)
    grid, wide, inside = _widened(slices, bitmap.plane, target.shape)
    drawn = resample_mask(bitmap.mask, grid, wide)
    kept = drawn[inside]
    target[kept] |= bit
    return int(np.count_nonzero(drawn) - np.count_nonzero(kept))


def _cropped_by_rings(
    contours: Contours, slices: SliceRefs, shape: tuple[int, int], structures: int, rule: str
) -> Int64:
    """(n, s) pixels of the rings' masks that the stored images cut off; `contours` are in pixels
    of the source images.
    """
    cropped = np.zeros((len(slices), structures), np.int64)
    for plane in np.unique(contours.plane).tolist():
        if not any(_margins(slices, plane, shape)):
            continue
        grid, wide, inside = _widened(slices, plane, shape)
        rings = on_grid(contours.take(contours.plane == plane), np.tile(grid, (plane + 1, 1)))
        mask = np.zeros((1, *wide), np.uint64)
        rasterize_batch(replace(rings, plane=np.zeros(len(rings), np.int64)), mask, rule=rule)
        mask[0][inside] = 0
        for structure in np.unique(rings.structure).tolist():
            bit = np.uint64(1 << structure)
            cropped[plane, structure] = np.count_nonzero(mask & bit)
    return cropped


# --- what was read --------------------------------------------------------------------------------


def _digests(
    parts: list[tuple[str, AnnotationRefs, Drawn]], slices: int, structures: int
) -> NDArray[np.uint64]:
    """(n, s) digest of all that was read for each structure of each slice; 0: nothing."""
    digest = np.zeros((slices, structures), np.uint64)
    for _, refs, read in parts:
        place = (np.array(refs.plane), np.array(refs.structure))
        np.add.at(digest, place, read.digest)
    return digest


def _looked_at(
    parts: list[tuple[str, AnnotationRefs, Drawn]], slices: SliceRefs, structures: int
) -> NDArray[np.bool_]:
    bits = np.array(slices.annotated, np.uint64)[:, None] >> np.arange(structures, dtype=np.uint64)
    looked_at = (bits & np.uint64(1)).astype(bool)
    for _, refs, read in parts:
        for place, reason, _ in read.problems:
            if reason not in HARMLESS_REASONS:
                looked_at[refs.plane[place], refs.structure[place]] = False
    return looked_at


def _problems(refs: AnnotationRefs, read: Drawn) -> Iterator[Problem]:
    for place, reason, detail in read.problems:
        yield Problem(refs.path[place], reason, detail)


def _overlap_problems(task: ChunkTask, overlapping: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """One line for each structure and slice on which rings partly overlap."""
    policy = task.layout.partial_overlap
    done = {
        "xor": "what two of them cover is left out",
        "union": "they were united",
        "refuse": "nothing was drawn",
    }
    for plane, structure in overlapping:
        name, frame = task.layout.structures[structure], task.slices.frame[plane]
        detail = f"frame {frame}: rings of {name} partly overlap; {done[policy]} ({policy})"
        yield Problem(task.slices.path[plane], Reason.PARTIAL_OVERLAP, detail)
