"""Order, shares and seeds of samples: pure functions of integers."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.loader.order import (
    epoch_order,
    hashed,
    mixed,
    occurrences,
    sample_seeds,
    share,
    stream,
    uniform,
)

SEEDS = st.integers(-(2**63), 2**64)


def splitmix64(value):
    """The published generator, with Python's integers."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_mixed_is_splitmix64(values):
    """Each value is mixed as the published algorithm does it, with integers of any size."""
    assert [splitmix64(value) for value in values] == mixed(np.array(values, np.uint64)).tolist()


@given(st.integers(0, 300), SEEDS, st.integers(0, 10**6))
def test_every_sample_once(samples, seed, epoch):
    """The order of an epoch is a permutation."""
    assert list(range(samples)) == sorted(epoch_order(samples, seed, epoch).tolist())


def test_order_never_changes():
    """The order is that of earlier releases: an experiment can be repeated."""
    digest = hashlib.sha256(epoch_order(1000, 3, 5).astype("<i8").tobytes()).hexdigest()

    assert epoch_order(10, 0, 0).tolist() == [8, 7, 9, 5, 1, 0, 4, 3, 6, 2]
    assert digest[:16] == "634cd86dd1928759"


def test_seed_and_epoch_change_the_order():
    """Different seeds and epochs give different orders, and the same ones the same."""
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}

    assert len(orders) == 25
    assert (epoch_order(50, 1, 2) == epoch_order(50, 1, 2)).all()


def test_all_permutations_are_equally_likely():
    """Over many epochs each of the 24 orders of four samples comes about as often."""
    counts = Counter(tuple(epoch_order(4, 7, epoch)) for epoch in range(4800))
    squares = sum((count - 200) ** 2 / 200 for count in counts.values())

    assert len(counts) == 24
    assert squares < 50  # chi-square with 23 degrees of freedom: p = 0.001 at 49.7


def test_uniform_numbers_fill_the_interval():
    """Numbers lie in [0, 1), spread evenly, and neighbours in counter are not correlated."""
    numbers = uniform(stream(1, 2, "test"), np.arange(20000))

    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] - 1000).max() < 150
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_streams_of_other_names_differ():
    """Two purposes draw different numbers of one seed and epoch."""
    first, second = (hashed(stream(0, 0, name), np.arange(100)) for name in ("a", "b"))

    assert not (first == second).any()


@given(st.integers(0, 50), st.integers(1, 7))
def test_shares_are_the_whole_order(samples, world_size):
    """Every place of the order goes to exactly one rank, evenly to within one."""
    order = epoch_order(samples, 1, 2)
    parts = [share(order, rank, world_size) for rank in range(world_size)]

    assert sorted(order.tolist()) == sorted(np.concatenate(parts).tolist())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rank_must_exist():
    """A rank beyond the number of processes is refused."""
    with pytest.raises(ValueError, match="rank 2 of 2"):
        share(np.arange(4), 2, 2)


@given(st.lists(st.integers(0, 6), max_size=30))
def test_occurrences_count_what_came_before(rows):
    """Each place knows how often its sample was there before it."""
    expected = [rows[:place].count(row) for place, row in enumerate(rows)]

    assert expected == occurrences(np.array(rows, np.int64)).tolist()


def test_seeds_depend_on_the_sample_alone():
    """A sample's seed is the same wherever it stands, and another one in another epoch."""
    rows = np.array([5, 3, 9, 0])
    seeds = sample_seeds(1, 2, rows)

    assert seeds[::-1].tolist() == sample_seeds(1, 2, rows[::-1].copy()).tolist()
    assert not set(seeds.tolist()) & set(sample_seeds(1, 3, rows).tolist())
    assert not set(seeds.tolist()) & set(sample_seeds(2, 2, rows).tolist())


def test_repeated_samples_get_seeds_of_their_own():
    """A sample that is drawn again is augmented otherwise; its first time as if it were alone."""
    rows = np.array([4, 4, 4, 2])
    seeds = sample_seeds(0, 0, rows, occurrences(rows))

    assert len(set(seeds.tolist())) == 4
    assert sample_seeds(0, 0, rows)[0] == seeds[0]
