"""From the names that annotation files spell to the structures of the output.

The rules are said for users in docs/cohort.md. Pure, but for `read_aliases`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.records import (
    Annotation,
    AnnotationTable,
    Int32,
    Int64,
    Problem,
    Reason,
)
from parallel_dicomseg.volumes import natural_key

#: What to do where several annotations of the same images match one structure.
SEVERAL = ("merge", "first", "separate")
#: A structure without a name is called so.
UNNAMED = "unnamed"

# As many names are listed where a wanted one is not there.
_NAMES_TOLD = 30
_BITS = 64

Aliases = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which annotations are converted, and as what: c pairs of annotation and structure."""

    names: tuple[str, ...]
    """Structures of the output in bit order."""
    annotation: Int64
    """(c,) place in the sequence of annotations; one may be in several structures."""
    structure: Int32
    """(c,) index into `names`."""
    layer: Int32
    """(c,) annotations of one structure that share images have different layers."""
    unmatched: dict[str, int]
    """Names that no structure wants, as spelled most often, with their number of annotations."""
    missing: tuple[str, ...]
    """Structures of the alias table that no annotation matches."""
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Spelled:
    """The names that are there: spelled ones by what they are compared as."""

    key: Callable[[str], str]
    """Of a name; names with equal keys are one."""
    shown: dict[str, str]
    """Key -> as it is spelled most often, in natural order."""
    places: dict[str, list[int]]
    """Key -> annotations."""
    flags: re.RegexFlag


def choose(
    annotations: Sequence[Annotation],
    wanted: tuple[str, ...],
    aliases: Aliases,
    case_sensitive: bool,
    several: str,
) -> Chosen:
    """Decide which structures there are and which annotation is drawn into which.

    Parameters
    ----------
    annotations
        What the sources found; those of one file in the file's order.
    wanted
        Each a name, a name of the alias table, '/regular expression/' for every name that matches
        it entirely, or 'new=' and one of these. Empty: the names of `aliases`, else all names.
    aliases
        Names of structures and what they are called elsewhere (names or '/regular expressions/').
    case_sensitive
        Whether 'Heart' and 'heart' are two names; blanks never matter.
    several
        'merge': annotations of one file that match one structure are united. 'first': the first
        in the file is taken. 'separate': each is a structure of its own, 'name', 'name-2', …
        Where another file has drawn the structure on one of the same images already (in order of
        the paths), an annotation is left out, except with 'separate'.

    Raises
    ------
    ConfigurationError
        A wanted structure is nowhere, an entry is malformed, or `several` is unknown.
    """
    if several not in SEVERAL:
        raise ConfigurationError(f"several: {several!r} is none of {', '.join(SEVERAL)}")
    spelled = _spell([annotation.name for annotation in annotations], case_sensitive)
    groups, missing = _select(spelled, wanted, aliases)
    names: list[str] = []
    pairs: list[tuple[int, int, int]] = []
    problems: list[Problem] = []
    taken = {spelled.key(name) for name in groups}
    for name, keys in groups.items():
        laid, refused = _lay(annotations, [k for key in keys for k in spelled.places[key]], several)
        problems += refused
        base, apart = len(names), several == "separate"
        pairs += [(k, base + depth, 0) if apart else (k, base, depth) for k, depth in laid]
        more = max((depth for _, depth in laid), default=0) if apart else 0
        names += [name, *_numbered(name, more, taken, spelled.key)]
    columns = np.array(pairs, np.int64).reshape(-1, 3).T
    used = {key for keys in groups.values() for key in keys}
    return Chosen(
        names=tuple(names),
        annotation=columns[0],
        structure=columns[1].astype(np.int32),
        layer=columns[2].astype(np.int32),
        unmatched={
            shown: len(spelled.places[key])
            for key, shown in spelled.shown.items()
            if key not in used
        },
        missing=missing,
        problems=tuple(problems),
    )


def asked_for(
    names: Iterable[str], wanted: tuple[str, ...], aliases: Aliases, case_sensitive: bool
) -> frozenset[str]:
    """Those of `names` that `choose` would make a structure of, were they all there."""
    names = frozenset(names)
    if not (wanted or aliases):
        return names
    spelled = _spell(names, case_sensitive)
    keys = {key for item in wanted or aliases for key in _meant(spelled, item, aliases)[2]}
    return frozenset(name for name in names if spelled.key(_clean(name)) in keys)


def annotation_table(
    annotations: Sequence[Annotation], chosen: Chosen, n_slices: int
) -> tuple[AnnotationTable, NDArray[np.uint64]]:
    """The rings and frames of the chosen annotations, and where somebody looked for what.

    Returns
    -------
    The table, sorted by (slice, structure, layer, kind, path, offset), and (n_slices,) uint64 with
    bit s where structure s was looked for. Structures from the 65th on have no bit.
    """
    taken = [annotations[k] for k in chosen.annotation]
    annotated = np.zeros(n_slices, np.uint64)
    for annotation, structure in zip(taken, chosen.structure.tolist(), strict=True):
        if structure < _BITS:
            annotated[annotation.looked_at] |= np.uint64(1 << structure)
    rings = [len(annotation.slice) for annotation in taken]
    kinds, kind = _ranks([os.fsencode(annotation.kind) for annotation in taken], rings)
    paths, path = _ranks([os.fsencode(annotation.path) for annotation in taken], rings)
    structure, layer = np.repeat(chosen.structure, rings), np.repeat(chosen.layer, rings)
    slices, offset, length = (
        np.concatenate([np.zeros(0, np.int64), *columns])
        for columns in (
            [annotation.slice for annotation in taken],
            [annotation.offset for annotation in taken],
            [annotation.length for annotation in taken],
        )
    )
    order = np.lexsort((offset, path, kind, layer, structure, slices))
    table = AnnotationTable(
        slice=slices[order],
        structure=structure[order],
        layer=layer[order],
        kind=kinds[kind[order]],
        path=paths[path[order]],
        offset=offset[order],
        length=length[order],
    )
    return table, annotated


def read_aliases(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a table of structure names from TOML.

    The file has one table `[structures]`, in it one line per structure, such as
    `heart = ["Heart", "coeur", "/hrt.*/"]`.

    Raises
    ------
    ConfigurationError
        The file cannot be read, is no TOML, or an entry is not as above; the entry is named.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not TOML: {error}") from None
    table = content.pop("structures", None)
    if content or not isinstance(table, dict) or not table:
        others = f", but {', '.join(content)}" if content else ""
        raise ConfigurationError(f"{path}: needs one table [structures]{others}")
    return {_clean(name): _read_alias(path, name, names) for name, names in table.items()}


def _read_alias(path: str | Path, name: str, names: object) -> tuple[str, ...]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or not all(isinstance(n, str) and n.strip() for n in listed):
        raise ConfigurationError(f"{path}: structures.{name}: not a list of names: {names!r}")
    for pattern in listed:
        if (expression := _expression(pattern)) is not None:
            _compile(expression, re.NOFLAG, f"{path}: structures.{name}")
    return tuple(listed)


# Names


def _clean(name: str) -> str:
    """One blank between words; NULs, which no text in HDF5 may hold, count as blanks."""
    return " ".join(name.replace("\0", " ").split()) or UNNAMED


def _fold(name: str) -> str:
    return name.casefold()


def _same(name: str) -> str:
    return name


def _spell(names: Iterable[str], case_sensitive: bool) -> _Spelled:
    key = _same if case_sensitive else _fold
    names = [_clean(name) for name in names]
    spellings = Counter(names)
    # The most frequent spelling comes last and stays; of equals the first in natural order.
    by_count = sorted(sorted(spellings, key=natural_key, reverse=True), key=spellings.__getitem__)
    shown = {key(name): name for name in by_count}
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(key(name), []).append(place)
    ordered = dict(sorted(shown.items(), key=lambda pair: natural_key(pair[1])))
    return _Spelled(key, ordered, places, re.NOFLAG if case_sensitive else re.IGNORECASE)


def _select(
    spelled: _Spelled, wanted: tuple[str, ...], aliases: Aliases
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Structures in bit order with the keys of the names they unite, and aliases without any."""
    if wanted:
        return _select_wanted(spelled, wanted, aliases), ()
    if not aliases:
        return {shown: [key] for key, shown in spelled.shown.items()}, ()
    groups = {name: _match_alias(spelled, name, aliases[name]) for name in aliases}
    if spelled.shown and not any(groups.values()):
        raise _nowhere("no structure of the alias table", next(iter(aliases)), spelled)
    return groups, tuple(name for name, keys in groups.items() if not keys)


def _select_wanted(
    spelled: _Spelled, wanted: tuple[str, ...], aliases: Aliases
) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for item in wanted:
        for name, keys in _match(spelled, item, aliases):
            group = groups.setdefault(names.setdefault(spelled.key(name), name), [])
            group.extend(key for key in keys if key not in group)
    return groups


def _match(spelled: _Spelled, item: str, aliases: Aliases) -> Iterator[tuple[str, list[str]]]:
    """The structures that one wanted item asks for, each with keys of names; none is empty."""
    name, pattern, keys = _meant(spelled, item, aliases)
    if not keys:
        raise _nowhere(f"no structure {item!r}", pattern, spelled)
    if name or _expression(pattern) is None:
        yield name or _clean(pattern), keys
    else:
        yield from ((spelled.shown[key], [key]) for key in keys)


def _meant(spelled: _Spelled, item: str, aliases: Aliases) -> tuple[str, str, list[str]]:
    """The structure's name ('': as spelled), what it is given to, and the keys that this means."""
    name, pattern = _parse(spelled, item)
    by_key = {spelled.key(_clean(alias)): alias for alias in aliases}
    alias = by_key.get(spelled.key(_clean(pattern)))
    if alias is None:
        return name, pattern, _match_name(spelled, pattern)
    return name or alias, pattern, _match_alias(spelled, alias, aliases[alias])


def _parse(spelled: _Spelled, item: str) -> tuple[str, str]:
    """The new name ('' for none) and the name or expression that it is given to."""
    if spelled.key(_clean(item)) in spelled.shown or item.startswith("/"):
        return "", item
    new, equals, old = item.partition("=")
    if not equals:
        new, old = "", item
    if not old.strip() or (equals and not new.strip()):
        raise ConfigurationError(f"structure {item!r}: needs a name, or new=old")
    return (_clean(new) if equals else ""), old


def _match_alias(spelled: _Spelled, name: str, patterns: Iterable[str]) -> list[str]:
    """Keys of the names that an entry of the alias table means; its own name always counts."""
    keys = (key for pattern in (name, *patterns) for key in _match_name(spelled, pattern))
    return list(dict.fromkeys(keys))


def _match_name(spelled: _Spelled, pattern: str) -> list[str]:
    """Keys of the names that a name or an expression means, in natural order."""
    expression = _expression(pattern)
    if expression is None:
        key = spelled.key(_clean(pattern))
        return [key] if key in spelled.shown else []
    compiled = _compile(expression, spelled.flags, f"structure {pattern!r}")
    return [key for key, shown in spelled.shown.items() if compiled.fullmatch(shown)]


def _expression(pattern: str) -> str | None:
    """What stands between the slashes, or None for a plain name."""
    stripped = pattern.strip()
    is_one = len(stripped) > 1 and stripped[0] == "/" == stripped[-1]
    return stripped[1:-1] if is_one else None


def _compile(expression: str, flags: re.RegexFlag, where: str) -> re.Pattern[str]:
    try:
        return re.compile(expression, flags)
    except re.error as error:
        message = f"{where}: /{expression}/ is no regular expression: {error}"
        raise ConfigurationError(message) from None


def _nowhere(what: str, name: str, spelled: _Spelled) -> ConfigurationError:
    """What is there instead, the most similar names first."""
    if not spelled.shown:
        return ConfigurationError(f"{what} is there, and nothing else either")
    key = spelled.key(_clean(name))
    close = difflib.get_close_matches(key, spelled.shown, n=_NAMES_TOLD)
    names = [spelled.shown[key] for key in dict.fromkeys([*close, *spelled.shown])]
    more = len(names) - _NAMES_TOLD
    listed = ", ".join(map(repr, names[:_NAMES_TOLD])) + (f" and {more} more" if more > 0 else "")
    return ConfigurationError(f"{what} is there, but: {listed}")


# Annotations that meet on the same images


def _lay(
    annotations: Sequence[Annotation], places: Iterable[int], several: str
) -> tuple[list[tuple[int, int]], list[Problem]]:
    """The annotations of one structure that are taken, each with how many lie under it."""
    by_file = sorted(sorted(places), key=lambda k: os.fsencode(_file(annotations[k])))
    if _never_meet([annotations[k] for k in by_file]):
        return [(place, 0) for place in by_file], []
    images = _Images(1 + max((_last(annotations[k]) for k in by_file), default=-1))
    laid: list[tuple[int, int]] = []
    problems: list[Problem] = []
    for place in by_file:
        annotation = annotations[place]
        if several != "separate" and (problem := images.refuse(annotation, several)):
            problems.append(problem)
        else:
            laid.append((place, images.add(annotation)))
    return laid, problems


def _never_meet(annotations: Sequence[Annotation]) -> bool:
    """Whether each is on one image at most, and no two on the same: outlines file by file."""
    if any(len(one.looked_at) or len(one.slice) > 1 for one in annotations):
        return False
    drawn = [one.slice for one in annotations if len(one.slice)]
    return not drawn or len(np.unique(np.concatenate(drawn))) == len(drawn)


def _numbered(name: str, count: int, taken: set[str], key: Callable[[str], str]) -> Iterator[str]:
    """The first `count` of name-2, name-3, … that are not taken; they are then."""
    numbers = itertools.count(2)
    for _ in range(count):
        free = next(f"{name}-{k}" for k in numbers if key(f"{name}-{k}") not in taken)
        taken.add(key(free))
        yield free


class _Images:
    """Which files have looked at and drawn on which images, for one structure."""

    def __init__(self, n_slices: int) -> None:
        self.files: dict[str, int] = {}
        # The number of the file, from 1; files come one after another.
        self.looked_at_by = np.zeros(n_slices, np.int32)
        self.drawn_by = np.zeros(n_slices, np.int32)
        self.depth = np.zeros(n_slices, np.int32)

    def add(self, annotation: Annotation) -> int:
        """Take an annotation; returns how many others lie under it."""
        file = self.files.setdefault(_file(annotation), len(self.files) + 1)
        self.looked_at_by[annotation.looked_at] = file
        self.drawn_by[annotation.slice] = file
        images = np.concatenate([annotation.looked_at, annotation.slice])
        depth = int(self.depth[images].max(initial=0))
        self.depth[images] = depth + 1
        return depth

    def refuse(self, annotation: Annotation, several: str) -> Problem | None:
        """Why an annotation is left out, or None."""
        file = self.files.get(_file(annotation), 0)
        if file and several == "first" and (self.looked_at_by[annotation.looked_at] == file).any():
            detail = (
                f"{annotation.name!r}: the file has drawn this structure on the same images under "
                "an earlier name; left out"
            )
            return Problem(annotation.path, Reason.REPEATED, detail)
        others = self.drawn_by[annotation.slice]
        met = (others > 0) & (others != file)
        if met.any():
            drawn, count = np.unique(annotation.slice), len(np.unique(annotation.slice[met]))
            detail = (
                f"{annotation.name!r} is drawn on {len(drawn)} images, on {count} of which an "
                "earlier file has drawn this structure already; left out"
            )
            return Problem(annotation.path, Reason.DUPLICATE, detail)
        return None


def _file(annotation: Annotation) -> str:
    """What annotations of one file, or of files that count as one, have in common."""
    return annotation.file_set or annotation.path


def _last(annotation: Annotation) -> int:
    """The last image that an annotation knows; -1 for none."""
    return max(
        (int(rows.max()) for rows in (annotation.looked_at, annotation.slice) if len(rows)),
        default=-1,
    )


def _ranks(texts: list[bytes], repeats: list[int]) -> tuple[NDArray[np.bytes_], Int64]:
    """The different texts in order, and the place of each of the repeated texts among them."""
    values, code = np.unique(np.array(texts, np.bytes_), return_inverse=True)
    return values, np.repeat(code, repeats)
