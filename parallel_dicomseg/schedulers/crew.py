"""What all schedulers have in common: a job, attempts at its tasks, and their answers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self

from parallel_dicomseg.records import ChunkTask, EncodedChunk

_PACKAGE = "parallel_dicomseg"


@dataclass(frozen=True, slots=True)
class Job:
    """What all tasks of a run have in common."""

    function: Callable[[ChunkTask], EncodedChunk]
    window: int
    """Tasks that may be under way at the same time on this machine."""
    root: str
    """Directory that every worker must see."""
    warm_up: Callable[[], object]
    """Compiles all kernels, or loads them; can be pickled."""
    slice_memory: int = 0
    """Bytes that a process which does one slice alone may use beyond what it starts with; 0: any.
    """


@dataclass(frozen=True, slots=True)
class Failure:
    """A task without a chunk: why, in words without a path, a value or a name of the input."""

    detail: str
    to_blame: bool
    """Whether the task may be the cause: it raised, or its worker died under it. Lost connections
    and damaged transfers are nobody's fault."""
    often: bool = False
    """Whether it has been tried often enough, so that it should be tried alone now."""
    out_of_memory: bool = False


Outcome = EncodedChunk | Failure
Answer = tuple[int, Callable[[], Outcome | None]]
"""An attempt's number, and what gives its outcome or raises what ends the run; None: the outcome
was lost after it had been announced, and is being made again."""


class Attempt:
    """A task as schedulers see it: a function without arguments that never raises.

    Dask logs the text of a task that fails, with its arguments and its exception: this one has no
    arguments, its text is a number, and its failures are values.
    """

    __slots__ = ("_function", "_task")

    def __init__(self, function: Callable[[ChunkTask], EncodedChunk], task: ChunkTask) -> None:
        """Prepare; nothing is done before the call."""
        self._function = function
        self._task = task

    def __repr__(self) -> str:
        return f"<slices from {self._task.first} on>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Attempt, (self._function, self._task)

    def __call__(self) -> Outcome:
        """The chunk, or why there is none."""
        try:
            return self._function(self._task)
        except (KeyboardInterrupt, SystemExit):
            raise
        except MemoryError:
            return Failure("memory ran out", to_blame=True, out_of_memory=True)
        except BaseException as error:  # noqa: BLE001  # Rust's panics are no Exception
            return Failure(f"{type(error).__name__}{_place(error.__traceback__)}", to_blame=True)


def _place(trace: TracebackType | None) -> str:
    """Where in this package an error arose: ' in decoders.py, line 12'; '' elsewhere."""
    called = traceback.extract_tb(trace)[1:]  # the first is the attempt itself
    frames = [f for f in called if _PACKAGE in PurePath(f.filename).parts]
    return f" in {PurePath(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


class Crew(Protocol):
    """Whoever does the tasks of a run; a context manager that ends with the run."""

    answers: SimpleQueue[Answer]
    slots: int
    """Attempts that are worked on at the same time; the others wait."""
    window: int
    """Attempts that it should be given at the same time, so that nobody waits."""
    is_apart: bool
    """Whether workers are other processes: answers travel, and workers can be given up."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:
        """Have a task done; `beside` is another attempt at it, whose worker should be avoided."""

    def stop(self, number: int) -> None:
        """Give up an attempt, and whoever works on it. It may still be answered."""

    def check(self) -> None:
        """Called now and then while no answer comes.

        Raises
        ------
        ResumableError
            Nobody is left to answer.
        """


def compute(attempt: Attempt, first: int, scheduler: str, **options: Any) -> Outcome:
    """Make one attempt on a local scheduler of Dask.

    The graph goes to the scheduler as it is: Dask's `compute` would optimise it first, for which
    it pickles and hashes the task (1 to 2 ms).
    """
    import dask

    node = delayed(attempt, f"encode_chunk-{first}")
    get = dask.base.get_scheduler(scheduler=scheduler)
    outcome: Outcome
    (outcome,) = get(dict(node.__dask_graph__()), [node.key], **options)
    return outcome


def delayed(attempt: Attempt, key: str) -> Any:
    """The attempt as a graph of one node.

    It has no arguments: Dask searches them for graphs, which takes 20 ms for a task of 64 slices.
    """
    import dask

    bound = dask.delayed(attempt, name=f"{key}-function", traverse=False)
    return bound(dask_key_name=key)


def already(outcome: Outcome) -> Callable[[], Outcome]:
    """An answer that is here."""
    return partial(_itself, outcome)


def _itself(outcome: Outcome) -> Outcome:
    return outcome
