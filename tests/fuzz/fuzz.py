"""Coverage-guided fuzzing of our own parsers, with atheris (no dependency of anything).

    python -m venv fuzz && fuzz/bin/pip install atheris -e .
    fuzz/bin/python tests/fuzz/fuzz.py contour -max_total_time=600

Without a compiler: numba's kernels run as the Python that they are, so that their branches are
seen. A finding is an exception that the parser does not promise, or a kernel that does not agree
with its plain twin. `python tests/fuzz/fuzz.py contour FILE` runs one input again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ["NUMBA_DISABLE_JIT"] = "1"

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["parallel_dicomseg"]):
    import numpy as np

    from parallel_dicomseg import text
    from parallel_dicomseg.dicom import skim, walk
    from parallel_dicomseg.errors import LayoutError
    from parallel_dicomseg.sources import lidc, links, rtstruct_files

FILE = Path(tempfile.mkdtemp(), "input")


def contour(data: bytes) -> None:
    """What the kernel is certain of, plain Python says as well."""
    raw = np.frombuffer(bytearray(data + bytes(16)), np.uint8)
    points = np.empty((len(data) + 4, 2))
    end = text._parse_outline(raw, len(data), points, 0)
    try:
        plain = text.parse_contour(data)
    except ValueError:
        assert end < 0
        return
    assert end < 0 or np.array_equal(points[:end], plain)


def decimals(data: bytes) -> None:
    """Each number of a decimal string is Python's float of it."""
    raw = np.frombuffer(bytearray(data), np.uint8)
    values, starts, known = text.parse_decimal_lists(raw, np.array([0, len(data)]))
    if known[0]:
        parts = data.rstrip(b" \0").decode("ascii").split("\\")
        assert values[: starts[1]].tolist() == [float(part) for part in parts]


def headers(data: bytes) -> None:
    """Nothing is read or given beyond the end."""
    explicit = bool(data[:1] > b"\x80")
    found = skim.skim(data, 0, explicit, (0x00080060, 0x00280010, 0x52009230))
    assert found is None or (found[1] <= len(data) and len(found[0]) <= len(data))
    assert skim.census(data, 0, explicit)[0] <= len(data)


def groups(data: bytes) -> None:
    """Functional groups of any bytes are understood or not."""
    found = walk.walk_groups(data, len(data), True, 4)
    assert found is None or found[1].spans.max() <= len(data)


def table(data: bytes) -> None:
    """A table of links is read, or refused in a sentence."""
    FILE.write_bytes(data)
    with suppress(LayoutError):
        links.read_links(FILE)


def xml(data: bytes) -> None:
    """XML is a reading, or has a flaw."""
    FILE.write_bytes(data)
    found = lidc._parse(FILE, len(data))
    if isinstance(found, lidc.Reading):
        for region in found.regions[:3]:
            lidc.draw_nodules([region], (16, 16))


def points(data: bytes) -> None:
    """Points of contours are numbers, or an error is said."""
    values, offsets, errors = rtstruct_files.parse_points([data, b"1\\2\\3"])
    assert np.isfinite(values).all()
    assert len(offsets) == 3
    assert set(errors) <= {0}


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (contour, decimals, headers, groups, table, xml, points)
}
SEEDS = {
    "contour": b"10.5 20.25\n30,21\n2.85e1\t40\n",
    "decimals": b"1.5\\-2e-3\\ 17 ",
    "headers": b"\x08\0\x60\0CS\x02\0MR\x28\0\x10\0US\x02\0\x40\0",
    "groups": b"\xfe\xff\0\xe0\xff\xff\xff\xff\x20\0\x13\x91SQ\0\0\xff\xff\xff\xff",
    "table": b"patient_id,original_id\nSCD01,SC-HF-I-1\n",
    "xml": b'<LidcReadMessage xmlns="http://www.nih.gov"><readingSession/></LidcReadMessage>',
    "points": b"1.5\\2\\-3.25\\4\\5\\6",
}


def main() -> None:
    """Fuzz the target that is named, until time is up or something is found."""
    name, *rest = sys.argv[1:]
    target = TARGETS[name]
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    corpus = Path(tempfile.mkdtemp())
    (corpus / "seed").write_bytes(SEEDS[name])
    atheris.Setup(
        [sys.argv[0], *rest, *([] if any(map(os.path.isfile, rest)) else [str(corpus)])], target
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
