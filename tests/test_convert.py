"""From a generated cohort to a file: truth, bad input, and what is left when a run fails."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
from exact import mask as rasterize_exactly

from parallel_dicomseg import (
    Checks,
    ConvertOptions,
    ScanOptions,
    convert_cohort,
    open_dataset,
    scan_cohort,
    verify_file,
)
from parallel_dicomseg.convert import encode_chunk, open_writer
from parallel_dicomseg.deidentify import Policy
from parallel_dicomseg.dicom import headers
from parallel_dicomseg.errors import (
    ConfigurationError,
    ConversionError,
    LayoutError,
    VerificationError,
)
from parallel_dicomseg.plan import make_plan, tasks
from parallel_dicomseg.rasterize import rasterize_contours
from parallel_dicomseg.records import FLAGS, Progress, Reason
from parallel_dicomseg.store import Hdf5Writer
from parallel_dicomseg.synthetic import make_sunnybrook_cohort


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small cohort of non-square images, never changed, and the truth about it."""
    directory = tmp_path_factory.mktemp("original") / "cohort"
    truth = make_sunnybrook_cohort(directory, patients=3, slices=4, rows=48, columns=64)
    return directory, truth


@pytest.fixture
def cohort_directory(original, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(original[0], tmp_path / "cohort")


def outline_files(directory, structure="i"):
    """Contour files of a structure, sorted."""
    return sorted(directory.glob(f"contourfiles/*/{structure}-contours/*.txt"))


def image_of(directory, truth, outline):
    """The image file that a contour file was drawn on."""
    relative = outline.relative_to(directory).as_posix()
    (found,) = [o.image_path for o in truth.outlines if o.path == relative]
    return directory / found


def convert(directory, output, **options):
    """Scan and convert with one worker."""
    scan = {k: options.pop(k) for k in ("structures", "include_unannotated") if k in options}
    cohort = scan_cohort(directory, options=ScanOptions(**scan))
    return convert_cohort(cohort, output, options=ConvertOptions(workers=1, **options))


def test_every_mask_and_image_is_the_truth(original, tmp_path):
    """Pixels equal pydicom's, masks equal exact arithmetic on the polygon, for every outline."""
    directory, truth = original
    summary = convert(directory, tmp_path / "x.h5", keep_identity=True)

    assert (summary.slices, summary.problems) == (12, ())
    with open_dataset(tmp_path / "x.h5") as dataset:
        row_of = {os.fsdecode(p): k for k, p in enumerate(dataset.column("source_path").tolist())}
        for outline in truth.outlines:
            row = row_of[outline.image_path]
            bit = dataset.structures.index(outline.structure)
            points = outline.polygon_column_row
            exact = rasterize_exactly([points.tolist()], dataset.shape[1:])
            np.testing.assert_array_equal((dataset.masks[row] >> bit) & 1, exact)
            area = int(dataset.column("area")[row, bit])
            assert area == exact.sum()
            assert abs(area - outline.area) < 2 + 0.03 * outline.area
        for path, row in row_of.items():
            pixels = pydicom.dcmread(directory / path).pixel_array
            np.testing.assert_array_equal(dataset.images[row], pixels)
    assert verify_file(tmp_path / "x.h5").is_sound


def test_structures_can_be_chosen_and_ordered(original, tmp_path):
    """The order of the names is the order of the bits."""
    convert(original[0], tmp_path / "io.h5")
    convert(original[0], tmp_path / "oi.h5", structures=("o", "i"))
    convert(original[0], tmp_path / "i.h5", structures=("i",))

    with (
        open_dataset(tmp_path / "io.h5") as io,
        open_dataset(tmp_path / "oi.h5") as oi,
        open_dataset(tmp_path / "i.h5") as i,
    ):
        assert (io.structures, oi.structures, i.structures) == (("i", "o"), ("o", "i"), ("i",))
        assert (io.nested, oi.nested, i.nested) == (((0, 1),), ((1, 0),), ())
        for row in range(len(io)):
            np.testing.assert_array_equal(io.masks[row] & 1, oi.masks[row] >> 1)
            np.testing.assert_array_equal(io.masks[row] >> 1, oi.masks[row] & 1)
            np.testing.assert_array_equal(io.masks[row] & 1, i.masks[row])


def test_contour_origin_moves_the_contours_not_the_image(original, tmp_path):
    """With origin 1 the first pixel's centre is (1, 1): masks move by a pixel up and left."""
    convert(original[0], tmp_path / "0.h5")
    convert(original[0], tmp_path / "1.h5", contour_origin=1.0)

    with open_dataset(tmp_path / "0.h5") as zero, open_dataset(tmp_path / "1.h5") as one:
        for row in range(len(zero)):
            np.testing.assert_array_equal(one.masks[row][:-1, :-1], zero.masks[row][1:, 1:])
            np.testing.assert_array_equal(one.images[row], zero.images[row])


def test_bad_outlines_cost_their_structure_only(cohort_directory, original, tmp_path):
    """Words, NaN, one point, nothing: each is named; the slice of a lost i with an o remains."""
    bad = outline_files(cohort_directory)
    texts = {
        bad[0]: ("12.5 words\n1 2\n3 4\n", "line 1: value 2 is not a number"),
        bad[1]: ("1 2\nnan 4\n3 4\n", "line 2: value 1 is not finite"),
        bad[2]: ("1 2\n", "1 point"),
        bad[3]: ("", "0 point|empty"),
    }
    for file, (text, _) in texts.items():
        file.write_text(text)
    with_o = {o.image_path for o in original[1].outlines if o.structure == "o"}
    lost = [f for f in texts if image_path(cohort_directory, original[1], f) not in with_o]

    summary = convert(cohort_directory, tmp_path / "x.h5")

    assert (summary.rejected, summary.exit_status) == (4, 1)
    assert summary.slices == 12 - len(lost)
    assert 0 < len(lost) < 4
    details = {problem.path: problem.detail for problem in summary.problems}
    for file, (_, words) in texts.items():
        relative = file.relative_to(cohort_directory).as_posix()
        assert {p.reason for p in summary.problems if p.path == relative} == {Reason.BAD_CONTOUR}
        import re

        assert re.search(words, details[relative]), details[relative]
    with open_dataset(tmp_path / "x.h5") as dataset:
        assert dataset.rejected == list(summary.problems)
        assert dataset.column("structure_annotated").any(axis=1).all()
    assert verify_file(tmp_path / "x.h5").is_sound


def image_path(directory, truth, outline):
    """The relative path of the image of a contour file."""
    return image_of(directory, truth, outline).relative_to(directory).as_posix()


def test_bad_outlines_leave_an_unannotated_slice_when_those_are_wanted(cohort_directory, tmp_path):
    """With include_unannotated the image stays, and says that it has no outline."""
    for structure in ("i", "o"):
        for file in outline_files(cohort_directory, structure):
            file.write_text("no outline\n")

    summary = convert(cohort_directory, tmp_path / "x.h5", include_unannotated=True)

    assert (summary.slices, summary.annotated) == (12, (0, 0))
    with open_dataset(tmp_path / "x.h5") as dataset:
        assert not dataset.column("annotated").any()
        assert not any(dataset.masks[row].any() for row in range(12))


def test_bad_images_are_named_and_the_others_converted(cohort_directory, original, tmp_path):
    """Text instead of DICOM, half a file, an unknown compression, a vanished file; another size
    is no reason.
    """
    images = [image_of(cohort_directory, original[1], f) for f in outline_files(cohort_directory)]
    images[0].write_text("this is not DICOM\n" * 40)
    images[1].write_bytes(images[1].read_bytes()[:-1000])
    other = pydicom.dcmread(images[2])
    other.Rows, other.PixelData = 24, other.PixelData[: 24 * 64 * 2]
    other.save_as(images[2])
    unknown = pydicom.dcmread(images[3])
    unknown.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
    unknown.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8no jpeg\xff\xd9"])
    unknown["PixelData"].is_undefined_length = True
    unknown.save_as(images[3])
    cohort = scan_cohort(cohort_directory)
    images[4].unlink()

    summary = convert_cohort(cohort, tmp_path / "x.h5", options=ConvertOptions(workers=1))

    reasons = {p.path: p.reason for p in summary.problems if p.is_rejection}
    assert reasons == {
        str(image.relative_to(cohort_directory)): reason
        for image, reason in zip(
            images[:2] + images[3:],
            (
                Reason.NOT_DICOM,
                Reason.PIXEL_DATA_SHORT,
                Reason.UNDECODABLE_PIXELS,
                Reason.UNREADABLE_FILE,
            ),
            strict=False,
        )
    }
    assert (summary.slices, summary.exit_status) == (8, 1)
    assert summary.notes == ("1 of 10 images were padded to 48 x 64 (sizes 48 x 64, 24 x 64)",)
    assert verify_file(tmp_path / "x.h5").is_sound


def test_more_rejections_can_be_allowed_and_none_at_all(cohort_directory, tmp_path):
    """max_rejected decides the exit status, strict ends the run at the first."""
    outline_files(cohort_directory)[0].write_text("1 2\n")

    allowed = convert(cohort_directory, tmp_path / "x.h5", max_rejected=1)

    assert (allowed.rejected, allowed.exit_status) == (1, 0)
    with pytest.raises(ConversionError, match=r"icontour-manual.txt: 1 point.*stopped by strict"):
        convert(cohort_directory, tmp_path / "y.h5", strict=True)
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""] == ["x.h5"]


def test_without_one_good_slice_there_is_no_file(cohort_directory, tmp_path):
    """The error names the first reason, and nothing is left behind."""
    for structure in ("i", "o"):
        for file in outline_files(cohort_directory, structure):
            file.write_text("1 2\n")

    with pytest.raises(ConversionError, match=r"none of 12 slices could be converted.*1 point"):
        convert(cohort_directory, tmp_path / "x.h5")
    assert not list(tmp_path.glob("x.h5*"))


def test_an_existing_output_is_kept_unless_overwriting(original, tmp_path):
    """Neither a refused nor a failed run touches the file that is there."""
    path = tmp_path / "x.h5"
    path.write_text("precious")

    with pytest.raises(ConfigurationError, match=r"x.h5 exists; --overwrite replaces it"):
        convert(original[0], path)
    assert path.read_text() == "precious"
    assert convert(original[0], path, overwrite=True).slices == 12


@pytest.mark.parametrize(
    ("output", "words"),
    [("missing/x.h5", "no such directory for the output"), (".", "is a directory")],
)
def test_outputs_that_cannot_be_are_refused_before_the_work(original, tmp_path, output, words):
    """The message names the path."""
    with pytest.raises(ConfigurationError, match=words):
        convert(original[0], tmp_path / output)


def test_a_missing_or_empty_data_directory_is_an_error(tmp_path):
    """Clear words, no traceback into the walk."""
    (tmp_path / "empty").mkdir()

    with pytest.raises(LayoutError, match="no such directory"):
        scan_cohort(tmp_path / "missing")
    with pytest.raises(LayoutError, match="empty"):
        scan_cohort(tmp_path / "empty")


def test_progress_counts_every_file_and_every_slice(original, tmp_path):
    """Events grow and end at their total."""
    events: list[Progress] = []
    cohort = scan_cohort(original[0], progress=events.append)
    options = ConvertOptions(workers=1, slices_per_task=5, zarr=str(tmp_path / "x.zarr"))
    convert_cohort(cohort, tmp_path / "x.h5", options=options, progress=events.append)
    verify_file(tmp_path / "x.h5", progress=events.append)

    stages = {event.stage: [] for event in events}
    for event in events:
        stages[event.stage].append((event.done, event.total))
    assert stages["convert"] == [(5, 12), (10, 12), (12, 12)]
    assert list(stages) == ["scan", "convert", "mirror", "verify"]
    assert all(counts[-1][0] == counts[-1][1] for counts in stages.values())


def test_thresholds_of_the_checks_decide_the_flags(original, tmp_path):
    """The same masks, other thresholds: every mask is too large for a limit of nothing."""
    usual = convert(original[0], tmp_path / "usual.h5")
    strict = convert(original[0], tmp_path / "strict.h5", checks=Checks(max_mask_fraction=0.0))

    assert "mask-too-large" not in usual.flagged
    assert strict.flagged["mask-too-large"] == 12


def test_an_outline_outside_the_image_is_flagged_as_empty(cohort_directory, tmp_path):
    """It stays where it is: no mask, a flag, annotated all the same."""
    file = outline_files(cohort_directory)[0]
    file.write_text("-50 -50\n-40 -50\n-45 -40\n")

    summary = convert(cohort_directory, tmp_path / "x.h5")

    assert summary.flagged["empty-mask"] == 1
    with open_dataset(tmp_path / "x.h5") as dataset:
        (row,) = np.flatnonzero(dataset.column("flags") & (1 << FLAGS.index("empty-mask")))
        assert dataset.column("structure_annotated")[row, 0]
        assert dataset.column("area")[row, 0] == 0


def test_pixel_data_longer_than_the_header_says_is_flagged(cohort_directory, original, tmp_path):
    """The image is what rows and columns say; that the file holds more is reported."""
    file = image_of(cohort_directory, original[1], outline_files(cohort_directory)[0])
    dataset = pydicom.dcmread(file)
    dataset.PixelData += bytes(64)
    dataset.save_as(file)

    assert convert(cohort_directory, tmp_path / "x.h5").flagged == {
        "pixel-data-longer-than-header": 1
    }


def test_rescaled_images_are_stored_exactly(cohort_directory, original, tmp_path):
    """A slope of its own in one file, an absent one in the others; float32 holds them all."""
    file = image_of(cohort_directory, original[1], outline_files(cohort_directory)[0])
    dataset = pydicom.dcmread(file)
    dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-1000"
    dataset.save_as(file)

    convert(cohort_directory, tmp_path / "x.h5", keep_identity=True)

    with open_dataset(tmp_path / "x.h5") as converted:
        assert converted.image_dtype == np.dtype("<f4")
        relative = file.relative_to(cohort_directory).as_posix().encode()
        (row,) = np.flatnonzero(converted.column("source_path") == relative)
        np.testing.assert_array_equal(converted.images[row], dataset.pixel_array * 0.5 - 1000)
        other = (row + 1) % len(converted)
        path = cohort_directory / os.fsdecode(converted.column("source_path")[other])
        np.testing.assert_array_equal(
            converted.images[other], pydicom.dcmread(path).pixel_array.astype("<f4")
        )


def test_the_program_is_a_loop_over_tasks(original, tmp_path):
    """Without any scheduler: plan, encode, put, publish give the very same bytes."""
    cohort = scan_cohort(original[0])
    convert_cohort(cohort, tmp_path / "dask.h5")
    plan = make_plan(cohort, ConvertOptions(), 1)
    with open_writer(tmp_path / "loop.h5", plan, Policy()) as writer:
        for task in tasks(plan):
            writer.put(encode_chunk(task))
        writer.publish(cohort.problems)

    assert (tmp_path / "loop.h5").read_bytes() == (tmp_path / "dask.h5").read_bytes()


def test_chunks_out_of_order_are_refused(original, tmp_path):
    """The writer takes tasks in plan order only; what is left of a failed run is nothing."""
    plan = make_plan(scan_cohort(original[0]), ConvertOptions(slices_per_task=5), 1)
    _, second, *_ = [encode_chunk(task) for task in tasks(plan)]

    with (
        pytest.raises(ConversionError, match="slices from 5 on came where 0 is next"),
        Hdf5Writer(tmp_path / "x.h5", plan.layout, plan.cohort.slices) as writer,
    ):
        writer.put(second)
    assert not list(tmp_path.iterdir())


def test_errors_in_a_worker_reach_the_caller(original, tmp_path, monkeypatch):
    """A fault of the program is no rejected slice: it ends the run, and no file is left."""
    cohort = scan_cohort(original[0])
    broken = replace(
        cohort, annotations=replace(cohort.annotations, structure=cohort.annotations.structure + 9)
    )

    fault = r"no slice of the first 3 tasks can be converted.*ValueError in rasterize\.py, line"
    with pytest.raises(ConversionError, match=fault):
        convert_cohort(broken, tmp_path / "x.h5", options=ConvertOptions(workers=2))
    assert not list(tmp_path.iterdir())


def test_an_unwritable_directory_is_a_clear_error(original, tmp_path):
    """The message names the partial file and the system's reason."""
    cohort = scan_cohort(original[0])
    (tmp_path / "x.h5.partial").mkdir()

    with pytest.raises(ConversionError, match=r"x.h5.partial cannot be written"):
        convert_cohort(cohort, tmp_path / "x.h5")


def test_plain_readers_need_nothing_of_ours(original, tmp_path):
    """h5py alone reads images, masks, names and tables of the default file."""
    convert(original[0], tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert list(file["masks"].attrs["structures"]) == ["i", "o"]
        assert file["images"].shape == file["masks"].shape == (12, 48, 64)
        assert [d.label for d in file["images"].dims] == ["slice", "row", "column"]
        assert file["table/area"].shape == (12, 2)
        bit0 = file["masks"][0] & 1
        assert int(bit0.sum()) == file["table/area"][0, 0]


def test_rasterize_contours_is_what_the_conversion_does(original, tmp_path):
    """The public function on one outline equals the mask in the file."""
    directory, truth = original
    convert(directory, tmp_path / "x.h5", keep_identity=True)
    outline = truth.outlines[0]
    points = outline.polygon_column_row
    mask = rasterize_contours(points, np.array([0, len(points)]), (48, 64))
    with open_dataset(tmp_path / "x.h5") as dataset:
        (row,) = np.flatnonzero(dataset.column("source_path") == outline.image_path.encode())
        bit = dataset.structures.index(outline.structure)
        np.testing.assert_array_equal((dataset.masks[row] >> bit) & 1, mask)


def test_paths_with_odd_characters_survive(cohort_directory, tmp_path):
    """Blanks, umlauts and a directory name that is no UTF-8."""
    strange = tmp_path / os.fsdecode(b"K\xc3\xb6 \xff rper")
    shutil.move(cohort_directory, strange)

    assert convert(strange, Path(tmp_path) / "x.h5").slices == 12


def test_pydicom_alone_gives_the_very_same_file(original, tmp_path, monkeypatch):
    """The slow path through pydicom, where there is no fast one, changes no byte."""
    convert(original[0], tmp_path / "fast.h5")
    monkeypatch.setattr(headers, "AVAILABLE", False)

    convert(original[0], tmp_path / "slow.h5")

    assert (tmp_path / "slow.h5").read_bytes() == (tmp_path / "fast.h5").read_bytes()


def encoded(cohort):
    """The plan of a cohort and all its chunks."""
    plan = make_plan(cohort, ConvertOptions(slices_per_task=5), 1)
    return plan, [encode_chunk(task) for task in tasks(plan)]


def test_a_second_run_on_the_same_output_is_refused_and_harms_nothing(original, tmp_path):
    """The first run's partial file is not touched; its result is whole, its lock is gone."""
    cohort = scan_cohort(original[0])
    plan, chunks = encoded(cohort)
    with Hdf5Writer(tmp_path / "x.h5", plan.layout, plan.cohort.slices) as writer:
        writer.put(chunks[0])
        with pytest.raises(ConversionError, match=r"x\.h5 is being written by another run"):
            convert_cohort(cohort, tmp_path / "x.h5")
        for chunk in chunks[1:]:
            writer.put(chunk)
        writer.publish(())

    assert verify_file(tmp_path / "x.h5").is_sound
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_an_output_that_appears_meanwhile_is_left_alone(original, tmp_path):
    """Without overwrite nothing that somebody else made is replaced, even at the last moment."""
    plan, chunks = encoded(scan_cohort(original[0]))
    with Hdf5Writer(tmp_path / "x.h5", plan.layout, plan.cohort.slices) as writer:
        for chunk in chunks:
            writer.put(chunk)
        (tmp_path / "x.h5").write_text("precious")
        with pytest.raises(ConversionError, match="has appeared meanwhile"):
            writer.publish(())

    assert (tmp_path / "x.h5").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["x.h5"]


def test_bytes_that_are_not_the_workers_never_get_the_final_name(original, tmp_path):
    """Every chunk is read back before the rename and compared with the worker's checksum."""
    plan, chunks = encoded(scan_cohort(original[0]))
    chunks[1] = replace(chunks[1], mask_crc32c=chunks[1].mask_crc32c ^ np.uint32(1))
    with Hdf5Writer(tmp_path / "x.h5", plan.layout, plan.cohort.slices) as writer:
        for chunk in chunks:
            writer.put(chunk)
        with pytest.raises(VerificationError, match=r"chunk 5 of /masks has .* were written"):
            writer.publish(())

    assert not list(tmp_path.iterdir())


def test_a_mirror_that_cannot_be_is_refused_before_the_work(original, tmp_path):
    """Its parent must exist, it must not be the output, and nothing foreign is replaced."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "zarr.json").write_text('{"attributes": {}}')
    for mirror, words in (
        ("missing/x.zarr", "no such directory for the mirror"),
        ("x.h5", "cannot be the output and its mirror"),
        ("foreign", "is no mirror made by parallel_dicomseg"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            convert(original[0], tmp_path / "x.h5", zarr=str(tmp_path / mirror), overwrite=True)
    assert not (tmp_path / "x.h5").exists()


def test_a_cohort_without_outlines_makes_a_file_that_verifies(cohort_directory, tmp_path):
    """All images unannotated, no structure at all: still a file that opens and is sound."""
    shutil.rmtree(cohort_directory / "contourfiles")
    (cohort_directory / "contourfiles").mkdir()

    summary = convert(cohort_directory, tmp_path / "x.h5", include_unannotated=True)

    assert (summary.slices, summary.structures, summary.annotated) == (12, (), ())
    assert verify_file(tmp_path / "x.h5").is_sound


def test_a_transfer_syntax_that_is_no_text_costs_only_its_file(cohort_directory, tmp_path):
    """Bytes of a UID may be anything."""
    file = min(cohort_directory.glob("dicoms/*/*.dcm"))
    uid = b"1.2.840.10008.1.2.1"
    file.write_bytes(file.read_bytes().replace(uid, uid[:8] + b"\xea" + uid[9:], 1))

    summary = convert(cohort_directory, tmp_path / "x.h5")

    assert summary.slices == 11
    assert summary.rejected >= 1
