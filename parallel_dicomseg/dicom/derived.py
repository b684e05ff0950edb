"""What follows from several elements of a header: the columns of the table that no tag has."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.elements import DOUBLE_FLOAT_PIXEL_DATA, FLOAT_PIXEL_DATA, PIXEL_DATA
from parallel_dicomseg.dicom.guards import GREY, NATIVE_LITTLE_ENDIAN, PALETTE, pixel_bytes
from parallel_dicomseg.records import Float64, Int64


def complete(columns: dict[str, Any]) -> None:
    """Add the columns that follow from others, or stand for others where those are absent.

    `columns` are those of `elements.columns_of`, and of the file: `pixel_tag`, `pixel_offset`,
    `pixel_length`, `lut_range` (n, 2).
    """
    frames = columns["number_of_frames"]
    columns["number_of_frames"] = np.where(frames == 0, 1.0, frames)
    columns["sop_class_uid"] = _text_else(columns, "sop_class_uid", "media_storage_sop_class_uid")
    columns["image_type"] = _text_else(columns, "frame_type", "image_type")
    columns["instance_number"] = whole_numbers(columns["instance_number"])
    columns["acquisition_number"] = whole_numbers(
        _number_else(columns["acquisition_number"], _known(columns["frame_acquisition_number"]))
    )
    columns["temporal_position"] = _number_else(
        columns["temporal_position_identifier"],
        _known(columns["temporal_position_index"]),
        columns["trigger_time"],
        columns["trigger_delay"],
    )
    _describe_floats(columns)
    _find_values(columns)


def _text_else(columns: dict[str, Any], first: str, second: str) -> NDArray[np.bytes_]:
    column: NDArray[np.bytes_] = columns[first]
    return np.where(column != b"", column, columns[second])


def _known(column: Int64) -> Float64:
    """Whole numbers with NaN for the absent ones."""
    return np.where(column < 0, np.nan, column.astype(np.float64))


def _number_else(*columns: Float64) -> Float64:
    """The first of the columns, row by row, that has a number."""
    number = columns[0]
    for column in columns[1:]:
        number = np.where(np.isnan(number), column, number)
    return number


def whole_numbers(column: Float64) -> Int64:
    """Integers within 31 bits; -1 for whatever is none."""
    whole = (column == np.rint(column)) & (np.abs(column) < 2**31)
    return np.where(whole, column, -1).astype(np.int64)


def _describe_floats(columns: dict[str, Any]) -> None:
    """Float pixel data has no Bits Stored and no sign bit of its own (PS3.3 C.7.6.24)."""
    tag = columns["pixel_tag"]
    for pixel_tag, bits in ((FLOAT_PIXEL_DATA, 32), (DOUBLE_FLOAT_PIXEL_DATA, 64)):
        for name in ("bits_allocated", "bits_stored"):
            columns[name] = np.where(tag == pixel_tag, bits, columns[name])
    is_float = tag != PIXEL_DATA
    columns["high_bit"] = np.where(is_float, -1, columns["high_bit"])
    columns["pixel_representation"] = np.where(is_float, 0, columns["pixel_representation"])


def _find_values(columns: dict[str, Any]) -> None:
    """Which values pixels may have once they are rescaled, and how many a decoded one holds.

    A modality lookup table goes before slope and intercept, and colour has neither (PS3.3 C.11.1).
    """
    interpretation = columns["photometric_interpretation"]
    grey = np.isin(interpretation, GREY)
    lut_range = columns["lut_range"]
    has_lut = grey & np.isfinite(lut_range).all(axis=1)
    scaled = grey & ~has_lut
    slope = columns["rescale_slope"] = np.where(scaled, columns["rescale_slope"], 1.0)
    intercept = columns["rescale_intercept"] = np.where(scaled, columns["rescale_intercept"], 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        values = _stored_range(columns) * slope[:, None] + intercept[:, None]
    values = np.where(has_lut[:, None], lut_range, np.sort(values, axis=1))
    is_float = columns["pixel_tag"] != PIXEL_DATA
    values[is_float] = -np.inf, np.inf
    whole = (slope == np.rint(slope)) & (intercept == np.rint(intercept)) & ~is_float
    columns["has_lut"] = has_lut
    columns["value_range"] = values
    columns["value_is_whole"] = whole & (np.abs(slope) < 2**53) & (np.abs(intercept) < 2**53)
    is_palette = interpretation == PALETTE
    columns["decoded_samples"] = np.where(is_palette, 3, columns["samples_per_pixel"])


def _stored_range(columns: dict[str, Any]) -> Float64:
    """(n, 2) lowest and highest number that the bits of a sample hold."""
    palette_bits = np.where(columns["palette_bits"] == 8, 8, 16)
    is_palette = columns["photometric_interpretation"] == PALETTE
    bits = np.where(is_palette, palette_bits, columns["bits_stored"]).astype(np.float64)
    signed = (columns["pixel_representation"] == 1) & ~is_palette
    span = np.exp2(np.maximum(bits, 0.0))
    lowest = np.where(signed, -span / 2, 0.0)
    return np.column_stack([lowest, lowest + span - 1])


def frame_offsets(columns: dict[str, Any], frame: Int64) -> Int64:
    """(n,) where each frame's pixels lie in the file, -1 unless they can be read as they lie."""
    bits_stored, bits_allocated = columns["bits_stored"], columns["bits_allocated"]
    plain = (
        (columns["pixel_offset"] >= 0)
        & (columns["pixel_tag"] == PIXEL_DATA)
        & np.isin(columns["transfer_syntax_uid"], NATIVE_LITTLE_ENDIAN)
        & np.isin(columns["photometric_interpretation"], GREY)
        & np.isin(bits_allocated, (8, 16, 32))
        & ((columns["high_bit"] < 0) | (columns["high_bit"] == bits_stored - 1))
        & ~columns["has_lut"]
    )
    length = pixel_bytes(columns, np.ones(len(frame)))
    return np.where(plain, columns["pixel_offset"] + frame * length, -1)
