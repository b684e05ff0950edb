"""Does anything that identifies somebody get out? A cohort full of canaries, run with failures.

    python tests/survive_canary.py --rounds 3 --seed 0

Every place of a file where somebody may be named holds a string that occurs nowhere else: tags of
every kind, private tags, overlays, curves, icons, preambles, padding, names of folders and files,
the link table, outlines, XML. Then everything is run, a good part of it into failures, and whatever
lies there afterwards is searched: files as bytes and decoded, standard output and error of all
processes with every warning and log switched on, what stays of runs that were killed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import h5py
import numpy as np
import zarr
from pydicom import DataElement, Dataset, dcmread
from pydicom import config as pydicom_config
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit
from test_lidc import message, roi
from test_seg import write_seg

from parallel_dicomseg.convert import encode_chunk
from parallel_dicomseg.dicom.decoders import quiet
from parallel_dicomseg.phantoms import make_rtstruct_series, rectangle
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

CHECKOUT = Path(__file__).resolve().parents[1]
SHAPE = (5, 24, 28)
SQUARE = rectangle(3.2, 4.1, 12.4, 15.3)

#: What has a place in a DICOM image and may say whose it is, by value representation.
TAGS = {
    "PN": """PatientName OtherPatientNames PatientBirthName PatientMotherBirthName OperatorsName
        ReferringPhysicianName PerformingPhysicianName NameOfPhysiciansReadingStudy
        PhysiciansOfRecord RequestingPhysician ResponsiblePerson""",
    "LO": """PatientID IssuerOfPatientID OtherPatientIDs InstitutionName StudyDescription
        InstitutionalDepartmentName SeriesDescription ProtocolName DeviceSerialNumber MilitaryRank
        BranchOfService PatientReligiousPreference CountryOfResidence RegionOfResidence AdmissionID
        ManufacturerModelName PatientAddress ContrastBolusAgent""",
    "SH": """AccessionNumber StudyID StationName EthnicGroup Occupation PatientTelephoneNumbers
        PerformedProcedureStepID""",
    "ST": "InstitutionAddress DerivationDescription PerformedProcedureStepDescription",
    "LT": "AdditionalPatientHistory PatientComments VisitComments ImageComments",
    "UT": "LabelText",
    "AE": "RetrieveAETitle StationAETitle",
    "UR": "RetrieveURL",
    "DA": "PatientBirthDate StudyDate SeriesDate AcquisitionDate ContentDate AdmittingDate",
    "TM": "StudyTime ContentTime PatientBirthTime",
    "DT": "AcquisitionDateTime",
    "DS": "PatientWeight PatientSize",
    "UI": "ConcatenationUID IrradiationEventUID DeviceUID",
    # names that somebody typed where a code belongs, of the attributes that are kept
    "CS": "BodyPartExamined ScanOptions PatientPosition",
}
STRUCTURE_SET_TAGS = {
    "SH": "StructureSetLabel",
    "LO": "StructureSetName",
    "ST": "StructureSetDescription",
    "PN": "ReviewerName",
}
SEGMENTATION_TAGS = {"PN": "ContentCreatorName", "LO": "ContentDescription"}
STANDARD = "1.2.840.10008."


# What every canary looks like: a word, a UID, date and time, time, decimal, date.
_SHAPES = re.compile(
    rb"q[xp][a-z]{8}|2\.25\.\d{20,}|"
    rb"(?<![\d.])(?:\d{14}\.\d{6}|\d{6}\.\d{6}|\d{2}\.\d{10}|\d{8})(?!\d)"
)


# --- canaries ------------------------------------------------------------------------------------


@dataclass
class Canaries:
    """Strings that occur nowhere else, and where each was put."""

    random: random.Random
    tags: dict[str, str] = field(default_factory=dict)
    """Canary -> what it stands in; of these none may ever get out."""
    patients: dict[str, str] = field(default_factory=dict)
    """PatientID of each place."""
    paths: dict[str, str] = field(default_factory=dict)
    """Those in names of files and folders, which lists of problems name unless told otherwise."""

    def word(self, where: str) -> str:
        """A new one, of letters."""
        text = "QX" + "".join(self.random.choices(ascii_uppercase, k=8))
        return self._put(self.tags, text, where)

    def path(self, where: str) -> str:
        """A new one for the name of a file or folder."""
        text = "QP" + "".join(self.random.choices(ascii_uppercase, k=8))
        return self._put(self.paths, text, f"path of {where}")

    def value(self, vr: str, where: str) -> str:
        """One that a value representation allows, or, of a code, that somebody typed there."""
        number = self.random.randrange
        dates = f"18{number(10, 99)}{number(1, 13):02d}{number(10, 29)}"
        times = f"{number(10, 24)}{number(10, 60)}{number(10, 60)}.{number(100000, 999999)}"
        made = {
            "DA": dates,
            "TM": times,
            "DT": f"{dates}{times}",
            "DS": f"{number(10, 99)}.{number(10**9, 10**10)}",
            "UI": f"2.25.{number(10**30, 10**31)}",
        }
        if vr in made:
            return self._put(self.tags, made[vr], where)
        word = self.word(where)
        return {"PN": f"{word}^A", "CS": f"{word}^a", "UR": f"http://{word}/"}.get(vr, word)

    def uids_of(self, dataset: Dataset, where: str) -> None:
        """Those that are in a file already."""
        for element in dataset.iterall():
            if element.VR == "UI" and element.value and element.keyword != "ImplementationClassUID":
                for uid in [element.value] if element.VM == 1 else element.value:
                    if not uid.startswith(STANDARD) and len(uid) > 20:
                        self._put(self.tags, str(uid), f"{where} {element.keyword}")

    def _put(self, places: dict[str, str], text: str, where: str) -> str:
        assert _SHAPES.fullmatch(text.lower().encode()), f"nobody looks for {text}"
        places.setdefault(text, where)
        return text


def brand(dataset: Dataset, canaries: Canaries, tags: dict[str, str], where: str) -> None:
    """Put canaries into tags, nested and private ones; the patient's own are the same in all files
    of a place.
    """
    for vr, keywords in tags.items():
        for keyword in keywords.split():
            setattr(dataset, keyword, canaries.value(vr, f"{where} {keyword}"))
    if "PatientID" in dataset:
        dataset.PatientID = canaries.patients.setdefault(where, str(dataset.PatientID))
    nested = Dataset()
    nested.PatientName = canaries.value("PN", f"{where} nested PatientName")
    nested.RequestedProcedureDescription = canaries.value("LO", f"{where} nested description")
    dataset.RequestAttributesSequence = [nested]
    block = dataset.private_block(0x0011, canaries.word(f"{where} private creator"), create=True)
    block.add_new(1, "LO", canaries.word(f"{where} private LO"))
    block.add_new(2, "UN", canaries.word(f"{where} private UN").encode())
    block.add_new(3, "OB", canaries.word(f"{where} private OB").encode())
    inner = Dataset()
    inner.PatientID = canaries.word(f"{where} private sequence")
    block.add_new(4, "SQ", [inner])


def brand_image(dataset: Dataset, canaries: Canaries, where: str) -> None:
    """All that and what images have beside their pixels."""
    brand(dataset, canaries, TAGS, where)
    dataset.add_new(0x60000010, "US", 8)
    dataset.add_new(0x60000011, "US", 20)
    dataset.add_new(0x60000040, "CS", "G")
    dataset.add_new(0x60000050, "SS", [1, 1])
    dataset.add_new(0x60000022, "LO", canaries.word(f"{where} overlay description"))
    dataset.add_new(0x60001500, "LO", canaries.word(f"{where} overlay label"))
    dataset.add_new(0x60000100, "US", 1)
    dataset.add_new(0x60000102, "US", 0)
    dataset.add_new(0x60003000, "OW", canaries.word(f"{where} overlay data").encode() * 2)
    dataset.add_new(0x50002500, "LO", canaries.word(f"{where} curve label"))
    dataset.add_new(0x50003000, "OW", canaries.word(f"{where} curve data").encode())
    icon = Dataset()
    icon.Rows, icon.Columns, icon.BitsAllocated, icon.SamplesPerPixel = 2, 5, 8, 1
    icon.add_new(0x7FE00010, "OB", canaries.word(f"{where} icon").encode())
    dataset.IconImageSequence = [icon]
    # more pixel data than rows and columns need
    dataset.PixelData += canaries.word(f"{where} behind the pixels").encode()
    dataset.add_new(0xFFFCFFFC, "OB", canaries.word(f"{where} trailing padding").encode())


def brand_file(path: Path, canaries: Canaries, change: Callable[[Dataset], None]) -> None:
    """Change a DICOM file; its preamble and file meta group get canaries too."""
    dataset = dcmread(path)
    change(dataset)
    where = path.parent.name
    dataset.preamble = canaries.word(f"{where} preamble").encode().ljust(128, b"\0")
    meta = dataset.file_meta
    meta.SourceApplicationEntityTitle = canaries.word(f"{where} source title")
    meta.PrivateInformationCreatorUID = UID(canaries.value("UI", f"{where} private information"))
    meta.PrivateInformation = canaries.word(f"{where} private information").encode()
    canaries.uids_of(dataset, where)
    dataset.save_as(path, enforce_file_format=True)


# --- the cohort ----------------------------------------------------------------------------------


def make_cohort(root: Path, canaries: Canaries) -> None:
    """Patients with a structure set, a segmentation, LIDC's XML and text contours, and defects."""
    settings = pydicom_config.settings
    before = settings.writing_validation_mode
    settings.writing_validation_mode = pydicom_config.IGNORE  # names where codes belong
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _make_patients(root, canaries)
    finally:
        settings.writing_validation_mode = before


def _make_patients(root: Path, canaries: Canaries) -> None:
    for k, kind in enumerate(("rtstruct", "seg", "lidc", "defects")):
        folder = root / canaries.path(kind) / canaries.path(f"{kind} study")
        folder.parent.mkdir(parents=True)
        _make_series(folder, canaries, kind, k)
        if kind == "defects":
            _make_defects(folder, canaries)
    _make_numbered(root / canaries.path("numbered"), canaries)


def _make_series(folder: Path, canaries: Canaries, kind: str, seed: int) -> None:
    """A series of images and what is drawn on it."""
    rings = {"disc": [(k, SQUARE) for k in range(1, SHAPE[0])]}
    phantom = make_rtstruct_series(folder, shape=SHAPE, structures=rings, seed=seed)
    images = [folder / path for path in phantom.image_paths]
    for path in images:
        brand_file(path, canaries, lambda dataset: brand_image(dataset, canaries, kind))
    first = dcmread(images[0])
    structure_set = folder / phantom.structure_set_path
    if kind == "seg":
        _make_segmentation(folder / "seg.dcm", images, canaries)
    elif kind == "lidc":
        square = [(3, 3), (9, 3), (9, 9), (3, 9)]
        drawn = roi(square, z=float(first.ImagePositionPatient[2]), uid=first.SOPInstanceUID)
        text = message([drawn], series=first.SeriesInstanceUID, study=first.StudyInstanceUID)
        said = f"<servicingRadiologistID>{canaries.word('XML')}</servicingRadiologistID>"
        comment = f"<!-- {canaries.word('XML comment')} -->"
        text = text.replace("</ResponseHeader>", f"{said}{comment}</ResponseHeader>")
        (folder / f"{canaries.path('XML')}.xml").write_text(text)
    if kind in ("rtstruct", "defects"):
        brand_file(structure_set, canaries, lambda d: _brand_structure_set(d, canaries, kind))
        structure_set.rename(folder / f"{canaries.path('RTSTRUCT')}.dcm")
    else:
        structure_set.unlink()
    for path in images:
        path.rename(path.with_name(f"{canaries.path('image')}.dcm"))


def _brand_structure_set(dataset: Dataset, canaries: Canaries, where: str) -> None:
    brand(dataset, canaries, TAGS, where)
    brand(dataset, canaries, STRUCTURE_SET_TAGS, where)
    observation = Dataset()
    observation.ObservationNumber, observation.ReferencedROINumber = 1, 1
    observation.ROIObservationLabel = canaries.word("ROI observation label")
    observation.ROIObservationDescription = canaries.word("ROI observation description")
    observation.ROIInterpreter = canaries.value("PN", "ROI interpreter")
    dataset.RTROIObservationsSequence = [observation]
    dataset.StructureSetROISequence[0].ROIDescription = canaries.word("ROI description")


def _make_segmentation(path: Path, images: list[Path], canaries: Canaries) -> None:
    headers = [dcmread(image, stop_before_pixels=True) for image in images]
    mask = np.zeros(SHAPE[1:], np.uint8)
    mask[4:9, 5:11] = 1
    frames = [(1, list(h.ImagePositionPatient), mask, h.SOPInstanceUID) for h in headers]

    def change(dataset: Dataset) -> None:
        brand(dataset, canaries, TAGS, "seg")
        brand(dataset, canaries, SEGMENTATION_TAGS, "seg")
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
            setattr(dataset, keyword, headers[0][keyword].value)
        segment = dataset.SegmentSequence[0]
        segment.SegmentDescription = canaries.word("segment description")
        segment.TrackingID = canaries.word("tracking ID")
        segment.TrackingUID = UID(canaries.value("UI", "tracking UID"))

    write_seg(path, frames, labels=("organ",), change=change)
    brand_file(path, canaries, lambda _: None)


def _make_defects(folder: Path, canaries: Canaries) -> None:
    """Break what can be broken: each image of a series in its own way, and files beside them."""
    images = sorted((folder / "images").iterdir())
    _rewrite(images[0], partial(_spoil_texts, canaries))
    _rewrite(images[1], partial(_garble, canaries, b"\xff\x4f\xff\x51\0\x2f", JPEG2000Lossless))
    _rewrite(images[2], partial(_spoil_numbers, canaries))
    images[3].write_bytes(images[3].read_bytes()[:-700])
    _rewrite(images[4], partial(_garble, canaries, b"\xff\xd8\xff\xfe\0\x20", JPEGBaseline8Bit))
    shutil.copyfile(images[0], images[0].with_name(f"{canaries.path('copy')}.dcm"))
    _rewrite(images[0], lambda dataset: setattr(dataset, "Rows", 12))
    no_rows = dcmread(images[0])
    no_rows.SOPInstanceUID = UID(canaries.value("UI", "instance without rows"))
    del no_rows.Rows
    no_rows.save_as(folder / f"{canaries.path('no rows')}.dcm")
    foreign = dcmread(images[0])
    del foreign.PixelData
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        setattr(foreign, keyword, UID(canaries.value("UI", f"{keyword} of a foreign object")))
    foreign.save_as(folder / f"{canaries.path('foreign object')}.dcm")
    _put_beside(folder, canaries)
    _break_structure_sets(folder, canaries)


def _rewrite(path: Path, change: Callable[[Dataset], None]) -> None:
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)


def _set(dataset: Dataset, keyword: str, vr: str, value: str) -> None:
    """Whatever the value representation says."""
    dataset.add(DataElement(keyword, vr, value, already_converted=True))


def _garble(canaries: Canaries, head: bytes, syntax: UID, dataset: Dataset) -> None:
    stream = head + canaries.word(f"codestream of {syntax.name}").encode() * 9
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def _spoil_texts(canaries: Canaries, dataset: Dataset) -> None:
    for keyword, vr in {
        "SpecificCharacterSet": "CS", "ReferencedSOPInstanceUID": "UI", "DeviceUID": "UI",
        "StudyDate": "DA", "PatientWeight": "DS", "EchoTime": "DS",
    }.items():  # fmt: skip
        _set(dataset, keyword, vr, canaries.word(f"spoilt {keyword}"))
    _set(dataset, "Modality", "CS", f"{canaries.word('spoilt Modality')}^a")


def _spoil_numbers(canaries: Canaries, dataset: Dataset) -> None:
    for keyword in ("RescaleSlope", "PixelSpacing", "InstanceNumber", "NumberOfFrames"):
        vr = "IS" if keyword[0] in "IN" else "DS"
        _set(dataset, keyword, vr, canaries.word(f"spoilt {keyword}"))
    _set(dataset, "PhotometricInterpretation", "CS", canaries.word("spoilt colour"))


def _put_beside(folder: Path, canaries: Canaries) -> None:
    """Files that are no DICOM."""
    beside = {
        f"{canaries.path('text')}.dcm": canaries.word("text that is no DICOM") * 30,
        f"{canaries.path('swap file')}.txt~": canaries.word("swap file"),
        f"{canaries.path('broken XML')}.xml": f"<LidcReadMessage><{canaries.word('XML')} a=>",
        f"{canaries.path('XML with entities')}.xml": (
            f'<!DOCTYPE a [<!ENTITY b "{canaries.word("XML entity")}">]><LidcReadMessage/>'
        ),
    }
    for name, content in beside.items():
        (folder / name).write_text(content)


def _break_structure_sets(folder: Path, canaries: Canaries) -> None:
    """Copies of the structure set with points and numbers that are words, and one that is cut."""
    files = ((path, dcmread(path, force=True)) for path in sorted(folder.glob("*.dcm")))
    (whole,) = (path for path, dataset in files if "ROIContourSequence" in dataset)
    for name in ("points", "ROI number", "cut"):
        broken = dcmread(whole)
        broken.SOPInstanceUID = UID(canaries.value("UI", f"structure set with spoilt {name}"))
        path = folder / f"{canaries.path(f'structure set with spoilt {name}')}.dcm"
        first = broken.ROIContourSequence[0]
        if name == "points":
            for contour in first.ContourSequence:
                _set(contour, "ContourData", "DS", f"1.0\\{canaries.word('spoilt point')}\\3.0")
        elif name == "ROI number":
            _set(first, "ReferencedROINumber", "IS", canaries.word("spoilt ROI number"))
        broken.save_as(path)
        if name == "cut":
            path.write_bytes(path.read_bytes()[:-300])


def _make_numbered(root: Path, canaries: Canaries) -> None:
    """Text contours with a link table, whose patients are named in folders and table alike."""
    truth = make_sunnybrook_cohort(root, patients=2, slices=4, rows=32, columns=32, seed=5)
    lines = [f"patient_id,original_id,{canaries.word('link.csv header')}"]
    for patient in truth.patients:
        names = [canaries.path(f"folder of {kind}") for kind in ("images", "contours")]
        for name, folder in zip(names, (patient.image_folder, patient.contour_folder), strict=True):
            (root / folder).rename((root / folder).with_name(name))
        lines.append(f"{names[0]},{names[1]},{canaries.word('link.csv cell')}")
        for path in (root / patient.image_folder).with_name(names[0]).iterdir():
            brand_file(path, canaries, lambda d: brand(d, canaries, TAGS, "numbered"))
    # where the table says that they are: they are named as paths are
    lines.append(f"{canaries.path('missing images')},{canaries.path('missing contours')},x")
    (root / "link.csv").write_text("\n".join(lines) + "\n")
    outlines = sorted(root.glob("contourfiles/*/*/*.txt"))
    outlines[0].write_text(f"1.0 {canaries.word('outline')}\n2 3\n")
    outlines[1].write_text(f"# {canaries.word('comment of an outline')}\n1 2\n3 4\n9 9\n")


# --- runs ----------------------------------------------------------------------------------------


def leaky(task: Any) -> Any:
    """A task that fails with the worst text that a library may have for it; the first does not."""
    if task.first == 0:
        return encode_chunk(task)
    path = Path(task.root, task.slices.path[0])
    with quiet():  # it is the exception that is to leak
        header = str(dcmread(path, force=True, stop_before_pixels=True))
    raise ValueError(f"{path}: {header}")


def stuck(task: Any) -> Any:
    """A task that is done, but for the second of them, which never ends."""
    if task.first:
        time.sleep(600)
    return encode_chunk(task)


def commands(data: str, out: str, schedulers: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Everything that is run: a name that says what may be in its words, and the words."""
    yield "listing", ["scan", data]
    yield "listing", ["scan", data, "--json", "--include-unannotated", "--allow-burned-in"]
    common = ["--size", "32", "32", "--slices-per-task", "2", "--workers", "2", "--overwrite"]
    for scheduler in schedulers:
        made = f"{out}/{scheduler}.h5"
        convert = ["convert", data, "-o", made, *common, "--scheduler", scheduler]
        # what a worker's exception costs is listed like any other slice, so paths are hidden here
        yield "leaky", [*convert, "--hash-paths"]
        if scheduler == "threads":  # the others make the same bytes
            yield "silent", [*convert, "--hash-paths", "--zarr", f"{out}/{scheduler}.zarr"]
    last = f"{out}/last.h5"
    convert = ["convert", data, "-o", last, *common, "--hash-paths", "--include-unannotated"]
    yield "silent", [*convert, "--json"]
    yield "silent", [*convert, "--strict"]
    yield "silent", [*convert, "--structures", "disc,organ", "--color", "samples", "--json"]
    shifted = [*convert, "--key-file", f"{out}/../key", "--dates", "shift"]
    yield "silent", [*shifted, "-o", f"{out}/shifted.h5"]
    yield "kept", [*convert, "--keep-identity", "-o", f"{out}/kept.h5"]
    yield "silent", ["verify", last]
    yield "silent", ["inspect", last]
    yield "silent", ["inspect", last, "--json"]
    yield "silent", ["inspect", last, "--tag", "SliceThickness", "--tag", "Modality"]
    yield "silent", ["batches", last, "--epochs", "1", "--batch-size", "2", "--print-indices"]
    yield "silent", ["export", "nifti", last, f"{out}/nifti", "--masks", "labels", "--overwrite"]
    yield (
        "silent",
        [
            "export",
            "nnunet",
            last,
            out,
            "--dataset-id",
            "7",
            "--name",
            "Canary",
            "--modality",
            "CT",
            "--overwrite",
        ],
    )
    open_list = ["convert", data, "-o", f"{out}/open.h5", *common, "--zarr", f"{out}/open.zarr"]
    yield "listing", open_list
    yield "listing", ["inspect", f"{out}/open.h5", "--json"]


def run_in_child(folder: Path, schedulers: Iterable[str]) -> None:
    """Run all commands; the words of each, and of its workers, go to a file in `logs`."""
    import survive_canary

    from parallel_dicomseg import convert
    from parallel_dicomseg.cli import main

    statuses = []
    data = next((folder / "in").iterdir())
    for number, (kind, words) in enumerate(commands(str(data), str(folder / "out"), schedulers)):
        with (folder / "logs" / f"{number:02d}-{kind}.txt").open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            begun = time.monotonic()
            convert.encode_chunk = survive_canary.leaky if kind == "leaky" else encode_chunk
            try:
                status = main(words, standalone_mode=False)
            except SystemExit as ended:
                status = ended.code
            except Exception as error:  # noqa: BLE001 as Python itself would end
                traceback.print_exc()
                status = type(error).__name__
            statuses.append((kind, words[0], status, round(time.monotonic() - begun, 2)))
            sys.stdout.flush()
    (folder / "statuses.json").write_text(json.dumps(statuses))


def run_and_kill(folder: Path) -> None:
    """A conversion that is killed in its middle: what stays is searched with the rest."""
    import survive_canary

    from parallel_dicomseg import convert
    from parallel_dicomseg.cli import main

    convert.encode_chunk = survive_canary.stuck
    data, output = next((folder / "in").iterdir()), folder / "out" / "killed.h5"
    main(["convert", str(data), "-o", str(output), "--slices-per-task", "1", "--workers", "1"])


def start(folder: Path, mode: str, schedulers: Iterable[str]) -> subprocess.Popen[bytes]:
    """Run this program in a process whose every warning and log speaks, those of workers too."""
    speak = folder / "speak"
    speak.mkdir(exist_ok=True)
    (speak / "sitecustomize.py").write_text(
        "import logging\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "logging.getLogger('numba').setLevel(logging.WARNING)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (speak, CHECKOUT, CHECKOUT / "tests"))),
        "PYTHONWARNINGS": "always",
        # its debug log prints whole messages, arguments too: whoever wants that asks for it
        "DASK_LOGGING__DISTRIBUTED": "info",
    }
    words = [sys.executable, __file__, mode, str(folder), "--schedulers", *schedulers]
    with (folder / "logs" / f"99-silent{mode}.txt").open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=folder)


# --- the search ----------------------------------------------------------------------------------


def shapes_in(blob: bytes) -> set[str]:
    """Everything that looks like a canary, in any case, in UTF-8 and in either UTF-16."""
    low = blob.lower()
    return {
        found.decode() for text in (low, low.replace(b"\0", b"")) for found in _SHAPES.findall(text)
    }


def blobs_of(path: Path) -> Iterator[bytes]:
    """A file as it lies there, and whatever its format has packed."""
    raw = path.read_bytes()
    yield path.name.encode()
    yield raw
    if path.suffix == ".gz":
        yield gzip.decompress(raw)
    elif h5py.is_hdf5(path):
        try:
            yield from blobs_of_hdf5(path)
        except OSError:  # a partial file: its bytes were looked at
            return
    elif path.name == "zarr.json":
        node = zarr.open(str(path.parent), mode="r")
        if isinstance(node, zarr.Array):
            values = np.asarray(node[...])
            yield from (values.tobytes(), str(values.tolist()).encode())


def blobs_of_hdf5(path: Path) -> Iterator[bytes]:
    """Every dataset decoded, every name and attribute."""
    found: list[bytes] = []

    def look(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found.append(name.encode())
        found.extend(f"{k} {np.asarray(v).tolist()}".encode() for k, v in item.attrs.items())
        if isinstance(item, h5py.Dataset):
            values = item[()]
            found.append(np.asarray(values).tobytes())
            if values.dtype.kind in "SO":
                found.append(str(values.tolist()).encode())

    with h5py.File(path) as file:
        look("/", file)
        file.visititems(look)
    yield from found


def search(folder: Path, canaries: Canaries) -> Counter[str]:
    """Canaries that got out, as 'where: what', and how often."""
    tags = {text.lower(): where for text, where in canaries.tags.items()}
    every = tags | {text.lower(): where for text, where in canaries.paths.items()}
    # a date that was moved may be another one's
    undated = {text: where for text, where in every.items() if not text.isdigit()}
    hits: Counter[str] = Counter()
    for path in sorted([*folder.glob("logs/*"), *folder.glob("out/**/*")]):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == "out/kept.h5":
            continue
        forbidden = every
        if "listing" in name or "kept" in name or name.startswith("out/open."):
            forbidden = tags
        elif name == "out/shifted.h5":
            forbidden = undated
        for blob in blobs_of(path):
            found = shapes_in(blob) & forbidden.keys()
            hits.update(f"{name}: {forbidden[text]}" for text in found)
    return hits


def found_where_kept(folder: Path, canaries: Canaries) -> int:
    """How many canaries the same search finds in the file that keeps them on purpose."""
    found = set().union(*map(shapes_in, blobs_of(folder / "out" / "kept.h5")))
    return len(found & {text.lower() for text in canaries.tags})


@dataclass
class Outcome:
    """What one round found."""

    canaries: int
    tags: int
    """Different attributes, or other places, that held canaries."""
    files: int
    """Files that were searched."""
    bytes: int
    hits: Counter[str]
    kept: int
    """Canaries in the file that was made with --keep-identity: the search does find them."""
    statuses: list[tuple[str, str, object, float]]
    """Kind of run, command, exit status, seconds."""


def survive(folder: Path, seed: int, schedulers: Iterable[str] = ("threads",)) -> Outcome:
    """One round in an empty folder."""
    canaries = Canaries(random.Random(seed))
    root = folder / "in" / canaries.path("data directory")
    for name in ("in", "out", "logs"):
        (folder / name).mkdir()
    root.mkdir()
    make_cohort(root, canaries)
    start(folder, "--child", schedulers).wait()
    _kill_one(folder, schedulers)
    searched = [p for p in (*folder.glob("logs/*"), *folder.glob("out/**/*")) if p.is_file()]
    return Outcome(
        canaries=len(canaries.tags) + len(canaries.paths),
        tags=len({*canaries.tags.values(), *canaries.paths.values()}),
        files=len(searched),
        bytes=sum(path.stat().st_size for path in searched),
        hits=search(folder, canaries),
        kept=found_where_kept(folder, canaries),
        statuses=json.loads((folder / "statuses.json").read_text()),
    )


def _kill_one(folder: Path, schedulers: Iterable[str]) -> None:
    process = start(folder, "--killed", schedulers)
    give_up = time.monotonic() + 60
    while not list((folder / "out").glob("killed*")) and time.monotonic() < give_up:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()


def main() -> None:
    """Print what each round found; the exit status is 1 where anything got out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedulers", nargs="*", default=["threads", "processes", "distributed"])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_in_child(given.child, given.schedulers)
    elif given.killed:
        run_and_kill(given.killed)
    else:
        sys.exit(_rounds(given.rounds, given.seed, given.schedulers))


def _rounds(rounds: int, seed: int, schedulers: list[str]) -> int:
    lost = 0
    for k in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            found = survive(Path(folder), seed + k, schedulers)
        lost += sum(found.hits.values())
        print(
            f"seed {seed + k}: {found.canaries} canaries in {found.tags} places, "
            f"{len(found.statuses)} runs, {found.files} files of {found.bytes / 1e6:.1f} MB "
            f"searched, {sum(found.hits.values())} hits"
        )
        for hit, count in found.hits.most_common(40):
            print(f"  {count} x {hit}")
    return int(lost > 0)


if __name__ == "__main__":
    main()
