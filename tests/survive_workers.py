"""Conversions whose workers are killed, hang, crash or run out of memory, and what became of them.

    python tests/survive_workers.py --kills 100           kill -9 in a run of 5,000 chunks
    python tests/survive_workers.py --scenario all        everything

Each scenario converts a synthetic cohort and compares the file with the one of a single thread,
byte for byte. Trouble comes from files beside the images: `IM-0001.dcm.trouble` says what happens
to whoever decodes that image.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from parallel_dicomseg import convert
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.records import (
    ChunkTask,
    Cohort,
    ConvertOptions,
    EncodedChunk,
    Progress,
    Summary,
)
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

encode_chunk = convert.encode_chunk
CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
RESUMABLE = 3
#: Bytes per step of a task that takes whatever memory there is, and steps at most.
GULP, GULPS = 64 << 20, 40


# --- trouble -------------------------------------------------------------------------------------


def crash() -> None:
    """Die as a decoder that writes where it may not."""
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep() -> None:
    """Hang for longer than any test lasts."""
    time.sleep(3600)


def fail() -> None:
    """Raise what no decoder should."""
    raise RuntimeError("canary-in-an-exception")


def eat() -> None:
    """Take memory until there is none: the kernel's answer where nothing else limits it."""
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel would, without its waiting for us
    held = [bytearray(GULP) for _ in range(GULPS)]
    raise AssertionError(f"{len(held) * GULP} bytes were to be had")


def sleep_once(marker: Path) -> None:
    """Hang the first time; the second attempt finds the marker gone."""
    marker.unlink()
    sleep()


TROUBLES: dict[str, Callable[[], None]] = {
    "crash": crash,
    "sleep": sleep,
    "fail": fail,
    "eat": eat,
}


def troubled(task: ChunkTask) -> EncodedChunk:
    """`encode_chunk`, but images with a file of trouble beside them cause it."""
    for path in task.slices.path:
        marker = Path(task.root, f"{path}.trouble")
        if marker.exists():
            kind = marker.read_text(encoding="ascii")
            marker.with_suffix(".begun").touch()
            sleep_once(marker) if kind == "sleep once" else TROUBLES[kind]()
    return encode_chunk(task)


@contextmanager
def trouble_possible() -> Iterator[None]:
    """Conversions in this block may meet trouble."""
    convert.encode_chunk = troubled
    try:
        yield
    finally:
        convert.encode_chunk = encode_chunk


def put_trouble(cohort: Cohort, kinds: dict[int, str]) -> None:
    """Write files of trouble beside the images of some slices of a cohort."""
    for row, kind in kinds.items():
        image = Path(cohort.root, os.fsdecode(cohort.slices.path[row]))
        image.with_name(f"{image.name}.trouble").write_text(kind, encoding="ascii")


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    scenario: str
    chunks: int
    kills: int
    committed: int
    """Slices in the file."""
    rejected: tuple[str, ...]
    """Why slices are not in the file."""
    innocents_rejected: int
    same_bytes: bool
    """As those of a run in one thread of the images that are no trouble."""
    seconds: float
    exit_status: int = 0


def make_cohort(folder: Path, slices: int, size: int = 32) -> Cohort:
    """A cohort of so many slices, 100 of them per patient."""
    each = min(slices, 100)
    make_sunnybrook_cohort(
        folder, patients=max(1, slices // each), slices=each, rows=size, columns=size
    )
    return scan_cohort(folder)


def options_for(scheduler: str, **changes: object) -> ConvertOptions:
    """Options of all runs here: lz4, whose bytes are the same in every run."""
    return ConvertOptions(codec="lz4", scheduler=scheduler, workers=2, **changes)  # type: ignore[arg-type]


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a process, as its schedulers start them."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "spawn_main" in command or "schedulers.process" in command:
            found.append(child)
    return found


class Killer:
    """A progress callback that kills one random worker whenever a share of the run is done."""

    def __init__(self, kills: int, seed: int) -> None:
        """Prepare to kill so many times, in an order that the seed decides."""
        self.kills = 0
        self._wanted = kills
        self._random = random.Random(seed)

    def __call__(self, event: Progress) -> None:
        """Kill, if it is time."""
        # all of them before the end, when no worker may be left to kill
        due = min(self._wanted, self._wanted * event.done * 10 // (event.total * 9))
        if event.stage == "convert" and self.kills < due:
            workers = workers_of(os.getpid())
            if workers:  # else the next event catches up
                self._random.choice(workers).kill()
                self.kills += 1


def run_killed(
    folder: Path, chunks: int, kills: int, scheduler: str = "distributed", seed: int = 0
) -> Outcome:
    """Convert one slice per task, while random workers are killed."""
    cohort = make_cohort(folder / "cohort", chunks)
    killer = Killer(kills, seed)
    options = options_for(scheduler, slices_per_task=1)
    start = time.monotonic()
    summary = convert.convert_cohort(cohort, folder / "out.h5", options=options, progress=killer)
    return _outcome("kill", folder, cohort, summary, killer.kills, time.monotonic() - start)


def run_troubled(
    folder: Path,
    scheduler: str,
    kinds: dict[int, str],
    *,
    chunks: int = 40,
    slices_per_task: int = 8,
    task_timeout: float = 0.0,
) -> Outcome:
    """Convert a cohort some images of which are trouble, by row."""
    cohort = make_cohort(folder / "cohort", chunks)
    put_trouble(cohort, kinds)
    options = options_for(scheduler, slices_per_task=slices_per_task, task_timeout=task_timeout)
    start = time.monotonic()
    with trouble_possible():
        summary = convert.convert_cohort(cohort, folder / "out.h5", options=options)
    seconds = time.monotonic() - start
    name = "+".join(sorted(set(kinds.values()))) or "no trouble"
    guilty = {row for row, kind in kinds.items() if kind != "sleep once"}
    return _outcome(name, folder, cohort, summary, 0, seconds, guilty)


def _outcome(
    scenario: str,
    folder: Path,
    cohort: Cohort,
    summary: Summary,
    kills: int,
    seconds: float,
    guilty: Sequence[int] | set[int] = (),
) -> Outcome:
    """Compare with the file that one thread makes of the images that are not to blame."""
    for row in guilty:  # not there: rejected without any trouble
        Path(cohort.root, os.fsdecode(cohort.slices.path[row])).unlink()
    serial = options_for("synchronous", slices_per_task=50)
    convert.convert_cohort(cohort, folder / "serial.h5", options=serial)
    wrong = [problem for problem in summary.problems if problem.is_rejection]
    to_blame = {os.fsdecode(cohort.slices.path[row]) for row in guilty}
    return Outcome(
        scenario=scenario,
        chunks=len(cohort.slices),
        kills=kills,
        committed=summary.slices,
        rejected=tuple(sorted({problem.detail for problem in wrong})),
        innocents_rejected=len({problem.path for problem in wrong} - to_blame),
        same_bytes=same_chunks(folder / "serial.h5", folder / "out.h5"),
        seconds=round(seconds, 1),
    )


def same_chunks(one: Path, other: Path) -> bool:
    """Whether two files are equal, but for the reasons of what they rejected."""
    import h5py

    if one.read_bytes() == other.read_bytes():
        return True
    with h5py.File(one) as a, h5py.File(other) as b:
        for name in ("images", "masks"):
            if a[name].shape != b[name].shape:
                return False
            for row in range(len(a[name])):
                corner = (row, *(0,) * (a[name].ndim - 1))
                if a[name].id.read_direct_chunk(corner) != b[name].id.read_direct_chunk(corner):
                    return False
        return all((a["table"][c][...] == b["table"][c][...]).all() for c in ("area", "outlined"))


# --- everybody gone ------------------------------------------------------------------------------


@contextmanager
def started(folder: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """A function that starts processes, which end with the block."""
    processes: list[subprocess.Popen[bytes]] = []
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

    def start(*command: str | Path) -> subprocess.Popen[bytes]:
        words = [str(word) for word in command]
        log = (folder / f"{len(processes)}.log").open("wb")
        with log:
            processes.append(
                subprocess.Popen(
                    words,
                    cwd=folder,
                    env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return processes[-1]

    try:
        yield start
    finally:
        for process in reversed(processes):
            for victim in [*_descendants(process.pid), process]:
                victim.kill()
            process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


#: The command line, where images may be trouble; arguments follow.
CONVERT = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import survive_workers; "
    "from parallel_dicomseg import convert, cli; convert.encode_chunk = survive_workers.troubled; "
    "cli.main()"
)


def run_deserted(folder: Path, victim: str, chunks: int = 400) -> Outcome:
    """Kill all workers or the scheduler of a cluster, or freeze it, in the middle of `convert`.

    The middle lasts: one image makes whoever decodes it sleep.
    """
    cohort = make_cohort(folder / "cohort", chunks)
    put_trouble(cohort, {chunks // 2: "sleep"})
    with started(folder) as start:
        file = folder / "scheduler.json"
        scheduler = start(CLUSTER / "scheduler.sh", "--port", "0", "--scheduler-file", file)
        _wait(lambda: file.is_file() and file.stat().st_size > 0)
        address = json.loads(file.read_text())["address"]
        options = ("--nthreads", "1", "--no-nanny")
        workers = [start(CLUSTER / "worker.sh", address, *options) for _ in range(2)]
        command = ("convert", cohort.root, "-o", "out.h5", "--scheduler", address)
        more = ("--slices-per-task", "1", "--task-timeout", "0", "--codec", "lz4")
        run = start(sys.executable, "-c", CONVERT, *command, *more)
        _wait(lambda: _begun(cohort) or run.poll() is not None)
        begun = time.monotonic()
        for process in workers if victim == "workers" else [scheduler]:
            process.send_signal(signal.SIGSTOP if victim == "frozen" else signal.SIGKILL)
        status = run.wait(120)
        seconds = time.monotonic() - begun
    return Outcome(victim, chunks, 2, 0, (), 0, same_bytes=False,
                   seconds=round(seconds, 1), exit_status=status)  # fmt: skip


def run_abandoned(folder: Path, scheduler: str, chunks: int = 40) -> tuple[int, float]:
    """Kill `convert` while its workers sleep: how many of them are left after 20 s at most."""
    cohort = make_cohort(folder / "cohort", chunks)
    put_trouble(cohort, {0: "sleep", chunks // 2: "sleep"})
    with started(folder) as start:
        command = ("convert", cohort.root, "-o", "out.h5", "--scheduler", scheduler)
        more = ("--slices-per-task", "5", "--workers", "2")
        run = start(sys.executable, "-c", CONVERT, *command, *more)
        _wait(lambda: _begun(cohort) or run.poll() is not None)
        workers = workers_of(run.pid)
        begun = time.monotonic()
        run.kill()
        run.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        for process in alive:
            process.kill()
    return len(alive), time.monotonic() - begun


def _begun(cohort: Cohort) -> bool:
    """Whether somebody has met trouble."""
    return any(Path(cohort.root).rglob("*.begun"))


def _wait(happened: Callable[[], bool], seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > give_up:
            raise TimeoutError("it did not start")
        time.sleep(0.05)


# --- the command ---------------------------------------------------------------------------------


DESERTED = ("workers", "scheduler", "frozen")
SCENARIOS = ("kill", "workers", "scheduler", "frozen", "client", "oom", "asleep", "poison")


def run_scenario(
    name: str, folder: Path, schedulers: Sequence[str], chunks: int, kills: int, seed: int
) -> list[Outcome]:
    """All runs of a scenario."""
    outcomes = []
    if name in DESERTED:
        return [run_deserted(_fresh(folder), name)]
    for scheduler in schedulers:
        where = _fresh(folder)
        if name == "kill":
            outcome = run_killed(where, chunks, kills, scheduler, seed)
        elif name == "client":
            left, seconds = run_abandoned(where, scheduler)
            outcome = Outcome("client", 40, 1, 0, (), left, same_bytes=True,
                              seconds=round(seconds, 1), exit_status=-9)  # fmt: skip
        else:
            trouble, timeout = {
                "oom": ({13: "eat"}, 0.0),
                "asleep": ({13: "sleep"}, 10.0),
                "poison": ({3: "crash", 13: "eat", 14: "fail", 39: "crash"}, 60.0),
            }[name]
            if name == "asleep":  # what it takes without, to see the delay
                show(scheduler, run_troubled(_fresh(folder), scheduler, {}))
            outcome = run_troubled(where, scheduler, trouble, task_timeout=timeout)
        outcomes.append(outcome)
        show(scheduler, outcome)
    return outcomes


def show(scheduler: str, outcome: Outcome) -> None:
    """One line of JSON."""
    print(json.dumps({"scheduler": scheduler, **asdict(outcome)}), flush=True)


def _fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def main() -> None:
    """Run scenarios and print one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenario", choices=("all", *SCENARIOS), default="kill")
    parser.add_argument("--chunks", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheduler", choices=("processes", "distributed", "both"), default="both")
    given = parser.parse_args()
    schedulers = ("processes", "distributed") if given.scheduler == "both" else (given.scheduler,)
    names = SCENARIOS if given.scenario == "all" else (given.scenario,)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            outcomes = run_scenario(
                name, Path(folder), schedulers, given.chunks, given.kills, given.seed
            )
            if name in DESERTED:
                show("cluster", outcomes[0])


if __name__ == "__main__":
    # by its own name, which worker processes can import
    sys.path.insert(0, str(Path(__file__).parent))
    import survive_workers

    survive_workers.main()
