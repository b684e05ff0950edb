"""What the examples share: a small file with known structures, and how a falling loss is shown."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel_dicomseg import ConvertOptions, convert_cohort, scan_cohort
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

#: Intensities between which the synthetic hearts lie; they become 0 … 1.
WINDOW = (0.0, 1000.0)
STRUCTURES = ("i",)
BATCH_SIZE = 8


def make_file(folder: str | Path, *, rows: int = 64, columns: int = 64) -> Path:
    """Convert a synthetic cohort of 4 patients with 8 slices each; where its file lies."""
    folder = Path(folder)
    make_sunnybrook_cohort(
        folder / "final_data", patients=4, slices=8, rows=rows, columns=columns, seed=1
    )
    output = folder / "cohort.h5"
    convert_cohort(
        scan_cohort(folder / "final_data"),
        output,
        options=ConvertOptions(scheduler="synchronous"),
    )
    return output


def fell(losses: Sequence[float]) -> bool:
    """Whether the last quarter of the losses lies below the first one."""
    quarter = max(len(losses) // 4, 1)
    return statistics.mean(losses[-quarter:]) < statistics.mean(losses[:quarter])


def main(train: Callable[[Path, int], list[float]], description: str | None) -> None:
    """Train on a given or a synthetic file, and print how the loss falls."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="a converted file [a synthetic one]")
    parser.add_argument("--steps", type=int, default=40, help="steps to train [40]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        losses = train(arguments.file or make_file(folder), arguments.steps)
    every = max(len(losses) // 8, 1)
    for step in range(0, len(losses), every):
        print(f"step {step:4}  loss {losses[step]:.4f}")
    print(f"step {len(losses) - 1:4}  loss {losses[-1]:.4f}")
    if not fell(losses):
        raise SystemExit("the loss did not fall")
