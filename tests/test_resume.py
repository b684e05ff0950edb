"""Going on after an interruption, and updating what is finished."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import written
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import ConvertOptions, convert, convert_cohort, scan_cohort
from parallel_dicomseg.cli import main
from parallel_dicomseg.errors import ConfigurationError, ResumableError, VerificationError
from parallel_dicomseg.records import Problem, Reason
from parallel_dicomseg.store import Hdf5Writer, find_leftover, unfinished, verify_file
from parallel_dicomseg.store import journal as journals
from parallel_dicomseg.store.metadata_file import MetadataFile
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

OPTIONS = ConvertOptions(workers=1, slices_per_task=3, codec="lz4")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small cohort and the output of an undisturbed conversion."""
    folder = tmp_path_factory.mktemp("original")
    make_sunnybrook_cohort(folder / "cohort", patients=3, slices=6, rows=48, columns=64)
    convert_cohort(scan_cohort(folder / "cohort"), folder / "x.h5", options=OPTIONS)
    return folder / "cohort", (folder / "x.h5").read_bytes()


class StopError(Exception):
    """What a test stops a conversion with."""


def stop_after(slices):
    """A progress function that ends a conversion."""

    def watch(event):
        if event.stage == "convert" and event.done >= slices:
            raise StopError

    return watch


def interrupted(cohort, output, slices, options=OPTIONS):
    """Convert until so many slices are written."""
    with pytest.raises(StopError) as caught:
        convert_cohort(cohort, output, options=options, progress=stop_after(slices))
    return caught.value


def resumed(cohort, output, **options):
    """Go on."""
    return convert_cohort(cohort, output, options=replace(OPTIONS, resume=True, **options))


def test_a_resumed_run_decodes_only_what_is_left(original, tmp_path, monkeypatch):
    """Finished tasks are not encoded again, and the bytes are those of a run in one go."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    error = interrupted(cohort, output, 9)
    encoded = []
    encode = convert.encode_chunk
    monkeypatch.setattr(
        convert, "encode_chunk", lambda task: (encoded.append(task.first), encode(task))[1]
    )

    summary = resumed(cohort, output, slices_per_task=4)

    assert error.__notes__ == [
        f"9 of 18 slices are kept in {output}.partial; --resume goes on with them"
    ]
    assert sorted(encoded) == [9, 13, 17]
    assert summary.resumed == 9
    assert output.read_bytes() == original[1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_a_plain_run_says_what_is_left_and_how_to_go_on(original, tmp_path):
    """Nothing is thrown away without --overwrite, and nothing is taken over by it."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    interrupted(cohort, output, 6)

    with pytest.raises(
        ConfigurationError,
        match=r"x\.h5\.partial holds 6 of 18 slices of an unfinished run; --resume goes on with "
        r"it, --overwrite starts anew",
    ):
        convert_cohort(cohort, output, options=OPTIONS)

    summary = convert_cohort(cohort, output, options=replace(OPTIONS, overwrite=True))
    assert summary.resumed == 0
    assert output.read_bytes() == original[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"codec": "none"}, 'layout.codec: "lz4" then, "none" now'),
        ({"rule": "pil-outline0"}, 'layout.rule: "center" then, "pil-outline0" now'),
        ({"size": (32, 32)}, "layout.columns: 64 then, 32 now"),
    ],
)
def test_other_options_are_refused_by_name(original, tmp_path, changes, named):
    """A run that was begun with other options is not gone on with, and not harmed."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    interrupted(cohort, output, 6)

    with pytest.raises(ConfigurationError, match="was begun with something else") as caught:
        resumed(cohort, output, **changes)

    assert named in str(caught.value)
    assert find_leftover(output).slices_done == 6
    resumed(cohort, output)
    assert output.read_bytes() == original[1]


def test_another_cohort_or_release_is_refused_by_name(original, tmp_path, monkeypatch):
    """A patient less, or encoders of another version, are told."""
    output = tmp_path / "x.h5"
    interrupted(scan_cohort(original[0]), output, 6)
    other = shutil.copytree(original[0], tmp_path / "cohort")
    shutil.rmtree(next((other / "dicoms").iterdir()))

    with pytest.raises(ConfigurationError, match="slices: 18 then, 12 now"):
        resumed(scan_cohort(other), output)
    monkeypatch.setattr("parallel_dicomseg.fingerprint.version", lambda name: f"0 of {name}")
    with pytest.raises(ConfigurationError, match=r'versions\.isal: "[\d.]+" then, "0 of isal" now'):
        resumed(scan_cohort(original[0]), output)


def test_options_that_only_concern_tables_may_change(original, tmp_path):
    """What the file says of patients is decided at the end, by the run that finishes it."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    interrupted(cohort, output, 6)

    resumed(cohort, output, keep_identity=True)

    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    whole = tmp_path / "whole.h5"
    convert_cohort(cohort, whole, options=replace(OPTIONS, keep_identity=True))
    assert output.read_bytes() == whole.read_bytes()


def with_another_hdf5(monkeypatch):
    """Let HDF5 put chunks elsewhere, as another version of it does."""
    create = unfinished.create

    def shifted(content, layout):
        file, *datasets = create(content, layout)
        file.attrs["padding"] = np.zeros(6000, np.uint8)
        return file, *datasets

    monkeypatch.setattr(unfinished, "create", shifted)


def test_chunks_of_another_hdf5_are_copied(original, tmp_path, monkeypatch):
    """Where HDF5 would not have put them there, they are taken into a file of their own."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    with monkeypatch.context() as patch:
        with_another_hdf5(patch)
        interrupted(cohort, output, 9)
    left = find_leftover(output).data.read_bytes()

    # the copy is interrupted, too: until it is whole the old files count
    with monkeypatch.context() as patch:
        patch.setattr(
            unfinished.Unfinished, "become", lambda *_: (_ for _ in ()).throw(StopError())
        )
        with pytest.raises(StopError):
            resumed(cohort, output)
    assert find_leftover(output).data.read_bytes() == left

    with pytest.raises(StopError):
        convert_cohort(
            cohort, output, options=replace(OPTIONS, resume=True), progress=stop_after(12)
        )
    assert find_leftover(output).data.name == "x.h5.partial-2"
    summary = resumed(cohort, output)

    assert summary.resumed == 12
    assert output.read_bytes() == original[1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_damaged_chunks_are_made_again(original, tmp_path):
    """A finished chunk whose bytes have changed is found by its checksum, and nothing after it
    counts.
    """
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    interrupted(cohort, output, 12)
    journal = journals.read_journal(tmp_path / "x.h5.journal")
    offset = int(journal.tasks[2].records["offset"][1, 0])
    with journal.data.open("r+b") as stream:
        stream.seek(offset + 5)
        (byte,) = stream.read(1)
        stream.seek(offset + 5)
        stream.write(bytes([byte ^ 4]))

    summary = resumed(cohort, output)

    assert summary.resumed == 6
    assert output.read_bytes() == original[1]


def test_a_journal_cut_anywhere_is_a_prefix(original, tmp_path):
    """Whole frames count, a torn one does not; the end is the same."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    interrupted(cohort, output, 9)
    content = (tmp_path / "x.h5.journal").read_bytes()
    data = (tmp_path / "x.h5.partial").read_bytes()
    ends = [task.end for task in journals.read_journal(tmp_path / "x.h5.journal").tasks]
    for size in (0, 11, ends[0] - 1, ends[0], ends[1] + 30, len(content)):
        output.unlink(missing_ok=True)
        (tmp_path / "x.h5.journal").write_bytes(content[:size])
        (tmp_path / "x.h5.partial").write_bytes(data)

        summary = resumed(cohort, output)

        assert summary.resumed == 3 * sum(end <= size for end in ends)
        assert output.read_bytes() == original[1]


@given(st.data())
def test_no_bytes_in_a_journal_are_believed(tmp_path_factory, data):
    """Any damage gives fewer tasks, or none, and those that are left are as they were written."""
    path = tmp_path_factory.mktemp("journal") / "j"
    plan = written.layout(8)
    images, masks = written.pictures(8)
    frames = [
        journals.plan_frame({"version": 1, "plan": {}, "structures": 2, "pairs": 1, "data": "x"})
    ]
    for first in range(0, 8, 2):
        chunk = written.chunk(images[first : first + 2], masks[first : first + 2], plan, first)
        records = journals.records_of(chunk, journals.layout_type(plan))
        frames.append(journals.task_frame(first, records, [{"detail": "x"}] * (first == 2)))
    whole = bytearray(b"".join(frames))
    path.write_bytes(whole)
    expected = journals.read_journal(path).tasks
    assert [task.first for task in expected] == [0, 2, 4, 6]
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(0, len(whole))) :]
    path.write_bytes(whole)

    found = journals.read_journal(path)

    for task, known in zip(found.tasks if found else (), expected, strict=False):
        assert task.first == known.first
        assert task.records.tobytes() == known.records.tobytes()
        assert task.problems == known.problems


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 200_000), st.integers(0, 70_000)), max_size=12
    ),
    st.integers(0, 2**32),
)
def test_the_file_in_memory_is_a_file(calls, seed):
    """Writes and reads at any place equal those of a plain array of bytes."""
    random, file = np.random.default_rng(seed), MetadataFile()
    plain, is_written = np.zeros(300_000, np.uint8), np.zeros(300_000, bool)
    for is_write, at, size in calls:
        file.seek(at)
        if is_write:
            content = random.integers(1, 256, size, dtype=np.uint8)
            assert file.write(memoryview(content)) == size
            plain[at : at + size], is_written[at : at + size] = content, True
        else:
            room = bytearray(size)
            file.readinto(memoryview(room))
            assert bytes(room) == plain[at : at + size].tobytes()
        assert file.tell() == at + size

    gathered, seen = np.zeros_like(plain), np.zeros_like(is_written)
    for at, piece in file.pieces():
        assert not seen[at : at + len(piece)].any()
        gathered[at : at + len(piece)], seen[at : at + len(piece)] = piece, True
    assert (gathered == plain).all()
    assert (seen == is_written).all()


def test_ctrl_c_inside_hdf5_reaches_the_caller():
    """HDF5 goes on as if nothing had happened, the writer is told."""
    file = MetadataFile()
    file._keep = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)

    assert file.write(memoryview(b"abc")) == 3

    with pytest.raises(KeyboardInterrupt), file.check():
        pass


def test_problems_are_found_again_without_a_name_in_the_journal(tmp_path):
    """Problems of finished slices are told by the run that finishes; the journal has no path."""
    table, plan = written.slices(8), written.layout(8)
    images, masks = written.pictures(8)
    words = "3 of 9 bytes, DOE_folder/2.dcm has them; DOE_folder/1.dcm"
    bad = Problem("DOE_folder/1.dcm", Reason.PIXEL_DATA_SHORT, words)
    good = np.arange(8) != 1
    chunks = [
        written.chunk(
            images[k : k + 4], masks[k : k + 4], plan, k, good[k : k + 4], [bad] * (not k)
        )
        for k in (0, 4)
    ]
    writer = Hdf5Writer(tmp_path / "x.h5", plan, table).__enter__()
    writer.put(chunks[0])
    writer.__exit__(StopError, StopError(), None)
    for suffix in (".journal", ".partial"):
        path = tmp_path / f"x.h5{suffix}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not any(name.encode() in path.read_bytes() for name in written.IDENTITIES)

    with Hdf5Writer(tmp_path / "x.h5", plan, table, resume=True) as writer:
        writer.put(chunks[1])
        summary = writer.publish(())

    assert summary.problems == (bad,)
    assert summary.slices == 7
    assert verify_file(tmp_path / "x.h5").is_sound


def test_a_disk_that_is_too_small_is_told_before_the_work(original, tmp_path, monkeypatch):
    """With both numbers, and a way to begin all the same."""
    cohort = scan_cohort(original[0])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))

    with pytest.raises(
        ConfigurationError, match=r"has 5,000 bytes free, the output will need about [\d,]+; --ign"
    ):
        convert_cohort(cohort, tmp_path / "x.h5", options=OPTIONS)
    assert not list(tmp_path.iterdir())
    convert_cohort(cohort, tmp_path / "x.h5", options=replace(OPTIONS, ignore_space=True))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_signals_leave_what_is_finished(tmp_path, number, status, word):
    """The command says how much is kept and how to go on, and does go on."""
    make_sunnybrook_cohort(tmp_path / "cohort", patients=8, slices=60, rows=128, columns=128)
    command = [
        sys.executable, "-c", "from parallel_dicomseg.cli import main; main()",
        "convert", str(tmp_path / "cohort"), "-o", str(tmp_path / "x.h5"),
        "--slices-per-task", "1", "--scheduler", "synchronous",
    ]  # fmt: skip
    partial = tmp_path / "x.h5.partial"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        give_up = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size > 300_000):
            assert time.monotonic() < give_up
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)

    assert process.returncode == status
    last = told.strip().splitlines()[-1]
    assert last.startswith(f"{word}; ")
    assert last.endswith(f"slices are kept in {partial}; --resume goes on with them")
    done = subprocess.run([*command, "--resume"], check=True, capture_output=True, text=True)
    assert "resumed " in done.stdout
    assert verify_file(tmp_path / "x.h5").is_sound


def test_resuming_what_is_whole_is_no_error(original, tmp_path, capsys):
    """So that a batch job may be run again; what a late end has left is put away."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    interrupted(cohort, output, 3)
    journal = (tmp_path / "x.h5.journal").read_bytes()
    resumed(cohort, output)
    (tmp_path / "x.h5.journal").write_bytes(journal)

    main(["convert", str(original[0]), "-o", str(output), "--resume"], standalone_mode=False)

    assert f"{output} is whole, there is nothing to resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_an_overwriting_run_is_resumed_without_saying_so_again(original, tmp_path):
    """The old output stays until the new one is whole."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    output.write_text("old")
    interrupted(cohort, output, 6, replace(OPTIONS, overwrite=True))
    assert output.read_text() == "old"

    resumed(cohort, output)

    assert output.read_bytes() == original[1]


# --- updates -------------------------------------------------------------------------------------

UPDATE = replace(OPTIONS, update=True)


@pytest.fixture
def growing(original, tmp_path):
    """A cohort that may be changed, and an output that was made with --update."""
    cohort = shutil.copytree(original[0], tmp_path / "cohort")
    (tmp_path / "out").mkdir()
    convert_cohort(scan_cohort(cohort), tmp_path / "out" / "x.h5", options=UPDATE)
    return cohort, tmp_path / "out" / "x.h5"


def fresh(cohort, folder, **options):
    """The bytes that a conversion from nothing makes."""
    convert_cohort(
        scan_cohort(cohort),
        folder / "fresh.h5",
        options=replace(OPTIONS, overwrite=True, **options),
    )
    return (folder / "fresh.h5").read_bytes()


def updated(cohort, output, **options):
    """Update an output; the summary's part about it, and the first slices of encoded tasks."""
    encoded = []
    encode = convert.encode_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            convert,
            "encode_chunk",
            lambda task: (encoded.extend(task.slices.path), encode(task))[1],
        )
        options = replace(UPDATE, **options)
        return convert_cohort(scan_cohort(cohort), output, options=options).update, encoded


def test_an_update_of_nothing_decodes_nothing(growing, original):
    """All chunks are copied as bytes."""
    found, encoded = updated(*growing)

    assert (found.unchanged, found.added, found.changed, found.vanished) == (18, 0, (), {})
    assert encoded == []
    assert growing[1].read_bytes() == original[1]
    assert sorted(path.name for path in growing[1].parent.iterdir()) == ["x.h5", "x.h5.sources"]


def test_an_update_converts_what_is_new_or_changed(tmp_path):
    """Two patients come, one goes, an outline and an image change: the rest is taken over."""
    cohort, output, aside = tmp_path / "cohort", tmp_path / "x.h5", tmp_path / "aside"
    truth = make_sunnybrook_cohort(cohort, patients=5, slices=6, rows=48, columns=64)
    folders = [cohort / patient.image_folder for patient in truth.patients]
    aside.mkdir()
    for folder in folders[3:]:
        shutil.move(folder, aside)
    first, _ = updated(cohort, output)
    assert (first.added, first.unchanged) == (18, 0)
    for folder in folders[3:]:
        shutil.move(aside / folder.name, folder)
    shutil.rmtree(folders[0])
    image = sorted(folders[1].iterdir())[2]
    image.write_bytes(image.read_bytes()[:-100] + bytes(100))
    outline = next(o for o in truth.outlines if o.image_path.startswith(
        truth.patients[2].image_folder))  # fmt: skip
    text = (cohort / outline.path).read_text().splitlines()
    (cohort / outline.path).write_text("\n".join(text[:-1]))

    found, encoded = updated(cohort, output)

    assert (found.unchanged, found.added, found.vanished) == (12 - 2, 12, {"patient-1": 6})
    assert found.changed == (image.relative_to(cohort).as_posix(), outline.image_path)
    assert len(encoded) == 12 + 2
    assert output.read_bytes() == fresh(cohort, tmp_path)


def test_time_or_content_tells_what_is_unchanged(growing):
    """A file that was only touched is the same by its content, not by its time."""
    cohort, output = growing
    updated(cohort, output, compare="content")
    image = next(iter(sorted((cohort / "dicoms").glob("*/*"))))
    os.utime(image, (1, 1))

    by_content, encoded = updated(cohort, output, compare="content")
    assert (by_content.unchanged, encoded) == (18, [])
    other_way, _ = updated(cohort, output)
    assert other_way.reason == 'compare: "content" then, "time" now'
    os.utime(image, (2, 2))
    by_time, encoded = updated(cohort, output)
    assert by_time.changed == (image.relative_to(cohort).as_posix(),)
    assert encoded == [image.relative_to(cohort).as_posix()]


def test_an_update_with_other_options_converts_everything(growing, tmp_path):
    """And says which."""
    cohort, output = growing

    found, encoded = updated(cohort, output, codec="none")

    assert found.unchanged == 0
    assert found.reason == 'layout.codec: "lz4" then, "none" now'
    assert len(encoded) == 18
    assert output.read_bytes() == fresh(cohort, tmp_path, codec="none")


def test_an_output_without_sources_is_converted_anew(original, tmp_path):
    """What was made without --update says nothing of its sources."""
    output = tmp_path / "x.h5"
    convert_cohort(scan_cohort(original[0]), output, options=OPTIONS)

    found, encoded = updated(original[0], output)

    assert found.reason == "it was made without --update"
    assert len(encoded) == 18
    assert updated(original[0], output)[1] == []


def test_a_damaged_output_is_not_taken_over(growing):
    """Chunks are compared with their checksums before they are copied."""
    cohort, output = growing
    records = journals.read_journal(Path(f"{output}.sources")).tasks[0].records
    with output.open("r+b") as stream:
        stream.seek(int(records["offset"][0, 0]) + 3)
        stream.write(b"\xff\xff\xff")
    before = output.read_bytes()

    with pytest.raises(VerificationError, match=r"x\.h5 is damaged, or is not what .*sources was"):
        updated(cohort, output)
    assert output.read_bytes() == before


def test_slices_with_problems_are_done_again(growing):
    """So that their problems are told again."""
    cohort, output = growing
    outline = sorted(cohort.glob("contourfiles/*/o-contours/*"))[1]
    outline.write_text("not a number\n")
    options = replace(UPDATE, max_rejected=9)
    told = [convert_cohort(scan_cohort(cohort), output, options=options).problems for _ in range(2)]

    assert told[0] == told[1]
    assert [problem.path for problem in told[0] if problem.is_rejection] == [
        outline.relative_to(cohort).as_posix()
    ]
    again, encoded = updated(cohort, output)
    assert (again.unchanged, again.changed, len(encoded)) == (17, (), 1)


def test_an_interrupted_update_leaves_the_old_output_and_is_resumed(growing, tmp_path):
    """The old file is valid until the new one is whole."""
    cohort, output = growing
    before = output.read_bytes()
    image = sorted((cohort / "dicoms").glob("*/*"))[3]
    os.utime(image, (1, 1))
    interrupted(scan_cohort(cohort), output, 9, UPDATE)
    assert output.read_bytes() == before

    with pytest.raises(ConfigurationError, match=r"holds \d+ of 18 slices"):
        updated(cohort, output)
    found, encoded = updated(cohort, output, resume=True)

    assert found.unchanged == 17
    assert encoded == []
    assert updated(cohort, output)[0].unchanged == 18


def test_what_is_kept_for_updates_names_nobody(original, tmp_path):
    """Digests with a key, readable by the owner alone."""
    cohort = shutil.copytree(original[0], tmp_path / "cohort")
    convert_cohort(scan_cohort(cohort), tmp_path / "x.h5", options=UPDATE)
    sources = tmp_path / "x.h5.sources"

    assert stat.S_IMODE(sources.stat().st_mode) == 0o600
    content = sources.read_bytes()
    for name in {part for path in cohort.rglob("*") for part in path.relative_to(cohort).parts}:
        assert name.isalpha() or len(name) < 5 or name.encode() not in content


def test_errors_of_the_system_are_resumable(original, tmp_path, monkeypatch):
    """A full disk in the middle: a clear error, what is finished stays."""
    cohort, output = scan_cohort(original[0]), tmp_path / "x.h5"
    calls = []
    write = unfinished.write_fully

    def full(*args):
        calls.append(args)
        if len(calls) > 6:
            raise OSError(28, os.strerror(28))
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "write_fully", full)
        with pytest.raises(ResumableError, match=r"x\.h5\.partial cannot be written: No space"):
            convert_cohort(cohort, output, options=OPTIONS)
    assert find_leftover(output).slices_done > 0
    resumed(cohort, output)
    assert output.read_bytes() == original[1]
