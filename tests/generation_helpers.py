"""Models that say what a test wants, and what generation tests look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import PAD_TOKEN, Shape, hf_model, our_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import mllama
from mllama.generation import generate as generation

SHAPE = Shape(vision_head_dim=32, head_dim=32, intermediate=96, tile_side=28)
IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def endless_model() -> mllama.MllamaForConditionalGeneration:
    """A small model with "meta" semantics, on the reference ops; it has no stop token.

    It does not say the padding token either: in a next turn without an `attention_mask` that token
    counts as padding, here and in transformers.
    """
    model = our_model(SHAPE, hf_model(SHAPE), semantics="meta")
    with torch.no_grad():
        model.lm_head.weight[PAD_TOKEN] = 0  # a logit of 0 is never the largest of a vocabulary
    model.generation_config = {"pad_token_id": PAD_TOKEN}
    return model


def byte_tokenizer() -> Tokenizer:
    """Token i of the first 256 is a byte, in the order of the byte-level alphabet; then <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


END = 256  # the id of <|end|>


class Script:
    """Makes a model say given texts, one per row, whatever it computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokenizer = byte_tokenizer()
        shape = Shape(vocab=257, head_dim=32, intermediate=32, layers=2, cross=(1,))
        text = shape.configs()["text_config"]
        self.model = mllama.MllamaForCausalLM(mllama.MllamaTextConfig(**text), backend="reference")
        self.model.generation_config = {"pad_token_id": PAD_TOKEN, "eos_token_id": END}
        self.rows: list[list[int]] = []
        script = self

        class Sampler:
            def __init__(self, *_: Any) -> None:
                self.step = 0

            def __call__(self, logits: Tensor) -> Tensor:
                self.step += 1
                return torch.tensor([row[self.step - 1] for row in script.rows])

        monkeypatch.setattr(generation, "Sampler", Sampler)

    def say(self, *texts: str | list[int]) -> dict[str, Any]:
        """Set the texts; returns the arguments of generate() or stream()."""
        rows = [self.tokenizer.encode(t).ids if isinstance(t, str) else t for t in texts]
        longest = max(map(len, rows))
        self.rows = [row + [END] * (longest + 1 - len(row)) for row in rows]
        ids = torch.randint(3, 256, (len(rows), 4))
        return {"input_ids": ids, "max_new_tokens": longest + 1, "tokenizer": self.tokenizer}


class Recorder:
    """A streamer that keeps what it gets, and may stop the show."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.puts: list[list] = []
        self.ends = 0
        self._interrupt_at = interrupt_at

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.puts.append(value.tolist())
        if len(self.puts) == self._interrupt_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ends += 1


def count_vision_calls(model: Any) -> list[int]:
    """A list that grows by the number of images with each call of the vision tower."""
    calls: list[int] = []
    vision = model.model.vision_model
    original = vision.encode

    def encode(pixel_values: Tensor, *args: Any) -> Any:
        calls.append(pixel_values.shape[0])
        return original(pixel_values, *args)

    vision.encode = encode
    return calls


def second_turn(batch: dict[str, Tensor], sequences: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The whole text after another question; the last image stays in sight."""
    ids = torch.cat([sequences, tokens], 1)
    added = ids.shape[1] - batch["input_ids"].shape[1]
    mask = batch["cross_attention_mask"]
    return batch | {
        "input_ids": ids,
        "attention_mask": torch.cat(
            [batch["attention_mask"], torch.ones(len(ids), added, dtype=torch.int64)], 1
        ),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, added, -1, -1)], 1),
    }
