"""Which samples an epoch has and in which order; nothing here reads a pixel.

A sampler is anything with `order(epoch)`. The descriptions of this module (`Uniform()`,
`ForegroundBalanced(0.5)`, …) become samplers once they are bound to the rows of a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.order import (
    UInt64,
    epoch_order,
    hashed,
    mixed,
    shuffled,
    stream,
    uniform,
)
from parallel_dicomseg.records import Bytes, Float64, Int64


@runtime_checkable
class Sampler(Protocol):
    """What decides the order; write your own with this one method."""

    def order(self, epoch: int) -> Int64:
        """Rows of the file, (any number,) int64, for an epoch; the same for the same epoch.

        In several processes each of them asks, and takes its share of the same answer.
        """


@dataclass(frozen=True, slots=True)
class SampleTable:
    """What samplers may know of the samples; one place per sample of the chosen split."""

    rows: Int64
    """(n,) rows of the file."""
    seed: int
    """Of the loader."""
    patient: Bytes | None = None
    """(n,) pseudonyms; None where the file has none."""
    foreground: Int64 | None = None
    """(n,) pixels of the chosen structures' masks; None where the file does not say."""


@runtime_checkable
class Description(Protocol):
    """A sampler that waits for the file."""

    def over(self, table: SampleTable) -> Sampler:
        """The sampler of these samples.

        Raises
        ------
        ConfigurationError
            The file does not say what is needed, or has no such samples.
        """


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every sample once an epoch, in a new random order each time."""

    def over(self, table: SampleTable) -> Sampler:
        """See `Description.over`."""
        return _Uniform(table.rows, table.seed)


@dataclass(frozen=True, slots=True)
class Sequential:
    """Every sample once an epoch, in the order of the file."""

    def over(self, table: SampleTable) -> Sampler:
        """See `Description.over`."""
        return _Sequential(table.rows)


@dataclass(frozen=True, slots=True)
class ForegroundBalanced:
    """Each place of an epoch has foreground with a stated probability, independently.

    As many samples an epoch as the split has. Those with foreground and those without each come
    in rounds: nobody twice before everybody of that kind was there once.
    """

    probability: float
    """That a sample shows at least one pixel of the chosen structures, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigurationError(f"probability is {self.probability}, it must be from 0 to 1")

    def over(self, table: SampleTable) -> Sampler:
        """See `Description.over`."""
        if table.foreground is None:
            raise ConfigurationError(
                "ForegroundBalanced needs the areas of the masks (/table/area), the file has none"
            )
        drawn = table.foreground > 0
        inside, outside = table.rows[drawn], table.rows[~drawn]
        wanted = ((inside, self.probability, "with"), (outside, 1 - self.probability, "without"))
        for rows, share, which in wanted:
            if share > 0 and not len(rows):
                raise ConfigurationError(
                    f"ForegroundBalanced({self.probability:g}): no sample {which} foreground"
                )
        return _ForegroundBalanced(inside, outside, self.probability, table.seed)


@dataclass(frozen=True, slots=True)
class PatientBalanced:
    """Every patient equally often, however many slices each has.

    As many samples an epoch as the split has. Patients come in rounds, each in a new order, and
    so do the samples of each patient.
    """

    def over(self, table: SampleTable) -> Sampler:
        """See `Description.over`."""
        if table.patient is None:
            raise ConfigurationError("PatientBalanced needs /table/patient_id, the file has none")
        _, number = np.unique(table.patient, return_inverse=True)
        return _PatientBalanced(_grouped(table.rows, number), len(table.rows), table.seed)


@dataclass(frozen=True, eq=False)
class Weighted:
    """Samples drawn with replacement, each with a probability proportional to its weight."""

    weights: NDArray[np.floating[Any]]
    """(rows of the file,) or (samples of the split,), none negative, not all 0."""
    samples: int = 0
    """Samples an epoch; 0: as many as the split has."""

    def over(self, table: SampleTable) -> Sampler:
        """See `Description.over`."""
        weights = np.asarray(self.weights, np.float64)
        if weights.ndim == 1 and len(weights) > len(table.rows) > 0:
            weights = weights[table.rows] if table.rows.max() < len(weights) else weights
        if weights.shape != table.rows.shape:
            raise ConfigurationError(
                f"there are weights of shape {np.shape(self.weights)} for {len(table.rows)} samples"
            )
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ConfigurationError("weights must be finite, none negative, and not all 0")
        return _Weighted(table.rows, weights, self.samples or len(table.rows), table.seed)


@dataclass(frozen=True, eq=False)
class _Uniform:
    rows: Int64
    seed: int

    def order(self, epoch: int) -> Int64:
        return self.rows[epoch_order(len(self.rows), self.seed, epoch)]


@dataclass(frozen=True, eq=False)
class _Sequential:
    rows: Int64

    def order(self, epoch: int) -> Int64:  # noqa: ARG002  the same in every epoch
        return self.rows


@dataclass(frozen=True, eq=False)
class _ForegroundBalanced:
    inside: Int64
    outside: Int64
    probability: float
    seed: int

    def order(self, epoch: int) -> Int64:
        samples = len(self.inside) + len(self.outside)
        key = stream(self.seed, epoch, "foreground")
        chosen = uniform(key, np.arange(samples)) < self.probability
        out = np.empty(samples, np.int64)
        for rows, places, name in ((self.inside, chosen, "inside"), (self.outside, ~chosen, "out")):
            out[places] = rounds(rows, int(places.sum()), stream(self.seed, epoch, name))
        return out


@dataclass(frozen=True, eq=False)
class _PatientBalanced:
    groups: list[Int64]
    samples: int
    seed: int

    def order(self, epoch: int) -> Int64:
        patients = rounds(
            np.arange(len(self.groups)), self.samples, stream(self.seed, epoch, "patient")
        )
        key = stream(self.seed, epoch, "patient's samples")
        out = np.empty(self.samples, np.int64)
        for number, places in enumerate(_grouped(np.arange(self.samples), patients)):
            rows = self.groups[number]
            out[places] = rounds(rows, len(places), hashed(key, np.array([number])))
        return out


@dataclass(frozen=True, eq=False)
class _Weighted:
    rows: Int64
    weights: Float64
    samples: int
    seed: int

    def order(self, epoch: int) -> Int64:
        ends = np.cumsum(self.weights)
        drawn = uniform(stream(self.seed, epoch, "weighted"), np.arange(self.samples)) * ends[-1]
        place = np.searchsorted(ends, drawn, side="right")
        # a product rounded up to the last end would be one beyond; a weight of 0 is never last
        order: Int64 = self.rows[np.minimum(place, np.flatnonzero(self.weights)[-1])]
        return order


def _grouped(values: Int64, number: Int64) -> list[Int64]:
    """The values of group 0, of group 1, …, each in their order."""
    ends = np.cumsum(np.bincount(number))
    return np.split(values[np.argsort(number, kind="stable")], ends[:-1])


def rounds(rows: Int64, count: int, key: UInt64) -> Int64:
    """`count` of `rows`: all of them in a random order, all again in another one, and so on."""
    if not count:
        return np.empty(0, np.int64)
    whole = -(-count // len(rows))
    parts = [rows[shuffled(len(rows), mixed(key ^ np.uint64(k)))] for k in range(whole)]
    return np.concatenate(parts)[:count]
