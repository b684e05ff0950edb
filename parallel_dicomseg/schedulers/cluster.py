"""A crew of workers on a Dask cluster: one of this machine's own, or one that runs already."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from parallel_dicomseg.errors import ConfigurationError, ConversionError, ResumableError
from parallel_dicomseg.records import ChunkTask, ConvertOptions
from parallel_dicomseg.schedulers.crew import Answer, Attempt, Failure, Job, Outcome, delayed
from parallel_dicomseg.schedulers.security import check_allowed, security_for

# A cluster on which no worker shows up, or on which none is left, ends the run.
WORKERS_TIMEOUT_S = 60
SCHEDULER_TIMEOUT_S = 10
# How long a scheduler may take to say who is there, and a result to be fetched.
_REPLY_SECONDS = 10
_FETCH_SECONDS = 2.0
_MAX_FETCH_SECONDS = 60.0
_RESTART_SECONDS = 30
# How often workers are asked before the first task, where some die.
_QUESTIONS = 5
_QUESTION_SECONDS = 60
_ADDRESS = re.compile(r"(?:(?:tcp|tls|ws|wss|ucx)://)?(?:[^/:\s\[\]]+|\[[0-9a-fA-F:]+\]):\d+")
_PACKAGE = "parallel_dicomseg"
# Packages of which another version might make other bytes.
_SAME_VERSIONS = (_PACKAGE, "isal", "numcodecs")

# Of a cluster of our own: a nanny that Dask takes for lost (after 15 s) would never come back.
_OWN_CLUSTER = {
    "distributed.deploy.lost-worker-timeout": "1h",
    # a task that lost two workers is tried alone, which tells more than a third worker would
    "distributed.scheduler.allowed-failures": 1,
    # pages about tasks, logs and stacks, which any user of this machine could read
    "distributed.scheduler.http.routes": ["distributed.http.health"],
    "distributed.worker.http.routes": ["distributed.http.health"],
}


@contextmanager
def cluster_crew(
    job: Job, options: ConvertOptions, workers: int, others: Sequence[str]
) -> Iterator[ClusterCrew]:
    """Reach a cluster and see whether it can do the job; `others` are the names that it is not."""
    try:
        import distributed
    except ImportError:
        raise ConfigurationError(
            f"scheduler is {options.scheduler!r}; that is not one of {', '.join(others)}, and "
            f"for a cluster the package distributed is needed: "
            f'pip install "parallel_dicomseg[distributed]"'
        ) from None
    reached = (
        _own_client(distributed, job, workers)
        if options.scheduler == "distributed"
        else _client(distributed, options, others)
    )
    with _silent_client(), reached as client:
        _check_workers(client, job, options)
        with ClusterCrew(client, job) as crew:
            yield crew


@contextmanager
def _silent_client() -> Iterator[None]:
    """Dask's client logs tracebacks of connections that end; here that is told in one sentence."""
    logger = logging.getLogger("distributed.client")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class ClusterCrew:
    """The workers of a cluster, through Dask's client."""

    is_apart = True

    def __init__(self, client: Any, job: Job) -> None:
        """Take the threads that are there now as the number of slots."""
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.slots = sum(client.nthreads().values())
        self.window = 2 * self.slots + 1
        self._client = client
        self._job = job
        self._run = uuid.uuid4().hex  # two runs may share a scheduler, their keys may not meet
        self._futures: dict[int, Any] = {}
        self._restarts = ThreadPoolExecutor(1, "restart")
        self._alone_since: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        futures, self._futures = list(self._futures.values()), {}
        with suppress(Exception):  # nobody may be left to cancel them
            self._client.cancel(futures, force=True)
        self._restarts.shutdown(cancel_futures=True)

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:
        """Submit a task; not to the worker that `beside` keeps busy, where there is another."""
        attempt = Attempt(self._job.function, task)
        node = delayed(attempt, f"{self._key_prefix(number)}{task.first}")
        future = self._client.compute(node, **self._elsewhere(beside))
        self._futures[number] = future
        self._listen(number)

    def stop(self, number: int) -> None:
        """Cancel an attempt; a worker that is busy with it is started again, or left alone."""
        busy = self._workers_of(number)
        if future := self._futures.pop(number, None):
            future.cancel()
        for worker in busy:
            self._restarts.submit(self._restart, worker)

    def check(self) -> None:
        """See whether scheduler and workers are there.

        Raises
        ------
        ResumableError
            The connection is lost, or there has been no worker for some time.
        """
        if self._client.status not in ("running", "connecting"):
            raise ResumableError("the connection to the Dask scheduler was lost")
        there, who = False, "worker"
        try:
            there = bool(self._ask(self._client.scheduler.ncores))
        except (TimeoutError, OSError, AttributeError):  # no connection: `scheduler` is None
            who = "answer"
        if there:
            self._alone_since = None
            return
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if now - self._alone_since >= WORKERS_TIMEOUT_S:
            raise ResumableError(
                f"the Dask scheduler has had no worker for {WORKERS_TIMEOUT_S} s"
                if who == "worker"
                else f"the Dask scheduler has not answered for {WORKERS_TIMEOUT_S} s"
            )

    def _key_prefix(self, number: int) -> str:
        return f"encode_chunk-{self._run}-{number}-"

    def _ask(self, function: Any) -> Any:
        """What the scheduler replies, in time."""
        return self._client.sync(function, callback_timeout=_REPLY_SECONDS)

    def _workers_of(self, number: int) -> list[str]:
        """The workers that have been given an attempt, by the scheduler's account."""
        prefix = self._key_prefix(number)
        try:
            processing = self._ask(self._client.scheduler.processing)
        except (TimeoutError, OSError, AttributeError):
            return []
        return [
            worker
            for worker, keys in processing.items()
            if any(str(key).startswith(prefix) for key in keys)
        ]

    def _elsewhere(self, beside: int | None) -> dict[str, Any]:
        if beside is None:
            return {}
        busy = self._workers_of(beside)
        try:
            others = [w for w in self._ask(self._client.scheduler.ncores) if w not in busy]
        except (TimeoutError, OSError, AttributeError):
            return {}
        return {"workers": others, "allow_other_workers": True} if busy and others else {}

    def _restart(self, worker: str) -> None:
        with suppress(Exception):  # the next check finds out whether anybody is left
            self._client.restart_workers([worker], timeout=_RESTART_SECONDS, raise_for_error=False)

    def _listen(self, number: int, patience: float = _FETCH_SECONDS) -> None:
        """Have the answer announced when the future is done."""
        self._futures[number].add_done_callback(
            lambda _: self.answers.put((number, partial(self._fetch, number, patience)))
        )

    def _fetch(self, number: int, patience: float) -> Outcome | None:
        """The outcome of a future that is done; None: not any more, its worker was lost since."""
        try:
            return self._received(number, patience)
        except TimeoutError:
            if number in self._futures:
                self._listen(number, min(2 * patience, _MAX_FETCH_SECONDS))
            return None

    def _received(self, number: int, patience: float) -> Outcome:
        """The outcome, fetched from its worker.

        Raises
        ------
        ResumableError
            The scheduler or all workers were lost.
        TimeoutError
            It does not come.
        """
        from distributed import scheduler

        # of the newer versions only
        no_worker = getattr(scheduler, "NoWorkerError", ())
        future = self._futures[number]
        try:
            outcome: Outcome = future.result(timeout=patience)
        except TimeoutError:
            raise
        except scheduler.KilledWorker:
            return Failure("its workers died", to_blame=True, often=True)
        except no_worker:
            raise ResumableError("all workers of the Dask cluster were lost") from None
        except CancelledError:
            raise ResumableError("the connection to the Dask scheduler was lost") from None
        except Exception as error:  # noqa: BLE001  # the transfer's, for attempts never raise
            return Failure(f"the result did not arrive ({type(error).__name__})", to_blame=False)
        else:
            return outcome
        finally:
            if future.done():
                self._futures.pop(number).release()


@contextmanager
def _own_client(distributed: Any, job: Job, workers: int) -> Iterator[Any]:
    """A client of a cluster that ends with it, reached from this machine only."""
    import dask

    job.warm_up()  # compiled here once; every process loads what this leaves on disk
    timeout = {"distributed.scheduler.no-workers-timeout": f"{WORKERS_TIMEOUT_S}s"}
    with (
        dask.config.set({**_OWN_CLUSTER, **timeout}),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # where /health is
            silence_logs=logging.CRITICAL,  # what is lost is done again, or told by us
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _client(distributed: Any, options: ConvertOptions, others: Sequence[str]) -> Iterator[Any]:
    """A client of the cluster that runs at an address or file."""
    address = _scheduler_address(options.scheduler, others)
    security = security_for(distributed, address, options)
    try:
        _knock(*distributed.comm.get_address_host_port(address))
        client = distributed.Client(
            address,
            timeout=f"{WORKERS_TIMEOUT_S}s",
            direct_to_workers=True,  # results need not pass through the scheduler
            set_as_default=False,
            security=security,
        )
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"no Dask scheduler answers at {address}: {error}") from error
    with client:
        yield client


def _scheduler_address(scheduler: str, others: Sequence[str]) -> str:
    """The address itself, or the one in a scheduler file."""
    if not Path(scheduler).is_file():
        if _ADDRESS.fullmatch(scheduler):
            return scheduler
        raise ConfigurationError(
            f"scheduler is {scheduler!r}; it can be {', '.join(others)}, distributed, "
            f"an address such as tcp://host:8786 or a scheduler file that exists"
        )
    try:
        return str(json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(f"{scheduler} is no scheduler file of Dask's") from error


def _knock(host: str, port: int) -> None:
    """Wait until somebody listens there: a Dask client that fails to start leaves a thread."""
    give_up = time.monotonic() + SCHEDULER_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, port), SCHEDULER_TIMEOUT_S).close()
        except ConnectionRefusedError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)
        else:
            return


def _wait_for_worker(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
    except TimeoutError as error:
        raise ResumableError(
            f"the Dask scheduler has had no worker for {WORKERS_TIMEOUT_S} s"
        ) from error


def _check_workers(client: Any, job: Job, options: ConvertOptions) -> None:
    """Ask before the first task whether there are workers with this package who see the files.

    Dask itself waits for ever for a worker that never comes and for one that cannot import.
    """
    _wait_for_worker(client)
    for worker in client.nthreads():
        check_allowed("worker", worker, options)
    try:
        _on_workers(client, importlib.import_module, job.function.__module__)
    except ImportError as error:
        raise ConversionError(
            f"a worker cannot import {_PACKAGE} ({error}); install the same version there"
        ) from error
    for package in _SAME_VERSIONS:
        here = version(package)
        others = sorted(set(_on_workers(client, version, package).values()) - {here})
        if others:
            raise ConversionError(
                f"workers have {package} {', '.join(others)}, here it is {here}; "
                f"other versions may make other bytes"
            )
    seen = _on_workers(client, os.path.isdir, job.root)
    blind = [worker for worker, sees in seen.items() if not sees]
    if blind:
        raise ConversionError(
            f"{len(blind)} of {len(seen)} workers do not see the data directory "
            f"{job.root}; it must be under the same path on every machine"
        )


def _on_workers(client: Any, function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function gives on every worker; one that dies meanwhile is asked after its return.

    Raises
    ------
    ResumableError
        Some do not answer.
    """
    answers: dict[str, Any]
    for _ in range(_QUESTIONS):
        try:
            answers = client.sync(
                client._run, function, *arguments, callback_timeout=_QUESTION_SECONDS
            )
        except TimeoutError:
            break
        except OSError:
            time.sleep(1)
        else:
            return answers
    raise ResumableError("workers of the Dask cluster do not answer")
