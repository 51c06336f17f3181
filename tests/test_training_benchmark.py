"""The benchmark of a training step, on models that take no time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from model_helpers import Prompt, Shape, batch_of, hf_model, our_model

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: an installed or simulated build of the kernels goes first

import mllama  # noqa: E402
from benchmarks import goals, measure, scenario, tables, training_step  # noqa: E402
from benchmarks.case import OURS  # noqa: E402
from benchmarks.model import PEER  # noqa: E402


@pytest.fixture
def pair():
    shape = Shape()
    theirs = hf_model(shape, "sdpa")
    mine = our_model(shape, theirs, ("kernels", "cpu"))
    theirs.load_state_dict(mine.state_dict(), assign=True)
    batch = batch_of(shape, [Prompt(20, (0,), (3,)), Prompt(20, (0,), (5,))])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[labels == shape.vocab] = -100
    return mine.train(), theirs.train(), batch | {"labels": labels}


def test_models_that_agree_are_timed(pair):
    row = training_step.measure(*pair, quick=True)
    status = {impl["name"]: impl["status"] for impl in row["impls"]}
    timed = (OURS, PEER, "transformers accelerated")
    assert next(iter(status)) == OURS
    assert status == dict.fromkeys(timed, "timed") | {
        "transformers compiled": "unavailable",
        "liger-kernel": "unavailable",
    }
    ceiling = {"copy_gbps": 1.0, "matmul_tflops_float32": 1.0}
    row |= {"shape": {"tokens": 3}, "flops": 10, "bytes": 0, "bound": "copy"}
    measure.add_floor(row, ceiling)
    run = {"rows": [], "training": [row], "machine": {"kind": "cpu"}}
    assert tables.training_table(run).count("tokens 3") == 3
    goal = goals.Goal("x", "training", {}, "ratio", 1, "cpu", "float32", (PEER,))
    ratio = next(impl for impl in row["impls"] if impl["name"] == PEER)["ours_is_faster"]["median"]
    assert goals.value_of(goal, run) == ratio


def test_another_gradient_is_not_timed(pair):
    mine, theirs, batch = pair
    mine.lm_head.weight.register_hook(lambda grad: 1.01 * grad)
    row = training_step.measure(mine, theirs, batch, quick=True)
    assert row["impls"][0]["name"] == OURS and row["impls"][0]["status"] == "wrong"
    with pytest.raises(RuntimeError, match="has no gradient"):
        training_step.samples(theirs)


@pytest.mark.parametrize("tokens", [64, 512])
def test_flops_are_those_of_the_matrices(tokens):
    layers = training_step.REDUCED
    with torch.device("meta"):
        meta = mllama.MllamaForConditionalGeneration(mllama.MllamaConfig(**layers.configs(1024)))
    few, many = (
        training_step.flops_per_step(meta, scenario.Scenario(1, count, 0))
        for count in (tokens, tokens + 1)
    )
    text = sum(
        p.numel()
        for name, p in [
            *meta.model.language_model.named_parameters(),
            *meta.lm_head.named_parameters(),
        ]
        if p.dim() > 1
        and "embed" not in name
        and "cross_attn.k" not in name
        and "cross_attn.v" not in name
    )
    assert 6 * text <= many - few <= 1.2 * 6 * text
