"""`mllama finetune` on quantised weights: made while loading, and of a published 4-bit checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import FOLDERS, write_folder

from mllama import MllamaForConditionalGeneration, cli
from mllama.demo import checkpoint_path, sample_picture
from mllama.quantization.decoded import decoded_copy
from mllama.training.log import read_log

MODEL = MllamaForConditionalGeneration
QUESTION, ANSWER = "What do you see?", "blue"  # whatever the image shows


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models wait longer for each other's threads than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    sample_picture(1)[0].save(tmp_path / "1.png")
    asked = [{"type": "image", "path": "1.png"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}]
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    return path


def finetune(model: Any, data: Path, output: Path, *options: str) -> int:
    shared = ["--device", "cpu", "--dtype", "float32", "--batch-size", "2", "--accumulate", "1"]
    named = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return cli.main(["finetune", *named, *shared, "--learning-rate", "0.02", *options])


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(output / "log.jsonl") if "loss" in entry]


def decoded(folder: Path, target: Path, **options: Any) -> Path:
    """A plain checkpoint of the values of quantised weights."""
    shutil.copytree(checkpoint_path(), target)
    model = MODEL.from_pretrained(folder, device="cpu", dtype="float32", **options)
    decoded_copy(model, torch.float32, "auto").save_pretrained(target)
    return target


def test_adapters_on_weights_quantised_while_loading(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    quantised = ("--quantization-encoding", "q4_0")
    overrides = ("--quantization-override", "*.down_proj.weight=q8_0")
    steps = ("--max-steps", "12", "--lora-rank", "2")
    output = tmp_path / "out"
    assert finetune(checkpoint_path(), data, output, *steps, *quantised, *overrides) == 0
    assert losses(output)[-1] < 0.3 * losses(output)[0]
    plain = decoded(
        checkpoint_path(),
        tmp_path / "plain",
        quantization="q4_0",
        quantization_overrides={"*.down_proj.weight": "q8_0"},
    )
    few = ("--max-steps", "3", "--lora-rank", "2")
    assert finetune(plain, data, tmp_path / "of plain", *few) == 0
    assert finetune(checkpoint_path(), data, tmp_path / "few", *few, *quantised, *overrides) == 0
    assert losses(tmp_path / "few") == pytest.approx(losses(tmp_path / "of plain"), rel=1e-3)
    ask = ["generate", "--model", str(checkpoint_path()), "--image", str(tmp_path / "1.png")]
    ask += ["--prompt", QUESTION, "--greedy", "--device", "cpu", "--dtype", "float32"]
    ask += ["--adapter", str(output), *quantised, *overrides]
    capsys.readouterr()
    assert cli.main(ask) == 0
    assert capsys.readouterr().out.strip() == ANSWER


def test_adapters_on_a_published_checkpoint_of_four_bits(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nf4"
    write_folder(folder, FOLDERS["bnb nf4"])
    steps = ("--max-steps", "3", "--lora-rank", "2")
    assert finetune(folder, data, tmp_path / "out", *steps) == 0
    plain = decoded(folder, tmp_path / "plain")
    assert finetune(plain, data, tmp_path / "of plain", *steps) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "of plain"), rel=1e-3)


def test_whole_weights_are_not_trained(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    whole = ("--lora-rank", "0")
    asked = (*whole, "--quantization-encoding", "q8_0")
    assert finetune(checkpoint_path(), data, tmp_path / "out", *asked) == 2
    assert "makes weights that cannot be trained" in capsys.readouterr().err
    write_folder(tmp_path / "nf4", FOLDERS["bnb nf4"])
    assert finetune(tmp_path / "nf4", data, tmp_path / "out", *whole) == 1
    assert "quantised (nf4) and cannot be trained" in capsys.readouterr().err
