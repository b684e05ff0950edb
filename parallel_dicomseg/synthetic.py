"""Small cohorts with known truth: short-axis heart phantoms as DICOM files with text contours.

The left ventricle of every image is an ellipse (the blood pool, structure i) in a wider one (the
epicardium, o), so that the true outline and area are known exactly. Everything follows from the
seed: names, UIDs, pixels and contours; no clock is read.
"""

from __future__ import annotations

import csv
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Float64

LAYOUTS = ("arterys", "sunnybrook")

_GROUPS = ("HF-I", "HF-NI", "HYP", "N")
_SLICE_DISTANCE = 10.0
# An oblique short axis: direction cosines of a row and of a column, orthonormal to the digits
# that are written.
_ROW_DIRECTION = (0.8, 0.48, 0.36)
_COLUMN_DIRECTION = (0.0, 0.6, -0.8)

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SyntheticOutline:
    """One contour file and what is true about it."""

    path: str
    """Relative to the cohort's directory."""
    image_path: str
    """The image that it was drawn on."""
    patient_id: str
    structure: str
    number: int
    """InstanceNumber of the image."""
    polygon_column_row: Float64
    """(n, 2) pixels, bit for bit as in the file."""
    area: float
    """Area of the true ellipse in pixels, and of the polygon but for the rounding of its points."""


@dataclass(frozen=True, slots=True)
class SyntheticPatient:
    """One patient and what is true about all of its images."""

    patient_id: str
    """As a scan of the cohort names it."""
    image_folder: str
    """Relative to the cohort's directory."""
    contour_folder: str
    pixel_spacing: float
    """mm between rows and between columns."""
    images: int


@dataclass(frozen=True, slots=True)
class SyntheticTruth:
    """What is in a synthetic cohort."""

    root: str
    rows: int
    columns: int
    patients: tuple[SyntheticPatient, ...]
    outlines: tuple[SyntheticOutline, ...]
    """By patient, number and structure."""


@dataclass(frozen=True, slots=True)
class _Ellipse:
    """Centre, half axes and rotation, pixels and radians."""

    column: float
    row: float
    half_width: float
    half_height: float
    angle: float

    @property
    def area(self) -> float:
        return math.pi * self.half_width * self.half_height

    def grown(self, margin: float) -> _Ellipse:
        """The ellipse with both half axes longer by `margin` pixels."""
        return _Ellipse(
            self.column,
            self.row,
            self.half_width + margin,
            self.half_height + margin,
            self.angle,
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Names and places of one patient's files."""

    truth: SyntheticPatient
    original_id: str
    image_name: str
    """Format of an image's file name, with `number`."""
    contour_name: str
    """Format of a contour's path below its folder, with `number` and `structure`."""


def make_sunnybrook_cohort(
    directory: str | Path,
    *,
    patients: int = 4,
    slices: int = 12,
    rows: int = 128,
    columns: int = 128,
    phases: int = 1,
    papillary: bool = False,
    seed: int = 0,
    layout: str = "arterys",
) -> SyntheticTruth:
    """Write a small Sunnybrook cohort of which everything is known.

    i lies on every slice and o on every other one, at end diastole (the first phase) and, where
    there are three phases or more, i also at end systole; other phases have no contours.

    Parameters
    ----------
    directory : str or Path
        Is made; must be empty if it is there.
    patients, slices, phases : int
        Each patient has `slices * phases` images; InstanceNumber counts phases fastest, from 1.
    rows, columns : int
        Size of the images, at least 16.
    papillary : bool
        Also write outlines p1 and p2 of the papillary muscles, where o is.
    seed : int
        The same seed gives the same bytes.
    layout : str
        'arterys' (link.csv, dicoms/, contourfiles/) or 'sunnybrook' (the original tree).

    Returns
    -------
    SyntheticTruth

    Raises
    ------
    ConfigurationError
        If the directory is not empty, the layout unknown, or a number too small.
    """
    root = Path(directory)
    _check(root, layout, patients, slices, phases, rows, columns)
    root.mkdir(parents=True, exist_ok=True)
    found = []
    outlines: list[SyntheticOutline] = []
    for index in range(patients):
        phantom = _phantom(seed, index, slices, phases, rows, columns, papillary)
        names = _names(layout, index, phantom)
        _write_images(root, names, phantom)
        outlines += _write_contours(root, names, phantom)
        found.append(names)
    if layout == "arterys":
        _write_links(root, [(names.truth.patient_id, names.original_id) for names in found])
    return SyntheticTruth(
        root=str(root.resolve()),
        rows=rows,
        columns=columns,
        patients=tuple(names.truth for names in found),
        outlines=tuple(outlines),
    )


def replicate_cohort(source_root: str | Path, directory: str | Path, slices: int) -> None:
    """Copy the annotated slices of a cohort under new patients until there are enough.

    Parameters
    ----------
    source_root : str or Path
        A cohort in the Arterys layout.
    directory : str or Path
        Is made; gets `link.csv`, `dicoms/` and `contourfiles/` with at least `slices` images.

    Raises
    ------
    ConfigurationError
        If the directory is not empty, or the source has no annotated image.
    """
    root = Path(directory)
    _check_empty(root)
    cohort = scan_cohort(source_root)
    images = [path.decode() for path in cohort.slices.path.tolist()]
    if not images:
        raise ConfigurationError(f"{source_root}: no annotated image to copy")
    contours = [path.decode() for path in cohort.annotations.path.tolist()]
    copies = range(1, math.ceil(slices / len(images)) + 1)
    for path in (*images, *contours):
        content = (Path(cohort.root) / path).read_bytes()
        for copy in copies:
            target = root / _copied(path, copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    links = {
        (images[row].split("/")[1], contour.split("/")[1])
        for row, contour in zip(cohort.annotations.slice.tolist(), contours, strict=True)
    }
    _write_links(
        root,
        [
            (f"{patient_id}-{copy:04d}", f"{original_id}-{copy:04d}")
            for copy in copies
            for patient_id, original_id in sorted(links)
        ],
    )


def _copied(path: str, copy: int) -> str:
    """The place of a copy: the patient's folder, second in the path, gets a number."""
    top, patient, rest = path.split("/", 2)
    return f"{top}/{patient}-{copy:04d}/{rest}"


def _check(root: Path, layout: str, *numbers: int) -> None:
    """Refuse what cannot be made."""
    if layout not in LAYOUTS:
        raise ConfigurationError(f"layout {layout!r} is unknown; there are: {', '.join(LAYOUTS)}")
    for what, number, least in zip(
        ("patients", "slices", "phases", "rows", "columns"), numbers, (1, 1, 1, 16, 16), strict=True
    ):
        if number < least:
            raise ConfigurationError(f"{what}={number}: at least {least} is needed")
    _check_empty(root)


def _check_empty(root: Path) -> None:
    if root.exists() and any(root.iterdir()):
        raise ConfigurationError(f"{root}: the directory is not empty")


# ------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True, slots=True)
class _Frame:
    """One image of a phantom."""

    number: int
    slice_index: int
    phase: int
    pool: _Ellipse
    wall: float
    """Thickness of the myocardium, pixels."""
    structures: tuple[str, ...]
    """Those that have a contour."""

    def ellipse(self, structure: str) -> _Ellipse:
        """The true shape of a structure."""
        if structure == "i":
            return self.pool
        if structure == "o":
            return self.pool.grown(self.wall)
        return _papillary(self.pool, 1.0 if structure == "p1" else 2.4)


@dataclass(frozen=True, slots=True)
class _Phantom:
    """One patient: the frames and what all images share."""

    key: tuple[int, int]
    """Seed and index, from which all else follows."""
    rows: int
    columns: int
    pixel_spacing: float
    frames: tuple[_Frame, ...]


def _phantom(
    seed: int, index: int, slices: int, phases: int, rows: int, columns: int, papillary: bool
) -> _Phantom:
    """Draw a patient's heart: tapering from base to apex, contracting over the phases."""
    rng = np.random.default_rng([seed, index])
    size = min(rows, columns)
    centre = (0.5 + rng.uniform(-0.03, 0.03, 2)) * (columns, rows)
    radius = size * rng.uniform(0.115, 0.145)
    wall = size * rng.uniform(0.045, 0.06)
    angle = rng.uniform(0.0, math.pi)
    drift = rng.uniform(-0.03, 0.03, 2) * size
    frames = []
    for slice_index in range(slices):
        depth = slice_index / max(1, slices - 1)
        taper = math.sqrt(1.0 - 0.8 * depth**2)
        column, row = centre + depth * drift
        for phase in range(phases):
            squeeze = 0.5 - 0.5 * math.cos(2.0 * math.pi * phase / phases)
            mean_radius = radius * taper * (1.0 - 0.3 * squeeze)
            pool = _Ellipse(column, row, 1.06 * mean_radius, mean_radius / 1.06, angle)
            frames.append(
                _Frame(
                    number=1 + slice_index * phases + phase,
                    slice_index=slice_index,
                    phase=phase,
                    pool=pool,
                    wall=wall * (1.0 + 0.4 * squeeze),
                    structures=_contoured(slice_index, phase, phases, papillary),
                )
            )
    spacing = round((300.0 + 12.5 * (index % 8) + 5.0 * rng.random()) / size, 6)
    return _Phantom((seed, index), rows, columns, spacing, tuple(frames))


def _contoured(slice_index: int, phase: int, phases: int, papillary: bool) -> tuple[str, ...]:
    """Which structures somebody outlined on an image."""
    if phase == 0 and slice_index % 2 == 0:
        return ("i", "o", "p1", "p2") if papillary else ("i", "o")
    if phase == 0 or (phases >= 3 and phase == phases // 2):
        return ("i",)
    return ()


def _papillary(pool: _Ellipse, direction: float) -> _Ellipse:
    """A papillary muscle inside the blood pool."""
    return _Ellipse(
        pool.column + 0.55 * pool.half_width * math.cos(direction),
        pool.row + 0.55 * pool.half_height * math.sin(direction),
        0.17 * pool.half_width,
        0.13 * pool.half_height,
        direction,
    )


def _polygon(ellipse: _Ellipse) -> Float64:
    """Points about a pixel apart, as they read from text with two decimals.

    They lie outside the ellipse by the hair that gives the polygon the ellipse's area.
    """
    count = max(24, math.ceil(math.pi * (ellipse.half_width + ellipse.half_height)))
    hair = math.sqrt(2.0 * math.pi / (count * math.sin(2.0 * math.pi / count)))
    turn = np.linspace(0.0, 2.0 * math.pi, count, endpoint=False)
    across = hair * ellipse.half_width * np.cos(turn)
    along = hair * ellipse.half_height * np.sin(turn)
    cos, sin = math.cos(ellipse.angle), math.sin(ellipse.angle)
    points = np.stack(
        [
            ellipse.column + cos * across - sin * along,
            ellipse.row + sin * across + cos * along,
        ],
        axis=1,
    )
    return np.array([[float(f"{x:.2f}"), float(f"{y:.2f}")] for x, y in points.tolist()])


# -------------------------------------------------------------------------------------- pixels


def _images(phantom: _Phantom) -> Iterator[NDArray[np.int16]]:
    """The stored pixels of each frame: signal of the tissues, coil shading, noise."""
    rng = np.random.default_rng([*phantom.key, 1])
    torso, shading = _torso(phantom, rng)
    for frame in phantom.frames:
        pool = _inside(phantom, frame.ellipse("i"))
        heart = _inside(phantom, frame.ellipse("o"))
        right = _right_ventricle(frame)
        image = torso + (170.0 - torso) * _inside(phantom, right.grown(0.25 * frame.wall))
        image += (620.0 - image) * _inside(phantom, right)
        image += (150.0 - image) * heart
        image += (700.0 - image) * pool
        for structure in ("p1", "p2"):
            image += (220.0 - image) * _inside(phantom, frame.ellipse(structure))
        image *= shading
        noise = rng.standard_normal((2, *image.shape), dtype=np.float32)
        # The magnitude of a complex signal, as a scanner stores it: never below zero.
        magnitude = np.hypot(image + 14.0 * noise[0], 14.0 * noise[1])
        yield np.rint(magnitude).astype(np.int16)


def _torso(phantom: _Phantom, rng: np.random.Generator) -> tuple[Image, Image]:
    """Everything but the heart, and the sensitivity of the receive coil; rows x columns."""
    rows, columns = phantom.rows, phantom.columns
    skin = _Ellipse(0.5 * columns, 0.5 * rows, 0.47 * columns, 0.42 * rows, 0.0)
    chest = _inside(phantom, skin.grown(-0.035 * min(rows, columns)))
    breath = 1.0 + rng.uniform(-0.12, 0.12)
    left = _Ellipse(0.77 * columns, 0.5 * rows, 0.14 * columns, breath * 0.25 * rows, 0.2)
    right = _Ellipse(0.22 * columns, 0.45 * rows, 0.13 * columns, breath * 0.23 * rows, -0.2)
    liver = _Ellipse(0.30 * columns, 0.80 * rows, 0.24 * columns, 0.13 * rows, 0.3)
    spine = _Ellipse(0.52 * columns, 0.8 * rows, 0.06 * columns, 0.055 * rows, 0.0)
    image = 520.0 * _inside(phantom, skin)
    image += (230.0 + 60.0 * _smooth_field(phantom, rng) - image) * chest
    for tissue, signal in ((liver, 310.0), (left, 45.0), (right, 45.0), (spine, 360.0)):
        image += (signal - image) * _inside(phantom, tissue) * chest
    return image, 1.0 + 0.18 * _smooth_field(phantom, rng)


def _right_ventricle(frame: _Frame) -> _Ellipse:
    """An ellipse behind the left ventricle, which leaves a crescent of it to be seen."""
    epicardium = frame.ellipse("o")
    reach = 0.5 * (epicardium.half_width + epicardium.half_height)
    return _Ellipse(
        epicardium.column - 0.75 * reach,
        epicardium.row + 0.15 * reach,
        1.05 * reach,
        0.85 * reach,
        0.2,
    )


def _inside(phantom: _Phantom, ellipse: _Ellipse) -> Image:
    """How much of each pixel lies in the ellipse: 1, 0, or between within a pixel of its edge."""
    across = np.arange(phantom.columns, dtype=np.float32)[None, :] - np.float32(ellipse.column)
    along = np.arange(phantom.rows, dtype=np.float32)[:, None] - np.float32(ellipse.row)
    cos, sin = np.float32(math.cos(ellipse.angle)), np.float32(math.sin(ellipse.angle))
    width, height = np.float32(ellipse.half_width), np.float32(ellipse.half_height)
    distance = np.hypot((cos * across + sin * along) / width, (cos * along - sin * across) / height)
    mean_radius = np.float32(math.sqrt(ellipse.half_width * ellipse.half_height))
    coverage: Image = np.clip(np.float32(0.5) + (1.0 - distance) * mean_radius, 0.0, 1.0)
    return coverage


def _smooth_field(phantom: _Phantom, rng: np.random.Generator) -> Image:
    """A random field of a few low frequencies, about -1 to 1."""
    waves = 5
    weights = rng.standard_normal((waves, waves)) / (1.0 + np.add.outer(range(waves), range(waves)))
    down, across = (
        np.cos(np.pi * np.outer((np.arange(size) + 0.5) / size, range(waves)))
        for size in (phantom.rows, phantom.columns)
    )
    field = down @ weights @ across.T
    return (field / max(1e-9, float(np.abs(field).max()))).astype(np.float32)


# --------------------------------------------------------------------------------------- files


def _names(layout: str, index: int, phantom: _Phantom) -> _Plan:
    """Names as in the real cohorts."""
    group, place = _GROUPS[index % len(_GROUPS)], index // len(_GROUPS) + 1
    if layout == "arterys":
        original_id = f"SC-{group}-{place}"
        patient_id = f"SCD{index + 1:05d}01"
        image_folder, contour_folder = f"dicoms/{patient_id}", f"contourfiles/{original_id}"
        image_name = "{number}.dcm"
        contour_name = "{structure}-contours/IM-0001-{number:04d}-{structure}contour-manual.txt"
    else:
        original_id = patient_id = f"SC-{group}-{place:02d}"
        image_folder = f"challenge_training/SC-{group}-{place}"
        contour_folder = f"SCD_ManualContours/{original_id}"
        image_name = "IM-0003-{number:04d}.dcm"
        contour_name = (
            "contours-manual/IRCCI-expert/IM-0001-{number:04d}-{structure}contour-manual.txt"
        )
    truth = SyntheticPatient(
        patient_id=patient_id,
        image_folder=image_folder,
        contour_folder=contour_folder,
        pixel_spacing=phantom.pixel_spacing,
        images=len(phantom.frames),
    )
    return _Plan(truth, original_id, image_name, contour_name)


def _write_images(root: Path, names: _Plan, phantom: _Phantom) -> None:
    """The DICOM files of one patient."""
    folder = root / names.truth.image_folder
    folder.mkdir(parents=True)
    dataset = _common_header(names, phantom)
    for frame, pixels in zip(phantom.frames, _images(phantom), strict=True):
        sop_instance_uid = _uid(phantom, "instance", frame.number)
        dataset.file_meta.MediaStorageSOPInstanceUID = sop_instance_uid
        dataset.SOPInstanceUID = sop_instance_uid
        dataset.InstanceNumber = frame.number
        dataset.ImagePositionPatient = _position(phantom, frame.slice_index)
        dataset.SliceLocation = f"{_SLICE_DISTANCE * frame.slice_index:.4f}"
        dataset.SmallestImagePixelValue = int(pixels.min())
        dataset.LargestImagePixelValue = int(pixels.max())
        dataset.PixelData = pixels.astype("<i2").tobytes()
        file = folder / names.image_name.format(number=frame.number)
        dcmwrite(file, dataset, enforce_file_format=True)


def _common_header(names: _Plan, phantom: _Phantom) -> Dataset:
    """What all images of a patient share."""
    dataset = Dataset()
    dataset.file_meta = _file_meta()
    dataset.SOPClassUID = MRImageStorage
    dataset.Modality = "MR"
    dataset.PatientName = names.original_id
    dataset.PatientID = names.truth.patient_id
    dataset.StudyInstanceUID = _uid(phantom, "study")
    dataset.SeriesInstanceUID = _uid(phantom, "series")
    dataset.FrameOfReferenceUID = _uid(phantom, "frame of reference")
    dataset.SeriesNumber = 3
    dataset.SliceThickness = f"{_SLICE_DISTANCE:g}"
    dataset.SpacingBetweenSlices = f"{_SLICE_DISTANCE:g}"
    dataset.ImageOrientationPatient = [f"{x:g}" for x in (*_ROW_DIRECTION, *_COLUMN_DIRECTION)]
    dataset.PixelSpacing = [f"{phantom.pixel_spacing:.6f}"] * 2
    dataset.Rows = phantom.rows
    dataset.Columns = phantom.columns
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    return dataset


def _file_meta() -> FileMetaDataset:
    """The same for all files but for the SOP instance."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\0\1"
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid_of("implementation")
    meta.ImplementationVersionName = "PHANTOM"
    return meta


def _position(phantom: _Phantom, slice_index: int) -> list[str]:
    """ImagePositionPatient, at most 16 characters each."""
    normal = np.cross(_ROW_DIRECTION, _COLUMN_DIRECTION)
    corner = np.array([-120.0, -150.0, 90.0]) + 5.0 * phantom.key[1]
    return [f"{x:.4f}" for x in (corner + _SLICE_DISTANCE * slice_index * normal).tolist()]


def _uid(phantom: _Phantom, *parts: object) -> UID:
    """A UID that follows from seed, patient and purpose."""
    return _uid_of(" ".join(map(str, (*phantom.key, *parts))))


def _uid_of(purpose: str) -> UID:
    """A UID under 2.25, the arc of UUIDs (DICOM PS3.5 B.2)."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'parallel_dicomseg {purpose}').int}")


def _write_contours(root: Path, names: _Plan, phantom: _Phantom) -> Iterator[SyntheticOutline]:
    """The contour files of one patient, and what is true about each."""
    for frame in phantom.frames:
        for structure in frame.structures:
            ellipse = frame.ellipse(structure)
            polygon = _polygon(ellipse)
            below = names.contour_name.format(number=frame.number, structure=structure)
            path = f"{names.truth.contour_folder}/{below}"
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{column:.2f} {row:.2f}\n" for column, row in polygon.tolist())
            file.write_bytes(text.encode())
            image_name = names.image_name.format(number=frame.number)
            yield SyntheticOutline(
                path=path,
                image_path=f"{names.truth.image_folder}/{image_name}",
                patient_id=names.truth.patient_id,
                structure=structure,
                number=frame.number,
                polygon_column_row=polygon,
                area=ellipse.area,
            )


def _write_links(root: Path, links: list[tuple[str, str]]) -> None:
    """The table of the Arterys layout."""
    with (root / "link.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("patient_id", "original_id"))
        writer.writerows(links)
