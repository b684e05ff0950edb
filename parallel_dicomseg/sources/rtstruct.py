"""RTSTRUCT: outlines in patient coordinates, joined with images by the planes that they lie in.

DICOM PS3.3 A.19 and C.8.8.6. The points of a contour are a decimal string of three numbers each;
pydicom finds where they are in the file and a kernel reads them, which a worker then does again
without pydicom, from the contours of its own slices alone. `Annotation.offset` is the place of
ContourData's value in the file; where the data set is deflated (PS3.5 A.5) it is -1 - its place in
the inflated data set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.geometry import heights_above, planes_of, to_pixels
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
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
from parallel_dicomseg.sources.matching import ImageIndex, Match, find_volumes, index_images
from parallel_dicomseg.sources.rtstruct_files import (
    Outline,
    RefusedError,
    Roi,
    StructureSet,
    parse_points,
    read_structure_set,
    read_values,
)
from parallel_dicomseg.text import MAX_COORDINATE, digest_bytes

name = "rtstruct"

_SOP_CLASS_UID = "1.2.840.10008.5.1.4.1.1.481.3"
# Both by parity over the rings of a slice (PS3.3 C.8.8.6.3); b"": not said.
_AREAS = (b"CLOSED_PLANAR", b"CLOSEDPLANAR_XOR", b"")
_NO_AREAS = (b"POINT", b"OPEN_PLANAR", b"OPEN_NONPLANAR")

# Points of a contour that take part in choosing its series, evenly spread over it.
_SAMPLES = 8
_VERBS = {
    Reason.BAD_CONTOUR: "cannot be used",
    Reason.NO_AREA: "enclose no area",
    Reason.CONTOUR_WITHOUT_IMAGE: "lie on no image",
    Reason.AMBIGUOUS_IMAGE: "lie on more than one image",
    Reason.REPEATED: "repeat another one byte for byte and are left out",
}


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
        if chosen.all():
            return self
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

    def looked_at(self, unsettled: Iterable[int]) -> Int64:
        """Rows of the volumes that have a ring, of all where none has, without some rows."""
        used = [v.rows for v in self.match.volumes if np.isin(self.row, v.rows).any()]
        rows = np.concatenate(used) if used else self.match.rows
        return np.setdiff1d(rows, np.array(sorted(unsettled), np.int64))


_Fates = dict[int, tuple[Reason, str]]
"""What is wrong with which outline."""
_Unsettled = dict[int, set[int]]
"""By ROI: rows on which it may be drawn, by an outline that cannot be used."""


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
        Problem for each ROI and kind of defect, with the number of its contours; a mark for each
        contour of type POINT on a slice of the series that the file's outlines lie on.
    """
    index = index_images(images)
    found = [_find_in_file(root, file, index, images) for file in files]
    return Found(
        tuple(annotation for one in found for annotation in one.annotations),
        tuple(problem for one in found for problem in one.problems),
        MarkTable.concatenate([one.marks for one in found]),
    )


def _find_in_file(root: str, file: ScannedFile, index: ImageIndex, images: SliceTable) -> Found:
    try:
        structure_set = read_structure_set(Path(root, file.path))
    except OSError as error:
        detail = f"cannot be read: {error.strerror or type(error).__name__}"
        return Found((), (Problem(file.path, Reason.UNREADABLE_FILE, detail),))
    except RefusedError as error:
        return Found((), (Problem(file.path, Reason.UNREADABLE_FILE, str(error)),))
    except Exception as error:  # noqa: BLE001 broken files make pydicom raise anything
        detail = f"no structure set can be read from it ({type(error).__name__})"
        return Found((), (Problem(file.path, Reason.UNREADABLE_FILE, detail),))
    return _lay(file.path, structure_set, index, images)


# ----------------------------------------------------------------------------- outlines to rings


def _rings(structure_set: StructureSet) -> tuple[_Rings, _Fates]:
    """The outlines that enclose an area, and what is wrong with the others."""
    outlines = structure_set.outlines
    fates: _Fates = {}
    seen: set[tuple[int, bytes]] = set()
    for k, outline in enumerate(outlines):
        if fate := _judge(outline, (outline.roi, outline.raw) in seen):
            fates[k] = fate
        seen.add((outline.roi, outline.raw))
    kept = [k for k in range(len(outlines)) if k not in fates]
    points, offsets, errors = parse_points([outlines[k].raw for k in kept])
    counts = np.diff(offsets)
    claimed = np.array([outlines[k].points for k in kept], np.int64)
    for k in np.flatnonzero(claimed > counts).tolist():
        text = f"ContourData has {counts[k]} point(s), NumberOfContourPoints is {claimed[k]}"
        errors.setdefault(k, text)
    most = limits().contour_points
    for k in np.flatnonzero(counts > most).tolist():
        errors.setdefault(k, f"ContourData has {counts[k]} points, limit {most}")
    fates |= {kept[k]: (Reason.BAD_CONTOUR, text) for k, text in errors.items()}
    rois = np.array([outlines[k].roi for k in kept], np.int64)
    good = np.array([k not in errors for k in range(len(kept))], np.bool_)
    rings = _Rings(np.array(kept, np.int64), rois, points, offsets[:-1])
    rings = rings.take(good & (counts > 0))
    areas = _have_three_points(rings)
    for k in rings.index[~areas].tolist():
        fates[k] = (Reason.NO_AREA, "fewer than 3 different points")
    return rings.take(areas), fates


def _judge(outline: Outline, repeated: bool) -> tuple[Reason, str] | None:
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
    found = rings.counts >= 3
    first, second, third = (rings.points_patient[rings.starts[found] + k] for k in range(3))
    pairs = (first, second), (second, third), (first, third)
    found[found] = np.logical_and.reduce([(one != other).any(axis=1) for one, other in pairs])
    # nearly all rings are settled by their first points; look at all points of the others
    for ring in np.flatnonzero(~found).tolist():
        start = rings.starts[ring]
        points = rings.points_patient[start : start + rings.counts[ring]]
        found[ring] = len(np.unique(points, axis=0)) >= 3
    return found


# ------------------------------------------------------------------------------ onto the images


def _lay(path: str, structure_set: StructureSet, index: ImageIndex, images: SliceTable) -> Found:
    """All contours of a file onto the images."""
    rings, fates = _rings(structure_set)
    laid: list[_Laid] = []
    problems = [Problem(path, *problem) for problem in structure_set.problems]
    unsettled: _Unsettled = defaultdict(set)
    undecided = 0
    for frame, rois in _by_frame_of_reference(structure_set.rois).items():
        group = rings.take(np.isin(rings.roi, list(rois)))
        try:
            laid += _lay_group(path, structure_set, index, group, frame, rois, fates, unsettled)
        except _AmbiguousError as error:
            problems.append(Problem(path, Reason.AMBIGUOUS_IMAGE, str(error)))
            undecided += len(group.index)
    marked = _on_slices(_single_points(structure_set), laid, structure_set, index)
    fates.update(dict.fromkeys(marked, _MARKED))
    for k, (reason, _) in fates.items():
        if reason is Reason.BAD_CONTOUR:
            outline = structure_set.outlines[k]
            unsettled[outline.roi].update(index.by_sop_instance_uid.get(outline.image, ()))
    if not laid and len(rings.index) > undecided:
        problems.append(_without_images(path, structure_set, index, len(rings.index)))
    elif laid or not len(rings.index):
        problems += _problems(path, structure_set, fates)
    return Found(
        _annotations(path, structure_set, laid, unsettled),
        tuple(problems),
        _marks(structure_set, marked, images),
    )


class _AmbiguousError(Exception):
    """Several series fit equally well."""


def _by_frame_of_reference(rois: Sequence[Roi]) -> dict[bytes, frozenset[int]]:
    """ROIs that were drawn in one frame of reference; one file may use several."""
    groups: dict[bytes, set[int]] = defaultdict(set)
    for k, roi in enumerate(rois):
        groups[roi.frame_of_reference_uid].add(k)
    return {frame: frozenset(group) for frame, group in groups.items()}


def _lay_group(
    path: str,
    structure_set: StructureSet,
    index: ImageIndex,
    rings: _Rings,
    frame_of_reference_uid: bytes,
    rois: frozenset[int],
    fates: _Fates,
    unsettled: _Unsettled,
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
        row, candidates = _rows(rest, match, structure_set, index)
        for k in np.flatnonzero(_crowded(rest.roi, row)).tolist():
            text = f"more than {limits().contours_per_slice} contours on its slice"
            fates[int(rest.index[k])] = (Reason.BAD_CONTOUR, text)
            unsettled[int(rest.roi[k])].add(int(row[k]))
            row[k] = _SEVERAL
        laid.append(_Laid(match, rois, rest.index[row >= 0], row[row >= 0]))
        for k in np.flatnonzero(row == _SEVERAL).tolist():
            if int(rest.index[k]) in fates:
                continue
            text = "they share a place, and it refers to none of them"
            fates[int(rest.index[k])] = (Reason.AMBIGUOUS_IMAGE, text)
            unsettled[int(rest.roi[k])].update(candidates[:, k].tolist())
        rest = rest.take(row == _NONE)
        if not (row >= 0).any():
            break
    fates.update(_off_slices(rest, laid))
    return laid


def _match(
    path: str,
    structure_set: StructureSet,
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


def _crowded(roi: Int64, row: Int64) -> NDArray[np.bool_]:
    """(r,) whether too many rings of a ROI lie on one slice."""
    _, place, count = np.unique(
        np.stack([roi, row]), axis=1, return_inverse=True, return_counts=True
    )
    crowded: NDArray[np.bool_] = (count > limits().contours_per_slice)[place.ravel()] & (row >= 0)
    return crowded


# Instead of a row: on no slice; on slices of several volumes.
_NONE, _SEVERAL = -1, -2


def _rows(
    rings: _Rings, match: Match, structure_set: StructureSet, index: ImageIndex
) -> tuple[Int64, Int64]:
    """(r,) row of the SliceTable that each ring lies on with all of its points, or why none; and
    (v, r) the rows in each volume, -1 where it has none.

    Where several volumes have its plane (phases of a cine series), the image that it refers to.
    """
    rows = np.stack([v.slices_between(*rings.extent(v.normal)) for v in match.volumes])
    found: Int64 = rows.max(axis=0)
    for k in np.flatnonzero((rows >= 0).sum(axis=0) > 1).tolist():
        image = structure_set.outlines[rings.index[k]].image
        meant = set(index.by_sop_instance_uid.get(image, ())) & set(rows[:, k].tolist())
        found[k] = meant.pop() if len(meant) == 1 else _SEVERAL
    return found, rows


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


# -------------------------------------------------------------------------------- single points

_MARKED = (Reason.NO_AREA, "ContourGeometricType is POINT, and /marks has it")
_Marked = dict[int, tuple[int, Float64]]
"""By outline: row of the SliceTable, and the point (3,) in mm."""


def _single_points(structure_set: StructureSet) -> _Rings:
    """The contours of type POINT that have one point, each once."""
    outlines = structure_set.outlines
    first: dict[tuple[int, bytes], int] = {}
    for k, outline in enumerate(outlines):
        if outline.geometric_type == b"POINT":
            first.setdefault((outline.roi, outline.raw), k)
    kept = list(first.values())
    points, offsets, _ = parse_points([outlines[k].raw for k in kept])
    rois = np.array([outlines[k].roi for k in kept], np.int64)
    rings = _Rings(np.array(kept, np.int64), rois, points, offsets[:-1])
    return rings.take(np.diff(offsets) == 1)


def _on_slices(
    points: _Rings, laid: Sequence[_Laid], structure_set: StructureSet, index: ImageIndex
) -> _Marked:
    """The points on the slices of the series that the outlines of their ROIs' frame lie on."""
    marked: _Marked = {}
    for one in laid:
        mine = points.take(np.isin(points.roi, list(one.rois)))
        if len(mine.index):
            row, _ = _rows(mine, one.match, structure_set, index)
            for k in np.flatnonzero(row >= 0).tolist():
                place = int(row[k]), mine.points_patient[k]
                marked.setdefault(int(mine.index[k]), place)
    return marked


def _marks(structure_set: StructureSet, marked: _Marked, images: SliceTable) -> MarkTable:
    """Points in pixels of the images that they lie on."""
    if not marked:
        return MarkTable.empty()
    rows = np.array([row for row, _ in marked.values()], np.int64)
    names = [structure_set.rois[structure_set.outlines[k].roi].name for k in marked]
    points = [
        to_pixels(point, plane)
        for (_, point), plane in zip(marked.values(), planes_of(images.take(rows)), strict=True)
    ]
    return MarkTable(
        slice=rows,
        name=np.array([name.encode("utf-8", "backslashreplace") for name in names], np.bytes_),
        points_column_row=np.stack(points),
    )


# ------------------------------------------------------------------------------- what was found


def _annotations(
    path: str, structure_set: StructureSet, laid: Sequence[_Laid], unsettled: _Unsettled
) -> tuple[Annotation, ...]:
    """One per ROI and series; without rings only for the first series."""
    outlines = structure_set.outlines
    found = []
    done: set[int] = set()
    for one in laid:
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
                    looked_at=one.looked_at(unsettled.get(roi, ())),
                    slice=one.row[places],
                    offset=-1 - offsets if structure_set.deflated else offsets,
                    length=np.array([len(outline.raw) for outline in drawn], np.int64),
                )
            )
    return tuple(found)


def _problems(path: str, structure_set: StructureSet, fates: _Fates) -> list[Problem]:
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
        problems.append(Problem(path, reason, detail, structure=one.name))
    empty = [repr(roi.name) for roi in structure_set.rois if not roi.contours]
    if empty:
        detail = f"{len(empty)} ROI(s) have no contours: {', '.join(empty)}"
        problems.append(Problem(path, Reason.NO_AREA, detail))
    return problems


def _without_images(
    path: str, structure_set: StructureSet, index: ImageIndex, rings: int
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
    parts, failed = read_values(root, annotations)
    points_patient, offsets, errors = parse_points(parts)
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
        points[begin:end] = to_pixels(points_patient[begin:end], slices.plane_geometry[k])
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
