"""The commands that read batches: `batches`, and the original's `hdf5_batch_loader`.

Plain functions with their options; `parallel_dicomseg.cli` makes commands of them, with its own
rules of statuses and errors. What is slow to import is imported when a command runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.config import LEGACY_CONFIG_FILE, LegacyConfig, read_legacy_config
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.private import FOLDER_MODE
from parallel_dicomseg.report.inspection import printable
from parallel_dicomseg.terminal import print_json

if TYPE_CHECKING:
    from parallel_dicomseg.loader import Batch, BatchLoader

#: What an image of --figure is augmented by where --augment names nothing.
SHOWN_AUGMENTATIONS = ("dihedral", "rotate", "zoom", "contrast")

#: Of an epoch's `Timings`: what the threads did, and how long the consumer waited.
STAGES = ("read", "decode", "augment", "blocked", "waited")

BATCHES_EPILOG = """\b
Example:
  parallel-dicomseg batches cohort.h5 --epochs 1 --print-indices
  parallel-dicomseg batches cohort.h5 --batch-size 64 --epochs 3 --benchmark
  parallel-dicomseg batches cohort.h5 --augment flip,noise --figure pictures"""

ORIGINAL_EPILOG = """\b
Example:
  hdf5_batch_loader --input_filename cohort.h5 --batchsize 16 --epochs 3
  hdf5_batch_loader --print_batch_indices --print_random_image"""


# --- parallel-dicomseg batches


@click.argument("file", type=click.Path())
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, metavar="N", help="Samples.  [default: 16]"
)
@click.option(
    "--epochs", type=click.IntRange(0), default=1, metavar="N", help="How often.  [default: 1]"
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, metavar="N", help="Of the order.  [default: 0]"
)
@click.option(
    "--split", default="", metavar="NAME", help="Only this part: train, validation or test."
)
@click.option(
    "--structures", multiple=True, metavar="NAME", help="Only these (i,o or repeated); none: all."
)
@click.option(
    "--masks",
    type=click.Choice(["channels", "labels", "bits"]),
    default="channels",
    show_default=True,
    help="A plane for each structure, a label map, or bit s for structure s.",
)
@click.option(
    "--augment", multiple=True, metavar="NAME", help="flip, rotate, noise, … (or repeated)."
)
@click.option("--threads", type=click.IntRange(0), default=0, metavar="N", help="0: one per core.")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Compare every chunk's checksum with the table's.  [default: where there is one]",
)
@click.option("--print-indices", is_flag=True, help="Print the rows of the file in each batch.")
@click.option("--figure", metavar="DIR", help="Save pictures of random samples in this folder.")
@click.option(
    "--figures",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="How many pictures.  [default: 1]",
)
@click.option("--benchmark", is_flag=True, help="Print samples/s and where the time goes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def batches(
    file: str,
    print_indices: bool,
    figure: str | None,
    figures: int,
    epochs: int,
    benchmark: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Read batches of a file in random order, as a training would, and say how that goes."""
    arguments = _loader_arguments(options)
    reports = []
    with _open_loader(file, **arguments) as loader:
        if not as_json:
            click.echo(printable(_headline(file, loader, arguments["batch_size"])))
        for _ in range(epochs):
            report = _read_epoch(loader, print_indices=print_indices or as_json)
            reports.append(report)
            if not as_json:
                _tell_epoch(report, print_indices=print_indices, benchmark=benchmark)
    chosen = options["augment"] and arguments["augment"]
    saved = _save_figures(file, figure, figures, options["seed"], chosen) if figure else []
    if as_json:
        kept = reports if print_indices else [_without(report, "indices") for report in reports]
        print_json({"file": file, "epochs": kept, "figures": saved})
        return
    for path in saved:
        click.echo(printable(f"figure {path}"))


def _loader_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The command's options as the loader's arguments."""
    return {
        **{name: options[name] for name in ("batch_size", "seed", "split", "masks")},
        **{name: options[name] for name in ("threads", "verify")},
        "structures": _names(options["structures"]) or None,
        "augment": _names(options["augment"]),
    }


def _names(values: tuple[str, ...]) -> tuple[str, ...]:
    """Names that were given one by one, with commas between them, or both."""
    parts = (part.strip() for value in values for part in value.split(","))
    return tuple(part for part in parts if part)


def _without(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key != name}


def _headline(file: str, loader: BatchLoader, batch_size: int) -> str:
    """What is about to be read."""
    return f"{file}: {loader.samples} samples, {len(loader)} batches of {batch_size} in an epoch"


def _read_epoch(loader: BatchLoader, *, print_indices: bool) -> dict[str, Any]:
    """One epoch with nothing done to its batches: what was in it and how long it took."""
    indices: list[list[int]] = []
    shapes: dict[str, str] = {}
    number, count, samples = 0, 0, 0
    start = time.perf_counter()
    for batch in loader:
        number, count, samples = batch.epoch, count + 1, samples + len(batch.index)
        shapes = shapes or {name: _shape(getattr(batch, name)) for name in ("image", "mask")}
        if print_indices:
            indices.append(batch.index.tolist())
    seconds = time.perf_counter() - start
    return {
        "epoch": number,
        "batches": count,
        "samples": samples,
        **shapes,
        "indices": indices,
        "seconds": seconds,
        "samples_per_second": samples / seconds if seconds > 0 else None,
        "timings": asdict(loader.timings[-1]) if loader.timings else {},
        "advice": loader.advice,
    }


def _shape(array: NDArray[Any]) -> str:
    return f"({', '.join(map(str, array.shape))}) {array.dtype}"


def _tell_epoch(report: Mapping[str, Any], *, print_indices: bool, benchmark: bool) -> None:
    """One epoch for a person."""
    words = f"epoch {report['epoch']}: {report['batches']} batches, {report['samples']} samples"
    click.echo(f"{words}, image {report['image']}, mask {report['mask']}")
    for index in report["indices"] if print_indices else ():
        click.echo(f"  {' '.join(map(str, index))}")
    if benchmark:
        times = report["timings"]
        seconds = ", ".join(f"{name} {times[name]:.3f} s" for name in STAGES)
        click.echo(f"  {report['samples_per_second']:,.0f} samples/s; {seconds}")
        click.echo(f"  {report['advice']}")


# --- the original's hdf5_batch_loader


@click.option("--input_filename", metavar="F", help="The HDF5 file.  [default: from ./config.ini]")
@click.option(
    "--batchsize",
    type=click.IntRange(1),
    metavar="B",
    help="Samples in a batch.  [default: from ./config.ini]",
)
@click.option(
    "--epochs",
    type=click.IntRange(0),
    metavar="E",
    help="How often to go through the file.  [default: from ./config.ini]",
)
@click.option(
    "--print_random_image",
    is_flag=True,
    help="Save a figure of one random image, augmented and with its mask.",
)
@click.option(
    "--print_batch_indices", is_flag=True, help="Print the sorted rows of the file in each batch."
)
@click.option("--seed", type=click.IntRange(0), help="Makes order and choice repeatable.")
def original_batch_loader(
    input_filename: str | None,
    batchsize: int | None,
    epochs: int | None,
    print_random_image: bool,
    print_batch_indices: bool,
    seed: int | None,
) -> None:
    """Go through a file of images and masks in random batches, as the original script did.

    Settings come from ./config.ini (section [local]: HDF5_FILENAME, BATCH_SIZE, NUM_EPOCHS) where
    there is one. Reads our files, and any HDF5 file with the original's `input` and `output`.
    Indices are printed sorted, as the original's were; `parallel-dicomseg batches` prints them in
    the order in which the samples come.
    """
    legacy = _legacy_config(input_filename)
    file = input_filename or legacy.hdf5_filename
    size, count = batchsize or legacy.batch_size, legacy.num_epochs if epochs is None else epochs
    # The original's order changed from run to run.
    chosen = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    with _open_loader(file, batch_size=size, seed=chosen, masks="bits", channels="last") as loader:
        click.echo(_original_facts(loader, size, count))
        for epoch in range(1, count + 1):
            click.echo(f"********** EPOCH {epoch} **************")
            for batch in loader:
                if print_batch_indices:
                    click.echo(str(np.sort(batch.index)))
    if print_random_image:
        for path in _save_figures(file, ".", 1, chosen, ()):
            click.echo(f"Figure is {printable(path)}")


def _legacy_config(input_filename: str | None) -> LegacyConfig:
    """./config.ini, or the defaults where there is none and they, with the flags, suffice."""
    file = Path(LEGACY_CONFIG_FILE)
    if file.is_file():
        return read_legacy_config(file)
    legacy = LegacyConfig()
    if input_filename is None and not Path(legacy.hdf5_filename).is_file():
        raise ConfigurationError(
            f"there is neither a {file} nor a file {legacy.hdf5_filename} here; "
            f"say which file to read with --input_filename"
        )
    return legacy


def _original_facts(loader: BatchLoader, batch_size: int, epochs: int) -> str:
    """What the original printed before its first epoch."""
    rows, columns, samples = loader.image_shape
    return "\n".join(
        [
            f"Number of images: {loader.samples}",
            f"Number of masks: {loader.samples}",
            f"Image size = ({rows}, {columns}, {samples}) pixels",
            f"Mask size = ({rows}, {columns}, 1) pixels",
            f"Batch size = {batch_size}",
            f"Number of epochs = {epochs}",
        ]
    )


# --- both


def _open_loader(file: str, **arguments: Any) -> BatchLoader:
    from parallel_dicomseg.loader import BatchLoader

    return BatchLoader(file, **arguments)


def _save_figures(
    file: str, folder: str, count: int, seed: int, augment: tuple[str, ...]
) -> list[str]:
    """Save numbered figures of random samples: as stored, augmented, and with the mask over it."""
    from parallel_dicomseg.report.figures import contact_sheet

    Path(folder).mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    saved = []
    for plain, changed, structures in _random_samples(file, count, seed, augment):
        path = _next_free(Path(folder), "random_image_{}.png")
        images, masks = _side_by_side(plain, changed)
        titles = [f"slice {int(plain.index[0])}", "augmented", "with its mask"]
        contact_sheet(images, masks, structures, titles, path)
        saved.append(str(path))
    return saved


def _random_samples(
    file: str, count: int, seed: int, augment: tuple[str, ...]
) -> Iterator[tuple[Batch, Batch, tuple[str, ...]]]:
    """The same random samples as they are and augmented, one at a time, and their structures."""
    common = {"batch_size": 1, "seed": seed, "masks": "bits", "channels": "last"}
    named = augment or SHOWN_AUGMENTATIONS
    with (
        _open_loader(file, **common) as stored,
        _open_loader(file, augment=named, **common) as augmented,
    ):
        for _, plain, changed in zip(range(count), stored, augmented, strict=False):
            yield plain, changed, stored.structures


def _side_by_side(plain: Batch, changed: Batch) -> tuple[NDArray[Any], NDArray[Any]]:
    """Three pictures (3, rows, columns) and their masks; a smaller one has black around it."""
    before, after = _grey(plain.image[0]), _grey(changed.image[0])
    mask = changed.mask[0].reshape(after.shape)
    rows, columns = (max(before.shape[k], after.shape[k]) for k in (0, 1))
    images = np.full((3, rows, columns), min(before.min(), after.min()), before.dtype)
    masks = np.zeros((3, rows, columns), mask.dtype)
    images[0, : before.shape[0], : before.shape[1]] = before
    images[1:, : after.shape[0], : after.shape[1]] = after
    masks[2, : after.shape[0], : after.shape[1]] = mask
    return images, masks


def _grey(image: NDArray[Any]) -> NDArray[np.float64]:
    """(rows, columns, samples) as one mean sample."""
    grey: NDArray[np.float64] = image.mean(axis=-1, dtype=np.float64)
    return grey


def _next_free(folder: Path, pattern: str) -> Path:
    """The first file name of a numbered series that is not taken."""
    number = 1
    while (folder / pattern.format(number)).exists():
        number += 1
    return folder / pattern.format(number)
