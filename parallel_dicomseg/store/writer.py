"""Write an output: one writer, ready chunks, a journal, and an atomic rename as the last act.

While it is being made, the output is `OUT.h5.partial`, with a journal beside it that says which
slices are done. After a crash HDF5 starts anew on the same bytes with the same calls; it comes to
the same places, or else (another version of it) the chunks are copied. docs/reliability.md argues
the order of writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.deidentify import Policy, conceal_paths
from parallel_dicomseg.errors import (
    ConfigurationError,
    ConversionError,
    ParallelDicomSegError,
    ResumableError,
    VerificationError,
)
from parallel_dicomseg.records import (
    FLAGS,
    WHOLE_IMAGE,
    AnnotationTable,
    EncodedChunk,
    Float64,
    Headers,
    Layout,
    MarkTable,
    Problem,
    SliceTable,
    Summary,
)
from parallel_dicomseg.store.disk import SYSTEM, Disk
from parallel_dicomseg.store.hdf5 import Metadata, chunk_index, write_metadata
from parallel_dicomseg.store.journal import (
    JOURNAL_SUFFIX,
    JOURNAL_VERSION,
    PARTIAL_SUFFIX,
    SECOND_PARTIAL_SUFFIX,
    SOURCES_SUFFIX,
    Journal,
    Places,
    Records,
    Sources,
    Task,
    beside,
    chunk_of,
    differences,
    layout_type,
    measured_of,
    read_header,
    read_journal,
    records_of,
)
from parallel_dicomseg.store.lock import locked
from parallel_dicomseg.store.sealing import seal_file
from parallel_dicomseg.store.table import Columns, table_columns
from parallel_dicomseg.store.unfinished import (
    MovedError,
    Unfinished,
    file_checksums,
    intact_tasks,
    read_chunks,
)

# A journal that is written while another one still counts.
_NEXT_JOURNAL_SUFFIX = ".journal-2"
# Differences between two plans that a message names.
_NAMED_DIFFERENCES = 4


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an unfinished run has left beside an output."""

    data: Path
    slices_done: int
    slices: int


def find_leftover(output: Path) -> Leftover | None:
    """What an unfinished run has left beside an output, or None."""
    journal = read_journal(beside(output, JOURNAL_SUFFIX))
    if journal is None or not journal.tasks or not journal.data.exists():
        return None
    return Leftover(journal.data, journal.slices_done, journal.slices)


class Hdf5Writer:
    """Puts encoded chunks into `OUT.h5.partial` in plan order; `publish` makes it OUT.h5.

    Rejected slices leave no gap: rows of the file are the good slices, in plan order. Not
    thread-safe. Leaving the context without `publish` keeps what is finished where the reason is
    the machine (any exception but those of errors.py, and of these `ResumableError` and
    `VerificationError`), and else removes it.
    """

    def __init__(
        self,
        output: Path,
        layout: Layout,
        slices: SliceTable,
        *,
        headers: Headers | None = None,
        annotations: AnnotationTable | None = None,
        grid: Float64 | None = None,
        marks: MarkTable | None = None,
        identity: Policy | None = None,
        root: str = "",
        provenance: Mapping[str, Sequence[str]] | None = None,
        overwrite: bool = False,
        plan: Mapping[str, Any] | None = None,
        resume: bool = False,
        sources: Sources | None = None,
        disk: Disk = SYSTEM,
        on_commit: Callable[[int], object] | None = None,
    ) -> None:
        """Prepare; nothing is written before the context is entered.

        Parameters
        ----------
        output
            The file that `publish` makes.
        layout, slices
            Of the plan, n slices.
        headers
            Attributes of the n slices; none by default.
        annotations
            What is drawn on the n slices, so that problems of its files can be kept.
        grid
            (n, 4) where each stored image lies on its source, as in `SliceRefs.grid`; by default
            all are stored as they are.
        marks
            Points on the n slices; none by default.
        identity
            What the file may say of patients; `layout.keep_identity` alone by default.
        root
            The data directory, from which headers are read in full where identity is kept.
        provenance
            Further attributes of the root that say how the file was made: lists of texts, as
            docs/format.md names them.
        overwrite
            Replace an existing output.
        plan
            What is being made, for JSON: a run goes on only with what was begun with an equal one.
        resume
            Go on with what an earlier run of the same plan has finished, if there is any.
        sources
            Of the n slices: with them the journal is kept beside the output, for the next update.
        disk
            How to write.
        on_commit
            Called, in a thread, with the number of slices that are safe on the disk.
        """
        self._output = output
        self._layout = layout
        self._slices = slices
        self._headers = headers or {}
        self._places = Places(slices, annotations)
        self._grid = np.tile(WHOLE_IMAGE, (len(slices), 1)) if grid is None else grid
        self._marks = marks or MarkTable.empty()
        self._identity = identity or Policy(keep_identity=layout.keep_identity)
        self._root = root
        self._provenance = provenance or {}
        self._overwrite = overwrite
        self._resume = resume
        self._sources = sources
        self._disk = disk
        self._on_commit = on_commit
        self._header: dict[str, Any] = {
            "version": JOURNAL_VERSION,
            "plan": {"slices": layout.slices, **(plan or {})},
            "structures": len(layout.structures),
            "pairs": len(layout.nested),
            "overwrite": overwrite,
            "sources_key": sources.key.hex() if sources else "",
        }
        self._journal = beside(output, JOURNAL_SUFFIX)
        self._held = ExitStack()
        self._unfinished: Unfinished | None = None
        self._records: list[Records] = []
        self._problems: list[Problem] = []
        self._rows = 0
        self.slices_seen = 0
        """Slices put so far or finished before, rejected ones among them."""
        self.slices_resumed = 0
        """Of these, the ones that an earlier run has finished."""

    # --- beginning and ending --------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(locked(self._output))
            held.callback(self._close)
            with _as_resumable(beside(self._output, PARTIAL_SUFFIX)):
                settle(self._output, self._disk)
                journal = read_journal(self._journal) if self._resume else None
                if journal is not None and journal.data.exists():
                    self._go_on(journal)
                else:
                    self._disk.remove(beside(self._output, SECOND_PARTIAL_SUFFIX))
                    self._unfinished = self._begin(PARTIAL_SUFFIX, self._journal)
            self._held = held.pop_all()
        return self

    def _close(self) -> None:
        if self._unfinished is not None:
            self._unfinished.close()

    def _begin(self, suffix: str, journal: Path) -> Unfinished:
        data = beside(self._output, suffix)
        return Unfinished.fresh(
            data, journal, self._header, self._disk, self._layout, self._on_commit
        )

    def _go_on(self, journal: Journal) -> None:
        """Take over what an earlier run has finished."""
        if different := differences(journal.header["plan"], self._header["plan"]):
            named = "; ".join(different[:_NAMED_DIFFERENCES])
            more = len(different) - _NAMED_DIFFERENCES
            raise ConfigurationError(
                f"{journal.data} was begun with something else, it cannot be resumed ({named}"
                f"{f'; and {more} more' if more > 0 else ''}); --overwrite starts anew"
            )
        self._overwrite = self._overwrite or bool(journal.header["overwrite"])
        tasks = intact_tasks(journal)
        try:
            self._unfinished = Unfinished.resumed(
                journal, tasks, self._disk, self._layout, self._on_commit
            )
        except MovedError:
            self._copy(journal, tasks)
        else:
            for task in tasks:
                problems = [self._places.problem(kept) for kept in task.problems]
                self._take(task.records, problems)
        self.slices_resumed = self.slices_seen

    def _copy(self, journal: Journal, tasks: Sequence[Task]) -> None:
        """Put finished chunks into a file of their own, whose journal then becomes the one.

        Until then the old files count, so that this can be interrupted as well.
        """
        suffixes = {PARTIAL_SUFFIX: SECOND_PARTIAL_SUFFIX, SECOND_PARTIAL_SUFFIX: PARTIAL_SUFFIX}
        suffix = next(new for old, new in suffixes.items() if journal.data.name.endswith(old))
        self._unfinished = self._begin(suffix, beside(self._output, _NEXT_JOURNAL_SUFFIX))
        with journal.data.open("rb") as stream:
            for task in tasks:
                flat = read_chunks(stream.fileno(), task.records)
                problems = [self._places.problem(kept) for kept in task.problems]
                self.put(chunk_of(task.records, task.first, flat, problems))
        self._unfinished.become(self._journal)
        self._disk.remove(journal.data)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        unfinished = self._unfinished
        with self._held:
            self._close()
            if unfinished is None:
                return
            ends_for_good = isinstance(error, ParallelDicomSegError) and not isinstance(
                error, ResumableError | VerificationError
            )
            if error is None or ends_for_good or not self.slices_seen:
                unfinished.remove()
            else:
                error.add_note(
                    f"{self.slices_seen} of {self._layout.slices} slices are kept in "
                    f"{unfinished.data}; --resume goes on with them"
                )

    # --- chunks ----------------------------------------------------------------------------------

    def put(self, chunk: EncodedChunk) -> None:
        """Write the chunks of one task; tasks come in plan order.

        Raises
        ------
        ResumableError
            The disk does not take them.
        """
        if chunk.first != self.slices_seen:
            raise ConversionError(
                f"slices from {chunk.first} on came where {self.slices_seen} is next"
            )
        records = records_of(chunk, layout_type(self._layout))
        if self._sources is not None:
            digests = self._sources.digests[chunk.first : chunk.first + len(records)]
            records["place"], records["content"] = digests[:, :2], digests[:, 2:]
        problems = []
        for problem in chunk.problems:
            kept, concerned = self._places.locate(problem, chunk.first, len(records))
            records["has_problem"][concerned] = True
            problems.append(kept)
        unfinished = self._open_files
        with _as_resumable(unfinished.data):
            unfinished.append(chunk, records, self._rows, problems)
        self._take(records, chunk.problems)

    def _take(self, records: Records, problems: Sequence[Problem]) -> None:
        self._records.append(records)
        self._problems += problems
        self._rows += int(np.count_nonzero(records["size"][:, 0]))
        self.slices_seen += len(records)

    @property
    def _open_files(self) -> Unfinished:
        if self._unfinished is None:
            raise ConversionError("the writer is not open")
        return self._unfinished

    # --- the finished file -----------------------------------------------------------------------

    def publish(self, problems: Sequence[Problem]) -> Summary:
        """Write the tables, compare the file with what was put, and give it its name.

        Parameters
        ----------
        problems
            What was found before the conversion; those of the chunks are added.

        Raises
        ------
        ConversionError
            No slice could be converted.
        VerificationError
            The file does not hold what was put.
        ResumableError
            The disk does not take it, or somebody else has made the output meanwhile.
        """
        unfinished = self._open_files
        found = conceal_paths((*problems, *self._problems), self._slices.path, self._identity)
        if not self._rows:
            first = next((problem for problem in found if problem.is_rejection), None)
            raise ConversionError(
                f"none of {self.slices_seen} slices could be converted; the first reason: "
                + (f"{first.path}: {first.detail}" if first else "unknown")
            )
        records = np.concatenate(self._records)
        kept = np.flatnonzero(records["size"][:, 0])
        records = records[kept]
        metadata = self._metadata(kept, records, found)

        def write(file: h5py.File) -> None:
            nonlocal found
            found = write_metadata(file, metadata)

        with _as_resumable(unfinished.data):
            unfinished.finish(self._rows, write)
            _compare(unfinished.data, records)
            chunks = (
                np.ascontiguousarray(records[name].T) for name in ("offset", "size", "crc32c")
            )
            seal_file(unfinished.data, *chunks, disk=self._disk)
            if self._output.exists() and not self._overwrite:
                raise ResumableError(f"{self._output} has appeared meanwhile, it is left alone")
            unfinished.publish(self._output)
            unfinished.close()
            self._unfinished = None
            settle(self._output, self._disk)
        return self._summary(metadata, records, found)

    def _metadata(self, kept: NDArray[Any], records: Records, found: Sequence[Problem]) -> Metadata:
        whole = len(kept) == len(self._slices)
        slices = self._slices if whole else self._slices.take(kept)
        grid = self._grid[kept]
        table = table_columns(slices, measured_of(records), grid, self._identity)
        for k, name in enumerate(("image_crc32c", "mask_crc32c")):
            table[name] = np.ascontiguousarray(records["crc32c"][:, k])
        return Metadata(
            layout=self._layout,
            slices=slices,
            kept=kept,
            headers=self._headers,
            grid=grid,
            marks=self._marks.on_slices(kept),
            table=table,
            identity=self._identity,
            root=self._root,
            provenance=self._provenance,
            problems=tuple(found),
        )

    def _summary(
        self, metadata: Metadata, records: Records, problems: tuple[Problem, ...]
    ) -> Summary:
        table: Columns = metadata.table
        counts = {
            name: int(np.count_nonzero(table["flags"] & (1 << bit)))
            for bit, name in enumerate(FLAGS)
        }
        return Summary(
            output=str(self._output),
            slices=self._rows,
            patients=len(np.unique(metadata.slices.patient_id)),
            rows=self._layout.rows,
            columns=self._layout.columns,
            structures=self._layout.structures,
            annotated=tuple(records["outlined"].sum(axis=0).tolist()),
            problems=problems,
            flagged={name: count for name, count in counts.items() if count},
            seconds=0.0,
            bytes_written=self._output.stat().st_size,
        )


def settle(output: Path, disk: Disk = SYSTEM) -> None:
    """Put away the journal of an output that was finished, if that is still to be done."""
    path = beside(output, JOURNAL_SUFFIX)
    header = read_header(path)
    if header is None or path.with_name(header["data"]).exists():
        return
    if header["sources_key"] and output.exists():
        disk.replace(path, beside(output, SOURCES_SUFFIX))
    else:
        disk.remove(path)


def read_back(path: Path, rows: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Where the chunks of a finished file lie, (rows, 2 arrays, offset and size), and the checksums
    of what lies there, (rows, 2).
    """
    with h5py.File(path, "r") as file:
        index = [chunk_index(file[name].id, rows) for name in ("images", "masks")]
    places = np.stack([np.stack(array, axis=1) for array in index], axis=1)
    with path.open("rb") as stream:
        offsets, sizes = places[..., 0].ravel(), places[..., 1].ravel()
        return places, file_checksums(stream.fileno(), offsets, sizes).reshape(-1, 2)


def _compare(path: Path, records: Records) -> None:
    """Read every chunk back from the finished file and compare it with what the workers made."""
    places, found = read_back(path, len(records))
    wrong = np.argwhere(
        (places[..., 0] != records["offset"])
        | (places[..., 1] != records["size"])
        | (found != records["crc32c"])
    )
    if len(wrong):
        row, array = wrong[0].tolist()
        raise VerificationError(
            f"{path}: chunk {row} of /{('images', 'masks')[array]} has "
            f"{places[row, array, 1]} bytes of checksum {found[row, array]:08x}, "
            f"{records['size'][row, array]} bytes of {records['crc32c'][row, array]:08x} were "
            f"written"
        )


@contextmanager
def _as_resumable(path: Path) -> Iterator[None]:
    """Tell what HDF5 and the system report about a file that cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ResumableError(f"{path} cannot be written: {reason}") from error
