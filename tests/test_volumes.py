"""Order and hygiene of series: against a slow twin, against real headers, and case by case."""

import os
import time
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_dicomseg.records import Reason, SliceTable
from parallel_dicomseg.volumes import gap_before, natural_key, order_volumes

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
WIDTHS = {"image_position_patient": 3, "image_orientation_patient": 6, "pixel_spacing": 2}
WIDTHS |= {"value_range": 2}
DEFAULTS = {
    "patient_id": b"P1",
    "number_of_frames": 1,
    "file_size": 1000,
    "rows": 64,
    "columns": 64,
    "image_type": b"ORIGINAL\\PRIMARY\\AXIAL",
    "modality": b"MR",
    "study_instance_uid": b"1.1",
    "series_instance_uid": b"1.2",
    "instance_number": -1,
    "acquisition_number": -1,
    "temporal_position": np.nan,
    "image_orientation_patient": AXIAL,
    "volume": -1,
}


def table(n, **columns):
    """A SliceTable of n usual images in one folder, with some columns given."""
    made = {"path": [f"a/{k:04}.dcm".encode() for k in range(n)], "sop_instance_uid": b""}
    made["image_position_patient"] = [(0.0, 0.0, 2.0 * k) for k in range(n)]
    made |= DEFAULTS | columns
    texts = {field.name for field in fields(SliceTable) if field.type == "Bytes"}
    arrays = {}
    for name in (field.name for field in fields(SliceTable)):
        shape = (n, WIDTHS[name]) if name in WIDTHS else (n,)
        value = np.asarray(made.get(name, b"" if name in texts else 0))
        if value.size and value.dtype.kind == "S" and value.dtype.itemsize == 0:
            value = value.astype("S1")
        arrays[name] = np.broadcast_to(value, shape).copy()
    return SliceTable(**arrays)


def axial(*heights):
    """Positions of axial images at the given z."""
    return [(0.0, 0.0, float(z)) for z in heights]


def volumes_of(images):
    """The ordered volumes as lists of rows of the table given."""
    ordered = order_volumes(images)
    rows = zip(ordered.volume.tolist(), ordered.index.tolist(), strict=True)
    return [[row for _, row in members] for _, members in groupby(rows, key=lambda pair: pair[0])]


def details(images, reason=Reason.SERIES_IRREGULAR):
    """What is reported with one reason."""
    return [p.detail for p in order_volumes(images).problems if p.reason == reason]


# The slow, obvious twin


def chained(rows, value, tolerance):
    """Cut rows, in order of their value, where neighbours are farther apart than the tolerance."""
    groups = []
    for row in sorted(rows, key=lambda r: (value(r), r)):
        if groups and value(row) - value(groups[-1][-1]) <= tolerance:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def by_first(groups):
    """Groups in the order of their first member."""
    return sorted(groups, key=min)


def grouped(rows, key):
    """Lists of rows with one key, in the order of their first member."""
    found = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def order_slowly(images):
    """Volumes as lists of rows; follows docs/cohort.md sentence by sentence."""
    sop, patient = images.sop_instance_uid.tolist(), images.patient_id.tolist()
    by_path = sorted(range(len(images)), key=lambda r: (images.path[r], images.frame[r]))
    seen, kept = {}, []
    for row in by_path:
        first = seen.setdefault((patient[row], sop[row]), images.path[row])
        if not sop[row] or first == images.path[row]:
            kept.append(row)
    place = {row: k for k, row in enumerate(kept)}

    def series_key(row):
        uid = images.series_instance_uid[row]
        return patient[row], uid or ("folder", os.path.dirname(images.path[row]))

    studies = [(patient[row], images.study_instance_uid[row]) for row in kept]
    series = grouped(kept, series_key)
    series.sort(
        key=lambda rows: (
            natural_key(patient[rows[0]].decode()),
            studies.index(studies[place[rows[0]]]),
            place[rows[0]],
        )
    )
    return [volume for rows in series for volume in volumes_slowly(images, rows, place)]


def volumes_slowly(images, series, place):
    """The volumes of one series, whose rows are in path order."""
    position, orientation = images.image_position_patient, images.image_orientation_patient
    image_type = [bytes(value).split(b"\\") for value in images.image_type]

    def is_localizer(row):
        return image_type[row][2:3] == [b"LOCALIZER"] or b"SCOUT" in images.image_type[row]

    def is_placed(row):
        return not np.isnan(position[row]).any() and not np.isnan(orientation[row]).any()

    stacks = []
    for rows in grouped(series, lambda r: (is_localizer(r), is_placed(r))):
        parts = [rows]
        for k in range(6 if is_placed(rows[0]) else 0):
            parts = [p for part in parts for p in chained(part, lambda r: orientation[r][k], 1e-3)]  # noqa: B023
        for part in parts:
            stacks += grouped(
                sorted(part, key=place.get), lambda r: (images.rows[r], images.columns[r])
            )
    volumes = []
    for stack in sorted(stacks, key=lambda rows: place[rows[0]]):
        if is_placed(stack[0]):
            volumes += placed_volumes(images, stack, place)
        else:
            volumes.append(sorted(stack, key=lambda r: (images.instance_number[r], place[r])))
    return volumes


def placed_volumes(images, stack, place):
    """The k-th images of all positions, for each k."""
    first = images.image_orientation_patient[stack[0]]
    normal = np.cross(first[:3], first[3:])

    def height(row):
        return float(images.image_position_patient[row] @ normal)

    def time_key(row):
        temporal = images.temporal_position[row]
        numbers = images.acquisition_number[row], images.instance_number[row]
        return np.isnan(temporal), 0.0 if np.isnan(temporal) else temporal, *numbers, place[row]

    spots = [sorted(spot, key=time_key) for spot in chained(stack, height, 1e-3)]
    return [[spot[k] for spot in spots if k < len(spot)] for k in range(max(map(len, spots)))]


nan3 = (np.nan,) * 3
rows_of_tables = st.lists(
    st.fixed_dictionaries(
        {
            "path": st.sampled_from([b"a/1", b"a/2", b"b/1", b"b/2", b"c", b"a-b/3"]),
            "patient_id": st.sampled_from([b"P1", b"P2", b"P10"]),
            "study_instance_uid": st.sampled_from([b"1", b"2"]),
            "series_instance_uid": st.sampled_from([b"", b"7", b"8"]),
            "sop_instance_uid": st.sampled_from([b"", b"x", b"y"]),
            "image_type": st.sampled_from([b"", b"A\\B\\LOCALIZER", b"A\\B\\AXIAL", b"SCOUT"]),
            "rows": st.sampled_from([64, 32]),
            "image_position_patient": st.sampled_from(
                [(0, 0, 0), (0, 0, 1), (0, 1, 5e-4), (0, 3, 2), (0, 0, -7), nan3]
            ),
            "image_orientation_patient": st.sampled_from(
                [AXIAL, CORONAL, (1.0, 0.0, 0.0, 0.0, 1.0, 1e-4), (np.nan,) * 6]
            ),
            "temporal_position": st.sampled_from([np.nan, 1.0, 2.0]),
            "acquisition_number": st.sampled_from([-1, 1, 2]),
            "instance_number": st.integers(-1, 4),
        }
    ),
    min_size=1,
    max_size=24,
)


def built(rows):
    """A table whose frames count within each path; patient and instance are the file's."""
    frames = {}
    for row in rows:
        first = frames.setdefault(row["path"], [])
        row["frame"] = len(first)
        if first:
            row |= {name: first[0][name] for name in ("patient_id", "sop_instance_uid")}
        first.append(row)
    return table(len(rows), **{name: [row[name] for row in rows] for name in rows[0]})


@settings(max_examples=400)
@given(rows_of_tables)
def test_volumes_are_those_of_the_slow_twin(rows):
    """Any mixture of series, times, orientations and copies: the same rows in the same volumes."""
    images = built(rows)

    assert volumes_of(images) == order_slowly(images)


@given(rows_of_tables, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_the_order_of_the_scan(rows, random):
    """Shuffled input gives the same images, volumes and problems."""
    images = built(rows)
    shuffled = list(range(len(images)))
    random.shuffle(shuffled)

    one, two = order_volumes(images), order_volumes(images.take(np.array(shuffled)))

    assert [shuffled[row] for row in two.index] == one.index.tolist()
    assert two.volume.tolist() == one.volume.tolist()
    assert two.localizer.tolist() == one.localizer.tolist()
    assert two.problems == one.problems


@given(rows_of_tables)
def test_every_file_is_kept_or_named(rows):
    """What is not in the order is a copy that a problem names; volumes are contiguous."""
    images = built(rows)

    ordered = order_volumes(images)

    kept = set(images.path[ordered.index].tolist())
    copies = {p.path.encode() for p in ordered.problems if p.reason in {"duplicate", "repeated"}}
    assert set(images.path.tolist()) - kept <= copies
    assert np.unique(ordered.index).size == ordered.index.size
    assert set(np.diff(ordered.volume).tolist()) <= {0, 1}
    assert ordered.volume[:1].tolist() == [0] * bool(len(ordered.index))


def test_nothing_gives_nothing():
    """An empty scan has an empty order."""
    ordered = order_volumes(table(1).take(slice(0)))

    assert (len(ordered.index), len(ordered.volume), ordered.problems) == (0, 0, ())
    assert gap_before(table(1).take(slice(0))).tolist() == []


def test_position_decides_not_name_or_number():
    """Slices run along the normal even where names and numbers run against it."""
    images = table(4, image_position_patient=axial(9, 6, 3, 0), instance_number=[1, 2, 3, 4])

    assert volumes_of(images) == [[3, 2, 1, 0]]
    assert details(images) == []


def test_patients_are_in_natural_order_and_series_by_their_first_file():
    """P2 comes before P10; of a patient's series the one whose file comes first."""
    images = table(
        4,
        patient_id=[b"P10", b"P2", b"P2", b"P2"],
        series_instance_uid=[b"1", b"9", b"5", b"9"],
    )

    assert volumes_of(images) == [[1, 3], [2], [0]]


def test_one_series_uid_under_two_patients_is_two_series():
    """The UID alone does not join two patients."""
    images = table(4, patient_id=[b"A", b"B", b"A", b"B"])

    assert volumes_of(images) == [[0, 2], [1, 3]]


def test_images_without_a_series_are_one_series_per_folder():
    """An empty Series Instance UID falls back on the folder."""
    paths = [b"x/1", b"x/2", b"x/y/1", b"1", b"2"]
    images = table(5, path=paths, series_instance_uid=b"")

    assert volumes_of(images) == [[3, 4], [0, 1], [2]]


def test_cine_is_spread_over_volumes():
    """20 images at each of 3 positions are 20 volumes of 3, by trigger time."""
    phase, slot = np.divmod(np.arange(60), 3)
    images = table(
        60,
        image_position_patient=axial(*(slot * 8.0)),
        temporal_position=1000.0 - phase,
        instance_number=np.arange(60),
    )

    volumes = volumes_of(images)

    assert volumes == [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(19, -1, -1)]
    assert details(images) == ["cine: 3 position(s) x 20 images: 20 volumes"]


def test_uneven_counts_at_positions_are_reported_with_numbers():
    """Four images at one z and one elsewhere: four volumes, the first of them complete."""
    images = table(6, image_position_patient=axial(0, 2, 2, 2, 2, 4), instance_number=range(6))

    assert volumes_of(images) == [[0, 1, 5], [2], [3], [4]]
    assert details(images) == [
        "6 images at 3 positions, 1 to 4 at each: 4 volumes, not all complete"
    ]


def test_orientation_in_its_last_digits_is_one_volume():
    """Cosines that differ by rounding do not split a series, and the normal is the first one's."""
    orientation = [AXIAL, (1.0, 0.0, 1e-6, 0.0, 1.0, 0.0), (0.9995, 0.0, 0.0, 0.0, 1.0, 0.0)]

    assert volumes_of(table(3, image_orientation_patient=orientation)) == [[0, 1, 2]]


def test_mixed_orientations_and_sizes_are_volumes_of_their_own():
    """Both values are named; the series stays together."""
    images = table(
        4,
        image_orientation_patient=[AXIAL, CORONAL, AXIAL, CORONAL],
        image_position_patient=[(0, 0, 0), (0, 0, 0), (0, 0, 3), (0, 5, 0)],
        rows=[64, 64, 64, 32],
    )

    assert volumes_of(images) == [[0, 2], [1], [3]]
    assert details(images) == [
        (
            "2 different (0020,0037) Image Orientation (Patient) in the series, first "
            "1 0 0 0 1 0 and 1 0 0 0 0 -1; 2 different sizes in the series, first 64 x 64 and "
            "32 x 64: each is a volume of its own"
        )
    ]


def test_images_without_position_are_in_order_of_their_numbers():
    """One volume, one report; a single image without position is nothing to report."""
    images = table(3, image_position_patient=nan3, instance_number=[3, 1, 2])

    assert volumes_of(images) == [[1, 2, 0]]
    assert ["3 of 3 images" in detail for detail in details(images)] == [True]
    assert details(table(1, image_position_patient=nan3)) == []


@pytest.mark.parametrize(
    "orientation",
    [(0.0,) * 6, (1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (np.inf,) * 6, (1e300,) * 6],
    ids=["zero", "parallel", "infinite", "huge"],
)
def test_an_impossible_orientation_is_none(orientation):
    """Such images are ordered by number, without a warning from the arithmetic."""
    images = table(2, image_orientation_patient=orientation, instance_number=[2, 1])

    assert volumes_of(images) == [[1, 0]]
    assert gap_before(images).tolist() == [False, False]


def test_frames_of_one_file_are_rows_like_any_other():
    """Frames of a multi-frame file are placed one by one."""
    images = table(3, path=b"m.dcm", frame=[0, 1, 2], image_position_patient=axial(4, 0, 2))

    assert volumes_of(images) == [[1, 2, 0]]


def test_localizers_are_volumes_of_their_own_and_flagged():
    """By the third value of Image Type, or SCOUT; one report per series, no other about them."""
    kinds = [b"ORIGINAL\\PRIMARY\\LOCALIZER", b"DERIVED\\SECONDARY\\AXIAL", b"X\\Y\\CT_SCOUT"]
    images = table(
        4, image_type=[*kinds, b"ORIGINAL\\LOCALIZER"], image_position_patient=axial(0, 1, 0, 2)
    )

    ordered = order_volumes(images)

    assert volumes_of(images) == [[0], [2], [1, 3]]
    assert ordered.localizer.tolist() == [True, True, False, False]
    assert [(p.path, p.reason) for p in ordered.problems] == [("a/0000.dcm", Reason.LOCALIZER)]
    assert ordered.problems[0].detail.startswith("2 of 4 images")
    assert not ordered.problems[0].is_rejection


def test_an_exact_copy_is_repeated_and_harmless():
    """Same instance, size and header: the first path stays, the other is told."""
    ordered = order_volumes(
        table(3, sop_instance_uid=[b"1", b"1", b""], image_position_patient=axial(0, 0, 2))
    )

    assert ordered.index.tolist() == [0, 2]
    assert [(p.path, p.reason) for p in ordered.problems] == [("a/0001.dcm", Reason.REPEATED)]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("bits_stored", [16, 16, 12], "bits_stored 12 instead of 16"),
        ("rescale_slope", [1.0, 1.0, 2.5], "rescale_slope 2.5 instead of 1"),
        ("photometric_interpretation", [b"M2", b"M2", b"M1"], "another photometric_interpretation"),
        ("rows", [64, 64, 32], "rows 32 instead of 64"),
        (
            "image_position_patient",
            [(0, 0, 0), (0, 0, 0), (0, 0, 1.5)],
            "image_position_patient 0 0 1.5 instead of 0 0 0",
        ),
        ("frame_of_reference_uid", [b"1", b"1", b"2"], "another frame_of_reference_uid"),
    ],
)
def test_a_copy_that_differs_is_a_rejection(column, values, said):
    """The first path stays, the copy is rejected with the numbers, never with a UID's value."""
    images = table(
        3, **({"sop_instance_uid": b"1", "image_position_patient": nan3} | {column: values})
    )

    ordered = order_volumes(images)

    found = {p.path: p for p in ordered.problems if p.reason != Reason.SERIES_IRREGULAR}
    assert ordered.index.tolist() == [0]
    assert found["a/0001.dcm"].reason == Reason.REPEATED
    assert found["a/0002.dcm"].reason == Reason.DUPLICATE
    assert found["a/0002.dcm"].is_rejection
    assert found["a/0002.dcm"].detail.endswith(f"but {said}")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"file_size": [1000, 999]}, "the same header, 999 bytes instead of 1000"),
        ({"transfer_syntax_uid": [b"1", b"2"]}, "the same header in another encoding"),
        ({"pixel_length": [8192, -1]}, "the same size and header"),
        (
            {"samples_per_pixel": 3, "photometric_interpretation": [b"RGB", b"YBR_RCT"]},
            "the same size and header",
        ),
    ],
)
def test_one_image_written_down_in_another_way_is_harmless(columns, said):
    """Encoding, size and colour transform say nothing about what the image shows."""
    images = table(2, sop_instance_uid=b"1", image_position_patient=axial(0, 0), **columns)

    ordered = order_volumes(images)

    assert ordered.index.tolist() == [0]
    assert [(p.path, p.reason) for p in ordered.problems] == [("a/0001.dcm", Reason.REPEATED)]
    assert said in ordered.problems[0].detail


def test_of_two_encodings_the_one_that_needs_no_decoder_is_used():
    """JPEG 2000 comes first by name, the plain file is kept, and slices stay in path order."""
    j2k, plain = b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.1"
    images = table(
        4,
        sop_instance_uid=[b"1", b"2", b"1", b"3"],
        transfer_syntax_uid=[j2k, j2k, plain, plain],
        image_position_patient=axial(0, 2, 0, 4),
    )

    ordered = order_volumes(images)

    assert ordered.index.tolist() == [2, 1, 3]
    assert [(p.path, p.reason) for p in ordered.problems] == [("a/0000.dcm", Reason.REPEATED)]


def test_a_copied_multi_frame_file_is_one_problem():
    """Frames of one file are no copies of each other, and a file with other frames differs."""
    paths, frames = [b"a"] * 2 + [b"b"] * 2 + [b"c"], [0, 1, 0, 1, 2]
    images = table(5, path=paths, frame=frames, sop_instance_uid=b"1", image_position_patient=nan3)

    ordered = order_volumes(images)

    assert ordered.index.tolist() == [0, 1]
    found = [(p.path, p.reason) for p in ordered.problems if p.reason != Reason.SERIES_IRREGULAR]
    assert found == [("b", Reason.REPEATED), ("c", Reason.DUPLICATE)]


def test_one_image_under_two_patients_is_kept_and_told():
    """Nobody can say whose it is, so both stay, and the second one's series is named."""
    ordered = order_volumes(table(2, patient_id=[b"A", b"B"], sop_instance_uid=b"1"))

    assert len(ordered.index) == 2
    assert [(p.path, p.reason) for p in ordered.problems] == [("a/0001.dcm", Reason.REPEATED)]
    assert "1 of 1 images" in ordered.problems[0].detail


def test_several_studies_in_a_series_stay_together():
    """A series whose images name different studies is one series, and said to be so."""
    images = table(3, study_instance_uid=[b"1", b"2", b"3"])

    assert volumes_of(images) == [[0, 1, 2]]
    assert ["2 of 3 images" in detail for detail in details(images)] == [True]


def test_a_missing_slice_is_a_gap():
    """Median, number and largest distance are named, and the slice after the gap is flagged."""
    images = table(5, image_position_patient=axial(0, 2.1, 4, 8, 10))

    ordered = order_volumes(images)
    flagged = gap_before(with_volumes(images, ordered))

    assert flagged.tolist() == [False, False, False, True, False]
    assert details(images) == [
        (
            "1 of 4 distances between slices are more than 10% off their median of 2 mm; the "
            "largest is 4 mm"
        )
    ]


def with_volumes(images, ordered):
    """The table in order, with its volumes."""
    columns = {field.name: getattr(images, field.name)[ordered.index] for field in fields(images)}
    return SliceTable(**(columns | {"volume": ordered.volume}))


def test_equal_gaps_of_many_volumes_are_one_report():
    """A cine series with a missing position does not fill the list."""
    images = table(
        40, image_position_patient=axial(*[0, 8, 16, 40] * 10), instance_number=range(40)
    )

    assert [detail for detail in details(images) if "distances" in detail] == [
        (
            "1 of 3 distances between slices are more than 10% off their median of 8 mm; the "
            "largest is 24 mm (in 10 volumes)"
        )
    ]


def test_gaps_are_those_of_the_definition():
    """Against plain Python: the lower of the middle distances, 10 % to both sides."""
    random = np.random.default_rng(7)
    heights = [np.cumsum(random.choice([1.0, 1.05, 0.5, 3.0], size)) for size in (1, 2, 3, 8, 9)]
    volume = np.repeat(np.arange(5), [len(h) for h in heights])
    images = table(
        len(volume), image_position_patient=axial(*np.concatenate(heights)), volume=volume
    )
    expected = []
    for positions in heights:
        steps = np.diff(positions)
        middle = np.percentile(steps, 50, method="lower") if len(steps) else 0.0
        expected += [False, *(bool(abs(step - middle) > 0.1 * middle) for step in steps)]

    assert gap_before(images).tolist() == expected
    assert sum(expected) > 3


@pytest.mark.parametrize(("degrees", "told"), [(0.9, False), (1.1, True), (-20.0, True)])
def test_gantry_tilt_is_told_beyond_one_degree(degrees, told):
    """Slices shifted along their own planes are reported with the angle."""
    shift = np.tan(np.radians(degrees))
    positions = [(0.0, 5.0 * k * shift, 5.0 * k) for k in range(6)]

    found = details(table(6, image_position_patient=positions))

    assert [f"{abs(degrees):.1f} degrees" in detail for detail in found] == [True] * told


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_oblique_series_are_projected_on_the_normal(scale):
    """Z alone would give another order in a steep oblique series."""
    row, column = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, -scale])
    normal = np.cross(row, column)
    positions = [tuple(k * normal + [0, 0, (-1) ** k * 1e-5]) for k in (2, 0, 1)]
    images = table(
        3, image_position_patient=positions, image_orientation_patient=[(*row, *column)] * 3
    )

    assert volumes_of(images) == [[1, 2, 0]]


def test_no_report_holds_an_identity():
    """Patient, UIDs and what hides in text columns are in no detail."""
    secret = b"SECRET"
    images = table(
        6,
        patient_id=secret,
        study_instance_uid=[secret + b"1", secret + b"2"] * 3,
        series_instance_uid=secret,
        sop_instance_uid=[secret + b"3"] * 2 + [secret + b"4"] * 2 + [b""] * 2,
        frame_of_reference_uid=[secret + b"5", secret + b"6"] * 3,
        image_type=[b"SECRET\\B\\LOCALIZER"] * 2 + [secret] * 4,
        image_position_patient=axial(0, 1, 2, 3, 9, 9),
    )

    problems = order_volumes(images).problems

    assert len(problems) > 4
    assert not [p for p in problems if "SECRET" in p.detail]


@pytest.mark.slow
def test_half_a_million_images_take_seconds():
    """A cohort of 500 000 shuffled images is ordered without a loop over them."""
    n = 500_000
    series, k = np.divmod(np.random.default_rng(1).permutation(n), 250)
    text = np.char.mod
    images = table(
        n,
        path=np.char.add(text(b"p/%d/", series), text(b"%d.dcm", k)),
        patient_id=text(b"P%d", series // 2),
        study_instance_uid=text(b"1.2.840.113619.2.55.3.604688119.%d", series // 2),
        series_instance_uid=text(b"1.2.840.113619.2.55.3.604688119.9.%d", series),
        sop_instance_uid=np.char.add(text(b"1.2.840.113619.2.5.%d.", series), text(b"%d", k)),
        image_position_patient=np.stack([0.0 * k, 0.0 * k, 3.0 * k], axis=1),
    )

    start = time.perf_counter()
    ordered = order_volumes(images)
    seconds = time.perf_counter() - start

    assert ordered.problems == ()
    assert np.array_equal(series[ordered.index][::250].repeat(250), series[ordered.index])
    assert np.array_equal(k[ordered.index], np.tile(np.arange(250), n // 250))
    assert seconds < 30


# Real headers, read by pydicom


def read_headers(files):
    """A SliceTable of single-frame files through pydicom."""
    import pydicom

    data = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]

    def text(keyword):
        return [str(d.get(keyword, "")).encode() for d in data]

    def numbers(keyword, count):
        return [tuple(map(float, d.get(keyword) or (np.nan,) * count)) for d in data]

    return table(
        len(data),
        path=[os.fsencode(file) for file in files],
        file_size=[Path(file).stat().st_size for file in files],
        rows=[d.Rows for d in data],
        columns=[d.Columns for d in data],
        patient_id=text("PatientID"),
        study_instance_uid=text("StudyInstanceUID"),
        series_instance_uid=text("SeriesInstanceUID"),
        sop_instance_uid=text("SOPInstanceUID"),
        image_type=["\\".join(d.get("ImageType", [])).encode() for d in data],
        instance_number=[int(d.get("InstanceNumber") or -1) for d in data],
        image_position_patient=numbers("ImagePositionPatient", 3),
        image_orientation_patient=numbers("ImageOrientationPatient", 6),
        temporal_position=[float(d.get("TriggerTime") or np.nan) for d in data],
    )


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_sunnybrook_cine_is_20_volumes(shared_data):
    """10 positions x 20 phases with two orientations that differ in the sixth digit."""
    folder = shared_data / "sunnybrook_arterys" / "final_data"
    pictures = [p for p in sorted(folder.rglob("*.dcm")) if "301" in p.parts[-2]]

    ordered = order_volumes(read_headers(pictures))

    cine = [p.detail for p in ordered.problems if "cine" in p.detail]
    assert len(pictures) == 200
    assert cine == ["cine: 10 position(s) x 20 images: 20 volumes"]
    assert np.bincount(ordered.volume).tolist() == [10] * 20


def test_an_oblique_series_is_ordered_like_simpleitk(shared_data):
    """InstanceNumber runs against z here; SimpleITK's reader gives the same order of files."""
    sitk = pytest.importorskip("SimpleITK")
    folder = shared_data / "sts_raw_mr_t2" / "STS_001"
    files = sorted(p for p in folder.rglob("*") if p.is_file() and is_image(p))

    images = read_headers(files)
    ordered = order_volumes(images)

    expected = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent))
    assert [os.fsdecode(p) for p in images.path[ordered.index]] == list(expected)
    assert ordered.problems == ()
    assert len(files) == 40


def is_image(path):
    """Whether a file is a DICOM image, by pydicom."""
    import pydicom

    if not pydicom.misc.is_dicom(path):
        return False
    return "Rows" in pydicom.dcmread(path, stop_before_pixels=True)


def test_a_real_copy_in_another_folder_is_repeated(shared_data):
    """oriented_data/0.dcm lies in one_slice_data as well; its series names three studies."""
    folder = shared_data / "rtstruct_odd" / "rt_utils"
    names = ("oriented_data", "one_slice_data")
    files = sorted(p for name in names for p in folder.rglob(f"{name}/*.dcm") if is_image(p))

    ordered = order_volumes(read_headers(files))

    assert len(files) == 4
    assert len(ordered.index) == 3
    assert {p.reason for p in ordered.problems} == {Reason.REPEATED, Reason.SERIES_IRREGULAR}
    assert any("Study Instance UID" in p.detail for p in ordered.problems)
