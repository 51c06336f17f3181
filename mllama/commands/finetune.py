"""Train adapters (LoRA), or all weights, of a model on conversations about images.

The data is a JSON Lines file with one conversation per line, image paths relative to it:
{"messages": [{"role": "user", "content": [{"type": "image", "path": "1.jpg"}, {"type": "text", "text":
"What is this?"}]}, {"role": "assistant", "content": "A harbour."}]}. The loss is that of what the assistant
says. Images have to be inside the folder of the data, or that of --allow-paths. A run that was killed
continues with --resume and ends as if it had not been."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mllama import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from mllama.checkpoints.weights import plan_source
from mllama.commands.common import add_execution_arguments, what_runs
from mllama.commands.loading import (
    add_projector_argument,
    add_quantization_arguments,
    dtype_of,
    overrides_of,
)
from mllama.commands.usage import UsageError
from mllama.memory import free_bytes
from mllama.processing.paths import check_allow_paths
from mllama.quantization.plan import weight_bytes
from mllama.quantization.policy import PLAIN
from mllama.training.adapters import add_adapters, require_peft, save_adapter
from mllama.training.conversations import DataError
from mllama.training.encoding import Example, read_examples
from mllama.training.environment import without_accelerate_variables
from mllama.training.folder import RunFolder, fingerprint
from mllama.training.memory import Batch, refusal, training_plan
from mllama.training.options import SCHEDULES, TrainingOptions
from mllama.training.packing import packed
from mllama.training.ranks import TrainingRanks
from mllama.training.reporting import check_report_to, require_trainer
from mllama.training.state_folders import remove_others
from mllama.wording import listed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The fields of TrainingOptions, in the order a reader needs them.
_TRAINING = {
    "length and batches": {
        "epochs": "passes over the data",
        "max_steps": "optimiser steps instead of epochs; 0: epochs",
        "batch_size": "conversations (with --packing: rows) that a rank computes at once",
        "accumulate": "batches of every rank per optimiser step",
        "packing": "fill rows of --max-length tokens with as many conversations as fit",
        "max_length": "refuse conversations of more tokens; 0: what the model takes",
        "gradient_checkpointing": "compute layers twice to save memory",
    },
    "optimiser": {
        "learning_rate": "its peak; 0: 2e-4 for adapters, 1e-5 for all weights",
        "warmup": "share of the steps in which the rate rises",
        "schedule": "how it falls to 0 then; constant: it does not",
        "weight_decay": "of matrices",
        "max_grad_norm": "longer gradients are scaled down to it; 0: never",
    },
    "adapters": {
        "lora_rank": "rank of the adapters; 0 trains all weights",
        "lora_alpha": "adapters are scaled by alpha / rank; 0: twice the rank",
        "lora_dropout": "share of an adapter's inputs that is zeroed in training",
        "lora_vision": "adapters in the vision tower too",
    },
    "run": {
        "save_every": "steps between checkpoints of the run",
        "seed": "of adapters, dropout and the order of the data",
        "escape_special_tokens": "read special tokens in the data's words, such as <|eot_id|>, as plain text",
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model, data and output")
    group.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="checkpoint folder, GGUF file, or hub id with the extra hub",
    )
    add_projector_argument(group)
    group.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="conversations to train on (JSONL)"
    )
    group.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the adapter, log and checkpoints",
    )
    group.add_argument("--resume", action="store_true", help="continue the run in --output")
    group.add_argument(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="others whose loss is measured at checkpoints",
    )
    group.add_argument(
        "--allow-paths",
        type=Path,
        metavar="DIR",
        help="folder that the data's images have to be inside of (default: that of each data file)",
    )
    group.add_argument(
        "--report-to",
        action="append",
        default=[],
        metavar="NAME",
        help="a logger beside log.jsonl, such as tensorboard or wandb; may be repeated",
    )
    add_quantization_arguments(group)
    group.add_argument(
        "--force", action="store_true", help="train also where the memory plan says it does not fit"
    )
    fields = {field.name: field.default for field in dataclasses.fields(TrainingOptions)}
    for title, options in _TRAINING.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            default = fields[name]
            kind: dict[str, Any] = {"type": type(default), "metavar": "N"}
            if isinstance(default, float):
                kind["metavar"] = "X"
            if default is False:
                kind = {"action": "store_true"}
            elif default is True:
                kind = {"action": argparse.BooleanOptionalAction}
            elif name == "schedule":
                kind = {"choices": tuple(SCHEDULES)}
            group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **kind)
    add_execution_arguments(
        parser,
        ("auto", *DTYPES),
        "computed in; auto: the checkpoint's. What is trained is kept in float32",
        several_devices=False,
    )


def run(options: argparse.Namespace) -> int:
    with TrainingRanks.started(options.device) as ranks:
        with ranks.together():
            training = _checked(options)
        with without_accelerate_variables(ranks.is_first):
            return _run(options, training, ranks)


def _checked(options: argparse.Namespace) -> TrainingOptions:
    """What is asked for. Raises: whatever is wrong with it as such, before the data is read."""
    names = [field.name for field in dataclasses.fields(TrainingOptions)]
    training = TrainingOptions(**{name: getattr(options, name) for name in names})
    require_trainer()
    if training.lora_rank:
        require_peft()
    elif options.quantization_encoding not in (None, *PLAIN):
        raise UsageError(
            "--lora-rank 0 trains all weights, and --quantization-encoding makes weights that cannot be "
            "trained"
        )
    check_report_to(options.report_to)
    dtype_of(options)
    overrides_of(options)
    return training


def _run(options: argparse.Namespace, training: TrainingOptions, ranks: TrainingRanks) -> int:
    with ranks.together():
        processor = MllamaProcessor.from_pretrained(options.model, projector=options.projector)
        source = _Source.of(options)
        if not training.lora_rank and source.encoding is not None:
            raise ValueError(
                f"the weights are quantised ({source.encoding}) and cannot be trained: --lora-rank trains "
                "adapters on them"
            )
        most = source.config.text_config.max_position_embeddings
        limit = min(training.max_length or most, most)
        examples, held_out = _read(options, training, processor, limit)
        count = len(examples)
        if training.packing:
            examples = packed(examples, limit)
        if not options.force:
            _require_fit(options, training, source, examples, ranks)
    with ranks.together():
        asked = _asked(options, training)
    first = ranks.from_first(asked)
    with ranks.together():
        _require_same(asked, first)
    opened: RunFolder | None = None
    with ranks.together():
        if ranks.is_first:
            opened = RunFolder(options.output, asked, options.resume, ranks.size)
    folder = ranks.from_first(opened)
    with ranks.together():
        if not folder.path.is_dir():
            raise ValueError(f"{folder.path} is not there: all ranks write to the same folder")
    if folder.is_finished:
        _say(ranks, f"the run in {options.output} is finished")
        return 0
    is_sharded = ranks.size > 1 and not training.lora_rank
    with ranks.together():
        torch.manual_seed(training.seed)
        model, autocast = _load(options, training, ranks)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    if is_sharded:
        from mllama.training.sharding import shard

        shard(model, ranks, autocast)
    learner = add_adapters(model, training, options.model) if training.lora_rank else model
    from mllama.training.trainer import FineTuner

    with ranks.together():
        trainer = FineTuner(
            learner.train(),
            processor,
            examples,
            held_out,
            training,
            ranks,
            folder,
            autocast=None if is_sharded else autocast,
            is_sharded=is_sharded,
            report_to=options.report_to,
        )
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    rows = f" in {len(examples)} rows" if training.packing else ""
    _say(
        ranks,
        f"{count} conversations{rows}, {trainer.steps} steps, {trained:,} trained parameters, backend "
        f"{what_runs(model)}{trainer.among}",
    )
    trainer.run()
    if training.lora_rank:
        if ranks.is_first:
            save_adapter(learner, folder.path)
    else:
        from mllama.training.sharding import save_whole

        dtype = autocast or torch.float32
        save_whole(model, folder.path, dtype, ranks, processor.save_pretrained)
    if ranks.is_first:
        remove_others(
            folder.path, None
        )  # only now: until the result is whole, a resumed run writes it again
    _say(ranks, f"written to {folder.path}")
    return 0


def _say(ranks: TrainingRanks, text: str) -> None:
    if ranks.is_first:
        print(text, file=sys.stderr)


def _read(
    options: argparse.Namespace,
    training: TrainingOptions,
    processor: MllamaProcessor,
    limit: int,
) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those held out. Raises: as `read_examples`, for both files together."""
    read, faults = [], []
    if options.allow_paths is not None:
        check_allow_paths(options.allow_paths)
    chosen = {
        "escape_special_tokens": training.escape_special_tokens,
        "folder": options.allow_paths,
    }
    for path in (options.data, options.eval_data):
        try:
            read.append([] if path is None else read_examples(path, processor, limit, **chosen))
        except (DataError, OSError) as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ValueError("\n".join(map(str, faults)))
    return read[0], read[1]


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is known of a checkpoint from the headers of its files.

    Attributes:
        encoding: of what is stored quantised, else None.
        weights: bytes of the model as it is loaded.
        dtype: of what is not quantised, as it is loaded.
    """

    config: MllamaConfig
    encoding: str | None
    weights: int
    dtype: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Source:
        found = plan_source(
            MllamaForConditionalGeneration, options.model, projector=options.projector
        )
        dtype, nbytes = dtype_of(options) or found.dtype, found.nbytes
        asked = options.quantization_encoding
        if found.stored is None or asked not in (None, found.stored, *PLAIN):
            encoding = dtype if asked is None or asked in PLAIN else asked
            nbytes = weight_bytes(found.config, encoding, overrides_of(options) or None, dtype)
        return cls(found.config, found.stored, nbytes, dtype)


def _require_fit(
    options: argparse.Namespace,
    training: TrainingOptions,
    source: _Source,
    examples: list[Example],
    ranks: TrainingRanks,
) -> None:
    """Raises: ValueError where the device has not the room to train in, with what is missing and the nearest
    choice that fits."""
    device = ranks.device
    free, batch = free_bytes(device), Batch.of(examples, training.batch_size)
    if free is None or source.dtype not in DTYPES:  # the second is refused when it is loaded
        return
    if device.type == "cpu":
        free //= ranks.on_this_host
    given = (source.config, source.weights, source.dtype, batch, training)
    pieces = 1 if training.lora_rank else ranks.size
    made = training_plan(*given, device.type, pieces=pieces)
    if made.total > free:
        is_plain = source.encoding is None and options.quantization_encoding in (None, *PLAIN)
        text = refusal(made, free, device, *given, can_quantize=is_plain, pieces=pieces)
        raise ValueError(f"{text}; --force trains all the same")


def _asked(options: argparse.Namespace, training: TrainingOptions) -> dict[str, Any]:
    """What decides the result of a run, besides the images' content and the versions installed."""
    named = ("model", "device", "dtype", "backend", "semantics")
    asked = {name: getattr(options, name) for name in named} | dataclasses.asdict(training)
    others = ("quantization_encoding", "quantization_override", "projector")
    asked |= {name: getattr(options, name) for name in others if getattr(options, name)}
    asked["data"] = fingerprint(options.data)
    asked["eval_data"] = fingerprint(options.eval_data) if options.eval_data else None
    return asked


def _require_same(asked: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises: ValueError where this rank was asked for something else than the first. Where the files of the
    model are may differ between machines."""
    names = (asked.keys() | first.keys()) - {"model", "projector"}
    if differ := sorted(name for name in names if asked.get(name) != first.get(name)):
        raise ValueError(
            f"{listed(differ)} here, and something else on rank 0: all ranks train on the same data, with "
            "the same options"
        )


def _load(
    options: argparse.Namespace, training: TrainingOptions, ranks: TrainingRanks
) -> tuple[MllamaForConditionalGeneration, torch.dtype | None]:
    """The model in its dtype, or where all weights are trained in float32 with the dtype to compute in; on
    the host and as it is stored where it is to be cut in pieces."""
    whole = training.lora_rank == 0
    is_cut = whole and ranks.size > 1
    encoding = options.quantization_encoding
    model = MllamaForConditionalGeneration.from_pretrained(
        options.model,
        dtype=dtype_of(options),
        device="cpu" if is_cut else ranks.device,
        backend=options.backend,
        semantics=options.semantics,
        quantization=None if encoding in PLAIN else encoding,
        quantization_overrides=overrides_of(options) or None,
        projector=options.projector,
        force=options.force,
    )
    if model.dtype not in DTYPES.values():
        raise ValueError(f"the checkpoint is {model.dtype}: choose a --dtype to train in")
    if not whole or model.dtype == torch.float32:
        return model, None
    dtype = model.dtype
    return model if is_cut else model.float(), dtype
