"""What a person or a program sees: inventories, summaries, JSON and progress, all as text."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.deidentify import class_uid, cleaned
from parallel_dicomseg.dicom.decoders import DECODERS, missing_decoders
from parallel_dicomseg.geometry import normal_of
from parallel_dicomseg.records import (
    Bytes,
    Cohort,
    Problem,
    Progress,
    Reason,
    SliceTable,
    Summary,
    Update,
)
from parallel_dicomseg.report.inspection import LISTED_PROBLEMS, printable
from parallel_dicomseg.split import PARTS

Watch = Callable[[Progress], None]

#: Plain progress lines are at least this far apart, seconds (the first and the last always come).
LINE_SECONDS = 2.0
_STRUCTURES_PER_LINE = 6


#: How many different sizes, spacings and the like are named.
NAMED_VALUES = 6


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is of something."""

    images: int
    volumes: int
    patients: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a scan found, counted. No identity but in the paths of problems."""

    source: str
    patients: int
    studies: int
    series: int
    volumes: int
    images: int
    """Images to convert."""
    modalities: dict[str, int]
    """Images by modality; '' where the file has none."""
    sizes: dict[str, int]
    """Images by 'rows x columns'."""
    pixel_spacings: dict[str, int]
    """Images by 'between rows x between columns', mm."""
    slice_distances: dict[str, int]
    """Volumes by the median distance between their slices, mm along the normal."""
    transfer_syntaxes: dict[str, int]
    """Images by the name of the transfer syntax."""
    missing_decoders: dict[str, str]
    """What to install, by the name of each transfer syntax that cannot be decoded here."""
    structures: dict[str, Extent]
    """Where each structure is drawn, in bit order."""
    spelled: dict[str, tuple[str, ...]]
    """What the files call each structure."""
    other_structures: dict[str, int]
    """Annotations of structures that are not converted."""
    looked_for: dict[str, int]
    """Images on which somebody looked for each structure, drawn or not."""
    split: dict[str, Extent]
    """By part, also one without patients; empty without a split."""
    found_by: dict[str, int]
    """Annotations by the way in which their images were found."""
    annotations_without_images: int
    """Files and structures of which something lies on no image."""
    images_without_annotation: int
    """Series, or patients, of which nothing is converted."""
    problems: tuple[Problem, ...]


def take_inventory(cohort: Cohort) -> Inventory:
    """Count what is in a cohort."""
    slices, reasons = cohort.slices, Counter(problem.reason for problem in cohort.problems)
    syntaxes = Counter(_texts(slices.transfer_syntax_uid))
    drawn, looked_for = _structures(cohort)
    return Inventory(
        source=cohort.source,
        patients=_different(slices.patient_id),
        studies=_different(slices.study_instance_uid),
        series=_different(slices.series_instance_uid),
        volumes=_different(slices.volume),
        images=len(slices),
        modalities=_most_common(_codes(slices.modality)),
        sizes=_most_common(map("{} x {}".format, slices.rows, slices.columns)),
        pixel_spacings=_most_common(map(_spacing_text, slices.pixel_spacing.tolist())),
        slice_distances=_most_common(map(_distance_text, _slice_distances(slices))),
        transfer_syntaxes={_syntax_name(uid): count for uid, count in syntaxes.most_common()},
        missing_decoders=undecodable(slices),
        structures=drawn,
        spelled=cohort.spelled,
        other_structures=cohort.unmatched,
        looked_for=looked_for,
        split=_parts(slices),
        found_by=cohort.found_by,
        annotations_without_images=(
            reasons[Reason.ANNOTATION_WITHOUT_IMAGES] + reasons[Reason.CONTOUR_WITHOUT_IMAGE]
        ),
        images_without_annotation=reasons[Reason.IMAGES_WITHOUT_ANNOTATION],
        problems=cohort.problems,
    )


def _texts(column: Bytes) -> list[str]:
    return [os.fsdecode(value) for value in column.tolist()]


def _codes(column: Bytes) -> list[str]:
    """Code strings; '' for what somebody typed in their place."""
    values, code = np.unique(column, return_inverse=True)
    texts = [cleaned(value, "CS").decode() for value in values.tolist()]
    return [texts[k] for k in code.tolist()]


def _different(column: NDArray[Any]) -> int:
    return len(np.unique(column))


def _most_common(texts: Iterable[str]) -> dict[str, int]:
    return dict(Counter(texts).most_common())


def _spacing_text(spacing: list[float]) -> str:
    return "unknown" if math.isnan(spacing[0]) else f"{spacing[0]:.7g} x {spacing[1]:.7g} mm"


def _distance_text(distance: float | None) -> str:
    if distance is None:
        return "single slice"
    return "unknown" if math.isnan(distance) else f"{distance:.4g} mm"


def _syntax_name(uid: str) -> str:
    return DECODERS[uid].name if uid in DECODERS else class_uid(uid)


def undecodable(slices: SliceTable) -> dict[str, str]:
    """What to do, by the name of each transfer syntax that cannot be decoded here."""
    missing = missing_decoders(_texts(np.unique(slices.transfer_syntax_uid)))
    named = {_syntax_name(uid): what for uid, what in missing.items()}
    return {name: what.removeprefix(f"{name}: ") for name, what in named.items()}


def _slice_distances(slices: SliceTable) -> Iterator[float | None]:
    """The median distance of each volume's slices along its normal; None for a single one."""
    heads = np.flatnonzero(np.diff(slices.volume, prepend=-1))
    for rows in np.split(np.arange(len(slices)), heads[1:]):
        if len(rows) < 2:
            yield None
            continue
        normal = normal_of(slices.image_orientation_patient[rows[0]])
        yield float(np.median(np.abs(np.diff(slices.image_position_patient[rows] @ normal))))


def _extent(slices: SliceTable, rows: NDArray[Any]) -> Extent:
    return Extent(
        images=len(rows),
        volumes=_different(slices.volume[rows]),
        patients=_different(slices.patient_id[rows]),
    )


def _parts(slices: SliceTable) -> dict[str, Extent]:
    """How much is in each part of a split."""
    if not (slices.split != b"").any():
        return {}
    return {part: _extent(slices, np.flatnonzero(slices.split == part.encode())) for part in PARTS}


def _structures(cohort: Cohort) -> tuple[dict[str, Extent], dict[str, int]]:
    """Where each structure is drawn, and on how many images it was looked for."""
    slices, annotations = cohort.slices, cohort.annotations
    drawn: dict[str, Extent] = {}
    looked_for: dict[str, int] = {}
    for structure, name in enumerate(cohort.structures):
        rows = np.unique(annotations.slice[annotations.structure == structure])
        drawn[name] = _extent(slices, rows)
        looked = (slices.annotated >> np.uint64(min(structure, 63))) & np.uint64(1) != 0
        looked[rows] = True
        looked_for[name] = int(looked.sum())
    return drawn, looked_for


def render_inventory(inventory: Inventory) -> str:
    """An inventory for a person."""
    i = inventory
    facts = [
        ("source", i.source),
        ("patients", str(i.patients)),
        ("studies", str(i.studies)),
        ("series", str(i.series)),
        ("volumes", str(i.volumes)),
        ("images to convert", str(i.images)),
        ("modalities", _few({name or "unknown": n for name, n in i.modalities.items()})),
        ("sizes", _few(i.sizes)),
        ("pixel spacings", _few(i.pixel_spacings)),
        ("slice distances", _few(i.slice_distances)),
        ("transfer syntaxes", _few(i.transfer_syntaxes)),
        ("annotations found by", _few(i.found_by)),
        ("annotations without images", str(i.annotations_without_images or "none")),
        ("series without annotation", str(i.images_without_annotation or "none")),
        *(("not decodable here", f"{name}: {what}") for name, what in i.missing_decoders.items()),
    ]
    blocks = [columns_of_text(facts), _structure_table(i)]
    if i.split:
        rows = [(part, *_counted(extent)) for part, extent in i.split.items()]
        blocks.append(columns_of_text([("part", "images", "volumes", "patients"), *rows]))
    problems = [f"problems  {len(i.problems) or 'none'}"]
    for reason, same in _by_reason(i.problems).items():
        harmless = "" if same[0].is_rejection else " (harmless)"
        problems.append(f"{reason}: {len(same)}{harmless}")
        problems += [printable(f"  {p.path}: {p.detail}") for p in same[:LISTED_PROBLEMS]]
        if len(same) > LISTED_PROBLEMS:
            problems.append(f"  and {len(same) - LISTED_PROBLEMS} more, see --json")
    return "\n\n".join([*blocks, "\n".join(problems)])


def _structure_table(inventory: Inventory) -> str:
    if not inventory.structures:
        return "structures  none"
    rows = [
        (name, *_counted(extent), str(inventory.looked_for[name]), _called(name, inventory))
        for name, extent in inventory.structures.items()
    ]
    heading = ("structure", "images", "volumes", "patients", "looked for on images", "")
    table = columns_of_text([heading, *rows])
    if not inventory.other_structures:
        return table
    return f"{table}\n\nother structures, not converted  {_few(inventory.other_structures)}"


def _called(name: str, inventory: Inventory) -> str:
    """Other names that the files give a structure."""
    others = [called for called in inventory.spelled.get(name, ()) if called != name]
    return f"also {', '.join(map(repr, others))}" if others else ""


def _counted(extent: Extent) -> tuple[str, str, str]:
    return str(extent.images), str(extent.volumes), str(extent.patients)


def _few(counts: Mapping[str, int]) -> str:
    """The first few of what is counted."""
    more = len(counts) - NAMED_VALUES
    named = _counts(dict(list(counts.items())[:NAMED_VALUES]))
    return f"{named} and {more} more" if more > 0 else named


def summarize(record: Any) -> dict[str, Any]:
    """A record's fields and derived properties, for a program."""
    derived = [name for name, item in vars(type(record)).items() if isinstance(item, property)]
    return {name: getattr(record, name) for name in (*(f.name for f in fields(record)), *derived)}


def render_summary(summary: Summary) -> str:
    """A summary for a person."""
    structures = dict(zip(summary.structures, summary.annotated, strict=True))
    rate = f" ({summary.slices / summary.seconds:,.0f} slices/s)" if summary.seconds > 0 else ""
    rejected = [problem for problem in summary.problems if problem.is_rejection]
    harmless = [problem for problem in summary.problems if not problem.is_rejection]
    beside = {reason: len(found) for reason, found in _by_reason(harmless).items()}
    rows = [
        ("output", summary.output),
        ("slices", f"{summary.slices} of {summary.rows} x {summary.columns} pixels"),
        ("patients", str(summary.patients)),
        *_structure_rows(structures),
        *(("images" if k == 0 else "", note) for k, note in enumerate(summary.notes)),
        *(
            [("resumed", f"{summary.resumed} slices were finished before")]
            if summary.resumed
            else []
        ),
        *_update_rows(summary.update),
        ("size", size_text(summary.bytes_written)),
        ("time", f"{summary.seconds:.2f} s{rate}"),
        ("flagged", "" if summary.flagged else "nothing"),
        *((f"  {flag}", str(count)) for flag, count in summary.flagged.items()),
        *([("harmless", _counts(beside))] if beside else []),
        ("rejected", str(len(rejected) or "nothing")),
    ]
    return "\n".join(
        [columns_of_text(rows), *_listed(rejected, summary.output), *_verdict(summary)]
    )


def _structure_rows(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """One line for a few structures, else a line for each."""
    if len(counts) <= _STRUCTURES_PER_LINE:
        return [("structures", _counts(counts))]
    heading = ("structures", f"{len(counts)}, and the slices on which they are drawn")
    return [heading, *((f"  {name}", str(count)) for name, count in counts.items())]


def _resumed_rows(slices: int) -> list[tuple[str, str]]:
    return [("resumed", f"{slices} slices were finished before")] if slices else []


def _update_rows(update: Update | None) -> list[tuple[str, str]]:
    """What an update has found."""
    if update is None:
        return []
    counts = {
        "unchanged": update.unchanged,
        "added": update.added,
        "changed files": len(update.changed),
        "vanished": sum(update.vanished.values()),
    }
    rows = [("update", _counts(counts))]
    if update.reason:
        rows.append(("", f"nothing was taken over: {update.reason}"))
    files = [("changed" if k == 0 else "", path) for k, path in enumerate(update.changed)]
    if more := len(files) - LISTED_PROBLEMS:
        files[LISTED_PROBLEMS:] = [("", f"and {more} more, see --json")] if more > 0 else []
    if update.vanished:
        files.append(("vanished", _few(update.vanished)))
    return rows + files


def _listed(rejected: Sequence[Problem], output: str) -> list[str]:
    """The first few rejections, and how many more there are."""
    lines = [printable(f"  {p.reason}: {p.path}: {p.detail}") for p in rejected[:LISTED_PROBLEMS]]
    if more := len(rejected) - len(lines):
        lines.append(printable(f"  and {more} more, see `parallel-dicomseg inspect {output}`"))
    return lines


def _verdict(summary: Summary) -> list[str]:
    """Why the exit status is not 0."""
    if not summary.exit_status:
        return []
    allowed = f"{summary.max_rejected} allowed (--max-rejected)"
    return [f"exit status {summary.exit_status}: {summary.rejected} rejected, {allowed}"]


def _by_reason(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.reason].append(problem)
    return dict(sorted(groups.items()))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "nothing"


def columns_of_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells, made printable, the columns aligned on the left."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def size_text(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def print_json(value: Any) -> None:
    """Print records, mappings and arrays as JSON, in ASCII; NaN becomes null."""
    click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """What json can write: records and arrays taken apart, NaN and infinity as null."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes | os.PathLike):
        return os.fsdecode(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def watching() -> Iterator[Watch]:
    """Someone to tell the progress to: bars on a terminal, a few plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield PlainLines(lambda line: click.echo(line, err=True))
        return
    from rich import progress as bars  # 0.1 s to import, and only a terminal needs it
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description:8}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as display:
        shown: dict[str, bars.TaskID] = {}

        def watch(event: Progress) -> None:
            if event.stage not in shown:
                shown[event.stage] = display.add_task(event.stage, total=event.total, rate="")
            task = shown[event.stage]
            speed = display.tasks[task].finished_speed or display.tasks[task].speed
            rate = f"{speed:,.0f} slices/s" if speed else ""
            display.update(task, completed=event.done, total=event.total, rate=rate)

        yield watch


@dataclass(slots=True)
class PlainLines:
    """Tells progress in lines: the first event, the last, and 10 % steps that are not too close."""

    write: Callable[[str], object]
    clock: Callable[[], float] = time.monotonic
    first: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By stage: when its first event came (seconds of the clock), and how much was done then."""
    last: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By stage: when its last line was written, and how many tenths were done then."""

    def __call__(self, event: Progress) -> None:
        """Write a line for an event, or nothing."""
        now = self.clock()
        begun, done = self.first.setdefault(event.stage, (now, event.done))
        tenths = 10 * event.done // event.total if event.total else 10
        time_of_last, tenths_of_last = self.last.get(event.stage, (-math.inf, -1))
        rested = now - time_of_last >= LINE_SECONDS or tenths == 10
        if tenths > tenths_of_last and rested:
            self.last[event.stage] = (now, tenths)
            self.write(progress_line(event, event.done - done, now - begun))


def progress_line(event: Progress, done: int, seconds: float) -> str:
    """An event in words; `done` slices took `seconds`."""
    line = f"{event.stage}: {event.done:,} of {event.total:,}"
    if not (done > 0 and seconds > 0):
        return line
    left = (event.total - event.done) * seconds / done
    remaining = f", {left:.0f} s left" if event.done < event.total else ""
    return f"{line}, {done / seconds:,.0f} slices/s{remaining}"
