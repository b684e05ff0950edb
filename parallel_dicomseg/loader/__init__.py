"""Serve batches of a converted file in a random order that the seed decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Int64
from parallel_dicomseg.store import Dataset


@dataclass(frozen=True, slots=True)
class Batch:
    """b samples, in the order in which they are served."""

    image: NDArray[Any]
    """(b, rows, columns[, samples]) of the file's image dtype."""
    mask: NDArray[Any]
    """(b, rows, columns): bit s is structure s."""
    index: Int64
    """(b,) rows of the file."""


def sample_order(samples: int, seed: int, epoch: int) -> Int64:
    """A permutation of the samples that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


def iterate_batches(
    dataset: Dataset, batch_size: int, *, split: str = "", seed: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """Every slice of the file, or of one part of its split, once; the last batch may be smaller.

    Parameters
    ----------
    dataset
        An open converted file.
    batch_size
        Slices per batch, at least 1.
    split
        'train', 'validation' or 'test'; '' for all slices.
    seed, epoch
        Decide the order; the same pair gives the same batches.

    Raises
    ------
    ConfigurationError
        The batch size is less than 1, or the file has no slice in that part.
    LayoutError
        A chunk of the file cannot be read or decoded.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}, it must be at least 1")
    rows = _rows_of(dataset, split)
    order = rows[sample_order(len(rows), seed, epoch)]
    for start in range(0, len(order), batch_size):
        yield _read_batch(dataset, order[start : start + batch_size])


def _rows_of(dataset: Dataset, split: str) -> Int64:
    """(m,) the rows of one part of the split; all without one."""
    if not split:
        return np.arange(len(dataset))
    parts = dataset.column("split")
    rows = np.flatnonzero(parts == split.encode())
    if not len(rows):
        known = ", ".join(name.decode() for name in np.unique(parts[parts != b""])) or "no parts"
        raise ConfigurationError(f"{dataset.path} has no slice in {split!r}; it has {known}")
    return rows


def _read_batch(dataset: Dataset, index: Int64) -> Batch:
    image, mask = (
        np.empty((len(index), *array.shape[1:]), array.dtype)
        for array in (dataset.images, dataset.masks)
    )
    for k, row in enumerate(index.tolist()):
        dataset.images.read_into(row, image[k])
        dataset.masks.read_into(row, mask[k])
    return Batch(image, mask, index)
