"""The loader: batches in an order that the seed decides, made ahead by threads."""

from __future__ import annotations

import os
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.loader.assemble import Recipe
from parallel_dicomseg.loader.batch import Batch
from parallel_dicomseg.loader.opening import Source, open_source
from parallel_dicomseg.loader.order import UInt64, occurrences, sample_seeds, share
from parallel_dicomseg.loader.pipeline import Buffers, Pipeline, Ring
from parallel_dicomseg.loader.readers import Clock, Scratch, load_kernels
from parallel_dicomseg.loader.recipe import Look, make_recipe
from parallel_dicomseg.loader.samplers import (
    Description,
    Sampler,
    SampleTable,
    Sequential,
    Uniform,
)
from parallel_dicomseg.loader.samples import Channels, Masks, Sample
from parallel_dicomseg.loader.timings import Timings, usable_cores
from parallel_dicomseg.records import Int64

if TYPE_CHECKING:
    from parallel_dicomseg.loader.augment import Augmentation
    from parallel_dicomseg.loader.windows import Normalize, Window
    from parallel_dicomseg.store import Dataset

#: Makes an array, any content, from its shape and type.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]

_MOST_THREADS = 8
# A piece is what a thread does at a time: long enough that handing it out costs nothing.
_MOST_PER_PIECE = 32
# So many samples without kernels, and loading numba pays for itself in the next epoch.
_SAMPLES_UNTIL_KERNELS = 10_000
_EPOCHS_KEPT = 1000
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Order:
    """What one process serves in an epoch."""

    epoch: int
    rows: Int64
    seeds: UInt64
    batch_size: int
    batches: int

    def bounds(self, number: int) -> tuple[int, int]:
        """First place and end of a batch."""
        start = number * self.batch_size
        return start, min(start + self.batch_size, len(self.rows))


@dataclass(frozen=True, slots=True)
class _Part:
    """Some batches of an epoch."""

    first: int
    """The number that the pipeline gives to the first one of them."""
    order: _Order
    numbers: range

    @property
    def end(self) -> int:
        """The pipeline's number behind the last one."""
        return self.first + len(self.numbers)


class _Job:
    """Batches of one epoch, and perhaps of those that follow, for the pipeline."""

    def __init__(self, recipe: Recipe, piece: int, order: _Order, numbers: range) -> None:
        self._recipe = recipe
        self._piece = piece
        # never changed, only replaced: threads look at it without a lock
        self._parts: tuple[_Part, ...] = (_Part(0, order, numbers),)
        self.is_open = False

    @property
    def count(self) -> int:
        return self._parts[-1].end

    def follow(self, order: _Order) -> None:
        """Add the next epoch; of those before only the last one is still needed."""
        last = self._parts[-1]
        self._parts = (last, _Part(last.end, order, range(order.batches)))

    def _bounds(self, number: int) -> tuple[_Order, int, int]:
        """Order of a batch's epoch, and the first place and the end of the batch in it."""
        part = next(part for part in self._parts if number < part.end)
        return part.order, *part.order.bounds(part.numbers[number - part.first])

    def pieces(self, number: int) -> list[tuple[int, int]]:
        _, start, end = self._bounds(number)
        samples = end - start
        return [(at, min(at + self._piece, samples)) for at in range(0, samples, self._piece)]

    def fill(
        self, number: int, start: int, end: int, buffers: Buffers, scratch: Scratch, clock: Clock
    ) -> None:
        order, first, _ = self._bounds(number)
        part = slice(first + start, first + end)
        image, mask = (array[start:end] for array in buffers)
        self._recipe.fill(order.rows[part], order.seeds[part], image, mask, scratch, clock)


@dataclass(frozen=True, slots=True)
class _Threads:
    """A pipeline at work, which may go from one epoch to the next."""

    pid: int
    job: _Job
    pipeline: Pipeline

    @property
    def is_here(self) -> bool:
        """Whether the threads are in this process; a fork has none of its parent's."""
        return self.pid == os.getpid()

    def close(self) -> None:
        if self.is_here:
            self.pipeline.close()


class BatchLoader:
    """Random batches of images and masks of one file, in an order that the seed decides.

    Every pass (``for batch in loader``) is an epoch, and the next pass the next one. Which samples
    a batch holds and how they are augmented depends on (seed, epoch, sample) alone: not on the
    number of threads, processes or ranks, and not on where an interrupted epoch is resumed.

    It can be pickled; a copy opens the file anew. After a fork, both sides go on.
    """

    def __init__(
        self,
        file_or_dataset: str | Path | Dataset,
        batch_size: int = 16,
        *,
        structures: Sequence[str] | None = None,
        split: str = "",
        shuffle: bool = True,
        seed: int = 0,
        sampler: Sampler | Description | None = None,
        augment: Sequence[Augmentation | str] | str = (),
        window: Window | tuple[float, float] | str | None = None,
        normalize: Normalize | None = None,
        sample: Sample = "slice",
        masks: Masks = "channels",
        channels: Channels = "first",
        image_dtype: str | np.dtype[Any] = "float32",
        columns: Sequence[str] = (),
        prefetch: int = 4,
        threads: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        verify: bool | None = None,
        datasets: tuple[str, str] = ("", ""),
        interpolation: str = "linear",
        outside: str | float = "minimum",
        allocate: Allocate | None = None,
    ) -> None:
        """Open the file.

        Parameters
        ----------
        file_or_dataset
            A converted HDF5 file, its zarr mirror, an open `Dataset` (its file is opened again), or
            any HDF5 file with an image and a mask dataset.
        batch_size
            Samples of a batch, at least 1.
        structures
            Names, in the order in which they are wanted; None: all, in the file's order.
        split
            `"train"`, `"validation"`, `"test"` as in the file; empty: all slices.
        shuffle
            False is short for ``sampler=Sequential()``.
        seed
            Decides order and augmentation.
        sampler
            Which samples an epoch has; None: every one once.
        augment
            Objects of `augment`, or names of them; nothing by default.
        window, normalize
            What intensities become, see `windows`; by default they stay as they are stored.
        sample
            `"slice"`, `Stack(k)` or `Patch(shape)`.
        masks
            `"channels"`: one 0/1 plane per structure; `"labels"`: one number per pixel, where
            structures overlap of the one nested deepest, or else named first; `"bits"`: bit k is
            structure k.
        channels
            Whether the axis of channels comes `"first"` (after that of the batch) or `"last"`.
        image_dtype
            Of the batch, or `"stored"`: that of the file. Integers are rounded and limited.
        columns
            Names of columns of the file's table that batches carry along.
        prefetch
            Batches that are made ahead, at least 1. Memory is (prefetch + 2) batches.
        threads
            That make them; 0: one per core that this process may use, at most 8.
        rank, world_size
            This process and how many there are: each serves its share of the same order.
        drop_last
            Leave out the last batch where it is smaller; every rank then has as many batches.
        verify
            Compare every chunk that is read with the checksum in the file's table. None: where
            there are checksums, in our HDF5 files.
        datasets
            Names of the image and of the mask dataset, in a file of others.
        interpolation, outside
            Of augmented images, see `augment.compile_plan`.
        allocate
            Makes an array of a shape and type, any content, for the batches' buffers; None:
            `numpy.empty`. `adapters.pytorch.pinned` makes memory that a graphics card reads itself.

        Raises
        ------
        ConfigurationError
            An option makes no sense, or not with this file.
        LayoutError
            The file is missing or cannot be read.
        """
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        if isinstance(file_or_dataset, str | Path):
            self.path = Path(file_or_dataset)
        else:
            self.path = file_or_dataset.path
        self._arguments["file_or_dataset"] = self.path
        _check_numbers(batch_size, prefetch, threads, rank, world_size)
        self.batch_size = batch_size
        self.seed = seed
        self._prefetch = prefetch
        self._allocate: Allocate = np.empty if allocate is None else allocate
        self._threads = threads or min(_MOST_THREADS, usable_cores())
        self._rank, self._world_size, self._drop_last = rank, world_size, drop_last
        self._source = open_source(self.path, *datasets, verify=verify)
        # dropped without `close`: files close with their last reference
        look = Look(
            sample, masks, channels, image_dtype, tuple(structures or ()), augment, window,
            normalize, interpolation, outside,
        )  # fmt: skip
        try:
            self.rows = rows_of_split(self._source, split)
            self._columns = {name: self._source.column(name) for name in columns}
            self._recipe = make_recipe(self._source, look)
            self._sampler = self._bind(sampler or (Uniform() if shuffle else Sequential()))
            self._most = _piece_size(batch_size, prefetch, self._threads, self._recipe)
        except BaseException:
            self._source.close()
            raise
        self._position = (0, 0)
        self._is_resumed = False
        self._known_orders: dict[int, _Order] = {}
        self._ring_of: tuple[int, Ring] = (-1, Ring(tuple, 0))
        self._running: weakref.WeakSet[EpochIterator] = weakref.WeakSet()
        self._served = 0
        self._is_closed = False
        self.timings: deque[Timings] = deque(maxlen=_EPOCHS_KEPT)

    # --- what there is ---------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of the epoch that comes next, or runs."""
        return self._order_of(self.epoch).batches

    @property
    def samples(self) -> int:
        """Slices of the split that samples are about."""
        return len(self.rows)

    @property
    def structures(self) -> tuple[str, ...]:
        """Names of the mask's channels, labels from 1 on, or bits."""
        return tuple(self._source.structures[bit] for bit in self._recipe.code.bits)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Axes of one sample's image."""
        return self._recipe.form.image

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Axes of one sample's mask."""
        return self._recipe.form.mask(self._recipe.code)

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """Of the batches' images."""
        return self._recipe.image_dtype

    @property
    def mask_dtype(self) -> np.dtype[Any]:
        """Of the batches' masks."""
        return self._recipe.code.dtype

    @property
    def epoch(self) -> int:
        """The epoch that runs, or else comes next; from 0."""
        return self._position[0]

    @property
    def order(self) -> Int64:
        """Rows of the file in the order in which this rank serves them in `epoch`."""
        return self._order_of(self.epoch).rows

    @property
    def advice(self) -> str:
        """What would make the next epoch faster, after the last whole one; else empty."""
        return self.timings[-1].advice if self.timings else ""

    # --- batches ---------------------------------------------------------------------------------

    def __iter__(self) -> EpochIterator:
        """The batches of an epoch: the next one, or what is left of the one that was resumed."""
        epoch, start = self._next_position()
        order = self._order_of(epoch)
        return self._run(order, range(start, order.batches), is_own=True)

    def _next_position(self) -> tuple[int, int]:
        """Epoch and first batch of the pass that begins now."""
        epoch, start = self._position
        if start and not self._is_resumed:
            epoch, start = epoch + 1, 0
        self._is_resumed = False
        self._position = (epoch, start)
        return self._position

    def batches(self, start: int = 0, step: int = 1) -> EpochIterator:
        """Every `step`-th batch of `epoch`, from a number on; what comes next stays as it is.

        For processes that share an epoch: worker w of n takes ``batches(w, n)``.
        """
        order = self._order_of(self.epoch)
        return self._run(order, range(start, order.batches, step), is_own=False)

    def forever(self) -> Iterator[Batch]:
        """Batches of one epoch after another, without an end.

        While the last batches of an epoch are used, the first ones of the next are made: its order
        is asked for a few batches ahead.

        Raises
        ------
        ConfigurationError
            An epoch has no batch.
        """
        threads: _Threads | None = None
        batches: EpochIterator | None = None
        try:
            while True:
                epoch, start = self._next_position()
                if batches is not None:
                    threads = batches.hand_over(epoch, start)
                order = self._order_of(epoch)
                if not order.batches:
                    raise ConfigurationError(f"{self.path}: an epoch has no batch")
                numbers = range(start, order.batches)
                batches = self._run(order, numbers, is_own=True, leads_on=True, threads=threads)
                threads = None
                yield from batches
        finally:
            if batches is not None:
                batches.close()
            if threads is not None:
                threads.close()

    def read(self, rows: Sequence[int] | Int64, epoch: int | None = None) -> Batch:
        """Some samples as a batch, read here and now.

        Parameters
        ----------
        rows
            (b,) rows of the file; `self.rows` are those of the split.
        epoch
            In which they are augmented; None: `self.epoch`.
        """
        index = np.array(rows, np.int64)
        if index.ndim != 1 or ((index < 0) | (index >= len(self._source))).any():
            raise ConfigurationError(f"rows go from 0 to {len(self._source) - 1}")
        self._prepare()
        chosen = self.epoch if epoch is None else epoch
        seeds = sample_seeds(self.seed, chosen, index)
        order = _Order(chosen, index, seeds, max(1, len(index)), 1)
        buffers, scratch, clock = self._buffers(len(index)), Scratch(), Clock()
        for start in range(0, len(index), self._most):
            end = min(start + self._most, len(index))
            job = _Job(self._recipe, self._most, order, range(1))
            job.fill(0, start, end, buffers, scratch, clock)
        return self._batch(order, 0, buffers)

    def _run(
        self,
        order: _Order,
        numbers: range,
        *,
        is_own: bool,
        leads_on: bool = False,
        threads: _Threads | None = None,
    ) -> EpochIterator:
        self._prepare()
        running = EpochIterator(self, order, numbers, is_own, leads_on, threads)
        self._running.add(running)
        return running

    def _prepare(self) -> None:
        """Refuse to go on when closed; load numba where it pays."""
        if self._is_closed:
            raise ConfigurationError(f"{self.path}: the loader is closed")
        if not self._recipe.plan.is_empty or self._served >= _SAMPLES_UNTIL_KERNELS:
            load_kernels()

    def _ring(self) -> Ring:
        """The buffers of this process, kept from one epoch to the next; a fork makes its own."""
        pid, ring = self._ring_of
        if pid != os.getpid():
            make = partial(_make_buffers, self._allocate, *self._shapes(self.batch_size))
            ring = Ring(make, self._prefetch + 2)
            self._ring_of = (os.getpid(), ring)
        return ring

    def _shapes(self, samples: int) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]:
        """Shape and type of the images and of the masks of a batch."""
        return (
            ((samples, *self.image_shape), self.image_dtype),
            ((samples, *self.mask_shape), self.mask_dtype),
        )

    def _buffers(self, samples: int) -> Buffers:
        """Room for the images and the masks of a batch."""
        return _make_buffers(self._allocate, *self._shapes(samples))

    def _batch(self, order: _Order, number: int, buffers: Buffers) -> Batch:
        start, end = order.bounds(number)
        rows = order.rows[start:end].copy()
        columns = {name: values[rows] for name, values in self._columns.items()}
        whole = end - start == order.batch_size
        image, mask = buffers if whole else (array[: end - start] for array in buffers)
        return Batch(image, mask, rows, order.epoch, columns)

    def _note(self, order: _Order, number: int, samples: int, is_own: bool) -> None:
        """A batch was given."""
        self._served += samples
        if is_own:
            is_last = number + 1 >= order.batches
            self._position = (order.epoch + 1, 0) if is_last else (order.epoch, number + 1)

    # --- order -----------------------------------------------------------------------------------

    def _order_of(self, epoch: int) -> _Order:
        if epoch not in self._known_orders:
            whole = np.asarray(self._sampler.order(epoch), np.int64)
            self._check_order(whole)
            seeds = sample_seeds(self.seed, epoch, whole, occurrences(whole))
            rows = share(whole, self._rank, self._world_size)
            batches = -(-len(rows) // self.batch_size)
            if self._drop_last:
                batches = len(whole) // self._world_size // self.batch_size
            seeds = seeds[self._rank :: self._world_size]
            order = _Order(epoch, np.ascontiguousarray(rows), seeds, self.batch_size, batches)
            # this one and the one before: an epoch is begun while the last one still runs
            while len(self._known_orders) > 1:
                self._known_orders.pop(next(iter(self._known_orders)))
            self._known_orders[epoch] = order
        return self._known_orders[epoch]

    def _check_order(self, order: Int64) -> None:
        if order.ndim != 1 or ((order < 0) | (order >= len(self._source))).any():
            raise ConfigurationError(
                f"the sampler gave an order of shape {order.shape} that is not all rows from 0 to "
                f"{len(self._source) - 1}"
            )

    def _bind(self, sampler: Sampler | Description) -> Sampler:
        """A sampler of the rows of the split."""
        if isinstance(sampler, Sampler):
            return sampler
        if not isinstance(sampler, Description):
            raise ConfigurationError(f"{sampler!r} is no sampler: it has no method order(epoch)")
        table = SampleTable(self.rows, self.seed)
        if not isinstance(sampler, Uniform | Sequential):
            has = self._source.columns
            bits = list(self._recipe.code.bits)
            table = SampleTable(
                self.rows,
                self.seed,
                self._source.column("patient_id")[self.rows] if "patient_id" in has else None,
                self._source.column("area")[:, bits].sum(1)[self.rows] if "area" in has else None,
            )
        return sampler.over(table)

    # --- state -----------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass this epoch, from its beginning."""
        self._position, self._is_resumed = (epoch, 0), True

    def state_dict(self) -> dict[str, int]:
        """Where this rank is: the next batch that its consumer would get; a few whole numbers."""
        epoch, batch = self._position
        return {"version": _STATE_VERSION, "epoch": epoch, "batch": batch, "check": self._check}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next pass go on where `state_dict` was taken.

        Raises
        ------
        ConfigurationError
            It is no state, or that of a loader with another order or other batches.
        """
        expected = {"version": _STATE_VERSION, "check": self._check}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ConfigurationError(
                    f"the state has {name} {state.get(name)}, this loader {value}: it is from a "
                    f"loader with another file, seed, batch size, sampler or number of ranks"
                )
        self._position, self._is_resumed = (int(state["epoch"]), int(state["batch"])), True

    @property
    def _check(self) -> int:
        """A number that differs for loaders whose batches differ in number or order."""
        told = (
            len(self._source), len(self.rows), zlib.crc32(self.rows.tobytes()), self.seed,
            self.batch_size, self._world_size, self._drop_last, type(self._sampler).__name__,
        )  # fmt: skip
        return zlib.crc32(repr(told).encode())

    # --- endings ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End all threads and close the file; a second call does nothing."""
        self._is_closed = True
        for running in list(self._running):
            running.close()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._arguments, self._position, self._is_resumed)


def _rebuilt(arguments: dict[str, Any], position: tuple[int, int], resumed: bool) -> BatchLoader:
    """A loader as it was pickled, in the process that asks."""
    loader = BatchLoader(**arguments)
    loader._position, loader._is_resumed = position, resumed
    return loader


def _make_buffers(allocate: Allocate, *shapes: tuple[tuple[int, ...], np.dtype[Any]]) -> Buffers:
    buffers = tuple(allocate(shape, dtype) for shape, dtype in shapes)
    for array, (shape, dtype) in zip(buffers, shapes, strict=True):
        if (array.shape, array.dtype, array.flags.c_contiguous) != (shape, dtype, True):
            raise ConfigurationError(
                f"allocate made {array.shape} {array.dtype}, expected contiguous {shape} {dtype}"
            )
        # a view that refers past the buffer would not tell that the buffer is in use
        if array[...].base is not array:
            raise ConfigurationError("allocate must not give a view of a NumPy array")
    return buffers


class EpochIterator:
    """The batches of one pass; close it, drop it or use it up, then its threads end."""

    def __init__(
        self,
        loader: BatchLoader,
        order: _Order,
        numbers: range,
        is_own: bool,
        leads_on: bool = False,
        threads: _Threads | None = None,
    ) -> None:
        self._loader = loader
        self._order = order
        self._numbers = numbers
        self._is_own = is_own
        self._leads_on = leads_on
        self._threads = threads
        self._before = replace(threads.pipeline.clock) if threads else Clock()
        self._next_epoch = -1
        self._done = 0
        self._samples = 0
        self._started = 0.0
        self._waited = 0.0
        self._is_closed = False

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        """Batches that are left."""
        return len(self._numbers) - self._done

    def __next__(self) -> Batch:
        if self._is_closed or self._done >= len(self._numbers):
            if self._next_epoch < 0:
                self.close()
            raise StopIteration
        try:
            buffers, waited = self._running().pipeline.take()
        except BaseException:
            self.close()
            raise
        self._waited += waited
        number = self._numbers[self._done]
        batch = self._loader._batch(self._order, number, buffers)
        self._done += 1
        self._samples += len(batch.index)
        self._loader._note(self._order, number, len(batch.index), self._is_own)
        if self._leads_on and len(self) <= self._loader._prefetch:
            self._lead_on()
        if self._done == len(self._numbers):
            self._end()
        return batch

    def _running(self) -> _Threads:
        """The threads of this process; a fork has none of its parent's and starts its own."""
        if self._threads is None or not self._threads.is_here:
            self._started = self._started or time.perf_counter()
            loader = self._loader
            job = _Job(loader._recipe, loader._most, self._order, self._numbers[self._done :])
            job.is_open = self._leads_on
            pipeline = Pipeline(job, loader._ring(), loader._prefetch, loader._threads)
            self._threads, self._before = _Threads(os.getpid(), job, pipeline), Clock()
            self._next_epoch = -1
        self._started = self._started or time.perf_counter()
        return self._threads

    def _lead_on(self) -> None:
        """Let the threads go on with the next epoch, once."""
        if self._threads is None or self._next_epoch >= 0:
            return
        try:
            order = self._loader._order_of(self._order.epoch + 1)
        except Exception:  # noqa: BLE001  it will be raised when that epoch begins
            self._leads_on = False
            return
        if order.batches:
            self._next_epoch = order.epoch
            self._threads.job.follow(order)
            self._threads.pipeline.grown()

    def hand_over(self, epoch: int, start: int) -> _Threads | None:
        """The threads, if they are at this epoch already; else they end."""
        threads = self._threads
        if threads is None or self._is_closed or not threads.is_here:
            return None
        if (self._next_epoch, 0) != (epoch, start) or len(self):
            self.close()
            return None
        self._threads = None
        self.close()
        return threads

    @property
    def timings(self) -> Timings:
        """Where the time went so far."""
        clock = self._threads.pipeline.clock if self._threads else Clock()
        return Timings(
            epoch=self._order.epoch,
            batches=self._done,
            samples=self._samples,
            threads=self._loader._threads,
            seconds=time.perf_counter() - self._started if self._started else 0.0,
            read=clock.read - self._before.read,
            decode=clock.decode - self._before.decode,
            augment=clock.augment - self._before.augment,
            blocked=clock.blocked - self._before.blocked,
            waited=self._waited,
        )

    def _end(self) -> None:
        """All batches are given: note the times, and let the threads go, or go on."""
        if self._is_own:
            self._loader.timings.append(self.timings)
        if self._next_epoch < 0:
            self.close()

    def close(self) -> None:
        """End the threads of this pass; a second call does nothing."""
        self._is_closed = True
        if self._threads is not None:
            self._threads.close()
        self._loader._running.discard(self)


def _check_numbers(
    batch_size: int, prefetch: int, threads: int, rank: int, world_size: int
) -> None:
    least = {"batch_size": 1, "prefetch": 1, "threads": 0, "rank": 0, "world_size": 1}
    given = (batch_size, prefetch, threads, rank, world_size)
    for (name, low), value in zip(least.items(), given, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
            raise ConfigurationError(f"{name} is {value!r}, it must be at least {low}")
    if rank >= world_size:
        raise ConfigurationError(f"rank is {rank}, with world_size {world_size} it is below that")


def _piece_size(batch_size: int, prefetch: int, threads: int, recipe: Recipe) -> int:
    """Samples that a thread makes at a time.

    So many that the batches made ahead give every thread a piece to do and another one to go on
    with: the larger the pieces, the less the threads wait for each other.
    """
    most = max(1, _MOST_PER_PIECE // recipe.form.depth)
    return max(1, min(most, batch_size, batch_size * prefetch // (2 * threads)))


def rows_of_split(source: Source, split: str) -> Int64:
    """Rows of the file that belong to a part; all where none is named.

    Raises
    ------
    ConfigurationError
        The file has no such part.
    LayoutError
        A patient is in more than one part: what was learned would be tested on itself.
    """
    if not split:
        return np.arange(len(source))
    if "split" not in source.columns:
        raise ConfigurationError(f"{source.path} was not split, there is no {split!r}")
    parts, patients = source.column("split"), source.column("patient_id")
    rows = np.flatnonzero(parts == split.encode())
    if not len(rows):
        known = ", ".join(sorted({part.decode() for part in parts.tolist()} - {""}))
        raise ConfigurationError(
            f"{source.path} has no part {split!r}, there are {known or 'none'}"
        )
    is_named = patients != b""
    inside = np.unique(patients[(parts == split.encode()) & is_named])
    outside = np.unique(patients[(parts != split.encode()) & (parts != b"") & is_named])
    both = np.intersect1d(inside, outside)
    if len(both):
        raise LayoutError(
            f"{source.path}: {len(both)} patients are in {split!r} and in another part"
        )
    return rows.astype(np.int64, copy=False)
