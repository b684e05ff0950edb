"""The order of an epoch, and a random number for each of its samples: pure functions of integers.

Everything comes from one counter-based generator (SplitMix64), not from a stream of numbers: what a
sample gets depends on (seed, epoch, sample) and on nothing that was drawn before, and no release of
NumPy changes it.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.records import Float64, Int64

UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_DOUBLE_BITS = np.uint64(11)
_DOUBLE_STEP = 2.0**-53


def mixed(values: NDArray[np.integer]) -> UInt64:
    """SplitMix64 of each value (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64 bits."""
    z = values.astype(np.uint64, copy=True)
    z += _GOLDEN
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def stream(seed: int, epoch: int, name: str) -> UInt64:
    """The key, (1,) uint64, of an independent family of random numbers.

    Parameters
    ----------
    seed, epoch
        Any integers; of large or negative ones the lowest 64 bits count.
    name
        What the numbers are for; families of different names have nothing in common.
    """
    low = (1 << 64) - 1
    key = mixed(np.array([seed & low], np.uint64))
    key = mixed(key ^ np.uint64(epoch & low))
    return mixed(key ^ np.uint64(zlib.crc32(name.encode())))


def hashed(key: UInt64, counters: NDArray[np.integer]) -> UInt64:
    """A random number of 64 bits for each counter, (n,) uint64, of the family `key`."""
    return mixed(mixed(counters) ^ key)


def uniform(key: UInt64, counters: NDArray[np.integer]) -> Float64:
    """A random number in [0, 1) for each counter, (n,) float64."""
    numbers: Float64 = (hashed(key, counters) >> _DOUBLE_BITS).astype(np.float64)
    numbers *= _DOUBLE_STEP
    return numbers


def shuffled(samples: int, key: UInt64) -> Int64:
    """A permutation of `samples` that the key decides: the order of their random numbers."""
    return np.argsort(hashed(key, np.arange(samples)), kind="stable").astype(np.int64, copy=False)


def epoch_order(samples: int, seed: int, epoch: int) -> Int64:
    """A permutation of the samples, (samples,) int64, that depends on seed and epoch alone."""
    return shuffled(samples, stream(seed, epoch, "order"))


def share(order: Int64, rank: int, world_size: int) -> Int64:
    """What one of `world_size` processes takes of an order: every `world_size`-th, from `rank` on.

    All shares together are the order, each of its places once; they differ by at most one in
    length, so nothing has to be divisible.

    Raises
    ------
    ValueError
        There is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank {rank} of {world_size}: ranks go from 0 to one less than world_size"
        )
    return order[rank::world_size]


def occurrences(order: Int64) -> Int64:
    """For each place of an order, how often its sample was there before, (n,) int64."""
    by_sample = np.argsort(order, kind="stable")
    ordered = order[by_sample]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])[: len(order)]
    lengths = np.diff(np.r_[first, len(order)])
    counts = np.empty(len(order), np.int64)
    counts[by_sample] = np.arange(len(order)) - np.repeat(first, lengths)
    return counts


def sample_seeds(seed: int, epoch: int, index: Int64, occurrence: Int64 | None = None) -> UInt64:
    """A seed for all that is random about each sample, (n,) uint64.

    Parameters
    ----------
    seed, epoch
        Of the loader.
    index
        (n,) rows of the file.
    occurrence
        (n,) how often the sample was in this epoch before; a sampler may draw it several times.
        None: never.
    """
    seeds = hashed(stream(seed, epoch, "sample"), np.asarray(index))
    if occurrence is None:
        return seeds
    again = occurrence > 0
    return np.where(again, mixed(seeds ^ mixed(occurrence)), seeds)
