"""Power cuts: a real run is recorded, and what a disk may hold at any moment of it is resumed.

    python tests/survive_power.py --rounds 1000
    python tests/survive_power.py --rounds 300 --without-syncs

A disk holds what was synced. Of what was written since the last sync of a file, any pages may have
arrived, in any order, the last one torn; the file may be as long as if all had. Of what happened to
names since the last sync of the directory, the first few may have. `--without-syncs` forgets one
sync of the run after the other: each of them must be missed.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import written
from disks import RecordingDisk

from parallel_dicomseg.store import Hdf5Writer, find_leftover, unfinished
from parallel_dicomseg.store.disk import SYSTEM

SLICES, PER_TASK = 48, 3
PAGE, SECTOR = 4096, 512
OUTPUT = "x.h5"


def make_run():
    """A layout and its chunks, one of them with a rejected slice."""
    table, plan = written.slices(SLICES), written.layout(SLICES)
    images, masks = written.pictures(SLICES)
    chunks = []
    for first in range(0, SLICES, PER_TASK):
        part = slice(first, first + PER_TASK)
        good = [k != 7 for k in range(first, first + PER_TASK)]
        chunks.append(written.chunk(images[part], masks[part], plan, first, written.np.array(good)))
    return table, plan, chunks


def convert(folder, run, disk=SYSTEM, on_commit=None, pause=0.0):
    """Write, or go on writing, the output in a folder; gives the slices that were there before."""
    table, plan, chunks = run
    with Hdf5Writer(
        folder / OUTPUT, plan, table, resume=True, disk=disk, on_commit=on_commit
    ) as writer:
        for chunk in chunks:
            if chunk.first >= writer.slices_seen:
                writer.put(chunk)
                time.sleep(pause)
        writer.publish(())
    return writer.slices_resumed


def record(run):
    """The log of a whole run with many commits, and the bytes of its output."""
    disk = RecordingDisk()
    seconds, unfinished._COMMIT_SECONDS = unfinished._COMMIT_SECONDS, 0.002
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            convert(folder, run, disk, lambda slices: disk.note("ack", slices), pause=0.004)
            disk.note("published")
            content = (folder / OUTPUT).read_bytes()
    finally:
        unfinished._COMMIT_SECONDS = seconds
    assert replayed(disk.log) == content, "a write went round the recorder"
    return disk.log, content


def replayed(log):
    """The output that the recorded calls make."""
    return state_after(log, len(log) - 1, random.Random(0), all_arrives=True)[0][OUTPUT]


def state_after(log, last, chance, *, all_arrives=False):
    """What a disk may hold after a cut behind call `last`.

    Returns the files by name, the acknowledged slices, and whether the end was acknowledged.
    """
    machine = _Machine()
    for number, (call, *args) in enumerate(log[: last + 1]):
        getattr(machine, call)(number, *args)
    kept = len(machine.names) if all_arrives else chance.randint(0, len(machine.names))
    machine.rename(kept)
    for inode, changes in machine.waiting.items():
        _arrive(machine.content[inode], changes, chance, 1.0 if all_arrives else None)
    files = {name: bytes(machine.content[inode]) for name, inode in machine.durable.items()}
    return files, machine.acknowledged, machine.is_published


class _Machine:
    """What is on a disk for sure, and what is on its way there; a method per recorded call."""

    def __init__(self):
        self.content = {}  # by inode: the number of the call that made it
        self.waiting = defaultdict(list)  # changes by inode
        self.now = {}  # name -> inode
        self.durable = {}
        self.names = []  # what happened to names since the last sync: (removed, added, inode)
        self.acknowledged = 0
        self.is_published = False

    def ack(self, _, slices):
        self.acknowledged = slices

    def published(self, _):
        self.is_published = True

    def open(self, number, name, is_new):
        if is_new and name not in self.now:
            self.now[name], self.content[number] = number, bytearray()
            self.names.append(("", name, number))
        elif is_new:
            self.truncate(number, name, 0)

    def write(self, _, name, offset, content):
        self.waiting[self.now[name]].append(("write", offset, content))

    def truncate(self, _, name, size):
        self.waiting[self.now[name]].append(("truncate", size))

    def sync(self, _, name):
        inode = self.now[name]
        for change in self.waiting.pop(inode, []):
            _apply(self.content[inode], change)

    def replace(self, _, source, target):
        self.now[target] = self.now.pop(source)
        self.names.append((source, target, self.now[target]))

    def remove(self, _, name):
        del self.now[name]
        self.names.append((name, "", None))

    def sync_directory(self, _):
        self.rename(len(self.names))
        self.names = []

    def rename(self, count):
        for removed, added, inode in self.names[:count]:
            self.durable.pop(removed, None)
            if added:
                self.durable[added] = inode


def _apply(content, change):
    call, at, *rest = change
    if call == "truncate":
        content[at:] = bytes(max(0, at - len(content)))
        return
    end = at + len(rest[0])
    content.extend(bytes(max(0, end - len(content))))
    content[at:end] = rest[0]


def _arrive(content, changes, chance, share):
    """Let some pages of unsynced writes reach the disk."""
    share = chance.choice((0, 0.1, 0.5, 0.9, 1.0)) if share is None else share
    longest = len(content)
    for change in changes:
        if change[0] == "truncate":
            if chance.random() < share or share == 1:
                _apply(content, change)
            continue
        _, offset, data = change
        longest = max(longest, offset + len(data))
        at = offset
        while at < offset + len(data):
            end = min((at // PAGE + 1) * PAGE, offset + len(data))
            if share == 1 or chance.random() < share:
                torn = share < 1 and chance.random() < 0.1
                stop = min(end, (at // SECTOR + chance.randint(0, 7)) * SECTOR) if torn else end
                if stop > at:
                    _apply(content, ("write", at, data[at - offset : stop - offset]))
            at = end
    if share < 1 and chance.random() < 0.5:
        content.extend(bytes(max(0, longest - len(content))))


def cut(run, log, expected, last, chance):
    """One power cut and what comes after it; gives what went wrong, or ''."""
    files, acknowledged, published = state_after(log, last, chance)
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        output = folder / OUTPUT
        if published and not output.exists():
            return "the finished output is lost"
        if output.exists():
            return "" if output.read_bytes() == expected else "a finished output is wrong"
        left = find_leftover(output)
        if (left.slices_done if left else 0) < acknowledged:
            return "acknowledged slices are lost"
        try:
            resumed = convert(folder, run)
        except Exception as error:  # noqa: BLE001
            return f"cannot be resumed: {type(error).__name__}"
        if resumed < acknowledged:
            return "acknowledged slices were done again"
        return "" if output.read_bytes() == expected else "the resumed output is wrong"


def _fast_folder():
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def cuts(rounds, seed, run=None, log=None, expected=None):
    """So many power cuts at random moments; counts of what went wrong."""
    chance = random.Random(seed)
    run = run or make_run()
    if log is None:
        log, expected = record(run)
    found = Counter(
        cut(run, log, expected, _moment(log, chance), chance) or "fine" for _ in range(rounds)
    )
    return dict(found)


def _moment(log, chance):
    """When to cut: the end is a short moment in which much happens."""
    return chance.randrange(len(log) - 5 if chance.random() < 0.3 else 0, len(log))


def kinds_of_sync(log):
    """Places of the calls of each kind of sync, by name."""
    first_ack = next(k for k, entry in enumerate(log) if entry[0] == "ack")
    rename = next(k for k, entry in enumerate(log) if entry[:2] == ("replace", f"{OUTPUT}.partial"))
    last_ack = max(k for k, entry in enumerate(log) if entry[0] == "ack")
    kinds = defaultdict(list)
    for k, (call, *args) in enumerate(log):
        if call == "sync_directory":
            kinds["names, at the beginning" if k < first_ack else "names, at the end"].append(k)
        elif call == "sync" and args[0].endswith(".journal"):
            kinds["journal, at every commit"].append(k)
        elif call == "sync":
            late = last_ack < k < rename
            kinds["data, before the rename" if late else "data, at every commit"].append(k)
    return dict(kinds)


def without_each_sync(rounds, seed):
    """What goes wrong where one kind of sync is forgotten, by kind."""
    run = make_run()
    log, expected = record(run)
    found = {}
    for kind, places in kinds_of_sync(log).items():
        forgetful = [entry for k, entry in enumerate(log) if k not in set(places)]
        found[kind] = cuts(rounds, seed, run, forgetful, expected)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-syncs", action="store_true")
    args = parser.parse_args()
    if args.without_syncs:
        found = without_each_sync(args.rounds, args.seed)
        print(json.dumps(found, indent=2))
        sys.exit(any(set(counts) == {"fine"} for counts in found.values()))
    found = cuts(args.rounds, args.seed)
    print(json.dumps(found))
    sys.exit(set(found) != {"fine"})


if __name__ == "__main__":
    main()
