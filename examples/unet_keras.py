"""A tiny U-Net in Keras 3, on whatever backend Keras is set to (torch, jax or tensorflow).

KERAS_BACKEND=jax python examples/unet_keras.py [cohort.h5] [--steps 40]
"""

from __future__ import annotations

import math
from pathlib import Path

import keras
from cohort import BATCH_SIZE, STRUCTURES, WINDOW, main
from keras import layers

from parallel_dicomseg.loader import BatchLoader
from parallel_dicomseg.loader.adapters.keras import KerasBatches


def make_model(width: int = 8) -> keras.Model:
    """One level down, one up, with a skip: (b, rows, columns, 1) -> probabilities."""
    image = keras.Input((None, None, 1))
    outer = layers.Conv2D(width, 3, padding="same", activation="relu")(image)
    inner = layers.MaxPooling2D()(outer)
    inner = layers.Conv2D(2 * width, 3, padding="same", activation="relu")(inner)
    joined = layers.Concatenate()([outer, layers.UpSampling2D()(inner)])
    probability = layers.Conv2D(1, 3, padding="same", activation="sigmoid")(joined)
    return keras.Model(image, probability)


class _EachStep(keras.callbacks.Callback):
    """Remember the loss of every step; Keras itself reports the epoch's mean so far."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._before = 0.0

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002  # Keras's signature
        self._before = 0.0

    def on_train_batch_end(self, batch, logs=None):
        total = float(logs["loss"]) * (batch + 1)
        self.losses.append(total - self._before)
        self._before = total


def train(file: Path, steps: int) -> list[float]:
    """Train for at least these steps in whole epochs; the loss of each step."""
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="binary_crossentropy")
    each_step = _EachStep()
    with BatchLoader(
        file,
        BATCH_SIZE,
        structures=STRUCTURES,
        window=WINDOW,
        augment=("flip",),
        channels="last",
    ) as loader:
        model.fit(
            KerasBatches(loader),
            epochs=math.ceil(steps / len(loader)),
            shuffle=False,  # the loader has shuffled already
            callbacks=[each_step],
            verbose=0,
        )
    return each_step.losses


if __name__ == "__main__":
    main(train, __doc__)
