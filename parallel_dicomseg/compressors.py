"""ISA-L and blosc called from compiled code, so that a batch of chunks needs the GIL once.

Both libraries come inside Python packages (isal, numcodecs) whose functions take one buffer per
call. Two threads that call them 128 times per task spend much of their time handing the GIL to
each other; so the kernels here call the C functions of the very same libraries. For whatever
compresses, their bytes equal those of the packages' functions, which take over where a symbol is
not to be found.

For reading deflate there are faster libraries inside imagecodecs, where that is installed:
libdeflate undoes images in 0.75 of ISA-L's time, zlib-ng masks (long repeats) in 0.25 of it.

The functions get names of their own in LLVM's table (`add_symbol`): loading a library for all the
process to see would let its zstd and lz4 stand in for those of other packages.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
from isal import isal_zlib
from llvmlite import binding
from numba import types
from numpy.typing import NDArray

from parallel_dicomseg.jit import kernel
from parallel_dicomseg.records import Int64, UInt8

Bool = NDArray[np.bool_]
UInt64 = NDArray[np.uint64]

# struct isal_zstream (igzip_lib.h), as places in its array of 16-, 32- or 64-bit words.
_NEXT_IN_64, _AVAIL_IN_32 = 0, 2
_NEXT_OUT_64, _AVAIL_OUT_32, _TOTAL_OUT_32 = 2, 6, 7
_LEVEL_32, _LEVEL_BUFFER_SIZE_32, _LEVEL_BUFFER_64 = 10, 11, 6
_END_OF_STREAM_16, _FLUSH_16, _FORMAT_16, _HISTORY_BITS_16 = 28, 29, 30, 31
_ZLIB_FORMAT = 3
# The struct ends with internal state of some 100 kB, which isal_deflate_init sets; 512 kB are more
# than any release has.
_STREAM_WORDS = 1 << 16
# ISAL_DEF_LVL1_LARGE, the default: hash tables and 64 Ki tokens of 4 bytes.
_LEVEL_BUFFER_BYTES = (20 << 10) + (4 << 16)

_BLOSC_OVERHEAD_BYTES = 16

# struct inflate_state (igzip_lib.h), likewise; its decoding tables take some 90 kB.
_INFLATE_AVAIL_OUT_32, _INFLATE_TOTAL_OUT_32 = 2, 3
_INFLATE_NEXT_IN_64, _INFLATE_AVAIL_IN_32 = 2, 8
_INFLATE_WORDS = 1 << 15
_ZLIB_HEADER_BYTES, _ADLER_BYTES = 2, 4


def _register(file: str, functions: tuple[str, ...]) -> bool:
    """Make C functions of a Python extension callable from kernels; whether all are there.

    Where they are not, their names stand for a function that nobody calls: a kernel that has a
    choice of libraries must find the names of all.
    """
    found: list[Any] = []
    if file:
        handle = ctypes.CDLL(file)
        found = [getattr(handle, name) for name in functions if hasattr(handle, name)]
    is_complete = len(found) == len(functions)
    for place, name in enumerate(functions):
        function = found[place] if is_complete else ctypes.pythonapi.Py_GetVersion
        address = ctypes.cast(function, ctypes.c_void_p).value
        binding.add_symbol(f"parallel_dicomseg_{name}", address)
    return is_complete


def _extension(package: str, name: str) -> str:
    """File of a package's extension module, found without importing it; '' where there is none."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob(f"{name}.*")):
            if file.suffix == (".pyd" if sys.platform == "win32" else ".so"):
                return str(file)
    return ""


def _isal_stream_fits() -> bool:
    """Whether a stream laid out as above makes what isal makes: the struct is not ours to fix."""
    library = ctypes.CDLL(isal_zlib.__file__)
    data = np.arange(4096, dtype=np.uint16).view(np.uint8)
    out, level_buffer = np.zeros(16384, np.uint8), np.empty(_LEVEL_BUFFER_BYTES, np.uint8)
    stream = np.zeros(_STREAM_WORDS, np.uint64)
    words, halves = stream.view(np.uint32), stream.view(np.uint16)
    library.isal_deflate_init(ctypes.c_void_p(stream.ctypes.data))
    stream[_NEXT_IN_64], words[_AVAIL_IN_32] = data.ctypes.data, data.size
    stream[_NEXT_OUT_64], words[_AVAIL_OUT_32] = out.ctypes.data, out.size
    words[_LEVEL_32], words[_LEVEL_BUFFER_SIZE_32] = 1, level_buffer.size
    stream[_LEVEL_BUFFER_64] = level_buffer.ctypes.data
    halves[_END_OF_STREAM_16], halves[_FORMAT_16] = 1, _ZLIB_FORMAT
    library.isal_deflate(ctypes.c_void_p(stream.ctypes.data))
    made = out[: int(words[_TOTAL_OUT_32])].tobytes()
    return made == isal_zlib.compress(data, 1)


def _isal_inflate_fits() -> bool:
    """Whether a state laid out as above undoes what isal makes, and Adler-32 is zlib's."""
    library = ctypes.CDLL(isal_zlib.__file__)
    library.isal_adler32.restype = ctypes.c_uint32
    data = np.arange(4096, dtype=np.uint16).view(np.uint8)
    packed = np.frombuffer(isal_zlib.compress(data, 1), np.uint8)
    out, state = np.zeros(data.size, np.uint8), np.zeros(_INFLATE_WORDS, np.uint64)
    words = state.view(np.uint32)
    library.isal_inflate_init(ctypes.c_void_p(state.ctypes.data))
    state[0], words[_INFLATE_AVAIL_OUT_32] = out.ctypes.data, out.size
    state[_INFLATE_NEXT_IN_64] = packed.ctypes.data + _ZLIB_HEADER_BYTES
    words[_INFLATE_AVAIL_IN_32] = packed.size - _ZLIB_HEADER_BYTES
    done = library.isal_inflate_stateless(ctypes.c_void_p(state.ctypes.data))
    length = ctypes.c_uint64(out.size)
    adler = library.isal_adler32(ctypes.c_uint32(1), ctypes.c_void_p(out.ctypes.data), length)
    left = int(words[_INFLATE_AVAIL_IN_32])
    return bool(
        done == 0
        and (out == data).all()
        and left == _ADLER_BYTES
        and adler == int.from_bytes(packed[-left:].tobytes(), "big")
    )


def _libdeflate_fits() -> bool:
    """Whether libdeflate undoes what isal makes."""
    library = ctypes.CDLL(_LIBDEFLATE)
    library.libdeflate_alloc_decompressor.restype = ctypes.c_void_p
    data = np.arange(4096, dtype=np.uint16).view(np.uint8)
    packed, out = np.frombuffer(isal_zlib.compress(data, 1), np.uint8), np.zeros_like(data)
    state = ctypes.c_void_p(library.libdeflate_alloc_decompressor())
    places = (packed.ctypes.data, packed.size, out.ctypes.data, out.size, None)
    failed = library.libdeflate_zlib_decompress(state, *map(ctypes.c_void_p, places))
    library.libdeflate_free_decompressor(state)
    return bool(not failed and (out == data).all())


def _zlib_ng_fits() -> bool:
    """Whether zlib-ng undoes what isal makes, and takes sizes of pointers' width."""
    library = ctypes.CDLL(_ZLIB_NG)
    data = np.arange(4096, dtype=np.uint16).view(np.uint8)
    packed, out = np.frombuffer(isal_zlib.compress(data, 1), np.uint8), np.zeros_like(data)
    length = np.array([out.size, 0], np.uintp)
    places = (out.ctypes.data, length.ctypes.data, packed.ctypes.data, packed.size)
    failed = library.zng_uncompress(*map(ctypes.c_void_p, places))
    return bool(not failed and (out == data).all() and length.tolist() == [out.size, 0])


_LIBDEFLATE, _ZLIB_NG = _extension("imagecodecs", "_deflate"), _extension("imagecodecs", "_zlibng")

#: Whether the kernels may be called; else the packages' own functions must do.
HAS_ISAL = (
    _register(isal_zlib.__file__, ("isal_deflate_init", "isal_deflate")) and _isal_stream_fits()
)
HAS_CRC32C = _register(isal_zlib.__file__, ("crc32_iscsi",))
HAS_BLOSC = _register(numcodecs.blosc.__file__, ("blosc_compress_ctx",))
HAS_INFLATE = (
    _register(isal_zlib.__file__, ("isal_inflate_init", "isal_inflate_stateless", "isal_adler32"))
    and _isal_inflate_fits()
)
HAS_UNBLOSC = _register(numcodecs.blosc.__file__, ("blosc_decompress_ctx",))
HAS_LIBDEFLATE = (
    _register(
        _LIBDEFLATE,
        (
            "libdeflate_alloc_decompressor",
            "libdeflate_free_decompressor",
            "libdeflate_zlib_decompress",
        ),
    )
    and _libdeflate_fits()
)
HAS_ZLIB_NG = _register(_ZLIB_NG, ("zng_uncompress",)) and _zlib_ng_fits()

_isal_deflate_init = types.ExternalFunction(
    "parallel_dicomseg_isal_deflate_init", types.void(types.intp)
)
_isal_deflate = types.ExternalFunction("parallel_dicomseg_isal_deflate", types.int32(types.intp))
_blosc_compress = types.ExternalFunction(
    "parallel_dicomseg_blosc_compress_ctx",
    types.int32(
        types.int32,  # level
        types.int32,  # shuffle
        types.uintp,  # bytes per element
        types.uintp,  # bytes in
        types.intp,
        types.intp,
        types.uintp,  # room for bytes out
        types.intp,  # name of the compressor, NUL-terminated
        types.uintp,  # block size, 0: automatic
        types.int32,  # threads
    ),
)

_isal_inflate_init = types.ExternalFunction(
    "parallel_dicomseg_isal_inflate_init", types.void(types.intp)
)
_isal_inflate = types.ExternalFunction(
    "parallel_dicomseg_isal_inflate_stateless", types.int32(types.intp)
)
_isal_adler32 = types.ExternalFunction(
    "parallel_dicomseg_isal_adler32", types.uint32(types.uint32, types.intp, types.uint64)
)
_libdeflate_alloc = types.ExternalFunction(
    "parallel_dicomseg_libdeflate_alloc_decompressor", types.intp()
)
_libdeflate_free = types.ExternalFunction(
    "parallel_dicomseg_libdeflate_free_decompressor", types.void(types.intp)
)
_libdeflate_zlib = types.ExternalFunction(
    "parallel_dicomseg_libdeflate_zlib_decompress",
    types.int32(types.intp, types.intp, types.uintp, types.intp, types.uintp, types.intp),
)
_zlib_ng = types.ExternalFunction(
    "parallel_dicomseg_zng_uncompress",
    types.int32(types.intp, types.intp, types.intp, types.uintp),
)
_blosc_decompress = types.ExternalFunction(
    "parallel_dicomseg_blosc_decompress_ctx",
    types.int32(types.intp, types.intp, types.uintp, types.int32),
)
_crc32_iscsi = types.ExternalFunction(
    "parallel_dicomseg_crc32_iscsi", types.uint32(types.intp, types.int32, types.uint32)
)


def room_for(chunks: int, chunk_bytes: int) -> int:
    """Bytes that are enough for any result of `deflate_rows` and `blosc_rows`."""
    return chunks * (chunk_bytes + chunk_bytes // 8 + 1024)


@kernel
def shuffle_bytes(elements: NDArray[Any], out: UInt8) -> None:
    """HDF5's shuffle: all lowest bytes, all second bytes, ….

    Parameters
    ----------
    elements
        (count,) unsigned integers, little-endian.
    out
        (count x itemsize,) uint8.
    """
    count = elements.size
    for byte in range(elements.itemsize):
        # one loop per byte: LLVM turns each into vector instructions, a joint one not
        plane = out[byte * count : (byte + 1) * count]
        shift = elements.dtype.type(8 * byte)
        for k in range(count):
            plane[k] = np.uint8(elements[k] >> shift)


@kernel
def deflate_rows(rows: NDArray[Any], keep: Bool, level: int, out: UInt8, sizes: Int64) -> int:
    """Shuffle and deflate each row that is kept, one after another into `out`.

    Parameters
    ----------
    rows
        (n, count) unsigned integers, C-contiguous; rows of single bytes are not shuffled.
    keep
        (n,) rows to encode.
    level
        ISA-L's level, 1.
    out
        Room for `room_for(n, bytes of a row)` bytes.
    sizes
        (n,) filled with the bytes of each chunk, 0 where not kept.

    Returns
    -------
    The bytes used of `out`, or -1 where ISA-L reports an error.
    """
    stream = np.empty(_STREAM_WORDS, np.uint64)
    words, halves = stream.view(np.uint32), stream.view(np.uint16)
    level_buffer = np.empty(_LEVEL_BUFFER_BYTES, np.uint8)
    row_bytes = rows.shape[1] * rows.itemsize
    planes = np.empty(row_bytes, np.uint8)
    used = 0
    for i in range(rows.shape[0]):
        sizes[i] = 0
        if not keep[i]:
            continue
        source = rows[i].ctypes.data
        if rows.itemsize > 1:
            shuffle_bytes(rows[i], planes)
            source = planes.ctypes.data
        _isal_deflate_init(stream.ctypes.data)
        stream[_NEXT_IN_64] = source
        words[_AVAIL_IN_32] = row_bytes
        stream[_NEXT_OUT_64] = out.ctypes.data + used
        words[_AVAIL_OUT_32] = out.size - used
        words[_LEVEL_32] = level
        words[_LEVEL_BUFFER_SIZE_32] = level_buffer.size
        stream[_LEVEL_BUFFER_64] = level_buffer.ctypes.data
        halves[_END_OF_STREAM_16] = 1
        halves[_FLUSH_16] = 0
        halves[_FORMAT_16] = _ZLIB_FORMAT
        halves[_HISTORY_BITS_16] = 0
        failed = _isal_deflate(stream.ctypes.data) != 0
        if failed or words[_AVAIL_IN_32] != 0 or words[_AVAIL_OUT_32] == 0:
            return -1
        sizes[i] = words[_TOTAL_OUT_32]
        used += sizes[i]
    return used


@kernel
def blosc_rows(
    rows: NDArray[Any],
    keep: Bool,
    level: int,
    shuffle: int,
    compressor: UInt8,
    out: UInt8,
    sizes: Int64,
) -> int:
    """Encode each row that is kept as a blosc frame; as `deflate_rows`.

    `compressor` is the NUL-terminated name, 'lz4' or 'zstd'.
    """
    row_bytes = rows.shape[1] * rows.itemsize
    used = 0
    for i in range(rows.shape[0]):
        sizes[i] = 0
        if keep[i]:
            size = _blosc_compress(
                level,
                shuffle,
                rows.itemsize,
                row_bytes,
                rows[i].ctypes.data,
                out.ctypes.data + used,
                row_bytes + _BLOSC_OVERHEAD_BYTES,
                compressor.ctypes.data,
                0,
                1,
            )
            if size <= 0:
                return -1
            sizes[i] = size
            used += size
    return used


@kernel
def crc32c_of(data: UInt8, start: int, size: int) -> int:
    """CRC-32C (RFC 3720, appendix B.4) of `data[start : start + size]`."""
    crc = _crc32_iscsi(data.ctypes.data + start, size, np.uint32(0xFFFFFFFF))
    return int(np.uint32(crc) ^ np.uint32(0xFFFFFFFF))


@kernel
def crc32c_of_rows(flat: UInt8, sizes: Int64, checksums: NDArray[np.uint32]) -> None:
    """Checksums of chunks that lie one after another; 0 for those without bytes."""
    start = 0
    for i in range(len(sizes)):
        checksums[i] = crc32c_of(flat, start, sizes[i])
        start += sizes[i]


#: By what a chunk is decoded; `way_of` says which.
NO_WAY, RAW, ISAL, LIBDEFLATE, ZLIB_NG, UNBLOSC = range(6)


def way_of(codec: str, itemsize: int) -> int:
    """By what chunks of a codec are decoded in kernels; NO_WAY where they cannot be."""
    if codec == "none":
        return RAW
    if codec != "deflate":
        return UNBLOSC if HAS_UNBLOSC else NO_WAY
    if itemsize == 1 and HAS_ZLIB_NG:
        return ZLIB_NG
    if itemsize > 1 and HAS_LIBDEFLATE:
        return LIBDEFLATE
    return ISAL if HAS_INFLATE else NO_WAY


@kernel
def new_decoder(way: int) -> tuple[UInt64, int]:
    """What `decode_chunk` works with; to be given to `drop_decoder`."""
    state = np.empty(_INFLATE_WORDS if way == ISAL else 2, np.uint64)
    return state, int(_libdeflate_alloc()) if way == LIBDEFLATE else 0


@kernel
def drop_decoder(decoder: tuple[UInt64, int]) -> None:
    """Give its memory back."""
    if decoder[1]:
        _libdeflate_free(decoder[1])


@kernel
def decode_chunk(
    way: int,
    decoder: tuple[UInt64, int],
    chunk: UInt8,
    itemsize: int,
    planes: UInt8,
    out: UInt8,
) -> bool:
    """Decode one chunk.

    Parameters
    ----------
    way, decoder
        See `way_of` and `new_decoder`.
    chunk
        Its encoded bytes.
    itemsize
        Bytes per element: HDF5's shuffle is undone where it is more than 1.
    planes
        As many bytes as `out`, used where HDF5's shuffle is undone.
    out
        Filled with the bytes of the decoded elements, all of it.

    Returns
    -------
    Whether it is a chunk of this codec and becomes as many bytes as `out` has.
    """
    if way == RAW:
        if len(chunk) != len(out):
            return False
        out[:] = chunk
        return True
    if way == UNBLOSC:
        return _unblosc(chunk, out)
    target = out if itemsize == 1 else planes[: len(out)]
    if not _is_zlib(chunk) or not _inflate(way, decoder, chunk, target):
        return False
    if itemsize == 2:
        unshuffle_row(target, out.view(np.uint16))
    elif itemsize == 4:
        unshuffle_row(target, out.view(np.uint32))
    elif itemsize == 8:
        unshuffle_row(target, out.view(np.uint64))
    return True


@kernel
def _inflate(way: int, decoder: tuple[UInt64, int], stream: UInt8, out: UInt8) -> bool:
    """A zlib stream to all of `out`, its Adler-32 checked; bytes behind it do not matter."""
    state, libdeflate = decoder
    source, target = stream.ctypes.data, out.ctypes.data
    if way == LIBDEFLATE:
        # without a place for the true size it must be that of `out`
        return bool(
            libdeflate
            and _libdeflate_zlib(libdeflate, source, len(stream), target, len(out), 0) == 0
        )
    if way == ZLIB_NG:
        state[0] = len(out)
        failed = _zlib_ng(target, state.ctypes.data, source, len(stream)) != 0
        return not failed and state[0] == len(out)
    return _isal_inflated(state, stream, out)


@kernel
def _isal_inflated(state: UInt64, stream: UInt8, out: UInt8) -> bool:
    words = state.view(np.uint32)
    _isal_inflate_init(state.ctypes.data)
    state[0] = out.ctypes.data
    words[_INFLATE_AVAIL_OUT_32] = len(out)
    state[_INFLATE_NEXT_IN_64] = stream.ctypes.data + _ZLIB_HEADER_BYTES
    words[_INFLATE_AVAIL_IN_32] = len(stream) - _ZLIB_HEADER_BYTES
    failed = _isal_inflate(state.ctypes.data) != 0
    left = int(words[_INFLATE_AVAIL_IN_32])
    if failed or words[_INFLATE_TOTAL_OUT_32] != len(out) or left < _ADLER_BYTES:
        return False
    claimed = np.uint32(0)
    for byte in stream[len(stream) - left : len(stream) - left + _ADLER_BYTES]:
        claimed = np.uint32(claimed << 8) | np.uint32(byte)
    found = _isal_adler32(np.uint32(1), out.ctypes.data, np.uint64(len(out)))
    return bool(found == claimed)


@kernel
def _is_zlib(stream: UInt8) -> bool:
    """Whether a zlib header without a dictionary begins here (RFC 1950)."""
    if len(stream) < _ZLIB_HEADER_BYTES + _ADLER_BYTES:
        return False
    first, second = int(stream[0]), int(stream[1])
    return first & 15 == 8 and (first * 256 + second) % 31 == 0 and second & 32 == 0


@kernel
def unshuffle_row(planes: UInt8, elements: NDArray[Any]) -> None:
    """Undo `shuffle_bytes`: planes (count x itemsize,) to elements (count,)."""
    count = len(elements)
    if elements.itemsize == 2:
        # in one pass: written out, LLVM makes one interleaving of it
        for k in range(count):
            elements[k] = planes[k] | np.uint16(planes[count + k]) << np.uint16(8)
        return
    elements[:] = 0
    for byte in range(elements.itemsize):
        plane = planes[byte * count : (byte + 1) * count]
        shift = elements.dtype.type(8 * byte)
        for k in range(count):
            elements[k] |= elements.dtype.type(plane[k]) << shift


@kernel
def _unblosc(frame: UInt8, out: UInt8) -> bool:
    """A blosc frame to all of `out`."""
    if len(frame) < _BLOSC_OVERHEAD_BYTES:
        return False
    # a frame says how long it is and what it becomes; the library believes it
    if _little_endian(frame[4:8]) != len(out) or _little_endian(frame[12:16]) != len(frame):
        return False
    return bool(_blosc_decompress(frame.ctypes.data, out.ctypes.data, len(out), 1) == len(out))


@kernel
def decode_chunks(
    way: int, encoded: UInt8, starts: Int64, sizes: Int64, itemsize: int, rows: UInt8
) -> int:
    """Decode chunks one after another; as `decode_chunk`.

    Parameters
    ----------
    encoded
        The chunks.
    starts, sizes
        (n,) where each begins in `encoded`, and its bytes.
    rows
        (n, bytes) C-contiguous, filled.

    Returns
    -------
    How many rows were decoded: n, or the place of the first one that is no such chunk.
    """
    planes = np.empty(rows.shape[1], np.uint8)
    decoder = new_decoder(way)
    done = 0
    while done < len(rows):
        chunk = encoded[starts[done] : starts[done] + sizes[done]]
        if len(chunk) != sizes[done]:
            break
        if not decode_chunk(way, decoder, chunk, itemsize, planes, rows[done]):
            break
        done += 1
    drop_decoder(decoder)
    return done


@kernel
def _little_endian(four: UInt8) -> int:
    value = 0
    for k in range(4):
        value |= int(four[k]) << (8 * k)
    return value
