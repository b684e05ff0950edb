"""Sources: the built-in ones, the example of docs/sources.md, and entry points that are wrong."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from parallel_dicomseg import convert_cohort, open_dataset, scan_cohort
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import Reason
from parallel_dicomseg.sources import registry

CHECKOUT = Path(__file__).resolve().parents[1]
DOCS = (CHECKOUT / "docs" / "sources.md").read_text(encoding="utf-8")
COMPLETE = "name = 'x'\ndef recognizes(): ...\ndef find(): ...\ndef read(): ...\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a package importable and its entry points known, as an installation does."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules = []

    def put(module, text, entry_points, package="some-package"):
        (site / f"{module}.py").write_text(text, encoding="utf-8")
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{lines}\n")
        modules.append(module)
        importlib.invalidate_caches()
        registry._load.cache_clear()

    yield put
    registry._load.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


def block(language):
    """The only fenced block of a language in the docs."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    return text


def test_built_in_sources():
    """The sources of this package in their order; readers know Sunnybrook as well."""
    assert list(registry.SOURCES) == ["rtstruct", "seg", "lidc"]
    assert len(registry.SOURCES) == 3
    assert set(registry.readers()) == {"rtstruct", "seg", "lidc", "sunnybrook"}
    for name, reader in registry.readers().items():
        assert reader.name == name
        assert callable(reader.read)
    for source in registry.SOURCES.values():
        assert callable(source.recognizes)
        assert callable(source.find)


def test_nothing_is_imported_before_somebody_asks():
    """The registry alone imports no source."""
    program = (
        "import sys\nfrom parallel_dicomseg.sources.registry import SOURCES\n"
        "print(*[m for m in sys.modules if m.endswith(('.seg', '.lidc', '.rtstruct'))])\n"
        "list(SOURCES)\nprint('parallel_dicomseg.sources.seg' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines() == ["", "True"]


def test_documented_names_are_the_built_in_ones():
    """The table of docs/sources.md lists every source."""
    documented = re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE)

    assert set(documented) == set(registry.readers())


def write_image(path, number):
    """A CT image of 6 x 8 pixels with UID 1.2.number at z = number."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1")
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.{number}")
    image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, UID(f"1.2.{number}")
    image.Modality, image.PatientID, image.InstanceNumber = "CT", "a", number
    image.StudyInstanceUID, image.SeriesInstanceUID = UID("1.3"), UID("1.4")
    image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, number], [1, 0, 0, 0, 1, 0]
    image.PixelSpacing = [1, 1]
    image.Rows, image.Columns, image.SamplesPerPixel = 6, 8, 1
    image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelData = bytes(6 * 8 * 2)
    image.save_as(path, enforce_file_format=True)


def test_the_documented_example_runs(install, tmp_path):
    """The package of docs/sources.md, as it stands there: found, paired, read and drawn."""
    project = tomllib.loads(block("toml"))["project"]
    install("box_tables", block("python"), project["entry-points"][registry.GROUP], project["name"])
    root = tmp_path / "cohort"
    root.mkdir()
    for number in (1, 2, 3):
        write_image(root / str(number), number)
    (root / "boxes.csv").write_text(
        "sop_instance_uid,name,left,top,right,bottom\n"
        "1.2.2,tumour,2,1,4,3\n1.2.3,tumour,0,0,7,5\n1.2.9,tumour,0,0,1,1\n1.2.1,node,1,?,2,2\n"
    )
    cohort = scan_cohort(root)
    summary = convert_cohort(cohort, tmp_path / "out.h5")
    with open_dataset(tmp_path / "out.h5") as dataset:
        bit = dataset.structures.index("tumour")
        masks = np.stack([dataset.masks[row] for row in range(3)])
        looked_at = dataset.column("structure_annotated")[:, 1 - bit].tolist()
    expected = np.zeros((3, 6, 8), np.uint8)
    expected[1, 1:4, 2:5] = 1 << bit
    expected[2] = 1 << bit

    assert set(summary.structures) == {"node", "tumour"}
    assert cohort.found_by == {"reference": 2}
    assert [(p.path, p.reason) for p in summary.problems] == [
        ("boxes.csv", Reason.CONTOUR_WITHOUT_IMAGE),
        ("boxes.csv", Reason.BAD_CONTOUR),
    ]
    assert (masks == expected).all()
    assert looked_at == [False, True, True], "what could not be read is not known to be empty"


@pytest.mark.parametrize(
    ("text", "entry", "message"),
    [
        ("1 / 0", {"x": "some"}, r"source 'x' \(some\) of the package some-package cannot be lo"),
        (COMPLETE, {"x": "elsewhere"}, r"'x' \(elsewhere\).* ModuleNotFoundError"),
        (COMPLETE.replace("find", "seek"), {"x": "some"}, r"'x' \(some\).* has no function find"),
        ("name = 'x'", {"x": "some"}, "has no function recognizes, find, read"),
        (COMPLETE, {"y": "some"}, "must have the attribute name = 'y'"),
        (COMPLETE, {"seg": "some"}, "there is a source of this name already"),
        (COMPLETE, {"sunnybrook": "some"}, "there is a source of this name already"),
        (
            "class X:\n    " + COMPLETE.replace("\n", "\n    "),
            {"x": "some:X"},
            r"\(some:X\).* is a class; name an instance",
        ),
    ],
)
def test_a_wrong_entry_point_is_named(install, text, entry, message):
    """An added source that cannot be loaded, or is none, ends the run with its name."""
    install("some", text, entry)

    with pytest.raises(ConfigurationError, match=message):
        registry.readers()
    with pytest.raises(ConfigurationError, match=message):
        list(registry.SOURCES)


def test_an_object_is_a_source_as_well(install):
    """An entry point may name an object inside a module; added ones come after the built-in."""
    install(
        "some", "class X:\n    " + COMPLETE.replace("\n", "\n    ") + "\nx = X()", {"x": "some:x"}
    )

    assert list(registry.SOURCES) == ["rtstruct", "seg", "lidc", "x"]
    assert registry.SOURCES["x"] is registry.readers()["x"]
