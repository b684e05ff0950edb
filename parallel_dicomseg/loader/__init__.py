"""Serve batches of a converted file, in an order that the seed decides.

Names are imported when they are first used: a loader without augmentation needs no numba.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.batch import Batch
from parallel_dicomseg.loader.order import epoch_order

if TYPE_CHECKING:
    from parallel_dicomseg.loader.batch_loader import BatchLoader, EpochIterator
    from parallel_dicomseg.loader.samplers import (
        ForegroundBalanced,
        PatientBalanced,
        Sampler,
        Sequential,
        Uniform,
        Weighted,
    )
    from parallel_dicomseg.loader.samples import Patch, Stack
    from parallel_dicomseg.loader.timings import Timings
    from parallel_dicomseg.store import Dataset

_ROOMS = {
    "BatchLoader": "batch_loader",
    "EpochIterator": "batch_loader",
    "ForegroundBalanced": "samplers",
    "Patch": "samples",
    "PatientBalanced": "samplers",
    "Sampler": "samplers",
    "Sequential": "samplers",
    "Stack": "samples",
    "Timings": "timings",
    "Uniform": "samplers",
    "Weighted": "samplers",
}

__all__ = [
    "Batch",
    "BatchLoader",
    "EpochIterator",
    "ForegroundBalanced",
    "Patch",
    "PatientBalanced",
    "Sampler",
    "Sequential",
    "Stack",
    "Timings",
    "Uniform",
    "Weighted",
    "epoch_order",
    "iterate_batches",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def iterate_batches(
    dataset: Dataset, batch_size: int, *, split: str = "", seed: int = 0, epoch: int = 0
) -> Iterator[Batch]:
    """Every slice of the file, or of one part of its split, once and as it is stored.

    `BatchLoader` does more. This is its plainest use: images (b, rows, columns[, samples]) and
    masks (b, rows, columns) with bit s for structure s; the last batch may be smaller.

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
    from parallel_dicomseg.loader.batch_loader import BatchLoader

    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}, it must be at least 1")
    with BatchLoader(
        dataset,
        batch_size,
        split=split,
        seed=seed,
        masks="bits",
        channels="last",
        image_dtype="stored",
    ) as loader:
        loader.set_epoch(epoch)
        for batch in loader:
            image = batch.image[..., 0] if dataset.samples == 1 else batch.image
            yield Batch(image, batch.mask, batch.index, epoch)


def warm_up() -> None:
    """Load numba and the kernels that read, decode and augment; see docs/loader.md.

    Otherwise the first batch that is augmented waits for it: some seconds where numba's cache is
    empty, else well below one. Without augmentation it is not needed.
    """
    from parallel_dicomseg.loader.augment import warm_up as warm_up_augmentation
    from parallel_dicomseg.loader.readers import warm_up as warm_up_readers

    warm_up_readers()
    warm_up_augmentation()
