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
    """(b, rows, columns) of the file's image dtype."""
    mask: NDArray[Any]
    """(b, rows, columns): bit s is structure s."""
    index: Int64
    """(b,) rows of the file."""


def sample_order(samples: int, seed: int, epoch: int) -> Int64:
    """A permutation of the samples that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


def iterate_batches(
    dataset: Dataset, batch_size: int, *, seed: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """Every slice of the file once, in batches; the last one may be smaller.

    Parameters
    ----------
    dataset
        An open converted file.
    batch_size
        Slices per batch, at least 1.
    seed, epoch
        Decide the order; the same pair gives the same batches.

    Raises
    ------
    ConfigurationError
        The batch size is less than 1.
    LayoutError
        A chunk of the file cannot be read or decoded.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}, it must be at least 1")
    order = sample_order(len(dataset), seed, epoch)
    for start in range(0, len(order), batch_size):
        yield _read_batch(dataset, order[start : start + batch_size])


def _read_batch(dataset: Dataset, index: Int64) -> Batch:
    shape = (len(index), *dataset.shape[1:])
    batch = Batch(np.empty(shape, dataset.image_dtype), np.empty(shape, dataset.mask_dtype), index)
    for k, row in enumerate(index.tolist()):
        dataset.images.read_into(row, batch.image[k])
        dataset.masks.read_into(row, batch.mask[k])
    return batch
