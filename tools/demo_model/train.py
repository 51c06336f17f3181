"""Trains the demo model from nothing on a CPU: ``python -m tools.demo_model.train --out DIR``.

First the vision tower learns to see (see `seeing`), then the whole model to answer, then it practises the
harder questions.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.checks import check_text
from mllama.config import MllamaConfig
from mllama.demo.shapes import LAYOUTS
from mllama.loss import IGNORED
from mllama.model import MllamaForConditionalGeneration
from mllama.processing.processor import MllamaProcessor
from mllama.tiles import ImageTiles
from mllama.training.log import Log
from mllama.training.optimizer import adamw, half_cosine
from tools.demo_model.config import generation_config, save_configs
from tools.demo_model.data import Batch, Batches, Rows, Texts
from tools.demo_model.evaluate import evaluate
from tools.demo_model.seeing import PatchHead
from tools.demo_model.tokenizer import build_tokenizer, save_tokenizer

_IMAGES = 32  # per step; every one gets a question of each kind
_SEEING_SHARE = 0.35  # of the steps, before the first text
_SEEING_WEIGHT = 0.5  # of the patch loss beside the answers' loss afterwards
_DIALOGUE_EVERY = 8  # steps; in the others each question is a row of its own
_PRACTICE_SHARE, _FURTHER_RATE = 0.2, 1e-3  # steps after the others, as a share of those
_PEAK_RATE, _WARM_UP, _WEIGHT_DECAY = 2e-3, 100, 0.02
_REPORT_EVERY = 50
HELD_OUT_SEED = 1_000_000  # sample_picture seeds from here on; training draws from another stream

Lesson = tuple[Texts, float]  # what a step is about, and its learning rate


def initialise(model: MllamaForConditionalGeneration, seed: int) -> None:
    """Draws weights that learn fast at this size.

    The published initialisation closes the cross-attention gates, through which nothing but the gates
    learns at first, and its small weights suit wide models. Here gates begin open, every matrix keeps the
    scale of its input, the patch filters begin as the lowest frequencies, and the position tables as waves
    over the image, so that like patches and neighbours are alike from the start.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.text_config.num_hidden_layers
    for name, parameter in model.named_parameters():
        values = parameter.data
        if name.endswith(("gate", "gate_attn", "gate_ffn")):
            values.fill_(1.0)
        elif "norm" in name or name.endswith("bias"):
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        elif ("embedding" in name and "patch" not in name) or "embed_tokens" in name:
            values.normal_(0, 0.3, generator=generator)
        else:
            fan_in = values[0].numel()
            is_last = name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))
            std = fan_in**-0.5 / (math.sqrt(depth) if is_last else 1)
            values.normal_(0, std, generator=generator)
    vision = model.model.vision_model
    vision.patch_embedding.weight.data = _patch_waves(model.config)
    vision.gated_positional_embedding.tile_embedding.weight.data = _position_waves(model.config)
    for table in (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding):
        table.embedding.weight.data[0] = 0


def _patch_waves(config: MllamaConfig) -> Tensor:
    """(E, 3, p, p): two-dimensional cosines of the lowest frequencies, half of brightness, half of colour."""
    width, patch = config.vision_config.hidden_size, config.vision_config.patch_size
    points = math.pi * (torch.arange(patch) + 0.5) / patch
    waves = torch.stack([(k * points).cos() * (2 / patch) ** 0.5 for k in range(patch)])
    waves[0] /= 2**0.5
    lowest = sorted(
        itertools.product(range(patch), repeat=2), key=lambda f: (f[0] ** 2 + f[1] ** 2, f)
    )
    mixes = (((1, 1, 1), width // 2), ((1, -1, 0), width // 4), ((1, 1, -2), width // 4))
    filters = []
    for mix, count in mixes:
        color = F.normalize(torch.tensor(mix, dtype=torch.float32), dim=0)[:, None, None]
        for row, column in lowest[:count]:
            strength = 0.5 if row or column else 0.15  # the mean is many times larger than the rest
            filters.append(strength * color * waves[row][:, None] * waves[column])
    return torch.stack(filters)


def _position_waves(config: MllamaConfig) -> Tensor:
    """(R, T*P*E): for each tile grid, sines and cosines of every patch's place in the whole image.

    As in published checkpoints, the rows of grid 0 and of tiles that a grid does not have are zero.
    """
    vision = config.vision_config
    side, width = vision.image_size // vision.patch_size, vision.hidden_size
    frequencies = math.pi * torch.arange(1, width // 4 + 1) / 4
    tables = torch.zeros(len(LAYOUTS) + 1, vision.max_num_tiles, side * side + 1, width)
    centers = (torch.arange(side) + 0.5) / side
    for index, (rows, columns) in enumerate(LAYOUTS, start=1):
        for tile in range(rows * columns):
            x = (centers + tile % columns) / columns
            y = (centers + tile // columns) / rows
            waves = [
                torch.cat([(t[:, None] * frequencies).sin(), (t[:, None] * frequencies).cos()], -1)
                for t in (x, y)
            ]
            grid = torch.cat(
                [waves[0].expand(side, -1, -1), waves[1][:, None].expand(-1, side, -1)], -1
            )
            tables[index, tile, 1:] = 0.5 * grid.flatten(0, 1)
    return tables.flatten(1)


def row_logits(
    model: MllamaForConditionalGeneration, rows: Rows, tiles: ImageTiles
) -> tuple[Tensor, Tensor]:
    """Logits (n, V) at the tokens before each answer token of the rows, and those tokens (n,)."""
    tower = model.model.language_model
    text = check_text(tower.config, rows.input_ids, None, None, None, None, tower.embed_tokens)
    hidden = tower.run(
        text,
        ImageTiles(tiles.states, tiles.table[rows.image]),
        rows.cross_attention_mask,
        None,
        caching=False,
        output_hidden_states=False,
    ).last_hidden_state
    is_target = rows.labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][is_target]), rows.labels[:, 1:][is_target]


def batch_loss(
    model: MllamaForConditionalGeneration,
    head: PatchHead | None,
    batch: Batch,
    right: dict[str, list[float]],
) -> Tensor:
    """Mean loss per answer token, if the batch has any, and of the patches, if there is a head for them.

    Appends to ``right``, per kind, whether each row was answered without a mistake, and the share of the
    covered patches that was seen rightly.
    """
    tiles = model.model.encode_images(**batch.images)
    seeing = torch.zeros(())
    if head is not None:
        seeing, seen = head.loss(tiles, batch.targets)
        right["patches"].append(seen)
    if not batch.rows:
        return seeing
    losses, count = [], 0
    for rows in batch.rows:
        logits, targets = row_logits(model, rows, tiles)
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        hits = (logits.argmax(-1) == targets).split((rows.labels != IGNORED).sum(1).tolist())
        for kinds, hit in zip(rows.kinds, hits, strict=True):
            right[kinds[0] if len(kinds) == 1 else "dialogue"].append(float(hit.all()))
    return torch.stack(losses).sum() / count + _SEEING_WEIGHT * seeing


def _lessons(steps: int) -> list[Lesson]:
    """First only images, then questions: a half cosine to almost nothing, warmed up at both beginnings."""
    first_text = round(_SEEING_SHARE * steps)
    lessons: list[Lesson] = []
    for step in range(steps):
        since = step if step < first_text else step - first_text
        rate = _PEAK_RATE * _falling(step, steps) * min(1.0, (since + 1) / _WARM_UP)
        texts: Texts = "none" if step < first_text else "questions"
        lessons.append((_or_dialogues(step, texts), rate))
    return lessons


def further(steps: int, texts: Texts) -> list[Lesson]:
    """For a model that answers already: questions of such texts, at a lower rate."""
    return [
        (
            _or_dialogues(step, texts),
            _FURTHER_RATE * _falling(step, steps) * min(1.0, (step + 1) / _WARM_UP),
        )
        for step in range(steps)
    ]


def _falling(step: int, steps: int) -> float:
    return 0.005 + 0.995 * half_cosine(step / steps)


def _or_dialogues(step: int, texts: Texts) -> Texts:
    every = step % _DIALOGUE_EVERY == _DIALOGUE_EVERY - 1
    return "dialogues" if every and texts != "none" else texts


def train(
    out: Path, steps: int, seed: int, backend: str = "reference", log: Log | None = None
) -> MllamaForConditionalGeneration:
    """Trains for so many steps, practises the harder questions, and writes the checkpoint folder ``out``.

    Args:
        backend: whose forward and backward are run, "reference" or "kernels".
        log: gets the loss of every step, those of the practice numbered on.
    Returns: the model as it was saved, in bfloat16.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, out)
    save_configs(tokenizer, out)
    batches = Batches(MllamaProcessor.from_pretrained(out), tokenizer, seed)
    model = MllamaForConditionalGeneration(
        MllamaConfig.from_pretrained(out), backend=backend, semantics="meta"
    )
    initialise(model, seed)
    done = learn(model, PatchHead(model.config), batches, _lessons(steps), log)
    practice = further(round(_PRACTICE_SHARE * steps), "practice")  # the harder ones more often
    learn(model, None, batches, practice, log, before=done)
    model.eval().to(torch.bfloat16)
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(out)
    return model


def learn(
    model: MllamaForConditionalGeneration,
    head: PatchHead | None,
    batches: Batches,
    lessons: list[Lesson],
    log: Log | None = None,
    before: int = 0,
    images: int | None = None,
) -> int:
    """One optimiser step per lesson; with a head, the patches are part of the loss.

    Args:
        images: of each step; those of the shipped model's training if None.

    Returns: how many steps there have been, with those ``before`` them.
    """
    modules = [model] if head is None else [model, head]
    named = [pair for module in modules for pair in module.named_parameters()]
    optimizer = adamw(named, _PEAK_RATE, _WEIGHT_DECAY, betas=(0.9, 0.98))
    right: dict[str, list[float]] = defaultdict(list)
    begin, total, steps = time.monotonic(), 0.0, len(lessons)
    model.train()
    for step, (texts, rate) in enumerate(lessons):
        loss = batch_loss(model, head, batches.draw(images or _IMAGES, texts), right)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        total += loss.item()
        if log is not None:
            log.write(step=before + step + 1, loss=loss.item())
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == steps:
            done = (step + 1) / steps
            spent = time.monotonic() - begin
            shares = ", ".join(f"{k} {sum(r) / len(r):.3f}" for k, r in sorted(right.items()))
            print(
                f"step {step + 1}/{steps}  {spent:.0f} s, {spent * (1 / done - 1):.0f} s left  "
                f"loss {total / _REPORT_EVERY:.4f}  right: {shares}",
                file=sys.stderr,
                flush=True,
            )
            right.clear()
            total = 0.0
    return before + steps


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.train",
        description=__doc__,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--steps",
        type=int,
        default=4000,
        help="optimiser steps before the practice (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of weights, images and questions (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=("reference", "kernels"),
        default="reference",
        help="whose forward and backward are run (default: %(default)s)",
    )
    parser.add_argument("--log", type=Path, help="file for the losses (JSONL)")
    options = parser.parse_args(arguments)
    # bfloat16 products where the CPU has them: a third faster
    torch.set_float32_matmul_precision("medium")
    log = Log(options.log, 0) if options.log else None
    train(options.out, options.steps, options.seed, options.backend, log)
    for dtype in (torch.float32, torch.bfloat16):
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + 200)
        report = evaluate(options.out, seeds, backend=options.backend, dtype=dtype)
        print(f"held-out accuracy, 200 images, {dtype}\n{report}")
        if log is not None:
            log.write(step="end", dtype=str(dtype), accuracy=report.accuracy())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
