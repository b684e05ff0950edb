"""Reading pixels against pydicom, measured in the same run.

    python benchmarks/decode.py            a minute or two
    python benchmarks/decode.py --quick    every transfer syntax once, and small

One smooth 12-bit image with noise (8-bit for lossy JPEG), 512 x 512, is written in every transfer
syntax into files of its own. Ours is one call of `read_images` per thread and half of the files;
pydicom's is `dcmread(file).pixel_array` file by file, with the plugins that it picks itself. Both
parse the headers and read from the page cache; the decoded values are compared before anything is
timed. "placed" is native pixels that are rescaled and padded, against the same read as they are;
"apart" is what it costs that compressed frames are decoded in a process of their own.

Both take turns, round by round; figures are medians over the rounds. Only ratios within one run
mean something.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from printing import emitter
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import CTImageStorage, generate_uid

from parallel_dicomseg.dicom import sandbox_child
from parallel_dicomseg.dicom.decoders import DECODERS, Decoder, decoder_for, quiet
from parallel_dicomseg.dicom.opened import open_image
from parallel_dicomseg.dicom.pixels import read_images
from parallel_dicomseg.dicom.sandbox import close_decoders, decode_apart
from parallel_dicomseg.dicom.sandbox_child import OPTIONS
from parallel_dicomseg.records import Layout, SliceRefs

_JPEG = "1.2.840.10008.1.2.4"
#: How each transfer syntax is encoded; None: as native pixels, by pydicom.
ENCODERS: dict[str, Callable[[NDArray[Any]], bytes] | None] = {
    "1.2.840.10008.1.2.1": None,
    "1.2.840.10008.1.2.2": None,
    "1.2.840.10008.1.2.1.99": None,
    "1.2.840.10008.1.2.5": None,
    f"{_JPEG}.50": lambda image: imagecodecs.jpeg8_encode(image, level=90),
    f"{_JPEG}.70": lambda image: imagecodecs.jpeg8_encode(image, lossless=True, bitspersample=12),
    f"{_JPEG}.80": imagecodecs.jpegls_encode,
    f"{_JPEG}.90": lambda image: imagecodecs.jpeg2k_encode(
        image, reversible=True, codecformat="j2k"
    ),
    f"{_JPEG}.201": lambda image: imagecodecs.htj2k_encode(image, reversible=True),
}

_COLUMNS = {
    "decoding": (
        ("ours 1", "{ours_1:.0f}/s"),
        ("ours 2", "{ours_2:.0f}/s"),
        ("pydicom 1", "{pydicom_1:.0f}/s"),
        ("pydicom 2", "{pydicom_2:.0f}/s"),
        ("ratio 1", "{ratio_1:.1f}"),
        ("ratio 2", "{ratio_2:.1f}"),
    ),
    "placing": (("as it is", "{as_it_is:.0f}/s"), ("placed", "{placed:.0f}/s")),
    "apart": (
        ("here", "{here:.2f} ms"),
        ("apart", "{apart:.2f} ms"),
        ("costs", "{costs:.0%}"),
    ),
}


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one transfer syntax, and what a worker is told about them."""

    paths: list[str]
    refs: SliceRefs
    layout: Layout


def main() -> None:
    """Measure every transfer syntax, then what rescaling and padding cost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every case once, and small")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    emit = emitter("decode", _COLUMNS, as_json=arguments.json, name_width=36, width=14)
    size, count, rounds = (64, 4, 1) if arguments.quick else (512, 32, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for uid in ENCODERS:
            if (decoder := decoder_for(uid, 16)) is None or not decoder.is_installed:
                continue
            files = write_files(Path(folder), uid, size, count)
            emit({"measures": "decoding", "case": DECODERS[uid].name, **compare(files, rounds)})
        for uid, encoder in ENCODERS.items():
            if encoder or uid.endswith(".5"):
                frame = first_frame(Path(folder, f"{uid}-0.dcm"))
                emit({"measures": "apart", "case": DECODERS[uid].name, **isolate(*frame, rounds)})
        close_decoders()
        native = write_files(Path(folder), "1.2.840.10008.1.2.1", size, count)
        emit({"measures": "placing", "case": f"native, {size} x {size}", **place(native, rounds)})


def first_frame(file: Path) -> tuple[bytes, Decoder, dict[str, Any]]:
    """The encoded first frame of a file, and what is said of it to whoever decodes it."""
    with quiet(), open_image(file) as image:
        image.stream.seek(image.start)
        frame = get_frame(image.stream, 0, number_of_frames=1)
        options = {name: image.options[name] for name in OPTIONS if name in image.options}
        return frame, image.decoder, options


def isolate(
    frame: bytes, decoder: Decoder, options: dict[str, Any], rounds: int
) -> dict[str, float]:
    """Milliseconds for one frame in this process, and in the one that may die of it."""
    seconds: dict[str, list[float]] = {"here": [], "apart": []}
    for turn in range(20 * rounds + 1):
        for name, function in (
            ("here", lambda: sandbox_child.decode(decoder, options, frame)),
            ("apart", lambda: decode_apart(frame, decoder, options)),
        ):
            start = time.perf_counter()
            function()
            if turn:  # the first starts the process
                seconds[name].append(1000 * (time.perf_counter() - start))
    here, apart = (statistics.median(values) for values in seconds.values())
    return {"here": here, "apart": apart, "costs": apart / here - 1}


def phantom(size: int, bits: int) -> NDArray[Any]:
    """A smooth image with noise in its lowest bits."""
    place = np.linspace(-3, 3, size)
    smooth = np.exp(-(np.hypot(*np.meshgrid(place, place)) ** 2) / 4) * (2**bits - 1) * 0.8
    noise = np.random.default_rng(0).normal(0, 2 ** (bits - 8), (size, size))
    return np.clip(smooth + noise, 0, 2**bits - 1).astype("<u2" if bits > 8 else "|u1")


def write_files(folder: Path, uid: str, size: int, count: int) -> Files:
    """`count` files of one transfer syntax, all with the same pixels."""
    encoder = ENCODERS[uid]
    bits = 8 if uid.endswith(".50") else 12
    image = phantom(size, bits)
    dataset = header(image, bits, uid)
    if uid.endswith(".5"):
        dataset.PixelData = image.tobytes()
        dataset.compress(uid, encoding_plugin="pydicom")
    elif encoder:
        dataset.PixelData = encapsulate([encoder(image)])
    else:
        big = uid.endswith("1.2.2")
        dataset.PixelData = (image.byteswap() if big else image).tobytes()
    dataset["PixelData"].VR = "OB" if encoder or uid.endswith(".5") else "OW"
    paths = []
    for number in range(count):
        path = folder / f"{uid}-{number}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(str(path))
    return Files(paths, references(paths, dataset, image, uid), layout(image))


def header(image: NDArray[Any], bits: int, uid: str) -> Dataset:
    """A CT image without pixels."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1" if uid.endswith(".5") else uid
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored = 8 * image.itemsize, bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    return dataset


def references(paths: list[str], dataset: Dataset, image: NDArray[Any], uid: str) -> SliceRefs:
    """What a scan would have found out about the files."""
    native, n = uid == "1.2.840.10008.1.2.1", len(paths)
    offset = pydicom.dcmread(paths[0])["PixelData"].file_tell
    return SliceRefs(
        path=tuple(paths),
        frame=(0,) * n,
        file_size=tuple(Path(path).stat().st_size for path in paths),
        pixel_offset=(offset if native else -1,) * n,
        pixel_length=(image.nbytes if native else -1,) * n,
        stored_dtype=("<u2" if native else "",) * n,
        bits_stored=(dataset.BitsStored,) * n,
        rescale_slope=(1.0,) * n,
        rescale_intercept=(0.0,) * n,
        rows=(image.shape[0],) * n,
        columns=(image.shape[1],) * n,
        photometric_interpretation=("MONOCHROME2",) * n,
        plane_geometry=((0.0,) * 11,) * n,
        grid=((0.0, 0.0, 1.0, 1.0),) * n,
        annotated=(0,) * n,
    )


def layout(image: NDArray[Any]) -> Layout:
    """The output that holds these images."""
    return Layout(
        slices=1,
        rows=image.shape[0],
        columns=image.shape[1],
        image_dtype=image.dtype.str,
        mask_dtype="|u1",
        structures=("",),
        nested=(),
        rule="center",
        contour_origin=0.0,
        include_unannotated=True,
        codec="none",
        keep_identity=False,
        source="",
    )


def part(files: Files, first: int, step: int) -> Files:
    """Every `step`-th file."""
    names = SliceRefs.__dataclass_fields__
    refs = SliceRefs(*(getattr(files.refs, name)[first::step] for name in names))
    return replace(files, paths=files.paths[first::step], refs=refs)


def read_ours(files: Files) -> NDArray[Any]:
    """All images of some files."""
    shape = (len(files.paths), files.layout.rows, files.layout.columns)
    out = np.empty(shape, files.layout.image_dtype)
    good, problems = read_images("", files.refs, out, files.layout)
    assert good.all(), problems
    return out


def read_pydicom(files: Files) -> NDArray[Any]:
    """The same by pydicom."""
    return np.stack([pydicom.dcmread(path).pixel_array for path in files.paths])


def compare(files: Files, rounds: int) -> dict[str, float]:
    """Frames a second of both with one and two threads."""
    difference = np.abs(read_ours(files).astype(int) - read_pydicom(files))
    assert difference.max() <= (1 if ".4.50-" in files.paths[0] else 0)
    seconds: dict[str, list[float]] = {}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            for name, function in (("ours", read_ours), ("pydicom", read_pydicom)):
                for threads in (1, 2):
                    start = time.perf_counter()
                    list(pool.map(function, [part(files, k, threads) for k in range(threads)]))
                    seconds.setdefault(f"{name}_{threads}", []).append(time.perf_counter() - start)
    rates = {key: len(files.paths) / statistics.median(value) for key, value in seconds.items()}
    ratios = {f"ratio_{n}": rates[f"ours_{n}"] / rates[f"pydicom_{n}"] for n in (1, 2)}
    return {**rates, **ratios}


def place(files: Files, rounds: int) -> dict[str, float]:
    """Slices a second of native pixels as they are, and rescaled, cropped and padded."""
    n = len(files.paths)
    as_it_is = replace(files, refs=replace(files.refs, bits_stored=(16,) * n))
    refs = replace(files.refs, grid=((-8.0, 8.0, 1.0, 1.0),) * n, rescale_intercept=(-1024.0,) * n)
    placed = Files(files.paths, refs, replace(files.layout, image_dtype="<i2"))
    seconds: dict[str, list[float]] = {"as_it_is": [], "placed": []}
    for turn in range(rounds + 1):
        for name, chosen in (("as_it_is", as_it_is), ("placed", placed)):
            start = time.perf_counter()
            read_ours(chosen)
            if turn:  # the first loads the kernels
                seconds[name].append(time.perf_counter() - start)
    return {name: n / statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
