"""Images in the order of the patient: series, volumes, positions; and what is odd about them.

Pure and without a loop over rows: strings become numbers at the door, and a group of rows is named
by the first of its rows in path order, which names it and orders it at once. The policies are said
for users in docs/cohort.md.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.decoders import (
    DEFLATED_LITTLE_ENDIAN,
    EXPLICIT_BIG_ENDIAN,
    EXPLICIT_LITTLE_ENDIAN,
    IMPLICIT_LITTLE_ENDIAN,
)
from parallel_dicomseg.geometry import normal_of
from parallel_dicomseg.records import Bytes, Float64, Int32, Int64, Problem, Reason, SliceTable

#: Cosines of one orientation differ by at most this from the next nearest one (0.06 degrees).
SAME_COSINE = 1.001e-3
#: mm along the normal between images at one position.
SAME_POSITION = 1e-3
#: A distance between slices is uneven where it is farther off the volume's median than this part.
UNEVEN = 0.1
#: Degrees between the step from slice to slice and the normal that count as gantry tilt.
TILT = 1.0

# Not usable as a place: mm, and what a unit vector's cosine and the two axes' product may be.
_FARTHEST, _LARGEST_COSINE, _SMALLEST_NORMAL = 1e6, 1.1, 0.1
# Where a file lies, and what the scan has not filled in: no part of what a file says.
_NOT_OF_THE_FILE = frozenset({"path", "patient_id", "pixel_offset", "volume", "annotated", "split"})
# How a file writes the same image down; of colour also the photometric interpretation.
_ENCODING = frozenset({"file_size", "pixel_length", "transfer_syntax_uid"})
_COLOR_SAMPLES = 3
# Transfer syntaxes whose pixels are no codestream (DICOM PS3.5 A.1 to A.3, A.5).
_NATIVE = frozenset(
    uid.encode()
    for uid in (
        IMPLICIT_LITTLE_ENDIAN,
        EXPLICIT_LITTLE_ENDIAN,
        EXPLICIT_BIG_ENDIAN,
        DEFLATED_LITTLE_ENDIAN,
    )
)
_DIGITS = re.compile(r"([0-9]+)")

Bool = NDArray[np.bool_]
NaturalKey = tuple[tuple[str | tuple[int, str], ...], str]


@dataclass(frozen=True, slots=True)
class Ordered:
    """The m images to keep, in the order of the output."""

    index: Int64
    """(m,) rows of the SliceTable that was given."""
    volume: Int32
    """(m,) from 0, ascending."""
    localizer: Bool
    """(m,) whether the image is a localizer, to be left out unless somebody drew on it."""
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The m images that are kept, in path order; a group is named by its first row."""

    path: Bytes
    patient: Int64
    """(m,) rank in natural order."""
    study: Int64
    series: Int64
    localizer: Bool
    placed: Bool
    """(m,) whether position and orientation are usable."""
    position: Float64
    """(m, 3) mm; NaN where not placed."""
    orientation: Float64
    """(m, 6); NaN where not placed."""
    direction: Int64
    """(m,) group of images of one series and orientation."""
    shape: Int64
    """(m, 2) rows, columns."""
    stack: Int64
    """(m,) group of images of one direction and shape."""
    height: Float64
    """(m,) mm along the stack's normal; the instance number where not placed."""
    spot: Int64
    """(m,) group of images of one stack at one position; the image alone where not placed."""
    time: Int64
    """(m,) rank among the images of the spot, from 0."""


def order_volumes(images: SliceTable) -> Ordered:
    """Put the images of a scan in order, spread them over volumes, and report what is odd.

    The order is: patient (natural order), study and series (by their first image in path order),
    volume, position along the normal. A volume is what has one patient, series, size, orientation
    (within `SAME_COSINE`) and time: of several images at one position (within `SAME_POSITION`),
    the k-th by (temporal position, acquisition, instance, path, frame) is in the k-th volume.
    Images without a usable position are one volume by instance number, path and frame.

    Parameters
    ----------
    images
        (n,) all frames of all images, in any order; the result depends on the paths alone.

    Returns
    -------
    The rows to keep in order, their volumes, and problems: `REPEATED` and `DUPLICATE` for each
    file that holds an image again, which is left out; `LOCALIZER` for each series with some;
    `SERIES_IRREGULAR` for several orientations, sizes or studies in a series, several images at a
    position, uneven distances, gantry tilt, and images without position. Nothing is raised.

    Notes
    -----
    DICOM PS3.3 C.7.6.2.1.1 (position and orientation), C.7.6.1.1.2 (Image Type).
    """
    if not len(images):
        return Ordered(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.bool_), ())
    copied, copies = _find_copies(images)
    in_path_order = np.lexsort((images.frame, images.path))
    kept = in_path_order[~copied[in_path_order]]
    rows = _group(images, kept)
    keys = (rows.stack, rows.series, rows.study[rows.series], rows.patient)
    order = np.lexsort((rows.height, rows.time, *keys))
    starts = _changes(rows.stack[order]) | _changes(rows.time[order])
    volume = np.cumsum(starts) - 1
    problems = [
        *copies,
        *_report_images(images.sop_instance_uid[kept], rows),
        *_report_mixtures(rows),
        *_report_spots(rows),
        *_report_steps(rows, order, volume),
    ]
    return Ordered(kept[order], volume.astype(np.int32), rows.localizer[order], tuple(problems))


def gap_before(images: SliceTable) -> Bool:
    """Whether the distance to the slice before is more than `UNEVEN` off its volume's median.

    Parameters
    ----------
    images
        (n,) with `volume` assigned, sorted by volume and position.

    Returns
    -------
    (n,) false for the first slice of a volume and for images without position.
    """
    if not len(images):
        return np.zeros(0, np.bool_)
    _, position, orientation = _places(images, np.arange(len(images)))
    run = np.cumsum(_changes(images.volume)) - 1
    step = _steps(run, position, orientation)
    return _is_uneven(step, _median(run, step)[run])


def natural_key(name: str) -> NaturalKey:
    """Sorts numbers inside a name as integers: P2 before P10."""
    parts = _DIGITS.split(name)
    return tuple(_by_size(part) if k % 2 else part.casefold() for k, part in enumerate(parts)), name


def _by_size(digits: str) -> tuple[int, str]:
    """Sorts digits as the integer that they are; `int` itself refuses thousands of them."""
    significant = digits.lstrip("0")
    return len(significant), significant


# Groups of rows


def _changes(sorted_column: NDArray[Any]) -> Bool:
    """(n,) whether a row differs from the one before; n > 0."""
    changes = np.ones(len(sorted_column), np.bool_)
    changes[1:] = sorted_column[1:] != sorted_column[:-1]
    return changes


def _first_rows(order: Int64, starts: Bool) -> Int64:
    """(n,) the first row of each row's group; the groups are runs of `order` from each start."""
    heads = np.flatnonzero(starts)
    first = np.empty_like(order)
    lengths = np.diff(heads, append=len(order))
    first[order] = np.repeat(np.minimum.reduceat(order, heads), lengths)
    return first


def _same(*columns: NDArray[Any]) -> Int64:
    """(n,) the first row that has the same numbers in all columns."""
    order = np.lexsort(columns)
    starts: Bool = np.logical_or.reduce([_changes(column[order]) for column in columns])
    return _first_rows(order, starts)


def _near(group: Int64, value: Float64, tolerance: float) -> Int64:
    """Cut each group where two neighbours in the order of `value` are farther apart."""
    order = np.lexsort((value, group))
    far = np.diff(value[order], prepend=np.inf) > tolerance
    return _first_rows(order, _changes(group[order]) | far)


def _codes(text: Bytes) -> tuple[Int64, Bytes]:
    """(n,) numbers of the texts, and the texts in order; quick where equal ones are neighbours."""
    heads = np.flatnonzero(_changes(text))
    values, code = np.unique(text[heads], return_inverse=True)
    return np.repeat(code, np.diff(heads, append=len(text))), values


def _is_first(group: Int64) -> Bool:
    """(n,) whether the row names its group."""
    first: Bool = group == np.arange(len(group))
    return first


def _group(images: SliceTable, kept: Int64) -> _Rows:
    patient, patients = _codes(images.patient_id[kept])
    by_name = sorted(
        range(len(patients)), key=lambda k: natural_key(os.fsdecode(bytes(patients[k])))
    )
    series = _same(_series_codes(images, kept), patient)
    study = _same(_codes(images.study_instance_uid[kept])[0], patient)
    localizer = _is_localizer(images.image_type[kept])
    placed, position, orientation = _places(images, kept)
    direction = _same(placed, localizer, series)
    for cosine in np.where(placed[:, None], orientation, 0.0).T:
        direction = _near(direction, cosine, SAME_COSINE)
    shape = np.stack([images.rows[kept], images.columns[kept]], axis=1).astype(np.int64)
    stack = _same(shape[:, 1], shape[:, 0], direction)
    along = np.einsum("ij,ij->i", position, normal_of(orientation)[stack])
    spot = _near(stack, np.where(placed, along, 0.0), SAME_POSITION)
    spot = np.where(placed, spot, np.arange(len(kept)))
    return _Rows(
        path=images.path[kept],
        patient=np.argsort(by_name)[patient],
        study=study,
        series=series,
        localizer=localizer,
        placed=placed,
        position=position,
        orientation=orientation,
        direction=direction,
        shape=shape,
        stack=stack,
        height=np.where(placed, along, images.instance_number[kept]),
        spot=spot,
        time=_times(images, kept, spot),
    )


def _series_codes(images: SliceTable, kept: Int64) -> Int64:
    """(m,) numbers of the series; images without a series' UID are one series per folder."""
    code, uids = _codes(images.series_instance_uid[kept])
    unnamed = images.series_instance_uid[kept] == b""
    if unnamed.any():
        code[unnamed] = len(uids) + _codes(_folders(images.path[kept[unnamed]]))[0]
    return code


def _folders(path: Bytes) -> Bytes:
    """(n,) what comes before the last '/', b'' where there is none."""
    letters = np.ascontiguousarray(path).view(np.uint8).reshape(len(path), -1)
    slash = letters == ord("/")
    last = letters.shape[1] - 1 - np.argmax(slash[:, ::-1], axis=1)
    last[~slash.any(axis=1)] = 0
    inside = np.arange(letters.shape[1]) < last[:, None]
    folders: Bytes = np.where(inside, letters, 0).astype(np.uint8).view(path.dtype).ravel()
    return folders


def _is_localizer(image_type: Bytes) -> Bool:
    """(m,) whether value 3 of Image Type is LOCALIZER, or any value says SCOUT."""
    code, values = _codes(image_type)
    parts = [[part.strip() for part in value.upper().split(b"\\")] for value in values.tolist()]
    named = [part[2:3] == [b"LOCALIZER"] or any(b"SCOUT" in p for p in part) for part in parts]
    localizers: Bool = np.array(named, np.bool_)
    return localizers[code]


def _places(images: SliceTable, kept: Int64) -> tuple[Bool, Float64, Float64]:
    """(m,) whether an image has a place, its position (m, 3) and orientation (m, 6), else NaN."""
    position = images.image_position_patient[kept]
    orientation = images.image_orientation_patient[kept]
    # Comparisons with NaN are false, and what is too large is out before it is multiplied.
    near = np.abs(position).max(axis=1) <= _FARTHEST
    placed: Bool = near & (np.abs(orientation).max(axis=1) <= _LARGEST_COSINE)
    orientation = np.where(placed[:, None], orientation, np.nan)
    across = np.cross(orientation[:, :3], orientation[:, 3:])
    placed &= np.linalg.norm(across, axis=1) > _SMALLEST_NORMAL
    nowhere = ~placed[:, None]
    return placed, np.where(nowhere, np.nan, position), np.where(nowhere, np.nan, orientation)


def _times(images: SliceTable, kept: Int64, spot: Int64) -> Int64:
    """(m,) rank among the images at one position, from 0."""
    # lexsort is stable and puts NaN last: equal keys stay in the order of path and frame.
    keys = (images.instance_number, images.acquisition_number, images.temporal_position)
    order = np.lexsort((*(key[kept] for key in keys), spot))
    heads = np.flatnonzero(_changes(spot[order]))
    time = np.empty_like(order)
    time[order] = np.arange(len(order)) - np.repeat(heads, np.diff(heads, append=len(order)))
    return time


# Copies


def _find_copies(images: SliceTable) -> tuple[Bool, list[Problem]]:
    """Files that hold an image of the same patient again.

    Kept is the first path that is not compressed, else the first path.

    Returns
    -------
    (n,) whether the row is left out; and one problem per file.
    """
    order = np.lexsort((images.frame, images.path, _is_compressed(images.transfer_syntax_uid)))
    uid = images.sop_instance_uid[order]
    instance = _same(_codes(uid)[0], _codes(images.patient_id[order])[0])
    file = np.cumsum(_changes(images.path[order])) - 1
    copied = np.zeros(len(images), np.bool_)
    copies = np.flatnonzero((uid != b"") & (file != file[instance]))
    if not len(copies):
        return copied, []
    copied[order[copies]] = True
    same_frame = _same(images.frame[order], instance)[copies]
    lost = file[same_frame] != file[instance[copies]]
    differing = _differences(images, order[copies], order[same_frame], lost)
    first = copies[_changes(file[copies])]
    return copied, [_copy(images, order[row], order[instance[row]], differing) for row in first]


def _is_compressed(transfer_syntax_uid: Bytes) -> Bool:
    """(n,) whether pixels are encapsulated (DICOM PS3.5 A.4)."""
    code, values = _codes(transfer_syntax_uid)
    compressed: Bool = np.array([value not in _NATIVE for value in values.tolist()], np.bool_)
    return compressed[code]


def _differences(images: SliceTable, left: Int64, right: Int64, lost: Bool) -> dict[bytes, str]:
    """Path of each file with a row in `left` that is not as that in `right` -> which column."""
    found = dict.fromkeys(images.path[left[lost]].tolist(), "number_of_frames")
    names = {field.name for field in fields(images)} - _NOT_OF_THE_FILE - _ENCODING
    for name in sorted(names):
        rows = _unequal(images, name, left, right)
        for path in images.path[left[rows]].tolist():
            found.setdefault(path, name)
    return found


def _unequal(images: SliceTable, name: str, left: Int64, right: Int64) -> Bool:
    """(k,) whether two rows differ in a column; what NaN stands for is equal."""
    a, b = getattr(images, name)[left], getattr(images, name)[right]
    unequal = a != b
    if a.dtype.kind == "f":
        unequal &= ~(np.isnan(a) & np.isnan(b))
    rows: Bool = unequal.reshape(len(left), -1).any(axis=1)
    if name == "photometric_interpretation":  # YBR_RCT is how JPEG 2000 writes RGB down
        samples = images.samples_per_pixel
        rows &= (samples[left] != _COLOR_SAMPLES) | (samples[right] != _COLOR_SAMPLES)
    return rows


def _copy(images: SliceTable, row: int, original: int, differing: dict[bytes, str]) -> Problem:
    path = bytes(images.path[row])
    same = "the same (0008,0018) SOP Instance UID as another file of the patient"
    if (name := differing.get(path)) is None:
        return Problem(
            os.fsdecode(path), Reason.REPEATED, f"{same}; {_likeness(images, row, original)}"
        )
    column = getattr(images, name)
    what = f"another {name}"
    if column.dtype.kind in "iuf":
        what = f"{name} {_text(column[row])} instead of {_text(column[original])}"
    return Problem(os.fsdecode(path), Reason.DUPLICATE, f"{same}, but {what}")


def _likeness(images: SliceTable, row: int, original: int) -> str:
    """What is alike of two files of one image."""
    if images.transfer_syntax_uid[row] != images.transfer_syntax_uid[original]:
        return "the same header in another encoding (transfer syntax)"
    sizes = images.file_size[[row, original]].tolist()
    if sizes[0] != sizes[1]:
        return f"the same header, {sizes[0]} bytes instead of {sizes[1]}"
    return "the same size and header"


def _text(numbers: NDArray[Any]) -> str:
    flat = np.atleast_1d(numbers).tolist()
    return " ".join(str(n) if isinstance(n, int) else f"{n:.6g}" for n in flat)


# Reports


def _path(rows: _Rows, row: int) -> str:
    return os.fsdecode(rows.path[row])


def _irregular(rows: _Rows, row: int, detail: str) -> Problem:
    return Problem(_path(rows, row), Reason.SERIES_IRREGULAR, detail)


def _count(rows: _Rows, chosen: Bool) -> Iterator[tuple[int, int, int]]:
    """For each series with chosen images: the first of them, how many, and of how many."""
    members = np.bincount(rows.series, minlength=len(rows.series))
    series, first, count = np.unique(rows.series[chosen], return_index=True, return_counts=True)
    heads = np.flatnonzero(chosen)[first]
    yield from zip(heads.tolist(), count.tolist(), members[series].tolist(), strict=True)


def _report_images(sop_instance_uid: Bytes, rows: _Rows) -> Iterable[Problem]:
    """Series of which some images are localizers, without place, of other studies or patients."""
    alone = np.bincount(rows.series)[rows.series] == 1
    owner = rows.patient[_same(_codes(sop_instance_uid)[0])]
    texts = {
        "are localizers by (0008,0008) Image Type; left out unless somebody drew on them": (
            Reason.LOCALIZER,
            rows.localizer,
        ),
        "have no usable (0020,0032) Image Position (Patient) and (0020,0037) Image Orientation "
        "(Patient); ordered by instance number, path and frame": (
            Reason.SERIES_IRREGULAR,
            ~rows.placed & ~rows.localizer & ~alone,
        ),
        "have another (0020,000D) Study Instance UID than the first; they stay together": (
            Reason.SERIES_IRREGULAR,
            rows.study != rows.study[rows.series],
        ),
        "have the (0008,0018) SOP Instance UID of an image of another patient; both are kept": (
            Reason.REPEATED,
            (sop_instance_uid != b"") & (rows.patient != owner),
        ),
    }
    for text, (reason, chosen) in texts.items():
        for row, count, members in _count(rows, chosen):
            detail = f"{count} of {members} images of the series {text}"
            yield Problem(_path(rows, row), reason, detail)


def _report_mixtures(rows: _Rows) -> Iterable[Problem]:
    """Series of several orientations, sizes or studies."""
    shown = rows.placed & ~rows.localizer
    stacks: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(shown & _is_first(rows.stack)).tolist():
        stacks[int(rows.series[row])].append(row)
    for heads in stacks.values():
        parts = [*_mixed_orientations(rows, heads), *_mixed_sizes(rows, heads)]
        if parts:
            yield _irregular(rows, heads[0], f"{'; '.join(parts)}: each is a volume of its own")


def _mixed_orientations(rows: _Rows, heads: list[int]) -> Iterable[str]:
    directions = list(dict.fromkeys(rows.direction[heads].tolist()))
    if len(directions) > 1:
        first, second = (_text(rows.orientation[row]) for row in directions[:2])
        yield (
            f"{len(directions)} different (0020,0037) Image Orientation (Patient) in the series, "
            f"first {first} and {second}"
        )


def _mixed_sizes(rows: _Rows, heads: list[int]) -> Iterable[str]:
    shapes = list(dict.fromkeys(map(tuple, rows.shape[heads].tolist())))
    if len(shapes) > 1:
        first, second = (f"{shape[0]} x {shape[1]}" for shape in shapes[:2])
        yield f"{len(shapes)} different sizes in the series, first {first} and {second}"


def _report_spots(rows: _Rows) -> Iterable[Problem]:
    """Stacks with several images at a position."""
    images_at = np.bincount(rows.spot, minlength=len(rows.spot))
    shown = rows.placed & ~rows.localizer
    spots = np.flatnonzero(shown & _is_first(rows.spot))
    spots = spots[np.argsort(rows.stack[spots], kind="stable")]
    if not len(spots):
        return
    heads = np.flatnonzero(_changes(rows.stack[spots]))
    fewest = np.minimum.reduceat(images_at[spots], heads)
    most = np.maximum.reduceat(images_at[spots], heads)
    total = np.add.reduceat(images_at[spots], heads)
    positions = np.diff(heads, append=len(spots))
    for k in np.flatnonzero(most > 1).tolist():
        volumes = f"{most[k]} volumes"
        detail = f"cine: {positions[k]} position(s) x {most[k]} images: {volumes}"
        if fewest[k] < most[k]:
            detail = (
                f"{total[k]} images at {positions[k]} positions, {fewest[k]} to {most[k]} at each: "
                f"{volumes}, not all complete"
            )
        yield _irregular(rows, int(rows.stack[spots[heads[k]]]), detail)


def _report_steps(rows: _Rows, order: Int64, volume: Int64) -> Iterable[Problem]:
    """Volumes with uneven distances or gantry tilt; equal reports of one stack are one."""
    position, orientation = rows.position[order], rows.orientation[order]
    step = _steps(volume, position, orientation)
    median = _median(volume, step)
    uneven = np.bincount(volume[_is_uneven(step, median[volume])], minlength=len(median))
    tilt = _tilt(volume, position, orientation)
    heads = np.flatnonzero(_changes(volume))
    widest = np.maximum.reduceat(np.nan_to_num(step), heads)
    steps = np.diff(heads, append=len(volume)) - 1
    shown = ~rows.localizer[order[heads]]
    found: Counter[tuple[int, str]] = Counter()
    for k in np.flatnonzero(shown & (uneven > 0)).tolist():
        detail = (
            f"{uneven[k]} of {steps[k]} distances between slices are more than {UNEVEN:.0%} off "
            f"their median of {median[k]:.6g} mm; the largest is {widest[k]:.6g} mm"
        )
        found[int(rows.stack[order[heads[k]]]), detail] += 1
    for k in np.flatnonzero(shown & (tilt > TILT)).tolist():
        detail = f"gantry tilt: the step between slices is {tilt[k]:.1f} degrees off the normal"
        found[int(rows.stack[order[heads[k]]]), detail] += 1
    for (row, detail), count in found.items():
        yield _irregular(rows, row, detail + (f" (in {count} volumes)" if count > 1 else ""))


# Distances; rows are sorted by volume and position here


def _steps(volume: NDArray[Any], position: Float64, orientation: Float64) -> Float64:
    """(n,) mm along the volume's normal from the slice before; NaN where there is none."""
    heads = np.flatnonzero(_changes(volume))
    lengths = np.diff(heads, append=len(volume))
    normal = np.repeat(normal_of(orientation[heads]), lengths, axis=0)
    step: Float64 = np.einsum("ij,ij->i", np.diff(position, axis=0, prepend=np.nan), normal)
    step[heads] = np.nan
    return step


def _median(volume: Int64, step: Float64) -> Float64:
    """(v,) the median step of each volume, the lower of two middle ones; NaN without a step."""
    ascending: Float64 = step[np.lexsort((step, volume))]  # NaN comes last
    count = np.bincount(volume[np.isfinite(step)], minlength=int(volume[-1]) + 1)
    heads = np.flatnonzero(_changes(volume))
    median: Float64 = ascending[heads + np.maximum(count - 1, 0) // 2]
    return median


def _is_uneven(step: Float64, median: Float64) -> Bool:
    uneven: Bool = np.abs(step - median) > UNEVEN * np.abs(median)
    return uneven


def _tilt(volume: Int64, position: Float64, orientation: Float64) -> Float64:
    """(v,) degrees between the way from the first to the last slice and the normal; 0 for one."""
    heads = np.flatnonzero(_changes(volume))
    last = np.append(heads[1:], len(volume)) - 1
    way, normal = position[last] - position[heads], normal_of(orientation[heads])
    aside = np.linalg.norm(np.cross(way, normal), axis=1)
    along = np.abs(np.einsum("ij,ij->i", way, normal))
    degrees: Float64 = np.degrees(np.arctan2(aside, along))
    return degrees
