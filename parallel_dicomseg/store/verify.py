"""Check a finished file: everything decodes, and the table tells the truth about the pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.checks import measure_intensity, measure_masks
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.records import Progress
from parallel_dicomseg.store.dataset import Dataset, open_dataset

_SLICES_PER_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_file` found."""

    path: str
    slices: int
    """Slices looked at."""
    problems: tuple[str, ...]
    """One sentence each; empty when the file is what it should be."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify_file(
    path: str | Path, *, progress: Callable[[Progress], None] | None = None
) -> Verification:
    """Decode every chunk and compare the table's measurements with the pixels.

    Raises
    ------
    LayoutError
        The file cannot be opened as one of ours.
    """
    with open_dataset(path) as dataset:
        problems = _check_shapes(dataset)
        if not problems:
            starts = range(0, len(dataset), _SLICES_PER_BLOCK)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                blocks = pool.map(lambda start: _check_block(dataset, start), starts)
                for start, found in zip(starts, blocks, strict=True):
                    problems += found
                    if progress:
                        done = min(start + _SLICES_PER_BLOCK, len(dataset))
                        progress(Progress("verify", done, len(dataset)))
        return Verification(str(path), len(dataset), tuple(problems))


def _check_shapes(dataset: Dataset) -> list[str]:
    problems = []
    if dataset.masks.shape != dataset.images.shape:
        problems.append(f"/masks is {dataset.masks.shape}, /images is {dataset.images.shape}")
    size = dataset.path.stat().st_size
    for array in (dataset.images, dataset.masks):
        problems += [f"{array.name}[{row}] is missing" for row in np.flatnonzero(array.sizes == 0)]
        beyond = np.flatnonzero(array.offsets + array.sizes > size)
        problems += [f"{array.name}[{row}] lies beyond the end of the file" for row in beyond]
    for name in dataset.columns():
        rows = len(dataset.column(name))
        if rows != len(dataset):
            problems.append(f"/table/{name} has {rows} rows, /images has {len(dataset)}")
    return problems


def _check_block(dataset: Dataset, start: int) -> list[str]:
    rows = range(start, min(start + _SLICES_PER_BLOCK, len(dataset)))
    images = np.zeros((len(rows), *dataset.shape[1:]), dataset.image_dtype)
    masks = np.zeros((len(rows), *dataset.shape[1:]), dataset.mask_dtype)
    problems = []
    for k, row in enumerate(rows):
        try:
            dataset.images.read_into(row, images[k])
            dataset.masks.read_into(row, masks[k])
        except LayoutError as error:
            problems.append(str(error))
    return problems or _check_measurements(dataset, rows, images, masks)


def _check_measurements(
    dataset: Dataset, rows: range, images: NDArray[Any], masks: NDArray[Any]
) -> list[str]:
    here = slice(rows.start, rows.stop)
    annotated = dataset.column("structure_annotated")[here]
    area, _, _ = measure_masks(masks, annotated, dataset.nested)
    measured = {"area": area, "intensity": measure_intensity(images)}
    problems = []
    for name, values in measured.items():
        stored = dataset.column(name)[here]
        same = (values == stored) | (np.isnan(values) & np.isnan(stored))
        problems += [
            f"/table/{name}[{rows[k]}] is {stored[k].tolist()}, the pixels give "
            f"{values[k].tolist()}"
            for k in np.flatnonzero(~same.all(axis=1))
        ]
    used = sum(1 << bit for bit in range(len(dataset.structures)))
    stray = (masks & ~masks.dtype.type(used)).any(axis=(1, 2))
    problems += [f"/masks[{rows[k]}] has bits beyond its structures" for k in np.flatnonzero(stray)]
    return problems
