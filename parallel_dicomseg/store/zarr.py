"""The zarr mirror of a converted file: zarr v3, sharded, core codecs, the same values and names."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.codec import BLOSC, encode, mirror_codec
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.private import make_private
from parallel_dicomseg.records import Progress
from parallel_dicomseg.store.attributes import CHECKSUM
from parallel_dicomseg.store.contents import CONTENTS, DIGEST
from parallel_dicomseg.store.dataset import ChunkedArray, Dataset
from parallel_dicomseg.store.hdf5 import FORMAT, IMAGE_AXES

SLICES_PER_SHARD = 1024
_MARKER = "zarr.json"
# Attributes that say of the HDF5 file what is not so of its mirror.
_OF_HDF5 = (CHECKSUM, CONTENTS, DIGEST)
_MISSING = np.uint64(2**64 - 1)


def mirror_to_zarr(
    dataset: Dataset,
    directory: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write a zarr v3 group with the arrays, tables and attributes of a converted file.

    Chunks that zarr can decode as they are (lz4, zstd, none) are copied as bytes; deflate chunks,
    whose shuffle is no core codec of zarr v3, are encoded again as blosc lz4.

    Parameters
    ----------
    dataset
        An open converted file.
    directory
        The group to make. It appears under this name only when it is whole.
    overwrite
        Replace an existing zarr group.

    Raises
    ------
    ConfigurationError
        See `check_mirror`.
    """
    target = Path(directory)
    check_mirror(target, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
        partial = Path(scratch) / target.name
        _write_group(dataset, partial, progress)
        make_private(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def check_mirror(target: Path, *, overwrite: bool) -> None:
    """Refuse a directory that a mirror must not or cannot become.

    Raises
    ------
    ConfigurationError
        It exists and `overwrite` is off, it is no mirror of ours, or its parent is missing.
    """
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target.parent}: no such directory for the mirror {target.name}")
    if not target.exists():
        return
    try:
        attributes = json.loads((target / _MARKER).read_text())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        attributes = {}
    if attributes.get("format") != FORMAT:
        raise ConfigurationError(f"{target} exists and is no mirror made by {FORMAT}")
    if not overwrite:
        raise ConfigurationError(f"{target} exists; --overwrite replaces it")


def _write_group(
    dataset: Dataset, directory: Path, progress: Callable[[Progress], None] | None
) -> None:
    import zarr

    codec = mirror_codec(str(dataset.attributes["codec"]))
    group = zarr.open_group(str(directory), mode="w", zarr_format=3)
    said = {name: value for name, value in dataset.attributes.items() if name not in _OF_HDF5}
    group.attrs.update({**said, "codec": codec})
    for array in (dataset.images, dataset.masks):
        _create_array(group, array, codec, dataset.attributes_of(array.name))
    jobs = [
        (array, first)
        for array in (dataset.images, dataset.masks)
        for first in range(0, len(array), SLICES_PER_SHARD)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shards = pool.map(lambda job: _write_shard(dataset, directory, job[0], job[1], codec), jobs)
        for done, _ in enumerate(shards, 1):
            if progress:
                progress(Progress("mirror", done * len(dataset) // len(jobs), len(dataset)))
    for name in ("table", "series", "volumes", "headers", "marks", "rejected"):
        _copy_columns(dataset, group, name)


def _create_array(group: Any, array: ChunkedArray, codec: str, attributes: dict[str, Any]) -> None:
    """Let zarr-python write the metadata; the shards are written here."""
    from zarr.codecs import BloscCodec

    # zarr's type for the name of a compressor changed between releases, the name did not
    cname: Any = codec
    shuffle: Any = {1: "shuffle", 2: "bitshuffle"}[BLOSC[codec].shuffle] if codec in BLOSC else None
    blosc = (
        BloscCodec(
            cname=cname,
            clevel=BLOSC[codec].level,
            shuffle=shuffle,
            typesize=array.dtype.itemsize,
        )
        if codec != "none"
        else None
    )
    group.create_array(
        array.name.strip("/"),
        shape=array.shape,
        dtype=array.dtype,
        chunks=(1, *array.shape[1:]),
        shards=(SLICES_PER_SHARD, *array.shape[1:]),
        compressors=blosc,
        filters=None,
        fill_value=0,
        dimension_names=IMAGE_AXES[: len(array.shape)],
        attributes=attributes,
    )


def _write_shard(
    dataset: Dataset, directory: Path, array: ChunkedArray, first: int, codec: str
) -> None:
    """One shard: the chunks, then the index of offsets and lengths, then its crc32c."""
    index = np.full((SLICES_PER_SHARD, 2), _MISSING, "<u8")
    corner = ["0"] * (len(array.shape) - 1)
    path = Path(directory, array.name.strip("/"), "c", str(first // SLICES_PER_SHARD), *corner)
    path.parent.mkdir(parents=True)
    shared = codec == dataset.attributes["codec"]
    at = 0
    with path.open("wb") as shard:
        for k, row in enumerate(range(first, min(first + SLICES_PER_SHARD, len(array)))):
            chunk = array.encoded(row) if shared else encode(array[row][None], codec)[0].tobytes()
            shard.write(chunk)
            index[k] = at, len(chunk)
            at += len(chunk)
        raw = index.tobytes()
        shard.write(raw + int(google_crc32c.value(raw)).to_bytes(4, "little"))


def _copy_columns(dataset: Dataset, group: Any, name: str) -> None:
    target = group.create_group(name)
    for column in dataset.columns(name):
        values = dataset.column(column, name)
        is_text = values.dtype.kind == "S"
        array = target.create_array(
            column,
            shape=values.shape,
            # fixed-length text has no specification in zarr v3
            dtype="string" if is_text else values.dtype,
            dimension_names=dataset.axes(f"{name}/{column}"),
            attributes=dataset.attributes_of(f"{name}/{column}"),
        )
        if values.size:
            array[...] = _decoded(values) if is_text else values


def _decoded(values: NDArray[Any]) -> NDArray[Any]:
    """Texts as objects, each as long as it is."""
    decoded = np.empty(values.shape, object)
    decoded[:] = [value.decode("utf-8", "replace") for value in values.tolist()]
    return decoded
