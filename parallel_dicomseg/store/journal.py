"""The journal beside an unfinished output: which slices are done, where they lie, what was found.

A journal is a run of frames, each with its length and checksums: first one of JSON that says what
is being made, then one per finished task. It is only appended to, so that after a crash the frames
that are whole are a prefix of the plan. Nothing in it names a patient: problems refer to files by
their place in the plan.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.records import (
    AnnotationTable,
    EncodedChunk,
    Int64,
    Layout,
    Measured,
    Problem,
    Reason,
    SliceTable,
    UInt8,
)

JOURNAL_SUFFIX = ".journal"
PARTIAL_SUFFIX = ".partial"
#: The data of a run whose predecessor's had to be copied, see docs/reliability.md.
SECOND_PARTIAL_SUFFIX = ".partial-2"
#: A journal that is kept after its output was finished, for the next `--update`.
SOURCES_SUFFIX = ".sources"
JOURNAL_VERSION = 1

Records = NDArray[np.void]
"""One per slice, see `record_type`."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What the n slices of a plan are made from, to be compared with a later plan's."""

    digests: NDArray[np.uint64]
    """(n, 4) of where each slice comes from (2 numbers), and of what it is made from (2)."""
    key: bytes
    """Of the digests."""


# magic, kind, bytes of the payload, crc32c of the payload, crc32c of all before
_FRAME = struct.Struct("<4s4sQII")
_MAGIC = b"PDSJ"
_PLAN, _TASK = b"PLAN", b"TASK"
# first slice, slices, bytes of the JSON at the end
_TASK_HEAD = struct.Struct("<QQQ")
# A whole frame is read into memory; this is far more than any task needs.
_LONGEST_FRAME = 1 << 30


def beside(output: Path, suffix: str) -> Path:
    """The path of a file that belongs to an output."""
    return output.with_name(output.name + suffix)


def record_type(structures: int, pairs: int) -> np.dtype[np.void]:
    """What is kept per slice: chunks (image, then mask), `Measured`, and what it was made from."""
    per_structure = (structures,)
    return np.dtype(
        [
            ("offset", "<i8", (2,)),
            ("size", "<i8", (2,)),
            ("crc32c", "<u4", (2,)),
            ("has_problem", "?"),
            # digests of where the slice comes from, and of what it was made from
            ("place", "<u8", (2,)),
            ("content", "<u8", (2,)),
            ("annotated", "?", per_structure),
            ("outlined", "?", per_structure),
            ("area", "<i8", per_structure),
            ("components", "<i4", per_structure),
            ("outside", "<i8", (pairs,)),
            ("ellipse_residual", "<f8", per_structure),
            ("contour_digest", "<u8", per_structure),
            ("intensity", "<f8", (4,)),
            ("flags", "<u2"),
            ("cropped", "<i8", per_structure),
        ]
    )


def layout_type(layout: Layout) -> np.dtype[np.void]:
    """The `record_type` of a layout."""
    return record_type(len(layout.structures), len(layout.nested))


def records_of(chunk: EncodedChunk, dtype: np.dtype[np.void]) -> Records:
    """(n,) what is kept of a chunk; where it lies and what it was made from are still zeros."""
    records: Records = np.zeros(len(chunk.image_sizes), dtype)
    records["size"] = np.stack([chunk.image_sizes, chunk.mask_sizes], axis=1)
    records["crc32c"] = np.stack([chunk.image_crc32c, chunk.mask_crc32c], axis=1)
    for f in fields(Measured):
        records[f.name] = getattr(chunk.measured, f.name)
    return records


def measured_of(records: Records) -> Measured:
    """What was measured, of some slices."""
    return Measured(**{f.name: np.ascontiguousarray(records[f.name]) for f in fields(Measured)})


def chunk_of(
    records: Records, first: int, flat: Sequence[UInt8], problems: Sequence[Problem] = ()
) -> EncodedChunk:
    """A chunk as a worker would have made it; `flat` are its encoded images, and its masks."""
    sizes, crc32c = records["size"], records["crc32c"]
    return EncodedChunk(
        first=first,
        image_bytes=flat[0],
        image_sizes=sizes[:, 0].copy(),
        mask_bytes=flat[1],
        mask_sizes=sizes[:, 1].copy(),
        image_crc32c=crc32c[:, 0].copy(),
        mask_crc32c=crc32c[:, 1].copy(),
        measured=measured_of(records),
        problems=tuple(problems),
    )


# --- frames --------------------------------------------------------------------------------------


def _frame(kind: bytes, payload: bytes) -> bytes:
    head = _FRAME.pack(_MAGIC, kind, len(payload), google_crc32c.value(payload), 0)[:-4]
    return head + struct.pack("<I", google_crc32c.value(head)) + payload


def plan_frame(header: Mapping[str, Any]) -> bytes:
    """The first frame of a journal."""
    return _frame(_PLAN, json.dumps(header, sort_keys=True).encode())


def task_frame(first: int, records: Records, problems: Sequence[Mapping[str, Any]]) -> bytes:
    """The frame of a finished task: slices from `first` on, and the problems of `locate`."""
    told = json.dumps(list(problems)).encode() if problems else b""
    head = _TASK_HEAD.pack(first, len(records), len(told))
    return _frame(_TASK, head + records.tobytes() + told)


@dataclass(frozen=True, slots=True)
class Task:
    """A finished task, as the journal has it."""

    first: int
    records: Records
    problems: tuple[dict[str, Any], ...]
    """As `locate` gives them."""
    end: int
    """Where its frame ends in the journal."""


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal that was read."""

    path: Path
    header: dict[str, Any]
    header_end: int
    """Where the first task's frame begins."""
    tasks: tuple[Task, ...]
    """In the order of the plan, without a gap."""

    @property
    def data(self) -> Path:
        """The file that holds the chunks."""
        return self.path.with_name(str(self.header["data"]))

    @property
    def slices_done(self) -> int:
        """Slices of finished tasks, rejected ones among them."""
        return self.tasks[-1].first + len(self.tasks[-1].records) if self.tasks else 0

    @property
    def slices(self) -> int:
        """Slices of the whole plan."""
        return int(self.header["plan"]["slices"])


def read_journal(path: Path) -> Journal | None:
    """What a journal says, up to the first frame that is not whole.

    Returns
    -------
    None where there is no journal, or none that got as far as its first frame.
    """
    try:
        with path.open("rb") as stream:
            frames = _frames(stream.fileno())
            first = _first(frames)
            if first is None:
                return None
            header, header_end = first
            dtype = record_type(int(header["structures"]), int(header["pairs"]))
            return Journal(path, header, header_end, tuple(_tasks(frames, dtype)))
    except FileNotFoundError:
        return None


def read_header(path: Path) -> dict[str, Any] | None:
    """What a journal says of its plan, without its tasks; None as for `read_journal`."""
    try:
        with path.open("rb") as stream:
            first = _first(_frames(stream.fileno()))
    except FileNotFoundError:
        return None
    return first[0] if first else None


def _first(frames: Iterator[tuple[bytes, bytes, int]]) -> tuple[dict[str, Any], int] | None:
    """The header, and where it ends; None where the first frame is none of this version's."""
    kind, payload, end = next(frames, (b"", b"", 0))
    if kind != _PLAN:
        return None
    header: dict[str, Any] = json.loads(payload)
    return (header, end) if header.get("version") == JOURNAL_VERSION else None


def _frames(descriptor: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Kind and payload of each whole frame, and where it ends."""
    at, size = 0, os.fstat(descriptor).st_size
    while True:
        head = os.pread(descriptor, _FRAME.size, at)
        if len(head) < _FRAME.size:
            return
        magic, kind, length, crc32c, own = _FRAME.unpack(head)
        if magic != _MAGIC or own != google_crc32c.value(head[:-4]):
            return
        at += _FRAME.size
        if length > min(size - at, _LONGEST_FRAME):
            return
        payload = os.pread(descriptor, length, at)
        if google_crc32c.value(payload) != crc32c:
            return
        at += length
        yield kind, payload, at


def _tasks(frames: Iterator[tuple[bytes, bytes, int]], dtype: np.dtype[np.void]) -> Iterator[Task]:
    done = 0
    for kind, payload, end in frames:
        if kind != _TASK:
            return
        first, count, told = _TASK_HEAD.unpack_from(payload)
        if first != done:
            return
        done += count
        records = np.frombuffer(payload, dtype, count, _TASK_HEAD.size)
        problems = json.loads(payload[len(payload) - told :]) if told else []
        yield Task(first, records, tuple(problems), end)


# --- problems without names ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """The files of a plan, so that a problem can be kept without a path."""

    slices: SliceTable
    annotations: AnnotationTable | None

    def locate(self, problem: Problem, first: int, count: int) -> tuple[dict[str, Any], Int64]:
        """A problem of the slices from `first` on, as the journal keeps it.

        Returns
        -------
        The problem, and which of the `count` slices it is about.
        """
        here = self._names(first, count)
        detail = problem.detail.replace("\0", "")
        for path in sorted(here, key=len, reverse=True):
            detail = detail.replace(path, f"\0{here[path][0]}\0")
        kept = {
            "reason": problem.reason,
            "detail": detail,
            "structure": problem.structure,
            "place": "",
        }
        if problem.path not in here:
            return kept, np.arange(count)
        place, concerned = here[problem.path]
        return {**kept, "place": place}, np.array(sorted(concerned), np.int64) - first

    def _names(self, first: int, count: int) -> dict[str, tuple[str, set[int]]]:
        """What the journal calls each file of some slices, and the slices that it is about."""
        found: dict[str, tuple[str, set[int]]] = {}
        for row, path in enumerate(self.slices.path[first : first + count].tolist(), first):
            found.setdefault(os.fsdecode(path), (f"slice {row}", set()))[1].add(row)
        if self.annotations is None:
            return found
        start, end = np.searchsorted(self.annotations.slice, (first, first + count)).tolist()
        drawn = self.annotations.path[start:end].tolist()
        rows = self.annotations.slice[start:end].tolist()
        for index, (path, row) in enumerate(zip(drawn, rows, strict=True), start):
            found.setdefault(os.fsdecode(path), (f"annotation {index}", set()))[1].add(row)
        return found

    def problem(self, kept: Mapping[str, Any]) -> Problem:
        """The problem that `locate` has made this of."""
        # every other part is a place
        parts = kept["detail"].split("\0")
        parts[1::2] = map(self._path, parts[1::2])
        return Problem(
            self._path(kept["place"]), Reason(kept["reason"]), "".join(parts), kept["structure"]
        )

    def _path(self, place: str) -> str:
        kind, _, row = place.partition(" ")
        if kind == "slice":
            return os.fsdecode(self.slices.path[int(row)])
        if kind == "annotation" and self.annotations is not None:
            return os.fsdecode(self.annotations.path[int(row)])
        return ""


# --- what differs --------------------------------------------------------------------------------


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two plans do not have in common, as 'name: then, now', the names dotted."""
    flat_then, flat_now = dict(_flat(then)), dict(_flat(now))
    names = sorted(flat_then.keys() | flat_now.keys())
    return [
        f"{name}: {_said(flat_then, name)} then, {_said(flat_now, name)} now"
        for name in names
        if flat_then.get(name) != flat_now.get(name)
    ]


def _said(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "nothing"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
