"""The examples, each run as a user runs it, with the frameworks that are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
STEPS = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples make where no file is given."""
    sys.path.insert(0, str(CHECKOUT / "examples"))
    try:
        from cohort import make_file
    finally:
        sys.path.pop(0)
    path: Path = make_file(tmp_path_factory.mktemp("examples"))
    return path


@pytest.mark.parametrize(
    ("example", "framework", "backend"),
    [
        ("unet_numpy.py", "numpy", ""),
        ("unet_pytorch.py", "torch", ""),
        ("unet_jax.py", "jax", ""),
        ("unet_keras.py", "keras", "torch"),
        ("unet_keras.py", "keras", "jax"),
        ("unet_keras.py", "keras", "tensorflow"),
    ],
)
def test_the_example_learns(example: str, framework: str, backend: str, file: Path) -> None:
    """It trains on the synthetic cohort and ends well only if the loss falls."""
    for name in (framework, backend or framework):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    quiet = {"PYTHONPATH": str(CHECKOUT), "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "examples" / example), str(file), "--steps", str(STEPS)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()

    assert done.returncode == 0, done.stderr[-2000:]
    assert lines[0].startswith("step    0  loss ")
    assert len(lines) > 4
