"""The raw layout of nnU-Net v2 out of a converted file.

https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md, region_based_training.md,
ignore_label.md and manual_data_splits.md describe it. One volume is one case.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.export.folder import (
    ExportedCase,
    ExportReport,
    new_folder,
    write_json,
    write_report,
)
from parallel_dicomseg.export.nifti import (
    SUFFIX,
    count_overlapping,
    label_map,
    need_nibabel,
    refuse_bad_geometry,
    save_nifti,
    selected_bits,
    volume_notes,
)
from parallel_dicomseg.export.volumes import (
    Note,
    NoteKind,
    StoredVolume,
    annotation_notes,
    chosen_structures,
    read_slices,
    stored_volumes,
)
from parallel_dicomseg.records import Int64, Progress
from parallel_dicomseg.store import Dataset

#: What becomes of voxels in several structures.
OVERLAPS = ("priority", "regions")
#: What becomes of voxels of which nobody knows whether they are in a structure.
INCOMPLETE = ("ignore", "background", "leave-out")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_LARGEST_ID = 999
_RESERVED = ("background", "ignore")


def export_nnunet(
    dataset: Dataset,
    directory: str | Path,
    *,
    dataset_id: int,
    name: str,
    volumes: Sequence[int] | None = None,
    structures: Sequence[str] | None = None,
    modality: str = "",
    overlap: str = "priority",
    incomplete: str = "ignore",
    strict: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ExportReport:
    """Write `directory/DatasetXXX_NAME` with imagesTr, labelsTr, imagesTs, labelsTs and JSON files.

    Volumes of the split's part 'test' go to imagesTs and labelsTs, all others to imagesTr and
    labelsTr; train and validation become the one fold of splits_final.json. A volume in which none
    of the structures was annotated is left out of the training.

    Parameters
    ----------
    dataset
        An open converted file.
    directory
        nnU-Net's folder `nnUNet_raw`. The dataset's folder appears in it only when it is whole.
    dataset_id, name
        1 to 999; letters, digits, '_' and '-'.
    volumes
        Rows of /volumes; all by default.
    structures
        Names, in the order of their labels 1, 2, …; all by default.
    modality
        Only volumes of this one; may be empty where all have the same. It is the channel's name,
        by which nnU-Net chooses how to normalize ('CT' specially).
    overlap
        'priority': a voxel in several structures gets the label of the last one, and is counted.
        'regions': every combination of structures has a label of its own, and nnU-Net is asked to
        train on structures as regions, which may overlap.
    incomplete
        What a slice gets on which one of the structures was not annotated: 'ignore' gives voxels
        that might be in it nnU-Net's label `ignore`, 'background' takes it that they are not,
        'leave-out' leaves out volumes that have such slices.
    strict, overwrite, progress
        As for `export_nifti`.

    Returns
    -------
    The files, and notes on what they cannot say; also in `export.json` beside them.

    Raises
    ------
    ConfigurationError
        As for `export_nifti`; also where an option has no meaning, modalities are mixed, no
        annotated volume is left to train on, or a structure has a name that nnU-Net reserves.
    ConversionError
        The files cannot be written.
    LayoutError
        A chunk of the converted file cannot be read.
    """
    need_nibabel()
    _check_options(dataset_id, name, overlap, incomplete)
    bits = chosen_structures(dataset, structures)
    _check_structures([dataset.structures[s] for s in bits])
    selected = one_modality(stored_volumes(dataset, volumes), modality)
    sorted_out = sort_out(selected.volumes, dataset.structures, bits, incomplete)
    if strict:
        refuse_bad_geometry(sorted_out.every)
    target = Path(directory) / f"Dataset{dataset_id:03d}_{name}"
    with new_folder(target, overwrite=overwrite) as folder:
        labels = make_labels(dataset, sorted_out, bits, overlap, incomplete)
        job = _Job(dataset, folder, bits, labels)
        cases: list[ExportedCase] = []
        notes = [*selected.notes, *sorted_out.notes, *_undrawn_notes(dataset, bits, labels)]
        for done, volume in enumerate(sorted_out.every, 1):
            case, found = job.write(volume, has_labels=volume in sorted_out.labelled)
            cases.append(case)
            notes += found
            if progress:
                progress(Progress("export", done, len(sorted_out.every)))
        notes += _write_splits(folder, sorted_out.training)
        training = len(sorted_out.training)
        channels = _channels(dataset, selected.volumes[0].modality)
        write_json(folder / "dataset.json", _description(channels, labels, training))
        report = ExportReport(str(target), tuple(cases), tuple(notes), labels.values)
        write_report(folder, "nnunet", report)
    return report


def _check_options(dataset_id: int, name: str, overlap: str, incomplete: str) -> None:
    if not 1 <= dataset_id <= _LARGEST_ID:
        raise ConfigurationError(f"dataset_id is {dataset_id}, it must be 1 to {_LARGEST_ID}")
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"name is {name!r}, it must be letters, digits, '_' and '-'")
    for option, value, known in (
        ("overlap", overlap, OVERLAPS),
        ("incomplete", incomplete, INCOMPLETE),
    ):
        if value not in known:
            raise ConfigurationError(f"{option} is {value!r}, it must be one of {', '.join(known)}")


def _check_structures(names: Sequence[str]) -> None:
    if not names:
        raise ConfigurationError("there are no structures to train on")
    for name in names:
        if name in _RESERVED:
            raise ConfigurationError(
                f"nnU-Net gives the name {name!r} a meaning of its own: convert the structure "
                "under another name"
            )


# --- which volumes --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selected:
    """Volumes of one modality."""

    volumes: tuple[StoredVolume, ...]
    notes: tuple[Note, ...]


def one_modality(volumes: Sequence[StoredVolume], modality: str) -> Selected:
    """The volumes of the modality that is asked for, or of the only one that there is.

    Raises
    ------
    ConfigurationError
        There is no such volume, or several modalities and none was asked for.
    """
    counts = Counter(volume.modality for volume in volumes)
    said = ", ".join(f"{count} of {name or 'none'}" for name, count in sorted(counts.items()))
    if not modality and len(counts) > 1:
        raise ConfigurationError(f"nnU-Net trains on one modality, there are {said}; choose one")
    chosen = [volume for volume in volumes if volume.modality == modality or not modality]
    if not chosen:
        raise ConfigurationError(f"there are no volumes of {modality or 'any modality'}: {said}")
    notes = [
        Note(volume.case, NoteKind.LEFT_OUT, f"its modality is {volume.modality or 'none'}")
        for volume in volumes
        if volume.modality != chosen[0].modality
    ]
    return Selected(tuple(chosen), tuple(notes))


@dataclass(frozen=True, slots=True)
class SortedOut:
    """What becomes of each volume."""

    training: tuple[StoredVolume, ...]
    """With an image and labels, to train and validate on."""
    test: tuple[StoredVolume, ...]
    """With an image, and labels where it is annotated."""
    labelled: tuple[StoredVolume, ...]
    """Those of both that have labels."""
    notes: tuple[Note, ...]

    @property
    def every(self) -> tuple[StoredVolume, ...]:
        """All that are written."""
        return (*self.training, *self.test)


def sort_out(
    volumes: Sequence[StoredVolume], names: Sequence[str], bits: Sequence[int], incomplete: str
) -> SortedOut:
    """Training and test volumes; the training needs annotations.

    Raises
    ------
    ConfigurationError
        Nothing is left to train on.
    """
    labelled, notes = [], []
    for volume in volumes:
        annotated = volume.annotated[:, list(bits)]
        is_usable = annotated.all() if incomplete == "leave-out" else annotated.any()
        if is_usable:
            labelled.append(volume)
        elif volume.split != "test":
            what = "on every slice" if annotated.any() else "at all"
            detail = f"its structures are not annotated {what}: not in the training"
            notes.append(Note(volume.case, NoteKind.LEFT_OUT, detail))
        notes += annotation_notes(volume, names, bits)
    training = tuple(volume for volume in labelled if volume.split != "test")
    if not training:
        raise ConfigurationError(f"none of {len(volumes)} volumes is annotated and not in the test")
    test = tuple(volume for volume in volumes if volume.split == "test")
    return SortedOut(training, test, tuple(labelled), tuple(notes))


# --- which labels ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Labels:
    """How bits of masks become the numbers of a label map."""

    values: dict[str, Any]
    """As dataset.json has them: name -> label, or labels of a region."""
    combinations: NDArray[Any]
    """(c,) regions: the sets of structures that occur, as bits, ascending from none; label k is
    combinations[k]. Empty: one label per structure."""
    class_order: tuple[int, ...]
    """Regions: the label that nnU-Net gives to what it predicts as each region."""
    ignore: int
    """The label `ignore`; 0: there is none."""


def make_labels(
    dataset: Dataset, volumes: SortedOut, bits: Sequence[int], overlap: str, incomplete: str
) -> Labels:
    """Number the structures, or with 'regions' the combinations of them that occur.

    Raises
    ------
    ConfigurationError
        There are to be regions, and no voxel is in any structure.
    """
    names = [dataset.structures[s] for s in bits]
    if overlap == "regions":
        counts = count_combinations(dataset, volumes.labelled, bits)
        if not counts:
            raise ConfigurationError("no voxel is in any structure: there are no regions to train")
        labels = regions_of(counts, bits, names)
        largest = len(labels.combinations) - 1
    else:
        values = {"background": 0} | {name: label for label, name in enumerate(names, 1)}
        labels, largest = Labels(values, np.empty(0, dataset.mask_dtype), (), 0), len(names)
    gaps = any(not volume.annotated[:, list(bits)].all() for volume in volumes.labelled)
    if incomplete != "ignore" or not gaps:
        return labels
    return replace(labels, values=labels.values | {"ignore": largest + 1}, ignore=largest + 1)


def count_combinations(
    dataset: Dataset, volumes: Iterable[StoredVolume], bits: Sequence[int]
) -> Counter[int]:
    """How many voxels each set of structures has, as bits; without those in none."""
    counts: Counter[int] = Counter()
    for volume in volumes:
        for row in volume.rows.tolist():
            pixels = selected_bits(dataset.masks[row], bits)
            values, voxels = np.unique(pixels[pixels != 0], return_counts=True)
            counts.update(dict(zip(values.tolist(), voxels.tolist(), strict=True)))
    return counts


def regions_of(counts: Counter[int], bits: Sequence[int], names: Sequence[str]) -> Labels:
    """Each structure as the labels of all combinations that hold it, larger structures first.

    nnU-Net writes its predictions of the regions one over another, so that the smaller one stays;
    what it predicts as a region it gives the label of the smallest combination that holds it,
    which for nested structures is right.
    """
    combinations = sorted(counts)
    label = {combination: k for k, combination in enumerate(combinations, 1)}
    holding = {s: [c for c in combinations if c >> s & 1] for s in bits}
    voxels = {s: sum(counts[c] for c in holding[s]) for s in bits}
    drawn = sorted((s for s in bits if holding[s]), key=lambda s: -voxels[s])
    name = dict(zip(bits, names, strict=True))
    regions = {name[s]: [label[c] for c in holding[s]] for s in drawn}
    smallest = [min(holding[s], key=lambda c: (c.bit_count(), -counts[c])) for s in drawn]
    return Labels(
        # nnU-Net drops a region that is a list of one label
        values={"background": 0} | {k: v if len(v) > 1 else v[0] for k, v in regions.items()},
        combinations=np.array([0, *combinations], np.uint64),
        class_order=tuple(label[c] for c in smallest),
        ignore=0,
    )


def _undrawn_notes(dataset: Dataset, bits: Sequence[int], labels: Labels) -> list[Note]:
    """Structures that are no region, because no voxel is in them."""
    names = [dataset.structures[s] for s in bits]
    undrawn = [name for name in names if name not in labels.values]
    detail = "{!r} has no voxel in any of the volumes: it is no region"
    return [Note("", NoteKind.LEFT_OUT, detail.format(name)) for name in undrawn]


def number_voxels(
    pixels: NDArray[Any], annotated: NDArray[np.bool_], bits: Sequence[int], labels: Labels
) -> NDArray[Any]:
    """The label map of a volume.

    Parameters
    ----------
    pixels
        (k, rows, columns) of /masks.
    annotated
        (k, s) over all structures of the file.
    bits, labels
        The structures, and their numbers.

    Returns
    -------
    (k, rows, columns) uint8 or uint16.
    """
    chosen, has_regions = selected_bits(pixels, bits), len(labels.combinations) > 0
    if has_regions:
        numbered: NDArray[Any] = np.searchsorted(
            labels.combinations.astype(pixels.dtype), chosen
        ).astype(np.uint16)
    else:
        numbered = label_map(chosen, bits)
    if labels.ignore:
        for k, limit in enumerate(_certain_from(annotated[:, list(bits)]).tolist()):
            # A structure that was not looked for might be there, over all that come before it;
            # and in any combination.
            unsure = len(labels.combinations) if has_regions and limit else limit
            numbered[k][numbered[k] < unsure] = labels.ignore
    largest = max(labels.ignore, len(labels.combinations) - 1, len(bits))
    return numbered.astype(np.uint8 if largest <= np.iinfo(np.uint8).max else np.uint16)


def _certain_from(annotated: NDArray[np.bool_]) -> Int64:
    """(k,) label of the last structure that was not annotated; 0 where all were."""
    places = np.arange(1, annotated.shape[1] + 1)
    certain: Int64 = np.where(annotated, 0, places).max(axis=1)
    return certain


# --- the files ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """What the files of all cases have in common."""

    dataset: Dataset
    folder: Path
    bits: tuple[int, ...]
    labels: Labels

    def write(self, volume: StoredVolume, *, has_labels: bool) -> tuple[ExportedCase, list[Note]]:
        """Write the channels and the label map of one case."""
        part = "Ts" if volume.split == "test" else "Tr"
        images = self._write_channels(volume, f"images{part}")
        notes, masks = volume_notes(volume), {}
        if has_labels:
            name = f"labels{part}/{volume.case}{SUFFIX}"
            notes += self._write_labels(volume, name)
            names = self.dataset.structures
            masks = {names[s]: name for s in self.bits if volume.annotated[:, s].any()}
        case = ExportedCase(
            volume.case, volume.number, len(volume.rows), volume.split, images, masks
        )
        return case, notes

    def _write_channels(self, volume: StoredVolume, folder: str) -> tuple[str, ...]:
        pixels = read_slices(self.dataset.images, volume.rows)
        channels = np.moveaxis(pixels, 3, 0) if pixels.ndim == 4 else [pixels]
        (self.folder / folder).mkdir(exist_ok=True)
        names = [f"{folder}/{volume.case}_{k:04d}{SUFFIX}" for k in range(len(channels))]
        for name, channel in zip(names, channels, strict=True):
            save_nifti(channel, volume.placement, self.folder / name)
        return tuple(names)

    def _write_labels(self, volume: StoredVolume, name: str) -> list[Note]:
        pixels = read_slices(self.dataset.masks, volume.rows)
        numbered = number_voxels(pixels, volume.annotated, self.bits, self.labels)
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        save_nifti(numbered, volume.placement, path)
        overlapping = count_overlapping(pixels, self.bits)
        if not overlapping or len(self.labels.combinations):
            return []
        detail = f"{overlapping} voxels are in several structures: they have the last one's label"
        return [Note(volume.case, NoteKind.OVERLAP, detail)]


def _channels(dataset: Dataset, modality: str) -> dict[str, str]:
    shape: tuple[int, ...] = dataset.images.shape
    if len(shape) == 4:
        return {"0": "R", "1": "G", "2": "B"}
    return {"0": modality or "unknown"}


def _description(channels: dict[str, str], labels: Labels, training: int) -> dict[str, Any]:
    """What dataset.json says."""
    order = {"regions_class_order": list(labels.class_order)} if labels.class_order else {}
    return {
        "channel_names": channels,
        "labels": labels.values,
        **order,
        "numTraining": training,
        "file_ending": SUFFIX,
    }


def _write_splits(folder: Path, training: Sequence[StoredVolume]) -> list[Note]:
    """splits_final.json, where the file has a split; else a note if nnU-Net's own may mix."""
    parts: dict[str, list[str]] = defaultdict(list)
    patients = Counter(volume.patient_id for volume in training)
    for volume in training:
        parts[volume.split].append(volume.case)
    if parts["train"] and parts["validation"]:
        write_json(
            folder / "splits_final.json", [{"train": parts["train"], "val": parts["validation"]}]
        )
        return []
    several = sum(count > 1 for count in patients.values())
    if not several:
        return []
    detail = (
        f"{several} patients have several volumes, and without train and validation parts nnU-Net "
        "splits by volume: a patient may be on both sides"
    )
    return [Note("", NoteKind.NO_SPLIT, detail)]
