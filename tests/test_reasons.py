"""The documents say what the records say: every reason code, every limit."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from parallel_dicomseg.records import HARMLESS_REASONS, Limits, Reason

DOCS = Path(__file__).resolve().parents[1] / "docs"


def rows(text: str) -> list[list[str]]:
    """Cells of all rows of tables whose first cell is `code`."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_reason_is_documented_and_nothing_else() -> None:
    """docs/reasons.md has each code once, in order, and says whether it is a rejection."""
    table = rows((DOCS / "reasons.md").read_text(encoding="utf-8"))
    said = [(code.strip("`"), verdict) for code, verdict, _ in table]
    known = [(str(one), "noted" if one in HARMLESS_REASONS else "rejected") for one in Reason]

    assert known == said
    assert len(Reason) <= 25


def number(text: str) -> float:
    """A default as the table spells it."""
    amount, _, unit = text.partition(" ")
    factor = {"": 1, "MiB": 2**20, "GiB": 2**30}[unit]
    return float(amount.replace(",", "")) * factor


def test_every_limit_is_documented_with_its_default() -> None:
    """The table of limits has the record's fields in its order, and their defaults."""
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    names = {field.name for field in fields(Limits)}
    said = {
        cells[0].strip("`"): number(cells[1])
        for cells in rows(text)
        if cells[0].strip("`") in names
    }

    assert {field.name: float(getattr(Limits(), field.name)) for field in fields(Limits)} == said
    assert re.search(r"--limit name=value", text)
