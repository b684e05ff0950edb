"""What reads slices: with kernels and without, our files, mirrors and those of others."""

import os
import shutil
import tempfile
import zlib

import h5py
import numpy as np
import pytest
import written
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import chunks, codec, compressors
from parallel_dicomseg.chunks import decode
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.loader import kernels_read, opening, readers, windows
from parallel_dicomseg.loader.opening import open_source
from parallel_dicomseg.loader.readers import Clock, Scratch
from parallel_dicomseg.store import hdf5, mirror_to_zarr, open_dataset

CODECS = ("deflate", "lz4", "zstd", "none")
IMAGES, MASKS = written.pictures()


@pytest.fixture(params=["kernels", "plain"])
def way(request, monkeypatch):
    """Both ways to read: numba's kernels, and the packages' own functions."""
    if request.param == "plain":
        monkeypatch.setattr(readers, "_kernels", lambda: None)
    return request.param


def both(source, rows):
    """Images and masks of some rows."""
    rows = np.array(rows)
    found = []
    for array in (source.images, source.masks):
        out = np.empty((len(rows), *array.shape[1:]), array.dtype)
        array.read(rows, out, Scratch(), Clock())
        found.append(out)
    return found


@pytest.mark.parametrize("codec_name", CODECS)
def test_slices_are_those_of_the_file(tmp_path, codec_name, way):
    """Any rows, in any order, several times, from any codec."""
    file = tmp_path / "a.h5"
    written.write(file, plan=written.layout(codec=codec_name))
    source = open_source(file, verify=True)
    rows = [3, 9, 0, 3]
    images, masks = both(source, rows)
    source.close()

    assert (IMAGES[rows] == images).all()
    assert (MASKS[rows] == masks).all()
    assert (source.structures, source.nested) == (("i", "o"), ((0, 1),))


@pytest.mark.parametrize("codec_name", CODECS)
def test_mirrors_are_read_like_files(tmp_path, codec_name, way):
    """A zarr mirror gives the same slices, structures and columns."""
    written.write(tmp_path / "a.h5", plan=written.layout(codec=codec_name))
    with open_dataset(tmp_path / "a.h5") as dataset:
        mirror_to_zarr(dataset, tmp_path / "a.zarr")
    source, original = open_source(tmp_path / "a.zarr"), open_source(tmp_path / "a.h5")
    rows = [9, 1, 4]
    images, masks = both(source, rows)

    assert (IMAGES[rows] == images).all()
    assert (MASKS[rows] == masks).all()
    assert (original.structures, original.nested) == (source.structures, source.nested)
    assert set(original.columns) == set(source.columns)
    for name in ("patient_id", "area", "volume"):
        assert original.column(name).tolist() == source.column(name).tolist()
    source.close()
    original.close()


def test_mirror_has_no_checksums(tmp_path):
    """A mirror's chunks may be others than those that the table's checksums are of."""
    written.write(tmp_path / "a.h5")
    with open_dataset(tmp_path / "a.h5") as dataset:
        mirror_to_zarr(dataset, tmp_path / "a.zarr")
    with pytest.raises(ConfigurationError, match="without checksums"):
        open_source(tmp_path / "a.zarr", verify=True)


def test_damaged_mirror_is_refused(tmp_path):
    """An index of a shard whose checksum is wrong is not believed."""
    written.write(tmp_path / "a.h5")
    with open_dataset(tmp_path / "a.h5") as dataset:
        mirror_to_zarr(dataset, tmp_path / "a.zarr")
    shard = tmp_path / "a.zarr" / "images" / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    with pytest.raises(LayoutError, match=r"index of .* is damaged"):
        open_source(tmp_path / "a.zarr")


@pytest.mark.parametrize("flat", [True, False])
def test_files_of_others_are_read_through_h5py(tmp_path, flat):
    """The original script's rows of pixels with lshape, or pictures; masks are 0 and 1."""
    file = tmp_path / "other.h5"
    rows, columns = IMAGES.shape[1:]
    with h5py.File(file, "w") as h5:
        shape = (10, rows * columns) if flat else (10, rows, columns)
        h5["input"] = IMAGES.reshape(shape)
        h5["output"] = (MASKS > 0).reshape(shape) * 255
        for name in ("input", "output") if flat else ():
            h5[name].attrs["lshape"] = (rows, columns, 1)
    source = open_source(file)
    images, masks = both(source, [7, 2])
    source.close()

    assert (IMAGES[[7, 2]] == images).all()
    assert ((MASKS[[7, 2]] > 0) == masks).all()
    assert np.uint8 == masks.dtype


def test_original_layout_of_our_file_is_read(tmp_path):
    """The virtual views of a converted file are a pair of datasets like any other."""
    written.write(tmp_path / "a.h5")
    source = open_source(tmp_path / "a.h5", "input", "output")
    images, _ = both(source, [5])
    source.close()

    assert (IMAGES[[5]] == images).all()


def test_datasets_of_others_are_named(tmp_path):
    """Names that nobody can guess are given; what is not there is said."""
    file = tmp_path / "other.h5"
    with h5py.File(file, "w") as h5:
        h5["t1"], h5["tumour"] = IMAGES.astype("f4"), MASKS.astype("i8")
    with pytest.raises(ConfigurationError, match="looked for /input and /output"):
        open_source(file)
    with pytest.raises(ConfigurationError, match="looked for /t1 and /liver"):
        open_source(file, "t1", "liver")
    source = open_source(file, "t1", "tumour")
    source.close()

    assert np.float32 == source.images.dtype


def test_nothing_and_no_hdf5_are_refused(tmp_path):
    """A missing file and a text file are said by name."""
    with pytest.raises(LayoutError, match=r"missing\.h5: no such file"):
        open_source(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(LayoutError, match=r"text\.h5: the HDF5 file cannot be read"):
        open_source(tmp_path / "text.h5")


def test_names_are_those_of_the_store():
    """What is written twice, lest numba be loaded, is the same in both places."""
    assert (hdf5.FORMAT, hdf5.READABLE_VERSIONS) == (opening.FORMAT, opening.READABLE_VERSIONS)
    assert chunks.CODECS == opening.CODECS


@pytest.mark.parametrize("codec_name", CODECS)
def test_truncated_file_is_an_error(tmp_path, codec_name, way):
    """A chunk beyond the end is named with its file, and nothing is made up."""
    file = tmp_path / "a.h5"
    written.write(file, plan=written.layout(codec=codec_name))
    source = open_source(file, verify=False)
    last = int(np.argmax(source.images.offsets))
    os.truncate(file, int(source.images.offsets[last]) + 3)
    with pytest.raises(LayoutError, match=rf"a\.h5: /images\[{last}\] ends after 3 of"):
        both(source, [last])
    source.close()


def test_changed_file_is_an_error(tmp_path, way):
    """A file that is written to after it was opened is refused, however right it looks."""
    file = tmp_path / "a.h5"
    written.write(file)
    source = open_source(file, verify=False)
    both(source, [0])
    os.utime(file, ns=(1, 1))
    with pytest.raises(LayoutError, match=r"a\.h5 has changed since it was opened"):
        both(source, [0])
    source.close()


def test_replaced_file_stays_what_it_was(tmp_path, way):
    """A file renamed over the open one is another file: the open one is read to its end."""
    file = tmp_path / "a.h5"
    written.write(file)
    source = open_source(file, verify=False)
    shutil.copy(file, tmp_path / "b.h5")
    os.replace(tmp_path / "b.h5", file)
    images, _ = both(source, [1])
    source.close()

    assert (IMAGES[[1]] == images).all()


def flipped(file, source, array, row, at):
    """The file with one byte of a chunk changed, as if it had always been so."""
    with file.open("r+b") as raw:
        raw.seek(int(getattr(source, array).offsets[row]) + at)
        byte = raw.read(1)[0]
        raw.seek(-1, 1)
        raw.write(bytes([byte ^ 0x55]))


@pytest.mark.parametrize("codec_name", CODECS)
def test_damaged_chunks_fail_their_checksum(tmp_path, codec_name, way):
    """With `verify` any changed byte is found, in images and masks."""
    file = tmp_path / "a.h5"
    written.write(file, plan=written.layout(codec=codec_name))
    source = open_source(file)
    source.close()
    flipped(file, source, "masks", 4, 20)
    source = open_source(file, verify=True)
    with pytest.raises(LayoutError, match=r"/masks\[4\]: checksum 0x[0-9a-f]{8} differs"):
        both(source, [4])
    source.close()


@pytest.mark.parametrize("at", [0, 1, 30, -2])
def test_damaged_deflate_is_found_without_checksums(tmp_path, at, way):
    """Zlib's header, codes and Adler-32 give a changed byte away."""
    file = tmp_path / "a.h5"
    written.write(file)
    source = open_source(file, verify=False)
    source.close()
    flipped(file, source, "images", 2, at if at >= 0 else int(source.images.sizes[2]) + at)
    source = open_source(file, verify=False)
    with pytest.raises(LayoutError, match=r"/images\[2\]: the chunk"):
        both(source, [1, 2])
    source.close()


@pytest.mark.parametrize("codec_name", ["lz4", "zstd"])
@pytest.mark.parametrize("at", [4, 12])
def test_blosc_frames_are_not_believed(tmp_path, codec_name, at, way):
    """A frame that claims other sizes than the index is refused before it is decoded."""
    file = tmp_path / "a.h5"
    written.write(file, plan=written.layout(codec=codec_name))
    source = open_source(file, verify=False)
    source.close()
    flipped(file, source, "images", 2, at)
    source = open_source(file, verify=False)
    with pytest.raises(LayoutError, match=r"/images\[2\]: the chunk is no blosc frame"):
        both(source, [2])
    source.close()


def test_missing_chunk_is_named(tmp_path):
    """A slice that was never written is no slice of zeros."""
    file = tmp_path / "a.h5"
    written.write(file)
    source = open_source(file, verify=False)
    source.images.sizes[3] = 0
    with pytest.raises(LayoutError, match=r"/images\[3\] is missing"):
        both(source, [3])
    source.images.sizes[3] = 1 << 40
    with pytest.raises(LayoutError, match=r"/images\[3\] has a chunk of 1099511627776 bytes"):
        both(source, [3])
    source.close()


def test_closed_source_says_so(tmp_path):
    """Reading after closing is an error, never a read from another file's descriptor."""
    written.write(tmp_path / "a.h5")
    source = open_source(tmp_path / "a.h5")
    source.close()
    with pytest.raises(LayoutError, match="the loader is closed"):
        both(source, [0])


@given(
    st.sampled_from(["<u1", "<i2", "<u2", "<f4", "<f8"]),
    st.integers(1, 70),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from(["deflate", "lz4", "zstd"]),
)
def test_kernels_and_packages_decode_alike(dtype, count, chunks, seed, name):
    """Both decoders undo the encoder for every type and size."""
    values = np.random.default_rng(seed).integers(0, 9, (chunks, 1, count)).astype(dtype)
    encoded, sizes = codec.encode(values, name)
    starts = np.cumsum(sizes) - sizes
    fast, slow = (np.empty((chunks, count), dtype) for _ in range(2))

    assert chunks == codec.decode_rows(encoded, starts, sizes, name, fast)
    for k in range(chunks):
        decode(encoded[starts[k] : starts[k] + sizes[k]], name, slow[k])
    assert (values[:, 0] == fast).all()
    assert (values[:, 0] == slow).all()


@given(st.binary(max_size=60), st.sampled_from(["deflate", "lz4", "zstd"]))
def test_any_bytes_are_decoded_or_refused_alike(content, name):
    """No bytes crash a decoder, and what one refuses the other refuses too."""
    chunk = np.frombuffer(content, np.uint8)
    fast, slow = np.empty((1, 8), np.int16), np.empty(8, np.int16)
    one = np.zeros(1, np.int64)
    decoded = codec.decode_rows(chunk, one, one + len(chunk), name, fast)
    try:
        decode(chunk, name, slow)
    except ValueError:
        assert decoded == 0
    else:
        assert decoded == 1
        assert (fast[0] == slow).all()


WAYS = {
    "ISA-L": (compressors.ISAL, compressors.HAS_INFLATE),
    "libdeflate": (compressors.LIBDEFLATE, compressors.HAS_LIBDEFLATE),
    "zlib-ng": (compressors.ZLIB_NG, compressors.HAS_ZLIB_NG),
}


@pytest.mark.parametrize("name", WAYS)
@given(st.data())
def test_every_library_undoes_deflate_or_refuses_it(name, data):
    """Whole chunks come back, damaged and shortened ones are refused as zlib refuses them."""
    way, is_there = WAYS[name]
    if not is_there:
        pytest.skip(f"{name} is not installed")
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 9, (1, 1, 40))
    values = values.astype(f"<u{itemsize}")
    chunk = codec.encode(values, "deflate")[0].copy()
    for at in data.draw(st.lists(st.integers(0, len(chunk) - 1), max_size=2)):
        chunk[at] ^= data.draw(st.integers(1, 255))
    chunk = chunk[: data.draw(st.integers(len(chunk) - 3, len(chunk)))]
    one = np.zeros(1, np.int64)
    found = np.empty((1, values.nbytes), np.uint8)
    done = compressors.decode_chunks(way, chunk, one, one + len(chunk), itemsize, found)
    try:
        plain = zlib.decompress(chunk.tobytes())
    except zlib.error:
        assert done == 0
    else:
        assert done == (len(plain) == values.nbytes)
        assert not done or (found[0].view(values.dtype) == values.ravel()).all()


@given(
    st.sampled_from(["<i2", "<u1", "<f4", "<f8"]),
    st.lists(st.floats(-40, 40, width=32), min_size=4, max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_kernels_map_as_numpy_does(dtype, numbers, is_mapped, seed):
    """Bit for bit, also nan, infinities, and windows that hold nothing."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 100, (2, 3, 7)).astype(dtype)
    if values.dtype.kind == "f":
        values.flat[:4] = np.nan, np.inf, -np.inf, -0.0
    maps = np.array([numbers, windows.UNCHANGED]) if is_mapped else np.empty((0, 4))
    expected, found = np.empty((2, 21), np.float32), np.empty((2, 21), np.float32)
    for k in range(2):
        with np.errstate(invalid="ignore"):
            mapped = maps[k] if is_mapped else None
            windows.map_into(values[k].reshape(-1), expected[k], mapped)
    with tempfile.TemporaryFile() as file:
        file.write(values.tobytes())
        file.flush()
        size = values[0].nbytes
        place = kernels_read.Place(
            np.array([0, size]), np.array([size, size]), np.empty(0, np.uint32),
            compressors.RAW, values.itemsize,
        )  # fmt: skip
        room = kernels_read.Room(np.empty(size, np.uint8), np.empty(size, np.uint8))
        stored, seconds = np.empty(21, values.dtype), np.zeros(3)
        descriptor, rows = np.array([file.fileno()]), np.arange(2)
        assert 2 == kernels_read.read_mapped(  # noqa: SIM300
            descriptor, rows, place, room, stored, maps, found, seconds
        )

    assert expected.view(np.uint32).tolist() == found.view(np.uint32).tolist()
    assert (seconds >= 0).all()
