"""Run one function over tasks on any of Dask's schedulers; the only room that imports dask.

A scheduler is a function that takes a task and hands out something to wait for. What is done in
a task, and in which order results are used, is decided elsewhere.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from parallel_dicomseg.errors import (
    ConfigurationError,
    ConversionError,
    ParallelDicomSegError,
)
from parallel_dicomseg.records import ChunkTask, EncodedChunk

LOCAL_SCHEDULERS = ("synchronous", "threads", "processes")
# A cluster on which no worker shows up, or on which none is left, ends the run.
_WORKERS_TIMEOUT_S = 60
_SCHEDULER_TIMEOUT_S = 10
_ADDRESS = re.compile(r"(?:(?:tcp|tls|ws|wss|ucx)://)?(?:[^/:\s\[\]]+|\[[0-9a-fA-F:]+\]):\d+")
_PACKAGE = "parallel_dicomseg"
# Packages of which another version might make other bytes.
_SAME_VERSIONS = (_PACKAGE, "isal", "numcodecs")


@dataclass(frozen=True, slots=True)
class Job:
    """What all tasks of a run have in common."""

    function: Callable[[ChunkTask], EncodedChunk]
    window: int
    """Tasks that may be under way at the same time on this machine."""
    root: str
    """Directory that every worker must see."""
    warm_up: Callable[[], object]
    """Compiles all kernels; called before worker processes start, which then load them."""


class Pending(Protocol):
    """A task under way."""

    def result(self) -> EncodedChunk:
        """Wait for it; raises what the task raised."""

    def cancel(self) -> Any:
        """Do not do it, if there is still time."""


Submit = Callable[[ChunkTask], Pending]


@contextmanager
def open_scheduler(job: Job, scheduler: str, workers: int) -> Iterator[tuple[Submit, int]]:
    """Start or reach a scheduler; gives a function to submit tasks, and how many at a time.

    Parameters
    ----------
    scheduler
        'synchronous', 'threads', 'processes', 'distributed' (a cluster of this machine's own), or
        the address or the scheduler file of a Dask cluster that runs.
    workers
        Threads or processes, where they are started here.

    Raises
    ------
    ConfigurationError
        The scheduler is none of these, or does not answer.
    ConversionError
        Its workers cannot do the job.
    """
    if scheduler == "synchronous":
        yield partial(_submit_now, job), 1
    elif scheduler == "threads":
        with ThreadPoolExecutor(workers, "encode") as pool:
            yield from _submit_to(pool, job, scheduler)
    elif scheduler == "processes":
        job.warm_up()
        # Ctrl-C is for this process: workers that it ended would leave their tasks waited for
        with ProcessPoolExecutor(
            workers,
            get_context("spawn"),
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),
        ) as processes:
            yield from _submit_to(processes, job, scheduler)
    else:
        yield from _submit_to_cluster(job, scheduler, workers)


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A task and what to do with it, of which neither a log nor an exception shows anything.

    Workers log what failed with its arguments, and libraries quote headers and paths in the texts
    of their exceptions.
    """

    function: Callable[[ChunkTask], EncodedChunk] = field(repr=False)
    task: ChunkTask = field(repr=False)

    def __call__(self) -> EncodedChunk:
        """Do the task.

        Raises
        ------
        ConversionError
            Something that it should have told as a problem: only its kind and place are known.
        """
        try:
            return self.function(self.task)
        except (ParallelDicomSegError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 whatever it is, its text and arguments stay here
            failure = f"{type(error).__name__} {_place(error)}"
        # outside the handler, so that the exception is not this one's context
        raise ConversionError(
            f"the slices from number {self.task.first} of the plan on could not be converted: "
            f"{failure}; this is a defect of the program, not of the data"
        )


def _place(error: BaseException) -> str:
    """Where in the code an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _delayed(job: Job, task: ChunkTask, run: str) -> Any:
    """The task as a graph of one node whose key says nothing but its place in the plan.

    It is bound to the function beforehand: Dask searches arguments for graphs, which takes 20 ms
    for a task of 64 slices.
    """
    import dask

    key = f"encode_chunk-{run}-{task.first}"
    bound = dask.delayed(_Sealed(job.function, task), name=f"{key}-function", traverse=False)
    return bound(dask_key_name=key)


def _compute(job: Job, task: ChunkTask, scheduler: str, **options: Any) -> EncodedChunk:
    """Run one task on a local scheduler of Dask.

    The graph goes to the scheduler as it is: `compute` would optimise it first, for which it
    pickles and hashes the task (1 to 2 ms).
    """
    import dask

    delayed = _delayed(job, task, "local")
    get = dask.base.get_scheduler(scheduler=scheduler)
    chunk: EncodedChunk
    (chunk,) = get(dict(delayed.__dask_graph__()), [delayed.key], **options)
    return chunk


def _submit_now(job: Job, task: ChunkTask) -> Pending:
    done: Future[EncodedChunk] = Future()
    done.set_result(_compute(job, task, "synchronous"))
    return done


def _submit_to(pool: Executor, job: Job, scheduler: str) -> Iterator[tuple[Submit, int]]:
    """Submit to one of Dask's local schedulers over a pool that all tasks share.

    Each task is a graph of its own, waited for by a thread of its own: so that the number of
    tasks in memory is bounded, and no worker idles between one graph and the next.
    """
    with ThreadPoolExecutor(job.window, "dask") as waiters:
        yield (
            lambda task: waiters.submit(_compute, job, task, scheduler, pool=pool, num_workers=1),
            job.window,
        )


# --- clusters ------------------------------------------------------------------------------------


def _submit_to_cluster(job: Job, scheduler: str, workers: int) -> Iterator[tuple[Submit, int]]:
    try:
        import distributed
    except ImportError:
        raise ConfigurationError(
            f"scheduler is {scheduler!r}; that is not one of {', '.join(LOCAL_SCHEDULERS)}, and "
            f"for a cluster the package distributed is needed: "
            f'pip install "parallel_dicomseg[distributed]"'
        ) from None
    with _client(distributed, job, scheduler, workers) as client:
        _check_workers(client, job)
        run = uuid.uuid4().hex  # two runs may share a scheduler, their keys may not meet
        window = 2 * sum(client.nthreads().values()) + 1
        yield lambda task: _OnCluster(client, client.compute(_delayed(job, task, run))), window


@dataclass(frozen=True, slots=True)
class _OnCluster:
    """A task on a cluster, for which nobody waits when there is nobody left to do it."""

    client: Any
    future: Any

    def result(self) -> EncodedChunk:
        """Wait for the chunk.

        Raises
        ------
        ConversionError
            The scheduler or all workers were lost, or the task cost too many workers their life.
        """
        from distributed import scheduler

        # of the newer versions only
        no_worker = getattr(scheduler, "NoWorkerError", scheduler.KilledWorker)
        while True:
            try:
                chunk: EncodedChunk = self.future.result(timeout=_WORKERS_TIMEOUT_S)
            except TimeoutError:
                _wait_for_worker(self.client)
            except CancelledError as error:
                raise ConversionError("the connection to the Dask scheduler was lost") from error
            except (scheduler.KilledWorker, no_worker) as error:
                raise ConversionError(f"workers were lost: {error}") from error
            else:
                return chunk

    def cancel(self) -> Any:
        """Do not do the task."""
        return self.future.cancel()


@contextmanager
def _client(distributed: Any, job: Job, scheduler: str, workers: int) -> Iterator[Any]:
    """A client of the cluster that runs at an address or file, or of one of our own."""
    if scheduler == "distributed":
        job.warm_up()
        with (
            distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            yield client
        return
    address = _scheduler_address(scheduler)
    try:
        _knock(*distributed.comm.get_address_host_port(address))
        client = distributed.Client(
            address,
            timeout=f"{_WORKERS_TIMEOUT_S}s",
            direct_to_workers=True,  # results need not pass through the scheduler
            set_as_default=False,
        )
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        yield client


def _scheduler_address(scheduler: str) -> str:
    """The address itself, or the one in a scheduler file."""
    if not Path(scheduler).is_file():
        if _ADDRESS.fullmatch(scheduler):
            return scheduler
        raise ConfigurationError(
            f"scheduler is {scheduler!r}; it can be {', '.join(LOCAL_SCHEDULERS)}, distributed, "
            f"an address such as tcp://host:8786 or a scheduler file that exists"
        )
    try:
        return str(json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(f"{scheduler} is no scheduler file of Dask's") from error


def _knock(host: str, port: int) -> None:
    """Wait until somebody listens there: a Dask client that fails to start leaves a thread."""
    give_up = time.monotonic() + _SCHEDULER_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, port), _SCHEDULER_TIMEOUT_S).close()
        except ConnectionRefusedError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)
        else:
            return


def _wait_for_worker(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=_WORKERS_TIMEOUT_S)
    except TimeoutError as error:
        raise ConversionError(
            f"the Dask scheduler has had no worker for {_WORKERS_TIMEOUT_S} s"
        ) from error


def _check_workers(client: Any, job: Job) -> None:
    """Ask before the first task whether there are workers with this package who see the files.

    Dask itself waits for ever for a worker that never comes and for one that cannot import.
    """
    _wait_for_worker(client)
    try:
        client.run(importlib.import_module, job.function.__module__)
    except ImportError as error:
        raise ConversionError(
            f"a worker cannot import {_PACKAGE} ({error}); install the same version there"
        ) from error
    for package in _SAME_VERSIONS:
        here = version(package)
        others = sorted(set(client.run(version, package).values()) - {here})
        if others:
            raise ConversionError(
                f"workers have {package} {', '.join(others)}, here it is {here}; "
                f"other versions may make other bytes"
            )
    seen = client.run(os.path.isdir, job.root)
    blind = [worker for worker, sees in seen.items() if not sees]
    if blind:
        raise ConversionError(
            f"{len(blind)} of {len(seen)} workers do not see the data directory "
            f"{job.root}; it must be under the same path on every machine"
        )
