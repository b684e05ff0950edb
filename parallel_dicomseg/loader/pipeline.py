"""Threads that fill a ring of batches ahead of whoever takes them, and end when nobody does.

The threads know the shared state only, never the iterator. So an iterator that is dropped can be
collected, and its finalizer tells the threads to end. What is shared is guarded by one condition;
batches carry their number, and leave in the order of their numbers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from parallel_dicomseg.loader.readers import Clock, Scratch

Buffers = tuple[NDArray[Any], ...]
# A thread looks for the end between two pieces; one that is stuck in a read is not waited for.
_JOIN_SECONDS = 5.0


class Job(Protocol):
    """What the threads do: batches by number, each in pieces."""

    @property
    def count(self) -> int:
        """How many batches there are; it may grow, see `Pipeline.grown`."""

    @property
    def is_open(self) -> bool:
        """Whether `count` may still grow."""

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """First sample and end of each piece of a batch; at least one."""

    def fill(
        self, number: int, start: int, end: int, buffers: Buffers, scratch: Scratch, clock: Clock
    ) -> None:
        """Make a piece, in its place in the buffers of a whole batch."""


class Ring:
    """Buffers of whole batches, used again as soon as nobody refers to them.

    What the consumer gets are views. As long as any view of a buffer lives, whoever holds it, the
    buffer stays out of use and another one is made: a batch that is kept is never overwritten.
    Several pipelines may share a ring.
    """

    # There is no lock: the garbage collector may run while one is held, and what it collects may be
    # an iterator whose threads wait for it. Single operations of a dict are atomic.

    def __init__(self, make: Callable[[], Buffers], keep: int) -> None:
        self._make = make
        self._keep = keep
        self._given: dict[int, Buffers] = {}

    def take(self) -> Buffers:
        """Buffers that nobody uses, with any content."""
        # the last one that was given back is the likeliest to be in the processor's cache
        for key in reversed(list(self._given)):
            known = self._given.get(key)
            if known is None or not _is_unused(known):
                continue
            buffers = self._given.pop(key, None)
            if buffers is not None:
                if _is_unused(buffers):
                    return buffers
                # another thread had it in the meantime, and gave it back in use
                self._given[key] = buffers
        for key in list(self._given)[: -self._keep]:
            self._given.pop(key, None)
        return self._make()

    def give(self, buffers: Buffers) -> None:
        """Buffers of which views, or nothing, are in use from now on.

        Whoever wants to see their content must have a view of each already.
        """
        self._given[id(buffers)] = buffers


def _references(buffers: Buffers) -> int:
    return max(sys.getrefcount(array) for array in buffers)


def _measure_unused() -> int:
    """What `_references` counts where only a tuple holds an array."""
    import numpy as np

    return _references((np.empty(1),))


_UNUSED = _measure_unused()


def _is_unused(buffers: Buffers) -> bool:
    return _references(buffers) <= _UNUSED


def _views(buffers: Buffers) -> Buffers:
    return tuple(array[...] for array in buffers)


@dataclass(slots=True)
class _Slot:
    """A batch that is being made, or ready."""

    buffers: Buffers
    left: int
    """Pieces that are not finished."""
    error: BaseException | None = None


class _Shared:
    """What threads and consumer share; a lock guards all that changes.

    Nobody is woken for nothing: threads hand the interpreter to each other at every waking.
    """

    def __init__(self, job: Job, ring: Ring, prefetch: int) -> None:
        self.job = job
        self.ring = ring
        self.prefetch = prefetch
        # reentrant: the garbage collector may end a pipeline in a thread that holds it
        lock = threading.RLock()
        self.is_ready = threading.Condition(lock)
        """Where the consumer waits."""
        self.has_work = threading.Condition(lock)
        """Where threads wait."""
        self.next_batch = 0
        """The batch of which pieces are handed out."""
        self.waiting: list[tuple[int, int]] = []
        """Pieces of the batch before that, not handed out yet, the last one first."""
        self.taken = 0
        """Batches that the consumer has taken."""
        self.slots: dict[int, _Slot] = {}
        self.clock = Clock()
        self.ended = False
        self.failure: BaseException | None = None
        """Why a thread could not go on."""

    def exchange(
        self, finished: _Slot | None, error: BaseException | None, clock: Clock
    ) -> tuple[int, int, int, _Slot] | None:
        """Note that a piece is done, and say what to do next.

        Returns
        -------
        Number, first sample, end and slot; None: nothing any more.
        """
        with self.has_work:
            if finished is not None:
                self._finish(finished, error, clock)
            while not self.ended:
                if self.waiting:
                    number = self.next_batch - 1
                    return number, *self.waiting.pop(), self.slots[number]
                if self.next_batch >= self.job.count:
                    if not self.job.is_open:
                        return None
                elif self.next_batch < self.taken + self.prefetch:
                    self._begin()
                    continue
                start = time.perf_counter()
                self.has_work.wait()
                clock.blocked += time.perf_counter() - start
            return None

    def _begin(self) -> None:
        """Hand out the next batch."""
        pieces = self.job.pieces(self.next_batch)
        self.slots[self.next_batch] = _Slot(self.ring.take(), len(pieces))
        self.waiting = pieces[::-1]
        self.next_batch += 1
        self.has_work.notify(len(pieces) - 1)

    def _finish(self, slot: _Slot, error: BaseException | None, clock: Clock) -> None:
        slot.left -= 1
        slot.error = slot.error or error
        self.clock.add(clock)
        if not slot.left and slot is self.slots.get(self.taken):
            self.is_ready.notify_all()

    def take(self) -> tuple[Buffers, float]:
        """Views of the buffers of the next batch, and the seconds that they had to be waited for.

        Raises
        ------
        BaseException
            What a thread raised while it made the batch.
        """
        start = time.perf_counter()
        with self.is_ready:
            number = self.taken
            while (slot := self.slots.get(number)) is None or slot.left:
                if self.failure is not None:
                    raise self.failure
                if self.ended:
                    raise RuntimeError("the loader was closed while a batch was waited for")
                self.is_ready.wait()
            del self.slots[number]
            # before the ring has them: a thread takes what nobody has a view of
            views = _views(slot.buffers)
            self.ring.give(slot.buffers)
            if slot.error is not None:
                raise slot.error
            self.taken += 1
            self.has_work.notify()
        return views, time.perf_counter() - start

    def wake(self) -> None:
        """Let the threads see that the job has grown."""
        with self.has_work:
            self.has_work.notify_all()

    def end(self) -> None:
        """Let the threads end after the pieces that they are at."""
        with self.has_work:
            self.ended = True
            self.has_work.notify_all()
            self.is_ready.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the consumer know of a thread that cannot go on."""
        with self.has_work:
            self.failure = self.failure or error
            for slot in self.slots.values():
                slot.error = slot.error or error
                slot.left = 0
            self.ended = True
            self.has_work.notify_all()
            self.is_ready.notify_all()


def _work(shared: _Shared) -> None:
    """What a thread does."""
    clock, scratch = Clock(), Scratch()
    slot: _Slot | None = None
    error: BaseException | None = None
    try:
        while (piece := shared.exchange(slot, error, clock)) is not None:
            number, start, end, slot = piece
            error = None
            try:
                shared.job.fill(number, start, end, slot.buffers, scratch, clock)
            except BaseException as caught:  # noqa: BLE001  the consumer raises it
                error = caught
            del piece
    except BaseException as caught:  # noqa: BLE001  a thread that cannot go on: the consumer learns it
        shared.fail(caught)


def _stop(shared: _Shared, threads: list[threading.Thread], pid: int) -> None:
    """End the threads and wait for them; a fork's copy has none, and its lock may be held."""
    if pid != os.getpid():
        return
    shared.end()
    # The garbage collector may call this from one of the threads, and that one may hold the lock.
    if threading.current_thread() in threads:
        return
    give_up = time.monotonic() + _JOIN_SECONDS
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # never started
            thread.join(max(0.0, give_up - time.monotonic()))


class Pipeline:
    """The batches of a job, made ahead by threads; close it, or drop it."""

    def __init__(self, job: Job, ring: Ring, prefetch: int, threads: int) -> None:
        self._shared = _Shared(job, ring, prefetch)
        most = sum(len(job.pieces(k)) for k in range(min(job.count, prefetch)))
        self._threads = [
            threading.Thread(
                target=_work, args=(self._shared,), name=f"batch-loader-{k}", daemon=True
            )
            for k in range(min(threads, most))
        ]
        # also called when the interpreter exits, while threads can still be waited for
        self._finalizer = weakref.finalize(self, _stop, self._shared, self._threads, os.getpid())
        for thread in self._threads:
            thread.start()

    def take(self) -> tuple[Buffers, float]:
        """Views of the next batch's buffers, and the seconds that it was waited for."""
        return self._shared.take()

    def grown(self) -> None:
        """Tell the threads that there are more batches, or that there will be no more."""
        self._shared.wake()

    @property
    def clock(self) -> Clock:
        """Seconds of all threads so far."""
        return self._shared.clock

    def close(self) -> None:
        """End the threads; a second call does nothing."""
        self._finalizer()
