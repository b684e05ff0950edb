"""Nothing that identifies somebody gets out: a short run of survive_canary.py, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from survive_canary import TAGS, shapes_in, survive

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.errors import LayoutError
from parallel_dicomseg.phantoms import make_rtstruct_series
from parallel_dicomseg.plan import make_plan, tasks
from parallel_dicomseg.records import ChunkTask, ConvertOptions
from parallel_dicomseg.schedulers import Attempt, Failure
from parallel_dicomseg.schedulers.crew import delayed
from parallel_dicomseg.sources.links import read_links


@pytest.mark.slow
def test_no_canary_gets_out(tmp_path: Path) -> None:
    """2,600 strings in 500 places of a cohort, run through everything with failures: none in files,
    mirror, exports, output, logs, warnings or what a killed run leaves; and the search can find
    them.
    """
    found = survive(tmp_path, seed=0, schedulers=("threads", "distributed"))

    assert found.hits == {}
    assert found.kept > 300
    assert found.tags > 400
    assert sum(len(keywords.split()) for keywords in TAGS.values()) >= 60
    # every run ended as the command says, none with a traceback
    assert {status for _, _, status, _ in found.statuses} == {None, 0, 1}
    assert [status for kind, _, status, _ in found.statuses if kind == "leaky"] == [1, 1]


def test_the_search_sees_every_way_of_writing() -> None:
    """In any case, in UTF-16, between letters and binary; no date in the digits of a number."""
    word, uid = "QXABCDEFGH", "2.25.123456789012345678901234567890"

    assert shapes_in(f"a{word.title()}b".encode("utf-16-be")) == {word.lower()}
    assert shapes_in(b"\xff" + uid.encode() + b"\0; 18540317") == {uid, "18540317"}
    assert shapes_in(b"0.18540317 118540317 185403172") == set()


# --- what a worker says --------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> ChunkTask:
    """A task of a cohort in a folder that names somebody."""
    phantom = make_rtstruct_series(tmp_path / "DOE_JOHN", shape=(3, 16, 16))
    plan = make_plan(scan_cohort(phantom.directory), ConvertOptions(), 1)
    return next(iter(tasks(plan)))


def raise_worst(task: ChunkTask) -> Any:
    """Quote everything."""
    raise ValueError(f"{task!r} {task.root}")


def test_keys_and_graphs_name_no_file(task: ChunkTask) -> None:
    """What schedulers show on dashboards and workers log: the key, and the task's text."""
    node = delayed(Attempt(raise_worst, task), "run")
    shown = f"{node.key} {node!r} {dict(node.__dask_graph__())!r}"

    assert "DOE_JOHN" in repr(task)
    assert "DOE_JOHN" not in shown
    assert ".dcm" not in shown


def test_an_exception_loses_its_words(task: ChunkTask) -> None:
    """Its kind stays, and its place in this package."""
    failure = Attempt(raise_worst, task)()

    assert isinstance(failure, Failure)
    assert failure.detail.startswith("ValueError")
    assert "DOE_JOHN" not in repr(failure)


# --- what was found to leak ----------------------------------------------------------------------


def test_a_table_without_a_header_is_not_quoted(tmp_path: Path) -> None:
    """Its first row names patients."""
    (tmp_path / "link.csv").write_text("DOE_JOHN,SC-1\nROE_JANE,SC-2\n")

    with pytest.raises(LayoutError, match="its first row has 2 column") as raised:
        read_links(tmp_path / "link.csv")

    assert "DOE" not in str(raised.value)


def test_paths_are_hashed_where_asked(tmp_path: Path) -> None:
    """In the list of the file; by default they are named there, relative to the input."""
    phantom = make_rtstruct_series(tmp_path / "in" / "DOE_JOHN", shape=(4, 16, 16))
    first = Path(phantom.directory, phantom.image_paths[0])
    first.write_bytes(first.read_bytes()[:-100])

    cohort = scan_cohort(tmp_path / "in")
    named = convert_cohort(cohort, tmp_path / "named.h5")
    hashed = convert_cohort(cohort, tmp_path / "hashed.h5", options=ConvertOptions(hash_paths=True))

    assert any(problem.path.startswith("DOE_JOHN/") for problem in named.problems)
    assert all(problem.path.startswith("path-") for problem in hashed.problems)
    assert len(named.problems) == len(hashed.problems) > 0
