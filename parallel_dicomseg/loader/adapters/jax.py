"""Batches as JAX wants them: arrays that are on the device before the step asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader import Batch


class JaxBatches:
    """Batches with `image` and `mask` as JAX arrays, put on a device ahead of the step.

    Iterate over it as often as there are epochs. `index` and the columns stay NumPy arrays. With
    `drop_last=True` in the loader all batches have one shape, and a jitted step compiles once.
    """

    def __init__(self, batches: Iterable[Batch], device: Any = None, *, ahead: int = 2) -> None:
        """Around a loader.

        Parameters
        ----------
        batches
            A `BatchLoader`, or anything that gives batches.
        device
            A `jax.Device` or a `jax.sharding.Sharding`; None: JAX's default device.
        ahead
            Batches on their way beside the one that the step has, at least 1.
        """
        if ahead < 1:
            raise ConfigurationError(f"ahead is {ahead}, it must be at least 1")
        self._batches = batches
        self._device = device
        self._ahead = ahead

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._batches)  # type: ignore[arg-type]  # who has none raises as len() does

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Batch] = deque()
        for batch in self._batches:
            waiting.append(self._put(batch))
            if len(waiting) > self._ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _put(self, batch: Batch) -> Batch:
        """Begin to copy a batch; `device_put` returns before it has arrived."""
        # JAX takes an array's memory as its own where it can, and keeps the array alive.
        image, mask = jax.device_put((batch.image, _supported(batch.mask)), self._device)
        return replace(batch, image=image, mask=mask)


def _supported(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Masks of 64 structures lose half of them in JAX's 32-bit world."""
    if mask.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        raise ConfigurationError(
            "JAX would cut masks of 64 bits: choose fewer structures, masks='channels', or set "
            "jax_enable_x64"
        )
    return mask
