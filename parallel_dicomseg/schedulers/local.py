"""Crews of this machine: the calling thread, threads, and worker processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Self

from parallel_dicomseg.records import ChunkTask
from parallel_dicomseg.schedulers.crew import (
    Answer,
    Attempt,
    Failure,
    Job,
    Outcome,
    already,
    compute,
)
from parallel_dicomseg.schedulers.process import DeadProcessError, WorkerProcess


class _LocalCrew:
    """What local crews have in common: they are there as long as this process."""

    is_apart = False

    def __init__(self, job: Job, workers: int) -> None:
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.slots = workers
        self.window = job.window
        self._job = job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self, number: int) -> None:
        """A thread cannot be stopped."""

    def check(self) -> None:
        """The workers are this process."""


class NowCrew(_LocalCrew):
    """Does each task when it is given: no thread, no process."""

    def __init__(self, job: Job, workers: int) -> None:  # noqa: ARG002  # there is one
        super().__init__(job, 1)
        self.window = 1

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:  # noqa: ARG002
        """Do the task."""
        outcome = compute(Attempt(self._job.function, task), task.first, "synchronous")
        self.answers.put((number, already(outcome)))


class ThreadCrew(_LocalCrew):
    """Threads of one pool under Dask's threaded scheduler.

    Each task is a graph of its own, waited for by a thread of its own: so that the number of
    tasks in memory is bounded, and no worker idles between one graph and the next.
    """

    def __init__(self, job: Job, workers: int) -> None:
        super().__init__(job, workers)
        self._pool = ThreadPoolExecutor(workers, "encode")
        self._waiters = ThreadPoolExecutor(job.window, "dask")

    def __exit__(self, *_: object) -> None:
        self._waiters.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
        self._waiters.shutdown()

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:  # noqa: ARG002
        """Have a thread do the task."""
        attempt = Attempt(self._job.function, task)
        waited = self._waiters.submit(
            compute, attempt, task.first, "threads", pool=self._pool, num_workers=1
        )
        waited.add_done_callback(partial(self._answered, number))

    def _answered(self, number: int, waited: Future[Outcome]) -> None:
        if not waited.cancelled():
            self.answers.put((number, waited.result))


class ProcessCrew(_LocalCrew):
    """Worker processes, each fed by a thread of its own through Dask's process scheduler.

    A process that dies takes one task with it and is started again.
    """

    is_apart = True

    def __init__(self, job: Job, workers: int) -> None:
        super().__init__(job, workers)
        self._todo: SimpleQueue[tuple[int, ChunkTask] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._busy: dict[int, WorkerProcess] = {}
        self._stopped: set[int] = set()
        self._ended = False
        self._workers = [WorkerProcess(job.warm_up) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._feed, args=(worker,), name="feed")
            for worker in self._workers
        ]

    def __enter__(self) -> Self:
        self._job.warm_up()  # compiled here once; every process loads what this leaves on disk
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for worker in self._workers:
            worker.shutdown(wait=False)
            self._todo.put(None)
        for thread in self._threads:
            if thread.ident:
                thread.join()
        for worker in self._workers:
            worker.shutdown()

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:  # noqa: ARG002
        """Have a process do the task: another than `beside`'s, for that one is busy."""
        self._todo.put((number, task))

    def stop(self, number: int) -> None:
        """End the process that works on an attempt, or forget the attempt."""
        with self._lock:
            self._stopped.add(number)
            if worker := self._busy.get(number):
                worker.kill()

    def _feed(self, worker: WorkerProcess) -> None:
        while (given := self._todo.get()) and not self._ended:
            number, task = given
            with self._lock:
                if number in self._stopped:
                    continue
                self._busy[number] = worker
            answer = self._attempt(worker, task)
            with self._lock:
                del self._busy[number]
            self.answers.put((number, answer))

    def _attempt(self, worker: WorkerProcess, task: ChunkTask) -> Callable[[], Outcome]:
        attempt = Attempt(self._job.function, task)
        try:
            outcome = compute(attempt, task.first, "processes", pool=worker, num_workers=1)
        except DeadProcessError as death:
            return already(Failure(f"its worker process {death}", to_blame=True))
        except BaseException as error:  # noqa: BLE001  # raised where answers are read
            return partial(_fail, error)
        return already(outcome)


def _fail(error: BaseException) -> Outcome:
    raise error
