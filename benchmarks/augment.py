"""Augmenting samples against NumPy, MONAI and TorchIO, measured in the same run.

    python benchmarks/augment.py            a minute
    python benchmarks/augment.py --quick    every case once, and small

"same": flip, one of 8 poses, contrast and noise of a 256 x 256 int16 image and its mask, one thread
each, everything in memory. NumPy is the shortest way to write it; MONAI and TorchIO, where they are
installed, are their own transforms with the same ranges (TorchIO has no quarter turns, and gamma
instead of contrast: less work). "objects": what each object
costs alone. All take turns, round by round; figures are medians over the rounds. Only ratios within
one run mean something.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from printing import Emit, emitter

from parallel_dicomseg.loader.augment import (
    KINDS,
    Contrast,
    Crop,
    Dihedral,
    Flip,
    Noise,
    augment_into,
    compile_plan,
    warm_up,
)

Array = NDArray[Any]
Step = Callable[[int], Any]

_COLUMNS = {
    "start": (("seconds", "{seconds:.2f}"),),
    "same": (("samples/s", "{per_second:.0f}"), ("ours is", "{ratio:.1f} x")),
    "objects": (("samples/s", "{per_second:.0f}"), ("us", "{microseconds:.0f}")),
}
_SAME = (Flip(), Dihedral(), Contrast((0.75, 1.33)), Noise((0.0, 0.1)))


def ours(image: Array, mask: Array, *objects: Any, **options: Any) -> Step:
    plan = compile_plan(objects, image.shape, **options)
    out, out_mask = np.empty(plan.shape, np.float32), np.empty(plan.shape, mask.dtype)
    return lambda k: augment_into(image, mask, out, out_mask, k * 0x9E3779B97F4A7C15 % 2**64, plan)


def numpy_way(image: Array, mask: Array) -> Step:
    def step(k: int) -> tuple[Array, Array]:
        generator = np.random.default_rng(k)
        x, m = image.astype(np.float32), mask
        for axis in (0, 1):
            if generator.random() < 0.5:
                x, m = np.flip(x, axis), np.flip(m, axis)
        turns, is_turned = generator.integers(4), generator.integers(2)
        x, m = np.rot90(x, turns), np.rot90(m, turns)
        if is_turned:
            x, m = x.T, m.T
        mean = x.mean()
        x = mean + (x - mean) * np.float32(generator.uniform(0.75, 1.33))
        sd = np.float32(generator.uniform(0, 0.1) * x.std())
        x = x + sd * generator.standard_normal(x.shape, np.float32)
        return np.ascontiguousarray(x), np.ascontiguousarray(m)

    return step


def monai_way(image: Array, mask: Array) -> Step:
    import torch
    from monai import transforms as t

    keys = ["image", "mask"]
    compose = t.Compose(
        [
            t.RandFlipd(keys, prob=0.5, spatial_axis=0),
            t.RandFlipd(keys, prob=0.5, spatial_axis=1),
            t.RandRotate90d(keys, prob=0.75, max_k=3),
            t.RandScaleIntensityFixedMeand(["image"], prob=1.0, factors=(-0.25, 0.33)),
            t.RandGaussianNoised(["image"], prob=1.0, std=0.1),
        ]
    )
    compose.set_random_state(0)
    torch.set_num_threads(1)
    data = {"image": image[None].astype(np.float32), "mask": mask[None]}
    return lambda _: compose(data)


def torchio_way(image: Array, mask: Array) -> Step:
    import torch
    import torchio

    compose = torchio.Compose(
        [
            torchio.RandomFlip(axes=(0, 1), flip_probability=0.5),
            torchio.RandomGamma(log_gamma=(-0.29, 0.29)),
            torchio.RandomNoise(std=(0, 0.1)),
        ]
    )
    torch.set_num_threads(1)
    subject = torchio.Subject(
        image=torchio.ScalarImage(tensor=torch.from_numpy(image[None, :, :, None].astype("f4"))),
        mask=torchio.LabelMap(tensor=torch.from_numpy(mask[None, :, :, None])),
    )
    return lambda _: compose(subject)


def rates(steps: dict[str, Step], rounds: int, samples: dict[str, int]) -> dict[str, float]:
    """Samples per second of each, the median over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        step(0)
        seconds[name].clear()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for k in range(samples[name]):
                step(k)
            seconds[name].append((time.perf_counter() - start) / samples[name])
    return {name: 1 / statistics.median(each) for name, each in seconds.items()}


def measure(emit: Emit, size: int, rounds: int, samples: int) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 2000, (size, size)).astype(np.int16)
    mask = (generator.random(image.shape) < 0.1).astype(np.uint8)
    start = time.perf_counter()
    warm_up()
    emit({"measures": "start", "case": "warm_up()", "seconds": time.perf_counter() - start})

    steps = {"ours": ours(image, mask, *_SAME), "numpy": numpy_way(image, mask)}
    for name, way in (("monai", monai_way), ("torchio", torchio_way)):
        if importlib.util.find_spec(name) is not None:
            steps[name] = way(image, mask)
    few = {name: samples if name == "ours" else max(samples // 8, 1) for name in steps}
    found = rates(steps, rounds, few)
    for name, rate in found.items():
        emit(
            {
                "measures": "same",
                "case": name,
                "per_second": rate,
                "ratio": found["ours"] / rate,
                "size": size,
            }
        )
    alone = {name: ours(image, mask, kind()) for name, kind in KINDS.items() if kind is not Crop}
    alone["rotate, cubic"] = ours(image, mask, "rotate", interpolation="cubic")
    for name, rate in rates(alone, rounds, dict.fromkeys(alone, max(samples // 8, 1))).items():
        figures = {"per_second": rate, "microseconds": 1e6 / rate, "size": size}
        emit({"measures": "objects", "case": name, **figures})


def main() -> None:
    parser = argparse.ArgumentParser(description="Augmentation against other packages.")
    parser.add_argument("--quick", action="store_true", help="small, once")
    parser.add_argument("--size", type=int, default=256, help="rows and columns")
    parser.add_argument("--json", action="store_true", help="a JSON object per line")
    arguments = parser.parse_args()
    emit = emitter("augment", _COLUMNS, as_json=arguments.json, name_width=22, width=14)
    if arguments.quick:
        measure(emit, 64, 1, 8)
    else:
        measure(emit, arguments.size, 7, 800)


if __name__ == "__main__":
    main()
