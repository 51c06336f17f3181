"""Opening files that somebody else named: only regular ones, without waiting, never more than asked for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# Kernel interfaces that look like files: reading one can block, tell secrets or have effects.
_KERNEL_FILES = frozenset(
    "proc sysfs debugfs tracefs securityfs cgroup cgroup2 pstore bpf configfs efivarfs fusectl "
    "binfmt_misc devpts selinuxfs nsfs rpc_pipefs".split()
)
_MOUNTS = Path("/proc/self/mountinfo")


class FileRefused(ValueError):
    """A file that cannot be read, or is none. The message is only the reason: the caller names the file."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading, on a file system that holds files.

    A pipe without a writer, a device or a file of procfs or sysfs is refused and not waited for.

    Raises: FileRefused with the reason: missing, not permitted, or of another kind.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Before opening as well: opening some devices has effects.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileRefused("it is not a regular file")
        descriptor = os.open(path, flags)
    except FileRefused:
        raise
    except OSError as error:
        raise FileRefused(_reason(error)) from None
    except ValueError as error:  # a NUL, a lone surrogate
        raise FileRefused(f"no file can be called so: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileRefused("it is not a regular file")
        kind = _file_system(status.st_dev)
        if kind in _KERNEL_FILES:
            raise FileRefused(f"it is not a regular file but one of {kind}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike) -> int:
    """The length of a regular file in bytes, for libraries that open it themselves.

    Raises: FileRefused as `open_regular`.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def read_regular(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises: FileRefused as `open_regular`, and for more than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FileRefused(f"it has {size} bytes; at most {max_bytes} are read")
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise FileRefused(_reason(error)) from None
    if len(data) > max_bytes:
        raise FileRefused(f"it grows; at most {max_bytes} bytes are read")
    return data


def read_text(path: str | os.PathLike, max_bytes: int) -> str:
    """The text of a UTF-8 file.

    Raises: FileRefused as `read_regular`, and for bytes that are no UTF-8.
    """
    data = read_regular(path, max_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileRefused(f"it is no UTF-8 text: byte {error.start} cannot be decoded") from None


def _file_system(device: int) -> str | None:
    """The kind of the file system with this device number; None where the system does not tell."""
    wanted = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [wanted]:
            return after.split()[0] if after else None
    return None


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return "it is not a regular file"
    return error.strerror or type(error).__name__
