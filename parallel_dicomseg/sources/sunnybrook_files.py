"""Where the files of Sunnybrook cohorts lie: two layouts, one list of patients.

The layout of the Arterys challenge has `link.csv`, `dicoms/<patient_id>/` and
`contourfiles/<original_id>/i-contours/`. The original one (Radau et al., MIDAS Journal 2009,
hdl:10380/3070) has contours in `SC-HF-I-01/contours-manual/IRCCI-expert/` anywhere below the
directory and images in folders of the same name ("SC-HF-I-1", without padding) or of another
name ("SCD0000101") that a table links to it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import Problem, Reason
from parallel_dicomseg.sources.base import (
    CanonicalName,
    Folder,
    Outline,
    canonical_name,
    has_image_suffix,
    join,
    leaves_directory,
    may_be_image,
    scan_folder,
    stray,
    walk,
)
from parallel_dicomseg.sources.links import Link, read_links

IMAGES = "dicoms"
CONTOURS = "contourfiles"
#: The table that comes with the original data; its columns are PatientID and OriginalID.
PATIENT_TABLE = "scd_patientdata.csv"

_CONTOUR_NAME = "IM-0001-0059-icontour-manual.txt"
_CONTOUR_FILE = re.compile(r"IM-[0-9]+-([0-9]+)-(i|o|p[12])-?contour-manual\.txt", re.IGNORECASE)
_CONTOUR_FOLDER = re.compile(r"(i|o|p[12])-contours", re.IGNORECASE)
_EXPERTS_FOLDER = "contours-manual"
_CASE_FOLDER = re.compile(r"[A-Za-z]+(?:[-_ ][A-Za-z]+)*[-_ ]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Patient:
    """What belongs to one patient by the names of folders and files."""

    patient_id: str
    image_place: str
    """Where the images are, or should be, for reports."""
    contour_place: str
    images: list[str]
    outlines: list[Outline]


#: What a layout gives: patients, complete or not, and what else there is.
Found = tuple[list[Patient], list[Problem]]


def is_contour_file(name: str) -> bool:
    """Whether a file is named like a contour."""
    return _CONTOUR_FILE.fullmatch(name) is not None


def arterys_layout(root: Path, real_root: str, link_file_name: str) -> Found:
    """Patients of `link.csv`, `dicoms/` and `contourfiles/`."""
    links = _required_links(root, real_root, link_file_name)
    image_folder, contour_folder = scan_folder(real_root, IMAGES), scan_folder(real_root, CONTOURS)
    image_index, contour_index = map(_folder_index, (image_folder.folders, contour_folder.folders))
    problems = [*image_folder.problems, *contour_folder.problems]
    problems += [
        stray(join(folder.path, file), "lies beside the folders of the patients")
        for folder in (image_folder, contour_folder)
        for file in folder.files
    ]
    patients = []
    for link in links:
        leaving = _leaving(link, link_file_name)
        if leaving:
            problems.append(leaving)
            continue
        image_name = _find(link.patient_id, image_index)
        contour_name = _find(link.original_id, contour_index)
        images, image_problems = _images_below(real_root, IMAGES, image_name)
        outlines, contour_problems = _outlines_below(real_root, contour_name, link.patient_id)
        problems += image_problems + contour_problems
        patients.append(
            Patient(
                patient_id=link.patient_id,
                image_place=join(IMAGES, image_name or link.patient_id),
                contour_place=join(CONTOURS, contour_name or link.original_id),
                images=images,
                outlines=outlines,
            )
        )
    linked = {_find(link.patient_id, image_index) for link in links}
    drawn = {_find(link.original_id, contour_index) for link in links}
    problems += _unlinked(image_folder, linked, link_file_name)
    problems += _unlinked(contour_folder, drawn, link_file_name)
    return patients, problems


def _required_links(root: Path, real_root: str, link_file_name: str) -> list[Link]:
    """The link table of the Arterys layout, once the three parts of the layout are there."""
    top = scan_folder(real_root, "")
    for folder, column in ((IMAGES, "patient_id"), (CONTOURS, "original_id")):
        if folder not in top.folders:
            raise LayoutError(
                f"{root}: needs a folder {folder}/ that holds one folder per {column} of "
                f"{link_file_name}; a link that leads out of the data directory does not count"
            )
    table = root / link_file_name
    if not table.is_file() or not table.resolve().is_relative_to(real_root):
        raise LayoutError(
            f"{root}: there is no {link_file_name}, a CSV table with the columns patient_id "
            f"(folders in {IMAGES}/) and original_id (folders in {CONTOURS}/); set link_file_name "
            "if it has another name, --source if this is another kind of data"
        )
    return read_links(table)


def _leaving(link: Link, link_file_name: str) -> Problem | None:
    """A row that leads out of the data directory."""
    for column, cell in (("patient_id", link.patient_id), ("original_id", link.original_id)):
        if leaves_directory(cell):
            detail = f"line {link.line}: its {column} leads out of the data directory"
            return Problem(link_file_name, Reason.OUTSIDE_DATA_DIRECTORY, detail)
    return None


def _folder_index(names: Iterable[str]) -> dict[str | CanonicalName, str]:
    """Folders by their name, and by their canonical name where only one folder has it."""
    similar = defaultdict(list)
    for folder in names:
        similar[canonical_name(folder)].append(folder)
    index: dict[str | CanonicalName, str] = {
        canonical: found[0] for canonical, found in similar.items() if len(found) == 1
    }
    return index | {folder: folder for found in similar.values() for folder in found}


def _find(wanted: str, index: dict[str | CanonicalName, str]) -> str | None:
    """The folder of this name, else the only one with the same words and numbers."""
    return index.get(wanted) or index.get(canonical_name(wanted))


def _unlinked(folder: Folder, linked: Collection[str | None], link_file_name: str) -> list[Problem]:
    """Folders of patients that the table does not name."""
    return [
        Problem(
            join(folder.path, one), Reason.UNLINKED_FOLDER, f"no row of {link_file_name} names it"
        )
        for one in folder.folders
        if one not in linked
    ]


def _images_below(
    real_root: str, place: str, folder_name: str | None
) -> tuple[list[str], list[Problem]]:
    """Files that may be images in a patient's folder and below it."""
    images: list[str] = []
    problems: list[Problem] = []
    if folder_name is None:
        return images, problems
    for folder in walk(real_root, join(place, folder_name)):
        problems += folder.problems
        for file in folder.files:
            path = join(folder.path, file)
            if may_be_image(file):
                images.append(path)
            else:
                problems.append(stray(path, "not named like a DICOM image (*.dcm)"))
    return images, problems


def _outlines_below(
    real_root: str, folder_name: str | None, patient_id: str
) -> tuple[list[Outline], list[Problem]]:
    """Contour files in a patient's folder and below it."""
    outlines: list[Outline] = []
    problems: list[Problem] = []
    if folder_name is None:
        return outlines, problems
    for folder in walk(real_root, join(CONTOURS, folder_name)):
        found, trouble = _outlines_in(folder.path, folder.files, patient_id)
        outlines += found
        problems += [*folder.problems, *trouble]
    return outlines, problems


def _outlines_in(
    folder: str, files: Iterable[str], patient_id: str
) -> tuple[list[Outline], list[Problem]]:
    """The contour files among `files`, and a line for each of the others."""
    of_folder = _CONTOUR_FOLDER.fullmatch(folder.rpartition("/")[2])
    expected = of_folder[1].lower() if of_folder else ""
    outlines: list[Outline] = []
    problems: list[Problem] = []
    for file in files:
        path = join(folder, file)
        found = _CONTOUR_FILE.fullmatch(file)
        structure = found[2].lower() if found else ""
        if not found:
            problems.append(stray(path, f"not named like a contour file ({_CONTOUR_NAME})"))
        elif expected not in ("", structure):
            detail = f"its name says structure {structure}, its folder {expected}"
            problems.append(Problem(path, Reason.BAD_CONTOUR, detail))
        else:
            outlines.append(Outline(path, patient_id, structure, int(found[1])))
    return outlines, problems


def original_layout(root: Path, real_root: str, link_file_name: str) -> Found:
    """Patients by the names of folders, wherever contours and images lie.

    Raises
    ------
    LayoutError
        If no contour lies in a folder named like a patient, or a table of links is wrong.
    """
    folders = list(walk(real_root, ""))
    cases, problems = _cases(folders)
    if not cases:
        raise LayoutError(
            f"{root}: no contour file ({_CONTOUR_NAME}) lies in a folder named like a patient "
            f"(SC-HF-I-01), nor are there {IMAGES}/, {CONTOURS}/ and {link_file_name}"
        )
    tables = [file for file in (link_file_name, PATIENT_TABLE) if file in folders[0].files]
    links = read_links(root / tables[0]) if tables else []
    names = {canonical_name(link.patient_id): link.original_id for link in links}
    for folder in folders:
        images, strays = _images_in(folder, tables)
        problems += [*folder.problems, *strays]
        case = _find_case(folder.path, cases, names)
        if case:
            case.images.extend(images)
        elif images:
            detail = f"{len(images)} possible images, but no contours of a patient of this name"
            problems.append(Problem(folder.path or ".", Reason.UNLINKED_FOLDER, detail))
    return list(cases.values()), problems


def _cases(folders: Iterable[Folder]) -> tuple[dict[CanonicalName, Patient], list[Problem]]:
    """Patients that have contours, with their contours and as yet without images."""
    cases: dict[CanonicalName, Patient] = {}
    problems: list[Problem] = []
    for folder in folders:
        drawn = [file for file in folder.files if is_contour_file(file)]
        place = _case_place(folder.path)
        if not drawn:
            continue
        if not place:
            detail = "lies in no folder named like a patient (SC-HF-I-01)"
            problems += [Problem(join(folder.path, f), Reason.BAD_CONTOUR, detail) for f in drawn]
            continue
        case_name = place.rpartition("/")[2]
        case = cases.setdefault(canonical_name(case_name), Patient(case_name, place, place, [], []))
        outlines, trouble = _outlines_in(folder.path, drawn, case.patient_id)
        case.outlines.extend(outlines)
        problems += trouble
    return cases, problems


def _case_place(path: str) -> str:
    """The patient's folder on the way to a folder of contours, or ''."""
    parts = path.split("/")
    lowered = [part.lower() for part in parts]
    if _EXPERTS_FOLDER in lowered:
        return "/".join(parts[: lowered.index(_EXPERTS_FOLDER)])
    depths = [depth for depth, part in enumerate(parts, 1) if _CASE_FOLDER.fullmatch(part)]
    return "/".join(parts[: depths[-1]]) if depths else ""


def _images_in(folder: Folder, tables: Collection[str]) -> tuple[list[str], list[Problem]]:
    """Files that may be images, and strays; beside contours only what is named *.dcm."""
    beside_contours = any(map(is_contour_file, folder.files))
    is_image = has_image_suffix if beside_contours else may_be_image
    images: list[str] = []
    strays: list[Problem] = []
    for file in folder.files:
        path = join(folder.path, file)
        if is_image(file):
            images.append(path)
        elif not is_contour_file(file) and path not in tables:
            strays.append(stray(path, "neither a contour nor a DICOM image by its name"))
    return images, strays


def _find_case(
    path: str, cases: dict[CanonicalName, Patient], names: dict[CanonicalName, str]
) -> Patient | None:
    """The patient of the nearest folder on the way that has or is linked to contours."""
    for part in reversed(path.split("/")):
        own = canonical_name(part)
        case = cases.get(own) or cases.get(canonical_name(names.get(own, part)))
        if case:
            return case
    return None
