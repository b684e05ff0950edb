"""Annotation sources: one module each, registered by name."""

from __future__ import annotations

from pathlib import Path

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.sources import sunnybrook
from parallel_dicomseg.sources.base import Listing, Outline, Paired, Source, check_directory

__all__ = ["SOURCES", "Listing", "Outline", "Paired", "Source", "choose_source"]

#: All sources by name; "auto" asks each whether it recognizes the directory.
SOURCES: dict[str, Source] = {source.name: source for source in (sunnybrook,)}


def choose_source(root: Path, name: str = "auto") -> Source:
    """The source of a data directory.

    Parameters
    ----------
    root : Path
        Directory of the cohort.
    name : str
        A registered name, or 'auto'.

    Raises
    ------
    ConfigurationError
        If the name is unknown, or several sources recognize the directory.
    LayoutError
        If the directory is missing or empty, or no source recognizes it.
    """
    check_directory(root)
    if name != "auto":
        if name not in SOURCES:
            raise ConfigurationError(
                f"source {name!r} is unknown; there are: auto, {', '.join(SOURCES)}"
            )
        return SOURCES[name]
    fitting = [source for source in SOURCES.values() if source.recognizes(root)]
    if len(fitting) > 1:
        names = ", ".join(source.name for source in fitting)
        raise ConfigurationError(f"{root}: several sources fit ({names}); choose with --source")
    if not fitting:
        raise LayoutError(
            f"{root}: no known layout of images and outlines; looked for: {', '.join(SOURCES)} "
            "(choose with --source to hear what one of them misses)"
        )
    return fitting[0]
