"""Any tree of DICOM files: which files to read, and which source makes something of the others.

Names say nothing here: every file may be an image, with any extension or none. Only what is
obviously something else by its name is spared the look at its header.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from parallel_dicomseg.deidentify import class_uid
from parallel_dicomseg.records import (
    Annotation,
    MarkTable,
    Problem,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceTable,
)
from parallel_dicomseg.sources.base import Folder, Found, Source, join, stray

#: Endings of files that are no DICOM for certain; a source may still know what to do with them.
FOREIGN_SUFFIXES = frozenset(
    (
        *("bmp", "gif", "jpeg", "jpg", "png", "svg", "tif", "tiff"),
        *("cfg", "csv", "ini", "json", "log", "md", "rtf", "toml", "txt", "xml", "yaml", "yml"),
        *("db", "doc", "docx", "htm", "html", "ipynb", "pdf", "py", "sh", "xls", "xlsx"),
        *("gz", "h5", "hdf5", "mha", "mhd", "nii", "npy", "npz", "nrrd", "tar", "zip"),
    )
)


@dataclass(frozen=True, slots=True)
class TreeListing:
    """The files of a tree by their names alone."""

    paths: list[str]
    """Files whose header is to be read, relative, '/' between the parts."""
    foreign: list[ScannedFile]
    """Files that are no DICOM by their names."""
    problems: tuple[Problem, ...]
    """Links, devices and what could not be listed."""


def list_tree(root: str, folders: Iterable[Folder], claimed: Collection[str]) -> TreeListing:
    """Sort the files of a tree by what their names say.

    Parameters
    ----------
    root : str
        The data directory, a real path.
    folders : Iterable[Folder]
        All its folders, the folders above first.
    claimed : Collection[str]
        Files and whole folders that are somebody else's.
    """
    paths: list[str] = []
    foreign: list[ScannedFile] = []
    problems: list[Problem] = []
    left_out = set()
    for folder in folders:
        if folder.path in claimed or folder.path.rpartition("/")[0] in left_out:
            left_out.add(folder.path)
            continue
        problems += folder.problems
        for path in (join(folder.path, file) for file in folder.files):
            if path in claimed:
                continue
            if path.rpartition(".")[2].lower() in FOREIGN_SUFFIXES:
                foreign.append(ScannedFile(path, "", _size(f"{root}/{path}")))
            else:
                paths.append(path)
    return TreeListing(paths, foreign, tuple(problems))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (a million files)
    except OSError:  # gone since it was listed
        return 0


def find_annotations(
    root: str,
    files: Sequence[ScannedFile],
    images: SliceTable,
    sources: Mapping[str, Source],
    options: ScanOptions,
) -> Found:
    """Ask each source what the files that it recognizes draw on the images.

    Parameters
    ----------
    root : str
        The data directory.
    files : Sequence[ScannedFile]
        Everything that is no image.
    images : SliceTable
        Sorted by volume and position, their `volume` assigned. Where there are none, no source is
        asked.
    sources : Mapping[str, Source]
        Those to ask, by name.
    options : ScanOptions
        Handed on to the sources.

    Returns
    -------
    What all of them found, and a Problem for each file of which nobody made anything.
    """
    annotations: list[Annotation] = []
    problems: list[Problem] = []
    marks: list[MarkTable] = []
    recognized: dict[str, str] = {}
    for name, source in sources.items():
        mine = sorted((file for file in files if source.recognizes(file)), key=lambda f: f.path)
        recognized |= {file.path: name for file in mine}
        if mine and len(images):
            found = source.find(root, mine, images, options)
            annotations += found.annotations
            problems += found.problems
            marks.append(found.marks)
    told = {problem.path for problem in problems} | {one.path for one in annotations}
    problems += [
        _unused(file, recognized.get(file.path), len(images))
        for file in files
        if file.path not in told
    ]
    return Found(tuple(annotations), tuple(problems), MarkTable.concatenate(marks))


def _unused(file: ScannedFile, source: str | None, images: int) -> Problem:
    """Why nothing of a file is used, though nothing is wrong with it."""
    if source is not None and not images:
        detail = f"for the source {source}, but no image could be read"
        return Problem(file.path, Reason.ANNOTATION_WITHOUT_IMAGES, detail)
    if source is not None:
        return stray(file.path, f"holds nothing that the source {source} can use")
    if file.sop_class_uid:
        kind = class_uid(file.sop_class_uid)
        detail = f"a DICOM object that is neither image nor annotation ({kind})"
        return Problem(file.path, Reason.NOT_AN_IMAGE, detail)
    return stray(file.path, "neither a DICOM file nor an annotation that a source knows")


def unchosen_files(
    annotations: Sequence[Annotation], used: Collection[str], told: Collection[str]
) -> list[Problem]:
    """A line for each annotation file of which nothing is converted and nothing was said.

    Parameters
    ----------
    annotations : Sequence[Annotation]
        All that was found.
    used : Collection[str]
        Paths of files that are converted.
    told : Collection[str]
        Paths of which there is a problem already.
    """
    counts = Counter(one.path for one in annotations if one.path not in told)
    return [
        stray(path, f"none of its {count} structure(s) is drawn on an image and asked for")
        for path, count in sorted(counts.items())
        if path not in used
    ]
