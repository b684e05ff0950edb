"""Batches as TensorFlow wants them: a `tf.data.Dataset` of images and masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from numpy.typing import NDArray

from parallel_dicomseg.loader import BatchLoader


def tf_dataset(loader: BatchLoader, *, ahead: int = 2) -> Any:
    """A `tf.data.Dataset` of (image, mask); every pass through it is the loader's next epoch.

    Parameters
    ----------
    loader
        Must stay open as long as the dataset is used.
    ahead
        Batches that TensorFlow makes ready ahead of the step.

    Returns
    -------
    tf.data.Dataset
        Of shapes with an open number of samples, and of known length: `repeat()` it for `fit` with
        `steps_per_epoch`, or give it to `fit` as it is.
    """

    def pairs() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for batch in loader:
            yield batch.image, batch.mask

    signature = (
        tf.TensorSpec((None, *loader.image_shape), loader.image_dtype),
        tf.TensorSpec((None, *loader.mask_shape), loader.mask_dtype),
    )
    batches = tf.data.Dataset.from_generator(pairs, output_signature=signature)
    return batches.apply(tf.data.experimental.assert_cardinality(len(loader))).prefetch(ahead)
