"""Pixels: every file against pydicom, the fast path against the slow one, broken files."""

import re
import threading
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.data import get_testdata_file, get_testdata_files
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    MRImageStorage,
)

from parallel_dicomseg.dicom import decoders, pixels
from parallel_dicomseg.dicom.decoders import (
    DECODERS,
    codestream_size,
    decoder_for,
    decoder_versions,
    missing_decoders,
    quiet,
)
from parallel_dicomseg.dicom.pixels import decode_frame, inverted, mask_bits, read_images
from parallel_dicomseg.records import Layout, Problem, Reason, SliceRefs

NAN = float("nan")
NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
SYNTAXES = (*NATIVE, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

#: What pydicom reads and this package does not, by file name: the reason.
REFUSED: dict[str, str] = {}
#: Frames that neither reads, by file name: the reason.
UNREADABLE = {
    "JPEG2000-embedded-sequence-delimiter.dcm": "its codestream is no JPEG 2000",
    "MR_truncated.dcm": "62 bytes are missing at the end",
    "badVR.dcm": "Number of Frames is '1A'",
    "meta_missing_tsyntax.dcm": "no Bits Allocated",
    "nested_priv_SQ.dcm": "no Bits Allocated",
}


def mr_image(stored=None, **changes):
    """A 4 x 6 MR image whose pixels are 0 … 23, or those given (int16 or uint16)."""
    stored = np.arange(24, dtype="<i2").reshape(4, 6) if stored is None else stored
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.PatientName = "Somebody^Named"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return dataset


def save(dataset, path, syntax=ExplicitVRLittleEndian):
    """Write a dataset in a transfer syntax."""
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        swapped = np.frombuffer(dataset.PixelData, "<u2").byteswap()
        dataset.PixelData = swapped.tobytes()
        dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def layout_of(shape, dtype="<i2", **changes):
    """A layout for images of one shape, (rows, columns) or (rows, columns, 3)."""
    usual = Layout(
        slices=1,
        rows=shape[0],
        columns=shape[1],
        image_dtype=dtype,
        mask_dtype="|u1",
        structures=("a",),
        nested=(),
        rule="center",
        contour_origin=0.0,
        include_unannotated=True,
        codec="none",
        keep_identity=False,
        source="",
        samples=shape[2] if len(shape) == 3 else 1,
    )
    return replace(usual, **changes)


def refs_of(root, paths, fast=True, **columns):
    """What a worker is given for frame 0 of files, by pydicom; other columns as given."""
    rows = []
    for path in paths:
        dataset = pydicom.dcmread(Path(root) / path)
        native = fast and dataset.file_meta.TransferSyntaxUID in NATIVE
        sign = "ui"[dataset.PixelRepresentation]
        element = dataset["PixelData"]
        rows.append(
            {
                "path": str(path),
                "frame": 0,
                "file_size": (Path(root) / path).stat().st_size,
                "pixel_offset": element.file_tell if native else -1,
                "pixel_length": len(element.value) if native else -1,
                "stored_dtype": f"<{sign}{dataset.BitsAllocated // 8}" if native else "",
                "bits_stored": dataset.BitsStored,
                "rescale_slope": float(dataset.get("RescaleSlope", 1)),
                "rescale_intercept": float(dataset.get("RescaleIntercept", 0)),
                "rows": dataset.Rows,
                "columns": dataset.Columns,
                "photometric_interpretation": dataset.PhotometricInterpretation,
                "plane_geometry": (NAN,) * 11,
                "grid": (0.0, 0.0, 1.0, 1.0),
                "annotated": 0,
            }
        )
        for name, value in columns.items():
            rows[-1][name] = value
    return SliceRefs(**{name: tuple(row[name] for row in rows) for name in rows[0]})


def read(root, refs, shape, dtype="<i2", **changes):
    """The images of some references, all of which must be good."""
    out = np.full((len(refs), *shape), 77, dtype)
    good, problems = read_images(str(root), refs, out, layout_of(shape, dtype, **changes))
    assert problems == []
    assert good.all()
    return out


def read_problem(root, refs, shape, dtype="<i2", **changes):
    """The one problem of some references."""
    out = np.zeros((len(refs), *shape), dtype)
    good, (problem,) = read_images(str(root), refs, out, layout_of(shape, dtype, **changes))
    assert good.tolist().count(False) == 1
    return problem


# --- stored values against pydicom ----------------------------------------------------------------


def frames_by_pydicom(dataset):
    """All frames as a list, palettes applied; None where pydicom cannot read them.

    Lossy JPEG through Pillow, since its plugins differ by some grey levels.
    """
    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if syntax == JPEGBaseline8Bit:
                dataset.pixel_array_options(decoding_plugin="pillow")
            array = dataset.pixel_array
            if dataset.PhotometricInterpretation == "PALETTE COLOR":
                array = apply_color_lut(array, dataset)[..., :3]
            several = int(dataset.get("NumberOfFrames") or 1) > 1
        except Exception:  # noqa: BLE001 whatever it is, there is no truth then
            return None
    return list(array) if several else [array]


def compare_with_pydicom(files):
    """Decode every frame of every file; how many were compared, and what only one side reads."""
    count, only_here, refused, unreadable = Counter(), set(), set(), set()
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dataset = pydicom.dcmread(file, force=True)
            except Exception:  # noqa: BLE001 no DICOM file
                continue
            if not any(keyword in dataset for keyword in PIXEL_KEYWORDS):
                continue
        truth = frames_by_pydicom(dataset)
        for frame, expected in enumerate(truth or [None]):
            try:
                stored = decode_frame(Path(file), frame)
            except Exception:  # noqa: BLE001 as pydicom's
                (unreadable if expected is None else refused).add(Path(file).name)
                continue
            if expected is None:
                only_here.add(Path(file).name)
                continue
            np.testing.assert_array_equal(stored, expected, err_msg=f"{file} frame {frame}")
            count[str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID"))] += 1
    return count, only_here, refused, unreadable


def test_every_file_of_pydicom_is_read_as_pydicom_reads_it():
    """All of pydicom's own test files: none differs, none that it reads is refused."""
    count, only_here, refused, unreadable = compare_with_pydicom(get_testdata_files())

    assert refused == set(REFUSED)
    assert unreadable == set(UNREADABLE)
    # without GDCM pydicom refuses the first; the second names no transfer syntax
    assert only_here == {"JPEG-lossy.dcm", "OT-PAL-8-face.dcm"} & only_here
    assert "JPEG-lossy.dcm" in only_here
    assert count.total() >= 150
    assert len(count) >= 12


def test_every_file_of_the_transfer_syntax_collection_is_read_as_pydicom_reads_it(shared_data):
    """79 odd and compressed files and the dicom2nifti ones."""
    files = sorted(path for path in (shared_data / "transfer_syntax").rglob("*") if path.is_file())

    count, only_here, refused, unreadable = compare_with_pydicom(files)

    assert (refused, unreadable) == (set(), set())
    assert only_here - {"OT-PAL-8-face.dcm"} == {
        "liver_deflate.dcm",
        "liver_nonbyte_aligned_deflate.dcm",
        "liver_nonbyte_aligned_rle.dcm",
        "liver_rle.dcm",
    }
    assert count.total() >= 150
    assert len(count) >= 10


@pytest.mark.parametrize(
    "folder",
    [
        "dicom_seg",
        "ibsi_digital_phantom",
        "lidc_xml",
        "rtstruct_odd",
        "sts_raw_mr_t2",
        "sts_rtstruct",
    ],
)
def test_every_file_of_the_annotated_cohorts_is_read_as_pydicom_reads_it(shared_data, folder):
    """Images, and the bits of SEG."""
    files = sorted(path for path in (shared_data / folder).rglob("*") if path.is_file())

    count, only_here, refused, unreadable = compare_with_pydicom(files)

    assert (only_here, refused, unreadable) == (set(), set(), set())
    assert count.total() > 0 or folder == "lidc_xml"


@pytest.mark.parametrize("encoding", ["rle", "deflate", "j2k"])
@pytest.mark.parametrize("kind", ["", "_nonbyte_aligned"])
def test_encoded_bits_equal_the_plain_ones(shared_data, kind, encoding):
    """One SEG in several encodings, some of which pydicom cannot read."""
    folder = shared_data / "transfer_syntax" / "pydicom_data"
    plain = next(folder.rglob(f"liver{kind}.dcm"), None) or get_testdata_file(f"liver{kind}.dcm")
    encoded = next(folder.rglob(f"liver{kind}_{encoding}.dcm"))
    for frame in range(3):
        np.testing.assert_array_equal(
            decode_frame(encoded, frame), decode_frame(Path(plain), frame)
        )


def test_five_encodings_of_one_volume_are_equal(shared_data):
    """4 x 256 x 256 values, sum 33304746."""
    folder = shared_data / "transfer_syntax" / "dicom2nifti" / "generic"
    volumes = {}
    for name in ("", "_j2k", "_jpeg", "_jpegls", "_rle"):
        paths = sorted((folder / f"compressed{name}" / "001").iterdir())
        volumes[name] = read("", refs_of("", paths), (256, 256), "<u2")

    assert {int(volume.sum()) for volume in volumes.values()} == {33304746}
    for volume in volumes.values():
        np.testing.assert_array_equal(volume, volumes[""])


def test_slopes_that_differ_from_slice_to_slice_are_applied(shared_data):
    """Non-square pixels, a slope and an intercept per slice: rescaled sum 369895.38."""
    folder = shared_data / "transfer_syntax/dicom2nifti/generic/anatomical/002_non_isotropic"
    paths = sorted(folder.iterdir())
    refs = refs_of("", paths)
    assert len(set(refs.rescale_slope)) == 4

    images = read("", refs, (refs.rows[0], refs.columns[0]), "<f4")

    assert images.astype(np.float64).sum() == pytest.approx(369895.38, abs=0.05)


def test_pixels_of_the_real_cohort_equal_pydicoms(shared_data):
    """Every 12th image of the Arterys cohort, read in one call straight into the output."""
    root = shared_data / "sunnybrook_arterys" / "final_data"
    paths = sorted(str(path.relative_to(root)) for path in root.glob("dicoms/*/*.dcm"))[::12]

    images = read(root, refs_of(root, paths), (256, 256))

    for image, path in zip(images, paths, strict=True):
        np.testing.assert_array_equal(image, decode_frame(root / path, 0))


# --- the fast path against the slow one -----------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (2.0, -1024.0), (-2.5, 100.0)])
def test_native_files_of_every_byte_order_are_rescaled(tmp_path, syntax, slope, intercept):
    """Little and big endian, implicit, deflated."""
    save(mr_image(), tmp_path / "image.dcm", syntax)
    refs = refs_of(tmp_path, ["image.dcm"], rescale_slope=slope, rescale_intercept=intercept)

    (image,) = read(tmp_path, refs, (4, 6), "<f4")

    np.testing.assert_array_equal(image, np.arange(24).reshape(4, 6) * slope + intercept)


@example(  # wholly outside, to either side
    stored=np.ones((5, 4), "<u1"),
    bits=8,
    scale=(1.0, 0.0),
    origin=(0, 5),
    shape=(5, 4),
    pad=0.0,
    photometric="MONOCHROME2",
    samples=(),
)
@example(
    stored=np.ones((5, 4), "<u1"),
    bits=8,
    scale=(1.0, 0.0),
    origin=(-9, -9),
    shape=(3, 3),
    pad=0.0,
    photometric="MONOCHROME2",
    samples=(),
)
@given(
    stored=arrays(st.sampled_from(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4"]), (5, 4)),
    bits=st.integers(1, 32),
    scale=st.sampled_from([(1.0, 0.0), (1.0, -1024.0), (0.37, -2.5), (-3.0, 7.0)]),
    origin=st.tuples(st.integers(-4, 6), st.integers(-4, 6)),
    shape=st.sampled_from([(5, 4), (3, 3), (9, 2)]),
    pad=st.sampled_from([NAN, 0.0, -11.5]),
    photometric=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    samples=st.sampled_from([(), (3,)]),
)
def test_native_frames_are_the_same_on_the_fast_and_the_slow_path(
    tmp_path_factory, stored, bits, scale, origin, shape, pad, photometric, samples
):
    """Any type, bits above the stored ones, slope, MONOCHROME1, crop, padding: kernel = pydicom."""
    bits = min(bits, 8 * stored.dtype.itemsize)
    dataset = mr_image(
        stored, BitsStored=bits, HighBit=bits - 1, PhotometricInterpretation=photometric
    )
    folder = tmp_path_factory.mktemp("native")
    save(dataset, folder / "image.dcm", ImplicitVRLittleEndian)
    changes = {
        "grid": (*map(float, origin), 1.0, 1.0),
        "rescale_slope": scale[0],
        "rescale_intercept": scale[1],
    }
    options = {"invert_monochrome1": True, "pad_value": pad}

    both = [
        read(
            folder,
            refs_of(folder, ["image.dcm"], fast, **changes),
            (*shape, *samples),
            "<f4",
            **options,
        )
        for fast in (True, False)
    ]

    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("dtype", ["<i2", "<f4"])
def test_images_of_several_sizes_are_padded_and_cropped_in_one_call(tmp_path, dtype):
    """Each around its own pixels, with its own minimum; the neighbours do not matter."""
    small, large = np.full((2, 3), 5, "<i2"), np.arange(70, dtype="<i2").reshape(7, 10)
    save(mr_image(small), tmp_path / "small.dcm")
    save(mr_image(large), tmp_path / "large.dcm", ExplicitVRBigEndian)
    save(mr_image(large), tmp_path / "also.dcm")
    names = ["also.dcm", "small.dcm", "large.dcm"]
    refs = refs_of(tmp_path, names)
    refs = replace(refs, grid=((1.0, 2.0, 1.0, 1.0), (-1.0, -1.0, 1.0, 1.0), (1.0, 2.0, 1.0, 1.0)))

    images = read(tmp_path, refs, (4, 5), dtype, pad_value=-9.0)

    np.testing.assert_array_equal(images[0], large[1:5, 2:7])
    np.testing.assert_array_equal(images[1], np.pad(small, 1, constant_values=-9))
    np.testing.assert_array_equal(images[2], large[1:5, 2:7])


@pytest.mark.parametrize("fast", [True, False])
def test_images_on_another_spacing_are_interpolated_rounded_and_clipped(tmp_path, fast):
    """An edge overshoots in float32 and ends at the limits of an integer type."""
    stored = np.where(np.arange(32) < 16, 0, 255).astype("<u1") * np.ones((32, 1), "<u1")
    save(mr_image(stored), tmp_path / "image.dcm")
    refs = refs_of(tmp_path, ["image.dcm"], fast, grid=(-0.25, -0.25, 0.5, 0.5))

    (smooth,) = read(tmp_path, refs, (64, 64), "<f4", resampled=True)
    (whole,) = read(tmp_path, refs, (64, 64), "|u1", resampled=True)

    assert smooth.min() < -5
    assert smooth.max() > 260
    np.testing.assert_array_equal(whole, np.clip(np.rint(smooth), 0, 255))


# --- kinds of pixels ------------------------------------------------------------------------------


@given(arrays("<u2", (3,)), st.integers(1, 16), st.booleans(), st.data())
def test_bits_outside_the_stored_ones_are_dropped_and_the_sign_extended(raw, bits, signed, data):
    """Against plain integer arithmetic, value by value (PS3.5 8.1.1)."""
    high_bit = data.draw(st.integers(bits - 1, 15))
    stored = raw.view("<i2") if signed else raw

    masked = mask_bits(stored, bits, high_bit)

    for before, after in zip(raw.tolist(), masked.tolist(), strict=True):
        value = (before >> (high_bit - bits + 1)) % 2**bits
        assert after == (value - 2**bits if signed and value >= 2 ** (bits - 1) else value)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_bits_that_lie_higher_than_usual_are_moved(tmp_path, syntax):
    """High Bit 15 and Bits Stored 12, which pydicom reads 16 times too large."""
    stored = np.arange(-12, 12, dtype="<i2").reshape(4, 6)
    raw = (stored << 4) | 7
    save(mr_image(raw, BitsStored=12, HighBit=15), tmp_path / "image.dcm", syntax)

    np.testing.assert_array_equal(decode_frame(tmp_path / "image.dcm", 0), stored)


@given(arrays("<i2", (6,)), st.integers(1, 16))
def test_monochrome1_turned_round_twice_is_the_same(raw, bits):
    """Lowest becomes highest within the stored bits, for signed and unsigned values."""
    for stored in (mask_bits(raw, bits), mask_bits(raw.view("<u2"), bits)):
        turned = inverted(stored, bits)
        low, high = (
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if stored.dtype.kind == "i"
            else (
                0,
                2**bits - 1,
            )
        )
        assert (turned == low + high - stored.astype(int)).all()
        assert turned.min() >= low
        assert turned.max() <= high


@pytest.mark.parametrize("name", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_read(tmp_path, name):
    """Parametric maps: values as they are, also NaN; beyond float32 the slice is rejected."""
    dtype = {"FloatPixelData": "<f4", "DoubleFloatPixelData": "<f8"}[name]
    stored = np.array([[1.5, -2.25], [np.nan, 3e38]], dtype)
    dataset = mr_image(BitsAllocated=8 * stored.itemsize, Rows=2, Columns=2)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    setattr(dataset, name, stored.tobytes())
    path = save(dataset, tmp_path / "image.dcm")
    one = SliceRefs(
        *[(value,) for value in ("image.dcm", 0, path.stat().st_size, -1, -1, "", 64, 1.0, 0.0)],
        *[(value,) for value in (2, 2, "MONOCHROME2", (NAN,) * 11, (0.0, 0.0, 1.0, 1.0), 0)],
    )

    np.testing.assert_array_equal(read(tmp_path, one, (2, 2), "<f4")[0], stored.astype("<f4"))

    if dtype == "<f8":
        stored[1, 1] = 1e300
        dataset.DoubleFloatPixelData = stored.tobytes()
        save(dataset, tmp_path / "image.dcm")
        problem = read_problem(tmp_path, one, (2, 2), "<f4")
        assert problem.reason == Reason.UNSUPPORTED_PIXELS


def test_a_modality_lut_takes_the_place_of_slope_and_intercept(tmp_path):
    """8-bit pixels and a table of 300 entries that begins at 2; outside its ends count."""
    table = Dataset()
    table.LUTDescriptor = [300, 2, 16]
    table.ModalityLUTType = "HU"
    table.LUTData = (np.arange(300) * 7 + 100).astype("<u2").tobytes()
    table["LUTData"].VR = "OW"
    stored = np.array([[0, 2, 3], [10, 200, 255]], "<u1")
    path = save(mr_image(stored, ModalityLUTSequence=[table]), tmp_path / "image.dcm")
    refs = refs_of(tmp_path, ["image.dcm"], fast=False, rescale_slope=5.0)

    (image,) = read(tmp_path, refs, (2, 3), "<u2")

    assert image.tolist() == [[100, 100, 107], [156, 1486, 1871]]
    expected = apply_modality_lut(stored.astype(int), pydicom.dcmread(path))
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_small_odd.dcm",
        "SC_rgb_rle_2frame.dcm",
        "examples_palette.dcm",
        "examples_ybr_color.dcm",
    ],
)
def test_colour_becomes_samples_or_luminance(name):
    """Red, green and blue as pydicom gives them; luminance by ITU-R BT.601, rounded."""
    path = Path(get_testdata_file(name, download=False))
    truth = decode_frame(path, 0)
    refs = refs_of(path.parent, [path.name], fast=False)
    dtype = truth.dtype.newbyteorder("<").str

    (samples,) = read(path.parent, refs, truth.shape, dtype)
    (grey,) = read(path.parent, refs, truth.shape[:2], dtype)
    (exact,) = read(path.parent, refs, truth.shape[:2], "<f4")

    np.testing.assert_array_equal(samples, truth)
    luminance = 0.299 * truth[..., 0] + 0.587 * truth[..., 1] + 0.114 * truth[..., 2]
    np.testing.assert_array_equal(grey, np.rint(luminance))
    np.testing.assert_allclose(exact, luminance, rtol=1e-6)


def test_grey_in_a_file_of_colour_is_repeated(tmp_path):
    """Three equal samples, also where it is padded."""
    save(mr_image(), tmp_path / "image.dcm")
    refs = refs_of(tmp_path, ["image.dcm"], grid=(-1.0, 0.0, 1.0, 1.0))

    (image,) = read(tmp_path, refs, (5, 6, 3), "<i2")

    expected = np.pad(np.arange(24).reshape(4, 6), ((1, 0), (0, 0)))
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("pixels_per_frame", [(3, 5), (4, 4), (23, 38), (1, 9)])
def test_single_bits_that_begin_inside_a_byte_are_found(tmp_path, pixels_per_frame):
    """Frames of 15, 16, 874 and 9 bits without padding between them (pydicom loses some)."""
    truth = np.random.default_rng(5).random((11, *pixels_per_frame)) < 0.5
    packed = np.packbits(truth.ravel(), bitorder="little").tobytes()
    dataset = mr_image(
        truth.astype("|u1"), BitsAllocated=1, BitsStored=1, HighBit=0, PixelRepresentation=0
    )
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    path = save(dataset, tmp_path / "bits.dcm")

    frames = [decode_frame(path, frame) for frame in range(11)]

    np.testing.assert_array_equal(frames, truth)


def jpeg2000(image, **options):
    """A grey image as JPEG 2000."""
    import imagecodecs

    return imagecodecs.jpeg2k_encode(image, level=0, reversible=True, **options)


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
def test_one_frame_is_picked_from_many(tmp_path, table, monkeypatch):
    """With either offset table or none, in any order; the header is parsed once for a task."""
    truth = np.random.default_rng(7).integers(0, 4096, (9, 16, 20), dtype=np.uint16)
    frames = [jpeg2000(frame) for frame in truth]
    dataset = mr_image(truth)
    if table == "extended":
        data, offsets, lengths = pydicom.encaps.encapsulate_extended(frames)
        dataset.PixelData, dataset.ExtendedOffsetTable = data, offsets
        dataset.ExtendedOffsetTableLengths = lengths
    else:
        dataset.PixelData = encapsulate(frames, has_bot=table == "basic")
    dataset["PixelData"].VR = "OB"
    save(dataset, tmp_path / "many.dcm", JPEG2000Lossless)
    order = [4, 8, 0, 3, 3, 7]
    refs = refs_of(tmp_path, ["many.dcm"] * len(order))
    opened = []
    whole = pixels.open_image
    monkeypatch.setattr(pixels, "open_image", lambda file: opened.append(file) or whole(file))

    images = read(tmp_path, replace(refs, frame=tuple(order)), (16, 20), "<u2")

    np.testing.assert_array_equal(images, truth[order])
    assert len(opened) == 1


@pytest.mark.parametrize(
    "encoding",
    ["1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.112", "1.2.840.10008.1.2.5"],
)
@pytest.mark.parametrize("shape", [(16, 20), (16, 20, 3)])
def test_what_pydicom_does_not_know_is_decoded_as_well(tmp_path, encoding, shape):
    """JPEG XL, grey and colour, and RLE, whose samples lie one after another."""
    imagecodecs = pytest.importorskip("imagecodecs")
    image = np.random.default_rng(1).integers(0, 255, shape, dtype=np.uint8)
    dataset = mr_image(image[..., 0] if image.ndim == 3 else image)
    if image.ndim == 3:
        dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
        dataset.PhotometricInterpretation = "RGB"
    if encoding.endswith(".5"):
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.PixelData = image.tobytes()
        dataset.compress(encoding)
    else:
        dataset.PixelData = encapsulate([imagecodecs.jpegxl_encode(image, lossless=True)])
        dataset["PixelData"].VR = "OB"
    # pydicom writes no transfer syntax that it does not know
    written = encoding if encoding.endswith(".5") else str(HTJ2KLossless)
    path = save(dataset, tmp_path / "image.dcm", written)
    path.write_bytes(path.read_bytes().replace(written.encode(), encoding.encode()))

    np.testing.assert_array_equal(decode_frame(path, 0), image)


def test_fractional_seg_is_read_as_highdicom_reads_it(shared_data):
    """Another reader than pydicom's pixel_array."""
    path = shared_data / "dicom_seg" / "highdicom" / "seg_image_ct_true_fractional.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = highdicom.imread(path)

    for frame in range(image.number_of_frames):
        truth = image.get_stored_frame(frame + 1)
        np.testing.assert_array_equal(decode_frame(path, frame), truth)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_a_file_that_changed_since_the_scan_is_rejected(tmp_path, fast):
    """Another size than when the header was read: offsets may be wrong, so nothing is read."""
    path = save(mr_image(), tmp_path / "image.dcm")
    refs = refs_of(tmp_path, ["image.dcm"], fast)
    path.write_bytes(path.read_bytes() + b"\0\0")

    problem = read_problem(tmp_path, refs, (4, 6))

    assert problem.reason == Reason.FILE_CHANGED
    assert "bytes when it was scanned" in problem.detail


@pytest.mark.parametrize("fast", [True, False])
def test_a_file_that_vanished_is_rejected_and_its_neighbour_is_not(tmp_path, fast):
    """The message is the system's."""
    save(mr_image(), tmp_path / "a.dcm")
    save(mr_image(), tmp_path / "b.dcm")
    refs = refs_of(tmp_path, ["a.dcm", "b.dcm"], fast)
    (tmp_path / "a.dcm").unlink()
    out = np.zeros((2, 4, 6), "<i2")

    good, problems = read_images(str(tmp_path), refs, out, layout_of((4, 6)))

    assert good.tolist() == [False, True]
    assert problems == [Problem("a.dcm", Reason.UNREADABLE_FILE, "No such file or directory")]
    np.testing.assert_array_equal(out[1], np.arange(24).reshape(4, 6))


def test_one_broken_frame_costs_no_other(tmp_path):
    """It is named; the rest of its file is read."""
    truth = np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8)
    frames = [jpeg2000(frame) for frame in truth]
    frames[1] = frames[1][:60] + b"\xff" * 20
    dataset = mr_image(truth, PixelData=encapsulate(frames))
    dataset["PixelData"].VR = "OB"
    save(dataset, tmp_path / "image.dcm", JPEG2000Lossless)
    refs = replace(refs_of(tmp_path, ["image.dcm"] * 3), frame=(0, 1, 2))
    out = np.zeros((3, 8, 8), "<u2")

    good, (problem,) = read_images(str(tmp_path), refs, out, layout_of((8, 8), "<u2"))

    assert good.tolist() == [True, False, True]
    assert problem.reason == Reason.UNDECODABLE_PIXELS
    assert problem.detail.startswith("frame 2 of 3: the pixels cannot be decoded (")
    np.testing.assert_array_equal(out[::2], truth[::2])


def test_a_frame_of_another_size_is_rejected_before_it_is_decoded(tmp_path):
    """Also with rows and columns exchanged, where the number of pixels is the same."""
    dataset = mr_image(np.zeros((8, 4), "<u2"))
    dataset.PixelData = encapsulate([jpeg2000(np.zeros((4, 8), np.uint16))])
    dataset["PixelData"].VR = "OB"
    save(dataset, tmp_path / "image.dcm", JPEG2000Lossless)

    problem = read_problem(tmp_path, refs_of(tmp_path, ["image.dcm"]), (8, 4), "<u2")

    assert problem.reason == Reason.IMAGE_SIZE_DIFFERS
    assert problem.detail == (
        "the frame holds 4 x 8 pixels, (0028,0010) Rows x (0028,0011) Columns is 8 x 4"
    )


@pytest.mark.parametrize(
    ("changes", "syntax", "reason", "words"),
    [
        ({"PhotometricInterpretation": "HSV"}, None, Reason.UNSUPPORTED_PIXELS, r"\(0028,0004\)"),
        ({"PixelData": b"\0" * 20}, None, Reason.UNDECODABLE_PIXELS, r"cannot be decoded \(V"),
        ({}, "1.2.840.10008.1.2.4.100", Reason.UNDECODABLE_PIXELS, "none that a decoder is known"),
        ({"BitsStored": 16, "HighBit": 15, "RescaleSlope": 10}, None, Reason.UNSUPPORTED_PIXELS,
         "values from 0 to 230000, the file holds -32768 to 32767"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_rejected_with_its_reason(tmp_path, changes, syntax, reason, words):
    """And never with a value of the header that may name somebody."""
    dataset = mr_image(np.arange(24, dtype="<u2").reshape(4, 6) * 1000, **changes)
    if syntax:
        dataset.PixelData = encapsulate([bytes(40)])
        dataset["PixelData"].VR = "OB"
    save(dataset, tmp_path / "image.dcm", syntax or ExplicitVRLittleEndian)

    problem = read_problem(tmp_path, refs_of(tmp_path, ["image.dcm"], fast=False), (4, 6))

    assert problem.reason == reason
    assert re.search(words, problem.detail), problem.detail
    assert "Somebody" not in problem.detail


def test_a_missing_decoder_is_told_with_what_to_install(tmp_path, monkeypatch):
    """Before anything is converted, and for the slice itself."""
    monkeypatch.setattr(decoders, "_is_importable", lambda module: module != "imagecodecs")
    path = Path(get_testdata_file("MR_small_jp2klossless.dcm", download=False))

    missing = missing_decoders([JPEG2000Lossless, JPEGBaseline8Bit, "1.2.3"])
    problem = read_problem(path.parent, refs_of(path.parent, [path.name]), (64, 64))

    assert missing == {
        JPEG2000Lossless: 'JPEG 2000 Lossless: pip install "parallel_dicomseg[decoders]"',
        "1.2.3": "no decoder is known for this transfer syntax",
    }
    assert problem.reason == Reason.UNDECODABLE_PIXELS
    assert problem.detail == (
        "(0002,0010) Transfer Syntax JPEG 2000 Lossless (1.2.840.10008.1.2.4.90) needs a decoder: "
        'pip install "parallel_dicomseg[decoders]"'
    )


MUTANTS = (
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_jp2klossless.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
)


@given(st.integers(0, 3000), st.integers(0, 255), st.sampled_from(MUTANTS))
def test_damaged_files_are_read_or_rejected(tmp_path_factory, place, value, name):
    """Any byte of a file changed: a value or a Problem, no exception, no other size."""
    raw = bytearray(Path(get_testdata_file(name, download=False)).read_bytes())
    refs = refs_of("", [get_testdata_file(name, download=False)], fast=False)
    raw[place % len(raw)] = value
    path = tmp_path_factory.mktemp("mutant") / "image.dcm"
    path.write_bytes(raw)
    shape = (refs.rows[0], refs.columns[0])

    good, problems = read_images(
        "", replace(refs, path=(str(path),)), np.zeros((1, *shape), "<f4"), layout_of(shape, "<f4")
    )

    assert good[0] == (not problems)


# --- decoders -------------------------------------------------------------------------------------


def test_every_transfer_syntax_of_pydicom_has_one_decoder():
    """All that pydicom decodes, and none of them by GDCM."""
    from pydicom.pixels.decoders import base

    assert {str(uid) for uid in base._PIXEL_DATA_DECODERS} <= set(DECODERS)
    assert {decoder.module for decoder in DECODERS.values()} == {
        "numpy", "zlib", "PIL", "imagecodecs",
    }  # fmt: skip
    assert missing_decoders(DECODERS) == {}


def test_jpeg_extended_has_a_decoder_for_each_depth(monkeypatch):
    """8 bits by Pillow; 12 bits by pylibjpeg where it is installed, else by imagecodecs."""
    assert decoder_for(JPEGExtended12Bit, 8).module == "PIL"
    for installed, expected in (({"libjpeg", "imagecodecs"}, "libjpeg"), (set(), "imagecodecs")):
        monkeypatch.setattr(decoders, "_is_importable", installed.__contains__)
        assert decoder_for(JPEGExtended12Bit, 16).module == expected


def test_twelve_bit_jpeg_differs_by_one_grey_level_between_its_decoders(monkeypatch):
    """What is recorded as the version of the decoder matters, but little."""
    pytest.importorskip("libjpeg")
    path = Path(get_testdata_file("JPGExtended.dcm", download=False))
    by_pylibjpeg = decode_frame(path, 0).astype(int)
    found = decoders._is_importable
    monkeypatch.setattr(
        decoders, "_is_importable", lambda module: module != "libjpeg" and found(module)
    )

    by_imagecodecs = decode_frame(path, 0)

    assert 0 < np.abs(by_imagecodecs - by_pylibjpeg).max() <= 1


def test_versions_of_the_decoders_are_known():
    """For the provenance of a file."""
    versions = decoder_versions()

    assert versions["pydicom"] == pydicom.__version__
    assert {"pillow", "imagecodecs"} <= set(versions)


def test_the_size_in_a_codestream_equals_the_headers(shared_data):
    """JPEG, JPEG-LS and JPEG 2000 of all files that have one."""
    compared = Counter()
    found = [*get_testdata_files(), *(shared_data / "transfer_syntax").rglob("*.dcm")]
    for file in (path for path in found if Path(path).is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(file, force=True)
            syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "")
            decoder = DECODERS.get(syntax)
            if decoder is None or decoder.gives != "codestream":
                continue
            if Path(file).name in UNREADABLE or "PixelData" not in dataset:
                continue
            try:
                frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
            except ValueError:
                continue
        assert codestream_size(frame) == (dataset.Rows, dataset.Columns), file
        compared[syntax] += 1
    assert len(compared) >= 8


@given(st.binary(max_size=80), st.sampled_from([b"\xff\xd8", b"\xff\x4f\xff\x51", b""]))
def test_the_size_of_junk_is_a_size_or_none(junk, start):
    """No exception, no endless loop."""
    size = codestream_size(start + junk)

    assert size is None or len(size) == 2


def test_silence_holds_in_all_threads_and_ends_with_the_last():
    """The first to leave does not turn warnings on for the second, nor the second off for ever."""
    before = list(warnings.filters)
    entered, leave = threading.Barrier(2), threading.Event()
    heard = []

    def second():
        with quiet():
            entered.wait()
            leave.wait()
            with warnings.catch_warnings(record=False):
                heard.append(warnings.filters[0][0])

    thread = threading.Thread(target=second)
    with quiet():
        thread.start()
        entered.wait()
    leave.set()
    thread.join()

    assert heard == ["ignore"]
    assert warnings.filters == before
