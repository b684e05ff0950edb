"""What all tests share: the real data, hypothesis profiles, and fixtures that find leaks."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

T = TypeVar("T")

DATA_VARIABLE = "PARALLEL_DICOMSEG_DATA"
CHECKOUT = Path(__file__).resolve().parents[1]
DATA_PLACES = (CHECKOUT.parent / "shared" / "data", CHECKOUT / "shared" / "data")

#: How long something that is ending may take before it counts as leaked, seconds.
GRACE_SECONDS = 3.0

#: Threads that a library starts once per process and keeps on purpose, by the start of their name.
HELPER_THREADS = (
    "tqdm_monitor",
    "zarr_io",
    "zarr_pool",
    "asyncio_",  # the default executor of zarr's event loop
    "fsspecIO",
    "Dask-Offload",
    "Dask-Callback",
    "TCP-Executor",
    "Profile",
    "pytest_timeout",
)

#: Processes that multiprocessing starts once and keeps, by a part of their command line.
HELPER_PROCESSES = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "parallel_dicomseg.dicom.sandbox_child",  # waits for the next frame; see test_sandbox.py
)

settings.register_profile("default", deadline=None, max_examples=100)
settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True, print_blob=True)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public cohorts; the test is skipped where there is none."""
    named = os.environ.get(DATA_VARIABLE)
    if named:
        assert Path(named).is_dir(), f"{DATA_VARIABLE} names {named!r}, which is no folder"
        return Path(named)
    found = next((place for place in DATA_PLACES if place.is_dir()), None)
    if found is None:
        pytest.skip(f"no real data: set {DATA_VARIABLE} to the folder that holds it")
    return found


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail a test that leaves threads behind."""
    before = set(threading.enumerate())
    yield
    leaked = _lasting(lambda: [t for t in _own_threads() if t not in before])
    assert not leaked, f"threads still run after the test: {[t.name for t in leaked]}"


@pytest.fixture(autouse=True)
def no_leaked_processes() -> Iterator[None]:
    """Fail a test that leaves child processes behind."""
    before = set(_children())
    yield
    leaked = _lasting(lambda: [child for child in _children() if child not in before])
    assert not leaked, f"child processes still run after the test: {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves files open below pytest's temporary folders or the real data."""
    folders = [tmp_path_factory.getbasetemp(), *DATA_PLACES]
    if named := os.environ.get(DATA_VARIABLE):
        folders.append(Path(named))
    roots = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)
    before = set(_open_files(roots))
    yield
    leaked = _lasting(lambda: [file for file in _open_files(roots) if file not in before])
    assert not leaked, f"files still open after the test: {leaked}"


def _lasting(find: Callable[[], list[T]]) -> list[T]:
    """What `find` still finds after a grace period and a garbage collection."""
    found = find()
    if found:
        gc.collect()
    give_up = time.monotonic() + GRACE_SECONDS
    while (found := find()) and time.monotonic() < give_up:
        time.sleep(0.02)
    return found


def _own_threads() -> list[threading.Thread]:
    """Live threads other than those that libraries keep for the life of the process."""
    kept = _dask_pool_threads()
    return [
        thread
        for thread in threading.enumerate()
        if not thread.name.startswith(HELPER_THREADS) and thread not in kept
    ]


def _dask_pool_threads() -> set[threading.Thread]:
    """Threads of the pools that dask.threaded keeps for the next call."""
    threaded = sys.modules.get("dask.threaded")
    if threaded is None:
        return set()
    pools = [threaded.default_pool, *(p for by in threaded.pools.values() for p in by.values())]
    return {thread for pool in pools for thread in getattr(pool, "_threads", ())}


def _children() -> list[str]:
    """Live child processes as 'pid command', without multiprocessing's own helpers."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return [f"{child.pid} {child.name}" for child in multiprocessing.active_children()]
    pids = [pid for task in tasks.iterdir() for pid in _read(task / "children").split()]
    commands = {pid: _read(Path("/proc", pid, "cmdline")).replace("\0", " ") for pid in pids}
    # A zombie has an empty command line: it has ended and waits to be asked for its status.
    return [
        f"{pid} {command.strip()}"
        for pid, command in commands.items()
        if command and not any(helper in command for helper in HELPER_PROCESSES)
    ]


def _open_files(roots: tuple[str, ...]) -> list[str]:
    """Open descriptors of files below `roots` as 'number path'; none where there is no /proc."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        return []
    targets = {entry.name: _target(entry) for entry in descriptors.iterdir()}
    return [f"{number} {target}" for number, target in targets.items() if target.startswith(roots)]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed since it was listed
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # ended since it was listed
        return ""
