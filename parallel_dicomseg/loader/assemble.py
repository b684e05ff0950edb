"""From the numbers of samples to a piece of a batch: read, cut, augment, tell the mask."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from parallel_dicomseg.loader.order import UInt64
from parallel_dicomseg.loader.readers import Chunks, Clock, Rows, Scratch
from parallel_dicomseg.loader.samples import (
    Form,
    MaskCode,
    Patch,
    Sample,
    Volumes,
    corner_of,
    depth_of,
    slices_of,
)
from parallel_dicomseg.loader.windows import map_into, store_into
from parallel_dicomseg.records import Float64, Int64

if TYPE_CHECKING:
    from parallel_dicomseg.loader.augment import Plan


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that decides what a sample looks like."""

    path: Path
    images: Rows
    masks: Rows
    sample: Sample
    volumes: Volumes | None
    form: Form
    code: MaskCode
    plan: Plan
    maps: Float64 | None
    """(n, 4) low, high, scale and offset of each slice; None: stored values."""
    image_dtype: np.dtype[Any]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Axes of one sample's image."""
        return self.form.image

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Axes of one sample's mask."""
        return self.form.mask(self.code)

    @property
    def _is_whole(self) -> bool:
        """Slices are served as they are: neither cut nor augmented."""
        return self.plan.is_empty and not isinstance(self.sample, Patch)

    def fill(
        self,
        rows: Int64,
        seeds: UInt64,
        image: NDArray[Any],
        mask: NDArray[Any],
        scratch: Scratch,
        clock: Clock,
    ) -> None:
        """Make samples.

        Parameters
        ----------
        rows, seeds
            (m,) slices that they are about, and their seeds.
        image, mask
            (m, …) places in the batch, C-contiguous, filled.
        scratch, clock
            Of the calling thread.

        Raises
        ------
        LayoutError
            A slice cannot be read; the message names file and slice.
        """
        if self._is_whole:
            slices = slices_of(self.sample, rows, seeds, self.volumes)
            self._fill_images(rows, slices, image, scratch, clock)
            self._fill_masks(rows, mask, scratch, clock)
        else:
            self._fill_augmented(rows, seeds, image, mask, scratch, clock)

    def _fill_images(
        self,
        rows: Int64,
        slices: Int64,
        image: NDArray[Any],
        scratch: Scratch,
        clock: Clock,
    ) -> None:
        """Images of whole slices (m, k), at once as the batch wants them if that is possible."""
        maps = None if self.maps is None else self.maps[rows]
        own = self.images.dtype == image.dtype and maps is None
        if self.form.is_stored_order and not own and image.dtype == np.float32:
            flat = image.reshape(slices.size, -1)
            each = maps if maps is None else np.repeat(maps, slices.shape[1], axis=0)
            asked = (slices.reshape(-1), each, flat)
            if _chunks_did(self.images, "read_mapped", asked, scratch, clock):
                return
        is_direct = self.form.is_stored_order and own
        images = self._read(
            self.images, slices, image if is_direct else None, scratch, clock, "image"
        )
        start = time.perf_counter()
        self._convert(rows, images, image)
        clock.augment += time.perf_counter() - start

    def _fill_masks(self, rows: Int64, mask: NDArray[Any], scratch: Scratch, clock: Clock) -> None:
        """Masks of whole slices, at once as the batch wants them if that is possible."""
        code = self.code
        told = self.form.mask_channels(mask, code)
        if not code.is_copy and self._masks_at_once(rows, told, scratch, clock):
            return
        out = mask if code.is_copy else None
        masks = self._read(self.masks, rows[:, None], out, scratch, clock, "mask")
        start = time.perf_counter()
        if not np.may_share_memory(masks, mask):
            code.write(masks, told)
        clock.augment += time.perf_counter() - start

    def _masks_at_once(
        self, rows: Int64, told: NDArray[Any], scratch: Scratch, clock: Clock
    ) -> bool:
        """Whether masks could be read into `told`, (s, m, …) for channels and else (m, …)."""
        if self.code.masks == "channels":
            # (m, s, count): which of these axes is the last one in memory does not matter
            planes = np.moveaxis(told.reshape(*told.shape[:2], -1), 0, 1)
            bits = np.array(self.code.bits, np.int64)
            return _chunks_did(self.masks, "read_channels", (rows, bits, planes), scratch, clock)
        if self.code.table is None:
            return False
        asked = (rows, self.code.table, told.reshape(len(rows), -1))
        return _chunks_did(self.masks, "read_recoded", asked, scratch, clock)

    def _fill_augmented(
        self,
        rows: Int64,
        seeds: UInt64,
        image: NDArray[Any],
        mask: NDArray[Any],
        scratch: Scratch,
        clock: Clock,
    ) -> None:
        """Samples that are cut or augmented."""
        slices = slices_of(self.sample, rows, seeds, self.volumes)
        mask_slices = slices if isinstance(self.sample, Patch) else rows[:, None]
        images = self._read(self.images, slices, None, scratch, clock, "image")
        masks = self._read(self.masks, mask_slices, None, scratch, clock, "mask")
        start = time.perf_counter()
        moved = self._augment(rows, seeds, slices, images, masks, image, scratch)
        self.code.write(moved, self.form.mask_channels(mask, self.code))
        clock.augment += time.perf_counter() - start

    def _read(
        self,
        source: Rows,
        slices: Int64,
        out: NDArray[Any] | None,
        scratch: Scratch,
        clock: Clock,
        name: str,
    ) -> NDArray[Any]:
        """Slices (m, k) as (m, k, rows, columns[, samples]), in `out` where that can hold them."""
        one = source.shape[1:]
        if out is None or out.dtype != source.dtype:
            room = scratch.array(name, (slices.size, *one), source.dtype)
        else:
            room = out.reshape(slices.size, *one)
        source.read(slices.reshape(-1), room, scratch, clock)
        return room.reshape(*slices.shape, *one)

    def _convert(self, rows: Int64, images: NDArray[Any], image: NDArray[Any]) -> None:
        """Whole slices to the batch's type and axes."""
        if np.may_share_memory(images, image):
            return
        target = self.form.by_slice(image)
        source = images.reshape(target.shape)
        if self.maps is None:
            store(source, target)
            return
        for k, row in enumerate(rows.tolist()):
            map_into(source[k], target[k], self.maps[row])

    def _augment(
        self,
        rows: Int64,
        seeds: UInt64,
        slices: Int64,
        images: NDArray[Any],
        masks: NDArray[Any],
        image: NDArray[Any],
        scratch: Scratch,
    ) -> NDArray[Any]:
        """Cut and augment; the masks as the file tells them, (m, k, rows, columns)."""
        from parallel_dicomseg.loader.augment import augment_into

        form = self.form
        size = (form.rows, form.columns)
        moved = scratch.array("moved mask", (*masks.shape[:2], *size), masks.dtype)
        target = form.by_slice(image)
        for k, (row, seed) in enumerate(zip(rows.tolist(), seeds.tolist(), strict=True)):
            picture, told = images[k], masks[k]
            if isinstance(self.sample, Patch):
                own = told[int(np.argmax(slices[k] == row))] & told.dtype.type(self.code.chosen)
                r, c = corner_of(self.sample, seed, told.shape[-2:], own)
                height, width = self.sample.shape[-2:]
                picture = picture[:, r : r + height, c : c + width]
                told = told[:, r : r + height, c : c + width]
            source, planes = _planes(picture), _target_planes(target[k], form)
            intensity = None if self.maps is None else self.maps[row]
            if self.plan.is_empty and intensity is None:
                store(source, planes)
                np.copyto(moved[k], told)
            else:
                try:
                    augment_into(source, told, planes, moved[k], seed, self.plan, intensity)
                except Exception as error:
                    error.add_note(f"while slice {row} of {self.path} was augmented")
                    raise
            if not np.may_share_memory(planes, image):
                by_slice = planes.reshape(form.depth, form.samples, *size)
                store(by_slice.transpose(0, 2, 3, 1), target[k])
        return moved


def _chunks_did(
    source: Rows, name: str, asked: tuple[Any, ...], scratch: Scratch, clock: Clock
) -> bool:
    """Whether the source could read and convert at once; files of others never can."""
    return isinstance(source, Chunks) and bool(getattr(source, name)(*asked, scratch, clock))


def _planes(picture: NDArray[Any]) -> NDArray[Any]:
    """(depth, rows, columns[, samples]) as (depth x samples, rows, columns)."""
    by_plane = picture if picture.ndim == 3 else picture.transpose(0, 3, 1, 2)
    planes: NDArray[Any] = by_plane.reshape(-1, *picture.shape[1:3])
    return planes


def _target_planes(target: NDArray[Any], form: Form) -> NDArray[Any]:
    """(depth, rows, columns, samples) of a batch as planes, a view if that is possible."""
    if form.samples == 1:
        return target[..., 0]
    if form.depth == 1:
        only: NDArray[Any] = target[0]
        return only.transpose(2, 0, 1)
    return np.empty((form.depth * form.samples, form.rows, form.columns), target.dtype)


def store(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Convert to the batch's type; what an integer type cannot hold becomes its nearest."""
    if out.dtype.kind in "iu" and values.dtype.kind in "iu":
        if not np.can_cast(values.dtype, out.dtype):
            limits, own = np.iinfo(out.dtype), np.iinfo(values.dtype)
            values = values.clip(max(limits.min, own.min), min(limits.max, own.max))
        np.copyto(out, values, casting="unsafe")
        return
    store_into(values, out)


def is_deep(sample: Sample) -> bool:
    """Whether a sample has more slices than its own, so that volumes must be known."""
    return depth_of(sample) > 1
