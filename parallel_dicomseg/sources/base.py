"""What every annotation source gives and takes, and how a data directory is walked.

Only what `os.scandir` found is ever opened, and a link that leaves the data directory is
reported, not followed; so no name in a table or a file can lead a run elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
    Drawn,
    MarkTable,
    Problem,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceRefs,
    SliceTable,
)

_IMAGE_SUFFIXES = frozenset({"dcm", "dicom", "ima"})
_WORD_OR_NUMBER = re.compile(r"[0-9]+|[^\W\d_]+")

CanonicalName = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """One outline file of a cohort."""

    path: str
    """Relative to the data directory, '/' between the parts."""
    patient_id: str
    """The cohort's own name of the patient."""
    structure: str
    number: int
    """Which image it was drawn on, in the source's own numbering."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a cohort by their names alone: nothing has been opened but tables."""

    image_paths: list[str]
    """Files that are or may be DICOM images, relative, '/' between the parts; each once."""
    image_patients: list[str]
    """The patient of each of `image_paths`."""
    outlines: list[Outline]
    claimed: frozenset[str]
    """Files and whole folders that are the cohort's: nobody else looks for anything there."""
    problems: tuple[Problem, ...]


class Reader(Protocol):
    """The half of a source that works inside a task: from references to outlines."""

    name: str
    """What the annotations' `kind` says."""

    def read(
        self, root: str, slices: SliceRefs, annotations: AnnotationRefs, *, contour_origin: float
    ) -> Drawn:
        """Read annotations of this source, in pixels of their source images.

        `annotations` are all of this kind, sorted by (plane, structure, layer); `slices` are all
        images of the task. An annotation that cannot be read is a problem of the result, never an
        exception. `contour_origin` is for outlines that are in pixels in the file.
        """


class Source(Reader, Protocol):
    """One kind of annotation file that may lie anywhere in a tree of DICOM files.

    A package adds one by an entry point in the group "parallel_dicomseg.sources"; see
    docs/sources.md.
    """

    def recognizes(self, file: ScannedFile) -> bool:
        """Whether a file is of this kind, by its SOP class or name; nothing is opened."""

    def find(
        self, root: str, files: Sequence[ScannedFile], images: SliceTable, options: ScanOptions
    ) -> Found:
        """Lay what the files of this kind hold on the images.

        `images` are sorted by volume and position, and their `volume` is assigned.
        """


@dataclass(frozen=True, slots=True)
class Found:
    """What a source found in its files."""

    annotations: tuple[Annotation, ...]
    """One per structure, file and volume; also where nothing of it lies on an image."""
    problems: tuple[Problem, ...]
    marks: MarkTable = field(default_factory=MarkTable.empty)
    """Single points, which are in no mask; on rows of the images that the source was given."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies directly in one folder; names in sorted order."""

    path: str
    """Relative to the data directory, '' for the directory itself."""
    folders: tuple[str, ...]
    files: tuple[str, ...]
    problems: tuple[Problem, ...]
    """Links, devices and what could not be listed."""


def check_directory(root: Path) -> str:
    """The absolute real path of a data directory that is there and holds something.

    Raises
    ------
    LayoutError
        If it does not exist, is no directory, cannot be listed or is empty.
    """
    if not root.exists():
        raise LayoutError(f"{root}: there is no such directory")
    if not root.is_dir():
        raise LayoutError(f"{root}: not a directory")
    try:
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        raise LayoutError(f"{root}: cannot be listed ({error.strerror})") from None
    if empty:
        raise LayoutError(f"{root}: the directory is empty")
    return str(root.resolve())


def scan_folder(root: str, path: str) -> Folder:
    """List one folder of the data directory `root` (a real path)."""
    folders: list[str] = []
    files: list[str] = []
    problems: list[Problem] = []
    try:
        with os.scandir(f"{root}/{path}") as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif problem := _judge_other(root, path, entry):
                    problems.append(problem)
                else:
                    files.append(entry.name)
    except OSError as error:
        detail = f"the folder cannot be listed: {error.strerror}"
        problems.append(Problem(path or ".", Reason.UNREADABLE_FILE, detail))
    problems.sort(key=lambda problem: problem.path)
    return Folder(path, tuple(sorted(folders)), tuple(sorted(files)), tuple(problems))


def walk(root: str, path: str) -> Iterator[Folder]:
    """The folder and all folders below it, depth first, in sorted order."""
    pending = [path]
    while pending:
        folder = scan_folder(root, pending.pop())
        pending.extend(join(folder.path, name) for name in reversed(folder.folders))
        yield folder


def _judge_other(root: str, path: str, entry: os.DirEntry[str]) -> Problem | None:
    """What is wrong with a link or a device; None for a link to a file inside the directory."""
    place = join(path, entry.name)
    if not entry.is_symlink():
        return stray(place, "not a regular file")
    target = Path(os.path.realpath(entry.path))
    if not target.is_relative_to(root):
        detail = "a link that leaves the data directory is not followed"
        return Problem(place, Reason.OUTSIDE_DATA_DIRECTORY, detail)
    if target.is_dir():
        return stray(place, "a link to a folder is not followed")
    if target.exists() and not target.is_file():
        return stray(place, "a link to something that is no regular file")
    return None


def stray(path: str, detail: str) -> Problem:
    """A file that has no business here and does no harm."""
    return Problem(path, Reason.STRAY_FILE, detail)


def join(folder: str, name: str) -> str:
    """A relative path with '/' between the parts."""
    return f"{folder}/{name}" if folder else name


def leaves_directory(name: str) -> bool:
    """Whether a name out of a table would lead out of the folder that it is looked up in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or (len(parts) > 1 and not parts[0]) or ":" in name


def has_image_suffix(name: str) -> bool:
    """Whether a file is named *.dcm or the like."""
    stem, _, suffix = name.rpartition(".")
    return not name.startswith(".") and bool(stem) and suffix.lower() in _IMAGE_SUFFIXES


def may_be_image(name: str) -> bool:
    """Whether a file may be a DICOM image by its name: `has_image_suffix`, or it has no suffix.

    Digits after the last point are no suffix but the end of a UID.
    """
    stem, _, suffix = name.rpartition(".")
    if not stem:
        return "." not in name and name.upper() != "DICOMDIR"
    return not name.startswith(".") and (suffix.lower() in _IMAGE_SUFFIXES or suffix.isdigit())


def canonical_name(name: str) -> CanonicalName:
    """Words and numbers of a name, without case, padding and punctuation.

    'SC-HF-I-01', 'SC-HF-I-1' and 'sc_hf_i_001' are one name, 'SC-HF-I-10' is another.
    """
    parts = _WORD_OR_NUMBER.findall(name)
    return tuple(part.casefold().lstrip("0") or "0" for part in parts) or (name,)
