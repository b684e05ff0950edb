"""A folder of exported files that appears under its name only when it is whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parallel_dicomseg.errors import ConfigurationError, ConversionError
from parallel_dicomseg.export.volumes import Note
from parallel_dicomseg.private import make_private

#: The report lies in every exported folder, and tells that a folder is one.
REPORT = "export.json"
_FORMAT = "parallel_dicomseg export"


@dataclass(frozen=True, slots=True)
class ExportedCase:
    """One volume as files, which are named relative to the exported folder."""

    name: str
    volume: int
    """Row of /volumes in the converted file."""
    slices: int
    part: str
    """'train', 'validation' or 'test'; '' without a split."""
    images: tuple[str, ...]
    masks: dict[str, str]
    """File of each structure that the volume has; one label map stands there several times."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and what the files cannot say."""

    directory: str
    cases: tuple[ExportedCase, ...]
    notes: tuple[Note, ...]
    labels: dict[str, Any]
    """Values of the structures in label maps; empty without label maps."""

    @property
    def files(self) -> tuple[str, ...]:
        """Image, mask and label files, relative to `directory`, each once."""
        every = (name for case in self.cases for name in (*case.images, *case.masks.values()))
        return tuple(dict.fromkeys(every))


def check_folder(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that an export must not or cannot become.

    Raises
    ------
    ConfigurationError
        Its parent is missing, it is a file, or it holds something: with `overwrite` an earlier
        export is replaced, anything else never.
    """
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target.parent}: no such directory for the export {target.name}")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigurationError(f"{target} is a file, the export is a directory")
    if next(target.iterdir(), None) is None:
        return
    if not _is_export(target):
        raise ConfigurationError(f"{target} holds something else than an export, it is left alone")
    if not overwrite:
        raise ConfigurationError(f"{target} exists; --overwrite replaces it")


def _is_export(target: Path) -> bool:
    try:
        said = json.loads((target / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("format") == _FORMAT


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end; on an error nothing is left of it.

    Raises
    ------
    ConfigurationError
        See `check_folder`.
    ConversionError
        The files cannot be written.
    """
    check_folder(target, overwrite=overwrite)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            partial = Path(scratch, "new")
            partial.mkdir()
            yield partial
            make_private(partial)
            if target.exists():
                target.rename(Path(scratch, "old"))
            partial.rename(target)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConversionError(f"{target} cannot be written: {reason}") from error


def write_report(folder: Path, kind: str, report: ExportReport) -> None:
    """Write export.json; where the folder lies is not in it."""
    said = asdict(report)
    del said["directory"]
    head = {"format": _FORMAT, "kind": kind, "software_version": version("parallel_dicomseg")}
    write_json(folder / REPORT, {**head, **said})


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a newline at its end."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
