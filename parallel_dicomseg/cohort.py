"""Find the files of a cohort, read their headers in parallel, lay the annotations on the images."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.deidentify import cleaned
from parallel_dicomseg.dicom.headers import (
    Scanned,
    concatenate_headers,
    is_secondary_capture,
    scan_headers,
)
from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.limits import applied
from parallel_dicomseg.records import (
    Annotation,
    AnnotationTable,
    Bytes,
    Cohort,
    Headers,
    MarkTable,
    Problem,
    Progress,
    Reason,
    ScannedFile,
    ScanOptions,
    SliceTable,
)
from parallel_dicomseg.sources import sunnybrook
from parallel_dicomseg.sources.base import (
    Found,
    Listing,
    Source,
    check_directory,
    scan_folder,
    walk,
)
from parallel_dicomseg.sources.registry import SOURCES
from parallel_dicomseg.sources.tree import find_annotations, list_tree, unchosen_files
from parallel_dicomseg.split import check_fractions, split_patients
from parallel_dicomseg.structures import (
    Aliases,
    Chosen,
    annotation_table,
    asked_for,
    choose,
    read_aliases,
)
from parallel_dicomseg.volumes import order_volumes

#: How many problems are named where nothing is left to convert.
NAMED_PROBLEMS = 3
#: What `source` may say besides the names of the sources of a DICOM tree.
ANY, TREE = "auto", "dicom"
# Files per header call: enough to make the GIL rare, few enough for a smooth progress bar.
_FILES_PER_CALL = 512
# Options that do not change what is found, or name places.
_NOT_SAID = frozenset({"aliases", "contours_sub_dir", "limits", "link_file_name", "workers"})


@dataclass(frozen=True, slots=True)
class _Files:
    """What a data directory holds by the names of its files."""

    listings: list[Listing]
    """Cohorts of the Sunnybrook layouts."""
    paths: list[str]
    """Other files whose header is to be read."""
    foreign: list[ScannedFile]
    """Files that are no DICOM by their names."""
    sources: Mapping[str, Source]
    """Who is asked about annotations in other files than those of `listings`."""
    problems: tuple[Problem, ...]

    @property
    def numbered_paths(self) -> list[str]:
        """Images of the listings."""
        return [path for listing in self.listings for path in listing.image_paths]


@dataclass(frozen=True, slots=True)
class _Selected:
    """What is converted of the annotations."""

    names: tuple[str, ...]
    """Structures in bit order."""
    table: AnnotationTable
    annotated: NDArray[np.uint64]
    """(n,) bit s: somebody looked for structure s."""
    taken: list[Annotation]
    spelled: dict[str, tuple[str, ...]]
    unmatched: dict[str, int]
    found_by: dict[str, int]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Images:
    """All images of a scan, sorted by patient, series, volume and position."""

    table: SliceTable
    headers: Headers
    own_patient_id: Bytes
    """(n,) PatientID as the file has it: b'' where it has none, or where a table names it."""
    localizer: NDArray[np.bool_]
    """(n,) to be left out unless somebody drew on it."""
    numbered: NDArray[np.bool_]
    """(n,) whether it is of one of the listings."""
    burned_in: NDArray[np.bool_]
    """(n,) whether its pixels may name somebody."""


def scan_cohort(
    data_directory: str | Path,
    *,
    options: ScanOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Cohort:
    """Find the images and annotations of a cohort and pair them; reads no pixels.

    Parameters
    ----------
    data_directory
        The root of the cohort: any tree of DICOM files with annotations, the Sunnybrook data, or
        both together. Nothing outside it is opened.
    options
        What to look for.
    progress
        Called with the files done so far.

    Returns
    -------
    The images to convert in the order of the output (patient in natural order, study, series,
    volume, position along the normal), what is drawn on them, and a Problem for everything that
    does not belong together. Of a series that somebody annotated in DICOM, all slices are
    converted; of a Sunnybrook series those that have an outline.

    Raises
    ------
    LayoutError
        The directory is missing or empty, a table that it needs is wrong, or nothing in it is to
        be converted; then the first problems are named.
    ConfigurationError
        An option names a source or a structure that is not there.
    """
    options = options or ScanOptions()
    aliases = _check_options(options)
    with applied(options.limits):
        return _scan(Path(data_directory), options, aliases, progress)


def _scan(
    root: Path,
    options: ScanOptions,
    aliases: Aliases,
    progress: Callable[[Progress], None] | None,
) -> Cohort:
    files = _list_files(root, options)
    scanned = _read_headers(root, files, options, progress)
    images, copies, hygiene = _in_order(scanned, files)
    scanned = replace(scanned, slices=copies, headers={})  # the rest is in `images` now
    numbered = _pair_numbered(scanned, files, images.table)
    drawn = _find_annotations(root, scanned, files, images, options)
    annotations = (*numbered.annotations, *drawn.annotations)
    selected = _select(annotations, len(images.table), aliases, options)
    wanted = _kept(selected, images, options)
    keep = wanted if options.allow_burned_in else wanted & ~images.burned_in
    problems = {
        *_about_asked((*files.problems, *numbered.problems, *drawn.problems), aliases, options),
        *scanned.problems,
        *_about_kept(hygiene, copies, images.table, keep),
        *selected.problems,
        *_without_annotation(images, wanted),
        *_quarantined(images, wanted & ~keep),
    }
    problems |= set(_unchosen_files(drawn, selected, problems))
    if not keep.any():
        raise _nothing_left(f"{root}: {_counted(files, images, annotations, options)}", problems)
    slices, table = _only(images.table, selected, keep)
    return Cohort(
        root=str(root.resolve()),
        source=_source_name(images.numbered[keep]),
        include_unannotated=options.include_unannotated,
        structures=selected.names,
        nested=_nested(table),
        slices=_split(slices, table, options),
        annotations=table,
        headers={name: column.take(keep) for name, column in images.headers.items()},
        spelled=selected.spelled,
        unmatched=selected.unmatched,
        scanned_with=_said(options),
        found_by=selected.found_by,
        problems=tuple(sorted(problems, key=lambda p: (p.path, p.reason, p.detail))),
        marks=_marks_asked_for(drawn.marks, selected.unmatched).on_slices(keep),
    )


def _check_options(options: ScanOptions) -> Aliases:
    """Refuse before anything is read what would be refused after it; the table of aliases."""
    _sources(options.source)
    if options.split:
        check_fractions(options.split)
    return read_aliases(options.aliases) if options.aliases else {}


def _said(options: ScanOptions) -> tuple[str, ...]:
    """The options that decide what is in a cohort, without paths."""
    return tuple(
        f"{field.name} {json.dumps(getattr(options, field.name))}"
        for field in fields(options)
        if field.name not in _NOT_SAID
    )


# --- files ---------------------------------------------------------------------------------------


def _list_files(root: Path, options: ScanOptions) -> _Files:
    """Find the files of a data directory and who is to read them."""
    real_root = check_directory(root)
    sources = _sources(options.source)
    numbered_only = options.source == sunnybrook.name
    if numbered_only or (
        options.source == ANY and sunnybrook.is_cohort(scan_folder(real_root, ""), options)
    ):
        listing = sunnybrook.list_files(root, options)
        return _Files([listing], [], [], sources, listing.problems)
    folders = list(walk(real_root, ""))
    listings = sunnybrook.find_cohorts(root, folders, options) if options.source == ANY else []
    claimed = frozenset().union(*(listing.claimed for listing in listings))
    tree = list_tree(real_root, folders, claimed)
    told = (problem for listing in listings for problem in listing.problems)
    return _Files(listings, tree.paths, tree.foreign, sources, (*tree.problems, *told))


def _sources(name: str) -> Mapping[str, Source]:
    """The sources that `--source` lets look for annotations in a tree of DICOM files."""
    if name in (ANY, TREE):
        return SOURCES
    if name == sunnybrook.name:
        return {}
    if name not in SOURCES:
        there = ", ".join((ANY, TREE, sunnybrook.name, *SOURCES))
        raise ConfigurationError(f"source {name!r} is unknown; there are: {there}")
    return {name: SOURCES[name]}


def _read_headers(
    root: Path,
    files: _Files,
    options: ScanOptions,
    progress: Callable[[Progress], None] | None,
) -> Scanned:
    """The headers of all files, those of the listings first."""

    def scan(block: tuple[list[str], list[str] | None]) -> Scanned:
        with applied(options.limits):
            return scan_headers(root, *block)

    blocks = list(_blocks(files))
    total = sum(len(paths) for paths, _ in blocks)
    done = 0
    parts: list[Scanned] = []
    with ThreadPoolExecutor(options.workers or os.cpu_count() or 1) as pool:
        for block, part in zip(blocks, pool.map(scan, blocks), strict=True):
            parts.append(part)
            done += len(block[0])
            if progress:
                progress(Progress("scan", done, total))
    return Scanned(
        slices=SliceTable.concatenate([part.slices for part in parts]),
        headers=concatenate_headers([(part.headers, len(part.slices)) for part in parts]),
        files=tuple(file for part in parts for file in part.files),
        problems=[problem for part in parts for problem in part.problems],
    )


def _blocks(files: _Files) -> Iterator[tuple[list[str], list[str] | None]]:
    """Paths of one call, and their patients where a table names them; at least one call."""
    paths = files.numbered_paths
    patients = [name for listing in files.listings for name in listing.image_patients]
    for start in range(0, len(paths), _FILES_PER_CALL):
        stop = start + _FILES_PER_CALL
        yield paths[start:stop], patients[start:stop]
    for start in range(0, len(files.paths) or not paths, _FILES_PER_CALL):
        yield files.paths[start : start + _FILES_PER_CALL], None


# --- images --------------------------------------------------------------------------------------


def _in_order(scanned: Scanned, files: _Files) -> tuple[_Images, SliceTable, tuple[Problem, ...]]:
    """The images sorted into volumes, copies that are left out, what is odd about their series."""
    numbered = _is_in(scanned.slices.path, files.numbered_paths)
    own = np.where(numbered, b"", scanned.slices.patient_id)
    table = replace(scanned.slices, patient_id=_named_patients(scanned.slices))
    ordered = order_volumes(table)
    index = ordered.index
    images = _Images(
        table=replace(table.take(index), volume=ordered.volume),
        headers={name: column.take(index) for name, column in scanned.headers.items()},
        own_patient_id=own[index],
        localizer=ordered.localizer,
        numbered=numbered[index],
        burned_in=_may_name_somebody(scanned)[index],
    )
    left_out = np.ones(len(table), np.bool_)
    left_out[index] = False
    return images, table.take(left_out), ordered.problems


def _may_name_somebody(scanned: Scanned) -> NDArray[np.bool_]:
    """(n,) whether an image has names in its pixels by its own word, or may have by its kind.

    Secondary captures count whatever they say of themselves: it is the program that took the
    picture of a screen who says it.
    """
    burned_in = is_secondary_capture(scanned.slices.sop_class_uid)
    if column := scanned.headers.get("BurnedInAnnotation"):
        burned_in |= np.char.startswith(np.char.upper(column.values), b"YES")[column.code]
    return burned_in


def _is_in(paths: Bytes, wanted: Collection[str]) -> NDArray[np.bool_]:
    """(n,) whether each path is one of `wanted`."""
    known = {os.fsencode(path) for path in wanted}
    return np.array([path in known for path in paths.tolist()], np.bool_)


def _named_patients(table: SliceTable) -> Bytes:
    """(n,) PatientID; without one, studies that share a series; without those, the folder."""
    named: Bytes = np.where(table.patient_id == b"", _linked_studies(table), table.patient_id)
    unnamed = named == b""
    if unnamed.any():
        folders = [path.rpartition(b"/")[0] or b"." for path in table.path[unnamed].tolist()]
        width = max(named.dtype.itemsize, *map(len, folders))
        named = named.astype(f"S{width}")
        named[unnamed] = folders
    return named


def _linked_studies(table: SliceTable) -> Bytes:
    """(n,) StudyInstanceUID; of images without PatientID the least that shared series lead to.

    Some anonymizers give every file of a series a study of its own.
    """
    study, series = table.study_instance_uid, table.series_instance_uid
    mine = np.flatnonzero((table.patient_id == b"") & (study != b"") & (series != b""))
    if not len(mine):
        return study
    names, of_study = np.unique(study[mine], return_inverse=True)
    of_series = np.unique(series[mine], return_inverse=True)[1]
    least = of_study
    for _ in names:  # a chain of studies is no longer than this
        before = least
        for code in (of_series, of_study):
            smallest = np.full(len(mine), len(names))
            np.minimum.at(smallest, code, least)
            least = smallest[code]
        if np.array_equal(least, before):
            break
    linked = study.copy()
    linked[mine] = names[least]
    return linked


def _pair_numbered(scanned: Scanned, files: _Files, images: SliceTable) -> Found:
    """The outlines of the listings on the images in order, each listing by itself.

    Copies that were left out (`scanned.slices`), and DICOM objects that are no images, are none of
    the images that an outline may mean; an image that could not be read still is.
    """
    gone = set(scanned.slices.path.tolist())
    gone |= {os.fsencode(file.path) for file in scanned.files if file.sop_class_uid}
    annotations: list[Annotation] = []
    problems: list[Problem] = []
    for listing in files.listings:
        both = zip(listing.image_paths, listing.image_patients, strict=True)
        left = [(path, patient) for path, patient in both if os.fsencode(path) not in gone]
        listing = replace(  # noqa: PLW2901
            listing,
            image_paths=[path for path, _ in left],
            image_patients=[patient for _, patient in left],
        )
        rows = np.flatnonzero(_is_in(images.path, listing.image_paths))
        found = sunnybrook.pair(listing, images.take(rows), rows)
        annotations += found.annotations
        problems += found.problems
    return Found(tuple(annotations), tuple(problems))


# --- annotations ---------------------------------------------------------------------------------


def _find_annotations(
    root: Path, scanned: Scanned, files: _Files, images: _Images, options: ScanOptions
) -> Found:
    """What the sources of a tree draw on the images, and what nobody knows what to do with.

    Of a listing's images those that are no DICOM at all are rejected: the layout promises images.
    """
    listed = set(files.numbered_paths)
    lost = {file.path for file in scanned.files if not file.sop_class_uid} & listed
    found = find_annotations(
        str(root.resolve()),
        [*(file for file in scanned.files if file.path not in lost), *files.foreign],
        replace(images.table, patient_id=images.own_patient_id),
        files.sources,
        options,
    )
    detail = "not a DICOM file, though it lies where the images are"
    rejected = (Problem(path, Reason.NOT_DICOM, detail) for path in sorted(lost))
    return replace(found, problems=(*found.problems, *rejected))


def _select(
    annotations: Sequence[Annotation], images: int, aliases: Aliases, options: ScanOptions
) -> _Selected:
    """The structures that are asked for, and what is drawn of them.

    Raises
    ------
    ConfigurationError
        A structure is not there.
    """
    chosen = choose(
        annotations, options.structures, aliases, options.case_sensitive, options.several
    )
    table, annotated = annotation_table(annotations, chosen, images)
    taken = [annotations[k] for k in dict.fromkeys(chosen.annotation.tolist())]
    return _Selected(
        names=chosen.names,
        table=table,
        annotated=annotated,
        taken=taken,
        found_by=dict(Counter(one.found_by for one in taken if len(one.slice)).most_common()),
        spelled=_spelled(annotations, chosen),
        unmatched=chosen.unmatched,
        problems=chosen.problems,
    )


def _spelled(annotations: Sequence[Annotation], chosen: Chosen) -> dict[str, tuple[str, ...]]:
    """What the files call each structure."""
    names: dict[str, set[str]] = {name: set() for name in chosen.names}
    pairs = zip(chosen.annotation.tolist(), chosen.structure.tolist(), strict=True)
    for annotation, structure in pairs:
        names[chosen.names[structure]].add(annotations[annotation].name)
    return {name: tuple(sorted(called)) for name, called in names.items()}


def _marks_asked_for(marks: MarkTable, unmatched: Collection[str]) -> MarkTable:
    """Without those of structures that nobody asked for."""
    names = {name.encode("utf-8", "backslashreplace") for name in unmatched}
    return marks.take(np.array([name not in names for name in marks.name.tolist()], np.bool_))


def _is_numbered(annotation: Annotation) -> bool:
    return annotation.kind == sunnybrook.name


def _kept(selected: _Selected, images: _Images, options: ScanOptions) -> NDArray[np.bool_]:
    """(n,) whether an image is converted."""
    keep: NDArray[np.bool_] = selected.annotated != 0
    keep[selected.table.slice] = True
    return keep | ~images.localizer if options.include_unannotated else keep


def _about_asked(
    problems: Sequence[Problem], aliases: Aliases, options: ScanOptions
) -> list[Problem]:
    """Without those about structures that nobody asked for."""
    names = [one.structure or sunnybrook.structure_of(one.path) or "" for one in problems]
    asked = asked_for(set(names) - {""}, options.structures, aliases, options.case_sensitive)
    both = zip(problems, names, strict=True)
    return [one for one, name in both if not name or name in asked]


def _about_kept(
    problems: Sequence[Problem], copies: SliceTable, images: SliceTable, keep: NDArray[np.bool_]
) -> Iterator[Problem]:
    """A rejected copy is harmless where neither its image nor its series is converted."""
    missed: set[bytes] = set()
    if len(copies):
        uids = set(images.series_instance_uid[keep].tolist())
        uids |= set(images.sop_instance_uid[keep].tolist())
        own = zip(
            copies.series_instance_uid.tolist(), copies.sop_instance_uid.tolist(), strict=True
        )
        converted = [not uids.isdisjoint(pair) for pair in own]
        missed = set(copies.path[converted].tolist())
    for one in problems:
        if one.is_rejection and os.fsencode(one.path) not in missed:
            detail = f"{one.detail}; nothing of its series is converted"
            yield replace(one, reason=Reason.REPEATED, detail=detail)
        else:
            yield one


def _unchosen_files(
    drawn: Found, selected: _Selected, problems: Collection[Problem]
) -> list[Problem]:
    """Annotation files that are there for nothing, though nothing is wrong with them."""
    used = {one.path for one in selected.taken if len(one.slice)}
    return unchosen_files(drawn.annotations, used, {problem.path for problem in problems})


def _without_annotation(images: _Images, keep: NDArray[np.bool_]) -> list[Problem]:
    """A line for each series of a tree of which nothing is converted."""
    table = images.table
    series: dict[tuple[bytes, ...], list[int]] = {}
    kept: set[tuple[bytes, ...]] = set()
    names = ("patient_id", "study_instance_uid", "series_instance_uid")
    _, heads, counts = np.unique(table.volume, return_index=True, return_counts=True)
    for head, stop in zip(heads.tolist(), (heads + counts).tolist(), strict=True):
        key = tuple(getattr(table, name)[head] for name in names)
        if not key[-1]:
            key = (*key, table.path[head].rpartition(b"/")[0])
        if keep[head:stop].any():
            kept.add(key)
        elif not (images.numbered[head] or images.localizer[head]):
            series.setdefault(key, []).extend(range(head, stop))
    return [_lonely(table, rows) for key, rows in series.items() if key not in kept]


def _quarantined(images: _Images, left_out: NDArray[np.bool_]) -> Iterator[Problem]:
    """One line for each file that would be converted but for what may be in its pixels."""
    table = images.table
    captured = is_secondary_capture(table.sop_class_uid)
    of_path = {bytes(table.path[row]): row for row in np.flatnonzero(left_out).tolist()}
    for path, row in of_path.items():
        why = (
            "a secondary capture (0008,0016)"
            if captured[row]
            else "(0028,0301) Burned In Annotation is YES"
        )
        detail = f"{why}: its pixels may name the patient; --allow-burned-in takes it"
        yield Problem(os.fsdecode(path), Reason.BURNED_IN_ANNOTATION, detail)


def _lonely(table: SliceTable, rows: Sequence[int]) -> Problem:
    first = rows[0]
    modality = cleaned(bytes(table.modality[first]), "CS").decode()
    detail = (
        f"{len(rows)} {modality} image(s) of {table.rows[first]} x {table.columns[first]} in the "
        "series, none of them with an annotation that is asked for"
    )
    path = os.fsdecode(min(table.path[rows].tolist()))
    return Problem(path, Reason.IMAGES_WITHOUT_ANNOTATION, detail)


# --- what is left --------------------------------------------------------------------------------


def _only(
    table: SliceTable, selected: _Selected, keep: NDArray[np.bool_]
) -> tuple[SliceTable, AnnotationTable]:
    """The images that are converted, their volumes numbered from 0, and what is drawn on them."""
    _, volume = np.unique(table.volume[keep], return_inverse=True)
    slices = replace(
        table.take(keep),
        volume=volume.reshape(-1).astype(np.int32),
        annotated=selected.annotated[keep],
    )
    place = np.cumsum(keep) - 1
    drawn = selected.table.take(keep[selected.table.slice])
    return slices, replace(drawn, slice=place[drawn.slice])


def _nested(table: AnnotationTable) -> tuple[tuple[int, int], ...]:
    """Structures of the numbered outlines of which one must lie in another."""
    mine = np.flatnonzero(table.kind == sunnybrook.name.encode())
    paths = [os.fsdecode(path) for path in table.path[mine].tolist()]
    bits = dict(zip(map(sunnybrook.structure_of, paths), table.structure[mine].tolist()))  # noqa: B905
    pairs = ((bits.get(inner), bits.get(outer)) for inner, outer in sunnybrook.NESTED)
    found = {(i, o) for i, o in pairs if i is not None and o is not None and i != o}
    return tuple(sorted(found))


def _split(slices: SliceTable, table: AnnotationTable, options: ScanOptions) -> SliceTable:
    """Each patient in one part, where a split is asked for."""
    if not options.split:
        return slices
    strata = None
    if options.stratify:
        strata = slices.annotated.copy()
        np.bitwise_or.at(strata, table.slice, np.uint64(1) << table.structure.astype(np.uint64))
    parts = split_patients(slices.patient_id, options.split, options.seed, strata)
    return replace(slices, split=parts)


def _source_name(numbered: NDArray[np.bool_]) -> str:
    """What the images came as."""
    parts = ((sunnybrook.name, numbered.any()), (TREE, not numbered.all()))
    return "+".join(name for name, there in parts if there)


def _counted(
    files: _Files, images: _Images, annotations: Sequence[Annotation], options: ScanOptions
) -> str:
    """That nothing is left, and of how much."""
    if not len(images.table):
        possible = len(files.numbered_paths) + len(files.paths)
        return f"no image was found in {possible} file(s) that may be one"
    series = len(np.unique(images.table.series_instance_uid))
    what = (
        f"nothing to convert among {len(images.table)} image(s) in {series} series and "
        f"{len(annotations)} annotation(s)"
    )
    hint = "; --include-unannotated takes images without annotation, with empty masks"
    return what if options.include_unannotated else what + hint


def _nothing_left(message: str, problems: Collection[Problem]) -> LayoutError:
    """Nothing to convert, and what stood in the way: rejections before what is harmless."""
    first = sorted(problems, key=lambda p: (not p.is_rejection, p.path, p.detail))
    named = [f"{problem.path}: {problem.detail}" for problem in first[:NAMED_PROBLEMS]]
    if not named:
        return LayoutError(message)
    more = [f"and {len(first) - len(named)} more"] if len(first) > len(named) else []
    return LayoutError(f"{message}; {len(first)} problem(s): {'; '.join([*named, *more])}")
