"""The files: HDF5 (written once, by one writer, read by everybody) and its zarr mirror."""

from parallel_dicomseg.store.dataset import ChunkedArray, Dataset, open_dataset
from parallel_dicomseg.store.earlier import Comparison, Earlier, sources_key
from parallel_dicomseg.store.hdf5 import FORMAT, FORMAT_VERSION
from parallel_dicomseg.store.headers import keyword_from_user
from parallel_dicomseg.store.journal import Sources, differences
from parallel_dicomseg.store.lock import check_unlocked
from parallel_dicomseg.store.verify import Verification, verify_file
from parallel_dicomseg.store.writer import Hdf5Writer, find_leftover, settle
from parallel_dicomseg.store.zarr import check_mirror, mirror_to_zarr

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "ChunkedArray",
    "Comparison",
    "Dataset",
    "Earlier",
    "Hdf5Writer",
    "Sources",
    "Verification",
    "check_mirror",
    "check_unlocked",
    "differences",
    "find_leftover",
    "keyword_from_user",
    "mirror_to_zarr",
    "open_dataset",
    "settle",
    "sources_key",
    "verify_file",
]
