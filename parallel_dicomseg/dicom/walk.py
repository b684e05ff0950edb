"""The fast walk: headers of many little-endian files in one call without the GIL.

Whatever it does not understand to the letter is left to `slow_headers`, which is also its twin in
the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel_dicomseg.dicom.elements import (
    FLOAT_PIXEL_DATA,
    KEPT,
    LIMITS,
    MOST_BYTES,
    PER_FRAME,
    PIXEL_DATA,
    SLOT,
    TAGS,
    TRANSFER_SYNTAX_UID,
    Values,
    vr_code,
    vr_kind,
)
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.posix import close, file_size, open_read_only, pack_paths, read_at
from parallel_dicomseg.records import Int64, UInt8

# How a walk ended: at the pixel data, at something it does not know, at the end of the file.
PIXELS, UNKNOWN, NO_PIXELS = 0, 1, 2

_ONE = np.uint64(1)
_UNDEFINED_LENGTH = 0xFFFFFFFF
_WINDOW_BYTES = 8192
# What may be looked at beyond the bytes that a window holds: the head of one element.
_SLACK = 16
# A sequence of one empty item: the Arterys files have such functional groups.
_EMPTY_ITEM_BYTES = 8
_ITEM_GROUP = 0xFFFE
_ITEM = 0xFFFEE000
_ITEM_DELIMITATION = 0xFFFEE00D
_SEQUENCE_DELIMITATION = 0xFFFEE0DD
_FIRST_PIXELS, _LAST_PIXELS = FLOAT_PIXEL_DATA, PIXEL_DATA
_SYNTAX_SLOT = SLOT[TRANSFER_SYNTAX_UID]
_SEQUENCE_VR = vr_code("SQ")
_UNKNOWN_VR = vr_code("UN")

# Explicit VRs whose length takes four bytes after two reserved ones (PS3.5 7.1.2).
_LONG_VR = np.zeros(65536, np.uint8)
_LONG_VRS = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
_LONG_VR[[vr_code(vr) for vr in _LONG_VRS]] = 1
# Of each possible VR, and of each kept tag: 0, or the way in which its values are written.
_KIND_OF_VR = np.array([vr_kind(chr(k & 255) + chr(k >> 8)) for k in range(65536)], np.uint8)
_KINDS = np.array([vr_kind(vr) for vr in KEPT.values()], np.uint8)
_GROUP_LIMITS = np.where([tag in PER_FRAME for tag in KEPT], np.abs(LIMITS), 0)


@dataclass(frozen=True, slots=True)
class Walked:
    """What the walk found in n files."""

    values: Values
    """n rows."""
    status: Int64
    """(n,) PIXELS, UNKNOWN or NO_PIXELS; the rows of UNKNOWN mean nothing."""
    size: Int64
    """(n,) bytes of the file; negative where it has none."""
    pixels: Int64
    """(n, 3) tag of the pixel data, where its value begins, its length or -1 for undefined."""


def walk_files(root: str, paths: Sequence[str]) -> Walked:
    """Walk the headers of files; those that cannot be opened are UNKNOWN."""
    n = len(paths)
    raw = np.empty(n * MOST_BYTES, np.uint8)
    spans = np.zeros((n, len(TAGS), 2), np.int64)
    pixels = np.full((n, 3), -1, np.int64)
    sizes = np.zeros(n, np.int64)
    status = np.full(n, UNKNOWN, np.int64)
    packed, offsets = pack_paths(paths, root)
    filled = _walk_files(
        packed, offsets, TAGS, LIMITS, _KINDS, _KIND_OF_VR, _LONG_VR,
        raw, spans, sizes, status, pixels,
    )  # fmt: skip
    return Walked(Values(raw[:filled], spans), status, sizes, pixels)


@kernel
def _u2(raw: UInt8, at: int) -> int:
    # an unsigned index spares the test for one that counts from the end
    first = np.uint64(at)
    return int(np.int64(raw[first]) | np.int64(raw[first + _ONE]) << 8)


@kernel
def _u4(raw: UInt8, at: int) -> int:
    return _u2(raw, at) | _u2(raw, at + 2) << 16


@kernel
def _tag(raw: UInt8, at: int) -> int:
    return _u2(raw, at) << 16 | _u2(raw, at + 2)


@kernel
def _is_upper(byte: int) -> bool:
    return 65 <= byte <= 90


@kernel
def _syntax_of(raw: UInt8, span: Int64) -> int:
    """0 explicit, 1 implicit, 2 one whose header this walk cannot read (big endian, deflated)."""
    start, length = span[0], span[1]
    while length > 0 and (raw[start + length - 1] == 0 or raw[start + length - 1] == 32):
        length -= 1
    if length == 17:  # 1.2.840.10008.1.2
        return 1
    if length == 19 and raw[start + 18] == 50:  # 1.2.840.10008.1.2.2
        return 2
    if length == 22 and raw[start + 18] == 49:  # 1.2.840.10008.1.2.1.99
        return 2
    return 0 if length > 0 else 2


@kernel
def _has_prefix(window: UInt8, held: int) -> bool:
    """Whether 'DICM' follows the preamble of 128 bytes, and at least one element follows it."""
    magic = window[128:132]
    return held >= 144 and magic[0] == 68 and magic[1] == 73 and magic[2] == 67 and magic[3] == 77


@kernel
def _element_head(raw: UInt8, at: int, explicit: bool, long_vr: UInt8) -> tuple[int, int, int]:
    """Value length, bytes before the value, and the VR as a number (PS3.5 7.1).

    The VR is 0 where the transfer syntax has none; the head is -1 where it is missing.
    """
    if not explicit:
        return _u4(raw, at + 4), 8, 0
    if not (_is_upper(raw[at + 4]) and _is_upper(raw[at + 5])):
        return 0, -1, 0
    vr = _u2(raw, at + 4)
    if long_vr[vr]:
        return _u4(raw, at + 8), 12, vr
    return _u2(raw, at + 6), 8, vr


@kernel
def _item_step(tag: int, length: int) -> tuple[int, int]:
    """Change of depth, and bytes to skip after the head, of an item or delimiter (PS3.5 7.5)."""
    if tag == _SEQUENCE_DELIMITATION:
        return -1, 0
    if tag == _ITEM and length != _UNDEFINED_LENGTH:
        return 0, length
    return 0, 0


@kernel
def _is_written_as(vr: int, kind: int, kind_of_vr: UInt8) -> bool:
    """Whether a VR in the file writes values as the dictionary's VR does."""
    return vr in (0, _UNKNOWN_VR) or kind_of_vr[vr] == kind


@kernel
def _keep_value(
    fd: int,
    start: int,
    length: int,
    window: UInt8,
    base: int,
    held: int,
    filled: int,
    raw: UInt8,
    span: Int64,
) -> int:
    """Copy a value to the end of `raw`; return the bytes filled so far, or -1 at the file's end.

    Mostly it lies in the window; where not, it is read from the file.
    """
    if start + length <= base + held:
        source, target = np.uint64(start - base), np.uint64(filled)
        for k in range(np.uint64(length)):
            raw[target + k] = window[source + k]
    elif read_at(fd, raw[filled : filled + length], length, start) != length:
        return -1
    span[0] = filled
    span[1] = length
    return filled + length


@kernel
def _walk(  # noqa: C901, PLR0911, PLR0912, PLR0915 one pass over the elements; cut up, it would pass ten variables on
    fd: int,
    size: int,
    window: UInt8,
    tags: Int64,
    limits: Int64,
    kinds: UInt8,
    kind_of_vr: UInt8,
    long_vr: UInt8,
    filled: int,
    raw: UInt8,
    spans: Int64,
    pixels: Int64,
) -> tuple[int, int]:
    """Walk one header up to the pixel data: values of the kept tags, and where the pixels are.

    Returns how it ended, and the bytes of `raw` filled so far. A window of the file slides along,
    so that large private elements are stepped over without being read.
    """
    base = 0
    held = read_at(fd, window, min(size, _WINDOW_BYTES), 0)
    if not _has_prefix(window, held):
        return UNKNOWN, filled
    at, slot, depth, previous = 132, 0, 0, -1
    meta, explicit = True, True
    while at + 8 <= size:
        if at + 12 > base + held:
            base = at
            held = read_at(fd, window, min(size - at, _WINDOW_BYTES), at)
            if held < 8:
                return UNKNOWN, filled
        here = at - base
        tag = _tag(window, here)
        if meta and tag >> 16 != 2:
            meta = False
            syntax = _syntax_of(raw, spans[_SYNTAX_SLOT])
            explicit = syntax == 0
            if syntax == 2:
                return UNKNOWN, filled
        if tag >> 16 == _ITEM_GROUP:
            change, skip = _item_step(tag, _u4(window, here + 4))
            if depth == 0:
                return UNKNOWN, filled
            depth += change
            at += 8 + skip
            continue
        length, head, vr = _element_head(window, here, explicit, long_vr)
        undefined = length == _UNDEFINED_LENGTH
        nests = vr in (0, _SEQUENCE_VR)
        is_pixels = depth == 0 and _FIRST_PIXELS <= tag <= _LAST_PIXELS
        if head < 0 or at + head > size or (undefined and not nests and not is_pixels):
            return UNKNOWN, filled
        if depth == 0:
            if tag <= previous:
                return UNKNOWN, filled
            previous = tag
            if is_pixels:
                pixels[0] = tag
                pixels[1] = at + head
                pixels[2] = -1 if undefined else length
                return PIXELS, filled
            while slot < len(tags) and tags[slot] < tag:
                slot += 1
            if slot < len(tags) and tags[slot] == tag:
                limit = limits[slot]
                if limit == 0:
                    if undefined or length > _EMPTY_ITEM_BYTES:
                        spans[slot, 0] = at + head
                        spans[slot, 1] = -1 if undefined else length
                elif length > abs(limit) or not _is_written_as(vr, kinds[slot], kind_of_vr):
                    if limit > 0:
                        return UNKNOWN, filled
                else:
                    filled = _keep_value(
                        fd, at + head, length, window, base, held, filled, raw, spans[slot]
                    )
                    if filled < 0:
                        return UNKNOWN, 0
        at += head
        if undefined:
            depth += 1
        else:
            at += length
    return (NO_PIXELS if at == size and depth == 0 else UNKNOWN), filled


@kernel
def _walk_files(
    path_bytes: UInt8,
    path_offsets: Int64,
    tags: Int64,
    limits: Int64,
    kinds: UInt8,
    kind_of_vr: UInt8,
    long_vr: UInt8,
    raw: UInt8,
    spans: Int64,
    sizes: Int64,
    status: Int64,
    pixels: Int64,
) -> int:
    """Walk the headers of many files, see _walk; returns the bytes of `raw` that are filled."""
    window = np.zeros(_WINDOW_BYTES + _SLACK, np.uint8)
    filled = int(np.int64(0))  # a literal 0 would compile the walk once more
    for i in range(len(path_offsets)):
        fd = open_read_only(path_bytes, path_offsets[i])
        if fd < 0:
            continue
        sizes[i] = file_size(fd)
        if sizes[i] >= 0:
            status[i], end = _walk(
                fd,
                sizes[i],
                window,
                tags,
                limits,
                kinds,
                kind_of_vr,
                long_vr,
                filled,
                raw,
                spans[i],
                pixels[i],
            )
            if status[i] == UNKNOWN:
                spans[i] = 0
            else:
                filled = end
        close(fd)
    return filled


# --- functional groups (PS3.3 C.7.6.16) -----------------------------------------------------------


@kernel
def _value_end(
    raw: UInt8, start: int, length: int, stop: int, explicit: bool, long_vr: UInt8
) -> int:
    """Where a value ends, or the rest of a sequence of undefined length; -1: not before `stop`."""
    if length != _UNDEFINED_LENGTH:
        return start + length if start + length <= stop else -1
    at, depth = start, 1
    while at + 8 <= stop:
        tag = _tag(raw, at)
        if tag >> 16 == _ITEM_GROUP:
            change, skip = _item_step(tag, _u4(raw, at + 4))
            depth += change
            at += 8 + skip
            if depth == 0:
                return at if at <= stop else -1
            continue
        size, head, vr = _element_head(raw, at, explicit, long_vr)
        if head < 0 or (size == _UNDEFINED_LENGTH and vr not in (0, _SEQUENCE_VR)):
            return -1
        at += head
        if size == _UNDEFINED_LENGTH:
            depth += 1
        else:
            at += size
    return -1


@kernel
def _is_sequence(raw: UInt8, at: int, length: int, vr: int, stop: int) -> bool:
    """Whether the value at `at` is made of items; without a VR the first one shows it."""
    if vr == 0:
        return length >= 8 and at + 8 <= stop and _tag(raw, at) == _ITEM
    return vr == _SEQUENCE_VR


@kernel
def _walk_macro(
    raw: UInt8,
    start: int,
    length: int,
    stop: int,
    explicit: bool,
    long_vr: UInt8,
    tags: Int64,
    limits: Int64,
    kinds: UInt8,
    kind_of_vr: UInt8,
    span: Int64,
    kept: UInt8,
    filled: int,
) -> tuple[int, int]:
    """Keep the values in an item of a macro, e.g. the position in Plane Position Sequence.

    Returns where the item ends (-1: not understood), and the bytes of `kept` filled so far.
    """
    undefined = length == _UNDEFINED_LENGTH
    end = stop if undefined else start + length
    at = start
    while at >= 0 and at + 8 <= end <= stop:
        tag = _tag(raw, at)
        if tag == _ITEM_DELIMITATION and undefined:
            return at + 8, filled
        size, head, vr = _element_head(raw, at, explicit, long_vr)
        if tag >> 16 == _ITEM_GROUP or head < 0:
            return -1, filled
        at += head
        slot = np.searchsorted(tags, tag)
        if (
            slot < len(tags)
            and tags[slot] == tag
            and 0 < size <= limits[slot]
            and at + size <= end
            and _is_written_as(vr, kinds[slot], kind_of_vr)
        ):
            for k in range(size):
                kept[filled + k] = raw[at + k]
            span[slot, 0] = filled
            span[slot, 1] = size
            filled += size
        at = _value_end(raw, at, size, end, explicit, long_vr)
    return (at if at == end and not undefined else -1), filled


@kernel
def _walk_frame(
    raw: UInt8,
    start: int,
    length: int,
    stop: int,
    explicit: bool,
    long_vr: UInt8,
    tags: Int64,
    limits: Int64,
    kinds: UInt8,
    kind_of_vr: UInt8,
    span: Int64,
    kept: UInt8,
    filled: int,
) -> tuple[int, int]:
    """Walk the macros of one frame, of each the first item; as `_walk_macro`."""
    undefined = length == _UNDEFINED_LENGTH
    end = stop if undefined else start + length
    at = start
    while at >= 0 and at + 8 <= end <= stop:
        tag = _tag(raw, at)
        if tag == _ITEM_DELIMITATION and undefined:
            return at + 8, filled
        size, head, vr = _element_head(raw, at, explicit, long_vr)
        if tag >> 16 == _ITEM_GROUP or head < 0:
            return -1, filled
        at += head
        item = at
        is_macro = (tag >> 16) % 2 == 0 and _is_sequence(raw, at, size, vr, end)
        if is_macro and at + 8 <= end and _tag(raw, at) == _ITEM:
            item, filled = _walk_macro(
                raw, at + 8, _u4(raw, at + 4), end, explicit, long_vr,
                tags, limits, kinds, kind_of_vr, span, kept, filled,
            )  # fmt: skip
            if item < 0:
                return -1, filled
        rest = item if size == _UNDEFINED_LENGTH else at
        at = _value_end(raw, rest, size, end, explicit, long_vr)
    return (at if at == end and not undefined else -1), filled


@kernel
def _walk_groups(
    raw: UInt8,
    start: int,
    length: int,
    stop: int,
    explicit: bool,
    long_vr: UInt8,
    tags: Int64,
    limits: Int64,
    kinds: UInt8,
    kind_of_vr: UInt8,
    spans: Int64,
    kept: UInt8,
    filled: int,
) -> tuple[int, int]:
    """Walk a sequence of functional groups, one item per row of `spans` (f, s, 2).

    Returns the number of items (-1: not understood), and the bytes of `kept` filled so far.
    """
    undefined = length == _UNDEFINED_LENGTH
    end = stop if undefined else start + length
    beyond = np.zeros(spans.shape[1:], np.int64)
    at, items = start, 0
    while at + 8 <= end <= stop:
        tag, size = _tag(raw, at), _u4(raw, at + 4)
        if tag == _SEQUENCE_DELIMITATION and undefined:
            return items, filled
        if tag != _ITEM:
            return -1, filled
        span = spans[items] if items < len(spans) else beyond
        at, filled = _walk_frame(
            raw, at + 8, size, end, explicit, long_vr,
            tags, limits, kinds, kind_of_vr, span, kept, filled,
        )  # fmt: skip
        if at < 0:
            return -1, filled
        items += 1
    return (items if at == end and not undefined else -1), filled


def walk_groups(raw: bytes, length: int, explicit: bool, frames: int) -> tuple[int, Values] | None:
    """The values of functional groups in a sequence's bytes; None where it is not understood.

    Parameters
    ----------
    raw
        The sequence's value; more may follow where its length is undefined.
    length
        Of the value in bytes; -1: undefined.
    explicit
        Whether elements have a VR (the order is little-endian).
    frames
        How many items are kept; more are only counted.

    Returns
    -------
    The number of items, and `frames` rows of values.
    """
    # of a bytearray: an array that cannot be written to would compile every kernel once more
    padded = np.frombuffer(bytearray(raw) + bytes(_SLACK), np.uint8)
    kept = np.empty(len(raw), np.uint8)
    spans = np.zeros((frames, len(TAGS), 2), np.int64)
    size = _UNDEFINED_LENGTH if length < 0 else length
    items, filled = _walk_groups(
        padded, 0, size, len(raw), explicit, _LONG_VR,
        TAGS, _GROUP_LIMITS, _KINDS, _KIND_OF_VR, spans, kept, 0,
    )  # fmt: skip
    return None if items < 0 else (items, Values(kept[:filled].copy(), spans))
