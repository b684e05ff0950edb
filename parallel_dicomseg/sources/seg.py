"""DICOM Segmentation objects (PS3.3 A.51): BINARY, FRACTIONAL and LABELMAP, native or compressed.

A frame belongs to the image that it refers to where that image's plane is the frame's, else to the
image in whose plane it lies; without any geometry (projection images) to the image of its size
that it refers to. A segment that has no frame on a slice is empty there.

In an `Annotation` of this kind `offset` is the frame, from 0. `length` is the smallest stored value
that is in (BINARY: 1), or minus the segment's number where the pixels hold such numbers (LABELMAP).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.geometry import normal_of, to_patient, to_pixels
from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
    Bitmap,
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
from parallel_dicomseg.sources.parsed import Flaw
from parallel_dicomseg.sources.seg_files import (
    Header,
    Values,
    load_header,
    open_frames,
    read_frame,
)
from parallel_dicomseg.text import digest_bytes

name = "seg"

_SOP_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})

# Frames whose normals differ by less (1 - cosine) are parallel.
_PARALLEL = 1e-4
# Pixel positions are rounded to this before the nearest pixel is taken, so that a centre halfway
# between two pixels does not go either way by rounding noise.
_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the frames of a file lie."""

    row: Int64
    """(f,) row of the SliceTable; -1: on no image."""
    targets: tuple[tuple[Int64, str], ...]
    """Rows of each volume that was segmented, and how it was found."""
    rivals: int
    """How many other series fit as well as the one that was chosen."""


def recognizes(file: ScannedFile) -> bool:
    """Whether a file is a Segmentation or Label Map Segmentation object."""
    return file.sop_class_uid in _SOP_CLASSES


def find(
    root: str, files: Sequence[ScannedFile], images: SliceTable, options: ScanOptions
) -> Found:
    """Lay the frames of SEG files on the images; headers are read, pixels are not.

    Each segment is an Annotation per volume; frames that lie on no image are counted in a Problem
    per segment, an unreadable file is a Problem.
    """
    index = index_images(images)
    annotations: list[Annotation] = []
    problems: list[Problem] = []
    for file in filter(recognizes, files):
        header = load_header(root, file.path)
        if not isinstance(header, Header):
            problems.append(Problem(file.path, *header))
            continue
        place = _place_frames(header, file.path, index, images)
        flaw = _without_place(header, place)
        if flaw:
            problems.append(Problem(file.path, *flaw))
            continue
        annotations += _annotations(header, file.path, place, options.fractional_threshold)
        problems += [Problem(file.path, *flaw) for flaw in _off_images(header, place)]
    return Found(tuple(annotations), tuple(problems))


def _without_place(header: Header, place: _Place) -> Flaw | None:
    """Why nothing of a file can be used."""
    if place.rivals:
        detail = f"{place.rivals + 1} series fit equally well; nobody can say which was segmented"
        return Reason.AMBIGUOUS_IMAGE, detail
    if not place.targets:
        detail = f"none of the {header.frames} frames lies on an image"
        return Reason.ANNOTATION_WITHOUT_IMAGES, detail
    return None


def _annotations(
    header: Header, path: str, place: _Place, threshold: float
) -> Iterable[Annotation]:
    """Every segment on every volume that was segmented."""
    for number, label in header.segments:
        of_segment = np.isin(header.segment_number, (0, number))
        for looked_at, found_by in place.targets:
            frames = np.flatnonzero(of_segment & np.isin(place.row, looked_at))
            smallest = _smallest_in(header, number, threshold)
            yield Annotation(
                kind=name,
                path=path,
                name=label,
                found_by=found_by,
                looked_at=looked_at,
                slice=place.row[frames],
                offset=frames,
                length=np.full(len(frames), smallest, np.int64),
            )


def _smallest_in(header: Header, number: int, threshold: float) -> int:
    """The code of which stored values are in, see the module."""
    if header.segmentation_type == "LABELMAP":
        return -number
    if header.segmentation_type == "FRACTIONAL":
        return math.floor(threshold * header.maximum) + 1
    return 1


def _off_images(header: Header, place: _Place) -> Iterable[Flaw]:
    """A line for each segment that has frames on no image, or frames of no segment."""
    numbers = [number for number, _ in header.segments]
    unknown = ~np.isin(header.segment_number, [0, *numbers])
    if unknown.any():
        detail = (
            f"{unknown.sum()} of {header.frames} frames have a (0062,000B) Referenced Segment "
            "Number that no segment has"
        )
        yield Reason.BAD_CONTOUR, detail
    for number, label in header.segments:
        of_segment = np.isin(header.segment_number, (0, number))
        off = int((of_segment & (place.row < 0)).sum())
        if off:
            detail = f"{off} of {of_segment.sum()} frames of segment {label!r} lie on no image"
            yield Reason.CONTOUR_WITHOUT_IMAGE, detail, label


# --- which image a frame lies on -----------------------------------------------------------------


def _place_frames(header: Header, path: str, index: ImageIndex, images: SliceTable) -> _Place:
    """The image of every frame: by geometry where the frame has any, else by reference."""
    referred = [_referred_rows(references, index, images) for references in header.references]
    row = np.full(header.frames, -1, np.int64)
    targets: list[tuple[Int64, str]] = []
    rivals = 0
    for parallel in _parallel_frames(header.planes):
        for match, frames in _matches(header, path, index, parallel):
            row[frames] = _on_slices(match, _centres(header, frames), [referred[f] for f in frames])
            rivals = max(rivals, match.rivals)
            targets += [
                (np.sort(volume.rows), match.found_by)
                for volume in match.volumes
                if np.isin(volume.rows, row[frames]).any()
            ]
    bare = np.flatnonzero(~np.isfinite(header.planes).all(axis=1))
    row[bare] = [_only_of_size(header, referred[frame], images) for frame in bare]
    if (row[bare] >= 0).any():
        targets.append((np.setdiff1d(row[bare], [-1]), "reference"))
    return _Place(row, tuple(targets), rivals)


def _referred_rows(
    references: Iterable[tuple[bytes, int]], index: ImageIndex, images: SliceTable
) -> frozenset[int]:
    """Rows of the images that a frame refers to: of a file all frames, unless it says which."""
    return frozenset(
        row
        for uid, frame in references
        for row in index.by_sop_instance_uid.get(uid, ())
        if not frame or images.frame[row] + 1 == frame
    )


def _parallel_frames(planes: Float64) -> Iterable[Int64]:
    """The frames that have a geometry, in groups of one orientation."""
    remaining = np.flatnonzero(np.isfinite(planes).all(axis=1))
    normals = normal_of(planes[:, 3:9])
    while len(remaining):
        parallel = np.abs(normals[remaining] @ normals[remaining[0]]) > 1 - _PARALLEL
        parallel[0] = True  # also where the orientation is none: its normal is NaN
        yield remaining[parallel]
        remaining = remaining[~parallel]


def _centres(header: Header, frames: Int64) -> Float64:
    """(k, 3) mm: the middle of each frame, where a tilt within the tolerance matters least."""
    middle = np.array([[(header.columns - 1) / 2, (header.rows - 1) / 2]])
    return np.concatenate([to_patient(middle, header.planes[frame]) for frame in frames])


def _matches(
    header: Header, path: str, index: ImageIndex, frames: Int64
) -> Iterator[tuple[Match, Int64]]:
    """The series that parallel frames were drawn on, several if they refer to them."""
    match = _match(header, path, index, frames)
    while match:
        yield match, frames
        off = match.on_slices(_centres(header, frames)) < 0
        if not off.any() or match.rivals:
            return
        frames = frames[off]
        match = _match(header, path, index, frames)
        if match and match.found_by != "reference":
            return


def _match(header: Header, path: str, index: ImageIndex, frames: Int64) -> Match | None:
    """The volumes that these parallel frames were drawn on."""
    return find_volumes(
        index,
        _centres(header, frames),
        path=path,
        patient_id=header.patient_id,
        frame_of_reference_uid=header.frame_of_reference_uid,
        series_instance_uids=header.series_instance_uids,
        sop_instance_uids=header.sop_instance_uids,
        normal=normal_of(header.planes[frames[0], 3:9]),
    )


def _on_slices(match: Match, centres: Float64, referred: Sequence[frozenset[int]]) -> Int64:
    """(k,) the slice in whose plane each frame lies; of several the one that it refers to."""
    row = match.on_slices(centres)
    for volume in match.volumes:
        here = volume.on_slices(centres)
        meant = [int(r) in rows for r, rows in zip(here, referred, strict=True)]
        row = np.where(meant, here, row)
    return row


def _only_of_size(header: Header, referred: frozenset[int], images: SliceTable) -> int:
    """The only image of the frame's own size that it refers to, or -1."""
    size = (header.rows, header.columns)
    fitting = [row for row in referred if (images.rows[row], images.columns[row]) == size]
    return fitting[0] if len(fitting) == 1 else -1


# --- one task: from frames to masks --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Packed:
    """A mask that waits to be asked for: the bits of its bounding box."""

    plane: int
    structure: int
    shape: tuple[int, int]
    box: tuple[int, int, int, int]
    """First row, first column, rows, columns."""
    bits: NDArray[np.uint8]

    @property
    def digest(self) -> np.uint64:
        """Of what is in the mask and where; 0 for an empty one."""
        if not self.bits.size:
            return np.uint64(0)
        where = np.array([*self.shape, *self.box], np.int64).view(np.uint8)
        return np.uint64(digest_bytes(np.concatenate([where, self.bits])))

    def unpack(self) -> Bitmap:
        """The mask."""
        row, column, rows, columns = self.box
        mask = np.zeros(self.shape, np.bool_)
        inside = np.unpackbits(self.bits, count=rows * columns).reshape(rows, columns)
        mask[row : row + rows, column : column + columns] = inside
        return Bitmap(self.plane, self.structure, mask)


def _pack(mask: NDArray[np.bool_], plane: int, structure: int) -> _Packed:
    """Keep a mask in little memory."""
    shape = (mask.shape[0], mask.shape[1])
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return _Packed(plane, structure, shape, (0, 0, 0, 0), np.empty(0, np.uint8))
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    box = (int(rows[0]), int(columns[0]), *inside.shape)
    return _Packed(plane, structure, shape, box, np.packbits(inside))


def read(
    root: str, slices: SliceRefs, annotations: AnnotationRefs, *, contour_origin: float
) -> Drawn:
    """Masks of SEG frames, on the grids of their images; every frame is decoded once.

    `contour_origin` has no meaning here. The digest of an empty frame is 0: it is as good as one
    that is missing. A frame that cannot be read is a problem (UNDECODABLE_PIXELS,
    PIXEL_DATA_SHORT, FILE_CHANGED, IMAGE_SIZE_DIFFERS, …) of each annotation that it holds.
    """
    del contour_origin
    digest = np.zeros(len(annotations), np.uint64)
    packed: list[_Packed] = []
    problems: list[tuple[int, Reason, str]] = []
    by_path: dict[str, list[int]] = defaultdict(list)
    for k, path in enumerate(annotations.path):
        by_path[path].append(k)
    for path, refs in by_path.items():
        for k, result in _read_file(root, path, slices, annotations, refs):
            if isinstance(result, _Packed):
                digest[k] = result.digest
                packed.append(result)
            else:
                problems.append((k, *result))
    filled = [one for one in packed if one.bits.size]
    return Drawn(
        contours=Contours.empty(),
        bitmaps=(one.unpack() for one in filled),
        digest=digest,
        problems=tuple(sorted(problems)),
    )


def _read_file(
    root: str, path: str, slices: SliceRefs, annotations: AnnotationRefs, refs: Sequence[int]
) -> Iterator[tuple[int, _Packed | Flaw]]:
    """What the annotations `refs` of one file draw, and what is wrong with them."""
    header = load_header(root, path)
    if not isinstance(header, Header):
        yield from ((k, header) for k in refs)
        return
    by_frame: dict[int, list[int]] = defaultdict(list)
    for k in refs:
        by_frame[annotations.offset[k]].append(k)
    try:
        with open_frames(root, path, header) as image:
            for frame, of_frame in sorted(by_frame.items()):
                values, flaw = read_frame(header, image, frame)
                if flaw:
                    # what costs one frame's annotations nothing is said once
                    yield from (
                        (k, flaw) for k in (of_frame[:1] if values is not None else of_frame)
                    )
                if values is not None:
                    for k in of_frame:
                        yield from _drawn(header, values, slices, annotations, k)
    except OSError as error:
        detail = error.strerror or type(error).__name__
        yield from ((k, (Reason.UNREADABLE_FILE, detail)) for k in refs)


def _drawn(
    header: Header, values: Values, slices: SliceRefs, annotations: AnnotationRefs, k: int
) -> Iterable[tuple[int, _Packed | Flaw]]:
    """The mask of one annotation on its image, and what does not fit on it."""
    code, frame, plane = annotations.length[k], annotations.offset[k], annotations.plane[k]
    mask: NDArray[np.bool_] = values == -code if code < 0 else values >= code
    shape = (slices.rows[plane], slices.columns[plane])
    grids = (header.planes[frame], np.array(slices.plane_geometry[plane]))
    if not np.isfinite(grids).all():
        if mask.shape == shape:
            yield k, _pack(mask, plane, annotations.structure[k])
        else:
            detail = f"frame {frame + 1} is {_size(mask.shape)}, its image {_size(shape)}"
            yield k, (Reason.IMAGE_SIZE_DIFFERS, f"{detail}, and nothing says where it lies")
        return
    steps = _steps(*grids)
    if not _is_identity(steps, mask.shape, shape):
        off = _count_outside(mask, *grids, shape)
        if off:
            detail = f"{off} of {mask.sum()} pixels of frame {frame + 1} lie outside the image"
            yield k, (Reason.CONTOUR_WITHOUT_IMAGE, f"{detail} of {_size(shape)}")
        mask = np.append(mask, False)[_nearest(steps, mask.shape, shape)]
    yield k, _pack(mask, plane, annotations.structure[k])


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} x {shape[1]} pixels"


# --- from the segment's grid to the image's ------------------------------------------------------

Steps = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def _steps(own_plane: Float64, image_plane: Float64) -> Steps:
    """Where the image's pixels lie in the frame, as (column, row): its first pixel, then the step
    to the next column and to the next row; rounded, so that all frames of a volume agree.
    """
    corner = to_patient([[0, 0], [1, 0], [0, 1]], image_plane)
    points = to_pixels(corner, own_plane)
    first, column_step, row_step = points[0], points[1] - points[0], points[2] - points[0]
    rounded = np.array([first.round(7), column_step.round(10), row_step.round(10)])
    return tuple((float(column), float(row)) for column, row in rounded)  # type: ignore[return-value]


def _is_identity(steps: Steps, own_shape: tuple[int, ...], shape: tuple[int, int]) -> bool:
    """Whether the nearest pixel of each pixel is the one of the same row and column."""
    first, column_step, row_step = np.array(steps)
    columns_rows = np.array([[c, r] for c in (0, shape[1] - 1) for r in (0, shape[0] - 1)])
    there = first + columns_rows @ np.array([column_step, row_step])
    # what is affine is farthest off at a corner
    return own_shape == shape and bool((np.abs(there - columns_rows) < 0.49).all())


@lru_cache(maxsize=4)
def _nearest(steps: Steps, own_shape: tuple[int, int], shape: tuple[int, int]) -> Int64:
    """(rows, columns) of the image: the pixel of the frame, flat, that is nearest to each pixel's
    centre; -1 where that is outside the frame.
    """
    first, column_step, row_step = np.array(steps)
    row, column = np.mgrid[: shape[0], : shape[1]]
    there = first + column[..., None] * column_step + row[..., None] * row_step
    nearest = np.floor(there.round(_DECIMALS) + 0.5).astype(np.int64)
    inside = (nearest >= 0).all(axis=-1) & (nearest < own_shape[::-1]).all(axis=-1)
    flat: Int64 = np.where(inside, nearest[..., 1] * own_shape[1] + nearest[..., 0], -1)
    flat.flags.writeable = False
    return flat


def _count_outside(
    mask: NDArray[np.bool_], own_plane: Float64, image_plane: Float64, shape: tuple[int, int]
) -> int:
    """How many pixels of the mask have their centre outside the image."""
    columns_rows = np.argwhere(mask)[:, ::-1]
    points = to_pixels(to_patient(columns_rows, own_plane), image_plane)
    points = points.round(_DECIMALS)
    inside = (points >= -0.5).all(axis=1) & (points < np.array(shape[::-1]) - 0.5).all(axis=1)
    return int((~inside).sum())
