"""One process of two that train a model under FSDP: `python fsdp_worker.py RANK FOLDER`.

The folder has `given.pt` (config, weights, one batch per process, targets), and gets `RANK.pt`: by the name
of a way to wrap the model, what came out, or the error.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy

import mllama
from mllama.text import MllamaCrossAttentionDecoderLayer, MllamaSelfAttentionDecoderLayer
from mllama.vision import MllamaVisionEncoderLayer

LAYERS = (
    MllamaSelfAttentionDecoderLayer,
    MllamaCrossAttentionDecoderLayer,
    MllamaVisionEncoderLayer,
)
PER_LAYER = ModuleWrapPolicy(LAYERS)
Model = mllama.MllamaForConditionalGeneration
Wrap = Callable[[Model], nn.Module]


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, LAYERS))


def shard(model: Model, *parts: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 of the parts, the innermost first, and of the model."""
    for part in parts:
        fully_shard(part, **options)
    fully_shard(model, **options)
    return model


def shard_layers(model: Model, **options: Any) -> nn.Module:
    return shard(model, *layers_of(model), **options)


def shard_submodules(model: Model) -> nn.Module:
    language, vision = model.model.language_model, model.model.vision_model
    inner = [child for layer in layers_of(model) for child in layer.children() if has_own(child)]
    return shard(
        model,
        *inner,
        language.embed_tokens,
        vision.transformer,
        vision,
        language,
        model.model.multi_modal_projector,
        model.model,
        model.lm_head,
    )


def has_own(child: nn.Module) -> bool:
    """Whether a layer's child is called, and not read, by it: all but the norms of the text."""
    return type(child).__name__ != "RMSNorm"


def shard_linears(model: Model) -> nn.Module:
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    return shard(model, *linears)


def wrap(model: Model, policy: Any = PER_LAYER, **options: Any) -> nn.Module:
    """FSDP1."""
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options
    )


def checkpointed(model: Model) -> Model:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LAYERS))
    return model


def recomputing(model: Model) -> Model:
    model.gradient_checkpointing_enable()
    return model


BF16 = torch.bfloat16
by_type = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=set(LAYERS))
WAYS: dict[str, Wrap] = {
    "fsdp2": shard_layers,
    "fsdp2 whole": shard,
    "fsdp2 submodules": shard_submodules,
    "fsdp2 linears": shard_linears,
    "fsdp2 unsharded in between": functools.partial(shard_layers, reshard_after_forward=False),
    "fsdp2 checkpointed": lambda model: shard_layers(checkpointed(model)),
    "fsdp2 recomputing": lambda model: shard_layers(recomputing(model)),
    "fsdp2 bfloat16": functools.partial(
        shard_layers, mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    ),
    "fsdp1": wrap,
    "fsdp1 original parameters": functools.partial(wrap, use_orig_params=True),
    "fsdp1 whole, original parameters": functools.partial(wrap, policy=None, use_orig_params=True),
    "fsdp1 by type": functools.partial(wrap, policy=by_type),
    "fsdp1 linears": functools.partial(wrap, policy=ModuleWrapPolicy({nn.Linear, *LAYERS})),
    "fsdp1 checkpointed": lambda model: wrap(checkpointed(model)),
    "fsdp1 recomputing": lambda model: wrap(recomputing(model), use_orig_params=True),
    "fsdp1 bfloat16": functools.partial(wrap, mixed_precision=MixedPrecision(BF16, torch.float32)),
}


def steps(model: nn.Module, batches: list[dict[str, Tensor]], **options: Any) -> list[float]:
    """Two steps on the mean loss of the batches; their losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = sum(model(**batch, **options).loss for batch in batches) / len(batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        found = model.state_dict()
    else:
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name.replace("_checkpoint_wrapped_module.", ""): w for name, w in found.items()}


@torch.no_grad()
def generated(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    model.eval()
    if isinstance(model, FullyShardedDataParallel) and not model.mixed_precision.param_dtype:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False, recurse=False):
            return model.module.generate(**prompt, max_new_tokens=3, do_sample=False)
    output = model(**prompt, use_cache=True)
    tokens, cache = [output.logits[:, -1:].argmax(-1)], output.past_key_values
    for _ in range(2):
        logits = model(tokens[-1], past_key_values=cache).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat([prompt["input_ids"], *tokens], 1)


def run(way: Wrap, model: Model, rank: int, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    wrapped = way(model.train())
    losses = torch.stack(steps(wrapped, [batches[rank]]))
    dist.all_reduce(losses)
    alone = wrapped(**batches[rank], return_logits=False).loss
    alone.backward()
    prompt = {k: v for k, v in batches[0].items() if k != "labels"}
    return {
        "losses": (losses / dist.get_world_size()).tolist(),
        "loss alone": alone.item(),
        "loss": wrapped(**batches[rank]).loss.item(),
        "tokens": generated(wrapped, prompt).tolist(),
        "weights": weights_of(wrapped),
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    given = torch.load(folder / "given.pt", weights_only=False)
    model = Model(mllama.MllamaConfig(**given["config"]), semantics="transformers")
    model.load_state_dict(given["weights"])
    results: dict[str, Any] = {}
    for name, way in WAYS.items():
        try:
            results[name] = run(way, copy.deepcopy(model), rank, given["batches"])
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
