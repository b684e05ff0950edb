"""An image file that is open: its header, as far as its pixels need it, and where they are.

Every guard that a file must pass before a decoder sees a byte of it is here, or in `guards.py`,
which judges the same headers while they are scanned.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from parallel_dicomseg.dicom.decoders import (
    DEFLATED_LITTLE_ENDIAN,
    EXPLICIT_BIG_ENDIAN,
    EXPLICIT_LITTLE_ENDIAN,
    EXTRA,
    IMPLICIT_LITTLE_ENDIAN,
    Decoder,
    decoder_for,
)
from parallel_dicomseg.dicom.elements import TRANSFER_SYNTAX_UID, value_of
from parallel_dicomseg.dicom.guards import LARGE_FRAME_BYTES
from parallel_dicomseg.dicom.skim import census, skim
from parallel_dicomseg.dicom.slow_headers import Metered, find_data_set
from parallel_dicomseg.dicom.walk import PIXELS, walk_files
from parallel_dicomseg.files import open_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.posix import AVAILABLE
from parallel_dicomseg.records import Reason

GREY = ("MONOCHROME1", "MONOCHROME2")
#: Transfer syntaxes whose pixels are not compressed frame by frame.
NATIVE = (
    IMPLICIT_LITTLE_ENDIAN,
    EXPLICIT_LITTLE_ENDIAN,
    DEFLATED_LITTLE_ENDIAN,
    EXPLICIT_BIG_ENDIAN,
)

# Elements that pixels need (PS3.3 C.7.6.3, C.7.9, C.11.1, PS3.5 A.4).
_PIXEL_TAGS = frozenset(
    {
        *(0x00280000 | element for element in (0x2, 0x4, 0x6, 0x8, 0x10, 0x11, 0x100, 0x101)),
        *(0x00280000 | element for element in (0x102, 0x103, 0x120, 0x1199)),
        *(0x00280000 | element for element in (0x1101, 0x1102, 0x1103, 0x1201, 0x1202, 0x1203)),
        *(0x00280000 | element for element in (0x1221, 0x1222, 0x1223, 0x3000)),
        *(0x00089205, 0x7FE00001, 0x7FE00002),
    }
)
_LAST_BEFORE_PIXELS = 0x7FE00007
_PIXEL_KEYWORDS = {0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData", 0x0010: "PixelData"}
_PIXEL_VRS = ("OB", "OW", "OF", "OD", "UN")
_SEQUENCE_TAGS = frozenset({0x00283000})
# A header of a deflated file may be as long as this.
_DEFLATED_HEADER = 2**25
# Beyond one for each frame; frames of large files come in several.
_MORE_FRAGMENTS = 2**16
# Where no table says which fragments are a frame's, pydicom looks at all of them for every frame.
_MOST_STEPS = 2**25


class FrameError(Exception):
    """Why one frame cannot be used; inside this room it becomes a Problem.

    The message never holds a value of the header other than sizes and bits.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class OpenImage:
    """A DICOM image whose header has been read; its pixels are read frame by frame."""

    dataset: Any
    """The part of the header that pixels need, as a pydicom Dataset."""
    stream: BinaryIO
    start: int
    """Where in the stream the value of the pixel data begins."""
    decoder: Decoder
    options: dict[str, Any]
    """What pydicom's decoders want to know of the header."""

    @property
    def is_grey(self) -> bool:
        """Whether its pixels are neither colour nor indices into a palette."""
        return str(self.options.get("photometric_interpretation")) in GREY


@dataclass(frozen=True, slots=True)
class _Opened:
    """A header with its pixels."""

    dataset: Any
    syntax: str
    pixels: BinaryIO
    """At the value of the pixel data."""
    keyword: str
    vr: str


@contextmanager
def open_image(file: Path, also: Collection[int] = ()) -> Iterator[OpenImage]:
    """Read the header of an image file, and keep the file open for its frames.

    Parameters
    ----------
    file
        The image.
    also
        Tags of elements that are wanted of the header besides those that pixels need.

    Raises
    ------
    OSError
        The file cannot be read, or is too large.
    FrameError
        It has no pixels, no decoder for them is known or installed, or it claims more than the
        limits allow.
    Exception
        Whatever pydicom raises on a broken header.
    """
    from pydicom.pixels.utils import as_pixel_options

    wanted = _PIXEL_TAGS | set(also)
    with open_regular(file, limits().file_bytes) as stream:
        opened = _read_walked(file, stream, wanted) or _read_odd(stream, wanted)
        options = as_pixel_options(opened.dataset, pixel_keyword=opened.keyword, pixel_vr=opened.vr)
        options.setdefault("samples_per_pixel", 1)
        decoder = _installed_decoder(opened.syntax, options)
        start = opened.pixels.tell()
        size = os.fstat(stream.fileno()).st_size
        _check_claims(options, size)
        if opened.syntax not in NATIVE:
            places = find_frames(opened.pixels, int(options["number_of_frames"]), size)
            if "extended_offsets" not in options:
                options |= places
        yield OpenImage(opened.dataset, opened.pixels, start, decoder, options)


def _check_claims(options: dict[str, Any], file_size: int) -> None:
    """A FrameError where a frame is larger than the limits allow."""
    rows, columns = options.get("rows") or 0, options.get("columns") or 0
    most = limits().image_pixels
    if rows * columns > most:
        detail = f"Rows x Columns = {rows} x {columns} pixels, limit {most}"
        raise FrameError(Reason.UNSUPPORTED_PIXELS, detail)
    if int(options["number_of_frames"]) > limits().frames:
        detail = f"(0028,0008) Number of Frames is {options['number_of_frames']}"
        raise FrameError(Reason.UNSUPPORTED_PIXELS, f"{detail}, limit {limits().frames}")
    frame = rows * columns * options["samples_per_pixel"] * options.get("bits_allocated", 8) // 8
    if frame > max(LARGE_FRAME_BYTES, limits().expansion * file_size):
        detail = f"a frame of {frame} bytes in a file of {file_size}"
        raise FrameError(Reason.PIXEL_DATA_SHORT, detail)


# --- headers -------------------------------------------------------------------------------------


def _read_walked(file: Path, stream: BinaryIO, wanted: Collection[int]) -> _Opened | None:
    """A little-endian header that the walk understands; None: another one."""
    walked = walk_files("", [str(file)]) if AVAILABLE else None
    if walked is None or walked.status[0] != PIXELS:
        return None
    syntax = value_of(walked.values, 0, TRANSFER_SYNTAX_UID).decode("ascii", "replace")
    tag, start, _ = walked.pixels[0].tolist()
    if start > limits().header_bytes:
        detail = f"a header of {start} bytes, limit {limits().header_bytes}"
        raise FrameError(Reason.UNREADABLE_FILE, detail)
    explicit = syntax != IMPLICIT_LITTLE_ENDIAN
    raw = stream.read(start)
    skimmed = skim(raw, 132, explicit, {*wanted, _LAST_BEFORE_PIXELS})
    if skimmed is None:
        return None
    at = skimmed[1]
    vr = raw[at + 4 : at + 6].decode("ascii", "replace") if explicit else "OW"
    keyword = _PIXEL_KEYWORDS[tag & 0xFFFF]
    dataset = _dataset(skimmed[0], explicit)
    return _Opened(dataset, syntax, stream, keyword, vr if vr in _PIXEL_VRS else "OW")


def _dataset(raw: bytes, explicit: bool) -> Any:
    """The elements of a little-endian data set; a FrameError where there are too many."""
    from pydicom.filereader import read_dataset

    check_census(raw, explicit)
    return read_dataset(io.BytesIO(raw), is_implicit_VR=not explicit, is_little_endian=True)


def check_census(raw: bytes, explicit: bool, start: int = 0) -> None:
    """Refuse a little-endian data set at `start` that takes pydicom long to parse.

    Raises
    ------
    FrameError
        It has too many elements, or sequences inside one another.
    """
    elements, depth = census(raw, start, explicit)
    if elements > limits().header_elements:
        detail = f"the header has {elements} elements and items, limit {limits().header_elements}"
        raise FrameError(Reason.UNREADABLE_FILE, detail)
    if depth > limits().header_depth:
        detail = f"the header has {depth} sequences inside one another"
        raise FrameError(Reason.UNREADABLE_FILE, f"{detail}, limit {limits().header_depth}")


def _read_odd(stream: BinaryIO, wanted: Collection[int]) -> _Opened:
    """A header in another byte order, deflated, without preamble or malformed."""
    from pydicom import dcmread

    start, encoding = find_data_set(stream, os.fstat(stream.fileno()).st_size)
    if start >= 0 and encoding.is_deflated:
        return _read_deflated(stream, start, wanted)
    stream.seek(0)
    dataset = dcmread(
        cast(BinaryIO, Metered.of(stream)),
        stop_before_pixels=True,
        force=True,
        specific_tags=sorted(wanted),
    )
    keyword, vr = _read_pixel_tag(stream, dataset)
    for tag in _SEQUENCE_TAGS & set(dataset.keys()):
        value = getattr(dataset.get_item(tag), "value", None)
        if isinstance(value, bytes):
            # of either byte order: an item takes 8 bytes at least
            check_census(value, not dataset.original_encoding[0])
    return _Opened(dataset, _transfer_syntax(dataset), stream, keyword, vr)


def _transfer_syntax(dataset: Any) -> str:
    """Of a dataset; what it turned out to be where the file has no meta header."""
    uid = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if uid:
        return str(uid)
    implicit, little = dataset.original_encoding
    if not little:
        return EXPLICIT_BIG_ENDIAN
    return IMPLICIT_LITTLE_ENDIAN if implicit else EXPLICIT_LITTLE_ENDIAN


def _read_pixel_tag(stream: BinaryIO, dataset: Any) -> tuple[str, str]:
    """Step over the head of the pixel data element; its keyword and VR (PS3.5 7.1)."""
    order = "<" if dataset.original_encoding[1] else ">"
    head = stream.read(8).ljust(8, b"\0")
    group, element = np.frombuffer(head, f"{order}u2", 2).tolist()
    keyword = _PIXEL_KEYWORDS.get(element) if group == 0x7FE0 else None
    if keyword is None:
        raise _without_pixels()
    # not every file has the VRs that its transfer syntax promises
    vr = head[4:6].decode("ascii", "replace")
    if vr in _PIXEL_VRS:
        stream.seek(4, os.SEEK_CUR)
    else:
        vr = "OW"
    return keyword, vr


def _without_pixels() -> FrameError:
    return FrameError(Reason.MISSING_TAG, "(7FE0,0010) Pixel Data is missing")


def _installed_decoder(syntax: str, options: dict[str, Any]) -> Decoder:
    decoder = decoder_for(syntax, options["bits_allocated"], options["samples_per_pixel"])
    if decoder is None:
        # not named: what stands there may be anything
        detail = "(0002,0010) Transfer Syntax UID is none that a decoder is known for"
        raise FrameError(Reason.UNDECODABLE_PIXELS, detail)
    if not decoder.is_installed:
        detail = f"(0002,0010) Transfer Syntax {decoder.name} ({syntax}) needs a decoder: {EXTRA}"
        raise FrameError(Reason.UNDECODABLE_PIXELS, detail)
    return decoder


# --- a deflated data set --------------------------------------------------------------------------


def _read_deflated(stream: BinaryIO, start: int, wanted: Collection[int]) -> _Opened:
    """A data set that is one deflate stream (PS3.5 A.5): inflated no further than it should go."""
    stream.seek(start)
    raw = stream.read(limits().inflated_bytes)
    head = inflate(raw, min(_DEFLATED_HEADER, limits().inflated_bytes))
    skimmed = skim(head, 0, True, {*wanted, _LAST_BEFORE_PIXELS})
    if skimmed is None or len(head) < skimmed[1] + 12:
        raise _without_pixels()
    dataset, at = _dataset(skimmed[0], True), skimmed[1]
    group, element = np.frombuffer(head, "<u2", 2, at).tolist()
    if group != 0x7FE0 or element not in _PIXEL_KEYWORDS:
        raise _without_pixels()
    vr = head[at + 4 : at + 6].decode("ascii", "replace")
    begin, length = at + 12, int.from_bytes(head[at + 8 : at + 12], "little")
    if begin + length > limits().inflated_bytes:
        detail = f"inflates to {begin + length} bytes, limit {limits().inflated_bytes}"
        raise FrameError(Reason.UNSUPPORTED_PIXELS, detail)
    content = head if begin + length <= len(head) else inflate(raw, begin + length)
    pixels = io.BytesIO(content[begin : begin + length])
    keyword = _PIXEL_KEYWORDS[element]
    return _Opened(dataset, DEFLATED_LITTLE_ENDIAN, pixels, keyword, vr)


def inflate(raw: bytes, most: int) -> bytes:
    """The beginning of a deflate stream, inflated to at most so many bytes.

    Raises
    ------
    FrameError
        It cannot be inflated.
    """
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, most)
    except zlib.error:
        detail = "the deflated data set cannot be inflated"
        raise FrameError(Reason.UNREADABLE_FILE, detail) from None


# --- encapsulated frames --------------------------------------------------------------------------


def find_frames(stream: BinaryIO, frames: int, size: int) -> dict[str, Any]:
    """Where each of several frames is, as an extended offset table, where the file has no table.

    pydicom would walk through all fragments for every single frame.

    Raises
    ------
    FrameError
        There are far more fragments than frames, or a table that is far too large: stepping through
        them is work for nothing.
    """
    start = stream.tell()
    try:
        item, table = _item(stream)
        if item != _ITEM:
            return {}
        if table > 4 * limits().frames:
            detail = f"a Basic Offset Table of {table} bytes for {frames} frame(s)"
            raise FrameError(Reason.UNDECODABLE_PIXELS, detail)
        first = stream.seek(start + 8 + table)
        offsets, lengths = _fragments(stream, frames + _MORE_FRAGMENTS, size)
        if not table and len(offsets) < frames:
            detail = f"{len(offsets)} fragments for (0028,0008) Number of Frames {frames}"
            raise FrameError(Reason.PIXEL_DATA_SHORT, detail)
        if frames == 1 or table:
            return {}
        if len(offsets) != frames:
            if frames * len(offsets) > _MOST_STEPS:
                detail = f"{frames} frames in {len(offsets)} fragments without a table of offsets"
                raise FrameError(Reason.UNDECODABLE_PIXELS, detail)
            return {}
        return {"extended_offsets": ([at - first for at in offsets], lengths)}
    finally:
        stream.seek(start)


_ITEM = 0xFFFEE000


def _item(stream: BinaryIO) -> tuple[int, int]:
    """Tag and length of an item (PS3.5 A.4); 0 at the end of the file."""
    head = stream.read(8)
    if len(head) < 8:
        return 0, 0
    group, element = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    return group << 16 | element, int.from_bytes(head[4:], "little")


def _fragments(stream: BinaryIO, most: int, size: int) -> tuple[list[int], list[int]]:
    """Where the fragments begin, and how long they are."""
    offsets: list[int] = []
    lengths: list[int] = []
    at = stream.tell()
    while at < size:
        tag, length = _item(stream)
        if tag != _ITEM:
            break
        offsets.append(at)
        lengths.append(length)
        if len(offsets) > most:
            detail = f"the frames come in more than {most} fragments"
            raise FrameError(Reason.UNDECODABLE_PIXELS, detail)
        at = stream.seek(at + 8 + length)
    return offsets, lengths
