"""The slow way to a header: one file at a time through pydicom, for what the fast walk leaves.

Big endian, deflated, without preamble, malformed in a way that pydicom forgives, or with a lookup
table. No file may take long or much memory here: what is not wanted is stepped over, and what is
read is counted.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, cast

import numpy as np

from parallel_dicomseg.dicom.decoders import quiet
from parallel_dicomseg.dicom.elements import (
    BINARY_DTYPE,
    FLOAT_PIXEL_DATA,
    KEPT,
    LIMITS,
    LONGEST_NEEDED,
    MODALITY_LUT_SEQUENCE,
    NUMBER_OF_FRAMES,
    PER_FRAME,
    PER_FRAME_GROUPS,
    PIXEL_DATA,
    SEQUENCES,
    SHARED_GROUPS,
    SLOT,
    TRANSFER_SYNTAX_UID,
    Values,
    pack,
    vr_kind,
)
from parallel_dicomseg.files import open_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import Problem, Reason, ScannedFile

IMPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2"
EXPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2.1"
EXPLICIT_BIG_ENDIAN = b"1.2.840.10008.1.2.2"
#: The whole data set is one deflate stream: the image's own, and two references to pixels.
DEFLATED = (
    b"1.2.840.10008.1.2.1.99",
    b"1.2.840.10008.1.2.4.95",
    b"1.2.840.10008.1.2.4.205",
)

# An empty item of a sequence costs pydicom one read and most of all, about 30 microseconds.
_MOST_READS = 20_000
_LARGEST_READ = 2**24
_LARGEST_HEADER = 2**25
_LARGEST_META = 2**16
_EMPTY_ITEM_BYTES = 8
_PREFIX_END = 132
_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR "
    b"US UT UV".split()
)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_CLAIMS_DICOM = re.compile(r"[^/]\.(?:dcm|dicom|ima)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The header of one file that cannot be read together with others."""

    values: Values
    """One row, or one per frame."""
    items: int
    """In the per-frame functional groups; 0: the row holds for all frames."""
    size: int
    """Bytes of the file."""
    pixels: tuple[int, int, int]
    """Tag, offset in the file and length of the pixel data; tag -1: it has none, offset or length
    -1: unknown."""
    lut_range: tuple[float, float] = (np.nan, np.nan)
    """Lowest and highest value of the modality lookup table; NaN without one."""


class _UnreadableError(Exception):
    """The header cannot be read, and the text says why without quoting it."""


class Metered:
    """A file that may be read only so often and so much at once."""

    def __init__(self, file: BinaryIO, left: Iterator[int]) -> None:
        self._file = file
        self._left = left
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        if next(self._left, None) is None:
            raise _UnreadableError(f"the header takes more than {_MOST_READS} reads")
        if not 0 <= size <= _LARGEST_READ:
            raise _UnreadableError(f"an element of {size} bytes, at most {_LARGEST_READ} are read")
        return self._file.read(size)

    @classmethod
    def of(cls, file: BinaryIO) -> Metered:
        """A file on an account of its own."""
        return cls(file, iter(range(_MOST_READS)))

    def over(self, raw: bytes) -> Metered:
        """A value in memory, on the same account."""
        return Metered(BytesIO(raw), self._left)


def read_header(root: str, path: str) -> FileHeader | ScannedFile | Problem:
    """Read the header of one file through pydicom.

    Returns
    -------
    The header of a DICOM file; a ScannedFile without SOP class for a file that neither is DICOM
    nor says so by its name; a Problem for one that cannot be read.
    """
    try:
        with open_regular(f"{root}/{path}", limits().file_bytes) as file:
            return _read_open(file, path)
    except Exception as error:  # noqa: BLE001 broken files make pydicom raise anything
        return _problem_of(path, error)


def _problem_of(path: str, error: BaseException) -> Problem:
    """What an exception says, without quoting the header as pydicom's texts do."""
    cause: BaseException | None = error
    while cause is not None:
        # pydicom makes an OSError of whatever happens while it reads an item
        if isinstance(cause, _UnreadableError):
            return Problem(path, Reason.UNREADABLE_FILE, str(cause))
        cause = cause.__context__
    if isinstance(error, OSError) and error.strerror:
        return Problem(path, Reason.UNREADABLE_FILE, error.strerror)
    detail = f"the header cannot be read ({type(error).__name__})"
    return Problem(path, Reason.NOT_DICOM, detail)


def _read_open(file: BinaryIO, path: str) -> FileHeader | ScannedFile | Problem:
    size = os.fstat(file.fileno()).st_size
    start, encoding = _start_of(file, size)
    if start < 0:
        return _no_dicom(path, size)
    # its warnings print tag values, and there is one per illegal UID
    with quiet():
        return _read(file, size, start, encoding)


def claims_dicom(path: str) -> bool:
    """Whether a file says by its suffix that it is DICOM."""
    return _CLAIMS_DICOM.search(path) is not None


def _no_dicom(path: str, size: int) -> ScannedFile | Problem:
    """What a file without DICOM in it is, by its name."""
    if claims_dicom(path):
        detail = f"no 'DICM' at byte 128 of {size} bytes, and no data set at byte 0"
        return Problem(path, Reason.NOT_DICOM, detail)
    return ScannedFile(path, "", size)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a data set is written."""

    syntax: bytes
    """Transfer syntax UID."""
    implicit: bool
    little: bool

    @property
    def is_deflated(self) -> bool:
        """Whether it is an image's or annotation's data set in one deflate stream."""
        return self.syntax == DEFLATED[0]


def _start_of(file: BinaryIO, size: int) -> tuple[int, Encoding | None]:
    """Where the first element is, and how it is written where no file meta group says so.

    -1 where there is none: a data set at byte 0 must begin as one does (PS3.5 7.1).
    """
    head = file.read(_PREFIX_END)
    if head[128:] == b"DICM":
        return _PREFIX_END, None
    if head[:2] == b"\x02\0" and head[4:6] in _VRS:
        return 0, None
    encoding = _guess(head, size)
    return (-1, None) if encoding is None else (0, encoding)


def _guess(head: bytes, size: int) -> Encoding | None:
    """How a data set is written that begins with these bytes; None where it is none."""
    if len(head) < 8:
        return None
    for order, explicit_syntax in (("<", EXPLICIT_LITTLE_ENDIAN), (">", EXPLICIT_BIG_ENDIAN)):
        group, element = struct.unpack_from(f"{order}HH", head)
        if group != 8 or element > 0x70:
            continue
        if head[4:6] in _VRS:
            return Encoding(explicit_syntax, False, order == "<")
        if order == "<" and struct.unpack_from("<I", head, 4)[0] <= min(size - 8, 256):
            return Encoding(IMPLICIT_LITTLE_ENDIAN, True, True)
    return None


def find_data_set(file: BinaryIO, size: int) -> tuple[int, Encoding]:
    """Where the data set of a file begins, behind the file meta group, and how it is written.

    -1 where there is none. Raises whatever a broken file meta group makes.
    """
    start, encoding = _start_of(file, size)
    if start < 0:
        return -1, Encoding(b"", True, True)
    start, encoding, _ = _after_meta(file, size, start, encoding)
    return start, encoding


def _after_meta(
    file: BinaryIO, size: int, start: int, encoding: Encoding | None
) -> tuple[int, Encoding, dict[int, bytes]]:
    """Where the data set begins, how it is written, and what the meta group before it says."""
    if encoding is not None:
        return start, encoding, {}
    file.seek(start)
    position, meta = _read_meta(file.read(_LARGEST_META))
    start += position
    encoding = _encoding_of(file, size, start, meta.get(TRANSFER_SYNTAX_UID, b""))
    return start, encoding, meta


def _read(file: BinaryIO, size: int, start: int, encoding: Encoding | None) -> FileHeader:
    from pydicom.filereader import read_dataset

    start, encoding, meta = _after_meta(file, size, start, encoding)
    file.seek(start)
    deflated = encoding.syntax in DEFLATED
    data = _inflate(file.read(_LARGEST_HEADER)) if deflated else file
    metered = Metered.of(data)
    pixels: list[tuple[int, int, int]] = []

    def at_pixels(tag: int, _: str | None, length: int) -> bool:
        if FLOAT_PIXEL_DATA <= tag <= PIXEL_DATA:
            pixels.append((int(tag), metered.tell(), length))
        return bool(pixels)

    dataset = read_dataset(
        cast(BinaryIO, metered), encoding.implicit, encoding.little,
        stop_when=at_pixels, specific_tags=list(KEPT),
    )  # fmt: skip
    tag, offset, length = pixels[0] if pixels else (-1, -1, -1)
    where = (tag, -1 if deflated else offset, -1 if length == 0xFFFFFFFF else length)
    header = {**meta, **_kept(dataset, KEPT, encoding.little)}
    header[TRANSFER_SYNTAX_UID] = encoding.syntax
    return _with_sequences(header, dataset, metered, size, where)


def _read_meta(head: bytes) -> tuple[int, dict[int, bytes]]:
    """Where the file meta group ends, and its kept elements; always little endian (PS3.10 7.1)."""
    at = 0
    kept: dict[int, bytes] = {}
    while head[at : at + 2] == b"\x02\0" and at + 12 <= len(head):
        element, vr = struct.unpack_from("<H", head, at + 2)[0], head[at + 4 : at + 6]
        if vr in _LONG_VRS:
            begin, length = at + 12, struct.unpack_from("<I", head, at + 8)[0]
        elif vr in _VRS:
            begin, length = at + 8, struct.unpack_from("<H", head, at + 6)[0]
        else:
            begin, length = at + 8, struct.unpack_from("<I", head, at + 4)[0]
        at = begin + length
        if at > len(head):
            raise _UnreadableError(
                f"the file meta group is cut off, or larger than {len(head)} bytes"
            )
        if (tag := 0x00020000 | element) in KEPT and length <= LONGEST_NEEDED:
            kept[tag] = head[begin:at]
    return at, kept


def _encoding_of(file: BinaryIO, size: int, start: int, raw_syntax: bytes) -> Encoding:
    """How the data set at `start` is written, by its transfer syntax (PS3.5 A) or its beginning."""
    syntax = raw_syntax.strip(b" \0")
    if not syntax:
        file.seek(start)
        return _guess(file.read(8), size) or Encoding(IMPLICIT_LITTLE_ENDIAN, True, True)
    return Encoding(syntax, syntax == IMPLICIT_LITTLE_ENDIAN, syntax != EXPLICIT_BIG_ENDIAN)


def _inflate(raw: bytes) -> BinaryIO:
    """The beginning of a deflated data set, as much as a header may be long."""
    try:
        return BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, _LARGEST_HEADER))
    except zlib.error:
        raise _UnreadableError("the deflated data set cannot be inflated") from None


def _kept(dataset: Any, wanted: Any, little: bool) -> dict[int, bytes]:
    """The raw values of the wanted tags that a pydicom data set has, in little-endian order."""
    kept: dict[int, bytes] = {}
    for tag in dataset.keys():  # noqa: SIM118 iterating a Dataset would convert every element
        if int(tag) in wanted and int(tag) not in SEQUENCES:
            value = _raw_value(dataset, int(tag), little)
            limit = int(LIMITS[SLOT[int(tag)]])
            if len(value) <= abs(limit):
                kept[int(tag)] = value
            elif limit > 0:
                raise _UnreadableError(
                    f"({tag >> 16:04X},{tag & 0xFFFF:04X}) has {len(value)} bytes, "
                    f"at most {limit} are read"
                )
    return kept


def _raw_value(dataset: Any, tag: int, little: bool) -> bytes:
    """The bytes of a value as the dictionary's VR would write them; b'' where they are none."""
    from pydicom.dataelem import RawDataElement

    element = dataset.get_item(tag)
    kind = vr_kind(KEPT[tag])
    if isinstance(element, RawDataElement):
        raw = element.value or b""
        if element.VR in (None, "UN") or vr_kind(element.VR) == kind:
            return raw if little or kind <= 1 else _swap(raw, KEPT[tag])
    return _rewritten(dataset, tag) if LIMITS[SLOT[tag]] > 0 else b""


def _swap(raw: bytes, vr: str) -> bytes:
    """Big-endian numbers as little-endian ones; what is malformed stays so."""
    dtype = np.dtype(BINARY_DTYPE[vr])
    return raw if len(raw) % dtype.itemsize else np.frombuffer(raw, dtype).byteswap().tobytes()


def _rewritten(dataset: Any, tag: int) -> bytes:
    """A value that the file writes with another VR, through pydicom; b'' where that fails."""
    vr = KEPT[tag]
    try:
        value = dataset[tag].value
        values = [] if value is None else [value] if isinstance(value, str) else np.ravel(value)
        if vr in BINARY_DTYPE:
            numbers = [int(number) for number in values]
            return np.array(numbers).astype(BINARY_DTYPE[vr], casting="unsafe").tobytes()
        return "\\".join(str(text) for text in values).encode("ascii")
    except Exception:  # noqa: BLE001 the element is as good as absent, and the guards say so
        return b""


def _with_sequences(
    header: dict[int, bytes],
    dataset: Any,
    metered: Metered,
    size: int,
    pixels: tuple[int, int, int],
) -> FileHeader:
    """The header with what its functional groups and its lookup table say."""
    lut = _lut_range(dataset, metered)
    shared = _groups(dataset, SHARED_GROUPS, metered)
    frames = _groups(dataset, PER_FRAME_GROUPS, metered)
    for group in shared[:1]:
        header.update(group)
    if not any(frames[: frames_of(pack([header]))]):
        frames = []
    rows = pack([header, *({**header, **group} for group in frames)][bool(frames) :])
    return FileHeader(rows, len(frames), size, pixels, lut)


def frames_of(values: Values) -> int:
    """Number of Frames of the first header, as far as it can be; the guards judge it."""
    start, length = values.spans[0, SLOT[NUMBER_OF_FRAMES]].tolist()
    text = values.raw[start : start + length].tobytes().strip(b" \0")
    return max(1, min(int(text), limits().frames)) if text.isdigit() and len(text) < 10 else 1


def _groups(dataset: Any, tag: int, metered: Metered) -> list[dict[int, bytes]]:
    """The kept values of each item of a sequence of functional groups (PS3.3 C.7.6.16)."""
    return [_group(item, metered) for item in _items(dataset, tag, metered)]


def _group(item: Any, metered: Metered) -> dict[int, bytes]:
    """The values in the first item of every macro of one frame."""
    group: dict[int, bytes] = {}
    for tag in item.keys():  # noqa: SIM118 as above
        if tag.group % 2 == 0:
            for macro in _items(item, tag, metered)[:1]:
                kept = _kept_of_macro(macro)
                group.update(kept)
    return group


def _kept_of_macro(macro: Any) -> dict[int, bytes]:
    from pydicom.dataelem import RawDataElement

    kept: dict[int, bytes] = {}
    for tag in macro.keys():  # noqa: SIM118 as above
        element = macro.get_item(tag)
        if int(tag) not in PER_FRAME or not isinstance(element, RawDataElement):
            continue
        kind = vr_kind(KEPT[int(tag)])
        raw = element.value or b""
        if 0 < len(raw) <= abs(int(LIMITS[SLOT[int(tag)]])) and (
            element.VR in (None, "UN") or vr_kind(element.VR) == kind
        ):
            swap = kind > 1 and not element.is_little_endian
            kept[int(tag)] = _swap(raw, KEPT[int(tag)]) if swap else raw
    return kept


def _items(dataset: Any, tag: int, metered: Metered) -> list[Any]:
    """The items of a sequence; none where the element is no sequence or one of an empty item."""
    from pydicom.dataelem import RawDataElement
    from pydicom.filereader import read_sequence
    from pydicom.sequence import Sequence

    element = dataset.get_item(tag)
    if not isinstance(element, RawDataElement):
        value = None if element is None else element.value
        return list(value) if isinstance(value, Sequence) else []
    raw = element.value or b""
    item = b"\xfe\xff\0\xe0" if element.is_little_endian else b"\xff\xfe\xe0\0"
    if len(raw) <= _EMPTY_ITEM_BYTES or element.VR not in ("SQ", None) or raw[:4] != item:
        return []
    return list(
        read_sequence(
            cast(BinaryIO, metered.over(raw)),
            element.is_implicit_VR,
            element.is_little_endian,
            len(raw),
            "ascii",
        )
    )


def _lut_range(dataset: Any, metered: Metered) -> tuple[float, float]:
    """Lowest and highest value of the first modality lookup table (PS3.3 C.11.1.1)."""
    for item in _items(dataset, MODALITY_LUT_SEQUENCE, metered)[:1]:
        bits = int(item.LUTDescriptor[2])
        data = item.LUTData
        entries = (
            np.frombuffer(data, "<u2" if bits > 8 else "u1") if isinstance(data, bytes) else data
        )
        numbers = np.asarray(entries)
        return float(numbers.min()), float(numbers.max())
    return np.nan, np.nan
