"""Convert a cohort: one pure function per task, and the driver round it.

`for task in tasks(plan): writer.put(encode_chunk(task))` is the whole program; Dask only spreads
it (schedulers.py). Results are committed in the order of the plan, so the output does not depend
on who was faster.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.checks import measure
from parallel_dicomseg.codec import checksums, encode
from parallel_dicomseg.compressors import room_for
from parallel_dicomseg.dicom import read_images
from parallel_dicomseg.errors import ConfigurationError, ConversionError
from parallel_dicomseg.plan import Plan, make_plan, tasks
from parallel_dicomseg.rasterize import rasterize_batch
from parallel_dicomseg.records import (
    Checks,
    ChunkTask,
    Cohort,
    ContourRefs,
    Contours,
    ConvertOptions,
    EncodedChunk,
    Layout,
    Problem,
    Progress,
    Reason,
    SliceRefs,
    Summary,
)
from parallel_dicomseg.schedulers import Job, Pending, open_scheduler
from parallel_dicomseg.store import Hdf5Writer, check_mirror, mirror_to_zarr, open_dataset
from parallel_dicomseg.text import read_contour_files

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
    layout = task.layout
    shape = (len(task.slices), layout.rows, layout.columns)
    images = _scratch.array("images", shape, layout.image_dtype)
    good, problems = read_images(task.root, task.slices, images)
    images[~good] = 0
    contours, digest, bad_contours = read_contours(task)
    masks = _scratch.array("masks", shape, layout.mask_dtype)
    rasterize_batch(contours, masks, rule=layout.rule, clear=True)
    measured = measure(
        images,
        masks,
        contours,
        contour_digest=digest,
        longer_than_header=_longer_than_header(task),
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
        problems=(*problems, *bad_contours),
    )


def _room(name: str, arrays: NDArray[Any]) -> NDArray[np.uint8]:
    """What `encode` needs for these arrays, used again by the thread's next task."""
    return _scratch.array(name, (room_for(len(arrays), arrays[0].nbytes),), "|u1")


def read_contours(task: ChunkTask) -> tuple[Contours, NDArray[np.uint64], list[Problem]]:
    """The outlines of a task in pixel coordinates, their digests (n, s), and what is wrong.

    An outline that cannot be read has no ring: its structure is then not annotated on the slice.
    """
    layout = task.layout
    files = read_contour_files(task.contours.path, task.root)
    usable = np.diff(files.offsets) > 0
    plane = np.array(task.contours.plane, np.int64)
    structure = np.array(task.contours.structure, np.int32)
    digest = np.zeros((len(task.slices), len(layout.structures)), np.uint64)
    digest[plane[usable], structure[usable]] = files.digest[usable]
    contours = Contours(
        points_column_row=files.points_column_row - layout.contour_origin,
        offsets=np.append(files.offsets[:-1][usable], files.offsets[-1]),
        plane=plane[usable],
        structure=structure[usable],
    )
    problems = [_bad_contour(task, k, text) for k, text in files.errors]
    return contours, digest, problems


def _bad_contour(task: ChunkTask, k: int, text: str) -> Problem:
    refs = task.contours
    name = task.layout.structures[refs.structure[k]]
    image = task.slices.path[refs.plane[k]]
    return Problem(refs.path[k], Reason.BAD_CONTOUR, f"{text}; structure {name} of {image}")


def _longer_than_header(task: ChunkTask) -> NDArray[np.bool_]:
    """(n,) whether native pixel data holds more than the header's size and one byte of padding."""
    pixels = task.layout.rows * task.layout.columns
    return np.array(
        [
            bool(dtype) and length > pixels * np.dtype(dtype).itemsize + 1
            for dtype, length in zip(
                task.slices.stored_dtype, task.slices.pixel_length, strict=True
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
    bits = 8 * np.dtype(image_dtype).itemsize
    nowhere = SliceRefs(("",), (0,), (0,), (0,), (0,), (image_dtype,), (bits,), (1.0,), (0.0,))
    encode_chunk(ChunkTask(0, os.devnull, layout, nowhere, ContourRefs(("",), (0,), (0,))))
    triangle = Contours(
        points_column_row=np.array([[1.0, 1.0], [6.0, 1.0], [3.0, 6.0]]),
        offsets=np.array([0, 3]),
        plane=np.array([0]),
        structure=np.array([0], np.int32),
    )
    rasterize_batch(triangle, np.zeros((1, 8, 8), mask_dtype))
    return time.perf_counter() - start


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
        How to convert. The bytes of the output depend on `rule`, `contour_origin`, `codec`,
        `keep_identity` and `checks`, not on the scheduler or the size of the tasks.
    progress
        Called with the slices done so far.

    Returns
    -------
    What is in the file, what was rejected and why, what was flagged.

    Raises
    ------
    ConfigurationError
        An option has no meaning, or the output exists and `overwrite` is off.
    LayoutError
        There is nothing to convert.
    ConversionError
        No slice could be converted, one was rejected under `strict`, or the workers were lost.
    """
    options = options or ConvertOptions()
    output = Path(output)
    start = time.perf_counter()
    check_output(output, options)
    workers = options.workers or os.cpu_count() or 1
    plan = make_plan(cohort, options, workers)
    plan = replace(plan, problems=(*cohort.problems, *plan.problems))
    _stop_if_strict(plan.problems, options)
    slices, overwrite = plan.cohort.slices, options.overwrite
    with Hdf5Writer(output, plan.layout, slices, overwrite=overwrite) as writer:
        for chunk in run(plan, options, workers):
            _stop_if_strict(chunk.problems, options)
            writer.put(chunk)
            if progress:
                progress(Progress("convert", writer.slices_seen, plan.layout.slices))
        written = writer.publish(plan.problems)
    if options.zarr:
        with open_dataset(output) as dataset:
            mirror_to_zarr(dataset, options.zarr, overwrite=options.overwrite, progress=progress)
    return replace(written, seconds=time.perf_counter() - start, max_rejected=options.max_rejected)


def check_output(output: Path, options: ConvertOptions) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises
    ------
    ConfigurationError
        The output or the mirror exists and `overwrite` is off, or cannot be made there.
    """
    if output.is_dir():
        raise ConfigurationError(f"{output} is a directory, the output is one HDF5 file")
    if not output.parent.is_dir():
        raise ConfigurationError(f"{output.parent}: no such directory for the output {output.name}")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{output.parent}: no permission to write {output.name} there")
    if output.exists() and not options.overwrite:
        raise ConfigurationError(f"{output} exists; --overwrite replaces it")
    if options.zarr:
        mirror = Path(options.zarr)
        if mirror.absolute() == output.absolute():
            raise ConfigurationError(f"{mirror} cannot be the output and its mirror")
        check_mirror(mirror, overwrite=options.overwrite)


def _stop_if_strict(problems: tuple[Problem, ...], options: ConvertOptions) -> None:
    rejections = [problem for problem in problems if problem.is_rejection]
    if options.strict and rejections:
        first = rejections[0]
        raise ConversionError(f"{first.path}: {first.detail} ({first.reason}); stopped by strict")


def run(plan: Plan, options: ConvertOptions, workers: int) -> Iterator[EncodedChunk]:
    """The encoded chunks of a plan in its order, with a bounded number of tasks under way.

    Raises
    ------
    ConfigurationError
        `options.scheduler` is nothing that exists.
    ConversionError
        The workers, or the scheduler, were lost.
    """
    layout = plan.layout
    job = Job(
        function=encode_chunk,
        window=plan.window,
        root=plan.cohort.root,
        warm_up=lambda: warm_up(layout.image_dtype, layout.mask_dtype, layout.codec),
    )
    pending: deque[Pending] = deque()
    with open_scheduler(job, options.scheduler, workers) as (submit, window):
        try:
            for task in tasks(plan):
                if len(pending) == window:
                    yield pending.popleft().result()
                pending.append(submit(task))
            while pending:
                yield pending.popleft().result()
        except BrokenExecutor as error:
            raise ConversionError("a worker process died; is there enough memory?") from error
        finally:
            for future in pending:
                future.cancel()
