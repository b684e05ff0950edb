"""What a plan and its slices are, in a form that a later run can compare with its own.

No name is in it: what a plan is made from is a digest, and the digests of single slices have a key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.decoders import decoder_for
from parallel_dicomseg.plan import Plan, tasks
from parallel_dicomseg.records import ChunkTask, ConvertOptions, SliceTable

# Packages of which another version might make other bytes.
_PACKAGES = ("parallel_dicomseg", "isal", "numcodecs")
#: Of a fingerprint: what differs between two plans of which slices are equal nevertheless.
OF_ALL_SLICES = ("slices", "cohort")
_DIGEST_BYTES = 16
_BLOCK_BYTES = 1 << 20


def plan_fingerprint(plan: Plan, options: ConvertOptions) -> dict[str, Any]:
    """All that decides the chunks of a plan that was made with these options, for JSON.

    Plans with equal fingerprints have equal chunks.
    """
    layout = asdict(plan.layout)
    layout["pad_value"] = repr(layout["pad_value"])
    del layout["slices"], layout["keep_identity"]
    cohort = plan.cohort
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for table in (cohort.slices, cohort.annotations):
        for f in fields(table):
            _add(digest, f.name, getattr(table, f.name))
    _add(digest, "grid", plan.grid)
    return {
        "slices": plan.layout.slices,
        "cohort": digest.hexdigest(),
        "scanned_with": list(cohort.scanned_with),
        "layout": _plain(layout),
        "versions": {name: version(name) for name in _PACKAGES},
        "decoders": decoders_of(cohort.slices),
        **({"compare": options.compare} if options.update else {}),
    }


def decoders_of(slices: SliceTable) -> dict[str, str]:
    """What decodes each compressed transfer syntax of the images, and its version."""
    columns = (slices.transfer_syntax_uid, slices.bits_allocated, slices.samples_per_pixel)
    kinds = sorted(set(zip(*(column.tolist() for column in columns), strict=True)))
    texts = ((uid.decode("ascii", "replace"), *numbers) for uid, *numbers in kinds)
    return {
        uid: decoder.release
        for uid, bits_allocated, samples in texts
        if (decoder := decoder_for(uid, bits_allocated, samples)) and decoder.release
    }


def _add(digest: Any, name: str, column: NDArray[Any]) -> None:
    digest.update(f"{name} {column.dtype.str} {column.shape} ".encode())
    digest.update(np.ascontiguousarray(column).view(np.uint8).data)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def slice_sources(plan: Plan, key: bytes, *, by_content: bool) -> NDArray[np.uint64]:
    """(n, 4) digests of where each slice comes from (2 numbers), and of what it is made from (2).

    Parameters
    ----------
    key
        Of the digests, up to 64 bytes: without it they say nothing.
    by_content
        A file is known by its bytes; else by its size and the time when it was changed.
    """
    files = _Files(Path(plan.cohort.root), by_content)
    out = np.zeros((plan.layout.slices, 4), np.uint64)
    for task in tasks(plan):
        for row, (place, content) in enumerate(_described(task, files), task.first):
            for k, text in enumerate((place, content)):
                raw = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), key=key)
                out[row, 2 * k : 2 * k + 2] = np.frombuffer(raw.digest(), "<u8", 2)
    return out


def _described(task: ChunkTask, files: _Files) -> Iterator[tuple[str, str]]:
    """Where each slice of a task comes from, and what it is made from, as text."""
    slices, annotations = task.slices, task.annotations
    columns = zip(*(getattr(slices, f.name) for f in fields(slices)), strict=True)
    drawn = zip(*(getattr(annotations, f.name) for f in fields(annotations)), strict=True)
    by_plane = {plane: [row[1:] for row in rows] for plane, rows in groupby(drawn, lambda r: r[0])}
    for plane, (column, path, frame) in enumerate(
        zip(columns, slices.path, slices.frame, strict=True)
    ):
        mine = by_plane.get(plane, [])
        states = [files.state(name) for name in sorted({path, *(row[3] for row in mine)})]
        yield repr((path, frame)), repr((column, mine, states))


class _Files:
    """What tells a version of a file from another one."""

    def __init__(self, root: Path, by_content: bool) -> None:
        self._root = root
        self._by_content = by_content
        self._known: dict[str, Any] = {}

    def state(self, path: str) -> Any:
        """Of one file; None where it cannot be read."""
        if path not in self._known:
            try:
                self._known[path] = self._look(self._root / path)
            except OSError:
                self._known[path] = None
        return self._known[path]

    def _look(self, path: Path) -> Any:
        if self._by_content:
            digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
            return digest.hexdigest()
        status = os.stat(path)  # noqa: PTH116  as fast as it gets
        return status.st_size, status.st_mtime_ns
