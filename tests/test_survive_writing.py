"""What is finished survives kill -9, power cuts and bad disks: short versions of survive_*.py."""

import json
import os
import sys

import pytest
import survive_disk
import survive_kills
import survive_power

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no kill -9 there")


@POSIX
def test_killed_conversions_are_resumed_to_the_same_bytes():
    """Nothing that was written is lost or done again, whenever the kill comes."""
    found = survive_kills.rounds_of(10, seed=1)

    assert sum(found.values()) == 10
    assert set(found) <= survive_kills.FINE, json.dumps(found)


@pytest.fixture(scope="module")
def recorded():
    """A run, its log, and the bytes that it made."""
    run = survive_power.make_run()
    return run, *survive_power.record(run)


def test_power_cuts_lose_nothing_that_was_acknowledged(recorded):
    """Whatever pages and names had arrived, the run goes on to the same bytes."""
    assert survive_power.cuts(60, 1, *recorded) == {"fine": 60}


@pytest.mark.parametrize(
    "kind",
    [
        "data, at every commit",
        "data, before the rename",
        "journal, at every commit",
        "names, at the beginning",
        "names, at the end",
    ],
)
def test_every_sync_is_needed(recorded, kind):
    """Where one kind of sync is forgotten, power cuts do harm: the model sees what it should."""
    run, log, expected = recorded
    places = survive_power.kinds_of_sync(log)
    assert kind in places
    forgetful = [entry for k, entry in enumerate(log) if k not in set(places[kind])]

    for seed in range(10):
        if set(survive_power.cuts(60, seed, run, forgetful, expected)) != {"fine"}:
            return
    pytest.fail(f"without the sync of {kind} nothing was lost in 600 power cuts")


@pytest.fixture(scope="module")
def undisturbed():
    """A run and the bytes that it makes."""
    run = survive_power.make_run()
    return run, survive_disk.expected_output(run)


@pytest.mark.parametrize("fault", survive_disk.FAULTS)
def test_a_failing_call_ends_a_run_clearly_and_is_resumed(undisturbed, fault):
    """Every ninth call of a run fails once; interrupted and short writes go on by themselves."""
    found = survive_disk.every_call(fault, *undisturbed, step=9)

    assert set(found) == {"fine"}, json.dumps(found)
    assert found["fine"] > 8


def test_a_full_disk_ends_a_run_clearly_and_is_resumed(undisturbed):
    """At every size there is an error, no crash, and the same bytes once there is room."""
    assert survive_disk.full_disks(12, *undisturbed) == {"fine": 12}


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="only root can mount")
def test_real_full_disks_do_not_crash_the_process(undisturbed):
    """The same on file systems in memory of limited size."""
    found = survive_disk.mounted_disks(6, *undisturbed)

    assert set(found) <= {"fine", "no file system can be mounted here"}, json.dumps(found)
