"""Which volume an annotation was drawn on, and which slice each of its planes is.

A reference by UID is a hint that is checked; planes decide. A plane lies on a slice where their
distance along the volume's normal is within a quarter of the distance to the next slice; what lies
outside the volume, or between slices, belongs to none, and is never moved.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.geometry import heights_above, normal_of
from parallel_dicomseg.records import Float64, Int64, SliceTable

#: A plane lies on a slice within this fraction of the distance to the slice's neighbour.
TOLERANCE = 0.25
# Where a slice has no neighbour and no thickness: mm.
_LONELY_DISTANCE = 2.0
# Planes may be tilted against the volume by this (1 - cosine), which is 0.8 degrees.
_TILT = 1e-4

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Volume:
    """Parallel slices of one series, ordered by position along their normal."""

    rows: Int64
    """(k,) rows of the SliceTable."""
    positions: Float64
    """(k,) mm along the normal, ascending."""
    tolerances: Float64
    """(k,) mm within which a plane lies on the slice."""
    normal: Float64
    """(3,) unit vector."""
    patient_id: bytes
    series_instance_uid: bytes
    frame_of_reference_uids: frozenset[bytes]
    folder: str
    """Of its first image, relative to the root."""

    def on_slices(self, points_patient: Float64) -> Int64:
        """(r,) row of the SliceTable on which each ring or frame lies; -1: on none.

        Of each, one point (r, 3) or several (r, k, 3) are given, mm: all of them lie on the slice.
        """
        heights = heights_above(points_patient, self.normal)
        if heights.ndim == 1:
            return self.slices_between(heights, heights)
        return self.slices_between(heights.min(axis=1), heights.max(axis=1))

    def slices_between(self, lowest: Float64, highest: Float64) -> Int64:
        """(r,) row on which each ring lies whose points reach from `lowest` to `highest` (r,), mm
        along the normal; -1: on none.
        """
        nearest = self._nearest((lowest + highest) / 2)
        off = np.maximum(highest - self.positions[nearest], self.positions[nearest] - lowest)
        return np.where(off <= self.tolerances[nearest], self.rows[nearest], -1)

    def distances_from(self, heights: Float64) -> tuple[Float64, Float64]:
        """(r,) mm from each height to the nearest slice, and that slice's tolerance."""
        nearest = self._nearest(heights)
        return np.abs(heights - self.positions[nearest]), self.tolerances[nearest]

    def _nearest(self, heights: Float64) -> Int64:
        """(r,) place of the nearest slice; of two equally near ones the first."""
        last = len(self.rows) - 1
        after = np.minimum(np.searchsorted(self.positions, heights), last)
        before = np.maximum(after - 1, 0)
        nearer = heights - self.positions[before] <= self.positions[after] - heights
        return np.where(nearer, before, after)


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """The images of a scan, ready to be looked up."""

    volumes: tuple[Volume, ...]
    by_sop_instance_uid: dict[bytes, list[int]]
    """Rows of the SliceTable."""
    volume_of_row: dict[int, int]
    """Place in `volumes`; images without position are in none."""
    by_series: dict[bytes, list[int]]
    """Places in `volumes`, like the following."""
    by_frame_of_reference: dict[bytes, list[int]]
    by_patient: dict[bytes, list[int]]
    by_folder: dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Match:
    """The volumes of one series that an annotation was drawn on."""

    volumes: tuple[Volume, ...]
    found_by: str
    """'reference', 'frame-of-reference' or 'geometry'."""
    rivals: int
    """How many other series fit as well and are as near in the tree: 0, or nobody can say. One that
    is referred to as well is a rival only if it has a plane that this one has."""

    @property
    def rows(self) -> Int64:
        """Rows of all slices, ascending."""
        return np.sort(np.concatenate([volume.rows for volume in self.volumes]))

    def on_slices(self, points_patient: Float64) -> Int64:
        """(r,) row of the SliceTable on which each point (r, 3), or all points of each ring
        (r, k, 3), lie; -1: on none.

        Of several volumes the first that has the plane.
        """
        found = np.full(len(points_patient), -1, np.int64)
        for volume in self.volumes:
            missing = found < 0
            found[missing] = volume.on_slices(points_patient[missing])
        return found


def index_images(images: SliceTable) -> ImageIndex:
    """Look-up tables of images whose `volume` is assigned and that are sorted by it."""
    rows_of = np.flatnonzero(_are_placed(images) & (images.volume >= 0))
    rows_of = rows_of[np.argsort(images.volume[rows_of], kind="stable")]
    starts = np.flatnonzero(np.diff(images.volume[rows_of], prepend=-2))
    volumes = tuple(_volume(images, rows) for rows in np.split(rows_of, starts[1:]) if len(rows))
    uids = enumerate(images.sop_instance_uid.tolist())
    places = tuple(enumerate(volumes))
    return ImageIndex(
        volumes=volumes,
        by_sop_instance_uid=_grouped((uid, row) for row, uid in uids if uid),
        volume_of_row={row: k for k, volume in places for row in volume.rows.tolist()},
        by_series=_grouped((v.series_instance_uid, k) for k, v in places),
        by_frame_of_reference=_grouped(
            (uid, k) for k, v in places for uid in v.frame_of_reference_uids
        ),
        by_patient=_grouped((v.patient_id, k) for k, v in places),
        by_folder=_grouped((v.folder, k) for k, v in places),
    )


def _are_placed(images: SliceTable) -> NDArray[np.bool_]:
    """(n,) whether an image says where in the patient it lies."""
    normals = normal_of(images.image_orientation_patient)
    placed = np.isfinite(np.concatenate([images.image_position_patient, normals], axis=1))
    spaced = np.isfinite(images.pixel_spacing) & (images.pixel_spacing > 0)
    both: NDArray[np.bool_] = np.logical_and.reduce([*placed.T, *spaced.T])
    return both


def _grouped(pairs: Iterable[tuple[Key, int]]) -> dict[Key, list[int]]:
    groups: dict[Key, list[int]] = defaultdict(list)
    for key, number in pairs:
        groups[key].append(number)
    return dict(groups)


def _volume(images: SliceTable, rows: Int64) -> Volume:
    normal = normal_of(images.image_orientation_patient[rows[0]])
    positions = heights_above(images.image_position_patient[rows], normal)
    order = np.argsort(positions, kind="stable")
    rows, positions = rows[order], positions[order]
    first = int(rows[0])
    return Volume(
        rows=rows,
        positions=positions,
        tolerances=TOLERANCE * _distances(positions, images.slice_thickness[rows]),
        normal=normal,
        patient_id=bytes(images.patient_id[first]),
        series_instance_uid=bytes(images.series_instance_uid[first]),
        frame_of_reference_uids=frozenset(images.frame_of_reference_uid[rows].tolist()) - {b""},
        folder=os.fsdecode(images.path[first]).rpartition("/")[0],
    )


def _distances(positions: Float64, thickness: Float64) -> Float64:
    """(k,) mm from each slice to its nearest neighbour, or its thickness where it has none."""
    gaps = np.diff(positions)
    nearest = np.minimum(np.append(gaps, np.inf), np.insert(gaps, 0, np.inf))
    alone = np.where(np.isfinite(thickness) & (thickness > 0), thickness, _LONELY_DISTANCE)
    return np.where(np.isfinite(nearest) & (nearest > 0), nearest, alone)


def find_volumes(
    index: ImageIndex,
    points_patient: Float64,
    *,
    path: str,
    patient_id: bytes,
    frame_of_reference_uid: bytes,
    series_instance_uids: Collection[bytes] = (),
    sop_instance_uids: Collection[bytes] = (),
    normal: Float64 | None = None,
) -> Match | None:
    """The volumes of the series that an annotation file was drawn on.

    Parameters
    ----------
    index
        The images.
    points_patient
        (r, 3) mm: one point of each ring or frame; or (r, k, 3), several of each, all of which
        must lie on the slice.
    path
        The annotation file, relative to the root: of equals the nearest in the tree is meant.
    patient_id, frame_of_reference_uid
        What the annotation file says; b'' where it says nothing.
    series_instance_uids, sop_instance_uids
        The images that it refers to, which need not exist.
    normal
        (3,) of the annotation's planes where it is known: volumes tilted against it do not fit.

    Returns
    -------
    The first that fits of: volumes that are referred to (another patient's only if there is none of
    this one), those of the frame of reference (but no other patient's), those of the patient or
    (where either side has no patient) of the folder. Among those the series with most planes on its
    slices, then with most images referred to, then the nearest in the tree.
    None where no plane of the annotation lies on any slice of them.
    """
    referred = _referred_volumes(index, sop_instance_uids)
    folder = path.rpartition("/")[0]
    by_series = _places(index.by_series, set(series_instance_uids) - {b""})
    by_frame = _places(index.by_frame_of_reference, {frame_of_reference_uid})
    by_reference = referred.keys() or by_series
    stages: tuple[tuple[str, Collection[int]], ...] = (
        ("reference", _not_others(index, by_reference, patient_id) or by_reference),
        ("frame-of-reference", _not_others(index, by_frame, patient_id)),
        ("geometry", _of_patient(index, patient_id, folder)),
    )
    for found_by, places in stages:
        fitting = [k for k in sorted(places) if _is_parallel(index.volumes[k], normal)]
        if match := _best(index, fitting, points_patient, found_by, folder, referred):
            return match
    return None


def _referred_volumes(index: ImageIndex, sop_instance_uids: Collection[bytes]) -> Counter[int]:
    """How many images of each volume are referred to."""
    return Counter(
        index.volume_of_row[row]
        for uid in sop_instance_uids
        for row in index.by_sop_instance_uid.get(uid, ())
        if row in index.volume_of_row
    )


def _places(by_key: dict[Key, list[int]], keys: Collection[Key]) -> list[int]:
    return [place for key in keys for place in by_key.get(key, ())]


def _not_others(index: ImageIndex, places: Iterable[int], patient_id: bytes) -> list[int]:
    """Those that are not known to be another patient's: tools give two patients the same UIDs."""
    return [k for k in places if not patient_id or index.volumes[k].patient_id in (b"", patient_id)]


def _of_patient(index: ImageIndex, patient_id: bytes, folder: str) -> list[int]:
    """Volumes of the patient, and of the folder where either side has no patient."""
    near = index.by_folder.get(folder, [])
    if not patient_id:
        return near
    nameless = [k for k in near if not index.volumes[k].patient_id]
    return index.by_patient.get(patient_id, []) + nameless


def _is_parallel(volume: Volume, normal: Float64 | None) -> bool:
    return normal is None or bool(abs(volume.normal @ normal) > 1 - _TILT)


def _best(
    index: ImageIndex,
    places: Sequence[int],
    points_patient: Float64,
    found_by: str,
    folder: str,
    referred: Counter[int],
) -> Match | None:
    """The best series among volumes, and how many others are as good; None where none fits."""
    by_series: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for place in places:
        volume = index.volumes[place]
        by_series[volume.patient_id, volume.series_instance_uid].append(place)
    scored = []
    for group in by_series.values():
        match = Match(tuple(index.volumes[k] for k in group), found_by, 0)
        planes = match.on_slices(points_patient) >= 0
        images = sum(referred[k] for k in group)
        scored.append(((int(planes.sum()), images, _nearness(match, folder)), match, planes))
    best = max((score for score, *_ in scored), default=(0,))
    if best[0] == 0:
        return None
    (_, winner, own), *others = [one for one in scored if one[0] == best]
    rivals = sum(found_by != "reference" or bool((own & planes).any()) for *_, planes in others)
    return replace(winner, rivals=rivals)


def _nearness(match: Match, folder: str) -> int:
    """How many folders the annotation and the images have in common, from the root on."""
    both = zip(match.volumes[0].folder.split("/"), folder.split("/"), strict=False)
    return len(list(takewhile(lambda parts: parts[0] == parts[1], both)))
