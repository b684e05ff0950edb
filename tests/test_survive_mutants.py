"""Damaged files through scan and conversion (short; see survive_mutants.py)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from survive_mutants import find_seeds, mutate, survive

#: The long version, of twenty thousand, is run by hand.
ROUNDS = 2000


@pytest.mark.parametrize("seed", [1])
def test_no_damaged_file_ends_a_run_or_goes_missing(seed: int, tmp_path: Path) -> None:
    """Every mutant is converted or listed with a reason, and costs no undamaged image."""
    counts = survive(ROUNDS, seed, None, tmp_path, batch=250)

    assert counts.bad == []
    assert counts.rounds == ROUNDS
    assert counts.converted > 0
    assert sum(counts.listed.values()) > ROUNDS / 2
    assert counts.rss_bytes < 1 << 30


def test_damage_follows_from_its_seed() -> None:
    """The same seed makes the same mutants, so that a finding can be made again."""
    seeds = find_seeds(None)
    first, again = ([mutate(one, random.Random(5), seeds) for one in seeds] for _ in range(2))

    assert first == again
    assert {one.kind for one in seeds} == {"image", "rtstruct", "seg", "contour", "links", "xml"}
