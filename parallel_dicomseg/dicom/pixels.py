"""DICOM pixels: decoded, rescaled and placed on the stored grid.

Native little-endian frames of many files are read, rescaled and placed by one call without the
GIL. Everything else is decoded frame by frame through pydicom, with the decoder that decoders.py
pins, in a process of its own where it is compressed; that path is also the twin of the fast one in
the tests.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.decoders import EXPLICIT_LITTLE_ENDIAN, codestream_size, quiet
from parallel_dicomseg.dicom.opened import GREY, NATIVE, FrameError, OpenImage, open_image
from parallel_dicomseg.dicom.sandbox import DecodingError, as_array, decode_apart
from parallel_dicomseg.errors import ResumableError
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.posix import close, file_size, open_read_only, pack_paths, read_at
from parallel_dicomseg.records import (
    WHOLE_IMAGE,
    Float64,
    Int32,
    Int64,
    Layout,
    Problem,
    Reason,
    SliceRefs,
    UInt8,
)
from parallel_dicomseg.resample import is_shift, place, resample, to_dtype

#: Weights of red, green and blue in the luminance (ITU-R BT.601-7, 2.5.1).
LUMINANCE = np.array([0.299, 0.587, 0.114])

# How reading the pixels of one file ended.
_READ, _NOT_OPENED, _SIZE_CHANGED, _SHORT = 0, 1, 2, 3


def read_images(
    root: str, slices: SliceRefs, out: NDArray[Any], layout: Layout
) -> tuple[NDArray[np.bool_], list[Problem]]:
    """Decode frames, rescale them and place them on the stored grid.

    A stored value is turned round where it is MONOCHROME1 and the layout says so, then goes
    through the modality LUT of its file, or else is multiplied by the slope and added to the
    intercept (DICOM PS3.3 C.11.1). Colour becomes luminance (ITU-R BT.601) in a file of one
    sample, grey is repeated in one of three.

    Parameters
    ----------
    root
        Directory that the paths of `slices` are relative to.
    slices
        n frames, each with its own size and grid.
    out
        (n, rows, columns), or (n, rows, columns, 3) where `layout.samples` is 3; C-contiguous, the
        layout's image dtype; filled in place. Undefined where a slice could not be read.
    layout
        What the file is to hold.

    Returns
    -------
    (n,) which slices were read, and a Problem for each of the others.
    """
    failed: dict[int, Problem] = {}
    for (dtype, *size), index in _batches(slices).items():
        if not dtype:
            failed |= _decode_files(root, slices, index, out, layout)
            continue
        batch = _Native(root, slices, index, dtype, (size[0], size[1]))
        status = batch.read(out, layout)
        wrong = np.flatnonzero(status).tolist()
        failed |= {index[k]: _read_problem(root, slices, index[k], int(status[k])) for k in wrong}
    good = np.ones(len(slices), bool)
    good[list(failed)] = False
    return good, [failed[i] for i in sorted(failed)]


def _batches(slices: SliceRefs) -> dict[tuple[Any, ...], list[int]]:
    """The slices that go through one path together: by stored type and, if native, by size."""
    batches: dict[tuple[Any, ...], list[int]] = {}
    for i, dtype in enumerate(slices.stored_dtype):
        key = (dtype, slices.rows[i], slices.columns[i]) if dtype else ("",)
        batches.setdefault(key, []).append(i)
    return batches


def _flips(slices: SliceRefs, i: int, layout: Layout) -> bool:
    """Whether the values of a slice are turned round."""
    return layout.invert_monochrome1 and slices.photometric_interpretation[i] == "MONOCHROME1"


# --- native pixels -------------------------------------------------------------------------------


@kernel
def _read_frame(
    path_bytes: UInt8, path_offset: int, size: int, pixel_offset: int, out: UInt8
) -> int:
    """Read the native pixels of one frame into `out` (bytes,)."""
    fd = open_read_only(path_bytes, path_offset)
    if fd < 0:
        return _NOT_OPENED
    status = _READ
    if file_size(fd) != size:
        status = _SIZE_CHANGED
    elif read_at(fd, out, out.size, pixel_offset) != out.size:
        status = _SHORT
    close(fd)
    return status


@kernel
def _read_frames(
    path_bytes: UInt8,
    path_offsets: Int64,
    sizes: Int64,
    pixel_offsets: Int64,
    out: UInt8,
    status: Int64,
) -> None:
    """Read the native pixels of many files straight into the rows of `out` (n, bytes)."""
    for i in range(len(path_offsets)):
        status[i] = _read_frame(path_bytes, path_offsets[i], sizes[i], pixel_offsets[i], out[i])


@kernel
def _masked(stored: Any, mask: Any, sign: Any) -> Any:
    """The stored bits of one value, its sign extended; in 32 bits, which the loops need to be
    vectorized.
    """
    kept = np.int32(np.int32(stored) & mask)
    return np.int32(np.int32(kept ^ sign) - sign)


@kernel
def _smallest(stored: NDArray[Any], mask: Any, sign: Any, turned: Float64, scale: Float64) -> float:
    """The smallest rescaled value of an image: that of its lowest or of its highest one."""
    lowest = highest = _masked(stored[0, 0], mask, sign)
    for row in range(stored.shape[0]):
        source = stored[row]
        for k in range(len(source)):
            value = _masked(source[k], mask, sign)
            lowest, highest = min(lowest, value), max(highest, value)
    first = (turned[0] + turned[1] * lowest) * scale[0] + scale[1]
    return float(min(first, (turned[0] + turned[1] * highest) * scale[0] + scale[1]))


@kernel
def _place_frame(
    stored: NDArray[Any],
    bits: Int32,
    turned: Float64,
    scale: Float64,
    origin: Int64,
    pad: float,
    out: NDArray[Any],
) -> None:
    """Rescale an image into `out`, whose first pixel is the source's pixel `origin`."""
    mask, sign = bits[0], bits[1]
    base, factor, slope, intercept = turned[0], turned[1], scale[0], scale[1]
    rows, columns = out.shape
    top, left = max(-origin[0], 0), max(-origin[1], 0)
    # never before the beginning: a negative end would count from the end of the array
    bottom = max(min(stored.shape[0] - origin[0], rows), top)
    right = max(min(stored.shape[1] - origin[1], columns), left)
    if top > 0 or left > 0 or bottom < rows or right < columns:
        out[:] = _smallest(stored, mask, sign, turned, scale) if np.isnan(pad) else pad
    for row in range(top, bottom):
        source = stored[origin[0] + row, origin[1] + left : origin[1] + right]
        target = out[row, left:right]
        for k in range(len(target)):
            value = np.float64(_masked(source[k], mask, sign))
            target[k] = (base + factor * value) * slope + intercept


@kernel
def _read_and_place_frames(
    path_bytes: UInt8,
    path_offsets: Int64,
    sizes: Int64,
    pixel_offsets: Int64,
    stored: NDArray[Any],
    raw: UInt8,
    bits: Int32,
    turned: Float64,
    scale: Float64,
    origins: Int64,
    pad: float,
    where: Int64,
    out: NDArray[Any],
    status: Int64,
) -> None:
    """Read frames one by one into `stored` (rows, columns), whose bytes are `raw`, and place each
    in out[where].
    """
    for i in range(len(path_offsets)):
        status[i] = _read_frame(path_bytes, path_offsets[i], sizes[i], pixel_offsets[i], raw)
        if status[i] == _READ:
            _place_frame(stored, bits[i], turned[i], scale[i], origins[i], pad, out[where[i]])


@dataclass(frozen=True, slots=True)
class _Native:
    """Frames of one stored type and size."""

    root: str
    slices: SliceRefs
    index: list[int]
    """Which of the slices."""
    dtype: str
    size: tuple[int, int]
    """Rows and columns."""

    def read(self, out: NDArray[Any], layout: Layout) -> Int64:
        """Read all frames, on the fastest way that there is for them; how each of them ended."""
        if len(self.index) == len(self.slices) and self._are_stored_as(out, layout):
            return self._read_into(out)
        if layout.samples == 1 and self._are_shifts() and self._fit(out.dtype):
            return self._read_and_place(out, layout)
        raw = np.empty((len(self.index), *self.size), self.dtype)
        status = self._read_into(raw)
        for k in np.flatnonzero(status == _READ).tolist():
            i = self.index[k]
            stored = mask_bits(raw[k], self.slices.bits_stored[i])
            _store(out[i], _rescaled(stored, self.slices, i, layout), self.slices.grid[i], layout)
        return status

    def _read_into(self, raw: NDArray[Any]) -> Int64:
        status = np.zeros(len(self.index), np.int64)
        _read_frames(*self._places(), raw.reshape(len(raw), -1).view(np.uint8), status)
        return status

    def _read_and_place(self, out: NDArray[Any], layout: Layout) -> Int64:
        status = np.zeros(len(self.index), np.int64)
        raw = np.empty(self.size[0] * self.size[1] * np.dtype(self.dtype).itemsize, np.uint8)
        pad = (
            float(to_dtype(np.array([layout.pad_value]), out.dtype)[0])
            if _is_set(layout)
            else np.nan
        )
        _read_and_place_frames(
            *self._places(),
            # signs come from the bits: one compiled kernel for both kinds of integers
            raw.view(f"<u{np.dtype(self.dtype).itemsize}").reshape(self.size),
            raw,
            *self._bits(layout),
            np.array(self._each(self.slices.rescale_slope, self.slices.rescale_intercept)),
            np.array([self.slices.grid[i][:2] for i in self.index]).astype(np.int64),
            pad,
            np.array(self.index),
            out,
            status,
        )
        return status

    def _places(self) -> tuple[UInt8, Int64, Int64, Int64]:
        """Packed paths and where each begins, sizes of the files, offsets of the pixels."""
        packed, offsets = pack_paths([self.slices.path[i] for i in self.index], self.root)
        places = np.array(self._each(self.slices.file_size, self.slices.pixel_offset), np.int64)
        return packed, offsets, places[:, 0].copy(), places[:, 1].copy()

    def _each(self, *columns: Sequence[Any]) -> list[list[Any]]:
        return [[column[i] for column in columns] for i in self.index]

    def _bits(self, layout: Layout) -> tuple[Int32, Float64]:
        """(k, 2) mask of the stored bits, and the sign bit or 0; (k, 2) a and b of the
        a + b x value that turns MONOCHROME1 round, 0 and 1 elsewhere.
        """
        signed = np.dtype(self.dtype).kind == "i"
        masks = [(1 << self.slices.bits_stored[i]) - 1 for i in self.index]
        bits = [(mask, (mask + 1) // 2 if signed else 0) for mask in masks]
        turned = [
            (-1 if signed else mask, -1) if _flips(self.slices, i, layout) else (0, 1)
            for mask, i in zip(masks, self.index, strict=True)
        ]
        return np.array(bits, np.int32), np.array(turned, np.float64)

    def _are_stored_as(self, out: NDArray[Any], layout: Layout) -> bool:
        """Whether the bytes of all files are those of the output."""
        slices = self.slices
        return (
            np.dtype(self.dtype) == out.dtype
            and self.size == out.shape[1:]
            and set(slices.grid) == {WHOLE_IMAGE}
            and set(slices.bits_stored) == {8 * out.dtype.itemsize}
            and set(slices.rescale_slope) == {1.0}
            and set(slices.rescale_intercept) == {0.0}
            and not any(_flips(slices, i, layout) for i in range(len(slices)))
        )

    def _are_shifts(self) -> bool:
        return all(is_shift(grid) for grid in {self.slices.grid[i] for i in self.index})

    def _fit(self, dtype: np.dtype[Any]) -> bool:
        """Whether the kernel may do it: at most 16 bits, and no fractions for integers."""
        each = self._each(self.slices.rescale_slope, self.slices.rescale_intercept)
        whole = all(float(number).is_integer() for pair in each for number in pair)
        return np.dtype(self.dtype).itemsize < 4 and (dtype.kind == "f" or whole)


def _is_set(layout: Layout) -> bool:
    return not np.isnan(layout.pad_value)


def _read_problem(root: str, slices: SliceRefs, i: int, status: int) -> Problem:
    path = slices.path[i]
    if status == _NOT_OPENED:
        try:
            os.close(os.open(Path(root) / path, os.O_RDONLY))
            text = "could not be opened"
        except OSError as error:
            text = error.strerror or type(error).__name__
        return Problem(path, Reason.UNREADABLE_FILE, text)
    if status == _SIZE_CHANGED:
        return Problem(path, Reason.FILE_CHANGED, _changed(slices.file_size[i]))
    text = f"the pixels at byte {slices.pixel_offset[i]} could not be read to their end"
    return Problem(path, Reason.UNREADABLE_FILE, text)


def _changed(size: int) -> str:
    return f"the file had {size} bytes when it was scanned and has changed since"


# --- values --------------------------------------------------------------------------------------


def mask_bits(stored: NDArray[Any], bits_stored: int, high_bit: int = -1) -> NDArray[Any]:
    """Drop what lies outside the stored bits (old overlays), extend the sign (PS3.5 8.1.1).

    Parameters
    ----------
    stored
        Any shape, integers; other types are given back.
    bits_stored
        How many bits hold the value.
    high_bit
        The most significant of them; -1: bits_stored - 1.
    """
    bits = 8 * stored.dtype.itemsize
    above = bits - 1 - (high_bit if high_bit >= 0 else bits_stored - 1)
    spare = bits - bits_stored
    if (above, spare) == (0, 0) or stored.dtype.kind not in "iu":
        return stored
    return (stored << above) >> spare


def inverted(stored: NDArray[Any], bits_stored: int) -> NDArray[Any]:
    """MONOCHROME1 turned round: lowest + highest storable value - value.

    Floating-point pixels have no such limits; there it is the frame's own minimum and maximum.
    """
    if stored.dtype.kind == "f":
        least, most = np.fmin.reduce(stored, axis=None), np.fmax.reduce(stored, axis=None)
        turned: NDArray[Any] = least + most - stored
        return turned
    ends = -1 if stored.dtype.kind == "i" else (1 << bits_stored) - 1
    return ends - stored.astype(np.int64)


def _rescaled(
    stored: NDArray[Any],
    slices: SliceRefs,
    i: int,
    layout: Layout,
    modality_lut: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """Values of slice i as the file is to hold them, on the source image's grid, any type."""
    if _flips(slices, i, layout):
        stored = inverted(stored, slices.bits_stored[i])
    slope, intercept = slices.rescale_slope[i], slices.rescale_intercept[i]
    if modality_lut is not None:
        values = modality_lut(stored)
    elif (slope, intercept) == (1.0, 0.0):
        values = stored
    else:
        values = stored.astype(np.float64) * slope + intercept
    if values.ndim == 3 and layout.samples == 1:
        luminance: NDArray[Any] = values @ LUMINANCE
        return luminance
    if values.ndim == 2 and layout.samples == 3:
        return np.repeat(values[..., None], 3, axis=2)
    return values


def _store(
    out: NDArray[Any], values: NDArray[Any], grid: tuple[float, ...], layout: Layout
) -> None:
    """Place or interpolate the values of one slice into its place in the output."""
    shape = (out.shape[0], out.shape[1])
    if is_shift(grid):
        placed = place(_exactly(values, out.dtype), grid, shape, layout.pad_value)
    else:
        placed = to_dtype(resample(values, grid, shape, layout.pad_value), out.dtype)
    out[...] = placed


def _exactly(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in another type; a FrameError where they lie beyond it."""
    if np.can_cast(values.dtype, dtype):
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    known = values if values.dtype.kind in "iu" else values[np.isfinite(values)]
    least, most = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if least < float(limits.min) - 0.5 or most > float(limits.max) + 0.5:
        detail = (
            f"values from {least:g} to {most:g}, the file holds {limits.min:g} to {limits.max:g}: "
            "more than the header's bits allow"
        )
        raise FrameError(Reason.UNSUPPORTED_PIXELS, detail)
    return values.astype(dtype) if values.dtype.kind in "iu" else to_dtype(values, dtype)


# --- decoded pixels ------------------------------------------------------------------------------


def decode_frame(file: Path, frame: int) -> NDArray[Any]:
    """The stored values of one frame: (rows, columns), or (rows, columns, 3) red, green, blue.

    Raises
    ------
    OSError, FrameError
        See `open_image`; FrameError also where the frame has another size than the header says.
    Exception
        Whatever pydicom and the decoders raise on broken files.
    """
    with quiet(), open_image(file) as image:
        return stored_frame(image, frame)


def stored_frame(image: OpenImage, frame: int) -> NDArray[Any]:
    """As `decode_frame`, of an image that is open."""
    options = image.options
    if not 0 <= frame < int(options["number_of_frames"]):
        detail = f"frame {frame + 1} of (0028,0008) Number of Frames {options['number_of_frames']}"
        raise FrameError(Reason.UNDECODABLE_PIXELS, detail)
    if image.decoder.transfer_syntax_uid in NATIVE:
        stored, kind = _native_frame(image, frame)
    else:
        stored, kind = _encoded_frame(image, frame)
    if kind == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        stored, kind = apply_color_lut(stored, image.dataset)[..., :3], "RGB"
    _check_decoded(stored, kind, options)
    return stored


def _check_decoded(stored: NDArray[Any], kind: str, options: dict[str, Any]) -> None:
    """A FrameError unless the frame is grey or red, green and blue, in the header's size."""
    if kind not in (*GREY, "RGB"):
        detail = "(0028,0004) Photometric Interpretation is neither grey, palette, RGB nor YBR"
        raise FrameError(Reason.UNSUPPORTED_PIXELS, detail)
    expected = (options["rows"], options["columns"], *((3,) if kind == "RGB" else ()))
    if stored.shape != expected:
        _reject_size(stored.shape, expected)


def _reject_size(found: Sequence[int], expected: Sequence[int]) -> None:
    sizes = (" x ".join(map(str, size)) for size in (found, expected))
    detail = "the frame holds {} pixels, (0028,0010) Rows x (0028,0011) Columns is {}"
    raise FrameError(Reason.IMAGE_SIZE_DIFFERS, detail.format(*sizes))


def _native_frame(image: OpenImage, frame: int) -> tuple[NDArray[Any], str]:
    """Values and photometric interpretation of a frame that is not encoded."""
    image.stream.seek(image.start)
    if image.options["bits_allocated"] == 1:
        return _unpack(image.stream, frame, image.options)
    return _as_array(image.stream, frame, image.decoder.transfer_syntax_uid, image)


def _as_array(
    source: BinaryIO | bytes, frame: int, syntax: str, image: OpenImage, **changed: Any
) -> tuple[NDArray[Any], str]:
    """Native pixels through pydicom; bits that lie elsewhere than usual are moved first."""
    from pydicom.pixels.decoders.base import get_decoder

    options = {**image.options, **changed}
    bits = options.get("bits_stored", options["bits_allocated"])
    high_bit = image.dataset.get("HighBit", bits - 1)
    usual = high_bit == bits - 1 or not bits - 1 <= high_bit < options["bits_allocated"]
    options["correct_unused_bits"] = usual
    stored, found = get_decoder(syntax).as_array(source, index=frame, **options)
    kind = str(found["photometric_interpretation"])
    return (stored if usual else mask_bits(stored, bits, high_bit)), kind


def _unpack(stream: BinaryIO, frame: int, options: dict[str, Any]) -> tuple[NDArray[Any], str]:
    """A frame of single bits, which may begin and end inside a byte (PS3.5 8.1.1, D.2)."""
    shape = (options["rows"], options["columns"])
    first = frame * shape[0] * shape[1]
    last = first + shape[0] * shape[1]
    stream.seek(first // 8, os.SEEK_CUR)
    packed = np.frombuffer(stream.read(-(-last // 8) - first // 8), np.uint8)
    bits = np.unpackbits(packed, bitorder="little")[first % 8 :][: last - first]
    return bits.reshape(shape), str(options["photometric_interpretation"])


def _encoded_frame(image: OpenImage, frame: int) -> tuple[NDArray[Any], str]:
    """Values and photometric interpretation of a frame that is encoded."""
    from pydicom.encaps import get_frame

    options = dict(image.options)
    frames, offsets = int(options["number_of_frames"]), options.pop("extended_offsets", None)
    image.stream.seek(image.start)
    encoded = get_frame(image.stream, frame, number_of_frames=frames, extended_offsets=offsets)
    claimed = codestream_size(encoded)
    expected = (options["rows"], options["columns"])
    if claimed is not None and claimed != expected:
        _reject_size(claimed, expected)
    try:
        found, pixels = decode_apart(encoded, image.decoder, options)
        if image.decoder.gives == "codestream":
            return as_array(found, pixels), str(found["kind"])
    except DecodingError as error:
        raise FrameError(Reason.UNDECODABLE_PIXELS, str(error)) from None
    changed = found["options"]
    if changed["bits_allocated"] == 1:
        return _unpack(io.BytesIO(pixels.tobytes()), 0, changed)
    return _as_array(pixels.tobytes(), 0, EXPLICIT_LITTLE_ENDIAN, image, **changed)


def _modality_lut(image: OpenImage) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
    """The modality LUT of a grey image (PS3.3 C.11.1.1); None where it has none."""
    from pydicom.pixels.processing import apply_modality_lut

    if not image.is_grey or not image.dataset.get("ModalityLUTSequence"):
        return None
    # in 64 bits, since pydicom counts entries in the type that it is given
    return lambda stored: apply_modality_lut(stored.astype(np.int64), image.dataset)


def _decode_files(
    root: str, slices: SliceRefs, index: list[int], out: NDArray[Any], layout: Layout
) -> dict[int, Problem]:
    """Decode frames file by file, each header being read once; the problems by place."""
    by_path: dict[str, list[int]] = {}
    for i in index:
        by_path.setdefault(slices.path[i], []).append(i)
    failed: dict[int, Problem] = {}
    with quiet():
        for path, places in by_path.items():
            failed |= _decode_file(Path(root) / path, slices, places, out, layout)
    return failed


def _decode_file(
    file: Path, slices: SliceRefs, places: list[int], out: NDArray[Any], layout: Layout
) -> dict[int, Problem]:
    """Decode the frames of one file; a header that cannot be read costs all of them."""
    path, failed = slices.path[places[0]], {}
    try:
        with open_image(file) as image:
            _check_unchanged(file, slices.file_size[places[0]])
            frames = int(image.options["number_of_frames"])
            for i in places:
                try:
                    _decode_into(out[i], image, slices, i, layout)
                except ResumableError:  # is about this machine
                    raise
                except Exception as error:  # noqa: BLE001 broken files make decoders raise anything
                    name = f"frame {slices.frame[i] + 1} of {frames}: " if frames > 1 else ""
                    failed[i] = _decode_problem(path, error, name)
    except ResumableError:
        raise
    except Exception as error:  # noqa: BLE001 and pydicom as well
        return dict.fromkeys(places, _decode_problem(path, error))
    return failed


def _check_unchanged(file: Path, size: int) -> None:
    if file.stat().st_size != size:
        raise FrameError(Reason.FILE_CHANGED, _changed(size))


def _decode_into(
    out: NDArray[Any], image: OpenImage, slices: SliceRefs, i: int, layout: Layout
) -> None:
    """Decode, rescale and store the frame of slice i."""
    stored = stored_frame(image, slices.frame[i])
    if stored.shape[:2] != (slices.rows[i], slices.columns[i]):
        _reject_size(stored.shape[:2], (slices.rows[i], slices.columns[i]))
    _store(out, _rescaled(stored, slices, i, layout, _modality_lut(image)), slices.grid[i], layout)


def _decode_problem(path: str, error: Exception, name: str = "") -> Problem:
    """In words without what pydicom's texts quote: values of the header."""
    if isinstance(error, FrameError):
        return Problem(path, error.reason, f"{name}{error.detail}")
    if isinstance(error, OSError) and error.strerror:
        return Problem(path, Reason.UNREADABLE_FILE, f"{name}{error.strerror}")
    kind = type(error).__name__
    return Problem(path, Reason.UNDECODABLE_PIXELS, f"{name}the pixels cannot be decoded ({kind})")
