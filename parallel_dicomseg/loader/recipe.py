"""What a caller asks for and what a file holds, made into a recipe for samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.assemble import Recipe, is_deep
from parallel_dicomseg.loader.augment import compile_plan
from parallel_dicomseg.loader.opening import Source
from parallel_dicomseg.loader.readers import Clock, Scratch
from parallel_dicomseg.loader.samples import (
    Channels,
    Form,
    Masks,
    Patch,
    Sample,
    Stack,
    Volumes,
    depth_of,
    mask_code,
    volumes_of,
)
from parallel_dicomseg.loader.windows import MinMax, Statistics, ZScore, intensity_maps
from parallel_dicomseg.records import Float64

if TYPE_CHECKING:
    from parallel_dicomseg.loader.augment import Augmentation
    from parallel_dicomseg.loader.windows import Normalize, Window


@dataclass(frozen=True, slots=True)
class Look:
    """What samples shall look like; see `BatchLoader`."""

    sample: Sample
    masks: Masks
    channels: Channels
    image_dtype: str | np.dtype[Any]
    structures: tuple[str, ...]
    augment: Sequence[Augmentation | str] | str
    window: Window | tuple[float, float] | str | None
    normalize: Normalize | None
    interpolation: str
    outside: str | float


def make_recipe(source: Source, look: Look) -> Recipe:
    """All that decides what a sample looks like.

    Raises
    ------
    ConfigurationError
        Something is asked for that does not exist, or not in this file.
    """
    _check_words(look)
    bits = bits_of(source, look.structures)
    rows, columns = _size(source, look.sample)
    plan = compile_plan(
        look.augment,
        (rows, columns),
        samples=source.samples,
        interpolation=look.interpolation,
        outside=look.outside,
        aspect=_aspect(source) if look.augment else 1.0,
    )
    code = mask_code(look.masks, bits, len(source.structures), source.nested, source.masks.dtype)
    return Recipe(
        path=source.path,
        images=source.images,
        masks=source.masks,
        sample=look.sample,
        volumes=_volumes(source) if is_deep(look.sample) else None,
        form=Form(
            depth=depth_of(look.sample),
            samples=source.samples,
            rows=plan.shape[0],
            columns=plan.shape[1],
            is_volume=isinstance(look.sample, Patch) and len(look.sample.shape) == 3,
            channels_first=look.channels == "first",
        ),
        code=code,
        plan=plan,
        maps=_maps(source, look),
        image_dtype=_image_dtype(source, look.image_dtype),
    )


def bits_of(source: Source, structures: Sequence[str]) -> tuple[int, ...]:
    """Bits of named structures, in the order of the names; all where none is named.

    Raises
    ------
    ConfigurationError
        A name is unknown, or there twice.
    """
    names = tuple(structures) or source.structures
    for name in names:
        if name not in source.structures:
            known = ", ".join(source.structures)
            raise ConfigurationError(f"{source.path} has no structure {name!r}, there are {known}")
        if names.count(name) > 1:
            raise ConfigurationError(f"the structure {name!r} is named twice")
    return tuple(source.structures.index(name) for name in names)


def _check_words(look: Look) -> None:
    if look.sample != "slice" and not isinstance(look.sample, Stack | Patch):
        raise ConfigurationError(
            f"sample is {look.sample!r}, expected 'slice', Stack(k) or Patch(shape)"
        )
    for name, value, known in (
        ("masks", look.masks, ("channels", "labels", "bits")),
        ("channels", look.channels, ("first", "last")),
    ):
        if value not in known:
            raise ConfigurationError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _size(source: Source, sample: Sample) -> tuple[int, int]:
    """Rows and columns that are read of a slice."""
    rows, columns = source.images.shape[1:3]
    if not isinstance(sample, Patch):
        return rows, columns
    height, width = sample.shape[-2:]
    if height > rows or width > columns:
        raise ConfigurationError(
            f"a patch of {height} x {width} pixels does not fit into {rows} x {columns}"
        )
    return height, width


def _volumes(source: Source) -> Volumes:
    if "volume" not in source.columns:
        raise ConfigurationError(
            f"{source.path} does not say which slices are a volume; only single slices can be had"
        )
    return volumes_of(source.column("volume"))


def _aspect(source: Source) -> float:
    """Distance between rows over distance between columns, of most slices."""
    if "pixel_spacing" not in source.columns:
        return 1.0
    spacing = source.column("pixel_spacing")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = spacing[:, 0] / spacing[:, 1]
    usable = ratios[np.isfinite(ratios) & (ratios > 0)]
    return float(np.median(usable)) if len(usable) else 1.0


def _image_dtype(source: Source, wanted: str | np.dtype[Any]) -> np.dtype[Any]:
    if isinstance(wanted, str) and wanted == "stored":
        return source.images.dtype
    try:
        dtype = np.dtype(wanted)
    except TypeError:
        raise ConfigurationError(f"image_dtype is {wanted!r}, which is no type") from None
    if dtype.kind not in "iuf":
        raise ConfigurationError(f"image_dtype is {wanted!r}, expected a type of real numbers")
    return dtype


def _maps(source: Source, look: Look) -> Float64 | None:
    """(n, 4) what intensities become; None: nothing."""
    if look.window is None and look.normalize is None:
        return None
    return intensity_maps(look.window, look.normalize, _statistics(source, look), _reader(source))


def _statistics(source: Source, look: Look) -> Statistics:
    if "intensity" in source.columns:
        return Statistics.from_columns(source.column("intensity"), source.column("volume"))
    given = look.normalize
    needs = isinstance(given, MinMax) or (isinstance(given, ZScore) and given.mean is None)
    if needs or getattr(given, "per", "") == "volume":
        raise ConfigurationError(
            f"{source.path} keeps no statistics of its slices; give ZScore a mean and an sd"
        )
    nothing = np.zeros(len(source))
    return Statistics(nothing, nothing, nothing, nothing, np.zeros(len(source), np.int64))


def _reader(source: Source) -> Any:
    """A function that reads one slice."""

    def read(row: int) -> NDArray[Any]:
        out = np.empty((1, *source.images.shape[1:]), source.images.dtype)
        source.images.read(np.array([row]), out, Scratch(), Clock())
        first: NDArray[Any] = out[0]
        return first

    return read
