"""What `transformers`' Trainer writes of our models, and reads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of, hf_model, our_model

import mllama
from mllama.checkpoints.checkpoint import CheckpointError

SHAPE = Shape(
    layers=2, cross=(1,), local_layers=1, global_layers=1, taps=(0,), tile_side=28, head_dim=32
)


@pytest.fixture(scope="module")
def hf() -> Any:
    torch.manual_seed(0)
    return hf_model(SHAPE)


@pytest.fixture
def ours(hf: Any) -> Any:
    return our_model(SHAPE, hf)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    batch = batch_of(SHAPE, [Prompt(6, (1,), (2,)) for _ in range(6)])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == SHAPE.vocab, -100)
    return [{name: value[row] for name, value in batch.items()} for row in range(6)]


def _trainer(model: Any, rows: list, folder: Path, **options: Any) -> transformers.Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
    } | options
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows[:2],
    )


def _batch(rows: list) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows[:2]]) for name in rows[0]}


def _logits(model: Any, rows: list) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**_batch(rows), use_cache=False).logits


def _load(folder: Path, **options: Any) -> Any:
    cls = mllama.MllamaForConditionalGeneration
    return cls.from_pretrained(folder, backend="reference", **options)


def test_checkpoints_load_again(ours: Any, rows: list, tmp_path: Path) -> None:
    trainer = _trainer(ours, rows, tmp_path)
    trainer.train()
    expected = _logits(ours, rows)
    last = tmp_path / "checkpoint-3"
    with pytest.raises(CheckpointError, match="give config="):
        _load(last)
    again = _load(last, config=ours.config)
    assert _logits(again, rows).equal(expected)
    ours.save_pretrained(tmp_path / "saved")
    again = _load(tmp_path / "saved")
    assert _logits(again, rows).equal(expected)
    again = _load(last, config=tmp_path / "saved")
    assert _logits(again, rows).equal(expected)
    trainer.save_model(str(tmp_path / "final"))
    again = _load(tmp_path / "final", config=ours.config)
    assert _logits(again, rows).equal(expected)


def test_a_run_that_resumes_ends_where_one_would_have(hf: Any, rows: list, tmp_path: Path) -> None:
    whole = our_model(SHAPE, hf)
    _trainer(whole, rows, tmp_path / "whole").train()
    resumed = our_model(SHAPE, hf)
    _trainer(resumed, rows, tmp_path / "resumed").train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert _logits(resumed, rows).equal(_logits(whole, rows))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_model_is_loaded_at_the_end(
    adapter: bool, ours: Any, rows: list, tmp_path: Path
) -> None:
    model = ours
    if adapter:
        model = peft.get_peft_model(ours, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = _trainer(
        model,
        rows,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(trainer.state.best_metric)
    if not adapter:
        again = _load(best, config=ours.config)
        assert _logits(again, rows).equal(_logits(ours, rows))
