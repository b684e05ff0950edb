"""What a finished file holds, how it was made, and what in it deserves a look. No identity."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import FLAGS, Float64, Problem

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_WORD_END = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

#: How many rows of each flag are named.
NAMED_ROWS = 8
#: How many problems of a kind are listed one by one.
LISTED_PROBLEMS = 10
#: How many distinct pixel spacings, slice thicknesses and so on are listed.
LISTED_VALUES = 4
#: How many distinct values of an attribute are kept for each series.
KEPT_VALUES = 20


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

    @property
    def samples(self) -> int:
        """Samples of a pixel: 1 or 3."""

    @property
    def decoders(self) -> dict[str, str]:
        """What decoded each compressed transfer syntax, by its UID."""

    def columns(self, group: str = "table") -> tuple[str, ...]:
        """Names of the columns of a group."""

    def column(self, name: str, group: str = "table") -> NDArray[Any]:
        """One column of /table or another group, (n, …)."""

    def series_header(self, series: int) -> dict[str, Any]:
        """The DICOM attributes that all images of a series share."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, median and largest of some values."""

    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True, slots=True)
class StructureSummary:
    """One structure on the slices where it is drawn."""

    name: str
    annotated: int
    """Slices on which somebody looked for it."""
    outlined: int
    """Slices on which it is drawn."""
    area: Spread | None
    """Pixels; None where it is never drawn."""
    area_mm2: Spread | None
    """None where no such slice has a pixel spacing."""


@dataclass(frozen=True, slots=True)
class SpacingCount:
    """Slices that share a pixel spacing."""

    between_rows: float | None
    """mm; None where the slices have none."""
    between_columns: float | None
    slices: int


@dataclass(frozen=True, slots=True)
class SizeCount:
    """Slices whose source images share a size."""

    rows: int
    columns: int
    slices: int


@dataclass(frozen=True, slots=True)
class ThicknessCount:
    """Slices that share a slice thickness."""

    thickness: float | None
    """mm; None where the slices have none."""
    slices: int


@dataclass(frozen=True, slots=True)
class SplitCount:
    """One part of the patient-wise split."""

    patients: int
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
    """Slices on which somebody looked for at least one structure."""
    outlined_slices: int
    """Slices on which at least one structure is drawn."""
    patients: int
    series: int
    volumes: int
    irregular_volumes: int
    """Volumes with gaps, or without positions."""
    slice_distance: Spread | None
    """mm between the slices of a volume, its median; None where no volume has one."""
    split: dict[str, SplitCount]
    """Parts by name; empty without a split."""
    rows: int
    columns: int
    samples: int
    """Of a pixel: 1 or 3."""
    modalities: dict[str, int]
    """Series of each, the most frequent first."""
    image_dtype: str
    mask_dtype: str
    structures: tuple[StructureSummary, ...]
    """In bit order."""
    rule: str
    contour_origin: float
    codec: str
    keep_identity: bool
    pseudonyms: str
    """'kept', 'running-number' or 'keyed-hash'."""
    dates: str
    """'kept', 'shifted' or 'dropped'."""
    hashed_paths: bool
    decoders: dict[str, str]
    """What decoded each compressed transfer syntax, by its UID."""
    resampled: bool
    """Whether images were interpolated onto another spacing."""
    cropped_pixels: int
    """Pixels of masks that lie outside the stored images."""
    marks: int
    """Single points on the images, which are in no mask."""
    pixel_spacings: tuple[SpacingCount, ...]
    """As stored, most frequent first."""
    source_pixel_spacings: tuple[SpacingCount, ...]
    """As in the input, most frequent first."""
    source_sizes: tuple[SizeCount, ...]
    """As in the input, most frequent first."""
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


# Attributes of a file that are repeated as they are.
_SAID: dict[str, Callable[[Any], Any]] = {
    "format_version": int,
    "source": str,
    "rule": str,
    "contour_origin": float,
    "codec": str,
    "keep_identity": bool,
    "pseudonyms": str,
    "dates": str,
    "hashed_paths": bool,
    "resampled": bool,
}


def describe(dataset: InspectableDataset) -> Inspection:
    """What is in an open file; see `Inspection`."""
    slices, rows, columns = dataset.shape
    annotated, outlined = dataset.column("structure_annotated"), dataset.column("outlined")
    image_bytes, mask_bytes = dataset.stored_bytes
    pixels = slices * rows * columns
    regular = dataset.column("regular", "volumes")
    return Inspection(
        path=str(dataset.path),
        **{name: kind(dataset.attributes[name]) for name, kind in _SAID.items()},
        slices=slices,
        annotated_slices=int(annotated.any(axis=1).sum()),
        outlined_slices=int(outlined.any(axis=1).sum()),
        patients=len(np.unique(dataset.column("patient_id"))),
        series=len(dataset.column("modality", "series")),
        volumes=len(regular),
        irregular_volumes=int((~regular).sum()),
        slice_distance=_spread(dataset.column("slice_distance", "volumes")),
        split=_split_counts(dataset),
        rows=rows,
        columns=columns,
        samples=dataset.samples,
        modalities=_frequencies(dataset.column("modality", "series")),
        image_dtype=dataset.image_dtype.name,
        mask_dtype=dataset.mask_dtype.name,
        structures=_summarise_structures(dataset, annotated, outlined),
        decoders=dataset.decoders,
        cropped_pixels=int(dataset.column("cropped").sum()),
        marks=len(dataset.column("slice", "marks")),
        pixel_spacings=_spacings(dataset.column("pixel_spacing")),
        source_pixel_spacings=_spacings(dataset.column("source_pixel_spacing")),
        source_sizes=_sizes(dataset),
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
        image_compression=_ratio(
            pixels * dataset.samples * dataset.image_dtype.itemsize, image_bytes
        ),
        mask_compression=_ratio(pixels * dataset.mask_dtype.itemsize, mask_bytes),
    )


def _split_counts(dataset: InspectableDataset) -> dict[str, SplitCount]:
    """In the order train, validation, test; parts without a patient are not there."""
    split, patient = dataset.column("split"), dataset.column("patient_id")
    parts = ((name, split == name.encode()) for name in ("train", "validation", "test"))
    return {
        name: SplitCount(len(np.unique(patient[here])), int(here.sum()))
        for name, here in parts
        if here.any()
    }


def _frequencies(texts: NDArray[np.bytes_]) -> dict[str, int]:
    return dict(Counter(text.decode("utf-8", "replace") for text in texts.tolist()).most_common())


def _spacings(spacing: Float64) -> tuple[SpacingCount, ...]:
    return tuple(SpacingCount(rows, columns, n) for (rows, columns), n in _distinct(spacing))


def _sizes(dataset: InspectableDataset) -> tuple[SizeCount, ...]:
    size = np.stack([dataset.column("source_rows"), dataset.column("source_columns")], axis=1)
    distinct, count = np.unique(size, axis=0, return_counts=True)
    pairs = zip(distinct.tolist(), count.tolist(), strict=True)
    return tuple(
        sorted(
            (SizeCount(rows, columns, n) for (rows, columns), n in pairs), key=lambda s: -s.slices
        )
    )


def _summarise_structures(
    dataset: InspectableDataset, annotated: NDArray[np.bool_], outlined: NDArray[np.bool_]
) -> tuple[StructureSummary, ...]:
    area, area_mm2 = dataset.column("area"), dataset.column("area_mm2")
    return tuple(
        StructureSummary(
            name=name,
            annotated=int(annotated[:, s].sum()),
            outlined=int(outlined[:, s].sum()),
            area=_spread(area[outlined[:, s], s]),
            area_mm2=_spread(area_mm2[outlined[:, s], s]),
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


# ------------------------------------------------------------------------------ one attribute


@dataclass(frozen=True, slots=True)
class SeriesValues:
    """An attribute in one series."""

    series: int
    """Row of /series."""
    patient_id: str
    """As in the file: a pseudonym, unless identity was kept."""
    modality: str
    slices: int
    """Of the series."""
    missing: int
    """Slices without the attribute."""
    values: tuple[tuple[str, int], ...]
    """At most `KEPT_VALUES` different ones and their slices, the most frequent first."""
    distinct: int
    """How many different ones there are."""
    minimum: float | None
    """Of all numbers; None where a value is no number."""
    maximum: float | None


@dataclass(frozen=True, slots=True)
class TagValues:
    """An attribute in all series of a file; `dataclasses.asdict` of it can be written as JSON."""

    path: str
    keyword: str
    place: str
    """'headers', or the column of /table that the values are from."""
    series: tuple[SeriesValues, ...]


def tag_values(path: str | Path, tag: str) -> TagValues:
    """What a DICOM attribute is in each series of a converted file.

    Parameters
    ----------
    path
        A converted file.
    tag
        A keyword ('EchoTime', in any case) or a tag ('0018,0081', '(0018,0081)', '00180081').

    Raises
    ------
    LayoutError
        The file cannot be read, or does not hold the attribute.
    ConfigurationError
        DICOM knows no such keyword or tag; close ones are named.
    """
    from parallel_dicomseg.store import keyword_from_user, open_dataset

    with open_dataset(path) as dataset:
        return describe_tag(dataset, keyword_from_user(tag, lambda: _keywords(dataset)))


def _keywords(dataset: InspectableDataset) -> list[str]:
    """Keywords of all headers of a file."""
    series = range(len(dataset.column("slices", "series")))
    constant = {keyword for k in series for keyword in dataset.series_header(k)}
    return sorted(constant.union(dataset.columns("headers")))


def describe_tag(dataset: InspectableDataset, keyword: str) -> TagValues:
    """What an attribute is in each series of an open file; see `tag_values`.

    It is looked for in the headers; then, in snake_case, among the columns of /table.
    """
    in_headers = _from_headers(dataset, keyword)
    column = _WORD_END.sub("_", keyword).lower()
    if any(value is not None for values in in_headers for value in values):
        place, by_series = "headers", in_headers
    elif column in dataset.columns():
        place, by_series = f"table/{column}", _by_series(dataset, dataset.column(column))
    else:
        known = ", ".join(_keywords(dataset)) or "nothing"
        raise LayoutError(f"{dataset.path}: no image has {keyword}; the headers hold {known}")
    patient, modality = dataset.column("patient_id", "series"), dataset.column("modality", "series")
    return TagValues(
        path=str(dataset.path),
        keyword=keyword,
        place=place,
        series=tuple(
            _series_values(k, patient[k].decode(), modality[k].decode("utf-8", "replace"), values)
            for k, values in enumerate(by_series)
        ),
    )


def _from_headers(dataset: InspectableDataset, keyword: str) -> list[list[Any]]:
    """The values of each series, slice by slice; None where a slice has none."""
    if keyword in dataset.columns("headers"):
        return _by_series(dataset, dataset.column(keyword, "headers"))
    counts = dataset.column("slices", "series").tolist()
    headers = (dataset.series_header(k).get(keyword) for k in range(len(counts)))
    return [
        [None if value == [] else value] * count
        for value, count in zip(headers, counts, strict=True)
    ]


def _by_series(dataset: InspectableDataset, column: NDArray[Any]) -> list[list[Any]]:
    """The rows of a column, series by series; None for '' and NaN."""
    first = dataset.column("first_slice", "series")
    return [[_known(value) for value in part.tolist()] for part in np.split(column, first[1:])]


def _known(value: Any) -> Any:
    if isinstance(value, bytes):
        texts = value.decode("utf-8", "replace").split("\\")
        values = [_as_number(text) for text in texts] if value else [None]
        return values[0] if len(values) == 1 else values
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _series_values(series: int, patient: str, modality: str, values: list[Any]) -> SeriesValues:
    known = [value for value in values if value is not None]
    counted = Counter(_value_as_text(value) for value in known)
    flat = [part for value in known for part in (value if isinstance(value, list) else [value])]
    numbers = [float(v) for v in flat if isinstance(v, int | float) and math.isfinite(v)]
    whole = bool(flat) and len(numbers) == len(flat)
    return SeriesValues(
        series=series,
        patient_id=patient,
        modality=modality,
        slices=len(values),
        missing=len(values) - len(known),
        values=tuple(counted.most_common(KEPT_VALUES)),
        distinct=len(counted),
        minimum=min(numbers) if whole else None,
        maximum=max(numbers) if whole else None,
    )


def _value_as_text(value: Any) -> str:
    if isinstance(value, list):
        return "\\".join(_value_as_text(part) for part in value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def render_tag(found: TagValues, console: Console) -> None:
    """Print an attribute's values, a line per series, for a person; tidy from 80 columns on."""
    from rich.text import Text

    where = "" if found.place == "headers" else f" (from /{found.place})"
    console.print(Text(f"{found.keyword}{where} in {printable(found.path)}"), highlight=False)
    table = _table("series", "patient", "modality", "values (slices)", "slices", numbers=1)
    for s in found.series:
        row = (str(s.series), s.patient_id, s.modality, _values_as_text(s))
        table.add_row(*(Text(printable(text)) for text in row), f"{s.slices:,}")
    console.print(table, highlight=False, markup=False)


def _values_as_text(values: SeriesValues) -> str:
    if values.distinct > LISTED_VALUES and values.minimum is not None:
        texts = [f"{values.minimum:.10g} to {values.maximum:.10g}, {values.distinct:,} values"]
    else:
        texts = [f"{text} ({count:,})" for text, count in values.values[:LISTED_VALUES]]
        if values.distinct > LISTED_VALUES:
            texts.append(f"{values.distinct - LISTED_VALUES:,} more")
    return ", ".join(texts + ([f"none ({values.missing:,})"] if values.missing else []))


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
    colour = f" x {i.samples} samples" if i.samples > 1 else ""
    drawn = f", {i.annotated_slices:,} annotated, {i.outlined_slices:,} drawn on"
    facts = [
        ("file", i.path),
        ("format", f"version {i.format_version}, from {i.source}"),
        ("identity", _identity(i)),
        ("slices", f"{i.slices:,} of {i.rows} x {i.columns}{colour}{drawn}"),
        ("patients", f"{i.patients:,} with {i.series:,} series{_modalities(i)}"),
        ("volumes", _volumes(i)),
        ("split", _split(i)),
        ("images", f"{i.image_dtype}{low_high}"),
        ("masks", f"{i.mask_dtype}, rule {i.rule}, contour origin {i.contour_origin:g}"),
        *([("marks", f"{i.marks:,} single points, in no mask")] if i.marks else []),
        ("size", _size(i)),
        *_grid(i),
        (
            "thickness",
            _counts((_millimetres(t.thickness), t.slices) for t in i.slice_thicknesses),
        ),
    ]
    decoders = ", ".join(f"{uid} by {decoder}" for uid, decoder in i.decoders.items())
    return facts + ([("decoded", decoders)] if decoders else [])


def _identity(i: Inspection) -> str:
    if i.keep_identity:
        return "kept"
    names = {"running-number": "running numbers", "keyed-hash": "keyed hashes"}
    paths = ", paths hashed" if i.hashed_paths else ""
    return f"removed: {names.get(i.pseudonyms, i.pseudonyms)}, dates {i.dates}{paths}"


def _modalities(i: Inspection) -> str:
    texts = ", ".join(f"{name or 'unknown'} {count:,}" for name, count in i.modalities.items())
    return f" ({texts})" if texts else ""


def _volumes(i: Inspection) -> str:
    odd = f", {i.irregular_volumes:,} with gaps or without positions" if i.irregular_volumes else ""
    if i.slice_distance is None:
        return f"{i.volumes:,}{odd}"
    low, high = i.slice_distance.minimum, i.slice_distance.maximum
    apart = _millimetres(low) if low == high else f"{low:.7g} to {high:.7g} mm"
    return f"{i.volumes:,}, slices {apart} apart{odd}"


def _split(i: Inspection) -> str:
    parts = (f"{name} {n.patients:,} ({n.slices:,} slices)" for name, n in i.split.items())
    return ", ".join(parts) or "none"


def _grid(i: Inspection) -> list[tuple[str, str]]:
    """Spacing, and what became of size and spacing of the input where they are others."""
    stored, source = (
        _counts((_millimetres(s.between_rows, s.between_columns), s.slices) for s in spacings)
        for spacings in (i.pixel_spacings, i.source_pixel_spacings)
    )
    sizes = _counts((f"{s.rows} x {s.columns}", s.slices) for s in i.source_sizes)
    lines = [("spacing", stored)]
    if source != stored:
        lines.append(("was", source))
    if {(s.rows, s.columns) for s in i.source_sizes} != {(i.rows, i.columns)}:
        lines.append(("size was", sizes))
    if i.cropped_pixels:
        lines.append(("cropped", f"{i.cropped_pixels:,} pixels of masks"))
    return lines


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

    table = _table(
        "structure", "annotated", "drawn", "area in", "smallest", "median", "largest", numbers=6
    )
    for s in inspection.structures:
        counts = (f"{s.annotated:,}", f"{s.outlined:,}")
        table.add_row(Text(printable(s.name)), *counts, "pixels", *_spread_as_text(s.area))
        table.add_row("", "", "", "mm2", *_spread_as_text(s.area_mm2))
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
