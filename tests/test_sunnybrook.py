"""Which outline belongs to which image, on the real cohort and on trees with every known defect."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.records import (
    AnnotationRefs,
    Problem,
    Reason,
    ScanOptions,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources import sunnybrook
from parallel_dicomseg.sources.base import Found, Listing, Outline, canonical_name, walk
from parallel_dicomseg.sources.links import read_links
from parallel_dicomseg.sources.numbered import pair_by_number
from parallel_dicomseg.text import parse_contour
from parallel_dicomseg.volumes import natural_key

RING = "1 1\n1 5\n5 5\n"
ALL = ScanOptions(include_unannotated=True)
WIDTHS = {"image_position_patient": 3, "image_orientation_patient": 6, "pixel_spacing": 2}

Images = Mapping[str, tuple[int, str]]
"""InstanceNumber (-1: absent) and SeriesInstanceUID of each readable image."""


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Write a tree of files."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode())
    return root


def contour(number: int, structure: str = "i", original_id: str = "SC-1") -> str:
    """The path of a contour in the Arterys layout."""
    name = f"IM-0001-{number:04d}-{structure}contour-manual.txt"
    return f"contourfiles/{original_id}/{structure}-contours/{name}"


def arterys(root: Path, numbers: Sequence[int], images: Sequence[str], **more: str) -> Path:
    """One patient P1 with i-contours of these numbers and images of these names."""
    return plant(
        root,
        {"link.csv": "patient_id,original_id\nP1,SC-1\n"}
        | {contour(number): f"{number} 1\n1 5\n5 5\n" for number in numbers}
        | {f"dicoms/P1/{image}": "" for image in images}
        | more,
    )


def table(paths: Sequence[str], images: Images) -> SliceTable:
    """A SliceTable of these files; only what pairing needs is filled in."""
    rows = [(path, *images[path]) for path in paths if path in images]
    return table_of_rows([(path, 0, number, uid) for path, number, uid in rows])


def table_of_rows(rows: Sequence[tuple[str, int, int, str]]) -> SliceTable:
    """A SliceTable of (path, frame, InstanceNumber, SeriesInstanceUID)."""
    columns = {
        field.name: np.zeros((len(rows), WIDTHS[field.name]) if field.name in WIDTHS else len(rows))
        for field in fields(SliceTable)
    }
    columns["path"] = np.array([os.fsencode(row[0]) for row in rows], dtype=np.bytes_)
    columns["frame"] = np.array([row[1] for row in rows], dtype=np.int32)
    columns["instance_number"] = np.array([row[2] for row in rows], dtype=np.int64)
    columns["series_instance_uid"] = np.array([row[3].encode() for row in rows], dtype=np.bytes_)
    return SliceTable(**columns)


def pair(
    root: Path, images: Images, options: ScanOptions | None = None
) -> tuple[dict[str, str], Found, Listing]:
    """Scan a tree whose readable images are `images`: contour path to image path."""
    listing = sunnybrook.list_files(root, options or ScanOptions())
    slices = table(listing.image_paths, images)
    found = sunnybrook.pair(listing, slices)
    return places(found, slices), found, listing


def places(found: Found, slices: SliceTable) -> dict[str, str]:
    """Image path by contour path, for the contours that have an image."""
    return {
        one.path: os.fsdecode(slices.path[row]) for one in found.annotations for row in one.slice
    }


def reasons(problems: Sequence[Problem]) -> dict[str, set[str]]:
    """Reasons by path."""
    found: dict[str, set[str]] = defaultdict(set)
    for problem in problems:
        found[problem.path].add(problem.reason.value)
    return dict(found)


def in_folder(numbers: Mapping[str, int], folder: str = "dicoms/P1", uid: str = "1.2") -> Images:
    """Images of one folder and series by name and InstanceNumber."""
    return {f"{folder}/{name}": (number, uid) for name, number in numbers.items()}


# ------------------------------------------------------------------------------ the real cohort


def read_table(root: Path, listing: Listing) -> SliceTable:
    """The SliceTable of real images by pydicom."""
    images = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # illegal UIDs, in every file of the cohort
        for path in listing.image_paths:
            tags = ["InstanceNumber", "SeriesInstanceUID"]
            dataset = pydicom.dcmread(root / path, stop_before_pixels=True, specific_tags=tags)
            images[path] = (int(dataset.InstanceNumber), str(dataset.SeriesInstanceUID))
    return table(listing.image_paths, images)


def test_every_real_outline_lies_on_the_image_with_its_number(shared_data: Path) -> None:
    """142 of 142 outlines, among 1,140 images."""
    root = shared_data / "sunnybrook_arterys" / "final_data"
    listing = sunnybrook.list_files(root, ScanOptions())
    slices = read_table(root, listing)
    found = sunnybrook.pair(listing, slices)
    link = {link.original_id: link.patient_id for link in read_links(root / "link.csv")}

    assert (listing.problems, found.problems) == ((), ())
    assert len(slices) == 1140
    assert Counter(one.name for one in found.annotations) == {"i": 96, "o": 46}
    assert {one.found_by for one in found.annotations} == {"number"}
    for path, image in places(found, slices).items():
        _, original_id, _, name = path.split("/")
        number = int(name.split("-")[2])
        assert image == f"dicoms/{link[original_id]}/{number}.dcm"


# ------------------------------------------------------------------------- numbers are integers


def test_a_suffix_is_no_match(tmp_path: Path) -> None:
    """Contour 59 belongs to 59.dcm, never to 159.dcm, 9.dcm or 590.dcm."""
    root = arterys(tmp_path, [59, 9], ["9.dcm", "59.dcm", "159.dcm", "590.dcm"])
    found, paired, _ = pair(
        root, in_folder({"9.dcm": 9, "59.dcm": 59, "159.dcm": 159, "590.dcm": 590})
    )

    assert found == {contour(59): "dicoms/P1/59.dcm", contour(9): "dicoms/P1/9.dcm"}
    assert paired.problems == ()


def test_a_contour_without_its_image_is_reported(tmp_path: Path) -> None:
    """Where image 59 is missing, 159 and 9 do not take its place."""
    root = arterys(tmp_path, [59], ["9.dcm", "159.dcm"])
    found, paired, _ = pair(root, in_folder({"9.dcm": 9, "159.dcm": 159}))

    assert found == {}
    assert paired.problems == (
        Problem(
            contour(59),
            Reason.CONTOUR_WITHOUT_IMAGE,
            "no image has the number 59 in dicoms/P1 (2 images)",
        ),
    )


def test_padding_and_names_without_meaning_do_not_matter(tmp_path: Path) -> None:
    """InstanceNumber decides, whether files are padded, named by UID or have no suffix."""
    numbers = {"IM-0003-0059.dcm": 59, "1.2.840.60": 7, "1.3.12.8.dcm": 8, "scan": 61}
    root = arterys(tmp_path, [59, 7, 8, 61], list(numbers))
    found, paired, _ = pair(root, in_folder(numbers))

    assert found == {contour(number): f"dicoms/P1/{name}" for name, number in numbers.items()}
    assert paired.problems == ()


def test_the_file_name_helps_where_the_instance_number_is_absent(tmp_path: Path) -> None:
    """59.dcm and IM-0003-0060.dcm have numbers by their names."""
    root = arterys(tmp_path, [59, 60], ["59.dcm", "IM-0003-0060.dcm", "x61.dcm"])
    images = in_folder({"59.dcm": -1, "IM-0003-0060.dcm": -1, "x61.dcm": -1})
    found, _, _ = pair(root, images)

    assert found == {
        contour(59): "dicoms/P1/59.dcm",
        contour(60): "dicoms/P1/IM-0003-0060.dcm",
    }


def test_name_and_instance_number_that_disagree_are_ambiguous(tmp_path: Path) -> None:
    """Two candidates, one by its header and one by its name: both are named, none is taken."""
    root = arterys(tmp_path, [59], ["58.dcm", "59.dcm"])
    found, paired, _ = pair(root, in_folder({"58.dcm": 59, "59.dcm": 60}))

    assert found == {}
    assert paired.problems == (
        Problem(
            contour(59),
            Reason.AMBIGUOUS_IMAGE,
            "for number 59 there are: dicoms/P1/58.dcm (InstanceNumber 59), "
            "dicoms/P1/59.dcm (InstanceNumber 60)",
        ),
    )


def test_one_image_does_not_take_outlines_of_two_numbers(tmp_path: Path) -> None:
    """An image that is 59 by name and 60 by header takes neither contour."""
    root = arterys(tmp_path, [59, 60], ["59.dcm"])
    found, paired, _ = pair(root, in_folder({"59.dcm": 60}))

    assert found == {}
    assert reasons(paired.problems) == {
        contour(59): {"ambiguous-image"},
        contour(60): {"ambiguous-image"},
    }
    assert "dicoms/P1/59.dcm (InstanceNumber 60) fits the contour numbers 59 and 60" in (
        paired.problems[0].detail
    )


def test_the_same_instance_number_twice_is_ambiguous(tmp_path: Path) -> None:
    """A copied image makes its own number ambiguous, and no other."""
    root = arterys(tmp_path, [59, 60], ["59.dcm", "59 copy.dcm", "60.dcm"])
    found, paired, _ = pair(root, in_folder({"59.dcm": 59, "59 copy.dcm": 59, "60.dcm": 60}))

    assert found == {contour(60): "dicoms/P1/60.dcm"}
    assert reasons(paired.problems) == {contour(59): {"ambiguous-image"}}


def test_frames_of_one_file_are_ambiguous(tmp_path: Path) -> None:
    """A number does not say which frame of a multi-frame image is meant."""
    root = arterys(tmp_path, [1], ["1.dcm"])
    listing = sunnybrook.list_files(root, ALL)
    slices = table_of_rows([("dicoms/P1/1.dcm", 1, 1, "1.2"), ("dicoms/P1/1.dcm", 0, 1, "1.2")])
    paired = sunnybrook.pair(listing, slices)

    assert places(paired, slices) == {}
    assert reasons(paired.problems) == {contour(1): {"ambiguous-image"}}


def test_an_unreadable_image_keeps_its_place(tmp_path: Path) -> None:
    """Where 59.dcm could not be read, an image of another series does not take its contour."""
    others = [f"{number}.dcm" for number in (58, 60, 61)]
    root = arterys(
        tmp_path,
        [58, 59, 60],
        [f"sax/{name}" for name in (*others, "59.dcm")] + ["lax/59.dcm", "lax/1.dcm"],
    )
    found, paired, _ = pair(
        root,
        {
            **in_folder({name: int(name[:2]) for name in others}, "dicoms/P1/sax"),
            **in_folder({"59.dcm": 59, "1.dcm": 1}, "dicoms/P1/lax", "9.9"),
        },
    )

    assert set(found) == {contour(58), contour(60)}
    assert reasons(paired.problems) == {
        contour(59): {"image-rejected"},
        "dicoms/P1/lax": {"alternative-series"},
    }
    assert "could not be read: dicoms/P1/sax/59.dcm" in str(paired.problems)


def test_a_series_of_which_nothing_could_be_read_is_not_replaced(tmp_path: Path) -> None:
    """All images of the series that is meant are broken: no other series takes its contours."""
    root = arterys(
        tmp_path, [1, 2], ["sax/1.dcm", "sax/2.dcm", "lax/1.dcm", "sax/readme", "lax/readme"]
    )
    found, paired, _ = pair(root, in_folder({"1.dcm": 1}, "dicoms/P1/lax"))

    assert found == {}
    assert [problem.reason for problem in paired.problems].count(Reason.IMAGE_REJECTED) == 2


def test_an_unreadable_image_makes_its_number_ambiguous(tmp_path: Path) -> None:
    """59.dcm could not be read, and another image says that it is number 59."""
    root = arterys(tmp_path, [59], ["59.dcm", "x.dcm"])
    found, paired, _ = pair(root, in_folder({"x.dcm": 59}))

    assert found == {}
    assert reasons(paired.problems) == {contour(59): {"ambiguous-image"}}
    assert "dicoms/P1/x.dcm (InstanceNumber 59), dicoms/P1/59.dcm (unread)" in (
        paired.problems[0].detail
    )


numbers = st.integers(-1, 6)


@given(
    st.dictionaries(st.integers(0, 8), st.tuples(numbers, st.booleans()), max_size=7),
    st.sets(st.integers(0, 7), max_size=6),
)
def test_pairing_equals_the_obvious_search(
    images: dict[int, tuple[int, bool]], drawn: set[int]
) -> None:
    """In one folder: the only image with the number by header or name, used for one number."""
    named = {f"P/{name}.dcm": (number, name) for name, (number, good) in images.items() if good}
    lost = {name for name, (_, good) in images.items() if not good}
    candidates = {
        number: [path for path, both in named.items() if number in both] for number in drawn
    }
    alone = {
        number: paths[0]
        for number, paths in candidates.items()
        if len(paths) == 1 and number not in lost
    }
    expected = {
        number: path for number, path in alone.items() if list(alone.values()).count(path) == 1
    }
    listing = Listing(
        image_paths=[f"P/{name}.dcm" for name in images],
        image_patients=["P" for _ in images],
        outlines=[Outline(f"C/{number}", "P", "i", number) for number in sorted(drawn)],
        claimed=frozenset(),
        problems=(),
    )
    slices = table(listing.image_paths, {path: (both[0], "1.2") for path, both in named.items()})
    paired = pair_by_number(listing, slices, "test")
    found = {int(path[2:]): image for path, image in places(paired, slices).items()}

    assert found == expected
    assert [one.path for one in paired.annotations] == [one.path for one in listing.outlines]
    assert len(found) + len({problem.path for problem in paired.problems}) == len(drawn)


# ----------------------------------------------------------------------------- competing series


def test_the_series_that_covers_most_contours_is_chosen(tmp_path: Path) -> None:
    """Of three folders the one with all numbers wins; the others are reported with counts."""
    names = [f"{number}.dcm" for number in (1, 2, 3)]
    root = arterys(
        tmp_path,
        [1, 2, 3],
        [f"CINESAX_300/{n}" for n in names] + ["CINELAX_301/1.dcm", "SCOUT/9.dcm"],
    )
    found, paired, _ = pair(
        root,
        {
            **in_folder({n: int(n[0]) for n in names}, "dicoms/P1/CINESAX_300", "1"),
            **in_folder({"1.dcm": 1}, "dicoms/P1/CINELAX_301", "2"),
            **in_folder({"9.dcm": 9}, "dicoms/P1/SCOUT", "3"),
        },
    )

    assert found == {contour(n): f"dicoms/P1/CINESAX_300/{n}.dcm" for n in (1, 2, 3)}
    assert paired.problems == (
        Problem(
            "dicoms/P1/CINELAX_301",
            Reason.ALTERNATIVE_SERIES,
            "1 images carry 1 of 3 contour numbers; most: dicoms/P1/CINESAX_300 (3)",
        ),
    )


def test_series_in_one_folder_are_told_apart_by_uid(tmp_path: Path) -> None:
    """Numbers that repeat in a flat folder belong to several series."""
    root = arterys(tmp_path, [1, 2], ["a", "b", "c", "d"])
    images = {
        "dicoms/P1/a": (1, "1.1"),
        "dicoms/P1/b": (2, "1.1"),
        "dicoms/P1/c": (1, "1.2"),
        "dicoms/P1/d": (7, "1.2"),
    }
    found, paired, _ = pair(root, images)

    assert found == {contour(1): "dicoms/P1/a", contour(2): "dicoms/P1/b"}
    assert reasons(paired.problems) == {"dicoms/P1": {"alternative-series"}}


def test_series_that_cover_equally_much_are_ambiguous(tmp_path: Path) -> None:
    """Two copies of a series: nobody can say which one was meant, so none is taken."""
    root = arterys(tmp_path, [1, 2, 3], ["A/1.dcm", "A/2.dcm", "B/1.dcm", "B/2.dcm"])
    found, paired, _ = pair(
        root,
        {
            **in_folder({"1.dcm": 1, "2.dcm": 2}, "dicoms/P1/A"),
            **in_folder({"1.dcm": 1, "2.dcm": 2}, "dicoms/P1/B"),
        },
    )

    assert found == {}
    assert reasons(paired.problems) == {
        contour(1): {"ambiguous-image"},
        contour(2): {"ambiguous-image"},
        contour(3): {"contour-without-image"},
    }
    assert "2 series carry equally many contours; for number 1 there are: dicoms/P1/A/1.dcm" in (
        paired.problems[0].detail
    )


def test_a_uid_of_its_own_in_every_file_does_no_harm(tmp_path: Path) -> None:
    """Where an anonymizer gave each file another SeriesInstanceUID, the folder is the series."""
    names = {"1.dcm": 1, "2.dcm": 2, "3.dcm": 3, "3b.dcm": 3}
    root = arterys(tmp_path, [1, 2, 3], list(names))
    images = {f"dicoms/P1/{name}": (n, f"1.{k}") for k, (name, n) in enumerate(names.items())}
    found, paired, _ = pair(root, images)

    assert set(found) == {contour(1), contour(2)}
    assert reasons(paired.problems) == {contour(3): {"ambiguous-image"}}


# ------------------------------------------------------------------- contours, structures, strays


def test_identical_duplicates_count_once(tmp_path: Path) -> None:
    """A byte copy of a contour file is reported and left out; the first stays."""
    copy = "contourfiles/SC-1/i-contours/IM-0002-0001-icontour-manual.txt"
    root = arterys(tmp_path, [1], ["1.dcm"], **{copy: "1 1\n1 5\n5 5\n"})
    found, _, listing = pair(root, in_folder({"1.dcm": 1}))

    assert found == {contour(1): "dicoms/P1/1.dcm"}
    assert reasons(listing.problems) == {copy: {"repeated"}}


def test_different_duplicates_are_all_refused(tmp_path: Path) -> None:
    """Two outlines of one structure and number that differ: neither is taken."""
    rival = "contourfiles/SC-1/i-contours/IM-0002-0001-icontour-manual.txt"
    root = arterys(tmp_path, [1, 2], ["1.dcm", "2.dcm"], **{rival: RING.replace("5", "6")})
    for path in (contour(1), rival):
        os.utime(root / path, (1e9, 1e9))
    found, _, listing = pair(root, in_folder({"1.dcm": 1, "2.dcm": 2}))

    assert found == {contour(2): "dicoms/P1/2.dcm"}
    assert reasons(listing.problems) == {
        contour(1): {"duplicate"},
        rival: {"duplicate"},
    }


@pytest.mark.parametrize("setting", ["i-contours", "/i-contours/"])
def test_one_folder_of_contours_can_be_chosen(tmp_path: Path, setting: str) -> None:
    """The original script's setting restricts the scan to this folder of each patient."""
    root = arterys(tmp_path, [1], ["1.dcm"], **{contour(1, "o"): RING})
    options = ScanOptions(contours_sub_dir=setting)

    assert {one.structure for one in sunnybrook.list_files(root, options).outlines} == {"i"}
    with pytest.raises(ConfigurationError, match=r"'x': .*there are: i-contours, o-contours$"):
        sunnybrook.list_files(root, ScanOptions(contours_sub_dir="x"))


def test_strays_are_reported_and_harmless(tmp_path: Path) -> None:
    """Swap files, system files and misnamed ones are named, and cost nothing."""
    folder = "contourfiles/SC-1/i-contours"
    strays = [
        f"{folder}/.IM-0001-0001-icontour-manual.txt.swp",
        f"{folder}/.DS_Store",
        f"{folder}/IM-0001-0001-icontour-manual.txt~",
        f"{folder}/IM-0001-0001-icontour-auto.txt",
        f"{folder}/IM-0001-icontour-manual.txt",
        f"{folder}/59.dcm",
        "contourfiles/notes.txt",
        "dicoms/P1/.DS_Store",
        "dicoms/P1/._1.dcm",
        "dicoms/P1/Thumbs.db",
        "dicoms/P1/DICOMDIR",
        "dicoms/index.html",
    ]
    root = arterys(tmp_path, [1], ["1.dcm"], **dict.fromkeys(strays, "x"))
    found, paired, listing = pair(root, in_folder({"1.dcm": 1}))

    assert found == {contour(1): "dicoms/P1/1.dcm"}
    assert reasons(listing.problems) == {path: {"stray-file"} for path in strays}
    assert not any(problem.is_rejection for problem in (*listing.problems, *paired.problems))


def test_a_contour_in_the_folder_of_another_structure_is_refused(tmp_path: Path) -> None:
    """Name and folder say different structures: nobody can say which is right."""
    path = "contourfiles/SC-1/i-contours/IM-0001-0001-ocontour-manual.txt"
    root = arterys(tmp_path, [2], ["1.dcm", "2.dcm"], **{path: RING})
    listing = sunnybrook.list_files(root, ScanOptions())

    assert listing.problems == (
        Problem(path, Reason.BAD_CONTOUR, "its name says structure o, its folder i"),
    )
    assert {one.structure for one in listing.outlines} == {"i"}


def test_images_of_patients_without_outlines_are_listed_only_on_request(tmp_path: Path) -> None:
    """Nobody reads a thousand headers for nothing."""
    root = arterys(
        tmp_path,
        [10],
        ["10.dcm", "2.dcm", "x/3.dcm"],
        **{
            "link.csv": "patient_id,original_id\nP10,SC-10\nP2,SC-2\nP1,SC-1\n",
            "dicoms/P2/1.dcm": "",
            "dicoms/P10/1.dcm": "",
        },
    )
    plant(root, {contour(1, original_id="SC-10"): RING})
    few, every = (sunnybrook.list_files(root, options) for options in (ScanOptions(), ALL))

    assert set(few.image_patients) == {"P1", "P10"}
    assert every.image_patients == ["P1", "P1", "P1", "P2", "P10"]
    assert reasons(every.problems) == {"contourfiles/SC-2": {"images-without-annotation"}}


# ---------------------------------------------------------------------- link.csv and its folders


@pytest.mark.parametrize(
    "content",
    [
        b"patient_id,original_id\nP1,SC-1\nP2,SC-2\n",
        b"\xef\xbb\xbfpatient_id,original_id\r\nP1,SC-1\r\nP2,SC-2\r\n",
        b'"patient_id","original_id"\n"P1","SC-1"\n\n"P2","SC-2"\n\n\n',
        b'\xef\xbb\xbf"patient_id","original_id"\n"P1","SC-1"\n"P2","SC-2"\n',
        b"OriginalID,Age,PatientID\nSC-1,50,P1\nSC-2,,P2\n",
        b" Patient ID , Original-ID \n P1 , SC-1\n,\nP2,SC-2\nP1,SC-1",
    ],
)
def test_link_tables_of_all_kinds_are_read(tmp_path: Path, content: bytes) -> None:
    """A byte order mark, quotes, blank lines, other columns, other spellings, repeated rows."""
    path = tmp_path / "link.csv"
    path.write_bytes(content)

    assert [(link.patient_id, link.original_id) for link in read_links(path)] == [
        ("P1", "SC-1"),
        ("P2", "SC-2"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the table is empty; it needs the columns patient_id,original_id"),
        (b"patient_id,original_id\n", "has a header but no rows"),
        (b"patient,original\na,b\n", "needs one column patient_id; its first row has 2 column"),
        (b"patient_id;original_id\na;b\n", "its first row has 1 column"),
        (b"patient_id,x,original_id,PatientID\na,b,c,d\n", "needs one column patient_id"),
        (b"\xff\xfe\x00\x01", "not text in UTF-8 .byte 0."),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not text in UTF-8"),
        (b"\x00\x01\x02\x03", "needs one column patient_id; its first row has 1 "),
        (b"patient_id,original_id\nP1,A\nP2,B\nP1,C\n", "lines 2 and 4 have the same patient_id"),
        (b"patient_id,original_id\nP1,A-1\nP2,A-01\n", "lines 2 and 3 have the same original_id"),
    ],
)
def test_bad_link_tables_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """What is wrong with the table is said, with its columns or lines and without its contents."""
    path = tmp_path / "link.csv"
    path.write_bytes(content)
    with pytest.raises(LayoutError, match=message):
        read_links(path)


def test_folders_and_rows_that_lack_a_partner_are_reported(tmp_path: Path) -> None:
    """Rows without folders, folders without rows, folders without files."""
    root = arterys(
        tmp_path,
        [1],
        ["1.dcm"],
        **{
            "link.csv": "patient_id,original_id\nP1,SC-1\nP2,SC-2\nP3,SC-3\nP4,SC-4\n",
            contour(5, original_id="SC-2"): RING,
            "dicoms/P3/1.dcm": "",
            "dicoms/P9/1.dcm": "",
            contour(1, original_id="SC-9"): RING,
        },
    )
    found, _, listing = pair(root, in_folder({"1.dcm": 1}))

    assert found == {contour(1): "dicoms/P1/1.dcm"}
    assert reasons(listing.problems) == {
        "dicoms/P2": {"annotation-without-images"},
        "contourfiles/SC-3": {"images-without-annotation"},
        "dicoms/P4": {"annotation-without-images"},
        "contourfiles/SC-4": {"images-without-annotation"},
        "dicoms/P9": {"stray-file"},
        "contourfiles/SC-9": {"stray-file"},
    }


def test_a_row_without_a_cell_has_no_partner(tmp_path: Path) -> None:
    """A short row is a patient without contours, not an accident."""
    root = arterys(tmp_path, [1], ["1.dcm"], **{"dicoms/P2/1.dcm": ""})
    plant(root, {"link.csv": "patient_id,original_id\nP1,SC-1\nP2\n"})
    listing = sunnybrook.list_files(root, ScanOptions())

    assert [problem.reason for problem in listing.problems] == [Reason.IMAGES_WITHOUT_ANNOTATION]


def test_names_that_fit_two_folders_fit_none(tmp_path: Path) -> None:
    """SC-001 could be the folder SC-1 or SC-01: it is neither."""
    root = arterys(tmp_path, [1], ["1.dcm"], **{contour(2, original_id="SC-01"): RING})
    plant(root, {"link.csv": "patient_id,original_id\nP1,SC-001\n"})

    assert reasons(sunnybrook.list_files(root, ScanOptions()).problems) == {
        "contourfiles/SC-001": {"images-without-annotation"},
        "contourfiles/SC-1": {"stray-file"},
        "contourfiles/SC-01": {"stray-file"},
    }


def test_padded_folder_names_are_found(tmp_path: Path) -> None:
    """link.csv says SC-HF-I-1, the folder is SC-HF-I-01; SC-HF-I-10 is somebody else."""
    root = arterys(
        tmp_path,
        [],
        ["1.dcm"],
        **{
            "link.csv": "patient_id,original_id\nP1,SC-HF-I-1\n",
            contour(1, original_id="SC-HF-I-01"): RING,
            contour(2, original_id="SC-HF-I-10"): RING,
        },
    )
    found, _, listing = pair(root, in_folder({"1.dcm": 1}))

    assert found == {contour(1, original_id="SC-HF-I-01"): "dicoms/P1/1.dcm"}
    assert reasons(listing.problems) == {"contourfiles/SC-HF-I-10": {"stray-file"}}


@pytest.mark.parametrize(
    "row", ["../outside,SC-2", "P2,../../outside", "/etc,SC-2", "P2,C:\\data", "a/../../b,SC-2"]
)
def test_rows_that_leave_the_data_directory_are_refused(tmp_path: Path, row: str) -> None:
    """A row that points elsewhere is reported and nothing there is opened."""
    plant(tmp_path, {"outside/1.dcm": "secret", "outside/IM-0001-0001-icontour-manual.txt": RING})
    root = arterys(
        tmp_path / "data",
        [1],
        ["1.dcm"],
        **{"link.csv": f"patient_id,original_id\nP1,SC-1\n{row}\n"},
    )
    found, _, listing = pair(root, in_folder({"1.dcm": 1}))

    assert found == {contour(1): "dicoms/P1/1.dcm"}
    assert listing.image_paths == ["dicoms/P1/1.dcm"]
    assert [(problem.path, problem.reason) for problem in listing.problems] == [
        ("link.csv", Reason.OUTSIDE_DATA_DIRECTORY)
    ]
    assert "line 3: its " in listing.problems[0].detail


def test_links_that_leave_the_data_directory_are_not_followed(tmp_path: Path) -> None:
    """Symbolic links to files and folders outside, and to folders inside, are only reported."""
    outside = plant(tmp_path / "outside", {"1.dcm": "secret", "P2/1.dcm": "", "ring.txt": RING})
    root = arterys(
        tmp_path / "data",
        [1],
        ["1.dcm"],
        **{"link.csv": "patient_id,original_id\nP1,SC-1\nP2,SC-1-b\n", "store/kept.dcm": ""},
    )
    (root / "dicoms/P1/5.dcm").symlink_to(outside / "1.dcm")
    (root / "dicoms/P2").symlink_to(outside / "P2", target_is_directory=True)
    (root / "dicoms/P1/loop").symlink_to(root / "dicoms", target_is_directory=True)
    (root / "dicoms/P1/6.dcm").symlink_to(root / "store/kept.dcm")
    (root / contour(2)).symlink_to(outside / "ring.txt")
    os.mkfifo(root / "dicoms/P1/7.dcm")
    listing = sunnybrook.list_files(root, ALL)

    assert listing.image_paths == ["dicoms/P1/1.dcm", "dicoms/P1/6.dcm"]
    assert [outline.path for outline in listing.outlines] == [contour(1)]
    assert reasons(listing.problems) == {
        "dicoms/P1/5.dcm": {"outside-data-directory"},
        "dicoms/P2": {"outside-data-directory", "annotation-without-images"},
        "dicoms/P1/loop": {"stray-file"},
        "dicoms/P1/7.dcm": {"stray-file"},
        contour(2): {"outside-data-directory"},
        "contourfiles/SC-1-b": {"images-without-annotation"},
    }


def test_a_link_table_outside_the_data_directory_is_not_read(tmp_path: Path) -> None:
    """link.csv must lie in the data directory, not behind a link or a path that leaves it."""
    plant(tmp_path, {"link.csv": "patient_id,original_id\nP1,SC-1\n"})
    root = arterys(tmp_path / "data", [1], ["1.dcm"])
    (root / "link.csv").unlink()
    (root / "link.csv").symlink_to(tmp_path / "link.csv")
    for name in ("link.csv", "../link.csv"):
        with pytest.raises(LayoutError, match=f"there is no {name}"):
            sunnybrook.list_files(root, ScanOptions(link_file_name=name))


# --------------------------------------------------------------------------- directories as such


def test_directories_that_are_none_are_refused(tmp_path: Path) -> None:
    """A missing directory, a file and an empty directory, with the path in the message."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("gone", "gone: there is no such directory"),
        ("file", "file: not a directory"),
        ("empty", "empty: the directory is empty"),
    ):
        with pytest.raises(LayoutError, match=message):
            sunnybrook.list_files(tmp_path / name, ScanOptions())


def test_a_missing_part_of_the_layout_is_named(tmp_path: Path) -> None:
    """link.csv, dicoms/ and contourfiles/ each: what is missing and what it should hold."""
    root = arterys(tmp_path / "a", [1], ["1.dcm"])
    (root / "link.csv").rename(root / "names.csv")
    with pytest.raises(LayoutError, match=r"no link.csv, .*patient_id .*dicoms/.*link_file_name"):
        sunnybrook.list_files(root, ScanOptions())
    assert len(sunnybrook.list_files(root, ScanOptions(link_file_name="names.csv")).outlines) == 1
    with pytest.raises(LayoutError, match=r"needs a folder contourfiles/ .*original_id"):
        sunnybrook.list_files(plant(tmp_path / "b", {"dicoms/P1/1.dcm": ""}), ScanOptions())
    with pytest.raises(LayoutError, match=r"needs a folder dicoms/ .*patient_id"):
        sunnybrook.list_files(plant(tmp_path / "c", {contour(1): RING}), ScanOptions())


def test_a_directory_without_contours_is_refused(tmp_path: Path) -> None:
    """Neither layout: what was looked for is named."""
    root = plant(tmp_path, {"a/b.txt": "", "IM1": ""})
    with pytest.raises(LayoutError, match=r"no contour file .* lies in a folder named like"):
        sunnybrook.list_files(root, ScanOptions())


# ---------------------------------------------------------------------------- the original tree

EXPERT = "contours-manual/IRCCI-expert"


def original(root: Path, images: str = "challenge_training/SC-HF-I-1") -> Path:
    """The original tree with one patient and its usual company."""
    contours = f"SCD_ManualContours/SC-HF-I-01/{EXPERT}"
    return plant(
        root,
        {
            f"{contours}/IM-0001-0048-icontour-manual.txt": RING,
            f"{contours}/IM-0001-0048-ocontour-manual.txt": RING,
            f"{contours}/IM-0001-0060-p1contour-manual.txt": RING,
            f"{contours}/IM-0001-0060-p2-contour-manual.txt": RING,
            f"{images}/IM-0003-0048.dcm": "",
            f"{images}/IM-0003-0060.dcm": "",
            f"{images}/IM-0003-0160.dcm": "",
        },
    )


@pytest.mark.parametrize(
    "images", ["challenge_training/SC-HF-I-1", "DICOM/sc-hf-i-01/CINESAX_300", "SC-HF-I-1/DICOM"]
)
def test_the_original_tree_is_paired(tmp_path: Path, images: str) -> None:
    """Padded folders of contours, un-padded ones of images, IM-0001 against IM-0003."""
    root = original(tmp_path, images)
    numbers = {f"{images}/IM-0003-{n:04d}.dcm": (n, "1.2") for n in (48, 60, 160)}
    found, paired, listing = pair(root, numbers)
    contours = f"SCD_ManualContours/SC-HF-I-01/{EXPERT}"

    assert found == {
        f"{contours}/IM-0001-0048-icontour-manual.txt": f"{images}/IM-0003-0048.dcm",
        f"{contours}/IM-0001-0048-ocontour-manual.txt": f"{images}/IM-0003-0048.dcm",
        f"{contours}/IM-0001-0060-p1contour-manual.txt": f"{images}/IM-0003-0060.dcm",
        f"{contours}/IM-0001-0060-p2-contour-manual.txt": f"{images}/IM-0003-0060.dcm",
    }
    assert set(listing.image_patients) == {"SC-HF-I-01"}
    assert (listing.problems, paired.problems) == ((), ())
    assert [one.name for one in paired.annotations] == ["i", "o", "p1", "p2"]


@pytest.mark.parametrize("name", ["link.csv", "scd_patientdata.csv"])
def test_folders_with_other_names_are_linked_by_a_table(tmp_path: Path, name: str) -> None:
    """SCD0000101 is SC-HF-I-1 by the table that comes with the data, or by link.csv."""
    folder = "SCD_IMAGES_01/SCD0000101/CINESAX_300"
    root = original(tmp_path, folder)
    before = sunnybrook.list_files(root, ScanOptions())
    plant(root, {name: "PatientID,OriginalID,Age\nSCD0000101,SC-HF-I-1,50\nSCD2,SC-HF-I-2,60\n"})
    found, _, listing = pair(
        root, {f"{folder}/IM-0003-{n:04d}.dcm": (n, "1.2") for n in (48, 60, 160)}
    )

    assert reasons(before.problems) == {
        folder: {"images-without-annotation"},
        "SCD_ManualContours/SC-HF-I-01": {"annotation-without-images"},
    }
    assert before.image_paths == []
    assert len(found) == 4
    assert listing.problems == ()


def test_competing_folders_of_the_original_tree(tmp_path: Path) -> None:
    """Of several CINESAX folders the one that covers the contours is taken, the other told."""
    root = original(tmp_path, "DICOM/SC-HF-I-1/CINESAX_300")
    plant(root, {"DICOM/SC-HF-I-1/CINELAX_301/IM-0004-0048.dcm": ""})
    found, paired, _ = pair(
        root,
        {f"DICOM/SC-HF-I-1/CINESAX_300/IM-0003-{n:04d}.dcm": (n, "1") for n in (48, 60, 160)}
        | {"DICOM/SC-HF-I-1/CINELAX_301/IM-0004-0048.dcm": (48, "2")},
    )

    assert {path.split("/")[2] for path in found.values()} == {"CINESAX_300"}
    assert len(found) == 4
    assert reasons(paired.problems) == {"DICOM/SC-HF-I-1/CINELAX_301": {"alternative-series"}}


def test_images_belong_to_the_nearest_folder_of_a_patient(tmp_path: Path) -> None:
    """A patient's folder inside another patient's is the inner one's."""
    root = original(tmp_path, "SC-HF-I-2/SC-HF-I-1")
    other = f"SCD_ManualContours/SC-HF-I-02/{EXPERT}/IM-0001-0048-icontour-manual.txt"
    plant(root, {other: RING, "SC-HF-I-2/IM-0003-0048.dcm": ""})
    listing = sunnybrook.list_files(root, ScanOptions())

    assert dict(zip(listing.image_paths, listing.image_patients, strict=True)) == {
        "SC-HF-I-2/IM-0003-0048.dcm": "SC-HF-I-02",
        "SC-HF-I-2/SC-HF-I-1/IM-0003-0048.dcm": "SC-HF-I-01",
        "SC-HF-I-2/SC-HF-I-1/IM-0003-0060.dcm": "SC-HF-I-01",
        "SC-HF-I-2/SC-HF-I-1/IM-0003-0160.dcm": "SC-HF-I-01",
    }


def test_the_company_of_the_original_tree_is_harmless(tmp_path: Path) -> None:
    """Licences, swap files and contours of algorithms are told and not taken."""
    root = original(tmp_path)
    company = [
        "SCD_ManualContours/CC0_License.htm",
        f"SCD_ManualContours/SC-HF-I-01/{EXPERT}/.IM-0001-0048-icontour-manual.txt.swp",
        f"SCD_ManualContours/SC-HF-I-01/{EXPERT}/IM-0001-0049-icontour-auto.txt",
        f"SCD_ManualContours/SC-HF-I-01/{EXPERT}/README",
    ]
    plant(root, dict.fromkeys(company, "x"))
    listing = sunnybrook.list_files(root, ScanOptions())

    assert reasons(listing.problems) == {path: {"stray-file"} for path in company}
    assert len(listing.image_paths) == 3


def test_contours_of_nobody_are_refused(tmp_path: Path) -> None:
    """A contour outside any patient's folder is reported beside those that are well placed."""
    root = original(tmp_path)
    plant(root, {"IM-0001-0001-icontour-manual.txt": RING})
    listing = sunnybrook.list_files(root, ScanOptions())

    assert reasons(listing.problems) == {"IM-0001-0001-icontour-manual.txt": {"bad-contour"}}
    assert len(listing.outlines) == 4


def test_a_second_copy_of_the_contours_counts_once(tmp_path: Path) -> None:
    """The same contours unpacked twice (SC-HF-I-01 and SC-HF-I-1) are one patient's, once."""
    root = original(tmp_path)
    other = f"Part1/SC-HF-I-1/{EXPERT}/IM-0001-0048-icontour-manual.txt"
    plant(root, {other: RING})
    listing = sunnybrook.list_files(root, ScanOptions())

    assert len(listing.outlines) == 4
    assert [problem.reason for problem in listing.problems] == [Reason.REPEATED]


# ---------------------------------------------------------------------------------------- names


def test_names_compare_as_words_and_numbers() -> None:
    """Padding, case and punctuation do not matter, numbers do; sorting is by number."""
    same = {canonical_name(n) for n in ("SC-HF-I-01", "SC-HF-I-1", "sc_hf_i_001", "SC HF I 1")}
    others = {canonical_name(n) for n in ("SC-HF-I-10", "SC-HF-1", "SC-HF-NI-1", "SC-HFI-1", "--")}

    assert len(same) == 1
    assert len(same | others) == 6
    assert sorted(["P10", "P2", "P1b", "P01"], key=natural_key) == ["P01", "P1b", "P2", "P10"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200)), min_size=1, max_size=6))
def test_names_sort_and_compare_as_their_integers(numbers: list[tuple[int, int]]) -> None:
    """Whatever the padding: sorted by integer, and one name exactly where the integers are one."""
    names = [f"P{'0' * zeros}{number}" for zeros, number in numbers]
    ordered = sorted(names, key=natural_key)

    assert [int(name[1:]) for name in ordered] == sorted(number for _, number in numbers)
    assert len({canonical_name(name) for name in names}) == len({number for _, number in numbers})


def test_numbers_of_any_length_are_names(tmp_path: Path) -> None:
    """5,000 digits, which `int` refuses, in a table, and a contour's number of 200."""
    long, longer = "9" * 5000, "1" + "0" * 5000
    path = tmp_path / "link.csv"
    path.write_text(f"patient_id,original_id\n{longer},A\n{long},B\n")
    root = arterys(tmp_path / "data", [1, 10**200], ["1.dcm", f"{'7' * 200}.dcm"])
    found, paired, _ = pair(root, in_folder({"1.dcm": 1}))

    assert [link.patient_id for link in read_links(path)] == [longer, long]
    assert sorted([longer, long, "0" * 5000], key=natural_key) == ["0" * 5000, long, longer]
    assert canonical_name(f"P{'0' * 5000}1") == canonical_name("P1")
    assert found == {contour(1): "dicoms/P1/1.dcm"}
    assert reasons(paired.problems) == {contour(10**200): {"contour-without-image"}}


# -------------------------------------------------------------------- in a tree of other things


def cohorts(root: Path) -> list[Listing]:
    """The cohorts that are found in a tree."""
    return sunnybrook.find_cohorts(root, list(walk(str(root.resolve()), "")), ScanOptions())


def test_cohorts_are_found_anywhere_in_a_tree(tmp_path: Path) -> None:
    """Both layouts, each with paths from the root and its own patients; the rest is nobody's."""
    arterys(tmp_path / "a/b", [1], ["1.dcm"])
    arterys(tmp_path / "c", [2], ["2.dcm"])
    original(tmp_path / "d")
    plant(tmp_path, {"hospital/CT/1": "", "a/b/notes.txt": "", "a/b/more/2.dcm": ""})
    first, second, third = cohorts(tmp_path)

    assert first.image_paths == ["a/b/dicoms/P1/1.dcm"]
    assert [one.path for one in first.outlines] == [f"a/b/{contour(1)}"]
    assert first.claimed == {"a/b/dicoms", "a/b/contourfiles", "a/b/link.csv"}
    assert second.image_paths == ["c/dicoms/P1/2.dcm"]
    assert set(third.image_patients) == {"SC-HF-I-01"}
    assert len(third.claimed) == 4 + 3
    assert [listing.problems for listing in (first, second, third)] == [(), (), ()]


def test_a_tree_of_other_things_holds_no_cohort(tmp_path: Path) -> None:
    """A folder of the name dicoms alone, or a link table alone, is no cohort."""
    plant(tmp_path, {"dicoms/1.dcm": "", "x/contourfiles/notes": "", "x/link.csv": ""})

    assert cohorts(tmp_path) == []


@pytest.mark.parametrize("place", ["", "sunny/"])
def test_the_table_of_the_original_tree_may_lie_above_it(tmp_path: Path, place: str) -> None:
    """The link table counts in each folder on the way to the contours, and nowhere else."""
    original(tmp_path / place, "SCD_IMAGES_01/SCD0000101/CINESAX_300")
    line = "PatientID,OriginalID\nSCD0000101,SC-HF-I-1\n"
    plant(tmp_path, {f"{place}scd_patientdata.csv": line, "elsewhere/link.csv": "of somebody\n"})
    (listing,) = cohorts(tmp_path)

    assert len(listing.image_paths) == 3
    assert f"{place}scd_patientdata.csv" in listing.claimed
    assert "elsewhere/link.csv" not in listing.claimed


# ------------------------------------------------------------------------------- reading outlines


def refs(paths: Sequence[str]) -> AnnotationRefs:
    """One outline on each of as many slices."""
    count = len(paths)
    zeros = (0,) * count
    return AnnotationRefs(
        plane=tuple(range(count)),
        structure=(1,) * count,
        layer=zeros,
        kind=("sunnybrook",) * count,
        path=tuple(paths),
        offset=zeros,
        length=(-1,) * count,
    )


def slice_refs(count: int) -> SliceRefs:
    """Slices of which a path is all that is known."""
    columns = {field.name: ((),) * count for field in fields(SliceRefs)}
    columns["path"] = tuple(f"{k}.dcm" for k in range(count))
    return SliceRefs(**columns)


@pytest.mark.parametrize("origin", [0.0, 0.5, 1.0])
def test_outlines_are_read_in_pixels(tmp_path: Path, origin: float) -> None:
    """Points less the origin, rings by slice, and what cannot be read as a problem with words."""
    texts = {contour(1): "1 1\n1 5\n5.5 5\n", contour(2): "1 x\n", contour(3): "2 2\n2 6\n6 6\n"}
    plant(tmp_path, texts)
    paths = [*texts, contour(4)]
    drawn = sunnybrook.read(str(tmp_path), slice_refs(4), refs(paths), contour_origin=origin)
    good = [parse_contour(texts[path].encode()) - origin for path in (contour(1), contour(3))]

    np.testing.assert_array_equal(drawn.contours.points_column_row, np.concatenate(good))
    assert drawn.contours.offsets.tolist() == [0, 3, 6]
    assert drawn.contours.plane.tolist() == [0, 2]
    assert drawn.contours.structure.tolist() == [1, 1]
    assert drawn.contours.layer is not None
    assert drawn.contours.layer.tolist() == [0, 0]
    assert list(drawn.bitmaps) == []
    assert (drawn.digest > 0).tolist() == [True, False, True, False]
    assert [(place, reason) for place, reason, _ in drawn.problems] == [
        (1, Reason.BAD_CONTOUR),
        (3, Reason.BAD_CONTOUR),
    ]
    assert drawn.problems[0][2].endswith("; structure i of 1.dcm")


def test_a_file_name_tells_its_structure() -> None:
    """By the name alone, whatever the folder; other files have none."""
    assert sunnybrook.structure_of(f"a/b/{contour(7, 'p1')}") == "p1"
    assert sunnybrook.structure_of("IM-0001-0060-P2-contour-manual.txt") == "p2"
    assert sunnybrook.structure_of("icontour/notes.txt") is None
