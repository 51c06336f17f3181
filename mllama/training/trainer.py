"""`transformers`' Trainer with our batches, loss, log and states.

What is ours here is what it does otherwise: a step's examples are a function of the step alone, the loss of
held-out examples is that of their tokens, and a state is there as a whole or not at all.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback

from mllama.processing.processor import MllamaProcessor
from mllama.progress import bar

from .batches import Ahead, Order, Share, collate, targets_of
from .encoding import Example
from .folder import RunFolder
from .log import Log
from .optimizer import adamw
from .options import TrainingOptions
from .ranks import TrainingRanks
from .state import Learned, State, save_state

# What is overridden without being public: under another name it would never be called.
_PRIVATE = ("_save_checkpoint", "_load_from_checkpoint")
if _missing := [name for name in _PRIVATE if not hasattr(transformers.Trainer, name)]:
    raise ImportError(
        f"transformers {transformers.__version__} has no Trainer.{_missing[0]}; the extra train names "
        "the releases that have it"
    )


class FineTuner(transformers.Trainer):
    """Learns from examples, step by step, in a folder that a later run can continue.

    Args:
        model: in pieces already if it is to be, with the parameters to train requiring gradients.
        processor: of the model.
        examples: at least one.
        held_out: their loss is measured whenever the state is saved; may be empty.
        options, ranks, folder: see there.
        autocast: compute in this dtype instead of that of the parameters.
        is_sharded: whether the model is in pieces.
        report_to: loggers of `transformers` beside our log.
    Attributes:
        steps: how many the run has.
        parallel: what several ranks do: "ddp", each has all weights, or "fsdp2", each has a piece of them.
    Raises: ValueError for a state in the folder that is damaged or of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: MllamaProcessor,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        options: TrainingOptions,
        ranks: TrainingRanks,
        folder: RunFolder,
        *,
        autocast: torch.dtype | None = None,
        is_sharded: bool = False,
        report_to: Sequence[str] = (),
    ) -> None:
        per_step = options.batch_size * options.accumulate * folder.ranks
        order = Order(len(examples), per_step, options.seed)
        share = Share(processor, options.batch_size, ranks.rank, ranks.size, is_sharded)
        self.steps = options.max_steps or options.epochs * order.steps_per_epoch
        self.parallel = "fsdp2" if is_sharded else "ddp"
        self._epoch_steps = order.steps_per_epoch
        before_last = per_step * (order.steps_per_epoch - 1)
        self._epoch_batches = (order.steps_per_epoch - 1) * share.count(per_step)
        self._epoch_batches += share.count(len(examples) - before_last)
        self._ahead = Ahead(processor, examples, order, share, self.steps)
        self._processor, self._held_out, self._share = processor, held_out, share
        self._ranks, self._folder, self._autocast = ranks, folder, autocast
        self._log: Log | None = None
        optimizer = adamw(model.named_parameters(), options.peak_rate, options.weight_decay)
        self._learned = Learned(model, optimizer, is_sharded)
        self._counts = {
            "max_steps": self.steps,
            "logging_steps": 1,
            "save_steps": options.save_every,
            "eval_steps": options.save_every,
            "train_batch_size": options.batch_size,
        }
        if ranks.size > 1 and not is_sharded:
            _leave_out_what_is_frozen(model)
        self._state = None if folder.state is None else State(folder.state, self._counts)
        self._done = 0 if self._state is None else self._state.step
        for group in optimizer.param_groups:
            group["initial_lr"] = options.peak_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: options.factor(step, self.steps), last_epoch=self._done - 1
        )
        arguments = _arguments(
            ranks,
            output_dir=str(folder.path),
            max_steps=self.steps,
            logging_steps=1,
            save_steps=options.save_every,
            eval_steps=options.save_every,
            eval_strategy="steps" if held_out else "no",
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=share.count(per_step),
            max_grad_norm=options.max_grad_norm,
            seed=options.seed % 2**32,
            report_to=list(report_to),
            use_cache=getattr(
                model.config, "use_cache", True
            ),  # Trainer writes it into the model's
        )
        self._progress = progress = _Progress(self)
        super().__init__(
            model,
            arguments,
            train_dataset=range(self._epoch_batches),
            eval_dataset=list(held_out) or None,
            optimizers=(optimizer, schedule),
            callbacks=[progress],
        )
        self.remove_callback(PrinterCallback)
        # What dropout draws is another thing on every rank, and the same in every run.
        torch.manual_seed(options.seed + 1_000_003 * ranks.rank)
        if self._state is not None:
            self._state.load(self._learned, ranks)

    def run(self) -> None:
        """Take the steps that are still to be taken; afterwards the state of the last one is saved.

        Raises: RuntimeError when a loss or gradient is not finite; the state before it is there.
        """
        if self._ranks.is_first:
            self._log = Log(self._folder.log, self._done)
            self._log_ranks()
        self._began = time.monotonic()
        try:
            with _deterministic(), warnings.catch_warnings():
                # FSDP warns of sums in place on what a layer gives, which the model does not do.
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
                if self._done < self.steps:
                    self.train(resume_from_checkpoint=self._state and str(self._state.path))
        finally:
            self._ahead.close()
            self._progress.close()
            if self._log is not None:
                self._log.close()

    @property
    def among(self) -> str:
        """What several ranks do, and that they were another number, for a reader."""
        size = self._ranks.size
        kind = "sharded (FSDP2)" if self._learned.is_sharded else "data parallel (DDP)"
        text = f", {kind} over {size} ranks" if size > 1 else ""
        before = size if self._state is None else self._state.ranks
        if before != size:
            text += (
                f"; goes on after step {self._done} of {before} ranks with {size}, and ends with the same "
                "losses up to rounding"
            )
        return text

    def restore_random(self) -> None:
        """Let the random numbers of a resumed run go on."""
        if self._state is not None:
            self._state.restore_random(self._ranks)

    def _log_ranks(self) -> None:
        """How many there are and what they do, where that is new."""
        before = 1 if self._state is None else self._state.ranks
        if self._log is not None and before != self._ranks.size:
            self._log.write(step=self._done, ranks=self._ranks.size, parallel=self.parallel)

    # Data: Trainer counts the batches of an epoch, and gets those of the step.

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, generator=torch.Generator())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], int]:
        step = self.state.global_step
        return self._ahead.of(step), self._ahead.targets(step)

    # Loss: the sum over all tokens of the step, divided by their number.

    def compute_loss_context_manager(self) -> Any:
        return torch.autocast(
            self._ranks.device.type, self._autocast, enabled=self._autocast is not None
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor:
        output = model(
            **inputs, num_items_in_batch=num_items_in_batch, use_cache=False, return_logits=False
        )
        return output.loss * self._ranks.size  # gradients are averaged over the ranks

    @torch.no_grad()
    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Mean loss per target of the examples that are held out."""
        self.model.eval()
        total, targets = 0.0, targets_of(self._held_out)
        for examples in self._share.batches(self._held_out):
            inputs = self._prepare_inputs(collate(self._processor, examples))
            with self.compute_loss_context_manager():
                total += self.compute_loss(self.model, inputs, num_items_in_batch=targets).item()
        self.model.train()
        if self._learned.is_sharded:  # without a backward pass some weights stay whole
            self.model.reshard()
        metrics = {"eval_loss": self._ranks.sum(total) / self._ranks.size}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # Log and states.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = self.state.global_step
        if "loss" in logs and not math.isfinite(logs["loss"] + logs["grad_norm"]):
            with self._ranks.together():
                raise RuntimeError(
                    f"step {step} has loss {logs['loss']} and gradient norm {logs['grad_norm']}; nothing "
                    "of it is kept: try a lower learning rate"
                )
        if self._log is not None and "loss" in logs:
            self._log.write(
                step=step,
                epoch=round(step / self._epoch_steps, 4),
                loss=logs["loss"],
                grad_norm=logs["grad_norm"],
                learning_rate=logs["learning_rate"],
                tokens=self._ahead.targets(step - 1),
                seconds=round(time.monotonic() - self._began, 3),
            )
        elif self._log is not None and "eval_loss" in logs:
            self._log.write(step=step, eval_loss=logs["eval_loss"])
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        counts = {**self._counts, "global_step": step}
        save_state(self._folder.path, step, counts, self._learned, self._ranks)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `run` has loaded it, with the optimizer."""


class _Progress(transformers.TrainerCallback):
    """A bar on the first rank; and what has to be done last before the first step."""

    def __init__(self, trainer: FineTuner) -> None:
        self._trainer = trainer
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._trainer.restore_random()
        if state.is_world_process_zero:
            self._bar = bar("training", state.max_steps, "step", initial=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _arguments(ranks: TrainingRanks, **options: Any) -> transformers.TrainingArguments:
    """Those of the Trainer, for one device of this process, whatever else the machine has."""
    device = ranks.device
    chosen = {"ACCELERATE_TORCH_DEVICE": str(device)} if device.type == "cuda" else {}
    with patch.dict(os.environ, chosen):
        if ranks.size == 1:  # also where torchrun has started it
            os.environ.pop("LOCAL_RANK", None)
        arguments = transformers.TrainingArguments(
            **options,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            average_tokens_across_devices=False,  # `compute_loss` does
            # A rank whose rows have no images does not use the cross-attention layers.
            ddp_find_unused_parameters=True,
        )
        arguments.report_to = options["report_to"]  # without one that the environment adds
        vars(arguments)["_setup_devices"] = arguments.device if device.type == "cpu" else device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # or it would compute on all of them in DataParallel
    return arguments


def _leave_out_what_is_frozen(model: nn.Module) -> None:
    """Every rank has loaded it; DDP need not send it again."""
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same sums in the same order each time, so that a resumed run ends where the other would have."""
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills
