"""Small files that unpack to, or claim, far more than they are (short; see survive_bombs.py)."""

from __future__ import annotations

import survive_bombs
from survive_bombs import BOMBS, MOST_BYTES, MOST_SECONDS, measure_apart

#: A loaded machine is slower than an idle one; a bomb that goes off takes minutes.
SLACK = 8.0
#: These take longer to write than to refuse, or are like another one.
LONG = (
    "1 M empty fragments",
    "2 M private elements, big endian",
    "2 M private elements, no pixels",
    "RLE that unpacks to far more than 64 x 64",
    "RTSTRUCT of 2 M private elements",
    "RTSTRUCT that inflates to 600 MB",
    "XML of 3 M attributes",
    "a contour of 1 M points in mm",
    "an offset table of 64 MiB",
    "deflated zeros, huge claim",
    "functional groups of 1 M empty items",
)


def test_every_bomb_is_listed_and_costs_little() -> None:
    """Each is rejected with a reason, in about a second and 256 MiB; none ends the run."""
    names = [name for name in BOMBS if name not in LONG]
    assert len(names) == len(BOMBS) - len(LONG)
    results = measure_apart(names)

    assert names == [result.name for result in results]
    assert not [result for result in results if result.error or not result.reasons]
    assert not [result for result in results if result.rss_bytes > MOST_BYTES]
    assert not [result for result in results if result.seconds > SLACK * MOST_SECONDS]


def test_a_bomb_that_goes_off_is_noticed() -> None:
    """Too much time or memory, or no line in the list, is what the script calls not survived."""
    result = survive_bombs.Result("x", 1, 0.1, 300 << 20, ("bad-contour",), "")

    assert not survive_bombs.is_survived(result)
    assert not survive_bombs.is_survived(survive_bombs.Result("x", 1, 2.0, 1, ("bad-contour",), ""))
    assert not survive_bombs.is_survived(survive_bombs.Result("x", 1, 0.1, 1, (), ""))
    assert survive_bombs.is_survived(survive_bombs.Result("x", 1, 0.1, 1, ("bad-contour",), ""))
