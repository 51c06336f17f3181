"""The plain model that a quantised one stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mllama.parallel.split import Share
from mllama.quantized_modules import WholeWeights
from mllama_kernels.quantized_tensor import QuantizedTensor


@torch.no_grad()
def decoded_copy(model: Any, dtype: torch.dtype, backend: str) -> Any:
    """A model with the decoded weights of another, on its device and in evaluation mode.

    Args:
        model: one of the model classes; a plain one is copied. Of one that is split over ranks the copy is
            split alike.
        dtype: of the copy.
        backend: of the copy.
    """
    weights = model.state_dict(destination=WholeWeights())
    state = {
        name: value.dequantize(dtype) if isinstance(value, QuantizedTensor) else value.to(dtype)
        for name, value in weights.items()
    }
    with torch.device("meta"):
        copy = type(model)(model.config, backend=backend, semantics=model.semantics)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if isinstance(embedding, nn.Embedding):
            copy.set_input_embeddings(
                nn.Embedding(embedding.num_embeddings, embedding.embedding_dim)
            )
        if model.share is not None:
            Share(model.share.ranks, model.share.split).take(copy)
        elif head is not None:
            copy.set_output_embeddings(nn.Linear(head.in_features, head.out_features, bias=False))
    for name, value in state.items():  # of a split model parts, which a state dict has none of
        path, _, own = name.rpartition(".")
        copy.get_submodule(path).register_parameter(own, nn.Parameter(value))
    copy.ops.settle(model.device)
    return copy.requires_grad_(False).eval()


@torch.no_grad()
def quantization_loss(model: Any, original: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """What quantising has cost on some inputs: the mean over their tokens of the divergence KL(original,
    model) of the next token's distribution in nats, and the share of tokens at which the likeliest one is the
    same."""
    got = model(**inputs, use_cache=False).logits.float().log_softmax(-1)
    want = original(**inputs, use_cache=False).logits.float().log_softmax(-1)
    divergence = (want.exp() * (want - got)).sum(-1)
    same = got.argmax(-1) == want.argmax(-1)
    is_token = inputs.get("attention_mask")
    if is_token is not None:
        divergence, same = divergence[is_token.bool()], same[is_token.bool()]
    return {"kl": divergence.mean().item(), "top_1_agreement": same.float().mean().item()}
