"""The short version of survive_flips.py: single bits of finished files."""

import pytest
import survive_flips


@pytest.mark.timeout(120)
def test_every_flipped_bit_is_found_and_named(tmp_path):
    """By verify wherever it is, by the loader in pixels and in all that it opens the file with."""
    counts, missed = survive_flips.survive(120, 5, tmp_path)

    assert missed == []
    assert sum(flips for flips, _, _ in counts.values()) == 120
    assert {"pixels", "names, indices, unused", "tables and descriptions"} <= counts.keys()
