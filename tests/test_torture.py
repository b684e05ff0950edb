"""Every orientation and defect of a structure set, against truth that is known by construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exact
import numpy as np
import pydicom
import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from parallel_dicomseg import ConvertOptions, convert_cohort, open_dataset, scan_cohort
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.geometry import normal_of, to_patient
from parallel_dicomseg.phantoms import (
    ExtraContour,
    Phantom,
    conformance_solids,
    ellipse,
    make_rtstruct_series,
    parity_mask,
)
from parallel_dicomseg.records import Reason, ScanOptions
from parallel_dicomseg.sources import rtstruct
from parallel_dicomseg.sources.base import Found

COS, SIN = np.cos(np.deg2rad(25)), np.sin(np.deg2rad(25))
OBLIQUE = (COS, SIN, 0.0, -SIN * np.cos(0.4), COS * np.cos(0.4), np.sin(0.4))
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SMALL = (40, 64, 80)

CASES: dict[str, dict[str, Any]] = {
    "axial": {},
    "wider than high": {"shape": (10, 48, 80), "pixel_spacing": (1.3, 0.7)},
    "higher than wide": {"shape": (10, 80, 48), "pixel_spacing": (0.6, 1.9)},
    "sagittal": {"image_orientation_patient": (0, 1, 0, 0, 0, -1)},
    "coronal": {"image_orientation_patient": (1, 0, 0, 0, 0, -1)},
    "double oblique": {"image_orientation_patient": OBLIQUE, "pixel_spacing": (1.3, 0.7)},
    "rows flipped": {"image_orientation_patient": (-1, 0, 0, 0, 1, 0)},
    "columns flipped": {"image_orientation_patient": (1, 0, 0, 0, -1, 0)},
    "gaps": {"shape": (11, 64, 64), "positions": [0, 3, 6, 9, 15, 21, 24, 27, 30, 33, 36]},
    "shuffled": {"shuffled": True},
    "no references": {"references": "absent"},
    "unknown references": {"references": "unknown"},
    "another frame of reference": {"references": "absent", "frame_of_reference": "other"},
    "undefined lengths": {"undefined_lengths": True},
    "MR": {"modality": "MR"},
    "PET": {"modality": "PT"},
    "implicit VR": {"transfer_syntax": "1.2.840.10008.1.2"},
    "implicit VR, undefined lengths": {
        "transfer_syntax": "1.2.840.10008.1.2",
        "undefined_lengths": True,
    },
    "big endian": {"transfer_syntax": "1.2.840.10008.1.2.2"},
    "deflated": {"transfer_syntax": "1.2.840.10008.1.2.1.99"},
}


def convert(phantom: Phantom) -> tuple[Found, NDArray[np.uint64]]:
    """What is found, and (n, rows, columns) masks; bit k is annotation k."""
    root = Path(phantom.directory)
    images, files = tables.scan(root)
    found = rtstruct.find(str(root), files, images, ScanOptions())
    drawn = tables.read(root, images, found.annotations)
    assert drawn.problems == ()
    return found, tables.draw(drawn.contours, images)


def mask_of(masks: NDArray[np.uint64], bit: int) -> NDArray[np.bool_]:
    """One structure's voxels."""
    return (masks >> np.uint64(bit) & np.uint64(1)).astype(np.bool_)


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """2 |A & B| / (|A| + |B|)."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def in_order(phantom: Phantom, truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Truth by position along the normal, where the phantom's slices need not be sorted."""
    heights = phantom.planes[:, :3] @ normal_of(phantom.planes[0, 3:9])
    return truth[np.argsort(heights)]


def assert_exact(phantom: Phantom) -> Found:
    """Both structures are there, voxel for voxel."""
    found, masks = convert(phantom)
    assert sorted(a.name for a in found.annotations) == sorted(phantom.structures)
    for bit, annotation in enumerate(found.annotations):
        truth = in_order(phantom, phantom.truth(annotation.name))
        assert truth.any()
        assert dice(mask_of(masks, bit), truth) == 1.0
        assert annotation.looked_at.tolist() == list(range(len(truth)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_masks_are_exact_in_every_geometry(case: str, tmp_path: Path) -> None:
    """Dice 1.0 and no problem, wherever the slices lie and however the file is written."""
    found = assert_exact(make_rtstruct_series(tmp_path / "phantom", **CASES[case]))

    assert found.problems == ()
    how = {"no references": "frame-of-reference", "unknown references": "frame-of-reference"}
    how["another frame of reference"] = "geometry"
    assert {a.found_by for a in found.annotations} == {how.get(case, "reference")}


def test_slices_against_the_order_of_their_names_are_exact(tmp_path: Path) -> None:
    """Neither file names nor instance numbers say where a slice is."""
    positions = [9.0, 0.0, 27.0, 3.0, 18.0, 6.0, 21.0, 12.0, 24.0, 15.0]
    phantom = make_rtstruct_series(tmp_path / "phantom", positions=positions)

    assert assert_exact(phantom).problems == ()


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_a_contour_outside_the_volume_moves_nowhere(
    orientation: tuple[float, ...], tmp_path: Path
) -> None:
    """Far above, just above and just below the volume: reported, and the masks are as before."""
    normal = normal_of(orientation)
    inner = to_patient(ellipse(40, 32, 16, 13), [-50, -40, 30, *orientation, 1, 1])
    extra = [ExtraContour("disc", inner + normal * height) for height in (1000, 30, -3, -1.5)]
    phantom = make_rtstruct_series(
        tmp_path / "phantom", image_orientation_patient=orientation, extra=extra
    )
    found = assert_exact(phantom)

    assert [problem.reason for problem in found.problems] == [Reason.CONTOUR_WITHOUT_IMAGE]
    assert "4 of 10 contours of 'disc' lie on no image" in found.problems[0].detail


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_a_tilted_contour_is_refused_and_costs_nothing_else(
    orientation: tuple[float, ...], tmp_path: Path
) -> None:
    """A contour whose points are not in one plane is no outline on any slice."""
    flat = to_patient(ellipse(40, 32, 16, 13), [-50, -40, 30, *orientation, 1, 1])
    heights = np.linspace(0.0, 6.0, len(flat))[:, None]
    extra = [ExtraContour("disc", flat + normal_of(orientation) * (9.0 + heights))]
    phantom = make_rtstruct_series(
        tmp_path / "phantom", image_orientation_patient=orientation, extra=extra
    )
    found = assert_exact(phantom)

    assert [problem.reason for problem in found.problems] == [Reason.BAD_CONTOUR]
    assert "tilted: spread over 6 mm" in found.problems[0].detail


def test_contours_a_little_off_their_slice_lie_on_it(tmp_path: Path) -> None:
    """Up to a quarter of the slice distance; 0.06 mm was met in real data."""
    phantom = make_rtstruct_series(tmp_path / "phantom", structures={})
    points = [
        to_patient(ellipse(30, 30, 9.3, 9.3), phantom.planes[k]) + np.array([0, 0, off])
        for k, off in ((2, 0.06), (3, -0.74), (4, 0.74), (5, 0.76))
    ]
    near = make_rtstruct_series(
        tmp_path / "near", structures={}, extra=[ExtraContour("A", ring) for ring in points]
    )
    found, masks = convert(near)

    assert np.flatnonzero(masks.any(axis=(1, 2))).tolist() == [2, 3, 4]
    assert "1 of 4" in found.problems[0].detail


def off_the_volume() -> list[ExtraContour]:
    """Contours out of the volume and one that is tilted, to be left out."""
    inner = to_patient(ellipse(40, 32, 16, 13), [-50, -40, 30, *AXIAL, 1, 1])
    rings = [inner + np.array([0.0, 0.0, height]) for height in (1000, 30, -3)]
    rings.append(inner + np.linspace([0.0, 0.0, 9.0], [0.0, 0.0, 15.0], len(inner)))
    return [ExtraContour("disc", ring) for ring in rings]


@pytest.fixture(scope="module")
def one_tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Phantom], Path]:
    """All cases as patients of one tree, and the file that it was converted to."""
    root = tmp_path_factory.mktemp("tree")
    extra: dict[str, Any] = {"extra": off_the_volume()}
    solids: dict[str, Any] = {
        "shape": SMALL,
        "structures": {solid.name: solid.rings(SMALL[0]) for solid in conformance_solids(SMALL)},
    }
    cases = CASES | {"contours off the volume": extra, "solids": solids}
    phantoms = {
        case: make_rtstruct_series(root / case, patient_id=case, seed=number, **how)
        for number, (case, how) in enumerate(cases.items())
    }
    cohort = scan_cohort(root)
    output = tmp_path_factory.mktemp("converted") / "out.h5"
    convert_cohort(cohort, output, options=ConvertOptions(keep_identity=True, codec="none"))
    return phantoms, output


@pytest.mark.parametrize("case", [*CASES, "contours off the volume", "solids"])
def test_files_are_exact_in_every_geometry(
    case: str, one_tree: tuple[dict[str, Phantom], Path]
) -> None:
    """The finished file has every voxel of every case, and images and masks of one slice."""
    phantoms, output = one_tree
    phantom = phantoms[case]
    truth = {structure: phantom.truth(structure) for structure in phantom.structures}
    with open_dataset(output) as dataset:
        paths = dataset.column("source_path").tolist()
        origins = (-dataset.column("grid_origin")).astype(int)
        for k, path in enumerate(phantom.image_paths):
            row = paths.index(f"{case}/{path}".encode())
            top, left = origins[row]
            box = slice(top, top + phantom.rows), slice(left, left + phantom.columns)
            image = pydicom.dcmread(Path(phantom.directory, path)).pixel_array
            np.testing.assert_array_equal(dataset.images[row][box], image)
            for bit, structure in enumerate(dataset.structures):
                mask = mask_of(dataset.masks[row].astype(np.uint64), bit)
                assert mask.sum() == mask[box].sum()
                if structure in truth:
                    np.testing.assert_array_equal(mask[box], truth[structure][k])
                else:
                    assert not mask.any()


def assert_conforms(directory: Path, shape: tuple[int, int, int]) -> None:
    """Seven solids come out as their analytic bodies."""
    solids = conformance_solids(shape)
    phantom = make_rtstruct_series(
        directory,
        shape=shape,
        structures={solid.name: solid.rings(shape[0]) for solid in solids},
        geometric_types=dict.fromkeys(("torus", "straw"), "CLOSEDPLANAR_XOR"),
    )
    found, masks = convert(phantom)

    assert [a.name for a in found.annotations] == [solid.name for solid in solids]
    assert found.problems == ()
    for bit, solid in enumerate(solids):
        mask = mask_of(masks, bit)
        assert dice(mask, solid.voxels(shape)) >= 0.99
        if solid.name == "cube":
            assert mask.sum() == round((2 * 0.4 * min(shape)) ** 3)


def test_seven_solids_conform_on_a_small_grid(tmp_path: Path) -> None:
    """Cube without error; sphere, cylinder, torus, cone, straw and pillars with Dice >= 0.99."""
    assert_conforms(tmp_path / "phantom", SMALL)


@pytest.mark.slow
def test_seven_solids_conform_at_full_size(tmp_path: Path) -> None:
    """The same at 512 x 512 x 200."""
    assert_conforms(tmp_path / "phantom", (200, 512, 512))


def test_solids_have_their_analytic_volumes() -> None:
    """The bodies that masks are compared with are what their names say."""
    shape = (100, 120, 120)
    size = 0.4 * 100
    volumes = {
        "cube": 8 * size**3,
        "sphere": 4 / 3 * np.pi * size**3,
        "cylinder": np.pi * (0.6 * size) ** 2 * 2 * size,
        "torus": 2 * np.pi**2 * 0.6 * size * (0.3 * size) ** 2,
        "cone": np.pi / 3 * size**2 * 2 * size,
        "straw": np.pi * (0.6 * size) ** 2 * (1 - 0.36) * 2 * size,
        "pillars": 4 * np.pi * (0.3 * size) ** 2 * 2 * size,
    }
    for solid in conformance_solids(shape):
        assert solid.voxels(shape).sum() == pytest.approx(volumes[solid.name], rel=0.004)


@given(
    st.lists(
        st.tuples(*(st.integers(-40, 240).map(lambda n: n / 16) for _ in range(2))), max_size=9
    )
)
def test_truth_is_exact_parity(ring: list[tuple[float, float]]) -> None:
    """The phantoms' own truth equals parity in rational arithmetic, centres on edges included."""
    points = np.array(ring, np.float64).reshape(-1, 2)
    expected = exact.mask([ring], (12, 14))
    found = parity_mask(points, (12, 14))

    # a crossing that float64 rounds across a centre is no error of the rule
    assert np.count_nonzero(found != expected) <= 1


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    """A phantom follows from its arguments; another seed changes UIDs and noise."""
    one, same, other = (
        make_rtstruct_series(tmp_path / str(k), seed=seed, shape=(3, 16, 16))
        for k, seed in enumerate((1, 1, 2))
    )
    for path in (*one.image_paths, one.structure_set_path):
        content = Path(one.directory, path).read_bytes()
        assert content == Path(same.directory, path).read_bytes()
        assert content != Path(other.directory, path).read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"references": "some"}, "references 'some'"),
        ({"modality": "XX"}, "modality 'XX'"),
        ({"positions": [0.0, 1.0]}, "2 positions for 10 slices"),
    ],
)
def test_impossible_phantoms_are_refused(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """What cannot be made is said before anything is written."""
    with pytest.raises(ConfigurationError, match=message):
        make_rtstruct_series(tmp_path / "phantom", **wrong)

    assert not list(tmp_path.iterdir())
