"""What a finished file holds, how it was made, and what in it deserves a look. No identity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.records import FLAGS, Float64, Problem

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

#: How many rows of each flag are named.
NAMED_ROWS = 8
#: How many problems of a kind are listed one by one.
LISTED_PROBLEMS = 10
#: How many distinct pixel spacings and slice thicknesses are listed.
LISTED_VALUES = 4


class InspectableDataset(Protocol):
    """What an inspection reads of a converted file."""

    @property
    def path(self) -> Path:
        """The file itself."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns)."""

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """Type of the stored images."""

    @property
    def mask_dtype(self) -> np.dtype[Any]:
        """Type of the stored masks."""

    @property
    def structures(self) -> tuple[str, ...]:
        """Names in bit order."""

    @property
    def attributes(self) -> dict[str, Any]:
        """The file's root attributes."""

    @property
    def rejected(self) -> Sequence[Problem]:
        """What is not in the file, or is reported beside it."""

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Encoded bytes of all images and of all masks."""

    def column(self, name: str) -> NDArray[Any]:
        """One column of /table, (n, …)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, median and largest of some values."""

    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True, slots=True)
class StructureSummary:
    """One structure on the slices where it has an outline."""

    name: str
    annotated: int
    """Slices with an outline of it."""
    area: Spread | None
    """Pixels; None where no slice is annotated."""
    area_mm2: Spread | None
    """None where no annotated slice has a pixel spacing."""


@dataclass(frozen=True, slots=True)
class SpacingCount:
    """Slices that share a pixel spacing."""

    between_rows: float | None
    """mm; None where the slices have none."""
    between_columns: float | None
    slices: int


@dataclass(frozen=True, slots=True)
class ThicknessCount:
    """Slices that share a slice thickness."""

    thickness: float | None
    """mm; None where the slices have none."""
    slices: int


@dataclass(frozen=True, slots=True)
class Flagged:
    """Slices that carry a flag."""

    slices: int
    first_rows: tuple[int, ...]
    """The first few of them, as rows of the file."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """A finished file in a few numbers; `dataclasses.asdict` of it can be written as JSON."""

    path: str
    format_version: int
    source: str
    """Name of the annotation source."""
    slices: int
    annotated_slices: int
    """Slices with an outline of at least one structure."""
    patients: int
    series: int
    rows: int
    columns: int
    image_dtype: str
    mask_dtype: str
    structures: tuple[StructureSummary, ...]
    """In bit order."""
    rule: str
    contour_origin: float
    codec: str
    keep_identity: bool
    pixel_spacings: tuple[SpacingCount, ...]
    """Most frequent first."""
    slice_thicknesses: tuple[ThicknessCount, ...]
    """Most frequent first."""
    intensity: tuple[float, float] | None
    """Smallest and largest value of all images."""
    flagged: dict[str, Flagged]
    """In the order of the bits; only flags that occur."""
    rejected: tuple[Problem, ...]
    """What should be in the file and is not."""
    reported: tuple[Problem, ...]
    """What else was noticed."""
    file_bytes: int
    image_bytes: int
    """Of the encoded images."""
    mask_bytes: int
    image_compression: float | None
    """Size of the decoded images over that of the encoded ones."""
    mask_compression: float | None


def inspect_file(path: str | Path) -> Inspection:
    """Open a converted file and describe it, from its columns alone: no pixel is decoded.

    Raises
    ------
    LayoutError
        The file is missing, is no HDF5 file, or is not one of ours.
    """
    from parallel_dicomseg.store import open_dataset  # slow to import, and --help needs the words

    with open_dataset(path) as dataset:
        return describe(dataset)


def describe(dataset: InspectableDataset) -> Inspection:
    """What is in an open file; see `Inspection`."""
    slices, rows, columns = dataset.shape
    attributes = dataset.attributes
    annotated = dataset.column("structure_annotated")
    image_bytes, mask_bytes = dataset.stored_bytes
    pixels = slices * rows * columns
    return Inspection(
        path=str(dataset.path),
        format_version=int(attributes["format_version"]),
        source=str(attributes["source"]),
        slices=slices,
        annotated_slices=int(annotated.any(axis=1).sum()),
        patients=len(np.unique(dataset.column("patient_id"))),
        series=len(np.unique(dataset.column("series_index"))),
        rows=rows,
        columns=columns,
        image_dtype=dataset.image_dtype.name,
        mask_dtype=dataset.mask_dtype.name,
        structures=_summarise_structures(dataset, annotated),
        rule=str(attributes["rule"]),
        contour_origin=float(attributes["contour_origin"]),
        codec=str(attributes["codec"]),
        keep_identity=bool(attributes["keep_identity"]),
        pixel_spacings=tuple(
            SpacingCount(between_rows, between_columns, count)
            for (between_rows, between_columns), count in _distinct(dataset.column("pixel_spacing"))
        ),
        slice_thicknesses=tuple(
            ThicknessCount(thickness, count)
            for (thickness,), count in _distinct(dataset.column("slice_thickness")[:, None])
        ),
        intensity=_intensity_range(dataset.column("intensity")),
        flagged=_flagged(dataset.column("flags")),
        rejected=tuple(problem for problem in dataset.rejected if problem.is_rejection),
        reported=tuple(problem for problem in dataset.rejected if not problem.is_rejection),
        file_bytes=dataset.path.stat().st_size,
        image_bytes=image_bytes,
        mask_bytes=mask_bytes,
        image_compression=_ratio(pixels * dataset.image_dtype.itemsize, image_bytes),
        mask_compression=_ratio(pixels * dataset.mask_dtype.itemsize, mask_bytes),
    )


def _summarise_structures(
    dataset: InspectableDataset, annotated: NDArray[np.bool_]
) -> tuple[StructureSummary, ...]:
    area, area_mm2 = dataset.column("area"), dataset.column("area_mm2")
    return tuple(
        StructureSummary(
            name=name,
            annotated=int(annotated[:, s].sum()),
            area=_spread(area[annotated[:, s], s]),
            area_mm2=_spread(area_mm2[annotated[:, s], s]),
        )
        for s, name in enumerate(dataset.structures)
    )


def _spread(values: NDArray[Any]) -> Spread | None:
    """Of the finite values; None where there is none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return Spread(float(values.min()), float(np.median(values)), float(values.max()))


def _distinct(values: Float64) -> list[tuple[tuple[float | None, ...], int]]:
    """Distinct rows of (n, k) and how often each occurs, the most frequent first; NaN as None."""
    distinct, count = np.unique(values, axis=0, return_counts=True)
    counted: Counter[tuple[float | None, ...]] = Counter()
    for row, number in zip(distinct.tolist(), count.tolist(), strict=True):
        counted[tuple(v if math.isfinite(v) else None for v in row)] += number
    return counted.most_common()


def _intensity_range(intensity: Float64) -> tuple[float, float] | None:
    finite = intensity[np.isfinite(intensity[:, :2]).all(axis=1)]
    return (float(finite[:, 0].min()), float(finite[:, 1].max())) if len(finite) else None


def _flagged(flags: NDArray[np.uint16]) -> dict[str, Flagged]:
    rows = {name: np.flatnonzero(flags >> bit & 1) for bit, name in enumerate(FLAGS)}
    return {
        name: Flagged(len(where), tuple(where[:NAMED_ROWS].tolist()))
        for name, where in rows.items()
        if len(where)
    }


def _ratio(plain: int, encoded: int) -> float | None:
    return plain / encoded if encoded else None


# ------------------------------------------------------------------------------------ for people


def printable(text: str) -> str:
    """Text as one line for any terminal: whatever does not print, as in a Python string.

    A file's name may hold line ends, codes that steer a terminal, and bytes that are not UTF-8
    (lone surrogates in Python), which standard output refuses.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def render(inspection: Inspection, console: Console) -> None:
    """Print an inspection for a person; tidy from 80 columns on.

    Parameters
    ----------
    inspection
        From `inspect_file`.
    console
        Where to; it knows its width and whether it has colours.
    """
    parts: list[RenderableType] = [_facts(inspection), _structures(inspection)]
    parts.append(_flags(inspection) if inspection.flagged else "no slice is flagged")
    for part in parts:
        console.print(part, highlight=False, markup=False)
        console.print()
    for heading, problems in (
        ("rejected", inspection.rejected),
        ("reported beside it", inspection.reported),
    ):
        for line in _problems(heading, problems):
            console.print(line, highlight=False, markup=False)


def _facts(inspection: Inspection) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _facts_as_text(inspection):
        grid.add_row(name, Text(printable(text)))
    return grid


def _facts_as_text(inspection: Inspection) -> list[tuple[str, str]]:
    i = inspection
    low_high = f", values {i.intensity[0]:g} to {i.intensity[1]:g}" if i.intensity else ""
    identity = "kept" if i.keep_identity else "removed"
    return [
        ("file", i.path),
        ("format", f"version {i.format_version}, from {i.source}, identity {identity}"),
        ("slices", f"{i.slices:,} of {i.rows} x {i.columns}, {i.annotated_slices:,} annotated"),
        ("patients", f"{i.patients:,} with {i.series:,} series"),
        ("images", f"{i.image_dtype}{low_high}"),
        ("masks", f"{i.mask_dtype}, rule {i.rule}, contour origin {i.contour_origin:g}"),
        ("size", _size(i)),
        (
            "spacing",
            _counts(
                (_millimetres(s.between_rows, s.between_columns), s.slices)
                for s in i.pixel_spacings
            ),
        ),
        (
            "thickness",
            _counts((_millimetres(t.thickness), t.slices) for t in i.slice_thicknesses),
        ),
    ]


def _size(inspection: Inspection) -> str:
    from rich.filesize import decimal

    ratios = [
        f"{name} {ratio:.1f} times smaller"
        for name, ratio in (
            ("images", inspection.image_compression),
            ("masks", inspection.mask_compression),
        )
        if ratio
    ]
    return ", ".join([decimal(inspection.file_bytes), inspection.codec, *ratios])


def _millimetres(*values: float | None) -> str:
    known = [f"{value:.7g}" for value in values if value is not None]
    return f"{' x '.join(known)} mm" if len(known) == len(values) else "unknown"


def _counts(counted: Iterable[tuple[str, int]]) -> str:
    texts = [f"{text} ({count:,})" for text, count in counted]
    more = len(texts) - LISTED_VALUES
    return ", ".join(texts[:LISTED_VALUES] + ([f"{more} more"] if more > 0 else []))


def _table(*headings: str, numbers: int) -> Table:
    """A table whose last columns, that many, hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for k, heading in enumerate(headings):
        if k < len(headings) - numbers:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def _structures(inspection: Inspection) -> Table:
    from rich.text import Text

    table = _table("structure", "slices", "area in", "smallest", "median", "largest", numbers=5)
    for s in inspection.structures:
        table.add_row(
            Text(printable(s.name)), f"{s.annotated:,}", "pixels", *_spread_as_text(s.area)
        )
        table.add_row("", "", "mm2", *_spread_as_text(s.area_mm2))
    return table


def _spread_as_text(spread: Spread | None) -> tuple[str, ...]:
    if spread is None:
        return "-", "-", "-"
    values = (spread.minimum, spread.median, spread.maximum)
    return tuple(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)


def _flags(inspection: Inspection) -> Table:
    table = _table("flag", "first rows", "slices", numbers=1)
    for name, flagged in inspection.flagged.items():
        rows = ", ".join(map(str, flagged.first_rows))
        more = ", ..." if flagged.slices > len(flagged.first_rows) else ""
        table.add_row(name, rows + more, f"{flagged.slices:,}")
    return table


def _problems(heading: str, problems: Sequence[Problem]) -> Iterator[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    yield f"{heading}: {len(problems) or 'nothing'}"
    for reason, count in Counter(problem.reason for problem in problems).most_common():
        yield f"  {reason}: {count:,}"
        same = [problem for problem in problems if problem.reason == reason]
        for problem in same[:LISTED_PROBLEMS]:
            line = printable(f"{problem.path}: {problem.detail}")
            yield Padding(Text(line, overflow="fold"), (0, 0, 0, 4))
        if count > LISTED_PROBLEMS:
            yield f"    and {count - LISTED_PROBLEMS:,} more"
