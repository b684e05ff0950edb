"""Partial overlap of two outlines of one structure, against pixel masks in plain NumPy."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

import exact
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel_dicomseg.overlap import resolve_overlaps
from parallel_dicomseg.phantoms import ellipse, rectangle
from parallel_dicomseg.records import Contours, Float64

SHAPE = (14, 16)
Key = tuple[int, int, int]
Drawing = list[tuple[Key, Float64]]

COORDINATES = st.integers(-4 * 4, 20 * 4).map(lambda n: n / 4)
RINGS = st.one_of(
    st.lists(st.tuples(COORDINATES, COORDINATES), max_size=6).map(
        lambda ring: np.array(ring, np.float64).reshape(-1, 2)
    ),
    st.tuples(COORDINATES, COORDINATES, st.integers(1, 12), st.integers(1, 12)).map(
        lambda box: rectangle(box[0], box[1], box[0] + box[2], box[1] + box[3])
    ),
)
DRAWINGS = st.lists(
    st.tuples(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)), RINGS), max_size=8
).map(lambda drawing: sorted(drawing, key=lambda one: one[0]))


def contours(drawing: Drawing) -> Contours:
    """Rings with their plane, structure and layer, sorted."""
    points = [ring for _, ring in drawing]
    keys = np.array([key for key, _ in drawing], np.int64).reshape(-1, 3)
    return Contours(
        points_column_row=np.concatenate([np.empty((0, 2)), *points]),
        offsets=np.cumsum([0, *map(len, points)], dtype=np.int64),
        plane=keys[:, 0],
        structure=keys[:, 1].astype(np.int32),
        layer=keys[:, 2].astype(np.int32),
    )


def drawn(rings: Contours) -> dict[Key, list[list[tuple[float, float]]]]:
    """Rings by plane, structure and layer."""
    assert rings.layer is not None
    found = defaultdict(list)
    for k, key in enumerate(zip(rings.plane, rings.structure, rings.layer, strict=True)):
        points = rings.points_column_row[rings.offsets[k] : rings.offsets[k + 1]]
        found[tuple(map(int, key))].append([tuple(point) for point in points.tolist()])
    return found


def pixels(ring: list[tuple[float, float]]) -> NDArray[np.bool_]:
    """The pixels of one ring on a canvas wide enough for all rings of the tests."""
    moved = [(column + 8, row + 8) for column, row in ring]
    return exact.mask([moved], (40, 44)).astype(np.bool_)


def are_partly(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> bool:
    """Both have common pixels and own pixels, or are the same."""
    if not (one & other).any():
        return False
    return bool((one & ~other).any() and (other & ~one).any()) or bool((one == other).all())


def slow_union(masks: list[NDArray[np.bool_]]) -> tuple[NDArray[np.bool_], bool]:
    """Parity of the unions of clusters, and whether there is a cluster of several rings."""
    cluster = list(range(len(masks)))
    for _ in masks:
        for i, j in combinations(range(len(masks)), 2):
            if are_partly(masks[i], masks[j]):
                cluster[i] = cluster[j] = min(cluster[i], cluster[j])
    result = np.zeros((40, 44), np.bool_)
    for number in set(cluster):
        result ^= np.any([m for m, c in zip(masks, cluster, strict=True) if c == number], axis=0)
    return result, len(set(cluster)) < len(cluster)


@given(DRAWINGS)
def test_policies_equal_those_of_pixel_masks(drawing: Drawing) -> None:
    """Any rings: who is affected, the union of clusters, what is dropped, what stays."""
    before = contours(drawing)
    masks = {key: [pixels(ring) for ring in rings] for key, rings in drawn(before).items()}
    expected = {key: slow_union(group) for key, group in masks.items()}
    affected = sorted({key[:2] for key, (_, several) in expected.items() if several})

    same, reported = resolve_overlaps(before, SHAPE, "xor")
    assert (same, reported) == (before, affected)
    refused, reported = resolve_overlaps(before, SHAPE, "refuse")
    assert reported == affected
    assert drawn(refused) == {k: g for k, g in drawn(before).items() if not expected[k][1]}
    united, reported = resolve_overlaps(before, SHAPE, "union")
    assert reported == affected
    after = drawn(united)
    assert after.keys() == masks.keys()
    for key, (mask, _) in expected.items():
        parity = np.logical_xor.reduce([pixels(ring) for ring in after[key]])
        assert (parity == mask).all()


def one_slice(*rings: Float64) -> Contours:
    """Rings of one structure."""
    return contours([((0, 0, 0), ring) for ring in rings])


def area(rings: Contours) -> int:
    """Pixels by parity on a large canvas."""
    return int(
        exact.mask([ring for group in drawn(rings).values() for ring in group], (64, 64)).sum()
    )


def test_a_hole_in_a_union_stays_a_hole() -> None:
    """Two squares that overlap at a corner, one with a hole: 2 x 100 - 25 - 4 pixels."""
    rings = one_slice(rectangle(0, 0, 10, 10), rectangle(1, 1, 3, 3), rectangle(5, 5, 15, 15))
    united, affected = resolve_overlaps(rings, (64, 64), "union")

    assert affected == [(0, 0)]
    assert len(united) == 2
    assert area(united) == 2 * 100 - 25 - 4
    assert area(rings) == 2 * 100 - 2 * 25 - 4


def test_holes_islands_and_touching_rings_are_left_alone() -> None:
    """Nested rings, rings apart, a shared edge and a keyhole: nothing to report, nothing copied."""
    keyhole = np.concatenate([rectangle(20, 20, 30, 30), [[20, 20]], rectangle(22, 22, 24, 24)])
    rings = one_slice(
        rectangle(0, 0, 10, 10),
        rectangle(2, 2, 8, 8),
        rectangle(4, 4, 6, 6),
        rectangle(10, 0, 20, 10),
        ellipse(50, 50, 5, 5),
        keyhole,
    )
    for policy in ("xor", "union", "refuse"):
        same, affected = resolve_overlaps(rings, (64, 64), policy)
        assert (same, affected) == (rings, [])
        assert same is rings


def test_structures_slices_and_layers_do_not_meet() -> None:
    """Rings overlap only with rings of their own structure, slice and layer."""
    box = rectangle(0, 0, 10, 10)
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    rings = contours([(key, box + k) for k, key in enumerate(keys)])

    assert resolve_overlaps(rings, (64, 64), "refuse") == (rings, [])


def test_what_lies_off_the_image_is_united_as_well() -> None:
    """A crop counts what it cuts off: rings beyond the image keep their pixels."""
    rings = one_slice(rectangle(-30, -20, -10, -10), rectangle(-20, -15, 4, -5))
    united, affected = resolve_overlaps(rings, (8, 8), "union")
    moved = [[(c + 40, r + 40) for c, r in ring] for ring in drawn(united)[0, 0, 0]]

    assert affected == [(0, 0)]
    assert exact.mask(moved, (64, 64)).sum() == 200 + 240 - 50


def test_rings_without_a_layer_and_rings_without_points_are_known() -> None:
    """`layer` may be absent; an empty ring overlaps nothing."""
    before = one_slice(np.empty((0, 2)), rectangle(0, 0, 4, 4), rectangle(2, 2, 6, 6))
    bare = Contours(before.points_column_row, before.offsets, before.plane, before.structure)
    united, affected = resolve_overlaps(bare, (8, 8), "union")

    assert affected == [(0, 0)]
    assert united.layer is None
    assert len(united) == 2


def test_far_coordinates_cost_no_memory() -> None:
    """Rings of billions of pixels are cut near the image."""
    huge = 2.0**30
    rings = one_slice(rectangle(-huge, -huge, 4, 4), rectangle(0, 0, huge, huge))

    assert resolve_overlaps(rings, (8, 8), "xor")[1] == [(0, 0)]


def test_an_unknown_policy_is_refused() -> None:
    """The message names those that there are."""
    with pytest.raises(ValueError, match="'or': choose one of xor, union, refuse"):
        resolve_overlaps(one_slice(), (8, 8), "or")
