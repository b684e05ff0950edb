"""How the benchmarks print: a table for people, or one JSON object per line for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Figures = dict[str, Any]
Emit = Callable[[Figures], None]
Columns = Mapping[str, Sequence[tuple[str, str]]]
"""By what is measured: headings, and formats that name the figures."""


class Table:
    """Prints figures as they come, with a heading where another kind begins."""

    def __init__(self, columns: Columns, name_width: int, width: int) -> None:
        self._columns = columns
        self._name_width = name_width
        self._width = width
        self._kind = ""

    def __call__(self, figures: Figures) -> None:
        """Print one line; '-' for a figure that is None."""
        columns = self._columns[figures["measures"]]
        if figures["measures"] != self._kind:
            self._kind = figures["measures"]
            self._print(f"\n{self._kind}", [title for title, _ in columns], 1)
        self._print(figures["case"], [self._text(text, figures) for _, text in columns], 0)

    def _text(self, text: str, figures: Figures) -> str:
        try:
            return text.format(**figures)
        except TypeError:
            return "-"

    def _print(self, name: str, values: Sequence[str], extra: int) -> None:
        cells = "".join(f"{value:>{self._width}}" for value in values)
        print(f"{name:{self._name_width + extra}}{cells}", flush=True)


def emitter(
    benchmark: str, columns: Columns, *, as_json: bool, name_width: int, width: int
) -> Emit:
    """The way to print that the command line asks for."""
    if not as_json:
        return Table(columns, name_width, width)
    common = {"benchmark": benchmark, "cpus": os.cpu_count()}
    return lambda figures: print(json.dumps({**common, **figures}), flush=True)
