"""The whole conversion against the original script's algorithm, measured in the same run.

    python benchmarks/convert.py                 times the original's speed, and a cold start
    python benchmarks/convert.py --schedulers    every scheduler, with one worker and with two
    python benchmarks/convert.py --memory        peak memory of 1,000 and of 20,000 slices
    python benchmarks/convert.py --quick         all of it once, and small

Both sides do everything from finding the files to a finished HDF5 file, on the same cohort (the
annotated slices of the Arterys cohort, copied under new patients), into the same file system, in
turns. Only ratios within one run mean something: other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from printing import Emit, emitter

from parallel_dicomseg import ConvertOptions, ScanOptions, convert_cohort, scan_cohort, warm_up

CHECKOUT = Path(__file__).resolve().parents[1]
WORKERS = 2
MEMORY_FILE_SYSTEM = Path("/dev/shm")
#: Bytes that one slice of the cohort takes, and one row of the largest output; 256 x 256.
INPUT_BYTES, OUTPUT_BYTES = 150_000, 200_000
MEMORY_GOAL_MIB = 500


@dataclass(frozen=True, slots=True)
class Case:
    """One way to convert the cohort."""

    structures: tuple[str, ...]
    """Empty: all that are there."""
    codec: str
    scheduler: str = "threads"
    workers: int = WORKERS

    @property
    def name(self) -> str:
        """As in the table."""
        if self.scheduler == "original":
            return "original script, i"
        which = " and ".join(self.structures) or "i and o"
        return f"{which}, {self.codec}, {self.scheduler} {self.workers}"


ORIGINAL = Case(("i",), "none", "original", 1)
SPEED = [Case(which, codec) for which in (("i",), ()) for codec in ("deflate", "lz4", "none")]
SCHEDULERS = [Case((), "deflate", "synchronous", 1)] + [
    Case((), "deflate", scheduler, workers)
    for scheduler in ("threads", "processes", "distributed")
    for workers in (1, 2)
]


@dataclass(frozen=True, slots=True)
class Run:
    """One conversion."""

    slices: int
    seconds: float
    cpu_seconds: float
    """Of all threads, and of worker processes that have ended."""


# --- measuring ------------------------------------------------------------------------------------


def convert(case: Case, root: Path, output: Path) -> int:
    """From a folder to a finished file; how many slices are in it."""
    if case == ORIGINAL:
        from original import convert_serially

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom prints one per illegal UID
            return convert_serially(root, output)
    cohort = scan_cohort(root, options=ScanOptions(structures=case.structures, workers=WORKERS))
    options = ConvertOptions(codec=case.codec, scheduler=case.scheduler, workers=case.workers)
    return convert_cohort(cohort, output, options=options).slices


def measure(case: Case, root: Path, output: Path) -> Run:
    """Convert once into a new file, and remove it."""
    cpu, start = _cpu_seconds(), time.perf_counter()
    slices = convert(case, root, output)
    run = Run(slices, time.perf_counter() - start, _cpu_seconds() - cpu)
    output.unlink()
    return run


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def compare(cases: Sequence[Case], root: Path, rounds: int, emit: Emit) -> None:
    """Run the original and every case in turns, and report how many times faster each is."""
    everyone = [ORIGINAL, *cases]
    runs: dict[Case, list[Run]] = {case: [] for case in everyone}
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        for _ in range(rounds):
            for case in everyone:
                runs[case].append(measure(case, root, Path(folder, "cohort.h5")))
    for case in everyone:
        emit(compared(case, runs[case], runs[ORIGINAL]))


def prepare(small: Path) -> None:
    """Compile and import everything that both sides need, so that no round pays for it."""
    warm_up()
    for case in (ORIGINAL, *SPEED):
        measure(case, small, small.with_name("prepared.h5"))


def compared(case: Case, runs: Sequence[Run], originals: Sequence[Run]) -> dict[str, Any]:
    """The figures of one case: rates are medians, the ratio is one of medians."""
    if {run.slices for run in (*runs, *originals)} != {originals[0].slices}:
        raise SystemExit(f"{case.name}: not as many slices as the original converted")
    slices = runs[0].slices
    seconds = statistics.median(run.seconds for run in runs)
    by_round = [old.seconds / run.seconds for run, old in zip(runs, originals, strict=True)]
    return {
        "measures": "speed",
        "case": case.name,
        **asdict(case),
        "slices": slices,
        "slices_per_second": slices / seconds,
        "times_original": statistics.median(run.seconds for run in originals) / seconds,
        "lowest": min(by_round),
        "highest": max(by_round),
        "cpu_ms_per_slice": 1e3 * statistics.median(run.cpu_seconds for run in runs) / slices,
        "seconds": [run.seconds for run in runs],
    }


# --- in a process of its own ----------------------------------------------------------------------


def in_new_process(
    root: Path, folder: Path, what: str, environment: dict[str, str] | None = None
) -> tuple[float, dict[str, Any]]:
    """Convert in a fresh process: seconds from its start to its end, and what it says."""
    output = folder / "child.h5"
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, __file__, "--child", what, str(root), str(output)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds = time.perf_counter() - start
    output.unlink()
    said: dict[str, Any] = json.loads(child.stdout)
    return seconds, said


def run_child(what: str, root: str, output: str) -> None:
    """The other side of `in_new_process`."""
    case = ORIGINAL if what == "original" else Case((), "deflate")
    slices = convert(case, Path(root), Path(output))
    print(json.dumps({"slices": slices, "peak_mib": peak_bytes() / 2**20}))


def peak_bytes() -> int:
    """The most memory that this process has held.

    Linux hands getrusage's figure on from the parent, so the one of this program alone comes
    first.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cold_start(root: Path, rounds: int, *, compile_too: bool, emit: Emit) -> None:
    """From starting Python to the finished file of a small cohort."""
    with tempfile.TemporaryDirectory(dir=root.parent) as name:
        folder = Path(name)
        for what in ("original", "ours"):
            runs = [in_new_process(root, folder, what) for _ in range(rounds)]
            emit(_started(f"{what}, new process", runs))
        if compile_too:
            nothing = {"NUMBA_CACHE_DIR": str(folder / "numba")}
            runs = [in_new_process(root, folder, "ours", nothing)]
            emit(_started("ours, new process, nothing compiled", runs))


def _started(name: str, runs: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    seconds = [seconds for seconds, _ in runs]
    return {
        "measures": "cold start",
        "case": name,
        "slices": runs[0][1]["slices"],
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
    }


def memory(roots: Sequence[Path], emit: Emit) -> None:
    """Peak memory of one process with two worker threads, by the size of the cohort."""
    first = None
    for root in roots:
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            _, said = in_new_process(root, Path(folder), "ours")
        first = first or said["peak_mib"]
        emit(
            {
                "measures": "memory",
                "case": f"{said['slices']:,} slices",
                **said,
                "grew_mib": said["peak_mib"] - first,
                "mib_per_worker": said["peak_mib"] / WORKERS,
                "goal_mib_per_worker": MEMORY_GOAL_MIB,
            }
        )


# --- the cohort -----------------------------------------------------------------------------------


def choose_directory(asked: str | None, needed: int) -> str:
    """Where there is room: what was asked for, else memory, else the temporary directory."""
    places = [asked] if asked else [str(MEMORY_FILE_SYSTEM), tempfile.gettempdir()]
    for place in places:
        if Path(place).is_dir() and shutil.disk_usage(place).free > needed:
            return place
    raise SystemExit(f"{' and '.join(places)}: no room for {needed / 1e9:.1f} GB; see --directory")


def source_cohort(folder: Path) -> Path:
    """The real Arterys cohort where it is, or a synthetic one of the same image size."""
    named = os.environ.get("PARALLEL_DICOMSEG_DATA")
    beside = (CHECKOUT.parent / "shared/data", CHECKOUT / "shared/data")
    for place in [Path(named)] if named else beside:
        if (place / "sunnybrook_arterys/final_data").is_dir():
            return place / "sunnybrook_arterys/final_data"
    from parallel_dicomseg.synthetic import make_sunnybrook_cohort

    make_sunnybrook_cohort(folder / "source", patients=5, slices=19, rows=256, columns=256)
    return folder / "source"


@contextmanager
def cohorts(directory: str | None, sizes: Sequence[int]) -> Iterator[list[Path]]:
    """Cohorts of at least these many annotated slices, removed afterwards."""
    from parallel_dicomseg.synthetic import replicate_cohort

    needed = sum(sizes) * INPUT_BYTES + max(sizes) * OUTPUT_BYTES
    with tempfile.TemporaryDirectory(dir=choose_directory(directory, needed)) as name:
        folder = Path(name)
        source = source_cohort(folder)
        roots = [folder / str(size) for size in sizes]
        for root, size in zip(roots, sizes, strict=True):
            replicate_cohort(source, root, size)
        yield roots


# --- what is printed ------------------------------------------------------------------------------


_COLUMNS = {
    "speed": (
        ("slices/s", "{slices_per_second:,.0f}"),
        ("times original", "{times_original:.1f}"),
        ("lowest to highest", "{lowest:.1f} to {highest:.1f}"),
        ("CPU ms/slice", "{cpu_ms_per_slice:.2f}"),
    ),
    "cold start": (("slices", "{slices:,}"), ("seconds", "{median_seconds:.2f}")),
    "memory": (
        ("peak MiB", "{peak_mib:.0f}"),
        ("grew by MiB", "{grew_mib:.0f}"),
        ("MiB per worker", "{mib_per_worker:.0f}"),
        ("goal", "below {goal_mib_per_worker}"),
    ),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=5000, help="slices to convert [5000]")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side has [5]")
    parser.add_argument("--directory", help="where cohort and output go [memory, if it has room]")
    parser.add_argument("--schedulers", action="store_true", help="compare the schedulers instead")
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory instead (needs 8 GB of room)"
    )
    parser.add_argument("--quick", action="store_true", help="everything once, on 200 slices")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        run_child(*arguments.child)
        return
    emit = emitter("convert", _COLUMNS, as_json=arguments.json, name_width=38, width=19)
    quick, rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
    if arguments.memory or quick:
        with cohorts(arguments.directory, (100, 200) if quick else (1000, 20000)) as roots:
            memory(roots, emit)
    if arguments.memory:
        return
    size = 200 if quick else arguments.slices
    with cohorts(arguments.directory, (1, size)) as (small, root):
        prepare(small)
        if not arguments.schedulers:
            compare(SPEED, root, rounds, emit)
            cold_start(small, rounds, compile_too=not quick, emit=emit)
        if arguments.schedulers or quick:
            compare(SCHEDULERS[-1:] if quick else SCHEDULERS, root, rounds, emit)


if __name__ == "__main__":
    main()
