"""Read a converted file: slices by pread and our own decoder, columns through h5py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import CODECS, decode
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import Problem, Reason
from parallel_dicomseg.store.hdf5 import FORMAT, FORMAT_VERSION, chunk_index

_SCALE_ATTRIBUTES = ("DIMENSION_LIST", "DIMENSION_LABELS", "REFERENCE_LIST", "CLASS", "NAME")


class ChunkedArray:
    """The slices of one dataset, (n, rows, columns), read without HDF5 and without its lock.

    Safe to use from several threads, and after a fork: every read is one `pread`.
    """

    def __init__(self, descriptor: int, dataset: h5py.Dataset, codec: str, path: Path) -> None:
        self._descriptor = descriptor
        self._codec = codec
        self._path = path
        self.name: str = dataset.name
        self.shape: tuple[int, int, int] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype
        self.offsets, self.sizes = chunk_index(dataset.id, dataset.shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> NDArray[Any]:
        """One slice, (rows, columns)."""
        out = np.empty(self.shape[1:], self.dtype)
        self.read_into(range(len(self))[row], out)
        return out

    def encoded(self, row: int) -> bytes:
        """The chunk of one slice as it is in the file."""
        size = int(self.sizes[row])
        chunk = os.pread(self._descriptor, size, int(self.offsets[row]))
        if not size or len(chunk) != size:
            raise LayoutError(
                f"{self._path}: {self.name}[{row}] holds {len(chunk)} bytes of {size}"
            )
        return chunk

    def read_into(self, row: int, out: NDArray[Any]) -> None:
        """Decode one slice into `out` (rows, columns), C-contiguous, of this dtype."""
        try:
            decode(self.encoded(row), self._codec, out)
        except ValueError as error:
            raise LayoutError(f"{self._path}: {self.name}[{row}]: {error}") from error


class Dataset:
    """A converted file, open for reading; close it, or use it as a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        try:
            self.attributes: dict[str, Any] = {
                name: _plain(value) for name, value in self._file.attrs.items()
            }
            _check_format(self.path, self.attributes)
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except BaseException:
            self._file.close()
            raise
        codec = str(self.attributes["codec"])
        self.images = ChunkedArray(self._descriptor, self._file["images"], codec, self.path)
        self.masks = ChunkedArray(self._descriptor, self._file["masks"], codec, self.path)
        self.structures: tuple[str, ...] = tuple(self._file["masks"].attrs["structures"])
        nested = self._file["masks"].attrs.get("nested", ())
        self.nested: tuple[tuple[int, int], ...] = tuple(
            (self.structures.index(inner), self.structures.index(outer))
            for inner, outer in (pair.split(" inside ") for pair in nested)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file:
            self._file.close()
            os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""
        return self.images.shape

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """Type of the stored images."""
        return self.images.dtype

    @property
    def mask_dtype(self) -> np.dtype[Any]:
        """Type of the stored masks."""
        return self.masks.dtype

    def columns(self, group: str = "table") -> tuple[str, ...]:
        """Names of the columns of /table (or /series, /rejected)."""
        return tuple(self._file[group])

    def axes(self, name: str) -> tuple[str, ...]:
        """Names of a dataset's axes, e.g. of 'table/area': ('slice', 'structure')."""
        return tuple(str(axis.label) for axis in self._file[name].dims)

    def attributes_of(self, name: str) -> dict[str, Any]:
        """Attributes of a dataset, without those that HDF5 keeps its dimension scales in."""
        attributes = self._file[name].attrs.items()
        return {key: _plain(value) for key, value in attributes if key not in _SCALE_ATTRIBUTES}

    def column(self, name: str, group: str = "table") -> NDArray[Any]:
        """One column of /table (or /series), (n, …); text as fixed-length bytes."""
        if name not in self._file[group]:
            known = ", ".join(self._file[group])
            raise LayoutError(f"{self.path}: no column {name!r} in /{group}, there are {known}")
        values: NDArray[Any] = self._file[group][name][()]
        return values

    @property
    def rejected(self) -> list[Problem]:
        """What is not in the file, and why."""
        columns = [self.column(name, "rejected").tolist() for name in ("path", "reason", "detail")]
        return [
            Problem(os.fsdecode(path), Reason(reason.decode()), detail.decode())
            for path, reason, detail in zip(*columns, strict=True)
        ]

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Encoded bytes of all images and of all masks."""
        return int(self.images.sizes.sum()), int(self.masks.sizes.sum())


def open_dataset(path: str | Path) -> Dataset:
    """Open a converted HDF5 file for reading.

    Parameters
    ----------
    path
        A file that `convert_cohort` made.

    Raises
    ------
    LayoutError
        The file is missing, is no HDF5 file, or is not one of ours.
    """
    return Dataset(path)


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise LayoutError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise LayoutError(f"{path} is no readable HDF5 file: {error}") from error


def _check_format(path: Path, attributes: dict[str, Any]) -> None:
    if attributes.get("format") != FORMAT:
        raise LayoutError(f"{path} was not made by {FORMAT} (no attribute format={FORMAT!r})")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise LayoutError(
            f"{path} has format version {attributes.get('format_version')}, "
            f"this program reads {FORMAT_VERSION}"
        )
    if attributes.get("codec") not in CODECS:
        raise LayoutError(f"{path} has codec {attributes.get('codec')!r}, known are {CODECS}")


def _plain(value: Any) -> Any:
    """A Python number, text, bool or list in the place of a NumPy one."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
