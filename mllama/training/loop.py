"""The training loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllama.loss import IGNORED
from mllama.processing.processor import MllamaProcessor
from mllama.progress import bar

from .batches import Order, batches, grouped
from .encoding import Example
from .folder import RunFolder
from .log import Log
from .optimizer import adamw
from .options import TrainingOptions
from .state import load_state, save_state


class Trainer:
    """Learns from examples, step by step, in a folder that a later run can continue.

    Args:
        model: in train mode, with the parameters to train requiring gradients.
        processor: of the model.
        examples: at least one.
        held_out: their loss is measured whenever the state is saved; may be empty.
        options: see :class:`TrainingOptions`.
        autocast: compute in this dtype instead of that of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: MllamaProcessor,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        options: TrainingOptions,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model, self._processor, self._options = model, processor, options
        self._examples, self._held_out = examples, held_out
        self._order = Order(len(examples), options.batch_size * options.accumulate, options.seed)
        self.steps = options.max_steps or options.epochs * self._order.steps_per_epoch
        self._optimizer = adamw(model.named_parameters(), options.peak_rate, options.weight_decay)
        self._parameter = next(p for p in model.parameters() if p.requires_grad)
        self._autocast = autocast

    def run(self, folder: RunFolder) -> None:
        """Take the steps that are still to be taken; afterwards the state of the last one is saved.

        Raises: ValueError for a state that is not of this run; RuntimeError when a loss or gradient is not
            finite; the state before it is there.
        """
        done = 0
        if folder.state.exists():
            done = load_state(folder.state, self._model, self._optimizer)
        if done > self.steps:
            raise ValueError(f"the run has done {done} steps, of {self.steps}: it is another one")
        log, start = Log(folder.log, done), time.monotonic()
        with _deterministic(), bar("training", self.steps, "step", initial=done) as progress:
            for step in range(done, self.steps):
                entry = self._step(step)
                log.write(**entry, seconds=round(time.monotonic() - start, 3))
                if (step + 1) % self._options.save_every == 0 or step + 1 == self.steps:
                    if self._held_out:
                        log.write(step=step + 1, eval_loss=self._evaluated())
                    save_state(folder.state, step + 1, self._model, self._optimizer)
                progress.set_postfix_str(f"loss {entry['loss']:.4f}", refresh=False)
                progress.update(1)
        log.close()

    def _step(self, step: int) -> dict[str, Any]:
        options, chosen = self._options, self._order.indices(step)
        examples = [self._examples[i] for i in chosen]
        total, loss = _targets(examples), 0.0
        for batch in batches(self._processor, grouped(examples, options.batch_size)):
            share = int((batch["labels"][:, 1:] != IGNORED).sum()) / total
            part = share * self._loss(batch)
            part.backward()
            loss += part.item()
        limit = options.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self._trained(), limit).item()
        if not math.isfinite(loss + norm):
            raise RuntimeError(
                f"step {step + 1} has loss {loss} and gradient norm {norm}; nothing was changed by it: "
                "try a lower learning rate"
            )
        rate = options.rate(step, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        epoch = (step + 1) / self._order.steps_per_epoch
        return {
            "step": step + 1,
            "epoch": round(epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": total,
        }

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        device = self._parameter.device
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            return self._model(**inputs, use_cache=False, return_logits=False).loss

    @torch.no_grad()
    def _evaluated(self) -> float:
        """Mean loss per target of the examples that are held out."""
        self._model.eval()
        total, loss = _targets(self._held_out), 0.0
        for batch in batches(self._processor, grouped(self._held_out, self._options.batch_size)):
            share = int((batch["labels"][:, 1:] != IGNORED).sum()) / total
            loss += share * self._loss(batch).item()
        self._model.train()
        return loss

    def _trained(self) -> Iterator[nn.Parameter]:
        return (p for p in self._model.parameters() if p.requires_grad)


def _targets(examples: Sequence[Example]) -> int:
    """How many tokens are learned: of each example all labels but one at its beginning."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])


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
