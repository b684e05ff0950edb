"""What is written is for its owner alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.export.nifti import export_nifti
from parallel_dicomseg.export.nnunet import export_nnunet
from parallel_dicomseg.phantoms import make_rtstruct_series
from parallel_dicomseg.private import make_private, open_private
from parallel_dicomseg.records import ConvertOptions, Progress
from parallel_dicomseg.report.figures import contact_sheet
from parallel_dicomseg.saved import save_scan
from parallel_dicomseg.store import open_dataset

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are a matter of POSIX")


@pytest.fixture(autouse=True)
def open_to_everybody() -> Iterator[None]:
    """The umask that protects nothing."""
    before = os.umask(0)
    yield
    os.umask(before)


def exposed(folder: Path) -> dict[str, str]:
    """What is in a folder and may be used by others than its owner."""
    modes = {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.lstat().st_mode)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }
    return {name: f"{mode:03o}" for name, mode in modes.items() if mode & 0o077}


@pytest.mark.parametrize("keep_identity", [False, True])
def test_everything_that_is_written_is_private(tmp_path: Path, keep_identity: bool) -> None:
    """The file, its mirror, the key, a saved scan and exports; while they are made, too: whatever
    lies beside the output at any time.
    """
    phantom = make_rtstruct_series(tmp_path / "data", shape=(5, 24, 24))
    out = tmp_path / "out"
    out.mkdir()
    seen: dict[str, str] = {}
    names: set[str] = set()

    def look(_: Progress) -> None:
        names.update(path.name for path in out.iterdir())
        seen.update((name, mode) for name, mode in exposed(out).items() if "zarr" not in name)

    cohort = scan_cohort(phantom.directory)
    save_scan(cohort, out / "saved")
    key = "" if keep_identity else str(out / "key")
    options = ConvertOptions(
        keep_identity=keep_identity, key_file=key, zarr=str(out / "x.zarr"), slices_per_task=1
    )
    convert_cohort(cohort, out / "x.h5", options=options, progress=look)
    with open_dataset(out / "x.h5") as dataset:
        export_nifti(dataset, out / "nifti")
        export_nnunet(dataset, out, dataset_id=7, name="Heart")
        contact_sheet(dataset.images[0][None], dataset.masks[0][None], ["disc", "ring"], ["a"],
                      out / "sheet.png")  # fmt: skip

    assert {"x.h5.partial", "x.h5.lock"} <= names
    assert seen == {}
    assert exposed(out) == {}
    assert {"x.h5", "x.zarr", "saved", "nifti", "Dataset007_Heart", "sheet.png"} <= set(
        os.listdir(out)
    )


def test_a_replaced_output_is_private_again(tmp_path: Path) -> None:
    """Also where another run left a partial file that everybody may read."""
    phantom = make_rtstruct_series(tmp_path / "data", shape=(5, 24, 24))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.h5", "x.h5.partial", "x.h5.lock"):
        (out / name).write_bytes(b"")
    assert len(exposed(out)) == 3

    convert_cohort(
        scan_cohort(phantom.directory), out / "x.h5", options=ConvertOptions(overwrite=True)
    )

    assert exposed(out) == {}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Where a private file is to be, somebody may have put a link to a file of ours."""
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)

    with pytest.raises(OSError, match="symbolic links"):
        open_private(tmp_path / "link", os.O_WRONLY | os.O_CREAT)
    make_private(tmp_path)

    assert exposed(tmp_path) == {}
    assert target.read_text() == "precious"


def test_links_in_a_folder_are_left_alone(tmp_path: Path) -> None:
    """What they lead to may be somebody else's."""
    (tmp_path / "out").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    (tmp_path / "out" / "link").symlink_to(elsewhere)

    make_private(tmp_path / "out")

    assert "elsewhere" in exposed(tmp_path)
