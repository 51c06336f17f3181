"""Ten thousand greedy tokens: nothing adds up in the positions, pages and lengths of a long generation.

Greedy decoding takes token c where the kernels' logit k[c] is the largest. If no kernel logit is
farther than e from the exact ones f, then f[c] >= max(f) - 2 e. The project's rule allows kernels twice
the error of plain PyTorch in the same dtype, so e is twice the largest error of the reference ops in
the neighbourhood, measured against the next wider dtype. All of it is read off the very text that was
generated, so the bound holds whatever the text is; an error that grows with the length breaks it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_helpers import BACKENDS, Prompt, Shape, batch_of, randomise, to
from torch import Tensor

import mllama

TOKENS = 10_000
CHUNK = 500  # tokens per teacher-forced call, and the neighbourhood of an error

pytestmark = pytest.mark.full


class Teacher:
    """A model that is shown a text chunk by chunk."""

    def __init__(self, model: Any, prompt: dict[str, Tensor]) -> None:
        self._model, self._prompt, self._cache = model, prompt, None
        if "pixel_values" in prompt:
            self._prompt = prompt | {"pixel_values": prompt["pixel_values"].to(model.dtype)}

    def __call__(self, tokens: Tensor | None) -> Tensor:
        """Logits (1, n, V) at the next tokens (1, n), or at those of the prompt."""
        inputs = self._prompt if tokens is None else {"input_ids": tokens}
        output = self._model(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits


def assert_no_drift(model: Any, wider: torch.dtype, batch: dict[str, Tensor]) -> None:
    model.generation_config = {"pad_token_id": 0}  # no stop token
    sequence = model.generate(**batch, max_new_tokens=TOKENS + 1, do_sample=False)
    end = batch["input_ids"].shape[1]
    assert sequence.shape[1] == end + TOKENS + 1
    model.ops.select("reference")
    plain, exact = Teacher(model, batch), Teacher(copy.deepcopy(model).to(wider), batch)
    check(plain(None), exact(None), sequence[:, end : end + 1])
    for begin in range(end, end + TOKENS, CHUNK):
        shown = sequence[:, begin : begin + CHUNK]
        check(plain(shown), exact(shown), sequence[:, begin + 1 : begin + CHUNK + 1])


def check(plain: Tensor, exact: Tensor, chosen: Tensor) -> None:
    """``chosen`` (1, m) follow the last m of the positions that the logits (1, n, V) belong to."""
    error = (plain.to(exact.dtype) - exact).abs().max()
    assert error > 0, "the reference ops are exact: that cannot be"
    exact = exact[:, -chosen.shape[1] :]
    gap = (exact.amax(-1) - exact.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)).max()
    assert gap <= 4 * error, f"a chosen token is {gap:.2e} below the best, plain error {error:.2e}"


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_small_model(backend: tuple[str, str]) -> None:
    shape = Shape(layers=3, cross=(1,), local_layers=2, global_layers=1, taps=(0,), vocab=64)
    configs = shape.configs()
    configs["text_config"]["max_position_embeddings"] = 2 * TOKENS
    model = mllama.MllamaForConditionalGeneration(
        mllama.MllamaConfig(**configs), backend=backend[0], semantics="transformers"
    ).eval()
    randomise(model)
    batch = batch_of(shape, [Prompt(37, (3,), (5,))])
    assert_no_drift(model.to(backend[1]), torch.float64, to(batch, backend[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_11b_shape() -> None:
    config = mllama.MllamaConfig()
    with torch.device("cuda"):
        model = mllama.MllamaForConditionalGeneration(
            config, backend="kernels", semantics="transformers"
        )
    model = model.to(torch.bfloat16).eval()
    randomise(model)
    batch = batch_of(Shape(tile_side=config.vision_config.image_size), [Prompt(37, (3,), (5,))])
    batch["input_ids"][batch["input_ids"] == Shape.vocab] = config.image_token_index
    assert_no_drift(model, torch.float32, to(batch, "cuda"))
