"""The rasterizer against other programs' polygon fillers, measured in the same run.

    python benchmarks/rasterize.py            a minute or two
    python benchmarks/rasterize.py --quick    every case once, and small

Outlines: the 142 real ones of the Arterys cohort (256 x 256), where they are, and smooth random
stars of 12, 60 and 400 points that cover 5 to 40 % of 256 x 256, 512 x 512 and 1024 x 1024.

Every contestant draws the same outlines, prepared in its own format outside of the timing, one
mask per outline. Two ways, each with its own peer:

    batch    rasterize_batch(clear=True) into a stack of used masks, 1 MiB of them, against
             cv2.fillPoly into such a stack, each mask cleared with fill(0) right before it is drawn
    single   rasterize_contours(out=mask) once per outline into one used mask, against
             mask.fill(0) and cv2.fillPoly into one

cv2 gets vertices rounded to whole pixels, which is less work and another mask. Pillow, scikit-image
and matplotlib are called as their users do, with a new mask per outline. memset is mask.fill(0) of
the stack; "drawing" is rasterize_batch into a cleared stack, without the clearing.

All contestants of a case take turns, round by round; figures are medians over the rounds, and a
ratio is one of medians. Only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from printing import Emit, emitter

from parallel_dicomseg.rasterize import rasterize_batch, rasterize_contours
from parallel_dicomseg.records import Contours

CHECKOUT = Path(__file__).resolve().parents[1]
#: The masks of a batch: few enough to stay in the cache, as the one mask of `single` does.
STACK_BYTES = 2**20
#: A contestant's turn lasts at least this long, so that the clock's resolution does not matter.
TURN_SECONDS = 2e-3

Outline = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """Outlines to draw, all on masks of one size."""

    name: str
    size: int
    """Rows, and columns."""
    outlines: tuple[Outline, ...]
    """(p, 2) pixels, column first."""

    @property
    def stack(self) -> int:
        """Masks of a batch."""
        return max(1, STACK_BYTES // self.size**2)

    def batches(self) -> list[Contours]:
        """All outlines, as many at a time as there are masks; one slice each, structure 0."""
        starts = range(0, len(self.outlines), self.stack)
        return [as_batch(self.outlines[start : start + self.stack]) for start in starts]


def as_batch(outlines: Sequence[Outline]) -> Contours:
    """One slice for each."""
    planes = np.arange(len(outlines))
    return Contours(
        points_column_row=np.concatenate(outlines),
        offsets=np.cumsum([0, *map(len, outlines)]),
        plane=planes,
        structure=np.zeros(len(planes), np.int32),
    )


# --- outlines -------------------------------------------------------------------------------------


def star(points: int, size: int, rng: np.random.Generator) -> Outline:
    """A smooth outline about the middle that covers 5 to 40 % of the image."""
    angle = np.linspace(0.0, 2.0 * np.pi, points, endpoint=False)
    waves = sum(
        rng.uniform(0.0, 0.12) * np.cos(k * angle + rng.uniform(0.0, 2.0 * np.pi))
        for k in (2, 3, 4)
    )
    radius = (1.0 + waves) * size * np.sqrt(rng.uniform(0.05, 0.4) / np.pi)
    middle = size / 2 + rng.uniform(-0.02, 0.02, 2) * size
    return middle + np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])


def real_outlines() -> tuple[Outline, ...]:
    """The Arterys cohort's, or none where it is not."""
    named = os.environ.get("PARALLEL_DICOMSEG_DATA")
    beside = (CHECKOUT.parent / "shared/data", CHECKOUT / "shared/data")
    for place in [Path(named)] if named else beside:
        folder = place / "sunnybrook_arterys/final_data/contourfiles"
        if folder.is_dir():
            return tuple(np.loadtxt(path) for path in sorted(folder.rglob("*contour-manual.txt")))
    return ()


def cases(*, quick: bool) -> list[Case]:
    """What is drawn."""
    found = []
    if real := real_outlines():
        found.append(Case(f"{len(real)} real outlines", 256, real[:20] if quick else real))
    for size in (256, 512, 1024):
        for points in (12, 60, 400):
            rng = np.random.default_rng([size, points])
            count = 4 if quick else 32
            stars = tuple(star(points, size, rng) for _ in range(count))
            found.append(Case(f"{points} points", size, stars))
    return found


# --- contestants: each draws all outlines of a case once ------------------------------------------


Contestant = Callable[[], None]


def ours(case: Case) -> dict[str, Contestant]:
    """Both entries, and what they are measured by."""
    batches, shape = case.batches(), (case.size, case.size)
    stack, mask = np.zeros((case.stack, *shape), np.uint8), np.zeros(shape, np.uint8)
    rings = [(outline, np.array([0, len(outline)])) for outline in case.outlines]

    def batch(*, clear: bool) -> None:
        for contours in batches:
            rasterize_batch(contours, stack[: len(contours.plane)], clear=clear)

    def single() -> None:
        for outline, offsets in rings:
            rasterize_contours(outline, offsets, shape, out=mask)

    def memset() -> None:
        for contours in batches:
            stack[: len(contours.plane)].fill(0)

    return {
        "batch": lambda: batch(clear=True),
        "single": single,
        # What is drawn already does not change the time of drawing it again.
        "drawing": lambda: batch(clear=False),
        "memset": memset,
    }


def cv2_fillpoly(case: Case, cv2: ModuleType) -> dict[str, Contestant]:
    """OpenCV, with whole pixels."""
    polygons = [[np.rint(outline).astype(np.int32)] for outline in case.outlines]
    stack = np.zeros((case.stack, case.size, case.size), np.uint8)
    masks = [stack[i % case.stack] for i in range(len(polygons))]
    one = np.zeros((case.size, case.size), np.uint8)

    def batch() -> None:
        for mask, polygon in zip(masks, polygons, strict=True):
            mask.fill(0)
            cv2.fillPoly(mask, polygon, 1)

    def single() -> None:
        for polygon in polygons:
            one.fill(0)
            cv2.fillPoly(one, polygon, 1)

    return {"cv2 batch": batch, "cv2 single": single}


def pillow(case: Case, pil: ModuleType) -> dict[str, Contestant]:
    """As the original script calls it."""
    draw = importlib.import_module("PIL.ImageDraw")
    polygons = [list(map(tuple, outline.tolist())) for outline in case.outlines]

    def contestant() -> None:
        for polygon in polygons:
            image = pil.new("L", (case.size, case.size), 0)
            draw.Draw(image).polygon(xy=polygon, outline=0, fill=1)
            np.asarray(image)

    return {"pillow": contestant}


def scikit_image(case: Case, draw: ModuleType) -> dict[str, Contestant]:
    """Its exact mask; (row, column) first."""
    polygons = [np.ascontiguousarray(outline[:, ::-1]) for outline in case.outlines]

    def contestant() -> None:
        for polygon in polygons:
            draw.polygon2mask((case.size, case.size), polygon)

    return {"skimage": contestant}


def matplotlib_path(case: Case, path: ModuleType) -> dict[str, Contestant]:
    """Every centre asked for."""
    rows, columns = np.mgrid[: case.size, : case.size]
    centres = np.column_stack([columns.ravel(), rows.ravel()])

    def contestant() -> None:
        for outline in case.outlines:
            path.Path(outline).contains_points(centres).reshape(case.size, case.size)

    return {"matplotlib": contestant}


PEERS: dict[str, Callable[[Case, ModuleType], dict[str, Contestant]]] = {
    "cv2": cv2_fillpoly,
    "PIL.Image": pillow,
    "skimage.draw": scikit_image,
    "matplotlib.path": matplotlib_path,
}
#: They take hundreds of times as long: fewer outlines, fewer rounds.
SLOW = ("skimage", "matplotlib")
SLOW_OUTLINES, SLOW_ROUNDS = 2, 3


def installed() -> dict[str, ModuleType]:
    """The peers that are here; a line for each that is not."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
    return found


# --- measuring ------------------------------------------------------------------------------------


def seconds_of(contestant: Contestant, repeats: int) -> float:
    """Mean time of one of several calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        contestant()
    return (time.perf_counter() - start) / repeats


def measure(case: Case, peers: dict[str, ModuleType], rounds: int) -> dict[str, float]:
    """Microseconds per outline of every contestant, which take turns."""
    few = Case(case.name, case.size, case.outlines[:SLOW_OUTLINES])
    contestants = ours(case)
    for name, module in peers.items():
        is_slow = name.startswith(SLOW)
        contestants |= PEERS[name](few if is_slow else case, module)
    repeats = {name: _repeats(contestant) for name, contestant in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name, contestant in contestants.items():
            if i < SLOW_ROUNDS or name not in SLOW:
                seconds[name].append(seconds_of(contestant, repeats[name]))
    return {
        name: 1e6 * statistics.median(runs) / len((few if name in SLOW else case).outlines)
        for name, runs in seconds.items()
    }


def _repeats(contestant: Contestant) -> int:
    """Calls that fill a turn, after one that warms up."""
    contestant()
    return max(1, int(TURN_SECONDS / max(seconds_of(contestant, 1), 1e-7)))


def compared(case: Case, microseconds: dict[str, float]) -> dict[str, Any]:
    """Times, and how many times as long the others take."""
    batch, single = microseconds["batch"], microseconds["single"]
    against = {
        "cv2_over_batch": ("cv2 batch", batch),
        "cv2_over_single": ("cv2 single", single),
        "pillow_over_batch": ("pillow", batch),
        "pillow_over_single": ("pillow", single),
        "skimage_over_batch": ("skimage", batch),
        "matplotlib_over_batch": ("matplotlib", batch),
    }
    ratios = {name: microseconds.get(peer, np.nan) / own for name, (peer, own) in against.items()}
    return {
        "measures": "drawing",
        "case": f"{case.name}, {case.size} x {case.size}",
        "size": case.size,
        "outlines": len(case.outlines),
        "microseconds": microseconds,
        "batch_us": batch,
        "single_us": single,
        **{name: None if np.isnan(ratio) else ratio for name, ratio in ratios.items()},
        "drawing_over_memset": microseconds["drawing"] / microseconds["memset"],
    }


# --- compiling ------------------------------------------------------------------------------------


FIRST_CALLS = """
import json, time
started = time.perf_counter()
import numpy as np
from parallel_dicomseg.rasterize import rasterize_batch
from parallel_dicomseg.records import Contours

points, zero = np.array([[1.0, 1.0], [6.0, 1.0], [1.0, 6.0]]), np.zeros(1, np.int64)
contours = Contours(points, np.array([0, 3]), zero, zero.astype(np.int32))
seconds = {"import_seconds": time.perf_counter() - started}
for rule in ("center", "pil-outline0"):
    before = time.perf_counter()
    rasterize_batch(contours, np.zeros((1, 8, 8), np.uint8), rule=rule)
    seconds[rule.partition("-")[0] + "_seconds"] = time.perf_counter() - before
print(json.dumps(seconds))
"""


def start_up(rounds: int, emit: Emit) -> None:
    """What the first mask of a process costs, in new processes."""
    with tempfile.TemporaryDirectory() as cache:
        emit(_started("nothing compiled", [_in_new_process(cache)]))
        emit(_started("cache is warm", [_in_new_process(cache) for _ in range(rounds)]))


def _in_new_process(cache: str) -> dict[str, float]:
    child = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        check=True,
    )
    said: dict[str, float] = json.loads(child.stdout)
    return said


def _started(name: str, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {"measures": "first mask", "case": name, **medians}


# --- what is printed ------------------------------------------------------------------------------


_COLUMNS = {
    "drawing": (
        ("batch us", "{batch_us:.2f}"),
        ("single us", "{single_us:.2f}"),
        ("cv2/batch", "{cv2_over_batch:.2f}"),
        ("cv2/single", "{cv2_over_single:.2f}"),
        ("Pillow/batch", "{pillow_over_batch:.1f}"),
        ("Pillow/single", "{pillow_over_single:.1f}"),
        ("skimage/batch", "{skimage_over_batch:.0f}"),
        ("mpl/batch", "{matplotlib_over_batch:.0f}"),
        ("drawing/memset", "{drawing_over_memset:.2f}"),
    ),
    "first mask": (
        ("import s", "{import_seconds:.2f}"),
        ("center s", "{center_seconds:.2f}"),
        ("pil s", "{pil_seconds:.2f}"),
    ),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="turns of each contestant [25]")
    parser.add_argument("--quick", action="store_true", help="one round of few outlines")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    emit = emitter("rasterize", _COLUMNS, as_json=arguments.json, name_width=32, width=15)
    rounds, peers = 1 if arguments.quick else arguments.rounds, installed()
    for case in cases(quick=arguments.quick):
        emit(compared(case, measure(case, peers, rounds)))
    start_up(1 if arguments.quick else 3, emit)


if __name__ == "__main__":
    main()
