"""Sunnybrook Cardiac Data: text contours named after the image's number.

`IM-0001-0059-icontour-manual.txt` belongs to the image with InstanceNumber 59; the structures are
i (endocardium), o (epicardium), p1 and p2 (papillary muscles).
"""

from __future__ import annotations

import filecmp
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.records import (
    AnnotationRefs,
    Contours,
    Drawn,
    Int64,
    Problem,
    Reason,
    ScanOptions,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources.base import (
    Folder,
    Found,
    Listing,
    Outline,
    check_directory,
    walk,
)
from parallel_dicomseg.sources.numbered import pair_by_number
from parallel_dicomseg.sources.sunnybrook_files import (
    CONTOURS,
    IMAGES,
    Arranged,
    Patient,
    arterys_layout,
    arterys_parts,
    original_layout,
    outline_set,
    structure_of,
)
from parallel_dicomseg.text import read_contour_files
from parallel_dicomseg.volumes import natural_key

__all__ = [
    "NESTED",
    "find_cohorts",
    "is_cohort",
    "list_files",
    "name",
    "outline_set",
    "pair",
    "read",
    "structure_of",
]

name = "sunnybrook"

#: Inner and outer: the cavity lies in the epicardial outline, papillary muscles in the cavity.
NESTED = (("i", "o"), ("p1", "i"), ("p2", "i"))


def is_cohort(top: Folder, options: ScanOptions) -> bool:
    """Whether a data directory is a cohort of the Arterys layout, though a part may be missing.

    `top` is what lies directly in it. The original layout is told by its contour files alone,
    see `find_cohorts`.
    """
    return arterys_parts(top, options.link_file_name) > 1


def list_files(root: Path, options: ScanOptions) -> Listing:
    """Find the images and outlines of a directory that is one such cohort, by their names.

    Parameters
    ----------
    root : Path
        The data directory.
    options : ScanOptions
        `include_unannotated`, `link_file_name` and `contours_sub_dir` count.

    Raises
    ------
    LayoutError
        If the directory or its link table is missing, or not laid out in either way.
    ConfigurationError
        If a sub-directory is asked for that no patient has.
    """
    real_root = check_directory(root)
    if (root / IMAGES).exists() or (root / CONTOURS).exists():
        arranged = arterys_layout(root, real_root, "", options.link_file_name)
    else:
        arranged = original_layout(root, list(walk(real_root, "")), options.link_file_name)
        if not arranged.patients:
            raise LayoutError(
                f"{root}: no contour file (IM-0001-0059-icontour-manual.txt) lies in a folder "
                f"named like a patient (SC-HF-I-01), nor are there {IMAGES}/, {CONTOURS}/ and "
                f"{options.link_file_name}"
            )
    return _listing(real_root, arranged, arranged.beside, options)


def find_cohorts(root: Path, folders: Sequence[Folder], options: ScanOptions) -> list[Listing]:
    """The cohorts of either layout in a tree that may hold anything else as well.

    Parameters
    ----------
    root : Path
        The data directory.
    folders : Sequence[Folder]
        All folders of the tree.
    options : ScanOptions
        As for `list_files`.

    Raises
    ------
    LayoutError
        If a link table that such a cohort needs is wrong.
    ConfigurationError
        If a sub-directory is asked for that no patient has.
    """
    real_root, table = check_directory(root), options.link_file_name
    places = [folder.path for folder in folders if arterys_parts(folder, table) == 3]
    outer = [place for place in places if not any(_is_below(place, other) for other in places)]
    parts = [arterys_layout(root, real_root, place, table) for place in outer]
    rest = [f for f in folders if not any(f.path == p or _is_below(f.path, p) for p in outer)]
    parts.append(original_layout(root, rest, table))
    return [_listing(real_root, part, [], options) for part in parts if part.claimed]


def pair(listing: Listing, slices: SliceTable, rows: Int64 | None = None) -> Found:
    """Lay each outline on the image of its patient and series that has its number.

    `rows` (n,) is what the annotations call the slices; None: 0, 1, ….
    """
    return pair_by_number(listing, slices, name, file_set=outline_set, rows=rows)


def read(
    root: str, slices: SliceRefs, annotations: AnnotationRefs, *, contour_origin: float
) -> Drawn:
    """Read contour files; one that cannot be read has no ring, so nothing is annotated by it.

    Parameters
    ----------
    root : str
        The cohort's root.
    slices : SliceRefs
        The images of the task; a contour in pixels needs nothing of them.
    annotations : AnnotationRefs
        Each a whole file.
    contour_origin : float
        Pixel coordinate, in the files, of the centre of the first pixel.
    """
    files = read_contour_files(annotations.path, root)
    usable = np.diff(files.offsets) > 0
    contours = Contours(
        points_column_row=files.points_column_row - contour_origin,
        offsets=np.append(files.offsets[:-1][usable], files.offsets[-1]),
        plane=np.array(annotations.plane, np.int64)[usable],
        structure=np.array(annotations.structure, np.int32)[usable],
        layer=np.array(annotations.layer, np.int32)[usable],
    )
    problems = tuple(_unreadable(annotations, slices, k, text) for k, text in files.errors)
    return Drawn(contours, (), np.where(usable, files.digest, np.uint64(0)), problems)


def _unreadable(
    annotations: AnnotationRefs, slices: SliceRefs, k: int, text: str
) -> tuple[int, Reason, str]:
    structure, image = structure_of(annotations.path[k]), slices.path[annotations.plane[k]]
    return k, Reason.BAD_CONTOUR, f"{text}; structure {structure} of {image}"


def _is_below(path: str, place: str) -> bool:
    """Whether a folder lies in another one."""
    return path != place and path.startswith(f"{place}/" if place else "")


def _listing(
    real_root: str, arranged: Arranged, beside: Sequence[Problem], options: ScanOptions
) -> Listing:
    """The images of patients that have some, with one outline per structure and number."""
    complete, incomplete = _check_complete(arranged.patients)
    patients = sorted(complete, key=lambda patient: natural_key(patient.patient_id))
    drawn = _in_sub_directory(
        [outline for patient in patients for outline in patient.outlines],
        options.contours_sub_dir.strip("/"),
    )
    outlines, duplicates = _without_duplicates(real_root, drawn)
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
        claimed=arranged.claimed,
        problems=(*arranged.problems, *beside, *incomplete, *duplicates),
    )


def _check_complete(patients: Sequence[Patient]) -> tuple[list[Patient], list[Problem]]:
    """Patients that have images, and a line for each that lacks images or contours."""
    problems = []
    for patient in patients:
        if not patient.images:
            detail = f"no images for {len(patient.outlines)} contour file(s)"
            problems.append(Problem(patient.image_place, Reason.ANNOTATION_WITHOUT_IMAGES, detail))
        if not patient.outlines:
            detail = f"no contour files for {len(patient.images)} image(s)"
            problems.append(
                Problem(patient.contour_place, Reason.IMAGES_WITHOUT_ANNOTATION, detail)
            )
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
            reason = Reason.REPEATED if alike else Reason.DUPLICATE
            problems.append(Problem(outline.path, reason, detail))
    return kept, problems


def _same_bytes(real_root: str, one: Outline, other: Outline) -> bool:
    """Whether two outline files can be read and hold the same bytes."""
    try:
        return filecmp.cmp(f"{real_root}/{one.path}", f"{real_root}/{other.path}", shallow=False)
    except OSError:
        return False
