"""What is hard on the numbers of quantized_linear's kernels, which compute with integers in 16 bits."""

from __future__ import annotations

import pytest
import torch
from conftest import SIMULATED
from numerics import simulated_share
from quantized_weights import KINDS, Kind, columns_of, kind_name, like_a_model, random_weight
from torch import Tensor

from mllama_kernels import QuantizedTensor, quantize, quantized_linear, reference
from mllama_kernels.testing import assert_close_to_exact, assert_no_worse

CPU_ONLY = pytest.mark.skipif(SIMULATED, reason="there the CUDA kernels run")
every_kind = pytest.mark.parametrize("kind", KINDS, ids=kind_name)
every_small_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
INTEGERS = [kind for kind in KINDS if kind[0] not in ("fp8", "nf4", "fp4")]


def product(x: Tensor, weight: QuantizedTensor, **kwargs: str) -> Tensor:
    with torch.no_grad():
        return quantized_linear(x, weight, **kwargs)


WITH_ZEROS: list[Kind] = [
    ("int8", 0, ()),
    ("q4_0", 0, ()),
    ("q4_k", 0, ()),
    ("int4", 64, (torch.float32, torch.uint8)),
]
# Of bitsandbytes: the numbers are no multiples of anything.
# fmt: off
NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])
# fmt: on


def zero_columns(kind: Kind, rows: int, columns: int) -> QuantizedTensor:
    """Every 32nd column is zero."""
    parts = like_a_model(kind, rows, columns)
    if kind[0] == "int8":
        parts["data"].view(torch.uint8)[:, ::32] = 0
    elif kind[0] == "q4_0":
        codes = parts["blocks"].view(rows, -1, 18)[..., 2]
        codes.copy_(codes & 0xF0 | 8)
    elif kind[0] == "q4_k":
        blocks = parts["blocks"].view(rows, -1, 144)
        blocks[..., 2:4] = 0  # the factor of the minima
        blocks[..., 16::32] = 0
    else:
        codes = parts["data"][:, ::16]
        codes.copy_(codes & 0xF0 | parts["zero"].repeat_interleave(kind[1] // 32, 1))
    weight = QuantizedTensor.from_parts(kind[0], parts)
    assert not weight.dequantize()[:, ::32].any()
    return weight


@simulated_share(3)
@every_small_dtype
@pytest.mark.parametrize("size", [16, 300, 3000, 3e4])
@pytest.mark.parametrize("kind", WITH_ZEROS, ids=kind_name)
def test_outliers_on_zero_columns_leave_the_others_their_digits(dtype, size, kind):
    weight = zero_columns(kind, 40, 512)
    x = torch.randn(5, 512).to(dtype)
    x[:, ::32] = size
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@pytest.mark.parametrize("kind", WITH_ZEROS, ids=kind_name)
def test_outliers_that_two_words_cannot_hold(kind):
    weight = zero_columns(kind, 40, 512)
    x = torch.randn(5, 512).bfloat16()
    x[1::2, ::32] = 1e20
    out = product(x, weight)
    assert_no_worse(out, reference.quantized_linear, x, weight)
    assert torch.equal(product(x[1:2], weight), out[1:2])


@simulated_share(3)
@every_small_dtype
@pytest.mark.parametrize("encoding", ["int8", "fp8"])
@pytest.mark.parametrize("size", [30, 100, 300, 1000])
@pytest.mark.parametrize("large", ["one of many zeros", "most"])
def test_few_columns_decide_where_larger_ones_meet_zeros(dtype, encoding, size, large):
    """Of each 32 columns some are large and meet weights of zero, and the others decide the result."""
    places = torch.arange(512) % 32
    is_large = places == 0 if large == "one of many zeros" else places % 3 != 0
    parts = like_a_model((encoding, 0, ()), 40, 512)
    parts["data"].view(torch.uint8)[:, is_large] = 0
    weight = QuantizedTensor.from_parts(encoding, parts)
    x = torch.randn(5, 512).to(dtype)
    if large == "one of many zeros":
        x[:, places > 8] = 0
    x[:, is_large] = size
    out = product(x, weight)
    assert_no_worse(out, reference.quantized_linear, x, weight)
    assert torch.equal(product(x[:1], weight), out[:1])


@simulated_share(3)
@every_small_dtype
@pytest.mark.parametrize("encoding", ["int8", "q8_0", "q6_k", "q4_k", "q4_0"])
@pytest.mark.parametrize(("zeros", "factor"), [(16, 30), (28, 300), (28, 5000), (31, 100)])
def test_few_columns_decide_where_the_large_ones_meet_zeros(dtype, encoding, zeros, factor):
    weight, x = torch.randn(256, 512), torch.randn(16, 512)
    weight.view(256, -1, 32)[..., :zeros] = 0
    x.view(16, -1, 32)[..., :zeros] *= factor
    made, x = quantize(weight, encoding), x.to(dtype)
    assert_no_worse(product(x, made), reference.quantized_linear, x, made)


@every_small_dtype
@pytest.mark.parametrize("encoding", ["int8", "q8_0", "q6_k", "q4_k", "q4_0"])
@pytest.mark.parametrize("power", [1.0, 1.5])
def test_scales_moved_from_the_weight_to_the_activations(dtype, encoding, power):
    """As smoothing does it, and beyond what makes columns count alike."""
    scale = (2 * torch.randn(512)).exp()
    made = quantize(torch.randn(256, 512) / scale**power, encoding)
    x = (torch.randn(16, 512) * scale).to(dtype)
    assert_no_worse(product(x, made), reference.quantized_linear, x, made)


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_subnormal_columns_decide_where_larger_ones_meet_zeros(encoding):
    parts = like_a_model((encoding, 0, ()), 40, 512)
    parts["data"].view(torch.uint8)[:, ::32] = 0
    parts["scale"] *= 1e4
    weight = QuantizedTensor.from_parts(encoding, parts)
    x = (torch.randn(5, 512).double() * 3e-39).bfloat16()
    x[:, ::32] = 1
    exact = reference.quantized_linear(x.double(), weight)
    plain = reference.quantized_linear(x.float(), weight).bfloat16()
    assert_close_to_exact(product(x, weight), exact, plain)


@every_kind
@pytest.mark.parametrize("scale", [1e35, 1e-37])
def test_the_ends_of_the_exponents(kind, scale):
    weight = random_weight(kind, 24, columns_of(kind, 512))
    x = (torch.randn(3, weight.shape[1]).double() * scale).bfloat16()
    exact = reference.quantized_linear(x.double(), weight)
    plain = reference.quantized_linear(x.float(), weight).bfloat16()
    assert_close_to_exact(product(x, weight), exact, plain)


@pytest.mark.parametrize("encoding", ["int8", "q8_0", "q4_0", "q4_k"])
@pytest.mark.parametrize(
    ("dtype", "count", "size"),
    [(torch.float16, 6, 514.5), (torch.float16, 1, 514.5), (torch.bfloat16, 14, 100.5)],
)
def test_columns_that_are_alike_have_no_errors_that_add_up(dtype, count, size, encoding):
    """They decide, since the others meet zeros; one at the end of each 32 is larger."""
    columns = torch.arange(1024)
    small = columns % 32 < count
    values = torch.rand(160, 1024) + 0.5
    values[:, ~small] = 0
    x = torch.full((2, 1024), 2.0**-3)
    x[:, small] = size * 2.0**-14
    x[:, columns % 32 == 31] = 1
    weight = quantize(values, encoding)
    x = x.to(dtype)
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@CPU_ONLY
def test_two_codes_of_a_table_whose_errors_add_up():
    """Of a table of random numbers, in rows as long as they come, under x with a mean."""
    columns, table = 14336, torch.rand(16, generator=torch.Generator().manual_seed(14)) * 2 - 1
    others = round(
        columns * (-table[14] / (table[9] - table[14])).item()
    )  # so that the mean is zero
    codes = torch.full((32, columns), 14)
    for row in codes:
        row[torch.randperm(columns)[:others]] = 9
    data = (codes[:, ::2] | codes[:, 1::2] << 4).byte()
    parts = {"data": data, "absmax": torch.rand(32, columns // 64) + 0.5, "table": table}
    weight = QuantizedTensor.from_parts("nf4", parts)
    x = torch.randn(3, columns).abs().bfloat16()
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@every_small_dtype
def test_what_a_table_is_rounded_by_does_not_add_up(dtype):
    """Over a row of x with a mean: each code's error is the same wherever it stands."""
    absmax = torch.rand(32, 32) + 0.5
    values = torch.randn(32, 32, 64).clamp(-3, 3) / 3
    codes = (values[..., None] - NF4).abs().argmin(-1).flatten(1).byte()
    parts = {"data": codes[:, ::2] | codes[:, 1::2] << 4, "absmax": absmax, "table": NF4}
    weight = QuantizedTensor.from_parts("nf4", parts)
    x = torch.randn(2, 2048).abs().to(dtype)
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_float32_of_long_rows(rows):
    kinds: list[Kind] = [("q4_k", 0, ()), ("q8_0", 0, ()), ("fp4", 0, ())]
    for kind in kinds[:1] if SIMULATED else kinds:  # there the order of a sum is the same for all
        weight = random_weight(kind, 16 if SIMULATED else 96, 14336)
        x = torch.randn(rows, 14336)
        assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)
        with torch.no_grad():
            out = quantized_linear(x, weight, swiglu=True)
        assert_no_worse(out, reference.quantized_linear, x, weight, roundings=3, swiglu=True)


@every_small_dtype
@every_kind
def test_infinities_and_nan_stand_where_plain_arithmetic_has_them(dtype, kind):
    weight = random_weight(kind, 33, columns_of(kind, 512))
    x = torch.randn(6, weight.shape[1]).to(dtype)
    x[1, 30], x[2, 5], x[3, 0], x[3, 9] = float("inf"), float("nan"), float("inf"), -float("inf")
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@every_small_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "place"), [("q8_0", 0), ("q4_0", 0), ("q4_k", 2), ("q6_k", 208)])
def test_scales_of_blocks_that_are_not_finite(dtype, kind, place, value):
    parts = like_a_model((kind, 0, ()), 20, 512)
    scale = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    parts["blocks"][3, place : place + 2] = scale
    weight = QuantizedTensor.from_parts(kind, parts)
    x = torch.randn(5, 512).to(dtype)
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


def looked_up(table: Tensor, rows: int, columns: int, always: int = 0) -> QuantizedTensor:
    """Random codes, in which the bits `always` are set."""
    absmax = torch.rand(rows, columns // 64) + 0.5
    data = torch.randint(0, 256, (rows, columns // 2)).byte() | always << 4 | always
    return QuantizedTensor.from_parts("nf4", {"data": data, "absmax": absmax, "table": table})


TABLES = {
    "normal": lambda: torch.randn(16),
    "some far smaller": lambda: torch.randn(16) * torch.tensor([1.0, 1e-5]).repeat(8),
    "zeros": lambda: torch.zeros(16),
    "large": lambda: torch.randn(16) * 1e30,
    "small": lambda: torch.randn(16) * 1e-30,
    "infinity and NaN": lambda: torch.tensor([float("inf"), float("nan"), *range(14)]),
    "one value": lambda: torch.tensor([0.7] + [0.0] * 15),
}


@every_small_dtype
@pytest.mark.parametrize("always", [0, 1])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_any_table(dtype, table, always):
    weight = looked_up(table(), 40, 512, always)
    x = torch.randn(5, 512).to(dtype)
    out = product(x, weight)
    assert_no_worse(out, reference.quantized_linear, x, weight)
    assert torch.equal(product(x[:1], weight).nan_to_num(1.5), out[:1].nan_to_num(1.5))


@every_small_dtype
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_largest_integers_of_a_table_and_of_a_row_meet(dtype, place):
    """All products have one sign and the largest size that there is; or those of every fourth column."""
    weight = looked_up(torch.full((16,), 32767.0 / 32768), 20, 512)
    x = torch.full((5, 512), 1.9921875).to(dtype)
    x[2:, place::4] = 0
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@every_small_dtype
@pytest.mark.parametrize("size", [64.4375, 16.375, 8.4375])
def test_what_large_columns_leave_of_the_others_adds_up(dtype, size):
    """The large ones meet zeros; the others have what integers in 2^-14 cannot hold, all of one sign."""
    codes = torch.full((20, 512), 1)
    codes[:, ::32] = 0
    parts = {"data": (codes[:, ::2] | codes[:, 1::2] << 4).byte(), "absmax": torch.ones(20, 8)}
    weight = QuantizedTensor.from_parts("nf4", {**parts, "table": torch.tensor([0.0] + [1.0] * 15)})
    x = torch.full((5, 512), size / 2**14).to(dtype)
    x[:, ::32] = 1
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@every_small_dtype
def test_every_code_of_eight_bits_and_nan_where_its_row_has_it(dtype):
    """Subnormal numbers and both zeros too, at every place of a step."""
    codes = torch.arange(256).repeat(8).view(8, 256).roll(1).to(torch.uint8)
    codes = torch.stack([codes[i].roll(i) for i in range(8)]).repeat(6, 2)
    nan = codes & 127 == 127
    nan[5], nan[17] = False, False  # NaN stays there
    codes[nan] = 0
    parts = {"data": codes.view(torch.float8_e4m3fn), "scale": torch.rand(48) + 0.5}
    weight = QuantizedTensor.from_parts("fp8", parts)
    x = torch.randn(60, 512).to(dtype)
    out = product(x, weight)
    assert_no_worse(out, reference.quantized_linear, x, weight)
    assert out.isnan().sum(0).tolist() == [60 * (row in (5, 17)) for row in range(48)]
    for row in (0, 13, 59):
        assert torch.equal(
            product(x[row : row + 1], weight).nan_to_num(), out[row : row + 1].nan_to_num()
        )


@every_small_dtype
def test_subnormal_codes_alone(dtype):
    parts = like_a_model(("fp8", 0, ()), 40, 512)
    parts["data"] = (torch.randint(0, 8, (40, 512)) + torch.randint(0, 2, (40, 512)) * 128).to(
        torch.uint8
    )
    weight = QuantizedTensor.from_parts(
        "fp8", {**parts, "data": parts["data"].view(torch.float8_e4m3fn)}
    )
    x = torch.randn(5, 512).to(dtype)
    assert_no_worse(product(x, weight), reference.quantized_linear, x, weight)


@CPU_ONLY
@every_kind
def test_one_row_is_multiplied_otherwise_and_has_the_same_bits(kind):
    """More tiles than take turns, columns that no turn divides, and steps with a second word."""
    weight = random_weight(kind, 200, columns_of(kind, 1056))
    x = torch.randn(7, weight.shape[1]).bfloat16()
    x[:, 64] = 3e4
    out = product(x, weight)
    assert_no_worse(out, reference.quantized_linear, x, weight)
    for row in range(7):
        assert torch.equal(product(x[row : row + 1], weight), out[row : row + 1])
