"""The command line from outside: words, results, exit statuses, progress and the demo."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import assume, given
from hypothesis import strategies as st

from parallel_dicomseg.cli import Command, main, only_slice, process_dicom_to_hdf5
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.demo import (
    off_truth,
    render_demo,
    run_demo,
    shape_of_mask,
    shape_of_polygon,
)
from parallel_dicomseg.errors import (
    ConfigurationError,
    ConversionError,
    LayoutError,
    ParallelDicomSegError,
    VerificationError,
)
from parallel_dicomseg.records import Problem, Progress, Reason, Summary
from parallel_dicomseg.store import Hdf5Writer
from parallel_dicomseg.synthetic import make_sunnybrook_cohort
from parallel_dicomseg.terminal import (
    PlainLines,
    columns_of_text,
    print_json,
    progress_line,
    render_summary,
    size_text,
)

COMMANDS = ("demo", "scan", "convert", "inspect", "verify", "batches", "export")
EXPORTS = ("export nifti", "export nnunet")
SUMMARY = Summary(
    output="out.h5",
    slices=20,
    patients=3,
    rows=64,
    columns=48,
    structures=("i", "o"),
    annotated=(20, 12),
    problems=(),
    flagged={"empty-mask": 2},
    seconds=0.5,
    bytes_written=1_500_000,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cohort: 2 patients with 4 annotated images each."""
    directory = tmp_path_factory.mktemp("cohort") / "final_data"
    make_sunnybrook_cohort(directory, patients=2, slices=4, rows=40, columns=48, seed=3)
    return directory


@pytest.fixture(scope="module")
def converted(cohort: Path) -> Path:
    """The cohort as a file, converted by the command line."""
    output = cohort.parent / "converted.h5"
    done = CliRunner().invoke(main, ["convert", str(cohort), "-o", str(output)])
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that no configuration file lies about."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object, command: click.Command = main) -> Result:
    """Run a command as the shell would; a traceback fails the test."""
    result = CliRunner().invoke(command, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def break_one_image(directory: Path) -> Path:
    """Cut off the end of the first image."""
    image = directory / os.fsdecode(scan_cohort(directory).slices.path[0])
    image.write_bytes(image.read_bytes()[:-100])
    return image


# --- help and settings


@pytest.mark.parametrize("name", [*COMMANDS, *EXPORTS])
def test_every_command_has_help_with_an_example(name: str) -> None:
    """The help of each command ends with an example that calls it."""
    text = run(*name.split(), "--help").stdout

    assert "Example:\n" in text
    assert f"  parallel-dicomseg {name}" in text.partition("Example:\n")[2]
    assert max(map(len, text.splitlines())) <= 80


def test_help_says_what_may_be_left_out_and_what_is_shared() -> None:
    """SOURCE is optional, defaults are spelled like choices, --workers serves both stages."""
    text = " ".join(run("convert", "--help").stdout.split())

    assert "convert [OPTIONS] [SOURCE]" in text
    assert "[0|0.5|1] Contour coordinate of the centre of the first pixel. [default: 0]" in text
    assert "--workers N Workers; on the command line also threads that read headers;" in text


def test_commands_are_listed_in_the_order_of_use() -> None:
    """The group's help shows all commands."""
    listed = re.findall(r"^  (\w+)  ", run("--help").stdout.partition("Commands:")[2], re.MULTILINE)

    assert list(COMMANDS) == listed[: len(COMMANDS)]


def test_version_is_told() -> None:
    """--version prints the version of the installed package."""
    assert re.search(r"version \d+\.\d+\.\d+", run("--version").stdout)


def test_show_config_tells_origins() -> None:
    """--show-config lists each setting with its origin and needs no other argument."""
    Path("parallel_dicomseg.toml").write_text("[convert]\ncodec = 'zstd'\n")
    shown = run("convert", "--show-config", "--workers", "3", "--structures", "i,o")
    lines = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}

    assert lines["convert.codec"] == ['"zstd"', "parallel_dicomseg.toml"]
    assert lines["convert.workers"] == lines["scan.workers"] == ["3", "command", "line"]
    assert lines["scan.structures"] == ['["i",', '"o"]', "command", "line"]
    assert lines["convert.rule"] == ['"center"', "default"]
    assert shown.stderr == "settings from parallel_dicomseg.toml\n"


def test_show_config_as_json_survives_a_round_trip() -> None:
    """The JSON form gives value and origin of each setting."""
    words = ["--memory-limit", "2GiB", "--no-strict", "--contour-origin", "0.5"]
    shown = json.loads(run("convert", "--show-config", "--json", *words).stdout)

    assert shown["convert.memory_limit"] == {"value": 2**31, "origin": "command line"}
    assert shown["convert.strict"] == {"value": False, "origin": "command line"}
    assert shown["convert.contour_origin"] == {"value": 0.5, "origin": "command line"}
    assert shown["convert.zarr"] == {"value": "", "origin": "default"}


def test_structures_may_be_repeated_or_separated_by_commas() -> None:
    """-structures i,o and --structures i --structures o mean the same."""
    forms = (["--structures", "i,o"], ["--structures", "i", "--structures", "o"])
    shown = [run("scan", "--show-config", *form).stdout for form in forms]

    assert shown[0] == shown[1]


# --- exit statuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert"], "Missing argument SOURCE"),
        (["convert", "somewhere"], "Missing argument -o OUT.h5"),
        (["convert", "--rule", "centre"], "'centre' is not one of 'center'"),
        (["scan", "--nonsense"], "No such option"),
        (["scan", "nowhere"], "error: nowhere: there is no such directory"),
        (["scan", "--config", "none.toml"], "error: none.toml: cannot be read"),
        (["convert", "--contour-origin", "0.3"], "contour_origin = 0.3: expected one of 0.0"),
        (["convert", "--max-mask-fraction", "2"], "expected a number from 0 to 1"),
        (["convert", "--memory-limit", "much"], "'much': expected a number of bytes"),
        (["convert", "--scheduler", "thread"], "did you mean threads?"),
        (["convert", "--structures", "i,i"], "one of them stands there twice"),
        (["convert", "--structures", ""], "scan.structures = '': expected a list of different"),
        (["convert", "--spacing", "0", "1"], "'0', '1': expected one or two numbers above 0"),
        (["convert", "--spacing", "wide"], "convert.spacing = 'wide': expected one or two numbers"),
        (["convert", "--size", "1.5"], "convert.size = '1.5': expected one or two whole numbers"),
        (["scan", ".", "--split", "0.5", "0.6"], "split: 0.5 0.6 make 1.1"),
        (["scan", ".", "--aliases", "none.toml"], "none.toml: cannot be read (No such file"),
        (["scan", ".", "--source", "nobody"], "source 'nobody' is unknown; there are: auto"),
        (["scan", "nowhere", "--save", "no/where"], "error: no: there is no such directory"),
        (["convert", __file__, "-o", "x.h5"], "test_cli.py: not a directory"),
        (["export", "nifti", "none.h5", "x"], "error: none.h5: no such file"),
        (["inspect", "none.h5", "--tag", "EchoTime"], "error: none.h5: no such file"),
        (["inspect", "none.h5"], "error: none.h5"),
        (["verify", "none.h5"], "error: none.h5"),
    ],
)
def test_a_wrong_start_is_one_line_and_status_2(words: list[str], message: str) -> None:
    """A mistake of usage, configuration or input ends with 2, a sentence, and no result."""
    result = run(*words)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ParallelDicomSegError("a\n b"), 2, "error: a b"),
        (ConfigurationError("a"), 2, "error: a"),
        (LayoutError("a"), 2, "error: a"),
        (ConversionError("a"), 1, "error: a"),
        (VerificationError("a"), 1, "error: a"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: Permission denied: x"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (OSError("Can't read data"), 2, "error: Can't read data"),
        (LayoutError("caf\udce9\x1b[2J"), 2, r"error: caf\udce9\x1b[2J"),
    ],
)
def test_each_kind_of_error_has_its_status(error: BaseException, status: int, line: str) -> None:
    """Errors that a user can mend end with one line and the documented status."""

    @click.command(cls=Command)
    def failing() -> None:
        raise error

    result = run(command=failing)

    assert (status, f"{line}\n", "") == (result.exit_code, result.stderr, result.stdout)


def test_a_bug_keeps_its_traceback() -> None:
    """An error that is nobody's mistake but ours is not dressed up as a user's."""

    @click.command(cls=Command)
    def failing() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(command=failing)


def test_ctrl_c_ends_with_130() -> None:
    """A real SIGINT ends a command with one line and 130."""

    @click.command(cls=Command)
    def waiting() -> None:
        signal.raise_signal(signal.SIGINT)

    # What a shell starts in the background ignores the signal: put Python's own handler back.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run(command=waiting)
    finally:
        signal.signal(signal.SIGINT, inherited)

    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


# --- scan, convert, inspect, verify


def test_scan_takes_stock(cohort: Path) -> None:
    """The inventory counts what the generator made, in words and as JSON."""
    found = json.loads(run("scan", cohort, "--json").stdout)
    text = run("scan", cohort).stdout

    assert found["patients"] == 2
    assert found["images"] == 8
    assert found["sizes"] == {"40 x 48": 8}
    assert found["structures"]["i"]["images"] == 8
    assert sum(found["pixel_spacings"].values()) == 8
    assert re.search(r"^sizes +40 x 48: 8$", text, re.MULTILINE)
    assert re.search(r"^patients +2$", text, re.MULTILINE)


def test_scan_of_real_data_counts_as_its_description(shared_data: Path) -> None:
    """96 inner and 46 outer outlines of 5 patients, in three pixel spacings."""
    source = shared_data / "sunnybrook_arterys" / "final_data"
    found = json.loads(run("scan", source, "--json").stdout)

    assert (found["patients"], found["images"]) == (5, 96)
    assert {name: of["images"] for name, of in found["structures"].items()} == {"i": 96, "o": 46}
    assert found["sizes"] == {"256 x 256": 96}
    assert found["pixel_spacings"] == {
        "1.3672 x 1.3672 mm": 40,
        "1.367188 x 1.367188 mm": 36,
        "1.2891 x 1.2891 mm": 20,
    }


def test_convert_writes_what_it_says(cohort: Path) -> None:
    """The JSON summary agrees with the file, progress goes to standard error only."""
    done = run("convert", cohort, "-o", "out.h5", "--json")
    summary = json.loads(done.stdout)
    with h5py.File("out.h5") as file:
        shape = file["images"].shape

    assert done.exit_code == summary["exit_status"] == 0
    assert shape == (summary["slices"], summary["rows"], summary["columns"]) == (8, 40, 48)
    assert summary["bytes_written"] == Path("out.h5").stat().st_size
    assert summary["rejected"] == 0
    assert "scan: " in done.stderr
    assert "convert: 8 of 8" in done.stderr


def test_the_summary_names_the_file_and_its_contents(cohort: Path) -> None:
    """The human summary says what is in the file and where it lies."""
    text = run("convert", cohort, "-o", "out.h5").stdout

    assert re.search(r"^output +out\.h5$", text, re.MULTILINE)
    assert re.search(r"^slices +8 of 40 x 48 pixels$", text, re.MULTILINE)
    assert re.search(r"^structures +i: 8", text, re.MULTILINE)
    assert re.search(r"^rejected +nothing$", text, re.MULTILINE)
    assert "exit status" not in text


def test_words_reach_the_conversion(cohort: Path) -> None:
    """Options of the scan and of the conversion shape the file."""
    words = ["--structures", "i", "--rule", "pil-outline0", "--codec", "none", "--zarr", "out.zarr"]
    run("convert", cohort, "-o", "out.h5", "--scheduler", "synchronous", *words)
    with h5py.File("out.h5") as file:
        attributes = dict(file.attrs)
        structures = list(file["masks"].attrs["structures"])

    assert structures == ["i"]
    assert (attributes["rule"], attributes["codec"]) == ("pil-outline0", "none")
    assert Path("out.zarr", "zarr.json").is_file()


def test_an_existing_output_is_kept_unless_overwrite(cohort: Path) -> None:
    """Without --overwrite nothing is replaced; with it the file is."""
    Path("out.h5").write_text("precious")
    refused = run("convert", cohort, "-o", "out.h5")
    kept = Path("out.h5").read_text()
    done = run("convert", cohort, "-o", "out.h5", "--overwrite")

    assert (refused.exit_code, kept) == (2, "precious")
    assert "--overwrite" in refused.stderr
    assert "scan: " not in refused.stderr
    assert done.exit_code == 0
    assert h5py.is_hdf5("out.h5")


def test_a_rejected_slice_gives_status_1_and_is_told(cohort: Path) -> None:
    """A truncated image counts once, is named with its reason, and allowed by --max-rejected."""
    shutil.copytree(cohort, "broken")
    image = break_one_image(Path("broken"))
    done = run("convert", "broken", "-o", "out.h5")
    allowed = run("convert", "broken", "-o", "again.h5", "--max-rejected", 1)
    strict = run("convert", "broken", "-o", "strict.h5", "--strict")

    assert (done.exit_code, allowed.exit_code, strict.exit_code) == (1, 0, 1)
    assert "exit status 1: 1 rejected, 0 allowed (--max-rejected)" in done.stdout
    assert re.search(r"^harmless +image-rejected: \d", done.stdout, re.MULTILINE)
    assert image.relative_to("broken").as_posix() in done.stdout
    assert "exit status" not in allowed.stdout
    assert strict.stderr.splitlines()[-1].startswith("error: ")
    assert not Path("strict.h5").exists()


def test_what_the_system_refuses_in_a_run_gives_status_3(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while chunks are written leaves a run that can be resumed: 3, not 2."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out.h5")

    monkeypatch.setattr(Hdf5Writer, "put", refuse)
    done = run("convert", cohort, "-o", "out.h5", "--scheduler", "synchronous")
    legacy = run("--data_directory", cohort, command=process_dicom_to_hdf5)

    assert (done.exit_code, legacy.exit_code) == (3, 3)
    assert done.stderr.splitlines()[-1] == "error: No space left on device: out.h5"
    assert not Path("out.h5").exists()


def test_a_foreign_config_ini_stops_nothing(cohort: Path) -> None:
    """An ini without sections that lies about is not ours; scan and convert ignore it."""
    Path("config.ini").write_text("colour = blue\n")

    assert run("scan", cohort).exit_code == 0
    assert run("convert", cohort, "-o", "out.h5").exit_code == 0
    assert run("scan", cohort, "--config", "config.ini").exit_code == 2


def test_missing_decoders_are_told_by_scan_and_before_a_conversion(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to install is known from the headers; then nothing is converted, and nothing hidden."""
    from parallel_dicomseg.dicom import decoders

    monkeypatch.setattr(decoders, "_is_importable", lambda package: package != "imagecodecs")
    source = shared_data / "transfer_syntax/dicom2nifti/generic/compressed_j2k"
    needed = 'JPEG 2000 Lossless: pip install "parallel_dicomseg[decoders]"'
    scanned = run("scan", source, "--include-unannotated")
    done = run("convert", source, "-o", "out.h5", "--include-unannotated")

    assert re.search(rf"^not decodable here +{re.escape(needed)}$", scanned.stdout, re.MULTILINE)
    assert done.exit_code == 1
    assert done.stderr.index(f"not decodable here: {needed}") < done.stderr.index("convert: ")
    assert not Path("out.h5").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 on other systems")
def test_names_of_any_bytes_can_be_printed(cohort: Path) -> None:
    """Strays named in Latin-1 or with steering codes, on a strict standard output."""
    shutil.copytree(cohort, "odd")
    for name in (b"caf\xe9.txt", b"two\nlines.txt", b"\x1b[2J.txt"):
        Path("odd", os.fsdecode(name)).write_text("")
        Path("odd", "dicoms", os.fsdecode(name)).write_text("")
    words = [["scan", "odd"], ["convert", "odd", "-o", "out.h5"], ["inspect", "out.h5"]]
    texts = [run(*one).stdout for one in words]
    texts += [run("verify", os.fsdecode(shutil.copy("out.h5", b"caf\xe9.h5"))).stdout]
    problems = json.loads(run("scan", "odd", "--json").stdout)["problems"]

    for text in texts:
        assert "\x1b" not in text
    for text in (texts[0], texts[2]):
        for name in (r"caf\udce9.txt", r"two\nlines.txt", r"\x1b[2J.txt"):
            assert f"dicoms/{name}: " in text
    assert r"caf\udce9.h5: 8 slices read, sound" in texts[3]
    assert {os.fsencode(problem["path"]) for problem in problems} == {
        b"dicoms/caf\xe9.txt",
        b"dicoms/two\nlines.txt",
        b"dicoms/\x1b[2J.txt",
    }


def test_inspect_speaks_of_the_file(converted: Path) -> None:
    """Both forms of inspect name the structures and the rule."""
    text = run("inspect", converted).stdout
    found = json.dumps(json.loads(run("inspect", converted, "--json").stdout))

    assert "center" in text
    assert "center" in found


def test_inspect_tells_the_values_of_tags(converted: Path) -> None:
    """A keyword and a number, in words and as JSON; one that nobody has ends with status 2."""
    words = ["inspect", converted, "--tag", "Modality", "--tag", "0028,0030"]
    text, found = run(*words).stdout, json.loads(run(*words, "--json").stdout)
    unknown = run("inspect", converted, "--tag", "PatientName")

    assert re.search(r"patient-1 +MR +MR \(4\) +4$", text, re.MULTILINE)
    assert [one["keyword"] for one in found] == ["Modality", "PixelSpacing"]
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "no image has PatientName" in unknown.stderr


def test_nifti_is_exported(converted: Path) -> None:
    """Image and mask per volume hold what the file holds; an export is replaced only on request."""
    nibabel = pytest.importorskip("nibabel")
    words = ["export", "nifti", converted, "nifti", "--structures", "i"]
    report = json.loads(run(*words, "--json").stdout)
    again = run(*words)
    replaced = run(*words, "--masks", "labels", "--overwrite")
    with h5py.File(converted) as file:
        masks = file["masks"][:4] & 1

    assert len(report["files"]) == 4
    assert (again.exit_code, "nifti exists; --overwrite" in again.stderr) == (2, True)
    assert replaced.stdout == "nifti: 4 files of 2 volumes\n"
    labels = nibabel.load("nifti/patient-1_volume-0_labels.nii.gz")
    assert np.array_equal(np.asarray(labels.dataobj), masks.T)


def test_a_dataset_for_nnunet_is_exported(converted: Path) -> None:
    """The raw layout, with what could not be carried over told; a wrong number ends with 2."""
    Path("raw").mkdir()
    words = ["export", "nnunet", converted, "raw", "--name", "Heart", "--dataset-id"]
    done, wrong = run(*words, 7, "--structures", "o,i"), run(*words, 1000)
    made = json.loads(Path("raw/Dataset007_Heart/dataset.json").read_text())

    assert done.exit_code == 0
    assert done.stdout.startswith("raw/Dataset007_Heart: 4 files of 2 volumes\n")
    assert "are in several structures" in done.stdout
    assert made["numTraining"] == 2
    assert {name: made["labels"][name] for name in ("o", "i")} == {"o": 1, "i": 2}
    assert (wrong.exit_code, wrong.stdout) == (2, "")


# --- saved scans


def test_a_saved_scan_is_edited_listed_and_converted(cohort: Path) -> None:
    """What the tables say after the edit is listed by scan and converted."""
    run("scan", cohort, "--save", "scanned", "--split", "0.5", "0.5")
    table = Path("scanned/slices.csv")
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    found = json.loads(run("scan", "scanned", "--json").stdout)
    done = json.loads(run("convert", "scanned", "-o", "out.h5", "--json").stdout)

    assert found["images"] == done["slices"] == 7
    assert {part: of["patients"] for part, of in found["split"].items()} == {
        "train": 1,
        "validation": 1,
        "test": 0,
    }


def test_options_of_the_scan_are_refused_where_it_was_made_before(cohort: Path) -> None:
    """They would do nothing, and a user would believe in a split that is not there."""
    run("scan", cohort, "--save", "scanned")
    words = ["convert", "scanned", "-o", "out.h5"]
    refused = run(*words, "--split", "0.5", "0.5", "--structures", "i")

    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "scanned is a saved scan, to which --structures, --split belonged" in refused.stderr
    assert run(*words, "--workers", "1").exit_code == 0


def test_damage_of_a_saved_scan_is_named(cohort: Path) -> None:
    """A missing table, and a cohort that has moved."""
    shutil.copytree(cohort, "moved")
    run("scan", "moved", "--save", "scanned")
    shutil.rmtree("moved")
    moved = run("convert", "scanned", "-o", "out.h5")
    Path("scanned/slices.csv").unlink()
    lost = run("convert", "scanned", "-o", "out.h5")

    assert (moved.exit_code, lost.exit_code) == (2, 2)
    assert re.search(r"cohort\.json: root: there is no directory .*moved; say", moved.stderr)
    assert "scanned/slices.csv: cannot be read (No such file" in lost.stderr


def test_where_tables_cannot_go_is_told_before_the_scan(cohort: Path) -> None:
    """Nothing is read in vain, and what else lies in the folder is not deleted."""
    run("scan", cohort, "--save", "scanned")
    Path("scanned/notes.xlsx").write_text("mine")
    again = run("scan", cohort, "--save", "scanned")
    foreign = run("scan", cohort, "--save", "scanned", "--overwrite")

    assert again.stderr == "error: scanned exists; --overwrite replaces it\n"
    assert foreign.stderr == "error: scanned also holds notes.xlsx, which is not of a scan\n"
    assert (again.exit_code, foreign.exit_code) == (2, 2)
    assert Path("scanned/notes.xlsx").read_text() == "mine"


def test_verify_accepts_a_sound_file_and_finds_a_broken_one(converted: Path) -> None:
    """A flipped byte in a chunk gives status 1 and a problem; the file as made gives 0."""
    sound = run("verify", converted, "--json")
    broken = Path("broken.h5")
    shutil.copy(converted, broken)
    with h5py.File(converted) as file:
        chunk = file["images"].id.get_chunk_info(0)
    raw = bytearray(broken.read_bytes())
    raw[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    broken.write_bytes(raw)

    assert sound.exit_code == 0
    said = {"file": str(converted), "slices": 8, "problems": [], "notes": []}
    assert json.loads(sound.stdout) == said
    for found in (run("verify", broken), run("verify", broken, "--checksums-only")):
        assert found.exit_code == 1
        assert "images[0]" in found.stdout


def test_source_and_output_may_come_from_the_original_config(cohort: Path) -> None:
    """With a config.ini, convert needs no further word, and takes its one structure."""
    Path("config.ini").write_text(
        f"[local]\nDATA_DIR_BASE = {cohort}\nHDF5_FILENAME = legacy.h5\n"
        "CONTOURS_SUB_DIR = /i-contours/\n"
    )
    done = run("convert")
    with h5py.File("legacy.h5") as file:
        structures = list(file["masks"].attrs["structures"])

    assert done.exit_code == 0
    assert structures == ["i"]


# --- the original script's command


def test_the_original_command_converts_and_replaces(cohort: Path) -> None:
    """Flags with underscores move images, outlines and link table; the output is replaced."""
    Path("old.h5").write_text("replaced without a question, as the original did")
    words = ["--data_directory", cohort, "--output_filename", "old.h5"]
    done = run(*words, command=process_dicom_to_hdf5)
    with h5py.File("old.h5") as file:
        structures, shape = list(file["masks"].attrs["structures"]), file["images"].shape
    lines = done.stdout.splitlines()

    assert done.exit_code == 0
    assert lines[0] == "Reading from link.csv file"
    assert lines[1] == f"Base data directory is {cohort}"
    assert lines[-1] == "Finished."
    assert (structures, shape) == (["i"], (8, 40, 48))


def test_the_original_command_reads_its_config(cohort: Path) -> None:
    """Folder, structure and output come from ./config.ini."""
    Path("config.ini").write_text(
        f"[local]\nDATA_DIR_BASE = {cohort}\nCONTOURS_SUB_DIR = /o-contours/\n"
        "HDF5_FILENAME = o.h5\n"
    )
    done = run(command=process_dicom_to_hdf5)
    with h5py.File("o.h5") as file:
        structures = list(file["masks"].attrs["structures"])

    assert done.exit_code == 0
    assert structures == ["o"]


def test_the_original_command_says_what_is_missing() -> None:
    """With neither a config.ini nor a flag nor the default folder there is one clear line."""
    done = run(command=process_dicom_to_hdf5)

    assert done.exit_code == 2
    assert "say where the data is with --data_directory" in done.stderr
    assert "--print_random_image" in run("-h", command=process_dicom_to_hdf5).stdout


def test_a_random_image_is_drawn_and_nothing_converted(cohort: Path) -> None:
    """Figures are numbered, the seed repeats the choice, and no HDF5 file appears."""
    pytest.importorskip("matplotlib")
    words = ["--print_random_image", "--data_directory", cohort, "--seed", "5"]
    first, second = (run(*words, command=process_dicom_to_hdf5) for _ in range(2))
    lines = first.stdout.splitlines()

    assert lines[2] == "Figure is random_image_1.png"
    assert re.fullmatch(r"Patient number is [12]", lines[3])
    assert re.fullmatch(r"Pixel dimensions are \d+\.\d{3} x \d+\.\d{3} mm", lines[4])
    assert re.fullmatch(r"Slice thickness is \d+\.\d{3} mm", lines[5])
    assert "Figure is random_image_2.png" in second.stdout
    assert lines[3:] == second.stdout.splitlines()[3:]
    assert sorted(p.name for p in Path().iterdir()) == ["random_image_1.png", "random_image_2.png"]
    assert Path("random_image_1.png").read_bytes() == Path("random_image_2.png").read_bytes()


def test_a_cohort_of_one_slice_keeps_its_outlines(cohort: Path) -> None:
    """Every slice can be taken alone, with exactly the outlines that lie on it."""
    scanned = scan_cohort(cohort)
    alone = [only_slice(scanned, k) for k in range(len(scanned.slices))]

    assert scanned.slices.path.tolist() == [one.slices.path[0] for one in alone]
    assert scanned.annotations.path.tolist() == [p for one in alone for p in one.annotations.path]
    assert not np.any(np.concatenate([one.annotations.slice for one in alone]))


# --- demo


def test_the_demo_works_twice(capfd: pytest.CaptureFixture[str]) -> None:
    """The demo is sound, shows where everything lies, and can be repeated."""
    first = run("demo", "here")
    second = json.loads(run("demo", "here", "--json").stdout)

    assert first.exit_code == 0, first.output
    assert "cohort.h5" in first.stdout
    assert second["verification_problems"] == []
    assert second["sound"] is True
    assert (second["summary"]["rejected"], second["summary"]["exit_status"]) == (0, 0)
    assert Path("here", "cohort.h5").is_file()


def test_the_demo_touches_no_folder_of_others() -> None:
    """A folder that the demo did not make is refused and stays as it is."""
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("years of work")
    refused = run("demo", "mine")

    assert refused.exit_code == 2
    assert "was not made by this command" in refused.stderr
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_repeating_the_demo_keeps_what_others_put_beside_it() -> None:
    """A second run replaces only its own files."""
    run("demo", "here")
    Path("here", "notes.txt").write_text("mine")
    run("demo", "here")

    assert Path("here", "notes.txt").read_text() == "mine"


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=9))
def test_the_shape_of_a_polygon_equals_that_of_its_triangles(points: list[tuple[int, int]]) -> None:
    """Area and centre equal those of a fan of triangles, added up as fractions."""
    (x0, y0), *others = [(Fraction(x), Fraction(y)) for x, y in points]
    area, column, row = Fraction(0), Fraction(0), Fraction(0)
    for (x1, y1), (x2, y2) in pairwise(others):
        triangle = ((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) / 2
        area += triangle
        column += triangle * (x0 + x1 + x2) / 3
        row += triangle * (y0 + y1 + y2) / 3
    assume(area != 0)
    expected = [float(abs(area)), float(column / area), float(row / area)]

    assert shape_of_polygon(np.array(points, np.float64)) == pytest.approx(expected, abs=1e-9)


def test_the_shape_of_a_mask_is_counted() -> None:
    """Pixels and their mean place, column first; an empty mask has no place."""
    mask = np.zeros((5, 6), np.uint8)
    mask[1:3, 3:6] = 1

    assert shape_of_mask(mask).tolist() == [6, 4, 1.5]
    assert np.isnan(shape_of_mask(mask * 0)[1:]).all()


@pytest.mark.parametrize(
    ("wrong_by", "complaints"),
    [((0, 0, 0), 0), ((0.2, 0, 0), 1), ((-0.2, 0, 0), 1), ((0, 0.3, 0), 1), ((0, np.nan, 0), 1)],
)
def test_the_demo_would_notice_wrong_masks(
    tmp_path: Path, wrong_by: tuple[float, float, float], complaints: int
) -> None:
    """A mask that is off by 0.2 pixels all around, or beside its outline, is named."""
    truth = make_sunnybrook_cohort(tmp_path / "c", patients=1, slices=1, rows=64, columns=64)
    outline = truth.outlines[0]
    points = outline.polygon_column_row
    length = np.hypot(*(np.roll(points, -1, axis=0) - points).T).sum()
    expected = shape_of_polygon(points)[None]
    found = expected + np.array(wrong_by) * [length, 1, 1]
    named = off_truth((outline,), expected, found)

    assert len(named) == complaints
    assert all(outline.path in sentence for sentence in named)


def test_a_demo_that_is_not_sound_says_so(tmp_path: Path) -> None:
    """Anything wrong makes the demo unsound, and what is wrong is printed."""
    demo = run_demo(tmp_path / "demo")
    wrong = [
        replace(demo, off_truth=("a mask is off",)),
        replace(demo, verification_problems=("a chunk is missing",)),
        replace(demo, samples=demo.samples - 1),
    ]

    assert demo.sound
    assert not any(one.sound for one in wrong)
    assert "a mask is off" in render_demo(wrong[0])
    assert "a chunk is missing" in render_demo(wrong[1])
    assert "pip install" in render_demo(replace(demo, picture=""))


# --- what is printed


def test_rejections_are_listed_up_to_ten() -> None:
    """Of many rejections ten are listed and the rest counted; harmless ones are counted apart."""
    rejected = tuple(
        Problem(f"dicoms/{k}.dcm", Reason.PIXEL_DATA_SHORT, f"{k} bytes of 8192") for k in range(12)
    )
    stray = Problem("contourfiles/.x.swp", Reason.STRAY_FILE, "not an outline")
    text = render_summary(replace(SUMMARY, problems=(*rejected, stray), max_rejected=3))

    assert "  pixel-data-short: dicoms/9.dcm: 9 bytes of 8192\n" in text
    assert "dicoms/10.dcm" not in text
    assert "  and 2 more, see `parallel-dicomseg inspect out.h5`" in text
    assert re.search(r"^harmless +stray-file: 1$", text, re.MULTILINE)
    assert text.endswith("exit status 1: 12 rejected, 3 allowed (--max-rejected)")


def test_flags_have_a_line_each() -> None:
    """The summary counts each flag that occurs."""
    assert re.search(r"^  empty-mask +2$", render_summary(SUMMARY), re.MULTILINE)
    assert re.search(
        r"^flagged +nothing$", render_summary(replace(SUMMARY, flagged={})), re.MULTILINE
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1.5e6, "1.5 MB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_rounded(count: float, text: str) -> None:
    """Bytes are shown in decimal units."""
    assert text == size_text(count)


def test_columns_are_aligned() -> None:
    """Each column is as wide as its widest cell, without blanks at the end of a line."""
    assert columns_of_text([("a", "bcd", "e"), ("ab", "b", "")]) == "a   bcd  e\nab  b"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Arrays, records, bytes and paths become plain JSON, and NaN becomes null."""
    value = {
        "array": np.array([[1.5, np.nan]]),
        "scalar": np.int64(3),
        "infinity": float("inf"),
        "record": Progress("scan", 1, 2),
        "bytes": b"a",
        "path": Path("p"),
        "reason": Reason.NOT_DICOM,
        "flag": True,
    }
    print_json(value)

    assert json.loads(capsys.readouterr().out) == {
        "array": [[1.5, None]],
        "scalar": 3,
        "infinity": None,
        "record": {"stage": "scan", "done": 1, "total": 2},
        "bytes": "a",
        "path": "p",
        "reason": "not-dicom",
        "flag": True,
    }


@pytest.mark.parametrize(
    ("event", "done", "seconds", "line"),
    [
        (Progress("scan", 0, 10), 0, 0.0, "scan: 0 of 10"),
        (Progress("scan", 5, 10), 5, 0.0, "scan: 5 of 10"),
        (Progress("scan", 6000, 8000), 5000, 2.0, "scan: 6,000 of 8,000, 2,500 slices/s, 1 s left"),
        (Progress("scan", 10, 10), 10, 2.0, "scan: 10 of 10, 5 slices/s"),
    ],
)
def test_a_progress_line_tells_rate_and_time_left(
    event: Progress, done: int, seconds: float, line: str
) -> None:
    """Rate and time left come from what was done in the stage so far."""
    assert line == progress_line(event, done, seconds)


def lines_of(count: int, seconds_each: float) -> list[str]:
    """What a stage of `count` events writes when each takes that long."""
    clock, lines = iter(np.arange(count + 1) * seconds_each), []
    watch = PlainLines(lines.append, clock=lambda: float(next(clock)))
    for done in range(count + 1):
        watch(Progress("convert", done, count))
    return lines


def test_plain_lines_are_few_for_fast_and_for_slow_runs() -> None:
    """First and last always come; in between 10 % steps that are at least two seconds apart."""
    fast, slow = lines_of(1000, 0.001), lines_of(1000, 1.0)

    assert [line.split(",")[0] for line in fast] == ["convert: 0 of 1", "convert: 1"]
    assert len(slow) == 11
    assert slow[5].startswith("convert: 500 of 1,000, 1 slices/s, 500 s left")


def test_an_empty_stage_writes_one_line() -> None:
    """A stage without anything to do ends with its first event."""
    lines: list[str] = []
    PlainLines(lines.append)(Progress("scan", 0, 0))

    assert lines == ["scan: 0 of 0"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_bar(cohort: Path) -> None:
    """On a terminal standard error shows a bar, and standard output still only the result."""
    controller, terminal = os.openpty()
    program = [sys.executable, "-c", "from parallel_dicomseg.cli import main; main()"]
    try:
        done = subprocess.run(
            [*program, "scan", str(cohort), "--json"],
            stdout=subprocess.PIPE,
            stderr=terminal,
            check=True,
        )
        shown = os.read(controller, 100_000).decode()
    finally:
        os.close(terminal)
        os.close(controller)

    assert json.loads(done.stdout)["images"] == 8
    assert "━" in shown
    assert "8/8" in shown or "16/16" in shown
