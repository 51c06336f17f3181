"""`mllama finetune`: rows of several conversations, schedules, loggers, and the shares of ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations
from model_helpers import BACKENDS
from test_finetune import (
    MODEL,
    assert_same_run,
    conversation,
    data,
    finetune,
    losses,
    one_thread,
    said,
    write,
)

from mllama import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from mllama.loss import IGNORED
from mllama.training.batches import Share, collate, targets_of
from mllama.training.encoding import Example, read_examples
from mllama.training.log import read_log
from mllama.training.memory import Batch, training_plan
from mllama.training.options import SCHEDULES, TrainingOptions
from mllama.training.packing import packed

__all__ = ["data", "one_thread"]  # fixtures


@pytest.fixture(scope="module")
def processor() -> MllamaProcessor:
    return MllamaProcessor.from_pretrained(MODEL)


def example(length: int, number: int = 0) -> Example:
    return Example(number, [5] * length, [5] * length, [], Path())


# Packing


def test_rows_are_filled_and_nothing_is_cut() -> None:
    lengths = torch.randint(1, 40, (200,)).tolist()
    rows = packed([example(n, i) for i, n in enumerate(lengths)], 64)
    assert sorted(n for row in rows for n in row.texts) == sorted(lengths)
    assert all(sum(row.texts) == len(row.input_ids) <= 64 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 64 + 1
    again = packed([example(n, i) for i, n in enumerate(lengths)], 64)
    assert rows == again
    for row in rows:
        begin = 0
        for count in row.texts:
            assert row.labels[begin] == IGNORED
            begin += count
    assert targets_of(rows) == sum(lengths) - len(lengths)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_packed_row_learns_what_its_conversations_do(
    backend: tuple[str, str], processor: MllamaProcessor, data: Path
) -> None:
    """Images before text and after, several in one, and padding behind."""
    picture = data.parent / "photos" / "1.png"
    write(
        data,
        conversation("photos/0.png"),
        [said("user", "Hello"), said("assistant", "two words")],
        [said("user", "Both?", "photos/2.png", "photos/3.png"), said("assistant", "no")],
        conversation(f"photos/{picture.name}", answer="red"),
        [said("user", "And you?"), said("assistant", "I am")],
    )
    examples = read_examples(data, processor, 1000)
    rows = packed(examples, sum(len(e.input_ids) for e in examples[:3]) + 5)
    assert [len(row.texts) for row in rows] != [1] * len(examples) and len(rows) == 2
    model = MllamaForConditionalGeneration.from_pretrained(
        MODEL, dtype=torch.float32, backend=backend[0], semantics="meta"
    ).train()
    weight = model.model.language_model.layers[1].cross_attn_attn_gate
    keys = model.model.language_model.layers[0].self_attn.k_proj.weight
    found = []
    for batches in ([collate(processor, rows)], [collate(processor, [e]) for e in examples]):
        total = targets_of(examples)
        loss = sum(model(**b, num_items_in_batch=total, return_logits=False).loss for b in batches)
        found.append((loss.item(), *torch.autograd.grad(loss, (weight, keys))))
    one, other = found
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for a, b in zip(one[1:], other[1:]):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_packing_trains(capsys: Any, data: Path) -> None:
    output = data.parent / "out"
    assert finetune(data, output, "--packing") == 1
    assert "packing needs max_length: the tokens of a row" in capsys.readouterr().err
    assert not output.exists()
    options = ("--packing", "--max-length", "60", "--max-steps", "3", "--learning-rate", "0.02")
    assert finetune(data, output, *options) == 0
    assert "6 conversations in 3 rows, 3 steps" in capsys.readouterr().err
    found = losses(output)
    assert found[-1]["loss"] < found[0]["loss"]


# Ranks


@pytest.mark.parametrize("alike", [False, True])
def test_every_rank_has_as_many_batches(processor: MllamaProcessor, alike: bool) -> None:
    image = processor.image_token_id
    rows = [
        Example(i, [5, *[image] * has, 6], [5, *[image] * has, 6], ["x"] * has, Path())
        for i, has in enumerate((1, 0, 0, 0, 0, 0, 0))
    ]
    shares = [Share(processor, 2, rank, 3, alike) for rank in range(3)]
    by_rank = [share.batches(rows) for share in shares]
    assert {len(batches) for batches in by_rank} == {shares[0].count(len(rows))} == {2}
    real = [e for batches in by_rank for batch in batches for e in batch if e in rows]
    assert sorted(e.line for e in real) == list(range(7))
    silent = [e for batches in by_rank for batch in batches for e in batch if e not in rows]
    assert all(label == IGNORED for e in silent for label in e.labels)
    with_images = [[any(e.images for e in batch) for batch in batches] for batches in by_rank]
    assert with_images == [[True, False]] + [[alike, False]] * 2
    for batch in by_rank[2]:
        if all(not isinstance(i, str) for e in batch for i in e.images):
            assert collate(processor, batch)["labels"].shape[0] == len(batch)


def test_pieces_take_less() -> None:
    config = MllamaConfig.from_pretrained(MODEL)
    given = (config, 4 * 10**9, "bfloat16", Batch(1, 100, 10, 1), TrainingOptions(lora_rank=0))
    whole, half = training_plan(*given), training_plan(*given, pieces=2)
    assert half.gradients == whole.gradients / 2 and half.optimizer == whole.optimizer / 2
    assert half.weights < whole.weights / 2 and half.workspace > 0


# The environment


def test_the_environment_changes_nothing(capsys: Any, monkeypatch: Any, data: Path) -> None:
    """Where `accelerate launch` or a job's template has set what `accelerate` reads."""
    variables = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    }
    sender = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(sender, "kubeflow", None)  # raises when it is made
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1:9")
    asked = ("--max-steps", "2", "--eval-data", str(data))
    assert finetune(data, data.parent / "plain", *asked) == 0
    assert "warning" not in capsys.readouterr().err
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert finetune(data, data.parent / "told", *asked) == 0
    assert re.search(f"warning: not used: .*{min(variables)}", capsys.readouterr().err)
    assert_same_run(data.parent / "plain", data.parent / "told")
    assert {name: os.environ[name] for name in variables} == variables


# Rates and loggers


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, data: Path) -> None:
    options = TrainingOptions(warmup=0.25, learning_rate=1.0, schedule=name)
    rates = [options.rate(step, 8) for step in range(8)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert (rates[-1] == 1) == (name == "constant") and rates[-1] > 0
    if name == "linear":
        assert rates[2:] == pytest.approx([1 - i / 6 for i in range(6)])
    chosen = ("--max-steps", "4", "--warmup", "0.25", "--schedule", name, "--learning-rate", "1")
    assert finetune(data, data.parent / "out", *chosen) == 0
    taken = [entry["learning_rate"] for entry in losses(data.parent / "out")]
    assert taken == [options.rate(step, 4) for step in range(4)]


def test_a_logger_that_is_not_there(capsys: Any, monkeypatch: Any, data: Path) -> None:
    finder = "get_available_reporting_integrations"
    monkeypatch.setattr(transformers.integrations, finder, lambda: ["tensorboard"])
    for name, message in {
        "paper": "--report-to must be one of .*tensorboard.*; got 'paper'",
        "wandb": r"--report-to wandb: it is not installed \(there is: tensorboard\)",
    }.items():
        assert finetune(data, data.parent / "out", "--report-to", name) == 1
        assert re.search(message, capsys.readouterr().err) and not (data.parent / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed: pip install tensorboard",
)
def test_tensorboard_has_what_the_log_has(data: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = data.parent / "out"
    asked = ("--max-steps", "2", "--report-to", "tensorboard", "--eval-data", str(data))
    assert finetune(data, output, *asked) == 0
    (file,) = output.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    log = read_log(output / "log.jsonl")
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    expected = [(e["step"], e["loss"]) for e in log if "loss" in e]
    assert [s for s, _ in found] == [s for s, _ in expected]
    assert [v for _, v in found] == pytest.approx([v for _, v in expected])
    assert [e.value for e in events.Scalars("eval/loss")] == pytest.approx([log[-1]["eval_loss"]])


@pytest.mark.parametrize("name", ["transformers", "accelerate"])
def test_without_the_extra(capsys: Any, monkeypatch: Any, data: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert finetune(data, data.parent / "out", "--lora-rank", "0") == 1
    said = capsys.readouterr().err
    assert f"training needs {name}: pip install 'mllama-kernels[train]'" in said
    assert not (data.parent / "out").exists()


def test_the_configuration_is_that_of_the_model(data: Path) -> None:
    """Trainer writes use_cache into the model's, which a checkpoint would then record."""
    output = data.parent / "out"
    assert finetune(data, output, "--max-steps", "1", "--lora-rank", "0") == 0
    expected = MllamaForConditionalGeneration.from_pretrained(MODEL, dtype="float32")
    expected.save_pretrained(data.parent / "as it was")
    one, other = (
        json.loads((folder / "config.json").read_text())
        for folder in (output, data.parent / "as it was")
    )
    assert one == other
