"""The seal behind HDF5's end, and the digest of the contents, as docs/format.md describes them."""

import hashlib
import json
import os
import struct

import google_crc32c
import h5py
import numpy as np
import pytest
import written
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import seal
from parallel_dicomseg.errors import LayoutError, VerificationError
from parallel_dicomseg.store import open_dataset, verify_file
from parallel_dicomseg.store.sealing import end_of_hdf5, seal_file

MAGIC = b"\x89PDSEAL\n"


@pytest.fixture
def file(tmp_path):
    """A finished file."""
    path = tmp_path / "a.h5"
    written.write(path, headers=written.headers(), marks=written.marks())
    return path


def by_hand(data):
    """The seal of a file's bytes, byte by byte: [(start, size, crc32c, owner's name, number)]."""
    assert data[-8:] == MAGIC
    count, name_bytes = struct.unpack("<QQ", data[-28:-12])
    start = len(data) - 28 - name_bytes - 16 * count
    assert struct.unpack("<I", data[-12:-8]) == (google_crc32c.value(data[start:-12]),)
    names = data[-28 - name_bytes : -28].decode().split("\0")
    extents, at = [], 0
    for k in range(count):
        size, crc32c, owner, number = struct.unpack_from("<IIII", data, start + 16 * k)
        extents.append((at, size, crc32c, names[owner], number))
        at += size
    assert at == start
    return extents


def test_the_seal_covers_every_byte_as_documented(file):
    """Read by hand: no gap, every checksum right, every chunk where HDF5 says that it is."""
    data = file.read_bytes()

    extents = by_hand(data)

    for start, size, crc32c, _, _ in extents:
        assert google_crc32c.value(data[start : start + size]) == crc32c
    places = {(name, number): (start, size) for start, size, _, name, number in extents}
    with open_dataset(file) as dataset:
        for array in (dataset.images, dataset.masks):
            for row in range(10):
                assert places[array.name, row] == (array.offsets[row], array.sizes[row])
    with h5py.File(file) as opened:
        chunk = opened["table/area"].id.get_chunk_info(0)
    assert (chunk.byte_offset, chunk.size) in [
        place for (name, _), place in places.items() if name == "/table/area"
    ]
    assert max(size for _, size, _, name, _ in extents if name == seal.STRUCTURE) <= 4096
    assert extents[-1][0] + extents[-1][1] == end_of_hdf5(data[:44])


def test_sealing_again_replaces_the_seal(file):
    """A run that was interrupted while it sealed does it again, over half a seal as well."""
    data = file.read_bytes()
    for left in (data, data[:-5], data + b"rubbish"):
        file.write_bytes(left)
        written.sealed(file)
        assert file.read_bytes() == data


def test_objects_that_share_bytes_are_not_sealed(file):
    """HDF5 would have told nonsense of its own file; it gets no name."""
    with open_dataset(file) as dataset:
        offsets, sizes = (
            np.stack([getattr(array, name) for array in (dataset.images, dataset.masks)])
            for name in ("offsets", "sizes")
        )
    offsets[1, 3] = offsets[0, 3] + 1
    with pytest.raises(VerificationError, match=r"a.h5: two objects share bytes"):
        seal_file(file, offsets, sizes, np.zeros((2, 10), np.uint32))
    file.write_bytes(b"no HDF5" * 20)
    with pytest.raises(VerificationError, match=r"a.h5: it does not start as a file of this"):
        seal_file(file, offsets, sizes, np.zeros((2, 10), np.uint32))


@given(
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 40)), min_size=1, max_size=8),
    st.integers(0, 6000),
    st.permutations(range(8)),
)
def test_what_lies_between_is_cut_into_pieces(steps, tail, order):
    """Compared with a map of whose every byte is."""
    starts = np.cumsum([gap + size for gap, size in steps]) - [size for _, size in steps]
    extents = np.zeros(len(steps), seal.EXTENT)
    extents["size"] = [size for _, size in steps]
    extents["owner"] = np.arange(len(steps)) % 2
    extents["number"] = np.arange(len(steps))
    end = int(starts[-1]) + steps[-1][1] + tail
    owners = np.full(end, 7)
    for start, extent in zip(starts, extents, strict=True):
        owners[start : start + extent["size"]] = extent["owner"]
    mixed = np.array([k for k in order if k < len(steps)])

    covering = seal.covering(end, starts[mixed], extents[mixed], 7)

    assert np.repeat(covering["owner"], covering["size"]).tolist() == owners.tolist()
    assert (covering["size"] > 0).all()
    assert (covering["size"][covering["owner"] == 7] <= 4096).all()
    own = covering[covering["owner"] != 7]
    assert own["number"].tolist() == list(range(len(steps)))


def test_extents_beyond_the_end_or_over_each_other_are_refused():
    """Neither can be the truth."""
    extents = np.zeros(2, seal.EXTENT)
    extents["size"] = 10
    for offsets, end in (([0, 9], 100), ([0, 95], 100)):
        with pytest.raises(ValueError, match="share bytes, or lie beyond the end"):
            seal.covering(end, np.array(offsets), extents, 2)


def forged(data, count, names, body=b""):
    """A file with a seal whose own checksum is right."""
    told = body + names + struct.pack("<QQ", count, len(names))
    return data + told + struct.pack("<I", google_crc32c.value(told)) + MAGIC


@pytest.mark.parametrize(
    ("count", "names", "body", "words"),
    [
        (2**63, b"a", b"", "longer than the file"),
        (0, b"", b"", "does not fit"),
        (1, b"a", struct.pack("<IIII", 7, 0, 0, 0), "does not fit"),
        (1, b"a", struct.pack("<IIII", 0, 0, 5, 0), "does not fit"),
        (1, b"\xff", struct.pack("<IIII", 0, 0, 0, 0), "can't decode"),
    ],
)
def test_forged_seals_are_refused(file, count, names, body, words):
    """A seal is data from elsewhere like any other."""
    file.write_bytes(forged(file.read_bytes(), count, names, body))

    with pytest.raises(LayoutError, match=f"a.h5 cannot be read: .*{words}"):
        open_dataset(file)
    (problem,) = verify_file(file).problems
    assert words in problem


def test_a_file_that_ends_in_its_seal_is_told(file):
    """The pixels and tables are whole; that the end is missing is said all the same."""
    os.truncate(file, file.stat().st_size - 100)

    (problem,) = verify_file(file).problems

    assert "it has no seal: another program wrote to it, or cut it" in problem


def test_the_digest_of_a_column_is_that_of_the_documentation(file):
    """Put together by hand."""
    with h5py.File(file) as opened:
        listed = dict(text.split(" ") for text in opened.attrs["contents"])
        values = opened["table/area_mm2"][:]
        total = opened.attrs["content_sha256"]

    said = {
        "attributes": {"units": "mm2"},
        "axes": [["slice", ["/slice"]], ["structure", ["/structure"]]],
        "chunks": [10, 2],
        "fill": "0000000000000000",
        "filters": [[2, [8]], [1, [1]]],
        "layout": 2,
        "shape": [[10, 2], [10, 2]],
        "shows": [],
        "type": ["<f8", ""],
    }
    text = json.dumps(said, sort_keys=True).encode()
    assert listed["/table/area_mm2"] == hashlib.sha256(text + values.tobytes()).hexdigest()
    whole = json.dumps(listed, sort_keys=True).encode()
    assert total == hashlib.sha256(whole).hexdigest()


def test_equal_input_has_equal_contents_whatever_the_path(file, tmp_path):
    """Nothing of the place or the time is in the digest; another pixel is."""
    written.write(tmp_path / "b.h5", headers=written.headers(), marks=written.marks())
    images, _ = written.pictures()
    images[3, 0, 0] += 1
    written.write(
        tmp_path / "c.h5", images=images, headers=written.headers(), marks=written.marks()
    )

    digests = []
    for path in (file, tmp_path / "b.h5", tmp_path / "c.h5"):
        with open_dataset(path) as dataset:
            digests.append(dataset.attributes["content_sha256"])

    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
