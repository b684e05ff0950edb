"""The table that links a patient's folder of images to the folder of contours."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.files import read_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.sources.base import CanonicalName, canonical_name


@dataclass(frozen=True, slots=True)
class Link:
    """One row of the table."""

    patient_id: str
    original_id: str
    line: int
    """In the file, from 1."""


def read_links(path: Path) -> list[Link]:
    """The rows of a CSV table with the columns patient_id and original_id.

    Other spellings of the columns ("PatientID") and further columns are fine; blank rows and
    repetitions of a row are left out.

    Raises
    ------
    LayoutError
        If the file is not there, is not CSV text in UTF-8, lacks a column, has no rows, or links
        one patient to two others.
    """
    rows = _read_table(path)
    if not rows:
        raise LayoutError(
            f"{path}: the table is empty; it needs the columns patient_id,original_id"
        )
    _, header = rows[0]
    patient, original = (_column(path, header, title) for title in ("patient_id", "original_id"))
    links: dict[tuple[str, str], Link] = {}
    for line, row in rows[1:]:
        cells = [*row, *[""] * len(header)]
        link = Link(cells[patient], cells[original], line)
        links.setdefault((link.patient_id, link.original_id), link)
    if not links:
        raise LayoutError(f"{path}: the table has a header but no rows")
    for column in ("patient_id", "original_id"):
        _check_each_once(path, column, links.values())
    return list(links.values())


def _read_table(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and stripped cells of every row that is not blank."""
    try:
        raw = read_regular(path, limits().table_bytes)
        reader = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""))
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except UnicodeDecodeError as error:
        raise LayoutError(f"{path}: not text in UTF-8 (byte {error.start})") from None
    except csv.Error as error:
        raise LayoutError(f"{path}: not a CSV table ({error})") from None
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read ({error.strerror})") from None
    return [(line, row) for line, row in rows if any(row)]


def _column(path: Path, header: Sequence[str], wanted: str) -> int:
    """Index of a column, whatever its case and punctuation."""
    plain = [re.sub(r"[\W_]", "", title).casefold() for title in header]
    found = [k for k, title in enumerate(plain) if title == wanted.replace("_", "")]
    if len(found) != 1:
        # without a header the first row holds patients, so it is not quoted
        there = f"{len(header)} column(s), of which {len(found) or 'none'} have that name"
        raise LayoutError(f"{path}: needs one column {wanted}; its first row has {there}")
    return found[0]


def _check_each_once(path: Path, column: str, links: Iterable[Link]) -> None:
    """Refuse a table that links one patient to two others: nobody can say which is right."""
    first: dict[CanonicalName, Link] = {}
    for link in links:
        cell = getattr(link, column)
        earlier = first.setdefault(canonical_name(cell), link)
        if cell and earlier is not link:
            raise LayoutError(
                f"{path}: lines {earlier.line} and {link.line} have the same {column} but differ "
                "otherwise; only one can be right"
            )
