"""From a cohort and options to a layout and tasks: integers only, no file is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.chunks import CODECS
from parallel_dicomseg.deidentify import DATES
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.geometry import planes_of
from parallel_dicomseg.grid import make_grids
from parallel_dicomseg.overlap import POLICIES
from parallel_dicomseg.rasterize import RULES
from parallel_dicomseg.records import (
    AnnotationRefs,
    AnnotationTable,
    Bytes,
    ChunkTask,
    Cohort,
    ConvertOptions,
    Float64,
    Layout,
    Limits,
    Problem,
    SliceRefs,
    SliceTable,
)

CONTOUR_ORIGINS = (0.0, 0.5, 1.0)
MAX_STRUCTURES = 64
MAX_SLICES_PER_TASK = 64
DEFAULT_WORKER_BYTES = 256 << 20
# Tasks per worker that a small cohort is cut into, so that none is idle at the end.
_TASKS_PER_WORKER = 4
# Images of one task: with more of them a task outgrows the caches, which made it three times as
# slow at 512 x 512 pixels (benchmarks/rtstruct.py).
_TASK_BYTES = 8 << 20
# A worker holds a slice as stored, converted, shuffled and encoded at the same time.
_IMAGE_COPIES = 4
_MASK_COPIES = 2
# Results wait in the window, two or three per worker, while the next task is made.
_SLICES_HELD = 3
# Columns of the SliceTable that a worker needs as they are.
_COPIED_COLUMNS = (
    "frame",
    "file_size",
    "pixel_offset",
    "bits_stored",
    "rescale_slope",
    "rescale_intercept",
    "rows",
    "columns",
    "annotated",
)
_INTEGER_IMAGES = ("|u1", "<i2", "<u2", "<i4", "<u4")
COLORS = ("luminance", "samples")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, and in which portions."""

    cohort: Cohort
    """Only what fits the layout."""
    layout: Layout
    grid: Float64
    """(n, 4) where each slice's stored pixels lie in its source image, see grid.py."""
    slices_per_task: int
    window: int
    """Tasks that may be under way at the same time."""
    worker_bytes: int
    """What one worker may use for its slices and results."""
    problems: tuple[Problem, ...]
    """What the layout leaves out."""
    notes: tuple[str, ...]
    """What was done to the images, in words."""
    limits: Limits = field(default_factory=Limits)
    """Of the input."""

    @property
    def task_count(self) -> int:
        """How many tasks there are."""
        return -(-self.layout.slices // self.slices_per_task)


def make_plan(
    cohort: Cohort,
    options: ConvertOptions,
    workers: int,
    centers_row_column: Float64 | None = None,
) -> Plan:
    """Decide the layout of the output and the size of the tasks.

    Parameters
    ----------
    cohort, options, workers
        What to convert, how, and by how many.
    centers_row_column
        (n, 2) what each slice is centred on, in pixels of its source; None: its own centre.

    Raises
    ------
    ConfigurationError
        An option has no meaning, or one slice does not fit the memory limit.
    LayoutError
        There is nothing to convert.
    """
    _check_options(options)
    if len(cohort.structures) > MAX_STRUCTURES:
        raise ConfigurationError(
            f"{len(cohort.structures)} structures do not fit the {MAX_STRUCTURES} bits of a mask; "
            f"choose some with --structures"
        )
    grids = make_grids(cohort.slices, options, centers_row_column)
    placed: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(grids.grid), axis=1)
    cohort = cohort if placed.all() else _only(cohort, placed)
    if not len(cohort.slices):
        raise LayoutError(
            f"{cohort.root}: no image with an outline was found, there is nothing to convert"
        )
    colored = bool((cohort.slices.samples_per_pixel > 1).any())
    layout = Layout(
        slices=len(cohort.slices),
        rows=grids.rows,
        columns=grids.columns,
        image_dtype=image_dtype(cohort.slices),
        mask_dtype=mask_dtype(len(cohort.structures)),
        structures=cohort.structures,
        nested=cohort.nested,
        rule=options.rule,
        contour_origin=options.contour_origin,
        include_unannotated=cohort.include_unannotated,
        codec=options.codec,
        keep_identity=options.keep_identity,
        source=cohort.source,
        checks=options.checks,
        samples=3 if colored and options.color == "samples" else 1,
        resampled=grids.resampled,
        partial_overlap=options.partial_overlap,
        invert_monochrome1=options.invert_monochrome1,
        pad_value=_pad_value(options.pad_value),
    )
    each = _slice_bytes(layout, _source_bytes(cohort.slices))
    worker_bytes = options.memory_limit or max(DEFAULT_WORKER_BYTES, _SLICES_HELD * each)
    return Plan(
        cohort=cohort,
        layout=layout,
        grid=grids.grid[placed],
        slices_per_task=_slices_per_task(layout, each, worker_bytes, options, workers),
        window=2 * workers + 1,
        worker_bytes=worker_bytes,
        problems=grids.problems,
        notes=grids.notes,
        limits=options.limits,
    )


def _check_options(options: ConvertOptions) -> None:
    choices = (
        ("rule", options.rule, RULES),
        ("codec", options.codec, CODECS),
        ("contour_origin", options.contour_origin, CONTOUR_ORIGINS),
        ("color", options.color, COLORS),
        ("partial_overlap", options.partial_overlap, POLICIES),
        ("dates", options.dates, DATES),
    )
    amounts = (
        "workers", "memory_limit", "slices_per_task", "max_rejected", "task_timeout",
        "window_limit",
    )  # fmt: skip
    for name in amounts:
        if getattr(options, name) < 0:
            raise ConfigurationError(f"{name} is {getattr(options, name)}, it cannot be negative")
    for name, threshold in asdict(options.checks).items():
        if not threshold >= 0:
            raise ConfigurationError(f"{name} is {threshold}, it must be a number from 0 on")
    for name, value, allowed in choices:
        if value not in allowed:
            known = ", ".join(str(choice) for choice in allowed)
            raise ConfigurationError(f"{name} is {value!r}, it can be {known}")


def _pad_value(text: str) -> float:
    """NaN stands for the slice's own minimum."""
    try:
        value = math.nan if text == "minimum" else float(text)
    except ValueError:
        raise ConfigurationError(
            f"pad_value is {text!r}, it can be a number or 'minimum'"
        ) from None
    if math.isinf(value) or (math.isnan(value) and text != "minimum"):
        raise ConfigurationError(f"pad_value is {text}, it must be finite")
    return value


def _only(cohort: Cohort, keep: NDArray[np.bool_]) -> Cohort:
    """The cohort without the slices that `keep` (n,) rules out, and what is drawn on them."""
    annotations = cohort.annotations.take(keep[cohort.annotations.slice])
    renumbered = (np.cumsum(keep) - 1)[annotations.slice]
    return replace(
        cohort,
        slices=cohort.slices.take(keep),
        headers={name: column.take(keep) for name, column in cohort.headers.items()},
        annotations=replace(annotations, slice=renumbered),
        marks=cohort.marks.on_slices(keep),
    )


def image_dtype(slices: SliceTable) -> str:
    """The smallest type that holds every rescaled value exactly, as a little-endian NumPy name.

    Integers of up to 32 bits where every value is whole and the range that the headers allow fits;
    float32 elsewhere.
    """
    if not slices.value_is_whole.all():
        return "<f4"
    low, high = slices.value_range[:, 0].min(), slices.value_range[:, 1].max()
    for dtype in _INTEGER_IMAGES:
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return dtype
    return "<f4"


def mask_dtype(structures: int) -> str:
    """The smallest unsigned type with one bit per structure."""
    return next(
        dtype
        for dtype, bits in (("|u1", 8), ("<u2", 16), ("<u4", 32), ("<u8", 64))
        if structures <= bits
    )


def _source_bytes(slices: SliceTable) -> int:
    """Of the largest source image, as it is stored."""
    samples = slices.samples_per_pixel.astype(np.int64) * slices.bits_allocated
    return int((slices.rows.astype(np.int64) * slices.columns * samples).max() // 8)


def _slice_bytes(layout: Layout, source_bytes: int) -> int:
    """What a worker holds for one slice at the same time."""
    pixels = layout.rows * layout.columns
    return source_bytes + pixels * (
        _IMAGE_COPIES * layout.samples * np.dtype(layout.image_dtype).itemsize
        + _MASK_COPIES * np.dtype(layout.mask_dtype).itemsize
    )


def _slices_per_task(
    layout: Layout, each: int, limit: int, options: ConvertOptions, workers: int
) -> int:
    most = limit // (_SLICES_HELD * each)
    if most < 1:
        raise ConfigurationError(
            f"memory_limit is {limit} bytes, one slice of {layout.rows} x {layout.columns} pixels "
            f"needs {_SLICES_HELD * each}"
        )
    if options.slices_per_task:
        if options.slices_per_task > most:
            raise ConfigurationError(
                f"slices_per_task is {options.slices_per_task}, "
                f"memory_limit of {limit} bytes allows {most}"
            )
        return options.slices_per_task
    even = -(-layout.slices // (_TASKS_PER_WORKER * workers))
    pixels = layout.rows * layout.columns * layout.samples
    cached = _TASK_BYTES // (pixels * np.dtype(layout.image_dtype).itemsize)
    return max(1, min(MAX_SLICES_PER_TASK, most, even, cached))


def tasks(plan: Plan, spans: Sequence[tuple[int, int]] | None = None) -> Iterator[ChunkTask]:
    """Make the tasks one by one, in the order of the output.

    Parameters
    ----------
    plan
        Of n slices.
    spans
        Which slices: ascending pairs of the first one and the one after the last; None: all.
    """
    for start, end in ((0, plan.layout.slices),) if spans is None else spans:
        for first in range(start, end, plan.slices_per_task):
            yield _task(plan, first, min(first + plan.slices_per_task, end))


def _task(plan: Plan, first: int, end: int) -> ChunkTask:
    annotations = plan.cohort.annotations
    drawn = slice(*np.searchsorted(annotations.slice, (first, end)).tolist())
    return ChunkTask(
        first=first,
        root=plan.cohort.root,
        layout=plan.layout,
        slices=slice_refs(plan.cohort.slices, slice(first, end), plan.grid),
        annotations=annotation_refs(annotations, drawn, first),
        limits=plan.limits,
    )


def single_slice(task: ChunkTask, place: int) -> ChunkTask:
    """The task of one slice: that at `place` in a task of several."""
    drawn = [i for i, plane in enumerate(task.annotations.plane) if plane == place]
    columns = {f.name: getattr(task.slices, f.name)[place : place + 1] for f in fields(SliceRefs)}
    return replace(
        task,
        first=task.first + place,
        slices=SliceRefs(**columns),
        annotations=replace(task.annotations.take(drawn), plane=(0,) * len(drawn)),
    )


def slice_refs(slices: SliceTable, rows: slice, grid: Float64) -> SliceRefs:
    """What a task needs of some slices; `grid` (n, 4) is that of all."""
    planes = planes_of(slices.take(rows))
    frames = slices.number_of_frames[rows]
    return SliceRefs(
        path=_texts(slices.path[rows]),
        pixel_length=tuple((slices.pixel_length[rows] // frames).tolist()),
        stored_dtype=_stored_dtypes(slices, rows),
        photometric_interpretation=_texts(slices.photometric_interpretation[rows]),
        plane_geometry=tuple(map(tuple, planes.tolist())),
        grid=tuple(map(tuple, grid[rows].tolist())),
        **{name: tuple(getattr(slices, name)[rows].tolist()) for name in _COPIED_COLUMNS},
    )


def _stored_dtypes(slices: SliceTable, rows: slice) -> tuple[str, ...]:
    """Little-endian NumPy names of the native pixels; '' where the slow path decodes them."""
    names = {8: ("|u1", "|i1"), 16: ("<u2", "<i2"), 32: ("<u4", "<i4")}
    return tuple(
        names[bits][signed] if offset >= 0 and bits in names else ""
        for bits, signed, offset in zip(
            slices.bits_allocated[rows].tolist(),
            slices.pixel_representation[rows].tolist(),
            slices.pixel_offset[rows].tolist(),
            strict=True,
        )
    )


def annotation_refs(annotations: AnnotationTable, rows: slice, first: int) -> AnnotationRefs:
    """What a task that starts at slice `first` needs of what is drawn on its slices."""
    return AnnotationRefs(
        plane=tuple((annotations.slice[rows] - first).tolist()),
        structure=tuple(annotations.structure[rows].tolist()),
        layer=tuple(annotations.layer[rows].tolist()),
        kind=_texts(annotations.kind[rows]),
        path=_texts(annotations.path[rows]),
        offset=tuple(annotations.offset[rows].tolist()),
        length=tuple(annotations.length[rows].tolist()),
    )


def _texts(paths: Bytes) -> tuple[str, ...]:
    """Decode all paths at once."""
    return tuple(os.fsdecode(b"\0".join(paths.tolist())).split("\0")) if len(paths) else ()
