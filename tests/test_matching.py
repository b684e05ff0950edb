"""Which slice a plane lies on, and which series an annotation was drawn on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.records import Float64, SliceTable
from parallel_dicomseg.sources.matching import TOLERANCE, Volume, find_volumes, index_images

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def images(*series: dict[str, Any]) -> SliceTable:
    """Series one after another; each has heights and may have other values for all its images."""
    rows = [
        {
            "path": f"{one.get('folder', 'p')}/{number}-{k}.dcm",
            "patient_id": one.get("patient_id", "P"),
            "series_instance_uid": f"1.{number}",
            "sop_instance_uid": f"1.{number}.{k}",
            "frame_of_reference_uid": one.get("frame", "9"),
            "image_position_patient": np.cross(one.get("orientation", AXIAL)[:3],
                                               one.get("orientation", AXIAL)[3:]) * height,
            "image_orientation_patient": one.get("orientation", AXIAL),
            "pixel_spacing": one.get("pixel_spacing", (1.0, 1.0)),
            "slice_thickness": one.get("thickness", 3.0),
            "volume": number,
        }
        for number, one in enumerate(series)
        for k, height in enumerate(one["heights"])
    ]  # fmt: skip
    return tables.slice_table(**{key: [row[key] for row in rows] for key in rows[0]})


def at(*heights: float) -> Float64:
    """Points on the z axis."""
    return np.array([[0.0, 0.0, height] for height in heights])


def find(table: SliceTable, points: Float64, **said: Any) -> Any:
    """What is found where a file says nothing, but for what is given."""
    nothing = {"path": "p/rs.dcm", "patient_id": b"", "frame_of_reference_uid": b""}
    return find_volumes(index_images(table), points, **{**nothing, **said})


def slow_slice(volume: Volume, height: float) -> int:
    """The nearest slice within a quarter of the distance to its nearest neighbour, or -1."""
    positions = volume.positions.tolist()
    nearest = min(range(len(positions)), key=lambda k: abs(positions[k] - height))
    others = [abs(p - positions[nearest]) for k, p in enumerate(positions) if k != nearest]
    distance = min(others, default=3.0)
    off = abs(positions[nearest] - height)
    return int(volume.rows[nearest]) if off <= TOLERANCE * distance else -1


@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=8, unique=True),
    st.lists(st.integers(-60 * 8, 60 * 8).map(lambda n: n / 8 + 1 / 64), max_size=9),
)
def test_planes_lie_on_the_slices_that_a_slow_twin_finds(
    positions: list[int], heights: list[float]
) -> None:
    """Any distances between slices, any planes between and outside them."""
    (volume,) = index_images(images({"heights": positions})).volumes
    found = volume.on_slices(at(*heights).reshape(-1, 3))

    assert found.tolist() == [slow_slice(volume, height) for height in heights]


def test_nothing_snaps_to_the_edge_or_wraps_round() -> None:
    """A plane outside the volume, above or below, near or far, lies on no slice."""
    (volume,) = index_images(images({"heights": [0, 3, 6]})).volumes

    assert volume.on_slices(at(-1000, -3, -0.76, 6.76, 9, 1e9, np.nan)).tolist() == [-1] * 7
    assert volume.on_slices(at(-0.75, 0, 2.25, 3, 6.75)).tolist() == [0, 0, 1, 1, 2]


def test_all_points_of_a_ring_must_lie_on_the_slice() -> None:
    """A ring across the slices lies on none, though its middle does."""
    (volume,) = index_images(images({"heights": [0, 3, 6]})).volumes
    rings = np.stack([at(2.9, 3.1, 3.0), at(0.0, 3.0, 6.0), at(2.0, 3.0, 4.0)])

    assert volume.on_slices(rings).tolist() == [1, -1, -1]


def test_a_lonely_slice_has_its_thickness_around_it() -> None:
    """A quarter of the thickness, of 2 mm where it is unknown."""
    thick, unknown = (
        index_images(images({"heights": [5], "thickness": thickness})).volumes[0]
        for thickness in (8.0, np.nan)
    )
    assert thick.on_slices(at(3.0, 7.0, 7.1)).tolist() == [0, 0, -1]
    assert unknown.on_slices(at(4.5, 5.5, 5.6)).tolist() == [0, 0, -1]


def test_images_without_a_place_are_in_no_volume() -> None:
    """No position, no plane, no spacing: nothing can lie on them."""
    table = images(
        {"heights": [0, 3], "orientation": (1, 0, 0, 1, 0, 0)},
        {"heights": [np.nan, 3]},
        {"heights": [0, 3], "pixel_spacing": (0.0, 1.0)},
    )
    index = index_images(table)

    assert [volume.rows.tolist() for volume in index.volumes] == [[3]]
    assert index.volume_of_row == {3: 0}


TWO = ({"heights": [0, 3, 6]}, {"heights": [0, 3, 6, 9]})


def test_references_go_first_where_the_planes_agree() -> None:
    """By image, by series, in spite of another series with more of the planes."""
    table = images(*TWO)
    by_image = find(table, at(0, 3, 9), sop_instance_uids=[b"1.0.1"])
    by_series = find(table, at(0, 3, 9), series_instance_uids=[b"1.0"])

    for match in (by_image, by_series):
        assert match.found_by == "reference"
        assert match.rows.tolist() == [0, 1, 2]
        assert match.on_slices(at(0, 3, 9)).tolist() == [0, 1, -1]


def test_references_that_do_not_fit_are_not_believed() -> None:
    """Images that are not there, or that none of the planes lie on: the next way is tried."""
    table = images(*TWO)
    gone = find(table, at(9), sop_instance_uids=[b"7"], frame_of_reference_uid=b"9")
    wrong = find(table, at(9), sop_instance_uids=[b"1.0.0"], frame_of_reference_uid=b"9")

    assert [match.found_by for match in (gone, wrong)] == ["frame-of-reference"] * 2
    assert [match.rows.tolist() for match in (gone, wrong)] == [[3, 4, 5, 6]] * 2


def test_the_frame_of_reference_goes_before_the_patient() -> None:
    """Of one patient's series the one in the annotation's frame."""
    table = images({**TWO[0], "frame": "8"}, TWO[1])
    match = find(table, at(0, 3), patient_id=b"P", frame_of_reference_uid=b"8")

    assert (match.found_by, match.rows.tolist()) == ("frame-of-reference", [0, 1, 2])


def test_a_frame_of_reference_is_one_patients() -> None:
    """A UID that a tool gave to everybody does not lead to another patient's images."""
    table = images(TWO[0], {**TWO[1], "patient_id": "Q", "folder": "q"})
    said = {"frame_of_reference_uid": b"9"}

    assert find(table, at(0, 3), **said, patient_id=b"P").rows.tolist() == [0, 1, 2]
    assert find(table, at(0, 9), **said, patient_id=b"P").rows.tolist() == [0, 1, 2]
    assert find(table, at(0, 3), **said, patient_id=b"R") is None
    assert find(table, at(0, 9), **said).rows.tolist() == [3, 4, 5, 6]


def test_patients_with_the_same_uids_keep_their_own_images() -> None:
    """Copies of one series under two names: each annotation lies on its own patient's."""
    table = images(TWO[0], {**TWO[0], "patient_id": "Q", "folder": "q"})
    for column in (table.series_instance_uid, table.sop_instance_uid):
        column[3:] = column[:3]
    said = {"sop_instance_uids": [b"1.0.1"], "series_instance_uids": [b"1.0"]}

    for patient, rows in ((b"P", [0, 1, 2]), (b"Q", [3, 4, 5])):
        match = find(table, at(0, 3), **said, patient_id=patient)
        assert (match.rows.tolist(), match.found_by, match.rivals) == (rows, "reference", 0)
    # of neither: UIDs are believed, but not twice
    assert find(table, at(0, 3), **said, patient_id=b"R", path="x/rs.dcm").rivals == 1


def test_geometry_keeps_to_the_patient() -> None:
    """Another patient's images fit, and are not taken."""
    table = images({**TWO[0], "patient_id": "Q"}, {**TWO[1], "folder": "q"})

    assert find(table, at(0, 3), patient_id=b"Q").rows.tolist() == [0, 1, 2]
    assert find(table, at(0, 3), patient_id=b"R") is None


def test_without_a_patient_the_folder_decides() -> None:
    """An annotation, or images, without PatientID: only what lies in the same folder."""
    table = images({**TWO[0], "folder": "a"}, {**TWO[1], "folder": "b", "patient_id": ""})

    assert find(table, at(0), path="a/rs.dcm").rows.tolist() == [0, 1, 2]
    assert find(table, at(0), path="b/rs.dcm", patient_id=b"R").rows.tolist() == [3, 4, 5, 6]
    assert find(table, at(0), path="c/rs.dcm") is None


def test_most_planes_then_most_references_then_the_nearest_folder() -> None:
    """Series of one frame: planes decide, then images referred to, then the place in the tree."""
    table = images({**TWO[0], "folder": "x/a/image"}, {**TWO[1], "folder": "x/b/image"})
    said = {"frame_of_reference_uid": b"9", "path": "x/a/mask/rs.dcm"}
    both = [b"1.0.0", b"1.1.0", b"1.1.1"]

    assert find(table, at(0, 9), **said).rows.tolist() == [3, 4, 5, 6]
    assert find(table, at(0, 3), **said, sop_instance_uids=both).rows.tolist() == [3, 4, 5, 6]
    near = find(table, at(0, 3), **said)
    assert (near.rows.tolist(), near.rivals) == ([0, 1, 2], 0)


def test_rivals_are_counted() -> None:
    """Where nothing decides between series, the match says how many others fit as well."""
    table = images(TWO[0], TWO[0], TWO[0])

    assert find(table, at(0, 3), patient_id=b"P").rivals == 2


def test_series_that_are_referred_to_and_share_no_plane_are_no_rivals() -> None:
    """Two slabs with a plane each; where none is referred to, nobody can say."""
    table = images({"heights": [0, 3]}, {"heights": [30, 33]}, {"heights": [31.5, 33]})
    uids = [b"1.0.1", b"1.1.0"]

    assert find(table, at(0, 30), sop_instance_uids=uids).rivals == 0
    assert find(table, at(0, 33), sop_instance_uids=[*uids, b"1.2.0"]).rivals == 0
    assert find(table, at(33), sop_instance_uids=[b"1.1.0", b"1.2.0"]).rivals == 1
    assert find(table, at(0, 30), patient_id=b"P").rivals == 1


def test_a_tilted_series_does_not_fit_a_normal() -> None:
    """One point of an axial ring may lie on a sagittal slice; its normal says that it does not."""
    table = images({"heights": [0, 3, 6], "orientation": SAGITTAL})

    assert find(table, at(1), patient_id=b"P").rows.tolist() == [0, 1, 2]
    assert find(table, at(1), patient_id=b"P", normal=np.array([0.0, 0.0, 1.0])) is None
    assert find(table, at(1), patient_id=b"P", normal=np.array([1.0, 0.0, 0.0])) is not None


def test_several_volumes_of_a_series_are_one_match() -> None:
    """Two stacks of one series: each plane lies on the stack that has it."""
    table = images({"heights": [0, 3]}, {"heights": [30, 33]})
    table.series_instance_uid[:] = b"1.0"
    match = find(table, at(0, 33, 16), patient_id=b"P")

    assert (match.rivals, match.rows.tolist()) == (0, [0, 1, 2, 3])
    assert match.on_slices(at(0, 33, 16)).tolist() == [0, 3, -1]


@pytest.mark.parametrize("points", [np.empty((0, 3)), at(100)])
def test_nothing_is_found_where_nothing_lies_on_a_slice(points: Float64) -> None:
    """Neither for an annotation without planes nor for one whose planes are elsewhere."""
    assert find(images(*TWO), points, patient_id=b"P", sop_instance_uids=[b"1.0.0"]) is None
