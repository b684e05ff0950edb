"""What reads the bytes of slices: our HDF5 file, its zarr mirror, any HDF5 file with two datasets.

The first two know where each chunk lies before the first batch and need no library on the way:
`pread`, and a decoder that releases the GIL. There are two ways with the same result. One needs
numba: two calls for a whole piece of a batch. The other one calls the compressors' packages once
per chunk; it is slower, but the first batch of a fresh process need not wait for numba.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.chunks import decode
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.records import Int64, UInt8

_Fingerprint = tuple[int, int, int, int]
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


@dataclass(slots=True)
class Scratch:
    """Memory of one thread that is used again for every piece."""

    held: dict[str, UInt8] = field(default_factory=dict)

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any content, valid until the same name is asked for again."""
        size = int(np.prod(shape)) * dtype.itemsize
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

    @property
    def slice_bytes(self) -> int:
        """Bytes of a decoded slice."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

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
        kernels = _kernels(self.codec)
        first = 0
        if kernels is not None:
            first = int(kernels.read_rows(descriptors, offsets, sizes, starts, encoded))
        room = encoded.data
        for i in range(first, len(rows)):
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
        import google_crc32c

        places = zip(rows.tolist(), known.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        for row, expected, at, size in places:
            found = google_crc32c.value(encoded[at : at + size].tobytes())
            if found != expected:
                raise LayoutError(
                    f"{self.where(row)}: checksum {found:#010x} differs from the table's "
                    f"{expected:#010x}"
                )

    def _decode(
        self, rows: Int64, encoded: UInt8, sizes: Int64, starts: Int64, flat: NDArray[Any]
    ) -> None:
        kernels = _kernels(self.codec)
        first = 0
        if kernels is not None:
            first = kernels.decode_rows(encoded, starts, sizes, self.codec, flat)
        # without kernels all of them; with kernels only what they refused, to learn why
        for i in range(first, len(rows)):
            chunk = encoded[starts[i] : starts[i] + sizes[i]]
            try:
                decode(chunk, self.codec, flat[i])
            except (ValueError, MemoryError, SystemError) as error:  # the last two from blosc
                raise LayoutError(f"{self.where(int(rows[i]))}: {error}") from error


def _kernels(codec: str) -> Any:
    """The module of kernels, where numba is loaded already and they can decode this codec."""
    if "parallel_dicomseg.codec" not in sys.modules and "numba" not in sys.modules:
        return None
    from parallel_dicomseg import codec as module

    return module if module.can_decode_rows(codec) else None


def load_kernels() -> None:
    """Load numba, so that whoever reads from now on does it the fast way."""
    import parallel_dicomseg.codec  # noqa: F401


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
    """Load, or compile, the kernels that read and decode int16 images and uint8 masks."""
    from parallel_dicomseg.codec import can_decode_rows, decode_rows, encode, read_rows

    one = np.zeros(1, np.int64)
    with open(os.devnull, "rb") as file:  # noqa: PTH123  a descriptor of nothing
        read_rows(one + file.fileno(), one, one, one, np.empty(0, np.uint8))
    for codec in ("deflate", "lz4"):
        for dtype in (np.int16, np.uint8):
            encoded, sizes = encode(np.zeros((1, 8, 8), dtype), codec)
            if can_decode_rows(codec):
                decode_rows(encoded, one, sizes, codec, np.empty((1, 64), dtype))
