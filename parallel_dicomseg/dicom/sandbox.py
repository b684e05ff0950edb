"""Compressed frames are decoded in a process of their own: a decoder that hangs, dies or wants all
memory costs the frame, not the run.

The decoders are C code that parses what anybody wrote; mutated files made one of them hang. A
process is started when the first compressed frame comes, serves one thread at a time, and goes on
to the next frame; it is killed after a deadline, and made anew. It ends when its owner closes it,
exits or dies.

Python's own process pools are not used: a worker of one may have no children of its own, and they
pickle.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.dicom.decoders import Decoder, frame_bytes
from parallel_dicomseg.dicom.sandbox_child import LENGTHS, OPTIONS
from parallel_dicomseg.errors import ResumableError
from parallel_dicomseg.limits import limits
from parallel_dicomseg.records import UInt8

# Decoded bytes for which a frame gets a second more.
_BYTES_PER_SECOND = 4 << 20
# Importing what a decoder needs takes half a second on an idle machine.
_START_S = 120.0
_MOST_HEAD = 1 << 16
# What pixels may be; a process that was taken over may say anything.
_DTYPES = frozenset(f"{order}{kind}{size}" for order in "<|" for kind in "iuf" for size in "1248")
_PROGRAM: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from parallel_dicomseg.dicom.sandbox_child import serve; serve()"
)


class DecodingError(Exception):
    """A frame cannot be decoded; the text quotes nothing of the file."""


class _EndedError(Exception):
    """The process died before it answered."""


class _Process:
    """One decoding process; used by one thread at a time."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        ours, theirs = socket.socketpair()
        self._connection = ours
        environment = {
            **os.environ,
            "PARALLEL_DICOMSEG_DECODER_BYTES": str(most_bytes),
            # threads that nobody uses, each with its share of the address space
            **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603  this very program
                    [sys.executable, "-B", "-c", _PROGRAM, *sys.path],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for its owner
                )
        except (OSError, TypeError, ValueError) as error:
            ours.close()
            kind = getattr(error, "strerror", None) or type(error).__name__
            raise ResumableError(
                f"no process to decode pixels in can be started: {kind}"
            ) from error
        try:
            self._receive(time.monotonic() + _START_S)
        except (OSError, _EndedError) as error:
            self.kill()
            raise ResumableError(
                f"the process that decodes pixels does not start (status "
                f"{self._process.returncode}); is there enough memory?"
            ) from error

    @property
    def process_id(self) -> int:
        """Of the system."""
        return self._process.pid

    def decode(
        self, decoder: Decoder, options: dict[str, Any], frame: bytes
    ) -> tuple[dict[str, Any], UInt8]:
        """What the process says of a frame.

        Raises
        ------
        TimeoutError
            It takes too long.
        _EndedError
            The process died.
        """
        seconds = limits().decode_seconds + frame_bytes(options) / _BYTES_PER_SECOND
        deadline = time.monotonic() + seconds
        request = {"decoder": asdict(decoder), "options": options, "seconds": seconds}
        text = json.dumps(request).encode()
        try:
            self._connection.settimeout(seconds)
            self._connection.sendall(LENGTHS.pack(len(text), len(frame)) + text)
            self._connection.sendall(frame)
            return self._receive(deadline)
        except TimeoutError:
            raise
        except OSError as error:
            raise _EndedError from error

    def _receive(self, deadline: float) -> tuple[dict[str, Any], UInt8]:
        head, body = LENGTHS.unpack(self._exactly(LENGTHS.size, deadline).tobytes())
        if head > _MOST_HEAD or body > self.most_bytes:
            raise _EndedError
        text = self._exactly(head, deadline)
        try:
            return json.loads(text.tobytes()), self._exactly(body, deadline)
        except ValueError as error:
            raise _EndedError from error

    def _exactly(self, size: int, deadline: float) -> UInt8:
        out = np.empty(size, np.uint8)  # not zeroed
        view, done = out.data, 0
        while done < size:
            self._connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            count = self._connection.recv_into(view[done:])
            if not count:
                raise _EndedError
            done += count
        return out

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Hang up, and wait until the process has ended."""
        self._connection.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.kill()


class _Idle:
    """Processes that wait for the next frame; shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[_Process] = []

    def take(self) -> _Process:
        """One that nobody uses, made where there is none."""
        most = limits().decoder_bytes
        with self._lock:
            fitting = [one for one in self._processes if one.most_bytes == most]
            if fitting:
                self._processes.remove(fitting[-1])
                return fitting[-1]
        return _Process(most)

    def give(self, process: _Process) -> None:
        """Keep one for the next frame."""
        with self._lock:
            self._processes.append(process)

    def take_all(self) -> list[_Process]:
        """All of them."""
        with self._lock:
            processes, self._processes = self._processes, []
        return processes


_idle = _Idle()


def _forget() -> None:
    """After a fork: the processes are the parent's."""
    global _idle  # noqa: PLW0603
    _idle = _Idle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@atexit.register
def close_decoders() -> None:
    """End the processes that wait for a frame; the next frame makes a new one."""
    for process in _idle.take_all():
        process.close()


@contextmanager
def closing_decoders() -> Iterator[None]:
    """End the processes that are left when the block ends."""
    try:
        yield
    finally:
        close_decoders()


def decode_apart(
    frame: bytes, decoder: Decoder, options: dict[str, Any]
) -> tuple[dict[str, Any], UInt8]:
    """Decode a frame in another process.

    Parameters
    ----------
    frame
        The encoded frame.
    decoder
        What decodes it.
    options
        pydicom's decoding options of the file.

    Returns
    -------
    What `sandbox_child.decode` gives.

    Raises
    ------
    DecodingError
        The frame cannot be decoded, takes too long, too much memory, or the decoder died of it.
    ResumableError
        There is no process to decode it.
    """
    plain = {name: _plain(options[name]) for name in OPTIONS if name in options}
    for last in (False, True):
        process = _idle.take()
        try:
            head, body = process.decode(decoder, plain, frame)
        except TimeoutError:
            process.kill()
            raise DecodingError(
                f"decoding takes more than {limits().decode_seconds:g} s and was stopped"
            ) from None
        except _EndedError:
            process.kill()
            # one frame before it may have done the damage: it has to die twice of this one
            if last:
                raise DecodingError("the decoder dies of the frame") from None
        except BaseException:
            process.kill()
            raise
        else:
            _idle.give(process)
            break
    if "error" in head:
        raise DecodingError(_in_words(str(head["error"])))
    return head, body


def _in_words(kind: str) -> str:
    if kind == "MemoryError":
        return "decoding needs far more memory than the frame has pixels"
    return f"the pixels cannot be decoded ({kind if kind.isidentifier() else 'error'})"


def _plain(value: Any) -> str | int | float:
    """A number or a text, also where it is an enumeration or one of pydicom's."""
    return value if isinstance(value, int | float) else str(value)


def as_array(head: dict[str, Any], body: UInt8) -> NDArray[Any]:
    """The pixels of a codestream as the other process describes them.

    Raises
    ------
    DecodingError
        It describes something else than what it sent.
    """
    dtype, shape = str(head.get("dtype")), head.get("shape")
    if dtype not in _DTYPES or not isinstance(shape, list) or len(shape) not in (2, 3):
        raise DecodingError("the pixels cannot be decoded")
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise DecodingError("the pixels cannot be decoded")
    try:
        return body.view(dtype).reshape(shape)
    except ValueError:
        raise DecodingError("the pixels cannot be decoded") from None
