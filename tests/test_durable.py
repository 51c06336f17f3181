"""Files of weights on a disk that is full."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_finetune import MODEL, assert_same_run, data, finetune, one_thread

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.durable import replace_file, save_file

resource = pytest.importorskip("resource")  # not of Windows

__all__ = ["data", "one_thread"]  # fixtures


@contextmanager
def full_disk() -> Iterator[None]:
    """A file may have 4096 bytes, and what is written behind them fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_file_is_named_and_the_one_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    replace_file(path, lambda temporary: save_file({"a": torch.ones(3)}, temporary))
    before = path.read_bytes()
    with (
        full_disk(),
        pytest.raises(OSError, match=r"weights\.safetensors.* could not be written: .*large"),
    ):
        replace_file(path, lambda temporary: save_file({"a": torch.ones(5000)}, temporary))
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    model = MllamaForConditionalGeneration.from_pretrained(MODEL, device="cpu")
    with full_disk(), pytest.raises(OSError, match=r"model\.safetensors.* could not be written"):
        model.save_pretrained(tmp_path / "saved")
    assert not any(path.name.endswith(".safetensors") for path in tmp_path.rglob("*"))


def test_a_run_says_so_and_goes_on_later(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    whole, stopped = data.parent / "whole", data.parent / "stopped"
    asked = ("--max-steps", "4", "--save-every", "2")
    assert finetune(data, whole, *asked) == 0
    capsys.readouterr()
    with full_disk():
        assert finetune(data, stopped, *asked) == 1
    assert "could not be written" in capsys.readouterr().err
    assert finetune(data, stopped, *asked, "--resume") == 0
    assert_same_run(whole, stopped)
