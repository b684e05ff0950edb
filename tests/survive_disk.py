"""Disks that fill up, fail, are interrupted or take less than they are given.

    python tests/survive_disk.py --rounds 60

`--rounds` is the number of sizes at which the disk is full, once by a stand-in for the disk and,
where a file system in memory can be mounted (as root, on Linux), once by a real one. Every call
that writes fails once with ENOSPC, EIO and EINTR, and is cut short once. Looked for: anything but a
clear error, a crash of the process, and a resumed output that is not the same, byte for byte.
"""

import argparse
import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from disks import WRITING, FailingDisk, FullDisk
from survive_power import OUTPUT, convert, make_run

from parallel_dicomseg.errors import ResumableError
from parallel_dicomseg.store import settle

FAULTS = (errno.ENOSPC, errno.EIO, errno.EINTR, "short")
#: What must go on as if nothing had happened. Calls other than writes Python itself repeats.
HARMLESS = (errno.EINTR, "short")


def expected_output(run):
    """The bytes of an output that nothing disturbed."""
    with tempfile.TemporaryDirectory() as name:
        convert(Path(name), run)
        return (Path(name) / OUTPUT).read_bytes()


def one_failure(run, disk, expected, *, fails):
    """One run on a bad disk, and one on a good one after it; what went wrong, or ''."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            convert(folder, run, disk)
        except ResumableError as error:
            if fails is False or "cannot be written" not in str(error):
                return f"an unexpected error: {error}"
        except Exception as error:  # noqa: BLE001
            return f"an unclear error: {type(error).__name__}: {error}"
        else:
            if fails:
                return "the fault was not told"
        if (folder / OUTPUT).exists():
            settle(folder / OUTPUT)  # as `convert --resume` does with what is whole
        else:
            try:
                convert(folder, run)
            except Exception as error:  # noqa: BLE001
                return f"cannot be resumed: {error}"
        if [path.name for path in folder.iterdir()] != [OUTPUT]:
            return "files are left over"
        return "" if (folder / OUTPUT).read_bytes() == expected else "the output is wrong"


def every_call(fault, run, expected, step=1):
    """Let every `step`-th call fail, each in a run of its own; counts by what went wrong."""
    found, n = Counter(), 1
    calls = ("write",) if fault in HARMLESS else WRITING
    while True:
        disk = FailingDisk(n, fault, calls)
        wrong = one_failure(run, disk, expected, fails=False if fault in HARMLESS else None)
        if not disk.failed:
            return dict(found)
        found[wrong or "fine"] += 1
        n += step


def full_disks(sizes, run, expected):
    """Disks that hold a part of what is written; counts by what went wrong."""
    total = len(expected) + 60_000  # with the journal
    found = Counter()
    for k in range(sizes):
        disk = FullDisk(total * k // sizes)
        found[one_failure(run, disk, expected, fails=None) or "fine"] += 1
    return dict(found)


def mounted_disks(sizes, run, expected):
    """The same on real file systems of limited size, each run in a process of its own."""
    found = Counter()
    for k in range(1, sizes + 1):
        with tempfile.TemporaryDirectory() as name:
            pages = max(4, (len(expected) + 100_000) * k // sizes // 4096)
            with _mounted(name, 4096 * pages) as is_mounted:
                if not is_mounted:
                    return {"no file system can be mounted here": sizes}
                found[_on_full(Path(name), run, expected) or "fine"] += 1
    return dict(found)


def _on_full(folder, run, expected):
    pid = os.fork()
    if not pid:
        try:
            convert(folder, run)
            os._exit(0)
        except ResumableError:
            os._exit(3)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        return f"signal {-status}"
    if status == 1:
        return "an unclear error"
    if (folder / OUTPUT).exists():
        return "" if (folder / OUTPUT).read_bytes() == expected else "the output is wrong"
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    convert(folder, run)
    return "" if (folder / OUTPUT).read_bytes() == expected else "the resumed output is wrong"


@contextlib.contextmanager
def _mounted(folder, size):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    try:
        is_mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", folder], check=True)


def all_of_it(sizes, step=1):
    """Every experiment; counts by what went wrong, by experiment."""
    run = make_run()
    expected = expected_output(run)
    named = {fault: errno.errorcode.get(fault, fault) for fault in FAULTS}
    return {
        **{f"every call: {named[f]}": every_call(f, run, expected, step) for f in FAULTS},
        "full, stand-in": full_disks(sizes, run, expected),
        "full, mounted": mounted_disks(sizes, run, expected),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    found = all_of_it(args.rounds)
    print(json.dumps(found, indent=2))
    fine = {"fine", "no file system can be mounted here"}
    sys.exit(not all(set(counts) <= fine for counts in found.values()))


if __name__ == "__main__":
    main()
