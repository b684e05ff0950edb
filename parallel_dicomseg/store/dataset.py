"""Read a converted file: slices by pread and our own decoder, columns through h5py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import google_crc32c
import h5py
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.chunks import CODECS, decode
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.foreign import dataset_of, group_of, object_of
from parallel_dicomseg.records import Checks, Problem, Reason
from parallel_dicomseg.seal import Seal, check_structure
from parallel_dicomseg.store.attributes import attributes_crc32c, plain_attributes
from parallel_dicomseg.store.contents import contents
from parallel_dicomseg.store.hdf5 import FORMAT, READABLE_VERSIONS, chunk_index, view_shape
from parallel_dicomseg.store.headers import plain_header, plain_value

# What the root says besides format, version and codec; 0 and 1.0 are both numbers.
_ATTRIBUTES: dict[str, type | tuple[type, ...]] = {
    "source": str,
    "rule": str,
    "contour_origin": (int, float),
    "partial_overlap": str,
    "include_unannotated": bool,
    "resampled": bool,
    "pad_value": (int, float, str),
    "invert_monochrome1": bool,
    "keep_identity": bool,
    "pseudonyms": str,
    "dates": str,
    "hashed_paths": bool,
    **{f"check_{threshold.name}": (int, float) for threshold in fields(Checks)},
}


class ChunkedArray:
    """The slices of one dataset, (n, rows, columns[, samples]), read without HDF5 and its lock.

    Safe to use from several threads, and after a fork: every read is one `pread`.
    """

    def __init__(self, descriptor: int, dataset: h5py.Dataset, codec: str, path: Path) -> None:
        self._descriptor = descriptor
        self._codec = codec
        self._path = path
        self.name: str = dataset.name
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype
        if len(self.shape) not in {3, 4} or dataset.chunks != (1, *self.shape[1:]):
            raise ValueError(f"shape {self.shape} in chunks {dataset.chunks}, not one per slice")
        self.offsets, self.sizes = chunk_index(dataset.id, dataset.shape[0])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> NDArray[Any]:
        """One slice, (rows, columns[, samples])."""
        out = np.empty(self.shape[1:], self.dtype)
        self.read_into(range(len(self))[row], out)
        return out

    def encoded(self, row: int) -> bytes:
        """The chunk of one slice as it is in the file."""
        size = int(self.sizes[row])
        if not size:
            raise LayoutError(f"{self._path}: {self.name}[{row}] is missing")
        with _reading(self._path, f"{self.name}[{row}]"):
            chunk = os.pread(self._descriptor, size, int(self.offsets[row]))
        if len(chunk) != size:
            raise LayoutError(
                f"{self._path}: {self.name}[{row}] ends after {len(chunk)} of {size} bytes, "
                f"where the file ends"
            )
        return chunk

    def read_into(self, row: int, out: NDArray[Any], crc32c: int | None = None) -> None:
        """Decode one slice into `out` (rows, columns[, samples]), C-contiguous, of this dtype.

        Parameters
        ----------
        row, out
            Which slice, and where to.
        crc32c
            What the checksum of the encoded bytes must be, where it is known.

        Raises
        ------
        LayoutError
            The chunk is missing, cut short or no chunk of this codec, or has another checksum.
        """
        chunk = self.encoded(row)
        where = f"{self._path}: {self.name}[{row}]"
        if crc32c is not None and (found := google_crc32c.value(chunk)) != crc32c:
            raise LayoutError(
                f"{where}: checksum {found:#010x} differs from the table's {crc32c:#010x}"
            )
        try:
            decode(chunk, self._codec, out)
        except (ValueError, MemoryError, SystemError) as error:  # the last two from blosc
            raise LayoutError(f"{where}: {error}") from error


class Dataset:
    """A converted file, open for reading; close it, or use it as a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: dict[str, h5py.Dataset] = {}
        with ExitStack() as resources:
            self.seal = _checked(self.path)
            """What the seal says of each byte; None where there is none."""
            self._file = resources.enter_context(_open(self.path))
            with _reading(self.path, "attributes of /"):
                self.attributes: dict[str, Any] = plain_attributes(self._file)
            _check_format(self.path, self.attributes)
            with _reading(self.path, "the file"):
                descriptor = os.open(self.path, os.O_RDONLY)
                resources.callback(os.close, descriptor)
            self.images = self._array("images", descriptor)
            self.masks = self._array("masks", descriptor)
            with _reading(self.path, "attributes of /masks"):
                self.structures, self.nested = _structures(dataset_of(self._file, "masks"))
            self._resources = resources.pop_all()

    def _array(self, name: str, descriptor: int) -> ChunkedArray:
        codec = str(self.attributes["codec"])
        with _reading(self.path, f"/{name}"):
            dataset = dataset_of(self._file, name, inflated=False)
            return ChunkedArray(descriptor, dataset, codec, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._resources.close()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""
        slices, rows, columns = self.images.shape[:3]
        return slices, rows, columns

    @property
    def samples(self) -> int:
        """Samples of a pixel: 1, or 3 (red, green, blue), the last axis of images then."""
        return view_shape(self.images.shape)[2]

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """Type of the stored images."""
        return self.images.dtype

    @property
    def mask_dtype(self) -> np.dtype[Any]:
        """Type of the stored masks."""
        return self.masks.dtype

    def columns(self, group: str = "table") -> tuple[str, ...]:
        """Names of the columns of /table (or /series, /volumes, /headers, /marks, /rejected)."""
        with _reading(self.path, f"/{group}"):
            return tuple(group_of(self._file, group))

    def axes(self, name: str) -> tuple[str, ...]:
        """Names of a dataset's axes, e.g. of 'table/area': ('slice', 'structure')."""
        with _reading(self.path, f"axes of {name}"):
            return tuple(str(axis.label) for axis in dataset_of(self._file, name).dims)

    def objects(self) -> tuple[str, ...]:
        """Names of all groups and datasets, 'table' and 'table/area' among them."""
        names: list[str] = []
        with _reading(self.path, "/"):
            self._file.visit(names.append)
        return tuple(names)

    def contents(self) -> dict[str, str]:
        """The digest of each object as it is, by its name; the root says what it should be."""
        with _reading(self.path, "/"):
            for name in self.objects():
                object_of(self._file, name)
            return contents(self._file)

    def attributes_crc32c(self) -> int:
        """The checksum of the attributes as they are; the root says what it should be."""
        with _reading(self.path, "attributes"):
            return attributes_crc32c(self._file)

    def attributes_of(self, name: str) -> dict[str, Any]:
        """Attributes of a dataset, without those that HDF5 keeps its dimension scales in."""
        with _reading(self.path, f"attributes of {name}"):
            return plain_attributes(object_of(self._file, name, inflated=False))

    def column(self, name: str, group: str = "table") -> NDArray[Any]:
        """One column of /table (or another group), (n, …); text as fixed-length bytes."""
        if name not in self.columns(group):
            known = ", ".join(self.columns(group))
            raise LayoutError(f"{self.path}: no column {name!r} in /{group}, there are {known}")
        with _reading(self.path, f"/{group}/{name}"):
            values: NDArray[Any] = self._looked_at(f"{group}/{name}")[()]
        return values

    def header(self, row: int) -> dict[str, Any]:
        """The DICOM attributes of one slice: what its series has in common, and what varies.

        Keyword -> number, text, or list of them; a private attribute's key is 'GGGGEEEE'. With
        kept identity, what the scan did not collect is that of the first image of the series.
        """
        row = range(len(self))[row]
        header = self.series_header(self._element("table/series_index", row))
        for keyword in self.columns("headers"):
            text = self._element(f"headers/{keyword}", row)
            header.pop(keyword, None)
            if text:
                header[keyword] = plain_value(keyword, text)
        return header

    def series_header(self, series: int) -> dict[str, Any]:
        """The DICOM attributes that all images of a series share, as `header` gives them."""
        text = self._element("series/header", series)
        with _reading(self.path, f"/series/header[{series}]"):
            return plain_header(text.decode())

    def _element(self, name: str, row: int) -> Any:
        """One row of a column, without the others."""
        with _reading(self.path, f"/{name}[{row}]"):
            return self._looked_at(name)[row]

    def _looked_at(self, name: str) -> h5py.Dataset:
        """A column, looked at when it is first used."""
        if name not in self._known:
            self._known[name] = dataset_of(self._file, name)
        return self._known[name]

    @property
    def decoders(self) -> dict[str, str]:
        """What decoded each compressed transfer syntax, by its UID."""
        pairs = (str(text).partition(" ") for text in self.attributes.get("decoders", ()))
        return {uid: decoder for uid, _, decoder in pairs}

    def view(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape of a virtual view, and the name of the array that it shows all of.

        Raises
        ------
        LayoutError
            There is no such view, or it does not show one whole array of this file.
        """
        with _reading(self.path, f"/{name}"):
            view = dataset_of(self._file, name, inflated=False)
            if not view.is_virtual:
                raise ValueError("it is no virtual view")
            parts = view.virtual_sources()
            whole = [
                part.file_name == "."
                and part.vspace.get_select_npoints() == view.size
                and part.src_space.get_select_type() == h5py.h5s.SEL_ALL
                for part in parts
            ]
            if whole != [True]:
                raise ValueError("it does not show one whole array of this file")
            return view.shape, parts[0].dset_name

    @property
    def rejected(self) -> list[Problem]:
        """What is not in the file, and why."""
        columns = [self.column(name, "rejected").tolist() for name in ("path", "reason", "detail")]
        with _reading(self.path, "/rejected"):
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
        The file is missing, is no HDF5 file, is not one of ours, or is damaged outside its pixels.
    """
    return Dataset(path)


def _checked(path: Path) -> Seal | None:
    """The seal of a file of which nothing but pixels may differ from it."""
    if not path.is_file():
        there = "a folder, not a converted file" if path.is_dir() else "no such file"
        raise LayoutError(f"{path}: {there}")
    try:
        return check_structure(path)
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError) as error:
        raise LayoutError(f"{path} is no readable HDF5 file: {error}") from error


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn what h5py raises, which for a damaged file is nearly everything, into a LayoutError."""
    try:
        yield
    except Exception as error:
        words = error.args[0] if isinstance(error, KeyError) else error  # its str is a repr
        raise LayoutError(f"{path}: {what} cannot be read: {words}") from error


def _check_format(path: Path, attributes: dict[str, Any]) -> None:
    if attributes.get("format") != FORMAT:
        raise LayoutError(f"{path} was not made by {FORMAT} (no attribute format={FORMAT!r})")
    if attributes.get("format_version") not in READABLE_VERSIONS:
        raise LayoutError(
            f"{path} has format version {attributes.get('format_version')}, "
            f"this program reads {' and '.join(map(str, READABLE_VERSIONS))}"
        )
    if attributes.get("codec") not in CODECS:
        raise LayoutError(f"{path} has codec {attributes.get('codec')!r}, known are {CODECS}")
    for name, kind in _ATTRIBUTES.items():
        if not isinstance(attributes.get(name), kind):
            found = repr(attributes[name]) if name in attributes else "missing"
            raise LayoutError(f"{path}: the attribute {name!r} of / is {found}")


def _structures(masks: h5py.Dataset) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Names in bit order, and pairs (inner, outer) of their places."""
    attributes = plain_attributes(masks)
    structures: tuple[str, ...] = tuple(attributes["structures"])
    if masks.dtype.kind != "u" or len(structures) > 8 * masks.dtype.itemsize:
        raise ValueError(f"{len(structures)} structures in masks of type {masks.dtype}")
    pairs = (pair.split(" inside ") for pair in attributes.get("nested", ()))
    return structures, tuple(
        (structures.index(inner), structures.index(outer)) for inner, outer in pairs
    )
