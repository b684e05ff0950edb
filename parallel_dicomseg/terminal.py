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

from parallel_dicomseg.records import Cohort, Problem, Progress, Summary
from parallel_dicomseg.report.inspection import LISTED_PROBLEMS, printable

Watch = Callable[[Progress], None]

#: Plain progress lines are at least this far apart, seconds (the first and the last always come).
LINE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a scan found, counted."""

    source: str
    images: int
    """Images to convert."""
    patients: int
    series: int
    sizes: dict[str, int]
    """Images by 'rows x columns'."""
    pixel_spacings: dict[str, int]
    """Images by 'between rows x between columns', mm."""
    structures: dict[str, int]
    """Images with an outline, by structure, in bit order."""
    problems: tuple[Problem, ...]


def take_inventory(cohort: Cohort) -> Inventory:
    """Count what is in a cohort."""
    slices, contours = cohort.slices, cohort.contours
    spacing = [
        "unknown" if math.isnan(row[0]) else f"{row[0]:.7g} x {row[1]:.7g} mm"
        for row in slices.pixel_spacing.tolist()
    ]
    sizes = [
        f"{r} x {c}" for r, c in zip(slices.rows.tolist(), slices.columns.tolist(), strict=True)
    ]
    return Inventory(
        source=cohort.source,
        images=len(slices),
        patients=len(set(slices.patient_id.tolist())),
        series=len(set(slices.series_instance_uid.tolist())),
        sizes=dict(Counter(sizes).most_common()),
        pixel_spacings=dict(Counter(spacing).most_common()),
        structures={
            name: len(np.unique(contours.slice[contours.structure == bit]))
            for bit, name in enumerate(cohort.structures)
        },
        problems=cohort.problems,
    )


def render_inventory(inventory: Inventory) -> str:
    """An inventory for a person."""
    rows = [
        ("source", inventory.source),
        ("patients", str(inventory.patients)),
        ("series", str(inventory.series)),
        ("images to convert", str(inventory.images)),
        ("sizes", _counts(inventory.sizes)),
        ("pixel spacings", _counts(inventory.pixel_spacings)),
        ("structures", _counts(inventory.structures)),
        ("problems", str(len(inventory.problems) or "nothing")),
    ]
    lines = [columns_of_text(rows)]
    for reason, problems in _by_reason(inventory.problems).items():
        lines.append(f"{reason}: {len(problems)}")
        lines += [printable(f"  {p.path}: {p.detail}") for p in problems[:LISTED_PROBLEMS]]
        if len(problems) > LISTED_PROBLEMS:
            lines.append(f"  and {len(problems) - LISTED_PROBLEMS} more, see --json")
    return "\n".join(lines)


def summarize(record: Any) -> dict[str, Any]:
    """A record's fields and derived properties, for a program."""
    derived = [name for name, item in vars(type(record)).items() if isinstance(item, property)]
    return {name: getattr(record, name) for name in (*(f.name for f in fields(record)), *derived)}


def render_summary(summary: Summary) -> str:
    """A summary for a person."""
    structures = dict(zip(summary.structures, summary.annotated, strict=True))
    rate = f" ({summary.slices / summary.seconds:,.0f} slices/s)" if summary.seconds > 0 else ""
    rejected = [problem for problem in summary.problems if problem.is_rejection]
    beside = [problem for problem in summary.problems if not problem.is_rejection]
    rows = [
        ("output", summary.output),
        ("slices", f"{summary.slices} of {summary.rows} x {summary.columns} pixels"),
        ("patients", str(summary.patients)),
        ("structures", _counts(structures)),
        ("size", size_text(summary.bytes_written)),
        ("time", f"{summary.seconds:.2f} s{rate}"),
        ("flagged", "" if summary.flagged else "nothing"),
        *((f"  {flag}", str(count)) for flag, count in summary.flagged.items()),
        ("reported", _counts({r: len(found) for r, found in _by_reason(beside).items()})),
        ("rejected", str(len(rejected) or "nothing")),
    ]
    return "\n".join(
        [columns_of_text(rows), *_listed(rejected, summary.output), *_verdict(summary)]
    )


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
