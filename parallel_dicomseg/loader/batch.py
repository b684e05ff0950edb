"""What the loader gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from parallel_dicomseg.records import Int64


@dataclass(frozen=True, slots=True)
class Batch:
    """b samples, in the order in which they are served; the caller's to keep and to change.

    With c image channels (1, or 3 of a colour image, times the slices of a `Stack`), s structures
    and `channels="first"`; with `"last"` the axis of channels is the last one.
    """

    image: NDArray[Any]
    """(b, c, rows, columns); of 3-D patches (b, c, slices, rows, columns)."""
    mask: NDArray[Any]
    """`"channels"`: (b, s, …) uint8, 0 or 1; `"labels"`: (b, …) uint8, 0 is background, k + 1 is
    structure k; `"bits"`: (b, …) unsigned, bit k is structure k."""
    index: Int64
    """(b,) rows of the file: the slice, the central one of a stack, the one a patch was put on."""
    epoch: int = 0
    """From 0."""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Columns of the file's table at these rows, (b, …) each, those that were asked for."""
