"""The demo: a small cohort whose truth is known, converted, checked against it, read and drawn."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort, warm_up
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader import iterate_batches
from parallel_dicomseg.records import Cohort, ConvertOptions, Float64, Progress, Summary
from parallel_dicomseg.report.figures import contact_sheet
from parallel_dicomseg.report.inspection import printable
from parallel_dicomseg.store import Dataset, open_dataset, verify_file
from parallel_dicomseg.synthetic import SyntheticOutline, SyntheticTruth, make_sunnybrook_cohort
from parallel_dicomseg.terminal import columns_of_text, size_text

#: Lies in every directory that the demo made; without it nothing is touched.
MARKER = ".parallel_dicomseg_demo"
COHORT = "final_data"
OUTPUT = "cohort.h5"
PICTURE = "contact_sheet.png"

PATIENTS, SLICES, ROWS, COLUMNS, SEED = 4, 8, 192, 192, 0
BATCH_SIZE = 8
#: A mask may differ from its outline's area by this times the outline's length: the pixel centres
#: near an outline fall on either side by chance, an outline half a pixel off would give 0.5.
AREA_PER_LENGTH = 0.125
#: How far a mask's centre may lie from its outline's, pixels.
CENTRE_PIXELS = 0.2


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did and found."""

    directory: str
    summary: Summary
    verification_problems: tuple[str, ...]
    outlines: int
    """Outlines whose truth is known."""
    off_truth: tuple[str, ...]
    """Outlines whose mask has not the area and the centre that it must have."""
    area_off_percent: float
    """All masks together against all outlines together."""
    centre_off_pixels: float
    """The worst mask."""
    batches: int
    samples: int
    picture: str
    """File name in the directory, or '' where matplotlib is missing."""
    seconds_compiling: float
    """What the first run on a machine costs; later runs load what it compiled."""
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether everything is as it must be."""
        wrong = self.verification_problems or self.off_truth or self.summary.rejected
        return not wrong and self.samples == self.summary.slices


def run_demo(directory: str | Path, *, progress: Callable[[Progress], None] | None = None) -> Demo:
    """Make a cohort in `directory`, convert it, check it, read it and draw it.

    Parameters
    ----------
    directory
        Is made. A directory of an earlier demo is used again and its files are replaced; whatever
        else lies in it stays.
    progress
        Called with the slices done so far.

    Raises
    ------
    ConfigurationError
        The directory holds something and was not made by the demo.
    """
    start = time.perf_counter()
    folder = Path(directory)
    _prepare(folder)
    truth = make_sunnybrook_cohort(
        folder / COHORT, patients=PATIENTS, slices=SLICES, rows=ROWS, columns=COLUMNS, seed=SEED
    )
    compiling = warm_up()
    cohort = scan_cohort(folder / COHORT, progress=progress)
    output = folder / OUTPUT
    summary = convert_cohort(
        cohort, output, options=ConvertOptions(overwrite=True), progress=progress
    )
    verification = verify_file(output, progress=progress)
    with open_dataset(output) as dataset:
        expected, found = _shapes(dataset, cohort, truth)
        served = [len(batch.index) for batch in iterate_batches(dataset, BATCH_SIZE, seed=SEED)]
        picture = _draw(dataset, folder / PICTURE)
    return Demo(
        directory=str(directory),
        summary=summary,
        verification_problems=verification.problems,
        outlines=len(truth.outlines),
        off_truth=off_truth(truth.outlines, expected, found),
        area_off_percent=float(100 * (found[:, 0].sum() / expected[:, 0].sum() - 1)),
        centre_off_pixels=float(np.hypot(*(found - expected)[:, 1:].T).max()),
        batches=len(served),
        samples=sum(served),
        picture=picture,
        seconds_compiling=compiling,
        seconds=time.perf_counter() - start,
    )


def _prepare(folder: Path) -> None:
    """Make the directory, or clear an earlier demo's files out of it."""
    marker = folder / MARKER
    if folder.exists() and not marker.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"{folder} exists and was not made by this command; name another directory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    if (folder / COHORT).exists():
        shutil.rmtree(folder / COHORT)
    for name in (OUTPUT, PICTURE):
        (folder / name).unlink(missing_ok=True)


# --- against the truth


def _shapes(dataset: Dataset, cohort: Cohort, truth: SyntheticTruth) -> tuple[Float64, Float64]:
    """(outlines, 3) area, column and row of the centre: of the polygons, and of their masks."""
    row_of = {path.decode(): row for row, path in enumerate(cohort.slices.path.tolist())}
    expected, found = [], []
    for outline in truth.outlines:
        mask = dataset.masks[row_of[outline.image_path]]
        bit = mask.dtype.type(dataset.structures.index(outline.structure))
        expected.append(shape_of_polygon(outline.polygon_column_row))
        found.append(shape_of_mask((mask >> bit) & 1))
    return np.array(expected), np.array(found)


def shape_of_polygon(points_column_row: Float64) -> Float64:
    """Area, and column and row of the centre of mass, of a simple polygon (n, 2), in pixels."""
    here, there = points_column_row, np.roll(points_column_row, -1, axis=0)
    cross = here[:, 0] * there[:, 1] - there[:, 0] * here[:, 1]
    area = cross.sum() / 2
    centre = ((here + there) * cross[:, None]).sum(axis=0) / (6 * area)
    return np.array([abs(area), *centre])


def shape_of_mask(mask: NDArray[Any]) -> Float64:
    """Pixels, and mean column and row, of a mask (rows, columns) of 0 and 1."""
    row, column = np.nonzero(mask)
    centre = (column.mean(), row.mean()) if len(row) else (np.nan, np.nan)
    return np.array([len(row), *centre], np.float64)


def off_truth(
    outlines: tuple[SyntheticOutline, ...], expected: Float64, found: Float64
) -> tuple[str, ...]:
    """A sentence for each outline whose mask is too large, too small or beside it."""
    wrong = []
    for outline, truth, mask in zip(outlines, expected, found, strict=True):
        edges = np.diff(outline.polygon_column_row, axis=0, append=outline.polygon_column_row[:1])
        allowed = AREA_PER_LENGTH * np.hypot(*edges.T).sum()
        beside = np.hypot(*(mask - truth)[1:])
        # Written so that NaN, the centre of an empty mask, is wrong.
        if not (abs(mask[0] - truth[0]) <= allowed and beside <= CENTRE_PIXELS):
            wrong.append(
                f"{outline.path}: the mask has {mask[0]:.0f} pixels, its outline encloses "
                f"{truth[0]:.1f}; their centres are {beside:.3f} pixels apart"
            )
    return tuple(wrong)


# --- pictures and words


def _draw(dataset: Dataset, path: Path) -> str:
    """Save a contact sheet of all slices with both structures; its name, or ''."""
    if find_spec("matplotlib") is None:
        return ""
    rows = np.flatnonzero(dataset.column("structure_annotated").all(axis=1)).tolist()
    patients = dataset.column("patient_id")
    contact_sheet(
        np.stack([dataset.images[row] for row in rows]),
        np.stack([dataset.masks[row] for row in rows]),
        dataset.structures,
        [f"{patients[row].decode()}, slice {row}" for row in rows],
        path,
        pixel_spacing=dataset.column("pixel_spacing")[rows],
    )
    return path.name


def render_demo(demo: Demo) -> str:
    """The demo for a person: what was done, what was found, and where everything lies."""
    summary = demo.summary
    known = f"{demo.outlines} outlines on {summary.slices} images of {summary.patients} patients"
    rejected = summary.rejected or "nothing"
    off = f"{len(demo.off_truth) or 'no'} masks off their outlines"
    area, centre = f"{demo.area_off_percent:+.3f} %", f"{demo.centre_off_pixels:.3f} pixels"
    steps = [
        ("made", f"{known}, known exactly"),
        ("compiled", f"in {demo.seconds_compiling:.1f} s; later runs load what the first compiled"),
        ("converted", f"{summary.slices} slices in {summary.seconds:.2f} s, {rejected} rejected"),
        ("verified", f"{len(demo.verification_problems) or 'no'} problems in the file"),
        ("compared", f"{off}; area of all {area}, centre of the worst {centre}"),
        ("served", f"{demo.samples} samples in {demo.batches} shuffled batches"),
        ("drawn", demo.picture or 'nothing: pip install "parallel_dicomseg[figures]" for that'),
    ]
    wrong = map(printable, (*demo.verification_problems, *demo.off_truth))
    following = f"next: parallel-dicomseg inspect {Path(demo.directory, OUTPUT)}"
    lines = [columns_of_text(steps), *wrong, "", *_tree(demo), "", printable(following)]
    return "\n".join(lines)


def _tree(demo: Demo) -> list[str]:
    """Where everything lies."""
    size = size_text(demo.summary.bytes_written)
    entries = [
        (f"    {COHORT}/", "the cohort: dicoms/, contourfiles/, link.csv"),
        (f"    {OUTPUT}", f"images, masks and their table, {size}"),
        *([(f"    {demo.picture}", "masks over images")] if demo.picture else []),
    ]
    return [printable(f"{demo.directory}/"), columns_of_text(entries)]
