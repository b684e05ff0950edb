"""The driver of a run: order, bounds, damaged results, and tasks that are taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from parallel_dicomseg.blame import is_whole, joined, rejected
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import encode_chunk, run, warm_up
from parallel_dicomseg.errors import ConversionError, ResumableError
from parallel_dicomseg.plan import Plan, make_plan, single_slice, tasks
from parallel_dicomseg.records import ChunkTask, ConvertOptions, EncodedChunk, Measured, Reason
from parallel_dicomseg.running import Bounds, most_bytes, run_tasks
from parallel_dicomseg.schedulers import Attempt, Failure, Job
from parallel_dicomseg.schedulers.crew import Outcome, already
from parallel_dicomseg.schedulers.local import NowCrew
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

FAR = 10**12


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """14 slices in tasks of 4, of which one has an outline that cannot be read."""
    warm_up(codec="lz4")
    root = tmp_path_factory.mktemp("running") / "cohort"
    make_sunnybrook_cohort(root, patients=2, slices=7, rows=32, columns=32)
    cohort = scan_cohort(root)
    (root / cohort.annotations.path[-1].decode()).write_text("1 1\nnot a number\n")
    return make_plan(cohort, ConvertOptions(codec="lz4", slices_per_task=4), 1)


def job_of(function: object = encode_chunk, window: int = 3) -> Job:
    """A job with this function in place of `encode_chunk`."""
    warm = partial(warm_up, codec="lz4")
    return Job(function=function, window=window, root="", warm_up=warm)  # type: ignore[arg-type]


class Telephone(NowCrew):
    """A crew of another process, as far as the driver knows, which may damage what it sends."""

    is_apart = True

    def __init__(self, job: Job, damaged: int = 0) -> None:
        super().__init__(job, 1)
        self.window = job.window
        self.damaged = damaged
        self.given: list[int] = []

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:
        """Do the task, then damage the outcome."""
        self.given.append(task.first)
        super().start(number, task, beside)
        if len(self.given) <= self.damaged:
            number, answer = self.answers.get()
            self.answers.put((number, already(damage(answer()))))


def damage(outcome: Outcome | None) -> EncodedChunk:
    """The chunk with one bit turned over."""
    assert isinstance(outcome, EncodedChunk)
    flipped = outcome.image_bytes.copy()
    flipped[len(flipped) // 2] ^= 4
    return replace(outcome, image_bytes=flipped)


def assert_same(one: EncodedChunk, other: EncodedChunk) -> None:
    """Every array and every problem of two chunks is the same."""
    assert (one.first, one.problems) == (other.first, other.problems)
    for f in fields(EncodedChunk):
        if f.name not in ("first", "problems", "measured"):
            np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name))
    for f in fields(Measured):
        mine, theirs = getattr(one.measured, f.name), getattr(other.measured, f.name)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


# --- order and bounds


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("first", [0, 4, 5, 13, 14])
def test_run_starts_at_any_slice(plan: Plan, scheduler: str, first: int) -> None:
    """From any slice on, chunks come in order and together are those of a run from the start."""
    options = ConvertOptions(scheduler=scheduler)
    whole = joined([encode_chunk(task) for task in tasks(plan)])

    chunks = list(run(plan, options, 2, [(first, plan.layout.slices)]))

    assert [chunk.first for chunk in chunks] == list(range(first, 14, 4))
    if chunks:
        rest = joined(chunks)
        np.testing.assert_array_equal(rest.image_crc32c, whole.image_crc32c[first:])
        np.testing.assert_array_equal(rest.measured.area, whole.measured.area[first:])
        assert rest.problems == whole.problems


@pytest.mark.parametrize(("allowed", "expected"), [(0, 1), (1, 1), (2, 2), (9, 4)])
def test_window_is_bounded_in_bytes(plan: Plan, allowed: int, expected: int) -> None:
    """No more is under way or waiting than fits, but always one."""
    crew = Telephone(job_of(window=100))
    limits = Bounds(allowed * most_bytes(next(tasks(plan))), 0)

    chunks = run_tasks(tasks(plan), crew._job, crew, limits)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]

    assert len(crew.given) == expected


def test_results_count_with_the_bytes_that_they_have(plan: Plan) -> None:
    """A result that waits takes its own size; before it comes, the most that it can become."""
    largest = most_bytes(next(tasks(plan)))
    sizes = [len(c.image_bytes) + len(c.mask_bytes) for c in map(encode_chunk, tasks(plan))]

    assert max(sizes) <= largest
    # three results and one to come fit where four to come would not
    crew = Telephone(job_of(window=100))
    limits = Bounds(sum(sizes[:3]) + largest, 0)
    assert limits.window_bytes < 4 * largest
    assert len(list(run_tasks(tasks(plan), crew._job, crew, limits))) == 4


def test_window_is_bounded_in_tasks(plan: Plan) -> None:
    """No more tasks are under way than the crew asks for: one follows when one is answered."""
    crew = Telephone(job_of(window=2))

    chunks = run_tasks(tasks(plan), crew._job, crew, Bounds(FAR, 0))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]

    assert len(crew.given) == 2 + 1


class LateFirst(Telephone):
    """A crew that answers the first task when all others are answered."""

    def start(self, number: int, task: ChunkTask, beside: int | None = None) -> None:
        """Do the task, and keep the first answer back."""
        super().start(number, task, beside)
        if len(self.given) == 1:
            self.kept = self.answers.get()
        elif len(self.given) == 4:
            self.answers.put(self.kept)


def test_late_task_does_not_keep_the_others_waiting(plan: Plan) -> None:
    """While the first of four is not there, the others are done, two at a time, and wait."""
    crew = LateFirst(job_of(window=2))

    chunks = list(run_tasks(tasks(plan), crew._job, crew, Bounds(FAR, 0)))

    assert [chunk.first for chunk in chunks] == [0, 4, 8, 12]


# --- damage


def test_damaged_result_is_made_again(plan: Plan) -> None:
    """A result whose bytes are not those that were encoded is not used; its task is done again."""
    crew = Telephone(job_of(window=1), damaged=2)

    chunks = list(run_tasks(tasks(plan), crew._job, crew, Bounds(FAR, 0)))

    assert crew.given == [0, 0, 0, 4, 8, 12]
    for chunk, task in zip(chunks, tasks(plan), strict=True):
        assert_same(chunk, encode_chunk(task))


def test_damage_without_end_ends_the_run(plan: Plan) -> None:
    """Where every result is damaged the machines are to blame, and the run can be resumed."""
    crew = Telephone(job_of(window=1), damaged=100)

    with pytest.raises(ResumableError, match="slices from 0 on are lost: a result was damaged"):
        list(run_tasks(tasks(plan), crew._job, crew, Bounds(FAR, 0)))


def _changed(chunk: EncodedChunk) -> Iterator[EncodedChunk]:
    yield replace(chunk, first=chunk.first + 1)
    yield replace(chunk, image_bytes=chunk.image_bytes[:-1])
    yield replace(chunk, mask_bytes=np.append(chunk.mask_bytes, np.uint8(0)))
    yield replace(chunk, mask_sizes=chunk.mask_sizes[:-1])
    yield replace(chunk, image_sizes=-chunk.image_sizes)
    yield replace(chunk, image_crc32c=chunk.image_crc32c + np.uint32(1))
    yield replace(chunk, measured=replace(chunk.measured, area=chunk.measured.area[1:]))
    yield damage(chunk)


def test_what_is_wrong_with_a_result_is_seen(plan: Plan) -> None:
    """Another place, length, size, checksum, table or bit is seen; the chunk itself is whole."""
    task = next(tasks(plan))
    chunk = encode_chunk(task)

    assert is_whole(chunk, task)
    assert [is_whole(changed, task) for changed in _changed(chunk)] == [False] * 8


# --- failures


def test_attempt_never_raises_and_never_tells(plan: Plan) -> None:
    """Whatever a task raises becomes a value whose text says nothing of it, nor does its own."""
    task = next(tasks(plan))

    def fail(error: type[BaseException], _: ChunkTask) -> EncodedChunk:
        raise error(task.slices.path[0])

    for error, text in ((ValueError, "ValueError"), (BaseException, "BaseException")):
        outcome = Attempt(partial(fail, error), task)()
        assert outcome == Failure(text, to_blame=True)
    memory = Attempt(partial(fail, MemoryError), task)()
    assert memory == Failure("memory ran out", to_blame=True, out_of_memory=True)
    assert repr(Attempt(encode_chunk, task)) == "<slices from 0 on>"
    with pytest.raises(KeyboardInterrupt, match="dcm"):
        Attempt(partial(fail, KeyboardInterrupt), task)()


def test_attempt_says_where_in_this_package(plan: Plan) -> None:
    """A mistake of our own can be found: file and line, no text."""
    task = replace(next(tasks(plan)), layout=None)  # type: ignore[arg-type]

    outcome = Attempt(encode_chunk, task)()

    assert isinstance(outcome, Failure)
    assert outcome.detail.startswith("AttributeError in convert.py, line ")


def test_slices_one_by_one_are_the_task(plan: Plan) -> None:
    """Slices done alone and joined give what the task gives, array by array."""
    for task in tasks(plan):
        singles = [single_slice(task, place) for place in range(len(task.slices))]

        assert_same(joined([encode_chunk(single) for single in singles]), encode_chunk(task))


def test_rejected_chunk_has_the_form_of_any_other(plan: Plan) -> None:
    """A chunk without slices has the types and widths of one with, so that they can be joined."""
    task = next(tasks(plan))
    nothing, chunk = rejected(task, "why"), encode_chunk(task)

    assert is_whole(nothing, task)
    assert not nothing.image_sizes.any()
    for f in fields(Measured):
        mine, other = getattr(nothing.measured, f.name), getattr(chunk.measured, f.name)
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
    assert {problem.reason for problem in nothing.problems} == {Reason.UNDECODABLE_PIXELS}
    assert [problem.path for problem in nothing.problems] == list(task.slices.path)


def fail_on_the_second(task: ChunkTask) -> EncodedChunk:
    """`encode_chunk`, but slice 1 of the plan is beyond it."""
    if task.first <= 1 < task.first + len(task.slices):
        raise ArithmeticError
    return encode_chunk(task)


def test_only_the_slice_that_fails_is_rejected(plan: Plan) -> None:
    """A task that raises is taken apart; its other slices are those of a run without trouble."""
    crew = Telephone(job_of(fail_on_the_second))

    chunk, *others = run_tasks(tasks(plan), crew._job, crew, Bounds(FAR, 0))

    good = encode_chunk(next(tasks(plan)))
    keep = [0, 2, 3]
    assert len(others) == 3
    assert chunk.image_sizes[1] == 0
    np.testing.assert_array_equal(chunk.image_crc32c[keep], good.image_crc32c[keep])
    np.testing.assert_array_equal(chunk.measured.area[keep], good.measured.area[keep])
    (problem,) = chunk.problems
    assert problem.reason == Reason.UNDECODABLE_PIXELS
    assert problem.detail == "decoding it failed (ArithmeticError)"


def fail_always(_: ChunkTask) -> EncodedChunk:
    """A program that cannot work."""
    raise ArithmeticError


def test_program_that_never_works_is_not_blamed_on_the_input(plan: Plan) -> None:
    """Where nothing at all can be converted the run ends instead of rejecting everything."""
    crew = Telephone(job_of(fail_always))

    with pytest.raises(ConversionError, match=r"no slice of the first 3 tasks .*ArithmeticError"):
        list(run_tasks(tasks(plan), crew._job, crew, Bounds(FAR, 0)))


def test_worker_processes_that_cannot_start_end_the_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where no process can be started, that is said, and no task is blamed."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python here"))

    with pytest.raises(ResumableError, match="no worker process can be started: No such file"):
        list(run(plan, ConvertOptions(scheduler="processes"), 2, [(0, 14)]))
