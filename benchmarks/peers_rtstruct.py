"""Other converters of RTSTRUCT, each timing itself in a process of its own; see rtstruct.py.

    PYTHON peers_rtstruct.py PEER masks|file IMAGES RTSTRUCT SCRATCH

PYTHON is one that has the peers (pip install dcmrtstruct2nii rt-utils platipy): they need another
pydicom than this project. Each does what its documentation says, in its fastest way: files are not
compressed where there is a choice.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Masks = Iterator[tuple[str, Any]]
"""Structures, one by one, each with its mask (slices, rows, columns)."""


class Contestant:
    """What a converter does: masks of all structures as arrays, or image and masks as files."""

    def masks(self, images: Path, rtstruct: Path) -> Masks:
        """Each structure as an array in memory."""
        raise NotImplementedError

    def file(self, images: Path, rtstruct: Path, output: Path) -> None:
        """Image and masks on disk, in the folder `output`."""
        raise NotImplementedError


class RtUtils(Contestant):
    """https://github.com/qurit/rt-utils; it writes no masks, so NumPy does."""

    def __init__(self) -> None:
        self._builder = importlib.import_module("rt_utils").RTStructBuilder

    def masks(self, images: Path, rtstruct: Path) -> Masks:
        """See `Contestant`."""
        loaded = self._builder.create_from(str(images), str(rtstruct))
        for name in loaded.get_roi_names():
            yield name, loaded.get_roi_mask_by_name(name).transpose(2, 0, 1)

    def file(self, images: Path, rtstruct: Path, output: Path) -> None:
        """See `Contestant`."""
        loaded = self._builder.create_from(str(images), str(rtstruct))
        pixels = [
            (one.pixel_array * one.RescaleSlope + one.RescaleIntercept).astype(np.int16)
            for one in loaded.series_data
        ]
        np.save(output / "image.npy", np.stack(pixels))
        for name in loaded.get_roi_names():
            mask = loaded.get_roi_mask_by_name(name)
            np.save(output / f"{name}.npy", mask.transpose(2, 0, 1))


class DcmRtStruct2Nii(Contestant):
    """https://github.com/Sikerdebaard/dcmrtstruct2nii."""

    def __init__(self) -> None:
        adapters = "dcmrtstruct2nii.adapters"
        self._facade = importlib.import_module("dcmrtstruct2nii.facade.dcmrtstruct2nii")
        self._outlines = importlib.import_module(f"{adapters}.input.contours.rtstructinputadapter")
        self._image = importlib.import_module(f"{adapters}.input.image.dcminputadapter")
        self._convert = importlib.import_module(f"{adapters}.convert.rtstructcontour2mask")
        self._sitk = importlib.import_module("SimpleITK")

    def masks(self, images: Path, rtstruct: Path) -> Masks:
        """See `Contestant`."""
        structures = self._outlines.RtStructInputAdapter().ingest(str(rtstruct))
        image = self._image.DcmInputAdapter().ingest(str(images))
        to_mask = self._convert.DcmPatientCoords2Mask()
        for structure in structures:
            mask = to_mask.convert(structure["sequence"], image, 0, 1)
            yield structure["name"], self._sitk.GetArrayFromImage(mask)

    def file(self, images: Path, rtstruct: Path, output: Path) -> None:
        """See `Contestant`."""
        self._facade.dcmrtstruct2nii(str(rtstruct), str(images), str(output), gzip=False)


class Platipy(Contestant):
    """https://github.com/pyplati/platipy; its masks are always compressed."""

    def __init__(self) -> None:
        self._platipy = importlib.import_module("platipy.dicom.io.rtstruct_to_nifti")
        self._sitk = importlib.import_module("SimpleITK")

    def masks(self, images: Path, rtstruct: Path) -> Masks:
        """See `Contestant`."""
        image = self._platipy.read_dicom_image(str(images))
        dataset = self._platipy.read_dicom_struct_file(str(rtstruct))
        masks, names = self._platipy.transform_point_set_from_dicom_struct(image, dataset)
        for name, mask in zip(names, masks, strict=True):
            yield name, self._sitk.GetArrayFromImage(mask)

    def file(self, images: Path, rtstruct: Path, output: Path) -> None:
        """See `Contestant`."""
        self._platipy.convert_rtstruct(
            str(images),
            str(rtstruct),
            prefix="",
            output_dir=output,
            output_img=output / "image.nii",
        )


PEERS: dict[str, Callable[[], Contestant]] = {
    "rt-utils": RtUtils,
    "dcmrtstruct2nii": DcmRtStruct2Nii,
    "platipy": Platipy,
}


# --- taking turns ---------------------------------------------------------------------------------


def serve(contestant: Contestant, what: str, images: Path, rtstruct: Path, scratch: Path) -> None:
    """Work once to warm up and say so, then once for each line that comes, and say how long.

    The first round also leaves the masks in `scratch/masks.npz`, as packed bits.
    """
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # peers print
    if what == "masks":
        packed = {
            name: np.packbits(np.asarray(mask, bool))
            for name, mask in contestant.masks(images, rtstruct)
        }
        np.savez(scratch / "masks.npz", **packed)
    else:
        _timed(contestant, what, images, rtstruct, scratch)
    print(json.dumps({"ready": True}), file=say, flush=True)
    for _ in sys.stdin:
        turn = _timed(contestant, what, images, rtstruct, scratch)
        print(json.dumps({**turn, "peak_mib": peak_mib()}), file=say, flush=True)


def _timed(
    contestant: Contestant, what: str, images: Path, rtstruct: Path, scratch: Path
) -> dict[str, float]:
    """Seconds of one round, and those of the processor in all threads."""
    output = scratch / "output"
    output.mkdir()
    start, cpu = time.perf_counter(), time.process_time()
    if what == "masks":
        for _, mask in contestant.masks(images, rtstruct):
            assert mask.ndim == 3
            del mask  # nobody has to hold two of them
    else:
        contestant.file(images, rtstruct, output)
    turn = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }
    shutil.rmtree(output)
    return turn


def peak_mib() -> float:
    """The most memory that this process has held; NaN where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    name, what, images, rtstruct, scratch = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.stdout = sys.stderr  # while they are imported
    serve(PEERS[name](), what, Path(images), Path(rtstruct), Path(scratch))


if __name__ == "__main__":
    main()
