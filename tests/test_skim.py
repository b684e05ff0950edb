"""The elements that are wanted of a header, against pydicom, which parses all of it."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pydicom.data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence

from parallel_dicomseg.dicom.opened import FrameError, check_census
from parallel_dicomseg.dicom.skim import census, skim
from parallel_dicomseg.limits import applied
from parallel_dicomseg.records import Limits

FILES = Path(pydicom.data.DATA_ROOT, "test_files")
ROWS, COLUMNS, GROUPS = 0x00280010, 0x00280011, 0x52009229
WANTED = (0x00080060, ROWS, COLUMNS, 0x00280100, GROUPS)


def written(dataset: Dataset, implicit: bool = False) -> bytes:
    """The bytes of a data set."""
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, implicit
    write_dataset(stream, dataset)
    return stream.getvalue()


def counted(dataset: Dataset) -> tuple[int, int]:
    """Elements and items at any depth, without delimiters, and the depth: the obvious twin."""
    elements, depth = 0, 0
    for element in dataset:
        elements += 1
        if element.VR == "SQ":
            depth = max(depth, 1)
            for item in element.value:
                below, deeper = counted(item)
                elements, depth = elements + 1 + below, max(depth, 1 + deeper)
    return elements, depth


@st.composite
def datasets(draw: st.DrawFn, depth: int = 3) -> Dataset:
    """Any data set of a few elements, some of them sequences."""
    dataset = Dataset()
    if draw(st.booleans()):
        dataset.Modality = "MR"
    if draw(st.booleans()):
        dataset.add_new(0x00091010, "LO", draw(st.sampled_from(["", "private", "x" * 60])))
        dataset.add_new(0x00090010, "LO", "OWNER")
    if draw(st.booleans()):
        dataset.Rows = draw(st.integers(0, 65535))
    if draw(st.booleans()):
        dataset.PatientComments = "\xfe\xff\0\xe0" * draw(st.integers(0, 3))
    for tag in (0x00081140, 0x0040A730, GROUPS):
        if depth and draw(st.booleans()):
            items = draw(st.lists(datasets(depth - 1), max_size=3))  # type: ignore[call-arg]
            for item in items:
                item.is_undefined_length_sequence_item = draw(st.booleans())
            dataset.add_new(tag, "SQ", Sequence(items))
            dataset[tag].is_undefined_length = draw(st.booleans())
    return dataset


@given(datasets(), st.booleans())
def test_wanted_elements_are_those_of_the_whole_data_set(dataset: Dataset, implicit: bool) -> None:
    """What is skimmed, parsed by pydicom, equals the same elements of the data set."""
    raw = written(dataset, implicit)
    found = skim(raw, 0, not implicit, WANTED)

    assert found is not None
    assert found[1] == len(raw)
    part = read_dataset(io.BytesIO(found[0]), implicit, True)
    whole = read_dataset(io.BytesIO(raw), implicit, True)
    assert part == Dataset({tag: whole[tag] for tag in whole.keys() if tag in WANTED})  # noqa: SIM118


@given(datasets(), st.booleans())
def test_the_census_counts_what_pydicom_would_parse(dataset: Dataset, implicit: bool) -> None:
    """At least every element and item, and at least the depth; without VRs text may look deeper."""
    raw = written(dataset, implicit)
    elements, depth = census(raw, 0, not implicit)
    least, deepest = counted(read_dataset(io.BytesIO(raw), implicit, True))

    assert least <= elements <= 3 * least + len(raw) // 8
    # an empty sequence without a VR looks like any other empty element
    assert depth == deepest or (implicit and deepest - 1 <= depth <= deepest + 1)


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_skimmed_and_counted(raw: bytes, explicit: bool) -> None:
    """Whatever stands there: an answer, which is never longer than the bytes."""
    found = skim(raw, 0, explicit, WANTED)
    elements, _ = census(raw, 0, explicit)

    assert found is None or len(found[0]) <= len(raw) >= found[1]
    assert 0 <= elements <= len(raw) // 8 + 1


def test_damaged_headers_are_skimmed() -> None:
    """Of any mutant of a real header, skim and census say something, and say it in time."""
    chance = random.Random(3)
    seeds = [path.read_bytes()[132:4000] for path in sorted(FILES.glob("*_small*.dcm"))]
    for _ in range(1000):
        raw = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 3, 20))):
            raw[chance.randrange(len(raw))] = chance.choice((0, 1, 255, 254, 224, 83, 81))
        found = skim(bytes(raw), 0, True, WANTED)
        assert found is None or found[1] <= len(raw)
        assert census(bytes(raw), 0, True)[0] <= len(raw)


def nested(depth: int) -> Dataset:
    """Sequences inside one another."""
    dataset = Dataset()
    for _ in range(depth):
        dataset.is_undefined_length_sequence_item = True
        outer = Dataset()
        outer.add_new(GROUPS, "SQ", Sequence([dataset]))
        outer[GROUPS].is_undefined_length = True
        dataset = outer
    return dataset


@pytest.mark.parametrize(
    ("limits", "dataset", "message"),
    [
        (Limits(header_depth=4), nested(5), "5 sequences inside one another, limit 4"),
        (Limits(header_elements=10), nested(8), r"the header has \d+ elements and items, limit 10"),
    ],
)
def test_too_much_to_parse_is_refused(limits: Limits, dataset: Any, message: str) -> None:
    """Both numbers are named, before pydicom sees anything."""
    raw = written(dataset)
    check_census(raw, True)
    with applied(limits), pytest.raises(FrameError, match=message):
        check_census(raw, True)


def test_undefined_unknown_elements_are_left_to_pydicom() -> None:
    """A private UN of undefined length is implicit inside: the walk does not pretend to know."""
    raw = (FILES / "UN_sequence.dcm").read_bytes()
    found = skim(raw, 132, True, WANTED)

    assert found is None or found[1] <= len(raw)
