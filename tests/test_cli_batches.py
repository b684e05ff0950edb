"""The commands that read batches: what they print, which rows come, figures and statuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result

from parallel_dicomseg.cli import hdf5_batch_loader, main
from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.records import ConvertOptions
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

SLICES, ROWS, COLUMNS = 8, 40, 48


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 2 patients with 4 annotated slices each."""
    folder = tmp_path_factory.mktemp("batches")
    make_sunnybrook_cohort(folder / "data", patients=2, slices=4, rows=ROWS, columns=COLUMNS)
    options = ConvertOptions(scheduler="synchronous")
    convert_cohort(scan_cohort(folder / "data"), folder / "cohort.h5", options=options)
    return folder / "cohort.h5"


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the original script wrote it: a flattened image per row, and its shape."""
    path = tmp_path_factory.mktemp("legacy") / "dicom_data.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["input"] = rng.integers(0, 1000, (10, 12 * 16), np.int16)
        file["output"] = rng.integers(0, 2, (10, 12 * 16)).astype(bool)
        for name in ("input", "output"):
            file[name].attrs["lshape"] = (12, 16, 1)
    return path


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and config.ini lie in the working directory."""
    monkeypatch.chdir(tmp_path)


def run(*words: object, command: click.Command = main) -> Result:
    """Run a command as the shell would; a traceback fails the test."""
    result = CliRunner().invoke(command, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed_rows(text: str) -> list[list[int]]:
    """The rows of each batch as `--print-indices` shows them."""
    return [[int(word) for word in line.split()] for line in text.splitlines() if line[:2] == "  "]


def flat(batches: list[list[int]]) -> list[int]:
    """The rows of several batches."""
    return [row for batch in batches for row in batch]


# --- parallel-dicomseg batches


def test_help_ends_with_an_example() -> None:
    """The help of the command fits a terminal and shows how it is called."""
    text = run("batches", "--help").stdout

    assert "  parallel-dicomseg batches cohort.h5" in text.partition("Example:\n")[2]
    assert max(map(len, text.splitlines())) <= 80


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(converted: Path) -> None:
    """--print-indices shows the batches as they come, the last one smaller."""
    done = run("batches", converted, "--batch-size", 3, "--epochs", 2, "--print-indices")
    rows = printed_rows(done.stdout)
    epochs = [flat(rows[:3]), flat(rows[3:])]

    assert done.exit_code == 0
    assert [len(batch) for batch in rows] == [3, 3, 2, 3, 3, 2]
    assert [list(range(SLICES))] * 2 == [sorted(epoch) for epoch in epochs]
    assert epochs[0] != epochs[1]


def test_the_seed_decides_the_order(converted: Path) -> None:
    """The same seed repeats the batches, another one gives others."""
    words = ["batches", converted, "--print-indices", "--seed"]
    texts = [run(*words, seed).stdout for seed in (5, 5, 6)]

    assert texts[0] == texts[1]
    assert printed_rows(texts[0]) != printed_rows(texts[2])


def test_shapes_and_types_are_told(converted: Path) -> None:
    """A plane per chosen structure, or a label map."""
    planes = run("batches", converted, "--batch-size", 8, "--structures", "i").stdout
    labels = run("batches", converted, "--batch-size", 8, "--masks", "labels").stdout

    assert f"image (8, 1, {ROWS}, {COLUMNS}) float32, mask (8, 1, {ROWS}, {COLUMNS})" in planes
    assert f"mask (8, {ROWS}, {COLUMNS}) uint8" in labels


def test_json_holds_rows_figures_and_where_the_time_went(converted: Path) -> None:
    """A program gets each epoch with its times and a line of advice, rows on request."""
    words = ["batches", converted, "--epochs", "2", "--json", "--benchmark"]
    plain, with_rows = (json.loads(run(*words, *more).stdout) for more in ([], ["--print-indices"]))

    assert [epoch["epoch"] for epoch in plain["epochs"]] == [0, 1]
    assert [epoch["samples"] for epoch in plain["epochs"]] == [SLICES] * 2
    assert all(epoch["advice"] and epoch["timings"] for epoch in plain["epochs"])
    assert not any("indices" in epoch for epoch in plain["epochs"])
    assert len(flat(with_rows["epochs"][0]["indices"])) == SLICES


def test_benchmark_says_how_fast_and_what_to_do(converted: Path) -> None:
    """Samples per second, the seconds of each stage, and one line of advice."""
    text = run("batches", converted, "--benchmark").stdout

    assert re.search(r"^  [\d,]+ samples/s; .*read \d+\.\d{3} s", text, re.MULTILINE)
    assert len(text.splitlines()) == 4


def test_figures_are_numbered_and_kept(converted: Path) -> None:
    """Each run adds pictures to the folder; none is replaced."""
    pytest.importorskip("matplotlib")
    for _ in range(2):
        done = run("batches", converted, "--figure", "pictures", "--figures", "2", "--epochs", "0")
        assert done.exit_code == 0

    names = sorted(path.name for path in Path("pictures").iterdir())
    assert [f"random_image_{k}.png" for k in (1, 2, 3, 4)] == names


def test_augmentations_are_chosen_by_name(converted: Path) -> None:
    """Names may be separated by commas; an unknown one ends the command with one line."""
    good = run("batches", converted, "--augment", "flip,noise")
    bad = run("batches", converted, "--augment", "flop")

    assert good.exit_code == 0
    assert bad.exit_code == 2
    assert "flop" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """No traceback, status 2, the file's name."""
    done = run("batches", tmp_path / "nothing.h5")

    assert done.exit_code == 2
    assert "nothing.h5" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- the original's command


def test_the_original_command_prints_what_it_printed(legacy: Path) -> None:
    """Counts, sizes, batch size, epochs, and each batch's rows, sorted, below its epoch."""
    words = ["--input_filename", legacy, "--batchsize", 5, "--epochs", 2, "--print_batch_indices"]
    done = run(*words, command=hdf5_batch_loader)
    lines = done.stdout.splitlines()
    batches = [[int(k) for k in line.strip("[]").split()] for line in lines if line[0] == "["]

    assert done.exit_code == 0
    assert lines[:7] == [
        "Number of images: 10",
        "Number of masks: 10",
        "Image size = (12, 16, 1) pixels",
        "Mask size = (12, 16, 1) pixels",
        "Batch size = 5",
        "Number of epochs = 2",
        "********** EPOCH 1 **************",
    ]
    assert lines[9] == "********** EPOCH 2 **************"
    assert all(batch == sorted(batch) for batch in batches)
    assert [list(range(10))] * 2 == [sorted(flat(batches[k : k + 2])) for k in (0, 2)]


def test_the_original_command_reads_our_files(converted: Path) -> None:
    """The sizes of a converted file are told in the same words."""
    words = ["--input_filename", converted, "--epochs", 1]
    lines = run(*words, command=hdf5_batch_loader).stdout.splitlines()

    assert lines[0] == f"Number of images: {SLICES}"
    assert lines[2] == f"Image size = ({ROWS}, {COLUMNS}, 1) pixels"
    assert lines[4] == "Batch size = 16"


def test_the_original_command_reads_its_config(legacy: Path) -> None:
    """File, batch size and epochs come from ./config.ini; flags win."""
    Path("config.ini").write_text(
        f"[local]\nHDF5_FILENAME = {legacy}\nBATCH_SIZE = 4\nNUM_EPOCHS = 2\n"
    )
    lines = run(command=hdf5_batch_loader).stdout.splitlines()
    flags = run("--batchsize", 7, "--epochs", 1, command=hdf5_batch_loader).stdout.splitlines()

    assert lines[4:] == [
        "Batch size = 4",
        "Number of epochs = 2",
        "********** EPOCH 1 **************",
        "********** EPOCH 2 **************",
    ]
    assert flags[4:6] == ["Batch size = 7", "Number of epochs = 1"]


def test_the_original_command_says_what_is_missing() -> None:
    """With neither a config.ini nor a flag nor the default file there is one clear line."""
    done = run(command=hdf5_batch_loader)

    assert done.exit_code == 2
    assert "say which file to read with --input_filename" in done.stderr
    assert "--print_random_image" in run("-h", command=hdf5_batch_loader).stdout


@pytest.mark.parametrize("kind", ["converted", "legacy"])
def test_a_random_image_is_drawn_and_numbered(kind: str, request: pytest.FixtureRequest) -> None:
    """Figures appear in the working directory; the seed repeats them."""
    pytest.importorskip("matplotlib")
    words = ["--input_filename", request.getfixturevalue(kind), "--epochs", 0, "--seed", 3]
    texts = [run(*words, "--print_random_image", command=hdf5_batch_loader) for _ in range(2)]

    assert [text.exit_code for text in texts] == [0, 0]
    assert sorted(p.name for p in Path().iterdir()) == ["random_image_1.png", "random_image_2.png"]
    assert "Figure is random_image_2.png" in texts[1].stdout
    assert Path("random_image_1.png").read_bytes() == Path("random_image_2.png").read_bytes()
