"""The files: read by everybody, checked by verify, never half there."""

import os
import shutil

import h5py
import hdf5plugin
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from parallel_dicomseg import (
    ConvertOptions,
    ScanOptions,
    convert_cohort,
    iterate_batches,
    mirror_to_zarr,
    open_dataset,
    scan_cohort,
    verify_file,
)
from parallel_dicomseg.codec import CODECS
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.loader import sample_order
from parallel_dicomseg.store import zarr as zarr_store
from parallel_dicomseg.synthetic import make_sunnybrook_cohort


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same cohort in every codec: codec -> HDF5 file with a zarr mirror beside it."""
    folder = tmp_path_factory.mktemp("store")
    make_sunnybrook_cohort(folder / "cohort", patients=2, slices=5, rows=40, columns=56)
    cohort = scan_cohort(folder / "cohort", options=ScanOptions(include_unannotated=True))
    paths = {}
    for codec in CODECS:
        paths[codec] = folder / f"{codec}.h5"
        mirror = str(folder / f"{codec}.zarr")
        options = ConvertOptions(codec=codec, zarr=mirror, workers=1)
        convert_cohort(cohort, paths[codec], options=options)
    return paths


@pytest.fixture
def copy(files, tmp_path):
    """A deflate file that a test may damage."""
    return shutil.copy(files["deflate"], tmp_path / "copy.h5")


def pixels(path):
    """All images and masks by our own reader."""
    with open_dataset(path) as dataset:
        rows = range(len(dataset))
        return np.stack([dataset.images[k] for k in rows]), np.stack(
            [dataset.masks[k] for k in rows]
        )


@pytest.mark.parametrize("codec", CODECS)
def test_our_reader_and_h5py_see_the_same(files, codec):
    """Reading by pread and own decoder equals HDF5's own filters."""
    assert hdf5plugin
    images, masks = pixels(files[codec])
    with h5py.File(files[codec]) as file:
        np.testing.assert_array_equal(file["images"][:], images)
        np.testing.assert_array_equal(file["masks"][:], masks)
        np.testing.assert_array_equal(file["input"][:].reshape(images.shape), images)
        np.testing.assert_array_equal(file["output"][:].reshape(masks.shape), masks)
    np.testing.assert_array_equal(images, pixels(files["none"])[0])


@pytest.mark.parametrize("codec", CODECS)
def test_the_mirror_opens_in_zarr_and_tensorstore(files, codec):
    """Both read every value; names, attributes and axes are those of the HDF5 file."""
    images, masks = pixels(files[codec])
    directory = files[codec].with_suffix(".zarr")

    group = zarr.open_group(str(directory), mode="r")

    np.testing.assert_array_equal(group["images"][:], images)
    np.testing.assert_array_equal(group["masks"][:], masks)
    assert group["images"].metadata.dimension_names == ("slice", "row", "column")
    assert group["masks"].attrs["structures"] == ["i", "o"]
    for name, expected in (("images", images), ("masks", masks)):
        store = {"driver": "file", "path": str(directory / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        np.testing.assert_array_equal(array.read().result(), expected)


def test_the_mirror_has_every_column(files):
    """Tables are copied value by value, text as text."""
    group = zarr.open_group(str(files["deflate"].with_suffix(".zarr")), mode="r")
    with open_dataset(files["deflate"]) as dataset:
        for table in ("table", "series", "rejected"):
            assert set(group[table]) == set(dataset.columns(table))
            for name in dataset.columns(table):
                values = dataset.column(name, table)
                mirrored = group[table][name][...]
                if values.dtype.kind == "S":
                    assert mirrored.tolist() == values.astype(str).tolist()
                else:
                    np.testing.assert_array_equal(mirrored, values)


def test_xarray_opens_both(files):
    """Named dimensions, no invented ones, in the HDF5 file and in the mirror."""
    images, _ = pixels(files["deflate"])
    with xarray.open_dataset(files["deflate"], engine="h5netcdf") as dataset:
        assert dataset["images"].dims == ("slice", "row", "column")
        assert dataset["input"].dims == ("slice", "pixel")
        np.testing.assert_array_equal(dataset["images"].values, images)
    with xarray.open_dataset(files["deflate"], engine="h5netcdf", group="table") as table:
        assert table["area"].dims == ("slice", "structure")
        assert table["patient_id"].dtype.kind in "SO"
    mirror = files["deflate"].with_suffix(".zarr")
    with xarray.open_zarr(mirror, consolidated=False) as dataset:
        assert dataset["images"].dims == ("slice", "row", "column")
        np.testing.assert_array_equal(dataset["images"].values, images)


def test_shards_may_be_many_and_partly_filled(files, tmp_path, monkeypatch):
    """Ten slices in shards of four: the last index has empty places."""
    monkeypatch.setattr(zarr_store, "SLICES_PER_SHARD", 4)
    with open_dataset(files["deflate"]) as dataset:
        mirror_to_zarr(dataset, tmp_path / "x.zarr")

    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="r")
    np.testing.assert_array_equal(group["images"][:], pixels(files["deflate"])[0])
    assert len(list((tmp_path / "x.zarr" / "images" / "c").iterdir())) == 3


def test_a_mirror_never_replaces_what_is_no_mirror(files, tmp_path):
    """An existing group only with overwrite, any other directory never."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious")
    with open_dataset(files["deflate"]) as dataset:
        mirror_to_zarr(dataset, tmp_path / "x.zarr")
        with pytest.raises(ConfigurationError, match=r"x.zarr exists"):
            mirror_to_zarr(dataset, tmp_path / "x.zarr")
        mirror_to_zarr(dataset, tmp_path / "x.zarr", overwrite=True)
        with pytest.raises(ConfigurationError, match="is no zarr group"):
            mirror_to_zarr(dataset, tmp_path / "data", overwrite=True)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "precious"


def test_a_sound_file_verifies(files):
    """Nothing is found in any codec."""
    for path in files.values():
        verification = verify_file(path)
        assert (verification.slices, verification.problems) == (10, ())


def flip(path, offset):
    """Turn one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["images", "masks"])
def test_verify_names_the_slice_whose_bytes_are_wrong(copy, name):
    """A bit flipped in the middle of a chunk is found, and only there."""
    with open_dataset(copy) as dataset:
        array = getattr(dataset, name)
        offset = int(array.offsets[3] + array.sizes[3] // 2)
    flip(copy, offset)

    (problem,) = verify_file(copy).problems

    assert f"/{name}[3]" in problem


def test_verify_finds_a_table_that_lies(copy):
    """Area and intensity are measured again."""
    with h5py.File(copy, "r+") as file:
        file["table/area"][2, 0] += 1
        file["table/intensity"][4, 2] += 0.5

    problems = verify_file(copy).problems

    assert len(problems) == 2
    assert "/table/area[2] is" in problems[0]
    assert "/table/intensity[4] is" in problems[1]


def test_verify_finds_missing_rows_and_chunks(copy):
    """A column of another length, and a file cut short."""
    with h5py.File(copy, "r+") as file:
        values = file["table/flags"][:-1]
        del file["table/flags"]
        file["table/flags"] = values

    assert verify_file(copy).problems == ("/table/flags has 9 rows, /images has 10",)


def test_verify_finds_bits_that_belong_to_no_structure(files, tmp_path):
    """A mask of two structures has two bits."""
    path = shutil.copy(files["none"], tmp_path / "x.h5")
    with open_dataset(path) as dataset:
        offset = int(dataset.masks.offsets[1])
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\x80")

    assert verify_file(path).problems == ("/masks[1] has bits beyond its structures",)


def test_files_that_are_not_ours_are_refused_with_their_name(tmp_path):
    """Missing, no HDF5, somebody else's HDF5, a later version."""
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["input"] = np.zeros((2, 4))
    with h5py.File(tmp_path / "later.h5", "w") as file:
        file.attrs["format"], file.attrs["format_version"] = "parallel_dicomseg", 99

    for name, words in (
        ("gone.h5", "no such file"),
        ("text.h5", "no readable HDF5 file"),
        ("other.h5", "was not made by parallel_dicomseg"),
        ("later.h5", "has format version 99, this program reads 1"),
    ):
        with pytest.raises(LayoutError, match=f"{name}.*{words}"):
            open_dataset(tmp_path / name)


def test_unknown_columns_are_an_error_that_lists_the_known(files):
    """So that a misspelt name is found at once."""
    with (
        open_dataset(files["deflate"]) as dataset,
        pytest.raises(LayoutError, match=r"no column 'aera' in /table, there are .*area"),
    ):
        dataset.column("aera")


def test_a_closed_dataset_can_be_closed_again(files):
    """And leaves no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    dataset = open_dataset(files["deflate"])
    dataset.close()
    dataset.close()

    assert len(os.listdir("/proc/self/fd")) == before


def test_slices_can_be_counted_from_the_end(files):
    """As in any sequence; beyond the end is an IndexError."""
    with open_dataset(files["deflate"]) as dataset:
        np.testing.assert_array_equal(dataset.images[-1], dataset.images[9])
        with pytest.raises(IndexError, match="out of range"):
            dataset.images[10]


def test_batches_serve_every_slice_once_in_the_order_of_the_seed(files):
    """Images and masks belong together, and the order is a function of seed and epoch."""
    images, masks = pixels(files["deflate"])
    with open_dataset(files["deflate"]) as dataset:
        batches = list(iterate_batches(dataset, 4, seed=3, epoch=1))
        with pytest.raises(ConfigurationError, match="batch_size is 0"):
            next(iterate_batches(dataset, 0))
    assert [len(batch.index) for batch in batches] == [4, 4, 2]
    order = np.concatenate([batch.index for batch in batches])
    np.testing.assert_array_equal(order, sample_order(10, 3, 1))
    assert sorted(order) == list(range(10))
    assert order.tolist() != sample_order(10, 3, 2).tolist()
    for batch in batches:
        np.testing.assert_array_equal(batch.image, images[batch.index])
        np.testing.assert_array_equal(batch.mask, masks[batch.index])
