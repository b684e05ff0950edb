"""The one way in which the project compiles: nopython, GIL released, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile `function` with numba: nopython, nogil, disk cache, strict IEEE arithmetic.

    `fastmath` stays off (the rasterizer's error bounds need IEEE rounding) and so does
    `parallel` (its thread pool dies on fork and on two calling threads).
    """
    compiled: Function
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # neither beside the package nor in the user's cache directory can anything be written
        compiled = numba.njit(nogil=True)(function)
    return compiled
