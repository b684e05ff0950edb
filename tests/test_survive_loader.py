"""The loader's breaks, exceptions, forks and spawns, a few of each; many: survive_loader.py."""

import multiprocessing

import pytest
from survive_loader import FAULTS, make_file, survive


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small converted file."""
    return make_file(tmp_path_factory.mktemp("survive"))


def test_nothing_is_wrong_or_left_behind(file):
    """Breaks, exceptions, forks and spawns in mid-epoch: no wrong sample, no leak, no hang."""
    known = multiprocessing.get_all_start_methods()
    methods = tuple(name for name in ("fork", "spawn") if name in known)
    counts = survive(file, 12, seed=1, methods=methods)

    assert dict.fromkeys(FAULTS, 0) == {name: counts[name] for name in FAULTS}
    assert (counts["breaks"], counts["exceptions"], counts["processes"]) == (120, 12, 3)
    assert counts["samples"] > 1000
