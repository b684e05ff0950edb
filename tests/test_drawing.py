"""From annotations to masks on the stored grid: tasks made by hand against slow twins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import usual
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel_dicomseg import drawing
from parallel_dicomseg.drawing import draw_masks, on_grid, structure_centers
from parallel_dicomseg.records import (
    AnnotationRefs,
    Bitmap,
    ChunkTask,
    Contours,
    Drawn,
    Layout,
    Reason,
    SliceRefs,
)

AS_IS = (0.0, 0.0, 1.0, 1.0)
GRIDS = (AS_IS, (-3.0, -2.0, 1.0, 1.0), (4.0, 5.0, 1.0, 1.0), (-3.0, 6.0, 1.0, 1.0))


@dataclass(frozen=True)
class Item:
    """One annotation: a ring, a bitmap or something that cannot be read."""

    plane: int
    structure: int
    kind: str
    layer: int = 0
    ring: Any = None
    mask: Any = None
    digest: int = 0
    problem: tuple[Reason, str] | None = None


@dataclass(frozen=True)
class HandReader:
    """A source whose annotations are in memory; `offset` says which of `items` is meant."""

    name: str
    items: list[Item] = field(default_factory=list)

    def read(
        self, root: str, slices: SliceRefs, annotations: AnnotationRefs, *, contour_origin: float
    ) -> Drawn:
        """As `sources.base.Reader` says."""
        del root, slices, contour_origin
        items = [
            replace(self.items[k], plane=plane)
            for k, plane in zip(annotations.offset, annotations.plane, strict=True)
        ]
        rings = [one for one in items if one.ring is not None]
        return Drawn(
            contours=Contours(
                points_column_row=np.concatenate([np.empty((0, 2)), *(one.ring for one in rings)]),
                offsets=np.cumsum([0, *(len(one.ring) for one in rings)], dtype=np.int64),
                plane=np.array([one.plane for one in rings], np.int64),
                structure=np.array([one.structure for one in rings], np.int32),
                layer=np.array([one.layer for one in rings], np.int32),
            ),
            bitmaps=(Bitmap(o.plane, o.structure, o.mask) for o in items if o.mask is not None),
            digest=np.array([one.digest for one in items], np.uint64),
            problems=tuple((k, *one.problem) for k, one in enumerate(items) if one.problem),
        )


def layout_of(shape=(12, 14), **changed):
    """Three structures."""
    usual_one = Layout(
        slices=1, rows=shape[0], columns=shape[1], image_dtype="<i2", mask_dtype="|u1",
        structures=("a", "b", "c"), nested=(), rule="center", contour_origin=0.0,
        include_unannotated=True, codec="none", keep_identity=False, source="test",
    )  # fmt: skip
    return replace(usual_one, **changed)


def task_of(items, sizes, grids, layout, annotated=0):
    """A task whose images have these sizes (rows, columns) and grids."""
    n = len(sizes)
    same = {
        "frame": 0, "file_size": 1, "pixel_offset": -1, "pixel_length": 1, "stored_dtype": "",
        "bits_stored": 16, "rescale_slope": 1.0, "rescale_intercept": 0.0,
        "photometric_interpretation": "MONOCHROME2", "annotated": annotated,
        "plane_geometry": (0.0,) * 11,
    }  # fmt: skip
    slices = SliceRefs(
        path=tuple(f"{k}.dcm" for k in range(n)),
        rows=tuple(rows for rows, _ in sizes),
        columns=tuple(columns for _, columns in sizes),
        grid=tuple(grids),
        **{name: (value,) * n for name, value in same.items()},
    )
    refs = AnnotationRefs(
        plane=tuple(one.plane for one in items),
        structure=tuple(one.structure for one in items),
        layer=tuple(one.layer for one in items),
        kind=tuple(one.kind for one in items),
        path=tuple(f"{one.kind}.file" for one in items),
        offset=tuple(range(len(items))),
        length=(0,) * len(items),
    )
    return ChunkTask(0, "", layout, slices, refs)


def draw(items, sizes, grids, layout=None, annotated=0):
    """Drawing and masks (n, rows, columns) of some annotations."""
    layout = layout or layout_of()
    items = sorted(items, key=lambda one: (one.plane, one.structure, one.layer, one.kind))
    known = {one.kind: HandReader(one.kind, items) for one in items}
    masks = np.full((len(sizes), layout.rows, layout.columns), 255, layout.mask_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "readers", lambda: known)
        drawn = draw_masks(task_of(items, sizes, grids, layout, annotated), masks)
    return drawn, masks


def square(left, top, right, bottom):
    """(4, 2) corners as (column, row)."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], float)


# --- the twin ------------------------------------------------------------------------------------


def is_in_ring(ring, column, row) -> bool:
    """Parity of the edges to the right of a place that lies on none."""
    inside = False
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 <= row) != (y1 <= row):
            inside ^= column < x0 + (row - y0) * (x1 - x0) / (y1 - y0)
    return inside


def is_in(items, column, row) -> bool:
    """Whether a place in a source image is in one structure: the union of layers and bitmaps."""
    for one in items:
        if one.mask is not None and one.mask[int(np.floor(row + 0.5)), int(np.floor(column + 0.5))]:
            return True
    rings = [one for one in items if one.ring is not None]
    return any(
        sum(is_in_ring(one.ring, column, row) for one in rings if one.layer == layer) % 2
        for layer in {one.layer for one in rings}
    )


def twin(items, sizes, grids, shape, structures=3):
    """(n, s, rows, columns) masks, and (n, s) pixels that the stored images lack, one by one."""
    reach = 40
    masks = np.zeros((len(sizes), structures, *shape), bool)
    cropped = np.zeros((len(sizes), structures), int)
    for plane, ((rows, columns), grid) in enumerate(zip(sizes, grids, strict=True)):
        for structure in range(structures):
            own = [one for one in items if (one.plane, one.structure) == (plane, structure)]
            for j in range(-reach, shape[0] + reach):
                for k in range(-reach, shape[1] + reach):
                    row, column = grid[0] + j * grid[2], grid[1] + k * grid[3]
                    is_there = -0.5 <= row < rows - 0.5 and -0.5 <= column < columns - 0.5
                    if not (own and is_there and is_in(own, column, row)):
                        continue
                    if 0 <= j < shape[0] and 0 <= k < shape[1]:
                        masks[plane, structure, j, k] = True
                    else:
                        cropped[plane, structure] += 1
    return masks, cropped


def random_items(random, sizes):
    """Rings and bitmaps of two kinds on every image."""
    items = []
    for plane, (rows, columns) in enumerate(sizes):
        for _ in range(random.integers(1, 5)):
            structure = int(random.integers(3))
            kind, layer = ("p", "q")[random.integers(2)], int(random.integers(2))
            if random.integers(3) == 0:
                mask = random.random((rows, columns)) < 0.3
                items.append(Item(plane, structure, "bits", mask=mask))
            else:
                # rings stick out of the image
                ring = random.uniform(-6, 6 + max(rows, columns), (random.integers(3, 7), 2))
                # sources number the layers of a structure: no two share one
                items.append(Item(plane, structure, kind, layer + 2 * (kind == "q"), ring=ring))
    return items


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.booleans())
def test_masks_and_what_is_cropped_are_those_of_the_twin(seed: int, resampled: bool) -> None:
    """Several kinds, layers, bitmaps; cropped, padded and resampled, pixel by pixel."""
    random = np.random.default_rng(seed)
    sizes = [tuple(random.integers(3, 16, 2).tolist()) for _ in range(2)]
    grids = [GRIDS[random.integers(len(GRIDS))] for _ in sizes]
    if resampled:
        grids = [(*random.uniform(-5, 9, 2), *random.uniform(0.5, 2.5, 2)) for _ in sizes]
    items = random_items(random, sizes)

    drawn, masks = draw(items, sizes, grids, layout_of((8, 9)))

    expected, cropped = twin(items, sizes, grids, (8, 9))
    for structure in range(3):
        found = masks >> structure & 1
        np.testing.assert_array_equal(found.astype(bool), expected[:, structure])
    np.testing.assert_array_equal(drawn.cropped, cropped)


def test_what_sticks_out_of_the_source_image_is_not_drawn_into_the_padding() -> None:
    """A mask has the same pixels whether its image is padded or not."""
    item = Item(0, 0, "p", ring=square(-9, -9, 30, 30))

    _, as_it_is = draw([item], [(6, 7)], [AS_IS], layout_of((6, 7)))
    drawn, padded = draw([item], [(6, 7)], [(-3.0, -2.0, 1.0, 1.0)], layout_of((12, 14)))

    assert as_it_is.sum() == 6 * 7
    assert padded.sum() == 6 * 7
    assert padded[0, 3:9, 2:9].all()
    assert drawn.cropped.sum() == 0


def test_pixels_that_two_annotations_share_are_cropped_once() -> None:
    """A ring and a bitmap of one structure, half of them cut off."""
    full = np.ones((6, 6), bool)
    items = [Item(0, 1, "p", ring=square(-1, -1, 7, 7)), Item(0, 1, "bits", mask=full)]

    drawn, masks = draw(items, [(6, 6)], [(3.0, 0.0, 1.0, 1.0)], layout_of((6, 6)))

    assert (masks == 2).sum() == 18
    assert drawn.cropped.tolist() == [[0, 18, 0]]


def test_a_stored_image_beside_its_source_loses_everything() -> None:
    """Nothing is drawn, all of it is counted."""
    items = [Item(0, 0, "p", ring=square(0.5, 0.5, 4.5, 4.5)), Item(0, 2, "b", mask=np.eye(6) > 0)]

    for grid in ((40.0, 0.0, 1.0, 1.0), (-40.0, 0.0, 1.0, 1.0), (0.0, 40.0, 1.0, 1.0)):
        drawn, masks = draw(items, [(6, 6)], [grid])

        assert not masks.any()
        assert drawn.cropped.tolist() == [[16, 0, 6]]


@given(st.tuples(*[st.floats(-50, 50)] * 2), st.tuples(*[st.floats(0.1, 9)] * 2))
def test_rings_move_to_the_grid_and_back(origin, step) -> None:
    """Stored pixel (j, k) lies at origin + step * (j, k) in the source."""
    rings = Contours(
        points_column_row=np.array([[1.5, 2.0], [7.0, -3.0], [0.0, 4.25]]),
        offsets=np.array([0, 3]),
        plane=np.array([1]),
        structure=np.array([0], np.int32),
    )
    moved = on_grid(rings, np.array([AS_IS, (*origin, *step)])).points_column_row

    back = moved * step[::-1] + origin[::-1]
    np.testing.assert_allclose(back, rings.points_column_row, rtol=0, atol=1e-11)


# --- what is said about it -----------------------------------------------------------------------


def test_digests_are_summed_by_slice_and_structure() -> None:
    """Of all kinds; 0 where nothing was read."""
    ring = square(1, 1, 4, 4)
    items = [
        Item(0, 0, "p", ring=ring, digest=5),
        Item(0, 0, "q", ring=ring + 5, layer=1, digest=7),
        Item(1, 2, "bits", mask=np.ones((9, 9), bool), digest=2**64 - 1),
    ]
    drawn, _ = draw(items, [(9, 9)] * 2, [AS_IS] * 2)

    assert drawn.digest.tolist() == [[12, 0, 0], [0, 0, 2**64 - 1]]
    assert drawn.bitmaps.tolist() == [[1, 2]]


def test_what_cannot_be_read_was_not_looked_at() -> None:
    """Only on that slice and for that structure; a harmless remark costs nothing."""
    items = [
        Item(0, 0, "p", problem=(Reason.BAD_CONTOUR, "no number")),
        Item(0, 1, "p", problem=(Reason.NO_AREA, "a point")),
        Item(1, 2, "q", problem=(Reason.UNREADABLE_FILE, "gone")),
    ]
    drawn, masks = draw(items, [(9, 9)] * 2, [AS_IS] * 2, annotated=0b111)

    assert drawn.looked_at.tolist() == [[False, True, True], [True, True, False]]
    assert not masks.any()
    assert [(one.path, one.reason, one.detail) for one in drawn.problems] == [
        ("p.file", Reason.BAD_CONTOUR, "no number"),
        ("p.file", Reason.NO_AREA, "a point"),
        ("q.file", Reason.UNREADABLE_FILE, "gone"),
    ]


OVERLAPPING = [
    Item(0, 1, "p", ring=square(0.5, 0.5, 6.5, 6.5)),
    Item(0, 1, "p", ring=square(3.5, 3.5, 9.5, 9.5)),
    Item(0, 0, "p", ring=square(0.5, 0.5, 2.5, 2.5)),
]


@pytest.mark.parametrize(
    ("policy", "area", "reason", "looked_at"),
    [
        ("xor", 36 + 36 - 18, Reason.PARTIAL_OVERLAP, True),
        ("union", 36 + 36 - 9, Reason.PARTIAL_OVERLAP, True),
        ("refuse", 0, Reason.BAD_CONTOUR, False),
    ],
)
def test_partial_overlap_follows_the_policy_and_is_reported(
    policy: str, area: int, reason: Reason, looked_at: bool
) -> None:
    """What is refused is a rejection, and the slice does not count as looked at for it."""
    layout = layout_of(partial_overlap=policy)
    drawn, masks = draw(OVERLAPPING, [(12, 14)], [AS_IS], layout, annotated=0b11)

    assert (masks >> 1 & 1).sum() == area
    assert (masks & 1).sum() == 4
    assert drawn.looked_at.tolist() == [[True, looked_at, False]]
    (problem,) = drawn.problems
    assert (problem.path, problem.reason) == ("0.dcm", reason)
    assert problem.detail.startswith("frame 1: rings of 'b' partly overlap; ")
    assert problem.detail.endswith(f"({policy})")
    assert problem.is_rejection == (policy == "refuse")


@pytest.mark.parametrize("rule", ["pil-outline0", "pil-outline1"])
def test_pillow_rules_unite_rings_whatever_the_policy(rule: str) -> None:
    """Overlap is a question of parity, which those rules do not know."""
    layouts = [layout_of(rule=rule, partial_overlap=policy) for policy in ("xor", "refuse")]
    (one, masks), (other, same) = (
        draw(OVERLAPPING, [(12, 14)], [AS_IS], layout) for layout in layouts
    )

    assert one.problems == other.problems == ()
    assert masks.any()
    np.testing.assert_array_equal(masks, same)


def test_only_hearts_should_be_ellipses() -> None:
    """The check is for outlines of the source sunnybrook; united rings are none."""
    rings = [replace(one, kind=kind) for one, kind in zip(OVERLAPPING, "aab", strict=True)]
    hearts = [replace(one, kind="sunnybrook") for one in OVERLAPPING]

    for items, policy, expected in (
        (rings, "xor", [False] * 3),
        (hearts, "xor", [True] * 3),
        (hearts, "union", [False] * 2),
    ):
        layout = layout_of(partial_overlap=policy)
        assert draw(items, [(12, 14)], [AS_IS], layout)[0].elliptic.tolist() == expected


# --- where the structures are --------------------------------------------------------------------


def centers(items, volume, size=(20, 30)):
    """`structure_centers` of a cohort of these volumes."""
    slices = usual.slice_table(len(volume), volume=volume, rows=size[0], columns=size[1])
    cohort = usual.cohort(slices, [(one.plane, one.structure) for one in items])
    annotations = replace(
        cohort.annotations,
        kind=np.array([one.kind for one in items], "S9"),
        offset=np.arange(len(items)),
    )
    known = {one.kind: HandReader(one.kind, items) for one in items}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "readers", lambda: known)
        patch.setattr(drawing, "_SLICES_PER_LOOK", 1)
        return structure_centers(replace(cohort, annotations=annotations), 0.0)


def test_a_volume_is_centred_on_all_that_is_drawn_on_it() -> None:
    """The middle of one bounding box of rings and bitmaps of all its slices; NaN without any."""
    bits = np.zeros((20, 30), bool)
    bits[15:19, 3] = True
    items = [Item(0, 0, "p", ring=square(10, 4, 14, 6)), Item(1, 1, "bits", mask=bits)]

    found = centers(items, [5, 5, 7])

    expected: NDArray[np.float64] = np.array([[11.0, 8.5], [11.0, 8.5], [np.nan, np.nan]])
    np.testing.assert_array_equal(found, expected)


def test_what_sticks_out_of_the_image_moves_no_centre() -> None:
    """A table below the patient may be drawn far off the image."""
    found = centers([Item(0, 0, "p", ring=square(10, 4, 500, 6))], [0])

    assert found.tolist() == [[5.0, (10 + 29) / 2]]
