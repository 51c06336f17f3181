"""Makes the demo model twice as wide and trains it further: ``python -m tools.demo_model.widen --out DIR``.

The shipped model's rows of 128 are no whole blocks of `q4_k` and `q6_k`; those of this one are. It is not
shipped: `benchmarks.quality` measures encodings on it.

Every channel becomes two that begin equal. Each weight is shared out at random between the two channels that
it reads, so that the sum, and with it what the model computes, is as before, while no two weights of a row
are alike and their spread is what suits twice the width. Training then moves the channels apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mllama.config import MllamaConfig
from mllama.demo import checkpoint_path
from mllama.model import MllamaForConditionalGeneration
from mllama.processing.processor import MllamaProcessor
from mllama.training.log import Log
from tools.demo_model.config import WIDTH, generation_config, save_configs
from tools.demo_model.data import Batches
from tools.demo_model.evaluate import evaluate
from tools.demo_model.tokenizer import build_tokenizer, save_tokenizer
from tools.demo_model.train import HELD_OUT_SEED, further, learn

_TABLES = ("tile_embedding.weight", "positional_embedding.embedding.weight")


def widen(
    narrow: MllamaForConditionalGeneration, wide: MllamaForConditionalGeneration, seed: int
) -> None:
    """Fills ``wide`` so that it computes what ``narrow`` does; its config has twice the width."""
    generator = torch.Generator().manual_seed(seed)
    width = narrow.config.text_config.hidden_size
    sources = dict(narrow.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(
                _widened(name, sources[name].float(), parameter.shape, width, generator)
            )


def _widened(
    name: str, weight: Tensor, shape: torch.Size, width: int, generator: torch.Generator
) -> Tensor:
    """``weight`` for twice the width, of ``shape``."""
    if weight.shape == shape:  # gates, and the norms of a head
        return weight
    if name.endswith(_TABLES):  # (grids, tiles * patches * width)
        return weight.unflatten(-1, (-1, width)).repeat(1, 1, 2).flatten(1)
    if "embed" in name or weight.dim() == 1:
        channels = 1 if weight.dim() == 2 else 0  # the filters of patches have theirs first
        return torch.cat([weight, weight], channels)
    rows = weight.repeat(shape[0] // weight.shape[0], 1)
    if name.endswith("multi_modal_projector.weight"):
        # It reads the last state and then the taps, whose channels interleave: c * taps + j.
        last, taps = rows[:, :width], rows[:, width:].unflatten(1, (width, -1))
        return torch.cat([_shared(last, generator), _shared(taps, generator).flatten(1)], 1)
    return _shared(rows, generator)


def _shared(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Each weight as two that sum to it, the second half a dimension behind the first."""
    share = torch.randn(weight.shape, generator=generator) * weight.std() / 2
    return torch.cat([weight / 2 + share, weight / 2 - share], 1)


def train(
    out: Path,
    steps: int,
    seed: int,
    images: int,
    backend: str = "kernels",
    log: Log | None = None,
) -> MllamaForConditionalGeneration:
    """Widens the shipped model, trains it for so many steps, and writes the checkpoint folder ``out``.

    Args:
        images: of each step.
        backend: whose forward and backward are run, "reference" or "kernels".
        log: gets the loss of every step.
    Returns: the model as it was saved, in bfloat16.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, out)
    save_configs(tokenizer, out, 2 * WIDTH)
    model = MllamaForConditionalGeneration(
        MllamaConfig.from_pretrained(out), backend=backend, semantics="meta"
    )
    narrow = MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype="float32")
    widen(narrow, model, seed)
    batches = Batches(MllamaProcessor.from_pretrained(out), tokenizer, seed)
    learn(model, None, batches, further(steps, "questions"), log, images=images)
    model.eval().to(torch.bfloat16)
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(out)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.widen", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--steps", type=int, default=60, help="optimiser steps (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of shares, images and questions (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=16, help="of each step (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        choices=("reference", "kernels"),
        default="kernels",
        help="whose forward and backward are run (default: %(default)s)",
    )
    parser.add_argument("--log", type=Path, help="file for the losses (JSONL)")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("medium")
    log = Log(options.log, 0) if options.log else None
    train(options.out, options.steps, options.seed, options.images, options.backend, log)
    report = evaluate(
        options.out,
        range(HELD_OUT_SEED, HELD_OUT_SEED + 200),
        backend=options.backend,
        dtype=torch.bfloat16,
    )
    print(f"held-out accuracy, 200 images, bfloat16\n{report}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
