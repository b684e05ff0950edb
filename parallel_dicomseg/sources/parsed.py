"""Annotation files that are parsed whole: once per process, however many tasks draw from them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

from parallel_dicomseg.records import Reason

Flaw = tuple[Reason, str] | tuple[Reason, str, str]
"""Reason, what is wrong, and the only structure that is concerned."""

Content = TypeVar("Content")


class ParsedFiles(Generic[Content]):
    """What files say, kept until they change or others push them out.

    Safe to use from several threads: one parses, the others find it done.
    """

    def __init__(self, parse: Callable[[Path, int], Content | Flaw], most: int) -> None:
        """`parse` takes a file and its size in bytes; `most` files are kept."""
        self._lock = threading.Lock()

        @lru_cache(maxsize=most)
        def kept(file: Path, size: int, modified: int) -> Content | Flaw:  # noqa: ARG001
            return parse(file, size)  # another version of the file is another entry

        self._kept = kept

    def load(self, root: str, path: str) -> Content | Flaw:
        """The content of one file; a flaw where it cannot be read or used."""
        file = Path(root, path)
        try:
            status = file.stat()
            with self._lock:
                return self._kept(file, status.st_size, status.st_mtime_ns)
        except OSError as error:
            return unreadable(error)


def unreadable(error: OSError) -> Flaw:
    """The system's words for a file that it does not give."""
    return Reason.UNREADABLE_FILE, error.strerror or type(error).__name__
