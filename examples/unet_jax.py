"""A tiny U-Net in plain JAX, on batches that are put on the device ahead of the step.

python examples/unet_jax.py [cohort.h5] [--steps 40]
"""

from __future__ import annotations

from itertools import chain, islice, repeat
from pathlib import Path

import jax
import jax.numpy as jnp
from cohort import BATCH_SIZE, STRUCTURES, WINDOW, main

from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.loader.adapters.jax import JaxBatches

Weights = dict[str, jax.Array]
Moments = tuple[Weights, Weights]
LEARNING_RATE = 0.01


def make_weights(width: int = 8) -> Weights:
    """Three kernels (out, in, 3, 3) and the last bias."""
    shapes = {
        "outer": (width, 1, 3, 3),
        "inner": (2 * width, width, 3, 3),
        "last": (1, 3 * width, 3, 3),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) * (2 / (9 * shape[1])) ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    } | {"bias": jnp.zeros(())}


def logits_of(weights: Weights, image: jax.Array) -> jax.Array:
    """(b, 1, rows, columns) -> logits of the same size; rows and columns are even."""
    outer = jax.nn.relu(jax.lax.conv(image, weights["outer"], (1, 1), "SAME"))
    half = jax.lax.reduce_window(outer, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    inner = jax.nn.relu(jax.lax.conv(half, weights["inner"], (1, 1), "SAME"))
    upper = inner.repeat(2, axis=2).repeat(2, axis=3)
    joined = jnp.concatenate((outer, upper), axis=1)
    return jax.lax.conv(joined, weights["last"], (1, 1), "SAME") + weights["bias"]


def loss_of(weights: Weights, image: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean binary cross-entropy."""
    logits = logits_of(weights, image)
    return jnp.mean(jax.nn.softplus(logits) - logits * mask)


@jax.jit
def step(
    weights: Weights,
    moments: tuple[Weights, Weights],
    count: int,
    image: jax.Array,
    mask: jax.Array,
) -> tuple[Weights, tuple[Weights, Weights], jax.Array]:
    """One step of Adam."""
    loss, gradient = jax.value_and_grad(loss_of)(weights, image, mask)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
    second = jax.tree.map(lambda m, g: 0.999 * m + 0.001 * g * g, moments[1], gradient)

    def moved(weight: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        m, v = m / (1 - 0.9**count), v / (1 - 0.999**count)
        return weight - LEARNING_RATE * m / (jnp.sqrt(v) + 1e-8)

    return jax.tree.map(moved, weights, first, second), (first, second), loss


def train(file: Path, steps: int) -> list[float]:
    """Train for some steps over as many epochs as that takes; the loss of each step."""
    weights = make_weights()
    moments = (jax.tree.map(jnp.zeros_like, weights),) * 2
    losses = []
    with BatchLoader(
        file,
        BATCH_SIZE,
        structures=STRUCTURES,
        window=WINDOW,
        augment=("flip",),
        drop_last=True,  # one shape of batch: compiled once
    ) as loader:
        batches = chain.from_iterable(repeat(JaxBatches(loader)))
        for count, batch in enumerate(islice(batches, steps), 1):
            weights, moments, loss = step(weights, moments, count, batch.image, batch.mask)
            losses.append(float(loss))
    return losses


if __name__ == "__main__":
    main(train, __doc__)
