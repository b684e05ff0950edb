"""Chunk bytes against the slow twin, HDF5's own filters and what HDF5 itself would write."""

import io

import google_crc32c
import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parallel_dicomseg import codec as codec_module
from parallel_dicomseg.chunks import CODECS, decode
from parallel_dicomseg.codec import (
    DEFLATE_LEVEL,
    checksums,
    checksums_of_file,
    encode,
    encode_one_by_one,
    filters,
    mirror_codec,
)
from parallel_dicomseg.compressors import (
    HAS_BLOSC,
    HAS_ISAL,
    room_for,
    shuffle_bytes,
    unshuffle_row,
)

DTYPES = ("|u1", "<i2", "<u2", "<u4", "<f4", "<u8")

images = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays(dtype, st.tuples(*[st.integers(1, 9)] * 3))
)


def smooth(dtype):
    """Two slices that look like something and compress."""
    rows, columns = np.mgrid[:32, :48]
    return np.stack([rows * columns, rows + columns]).astype(dtype)


def split(encoded):
    """Chunks that lie one after another, as byte strings."""
    flat, sizes = encoded
    assert sizes.sum() == len(flat)
    return [part.tobytes() for part in np.split(flat, np.cumsum(sizes)[:-1])]


@given(images, st.sampled_from(CODECS))
def test_chunks_decode_to_what_was_encoded(array, codec):
    """Every codec gives back every bit, NaNs among them."""
    out = np.empty_like(array[0])

    for plain, chunk in zip(array, split(encode(array, codec)), strict=True):
        decode(chunk, codec, out)

        assert out.tobytes() == plain.tobytes()


@given(arrays(st.sampled_from(["<u2", "<u4", "<u8"]), st.integers(1, 40)))
def test_shuffle_groups_bytes_by_their_place(elements):
    """The kernel equals a transpose of the bytes, and can be undone."""
    out = np.empty(elements.nbytes, np.uint8)

    shuffle_bytes(elements, out)

    assert out.tobytes() == elements.view(np.uint8).reshape(len(elements), -1).T.tobytes()
    undone = np.empty_like(elements)
    unshuffle_row(out, undone)
    assert undone.tolist() == elements.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_hdf5_decodes_the_chunks_with_its_own_filters(codec, dtype):
    """A chunk written raw into a dataset with these filters reads back through plain h5py."""
    assert hdf5plugin  # registers blosc
    array = smooth(dtype)
    with h5py.File(io.BytesIO(), "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 32, 48))
        for stage in filters(codec, array.itemsize, array[0].nbytes):
            properties.set_filter(stage.number, h5py.h5z.FLAG_OPTIONAL, stage.values)
        space = h5py.h5s.create_simple(array.shape)
        kind = h5py.h5t.py_create(array.dtype)
        dataset = h5py.h5d.create(file.id, b"x", kind, space, properties)
        for row, chunk in enumerate(split(encode(array, codec))):
            dataset.write_direct_chunk((row, 0, 0), chunk)

        np.testing.assert_array_equal(file["x"][:], array)


@pytest.mark.parametrize(("codec", "level"), [("lz4", 5), ("zstd", 1)])
def test_blosc_chunks_are_what_hdf5_would_have_written(codec, level):
    """Byte for byte the output of the HDF5 filter plugin, and the same client data."""
    array = smooth("<i2")
    shuffle = {"lz4": hdf5plugin.Blosc.SHUFFLE, "zstd": hdf5plugin.Blosc.BITSHUFFLE}[codec]
    blosc = hdf5plugin.Blosc(cname=codec, clevel=level, shuffle=shuffle)
    with h5py.File(io.BytesIO(), "w") as file:
        dataset = file.create_dataset("x", data=array, chunks=(1, 32, 48), **blosc)
        _, written = dataset.id.read_direct_chunk((0, 0, 0))
        number, _, values, _ = dataset.id.get_create_plist().get_filter(0)

    assert split(encode(array, codec))[0] == written
    (stage,) = filters(codec, 2, array[0].nbytes)
    assert (number, values) == (stage.number, stage.values)


def noise(dtype):
    """Bytes that no compressor makes smaller."""
    return np.frombuffer(np.random.default_rng(0).bytes(80_000), dtype).reshape(4, 50, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["deflate", "lz4", "zstd"])
def test_kernels_encode_as_the_packages_do(codec, dtype):
    """Compiled calls of the C functions give the very bytes of isal and numcodecs."""
    assert HAS_ISAL
    assert HAS_BLOSC
    array = np.concatenate([smooth(dtype), smooth(dtype)[:, ::-1] // 3])
    rows = array.reshape(4, -1).view(f"<u{array.itemsize}")
    keep = np.array([True, False, True, True])

    chunks = split(encode(array, codec, keep))

    assert chunks == split(encode_one_by_one(rows, codec, keep))
    assert [bool(chunk) for chunk in chunks] == keep.tolist()


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4"])
@pytest.mark.parametrize("codec", CODECS)
def test_noise_fits_the_room_and_comes_back(codec, dtype):
    """What cannot be compressed grows a little, never beyond what was set aside."""
    array = noise(dtype)
    flat, sizes = encode(array, codec)
    assert len(flat) <= room_for(4, array[0].nbytes)
    out = np.empty_like(array[0])
    for plain, chunk in zip(array, split((flat, sizes)), strict=True):
        decode(chunk, codec, out)
        assert out.tobytes() == plain.tobytes()


@given(images, st.sampled_from(CODECS), st.data())
def test_chunks_that_are_not_kept_have_no_bytes(array, codec, data):
    """Sizes are 0 there; the others are as if alone."""
    keep = data.draw(arrays(bool, len(array)))

    chunks = split(encode(array, codec, keep))

    alone = split(encode(array, codec))
    assert chunks == [
        chunk if kept else b"" for chunk, kept in zip(alone, keep.tolist(), strict=True)
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_broken_chunks_are_errors_that_say_so(codec):
    """Garbage, and a chunk of another size, never come back as pixels."""
    array = smooth("<i2")
    (small,) = split(encode(np.ascontiguousarray(array[:1, :8]), codec))

    with pytest.raises(ValueError, match="the chunk"):
        decode(small, codec, np.empty_like(array[0]))
    with pytest.raises(ValueError, match="the chunk"):
        decode(b"\x07garbage that is no stream", codec, np.empty_like(array[0]))


def test_mirror_shares_bytes_where_zarr_has_the_codec():
    """Only deflate, whose byte shuffle is no core codec of zarr v3, is encoded again."""
    assert {codec: mirror_codec(codec) for codec in CODECS} == {
        "deflate": "lz4",
        "lz4": "lz4",
        "zstd": "zstd",
        "none": "none",
    }


@pytest.mark.parametrize("codec", CODECS)
def test_room_that_is_used_again_changes_nothing(codec):
    """Chunks encoded into borrowed memory are copied out of it, so the next use harms none."""
    array = smooth("<i2")
    room = np.empty(room_for(2, array[0].nbytes), np.uint8)

    first = encode(array, codec, None, room)
    encode(array[::-1].copy(), codec, None, room)

    assert split(first) == split(encode(array, codec))


def test_deflate_level_is_the_one_in_the_filter():
    """What the file says about its deflate level is the level that was used."""
    assert filters("deflate", 2, 4)[1].values == (DEFLATE_LEVEL,)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_checksums_are_crc32c(tmp_path_factory, pieces):
    """In memory and on disk, equal to Google's library; the check value of RFC 3720 as well."""
    flat = np.frombuffer(b"".join(pieces), np.uint8).copy()
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    expected = [google_crc32c.value(piece) for piece in pieces]
    path = tmp_path_factory.mktemp("crc") / "flat"
    path.write_bytes(b"x" + flat.tobytes())

    with path.open("rb") as file:
        on_disk = checksums_of_file(file.fileno(), 1 + np.cumsum(sizes) - sizes, sizes)

    assert checksums(flat, sizes).tolist() == on_disk.tolist() == expected
    assert checksums(np.frombuffer(b"123456789", np.uint8).copy(), np.array([9]))[0] == 0xE3069283


def test_checksums_without_compiled_code_are_the_same(monkeypatch, tmp_path):
    """Where the kernels cannot be called, Google's library gives the same numbers."""
    flat = np.arange(50, dtype=np.uint8)
    sizes = np.array([20, 0, 30])
    (tmp_path / "flat").write_bytes(flat.tobytes())
    fast = checksums(flat, sizes)
    monkeypatch.setattr(codec_module, "HAS_CRC32C", False)

    with (tmp_path / "flat").open("rb") as file:
        on_disk = checksums_of_file(file.fileno(), np.array([0, 20, 20]), sizes)

    assert checksums(flat, sizes).tolist() == on_disk.tolist() == fast.tolist()
