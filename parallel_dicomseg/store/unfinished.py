"""An output that is being made: its chunks, and the journal that says which of them are done.

The order of writes: chunks to `OUT.h5.partial`; then a frame to the journal; and every half second,
in a thread, both to the disk, data first. What the thread has done is *committed*: no crash of the
program or of the machine loses it. What a killed program had written is in the system's hands and
not lost either. A frame whose chunks did not arrive is found by their checksums.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import checksums_of_file
from parallel_dicomseg.files import read_fully
from parallel_dicomseg.records import EncodedChunk, Int64, Layout, UInt8
from parallel_dicomseg.store.disk import Disk, write_fully
from parallel_dicomseg.store.hdf5 import create
from parallel_dicomseg.store.journal import (
    Journal,
    Records,
    Task,
    plan_frame,
    task_frame,
)
from parallel_dicomseg.store.metadata_file import MetadataFile

# A crash of the machine costs what was done since the last commit.
_COMMIT_SECONDS = 0.5
# Chunks that one thread reads back at a time.
_CHUNKS_PER_CHECK = 256
_ZEROS = np.zeros(1 << 20, np.uint8)


class MovedError(Exception):
    """HDF5 puts finished chunks elsewhere than its earlier version did."""


class Unfinished:
    """The two files, and HDF5's view of the first."""

    def __init__(
        self,
        data: Path,
        journal: Path,
        disk: Disk,
        layout: Layout,
        on_commit: Callable[[int], object] | None = None,
        *,
        fresh: bool,
    ) -> None:
        self.data = data
        self.journal = journal
        self._disk = disk
        self._descriptors: list[int] = []
        try:
            for path in (data, journal):
                self._descriptors.append(disk.open(path, fresh=fresh))
        except BaseException:
            self._close_files()
            raise
        self._frames_end = 0
        self._content = MetadataFile()
        self._file, self._images, self._masks = create(self._content, layout)
        self._corner = (0,) * (self._images.rank - 1)
        self._committer = _Committer(disk, self._descriptors, on_commit)

    @classmethod
    def fresh(
        cls,
        data: Path,
        journal: Path,
        header: Mapping[str, Any],
        disk: Disk,
        layout: Layout,
        on_commit: Callable[[int], object] | None = None,
    ) -> Self:
        """Begin anew; what was there is gone."""
        self = cls(data, journal, disk, layout, on_commit, fresh=True)
        try:
            self._append_frame(plan_frame({**header, "data": data.name}))
            disk.sync_directory(data.parent)
        except BaseException:
            self.close()
            raise
        return self

    @classmethod
    def resumed(
        cls,
        journal: Journal,
        tasks: Sequence[Task],
        disk: Disk,
        layout: Layout,
        on_commit: Callable[[int], object] | None = None,
    ) -> Self:
        """Go on after `tasks`, the first ones of a journal, whose chunks are intact.

        Raises
        ------
        MovedError
            The chunks lie where this version of HDF5 would not have put them; nothing was changed.
        """
        self = cls(journal.data, journal.path, disk, layout, on_commit, fresh=False)
        try:
            chunks = _joined(tasks, "offset"), _joined(tasks, "size")
            self._replay(*chunks)
            self._frames_end = tasks[-1].end if tasks else journal.header_end
            disk.truncate(self._descriptors[1], self._frames_end)
            self._clear_gaps(*chunks)
        except BaseException:
            self.close()
            raise
        return self

    def _replay(self, offsets: Int64, sizes: Int64) -> None:
        """Tell HDF5 of all chunks again; offsets and sizes are (n, 2), sizes 0 where rejected."""
        anything = memoryview(bytes(int(sizes.max(initial=0))))
        good = sizes[:, 0] > 0
        pairs = zip(sizes[good].tolist(), offsets[good].tolist(), strict=True)
        for row, (size, offset) in enumerate(pairs):
            if self._place(row, anything[: size[0]], anything[: size[1]]) != tuple(offset):
                raise MovedError

    def _clear_gaps(self, offsets: Int64, sizes: Int64) -> None:
        """Remove what a run that died while it finished wrote round the chunks.

        HDF5 leaves some bytes unused, which are zeros in a run that was not interrupted.
        """
        starts = offsets[sizes > 0]
        ends = starts + sizes[sizes > 0]
        order = np.argsort(starts)
        before = np.concatenate([[0], ends[order]])
        gaps = np.stack([before[:-1], starts[order]], axis=1)
        for start, end in gaps[gaps[:, 0] < gaps[:, 1]].tolist():
            for at in range(start, end, len(_ZEROS)):
                piece = _ZEROS[: min(end - at, len(_ZEROS))]
                write_fully(self._disk, self._descriptors[0], [piece], at)
        self._disk.truncate(self._descriptors[0], int(before[-1]))

    def append(
        self,
        chunk: EncodedChunk,
        records: Records,
        rows: int,
        problems: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write a task's chunks and its frame.

        Parameters
        ----------
        records
            (n,) of the chunk; where its chunks lie is filled in.
        rows
            Rows of the file so far.
        problems
            As `Places.locate` gives them.
        """
        self._committer.check()
        good = np.flatnonzero(records["size"][:, 0])
        sizes = records["size"][good]
        buffers: list[memoryview] = []
        places = []
        image_end = mask_end = 0
        images, masks = (memoryview(flat) for flat in _buffers(chunk))
        for row, (image_size, mask_size) in enumerate(sizes.tolist(), rows):
            image_start, image_end = image_end, image_end + image_size
            mask_start, mask_end = mask_end, mask_end + mask_size
            # a slice's image and mask lie side by side: one read ahead gets both, and the bytes of
            # the file do not depend on how many slices a task has
            pair = images[image_start:image_end], masks[mask_start:mask_end]
            places.append(self._place(row, *pair))
            buffers += pair
        offsets = np.array(places, np.int64).reshape(-1, 2)
        with self._content.check():
            if offsets.min(initial=0) < 0:
                raise OSError("HDF5 did not say where a chunk lies")
        records["offset"][good] = offsets
        starts = offsets.ravel().tolist()
        for first, end in _runs(offsets.ravel(), sizes.ravel()):
            write_fully(self._disk, self._descriptors[0], buffers[first:end], starts[first])
        self._append_frame(task_frame(chunk.first, records, problems))
        self._committer.note(chunk.first + len(records))

    def _place(self, row: int, image: memoryview, mask: memoryview) -> tuple[int, int]:
        """Let HDF5 place the chunks of a row; -1 where it did not say."""
        content = self._content
        content.expect(image)
        self._images.write_direct_chunk((row, *self._corner), image)
        image_at = content.noted()
        content.expect(mask)
        self._masks.write_direct_chunk((row, 0, 0), mask)
        return image_at, content.noted()

    def _append_frame(self, frame: bytes) -> None:
        write_fully(self._disk, self._descriptors[1], [frame], self._frames_end)
        self._frames_end += len(frame)

    def commit(self) -> None:
        """Wait until all that was appended is on the disk."""
        self._committer.flush()

    def finish(self, rows: int, write: Callable[[h5py.File], object]) -> None:
        """Write everything but the chunks.

        Parameters
        ----------
        rows
            Rows of the file.
        write
            Writes everything else into the file.
        """
        self.commit()
        with self._content.check():
            for dataset in (self._images, self._masks):
                dataset.set_extent((rows, *dataset.shape[1:]))
            write(self._file)
            self._file.close()
        for offset, piece in self._content.pieces():
            write_fully(self._disk, self._descriptors[0], [piece], offset)
        self._disk.truncate(self._descriptors[0], self._content.size)

    def publish(self, output: Path) -> None:
        """Bytes to the disk, then the name, then the name to the disk."""
        self._disk.sync(self._descriptors[0])
        self._disk.replace(self.data, output)
        self._disk.sync_directory(output.parent)

    def become(self, journal: Path) -> None:
        """Commit, and take the place of an older journal."""
        self.commit()
        self._disk.replace(self.journal, journal)
        self._disk.sync_directory(journal.parent)
        self.journal = journal

    def close(self) -> None:
        """Close everything; what is on the disk stays. A second call does nothing."""
        if not self._descriptors:
            return
        try:
            self._committer.stop()
        finally:
            try:
                self._file.close()  # into memory
            finally:
                self._close_files()

    def _close_files(self) -> None:
        while self._descriptors:
            self._disk.close(self._descriptors.pop())

    def remove(self) -> None:
        """Remove both files; the journal first, for data without a journal counts for nothing."""
        self._disk.remove(self.journal)
        self._disk.remove(self.data)


def _buffers(chunk: EncodedChunk) -> tuple[Any, Any]:
    """Its encoded images, and its masks; numpy tells type checkers late that these are buffers."""
    return chunk.image_bytes, chunk.mask_bytes


def _runs(offsets: Int64, sizes: Int64) -> Iterator[tuple[int, int]]:
    """Chunks that lie one after another without a gap: first one, and the one after the last."""
    breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + sizes[:-1]) + 1
    yield from itertools.pairwise([0, *breaks.tolist(), len(offsets)]) if len(offsets) else ()


class _Committer:
    """A thread that brings both files to the disk every half second."""

    def __init__(
        self, disk: Disk, descriptors: Sequence[int], on_commit: Callable[[int], object] | None
    ) -> None:
        self._disk = disk
        self._data, self._journal = descriptors
        self._on_commit = on_commit
        self._changed = threading.Condition()
        self._noted = self._committed = 0
        self._hurry = self._is_ending = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def note(self, slices: int) -> None:
        """So many slices are written."""
        with self._changed:
            self._noted = slices
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Wait until what was noted is on the disk."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_done)
            self._hurry = False
        self.check()

    def stop(self) -> None:
        """Commit once more, if that is possible, and end the thread."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join()

    def _is_done(self) -> bool:
        return self._failure is not None or self._committed >= self._noted

    def _run(self) -> None:
        try:
            while self._wait():
                # a failed sync is never tried again: the system may have dropped the pages
                noted = self._noted
                self._disk.sync(self._data)
                self._disk.sync(self._journal)
                if self._on_commit:
                    self._on_commit(noted)
                with self._changed:
                    self._committed = noted
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  `check` raises it in the writer
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait for something to commit, and a while for more; false at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending or self._noted > self._committed)
            self._changed.wait_for(lambda: self._is_ending or self._hurry, _COMMIT_SECONDS)
            return self._noted > self._committed


# --- reading back --------------------------------------------------------------------------------


def intact_tasks(journal: Journal) -> tuple[Task, ...]:
    """The first tasks of a journal, up to one of which a chunk is not as it was written."""
    if not journal.tasks:
        return ()
    offsets, sizes = _joined(journal.tasks, "offset"), _joined(journal.tasks, "size")
    with journal.data.open("rb") as stream:
        found = file_checksums(stream.fileno(), offsets.ravel(), sizes.ravel())
    wrong = np.flatnonzero(found != _joined(journal.tasks, "crc32c").ravel())
    if not len(wrong):
        return journal.tasks
    slice_number = int(wrong[0]) // 2
    return tuple(t for t in journal.tasks if t.first + len(t.records) <= slice_number)


def file_checksums(descriptor: int, offsets: Int64, sizes: Int64) -> NDArray[np.uint32]:
    """CRC-32C of pieces of an open file, (n,), read by several threads; 0 for empty ones."""
    found = np.zeros(len(sizes), np.uint32)
    blocks = [slice(at, at + _CHUNKS_PER_CHECK) for at in range(0, len(sizes), _CHUNKS_PER_CHECK)]

    def read(block: slice) -> None:
        found[block] = checksums_of_file(descriptor, offsets[block], sizes[block])

    with ThreadPoolExecutor(cpu_count()) as pool:
        list(pool.map(read, blocks))
    found[sizes == 0] = 0
    return found


def read_chunks(descriptor: int, records: Records) -> tuple[UInt8, UInt8]:
    """The encoded images of some slices one after another, and their masks, of an open file.

    Raises
    ------
    OSError
        The file ends before, or cannot be read.
    """
    flat = []
    for array in (0, 1):
        places = zip(
            records["size"][:, array].tolist(), records["offset"][:, array].tolist(), strict=True
        )
        pieces = [read_fully(descriptor, size, offset) for size, offset in places]
        flat.append(np.frombuffer(b"".join(pieces), np.uint8))
        if len(flat[array]) != records["size"][:, array].sum():
            raise OSError("a finished chunk cannot be read again")
    return flat[0], flat[1]


def _joined(tasks: Sequence[Task], name: str) -> NDArray[Any]:
    """One field of the records of all tasks; (0, 2) where there is none."""
    if not tasks:
        return np.zeros((0, 2), np.int64)
    return np.concatenate([task.records[name] for task in tasks])
