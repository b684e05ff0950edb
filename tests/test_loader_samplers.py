"""Samplers: which samples an epoch has."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.samplers import (
    ForegroundBalanced,
    PatientBalanced,
    Sampler,
    SampleTable,
    Sequential,
    Uniform,
    Weighted,
)

ROWS = np.array([3, 4, 5, 10, 11, 12, 13, 14, 20, 21])
PATIENTS = np.array([b"a"] * 3 + [b"b"] * 5 + [b"c"] * 2)
FOREGROUND = np.array([0, 5, 0, 9, 9, 0, 0, 0, 0, 1])
TABLE = SampleTable(ROWS, 7, PATIENTS, FOREGROUND)


@pytest.mark.parametrize(
    "description",
    [Uniform(), Sequential(), ForegroundBalanced(0.5), PatientBalanced(), Weighted(np.ones(10))],
    ids=lambda description: type(description).__name__,
)
def test_order_is_a_function_of_the_epoch(description):
    """Asked again, or by another process, a sampler gives the same rows, all of the split."""
    first, again = description.over(TABLE), description.over(TABLE)

    assert isinstance(first, Sampler)
    for epoch in (0, 1, 1, 5):
        order = first.order(epoch)
        assert np.int64 == order.dtype
        assert order.tolist() == again.order(epoch).tolist()
        assert set(order.tolist()) <= set(ROWS.tolist())


def test_uniform_gives_every_sample_once():
    """Each epoch is another permutation of the rows."""
    orders = [Uniform().over(TABLE).order(epoch).tolist() for epoch in range(4)]

    assert all(ROWS.tolist() == sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_sequential_keeps_the_order_of_the_file():
    """Without shuffling the rows come as they are stored."""
    assert ROWS.tolist() == Sequential().over(TABLE).order(3).tolist()


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.8, 1.0])
def test_foreground_comes_with_its_probability(probability):
    """Over many epochs the share of samples with foreground is the stated one."""
    sampler = ForegroundBalanced(probability).over(TABLE)
    orders = np.concatenate([sampler.order(epoch) for epoch in range(600)])
    share = np.isin(orders, ROWS[FOREGROUND > 0]).mean()

    assert abs(probability - share) <= 4 * np.sqrt(probability * (1 - probability) / 6000)


def test_foreground_is_balanced_at_every_place():
    """The probability is the same at the first and the last place of an epoch."""
    sampler = ForegroundBalanced(0.3).over(TABLE)
    orders = np.array([sampler.order(epoch) for epoch in range(1500)])
    shares = np.isin(orders, ROWS[FOREGROUND > 0]).mean(axis=0)

    assert np.abs(shares - 0.3).max() < 0.05


def test_samples_of_a_kind_come_equally_often():
    """Among the samples with foreground none is preferred, nor among those without."""
    sampler = ForegroundBalanced(0.5).over(TABLE)
    orders = np.concatenate([sampler.order(epoch) for epoch in range(1000)])
    counts = np.array([(orders == row).sum() for row in ROWS])

    for kind, expected in ((FOREGROUND > 0, 5000 / 4), (FOREGROUND == 0, 5000 / 6)):
        assert np.abs(counts[kind] / expected - 1).max() < 0.1


@pytest.mark.parametrize(
    ("probability", "foreground", "words"),
    [(0.5, np.zeros(10, int), "no sample with"), (0.5, np.ones(10, int), "no sample without")],
)
def test_a_kind_that_is_not_there_is_refused(probability, foreground, words):
    """A probability that cannot be kept is an error, not another probability."""
    table = SampleTable(ROWS, 0, None, foreground)

    with pytest.raises(ConfigurationError, match=words):
        ForegroundBalanced(probability).over(table)


def test_patients_come_equally_often():
    """Each round of patients has each of them once, however many slices they have."""
    order = PatientBalanced().over(TABLE).order(0)
    patient_of = dict(zip(ROWS.tolist(), PATIENTS.tolist(), strict=True))
    patients = [patient_of[row] for row in order.tolist()]

    assert len(ROWS) == len(order)
    for start in range(0, 9, 3):
        assert {b"a", b"b", b"c"} == set(patients[start : start + 3])


@given(st.integers(0, 1000))
def test_samples_of_a_patient_come_in_rounds(epoch):
    """No slice of a patient twice before each was there once."""
    order = PatientBalanced().over(TABLE).order(epoch).tolist()
    small = [row for row in order if row in {20, 21}]

    assert {20, 21} == set(small[:2])


def test_weights_are_probabilities():
    """Samples are drawn in proportion to their weights, and never with a weight of 0."""
    weights = np.array([0, 1, 2, 3, 4, 0, 0, 0, 0, 0.0])
    sampler = Weighted(weights, samples=1000).over(TABLE)
    orders = np.concatenate([sampler.order(epoch) for epoch in range(20)])
    counts = np.array([(orders == row).sum() for row in ROWS])

    assert len(orders) == 20_000
    assert not counts[weights == 0].any()
    assert np.abs(counts / 20_000 - weights / 10).max() < 0.015


def test_weights_of_the_whole_file_serve_any_split():
    """One weight per row of the file is taken at the rows of the split."""
    whole = np.zeros(30)
    whole[12] = 1

    assert {12} == set(Weighted(whole).over(TABLE).order(0).tolist())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(7), "weights of shape"),
        (np.zeros(10), "not all 0"),
        (-np.ones(10), "none negative"),
        (np.full(10, np.nan), "finite"),
    ],
)
def test_impossible_weights_are_refused(weights, words):
    """Weights must fit the samples and be possible probabilities."""
    with pytest.raises(ConfigurationError, match=words):
        Weighted(weights).over(TABLE)


def test_what_the_file_does_not_say_is_asked_for():
    """A balance over patients or foreground needs the table's columns."""
    table = SampleTable(ROWS, 0)

    with pytest.raises(ConfigurationError, match="patient_id"):
        PatientBalanced().over(table)
    with pytest.raises(ConfigurationError, match="area"):
        ForegroundBalanced(0.5).over(table)


def test_probability_has_limits():
    """A probability above 1 is refused."""
    with pytest.raises(ConfigurationError, match=r"probability is 1\.5"):
        ForegroundBalanced(1.5)
