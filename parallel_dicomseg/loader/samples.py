"""What a sample is: which slices of the file, which part of them, and how its mask is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.order import UInt64, hashed, stream, uniform
from parallel_dicomseg.records import Int64

Masks = Literal["channels", "labels", "bits"]
Channels = Literal["first", "last"]

# A table of all values of a mask is made for as many bits; more are looked at bit by bit.
_TABLE_BITS = 8


@dataclass(frozen=True, slots=True)
class Stack:
    """A slice and its neighbours in the same volume, as channels of one picture (2.5-D).

    Beyond the first and the last slice of a volume, that slice is repeated. The mask is that of
    the slice in the middle.
    """

    slices: int
    """How many, an odd number."""

    def __post_init__(self) -> None:
        if self.slices < 1 or self.slices % 2 == 0:
            raise ConfigurationError(f"Stack({self.slices}): the number of slices must be odd")


@dataclass(frozen=True, slots=True)
class Patch:
    """A part of a slice, (rows, columns), or of a volume, (slices, rows, columns).

    There is one per slice and epoch, which holds that slice. Its place is drawn evenly from all
    places in the image and in the volume where it does: no place is moved back from a border, so
    none is more likely there. A volume of fewer slices is continued by its last one.
    """

    shape: tuple[int, ...]
    """(rows, columns) or (slices, rows, columns), pixels."""
    foreground: float = 0.0
    """Probability that the patch must hold a foreground pixel of its slice: one is drawn evenly,
    then a place evenly from those that hold it. Where the slice has none, it is as if 0."""
    place: Literal["random", "center"] = "random"
    """`"center"`: always the middle of the image, and of the slices around its own."""

    def __post_init__(self) -> None:
        if len(self.shape) not in {2, 3} or min(self.shape) < 1:
            raise ConfigurationError(f"Patch({self.shape}): expected two or three sizes above 0")
        if not 0 <= self.foreground <= 1:
            raise ConfigurationError(f"foreground is {self.foreground}, it must be from 0 to 1")
        if self.place not in {"random", "center"}:
            raise ConfigurationError(f"place is {self.place!r}, it must be 'random' or 'center'")
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def depth(self) -> int:
        """Slices of a patch."""
        return self.shape[0] if len(self.shape) == 3 else 1


Sample = Literal["slice"] | Stack | Patch


@dataclass(frozen=True, eq=False)
class Volumes:
    """Where the volume of each slice begins and ends."""

    first: Int64
    """(n,) first row of the slice's volume."""
    last: Int64
    """(n,) last row of it."""


def volumes_of(number: Int64) -> Volumes:
    """Volumes from (n,) the number of each slice's volume; those of a volume lie together."""
    starts = np.flatnonzero(np.r_[True, number[1:] != number[:-1]][: len(number)])
    lengths = np.diff(np.r_[starts, len(number)])
    return Volumes(np.repeat(starts, lengths), np.repeat(starts + lengths - 1, lengths))


def slices_of(sample: Sample, rows: Int64, seeds: UInt64, volumes: Volumes | None) -> Int64:
    """The slices that samples are made of.

    Parameters
    ----------
    sample
        What a sample is.
    rows, seeds
        (m,) slices that the samples are about, and the samples' seeds.
    volumes
        Of the file; None for samples of single slices.

    Returns
    -------
    (m, k) rows of the file, in the order of the volume.
    """
    depth = depth_of(sample)
    if depth == 1 or volumes is None:
        return rows[:, None]
    first, last = volumes.first[rows], volumes.last[rows]
    if isinstance(sample, Stack) or (isinstance(sample, Patch) and sample.place == "center"):
        start = rows - depth // 2
        if isinstance(sample, Patch):
            start = np.maximum(first, np.minimum(start, last - depth + 1))
    else:
        lowest = np.maximum(first, rows - depth + 1)
        highest = np.maximum(lowest, np.minimum(rows, last - depth + 1))
        # a volume of fewer slices than the patch begins where it begins
        lowest = np.where(last - first + 1 < depth, first, lowest)
        highest = np.where(last - first + 1 < depth, first, highest)
        start = lowest + _drawn(seeds, "depth", highest - lowest + 1)
    wanted: Int64 = start[:, None] + np.arange(depth)
    return np.clip(wanted, first[:, None], last[:, None])


def depth_of(sample: Sample) -> int:
    """Slices of a sample."""
    if isinstance(sample, Stack):
        return sample.slices
    return sample.depth if isinstance(sample, Patch) else 1


def _drawn(seeds: UInt64, name: str, choices: Int64) -> Int64:
    """A number from 0 to below `choices` for each sample."""
    drawn: Int64 = (uniform(stream(0, 0, name), seeds) * choices).astype(np.int64)
    return drawn


def corner_of(
    patch: Patch, seed: int, size: tuple[int, int], mask: NDArray[Any]
) -> tuple[int, int]:
    """Row and column of the first pixel of one patch.

    Parameters
    ----------
    patch, seed
        What to cut, and the sample's seed.
    size
        Rows and columns of the image, at least those of the patch.
    mask
        (rows, columns) of the slice that the patch is about, the chosen structures' bits only.
    """
    room = [whole - part for whole, part in zip(size, patch.shape[-2:], strict=True)]
    if patch.place == "center":
        return room[0] // 2, room[1] // 2
    key = stream(0, 0, "patch")
    draws = uniform(hashed(key, np.array([seed], np.uint64)), np.arange(4)).tolist()
    lowest, highest = [0, 0], room
    if draws[0] < patch.foreground:
        pixels = np.flatnonzero(mask)
        if len(pixels):
            pixel = divmod(int(pixels[int(draws[1] * len(pixels))]), size[1])
            ends = zip(pixel, patch.shape[-2:], strict=True)
            lowest = [max(0, at - part + 1) for at, part in ends]
            highest = [min(at, most) for at, most in zip(pixel, room, strict=True)]
    row, column = (
        low + int(draw * (high - low + 1))
        for low, high, draw in zip(lowest, highest, draws[2:], strict=True)
    )
    return row, column


@dataclass(frozen=True, eq=False)
class MaskCode:
    """How the bits of the file become what the batch says."""

    masks: Masks
    bits: tuple[int, ...]
    """Of the chosen structures, in the order asked for."""
    order: tuple[int, ...]
    """Places in `bits`, outermost structure first: who comes later wins a pixel in labels."""
    dtype: np.dtype[Any]
    """Of the batch's mask."""
    table: NDArray[Any] | None
    """(256,) labels or new bits by stored value; None where there is none, or nothing changes."""
    is_copy: bool
    """Whether what is stored is what is wanted."""

    @property
    def chosen(self) -> int:
        """The chosen structures' bits, set."""
        return sum(1 << bit for bit in self.bits)

    def write(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Fill `out`, (s, …) for channels and else (…), from as many stored masks."""
        stored = stored.reshape(out.shape[1:] if self.masks == "channels" else out.shape)
        if self.is_copy:
            np.copyto(out.reshape(stored.shape) if out.flags.c_contiguous else out[0], stored)
        elif self.masks == "channels":
            for bit, channel in zip(self.bits, out, strict=True):
                np.right_shift(stored, bit, out=channel, casting="unsafe")
                np.bitwise_and(channel, 1, out=channel)
        elif self.table is not None:
            np.take(self.table, stored, out=out, mode="clip")
        else:
            out[...] = _recoded(self, stored)


def mask_code(
    masks: Masks,
    bits: tuple[int, ...],
    structures: int,
    nested: tuple[tuple[int, int], ...],
    stored: np.dtype[Any],
) -> MaskCode:
    """How masks are told.

    Parameters
    ----------
    masks
        `"channels"`, `"labels"` or `"bits"`.
    bits
        Of the chosen structures, in the order asked for.
    structures
        How many the file has.
    nested
        Pairs (inner, outer) of bits.
    stored
        Type of the file's masks.
    """
    width = 8 if masks != "bits" else next(w for w in (8, 16, 32, 64) if w >= len(bits))
    dtype = np.dtype(f"u{width // 8}")
    is_copy = (
        stored == dtype
        and bits == tuple(range(structures))
        and (structures == 1 or masks == "bits")
    )
    order = _outermost_first(bits, nested)
    plain = MaskCode(masks, bits, order, dtype, None, is_copy)
    if is_copy or masks == "channels" or stored.itemsize * 8 > _TABLE_BITS:
        return plain
    return replace(plain, table=_recoded(plain, np.arange(1 << _TABLE_BITS).astype(np.uint8)))


def _recoded(code: MaskCode, stored: NDArray[Any]) -> NDArray[Any]:
    """Labels or new bits of stored values, bit by bit."""
    out = np.zeros(stored.shape, code.dtype)
    for place in code.order if code.masks == "labels" else range(len(code.bits)):
        is_set = (stored >> stored.dtype.type(code.bits[place])) & stored.dtype.type(1) != 0
        if code.masks == "labels":
            out[is_set] = place + 1
        else:
            out[is_set] |= code.dtype.type(1 << place)
    return out


def _outermost_first(bits: tuple[int, ...], nested: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Places of structures so that inner ones follow outer ones, earlier-named ones last."""
    outer = {bit: {o for i, o in nested if i == bit} for bit in bits}

    def depth(bit: int, seen: frozenset[int] = frozenset()) -> int:
        around = outer.get(bit, set()) - seen
        return 1 + max((depth(one, seen | {bit}) for one in around), default=0)

    return tuple(sorted(range(len(bits)), key=lambda place: (depth(bits[place]), -place)))


@dataclass(frozen=True, slots=True)
class Form:
    """The axes of a batch."""

    depth: int
    """Slices of a sample."""
    samples: int
    """Samples of a pixel."""
    rows: int
    columns: int
    is_volume: bool
    """The slices are an axis of their own, not channels."""
    channels_first: bool

    @property
    def image(self) -> tuple[int, ...]:
        """Axes of one sample's image."""
        size = (self.rows, self.columns)
        channels = self.samples if self.is_volume else self.depth * self.samples
        inner = (self.depth, *size) if self.is_volume else size
        return (channels, *inner) if self.channels_first else (*inner, channels)

    def mask(self, code: MaskCode) -> tuple[int, ...]:
        """Axes of one sample's mask."""
        inner = (
            (self.depth, self.rows, self.columns) if self.is_volume else (self.rows, self.columns)
        )
        if code.masks != "channels":
            return inner
        s = len(code.bits)
        return (s, *inner) if self.channels_first else (*inner, s)

    @property
    def is_stored_order(self) -> bool:
        """Whether (m, depth, rows, columns, samples) lies in memory as the batch's images do."""
        if self.channels_first:
            return self.samples == 1
        return self.depth == 1 or self.is_volume

    def by_slice(self, images: NDArray[Any]) -> NDArray[Any]:
        """A batch's images as a view (m, depth, rows, columns, samples)."""
        m = len(images)
        if self.is_volume:
            return images.transpose(0, 2, 3, 4, 1) if self.channels_first else images
        size = (self.rows, self.columns)
        if self.channels_first:
            split = images.reshape(m, self.depth, self.samples, *size)
            return split.transpose(0, 1, 3, 4, 2)
        split = images.reshape(m, *size, self.depth, self.samples)
        return split.transpose(0, 3, 1, 2, 4)

    def mask_channels(self, masks: NDArray[Any], code: MaskCode) -> NDArray[Any]:
        """A batch's masks as a view (s, m, …) of channels, or (m, …)."""
        if code.masks != "channels":
            return masks
        return np.moveaxis(masks, 1 if self.channels_first else -1, 0)
