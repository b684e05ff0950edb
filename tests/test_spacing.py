"""One spacing, one size: images, masks and geometry end to end, against what is known by design."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.ndimage import center_of_mass, map_coordinates

from parallel_dicomseg import (
    ConvertOptions,
    ScanOptions,
    convert_cohort,
    open_dataset,
    scan_cohort,
    verify_file,
)
from parallel_dicomseg.geometry import stored_plane
from parallel_dicomseg.phantoms import (
    ExtraContour,
    Phantom,
    ellipse,
    make_rtstruct_series,
    parity_mask,
    rectangle,
)
from parallel_dicomseg.records import FLAGS, Float64, Summary
from parallel_dicomseg.store.dataset import Dataset

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
COS, SIN = math.cos(math.radians(25)), math.sin(math.radians(25))
OBLIQUE = (COS, SIN, 0.0, -SIN * math.cos(0.4), COS * math.cos(0.4), math.sin(0.4))
BACKGROUND, CONTRAST, FINE = 100.0, 1000.0, 8


def convert(phantom: Phantom, output: Path, **options: Any) -> tuple[Summary, Dataset]:
    """Scan and convert a phantom."""
    cohort = scan_cohort(phantom.directory, options=ScanOptions())
    summary = convert_cohort(cohort, output, options=ConvertOptions(workers=1, **options))
    return summary, open_dataset(output)


def show_the_structure(phantom: Phantom, structure: str) -> None:
    """Let the images show what the contours are round: each pixel the fraction of it inside."""
    for k, points in phantom.rings[phantom.structures.index(structure)]:
        # centres of FINE x FINE parts of each pixel are the centres of a finer grid's pixels
        fine = (points + 0.5) * FINE - 0.5
        parts = parity_mask(fine, (phantom.rows * FINE, phantom.columns * FINE))
        inside = parts.reshape(phantom.rows, FINE, phantom.columns, FINE).mean(axis=(1, 3))
        file = Path(phantom.directory, phantom.image_paths[k])
        dataset = dcmread(file)
        dataset.PixelData = np.rint(BACKGROUND + CONTRAST * inside).astype("<i2").tobytes()
        dataset.save_as(file)


def disc_phantom(
    directory: Path, spacing: tuple[float, float], radius_mm: float, **changed: Any
) -> Phantom:
    """Three slices of 120 x 130 mm with a disc off the middle, in images and contours."""
    shape = (3, round(120 / spacing[0]), round(130 / spacing[1]))
    # a polygon of the circle's area
    corner = 2 * math.pi / 720
    radius = radius_mm * math.sqrt(corner / math.sin(corner))
    middle = np.array([61.3, 57.9]) / spacing[::-1]
    disc = ellipse(*middle, radius / spacing[1], radius / spacing[0], 720)
    phantom = make_rtstruct_series(
        directory, shape=shape, pixel_spacing=spacing,
        structures={"disc": [(k, disc) for k in range(3)]}, decimals=6, **changed,
    )  # fmt: skip
    show_the_structure(phantom, "disc")
    return phantom


def displacement(image: NDArray[Any], mask: NDArray[Any]) -> Float64:
    """Row and column by which an image's bright part is off a mask, by phase correlation.

    The phase of the cross power spectrum is a plane whose slope is the shift; it is fitted where
    both have power: at low frequencies.
    """
    spectra = [np.fft.fft2(one.astype(float)) for one in (image - BACKGROUND, mask)]
    cross = spectra[0] * np.conj(spectra[1])
    rows, columns = (np.fft.fftfreq(size) for size in image.shape)
    row, column = np.meshgrid(rows, columns, indexing="ij")
    low = (np.hypot(row, column) < 0.03) & (np.hypot(row, column) > 0)
    weight = np.sqrt(np.abs(cross[low]))[:, None]
    plane = -2 * math.pi * np.stack([row[low], column[low]], axis=1)
    shift: Float64 = np.linalg.lstsq(
        plane * weight, np.angle(cross[low]) * weight[:, 0], rcond=None
    )[0]
    return shift


@pytest.mark.parametrize(
    ("spacing", "wanted"),
    [
        ((0.7, 0.7), (1.4,)),
        ((1.4, 1.4), (0.7,)),
        ((1.0, 1.0), (1.37,)),
        ((0.7, 1.1), (1.0, 0.8)),
        ((1.3, 0.7), (0.9,)),
    ],
)
@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_a_disc_keeps_its_area_and_its_place(
    spacing: tuple[float, float],
    wanted: tuple[float, ...],
    orientation: tuple[float, ...],
    tmp_path: Path,
) -> None:
    """Area within 0.5 %, image and mask within 0.05 pixels of one another, geometry to 1e-6."""
    phantom = disc_phantom(
        tmp_path / "phantom", spacing, 40.0, image_orientation_patient=orientation
    )
    summary, dataset = convert(phantom, tmp_path / "x.h5", spacing=wanted)

    assert summary.problems == ()
    assert summary.notes == ("3 of 3 images were resampled to the spacing asked for",)
    row_mm, column_mm = wanted[0], wanted[-1]
    with dataset:
        np.testing.assert_allclose(
            dataset.column("pixel_spacing"), [[row_mm, column_mm]] * 3, atol=1e-6
        )
        assert dataset.shape[1:] == tuple(
            math.ceil(size * mm / new - 1e-5)
            for size, mm, new in zip(
                (phantom.rows, phantom.columns), spacing, (row_mm, column_mm), strict=True
            )
        )
        for row in range(3):
            image, mask = dataset.images[row].astype(float), dataset.masks[row]
            area = mask.sum() * row_mm * column_mm
            assert area == pytest.approx(math.pi * 40.0**2, rel=0.005)
            assert dataset.column("area_mm2")[row, 0] == pytest.approx(area)
            apart = np.subtract(center_of_mass(image - BACKGROUND), center_of_mass(mask))
            assert np.abs(apart).max() < 0.05
            assert np.abs(displacement(image, mask)).max() < 0.05
        assert_geometry(phantom, dataset)
    assert verify_file(tmp_path / "x.h5").is_sound


def assert_geometry(phantom: Phantom, dataset: Dataset) -> None:
    """Position and spacing of the stored grid follow from where its pixels lie in the source."""
    grids = np.concatenate([dataset.column("grid_origin"), dataset.column("grid_step")], axis=1)
    for row, grid in enumerate(grids):
        expected = stored_plane(phantom.planes[row], grid)
        found = [dataset.column(name)[row] for name in ("image_position_patient", "pixel_spacing")]
        np.testing.assert_allclose(np.concatenate(found), expected[[0, 1, 2, 9, 10]], atol=1e-6)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_the_stored_position_is_where_the_pixels_are(
    orientation: tuple[float, ...], tmp_path: Path
) -> None:
    """A ramp that grows by 1 per mm along x, y or z of the patient reads as the stored position."""
    phantom = make_rtstruct_series(
        tmp_path / "phantom", shape=(3, 60, 44), pixel_spacing=(1.3, 0.9),
        image_orientation_patient=orientation,
    )  # fmt: skip
    for k, path in enumerate(phantom.image_paths):
        file = Path(phantom.directory, path)
        dataset = dcmread(file)
        row, column = np.mgrid[:60, :44]
        x = phantom.planes[k, 0] + column * 0.9 * orientation[0] + row * 1.3 * orientation[3]
        dataset.PixelData = np.rint(100 * x).astype("<i2").tobytes()
        dataset.RescaleSlope = "0.01"
        dataset.save_as(file)
    _, stored = convert(phantom, tmp_path / "x.h5", spacing=(2.1,), size=(20, 12))

    with stored:
        for k in range(3):
            row, column = np.mgrid[:20, :12]
            plane = phantom.planes[k]
            corner = stored.column("image_position_patient")[k]
            x = corner[0] + 2.1 * (column * plane[3] + row * plane[6])
            np.testing.assert_allclose(stored.images[k], x, atol=0.02)


def test_an_interpolated_image_is_the_source_between_its_pixels(tmp_path: Path) -> None:
    """A smooth image on a finer grid is what SciPy's cubic splines say, to 2 % of its contrast."""
    phantom = disc_phantom(tmp_path / "phantom", (1.0, 1.0), 30.0)
    for path in phantom.image_paths:
        dataset = dcmread(Path(phantom.directory, path))
        row, column = np.mgrid[: phantom.rows, : phantom.columns]
        waves = np.sin(row / 6.0) + np.cos(column / 7.0 + row / 20.0)
        dataset.PixelData = np.rint(1000 * waves).astype("<i2").tobytes()
        dataset.save_as(Path(phantom.directory, path))
    _, stored = convert(phantom, tmp_path / "x.h5", spacing=(0.6, 0.8))

    with stored:
        origin, step = stored.column("grid_origin")[0], stored.column("grid_step")[0]
        rows, columns = np.mgrid[: stored.shape[1], : stored.shape[2]]
        places = np.stack([origin[0] + step[0] * rows, origin[1] + step[1] * columns])
        source = dcmread(Path(phantom.directory, phantom.image_paths[0])).pixel_array
        expected = map_coordinates(source.astype(float), places, order=3, mode="nearest")
        inner = np.s_[6:-6, 6:-6]
        assert np.abs(stored.images[0][inner] - expected[inner]).max() < 40


# --- size and fit --------------------------------------------------------------------------------


def test_a_size_crops_without_touching_a_value(tmp_path: Path) -> None:
    """Images and masks are windows of the source; what lies outside is counted and flagged."""
    shape = (3, 40, 50)
    ring = rectangle(-0.5, -0.5, 20.5, 9.5)
    phantom = make_rtstruct_series(
        tmp_path / "phantom", shape=shape, structures={"corner": [(1, ring)]}
    )
    summary, dataset = convert(phantom, tmp_path / "x.h5", size=(30, 24))

    top, left = 5, 13
    assert summary.notes == ("3 of 3 images were cropped to 30 x 24",)
    with dataset:
        window = np.s_[top : top + 30, left : left + 24]
        for k, path in enumerate(phantom.image_paths):
            source = dcmread(Path(phantom.directory, path)).pixel_array
            np.testing.assert_array_equal(dataset.images[k], source[window])
            np.testing.assert_array_equal(dataset.masks[k], phantom.truth("corner")[k][window])
        whole = phantom.truth("corner")[1].sum()
        assert dataset.column("cropped")[:, 0].tolist() == [0, whole - dataset.masks[1].sum(), 0]
        cut = 1 << FLAGS.index("cut-by-crop")
        assert (dataset.column("flags") & cut > 0).tolist() == [False, True, False]
        assert_geometry(phantom, dataset)
    assert summary.flagged["cut-by-crop"] == 1


def test_a_larger_size_pads_without_loss(tmp_path: Path) -> None:
    """The whole source is there, the rest is the image's minimum and no mask."""
    # sticks out of the image on three sides
    ring = rectangle(-9.0, -9.0, 60.0, 9.5)
    phantom = make_rtstruct_series(
        tmp_path / "phantom", shape=(2, 20, 30), structures={"wide": [(0, ring)]}
    )
    summary, dataset = convert(phantom, tmp_path / "x.h5", size=(31, 44))

    assert summary.notes == ("2 of 2 images were padded to 31 x 44 (sizes 20 x 30)",)
    with dataset:
        origin = dataset.column("grid_origin")[0].astype(int)
        window = np.s_[-origin[0] : 20 - origin[0], -origin[1] : 30 - origin[1]]
        for k, path in enumerate(phantom.image_paths):
            source = dcmread(Path(phantom.directory, path)).pixel_array
            np.testing.assert_array_equal(dataset.images[k][window], source)
            rest = np.ones(dataset.shape[1:], bool)
            rest[window] = False
            assert (dataset.images[k][rest] == source.min()).all()
            np.testing.assert_array_equal(dataset.masks[k][window], phantom.truth("wide")[k])
            assert not dataset.masks[k][rest].any()
        assert not dataset.column("cropped").any()
        assert_geometry(phantom, dataset)


@pytest.mark.parametrize("spacing", [(), (1.5,)])
def test_fit_structure_keeps_a_structure_in_a_corner_whole(
    spacing: tuple[float, ...], tmp_path: Path
) -> None:
    """One window for the whole volume, about all that is drawn on it; nothing is cut."""
    rings = [(k, ellipse(9.0 + k, 50.0, 6.3, 5.2)) for k in range(1, 5)]
    phantom = make_rtstruct_series(
        tmp_path / "phantom", shape=(6, 60, 60), structures={"corner": rings}
    )
    _, centred = convert(phantom, tmp_path / "c.h5", size=(20, 20), spacing=spacing)
    _, fitted = convert(phantom, tmp_path / "s.h5", size=(20, 20), spacing=spacing, fit="structure")

    with centred, fitted:
        assert centred.column("cropped").any()
        assert not fitted.column("cropped").any()
        assert len(np.unique(fitted.column("grid_origin"), axis=0)) == 1
        assert len(np.unique(fitted.column("volume"))) == 1
        if not spacing:
            sums = phantom.truth("corner").sum(axis=(1, 2))
            np.testing.assert_array_equal(fitted.column("area")[:, 0], sums)
        assert_geometry(phantom, fitted)


def test_a_contour_far_off_the_image_does_not_pull_the_window_away(tmp_path: Path) -> None:
    """`fit=structure` looks at what is on the image."""
    phantom = make_rtstruct_series(
        tmp_path / "phantom",
        shape=(3, 40, 40),
        structures={"a": [(1, ellipse(10.0, 10.0, 5.0, 5.0))]},
        extra=[ExtraContour("a", [[400, -20, 33], [410, -20, 33], [410, -10, 33]])],
    )
    _, dataset = convert(phantom, tmp_path / "x.h5", size=(40, 40), fit="structure")

    with dataset:
        assert (dataset.column("grid_origin") <= 20).all()
        assert not dataset.column("cropped").any()


def test_images_of_several_spacings_get_one(tmp_path: Path) -> None:
    """Two series of one tree: the same disc has the same area on both, and the file says so."""
    for name, spacing in (("one", (0.8, 0.8)), ("two", (1.6, 1.2))):
        disc_phantom(tmp_path / "tree" / name, spacing, 30.0, seed=len(name) + int(spacing[0] * 9))
    cohort = scan_cohort(tmp_path / "tree")
    convert_cohort(cohort, tmp_path / "x.h5", options=ConvertOptions(workers=1, spacing=(1.0,)))

    with h5py.File(tmp_path / "x.h5") as file:
        areas = file["table/area_mm2"][:, 0]
        assert len(np.unique(file["table/source_pixel_spacing"], axis=0)) == 2
        np.testing.assert_allclose(areas, math.pi * 900, rtol=0.005)
        np.testing.assert_allclose(file["table/pixel_spacing"], 1.0, atol=1e-6)
