"""Damaged files through the whole of scan and conversion: nothing crashes, hangs or goes missing.

    python tests/survive_mutants.py --rounds 20000 --seed 1

Every round damages one real or generated file: each transfer syntax at hand, RTSTRUCT, SEG,
outlines in text, link.csv and LIDC XML. The mutants of a batch lie in one cohort together with what
belongs to them; a process of its own scans and converts it, watched from outside. A run ends well
where it finishes, where every mutant is converted or listed with a reason, and every undamaged
image beside it is converted. A damaged link.csv has a cohort of its own, which may be refused in
one sentence.

What it finds is to be made smaller with --one and becomes a test.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_SECONDS = 10.0
"""For one mutant, beyond what its batch takes without it; a batch of all is killed much later."""
DECODE_SECONDS = 1.0
"""After which a decoder is stopped here: some mutants do make one hang, and 10 s each is long."""
MOST_BYTES = 3 << 30
"""Address space of a run."""

BATCH = 250
COHORT = "cohort"
#: Larger files are left out: a round should take milliseconds.
MOST_SEED_BYTES = 600_000
_TAGS = (0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280002, 0x00280008, 0x7FE00010)
_INTERESTING = (0, 1, 2, 3, 7, 8, 16, 31, 32, 127, 128, 255, 256, 32767, 32768, 65535)


@dataclass(frozen=True)
class Seed:
    """An undamaged file, and where it lies in its cohort."""

    kind: str
    """'image', 'rtstruct', 'seg', 'contour', 'links' or 'xml'."""
    name: str
    content: bytes


@dataclass
class Counts:
    """What happened."""

    rounds: int = 0
    converted: int = 0
    listed: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """Cohorts that were refused in one sentence."""
    crashes: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Mutants neither converted nor listed, and undamaged images that are not converted."""
    rss_bytes: int = 0
    slowest: float = 0.0

    @property
    def bad(self) -> list[str]:
        """Everything that must not happen."""
        return [*self.crashes, *self.hangs, *self.lost]


# --- seeds ---------------------------------------------------------------------------------------


def find_seeds(data: Path | None) -> list[Seed]:
    """Files of pydicom's own test data, of the real data where it is there, and generated ones."""
    import pydicom.data

    places = [Path(pydicom.data.DATA_ROOT) / "test_files"]
    if data is not None:
        places += [data / "transfer_syntax", data / "dicom_seg", data / "rtstruct_odd"]
    seeds: dict[bytes, Seed] = {}
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.is_file() and path.stat().st_size <= MOST_SEED_BYTES:
                content = path.read_bytes()
                kind = kind_of(content)
                if kind:
                    seeds.setdefault(content, Seed(kind, path.name, content))
    for content in list(_generated()):
        kind = kind_of(content)
        seeds.setdefault(content, Seed(kind, f"generated-{kind}", content))
    texts = [Seed("contour", "generated", b"10.5 20.25\n30 21\n28.5 40\n12 38\n")]
    texts += [Seed("links", "generated", b"patient_id,original_id\nSCD01,SC-HF-I-1\n")]
    texts.append(Seed("xml", "generated", lidc_xml()))
    if data is not None:
        texts += [
            Seed("xml", path.name, path.read_bytes())
            for path in sorted((data / "lidc_xml").rglob("*.xml"))
            if path.stat().st_size <= MOST_SEED_BYTES
        ]
    return [*seeds.values(), *texts]


def kind_of(content: bytes) -> str:
    """What a DICOM file is; '' for none that is an image or an annotation."""
    head = content[:4096]
    if b"1.2.840.10008.5.1.4.1.1.481.3" in head:
        return "rtstruct"
    if b"1.2.840.10008.5.1.4.1.1.66.4" in head:
        return "seg"
    has_pixels = b"\xe0\x7f\x10\x00" in content or b"\x7f\xe0\x00\x10" in content
    deflated = b"1.2.840.10008.1.2.1.99" in head
    return "image" if has_pixels or deflated else ""


def _generated() -> Iterator[bytes]:
    """A small image in transfer syntaxes of which pydicom has no file, and structure sets."""
    import imagecodecs
    import numpy as np
    from pydicom import dcmread
    from pydicom.encaps import encapsulate

    from parallel_dicomseg.phantoms import make_rtstruct_series

    with tempfile.TemporaryDirectory() as folder:
        for k, syntax in enumerate(
            ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99")
        ):
            made = make_rtstruct_series(
                Path(folder, str(k)),
                shape=(3, 24, 24),
                transfer_syntax=syntax,
                undefined_lengths=k == 1,
            )
            yield Path(made.directory, made.structure_set_path).read_bytes()
            yield Path(made.directory, made.image_paths[0]).read_bytes()
        plain = dcmread(Path(made.directory, made.image_paths[0]))
    pixels = np.clip(plain.pixel_array, 0, 4000).astype("<u2")
    small = (pixels // 16).astype("u1")
    jpeg = "1.2.840.10008.1.2.4"
    j2k = {"codecformat": "j2k"}
    encoders: dict[str, tuple[Any, Callable[..., bytes], dict[str, Any]]] = {
        f"{jpeg}.50": (small, imagecodecs.jpeg8_encode, {"level": 90}),
        f"{jpeg}.70": (pixels, imagecodecs.jpeg8_encode, {"lossless": True, "bitspersample": 12}),
        f"{jpeg}.80": (pixels, imagecodecs.jpegls_encode, {}),
        f"{jpeg}.90": (
            pixels,
            imagecodecs.jpeg2k_encode,
            {"reversible": True, **j2k},
        ),
        f"{jpeg}.91": (pixels, imagecodecs.jpeg2k_encode, {"level": 40, **j2k}),
        f"{jpeg}.201": (pixels, imagecodecs.htj2k_encode, {"reversible": True}),
        f"{jpeg}.203": (pixels, imagecodecs.htj2k_encode, {"reversible": True}),
        f"{jpeg}.110": (pixels, imagecodecs.jpegxl_encode, {"lossless": True}),
    }
    for syntax, (image, encode, options) in encoders.items():
        known = f"{jpeg}.201" if syntax.endswith(".110") else syntax  # pydicom does not write it
        plain.file_meta.TransferSyntaxUID = known
        plain.PixelData = encapsulate([encode(image, **options)])
        plain["PixelData"].VR = "OB"
        plain.BitsAllocated = plain.BitsStored = 8 * image.itemsize
        plain.HighBit, plain.PixelRepresentation = plain.BitsStored - 1, 0
        stream = io.BytesIO()
        plain.save_as(stream, enforce_file_format=True)
        yield stream.getvalue().replace(known.encode(), syntax.encode(), 1)


def lidc_xml() -> bytes:
    """A reading of the images of `cohort`."""
    edges = "".join(
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
        for x, y in ((3, 3), (8, 3), (8, 9), (3, 9), (3, 3))
    )
    roi = (
        "<roi><imageZposition>30.0</imageZposition><imageSOP_UID>1.2</imageSOP_UID>"
        f"<inclusion>TRUE</inclusion>{edges}</roi>"
    )
    nodule = f"<unblindedReadNodule><noduleID>1</noduleID>{roi}</unblindedReadNodule>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?><LidcReadMessage xmlns="http://www.nih.gov">'
        "<ResponseHeader><SeriesInstanceUid>1.2</SeriesInstanceUid>"
        "<StudyInstanceUID>1.2</StudyInstanceUID></ResponseHeader>"
        f"<readingSession>{nodule}</readingSession></LidcReadMessage>"
    ).encode()


# --- damage --------------------------------------------------------------------------------------


def mutate(seed: Seed, chance: random.Random, others: Sequence[Seed]) -> bytes:
    """A file with one to three kinds of damage."""
    content = bytearray(seed.content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        how = chance.choice(_DAMAGES if seed.kind not in ("contour", "links") else _TEXT_DAMAGES)
        content = how(content, chance, others) or bytearray(b"\0")
    return bytes(content)


Damage = Callable[[bytearray, random.Random, Sequence[Seed]], bytearray]


def _flip(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    for _ in range(chance.choice((1, 1, 4, 32))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def _flip_in_head(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    for _ in range(chance.choice((1, 2, 8))):
        content[chance.randrange(min(len(content), 2500))] = chance.choice(_INTERESTING) & 255
    return content


def _flip_late(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    """In what decoders read."""
    first = min(len(content) - 1, 1200)
    for _ in range(chance.choice((1, 2, 8))):
        content[chance.randrange(first, len(content))] ^= 1 << chance.randrange(8)
    return content


def _cut(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    return content[: chance.randrange(len(content))]


def _lengthen(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    return content + chance.randbytes(chance.choice((1, 8, 5000)))


def _remove(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    at = chance.randrange(len(content))
    del content[at : at + chance.choice((1, 2, 8, 100))]
    return content


def _repeat(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    at, size = chance.randrange(len(content)), chance.choice((1, 8, 64, 1000))
    content[at:at] = content[at : at + size] * chance.choice((1, 2, 50))
    return content


def _splice(content: bytearray, chance: random.Random, others: Sequence[Seed]) -> bytearray:
    other = chance.choice(others).content
    return content[: chance.randrange(len(content))] + other[chance.randrange(len(other)) :]


def _noise(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    at, size = chance.randrange(len(content)), chance.choice((4, 64, 1024))
    content[at : at + size] = chance.randbytes(size)
    return content


def _number(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    """Another number where the header says a size, or anywhere."""
    tag = chance.choice(_TAGS)
    little = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
    at = content.find(little)
    at = at + 8 if at >= 0 else chance.randrange(len(content))
    value = chance.choice((*_INTERESTING, 2**31 - 1, 2**31, 2**32 - 1)).to_bytes(4, "little")
    width = chance.choice((2, 4))
    content[at : at + width] = value[:width]
    return content


def _length_field(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    """Another length of an item, or of an element with a VR that is there."""
    mark = chance.choice(
        (b"\xfe\xff\x00\xe0", b"SQ\0\0", b"OB\0\0", b"OW\0\0", b"DS", b"UI", b"IS")
    )
    places = [k for k in range(len(content) - 8) if content.startswith(mark, k)][:50]
    if not places:
        return _flip(content, chance, ())
    at = chance.choice(places) + len(mark)
    value = chance.choice((0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
    content[at : at + 4] = value.to_bytes(4, "little")
    return content


def _token(content: bytearray, chance: random.Random, _: Sequence[Seed]) -> bytearray:
    """What text should not hold."""
    token = chance.choice(
        (
            b"1e400",
            b"nan",
            b"-inf",
            b"9" * 400,
            b"\0",
            b"\xff\xfe",
            b",,",
            b"\r",
            b'"',
            b"../..",
            b"-",
        )
    )
    at = chance.randrange(len(content))
    content[at : at + chance.choice((0, 1, 3))] = token
    return content


_TEXT_DAMAGES: tuple[Damage, ...] = (_token, _token, _flip, _cut, _repeat, _remove, _lengthen)
_DAMAGES: tuple[Damage, ...] = (
    *(
        _flip_late,
        _flip_late,
        _flip_late,
        _flip,
        _flip_in_head,
        _cut,
        _lengthen,
        _remove,
        _repeat,
        _splice,
        _noise,
    ),
    *(_number, _number, _length_field, _length_field, _token),
)


# --- cohorts -------------------------------------------------------------------------------------


def lay_out(root: Path, mutants: Sequence[tuple[Seed, bytes]]) -> dict[str, int]:
    """Write a batch: one cohort, and one for each link.csv; which file is which mutant."""
    from parallel_dicomseg.phantoms import make_rtstruct_series

    made = make_rtstruct_series(root / COHORT / "good", shape=(3, 24, 24))
    image = Path(made.directory, made.image_paths[0]).read_bytes()
    (root / COHORT / "mutants").mkdir()
    places: dict[str, int] = {}
    for k, (seed, content) in enumerate(mutants):
        place = f"mutants/{k}.{'xml' if seed.kind == 'xml' else 'dcm'}"
        if seed.kind == "contour":
            place = _numbered(root / COHORT, f"numbered{k}", k, image, contour=content)
        elif seed.kind == "links":
            _numbered(root, f"links{k}", k, image, links=content)
            place = f"links{k}"
        else:
            (root / COHORT / place).write_bytes(content)
        places[place] = k
    return places


def _numbered(
    root: Path,
    folder: str,
    k: int,
    image: bytes,
    contour: bytes = b"2 2\n9 2\n9 9\n2 9\n",
    links: bytes = b"",
) -> str:
    """A small cohort of the Sunnybrook layout for itself; where its contour is."""
    case = Path(folder, "contourfiles", f"SC-HF-I-{k}", "i-contours")
    images = root / folder / "dicoms" / f"SCD{k:05}"
    (root / case).mkdir(parents=True)
    images.mkdir(parents=True)
    (images / "1.dcm").write_bytes(image)
    place = case / "IM-0001-0001-icontour-manual.txt"
    (root / place).write_bytes(contour)
    table = links or f"patient_id,original_id\nSCD{k:05},SC-HF-I-{k}\n".encode()
    (root / folder / "link.csv").write_bytes(table)
    return str(place)


def child(root: Path, output: Path) -> None:
    """Scan and convert each cohort; prints which files are in the output and which are listed."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    results = {folder.name: convert(folder, output) for folder in sorted(root.iterdir())}
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"rss": max(peak_of_this_process(), of_children), "cohorts": results}))


def peak_of_this_process() -> int:
    """KiB; `getrusage` would also tell what the parent had when it started this program."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.read_text().partition("VmHWM:")[2].split()[0])


def convert(root: Path, output: Path) -> dict[str, Any]:
    """What became of one cohort."""
    from parallel_dicomseg import convert_cohort, scan_cohort
    from parallel_dicomseg.errors import ConfigurationError, ConversionError, LayoutError
    from parallel_dicomseg.records import ConvertOptions, Limits, ScanOptions

    try:
        limits = Limits(decode_seconds=DECODE_SECONDS)
        cohort = scan_cohort(root, options=ScanOptions(include_unannotated=True, limits=limits))
        options = ConvertOptions(
            scheduler="threads", workers=2, overwrite=True, size=(64, 64), limits=limits
        )
        summary = convert_cohort(cohort, output, options=options)
    except (LayoutError, ConfigurationError, ConversionError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    problems = [(problem.path, str(problem.reason)) for problem in summary.problems]
    lost = {problem.path for problem in summary.problems if problem.is_rejection}
    images = {path.decode("utf-8", "replace") for path in cohort.slices.path.tolist()}
    drawn = {path.decode("utf-8", "replace") for path in cohort.annotations.path.tolist()}
    return {"refused": "", "problems": problems, "converted": sorted((images - lost) | drawn)}


def run_apart(root: Path, output: Path, seconds: float) -> tuple[str, dict[str, Any], float]:
    """Run a cohort in a process of its own: how it ended ('', or why it is bad), what it said."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(root), str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "hang", {}, time.monotonic() - begin
    spent = time.monotonic() - begin
    if process.returncode < 0:
        return f"signal {signal.Signals(-process.returncode).name}", {}, spent
    if process.returncode:
        return f"exit {process.returncode}: {errors.decode(errors='replace')[-300:]}", {}, spent
    return "", json.loads(said.splitlines()[-1]), spent


def survive(
    rounds: int, seed: int, data: Path | None, keep: Path | None = None, batch: int = BATCH
) -> Counts:
    """Run so many mutants in batches; the bad ones are kept in a folder where one is given."""
    chance = random.Random(seed)
    seeds = find_seeds(data)
    by_kind: dict[str, list[Seed]] = {}
    for one in seeds:
        by_kind.setdefault(one.kind, []).append(one)
    weights = {"image": 10, "rtstruct": 3, "seg": 3, "contour": 2, "links": 1, "xml": 2}
    kinds = [kind for kind in weights if kind in by_kind]
    counts = Counts()
    while counts.rounds < rounds:
        mutants = []
        for _ in range(min(batch, rounds - counts.rounds)):
            kind = chance.choices(kinds, [weights[kind] for kind in kinds])[0]
            one = chance.choice(by_kind[kind])
            mutants.append((one, mutate(one, chance, seeds)))
        counts.rounds += len(mutants)
        run_batch(mutants, counts, keep)
    return counts


def run_batch(mutants: list[tuple[Seed, bytes]], counts: Counts, keep: Path | None) -> None:
    """Run some mutants together; where that ends badly, half of them at a time."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        places = lay_out(root, mutants)
        seconds = 30.0 + MOST_SECONDS + 0.2 * len(mutants)
        ended, said, spent = run_apart(root, Path(folder, "out.h5"), seconds)
    counts.slowest = max(counts.slowest, spent)
    counts.rss_bytes = max(counts.rss_bytes, 1024 * said.get("rss", 0))
    ended = ended or said["cohorts"][COHORT]["refused"]
    if ended and len(mutants) > 1:
        half = len(mutants) // 2
        run_batch(mutants[:half], counts, keep)
        run_batch(mutants[half:], counts, keep)
    elif ended:
        name = f"{mutants[0][0].kind} {mutants[0][0].name}: {ended}"
        (counts.hangs if ended == "hang" else counts.crashes).append(name)
        _keep(keep, mutants[0], len(counts.bad))
    else:
        _account(mutants, places, said["cohorts"], counts, keep)


def _account(
    mutants: list[tuple[Seed, bytes]],
    places: dict[str, int],
    cohorts: dict[str, Any],
    counts: Counts,
    keep: Path | None,
) -> None:
    """Every mutant is somewhere, and the good images are converted."""
    listed = dict(reversed(cohorts[COHORT]["problems"]))
    converted = set(cohorts[COHORT]["converted"])
    for path, k in places.items():
        if path in cohorts:
            counts.refused += bool(cohorts[path]["refused"])
            counts.converted += not cohorts[path]["refused"]
        elif path in listed:
            counts.listed[listed[path]] += 1
        elif path in converted:
            counts.converted += 1
        else:
            counts.lost.append(f"{mutants[k][0].kind} {mutants[k][0].name}: neither here nor there")
            _keep(keep, mutants[k], len(counts.bad))
    good = sum(path.startswith("good/images") for path in converted)
    if good != 3:
        counts.lost.append(f"{3 - good} undamaged images beside {len(mutants)} mutants")
        for k, mutant in enumerate(mutants):
            _keep(keep, mutant, 1000 + k)


def _keep(keep: Path | None, mutant: tuple[Seed, bytes], number: int) -> None:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{number}-{mutant[0].kind}-{mutant[0].name}").write_bytes(mutant[1])


def main() -> int:
    """Run the long version; 1 where something bad happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, help="folder of real cohorts, if it is there")
    parser.add_argument("--keep", type=Path, help="folder for what ended badly")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return 0
    begin = time.monotonic()
    counts = survive(arguments.rounds, arguments.seed, arguments.data, arguments.keep)
    print(
        f"{counts.rounds} mutants in {time.monotonic() - begin:.0f} s, {counts.converted} converted"
    )
    print(f"  {sum(counts.listed.values())} listed {dict(counts.listed.most_common())},")
    print(f"  {counts.refused} cohorts refused; largest process {counts.rss_bytes >> 20} MiB,")
    print(f"  slowest run {counts.slowest:.1f} s")
    print(f"{len(counts.crashes)} crashes, {len(counts.hangs)} hangs, {len(counts.lost)} lost")
    for line in counts.bad:
        print(" ", line)
    return int(bool(counts.bad))


if __name__ == "__main__":
    sys.exit(main())
