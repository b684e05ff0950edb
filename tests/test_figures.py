"""Figures: slices with their masks over them, as a person sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from PIL import Image

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.report.figures import (
    BACKGROUND,
    FILL_OPACITY,
    blend,
    bone,
    contact_sheet,
    focus_of,
    image_and_mask_figure,
    outline_segments,
    structure_colours,
    window,
)

#: How three kinds of the colour-blind see linear RGB (Machado, Oliveira, Fernandes 2009).
COLOUR_BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def ramp(rows: int = 40, columns: int = 60) -> NDArray[np.int16]:
    """An image that brightens from left to right."""
    return np.tile(np.arange(columns, dtype=np.int16) * 10, (rows, 1))


def two_boxes(rows: int = 40, columns: int = 60) -> NDArray[np.uint8]:
    """Structure 1 in a large box, structure 0 in a small one inside it."""
    mask = np.zeros((rows, columns), np.uint8)
    mask[10:30, 20:50] |= 2
    mask[15:25, 30:40] |= 1
    return mask


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """(rows, columns, 3) of a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def box_unlike_background(picture: NDArray[np.uint8]) -> tuple[int, int]:
    """Rows and columns of the part of a picture that has not its background's colour."""
    background = [int(BACKGROUND[k : k + 2], 16) for k in (1, 3, 5)]
    differs = (picture != background).any(axis=2)
    return int(differs.any(axis=1).sum()), int(differs.any(axis=0).sum())


# ------------------------------------------------------------------------------- the whole sheet


@pytest.mark.parametrize(
    ("slices", "spacing", "rows_of_tiles", "columns_of_tiles", "ratio"),
    [
        (12, None, 2, 6, 40 / 60),
        (12, (3.0, 1.0), 2, 6, 2.0),
        (5, (0.5, 0.5), 1, 5, 40 / 60),
        (7, [(1.0, 1.0)] * 6 + [(3.0, 1.0)], 2, 4, 2.0),
        (3, (np.nan, np.nan), 1, 3, 40 / 60),
    ],
)
def test_a_sheet_has_the_size_of_its_tiles(
    tmp_path: Path,
    slices: int,
    spacing: Any,
    rows_of_tiles: int,
    columns_of_tiles: int,
    ratio: float,
) -> None:
    """1600 pixels wide; the tiles are as high as their pixel spacing makes them."""
    images, masks = np.stack([ramp()] * slices), np.stack([two_boxes()] * slices)
    path = tmp_path / "sheet.png"

    contact_sheet(images, masks, (), [""] * slices, path, pixel_spacing=spacing)

    height, width, _ = pixels_of(path).shape
    tile = (1600 - 40 - 10 * (columns_of_tiles - 1)) / columns_of_tiles
    expected = 20 + rows_of_tiles * (24 + tile * ratio) + 10 * (rows_of_tiles - 1)
    assert width == 1600
    assert height == pytest.approx(expected, abs=1)


def test_a_slice_is_drawn_in_its_true_proportions(tmp_path: Path) -> None:
    """What is not background is as high and as wide as the slice in millimetres."""
    path = tmp_path / "sheet.png"

    contact_sheet(ramp()[None] + 5, two_boxes()[None] & 0, (), [""], path, pixel_spacing=(2.0, 1.0))

    height, width = box_unlike_background(pixels_of(path))
    assert width == pytest.approx(600, abs=1)
    assert height == pytest.approx(width * (40 * 2.0) / (60 * 1.0), abs=2)


def test_colours_are_where_the_masks_are(tmp_path: Path) -> None:
    """In the picture: image, fill and outline at the places where they belong."""
    path = tmp_path / "sheet.png"
    image, mask = ramp(), two_boxes()

    contact_sheet(image[None], mask[None], ("inner", "outer"), [""], path)

    picture = pixels_of(path).astype(float) / 255
    zoom, left, top = 600 / 60, 20, 10 + 24

    def at(row: float, column: float) -> NDArray[np.float64]:
        return picture[int(top + (row + 0.5) * zoom), int(left + (column + 0.5) * zoom)]

    expected = blend(image, mask, 2)
    for row, column in [(5, 10), (20, 25), (20, 45), (20, 35), (35, 57)]:
        np.testing.assert_allclose(at(row, column), expected[row, column], atol=0.03)
    inner, outer = structure_colours(2)
    np.testing.assert_allclose(at(20, 29.5), inner, atol=0.15)
    np.testing.assert_allclose(at(9.5, 25), outer, atol=0.15)


def test_a_pair_shows_the_image_alone_and_with_its_mask(tmp_path: Path) -> None:
    """The left half of the figure has no colour of a structure, the right half has them all."""
    path = tmp_path / "pair.png"

    image_and_mask_figure(
        ramp(60, 60), two_boxes(60, 60), ("i", "o"), path, title="patient 1, slice 7"
    )

    picture = pixels_of(path)[34:600].astype(int)
    left, right = picture[:, :600], picture[:, 600:]
    for colour in structure_colours(2) * 255:
        near = [int((np.abs(half - colour).max(axis=2) < 40).sum()) for half in (left, right)]
        assert near[0] == 0
        assert near[1] > 50


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    """No date and no version in the file: it can be kept under version control."""
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in paths:
        contact_sheet(ramp()[None], two_boxes()[None], ("i", "o"), ["a"], path, caption="b")

    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_titles_captions_and_names_appear(tmp_path: Path) -> None:
    """Each adds ink to the picture; a dollar sign is no formula."""
    blank, full = tmp_path / "blank.png", tmp_path / "full.png"
    one = (ramp()[None], two_boxes()[None], ("", ""))

    contact_sheet(*one, [""], blank, caption=" ")
    contact_sheet(
        ramp()[None],
        two_boxes()[None],
        ("$i_{$", "ROI \\frac{"),
        ["slice $1"],
        full,
        caption="$\\bad$",
    )

    without, with_text = pixels_of(blank), pixels_of(full)
    assert without.shape == with_text.shape
    differing = (without != with_text).any(axis=(1, 2))
    tile = slice(10 + 24, 10 + 24 + 400)
    assert differing[: tile.start].any()
    assert not differing[tile].any()
    assert differing[tile.stop : -34].any()
    assert differing[-34:].any()


def test_sixty_four_structures_fit_into_the_legend(tmp_path: Path) -> None:
    """The legend takes as many lines as it needs."""
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64).reshape(1, 8, 8)
    few, many = tmp_path / "few.png", tmp_path / "many.png"

    contact_sheet(np.zeros((1, 8, 8)), bits, ("a",), ["one"], few)
    contact_sheet(
        np.zeros((1, 8, 8)), bits, [f"a rather long name {k}" for k in range(64)], ["one"], many
    )

    assert pixels_of(many).shape[0] > pixels_of(few).shape[0] + 20 * 24
    assert box_unlike_background(pixels_of(many)[:, -20:]) == (0, 0)


def test_focus_shows_the_masks_larger(tmp_path: Path) -> None:
    """The same structure fills more of the sheet, and nothing of it is cut off."""
    paths = {focus: tmp_path / f"{focus}.png" for focus in (False, True)}
    for focus, path in paths.items():
        contact_sheet(
            ramp(120, 120)[None], two_boxes(120, 120)[None], ("i", "o"), [""], path, focus=focus
        )

    # The outline of the outer box in the tile: the sum of its pixels grows with the zoom.
    colour = structure_colours(2)[1] * 255
    inks = {
        focus: int((np.abs(pixels_of(path)[34:620] - colour).max(axis=2) < 60).sum())
        for focus, path in paths.items()
    }
    assert inks[True] > 1.5 * inks[False]


@given(arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, max_side=9)))
def test_focus_holds_every_mask(masks: NDArray[np.uint8]) -> None:
    """Nothing that is set lies outside; without any mask everything is shown."""
    rows, columns = focus_of(masks)

    assert masks[:, rows, columns].sum() == masks.sum()
    if not masks.any():
        assert masks[:, rows, columns].shape == masks.shape


# --------------------------------------------------------------------------------------- the parts


def slow_segments(inside: NDArray[np.bool_]) -> set[tuple[float, float, float, float]]:
    """The twin: the four sides of every pixel, less those that two pixels share."""
    count: dict[tuple[float, float, float, float], int] = {}
    for row, column in zip(*np.nonzero(inside), strict=True):
        left, right, top, bottom = column - 0.5, column + 0.5, row - 0.5, row + 0.5
        for side in (
            (left, top, right, top),
            (left, bottom, right, bottom),
            (left, top, left, bottom),
            (right, top, right, bottom),
        ):
            count[side] = count.get(side, 0) + 1
    return {side for side, times in count.items() if times == 1}


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_outlines_run_along_the_edges_of_pixels(inside: NDArray[np.bool_]) -> None:
    """Each edge between inside and outside once, and no other; the image's border included."""
    segments = outline_segments(inside)

    assert segments.shape[1:] == (2, 2)
    assert len(segments) == len(slow_segments(inside))
    assert {tuple(segment.ravel().tolist()) for segment in segments} == slow_segments(inside)


def test_blend_colours_the_masks_and_nothing_else() -> None:
    """Outside is the image; inside its colour and the smallest structure's."""
    image, mask = ramp(), two_boxes()
    grey, colours = bone(window(image)), structure_colours(2)

    rgb = blend(image, mask, 2)

    np.testing.assert_array_equal(rgb[mask == 0], grey[mask == 0])
    for value, colour in ((2, colours[1]), (3, colours[0])):
        inside = mask == value
        mixed = (1 - FILL_OPACITY) * grey[inside] + FILL_OPACITY * colour
        np.testing.assert_allclose(rgb[inside], mixed)


def test_colour_stays_colour_under_its_masks(tmp_path: Path) -> None:
    """A red image is red where no mask is, in one window for all samples, and can be a sheet."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 0] = np.arange(60) * 4
    rgb = blend(image, two_boxes(), 2)
    free = two_boxes() == 0

    assert (rgb[free][:, 1:] == 0).all()
    np.testing.assert_array_equal(window(image)[free], rgb[free])
    assert (rgb[~free][:, 1:] > 0).any()
    pair = tmp_path / "pair.png"
    image_and_mask_figure(image, two_boxes(), ("i", "o"), pair, title="colour")
    assert (pixels_of(pair) == (255, 0, 0)).all(axis=2).any()


def test_the_smaller_of_two_structures_stays_in_sight_in_any_bit_order() -> None:
    """A large structure with a higher bit does not hide a small one, nor the other way round."""
    swapped = np.array([0, 2, 1, 3], np.uint8)[two_boxes()]

    small_first, small_last = blend(ramp(), two_boxes(), 2), blend(ramp(), swapped, 2)

    grey = (1 - FILL_OPACITY) * bone(window(ramp()))[20, 35]
    np.testing.assert_allclose(small_first[20, 35] - grey, FILL_OPACITY * structure_colours(2)[0])
    np.testing.assert_allclose(small_last[20, 35] - grey, FILL_OPACITY * structure_colours(2)[1])


@given(
    arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-1e9, 1e9),
    )
)
def test_window_keeps_the_order_of_grey_levels(image: NDArray[np.float64]) -> None:
    """From 0 to 1, and of two pixels the brighter one is never the darker one afterwards."""
    grey = window(image)

    assert grey.min() >= 0
    assert grey.max() <= 1
    assert (np.diff(grey.ravel()[np.argsort(image.ravel(), kind="stable")]) >= 0).all()


@pytest.mark.parametrize("value", [0, 7, np.nan, np.inf])
def test_an_image_without_contrast_is_black(value: float) -> None:
    """Nothing to show is no reason to fail."""
    assert (window(np.full((5, 6), value)) == 0).all()


def test_bone_is_the_colour_map_of_that_name() -> None:
    """As matplotlib has it, to one of its 256 steps."""
    grey = np.linspace(0, 1, 256)

    np.testing.assert_allclose(bone(grey), mpl.colormaps["bone"](grey)[:, :3], atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 30, 64])
def test_every_structure_has_a_colour_of_its_own(count: int) -> None:
    """No two are the same, and none is too dark for a dark picture."""
    colours = structure_colours(count)

    assert colours.shape == (count, 3)
    assert len({tuple(colour) for colour in colours.round(3).tolist()}) == count
    assert (colours.max(axis=1, initial=0) > 0.5).all() or count == 0
    assert ((colours >= 0) & (colours <= 1)).all()


@pytest.mark.parametrize("vision", COLOUR_BLIND)
def test_the_palette_can_be_told_apart_by_the_colour_blind(vision: str) -> None:
    """All pairs of the seven colours differ clearly in what they see."""
    linear = structure_colours(7) ** 2.2
    seen = np.clip(linear @ np.array(COLOUR_BLIND[vision]).T, 0, 1) ** (1 / 2.2)

    distances = np.linalg.norm(seen[:, None] - seen[None], axis=2)[np.triu_indices(7, 1)]
    assert distances.min() > 0.1


# --------------------------------------------------------------------------------------- mistakes


def test_a_missing_matplotlib_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has no matplotlib is told what to install."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ConfigurationError, match=r'pip install "parallel_dicomseg\[figures\]"'):
        contact_sheet(ramp()[None], two_boxes()[None], ("i", "o"), [""], tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("images", "masks", "titles"),
    [
        ((2, 4, 4), (2, 4, 5), 2),
        ((2, 4, 4, 2), (2, 4, 4), 2),
        ((2, 4, 4), (2, 4, 4), 1),
        ((0, 4, 4), (0, 4, 4), 0),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(
    tmp_path: Path, images: tuple[int, ...], masks: tuple[int, ...], titles: int
) -> None:
    """The message shows both shapes and the number of titles."""
    with pytest.raises(ValueError, match=rf"images \({images[0]}.* and {titles} titles"):
        contact_sheet(
            np.zeros(images), np.zeros(masks, np.uint8), ("i",), [""] * titles, tmp_path / "x.png"
        )


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    """The caller's figures, backend and display stay as they are."""
    program = (
        "import sys, numpy as np\n"
        "from parallel_dicomseg.report.figures import contact_sheet\n"
        "assert 'matplotlib' not in sys.modules\n"
        "contact_sheet(np.eye(9)[None], np.eye(9, dtype='u1')[None], ['a'], ['b'], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = tmp_path / "sheet.png"

    subprocess.run([sys.executable, "-c", program, path], check=True, env={"PATH": ""})

    assert pixels_of(path).shape[1] == 640
