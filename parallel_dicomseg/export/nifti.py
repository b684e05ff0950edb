"""NIfTI files out of a converted file: one image and its masks per volume.

A NIfTI array has the axes (column, row, slice), and its affine leads to right, anterior, superior
(https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h), where DICOM's patient coordinates are
left, posterior, superior (PS3.3 C.7.6.2.1.1): the first two axes change their sign.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.export.folder import (
    ExportedCase,
    ExportReport,
    new_folder,
    write_report,
)
from parallel_dicomseg.export.volumes import (
    Note,
    NoteKind,
    Placement,
    StoredVolume,
    annotation_notes,
    chosen_structures,
    geometry_notes,
    read_slices,
    safe_names,
    stored_volumes,
)
from parallel_dicomseg.records import Float64, Progress
from parallel_dicomseg.store import Dataset

#: How the masks of several structures are laid out.
MASKS = ("separate", "labels")

SUFFIX = ".nii.gz"

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# NIFTI_XFORM_SCANNER_ANAT: the scanner's coordinates; NIFTI_XFORM_ALIGNED_ANAT: some others.
_SCANNER, _ALIGNED = 1, 2
# A qform, whose axes are perpendicular, may be off by this part of a pixel at the far corner:
# cosines in real headers are rounded.
_QFORM_TOLERANCE = 0.1
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def export_nifti(
    dataset: Dataset,
    directory: str | Path,
    *,
    volumes: Sequence[int] | None = None,
    structures: Sequence[str] | None = None,
    masks: str = "separate",
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write every volume as NIfTI: `<case>_image.nii.gz` and its masks.

    The case is named by patient and volume as the converted file has them. Values and types are
    those of the file (colour: RGB24); masks are uint8. Slices are ordered by position, units are
    mm. A structure that was not annotated in a volume has no file there.

    Parameters
    ----------
    dataset
        An open converted file.
    directory
        The folder to make. It appears under this name only when it is whole.
    volumes
        Rows of /volumes; all by default.
    structures
        Names; all by default.
    masks
        'separate': `<case>_mask_<structure>.nii.gz`, 0 and 1. 'labels': one `<case>_labels.nii.gz`
        whose values are in the report; a volume whose structures overlap has separate masks.
    strict
        Refuse what NIfTI cannot say instead of noting it: slices at unequal distances, a sheared
        volume, a volume without geometry.
    overwrite
        Replace an earlier export.
    progress
        Called with the volumes done so far.

    Returns
    -------
    The files, and notes on what they cannot say; also in `export.json` beside them.

    Raises
    ------
    ConfigurationError
        nibabel is not installed, the folder must not be written, a volume or structure is not
        there, or under `strict` a volume's geometry is not that of a NIfTI file.
    ConversionError
        The files cannot be written.
    LayoutError
        A chunk of the converted file cannot be read.
    """
    need_nibabel()
    if masks not in MASKS:
        raise ConfigurationError(f"masks is {masks!r}, it must be one of {', '.join(MASKS)}")
    target, bits = Path(directory), chosen_structures(dataset, structures)
    chosen = stored_volumes(dataset, volumes)
    if strict:
        refuse_bad_geometry(chosen)
    cases: list[ExportedCase] = []
    notes: list[Note] = []
    with new_folder(target, overwrite=overwrite) as folder:
        for done, volume in enumerate(chosen, 1):
            case, found = _write_volume(dataset, folder, volume, bits, masks)
            cases.append(case)
            notes += found
            if progress:
                progress(Progress("export", done, len(chosen)))
        names = [dataset.structures[s] for s in bits]
        labels = {name: k for k, name in enumerate(names, 1)} if masks == "labels" else {}
        report = ExportReport(str(target), tuple(cases), tuple(notes), labels)
        write_report(folder, "nifti", report)
    return report


def _write_volume(
    dataset: Dataset, folder: Path, volume: StoredVolume, bits: Sequence[int], masks: str
) -> tuple[ExportedCase, list[Note]]:
    image_file = f"{volume.case}_image{SUFFIX}"
    save_nifti(read_slices(dataset.images, volume.rows), volume.placement, folder / image_file)
    notes = [*volume_notes(volume), *annotation_notes(volume, dataset.structures, bits)]
    pixels = read_slices(dataset.masks, volume.rows)
    drawn = [s for s in bits if volume.annotated[:, s].any()]
    overlapping = count_overlapping(pixels, drawn) if masks == "labels" else 0
    if overlapping:
        detail = f"{overlapping} voxels are in several structures: separate masks, no label map"
        notes.append(Note(volume.case, NoteKind.OVERLAP, detail))
    if masks == "labels" and not overlapping:
        files = _write_labels(dataset, folder, volume, pixels, bits, drawn)
    else:
        files = _write_masks(dataset, folder, volume, pixels, drawn)
    case = ExportedCase(
        volume.case, volume.number, len(volume.rows), volume.split, (image_file,), files
    )
    return case, notes


def _write_masks(
    dataset: Dataset, folder: Path, volume: StoredVolume, pixels: NDArray[Any], drawn: Sequence[int]
) -> dict[str, str]:
    names = safe_names(dataset.structures)
    files = {}
    for s in drawn:
        name = f"{volume.case}_mask_{names[s]}{SUFFIX}"
        save_nifti(has_bit(pixels, s).astype(np.uint8), volume.placement, folder / name)
        files[dataset.structures[s]] = name
    return files


def _write_labels(
    dataset: Dataset,
    folder: Path,
    volume: StoredVolume,
    pixels: NDArray[Any],
    bits: Sequence[int],
    drawn: Sequence[int],
) -> dict[str, str]:
    if not drawn:
        return {}
    name = f"{volume.case}_labels{SUFFIX}"
    save_nifti(label_map(pixels, bits), volume.placement, folder / name)
    return {dataset.structures[s]: name for s in drawn}


def need_nibabel() -> None:
    """Say how to install nibabel where it is missing.

    Raises
    ------
    ConfigurationError
        It cannot be imported.
    """
    try:
        import nibabel  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            'NIfTI files need nibabel: pip install "parallel_dicomseg[export]"'
        ) from None


def refuse_bad_geometry(volumes: Sequence[StoredVolume]) -> None:
    """Stop at the first volume whose geometry NIfTI cannot say.

    Raises
    ------
    ConfigurationError
        Naming the volume and why.
    """
    for volume in volumes:
        for note in volume_notes(volume):
            raise ConfigurationError(f"{note.case}: {note.detail}; refused by strict")


def volume_notes(volume: StoredVolume) -> list[Note]:
    """What a NIfTI file cannot say about the geometry of a volume."""
    notes = geometry_notes(volume)
    if _is_sheared(volume.placement, volume.size):
        detail = (
            f"its axes are {_largest_shear(volume.placement.affine):.3g} degrees off the "
            "perpendicular: sform only, no qform"
        )
        notes.append(Note(volume.case, NoteKind.SHEARED, detail))
    return notes


def _is_sheared(placement: Placement, size: tuple[int, int, int]) -> bool:
    """Whether a qform, the nearest affine without shear, would be off at the far corner."""
    if not placement.is_known:
        return False
    axes = placement.affine[:3, :3]
    steps = np.linalg.norm(axes, axis=0)
    left, _, right = np.linalg.svd(axes / steps)
    off = ((left @ right) * steps - axes) @ (np.array(size) - 1)
    return bool(np.linalg.norm(off) > _QFORM_TOLERANCE * steps[:2].min())


def _largest_shear(affine: Float64) -> float:
    """The largest angle by which two axes are not perpendicular, degrees."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(axes.T @ axes)[np.triu_indices(3, 1)]
    return float(np.degrees(np.arcsin(cosines.max())))


def save_nifti(volume: NDArray[Any], placement: Placement, path: Path) -> None:
    """Write a volume (slices, rows, columns[, 3]); equal input gives equal bytes."""
    nib: Any = importlib.import_module("nibabel")  # its types are incomplete
    affine = _TO_RAS @ placement.affine if placement.is_known else placement.affine
    image = nib.Nifti1Image(_nifti_axes(volume), affine)
    sheared = _is_sheared(placement, (volume.shape[2], volume.shape[1], len(volume)))
    code = _SCANNER if placement.is_known else _ALIGNED
    image.set_sform(affine, code)
    image.set_qform(affine, 0 if sheared else code)
    image.header.set_xyzt_units("mm")
    if volume.ndim == 4 and volume.dtype != np.uint8:
        image.header.set_intent("vector")
    nib.save(image, path)


def _nifti_axes(volume: NDArray[Any]) -> NDArray[Any]:
    """(columns, rows, slices) of (slices, rows, columns), without a copy.

    Colour of 8 bits is one RGB value per voxel, other colour the fifth axis of a vector image.
    """
    if volume.ndim == 3:
        return volume.T
    if volume.dtype == np.uint8:
        return np.ascontiguousarray(volume).view(_RGB)[..., 0].T
    return volume.transpose(2, 1, 0, 3)[:, :, :, None]


def has_bit(pixels: NDArray[Any], structure: int) -> NDArray[np.bool_]:
    """Where the bit of a structure is set."""
    inside: NDArray[np.bool_] = (pixels & pixels.dtype.type(1 << structure)) != 0
    return inside


def selected_bits(pixels: NDArray[Any], structures: Sequence[int]) -> NDArray[Any]:
    """The masks with only the bits of these structures left."""
    chosen: NDArray[Any] = pixels & pixels.dtype.type(sum(1 << s for s in structures))
    return chosen


def count_overlapping(pixels: NDArray[Any], structures: Sequence[int]) -> int:
    """How many voxels are in more than one of these structures."""
    chosen = selected_bits(pixels, structures)
    return int(np.count_nonzero(chosen & (chosen - (chosen != 0))))


def label_map(pixels: NDArray[Any], structures: Sequence[int]) -> NDArray[Any]:
    """Voxels numbered 1, 2, … by the last of these structures that they are in; else 0."""
    labels = np.zeros(pixels.shape, np.uint8)  # a mask has at most 64 bits
    for label, s in enumerate(structures, 1):
        labels[has_bit(pixels, s)] = label
    return labels
