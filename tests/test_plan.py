"""The plan: integers only, so most of these are small tables."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from usual import cohort, slice_table

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.plan import image_dtype, make_plan, mask_dtype, tasks
from parallel_dicomseg.records import Checks, ConvertOptions, Reason
from parallel_dicomseg.synthetic import make_sunnybrook_cohort


@given(
    st.integers(1, 60), st.integers(0, 70), st.lists(st.tuples(st.integers(0, 59), st.booleans()))
)
def test_tasks_hold_every_slice_and_every_outline_once_in_order(n, size, places):
    """Whatever the size of the tasks, together they are the cohort."""
    places = sorted({(s, int(k)) for s, k in places if s < n})
    plan = make_plan(cohort(slice_table(n), places), ConvertOptions(slices_per_task=size), 2)

    made = list(tasks(plan))

    assert len(made) == plan.task_count
    assert [path for task in made for path in task.slices.path] == [f"{k}.dcm" for k in range(n)]
    assert [task.first for task in made] == list(range(0, n, plan.slices_per_task))
    assert [
        (task.first + plane, structure)
        for task in made
        for plane, structure in zip(task.annotations.plane, task.annotations.structure, strict=True)
    ] == places
    assert all(0 <= plane < len(task.slices) for task in made for plane in task.annotations.plane)


def test_images_of_several_sizes_are_padded_to_the_largest():
    """Nothing is lost, and the plan says what was done."""
    rows = np.array([64, 32, 64])

    plan = make_plan(cohort(slice_table(3, rows=rows), [(1, 0)]), ConvertOptions(), 1)

    assert (plan.layout.rows, plan.layout.columns, plan.layout.slices) == (64, 64, 3)
    assert plan.grid.tolist() == [[0, 0, 1, 1], [-16, 0, 1, 1], [0, 0, 1, 1]]
    assert plan.notes == ("1 of 3 images were padded to 64 x 64 (sizes 64 x 64, 32 x 64)",)
    assert [task.slices.rows for task in tasks(plan)] == [(64,), (32,), (64,)]


def test_an_image_without_spacing_has_no_place_on_a_grid_in_mm():
    """It is rejected with the tag; what is drawn on the others is renumbered."""
    spacing = np.array([[1.0, 1.0], [np.nan, 1.0], [0.5, 0.5]])
    options = ConvertOptions(spacing=(1.0,))

    plan = make_plan(
        cohort(slice_table(3, pixel_spacing=spacing), [(0, 0), (1, 0), (2, 1)]), options, 1
    )

    (problem,) = plan.problems
    assert (problem.path, problem.reason) == ("1.dcm", Reason.MISSING_TAG)
    assert "(0028,0030)" in problem.detail
    assert plan.cohort.annotations.slice.tolist() == [0, 1]
    assert plan.cohort.annotations.path.tolist() == [b"0-0.txt", b"2-1.txt"]
    assert len(plan.cohort.headers["EchoTime"].code) == 2
    assert plan.grid[:, 2].tolist() == [1.0, 2.0]


def test_colour_is_luminance_unless_samples_are_asked_for():
    """Samples add an axis only where there is colour."""
    grey, colored = slice_table(2), slice_table(2, samples_per_pixel=np.array([1, 3]))

    assert make_plan(cohort(colored), ConvertOptions(), 1).layout.samples == 1
    assert make_plan(cohort(colored), ConvertOptions(color="samples"), 1).layout.samples == 3
    assert make_plan(cohort(grey), ConvertOptions(color="samples"), 1).layout.samples == 1


@given(
    st.lists(
        st.tuples(st.integers(-(2**33), 2**33), st.integers(0, 2**33)), min_size=1, max_size=3
    ),
    st.booleans(),
)
def test_image_dtype_holds_every_possible_value(ranges, whole):
    """The smallest type that both ends of every image's range fit, floats where none does."""
    ends = np.array([(low, low + span) for low, span in ranges], float)
    table = slice_table(len(ranges), value_is_whole=whole)
    table = replace(table, value_range=ends)

    def holds(dtype):
        limits = np.iinfo(dtype)
        return whole and limits.min <= ends.min() and ends.max() <= limits.max

    integers = ("|u1", "<i2", "<u2", "<i4", "<u4")
    assert image_dtype(table) == next((dtype for dtype in integers if holds(dtype)), "<f4")


def test_images_with_unknown_range_are_floats():
    """Float pixels may hold anything."""
    ends = np.array([(-np.inf, np.inf), (0.0, 255.0)])

    assert image_dtype(replace(slice_table(2), value_range=ends)) == "<f4"


@pytest.mark.parametrize(
    ("structures", "expected"), [(1, "|u1"), (8, "|u1"), (9, "<u2"), (33, "<u8"), (64, "<u8")]
)
def test_masks_have_a_bit_per_structure(structures, expected):
    """The smallest unsigned type that has room."""
    assert mask_dtype(structures) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nearest"}, "rule is 'nearest', it can be center, pil-outline0, pil-outline1"),
        ({"codec": "gzip"}, "codec is 'gzip', it can be deflate, lz4, zstd, none"),
        ({"contour_origin": 2.0}, "contour_origin is 2.0, it can be 0.0, 0.5, 1.0"),
        ({"color": "grey"}, "color is 'grey', it can be luminance, samples"),
        ({"partial_overlap": "or"}, "partial_overlap is 'or', it can be xor, union, refuse"),
        ({"pad_value": "air"}, "pad_value is 'air', it can be a number or 'minimum'"),
        ({"pad_value": "nan"}, "pad_value is nan, it must be finite"),
        ({"spacing": (1.0, 0.0)}, "spacing is 1 0: it takes one or two numbers above 0"),
        ({"size": (1, 2, 3)}, "size is 1 2 3: it takes one or two whole numbers above 0"),
        ({"size": (1 << 20, 1 << 20)}, "1048576 x 1048576 pixels is larger than"),
        ({"fit": "organ"}, "fit is 'organ', it can be center or structure"),
        ({"memory_limit": 1000}, "memory_limit is 1000 bytes, one slice of 64 x 64 pixels needs"),
        ({"memory_limit": 10**6, "slices_per_task": 99}, "slices_per_task is 99, memory_limit"),
        ({"workers": -1}, "workers is -1, it cannot be negative"),
        ({"slices_per_task": -5}, "slices_per_task is -5, it cannot be negative"),
        ({"checks": Checks(max_mask_fraction=np.nan)}, "max_mask_fraction is nan, it must be"),
    ],
)
def test_options_without_a_meaning_are_refused_with_the_values(options, message):
    """Each message names the option, the value and what it can be."""
    with pytest.raises(ConfigurationError, match=message):
        make_plan(cohort(slice_table(3)), ConvertOptions(**options), 1)


def test_an_empty_cohort_is_refused():
    """There is no file without slices."""
    with pytest.raises(LayoutError, match="nothing to convert"):
        make_plan(cohort(slice_table(0)), ConvertOptions(), 1)


def test_small_cohorts_are_cut_so_that_no_worker_idles():
    """Sixteen slices for two workers are several tasks, not one."""
    assert make_plan(cohort(slice_table(16)), ConvertOptions(), 2).task_count == 8


def test_memory_limit_bounds_the_tasks():
    """Less memory, smaller tasks; a million slices are never more than 64 at a time."""
    table = slice_table(10_000)
    plenty = make_plan(cohort(table), ConvertOptions(), 2)
    little = make_plan(cohort(table), ConvertOptions(memory_limit=1 << 20), 2)

    assert plenty.slices_per_task == 64
    assert 1 <= little.slices_per_task < 16
    assert plenty.window == little.window == 5


@pytest.mark.parametrize("first", [0, 1, 7, 8, 9])
def test_tasks_start_at_any_slice(tmp_path: Path, first: int) -> None:
    """From a slice on, tasks hold the slices and annotations that remain, renumbered."""
    make_sunnybrook_cohort(tmp_path / "cohort", patients=1, slices=9, rows=32, columns=32)
    plan = make_plan(scan_cohort(tmp_path / "cohort"), ConvertOptions(slices_per_task=3), 1)
    single = list(tasks(replace(plan, slices_per_task=1)))

    made = list(tasks(plan, [(first, plan.layout.slices)]))

    assert [task.first for task in made] == list(range(first, 9, 3))
    paths = [path for task in made for path in task.slices.path]
    assert paths == [task.slices.path[0] for task in single[first:]]
    drawn = [(t.first + k, p) for t in made
             for k, p in zip(t.annotations.plane, t.annotations.path, strict=True)]  # fmt: skip
    assert drawn == [(t.first, p) for t in single[first:] for p in t.annotations.path]
