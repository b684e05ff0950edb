"""The header scan: the fast path against pydicom, on real, pydicom's own and broken files."""

import os
import re
import struct
import time
import warnings
import zlib
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.data import get_testdata_files
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    RTStructureSetStorage,
    SegmentationStorage,
)

from parallel_dicomseg.dicom import headers
from parallel_dicomseg.dicom.attributes import ALLOWED_ATTRIBUTES, DATE_ATTRIBUTES
from parallel_dicomseg.dicom.elements import (
    SLOT,
    attribute_text,
    decimal_column,
    find_distinct,
    pack,
)
from parallel_dicomseg.dicom.headers import Scanned, concatenate_headers, scan_headers
from parallel_dicomseg.records import HeaderColumn, Problem, Reason, SliceTable

SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
#: (0010,xxxx) and the like that PS3.15 Table E.1-1 lists although they are codes or numbers.
LISTED_FOR_REMOVAL = (
    *("PatientSex", "PatientSize", "PatientWeight", "PregnancyStatus", "SmokingStatus"),
    *("PatientSexNeutered", "PatientAge", "PatientState"),
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
    dataset.PatientID = "id"
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


def item(**values):
    """A data set for a sequence."""
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def enhanced_image(frames=3, **changes):
    """An enhanced MR image: spacing and thickness for all frames, the rest for each."""
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=2.5)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[0, 1, 0, 0, 0, -1])],
        MRImageFrameTypeSequence=[item(FrameType=["ORIGINAL", "PRIMARY", "M", "NONE"])],
        PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-1)],
    )
    single = [
        item(
            FrameContentSequence=[
                item(TemporalPositionIndex=frame % 2 + 1, FrameAcquisitionNumber=4)
            ],
            PlanePositionSequence=[item(ImagePositionPatient=[frame, -2.5, 0.125])],
            MREchoSequence=[item(EffectiveEchoTime=1.5 * frame)],
            PixelValueTransformationSequence=[item(RescaleSlope=frame + 3, RescaleIntercept=0)],
        )
        for frame in range(frames)
    ]
    pixels = np.arange(24 * frames, dtype="<i2").tobytes()
    groups = {
        "SOPClassUID": EnhancedMRImageStorage,
        "NumberOfFrames": str(frames),
        "ImagePositionPatient": None,
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": single,
        "PixelData": pixels,
    }
    return mr_image(**groups | changes)


def save(dataset, path, syntax=ExplicitVRLittleEndian):
    """Write a dataset in a transfer syntax."""
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian and "PixelData" in dataset:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def scan_slowly(*arguments):
    """The scan with every file through pydicom."""
    headers.AVAILABLE, before = False, headers.AVAILABLE
    try:
        return scan_headers(*arguments)
    finally:
        headers.AVAILABLE = before


def scan_one(path, scan=scan_headers):
    """The table, the problem or the ScannedFile of one file."""
    scanned = scan(path.parent, [path.name])
    found = [*scanned.problems, *scanned.files]
    assert bool(len(scanned.slices)) + len(found) == 1
    return found[0] if found else scanned.slices


def texts(column):
    """The values of a header column, row by row."""
    return column.values[column.code].tolist()


def assert_same_scan(fast: Scanned, slow: Scanned):
    """Both paths found the same."""
    assert fast.files == slow.files
    assert fast.problems == slow.problems
    assert len(fast.slices) == len(slow.slices)
    for field in fields(SliceTable):
        left, right = getattr(fast.slices, field.name), getattr(slow.slices, field.name)
        np.testing.assert_array_equal(left, right, err_msg=field.name)
        assert left.dtype == right.dtype, field.name
    assert {key: texts(column) for key, column in fast.headers.items()} == {
        key: texts(column) for key, column in slow.headers.items()
    }


# --- the obvious twin -----------------------------------------------------------------------------

GROUPS = {
    "image_position_patient": ("PlanePositionSequence", "ImagePositionPatient", 3),
    "image_orientation_patient": ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
    "pixel_spacing": ("PixelMeasuresSequence", "PixelSpacing", 2),
    "slice_thickness": ("PixelMeasuresSequence", "SliceThickness", 1),
}
TEXT = {
    "sop_instance_uid": "SOPInstanceUID",
    "series_instance_uid": "SeriesInstanceUID",
    "study_instance_uid": "StudyInstanceUID",
    "frame_of_reference_uid": "FrameOfReferenceUID",
    "modality": "Modality",
    "photometric_interpretation": "PhotometricInterpretation",
}


def frame_element(dataset, frame, macro, keyword):
    """What holds for a frame: its own, else the shared, else the image's value."""
    for name, place in (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        groups = dataset.get(name) or []
        if place < len(groups) and groups[place].get(macro):
            value = groups[place][macro][0].get(keyword)
            if value is not None:
                return value
    return dataset.get(keyword)


def assert_equals_pydicom(table, row, dataset):
    """The columns of one row against the elements of a pydicom data set."""
    frame = int(table.frame[row])
    for name, (macro, keyword, count) in GROUPS.items():
        value = frame_element(dataset, frame, macro, keyword)
        if value is None or value == "":
            value = [np.nan] * count
        expected = np.array(value, float).reshape(-1)
        np.testing.assert_array_equal(np.atleast_1d(getattr(table, name)[row]), expected)
    for name, keyword in TEXT.items():
        assert getattr(table, name)[row].decode() == str(dataset.get(keyword, "")).strip(), name
    assert table.patient_id[row].decode() == str(dataset.get("PatientID") or "").strip()
    assert (table.rows[row], table.columns[row]) == (dataset.Rows, dataset.Columns)
    assert table.number_of_frames[row] == int(dataset.get("NumberOfFrames") or 1)
    assert table.instance_number[row] == int(
        -1 if dataset.get("InstanceNumber") is None else dataset.InstanceNumber
    )


def stored_pixels(table, row, path):
    """The numbers that lie at `pixel_offset`."""
    letter = "iu"[1 - int(table.pixel_representation[row])]
    dtype = np.dtype(f"<{letter}{int(table.bits_allocated[row]) // 8}")
    shape = int(table.rows[row]), int(table.columns[row])
    count = shape[0] * shape[1]
    return np.fromfile(path, dtype, count, offset=int(table.pixel_offset[row])).reshape(shape)


def real_files(folder):
    """Files below a folder, relative, in sorted order."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_real_files_give_the_same_on_both_paths(shared_data):
    """Every file of all cohorts, whatever it is."""
    paths = real_files(shared_data)

    fast, slow = scan_headers(shared_data, paths), scan_slowly(shared_data, paths)

    assert_same_scan(fast, slow)
    assert len(fast.slices) > 1600
    assert not fast.problems


def test_pydicoms_own_files_give_the_same_on_both_paths():
    """Malformed, compressed, big endian, deflated, without preamble, truncated."""
    paths = sorted(path for path in get_testdata_files() if Path(path).is_file())
    root = os.path.commonpath(paths)
    names = [os.path.relpath(path, root) for path in paths]

    assert_same_scan(scan_headers(root, names), scan_slowly(root, names))


def test_headers_of_real_files_equal_pydicoms(shared_data):
    """A sample of every kind of cohort, frame by frame, with the pixels at the offset."""
    paths = real_files(shared_data)
    sample = paths[::41] + [path for path in paths if "sunnybrook" not in path][::5]
    sample += [path for path in paths if "multiframe" in path or "deprecated/image" in path]
    scanned = scan_headers(shared_data, sorted(set(sample)))
    table = scanned.slices
    assert len(table) > 150
    for row in range(len(table)):
        path = shared_data / os.fsdecode(table.path[row])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            assert_equals_pydicom(table, row, dataset)
            if table.pixel_offset[row] >= 0:
                frames = dataset.pixel_array.reshape(-1, *dataset.pixel_array.shape[-2:])
                spare = 8 * frames.itemsize - dataset.BitsStored
                stored = (stored_pixels(table, row, path) << spare) >> spare
                np.testing.assert_array_equal(stored, frames[table.frame[row]])


def test_the_ibsi_phantom_has_the_geometry_of_its_functional_groups(shared_data):
    """Four coronal frames whose position, spacing and orientation no top-level element has."""
    (path,) = (shared_data / "ibsi_digital_phantom" / "dicom_deprecated" / "image").iterdir()

    table = scan_one(path)

    assert table.frame.tolist() == [0, 1, 2, 3]
    assert table.image_position_patient[:, 1].tolist() == [3.0, 2.0, 1.0, 0.0]
    assert table.pixel_spacing.tolist() == [[1.0, 1.0]] * 4
    total = sum(stored_pixels(table, row, path).sum() for row in range(4))
    assert total == 173


def test_no_pixel_is_outside_of_the_range_that_the_header_gives():
    """Of every file that pydicom decodes, the rescaled pixels lie in `value_range`."""
    paths = [Path(path) for path in get_testdata_files() if Path(path).is_file()]
    checked = 0
    for path in paths:
        scanned = scan_headers(path.parent, [path.name])
        if not len(scanned.slices):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            try:
                values = dataset.pixel_array
            except Exception:  # noqa: BLE001 no decoder for it
                continue
            if dataset.SamplesPerPixel == 1 and "PALETTE" not in dataset.PhotometricInterpretation:
                values = apply_modality_lut(values, dataset)
        low, high = scanned.slices.value_range[0]
        assert low <= values.min(), path.name
        assert values.max() <= high, path.name
        if scanned.slices.value_is_whole[0]:
            assert (values == np.rint(values)).all(), path.name
        checked += 1
    assert checked > 60


# --- one row per frame ----------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("undefined", [False, True])
def test_frames_take_what_their_functional_groups_say(tmp_path, syntax, undefined):
    """Per frame goes before shared, shared before the top level; on both paths."""
    dataset = enhanced_image()
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        dataset[keyword].is_undefined_length = undefined
        for group in dataset[keyword].value:
            group.is_undefined_length_sequence_item = undefined
            for macro in group:
                macro.is_undefined_length = undefined
                macro.value[0].is_undefined_length_sequence_item = undefined
    path = save(dataset, tmp_path / "image.dcm", syntax)

    for scan in (scan_headers, scan_slowly):
        scanned = scan(tmp_path, [path.name])
        table = scanned.slices
        assert scanned.problems == []
        assert table.frame.tolist() == [0, 1, 2]
        assert table.image_position_patient.tolist() == [[k, -2.5, 0.125] for k in range(3)]
        assert table.image_orientation_patient.tolist() == [[0, 1, 0, 0, 0, -1]] * 3
        assert table.pixel_spacing.tolist() == [[0.5, 0.75]] * 3
        assert table.slice_thickness.tolist() == [2.5] * 3
        assert table.rescale_slope.tolist() == [3.0, 4.0, 5.0]
        assert table.rescale_intercept.tolist() == [0.0] * 3
        assert table.image_type.tolist() == [b"ORIGINAL\\PRIMARY\\M\\NONE"] * 3
        assert table.temporal_position.tolist() == [1.0, 2.0, 1.0]
        assert table.acquisition_number.tolist() == [4] * 3
        assert texts(scanned.headers["EffectiveEchoTime"]) == [b"0.0", b"1.5", b"3.0"]
        if syntax in NATIVE:
            for row in range(3):
                expected = np.arange(24).reshape(4, 6) + 24 * row
                np.testing.assert_array_equal(stored_pixels(table, row, path), expected)
        else:
            assert (table.pixel_offset == -1).all()


def test_frames_without_functional_groups_share_their_header(tmp_path):
    """A cine image has one row per frame, and each its own place in the file."""
    pixels = np.arange(72, dtype="<i2").tobytes()
    path = save(mr_image(NumberOfFrames="3", PixelData=pixels), tmp_path / "cine.dcm")

    table = scan_one(path)

    assert table.frame.tolist() == [0, 1, 2]
    assert table.number_of_frames.tolist() == [3] * 3
    assert np.diff(table.pixel_offset).tolist() == [48, 48]
    assert stored_pixels(table, 2, path)[0, 0] == 48


def test_frames_of_several_files_stay_in_the_order_of_the_files(tmp_path):
    """Rows of plain, enhanced and big-endian files are put back between each other."""
    save(enhanced_image(2), tmp_path / "a")
    save(mr_image(), tmp_path / "b")
    save(mr_image(InstanceNumber="9"), tmp_path / "c", ExplicitVRBigEndian)
    save(mr_image(), tmp_path / "d")
    (tmp_path / "e").write_text("no image")

    scanned = scan_headers(tmp_path, ["a", "b", "c", "d", "e"])

    assert scanned.slices.path.tolist() == [b"a", b"a", b"b", b"c", b"d"]
    assert scanned.slices.frame.tolist() == [0, 1, 0, 0, 0]
    assert scanned.slices.instance_number.tolist() == [7, 7, 7, 9, 7]
    assert texts(scanned.headers["EffectiveEchoTime"]) == [b"0.0", b"1.5", b"", b"", b""]
    assert [file.path for file in scanned.files] == ["e"]


def test_blocks_of_files_give_what_one_call_gives(tmp_path, monkeypatch):
    """The result does not depend on how many files are walked at once."""
    for number in range(7):
        save(mr_image(InstanceNumber=str(number), EchoTime=number // 2), tmp_path / f"{number}.dcm")
    (tmp_path / "3.dcm").write_bytes(b"broken")
    names = [f"{number}.dcm" for number in range(7)]
    whole = scan_headers(tmp_path, names, list("abcdefg"))

    monkeypatch.setattr(headers, "_FILES_AT_ONCE", 2)

    assert_same_scan(scan_headers(tmp_path, names, list("abcdefg")), whole)
    assert whole.slices.patient_id.tolist() == [b"a", b"b", b"c", b"e", b"f", b"g"]


# --- generated files ------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES)
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
        dataset.AcquisitionMatrix = [0, 256, 128, 0]
        dataset.RevolutionTime = 0.1
    path = save(dataset, tmp_path / "image.dcm", syntax)

    scanned = scan_headers(tmp_path, [path.name])

    assert_same_scan(scanned, scan_slowly(tmp_path, [path.name]))
    assert_equals_pydicom(scanned.slices, 0, pydicom.dcmread(path))
    assert (scanned.slices.pixel_offset[0] > 0) == (syntax in NATIVE)
    if kind == "odd":
        assert texts(scanned.headers["AcquisitionMatrix"]) == [b"0\\256\\128\\0"]
        assert texts(scanned.headers["RevolutionTime"]) == [b"0.1"]
        assert scanned.slices.value_range.tolist() == [[-81817.5, 82020.0]]
        assert not scanned.slices.value_is_whole[0]


@pytest.mark.parametrize("syntax", SYNTAXES[:3])
@pytest.mark.parametrize("meta", [False, True])
def test_files_without_a_preamble_are_read(tmp_path, syntax, meta):
    """A data set, or its file meta group, that begins at byte 0."""
    path = save(mr_image(), tmp_path / "image", syntax)
    raw = path.read_bytes()[132:]
    if not meta:
        raw = raw[12 + struct.unpack_from("<I", raw, 8)[0] :]
    path.write_bytes(raw)

    table = scan_one(path)

    assert table.transfer_syntax_uid.tolist() == [syntax.encode()]
    assert table.sop_instance_uid.tolist() == [b"1.2.3.4"]
    if syntax in NATIVE:
        np.testing.assert_array_equal(stored_pixels(table, 0, path), np.arange(24).reshape(4, 6))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "EchoTime": st.floats(0, 1e6).map(lambda value: f"{value:.6g}"),
            "AcquisitionNumber": st.integers(0, 10**6).map(str),
            "TemporalPositionIdentifier": st.integers(1, 99).map(str),
            "TriggerTime": st.floats(0, 1e4).map(lambda value: f"{value:.3f}"),
            "ScanOptions": st.lists(st.sampled_from(["PFP", "FC", "A B"]), min_size=1, max_size=3),
            "ImageIndex": st.integers(0, 65535),
            "SpiralPitchFactor": st.floats(-10, 10),
            "StudyDate": st.dates().map(lambda date: f"{date:%Y%m%d}".zfill(8)),
            "ImageComments": st.text("abc", max_size=300),
            "BitsStored": st.just(12),
            "HighBit": st.just(11),
        },
    ),
    st.sampled_from(SYNTAXES),
)
def test_any_attributes_come_out_as_pydicom_has_them(tmp_path_factory, changes, syntax):
    """Both paths against pydicom's values, in every native transfer syntax."""
    if not {"BitsStored", "HighBit"} <= set(changes):
        changes = {k: v for k, v in changes.items() if k not in ("BitsStored", "HighBit")}
    folder = tmp_path_factory.mktemp("image")
    path = save(mr_image(**changes), folder / "x.dcm", syntax)

    scanned = scan_headers(folder, [path.name])

    assert_same_scan(scanned, scan_slowly(folder, [path.name]))
    dataset = pydicom.dcmread(path)
    for keyword, column in scanned.headers.items():
        element = dataset[keyword]
        value = element.value if element.VM > 1 else [element.value]
        assert texts(column) == ["\\".join(map(str, value)).encode()], keyword
    kept = set(changes) & (set(ALLOWED_ATTRIBUTES) | set(DATE_ATTRIBUTES))
    assert kept <= set(scanned.headers)
    expected = changes.get("TemporalPositionIdentifier", changes.get("TriggerTime", np.nan))
    np.testing.assert_array_equal(scanned.slices.temporal_position, [float(expected)])


# --- what is kept ---------------------------------------------------------------------------------


def test_only_numbers_and_codes_are_kept_and_nothing_of_the_patient():
    """Tag and VR are those of the dictionary; nothing that PS3.15 E.1 removes is in the list."""
    for keyword, (tag, vr) in (ALLOWED_ATTRIBUTES | DATE_ATTRIBUTES).items():
        assert (tag_for_keyword(keyword), dictionary_VR(tag)) == (tag, vr)
        assert tag >> 16 not in (0x0010, 0x0012, 0x0032, 0x0038, 0x0040)
    vrs = {vr for _, vr in ALLOWED_ATTRIBUTES.values()}
    assert vrs <= {"DS", "IS", "CS", "US", "SS", "UL", "SL", "FL", "FD"}
    assert {vr for _, vr in DATE_ATTRIBUTES.values()} == {"DA"}
    assert not set(LISTED_FOR_REMOVAL) & set(ALLOWED_ATTRIBUTES)
    assert 80 <= len(ALLOWED_ATTRIBUTES) <= 120


@pytest.mark.parametrize(
    ("vr", "raw", "text"),
    [
        ("DS", b" 1.50 \\-2e3 ", b"1.50\\-2e3"),
        ("DS", b"Doe^John", b""),
        ("DS", b"1\\\\2", b""),
        ("IS", b"+7 ", b"+7"),
        ("IS", b"7.5", b""),
        ("CS", b"AXIAL\\A_B ", b"AXIAL\\A_B"),
        ("CS", b"a name that is far too long", b""),
        ("CS", b"M\xfcller", b""),
        ("DA", b"20040119", b"20040119"),
        ("DA", b"Doe^John", b""),
        ("US", b"\x01\0\xff\xff", b"1\\65535"),
        ("US", b"\x01\0\xff", b""),
        ("SS", b"\xff\xff", b"-1"),
        ("FL", struct.pack("<f", 0.1), b"0.1"),
        ("FD", struct.pack("<d", np.nan), b""),
    ],
)
def test_values_that_their_vr_does_not_allow_are_dropped(vr, raw, text):
    """What somebody typed into a field for a number or a code goes nowhere."""
    assert attribute_text(vr, raw) == text


@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
def test_a_long_or_wrongly_typed_attribute_is_left_out_and_costs_nothing(tmp_path, scan):
    """The file is read all the same."""
    dataset = mr_image(ScanOptions=["OPTION"] * 40, SequenceVariant="SK")
    dataset["ImageIndex"] = pydicom.DataElement(0x00541330, "LO", "12")
    dataset["RepetitionTime"] = pydicom.DataElement(0x00180080, "FD", 2.5)
    path = save(dataset, tmp_path / "image.dcm")

    scanned = scan(tmp_path, [path.name])

    assert len(scanned.slices) == 1
    assert texts(scanned.headers["SequenceVariant"]) == [b"SK"]
    assert not {"ScanOptions", "ImageIndex", "RepetitionTime"} & set(scanned.headers)


def test_a_needed_number_with_another_vr_is_read(tmp_path):
    """Rows as a decimal string: the slow path knows what it means."""
    dataset = mr_image()
    dataset["Rows"] = pydicom.DataElement(0x00280010, "IS", "4")
    dataset["SliceThickness"] = pydicom.DataElement(0x00180050, "FD", 2.5)
    path = save(dataset, tmp_path / "image.dcm")

    table = scan_one(path)

    assert (table.rows[0], table.slice_thickness[0]) == (4, 2.5)


@given(st.lists(st.tuples(st.sampled_from([b"", b"a", b"b", b"ab", b"a "]), st.booleans())))
def test_equal_values_are_found_whatever_their_order(rows):
    """Against a dictionary: the code of each row names the first row with the same bytes."""
    tag = ALLOWED_ATTRIBUTES["ScanOptions"][0]
    other = ALLOWED_ATTRIBUTES["SeriesType"][0]
    values = pack([{tag: text} | ({other: b"x"} if more else {}) for text, more in rows])

    distinct = find_distinct(values)

    def read(raw, spans):
        return np.array([raw[at : at + size].tobytes() for at, size in spans.tolist()], object)

    if rows:
        assert distinct.spread(tag, read).tolist() == [text for text, _ in rows]
        assert distinct.spread(other, read).tolist() == [b"x" if more else b"" for _, more in rows]


columns = st.lists(st.sampled_from([b"", b"1", b"2", b"10"]), min_size=1, max_size=5)


@given(st.lists(st.dictionaries(st.sampled_from(["A", "B"]), columns), min_size=1, max_size=4))
def test_headers_under_one_another_keep_every_row(parts):
    """Against lists: b'' where a part lacks the attribute, each value once and ascending."""
    counts = [max(map(len, part.values()), default=2) for part in parts]
    padded = [
        {key: (column * 5)[:count] for key, column in part.items()}
        for part, count in zip(parts, counts, strict=True)
    ]
    made = []
    for part, count in zip(padded, counts, strict=True):
        header = {}
        for key, column in part.items():
            values, code = np.unique(np.array(column, "S2"), return_inverse=True)
            header[key] = HeaderColumn(values, code.astype(np.int32))
        made.append((header, count))

    joined = concatenate_headers(made)

    for key in {key for part in parts for key in part}:
        rows = [
            text
            for part, count in zip(padded, counts, strict=True)
            for text in part.get(key, [b""] * count)
        ]
        assert texts(joined[key]) == rows
        assert joined[key].values.tolist() == sorted(set(rows))


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "samples", "low", "high", "whole"),
    [
        ({}, 1, -32768, 32767, True),
        ({"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}, 1, 0, 4095, True),
        ({"RescaleSlope": "-2", "RescaleIntercept": "5"}, 1, -65529, 65541, True),
        ({"RescaleSlope": "0.5"}, 1, -16384, 16383.5, False),
        ({"RescaleIntercept": "0.5"}, 1, -32767.5, 32767.5, False),
        (
            {
                "PhotometricInterpretation": "RGB",
                "SamplesPerPixel": 3,
                "PixelRepresentation": 0,
                "PixelData": bytes(144),
                "RescaleSlope": "0.5",
            },
            3,
            0,
            65535,
            True,
        ),
        (
            {
                "PhotometricInterpretation": "PALETTE COLOR",
                "PixelRepresentation": 0,
                "RedPaletteColorLookupTableDescriptor": [256, 0, 8],
            },
            3,
            0,
            255,
            True,
        ),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, 3, 0, 65535, True),
    ],
)
def test_range_and_samples_of_decoded_pixels(tmp_path, changes, samples, low, high, whole):
    """Bits, sign, slope, intercept and colour decide them; colour has no slope."""
    table = scan_one(save(mr_image(**changes), tmp_path / "image.dcm"))

    assert table.samples_per_pixel.tolist() == [samples]
    assert table.value_range.tolist() == [[low, high]]
    assert table.value_is_whole.tolist() == [whole]
    assert (table.pixel_offset[0] >= 0) == (samples == 1)


def test_a_modality_lookup_table_bounds_the_values(tmp_path):
    """It goes before slope and intercept, and its image is not read as it lies."""
    entries = np.array([7, 900, 3, 20], "<u2").tobytes()
    lut = item(LUTDescriptor=[4, 0, 16], LUTData=entries, ModalityLUTType="US")
    dataset = mr_image(ModalityLUTSequence=[lut], RescaleSlope="3", PixelRepresentation=0)

    table = scan_one(save(dataset, tmp_path / "image.dcm"))

    assert table.value_range.tolist() == [[3.0, 900.0]]
    assert (table.rescale_slope[0], table.rescale_intercept[0]) == (1.0, 0.0)
    assert (table.pixel_offset[0], table.value_is_whole[0]) == (-1, True)


@pytest.mark.parametrize(
    ("keyword", "bits"), [("FloatPixelData", 32), ("DoubleFloatPixelData", 64)]
)
@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
def test_float_pixels_have_no_bounds(tmp_path, keyword, bits, scan):
    """They have no Bits Stored either."""
    dataset = mr_image(PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None)
    dataset.BitsAllocated = bits
    setattr(dataset, keyword, bytes(24 * bits // 8))

    table = scan_one(save(dataset, tmp_path / "image.dcm"), scan)

    assert table.value_range.tolist() == [[-np.inf, np.inf]]
    assert (table.bits_stored[0], table.pixel_offset[0]) == (bits, -1)
    assert not table.value_is_whole[0]


def test_single_bits_and_overlays_are_left_to_the_decoder(tmp_path):
    """One bit per pixel, and a high bit that is not that of the bits stored."""
    bits = mr_image(
        BitsAllocated=1, BitsStored=1, HighBit=0, PixelRepresentation=0, PixelData=bytes(4)
    )
    shifted = mr_image(BitsStored=12, HighBit=15, PixelRepresentation=0)

    for dataset, high in ((bits, 1.0), (shifted, 4095.0)):
        table = scan_one(save(dataset, tmp_path / "image.dcm"))
        assert table.pixel_offset.tolist() == [-1]
        assert table.value_range.tolist() == [[0.0, high]]


# --- what is no image, or a broken one ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"Rows": None}, Reason.MISSING_TAG, r"\(0028,0010\) Rows is missing"),
        ({"Columns": 0}, Reason.MISSING_TAG, r"\(0028,0011\) Columns is 0"),
        ({"PixelData": None}, Reason.MISSING_TAG, r"\(7FE0,0010\) Pixel Data is missing"),
        ({"PixelData": bytes(46)}, Reason.PIXEL_DATA_SHORT, "46 bytes, .* 4 x 6 x 16 in 1 .* 48"),
        ({"Rows": 60000}, Reason.PIXEL_DATA_SHORT, "48 bytes, .* 60000 x 6 x 16 .* need 720000"),
        ({"NumberOfFrames": "3"}, Reason.PIXEL_DATA_SHORT, "48 bytes, .* in 3 frame.* need 144"),
        ({"NumberOfFrames": "-3"}, Reason.UNSUPPORTED_PIXELS, "Frames is -3, 1 to 65536 are"),
        ({"NumberOfFrames": "99999999"}, Reason.UNSUPPORTED_PIXELS, "Frames is 1e.08, 1 to 65536"),
        ({"SamplesPerPixel": 3}, Reason.UNSUPPORTED_PIXELS, "Samples per Pixel is 3, .* needs 1"),
        ({"BitsStored": 17}, Reason.UNSUPPORTED_PIXELS, "Stored is 17, .*Allocated 16"),
        ({"BitsAllocated": 17}, Reason.UNSUPPORTED_PIXELS, "Allocated is 17, it can be"),
        ({"RescaleSlope": "0"}, Reason.UNSUPPORTED_PIXELS, "Rescale Slope is 0"),
        ({"RescaleSlope": "1e300"}, Reason.UNSUPPORTED_PIXELS, "Slope 1e.300, .*beyond float32"),
        ({"HighBit": 14}, Reason.UNSUPPORTED_PIXELS, "High Bit is 14, .* Bits Stored 16"),
        ({"HighBit": 16}, Reason.UNSUPPORTED_PIXELS, "High Bit is 16, .* Bits Stored 16"),
        ({"PixelRepresentation": 2}, Reason.UNSUPPORTED_PIXELS, "Representation is 2, .* 0 or 1"),
        ({"PhotometricInterpretation": "DOE"}, Reason.UNSUPPORTED_PIXELS, "is neither grey"),
        ({"PhotometricInterpretation": "RGB"}, Reason.UNSUPPORTED_PIXELS, "is 1, .* needs 3"),
    ],
)
@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
def test_headers_that_rule_out_decoding_are_rejected_with_tag_and_numbers(
    tmp_path, changes, reason, words, scan
):
    """The guards work before any pixel is allocated."""
    problem = scan_one(save(mr_image(**changes), tmp_path / "image.dcm"), scan)

    assert isinstance(problem, Problem)
    assert (problem.path, problem.reason) == ("image.dcm", reason)
    assert re.search(words, problem.detail), problem.detail


@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
def test_functional_groups_of_another_number_of_frames_are_rejected(tmp_path, scan):
    """Nobody knows which frame an item belongs to."""
    dataset = enhanced_image(3)
    dataset.PerFrameFunctionalGroupsSequence.pop()

    problem = scan_one(save(dataset, tmp_path / "image.dcm"), scan)

    assert "has 2 items, (0028,0008) Number of Frames is 3" in problem.detail


@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_dicom_files_that_are_no_images_are_named_by_their_class(tmp_path, scan, syntax):
    """Structure sets have no pixels, those of a segmentation are no image."""
    structures = mr_image(SOPClassUID=RTStructureSetStorage, PixelData=None)
    structures.ROIContourSequence = [item(ROIDisplayColor=["1", "2", "3"])]
    structures["ROIContourSequence"].is_undefined_length = True
    save(structures, tmp_path / "rs.dcm", syntax)
    save(enhanced_image(SOPClassUID=SegmentationStorage), tmp_path / "seg", syntax)
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").touch()

    scanned = scan(tmp_path, ["rs.dcm", "seg", "notes.txt", "empty"])

    assert (len(scanned.slices), scanned.problems) == (0, [])
    assert [(file.path, file.sop_class_uid) for file in scanned.files] == [
        ("rs.dcm", RTStructureSetStorage),
        ("seg", SegmentationStorage),
        ("notes.txt", ""),
        ("empty", ""),
    ]
    assert all(file.file_size == (tmp_path / file.path).stat().st_size for file in scanned.files)


def test_files_that_cannot_be_read_are_rejected_and_cost_nothing_else(tmp_path):
    """Text, an empty file, a folder, a FIFO, a missing file, and half a file among good ones."""
    good = save(mr_image(), tmp_path / "a.dcm")
    (tmp_path / "text.dcm").write_text("this is no DICOM file, it only says so " * 20)
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "folder.dcm").mkdir()
    os.mkfifo(tmp_path / "pipe.dcm")
    (tmp_path / "half.dcm").write_bytes(good.read_bytes()[:-30])
    save(mr_image(), tmp_path / "z.dcm")
    names = ["a.dcm", "text.dcm", "empty.dcm", "folder.dcm", "pipe.dcm", "gone.dcm", "half.dcm"]

    scanned = scan_headers(tmp_path, [*names, "z.dcm"], ["p"] * 8)

    assert scanned.slices.path.tolist() == [b"a.dcm", b"z.dcm"]
    assert {problem.path: problem.reason for problem in scanned.problems} == {
        "text.dcm": Reason.NOT_DICOM,
        "empty.dcm": Reason.NOT_DICOM,
        "folder.dcm": Reason.UNREADABLE_FILE,
        "pipe.dcm": Reason.UNREADABLE_FILE,
        "gone.dcm": Reason.UNREADABLE_FILE,
        "half.dcm": Reason.PIXEL_DATA_SHORT,
    }
    by_path = {problem.path: problem.detail for problem in scanned.problems}
    assert "No such file" in by_path["gone.dcm"]
    assert "holds 18 bytes" in by_path["half.dcm"]


VALUES = [b"1", b"-2.5", b"3e1", b"", b" ", b"4,5", b"6 7", b"x", b"nan"]
decimals = st.one_of(
    st.lists(st.sampled_from(VALUES), max_size=3).map(b"\\".join),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda value: repr(value).encode()[:16]),
)


@given(st.lists(decimals, min_size=1, max_size=8), st.integers(1, 2))
def test_no_malformed_value_moves_those_of_other_files(numbers, count):
    """Each row is what Python's float makes of its own text: absent, `count` numbers, or NaN."""
    tag = ALLOWED_ATTRIBUTES["EchoTime"][0]
    values = pack([{tag: text} for text in numbers])

    column = decimal_column(count, -7.0, values.raw, values.spans[:, SLOT[tag]])

    for text, row in zip(numbers, column.tolist(), strict=True):
        expected = [-7.0] * count
        if text.strip(b" "):
            try:
                expected = [float(part) for part in text.decode().split("\\")]
            except ValueError:
                expected = []
            if len(expected) != count or not np.isfinite(expected).all():
                expected = [np.nan] * count
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
@pytest.mark.parametrize(
    ("number", "expected"),
    [("7", 7), ("1.9", -1), ("99999999999999999999", -1), ("  ", -1), ("3 4", -1), ("-5", -5)],
)
def test_instance_numbers_are_whole_or_absent(tmp_path, scan, number, expected):
    """Nothing is truncated or wrapped into a number that another image may have."""
    dataset = mr_image()
    dataset["InstanceNumber"] = pydicom.DataElement(0x00200013, "LO", number)
    path = save(dataset, tmp_path / "image.dcm", ImplicitVRLittleEndian)

    assert scan_one(path, scan).instance_number.tolist() == [expected]


@pytest.mark.parametrize("text", ["0,5", "nan", "0.5\\2", "x"])
def test_a_malformed_slope_is_never_read_as_one(tmp_path, text):
    """An absent slope is 1; one that cannot be read rejects the file."""
    dataset = mr_image()
    dataset["RescaleSlope"] = pydicom.DataElement(0x00281053, "LO", text.split("\\"))
    path = save(dataset, tmp_path / "image.dcm", ImplicitVRLittleEndian)

    problem = scan_one(path)

    assert isinstance(problem, Problem)
    assert "(0028,1053) Rescale Slope is no finite number" in problem.detail


# --- hostile files --------------------------------------------------------------------------------

PREFIX = b"\0" * 128 + b"DICM"


def meta(syntax):
    """A file meta group that names only the transfer syntax."""
    padded = syntax.encode() + b"\0" * (len(syntax) % 2)
    return PREFIX + struct.pack("<HH2sH", 2, 0x10, b"UI", len(padded)) + padded


@cache
def bombs():
    """Small files that would take long or much memory if they were believed."""
    implicit, explicit = meta(ImplicitVRLittleEndian), meta(ExplicitVRLittleEndian)
    empty_item = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    sequence = struct.pack("<HHI", 0x0008, 0x1140, 0xFFFFFFFF)
    start = struct.pack("<HHI", 0x0008, 0x0005, 0)
    groups = struct.pack("<HHI", 0x5200, 0x9230, 8 * 500_000)
    nested = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + sequence
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = deflate.compress(bytes(64_000_000)) + deflate.flush()
    return {
        "items": implicit + sequence + empty_item * 500_000,
        "no-meta-items": start + sequence + empty_item * 500_000,
        "groups": implicit + groups + empty_item * 500_000,
        "nested": implicit + sequence + nested * 20_000,
        "no-meta-nested": start + sequence + nested * 20_000,
        "deflated": meta(DeflatedExplicitVRLittleEndian) + zeros,
        "huge": explicit + struct.pack("<HH2sHI", 8, 0x18, b"UT", 0, 0xFFFFFFF0) + bytes(100),
        "meta": PREFIX + struct.pack("<HH2sH", 2, 0x10, b"UI", 0) * 100_000,
        "elements": meta(ExplicitVRBigEndian) + struct.pack(">HH2sH", 8, 0x18, b"UI", 0) * 500_000,
    }


@pytest.mark.parametrize("name", ["x.dcm", "x"])
def test_no_file_takes_long_or_raises(tmp_path, name):
    """A million items, sequences in sequences, a deflated nothing, lengths beyond the file."""
    scan_headers(tmp_path, [])
    for kind, raw in bombs().items():
        (tmp_path / name).write_bytes(raw)
        for scan in (scan_headers, scan_slowly):
            start = time.process_time()
            scanned = scan(tmp_path, [name])
            assert time.process_time() - start < 2, kind
            assert len(scanned.slices) == 0
            assert len(scanned.files) + len(scanned.problems) == 1


@given(st.binary(max_size=400), st.sampled_from(SYNTAXES))
def test_arbitrary_bytes_never_crash_the_header_walk(tmp_path_factory, junk, syntax):
    """Anything after a valid start is rows, a file or a problem, never an exception."""
    folder = tmp_path_factory.mktemp("junk")
    (folder / "x.dcm").write_bytes(meta(syntax) + junk)

    scan_one(folder / "x.dcm")


@given(st.data())
def test_flipped_bytes_of_a_header_never_crash_the_walk(tmp_path_factory, data):
    """Mutants of good files are read or rejected, and never read in two ways."""
    folder = tmp_path_factory.mktemp("mutant")
    make = data.draw(st.sampled_from([mr_image, enhanced_image]))
    path = save(make(), folder / "x.dcm", data.draw(st.sampled_from(SYNTAXES)))
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(132, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)

    fast, slow = (scan(folder, [path.name]) for scan in (scan_headers, scan_slowly))

    if len(fast.slices) and len(slow.slices):
        assert_same_scan(fast, slow)


def test_compressed_frames_have_no_offset(tmp_path):
    """Their pixels are in fragments, and the length is undefined."""
    dataset = mr_image(NumberOfFrames="2")
    dataset.PixelData = pydicom.encaps.encapsulate([b"ab", b"cd"])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True

    table = scan_one(save(dataset, tmp_path / "image.dcm", JPEG2000Lossless))

    assert table.pixel_offset.tolist() == [-1, -1]
    assert table.pixel_length.tolist() == [-1, -1]


def test_nothing_of_a_scan_of_no_files_is_missing(tmp_path):
    """Every column is there, with no rows."""
    scanned = scan_headers(tmp_path, [])

    assert (len(scanned.slices), scanned.headers, scanned.files) == (0, {}, ())
    assert scanned.slices.image_orientation_patient.shape == (0, 6)


@pytest.mark.parametrize("scan", [scan_headers, scan_slowly])
@pytest.mark.parametrize(
    ("syntax", "rows", "reason", "detail"),
    [
        (RLELossless, 60000, Reason.PIXEL_DATA_SHORT, r"60000 x 64 .* need 7680000 bytes, more"),
        (RLELossless, 64, None, ""),
        (JPEGLSLossless, 60000, Reason.IMAGE_SIZE_DIFFERS, r"holds 64 x 64 .* is 60000 x 64"),
        (JPEGLSLossless, 64, None, ""),
    ],
)
def test_a_size_that_the_encoded_pixels_cannot_have_is_rejected(
    tmp_path, scan, syntax, rows, reason, detail
):
    """One claim of 60,000 rows in a small file would make every image of a cohort as large."""
    dataset = mr_image(Rows=64, Columns=64, PixelData=bytes(2 * 64 * 64))
    dataset.compress(syntax)
    dataset.Rows = rows
    save(dataset, tmp_path / "a.dcm", syntax)

    scanned = scan(tmp_path, ["a.dcm"])

    assert len(scanned.slices) == (reason is None)
    assert [problem.reason for problem in scanned.problems] == [reason] * (reason is not None)
    assert all(re.search(detail, problem.detail) for problem in scanned.problems)


def test_a_deflated_file_claims_no_more_than_it_can_inflate_to(tmp_path):
    """Deflate packs 1032 times at most."""
    dataset = mr_image(Rows=60000, Columns=60000)
    save(dataset, tmp_path / "a.dcm", DeflatedExplicitVRLittleEndian)

    scanned = scan_headers(tmp_path, ["a.dcm"])

    assert [problem.reason for problem in scanned.problems] == [Reason.PIXEL_DATA_SHORT]
