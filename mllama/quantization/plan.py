"""What a model takes on a device: weights, caches and workspace, before anything is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mllama.checkpoints.expected import expected_shapes
from mllama.checkpoints.key_layout import KeyLayout
from mllama.config import MllamaConfig
from mllama.quantization.policy import MODEL_ENCODINGS, PLAIN, assign, unknown
from mllama.quantization.workspace import (
    GRAPHS,
    pixel_bytes,
    projected_bytes,
    text_workspace,
    vision_workspace,
)
from mllama.shapes import Shapes
from mllama.wording import quoted
from mllama_kernels.encodings import ENCODINGS

_CLASS = "MllamaForConditionalGeneration"
_PAGE = 64  # tokens that the cache makes room for together
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# In the order in which a smaller one is proposed.
BY_SIZE = ("bfloat16", "int8", "fp8", "q8_0", "q6_k", "q4_k_m", "q4_k", "q4_0")
_LARGE = {
    "hidden_size": 8192,
    "num_hidden_layers": 100,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
    "cross_attention_layers": list(range(3, 100, 5)),
}
_NAMED: dict[str, dict[str, Any]] = {"11b": {}, "90b": _LARGE}
# What a driver and the contexts of libraries keep of a card for themselves.
_SMALL_CARD, _RESERVED, _RESERVED_OF_LARGE = 40 * 2**30, 600 * 10**6, 800 * 10**6


def named_config(name: str) -> MllamaConfig | None:
    """The configuration of a published size, "11b" or "90b"; None for another name."""
    text = _NAMED.get(name.lower())
    if text is None:
        return None
    return MllamaConfig(text_config=text, vision_config={"image_size": 560})


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a model that answers so many prompts at once; of several ranks that share it, those of the one
    that takes most.

    Attributes:
        encoding: of the weights, or their dtype.
        context: tokens of each prompt and its answer.
        batch: prompts that are answered at once; they are read one after another.
        weights, self_kv, cross_kv, workspace, graphs: what takes how much; self_kv is of the texts, cross_kv
            of the images.
        tensor_parallel: how many ranks.
    """

    encoding: str
    context: int
    batch: int
    weights: int
    self_kv: int
    cross_kv: int
    workspace: int
    graphs: int
    tensor_parallel: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.self_kv + self.cross_kv + self.workspace + self.graphs

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def plan(
    config: MllamaConfig | str,
    encoding: str,
    context: int,
    batch: int = 1,
    images: int = 1,
    tiles: int = 4,
    overrides: Mapping[str, str] | None = None,
    *,
    dtype: str = "bfloat16",
    weights: int | None = None,
    device: str = "cuda",
    tensor_parallel: int | None = None,
) -> MemoryPlan:
    """What a model takes.

    Args:
        config: of the whole model, or "11b" or "90b".
        encoding: one of `policy.MODEL_ENCODINGS`, or the name of a dtype for plain weights.
        context: tokens of each prompt and its answer together.
        batch: prompts that are answered at once.
        images: of each prompt.
        tiles: of each image that the cache holds.
        overrides: as for `from_pretrained`.
        dtype: of activations, caches, and what is not quantised.
        weights: their bytes, where they are known already; of one rank.
        device: "cpu", or any other for a GPU, where decode steps are captured and libraries have a workspace.
        tensor_parallel: how many ranks share the model; None: as many as its configuration says, 1 of a model
            that is not loaded.
    Raises: ValueError for what cannot be.
    """
    if isinstance(config, str):
        named = named_config(config)
        if named is None:
            raise ValueError(f"config must be a MllamaConfig, '11b' or '90b', got {quoted(config)}")
        config = named
    if encoding not in MODEL_ENCODINGS and encoding not in PLAIN and weights is None:
        raise ValueError(unknown("encoding", encoding, (*MODEL_ENCODINGS, *PLAIN)))
    if dtype not in _ITEMSIZE:
        raise ValueError(f"dtype must be one of {list(_ITEMSIZE)}, got {quoted(dtype)}")
    text, vision = copy.copy(config.text_config), config.vision_config
    ranks = text.tensor_parallel_size if tensor_parallel is None else tensor_parallel
    _check_counts(config, context, batch, images, tiles, ranks)
    text.tensor_parallel_size = ranks
    dtype = encoding if encoding in PLAIN and weights is None else dtype
    itemsize = _ITEMSIZE[dtype]
    if weights is None:
        weights = weight_bytes(config, encoding, overrides, dtype, ranks)
    head = 2 * text.local_key_value_heads * text.head_dim * itemsize
    crossed, attended = len(text.cross_attention_layers), len(text.self_attention_layers)
    on_gpu = device != "cpu"
    workspace = text_workspace(
        text, context, itemsize, quantized=encoding not in PLAIN, on_gpu=on_gpu, ranks=ranks
    )
    if images:
        workspace += projected_bytes(config, images * tiles, itemsize)
        tower = vision_workspace(vision, images, itemsize, on_gpu=on_gpu, ranks=ranks)
        workspace = max(workspace, tower)
        workspace += pixel_bytes(vision, images)
    return MemoryPlan(
        encoding=encoding,
        context=context,
        batch=batch,
        weights=weights,
        self_kv=batch * -(-context // _PAGE) * _PAGE * attended * head,
        cross_kv=batch * images * tiles * vision.num_patches * crossed * head,
        workspace=workspace,
        graphs=GRAPHS if on_gpu else 0,
        tensor_parallel=ranks,
    )


def weight_bytes(
    config: MllamaConfig,
    encoding: str,
    overrides: Mapping[str, str] | None = None,
    dtype: str = "bfloat16",
    tensor_parallel: int = 1,
) -> int:
    """Bytes of all parameters, of several ranks on the one that has most.

    Raises: ValueError as :func:`mllama.quantization.policy.assign`, and for ranks that cannot share it.
    """
    layout = KeyLayout(_CLASS)
    shapes = expected_shapes(config, layout)
    chosen: Mapping[str, str] = {}
    if encoding not in PLAIN:
        chosen = assign(config, layout, shapes, encoding, overrides, dtype).encodings
    elif overrides:
        raise ValueError(f"overrides go with an encoding that quantises, {encoding} does not")
    itemsize = _ITEMSIZE[dtype]
    every: list[Shapes] = [shapes]
    if tensor_parallel > 1:
        every = _shapes_of_ranks(config, shapes, chosen, tensor_parallel)
    return max(
        sum(
            ENCODINGS[chosen[name]].nbytes(*shape)
            if name in chosen
            else math.prod(shape) * itemsize
            for name, shape in own.items()
        )
        for own in every
    )


def _shapes_of_ranks(
    config: MllamaConfig, shapes: Shapes, encodings: Mapping[str, str], size: int
) -> list[Shapes]:
    """Those of the parameters on each rank, as the modules say, which are built without weights."""
    from mllama.checkpoints.matching import without_weights  # these plan by this module
    from mllama.model import MllamaForConditionalGeneration
    from mllama.parallel.split import Split

    with without_weights():
        model = MllamaForConditionalGeneration(config)
    units = {name: ENCODINGS[encoding].block for name, encoding in encodings.items()}
    split = Split(model, size, units)
    return [
        {name: split.part_shape(name, shape, rank) for name, shape in shapes.items()}
        for rank in range(size)
    ]


def longest_context(
    config: MllamaConfig, encoding: str, free: int, **options: Any
) -> tuple[int, int]:
    """The longest context that fits into ``free`` bytes and that the model takes, 0 where none does, and the
    bytes that are missing for one page of it. ``options`` are those of :func:`plan`."""
    if "weights" not in options:
        overrides, dtype = options.get("overrides"), options.get("dtype", "bfloat16")
        size_of = encoding if encoding in PLAIN else dtype
        ranks = options.get("tensor_parallel") or config.text_config.tensor_parallel_size
        options["weights"] = weight_bytes(config, encoding, overrides, size_of, ranks)
    low, high = 0, config.text_config.max_position_embeddings // _PAGE
    missing = plan(config, encoding, _PAGE, **options).total - free
    while low < high:
        middle = (low + high + 1) // 2
        if plan(config, encoding, middle * _PAGE, **options).total <= free:
            low = middle
        else:
            high = middle - 1
    return low * _PAGE, max(missing, 0)


def usable(card: int) -> int:
    """Bytes that are left of a card's by the driver and the contexts of libraries."""
    return max(card - (_RESERVED if card < _SMALL_CARD else _RESERVED_OF_LARGE), 0)


def refusal(
    made: MemoryPlan,
    config: MllamaConfig,
    free: int,
    where: str,
    *,
    is_stored: bool = False,
    as_stored: int | None = None,
    **options: Any,
) -> str:
    """Why a plan does not fit, with what is missing and the nearest choice that fits.

    Args:
        is_stored: the weights are stored quantised, and a checkpoint is loaded in no other encoding than its
            own.
        as_stored: bytes of such weights where they are decoded, in the plan, as they are loaded.
        options: those of :func:`plan`.
    """
    parts = ", ".join(
        f"{name} {getattr(made, name) / 1e9:.2f}"
        for name in ("weights", "self_kv", "cross_kv", "workspace")
    )
    text = (
        f"{made.encoding} with a context of {made.context:,} takes {made.total / 1e9:.2f} GB ({parts}), "
        f"{where} has {free / 1e9:.2f} GB free: {(made.total - free) / 1e9:.2f} GB are missing"
    )
    return f"{text}; {_nearest(made, config, free, is_stored, as_stored, options)}"


def _nearest(
    made: MemoryPlan,
    config: MllamaConfig,
    free: int,
    is_stored: bool,
    as_stored: int | None,
    options: dict[str, Any],
) -> str:
    """The first that fits of a shorter context, fewer images, the weights as they are stored, and a smaller
    encoding: of this checkpoint where it can be loaded in one, else of the one that it was made of."""
    from mllama.parallel.split import CannotSplit

    shorter, _ = longest_context(config, made.encoding, free, weights=made.weights, **options)
    if shorter:
        return f"a context of {shorter:,} fits"
    asked = options.get("images", 1)
    # Fewer of them never take more: the most that fit lie between what fits and what does not.
    least, most = 0, asked
    while least < most - 1:
        middle = (least + most) // 2
        if _context_with(made, config, free, options, middle):
            least = middle
        else:
            most = middle
    if asked and (context := _context_with(made, config, free, options, least)):
        images = f"{least} image{'s' if least > 1 else ''}" if least else "no image"
        return f"with {images} a context of up to {min(context, made.context):,} fits"
    if as_stored is not None:
        context, _ = longest_context(config, "stored", free, weights=as_stored, **options)
        if context:
            up_to = f"a context of up to {min(context, made.context):,}"
            return f"without dequantize=True it fits, with {up_to}"
    own = {name: value for name, value in options.items() if name != "overrides"}
    suffix = " without overrides" if options.get("overrides") else ""
    begin = BY_SIZE.index(made.encoding) + 1 if made.encoding in BY_SIZE else 0
    for encoding in BY_SIZE[begin:]:
        if encoding in PLAIN:
            continue
        try:
            context, _ = longest_context(config, encoding, free, **own)
        except CannotSplit:  # its blocks are too long for so many ranks
            continue
        if context:
            original = "its weights stay as they are stored; of the original, " if is_stored else ""
            up_to = f"a context of up to {min(context, made.context):,}"
            return f"{original}{encoding}{suffix} fits, with {up_to}"
    return "no encoding fits"


def _context_with(
    made: MemoryPlan, config: MllamaConfig, free: int, options: dict[str, Any], images: int
) -> int:
    given = {**options, "images": images, "weights": made.weights}
    return longest_context(config, made.encoding, free, **given)[0]


def _check_counts(
    config: MllamaConfig, context: int, batch: int, images: int, tiles: int, ranks: int
) -> None:
    most = config.text_config.max_position_embeddings
    for name, value, low, high in (
        ("context", context, 1, most),
        ("batch", batch, 1, 2**20),
        ("images", images, 0, 2**20),
        ("tiles", tiles, 1, config.vision_config.max_num_tiles),
        ("tensor_parallel", ranks, 1, config.text_config.num_attention_heads),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(
                f"{name} must be an integer from {low} to {high:,}, got {quoted(value)}"
            )
