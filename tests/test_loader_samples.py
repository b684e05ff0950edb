"""What a sample is made of: stacks, patches, and ways to tell a mask."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader.order import sample_seeds
from parallel_dicomseg.loader.samples import (
    Patch,
    Stack,
    corner_of,
    mask_code,
    slices_of,
    volumes_of,
)

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def numbered(lengths):
    """The volume of each slice, and the rows of each volume."""
    number = np.repeat(np.arange(len(lengths)), lengths)
    return number, [np.flatnonzero(number == k).tolist() for k in range(len(lengths))]


@given(LENGTHS, st.sampled_from([1, 3, 5]))
def test_stacks_hold_the_neighbours_of_one_volume(lengths, k):
    """The slices around each one; beyond an end, the last one again, never the next volume."""
    number, members = numbered(lengths)
    rows = np.arange(len(number))
    found = slices_of(Stack(k), rows, sample_seeds(0, 0, rows), volumes_of(number))
    expected = [
        [
            members[number[row]][
                min(max(row + step - members[number[row]][0], 0), lengths[number[row]] - 1)
            ]
            for step in range(-(k // 2), k // 2 + 1)
        ]
        for row in rows
    ]

    assert expected == found.tolist()


@given(LENGTHS, st.integers(2, 6), st.integers(0, 100), st.sampled_from(["random", "center"]))
def test_patches_hold_their_slice_and_stay_in_their_volume(lengths, depth, epoch, place):
    """Consecutive slices of one volume with the sample's own; a short volume is continued."""
    number, members = numbered(lengths)
    rows = np.arange(len(number))
    patch = Patch((depth, 4, 4), place=place)
    found = slices_of(patch, rows, sample_seeds(0, epoch, rows), volumes_of(number))

    for row, slices in zip(rows.tolist(), found.tolist(), strict=True):
        volume = members[number[row]]
        assert row in slices
        if len(volume) >= depth:
            assert list(range(slices[0], slices[0] + depth)) == slices
            assert set(slices) <= set(volume)
        else:
            assert volume + [volume[-1]] * (depth - len(volume)) == slices


def test_no_depth_is_preferred():
    """All places of a patch that hold the slice are as likely, at the ends of the volume too."""
    volumes = volumes_of(np.zeros(6, np.int64))
    for row, starts in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (5, [3])):
        rows = np.full(6000, row)
        seeds = sample_seeds(1, 0, np.arange(6000))
        found = slices_of(Patch((3, 4, 4)), rows, seeds, volumes)[:, 0]
        counts = np.bincount(found, minlength=6)

        assert starts == np.flatnonzero(counts).tolist()
        assert np.abs(counts[starts] / 6000 - 1 / len(starts)).max() < 0.03


def test_no_place_in_the_image_is_preferred():
    """All corners are as likely, those at the border too."""
    corners = [
        corner_of(Patch((5, 4)), int(seed), (7, 5), np.zeros((7, 5), np.uint8))
        for seed in sample_seeds(0, 0, np.arange(3000))
    ]
    counts = np.unique(np.array(corners), axis=0, return_counts=True)

    assert [[r, c] for r in range(3) for c in range(2)] == counts[0].tolist()
    assert np.abs(counts[1] / 500 - 1).max() < 0.2


def test_foreground_is_held_without_a_preferred_place():
    """A pixel at the border is held from everywhere it can be, the one corner as the middle."""
    mask = np.zeros((9, 9), np.uint8)
    mask[0, 8] = 2
    corners = [
        corner_of(Patch((3, 3), foreground=1.0), int(seed), (9, 9), mask)
        for seed in sample_seeds(0, 0, np.arange(300))
    ]
    assert {(0, 6)} == set(corners)

    mask[0, 8], mask[4, 4] = 0, 1
    corners = [
        corner_of(Patch((3, 3), foreground=1.0), int(seed), (9, 9), mask)
        for seed in sample_seeds(0, 0, np.arange(2700))
    ]
    places, counts = np.unique(np.array(corners), axis=0, return_counts=True)
    assert [[r, c] for r in (2, 3, 4) for c in (2, 3, 4)] == places.tolist()
    assert np.abs(counts / 300 - 1).max() < 0.25


def test_foreground_has_its_probability():
    """With probability p a pixel is sought, otherwise any place is taken."""
    mask = np.zeros((40, 40), np.uint8)
    mask[0, 0] = 1
    corners = [
        corner_of(Patch((2, 2), foreground=0.5), int(seed), (40, 40), mask)
        for seed in sample_seeds(0, 0, np.arange(2000))
    ]

    assert abs(np.mean([corner == (0, 0) for corner in corners]) - 0.5) < 0.05


def test_center_is_the_middle():
    """A patch for validation does not move."""
    assert corner_of(Patch((5, 4), place="center"), 9, (9, 7), np.ones((9, 7))) == (2, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stack(2), "must be odd"),
        (lambda: Patch((4,)), "two or three sizes"),
        (lambda: Patch((0, 4)), "two or three sizes"),
        (lambda: Patch((4, 4), foreground=2), "from 0 to 1"),
        (lambda: Patch((4, 4), place="left"), "'random' or 'center'"),
    ],
)
def test_impossible_samples_are_refused(make, words):
    """What makes no sense is said when it is described."""
    with pytest.raises(ConfigurationError, match=words):
        make()


def told(masks, bits, nested, stored):
    """The slow twin: pixel by pixel."""
    if masks == "channels":
        return np.array([[(int(v) >> bit) & 1 for v in stored] for bit in bits])
    if masks == "bits":
        moved = [[((int(v) >> bit) & 1) << k for k, bit in enumerate(bits)] for v in stored]
        return np.array(moved).sum(axis=1)

    def depth(bit):
        return 1 + max([depth(outer) for inner, outer in nested if inner == bit], default=0)

    def label(value):
        there = [k for k, bit in enumerate(bits) if int(value) >> bit & 1]
        # whoever lies deepest in others, of several the first named
        return max(there, key=lambda k: (depth(bits[k]), -k)) + 1 if there else 0

    return np.array([label(value) for value in stored])


@given(
    st.sampled_from(["channels", "labels", "bits"]),
    st.permutations(range(3)),
    st.integers(1, 3),
    st.sampled_from([(), ((0, 1),), ((1, 0),), ((0, 1), (1, 2), (0, 2))]),
    st.sampled_from([np.uint8, np.uint16, np.uint64]),
)
def test_masks_are_told_as_the_twin_tells_them(masks, order, count, nested, dtype):
    """Any choice and order of structures, from any width of bits."""
    bits = tuple(order[:count])
    stored = np.arange(8).astype(dtype)
    code = mask_code(masks, bits, 3, nested, np.dtype(dtype))
    out = np.full((count, 8) if masks == "channels" else 8, 99, code.dtype)
    code.write(stored, out)

    assert told(masks, bits, nested, stored).tolist() == out.tolist()


def test_bits_are_as_narrow_as_they_can_be():
    """Three structures of a 16-bit mask fit into a byte."""
    assert np.uint8 == mask_code("bits", (9, 3, 4), 12, (), np.dtype(np.uint16)).dtype
    assert np.uint16 == mask_code("bits", tuple(range(9)), 12, (), np.dtype(np.uint16)).dtype
