"""BatchLoader: batches, order, state, splits, endings; everything that a user sees."""

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

import h5py
import numpy as np
import pytest
import written

from parallel_dicomseg.errors import ConfigurationError, LayoutError
from parallel_dicomseg.loader import (
    BatchLoader,
    ForegroundBalanced,
    Patch,
    PatientBalanced,
    Stack,
    Timings,
    iterate_batches,
    readers,
)
from parallel_dicomseg.loader.windows import MinMax, Percentiles, ZScore
from parallel_dicomseg.store import mirror_to_zarr, open_dataset

IMAGES, MASKS = written.pictures(10)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A converted file of ten slices in three volumes."""
    path = tmp_path_factory.mktemp("loader") / "a.h5"
    written.write(path)
    return path


def contents(batches):
    """Batches as bytes, to compare."""
    return [
        (b.epoch, b.index.tolist(), b.image.shape, b.image.tobytes(), b.mask.tobytes())
        for b in batches
    ]


def served(loader):
    """Rows of one pass."""
    return [row for batch in loader for row in batch.index.tolist()]


# --- what a batch holds --------------------------------------------------------------------------


def test_batches_hold_what_the_file_holds(file):
    """Images and masks of the rows that the batch names, each row once, the last batch smaller."""
    with BatchLoader(file, 4) as loader:
        batches = list(loader)
        assert len(loader) == 3
    rows = np.concatenate([batch.index for batch in batches])

    assert [len(batch.index) for batch in batches] == [4, 4, 2]
    assert list(range(10)) == sorted(rows.tolist())
    for batch in batches:
        assert (np.float32, np.uint8) == (batch.image.dtype, batch.mask.dtype)
        assert (IMAGES[batch.index][:, None] == batch.image).all()
        assert (MASKS[batch.index] & 1 == batch.mask[:, 0]).all()
        assert (MASKS[batch.index] >> 1 == batch.mask[:, 1]).all()


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("masks", ["channels", "labels", "bits"])
@pytest.mark.parametrize("sample", ["slice", Stack(3), Patch((3, 16, 20)), Patch((16, 20))])
def test_axes_are_as_promised(file, channels, masks, sample):
    """Every way to ask for axes gives the declared shapes, and the same pixels."""
    options = {"sample": sample, "masks": masks, "image_dtype": "stored", "seed": 3}
    with (
        BatchLoader(file, 4, channels=channels, **options) as loader,
        BatchLoader(file, 4, **options) as first,
    ):
        batch, expected = next(iter(loader)), next(iter(first))
        assert (4, *loader.image_shape) == batch.image.shape
        assert (4, *loader.mask_shape) == batch.mask.shape
        assert (loader.image_dtype, loader.mask_dtype) == (batch.image.dtype, batch.mask.dtype)
    axis = 1 if channels == "first" else -1
    assert (expected.image == np.moveaxis(batch.image, axis, 1)).all()
    if masks == "channels":
        assert (expected.mask == np.moveaxis(batch.mask, axis, 1)).all()
    else:
        assert (expected.mask == batch.mask).all()


@pytest.mark.parametrize("codec", ["deflate", "lz4", "zstd", "none"])
@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize(
    ("samples", "options"),
    [
        (1, {"masks": "channels"}),
        (1, {"masks": "channels", "structures": ["o"], "window": (100, 700)}),
        (1, {"masks": "labels", "sample": Stack(3), "normalize": ZScore()}),
        (1, {"masks": "bits", "structures": ["o", "i"], "image_dtype": "stored"}),
        (1, {"masks": "bits", "image_dtype": "float64", "normalize": MinMax("volume")}),
        (1, {"masks": "labels", "image_dtype": "uint8", "sample": Patch((16, 20))}),
        (3, {"masks": "channels", "sample": Stack(3), "window": (100, 700)}),
    ],
)
def test_kernels_and_packages_make_the_same_batches(
    tmp_path, codec, channels, samples, options, monkeypatch
):
    """Whatever is asked for, the fast way and the plain one agree bit for bit."""
    path = tmp_path / "a.h5"
    written.write(path, plan=written.layout(codec=codec, samples=samples))
    with BatchLoader(path, 4, channels=channels, **options) as loader:
        fast = contents(loader)
    monkeypatch.setattr(readers, "_kernels", lambda: None)
    with BatchLoader(path, 4, channels=channels, **options) as loader:
        plain = contents(loader)

    assert plain == fast


def test_stacks_are_slices_of_the_file(file):
    """A channel per neighbour, ends repeated, the mask of the middle."""
    number = written.slices().volume
    with BatchLoader(file, 10, sample=Stack(3), masks="bits") as loader:
        batch = next(iter(loader))
    for image, mask, row in zip(batch.image, batch.mask, batch.index.tolist(), strict=True):
        before = row - 1 if row and number[row - 1] == number[row] else row
        after = row + 1 if row < 9 and number[row + 1] == number[row] else row
        assert (IMAGES[[before, row, after]] == image).all()
        assert (MASKS[row] == mask).all()


@pytest.mark.parametrize("shape", [(3, 16, 20), (16, 20)])
@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_patches_are_parts_of_the_file(file, shape, foreground):
    """Image and mask are cut at the same place, which holds the slice and the foreground."""
    with BatchLoader(
        file, 10, sample=Patch(shape, foreground), masks="bits", image_dtype="stored"
    ) as loader:
        batch = next(iter(loader))
    depth = shape[0] if len(shape) == 3 else 1
    windows = np.lib.stride_tricks.sliding_window_view(IMAGES, shape[-2:], (1, 2))
    for image, mask, row in zip(batch.image, batch.mask, batch.index.tolist(), strict=True):
        image, mask = (each.reshape(depth, *shape[-2:]) for each in (image, mask))  # noqa: PLW2901
        places = {
            (s, *np.argwhere((windows[s] == image[k]).all(axis=(2, 3)))[0].tolist())
            for k in range(depth)
            for s in range(10)
            if (windows[s] == image[k]).all(axis=(2, 3)).any()
        }
        assert row in {s for s, _, _ in places}
        ((r, c),) = {place[1:] for place in places}
        own = min(k for k in range(depth) if (image[k] == windows[row][r, c]).all())
        assert (MASKS[row, r : r + shape[-2], c : c + shape[-1]] == mask[own]).all()
        assert not foreground or mask[own].any()


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("sample", ["slice", Stack(3), Patch((2, 16, 20)), Patch((16, 20))])
def test_colours_are_channels(tmp_path, channels, sample):
    """Red, green and blue of each slice; as many channels per slice of a stack."""
    colours = written.pictures(10, samples=3)[0]
    written.write(tmp_path / "c.h5", plan=written.layout(samples=3))
    options = {"sample": sample, "channels": channels, "image_dtype": "stored"}
    with (
        BatchLoader(tmp_path / "c.h5", 10, **options) as loader,
        BatchLoader(
            tmp_path / "c.h5", 10, window=(0, 1000), **(options | {"image_dtype": "f4"})
        ) as windowed,
    ):
        batch, scaled = next(iter(loader)), next(iter(windowed))
    image = batch.image if channels == "last" else np.moveaxis(batch.image, 1, -1)
    if sample == "slice":
        assert (colours[batch.index] == image).all()
    elif isinstance(sample, Stack):
        assert (colours[batch.index] == image[..., 3:6]).all()
    else:
        assert image.shape[-1] == 3
    assert np.allclose(batch.image / 1000, scaled.image, atol=1e-6)


def test_structures_are_chosen_by_name(file):
    """In the order that is asked for; labels and bits count in that order."""
    with BatchLoader(file, 10, structures=["o", "i"], masks="labels") as loader:
        batch = next(iter(loader))
        assert loader.structures == ("o", "i")
    masks = MASKS[batch.index]

    assert (np.where(masks & 1, 2, masks >> 1) == batch.mask).all()
    with pytest.raises(ConfigurationError, match="no structure 'x', there are i, o"):
        BatchLoader(file, structures=["x"])
    with pytest.raises(ConfigurationError, match="'i' is named twice"):
        BatchLoader(file, structures=["i", "i"])


def test_columns_come_along(file):
    """Columns of the table at the rows of the batch."""
    with BatchLoader(file, 3, columns=["volume", "pixel_spacing", "patient_id"]) as loader:
        for batch in loader:
            assert written.slices().volume[batch.index].tolist() == batch.columns["volume"].tolist()
            assert batch.columns["pixel_spacing"][:3].shape[:2] == (3, 2) or len(batch.index) == 1
            assert b"patient" in batch.columns["patient_id"][0]
    with pytest.raises(LayoutError, match="nothing"):
        BatchLoader(file, columns=["nothing"])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float16", "int32", "float64"])
def test_types_are_limited_not_wrapped(file, dtype):
    """What an integer type cannot hold becomes its nearest value."""
    with BatchLoader(file, 10, image_dtype=dtype) as loader:
        batch = next(iter(loader))
    expected = IMAGES[batch.index].astype("f8")
    if dtype in {"uint8", "int8"}:
        expected = expected.clip(np.iinfo(dtype).min, np.iinfo(dtype).max)

    assert (expected.astype(dtype)[:, None] == batch.image).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": (100, 600)}, lambda x: (x.clip(100, 600) - 100) / 500),
        (
            {"normalize": ZScore()},
            lambda x: (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True),
        ),
        ({"normalize": ZScore(per="file")}, lambda x: (x - IMAGES.mean()) / IMAGES.std()),
        (
            {"normalize": MinMax()},
            lambda x: (x - x.min((1, 2), keepdims=True)) / np.ptp(x, (1, 2), keepdims=True),
        ),
        ({"normalize": Percentiles(0, 100)}, lambda x: x / IMAGES.max()),
    ],
    ids=["window", "z-score", "z-score of the file", "minimum and maximum", "percentiles"],
)
def test_intensities_are_normalised(file, options, expected):
    """Windows and normalisation from what the file keeps of its slices."""
    with BatchLoader(file, 10, **options) as loader:
        batch = next(iter(loader))

    assert np.allclose(expected(IMAGES[batch.index].astype("f8")), batch.image[:, 0], atol=1e-5)


def test_augmentation_moves_image_and_mask_together(file):
    """A flip by name: each sample is the slice or its mirror image, and its mask likewise."""
    with BatchLoader(file, 10, augment="flip", masks="bits") as loader:
        batches = [batch for _ in range(3) for batch in loader]
    poses = [np.s_[::a, ::b] for a in (1, -1) for b in (1, -1)]
    seen = set()
    for batch in batches:
        for image, mask, row in zip(batch.image[:, 0], batch.mask, batch.index, strict=True):
            pose = next(p for p in range(4) if (IMAGES[row][poses[p]] == image).all())
            assert (MASKS[row][poses[pose]] == mask).all()
            seen.add(pose)

    assert len(seen) > 1


def test_files_of_others_are_served(tmp_path):
    """Images and masks of any HDF5 file; what it cannot say is refused with a reason."""
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as h5:
        h5["image"], h5["mask"] = IMAGES, MASKS > 1
    with BatchLoader(path, 4, threads=3) as loader:
        for batch in loader:
            assert (IMAGES[batch.index] == batch.image[:, 0]).all()
            assert ((MASKS[batch.index] > 1) == batch.mask[:, 0]).all()
    for options, words in (
        ({"sample": Stack(3)}, "which slices are a volume"),
        ({"split": "train"}, "was not split"),
        ({"normalize": ZScore()}, "keeps no statistics"),
        ({"sampler": PatientBalanced()}, "patient_id"),
        ({"columns": ["area"]}, "no table"),
        ({"verify": True}, "no checksums"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            BatchLoader(path, **options)


def test_mirror_and_open_dataset_give_the_same_batches(file, tmp_path):
    """The zarr mirror, and a dataset that is open already, are other ways to name the file."""
    with open_dataset(file) as dataset:
        mirror_to_zarr(dataset, tmp_path / "a.zarr")
        with (
            BatchLoader(dataset, 4, sample=Stack(3)) as one,
            BatchLoader(tmp_path / "a.zarr", 4, sample=Stack(3)) as other,
        ):
            assert contents(one) == contents(other)


def test_iterate_batches_is_the_plainest_use(file):
    """Stored types, bits, and no axis of channels."""
    with open_dataset(file) as dataset:
        for batch in iterate_batches(dataset, 4, seed=1, epoch=2):
            assert (IMAGES[batch.index] == batch.image).all()
            assert IMAGES.dtype == batch.image.dtype
            assert (MASKS[batch.index] == batch.mask).all()
            assert batch.epoch == 2


# --- order ---------------------------------------------------------------------------------------

VARIED = {"augment": ("flip", "noise"), "sample": Patch((2, 16, 20), 0.5), "seed": 5}


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_threads_do_not_change_batches(file, threads, prefetch):
    """Order, places and augmentation are the same whatever the number of threads."""
    with (
        BatchLoader(file, 3, threads=1, **VARIED) as one,
        BatchLoader(file, 3, threads=threads, prefetch=prefetch, **VARIED) as several,
    ):
        for _ in range(3):
            assert contents(one) == contents(several)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch(file, world_size):
    """Together all samples, each augmented as if one process had served all."""
    with BatchLoader(file, 1, **VARIED) as whole:
        expected = {b.index[0]: (b.image.tobytes(), b.mask.tobytes()) for b in whole}
    found = {}
    for rank in range(world_size):
        with BatchLoader(file, 1, rank=rank, world_size=world_size, **VARIED) as part:
            found |= {b.index[0]: (b.image.tobytes(), b.mask.tobytes()) for b in part}

    assert expected == found


def test_ranks_that_drop_have_equally_many_batches(file):
    """With `drop_last` no rank waits for another at the end."""
    loaders = [BatchLoader(file, 2, rank=rank, world_size=3, drop_last=True) for rank in range(3)]
    assert [len(list(loader)) for loader in loaders] == [1, 1, 1]
    for loader in loaders:
        loader.close()


def test_batches_are_shared_among_workers(file):
    """Every n-th batch, from a number on: together the same batches."""
    with BatchLoader(file, 2, **VARIED) as loader:
        parts = [contents(loader.batches(start, 2)) for start in range(2)]
        whole = contents(loader)

    assert whole[::2] == parts[0]
    assert whole[1::2] == parts[1]


def test_epochs_differ_and_repeat(file):
    """Each pass is the next epoch; `set_epoch` goes anywhere."""
    with BatchLoader(file, 4) as loader:
        first, second = contents(loader), contents(loader)
        loader.set_epoch(0)
        assert first == contents(loader)
        assert second == contents(loader)
        assert loader.epoch == 2
    assert first != second


def test_read_gives_samples_as_the_epoch_does(file):
    """Chosen rows, read at once, augmented as in that epoch."""
    with BatchLoader(file, 10, **VARIED) as loader:
        whole = next(iter(loader))
        part = loader.read(whole.index[[7, 2]], epoch=0)
        assert (whole.image[[7, 2]] == part.image).all()
        assert (whole.mask[[7, 2]] == part.mask).all()
        assert loader.read([]).image.shape[:1] == (0,)
        with pytest.raises(ConfigurationError, match="rows go from 0 to 9"):
            loader.read([10])


def test_repeated_samples_are_augmented_anew(file):
    """A sampler that draws a slice twice in an epoch gets two samples."""

    @dataclass
    class Twice:
        def order(self, epoch):
            return np.array([3, 3, 3])

    with BatchLoader(file, 3, sampler=Twice(), augment="noise") as loader:
        batch = next(iter(loader))

    assert len({image.tobytes() for image in batch.image}) == 3


def test_samplers_are_bound_to_the_split_and_the_structures(file):
    """Only slices of the split; foreground of the chosen structures."""
    with BatchLoader(file, 2, split="test", sampler=ForegroundBalanced(1.0)) as loader:
        assert set(served(loader)) <= set(range(5, 10))
    with pytest.raises(ConfigurationError, match="no sample without foreground"):
        BatchLoader(file, sampler=ForegroundBalanced(0.5))


@pytest.mark.parametrize("order", [np.array([10]), np.array([-1]), np.zeros((2, 2), int)])
def test_orders_that_cannot_be_are_refused(file, order):
    """A sampler of one's own that names rows which are not there."""

    @dataclass
    class Wrong:
        def order(self, epoch):
            return order

    with (
        BatchLoader(file, sampler=Wrong()) as loader,
        pytest.raises(ConfigurationError, match="the sampler gave"),
    ):
        next(iter(loader))


# --- splits --------------------------------------------------------------------------------------


def test_split_is_the_files(file):
    """Slices of a part only; an unknown part is refused with those that there are."""
    with BatchLoader(file, 2, split="train") as train, BatchLoader(file, 2, split="test") as test:
        assert list(range(5)) == sorted(served(train))
        assert list(range(5, 10)) == sorted(served(test))
        assert train.samples == 5
    with pytest.raises(ConfigurationError, match="no part 'valid', there are test, train"):
        BatchLoader(file, split="valid")


def test_patient_in_two_parts_is_refused(tmp_path):
    """What was learned would be tested on itself."""
    parts = np.array([b"train"] * 6 + [b"test"] * 4)
    written.write(tmp_path / "a.h5", table=written.slices(split=parts))
    with pytest.raises(LayoutError, match="1 patients are in 'train' and in another part"):
        BatchLoader(tmp_path / "a.h5", split="train")


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
def test_state_resumes_in_mid_epoch(file, taken):
    """A new loader goes on with the batch that the consumer would have got next."""
    with BatchLoader(file, 3, **VARIED) as loader:
        expected = contents(loader) + contents(loader)
    with BatchLoader(file, 3, **VARIED) as loader:
        batches = iter(loader)
        before = contents(next(batches) for _ in range(taken))
        state = loader.state_dict()
    with BatchLoader(file, 3, threads=1, **VARIED) as other:
        other.load_state_dict(state)
        after = contents(other)
        if taken < 4:
            after += contents(other)

    assert len(pickle.dumps(state)) < 100
    assert expected[: taken + len(after)] == before + after


def test_state_of_another_loader_is_refused(file):
    """Another seed or batch size would go on with other samples."""
    with BatchLoader(file, 3) as loader, BatchLoader(file, 4) as other:
        with pytest.raises(ConfigurationError, match="another file, seed, batch size"):
            other.load_state_dict(loader.state_dict())
        with pytest.raises(ConfigurationError, match="version None"):
            loader.load_state_dict({})


# --- endings -------------------------------------------------------------------------------------


def threads_of_loaders():
    """Loaders' threads that run."""
    return [t for t in threading.enumerate() if t.name.startswith("batch-loader")]


def test_break_leaves_nothing(file):
    """Hundreds of early breaks; each next pass is a whole epoch."""
    with BatchLoader(file, 2, threads=2) as loader:
        for _ in range(200):
            for batch in loader:
                assert (IMAGES[batch.index[0]] == batch.image[0, 0]).all()
                break
        assert not threads_of_loaders()
        assert list(range(10)) == sorted(served(loader))


def test_exceptions_in_augmentation_name_the_slice(file):
    """They reach the consumer as they are, with file and slice; the loader can go on."""
    from parallel_dicomseg.loader.augment import Function

    def fail(image, mask, random):
        raise ZeroDivisionError("of a user")

    with BatchLoader(file, 2, augment=(Function(fail),)) as loader:
        for _ in range(30):
            with pytest.raises(ZeroDivisionError, match="of a user") as caught:
                next(iter(loader))
            assert "a.h5 was augmented" in caught.value.__notes__[0]
    assert not threads_of_loaders()


def test_truncated_file_reaches_the_consumer(file, tmp_path):
    """File and slice within a second, and no batch with garbage before."""
    path = tmp_path / "b.h5"
    path.write_bytes(file.read_bytes())
    with BatchLoader(path, 2) as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(path, 5000)
        start = time.perf_counter()
        with pytest.raises(LayoutError, match=r"b\.h5"):
            deque(batches)
        assert time.perf_counter() - start < 1
        with pytest.raises(StopIteration):
            next(batches)


def test_closed_loader_says_so(file):
    """After `close` there are no batches, and closing again is nothing."""
    loader = BatchLoader(file, 2)
    batches = iter(loader)
    next(batches)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(ConfigurationError, match="closed"):
        iter(loader)


def test_dropped_loader_leaves_nothing(file):
    """Without `close`: no thread, no open file."""
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        next(iter(BatchLoader(file, 2)))
    gc.collect()

    assert not threads_of_loaders()
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)


def test_forever_goes_on(file):
    """Epoch after epoch; it ends when it is dropped."""
    with BatchLoader(file, 4) as loader:
        batches = loader.forever()
        epochs = [next(batches).epoch for _ in range(7)]
        batches.close()
        assert not threads_of_loaders()
    assert epochs == [0, 0, 0, 1, 1, 1, 2]
    none = BatchLoader(file, 11, drop_last=True)
    with none, pytest.raises(ConfigurationError, match="an epoch has no batch"):
        next(none.forever())


def test_forever_is_one_epoch_after_another(file):
    """The same batches as epoch by epoch, by the same threads, from the same few buffers."""
    with BatchLoader(file, 4, augment="flip,noise", seed=5) as loader:
        expected = [batch for _ in range(4) for batch in contents(loader)]
    with BatchLoader(file, 4, augment="flip,noise", seed=5, prefetch=2) as loader:
        batches, found, threads, places = loader.forever(), [], set(), set()
        for _ in range(12):
            batch = next(batches)
            found += contents([batch])
            places.add(batch.image.ctypes.data)
            threads |= {thread.ident for thread in threads_of_loaders()}
            del batch
        kept = [timings.epoch for timings in loader.timings]
        running = len(threads_of_loaders())
        batches.close()

    assert expected == found
    assert kept == [0, 1, 2, 3]
    assert len(threads) == running
    assert len(places) <= 5


def test_epochs_use_the_same_buffers(file):
    """Pass after pass; what is kept is not among them."""
    with BatchLoader(file, 4, prefetch=2) as loader:
        places = {batch.image.ctypes.data for _ in range(10) for batch in loader}
    assert len(places) <= 5


def test_buffers_come_from_whom_one_likes(file):
    """All images and masks lie in arrays that `allocate` made, as many as are in flight."""
    made = []

    def allocate(shape, dtype):
        made.append(np.full(shape, 7, dtype))
        return made[-1]

    with BatchLoader(file, 4) as plain, BatchLoader(file, 4, allocate=allocate) as loader:
        expected, found = contents(plain), []
        for batch in loader:
            assert any(np.may_share_memory(batch.image, array) for array in made)
            assert any(np.may_share_memory(batch.mask, array) for array in made)
            found += contents([batch])
        whole = loader.image_shape
        loader.set_epoch(0)
        assert contents(loader) == expected

    assert expected == found
    assert {array.shape[1:] for array in made} == {whole, (2, *whole[1:])}
    assert len(made) <= 2 * (4 + 2)


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        (lambda shape, dtype: np.empty((3, *shape), dtype)[0], "must not give a view"),
        (lambda shape, dtype: np.empty(shape, np.int8), "expected contiguous"),
        (lambda shape, dtype: np.empty(shape[::-1], dtype).T, "expected contiguous"),
    ],
)
def test_buffers_that_cannot_be_watched_are_refused(file, allocate, words):
    """A buffer that is used again too early would overwrite a batch."""
    with (
        BatchLoader(file, 4, allocate=allocate) as loader,
        pytest.raises(ConfigurationError, match=words),
    ):
        next(iter(loader))


def test_forever_follows_a_chosen_epoch(file):
    """Who sets another epoch in the meantime gets that one next."""
    with BatchLoader(file, 4) as loader:
        batches = loader.forever()
        first = [next(batches).epoch for _ in range(3)]
        loader.set_epoch(7)
        rest = [next(batches).epoch for _ in range(4)]
        batches.close()
    assert (first, rest) == ([0, 0, 0], [7, 7, 7, 8])
    assert not threads_of_loaders()


@dataclass
class Tired:
    """A sampler that has no third epoch."""

    rows: int = 10

    def order(self, epoch):
        """Rows in their order."""
        if epoch == 2:
            raise ValueError("no epoch 2")
        return np.arange(self.rows)


def test_a_samplers_error_comes_in_its_turn(file):
    """Although the order is asked for ahead, every batch before it comes."""
    with BatchLoader(file, 4, sampler=Tired()) as loader:
        batches = loader.forever()
        seen = [row for _ in range(6) for row in next(batches).index.tolist()]
        with pytest.raises(ValueError, match="no epoch 2"):
            next(batches)
    assert seen == [*range(10), *range(10)]
    assert not threads_of_loaders()


def test_closing_the_loader_ends_forever(file):
    """Also between two epochs, when the threads are at the next one already."""
    loader = BatchLoader(file, 4)
    batches = loader.forever()
    for _ in range(3):
        next(batches)
    loader.close()
    assert not threads_of_loaders()
    with pytest.raises(ConfigurationError, match="the loader is closed"):
        next(batches)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forks_go_on_where_they_were(file):
    """In the middle of an epoch, parent and child both get the right batches."""
    with BatchLoader(file, 1, seed=2) as loader:
        expected = served(loader)
        loader.set_epoch(0)
        batches = iter(loader)
        for place in range(9):
            assert [expected[place]] == next(batches).index.tolist()
            pid = os.fork()
            if pid == 0:
                rest = [batch.index[0] for batch in batches]
                os._exit(0 if rest == expected[place + 1 :] else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def in_another_process(loader, connection):
    """Send the batches of a loader that came by pickle."""
    with loader:
        connection.send(contents(loader))
    connection.close()


def test_pickled_loader_goes_on(file):
    """In a spawned process, from where it was."""
    with BatchLoader(file, 3, **VARIED) as loader:
        contents(loader)
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=in_another_process, args=(loader, there))
        process.start()
        there.close()
        received = here.recv()
        process.join()
        process.close()
        here.close()
        assert contents(loader) == received


def test_first_batch_needs_no_numba(file, tmp_path):
    """Without augmentation a fresh process loads neither numba nor what is not used."""
    program = f"""
import sys
from parallel_dicomseg.loader import BatchLoader
with BatchLoader({str(file)!r}, 4, window=(0, 500)) as loader:
    next(iter(loader))
print(*({{"numba", "dask", "zarr", "torch", "pydicom"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == ""


# --- times and options ---------------------------------------------------------------------------


def test_timings_say_where_the_time_went(file):
    """A record per whole epoch, with one line of advice."""
    with BatchLoader(file, 2, threads=1, prefetch=1) as loader:
        for _ in loader:
            time.sleep(0.01)
        next(iter(loader))
        (timings,) = loader.timings
        assert loader.advice == timings.advice
    assert (timings.epoch, timings.batches, timings.samples, timings.threads) == (0, 5, 10, 1)
    assert timings.read > 0
    assert timings.decode > 0
    assert timings.blocked > 0
    assert timings.seconds > 0.03


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ({"waited": 0.1}, "the model is the bottleneck"),
        ({"waited": 5, "blocked": 9, "read": 1}, "larger prefetch"),
        ({"waited": 5, "decode": 9, "threads": 0}, "more threads"),
        ({"waited": 5, "decode": 9}, "raw codec"),
        ({"waited": 5, "augment": 9}, "less augmentation"),
        ({"waited": 5, "read": 9}, "faster disk"),
    ],
)
def test_advice_names_the_bottleneck(seconds, words):
    """One line that follows from the seconds."""
    usual = {"read": 0, "decode": 0, "augment": 0, "blocked": 0, "threads": 4096}
    timings = Timings(epoch=0, batches=9, samples=90, seconds=10, **(usual | seconds))

    assert timings.advice.startswith(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"masks": "both"}, "masks is 'both'"),
        ({"channels": "middle"}, "channels is 'middle'"),
        ({"sample": "volume"}, "sample is 'volume'"),
        ({"sample": Patch((99, 4))}, "does not fit into 40 x 56"),
        ({"image_dtype": "word"}, "image_dtype is 'word'"),
        ({"image_dtype": "S3"}, "real numbers"),
        ({"sampler": object()}, "is no sampler"),
        ({"augment": "spin"}, "no augmentation 'spin'"),
    ],
)
def test_wrong_options_are_refused_at_once(file, options, words):
    """One sentence with the option and what was expected, and no file left open."""
    with pytest.raises(ConfigurationError, match=words):
        BatchLoader(file, **options)
