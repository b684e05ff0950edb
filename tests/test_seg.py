"""DICOM SEG: published voxel counts, third-party label maps, and generated files with defects."""

from __future__ import annotations

import csv
import gzip
import re
import shutil
from dataclasses import replace
from itertools import combinations
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
    """A data set of a few attributes."""
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def new_file(path, sop_class, uid):
    """A data set with what every file has."""
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
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = (
            list(position),
            [*orientation],
        )
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
    """A SEG of frames (segment number, position or None, stored values, referred UID[#frame])."""
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


def functional_group(kind, segment, position, _, uid):
    """What is said of one frame alone."""
    group = Dataset()
    if kind != "LABELMAP":
        group.SegmentIdentificationSequence = [item(ReferencedSegmentNumber=segment)]
    if position is not None:
        group.PlanePositionSequence = [item(ImagePositionPatient=list(position))]
    if uid:
        source = item(ReferencedSOPClassUID=UID("1.2.840.10008.5.1.4.1.1.2"))
        uid, _, frame = uid.partition("#")
        source.ReferencedSOPInstanceUID = UID(uid)
        if frame:
            source.ReferencedFrameNumber = int(frame)
        group.DerivationImageSequence = [item(SourceImageSequence=[source])]
    return group


def random_masks(count, shape, seed=0):
    """(count, *shape) of 0 and 1."""
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
    # slices run along y, rows along z, columns along x; NIfTI's x and y point the other way
    mine = masks[0].transpose(2, 0, 1)
    flips = [axes for n in range(4) for axes in combinations(range(3), n)]

    assert [(a.name, len(a.slice)) for a in found.annotations] == [("ROI", 4)]
    assert masks.sum() == 74
    assert any((mine == np.flip(truth, axes)).all() for axes in flips)


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


# --- frames and bits -----------------------------------------------------------------------------


def slow_frame(raw, frame, shape):
    """The twin: one bit after another, the lowest of each byte first."""
    pixels = shape[0] * shape[1]
    bits = [(raw[k // 8] >> (k % 8)) & 1 for k in range(frame * pixels, (frame + 1) * pixels)]
    return np.array(bits, bool).reshape(shape)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    frames=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_frames_that_are_not_byte_aligned(tmp_path, shape, frames, seed):
    """Any frame of any size is cut out of the packed bits as bit by bit counting does it."""
    path = tmp_path / f"{shape}-{frames}-{seed}.dcm"
    values = random_masks(frames, shape, seed)
    write_seg(path, [(1, (0, 0, k), values[k], "") for k in range(frames)])
    slices = one_size_slices(frames, shape)
    order = range(frames - 1, -1, -1)
    refs = AnnotationRefs(
        tuple(order),
        (0,) * frames,
        (0,) * frames,
        ("seg",) * frames,
        (path.name,) * frames,
        tuple(order),
        (1,) * frames,
    )
    drawn = seg.read(str(tmp_path), slices, refs, contour_origin=0.0)
    masks = {bitmap.plane: bitmap.mask for bitmap in drawn.bitmaps}
    raw = dcmread(path).PixelData

    assert not drawn.problems
    for k in range(frames):
        expected = slow_frame(raw, k, shape)
        assert (masks.get(k, np.zeros(shape, bool)) == expected).all()
        assert (expected == values[k]).all()


def one_size_slices(n, shape, spacing=(1.0, 1.0), origin=(0.0, 0.0), orientation=AXIAL):
    """References to n axial images, 1 mm apart, that need not exist."""
    plane = [(*origin, float(k), *orientation, *spacing) for k in range(n)]
    return SliceRefs(
        path=("",) * n,
        frame=(0,) * n,
        file_size=(0,) * n,
        pixel_offset=(-1,) * n,
        pixel_length=(-1,) * n,
        stored_dtype=("",) * n,
        bits_stored=(16,) * n,
        rescale_slope=(1.0,) * n,
        rescale_intercept=(0.0,) * n,
        rows=(shape[0],) * n,
        columns=(shape[1],) * n,
        photometric_interpretation=("MONOCHROME2",) * n,
        plane_geometry=tuple(plane),
        grid=((0.0, 0.0, 1.0, 1.0),) * n,
        annotated=(0,) * n,
    )


def read_one(root, path, slices, length=1):
    """The mask and problems of the first frame of a file on the first slice."""
    refs = AnnotationRefs((0,), (0,), (0,), ("seg",), (path,), (0,), (length,))
    drawn = seg.read(str(root), slices, refs, contour_origin=0.0)
    masks = [bitmap.mask for bitmap in drawn.bitmaps]
    return (masks[0] if masks else None), drawn


def slow_nearest(mask, own, shape, image):
    """The twin: for each pixel of the image, the pixel of the frame that is nearest in mm."""
    result = np.zeros(shape, bool)
    for row, column in np.ndindex(*shape):
        point = centre(image, row, column)
        distances = [
            (np.linalg.norm(centre(own, r, c) - point), r, c) for r, c in np.ndindex(*mask.shape)
        ]
        _, r, c = min(distances)
        within = np.abs(centre(own, r, c) - point)[:2] <= np.array(own[2])[::-1] / 2 + 1e-9
        result[row, column] = within.all() and mask[r, c]
    return result


def centre(grid, row, column):
    """Patient coordinates of a pixel; a grid is origin, direction of rows and columns, spacing."""
    origin, signs, spacing = grid
    return np.array(
        [origin[0] + signs[0] * column * spacing[1], origin[1] + signs[1] * row * spacing[0]]
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    own_shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shift=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    signs=st.tuples(st.sampled_from([1, -1]), st.sampled_from([1, -1])),
    spacing=st.sampled_from([(1.0, 1.0), (2.0, 1.0), (0.7, 0.7), (1.5, 0.6)]),
    seed=st.integers(0, 9),
)
def test_a_segment_on_another_grid_is_brought_to_the_image(
    tmp_path, own_shape, shape, shift, signs, spacing, seed
):
    """Another origin, spacing, size or direction: each pixel takes the segment's nearest one."""
    mask = random_masks(1, own_shape, seed)[0]
    # a third of a millimetre: no two pixels are equally near
    origin = (shift[0] + 0.31, shift[1] + 0.27)
    orientation = (signs[0], 0, 0, 0, signs[1], 0)
    path = tmp_path / f"{abs(hash((own_shape, origin, signs, spacing, seed)))}.dcm"
    write_seg(path, [(1, (*origin, 0), mask, "")], spacing=spacing, orientation=orientation)
    found, drawn = read_one(tmp_path, path.name, one_size_slices(1, shape))
    expected = slow_nearest(
        mask.astype(bool), (origin, signs, spacing), shape, ((0, 0), (1, 1), (1, 1))
    )
    outside = sum(
        not (-0.5 <= x < shape[1] - 0.5 and -0.5 <= y < shape[0] - 0.5)
        for x, y in (centre((origin, signs, spacing), r, c) for r, c in np.argwhere(mask))
    )

    assert ((np.zeros(shape, bool) if found is None else found) == expected).all()
    assert [p[1] for p in drawn.problems] == [Reason.CONTOUR_WITHOUT_IMAGE] * bool(outside)
    if outside:
        assert drawn.problems[0][2].startswith(f"{outside} of {mask.sum()} pixels")


def test_nearly_the_same_grid_is_the_same_grid(tmp_path):
    """A spacing that differs in the fifth digit moves no pixel, also at the far edge."""
    mask = random_masks(1, (256, 256))[0]
    write_seg(tmp_path / "s", [(1, (0, 0, 0), mask, "")], spacing=(2.024902, 2.024902))
    found, _ = read_one(tmp_path, "s", one_size_slices(1, (256, 256), spacing=(2.025, 2.025)))

    assert (found == mask).all()


def test_rows_and_columns_may_change_places(tmp_path):
    """A segment whose rows run along the image's columns is transposed."""
    mask = random_masks(1, (4, 6))[0]
    write_seg(tmp_path / "s", [(1, (0, 0, 0), mask, "")], orientation=(0, 1, 0, 1, 0, 0))
    found, _ = read_one(tmp_path, "s", one_size_slices(1, (6, 4)))

    assert (found == mask.T).all()


# --- kinds of segmentation -----------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "smallest"), [(0.0, 1), (0.25, 26), (0.5, 51), (0.999, 100)])
def test_fractional_values_above_the_threshold_are_in(three_images, threshold, smallest):
    """A pixel is in where its value exceeds threshold x MaximumFractionalValue, here 100."""
    values = np.array([[0, 1, 25], [26, 50, 51], [75, 76, 99], [100, 0, 0], [0, 0, 0]], np.uint8)
    write_seg(three_images / "seg", [(1, (0, 0, 2), values, "")], kind="FRACTIONAL", maximum=100)
    _, found, (masks, _) = convert(three_images, ScanOptions(fractional_threshold=threshold))

    assert found.annotations[0].length.tolist() == [smallest]
    assert (masks[0, 1] == (values > threshold * 100)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_map_values_are_segment_numbers(three_images, dtype):
    """In a LABELMAP every frame holds all segments, each by its number."""
    values = np.random.default_rng(1).integers(0, 4, (2, 5, 3)).astype(dtype)
    frames = [(0, (0, 0, 4 * k), values[k], "") for k in range(2)]
    write_seg(three_images / "seg", frames, kind="LABELMAP", labels="abc")
    _, found, (masks, drawn) = convert(three_images)

    assert [a.name for a in found.annotations] == ["a", "b", "c"]
    for s, annotation in enumerate(found.annotations):
        assert annotation.slice.tolist() == [0, 2]
        assert (masks[s, [0, 2]] == (values == s + 1)).all()
    assert not masks[:, 1].any()
    assert not drawn.problems


def test_label_map_with_a_number_of_no_segment(three_images):
    """A value that is no segment's number is reported once per frame; the segments are drawn."""
    values = np.array([[0, 1, 2]] * 5, np.uint8)
    write_seg(three_images / "seg", [(0, (0, 0, 0), values, "")], kind="LABELMAP", labels="a")
    _, _, (masks, drawn) = convert(three_images)

    assert masks.sum() == 5
    assert [(p[1], "pixels of 2" in p[2]) for p in drawn.problems] == [(Reason.BAD_CONTOUR, True)]


def test_segments_of_one_label_are_annotations_of_one_name(three_images):
    """Ten segments with one label stay ten annotations, for the choice of structures to merge."""
    mask = np.ones((5, 3), np.uint8)
    frames = [(k + 1, (0, 0, 2 * (k % 3)), mask, "") for k in range(10)]
    write_seg(three_images / "seg", frames, labels=["node"] * 9 + [" "])
    _, found, _ = convert(three_images)

    assert [a.name for a in found.annotations] == ["node"] * 9 + ["segment 10"]
    assert [a.slice.tolist() for a in found.annotations] == [[k % 3] for k in range(10)]


def test_overlapping_segments_both_have_their_pixels(three_images):
    """A pixel of two segments is in the masks of both."""
    one, two = random_masks(2, (5, 3))
    write_seg(three_images / "s", [(1, (0, 0, 0), one, ""), (2, (0, 0, 0), two, "")], labels="ab")
    _, _, (masks, _) = convert(three_images)

    assert (masks[:, 0] == [one, two]).all()


def test_empty_and_missing_frames_are_the_same(three_images):
    """The whole volume was looked at; an empty frame has no bitmap, and digest 0."""
    empty, full = np.zeros((5, 3), np.uint8), np.ones((5, 3), np.uint8)
    write_seg(three_images / "s", [(1, (0, 0, 0), empty, ""), (1, (0, 0, 2), full, "")])
    _, found, (masks, drawn) = convert(three_images)

    assert found.annotations[0].looked_at.tolist() == [0, 1, 2]
    assert (drawn.digest != 0).tolist() == [False, True]
    assert masks.sum(axis=(0, 2, 3)).tolist() == [0, 15, 0]


# --- pairing -------------------------------------------------------------------------------------


def test_frames_between_and_beyond_the_images_are_counted(three_images):
    """A frame that lies on no image never moves to one; each segment says how many do."""
    mask = np.ones((5, 3), np.uint8)
    heights = (0, 1, 2, 6, -2)
    write_seg(three_images / "s", [(1, (0, 0, z), mask, "") for z in heights])
    _, found, (masks, _) = convert(three_images)

    assert masks.sum(axis=(0, 2, 3)).tolist() == [15, 15, 0]
    assert [(p.reason, p.detail) for p in found.problems] == [
        (Reason.CONTOUR_WITHOUT_IMAGE, "3 of 5 frames of segment 'one' lie on no image")
    ]


def test_a_reference_to_an_image_in_another_plane_is_not_believed(three_images):
    """The frame lies at z = 4 and refers to the image at z = 0: its plane decides."""
    mask = np.ones((5, 3), np.uint8)
    write_seg(three_images / "s", [(1, (0, 0, 4), mask, "1.2.3.4.0")])
    _, found, _ = convert(three_images)

    assert found.annotations[0].slice.tolist() == [2]
    assert found.annotations[0].found_by == "reference"


def test_of_images_in_one_plane_the_one_that_is_referred_to(tmp_path):
    """Two series in the same planes: a reference chooses, without one nobody can say."""
    for series in ("1.2.3.4", "1.2.3.6"):
        for k in range(2):
            write_image(
                tmp_path / f"{series}-{k}",
                number=k,
                position=(0, 0, k),
                shape=(2, 2),
                series=series,
            )
    mask = np.ones((2, 2), np.uint8)
    write_seg(tmp_path / "referring", [(1, (0, 0, 0), mask, "1.2.3.6.0")])
    write_seg(tmp_path / "silent", [(1, (0, 0, 0), mask, "")])
    images, found, _ = convert(tmp_path)

    assert [a.path for a in found.annotations] == ["referring"]
    chosen = images.sop_instance_uid[found.annotations[0].slice].tolist()
    assert chosen == [b"1.2.3.6.0"]
    assert [(p.path, p.reason) for p in found.problems] == [("silent", Reason.AMBIGUOUS_IMAGE)]


def test_a_segment_may_span_two_series(tmp_path):
    """Two slabs of one stack that the frames refer to: each frame lies on its own image."""
    for k in range(4):
        series = f"1.2.{8 + k // 2}"
        write_image(
            tmp_path / f"{k}", number=k, position=(0, 0, 2 * k), shape=(5, 3), series=series
        )
    frames = random_masks(4, (5, 3))
    said = [(1, (0, 0, 2 * k), frames[k], f"1.2.{8 + k // 2}.{k}") for k in range(4)]
    write_seg(tmp_path / "seg", said)
    _, found, (masks, _) = convert(tmp_path)
    write_seg(tmp_path / "seg", [(*frame[:3], "") for frame in said])
    _, unsaid, _ = convert(tmp_path)

    assert [a.looked_at.tolist() for a in found.annotations] == [[0, 1], [2, 3]]
    assert (masks.any(axis=0) == frames).all()
    assert found.problems == ()
    assert unsaid.annotations == ()
    assert [p.reason for p in unsaid.problems] == [Reason.AMBIGUOUS_IMAGE]


def test_no_image_at_all(tmp_path):
    """A SEG whose images are elsewhere is one problem."""
    write_image(tmp_path / "0", number=0, position=(0, 0, 500), shape=(2, 2))
    write_seg(tmp_path / "s", [(1, (0, 0, 0), np.ones((2, 2), np.uint8), "")])
    _, found, _ = convert(tmp_path)

    assert not found.annotations
    assert [p.reason for p in found.problems] == [Reason.ANNOTATION_WITHOUT_IMAGES]


def test_a_frame_without_plane_needs_an_image_of_its_size(tmp_path):
    """Without geometry only the referred image of equal rows and columns can be meant."""
    write_image(tmp_path / "0", number=0, position=None, shape=(2, 2))
    write_image(tmp_path / "1", number=1, position=None, shape=(3, 2))
    mask = np.ones((2, 2), np.uint8)
    write_seg(tmp_path / "s", [(1, None, mask, "1.2.3.4.0"), (1, None, mask, "1.2.3.4.1")])
    images, found, (masks, _) = convert(tmp_path)

    assert found.annotations[0].offset.tolist() == [0]
    assert images.instance_number[found.annotations[0].looked_at].tolist() == [0]
    assert masks.sum() == 4
    assert [p.reason for p in found.problems] == [Reason.CONTOUR_WITHOUT_IMAGE]


def test_single_images_and_one_of_many_frames_are_alike(shared_data, tmp_path):
    """The SEG refers to single images, of which only a multi-frame conversion is there."""
    folder = shared_data / "dicom_seg/dcmqi/23x38x3"
    shutil.copy(folder / "multiframe/mf.dcm", tmp_path)
    shutil.copy(folder / "seg/label.seg", tmp_path)
    _, found, (masks, _) = convert(tmp_path)
    truth = read_nrrd(folder / "nrrd/label.nrrd") == 1

    assert [a.found_by for a in found.annotations] == ["frame-of-reference"]
    assert (masks[0] == truth).all()


def test_a_reference_may_name_the_frame_of_an_image(shared_data, tmp_path):
    """Frames without a plane that refer to frames 3 and 1 of a multi-frame image."""
    shutil.copy(shared_data / "dicom_seg/dcmqi/23x38x3/multiframe/mf.dcm", tmp_path)
    uid = dcmread(tmp_path / "mf.dcm").SOPInstanceUID
    values = random_masks(3, (38, 23))
    references = (f"{uid}#3", f"{uid}#1", uid)
    frames = [(1, None, *both) for both in zip(values, references, strict=True)]
    write_seg(tmp_path / "s", frames)
    images, found, (masks, _) = convert(tmp_path)
    (annotation,) = found.annotations

    assert annotation.offset.tolist() == [0, 1]
    assert images.frame[annotation.slice].tolist() == [2, 0]
    assert (masks[0, annotation.slice] == values[:2]).all()
    assert [p.detail for p in found.problems] == ["1 of 3 frames of segment 'one' lie on no image"]


def deflate(dataset):
    """Everything after the meta header is deflated (PS3.5 A.5)."""
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1.99")


def test_a_deflated_data_set(three_images):
    """Pixels that have no place in the file are kept with the header."""
    values = random_masks(3, (5, 3))
    frames = [(1, (0, 0, 2 * k), values[k], "") for k in range(3)]
    write_seg(three_images / "s", frames, change=deflate)
    _, _, (masks, drawn) = convert(three_images)

    assert (masks[0] == values).all()
    assert not drawn.problems


# --- defects -------------------------------------------------------------------------------------


def shorten(dataset):
    """Two bytes of pixels are left."""
    dataset.PixelData = dataset.PixelData[:2]


def without_segments(dataset):
    """No segment is described."""
    del dataset.SegmentSequence


def wrong_count(dataset):
    """More frames than are described."""
    dataset.NumberOfFrames = 7


def other_type(dataset):
    """A type of a surface."""
    dataset.SegmentationType = "SURFACE"


def without_pixels(dataset):
    """The header alone."""
    del dataset.PixelData


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (without_segments, Reason.MISSING_TAG, "(0062,0002)"),
        (wrong_count, Reason.MISSING_TAG, "is 7"),
        (other_type, Reason.UNSUPPORTED_PIXELS, "(0062,0001)"),
        (without_pixels, Reason.MISSING_TAG, "(7FE0,0010)"),
    ],
)
def test_a_broken_header_is_one_problem(three_images, change, reason, words):
    """What is missing or impossible is named with its tag; the run goes on."""
    write_seg(three_images / "s", [(1, (0, 0, 0), np.ones((5, 3), np.uint8), "")], change=change)
    images, _ = scan(three_images)
    found = seg.find(str(three_images), [ScannedFile("s", SEGMENTATION, 0)], images, ScanOptions())

    assert not found.annotations
    assert [(p.path, p.reason) for p in found.problems] == [("s", reason)]
    assert words in found.problems[0].detail
    assert "somebody" not in found.problems[0].detail


def test_a_frame_cut_short_costs_only_itself(tmp_path):
    """The first frame is there, the third ends beyond the pixel data."""
    values = np.ones((3, 3, 3), np.uint8)
    frames = [(1, (0, 0, k), values[k], "") for k in range(3)]
    write_seg(tmp_path / "s", frames, change=shorten)
    refs = AnnotationRefs((0, 2), (0, 0), (0, 0), ("seg", "seg"), ("s", "s"), (0, 2), (1, 1))
    drawn = seg.read(str(tmp_path), one_size_slices(3, (3, 3)), refs, contour_origin=0.0)

    assert [b.plane for b in drawn.bitmaps] == [0]
    assert [p[:2] for p in drawn.problems] == [(1, Reason.PIXEL_DATA_SHORT)]
    assert (drawn.digest != 0).tolist() == [True, False]


def test_values_beyond_the_maximum_are_refused(tmp_path):
    """A fractional value above MaximumFractionalValue means that something is wrong."""
    values = np.array([[0, 200]], np.uint8)
    write_seg(tmp_path / "s", [(1, (0, 0, 0), values, "")], kind="FRACTIONAL", maximum=128)
    mask, drawn = read_one(tmp_path, "s", one_size_slices(1, (1, 2)))

    assert mask is None
    assert drawn.problems == (
        (0, Reason.BAD_CONTOUR, "frame 1 has a pixel of 200, the largest allowed is 128"),
    )


def test_a_file_that_changed_or_went(tmp_path):
    """A frame that is not there any more, and a file that is gone, are problems of the task."""
    write_seg(tmp_path / "s", [(1, (0, 0, 0), np.ones((2, 2), np.uint8), "")])
    kinds = ("seg", "seg")
    refs = AnnotationRefs((0, 0), (0, 0), (0, 0), kinds, ("s", "gone"), (5, 0), (1, 1))
    drawn = seg.read(str(tmp_path), one_size_slices(1, (2, 2)), refs, contour_origin=0.0)

    assert [p[:2] for p in drawn.problems] == [
        (0, Reason.FILE_CHANGED),
        (1, Reason.UNREADABLE_FILE),
    ]
    assert not list(drawn.bitmaps)


def test_damaged_compressed_frames_are_problems(shared_data, tmp_path):
    """Bytes of a JPEG 2000 frame overwritten: undecodable, and no crash."""
    raw = bytearray((shared_data / "transfer_syntax/pydicom_data/liver_j2k.dcm").read_bytes())
    raw[-2500:-200] = bytes(2300)
    (tmp_path / "s").write_bytes(raw)
    refs = AnnotationRefs(
        (0,) * 3, (0,) * 3, (0,) * 3, ("seg",) * 3, ("s",) * 3, (0, 1, 2), (1,) * 3
    )
    drawn = seg.read(str(tmp_path), one_size_slices(1, (512, 512)), refs, contour_origin=0.0)

    assert drawn.problems
    assert {p[1] for p in drawn.problems} <= {Reason.UNDECODABLE_PIXELS, Reason.IMAGE_SIZE_DIFFERS}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), value=st.integers(0, 255), length=st.integers(1, 8))
def test_no_damage_makes_an_exception(three_images, place, value, length):
    """Overwritten bytes anywhere in a SEG give annotations or problems, never an exception."""
    path = three_images / "s"
    write_seg(path, [(1, (0, 0, 2 * k), np.ones((5, 3), np.uint8), "1.2.3.4.0") for k in range(3)])
    raw = bytearray(path.read_bytes())
    start = 132 + int(place * (len(raw) - 133))
    raw[start : start + length] = bytes([value]) * len(raw[start : start + length])
    path.write_bytes(raw)
    images, _ = scan(three_images, {"0.dcm", "1.dcm", "2.dcm"})
    files = [ScannedFile("s", SEGMENTATION, len(raw))]
    found = seg.find(str(three_images), files, images, ScanOptions())
    draw(three_images, found, images)

    assert found.annotations or found.problems
    assert not any("somebody" in problem.detail for problem in found.problems)


def test_recognizes_by_the_sop_class():
    """SEG and label map SEG are ours, others not, whatever their name."""
    assert seg.recognizes(ScannedFile("a", SEGMENTATION, 0))
    assert seg.recognizes(ScannedFile("a", "1.2.840.10008.5.1.4.1.1.66.7", 0))
    assert not seg.recognizes(ScannedFile("a.seg", "", 0))
    assert not seg.recognizes(ScannedFile("a.dcm", "1.2.840.10008.5.1.4.1.1.66.5", 0))
