"""Which limits on the input hold in this thread.

Whoever starts work on an input (a scan, a task in a worker) says so once; whoever reads a file asks
here. So a source of annotations, also one of another package, needs no argument for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from parallel_dicomseg.records import Limits

_in_force: ContextVar[Limits] = ContextVar("parallel_dicomseg limits", default=Limits())  # noqa: B039  frozen


def limits() -> Limits:
    """The limits in force in this thread; the defaults where nobody has set any."""
    return _in_force.get()


@contextmanager
def applied(limits: Limits) -> Iterator[None]:
    """Put limits in force in this thread until the block ends."""
    token = _in_force.set(limits)
    try:
        yield
    finally:
        _in_force.reset(token)
