"""Where the time of an epoch went, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import dataclass

# A consumer that waits less than this part of its time would gain nothing.
_HARDLY = 0.05


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of an epoch; those of the threads are added up over the threads."""

    epoch: int
    batches: int
    samples: int
    threads: int
    seconds: float
    """From the first batch that was asked for to the last one that was given."""
    read: float
    """Threads: getting encoded bytes from the file."""
    decode: float
    """Threads: making pixels of them. Without numba and through h5py, part of it is in `read`."""
    augment: float
    """Threads: augmentation, windows, types and channels."""
    blocked: float
    """Threads: waiting for the consumer, with everything ready that may be made ahead."""
    waited: float
    """Consumer: waiting for a batch."""

    @property
    def waiting_share(self) -> float:
        """Part of its time that the consumer waited, 0 to 1."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    @property
    def advice(self) -> str:
        """One line: what would make the next epoch faster."""
        share = f"the consumer waited {self.waiting_share:.0%} of its time"
        if self.waiting_share < _HARDLY:
            return f"the model is the bottleneck: {share}"
        if self.blocked > self.read + self.decode + self.augment:
            return f"larger prefetch: {share}, yet the threads had nothing to do"
        if self.threads < usable_cores():
            return f"more threads: {share}, {self.threads} threads on {usable_cores()} cores"
        most = max(self.read, self.decode, self.augment)
        if most == self.decode:
            return f"raw codec: {share}, mostly for decoding; convert with --codec lz4 or none"
        if most == self.augment:
            return (
                f"less augmentation: {share}, mostly for augmenting and converting "
                f"(image_dtype='stored' and masks='bits' convert nothing)"
            )
        return f"faster disk: {share}, mostly for reading"


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
