"""The rasterizer against rational arithmetic, Pillow, and masks that others made."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import exact
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from parallel_dicomseg.rasterize import (
    RULES,
    _compare_long_products,
    _compare_products,
    rasterize_batch,
    rasterize_contours,
)
from parallel_dicomseg.records import Contours

Ring = list[tuple[float, float]]

SHAPE = (7, 9)
PIL_RULES = RULES[1:]


# ---------------------------------------------------------------------------------------------
# Outlines: how their coordinates are spread, then how their rings are put together


def moved_by_ulps(value: float, ulps: int) -> float:
    """A neighbour of `value` among the doubles."""
    for _ in range(abs(ulps)):
        value = float(np.nextafter(value, np.inf if ulps > 0 else -np.inf))
    return value


on_lattice = st.integers(-3, 12).map(float)
on_half_lattice = st.integers(-6, 24).map(lambda value: value / 2)
#: 0.1 and the like are not doubles: differences are rounded, and crossings nearly integers.
in_decimals = st.integers(-30, 120).map(lambda value: value / 10)
anywhere = st.floats(-4.0, 13.0)
beside_lattice = st.builds(moved_by_ulps, on_half_lattice, st.integers(-2, 2))
off_image = st.one_of(on_lattice, st.integers(-(2**30), 2**30).map(float), st.floats(-1e6, 1e6))
tiny = st.sampled_from([5e-324, -5e-324, 3e-310, -2.2e-308, 1e-200, -1e-160, 2.0**-53, 0.0, 1.0])
huge = st.sampled_from(
    [1.7976931348623157e308, -1.7976931348623157e308, 1e300, -1e200, 2.0**501, -(2.0**499), 1e17]
)

COORDINATES = {
    "integers": on_lattice,
    "halves": on_half_lattice,
    "decimals": in_decimals,
    "floats": anywhere,
    "one ulp beside": beside_lattice,
    "off-image": off_image,
    "subnormal and tiny": st.one_of(tiny, on_lattice),
    "huge": st.one_of(huge, on_lattice),
    "all at once": st.one_of(huge, tiny, in_decimals, beside_lattice),
}


@st.composite
def closed_or_repeating(draw: st.DrawFn, ring: st.SearchStrategy[Ring]) -> Ring:
    """A ring that may close itself and may stand still."""
    points = draw(ring)
    if points and draw(st.booleans()):
        at = draw(st.integers(0, len(points) - 1))
        points = [*points[:at], points[at], *points[at:]]
    if points and draw(st.booleans()):
        points = [*points, points[0]]
    return points


def ring_of(coordinate: st.SearchStrategy[float], size: int = 8) -> st.SearchStrategy[Ring]:
    """Any polygon: self-crossing, collinear, with 0, 1 or 2 points."""
    return closed_or_repeating(st.lists(st.tuples(coordinate, coordinate), max_size=size))


def rings_of(coordinate: st.SearchStrategy[float]) -> st.SearchStrategy[list[Ring]]:
    """Several of them: nested, apart, overlapping."""
    return st.lists(ring_of(coordinate), min_size=1, max_size=3)


@st.composite
def walk(draw: st.DrawFn) -> Ring:
    """An outline as people draw it: short steps on the half-pixel lattice."""
    steps = draw(
        st.lists(st.tuples(*[st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])] * 2), max_size=40)
    )
    points = np.cumsum([draw(st.tuples(on_half_lattice, on_half_lattice)), *steps], axis=0)
    return [(float(x), float(y)) for x, y in points]


class Flat(NamedTuple):
    """Rings as the kernels take them."""

    points_column_row: NDArray[np.float64]
    offsets: NDArray[np.int64]


def flat(rings: list[Ring]) -> Flat:
    """One array of points, and where its rings begin and end."""
    points = np.array([point for ring in rings for point in ring], np.float64).reshape(-1, 2)
    return Flat(points, np.cumsum([0, *map(len, rings)], dtype=np.int64))


def draw_center(rings: list[Ring], shape: tuple[int, int] = SHAPE) -> NDArray[np.uint8]:
    """The mask under test."""
    return rasterize_contours(*flat(rings), shape)


# ---------------------------------------------------------------------------------------------
# Rule "center"


@pytest.mark.parametrize("kind", COORDINATES)
@given(data=st.data())
def test_center_equals_rational_arithmetic(kind: str, data: st.DataObject) -> None:
    """Whatever the coordinates, the mask is that of exact arithmetic."""
    rings = data.draw(rings_of(COORDINATES[kind]))
    np.testing.assert_array_equal(draw_center(rings), exact.mask(rings, SHAPE))


@given(walk())
def test_center_equals_rational_arithmetic_on_drawn_outlines(ring: Ring) -> None:
    """Outlines on the half-pixel lattice, where thousands of centres lie on edges."""
    np.testing.assert_array_equal(draw_center([ring]), exact.mask([ring], SHAPE))


@given(
    st.lists(st.tuples(in_decimals, st.sampled_from([-1.0, 0.5, 2.0])), min_size=34, max_size=80)
)
def test_center_is_exact_where_a_row_is_crossed_more_often_than_it_has_slots(ring: Ring) -> None:
    """Zigzags with up to 80 crossings of one row."""
    shape = (3, 12)
    np.testing.assert_array_equal(draw_center([ring], shape), exact.mask([ring], shape))


@given(st.data())
def test_center_is_exact_for_lattice_crossings_moved_by_an_ulp(data: st.DataObject) -> None:
    """An edge through a pixel centre, and the same edge with one coordinate moved by an ulp."""
    column, row = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    dx, dy = data.draw(st.integers(-40, 40)), data.draw(st.integers(1, 40))
    scale = data.draw(st.sampled_from([1.0, 0.5, 0.1, 1 / 3, 1e-3, 1e3]))
    ends = [column - dx * scale, row - dy * scale, column + dx * scale, row + dy * scale]
    moved = data.draw(st.integers(0, 3))
    ends[moved] = moved_by_ulps(ends[moved], data.draw(st.integers(-2, 2)))
    ring = [(ends[0], ends[1]), (ends[2], ends[3]), (1e4, 3.0)]
    np.testing.assert_array_equal(draw_center([ring]), exact.mask([ring], SHAPE))


OUTER: Ring = [(0, 0), (5, 0), (5, 4), (0, 4)]
INNER: Ring = [(1, 1), (1, 3), (3, 3), (3, 1)]

PICTURES = {
    "left and top edges are in, right and bottom ones are out": (
        [[(1, 1), (4, 1), (4, 3), (1, 3)]],
        [".....", ".###.", ".###.", "....."],
    ),
    "edges between the centres": (
        [[(0.5, 0.5), (3.5, 0.5), (3.5, 2.5), (0.5, 2.5)]],
        [".....", ".###.", ".###.", "....."],
    ),
    "a nested ring is a hole": ([OUTER, INNER], ["#####", "#..##", "#..##", "#####"]),
    "whichever way it runs": ([OUTER, INNER[::-1]], ["#####", "#..##", "#..##", "#####"]),
    "a keyhole is a hole": (
        [[*OUTER, OUTER[0], *INNER, INNER[0]]],
        ["#####", "#..##", "#..##", "#####"],
    ),
    "rings apart are islands": (
        [[(0, 0), (2, 0), (2, 1), (0, 1)], [(3, 2), (5, 2), (5, 4), (3, 4)]],
        ["##...", ".....", "...##", "...##"],
    ),
    "a bow tie": ([[(0, 0), (4, 3), (4, 0), (0, 3)]], [".....", "##.#.", "##.#.", "....."]),
    "one pixel": (
        [[(2, 1), (2.5, 1), (2.5, 1.5), (2, 1.5)]],
        [".....", "..#..", ".....", "....."],
    ),
    "between the centres": ([[(2.1, 1), (2.9, 1), (2.9, 1.9), (2.1, 1.9)]], ["....."] * 4),
    "all": ([[(-9, -9), (99, -9), (99, 99), (-9, 99)]], ["#####"] * 4),
    "no area": ([[], [(1, 1)], [(1, 1), (4, 3)], [(1, 1), (4, 4), (2, 2)]], ["....."] * 4),
}


@pytest.mark.parametrize("size", [2.0**400, 2.0**1000, 2.0**1022])
@pytest.mark.parametrize("shift", [-1e-9, -1e-13, 1e-13, 1e-9])
def test_center_is_exact_where_slopes_underflow(shift: float, size: float) -> None:
    """An edge of subnormal slope that passes a column of centres closely, left or right of it."""
    ring = [(-1e-10, -size), (1e-10 + 1e-10 * shift, size), (4.0, 0.0)]
    np.testing.assert_array_equal(draw_center([ring]), exact.mask([ring], SHAPE))


@pytest.mark.parametrize(("rings", "rows"), PICTURES.values(), ids=PICTURES)
def test_center_draws_what_the_rule_says(rings: list[Ring], rows: list[str]) -> None:
    """The pictures of the documentation."""
    drawn = ["".join(".#"[pixel] for pixel in row) for row in draw_center(rings, (4, 5))]
    assert drawn == rows


@given(
    st.lists(st.tuples(in_decimals, in_decimals), max_size=6),
    st.lists(st.tuples(beside_lattice, beside_lattice), max_size=6),
    st.sampled_from([on_half_lattice, in_decimals, anywhere]).flatmap(
        lambda coordinate: st.lists(st.tuples(coordinate, coordinate), min_size=2, max_size=8)
    ),
)
def test_polygons_that_share_edges_share_no_pixel_and_leave_none(
    left: Ring, right: Ring, border: Ring
) -> None:
    """A border walked forth by one polygon and back by another cancels out, pixel for pixel."""
    whole = draw_center([[border[0], *left, border[-1], *right]])
    one = draw_center([[*border[:-1], border[-1], *right]])
    other = draw_center([[border[0], *left, *border[:0:-1]]])
    np.testing.assert_array_equal(one ^ other, whole)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 8.0)), min_size=1, max_size=5))
def test_a_rectangle_cut_in_two_is_the_sum_of_its_parts(cuts: list[tuple[int, float]]) -> None:
    """No centre belongs to both parts or to none."""
    heights = np.cumsum([height for height, _ in cuts]) / 2
    border = [(column, float(height)) for height, (_, column) in zip(heights, cuts, strict=True)]
    top, bottom = border[0][1], border[-1][1]
    left = draw_center([[(0.0, top), *border, (0.0, bottom)]])
    right = draw_center([[(8.0, top), *border, (8.0, bottom)]])
    whole = draw_center([[(0.0, top), (8.0, top), (8.0, bottom), (0.0, bottom)]])
    np.testing.assert_array_equal(left.astype(int) + right, whole)


# ---------------------------------------------------------------------------------------------
# Exact arithmetic


finite = st.floats(allow_nan=False, allow_infinity=False)
moderate = st.one_of(in_decimals, beside_lattice, st.floats(-1e9, 1e9), finite)


@st.composite
def differences(draw: st.DrawFn) -> tuple[float, ...]:
    """Four differences, none negative, whose products are equal or nearly so half of the time."""
    pairs = [sorted(draw(st.tuples(moderate, moderate)), reverse=True) for _ in range(4)]
    if draw(st.booleans()):
        pairs[2:] = [[2.0 * value for value in pairs[1]], [0.5 * value for value in pairs[0]]]
        pairs[3][0] = moved_by_ulps(pairs[3][0], draw(st.integers(0, 1)))
    return tuple(min(max(value, -1e307), 1e307) for pair in pairs for value in pair)


@given(differences())
@example((5e-324, 0.0, 5e-324, 0.0, 5e-324, 0.0, 1e-323, 0.0))
@example((1e300, -1e-300, 1e300, 0.0, 1e300, 0.0, 1e300, 0.0))
@example((1e300, 0.0, 1e300, 0.0, 1e300, 0.0, 1.5e300, 0.0))
def test_products_of_differences_are_compared_exactly(values: tuple[float, ...]) -> None:
    """Both the float64 way and the long integers agree with fractions."""
    a1, a0, b1, b0, c1, c0, d1, d0 = map(Fraction, values)
    difference = (a1 - a0) * (b1 - b0) - (c1 - c0) * (d1 - d0)
    sign = (difference > 0) - (difference < 0)
    assert _compare_products(*values) == sign
    assert _compare_long_products(*values) == sign


# ---------------------------------------------------------------------------------------------
# Rules "pil-outline0" and "pil-outline1"


@given(st.data())
def test_layers_are_drawn_apart_and_united(data: st.DataObject) -> None:
    """Parity within a layer, union of layers: as the exact twin draws each layer on its own."""
    ring = ring_of(st.integers(-2, 14).map(float), 6)
    keys = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 3))
    drawn = sorted(data.draw(st.lists(st.tuples(keys, ring), max_size=8)), key=lambda k: k[0])
    rings = [ring for _, ring in drawn]
    points, offsets = flat(rings)
    plane, structure, layer = np.array([key for key, _ in drawn], np.int64).reshape(-1, 3).T
    contours = Contours(points, offsets, plane, structure.astype(np.int32), layer.astype(np.int32))
    masks = np.full((2, *SHAPE), 255, np.uint8)
    rasterize_batch(contours, masks, clear=True)

    twin = np.zeros_like(masks)
    for key in sorted({key for key, _ in drawn}):
        same = [ring for other, ring in drawn if other == key]
        twin[key[0]] |= exact.mask(same, SHAPE) << np.uint8(key[1])
    assert np.array_equal(masks, twin)


def draw_with_pillow(rings: list[Ring], shape: tuple[int, int], rule: str) -> NDArray[np.uint8]:
    """What the original script does, ring by ring."""
    result = np.zeros(shape, np.uint8)
    for ring in rings:
        if len(ring) > 1:  # Pillow refuses fewer
            image = Image.new("L", (shape[1], shape[0]), 0)
            ImageDraw.Draw(image).polygon(xy=ring, outline=int(rule[-1]), fill=1)
            result |= np.asarray(image)
    return result


@pytest.mark.parametrize("rule", PIL_RULES)
@pytest.mark.parametrize("kind", ["integers", "halves", "decimals", "floats", "one ulp beside"])
@given(data=st.data())
def test_pil_rules_equal_pillow(kind: str, rule: str, data: st.DataObject) -> None:
    """Any polygons, any image size."""
    rings = data.draw(rings_of(COORDINATES[kind]))
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    drawn = rasterize_contours(*flat(rings), shape, rule=rule)
    np.testing.assert_array_equal(drawn, draw_with_pillow(rings, shape, rule))


@pytest.mark.parametrize("rule", PIL_RULES)
@pytest.mark.parametrize(
    "ring",
    [
        pytest.param([(0, 4), (7, 3), (9, 4), (7, 3)], id="a spike and a corner meet in one row"),
        pytest.param([(1, 2), (0, 4), (9, 0), (11, 3), (9, 1), (0, 3)], id="three flat corners"),
        pytest.param([(0, 0), (1, 82), (6, 82), (6, 0)], id="0.49999997, rounded in float32"),
        pytest.param([(0, 0), (6, 82), (1, 82)], id="the same on the right"),
        pytest.param([(2, 2), (2, 2)], id="a point twice"),
    ],
)
def test_pil_rules_equal_pillow_in_known_hard_cases(rule: str, ring: Ring) -> None:
    """Where a simpler account of Pillow's algorithm goes wrong."""
    drawn = rasterize_contours(*flat([ring]), (84, 12), rule=rule)
    np.testing.assert_array_equal(drawn, draw_with_pillow([ring], (84, 12), rule))


@pytest.mark.parametrize("rule", PIL_RULES)
@given(st.lists(walk(), min_size=1, max_size=2))
def test_pil_rules_equal_pillow_on_drawn_outlines(rule: str, rings: list[Ring]) -> None:
    """Outlines on the half-pixel lattice, with the corners that Pillow treats on their own."""
    drawn = rasterize_contours(*flat(rings), (14, 14), rule=rule)
    np.testing.assert_array_equal(drawn, draw_with_pillow(rings, (14, 14), rule))


@pytest.mark.parametrize("rule", PIL_RULES)
@given(ring_of(st.one_of(on_lattice, st.floats(-3000.0, 3000.0)), 12))
def test_pil_rules_equal_pillow_off_the_image(rule: str, ring: Ring) -> None:
    """Vertices far outside, edges that only cut a corner of the image."""
    drawn = rasterize_contours(*flat([ring]), SHAPE, rule=rule)
    np.testing.assert_array_equal(drawn, draw_with_pillow([ring], SHAPE, rule))


@given(ring_of(st.one_of(on_lattice, st.floats(-(2.0**29), 2.0**29))))
def test_pil_outline1_equals_pillow_as_far_as_its_integers_reach(ring: Ring) -> None:
    """Up to half a billion pixels away; Pillow's own outline=0 would take seconds per line."""
    drawn = rasterize_contours(*flat([ring]), SHAPE, rule="pil-outline1")
    np.testing.assert_array_equal(drawn, draw_with_pillow([ring], SHAPE, "pil-outline1"))


# ---------------------------------------------------------------------------------------------
# Real outlines


class Outline(NamedTuple):
    """A line of expected_areas.csv and its outline."""

    expected: dict[str, str]
    ring: Ring

    @property
    def reference_mask(self) -> str:
        """Name of the mask that others made of it."""
        number = int(self.expected["original"].rpartition("-")[2])
        return f"SC-HF-I-{number:02d}-IM-0001-{int(self.expected['image']):04d}.dcm.png"


@pytest.fixture(scope="module")
def outlines(shared_data: Path) -> list[Outline]:
    """All Sunnybrook outlines with the areas that others measured."""
    root = shared_data / "sunnybrook_arterys"
    found = []
    with (root / "expected_areas.csv").open(newline="") as lines:
        for line in csv.DictReader(lines):
            folder = root / "final_data" / "contourfiles" / line["original"]
            name = f"IM-0001-{int(line['image']):04d}-{line['kind']}contour-manual.txt"
            points = np.loadtxt(folder / f"{line['kind']}-contours" / name)
            found.append(Outline(line, [(float(x), float(y)) for x, y in points]))
    assert len(found) == 142
    return found


def areas(outlines: list[Outline], rule: str) -> NDArray[np.int64]:
    """Pixels of each outline's mask."""
    return np.array(
        [rasterize_contours(*flat([o.ring]), (256, 256), rule=rule).sum() for o in outlines]
    )


def expected(outlines: list[Outline], column: str) -> NDArray[np.float64]:
    """What others found."""
    return np.array([float(outline.expected[column]) for outline in outlines])


@pytest.mark.parametrize(
    ("rule", "column"),
    [("center", "evenodd_px"), ("pil-outline0", "pil_seed_px"), ("pil-outline1", "pil_o1_px")],
)
def test_areas_of_real_outlines(outlines: list[Outline], rule: str, column: str) -> None:
    """Each rule gives the areas that other programs gave."""
    np.testing.assert_array_equal(areas(outlines, rule), expected(outlines, column))


def test_center_lies_between_the_open_and_the_closed_polygon(outlines: list[Outline]) -> None:
    """Only centres on the outline itself are up to the rule."""
    area = areas(outlines, "center")
    assert np.all(expected(outlines, "strict_px") <= area)
    assert np.all(area <= expected(outlines, "closed_px"))


def test_center_has_no_bias(outlines: list[Outline]) -> None:
    """The mean area is within 0.1 % of the polygons' own, and no outline is off by 2 %."""
    error = areas(outlines, "center") / expected(outlines, "shoelace_px") - 1.0
    assert abs(error.mean()) < 0.001
    assert np.abs(error).max() < 0.02


def test_center_of_real_outlines_equals_rational_arithmetic(outlines: list[Outline]) -> None:
    """Every pixel of some of them, moved to the corner of a smaller image."""
    for outline in outlines[::12]:
        column, row = np.floor(np.min(outline.ring, axis=0)) - 1
        ring = [(x - float(column), y - float(row)) for x, y in outline.ring]
        shape = (int(max(y for _, y in ring)) + 2, int(max(x for x, _ in ring)) + 2)
        np.testing.assert_array_equal(draw_center([ring], shape), exact.mask([ring], shape))


def test_pil_outline1_equals_the_published_masks(
    outlines: list[Outline], shared_data: Path
) -> None:
    """All 96 masks of SegNetCMR, bit for bit."""
    masks = {path.name: path for path in (shared_data / "sunnybrook_arterys").rglob("*.dcm.png")}
    inner = [outline for outline in outlines if outline.expected["kind"] == "i"]
    assert len(inner) == len(masks) == 96
    for outline in inner:
        with Image.open(masks[outline.reference_mask]) as image:
            published = np.asarray(image.convert("L")) // 255
        drawn = rasterize_contours(*flat([outline.ring]), (256, 256), rule="pil-outline1")
        np.testing.assert_array_equal(drawn, published)


@pytest.mark.parametrize("rule", PIL_RULES)
def test_pil_rules_equal_pillow_on_real_outlines(outlines: list[Outline], rule: str) -> None:
    """Pixel for pixel, not only in area."""
    for outline in outlines:
        drawn = rasterize_contours(*flat([outline.ring]), (256, 256), rule=rule)
        np.testing.assert_array_equal(drawn, draw_with_pillow([outline.ring], (256, 256), rule))


# ---------------------------------------------------------------------------------------------
# Batches


def batch_of(groups: dict[tuple[int, int], list[Ring]]) -> Contours:
    """Contours of {(plane, structure): rings}."""
    keys = [key for key in sorted(groups) for _ in groups[key]]
    points, offsets = flat([ring for key in sorted(groups) for ring in groups[key]])
    return Contours(
        points_column_row=points,
        offsets=offsets,
        plane=np.array([plane for plane, _ in keys], np.int64),
        structure=np.array([structure for _, structure in keys], np.int32),
    )


def one_by_one(
    groups: dict[tuple[int, int], list[Ring]], planes: int, dtype: str, rule: str
) -> NDArray[np.unsignedinteger]:
    """The masks of a batch, each structure drawn alone."""
    masks = np.zeros((planes, *SHAPE), dtype)
    for (plane, structure), rings in groups.items():
        alone = rasterize_contours(*flat(rings), SHAPE, rule=rule)
        masks[plane] |= alone.astype(dtype) << np.dtype(dtype).type(structure)
    return masks


DTYPES = ["uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_batch_sets_one_bit_per_structure(dtype: str, rule: str, data: st.DataObject) -> None:
    """Whatever overlaps: the same masks as one by one, in cleared masks and in used ones."""
    structure = st.integers(0, 8 * np.dtype(dtype).itemsize - 1)
    groups = data.draw(
        st.dictionaries(st.tuples(st.integers(0, 3), structure), rings_of(in_decimals), max_size=6)
    )
    masks, used = np.zeros((4, *SHAPE), dtype), np.full((4, *SHAPE), 90, dtype)
    rasterize_batch(batch_of(groups), masks, rule=rule)
    rasterize_batch(batch_of(groups), used, rule=rule, clear=True)
    truth = one_by_one(groups, 4, dtype, rule)
    np.testing.assert_array_equal(masks, truth)
    np.testing.assert_array_equal(used, truth)


@pytest.mark.parametrize("clear", [False, True])
def test_a_row_with_more_crossings_than_slots_leaves_other_structures_alone(clear: bool) -> None:
    """The zigzag comes first, second and alone."""
    zigzag = [(0.4 * i, -0.5 + 7.0 * (i % 2)) for i in range(24)]
    square = [(1.0, 1.0), (6.0, 1.0), (6.0, 5.0), (1.0, 5.0)]
    groups = {
        (0, 1): [zigzag],
        (0, 2): [square],
        (1, 1): [square],
        (1, 2): [zigzag],
        (2, 0): [zigzag],
    }
    masks = np.full((4, *SHAPE), 255 if clear else 0, np.uint8)
    rasterize_batch(batch_of(groups), masks, clear=clear)
    np.testing.assert_array_equal(masks, one_by_one(groups, 4, "uint8", "center"))
    np.testing.assert_array_equal(masks[2], exact.mask([zigzag], SHAPE))


poison = st.one_of(finite, st.sampled_from([np.nan, np.inf, -np.inf]), on_lattice)


@pytest.mark.parametrize("rule", RULES)
@given(ring=ring_of(poison, 20), clear=st.booleans())
def test_nothing_is_written_outside_the_masks(rule: str, ring: Ring, clear: bool) -> None:
    """Not even for points that are not finite, which only the other entry refuses."""
    guard = 64
    size = int(np.prod(SHAPE))
    buffer = np.full(guard + 3 * size + guard, 0x5A, np.uint8)
    masks = buffer[guard:-guard].reshape(3, *SHAPE)
    masks[:] = 0
    rasterize_batch(batch_of({(1, 7): [ring]}), masks, rule=rule, clear=clear)
    assert np.all(buffer[:guard] == 0x5A)
    assert np.all(buffer[-guard:] == 0x5A)
    assert not masks[0].any()
    assert not masks[2].any()
    assert set(np.unique(masks[1])) <= {0, 128}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 2**31 - 1), (1, 1)])
def test_masks_without_pixels(shape: tuple[int, int], rule: str) -> None:
    """An empty mask stays one."""
    square = [(-1.0, -1.0), (9.0, -1.0), (9.0, 9.0), (-1.0, 9.0)]
    assert rasterize_contours(*flat([square]), shape, rule=rule).shape == shape


def test_a_batch_without_rings_only_clears() -> None:
    """Slices that nobody outlined."""
    masks = np.full((2, *SHAPE), 3, np.uint16)
    rasterize_batch(batch_of({}), masks)
    assert np.all(masks == 3)
    rasterize_batch(batch_of({}), masks, clear=True)
    assert not masks.any()


@pytest.mark.parametrize("rule", RULES)
def test_two_threads_draw_as_one_does(rule: str) -> None:
    """Scratch belongs to the call."""
    rng = np.random.default_rng(1)
    groups = {
        (plane, structure): [[tuple(point) for point in rng.uniform(-2, 12, (9, 2)).tolist()]]
        for plane in range(40)
        for structure in range(3)
    }
    contours, truth = batch_of(groups), np.zeros((40, *SHAPE), np.uint8)
    rasterize_batch(contours, truth, rule=rule)
    masks = np.zeros((60, 40, *SHAPE), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda mask: rasterize_batch(contours, mask, rule=rule), masks))
    assert np.all(masks == truth)


# ---------------------------------------------------------------------------------------------
# What callers may hand over


def test_out_is_cleared_filled_and_returned() -> None:
    """A reused buffer gives what a new one gives."""
    square = flat([[(1.0, 1.0), (3.0, 1.0), (3.0, 4.0), (1.0, 4.0)]])
    for rule in RULES:
        out = np.full(SHAPE, 77, np.uint8)
        assert rasterize_contours(*square, SHAPE, rule=rule, out=out) is out
        np.testing.assert_array_equal(out, rasterize_contours(*square, SHAPE, rule=rule))


def test_lists_and_other_memory_orders_are_taken() -> None:
    """As most people call it."""
    points = [[1, 1], [3, 1], [3, 4], [1, 4]]
    drawn = rasterize_contours(points, [0, 4], SHAPE)
    assert drawn.sum() == 6
    turned = np.asfortranarray(np.array(points, np.float32))
    np.testing.assert_array_equal(
        rasterize_contours(turned, np.array([0, 4], np.uint8), SHAPE), drawn
    )


TRIANGLE = np.array([[1.0, 1.0], [4.0, 1.0], [1.0, 4.0]])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite_are_refused(value: float, rule: str) -> None:
    """A NaN in an outline is an error of whoever made it."""
    points = TRIANGLE.copy()
    points[1, 0] = value
    with pytest.raises(ValueError, match="points are not finite"):
        rasterize_contours(points, [0, 3], SHAPE, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4], [0, 3, 2, 3], [0, -1, 3], [3]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int], rule: str) -> None:
    """Every point belongs to exactly one ring."""
    with pytest.raises(ValueError, match="offsets do not cut the points into rings"):
        rasterize_contours(TRIANGLE, offsets, SHAPE, rule=rule)


def test_arguments_of_another_kind_are_refused() -> None:
    """With what was given in the message."""
    with pytest.raises(ValueError, match="offsets are float64, not integers"):
        rasterize_contours(TRIANGLE, [0.0, 3.0], SHAPE)
    with pytest.raises(ValueError, match=r"points_column_row has shape \(3, 3\)"):
        rasterize_contours(np.zeros((3, 3)), [0, 3], SHAPE)
    with pytest.raises(ValueError, match=r"offsets \(1, 2\), not \(points, 2\)"):
        rasterize_contours(TRIANGLE, [[0, 3]], SHAPE)
    with pytest.raises(ValueError, match="offsets do not cut"):
        rasterize_contours(np.zeros((0, 2)), np.zeros(0, np.int64), SHAPE)
    with pytest.raises(ValueError, match=r"more than 2\*\*31 - 1 columns"):
        rasterize_contours(TRIANGLE, [0, 3], (0, 2**31))


@pytest.mark.parametrize("rule", ["", "centre", "pil", "pil-outline2"])
def test_unknown_rules_are_refused(rule: str) -> None:
    """The message lists those that there are."""
    masks = np.zeros((1, *SHAPE), np.uint8)
    with pytest.raises(ValueError, match=r"unknown rule .*: choose one of center, pil-outline0"):
        rasterize_contours(TRIANGLE, [0, 3], SHAPE, rule=rule)
    with pytest.raises(ValueError, match="unknown rule"):
        rasterize_batch(batch_of({}), masks, rule=rule)


def read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array, locked."""
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((9, 7), np.uint8),
        np.zeros(SHAPE, np.int8),
        np.zeros(SHAPE, np.bool_),
        np.zeros((9, 7), np.uint8).T,
        np.zeros((7, 18), np.uint8)[:, ::2],
        read_only(np.zeros(SHAPE, np.uint8)),
    ],
)
def test_an_out_that_cannot_be_filled_is_refused(out: NDArray[np.uint8]) -> None:
    """Wrong shape, dtype or memory order, or read-only."""
    with pytest.raises(ValueError, match=r"out is .*, not a writable C-contiguous uint8 array"):
        rasterize_contours(TRIANGLE, [0, 3], SHAPE, out=out)


@pytest.mark.parametrize(
    "masks",
    [
        np.zeros(SHAPE, np.uint8),
        np.zeros((1, *SHAPE), np.int64),
        np.zeros((1, *SHAPE), np.float32),
        np.zeros((2, *SHAPE), np.uint8)[::2, :, ::-1],
    ],
)
def test_masks_that_cannot_be_filled_are_refused(masks: NDArray[np.uint8]) -> None:
    """Wrong shape, dtype or memory order."""
    with pytest.raises(ValueError, match=r"masks are .*, not a writable C-contiguous array"):
        rasterize_batch(batch_of({}), masks)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("plane", "structure", "message"),
    [
        ([0, 2], [0, 0], "plane is not one of the masks"),
        ([-1, 0], [0, 0], "plane is not one of the masks"),
        ([0, 0], [0, 8], "structure has no bit in the masks' dtype"),
        ([0, 0], [-1, 0], "structure has no bit in the masks' dtype"),
        ([1, 0], [0, 0], "not sorted by plane, then structure"),
        ([0, 0], [1, 0], "not sorted by plane, then structure"),
        ([0], [0, 0], "offsets do not cut the points into rings"),
        ([0, 0], [0], "offsets do not cut the points into rings"),
        ([0, 0, 0], [0, 0, 0], "offsets do not cut the points into rings"),
    ],
)
def test_rings_that_belong_nowhere_are_refused(
    plane: list[int], structure: list[int], message: str, rule: str
) -> None:
    """A ring is never drawn on another slice or forgotten."""
    points, offsets = flat([[(1.0, 1.0), (4.0, 1.0), (1.0, 4.0)]] * 2)
    contours = Contours(points, offsets, np.array(plane, np.int64), np.array(structure, np.int32))
    masks = np.zeros((2, *SHAPE), np.uint8)
    with pytest.raises(ValueError, match=message):
        rasterize_batch(contours, masks, rule=rule)
    assert not masks.any()


# ---------------------------------------------------------------------------------------------
# Compilation

PROGRAM = """
import json
import numpy as np
from parallel_dicomseg import rasterize
from parallel_dicomseg.records import Contours

points, zero = np.array([[1.0, 1.0], [4.0, 1.0], [1.0, 4.0]]), np.zeros(1, np.int64)
contours = Contours(points, np.array([0, 3]), zero, zero.astype(np.int32))
rasterize.rasterize_batch(contours, np.zeros((1, 8, 8), np.uint8))
stats = rasterize._center_batch.stats
print(json.dumps([sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
"""


def test_a_second_process_compiles_nothing_and_no_compiler_is_needed(tmp_path: Path) -> None:
    """Cold and warm cache, with no C compiler in sight."""
    package = Path(sys.modules["parallel_dicomseg"].__file__ or "").parents[1]
    environment = {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "PATH": str(tmp_path),
        "CC": "/nonexistent",
        "CXX": "/nonexistent",
    }
    for hits, misses in ([0, 1], [1, 0]):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True
        )
        assert json.loads(done.stdout) == [hits, misses]
