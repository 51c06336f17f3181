"""`mllama finetune` on quantised weights: made while loading, and of a published 4-bit checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_writer import as_type, write_split
from published_folders import FOLDERS, write_folder

from mllama import MllamaForConditionalGeneration, cli
from mllama.commands import finetune as command
from mllama.demo import checkpoint_path, sample_picture
from mllama.quantization.decoded import decoded_copy
from mllama.training.adapters import add_adapters
from mllama.training.log import read_log
from mllama.training.memory import Batch, TrainingPlan, training_plan
from mllama.training.options import TrainingOptions

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


def test_adapters_on_a_model_in_two_gguf_files(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    text, projector = tmp_path / "text.gguf", tmp_path / "projector.gguf"
    write_split(checkpoint_path(), text, projector, as_type("Q8_0"))
    steps = ("--max-steps", "2", "--lora-rank", "2")
    assert finetune(text, data, tmp_path / "out", *steps) == 1
    assert "projector" in capsys.readouterr().err
    with_projector = ("--projector", str(projector))
    assert finetune(text, data, tmp_path / "out", *steps, *with_projector) == 0
    plain = decoded(text, tmp_path / "plain", projector=projector)
    assert finetune(plain, data, tmp_path / "of plain", *steps) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "of plain"), rel=1e-3)


def test_a_run_that_does_not_fit_is_refused_with_what_does(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    tmp_path: Path,
) -> None:
    room, plans = [10**6], []

    def recorded(*given: Any, **options: Any) -> TrainingPlan:
        plans.append(training_plan(*given, **options))
        return plans[-1]

    monkeypatch.setattr(command, "free_bytes", lambda device: room[-1])
    monkeypatch.setattr(command, "training_plan", recorded)
    output = tmp_path / "out"
    asked = ("--max-steps", "1", "--lora-rank", "2", "--quantization-encoding", "q8_0")
    assert finetune(checkpoint_path(), data, output, *asked) == 1
    said = capsys.readouterr().err
    parts = "weights .*, adapters .*, gradients .*, optimizer .*, activations .*, workspace .*"
    assert re.search(
        rf"takes [\d.]+ GB \({parts}\), cpu has 0.00 GB free: [\d.]+ GB are missing", said
    )
    assert "may fit; --force trains all the same" in said
    room.append(plans[-1].total - 1)
    assert finetune(checkpoint_path(), data, output, *asked) == 1
    assert "; --gradient-checkpointing fits; --force" in capsys.readouterr().err
    assert finetune(checkpoint_path(), data, output, *asked, "--gradient-checkpointing") == 0
    room.append(10**6)
    assert finetune(checkpoint_path(), data, tmp_path / "forced", *asked, "--force") == 0


@pytest.mark.parametrize(
    ("options", "dtype", "quantization"),
    [
        (TrainingOptions(lora_rank=4), "bfloat16", "q8_0"),
        (TrainingOptions(lora_rank=4), "float32", None),
        (TrainingOptions(lora_rank=4, lora_dropout=0.5, lora_vision=True), "bfloat16", None),
        (TrainingOptions(lora_rank=0), "float32", None),
    ],
)
def test_what_a_step_keeps_is_as_planned(
    options: TrainingOptions, dtype: str, quantization: str | None
) -> None:
    model = MODEL.from_pretrained(
        checkpoint_path(), device="cpu", dtype=dtype, quantization=quantization
    )
    config, vision = model.config, model.config.vision_config
    learner = add_adapters(model, options, "") if options.lora_rank else model
    tokens, tiles, side = 400, vision.max_num_tiles, vision.image_size
    ids = torch.full((1, tokens), 5)
    ids[0, 1] = config.image_token_index
    inputs = {
        "pixel_values": torch.randn(1, 1, tiles, 3, side, side),
        "aspect_ratio_ids": torch.full((1, 1), 6),
        "aspect_ratio_mask": torch.ones(1, 1, tiles).long(),
        "cross_attention_mask": torch.ones(1, tokens, 1, tiles).long(),
    }
    own = {t.untyped_storage().data_ptr() for t in (*learner.parameters(), *learner.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.train()(
            input_ids=ids, labels=ids.masked_fill(ids == 5, -100), use_cache=False, **inputs
        )
    measured = sum(storage.nbytes() for storage in kept.values())
    batch = Batch(rows=1, tokens=tokens, targets=0, images=1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    made = training_plan(config, weights, dtype, batch, options)
    assert 0.95 * measured <= made.activations <= 1.3 * measured
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    assert made.gradients == 4 * trained and made.optimizer == 8 * trained
