"""What crash safety costs: the journaled writer against plain HDF5, and how long a resume takes.

    python benchmarks/journal.py            5,000 chunks of real size; a resume of 100,000
    python benchmarks/journal.py --quick    small

Both sides write the same encoded chunks and tables, read them back, sync the file and give it its
name, in turns. The plain side is HDF5 on its own file, one `write_direct_chunk` per chunk, and no
journal. `of conversion` sets the difference against a whole conversion of as many slices, where one
takes `--slice-us` microseconds (benchmarks/convert.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from printing import Emit, emitter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import written  # the tests' maker of small files

from parallel_dicomseg.records import EncodedChunk
from parallel_dicomseg.store import Hdf5Writer
from parallel_dicomseg.store import writer as module

SLICES_PER_TASK = 64
#: Of a 256 x 256 slice with lz4: bytes of images, and of masks.
IMAGE_BYTES, MASK_BYTES = (30_000, 60_000), (150, 900)

_COLUMNS = {
    "writing": (
        ("plain wall", "{plain_wall:.2f} s"),
        ("journal wall", "{journal_wall:.2f} s"),
        ("ratio", "{ratio:.3f}"),
        ("CPU/chunk", "{cpu_us:+.1f} us"),
        ("of conversion", "{share:+.1%}"),
        ("disk", "{disk:.4f}"),
    ),
    "resuming": (
        ("chunks", "{chunks:,}"),
        ("checksums", "{checksums:.2f} s"),
        ("all the rest", "{rest:.2f} s"),
        ("done again", "{done_again}"),
    ),
}


def main() -> None:
    """Measure writing, then resuming."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, and one round")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice-us", type=float, default=200.0, help="of a whole conversion")
    arguments = parser.parse_args()
    emit = emitter("journal", _COLUMNS, as_json=arguments.json, name_width=24, width=15)
    slices, resumed, rounds = (
        (500, 2000, 1) if arguments.quick else (5000, 50_000, arguments.rounds)
    )
    with tempfile.TemporaryDirectory(dir=".") as folder:
        writing(Path(folder), slices, rounds, arguments.slice_us, emit)
        resuming(Path(folder), resumed, emit)


def make_chunks(slices: int, image: Sequence[int], mask: Sequence[int]) -> list[EncodedChunk]:
    """Tasks of chunks of random bytes of the usual sizes."""
    random = np.random.default_rng(0)
    images, masks = written.pictures(SLICES_PER_TASK)
    plan = written.layout(slices)
    usual = written.chunk(images, masks, plan).measured
    tasks = []
    for first in range(0, slices, SLICES_PER_TASK):
        n = min(SLICES_PER_TASK, slices - first)
        sizes = [random.integers(*span, n) for span in (image, mask)]
        flat = [random.integers(0, 256, int(size.sum()), dtype=np.uint8) for size in sizes]
        tasks.append(
            EncodedChunk(
                first, flat[0], sizes[0], flat[1], sizes[1],
                written.checksums(flat[0], sizes[0]), written.checksums(flat[1], sizes[1]),
                type(usual)(**{name: getattr(usual, name)[:n] for name in usual.__slots__}), (),
            )
        )  # fmt: skip
    return tasks


def journaled(output: Path, tasks: list[EncodedChunk], slices: int, **options: Any) -> Hdf5Writer:
    """Write the chunks as a conversion does."""
    plan = written.layout(slices, codec="lz4")
    with Hdf5Writer(output, plan, written.slices(slices), **options) as writer:
        for task in tasks:
            if task.first >= writer.slices_seen:
                writer.put(task)
        writer.publish(())
    return writer


class Plain:
    """What a writer needs of `Unfinished`, without a journal: HDF5 writes its own file."""

    def __init__(self, data: Path, layout: Any) -> None:
        self.data = data
        self._file = h5py.File(data, "w", libver=("v110", "v110"))
        shape = (layout.slices, layout.rows, layout.columns)
        self._arrays = [
            self._file.create_dataset(
                name, shape, dtype, chunks=(1, *shape[1:]), compression="gzip"
            ).id
            for name, dtype in (("images", layout.image_dtype), ("masks", layout.mask_dtype))
        ]

    @classmethod
    def fresh(cls, data: Path, journal: Path, header: Any, disk: Any, layout: Any, _: Any) -> Plain:
        """Begin."""
        return cls(data, layout)

    def append(self, chunk: EncodedChunk, records: Any, rows: int, problems: Any) -> None:
        """Write a task's chunks, one call each."""
        ends = np.cumsum(records["size"], axis=0)
        starts = (ends - records["size"]).tolist()
        for k, end in enumerate(ends.tolist()):
            for array, flat in enumerate((chunk.image_bytes, chunk.mask_bytes)):
                piece = flat[starts[k][array] : end[array]]
                self._arrays[array].write_direct_chunk((rows + k, 0, 0), piece)

    def finish(self, rows: int, write: Any) -> None:
        """Write the rest."""
        write(self._file)
        self._file.close()

    def publish(self, output: Path) -> None:
        """Sync and rename."""
        with self.data.open("r+b") as stream:
            os.fsync(stream.fileno())
        self.data.replace(output)

    def close(self) -> None:
        """Nothing is open."""


def plain(output: Path, tasks: list[EncodedChunk], slices: int) -> None:
    """Write the chunks as a conversion did without a journal."""
    used, compare = module.Unfinished, module._compare
    module.Unfinished = Plain
    module._compare = read_back
    try:
        journaled(output, tasks, slices, overwrite=True)
    finally:
        module.Unfinished, module._compare = used, compare


def read_back(path: Path, records: Any) -> None:
    """Compare sizes and checksums, and note the places, which the plain side does not know."""
    places, found = module.read_back(path, len(records))
    if (places[..., 1] != records["size"]).any() or (found != records["crc32c"]).any():
        raise RuntimeError("the plain side is wrong")
    records["offset"] = places[..., 0]


def measured(work: Any, *args: Any) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*args)
    return time.perf_counter() - wall, time.process_time() - cpu


def writing(folder: Path, slices: int, rounds: int, slice_us: float, emit: Emit) -> None:
    """The same chunks both ways, in turns."""
    tasks = make_chunks(slices, IMAGE_BYTES, MASK_BYTES)
    results = []
    for _ in range(rounds + 1):  # the first one warms up
        pair = []
        for work, name in ((plain, "plain.h5"), (journaled, "journaled.h5")):
            (folder / name).unlink(missing_ok=True)
            os.sync()
            pair.append(measured(work, folder / name, tasks, slices))
        results.append(pair)
    (plain_wall, plain_cpu), (wall, cpu) = (
        [statistics.median(pair[k][m] for pair in results[1:]) for m in (0, 1)] for k in (0, 1)
    )
    sizes = [(folder / name).stat().st_size for name in ("plain.h5", "journaled.h5")]
    journal = 200 * slices
    emit(
        {
            "measures": "writing",
            "case": f"{slices:,} slices",
            "plain_wall": plain_wall,
            "journal_wall": wall,
            "ratio": wall / plain_wall,
            "cpu_us": (cpu - plain_cpu) / slices / 2 * 1e6,
            "share": (wall - plain_wall) / (slices * slice_us * 1e-6),
            "disk": (sizes[1] + journal) / sizes[0],
        }
    )


class StopError(Exception):
    """Ends a run with everything written and nothing published."""


def resuming(folder: Path, slices: int, emit: Emit) -> None:
    """Go on after a run that was ended with all chunks written."""
    tasks = make_chunks(slices, (300, 600), (30, 90))
    output = folder / "resumed.h5"
    plan, table = written.layout(slices, codec="lz4"), written.slices(slices)
    writer = Hdf5Writer(output, plan, table).__enter__()
    for task in tasks:
        writer.put(task)
    writer.__exit__(StopError, StopError(), None)
    seconds = [0.0]
    intact = module.intact_tasks

    def timed(journal: Any) -> Any:
        start = time.perf_counter()
        found = intact(journal)
        seconds[0] = time.perf_counter() - start
        return found

    module.intact_tasks = timed
    start = time.perf_counter()
    with Hdf5Writer(output, plan, table, resume=True) as writer:
        entered = time.perf_counter() - start
    module.intact_tasks = intact
    emit(
        {
            "measures": "resuming",
            "case": f"{slices:,} slices",
            "chunks": 2 * slices,
            "checksums": seconds[0],
            "rest": entered - seconds[0],
            "done_again": slices - writer.slices_resumed,
        }
    )


if __name__ == "__main__":
    main()
