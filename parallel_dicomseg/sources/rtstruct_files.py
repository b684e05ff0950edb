"""The bytes of structure sets: where the points of each contour are, and how they are read.

pydicom reads everything but the points: a decimal string of three numbers each, of which it only
says where in the file it is. The numbers are left to a kernel. A worker finds them again without
pydicom.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel_dicomseg.dicom.decoders import quiet
from parallel_dicomseg.dicom.opened import FrameError, check_census
from parallel_dicomseg.dicom.slow_headers import find_data_set
from parallel_dicomseg.files import open_regular, read_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import AnnotationRefs, Float64, Int64, Reason
from parallel_dicomseg.text import MAX_COORDINATE, parse_decimal_lists, parse_decimals

if TYPE_CHECKING:
    from pydicom import Dataset

# Where nobody counts the elements: as many bytes for each. A contour's points make it far more.
_BYTES_PER_ELEMENT = 16
_CONTOUR_DATA_LITTLE, _CONTOUR_DATA_BIG = b"\x06\x30\x50\x00", b"\x30\x06\x00\x50"
# ReferencedSOPInstanceUID, little endian: explicit VR or a length below 65536, then the UID.
_SOP_INSTANCE = re.compile(rb"\x08\x00\x55\x11(?:UI..|..\0\0)([0-9.]+)", re.DOTALL)
# Tags, because attributes by keyword would make pydicom convert the values.
_REFERENCED_SOP_INSTANCE_UID = 0x00081155
_SERIES_INSTANCE_UID = 0x0020000E
_PATIENT_ID, _FRAME_OF_REFERENCE_UID = 0x00100020, 0x00200052
_REFERENCED_FRAME_OF_REFERENCE_SEQUENCE = 0x30060010
_RT_REFERENCED_STUDY_SEQUENCE, _RT_REFERENCED_SERIES_SEQUENCE = 0x30060012, 0x30060014
_CONTOUR_IMAGE_SEQUENCE = 0x30060016
_STRUCTURE_SET_ROI_SEQUENCE, _ROI_NUMBER, _ROI_NAME = 0x30060020, 0x30060022, 0x30060026
_REFERENCED_FRAME_OF_REFERENCE_UID = 0x30060024
_ROI_CONTOUR_SEQUENCE, _CONTOUR_SEQUENCE = 0x30060039, 0x30060040
_CONTOUR_GEOMETRIC_TYPE, _NUMBER_OF_CONTOUR_POINTS = 0x30060042, 0x30060046
_CONTOUR_DATA, _REFERENCED_ROI_NUMBER = 0x30060050, 0x30060084

# Parts of a file closer together than this are read at once.
_READ_GAP = 1 << 16
# The longest head of an element: tag, VR, reserved, length.
_HEAD = 12


@dataclass(frozen=True, slots=True)
class Roi:
    """One region of interest."""

    name: str
    frame_of_reference_uid: bytes
    contours: int
    """How many items its ContourSequence has."""


@dataclass(frozen=True, slots=True)
class Outline:
    """One item of a ContourSequence, its points not yet parsed."""

    roi: int
    number: int
    """Place in the ContourSequence, from 1."""
    geometric_type: bytes
    points: int
    """NumberOfContourPoints; 0 where absent."""
    image: bytes
    """SOPInstanceUID that it refers to, b'' where it does not."""
    offset: int
    """Of the value of ContourData, in the data that pydicom read."""
    raw: bytes
    """That value."""


@dataclass(frozen=True, slots=True)
class StructureSet:
    """What one file holds."""

    patient_id: bytes
    rois: tuple[Roi, ...]
    outlines: tuple[Outline, ...]
    series: Mapping[bytes, frozenset[bytes]]
    """SeriesInstanceUIDs that it refers to, by FrameOfReferenceUID."""
    images: frozenset[bytes]
    """SOPInstanceUIDs that it refers to as a whole."""
    deflated: bool
    problems: tuple[tuple[Reason, str], ...]


# ------------------------------------------------------------------------------ a whole file


class RefusedError(Exception):
    """The file is not read, and why."""


def read_structure_set(file: Path) -> StructureSet:
    """All contours of a file, their points as the bytes that they are."""
    raw = read_regular(file, limits().structure_set_bytes)
    if not raw:
        raise RefusedError("the file is empty")
    with quiet():
        inflated = _inflated(raw)
        dataset = _dataset(raw if inflated is None else inflated, inflated is not None)
        return _structure_set(dataset, inflated is not None)


def _inflated(raw: bytes) -> bytes | None:
    """The data set of a file in the deflated transfer syntax; None in any other."""
    start, encoding = find_data_set(BytesIO(raw), len(raw))
    if start < 0 or not encoding.is_deflated:
        return None
    most = limits().structure_set_bytes
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw[start:], most + 1)
    if len(content) > most:
        raise RefusedError(f"inflates to more than {most} bytes")
    return content


def _dataset(content: bytes, inflated: bool) -> Dataset:
    from pydicom import dcmread
    from pydicom.filereader import read_dataset

    _check_elements(content, inflated)
    if inflated:
        return read_dataset(BytesIO(content), is_implicit_VR=False, is_little_endian=True)
    return dcmread(BytesIO(content), force=True)


def _check_elements(content: bytes, inflated: bool) -> None:
    """Refuse what takes pydicom long: 10 to 50 microseconds for each element and item."""
    start, encoding = find_data_set(BytesIO(content), len(content)) if not inflated else (0, None)
    try:
        if encoding is None or encoding.little:
            check_census(content, encoding is None or not encoding.implicit, max(start, 0))
        elif len(content) > _BYTES_PER_ELEMENT * limits().header_elements:
            raise RefusedError(f"{len(content)} bytes in big-endian order")
    except FrameError as error:
        raise RefusedError(error.detail) from None


def _structure_set(dataset: Dataset, deflated: bool) -> StructureSet:
    problems: list[tuple[Reason, str]] = []
    names, frames = _rois(dataset, problems)
    place = {number: k for k, number in enumerate(names)}
    items: dict[bytes, list[list[Outline]]] = defaultdict(list)
    for number, sequence in _contour_sequences(dataset, problems):
        if number in place:
            items[number].append(_outlines(place[number], sequence))
        elif sequence:
            detail = f"{len(sequence)} contour(s) of a ReferencedROINumber that no ROI has alone"
            problems.append((Reason.BAD_CONTOUR, detail))
    outlines = [outline for number in names for part in items[number] for outline in part]
    counts = [sum(len(part) for part in items[number]) for number in names]
    series, images = _references(dataset)
    return StructureSet(
        patient_id=_bytes(dataset, _PATIENT_ID),
        rois=tuple(
            Roi(names[number], frames[number] or _bytes(dataset, _FRAME_OF_REFERENCE_UID), count)
            for number, count in zip(names, counts, strict=True)
        ),
        outlines=tuple(outlines),
        series=series,
        images=images,
        deflated=deflated,
        problems=tuple(problems),
    )


def _rois(
    dataset: Dataset, problems: list[tuple[Reason, str]]
) -> tuple[dict[bytes, str], dict[bytes, bytes]]:
    """Name and frame of reference by ROINumber; numbers that several ROIs have are refused."""
    names: dict[bytes, str] = {}
    frames: dict[bytes, bytes] = {}
    twice = set()
    for item, _ in _items(dataset, _STRUCTURE_SET_ROI_SEQUENCE, 0):
        number = _bytes(item, _ROI_NUMBER)
        if number in names:
            twice.add(number)
        text = str(item.get("ROIName") or "").strip(" \0")
        names[number] = text or f"ROI {number.decode('ascii', 'replace')}"
        frames[number] = _bytes(item, _REFERENCED_FRAME_OF_REFERENCE_UID)
    if not names:
        problems.append((Reason.MISSING_TAG, "StructureSetROISequence (3006,0020) lists no ROI"))
    if twice:
        detail = f"{len(twice)} ROINumber(s) stand for more than one ROI, which are left out"
        problems.append((Reason.DUPLICATE, detail))
    return {number: text for number, text in names.items() if number not in twice}, frames


def _contour_sequences(
    dataset: Dataset, problems: list[tuple[Reason, str]]
) -> Iterator[tuple[bytes, list[tuple[Dataset, int]]]]:
    """ReferencedROINumber, and the contours with the place that their offsets count from."""
    for item, base in _items(dataset, _ROI_CONTOUR_SEQUENCE, 0):
        try:
            yield _bytes(item, _REFERENCED_ROI_NUMBER), list(_items(item, _CONTOUR_SEQUENCE, base))
        except Exception as error:  # noqa: BLE001 one broken ROI does not cost the others
            detail = f"a ContourSequence cannot be read ({type(error).__name__})"
            problems.append((Reason.BAD_CONTOUR, detail))


def _outlines(roi: int, sequence: list[tuple[Dataset, int]]) -> list[Outline]:
    return [_outline(roi, number, *item) for number, item in enumerate(sequence, start=1)]


def _outline(roi: int, number: int, item: Dataset, base: int) -> Outline:
    element: Any = item.get_item(_CONTOUR_DATA)
    raw = element.value if element is not None else b""
    points = _bytes(item, _NUMBER_OF_CONTOUR_POINTS)
    return Outline(
        roi=roi,
        number=number,
        geometric_type=_bytes(item, _CONTOUR_GEOMETRIC_TYPE).upper(),
        points=int(points) if points.isdigit() and len(points) < 10 else 0,
        image=_referenced_image(item),
        offset=base + element.value_tell if raw else 0,
        raw=raw if isinstance(raw, bytes) else b"",
    )


def _referenced_image(item: Dataset) -> bytes:
    """The one image that a contour refers to; b'' where it is none, several, or unreadable."""
    raw = getattr(item.get_item(_CONTOUR_IMAGE_SEQUENCE), "value", None)
    # pydicom takes longer for these references than for all the rest of the file
    found = _SOP_INSTANCE.findall(raw) if isinstance(raw, bytes) else []
    if len(found) == 1:
        return bytes(found[0])
    try:
        uids = {
            _bytes(image, _REFERENCED_SOP_INSTANCE_UID)
            for image, _ in _items(item, _CONTOUR_IMAGE_SEQUENCE, 0)
        }
    except Exception:  # noqa: BLE001 the reference is a hint only: planes decide
        return b""
    return uids.pop() if len(uids) == 1 else b""


def _references(dataset: Dataset) -> tuple[dict[bytes, frozenset[bytes]], frozenset[bytes]]:
    """Series by frame of reference, and images, that the file says it was drawn on."""
    series: dict[bytes, set[bytes]] = defaultdict(set)
    images: set[bytes] = set()
    for frame, _ in _items(dataset, _REFERENCED_FRAME_OF_REFERENCE_SEQUENCE, 0):
        uid = _bytes(frame, _FRAME_OF_REFERENCE_UID)
        for study, _ in _items(frame, _RT_REFERENCED_STUDY_SEQUENCE, 0):
            for item, _ in _items(study, _RT_REFERENCED_SERIES_SEQUENCE, 0):
                series[uid].add(_bytes(item, _SERIES_INSTANCE_UID))
                for image, _ in _items(item, _CONTOUR_IMAGE_SEQUENCE, 0):
                    images.add(_bytes(image, _REFERENCED_SOP_INSTANCE_UID))
    return {uid: frozenset(uids) for uid, uids in series.items()}, frozenset(images)


def _items(dataset: Dataset, tag: int, base: int) -> Iterator[tuple[Dataset, int]]:
    """The items of a sequence, and where in the file their elements' offsets count from.

    pydicom parses a sequence of known length from a copy of its value, so offsets inside count
    from its beginning; one of undefined length it reads in place.
    """
    from pydicom.dataelem import RawDataElement
    from pydicom.sequence import Sequence as Items

    element: Any = dataset.get_item(tag)
    if element is None:
        return
    inside = base + element.value_tell if isinstance(element, RawDataElement) else base
    value = dataset[tag].value
    if isinstance(value, Items):
        yield from ((item, inside) for item in value)


def _bytes(dataset: Dataset, tag: int) -> bytes:
    """An element's value as in the file, without padding; b'' where absent."""
    value: Any = getattr(dataset.get_item(tag), "value", None)
    if value is None:
        return b""
    return (value if isinstance(value, bytes) else str(value).encode()).strip(b" \0")


# ------------------------------------------------------------------------------------ points


def parse_points(parts: Sequence[bytes]) -> tuple[Float64, Int64, dict[int, str]]:
    """The points in r values of ContourData.

    Returns
    -------
    (p, 3) float64
        mm, each number bit-equal to Python's float of its text.
    (r + 1,) int64
        Where the points of each value begin; none where it has an error.
    dict
        What is wrong with which value.
    """
    raw = np.frombuffer(bytearray().join(parts), np.uint8)
    ends = np.cumsum([0, *map(len, parts)])
    values, starts, known = parse_decimal_lists(raw, ends)
    found = {k: _decided(parts[k]) for k in np.flatnonzero(~known).tolist()}
    counts = np.diff(starts)
    found |= {k: _not_triples(int(counts[k])) for k in np.flatnonzero(counts % 3).tolist()}
    if found:
        lists = np.split(values, starts[1:-1])
        for k, one in found.items():
            lists[k] = np.empty(0) if isinstance(one, str) else one
        counts = np.array([len(one) for one in lists])
        values = np.concatenate([np.empty(0), *lists])
    errors = {k: f"ContourData: {one}" for k, one in sorted(found.items()) if isinstance(one, str)}
    return values.reshape(-1, 3), np.concatenate(([0], np.cumsum(counts // 3))), errors


def _decided(part: bytes) -> Float64 | str:
    """The numbers of a value that the kernel does not know, or what is wrong with it."""
    text = part.rstrip(b" \0")
    count = text.count(b"\\") + 1
    if count % 3:
        return _not_triples(count)
    try:
        values = parse_decimals(np.frombuffer(bytearray(text), np.uint8))
    except ValueError as error:
        return str(error)
    if len(values) != count:
        return "numbers stand apart by something else than a backslash"
    if np.abs(values).max() > MAX_COORDINATE:
        return f"a coordinate is beyond any image (limit {MAX_COORDINATE:.0f})"
    return values


def _not_triples(count: int) -> str:
    return f"{count} number(s), not three for each point"


# ------------------------------------------------------------------------- single contours


def read_values(
    root: str, annotations: AnnotationRefs
) -> tuple[list[bytes], dict[int, tuple[Reason, str]]]:
    """The values of r contours as bytes, and why some of them (b"" then) cannot be had."""
    parts = [b""] * len(annotations)
    failed: dict[int, tuple[Reason, str]] = {}
    members: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for k, (path, offset) in enumerate(zip(annotations.path, annotations.offset, strict=True)):
        members[path, offset < 0].append(k)
    for (path, deflated), group in members.items():
        offsets = [annotations.offset[k] for k in group]
        lengths = [annotations.length[k] for k in group]
        reader = _read_deflated if deflated else _read_spans
        try:
            spans = reader(Path(root, path), offsets, lengths)
        except Exception as error:  # noqa: BLE001 a file that has changed may raise anything
            text = getattr(error, "strerror", None) or type(error).__name__
            failed |= dict.fromkeys(group, (Reason.UNREADABLE_FILE, f"cannot be read: {text}"))
            continue
        for k, span, length in zip(group, spans, lengths, strict=True):
            if len(span) == _HEAD + length and _is_contour_data(span[:_HEAD], length):
                parts[k] = span[_HEAD:]
            else:
                text = f"no ContourData of {length} bytes is at its place any more"
                failed[k] = (Reason.FILE_CHANGED, text)
    return parts, failed


def _read_spans(file: Path, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Each value with the `_HEAD` bytes before it, in few reads; shorter where the file ends."""
    begins = np.maximum(np.array(offsets) - _HEAD, 0)
    ends = np.array(offsets) + np.array(lengths)
    order = np.argsort(begins, kind="stable")
    reached = np.maximum.accumulate(ends[order])
    new = np.append(True, begins[order][1:] > reached[:-1] + _READ_GAP)
    spans = [b""] * len(offsets)
    with open_regular(file, limits().structure_set_bytes) as stream:
        for run in np.split(order, np.flatnonzero(new)[1:]):
            start = int(begins[run[0]])
            stream.seek(start)
            content = stream.read(int(ends[run].max()) - start)
            for k in run.tolist():
                spans[k] = content[begins[k] - start : ends[k] - start]
    return spans


def _read_deflated(file: Path, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """As `_read_spans`, from the inflated data set."""
    content = _inflated(read_regular(file, limits().structure_set_bytes)) or b""
    begins = [max(-1 - offset - _HEAD, 0) for offset in offsets]
    return [
        content[begin : -1 - offset + length]
        for begin, offset, length in zip(begins, offsets, lengths, strict=True)
    ]


def _is_contour_data(head: bytes, length: int) -> bool:
    """Whether the 12 bytes before a value announce a ContourData of that length.

    Implicit VR, explicit VR, or UN where an explicit DS would be too long (PS3.5 6.2.2), in either
    byte order.
    """
    little, big = length.to_bytes(4, "little"), length.to_bytes(4, "big")
    if head[4:8] in (_CONTOUR_DATA_LITTLE, _CONTOUR_DATA_BIG):
        return head[8:] in (little, b"DS" + little[:2], b"DS" + big[2:])
    return head in (
        _CONTOUR_DATA_LITTLE + b"UN\0\0" + little,
        _CONTOUR_DATA_BIG + b"UN\0\0" + big,
    )
