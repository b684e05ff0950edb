"""Which slice of a task kills, blocks or exhausts its workers: each is tried in a process alone.

Only what fails there too is rejected. Workers are also lost to their machines, and neighbours of
a poisoned file are not poisoned: without this, both would be blamed.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from parallel_dicomseg.codec import checksums
from parallel_dicomseg.plan import single_slice
from parallel_dicomseg.records import ChunkTask, EncodedChunk, Measured, Problem, Reason
from parallel_dicomseg.schedulers import (
    Attempt,
    DeadProcessError,
    Failure,
    Job,
    Outcome,
    WorkerProcess,
)

# A process can also be ended by somebody else; twice in a row for one slice is no chance.
_DEATHS = 2


def slice_by_slice(
    task: ChunkTask, job: Job, worker: WorkerProcess, timeout: float
) -> EncodedChunk:
    """The chunk of a task whose slices are done one after another in a process of their own.

    Parameters
    ----------
    task, job
        What to do, and how.
    worker
        A process that may be lost.
    timeout
        Seconds that each slice may take; 0: any.

    Raises
    ------
    ResumableError
        No process can be started.
    """
    singles = (single_slice(task, place) for place in range(len(task.slices)))
    return joined([_alone(single, job, worker, timeout) for single in singles])


def _alone(task: ChunkTask, job: Job, worker: WorkerProcess, timeout: float) -> EncodedChunk:
    """The chunk of a task of one slice, empty where nothing comes of it."""
    detail = ""
    for _ in range(_DEATHS):
        try:
            outcome: Outcome = worker.call(Attempt(job.function, task), timeout=timeout or None)
        except TimeoutError:
            return rejected(task, f"the process that decodes it gave no answer for {timeout:g} s")
        except DeadProcessError as death:
            detail = f"the process that decodes it {death}"
        else:
            if not isinstance(outcome, Failure) and is_whole(outcome, task):
                return outcome
            detail = _in_words(outcome, job)
    return rejected(task, detail)


def _in_words(outcome: EncodedChunk | Failure, job: Job) -> str:
    if not isinstance(outcome, Failure):
        return "its result arrives damaged"
    if outcome.out_of_memory:
        return f"decoding it used more than {job.slice_memory} bytes of memory"
    return f"decoding it failed ({outcome.detail})"


def is_whole(chunk: EncodedChunk, task: ChunkTask) -> bool:
    """Whether a chunk is that of the task, and its bytes are those that were encoded."""
    n = len(task.slices)
    parts = (
        (chunk.image_bytes, chunk.image_sizes, chunk.image_crc32c),
        (chunk.mask_bytes, chunk.mask_sizes, chunk.mask_crc32c),
    )
    return (
        chunk.first == task.first
        and all(len(getattr(chunk.measured, f.name)) == n for f in fields(Measured))
        and all(
            len(sizes) == len(crc32c) == n
            and sizes.min() >= 0
            and sizes.sum() == len(flat)
            and np.array_equal(checksums(flat, sizes), crc32c)
            for flat, sizes, crc32c in parts
        )
    )


def rejected(task: ChunkTask, detail: str) -> EncodedChunk:
    """The chunk of a task of which no slice could be converted."""
    n, s = len(task.slices), len(task.layout.structures)
    nothing = np.empty(0, np.uint8)
    none, unsummed = np.zeros(n, np.int64), np.zeros(n, np.uint32)
    return EncodedChunk(
        first=task.first,
        image_bytes=nothing,
        image_sizes=none,
        mask_bytes=nothing,
        mask_sizes=none,
        image_crc32c=unsummed,
        mask_crc32c=unsummed,
        measured=Measured(
            annotated=np.zeros((n, s), bool),
            outlined=np.zeros((n, s), bool),
            area=np.zeros((n, s), np.int64),
            components=np.zeros((n, s), np.int32),
            outside=np.zeros((n, len(task.layout.nested)), np.int64),
            ellipse_residual=np.full((n, s), np.nan),
            contour_digest=np.zeros((n, s), np.uint64),
            intensity=np.zeros((n, 4)),
            flags=np.zeros(n, np.uint16),
            cropped=np.zeros((n, s), np.int64),
        ),
        problems=tuple(
            Problem(path, Reason.UNDECODABLE_PIXELS, detail) for path in task.slices.path
        ),
    )


def joined(chunks: list[EncodedChunk]) -> EncodedChunk:
    """Chunks that follow one another as one."""

    def together(name: str) -> Any:
        return np.concatenate([getattr(chunk, name) for chunk in chunks])

    arrays = [
        f.name for f in fields(EncodedChunk) if f.name not in ("first", "measured", "problems")
    ]
    measured = {
        f.name: np.concatenate([getattr(chunk.measured, f.name) for chunk in chunks])
        for f in fields(Measured)
    }
    return EncodedChunk(
        first=chunks[0].first,
        **{name: together(name) for name in arrays},
        measured=Measured(**measured),
        problems=tuple(problem for chunk in chunks for problem in chunk.problems),
    )
