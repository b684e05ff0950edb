"""Any tree of files: every file is read, offered to the sources, or told; none is lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg.records import (
    Annotation,
    AnnotationRefs,
    Drawn,
    Problem,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceRefs,
    SliceTable,
)
from parallel_dicomseg.sources.base import Found, walk
from parallel_dicomseg.sources.tree import (
    FOREIGN_SUFFIXES,
    find_annotations,
    list_tree,
    unchosen_files,
)

NO_ROWS = np.empty(0, np.int64)
NO_IMAGES, AN_IMAGE = (
    SliceTable(**{field.name: np.zeros(count) for field in fields(SliceTable)}) for count in (0, 1)
)


def plant(root: Path, paths: Sequence[str]) -> Path:
    """Files of one byte each."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def annotation(path: str, rings: int = 1, name: str = "A") -> Annotation:
    """A structure of a file with so many rings."""
    ring = np.zeros(rings, np.int64)
    return Annotation("test", path, name, "reference", NO_ROWS, ring, ring, ring)


@dataclass
class Endings:
    """A source of files with one ending; those with 'empty' in their name hold nothing."""

    name: str
    ending: str

    def recognizes(self, file: ScannedFile) -> bool:
        """By the ending."""
        return file.path.endswith(self.ending)

    def find(
        self, root: str, files: Sequence[ScannedFile], images: SliceTable, options: ScanOptions
    ) -> Found:
        """One annotation per file, a problem for those with 'bad' in their name."""
        good = [file.path for file in files if not {"bad", "empty"} & {*file.path.split("-")}]
        bad = [file.path for file in files if "bad" in file.path]
        return Found(
            tuple(annotation(path, name=self.name) for path in good),
            tuple(Problem(path, Reason.BAD_CONTOUR, "bad") for path in bad),
        )

    def read(
        self, root: str, slices: SliceRefs, annotations: AnnotationRefs, *, contour_origin: float
    ) -> Drawn:
        """Not part of a scan."""
        raise NotImplementedError


# ------------------------------------------------------------------------------- names of files


def test_names_decide_only_what_is_certain(tmp_path: Path) -> None:
    """No extension, a UID, *.dcm, *.seg, a number: read; *.txt, *.nii.gz and the like: not."""
    read = [
        "1.2.840.10008",
        "DICOMDIR",
        "IM1",
        "a.b/2.dcm",
        "a.b/label.seg",
        "a.b/x.IMA",
        ".hidden",
    ]
    foreign = ["README.txt", "a.b/mask.nii.gz", "a.b/reader.XML", "a.b/c/table.csv"]
    root = plant(tmp_path, read + foreign)
    listed = list_tree(str(root), walk(str(root), ""), frozenset())

    assert sorted(listed.paths) == sorted(read)
    assert sorted(file.path for file in listed.foreign) == sorted(foreign)
    assert {(file.sop_class_uid, file.file_size) for file in listed.foreign} == {("", 1)}
    assert listed.problems == ()
    assert not FOREIGN_SUFFIXES & {"dcm", "dicom", "ima", "seg", ""}


def test_what_is_claimed_is_left_alone(tmp_path: Path) -> None:
    """Claimed files and whole folders, with all below and their problems; not their namesakes."""
    root = plant(
        tmp_path / "data", ["a/dicoms/P1/1.dcm", "a/dicoms.txt", "a/link.csv", "b/dicoms/1.dcm"]
    )
    plant(tmp_path, ["outside.dcm"])
    (root / "a/dicoms/P1/2.dcm").symlink_to(tmp_path / "outside.dcm")
    (root / "b/2.dcm").symlink_to(tmp_path / "outside.dcm")
    listed = list_tree(str(root), walk(str(root), ""), frozenset({"a/dicoms", "a/link.csv"}))

    assert listed.paths == ["b/dicoms/1.dcm"]
    assert [file.path for file in listed.foreign] == ["a/dicoms.txt"]
    assert [(problem.path, problem.reason) for problem in listed.problems] == [
        ("b/2.dcm", Reason.OUTSIDE_DATA_DIRECTORY)
    ]


names = st.sampled_from(["a", "b", "c.txt", "d.dcm"])


@given(st.sets(st.lists(names, min_size=1, max_size=4).map("/".join), max_size=8), st.data())
def test_every_file_is_in_one_place(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str], data: st.DataObject
) -> None:
    """Read, foreign or claimed, as a search of the paths alone would have it."""
    whole = {path for path in paths if not any(other.startswith(f"{path}/") for other in paths)}
    folders = {
        "/".join(path.split("/")[:k]) for path in whole for k in range(1, path.count("/") + 1)
    }
    things = sorted(whole | folders)
    claimed = data.draw(st.sets(st.sampled_from(things), max_size=2)) if things else set()
    root = plant(tmp_path_factory.mktemp("tree"), sorted(whole))
    listed = list_tree(str(root), walk(str(root), ""), frozenset(claimed))
    free = {p for p in whole if not any(p == c or p.startswith(f"{c}/") for c in claimed)}

    assert sorted(listed.paths) == sorted(path for path in free if not path.endswith(".txt"))
    assert sorted(file.path for file in listed.foreign) == sorted(
        path for path in free if path.endswith(".txt")
    )


# ----------------------------------------------------------------------------------- the sources


def find(files: Sequence[ScannedFile], *sources: Endings, images: SliceTable = AN_IMAGE) -> Found:
    """What these sources make of the files."""
    by_name = {source.name: source for source in sources}
    return find_annotations("/data", files, images, by_name, ScanOptions())


def test_each_source_gets_what_it_recognizes() -> None:
    """Files of either kind, a file that two sources know, and one that nobody knows."""
    files = [ScannedFile(path, "", 1) for path in ("b.x", "a.x", "c.y", "d.xy", "e.txt")]
    found = find(files, Endings("one", "x"), Endings("two", "y"), Endings("three", "xy"))

    assert [(one.name, one.path) for one in found.annotations] == [
        ("one", "a.x"),
        ("one", "b.x"),
        ("two", "c.y"),
        ("two", "d.xy"),
        ("three", "d.xy"),
    ]
    assert [(problem.path, problem.reason) for problem in found.problems] == [
        ("e.txt", Reason.STRAY_FILE)
    ]


def test_every_file_that_is_not_used_is_told_why() -> None:
    """Foreign files, other DICOM objects, and files of which their source makes nothing."""
    files = [
        ScannedFile("notes.txt", "", 1),
        ScannedFile("report", "1.2.840.10008.5.1.4.1.1.88.11", 1),
        ScannedFile("a-empty-.x", "", 1),
        ScannedFile("a-bad-.x", "", 1),
    ]
    found = find(files, Endings("one", ".x"))

    assert found.annotations == ()
    assert {problem.path: problem.reason for problem in found.problems} == {
        "notes.txt": Reason.STRAY_FILE,
        "report": Reason.NOT_AN_IMAGE,
        "a-empty-.x": Reason.STRAY_FILE,
        "a-bad-.x": Reason.BAD_CONTOUR,
    }
    assert "1.2.840.10008.5.1.4.1.1.88.11" in str(found.problems)
    assert "the source one" in str(found.problems)


def test_without_images_annotations_have_none() -> None:
    """Where nothing could be read no source is asked, and its files are rejected."""
    files = [ScannedFile("a.x", "", 1), ScannedFile("b.txt", "", 1)]
    found = find(files, Endings("one", ".x"), images=NO_IMAGES)

    assert found.annotations == ()
    assert [(problem.path, problem.reason) for problem in found.problems] == [
        ("a.x", Reason.ANNOTATION_WITHOUT_IMAGES),
        ("b.txt", Reason.STRAY_FILE),
    ]


def test_files_of_structures_that_nobody_wants_are_told_once() -> None:
    """Of three files one is used, one was told of already, and one is said to be for nothing."""
    drawn = [annotation(path) for path in ("a.dcm", "b.dcm", "b.dcm", "c.dcm")]
    (problem,) = unchosen_files(drawn, {"a.dcm"}, {"c.dcm"})

    assert (problem.path, problem.reason) == ("b.dcm", Reason.STRAY_FILE)
    assert "none of its 2 structure(s)" in problem.detail


def test_names_of_any_bytes_are_listed(tmp_path: Path) -> None:
    """A file in Latin-1 keeps its name."""
    name = os.fsdecode(b"caf\xe9")
    root = plant(tmp_path, [name])

    assert list_tree(str(root), walk(str(root), ""), frozenset()).paths == [name]
