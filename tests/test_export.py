"""NIfTI and nnU-Net: every voxel where DICOM has it, as SimpleITK and nibabel read it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import written
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from parallel_dicomseg import ConvertOptions, convert_cohort, open_dataset, scan_cohort
from parallel_dicomseg.cli import main
from parallel_dicomseg.errors import ConfigurationError, ConversionError
from parallel_dicomseg.export import NoteKind, export_nifti, export_nnunet
from parallel_dicomseg.export.nifti import count_overlapping, has_bit, label_map
from parallel_dicomseg.export.nnunet import Labels, number_voxels, regions_of
from parallel_dicomseg.export.volumes import safe_names
from parallel_dicomseg.geometry import normal_of, to_patient

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_C, _S = np.cos(np.deg2rad(25)), np.sin(np.deg2rad(25))
ORIENTATIONS = {
    "axial": AXIAL,
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "flipped": (1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "mirrored": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "oblique": (_C, _S, 0.0, -_S * np.cos(0.4), _C * np.cos(0.4), np.sin(0.4)),
}


@dataclass
class Stack:
    """One volume to be: slices, rows, columns, and where they are."""

    shape: tuple[int, int, int] = (4, 5, 7)
    orientation: tuple[float, ...] = AXIAL
    spacing: tuple[float, float] = (1.3, 0.7)
    positions: Any = None
    """mm along the normal."""
    origin: tuple[float, float, float] = (-50.0, 40.0, 30.5)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """What every slice is moved by, on top."""
    patient: str = "patient-1"
    modality: str = "CT"
    split: str = ""
    dtype: str = "<i2"
    samples: int = 1
    structures: int = 2
    masks: Any = None
    annotated: Any = None
    thickness: float = 2.5
    planes: Any = None
    images: Any = None

    def __post_init__(self):
        random = np.random.default_rng(sum(self.shape))
        slices = self.shape[0]
        positions = np.arange(slices) * 2.5 if self.positions is None else np.array(self.positions)
        if self.planes is None:
            place = np.array(self.origin) + np.outer(positions, normal_of(self.orientation))
            place += np.outer(np.arange(slices), self.shift)
            rest = np.tile([*self.orientation, *self.spacing], (slices, 1))
            self.planes = np.concatenate([place, rest], axis=1)
        if self.images is None:
            shape = self.shape if self.samples == 1 else (*self.shape, self.samples)
            self.images = random.integers(0, 255, shape).astype(self.dtype)
        if self.masks is None:
            self.masks = random.integers(0, 1 << self.structures, self.shape).astype(np.uint8)
        if self.annotated is None:
            self.annotated = np.ones((len(self.images), self.structures), bool)


@pytest.fixture
def file_of(tmp_path_factory):
    """Makes an open file of some volumes, one series each."""
    with ExitStack() as opened:

        def make(*stacks, structures=("heart", "lung")):
            path = tmp_path_factory.mktemp("file") / "cohort.h5"
            write_stacks(path, stacks, structures)
            return opened.enter_context(open_dataset(path))

        yield make


def write_stacks(path, stacks, structures):
    """Write what `stacks` say with the package's own writer."""
    counts = [len(stack.images) for stack in stacks]
    planes = np.concatenate([stack.planes for stack in stacks])
    bits = 1 << np.arange(len(structures), dtype=np.uint64)

    def column(values):
        return np.repeat(np.array(values), counts)

    table = written.slices(
        sum(counts),
        patient_id=column([stack.patient.encode() for stack in stacks]),
        study_instance_uid=column([f"1.{stack.patient[-1]}".encode() for stack in stacks]),
        series_instance_uid=column([f"2.{k}".encode() for k in range(len(stacks))]),
        split=column([stack.split.encode() for stack in stacks]),
        modality=column([stack.modality.encode() for stack in stacks]),
        volume=column(range(len(stacks))).astype(np.int32),
        slice_thickness=column([stack.thickness for stack in stacks]),
        annotated=np.concatenate([stack.annotated for stack in stacks]).astype(np.uint64) @ bits,
        image_position_patient=planes[:, :3],
        image_orientation_patient=planes[:, 3:9],
        pixel_spacing=planes[:, 9:],
    )
    images = np.concatenate([stack.images for stack in stacks])
    layout = written.layout(
        len(images),
        rows=images.shape[1],
        columns=images.shape[2],
        image_dtype=images.dtype.str,
        samples=stacks[0].samples,
        structures=structures,
        nested=(),
    )
    masks = np.concatenate([stack.masks for stack in stacks])
    written.write(path, table=table, plan=layout, images=images, masks=masks)


def read(path):
    """Voxels (slices, rows, columns) and the image, as SimpleITK reads them."""
    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image), image


def assert_lies_on(image, planes, within=1e-3):
    """Every slice's corners are where DICOM puts them, in mm."""
    columns, rows, slices = image.GetSize()
    assert slices == len(planes)
    for k, plane in enumerate(planes):
        for column, row in ((0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)):
            point = image.TransformIndexToPhysicalPoint((column, row, k))
            expected = to_patient(np.array([[float(column), float(row)]]), plane)[0]
            np.testing.assert_allclose(point, expected, rtol=0, atol=within)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_voxel_lies_where_dicom_has_it(file_of, tmp_path, name):
    """SimpleITK's physical points of image and masks are those of the planes; values are equal."""
    origin = (-213.7, 95.1, -804.3)
    stack = Stack(shape=(6, 300, 201), orientation=ORIENTATIONS[name], origin=origin)

    report = export_nifti(file_of(stack), tmp_path / "out")

    case = "patient-1_volume-0"
    pixels, image = read(tmp_path / "out" / f"{case}_image.nii.gz")
    np.testing.assert_array_equal(pixels, stack.images)
    assert_lies_on(image, stack.planes)
    for s, structure in enumerate(("heart", "lung")):
        mask, placed = read(tmp_path / "out" / f"{case}_mask_{structure}.nii.gz")
        np.testing.assert_array_equal(mask, stack.masks >> s & 1)
        assert_lies_on(placed, stack.planes)
    assert report.notes == ()


def test_both_forms_and_the_unit_are_set(file_of, tmp_path):
    """The sform and the qform agree, both in the scanner's coordinates, in mm."""
    export_nifti(file_of(Stack(orientation=ORIENTATIONS["oblique"])), tmp_path / "out")

    image = nibabel.load(tmp_path / "out" / "patient-1_volume-0_image.nii.gz")
    sform, sform_code = image.get_sform(coded=True)
    qform, qform_code = image.get_qform(coded=True)
    assert (sform_code, qform_code) == (1, 1)
    np.testing.assert_allclose(sform, qform, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert np.linalg.det(sform) > 0


@pytest.mark.parametrize("dtype", ["uint8", "<i2", "<u2", "<f4"])
def test_the_type_is_kept(file_of, tmp_path, dtype):
    """No value is scaled on the way."""
    stack = Stack(dtype=dtype)

    export_nifti(file_of(stack), tmp_path / "out")

    image = nibabel.load(tmp_path / "out" / "patient-1_volume-0_image.nii.gz")
    assert image.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).T, stack.images)


def test_slices_come_in_the_order_of_their_positions(file_of, tmp_path):
    """Also where the file has them in another order."""
    stack = Stack(positions=[5.0, 0.0, 7.5, 2.5])

    export_nifti(file_of(stack), tmp_path / "out")

    pixels, image = read(tmp_path / "out" / "patient-1_volume-0_image.nii.gz")
    order = [1, 3, 0, 2]
    np.testing.assert_array_equal(pixels, stack.images[order])
    assert_lies_on(image, stack.planes[order])


def test_unequal_distances_are_noted_with_both_numbers(file_of, tmp_path):
    """The affine has the mean step; strict refuses."""
    file = file_of(Stack(shape=(5, 5, 7), positions=[0.0, 2.0, 4.0, 10.0, 12.0]))

    report = export_nifti(file, tmp_path / "out")

    (note,) = report.notes
    assert note.kind is NoteKind.IRREGULAR
    assert note.detail.startswith("distances between slices are 2 to 6 mm")
    assert note.detail.endswith("up to 2 mm off")
    _, image = read(tmp_path / "out" / report.files[0])
    assert image.GetSpacing()[2] == pytest.approx(3.0)
    with pytest.raises(ConfigurationError, match=r"2 to 6 mm.*refused by strict"):
        export_nifti(file, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_rounded_positions_are_regular(file_of, tmp_path):
    """Positions as real headers have them, rounded to a hundredth of a mm."""
    positions = np.round(np.arange(60) * 3.26995, 2)

    report = export_nifti(file_of(Stack(shape=(60, 3, 3), positions=positions)), tmp_path / "out")

    assert report.notes == ()


def test_a_sheared_volume_has_no_qform_and_says_so(file_of, tmp_path):
    """Gantry tilt: the sform is right, and a reader that knows none is not led astray."""
    stack = Stack(shape=(10, 5, 7), shift=(0.0, 0.9, 0.0))

    report = export_nifti(file_of(stack), tmp_path / "out")

    image = nibabel.load(tmp_path / "out" / report.files[0])
    assert (image.get_sform(coded=True)[1], image.get_qform(coded=True)[1]) == (1, 0)
    point = image.affine @ [6, 4, 9, 1]
    expected = to_patient(np.array([[6.0, 4.0]]), stack.planes[9])[0]
    np.testing.assert_allclose(point[:3], expected * [-1, -1, 1], atol=1e-3)
    (note,) = report.notes
    assert note.kind is NoteKind.SHEARED
    assert note.detail.startswith("its axes are 19.8 degrees off the perpendicular")


def test_rounded_cosines_are_not_sheared(file_of, tmp_path):
    """Headers with four decimals: both forms are there, no corner a tenth of a pixel off."""
    orientation = tuple(np.round(ORIENTATIONS["oblique"], 4))
    stack = Stack(shape=(30, 200, 180), orientation=orientation)

    report = export_nifti(file_of(stack), tmp_path / "out")

    assert report.notes == ()
    image = nibabel.load(tmp_path / "out" / report.files[0])
    assert (image.get_sform(coded=True)[1], image.get_qform(coded=True)[1]) == (1, 1)
    _, image = read(tmp_path / "out" / report.files[0])
    assert_lies_on(image, stack.planes, within=0.07)


def test_one_slice_is_as_thick_as_it_says(file_of, tmp_path):
    """A volume of one slice has a place and a thickness."""
    stack = Stack(shape=(1, 5, 7), orientation=ORIENTATIONS["coronal"], thickness=4.25)

    report = export_nifti(file_of(stack), tmp_path / "out")

    pixels, image = read(tmp_path / "out" / report.files[0])
    np.testing.assert_array_equal(pixels.reshape(stack.shape), stack.images)
    assert image.GetSpacing() == pytest.approx((0.7, 1.3, 4.25))
    np.testing.assert_allclose(image.GetOrigin(), stack.planes[0, :3], atol=1e-4)
    assert report.notes == ()


def test_slices_at_one_place_are_noted(file_of, tmp_path):
    """A cine that is one volume has no step: its affine stays regular, and it is said."""
    report = export_nifti(file_of(Stack(positions=[1.0] * 4)), tmp_path / "out")

    assert report.notes[0].kind is NoteKind.IRREGULAR
    assert "0 to 0 mm" in report.notes[0].detail
    _, image = read(tmp_path / "out" / report.files[0])
    assert image.GetSpacing()[2] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("columns", "value"), [(slice(2, 3), np.nan), (slice(3, 9), 0.0), (slice(9, 10), 0.0)]
)
def test_a_volume_without_geometry_has_the_identity_and_says_so(file_of, tmp_path, columns, value):
    """Nothing is made up, and it is not called the scanner's coordinates."""
    stack = Stack()
    stack.planes[1, columns] = value

    report = export_nifti(file_of(stack), tmp_path / "out")

    image = nibabel.load(tmp_path / "out" / report.files[0])
    np.testing.assert_array_equal(image.affine, np.eye(4))
    assert image.get_sform(coded=True)[1] == 2
    np.testing.assert_array_equal(np.asanyarray(image.dataobj).T, stack.images)
    assert [note.kind for note in report.notes] == [NoteKind.NO_GEOMETRY]


def test_colour_of_8_bits_is_rgb(file_of, tmp_path):
    """SimpleITK and nibabel read red, green and blue."""
    stack = Stack(dtype="uint8", samples=3)

    report = export_nifti(file_of(stack), tmp_path / "out")

    pixels, image = read(tmp_path / "out" / report.files[0])
    np.testing.assert_array_equal(pixels, stack.images)
    assert_lies_on(image, stack.planes)
    assert nibabel.load(tmp_path / "out" / report.files[0]).get_data_dtype().names == (*"RGB",)


def test_colour_of_16_bits_is_a_vector_image(file_of, tmp_path):
    """NIfTI has no such colour, but vectors."""
    stack = Stack(dtype="<u2", samples=3)

    report = export_nifti(file_of(stack), tmp_path / "out")

    pixels, image = read(tmp_path / "out" / report.files[0])
    np.testing.assert_array_equal(pixels, stack.images)
    assert image.GetNumberOfComponentsPerPixel() == 3


def test_what_was_not_annotated_has_no_mask(file_of, tmp_path):
    """Not annotated is not empty; annotated on some slices is said."""
    annotated = np.array([[True, False]] * 3 + [[False, False]])
    masks = np.zeros((4, 5, 7), np.uint8)

    report = export_nifti(file_of(Stack(annotated=annotated, masks=masks)), tmp_path / "out")

    (case,) = report.cases
    assert case.masks == {"heart": "patient-1_volume-0_mask_heart.nii.gz"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "export.json",
        "patient-1_volume-0_image.nii.gz",
        "patient-1_volume-0_mask_heart.nii.gz",
    ]
    assert [(note.kind, note.detail) for note in report.notes] == [
        (NoteKind.PARTLY_ANNOTATED, "'heart' is annotated on 3 of 4 slices"),
        (NoteKind.NOT_ANNOTATED, "'lung' is not annotated: there is no mask of it"),
    ]


def test_notes_are_counted_by_kind_for_a_person(file_of, tmp_path):
    """A line each, the first few of a kind; the rest is in export.json."""
    nothing = {"masks": np.zeros((4, 5, 7), np.uint8), "annotated": np.zeros((4, 2), bool)}
    file = file_of(*(Stack(**nothing, patient=f"patient-{k}") for k in range(1, 7)))

    words = ["export", "nifti", str(file.path), str(tmp_path / "out")]
    lines = CliRunner().invoke(main, words, catch_exceptions=False).stdout.splitlines()

    assert lines[0].endswith("out: 6 files of 6 volumes")
    assert lines[1] == "  not-annotated: 12"
    assert lines[2].startswith("    patient-1_volume-0: 'heart' is not annotated")
    assert lines[12:] == ["    and 2 more, see export.json there"]


def test_exclusive_structures_fit_into_a_label_map(file_of, tmp_path):
    """Values are in the report; a volume whose structures overlap keeps separate masks."""
    exclusive = np.array([0, 1, 2], np.uint8)[np.random.default_rng(1).integers(0, 3, (4, 5, 7))]
    overlapping = exclusive.copy()
    overlapping[0, 0, :2] = 3
    file = file_of(Stack(masks=exclusive), Stack(masks=overlapping))

    report = export_nifti(file, tmp_path / "out", masks="labels", structures=("lung", "heart"))

    assert report.labels == {"lung": 1, "heart": 2}
    labels, _ = read(tmp_path / "out" / "patient-1_volume-0_labels.nii.gz")
    np.testing.assert_array_equal(labels == 1, exclusive == 2)
    np.testing.assert_array_equal(labels == 2, exclusive == 1)
    assert set(report.cases[0].masks.values()) == {"patient-1_volume-0_labels.nii.gz"}
    assert sorted(report.cases[1].masks) == ["heart", "lung"]
    assert len(set(report.cases[1].masks.values())) == 2
    assert [(note.case, note.kind) for note in report.notes] == [
        ("patient-1_volume-1", NoteKind.OVERLAP)
    ]
    assert report.notes[0].detail.startswith("2 voxels")


def test_volumes_and_structures_can_be_chosen(file_of, tmp_path):
    """By row and by name; what is not there is refused with what is."""
    file = file_of(*(Stack(patient=f"patient-{k}") for k in range(3)))

    report = export_nifti(file, tmp_path / "out", volumes=[2], structures=["lung"])

    assert report.files == (
        "patient-3_volume-2_image.nii.gz",
        "patient-3_volume-2_mask_lung.nii.gz",
    )
    with pytest.raises(ConfigurationError, match="no volume 3, they are 0 to 2"):
        export_nifti(file, tmp_path / "no", volumes=[3])
    with pytest.raises(ConfigurationError, match="no structure 'liver', there are 'heart', 'lung'"):
        export_nifti(file, tmp_path / "no", structures=["liver"])
    with pytest.raises(ConfigurationError, match="named twice"):
        export_nifti(file, tmp_path / "no", structures=["lung", "lung"])
    with pytest.raises(ConfigurationError, match="masks is 'bits'"):
        export_nifti(file, tmp_path / "no", masks="bits")
    assert not (tmp_path / "no").exists()


@given(st.lists(st.text(max_size=6), max_size=6))
def test_names_of_files_are_safe_and_differ(texts):
    """Whatever structures are called, also where the file system does not know case."""
    names = safe_names(texts)

    assert len({name.lower() for name in names}) == len(texts)
    for name in names:
        assert name.isascii()
        assert not set(name) & set('/\\:*?"<>| \n\0')
        assert not name.startswith(".")


def test_an_export_is_never_half_there(file_of, tmp_path, monkeypatch):
    """What fails in the middle leaves nothing, and keeps the earlier export."""
    file = file_of(Stack(), Stack())
    export_nifti(file, tmp_path / "out", volumes=[0])
    before = sorted(path.name for path in (tmp_path / "out").iterdir())

    def fail(image, path, save=nibabel.save):
        if "volume-1" in path.name:
            raise OSError(28, "No space left on device")
        save(image, path)

    monkeypatch.setattr(nibabel, "save", fail)
    for target in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(ConversionError, match="cannot be written: No space left"):
            export_nifti(file, target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_only_an_earlier_export_is_replaced(file_of, tmp_path):
    """An empty folder is taken, an export only with overwrite, anything else never."""
    file = file_of(Stack())
    (tmp_path / "out").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")

    export_nifti(file, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="out exists; --overwrite replaces it"):
        export_nifti(file, tmp_path / "out")
    export_nifti(file, tmp_path / "out", structures=["lung"], overwrite=True)
    with pytest.raises(ConfigurationError, match="something else than an export"):
        export_nifti(file, tmp_path / "thesis", overwrite=True)
    with pytest.raises(ConfigurationError, match="is a file"):
        export_nifti(file, tmp_path / "thesis" / "thesis.txt", overwrite=True)
    with pytest.raises(ConfigurationError, match="no such directory for the export out"):
        export_nifti(file, tmp_path / "nowhere" / "out")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "out" / "patient-1_volume-0_mask_heart.nii.gz").exists()


def test_equal_files_give_equal_exports(file_of, tmp_path):
    """No clock and no path is in any byte, and the report says what the files are."""
    file = file_of(Stack(), Stack(shape=(2, 5, 7)))
    steps = []

    first = export_nifti(file, tmp_path / "a", progress=steps.append)
    export_nifti(file, tmp_path / "b")

    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    said = json.loads((tmp_path / "a" / "export.json").read_text())
    assert said["kind"] == "nifti"
    assert [case["name"] for case in said["cases"]] == [case.name for case in first.cases]
    assert [(step.stage, step.done, step.total) for step in steps] == [
        ("export", 1, 2),
        ("export", 2, 2),
    ]


def test_nibabel_missing_says_how_to_install_it(file_of, tmp_path, monkeypatch):
    """The extra is named, before anything is written."""
    monkeypatch.setitem(sys.modules, "nibabel", None)

    with pytest.raises(ConfigurationError, match=r'pip install "parallel_dicomseg\[export\]"'):
        export_nifti(file_of(Stack()), tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r'pip install "parallel_dicomseg\[export\]"'):
        export_nnunet(file_of(Stack()), tmp_path, dataset_id=1, name="X")
    assert not list(tmp_path.iterdir())


# --- nnU-Net --------------------------------------------------------------------------------------


def nnunet(file, directory, **options):
    """Export as Dataset007_Chest; its folder, dataset.json and the report."""
    report = export_nnunet(file, directory, dataset_id=7, name="Chest", **options)
    folder = directory / "Dataset007_Chest"
    return folder, json.loads((folder / "dataset.json").read_text()), report


def check_dataset(folder):
    """What nnU-Net's own verify_dataset_integrity asks for, without nnU-Net."""
    said = json.loads((folder / "dataset.json").read_text())
    ending, channels = said["file_ending"], len(said["channel_names"])
    cases = sorted(path.name.removesuffix(ending) for path in (folder / "labelsTr").iterdir())
    assert said["numTraining"] == len(cases) > 0
    images = sorted(path.name for path in (folder / "imagesTr").iterdir())
    assert images == sorted(f"{case}_{k:04d}{ending}" for case in cases for k in range(channels))
    values = [v if isinstance(v, list) else [v] for v in said["labels"].values()]
    every = sorted({label for value in values for label in value})
    assert said["labels"]["background"] == 0
    assert every == list(range(len(every)))
    if "ignore" in said["labels"]:
        assert said["labels"]["ignore"] == every[-1]
    for case in cases:
        labels, placed = read(folder / "labelsTr" / f"{case}{ending}")
        assert set(np.unique(labels).tolist()) <= set(every)
        for k in range(channels):
            pixels, image = read(folder / "imagesTr" / f"{case}_{k:04d}{ending}")
            assert pixels.shape == labels.shape
            for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
                np.testing.assert_allclose(getattr(image, geometry)(), getattr(placed, geometry)())


def test_nnunet_layout(file_of, tmp_path):
    """Parts of the split lie where nnU-Net looks for them; later structures win."""
    file = file_of(
        Stack(patient="patient-1", split="train"),
        Stack(patient="patient-2", split="validation"),
        Stack(patient="patient-3", split="test"),
    )

    folder, said, report = nnunet(file, tmp_path)

    check_dataset(folder)
    assert said == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "heart": 1, "lung": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    assert json.loads((folder / "splits_final.json").read_text()) == [
        {"train": ["patient-1_volume-0"], "val": ["patient-2_volume-1"]}
    ]
    assert [path.name for path in (folder / "imagesTs").iterdir()] == [
        "patient-3_volume-2_0000.nii.gz"
    ]
    masks = Stack().masks
    labels, image = read(folder / "labelsTr" / "patient-1_volume-0.nii.gz")
    np.testing.assert_array_equal(labels, np.where(masks & 2, 2, masks & 1))
    assert_lies_on(image, Stack().planes)
    pixels, _ = read(folder / "imagesTr" / "patient-1_volume-0_0000.nii.gz")
    np.testing.assert_array_equal(pixels, Stack().images)
    overlaps = [note for note in report.notes if note.kind is NoteKind.OVERLAP]
    assert overlaps[0].detail.startswith(f"{np.count_nonzero(masks == 3)} voxels")
    assert len(overlaps) == 3


def test_overlapping_structures_as_regions(file_of, tmp_path):
    """Every combination has a label, a structure is the labels of those that hold it."""
    masks = np.zeros((4, 5, 7), np.uint8)
    masks[:, 1:5, 1:6], masks[1:3, 2:4, 2:4] = 1, 3

    folder, said, report = nnunet(file_of(Stack(masks=masks)), tmp_path, overlap="regions")

    check_dataset(folder)
    assert said["labels"] == {"background": 0, "heart": [1, 2], "lung": 2}
    assert said["regions_class_order"] == [1, 2]
    labels, _ = read(folder / "labelsTr" / "patient-1_volume-0.nii.gz")
    np.testing.assert_array_equal(np.isin(labels, [1, 2]), masks & 1 == 1)
    np.testing.assert_array_equal(labels == 2, masks & 2 == 2)
    assert not [note for note in report.notes if note.kind is NoteKind.OVERLAP]


def test_a_structure_without_voxels_is_no_region(file_of, tmp_path):
    """It is noted; where nothing is drawn at all there is nothing to train."""
    stack = Stack(masks=np.ones((4, 5, 7), np.uint8))

    folder, said, report = nnunet(file_of(stack), tmp_path, overlap="regions")

    check_dataset(folder)
    assert said["labels"] == {"background": 0, "heart": 1}
    assert [note.detail for note in report.notes] == [
        "'lung' has no voxel in any of the volumes: it is no region"
    ]
    blank = Stack(masks=np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(ConfigurationError, match="there are no regions to train"):
        nnunet(file_of(blank), tmp_path, overlap="regions", overwrite=True)


def test_volumes_that_nobody_annotated_are_not_trained_on(file_of, tmp_path):
    """They are left out and noted; in the test they keep their image."""
    nothing = np.zeros((4, 2), bool)
    blank = np.zeros((4, 5, 7), np.uint8)
    file = file_of(
        Stack(patient="patient-1"),
        Stack(patient="patient-2", annotated=nothing, masks=blank),
        Stack(patient="patient-3", annotated=nothing, masks=blank, split="test"),
    )

    folder, said, report = nnunet(file, tmp_path)

    check_dataset(folder)
    assert said["numTraining"] == 1
    left_out = [note.case for note in report.notes if note.kind is NoteKind.LEFT_OUT]
    assert left_out == ["patient-2_volume-1"]
    assert (folder / "imagesTs" / "patient-3_volume-2_0000.nii.gz").is_file()
    assert not (folder / "labelsTs").exists()
    with pytest.raises(ConfigurationError, match="none of 1 volumes is annotated"):
        nnunet(file, tmp_path, volumes=[1], overwrite=True)


@pytest.mark.parametrize(
    ("incomplete", "expected"),
    [("ignore", [[1, 1, 3], [2, 1, 0]]), ("background", [[1, 1, 0], [2, 1, 0]])],
)
def test_what_nobody_looked_for_is_no_background(file_of, tmp_path, incomplete, expected):
    """Where the second structure was not looked for, it might be anywhere."""
    masks = np.array([[[1, 1, 0]], [[2, 1, 0]]], np.uint8)
    annotated = np.array([[True, False], [True, True]])
    stack = Stack(shape=(2, 1, 3), masks=masks, annotated=annotated)

    folder, said, _ = nnunet(file_of(stack), tmp_path, incomplete=incomplete)

    labels, _ = read(folder / "labelsTr" / "patient-1_volume-0.nii.gz")
    if incomplete == "ignore":
        check_dataset(folder)
        assert said["labels"]["ignore"] == 3
        expected = [[3, 3, 3], [2, 1, 0]]
    assert labels[:, 0].tolist() == expected


def test_volumes_with_gaps_can_be_left_out(file_of, tmp_path):
    """With 'leave-out' only volumes that are annotated everywhere are trained on."""
    gap = np.array([[True, True]] * 3 + [[True, False]])
    masks = np.zeros((4, 5, 7), np.uint8)
    file = file_of(Stack(), Stack(annotated=gap, masks=masks))

    _, said, report = nnunet(file, tmp_path, incomplete="leave-out")

    assert said["numTraining"] == 1
    assert "ignore" not in said["labels"]
    assert [note.case for note in report.notes if note.kind is NoteKind.LEFT_OUT] == [
        "patient-1_volume-1"
    ]


def test_modalities_are_not_mixed(file_of, tmp_path):
    """One has to be chosen; the others are noted."""
    file = file_of(Stack(), Stack(modality="MR"), Stack(modality="MR"))

    with pytest.raises(ConfigurationError, match="there are 1 of CT, 2 of MR; choose one"):
        nnunet(file, tmp_path)
    with pytest.raises(ConfigurationError, match="there are no volumes of PT"):
        nnunet(file, tmp_path, modality="PT")
    folder, said, report = nnunet(file, tmp_path, modality="MR")

    check_dataset(folder)
    assert said["channel_names"] == {"0": "MR"}
    assert said["numTraining"] == 2
    assert ("patient-1_volume-0", NoteKind.LEFT_OUT) in [(n.case, n.kind) for n in report.notes]


def test_colour_is_three_channels(file_of, tmp_path):
    """Red, green and blue lie in files of their own."""
    stack = Stack(dtype="uint8", samples=3)

    folder, said, _ = nnunet(file_of(stack), tmp_path)

    check_dataset(folder)
    assert said["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    for k in range(3):
        pixels, _ = read(folder / "imagesTr" / f"patient-1_volume-0_{k:04d}.nii.gz")
        np.testing.assert_array_equal(pixels, stack.images[..., k])


def test_a_patient_on_both_sides_of_nnunets_folds_is_noted(file_of, tmp_path):
    """Without a split nnU-Net makes one by case."""
    folder, _, report = nnunet(file_of(Stack(), Stack(), Stack(patient="patient-2")), tmp_path)

    assert not (folder / "splits_final.json").exists()
    (note,) = [note for note in report.notes if note.kind is NoteKind.NO_SPLIT]
    assert note.detail.startswith("1 patients have several volumes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_id": 0}, "dataset_id is 0, it must be 1 to 999"),
        ({"dataset_id": 1000}, "dataset_id is 1000"),
        ({"name": "../up"}, r"name is '\.\./up'"),
        ({"overlap": "sum"}, "overlap is 'sum', it must be one of priority, regions"),
        ({"incomplete": "guess"}, "incomplete is 'guess'"),
        ({"structures": []}, "there are no structures"),
    ],
)
def test_nnunet_refuses_options_without_meaning(file_of, tmp_path, options, message):
    """Before anything is written."""
    with pytest.raises(ConfigurationError, match=message):
        export_nnunet(file_of(Stack()), tmp_path, **{"dataset_id": 7, "name": "Chest"} | options)
    assert not list(tmp_path.iterdir())


def test_reserved_names_are_refused(file_of, tmp_path):
    """nnU-Net reads 'ignore' as something else than a structure."""
    file = file_of(Stack(), structures=("heart", "ignore"))

    with pytest.raises(ConfigurationError, match="gives the name 'ignore' a meaning of its own"):
        nnunet(file, tmp_path)


# --- numbers --------------------------------------------------------------------------------------

mask_rows = st.lists(st.integers(0, 15), min_size=1, max_size=12)


@given(mask_rows, st.permutations(range(4)), st.integers(1, 4))
def test_label_maps_equal_their_slow_twin(values, order, count):
    """The last structure that holds a voxel names it; voxels in several are counted."""
    structures = order[:count]
    pixels = np.array(values, np.uint16)[None, None]

    labels = label_map(pixels, structures).ravel().tolist()

    held = [[k for k, s in enumerate(structures, 1) if value >> s & 1] for value in values]
    assert labels == [max(holders, default=0) for holders in held]
    assert count_overlapping(pixels, structures) == sum(len(holders) > 1 for holders in held)
    for s in structures:
        assert has_bit(pixels, s).ravel().tolist() == [bool(value >> s & 1) for value in values]


@given(mask_rows)
def test_regions_give_every_structure_back(values):
    """The labels of a region are exactly the voxels of its structure."""
    pixels, names = np.array(values, np.uint8)[None, None], ["a", "b", "c", "d"]
    counts = Counter(value for value in values if value)

    labels = regions_of(counts, range(4), names)
    numbered = number_voxels(pixels, np.ones((1, 4), bool), range(4), labels).ravel()

    for s, name in enumerate(names):
        region = np.atleast_1d(labels.values.get(name, []))
        np.testing.assert_array_equal(np.isin(numbered, region), np.array(values) >> s & 1 == 1)
    assert len(labels.class_order) == len(labels.values) - 1
    sizes = [np.isin(numbered, value).sum() for value in labels.values.values()][1:]
    assert sizes == sorted(sizes, reverse=True)


@given(st.lists(st.booleans(), min_size=4, max_size=4), mask_rows)
def test_ignored_voxels_are_those_that_might_be_something_else(annotated, values):
    """Try every way in which the structures that nobody looked for could lie."""
    known = sum(1 << s for s in range(4) if annotated[s])
    pixels = np.array(values, np.uint8)[None, None] & known
    labels = Labels({}, np.empty(0, np.uint8), (), ignore=5)

    numbered = number_voxels(pixels, np.array([annotated]), range(4), labels).ravel().tolist()

    unknown = 15 - known
    for value, label in zip(pixels.ravel().tolist(), numbered, strict=True):
        possible = {(value | more & unknown).bit_length() for more in range(16)}
        assert label == (possible.pop() if len(possible) == 1 else 5)


def test_regions_that_are_not_known_are_ignored_as_a_whole():
    """A combination is not known where one of its structures is not."""
    labels = Labels({}, np.array([0, 1, 2, 3], np.uint64), (1, 2), ignore=4)
    pixels = np.array([[[0, 1, 1]], [[0, 2, 3]]], np.uint8)
    annotated = np.array([[True, False], [True, True]])

    numbered = number_voxels(pixels, annotated, (0, 1), labels)

    assert numbered[:, 0].tolist() == [[4, 4, 4], [0, 2, 3]]


def test_many_combinations_need_16_bits():
    """More than 255 of them do not fit into a byte."""
    combinations = np.arange(300, dtype=np.uint64)
    labels = Labels({}, combinations, (), ignore=0)
    pixels = np.arange(300, dtype=np.uint16)[None, None]

    numbered = number_voxels(pixels, np.ones((1, 9), bool), range(9), labels)

    assert numbered.dtype == np.uint16
    np.testing.assert_array_equal(numbered, pixels)


# --- real data ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """The six series of the sarcoma cohort in one file of ours, exported: folder and report."""
    folder = tmp_path_factory.mktemp("real")
    root = shared_data / "sts_rtstruct" / "dicom"
    convert_cohort(scan_cohort(root), folder / "cohort.h5", options=ConvertOptions(workers=1))
    with open_dataset(folder / "cohort.h5") as file:
        report = export_nifti(file, folder / "out")
        modality = file.column("modality", "series")[file.column("series_index", "volumes")]
        patient = file.column("patient_id", "volumes")
    names = [f"{p.decode()} {m.decode()}" for p, m in zip(patient, modality, strict=True)]
    return folder / "out", dict(zip(names, report.cases, strict=True)), report


SERIES = [
    (f"patient-{k} {modality}", f"STS_00{k}/{folder}")
    for k in (1, 2)
    for modality, folder in (("CT", "CT"), ("MR", "MR_T1"), ("PT", "PET"))
]


@pytest.mark.parametrize(("case", "folder"), SERIES)
def test_a_real_series_equals_simpleitks_reading(real, shared_data, case, folder):
    """Voxels, and where they lie, against GDCM's own order of the series.

    The images are padded to one size on the right and below, so that positions stay.
    """
    out, cases, _ = real
    study = shared_data / "sts_rtstruct" / "dicom" / folder / "image"
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(study))
    expected = SimpleITK.ReadImage(files)
    columns, rows, slices = expected.GetSize()

    pixels, image = read(out / cases[case].images[0])

    assert image.GetSize()[2] == slices
    origin = image.TransformPhysicalPointToIndex(expected.GetOrigin())
    inside = pixels[:, origin[1] : origin[1] + rows, origin[0] : origin[0] + columns]
    np.testing.assert_allclose(inside, SimpleITK.GetArrayFromImage(expected), rtol=1e-6, atol=1e-3)
    for index in ([0, 0, 0], [columns - 1, 0, 0], [0, rows - 1, 0], [0, 0, slices - 1]):
        np.testing.assert_allclose(
            image.TransformIndexToPhysicalPoint(np.add(index, origin).tolist()),
            expected.TransformIndexToPhysicalPoint(index),
            rtol=0,
            atol=1e-3,
        )


@pytest.mark.parametrize(("case", "folder"), SERIES)
def test_a_real_mask_equals_the_published_one(real, shared_data, case, folder):
    """Voxel by voxel, in the coordinates that both files give."""
    out, cases, _ = real
    (name,) = cases[case].masks.values()
    published = nibabel.load(shared_data / "sts_rtstruct" / "nifti" / f"{folder}_mask.nii.gz")

    exported = nibabel.load(out / name)

    ours = np.argwhere(np.asanyarray(exported.dataobj)) @ exported.affine[:3, :3].T
    theirs = np.argwhere(np.asanyarray(published.dataobj)) @ published.affine[:3, :3].T
    assert len(ours) == len(theirs) > 500
    np.testing.assert_allclose(
        ours + exported.affine[:3, 3], theirs + published.affine[:3, 3], rtol=0, atol=1e-2
    )
