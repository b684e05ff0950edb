"""Batches as frameworks want them: one module each, which imports its framework.

`pytorch`, `keras`, `tensorflow` and `jax`; NumPy needs none, a `Batch` holds its arrays.
"""
