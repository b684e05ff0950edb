"""The short version of survive_hdf5.py: files damaged in many places."""

import pytest
import survive_hdf5


@pytest.mark.timeout(120)
def test_damaged_files_neither_crash_nor_hang_nor_pass(tmp_path):
    """The seal is looked at before HDF5 sees the file."""
    counts = survive_hdf5.survive(80, 3, tmp_path, kinds=("sealed",))

    assert survive_hdf5.wrong(counts) == {}
    assert sum(n for (_, reader, _), n in counts.items() if reader == "verified") >= 75


def test_what_may_not_be():
    """Faults of ours anywhere; of a sealed file also crashes, hangs, and damage that passes."""
    fine = {
        ("sealed", "verified", "refused"): 3,
        ("sealed", "inspect_file", "read"): 1,  # damage in pixels, at which it does not look
        ("unsealed", "verified", "hang"): 2,
    }
    bad = {
        ("sealed", "verified", "read"): 1,
        ("sealed", "read", "hang"): 1,
        ("sealed", "batches", "crash"): 1,
        ("unsealed", "read", "fault KeyError"): 1,
    }
    assert survive_hdf5.wrong(fine | bad) == bad
