"""DICOM SEG: published voxel counts, third-party label maps, and generated files with defects."""

from __future__ import annotations

import csv
import gzip
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID

from parallel_dicomseg.dicom.headers import scan_headers
from parallel_dicomseg.records import AnnotationRefs, Reason, ScannedFile, ScanOptions, SliceRefs
from parallel_dicomseg.sources import seg
from parallel_dicomseg.volumes import order_volumes

ENCODINGS = ("", "_j2k", "_rle", "_deflate")
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TYPES = {"unsigned char": "u1", "short": "<i2", "float": "<f4", "double": "<f8"}

# --- helpers -------------------------------------------------------------------------------------


def scan(root, only=None):
    """Images of a tree in the order of the output, and the other files."""
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    scanned = scan_headers(root, [path for path in paths if only is None or path in only])
    ordered = order_volumes(scanned.slices)
    return replace(scanned.slices.take(ordered.index), volume=ordered.volume), scanned.files


def all_slices(images):
    """References to every image."""
    n = len(images)
    geometry = np.concatenate(
        [images.image_position_patient, images.image_orientation_patient, images.pixel_spacing], 1
    )
    return SliceRefs(
        path=tuple(path.decode() for path in images.path.tolist()),
        frame=tuple(images.frame.tolist()),
        file_size=tuple(images.file_size.tolist()),
        pixel_offset=(-1,) * n,
        pixel_length=(-1,) * n,
        stored_dtype=("",) * n,
        bits_stored=(16,) * n,
        rescale_slope=(1.0,) * n,
        rescale_intercept=(0.0,) * n,
        rows=tuple(images.rows.tolist()),
        columns=tuple(images.columns.tolist()),
        photometric_interpretation=("MONOCHROME2",) * n,
        plane_geometry=tuple(map(tuple, geometry.tolist())),
        grid=((0.0, 0.0, 1.0, 1.0),) * n,
        annotated=(0,) * n,
    )


def references(annotations):
    """Each annotation as a structure of its own."""
    rows = sorted(
        (int(row), s, a.path, int(offset), int(length))
        for s, a in enumerate(annotations)
        for row, offset, length in zip(a.slice, a.offset, a.length, strict=True)
    )
    plane, structure, path, offset, length = zip(*rows, strict=True) if rows else ((),) * 5
    return AnnotationRefs(
        plane, structure, (0,) * len(rows), ("seg",) * len(rows), path, offset, length
    )


def draw(root, found, images):
    """(annotations, n, rows, columns) masks, and what `read` gave."""
    refs = references(found.annotations)
    drawn = seg.read(str(root), all_slices(images), refs, contour_origin=0.0)
    shape = (len(found.annotations), len(images), images.rows.max(), images.columns.max())
    masks = np.zeros(shape, bool)
    for bitmap in drawn.bitmaps:
        rows, columns = bitmap.mask.shape
        masks[bitmap.structure, bitmap.plane, :rows, :columns] |= bitmap.mask
    return masks, drawn


def convert(root, options=None, only=None):
    """Images, what was found on them and all masks."""
    images, files = scan(root, only)
    found = seg.find(str(root), files, images, options or ScanOptions())
    return images, found, draw(root, found, images)


def read_nrrd(path):
    """(slices, rows, columns) of a NRRD file with raw or gzip data."""
    header, _, data = path.read_bytes().partition(b"\n\n")
    fields = dict(re.findall(r"^([\w ]+): (.*)$", header.decode(), re.MULTILINE))
    sizes = [int(size) for size in fields["sizes"].split()]
    raw = gzip.decompress(data) if fields["encoding"] == "gzip" else data
    return np.frombuffer(raw, TYPES[fields["type"]]).reshape(sizes[::-1])


def item(**values):
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def new_file(path, sop_class, uid):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class), UID(uid)
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID(sop_class), UID(uid)
    dataset.PatientID, dataset.StudyInstanceUID = "somebody", UID("1.2.3")
    dataset.FrameOfReferenceUID = UID("1.2.3.9")
    return dataset


def write_image(
    path, *, number, position, shape, spacing=(1.0, 1.0), orientation=AXIAL, series="1.2.3.4"
):
    """A CT image; its SOP Instance UID is series.number."""
    dataset = new_file(path, "1.2.840.10008.5.1.4.1.1.2", f"{series}.{number}")
    dataset.SeriesInstanceUID, dataset.Modality = UID(series), "CT"
    dataset.InstanceNumber = number
    if position is not None:
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position), [*orientation]
        dataset.PixelSpacing = list(spacing)
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = np.zeros(shape, np.uint16).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def write_seg(
    path,
    frames,
    *,
    kind="BINARY",
    labels=("one",),
    spacing=(1.0, 1.0),
    orientation=AXIAL,
    maximum=255,
    change=None,
):
    """A SEG of frames (segment number, position or None, stored values, referred UID or '')."""
    dataset = new_file(path, SEGMENTATION, f"1.2.3.5.{abs(hash(path.name)) % 10**8}")
    dataset.Modality, dataset.SeriesInstanceUID = "SEG", UID("1.2.3.5")
    values = np.array([frame[2] for frame in frames])
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = values.shape
    bits = {"BINARY": 1, "FRACTIONAL": 8, "LABELMAP": values.dtype.itemsize * 8}[kind]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    dataset.SegmentationType = kind
    if kind == "FRACTIONAL":
        dataset.MaximumFractionalValue, dataset.SegmentationFractionalType = maximum, "PROBABILITY"
    dataset.SegmentSequence = [
        item(SegmentNumber=k, SegmentLabel=label) for k, label in enumerate(labels, 1)
    ]
    shared = item(PixelMeasuresSequence=[item(PixelSpacing=list(spacing))])
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[*orientation])]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = [functional_group(kind, *f) for f in frames]
    raw = np.packbits(values.ravel(), bitorder="little") if bits == 1 else values
    raw = raw.tobytes()
    dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    dataset["PixelData"].VR = "OB" if bits <= 8 else "OW"
    if change:
        change(dataset)
    dataset.save_as(path, enforce_file_format=True)


def functional_group(kind, segment, position, values, uid):
    group = Dataset()
    if kind != "LABELMAP":
        group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=segment)]
    if position is not None:
        group.PlanePositionSequence = [item(ImagePositionPatient=list(position))]
    if uid:
        source = item(ReferencedSOPClassUID=UID("1.2.840.10008.5.1.4.1.1.2"))
        source.ReferencedSOPInstanceUID = UID(uid)
        group.DerivationImageSequence = [item(SourceImageSequence=[source])]
    return group


def random_masks(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, *shape)).astype(np.uint8)


@pytest.fixture
def three_images(tmp_path):
    """A tree with three 5 x 3 images at z = 0, 2 and 4 mm."""
    for k in range(3):
        write_image(tmp_path / f"{k}.dcm", number=k, position=(0, 0, 2 * k), shape=(5, 3))
    return tmp_path


# --- real files ----------------------------------------------------------------------------------


def test_voxels_of_every_segment_are_the_published_ones(shared_data):
    """All SEG files with images beside them give the voxel counts of expected_segments.csv."""
    root = shared_data / "dicom_seg"
    _, found, (masks, drawn) = convert(root)
    with (root / "expected_segments.csv").open() as file:
        expected = {
            (row["file"].split("dicom_seg/")[1], row["label"]): int(row["nonzero_voxels"])
            for row in csv.DictReader(file)
        }
    counts = {(a.path, a.name): int(masks[s].sum()) for s, a in enumerate(found.annotations)}
    without_image = {"highdicom/seg_image_cr_binary.dcm"}

    assert counts == {key: n for key, n in expected.items() if key[0] not in without_image}
    assert [(p.path, p.reason) for p in found.problems] == [
        (path, Reason.ANNOTATION_WITHOUT_IMAGES) for path in sorted(without_image)
    ]
    assert not drawn.problems


def test_masks_equal_third_party_label_maps(shared_data):
    """The masks are those of dcmqi's NRRD label maps, voxel for voxel."""
    root = shared_data / "dicom_seg"
    _, found, (masks, _) = convert(root)
    maps = {
        "dcmqi/23x38x3/seg/label.seg": {"dcmqi/23x38x3/nrrd/label.nrrd": [1]},
        "dcmqi/24x38x3/seg/label.seg": {"dcmqi/24x38x3/nrrd/label.nrrd": [1]},
        "dcmqi/liver.dcm": {"dcmqi/liver_seg.nrrd": [1]},
        "dcmqi/partial_overlaps.dcm": {
            "dcmqi/partial_overlaps-1.nrrd": [1, 4, 5],
            "dcmqi/partial_overlaps-2.nrrd": [2],
            "dcmqi/partial_overlaps-3.nrrd": [3],
        },
    }
    compared = 0
    for path, truths in maps.items():
        segments = [s for s, a in enumerate(found.annotations) if a.path == path]
        for nrrd, numbers in truths.items():
            truth = read_nrrd(root / nrrd)
            _, rows, columns = truth.shape
            for number in numbers:
                s = segments[number - 1]
                mask = masks[s, found.annotations[s].looked_at, :rows, :columns]
                assert (mask == (truth == number)).all()
                compared += int(mask.sum())

    assert compared == 322 + 315 + 107098 + 9602 + 11888 + 10743 + 6693 + 4713


def test_masks_equal_those_of_highdicom(shared_data):
    """Overlapping segments, frame by frame, equal what highdicom gives for each source image."""
    import highdicom

    path = "highdicom/seg_image_ct_binary_overlap.dcm"
    root = shared_data / "dicom_seg"
    images, found, (masks, _) = convert(root)
    segmentation = highdicom.seg.segread(root / path)
    mine = [s for s, a in enumerate(found.annotations) if a.path == path]
    rows = found.annotations[mine[0]].looked_at
    uids = [images.sop_instance_uid[row].decode() for row in rows]
    theirs = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)

    assert theirs.any()
    for k, s in enumerate(mine):
        assert (masks[s, rows, :16, :16] == theirs[..., k]).all()


def test_annotations_say_how_they_were_found(shared_data):
    """Frames that refer to images that are there are found by reference, on their own volume."""
    images, found, _ = convert(shared_data / "dicom_seg")
    by_path = {a.path: a for a in found.annotations}
    overlap = by_path["highdicom/seg_image_ct_binary_overlap.dcm"]

    assert overlap.found_by == "reference"
    assert len(overlap.looked_at) == 4
    assert len(set(images.series_instance_uid[overlap.looked_at].tolist())) == 1


def test_segment_of_an_image_without_geometry(shared_data, tmp_path):
    """A projection image has no planes: the frame of its size that refers to it is its mask."""
    source = Path(get_testdata_file("dicomdirtests/77654033/CR1/6154"))
    shutil.copy(source, tmp_path / "image")
    shutil.copy(shared_data / "dicom_seg/highdicom/seg_image_cr_binary.dcm", tmp_path / "seg")
    images, found, (masks, drawn) = convert(tmp_path)

    assert len(images) == 1
    assert [a.found_by for a in found.annotations] == ["reference"]
    assert masks.sum() == 151
    assert not drawn.problems


def test_ibsi_phantom_of_twenty_bit_frames(shared_data):
    """A multi-frame image and a SEG without references: 74 voxels, equal to the NIfTI mask."""
    import nibabel

    root = shared_data / "ibsi_digital_phantom"
    _, found, (masks, _) = convert(root)
    nifti = nibabel.load(root / "nifti/mask/mask.nii.gz")
    truth = np.asarray(nifti.dataobj).astype(bool)
    per_slice = sorted(masks[0].sum(axis=(1, 2)).tolist())

    assert [(a.name, len(a.slice)) for a in found.annotations] == [("ROI", 4)]
    assert masks.sum() == truth.sum() == 74
    assert any(
        sorted(truth.sum(axis=tuple({0, 1, 2} - {axis})).tolist()) == per_slice for axis in range(3)
    )


@pytest.mark.parametrize(
    "encoding",
    [*ENCODINGS, "_expb", *(f"_nonbyte_aligned{encoding}" for encoding in ENCODINGS)],
)
def test_every_transfer_syntax_gives_the_same_segment(shared_data, tmp_path, encoding):
    """One segment in nine encodings, on its CT: 107098 voxels each."""
    name = f"liver{encoding}.dcm"
    for k in (1, 2, 3):
        shutil.copy(shared_data / f"dicom_seg/dcmqi/ct-3slice/0{k}.dcm", tmp_path)
    shutil.copy(shared_data / "transfer_syntax/pydicom_data" / name, tmp_path)
    _, found, (masks, drawn) = convert(tmp_path)

    assert masks.sum() == 107098
    assert [p.reason for p in found.problems] == [p[1] for p in drawn.problems] == []
