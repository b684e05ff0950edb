"""The peer of convert.py: the serial algorithm of the original script, told in our own words.

One pass over the rows of link.csv; each outline finds its image by the end of the file name,
pydicom reads it, Pillow draws the mask, and both are appended to an HDF5 file row by row. Its
known faults are kept (a file name's end of 59 also fits 159.dcm; an outline drawn with
`outline=0` erodes the mask), for they are what its time is spent on. It converts one structure.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import re
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.errors import InvalidDicomError

#: A mask that covers more of the image than this is suspicious.
MAX_MASK_FRACTION = 0.5

_NUMBERS = re.compile(r"\d{4}-\d{4}")


def convert_serially(root: Path, output: Path, contours: str = "i-contours") -> int:
    """Convert one structure of a cohort of the Arterys layout; how many rows were written."""
    rows = 0
    with (root / "link.csv").open(newline="") as table, h5py.File(output, "w") as file:
        for link in csv.DictReader(table):
            dicom_files = glob.glob(f"{root}/dicoms/{link['patient_id']}/*.dcm")  # noqa: PTH207
            outlines = glob.glob(  # noqa: PTH207
                f"{root}/contourfiles/{link['original_id']}/{contours}/*.txt"
            )
            for outline in outlines:
                image = read_image(find_image(outline, dicom_files))
                if image is None:
                    continue
                mask = draw_mask(read_outline(outline), image.shape[1], image.shape[0])
                if mask.sum() / mask.size > MAX_MASK_FRACTION:
                    warnings.warn("an outline is suspiciously large", stacklevel=1)
                append(file, "input", image.flatten(), rows)
                append(file, "output", mask.flatten(), rows)
                shape = image.shape
                rows += 1
        for name in ("input", "output"):
            file[name].attrs["lshape"] = (*shape, 1)
    return rows


def find_image(outline: str, dicom_files: list[str]) -> str:
    """The first file whose name ends in the outline's number."""
    number = int(_NUMBERS.findall(Path(outline).name)[-1][-4:])
    return fnmatch.filter(dicom_files, f"*{number}.dcm")[0]


def read_image(path: str) -> NDArray[Any] | None:
    """Rescaled pixels (rows, columns); None for what is no DICOM file."""
    try:
        dataset = pydicom.dcmread(path)
    except InvalidDicomError:
        return None
    image: NDArray[Any] = dataset.pixel_array
    slope = float(dataset.get("RescaleSlope", 0) or 0)
    intercept = float(dataset.get("RescaleIntercept", 0) or 0)
    if slope != 0 and intercept != 0:
        image = image * slope + intercept
    return image


def read_outline(path: str) -> list[tuple[float, float]]:
    """The points (column, row) of a text outline, one per line."""
    points = []
    with Path(path).open() as lines:
        for line in lines:
            column, row = line.split()
            points.append((float(column), float(row)))
    return points


def draw_mask(points: list[tuple[float, float]], width: int, height: int) -> NDArray[np.bool_]:
    """The mask (height, width) that Pillow fills, without its border."""
    picture = Image.new("L", (width, height), 0)
    ImageDraw.Draw(picture).polygon(xy=points, outline=0, fill=1)
    return np.array(picture).astype(bool)


def append(file: h5py.File, name: str, values: NDArray[Any], row: int) -> None:
    """Add one row to a dataset; the first one makes it."""
    if row == 0:
        file.create_dataset(name, data=values[np.newaxis], maxshape=[None, len(values)])
        return
    dataset = file[name]
    dataset.resize(row + 1, axis=0)
    dataset[row, :] = values
