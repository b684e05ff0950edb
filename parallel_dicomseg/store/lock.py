"""One writer per output: an advisory lock beside the file, gone with the process that holds it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel_dicomseg.errors import ConversionError
from parallel_dicomseg.private import open_private
from parallel_dicomseg.store.journal import beside

LOCK_SUFFIX = ".lock"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold `OUT.h5.lock` while the output is written.

    Raises
    ------
    ConversionError
        Another process holds it, or the directory cannot be written.
    """
    if sys.platform == "win32":
        yield  # HDF5 itself keeps a second writer from opening the file there
        return
    import fcntl

    path = beside(output, LOCK_SUFFIX)
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that has just ended may have removed the file that was opened here
            ours = os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError:
            ours = False
        if not ours:
            raise ConversionError(f"{output} is being written by another run")
        try:
            yield
        finally:
            # removed while held: whoever comes next makes a new file and locks that
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def check_unlocked(output: Path) -> None:
    """Refuse an output that another run is writing at this moment.

    Raises
    ------
    ConversionError
        Another process holds its lock.
    """
    if beside(output, LOCK_SUFFIX).exists():  # else nobody does, and no lock need be made
        with locked(output):
            pass


def _open(path: Path) -> int:
    try:
        return open_private(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConversionError(f"{path.parent} cannot be written: {reason}") from error
