"""RTSTRUCT: outlines in patient coordinates, joined with images by the planes that they lie in.

DICOM PS3.3 A.19 and C.8.8.6. The points of a contour are a decimal string of three numbers each;
pydicom finds where they are in the file and a kernel reads them, which a worker then does again
without pydicom, from the contours of its own slices alone. `Annotation.offset` is the place of
ContourData's value in the file; where the data set is deflated (PS3.5 A.5) it is -1 - its place in
the inflated data set.
"""

from __future__ import annotations

import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.geometry import heights_above, to_pixels
from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
    Contours,
    Drawn,
    Float64,
    Int64,
    Problem,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources.base import Found
from parallel_dicomseg.sources.matching import ImageIndex, Match, find_volumes, index_images
from parallel_dicomseg.text import MAX_COORDINATE, digest_bytes, parse_decimals

if TYPE_CHECKING:
    from pydicom import Dataset

name = "rtstruct"

_SOP_CLASS_UID = "1.2.840.10008.5.1.4.1.1.481.3"
_DEFLATED = "1.2.840.10008.1.2.1.99"

#: Larger files, and data sets that inflate to more, are refused: clinical ones have a few MiB.
MAX_FILE_BYTES = 512 * 2**20
#: More items are refused: pydicom takes some 50 microseconds for each, a clinical file has 10,000.
MAX_ITEMS = 2**18

_ITEM = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
_CONTOUR_DATA_LITTLE, _CONTOUR_DATA_BIG = b"\x06\x30\x50\x00", b"\x30\x06\x00\x50"
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

# Both by parity over the rings of a slice (PS3.3 C.8.8.6.3); b"": not said.
_AREAS = (b"CLOSED_PLANAR", b"CLOSEDPLANAR_XOR", b"")
_NO_AREAS = (b"POINT", b"OPEN_PLANAR", b"OPEN_NONPLANAR")

# Points of a contour that take part in choosing its series, evenly spread over it.
_SAMPLES = 8
# Parts of a file closer together than this are read at once.
_READ_GAP = 1 << 16
# The longest head of an element: tag, VR, reserved, length.
_HEAD = 12

_VERBS = {
    Reason.BAD_CONTOUR: "cannot be used",
    Reason.NO_AREA: "enclose no area",
    Reason.CONTOUR_WITHOUT_IMAGE: "lie on no image",
    Reason.AMBIGUOUS_IMAGE: "lie on more than one image",
    Reason.REPEATED: "repeat another one byte for byte and are left out",
}


@dataclass(frozen=True, slots=True)
class _Roi:
    """One region of interest."""

    name: str
    frame_of_reference_uid: bytes
    contours: int
    """How many items its ContourSequence has."""


@dataclass(frozen=True, slots=True)
class _Outline:
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
class _StructureSet:
    """What one file holds."""

    patient_id: bytes
    rois: tuple[_Roi, ...]
    outlines: tuple[_Outline, ...]
    series: Mapping[bytes, frozenset[bytes]]
    """SeriesInstanceUIDs that it refers to, by FrameOfReferenceUID."""
    images: frozenset[bytes]
    """SOPInstanceUIDs that it refers to as a whole."""
    deflated: bool
    problems: tuple[tuple[Reason, str], ...]


@dataclass(frozen=True, slots=True)
class _Rings:
    """Outlines that enclose an area, with their points."""

    index: Int64
    """(r,) which outline of the file."""
    roi: Int64
    """(r,) which ROI of the file."""
    points_patient: Float64
    """(p, 3) mm."""
    starts: Int64
    """(r,) where each ring begins in the points; each has some."""

    @property
    def counts(self) -> Int64:
        """(r,) points of each ring."""
        return np.diff(np.append(self.starts, len(self.points_patient)))

    def take(self, chosen: NDArray[np.bool_]) -> _Rings:
        """The rings that are chosen, (r,) booleans."""
        kept = self.counts[chosen]
        points = self.points_patient[np.repeat(chosen, self.counts)]
        return _Rings(self.index[chosen], self.roi[chosen], points, np.cumsum(kept) - kept)

    def samples(self) -> Float64:
        """(r, k, 3) some points of each ring."""
        steps = self.counts[:, None] * np.arange(_SAMPLES) // _SAMPLES
        return self.points_patient[self.starts[:, None] + steps]

    def extent(self, normal: Float64) -> tuple[Float64, Float64]:
        """(r,) lowest and highest point of each ring along a normal, mm."""
        heights = heights_above(self.points_patient, normal)
        lowest = np.minimum.reduceat(heights, self.starts)
        return lowest, np.maximum.reduceat(heights, self.starts)


@dataclass(frozen=True, slots=True)
class _Laid:
    """Rings of some ROIs on the slices of one series."""

    match: Match
    rois: frozenset[int]
    """ROIs that were looked for there."""
    index: Int64
    """(k,) which outline of the file lies on a slice."""
    row: Int64
    """(k,) row of the SliceTable."""

    def looked_at(self) -> Int64:
        """Rows of the volumes that have a ring, of all where none has."""
        used = [v.rows for v in self.match.volumes if np.isin(self.row, v.rows).any()]
        return np.sort(np.concatenate(used)) if used else self.match.rows


_Fates = dict[int, tuple[Reason, str]]
"""What is wrong with which outline."""


def recognizes(file: ScannedFile) -> bool:
    """Whether a file is an RT Structure Set by its SOP class."""
    return file.sop_class_uid == _SOP_CLASS_UID


def find(
    root: str,
    files: Sequence[ScannedFile],
    images: SliceTable,
    options: ScanOptions,  # noqa: ARG001 names are chosen later, for all sources alike
) -> Found:
    """Lay the contours of structure sets on the images.

    Parameters
    ----------
    root
        The cohort's directory.
    files
        Structure sets.
    images
        Sorted by volume and position, with their `volume` assigned.

    Returns
    -------
    Found
        An Annotation per ROI and series, also where no contour of the ROI lies on an image; a
        Problem for each ROI and kind of defect, with the number of its contours.
    """
    index = index_images(images)
    found = [_find_in_file(root, file, index) for file in files]
    return Found(
        tuple(annotation for one in found for annotation in one.annotations),
        tuple(problem for one in found for problem in one.problems),
    )


def _find_in_file(root: str, file: ScannedFile, index: ImageIndex) -> Found:
    try:
        structure_set = _parse_file(Path(root, file.path))
    except OSError as error:
        detail = f"cannot be read: {error.strerror or type(error).__name__}"
        return Found((), (Problem(file.path, Reason.UNREADABLE_FILE, detail),))
    except _RefusedError as error:
        return Found((), (Problem(file.path, Reason.UNREADABLE_FILE, str(error)),))
    except Exception as error:  # noqa: BLE001 broken files make pydicom raise anything
        detail = f"no structure set can be read from it ({type(error).__name__})"
        return Found((), (Problem(file.path, Reason.UNREADABLE_FILE, detail),))
    return _lay(file.path, structure_set, index)


# ------------------------------------------------------------------------------- from the file


class _RefusedError(Exception):
    """The file is not read, and why."""


def _parse_file(file: Path) -> _StructureSet:
    """All contours of a file, their points as the bytes that they are."""
    raw = _content(file)
    with warnings.catch_warnings():
        # pydicom's warnings print values
        warnings.simplefilter("ignore")
        inflated = _inflated(file, raw)
        dataset = _dataset(raw if inflated is None else inflated, inflated is not None)
        return _structure_set(dataset, inflated is not None)


def _content(file: Path) -> bytes:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise _RefusedError(f"{size} bytes, limit {MAX_FILE_BYTES}")
    raw = file.read_bytes()
    if not raw:
        raise _RefusedError("the file is empty")
    return raw


def _inflated(file: Path, raw: bytes) -> bytes | None:
    """The data set of a file in the deflated transfer syntax; None in any other."""
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_file_meta_info

    try:
        meta = read_file_meta_info(str(file))
    except InvalidDicomError:  # no preamble, so no transfer syntax either
        return None
    if meta.get("TransferSyntaxUID") != _DEFLATED:
        return None
    # 128 bytes, "DICM", and the 12 bytes of the group's length, which counts what follows them
    start = 144 + int(meta.FileMetaInformationGroupLength)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(raw[start:], MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise _RefusedError(f"inflates to more than {MAX_FILE_BYTES} bytes")
    return content


def _dataset(content: bytes, inflated: bool) -> Dataset:
    from pydicom import dcmread
    from pydicom.filereader import read_dataset

    items = max(content.count(item) for item in _ITEM)
    if items > MAX_ITEMS:
        raise _RefusedError(f"{items} sequence items, limit {MAX_ITEMS}")
    if inflated:
        return read_dataset(BytesIO(content), is_implicit_VR=False, is_little_endian=True)
    return dcmread(BytesIO(content), force=True)


def _structure_set(dataset: Dataset, deflated: bool) -> _StructureSet:
    problems: list[tuple[Reason, str]] = []
    names, frames = _rois(dataset, problems)
    place = {number: k for k, number in enumerate(names)}
    items: dict[bytes, list[list[_Outline]]] = defaultdict(list)
    for number, sequence in _contour_sequences(dataset, problems):
        if number in place:
            items[number].append(_outlines(place[number], sequence))
        elif sequence:
            detail = f"{len(sequence)} contour(s) of a ReferencedROINumber that no ROI has alone"
            problems.append((Reason.BAD_CONTOUR, detail))
    outlines = [outline for number in names for part in items[number] for outline in part]
    counts = [sum(len(part) for part in items[number]) for number in names]
    series, images = _references(dataset)
    return _StructureSet(
        patient_id=_bytes(dataset, _PATIENT_ID),
        rois=tuple(
            _Roi(names[number], frames[number] or _bytes(dataset, _FRAME_OF_REFERENCE_UID), count)
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


def _outlines(roi: int, sequence: list[tuple[Dataset, int]]) -> list[_Outline]:
    return [_outline(roi, number, *item) for number, item in enumerate(sequence, start=1)]


def _outline(roi: int, number: int, item: Dataset, base: int) -> _Outline:
    element: Any = item.get_item(_CONTOUR_DATA)
    raw = element.value if element is not None else b""
    points = _bytes(item, _NUMBER_OF_CONTOUR_POINTS)
    return _Outline(
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


# -------------------------------------------------------------------------------------- points


def _points_of(parts: Sequence[bytes]) -> tuple[Float64, Int64, dict[int, str]]:
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
    texts = [part.rstrip(b" \0") for part in parts]
    counts = np.array([text.count(b"\\") + 1 for text in texts], np.int64)
    errors = {
        int(k): f"ContourData has {counts[k]} number(s), not three for each point"
        for k in np.flatnonzero(counts % 3)
    }
    good = [k for k in range(len(texts)) if k not in errors]
    values = _values_of([texts[k] for k in good], int(counts[good].sum()))
    if values is None:
        found = {}
        for k in good:
            try:
                found[k] = _value_of(texts[k], int(counts[k]))
            except ValueError as error:
                errors[k] = f"ContourData: {error}"
        values = np.concatenate([np.empty(0), *found.values()])
    counts[list(errors)] = 0
    return values.reshape(-1, 3), np.concatenate(([0], np.cumsum(counts // 3))), errors


def _values_of(texts: Sequence[bytes], count: int) -> Float64 | None:
    """The numbers of all values at once; None where one of them is not as it should be."""
    try:
        values = parse_decimals(np.frombuffer(bytearray(b"\\").join(texts), np.uint8))
    except ValueError:
        return None
    # Numbers that stand apart by blanks or commas would be too many.
    fine = len(values) == count and (not count or bool(np.abs(values).max() <= MAX_COORDINATE))
    return values if fine else None


def _value_of(text: bytes, count: int) -> Float64:
    """The numbers of one value, or a ValueError that says what is wrong."""
    values = parse_decimals(np.frombuffer(bytearray(text), np.uint8))
    if len(values) != count:
        raise ValueError("numbers stand apart by something else than a backslash")
    if np.abs(values).max() > MAX_COORDINATE:
        raise ValueError(f"a coordinate is beyond any image (limit {MAX_COORDINATE:.0f})")
    return values


def _rings(structure_set: _StructureSet) -> tuple[_Rings, _Fates]:
    """The outlines that enclose an area, and what is wrong with the others."""
    outlines = structure_set.outlines
    fates: _Fates = {}
    seen: set[tuple[int, bytes]] = set()
    for k, outline in enumerate(outlines):
        if fate := _judge(outline, (outline.roi, outline.raw) in seen):
            fates[k] = fate
        seen.add((outline.roi, outline.raw))
    kept = [k for k in range(len(outlines)) if k not in fates]
    points, offsets, errors = _points_of([outlines[k].raw for k in kept])
    counts = np.diff(offsets)
    claimed = np.array([outlines[k].points for k in kept], np.int64)
    for k in np.flatnonzero(claimed > counts).tolist():
        text = f"ContourData has {counts[k]} point(s), NumberOfContourPoints is {claimed[k]}"
        errors.setdefault(k, text)
    fates |= {kept[k]: (Reason.BAD_CONTOUR, text) for k, text in errors.items()}
    rois = np.array([outlines[k].roi for k in kept], np.int64)
    good = np.array([k not in errors for k in range(len(kept))], np.bool_)
    rings = _Rings(np.array(kept, np.int64), rois, points, offsets[:-1])
    rings = rings.take(good & (counts > 0))
    areas = _have_three_points(rings)
    for k in rings.index[~areas].tolist():
        fates[k] = (Reason.NO_AREA, "fewer than 3 different points")
    return rings.take(areas), fates


def _judge(outline: _Outline, repeated: bool) -> tuple[Reason, str] | None:
    """What is wrong with an outline, without a look at its points."""
    kind = outline.geometric_type
    if kind in _NO_AREAS:
        return Reason.NO_AREA, f"ContourGeometricType is {kind.decode()}"
    if kind not in _AREAS:
        return Reason.BAD_CONTOUR, "ContourGeometricType is none of those that DICOM defines"
    if not outline.raw.strip(b" \0"):
        return Reason.BAD_CONTOUR, "ContourData is empty or absent"
    return (Reason.REPEATED, f"contour {outline.number}") if repeated else None


def _have_three_points(rings: _Rings) -> NDArray[np.bool_]:
    """(r,) whether at least three points of each ring are different."""
    points, starts, counts = rings.points_patient, rings.starts, rings.counts
    if not len(starts):
        return np.zeros(0, np.bool_)
    last = len(points) - 1
    other = (points != np.repeat(points[starts], counts, axis=0)).any(axis=1)
    # the place of a second point; the last one of all where a ring has none, for which no third
    # point is looked for
    second = np.minimum.reduceat(np.where(other, np.arange(last + 1), last), starts)
    third = other & (points != np.repeat(points[second], counts, axis=0)).any(axis=1)
    return np.logical_or.reduceat(third, starts)


# ------------------------------------------------------------------------------ onto the images


def _lay(path: str, structure_set: _StructureSet, index: ImageIndex) -> Found:
    """All contours of a file onto the images."""
    rings, fates = _rings(structure_set)
    laid: list[_Laid] = []
    problems = [Problem(path, *problem) for problem in structure_set.problems]
    undecided = 0
    for frame, rois in _by_frame_of_reference(structure_set.rois).items():
        group = rings.take(np.isin(rings.roi, list(rois)))
        try:
            laid += _lay_group(path, structure_set, index, group, frame, rois, fates)
        except _AmbiguousError as error:
            problems.append(Problem(path, Reason.AMBIGUOUS_IMAGE, str(error)))
            undecided += len(group.index)
    if not laid and len(rings.index) > undecided:
        problems.append(_without_images(path, structure_set, index, len(rings.index)))
    elif laid or not len(rings.index):
        problems += _problems(path, structure_set, fates)
    return Found(_annotations(path, structure_set, laid), tuple(problems))


class _AmbiguousError(Exception):
    """Several series fit equally well."""


def _by_frame_of_reference(rois: Sequence[_Roi]) -> dict[bytes, frozenset[int]]:
    """ROIs that were drawn in one frame of reference; one file may use several."""
    groups: dict[bytes, set[int]] = defaultdict(set)
    for k, roi in enumerate(rois):
        groups[roi.frame_of_reference_uid].add(k)
    return {frame: frozenset(group) for frame, group in groups.items()}


def _lay_group(
    path: str,
    structure_set: _StructureSet,
    index: ImageIndex,
    rings: _Rings,
    frame_of_reference_uid: bytes,
    rois: frozenset[int],
    fates: _Fates,
) -> list[_Laid]:
    """The rings of one frame of reference onto one series, or several if they refer to them."""
    laid: list[_Laid] = []
    rest = rings
    while len(rest.index):
        match = _match(path, structure_set, index, rest, frame_of_reference_uid)
        if match is None or (laid and match.found_by != "reference"):
            break
        if match.rivals:
            raise _AmbiguousError(
                f"{match.rivals + 1} series fit its {len(rest.index)} contours equally well "
                f"(found by {match.found_by}); it does not refer to one of them"
            )
        row = _rows(rest, match, structure_set, index)
        laid.append(_Laid(match, rois, rest.index[row >= 0], row[row >= 0]))
        for k in rest.index[row == _SEVERAL].tolist():
            fates[k] = (Reason.AMBIGUOUS_IMAGE, "they share a place, and it refers to none of them")
        rest = rest.take(row == _NONE)
        if not (row >= 0).any():
            break
    fates.update(_off_slices(rest, laid))
    return laid


def _match(
    path: str,
    structure_set: _StructureSet,
    index: ImageIndex,
    rings: _Rings,
    frame_of_reference_uid: bytes,
) -> Match | None:
    """The series that rings were drawn on."""
    images = {structure_set.outlines[k].image for k in rings.index.tolist()}
    there = {image for image in images if image in index.by_sop_instance_uid}
    every = {uid for uids in structure_set.series.values() for uid in uids}
    return find_volumes(
        index,
        rings.samples(),
        path=path,
        patient_id=structure_set.patient_id,
        frame_of_reference_uid=frame_of_reference_uid,
        series_instance_uids=structure_set.series.get(frame_of_reference_uid, every),
        sop_instance_uids=there or structure_set.images,
    )


# Instead of a row: on no slice; on slices of several volumes.
_NONE, _SEVERAL = -1, -2


def _rows(rings: _Rings, match: Match, structure_set: _StructureSet, index: ImageIndex) -> Int64:
    """(r,) row of the SliceTable that each ring lies on with all of its points, or why none.

    Where several volumes have its plane (phases of a cine series), the image that it refers to.
    """
    rows = np.stack([v.slices_between(*rings.extent(v.normal)) for v in match.volumes])
    found: Int64 = rows.max(axis=0)
    for k in np.flatnonzero((rows >= 0).sum(axis=0) > 1).tolist():
        image = structure_set.outlines[rings.index[k]].image
        meant = set(index.by_sop_instance_uid.get(image, ())) & set(rows[:, k].tolist())
        found[k] = meant.pop() if len(meant) == 1 else _SEVERAL
    return found


def _off_slices(rings: _Rings, laid: Sequence[_Laid]) -> _Fates:
    """Why each ring lies on no slice of the series that was found."""
    volumes = [volume for one in laid for volume in one.match.volumes]
    if not volumes or not len(rings.index):
        text = "no series has a slice there"
        return dict.fromkeys(rings.index.tolist(), (Reason.CONTOUR_WITHOUT_IMAGE, text))
    extents = [rings.extent(volume.normal) for volume in volumes]
    spreads = np.stack([highest - lowest for lowest, highest in extents])
    flattest = spreads.argmin(axis=0)
    fates: _Fates = {}
    for k, outline in enumerate(rings.index.tolist()):
        volume, (lowest, highest) = volumes[flattest[k]], extents[flattest[k]]
        distance, tolerance = volume.distances_from((lowest[k : k + 1] + highest[k : k + 1]) / 2)
        spread = highest[k] - lowest[k]
        if spread > 2 * tolerance[0]:
            text = f"spread over {spread:.3g} mm across the slices (limit {2 * tolerance[0]:.3g})"
            fates[outline] = (Reason.BAD_CONTOUR, f"tilted: {text}")
        else:
            text = f"{distance[0]:.3g} mm from the nearest slice (limit {tolerance[0]:.3g})"
            fates[outline] = (Reason.CONTOUR_WITHOUT_IMAGE, text)
    return fates


# ------------------------------------------------------------------------------- what was found


def _annotations(
    path: str, structure_set: _StructureSet, laid: Sequence[_Laid]
) -> tuple[Annotation, ...]:
    """One per ROI and series; without rings only for the first series."""
    outlines = structure_set.outlines
    found = []
    done: set[int] = set()
    for one in laid:
        looked_at = one.looked_at()
        by_roi: dict[int, list[int]] = {roi: [] for roi in sorted(one.rois)}
        for k, outline in enumerate(one.index.tolist()):
            by_roi[outlines[outline].roi].append(k)
        for roi, places in by_roi.items():
            if roi in done and not places:
                continue
            done.add(roi)
            drawn = [outlines[k] for k in one.index[places].tolist()]
            offsets = np.array([outline.offset for outline in drawn], np.int64)
            found.append(
                Annotation(
                    kind=name,
                    path=path,
                    name=structure_set.rois[roi].name,
                    found_by=one.match.found_by,
                    looked_at=looked_at,
                    slice=one.row[places],
                    offset=-1 - offsets if structure_set.deflated else offsets,
                    length=np.array([len(outline.raw) for outline in drawn], np.int64),
                )
            )
    return tuple(found)


def _problems(path: str, structure_set: _StructureSet, fates: _Fates) -> list[Problem]:
    """One line for each ROI and kind of defect, and for each ROI without contours."""
    groups: dict[tuple[int, Reason], list[int]] = defaultdict(list)
    for k in sorted(fates):
        groups[structure_set.outlines[k].roi, fates[k][0]].append(k)
    problems = []
    for (roi, reason), members in sorted(groups.items()):
        one = structure_set.rois[roi]
        first = structure_set.outlines[members[0]].number
        detail = (
            f"{len(members)} of {one.contours} contours of {one.name!r} {_VERBS[reason]}; "
            f"contour {first}: {fates[members[0]][1]}"
        )
        problems.append(Problem(path, reason, detail))
    empty = [repr(roi.name) for roi in structure_set.rois if not roi.contours]
    if empty:
        detail = f"{len(empty)} ROI(s) have no contours: {', '.join(empty)}"
        problems.append(Problem(path, Reason.NO_AREA, detail))
    return problems


def _without_images(
    path: str, structure_set: _StructureSet, index: ImageIndex, rings: int
) -> Problem:
    """That nothing of a file lies on any image, and how far the references help."""
    referred = structure_set.images | {outline.image for outline in structure_set.outlines} - {b""}
    there = sum(uid in index.by_sop_instance_uid for uid in referred)
    detail = (
        f"none of its {rings} contours lies on an image: {there} of the {len(referred)} images "
        "that it refers to are here, and no series of its frame of reference or patient fits"
    )
    return Problem(path, Reason.ANNOTATION_WITHOUT_IMAGES, detail)


# -------------------------------------------------------------------------------- in the worker


def read(
    root: str,
    slices: SliceRefs,
    annotations: AnnotationRefs,
    *,
    contour_origin: float,  # noqa: ARG001 outlines in mm have none
) -> Drawn:
    """Read contours at their places in the files, in pixels of their images.

    Parameters
    ----------
    root
        The cohort's directory.
    slices
        All images of the task.
    annotations
        r contours, sorted by (plane, structure, layer).

    Returns
    -------
    Drawn
        A contour that is not at its place any more, or cannot be parsed, is a problem.
    """
    parts, failed = _fetch(root, annotations)
    points_patient, offsets, errors = _points_of(parts)
    failed = {k: (Reason.BAD_CONTOUR, text) for k, text in errors.items()} | failed
    plane = np.array(annotations.plane, np.int64)
    points = _pixels(points_patient, offsets, plane, slices)
    for k in _far_rings(points, offsets):
        failed[k] = (Reason.BAD_CONTOUR, f"beyond any image (limit {MAX_COORDINATE:.0f} pixels)")
    drawn = Contours(
        points_column_row=points,
        offsets=offsets,
        plane=plane,
        structure=np.array(annotations.structure, np.int32),
        layer=np.array(annotations.layer, np.int32),
    )
    if failed:
        drawn = drawn.take(np.array([k not in failed for k in range(len(drawn))], np.bool_))
    return Drawn(
        contours=drawn,
        bitmaps=(),
        digest=np.array(
            [_digest(part) if k not in failed else 0 for k, part in enumerate(parts)], np.uint64
        ),
        problems=tuple((k, *failed[k]) for k in sorted(failed)),
    )


def _pixels(points_patient: Float64, offsets: Int64, plane: Int64, slices: SliceRefs) -> Float64:
    """(p, 2) the points of rings, ascending by plane, in pixels of their images."""
    points = np.empty((len(points_patient), 2))
    planes, first = np.unique(plane, return_index=True)
    ends = offsets[[*first, len(plane)]].tolist()
    for k, (begin, end) in zip(planes.tolist(), pairwise(ends), strict=True):
        points[begin:end], _ = to_pixels(points_patient[begin:end], slices.plane_geometry[k])
    return points


def _far_rings(points_column_row: Float64, offsets: Int64) -> list[int]:
    """Rings with a point that no image has, or none at all because its plane is none."""
    if np.abs(points_column_row).max(initial=0.0) <= MAX_COORDINATE:
        return []
    # NaN compares false
    far = np.flatnonzero(~(np.abs(points_column_row) <= MAX_COORDINATE).all(axis=1))
    rings: list[int] = np.unique(np.searchsorted(offsets, far, side="right") - 1).tolist()
    return rings


def _digest(raw: bytes) -> int:
    return int(digest_bytes(np.frombuffer(bytearray(raw), np.uint8)))


def _fetch(
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
        except (OSError, zlib.error, _RefusedError) as error:
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
    with file.open("rb") as stream:
        for run in np.split(order, np.flatnonzero(new)[1:]):
            start = int(begins[run[0]])
            stream.seek(start)
            content = stream.read(int(ends[run].max()) - start)
            for k in run.tolist():
                spans[k] = content[begins[k] - start : ends[k] - start]
    return spans


def _read_deflated(file: Path, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """As `_read_spans`, from the inflated data set."""
    content = _inflated(file, _content(file)) or b""
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
