"""From a cohort and options to a layout and tasks: integers only, no file is touched."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import CODECS
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.rasterize import RULES
from parallel_dicomseg.records import (
    Bytes,
    ChunkTask,
    Cohort,
    ContourRefs,
    ContourTable,
    ConvertOptions,
    Layout,
    Problem,
    Reason,
    SliceRefs,
    SliceTable,
)

CONTOUR_ORIGINS = (0.0, 0.5, 1.0)
MAX_STRUCTURES = 64
MAX_SLICES_PER_TASK = 64
DEFAULT_WORKER_BYTES = 256 << 20
# Tasks per worker that a small cohort is cut into, so that none is idle at the end.
_TASKS_PER_WORKER = 4
# A worker holds a slice as stored, converted, shuffled and encoded at the same time.
_IMAGE_COPIES = 4
_MASK_COPIES = 2
# Columns of the SliceTable that a worker needs as they are.
_COPIED_COLUMNS = (
    "frame",
    "file_size",
    "pixel_offset",
    "pixel_length",
    "bits_stored",
    "rescale_slope",
    "rescale_intercept",
)
_INTEGER_IMAGES = ("|u1", "<i2", "<u2")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, and in which portions."""

    cohort: Cohort
    """Only what fits the layout."""
    layout: Layout
    slices_per_task: int
    window: int
    """Tasks that may be under way or waiting to be written at the same time."""
    problems: tuple[Problem, ...]
    """What the layout leaves out."""

    @property
    def task_count(self) -> int:
        """How many tasks there are."""
        return -(-self.layout.slices // self.slices_per_task)


def make_plan(cohort: Cohort, options: ConvertOptions, workers: int) -> Plan:
    """Decide the layout of the output and the size of the tasks.

    Raises
    ------
    ConfigurationError
        An option has no meaning, or one slice does not fit the memory limit.
    LayoutError
        There is nothing to convert.
    """
    _check_options(options)
    cohort, problems = _of_one_size(cohort)
    if not len(cohort.slices):
        raise LayoutError(
            f"{cohort.root}: no image with an outline was found, there is nothing to convert"
        )
    if len(cohort.structures) > MAX_STRUCTURES:
        raise ConfigurationError(
            f"{len(cohort.structures)} structures do not fit the {MAX_STRUCTURES} bits of a mask; "
            f"choose some with --structures"
        )
    layout = Layout(
        slices=len(cohort.slices),
        rows=int(cohort.slices.rows[0]),
        columns=int(cohort.slices.columns[0]),
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
    )
    slices_per_task = _slices_per_task(layout, options, workers)
    return Plan(cohort, layout, slices_per_task, 2 * workers + 1, problems)


def _check_options(options: ConvertOptions) -> None:
    choices = (
        ("rule", options.rule, RULES),
        ("codec", options.codec, CODECS),
        ("contour_origin", options.contour_origin, CONTOUR_ORIGINS),
    )
    amounts = ("workers", "memory_limit", "slices_per_task", "max_rejected")
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


def _of_one_size(cohort: Cohort) -> tuple[Cohort, tuple[Problem, ...]]:
    """Keep the images of the size that most outlined ones have (the larger of two as frequent)."""
    slices = cohort.slices
    outlined = np.unique(cohort.contours.slice)
    # without any outline there is nothing to lose by asking all images
    voters = outlined if len(outlined) else np.arange(len(slices))
    size_of = list(zip(slices.rows.tolist(), slices.columns.tolist(), strict=True))
    if len(set(size_of)) <= 1:
        return cohort, ()
    sizes = Counter(size_of[i] for i in voters.tolist())
    rows, columns = max(sizes, key=lambda size: (sizes[size], size))
    keep = (slices.rows == rows) & (slices.columns == columns)
    who = "images with outlines" if len(outlined) else "images"
    problems = tuple(
        Problem(
            os.fsdecode(slices.path[i]),
            Reason.IMAGE_SIZE_DIFFERS,
            f"(0028,0010) Rows x (0028,0011) Columns is {slices.rows[i]} x {slices.columns[i]}, "
            f"{sizes[rows, columns]} of {len(voters)} {who} have {rows} x {columns}",
        )
        for i in np.flatnonzero(~keep)
    )
    return _only(cohort, keep), problems


def _only(cohort: Cohort, keep: NDArray[np.bool_]) -> Cohort:
    """The cohort without the slices that `keep` (n,) rules out, and without their outlines."""
    contours = cohort.contours
    chosen = keep[contours.slice]
    renumbered = (np.cumsum(keep) - 1)[contours.slice[chosen]]
    return replace(
        cohort,
        slices=cohort.slices.take(keep),
        contours=ContourTable(renumbered, contours.structure[chosen], contours.path[chosen]),
    )


def image_dtype(slices: SliceTable) -> str:
    """The smallest type that holds every rescaled value exactly, as a little-endian NumPy name.

    Integers where all slopes and intercepts are whole and the range that the stored bits allow
    fits 8 or 16 bits; float32 elsewhere.
    """
    slope, intercept = slices.rescale_slope, slices.rescale_intercept
    if not (np.all(slope == np.rint(slope)) and np.all(intercept == np.rint(intercept))):
        return "<f4"
    signed = slices.pixel_representation == 1
    span = np.exp2(slices.bits_stored.astype(np.float64))
    low = np.where(signed, -span / 2, 0.0)
    high = low + span - 1
    ends = np.stack([low * slope + intercept, high * slope + intercept])
    for dtype in _INTEGER_IMAGES:
        limits = np.iinfo(dtype)
        if limits.min <= ends.min() and ends.max() <= limits.max:
            return dtype
    return "<f4"


def mask_dtype(structures: int) -> str:
    """The smallest unsigned type with one bit per structure."""
    return next(
        dtype
        for dtype, bits in (("|u1", 8), ("<u2", 16), ("<u4", 32), ("<u8", 64))
        if structures <= bits
    )


def _slices_per_task(layout: Layout, options: ConvertOptions, workers: int) -> int:
    limit = options.memory_limit or DEFAULT_WORKER_BYTES
    pixels = layout.rows * layout.columns
    each = pixels * (
        _IMAGE_COPIES * np.dtype(layout.image_dtype).itemsize
        + _MASK_COPIES * np.dtype(layout.mask_dtype).itemsize
    )
    # Results wait in the window, two or three per worker, while the next task is made.
    most = limit // (3 * each)
    if most < 1:
        raise ConfigurationError(
            f"memory_limit is {limit} bytes, one slice of {layout.rows} x {layout.columns} pixels "
            f"needs {3 * each}"
        )
    if options.slices_per_task:
        if options.slices_per_task > most:
            raise ConfigurationError(
                f"slices_per_task is {options.slices_per_task}, "
                f"memory_limit of {limit} bytes allows {most}"
            )
        return options.slices_per_task
    even = -(-layout.slices // (_TASKS_PER_WORKER * workers))
    return max(1, min(MAX_SLICES_PER_TASK, most, even))


def tasks(plan: Plan) -> Iterator[ChunkTask]:
    """Make the tasks one by one, in the order of the output."""
    size = plan.slices_per_task
    contours = plan.cohort.contours
    starts = np.arange(0, plan.layout.slices + size, size)
    bounds = np.searchsorted(contours.slice, starts)
    for k, first in enumerate(starts[:-1].tolist()):
        rows = slice(first, min(first + size, plan.layout.slices))
        outlines = slice(int(bounds[k]), int(bounds[k + 1]))
        yield ChunkTask(
            first=first,
            root=plan.cohort.root,
            layout=plan.layout,
            slices=_slice_refs(plan.cohort.slices, rows),
            contours=_contour_refs(contours, outlines, first),
        )


def _slice_refs(slices: SliceTable, rows: slice) -> SliceRefs:
    return SliceRefs(
        path=_texts(slices.path[rows]),
        stored_dtype=_stored_dtypes(slices, rows),
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


def _contour_refs(contours: ContourTable, rows: slice, first: int) -> ContourRefs:
    return ContourRefs(
        path=_texts(contours.path[rows]),
        plane=tuple((contours.slice[rows] - first).tolist()),
        structure=tuple(contours.structure[rows].tolist()),
    )


def _texts(paths: Bytes) -> tuple[str, ...]:
    """Decode all paths at once."""
    return tuple(os.fsdecode(b"\0".join(paths.tolist())).split("\0")) if len(paths) else ()
