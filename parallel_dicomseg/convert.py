"""Convert a cohort: one pure function per task, and the driver round it.

`for task in tasks(plan): writer.put(encode_chunk(task))` is the whole program; Dask only spreads
it (schedulers, running.py). Results are committed in the order of the plan, so the output does not
depend on who was faster.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.checks import measure
from parallel_dicomseg.codec import checksums, encode
from parallel_dicomseg.compressors import room_for
from parallel_dicomseg.deidentify import Policy, conceal_paths, policy_of
from parallel_dicomseg.dicom.pixels import read_images
from parallel_dicomseg.dicom.sandbox import closing_decoders
from parallel_dicomseg.drawing import draw_masks, structure_centers
from parallel_dicomseg.errors import ConfigurationError, ConversionError
from parallel_dicomseg.fingerprint import decoders_of, plan_fingerprint
from parallel_dicomseg.limits import applied
from parallel_dicomseg.plan import Plan, make_plan, tasks
from parallel_dicomseg.rasterize import rasterize_batch
from parallel_dicomseg.records import (
    WHOLE_IMAGE,
    AnnotationRefs,
    Checks,
    ChunkTask,
    Cohort,
    Contours,
    ConvertOptions,
    EncodedChunk,
    Layout,
    Problem,
    Progress,
    SliceRefs,
    Summary,
)
from parallel_dicomseg.running import DEFAULT_WINDOW_BYTES, Bounds, run_tasks
from parallel_dicomseg.schedulers import Job, open_crew
from parallel_dicomseg.store import (
    Hdf5Writer,
    Sources,
    check_mirror,
    check_unlocked,
    find_leftover,
    mirror_to_zarr,
    open_dataset,
)
from parallel_dicomseg.update import OpenUpdate, open_update

#: What chunks take of the bytes of their pixels, as a rule (MR and CT; masks shrink far more).
IMAGE_SHARE = {"deflate": 0.45, "lz4": 0.5, "zstd": 0.45, "none": 1.0}
MASK_SHARE = {"deflate": 0.02, "lz4": 0.02, "zstd": 0.02, "none": 1.0}
#: Of the table and the journal, per slice.
TABLE_BYTES = 400

# --- one task ------------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Arrays that a thread uses again for its next task: fresh pages cost more than the masks."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An uninitialised array of this shape, valid until the next call with this name."""
        held = self._held.get(name)
        fits = held is not None and held.shape[1:] == shape[1:] and held.dtype == dtype
        if held is None or not fits or len(held) < shape[0]:
            held = np.empty(shape, dtype)
            self._held[name] = held
        return held[: shape[0]]


_scratch = _Scratch()


def encode_chunk(task: ChunkTask) -> EncodedChunk:
    """Decode, rasterize, measure and compress the slices of one task.

    A slice that cannot be read is a value of the result, never an exception.
    """
    with applied(task.limits):
        return _encode_chunk(task)


def _encode_chunk(task: ChunkTask) -> EncodedChunk:
    layout = task.layout
    n, shape = len(task.slices), (layout.rows, layout.columns)
    samples = (3,) if layout.samples == 3 else ()
    images = _scratch.array("images", (n, *shape, *samples), layout.image_dtype)
    good, problems = read_images(task.root, task.slices, images, layout)
    images[~good] = 0
    masks = _scratch.array("masks", (n, *shape), layout.mask_dtype)
    drawing = draw_masks(task, masks)
    measured = measure(
        images,
        masks,
        drawing.contours,
        contour_digest=drawing.digest,
        longer_than_header=_longer_than_header(task),
        cropped=drawing.cropped,
        elliptic=drawing.elliptic,
        bitmaps=drawing.bitmaps,
        looked_at=drawing.looked_at,
        nested=layout.nested,
        checks=layout.checks,
    )
    if not layout.include_unannotated:
        good &= measured.annotated.any(axis=1)
    image_bytes, image_sizes = encode(images, layout.codec, good, _room("image room", images))
    mask_bytes, mask_sizes = encode(masks, layout.codec, good, _room("mask room", masks))
    return EncodedChunk(
        first=task.first,
        image_bytes=image_bytes,
        image_sizes=image_sizes,
        mask_bytes=mask_bytes,
        mask_sizes=mask_sizes,
        image_crc32c=checksums(image_bytes, image_sizes),
        mask_crc32c=checksums(mask_bytes, mask_sizes),
        measured=measured,
        problems=(*problems, *drawing.problems),
    )


def _room(name: str, arrays: NDArray[Any]) -> NDArray[np.uint8]:
    """What `encode` needs for these arrays, used again by the thread's next task."""
    return _scratch.array(name, (room_for(len(arrays), arrays[0].nbytes),), "|u1")


def _longer_than_header(task: ChunkTask) -> NDArray[np.bool_]:
    """(n,) whether native pixel data holds more than the header's size and one byte of padding."""
    refs = task.slices
    return np.array(
        [
            bool(dtype) and length > rows * columns * np.dtype(dtype).itemsize + 1
            for dtype, length, rows, columns in zip(
                refs.stored_dtype, refs.pixel_length, refs.rows, refs.columns, strict=True
            )
        ]
    )


def warm_up(image_dtype: str = "<i2", mask_dtype: str = "|u1", codec: str = "deflate") -> float:
    """Compile (or load from the cache) every kernel of a conversion; returns the seconds it took.

    Worker processes that start after this load machine code from the cache on disk and never
    compile.
    """
    start = time.perf_counter()
    layout = Layout(
        slices=1,
        rows=8,
        columns=8,
        image_dtype=image_dtype,
        mask_dtype=mask_dtype,
        structures=("inner", "outer"),
        nested=((0, 1),),
        rule="center",
        contour_origin=0.0,
        include_unannotated=True,
        codec=codec,
        keep_identity=False,
        source="",
        checks=Checks(),
    )
    nowhere = SliceRefs(
        path=("",),
        frame=(0,),
        file_size=(0,),
        pixel_offset=(0,),
        pixel_length=(0,),
        stored_dtype=(image_dtype,),
        bits_stored=(8 * np.dtype(image_dtype).itemsize,),
        rescale_slope=(1.0,),
        rescale_intercept=(0.0,),
        rows=(8,),
        columns=(8,),
        photometric_interpretation=("MONOCHROME2",),
        plane_geometry=((0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0),),
        grid=(WHOLE_IMAGE,),
        annotated=(0,),
    )
    nothing = AnnotationRefs((0,), (0,), (0,), ("sunnybrook",), ("",), (0,), (-1,))
    # stored as they are, and rescaled and placed as most of CT and MR are
    placed = replace(
        nowhere, stored_dtype=("<u2",), bits_stored=(12,), grid=((-1.0, 0.0, 1.0, 1.0),)
    )
    for slices in (nowhere, placed):
        encode_chunk(ChunkTask(0, os.devnull, layout, slices, nothing))
    triangle = Contours(
        points_column_row=np.array([[1.0, 1.0], [6.0, 1.0], [3.0, 6.0]]),
        offsets=np.array([0, 3]),
        plane=np.array([0]),
        structure=np.array([0], np.int32),
    )
    rasterize_batch(triangle, np.zeros((1, 8, 8), mask_dtype))
    return time.perf_counter() - start


# Of a process that decodes one slice alone: what the packages of a decoder take when they load.
_PACKAGES_BYTES = 512 << 20


# --- the driver ----------------------------------------------------------------------------------


def convert_cohort(
    cohort: Cohort,
    output: str | Path,
    *,
    options: ConvertOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Convert a cohort into one HDF5 file, and on request a zarr mirror of it.

    Parameters
    ----------
    cohort
        What `scan_cohort` found.
    output
        The HDF5 file. It appears under this name only when it is whole.
    options
        How to convert. The bytes of the output do not depend on the scheduler, the number of
        workers or the size of the tasks.
    progress
        Called with the slices done so far.

    Returns
    -------
    What is in the file, what was rejected and why, what was flagged.

    Raises
    ------
    ConfigurationError
        An option has no meaning, the output exists or a run was left unfinished and no option says
        what becomes of it, or the disk will not hold the output.
    LayoutError
        There is nothing to convert.
    ConversionError
        No slice could be converted, or one was rejected under `strict`.
    ResumableError
        The disk, the memory or the workers did not hold out; `resume` goes on with what is kept.
    VerificationError
        What is on the disk is not what was written there.
    """
    options = options or ConvertOptions()
    output = Path(output)
    start = time.perf_counter()
    check_output(output, options)
    identity = policy_of(options, apart_from=(Path(cohort.root),))
    workers = options.workers or os.cpu_count() or 1
    centers = None
    if options.fit == "structure":
        with applied(options.limits):
            centers = structure_centers(cohort, options.contour_origin)
    plan = make_plan(cohort, options, workers, centers)
    if not options.ignore_space:
        check_space(plan, output, options)
    slices = plan.cohort.slices
    if options.strict:
        _stop_if_strict(conceal_paths((*cohort.problems, *plan.problems), slices.path, identity))
    with (
        open_update(output, plan, options) as update,
        open_writer(output, plan, identity, options, update.sources) as writer,
    ):
        for chunk in _chunks(plan, options, workers, update, writer.slices_seen):
            if options.strict:
                _stop_if_strict(conceal_paths(chunk.problems, slices.path, identity))
            writer.put(chunk)
            if progress:
                progress(Progress("convert", writer.slices_seen, plan.layout.slices))
        found = update.told(identity)
        written = writer.publish((*cohort.problems, *plan.problems))
    if options.zarr:
        replaces = _replaces_mirror(options)
        with open_dataset(output) as dataset:
            mirror_to_zarr(dataset, options.zarr, overwrite=replaces, progress=progress)
    return replace(
        written,
        seconds=time.perf_counter() - start,
        max_rejected=options.max_rejected,
        notes=plan.notes,
        resumed=writer.slices_resumed,
        update=found,
    )


def _chunks(
    plan: Plan, options: ConvertOptions, workers: int, update: OpenUpdate, first: int
) -> Iterator[EncodedChunk]:
    """The chunks of a plan from a slice on, in its order: taken over, or encoded."""
    spans = update.spans(first)
    encoded = run(plan, options, workers, [(a, b) for a, b, taken_over in spans if not taken_over])
    with contextlib.closing(encoded):
        for start, end, taken_over in spans:
            if taken_over:
                yield from update.chunks(start, end)
            at = end if taken_over else start
            while at < end:
                chunk = next(encoded)
                yield chunk
                at += len(chunk.image_sizes)


def open_writer(
    output: Path,
    plan: Plan,
    identity: Policy,
    options: ConvertOptions | None = None,
    sources: Sources | None = None,
) -> Hdf5Writer:
    """The writer that takes the encoded tasks of a plan, which was made with these options."""
    options = options or ConvertOptions()
    slices = plan.cohort.slices
    return Hdf5Writer(
        output,
        plan.layout,
        slices,
        headers=plan.cohort.headers,
        annotations=plan.cohort.annotations,
        grid=plan.grid,
        marks=plan.cohort.marks,
        identity=identity,
        root=plan.cohort.root,
        provenance=_provenance(plan.cohort, options),
        overwrite=options.overwrite or options.update,
        plan=plan_fingerprint(plan, options),
        resume=options.resume,
        sources=sources,
    )


def _provenance(cohort: Cohort, options: ConvertOptions) -> dict[str, list[str]]:
    """What the layout does not say of how a file was made: lists of texts, none of them empty."""
    decoders = decoders_of(cohort.slices)
    grid = {name: getattr(options, name) for name in ("spacing", "size", "fit", "color")}
    said = {
        "scanned_with": list(cohort.scanned_with),
        "grid": [f"{name} {json.dumps(value)}" for name, value in grid.items()],
        "decoders": [f"{uid} {decoders[uid]}" for uid in sorted(decoders)],
        "found_by": [f"{how} {count}" for how, count in cohort.found_by.items()],
        "spelled": [
            f"{name}: {' | '.join(cohort.spelled[name])}"
            for name in cohort.structures
            if name in cohort.spelled
        ],
    }
    return {name: texts for name, texts in said.items() if texts}


def check_output(output: Path, options: ConvertOptions) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises
    ------
    ConfigurationError
        The output or the mirror exists, or an unfinished run has left something, and no option
        says what to do with it; or they cannot be made there.
    ConversionError
        Another run is writing the output.
    """
    if output.is_dir():
        raise ConfigurationError(f"{output} is a directory, the output is one HDF5 file")
    if not output.parent.is_dir():
        raise ConfigurationError(f"{output.parent}: no such directory for the output {output.name}")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{output.parent}: no permission to write {output.name} there")
    check_unlocked(output)
    left = find_leftover(output)
    if left and not (options.resume or options.overwrite):
        raise ConfigurationError(
            f"{left.data} holds {left.slices_done} of {left.slices} slices of an unfinished run; "
            f"--resume goes on with it, --overwrite starts anew"
        )
    may_exist = options.overwrite or options.update or (options.resume and left)
    if output.exists() and not may_exist:
        raise ConfigurationError(f"{output} exists; --overwrite replaces it")
    if options.zarr:
        mirror = Path(options.zarr)
        if mirror.absolute() == output.absolute():
            raise ConfigurationError(f"{mirror} cannot be the output and its mirror")
        check_mirror(mirror, overwrite=_replaces_mirror(options))


def _replaces_mirror(options: ConvertOptions) -> bool:
    return options.overwrite or options.update or options.resume


def is_whole(output: Path, options: ConvertOptions) -> bool:
    """Whether an output is finished, so that there is nothing to resume or to replace."""
    replaces = options.overwrite or options.update
    return output.is_file() and find_leftover(output) is None and not replaces


def check_space(plan: Plan, output: Path, options: ConvertOptions) -> None:
    """Refuse to begin where the disk will not hold the output.

    What images compress to is known only afterwards: refused is what would have to shrink four
    times as well as images usually do.

    Raises
    ------
    ConfigurationError
        Naming what is needed and what is free.
    """
    needed = expected_bytes(plan) * (2 if options.zarr else 1)
    left = find_leftover(output) if options.resume else None
    free = shutil.disk_usage(output.parent).free + (left.data.stat().st_size if left else 0)
    least = needed if plan.layout.codec == "none" else needed // 4
    if free < least:
        raise ConfigurationError(
            f"{output.parent} has {free:,} bytes free, the output will need about {needed:,}; "
            f"--ignore-space begins all the same"
        )


def expected_bytes(plan: Plan) -> int:
    """What an output will take, as far as its layout tells."""
    layout = plan.layout
    pixels = layout.rows * layout.columns
    image = pixels * layout.samples * np.dtype(layout.image_dtype).itemsize
    mask = pixels * np.dtype(layout.mask_dtype).itemsize
    per_slice = image * IMAGE_SHARE[layout.codec] + mask * MASK_SHARE[layout.codec]
    return int(layout.slices * (per_slice + TABLE_BYTES))


def _stop_if_strict(problems: tuple[Problem, ...]) -> None:
    first = next((problem for problem in problems if problem.is_rejection), None)
    if first:
        raise ConversionError(f"{first.path}: {first.detail} ({first.reason}); stopped by strict")


def run(
    plan: Plan, options: ConvertOptions, workers: int, spans: Sequence[tuple[int, int]]
) -> Generator[EncodedChunk, None, None]:
    """The encoded chunks of a plan in its order, each once, with a bounded number under way.

    Parameters
    ----------
    plan, options, workers
        What to convert, how, and by how many.
    spans
        The slices that are wanted, as for `plan.tasks`.

    Raises
    ------
    ConfigurationError
        `options.scheduler` is nothing that exists, or it may not be talked to.
    ResumableError
        The workers, or the scheduler, were lost.
    ConversionError
        The workers cannot do it, or nothing can be converted.
    """
    layout = plan.layout
    job = Job(
        function=encode_chunk,
        window=plan.window,
        root=plan.cohort.root,
        warm_up=partial(warm_up, layout.image_dtype, layout.mask_dtype, layout.codec),
        slice_memory=plan.worker_bytes + _PACKAGES_BYTES,
    )
    bounds = Bounds(options.window_limit or DEFAULT_WINDOW_BYTES, options.task_timeout)
    with closing_decoders(), open_crew(job, options, workers) as crew:
        yield from run_tasks(tasks(plan, spans), job, crew, bounds)
