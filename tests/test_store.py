"""The files: read by everybody, checked by verify, never half there."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import google_crc32c
import h5py
import hdf5plugin
import numpy as np
import pydicom
import pytest
import tensorstore
import written
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.chunks import CODECS
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.deidentify import Policy
from parallel_dicomseg.errors import ConfigurationError, ConversionError, LayoutError
from parallel_dicomseg.geometry import normal_of, planes_of, stored_plane
from parallel_dicomseg.loader import BatchLoader, epoch_order, iterate_batches
from parallel_dicomseg.records import ConvertOptions, HeaderColumn, Problem, Reason, ScanOptions
from parallel_dicomseg.report.inspection import inspect_file
from parallel_dicomseg.store import Verification, mirror_to_zarr, open_dataset, verify_file
from parallel_dicomseg.store import zarr as zarr_store
from parallel_dicomseg.store.contents import contents
from parallel_dicomseg.store.table import series_index, stored_geometry, volume_columns
from parallel_dicomseg.synthetic import make_sunnybrook_cohort


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same slices in every codec: codec -> HDF5 file with a zarr mirror beside it."""
    folder = tmp_path_factory.mktemp("store")
    paths = {}
    for codec in CODECS:
        paths[codec] = folder / f"{codec}.h5"
        more = {"headers": written.headers(), "marks": written.marks()}
        written.write(paths[codec], plan=written.layout(codec=codec), **more)
        with open_dataset(paths[codec]) as dataset:
            mirror_to_zarr(dataset, folder / f"{codec}.zarr")
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


def test_marks_follow_their_slices_onto_the_grid(tmp_path):
    """Rows of the file, pixels of the stored images; none of a slice that was rejected."""
    good = np.ones(10, bool)
    good[[0, 7]] = False
    grid = np.tile([2.0, -1.0, 0.5, 0.25], (10, 1))
    written.write(tmp_path / "a.h5", good=good, grid=grid, marks=written.marks())
    written.write(tmp_path / "b.h5")

    with open_dataset(tmp_path / "a.h5") as dataset:
        assert dataset.column("slice", "marks").tolist() == [0, 0]
        assert dataset.column("name", "marks").tolist() == [
            b"nodule-reader-1",
            b"non-nodule-reader-2",
        ]
        assert dataset.column("column_row", "marks").tolist() == [[16.0, 5.0], [44.0, -8.0]]
        assert dataset.axes("marks/column_row") == ("mark", "pixel_axis")
    with open_dataset(tmp_path / "b.h5") as dataset:
        assert [len(dataset.column(name, "marks")) for name in dataset.columns("marks")] == [0] * 3
    assert verify_file(tmp_path / "a.h5").is_sound
    assert verify_file(tmp_path / "b.h5").is_sound


def test_the_mirror_has_every_column(files):
    """Tables are copied value by value, text as text."""
    group = zarr.open_group(str(files["deflate"].with_suffix(".zarr")), mode="r")
    with open_dataset(files["deflate"]) as dataset:
        for table in ("table", "series", "volumes", "headers", "marks", "rejected"):
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
        with pytest.raises(ConfigurationError, match="is no mirror"):
            mirror_to_zarr(dataset, tmp_path / "data", overwrite=True)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "precious"


def test_a_sound_file_verifies(files):
    """Nothing is found in any codec."""
    for path in files.values():
        verification = verify_file(path)
        assert (verification.slices, verification.problems) == (10, ())


def flip(path, offset, bit=0):
    """Turn one bit of a file; a second call turns it back."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def renew_checksum(path, name, row):
    """Make the table agree with a chunk that was written anew."""
    with open_dataset(path) as dataset:
        checksum = google_crc32c.value(getattr(dataset, name).encoded(row))
    with written.edited(path) as file:
        file[f"table/{name[:-1]}_crc32c"][row] = checksum


@pytest.mark.parametrize("codec", CODECS)
def test_verify_finds_every_flipped_bit_and_names_its_slice(files, tmp_path, codec):
    """Seventy-five random places in the chunks of each codec, one at a time."""
    path = shutil.copy(files[codec], tmp_path / "x.h5")
    random = np.random.default_rng(11)
    for _ in range(75):
        name, row = random.choice(["images", "masks"]), random.integers(10)
        with open_dataset(path) as dataset:
            array = getattr(dataset, name)
            offset = int(array.offsets[row] + random.integers(array.sizes[row]))
        bit = random.integers(8)
        flip(path, offset, bit)

        (problem,) = verify_file(path).problems

        assert f"/{name}[{row}]: checksum 0x" in problem
        assert "differs from the table's 0x" in problem
        flip(path, offset, bit)
    assert verify_file(path).is_sound


@pytest.mark.timeout(120)
def test_damage_anywhere_ends_in_problems_or_a_layout_error(files, tmp_path):
    """Two hundred random places of the whole file; everything is closed, nothing hangs."""
    path = shutil.copy(files["deflate"], tmp_path / "x.h5")
    random = np.random.default_rng(12)
    before = len(os.listdir("/proc/self/fd"))
    for offset in random.integers(os.path.getsize(path), size=200).tolist():
        bit = random.integers(8)
        flip(path, offset, bit)
        for look in (verify_file, inspect_file):
            with contextlib.suppress(LayoutError):
                look(path)
        flip(path, offset, bit)
    assert verify_file(path).is_sound
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [0, 7, 600, 5000, 20000])
def test_a_file_cut_short_is_refused(copy, size):
    """HDF5 knows how long the file was."""
    os.truncate(copy, size)

    with pytest.raises(LayoutError, match=r"copy.h5 is no readable HDF5 file"):
        verify_file(copy)


@pytest.mark.parametrize(
    ("column", "row", "value", "expected"),
    [
        ("area", 2, 5, ["/table/area_mm2[2] is", "/table/area[2] is [5, 5], the pixels give"]),
        ("components", 3, 99, ["/table/components[3] is [99, 99], the pixels give"]),
        ("outside", 4, 7, ["/table/outside[4] is [7], the pixels give [0]"]),
        ("intensity", 4, 0.5, ["/table/intensity[4] is [0.5, 0.5, 0.5, 0.5], the pixels give"]),
        ("area_mm2", 5, 1.5, ["/table/area_mm2[5] is [1.5, 1.5], the table gives"]),
        ("annotated", 6, False, ["/table/annotated[6] is False, the table gives True"]),
        (
            "series_index",
            0,
            1,
            [
                "/table/series_index[0] is 1, /series gives 0",
                "/volumes/series_index[0] is 0, the table gives 1",
            ],
        ),
        (
            "patient_id",
            0,
            b"nobody",
            [
                "/series/patient_id[0] is not that of slice 0",
                "/volumes/patient_id[0] is b'patient-1', the table gives b'nobody'",
            ],
        ),
        ("volume", 4, 1, ["/table/volume[4] is 1, /volumes gives 0"]),
        ("split", 4, b"test", ["/table/split has patient-1 in 2 parts"]),
        ("split", 0, b"tests", ["has b'tests', which is no part", "patient-1 in 2 parts"]),
        (
            "outlined",
            3,
            False,
            ["/table/outlined[3] is [False, False], the table gives [True, True]"],
        ),
        (
            "structure_annotated",
            3,
            [False, True],
            ["/table/structure_annotated[3] is [False, True], the table gives [True, True]"],
        ),
        (
            "image_position_patient",
            6,
            7.0,
            ["/volumes/slice_distance[1] is 2.5, the table gives 7.0"],
        ),
        ("image_crc32c", 7, 1, ["differs from the table's 0x00000001"]),
        ("mask_crc32c", 8, 1, ["/masks[8]: checksum 0x"]),
    ],
)
def test_verify_finds_a_table_that_lies(copy, column, row, value, expected):
    """What can be measured or computed again is, and the slice is named."""
    with written.edited(copy) as file:
        file[f"table/{column}"][row] = value

    problems = [text for text in verify_file(copy).problems if "/table/flags" not in text]

    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


@pytest.mark.parametrize(
    ("bits", "contradicted"),
    [
        (1 << 0, "mask-too-large"),
        (1 << 1, "empty-mask"),
        (1 << 2, "several-components"),
        (1 << 3, "not-an-ellipse"),
        (1 << 4, "inner-not-inside-outer"),
        (1 << 5 | 1 << 6, None),
        (1 << 7, "cut-by-crop"),
        (1 << 9, "bit 9"),
        (1 << 15, "bit 15"),
    ],
)
def test_verify_computes_flags_again(copy, bits, contradicted):
    """All but two, which need more than the file holds."""
    with written.edited(copy) as file:
        assert not file["table/flags"][3]
        file["table/flags"][3] = bits

    problems = verify_file(copy).problems

    if contradicted is None:
        assert problems == ()
    else:
        said = f"/table/flags[3] is {bits:#x}, the table contradicts {contradicted}"
        assert problems == (said,)


def test_verify_misses_no_flag_that_its_thresholds_ask_for(copy):
    """With a smaller allowed fraction the large masks should carry a flag."""
    with written.edited(copy) as file:
        file.attrs["check_max_mask_fraction"] = 0.01
        large = np.flatnonzero((file["table/area"][:] > 0.01 * 40 * 56).any(axis=1))
        gap = file["table/flags"][:]

    problems = verify_file(copy).problems

    assert len(large)
    assert problems == tuple(
        f"/table/flags[{row}] is {gap[row]:#x}, the table contradicts mask-too-large"
        for row in large
    )


def test_verify_finds_a_mask_that_was_moved(copy):
    """Area and components stay as they are; the checksum does not."""
    with written.edited(copy) as file:
        file["masks"][3] = np.roll(file["masks"][3], 1, axis=0)

    (problem,) = verify_file(copy).problems

    assert "/masks[3]: checksum 0x" in problem


def test_verify_measures_pixels_whose_checksum_is_right(copy):
    """A chunk that was written anew together with its checksum."""
    with written.edited(copy) as file:
        file["masks"][2, 0, 0] |= 1
        file["images"][5, 0, 0] += 1
    renew_checksum(copy, "masks", 2)
    renew_checksum(copy, "images", 5)

    problems = verify_file(copy).problems

    assert [text.split(" is ")[0] for text in problems] == [
        "/table/area[2]",
        "/table/components[2]",
        "/table/outside[2]",
        "/table/intensity[5]",
    ]


def test_verify_does_without_checksums(copy):
    """A bit flipped in a chunk is found by the decoder, and only there."""
    with written.edited(copy) as file:
        del file["table/image_crc32c"], file["table/mask_crc32c"]
    assert verify_file(copy).is_sound
    with open_dataset(copy) as dataset:
        flip(copy, int(dataset.masks.offsets[3] + dataset.masks.sizes[3] // 2))

    (problem,) = verify_file(copy).problems

    assert "/masks[3]: the chunk" in problem


def test_a_frame_that_claims_an_absurd_size_is_a_problem(files, tmp_path):
    """Without checksums the length in a blosc header is believed at first."""
    path = shutil.copy(files["lz4"], tmp_path / "x.h5")
    with written.edited(path) as file:
        del file["table/image_crc32c"], file["table/mask_crc32c"]
    with open_dataset(path) as dataset:
        offset = int(dataset.images.offsets[4])
    with open(path, "r+b") as file:
        file.seek(offset + 4)
        file.write(b"\xf0\xff\xff\xff")

    (problem,) = verify_file(path).problems

    assert "/images[4]: " in problem


def test_text_of_fixed_length_is_text(copy):
    """As attributes that other programs wrote may be."""
    with written.edited(copy) as file:
        file.attrs["rule"] = np.bytes_("center")
        file["masks"].attrs["structures"] = np.array(["i", "o"], "S")

    with open_dataset(copy) as dataset:
        assert dataset.attributes["rule"] == "center"
        assert dataset.structures == ("i", "o")
    assert verify_file(copy).is_sound


def test_verify_finds_missing_rows(copy):
    """A column of another length, of another type, and none at all."""
    with written.edited(copy) as file:
        table = file["table"]
        values = {name: table[name][:] for name in ("flags", "area")}
        del table["flags"], table["area"], table["components"]
        table["flags"], table["area"] = values["flags"][:-1], values["area"].astype("f4")

    problems = verify_file(copy).problems

    assert len(problems) == 3
    assert "no column 'components' in /table" in problems[0]
    assert problems[1].startswith("/table/area is float32 (10, 2)")
    assert problems[2] == "/table/flags has 9 rows, /images has 10"


def test_verify_finds_bits_that_belong_to_no_structure(files, tmp_path):
    """A mask of two structures has two bits."""
    path = shutil.copy(files["none"], tmp_path / "x.h5")
    with open_dataset(path) as dataset:
        offset = int(dataset.masks.offsets[1])
    flip(path, offset, 7)
    renew_checksum(path, "masks", 1)

    assert verify_file(path).problems == ("/masks[1] has bits beyond its structures",)


def no_series(file):
    """Take a group away."""
    del file["series"]


def shorter_rejected(file):
    """Columns of different lengths."""
    del file["rejected/reason"]
    file["rejected/reason"] = np.full(3, b"bad-contour")


def unknown_reason(file):
    """A rejection that this program knows nothing of."""
    for name, value in (("path", b"x"), ("reason", b"bad-luck"), ("detail", b"y")):
        del file[f"rejected/{name}"]
        file[f"rejected/{name}"] = np.array([value])
    del file["rejected/rejection"]
    file["rejected/rejection"] = np.array([True])


def harmless_rejection(file):
    """A rejection that is none."""
    unknown_reason(file)
    file["rejected/reason"][0] = b"bad-luck"
    del file["rejected/reason"]
    file["rejected/reason"] = np.array([b"stray-file"])


def real_view(file):
    """A copy in the place of a view."""
    values = file["input"][:]
    del file["input"]
    file["input"] = values


def swapped_views(file):
    """Masks where images are expected."""
    file.move("input", "x")
    file.move("output", "input")
    file.move("x", "output")


def other_shape(file):
    """The wrong way to see a slice."""
    file["output"].attrs["lshape"] = [56, 40, 1]


def gap_in_volumes(file):
    """A slice that belongs to no volume."""
    file["volumes/first_slice"][1] += 1


def even_volume(file):
    """A gap that is in the table alone."""
    file["volumes/regular"][2] = True


def no_volumes(file):
    """Take a column away."""
    del file["volumes/regular"]


def no_json(file):
    """A header that nobody can read."""
    file["series/header"][1] = b"EchoTime 2.5"


def mark_off_the_file(file):
    """A mark on a slice that is not there, and one on none."""
    file["marks/slice"][:] = [1, 10, -1]


def mark_without_place(file):
    """A position that is no number."""
    file["marks/column_row"][2] = [np.nan, 1.0]


def marks_too_short(file):
    """A mark without a name."""
    names = file["marks/name"][:2]
    del file["marks/name"]
    file["marks/name"] = names


def no_marks(file):
    """The group is always there, empty where there is no mark."""
    del file["marks"]


def short_header(file):
    """A value for each slice but one."""
    values = file["headers/SliceLocation"][:]
    del file["headers/SliceLocation"]
    file["headers/SliceLocation"] = values[:-1]


def gap_in_series(file):
    """A slice that belongs to no series."""
    file["series/first_slice"][1] += 1


def series_too_long(file):
    """More slices than there are."""
    file["series/slices"][1] += 1


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_series, ["/series cannot be read"]),
        (gap_in_volumes, ["/volumes does not cover slices 0 to 9 in order"]),
        (even_volume, ["/volumes/regular[2] is True, the table gives False"]),
        (no_volumes, ["no column 'regular' in /volumes"]),
        (no_json, ["/series/header[1] cannot be read"]),
        (short_header, ["/headers/SliceLocation is |S3 (9,), it should be text (10,)"]),
        (gap_in_series, ["/series does not cover slices 0 to 9 in order"]),
        (series_too_long, ["/series does not cover slices 0 to 9 in order"]),
        (
            mark_off_the_file,
            [
                "/marks/slice[1] is 10, /images has 10",
                "/marks/slice[2] is -1, /images has 10",
            ],
        ),
        (mark_without_place, ["/marks/column_row[2] is not finite"]),
        (marks_too_short, ["/marks/name is |S19 (2,), it should be of kind 'S' (3,)"]),
        (no_marks, ["/marks cannot be read"]),
        (shorter_rejected, ["/rejected has columns of different lengths: "]),
        (unknown_reason, ["/rejected cannot be read: 'bad-luck' is not a valid Reason"]),
        (harmless_rejection, ["/rejected/rejection[0] is True, the reason is stray-file"]),
        (real_view, ["/input cannot be read: it is no virtual view"]),
        (swapped_views, ["/input is (10, 2240) of /masks", "/output is (10, 2240) of /images"]),
        (other_shape, ["/output is (10, 2240) of /masks with lshape [56, 40, 1]"]),
    ],
)
def test_verify_looks_at_what_stands_beside_the_table(copy, damage, expected):
    """Series, volumes, headers, marks, rejections and views."""
    with written.edited(copy) as file:
        damage(file)

    problems = verify_file(copy).problems

    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


ATTRIBUTES = (b"standard_deviation", b"sunnybrook", b"i inside o")


@pytest.mark.parametrize("text", [*ATTRIBUTES, b"This is a netCDF dimension but not a netCDF"])
def test_verify_finds_flipped_bits_in_attributes(copy, text):
    """HDF5 has no checksum of texts; another letter in a structure's name would be another name."""
    places = [m.start() for m in re.finditer(re.escape(text), Path(copy).read_bytes())]
    assert places
    for offset in places:
        flip(copy, offset)
        problems = verify_file(copy).problems
        assert len(problems) == 1
        said = re.fullmatch(r".*copy.h5: (.*): bytes (\d+) to (\d+) have .*", problems[0])
        assert int(said[2]) <= offset < int(said[3])
        assert said[1] == "names, attributes and indices" or said[1].startswith("/")
        for look in (open_dataset, inspect_file, BatchLoader):
            with pytest.raises(LayoutError, match=r"copy.h5.*it is damaged: .*: bytes \d+ to \d+"):
                look(copy)
        flip(copy, offset)
    assert verify_file(copy).is_sound


@pytest.mark.parametrize("text", ATTRIBUTES)
def test_files_of_version_2_are_read_and_verified_as_they_were(copy, text):
    """They have a checksum of some attributes, and no seal, which is said."""
    written.outdated(copy)
    with BatchLoader(copy, 4) as batches:
        assert len(next(iter(batches)).image) == 4
    verification = verify_file(copy)
    assert verification.is_sound
    assert "format version 2" in verification.notes[0]

    flip(copy, Path(copy).read_bytes().index(text))

    if text == b"i inside o":
        with pytest.raises(LayoutError, match="attributes of /masks cannot be read"):
            verify_file(copy)
    else:
        assert "attributes_crc32c of / is" in verify_file(copy).problems[0]


def test_a_damaged_column_is_named_by_everybody(copy):
    """Whoever reads the file learns which column it is."""
    with h5py.File(copy) as file:
        chunk = file["table/area"].id.get_chunk_info(0)
    flip(copy, chunk.byte_offset + chunk.size // 2)

    (problem,) = verify_file(copy).problems

    assert "copy.h5: /table/area: bytes" in problem
    for look in (inspect_file, open_dataset, BatchLoader):
        with pytest.raises(LayoutError, match=r"copy.h5.*it is damaged: /table/area: bytes"):
            look(copy)


def test_a_file_that_another_program_changed_is_told(copy):
    """HDF5 drops the seal; the digests still name what was changed, added and removed."""
    with h5py.File(copy, "r+") as file:
        file["table/split"][0] = b"test"
        file.attrs["rule"] = "coverage"
        file["images"].dims[1].label = "line"
        file["note"] = np.arange(3)
        del file["marks/name"]

    with open_dataset(copy) as dataset:
        assert dataset.attributes["rule"] == "coverage"
    problems = verify_file(copy).problems

    words = "its contents have another digest than contents says"
    for expected in (
        f"{copy}: it has no seal: another program wrote to it, or cut it",
        f"/: {words}",
        f"/images: {words}",
        f"/table/split: {words}",
        f"/marks: {words}",
        "/marks/name is missing",
        "/note was not in the file when it was written",
    ):
        assert expected in problems
    assert f"/table/area: {words}" not in problems
    with pytest.raises(LayoutError, match=r"copy.h5 has no seal"):
        verify_file(copy, checksums_only=True)


def test_checksums_alone_find_what_is_damaged(copy):
    """A slice, a column and the seal itself; nothing is decoded."""
    assert verify_file(copy, checksums_only=True) == Verification(str(copy), 10, ())
    with open_dataset(copy) as dataset:
        flip(copy, int(dataset.masks.offsets[7]))
    (problem,) = verify_file(copy, checksums_only=True).problems
    assert "copy.h5: /masks[7]: checksum 0x" in problem
    with h5py.File(copy) as file:
        flip(copy, file["table/area"].id.get_chunk_info(0).byte_offset)
    column, chunk = verify_file(copy).problems
    assert "/table/area: bytes" in column
    assert chunk == problem
    flip(copy, os.path.getsize(copy) - 10)
    (problem,) = verify_file(copy, checksums_only=True).problems
    assert problem.endswith("copy.h5: the seal at its end is damaged")


def test_the_content_digest_does_not_depend_on_where_hdf5_puts_things(copy):
    """A column that had to move; the seal would differ, the contents do not."""
    name = "table/sop_instance_uid"
    with h5py.File(copy, "r+") as file:
        before, place = contents(file), file[name].id.get_chunk_info(0).byte_offset
        values = file[name][:]
        file[name][:] = np.frombuffer(np.random.default_rng(1).bytes(values.nbytes), values.dtype)
        assert contents(file)[f"/{name}"] != before[f"/{name}"]
    # what is free is forgotten when the file is closed
    with h5py.File(copy, "r+") as file:
        file[name][:] = values
    with h5py.File(copy) as file:
        assert file[name].id.get_chunk_info(0).byte_offset != place
        assert contents(file) == before


@pytest.mark.parametrize(
    ("path", "attribute", "value", "words"),
    [
        ("masks", None, None, "/masks cannot be read"),
        ("/", "rule", None, "the attribute 'rule' of / is missing"),
        ("/", "contour_origin", "left", "the attribute 'contour_origin' of / is 'left'"),
        ("/", "check_max_mask_fraction", None, "'check_max_mask_fraction' of / is missing"),
        ("/", "source", 3, "the attribute 'source' of / is 3"),
        ("/", "pseudonyms", None, "the attribute 'pseudonyms' of / is missing"),
        ("/", "pad_value", [1, 2], "the attribute 'pad_value' of / is [1, 2]"),
        ("/", "codec", "lzma", "has codec 'lzma'"),
        ("masks", "structures", None, "attributes of /masks cannot be read: structures"),
        ("masks", "structures", list("abcdefghi"), "9 structures in masks of type uint8"),
        ("masks", "nested", ["a inside b"], "attributes of /masks cannot be read"),
        ("masks", "nested", ["i in o"], "attributes of /masks cannot be read"),
    ],
)
def test_a_file_with_parts_missing_is_refused_and_closed(copy, path, attribute, value, words):
    """The sentence names the part; no descriptor stays open."""
    with written.edited(copy) as file:
        if attribute is None:
            del file[path]
        elif value is None:
            del file[path].attrs[attribute]
        else:
            file[path].attrs[attribute] = value
    before = len(os.listdir("/proc/self/fd"))

    for look in (open_dataset, verify_file, inspect_file):
        with pytest.raises(LayoutError, match=f"copy.h5.*{re.escape(words)}"):
            look(copy)

    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_text_is_refused_before_anybody_prints_it(copy):
    """Bytes that are no UTF-8 in the name of the source."""
    with open(copy, "rb") as file:
        offset = file.read().index(b"sunnybrook")
    flip(copy, offset, 7)
    written.sealed(copy)

    with pytest.raises(LayoutError, match=r"copy.h5: attributes of / cannot be read: 'utf-8'"):
        open_dataset(copy)


def test_arrays_in_other_pieces_are_refused(copy):
    """One chunk per slice, or our reader cannot find them."""
    with written.edited(copy) as file:
        del file["images"]
        file.create_dataset("images", (10, 40, 56), "i2", chunks=(2, 40, 56))

    with pytest.raises(LayoutError, match=r"/images cannot be read: .* not one per slice"):
        open_dataset(copy)


def test_missing_chunks_and_other_shapes_are_found(copy):
    """An array that ends early, and one whose last slices were never written."""
    with written.edited(copy) as file:
        attributes = dict(file["masks"].attrs.items())
        del file["masks"]
        masks = file.create_dataset(
            "masks", (10, 40, 56), "u1", chunks=(1, 40, 56), maxshape=(None, 40, 56)
        )
        for name in ("structures", "nested", "encoding", "long_name"):
            masks.attrs[name] = attributes[name]

    problems = verify_file(copy).problems

    assert [f"/masks[{row}] is missing" in text for row, text in enumerate(problems)] == [True] * 10
    with written.edited(copy) as file:
        file["masks"].resize(8, axis=0)
    assert verify_file(copy).problems[-1] == "/masks is (8, 40, 56), /images is (10, 40, 56)"


def test_a_cohort_without_any_outline_is_a_file_like_others(tmp_path):
    """No structures: columns of width 0, empty masks; it opens, verifies and can be described."""
    path = tmp_path / "x.h5"
    plan = written.layout(structures=(), nested=())
    written.write(path, plan=plan, masks=np.zeros((10, 40, 56), np.uint8))

    with open_dataset(path) as dataset:
        assert (len(dataset), dataset.structures) == (10, ())
        assert not dataset.masks[0].any()
        assert dataset.column("area").shape == (10, 0)
        mirror_to_zarr(dataset, tmp_path / "x.zarr")
    assert verify_file(path).problems == ()
    assert inspect_file(path).structures == ()


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
        ("later.h5", "has format version 99, this program reads 2 and 3"),
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
    np.testing.assert_array_equal(order, epoch_order(10, 3, 1))
    assert sorted(order) == list(range(10))
    assert order.tolist() != epoch_order(10, 3, 2).tolist()
    for batch in batches:
        np.testing.assert_array_equal(batch.image, images[batch.index])
        np.testing.assert_array_equal(batch.mask, masks[batch.index])


def test_batches_of_one_part_of_the_split(files):
    """Only its slices are served; for a part that is not there the error lists those that are."""
    with open_dataset(files["deflate"]) as dataset:
        rows = [b.index.tolist() for b in iterate_batches(dataset, 2, split="test", seed=1)]
        with pytest.raises(ConfigurationError, match="no part 'validation', there are test, train"):
            next(iterate_batches(dataset, 2, split="validation"))
    assert sorted(row for batch in rows for row in batch) == list(range(5, 10))


# --- colour, grids, volumes, headers -------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_colour_images_have_a_last_axis_in_every_reader(codec, tmp_path):
    """Our reader, h5py, the flat view, zarr and TensorStore give the same red, green and blue."""
    images, masks = written.pictures(samples=3)
    path = tmp_path / "x.h5"
    written.write(path, plan=written.layout(samples=3, codec=codec))

    assert verify_file(path).problems == ()
    with open_dataset(path) as dataset:
        assert (dataset.shape, dataset.samples) == ((10, 40, 56), 3)
        np.testing.assert_array_equal(np.stack([dataset.images[k] for k in range(10)]), images)
        assert dataset.axes("images") == ("slice", "row", "column", "sample")
        (batch,) = iterate_batches(dataset, 10)
        np.testing.assert_array_equal(batch.image, images[batch.index])
        np.testing.assert_array_equal(batch.mask, masks[batch.index])
        mirror_to_zarr(dataset, tmp_path / "x.zarr")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["images"][:], images)
        np.testing.assert_array_equal(file["input"][:].reshape(images.shape), images)
        np.testing.assert_array_equal(file["output"][:].reshape(masks.shape), masks)
        assert file["input"].attrs["lshape"].tolist() == [40, 56, 3]
        assert file["output"].attrs["lshape"].tolist() == [40, 56, 1]
    with xarray.open_dataset(path, engine="h5netcdf") as opened:
        assert opened["images"].dims == ("slice", "row", "column", "sample")
        assert opened["input"].dims == ("slice", "value")
    group = zarr.open_group(str(tmp_path / "x.zarr"), mode="r")
    np.testing.assert_array_equal(group["images"][:], images)
    assert group["images"].metadata.dimension_names == ("slice", "row", "column", "sample")
    store = {"driver": "file", "path": str(tmp_path / "x.zarr" / "images")}
    array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
    np.testing.assert_array_equal(array.read().result(), images)


def test_the_layout_is_said_in_the_attributes(tmp_path):
    """How images were placed and masks were made, and what decoded the images."""
    plan = written.layout(
        resampled=True, partial_overlap="union", invert_monochrome1=True, pad_value=-1000.0
    )
    decoders = {"1.2.840.10008.1.2.5": "imagecodecs 1", "1.2.840.10008.1.2.4.50": "pylibjpeg 2"}
    listed = [" ".join(pair) for pair in decoders.items()]
    written.write(tmp_path / "x.h5", plan=plan, provenance={"decoders": listed})
    written.write(tmp_path / "y.h5")

    with open_dataset(tmp_path / "x.h5") as dataset:
        said = dataset.attributes
        assert (said["resampled"], said["partial_overlap"]) == (True, "union")
        assert (said["invert_monochrome1"], said["pad_value"]) == (True, -1000.0)
        assert dataset.decoders == decoders
    with open_dataset(tmp_path / "y.h5") as dataset:
        assert dataset.attributes["pad_value"] == "minimum"
        assert dataset.decoders == {}


def test_how_a_file_was_made_is_said(tmp_path):
    """What an option did, how outlines were paired and what files call a structure are there."""
    make_sunnybrook_cohort(tmp_path / "data", patients=1, slices=2, rows=40, columns=48, seed=1)
    cohort = scan_cohort(tmp_path / "data", options=ScanOptions(structures=("inner=i",)))
    options = ConvertOptions(size=(32, 32), fit="structure")
    convert_cohort(cohort, tmp_path / "x.h5", options=options)

    with open_dataset(tmp_path / "x.h5") as dataset:
        said = dataset.attributes
    assert said["grid"] == ["spacing []", "size [32, 32]", 'fit "structure"', 'color "luminance"']
    assert said["found_by"] == [f"{how} {count}" for how, count in cohort.found_by.items()] != []
    assert said["spelled"] == ["inner: i"]
    assert "decoders" not in said


def test_looking_is_not_drawing(tmp_path):
    """A structure that was looked for is annotated; it is outlined only where it is drawn."""
    _, masks = written.pictures()
    masks[3] = 0
    masks[4] &= 1
    looked = np.where(np.arange(10) < 5, np.uint64(0b10), np.uint64(0))
    path = tmp_path / "x.h5"
    summary = written.write(path, table=written.slices(annotated=looked), masks=masks)

    assert verify_file(path).problems == ()
    assert summary.annotated == (9, 8)
    with open_dataset(path) as dataset:
        np.testing.assert_array_equal(
            dataset.column("structure_annotated")[3:6], [[False, True], [True, True], [True, True]]
        )
        np.testing.assert_array_equal(
            dataset.column("outlined")[3:6], [[False, False], [True, False], [True, True]]
        )
    found = {s.name: (s.annotated, s.outlined) for s in inspect_file(path).structures}
    assert found == {"i": (9, 9), "o": (10, 8)}


def test_cropped_pixels_are_counted_and_flagged(tmp_path):
    """The flag comes from the worker; verify knows that the count explains it."""
    path = tmp_path / "x.h5"
    summary = written.write(path, cropped=3)

    assert summary.flagged["cut-by-crop"] == 10
    assert verify_file(path).problems == ()
    assert inspect_file(path).cropped_pixels == 60
    with written.edited(path) as file:
        file["table/cropped"][2] = 0
    assert verify_file(path).problems == (
        "/table/flags[2] is 0x80, the table contradicts cut-by-crop",
    )


numbers = st.floats(-500, 500)
grids = st.tuples(
    st.sampled_from([0.0, -3.5, 12.25]), numbers, st.floats(0.1, 8), st.floats(0.1, 8)
)


@given(
    st.lists(
        st.tuples(grids, st.tuples(numbers, numbers, numbers), st.floats(0, 6.3), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_stored_geometry_is_that_of_each_plane_alone(cases):
    """All slices at once equal `geometry.stored_plane` one by one; a whole image keeps its own."""
    n = len(cases)
    angle = np.array([case[2] for case in cases])
    cosine, sine, none = np.cos(angle), np.sin(angle), np.zeros(n)
    table = written.slices(
        n,
        image_position_patient=np.array([case[1] for case in cases]),
        image_orientation_patient=np.stack([cosine, sine, none, -sine, cosine, none], axis=1),
        pixel_spacing=np.tile([1.5, 0.7], (n, 1)),
    )
    grid = np.array([(0.0, 0.0, 1.0, 1.0) if case[3] else case[0] for case in cases])

    position, spacing = stored_geometry(table, grid)

    for k, plane in enumerate(planes_of(table)):
        expected = plane if cases[k][3] else stored_plane(plane, grid[k])
        np.testing.assert_allclose(position[k], expected[:3], rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(spacing[k], expected[9:], rtol=1e-12)


def test_an_image_stored_as_it_is_keeps_what_is_known():
    """A position without a spacing stays; once the grid moves, it is unknown."""
    table = written.slices(2, pixel_spacing=np.full((2, 2), np.nan))

    position, _ = stored_geometry(table, np.array([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]))

    assert np.isfinite(position[0]).all()
    assert np.isnan(position[1]).all()


def test_the_grid_is_in_the_table_and_verifies(tmp_path):
    """Where each stored image lies on its source, whose size and spacing are kept too."""
    grid = np.tile([4.0, -2.0, 2.0, 1.6], (10, 1))
    path = tmp_path / "x.h5"
    table = written.slices(rows=np.full(10, 80), columns=np.full(10, 90))
    written.write(path, table=table, grid=grid, plan=written.layout(resampled=True))

    assert verify_file(path).problems == ()
    with open_dataset(path) as dataset:
        assert dataset.column("pixel_spacing")[0].tolist() == [3.0, 2.0]
        assert dataset.column("source_pixel_spacing")[0].tolist() == [1.5, 1.25]
        assert dataset.column("image_position_patient")[0].tolist() == [-12.5, 26.0, 0.0]
        assert (dataset.column("source_rows")[0], dataset.column("source_columns")[0]) == (80, 90)
        assert dataset.column("grid_origin")[0].tolist() == [4.0, -2.0]
        assert dataset.column("grid_step")[0].tolist() == [2.0, 1.6]
        assert dataset.column("area_mm2")[0, 0] == dataset.column("area")[0, 0] * 6.0


def test_a_series_is_a_run_of_one_patient_and_uid():
    """A UID copied into another patient is another series; without one, each folder is."""
    paths = np.array([b"a/1", b"a/2", b"b/1", b"b/2", b"c/1", b"c/2"])
    table = written.slices(
        6,
        path=paths,
        patient_id=np.array([b"p", b"p", b"q", b"q", b"q", b"q"]),
        study_instance_uid=np.array([b"1", b"2", b"1", b"2", b"2", b"2"]),
        series_instance_uid=np.array([b"s", b"s", b"s", b"", b"", b""]),
    )

    assert series_index(table).tolist() == [0, 0, 1, 2, 3, 3]


volumes_of_heights = st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=5).map(
    lambda steps: [np.cumsum([0, *some]) / 4 for some in steps]
)


@given(volumes_of_heights, st.floats(0, 6.3))
def test_volumes_follow_from_the_table(heights, angle):
    """First slices, counts and median distances equal a loop over the volumes."""
    cosine, sine = np.cos(angle), np.sin(angle)
    orientation = np.array([cosine, sine, 0, 0, 0, -1.0])
    n = sum(map(len, heights))
    table = {
        "volume": np.repeat(np.arange(len(heights), dtype=np.int32), list(map(len, heights))),
        "series_index": np.zeros(n, np.int32),
        "patient_id": np.full(n, b"patient-1"),
        "image_position_patient": np.concatenate(heights)[:, None] * normal_of(orientation),
        "image_orientation_patient": np.tile(orientation, (n, 1)),
        "flags": np.zeros(n, np.uint16),
    }

    found = volume_columns(table)

    first = 0
    for k, height in enumerate(heights):
        steps = np.sort(np.diff(height))
        assert (found["first_slice"][k], found["slices"][k]) == (first, len(height))
        expected = steps[(len(steps) - 1) // 2] if len(steps) else np.nan
        np.testing.assert_allclose(found["slice_distance"][k], expected, atol=1e-9)
        first += len(height)
    assert found["regular"].all()


def test_a_rejected_slice_leaves_its_volume_whole(tmp_path):
    """Volumes and series are counted anew over what is in the file, and the hole is flagged."""
    good = np.arange(10) != 2
    problems = (Problem("DOE_folder/2.dcm", Reason.UNDECODABLE_PIXELS, "the decoder refused it"),)
    path = tmp_path / "x.h5"
    summary = written.write(path, good=good, problems=problems, headers=written.headers())

    assert verify_file(path).problems == ()
    assert (summary.slices, summary.rejected, summary.flagged) == (9, 1, {"gap-before-slice": 2})
    with open_dataset(path) as dataset:
        assert dataset.column("volume").tolist() == [0] * 4 + [1] * 2 + [2] * 3
        assert dataset.column("regular", "volumes").tolist() == [False, True, False]
        assert dataset.header(2)["SliceLocation"] == 3.5
        assert dataset.rejected == list(problems)


def test_volume_numbers_of_the_cohort_need_not_be_those_of_the_file(tmp_path):
    """A whole volume that could not be read leaves no number out."""
    good = (np.arange(10) < 5) | (np.arange(10) > 6)
    written.write(tmp_path / "x.h5", good=good)

    with open_dataset(tmp_path / "x.h5") as dataset:
        assert dataset.column("volume").tolist() == [0] * 5 + [1] * 3
        assert dataset.column("series_index").tolist() == [0] * 5 + [1] * 3
        assert dataset.column("slices", "volumes").tolist() == [5, 3]


def test_headers_are_dicom_json_and_what_varies_is_a_column(files):
    """Pydicom reads what a series has in common; each slice has its own of the rest."""
    with open_dataset(files["deflate"]) as dataset:
        assert dataset.columns("headers") == ("SliceLocation",)
        assert dataset.column("SliceLocation", "headers")[:2].tolist() == [b"0.5", b"1.5"]
        model = pydicom.Dataset.from_json(dataset.column("header", "series")[1].decode())
        assert model.EchoTime == 2.5
        assert list(model.ImageType) == ["ORIGINAL", "PRIMARY"]
        assert "EchoTime" not in dataset.series_header(0)
        assert dataset.series_header(1)["EchoTime"] == 2.5
        header = dataset.header(-1)
        assert (header["SliceLocation"], header["EchoTime"]) == (9.5, 2.5)
        assert header["ImageType"] == ["ORIGINAL", "PRIMARY"]
        with pytest.raises(IndexError, match="out of range"):
            dataset.header(10)


texts_of_numbers = st.sampled_from([b"", b"1", b"2.5", b"-3e2", b"1\\2", b"1\\\\3"])


@given(st.lists(st.tuples(st.integers(0, 2), texts_of_numbers), min_size=1, max_size=12))
def test_headers_come_back_slice_by_slice(cases):
    """Constant or not: `header` gives each slice the value that its image has."""
    cases = sorted(cases, key=lambda case: case[0])
    n = len(cases)
    series = np.array([b"1.%d" % case[0] for case in cases])
    values, code = np.unique(np.array([case[1] for case in cases]), return_inverse=True)
    columns = {"WindowCenter": HeaderColumn(values, code.astype(np.int32))}
    table = written.slices(
        n,
        patient_id=np.full(n, b"p"),
        study_instance_uid=np.full(n, b"1"),
        series_instance_uid=series,
        volume=np.zeros(n, np.int32),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        written.write(path, table=table, headers=columns)
        with open_dataset(path) as dataset:
            for row, (_, text) in enumerate(cases):
                parts = [float(part) if part else None for part in text.decode().split("\\")]
                found = dataset.header(row).get("WindowCenter")
                shown = [None if v == "" else v for v in found] if type(found) is list else [found]
                assert shown == parts


def test_rows_of_long_text_are_stored_in_small_chunks(tmp_path):
    """A full header may have kilobytes; one is read without all others."""
    columns = {
        "ImageType": HeaderColumn(
            np.array([b"\\".join([b"A" * 16] * 2000)]), np.zeros(10, np.int32)
        )
    }
    written.write(tmp_path / "x.h5", headers=columns)

    with h5py.File(tmp_path / "x.h5") as file:
        header = file["series/header"]
        assert header.chunks[0] * header.dtype.itemsize <= 1 << 20
    with open_dataset(tmp_path / "x.h5") as dataset:
        assert dataset.header(0)["ImageType"] == ["A" * 16] * 2000


def test_nothing_converted_is_an_error_that_says_why(tmp_path):
    """The first reason is named, by its path or, if asked for, by the hash of it."""
    problems = (Problem("DOE_folder/0.dcm", Reason.PIXEL_DATA_SHORT, "it has 3 of 8 bytes"),)
    bad = {"good": np.zeros(10, bool), "problems": problems}

    with pytest.raises(ConversionError, match=r"none of 10 .* DOE_folder/0.dcm: it has 3"):
        written.write(tmp_path / "x.h5", **bad)
    with pytest.raises(ConversionError, match=r"none of 10 .* path-[a-z2-7]{12}.dcm: it has 3"):
        written.write(tmp_path / "x.h5", **bad, identity=Policy(hash_paths=True))
    assert list(tmp_path.iterdir()) == []
