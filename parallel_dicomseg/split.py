"""Patients in training, validation and test: whole ones, and the same ones in every run. Pure.

The order in which patients are dealt out is that of a hash of the seed and the patient's name: it
depends on nothing else, neither on the order of the images nor on the version of a library. So,
without strata, a patient who joins the cohort moves only those at the seams between the parts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Bytes, Float64, Int64

#: Names of the parts, in the order of their fractions.
PARTS = ("train", "validation", "test")
_TOLERANCE = 1e-6
_BITS = 64


def split_patients(
    patient_id: Bytes,
    fractions: tuple[float, ...],
    seed: int,
    strata: NDArray[np.uint64] | None = None,
) -> Bytes:
    """Deal out patients to the parts of a split.

    Parameters
    ----------
    patient_id
        (n,) of each image; equal names are one patient, whatever their series and folders.
    fractions
        Of the patients: train, validation and test; two are train and validation, one is train.
        They make 1.
    seed
        Another one gives another split.
    strata
        (n,) uint64, bit s: the image has structure s. Then every structure's patients are spread
        in the same proportions, as well as whole patients allow.

    Returns
    -------
    (n,) b'train', b'validation' or b'test'. The number of patients in a part is the fraction of
    all, rounded by largest remainder; a part with a fraction above 0 has at least one patient
    where there are as many patients as such parts, otherwise the largest fractions come first.

    Raises
    ------
    ConfigurationError
        The fractions are not one to three numbers from 0 to 1 that make 1.

    Notes
    -----
    Stratified: iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, "On the
    stratification of multi-label data", ECML PKDD), with one change: a part that is full takes no
    more patients, so that the parts have the sizes above.
    """
    check_fractions(fractions)
    patients, row_patient = np.unique(patient_id, return_inverse=True)
    sizes = part_sizes(len(patients), fractions)
    lots = [_lot(patient, seed) for patient in patients.tolist()]
    order = np.array(sorted(range(len(lots)), key=lots.__getitem__), np.int64)
    if strata is None:
        part = np.empty(len(patients), np.int64)
        part[order] = np.repeat(np.arange(len(sizes)), sizes)
    else:
        has = np.zeros(len(patients), np.uint64)
        np.bitwise_or.at(has, row_patient, strata)
        part = _stratify(has, order, np.array(sizes), np.array(fractions))
    return np.array(PARTS, np.bytes_)[part][row_patient]


def part_sizes(patients: int, fractions: tuple[float, ...]) -> tuple[int, ...]:
    """How many patients each part gets: largest remainder, and nobody nothing where avoidable."""
    total = math.fsum(fractions)
    # 0.07 * 100 is a little more than 7: what is 1e-9 off a whole number is one.
    quotas = [round(patients * fraction / total, 9) for fraction in fractions]
    sizes = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (sizes[k] - quotas[k], k))
    for k in by_remainder[: patients - sum(sizes)]:
        sizes[k] += 1
    by_fraction = sorted(range(len(sizes)), key=lambda k: (-fractions[k], k))
    for k in by_fraction:
        largest = max(range(len(sizes)), key=lambda j: (sizes[j], -j))
        if fractions[k] > 0 and sizes[k] == 0 and sizes[largest] > 1:
            sizes[k], sizes[largest] = 1, sizes[largest] - 1
    return tuple(sizes)


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Refuse what is no split.

    Raises
    ------
    ConfigurationError
        The fractions are not one to three numbers from 0 to 1 that make 1.
    """
    listed = " ".join(f"{fraction:g}" for fraction in fractions)
    if not 1 <= len(fractions) <= len(PARTS):
        raise ConfigurationError(f"split: {len(fractions)} fractions ({listed}), not one to three")
    total = math.fsum(fractions)
    if not all(fraction >= 0 for fraction in fractions) or not abs(total - 1) <= _TOLERANCE:
        message = f"split: {listed} make {total:g}; fractions are 0 or more and make 1"
        raise ConfigurationError(message)


def _lot(patient: bytes, seed: int) -> tuple[bytes, bytes]:
    return hashlib.blake2b(b"%d:%b" % (seed, patient), digest_size=16).digest(), patient


def _stratify(has: NDArray[np.uint64], order: Int64, sizes: Int64, fractions: Float64) -> Int64:
    """(p,) part of each patient, whose structures are the bits of `has` (p,)."""
    bits = has[:, None] >> np.arange(_BITS, dtype=np.uint64)
    label = (bits & np.uint64(1)).astype(np.bool_)
    part = np.full(len(has), -1, np.int64)
    room = sizes.copy()
    wanted = label.sum(axis=0)[:, None] * fractions  # (64, parts) patients still due
    for patient, rarest in _rarest_first(label, order):
        due = room * 0.0 if rarest is None else wanted[rarest]
        best = max(np.flatnonzero(room).tolist(), key=lambda j: (due[j], room[j], -j))
        part[patient] = best
        room[best] -= 1
        wanted[label[patient], best] -= 1
    return part


def _rarest_first(label: NDArray[np.bool_], order: Int64) -> Iterator[tuple[int, int | None]]:
    """Patients, those with the structure that fewest of the rest have first; without any last."""
    left = np.ones(len(label), np.bool_)
    while True:
        count = label[left].sum(axis=0)
        if not count.any():
            break
        rarest = int(np.argmin(np.where(count > 0, count, len(label) + 1)))
        for patient in order[(left & label[:, rarest])[order]].tolist():
            left[patient] = False
            yield patient, rarest
    yield from ((patient, None) for patient in order[left[order]].tolist())
