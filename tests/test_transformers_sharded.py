"""Accelerated models that FSDP shards over two processes: losses and gradients of the bare model."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import Tensor, nn
from transformers_helpers import (
    assert_same,
    build,
    count_ops,
    gradients,
    llama_config,
    mllama_config,
    needs_backward,
    text_batch,
)

from mllama_kernels.transformers import accelerate

PROCESSES = 2
ATTENTION = {
    "mllama": {"rotary_attention": 2, "cross_attention": 1, "vision_attention": 3},
    "tied": {"rotary_attention": 2},
}
EVERY_OP = {"mllama": 7, "tied": 4}  # that accelerate replaces, the loss included


def _case(family: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The same in each process: a model in training, and a batch for each of them."""
    torch.manual_seed(3)
    if family == "mllama":
        shape = Shape(local_layers=2, global_layers=1, taps=(0,), layers=3, cross=(1,))
        model = build(transformers.MllamaForConditionalGeneration, mllama_config(shape))
        prompts = [[Prompt(12, (3,), (6,))], [Prompt(15, (2, 9), (2, 1))]]
        batches = [batch_of(shape, prompt) for prompt in prompts]
    else:
        config = llama_config(num_hidden_layers=2, tie_word_embeddings=family == "tied")
        model = build(transformers.LlamaForCausalLM, config)
        batches = [text_batch(length=12), text_batch(length=9)]
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] > 95, -100)
    return model.train(), batches


def _layers(model: nn.Module) -> list[nn.Module]:
    decoder = model.model
    return list(getattr(decoder, "language_model", decoder).layers)


def _fully_sharded(model: nn.Module, head_alone: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in _layers(model):
        fully_shard(layer)
    if head_alone:
        fully_shard(model.lm_head)
    return fully_shard(model)


def _wrapped(model: nn.Module, use_orig_params: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy = functools.partial(
        transformer_auto_wrap_policy,
        transformer_layer_cls={type(layer) for layer in _layers(model)},
    )
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


SHARDINGS = {
    "FSDP2": functools.partial(_fully_sharded, head_alone=False),
    "FSDP2, the head a unit of its own": functools.partial(_fully_sharded, head_alone=True),
    "FSDP1": functools.partial(_wrapped, use_orig_params=True),
    "FSDP1 with flat parameters": functools.partial(_wrapped, use_orig_params=False),
}


def _expected(family: str, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a process, and the gradients of all of them, averaged as FSDP does."""
    model, batches = _case(family)
    losses, grads = [], []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(model))
    return losses[rank], {n: (g + grads[1][n]) / PROCESSES for n, g in grads[0].items()}


def _check(family: str, sharding: str, accelerated_first: bool, loss: bool, rank: int) -> None:
    model, batches = _case(family)
    report = accelerate(model, loss=loss) if accelerated_first else None
    model = SHARDINGS[sharding](model)
    if report is None:
        report = accelerate(model, loss=loss)
    ops = {op for op in report.replaced if op != "semantics"}
    assert len(ops) == EVERY_OP[family] - (not loss), ops
    with_logits = not loss or "head" in sharding
    expected, grads = _expected(family, rank)
    for _ in range(2):  # the second step finds parameters resharded
        with pytest.MonkeyPatch.context() as patch:
            calls = count_ops(patch)
            out = model(**batches[rank])
        # The masks of ours get through the hooks and wrappers that shard a model.
        assert {op: calls[op] for op in ATTENTION[family]} == ATTENTION[family]
        assert (out.logits is not None) == with_logits
        assert_same(out.loss.detach(), expected)
        out.loss.backward()
        if sharding.startswith("FSDP2"):
            found = {
                n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None
            }
            assert found.keys() == grads.keys()
            for name, gradient in found.items():
                error = (gradient - grads[name]).norm()
                # The sums of a batch are taken per process and then added: one rounding more.
                assert error <= 1e-4 * grads[name].norm() + 1e-6, (name, float(error))
        else:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            assert_same(model.clip_grad_norm_(1e9), norm)
        model.zero_grad()


def _process(rank: int, folder: str, cases: list[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        for case in cases:
            try:
                _check(*case, rank)
            except Exception as error:
                raise AssertionError(f"process {rank}, {case}") from error
    finally:
        dist.destroy_process_group()


@needs_backward
def test_losses_and_gradients(tmp_path):
    orders = [True, False]
    cases = [
        *itertools.product(["mllama"], SHARDINGS, orders, [True, False]),
        *itertools.product(["tied"], ["FSDP2", "FSDP1"], orders, [True]),
    ]
    mp.spawn(_process, (str(tmp_path), cases), nprocs=PROCESSES)
