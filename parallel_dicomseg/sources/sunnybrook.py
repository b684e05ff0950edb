"""Sunnybrook Cardiac Data: text contours named after the image's number.

`IM-0001-0059-icontour-manual.txt` belongs to the image with InstanceNumber 59; the structures are
i (endocardium), o (epicardium), p1 and p2 (papillary muscles).
"""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Problem, Reason, ScanOptions, SliceTable
from parallel_dicomseg.sources.base import (
    Listing,
    Outline,
    Paired,
    check_directory,
    natural_key,
    walk,
)
from parallel_dicomseg.sources.numbered import pair_by_number
from parallel_dicomseg.sources.sunnybrook_files import (
    CONTOURS,
    IMAGES,
    Patient,
    arterys_layout,
    is_contour_file,
    original_layout,
)

name = "sunnybrook"

#: Inner and outer: the cavity lies in the epicardial outline, papillary muscles in the cavity.
_NESTED = (("i", "o"), ("p1", "i"), ("p2", "i"))


def recognizes(root: Path) -> bool:
    """Whether a folder of the Arterys layout, or a contour file anywhere below, is there."""
    if (root / IMAGES).is_dir() or (root / CONTOURS).is_dir():
        return True
    folders = walk(check_directory(root), "")
    return any(is_contour_file(file) for folder in folders for file in folder.files)


def list_files(root: Path, options: ScanOptions) -> Listing:
    """Find the images and outlines of every patient by their names.

    Parameters
    ----------
    root : Path
        The data directory.
    options : ScanOptions
        `structures`, `include_unannotated`, `link_file_name` and `contours_sub_dir` count.

    Raises
    ------
    LayoutError
        If the directory or its link table is missing, or not laid out in either way.
    ConfigurationError
        If a structure is asked for that is not there, or a sub-directory that no patient has.
    """
    real_root = check_directory(root)
    if (root / IMAGES).exists() or (root / CONTOURS).exists():
        patients, problems = arterys_layout(root, real_root, options.link_file_name)
    else:
        patients, problems = original_layout(root, real_root, options.link_file_name)
    complete, incomplete = _check_complete(patients)
    patients = sorted(complete, key=lambda patient: natural_key(patient.patient_id))
    drawn = _in_sub_directory(
        [outline for patient in patients for outline in patient.outlines],
        options.contours_sub_dir.strip("/"),
    )
    structures = _choose_structures(drawn, options.structures)
    chosen = [outline for outline in drawn if outline.structure in structures]
    outlines, duplicates = _without_duplicates(real_root, chosen)
    annotated = {outline.patient_id for outline in outlines}
    images = [
        (path, patient.patient_id)
        for patient in patients
        if options.include_unannotated or patient.patient_id in annotated
        for path in patient.images
    ]
    return Listing(
        image_paths=[path for path, _ in images],
        image_patients=[patient_id for _, patient_id in images],
        outlines=outlines,
        structures=structures,
        nested=tuple(both for both in _NESTED if set(both) <= set(structures)),
        problems=(*problems, *incomplete, *duplicates),
    )


def pair(listing: Listing, slices: SliceTable, options: ScanOptions) -> Paired:
    """Lay each outline on the image of its patient and series that has its number."""
    return pair_by_number(listing, slices, include_unannotated=options.include_unannotated)


def _check_complete(patients: Sequence[Patient]) -> tuple[list[Patient], list[Problem]]:
    """Patients that have images, and a line for each that lacks images or contours."""
    problems = []
    for patient in patients:
        if not patient.images:
            detail = f"no images for {len(patient.outlines)} contour file(s)"
            problems.append(Problem(patient.image_place, Reason.PATIENT_WITHOUT_IMAGES, detail))
        if not patient.outlines:
            detail = f"no contour files for {len(patient.images)} image(s)"
            problems.append(Problem(patient.contour_place, Reason.PATIENT_WITHOUT_CONTOURS, detail))
    return [patient for patient in patients if patient.images], problems


def _in_sub_directory(outlines: list[Outline], wanted: str) -> list[Outline]:
    """The outlines below a folder of this name (or path), all where none is named."""
    if not wanted:
        return outlines
    found = [outline for outline in outlines if f"/{wanted}/" in f"/{outline.path}"]
    if not found:
        there = sorted({outline.path.split("/")[-2] for outline in outlines})
        raise ConfigurationError(
            f"contours_sub_dir {wanted!r}: no contour lies in such a folder; "
            f"there are: {', '.join(there) or 'none'}"
        )
    return found


def _choose_structures(outlines: Sequence[Outline], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted structures, or all in natural order."""
    there = sorted({outline.structure for outline in outlines}, key=natural_key)
    unknown = [structure for structure in wanted if structure not in there]
    if unknown:
        raise ConfigurationError(
            f"structure {unknown[0]!r} is not there; there are: {', '.join(there) or 'none'}"
        )
    if len(set(wanted)) != len(wanted):
        raise ConfigurationError(f"structures {', '.join(wanted)}: one of them is named twice")
    return wanted or tuple(there)


def _without_duplicates(
    real_root: str, outlines: Sequence[Outline]
) -> tuple[list[Outline], list[Problem]]:
    """One outline per patient, structure and number: copies are dropped, rivals all refused."""
    same: dict[tuple[str, str, int], list[Outline]] = defaultdict(list)
    for outline in outlines:
        same[outline.patient_id, outline.structure, outline.number].append(outline)
    kept = []
    problems = []
    for first, *others in same.values():
        alike = all(_same_bytes(real_root, first, other) for other in others)
        kept += [first] if alike else []
        for outline in others if alike else (first, *others):
            rivals = ", ".join(o.path for o in (first, *others) if o is not outline)
            detail = (
                f"a copy, byte for byte, of {first.path}, which is used"
                if alike
                else f"differs from {rivals}; nobody can say which of them is right"
            )
            reason = Reason.REPEATED_CONTOUR if alike else Reason.DUPLICATE_CONTOUR
            problems.append(Problem(outline.path, reason, detail))
    return kept, problems


def _same_bytes(real_root: str, one: Outline, other: Outline) -> bool:
    """Whether two outline files can be read and hold the same bytes."""
    try:
        return filecmp.cmp(f"{real_root}/{one.path}", f"{real_root}/{other.path}", shallow=False)
    except OSError:
        return False
