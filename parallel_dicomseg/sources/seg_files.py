"""What a DICOM Segmentation file holds: its header, kept from task to task, and single frames."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.decoders import EXPLICIT_BIG_ENDIAN, quiet
from parallel_dicomseg.dicom.opened import FrameError, OpenImage, open_image
from parallel_dicomseg.dicom.pixels import stored_frame
from parallel_dicomseg.errors import ResumableError
from parallel_dicomseg.files import open_regular
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import Float64, Int64, Reason
from parallel_dicomseg.sources.parsed import Flaw, ParsedFiles, unreadable

Values = NDArray[np.unsignedinteger[Any]]

# Bits Allocated by Segmentation Type (PS3.3 C.8.20.2; BINARY in bytes is met as well).
_BITS = {"BINARY": (1, 8), "FRACTIONAL": (8,), "LABELMAP": (8, 16)}
# What is read of the header besides what pixels need.
_TAGS = frozenset(
    (
        *(0x00080005, 0x00081115, 0x00100020, 0x00200032, 0x00200037, 0x00200052, 0x00280030),
        *(0x00620001, 0x00620002, 0x0062000B, 0x0062000E, 0x52009229, 0x52009230),
    )
)
# Headers that are kept.
_HEADERS = 16


@dataclass(frozen=True, slots=True)
class Header:
    """What is needed of a SEG file of f frames; no pixels (except of a deflated data set)."""

    segmentation_type: str
    """'BINARY', 'FRACTIONAL' or 'LABELMAP'."""
    rows: int
    columns: int
    maximum: int
    """Largest value that a pixel may have, where it is no segment's number."""
    background: frozenset[int]
    """LABELMAP: values that are no segment; empty in the other types."""
    segments: tuple[tuple[int, str], ...]
    """Number and label of each segment."""
    segment_number: Int64
    """(f,) whose frame it is; 0 in a LABELMAP, where it is everybody's."""
    planes: Float64
    """(f, 11) as in geometry.py; NaN where the file does not say."""
    references: tuple[frozenset[tuple[bytes, int]], ...]
    """(f,) SOP instance and frame (from 1; 0: not said) of the source images."""
    series_instance_uids: frozenset[bytes]
    sop_instance_uids: frozenset[bytes]
    frame_of_reference_uid: bytes
    patient_id: bytes
    image: OpenImage = field(repr=False)
    """How to decode the frames; its stream is closed, or that of a deflated data set."""
    pixel_bytes: int
    """Bytes of Pixel Data; -1: undefined, the frames are compressed."""

    @property
    def frames(self) -> int:
        """How many frames, f."""
        return len(self.planes)


def _parse(file: Path, size: int) -> Header | Flaw:  # noqa: ARG001  what parsing may need
    try:
        with quiet(), open_image(file, _TAGS) as image:
            return _missing(image) or _header(image)
    except OSError:
        raise
    except FrameError as error:
        return error.reason, error.detail
    except Exception as error:  # noqa: BLE001 broken files make pydicom raise anything
        # only the kind of the error: pydicom's texts quote values of the header
        return Reason.UNREADABLE_FILE, f"the header cannot be read ({type(error).__name__})"


#: The header of a SEG file below a root, or what is wrong with it.
load_header = ParsedFiles(_parse, most=_HEADERS).load


# --- frames --------------------------------------------------------------------------------------


@contextmanager
def open_frames(root: str, path: str, header: Header) -> Iterator[OpenImage]:
    """Open a file whose header is known, for `read_frame`.

    Raises
    ------
    OSError
        If it cannot be opened any more.
    """
    held = header.image.stream
    # a stream of its own for every thread
    inflated = io.BytesIO(held.getvalue()) if isinstance(held, io.BytesIO) else None
    with inflated or open_regular(Path(root, path), limits().file_bytes) as stream:
        yield replace(header.image, stream=stream)


def read_frame(header: Header, image: OpenImage, frame: int) -> tuple[Values | None, Flaw | None]:
    """The stored values (rows, columns) of one frame, from 0, and what is wrong.

    No values where they cannot be used.
    """
    if not 0 <= frame < header.frames:
        detail = f"there is no frame {frame + 1}: the file has {header.frames} frames"
        return None, (Reason.FILE_CHANGED, detail)
    end = -(-(frame + 1) * header.rows * header.columns * image.options["bits_allocated"] // 8)
    if 0 <= header.pixel_bytes < end:
        detail = f"frame {frame + 1} ends at byte {end} of (7FE0,0010) Pixel Data"
        return None, (Reason.PIXEL_DATA_SHORT, f"{detail}, which has {header.pixel_bytes} bytes")
    try:
        with quiet():
            values = stored_frame(image, frame)
    except FrameError as error:
        return None, (error.reason, f"frame {frame + 1}: {error.detail}")
    except OSError as error:
        return None, unreadable(error)
    except ResumableError:  # is about this machine
        raise
    except Exception as error:  # noqa: BLE001 decoders raise anything on what they cannot decode
        kind = f"{image.decoder.name}, {image.options['bits_allocated']} bit"
        detail = f"frame {frame + 1} cannot be decoded ({kind}: {type(error).__name__})"
        return None, (Reason.UNDECODABLE_PIXELS, detail)
    return _checked(header, values, frame)


def _checked(header: Header, values: Values, frame: int) -> tuple[Values | None, Flaw | None]:
    """The values unless one of them is too large; numbers of no segment cost nothing else."""
    if not header.background:
        largest = int(values.max(initial=0))
        if largest <= header.maximum:
            return values, None
        detail = f"frame {frame + 1} has a pixel of {largest}, the largest allowed is"
        return None, (Reason.BAD_CONTOUR, f"{detail} {header.maximum}")
    there = set(np.flatnonzero(np.bincount(values.ravel())).tolist())
    unknown = sorted(there - {number for number, _ in header.segments} - header.background)
    if not unknown:
        return values, None
    detail = f"frame {frame + 1} has pixels of {unknown[0]}, which is the number of no segment"
    return values, (Reason.BAD_CONTOUR, f"{detail}; the other segments are used")


# --- headers -------------------------------------------------------------------------------------


def _missing(image: OpenImage) -> Flaw | None:
    """What the header lacks, or says that cannot be."""
    dataset = image.dataset
    needed = {
        "Rows": "(0028,0010) Rows",
        "Columns": "(0028,0011) Columns",
        "BitsAllocated": "(0028,0100) Bits Allocated",
        "SegmentationType": "(0062,0001) Segmentation Type",
        "SegmentSequence": "(0062,0002) Segment Sequence",
    }
    if dataset.get("SegmentationType") == "FRACTIONAL":
        needed["MaximumFractionalValue"] = "(0062,000E) Maximum Fractional Value"
    absent = [text for keyword, text in needed.items() if not dataset.get(keyword)]
    if absent:
        return Reason.MISSING_TAG, f"{absent[0]} is missing or empty"
    frames, items = _frames(dataset), len(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    if frames != items:
        detail = f"(0028,0008) Number of Frames is {frames}"
        return Reason.MISSING_TAG, f"{detail}, (5200,9230) has items for {items}"
    return _unsupported(image)


def _unsupported(image: OpenImage) -> Flaw | None:
    """What the header says that no segmentation should."""
    dataset, kind = image.dataset, image.dataset.SegmentationType
    if kind not in _BITS:
        detail = f"(0062,0001) Segmentation Type is none of {', '.join(_BITS)}"
        return Reason.UNSUPPORTED_PIXELS, detail
    if dataset.BitsAllocated not in _BITS[kind]:
        detail = f"(0028,0100) Bits Allocated is {dataset.BitsAllocated} in a {kind} segmentation"
        return Reason.UNSUPPORTED_PIXELS, detail
    words = image.options["pixel_vr"] == "OW" and dataset.BitsAllocated == 1
    if words and image.decoder.transfer_syntax_uid == EXPLICIT_BIG_ENDIAN:
        return Reason.UNSUPPORTED_PIXELS, "single bits in the words of a big-endian file"
    return None


def _frames(dataset: Any) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _header(image: OpenImage) -> Header:
    """The header of a data set in which nothing is missing."""
    dataset = image.dataset
    kind = str(dataset.SegmentationType)
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    groups = [(own, shared, dataset) for own in dataset.PerFrameFunctionalGroupsSequence]
    references = tuple(_references(own, shared) for own, *_ in groups)
    series = dataset.get("ReferencedSeriesSequence") or []
    instances = [one for item in series for one in item.get("ReferencedInstanceSequence") or []]
    background = {0, int(dataset.get("PixelPaddingValue") or 0)} if kind == "LABELMAP" else set()
    segments = [(int(one.SegmentNumber), _label(one)) for one in dataset.SegmentSequence]
    return Header(
        segmentation_type=kind,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        maximum=int(dataset.get("MaximumFractionalValue") or 1),
        background=frozenset(background),
        segments=tuple(both for both in segments if both[0] not in background),
        segment_number=np.array([0 if background else _number(*all_of) for all_of in groups]),
        planes=np.array([_plane(all_of) for all_of in groups]),
        references=references,
        series_instance_uids=frozenset(_uid(item, "SeriesInstanceUID") for item in series),
        sop_instance_uids=frozenset(_uid(one, "ReferencedSOPInstanceUID") for one in instances)
        | {uid for of_frame in references for uid, _ in of_frame},
        frame_of_reference_uid=_uid(dataset, "FrameOfReferenceUID"),
        patient_id=str(dataset.get("PatientID") or "").strip().encode(),
        image=_without_header(image),
        pixel_bytes=_pixel_bytes(image),
    )


def _without_header(image: OpenImage) -> OpenImage:
    """What decodes frames: stored values, also where they are indices into a palette."""
    options = {**image.options, "photometric_interpretation": "MONOCHROME2"}
    return replace(image, dataset={}, options=options)


def _pixel_bytes(image: OpenImage) -> int:
    """How long the value of Pixel Data is; -1: undefined."""
    if isinstance(image.stream, io.BytesIO):
        return len(image.stream.getbuffer())
    image.stream.seek(image.start - 4)
    length = np.frombuffer(image.stream.read(4), ">u4" if _is_big(image) else "<u4")[0]
    available = os.fstat(image.stream.fileno()).st_size - image.start
    return -1 if length == 0xFFFFFFFF else min(int(length), available)


def _is_big(image: OpenImage) -> bool:
    return image.decoder.transfer_syntax_uid == EXPLICIT_BIG_ENDIAN


def _uid(item: Any, keyword: str) -> bytes:
    return str(item.get(keyword) or "").strip("\0 ").encode()


def _label(segment: Any) -> str:
    return str(segment.get("SegmentLabel") or "").strip() or f"segment {segment.SegmentNumber}"


def _value(groups: Iterable[Any], macro: str, keyword: str) -> Any:
    """An attribute of a functional group macro: the frame's, else the shared, else at top level."""
    *items, dataset = groups
    for item in items:
        sequence = item.get(macro) if item is not None else None
        value = sequence[0].get(keyword) if sequence else None
        if value is not None:
            return value
    return dataset.get(keyword)


def _number(*groups: Any) -> int:
    """Which segment a frame is of; -1 where it does not say."""
    number = _value(groups, "SegmentIdentificationSequence", "ReferencedSegmentNumber")
    return -1 if number is None else int(number)


def _plane(groups: Sequence[Any]) -> list[float]:
    """The 11 numbers of a frame's plane; NaN for what is not there."""
    values = (
        (3, _value(groups, "PlanePositionSequence", "ImagePositionPatient")),
        (6, _value(groups, "PlaneOrientationSequence", "ImageOrientationPatient")),
        (2, _value(groups, "PixelMeasuresSequence", "PixelSpacing")),
    )
    return [
        float(number)
        for count, value in values
        for number in (value if value is not None and len(value) == count else [np.nan] * count)
    ]


def _references(own: Any, shared: Any) -> frozenset[tuple[bytes, int]]:
    """The source images of a frame, and which frame of them (from 1; 0: not said)."""
    for item in (own, shared):
        derivations = item.get("DerivationImageSequence") if item is not None else None
        sources = [
            source for one in derivations or [] for source in one.get("SourceImageSequence") or []
        ]
        if sources:
            return frozenset(
                (_uid(source, "ReferencedSOPInstanceUID"), int(frame))
                for source in sources
                for frame in np.atleast_1d(source.get("ReferencedFrameNumber") or 0)
            )
    return frozenset()
