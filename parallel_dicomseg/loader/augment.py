"""Augmentation of images and masks together: small objects with ranges, one pass per sample.

What is done to a sample is a function of its seed and of the objects alone. Every object draws from
a random stream of its own, named after it: adding, removing or moving one leaves the draws of the
others as they are. docs/augmentation.md shows what each does.

The geometry of all objects is composed to one map, so that an image is interpolated once; then
come the window and the normalisation; then the intensities change, in the order of the objects.
numba is loaded when the first sample is augmented.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader import operations as op
from parallel_dicomseg.loader.windows import UNCHANGED, map_into, store_into
from parallel_dicomseg.records import Float64

Range = tuple[float, float]

#: What an image is beyond its borders: its smallest value, as at the edge, or a number.
OUTSIDES = ("minimum", "edge")
INTERPOLATIONS = {"linear": op.LINEAR, "cubic": op.CUBIC}

# What the rounding of a header's decimals may do to square pixels.
_SQUARE = 1e-3

# The kernel is compiled for these; other images become float32 first.
_IMAGE_DTYPES = ("uint8", "int16", "uint16", "float32")


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Base of all objects: what they are called, and how often they are applied."""

    code: ClassVar[int] = 0
    """Of `operations`."""
    kind: ClassVar[str] = ""
    """Its name for `named`, and its stream's where none is given."""

    def numbers(self) -> tuple[float, ...]:
        """Up to six numbers for the kernel."""
        return ()

    def check(self) -> None:
        """Raise ConfigurationError where a number makes no sense."""

    def __post_init__(self) -> None:
        probability = getattr(self, "probability", 1.0)
        if not 0 <= probability <= 1:
            raise ConfigurationError(f"{self.kind}: a probability of {probability}")
        self.check()


@dataclass(frozen=True, slots=True)
class Flip(Augmentation):
    """Reverse rows, columns or slices, each with a probability of its own."""

    code: ClassVar[int] = op.FLIP
    kind: ClassVar[str] = "flip"
    rows: float = 0.5
    """Probability that the first row becomes the last."""
    columns: float = 0.5
    """Probability that the first column becomes the last."""
    slices: float = 0.0
    """Probability that the first slice of a stack or patch becomes the last."""
    name: str = ""
    """Of the random stream; '': the kind of the object."""

    def numbers(self) -> tuple[float, ...]:
        """Three probabilities."""
        return self.rows, self.columns, self.slices

    def check(self) -> None:
        """Probabilities are from 0 to 1."""
        for probability in self.numbers():
            if not 0 <= probability <= 1:
                raise ConfigurationError(f"flip: a probability of {probability}")


@dataclass(frozen=True, slots=True)
class Dihedral(Augmentation):
    """One of the 8 poses of a square (4 flips and quarter turns, 4 transposed), all equally likely.

    Where the output is not square, or its pixels are not, rows cannot become columns: one of the 4
    poses that keep rows rows (as it is, flipped either way, half a turn).
    """

    code: ClassVar[int] = op.DIHEDRAL
    kind: ClassVar[str] = "dihedral"
    probability: float = 1.0
    """That a pose is drawn at all; 'as it is' is one of them."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Rotate(Augmentation):
    """Turn about the centre of the output, counter-clockwise as displayed; rigid in mm."""

    code: ClassVar[int] = op.ROTATE
    kind: ClassVar[str] = "rotate"
    degrees: Range = (-15.0, 15.0)
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range."""
        return self.degrees

    def check(self) -> None:
        """Any angle."""
        _check_range(self.kind, self.degrees)


@dataclass(frozen=True, slots=True)
class Shift(Augmentation):
    """Move by a fraction of the output's rows (down) and columns (to the right)."""

    code: ClassVar[int] = op.SHIFT
    kind: ClassVar[str] = "shift"
    rows: Range = (-0.1, 0.1)
    columns: Range = (-0.1, 0.1)
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """Both ranges."""
        return *self.rows, *self.columns

    def check(self) -> None:
        """Something must be left to see."""
        _check_range(self.kind, self.rows, -1.0, 1.0)
        _check_range(self.kind, self.columns, -1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Zoom(Augmentation):
    """Enlarge (above 1) or shrink about the centre of the output; uniform in the logarithm."""

    code: ClassVar[int] = op.ZOOM
    kind: ClassVar[str] = "zoom"
    factor: Range = (0.85, 1.15)
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range."""
        return self.factor

    def check(self) -> None:
        """A factor is above 0."""
        _check_range(self.kind, self.factor, 0.01, 100.0)


@dataclass(frozen=True, slots=True)
class Crop(Augmentation):
    """Take rows x columns out of the image, anywhere or from its centre; smaller ones are padded.

    It decides what the centre of the output shows; the other objects turn and zoom about that, with
    the image's own surroundings.
    """

    code: ClassVar[int] = op.CROP
    kind: ClassVar[str] = "crop"
    rows: int = 0
    columns: int = 0
    random: bool = True
    """All places equally likely; else centred."""
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """Size, and whether its place is random."""
        return self.rows, self.columns, self.random

    def check(self) -> None:
        """A size is needed."""
        if self.rows < 1 or self.columns < 1:
            raise ConfigurationError("crop: it needs a size, e.g. Crop(rows=192, columns=192)")


@dataclass(frozen=True, slots=True)
class Elastic(Augmentation):
    """Bend smoothly: random displacements of a coarse grid, between them a cubic B-spline.

    No pixel is displaced by more than the amplitude along either axis, and nothing folds. The
    displacement is that of the output, before all other geometry.
    """

    code: ClassVar[int] = op.ELASTIC
    kind: ClassVar[str] = "elastic"
    displacement: Range = (0.0, 8.0)
    """Range of the amplitude, pixels of the output."""
    spacing: float = 32.0
    """Between the points of the coarse grid, pixels; at least four amplitudes."""
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range and the spacing."""
        return *self.displacement, self.spacing

    def check(self) -> None:
        """The map must not fold: its slopes, at most 2 * amplitude / spacing each, stay below 1."""
        _check_range(self.kind, self.displacement, 0.0)
        if not (self.spacing >= 2 and self.displacement[1] <= self.spacing / 4):
            raise ConfigurationError(
                f"elastic: a displacement of {self.displacement[1]} pixels folds a grid of "
                f"{self.spacing}; at most a quarter of it (and 2 pixels or more) is allowed"
            )


@dataclass(frozen=True, slots=True)
class Contrast(Augmentation):
    """Stretch intensities about the sample's mean; uniform in the logarithm of the factor."""

    code: ClassVar[int] = op.CONTRAST
    kind: ClassVar[str] = "contrast"
    factor: Range = (0.75, 1.33)
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range."""
        return self.factor

    def check(self) -> None:
        """A factor is above 0."""
        _check_range(self.kind, self.factor, 0.001, 1000.0)


@dataclass(frozen=True, slots=True)
class Brightness(Augmentation):
    """Add a number to all intensities."""

    code: ClassVar[int] = op.BRIGHTNESS
    kind: ClassVar[str] = "brightness"
    shift: Range = (-0.2, 0.2)
    relative: bool = True
    """In standard deviations of the sample; else in the intensities' own unit."""
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range and its unit."""
        return *self.shift, self.relative

    def check(self) -> None:
        """Any number."""
        _check_range(self.kind, self.shift)


@dataclass(frozen=True, slots=True)
class Gamma(Augmentation):
    """Raise the fraction of the sample's range to a power; minimum and maximum stay."""

    code: ClassVar[int] = op.GAMMA
    kind: ClassVar[str] = "gamma"
    exponent: Range = (0.7, 1.5)
    """Uniform in the logarithm; below 1 lifts what is dark."""
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range."""
        return self.exponent

    def check(self) -> None:
        """An exponent is above 0."""
        _check_range(self.kind, self.exponent, 0.01, 100.0)


@dataclass(frozen=True, slots=True)
class Noise(Augmentation):
    """Add independent normal numbers to all pixels."""

    code: ClassVar[int] = op.NOISE
    kind: ClassVar[str] = "noise"
    sd: Range = (0.0, 0.1)
    """Range of their standard deviation."""
    relative: bool = True
    """In standard deviations of the sample; else in the intensities' own unit."""
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range and its unit."""
        return *self.sd, self.relative

    def check(self) -> None:
        """A standard deviation is not below 0."""
        _check_range(self.kind, self.sd, 0.0)


@dataclass(frozen=True, slots=True)
class Blur(Augmentation):
    """Convolve rows and columns with a Gaussian."""

    code: ClassVar[int] = op.BLUR
    kind: ClassVar[str] = "blur"
    sd: Range = (0.5, 1.5)
    """Range of its standard deviation, pixels."""
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range."""
        return self.sd

    def check(self) -> None:
        """From hardly any to strong."""
        _check_range(self.kind, self.sd, 0.01, 100.0)


@dataclass(frozen=True, slots=True)
class LowResolution(Augmentation):
    """Average to fewer pixels in each plane, and interpolate linearly back to the same size."""

    code: ClassVar[int] = op.LOW_RESOLUTION
    kind: ClassVar[str] = "low-resolution"
    factor: Range = (1.0, 2.0)
    """Range of how many times fewer rows, and columns."""
    probability: float = 1.0
    name: str = ""

    def numbers(self) -> tuple[float, ...]:
        """The range."""
        return self.factor

    def check(self) -> None:
        """Never more pixels."""
        _check_range(self.kind, self.factor, 1.0, 1000.0)


@dataclass(frozen=True, slots=True)
class Function(Augmentation):
    """One's own Python function, after everything else; it holds the GIL, so it costs speed.

    The sample is a function of the seed only as far as this function is.
    """

    kind: ClassVar[str] = "function"
    call: Callable[[NDArray[Any], NDArray[Any], np.random.Generator], None] | None = None
    """Changes image (planes, rows, columns) and mask (slices, rows, columns) in place, with a
    generator of the sample's own."""
    name: str = ""

    def check(self) -> None:
        """There must be one."""
        if not callable(self.call):
            raise ConfigurationError("function: it needs a function (image, mask, generator)")


#: The objects that `named` knows, in the order in which they are usually applied.
KINDS: dict[str, type[Augmentation]] = {
    kind.kind: kind
    for kind in (
        Flip,
        Dihedral,
        Rotate,
        Shift,
        Zoom,
        Crop,
        Elastic,
        Blur,
        LowResolution,
        Contrast,
        Brightness,
        Gamma,
        Noise,
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Objects compiled for images of one shape: what the kernel reads. It can be pickled."""

    augmentations: tuple[Augmentation, ...]
    source_shape: tuple[int, int]
    """(rows, columns) of what is read."""
    shape: tuple[int, int]
    """(rows, columns) of what is served."""
    operations: Float64
    """(k, 8): code, probability and six numbers of each."""
    keys: NDArray[np.uint64]
    """(k,) of the random streams."""
    settings: Float64
    """Interpolation, what is outside, its value, aspect, samples of a pixel."""
    functions: tuple[tuple[Function, int], ...]
    """Python functions, and the keys of their streams."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is augmented (and numba is not needed)."""
        return not len(self.operations) and not self.functions


def named(*names: str) -> tuple[Augmentation, ...]:
    """Objects with their usual ranges, by name: ``named("flip", "rotate", "noise")``.

    A name may also be a list separated by commas. Crop has no usual size and cannot be had so.

    Raises
    ------
    ConfigurationError
        A name is unknown, or is that of an object that needs a number.
    """
    kinds = [part.strip() for name in names for part in name.split(",") if part.strip()]
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigurationError(f"no augmentation {kind!r}; there are {', '.join(KINDS)}")
    return tuple(KINDS[kind]() for kind in kinds)


def compile_plan(
    augmentations: Iterable[Augmentation | str] | str,
    source_shape: tuple[int, int],
    *,
    samples: int = 1,
    interpolation: str = "linear",
    outside: str | float = "minimum",
    aspect: float = 1.0,
) -> Plan:
    """Prepare objects for images of one shape.

    Parameters
    ----------
    augmentations
        Objects, or names of them with their usual ranges. Geometry and intensities are each applied
        in this order.
    source_shape
        (rows, columns) of what is read.
    samples
        Samples of a pixel: that many planes of an image are one slice.
    interpolation
        Of images, 'linear' or 'cubic'; masks take the nearest pixel.
    outside
        What an image is beyond its borders: 'minimum' (the sample's own), 'edge' (the nearest
        pixel's), or a number in stored units. Masks: nothing, with 'edge' the nearest pixel's.
    aspect
        Distance between rows over distance between columns; rotations are rigid in mm. Within a
        thousandth of 1 pixels count as square.

    Raises
    ------
    ConfigurationError
        A name or an option is unknown, there are two crops or two elastic bends, or two objects
        were given the same name.
    """
    chosen = _objects(augmentations)
    names = _stream_names(chosen)
    keys = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest()) for n in names]
    for kind in (Crop, Elastic):
        if sum(isinstance(each, kind) for each in chosen) > 1:
            raise ConfigurationError(f"{kind.kind}: only one per sample is possible")
    rows = [(each, key) for each, key in zip(chosen, keys, strict=True)]
    in_kernel = [(each, key) for each, key in rows if not isinstance(each, Function)]
    table = np.zeros((len(in_kernel), op.ROW_LENGTH))
    for k, (each, _) in enumerate(in_kernel):
        table[k, :2] = each.code, getattr(each, "probability", 1.0)
        table[k, 2 : 2 + len(each.numbers())] = each.numbers()
    crop = next((each for each in chosen if isinstance(each, Crop)), None)
    return Plan(
        augmentations=chosen,
        source_shape=source_shape,
        shape=(crop.rows, crop.columns) if crop else source_shape,
        operations=table,
        keys=np.array([key for _, key in in_kernel], np.uint64),
        settings=_settings(samples, interpolation, outside, aspect),
        functions=tuple((each, key) for each, key in rows if isinstance(each, Function)),
    )


def augment_into(
    source_image: NDArray[Any],
    source_mask: NDArray[Any],
    out_image: NDArray[Any],
    out_mask: NDArray[Any],
    seed: int,
    plan: Plan,
    intensity: NDArray[Any] | None = None,
) -> None:
    """Augment one sample.

    Parameters
    ----------
    source_image
        (planes, rows, columns) or (rows, columns), unchanged; with several samples of a pixel a
        slice is as many planes beside each other. Any real dtype; uint8, int16, uint16 and float32
        are not converted first.
    source_mask
        (slices, rows, columns) or (rows, columns), unchanged; any dtype of 1, 2, 4 or 8 bytes. Its
        values are moved, never combined: bits stay bits.
    out_image, out_mask
        As many planes of the plan's `shape`, written; any strides. Images are computed in float32
        and rounded where `out_image` holds integers; masks have the source's dtype.
    seed
        Of the sample, 64 bits.
    plan
        Of `compile_plan`.
    intensity
        (4,) low, high, center and scale of `windows.intensity_maps`, which is applied between
        geometry and intensities; None: stored values.

    Raises
    ------
    ConfigurationError
        Shapes or types do not fit the plan, or each other.
    """
    image, mask = _planes(source_image), _planes(source_mask)
    target, target_mask = _planes(out_image), _planes(out_mask)
    _check_shapes(image, mask, target, target_mask, plan)
    if plan.is_empty:
        map_into(image, target, intensity)
        np.copyto(target_mask, mask)
        return
    moved = target if _is_plain(target, np.float32) else np.empty(target.shape, np.float32)
    moved_mask = (
        target_mask
        if _is_plain(target_mask, target_mask.dtype)
        else np.empty_like(mask, shape=target_mask.shape)
    )
    from parallel_dicomseg.loader.kernels_augment import augment_sample

    augment_sample(
        _as_kernel_image(image),
        _as_bits(np.ascontiguousarray(mask)),
        moved,
        _as_bits(moved_mask),
        np.uint64(seed),
        plan.operations,
        plan.keys,
        plan.settings,
        UNCHANGED if intensity is None else np.asarray(intensity, np.float64),
    )
    for function, key in plan.functions:
        if function.call is not None:
            function.call(moved, moved_mask, np.random.default_rng((int(seed), key)))
    if moved is not target:
        store_into(moved, target)
    if moved_mask is not target_mask:
        np.copyto(target_mask, moved_mask)


def warm_up(image_dtype: Any = np.int16, mask_dtype: Any = np.uint8) -> None:
    """Compile, or load from the cache on disk, what augments samples of these types.

    Otherwise the first sample does: some seconds where nothing is cached, else well below one.
    """
    image, mask = np.zeros((1, 8, 8), image_dtype), np.zeros((1, 8, 8), mask_dtype)
    plan = compile_plan((Flip(),), (8, 8))
    augment_into(image, mask, np.empty((1, 8, 8), np.float32), np.empty_like(mask), 0, plan)


def _objects(augmentations: Iterable[Augmentation | str] | str) -> tuple[Augmentation, ...]:
    each = [augmentations] if isinstance(augmentations, str) else augmentations
    chosen: list[Augmentation] = []
    for item in each:
        if isinstance(item, str):
            chosen += named(item)
        elif isinstance(item, Augmentation):
            chosen.append(item)
        else:
            raise ConfigurationError(f"{item!r} is no augmentation and no name of one")
    return tuple(chosen)


def _stream_names(chosen: tuple[Augmentation, ...]) -> list[str]:
    """Names of the streams: the second 'noise' is 'noise-2'."""
    names: list[str] = []
    for each in chosen:
        name = str(getattr(each, "name", "")) or each.kind
        count = sum(1 for other in names if other == name or other.startswith(f"{name}-"))
        if getattr(each, "name", "") and name in names:
            raise ConfigurationError(f"two augmentations are named {name!r}")
        names.append(f"{name}-{count + 1}" if name in names else name)
    return names


def _settings(samples: int, interpolation: str, outside: str | float, aspect: float) -> Float64:
    if interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise ConfigurationError(f"no interpolation {interpolation!r}; there are {known}")
    if samples < 1 or not 0 < aspect < math.inf:
        raise ConfigurationError(f"{samples} samples of a pixel, rows {aspect} columns apart")
    settings = np.zeros(5)
    settings[op.INTERPOLATION] = INTERPOLATIONS[interpolation]
    settings[op.ASPECT] = 1.0 if abs(aspect - 1) < _SQUARE else aspect
    settings[op.SAMPLES] = samples
    if isinstance(outside, str):
        if outside not in OUTSIDES:
            raise ConfigurationError(
                f"outside is {outside!r}: a number or one of {', '.join(OUTSIDES)}"
            )
        settings[op.OUTSIDE] = op.EDGE if outside == "edge" else op.MINIMUM
    else:
        settings[op.OUTSIDE], settings[op.FILL] = op.CONSTANT, outside
        if not math.isfinite(outside):
            raise ConfigurationError(f"outside is {outside}, it must be finite")
    return settings


def _check_range(
    kind: str, limits: Range, least: float = -math.inf, most: float = math.inf
) -> None:
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and least <= low <= high <= most):
        raise ConfigurationError(
            f"{kind}: from {low} to {high}; it takes an ascending range from {least:g} to {most:g}"
        )


def _check_shapes(
    image: NDArray[Any], mask: NDArray[Any], target: NDArray[Any], target_mask: NDArray[Any],
    plan: Plan,
) -> None:  # fmt: skip
    """The kernel trusts its caller: everything that it takes for granted is checked here."""
    expected = (
        ("image", image, (len(image), *plan.source_shape)),
        ("mask", mask, (len(mask), *plan.source_shape)),
        ("augmented image", target, (len(image), *plan.shape)),
        ("augmented mask", target_mask, (len(mask), *plan.shape)),
    )
    for what, array, shape in expected:
        if array.shape != shape:
            raise ConfigurationError(f"the {what} has shape {array.shape}, the plan says {shape}")
    if not len(image) or len(image) % int(plan.settings[op.SAMPLES]):
        raise ConfigurationError(f"{len(image)} planes are not whole slices")
    if mask.dtype != target_mask.dtype or mask.dtype.itemsize not in (1, 2, 4, 8):
        raise ConfigurationError(f"masks of {mask.dtype} cannot become {target_mask.dtype}")


def _planes(array: NDArray[Any]) -> NDArray[Any]:
    return array[np.newaxis] if array.ndim == 2 else array


def _is_plain(array: NDArray[Any], dtype: Any) -> bool:
    return array.dtype == dtype and array.flags.c_contiguous


def _as_kernel_image(image: NDArray[Any]) -> NDArray[Any]:
    """C-contiguous, of a type that the kernel is compiled for."""
    dtype = image.dtype.name if image.dtype.name in _IMAGE_DTYPES else np.float32
    return np.ascontiguousarray(image, np.dtype(dtype))


def _as_bits(mask: NDArray[Any]) -> NDArray[Any]:
    """The same bytes as unsigned integers: few compiled kernels serve all types."""
    return mask.view(np.dtype(f"u{mask.dtype.itemsize}"))
