"""Short versions of tests/survive_workers.py, and what a cluster's logs tell of the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import survive_workers as survive

from parallel_dicomseg import convert
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.records import ConvertOptions
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
SCHEDULERS = ("processes", "distributed")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Compile all kernels before any worker needs them."""
    convert.warm_up(codec="lz4")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_killed_workers_change_nothing(tmp_path: Path, scheduler: str) -> None:
    """Up to three workers are killed in a run of 100 chunks: all are there, and the same bytes."""
    outcome = survive.run_killed(tmp_path, 100, 3, scheduler)

    assert 1 <= outcome.kills <= 3  # how many come before the end depends on the machine
    assert (outcome.committed, outcome.rejected) == (100, ())
    assert outcome.same_bytes


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_that_kills_its_workers_is_rejected_alone(tmp_path: Path, scheduler: str) -> None:
    """A crash and a hunger for memory cost two slices of one task, and no neighbour."""
    outcome = survive.run_troubled(tmp_path, scheduler, {9: "crash", 12: "eat"}, chunks=24)

    crash, memory = sorted(outcome.rejected, reverse=True)
    assert crash == "the process that decodes it was ended by SIGSEGV"
    assert memory.startswith("decoding it used more than 8")
    assert (outcome.committed, outcome.innocents_rejected) == (22, 0)
    assert outcome.same_bytes


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_that_sleeps_for_ever_is_rejected_alone(tmp_path: Path, scheduler: str) -> None:
    """A task that never ends is tried elsewhere, then alone; its neighbours are converted."""
    outcome = survive.run_troubled(
        tmp_path, scheduler, {13: "sleep"}, chunks=24, slices_per_task=3, task_timeout=4
    )

    assert outcome.rejected == ("the process that decodes it gave no answer for 5 s",)
    assert (outcome.committed, outcome.innocents_rejected) == (23, 0)
    assert outcome.same_bytes


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_straggler_is_done_by_another_worker(tmp_path: Path, scheduler: str) -> None:
    """A task whose worker hangs for a reason of its own is done elsewhere: nothing is rejected."""
    outcome = survive.run_troubled(
        tmp_path, scheduler, {13: "sleep once"}, chunks=24, slices_per_task=3, task_timeout=4
    )

    assert (outcome.committed, outcome.rejected) == (24, ())
    assert outcome.same_bytes


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_workers_end_with_the_converter(tmp_path: Path, scheduler: str) -> None:
    """When `convert` is killed while its workers sleep, they end."""
    left, seconds = survive.run_abandoned(tmp_path, scheduler)

    assert left == 0, f"{left} workers are left after {seconds:.0f} s"


def test_logs_tell_nothing_of_the_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Failing tasks leave no path, no text of an exception and no argument in any log of Dask."""
    root = tmp_path / "canary-in-the-root"
    make_sunnybrook_cohort(root, patients=2, slices=6, rows=32, columns=32)
    cohort = scan_cohort(root)
    survive.put_trouble(cohort, {2: "fail", 7: "crash"})
    # or its nannies, on a busy machine, would give their workers up for lost
    patient = dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"})
    with patient, distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None,
        silence_logs=False, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
    ) as cluster, distributed.Client(cluster) as client:  # fmt: skip
        seen = []
        client.subscribe_topic("all", seen.append)
        options = ConvertOptions(
            codec="lz4", scheduler=cluster.scheduler_address, slices_per_task=3
        )
        with survive.trouble_possible():
            summary = convert.convert_cohort(cohort, tmp_path / "out.h5", options=options)
        logs = (
            str(client.get_worker_logs())
            + str(client.get_scheduler_logs())
            + str(client.get_events())
            + str(seen)
        )
    printed = capfd.readouterr()

    assert (summary.slices, summary.rejected) == (10, 2)
    everything = logs + printed.out + printed.err
    assert "encode_chunk" in everything  # something was logged
    assert "workers died" in everything
    for canary in ("canary", "SCD0000", ".dcm"):
        assert canary not in everything
