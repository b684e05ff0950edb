"""An update: which slices of a plan an existing output holds already, and their chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from parallel_dicomseg.deidentify import Policy, conceal_paths
from parallel_dicomseg.fingerprint import OF_ALL_SLICES, plan_fingerprint, slice_sources
from parallel_dicomseg.plan import Plan
from parallel_dicomseg.records import (
    ConvertOptions,
    EncodedChunk,
    Int64,
    Problem,
    Reason,
    Update,
)
from parallel_dicomseg.store import Comparison, Earlier, Sources, differences, sources_key

Span = tuple[int, int, bool]
"""First slice, the one after the last, and whether they are taken over."""


@dataclass(frozen=True, slots=True)
class OpenUpdate:
    """What a conversion takes over; nothing where it is no update."""

    plan: Plan
    sources: Sources | None = None
    """To be kept beside the output, for the next update."""
    earlier: Earlier | None = None
    comparison: Comparison | None = None
    reason: str = ""
    """Why nothing can be taken over, or ''."""

    def spans(self, first: int) -> list[Span]:
        """The slices from `first` on, in runs that are taken over or not."""
        n = self.plan.layout.slices
        if self.comparison is None:
            return [(first, n, False)] if first < n else []
        taken = self.comparison.earlier[first:] >= 0
        edges = np.flatnonzero(np.diff(taken)) + 1
        bounds = (first + np.concatenate([[0], edges, [n - first]])).tolist()
        runs = pairwise(bounds)
        return [(a, b, bool(taken[a - first])) for a, b in runs if a < b]

    def chunks(self, start: int, end: int) -> Iterator[EncodedChunk]:
        """Slices that are taken over, as if they had been encoded."""
        if self.earlier is None or self.comparison is None:
            return
        step = self.plan.slices_per_task
        for first in range(start, end, step):
            rows = self.comparison.earlier[first : min(first + step, end)]
            yield self.earlier.chunk(first, rows)

    def told(self, identity: Policy) -> Update | None:
        """What was found, for the summary; None where it is no update."""
        if self.sources is None:
            return None
        found = self.comparison
        if found is None or self.earlier is None:
            return Update(0, self.plan.layout.slices, (), {}, self.reason)
        return Update(
            unchanged=int(np.count_nonzero(found.earlier >= 0)),
            added=found.added,
            changed=self._paths(found.changed, identity),
            vanished=self.earlier.patients_of(found.vanished),
            reason=self.reason,
        )

    def _paths(self, rows: Int64, identity: Policy) -> tuple[str, ...]:
        """Of the files of some slices, as the output would name them."""
        files = np.unique(self.plan.cohort.slices.path[rows])
        named = [
            Problem(p.decode(errors="surrogateescape"), Reason.FILE_CHANGED, "") for p in files
        ]
        return tuple(problem.path for problem in conceal_paths(named, (), identity))


@contextmanager
def open_update(output: Path, plan: Plan, options: ConvertOptions) -> Iterator[OpenUpdate]:
    """Compare a plan with an existing output, where that is asked for."""
    if not options.update:
        yield OpenUpdate(plan)
        return
    key = sources_key(output)
    by_content = options.compare == "content"
    sources = Sources(slice_sources(plan, key, by_content=by_content), key)
    earlier = Earlier.of(output)
    if earlier is None:
        reason = "it was made without --update" if output.exists() else ""
        yield OpenUpdate(plan, sources, reason=reason)
        return
    different = differences(
        *(
            {name: part for name, part in fingerprint.items() if name not in OF_ALL_SLICES}
            for fingerprint in (earlier.plan, plan_fingerprint(plan, options))
        )
    )
    with earlier:
        comparison = earlier.compare(sources.digests, same_plan=not different)
        yield OpenUpdate(plan, sources, earlier, comparison, "; ".join(different))
