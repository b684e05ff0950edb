"""The small records that pass between the rooms. Frozen, no behaviour beyond derived properties."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.bytes_]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]


class Reason(StrEnum):
    """Why something of the input is not in the output, or is there but reported."""

    NOT_DICOM = "not-dicom"
    UNREADABLE_FILE = "unreadable-file"
    MISSING_TAG = "missing-tag"
    UNSUPPORTED_PIXELS = "unsupported-pixels"
    IMAGE_SIZE_DIFFERS = "image-size-differs"
    PIXEL_DATA_SHORT = "pixel-data-short"
    UNDECODABLE_PIXELS = "undecodable-pixels"
    FILE_CHANGED = "file-changed"
    BAD_CONTOUR = "bad-contour"
    CONTOUR_WITHOUT_IMAGE = "contour-without-image"
    AMBIGUOUS_IMAGE = "ambiguous-image"
    DUPLICATE_CONTOUR = "duplicate-contour"
    REPEATED_CONTOUR = "repeated-contour"
    IMAGE_REJECTED = "image-rejected"
    PATIENT_WITHOUT_IMAGES = "patient-without-images"
    PATIENT_WITHOUT_CONTOURS = "patient-without-contours"
    UNLINKED_FOLDER = "unlinked-folder"
    OUTSIDE_DATA_DIRECTORY = "outside-data-directory"
    STRAY_FILE = "stray-file"
    ALTERNATIVE_SERIES = "alternative-series"


#: Reasons that are worth a line but cost nothing: they never change the exit status.
HARMLESS_REASONS = frozenset(
    {
        Reason.STRAY_FILE,
        Reason.ALTERNATIVE_SERIES,
        Reason.REPEATED_CONTOUR,
        Reason.IMAGE_REJECTED,
        Reason.PATIENT_WITHOUT_CONTOURS,
        Reason.UNLINKED_FOLDER,
    }
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One file (or folder) of the input that is not in the output, or is reported beside it."""

    path: str
    """Relative to the cohort's root, with '/' between the parts."""
    reason: Reason
    detail: str
    """What is wrong, with the tag and both numbers where there are any; no patient identity."""

    @property
    def is_rejection(self) -> bool:
        """Whether something that should have been converted is missing from the output."""
        return self.reason not in HARMLESS_REASONS


@dataclass(frozen=True, slots=True)
class SliceTable:
    """The images of a cohort as aligned columns: one row per frame, n rows."""

    path: Bytes
    """(n,) bytes: the file, relative to the cohort's root, '/' between the parts, os.fsencode-d."""
    patient_id: Bytes
    """(n,) bytes: the cohort's own name of the patient (link.csv, folder or PatientID)."""
    frame: Int32
    """(n,) frame inside the file, from 0."""
    file_size: Int64
    """(n,) bytes, when the header was read."""
    pixel_offset: Int64
    """(n,) offset of this frame's native pixel data in the file; -1: take the slow path."""
    pixel_length: Int64
    """(n,) length in bytes that the header gives for the file's pixel data; -1 where undefined."""
    transfer_syntax_uid: Bytes
    rows: Int32
    columns: Int32
    samples_per_pixel: Int32
    bits_allocated: Int32
    bits_stored: Int32
    pixel_representation: Int32
    """(n,) 0 unsigned, 1 two's complement (DICOM PS3.3 C.7.6.3.1.2)."""
    photometric_interpretation: Bytes
    rescale_slope: Float64
    """(n,) 1.0 where the file has none."""
    rescale_intercept: Float64
    """(n,) 0.0 where the file has none."""
    modality: Bytes
    study_instance_uid: Bytes
    series_instance_uid: Bytes
    sop_instance_uid: Bytes
    frame_of_reference_uid: Bytes
    instance_number: Int64
    """(n,) -1 where the file has none."""
    image_position_patient: Float64
    """(n, 3) mm, centre of pixel (row 0, column 0) in patient coordinates; NaN where absent."""
    image_orientation_patient: Float64
    """(n, 6) direction cosines of a row, then of a column; NaN where absent."""
    pixel_spacing: Float64
    """(n, 2) mm between rows, then between columns; NaN where absent."""
    slice_thickness: Float64
    """(n,) mm; NaN where absent."""

    def __len__(self) -> int:
        return len(self.path)

    def take(self, index: NDArray[Any]) -> Self:
        """The rows that `index` selects (integers or booleans), in its order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def concatenate(cls, tables: list[Self]) -> Self:
        """Several tables under one another."""
        return cls(
            **{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)}
        )


@dataclass(frozen=True, slots=True)
class ContourTable:
    """Where the outlines of a cohort lie: one row per ring, sorted by (slice, structure, path)."""

    slice: Int64
    """(r,) row of the cohort's SliceTable."""
    structure: Int32
    """(r,) index into the cohort's structures."""
    path: Bytes
    """(r,) bytes: the text file, relative to the cohort's root, os.fsencode-d."""

    def __len__(self) -> int:
        return len(self.path)


@dataclass(frozen=True, slots=True)
class Cohort:
    """What a scan found: images, the outlines on them, and what does not belong together."""

    root: str
    """The data directory, absolute; never stored in the output."""
    source: str
    """Name of the annotation source, e.g. 'sunnybrook'."""
    include_unannotated: bool
    """Whether images without any outline were asked for."""
    structures: tuple[str, ...]
    """Names in bit order."""
    nested: tuple[tuple[int, int], ...]
    """Pairs (inner, outer) of structures: the inner one must lie inside the outer one."""
    slices: SliceTable
    """The images to convert, in the order of the output."""
    contours: ContourTable
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Contours:
    """The outlines of a few slices, flat: exactly what the rasterizer takes."""

    points_column_row: Float64
    """(p, 2) pixels, integer coordinates at pixel centres, column first."""
    offsets: Int64
    """(r + 1,) ring k is points[offsets[k]:offsets[k + 1]], implicitly closed."""
    plane: Int64
    """(r,) which slice of the batch; ascending."""
    structure: Int32
    """(r,) which structure; ascending within a plane."""


@dataclass(frozen=True, slots=True)
class Checks:
    """Thresholds of the checks on masks (each gives a flag, never a rejection)."""

    max_mask_fraction: float = 0.5
    """A mask that covers more of the image than this is flagged."""
    max_ellipse_residual: float = 0.1
    """A ring whose distance from its best ellipse (RMS, in mean radii) is larger is flagged."""
    max_outside_fraction: float = 0.01
    """An inner structure with more of its pixels than this outside its outer one is flagged."""


#: Bit k of the table's `flags` column is FLAGS[k].
FLAGS = (
    "mask-too-large",
    "empty-mask",
    "several-components",
    "not-an-ellipse",
    "inner-not-inside-outer",
    "identical-contours",
    "pixel-data-longer-than-header",
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that defines the bytes of the output, and nothing else."""

    slices: int
    rows: int
    columns: int
    image_dtype: str
    """Little-endian NumPy name, '<i2' or '<f4' among others."""
    mask_dtype: str
    """'|u1' … '<u8': one bit per structure."""
    structures: tuple[str, ...]
    nested: tuple[tuple[int, int], ...]
    rule: str
    """Rasterizing rule: 'center', 'pil-outline0' or 'pil-outline1'."""
    contour_origin: float
    """Pixel coordinate, in the contours, of the centre of the first pixel: 0, 0.5 or 1."""
    include_unannotated: bool
    """Whether slices without any usable outline are in the file, with empty masks."""
    codec: str
    """'deflate', 'lz4', 'zstd' or 'none'."""
    keep_identity: bool
    source: str
    checks: Checks = field(default_factory=Checks)


@dataclass(frozen=True, slots=True)
class SliceRefs:
    """The n frames of a task, column by column: what is needed to decode them, no patient."""

    path: tuple[str, ...]
    """Relative to the cohort's root."""
    frame: tuple[int, ...]
    file_size: tuple[int, ...]
    pixel_offset: tuple[int, ...]
    """Offset of the frame's native pixels; -1: decode through the slow path."""
    pixel_length: tuple[int, ...]
    stored_dtype: tuple[str, ...]
    """Little-endian NumPy name of the native pixels, e.g. '<i2'; '' on the slow path."""
    bits_stored: tuple[int, ...]
    rescale_slope: tuple[float, ...]
    rescale_intercept: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.path)


@dataclass(frozen=True, slots=True)
class ContourRefs:
    """The r outlines of a task, column by column, sorted by (plane, structure)."""

    path: tuple[str, ...]
    """Relative to the cohort's root."""
    plane: tuple[int, ...]
    """Which slice of the task."""
    structure: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.path)


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """A run of whole chunks for one worker: paths and numbers only."""

    first: int
    """Plan index of the first slice."""
    root: str
    layout: Layout
    slices: SliceRefs
    contours: ContourRefs


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker found out about the n slices of a task, aligned columns; s structures."""

    annotated: NDArray[np.bool_]
    """(n, s) whether the structure has an outline on the slice."""
    area: Int64
    """(n, s) pixels of the mask."""
    components: Int32
    """(n, s) connected components of the mask (8-neighbours)."""
    outside: Int64
    """(n, pairs) pixels of an inner structure outside its outer one, in the order of `nested`."""
    ellipse_residual: Float64
    """(n, s) worst ring's RMS distance from its best ellipse, in mean radii; NaN without a ring."""
    contour_digest: NDArray[np.uint64]
    """(n, s) digest of the outline files' bytes, to find copies; 0 without a ring."""
    intensity: Float64
    """(n, 4) minimum, maximum, mean, standard deviation of the stored image."""
    flags: NDArray[np.uint16]
    """(n,) bit k: FLAGS[k]."""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """What a task gives back: chunk bytes, what was measured, and what went wrong."""

    first: int
    """Plan index of the first slice."""
    image_bytes: UInt8
    """1-D: the encoded images of all good slices, one after another."""
    image_sizes: Int64
    """(n,) bytes of each slice's image; 0 where the slice was rejected."""
    mask_bytes: UInt8
    mask_sizes: Int64
    image_crc32c: NDArray[np.uint32]
    """(n,) checksum of each slice's encoded image."""
    mask_crc32c: NDArray[np.uint32]
    measured: Measured
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """What a scan looks for."""

    source: str = "auto"
    """Annotation source: 'auto' or a registered name."""
    structures: tuple[str, ...] = ()
    """Structures to convert, in bit order; empty: all that are there."""
    include_unannotated: bool = False
    """Also take images without any outline, with empty masks."""
    link_file_name: str = "link.csv"
    contours_sub_dir: str = ""
    """Only this folder of outlines under each patient (the original script's setting), or ''."""
    workers: int = 0
    """Threads that read headers; 0: one per core."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How a cohort is converted. Only `rule`, `contour_origin`, `codec`, `keep_identity` and
    `checks` change the output.
    """

    rule: str = "center"
    contour_origin: float = 0.0
    codec: str = "deflate"
    keep_identity: bool = False
    checks: Checks = field(default_factory=Checks)
    scheduler: str = "threads"
    """'synchronous', 'threads', 'processes', 'distributed', a scheduler's address or file."""
    workers: int = 0
    """0: one per core."""
    memory_limit: int = 0
    """Bytes that one worker may use for its slices and results; 0: 256 MiB."""
    slices_per_task: int = 0
    """0: chosen from the memory limit, at most 64."""
    strict: bool = False
    """Stop at the first rejected slice."""
    max_rejected: int = 0
    """More rejected than this give exit status 1."""
    zarr: str = ""
    """Directory of the zarr mirror, or ''."""
    overwrite: bool = False
    """Replace an existing output."""


@dataclass(frozen=True, slots=True)
class Progress:
    """An event for whoever watches: `done` of `total` in this stage."""

    stage: str
    """'scan', 'convert', 'verify' or 'mirror'."""
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a conversion, as a person or a program wants to know it."""

    output: str
    slices: int
    """Slices in the file."""
    patients: int
    rows: int
    columns: int
    structures: tuple[str, ...]
    annotated: tuple[int, ...]
    """Slices on which each structure has an outline."""
    problems: tuple[Problem, ...]
    flagged: dict[str, int]
    """Slices that carry each flag; only those that occur."""
    seconds: float
    bytes_written: int
    max_rejected: int = 0

    @property
    def rejected(self) -> int:
        """How many things that should have been converted are not in the output."""
        return sum(problem.is_rejection for problem in self.problems)

    @property
    def exit_status(self) -> int:
        """0, or 1 where more was rejected than allowed."""
        return int(self.rejected > self.max_rejected)
