"""LIDC-IDRI reader files: XML in which up to four radiologists outlined lung nodules (CT).

A point is a pixel: whole numbers, (0, 0) the first pixel's centre. An outline runs over the first
pixels *outside* the nodule (Armato et al. 2011, Med Phys 38:915), so its pixels, and those between
two points in a row, are never in the mask:

    mask = centres inside by even-odd parity over all outlines of one reader's nodule on the slice,
           and inside one with inclusion TRUE (FALSE is a hole),
           minus the pixels of all these outlines

The masks of one reader's nodules are united. A region of one point is a mark (a nodule below 3 mm)
and has no area, nor has what the file calls a non-nodule: they are kept as points, in no mask.

In an `Annotation` of this kind `offset` is the place of the slice in the file's list of slices, in
the order in which it names them. `length` is the number of the reader, from 1, or minus the number
of readers who must have marked a pixel.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.files import open_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.rasterize import rasterize_contours
from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
    Bitmap,
    Contours,
    Drawn,
    Float64,
    Int64,
    MarkTable,
    Problem,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources.base import Found
from parallel_dicomseg.sources.matching import (
    ImageIndex,
    Match,
    find_volumes,
    index_images,
)
from parallel_dicomseg.sources.parsed import Flaw, ParsedFiles
from parallel_dicomseg.text import digest_bytes

name = "lidc"

_CT = "{http://www.nih.gov}"
_CT_ROOT = f"{_CT}LidcReadMessage"
_X_RAY_ROOT = "{http://www.nih.gov/idri}IdriReadMessage"
_ROOT_NAMES = (b"LidcReadMessage", b"IdriReadMessage")
# The root element stands in the first bytes of a file.
_HEAD_BYTES = 4096
# The longest outline has less than 1,000 pixels: a jump to and fro costs as many as it is long.
_MAX_OUTLINE = 2**20
# A point's coordinate is the sixth element from the root.
_MAX_DEPTH = 32
# What the bytes of a tag are counted in: other encodings may write it otherwise.
_ENCODING = re.compile(
    rb"""^[^>]*\bencoding\s*=\s*["'](?!(?:utf-8|us-ascii|iso-8859-1)["'])""", re.IGNORECASE
)
_MAX_COORDINATE = 65535
_AXIAL = np.array([0.0, 0.0, 1.0])

_OTHER_XML: Flaw = (Reason.STRAY_FILE, "XML, but no reading of LIDC")
Plane = tuple[bytes, float]
"""SOP Instance UID and z (mm; NaN where the file does not say) of an image, as the file has it."""


@dataclass(frozen=True, slots=True)
class Region:
    """One outline: what one reader drew of one nodule on one slice."""

    reader: int
    """From 1, in the order of the file."""
    nodule: int
    """From 0, in the order of the reader's session."""
    plane: int
    """Which of the file's planes."""
    included: bool
    """Whether its inside is nodule; a hole is not."""
    points_column_row: Int64
    """(p, 2) pixels, at least two; not closed, and none twice in a row."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One point: a nodule below 3 mm, or what a reader did not take for a nodule."""

    reader: int
    """From 1, in the order of the file."""
    is_nodule: bool
    plane: Plane
    point_column_row: tuple[int, int]

    @property
    def name(self) -> str:
        """What and whose it is: 'nodule-reader-1', 'non-nodule-reader-2'."""
        return f"{'' if self.is_nodule else 'non-'}nodule-reader-{self.reader}"


@dataclass(frozen=True, slots=True)
class Counts:
    """What was met in a file."""

    outlines: int = 0
    holes: int = 0
    """Of the outlines."""
    unclosed: int = 0
    """Outlines that do not end where they begin; they are closed here."""
    repeated_points: int = 0
    jumps: int = 0
    """Steps of an outline over more than one pixel; they are filled in here."""
    marks: int = 0
    """Regions of one point."""
    non_nodules: int = 0
    unusable: int = 0
    """Regions without points, or with something else than numbers."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))


@dataclass(frozen=True, slots=True)
class Reading:
    """One file of the CT readers."""

    study_instance_uid: bytes
    series_instance_uid: bytes
    readers: int
    """Reading sessions."""
    planes: tuple[Plane, ...]
    regions: tuple[Region, ...]
    marks: tuple[Mark, ...]
    counts: Counts


def recognizes(file: ScannedFile) -> bool:
    """Whether a file may be LIDC XML, by its name."""
    return not file.sop_class_uid and file.path.lower().endswith(".xml")


def find(
    root: str, files: Sequence[ScannedFile], images: SliceTable, options: ScanOptions
) -> Found:
    """Lay the outlines of LIDC files on the images.

    Structures are 'nodule-reader-1' … (`options.readers` 'each') or 'nodule' ('consensus'). Images
    are those of the file's series, else those of its study, else those beside it, at the z that it
    says; where an image of the UID that it says is elsewhere, the outline is refused. Marks are
    'nodule-reader-1' … and 'non-nodule-reader-1' … in either case.
    """
    index = index_images(images)
    annotations: list[Annotation] = []
    problems: list[Problem] = []
    marks: list[MarkTable] = []
    for file in filter(recognizes, files):
        reading = _load(root, file.path)
        if not isinstance(reading, Reading):
            problems.append(Problem(file.path, *reading))
            continue
        problems += [Problem(file.path, *flaw) for flaw in _oddities(reading.counts)]
        match = _match(reading, file.path, index, images)
        flaw = _without_place(reading, match)
        if match is None or flaw:
            problems += [Problem(file.path, *flaw)] if flaw else []
            continue
        place = _place_planes(reading, match, index, images)
        placed, flaws = _place_marks(reading.marks, match, index, images)
        marks.append(placed)
        problems += [Problem(file.path, *flaw) for flaw in (*place.flaws, *flaws)]
        annotations += _annotations(reading, file.path, match, place, options)
    return Found(tuple(annotations), tuple(problems), MarkTable.concatenate(marks))


def _without_place(reading: Reading, match: Match | None) -> Flaw | None:
    """Why nothing of a file can be used."""
    if match is None:
        detail = f"none of its {len(reading.planes)} slices is an image that is there"
        return Reason.ANNOTATION_WITHOUT_IMAGES, detail
    if match.rivals:
        detail = f"{match.rivals + 1} series fit equally well; nobody can say which was read"
        return Reason.AMBIGUOUS_IMAGE, detail
    return None


def _oddities(counts: Counts) -> Iterator[Flaw]:
    """What is worth a line though it costs nothing, and what cannot be used."""
    odd = {
        "marks": counts.marks,
        "non-nodules": counts.non_nodules,
        "open outlines, closed here": counts.unclosed,
        "points twice in a row": counts.repeated_points,
        "jumps over more than a pixel, filled in here": counts.jumps,
    }
    if any(odd.values()):
        parts = "; ".join(f"{number} {what}" for what, number in odd.items() if number)
        kept = "; /marks has the single points" if counts.marks or counts.non_nodules else ""
        yield Reason.NO_AREA, f"{parts}; {counts.outlines} outlines are used{kept}"
    if counts.unusable:
        detail = f"{counts.unusable} regions without whole coordinates up to {_MAX_COORDINATE}"
        yield Reason.BAD_CONTOUR, f"{detail}, without inclusion, or longer than any outline"


def _annotations(
    reading: Reading, path: str, match: Match, place: _Place, options: ScanOptions
) -> Iterator[Annotation]:
    """Every structure on every volume that was read; all of the series where nothing was found."""
    read_ones = [v for v in match.volumes if np.isin(v.rows, place.row).any()] or match.volumes
    for label, code, planes in _structures(reading, options):
        for volume in read_ones:
            here = planes[np.isin(place.row[planes], volume.rows)]
            yield Annotation(
                kind=name,
                path=path,
                name=label,
                found_by=match.found_by,
                looked_at=np.setdiff1d(volume.rows, place.disputed),
                slice=place.row[here],
                offset=here,
                length=np.full(len(here), code, np.int64),
            )


def _structures(reading: Reading, options: ScanOptions) -> Iterator[tuple[str, int, Int64]]:
    """Name, code (see the module) and planes, ascending, of each structure of a file."""
    if options.readers == "consensus":
        # not more than the product says: 0.3 of 10 readers are 3, whatever the rounding
        needed = max(math.ceil(options.agreement * reading.readers - 1e-9), 1)
        yield "nodule", -needed, _planes(reading.regions)
        return
    for reader in range(1, reading.readers + 1):
        drawn = [region for region in reading.regions if region.reader == reader]
        yield f"nodule-reader-{reader}", reader, _planes(drawn)


def _planes(regions: Iterable[Region]) -> Int64:
    return np.array(sorted({region.plane for region in regions}), np.int64)


# --- which image an outline lies on --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the planes of a file lie."""

    row: Int64
    """(k,) row of the SliceTable; -1: on no image, or on two."""
    disputed: Int64
    """Rows of the images of which nobody can say whether an outline is theirs."""
    flaws: tuple[Flaw, ...]


def _match(reading: Reading, path: str, index: ImageIndex, images: SliceTable) -> Match | None:
    """The volumes of the series that was read."""
    own = index.by_series.get(reading.series_instance_uid, [])
    if not reading.planes:
        # nobody found anything, which is worth to know of a series that the file names
        return Match(tuple(index.volumes[k] for k in own), "reference", 0) if own else None
    referred = np.array([_referred(plane, index) for plane in reading.planes], np.int64)
    match = find_volumes(
        index,
        _points(reading.planes, referred, images),
        path=path,
        patient_id=b"",
        frame_of_reference_uid=b"",
        series_instance_uids=(
            {reading.series_instance_uid} if own else _series_of_study(reading, images)
        ),
        sop_instance_uids=[uid for uid, _ in reading.planes],
        # z alone says where an axial slice is, and no other
        normal=None if (referred >= 0).any() else _AXIAL,
    )
    if match and match.found_by == "reference" and not own and (referred < 0).all():
        return replace(match, found_by="geometry")
    return match


def _series_of_study(reading: Reading, images: SliceTable) -> set[bytes]:
    uid = reading.study_instance_uid
    return (
        set(images.series_instance_uid[images.study_instance_uid == uid].tolist()) if uid else set()
    )


def _referred(plane: Plane, index: ImageIndex) -> int:
    """Row of the image of this UID, where it has a position; -1: there is none."""
    rows = index.by_sop_instance_uid.get(plane[0], [])
    return next((row for row in rows if row in index.volume_of_row), -1)


def _points(planes: Sequence[Plane], referred: Int64, images: SliceTable) -> Float64:
    """(k, 3) mm: a point of each plane, which is the first pixel of the image that it refers to,
    moved to the z that the file says; NaN where it does not say any.
    """
    known = referred >= 0
    points = np.where(known[:, None], images.image_position_patient[referred], 0.0)
    z = np.array([z for _, z in planes], np.float64)
    points[:, 2] = np.where(known & np.isnan(z), points[:, 2], z)
    return points


def _place_planes(reading: Reading, match: Match, index: ImageIndex, images: SliceTable) -> _Place:
    """The image of each plane: the one that it refers to, which must be at the z that it says."""
    referred, row = _rows(reading.planes, match, index, images)
    drawn = np.isin(np.arange(len(row)), _planes(reading.regions))
    elsewhere = drawn & (referred >= 0) & (row != referred)
    off = drawn & ~elsewhere & (row < 0)
    flaws: list[Flaw] = []
    if elsewhere.any():
        first = int(np.flatnonzero(elsewhere)[0])
        z = images.image_position_patient[referred[first], 2]
        detail = f"{elsewhere.sum()} slices whose imageSOP_UID and imageZposition disagree: one is"
        detail += f" at z = {z:g}, the file says {reading.planes[first][1]:g}"
        flaws.append((Reason.AMBIGUOUS_IMAGE, detail))
    if off.any():
        detail = f"{off.sum()} of the {drawn.sum()} slices with an outline are no image"
        flaws.append((Reason.CONTOUR_WITHOUT_IMAGE, detail))
    disputed = np.concatenate([row[elsewhere], referred[elsewhere]])
    return _Place(np.where(elsewhere, -1, row), disputed, tuple(flaws))


def _place_marks(
    marks: Sequence[Mark], match: Match, index: ImageIndex, images: SliceTable
) -> tuple[MarkTable, list[Flaw]]:
    """The marks on their images, and how many have none."""
    if not marks:
        return MarkTable.empty(), []
    referred, row = _rows([mark.plane for mark in marks], match, index, images)
    placed = (row >= 0) & ((referred < 0) | (row == referred))
    table = MarkTable(
        slice=row,
        name=np.array([mark.name.encode() for mark in marks], np.bytes_),
        points_column_row=np.array([mark.point_column_row for mark in marks], np.float64),
    )
    lost = int(np.count_nonzero(~placed))
    detail = f"{lost} of the {len(marks)} marks lie on no image, or not on the one that they name"
    return table.take(placed), [(Reason.CONTOUR_WITHOUT_IMAGE, detail)] if lost else []


def _rows(
    planes: Sequence[Plane], match: Match, index: ImageIndex, images: SliceTable
) -> tuple[Int64, Int64]:
    """(k,) row of the image that each plane refers to, and of the one that it lies on; -1: none."""
    referred = np.array([_referred(plane, index) for plane in planes], np.int64)
    points = _points(planes, referred, images)
    row = match.on_slices(points)
    for volume in match.volumes:
        # of several images in one plane the one that is meant
        row = np.where((referred >= 0) & (volume.on_slices(points) == referred), referred, row)
    return referred, row


# --- one task: from outlines to masks ------------------------------------------------------------


def read(
    root: str, slices: SliceRefs, annotations: AnnotationRefs, *, contour_origin: float
) -> Drawn:
    """Masks of the readers' outlines, on the grids of their images, made when they are asked for.

    `contour_origin` has no meaning here: LIDC counts whole pixels from 0. An annotation whose file
    cannot be read any more is a problem.
    """
    del contour_origin
    digest = np.zeros(len(annotations), np.uint64)
    problems: list[tuple[int, Reason, str]] = []
    drawn: list[tuple[int, tuple[Region, ...]]] = []
    for k, path in enumerate(annotations.path):
        reading = _load(root, path)
        if not isinstance(reading, Reading):
            problems.append((k, *reading))
            continue
        regions = _regions_of(reading, annotations.offset[k], annotations.length[k])
        if regions:
            digest[k] = _digest(regions)
            drawn.append((k, regions))
        else:
            problems.append((k, Reason.FILE_CHANGED, "the outlines found in it are gone"))
    return Drawn(
        contours=Contours.empty(),
        bitmaps=(_bitmap(k, regions, slices, annotations) for k, regions in drawn),
        digest=digest,
        problems=tuple(problems),
    )


def _regions_of(reading: Reading, plane: int, code: int) -> tuple[Region, ...]:
    """The regions that an annotation stands for: one reader's, or everybody's."""
    return tuple(
        region
        for region in reading.regions
        if region.plane == plane and code in (region.reader, -abs(code))
    )


def _digest(regions: Sequence[Region]) -> np.uint64:
    numbers = [np.array([region.reader, region.nodule, region.included]) for region in regions]
    points = [region.points_column_row.ravel() for region in regions]
    return np.uint64(digest_bytes(np.concatenate([*numbers, *points]).view(np.uint8)))


def _bitmap(
    k: int, regions: Sequence[Region], slices: SliceRefs, annotations: AnnotationRefs
) -> Bitmap:
    plane, code = annotations.plane[k], annotations.length[k]
    shape = (slices.rows[plane], slices.columns[plane])
    return Bitmap(plane, annotations.structure[k], draw_nodules(regions, shape, max(-code, 1)))


def draw_nodules(
    regions: Sequence[Region], shape: tuple[int, int], needed: int = 1
) -> NDArray[np.bool_]:
    """The mask of some readers' nodules on one slice.

    Parameters
    ----------
    regions
        All on one slice.
    shape
        Rows and columns of the image; what lies outside it is cut off.
    needed
        How many readers must have a pixel in one of their nodules.

    Returns
    -------
    (rows, columns)
    """
    nodules: dict[tuple[int, int], list[Region]] = defaultdict(list)
    for region in regions:
        nodules[region.reader, region.nodule].append(region)
    readers: dict[int, NDArray[np.bool_]] = {}
    for (reader, _), own in nodules.items():
        mask = _draw_nodule(own, shape)
        readers[reader] = readers.get(reader, mask) | mask
    votes = np.zeros(shape, np.int64)
    for mask in readers.values():
        votes += mask
    agreed: NDArray[np.bool_] = votes >= needed
    return agreed


def _draw_nodule(regions: Sequence[Region], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """One reader's nodule, as the module says."""
    mask = _fill(regions, shape) & _included(regions, shape)
    for region in regions:
        column, row = outline_pixels(region.points_column_row).T
        inside = (row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1])
        mask[row[inside], column[inside]] = False
    return mask


def _included(regions: Sequence[Region], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Inside any outline with inclusion TRUE: a hole without a nodule round it is nothing."""
    included = np.zeros(shape, np.bool_)
    for region in regions:
        if region.included:
            included |= _fill([region], shape)
    return included


def _fill(regions: Sequence[Region], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Inside by even-odd parity over all outlines."""
    points = np.concatenate([region.points_column_row for region in regions])
    offsets = np.cumsum([0, *(len(region.points_column_row) for region in regions)])
    return rasterize_contours(points, offsets, shape).astype(np.bool_)


def outline_pixels(points_column_row: Int64) -> Int64:
    """(q, 2) all pixels of a closed outline (p, 2): its points and, between two that do not touch,
    those nearest to the straight line (Bresenham 1965, IBM Syst J 4:25; of two equally near ones
    the one further right or down).
    """
    ends = np.roll(points_column_row, -1, axis=0)
    lines = [_line(start, end) for start, end in zip(points_column_row, ends, strict=True)]
    return np.concatenate(lines)


def _line(start: Int64, end: Int64) -> Int64:
    """(q, 2) pixels from one pixel up to and without another; all of them touch."""
    step = end - start
    count = max(int(np.abs(step).max()), 1)
    # in whole numbers: half a step more, then rounded down
    offsets: Int64 = (2 * np.arange(count)[:, None] * step + count) // (2 * count)
    return start + offsets


# --- the file ------------------------------------------------------------------------------------


def _parse(file: Path, size: int) -> Reading | Flaw:
    with open_regular(file, limits().file_bytes) as stream:
        head = stream.read(_HEAD_BYTES)
        if not any(root in head for root in _ROOT_NAMES):
            return _OTHER_XML
        if size > limits().xml_bytes:
            return Reason.UNREADABLE_FILE, f"{size} bytes, limit {limits().xml_bytes}"
        stream.seek(0)
        raw = stream.read(limits().xml_bytes)
    root = _flaw_of(raw) or _root_element(raw)
    if isinstance(root, tuple):
        return root
    if root.tag == _X_RAY_ROOT:
        return Reason.NO_AREA, "a reading of a chest x-ray: it has points, no outlines"
    return parse_reading(root) if root.tag == _CT_ROOT else _OTHER_XML


_load = ParsedFiles(_parse, most=32).load


def _flaw_of(raw: bytes) -> Flaw | None:
    """Why XML is not parsed: every tag has its '<', every attribute its '='."""
    if _ENCODING.match(raw):
        return Reason.UNREADABLE_FILE, "XML in another encoding than UTF-8 is not read"
    most = limits().xml_elements
    for sign, what in ((b"<", "tags"), (b"=", "attributes")):
        count = raw.count(sign)
        if count > most:
            return Reason.UNREADABLE_FILE, f"XML of {count} {what}, limit {most}"
    return None


def _root_element(raw: bytes) -> Any | Flaw:
    """The root of an XML file without a document type, and so without entities."""
    from defusedxml import ElementTree
    from defusedxml.common import DefusedXmlException

    try:
        parser = ElementTree.XMLParser(target=_shallow_builder()(), forbid_dtd=True)
        parser.feed(raw)
        return parser.close()
    except DefusedXmlException:
        return Reason.UNREADABLE_FILE, "XML that declares types or entities is not read"
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        return Reason.UNREADABLE_FILE, f"not well-formed XML ({type(error).__name__})"


@cache
def _shallow_builder() -> Any:
    """A TreeBuilder that refuses elements too deep inside one another."""
    from xml.etree.ElementTree import TreeBuilder

    class Shallow(TreeBuilder):
        def __init__(self) -> None:
            super().__init__()
            self.depth = 0

        def start(self, tag: str, attributes: Any) -> Any:
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise ValueError
            return super().start(tag, attributes)

        def end(self, tag: str) -> Any:
            self.depth -= 1
            return super().end(tag)

    return Shallow


def parse_reading(root: Any) -> Reading:
    """What the XML element LidcReadMessage says."""
    planes: dict[Plane, int] = {}
    regions: list[Region] = []
    marks: list[Mark] = []
    counts = Counts()
    sessions = root.findall(f"{_CT}readingSession")
    for reader, session in enumerate(sessions, 1):
        for element in session.findall(f"{_CT}nonNodule"):
            points = _coordinates(element, "locus")
            usable = points is not None and len(points) > 0
            counts += Counts(non_nodules=1, unusable=int(not usable))
            marks += _marks(reader, False, element, points)
        for nodule, element in enumerate(session.findall(f"{_CT}unblindedReadNodule")):
            for roi in element.findall(f"{_CT}roi"):
                points, met = _points_of(roi)
                counts += met
                if not met.unusable:
                    plane = planes.setdefault(_plane(roi), len(planes))
                if met.marks:
                    marks += _marks(reader, True, roi, points)
                elif points is not None:
                    regions.append(Region(reader, nodule, plane, not met.holes, points))
    header = f"{_CT}ResponseHeader/{_CT}"
    return Reading(
        study_instance_uid=_text(root, f"{header}StudyInstanceUID").encode(),
        series_instance_uid=_text(root, f"{header}SeriesInstanceUid").encode(),
        readers=len(sessions),
        planes=tuple(planes),
        regions=tuple(regions),
        marks=tuple(marks),
        counts=counts,
    )


def _marks(reader: int, is_nodule: bool, element: Any, points: Int64 | None) -> Iterator[Mark]:
    """The points of one element, each as a mark."""
    for column, row in [] if points is None else points.tolist():
        yield Mark(reader, is_nodule, _plane(element), (column, row))


def _text(element: Any, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _plane(roi: Any) -> Plane:
    """Which slice a region lies on."""
    try:
        z = float(_text(roi, f"{_CT}imageZposition"))
    except ValueError:
        z = math.nan
    # one NaN object, so that equal planes are equal
    return _text(roi, f"{_CT}imageSOP_UID").encode(), z if math.isfinite(z) else math.nan


def _points_of(roi: Any) -> tuple[Int64 | None, Counts]:
    """The points of an outline, or the only one of a mark, and what was met; None: neither."""
    inclusion = _text(roi, f"{_CT}inclusion").upper()
    points = _coordinates(roi, "edgeMap")
    if points is None or not len(points) or inclusion not in ("TRUE", "FALSE"):
        return None, Counts(unusable=1)
    steps = np.abs(np.diff(points, axis=0)).max(axis=1)
    repeated = int((steps == 0).sum())
    if repeated == len(steps):
        return points[:1], Counts(marks=1, repeated_points=repeated)
    length = int(steps.sum())
    if length > _MAX_OUTLINE:
        return None, Counts(unusable=1)
    is_open = bool((points[0] != points[-1]).any())
    counts = Counts(
        outlines=1,
        holes=int(inclusion == "FALSE"),
        unclosed=int(is_open),
        repeated_points=repeated,
        jumps=int((steps > 1).sum()),
    )
    kept = points[np.append(True, steps > 0)]
    return (kept if is_open else kept[:-1]), counts


def _coordinates(element: Any, tag: str) -> Int64 | None:
    """(p, 2) column and row of every point; None where one is no whole number in range."""
    try:
        numbers = [
            int(_text(point, f"{_CT}{axis}"))
            for point in element.findall(f"{_CT}{tag}")
            for axis in ("xCoord", "yCoord")
        ]
    except ValueError:
        return None
    if any(abs(number) > _MAX_COORDINATE for number in numbers):
        return None
    return np.array(numbers, np.int64).reshape(-1, 2)
