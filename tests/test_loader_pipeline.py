"""Threads and the ring: order, bounds, errors, and that nothing is left behind."""

import gc
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from parallel_dicomseg.loader.pipeline import Pipeline, Ring


@dataclass
class Numbers:
    """A job that writes the number of the batch, sample by sample."""

    count: int
    samples: int = 4
    piece: int = 2
    is_open: bool = False
    seconds: float = 0.0
    fails_at: int = -1
    error: BaseException = field(default_factory=lambda: ValueError("batch 3 is broken"))
    begun: list = field(default_factory=list)

    def pieces(self, number):
        """Pieces of two samples."""
        return [(at, at + self.piece) for at in range(0, self.samples, self.piece)]

    def fill(self, number, start, end, buffers, scratch, clock):
        """Write the number."""
        self.begun.append(number)
        time.sleep(self.seconds)
        if number == self.fails_at:
            raise self.error
        buffers[0][start:end] = number


def pipeline(job, prefetch=2, threads=2):
    """A running pipeline of small buffers."""
    return Pipeline(
        job, Ring(lambda: (np.full((job.samples, 3), -1),), prefetch + 2), prefetch, threads
    )


def loader_threads():
    """The pipelines' threads that run."""
    return [t for t in threading.enumerate() if t.name.startswith("batch-loader")]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_come_whole_and_in_order(threads, prefetch):
    """Whatever the threads and the prefetch are."""
    running = pipeline(Numbers(20), prefetch, threads)
    for number in range(20):
        (array,), _ = running.take()
        assert (array == number).all()
    running.close()


def test_nothing_is_made_too_far_ahead():
    """At most `prefetch` batches are begun beyond those that were taken."""
    job = Numbers(50)
    running = pipeline(job, prefetch=3)
    for taken in range(1, 6):
        running.take()
        time.sleep(0.02)
        assert max(job.begun) <= taken + 2
    running.close()


def test_kept_batches_are_never_overwritten():
    """Who keeps batches, or parts of them, keeps what was in them."""
    running = pipeline(Numbers(30))
    whole, parts = [], []
    for number in range(30):
        (array,), _ = running.take()
        (whole if number % 2 else parts).append(array if number % 2 else array[1:3, 0])
        del array
    assert [list(range(1, 30, 2))] == [[int(kept[0, 0]) for kept in whole]]
    assert list(range(0, 30, 2)) == [int(kept[0]) for kept in parts]
    assert all((kept == kept.flat[0]).all() for kept in whole + parts)
    running.close()


def test_buffers_are_used_again():
    """Who drops batches needs no more buffers than are in flight."""
    made = []
    job = Numbers(200)
    running = Pipeline(job, Ring(lambda: made.append(1) or (np.zeros((4, 3)),), 4), 2, 2)
    for _ in range(200):
        running.take()
    running.close()

    assert len(made) <= 5


def test_ring_forgets_buffers_that_are_kept():
    """A ring does not hold what its consumer holds."""
    ring = Ring(lambda: (np.zeros(1),), keep=2)
    kept = []
    for _ in range(10):
        buffers = ring.take()
        kept.append(buffers[0][...])
        ring.give(buffers)
    ring.take()

    assert len(ring._given) <= 2


def test_a_batch_is_safe_before_anybody_has_it():
    """Between leaving the pipeline and reaching the consumer a thread may begin another batch."""
    given = []

    class Watched(Ring):
        def give(self, buffers):
            super().give(buffers)
            given.append(self.take()[0] is buffers[0])

    running = Pipeline(Numbers(3), Watched(lambda: (np.zeros((4, 3)),), 4), 2, 1)
    for _ in range(3):
        running.take()
    running.close()

    assert given == [False] * 3


def test_errors_reach_the_consumer_in_their_turn():
    """Batches before the broken one come; then its error, once, within a second."""
    job = Numbers(10, fails_at=3)
    running = pipeline(job)
    assert [int(running.take()[0][0][0, 0]) for _ in range(3)] == [0, 1, 2]
    start = time.perf_counter()
    with pytest.raises(ValueError, match="batch 3 is broken"):
        running.take()
    running.close()

    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_any_exception_reaches_the_consumer(error):
    """Also those that are no Exception, and would end a thread silently."""
    running = pipeline(Numbers(10, fails_at=0, error=error))
    with pytest.raises(type(error)):
        running.take()
    running.close()


def test_a_pipeline_that_is_closed_tells_who_waits():
    """A consumer in another thread is not left waiting for ever."""
    running = pipeline(Numbers(10, seconds=0.2), threads=1)
    seen = []

    def consume():
        try:
            running.take()
        except RuntimeError as error:
            seen.append(str(error))

    waiting = threading.Thread(target=consume)
    waiting.start()
    time.sleep(0.05)
    running.close()
    waiting.join(5)

    assert seen
    assert "closed" in seen[0]


def test_dropped_pipelines_end_their_threads():
    """Hundreds that are abandoned in the middle leave no thread."""
    for taken in range(300):
        running = pipeline(Numbers(5))
        for _ in range(taken % 4):
            running.take()
        del running
    assert not loader_threads()


def test_pipelines_in_cycles_are_collected():
    """The garbage collector ends the threads, even when it runs in one of them."""
    for _ in range(50):
        cycle = {"pipeline": pipeline(Numbers(5))}
        cycle["self"] = cycle
        cycle["pipeline"].take()
        del cycle
    give_up = time.monotonic() + 3
    while loader_threads() and time.monotonic() < give_up:
        gc.collect()  # returns at once while another thread collects
        time.sleep(0.01)

    assert not loader_threads()


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(0)", "os.kill(os.getpid(), 2)"])
def test_interpreter_ends_while_threads_work(ending, tmp_path):
    """No hang and no noise at exit, also after Ctrl-C."""
    program = f"""
import os, sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_loader_pipeline import Numbers, pipeline
running = pipeline(Numbers(1000, seconds=0.001))
running.take()
try:
    {ending}
    time.sleep(0.05)
except KeyboardInterrupt:
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forks_end_while_threads_work():
    """A child of a fork, whose copy of the lock may be held for ever, drops its copy and ends."""
    running = pipeline(Numbers(2000, seconds=0.0005))
    for _ in range(30):
        running.take()
        pid = os.fork()
        if pid == 0:
            running.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    running.close()
