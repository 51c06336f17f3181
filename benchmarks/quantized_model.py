"""The model with quantised weights beside itself with the same weights decoded, and llama.cpp.

The weights are random codes. With an image the layers are those of `model.py`; llama.cpp, which has no such
model, is held against a few text layers of the same width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mllama
from benchmarks import ceilings, llama_cpp
from benchmarks.budget import Budget
from benchmarks.case import OURS
from benchmarks.model import (
    Contestant,
    bytes_per_step,
    fill,
    inputs_of,
    measure,
    runs_flops,
)
from benchmarks.random_codes import weight_of
from benchmarks.scenario import (
    FULL,
    PAD,
    REDUCED,
    SMALL_VOCABULARY,
    Layers,
    Scenario,
    fitting,
    scenarios,
)
from benchmarks.shapes import VOCAB
from mllama.checkpoints.key_layout import KeyLayout
from mllama.linear import projections_of
from mllama.quantization.policy import assign
from mllama.quantized_modules import QuantizedEmbedding, QuantizedLinear

ENCODINGS = ("q8_0", "q6_k", "q4_k")
PLAIN = "mllama_kernels, decoded weights"
TEXT = Layers(text=4, cross=(), local=1, global_=1, taps=(0,))
TEXT_SCENARIO = Scenario(batch=1, prompt=128, new=16)
# A guess, for the first row of a quick run: it takes so many times the time of reading the decoded weights.
TIMES_READ = 100


@dataclass(frozen=True)
class Row:
    """What is measured: a model with an image, or beside llama.cpp one of text."""

    encoding: str
    layers: Layers
    scenario: Scenario

    @property
    def is_text(self) -> bool:
        return self.layers is TEXT

    @property
    def sizes(self) -> dict[str, Any]:
        if self.is_text:
            return {"encoding": self.encoding, "text layers": self.layers.text}
        return {"encoding": self.encoding, **self.scenario.sizes(self.layers)}

    def config(self, vocabulary: int) -> Any:
        configs = self.layers.configs(vocabulary, self.scenario.tile)
        if self.is_text:  # llama.cpp has the other kind as a tensor
            rope = {"rope_type": "default", "rope_theta": 500000.0}
            configs["text_config"] |= {"rope_parameters": rope}
        return mllama.MllamaConfig(**configs)


def rows(device: torch.device, quick: bool) -> list[Row]:
    """Of all encodings; llama.cpp runs on CPUs only."""
    on_cpu = device.type == "cpu"
    layers = REDUCED if on_cpu else FULL
    alone = [one for one in scenarios(device, quick) if one.batch == 1]
    found = [Row(encoding, layers, one) for encoding in ENCODINGS for one in alone]
    return found + [Row(encoding, TEXT, TEXT_SCENARIO) for encoding in ENCODINGS if on_cpu]


@torch.no_grad()
def build(row: Row, dtype: torch.dtype, device: torch.device, vocabulary: int) -> tuple[Any, Any]:
    """The quantised model, and the plain one with the same weights; what is not quantised they share."""
    config = row.config(vocabulary)
    kind = mllama.MllamaForCausalLM if row.is_text else mllama.MllamaForConditionalGeneration
    with torch.device("meta"):
        quantised, plain = (
            kind(config, backend="kernels", semantics="transformers") for _ in range(2)
        )
    plain = plain.to(dtype).to_empty(device=device).eval()
    fill(plain)
    quantised.load_state_dict(plain.state_dict(), assign=True)
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    layout = KeyLayout(kind.__name__)
    chosen = assign(config, layout, shapes, row.encoding, dtype=str(dtype).removeprefix("torch."))
    for name, encoding in chosen.encodings.items():
        weight = weight_of(encoding, *shapes[name], device)
        plain.get_parameter(name).copy_(weight.dequantize(dtype))
        path, _, child = name.removesuffix(".weight").rpartition(".")
        owner = quantised.get_submodule(path)
        was = getattr(owner, child)
        if isinstance(was, nn.Embedding):
            made: nn.Module = QuantizedEmbedding(weight, was.padding_idx, dtype, quantised.ops)
        else:
            made = QuantizedLinear(weight, was.bias, quantised.ops)
        owner.register_module(child, made)
    for module in quantised.modules():
        for projection in projections_of(module):
            projection.pack()
    return quantised.eval(), plain


def text_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model without images; where an image would be stands another token."""
    inputs["input_ids"][:, 0] = 0
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def run(
    device: torch.device,
    dtypes: list[torch.dtype],
    quick: bool,
    seed: int,
    budget: Budget,
    ceiling: Mapping[str, float],
    leave_out: Callable[[str, str], None],
) -> Iterator[dict[str, Any]]:
    """One row per dtype, encoding and scenario; a quick run has those of 16 bits that there is time for.

    Args:
        leave_out: is told of each row that is not measured, and why.
    """
    on_cpu = device.type == "cpu"
    vocabulary = SMALL_VOCABULARY if on_cpu and quick else VOCAB
    todo = [(dtype, row) for dtype in dtypes for row in rows(device, quick)]
    if quick:
        todo = [(dtype, row) for dtype, row in todo if dtype != torch.float32]
    longest = 0.0
    for number, (dtype, row) in enumerate(todo):
        if budget.interrupted:
            return
        name = f"model {row.sizes} {str(dtype).removeprefix('torch.')}"
        if row.is_text and (reason := llama_cpp.missing()):
            leave_out(name, reason)
            continue
        if budget.over:
            leave_out(name, "no time was left")
            continue
        with budget.share(1 / (len(todo) - number)):
            seconds, reading = budget.left, ceiling["read_gbps"] * ceilings.GB
            scenario = row.scenario
            if on_cpu and quick and not row.is_text:
                rate = ceiling[f"matmul_tflops_{str(dtype).removeprefix('torch.')}"]
                scenario = fitting(row.layers, scenario, runs_flops, seconds, rate)
            one = Row(row.encoding, row.layers, scenario)
            with torch.device("meta"):
                shapes = mllama.MllamaForConditionalGeneration(one.config(vocabulary)).parameters()
            expected = TIMES_READ * sum(p.numel() for p in shapes) * dtype.itemsize / reading
            if seconds < max(longest, expected):
                leave_out(name, "no time was left")
                continue
            torch.manual_seed(seed)
            budget.say(f"{name}: weights; rows to come: {len(todo) - number}")
            begin = time.monotonic()
            yield _measured(one, dtype, device, vocabulary, budget)
            longest = max(longest, time.monotonic() - begin)


def _measured(
    row: Row, dtype: torch.dtype, device: torch.device, vocabulary: int, budget: Budget
) -> dict[str, Any]:
    quantised, plain = build(row, dtype, device, vocabulary)
    inputs = inputs_of(row.scenario, dtype, device, vocabulary)
    options = {"eos_token_id": None, "pad_token_id": min(PAD, vocabulary - 1)}
    found = [Contestant(OURS, quantised, options)]
    found.append(
        Contestant(PLAIN, plain, options, bytes_per_step=bytes_per_step(plain, row.scenario))
    )
    with ExitStack() as stack:
        if row.is_text:
            inputs = text_of(inputs)
            peer = stack.enter_context(llama_cpp.model(quantised, row.encoding, row.scenario))
            found.append(Contestant(llama_cpp.NAME, peer, {}, tolerance=llama_cpp.TOLERANCE))
        return measure(found, PLAIN, inputs, row.scenario, row.sizes, budget)
