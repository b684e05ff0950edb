"""The plan: integers only, so most of these are small tables."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.plan import image_dtype, make_plan, mask_dtype, tasks
from parallel_dicomseg.records import (
    Checks,
    Cohort,
    ContourTable,
    ConvertOptions,
    Reason,
    SliceTable,
)

DEFAULTS = {
    "file_size": 1 << 20,
    "pixel_offset": 1000,
    "pixel_length": 8192,
    "rows": 64,
    "columns": 64,
    "samples_per_pixel": 1,
    "bits_allocated": 16,
    "bits_stored": 16,
    "pixel_representation": 1,
    "rescale_slope": 1.0,
    "rescale_intercept": 0.0,
}


def slice_table(n, **columns):
    """A table of n usual slices, with some columns given."""
    paths = np.array([f"{k}.dcm".encode() for k in range(n)], np.bytes_)
    table = {field.name: np.zeros(n) for field in fields(SliceTable)} | {"path": paths}
    for name, value in (DEFAULTS | columns).items():
        table[name] = np.broadcast_to(np.asarray(value), (n,)).copy()
    return SliceTable(**table)


def cohort(slices, outlines=()):
    """A cohort with outlines given as (slice, structure)."""
    place = np.array(outlines, np.int64).reshape(-1, 2)
    paths = np.array([f"{s}-{k}.txt".encode() for s, k in outlines], "S16")
    contours = ContourTable(place[:, 0], place[:, 1].astype(np.int32), paths)
    return Cohort("/cohort", "test", False, ("i", "o"), ((0, 1),), slices, contours, ())


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
        for plane, structure in zip(task.contours.plane, task.contours.structure, strict=True)
    ] == places
    assert all(0 <= plane < len(task.slices) for task in made for plane in task.contours.plane)


def test_images_of_another_size_are_rejected_with_both_numbers():
    """The most frequent size stays; outlines of the others go, those of the rest are renumbered."""
    rows = np.array([64, 32, 64])

    plan = make_plan(
        cohort(slice_table(3, rows=rows), [(0, 0), (1, 0), (2, 1)]), ConvertOptions(), 1
    )

    (problem,) = plan.problems
    assert (problem.path, problem.reason) == ("1.dcm", Reason.IMAGE_SIZE_DIFFERS)
    assert "is 32 x 64, 2 of 3 images with outlines have 64 x 64" in problem.detail
    assert plan.cohort.contours.slice.tolist() == [0, 1]
    assert plan.cohort.contours.path.tolist() == [b"0-0.txt", b"2-1.txt"]


def test_images_without_outlines_do_not_outvote_those_with_one():
    """Many localizers of another size cost no mask."""
    rows = np.array([32, 64, 64, 64])

    plan = make_plan(cohort(slice_table(4, rows=rows), [(0, 0)]), ConvertOptions(), 1)

    assert (plan.layout.rows, plan.layout.slices) == (32, 1)
    assert plan.cohort.contours.slice.tolist() == [0]
    assert len(plan.problems) == 3


def stored_extremes(bits, signed):
    """Smallest and largest stored value."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@given(
    st.sampled_from([(8, 8), (12, 16), (16, 16), (32, 32)]),
    st.booleans(),
    st.sampled_from([1.0, 2.0, -1.0, 0.5, 100.0, 6.8276948928833]),
    st.sampled_from([0.0, -1024.0, -19595.0, 0.25]),
)
def test_image_dtype_holds_every_possible_value(bits, signed, slope, intercept):
    """The extremes survive a round trip through the chosen integer type, which is the smallest."""
    stored, allocated = bits
    table = slice_table(
        2,
        bits_stored=stored,
        bits_allocated=allocated,
        pixel_representation=int(signed),
        rescale_slope=np.array([1.0, slope]),
        rescale_intercept=np.array([0.0, intercept]),
    )
    extremes = np.array(stored_extremes(stored, signed), float)
    values = np.concatenate([extremes, extremes * slope + intercept])

    chosen = image_dtype(table)

    def holds(dtype):
        whole = np.array_equal(values, np.rint(values)) and slope == int(slope)
        limits = np.iinfo(dtype)
        return whole and limits.min <= values.min() and values.max() <= limits.max

    expected = next((dtype for dtype in ("|u1", "<i2", "<u2") if holds(dtype)), "<f4")
    assert chosen == expected


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
