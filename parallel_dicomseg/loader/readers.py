"""What reads the bytes of slices: our HDF5 file, its zarr mirror, any HDF5 file with two datasets.

The first two know where each chunk lies before the first batch and need no library on the way:
`pread`, and a decoder that releases the GIL. There are two ways with the same result. One needs
numba: one call for all slices of a piece of a batch, from the file to the batch. The other one
calls the compressors' packages once per chunk; it is slower, but the first batch of a fresh process
need not wait for numba, and it can say what is wrong with a chunk.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.chunks import decode
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.records import Float64, Int64, UInt8

_KERNELS = "parallel_dicomseg.loader.kernels_read"
_Fingerprint = tuple[int, int, int, int]
_DOUBLE = np.dtype(np.float64)
# More than any encoder makes of a chunk that it cannot shrink; a damaged index may claim anything.
_WORST_GROWTH = 1.25
_OVERHEAD_BYTES = 4096


@dataclass(slots=True)
class Clock:
    """Seconds that one thread spent, by what for."""

    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    """Also windows, types and channels."""
    blocked: float = 0.0
    """Waiting for the consumer to take a batch."""

    def add(self, other: Clock) -> None:
        """Take over the seconds of another clock, which begins anew."""
        self.read += other.read
        self.decode += other.decode
        self.augment += other.augment
        self.blocked += other.blocked
        other.read = other.decode = other.augment = other.blocked = 0.0


@dataclass(slots=True)
class Scratch:
    """Memory of one thread that is used again for every piece."""

    held: dict[str, UInt8] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made under this name before, or is made now."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any content, valid until the same name is asked for again."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self.held or self.held[name].size < size:
            self.held[name] = np.empty(size, np.uint8)
        return self.held[name][:size].view(dtype).reshape(shape)


class Files:
    """Files that are only read, and are refused once they have changed.

    A single file stays open (its descriptor survives a fork: `pread` has no position); of many,
    such as the shards of a mirror, those of a piece are opened for the piece.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._kept = -1
        if len(self.paths) == 1:
            with reading(self.paths[0], "the file"):
                self._kept = os.open(self.paths[0], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._close = weakref.finalize(self, os.close, self._kept)
        self._known = [_fingerprint(self._kept if self._kept >= 0 else path) for path in self.paths]

    @property
    def kept(self) -> int:
        """The descriptor of the only file; -1 where there are several, or it is closed."""
        return self._kept if self._kept >= 0 and self._close.alive else -1

    @property
    def kept_is_same(self) -> bool:
        """Whether the only file is as it was when it was opened."""
        return _fingerprint(self._kept) == self._known[0]

    @contextmanager
    def opened(self, numbers: Int64, what: str) -> Iterator[Int64]:
        """Descriptors (n,) of the files of these numbers, checked again when they were used.

        `what` names what is read, for messages.
        """
        if self._kept >= 0:
            if not self._close.alive:
                raise LayoutError(f"{self.paths[0]}: the loader is closed")
            yield np.full(len(numbers), self._kept, np.int64)
            self._check(0, self._kept, what)
            return
        needed, place = np.unique(numbers, return_inverse=True)
        with contextlib.ExitStack() as stack:
            descriptors = []
            for number in needed.tolist():
                with reading(self.paths[number], "the file"):
                    descriptors.append(os.open(self.paths[number], os.O_RDONLY))
                stack.callback(os.close, descriptors[-1])
            yield np.array(descriptors, np.int64)[place]
            for number, descriptor in zip(needed.tolist(), descriptors, strict=True):
                self._check(number, descriptor, what)

    def _check(self, number: int, descriptor: int, what: str) -> None:
        if _fingerprint(descriptor) != self._known[number]:
            raise LayoutError(f"{what}: {self.paths[number]} has changed since it was opened")

    def close(self) -> None:
        """Close what is open; a second call does nothing. No thread may be reading any more."""
        if self._kept >= 0:
            self._close()


def _fingerprint(file: int | Path) -> _Fingerprint:
    status = os.stat(file)  # noqa: PTH116  a descriptor or a path
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, eq=False)
class Chunks:
    """One array of n slices, (n, rows, columns[, samples]), a chunk each, and where they lie."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str
    files: Files
    offsets: Int64
    """(n,) in the chunk's file."""
    sizes: Int64
    """(n,) encoded bytes; 0 where there is no chunk."""
    file: Int64 | None = None
    """(n,) which of the files; None: the first."""
    crc32c: NDArray[np.uint32] | None = None
    """(n,) what the checksums of the encoded bytes must be; None: not looked at."""

    @cached_property
    def slice_items(self) -> int:
        """Numbers in a slice."""
        return math.prod(self.shape[1:])

    @cached_property
    def slice_bytes(self) -> int:
        """Bytes of a decoded slice."""
        return self.slice_items * self.dtype.itemsize

    def where(self, row: int) -> str:
        """File and slice, for messages."""
        path = self.files.paths[0 if self.file is None else int(self.file[row])]
        return f"{path}: {self.name}[{row}]"

    def read(self, rows: Int64, out: NDArray[Any], scratch: Scratch, clock: Clock) -> None:
        """Decode slices.

        Parameters
        ----------
        rows
            (m,) which.
        out
            (m, rows, columns[, samples]) of this dtype, C-contiguous, filled.
        scratch, clock
            Of the calling thread.

        Raises
        ------
        LayoutError
            A chunk is missing, cut short, no chunk of this codec, or has another checksum than
            it should; or the file has changed. The message names file and slice.
        """
        raw = out.reshape(len(rows), -1).view(np.uint8)
        if not self._by_kernel("read_stored", rows, (raw,), scratch, clock):
            self._read_plainly(rows, out, scratch, clock)

    def read_mapped(
        self,
        rows: Int64,
        maps: Float64 | None,
        out: NDArray[np.float32],
        scratch: Scratch,
        clock: Clock,
    ) -> bool:
        """Decode slices as float32, mapped as by `windows.map_into`, where kernels can.

        Parameters
        ----------
        rows, scratch, clock
            See `read`.
        maps
            (m, 4); None: values stay as they are.
        out
            (m, count) C-contiguous, filled.

        Returns
        -------
        Whether it was done; else `read` does it, or says why it cannot.
        """
        chosen = np.empty((0, 4)) if maps is None else maps
        stored = scratch.array("stored", (self.slice_items,), self.dtype)
        return self._by_kernel("read_mapped", rows, (stored, chosen, out), scratch, clock)

    def read_channels(
        self, rows: Int64, bits: Int64, out: UInt8, scratch: Scratch, clock: Clock
    ) -> bool:
        """Decode masks with a plane of 0 and 1 for each bit, `out` (m, s, count), where kernels
        can; as `read_mapped`.
        """
        stored = scratch.array("stored", (self.slice_items,), self.dtype)
        return self._by_kernel("read_channels", rows, (stored, bits, out), scratch, clock)

    def read_recoded(
        self, rows: Int64, table: NDArray[Any], out: NDArray[Any], scratch: Scratch, clock: Clock
    ) -> bool:
        """Decode masks of one byte and replace each value by the table's (256,), where kernels
        can; as `read_mapped`.
        """
        stored = scratch.array("stored", (self.slice_items,), self.dtype)
        return self._by_kernel("read_recoded", rows, (stored, table, out), scratch, clock)

    def _by_kernel(
        self, name: str, rows: Int64, others: tuple[Any, ...], scratch: Scratch, clock: Clock
    ) -> bool:
        """Call a kernel of `kernels_read`; False if there is none, or it stopped at a slice."""
        kernels = _kernels()
        if kernels is None or not self._has_kernels:
            return False
        room = scratch.once(self.name, lambda: self._room(kernels))
        seconds = scratch.array("seconds", (3,), _DOUBLE)
        seconds[:] = 0
        call = getattr(kernels, name)
        if self.files.kept >= 0:
            done = call(self._kept, rows, self._place, room, *others, seconds)
            if not self.files.kept_is_same:
                return False
        else:
            numbers = rows * 0 if self.file is None else self.file[rows]
            with self.files.opened(numbers, self.where(int(rows[0]))) as descriptors:
                done = call(descriptors, rows, self._place, room, *others, seconds)
        read, decode, convert = seconds.tolist()
        clock.read += read
        clock.decode += decode
        clock.augment += convert
        return bool(done == len(rows))

    @cached_property
    def _has_kernels(self) -> bool:
        from parallel_dicomseg.loader.kernels_read import has_kernels

        return has_kernels(self.codec, self.dtype.itemsize, verify=self.crc32c is not None)

    @cached_property
    def _kept(self) -> Int64:
        """The only file's descriptor, for kernels."""
        return np.array([self.files.kept])

    def _room(self, kernels: Any) -> Any:
        """Memory of a thread, for kernels."""
        return kernels.Room(
            np.empty(self._most_bytes, np.uint8), np.empty(self.slice_bytes, np.uint8)
        )

    @cached_property
    def _place(self) -> Any:
        """Where the chunks lie, for kernels."""
        from parallel_dicomseg.compressors import way_of
        from parallel_dicomseg.loader.kernels_read import Place

        checks = np.empty(0, np.uint32) if self.crc32c is None else self.crc32c
        itemsize = self.dtype.itemsize
        return Place(self.offsets, self.sizes, checks, way_of(self.codec, itemsize), itemsize)

    @cached_property
    def _most_bytes(self) -> int:
        """Of a chunk: no more than the longest there is, and than what could be one."""
        longest = int(self.sizes.max(initial=1))
        return min(longest, int(self.slice_bytes * _WORST_GROWTH) + _OVERHEAD_BYTES)

    def _read_plainly(self, rows: Int64, out: NDArray[Any], scratch: Scratch, clock: Clock) -> None:
        start = time.perf_counter()
        sizes = self._sizes(rows)
        ends = np.cumsum(sizes)
        flat = out.reshape(len(rows), -1)
        raw = flat.view(np.uint8).reshape(-1)
        direct = self.codec == "none"
        encoded = raw if direct else scratch.array("encoded", (int(ends[-1]),), raw.dtype)
        numbers = rows * 0 if self.file is None else self.file[rows]
        with self.files.opened(numbers, self.where(int(rows[0]))) as descriptors:
            self._fetch(rows, descriptors, sizes, ends - sizes, encoded)
        read = time.perf_counter()
        if self.crc32c is not None:
            self._verify(rows, self.crc32c[rows], encoded, sizes, ends - sizes)
        if not direct:
            self._decode(rows, encoded, sizes, ends - sizes, flat)
        clock.read += read - start
        clock.decode += time.perf_counter() - read

    def _sizes(self, rows: Int64) -> Int64:
        """Encoded bytes of the slices, which the decoded ones bound."""
        sizes = self.sizes[rows]
        most = self.slice_bytes * _WORST_GROWTH + _OVERHEAD_BYTES
        wrong = sizes != self.slice_bytes if self.codec == "none" else sizes > most
        for row in rows[wrong | (sizes <= 0)][:1].tolist():
            size = int(self.sizes[row])
            fault = f"has a chunk of {size} bytes" if size else "is missing"
            raise LayoutError(f"{self.where(row)} {fault}")
        return sizes

    def _fetch(
        self, rows: Int64, descriptors: Int64, sizes: Int64, starts: Int64, encoded: UInt8
    ) -> None:
        offsets = self.offsets[rows]
        room = encoded.data
        for i in range(len(rows)):
            at, size = int(starts[i]), int(sizes[i])
            try:
                held = _read_fully(int(descriptors[i]), room[at : at + size], int(offsets[i]))
            except OSError as error:
                raise LayoutError(f"{self.where(int(rows[i]))} cannot be read: {error}") from error
            if held != size:
                raise LayoutError(
                    f"{self.where(int(rows[i]))} ends after {held} of {size} bytes, where the "
                    f"file ends"
                )

    def _verify(
        self,
        rows: Int64,
        known: NDArray[np.uint32],
        encoded: UInt8,
        sizes: Int64,
        starts: Int64,
    ) -> None:
        places = zip(rows.tolist(), known.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        for row, expected, at, size in places:
            found = _checksum(encoded[at : at + size])
            if found != expected:
                raise LayoutError(
                    f"{self.where(row)}: checksum {found:#010x} differs from the table's "
                    f"{expected:#010x}"
                )

    def _decode(
        self, rows: Int64, encoded: UInt8, sizes: Int64, starts: Int64, flat: NDArray[Any]
    ) -> None:
        for i in range(len(rows)):
            chunk = encoded[starts[i] : starts[i] + sizes[i]]
            try:
                decode(chunk, self.codec, flat[i])
            except (ValueError, MemoryError, SystemError) as error:  # the last two from blosc
                raise LayoutError(f"{self.where(int(rows[i]))}: {error}") from error


def _kernels() -> Any:
    """The module of kernels, where numba is loaded already."""
    module = sys.modules.get(_KERNELS)
    return import_module(_KERNELS) if module is None and "numba" in sys.modules else module


def load_kernels() -> None:
    """Load numba, so that whoever reads from now on does it the fast way."""
    import_module(_KERNELS)


def _checksum(chunk: UInt8) -> int:
    """CRC-32C, without a copy."""
    import google_crc32c

    chunk.flags.writeable = False  # it refuses to read what could change
    return int(google_crc32c.value(chunk))


def _read_fully(descriptor: int, room: memoryview, offset: int) -> int:
    """Read until `room` is full or the file ends; the bytes read."""
    done = 0
    while done < len(room):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [room[done:]], offset + done)
        else:
            piece = os.pread(descriptor, len(room) - done, offset + done)
            count = len(piece)
            room[done : done + count] = piece
        if not count:
            break
        done += count
    return done


class Rows(Protocol):
    """What reads slices of one array: `Chunks`, or h5py."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, rows, columns[, samples])."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `read` fills."""

    def read(self, rows: Int64, out: NDArray[Any], scratch: Scratch, clock: Clock) -> None:
        """See `Chunks.read`."""


class DatasetRows:
    """Slices of any HDF5 dataset, through h5py: one call at a time, whatever threads there are."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], mask: bool) -> None:
        self.path = path
        self.name = name
        self.shape = shape
        self._is_mask = mask
        self._known = _fingerprint(path)
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] = (-1, None)
        stored = self._dataset().dtype
        if stored.kind not in ("biu" if mask else "biuf"):
            raise LayoutError(f"{path}: /{name} holds {stored}, which is no picture")
        self.dtype: np.dtype[Any] = np.dtype(np.uint8) if mask else stored.newbyteorder("=")

    def _dataset(self) -> Any:
        """The open dataset of this process; a fork opens its own."""
        import h5py

        pid, dataset = self._opened
        if pid != os.getpid():
            self._lock = threading.Lock()
            with reading(self.path, f"/{self.name}"):
                dataset = h5py.File(self.path, "r")[self.name]
            self._opened = (os.getpid(), dataset)
        return dataset

    def read(self, rows: Int64, out: NDArray[Any], scratch: Scratch, clock: Clock) -> None:  # noqa: ARG002
        """See `Chunks.read`; of a mask whatever is not 0 is 1."""
        start = time.perf_counter()
        dataset = self._dataset()
        for row, target in zip(rows.tolist(), out, strict=True):
            with self._lock, reading(self.path, f"/{self.name}[{row}]"):
                values = dataset[row].reshape(self.shape[1:])
            target[...] = (values != 0) if self._is_mask else values
        if _fingerprint(self.path) != self._known:
            raise LayoutError(f"{self.path} has changed since it was opened")
        clock.read += time.perf_counter() - start

    def close(self) -> None:
        """Close the file."""
        pid, dataset = self._opened
        if pid == os.getpid():
            dataset.file.close()
        self._opened = (-1, None)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn what a damaged or missing file makes libraries raise into a LayoutError."""
    try:
        yield
    except (LayoutError, ConfigurationError):
        raise
    except Exception as error:
        where = what if what.startswith(str(path)) else f"{path}: {what}"
        words = error.args[0] if isinstance(error, KeyError) else error  # its str is a repr
        raise LayoutError(f"{where} cannot be read: {words}") from error


def warm_up() -> None:
    """Load, or compile, the kernels that read int16 images and uint8 masks."""
    from parallel_dicomseg.compressors import way_of
    from parallel_dicomseg.loader import kernels_read as kernels
    from parallel_dicomseg.posix import AVAILABLE

    if not AVAILABLE:
        return
    none, rows = np.zeros(1, np.int64), np.empty(0, np.int64)
    byte, short = np.empty(1, np.uint8), np.empty(1, np.int16)
    place = kernels.Place(none, none, np.empty(0, np.uint32), way_of("none", 1), 1)
    seconds = np.zeros(3)

    def call(kernel: Any, *others: Any) -> None:
        kernel(none, rows, place, kernels.Room(byte, byte), *others, seconds)

    call(kernels.read_stored, byte[None])
    call(kernels.read_mapped, short, np.empty((0, 4)), np.empty((0, 1), np.float32))
    call(kernels.read_channels, byte, rows, byte[None, None])
    call(kernels.read_recoded, byte, byte, byte[None])
