"""Generated series of images with structure sets, of which every voxel is known.

Any orientation, spacing and distance of slices, and the defects that real files have. Everything
follows from the arguments: pixels, UIDs and points; no clock is read.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydicom import DataElement, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RTStructureSetStorage,
)

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.geometry import normal_of, to_patient
from parallel_dicomseg.records import Float64

IMAGES, STRUCTURE_SET = "images", "rtstruct.dcm"

#: What the contours of a phantom say about the images that they were drawn on.
REFERENCES = ("valid", "absent", "unknown")

Mask = NDArray[np.bool_]
Rings = Sequence[tuple[int, ArrayLike]]
"""Slice, and (p, 2) points as (column, row)."""

_SOP_CLASSES = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}
_CORNER = (-50.0, -40.0, 30.0)
_BACKGROUND, _CONTRAST, _NOISE = 100.0, 150.0, 5.0


@dataclass(frozen=True, slots=True)
class ExtraContour:
    """A contour that is written as it is and adds nothing to the truth."""

    structure: str
    points_patient: ArrayLike
    """(p, 3) mm."""
    geometric_type: str = "CLOSED_PLANAR"


@dataclass(frozen=True, slots=True)
class Phantom:
    """One series and its structure set."""

    directory: str
    image_paths: tuple[str, ...]
    """By slice, relative to the directory."""
    structure_set_path: str
    structures: tuple[str, ...]
    rings: tuple[tuple[tuple[int, Float64], ...], ...]
    """Of each structure: slice, and (p, 2) points as (column, row)."""
    planes: Float64
    """(k, 11) see `geometry`."""
    rows: int
    columns: int

    def truth(self, structure: str) -> Mask:
        """(slices, rows, columns) voxels whose centre is inside an odd number of rings."""
        mask = np.zeros((len(self.planes), self.rows, self.columns), np.bool_)
        for slice_index, points in self.rings[self.structures.index(structure)]:
            mask[slice_index] ^= parity_mask(points, (self.rows, self.columns))
        return mask


def make_rtstruct_series(
    directory: str | Path,
    *,
    shape: tuple[int, int, int] = (10, 64, 64),
    pixel_spacing: tuple[float, float] = (1.0, 1.0),
    slice_distance: float = 3.0,
    image_orientation_patient: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    positions: Sequence[float] | None = None,
    structures: Mapping[str, Rings] | None = None,
    geometric_types: Mapping[str, str] | None = None,
    extra: Sequence[ExtraContour] = (),
    references: str = "valid",
    shuffled: bool = False,
    undefined_lengths: bool = False,
    modality: str = "CT",
    transfer_syntax: str = ExplicitVRLittleEndian,
    decimals: int = 4,
    frame_of_reference: str = "",
    patient_id: str = "PHANTOM",
    seed: int = 0,
) -> Phantom:
    """Write a series and a structure set drawn on it.

    Parameters
    ----------
    directory
        Is made; gets `images/` and `rtstruct.dcm`.
    shape
        Slices, rows and columns.
    pixel_spacing
        mm between rows, then between columns.
    slice_distance
        mm.
    image_orientation_patient
        Direction cosines of a row, then of a column.
    positions
        mm along the normal of each slice, instead of a multiple of `slice_distance`.
    structures
        Rings by name, combined by parity; default: a disc and a ring with a hole.
    geometric_types
        ContourGeometricType by structure, 'CLOSED_PLANAR' for those that are not named.
    extra
        Further contours, out of the volume, tilted, or of another type.
    references
        Whether contours refer to their images ('valid'), to none ('absent') or to images and a
        series that do not exist ('unknown').
    shuffled
        Whether ROIContourSequence runs against StructureSetROISequence.
    undefined_lengths
        Whether sequences and items have no length but delimiters (PS3.5 7.5.2).
    modality
        'CT', 'MR' or 'PT'.
    transfer_syntax
        UID of an uncompressed or the deflated transfer syntax, for all files.
    decimals
        Of the contours' points in mm.
    frame_of_reference
        Makes the structure set's FrameOfReferenceUID another one than the images'.
    patient_id
        Of all files.
    seed
        Of UIDs and noise.

    Raises
    ------
    ConfigurationError
        If `references` or `modality` is none of the above, or positions and slices differ.
    """
    if references not in REFERENCES or modality not in _SOP_CLASSES:
        raise ConfigurationError(f"references {references!r} or modality {modality!r} is unknown")
    slices, rows, columns = shape
    heights = np.arange(slices) * slice_distance if positions is None else np.asarray(positions)
    if len(heights) != slices:
        raise ConfigurationError(f"{len(heights)} positions for {slices} slices")
    chosen = disc_and_ring(shape) if structures is None else structures
    phantom = Phantom(
        directory=str(Path(directory).resolve()),
        image_paths=tuple(f"{IMAGES}/{k:04d}.dcm" for k in range(slices)),
        structure_set_path=STRUCTURE_SET,
        structures=tuple(chosen),
        rings=tuple(
            tuple((k, np.array(points, np.float64)) for k, points in rings)
            for rings in chosen.values()
        ),
        planes=_planes(heights, image_orientation_patient, pixel_spacing),
        rows=rows,
        columns=columns,
    )
    names = _Names(seed, patient_id, modality, transfer_syntax)
    _write_images(phantom, names, slice_distance)
    types = geometric_types or {}
    contours = [
        (name, points, types.get(name, "CLOSED_PLANAR"), k)
        for name, rings in zip(phantom.structures, phantom.rings, strict=True)
        for k, points in ((k, to_patient(points, phantom.planes[k])) for k, points in rings)
    ]
    contours += [
        (one.structure, np.asarray(one.points_patient, np.float64), one.geometric_type, -1)
        for one in extra
    ]
    dataset = _structure_set(phantom, names, references, frame_of_reference)
    _add_contours(dataset, phantom, names, contours, references, decimals)
    if shuffled:
        dataset.ROIContourSequence = Items(reversed(dataset.ROIContourSequence))
    if undefined_lengths:
        _forget_lengths(dataset)
    with warnings.catch_warnings():
        # a contour of more than 64 KiB is written as UN, as it must be (PS3.5 6.2.2)
        warnings.filterwarnings("ignore", message="The value for the data element .3006,0050.")
        dcmwrite(Path(phantom.directory, STRUCTURE_SET), dataset, enforce_file_format=True)
    return phantom


# ------------------------------------------------------------------------------------- shapes


def ellipse(
    column: float, row: float, half_width: float, half_height: float, points: int = 72
) -> Float64:
    """(p, 2) points on an ellipse, as (column, row)."""
    turn = np.linspace(0.0, 2.0 * math.pi, points, endpoint=False)
    across, along = half_width * np.cos(turn), half_height * np.sin(turn)
    return np.stack([column + across, row + along], axis=1)


def rectangle(left: float, top: float, right: float, bottom: float) -> Float64:
    """(4, 2) corners as (column, row)."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def disc_and_ring(shape: tuple[int, int, int]) -> dict[str, list[tuple[int, Float64]]]:
    """Two structures on the inner slices: an ellipse, and one with a hole."""
    slices, rows, columns = shape
    inner = range(min(2, slices // 2), max(slices - 2, slices // 2 + 1))
    disc = ellipse(0.62 * columns + 0.31, 0.5 * rows + 0.17, 0.25 * columns, 0.2 * rows)
    middle = 0.5 * columns + 0.23, 0.5 * rows + 0.41
    outer = ellipse(*middle, 0.4 * columns, 0.4 * rows)
    hole = ellipse(*middle, 0.25 * columns, 0.25 * rows)
    return {
        "disc": [(k, disc) for k in inner],
        "ring": [(k, ring) for k in inner for ring in (outer, hole)],
    }


@dataclass(frozen=True, slots=True)
class Solid:
    """A body whose cross-sections are known, in units of columns, rows and slices."""

    name: str
    sections: Callable[[int], list[Float64]]
    """Rings of a slice, combined by parity."""
    inside: Callable[[Float64, Float64, Float64], Mask]
    """Whether points (column, row, slice) lie in the body."""

    def rings(self, slices: int) -> list[tuple[int, Float64]]:
        """All rings of a series."""
        return [(k, ring) for k in range(slices) for ring in self.sections(k)]

    def voxels(self, shape: tuple[int, int, int]) -> Mask:
        """(slices, rows, columns) voxels whose centre is in the body."""
        slices, rows, columns = (np.arange(size, dtype=np.float64) for size in shape)
        depth, row, column = slices[:, None, None], rows[None, :, None], columns[None, None, :]
        return np.broadcast_to(self.inside(column, row, depth), shape).astype(np.bool_)


def conformance_solids(shape: tuple[int, int, int], points: int = 360) -> tuple[Solid, ...]:
    """Seven bodies for a conformance test of masks: cube, sphere, cylinder, torus, cone, straw and
    pillars. Torus and straw have a hole, drawn as a second ring.

    Round sections are polygons of the circle's area.
    """
    slices, rows, columns = shape
    size = 0.4 * min(slices, rows, columns)
    at = _Middle(0.5 * columns + 0.37, 0.5 * rows + 0.21, 0.5 * slices - 0.5, size, points)
    return (_cube(at), _sphere(at), _cylinder(at), _torus(at), _cone(at), _straw(at), _pillars(at))


@dataclass(frozen=True, slots=True)
class _Middle:
    """Where the solids are and how large: half of a cube's edge."""

    column: float
    row: float
    depth: float
    size: float
    points: int

    def is_tall(self, k: Any) -> Any:
        """Whether a slice is one of those of a body as high as the cube."""
        return np.abs(k - self.depth) <= self.size

    def distance(self, column: Any, row: Any, off: tuple[float, float] = (0.0, 0.0)) -> Any:
        """From an axis across the slices, which may stand off the middle."""
        return np.hypot(column - self.column - off[0], row - self.row - off[1])

    def disc(self, radius: float, off: tuple[float, float] = (0.0, 0.0)) -> list[Float64]:
        """A polygon with the area of a circle; none where it would be smaller than a pixel."""
        if radius <= 0.5:
            return []
        step = 2.0 * math.pi / self.points
        outer = radius * math.sqrt(step / math.sin(step))
        return [ellipse(self.column + off[0], self.row + off[1], outer, outer, self.points)]


def _cube(at: _Middle) -> Solid:
    low, high = (np.array([at.column, at.row]) + sign * at.size for sign in (-1, 1))
    square = rectangle(*low, *high)

    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        across, along = np.abs(column - at.column), np.abs(row - at.row)
        return (across <= at.size) & (along <= at.size) & at.is_tall(k)

    return Solid("cube", lambda k: [square] if at.is_tall(k) else [], inside)


def _sphere(at: _Middle) -> Solid:
    def radius(k: Any) -> Any:
        return np.sqrt(np.maximum(at.size**2 - (k - at.depth) ** 2, 0.0))

    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        return at.distance(column, row) ** 2 + (k - at.depth) ** 2 <= at.size**2

    return Solid("sphere", lambda k: at.disc(float(radius(k))), inside)


def _cylinder(at: _Middle) -> Solid:
    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        return (at.distance(column, row) <= 0.6 * at.size) & at.is_tall(k)

    return Solid("cylinder", lambda k: at.disc(0.6 * at.size) if at.is_tall(k) else [], inside)


def _torus(at: _Middle) -> Solid:
    wide, tube = 0.6 * at.size, 0.3 * at.size

    def sections(k: int) -> list[Float64]:
        half = math.sqrt(max(tube**2 - (k - at.depth) ** 2, 0.0))
        return at.disc(wide + half) + at.disc(wide - half) if half > 0.0 else []

    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        return (at.distance(column, row) - wide) ** 2 + (k - at.depth) ** 2 <= tube**2

    return Solid("torus", sections, inside)


def _cone(at: _Middle) -> Solid:
    def radius(k: Any) -> Any:
        return np.maximum(0.5 * (at.size - (k - at.depth)), 0.0)

    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        return (at.distance(column, row) <= radius(k)) & at.is_tall(k)

    return Solid("cone", lambda k: at.disc(float(radius(k))) if at.is_tall(k) else [], inside)


def _straw(at: _Middle) -> Solid:
    outer, inner = 0.6 * at.size, 0.36 * at.size

    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        distance = at.distance(column, row)
        return (distance <= outer) & (distance > inner) & at.is_tall(k)

    rings = at.disc(outer) + at.disc(inner)
    return Solid("straw", lambda k: rings if at.is_tall(k) else [], inside)


def _pillars(at: _Middle) -> Solid:
    radius, off = 0.3 * at.size, 0.6 * at.size
    places = [(across * off, along * off) for across in (-1, 1) for along in (-1, 1)]

    def inside(column: Float64, row: Float64, k: Float64) -> Any:
        posts = [at.distance(column, row, place) <= radius for place in places]
        return np.logical_or.reduce(posts) & at.is_tall(k)

    rings = [ring for place in places for ring in at.disc(radius, place)]
    return Solid("pillars", lambda k: rings if at.is_tall(k) else [], inside)


def parity_mask(points_column_row: ArrayLike, shape: tuple[int, int]) -> Mask:
    """(rows, columns) pixels whose centre is inside one ring.

    Each edge turns over all pixels right of it, on the rows that it spans; float64 arithmetic.
    """
    points = np.asarray(points_column_row, np.float64).reshape(-1, 2)
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    first, after = np.clip(np.ceil(np.sort([y0, y1], axis=0)), 0, shape[0]).astype(np.int64)
    edge = np.repeat(np.arange(len(points)), after - first)
    row = np.arange(len(edge)) + (first - np.cumsum(after - first) + after - first)[edge]
    crossing = x0[edge] + (row - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.clip(np.ceil(crossing), 0, shape[1]).astype(np.int64)
    turns = np.zeros((shape[0], shape[1] + 1), np.uint8)
    np.add.at(turns, (row, column), 1)
    # overflows keep the parity
    inside: Mask = (np.add.accumulate(turns, axis=1)[:, :-1] & 1).astype(np.bool_)
    return inside


# -------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class _Names:
    """What the files of a phantom have in common."""

    seed: int
    patient_id: str
    modality: str
    transfer_syntax: str

    def uid(self, *purpose: object) -> UID:
        """A UID under 2.25, the arc of UUIDs (PS3.5 B.2)."""
        text = " ".join(map(str, ("parallel_dicomseg phantom", self.seed, *purpose)))
        return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, text).int}")

    def dataset(self, sop_class_uid: str, *purpose: object) -> Dataset:
        """The head of a file."""
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID(self.transfer_syntax)
        dataset.file_meta.ImplementationClassUID = self.uid("implementation")
        dataset.SOPClassUID = sop_class_uid
        dataset.SOPInstanceUID = self.uid(*purpose)
        dataset.PatientName = dataset.PatientID = self.patient_id
        dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = ""
        dataset.StudyInstanceUID = self.uid("study")
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "000000", "1"
        dataset.ReferringPhysicianName = dataset.Manufacturer = ""
        return dataset


def _planes(
    heights: NDArray[Any], orientation: Sequence[float], pixel_spacing: tuple[float, float]
) -> Float64:
    """(k, 11) planes as they are written: cosines to 9 decimals, positions to 6."""
    cosines = np.round(np.array(orientation, np.float64), 9)
    corners = np.round(_CORNER + heights[:, None] * normal_of(cosines), 6)
    return np.array([[*corner, *cosines, *pixel_spacing] for corner in corners])


def _write_images(phantom: Phantom, names: _Names, slice_distance: float) -> None:
    folder = Path(phantom.directory, IMAGES)
    folder.mkdir(parents=True)
    noise = np.random.default_rng(names.seed)
    rings: dict[int, list[Float64]] = {}
    for structure in phantom.rings:
        for k, points in structure:
            rings.setdefault(k, []).append(points)
    for k, plane in enumerate(phantom.planes.tolist()):
        shape = phantom.rows, phantom.columns
        pixels = _BACKGROUND + noise.normal(0.0, _NOISE, shape)
        for points in rings.get(k, ()):
            pixels += _CONTRAST * parity_mask(points, shape)
        dataset = _image(names, k, plane, shape)
        dataset.SliceThickness = f"{slice_distance:g}"
        order = ">" if names.transfer_syntax == "1.2.840.10008.1.2.2" else "<"
        dataset.PixelData = np.rint(pixels).astype(f"{order}i2").tobytes()
        dcmwrite(folder / f"{k:04d}.dcm", dataset, enforce_file_format=True)


def _image(names: _Names, k: int, plane: list[float], shape: tuple[int, int]) -> Dataset:
    dataset = names.dataset(_SOP_CLASSES[names.modality], "image", k)
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = names.modality, 1, k + 1
    dataset.SeriesInstanceUID = names.uid("series")
    dataset.FrameOfReferenceUID = names.uid("frame of reference")
    dataset.ImagePositionPatient = [f"{x:.6f}" for x in plane[:3]]
    dataset.ImageOrientationPatient = [f"{x:.9f}" for x in plane[3:9]]
    dataset.PixelSpacing = [f"{x:.9g}" for x in plane[9:]]
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0"
    return dataset


def _structure_set(
    phantom: Phantom, names: _Names, references: str, frame_of_reference: str
) -> Dataset:
    """Everything but the ROIs."""
    dataset = names.dataset(RTStructureSetStorage, "structure set")
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "RTSTRUCT", 2, 1
    dataset.SeriesInstanceUID = names.uid("series of the structure set")
    frame = names.uid("frame of reference", *filter(None, [frame_of_reference]))
    dataset.FrameOfReferenceUID = frame
    dataset.StructureSetLabel = "PHANTOM"
    dataset.StructureSetDate, dataset.StructureSetTime = "20200101", "000000"
    if references == "absent":
        return dataset
    there = references == "valid"
    series = Dataset()
    series.SeriesInstanceUID = names.uid("series" if there else "no series")
    slices = range(len(phantom.planes))
    series.ContourImageSequence = Items([_reference(names, k if there else -1) for k in slices])
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    study.ReferencedSOPInstanceUID = dataset.StudyInstanceUID
    study.RTReferencedSeriesSequence = Items([series])
    item = Dataset()
    item.FrameOfReferenceUID = frame
    item.RTReferencedStudySequence = Items([study])
    dataset.ReferencedFrameOfReferenceSequence = Items([item])
    return dataset


def _reference(names: _Names, k: int) -> Dataset:
    """A reference to the image of a slice, to none that exists where it is negative."""
    item = Dataset()
    item.ReferencedSOPClassUID = _SOP_CLASSES[names.modality]
    item.ReferencedSOPInstanceUID = names.uid("image", k)
    return item


def _add_contours(
    dataset: Dataset,
    phantom: Phantom,
    names: _Names,
    contours: Sequence[tuple[str, Float64, str, int]],
    references: str,
    decimals: int,
) -> None:
    """The ROIs with their contours: structure, points, type, slice."""
    rois, sequences = [], []
    every = dict.fromkeys([*phantom.structures, *(structure for structure, *_ in contours)])
    for number, structure in enumerate(every, start=1):
        roi = Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = number, structure, "MANUAL"
        roi.ReferencedFrameOfReferenceUID = dataset.FrameOfReferenceUID
        rois.append(roi)
        sequence = Dataset()
        sequence.ReferencedROINumber, sequence.ROIDisplayColor = number, [255, 0, 0]
        sequence.ContourSequence = Items(
            _contour(names, points, kind, k if references == "valid" else -1, references, decimals)
            for name, points, kind, k in contours
            if name == structure
        )
        sequences.append(sequence)
    dataset.StructureSetROISequence = Items(rois)
    dataset.ROIContourSequence = Items(sequences)


def _contour(
    names: _Names, points: Float64, geometric_type: str, k: int, references: str, decimals: int
) -> Dataset:
    item = Dataset()
    if references != "absent":
        item.ContourImageSequence = Items([_reference(names, k)])
    item.ContourGeometricType = geometric_type
    item.NumberOfContourPoints = len(points)
    text = "\\".join([f"{x:.{decimals}f}" for x in points.ravel().tolist()])
    # one string: pydicom would make an object of every number
    item.add(DataElement(0x30060050, "DS", text, already_converted=True))
    return item


def _forget_lengths(dataset: Dataset) -> None:
    """Let all sequences and items be written with delimiters."""
    for element in dataset:
        if element.VR == "SQ":
            element.value.is_undefined_length = element.is_undefined_length = True
            for item in element.value:
                item.is_undefined_length_sequence_item = True
                _forget_lengths(item)
