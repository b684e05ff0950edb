"""Who decodes which transfer syntax: one pinned decoder each, so that a file has one result.

Lossy JPEG is the reason: its decoders differ by up to 3 grey levels. For that the decoder is
pydicom's with Pillow; all else, where the result is a fact, is decoded by imagecodecs, which
releases the GIL and is 1.5 to 5 times as fast as pydicom's own plugins. Both are run by pydicom's
`Decoder`, so that signs and colour spaces are handled in one place; the functions `is_available`
and `decode_codestream` of this module are what pydicom calls a decoding plugin.

12-bit JPEG Extended, which Pillow does not read, is the exception: pylibjpeg-libjpeg, as pydicom,
where it is installed (its licence is the GPL, so it is nobody's dependency); else, and for the
files that it refuses, imagecodecs. The two differ by one grey level. `decoder_versions` records
which of them was there.

GDCM is never used: it aborts the process on damaged files.
"""

from __future__ import annotations

import logging
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXTRA = 'pip install "parallel_dicomseg[decoders]"'

IMPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
DEFLATED_LITTLE_ENDIAN = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_JPEG = "1.2.840.10008.1.2.4"
JPEG_EXTENDED = f"{_JPEG}.51"
RLE = "1.2.840.10008.1.2.5"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"


@dataclass(frozen=True, slots=True)
class Decoder:
    """What decodes the frames of one transfer syntax."""

    transfer_syntax_uid: str
    name: str
    """Of the transfer syntax (DICOM PS3.6 table A-1)."""
    module: str
    """What must be importable: 'numpy', 'zlib', 'PIL', 'imagecodecs' or 'libjpeg'."""
    function: str = ""
    """The function of imagecodecs, '' elsewhere."""
    gives: str = "native"
    """'native': pixels as in an uncompressed file; 'codestream': pixels whose sign and colour
    space depend on the codestream and are set right by pydicom."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be used here."""
        return _is_importable(self.module)

    @property
    def release(self) -> str:
        """The package that decodes compressed pixels, and its version; '' where there is none."""
        package = _DISTRIBUTIONS.get(self.module, "")
        versions = decoder_versions()
        return f"{package} {versions[package]}" if package in versions else ""


#: Distributions of the modules that decode compressed pixels.
_DISTRIBUTIONS = {"PIL": "pillow", "imagecodecs": "imagecodecs", "libjpeg": "pylibjpeg-libjpeg"}
_CODESTREAM = "codestream"
_PYDICOM_PLUGINS = {
    "PIL": "pydicom.pixels.decoders.pillow",
    "libjpeg": "pydicom.pixels.decoders.pylibjpeg",
}
_TWELVE_BITS = tuple(
    Decoder(JPEG_EXTENDED, "JPEG Extended, 12 bits", module, function, _CODESTREAM)
    for module, function in (("libjpeg", ""), ("imagecodecs", "jpeg8_decode"))
)

#: One decoder per transfer syntax; 12-bit JPEG Extended has its own, see `decoder_for`. OpenJPH
#: (htj2k_decode) wraps what overshoots in lossy files, so OpenJPEG reads those.
DECODERS: dict[str, Decoder] = {
    decoder.transfer_syntax_uid: decoder
    for decoder in (
        Decoder(IMPLICIT_LITTLE_ENDIAN, "Implicit VR Little Endian", "numpy"),
        Decoder(EXPLICIT_LITTLE_ENDIAN, "Explicit VR Little Endian", "numpy"),
        Decoder(DEFLATED_LITTLE_ENDIAN, "Deflated Explicit VR Little Endian", "numpy"),
        Decoder(EXPLICIT_BIG_ENDIAN, "Explicit VR Big Endian", "numpy"),
        Decoder(f"{_JPEG}.50", "JPEG Baseline", "PIL", "", _CODESTREAM),
        Decoder(JPEG_EXTENDED, "JPEG Extended", "PIL", "", _CODESTREAM),
        *(
            Decoder(f"{_JPEG}.{last}", name, "imagecodecs", function, _CODESTREAM)
            for last, name, function in (
                ("57", "JPEG Lossless", "jpeg8_decode"),
                ("70", "JPEG Lossless SV1", "jpeg8_decode"),
                ("80", "JPEG-LS Lossless", "jpegls_decode"),
                ("81", "JPEG-LS Near Lossless", "jpegls_decode"),
                ("90", "JPEG 2000 Lossless", "jpeg2k_decode"),
                ("91", "JPEG 2000", "jpeg2k_decode"),
                ("201", "HTJ2K Lossless", "htj2k_decode"),
                ("202", "HTJ2K Lossless RPCL", "htj2k_decode"),
                ("203", "HTJ2K", "jpeg2k_decode"),
            )
        ),
        *(
            Decoder(f"{_JPEG}.{last}", name, "imagecodecs", "jpegxl_decode")
            for last, name in (
                ("110", "JPEG XL Lossless"),
                ("111", "JPEG XL JPEG Recompression"),
                ("112", "JPEG XL"),
            )
        ),
        Decoder(RLE, "RLE Lossless", "imagecodecs", "dicomrle_decode"),
        Decoder(DEFLATED_FRAMES, "Deflated Image Frame Compression", "zlib"),
    )
}


def decoder_for(
    transfer_syntax_uid: str, bits_allocated: int = 8, samples: int = 1
) -> Decoder | None:
    """The decoder that is pinned for such frames, installed or not; None where there is none."""
    if transfer_syntax_uid == JPEG_EXTENDED and bits_allocated > 8 and samples == 1:
        return next((decoder for decoder in _TWELVE_BITS if decoder.is_installed), _TWELVE_BITS[-1])
    return DECODERS.get(transfer_syntax_uid)


def missing_decoders(transfer_syntax_uids: Iterable[str]) -> dict[str, str]:
    """Of some transfer syntaxes those that cannot be decoded here, and what to do about it."""
    missing = {}
    for uid in dict.fromkeys(transfer_syntax_uids):
        decoder = decoder_for(uid, 16)
        if decoder is None:
            missing[uid] = "no decoder is known for this transfer syntax"
        elif not decoder.is_installed:
            missing[uid] = f"{decoder.name}: {EXTRA}"
    return missing


def decoder_versions() -> dict[str, str]:
    """Versions of the packages that decode pixels, those that are installed, for provenance."""
    versions = {}
    for package in ("pydicom", *_DISTRIBUTIONS.values()):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@cache
def _is_importable(module: str) -> bool:
    return find_spec(module) is not None


# --- codestreams ---------------------------------------------------------------------------------

# JPEG markers SOF0 … SOF15 and JPEG-LS' SOF55, which give the size; DHT, JPG and DAC are none.
_START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_JPEG_2000_START = b"\xff\x4f\xff\x51"


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 codestream claims; None elsewhere.

    To be compared with the header's before anything is allocated: 80 bytes can claim 60000²
    pixels. ITU-T T.81 B.2.2 and T.800 A.5.1.
    """
    if frame[:2] == b"\xff\xd8":
        return _jpeg_size(frame)
    start = frame.find(_JPEG_2000_START, 0, 4096)
    if start < 0 or len(frame) < start + 24:
        return None
    columns, rows, left, top = np.frombuffer(frame, ">u4", 4, start + 8).tolist()
    return rows - top, columns - left


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        if frame[at + 1] in _START_OF_FRAME:
            rows, columns = np.frombuffer(frame, ">u2", 2, at + 5).tolist()
            return rows, columns
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def is_available(uid: str) -> bool:
    """Whether `decode_codestream` reads a transfer syntax here; asked by pydicom."""
    return uid in DECODERS and _has_imagecodecs()


def _has_imagecodecs() -> bool:
    return _is_importable("imagecodecs")


def decode_codestream(frame: bytes, runner: Any) -> bytes:
    """Decode one frame by imagecodecs: a decoding plugin of pydicom, whose runner is told what
    the bytes are that come back.
    """
    image = _decode_by_imagecodecs(frame, runner.transfer_syntax)
    runner.set_option("bits_allocated", 8 * image.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):
        # the inverse of these transforms is part of decoding JPEG 2000
        runner.set_option("photometric_interpretation", "RGB")
    return image.tobytes()


def _decode_by_imagecodecs(frame: bytes, transfer_syntax_uid: str) -> NDArray[Any]:
    import imagecodecs

    function = DECODERS[transfer_syntax_uid].function or "jpeg8_decode"
    image: NDArray[Any] = getattr(imagecodecs, function)(frame)
    return image


@cache
def codestream_decoder(decoder: Decoder) -> Any:
    """A `pydicom.pixels.decoders.base.Decoder` that knows no other plugin than the pinned one."""
    from pydicom.pixels.decoders.base import Decoder as PydicomDecoder
    from pydicom.uid import UID

    pinned = PydicomDecoder(UID(decoder.transfer_syntax_uid))
    if decoder.module in _PYDICOM_PLUGINS:
        pinned.add_plugin(decoder.module, (_PYDICOM_PLUGINS[decoder.module], "_decode_frame"))
    if decoder.module == "imagecodecs" or (decoder.module == "libjpeg" and _has_imagecodecs()):
        pinned.add_plugin("imagecodecs", (__name__, decode_codestream.__name__))
    return pinned


# --- frames that become native pixels ------------------------------------------------------------


def native_frame(
    frame: bytes, decoder: Decoder, options: Mapping[str, Any]
) -> tuple[bytes, dict[str, Any]]:
    """Decode an RLE, deflated or JPEG XL frame to what an uncompressed file would hold.

    Parameters
    ----------
    frame
        The encoded frame.
    decoder
        One that gives native pixels.
    options
        pydicom's decoding options of the file.

    Returns
    -------
    The little-endian bytes, and the options that describe them.

    Raises
    ------
    ValueError
        Where there are fewer bytes than the header says, or more.
    """
    changed = {**options, "number_of_frames": 1, "planar_configuration": 0}
    changed.pop("extended_offsets", None)
    if options["photometric_interpretation"] == "YBR_FULL_422":
        # nothing is left out in these encodings, as it would be in native pixels
        changed["photometric_interpretation"] = "YBR_FULL"
    size = frame_bytes(options)
    if decoder.module == "zlib":
        changed["planar_configuration"] = options.get("planar_configuration", 0)
        pixels = zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, size + 2)
    elif decoder.transfer_syntax_uid == RLE:
        changed["planar_configuration"] = 1
        pixels = _decode_rle(frame, options["bits_allocated"])
    else:
        image = _decode_by_imagecodecs(frame, decoder.transfer_syntax_uid)
        changed["bits_allocated"] = 8 * image.dtype.itemsize
        if image.ndim == 3:
            changed["photometric_interpretation"] = "RGB"
        if image.shape[:2] != (options["rows"], options["columns"]):
            raise ValueError("the frame has other rows or columns")
        size, pixels = frame_bytes(changed), image.tobytes()
    if len(pixels) not in (size, size + size % 2):
        raise ValueError("the frame has another number of bytes")
    return pixels, changed


def frame_bytes(options: Mapping[str, Any]) -> int:
    """Bytes of one frame, the samples not subsampled; bits are packed."""
    pixels = options["rows"] * options["columns"] * options["samples_per_pixel"]
    size: int = -(-pixels * options["bits_allocated"] // 8)
    return size


def _decode_rle(frame: bytes, bits_allocated: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.dicomrle_decode(frame, f"<u{max(bits_allocated // 8, 1)}"))


# --- silence -------------------------------------------------------------------------------------


class _Quiet:
    """How many threads want silence at present, and what was set before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.filters = warnings.catch_warnings()
        self.propagates = True

    def enter(self) -> None:
        with self.lock:
            if not self.users:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.simplefilter("ignore")
                self.propagates, _PYDICOM_LOGGER.propagate = _PYDICOM_LOGGER.propagate, False
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.filters.__exit__(None, None, None)
                _PYDICOM_LOGGER.propagate = self.propagates


_PYDICOM_LOGGER = logging.getLogger("pydicom")
_quiet = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, whose warnings and log print values of the header, in many threads at once.

    `warnings.catch_warnings` alone belongs to the whole process: of two threads the first to leave
    it turns warnings on for the second, and that one then leaves them off for ever.
    """
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()
