"""Damage finished files in many places at once, and let everything that opens them try.

Half of the damaged files are as they were written, from the other half the seal was cut off
before, which shows what HDF5 makes of them: each is opened in a process of its own.

python tests/survive_hdf5.py --rounds 2000
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import written

from parallel_dicomseg.errors import ParallelDicomSegError
from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.report.inspection import inspect_file
from parallel_dicomseg.seal import check_structure
from parallel_dicomseg.store import open_dataset, verify_file

DEADLINE_SECONDS = 10
MEMORY_BYTES = 8 << 30
SECTOR = 512


def mutated(sound, random):
    """The bytes of a file with one kind of damage."""
    data = bytearray(sound)
    kind = random.choice(["bytes", "bytes", "sector", "garbage", "cut"])
    at = int(random.integers(len(data)))
    if kind == "bytes":
        for place in random.integers(len(data), size=random.choice([1, 2, 8, 64])):
            data[place] = random.integers(256)
    elif kind == "cut":
        del data[at:]
    else:
        start = at - at % SECTOR
        end = min(start + SECTOR, len(data))
        data[start:end] = bytes(end - start) if kind == "sector" else random.bytes(end - start)
    return bytes(data)


def verified(path):
    """Raise what verify finds."""
    problems = verify_file(path).problems
    if problems:
        raise ParallelDicomSegError(problems[0])


def read(path):
    """Every slice and every column."""
    with open_dataset(path) as dataset:
        for group in ("table", "series", "volumes", "headers", "marks", "rejected"):
            for column in dataset.columns(group):
                dataset.column(column, group)
        for row in range(len(dataset)):
            assert dataset.images[row].shape == dataset.masks[row].shape


def batches(path):
    """An epoch that compares checksums."""
    with BatchLoader(path, 4, verify=True) as loader:
        for _ in loader:
            pass


READERS = (verified, read, inspect_file, batches)


def outcomes(path):
    """What each reader does with a file: 'refused', 'read', or a fault of ours by its name."""
    for reader in READERS:
        try:
            reader(path)
            found = "read"
        except ParallelDicomSegError:
            found = "refused"
        except Exception as error:  # noqa: BLE001  whatever it is, it is counted
            found = f"fault {type(error).__name__}"
        yield reader.__name__, found


def serve(pipe):
    """Open what comes, one file after another, until the process is ended from outside."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pipe.send("ready")
    while True:
        for outcome in outcomes(Path(pipe.recv())):
            pipe.send(outcome)


class Opener:
    """A process that opens files, replaced when it dies or hangs."""

    def __init__(self):
        self._process = None

    def ask(self, path):
        """(reader, outcome) of each reader, the last one 'crash' or 'hang' if it was that."""
        if self._process is None:
            self._start()
        self._pipe.send(str(path))
        found = []
        for reader in READERS:
            if not self._pipe.poll(DEADLINE_SECONDS):
                return [*found, (reader.__name__, self._end("hang"))]
            try:
                found.append(self._pipe.recv())
            except EOFError:
                return [*found, (reader.__name__, self._end("crash"))]
        return found

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        assert self._pipe.recv() == "ready"

    def _end(self, outcome):
        self.close()
        return outcome

    def close(self):
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = None


def survive(rounds, seed, folder, kinds=("sealed", "unsealed")):
    """Open `rounds` damaged files; a count by (kind of file, reader, outcome)."""
    random = np.random.default_rng(seed)
    path = Path(folder, "sound.h5")
    written.write(path, headers=written.headers(), marks=written.marks())
    sealed = path.read_bytes()
    seal = check_structure(path)
    unsealed = sealed[: int(seal.offsets[-1]) + int(seal.extents["size"][-1])]
    damaged = Path(folder, "damaged.h5")
    counts = Counter()
    opener = Opener()
    try:
        for k in range(rounds):
            kind = kinds[k % len(kinds)]
            sound = sealed if kind == "sealed" else unsealed
            data = mutated(sound, random)
            if data == sound:
                continue
            damaged.write_bytes(data)
            counts.update((kind, *found) for found in opener.ask(damaged))
    finally:
        opener.close()
    return counts


def main():
    """Print the counts; the exit status is 1 if a sealed file crashed, hung or went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = survive(options.rounds, options.seed, folder)
    for (kind, reader, outcome), count in sorted(counts.items()):
        print(f"{kind:<10}{reader:<14}{outcome:<24}{count:>6}")
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(bool(wrong(counts)))


def wrong(counts):
    """What may not be: a fault of ours, and in a sealed file a crash, a hang, or no notice."""
    return {
        key: count
        for key, count in counts.items()
        if key[2].startswith("fault")
        or (key[0] == "sealed" and key[2] in {"crash", "hang"})
        or (key[:2] == ("sealed", "verified") and key[2] == "read")
    }


if __name__ == "__main__":
    main()
