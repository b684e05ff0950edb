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
from collections.abc import Collection, Iterable, Sequence
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


@dataclass(frozen=True, slots=True)
class Arranged:
    """What a layout gives."""

    patients: list[Patient]
    """Complete or not."""
    problems: list[Problem]
    beside: list[Problem]
    """About files and folders that lie between those of the cohort and are not its own."""
    claimed: frozenset[str]
    """Files and whole folders that are the cohort's own."""


def is_contour_file(name: str) -> bool:
    """Whether a file is named like a contour."""
    return structure_of(name) is not None


def structure_of(path: str) -> str | None:
    """The structure that a contour file draws by its name; None for another file."""
    found = _CONTOUR_FILE.fullmatch(path, path.rfind("/") + 1)
    return found[2].lower() if found else None


def outline_set(path: str) -> str:
    """The folder of all that one person drew on a patient's images, of one of its files."""
    folder = path.rpartition("/")[0]
    above, _, last = folder.rpartition("/")
    return above if _CONTOUR_FOLDER.fullmatch(last) else folder


def arterys_parts(folder: Folder, link_file_name: str) -> int:
    """How many of the three parts of the Arterys layout lie in a folder."""
    parts = (IMAGES in folder.folders, CONTOURS in folder.folders, link_file_name in folder.files)
    return sum(parts)


def arterys_layout(root: Path, real_root: str, place: str, link_file_name: str) -> Arranged:
    """Patients of `link.csv`, `dicoms/` and `contourfiles/`, three parts of one folder `place`.

    Raises
    ------
    LayoutError
        If one of the three is missing, or the table is wrong.
    """
    links = _required_links(root, real_root, place, link_file_name)
    table, images_place = join(place, link_file_name), join(place, IMAGES)
    contours_place = join(place, CONTOURS)
    image_folder = scan_folder(real_root, images_place)
    contour_folder = scan_folder(real_root, contours_place)
    image_index, contour_index = map(_folder_index, (image_folder.folders, contour_folder.folders))
    problems = [*image_folder.problems, *contour_folder.problems]
    problems += [
        stray(join(folder.path, file), "lies beside the folders of the patients")
        for folder in (image_folder, contour_folder)
        for file in folder.files
    ]
    patients = []
    for link in links:
        leaving = _leaving(link, table)
        if leaving:
            problems.append(leaving)
            continue
        image_name = _find(link.patient_id, image_index)
        contour_name = _find(link.original_id, contour_index)
        images, image_problems = _images_below(real_root, images_place, image_name)
        outlines, contour_problems = _outlines_below(
            real_root, contours_place, contour_name, link.patient_id
        )
        problems += image_problems + contour_problems
        patients.append(
            Patient(
                patient_id=link.patient_id,
                image_place=join(images_place, image_name or link.patient_id),
                contour_place=join(contours_place, contour_name or link.original_id),
                images=images,
                outlines=outlines,
            )
        )
    linked = {_find(link.patient_id, image_index) for link in links}
    drawn = {_find(link.original_id, contour_index) for link in links}
    problems += _unlinked(image_folder, linked, link_file_name)
    problems += _unlinked(contour_folder, drawn, link_file_name)
    return Arranged(patients, problems, [], frozenset((table, images_place, contours_place)))


def _required_links(root: Path, real_root: str, place: str, link_file_name: str) -> list[Link]:
    """The link table of the Arterys layout, once the three parts of the layout are there."""
    top, here = scan_folder(real_root, place), root / place
    for folder, column in ((IMAGES, "patient_id"), (CONTOURS, "original_id")):
        if folder not in top.folders:
            raise LayoutError(
                f"{here}: needs a folder {folder}/ that holds one folder per {column} of "
                f"{link_file_name}; a link that leads out of the data directory does not count"
            )
    table = here / link_file_name
    if not table.is_file() or not table.resolve().is_relative_to(real_root):
        raise LayoutError(
            f"{here}: there is no {link_file_name}, a CSV table with the columns patient_id "
            f"(folders in {IMAGES}/) and original_id (folders in {CONTOURS}/); set link_file_name "
            "if it has another name, --source if this is another kind of data"
        )
    return read_links(table)


def _leaving(link: Link, table: str) -> Problem | None:
    """A row that leads out of the data directory."""
    for column, cell in (("patient_id", link.patient_id), ("original_id", link.original_id)):
        if leaves_directory(cell):
            detail = f"line {link.line}: its {column} leads out of the data directory"
            return Problem(table, Reason.OUTSIDE_DATA_DIRECTORY, detail)
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
        Problem(join(folder.path, one), Reason.STRAY_FILE, f"no row of {link_file_name} names it")
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
    real_root: str, place: str, folder_name: str | None, patient_id: str
) -> tuple[list[Outline], list[Problem]]:
    """Contour files in a patient's folder and below it."""
    outlines: list[Outline] = []
    problems: list[Problem] = []
    if folder_name is None:
        return outlines, problems
    for folder in walk(real_root, join(place, folder_name)):
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


def original_layout(root: Path, folders: Sequence[Folder], link_file_name: str) -> Arranged:
    """Patients by the names of folders, wherever contours and images lie among `folders`.

    Raises
    ------
    LayoutError
        If a table of links is wrong.
    """
    cases, problems = _cases(folders)
    tables = _tables(folders, [case.contour_place for case in cases.values()], link_file_name)
    links = [link for table in tables for link in read_links(root / table)]
    names = {canonical_name(link.patient_id): link.original_id for link in links}
    beside: list[Problem] = []
    for folder in folders:
        images, strays = _images_in(folder, tables)
        beside += [*folder.problems, *strays]
        case = _find_case(folder.path, cases, names)
        if case:
            case.images.extend(images)
        elif images:
            detail = f"{len(images)} possible images, but no contours of a patient of this name"
            beside.append(Problem(folder.path or ".", Reason.IMAGES_WITHOUT_ANNOTATION, detail))
    drawn = (join(folder.path, f) for folder in folders for f in folder.files if is_contour_file(f))
    images_of_cases = (path for case in cases.values() for path in case.images)
    claimed = frozenset((*drawn, *images_of_cases, *tables))
    return Arranged(list(cases.values()), problems, beside, claimed)


def _tables(folders: Iterable[Folder], places: Sequence[str], link_file_name: str) -> list[str]:
    """The link table of each folder on the way to contours, where it has one."""
    above = {
        "/".join(place.split("/")[:k]) for place in places for k in range(place.count("/") + 1)
    }
    found = []
    for folder in folders:
        names = [f for f in (link_file_name, PATIENT_TABLE) if f in folder.files]
        if names and folder.path in above:
            found.append(join(folder.path, names[0]))
    return found


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
