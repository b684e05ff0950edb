"""RTSTRUCT to masks, and DICOM with RTSTRUCT to a finished file, against other converters.

    python benchmarks/rtstruct.py --peers PYTHON    PYTHON has the peers, see peers_rtstruct.py
    python benchmarks/rtstruct.py                   this project alone
    python benchmarks/rtstruct.py --quick           once, and small

Everybody works on the same generated series, in a process of its own, after its imports and a
round that warms up, and in turns: a round of one, a round of the next. `masks`: from the folder to
the mask of every structure as an array in memory. `file`: from the folder to image and masks on
the disk (in memory, where it has room); ours is one compressed HDF5 file, theirs are as fast as
they offer. Masks are compared with ours voxel by voxel. Only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers_rtstruct import PEERS, Contestant, Masks, serve
from printing import Emit, emitter
from pydicom import Dataset, dcmread

from parallel_dicomseg.phantoms import IMAGES, conformance_solids, make_rtstruct_series

HERE = Path(__file__).resolve()
OURS = "parallel_dicomseg"
WHAT = ("masks", "file")
MEMORY_FILE_SYSTEM = Path("/dev/shm")
WORKERS = 2
GOALS = {"masks": 10, "file": 15}
MEMORY_GOAL_MIB = 400

Ring = NDArray[np.float64]
"""(p, 2) pixels as (column, row)."""


@dataclass(frozen=True, slots=True)
class Case:
    """A series and what is drawn on it."""

    name: str
    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    structures: Mapping[str, Sequence[tuple[int, Ring]]]
    """Slice and ring, of each structure."""


# --- the cases ------------------------------------------------------------------------------------


def conformance(slices: int, size: int, points: int) -> Case:
    """Seven solids, some with a hole, one in four pieces."""
    shape = (slices, size, size)
    solids = conformance_solids(shape, points)
    structures = {solid.name: solid.rings(slices) for solid in solids}
    return Case(f"conformance {size} x {size} x {slices}", shape, structures)


def clinical(slices: int, size: int, points: int) -> Case:
    """Four organs with wavy outlines: the body, both lungs, the heart and the spinal cord."""
    rng = np.random.default_rng(7)
    unit, centre = size / 16, size / 2
    organs = {
        "body": (7.2, ((0.0, 0.0),)),
        "lungs": (2.2, ((-3.2, -0.5), (3.2, -0.5))),
        "heart": (1.5, ((0.4, -1.0),)),
        "cord": (0.35, ((0.0, 4.0),)),
    }
    structures = {
        name: [
            (k, wavy(rng, radius * unit, centre + x * unit, centre + y * unit, points))
            for k in range(slices)
            for x, y in places
        ]
        for name, (radius, places) in organs.items()
    }
    return Case(f"clinical {size} x {size} x {slices}", (slices, size, size), structures)


def wavy(rng: np.random.Generator, radius: float, column: float, row: float, points: int) -> Ring:
    """A circle with four random waves on it."""
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    waves = sum(rng.normal(0, 0.03) * np.cos(k * turn + rng.uniform(0, 6)) for k in range(2, 6))
    across = radius * (1 + waves)
    return np.stack([column + across * np.cos(turn), row + across * np.sin(turn)], axis=1)


def cases(*, quick: bool) -> Iterator[Case]:
    """What everybody has to convert: structure sets of 4 MB."""
    if quick:
        yield conformance(12, 64, 40)
        return
    yield conformance(200, 512, 96)
    yield clinical(100, 512, 300)


def write_case(case: Case, folder: Path) -> tuple[Path, Path]:
    """The folder of a CT series, and its structure set beside it."""
    phantom = make_rtstruct_series(
        folder / "case",
        shape=case.shape,
        pixel_spacing=(0.9765625, 0.9765625),
        slice_distance=2.5,
        structures=case.structures,
    )
    rtstruct = Path(phantom.directory, phantom.structure_set_path)
    dataset = dcmread(rtstruct)
    if "RTROIObservationsSequence" not in dataset:  # rt-utils insists on it, as the standard does
        dataset.RTROIObservationsSequence = [observation(k) for k in range(len(case.structures))]
        dataset.save_as(rtstruct)
    return Path(phantom.directory, IMAGES), rtstruct


def observation(k: int) -> Dataset:
    """An item that says nothing about a structure."""
    item = Dataset()
    item.ObservationNumber = item.ReferencedROINumber = k + 1
    item.RTROIInterpretedType = item.ROIInterpreter = ""
    return item


# --- ours -----------------------------------------------------------------------------------------


class Ours(Contestant):
    """The project itself, as a user's program would call it."""

    def __init__(self) -> None:
        from parallel_dicomseg import warm_up

        warm_up()

    def masks(self, images: Path, rtstruct: Path) -> Masks:
        """See `Contestant`."""
        from parallel_dicomseg import ConvertOptions, ScanOptions, scan_cohort
        from parallel_dicomseg.drawing import draw_masks
        from parallel_dicomseg.plan import make_plan, tasks

        cohort = scan_cohort(images.parent, options=ScanOptions(workers=WORKERS))
        plan = make_plan(cohort, ConvertOptions(), WORKERS)
        layout = plan.layout
        bits = np.empty((layout.slices, layout.rows, layout.columns), layout.mask_dtype)
        for task in tasks(plan):
            draw_masks(task, bits[task.first : task.first + len(task.slices)])
        for s, name in enumerate(layout.structures):
            mask = np.empty(bits.shape, np.bool_)
            for one, drawn in zip(mask, bits, strict=True):
                np.not_equal(drawn & bits.dtype.type(1 << s), 0, out=one)
            yield name, mask
            del mask

    def file(self, images: Path, rtstruct: Path, output: Path) -> None:
        """See `Contestant`."""
        from parallel_dicomseg import ConvertOptions, ScanOptions, convert_cohort, scan_cohort

        cohort = scan_cohort(images.parent, options=ScanOptions(workers=WORKERS))
        convert_cohort(cohort, output / "cohort.h5", options=ConvertOptions(workers=WORKERS))


# --- measuring ------------------------------------------------------------------------------------


class Child:
    """A contestant in its own process, which waits for its turn."""

    def __init__(self, command: Sequence[str], scratch: Path) -> None:
        self.masks_file = scratch / "masks.npz"
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peak_mib = float("nan")
        self._log = (scratch / "log.txt").open("w")
        self._process = subprocess.Popen(
            [*command, str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def wait_until_ready(self) -> bool:
        """Whether it can do it at all."""
        return self._process.stdout is not None and bool(self._process.stdout.readline())

    def take_turn(self) -> None:
        """One round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        said: dict[str, float] = json.loads(self._process.stdout.readline())
        self.seconds.append(said["seconds"])
        self.cpu_seconds.append(said["cpu_seconds"])
        self.peak_mib = said["peak_mib"]

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()
        self._log.close()

    @property
    def last_words(self) -> str:
        """Why it ended."""
        lines = Path(self._log.name).read_text().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def compare(
    case: Case, folder: Path, python: str, peers: Sequence[str], rounds: int, emit: Emit
) -> None:
    """Let everybody work on one case in turns, first for masks, then for files."""
    images, rtstruct = write_case(case, folder)
    for what in WHAT:
        with ExitStack() as ended:
            children: dict[str, Child] = {}
            for name in (OURS, *peers):
                scratch = folder / f"{name} {what}"
                scratch.mkdir()
                program = [sys.executable, str(HERE), "--child"]
                if name != OURS:
                    program = [python, str(HERE.with_name("peers_rtstruct.py"))]
                child = Child([*program, name, what, str(images), str(rtstruct)], scratch)
                ended.callback(child.close)
                if child.wait_until_ready():
                    children[name] = child
                else:
                    print(f"{name}, {case.name}, {what}: {child.last_words}", file=sys.stderr)
            for _ in range(rounds):
                for child in children.values():
                    child.take_turn()
        if OURS not in children:
            raise SystemExit("there is nothing to compare with")
        for name, child in children.items():
            emit(compared(case, what, name, child, children[OURS]))


def compared(case: Case, what: str, name: str, child: Child, ours: Child) -> dict[str, Any]:
    """The figures of one contestant."""
    seconds = statistics.median(child.seconds)
    figures = {
        "measures": f"RTSTRUCT to {what}",
        "case": f"{case.name}, {name}",
        "contestant": name,
        "median_seconds": seconds,
        "seconds": child.seconds,
        "cpu_seconds": statistics.median(child.cpu_seconds),
        "times_ours": seconds / statistics.median(ours.seconds),
        "goal": GOALS[what],
        "peak_mib": child.peak_mib,
        "goal_mib": MEMORY_GOAL_MIB,
    }
    if what == "masks":
        figures |= differences(child.masks_file, ours.masks_file)
    return figures


def differences(theirs: Path, ours: Path) -> dict[str, Any]:
    """Voxels that differ from our masks, and the worst Dice of a structure."""
    voxels, worst = 0, 1.0
    with np.load(theirs) as other, np.load(ours) as own:
        for name in own:
            key = name if name in other else name.replace(" ", "_")
            mask = other[key] if key in other else np.zeros_like(own[name])
            common, sizes = _ones(mask & own[name]), _ones(mask) + _ones(own[name])
            voxels += _ones(mask ^ own[name])
            worst = min(worst, 2 * common / sizes)
    return {"voxels_different": voxels, "worst_dice": worst}


def _ones(packed: NDArray[np.uint8]) -> int:
    return int(np.unpackbits(packed).sum(dtype=np.int64))


# --- what is printed ------------------------------------------------------------------------------


_COMMON = (
    ("seconds", "{median_seconds:.3f}"),
    ("CPU seconds", "{cpu_seconds:.3f}"),
    ("times ours", "{times_ours:.1f}"),
    ("goal", "{goal}"),
    ("peak MiB", "{peak_mib:.0f}"),
)
_COLUMNS = {
    "RTSTRUCT to masks": (
        *_COMMON,
        ("voxels different", "{voxels_different:,}"),
        ("worst Dice", "{worst_dice:.4f}"),
    ),
    "RTSTRUCT to file": _COMMON,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default="", help="a Python that has the peers")
    parser.add_argument("--only", nargs="+", choices=PEERS, help="these peers alone")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant [5]")
    parser.add_argument("--quick", action="store_true", help="one round of a small case")
    parser.add_argument("--directory", help="where cases and outputs go [memory]")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        _, what, *paths = arguments.child
        serve(Ours(), what, *map(Path, paths))
        return
    if not arguments.peers:
        print("without --peers only this project is timed", file=sys.stderr)
    python = shutil.which(arguments.peers) if arguments.peers else ""
    if python is None:
        raise SystemExit(f"{arguments.peers}: no such Python")
    place = arguments.directory or (
        str(MEMORY_FILE_SYSTEM) if MEMORY_FILE_SYSTEM.is_dir() else tempfile.gettempdir()
    )
    peers = (arguments.only or list(PEERS)) if python else []
    rounds = 1 if arguments.quick else arguments.rounds
    emit = emitter("rtstruct", _COLUMNS, as_json=arguments.json, name_width=46, width=17)
    for case in cases(quick=arguments.quick):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            compare(case, Path(folder), python, peers, rounds, emit)


if __name__ == "__main__":
    main()
