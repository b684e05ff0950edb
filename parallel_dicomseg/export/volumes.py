"""The volumes of a converted file as an export sees them: which slices, where, what is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.geometry import normal_of, to_patient, volume_affine
from parallel_dicomseg.records import Float64, Int64
from parallel_dicomseg.store import Dataset

#: A volume is irregular where a pixel lies farther than this many steps between slices from where
#: the affine puts it.
TOLERANCE = 0.01

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


class NoteKind(StrEnum):
    """What a user of exported files has to know."""

    NO_GEOMETRY = "no-geometry"
    IRREGULAR = "irregular"
    SHEARED = "sheared"
    NOT_ANNOTATED = "not-annotated"
    PARTLY_ANNOTATED = "partly-annotated"
    OVERLAP = "overlap"
    LEFT_OUT = "left-out"
    NO_SPLIT = "no-split"


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that an export could not carry over as it is."""

    case: str
    """Name of the case; '' where it concerns all."""
    kind: NoteKind
    detail: str
    """In words, with the numbers."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the k slices of a volume lie, as one affine says it."""

    affine: Float64
    """(4, 4) from (column, row, slice, 1) to mm in patient coordinates (DICOM: left, posterior,
    superior); the identity where the file has no geometry."""
    is_known: bool
    """Whether the file has the geometry of every slice."""
    off_mm: float
    """The farthest that a pixel lies from where the affine puts it."""
    distances_mm: tuple[float, float]
    """The smallest and the largest distance between two slices, along their normal."""

    @property
    def is_regular(self) -> bool:
        """Whether the affine tells the truth about every slice, see TOLERANCE."""
        step = float(np.linalg.norm(self.affine[:3, 2]))
        return self.off_mm <= TOLERANCE * step


@dataclass(frozen=True, slots=True, eq=False)
class StoredVolume:
    """One volume of a converted file: k slices, s structures."""

    number: int
    """Row of /volumes."""
    case: str
    """A name that can be a file's: of the patient as the file has it, and of the volume."""
    patient_id: str
    """As in the file: a running number or a hash unless identity was kept."""
    modality: str
    split: str
    """'train', 'validation' or 'test'; '' without a split."""
    rows: Int64
    """(k,) rows of the file, by position along the normal."""
    size: tuple[int, int, int]
    """Columns, rows and slices of its grid."""
    placement: Placement
    annotated: NDArray[np.bool_]
    """(k, s) whether somebody looked for the structure on the slice."""


def stored_volumes(dataset: Dataset, chosen: Sequence[int] | None = None) -> list[StoredVolume]:
    """The volumes of a file in its order, or those that are chosen by their row of /volumes.

    Raises
    ------
    ConfigurationError
        A chosen volume is not there.
    """
    first, count = (dataset.column(name, "volumes") for name in ("first_slice", "slices"))
    numbers = range(len(first)) if chosen is None else chosen
    unknown = [number for number in numbers if not 0 <= number < len(first)]
    if unknown:
        raise ConfigurationError(
            f"{dataset.path}: there is no volume {unknown[0]}, they are 0 to {len(first) - 1}"
        )
    table = _Table(dataset)
    digits = len(str(len(first) - 1))
    return [
        table.volume(k, f"{k:0{digits}d}", np.arange(first[k], first[k] + count[k]))
        for k in numbers
    ]


class _Table:
    """The columns of /table and /series that an export needs, read once."""

    def __init__(self, dataset: Dataset) -> None:
        self._patient_id = dataset.column("patient_id")
        self._split = dataset.column("split")
        self._modality = dataset.column("modality", "series")
        self._series_index = dataset.column("series_index")
        self._annotated = dataset.column("structure_annotated").astype(bool)
        self._thickness = dataset.column("slice_thickness")
        parts = ("image_position_patient", "image_orientation_patient", "pixel_spacing")
        self._planes = np.concatenate([dataset.column(name) for name in parts], axis=1)
        self._shape = dataset.images.shape

    def volume(self, number: int, text: str, rows: Int64) -> StoredVolume:
        """The volume that consists of these rows of the file."""
        rows = rows[order_of(self._planes[rows])]
        first = rows[0]
        patient_id = self._patient_id[first].decode()
        return StoredVolume(
            number=number,
            case=f"{safe_name(patient_id)}_volume-{text}",
            patient_id=patient_id,
            modality=self._modality[self._series_index[first]].decode(),
            split=self._split[first].decode(),
            rows=rows,
            size=(self._shape[2], self._shape[1], len(rows)),
            placement=place(self._planes[rows], float(self._thickness[first])),
            annotated=self._annotated[rows],
        )


def is_known(planes: Float64) -> bool:
    """Whether planes (k, 11) all have a position, an orientation and a spacing that span one."""
    spanning = np.isfinite(normal_of(planes[:, 3:9])).all() and (planes[:, 9:] > 0).all()
    return bool(np.isfinite(planes).all() and spanning)


def order_of(planes: Float64) -> Int64:
    """(k,) the order by position along the normal; as they are where a position is unknown."""
    if not is_known(planes):
        return np.arange(len(planes))
    return np.argsort(planes[:, :3] @ normal_of(planes[0, 3:9]), kind="stable")


def place(planes: Float64, slice_thickness: float) -> Placement:
    """The affine of slices (k, 11) that are ordered by position, and how well it fits them.

    The step between slices is the mean one; a single slice is as thick as it says, or 1 mm.
    """
    if not is_known(planes):
        return Placement(np.eye(4), False, 0.0, (1.0, 1.0))
    normal = normal_of(planes[0, 3:9])
    distances = np.diff(planes[:, :3] @ normal)
    affine = volume_affine(planes)
    if not distances.sum() > 0:  # one slice, or all at one place: the affine would be singular
        thickness = slice_thickness if slice_thickness > 0 else 1.0  # also where it is NaN
        affine[:3, 2] = thickness * normal
        distances = distances if distances.size else np.array([thickness])
    smallest, largest = float(distances.min()), float(distances.max())
    return Placement(affine, True, _farthest(planes, affine), (smallest, largest))


def _farthest(planes: Float64, affine: Float64) -> float:
    """Largest distance in mm between pixels of the planes and where the affine puts them.

    Both are affine in the pixel, so that three pixels of each slice, a thousand apart, tell.
    """
    pixels = np.array([[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0]])
    true = np.stack([to_patient(pixels, plane) for plane in planes])
    index = np.zeros((*true.shape[:2], 4))
    index[..., :2], index[..., 2], index[..., 3] = pixels, np.arange(len(planes))[:, None], 1.0
    return float(np.linalg.norm(index @ affine[:3].T - true, axis=-1).max())


def read_slices(array: Any, rows: Int64) -> NDArray[Any]:
    """(k, rows, columns[, samples]) slices of /images or /masks, decoded into one array."""
    volume = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for k, row in enumerate(rows.tolist()):
        array.read_into(row, volume[k])
    return volume


def geometry_notes(volume: StoredVolume) -> list[Note]:
    """What an affine cannot say about the slices of a volume."""
    placement = volume.placement
    if not placement.is_known:
        detail = (
            "the file has no position, orientation or spacing of it; its affine is the identity"
        )
        return [Note(volume.case, NoteKind.NO_GEOMETRY, detail)]
    if not placement.is_regular:
        smallest, largest = placement.distances_mm
        detail = (
            f"distances between slices are {smallest:.6g} to {largest:.6g} mm; with the mean step "
            f"a pixel lies up to {placement.off_mm:.3g} mm off"
        )
        return [Note(volume.case, NoteKind.IRREGULAR, detail)]
    return []


def annotation_notes(
    volume: StoredVolume, names: Sequence[str], structures: Iterable[int]
) -> list[Note]:
    """Which structures nobody looked for, in the whole volume or on some of its slices."""
    notes = []
    for s in structures:
        looked, slices = int(volume.annotated[:, s].sum()), len(volume.rows)
        if not looked:
            detail = f"{names[s]!r} is not annotated: there is no mask of it"
            notes.append(Note(volume.case, NoteKind.NOT_ANNOTATED, detail))
        elif looked < slices:
            detail = f"{names[s]!r} is annotated on {looked} of {slices} slices"
            notes.append(Note(volume.case, NoteKind.PARTLY_ANNOTATED, detail))
    return notes


def chosen_structures(dataset: Dataset, names: Sequence[str] | None) -> tuple[int, ...]:
    """Bits of the structures with these names, in this order.

    All where `names` is None: what lies inside another structure after it, so that a label map, in
    which the last one wins, keeps both.

    Raises
    ------
    ConfigurationError
        A name is not one of the file's structures, or stands there twice.
    """
    if names is None:
        return _outer_first(len(dataset.structures), dataset.nested)
    for name in names:
        if name not in dataset.structures:
            known = ", ".join(map(repr, dataset.structures))
            raise ConfigurationError(f"{dataset.path} has no structure {name!r}, there are {known}")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"a structure is named twice: {', '.join(map(repr, names))}")
    return tuple(dataset.structures.index(name) for name in names)


def _outer_first(structures: int, nested: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Bits in their order, but each after those that it lies inside; `nested` is (inner, outer)."""
    inside = {bit: {outer for inner, outer in nested if inner == bit} for bit in range(structures)}
    return tuple(TopologicalSorter(inside).static_order())


def safe_name(text: str) -> str:
    """Text as a part of a file's name: ASCII letters, digits, '_', '-' and '.' inside."""
    return _UNSAFE.sub("-", text).strip("-.") or "unnamed"


def safe_names(texts: Sequence[str]) -> list[str]:
    """Names for files, all different, also where case does not count."""
    names: list[str] = []
    for text in texts:
        name, number = safe_name(text), 1
        while name.casefold() in {other.casefold() for other in names}:
            number += 1
            name = f"{safe_name(text)}-{number}"
        names.append(name)
    return names
