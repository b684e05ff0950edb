"""Batches as Keras 3 wants them: pairs of images and masks, on any of its backends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import keras
from numpy.typing import NDArray

from parallel_dicomseg.loader import Batch, BatchLoader, EpochIterator

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Images and masks."""


def batch_generator(loader: BatchLoader) -> Iterator[Pair]:
    """Images and masks without end, for `model.fit(generator, steps_per_epoch=len(loader))`.

    Give `fit` also `shuffle=False`: Keras warns otherwise that it cannot shuffle a generator, which
    the loader has done already.
    """
    for batch in loader.forever():
        yield batch.image, batch.mask


class KerasBatches(keras.utils.PyDataset):
    """The batches of an epoch by number, for `fit`, `evaluate` and `predict`.

    Give `fit` also `shuffle=False`: the loader has shuffled the samples already, with its seed.
    Otherwise Keras, unseeded, mixes the order of the batches; each still comes once an epoch, but
    none can be made ready ahead of time.

    Item k is always the same batch in the same epoch, however often and by whom it is asked for.
    The next epoch of the loader begins when Keras has ended one and every item was asked for; with
    `steps_per_epoch` an epoch of the loader spans several of Keras's.
    """

    def __init__(self, loader: BatchLoader) -> None:
        # One worker: the loader has threads of its own, and Keras's would ask out of turn.
        super().__init__(workers=1, use_multiprocessing=False)
        self._loader = loader
        self._epoch = loader.epoch
        self._lock = threading.Lock()
        self._running: EpochIterator | None = None
        self._next = 0
        self._served: set[int] = set()

    @property
    def epoch(self) -> int:
        """The loader's epoch of which items are given."""
        return self._epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    def __getitem__(self, number: int) -> Pair:
        """Images and masks of one batch."""
        number = range(len(self))[number]
        with self._lock:
            batch = self._batch(number)
            self._served.add(number)
        return batch.image, batch.mask

    def _batch(self, number: int) -> Batch:
        """The next one of those that are being made ready, or from there on."""
        if self._running is None or number != self._next:
            self._stop()
            self._loader.set_epoch(self._epoch)
            # A pass from the beginning is the loader's own: it keeps the times of that.
            self._running = iter(self._loader) if number == 0 else self._loader.batches(number)
        batch = next(self._running)
        self._next = number + 1
        if self._next == len(self):
            self._stop()
        return batch

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def on_epoch_end(self) -> None:
        """Go on to the next epoch, if this one is through; Keras calls this.

        It also calls it after it took a first item or two, to learn their shapes.
        """
        with self._lock:
            if len(self._served) == len(self):
                self._stop()
                self._served.clear()
                self._epoch += 1
