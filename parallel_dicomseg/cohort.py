"""Find the files of a cohort, read their headers in parallel, pair images with outlines."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parallel_dicomseg.dicom import scan_headers
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import Cohort, Problem, Progress, ScanOptions, SliceTable
from parallel_dicomseg.sources import Listing, choose_source

#: How many problems are named where nothing is left to convert.
NAMED_PROBLEMS = 3
# Files per header call: enough to make the GIL rare, few enough for a smooth progress bar.
_FILES_PER_CALL = 512


def scan_cohort(
    data_directory: str | Path,
    *,
    options: ScanOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Cohort:
    """Find the images and the outlines of a cohort and pair them; reads headers only.

    Parameters
    ----------
    data_directory
        The root of the cohort. Nothing outside it is opened.
    options
        What to look for.
    progress
        Called with the files done so far.

    Returns
    -------
    The images to convert in the order of the output, their outlines, and a Problem for everything
    that does not belong together.

    Raises
    ------
    LayoutError
        The directory is missing, empty or not laid out as any source knows, or nothing in it
        belongs together; then the first problems are named.
    ConfigurationError
        An option names a source or a structure that is not there.
    """
    options = options or ScanOptions()
    root = Path(data_directory)
    source = choose_source(root, options.source)
    listing = source.list_files(root, options)
    if not listing.image_paths:
        raise _nothing_left(f"{root}: no image file to convert was found", listing.problems)
    slices, unread = _read_headers(root, listing, options.workers or os.cpu_count() or 1, progress)
    paired = source.pair(listing, slices, options)
    problems = {*listing.problems, *unread, *paired.problems}
    if not len(paired.slice_index):
        found = (
            f"{len(listing.image_paths)} possible image(s), {len(slices)} of them readable, "
            f"and {len(listing.outlines)} outline(s)"
        )
        raise _nothing_left(f"{root}: nothing to convert among {found}", problems)
    return Cohort(
        root=str(root.resolve()),
        source=source.name,
        include_unannotated=options.include_unannotated,
        structures=paired.structures,
        nested=paired.nested,
        slices=slices.take(paired.slice_index),
        contours=paired.contours,
        problems=tuple(
            sorted(problems, key=lambda problem: (problem.path, problem.reason, problem.detail))
        ),
    )


def _nothing_left(message: str, problems: Collection[Problem]) -> LayoutError:
    """Nothing to convert, and what stood in the way: rejections before what is harmless."""
    first = sorted(problems, key=lambda p: (not p.is_rejection, p.path, p.detail))
    named = [f"{problem.path}: {problem.detail}" for problem in first[:NAMED_PROBLEMS]]
    if not named:
        return LayoutError(message)
    more = [f"and {len(first) - len(named)} more"] if len(first) > len(named) else []
    return LayoutError(f"{message}; {len(first)} problem(s): {'; '.join([*named, *more])}")


def _read_headers(
    root: Path,
    listing: Listing,
    workers: int,
    progress: Callable[[Progress], None] | None,
) -> tuple[SliceTable, list[Problem]]:
    paths, patients = listing.image_paths, listing.image_patients
    tables: list[SliceTable] = []
    problems: list[Problem] = []
    starts = range(0, len(paths), _FILES_PER_CALL)
    with ThreadPoolExecutor(workers) as pool:
        blocks = pool.map(
            lambda start: scan_headers(
                root,
                paths[start : start + _FILES_PER_CALL],
                patients[start : start + _FILES_PER_CALL],
            ),
            starts,
        )
        for start, (table, unread) in zip(starts, blocks, strict=True):
            tables.append(table)
            problems += unread
            if progress:
                done = min(start + _FILES_PER_CALL, len(paths))
                progress(Progress("scan", done, len(paths)))
    return SliceTable.concatenate(tables), problems
