"""Valid calls of every op with sizes drawn at random: what the fuzz test makes hostile afterwards.

A call is a dict of arguments by name. `public(op, draw)` has those of the public function; `forward` and
`backward` make of it those of the compiled ops, in the order of their schemas.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from quantized_weights import EVERY, columns_of, like_a_model, random_parts
from torch import Tensor

from mllama_kernels import QuantizedTensor, _library
from mllama_kernels.encodings import ENCODINGS
from mllama_kernels.quantize import TAKES_IMPORTANCE

Call = dict[str, Any]

# Where kernels change their way: around vectors, blocks and tiles.
SMALL = (0, 1, 1, 2, 2, 3, 4, 5, 7, 8)
SIZES = (*SMALL, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
LARGE = (*SIZES, 100, 127, 128, 129, 192, 257)
ELEMENTS = 60_000


class Draw:
    """Random sizes and values of one case, the same for the same seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.scale = self.random.choice([1.0, 1.0, 1.0, 0.01, 8.0])
        dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]
        self.dtype = self.random.choice(dtypes if _library.simulated else [*dtypes, torch.float64])

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, values: Any) -> Any:
        return self.random.choice(values)

    def size(self, sizes: tuple[int, ...] = SIZES, least: int = 0) -> int:
        return max(least, self.random.choice(sizes))

    def shape(self, last: int) -> list[int]:
        """Leading dimensions and a last one, of no more than ELEMENTS elements."""
        sizes = [self.size(SMALL) for _ in range(self.random.randint(0, 3))] + [self.size(SIZES)]
        while last * product(sizes) > ELEMENTS:
            sizes[sizes.index(max(sizes))] //= 2
        return [*sizes, last] if self.chance(0.9) else [last]

    def floats(self, *sizes: int, scale: float | None = None) -> Tensor:
        values = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        return (values * (self.scale if scale is None else scale)).to(self.dtype)

    def bools(self, *sizes: int) -> Tensor:
        share = self.random.choice([0.0, 0.3, 0.7, 1.0])
        return torch.rand(sizes, generator=self.generator) < share

    def integers(
        self, low: int, high: int, *sizes: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        return torch.randint(low, max(high, low + 1), sizes, generator=self.generator, dtype=dtype)

    def maybe(self, value: Tensor, probability: float = 0.5) -> Tensor | None:
        return value if self.chance(probability) else None

    def eps(self) -> float:
        return self.random.choice([1e-5, 1e-6, 0.25])

    def head(self) -> int:
        if _library.simulated:
            return self.random.choice([64, 80, 128])
        return self.random.choice([8, 16, 24, 40, 64, 64, 80, 96, 128, 136, 256])

    def lengths(self) -> list[int]:
        return [self.size(SMALL + (17, 33)) for _ in range(self.random.randint(0, 4))]


def product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


# ---------------------------------------------------------------- the public functions


def _rms_norm(d: Draw) -> Call:
    width = d.size(LARGE)
    return {"x": d.floats(*d.shape(width)), "weight": d.floats(width), "eps": d.eps()}


def _add_rms_norm(d: Draw) -> Call:
    width = d.size(LARGE)
    sizes = d.shape(width)
    return {
        "x": d.floats(*sizes),
        "residual": d.floats(*sizes),
        "weight": d.floats(width),
        "eps": d.eps(),
        "gate": d.maybe(d.floats(1)),
        "row_mask": d.maybe(d.bools(*sizes[:-1])),
    }


def _gated_residual(d: Draw) -> Call:
    sizes = d.shape(d.size(LARGE))
    return {
        "x": d.floats(*sizes),
        "residual": d.floats(*sizes),
        "gate": d.floats(1),
        "row_mask": d.maybe(d.bools(*sizes[:-1])),
    }


def _swiglu(d: Draw) -> Call:
    return {"gate_up": d.floats(*d.shape(2 * d.size(LARGE)))}


def _skinny_linear(d: Draw) -> Call:
    rows, k, n = d.size((*SMALL, 15, 16)), d.size(LARGE, least=1), d.size(LARGE)
    while k * n > ELEMENTS:
        n //= 2
    swiglu, normed = d.chance(0.4), d.chance(0.5)
    residual = d.maybe(d.floats(rows, n))
    gate = None if residual is None else d.maybe(d.floats(1))
    return {
        "x": d.floats(rows, k),
        "weight": d.floats((2 if swiglu else 1) * n, k, scale=k**-0.5),
        "norm_weight": d.floats(k) if normed else None,
        "eps": d.eps(),
        "residual": residual,
        "gate": gate,
        "row_mask": None if gate is None else d.maybe(d.bools(rows)),
        "swiglu": swiglu,
        "weight_is_constant": d.chance(0.5),
    }


def _quantized(d: Draw, rows: int, most_columns: int = 600) -> QuantizedTensor:
    """A weight of any encoding, its values like a model's."""
    kind = d.one_of(EVERY)
    columns = columns_of(kind, d.random.randint(1, most_columns))
    with _seeded(d):
        return QuantizedTensor.from_parts(kind[0], like_a_model(kind, rows, columns))


@contextlib.contextmanager
def _seeded(d: Draw) -> Iterator[None]:
    """What draws by torch's own generator is drawn by the call's number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(d.random.getrandbits(62))
        yield


def _quantized_linear(d: Draw) -> Call:
    if d.dtype == torch.float64:  # for the reference alone
        d.dtype = torch.float32
    rows, n = d.size((*SMALL, 15, 16, 17, 40)), d.size((*SIZES, 100))
    swiglu = d.chance(0.4)
    weight = _quantized(d, (2 if swiglu else 1) * n)
    k = weight.shape[1]
    leading = d.one_of([[rows], [rows], [rows, 1], [1, rows], []])
    residual = d.maybe(d.floats(*leading, n))
    gate = None if residual is None else d.maybe(d.floats(1))
    return {
        "x": d.floats(*leading, k),
        "weight": weight,
        "bias": d.maybe(d.floats(weight.shape[0])),
        "norm_weight": d.maybe(d.floats(k)),
        "eps": d.eps(),
        "residual": residual,
        "gate": gate,
        "row_mask": None if gate is None else d.maybe(d.bools(*leading)),
        "swiglu": swiglu,
        "weight_is_constant": d.chance(0.5),
        "activations": None,
    }


def _quantized_rows(d: Draw) -> Call:
    weight = _quantized(d, d.size((*SIZES, 100), least=1))
    ids = d.integers(0, weight.shape[0], *d.shape(d.size(SMALL))[-2:])
    dtype = torch.float32 if d.dtype == torch.float64 else d.dtype
    return {"ids": ids, "weight": weight, "dtype": dtype}


def _quantized_pack(d: Draw) -> Call:
    kind, rows = d.one_of(EVERY), d.size((*SIZES, 100))
    columns = columns_of(kind, d.random.randint(1, 600))
    with _seeded(d):
        parts = random_parts(kind, rows, columns)
    form = QuantizedTensor.from_parts(kind[0], parts).form
    data, scale, zero = (*(p for n, p in parts.items() if n != "table"), None, None)[:3]
    return {"data": data, "scale": scale, "zero": zero, **dict(zip(_FORM, form))}


def _quantized_unpack(d: Draw) -> Call:
    weight = _quantized(d, d.size((*SIZES, 100)))
    return _as_stored(weight)


def _quantized_dequantize(d: Draw) -> Call:
    weight = _quantized(d, d.size((*SIZES, 100)))
    begin, end = sorted(d.random.randint(0, weight.shape[0]) for _ in range(2))
    dtype = torch.float32 if d.dtype == torch.float64 else d.dtype
    return {**_as_stored(weight), "begin": begin, "end": end, "dtype": dtype}


def _quantize_blocks(d: Draw) -> Call:
    encoding = d.one_of([name for name, e in ENCODINGS.items() if e.is_made])
    columns = columns_of((encoding, 0, ()), d.random.randint(1, 600))
    if d.dtype == torch.float64:
        d.dtype = torch.float32
    weight = d.floats(d.size((*SMALL, 15, 16, 17)), columns)
    importance = None
    if encoding in TAKES_IMPORTANCE and d.chance(0.5):
        importance = torch.rand(columns, generator=d.generator) + 0.01
    return {"weight": weight, "encoding": encoding, "importance": importance}


_FORM = ("encoding", "n", "k", "group", "scale_type", "zero_type")


def _as_stored(weight: QuantizedTensor) -> Call:
    packed, table = weight.packed_and_table
    return {"packed": packed, "table": table, **dict(zip(_FORM, weight.form))}


def _heads(d: Draw, rows: int) -> tuple[int, int, int]:
    """Query heads, key heads, head size; without a query head now and then."""
    size = d.head()
    kv_heads, group = d.one_of((1, 1, 2, 3)), d.one_of((0, 1, 1, 2, 3, 4, 7))
    while group > 1 and rows * kv_heads * group * size > ELEMENTS:
        group -= 1
    return kv_heads * group, kv_heads, size


def _scale(d: Draw) -> float | None:
    """Of the scores; not so large that one key takes all of the weight, whose gradients cancel."""
    return d.one_of([None, None, 0.1, 0.3]) if d.scale <= 1 else 0.01


def _longest(d: Draw, lengths: list[int]) -> int:
    """A bound on the rows of a sequence: exact, loose, or far beyond all rows."""
    longest = max(lengths, default=0)
    return d.one_of([longest, longest + 1, sum(lengths) + 5, 2**31 - 1, 2**40, 2**63 - 1])


def _rotated(d: Draw, leading: list[int], batch: int | None = None) -> Call:
    """q, k, v, cos, sin; cos and sin have a batch of their own where there is one."""
    heads, kv_heads, size = _heads(d, product(leading))
    angle = d.floats(*([batch, *leading[1:]] if batch is not None else leading), size // 2)
    return {
        "q": d.floats(*leading, heads, size),
        "k": d.floats(*leading, kv_heads, size),
        "v": d.floats(*leading, kv_heads, size),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }


def _rotary_attention(d: Draw) -> Call:
    if d.chance(0.5):
        batch, rows = d.size(SMALL), d.size(SIZES)
        call = _rotated(d, [batch, rows], d.one_of([1, batch]))
        packed: Call = {"cu_seqlens": None, "max_seqlen": d.one_of([None, rows, 2**40])}
    else:
        lengths = d.lengths()
        call = _rotated(d, [sum(lengths)])
        packed = {
            "cu_seqlens": bounds_of(lengths),
            "max_seqlen": d.one_of([None, _longest(d, lengths)]),
        }
    return {**call, "softmax_scale": _scale(d), "interleaved": d.chance(0.5), **packed}


def _rotary_attention_cached(d: Draw) -> Call:
    lengths = d.lengths()
    past = [d.size((0, 1, 5, 15, 16, 17, 31, 33, 60)) for _ in lengths]
    page = d.one_of((16, 16, 32, 48))
    needed = [-(-(a + b) // page) for a, b in zip(past, lengths)]
    spare, columns = d.size((0, 0, 1, 3)), max([*needed, 0]) + d.size((0, 0, 1, 2))
    pages = sum(needed) + spare
    order = torch.randperm(pages, generator=d.generator).tolist()
    # Columns that a sequence does not reach hold anything.
    table = d.integers(-(2**31), 2**31 - 1, len(lengths), columns, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    call = _rotated(d, [sum(lengths)])
    if call["q"].shape[1] == 0:
        call["q"] = d.floats(*call["k"].shape)
    cache = (pages, call["k"].shape[1], page, call["k"].shape[2])
    return {
        **call,
        "k_cache": d.floats(*cache),
        "v_cache": d.floats(*cache),
        "page_table": table,
        "cu_seqlens": bounds_of(lengths),
        "cache_lens": torch.tensor(past, dtype=torch.int32),
        "max_seqlen": _longest(d, lengths),
        "softmax_scale": _scale(d),
        "interleaved": d.chance(0.5),
    }


def _cross_attention(d: Draw) -> Call:
    tiles, tokens = d.size((0, 1, 1, 2, 3, 4)), d.size((0, 1, 2, 5, 8, 9, 16, 17, 33))
    if d.chance(0.5):
        leading = [d.size(SMALL), d.size(SIZES)]
        pool = [leading[0], tiles, tokens]
        packed: Call = {"tile_table": None, "cu_seqlens": None, "max_seqlen": d.one_of([None, 7])}
    else:
        lengths = d.lengths()
        leading, slots = [sum(lengths)], d.size(SMALL)
        pool = [slots, tokens]
        packed = {
            "tile_table": d.integers(-1, slots, len(lengths), tiles, dtype=torch.int32),
            "cu_seqlens": bounds_of(lengths),
            "max_seqlen": d.one_of([None, _longest(d, lengths)]),
        }
    heads, kv_heads, size = _heads(d, product(leading))
    return {
        "q": d.floats(*leading, heads, size),
        "k": d.floats(*pool, kv_heads, size),
        "v": d.floats(*pool, kv_heads, size),
        "tile_mask": d.maybe(d.bools(*leading, tiles)),
        "q_norm_weight": d.maybe(d.floats(size)),
        "eps": d.eps(),
        "softmax_scale": _scale(d),
        **packed,
    }


def _vision_attention(d: Draw) -> Call:
    sizes = [d.size((0, 1, 1, 2, 3)), d.size(LARGE), d.size((0, 1, 1, 2, 3)), d.head()]
    while product(sizes) > ELEMENTS:
        sizes[1] //= 2
    return {
        "q": d.floats(*sizes),
        "k": d.floats(*sizes),
        "v": d.floats(*sizes),
        "padding": d.maybe(d.bools(*sizes[:2])),
        "softmax_scale": _scale(d),
    }


def _patch_embed(d: Draw) -> Call:
    images, tiles, channels = (
        d.size((0, 1, 1, 2, 3)),
        d.size((0, 1, 2, 4)),
        d.one_of((1, 3, 3, 4)),
    )
    patch, grid, width = d.size((1, 2, 3, 4, 7, 14)), d.size((1, 1, 2, 3, 4)), d.size(LARGE, 1)
    size, tokens, ratios = patch * grid + d.random.randrange(patch), grid**2 + 1, d.size((1, 3, 9))
    return {
        "pixel_values": d.floats(images, tiles, channels, size, size),
        "aspect_ratio_ids": d.integers(0, ratios, images),
        "patch_weight": d.floats(width, channels, patch, patch, scale=0.05),
        "class_embedding": d.floats(width),
        "position_embedding": d.floats(tokens, width),
        "position_gate": d.floats(1),
        "tile_position_embedding": d.floats(ratios, tiles * tokens * width),
        "pre_tile_embedding": d.floats(ratios, tiles * width),
        "pre_tile_gate": d.floats(1),
        "norm_weight": d.floats(width),
        "norm_bias": d.floats(width),
        "eps": d.eps(),
        "pad_to": d.one_of((1, 8, 8, 16, 3)),
    }


def _linear_cross_entropy(d: Draw) -> Call:
    vocab, sizes = d.size(LARGE, least=1), d.shape(d.size(SIZES))
    ignored, masked = d.one_of([-100, 0, 5, 2**40, -(2**63)]), d.one_of([None, 1, -7, 2**63 - 1])
    labels = d.integers(0, vocab, *sizes[:-1])
    if d.chance(0.5):
        labels = torch.where(d.bools(*sizes[:-1]), labels, ignored if masked is None else masked)
    return {
        "x": d.floats(*sizes),
        "weight": d.floats(vocab, sizes[-1], scale=max(1, sizes[-1]) ** -0.5),
        "labels": labels,
        "ignore_index": ignored,
        "label_smoothing": d.one_of([0.0, 0.1, 1.0]),
        "z_loss": d.one_of([0.0, 1e-4, 0.5]),
        "reduction": d.one_of(["mean", "sum", "none"]),
        "masked_token": masked,
    }


def _sample(d: Draw) -> Call:
    rows, vocab = d.size(SMALL), d.size((*LARGE, 1000, 4097), least=1)

    def each(*values: float) -> Tensor:
        dtype = torch.float64 if isinstance(values[0], float) else torch.int64
        return torch.tensor([d.one_of(values) for _ in range(rows)], dtype=dtype)

    def some(**arguments: Tensor) -> dict[str, Tensor | None]:
        return arguments if d.chance(0.5) else dict.fromkeys(arguments)

    biases = d.size(SMALL)
    tokens = d.integers(-1, 2 * vocab, rows, biases).sort(1).values
    is_bias = (tokens.diff(dim=1, prepend=torch.full((rows, 1), -1)) > 0) & (tokens < vocab)
    tokens = tokens.where(is_bias.cummin(1).values if biases else is_bias, -1)
    return {
        "logits": d.floats(rows, vocab),
        "seeds": d.integers(-(2**63), 2**63 - 1, rows),
        "steps": each(0, 1, 2**31, 2**63 - 1, -(2**63)),
        "temperature": d.maybe(each(1.0, 0.0, 0.7, 1.5, 1e-3, 100.0)),
        "top_k": d.maybe(each(0, 0, 1, 2, 50, 2**31, 2**63 - 1)),
        "top_p": d.maybe(each(1.0, 0.9, 0.5, 0.0)),
        "min_p": d.maybe(each(0.0, 0.0, 0.05, 1.0)),
        **some(repetition_penalty=each(1.0, 1.3, 0.5), seen=d.bools(rows, vocab)),
        **some(
            presence_penalty=each(0.0, 1.0, -0.5),
            frequency_penalty=each(0.0, 0.3, -2.0),
            counts=d.integers(-1, 4, rows, vocab, dtype=torch.int32),
        ),
        **some(bias_tokens=tokens, bias=100 * torch.randn(rows, biases, generator=d.generator)),
        "allowed": d.maybe(d.integers(-(2**31), 2**31, rows, -(-vocab // 32), dtype=torch.int32)),
        "num_likeliest": d.maybe(each(-1, 0, 1, 5, 20)),
    }


_CALLS = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "gated_residual": _gated_residual,
    "swiglu": _swiglu,
    "skinny_linear": _skinny_linear,
    "quantized_linear": _quantized_linear,
    "quantized_rows": _quantized_rows,
    "quantized_pack": _quantized_pack,
    "quantized_unpack": _quantized_unpack,
    "quantized_dequantize": _quantized_dequantize,
    "quantize_blocks": _quantize_blocks,
    "rotary_attention": _rotary_attention,
    "rotary_attention_cached": _rotary_attention_cached,
    "cross_attention": _cross_attention,
    "vision_attention": _vision_attention,
    "patch_embed": _patch_embed,
    "linear_cross_entropy": _linear_cross_entropy,
    "sample": _sample,
}


def public(op: str, draw: Draw) -> Call:
    """Arguments of the public function, every one of them; of the compiled op where that alone is called."""
    return _CALLS[op](draw)


# ---------------------------------------------------------------- the compiled ops


def schema_names(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.mllama_kernels, op).default._schema.arguments]


def forward(op: str, call: Call, draw: Draw, for_backward: bool = False) -> Call:
    """Arguments of the compiled op, of those of the public function."""
    call = {**call, "with_lse": for_backward or draw.chance(0.5)}
    if call.get("softmax_scale", 1) is None:
        call["softmax_scale"] = max(1, call["q"].shape[-1]) ** -0.5
    if call.get("max_seqlen", 1) is None:
        call["max_seqlen"] = call["q"].shape[0]
    if isinstance(call.get("weight"), QuantizedTensor):
        call |= _as_stored(call["weight"])
        call["int8_activations"] = False
    if op == "quantized_linear":  # its rows are one dimension
        rows = call["x"].shape[:-1].numel()
        for name in ("x", "residual"):
            if call[name] is not None:
                call[name] = call[name].reshape(rows, call[name].shape[-1])
        if call["row_mask"] is not None:
            call["row_mask"] = call["row_mask"].reshape(rows)
    if op == "patch_embed":
        call["with_tokens"] = call["with_lse"]
    if op == "linear_cross_entropy":
        x, labels = call["x"], call["labels"]
        call["x"], call["labels"] = (
            x.reshape(labels.numel(), x.shape[-1]),
            labels.reshape(-1),
        )
        if call["masked_token"] is None:
            call["masked_token"] = call["ignore_index"]
        call["with_grad_x"], call["with_grad_logits"] = draw.chance(0.5), draw.chance(0.3)
        call["chunk_bytes"] = draw.one_of([1, 100, 5000, 1 << 28])
    return {name: call[name] for name in schema_names(op)}


# Of a forward's results, by the names that its backward calls them.
_RESULTS = {
    "add_rms_norm": ("y", "total"),
    "rotary_attention": ("out", "lse"),
    "cross_attention": ("out", "lse"),
    "vision_attention": ("out", "lse"),
    "patch_embed": ("out", "tokens"),
    "linear_cross_entropy": ("loss", "sums"),
}


def backward(op: str, call: Call, draw: Draw) -> Call:
    """Arguments of the compiled backward of an op, with the results of its forward."""
    given = forward(op, call, draw, for_backward=True)
    out = getattr(torch.ops.mllama_kernels, op)(*given.values())
    outs = [out] if torch.is_tensor(out) else out
    given |= dict(zip(_RESULTS.get(op, ("out",)), outs))

    def gradient() -> Tensor:
        return draw.floats(*outs[0].shape).to(outs[0].dtype)

    given |= {"grad_out": gradient(), "grad_y": gradient(), "grad_loss": gradient()}
    given["grad_total"] = draw.maybe(gradient())
    given["wanted"] = [draw.chance(0.7) for _ in range(9)]
    if op == "add_rms_norm" and given["gate"] is None:
        given["x"] = None
    return {name: given[name] for name in schema_names(f"{op}_backward")}
