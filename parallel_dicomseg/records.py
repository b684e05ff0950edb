"""The small records that pass between the rooms. Frozen, no behaviour beyond derived properties."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.bytes_]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Index = NDArray[Any] | slice
"""Rows of a table: integers, booleans or a range."""


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
    DUPLICATE = "duplicate"
    REPEATED = "repeated"
    IMAGE_REJECTED = "image-rejected"
    ANNOTATION_WITHOUT_IMAGES = "annotation-without-images"
    IMAGES_WITHOUT_ANNOTATION = "images-without-annotation"
    OUTSIDE_DATA_DIRECTORY = "outside-data-directory"
    STRAY_FILE = "stray-file"
    ALTERNATIVE_SERIES = "alternative-series"
    NOT_AN_IMAGE = "not-an-image"
    LOCALIZER = "localizer"
    SERIES_IRREGULAR = "series-irregular"
    NO_AREA = "no-area"
    PARTIAL_OVERLAP = "partial-overlap"
    BURNED_IN_ANNOTATION = "burned-in-annotation"

    @classmethod
    def _missing_(cls, value: object) -> Reason | None:
        # files that were made when this was a reason of its own
        return cls.STRAY_FILE if value == "unlinked-folder" else None


#: Reasons that are worth a line but cost nothing: they never change the exit status.
HARMLESS_REASONS = frozenset(
    {
        Reason.STRAY_FILE,
        Reason.ALTERNATIVE_SERIES,
        Reason.REPEATED,
        Reason.IMAGE_REJECTED,
        Reason.IMAGES_WITHOUT_ANNOTATION,
        Reason.NOT_AN_IMAGE,
        Reason.LOCALIZER,
        Reason.SERIES_IRREGULAR,
        Reason.NO_AREA,
        Reason.PARTIAL_OVERLAP,
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
    structure: str = ""
    """The only structure that is concerned, as the file spells it; '' where it is no single one."""

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
    """(n,) bytes: the cohort's own name of the patient (link.csv, PatientID or folder)."""
    frame: Int32
    """(n,) frame inside the file, from 0."""
    number_of_frames: Int32
    """(n,) frames of the file, at least 1."""
    file_size: Int64
    """(n,) bytes, when the header was read."""
    pixel_offset: Int64
    """(n,) offset of this frame's pixels in the file where they are plain little-endian numbers of
    8, 16 or 32 bits, one sample, high bit = bits stored - 1 and no lookup table; -1: slow path."""
    pixel_length: Int64
    """(n,) length in bytes that the header gives for the file's pixel data; -1 where undefined."""
    transfer_syntax_uid: Bytes
    sop_class_uid: Bytes
    rows: Int32
    columns: Int32
    samples_per_pixel: Int32
    """(n,) samples of a decoded pixel: 1, or 3 for colour (a palette is colour)."""
    bits_allocated: Int32
    bits_stored: Int32
    pixel_representation: Int32
    """(n,) 0 unsigned, 1 two's complement (DICOM PS3.3 C.7.6.3.1.2)."""
    photometric_interpretation: Bytes
    image_type: Bytes
    """(n,) (0008,0008) as in the file, values separated by a backslash."""
    rescale_slope: Float64
    """(n,) 1.0 where the file has none."""
    rescale_intercept: Float64
    """(n,) 0.0 where the file has none."""
    value_range: Float64
    """(n, 2) lowest and highest value that a rescaled pixel may have; infinite where unknown."""
    value_is_whole: NDArray[np.bool_]
    """(n,) whether every rescaled value is an integer."""
    modality: Bytes
    study_instance_uid: Bytes
    series_instance_uid: Bytes
    sop_instance_uid: Bytes
    frame_of_reference_uid: Bytes
    instance_number: Int64
    """(n,) -1 where the file has none."""
    acquisition_number: Int64
    """(n,) -1 where the file has none."""
    temporal_position: Float64
    """(n,) Temporal Position Identifier, else Trigger Time (ms); NaN where the file has neither."""
    image_position_patient: Float64
    """(n, 3) mm, centre of pixel (row 0, column 0) in patient coordinates; NaN where absent."""
    image_orientation_patient: Float64
    """(n, 6) direction cosines of a row, then of a column; NaN where absent."""
    pixel_spacing: Float64
    """(n, 2) mm between rows, then between columns; NaN where absent."""
    slice_thickness: Float64
    """(n,) mm; NaN where absent."""
    volume: Int32
    """(n,) which volume of the cohort: slices of one series, orientation, size and time, ordered
    by position; -1 until volumes.py has assigned it."""
    annotated: NDArray[np.uint64]
    """(n,) bit s: somebody looked for structure s on this slice, so an empty mask means absent.
    Outlines that lie on a slice add their own bit during the conversion."""
    split: Bytes
    """(n,) 'train', 'validation' or 'test'; '' without a split."""

    def __len__(self) -> int:
        return len(self.path)

    def take(self, index: Index) -> Self:
        """The rows that `index` selects (integers or booleans), in its order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def concatenate(cls, tables: list[Self]) -> Self:
        """Several tables under one another."""
        return cls(
            **{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)}
        )


@dataclass(frozen=True, slots=True)
class HeaderColumn:
    """One DICOM attribute of the n images: few different values, so each is kept once."""

    values: Bytes
    """(k,) the different values as text, several separated by a backslash; b'' where absent."""
    code: Int32
    """(n,) which of `values` each image has."""

    def take(self, index: NDArray[Any]) -> HeaderColumn:
        """The rows that `index` selects."""
        return HeaderColumn(self.values, self.code[index])


Headers = dict[str, HeaderColumn]
"""DICOM attributes by keyword ('EchoTime'), each with one row per image of a SliceTable."""


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """A file that holds no image to convert, but may hold annotations."""

    path: str
    """Relative to the cohort's root, '/' between the parts."""
    sop_class_uid: str
    """What kind of DICOM object it is; '' where it is no DICOM file."""
    file_size: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """One structure as one file draws it on images: r rings or frames."""

    kind: str
    """Name of the source that reads it, e.g. 'rtstruct'."""
    path: str
    """The annotation file, relative to the cohort's root."""
    name: str
    """The structure as the file spells it (stripped of blanks at the ends)."""
    found_by: str
    """How image and annotation were found to belong together: 'reference', 'frame-of-reference',
    'geometry' or 'number'."""
    looked_at: Int64
    """(k,) rows of the SliceTable on which the structure was looked for: the whole volume."""
    slice: Int64
    """(r,) row of the SliceTable that each ring or frame lies on."""
    offset: Int64
    """(r,) where it is in the file; its meaning is the source's own."""
    length: Int64
    """(r,) how long it is in the file; its meaning is the source's own."""
    file_set: str = ""
    """Common to files that count as one, such as one person's outlines of a patient; '': `path`."""


@dataclass(frozen=True, slots=True)
class AnnotationTable:
    """What is drawn on the images of a cohort: one row per ring or frame.

    Sorted by (slice, structure, layer, kind, path, offset).
    """

    slice: Int64
    """(r,) row of the cohort's SliceTable."""
    structure: Int32
    """(r,) index into the cohort's structures."""
    layer: Int32
    """(r,) rings of one layer are combined by parity, the layers of a structure are united."""
    kind: Bytes
    """(r,) name of the source that reads it, e.g. b'sunnybrook'."""
    path: Bytes
    """(r,) bytes: the file, relative to the cohort's root, os.fsencode-d."""
    offset: Int64
    """(r,) where it is in the file; its meaning is the source's own."""
    length: Int64
    """(r,) how long it is in the file; its meaning is the source's own."""

    def __len__(self) -> int:
        return len(self.path)

    def take(self, index: Index) -> Self:
        """The rows that `index` selects (integers or booleans), in its order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True, slots=True)
class MarkTable:
    """Single points that somebody set on images: they have no area, so they are in no mask.

    One row per point, m rows, ascending by slice.
    """

    slice: Int64
    """(m,) row of the SliceTable that the marks belong to."""
    name: Bytes
    """(m,) what the point marks, e.g. b'nodule-reader-1'; UTF-8."""
    points_column_row: Float64
    """(m, 2) pixels of the source image, integers at pixel centres, column first."""

    def __len__(self) -> int:
        return len(self.slice)

    @classmethod
    def empty(cls) -> Self:
        """No mark."""
        return cls(np.empty(0, np.int64), np.empty(0, "S1"), np.empty((0, 2)))

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        """Several tables as one, marks of one slice in the order of the tables."""
        if not tables:
            return cls.empty()
        joined = cls(
            **{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)}
        )
        return joined.take(np.argsort(joined.slice, kind="stable"))

    def take(self, index: Index) -> Self:
        """The rows that `index` selects (integers or booleans), in its order."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def on_slices(self, rows: NDArray[Any]) -> Self:
        """The marks on the slices that `rows` selects (ascending integers, or booleans for all), of
        which the first is slice 0 then.
        """
        kept = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        mine = self.take(np.isin(self.slice, kept))
        return replace(mine, slice=np.searchsorted(kept, mine.slice).astype(np.int64))


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
    """The images to convert, in the order of the output: patient, series, volume, position."""
    annotations: AnnotationTable
    headers: Headers
    """Attributes of the images, row by row those of `slices`."""
    found_by: dict[str, int]
    """How many annotations were paired with images in which way."""
    problems: tuple[Problem, ...]
    spelled: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What the files call each structure."""
    unmatched: dict[str, int] = field(default_factory=dict)
    """Annotations of other structures, by the name that the files give them."""
    scanned_with: tuple[str, ...] = ()
    """Options of the scan that say what is in it, each as 'name value'."""
    marks: MarkTable = field(default_factory=MarkTable.empty)
    """Points on the images of `slices`."""


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
    layer: Int32 | None = None
    """(r,) ascending within a structure: parity within a layer, union of layers; None: one layer
    each."""

    def __len__(self) -> int:
        return len(self.plane)

    @classmethod
    def empty(cls) -> Contours:
        """No ring."""
        return cls(
            points_column_row=np.empty((0, 2)),
            offsets=np.zeros(1, np.int64),
            plane=np.empty(0, np.int64),
            structure=np.empty(0, np.int32),
            layer=np.empty(0, np.int32),
        )

    def take(self, index: NDArray[Any]) -> Contours:
        """The rings that `index` selects (integers or booleans), in its order."""
        rings = np.flatnonzero(index) if index.dtype == bool else index
        lengths = np.diff(self.offsets)[rings]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        point = np.repeat(self.offsets[:-1][rings] - offsets[:-1], lengths)
        return Contours(
            points_column_row=self.points_column_row[point + np.arange(offsets[-1])],
            offsets=offsets,
            plane=self.plane[rings],
            structure=self.structure[rings],
            layer=None if self.layer is None else self.layer[rings],
        )


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One annotation that comes as pixels, on the grid of its image as it is in the file."""

    plane: int
    """Which slice of the batch."""
    structure: int
    mask: NDArray[np.bool_]
    """(rows, columns) of the source image."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a source read for the r annotations of a batch."""

    contours: Contours
    """In pixels of the source images; sorted by (plane, structure, layer)."""
    bitmaps: Iterable[Bitmap]
    """Read one by one, so that only one is in memory at a time."""
    digest: NDArray[np.uint64]
    """(r,) digest of the bytes that were read, to find copies; 0: nothing usable."""
    problems: tuple[tuple[int, Reason, str], ...]
    """Which of the r annotations, why and what is wrong; no patient identity."""


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
    "cut-by-crop",
    "gap-before-slice",
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
    samples: int = 1
    """3: /images has a last axis of red, green and blue."""
    resampled: bool = False
    """Whether images were interpolated onto another spacing."""
    partial_overlap: str = "xor"
    """What two rings of one structure that partly overlap give: 'xor', 'union' or 'refuse'."""
    invert_monochrome1: bool = False
    pad_value: float = math.nan
    """What lies outside the source image; NaN: the slice's own minimum."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an input may claim or cost before it is refused; none of it changes what is converted.

    The defaults lie far above what clinical data has (docs/reliability.md).
    """

    file_bytes: int = 2**36
    """Larger files are not read at all."""
    header_bytes: int = 2**28
    """Of a DICOM header up to its pixels, and of a sequence of functional groups."""
    header_elements: int = 2**19
    """Elements and items, at any depth, of what is parsed one by one: functional groups of a SEG,
    the contours of an RTSTRUCT, lookup tables."""
    header_depth: int = 32
    """Sequences inside one another, in the same."""
    inflated_bytes: int = 2**29
    """What a deflated data set may inflate to."""
    image_pixels: int = 2**26
    """Rows x columns of a frame."""
    frames: int = 65536
    """Of one file."""
    expansion: int = 1000
    """How many times as large as its file a frame may be, where it has more than 32 MiB."""
    structure_set_bytes: int = 2**29
    """Of an RTSTRUCT file, also inflated: all of it is in memory."""
    contour_bytes: int = 2**24
    """Of a text file with one outline."""
    contour_points: int = 2**16
    """Of one outline."""
    contours_per_slice: int = 512
    """Of one structure of an RTSTRUCT: which of them overlap takes the square of it."""
    table_bytes: int = 2**24
    """Of link.csv and the like."""
    xml_bytes: int = 2**25
    xml_elements: int = 2**19
    """Tags of an XML file; an element has two."""
    decode_seconds: float = 10.0
    """For one compressed frame, and a second more for each 4 MiB of it."""
    decoder_bytes: int = 2**32
    """Address space of the process that decodes compressed frames."""


#: The grid of an image that is stored as it is, see `SliceRefs.grid`.
WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


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
    rows: tuple[int, ...]
    """Of the source image."""
    columns: tuple[int, ...]
    photometric_interpretation: tuple[str, ...]
    plane_geometry: tuple[tuple[float, ...], ...]
    """Each 11 floats: ImagePositionPatient (3), ImageOrientationPatient (6), PixelSpacing (2)."""
    grid: tuple[tuple[float, float, float, float], ...]
    """Each: row and column, in pixels of the source image, of the centre of the stored image's
    first pixel, then the step between stored rows and between stored columns. WHOLE_IMAGE with
    the source's size is the image as it is."""
    annotated: tuple[int, ...]
    """Bit s: structure s was looked for on this slice."""

    def __len__(self) -> int:
        return len(self.path)


@dataclass(frozen=True, slots=True)
class AnnotationRefs:
    """The r annotations of a task, column by column, sorted as in the AnnotationTable."""

    plane: tuple[int, ...]
    """Which slice of the task."""
    structure: tuple[int, ...]
    layer: tuple[int, ...]
    kind: tuple[str, ...]
    path: tuple[str, ...]
    """Relative to the cohort's root."""
    offset: tuple[int, ...]
    length: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.path)

    def take(self, index: Sequence[int]) -> AnnotationRefs:
        """The rows that `index` selects, in its order."""
        return AnnotationRefs(
            *(tuple(getattr(self, f.name)[i] for i in index) for f in fields(self))
        )


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """A run of whole chunks for one worker: paths and numbers only."""

    first: int
    """Plan index of the first slice."""
    root: str
    layout: Layout
    slices: SliceRefs
    annotations: AnnotationRefs
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker found out about the n slices of a task, aligned columns; s structures."""

    annotated: NDArray[np.bool_]
    """(n, s) whether somebody looked for the structure on the slice, so that an empty mask says
    that it is not there; false where what was drawn could not be read."""
    outlined: NDArray[np.bool_]
    """(n, s) whether the structure is drawn on the slice."""
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
    cropped: Int64
    """(n, s) pixels of the mask, on the stored grid, that lie in the source image but outside the
    stored one."""


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
    allow_burned_in: bool = False
    """Also take images that may have names in their pixels: those that say so, and secondary
    captures."""
    workers: int = 0
    """Threads that read headers; 0: one per core."""
    aliases: str = ""
    """TOML file of structure names and what they are called elsewhere, or ''."""
    case_sensitive: bool = False
    """Whether 'Heart' and 'heart' are two structures."""
    several: str = "merge"
    """Where several names of one file match one structure: 'merge', 'first' or 'separate'."""
    readers: str = "each"
    """Several readers of one image (LIDC): 'each' a structure of its own, or 'consensus'."""
    agreement: float = 0.5
    """Fraction of the readers who must have marked a pixel, for 'consensus'."""
    fractional_threshold: float = 0.0
    """A pixel of a fractional SEG is in where it exceeds this fraction."""
    split: tuple[float, ...] = ()
    """Fractions of the patients for train, validation and test; empty: no split."""
    seed: int = 0
    """Of the split."""
    stratify: bool = False
    """Whether every structure is spread over the parts of the split evenly."""
    limits: Limits = field(default_factory=Limits)
    """Of the input."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How a cohort is converted. What comes before `scheduler` changes the output, the rest does
    not.
    """

    rule: str = "center"
    contour_origin: float = 0.0
    """Of outlines in pixels; outlines in mm have none."""
    codec: str = "deflate"
    spacing: tuple[float, ...] = ()
    """mm between rows and between columns (one number: both); empty: as the images are."""
    size: tuple[int, ...] = ()
    """Rows and columns of the output; empty: the largest image."""
    fit: str = "center"
    """What the output is centred on: 'center' of the image or 'structure'."""
    pad_value: str = "minimum"
    """What lies outside the source image: a number, or 'minimum': the slice's own."""
    color: str = "luminance"
    """Colour images as 'luminance', or 'samples': red, green and blue."""
    invert_monochrome1: bool = False
    """Turn MONOCHROME1 round, so that the highest value is white everywhere."""
    partial_overlap: str = "xor"
    """What two rings of one structure that partly overlap give: 'xor', 'union' or 'refuse'."""
    keep_identity: bool = False
    key_file: str = ""
    """Names are keyed hashes, the same in every run with this file; made where missing."""
    dates: str = "drop"
    """'drop', or 'shift' each patient's by a number of days that the key file decides."""
    hash_paths: bool = False
    """Whether the rejected list and messages name files by a hash of their path."""
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
    resume: bool = False
    """Go on with what an unfinished run has left, if there is any."""
    update: bool = False
    """Take over what has not changed since an existing output was made."""
    compare: str = "time"
    """What tells that an input file is unchanged: its 'time' and size, or its 'content'."""
    ignore_space: bool = False
    """Begin even where the disk will probably not hold the output."""
    limits: Limits = field(default_factory=Limits)
    """Of the input."""
    task_timeout: float = 600.0
    """Seconds that a task may take in a worker process before it is given to another; 0: any."""
    window_limit: int = 0
    """Bytes of results that may be under way or wait to be written; 0: 2 GiB."""
    tls_ca_file: str = ""
    """Certificate (PEM) of the authority that signed those of the cluster, or ''."""
    tls_cert: str = ""
    """Certificate (PEM) that is shown to the cluster, or ''."""
    tls_key: str = ""
    """Its private key (PEM), or ''."""
    allow_insecure_cluster: bool = False
    """Talk to a cluster beyond this machine without encryption."""


@dataclass(frozen=True, slots=True)
class Progress:
    """An event for whoever watches: `done` of `total` in this stage."""

    stage: str
    """'scan', 'convert', 'verify' or 'mirror'."""
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Update:
    """What an update found, in slices."""

    unchanged: int
    """Taken over as they were encoded."""
    added: int
    changed: tuple[str, ...]
    """Where they come from, relative to the cohort's root; decoded again."""
    vanished: dict[str, int]
    """By the patient that the old output names; no longer in the new one."""
    reason: str = ""
    """Why nothing could be taken over, or ''."""


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
    """Slices on which each structure is drawn."""
    problems: tuple[Problem, ...]
    flagged: dict[str, int]
    """Slices that carry each flag; only those that occur."""
    seconds: float
    bytes_written: int
    max_rejected: int = 0
    notes: tuple[str, ...] = ()
    """What was done to the images that nobody asked for by name: padded, cropped, resampled."""
    resumed: int = 0
    """Slices of the plan that an earlier run had finished."""
    update: Update | None = None

    @property
    def rejected(self) -> int:
        """How many things that should have been converted are not in the output."""
        return sum(problem.is_rejection for problem in self.problems)

    @property
    def exit_status(self) -> int:
        """0, or 1 where more was rejected than allowed."""
        return int(self.rejected > self.max_rejected)
