"""Who reads annotations: the sources of this package and those that other packages add.

A package adds a source by an entry point in the group "parallel_dicomseg.sources"; docs/sources.md
shows how. Nothing is imported before somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.sources.base import Reader, Source

GROUP = "parallel_dicomseg.sources"

# What every source must have; see `Source`.
_METHODS = ("recognizes", "find", "read")


class _Sources(Mapping[str, Source]):
    """All sources by name, loaded when they are first looked at."""

    def __getitem__(self, name: str) -> Source:
        return _load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_load())

    def __len__(self) -> int:
        return len(_load())


#: Every source of annotations in a tree of DICOM files, by name: those of this package, then the
#: added ones in the order of their names. Looking at it raises ConfigurationError where an added
#: one cannot be loaded, or is none.
SOURCES: Mapping[str, Source] = _Sources()


def readers() -> dict[str, Reader]:
    """Whoever reads the annotations of a task, by their `kind`: SOURCES and sunnybrook.

    Raises
    ------
    ConfigurationError
        Where an added source cannot be loaded, or is none.
    """
    from parallel_dicomseg.sources import sunnybrook

    return {**_load(), sunnybrook.name: sunnybrook}


@cache
def _load() -> dict[str, Source]:
    from parallel_dicomseg.sources import lidc, rtstruct, seg, sunnybrook

    built_in: tuple[Source, ...] = (rtstruct, seg, lidc)
    found = {source.name: source for source in built_in}
    # the same package may lie on the path twice
    for entry in sorted(set(entry_points(group=GROUP))):
        if entry.name in found or entry.name == sunnybrook.name:
            raise ConfigurationError(f"{_describe(entry)}: there is a source of this name already")
        found[entry.name] = _load_entry(entry)
    return found


def _describe(entry: EntryPoint) -> str:
    package = f" of the package {entry.dist.name}" if entry.dist else ""
    return f"source {entry.name!r} ({entry.value}){package}"


def _load_entry(entry: EntryPoint) -> Source:
    """The object that an entry point names, if it is a source."""
    try:
        loaded = entry.load()
    except Exception as error:
        kind = type(error).__name__
        raise ConfigurationError(f"{_describe(entry)} cannot be loaded: {kind}: {error}") from error
    missing = [method for method in _METHODS if not callable(getattr(loaded, method, None))]
    if isinstance(loaded, type):
        raise ConfigurationError(f"{_describe(entry)} is a class; name an instance, or a module")
    if missing:
        raise ConfigurationError(f"{_describe(entry)} has no function {', '.join(missing)}")
    if getattr(loaded, "name", None) != entry.name:
        raise ConfigurationError(
            f"{_describe(entry)} must have the attribute name = {entry.name!r}"
        )
    return cast(Source, loaded)
