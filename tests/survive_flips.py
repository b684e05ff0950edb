"""Flip single bits of finished files, and see who finds them.

python tests/survive_flips.py --rounds 10000
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import written

from parallel_dicomseg.chunks import CODECS
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.seal import PIXELS, STRUCTURE, check_structure
from parallel_dicomseg.store import verify_file


def region_of(seal, offset):
    """Where a byte lies: a region of the file, and what a finder must name."""
    if offset >= int(seal.offsets[-1]) + int(seal.extents["size"][-1]):
        return "the seal", "seal"
    place = int(np.searchsorted(seal.offsets, offset, side="right")) - 1
    name = seal.names[seal.extents["owner"][place]]
    if name in PIXELS:
        return "pixels", f"{name}[{seal.extents['number'][place]}]: checksum"
    region = "names, indices, unused" if name == STRUCTURE else "tables and descriptions"
    return region, f"{name}: bytes"


def flip(path, offset, bit):
    """Turn one bit; a second call turns it back."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def words_of_verify(path):
    """What verify says; empty where it finds nothing."""
    try:
        return " ".join(verify_file(path).problems)
    except LayoutError as error:
        return str(error)


def words_of_loader(path):
    """What one epoch of a loader that compares checksums ends in; empty where it ends well."""
    try:
        with BatchLoader(path, 4, verify=True) as batches:
            for _ in batches:
                pass
    except LayoutError as error:
        return str(error)
    return ""


def survive(rounds, seed, folder):
    """Flip `rounds` bits, a share of them in a file of each codec, one at a time.

    Returns
    -------
    Per region: flips, found by verify, found by the loader; and the places that verify, or in
    pixels the loader, did not find and name.
    """
    random = np.random.default_rng(seed)
    flips, by_verify, by_loader = Counter(), Counter(), Counter()
    missed = []
    for k, codec in enumerate(CODECS):
        path = Path(folder, f"{codec}.h5")
        more = {"headers": written.headers(), "marks": written.marks()}
        written.write(path, plan=written.layout(codec=codec), **more)
        sound = shutil.copy(path, path.with_suffix(".sound"))
        seal = check_structure(path)
        for _ in range(rounds // len(CODECS) + (k < rounds % len(CODECS))):
            offset, bit = int(random.integers(path.stat().st_size)), int(random.integers(8))
            region, name = region_of(seal, offset)
            flip(path, offset, bit)
            verify, loader = words_of_verify(path), words_of_loader(path)
            flip(path, offset, bit)
            flips[region] += 1
            by_verify[region] += name in verify
            by_loader[region] += bool(loader)
            # a loader looks for a seal; what was one it takes for a file without
            if name not in verify or (not loader and region != "the seal"):
                missed.append((codec, offset, bit, region))
        assert path.read_bytes() == Path(sound).read_bytes()
        assert words_of_verify(path) == words_of_loader(path) == ""
    return {
        region: (flips[region], by_verify[region], by_loader[region]) for region in flips
    }, missed


def main():
    """Print the counts; the exit status is 1 if a flip was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts, missed = survive(options.rounds, options.seed, folder)
    print(f"{'region':<26}{'flips':>8}{'verify':>8}{'loader':>8}")
    for region, found in counts.items():
        print(f"{region:<26}" + "".join(f"{count:>8}" for count in found))
    print(f"missed: {missed or 'none'}; {time.perf_counter() - start:.0f} s")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
