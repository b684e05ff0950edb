"""Batches as PyTorch wants them: dictionaries of tensors.

The loader has threads of its own, so nothing here needs worker processes: `DevicePrefetcher` around
a `BatchLoader` is the fastest way. `BatchStream` and `SampleDataset` are for programs that insist
on a `torch.utils.data.DataLoader`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader import Batch, BatchLoader, EpochIterator

Tensors = dict[str, Any]
"""Tensors by name; columns of text are lists of str."""

MOST_WORKERS = 1024


def tensors(batch: Batch) -> Tensors:
    """A batch as tensors on the CPU that share its memory.

    Returns
    -------
    dict
        `image`, `mask` and `index` as in `Batch`, and its columns by their names. PyTorch has no
        arithmetic on unsigned integers above 8 bits: they become int32 and int64 copies.
    """
    named = {"image": batch.image, "mask": batch.mask, "index": batch.index, **batch.columns}
    return {name: _tensor(values) for name, values in named.items()}


def _tensor(values: NDArray[Any]) -> Any:
    if values.dtype.kind == "S":
        return [text.decode(errors="replace") for text in values.ravel().tolist()]
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        values = values.astype(np.int32 if values.dtype.itemsize == 2 else np.int64)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory that a graphics card reads itself, for `BatchLoader(…, allocate=pinned)`.

    The loader's threads then fill what `DevicePrefetcher` copies from, and nothing is copied in
    between. Ordinary memory where there is no CUDA device, and of types that PyTorch lacks.
    """
    if dtype.kind == "u" and dtype.itemsize > 1:  # `tensors` makes others of them
        return np.empty(shape, dtype)
    like = torch.from_numpy(np.empty(0, dtype)).dtype
    made: NDArray[Any] = torch.empty(
        shape, dtype=like, pin_memory=torch.cuda.is_available()
    ).numpy()
    return made


class BatchStream(IterableDataset):
    """One epoch after another of ready batches, for `DataLoader(stream, batch_size=None)`.

    The batches and their order are the same with any number of workers: worker w of n makes the
    batches w, w + n, … of the epoch, and the DataLoader asks the workers in turn. Every pass is the
    next epoch, in persistent workers and new ones alike. Without workers it is the loader itself,
    with its state and its times.
    """

    def __init__(self, loader: BatchLoader) -> None:
        super().__init__()
        self._loader = loader
        # Workers are copies of this object: what they count must be in memory that all share.
        self._epochs = torch.full((MOST_WORKERS,), loader.epoch).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, in running workers too."""
        self._loader.set_epoch(epoch)
        self._epochs.fill_(epoch)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Tensors]:
        worker = get_worker_info()
        batches = (
            iter(self._loader) if worker is None else self._share(worker.id, worker.num_workers)
        )
        with closing(batches):
            for batch in batches:
                yield tensors(batch)

    def _share(self, worker: int, workers: int) -> EpochIterator:
        """A worker's batches of its next epoch."""
        if workers > MOST_WORKERS:
            raise ConfigurationError(f"{workers} workers, at most {MOST_WORKERS} are possible")
        self._loader.set_epoch(int(self._epochs[worker]))
        self._epochs[worker] += 1
        return self._loader.batches(start=worker, step=workers)


class SampleDataset(Dataset):
    """Samples by number, for a DataLoader with a sampler of its own; it collates them.

    The loader's own order is not used. A DataLoader asks for all samples of a batch at once, and
    they are read and augmented together. The augmentation of a sample changes with the epoch.
    """

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader
        self._epoch = torch.tensor(loader.epoch).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Augment as in this epoch from now on, in running workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Samples of the chosen split."""
        return self._loader.samples

    def __getitem__(self, number: int) -> Tensors:
        """One sample's image and mask, without the axis of the batch."""
        return self.__getitems__([range(len(self))[number]])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Tensors]:
        """Several samples at once."""
        rows = self._loader.rows[np.asarray(numbers, np.int64)]
        batch = self._loader.read(rows, epoch=int(self._epoch))
        whole = tensors(batch)
        return [{name: values[k] for name, values in whole.items()} for k in range(len(numbers))]


class DevicePrefetcher:
    """Batches on a device, copied while the step before them still runs.

    Iterate over it as often as there are epochs. To a CUDA device, a batch is copied on a stream of
    its own: from where it is, if the loader allocates `pinned` memory, else through pinned memory
    that is used again. Elsewhere it is only moved.
    """

    def __init__(
        self,
        batches: Iterable[Batch] | Iterable[Mapping[str, Any]],
        device: str | torch.device,
        *,
        ahead: int = 2,
    ) -> None:
        """Around a loader, or a DataLoader over a `BatchStream`.

        Parameters
        ----------
        batches
            Batches, or dictionaries of tensors.
        device
            Where they go.
        ahead
            Batches on their way beside the one that the step has, at least 1.
        """
        if ahead < 1:
            raise ConfigurationError(f"ahead is {ahead}, it must be at least 1")
        self._batches = batches
        self._device = torch.device(device)
        self._ahead = ahead

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._batches)  # type: ignore[arg-type]  # who has none raises as len() does

    def __iter__(self) -> Iterator[Tensors]:
        source = (
            tensors(batch) if isinstance(batch, Batch) else dict(batch) for batch in self._batches
        )
        if self._device.type == "cuda":
            yield from self._copied_ahead(source)
            return
        for batch in source:
            yield {name: self._moved(values) for name, values in batch.items()}

    def _moved(self, values: Any) -> Any:
        return values.to(self._device) if isinstance(values, torch.Tensor) else values

    def _copied_ahead(self, source: Iterator[Tensors]) -> Iterator[Tensors]:
        stream = torch.cuda.Stream(self._device)
        slots = deque(_PinnedSlot() for _ in range(self._ahead + 1))
        copying: deque[tuple[Tensors, torch.cuda.Event]] = deque()
        for batch in source:
            slot = slots[0]
            slots.rotate(-1)
            copying.append((slot.copy(batch, self._device, stream), slot.copied))
            if len(copying) > self._ahead:
                yield _handed_over(*copying.popleft(), self._device)
        while copying:
            yield _handed_over(*copying.popleft(), self._device)


class _PinnedSlot:
    """Pinned memory for one batch, filled again once its last copy has arrived."""

    def __init__(self) -> None:
        self.copied: torch.cuda.Event = torch.cuda.Event()
        self._pinned: dict[str, torch.Tensor] = {}
        self._source: Tensors = {}

    def copy(self, batch: Tensors, device: torch.device, stream: torch.cuda.Stream) -> Tensors:
        """Begin to copy a batch to the device."""
        self.copied.synchronize()
        self.copied = torch.cuda.Event()
        # as long as somebody has the batch, the loader does not write into its memory
        self._source = batch
        on_device: Tensors = {}
        with torch.cuda.stream(stream):
            for name, values in batch.items():
                on_device[name] = values
                if isinstance(values, torch.Tensor):
                    staged = values if values.is_pinned() else self._staged(name, values)
                    on_device[name] = staged.to(device, non_blocking=True)
            self.copied.record(stream)
        return on_device

    def _staged(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The values in pinned memory; a smaller last batch takes a part of it."""
        pinned = self._pinned.get(name)
        if pinned is None or pinned.dtype != values.dtype or pinned.numel() < values.numel():
            pinned = torch.empty(values.numel(), dtype=values.dtype, pin_memory=True)
            self._pinned[name] = pinned
        return pinned[: values.numel()].view(values.shape).copy_(values)


def _handed_over(batch: Tensors, copied: torch.cuda.Event, device: torch.device) -> Tensors:
    """A batch for the consumer's stream: it waits for the copy, and keeps the memory until then."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for values in batch.values():
        if isinstance(values, torch.Tensor):
            values.record_stream(current)
    return batch
