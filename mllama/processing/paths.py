"""Which files may be read for somebody: all, none, or those of one folder.

`allow_paths` is True for one's own words, False where nothing of the disk may be read, and a folder where
what lies in it may. Files are named from the current directory, as without it: a folder opens none that is
elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from mllama.files import FileRefused
from mllama.wording import quoted

AllowPaths = bool | str | os.PathLike
FILES_REFUSED = (
    "names a file, and nothing is read from the disk here (allow_paths=False): give a data URI, base64, the "
    "file's bytes or an open file"
)


def check_allow_paths(allow_paths: AllowPaths) -> None:
    """Raises: TypeError or ValueError for what is neither a bool nor a folder."""
    if isinstance(allow_paths, bool):
        return
    if not isinstance(allow_paths, (str, os.PathLike)):
        kind = type(allow_paths).__name__
        raise TypeError(f"allow_paths must be True, False or a folder, got {kind}")
    if not os.fspath(allow_paths) or not os.path.isdir(allow_paths):
        raise ValueError(f"allow_paths names no folder: {quoted(str(allow_paths))}")


def checked_path(path: str | os.PathLike, allow_paths: AllowPaths) -> Path:
    """The file to open for this name, links resolved where only those of a folder are allowed.

    Raises: FileRefused, with the same words whether or not there is such a file.
    """
    if allow_paths is True:
        return Path(os.fsdecode(path))
    if allow_paths is False:
        raise FileRefused(FILES_REFUSED)
    try:
        found = Path(os.path.realpath(os.fsdecode(path)))
        if found.is_relative_to(os.path.realpath(allow_paths)):
            return found
    except (OSError, ValueError):  # a NUL, a lone surrogate: no file can be called so
        pass
    raise FileRefused("names a file that is not inside the folder of allow_paths")


def may_exist(path: str, allow_paths: AllowPaths) -> bool:
    """Whether this is the name of a file that may be read; False where it may not."""
    try:
        return checked_path(path, allow_paths).exists()
    except (OSError, ValueError):
        return False
