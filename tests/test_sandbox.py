"""The process in which compressed frames are decoded may hang or die: that costs one frame."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

from parallel_dicomseg.dicom import sandbox
from parallel_dicomseg.dicom.decoders import DECODERS, Decoder, decoder_for
from parallel_dicomseg.dicom.sandbox import DecodingError, as_array, close_decoders, decode_apart
from parallel_dicomseg.errors import ResumableError
from parallel_dicomseg.limits import applied
from parallel_dicomseg.records import Limits

JPEG_LS = "1.2.840.10008.1.2.4.80"
IMAGE = (np.arange(48 * 40) * 7 % 4096).astype("<u2").reshape(48, 40)
FRAME: bytes = imagecodecs.jpegls_encode(IMAGE)
OPTIONS: dict[str, Any] = {
    "rows": 48,
    "columns": 40,
    "samples_per_pixel": 1,
    "photometric_interpretation": "MONOCHROME2",
    "bits_allocated": 16,
    "bits_stored": 12,
    "pixel_representation": 0,
    "number_of_frames": 1,
}


def jpeg_ls() -> Decoder:
    """The decoder of the frame above."""
    found = decoder_for(JPEG_LS, 16)
    assert found is not None
    return found


def decoded(frame: bytes = FRAME, decoder: Decoder | None = None) -> np.ndarray:
    """The pixels of a frame."""
    return as_array(*decode_apart(frame, decoder or jpeg_ls(), OPTIONS))


def is_running(process_id: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False


def waits_until_gone(process_id: int, seconds: float = 20.0) -> bool:
    """Whether a process ends in time."""
    give_up = time.monotonic() + seconds
    while is_running(process_id) and time.monotonic() < give_up:
        time.sleep(0.05)
    return not is_running(process_id)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Each test begins and ends without a decoding process."""
    close_decoders()
    yield
    close_decoders()


def test_a_frame_comes_back_as_it_would_in_this_process() -> None:
    """Pixels decoded elsewhere are those that the decoder gives here."""
    np.testing.assert_array_equal(IMAGE, decoded())


def test_one_process_decodes_many_frames() -> None:
    """It is started once; a frame that cannot be decoded does not end it."""
    decoded()
    (first,) = sandbox._idle.take_all()
    sandbox._idle.give(first)
    with pytest.raises(DecodingError, match=r"the pixels cannot be decoded \(\w+\)"):
        decoded(b"\xff\xd8" + bytes(50))
    np.testing.assert_array_equal(IMAGE, decoded())
    (last,) = sandbox._idle.take_all()
    sandbox._idle.give(last)

    assert first.process_id == last.process_id


def test_a_frame_on_which_the_process_stops_is_given_up_after_the_deadline() -> None:
    """A process that does not answer is killed, and the next frame has a new one."""
    decoded()
    (process,) = sandbox._idle.take_all()
    os.kill(process.process_id, signal.SIGSTOP)
    sandbox._idle.give(process)
    begin = time.monotonic()
    with (
        applied(Limits(decode_seconds=0.5)),
        pytest.raises(DecodingError, match=r"takes more than 0\.5 s and was stopped"),
    ):
        decoded()

    assert time.monotonic() - begin < 5
    assert not is_running(process.process_id)
    np.testing.assert_array_equal(IMAGE, decoded())


def test_a_decoder_that_hangs_is_stopped() -> None:
    """A JPEG-LS codestream that is cut off makes CharLS loop for ever (imagecodecs 2026.3.6)."""
    begin = time.monotonic()
    with applied(Limits(decode_seconds=1.0)), pytest.raises(DecodingError, match=r"cannot|stopped"):
        decoded(FRAME[: len(FRAME) // 2])

    assert time.monotonic() - begin < 8
    np.testing.assert_array_equal(IMAGE, decoded())


def test_a_process_that_died_before_does_not_cost_the_frame() -> None:
    """Its death is not this frame's fault: a new process decodes it."""
    decoded()
    (process,) = sandbox._idle.take_all()
    os.kill(process.process_id, signal.SIGKILL)
    sandbox._idle.give(process)

    np.testing.assert_array_equal(IMAGE, decoded())


def test_a_frame_that_kills_every_process_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes died of it: that is enough."""
    program = (
        "import sys; sys.path[:] = sys.argv[1:]; import os, imagecodecs; "
        "imagecodecs.jpegls_decode = lambda frame: os._exit(11); "
        "from parallel_dicomseg.dicom.sandbox_child import serve; serve()"
    )
    monkeypatch.setattr(sandbox, "_PROGRAM", program)
    with pytest.raises(DecodingError, match="the decoder dies of the frame"):
        decoded()
    monkeypatch.undo()

    np.testing.assert_array_equal(IMAGE, decoded())


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            "raise type('PanicException', (BaseException,), {})",
            r"cannot be decoded \(PanicException\)",
        ),
        ("raise KeyError('DOE^JOHN')", r"cannot be decoded \(RuntimeError\)"),
        ("return bytes(8 << 30)", r"cannot be decoded \(RuntimeError\)"),
        ("raise SystemExit", r"cannot be decoded \(SystemExit\)"),
    ],
)
def test_what_a_decoder_raises_is_a_value(
    does: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is no Exception, as a panic of Rust; the text quotes nothing."""
    program = (
        "import sys; sys.path[:] = sys.argv[1:]; import imagecodecs\n"
        f"def decode(frame):\n    {does}\n"
        "imagecodecs.jpegls_decode = decode\n"
        "from parallel_dicomseg.dicom.sandbox_child import serve; serve()"
    )
    monkeypatch.setattr(sandbox, "_PROGRAM", program)
    with pytest.raises(DecodingError, match=message):
        decoded()
    (process,) = sandbox._idle.take_all()
    process.close()


def test_a_process_that_cannot_start_is_no_fault_of_the_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends as resumable; no slice is blamed."""
    monkeypatch.setattr(sandbox, "_PROGRAM", "raise SystemExit(3)")
    with pytest.raises(ResumableError, match=r"does not start \(status 3\)"):
        decoded()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ResumableError, match="can be started: No such file"):
        decoded()


def test_threads_have_processes_of_their_own_and_share_them() -> None:
    """Never more processes than threads that decode at the same time."""
    with ThreadPoolExecutor(3) as pool:
        images = list(pool.map(lambda _: decoded(), range(30)))
    processes = sandbox._idle.take_all()
    for process in processes:
        process.close()

    assert all((image == IMAGE).all() for image in images)
    assert 1 <= len(processes) <= 3


def in_a_child(connection: Any) -> None:
    """Decode in a worker process, which may have no children of multiprocessing's."""
    good = bool((decoded() == IMAGE).all())
    connection.send((good, [process.process_id for process in sandbox._idle._processes]))


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_daemonic_worker_may_decode_and_leaves_no_process(method: str) -> None:
    """Workers of pools are daemonic; the decoding process ends with its owner."""
    decoded()  # a forked worker must not use its parent's process
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=in_a_child, args=(theirs,), daemon=True)  # type: ignore[attr-defined]
    worker.start()
    good, (process_id,) = ours.recv()
    worker.join(20)

    assert good
    assert process_id not in [process.process_id for process in sandbox._idle._processes]
    assert waits_until_gone(process_id)
    np.testing.assert_array_equal(IMAGE, decoded())


def test_the_process_ends_where_its_owner_is_killed() -> None:
    """SIGKILL runs no clean-up: the closed connection is enough."""
    program = (
        "import sys; sys.path[:] = sys.argv[1:]; import test_sandbox as t; "
        "t.decoded(); print(t.sandbox._idle._processes[0].process_id, flush=True); "
        "import time; time.sleep(60)"
    )
    path = [str(Path(__file__).parent), *sys.path]
    with subprocess.Popen([sys.executable, "-c", program, *path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        process_id = int(owner.stdout.readline())
        owner.kill()

    assert waits_until_gone(process_id)


def test_nothing_is_started_for_pixels_that_are_not_compressed() -> None:
    """The process belongs to compressed frames alone: others pay nothing."""
    program = (
        "import sys; sys.path[:] = sys.argv[1:]; "
        "import parallel_dicomseg.convert as c; c.warm_up(); "
        "from parallel_dicomseg.dicom.sandbox import _idle; print(len(_idle._processes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *sys.path], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "0"


@pytest.mark.parametrize(
    "head",
    [
        {"dtype": "O", "shape": [1, 8]},
        {"dtype": "<u2", "shape": [4, 4]},
        {"dtype": "<u2", "shape": [-1, 4]},
        {"dtype": "<u2", "shape": "48"},
        {"dtype": "<u2"},
        {"dtype": "|V8", "shape": [1, 1]},
        {"dtype": "<u2", "shape": [2, 2, 1, 1]},
    ],
)
def test_a_process_that_lies_is_not_believed(head: dict[str, Any]) -> None:
    """Pixels have the type and the number of bytes that are said, or there are none."""
    with pytest.raises(DecodingError, match="cannot be decoded"):
        as_array(head, np.zeros(8, np.uint8))


def test_no_decoder_is_gdcm() -> None:
    """One pinned decoder for each transfer syntax, none of which aborts on damaged files."""
    assert {decoder.module for decoder in DECODERS.values()} <= {
        "numpy",
        "PIL",
        "imagecodecs",
        "zlib",
    }
