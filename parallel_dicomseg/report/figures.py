"""Pictures of slices with their masks over them, drawn without a display.

Only matplotlib's objects are used, never pyplot: no state is shared with the caller's figures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.private import open_private

#: Okabe and Ito's palette, distinct under every common colour blindness; black would not show.
PALETTE = ("#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#f0e442", "#d55e00", "#0072b2")

BACKGROUND = "#0e1116"
INK = "#e6e9ee"
FAINT_INK = "#9aa4b2"

#: Red, green and blue of the colour map `bone`: grey levels, and the colour's value at each.
BONE = (
    ((0.0, 0.746032, 1.0), (0.0, 0.652778, 1.0)),
    ((0.0, 0.365079, 0.746032, 1.0), (0.0, 0.319444, 0.777778, 1.0)),
    ((0.0, 0.365079, 1.0), (0.0, 0.444444, 1.0)),
)

# In pixels.
SHEET_WIDTH = 1600
PAIR_WIDTH = 1200
LARGEST_TILE = 600
MARGIN = 20
GAP = 10
TITLE_HEIGHT = 24
LINE_HEIGHT = 24
LEGEND_COLUMN_WIDTH = 260

DPI = 100

FILL_OPACITY = 0.3
#: Percentiles of an image that become black and white: a few bright vessels must not darken it.
WINDOW = (1.0, 99.0)


def contact_sheet(
    images: NDArray[Any],
    masks: NDArray[Any],
    structures: Sequence[str],
    titles: Sequence[str],
    path: str | Path,
    *,
    pixel_spacing: ArrayLike | None = None,
    caption: str = "",
    focus: bool = False,
) -> None:
    """Save a sheet of slices, each with its masks over it, as a PNG at most 1600 pixels wide.

    Parameters
    ----------
    images : (n, rows, columns[, 3])
        Any real type; every slice gets a window of its own. Colour is red, green and blue.
    masks : (n, rows, columns) unsigned
        Bit s is structure s.
    structures
        Their names, in bit order, for the legend.
    titles
        One per slice, short.
    path
        The PNG; an existing file is replaced.
    pixel_spacing : (2,) or (n, 2), optional
        mm between rows, then between columns (DICOM PS3.3 10.7.1.3); square pixels without it.
    caption
        One line at the foot of the sheet.
    focus
        Show only the part that holds all masks, the same of every slice, with a margin.

    Raises
    ------
    ConfigurationError
        matplotlib is not installed.
    ValueError
        The arguments do not belong together.
    """
    _check(images, masks, titles)
    if focus:
        part = focus_of(masks)
        images, masks = images[:, *part], masks[:, *part]
    ratios = _height_over_width(masks.shape, pixel_spacing)
    rows, columns = _grid(len(images))
    sheet = _Sheet(SHEET_WIDTH, rows, columns, float(ratios.max()), structures, caption)
    for k, title in enumerate(titles):
        axes = sheet.tile(k // columns, k % columns, title)
        _draw_slice(axes, images[k], masks[k], len(structures), float(ratios[k]))
    sheet.save(path)


def image_and_mask_figure(
    image: NDArray[Any],
    mask: NDArray[Any],
    structures: Sequence[str],
    path: str | Path,
    *,
    title: str,
    pixel_spacing: ArrayLike | None = None,
) -> None:
    """Save a PNG of one slice: on the left the image alone, on the right with its masks over it.

    Parameters
    ----------
    image : (rows, columns[, 3])
    mask : (rows, columns) unsigned
        Bit s is structure s.
    structures
        Their names, in bit order, for the legend.
    path
        The PNG; an existing file is replaced.
    title
        Stands above the image.
    pixel_spacing : (2,), optional
        mm between rows, then between columns; square pixels without it.

    Raises
    ------
    ConfigurationError
        matplotlib is not installed.
    ValueError
        Image and mask differ in shape.
    """
    _check(image[None], mask[None], [title])
    (ratio,) = _height_over_width((1, *mask.shape), pixel_spacing).tolist()
    sheet = _Sheet(PAIR_WIDTH, 1, 2, ratio, structures, "")
    _draw_slice(sheet.tile(0, 0, title), image, mask, 0, ratio)
    _draw_slice(sheet.tile(0, 1, "with its mask"), image, mask, len(structures), ratio)
    sheet.save(path)


def structure_colours(count: int) -> NDArray[np.float64]:
    """(count, 3) RGB in 0 … 1: distinct, and safe for the colour-blind up to seven structures."""
    if count <= len(PALETTE):
        codes = [[int(code[k : k + 2], 16) for k in (1, 3, 5)] for code in PALETTE[:count]]
        return np.array(codes, np.float64).reshape(count, 3) / 255
    # More than a palette holds: hues apart by the golden ratio, so that neighbours differ.
    hues = (np.arange(count)[:, None] * 0.618034 + np.array([0, 2 / 3, 1 / 3])) % 1
    rgb: NDArray[np.float64] = np.clip(np.abs(hues * 6 - 3) - 1, 0, 1) * 0.75 + 0.25
    return rgb


def blend(image: NDArray[Any], mask: NDArray[Any], structures: int) -> NDArray[np.float64]:
    """An image, a grey one in `bone`, with the structures over it as translucent colours.

    Where structures overlap, the colour is that of the smallest: an inner one stays in sight.

    Parameters
    ----------
    image : (rows, columns[, 3])
    mask : (rows, columns) unsigned
        Bit s is structure s.
    structures
        How many of them to draw.

    Returns
    -------
    (rows, columns, 3) float64
        RGB in 0 … 1.
    """
    plain = window(image) if image.ndim == 3 else bone(window(image))
    rgb = plain.copy()
    planes = [_plane(mask, s) for s in range(structures)]
    largest_first = sorted(range(structures), key=lambda s: -int(planes[s].sum()))
    colours = structure_colours(structures)
    for s in largest_first:
        rgb[planes[s]] = (1 - FILL_OPACITY) * plain[planes[s]] + FILL_OPACITY * colours[s]
    return rgb


def window(image: NDArray[Any]) -> NDArray[np.float64]:
    """(rows, columns[, 3]) in 0 … 1, between two percentiles; a constant or no image is black."""
    values = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(values, WINDOW)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(image.shape)


def bone(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB (…, 3) of matplotlib's colour map `bone`, which the original script used, unquantised."""
    return np.stack([np.interp(grey, *knots) for knots in BONE], axis=-1)


def outline_segments(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The edges of pixels that part inside from outside.

    Parameters
    ----------
    inside : (rows, columns) bool

    Returns
    -------
    (k, 2, 2) float64
        Both ends of each edge as (column, row); integer coordinates are pixel centres.
    """
    padded = np.pad(inside, 1)
    across_row, across_column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    along_row, along_column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    start = np.concatenate(
        (np.stack((across_column, across_row), 1), np.stack((along_column, along_row), 1))
    )
    step = np.repeat([[1, 0], [0, 1]], [len(across_row), len(along_row)], axis=0)
    return np.stack((start, start + step), axis=1) - 0.5


def _plane(mask: NDArray[Any], structure: int) -> NDArray[np.bool_]:
    """Where a structure is; shifted in the mask's own type, which may have no wider one."""
    inside: NDArray[np.bool_] = (mask >> mask.dtype.type(structure)) & mask.dtype.type(1) == 1
    return inside


def _check(images: NDArray[Any], masks: NDArray[Any], titles: Sequence[str]) -> None:
    fits = images.shape in (masks.shape, (*masks.shape, 3)) and masks.ndim == 3
    if not fits or not 0 < len(titles) == len(images):
        raise ValueError(
            f"images {images.shape}, masks {masks.shape} and {len(titles)} titles must be n slices "
            f"of equal size, at least one"
        )


def _height_over_width(
    shape: tuple[int, ...], pixel_spacing: ArrayLike | None
) -> NDArray[np.float64]:
    """(n,) the slices' true heights in their widths; square pixels where a spacing is unknown."""
    slices, rows, columns = shape
    spacing = np.broadcast_to(1.0 if pixel_spacing is None else pixel_spacing, (slices, 2))
    spacing = np.where(np.isfinite(spacing).all(axis=1, keepdims=True), spacing, 1.0)
    ratios: NDArray[np.float64] = rows * spacing[:, 0] / (columns * spacing[:, 1])
    return ratios


def focus_of(masks: NDArray[Any]) -> tuple[slice, slice]:
    """Rows and columns that hold all masks, and half their extent around them.

    Parameters
    ----------
    masks : (n, rows, columns) unsigned

    Returns
    -------
    Slices of rows and columns; everything, where there is no mask.
    """
    inside = masks != 0
    return _with_margin(inside.any(axis=(0, 2))), _with_margin(inside.any(axis=(0, 1)))


def _with_margin(profile: NDArray[np.bool_]) -> slice:
    places = np.flatnonzero(profile)
    if not len(places):
        return slice(0, len(profile))
    start, stop = int(places[0]), int(places[-1]) + 1
    margin = (stop - start) // 4 + 2
    return slice(max(start - margin, 0), min(stop + margin, len(profile)))


def _grid(slices: int) -> tuple[int, int]:
    """Rows and columns of a sheet about three times as wide as high."""
    rows = max(round(math.sqrt(slices / 3)), 1)
    return rows, math.ceil(slices / rows)


class _Sheet:
    """A dark figure of equal tiles, measured in pixels from its upper left corner."""

    def __init__(
        self,
        width: int,
        rows: int,
        columns: int,
        height_over_width: float,
        structures: Sequence[str],
        caption: str,
    ) -> None:
        figure_class, self._canvas_class = _matplotlib()
        width = min(width, columns * (LARGEST_TILE + GAP) - GAP + 2 * MARGIN)
        self._tile_width = (width - 2 * MARGIN - (columns - 1) * GAP) / columns
        self._tile_height = self._tile_width * height_over_width
        tiles = rows * (TITLE_HEIGHT + self._tile_height) + (rows - 1) * GAP
        legend = math.ceil(len(structures) / (width // LEGEND_COLUMN_WIDTH)) * LINE_HEIGHT
        foot = GAP + legend + (LINE_HEIGHT if caption else 0) if structures or caption else 0
        self._width = width
        self._height = round(MARGIN / 2 + tiles + foot + MARGIN / 2)
        size = (width / DPI, self._height / DPI)
        self._figure = figure_class(figsize=size, dpi=DPI, facecolor=BACKGROUND)
        below_tiles = MARGIN / 2 + tiles + GAP
        self._draw_legend(structures, below_tiles + legend / 2)
        if caption:
            self._text(MARGIN, below_tiles + legend + LINE_HEIGHT / 2, caption, color=FAINT_INK)

    def tile(self, row: int, column: int, title: str) -> Any:
        """The axes of a tile, with its title above it."""
        left = MARGIN + column * (self._tile_width + GAP)
        top = MARGIN / 2 + row * (TITLE_HEIGHT + self._tile_height + GAP) + TITLE_HEIGHT
        bottom = top + self._tile_height
        width, height = self._tile_width / self._width, self._tile_height / self._height
        axes = self._figure.add_axes((left / self._width, 1 - bottom / self._height, width, height))
        axes.set_axis_off()
        self._text(left, top - TITLE_HEIGHT / 2, title, color=INK)
        return axes

    def _draw_legend(self, structures: Sequence[str], middle: float) -> None:
        from matplotlib.patches import Patch

        colours = structure_colours(len(structures))
        handles = [
            Patch(facecolor=(*colour, 0.45), edgecolor=colour, linewidth=1.4, label=name)
            for name, colour in zip(structures, colours, strict=True)
        ]
        if handles:
            legend = self._figure.legend(
                handles=handles,
                loc="center left",
                bbox_to_anchor=(MARGIN / self._width, 1 - middle / self._height),
                ncols=min(len(handles), self._width // LEGEND_COLUMN_WIDTH),
                frameon=False,
                fontsize=10,
                labelcolor=INK,
                borderaxespad=0,
                borderpad=0,
                handlelength=1.3,
                handleheight=1.0,
                columnspacing=1.6,
            )
            for text in legend.get_texts():
                text.set_parse_math(False)

    def _text(self, x: float, y: float, text: str, *, color: str) -> None:
        # Without parse_math=False a dollar sign in a name would begin a formula.
        self._figure.text(
            x / self._width,
            1 - y / self._height,
            text,
            color=color,
            fontsize=9.5,
            verticalalignment="center_baseline",
            parse_math=False,
        )

    def save(self, path: str | Path) -> None:
        """Write the PNG; without the version of matplotlib, which would change its bytes."""
        self._canvas_class(self._figure)
        descriptor = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(descriptor, "wb") as file:
            self._figure.savefig(
                file, format="png", dpi=DPI, facecolor=BACKGROUND, metadata={"Software": None}
            )


def _draw_slice(
    axes: Any,
    image: NDArray[Any],
    mask: NDArray[Any],
    structures: int,
    height_over_width: float,
) -> None:
    from matplotlib.collections import LineCollection

    rows, columns = mask.shape
    axes.imshow(
        blend(image, mask, structures),
        interpolation="bilinear",
        aspect=height_over_width * columns / rows,
    )
    for s, colour in enumerate(structure_colours(structures)):
        segments = list(outline_segments(_plane(mask, s)))
        lines = LineCollection(segments, colors=[colour], linewidths=1.1, capstyle="round")
        axes.add_collection(lines, autolim=False)


def _matplotlib() -> tuple[Any, Any]:
    """The two classes that draw without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "figures need matplotlib, which is not installed: "
            'pip install "parallel_dicomseg[figures]"'
        ) from error
    return Figure, FigureCanvasAgg
