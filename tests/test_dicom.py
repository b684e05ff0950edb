"""Headers and pixels: the fast path against pydicom, on real, pydicom's own and broken files."""

import os
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
)

from parallel_dicomseg import dicom
from parallel_dicomseg.dicom import (
    _decimal_column,
    _slow_row,
    decode_file,
    mask_bits,
    read_images,
    scan_headers,
)
from parallel_dicomseg.records import Problem, Reason, SliceRefs, SliceTable

PYDICOM_FILES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "image_dfl.dcm",
    "MR_truncated.dcm",
    "MR_small_RLE.dcm",
    "SC_rgb_small_odd.dcm",
    "JPEG-lossy.dcm",
    "rtplan.dcm",
    "liver_1frame.dcm",
)


def mr_image(**changes):
    """A 4 x 6 MR image whose pixels are 0 … 23."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Modality = "MR"
    dataset.SeriesInstanceUID = "1.2.3"
    dataset.InstanceNumber = "7"
    dataset.ImagePositionPatient = [1.5, -2.25, "1e-3"]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = ["1.367188", "2"]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = 4, 6
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.PixelData = np.arange(24, dtype="<i2").tobytes()
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def save(dataset, path, syntax=ExplicitVRLittleEndian):
    """Write a dataset in a transfer syntax."""
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def scan_one(path):
    """The table row or the problem of one file."""
    table, problems = scan_headers(path.parent, [path.name], ["patient"])
    assert len(table) + len(problems) == 1
    return problems[0] if problems else table


def assert_equals_slow_path(table, row, path):
    """Every column that pydicom fills has the same value on the fast path."""
    slow = _slow_row(path, path.name)
    assert not isinstance(slow, Problem), slow
    for field in fields(SliceTable):
        if field.name in slow and field.name not in ("pixel_offset", "pixel_length"):
            np.testing.assert_array_equal(
                getattr(table, field.name)[row], slow[field.name], err_msg=field.name
            )


def refs(table, *rows, stored_dtype="<i2"):
    """What a worker is given for some rows of a table, all of them by default."""
    rows = list(rows or range(len(table)))
    names = ("frame", "file_size", "pixel_offset", "pixel_length", "bits_stored")
    columns = {name: tuple(getattr(table, name)[rows].tolist()) for name in names}
    return SliceRefs(
        path=tuple(os.fsdecode(path) for path in table.path[rows].tolist()),
        stored_dtype=tuple(stored_dtype if at >= 0 else "" for at in columns["pixel_offset"]),
        rescale_slope=tuple(table.rescale_slope[rows].tolist()),
        rescale_intercept=tuple(table.rescale_intercept[rows].tolist()),
        **columns,
    )


def test_headers_of_the_real_cohort_equal_pydicoms(shared_data):
    """All columns of a sample of 1,140 files; all of them on the fast path."""
    root = shared_data / "sunnybrook_arterys" / "final_data"
    paths = sorted(str(path.relative_to(root)) for path in root.glob("dicoms/*/*.dcm"))

    table, problems = scan_headers(root, paths, ["patient"] * len(paths))

    assert (len(table), problems) == (1140, [])
    assert (table.pixel_offset > 0).all()
    for row in range(0, 1140, 23):
        assert_equals_slow_path(table, row, root / paths[row])


def test_pixels_of_the_real_cohort_equal_pydicoms(shared_data):
    """Every 12th image, read in one call."""
    root = shared_data / "sunnybrook_arterys" / "final_data"
    paths = sorted(str(path.relative_to(root)) for path in root.glob("dicoms/*/*.dcm"))[::12]
    table, _ = scan_headers(root, paths, ["patient"] * len(paths))
    out = np.empty((len(paths), 256, 256), "<i2")

    good, problems = read_images(str(root), refs(table), out)

    assert (good.all(), problems) == (True, [])
    for row, path in enumerate(paths):
        np.testing.assert_array_equal(out[row], decode_file(root / path))


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    ],
)
@pytest.mark.parametrize("kind", ["plain", "sequences", "large-private", "odd"])
def test_fast_and_slow_path_agree_on_generated_files(tmp_path, syntax, kind):
    """Nested sequences of both length kinds, elements beyond the window, odd values."""
    dataset = mr_image()
    if kind == "sequences":
        inner = Dataset()
        inner.ReferencedSOPInstanceUID = "9.9"
        middle = Dataset()
        middle.ReferencedImageSequence = Sequence([inner, Dataset()])
        dataset.ReferencedStudySequence = Sequence([middle, inner])
        dataset.ReferencedImageSequence = Sequence([inner])
        dataset["ReferencedStudySequence"].is_undefined_length = True
        middle["ReferencedImageSequence"].is_undefined_length = True
        inner.is_undefined_length_sequence_item = True
    elif kind == "large-private":
        dataset.add_new(0x00090010, "LO", "maker")
        dataset.add_new(0x00091001, "OB", bytes(20_000))
        dataset.add_new(0x00290010, "LO", "maker")
        dataset.add_new(0x00291001, "UN", bytes(9_000))
    elif kind == "odd":
        dataset.InstanceNumber = None
        dataset.RescaleSlope, dataset.RescaleIntercept = "-2.5", "1e2"
        dataset.ImagePositionPatient = None
        dataset.SliceThickness = ""
        dataset.NumberOfFrames = "1"
    path = save(dataset, tmp_path / "image.dcm", syntax)

    table = scan_one(path)

    assert_equals_slow_path(table, 0, path)
    native = syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    assert (table.pixel_offset[0] > 0) == native
    out = np.zeros((1, 4, 6), "<f4")
    good, problems = read_images(str(tmp_path), refs(table), out)
    assert (good.tolist(), problems) == ([True], [])
    slope, intercept = (-2.5, 100.0) if kind == "odd" else (1.0, 0.0)
    np.testing.assert_array_equal(out[0], np.arange(24).reshape(4, 6) * slope + intercept)


@pytest.mark.parametrize("name", PYDICOM_FILES)
def test_pydicoms_files_are_read_as_pydicom_reads_them_or_rejected_with_a_reason(name, tmp_path):
    """Never a crash, never other pixels."""
    path = tmp_path / name
    path.write_bytes(Path(get_testdata_file(name, download=False)).read_bytes())

    found = scan_one(path)

    if isinstance(found, Problem):
        assert found.reason in (
            Reason.UNSUPPORTED_PIXELS,
            Reason.PIXEL_DATA_SHORT,
            Reason.MISSING_TAG,
        )
        return
    assert_equals_slow_path(found, 0, path)
    shape = (1, int(found.rows[0]), int(found.columns[0]))
    dtype = {0: "<u2", 1: "<i2"}[int(found.pixel_representation[0])]
    dtype = {1: "", 8: "|u1"}.get(int(found.bits_allocated[0]), dtype)
    out = np.zeros(shape, "<f8")
    good, problems = read_images(str(tmp_path), refs(found, stored_dtype=dtype), out)
    if good[0]:
        image = pydicom.dcmread(path)
        slope = float(image.get("RescaleSlope", 1))
        expected = image.pixel_array * slope + float(image.get("RescaleIntercept", 0))
        np.testing.assert_array_equal(out[0], expected)
    else:
        assert problems[0].reason == Reason.UNDECODABLE_PIXELS


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"Rows": None}, Reason.MISSING_TAG, r"\(0028,0010\) Rows is missing"),
        ({"Columns": 0}, Reason.MISSING_TAG, r"\(0028,0011\) Columns is 0"),
        ({"PixelData": None}, Reason.MISSING_TAG, r"\(7FE0,0010\) Pixel Data is missing"),
        ({"PixelData": bytes(46)}, Reason.PIXEL_DATA_SHORT, "46 bytes, .* 4 x 6 x 16 need 48"),
        ({"Rows": 60000}, Reason.PIXEL_DATA_SHORT, "48 bytes, .* 60000 x 6 x 16 need 720000"),
        ({"NumberOfFrames": "3"}, Reason.UNSUPPORTED_PIXELS, "Number of Frames is 3"),
        ({"SamplesPerPixel": 3}, Reason.UNSUPPORTED_PIXELS, "Samples per Pixel is 3"),
        ({"BitsStored": 17}, Reason.UNSUPPORTED_PIXELS, "Stored is 17, .*Allocated 16"),
        ({"RescaleSlope": "0"}, Reason.UNSUPPORTED_PIXELS, "Rescale Slope is 0"),
        ({"RescaleSlope": "1e300"}, Reason.UNSUPPORTED_PIXELS, "Slope 1e.300, .*beyond float32"),
        ({"HighBit": 14}, Reason.UNSUPPORTED_PIXELS, "High Bit is 14, .* Bits Stored 16; 15 is"),
        ({"PixelRepresentation": 2}, Reason.UNSUPPORTED_PIXELS, "Representation is 2, .* 0 or 1"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, Reason.UNSUPPORTED_PIXELS, "neither MONO"),
        (
            {"ModalityLUTSequence": [mr_image()]},
            Reason.UNSUPPORTED_PIXELS,
            r"\(0028,3000\) Modality LUT Sequence is there",
        ),
    ],
)
def test_headers_that_rule_out_decoding_are_rejected_with_tag_and_numbers(
    tmp_path, changes, reason, words
):
    """The guards work before any pixel is allocated."""
    problem = scan_one(save(mr_image(**changes), tmp_path / "image.dcm"))

    assert isinstance(problem, Problem)
    assert (problem.path, problem.reason) == ("image.dcm", reason)
    assert re.search(words, problem.detail), problem.detail


VALUES = [b"1", b"-2.5", b"3e1", b"", b" ", b"4,5", b"6 7", b"x", b"nan"]
decimals = st.one_of(
    st.lists(st.sampled_from(VALUES), max_size=3).map(b"\\".join),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda value: repr(value).encode()[:16]),
)


@given(st.lists(decimals, min_size=1, max_size=8), st.integers(1, 2))
def test_no_malformed_value_moves_those_of_other_files(texts, count):
    """Each row is what Python's float makes of its own text: absent, `count` numbers, or NaN."""
    width = max(1, *map(len, texts))
    padded = b"".join(text.ljust(width) for text in texts)
    values = np.frombuffer(padded, np.uint8).reshape(len(texts), width).copy()
    spans = np.array([[0, len(text)] for text in texts], np.int64)

    column = _decimal_column(values, spans, count, -7.0)

    for text, row in zip(texts, column.tolist(), strict=True):
        expected = [-7.0] * count
        if text.strip(b" "):
            try:
                expected = [float(part) for part in text.decode().split("\\")]
            except ValueError:
                expected = []
            if len(expected) != count or not np.isfinite(expected).all():
                expected = [np.nan] * count
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("number", "expected"),
    [("7", 7), ("1.9", -1), ("99999999999999999999", -1), ("  ", -1), ("3 4", -1), ("-5", -5)],
)
def test_instance_numbers_are_whole_or_absent(tmp_path, monkeypatch, slow, number, expected):
    """Nothing is truncated or wrapped into a number that another image may have."""
    monkeypatch.setattr(dicom, "AVAILABLE", not slow)
    dataset = mr_image()
    dataset["InstanceNumber"] = pydicom.DataElement(0x00200013, "LO", number)
    path = save(dataset, tmp_path / "image.dcm", ImplicitVRLittleEndian)

    found = scan_one(path)

    if isinstance(found, Problem):  # pydicom itself refuses some of these
        assert slow
        assert found.reason == Reason.NOT_DICOM
    else:
        assert found.instance_number.tolist() == [expected]


@pytest.mark.parametrize("text", ["0,5", "nan", "0.5\\2", "x"])
def test_a_malformed_slope_is_never_read_as_one(tmp_path, text):
    """An absent slope is 1; one that cannot be read rejects the file."""
    dataset = mr_image()
    dataset["RescaleSlope"] = pydicom.DataElement(0x00281053, "LO", text.split("\\"))
    path = save(dataset, tmp_path / "image.dcm", ImplicitVRLittleEndian)

    problem = scan_one(path)

    assert isinstance(problem, Problem)
    assert "(0028,1053) Rescale Slope is no finite number" in problem.detail


def test_files_that_are_no_images_are_rejected_and_cost_nothing_else(tmp_path):
    """Text, an empty file, a folder, a FIFO, a missing file, and half a file among good ones."""
    good = save(mr_image(), tmp_path / "a.dcm")
    (tmp_path / "text.dcm").write_text("this is no DICOM file, it only says so " * 20)
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "folder.dcm").mkdir()
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "half.dcm").write_bytes(good.read_bytes()[:-30])
    save(mr_image(), tmp_path / "z.dcm")
    names = ["a.dcm", "text.dcm", "empty.dcm", "folder.dcm", "pipe.dcm", "gone.dcm", "half.dcm"]

    table, problems = scan_headers(tmp_path, [*names, "z.dcm"], ["p"] * 8)

    assert table.path.tolist() == [b"a.dcm", b"z.dcm"]
    assert {problem.path: problem.reason for problem in problems} == {
        "text.dcm": Reason.NOT_DICOM,
        "empty.dcm": Reason.NOT_DICOM,
        "folder.dcm": Reason.UNREADABLE_FILE,
        "pipe.dcm": Reason.UNREADABLE_FILE,
        "gone.dcm": Reason.UNREADABLE_FILE,
        "half.dcm": Reason.PIXEL_DATA_SHORT,
    }
    by_path = {problem.path: problem.detail for problem in problems}
    assert "No such file" in by_path["gone.dcm"]
    assert "holds 18 bytes" in by_path["half.dcm"]


@given(st.binary(max_size=400))
def test_arbitrary_bytes_never_crash_the_header_walk(tmp_path_factory, junk):
    """Anything after a valid start is a row or a problem, never an exception."""
    folder = tmp_path_factory.mktemp("junk")
    head = b"\0" * 128 + b"DICM" + bytes.fromhex("02001000 5549 1400") + b"1.2.840.10008.1.2.1\0"
    (folder / "x.dcm").write_bytes(head + junk)

    scan_one(folder / "x.dcm")


@given(st.integers(0, 2000), st.integers(0, 255))
def test_flipped_bytes_of_a_header_never_crash_the_walk(tmp_path_factory, place, value):
    """Mutants of a good file are read or rejected, and what is read agrees with pydicom."""
    folder = tmp_path_factory.mktemp("mutant")
    path = save(mr_image(), folder / "x.dcm")
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw)

    scan_one(path)


def test_a_file_that_changed_since_the_scan_is_rejected(tmp_path):
    """Another size than when the header was read: offsets may be wrong, so nothing is read."""
    path = save(mr_image(), tmp_path / "image.dcm")
    table = scan_one(path)
    path.write_bytes(path.read_bytes() + b"\0\0")

    good, (problem,) = read_images(str(tmp_path), refs(table), np.zeros((1, 4, 6), "<i2"))

    assert not good[0]
    assert problem.reason == Reason.FILE_CHANGED
    assert "bytes when it was scanned" in problem.detail


def test_a_file_that_vanished_is_rejected_and_its_neighbour_is_not(tmp_path):
    """The message is the system's."""
    save(mr_image(), tmp_path / "a.dcm")
    save(mr_image(), tmp_path / "b.dcm")
    table, _ = scan_headers(tmp_path, ["a.dcm", "b.dcm"], ["p", "p"])
    (tmp_path / "a.dcm").unlink()
    out = np.zeros((2, 4, 6), "<i2")

    good, (problem,) = read_images(str(tmp_path), refs(table), out)

    assert good.tolist() == [False, True]
    assert problem == Problem("a.dcm", Reason.UNREADABLE_FILE, "No such file or directory")
    np.testing.assert_array_equal(out[1], np.arange(24).reshape(4, 6))


@given(arrays("<u2", (3,)), st.integers(1, 16), st.booleans())
def test_bits_above_bits_stored_are_dropped_and_the_sign_extended(raw, bits, signed):
    """Against plain integer arithmetic, value by value (PS3.5 8.1.1)."""
    stored = raw.view("<i2") if signed else raw

    masked = mask_bits(stored, bits)

    for before, after in zip(raw.tolist(), masked.tolist(), strict=True):
        value = before % 2**bits
        assert after == (value - 2**bits if signed and value >= 2 ** (bits - 1) else value)


def test_twelve_bits_with_an_overlay_above_them(tmp_path):
    """A bit of an old overlay above Bits Stored never reaches the image."""
    raw = (np.arange(24) | 0x1000).astype("<u2")
    dataset = mr_image(BitsStored=12, HighBit=11, PixelRepresentation=0, PixelData=raw.tobytes())
    table = scan_one(save(dataset, tmp_path / "image.dcm"))
    out = np.zeros((1, 4, 6), "<i2")

    read_images(str(tmp_path), refs(table, stored_dtype="<u2"), out)

    np.testing.assert_array_equal(out[0], np.arange(24).reshape(4, 6))
