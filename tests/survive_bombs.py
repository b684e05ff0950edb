"""Small files that claim, or unpack to, far more than they are: each costs little and is listed.

    python tests/survive_bombs.py

A process of its own converts a small cohort, and then the same with each bomb in it. Printed are
the seconds that a bomb adds to the whole run (scan and conversion), and the memory that it adds to
the largest resident size so far, of the process and of those that it started.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from survive_mutants import peak_of_this_process

from parallel_dicomseg import convert_cohort, scan_cohort
from parallel_dicomseg.phantoms import make_rtstruct_series
from parallel_dicomseg.records import ConvertOptions, ScanOptions

MOST_SECONDS = 1.0
MOST_BYTES = 256 << 20
#: More than any run here should ever need; reached, it is a MemoryError and not the machine's end.
ADDRESS_SPACE = 6 << 30

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
RTSTRUCT = b"1.2.840.10008.5.1.4.1.1.481.3"
SEG = b"1.2.840.10008.5.1.4.1.1.66.4"
CT = b"1.2.840.10008.5.1.4.1.1.2"

ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
ITEM_UNDEFINED = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
SEQUENCE_END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


@dataclass(frozen=True)
class Result:
    """What one bomb cost."""

    name: str
    file_bytes: int
    seconds: float
    """That the run took longer than without it."""
    rss_bytes: int
    """That it added to the largest resident size."""
    reasons: tuple[str, ...]
    """Of the problems that name its file."""
    error: str
    """Why the whole run ended, '' where it did not."""


# --- files ---------------------------------------------------------------------------------------


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An explicit little-endian element."""
    value += b"\0" * (len(value) % 2)
    size = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in (b"OB", b"OW", b"SQ", b"UN"):
        return head + b"\0\0" + struct.pack("<I", size) + value
    return head + struct.pack("<H", size) + value


def start(syntax: str, sop_class: bytes = CT, number: int = 99) -> bytes:
    """Preamble, file meta group and the first elements of a data set."""
    uid = b"1.2.3.%d" % number
    meta = element(0x00020001, b"OB", b"\0\1") + element(0x00020002, b"UI", sop_class)
    meta += element(0x00020003, b"UI", uid) + element(0x00020010, b"UI", syntax.encode())
    return bytes(128) + b"DICM" + element(0x00020000, b"UL", struct.pack("<I", len(meta))) + meta


def common(sop_class: bytes = CT, modality: bytes = b"CT") -> bytes:
    """Elements of group 8 and up to 20."""
    return (
        element(0x00080016, b"UI", sop_class)
        + element(0x00080018, b"UI", b"1.2.3.99")
        + element(0x00080060, b"CS", modality)
        + element(0x00100020, b"LO", b"PHANTOM")
        + element(0x0020000D, b"UI", b"1.2.3.4")
        + element(0x0020000E, b"UI", b"1.2.3.5")
    )


def image(
    rows: int, columns: int, frames: int | None = None, bits: int = 8, sop_class: bytes = CT
) -> bytes:
    """The image pixel module."""

    def short(tag: int, value: int) -> bytes:
        return element(tag, b"US", struct.pack("<H", value))

    return (
        common(sop_class)
        + short(0x00280002, 1)
        + element(0x00280004, b"CS", b"MONOCHROME2")
        + (b"" if frames is None else element(0x00280008, b"IS", str(frames).encode()))
        + short(0x00280010, rows)
        + short(0x00280011, columns)
        + short(0x00280100, bits)
        + short(0x00280101, bits)
        + short(0x00280102, bits - 1)
        + short(0x00280103, 0)
    )


def pixels(value: bytes) -> bytes:
    """Native pixel data."""
    return element(0x7FE00010, b"OW", value)


def encapsulated(*fragments: bytes, table: bytes = b"") -> bytes:
    """Encapsulated pixel data."""
    out = element(0x7FE00010, b"OB", b"", 0xFFFFFFFF)
    for fragment in (table, *fragments):
        padded = fragment + b"\0" * (len(fragment) % 2)
        out += struct.pack("<HHI", 0xFFFE, 0xE000, len(padded)) + padded
    return out + SEQUENCE_END


def jpeg_2000(columns: int, rows: int, tile: int | None = None) -> bytes:
    """A codestream of 80 bytes that claims a size, and holds nothing."""
    across, down = (tile, tile) if tile else (columns, rows)
    size = struct.pack(">HHHIIIIIIIIH", 0xFF51, 41, 0, columns, rows, 0, 0, across, down, 0, 0, 1)
    return (
        b"\xff\x4f" + size + b"\x07\1\1"
        b"\xff\x52\0\x0c\0\0\0\1\0\0\4\4\0\1\xff\x5c\0\4\x40\x40"
        b"\xff\x90\0\x0a\0\0\0\0\0\0\0\1\xff\x93" + b"\0" * 20 + b"\xff\xd9"
    )


def jpeg_ls(columns: int, rows: int) -> bytes:
    """The head of a JPEG-LS codestream."""
    frame = struct.pack(">HHBHHBBBB", 0xFFF7, 11, 8, rows, columns, 1, 1, 0x11, 0)
    return b"\xff\xd8" + frame + b"\xff\xda\0\x08\1\1\0\0\0\0" + bytes(20) + b"\xff\xd9"


def rle(rows: int, columns: int) -> bytes:
    """A valid frame of one colour, two bytes for each 128 pixels."""
    return struct.pack("<16I", 1, 64, *([0] * 14)) + bytes([129, 0]) * (rows * columns // 128)


def nested(depth: int, tag: int = 0x0040A730) -> bytes:
    """Sequences inside one another."""
    head = element(tag, b"SQ", b"", 0xFFFFFFFF) + ITEM_UNDEFINED
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + SEQUENCE_END
    return head * depth + end * depth


def private(count: int) -> bytes:
    """Empty private elements."""
    return b"".join(
        struct.pack("<HH", 0x0041 + 2 * (k >> 15), 0x1000 + (k & 0x7FFF)) + b"LO\0\0"
        for k in range(count)
    )


def empty_items(tag: int, count: int, defined: bool) -> bytes:
    """A sequence of empty items."""
    items = ITEM * count
    if defined:
        return element(tag, b"SQ", items)
    return element(tag, b"SQ", b"", 0xFFFFFFFF) + items + SEQUENCE_END


def structure_set(body: bytes, syntax: str = EXPLICIT) -> bytes:
    """A structure set with anything in it."""
    dataset = common(RTSTRUCT, b"RTSTRUCT") + body
    if syntax == DEFLATED:
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        dataset = packer.compress(dataset) + packer.flush()
    return start(syntax, RTSTRUCT) + dataset


def contours(*values: bytes) -> bytes:
    """A ROI with contours."""

    def item(value: bytes) -> bytes:
        return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value

    rois = item(element(0x30060022, b"IS", b"1") + element(0x30060026, b"LO", b"bomb"))
    kind = element(0x30060042, b"CS", b"CLOSED_PLANAR ")
    padded = [data + b" " * (len(data) % 2) for data in values]
    heads = [struct.pack("<HH2sHI", 0x3006, 0x0050, b"UN", 0, len(data)) for data in padded]
    items = b"".join(item(kind + head + data) for head, data in zip(heads, padded, strict=True))
    drawn = element(0x30060040, b"SQ", items) + element(0x30060084, b"IS", b"1")
    return element(0x30060020, b"SQ", rois) + element(0x30060039, b"SQ", item(drawn))


def deflated(head: bytes, zeros: int) -> bytes:
    """A deflated data set that goes on with zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    block = bytes(1 << 22)
    parts = [packer.compress(head), *(packer.compress(block) for _ in range(zeros >> 22))]
    return b"".join((*parts, packer.flush()))


def xml(body: str, head: str = "") -> bytes:
    """A LIDC file."""
    return f'<?xml version="1.0"?>{head}<LidcReadMessage xmlns="http://www.nih.gov">{body}'.encode()


def billion_laughs() -> bytes:
    """Entities of entities."""
    lines = ['<!ENTITY a "ha">']
    lines += [
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return xml("&i;</LidcReadMessage>", f"<!DOCTYPE x [{''.join(lines)}]>")


def zigzag(points: int, height: float = 60000.0) -> bytes:
    """Mm from the top to the bottom of a volume's first slice and back again."""
    x = [
        f"{-50 + 60 * (k * 7919 % points) / points:.3f}\\{-40 + (k % 2) * height}\\30"
        for k in range(points)
    ]
    return "\\".join(x).encode()


Write = Callable[[], bytes]
M = 1_000_000

#: What each file is, by a name that says it.
BOMBS: dict[str, tuple[str, Write]] = {
    "65535 x 65535 pixels in 10 bytes": (
        "dcm",
        lambda: start(EXPLICIT) + image(65535, 65535, bits=16) + pixels(bytes(10)),
    ),
    "2**31 - 2 frames in 10 bytes": (
        "dcm",
        lambda: start(EXPLICIT) + image(512, 512, 2147483646) + pixels(bytes(10)),
    ),
    "999999999999 frames": (
        "dcm",
        lambda: start(EXPLICIT) + image(8, 8, int("9" * 12)) + pixels(bytes(64)),
    ),
    "65536 frames in one fragment": (
        "dcm",
        lambda: start(RLE) + image(64, 64, 65536) + encapsulated(bytes(M)),
    ),
    "deflated zeros, huge claim": (
        "dcm",
        lambda: (
            start(DEFLATED)
            + deflated(
                image(8192, 8192, 64) + element(0x7FE00010, b"OW", b"", 0xFFFFFFF0), 400 << 20
            )
        ),
    ),
    "deflated zeros, small claim": (
        "dcm",
        lambda: (
            start(DEFLATED)
            + deflated(image(64, 64) + element(0x7FE00010, b"OW", b"", 0xFFFFFFF0), 400 << 20)
        ),
    ),
    "RLE claims 100 frames of 65535 x 65535": (
        "dcm",
        lambda: start(RLE) + image(65535, 65535, 100) + encapsulated(bytes(64)),
    ),
    "RLE of 16384 x 16384 that is valid": (
        "dcm",
        lambda: start(RLE) + image(16384, 16384) + encapsulated(rle(16384, 16384)),
    ),
    "RLE that unpacks to far more than 64 x 64": (
        "dcm",
        lambda: start(RLE) + image(64, 64) + encapsulated(rle(16384, 16384)),
    ),
    "JPEG 2000 claims 60000 x 60000, header 64 x 64": (
        "dcm",
        lambda: start(JPEG_2000) + image(64, 64) + encapsulated(jpeg_2000(60000, 60000)),
    ),
    "JPEG 2000 and header claim 60000 x 60000": (
        "dcm",
        lambda: start(JPEG_2000) + image(60000, 60000) + encapsulated(jpeg_2000(60000, 60000)),
    ),
    "JPEG 2000 and header claim 8000 x 8000": (
        "dcm",
        lambda: start(JPEG_2000) + image(8000, 8000) + encapsulated(jpeg_2000(8000, 8000)),
    ),
    "JPEG 2000 in 65025 tiles": (
        "dcm",
        lambda: start(JPEG_2000) + image(255, 255) + encapsulated(jpeg_2000(255, 255, 1)),
    ),
    "JPEG-LS claims 65000 x 65000, header 64 x 64": (
        "dcm",
        lambda: start(JPEG_LS) + image(64, 64) + encapsulated(jpeg_ls(65000, 65000)),
    ),
    "JPEG-LS and header claim 65000 x 65000": (
        "dcm",
        lambda: start(JPEG_LS) + image(65000, 65000) + encapsulated(jpeg_ls(65000, 65000)),
    ),
    "1 M empty fragments": (
        "dcm",
        lambda: start(RLE) + image(64, 64) + encapsulated()[:-8] + ITEM * M + SEQUENCE_END,
    ),
    "1 M empty fragments of 60000 frames": (
        "dcm",
        lambda: start(RLE) + image(64, 64, 60000) + encapsulated()[:-8] + ITEM * M + SEQUENCE_END,
    ),
    "an offset table of 64 MiB": (
        "dcm",
        lambda: start(RLE) + image(64, 64, 2) + encapsulated(bytes(64), table=bytes(64 << 20)),
    ),
    "100000 nested sequences before pixels that are not there": (
        "dcm",
        lambda: start(EXPLICIT) + image(8, 8) + nested(100_000),
    ),
    "2 M private elements, no pixels": (
        "dcm",
        lambda: start(EXPLICIT) + image(8, 8) + private(2 * M),
    ),
    "2 M private elements, big endian": (
        "dcm",
        lambda: start("1.2.840.10008.1.2.2") + image(8, 8) + private(2 * M),
    ),
    "lookup table of 1 M empty items": (
        "dcm",
        lambda: (
            start(EXPLICIT) + image(8, 8) + empty_items(0x00283000, M, True) + pixels(bytes(64))
        ),
    ),
    "functional groups of 1 M empty items": (
        "dcm",
        lambda: (
            start(EXPLICIT) + image(8, 8, M) + empty_items(0x52009230, M, False) + pixels(bytes(64))
        ),
    ),
    "a header of 1 TB, sparse": ("sparse", lambda: start(EXPLICIT) + image(8, 8)),
    "SEG of 1 M empty groups": (
        "dcm",
        lambda: (
            start(EXPLICIT, SEG)
            + image(8, 8, M, sop_class=SEG)
            + empty_items(0x00620002, M, True)
            + empty_items(0x52009230, M, True)
            + pixels(bytes(64))
        ),
    ),
    "SEG of 5000 nested sequences": (
        "dcm",
        lambda: (
            start(EXPLICIT, SEG)
            + image(8, 8, 1, sop_class=SEG)
            + nested(5000, 0x52009230)
            + pixels(bytes(64))
        ),
    ),
    "RTSTRUCT of 1 M empty items": (
        "dcm",
        lambda: structure_set(empty_items(0x30060020, M, True) + empty_items(0x30060039, M, False)),
    ),
    "RTSTRUCT of 100000 nested sequences": (
        "dcm",
        lambda: structure_set(nested(100_000, 0x30060039)),
    ),
    "RTSTRUCT of 2 M private elements": ("dcm", lambda: structure_set(private(2 * M))),
    "RTSTRUCT that inflates to 600 MB": (
        "dcm",
        lambda: (
            start(DEFLATED, RTSTRUCT)
            + deflated(common(RTSTRUCT, b"RTSTRUCT") + contours(b"1\\2\\3 "), 600 << 20)
        ),
    ),
    "RTSTRUCT of 600 MB, sparse": ("sparse rtstruct", lambda: structure_set(b"")),
    "a contour of 1 M points in mm": (
        "dcm",
        lambda: structure_set(contours(b"\\".join([b"1\\2\\30"] * M))),
    ),
    "a contour of 200000 long edges": ("dcm", lambda: structure_set(contours(zigzag(200_000)))),
    "1000 contours on one slice, all over one another": (
        "dcm",
        lambda: structure_set(contours(*(zigzag(4 + 2 * k, 20.0) for k in range(1000)))),
    ),
    "XML of entities": ("xml", billion_laughs),
    "XML of 3 M elements": ("xml", lambda: xml("<a/>" * 3 * M + "</LidcReadMessage>")),
    "XML of 400000 nested elements": ("xml", lambda: xml("<a>" * 400_000)),
    "XML of 3 M attributes": (
        "xml",
        lambda: xml("<a " + " ".join(f'a{k}=""' for k in range(3 * M)) + "/></LidcReadMessage>"),
    ),
}


def write_bomb(folder: Path, kind: str, content: bytes) -> Path:
    """Put one of them into a folder."""
    path = folder / ("bomb.xml" if kind == "xml" else "bomb.dcm")
    path.write_bytes(content)
    if kind.startswith("sparse"):
        with path.open("r+b") as file:
            file.truncate(600_000_000 if kind.endswith("rtstruct") else 1 << 40)
    return path


# --- what they cost ------------------------------------------------------------------------------


def run(root: Path, output: Path) -> tuple[float, tuple[tuple[str, str], ...], str]:
    """Scan and convert; the seconds, the problems and why it ended early."""
    begin = time.perf_counter()
    found: list[tuple[str, str]] = []
    error = ""
    try:
        cohort = scan_cohort(root, options=ScanOptions(include_unannotated=True))
        options = ConvertOptions(scheduler="synchronous", overwrite=True)
        summary = convert_cohort(cohort, output, options=options)
        found = [(problem.path, str(problem.reason)) for problem in summary.problems]
    except Exception as raised:  # noqa: BLE001  is the result
        error = f"{type(raised).__name__}: {raised}"[:300]
    return time.perf_counter() - begin, tuple(found), error


def peak() -> int:
    """The largest resident size so far, of this process and of any that it has waited for."""
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * max(peak_of_this_process(), of_children)


def measure(names: list[str]) -> Iterator[Result]:
    """Convert the cohort with each bomb in it."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    with tempfile.TemporaryDirectory() as folder:
        root, output = Path(folder, "root"), Path(folder, "out.h5")
        make_rtstruct_series(root / "good", shape=(4, 64, 64))
        # the first of each kind loads kernels and packages
        for kind, content in (
            ("dcm", start(RLE) + image(64, 64) + encapsulated(rle(64, 64))),
            ("dcm", start(EXPLICIT, SEG) + image(8, 8, 1, sop_class=SEG) + pixels(b"")),
            ("dcm", structure_set(contours(b"1\\2\\30\\4\\5\\30\\4\\9\\30 "))),
            ("dcm", start(DEFLATED) + deflated(image(64, 64) + pixels(bytes(4096)), 0)),
            ("xml", xml("</LidcReadMessage>")),
        ):
            bomb = write_bomb(root, kind, content)
            run(root, output)
            bomb.unlink()
        usual = min(run(root, output)[0] for _ in range(3))
        for name in names:
            kind, make = BOMBS[name]
            bomb = write_bomb(root, kind, make())
            size = bomb.stat().st_blocks * 512
            before = fresh_peak()
            seconds, problems, error = run(root, output)
            grown = peak() - before
            reasons = tuple(sorted({reason for path, reason in problems if path == bomb.name}))
            bomb.unlink()
            yield Result(name, size, seconds - usual, grown, reasons, error)


def fresh_peak() -> int:
    """The resident size from which a peak is counted: the present one, where it can be set."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return peak()


def measure_apart(names: list[str]) -> list[Result]:
    """Results of a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(names)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60 + 30 * len(names),
    )
    results = [Result(**json.loads(line)) for line in done.stdout.splitlines()]
    missing = names[len(results) :]
    ended = [
        Result(name, 0, 0.0, 0, (), f"the process ended ({done.returncode})")
        for name in missing[:1]
    ]
    return results + ended


def is_survived(result: Result) -> bool:
    """Whether a bomb was listed with a reason, in time and in little memory."""
    listed = bool(result.reasons) and not result.error
    return listed and result.seconds <= MOST_SECONDS and result.rss_bytes <= MOST_BYTES


def main() -> int:
    """Measure all of them; 1 where one was not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="bombs whose name holds this")
    arguments = parser.parse_args()
    if arguments.child:
        for result in measure(json.loads(arguments.child)):
            print(json.dumps(asdict(result)), flush=True)
        return 0
    results = [
        result for name in BOMBS if arguments.only in name for result in measure_apart([name])
    ]
    for one in results:
        verdict = "ok" if is_survived(one) else "NOT SURVIVED"
        print(
            f"{one.name:58} {one.file_bytes / 1e6:8.2f} MB {one.seconds:6.2f} s "
            f"+{one.rss_bytes >> 20:5} MiB  {', '.join(one.reasons)} {one.error} {verdict}"
        )
    bad = sum(not is_survived(one) for one in results)
    print(f"{len(results)} bombs, {bad} not survived")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
