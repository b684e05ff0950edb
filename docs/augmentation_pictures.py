"""Draw the pictures of docs/augmentation.md from a generated slice.

    python docs/augmentation_pictures.py

Each is a strip: the slice as it is, and three samples of it. The outline is the edge of the mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from parallel_dicomseg.loader.augment import (
    Augmentation,
    Blur,
    Brightness,
    Contrast,
    Crop,
    Dihedral,
    Elastic,
    Flip,
    Gamma,
    LowResolution,
    Noise,
    Rotate,
    Shift,
    Zoom,
    augment_into,
    compile_plan,
)
from parallel_dicomseg.loader.windows import Statistics, Window, intensity_maps

FOLDER = Path(__file__).parent / "images"
SAMPLES, GAP = 3, 4
#: Colours of the pictures: so many greys, then that of outlines.
GREYS, OUTLINE = 48, (255, 170, 0)

#: By the name of the picture; ranges wider than the usual ones, to be seen at this size.
EFFECTS: dict[str, tuple[Augmentation, ...]] = {
    "flip": (Flip(0.6, 0.6),),
    "dihedral": (Crop(112, 112, random=False), Dihedral()),
    "rotate": (Rotate((-30.0, 30.0)),),
    "shift": (Shift((-0.2, 0.2), (-0.2, 0.2)),),
    "zoom": (Zoom((0.6, 1.6)),),
    "crop": (Crop(84, 84),),
    "elastic": (Elastic((6.0, 8.0)),),
    "blur": (Blur((1.0, 3.0)),),
    "low-resolution": (LowResolution((3.0, 6.0)),),
    "contrast": (Contrast((0.4, 2.0)),),
    "brightness": (Brightness((-1.0, 1.0)),),
    "gamma": (Gamma((0.4, 2.5)),),
    "noise": (Noise((0.1, 0.5)),),
}


def ellipse(row: float, column: float, rows: float, columns: float) -> NDArray[np.bool_]:
    """(112, 144) pixels inside an ellipse."""
    r, c = np.indices((112, 144))
    return ((r - row) / rows) ** 2 + ((c - column) / columns) ** 2 < 1


def phantom() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A slice through a chest, Hounsfield units, and its heart."""
    image = np.full((112, 144), -1000, np.int16)
    image[ellipse(58, 72, 46, 64)] = 40
    for column, rows, columns in ((42, 32, 20), (104, 30, 22)):
        image[ellipse(56, column, rows, columns)] = -800
    heart = ellipse(50, 82, 20, 17)
    image[heart] = 60
    image[ellipse(50, 86, 9, 8)] = 200
    image[ellipse(90, 72, 8, 10)] = 500
    image[ellipse(40, 40, 4, 4)] = 20
    noise = np.random.default_rng(0).normal(0, 15, image.shape)
    return (image + noise).astype(np.int16), heart.astype(np.uint8)


def picture(image: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey levels from 0 to 1, and the pixels of the mask that touch others of another value."""
    levels = (image.clip(0, 1) * (GREYS - 1)).round().astype(np.uint8)
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    levels[(mask != 0) & (inner == 0)] = GREYS
    return levels


def strip(objects: tuple[Augmentation, ...]) -> NDArray[np.uint8]:
    """The slice as it is, and samples of it beside each other."""
    image, mask = phantom()
    columns = np.array([[image.min(), image.max(), image.mean(), image.std()]])
    statistics = Statistics.from_columns(columns, np.zeros(1))
    maps = intensity_maps(Window.centered(-200, 1400), None, statistics)
    plans = [compile_plan((), image.shape)] + [compile_plan(objects, image.shape)] * SAMPLES
    parts = []
    for seed, plan in enumerate(plans):
        out, out_mask = np.empty(plan.shape, np.float32), np.empty(plan.shape, np.uint8)
        # seeds far apart, as a loader makes them
        augment_into(image, mask, out, out_mask, seed * 0x9E3779B97F4A7C15 % 2**64, plan, maps[0])
        part = np.full((image.shape[0], plan.shape[1] + GAP), GREYS - 1, np.uint8)
        part[: plan.shape[0], : plan.shape[1]] = picture(out, out_mask)
        parts.append(part)
    return np.concatenate(parts, axis=1)[:, :-GAP]


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    palette = np.linspace(0, 255, GREYS).round().astype(int).repeat(3).tolist()
    for name, objects in EFFECTS.items():
        file = FOLDER / f"augment_{name.replace('-', '_')}.png"
        drawn = Image.fromarray(strip(objects))
        drawn.putpalette([*palette, *OUTLINE])
        drawn.save(file, optimize=True)


if __name__ == "__main__":
    main()
