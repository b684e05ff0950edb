"""A tiny U-Net with nothing but NumPy, its gradients by hand.

python examples/unet_numpy.py [cohort.h5] [--steps 40]
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from cohort import BATCH_SIZE, STRUCTURES, WINDOW, main
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from parallel_dicomseg.loader import BatchLoader

Array = NDArray[Any]
Weights = dict[str, Array]
LEARNING_RATE = 0.01


def make_weights(width: int = 4) -> Weights:
    """Three kernels (out, in, 3, 3) and the last bias."""
    shapes = {
        "outer": (width, 1, 3, 3),
        "inner": (2 * width, width, 3, 3),
        "last": (1, 3 * width, 3, 3),
    }
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, (2 / (9 * shape[1])) ** 0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    return weights | {"bias": np.zeros(1, np.float32)}


def convolve(image: Array, kernel: Array) -> Array:
    """(b, in, rows, columns) and (out, in, 3, 3) -> (b, out, rows, columns), zeros outside."""
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.tensordot(windows, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)


def gradient_of_kernel(image: Array, above: Array) -> Array:
    """What `above`, the gradient of a convolution's result, means for its kernel."""
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.tensordot(above, windows, ((0, 2, 3), (0, 2, 3)))


def gradient_of_image(kernel: Array, above: Array) -> Array:
    """What `above`, the gradient of a convolution's result, means for its input."""
    return convolve(above, kernel[:, :, ::-1, ::-1].swapaxes(0, 1))


def halve(image: Array) -> Array:
    """Means of 2 x 2 pixels; rows and columns are even."""
    b, c, rows, columns = image.shape
    return image.reshape(b, c, rows // 2, 2, columns // 2, 2).mean((3, 5))


def double(image: Array) -> Array:
    """Every pixel as 2 x 2 pixels."""
    return image.repeat(2, axis=2).repeat(2, axis=3)


def loss_and_gradients(weights: Weights, image: Array, mask: Array) -> tuple[float, Weights]:
    """Mean binary cross-entropy of a batch, and its gradient for every weight."""
    outer = np.maximum(convolve(image, weights["outer"]), 0)
    half = halve(outer)
    inner = np.maximum(convolve(half, weights["inner"]), 0)
    joined = np.concatenate((outer, double(inner)), axis=1)
    logits = convolve(joined, weights["last"]) + weights["bias"]
    loss = np.mean(np.logaddexp(0, logits) - logits * mask)
    above = (1 / (1 + np.exp(-logits)) - mask) / logits.size
    to_joined = gradient_of_image(weights["last"], above)
    width = outer.shape[1]
    to_inner = 4 * halve(to_joined[:, width:]) * (inner > 0)
    to_half = gradient_of_image(weights["inner"], to_inner)
    to_outer = (to_joined[:, :width] + double(to_half) / 4) * (outer > 0)
    return float(loss), {
        "outer": gradient_of_kernel(image, to_outer),
        "inner": gradient_of_kernel(half, to_inner),
        "last": gradient_of_kernel(joined, above),
        "bias": above.sum(keepdims=True).reshape(1),
    }


def train(file: Path, steps: int) -> list[float]:
    """Train for some steps of Adam over as many epochs as that takes; the loss of each step."""
    weights = make_weights()
    first = {name: np.zeros_like(weight) for name, weight in weights.items()}
    second = {name: np.zeros_like(weight) for name, weight in weights.items()}
    losses = []
    with BatchLoader(
        file, BATCH_SIZE, structures=STRUCTURES, window=WINDOW, augment=("flip",)
    ) as loader:
        for count, batch in enumerate(islice(loader.forever(), steps), 1):
            loss, gradients = loss_and_gradients(weights, batch.image, batch.mask)
            for name, gradient in gradients.items():
                first[name] += 0.1 * (gradient - first[name])
                second[name] += 0.001 * (gradient * gradient - second[name])
                m, v = first[name] / (1 - 0.9**count), second[name] / (1 - 0.999**count)
                weights[name] -= LEARNING_RATE * m / (np.sqrt(v) + 1e-8)
            losses.append(loss)
    return losses


if __name__ == "__main__":
    main(train, __doc__)
