"""Intensity windows and normalisation: from stored values to what a network is given.

Both together are, slice by slice, four numbers: ``(clip(x, low, high) - center) * scale`` in
float32.
They are decided once, when a loader is made, from the statistics that a converted file keeps of
every slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.operations import CENTER, HIGH, LOW, SCALE
from parallel_dicomseg.records import Float64, Int64

Read = Callable[[int], NDArray[Any]]

#: What stored values become where neither a window nor a normalisation is asked for.
UNCHANGED: Float64 = np.array([-np.inf, np.inf, 0.0, 1.0])
UNCHANGED.flags.writeable = False

#: Over what statistics are taken.
SCOPES = ("slice", "volume", "file")

# Slices, evenly spread, that percentiles of a file and of a volume are measured on.
_FILE_SLICES, _VOLUME_SLICES = 256, 32
# Values of so many bytes are counted, each by itself.
_COUNTED_BYTES = 2


@dataclass(frozen=True, slots=True)
class Window:
    """Clip to an interval; without a normalisation it becomes 0 to 1."""

    low: float
    """In stored units: Hounsfield units for CT."""
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ConfigurationError(f"a window from {self.low} to {self.high} holds nothing")

    @classmethod
    def centered(cls, center: float, width: float) -> Window:
        """As on a viewing station: (0028,1050) Window Center and (0028,1051) Window Width."""
        return cls(center - width / 2, center + width / 2)


#: Usual CT windows by name, Hounsfield units.
WINDOWS = {
    "abdomen": Window.centered(50, 400),
    "bone": Window.centered(400, 1800),
    "brain": Window.centered(40, 80),
    "liver": Window.centered(30, 150),
    "lung": Window.centered(-600, 1500),
    "mediastinum": Window.centered(50, 350),
}


@dataclass(frozen=True, slots=True)
class ZScore:
    """Subtract a mean and divide by a standard deviation (by 1 where it is 0)."""

    per: str = "slice"
    """Over what they are taken: 'slice', 'volume' or 'file'; exact, from the stored statistics."""
    mean: float | None = None
    """Given instead, with `sd`, e.g. that of the training set; stored units."""
    sd: float | None = None

    def __post_init__(self) -> None:
        _check_scope(self.per)
        if (self.mean is None) != (self.sd is None):
            raise ConfigurationError("ZScore takes a mean and a standard deviation, or neither")
        if self.sd is not None and not self.sd > 0:
            raise ConfigurationError(f"ZScore: a standard deviation of {self.sd}")


@dataclass(frozen=True, slots=True)
class MinMax:
    """Minimum and maximum, of what a window leaves, become 0 and 1."""

    per: str = "slice"

    def __post_init__(self) -> None:
        _check_scope(self.per)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Clip at two percentiles, which become 0 and 1.

    They cannot be had from stored statistics: slices are read when the loader is made. For
    'slice' every one; for 'volume' up to 32 of each, for 'file' up to 256, evenly spread.
    """

    low: float = 0.5
    high: float = 99.5
    per: str = "file"

    def __post_init__(self) -> None:
        _check_scope(self.per)
        if not 0 <= self.low < self.high <= 100:
            raise ConfigurationError(f"percentiles from {self.low} to {self.high}")


Normalize = ZScore | MinMax | Percentiles


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a file keeps of its n slices."""

    minimum: Float64
    """(n,) like the others; stored units."""
    maximum: Float64
    mean: Float64
    sd: Float64
    """Population standard deviation."""
    volume: Int64
    """Which volume each slice belongs to, from 0."""

    @classmethod
    def from_columns(cls, intensity: NDArray[Any], volume: NDArray[Any]) -> Statistics:
        """From the table's columns `intensity` (n, 4) and a volume number per slice (n,)."""
        minimum, maximum, mean, sd = np.asarray(intensity, np.float64).T
        return cls(minimum, maximum, mean, sd, np.asarray(volume, np.int64))

    def groups(self, per: str) -> Int64:
        """(n,) number of the group that each slice shares its statistics with."""
        if per == "slice":
            return np.arange(len(self.mean))
        if per == "file":
            return np.zeros(len(self.mean), np.int64)
        return np.unique(self.volume, return_inverse=True)[1].astype(np.int64).reshape(-1)


def window_of(window: Window | tuple[float, float] | str | None) -> Window | None:
    """A window by its name, as (low, high), or as it is.

    Raises
    ------
    ConfigurationError
        The name is unknown, or the interval is empty.
    """
    if isinstance(window, str):
        if window not in WINDOWS:
            raise ConfigurationError(f"no window {window!r}; there are {', '.join(WINDOWS)}")
        return WINDOWS[window]
    return Window(*window) if isinstance(window, tuple) else window


def intensity_maps(
    window: Window | tuple[float, float] | str | None,
    normalize: Normalize | None,
    statistics: Statistics,
    read: Read | None = None,
) -> Float64:
    """(n, 4) float64: low, high, center and scale for each slice of a file.

    Parameters
    ----------
    window
        What is clipped; see `window_of`.
    normalize
        None: a window becomes 0 to 1, and without one values stay as they are stored.
    statistics
        Of all slices. They describe the stored values, before a window clips them.
    read
        Gives a slice; only `Percentiles` calls it.

    Raises
    ------
    ConfigurationError
        A window's name is unknown, or percentiles are asked for where slices cannot be read.
    """
    window = window_of(window)
    maps = np.tile(UNCHANGED, (len(statistics.mean), 1))
    if window is not None:
        maps[:, LOW], maps[:, HIGH] = window.low, window.high
    if normalize is None:
        if window is not None:
            _to_unit(maps)
    elif isinstance(normalize, ZScore):
        mean, sd = _mean_and_sd(normalize, statistics)
        maps[:, CENTER], maps[:, SCALE] = mean, 1 / np.where(sd > 0, sd, 1.0)
    else:
        low, high = _limits(normalize, statistics, read)
        maps[:, LOW], maps[:, HIGH] = np.maximum(maps[:, LOW], low), np.minimum(maps[:, HIGH], high)
        _to_unit(maps)
    return maps


def map_into(
    source: NDArray[Any], out: NDArray[Any], intensity: NDArray[Any] | None = None
) -> None:
    """Write an image as float32, mapped, into `out` of the same shape; no numba needed.

    Bit for bit what the augmentation's kernel writes where nothing is augmented.

    Parameters
    ----------
    source, out
        The same shape; `out` float32, else it is rounded to whole numbers, or converted.
    intensity
        (4,) low, high, center, scale; None: unchanged.
    """
    if intensity is None or np.array_equal(intensity, UNCHANGED):
        store_into(source, out)
        return
    low, high, center, scale = np.asarray(intensity, np.float32)
    work = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    np.copyto(work, source, casting="same_kind" if source.dtype != np.float64 else "unsafe")
    np.clip(work, low, high, out=work)
    np.subtract(work, center, out=work)
    np.multiply(work, scale, out=work)
    if work is not out:
        store_into(work, out)


def store_into(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Convert: to integers by rounding to the nearest and stopping at their limits."""
    if out.dtype.kind in "iu" and values.dtype.kind == "f":
        limits = np.iinfo(out.dtype)
        values = np.rint(values).clip(limits.min, limits.max)
    np.copyto(out, values, casting="unsafe")


def _check_scope(per: str) -> None:
    if per not in SCOPES:
        raise ConfigurationError(f"statistics per {per!r}; there are {', '.join(SCOPES)}")


def _to_unit(maps: Float64) -> None:
    """Center and scale with which low becomes 0 and high 1; a constant becomes 0."""
    span = maps[:, HIGH] - maps[:, LOW]
    maps[:, SCALE] = 1 / np.where(span > 0, span, 1.0)
    # where the window lies beside all values, clipping to (low, high) gives `high` alone
    maps[:, LOW] = np.minimum(maps[:, LOW], maps[:, HIGH])
    maps[:, CENTER] = maps[:, LOW]


def _mean_and_sd(normalize: ZScore, statistics: Statistics) -> tuple[Float64, Float64]:
    """Per slice; a group's are pooled, which is exact as all slices have equally many pixels."""
    if normalize.mean is not None and normalize.sd is not None:
        whole = np.ones(len(statistics.mean))
        return whole * normalize.mean, whole * normalize.sd
    group = statistics.groups(normalize.per)
    count = np.bincount(group)
    mean = np.bincount(group, statistics.mean) / count
    # about the group's own mean: nothing cancels
    spread = statistics.sd**2 + (statistics.mean - mean[group]) ** 2
    sd = np.sqrt(np.bincount(group, spread) / count)
    return mean[group], sd[group]


def _limits(
    normalize: MinMax | Percentiles, statistics: Statistics, read: Read | None
) -> tuple[Float64, Float64]:
    """Per slice: what becomes 0 and what becomes 1."""
    group = statistics.groups(normalize.per)
    groups = int(group.max(initial=-1)) + 1
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    if isinstance(normalize, MinMax):
        np.minimum.at(low, group, statistics.minimum)
        np.maximum.at(high, group, statistics.maximum)
        return low[group], high[group]
    if read is None:
        raise ConfigurationError("percentiles are measured on the slices, which cannot be read")
    most = {"slice": 1, "volume": _VOLUME_SLICES, "file": _FILE_SLICES}[normalize.per]
    order = np.argsort(group, kind="stable")
    for k, rows in enumerate(np.split(order, np.cumsum(np.bincount(group))[:-1])):
        spread = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)
        slices = (read(row).reshape(-1) for row in rows[spread].tolist())
        low[k], high[k] = percentiles(slices, (normalize.low, normalize.high))
    return low[group], high[group]


def percentiles(arrays: Iterable[NDArray[Any]], wanted: Sequence[float]) -> Float64:
    """Percentiles of all values of some arrays of one type, as `numpy.percentile` gives them.

    Integers of at most 16 bits are counted, not sorted, and not held all at once.
    """
    arrays = iter(arrays)
    one = next(arrays)
    if one.dtype.kind not in "iu" or one.dtype.itemsize > _COUNTED_BYTES:
        found: Float64 = np.percentile(np.concatenate([one, *arrays]).astype(np.float64), wanted)
        return found
    lowest = int(np.iinfo(one.dtype).min)
    counts = np.zeros(1 << (8 * one.dtype.itemsize), np.int64)
    for values in chain([one], arrays):
        counts += np.bincount(values.astype(np.int64) - lowest, minlength=len(counts))
    upto = np.cumsum(counts)
    place = np.asarray(wanted) / 100 * (upto[-1] - 1)
    # the values at the two places of a sorted array that each percentile lies between
    before, after = (
        np.searchsorted(upto, rounded.astype(np.int64), side="right") + float(lowest)
        for rounded in (np.floor(place), np.ceil(place))
    )
    between: Float64 = before + (after - before) * (place - np.floor(place))
    return between
