"""Only regular files are opened, without waiting, and no more is read than allowed."""

from __future__ import annotations

import os

import pytest

from mllama.files import FileRefused, check_regular, open_regular, read_regular, read_text


def test_a_file_is_read_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert read_regular(path, 3) == b"abc" and read_text(path, 3) == "abc"
    assert check_regular(path) == 3
    with open_regular(path) as file:
        assert file.read(2) == b"ab"
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 3) == b"abc"


def test_length_and_text_are_checked(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"ab\xff")
    with pytest.raises(FileRefused, match="3 bytes; at most 2"):
        read_regular(path, 2)
    with pytest.raises(FileRefused, match="byte 2"):
        read_text(path, 3)


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/environ",
        "/proc/kmsg",
        "/proc/self/fd/0",
        "/proc/version",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/dev/zero",
        "/dev/null",
        "/",
        "/nowhere",
        "a\0b",
        "\ud800",
        "",
        "a" * 5000,
    ],
)
def test_other_files_are_refused_at_once(path):
    with pytest.raises(FileRefused):
        read_regular(path, 2**20)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileRefused, match="not a regular file"):
        open_regular(tmp_path / "pipe")
