"""The process in which compressed frames are decoded: it may hang or die, which costs one frame.

It speaks with its owner (`sandbox.py`) over the socket that is its standard input. A message is two
lengths, a head in JSON and a body of raw bytes; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from parallel_dicomseg.dicom.decoders import (
    Decoder,
    codestream_decoder,
    frame_bytes,
    native_frame,
    quiet,
)

Body = bytes | memoryview
LENGTHS = struct.Struct("<IQ")
"""Bytes of the head and of the body of a message."""
#: pydicom's options that say what a frame is; they are plain numbers and texts.
OPTIONS = (
    *("rows", "columns", "samples_per_pixel", "photometric_interpretation", "bits_allocated"),
    *("bits_stored", "pixel_representation", "planar_configuration", "pixel_keyword"),
    *("number_of_frames", "transfer_syntax_uid", "pixel_vr"),
)
# What decoding may take beyond what the process has: so much, and so often the frame's own bytes.
# OpenJPEG holds two 32-bit copies of every sample, pydicom two or three of the pixels.
_ROOM_BYTES = 128 << 20
_ROOM_FRAMES = 16
# How often a waiting process looks whether its owner is still there, seconds.
_LOOK_S = 5.0


def serve() -> None:
    """Decode frames until the owner hangs up or is gone."""
    owner = os.getppid()
    most = int(os.environ["PARALLEL_DICOMSEG_DECODER_BYTES"])
    _drop_rights()
    # the first frame shall not pay for these: its time is limited
    import pydicom.pixels.decoders.base
    import pydicom.pixels.utils  # noqa: F401

    with socket.socket(fileno=0) as connection:
        send(connection, {"ready": True}, b"")
        while _wait(connection, owner):
            message = receive(connection)
            if message is None:
                return
            head, body = message
            # whatever this process is doing then, it ends: also where its owner has been killed
            signal.alarm(math.ceil(head["seconds"]) + 2)
            with _memory(most, frame_bytes(head["options"])):
                reply = _answer(head, body)
            signal.alarm(0)
            send(connection, *reply)


def _drop_rights() -> None:
    """No writing of files, no core dumps."""
    if sys.platform != "win32":
        import resource

        for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(what, (0, 0))


class _memory:  # noqa: N801  a context manager that is used like a function
    """Limit the address space while a frame is decoded, where the system can."""

    def __init__(self, most: int, frame: int) -> None:
        self.limit = min(_address_space() + _ROOM_BYTES + _ROOM_FRAMES * frame, most)

    def __enter__(self) -> None:
        self._set(self.limit)

    def __exit__(self, *error: object) -> None:
        self._set(-1)

    @staticmethod
    def _set(limit: int) -> None:
        if sys.platform != "win32":
            import resource

            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (hard if limit < 0 else limit, hard))


def _address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 4 << 30


def _wait(connection: socket.socket, owner: int) -> bool:
    """Whether a message is coming; not where the owner is gone."""
    while not select.select([connection], [], [], _LOOK_S)[0]:
        if os.getppid() != owner:
            return False
    return True


def _answer(head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], Body]:
    """What decoding a frame gave, or the kind of its error: no text that quotes the file."""
    try:
        with quiet():
            return decode(Decoder(**head["decoder"]), head["options"], body)
    except MemoryError:
        return {"error": "MemoryError"}, b""
    except BaseException as error:  # noqa: BLE001  a Rust decoder's panic is no Exception
        return {"error": type(error).__name__}, b""


def decode(decoder: Decoder, options: dict[str, Any], frame: bytes) -> tuple[dict[str, Any], Body]:
    """Decode one frame.

    Returns
    -------
    The options that describe the native pixels, or the dtype, shape and photometric interpretation
    of those that a codestream gave; and their bytes.
    """
    if decoder.gives == "native":
        pixels, changed = native_frame(frame, decoder, options)
        return {"options": {k: v for k, v in changed.items() if k in OPTIONS}}, pixels
    from pydicom.encaps import encapsulate

    stored, found = codestream_decoder(decoder).as_array(
        encapsulate([frame], has_bot=False), index=0, **{**options, "number_of_frames": 1}
    )
    kind = str(found["photometric_interpretation"])
    stored = np.ascontiguousarray(stored)
    return {"dtype": stored.dtype.str, "shape": stored.shape, "kind": kind}, stored.data.cast("B")


# --- messages ------------------------------------------------------------------------------------


def send(connection: socket.socket, head: dict[str, Any], body: Body) -> None:
    """Send a message."""
    text = json.dumps(head).encode()
    connection.sendall(LENGTHS.pack(len(text), len(body)) + text)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None where the other side has hung up."""
    start = _exactly(connection, LENGTHS.size)
    if len(start) < LENGTHS.size:
        return None
    head, body = LENGTHS.unpack(start)
    text = _exactly(connection, head)
    return json.loads(text), bytes(_exactly(connection, body))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    """So many bytes; fewer where the other side has hung up."""
    out = bytearray(size)
    view, done = memoryview(out), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if not count:
            break
        done += count
    return out if done == size else out[:done]
