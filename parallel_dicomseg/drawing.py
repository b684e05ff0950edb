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
    WHOLE_IMAGE,
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
# The grid of an image that is stored as it is.


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
    contours, elliptic, overlapping = _without_overlaps(contours, elliptic, task)
    moved = on_grid(contours, np.array(slices.grid))
    rasterize_batch(moved, masks, rule=layout.rule, clear=True)
    _clear_padding(contours, slices, masks)
    whole = _uncropped(contours, slices, masks, layout.rule)
    places = []
    for _, _, read in parts:
        for bitmap in read.bitmaps:
            places.append((bitmap.plane, bitmap.structure))
            _draw_bitmap(bitmap, slices, masks, whole)
    structures = len(layout.structures)
    return Drawing(
        contours=moved,
        elliptic=elliptic,
        bitmaps=np.array(places, np.int64).reshape(-1, 2),
        digest=_digests(parts, len(slices), structures),
        cropped=_cropped(whole, slices, masks.shape, structures),
        looked_at=_looked_at(parts, task, overlapping),
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
    as_they_are = np.tile(WHOLE_IMAGE, (len(slices), 1))
    low, high = np.full((len(slices), 2), np.inf), np.full((len(slices), 2), -np.inf)
    last = np.stack([slices.rows, slices.columns], axis=1) - 1.0
    for first in range(0, len(slices), _SLICES_PER_LOOK):
        rows = slice(first, min(first + _SLICES_PER_LOOK, len(slices)))
        own = slice(*np.searchsorted(cohort.annotations.slice, (rows.start, rows.stop)).tolist())
        refs = slice_refs(slices, rows, as_they_are)
        annotations = annotation_refs(cohort.annotations, own, first)
        for _, _, read in read_annotations(cohort.root, refs, annotations, contour_origin):
            for plane, from_there, to_there in _extents(read):
                at = first + plane
                # what sticks out of the image is not stored
                low[at] = np.minimum(low[at], np.clip(from_there, 0.0, last[at]))
                high[at] = np.maximum(high[at], np.clip(to_there, 0.0, last[at]))
    _, volume = np.unique(slices.volume, return_inverse=True)
    lowest = np.full((volume.max() + 1, 2), np.inf)
    highest = -lowest
    np.minimum.at(lowest, volume, low)
    np.maximum.at(highest, volume, high)
    drawn = np.isfinite(lowest)
    middle = np.full_like(lowest, np.nan)
    middle[drawn] = (lowest[drawn] + highest[drawn]) / 2
    return middle[volume]


def _extents(read: Drawn) -> Iterator[tuple[int, Float64, Float64]]:
    """The slice, and lowest and highest (row, column), of everything that was read."""
    contours = read.contours
    for k, plane in enumerate(contours.plane.tolist()):
        ring = contours.points_column_row[contours.offsets[k] : contours.offsets[k + 1], ::-1]
        if len(ring):
            yield plane, ring.min(axis=0), ring.max(axis=0)
    for bitmap in read.bitmaps:
        if bitmap.mask.any():
            pixels = np.argwhere(bitmap.mask).astype(np.float64)
            yield bitmap.plane, pixels.min(axis=0), pixels.max(axis=0)


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
    contours: Contours, elliptic: NDArray[np.bool_], task: ChunkTask
) -> tuple[Contours, NDArray[np.bool_], list[tuple[int, int]]]:
    """The policy for rings that partly overlap; united rings are no ellipses any more.

    Pillow's rules unite all rings: there is nothing to decide.
    """
    if task.layout.rule != "center":
        return contours, elliptic, []
    source_shape = (max(task.slices.rows), max(task.slices.columns))
    resolved, overlapping = resolve_overlaps(contours, source_shape, task.layout.partial_overlap)
    if len(resolved) != len(contours):
        elliptic = np.zeros(len(resolved), bool)
    return resolved, elliptic, overlapping


def on_grid(contours: Contours, grid: Float64) -> Contours:
    """Rings in pixels of their source images, brought to the stored grids (n, 4)."""
    if not len(contours) or (grid == WHOLE_IMAGE).all():
        return contours
    row, column, row_step, column_step = np.repeat(
        grid[contours.plane], np.diff(contours.offsets), axis=0
    ).T
    points = contours.points_column_row
    moved = np.stack([(points[:, 0] - column) / column_step, (points[:, 1] - row) / row_step], 1)
    return replace(contours, points_column_row=moved)


# --- source image and stored image ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """The pixels of the stored grid whose centres lie in one source image, on it or not."""

    grid: tuple[float, float, float, float]
    shape: tuple[int, int]
    kept: tuple[slice, slice]
    """Those of them that are on the stored image."""
    stored: tuple[slice, slice]
    """Where the kept ones are there; what else it has is padding."""

    @property
    def is_cropped(self) -> bool:
        """Whether any of them is not kept."""
        return any(
            kept.stop - kept.start < size for kept, size in zip(self.kept, self.shape, strict=True)
        )


def _place(slices: SliceRefs, plane: int, shape: tuple[int, ...]) -> _Place:
    row, column, row_step, column_step = slices.grid[plane]
    first_row, rows, kept_rows, stored_rows = _along(row, row_step, slices.rows[plane], shape[0])
    first_column, columns, kept_columns, stored_columns = _along(
        column, column_step, slices.columns[plane], shape[1]
    )
    return _Place(
        grid=(
            row + first_row * row_step,
            column + first_column * column_step,
            row_step,
            column_step,
        ),
        shape=(rows, columns),
        kept=(kept_rows, kept_columns),
        stored=(stored_rows, stored_columns),
    )


def _along(origin: float, step: float, source: int, stored: int) -> tuple[int, int, slice, slice]:
    """Along one axis: the first stored pixel in the source, how many there are, and a _Place's."""
    first, stop = math.ceil((-0.5 - origin) / step), math.ceil((source - 0.5 - origin) / step)
    low = min(max(first, 0), stored)
    high = max(min(stop, stored), low)
    return first, stop - first, slice(low - first, high - first), slice(low, high)


def _drawn_and_moved(contours: Contours, slices: SliceRefs, shape: tuple[int, ...]) -> list[int]:
    """The slices with rings whose stored image is not the source image as it is."""
    sizes = zip(slices.rows, slices.columns, strict=True)
    moved = [
        grid != WHOLE_IMAGE or size != shape for grid, size in zip(slices.grid, sizes, strict=True)
    ]
    return [plane for plane in np.unique(contours.plane).tolist() if moved[plane]]


def _clear_padding(contours: Contours, slices: SliceRefs, masks: NDArray[Any]) -> None:
    """Take out what rings draw beyond their source image: no pixel of it is there."""
    for plane in _drawn_and_moved(contours, slices, masks.shape[1:]):
        mask = masks[plane]
        rows, columns = _place(slices, plane, mask.shape).stored
        mask[: rows.start] = mask[rows.stop :] = 0
        mask[:, : columns.start] = mask[:, columns.stop :] = 0


def _uncropped(
    contours: Contours, slices: SliceRefs, masks: NDArray[Any], rule: str
) -> dict[int, NDArray[Any]]:
    """By slice, where the stored image cuts something off: the mask of its whole source image.

    `contours` are in pixels of the source images.
    """
    whole = {}
    for plane in _drawn_and_moved(contours, slices, masks.shape[1:]):
        place = _place(slices, plane, masks.shape[1:])
        if place.is_cropped:
            rings = contours.take(contours.plane == plane)
            rings = replace(rings, plane=np.zeros_like(rings.plane))
            mask = np.zeros((1, *place.shape), masks.dtype)
            rasterize_batch(on_grid(rings, np.array([place.grid])), mask, rule=rule)
            whole[plane] = mask[0]
    return whole


def _draw_bitmap(
    bitmap: Bitmap, slices: SliceRefs, masks: NDArray[Any], whole: dict[int, NDArray[Any]]
) -> None:
    """Add one bitmap to the mask of its slice, and to that of the whole source image."""
    mask = masks[bitmap.plane]
    bit = mask.dtype.type(1 << bitmap.structure)
    place = _place(slices, bitmap.plane, mask.shape)
    drawn = resample_mask(bitmap.mask, place.grid, place.shape)
    stored = mask[place.stored]
    np.bitwise_or(stored, bit, out=stored, where=drawn[place.kept])
    if place.is_cropped:
        full = whole.setdefault(bitmap.plane, np.zeros(place.shape, mask.dtype))
        np.bitwise_or(full, bit, out=full, where=drawn)


def _cropped(
    whole: Mapping[int, NDArray[Any]], slices: SliceRefs, shape: tuple[int, ...], structures: int
) -> Int64:
    """(n, s) pixels of the masks of whole source images that the stored images (shape) lack."""
    cropped = np.zeros((len(slices), structures), np.int64)
    for plane, mask in whole.items():
        mask[_place(slices, plane, shape[1:]).kept] = 0
        for structure in range(structures):
            cropped[plane, structure] = np.count_nonzero(mask & mask.dtype.type(1 << structure))
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
    parts: list[tuple[str, AnnotationRefs, Drawn]],
    task: ChunkTask,
    overlapping: Sequence[tuple[int, int]],
) -> NDArray[np.bool_]:
    """(n, s) where a structure was looked for and nothing of it is lost."""
    structures = np.arange(len(task.layout.structures), dtype=np.uint64)
    bits = np.array(task.slices.annotated, np.uint64)[:, None] >> structures
    looked_at = (bits & np.uint64(1)).astype(bool)
    for _, refs, read in parts:
        for place, reason, _ in read.problems:
            if reason not in HARMLESS_REASONS:
                looked_at[refs.plane[place], refs.structure[place]] = False
    if task.layout.partial_overlap == "refuse":
        for plane, structure in overlapping:
            looked_at[plane, structure] = False
    return looked_at


def _problems(refs: AnnotationRefs, read: Drawn) -> Iterator[Problem]:
    for place, reason, detail in read.problems:
        yield Problem(refs.path[place], reason, detail)


#: What each policy makes of rings that partly overlap, and what that is to the file.
_OVERLAPS = {
    "xor": (Reason.PARTIAL_OVERLAP, "what two of them cover is left out"),
    "union": (Reason.PARTIAL_OVERLAP, "they were united"),
    "refuse": (Reason.BAD_CONTOUR, "nothing was drawn"),
}


def _overlap_problems(task: ChunkTask, overlapping: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    """One line for each structure and slice on which rings partly overlap."""
    policy = task.layout.partial_overlap
    reason, done = _OVERLAPS[policy]
    for plane, structure in overlapping:
        name, frame = task.layout.structures[structure], task.slices.frame[plane] + 1
        detail = f"frame {frame}: rings of {name!r} partly overlap; {done} ({policy})"
        yield Problem(task.slices.path[plane], reason, detail)
