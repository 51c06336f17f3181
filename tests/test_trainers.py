"""The trainers of `transformers` and TRL on our model and on an accelerated one, against a plain one."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of, hf_model, our_model
from torch import Tensor, nn

from mllama_kernels.transformers import accelerate

SHAPE = Shape(tile_side=28, layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)
Make = Callable[[nn.Module], nn.Module]


def accelerated(hf: nn.Module) -> nn.Module:
    accelerate(hf, loss=True)
    return hf


WAYS: dict[str, Make] = {
    "ours": functools.partial(our_model, SHAPE, backend=("auto", "cpu")),
    "accelerated": accelerated,
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Tensor]]:
    """Four examples with different numbers of targets; the first token of one is a label, but no target."""
    torch.manual_seed(0)
    found = []
    for ignored in (2, 6, 0, 5):
        batch = batch_of(SHAPE, [Prompt(9, (1,), (2,))])
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == SHAPE.vocab, -100)
        labels[:, :ignored] = -100
        found.append({k: v[0] for k, v in (batch | {"labels": labels}).items()})
    return found


def model() -> nn.Module:
    torch.manual_seed(1)
    return hf_model(SHAPE)


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained(
    model: nn.Module, rows: list[dict[str, Tensor]], folder: Path, **options: Any
) -> tuple[list[float], float]:
    """The losses of two steps and of the examples afterwards."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        learning_rate=1e-2,
        optim="sgd",
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=stacked
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_accumulate_to_those_of_one_batch(
    way: str, gradient_checkpointing: bool, rows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    whole = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    expected, after = trained(model(), rows, tmp_path, **whole)
    options = {"gradient_checkpointing": gradient_checkpointing}
    if gradient_checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    for sizes in (whole, parts):
        sizes = sizes | {"per_device_eval_batch_size": 4}
        losses, at_last = trained(WAYS[way](model()), rows, tmp_path, **sizes, **options)
        assert losses == pytest.approx(expected, rel=1e-4)
        assert at_last == pytest.approx(after, rel=1e-4)


def test_predictions_are_the_logits(rows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Trainer asks whether an output is a dictionary; where the loss is not the model's, or there is none,
    another one would lose its first field."""
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    ours = WAYS["ours"](model())
    for given, options in (
        (rows, {}),
        (rows, {"label_smoothing_factor": 0.1}),
        (unlabelled, {}),
        (rows, {"bf16_full_eval": True}),
    ):
        hf = model()
        hf.config.text_config.use_cache = False  # Trainer cannot gather the cache of transformers
        expected, got = (
            transformers.Trainer(
                one,
                transformers.TrainingArguments(
                    output_dir=str(tmp_path),
                    report_to=[],
                    use_cpu=True,
                    disable_tqdm=True,
                    **options,
                ),
                data_collator=stacked,
            ).predict(given)
            for one in (hf, ours)
        )
        tolerance = 2**-5 if "bf16_full_eval" in options else 1e-4
        scale = abs(expected.predictions).max()
        assert abs(got.predictions - expected.predictions).max() <= tolerance * scale
        loss = expected.metrics.get("test_loss")
        assert got.metrics.get("test_loss") == (loss and pytest.approx(loss, rel=tolerance))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(ours, arguments, train_dataset=unlabelled, data_collator=stacked)
    with pytest.raises(ValueError, match="The model did not return a loss"):
        trainer.train()


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install trl"
)
@pytest.mark.parametrize("way", WAYS)
def test_sft_trainer(way: str, rows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    import datasets
    import trl
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SHAPE.vocab)}, unk_token="t3"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2"
    )
    ids = [torch.randint(3, SHAPE.vocab, (length,)).tolist() for length in (9, 12, 7, 10)]

    def losses(model: nn.Module) -> list[float]:
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            learning_rate=1e-2,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        data = datasets.IterableDataset.from_generator(lambda: ({"input_ids": i} for i in ids))
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(WAYS[way](model())) == pytest.approx(losses(model()), rel=1e-3)
