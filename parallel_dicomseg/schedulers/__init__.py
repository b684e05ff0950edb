"""Run one function over tasks on any of Dask's schedulers; the only room that imports dask.

A scheduler is a crew: it is given tasks and puts answers into a queue. In which order answers are
used, and what happens to a task that got none, is decided elsewhere (running.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from parallel_dicomseg.records import ConvertOptions
from parallel_dicomseg.schedulers.cluster import cluster_crew
from parallel_dicomseg.schedulers.crew import Attempt, Crew, Failure, Job, Outcome
from parallel_dicomseg.schedulers.local import NowCrew, ProcessCrew, ThreadCrew
from parallel_dicomseg.schedulers.process import DeadProcessError, WorkerProcess

__all__ = [
    "LOCAL_SCHEDULERS",
    "Attempt",
    "Crew",
    "DeadProcessError",
    "Failure",
    "Job",
    "Outcome",
    "WorkerProcess",
    "open_crew",
]

_LOCAL: dict[str, Callable[[Job, int], AbstractContextManager[Crew]]] = {
    "synchronous": NowCrew,
    "threads": ThreadCrew,
    "processes": ProcessCrew,
}
LOCAL_SCHEDULERS = tuple(_LOCAL)


@contextmanager
def open_crew(job: Job, options: ConvertOptions, workers: int) -> Iterator[Crew]:
    """Start or reach a scheduler.

    Parameters
    ----------
    job
        What all tasks have in common.
    options
        Of them `scheduler` ('synchronous', 'threads', 'processes', 'distributed' for a cluster of
        this machine's own, or the address or the scheduler file of a Dask cluster that runs) and
        how a cluster may be talked to.
    workers
        Threads or processes, where they are started here.

    Raises
    ------
    ConfigurationError
        The scheduler is none of these, does not answer, or may not be talked to.
    ConversionError
        Its workers cannot do the job.
    """
    crew: AbstractContextManager[Crew]
    if options.scheduler in _LOCAL:
        crew = _LOCAL[options.scheduler](job, workers)
    else:
        crew = cluster_crew(job, options, workers, LOCAL_SCHEDULERS)
    with crew as open_one:
        yield open_one
