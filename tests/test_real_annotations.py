"""Real annotations end to end, from the command to the voxels of the file that it wrote.

Every figure and every mask that they are compared with was made by somebody else.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from click.testing import CliRunner
from numpy.typing import NDArray

from parallel_dicomseg.cli import main
from parallel_dicomseg.store import Dataset, open_dataset

Mask = NDArray[np.bool_]


def convert(folder: Path, output: Path, *options: str, status: int = 0) -> Dataset:
    """The file that the command writes, open."""
    arguments = ["convert", str(folder), "-o", str(output), "--keep-identity", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == status, result.output
    return open_dataset(output)


def masks(dataset: Dataset, structure: str, folder: str = "") -> Iterator[Mask]:
    """The mask of a structure on each image of a folder, on the image's own grid."""
    bit = dataset.structures.index(structure)
    for row, path in enumerate(dataset.column("source_path").tolist()):
        if os.fsdecode(path).startswith(folder):
            yield own_grid(dataset, row, (dataset.masks[row] >> bit & 1).astype(np.bool_))


def own_grid(dataset: Dataset, row: int, stored: Mask) -> Mask:
    """A stored mask without what it was padded with, where nothing may lie."""
    top, left = (-dataset.column("grid_origin")[row]).astype(int)
    rows, columns = dataset.column("source_rows")[row], dataset.column("source_columns")[row]
    inside = stored[top : top + rows, left : left + columns]
    assert inside.sum() == stored.sum()
    return inside


def voxels(dataset: Dataset, structure: str, folder: str = "") -> Mask:
    """(k, rows, columns) of a structure on the images of a folder, which have one size."""
    return np.stack(list(masks(dataset, structure, folder)))


def counts(dataset: Dataset, folder: str = "") -> dict[str, int]:
    """Voxels of every structure on the images of a folder."""
    found = {
        name: sum(int(mask.sum()) for mask in masks(dataset, name, folder))
        for name in dataset.structures
    }
    return {name: count for name, count in found.items() if count}


def expected(file: Path, case: str) -> dict[str, int]:
    """Voxels of the structures of a case that have any."""
    with file.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["case"] == case]
    return {row["roi"]: int(row["evenodd_vox"]) for row in rows if int(row["evenodd_vox"])}


def published_nifti(file: Path) -> NDArray[np.float64]:
    """A NIfTI volume as (z, y, x), the last two along DICOM's axes (left and back)."""
    nifti = nibabel.load(file)
    codes = nibabel.orientations.axcodes2ornt("LPS")
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(nifti.affine), codes)
    return np.asarray(nifti.as_reoriented(turn).dataobj).T


def test_six_structure_sets_equal_the_published_masks(shared_data: Path, tmp_path: Path) -> None:
    """CT, MR and PET of two patients in one file: no voxel differs, of masks and images."""
    root = shared_data / "sts_rtstruct"
    totals = {}
    with convert(root, tmp_path / "sts.h5") as dataset:
        assert dataset.structures == ("GTV_Mass_CT", "GTV_Mass_MR_T1", "GTV_Mass_PET")
        for patient, modality in product(("STS_001", "STS_002"), ("CT", "MR_T1", "PET")):
            folder = f"dicom/{patient}/{modality}/"
            found = voxels(dataset, f"GTV_Mass_{modality}", folder)
            truth = published_nifti(root / "nifti" / patient / f"{modality}_mask.nii.gz") > 0
            np.testing.assert_array_equal(found, truth)
            totals[f"{patient}/{modality}"] = counts(dataset, folder)
    assert totals == {case: expected(root / "expected_voxels.csv", case) for case in totals}, (
        "a structure has voxels on another series"
    )
    assert sum(sum(by_name.values()) for by_name in totals.values()) == 274_120


def test_overlapping_structures_of_an_oblique_series(shared_data: Path, tmp_path: Path) -> None:
    """Both structures keep all of their voxels where one contains the other."""
    root = shared_data / "sts_raw_mr_t2"
    with convert(root, tmp_path / "raw.h5") as dataset:
        mass, oedema = (voxels(dataset, name) for name in ("GTV_Mass", "GTV_Edema"))
        assert counts(dataset) == {"GTV_Mass": 256_115, "GTV_Edema": 406_547}
        assert np.flatnonzero(mass.any(axis=(1, 2))).tolist() == list(range(11, 31))
        assert np.flatnonzero(oedema.any(axis=(1, 2))).tolist() == list(range(2, 34))
        both = (mass & oedema).sum()
        inside = np.concatenate([dataset.images[k][mask] for k, mask in enumerate(mass)])
    assert both > 0.9 * mass.sum()
    assert (inside.min(), inside.max()) == (36, 892)


def test_odd_structure_sets(shared_data: Path, tmp_path: Path) -> None:
    """One slice of a clinical structure set, though most contours have no image."""
    root = shared_data / "rtstruct_odd"
    with convert(root, tmp_path / "odd.h5", status=1) as dataset:
        assert counts(dataset, "dicompyler/") == expected(
            root / "expected_voxels.csv", "dicompyler"
        )
        assert {"Areola", "Lt Lung"} < set(dataset.structures)
        areola = dataset.column("structure_annotated")[:, dataset.structures.index("Areola")]
        assert areola.sum() == 1, "what has no contours was looked for all the same"


def test_segmentations_have_the_published_voxels(shared_data: Path, tmp_path: Path) -> None:
    """Every segment of every file; several files of one image are structures of their own."""
    root = shared_data / "dicom_seg"
    with (root / "expected_segments.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if "_cr_" not in row["file"]]
    with convert(root, tmp_path / "seg.h5", "--several", "separate", status=1) as dataset:
        found = counts(dataset)
        by_image = {
            "dcmqi/23x38x3/image/": {"Liver": 322},
            "dcmqi/24x38x3/image/": {"Liver": 315},
            "pydicom_CT2/": {
                "first segment": 638,  # four files of one series, in the order of their names
                "first segment-2": 638,
                "first segment-3": 64,
                "first segment-4": 661,
                "second segment": 16,
            },
        }
        for folder, published in by_image.items():
            assert counts(dataset, folder) == published
        coloured = ("GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE")
        liver = read_nrrd(root / "dcmqi/liver_seg.nrrd")
        np.testing.assert_array_equal(voxels(dataset, "Liver", "dcmqi/ct-3slice/"), liver == 1)
        maps = [read_nrrd(root / f"dcmqi/partial_overlaps-{k}.nrrd") for k in (1, 2, 3)]
        for number, (name, k) in enumerate(zip(coloured, (0, 1, 2, 0, 0), strict=True), start=1):
            mask = voxels(dataset, name, "dcmqi/ct-3slice/")
            np.testing.assert_array_equal(mask, maps[k] == number)
    assert sum(found.values()) == sum(int(row["nonzero_voxels"]) for row in rows)


def read_nrrd(file: Path) -> NDArray[np.int64]:
    """(z, y, x) labels."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file)).astype(np.int64)


def test_digital_phantom_equals_its_nifti(shared_data: Path, tmp_path: Path) -> None:
    """A multi-frame coronal image and a segmentation of 20-bit frames: 74 voxels, mean 2.1486."""
    root = shared_data / "ibsi_digital_phantom"
    truth = nibabel.load(root / "nifti/mask/mask.nii.gz")
    values = nibabel.load(root / "nifti/image/phantom.nii.gz")
    with convert(root, tmp_path / "phantom.h5") as dataset:
        mask = voxels(dataset, "ROI")
        image = np.stack([dataset.images[row] for row in range(len(dataset))])
    assert mask.sum() == 74
    assert image[mask].mean() == pytest.approx(2.1486, abs=5e-5)
    # slices run along y, rows along z, columns along x, each in one direction or the other
    flips = [axes for n in range(4) for axes in combinations(range(3), n)]
    same = [
        axes
        for axes in flips
        if (image.transpose(2, 0, 1) == np.flip(np.asarray(values.dataobj), axes)).all()
    ]
    assert len(same) == 1, "the image itself says which way the axes run"
    np.testing.assert_array_equal(
        mask.transpose(2, 0, 1), np.flip(np.asarray(truth.dataobj) > 0, same[0])
    )
