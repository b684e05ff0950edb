"""Outlines that name their image by a number: pairing by exact integers within one series.

Nothing is guessed. Of several series the one that carries most of the outlines' numbers is meant;
of several images with the same number none is. A listed image that could not be read keeps its
place, so that no image of another series or with a misleading name takes it.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from parallel_dicomseg.records import Annotation, Int64, Problem, Reason, SliceTable
from parallel_dicomseg.sources.base import Found, Listing, Outline

_IMAGE_FILE = re.compile(r"(?:IM-[0-9]+-)?([0-9]+)(?:\.[a-z]+)?", re.IGNORECASE)

Key = TypeVar("Key")
Value = TypeVar("Value")
Claim = tuple[int, Outline]
"""A row of the SliceTable and an outline on it."""


@dataclass(frozen=True, slots=True)
class _Images:
    """Columns of a SliceTable as lists: reading single elements of an array is slow."""

    path: list[str]
    folder: list[str]
    number: list[int]
    """InstanceNumber; -1 where absent."""
    number_in_name: list[int]
    """-1 where the name is not a number."""
    series_instance_uid: list[bytes]


@dataclass(frozen=True, slots=True)
class _Series:
    """Images of one patient that were numbered together, as far as outlines ask for them."""

    folder: str
    size: int
    """Images that could be read."""
    readable: dict[int, list[int]]
    """Rows by number."""
    unreadable: dict[int, list[str]]
    """Listed paths that are not in the SliceTable, by the number in their name."""

    @property
    def coverage(self) -> int:
        """How many of the outlines' numbers it carries."""
        return len(self.readable.keys() | self.unreadable.keys())


def pair_by_number(
    listing: Listing,
    slices: SliceTable,
    kind: str,
    file_set: Callable[[str], str] = str,
    *,
    rows: Int64 | None = None,
) -> Found:
    """Lay each outline on the image of its patient and series that has its number.

    An image has a number by its InstanceNumber, and by its file name where that is a number
    ("59.dcm", "IM-0003-0059.dcm"). An outline is paired where exactly one image has its number.

    Parameters
    ----------
    listing : Listing
        Paths by their names alone.
    slices : SliceTable
        The listed images that could be read.
    kind : str
        Name of the source that reads the outlines.
    file_set : callable
        From an outline's path to what all files that count as one have in common.
    rows : (n,) int64, optional
        What the annotations call the slices; 0, 1, … by default.

    Returns
    -------
    One annotation per outline, in the order of the listing; on no slice where no image, or more
    than one, has its number.
    """
    images = _columns(slices)
    patient_of = dict(zip(listing.image_paths, listing.image_patients, strict=True))
    patients = [patient_of[path] for path in images.path]
    mine = _grouped(zip(patients, range(len(slices)), strict=True))
    unread = _grouped((patient_of[path], path) for path in patient_of.keys() - set(images.path))
    outlines = _grouped((outline.patient_id, outline) for outline in listing.outlines)
    row_of: dict[str, int] = {}
    problems: list[Problem] = []
    for patient, drawn in outlines.items():
        found, trouble = _pair_patient(
            drawn, mine.get(patient, []), unread.get(patient, []), images
        )
        row_of |= {outline.path: row for row, outline in found}
        problems += trouble
    names = np.arange(len(slices)) if rows is None else rows
    placed = [(outline, row_of.get(outline.path, -1)) for outline in listing.outlines]
    return Found(_annotations(placed, names, kind, file_set), tuple(problems))


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Values by key, both in the order in which they come."""
    groups: dict[Key, list[Value]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _columns(slices: SliceTable) -> _Images:
    """What pairing needs of a SliceTable."""
    paths = [os.fsdecode(path) for path in slices.path.tolist()]
    return _Images(
        path=paths,
        folder=[path.rpartition("/")[0] for path in paths],
        number=slices.instance_number.tolist(),
        number_in_name=[_number_in_name(path) for path in paths],
        series_instance_uid=slices.series_instance_uid.tolist(),
    )


def _number_in_name(path: str) -> int:
    """The image's number as its file name gives it, or -1."""
    found = _IMAGE_FILE.fullmatch(path, path.rfind("/") + 1)
    return int(found[1]) if found else -1


def _pair_patient(
    outlines: Sequence[Outline], rows: Sequence[int], unread: Sequence[str], images: _Images
) -> tuple[list[Claim], list[Problem]]:
    """The outlines of one patient on their images, and those that have none."""
    wanted = {outline.number for outline in outlines}
    series = _find_series(wanted, rows, unread, images)
    best = max((one.coverage for one in series), default=0)
    leaders = [one for one in series if one.coverage == best]
    problems = _alternatives(series, leaders, len(wanted))
    claims: list[Claim] = []
    for outline in outlines:
        judged = _judge(outline, leaders, images)
        if isinstance(judged, Problem):
            problems.append(judged)
        else:
            claims.append((judged, outline))
    return _refuse_shared_images(claims, problems, images)


def _find_series(
    wanted: Collection[int], rows: Sequence[int], unread: Sequence[str], images: _Images
) -> list[_Series]:
    """The series of one patient: its folders, split by UID where numbers repeat inside one."""
    by_folder = _grouped((images.folder[row], row) for row in rows)
    lost = _grouped((path.rpartition("/")[0], path) for path in sorted(unread))
    series = []
    for folder in sorted(by_folder.keys() | lost.keys()):
        unreadable = _grouped((_number_in_name(path), path) for path in lost.get(folder, ()))
        asked = {number: paths for number, paths in unreadable.items() if number in wanted}
        for members in _split(by_folder.get(folder, []), images):
            readable = _by_number(members, wanted, images)
            series.append(_Series(folder, len(members), readable, asked))
    return series


def _split(rows: list[int], images: _Images) -> list[list[int]]:
    """The rows of one folder, by SeriesInstanceUID where their numbers are not all different.

    UIDs that only one image has are taken together: some anonymizers give every file its own.
    """
    numbers = [images.number[row] for row in rows if images.number[row] >= 0]
    if len(set(numbers)) == len(numbers):
        return [rows]
    members = Counter(images.series_instance_uid[row] for row in rows)
    parts = _grouped(
        (uid if members[uid] > 1 else b"", row)
        for row, uid in ((row, images.series_instance_uid[row]) for row in rows)
    )
    return [parts[uid] for uid in sorted(parts)]


def _by_number(
    rows: Iterable[int], wanted: Collection[int], images: _Images
) -> dict[int, list[int]]:
    """Rows by each number that they have and that is wanted."""
    found: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        number, in_name = images.number[row], images.number_in_name[row]
        if number in wanted:
            found[number].append(row)
        if in_name != number and in_name in wanted:
            found[in_name].append(row)
    return found


def _judge(outline: Outline, leaders: Sequence[_Series], images: _Images) -> int | Problem:
    """The row that an outline lies on, or why there is none."""
    number = outline.number
    if len(leaders) == 1:
        found = leaders[0].readable.get(number, ())
        if len(found) == 1 and number not in leaders[0].unreadable:
            return found[0]
    return _not_paired(outline, leaders, images)


def _not_paired(outline: Outline, leaders: Sequence[_Series], images: _Images) -> Problem:
    """Why an outline lies on no image: none has its number, or more than one."""
    number = outline.number
    rows = [row for one in leaders for row in one.readable.get(number, ())]
    lost = sorted({path for one in leaders for path in one.unreadable.get(number, ())})
    if not rows and not lost:
        places = ", ".join(f"{one.folder} ({one.size} images)" for one in leaders) or "any folder"
        detail = f"no image has the number {number} in {places}"
        return Problem(outline.path, Reason.CONTOUR_WITHOUT_IMAGE, detail)
    if not rows and len(leaders) == 1:
        detail = f"the image with the number {number} could not be read: {', '.join(lost)}"
        # the image counts as rejected, so its outlines need not count again
        return Problem(outline.path, Reason.IMAGE_REJECTED, detail)
    why = "" if len(leaders) == 1 else f"{len(leaders)} series carry equally many contours; "
    named = [_described(row, images) for row in rows] + [f"{path} (unread)" for path in lost]
    detail = f"{why}for number {number} there are: {', '.join(named)}"
    return Problem(outline.path, Reason.AMBIGUOUS_IMAGE, detail)


def _described(row: int, images: _Images) -> str:
    """Path and InstanceNumber of an image."""
    number = images.number[row]
    return f"{images.path[row]} (InstanceNumber {number if number >= 0 else 'absent'})"


def _alternatives(
    series: Sequence[_Series], leaders: Sequence[_Series], wanted: int
) -> list[Problem]:
    """A line for each series that carries numbers of outlines but is not the one meant."""
    best = ", ".join(f"{one.folder} ({one.coverage})" for one in leaders)
    return [
        Problem(
            one.folder,
            Reason.ALTERNATIVE_SERIES,
            f"{one.size} images carry {one.coverage} of {wanted} contour numbers; most: {best}",
        )
        for one in series
        if one not in leaders and one.coverage
    ]


def _refuse_shared_images(
    claims: Sequence[Claim], problems: Sequence[Problem], images: _Images
) -> tuple[list[Claim], list[Problem]]:
    """Refuse outlines of different numbers that meet on one image."""
    numbers = _grouped((row, outline.number) for row, outline in claims)
    shared = {row: sorted(set(found)) for row, found in numbers.items() if len(set(found)) > 1}
    refused = [
        Problem(
            outline.path,
            Reason.AMBIGUOUS_IMAGE,
            f"{_described(row, images)} fits the contour numbers "
            + " and ".join(map(str, shared[row])),
        )
        for row, outline in claims
        if row in shared
    ]
    return [claim for claim in claims if claim[0] not in shared], [*problems, *refused]


def _annotations(
    placed: Sequence[tuple[Outline, int]],
    names: Int64,
    kind: str,
    file_set: Callable[[str], str],
) -> tuple[Annotation, ...]:
    """Each outline on its row, -1: on none. Nobody says that anybody looked for more."""
    # slices of shared arrays: a cohort has as many annotations as files
    index = np.array([row for _, row in placed], dtype=np.int64)
    rows = np.where(index >= 0, names[index] if len(names) else -1, -1)
    first, whole, none = np.zeros(1, np.int64), np.full(1, -1, np.int64), np.empty(0, np.int64)
    return tuple(
        Annotation(
            kind=kind,
            path=outline.path,
            name=outline.structure,
            found_by="number",
            looked_at=none,
            slice=rows[k : k + size],
            offset=first[:size],
            length=whole[:size],
            file_set=file_set(outline.path),
        )
        for k, (outline, row) in enumerate(placed)
        for size in (int(row >= 0),)
    )
