"""kill -9: conversions killed at random moments, and some of them again while they are resumed.

    python tests/survive_kills.py --rounds 1000

Every round converts a cohort in a process of its own, kills it, kills (30 %) its resumption as
well, and resumes what is left. Looked for: an output that cannot be read or is wrong, slices that
were written before the kill and are not there after it, and bytes that differ from those of a run
that nobody killed.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from parallel_dicomseg import ConvertOptions, convert_cohort, scan_cohort
from parallel_dicomseg.store import find_leftover, unfinished
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

OPTIONS = ConvertOptions(resume=True, workers=2, slices_per_task=4, codec="lz4")
SECOND_KILL = 0.3
#: So that commits, which come every half second, come often in a run of a tenth of one.
COMMIT_SECONDS = 0.005


class Shared:
    """Numbers that outlive the process that writes them."""

    def __init__(self):
        self._room = mmap.mmap(-1, 16)

    def tell(self, place, value):
        """Write number 0 or 1."""
        self._room[8 * place : 8 * place + 8] = struct.pack("<q", value)

    def told(self, place):
        """What was written last."""
        return struct.unpack("<q", self._room[8 * place : 8 * place + 8])[0]


def start(cohort, output, shared):
    """Convert in a child process; its number."""
    shared.tell(0, 0)
    pid = os.fork()
    if pid:
        return pid
    try:
        unfinished._COMMIT_SECONDS = COMMIT_SECONDS
        summary = convert_cohort(
            cohort, output, options=OPTIONS, progress=lambda event: shared.tell(0, event.done)
        )
        shared.tell(1, summary.resumed)
        os._exit(0)
    except BaseException:  # noqa: BLE001  a child must not go on as its parent
        traceback.print_exc()
        os._exit(1)


def wait(pid, seconds=None):
    """Let a child run for so long and kill it; or until it ends. Gives its exit status."""
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def state(output, expected):
    """What is there: 'absent', 'whole' or 'wrong', and the slices of the partial file."""
    left = find_leftover(output)
    done = left.slices_done if left else 0
    if not output.exists():
        return "absent", done
    return ("whole" if output.read_bytes() == expected else "wrong"), done


def kill_once(cohort, output, expected, seconds, shared):
    """Run, kill, look: what went wrong, or '', and whether the run had ended before."""
    if wait(start(cohort, output, shared), seconds) not in (0, -signal.SIGKILL):
        return "a run failed", False
    found, done = state(output, expected)
    if found == "wrong":
        return "a wrong output", False
    if found == "absent" and done < shared.told(0):
        return "written slices are lost", False
    return "", found == "whole"


def one_round(cohort, folder, expected, usual, chance, shared):
    """One conversion that is killed; what went wrong, or how it went."""
    output = folder / "x.h5"
    kills = 1 + (chance.random() < SECOND_KILL)
    for _ in range(kills):
        wrong, is_whole = kill_once(
            cohort, output, expected, chance.uniform(0, 1.05 * usual), shared
        )
        if wrong:
            return wrong
        if is_whole:
            return "ended before the kill"
    before = state(output, expected)[1]
    if wait(start(cohort, output, shared)) != 0:
        return "cannot be resumed"
    if shared.told(1) < before:
        return "finished slices were done again"
    if state(output, expected)[0] != "whole":
        return "the resumed output is wrong"
    if [path.name for path in folder.iterdir()] != ["x.h5"]:
        return "files are left over"
    return "resumed" if before else "begun anew"


def rounds_of(rounds, seed):
    """So many conversions; counts of how they went."""
    chance, shared = random.Random(seed), Shared()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_sunnybrook_cohort(root / "cohort", patients=4, slices=30, rows=128, columns=128)
        cohort = scan_cohort(root / "cohort")
        whole = root / "whole.h5"
        convert_cohort(cohort, whole, options=OPTIONS)  # and compile
        expected = whole.read_bytes()
        usual = min(_seconds(cohort, root / f"timed{k}.h5", shared) for k in range(3))
        found = Counter()
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                found[one_round(cohort, Path(folder), expected, usual, chance, shared)] += 1
        return dict(found)


def _seconds(cohort, output, shared):
    """How long a run takes that nobody kills."""
    begun = time.perf_counter()
    assert wait(start(cohort, output, shared)) == 0
    return time.perf_counter() - begun


#: How a round may go.
FINE = {"resumed", "begun anew", "ended before the kill"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = rounds_of(args.rounds, args.seed)
    print(json.dumps(found))
    sys.exit(not set(found) <= FINE)


if __name__ == "__main__":
    main()
