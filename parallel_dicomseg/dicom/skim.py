"""The few elements of a header that somebody wants, without a look into any other.

pydicom parses every sequence of undefined length that it meets, item by item, at 30 microseconds
each; a kernel steps over them. What is left is small, and counted before pydicom sees it.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from parallel_dicomseg.dicom.walk import (
    _ITEM,
    _ITEM_DELIMITATION,
    _ITEM_GROUP,
    _LONG_VR,
    _SEQUENCE_VR,
    _SLACK,
    _UNDEFINED_LENGTH,
    _element_head,
    _is_sequence,
    _tag,
    _value_end,
)
from parallel_dicomseg.jit import kernel
from parallel_dicomseg.records import Int64, UInt8

_META_GROUP = 2


def skim(
    raw: bytes, start: int, explicit: bool, wanted: Collection[int]
) -> tuple[bytes, int] | None:
    """The wanted elements of a little-endian data set, ascending by tag, as bytes.

    Parameters
    ----------
    raw
        The data set, or as much of it as is needed.
    start
        Where in `raw` it begins; a file meta group there is stepped over.
    explicit
        Whether its elements have a VR.
    wanted
        Tags of the top level; the largest of them ends the search, as do larger ones.

    Returns
    -------
    Their bytes one after another, and where the search ended: at an element beyond the largest tag,
    or at the end. None where the bytes are no such data set.
    """
    tags = np.array(sorted(wanted), np.int64)
    padded = np.frombuffer(bytearray(raw) + bytes(_SLACK), np.uint8)
    spans = np.zeros((len(tags), 2), np.int64)
    end = int(_top_level(padded, start, len(raw), explicit, _LONG_VR, tags, spans))
    if end < 0:
        return None
    return b"".join(raw[first:last] for first, last in spans.tolist()), end


# Deeper ones are as good as refused.
_DEEPEST = 4096


@kernel
def _top_level(
    raw: UInt8,
    start: int,
    stop: int,
    explicit: bool,
    long_vr: UInt8,
    tags: Int64,
    spans: Int64,
) -> int:
    """Where the wanted elements begin and end; -1: not understood."""
    at, meta = start, True
    while at + 8 <= stop:
        tag = _tag(raw, at)
        meta = meta and tag >> 16 == _META_GROUP
        if tag > tags[-1]:
            return at
        if tag >> 16 == _ITEM_GROUP:
            return -1
        length, head, _ = _element_head(raw, at, explicit or meta, long_vr)
        if head < 0:
            return -1
        end = _value_end(raw, at + head, length, stop, explicit or meta, long_vr)
        if end < 0:
            return -1
        slot = np.searchsorted(tags, tag)
        if tags[slot] == tag:
            spans[slot, 0] = at
            spans[slot, 1] = end
        at = end
    return at


def census(raw: bytes, start: int, explicit: bool) -> tuple[int, int]:
    """How much there is to parse in the little-endian data set at `start`.

    Returns
    -------
    Elements and items at any depth (where the bytes make no sense: as many as the rest could be),
    and how many sequences are inside one another.
    """
    padded = np.empty(len(raw) - start + _SLACK, np.uint8)
    padded[:-_SLACK] = np.frombuffer(raw, np.uint8, offset=start) if len(raw) > start else 0
    padded[-_SLACK:] = 0
    elements, depth = _census(padded, len(raw) - start, explicit, _LONG_VR)
    return int(elements), int(depth)


@kernel
def _census(raw: UInt8, stop: int, explicit: bool, long_vr: UInt8) -> tuple[int, int]:
    """See `census`: sequences are entered, all else is stepped over, neither beyond its end.

    So that what merely looks like a sequence hides nothing that comes after it.
    """
    ends = np.full(_DEEPEST + 1, stop)
    delimited = np.zeros(_DEEPEST + 1, np.bool_)
    at, elements, depth, deepest = 0, 0, 0, 0
    while at + 8 <= stop:
        while depth > 0 and (at >= ends[depth] or at + 8 > ends[depth]):
            at = ends[depth]
            depth -= 1
        if at + 8 > stop:
            break
        tag = _tag(raw, at)
        elements += 1
        if tag >> 16 == _ITEM_GROUP:
            if tag not in (_ITEM, _ITEM_DELIMITATION) and delimited[depth]:
                depth -= 1
            at += 8
            continue
        length, head, vr = _element_head(raw, at, explicit, long_vr)
        if head < 0 or depth == _DEEPEST:
            elements += (ends[depth] - at) // 8
            at = ends[depth]
            continue
        at += head
        undefined = length == _UNDEFINED_LENGTH
        end = ends[depth] if undefined else min(at + length, ends[depth])
        if undefined or vr == _SEQUENCE_VR or _is_sequence(raw, at, length, vr, stop):
            depth += 1
            ends[depth], delimited[depth] = end, undefined
            deepest = max(deepest, depth)
        else:
            at = end
    return elements, deepest
