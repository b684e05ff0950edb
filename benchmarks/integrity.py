"""What integrity costs: the seal and the digest of the contents, and checking them.

    python benchmarks/integrity.py FILE.h5    a converted file of yours; it is not changed
    python benchmarks/integrity.py            a synthetic one of 2,000 slices
    python benchmarks/integrity.py --quick    a small one, once
    python benchmarks/integrity.py --json     a JSON object per line

Times are the least of the rounds, of a file in the page cache. `bytes` compares all of them with
the seal, `all` also decodes and measures every slice.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from printing import Emit, emitter

from parallel_dicomseg import convert_cohort, scan_cohort, verify_file
from parallel_dicomseg.seal import check_structure
from parallel_dicomseg.store.contents import contents
from parallel_dicomseg.store.hdf5 import chunk_index
from parallel_dicomseg.store.sealing import seal_file
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

_COLUMNS = {"integrity": (("ms", "{ms:.1f}"), ("GB/s", "{gb_per_s:.2f}"))}


def main() -> None:
    """Measure one file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    emit = emitter("integrity", _COLUMNS, as_json=options.json, name_width=24, width=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "copy.h5")
        if options.file:
            shutil.copy(options.file, path)
        else:
            _convert(Path(folder, "cohort"), path, slices=3 if options.quick else 500)
        _measure(path, 1 if options.quick else options.rounds, emit)


def _convert(cohort: Path, path: Path, slices: int) -> None:
    make_sunnybrook_cohort(cohort, patients=4, slices=slices, rows=256, columns=256)
    convert_cohort(scan_cohort(cohort), path)


def _measure(path: Path, rounds: int, emit: Emit) -> None:
    with h5py.File(path) as file:
        index = [chunk_index(file[name].id, len(file[name])) for name in ("images", "masks")]
        known = np.stack([file[f"table/{name}_crc32c"][()] for name in ("image", "mask")])
    offsets, sizes = (np.stack([array[k] for array in index]) for k in (0, 1))

    def digest() -> None:
        with h5py.File(path) as file:
            contents(file)

    cases: dict[str, Callable[[], object]] = {
        "write: seal": lambda: seal_file(path, offsets, sizes, known),
        "write: contents": digest,
        "open: structure": lambda: check_structure(path),
        "verify: bytes": lambda: verify_file(path, checksums_only=True),
        "verify: all": lambda: verify_file(path),
    }
    size = path.stat().st_size
    for case, run in cases.items():
        seconds = min(_seconds(run) for _ in range(rounds + 1))
        whole = case.startswith("verify")
        emit(
            {
                "measures": "integrity",
                "case": case,
                "file_bytes": size,
                "slices": len(offsets[0]),
                "ms": 1000 * seconds,
                "gb_per_s": size / seconds / 1e9 if whole else None,
            }
        )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
