"""Open what batches are read from: our HDF5 file, its zarr mirror, or two datasets of any file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.chunks import CODECS
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.loader.readers import Chunks, DatasetRows, Files, Rows, reading
from parallel_dicomseg.records import Int64
from parallel_dicomseg.seal import check_structure

# As `store` writes them; it is not imported, for it loads numba. A test compares them.
FORMAT, READABLE_VERSIONS = "parallel_dicomseg", (2, 3)

#: Names of image and mask datasets that are found in files of others; the first is the original's.
PAIRS = (
    ("input", "output"),
    ("images", "masks"),
    ("image", "mask"),
    ("images", "labels"),
    ("image", "label"),
    ("x", "y"),
    ("X", "Y"),
)
#: The structure of a mask that has no name.
UNNAMED = "mask"

_MISSING = np.uint64(2**64 - 1)
_INDEX_CHECKSUM_BYTES = 4


@dataclass(frozen=True, eq=False)
class Source:
    """Where slices come from."""

    path: Path
    images: Rows
    masks: Rows
    structures: tuple[str, ...]
    """Names in bit order."""
    nested: tuple[tuple[int, int], ...]
    """Pairs (inner, outer) of places in `structures`."""
    columns: tuple[str, ...]
    """Names of the columns of the table; none in files of others."""
    column: Callable[[str], NDArray[Any]]
    """A column, (n, …); text as fixed-length bytes."""
    close: Callable[[], None]

    def __len__(self) -> int:
        """Slices."""
        return self.images.shape[0]

    @property
    def samples(self) -> int:
        """Samples of a pixel."""
        return int(math.prod(self.images.shape[3:]))


def open_source(
    path: Path, images: str = "", masks: str = "", *, verify: bool | None = None
) -> Source:
    """Open a file or a mirror for reading batches.

    Parameters
    ----------
    path
        Our HDF5 file, the directory of its zarr mirror, or any HDF5 file.
    images, masks
        Names of two datasets, where it is a file of others and they are not named as in `PAIRS`.
    verify
        Compare the checksum of every chunk that is read; None: where the file has them.

    Raises
    ------
    LayoutError
        It is missing, or cannot be read.
    ConfigurationError
        There are no such datasets, or no checksums.
    """
    if path.is_dir():
        return _open_mirror(path, verify)
    if not path.is_file():
        raise LayoutError(f"{path}: no such file")
    import h5py

    from parallel_dicomseg.foreign import check_attributes

    with reading(path, "the HDF5 file"):
        check_structure(path)
    with reading(path, "the HDF5 file"), h5py.File(path, "r") as file:
        check_attributes(file)
        if not images and not masks and _text(file.attrs.get("format")) == FORMAT:
            return _open_own(path, file, verify)
        pair = _find_pair(path, file, images, masks)
    if verify:
        raise ConfigurationError(f"{path} holds no checksums to verify")
    return _open_pair(path, *pair)


def _open_own(path: Path, file: Any, verify: bool | None) -> Source:
    """One of our files; every chunk's place is taken now, and h5py is not needed any more."""
    from parallel_dicomseg.foreign import check_attributes, dataset_of, group_of

    _check_version(path, file.attrs)
    files = Files([path])
    codec = _text(file.attrs["codec"])
    images, masks = (
        _own_array(path, file, name, codec, files, verify) for name in ("images", "masks")
    )
    told = dataset_of(file, "masks", inflated=False)
    check_attributes(told)
    structures, nested = _structures(told.attrs)
    _check_arrays(path, images, masks, structures)

    def column(name: str) -> NDArray[Any]:
        import h5py

        with reading(path, f"/table/{name}"), h5py.File(path, "r") as again:
            values: NDArray[Any] = dataset_of(again, f"table/{name}")[()]
        return values

    columns = tuple(group_of(file, "table"))
    return Source(path, images, masks, structures, nested, columns, column, files.close)


def _own_array(
    path: Path, file: Any, name: str, codec: str, files: Files, verify: bool | None
) -> Chunks:
    """One array of our file, and the checksums of its chunks where they are to be verified."""
    from parallel_dicomseg.foreign import dataset_of

    dataset = dataset_of(file, name, inflated=False)
    if len(dataset.shape) not in {3, 4} or dataset.chunks != (1, *dataset.shape[1:]):
        raise LayoutError(f"{path}: /{name} is not one chunk per slice")
    offsets, sizes = _chunk_index(dataset)
    column = f"table/{name.removesuffix('s')}_crc32c"
    try:
        known = None if verify is False else dataset_of(file, column)[()]
    except KeyError:
        if verify:
            raise ConfigurationError(f"{path} holds no checksums to verify") from None
        known = None
    return Chunks(
        f"/{name}", dataset.shape, dataset.dtype, codec, files, offsets, sizes, crc32c=known
    )


def _chunk_index(dataset: Any) -> tuple[Int64, Int64]:
    """(n,) byte offset in the file and (n,) encoded size of each slice's chunk; 0 where missing."""
    offsets = np.zeros(dataset.shape[0], np.int64)
    sizes = np.zeros(dataset.shape[0], np.int64)

    def note(chunk: Any) -> None:
        row = chunk.chunk_offset[0]
        offsets[row] = chunk.byte_offset
        sizes[row] = chunk.size

    if len(offsets):
        dataset.id.chunk_iter(note)
    return offsets, sizes


def _check_version(path: Path, attributes: Any) -> None:
    version, codec = attributes.get("format_version"), _text(attributes.get("codec"))
    if version not in READABLE_VERSIONS:
        raise LayoutError(
            f"{path} has format version {version}, "
            f"this program reads {' and '.join(map(str, READABLE_VERSIONS))}"
        )
    if codec not in CODECS:
        raise LayoutError(f"{path} has codec {codec!r}, known are {CODECS}")


def _check_arrays(path: Path, images: Chunks, masks: Chunks, structures: tuple[str, ...]) -> None:
    if images.shape[:3] != masks.shape or not math.prod(images.shape[1:]):
        raise LayoutError(f"{path}: images {images.shape} and masks {masks.shape} do not match")
    if masks.dtype.kind != "u" or len(structures) > 8 * masks.dtype.itemsize:
        raise LayoutError(f"{path}: {len(structures)} structures in masks of type {masks.dtype}")


def _structures(attributes: Any) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Names in bit order, and pairs (inner, outer) of their places."""
    names = tuple(_text(name) for name in attributes["structures"])
    pairs = [_text(pair).split(" inside ") for pair in attributes.get("nested", ())]
    return names, tuple((names.index(inner), names.index(outer)) for inner, outer in pairs)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- the mirror ----------------------------------------------------------------------------------


def _open_mirror(path: Path, verify: bool | None) -> Source:
    """A zarr mirror: where the chunks lie is said at the end of each shard."""
    if verify:
        raise ConfigurationError(
            f"{path} is a mirror without checksums; verify reads the HDF5 file"
        )
    with reading(path, "the zarr group"):
        attributes = _metadata(path, path)["attributes"]
        if attributes.get("format") != FORMAT:
            raise LayoutError(f"{path} is no mirror made by {FORMAT}")
        _check_version(path, attributes)
        images, masks = (_mirrored(path, name, attributes["codec"]) for name in ("images", "masks"))
        told = _metadata(path, path / "masks")["attributes"]
        structures, nested = _structures(told)
        columns = tuple(sorted(each.name for each in (path / "table").iterdir() if each.is_dir()))
    _check_arrays(path, images, masks, structures)

    def column(name: str) -> NDArray[Any]:
        import zarr

        with reading(path, f"/table/{name}"):
            for each in (path / "table" / name).rglob("*"):
                _check_inside(path, each)
            # version 2 has filters that unpickle
            group: Any = zarr.open_group(str(path), mode="r", zarr_format=3)
            values = np.asarray(group[f"table/{name}"][...])
        if values.dtype.kind in "biuf":
            return values
        return np.array([text.encode() for text in values.tolist()], np.bytes_)

    def close() -> None:
        images.files.close()
        masks.files.close()

    return Source(path, images, masks, structures, nested, columns, column, close)


def _metadata(root: Path, node: Path) -> Any:
    """What a group or an array of a mirror says of itself."""
    _check_inside(root, node / "zarr.json")
    return json.loads((node / "zarr.json").read_text())


def _check_inside(root: Path, path: Path) -> None:
    """Refuse what a symbolic link of the mirror shows of other directories."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path.relative_to(root)} leads out of the mirror")


def _mirrored(path: Path, name: str, codec: str) -> Chunks:
    """One array of a mirror as `mirror_to_zarr` writes it."""
    array = _metadata(path, path / name)
    shape = tuple(array["shape"])
    per_shard = array["chunk_grid"]["configuration"]["chunk_shape"][0]
    sharding = array["codecs"][0]
    if sharding["name"] != "sharding_indexed":
        raise ValueError(f"/{name} is not sharded")
    if sharding["configuration"]["chunk_shape"] != [1, *shape[1:]]:
        raise ValueError(f"/{name} is not one inner chunk per slice")
    corner = ["0"] * (len(shape) - 1)
    count = -(-shape[0] // per_shard)
    paths = [path.joinpath(name, "c", str(k), *corner) for k in range(count)]
    for shard in paths:
        _check_inside(path, shard)
    index = np.concatenate([_shard_index(shard, per_shard) for shard in paths])[: shape[0]]
    is_there = index[:, 0] != _MISSING
    place = np.where(is_there[:, None], index, np.uint64(0)).astype(np.int64)
    return Chunks(
        name=f"/{name}",
        shape=shape,
        dtype=np.dtype(array["data_type"]),
        codec=codec,
        files=Files(paths),
        offsets=np.ascontiguousarray(place[:, 0]),
        sizes=np.ascontiguousarray(place[:, 1]),
        file=np.arange(shape[0]) // per_shard,
    )


def _shard_index(shard: Path, slices: int) -> NDArray[np.uint64]:
    """(slices, 2) offset and size of each inner chunk, from the end of the shard."""
    import google_crc32c

    length = 16 * slices
    with shard.open("rb") as file:
        file.seek(-length - _INDEX_CHECKSUM_BYTES, 2)
        raw, checksum = file.read(length), file.read(_INDEX_CHECKSUM_BYTES)
    if google_crc32c.value(raw) != int.from_bytes(checksum, "little"):
        raise ValueError(f"the index of {shard} is damaged")
    return np.frombuffer(raw, "<u8").reshape(slices, 2)


# --- files of others -----------------------------------------------------------------------------


def _find_pair(path: Path, file: Any, images: str, masks: str) -> tuple[str, str, Any, Any]:
    """Names and shapes of an image and a mask dataset."""
    named = ((images, masks),) if images and masks else PAIRS
    for one, other in named:
        if _is_there(file, one) and _is_there(file, other):
            return one, other, _slice_shape(file, one), _slice_shape(file, other)
    looked = ", ".join(f"/{one} and /{other}" for one, other in named)
    raise ConfigurationError(f"{path} holds no image and mask datasets; looked for {looked}")


def _is_there(file: Any, name: str) -> bool:
    """Whether there is a link of this name; `in` would follow it into another file."""
    return bool(file.get(name, getlink=True, default=None))


def _slice_shape(file: Any, name: str) -> tuple[int, ...]:
    """(n, rows, columns[, samples]); rows of pixels are unfolded by the attribute `lshape`."""
    from parallel_dicomseg.foreign import check_attributes, dataset_of

    dataset = dataset_of(file, name)
    check_attributes(dataset)
    shape = tuple(dataset.shape)
    if len(shape) == 2 and "lshape" in dataset.attrs:
        unfolded = tuple(int(size) for size in dataset.attrs["lshape"])
        if math.prod(unfolded) != shape[1]:
            raise LayoutError(f"{dataset.name}: lshape {unfolded} is not {shape[1]} pixels")
        shape = (shape[0], *unfolded)
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) not in {3, 4} or not math.prod(shape[1:]):
        raise LayoutError(f"{dataset.name} has shape {shape}, not (slices, rows, columns)")
    return shape


def _open_pair(path: Path, images: str, masks: str, shape: Any, mask_shape: Any) -> Source:
    if shape[:3] != mask_shape:
        raise LayoutError(f"{path}: /{images} {shape} and /{masks} {mask_shape} do not match")
    pair = (DatasetRows(path, images, shape, False), DatasetRows(path, masks, mask_shape, True))

    def column(name: str) -> NDArray[Any]:
        raise ConfigurationError(f"{path} has no table, and no column {name!r}")

    def close() -> None:
        for rows in pair:
            rows.close()

    return Source(path, *pair, (UNNAMED,), (), (), column, close)
