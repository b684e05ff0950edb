"""Small files made by the writer itself, for tests of what reads them."""

from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np

from parallel_dicomseg.checks import measure_intensity, measure_masks, raise_flags
from parallel_dicomseg.codec import checksums, checksums_of_file, encode
from parallel_dicomseg.records import (
    Checks,
    EncodedChunk,
    HeaderColumn,
    Layout,
    MarkTable,
    Measured,
    SliceTable,
)
from parallel_dicomseg.store import Hdf5Writer
from parallel_dicomseg.store.attributes import CHECKSUM, attributes_crc32c
from parallel_dicomseg.store.contents import CONTENTS, DIGEST, write_contents
from parallel_dicomseg.store.hdf5 import chunk_index
from parallel_dicomseg.store.sealing import seal_file

ROWS, COLUMNS = 40, 56

#: What names somebody in the slices below; none of it may be in a de-identified file.
IDENTITIES = (
    "DOE^JOHN",
    "ROE^JANE",
    "1.2.826.0.1.111",
    "1.2.826.0.1.222",
    "1.2.826.0.1.333",
    "DOE_folder",
    "20010203",
    "20011231",
    "Dr House",
)


def slices(n=10, **columns):
    """Two patients, a series each; the second one's has two volumes, the last with a gap."""
    second = np.arange(n) >= n // 2
    volume = second * 1 + (np.arange(n) >= n // 2 + 2)
    place = np.arange(n) - np.array([0, n // 2, n // 2 + 2])[volume]
    height = np.where(volume == 2, np.array([0.0, 2.0, 8.0, 10.0, 12.0] * n)[place], 2.5 * place)
    z = np.stack([0 * height - 10, 0 * height + 20, height], axis=1)
    usual = {
        "path": np.array([f"DOE_folder/{k}.dcm".encode() for k in range(n)]),
        "patient_id": np.where(second, b"ROE^JANE", b"DOE^JOHN"),
        "study_instance_uid": np.where(second, b"1.2.826.0.1.111.2", b"1.2.826.0.1.111.1"),
        "series_instance_uid": np.where(second, b"1.2.826.0.1.222.2", b"1.2.826.0.1.222.1"),
        "sop_instance_uid": np.array([f"1.2.826.0.1.333.{k}".encode() for k in range(n)]),
        "frame_of_reference_uid": np.where(second, b"", b"1.2.826.0.1.111.9"),
        "sop_class_uid": b"1.2.840.10008.5.1.4.1.1.4",
        "transfer_syntax_uid": b"1.2.840.10008.1.2.1",
        "image_type": b"ORIGINAL\\PRIMARY",
        "modality": np.where(second, b"MR", b"CT"),
        "split": np.where(second, b"test", b"train"),
        "volume": volume.astype(np.int32),
        "frame": np.zeros(n, np.int32),
        "rows": np.full(n, ROWS, np.int32),
        "columns": np.full(n, COLUMNS, np.int32),
        "bits_stored": np.full(n, 12, np.int32),
        "instance_number": np.arange(n)[::-1],
        "acquisition_number": np.full(n, -1),
        "temporal_position": np.where(second, place, np.nan),
        "image_position_patient": z,
        "image_orientation_patient": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        "pixel_spacing": (1.5, 1.25),
        "slice_thickness": 2.5,
        "rescale_slope": 1.0,
        "rescale_intercept": 0.0,
        "photometric_interpretation": b"MONOCHROME2",
        "annotated": np.zeros(n, np.uint64),
    }
    table = {field.name: np.zeros(n, np.int64) for field in fields(SliceTable)}
    for name, given in {**usual, **columns}.items():
        value = np.asarray(given)
        one_plane = name in ("image_orientation_patient", "pixel_spacing") and value.ndim == 1
        shape = (n, *value.shape) if one_plane or not value.ndim else value.shape
        table[name] = np.broadcast_to(value, shape).copy()
    return SliceTable(**table)


def headers(n=10):
    """A constant, a varying and a partly absent attribute, dates, and two that nobody allowed."""
    rows = np.arange(n, dtype=np.int32)
    second = (rows >= n // 2).astype(np.int32)
    same = np.zeros(n, np.int32)
    return {
        "StudyDate": HeaderColumn(np.array([b"20010203", b"20011231"]), second),
        "ContentDate": HeaderColumn(np.array([b"20010203", b"00000000"]), rows % 2),
        "ImageType": HeaderColumn(np.array([b"ORIGINAL\\PRIMARY "]), same),
        "BodyPartExamined": HeaderColumn(np.array([b"Dr House", b"HEART"]), second),
        "EchoTime": HeaderColumn(np.array([b"", b"2.50"]), second),
        "SliceLocation": HeaderColumn(np.array([f"{k}.5".encode() for k in range(n)]), rows),
        "PatientName": HeaderColumn(np.array([b"DOE^JOHN"]), same),
        "ReferringPhysicianName": HeaderColumn(np.array([b"Dr House"]), same),
    }


def marks():
    """Two points on slice 1, one on slice 7."""
    return MarkTable(
        slice=np.array([1, 1, 7]),
        name=np.array([b"nodule-reader-1", b"non-nodule-reader-2", b"tip"]),
        points_column_row=np.array([[3.0, 4.5], [10.0, -2.0], [30.25, 12.0]]),
    )


def pictures(n=10, samples=1, seed=5):
    """Images (n, rows, columns[, 3]) and masks of an inner disc (bit 0) in an outer one (bit 1)."""
    random = np.random.default_rng(seed)
    shape = (n, ROWS, COLUMNS) + ((samples,) if samples > 1 else ())
    images = random.integers(0, 900, shape).astype("<i2")
    row, column = np.indices((ROWS, COLUMNS))
    distance = np.hypot(row - 20, column - 28)
    radius = 8 + np.arange(n)[:, None, None] / 2
    masks = (distance < radius / 2) * 1 | (distance < radius) * 2
    return images, masks.astype("|u1")


def layout(n=10, **changes):
    """The layout of `pictures`."""
    usual = Layout(
        slices=n,
        rows=ROWS,
        columns=COLUMNS,
        image_dtype="<i2",
        mask_dtype="|u1",
        structures=("i", "o"),
        nested=((0, 1),),
        rule="center",
        contour_origin=0.0,
        include_unannotated=True,
        codec="deflate",
        keep_identity=False,
        source="sunnybrook",
    )
    return replace(usual, **changes)


def measured(images, masks, plan, cropped=0, looked=0):
    """What workers measure: a structure is drawn where it has pixels; `looked` for are bits."""
    bits = np.arange(len(plan.structures))
    drawn = (masks[..., None] >> bits & 1).any(axis=(1, 2)).reshape(len(masks), len(bits))
    area, components, outside = measure_masks(masks, drawn, plan.nested)
    residual = np.where(drawn, 0.01, np.nan)
    cut = np.full(drawn.shape, cropped, np.int64)
    flags = raise_flags(
        area=area,
        components=components,
        outside=outside,
        ellipse_residual=residual,
        ring_count=drawn.astype(np.int32),
        nested=plan.nested,
        pixels=plan.rows * plan.columns,
        longer_than_header=np.zeros(len(masks), bool),
        cropped=cut,
        checks=Checks(),
    )
    return Measured(
        annotated=drawn | (np.asarray(looked, np.int64)[..., None] >> bits & 1).astype(bool),
        outlined=drawn,
        area=area,
        components=components,
        outside=outside,
        ellipse_residual=residual,
        contour_digest=np.zeros(drawn.shape, np.uint64),
        intensity=measure_intensity(images.reshape(*images.shape[:2], -1)),
        flags=flags,
        cropped=cut,
    )


def chunk(images, masks, plan, first=0, good=None, problems=(), cropped=0, looked=0):
    """What a worker gives back for these slices; those that are not good were rejected."""
    good = np.ones(len(images), bool) if good is None else good
    image_bytes, image_sizes = encode(images, plan.codec, good)
    mask_bytes, mask_sizes = encode(masks, plan.codec, good)
    return EncodedChunk(
        first=first,
        image_bytes=image_bytes,
        image_sizes=image_sizes,
        mask_bytes=mask_bytes,
        mask_sizes=mask_sizes,
        image_crc32c=checksums(image_bytes, image_sizes),
        mask_crc32c=checksums(mask_bytes, mask_sizes),
        measured=measured(images, masks, plan, cropped, looked),
        problems=tuple(problems),
    )


def write(path, *, table=None, plan=None, images=None, masks=None, good=None, **options):
    """Write a file in tasks of four slices; returns the summary."""
    table = slices() if table is None else table
    plan = plan or layout(len(table))
    pair = pictures(len(table), plan.samples)
    images, masks = pair[0] if images is None else images, pair[1] if masks is None else masks
    good = np.ones(len(table), bool) if good is None else good
    problems, cropped = options.pop("problems", ()), options.pop("cropped", 0)
    with Hdf5Writer(path, plan, table, **options) as writer:
        for first in range(0, len(table), 4):
            part = slice(first, first + 4)
            options = {"cropped": cropped, "looked": table.annotated[part]}
            writer.put(chunk(images[part], masks[part], plan, first, good[part], **options))
        return writer.publish(problems)


@contextmanager
def edited(path):
    """Change a finished file as if its writer had made it so: with a digest and a seal that fit."""
    with h5py.File(path, "r+") as file:
        yield file
        write_contents(file)
    sealed(path)


def sealed(path):
    """Seal a file as it is, if both arrays are there; its chunks are what they should be."""
    with h5py.File(path) as file:
        if not {"images", "masks"} <= set(file):
            return
        arrays = [file[name].id for name in ("images", "masks")]
        index = [chunk_index(array, array.shape[0]) for array in arrays]
    with Path(path).open("rb") as file:
        known = [checksums_of_file(file.fileno(), *here) for here in index]
    rows = min(len(crc32c) for crc32c in known)
    offsets, sizes = (np.stack([each[k][:rows] for each in index]) for k in (0, 1))
    seal_file(Path(path), offsets, sizes, np.stack([crc32c[:rows] for crc32c in known]))


def outdated(path):
    """Make a file one of version 2, which had a checksum of attributes alone."""
    with h5py.File(path, "r+") as file:
        for name in (CONTENTS, DIGEST):
            del file.attrs[name]
        file.attrs["format_version"] = 2
        file.attrs[CHECKSUM] = np.uint32(attributes_crc32c(file))
