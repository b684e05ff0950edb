"""Files and folders for their owner alone.

Whatever is written holds pictures of patients, and some of it their names: to give it to others is
a decision (`chmod`), not an accident of the umask.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o600, 0o700


def open_private(path: str | Path, flags: int) -> int:
    """A descriptor of a file that only its owner may use, whatever the umask and its mode before.

    Parameters
    ----------
    path
        A symbolic link is not followed: somebody else may have put it there.
    flags
        Those of `os.open`; with O_CREAT the file is made where it is missing.

    Raises
    ------
    OSError
        See `os.open`.
    """
    extra = sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW"))
    descriptor = os.open(path, flags | extra, FILE_MODE)
    if hasattr(os, "fchmod"):
        # a drive without modes cannot be told, and one that was made here has them already
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, FILE_MODE)
    return descriptor


def make_private(folder: Path) -> None:
    """Take a folder and all that is in it from everybody but its owner; links are left alone."""
    for parent, _, files in os.walk(folder):
        with contextlib.suppress(PermissionError):  # as above
            Path(parent).chmod(FOLDER_MODE)
            for file in files:
                path = Path(parent, file)
                if not path.is_symlink():
                    path.chmod(FILE_MODE)
