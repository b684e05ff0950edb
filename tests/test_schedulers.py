"""The bytes of the output depend on the cohort and the options that define it, on nothing else."""

from __future__ import annotations

import getpass
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort, warm_up
from parallel_dicomseg.records import Cohort, ConvertOptions, ScanOptions
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

CODECS = ("deflate", "lz4", "zstd", "none")
SLICES = 18
#: Slices in one task: the smallest, one that leaves a rest, one that is chosen, all.
PORTIONS = (1, 4, 0, SLICES)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """18 slices of three patients; some have one outline, some two, one cannot be read."""
    warm_up()
    root = tmp_path_factory.mktemp("input") / "a_name_that_must_not_be_stored"
    make_sunnybrook_cohort(root, patients=3, slices=6, rows=48, columns=40)
    cohort = scan_cohort(root)
    # After the scan, so that it is a worker that finds it.
    outline = root / os.fsdecode(cohort.annotations.path[-1])
    outline.write_text("10 10\nnot a number\n")
    return cohort


@pytest.fixture(scope="module")
def expected(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """The bytes for a codec: made by one thread, slice by slice."""
    folder = tmp_path_factory.mktemp("expected")
    made = {
        codec: converted(cohort, folder / f"{codec}.h5", codec, "synchronous", 1)
        for codec in CODECS
    }
    return made.__getitem__


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def converted(
    cohort: Cohort, output: Path, codec: str, scheduler: str, slices_per_task: int = 0
) -> bytes:
    """The bytes of the output."""
    options = ConvertOptions(
        codec=codec, scheduler=scheduler, slices_per_task=slices_per_task, workers=2
    )
    summary = convert_cohort(cohort, output, options=options)
    assert summary.slices == SLICES - 1
    return output.read_bytes()


@pytest.mark.parametrize("slices_per_task", PORTIONS)
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
@pytest.mark.parametrize("codec", CODECS)
def test_portions_and_threads_do_not_change_the_bytes(
    cohort: Cohort,
    expected: Callable[[str], bytes],
    tmp_path: Path,
    codec: str,
    scheduler: str,
    slices_per_task: int,
) -> None:
    """One slice per task or all in one, in turn or at the same time: the same file."""
    made = converted(cohort, tmp_path / "out.h5", codec, scheduler, slices_per_task)

    assert made == expected(codec)


@pytest.mark.parametrize("codec", CODECS)
def test_processes_do_not_change_the_bytes(
    cohort: Cohort, expected: Callable[[str], bytes], tmp_path: Path, codec: str
) -> None:
    """Worker processes make the same file as one thread."""
    assert converted(cohort, tmp_path / "out.h5", codec, "processes", 4) == expected(codec)


def test_own_cluster_does_not_change_the_bytes(
    cohort: Cohort, expected: Callable[[str], bytes], tmp_path: Path
) -> None:
    """A cluster that the run starts and ends makes the same file as one thread."""
    pytest.importorskip("distributed")

    assert converted(cohort, tmp_path / "out.h5", "deflate", "distributed", 4) == expected(
        "deflate"
    )


@pytest.mark.parametrize("slices_per_task", PORTIONS)
@pytest.mark.parametrize("codec", CODECS)
def test_cluster_does_not_change_the_bytes(
    cluster: str,
    cohort: Cohort,
    expected: Callable[[str], bytes],
    tmp_path: Path,
    codec: str,
    slices_per_task: int,
) -> None:
    """A cluster that runs already makes the same file as one thread."""
    made = converted(cohort, tmp_path / "out.h5", codec, cluster, slices_per_task)

    assert made == expected(codec)


def test_clock_and_places_do_not_change_the_bytes(
    cohort: Cohort, expected: Callable[[str], bytes], tmp_path: Path
) -> None:
    """Later, from a copy elsewhere, into a file of another name: the same bytes."""
    time.sleep(1.1)  # HDF5 would note the time of creation in whole seconds
    copy = tmp_path / "copy"
    shutil.copytree(cohort.root, copy)
    # The copy is scanned with its broken outline, which does not change what is converted.
    again = scan_cohort(copy)

    made = converted(again, tmp_path / "another name.hdf5", "deflate", "threads")

    assert made == expected("deflate")


def test_mirror_is_the_same_from_every_scheduler(cohort: Cohort, tmp_path: Path) -> None:
    """The zarr mirror holds the same files with the same bytes."""
    trees = []
    for scheduler in ("synchronous", "threads"):
        root = tmp_path / scheduler
        options = ConvertOptions(scheduler=scheduler, workers=2, zarr=str(root))
        convert_cohort(cohort, tmp_path / f"{scheduler}.h5", options=options)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        trees.append({str(path.relative_to(root)): path.read_bytes() for path in files})

    assert trees[0] == trees[1]
    assert len(trees[0]) > 10


def test_real_cohort_is_the_same_from_threads(shared_data: Path, tmp_path: Path) -> None:
    """The Arterys cohort, in the portions that are chosen for one and for three workers."""
    root = shared_data / "sunnybrook_arterys" / "final_data"
    cohort = scan_cohort(root, options=ScanOptions(workers=2))
    made = []
    for scheduler, workers in (("synchronous", 1), ("threads", 3)):
        output = tmp_path / f"{workers}.h5"
        options = ConvertOptions(scheduler=scheduler, workers=workers)
        convert_cohort(cohort, output, options=options)
        made.append(output.read_bytes())

    assert made[0] == made[1]


# --- what the bytes may not tell


def telltale(cohort: Cohort) -> dict[str, bytes]:
    """What would say where, when, by whom and of whom the file was made."""
    words = {
        "folder": Path(cohort.root).name,
        "home": str(Path.home()),
        "working directory": str(Path.cwd()),
        "host": os.uname().nodename,
        "user": getpass.getuser(),
        **{f"date as {form}": time.strftime(form) for form in ("%Y-%m-%d", "%Y%m%d", "%d.%m.%Y")},
        "patient": os.fsdecode(cohort.slices.patient_id[0]),
        "uid": cohort.slices.sop_instance_uid[0].decode(),
    }
    # Three letters can stand in compressed pixels by chance.
    return {name: word.encode() for name, word in words.items() if len(word) > 3}


def everything_in(file: h5py.File) -> bytes:
    """All names, attributes and text columns of a file, decompressed, one after another."""
    found: list[Any] = [*file.attrs.items()]

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found.extend((name, *item.attrs.items()))
        if isinstance(item, h5py.Dataset) and h5py.check_string_dtype(item.dtype):
            found.extend(item.asstr()[...].tolist())

    file.visititems(note)
    return repr(found).encode()


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_do_not_tell_where_when_and_of_whom(
    cohort: Cohort, expected: Callable[[str], bytes], codec: str
) -> None:
    """No path, host, user, date, patient or UID stands in the file as bytes."""
    made = expected(codec)

    assert [name for name, word in telltale(cohort).items() if word in made] == []


def test_texts_do_not_tell_where_when_and_of_whom(
    cohort: Cohort, expected: Callable[[str], bytes], tmp_path: Path
) -> None:
    """Nor does any of it stand in a name, an attribute or a column, where bytes are compressed."""
    (tmp_path / "out.h5").write_bytes(expected("deflate"))
    with h5py.File(tmp_path / "out.h5") as file:
        text = everything_in(file)

    assert b"bit s is structure s" in text  # what is there is seen
    found = [name for name, word in telltale(cohort).items() if word in text]
    # /rejected names the broken outline by its place in the cohort.
    assert found == []


def test_kept_identity_is_found_by_this_search(cohort: Cohort, tmp_path: Path) -> None:
    """Where identity is kept, the search of the test above finds it: it can fail."""
    options = ConvertOptions(keep_identity=True, scheduler="synchronous")
    convert_cohort(cohort, tmp_path / "out.h5", options=options)
    with h5py.File(tmp_path / "out.h5") as file:
        text = everything_in(file)

    found = {name for name, word in telltale(cohort).items() if word in text}
    assert found == {"patient", "uid"}


#: Any tree: contours in mm, segmentations, compressed frames, several frames per file.
TREES = ("sts_raw_mr_t2", "dicom_seg", "transfer_syntax")


@pytest.mark.parametrize("name", TREES)
def test_no_scheduler_changes_the_bytes_of_a_tree_of_dicom_files(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    """Resampled and cropped about the structures, slice by slice or in one task."""
    cohorts = [
        scan_cohort(shared_data / name, options=ScanOptions(include_unannotated=True, workers=k))
        for k in (1, 2)
    ]
    made = []
    for k, (scheduler, workers, portion) in enumerate(
        [("synchronous", 1, 1), ("threads", 3, 5), ("threads", 2, 0), ("processes", 2, 7)]
    ):
        # not deflate: which matches ISA-L finds depends, rarely, on where its state lies in memory
        options = ConvertOptions(
            codec="lz4", spacing=(2.0,), size=(96, 80), fit="structure",
            scheduler=scheduler, workers=workers, slices_per_task=portion,
        )  # fmt: skip
        convert_cohort(cohorts[k % 2], tmp_path / f"{k}.h5", options=options)
        made.append((tmp_path / f"{k}.h5").read_bytes())

    assert made[1:] == made[:1] * 3
