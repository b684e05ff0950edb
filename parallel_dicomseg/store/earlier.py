"""A finished output that an update starts from, and the journal that was kept beside it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import checksums
from parallel_dicomseg.errors import VerificationError
from parallel_dicomseg.records import EncodedChunk, Int64
from parallel_dicomseg.store.dataset import open_dataset
from parallel_dicomseg.store.journal import (
    JOURNAL_SUFFIX,
    SOURCES_SUFFIX,
    Journal,
    Records,
    beside,
    chunk_of,
    read_header,
    read_journal,
)
from parallel_dicomseg.store.unfinished import read_chunks

_KEY_BYTES = 32
_NEW = -1


@dataclass(frozen=True, slots=True)
class Comparison:
    """The n slices of a plan against those of an earlier output."""

    earlier: Int64
    """(n,) place of an equal slice in the earlier plan; -1 where it must be converted."""
    changed: Int64
    """Slices of the plan that come from where an earlier one came, but from something else."""
    added: int
    vanished: Int64
    """Slices of the earlier plan that come from where nothing is now."""


def sources_key(output: Path) -> bytes:
    """The key of the digests that are kept beside an output: what is there, or a new one."""
    for suffix in (JOURNAL_SUFFIX, SOURCES_SUFFIX):
        header = read_header(beside(output, suffix))
        if header is not None and header["sources_key"]:
            return bytes.fromhex(header["sources_key"])
    return secrets.token_bytes(_KEY_BYTES)


class Earlier:
    """Slices of an earlier output; to be used as a context."""

    def __init__(self, output: Path, journal: Journal) -> None:
        self._output = output
        self.plan: Mapping[str, Any] = journal.header["plan"]
        """What it was made from."""
        self._records: Records = np.concatenate([task.records for task in journal.tasks])
        self._held = ExitStack()
        self._descriptor = -1

    @classmethod
    def of(cls, output: Path) -> Self | None:
        """What is known of an output; None where nothing was kept."""
        journal = read_journal(beside(output, SOURCES_SUFFIX))
        if journal is None or not journal.tasks or not output.exists():
            return None
        return cls(output, journal)

    def __enter__(self) -> Self:
        self._descriptor = self._held.enter_context(self._output.open("rb")).fileno()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def compare(self, sources: NDArray[np.uint64], *, same_plan: bool) -> Comparison:
        """Find the slices of a plan again.

        Parameters
        ----------
        sources
            (n, 4) as for `Hdf5Writer`, with the same key.
        same_plan
            Whether equal slices of both plans have equal chunks.
        """
        by_place = {place: k for k, place in enumerate(_pairs(self._records["place"]))}
        content = self._records["content"]
        usable = (self._records["size"][:, 0] > 0) & ~self._records["has_problem"] & same_plan
        earlier = np.full(len(sources), _NEW, np.int64)
        changed, added = [], 0
        places = _pairs(sources[:, :2])
        for k, place in enumerate(places):
            known = by_place.get(place, _NEW)
            if known == _NEW:
                added += 1
            elif (content[known] != sources[k, 2:]).any():
                changed.append(k)
            elif usable[known]:
                earlier[k] = known
        gone = by_place.keys() - set(places)
        return Comparison(
            earlier=earlier,
            changed=np.array(changed, np.int64),
            added=added,
            vanished=np.array(sorted(by_place[place] for place in gone), np.int64),
        )

    def chunk(self, first: int, rows: Int64) -> EncodedChunk:
        """Slices of the earlier plan as a task of the new one, which begins at `first`.

        Raises
        ------
        VerificationError
            The earlier output does not hold them any more.
        """
        records = self._records[rows]
        try:
            flat = read_chunks(self._descriptor, records)
        except OSError:
            flat = None
        if flat is None or any(
            (checksums(flat[k], records["size"][:, k]) != records["crc32c"][:, k]).any()
            for k in (0, 1)
        ):
            raise VerificationError(
                f"{self._output} is damaged, or is not what {beside(self._output, SOURCES_SUFFIX)} "
                f"was written for; --overwrite converts everything anew"
            )
        return chunk_of(records, first, flat)

    def patients_of(self, rows: Int64) -> dict[str, int]:
        """Slices of the earlier plan by the patient that the earlier output names."""
        good = self._records["size"][:, 0] > 0
        stored = (np.cumsum(good) - 1)[rows[good[rows]]]
        with open_dataset(self._output) as dataset:
            names, counts = np.unique(dataset.column("patient_id")[stored], return_counts=True)
        texts = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
        return dict(zip(texts, counts.tolist(), strict=True))


def _pairs(digests: NDArray[np.uint64]) -> list[bytes]:
    """Each row (2 numbers) as a key."""
    flat = np.ascontiguousarray(digests)
    return [bytes(row) for row in flat.view("V16").ravel()] if len(flat) else []
