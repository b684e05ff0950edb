"""LIDC XML: the counts of real files, the meaning of an outline, pairing, and broken files."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_dicomseg.limits import applied
from parallel_dicomseg.records import (
    AnnotationRefs,
    Limits,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources import lidc

FILES = ("157/158.xml", "188/262.xml", "189/107.xml")
SQUARE = (
    (1, 1),
    (2, 1),
    (3, 1),
    (4, 1),
    (4, 2),
    (4, 3),
    (4, 4),
    (3, 4),
    (2, 4),
    (1, 4),
    (1, 3),
    (1, 2),
)

# --- helpers -------------------------------------------------------------------------------------


def scanned(*paths):
    """Files as the scan hands them on."""
    return [ScannedFile(path, "", 0) for path in paths]


VECTORS = {
    "image_position_patient": (0.0, 0.0, 0.0),
    "image_orientation_patient": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "pixel_spacing": (1.0, 1.0),
    "value_range": (0.0, 1.0),
}


def slice_table(n, **columns):
    """A table of n axial images, with some columns given; the others are 0, or their file k.dcm."""
    given = (
        {
            "patient_id": b"",
            "frame_of_reference_uid": b"",
            "path": np.array([f"{k}.dcm".encode() for k in range(n)]),
        }
        | VECTORS
        | columns
    )
    return SliceTable(
        **{
            field.name: np.broadcast_to(
                np.asarray(given.get(field.name, 0)),
                (n, len(VECTORS[field.name])) if field.name in VECTORS else (n,),
            ).copy()
            for field in fields(SliceTable)
        }
    )


def images_of(reading, **changed):
    """A CT with an image for each plane of a file and one between each two, sorted by z."""
    marked = (mark.plane for mark in reading.marks)
    planes = sorted({(z, uid) for uid, z in (*reading.planes, *marked)})
    heights = [z for z, _ in planes]
    between = [(a + b) / 2 for a, b in pairwise(heights) if b - a > 1e-3]
    rows = sorted([*planes, *((z, b"") for z in between)])
    uids = [uid or f"9.{k}".encode() for k, (_, uid) in enumerate(rows)]
    columns = {
        "sop_instance_uid": np.array(uids),
        "series_instance_uid": reading.series_instance_uid,
        "study_instance_uid": reading.study_instance_uid,
        "image_position_patient": [(-150.0, -160.0, z) for z, _ in rows],
        "rows": 512,
        "columns": 512,
        "slice_thickness": 1.25,
    }
    return slice_table(len(rows), **columns | changed)


def read_all(root, found, images):
    """(annotations, n) masks by annotation and slice, and what `read` gave."""
    rows = sorted(
        (int(row), s, a.path, int(offset), int(length))
        for s, a in enumerate(found.annotations)
        for row, offset, length in zip(a.slice, a.offset, a.length, strict=True)
    )
    plane, structure, path, offset, length = zip(*rows, strict=True) if rows else ((),) * 5
    n = len(rows)
    refs = AnnotationRefs(plane, structure, (0,) * n, ("lidc",) * n, path, offset, length)
    drawn = lidc.read(str(root), slice_refs(images), refs, contour_origin=0.0)
    return {(b.structure, b.plane): b.mask for b in drawn.bitmaps}, drawn


def slice_refs(images):
    """References to every image."""
    n = len(images)
    return SliceRefs(
        path=("",) * n,
        frame=(0,) * n,
        file_size=(0,) * n,
        pixel_offset=(-1,) * n,
        pixel_length=(-1,) * n,
        stored_dtype=("",) * n,
        bits_stored=(16,) * n,
        rescale_slope=(1.0,) * n,
        rescale_intercept=(0.0,) * n,
        rows=tuple(images.rows.tolist()),
        columns=tuple(images.columns.tolist()),
        photometric_interpretation=("MONOCHROME2",) * n,
        plane_geometry=((0.0,) * 11,) * n,
        grid=((0.0, 0.0, 1.0, 1.0),) * n,
        annotated=(0,) * n,
    )


def roi(points, z=0.0, uid="8.0", inclusion="TRUE"):
    """One region as XML."""
    edges = "".join(
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points
    )
    return (
        f"<roi><imageZposition>{z}</imageZposition><imageSOP_UID>{uid}</imageSOP_UID>"
        f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    )


def message(*sessions, series="8", study="7", head=""):
    """A file: each session is a list of nodules, each nodule a list of regions."""
    body = "".join(
        "<readingSession>"
        + "".join(f"<unblindedReadNodule>{''.join(n)}</unblindedReadNodule>" for n in nodules)
        + "</readingSession>"
        for nodules in sessions
    )
    return (
        f'<?xml version="1.0"?>{head}<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader>'
        f"<SeriesInstanceUid>{escape(series)}</SeriesInstanceUid>"
        f"<StudyInstanceUID>{escape(study)}</StudyInstanceUID></ResponseHeader>{body}"
        "</LidcReadMessage>"
    )


def ct(n=3, size=8, **changed):
    """Images 8.0, 8.1 … at z = 0, 1 … of series 8 in study 7."""
    columns = {
        "sop_instance_uid": np.array([f"8.{k}".encode() for k in range(n)]),
        "series_instance_uid": b"8",
        "study_instance_uid": b"7",
        "image_position_patient": [(0.0, 0.0, float(k)) for k in range(n)],
        "rows": size,
        "columns": size,
    }
    return slice_table(n, **columns | changed)


def find_text(tmp_path, text, images=None, options=None):
    """Lay one file on a small CT."""
    (tmp_path / "a.xml").write_text(text)
    images = ct() if images is None else images
    return lidc.find(str(tmp_path), scanned("a.xml"), images, options or ScanOptions()), images


def region(points, reader=1, nodule=0, included=True):
    """An outline on plane 0."""
    return lidc.Region(reader, nodule, 0, included, np.array(points, np.int64))


# --- real files ----------------------------------------------------------------------------------


def reading_of(shared_data, path):
    """What a real file says."""
    reading = lidc._load(str(shared_data / "lidc_xml"), path)
    assert isinstance(reading, lidc.Reading)
    return reading


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        (FILES[0], {"outlines": 76, "holes": 0, "unclosed": 4, "repeated_points": 4, "jumps": 1}),
        (FILES[1], {"unclosed": 5, "repeated_points": 4}),
        (FILES[2], {"outlines": 109, "holes": 47}),
    ],
)
def test_counts_of_real_files(shared_data, path, counts):
    """Outlines, holes, open outlines and repeated points are those of SOURCE.md."""
    reading = reading_of(shared_data, path)

    assert reading.readers == 4
    assert len(reading.regions) == reading.counts.outlines
    assert {name: getattr(reading.counts, name) for name in counts} == counts
    assert reading.counts.unusable == 0


def test_marks_and_non_nodules_of_a_real_file(shared_data):
    """158.xml has 14 regions of one point and 12 non-nodules: points as they are in the file."""
    reading = reading_of(shared_data, FILES[0])
    found = lidc.find(
        str(shared_data / "lidc_xml"), scanned(FILES[0]), images_of(reading), ScanOptions()
    )

    assert (reading.counts.marks, reading.counts.non_nodules) == (14, 12)
    assert [p.reason for p in found.problems] == [Reason.NO_AREA]
    assert found.problems[0].detail.startswith("14 marks; 12 non-nodules; 4 open outlines")
    names = [name.decode().rpartition("-")[0] for name in found.marks.name]
    assert Counter(names) == {"nodule-reader": 14, "non-nodule-reader": 12}
    text = (shared_data / "lidc_xml" / FILES[0]).read_text()
    loci = re.findall(r"<locus>\s*<xCoord>(\d+)</xCoord>\s*<yCoord>(\d+)</yCoord>", text)
    others = found.marks.take(found.marks.name >= b"non")
    assert sorted(map(tuple, others.points_column_row.tolist())) == sorted(
        (float(x), float(y)) for x, y in loci
    )


@pytest.mark.parametrize("path", FILES)
def test_real_files_on_images_of_their_uids(shared_data, path):
    """Every outline of every reader lies on the image that it names, and nothing is lost."""
    root = shared_data / "lidc_xml"
    reading = reading_of(shared_data, path)
    images = images_of(reading)
    found = lidc.find(str(root), scanned(path), images, ScanOptions())
    masks, drawn = read_all(root, found, images)

    assert [a.name for a in found.annotations] == [f"nodule-reader-{k}" for k in (1, 2, 3, 4)]
    assert {a.found_by for a in found.annotations} == {"reference"}
    for reader, annotation in enumerate(found.annotations, 1):
        planes = {r.plane for r in reading.regions if r.reader == reader}
        named = {reading.planes[plane][0] for plane in planes}
        assert set(images.sop_instance_uid[annotation.slice].tolist()) == named
        assert annotation.looked_at.tolist() == list(range(len(images)))
        for row, plane in zip(annotation.slice, annotation.offset, strict=True):
            own = [r for r in reading.regions if (r.reader, r.plane) == (reader, plane)]
            assert (masks[reader - 1, row] == slow_mask(own, (512, 512))).all()
    assert not drawn.problems
    assert (drawn.digest != 0).all()


def test_consensus_of_a_real_file(shared_data):
    """At agreement 1, 3/4, 1/2 and any, a pixel needs 4, 3, 2 or 1 readers."""
    root = shared_data / "lidc_xml"
    images = images_of(reading_of(shared_data, FILES[0]))
    each = lidc.find(str(root), scanned(FILES[0]), images, ScanOptions())
    single, _ = read_all(root, each, images)
    votes = np.zeros((len(images), 512, 512), np.int64)
    for (_, row), mask in single.items():
        votes[row] += mask
    for agreement, needed in [(1.0, 4), (0.75, 3), (0.5, 2), (0.3, 2), (0.25, 1), (0.0, 1)]:
        options = ScanOptions(readers="consensus", agreement=agreement)
        found = lidc.find(str(root), scanned(FILES[0]), images, options)
        masks, _ = read_all(root, found, images)
        agreed = np.zeros(votes.shape, bool)
        for (_, row), mask in masks.items():
            agreed[row] = mask

        assert [a.name for a in found.annotations] == ["nodule"]
        assert set(found.annotations[0].length.tolist()) == {-needed}
        assert (agreed == (votes >= needed)).all()


def test_chest_x_ray_reading_is_harmless(shared_data):
    """A quarter of the files are x-ray readings, with another root and no outline."""
    found = lidc.find(str(shared_data / "lidc_xml"), scanned("185/068.xml"), ct(), ScanOptions())

    assert not found.annotations
    assert [(p.reason, p.is_rejection) for p in found.problems] == [(Reason.NO_AREA, False)]


# --- what an outline means -----------------------------------------------------------------------


def slow_mask(regions, shape):
    """The twin: parity of crossings and inclusion, pixel by pixel; then all outlines go."""
    mask = np.zeros(shape, bool)
    points = np.concatenate([r.points_column_row for r in regions])
    (left, top), (right, bottom) = points.min(axis=0).clip(0), points.max(axis=0).clip(0) + 1
    row, column = (place[top:bottom, left:right] for place in np.mgrid[: shape[0], : shape[1]])
    for nodule in {r.nodule for r in regions}:
        own = [r for r in regions if r.nodule == nodule]
        rings = [[tuple(point) for point in r.points_column_row.tolist()] for r in own]
        inside = np.array([is_inside(column, row, ring) for ring in rings])
        included = inside[[r.included for r in own]].any(axis=0)
        drawn = np.zeros(shape, bool)
        drawn[top:bottom, left:right] = (inside.sum(axis=0) % 2 == 1) & included
        for ring in rings:
            for x, y in slow_outline(ring):
                if 0 <= y < shape[0] and 0 <= x < shape[1]:
                    drawn[y, x] = False
        mask |= drawn
    return mask


def is_inside(x, y, ring):
    """Even-odd, in whole numbers; what lies on the outline does not matter here."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        crosses = (y0 > y) != (y1 > y)
        side = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
        inside ^= crosses & ((side < 0) == (y1 > y0))
    return inside


def slow_outline(ring):
    """Pixels of a closed outline: on each line, at each whole step, the nearest pixel."""
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for k in range(steps):
            x, y = (2 * k * (x1 - x0) + steps, 2 * k * (y1 - y0) + steps)
            yield x0 + x // (2 * steps), y0 + y // (2 * steps)


POINTS = st.lists(st.tuples(st.integers(-3, 14), st.integers(-3, 14)), min_size=2, max_size=9)


@given(
    outlines=st.lists(st.tuples(POINTS, st.booleans(), st.integers(0, 1)), min_size=1, max_size=4)
)
@settings(max_examples=150)
def test_masks_are_those_of_the_slow_twin(outlines):
    """Any outlines: crossing, open, jumping, on and off the image, holes in and beside nodules."""
    regions = [region(p, included=i, nodule=n) for p, i, n in outlines]

    assert (lidc.draw_nodules(regions, (12, 12)) == slow_mask(regions, (12, 12))).all()


def test_the_outline_is_outside():
    """A square of 4 x 4 outline pixels encloses 2 x 2."""
    mask = lidc.draw_nodules([region(SQUARE)], (8, 8))

    assert np.argwhere(mask).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


@given(points=POINTS)
@settings(max_examples=100)
def test_outline_pixels_are_a_closed_connected_path(points):
    """Successive pixels touch, the last one the first, and every point is among them."""
    pixels = lidc.outline_pixels(np.array(points))
    steps = np.abs(np.diff(pixels, axis=0, append=pixels[:1])).max(axis=1)

    assert (steps <= 1).all()
    assert set(points) <= set(map(tuple, pixels.tolist()))


@given(points=POINTS)
@settings(max_examples=100)
def test_the_way_round_changes_nothing(points):
    """An outline drawn backwards covers the same pixels."""
    forth, back = lidc.outline_pixels(np.array(points)), lidc.outline_pixels(np.array(points[::-1]))

    assert set(map(tuple, forth.tolist())) == set(map(tuple, back.tolist()))


def test_holes_islands_and_holes_alone():
    """A hole is out, a nodule in the hole is in, a hole without a nodule is nothing."""
    big = [(1, 1), (21, 1), (21, 21), (1, 21)]
    hole = [(4, 4), (18, 4), (18, 18), (4, 18)]
    island = [(8, 8), (14, 8), (14, 14), (8, 14)]
    mask = lidc.draw_nodules([region(big), region(hole, included=False), region(island)], (24, 24))

    assert mask[2, 2]
    assert not mask[6, 6]
    assert mask[10, 10]
    assert not lidc.draw_nodules([region(hole, included=False)], (24, 24)).any()


def test_nodules_of_one_reader_are_united():
    """Where two nodules of a reader overlap the pixels are in, once."""
    shifted = [(x + 1, y) for x, y in SQUARE]
    mask = lidc.draw_nodules([region(SQUARE), region(shifted, nodule=1)], (8, 8))

    assert np.argwhere(mask).tolist() == [[r, c] for r in (2, 3) for c in (2, 3, 4)]


def test_repeated_points_and_closing_change_nothing(tmp_path):
    """The same square open, closed and with points twice gives the same mask."""
    variants = (SQUARE, (*SQUARE, SQUARE[0]), (*SQUARE[:3], *SQUARE[2:]))
    text = message(
        [[roi(variants[0], 0, "8.0"), roi(variants[1], 1, "8.1"), roi(variants[2], 2, "8.2")]]
    )
    found, images = find_text(tmp_path, text)
    masks, _ = read_all(tmp_path, found, images)

    assert len(masks) == 3
    assert all((mask == masks[0, 0]).all() for mask in masks.values())
    assert "2 open outlines, closed here; 1 points twice in a row" in found.problems[0].detail


# --- pairing -------------------------------------------------------------------------------------


def test_without_the_series_its_study_at_the_same_z(tmp_path):
    """Other UIDs of series and images: a series of the same study, by z."""
    images = ct(series_instance_uid=b"6", sop_instance_uid=np.array([b"6.0", b"6.1", b"6.2"]))
    found, _ = find_text(tmp_path, message([[roi(SQUARE, 2.0)]]), images)

    assert [a.found_by for a in found.annotations] == ["geometry"]
    assert found.annotations[0].slice.tolist() == [2]


def test_without_series_and_study_the_images_beside_the_file(tmp_path):
    """No UID is known: the images in the file's own folder, by z."""
    unknown = {"series_instance_uid": b"6", "study_instance_uid": b"5", "sop_instance_uid": b""}
    found, _ = find_text(tmp_path, message([[roi(SQUARE, 1.0)]]), ct(**unknown))
    away, _ = find_text(
        tmp_path,
        message([[roi(SQUARE, 1.0)]]),
        ct(**unknown, path=np.array([b"b/0", b"b/1", b"b/2"])),
    )

    assert [a.found_by for a in found.annotations] == ["geometry"]
    assert found.annotations[0].slice.tolist() == [1]
    assert not away.annotations
    assert [p.reason for p in away.problems if p.is_rejection] == [Reason.ANNOTATION_WITHOUT_IMAGES]


def test_uid_and_z_that_disagree_are_refused(tmp_path):
    """The UID says z = 0, the file z = 2: neither image is said to be without a nodule."""
    text = message([[roi(SQUARE, 2.0, "8.0"), roi(SQUARE, 1.0, "8.1")]])
    found, _ = find_text(tmp_path, text)
    problems = [(p.reason, p.is_rejection) for p in found.problems]

    assert found.annotations[0].slice.tolist() == [1]
    assert found.annotations[0].looked_at.tolist() == [1]
    assert (Reason.AMBIGUOUS_IMAGE, True) in problems


def test_slices_that_are_not_there_are_counted(tmp_path):
    """An outline between or beyond the images never moves to one."""
    text = message([[roi(SQUARE, 0.0), roi(SQUARE, 0.5, "8.7"), roi(SQUARE, 9.0, "8.9")]])
    found, _ = find_text(tmp_path, text)
    details = [p.detail for p in found.problems if p.reason == Reason.CONTOUR_WITHOUT_IMAGE]

    assert found.annotations[0].slice.tolist() == [0]
    assert details == ["2 of the 3 slices with an outline are no image"]


def test_two_series_that_fit_equally_are_ambiguous(tmp_path):
    """Two series of the study at the same heights, and no UID that chooses."""
    images = ct(
        n=6,
        series_instance_uid=np.array([b"5"] * 3 + [b"6"] * 3),
        sop_instance_uid=np.array([f"1.{k}".encode() for k in range(6)]),
        image_position_patient=[(0.0, 0.0, float(k % 3)) for k in range(6)],
        volume=[0, 0, 0, 1, 1, 1],
    )
    found, _ = find_text(tmp_path, message([[roi(SQUARE, 1.0)]]), images)

    assert not found.annotations
    assert Reason.AMBIGUOUS_IMAGE in {p.reason for p in found.problems}


def test_of_two_images_at_one_z_the_one_that_is_named(tmp_path):
    """A series that was acquired twice: the UID says which of the two volumes was read."""
    images = ct(
        n=4,
        image_position_patient=[(0.0, 0.0, float(k % 2)) for k in range(4)],
        volume=[0, 0, 1, 1],
    )
    found, _ = find_text(tmp_path, message([[roi(SQUARE, 1.0, "8.3")]]), images)

    assert [a.slice.tolist() for a in found.annotations] == [[3]]
    assert [a.looked_at.tolist() for a in found.annotations] == [[2, 3]]


def test_a_tilted_series_by_its_uids(tmp_path):
    """A gantry tilt: z is that of each image's first pixel, the UIDs choose the series."""
    tilt = np.deg2rad(15)
    images = ct(
        image_orientation_patient=(1, 0, 0, 0, np.cos(tilt), np.sin(tilt)),
        image_position_patient=[(-100.0, -120.0, float(k)) for k in range(3)],
    )
    found, _ = find_text(tmp_path, message([[roi(SQUARE, 1.0, "8.1")]]), images)

    assert found.annotations[0].slice.tolist() == [1]


def test_readers_who_found_nothing_looked(tmp_path):
    """A session without a nodule, and a file without any, annotate the whole series: empty."""
    one, images = find_text(tmp_path, message([[roi(SQUARE, 0.0)]], []))
    none, _ = find_text(tmp_path, message([], []))

    assert [(a.name, len(a.slice)) for a in one.annotations] == [
        ("nodule-reader-1", 1),
        ("nodule-reader-2", 0),
    ]
    assert [len(a.slice) for a in none.annotations] == [0, 0]
    for annotation in (*one.annotations, *none.annotations):
        assert annotation.looked_at.tolist() == list(range(len(images)))


# --- broken files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<library><book/></library>", Reason.STRAY_FILE),
        ("no XML that mentions LidcReadMessage", Reason.UNREADABLE_FILE),
        (message([[roi(SQUARE)]])[:-20], Reason.UNREADABLE_FILE),
        ("<LidcReadMessage/>", Reason.STRAY_FILE),
        (
            message([], head='<!DOCTYPE a [<!ENTITY b "somebody">]>').replace(">7<", ">&b;<"),
            Reason.UNREADABLE_FILE,
        ),
    ],
)
def test_other_and_broken_xml(tmp_path, text, reason):
    """Somebody else's XML is a stray; ours that cannot be read is one problem; no entities."""
    found, _ = find_text(tmp_path, text)

    assert not found.annotations
    assert [p.reason for p in found.problems] == [reason]
    assert "somebody" not in found.problems[0].detail


@pytest.mark.parametrize(
    ("limit", "detail"),
    [
        (Limits(xml_bytes=1000), "{bytes} bytes, limit 1000"),
        (Limits(xml_elements=50), "XML of {tags} tags, limit 50"),
    ],
)
def test_a_file_that_is_too_large(tmp_path, limit, detail):
    """More bytes or tags than allowed are not parsed; both numbers are named."""
    text = message([[roi(SQUARE) * 5]])
    with applied(limit):
        found, _ = find_text(tmp_path, text)

    expected = detail.format(bytes=len(text), tags=text.count("<"))
    assert [p.detail for p in found.problems] == [expected]


@pytest.mark.parametrize("encoding", ["cp037", "utf-7", "shift_jis"])
def test_xml_in_other_encodings_is_not_parsed(tmp_path, encoding):
    """Where a tag may be written with other bytes than '<', nobody can count tags."""
    text = message([[roi(SQUARE)]])
    text = f"<?xml version='1.0' encoding='{encoding}'?>" + text[text.find("<Lidc") :]
    found, _ = find_text(tmp_path, text)

    assert [p.detail for p in found.problems] == ["XML in another encoding than UTF-8 is not read"]


def test_an_outline_of_endless_jumps_is_refused(tmp_path):
    """Filling in a million long jumps would take all memory: such a region cannot be used."""
    far = [(0, 0), (65535, 0)] * 20
    found, images = find_text(tmp_path, message([[roi(far), roi(SQUARE, 1.0, "8.1")]]))
    masks, _ = read_all(tmp_path, found, images)

    assert [p.reason for p in found.problems if p.is_rejection] == [Reason.BAD_CONTOUR]
    assert masks


@pytest.mark.parametrize(
    "bad",
    [
        roi([]),
        roi([("1.5", 1), (2, 2), (3, 1)]),
        roi([("", 1), (2, 2), (3, 1)]),
        roi([(10**30, 1), (2, 2), (3, 1)]),
        roi(SQUARE, inclusion="maybe"),
    ],
)
def test_one_bad_region_does_not_cost_the_others(tmp_path, bad):
    """A region that cannot be used is counted; the rest of the file is."""
    found, images = find_text(tmp_path, message([[bad, roi(SQUARE, 1.0, "8.1")]]))
    masks, _ = read_all(tmp_path, found, images)

    assert [(p.reason, p.detail[:9]) for p in found.problems if p.is_rejection] == [
        (Reason.BAD_CONTOUR, "1 regions")
    ]
    assert [mask.sum() for mask in masks.values()] == [4]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), value=st.binary(min_size=1, max_size=6))
def test_no_damage_makes_an_exception(tmp_path, place, value):
    """Overwritten bytes anywhere in a file give annotations or problems, never an exception."""
    raw = bytearray(message([[roi(SQUARE), roi(SQUARE, 1.0, "8.1")]]).encode())
    start = int(place * (len(raw) - len(value)))
    raw[start : start + len(value)] = value
    (tmp_path / "a.xml").write_bytes(raw)
    found = lidc.find(str(tmp_path), scanned("a.xml"), ct(), ScanOptions())
    read_all(tmp_path, found, ct())

    assert found.annotations or found.problems


def test_one_pixel_drawn_twice_is_a_mark(tmp_path):
    """Two equal points enclose nothing and are no outline."""
    found, _ = find_text(tmp_path, message([[roi([(3, 3), (3, 3)])]]))

    assert [len(a.slice) for a in found.annotations] == [0]
    assert found.problems[0].detail.startswith("1 marks;")


def test_a_file_that_went_or_changed_is_a_problem_of_the_task(tmp_path):
    """What the scan found may be gone when the task runs."""
    found, images = find_text(tmp_path, message([[roi(SQUARE)]]))
    gone = replace(found.annotations[0], path="gone.xml")
    (tmp_path / "a.xml").write_text(message([]))
    changed, drawn = read_all(
        tmp_path, replace(found, annotations=(*found.annotations, gone)), images
    )

    assert not changed
    assert [p[:2] for p in drawn.problems] == [
        (0, Reason.FILE_CHANGED),
        (1, Reason.UNREADABLE_FILE),
    ]
    assert not drawn.digest.any()


def test_recognizes_by_name():
    """Files named *.xml that are no DICOM."""
    assert lidc.recognizes(ScannedFile("a/069.XML", "", 0))
    assert not lidc.recognizes(ScannedFile("a.xml", "1.2.840.10008.5.1.4.1.1.2", 0))
    assert not lidc.recognizes(ScannedFile("xml", "", 0))
