"""The adapters with the real frameworks: the same batches, copied ahead, and no batch twice."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_dicomseg.cohort import scan_cohort
from parallel_dicomseg.convert import convert_cohort
from parallel_dicomseg.errors import ConfigurationError
from parallel_dicomseg.loader import Batch, BatchLoader
from parallel_dicomseg.records import ConvertOptions
from parallel_dicomseg.synthetic import make_sunnybrook_cohort

CHECKOUT = Path(__file__).resolve().parents[1]
SLICES, ROWS, COLUMNS = 30, 32, 48
KERAS_BACKENDS = ("torch", "jax", "tensorflow")

# The frameworks warn of each other's and of Python's coming changes.
pytestmark = pytest.mark.filterwarnings("default")


def framework(name: str) -> Any:
    """A module, or a skip that names what is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def adapter(name: str, needs: str) -> Any:
    """One of the adapters, or a skip."""
    framework(needs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"parallel_dicomseg.loader.adapters.{name}")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 30 slices that are no squares."""
    folder = tmp_path_factory.mktemp("adapters")
    make_sunnybrook_cohort(folder / "data", patients=3, slices=10, rows=ROWS, columns=COLUMNS)
    options = ConvertOptions(scheduler="synchronous")
    convert_cohort(scan_cohort(folder / "data"), folder / "cohort.h5", options=options)
    return folder / "cohort.h5"


def open_loader(file: Path, **options: Any) -> BatchLoader:
    """Augmented batches of 7: the last one of an epoch has 2 samples."""
    chosen = {"batch_size": 7, "seed": 3, "augment": ("flip", "noise"), "threads": 1, **options}
    return BatchLoader(file, **chosen)


def epochs_of(file: Path, count: int, **options: Any) -> list[list[Batch]]:
    """What plain iteration gives."""
    with open_loader(file, **options) as loader:
        return [list(loader) for _ in range(count)]


def assert_same(expected: Iterable[Batch], found: Iterable[Any]) -> None:
    """Equal images, masks and rows, batch by batch; `found` are dictionaries."""
    for batch, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(batch.index, np.asarray(other["index"]))
        np.testing.assert_array_equal(batch.image, np.asarray(other["image"]))
        np.testing.assert_array_equal(batch.mask, np.asarray(other["mask"]))


def run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with this checkout."""
    quiet = {"PYTHONPATH": str(CHECKOUT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- PyTorch


def test_tensors_share_the_batch_and_keep_it(file: Path) -> None:
    """Nothing is copied, and a tensor that is kept is not overwritten by later batches."""
    pytorch = adapter("pytorch", "torch")
    with open_loader(file, columns=("pixel_spacing", "patient_id")) as loader:
        kept = [(batch.image.copy(), pytorch.tensors(batch)) for batch in loader]

    assert all(np.array_equal(image, batch["image"].numpy()) for image, batch in kept)
    assert tuple(kept[0][1]["pixel_spacing"].shape) == (7, 2)
    assert isinstance(kept[0][1]["patient_id"][0], str)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_wide_bits_become_signed(dtype: type) -> None:
    """PyTorch gets masks of over 8 structures as integers that it can calculate with."""
    pytorch = adapter("pytorch", "torch")
    mask = np.array([[[1, 2**15]]], dtype)
    batch = Batch(np.zeros((1, 1, 2), np.float32), mask, np.array([0]))

    assert pytorch.tensors(batch)["mask"].flatten().tolist() == [1, 2**15]
    assert pytorch.tensors(batch)["mask"].dtype.is_signed


@pytest.mark.parametrize(
    ("workers", "start"), [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_a_stream_is_the_same_with_any_number_of_workers(
    file: Path, workers: int, start: str | None
) -> None:
    """No batch twice, none missing, the order of plain iteration, the next epoch in each pass."""
    torch, pytorch = framework("torch"), adapter("pytorch", "torch")
    expected = epochs_of(file, 2)
    with open_loader(file) as loader:
        batches = torch.utils.data.DataLoader(
            pytorch.BatchStream(loader),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=start,
        )
        for epoch in expected:
            assert_same(epoch, batches)


def test_persistent_workers_go_on_to_the_next_epoch(file: Path) -> None:
    """Workers that stay count the epochs, and follow `set_epoch`, even after an early break."""
    torch, pytorch = framework("torch"), adapter("pytorch", "torch")
    expected = epochs_of(file, 3)
    with open_loader(file) as loader:
        stream = pytorch.BatchStream(loader)
        batches = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=2, persistent_workers=True
        )
        for _ in batches:
            break
        found = [list(batches), list(batches)]
        stream.set_epoch(0)
        found.append(list(batches))
        del batches

    for epoch, batches_of_epoch in zip((1, 2, 0), found, strict=True):
        assert_same(expected[epoch], batches_of_epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_gives_samples_by_number(file: Path, workers: int) -> None:
    """A DataLoader's own sampler chooses; a sample is augmented as in the loader's epoch."""
    torch, pytorch = framework("torch"), adapter("pytorch", "torch")
    (expected,) = epochs_of(file, 1)
    with open_loader(file) as loader:
        dataset = pytorch.SampleDataset(loader)
        chosen = [batch.index.tolist() for batch in expected]
        batches = torch.utils.data.DataLoader(dataset, batch_sampler=chosen, num_workers=workers)
        assert_same(expected, batches)

        assert len(dataset) == SLICES
        np.testing.assert_array_equal(
            expected[0].image[2], dataset[int(expected[0].index[2])]["image"]
        )


def test_a_dataset_counts_the_samples_of_its_split(tmp_path: Path) -> None:
    """Number k is the k-th sample of the chosen split, not row k of the file."""
    pytorch = adapter("pytorch", "torch")
    make_sunnybrook_cohort(tmp_path / "data", patients=4, slices=3, rows=ROWS, columns=COLUMNS)
    from parallel_dicomseg.records import ScanOptions

    cohort = scan_cohort(tmp_path / "data", options=ScanOptions(split=(0.5, 0.5)))
    convert_cohort(cohort, tmp_path / "c.h5", options=ConvertOptions(scheduler="synchronous"))
    with BatchLoader(tmp_path / "c.h5", 4, split="validation", shuffle=False) as loader:
        expected = np.concatenate([batch.index for batch in loader])
        dataset = pytorch.SampleDataset(loader)
        found = [int(dataset[k]["index"]) for k in range(len(dataset))]

    assert expected.tolist() == found


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_copies_ahead_are_the_same_batches(file: Path, device: str, is_pinned: bool) -> None:
    """In order, complete, epoch after epoch, from a loader and from a DataLoader."""
    torch, pytorch = framework("torch"), adapter("pytorch", "torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    expected = epochs_of(file, 2)
    with open_loader(file, allocate=pytorch.pinned if is_pinned else None) as loader:
        if device == "cuda" and is_pinned:
            assert pytorch.tensors(next(iter(loader)))["image"].is_pinned()
            loader.set_epoch(0)
        ahead = pytorch.DevicePrefetcher(loader, device)
        found = [list(ahead), list(ahead)]
        loader.set_epoch(0)
        stream = torch.utils.data.DataLoader(pytorch.BatchStream(loader), batch_size=None)
        from_stream = list(pytorch.DevicePrefetcher(stream, device, ahead=1))

    assert device == found[0][0]["image"].device.type
    for epoch, batches in zip([*expected, expected[0]], [*found, from_stream], strict=True):
        assert_same(epoch, [{name: v.cpu() for name, v in batch.items()} for batch in batches])


def test_pinned_buffers_of_every_type(file: Path) -> None:
    """Whatever types batches have, they are the plain loader's; kept tensors stay as they are."""
    pytorch = adapter("pytorch", "torch")
    for dtype in ("float32", "int16", "uint8", "uint16", "stored"):
        options = {"image_dtype": dtype, "masks": "bits", "augment": ()}
        (expected,) = epochs_of(file, 1, **options)
        with open_loader(file, allocate=pytorch.pinned, **options) as loader:
            assert_same(expected, [pytorch.tensors(batch) for batch in loader])


def test_nothing_is_left_after_a_break(file: Path) -> None:
    """Stopping in mid-epoch ends the loader's threads; the fixtures look for them."""
    pytorch = adapter("pytorch", "torch")
    with open_loader(file, threads=2) as loader:
        ahead = pytorch.DevicePrefetcher(loader, "cpu")
        for _ in range(5):
            for batch in ahead:
                assert len(batch["index"]) == 7
                break


def test_copying_nothing_ahead_is_refused(file: Path) -> None:
    """At least one batch must be on its way."""
    pytorch = adapter("pytorch", "torch")

    with pytest.raises(ConfigurationError, match="ahead is 0, it must be at least 1"):
        pytorch.DevicePrefetcher([], "cpu", ahead=0)


# --- Keras


def keras_adapter() -> Any:
    """The adapter on any backend that is installed; Keras takes one per process."""
    backend = next((name for name in KERAS_BACKENDS if find_spec(name)), None)
    if backend is None:
        pytest.skip("Keras has no backend: torch, jax and tensorflow are not installed")
    os.environ.setdefault("KERAS_BACKEND", backend)
    return adapter("keras", "keras")


def assert_pairs(expected: list[Batch], found: list[Any]) -> None:
    """Equal images and masks."""
    for batch, (image, mask) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(batch.image, np.asarray(image))
        np.testing.assert_array_equal(batch.mask, np.asarray(mask))


def test_keras_items_are_the_batches_in_any_order(file: Path) -> None:
    """Item k is batch k, whether asked for in a row, backwards, or twice."""
    keras = keras_adapter()
    (expected,) = epochs_of(file, 1)
    with open_loader(file) as loader:
        batches = keras.KerasBatches(loader)
        forth = [batches[k] for k in range(len(batches))]
        back = [batches[k] for k in reversed(range(len(batches)))]

    assert len(batches) == 5
    assert_pairs(expected, forth)
    assert_pairs(expected, back[::-1])


def test_keras_goes_on_to_the_next_epoch_after_a_whole_one(file: Path) -> None:
    """Looking at the first items only, as Keras does to learn the shapes, is no epoch."""
    keras = keras_adapter()
    expected = epochs_of(file, 2)
    with open_loader(file) as loader:
        batches = keras.KerasBatches(loader)
        assert_pairs(expected[0][:2], [batches[0], batches[1]])
        batches.on_epoch_end()
        for epoch in expected:
            assert_pairs(epoch, [batches[k] for k in range(5)])
            batches.on_epoch_end()


def test_the_generator_never_ends(file: Path) -> None:
    """After an epoch comes the next one."""
    keras = keras_adapter()
    expected = epochs_of(file, 2)
    with open_loader(file) as loader:
        endless = keras.batch_generator(loader)
        found = [next(endless) for _ in range(10)]
        endless.close()

    assert_pairs(expected[0] + expected[1], found)


def test_fit_takes_both_and_sees_every_batch(file: Path) -> None:
    """`fit` makes the steps of each epoch from items and from the endless generator."""
    keras_batches, keras = keras_adapter(), framework("keras")
    model = keras.Sequential([keras.layers.Conv2D(1, 1, activation="sigmoid")])
    model.compile(optimizer="sgd", loss="binary_crossentropy")
    options = {"channels": "last", "structures": ["i"], "augment": ()}
    with open_loader(file, **options) as loader, open_loader(file, **options) as other:
        batches = keras_batches.KerasBatches(loader)
        history = model.fit(batches, epochs=2, shuffle=False, verbose=0, validation_data=batches)
        endless = keras_batches.batch_generator(other)
        model.fit(endless, steps_per_epoch=5, epochs=2, shuffle=False, verbose=0)
        endless.close()

    assert {"loss", "val_loss"} == set(history.history)
    assert all(np.isfinite(history.history["loss"]))


# --- TensorFlow


#: In a process of its own: TensorFlow keeps the threads that asked for batches.
TENSORFLOW_PROGRAM = """
import sys
import numpy as np
from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.loader.adapters.tensorflow import tf_dataset

options = dict(batch_size=7, seed=3, augment=("flip", "noise"), threads=1)
with BatchLoader(sys.argv[1], **options) as loader:
    expected = [list(loader) for _ in range(2)]
    loader.set_epoch(0)
    dataset = tf_dataset(loader)
    found = [list(dataset.as_numpy_iterator()) for _ in range(2)]
    for epoch, pairs in zip(expected, found, strict=True):
        for batch, (image, mask) in zip(epoch, pairs, strict=True):
            np.testing.assert_array_equal(batch.image, image)
            np.testing.assert_array_equal(batch.mask, mask)
    print("batches", int(dataset.cardinality()))
"""


def test_a_tf_dataset_is_an_epoch_of_known_length(file: Path) -> None:
    """Every pass gives the next epoch, with the batches of plain iteration."""
    if find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")
    done = run_python("-c", TENSORFLOW_PROGRAM, str(file))

    assert done.stdout.splitlines()[-1:] == ["batches 5"], done.stderr[-2000:]


# --- JAX


def test_jax_arrays_are_the_batches(file: Path) -> None:
    """On the device, in order, epoch after epoch, not changed by later batches."""
    jax, adapters = framework("jax"), adapter("jax", "jax")
    expected = epochs_of(file, 2)
    with open_loader(file) as loader:
        ahead = adapters.JaxBatches(loader, jax.devices()[0], ahead=3)
        found = [list(ahead), list(ahead)]

    assert len(expected[0]) == 5
    for epoch, batches in zip(expected, found, strict=True):
        assert all(isinstance(batch.image, jax.Array) for batch in batches)
        assert_pairs(epoch, [(batch.image, batch.mask) for batch in batches])


def test_jax_gets_no_masks_that_it_would_cut() -> None:
    """64 structures do not fit where JAX has 32 bits."""
    adapters = adapter("jax", "jax")
    batch = Batch(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), np.uint64), np.array([0]))

    with pytest.raises(ConfigurationError, match="JAX would cut masks of 64 bits"):
        next(iter(adapters.JaxBatches([batch])))
