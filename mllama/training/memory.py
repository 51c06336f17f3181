"""What training takes on a device: reckoned before the model is loaded, as :mod:`mllama.quantization.plan`
reckons what answering takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllama.config import MllamaConfig
from mllama.loss import IGNORED
from mllama.quantization.plan import BY_SIZE, weight_bytes
from mllama.quantization.policy import PLAIN
from mllama.quantization.workspace import (
    pixel_bytes,
    projected_bytes,
    text_workspace,
    vision_workspace,
)
from mllama.training.encoding import Example
from mllama.training.options import TrainingOptions

_FLOAT = 4  # bytes of what is trained, of its gradients, and of each of AdamW's two averages
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Batch:
    """The largest batch of a step, as the longest examples make it.

    Attributes:
        rows: examples that are computed together.
        tokens, targets, images: of one of them at most.
    """

    rows: int
    tokens: int
    targets: int
    images: int

    @classmethod
    def of(cls, examples: Sequence[Example], rows: int) -> Batch:
        return cls(
            rows=min(rows, len(examples)),
            tokens=max(len(example.input_ids) for example in examples),
            targets=max(sum(t != IGNORED for t in example.labels) for example in examples),
            images=max(len(example.images) for example in examples),
        )


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes that the steps of a run take, on each rank.

    Attributes:
        weights: of the model; where they are trained as a whole in float32, with their copies in the dtype of
            autocast.
        adapters, gradients, optimizer: of what is trained, each in float32; no adapters where all weights are
            trained.
        activations: what a step keeps for its backward pass.
        workspace: what comes and goes beside that.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def training_plan(
    config: MllamaConfig,
    weights: int,
    dtype: str,
    batch: Batch,
    options: TrainingOptions,
    device: str = "cuda",
    *,
    pieces: int = 1,
) -> TrainingPlan:
    """What a run takes.

    Args:
        pieces: ranks that have one of every weight each, where all weights are trained.
        weights: bytes of the model as it is loaded; of a run that trains them all, in ``dtype``.
        dtype: that is computed in: float32, bfloat16 or float16.
        device: as for :func:`mllama.plan`.
    """
    itemsize = _SIZES[dtype]
    trained = _adapter_parameters(config, options)
    adapters = trained * _FLOAT
    if not options.lora_rank:
        trained = weights // itemsize
        weights = trained * (_FLOAT + (itemsize if itemsize != _FLOAT else 0))
    activations, workspace = _step(config, itemsize, batch, options, device != "cpu")
    if pieces > 1:
        trained = -(-trained // pieces)
        weights = trained * _FLOAT
        workspace += _gathered(config, itemsize)
    return TrainingPlan(
        weights=weights,
        adapters=adapters,
        gradients=trained * _FLOAT,
        optimizer=2 * trained * _FLOAT,
        activations=activations,
        # The optimizer's own temporaries come when activations have gone.
        workspace=max(workspace, trained * _FLOAT - activations),
    )


def _gathered(config: MllamaConfig, itemsize: int) -> int:
    """Bytes of what a rank holds whole for a while, of weights that are in pieces: the head and the projector
    with their gradients, and beside a layer with its gradients the next one."""
    text = config.text_config
    layers = text.num_hidden_layers
    layer = sum(wide * out * count for wide, out, count in _linears(config, vision=False)) // layers
    rest = text.hidden_size * (text.vocab_size + config.vision_config.vision_output_dim)
    return rest * (itemsize + _FLOAT) + layer * (2 * itemsize + _FLOAT)


def _linears(config: MllamaConfig, vision: bool) -> list[tuple[int, int, int]]:
    """in, out and number of the linears that get adapters, in the text tower or in the vision tower."""
    if vision:
        tower = config.vision_config
        width, inner = tower.hidden_size, tower.intermediate_size
        layers = tower.num_hidden_layers + tower.num_global_layers
        return [(width, width, 4 * layers), (width, inner, layers), (inner, width, layers)]
    text = config.text_config
    width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    heads = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    shapes = [(width, heads, layers), (width, kv, 2 * layers), (heads, width, layers)]
    return [*shapes, (width, inner, 2 * layers), (inner, width, layers)]


def _adapter_parameters(config: MllamaConfig, options: TrainingOptions) -> int:
    linears = _linears(config, vision=False)
    if options.lora_vision:
        linears += _linears(config, vision=True)
    return options.lora_rank * sum((wide + out) * count for wide, out, count in linears)


def _step(
    config: MllamaConfig, itemsize: int, batch: Batch, options: TrainingOptions, on_gpu: bool
) -> tuple[int, int]:
    """Bytes that a step keeps for its backward pass, and of what comes and goes."""
    text, vision = config.text_config, config.vision_config
    tokens, images = batch.rows * batch.tokens, batch.rows * batch.images
    tiles = images * vision.max_num_tiles
    states = tiles * vision.num_patches
    crossed = len(text.cross_attention_layers) if images else 0
    attended = len(text.self_attention_layers)
    layer = tokens * _of_text_token(config, itemsize, options)
    keys = states * _of_state(config, itemsize, options)
    width = text.hidden_size * itemsize * tokens
    if options.gradient_checkpointing:
        kept = (attended + crossed) * width
        recomputed = layer + keys
    else:
        kept, recomputed = (attended + crossed) * layer + crossed * keys, 0
    patches = tiles * -(-vision.num_patches // 8) * 8
    if images and (options.lora_vision or not options.lora_rank):
        layers = vision.num_hidden_layers + vision.num_global_layers
        one = patches * _of_patch(config, itemsize, options)
        stream = patches * vision.hidden_size * itemsize
        if options.gradient_checkpointing:
            kept += layers * stream
            recomputed = max(recomputed, one)
        else:
            kept += layers * one
    # Logits of the targets: in the dtype, in float32 and after softmax, with the gradients of the first two.
    logits = batch.rows * batch.targets * text.vocab_size * (2 * itemsize + 3 * _FLOAT)
    # The backward pass holds the gradients of what one layer has made beside it.
    passing = text_workspace(text, tokens, itemsize, quantized=True, on_gpu=on_gpu, part=tokens)
    workspace = recomputed + max(logits, passing)
    if images:
        kept += pixel_bytes(vision, images) + projected_bytes(config, tiles, itemsize)
        workspace = max(workspace, vision_workspace(vision, images, itemsize, on_gpu=on_gpu))
    return kept, workspace


def _inputs(width: int, linears: int, itemsize: int, options: TrainingOptions) -> int:
    """Bytes that linears keep of an input (width,) that they share.

    Each adapter has a copy in float32, or what dropout has left of it, and which that was, on a CPU in
    float32 too.
    """
    if not options.lora_rank:
        return width * itemsize
    own = 0
    if options.lora_dropout:
        own = width * 2 * _FLOAT
    elif itemsize != _FLOAT:
        own = width * _FLOAT
    shared = width * itemsize if not own else 0
    return shared + linears * (own + options.lora_rank * _FLOAT)


def _of_text_token(config: MllamaConfig, itemsize: int, options: TrainingOptions) -> int:
    """Bytes that a layer keeps of a token: the inputs of its norms, linears, attention and activation."""
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    heads, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    attention = (2 * heads + 2 * kv) * itemsize
    return (
        2 * width * itemsize
        + _inputs(width, 3, itemsize, options)
        + attention
        + _inputs(heads, 1, itemsize, options)
        + _inputs(width, 2, itemsize, options)
        + 2 * inner * itemsize
        + _inputs(inner, 1, itemsize, options)
    )


def _of_state(config: MllamaConfig, itemsize: int, options: TrainingOptions) -> int:
    """Bytes that a layer keeps of an image's patch: the inputs of k and v, k before and after its norm, v."""
    text = config.text_config
    kv = text.num_key_value_heads * text.head_dim
    own = _inputs(text.hidden_size, 2, itemsize, options)
    if not options.lora_rank or (itemsize == _FLOAT and not options.lora_dropout):
        own -= text.hidden_size * itemsize  # all layers share one
    return own + 3 * kv * itemsize


def _of_patch(config: MllamaConfig, itemsize: int, options: TrainingOptions) -> int:
    """Bytes that a layer of the vision tower keeps of a patch."""
    vision = config.vision_config
    width, inner = vision.hidden_size, vision.intermediate_size
    return (
        4 * width * itemsize
        + _inputs(width, 3, itemsize, options)
        + 4 * width * itemsize
        + 2 * _inputs(width, 1, itemsize, options)
        + inner * itemsize
        + _inputs(inner, 1, itemsize, options)
    )


def refusal(
    made: TrainingPlan,
    free: int,
    where: torch.device,
    config: MllamaConfig,
    weights: int,
    dtype: str,
    batch: Batch,
    options: TrainingOptions,
    can_quantize: bool,
    pieces: int = 1,
) -> str:
    """Why a plan does not fit, with what is missing and the nearest choice that fits.

    Args:
        config, weights, dtype, batch, options, pieces: those of the plan.
        can_quantize: whether the weights may be loaded in another encoding.
    """
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in vars(made).items() if value)
    text = (
        f"training takes {made.total / 1e9:.2f} GB ({parts}), {where} has {free / 1e9:.2f} GB free: "
        f"{(made.total - free) / 1e9:.2f} GB are missing"
    )

    def fits(**changed: Any) -> bool:
        given: dict[str, Any] = {"weights": weights, "batch": batch, "options": options, **changed}
        made = training_plan(config, dtype=dtype, device=where.type, pieces=pieces, **given)
        return made.total <= free

    one = dataclasses.replace(batch, rows=1)
    recomputing = dataclasses.replace(options, gradient_checkpointing=True)
    if not options.gradient_checkpointing and fits(options=recomputing):
        return f"{text}; --gradient-checkpointing fits"
    if batch.rows > 1 and fits(batch=one):
        return f"{text}; --batch-size 1 fits"
    if fits(batch=one, options=recomputing):
        return f"{text}; --batch-size 1 --gradient-checkpointing fits"
    if can_quantize:
        for encoding in BY_SIZE:
            smaller = 0 if encoding in PLAIN else weight_bytes(config, encoding, None, dtype)
            if 0 < smaller < weights and fits(weights=smaller, batch=one, options=recomputing):
                chosen = (
                    f"--quantization-encoding {encoding} --batch-size 1 --gradient-checkpointing"
                )
                return f"{text}; {chosen} fits"
    return f"{text}; shorter conversations or a smaller model may fit"
