"""From a folder of medical images and somebody's outlines to one HDF5 training set.

>>> import parallel_dicomseg as pds  # doctest: +SKIP
>>> cohort = pds.scan_cohort("final_data")  # doctest: +SKIP
>>> summary = pds.convert_cohort(cohort, "cohort.h5")  # doctest: +SKIP
>>> with pds.open_dataset("cohort.h5") as dataset:  # doctest: +SKIP
...     image, mask = dataset.images[0], dataset.masks[0]

Names are imported when they are first used, so that the package itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel_dicomseg.cohort import scan_cohort
    from parallel_dicomseg.convert import convert_cohort, warm_up
    from parallel_dicomseg.errors import ParallelDicomSegError
    from parallel_dicomseg.loader import BatchLoader, iterate_batches
    from parallel_dicomseg.rasterize import rasterize_contours
    from parallel_dicomseg.records import Checks, ConvertOptions, ScanOptions
    from parallel_dicomseg.store import mirror_to_zarr, open_dataset, verify_file

__version__ = "0.1.0"

__all__ = [
    "BatchLoader",
    "Checks",
    "ConvertOptions",
    "ParallelDicomSegError",
    "ScanOptions",
    "convert_cohort",
    "iterate_batches",
    "mirror_to_zarr",
    "open_dataset",
    "rasterize_contours",
    "scan_cohort",
    "verify_file",
    "warm_up",
]

_ROOMS = {
    "BatchLoader": "loader",
    "Checks": "records",
    "ConvertOptions": "records",
    "ParallelDicomSegError": "errors",
    "ScanOptions": "records",
    "convert_cohort": "convert",
    "iterate_batches": "loader",
    "mirror_to_zarr": "store",
    "open_dataset": "store",
    "rasterize_contours": "rasterize",
    "scan_cohort": "cohort",
    "verify_file": "store",
    "warm_up": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
