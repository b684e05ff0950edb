"""Drive a crew over the tasks of a run: each chunk comes out once, in the order of the plan.

Workers may die, hang, run out of memory or send damage; connections may end. What is lost is done
again, a task that keeps losing its workers is taken apart (blame.py), and where nobody is left to
work the run ends as one that can be resumed. Only what cannot be decoded in a process alone is
blamed on the input.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty
from typing import NamedTuple, cast

import numpy as np

from parallel_dicomseg.blame import is_whole, slice_by_slice
from parallel_dicomseg.compressors import room_for
from parallel_dicomseg.errors import ConversionError, ResumableError
from parallel_dicomseg.records import ChunkTask, EncodedChunk
from parallel_dicomseg.schedulers import Crew, Failure, Job, Outcome, WorkerProcess

DEFAULT_WINDOW_BYTES = 2 << 30
# Attempts at a task that may fail before it is taken apart, and that may be lost on the way.
_FAILURES = 2
_LOSSES = 5
# Of the deadline: how long a second attempt may take, and how long one slice alone. With the first
# attempt's and the start of a process this makes two at most.
_AGAIN, _ALONE = 0.4, 0.4
# However short the deadline: a machine that is busy needs this long for a slice now and then.
_LEAST_ALONE_S = 5.0
_TICK_SECONDS = 0.5
_CHECK_SECONDS = 5.0
# Tasks of which nothing was left, when nothing at all has succeeded: it is not the input then.
_HOPELESS = 3


class Bounds(NamedTuple):
    """How much may be under way, and for how long."""

    window_bytes: int
    """Results waiting to be used, and the most that those under way can become."""
    task_timeout: float
    """Seconds per attempt; 0: any."""


@dataclass(slots=True)
class _Place:
    """One task's place in the order of the plan."""

    task: ChunkTask
    room: int
    """Bytes that its chunk takes at most; those that it takes once it is there."""
    chunk: EncodedChunk | None = None
    live: set[int] = field(default_factory=set)
    """Numbers of the attempts under way."""
    since: float = 0.0
    """When the first of them began to be worked on; 0: not yet."""
    is_late: bool = False
    """Whether a second attempt runs beside the first, for which the time was up."""
    failures: int = 0
    losses: int = 0


def run_tasks(
    tasks: Iterable[ChunkTask], job: Job, crew: Crew, bounds: Bounds
) -> Iterator[EncodedChunk]:
    """The chunks of tasks in their order, each once.

    Raises
    ------
    ResumableError
        The workers, or the scheduler, were lost.
    ConversionError
        Nothing can be converted, whatever the slice.
    """
    run = _Run(job, crew, bounds)
    try:
        yield from run.chunks(iter(tasks))
    finally:
        run.close()


class _Run:
    """What a run remembers."""

    def __init__(self, job: Job, crew: Crew, bounds: Bounds) -> None:
        self._job, self._crew, self._bounds = job, crew, bounds
        self._places: deque[_Place] = deque()
        self._numbers = itertools.count()
        self._attempts: dict[int, _Place] = {}
        self._alone: dict[int, _Place] = {}
        self._held = 0  # bytes, of all places
        self._unanswered = 0
        self._succeeded = False
        self._hopeless = 0
        self._last_sign = time.monotonic()
        self._sacrifice = WorkerProcess(job.warm_up, job.slice_memory)
        self._isolation = ThreadPoolExecutor(1, "isolation")

    def close(self) -> None:
        """Give up whatever is under way."""
        self._sacrifice.shutdown(wait=False)
        self._isolation.shutdown(cancel_futures=True)
        self._sacrifice.shutdown()

    def chunks(self, tasks: Iterator[ChunkTask]) -> Iterator[EncodedChunk]:
        """See `run_tasks`."""
        coming = next(tasks, None)
        while coming or self._places:
            while coming and self._has_room(coming):
                self._begin(coming)
                coming = next(tasks, None)
            if (chunk := self._places[0].chunk) is not None:
                self._held -= self._places.popleft().room
                yield chunk
            else:
                self._listen()

    def _has_room(self, task: ChunkTask) -> bool:
        """Whether one more may be under way; one always may.

        Results that wait for an earlier one count with their bytes only: one task that sleeps does
        not keep everybody waiting.
        """
        fits = self._held + most_bytes(task) <= self._bounds.window_bytes
        return (fits and self._unanswered < self._crew.window) or not self._places

    def _begin(self, task: ChunkTask) -> None:
        place = _Place(task, most_bytes(task))
        self._places.append(place)
        self._held += place.room
        self._unanswered += 1
        self._attempt(place)

    def _listen(self) -> None:
        """Take one answer; look at the clocks where none is there."""
        if self._crew.answers.empty():
            self._look_at_clocks()
        with suppress(Empty):
            number, answer = self._crew.answers.get(timeout=_TICK_SECONDS)
            if place := self._alone.pop(number, None):
                self._take_rest(place, cast(EncodedChunk, answer()))
            elif place := self._attempts.get(number):
                self._take_attempt(place, number, answer())
            # else another attempt was first, or this one was given up

    def _take_attempt(self, place: _Place, number: int, outcome: Outcome | None) -> None:
        if outcome is None:  # it was lost after it had been announced, as others may be
            self._look_at_clocks()
            return
        del self._attempts[number]
        place.live.discard(number)
        self._last_sign = time.monotonic()
        self._take(place, outcome)

    def _take(self, place: _Place, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self._try_again(place, outcome)
        elif self._crew.is_apart and not is_whole(outcome, place.task):
            self._try_again(place, Failure("a result was damaged", to_blame=False))
        else:
            self._succeeded = True
            self._settle(place, outcome)

    def _take_rest(self, place: _Place, chunk: EncodedChunk) -> None:
        """Take what a slice-by-slice attempt has left of a task."""
        self._hopeless += not chunk.image_sizes.any()
        if self._hopeless >= _HOPELESS and not self._succeeded:
            raise ConversionError(
                f"no slice of the first {_HOPELESS} tasks can be converted, and nothing else has "
                f"been: {chunk.problems[0].detail}"
            )
        self._settle(place, chunk)

    def _settle(self, place: _Place, chunk: EncodedChunk) -> None:
        """The chunk is there: other attempts at it are not needed."""
        place.chunk = chunk
        self._unanswered -= 1
        self._held -= place.room
        place.room = len(chunk.image_bytes) + len(chunk.mask_bytes)
        self._held += place.room
        self._give_up(place)

    def _try_again(self, place: _Place, failure: Failure) -> None:
        place.failures += failure.to_blame
        place.losses += not failure.to_blame
        if place.losses > _LOSSES:
            raise ResumableError(f"slices from {place.task.first} on are lost: {failure.detail}")
        if failure.often or place.failures >= _FAILURES:
            self._isolate(place)
        elif not place.live:
            self._attempt(place)

    def _attempt(self, place: _Place) -> None:
        beside = next(iter(place.live), None)
        if beside is None:
            place.since, place.is_late = 0.0, False
        number = next(self._numbers)
        place.live.add(number)
        self._attempts[number] = place
        self._crew.start(number, place.task, beside)

    def _give_up(self, place: _Place) -> None:
        """No attempt at it is wanted any more."""
        for number in place.live:
            del self._attempts[number]
            self._crew.stop(number)
        place.live.clear()

    def _isolate(self, place: _Place) -> None:
        """Try it slice by slice in a process of its own."""
        self._give_up(place)
        number = next(self._numbers)
        self._alone[number] = place
        done = self._isolation.submit(
            slice_by_slice,
            place.task,
            self._job,
            self._sacrifice,
            max(_ALONE * self._bounds.task_timeout, _LEAST_ALONE_S)
            if self._bounds.task_timeout
            else 0.0,
        )
        done.add_done_callback(partial(self._left, number))

    def _left(self, number: int, done: Future[EncodedChunk]) -> None:
        if not done.cancelled():
            self._crew.answers.put((number, done.result))

    def _look_at_clocks(self) -> None:
        """See for whom the time is up, and now and then whether anybody is there."""
        now = time.monotonic()
        if self._bounds.task_timeout and self._crew.is_apart:
            self._look_for_late(now)
        if now - self._last_sign > _CHECK_SECONDS:
            self._crew.check()
            self._last_sign = time.monotonic()

    def _look_for_late(self, now: float) -> None:
        """Try those elsewhere that take too long, and alone those that still do.

        The oldest attempts are those being worked on: the clock of the others does not run yet.
        """
        worked_on = list(itertools.islice(self._attempts.values(), self._crew.slots))
        for place in worked_on:
            if not place.live:  # was given up a moment ago
                continue
            place.since = place.since or now
            if now - place.since > (1 + _AGAIN) * self._bounds.task_timeout:
                self._isolate(place)
            elif now - place.since > self._bounds.task_timeout and not place.is_late:
                place.is_late = True
                self._attempt(place)


def most_bytes(task: ChunkTask) -> int:
    """What the chunk of a task can take."""
    layout, n = task.layout, len(task.slices)
    pixels = layout.rows * layout.columns
    image = pixels * layout.samples * np.dtype(layout.image_dtype).itemsize
    mask = pixels * np.dtype(layout.mask_dtype).itemsize
    return room_for(n, image) + room_for(n, mask)
