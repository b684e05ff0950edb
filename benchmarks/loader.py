"""Random batches of images and masks against other loaders, measured in the same run.

    python benchmarks/loader.py                 256 x 256, 5,000 slices: reading, augmenting,
                                                waiting, first batch, memory (some 4 minutes)
    python benchmarks/loader.py --size 512      the same with larger slices
    python benchmarks/loader.py --only reading  one of the parts
    python benchmarks/loader.py --quick         all of it once, and small
    python benchmarks/loader.py --output a.jsonl --plot a.png
                                                keep every figure, and a picture of them

At the end stands what each figure should be, beside what it was.

Every loader gives batches of the same slices in random order from the page cache: int16 images and
masks of one byte, as they are stored, so that all move the same number of bytes (ours with
`image_dtype="stored", masks="bits"`; what float32 and a channel per structure cost is told beside
it). Ours compares the checksum of every chunk, as it does by default; "unverified" does not. Ours
has its kernels loaded (`warm_up()`), peers their modules. They take turns,
round by round, each for a fixed time; figures are medians over the rounds, ratios those of one
round. Only ratios within one run mean something: other work on the machine slows all, and most of
all whoever uses more than one core, so the CPU time of this process is told beside (not that of
worker processes). Peers that are not installed (PyTorch, MONAI, TorchIO) are named and left out.

The original's loader is told in our own words: a shuffled list of all rows, sorted within each
batch, and h5py's fancy indexing into the one-row-per-image datasets that the original wrote.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from printing import Emit, Figures, emitter

# No more than this: new processes measure how long the rest takes to import.

CODECS = ("deflate", "lz4", "none")
PARTS = ("reading", "augmenting", "waiting", "first batch", "memory")
AUGMENTATIONS = ("flip", "dihedral", "contrast", "noise")
WORKERS = 2
#: Slices that the peers in memory get: they need to make objects of all, and are no slower for it.
IN_MEMORY = 256
STEPS_MS = (20, 5)
#: In which a loader gets its memory for the first time, which a training does once.
WARM_UP_BATCHES = 16
#: Batches until a loader has got all its memory.
BATCHES_BEFORE = 8
#: After which a slow loader has shown how long it lets wait.
MOST_SECONDS = 1.5
Batches = Iterator[Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Files:
    """The same slices in every form that a loader reads."""

    ours: dict[str, Path]
    """By codec."""
    original: Path
    """As the original script wrote them."""
    images: NDArray[np.int16]
    masks: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Contender:
    """One loader."""

    name: str
    make: Callable[[], Batches]
    """An endless iterator of batches; its `close` ends threads and processes."""
    needs: str = ""
    """A package."""

    @property
    def is_installed(self) -> bool:
        """Whether it can take part."""
        return not self.needs or find_spec(self.needs) is not None


# --- loaders --------------------------------------------------------------------------------------


def ours(file: Path, size: int, **options: Any) -> Batches:
    """What the file holds, type for type, unless the options say otherwise."""
    from parallel_dicomseg.loader import BatchLoader

    chosen = {"image_dtype": "stored", "masks": "bits", "threads": WORKERS, **options}
    with BatchLoader(file, size, **chosen) as loader:
        yield from loader.forever()


def original(files: Files, size: int) -> Batches:
    """The original's algorithm on the original's file."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(files.original) as file:
        images, masks = file["input"], file["output"]
        shape = tuple(images.attrs["lshape"])
        rows = np.arange(len(images))
        while True:
            rng.shuffle(rows)
            for start in range(0, len(rows) - size + 1, size):
                index = np.sort(rows[start : start + size])
                yield images[index].reshape(-1, *shape), masks[index].reshape(-1, *shape)


def from_memory(files: Files, size: int) -> Batches:
    """The limit of one core: np.take into a buffer that is used again."""
    rng = np.random.default_rng(0)
    image = np.empty((size, *files.images.shape[1:]), files.images.dtype)
    mask = np.empty((size, *files.masks.shape[1:]), files.masks.dtype)
    while True:
        rows = rng.permutation(len(files.images))
        for start in range(0, len(rows) - size + 1, size):
            index = rows[start : start + size]
            np.take(files.images, index, 0, out=image, mode="clip")
            np.take(files.masks, index, 0, out=mask, mode="clip")
            yield image, mask


class H5pyDataset:
    """What one writes for torch.utils.data: each worker opens the file, row by row."""

    def __init__(self, path: Path, rows: int) -> None:
        self._path, self._rows = path, rows
        self._file: Any = None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if self._file is None:
            import h5py

            self._file = h5py.File(self._path)
        return self._file["images"][row], self._file["masks"][row]


def torch_h5py(files: Files, size: int) -> Batches:
    """PyTorch's DataLoader over h5py, two workers, the default codec."""
    return _torch_batches(H5pyDataset(files.ours["deflate"], len(files.images)), size, WORKERS)


def _torch_batches(dataset: Any, size: int, workers: int, loader: Any = None) -> Batches:
    import torch

    torch.set_num_threads(1)
    chosen = loader or torch.utils.data.DataLoader
    made = chosen(
        dataset, batch_size=size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        yield from made


def monai_cache(files: Files, size: int, workers: int) -> Batches:
    """MONAI's CacheDataset: everything in memory, the random transforms on each access."""
    from monai import transforms as t
    from monai.data import CacheDataset, DataLoader

    both = ["image", "mask"]
    chain = t.Compose(
        [
            t.EnsureChannelFirstd(both, channel_dim="no_channel"),
            t.EnsureTyped(both, dtype=np.float32),
            t.RandFlipd(both, prob=0.5, spatial_axis=0),
            t.RandFlipd(both, prob=0.5, spatial_axis=1),
            t.RandRotate90d(both, prob=0.75, max_k=3),
            t.RandScaleIntensityd("image", factors=0.25, prob=1.0),
            t.RandGaussianNoised("image", prob=1.0, std=10.0),
        ]
    )
    pairs = [
        {"image": image, "mask": mask}
        for image, mask in zip(files.images[:IN_MEMORY], files.masks[:IN_MEMORY], strict=True)
    ]
    dataset = CacheDataset(pairs, chain, progress=False, num_workers=None)
    return _torch_batches(dataset, size, workers, DataLoader)


def torchio_subjects(files: Files, size: int, workers: int) -> Batches:
    """TorchIO's SubjectsDataset of slices in memory, with its own transforms."""
    import torch
    import torchio as tio

    subjects = [
        tio.Subject(
            image=tio.ScalarImage(
                tensor=torch.from_numpy(image.astype(np.float32))[None, ..., None]
            ),
            mask=tio.LabelMap(tensor=torch.from_numpy(mask)[None, ..., None]),
        )
        for image, mask in zip(files.images[:IN_MEMORY], files.masks[:IN_MEMORY], strict=True)
    ]
    chain = tio.Compose(
        [
            tio.RandomFlip(axes=(0, 1), flip_probability=0.5),
            tio.OneOf({tio.Lambda(_transposed): 0.5, tio.Lambda(_unchanged): 0.5}),
            tio.RandomGamma(log_gamma=0.25),
            tio.RandomNoise(std=10.0),
        ]
    )
    return _torch_batches(
        tio.SubjectsDataset(subjects, chain), size, workers, getattr(tio, "SubjectsLoader", None)
    )


def _transposed(tensor: Any) -> Any:
    """With two flips, one of the eight poses of a square."""
    return tensor.transpose(1, 2).contiguous()


def _unchanged(tensor: Any) -> Any:
    return tensor


def readers(files: Files, size: int) -> list[Contender]:
    """Nothing but reading; the limit and the original first, for the ratios."""
    return [
        Contender("np.take from memory", lambda: from_memory(files, size)),
        Contender("original loader, its file", lambda: original(files, size)),
        *_ours_by_codec(files, size),
        *_ours_by_codec(files, size, ", unverified", verify=False),
        *_ours_by_codec(
            files, size, ", float32, channels", image_dtype="float32", masks="channels"
        ),
        Contender("torch DataLoader 2, h5py, deflate", lambda: torch_h5py(files, size), "torch"),
    ]


def _ours_by_codec(files: Files, size: int, name: str = "", **options: Any) -> list[Contender]:
    def reading(codec: str) -> Contender:
        return Contender(f"ours, {codec}{name}", lambda: ours(files.ours[codec], size, **options))

    return [reading(codec) for codec in CODECS]


def augmenters(files: Files, size: int) -> list[Contender]:
    """Flips, the poses of a square, contrast and noise; ours reads from the file as well."""
    options = {"augment": AUGMENTATIONS, "image_dtype": "float32", "masks": "channels"}
    peers = [("MONAI CacheDataset", "monai", monai_cache)]
    peers += [("TorchIO SubjectsDataset", "torchio", torchio_subjects)]
    return [
        *_ours_by_codec(files, size, **options),
        *(
            Contender(f"{name}, {workers} workers", _bound(make, files, size, workers), package)
            for name, package, make in peers
            for workers in (0, WORKERS)
        ),
        Contender("torch DataLoader 2, h5py, nothing", lambda: torch_h5py(files, size), "torch"),
    ]


def _bound(make: Callable[..., Batches], *arguments: Any) -> Callable[[], Batches]:
    return lambda: make(*arguments)


# --- measuring ------------------------------------------------------------------------------------


def rate(batches: Batches, seconds: float) -> tuple[float, float]:
    """Samples per second, and per second of CPU time; the first batches do not count."""
    start = time.perf_counter()
    for _ in range(WARM_UP_BATCHES):
        next(batches)
        if time.perf_counter() - start > seconds / 4:
            break
    samples, start, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < seconds:
        samples += _length(next(batches))
    return samples / passed, samples / (time.process_time() - cpu)


def _length(batch: Any) -> int:
    first = batch.image if hasattr(batch, "image") else batch
    if isinstance(first, dict):
        first = first["image"]
    elif isinstance(first, list | tuple):
        first = first[0]
    if isinstance(first, dict):  # TorchIO's image
        first = first["data"]
    return len(first)


@contextmanager
def started(contender: Contender) -> Iterator[Batches]:
    """Its batches; threads and processes end afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = contender.make()
        with closing(batches):  # type: ignore[type-var]  # every one is a generator
            next(batches)
            yield batches


def take_turns(
    contenders: Sequence[Contender], rounds: int, measure: Callable[[Batches], T], emit: Emit
) -> dict[str, list[T]]:
    """What `measure` says of each installed one, (rounds,); only one exists at any time."""
    found: dict[str, list[T]] = {c.name: [] for c in contenders if c.is_installed}
    for contender in contenders:
        if not contender.is_installed:
            emit({"measures": "left out", "case": contender.name, "needs": contender.needs})
    for _ in range(rounds):
        for contender in contenders:
            if contender.is_installed:
                with started(contender) as batches:
                    found[contender.name].append(measure(batches))
    return found


def compare(
    part: str, contenders: Sequence[Contender], rounds: int, seconds: float, emit: Emit
) -> None:
    """Samples per second of each, and how many times those of the peers."""
    turns = take_turns(contenders, rounds, lambda batches: rate(batches, seconds), emit)
    found = {name: [wall for wall, _ in rates] for name, rates in turns.items()}
    for name, rates in found.items():
        cpu = statistics.median(rate for _, rate in turns[name])
        emit(
            {
                "measures": part,
                "case": name,
                "samples_per_second": statistics.median(rates),
                "cpu_microseconds": None if _in_workers(name) else 1e6 / cpu,
                "times_original": _times(rates, found.get("original loader, its file")),
                "times_memory": _times(rates, found.get("np.take from memory")),
                "times_monai": _times(rates, _best(found, "MONAI")),
                "times_torchio": _times(rates, _best(found, "TorchIO")),
                "times_torch": _times(rates, _best(found, "torch DataLoader")),
                "rates": rates,
            }
        )


def _in_workers(name: str) -> bool:
    """Whether other processes did the work."""
    return "2 workers" in name or "DataLoader 2" in name


def _best(found: dict[str, list[float]], start: str) -> list[float] | None:
    """The rates of a peer with the number of workers that suits it best."""
    of_peer = [rates for name, rates in found.items() if name.startswith(start)]
    return max(of_peer, key=statistics.median, default=None)


def _times(rates: Sequence[float], peer: Sequence[float] | None) -> float | None:
    """The median of the rounds' ratios; None without the peer."""
    if not peer:
        return None
    return statistics.median(mine / other for mine, other in zip(rates, peer, strict=True))


def waiting_share(batches: Batches, step: float, steps: int) -> float:
    """The share of its time, %, that a consumer waits whose step sleeps `step` seconds.

    From the ninth batch on: the first ones wait for memory, once in a training.
    """
    for _ in range(BATCHES_BEFORE):
        next(batches)
        time.sleep(step)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(step)
        if time.perf_counter() - start > MOST_SECONDS:
            break
    return 100 * waited / (time.perf_counter() - start)


def waiting(files: Files, rounds: int, steps: int, emit: Emit) -> None:
    """How long a training would wait for each loader, in batches of 64."""
    size = min(64, len(files.images))
    contenders = [
        *_ours_by_codec(files, size, image_dtype="float32", masks="channels"),
        Contender("original loader, its file", lambda: original(files, size)),
        Contender("torch DataLoader 2, h5py, deflate", lambda: torch_h5py(files, size), "torch"),
    ]
    shares: dict[int, dict[str, list[float]]] = {}
    for step in STEPS_MS:
        shares[step] = take_turns(
            contenders, rounds, lambda b, s=step: waiting_share(b, s / 1e3, steps), emit
        )
    for name in shares[STEPS_MS[0]]:
        by_step = {f"percent_{step}_ms": statistics.median(shares[step][name]) for step in STEPS_MS}
        lowest = {f"lowest_{step}_ms": min(shares[step][name]) for step in STEPS_MS}
        emit({"measures": "waiting", "case": name, **by_step, **lowest})


# --- in a process of its own ----------------------------------------------------------------------


def first_batches(files: Files, rounds: int, emit: Emit) -> None:
    """Time to the first batch in new processes, and in one that has had another loader before."""
    for codec in CODECS:
        for augment in ((), AUGMENTATIONS):
            runs = [_child("first", files.ours[codec], *augment) for _ in range(rounds)]
            emit(
                {
                    "measures": "first batch",
                    "case": f"{codec}, {'augmented' if augment else 'as it is'}",
                    **{name: statistics.median(run[name] for run in runs) for name in runs[0]},
                }
            )


def memory(files: Files, epochs: int, emit: Emit) -> None:
    """What a process holds after one epoch and after many, beside what its batches take."""
    for codec in CODECS:
        emit(
            {
                "measures": "memory",
                "case": f"{codec}, {epochs} epochs",
                **_child("memory", files.ours[codec], str(epochs)),
            }
        )


def _child(what: str, *arguments: str | Path) -> dict[str, float]:
    child = subprocess.run(
        [sys.executable, __file__, "--child", what, *map(str, arguments)],
        stdout=subprocess.PIPE,
        check=True,
    )
    said: dict[str, float] = json.loads(child.stdout)
    return said


def run_child(what: str, file: str, *arguments: str) -> None:
    """The other side of `_child`."""
    said = _first_times(file, arguments) if what == "first" else _held(file, int(arguments[0]))
    print(json.dumps(said))


def _first_times(file: str, augment: Sequence[str]) -> dict[str, float]:
    """Milliseconds to import the loader, and to the first batch of one and of another."""
    ends = [time.perf_counter()]
    from parallel_dicomseg.loader import BatchLoader

    ends.append(time.perf_counter())
    for _ in range(2):
        with BatchLoader(file, 16, augment=tuple(augment)) as loader:
            next(iter(loader))
            ends.append(time.perf_counter())
    imported, cold, warm = (1e3 * seconds for seconds in np.diff(ends).tolist())
    return {
        "import_ms": imported,
        "cold_ms": cold,
        "new_process_ms": imported + cold,
        "warm_ms": warm,
        "loads_numba": float("numba" in sys.modules),
    }


def _held(file: str, epochs: int) -> dict[str, float]:
    """MiB of a batch, and of the process after each epoch."""
    from parallel_dicomseg.loader import BatchLoader, warm_up

    warm_up()  # a long training loads numba anyway, and that is no growth
    start, held = _memory("VmRSS"), []
    with BatchLoader(file, 64, threads=WORKERS) as loader:
        for _ in range(epochs):
            batch = None
            for batch in loader:
                size = batch.image.nbytes + batch.mask.nbytes
            held.append(_memory("VmRSS"))
    whole = max(size, loader.batch_size * size / len(batch.index)) / 2**20
    return {
        "batch_mib": whole,
        # the first epochs fill caches of the allocator; from then on nothing may be added
        "growth_batches": (held[-1] - held[(len(held) - 1) // 2]) / whole,
        "start_mib": start,
        "first_epoch_mib": held[0],
        "half_way_mib": held[(len(held) - 1) // 2],
        "last_epoch_mib": held[-1],
        "peak_mib": _memory("VmHWM"),
    }


def _memory(name: str) -> float:
    """MiB that the kernel tells of this process; its peak where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def made_files(directory: str | None, slices: int, size: int) -> Iterator[Files]:
    """At least this many slices, in every form; removed afterwards."""
    from convert import choose_directory

    from parallel_dicomseg import ConvertOptions, convert_cohort, open_dataset, scan_cohort
    from parallel_dicomseg.synthetic import replicate_cohort

    needed = slices * size * size * 12
    with tempfile.TemporaryDirectory(dir=choose_directory(directory, needed)) as name:
        folder = Path(name)
        replicate_cohort(_source(folder, size), folder / "cohort", slices)
        cohort = scan_cohort(folder / "cohort")
        by_codec = {}
        for codec in CODECS:
            by_codec[codec] = folder / f"{codec}.h5"
            options = ConvertOptions(codec=codec, workers=WORKERS)
            convert_cohort(cohort, by_codec[codec], options=options)
        with open_dataset(by_codec["none"]) as dataset:
            images = np.stack([dataset.images[k] for k in range(len(dataset))])
            masks = np.stack([dataset.masks[k] for k in range(len(dataset))])
        write_original(folder / "original.h5", images, masks)
        yield Files(by_codec, folder / "original.h5", images, masks)


def _source(folder: Path, size: int) -> Path:
    from convert import source_cohort

    from parallel_dicomseg.synthetic import make_sunnybrook_cohort

    if size == 256:
        return source_cohort(folder)
    make_sunnybrook_cohort(folder / "source", patients=3, slices=12, rows=size, columns=size)
    return folder / "source"


def write_original(path: Path, images: NDArray[Any], masks: NDArray[Any]) -> None:
    """The original's layout, chunks as h5py chose them for its first row."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, values in (("input", images), ("output", masks.astype(bool))):
            flat = values.reshape(len(values), -1)
            dataset = file.create_dataset(name, data=flat[:1], maxshape=[None, flat.shape[1]])
            dataset.resize(len(flat), axis=0)
            dataset[:] = flat
            dataset.attrs["lshape"] = (*values.shape[1:], 1)


# --- what the figures should be -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """What one figure should at least, or at most, be."""

    what: str
    part: str
    case: str
    """Start of the case's name that is meant."""
    figure: str
    wanted: float
    is_least: bool = True
    unit: str = ""

    def found(self, figures: Sequence[Mapping[str, Any]]) -> float | None:
        """The worst figure of the cases that are meant; None without one."""
        values = [
            line[self.figure]
            for line in figures
            if line["measures"] == self.part
            and line["case"].startswith(self.case)
            and line.get(self.figure) is not None
        ]
        return (min if self.is_least else max)(values) if values else None


def _targets() -> Iterator[Target]:
    for codec, original, memory in (("deflate", 35, 0.2), ("lz4", 90, 0.5), ("none", 150, 1.0)):
        name = f"ours, {codec}"
        yield Target(f"{codec}: times the original", "reading", name, "times_original", original)
        yield Target(f"{codec}: times np.take", "reading", name, "times_memory", memory)
    for codec in CODECS:
        for peer, times in (("monai", 5), ("torchio", 5), ("torch", 3)):
            what, figure = f"{codec}, augmenting: times {peer}", f"times_{peer}"
            yield Target(what, "augmenting", f"ours, {codec}", figure, times)
    for codec in CODECS:
        for step, percent in zip(STEPS_MS, (1, 2), strict=True):
            what, figure = f"{codec}: waiting, step {step} ms", f"percent_{step}_ms"
            yield Target(what, "waiting", f"ours, {codec}", figure, percent, False, "%")
    for case, wanted in (("as it is", 300), ("augmented", 1000)):
        for codec in CODECS:
            name = f"{codec}, {case}"
            what = f"{name}: first batch, new process"
            yield Target(what, "first batch", name, "new_process_ms", wanted, False, "ms")
            what = f"{name}: first batch, warm"
            yield Target(what, "first batch", name, "warm_ms", 100, False, "ms")
    for codec in CODECS:
        what = f"{codec}: growth, batches"
        yield Target(what, "memory", codec, "growth_batches", 1, False)


def tell_targets(figures: Sequence[Mapping[str, Any]], emit: Emit) -> None:
    """Every target of which a figure was measured, and whether it is met."""
    for target in _targets():
        found = target.found([line for line in figures if not line["case"].endswith(_VARIANTS)])
        if found is not None:
            met = found >= target.wanted if target.is_least else found <= target.wanted
            sign = "at least" if target.is_least else "at most"
            wanted = f"{sign} {target.wanted:g} {target.unit}".strip()
            emit(
                {
                    "measures": "targets",
                    "case": target.what,
                    "wanted": wanted,
                    "measured": found,
                    "met": "yes" if met else "NO",
                }
            )


def plot(figures: Sequence[Mapping[str, Any]], file: str) -> None:
    """Bars of the samples per second, and of the share of time that is waited."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    panels = [
        ("reading", "samples_per_second", "samples/s"),
        ("augmenting", "samples_per_second", "samples/s, augmented"),
        ("waiting", f"percent_{STEPS_MS[0]}_ms", f"% waited, step {STEPS_MS[0]} ms"),
        ("waiting", f"percent_{STEPS_MS[1]}_ms", f"% waited, step {STEPS_MS[1]} ms"),
    ]
    chosen = [
        (title, [(line["case"], line[figure]) for line in figures if line["measures"] == part])
        for part, figure, title in panels
    ]
    chosen = [(title, bars) for title, bars in chosen if bars]
    sizes = [len(bars) for _, bars in chosen]
    drawing, axes = plt.subplots(
        len(chosen), figsize=(9, 1.5 * len(chosen) + 0.25 * sum(sizes)), squeeze=False,
        height_ratios=sizes, layout="constrained",
    )  # fmt: skip
    for (title, bars), axis in zip(chosen, axes[:, 0], strict=True):
        axis.barh([name for name, _ in bars][::-1], [value for _, value in bars][::-1])
        axis.set_xlabel(title)
    drawing.savefig(file, dpi=120)
    plt.close(drawing)


# --- what is printed ------------------------------------------------------------------------------


#: What tells apart cases that no target is about.
_VARIANTS = (", unverified", ", float32, channels")
_RATE = (("samples/s", "{samples_per_second:,.0f}"), ("CPU us/sample", "{cpu_microseconds:.0f}"))
_COLUMNS = {
    "left out": (("not installed", "{needs}"),),
    "reading": (
        *_RATE,
        ("times original", "{times_original:.0f}"),
        ("times np.take", "{times_memory:.2f}"),
        ("times torch", "{times_torch:.1f}"),
    ),
    "augmenting": (
        *_RATE,
        ("times MONAI", "{times_monai:.1f}"),
        ("times TorchIO", "{times_torchio:.1f}"),
        ("times torch", "{times_torch:.1f}"),
    ),
    "waiting": tuple((f"step {ms} ms", f"{{percent_{ms}_ms:.1f}} %") for ms in STEPS_MS)
    + tuple((f"lowest, {ms} ms", f"{{lowest_{ms}_ms:.1f}} %") for ms in STEPS_MS),
    "first batch": (
        ("import", "{import_ms:.0f} ms"),
        ("first batch", "{cold_ms:.0f} ms"),
        ("both", "{new_process_ms:.0f} ms"),
        ("second loader", "{warm_ms:.0f} ms"),
        ("loads numba", "{loads_numba:.0f}"),
    ),
    "memory": (
        ("one batch MiB", "{batch_mib:.1f}"),
        ("before", "{start_mib:.0f}"),
        ("after 1 epoch", "{first_epoch_mib:.0f}"),
        ("half way", "{half_way_mib:.0f}"),
        ("after all", "{last_epoch_mib:.0f}"),
        ("peak MiB", "{peak_mib:.0f}"),
        ("growth/batch", "{growth_batches:.1f}"),
    ),
    "targets": (("should be", "{wanted}"), ("measured", "{measured:.3g}"), ("met", "{met}")),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, default=0, help="slices [5000; larger ones: 1000]")
    parser.add_argument("--size", type=int, default=256, help="rows and columns [256]")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each loader has [5]")
    parser.add_argument("--seconds", type=float, default=0.6, help="of each turn [0.6]")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (repeatable)")
    parser.add_argument("--directory", help="where the files go [memory, if it has room]")
    parser.add_argument("--quick", action="store_true", help="everything once, on 64 slices")
    parser.add_argument("--output", help="a file for every figure, a JSON object per line")
    parser.add_argument("--plot", help="a file for a picture of the figures")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(files: Files, arguments: argparse.Namespace, emit: Emit) -> None:
    """The parts that were asked for, one after another."""
    quick, parts = arguments.quick, arguments.only or PARTS
    rounds, seconds = (1, 0.1) if quick else (arguments.rounds, arguments.seconds)
    size = min(arguments.batch_size, len(files.images))
    if "reading" in parts:
        compare("reading", readers(files, size), rounds, seconds, emit)
    if "augmenting" in parts:
        compare("augmenting", augmenters(files, size), rounds, seconds, emit)
    if "waiting" in parts:
        waiting(files, rounds, 3 if quick else 50, emit)
    if "first batch" in parts:
        first_batches(files, rounds, emit)
    if "memory" in parts:
        memory(files, 2 if quick else 10, emit)


def main() -> None:
    arguments = parse()
    if arguments.child:
        run_child(*arguments.child)
        return
    printed = emitter("loader", _COLUMNS, as_json=arguments.json, name_width=38, width=17)
    figures: list[Mapping[str, Any]] = []

    def emit(line: Figures) -> None:
        figures.append(line)
        printed(line)

    quick = arguments.quick
    slices = 64 if quick else arguments.slices or (5000 if arguments.size <= 256 else 1000)
    from parallel_dicomseg.loader import warm_up

    warm_up()
    with made_files(arguments.directory, slices, arguments.size) as files:
        measure(files, arguments, emit)
    if not quick:
        tell_targets(tuple(figures), emit)
    if arguments.output:
        lines = [json.dumps({"size": arguments.size, **line}) for line in figures]
        Path(arguments.output).write_text("\n".join(lines) + "\n")
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
