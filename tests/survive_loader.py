"""What a loader must survive, as often as asked: breaks, exceptions, forks and spawns.

    python tests/survive_loader.py --rounds 1000        the issue's numbers, ten breaks a round
    python tests/survive_loader.py --rounds 20 --seed 7

A round is ten epochs that are broken off, one exception in the augmentation, and (every fifth
round) a process that goes on with an epoch in its middle, forked and spawned in turn. Every batch
that comes is compared with what the file holds; at the end no thread and no process may be left.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.records import ConvertOptions
from parallel_dicomseg.store import open_dataset
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

BREAKS_PER_ROUND = 10
ROUNDS_PER_PROCESS = 5
#: A child that has not answered by then hangs.
CHILD_SECONDS = 120.0


class Breaks(Exception):  # noqa: N818  not an error of the program's
    """What the augmentation is made to raise."""


def make_file(folder: Path, codec: str = "deflate") -> Path:
    """A file of 40 slices that are no squares."""
    make_sunnybrook_cohort(folder / "data", patients=4, slices=10, rows=24, columns=40)
    options = ConvertOptions(scheduler="synchronous", codec=codec)
    convert_cohort(scan_cohort(folder / "data"), folder / "cohort.h5", options=options)
    return folder / "cohort.h5"


def truth(file: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All images and masks, as h5py reads them."""
    with open_dataset(file) as dataset:
        rows = range(len(dataset))
        return (
            np.stack([dataset.images[k] for k in rows]),
            np.stack([dataset.masks[k] for k in rows]),
        )


def open_loader(file: Path, draw: random.Random, **options: Any) -> BatchLoader:
    """A loader with some number of threads and batches ahead."""
    chosen = {
        "batch_size": draw.choice((1, 3, 7, 16)),
        "threads": draw.choice((1, 2, 4)),
        "prefetch": draw.choice((1, 2, 4)),
        "seed": draw.randrange(1000),
        "image_dtype": "stored",
        "masks": "bits",
        **options,
    }
    return BatchLoader(file, **chosen)


def wrong_samples(batch: Any, images: Any, masks: Any) -> int:
    """How many samples of a batch are not those of the file."""
    wrong = (batch.image[:, 0] != images[batch.index]).any((1, 2))
    return int((wrong | (batch.mask != masks[batch.index]).any((1, 2))).sum())


def break_off(loader: BatchLoader, known: Any, draw: random.Random, counts: Counter[str]) -> None:
    """Take some batches of an epoch, or of several, keep one, and end in one of four ways."""
    wanted = draw.randrange(len(loader) + 1)
    forever = draw.random() < 0.5
    batches = loader.forever() if forever else iter(loader)
    kept = None
    for _ in range(2 * wanted if forever else wanted):
        batch = next(batches)
        kept = batch if draw.random() < 0.2 else kept
        counts["samples"] += len(batch.index)
        counts["wrong"] += wrong_samples(batch, *known)
    if draw.random() < 0.5:
        batches.close()
    del batches
    if kept is not None:  # whatever was made afterwards, it is what it was
        counts["wrong"] += wrong_samples(kept, *known)
    counts["breaks"] += 1


def raise_inside(file: Path, draw: random.Random, counts: Counter[str]) -> None:
    """An augmentation that fails in one of the samples: the consumer is told, once."""
    with open_loader(file, draw, augment="flip", masks="channels") as loader:
        recipe = loader._recipe
        fatal = int(draw.choice(loader.rows))
        augment = type(recipe)._augment

        def fail(self: Any, rows: Any, *others: Any) -> Any:
            if fatal in rows:
                raise Breaks(fatal)
            return augment(self, rows, *others)

        object.__setattr__(recipe, "_augment", fail.__get__(recipe))
        try:
            for _ in loader:
                pass
        except Breaks:
            counts["exceptions"] += 1
        else:
            counts["lost exceptions"] += 1


def finish_epoch(batches: Any, known: Any, sender: Any) -> None:
    """In a child: go on with an epoch; tell how many samples came and how many were wrong."""
    seen, wrong = 0, 0
    for batch in batches:
        seen += len(batch.index)
        wrong += wrong_samples(batch, *known)
    sender.send((seen, wrong))
    sender.close()


def finish_loader(loader: BatchLoader, known: Any, sender: Any) -> None:
    """In a spawned child: go on with the epoch that the pickled loader is in."""
    loader.load_state_dict(loader.state_dict())
    finish_epoch(iter(loader), known, sender)
    loader.close()


def go_on_elsewhere(
    file: Path, method: str, known: Any, draw: random.Random, counts: Counter[str]
) -> None:
    """In mid-epoch start a process that goes on, and go on here too."""
    context = multiprocessing.get_context(method)
    with open_loader(file, draw, batch_size=7) as loader:
        batches = iter(loader)
        taken = draw.randrange(1, len(loader) - 1)
        before = sum(len(next(batches).index) for _ in range(taken))
        receiver, sender = context.Pipe(duplex=False)
        target, first = (finish_epoch, batches) if method == "fork" else (finish_loader, loader)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads at a fork: that is what is tried here
            child = context.Process(target=target, args=(first, known, sender))  # type: ignore[attr-defined]
            child.start()
        sender.close()
        for batch in batches:
            counts["wrong"] += wrong_samples(batch, *known)
        try:
            seen, wrong = receiver.recv() if receiver.poll(CHILD_SECONDS) else (-1, 0)
        except EOFError:
            seen, wrong = -1, 0
        counts["wrong"] += wrong
        counts["processes"] += 1
        counts["processes that failed"] += seen != loader.samples - before
        child.join(10)
        if child.is_alive():
            counts["hung processes"] += 1
            child.kill()
            child.join()
        child.close()
        receiver.close()


def left_behind() -> int:
    """Threads of loaders, and processes, that are still there a moment later."""
    gc.collect()
    until = time.monotonic() + 5
    while True:
        threads = [t for t in threading.enumerate() if t.name.startswith("batch-loader")]
        left = len(threads) + len(multiprocessing.active_children())
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.01)


def survive(
    file: Path,
    rounds: int,
    seed: int,
    *,
    methods: tuple[str, ...],
    tell: Callable[[Counter[str]], object] = lambda counts: None,
) -> Counter[str]:
    """Do it, and count; `tell` is called after every round.

    Returns
    -------
    What was done ('breaks', 'exceptions', 'processes', 'samples'), and what must be 0: 'wrong'
    samples, 'lost exceptions', 'processes that failed', 'hung processes', 'left behind'.
    """
    counts: Counter[str] = Counter()
    draw = random.Random(seed)
    known = truth(file)
    for number in range(rounds):
        with open_loader(file, draw) as loader:
            for _ in range(BREAKS_PER_ROUND):
                break_off(loader, known, draw, counts)
        raise_inside(file, draw, counts)
        if methods and number % ROUNDS_PER_PROCESS == 0:
            method = methods[(number // ROUNDS_PER_PROCESS) % len(methods)]
            go_on_elsewhere(file, method, known, draw, counts)
        tell(counts)
    counts["left behind"] += left_behind()
    return counts


#: Of what `survive` counts, what may not happen.
FAULTS = ("wrong", "lost exceptions", "processes that failed", "hung processes", "left behind")


def tell_progress(counts: Counter[str]) -> None:
    """A line now and then."""
    if counts["breaks"] % (50 * BREAKS_PER_ROUND) == 0:
        words = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        sys.stderr.write(f"{words}\n")


def main() -> int:
    """Run it as often as asked; status 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default="deflate")
    arguments = parser.parse_args()
    known = multiprocessing.get_all_start_methods()
    methods = tuple(name for name in ("fork", "spawn") if name in known)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = make_file(Path(folder), arguments.codec)
        counts = survive(
            file, arguments.rounds, arguments.seed, methods=methods, tell=tell_progress
        )
    lines = [f"{name}: {count}" for name, count in sorted(counts.items())]
    sys.stdout.write("\n".join([*lines, f"{time.perf_counter() - start:.0f} s", ""]))
    return int(any(counts[name] for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
