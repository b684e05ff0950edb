"""Whole patients, right counts, the same in every run, and structures spread evenly."""

import hashlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.split import PARTS, part_sizes, split_patients

EIGHTS = (0.8, 0.1, 0.1)
names = st.lists(st.binary(min_size=1, max_size=6).filter(lambda b: not b.endswith(b"\0")))
splits = st.sampled_from(
    [EIGHTS, (0.7, 0.3), (1.0,), (0.5, 0.0, 0.5), (0.34, 0.33, 0.33), (0.0, 1.0)]
)


def patients_of(parts, patient_id):
    """Patients of each part."""
    return {part: set(patient_id[parts == part.encode()].tolist()) for part in PARTS}


def cohort(n):
    """Names of n patients."""
    return np.array([b"P%d" % k for k in range(n)], "S8")


@given(names, splits, st.integers(-5, 2**70))
def test_split_is_that_of_the_plain_definition(patient_id, fractions, seed):
    """Patients by hash of seed and name, cut into runs of the sizes of the parts."""
    column = np.array(patient_id, "S6")
    distinct = {*patient_id}
    lots = sorted(
        distinct, key=lambda p: hashlib.blake2b(b"%d:%b" % (seed, p), digest_size=16).digest()
    )
    expected, sizes = {}, part_sizes(len(distinct), fractions)
    for part, size in zip(PARTS, sizes, strict=False):
        expected |= dict.fromkeys(lots[:size], part.encode())
        lots = lots[size:]

    parts = split_patients(column, fractions, seed)

    assert parts.tolist() == [expected[patient] for patient in patient_id]


@given(st.integers(0, 400), splits)
def test_sizes_are_the_largest_remainders(patients, fractions):
    """All patients are dealt out, within one of the exact fraction unless a part was saved."""
    sizes = part_sizes(patients, fractions)
    exact = [Fraction(str(f)) * patients for f in fractions]

    assert sum(sizes) == patients
    assert all(size == 0 for size, fraction in zip(sizes, fractions, strict=True) if fraction == 0)
    if patients >= 10:
        assert all(abs(size - quota) < 1 for size, quota in zip(sizes, exact, strict=True))
    if patients >= sum(fraction > 0 for fraction in fractions):
        assert all(size > 0 for size, f in zip(sizes, fractions, strict=True) if f > 0)


@pytest.mark.parametrize(
    ("patients", "fractions", "sizes"),
    [
        (10, EIGHTS, (8, 1, 1)),
        (100, (0.07, 0.93), (7, 93)),
        (5, EIGHTS, (3, 1, 1)),
        (3, EIGHTS, (1, 1, 1)),
        (2, EIGHTS, (1, 1, 0)),
        (1, (0.2, 0.8), (0, 1)),
        (0, EIGHTS, (0, 0, 0)),
        (7, (0.5, 0.5), (4, 3)),
    ],
)
def test_sizes_of_small_cohorts(patients, fractions, sizes):
    """Every part with a fraction has somebody where possible, the largest fractions first."""
    assert part_sizes(patients, fractions) == sizes


@given(names, st.booleans(), st.randoms(use_true_random=False))
def test_no_patient_is_on_two_sides_in_whatever_order(patient_id, stratify, random):
    """All images of a patient are in one part, and shuffling the images changes nothing."""
    column = np.array(patient_id * 2, "S6")
    strata = (np.arange(len(column)) % 5).astype(np.uint64) if stratify else None
    order = list(range(len(column)))
    random.shuffle(order)

    parts = split_patients(column, EIGHTS, 3, strata)
    shuffled = split_patients(column[order], EIGHTS, 3, None if strata is None else strata[order])

    assert all(
        Counter(zip(column, parts, strict=True))[pair] >= 2
        for pair in zip(column, parts, strict=True)
    )
    assert len({*zip(column.tolist(), parts.tolist(), strict=True)}) == len({*patient_id})
    assert shuffled.tolist() == parts[order].tolist()


def test_a_split_is_the_same_for_ever():
    """The parts of a fixed cohort and seed are written down here: no library may change them."""
    parts = split_patients(cohort(10), EIGHTS, 0)

    assert [parts.tolist().index(part) for part in (b"validation", b"test")] == [8, 0]
    assert parts.tolist().count(b"train") == 8


def test_another_seed_gives_another_split():
    """Ten seeds give several different test sets."""
    tests = {split_patients(cohort(50), EIGHTS, seed).tobytes() for seed in range(10)}

    assert len(tests) == 10


def test_a_new_patient_moves_few():
    """Who joins moves at most one patient across each seam."""
    before = split_patients(cohort(100), EIGHTS, 1)
    after = split_patients(cohort(101), EIGHTS, 1)[:100]

    assert (before != after).sum() <= 2


def test_strata_are_spread_in_proportion():
    """A structure that 10 of 100 patients have is in each part in proportion, at any seed."""
    random = np.random.default_rng(5)
    bits = random.random((100, 4)) < [0.1, 0.3, 0.5, 1.0]
    bits[:, 0] = np.arange(100) < 10
    strata = (bits << np.arange(4)).sum(axis=1).astype(np.uint64)

    for seed in range(20):
        parts = split_patients(cohort(100), EIGHTS, seed, strata)
        for part, fraction in zip(PARTS, EIGHTS, strict=True):
            members = parts == part.encode()
            assert members.sum() == 100 * fraction
            off = bits[members].sum(axis=0) - fraction * bits.sum(axis=0)
            assert np.abs(off).max() <= 2
            assert abs(off[0]) < 1e-9


def test_strata_count_the_patient_not_the_image():
    """The bits of all of a patient's images are the patient's."""
    patient_id = np.repeat(cohort(20), 3)
    strata = np.zeros(60, np.uint64)
    strata[1:30:3] = 1  # one image of each of ten patients

    parts = split_patients(patient_id, (0.5, 0.5), 0, strata)

    found = patients_of(parts, patient_id)
    have = set(patient_id[strata > 0].tolist())
    assert [len(found[part] & have) for part in PARTS] == [5, 5, 0]


@given(names, st.lists(st.integers(0, 2**64 - 1), min_size=1), splits)
def test_stratified_parts_have_the_same_sizes(patient_id, bits, fractions):
    """Stratifying moves patients, never the numbers; the 64th structure counts as well."""
    column = np.array(patient_id, "S6")
    strata = np.resize(np.array(bits, np.uint64), len(column))

    found = patients_of(split_patients(column, fractions, 9, strata), column)

    sizes = tuple(len(found[part]) for part in PARTS)[: len(fractions)]
    assert sizes == part_sizes(len({*patient_id}), fractions)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((), "0 fractions"),
        ((0.25,) * 4, r"4 fractions \(0.25 0.25 0.25 0.25\)"),
        ((0.8, 0.1), "0.8 0.1 make 0.9"),
        ((1.2, -0.2), "1.2 -0.2 make 1;"),
        ((float("nan"), 1.0), "nan 1 make nan"),
        ((float("inf"), 1.0), "inf 1 make inf"),
    ],
)
def test_impossible_fractions_are_refused_with_the_numbers(fractions, message):
    """Neither too few, too many, negative nor not making one."""
    with pytest.raises(ConfigurationError, match=message):
        split_patients(cohort(3), fractions, 0)


def test_fractions_may_be_rounded():
    """Three thirds with seven digits make one."""
    parts = split_patients(cohort(9), (0.3333333, 0.3333333, 0.3333333), 0)

    assert Counter(parts.tolist()) == {part.encode(): 3 for part in PARTS}
