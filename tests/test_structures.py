"""Names to structures: what is chosen, what meets on the same images, and the table's order."""

from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import convert_cohort, scan_cohort
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.phantoms import make_rtstruct_series
from parallel_dicomseg.records import Annotation, Reason
from parallel_dicomseg.structures import annotation_table, asked_for, choose, read_aliases

VOLUME = (0, 1, 2, 3)


def annotation(name, path="a.dcm", slices=(0,), looked_at=VOLUME, kind="rtstruct"):
    """What one file draws as one structure, a ring on each of the slices."""
    rings = np.arange(len(slices), dtype=np.int64)
    return Annotation(
        kind=kind,
        path=path,
        name=name,
        found_by="reference",
        looked_at=np.array(looked_at, np.int64),
        slice=np.array(slices, np.int64),
        offset=100 * rings[::-1],
        length=rings + 1,
    )


def chosen(annotations, *wanted, aliases=None, case_sensitive=False, several="merge"):
    """The default choice but for what is given."""
    return choose(annotations, wanted, aliases or {}, case_sensitive, several)


def united(annotations, *wanted, **options):
    """Structure -> places of its annotations, in order of annotation."""
    choice = chosen(annotations, *wanted, **options)
    pairs = list(zip(choice.structure.tolist(), choice.annotation.tolist(), strict=True))
    return {name: sorted(k for s, k in pairs if s == at) for at, name in enumerate(choice.names)}


def named(*names):
    """Annotations of different files with these names."""
    return [annotation(name, f"{k}.dcm", (k % 4,)) for k, name in enumerate(names)]


def test_without_a_wish_every_name_is_a_structure():
    """Names equal up to case and blanks are one, spelled as most often; natural order."""
    found = named("GTV 10", "heart", "Heart", " GTV  2", "Heart ", "")

    assert united(found) == {"GTV 2": [3], "GTV 10": [0], "Heart": [1, 2, 4], "unnamed": [5]}


def test_of_equally_frequent_spellings_the_first_in_natural_order_is_shown():
    """The order of the files does not matter for the name."""
    assert [*united(named("heart", "HEART"))] == [*united(named("HEART", "heart"))] == ["HEART"]


def test_case_can_be_made_to_matter():
    """Then 'Heart' and 'heart' are two; blanks still do not matter."""
    found = named("Heart", "heart", "Heart  ")

    assert united(found, case_sensitive=True) == {"Heart": [0, 2], "heart": [1]}
    assert united(found, "/hea.*/", case_sensitive=True) == {"heart": [1]}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["heart"], {"heart": [2]}),
        (["LUNG l", "heart"], {"LUNG l": [0], "heart": [2]}),
        (["lung=/lung .*/"], {"lung": [0, 1]}),
        (["/LUNG .*/"], {"Lung L": [0], "Lung R": [1]}),
        (["/lung/", "heart"], None),
        (["cor=heart"], {"cor": [2]}),
        (["x=lung l", "X=lung r"], {"x": [0, 1]}),
        (["heart", "/.*/"], {"heart": [2], "a=b": [3], "Lung L": [0], "Lung R": [1]}),
        (["a=b"], {"a=b": [3]}),
        (["c=a=b"], {"c": [3]}),
        (["heart", "cor=heart"], {"heart": [2], "cor": [2]}),
    ],
)
def test_wanted_items_choose_and_rename(wanted, expected):
    """Exact names, renaming, expressions that match entirely; bits in the order of the wishes."""
    found = named("Lung L", "Lung R", "Heart", "a=b")

    if expected is None:
        with pytest.raises(ConfigurationError, match="no structure '/lung/' is there, but: 'Lung"):
            united(found, *wanted)
    else:
        assert united(found, *wanted) == expected
        assert [*united(found, *wanted)] == [*expected]


def test_an_alias_table_names_all_structures_and_nothing_else():
    """Its own names count, in its order; what matches nothing is a structure without images."""
    aliases = {"heart": ("coeur", "/hrt.*/"), "liver": ("Leber",), "lung": ()}
    found = named("Coeur", "HRT 1", "Heart", "Lung", "Leberrand")

    choice = chosen(found, aliases=aliases)

    assert united(found, aliases=aliases) == {"heart": [0, 1, 2], "liver": [], "lung": [3]}
    assert choice.missing == ("liver",)
    assert choice.unmatched == {"Leberrand": 1}


def test_names_of_the_alias_table_can_be_wished_for_and_renamed():
    """An entry's name stands for all that it means; plain names stay possible beside it."""
    aliases = {"heart": ("coeur",)}
    found = named("Coeur", "Heart", "Lung")

    expected = {"lung": [2], "cor": [0, 1], "HEART": [0, 1]}
    assert united(found, "lung", "cor=Heart", aliases=aliases) == {
        name: expected[name] for name in ("lung", "cor")
    }
    assert united(found, "heart", aliases=aliases) == {"heart": [0, 1]}


def test_an_alias_table_that_fits_nothing_is_told():
    """Nothing to convert is no result; the names that are there are listed."""
    with pytest.raises(
        ConfigurationError, match="no structure of the alias table is there, but: 'A'"
    ):
        chosen(named("A"), aliases={"heart": ("coeur",)})


def test_a_wish_that_nothing_fits_lists_what_is_there_with_the_nearest_first():
    """Close spellings first, then the rest, cut where there are many."""
    found = named(*(f"ROI {k}" for k in range(40)), "Lung_L")

    with pytest.raises(
        ConfigurationError, match=r"'lungL' is there, but: 'Lung_L', .*'ROI 28' and 11 more$"
    ):
        chosen(found, "lungL")
    with pytest.raises(
        ConfigurationError, match="no structure 'x' is there, and nothing else either"
    ):
        chosen([], "x")


@pytest.mark.parametrize(
    ("wanted", "several", "message"),
    [
        ("/(/", "merge", r"structure '/\(/': /\(/ is no regular expression"),
        ("=x", "merge", "'=x': needs a name, or new=old"),
        ("x=", "merge", "'x=': needs a name, or new=old"),
        (" ", "merge", "' ': needs a name, or new=old"),
        ("heart", "both", "'both' is none of merge, first, separate"),
    ],
)
def test_malformed_wishes_are_named(wanted, several, message):
    """The entry is in the message."""
    with pytest.raises(ConfigurationError, match=message):
        chosen(named("heart"), wanted, several=several)


def laid(annotations, several):
    """(structure, layer) of each annotation, None where it is left out; one structure is wished."""
    choice = chosen(annotations, "x=/.*/", several=several)
    found = dict.fromkeys(range(len(annotations)))
    columns = (choice.annotation, choice.structure, choice.layer)
    for place, structure, layer in zip(*(column.tolist() for column in columns), strict=True):
        found[place] = choice.names[structure], layer
    return [*found.values()], [(p.path, p.reason) for p in choice.problems]


def test_several_in_one_file_are_merged_taken_first_or_kept_apart():
    """Overlapping or not: what was looked for on the same images is one structure's."""
    found = [annotation("gtv 1", slices=[0]), annotation("gtv 2", slices=[0, 1])]
    other = annotation("gtv 3", slices=[8], looked_at=[8, 9])

    assert laid([*found, other], "merge") == ([("x", 0), ("x", 1), ("x", 0)], [])
    assert laid([*found, other], "separate") == ([("x", 0), ("x-2", 0), ("x", 0)], [])
    assert laid([*found, other], "first") == (
        [("x", 0), None, ("x", 0)],
        [("a.dcm", Reason.REPEATED)],
    )


def test_the_first_file_that_draws_a_structure_on_an_image_wins():
    """In order of the paths, not of the sequence; a file that draws elsewhere is united."""
    late, early = annotation("a", "b.dcm", [1, 2]), annotation("A", "a.dcm", [2, 3])
    apart = annotation("a", "c.dcm", [0])

    for several in ("merge", "first"):
        assert laid([late, early, apart], several) == (
            [None, ("x", 0), ("x", 1)],
            [("b.dcm", Reason.DUPLICATE)],
        )
    choice = chosen([late, early, apart])
    assert choice.problems[0].is_rejection
    assert choice.problems[0].detail == (
        "'a' is drawn on 2 images, on 1 of which an earlier file has drawn this structure already; "
        "left out"
    )
    assert laid([late, early, apart], "separate") == ([("x-2", 0), ("x", 0), ("x-3", 0)], [])


def test_numbered_names_avoid_those_that_exist():
    """A second 'GTV' does not take the name of a structure that is called 'gtv-2' already."""
    found = [annotation("GTV"), annotation("gtv"), annotation("gtv-2"), annotation("GTV")]

    assert united(found, several="separate") == {
        "GTV": [0],
        "GTV-3": [1],
        "GTV-4": [3],
        "gtv-2": [2],
    }


annotations_of_a_cohort = st.lists(
    st.builds(
        annotation,
        name=st.sampled_from(["x", "X", "y", " x"]),
        path=st.sampled_from(["a", "b", "B", "c"]),
        slices=st.lists(st.integers(0, 3), max_size=4),
        looked_at=st.sampled_from([(0, 1, 2, 3), (4, 5), (0, 1), ()]),
        kind=st.sampled_from(["seg", "rtstruct"]),
    ),
    max_size=10,
)


def laid_slowly(annotations, several):
    """Sets instead of arrays; structure by rank instead of by name."""
    drawn, looked, depth, result = {}, {}, Counter(), {}
    for place in sorted(range(len(annotations)), key=lambda k: (annotations[k].path.encode(), k)):
        one = annotations[place]
        slices, images = {*one.slice.tolist()}, {*one.looked_at.tolist()}
        taken = any(slices & others for path, others in drawn.items() if path != one.path)
        same = bool(images & looked.get(one.path, set()))
        if several == "separate" or not (taken or (several == "first" and same)):
            drawn.setdefault(one.path, set()).update(slices)
            looked.setdefault(one.path, set()).update(images)
            rank = max([depth[image] for image in images | slices], default=0)
            for image in images | slices:
                depth[image] = rank + 1
            result[place] = (
                ("x" + f"-{rank + 1}" * (rank > 0), 0) if several == "separate" else ("x", rank)
            )
    return [result.get(place) for place in range(len(annotations))]


@given(annotations_of_a_cohort, st.sampled_from(["merge", "first", "separate"]))
def test_who_is_laid_over_whom_is_as_in_the_slow_twin(annotations, several):
    """Any files on any images; every annotation is taken or has a problem."""
    if not annotations:
        return
    found, problems = laid(annotations, several)

    assert found == laid_slowly(annotations, several)
    assert len(problems) == found.count(None)


@given(annotations_of_a_cohort, st.sampled_from(["merge", "first", "separate"]))
def test_the_table_is_the_sorted_list_of_all_rings(annotations, several):
    """Against plain Python; the bits say where somebody looked."""
    choice = chosen(annotations, several=several)

    table, annotated = annotation_table(annotations, choice, 6)

    columns = (choice.annotation, choice.structure, choice.layer)
    expected, bits = [], [0] * 6
    for place, structure, layer in zip(*(column.tolist() for column in columns), strict=True):
        one = annotations[place]
        for image, offset, length in zip(one.slice, one.offset, one.length, strict=True):
            key = (image, structure, layer, one.kind.encode(), one.path.encode(), offset)
            expected.append((*key, length))
        for image in one.looked_at:
            bits[image] |= 1 << structure
    rows = [
        table.slice,
        table.structure,
        table.layer,
        table.kind,
        table.path,
        table.offset,
        table.length,
    ]
    assert [*zip(*(column.tolist() for column in rows), strict=True)] == sorted(expected)
    assert annotated.tolist() == bits
    assert (table.slice.dtype, table.structure.dtype, table.layer.dtype) == ("i8", "i4", "i4")
    assert (annotated.dtype, table.kind.dtype.kind, table.path.dtype.kind) == ("u8", "S", "S")


def test_layers_of_one_structure_never_share_an_image_and_a_layer():
    """Rings of two annotations must not cancel each other by parity."""
    found = [annotation(f"x{k}", slices=range(4)) for k in range(3)]

    choice = chosen(found, "x=/x./")
    table, _ = annotation_table(found, choice, 4)

    assert table.layer.tolist() == [0, 1, 2] * 4
    assert table.structure.tolist() == [0] * 12


def test_the_64th_structure_has_a_bit_and_the_65th_none():
    """More structures than bits are the plan's to refuse, not an overflow here."""
    found = [annotation(f"s{k:02}", slices=()) for k in range(66)]

    _, annotated = annotation_table(found, chosen(found), 4)

    assert annotated.tolist() == [2**64 - 1] * 4


def test_a_structure_missing_from_a_file_is_not_annotated_there():
    """Empty and not looked at are two things: only the file's own volume has its bit."""
    one = annotation("a", "1.dcm", (), looked_at=[0, 1])
    two = annotation("b", "2.dcm", [2], looked_at=[2, 3])

    _, annotated = annotation_table([one, two], chosen([one, two]), 5)

    assert annotated.tolist() == [1, 1, 2, 2, 0]


def test_aliases_are_read_from_toml(tmp_path):
    """Lists or single names, quoted keys, expressions."""
    file = tmp_path / "names.toml"
    file.write_text(
        '[structures]\nheart = ["Heart", "cœur", "/hrt.*/"]\n"lung left" = "Lt Lung"\n', "utf-8"
    )

    assert read_aliases(file) == {"heart": ("Heart", "cœur", "/hrt.*/"), "lung left": ("Lt Lung",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        (b"\xff", "not TOML"),
        (b"[structures", "not TOML"),
        (b"", r"needs one table \[structures\]$"),
        (b"[structures]", r"needs one table \[structures\]$"),
        (b"[structure]\na = []", r"needs one table \[structures\], but structure"),
        (b"[structures]\na = 1", r"structures\.a: not a list of names: 1"),
        (b"[structures]\na = ['b', '']", r"structures\.a: not a list of names"),
        (b"[structures]\na = ['/(/']", r"structures\.a: /\(/ is no regular expression"),
    ],
)
def test_a_bad_alias_table_is_named(tmp_path, text, message):
    """File and entry are in the message."""
    file = tmp_path / "names.toml"
    if text is not None:
        file.write_bytes(text)

    with pytest.raises(ConfigurationError, match=message):
        read_aliases(file)


def test_names_of_a_clinical_structure_set(shared_data):
    """The ten ROIs of a real file: chosen by expression, and two of them united."""
    import pydicom

    file = next((shared_data / "rtstruct_odd" / "dicompyler").rglob("rtss.dcm"))
    rois = pydicom.dcmread(file).StructureSetROISequence
    found = [annotation(roi.ROIName, "rtss.dcm") for roi in rois]

    choice = chosen(found, "body", "bed=/tumor bed.*/")

    assert len(found) == 10
    assert choice.names == ("body", "bed")
    names = [found[k].name for k in choice.annotation]
    assert names == ["BODY", "Tumor Bed", "Tumor Bed Block"]
    assert len(choice.unmatched) == 7


@pytest.mark.parametrize(
    ("wanted", "aliases", "case_sensitive", "expected"),
    [
        ((), {}, False, {"Heart", "HEART ", "GTV 1", "a=b"}),
        (("heart",), {}, False, {"Heart", "HEART "}),
        (("Heart",), {}, True, {"Heart"}),
        (("lesion=/gtv.*/",), {}, False, {"GTV 1"}),
        (("a=b",), {}, False, {"a=b"}),
        ((), {"cor": ("heart",)}, False, {"Heart", "HEART "}),
        (("cor",), {"cor": ("heart",), "t": ("/gtv.*/",)}, False, {"Heart", "HEART "}),
        (("liver",), {}, False, set()),
    ],
)
def test_names_that_are_asked_for(wanted, aliases, case_sensitive, expected):
    """The same names as `choose` would take, but without an error for a wish that nothing fits."""
    names = ["Heart", "HEART ", "GTV 1", "a=b"]

    assert asked_for(names, wanted, aliases, case_sensitive) == expected
    if expected:
        choice = chosen(named(*names), *wanted, aliases=aliases, case_sensitive=case_sensitive)
        assert {names[k] for k in choice.annotation} == expected


def test_a_name_with_a_nul_can_be_written(tmp_path):
    """A damaged ROI Name (3006,0026) with a NUL in it ends no conversion."""
    phantom = make_rtstruct_series(tmp_path / "in", shape=(3, 16, 16))
    (path,) = (p for p in Path(phantom.directory).rglob("*") if is_structure_set(p))
    dataset = pydicom.dcmread(path)
    dataset.StructureSetROISequence[0].ROIName = "left\0lung"
    dataset.save_as(path)

    summary = convert_cohort(scan_cohort(phantom.directory), tmp_path / "x.h5")

    assert "left lung" in summary.structures


def is_structure_set(path):
    """Whether a file is an RTSTRUCT."""
    return path.is_file() and pydicom.dcmread(path, force=True).get("Modality") == "RTSTRUCT"
