"""Nothing outside the data directory is opened, whatever names, links and files say."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from parallel_dicomseg import convert_cohort, posix, scan_cohort
from parallel_dicomseg.errors import ParallelDicomSegError
from parallel_dicomseg.files import open_regular, read_regular
from parallel_dicomseg.limits import applied
from parallel_dicomseg.phantoms import make_rtstruct_series
from parallel_dicomseg.records import Cohort, ConvertOptions, Limits, Reason, ScanOptions, Summary
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

CANARY = "CANARY^PATIENT"

_watched: list[str] = []
_watching = [False]


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _watching[0] and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _watched.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def opened_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every path that Python opens or kernels are given in the block."""
    pack = posix.pack_paths

    def noted(paths: list[str], folder: str = "") -> object:
        _watched.extend(os.path.join(folder, path) for path in paths)
        return pack(paths, folder)

    _watched.clear()
    with monkeypatch.context() as patched:
        for name, module in list(sys.modules.items()):
            if name.startswith("parallel_dicomseg") and hasattr(module, "pack_paths"):
                patched.setattr(module, "pack_paths", noted)
        _watching[0] = True
        try:
            yield _watched
        finally:
            _watching[0] = False


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A data directory with a good series, and a place beside it with another patient's."""
    inside, outside = tmp_path / "data", tmp_path / "outside"
    make_rtstruct_series(inside / "good", shape=(3, 24, 24))
    make_rtstruct_series(outside, shape=(3, 24, 24), patient_id=CANARY, seed=5)
    (outside / "canary.txt").write_text("1 1\n9 1\n9 9\n")
    return inside, outside


def run(root: Path, output: Path) -> tuple[Cohort, Summary]:
    """Scan and convert."""
    cohort = scan_cohort(root, options=ScanOptions(include_unannotated=True))
    options = ConvertOptions(scheduler="synchronous", keep_identity=True)
    return cohort, convert_cohort(cohort, output, options=options)


def link_folder(inside: Path, outside: Path) -> None:
    """A link to a folder of images elsewhere."""
    (inside / "more").symlink_to(outside / "images")


def link_file(inside: Path, outside: Path) -> None:
    """Links to single files elsewhere, also through another link."""
    (inside / "one.dcm").symlink_to(next((outside / "images").iterdir()))
    (inside / "two.dcm").symlink_to(inside / "one.dcm")
    (inside / "rs.dcm").symlink_to(outside / "rtstruct.dcm")


def link_relative(inside: Path, outside: Path) -> None:
    """A relative link up and out."""
    (inside / "up.dcm").symlink_to(Path("..", outside.name, "rtstruct.dcm"))


def link_root(inside: Path, outside: Path) -> None:
    """A link to the whole file system, and one to processes."""
    (inside / "everything").symlink_to("/")
    (inside / "processes").symlink_to("/proc/self")
    (inside / "memory.dcm").symlink_to("/proc/self/maps")


def link_loop(inside: Path, outside: Path) -> None:
    """Links that lead round in circles."""
    (inside / "loop").symlink_to(inside)
    (inside / "good" / "up").symlink_to("..")
    (inside / "a.dcm").symlink_to("b.dcm")
    (inside / "b.dcm").symlink_to("a.dcm")


def devices(inside: Path, outside: Path) -> None:
    """A FIFO, a socket and a device, straight and through links inside the directory."""
    os.mkfifo(inside / "pipe.dcm")
    os.mkfifo(inside / "pipe.xml")
    (inside / "linked.xml").symlink_to("pipe.xml")
    (inside / "linked.dcm").symlink_to("pipe.dcm")
    (inside / "zero.dcm").symlink_to("/dev/zero")
    here = os.getcwd()
    os.chdir(inside)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.dcm")
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    "attack", [link_folder, link_file, link_relative, link_root, link_loop, devices]
)
def test_links_and_devices_lead_nowhere(
    attack: Callable[[Path, Path], None],
    places: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are listed; only what lies in the directory is opened, and the rest is converted."""
    inside, outside = places
    attack(inside, outside)
    result = tmp_path / "result"
    result.mkdir()
    with opened_files(monkeypatch) as opened:
        cohort, summary = run(inside, result / "out.h5")

    assert summary.slices == 3
    there = [Path(path) for path in opened if str(tmp_path) in path]
    assert sum(path.suffix == ".dcm" for path in there) >= 4
    allowed = (str(inside), str(result))
    assert not [path for path in there if not os.path.realpath(path).startswith(allowed)]
    special = {path for path in opened if path.endswith((".dcm", ".xml")) and not is_file(path)}
    assert not special
    assert CANARY.encode() not in (result / "out.h5").read_bytes()
    assert not any(CANARY in problem.detail for problem in cohort.problems)
    listed = {problem.reason for problem in cohort.problems}
    assert listed & {Reason.OUTSIDE_DATA_DIRECTORY, Reason.STRAY_FILE}


def is_file(path: str) -> bool:
    """Whether a path is a regular file, or nothing any more."""
    return os.path.isfile(path) or not os.path.exists(path)


@pytest.mark.parametrize(
    "cell",
    ["../outside", "/etc", "..\\outside", "C:\\", "a/../../outside", "SCD\0", "~", "$HOME"],
)
def test_no_name_in_a_table_leads_out(
    cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells of link.csv are names of folders that are there, and nothing else."""
    root = tmp_path / "data"
    make_sunnybrook_cohort(root, patients=1, slices=3, rows=32, columns=32)
    outside = tmp_path / "outside"
    shutil.copytree(root / "dicoms", outside / "dicoms")
    table = root / "link.csv"
    table.write_text(table.read_text().rstrip("\n") + f"\n{cell},{cell}\n")
    with opened_files(monkeypatch) as opened:
        try:
            cohort = scan_cohort(root)
        except ParallelDicomSegError as error:
            assert "link.csv" in str(error)  # noqa: PT017  a refusal is as good
        else:
            assert len(cohort.slices) == 3

    there = [path for path in opened if str(tmp_path) in path]
    assert there
    assert all(os.path.realpath(path).startswith(str(root)) for path in there)


def test_a_dicomdir_leads_nowhere(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its references are not followed: files are found by looking."""
    from pydicom.dataset import Dataset, FileMetaDataset

    inside, _ = places
    record = Dataset()
    record.DirectoryRecordType = "IMAGE"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record.ReferencedFileID = "../outside/rtstruct.dcm"
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    directory.DirectoryRecordSequence = [record]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory.save_as(inside / "DICOMDIR", enforce_file_format=True)
    with opened_files(monkeypatch) as opened:
        _, summary = run(inside, tmp_path / "out.h5")

    assert summary.slices == 3
    assert not [path for path in opened if "outside" in path]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A FIFO (which would hang), a socket, a folder and a device are refused in words."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"), open_regular(path, 10):
            pass
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(OSError, match="11 bytes, limit 10"):
        read_regular(tmp_path / "large", 10)
    assert read_regular(tmp_path / "large", 11) == bytes(11)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_a_file_that_says_it_is_empty_is_cut_off() -> None:
    """Files of /proc have no size: no more than the limit is read of them."""
    assert len(read_regular("/proc/self/maps", 100)) == 100


def test_limits_hold_in_one_thread_and_end() -> None:
    """What is applied is in force until the block ends."""
    from parallel_dicomseg.limits import limits

    with applied(Limits(frames=3)):
        assert limits().frames == 3
    assert limits() == Limits()


@pytest.mark.parametrize(
    ("limit", "reason", "words"),
    [
        (Limits(file_bytes=500), Reason.UNREADABLE_FILE, "limit 500"),
        (Limits(header_bytes=200), Reason.UNREADABLE_FILE, "limit 200"),
        (Limits(image_pixels=100), Reason.UNSUPPORTED_PIXELS, "24 x 24 pixels, limit 100"),
    ],
)
def test_limits_reach_the_scan(
    limit: Limits, reason: Reason, words: str, places: tuple[Path, Path]
) -> None:
    """Every image of the cohort is listed with both numbers."""
    with pytest.raises(ParallelDicomSegError, match=words):
        scan_cohort(places[0], options=ScanOptions(include_unannotated=True, limits=limit))
    assert reason in Reason


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "processes"])
def test_limits_reach_the_workers(
    scheduler: str, places: tuple[Path, Path], tmp_path: Path
) -> None:
    """A limit of the conversion holds in whatever process decodes, and blames each slice."""
    cohort = scan_cohort(places[0], options=ScanOptions(include_unannotated=True))
    slow = {"pixel_offset": cohort.slices.pixel_offset * 0 - 1}
    from dataclasses import replace

    cohort = replace(cohort, slices=replace(cohort.slices, **slow))
    options = ConvertOptions(scheduler=scheduler, workers=1, limits=Limits(image_pixels=100))
    with pytest.raises(ParallelDicomSegError, match="24 x 24 pixels, limit 100"):
        convert_cohort(cohort, tmp_path / "out.h5", options=options)
