"""quantize: what it makes of a weight, and what it refuses."""

from __future__ import annotations

import math

import gguf
import pytest
import torch
from numerics import FLOATS, grid, simulated_share
from quantizer_weights import awkward, distributions, relative_error

import mllama_kernels
from mllama_kernels import _library, _quantize_torch
from mllama_kernels.encodings import ENCODINGS
from mllama_kernels.quantize import TAKES_IMPORTANCE, fitting

MADE = [name for name, encoding in ENCODINGS.items() if encoding.is_made]
GGUF_TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
quantize_blocks = torch.ops.mllama_kernels.quantize_blocks


def bits(parts) -> list[torch.Tensor]:
    return [part.cpu().contiguous().view(torch.uint8) for part in parts]


def assert_same_bits(got, expected) -> None:
    for one, other in zip(bits(got), bits(expected), strict=True):
        assert one.equal(other), f"{int((one != other).sum())} of {one.numel()} bytes differ"


@pytest.mark.parametrize("encoding", GGUF_TYPES)
def test_the_bytes_are_those_of_the_gguf_package(device, encoding):
    samples = distributions(*grid([(3, 64)], [(33, 1056)])[-1])
    # Below 1e-38 there is no inverse, and gguf's numbers are those of a cast of NaN.
    samples["awkward"] = awkward(96)[torch.arange(12) != 2]
    for weight in samples.values():
        expected = torch.from_numpy(gguf.quantize(weight.numpy(), GGUF_TYPES[encoding]))
        got = mllama_kernels.quantize(weight.to(device), encoding)
        assert_same_bits([got.blocks()], [expected])


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("encoding", MADE)
def test_the_kernel_has_the_bits_of_plain_pytorch(device, encoding, dtype):
    block = ENCODINGS[encoding].block
    columns = 3 * block if block > 1 else 777
    rows = [awkward(columns)]
    rows += [weight[:2] for weight in distributions(2, columns).values()]
    weight = torch.cat(rows).clamp(-6e4, 6e4).to(dtype)
    choices = [None]
    if encoding in TAKES_IMPORTANCE:
        choices.append((2 * torch.randn(columns)).exp())
    for importance in choices:
        given = None if importance is None else importance.to(device)
        got = quantize_blocks(weight.to(device), encoding, given)
        assert_same_bits(got, _quantize_torch.parts(weight, encoding, importance))
        assert_same_bits(
            quantize_blocks(weight.to(device)[:1], encoding, given), [g[:1] for g in got]
        )


@pytest.mark.parametrize("encoding", MADE)
def test_rows_may_be_strided(device, encoding):
    whole = torch.randn(9, 1024, device=device)
    for view in (whole[::2, 256:768], whole.T[:, :9].T, whole[:, ::2]):
        assert_same_bits(
            quantize_blocks(view, encoding, None),
            quantize_blocks(view.contiguous(), encoding, None),
        )


def test_int8_and_fp8_round_to_nearest_even(device):
    weight = torch.randn(5, 333, device=device)
    weight[3] = 0
    weight[4] *= 1e-44  # the scale itself is denormal
    for encoding, bound in (("int8", 127), ("fp8", 448)):
        got = mllama_kernels.quantize(weight, encoding)
        scale = weight.abs().amax(1) / torch.full_like(weight[:, 0], bound)
        assert got.scale.equal(scale)
        codes = (weight / scale[:, None]).clamp(-bound, bound)
        codes = torch.where(scale[:, None] == 0, 0.0, codes)
        codes = codes.round() if encoding == "int8" else codes
        expected = codes.to(got.data.dtype)
        assert_same_bits([got.data], [expected])
        assert got.dequantize()[3].equal(weight[3])


def test_every_number_of_e4m3_is_reached_and_kept(device):
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    ties = (numbers.sort().values[:-1] + numbers.sort().values[1:]) / 2
    weight = torch.cat([numbers, ties])[None].to(device)  # the largest is 448: the scale is 1
    got = mllama_kernels.quantize(weight, "fp8")
    assert_same_bits([got.data], [weight.to(torch.float8_e4m3fn)])


@pytest.mark.skipif(
    _library.simulated, reason="hours on simulated CUDA kernels; the bits are tested"
)
def test_errors_on_normal_weights(device):
    """ggml has 0.0715, 0.0178, 0.0861 and 0.0054 on such a weight, a little more or less by its draw."""
    weight = torch.randn(64, 4096, device=device)
    most = {
        "q4_k": 0.0708,
        "q6_k": 0.0171,
        "q4_0": 0.0865,
        "q8_0": 0.0055,
        "int8": 0.0095,
        "fp8": 0.028,
    }
    for encoding, limit in most.items():
        decoded = mllama_kernels.quantize(weight, encoding).dequantize()
        assert relative_error(weight, decoded) < limit, encoding


@pytest.mark.parametrize("encoding", MADE)
def test_what_is_awkward_is_exact_or_harmless(device, encoding):
    weight = awkward(512).to(device)
    decoded = mllama_kernels.quantize(weight, encoding).dequantize()
    assert decoded.isfinite().all()
    assert decoded[0].eq(0).all() and decoded[1, :256].eq(0).all()
    assert decoded[2:4].abs().max() < 1e-7
    outlier = 512 // 3
    assert decoded[4, outlier] == pytest.approx(3, rel=1e-3)
    assert decoded[4].count_nonzero() == 1
    for row in (6, 7, 8, 9, 10):
        assert relative_error(weight[row], decoded[row]) < 0.1, row


@pytest.mark.parametrize("encoding", sorted(TAKES_IMPORTANCE))
@pytest.mark.parametrize("kind", ["normal", "student t"])
def test_importance_lowers_the_weighted_error(device, encoding, kind):
    weight = distributions(16, 512)[kind].to(device)
    importance = (1.5 * torch.randn(512, device=device)).exp()
    plain, weighted = (
        mllama_kernels.quantize(weight, encoding, given) for given in (None, importance)
    )
    before = relative_error(weight, plain.dequantize(), importance)
    after = relative_error(weight, weighted.dequantize(), importance)
    assert after < 0.99 * before


def test_only_the_proportions_of_importance_matter(device):
    weight, importance = torch.randn(2, 256, device=device), torch.rand(256) + 0.1
    expected = mllama_kernels.quantize(weight, "q4_k", importance)
    for factor in (2.0**-100, 2.0**100):
        got = mllama_kernels.quantize(weight, "q4_k", (importance * factor).double())
        assert got.blocks().equal(expected.blocks())
    importance[::2] = 0  # such columns keep sensible values
    decoded = mllama_kernels.quantize(weight, "q4_k", importance).dequantize()
    assert relative_error(weight, decoded) < 0.2
    same = mllama_kernels.quantize(weight, "q6_k", torch.full((256,), 7.0))
    assert same.blocks().equal(mllama_kernels.quantize(weight, "q6_k").blocks())


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("encoding", MADE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_its_place(device, encoding, dtype, value):
    weight = torch.randn(5, 512, dtype=dtype)
    weight[2, 300] = weight[3, 7] = value
    expected = f"row 2, column 300 is -?{str(value).strip('-')}"
    with pytest.raises(RuntimeError, match=expected):
        mllama_kernels.quantize(weight.to(device), encoding)
    with pytest.raises(RuntimeError, match=expected):
        _quantize_torch.parts(weight, encoding, None)


@pytest.mark.parametrize(
    ("encoding", "largest"), [("q8_0", 8319008), ("q4_0", 524032), ("q4_k", 2**21), ("q6_k", 2**27)]
)
def test_what_is_too_large_is_refused(device, encoding, largest):
    weight = torch.randn(2, 256, device=device)
    weight[0, 3], weight[1, 5] = largest, -largest
    assert mllama_kernels.quantize(weight, encoding).dequantize().isfinite().all()
    weight[1, 5] *= 1.01
    with pytest.raises(RuntimeError, match=f"row 1, column 5.*{encoding} holds finite magnitudes"):
        mllama_kernels.quantize(weight, encoding)


def test_errors_name_what_was_given(device):
    weight = torch.randn(2, 96, device=device)
    cases = [
        (ValueError, "q4_k encodes 256 columns together.* 96 wide; what fits: q8_0, q4_0, int8, fp8",
         (weight, "q4_k")),
        (ValueError, r"\(N, K\), got shape \(96,\)", (weight[0], "q8_0")),
        (ValueError, "must be float32, float16 or bfloat16, got float64", (weight.double(), "q8_0")),
        (ValueError, r"\(2, 96\) is on the meta device", (weight.to("meta"), "q8_0")),
        (ValueError, "nf4 is read, not made; the encodings that are made are q8_0", (weight, "nf4")),
        (ValueError, "got 'q5_k'", (weight, "q5_k")),
        (ValueError, "q4_k_m is a mix for whole models; one weight is made as q4_k or q6_k",
         (weight, "q4_k_m")),
        (TypeError, "weight must be a tensor, got a list", ([1.0], "q8_0")),
        (TypeError, "importance must be a tensor, got a int", (weight, "q4_0", 1)),
        (ValueError, "importance has no part in q8_0; q4_0, q4_k, q6_k take it",
         (weight, "q8_0", torch.ones(96))),
        (ValueError, r"of shape \(96,\), got torch.float32 \(95,\)", (weight, "q4_0", torch.ones(95))),
        (ValueError, r"got torch.int64 \(96,\)", (weight, "q4_0", torch.ones(96).long())),
        (ValueError, "finite, not negative, and somewhere", (weight, "q4_0", torch.zeros(96))),
        (ValueError, "finite, not negative, and somewhere", (weight, "q4_0", -torch.ones(96))),
        (ValueError, "finite, not negative, and somewhere", (weight, "q4_0", torch.ones(96) / 0)),
    ]  # fmt: skip
    for kind, text, arguments in cases:
        with pytest.raises(kind, match=text):
            mllama_kernels.quantize(*arguments)


def test_the_op_checks_for_itself(device):
    weight, ones = torch.randn(2, 96, device=device), torch.ones(96, device=device)
    for text, arguments in [
        ("must be int8, fp8, .* got q5_k", (weight, "q5_k", None)),
        ("q6_k encodes 256 columns together", (weight, "q6_k", None)),
        ("int8 takes no importance", (weight, "int8", ones)),
        ("importance must be float32", (weight, "q4_0", ones.half())),
        ("importance must have shape", (weight, "q4_0", ones[:3])),
        (r"must be \(N, K\)", (weight[0], "q4_0", None)),
        ("got float64", (weight.double(), "q4_0", None)),
    ]:
        with pytest.raises(RuntimeError, match=text):
            quantize_blocks(*arguments)


def test_fitting_encodings():
    assert fitting(100) == ["int8", "fp8"]
    assert fitting(96) == ["q8_0", "q4_0", "int8", "fp8"]
    assert fitting(512) == MADE


@pytest.mark.parametrize("encoding", MADE)
def test_empty_and_torch_machinery(device, encoding):
    for shape in ((0, 256), (3, 0)):
        if shape[1] or encoding in ("int8", "fp8"):
            parts = quantize_blocks(torch.empty(shape, device=device), encoding, None)
            expected = _quantize_torch.parts(torch.empty(shape), encoding, None)
            assert [p.shape for p in parts] == [e.shape for e in expected]
    weight = torch.randn(3, 256, device=device)
    importance = torch.rand(256, device=device) if encoding in TAKES_IMPORTANCE else None
    torch.library.opcheck(quantize_blocks, (weight, encoding, importance))
    parameter = torch.nn.Parameter(weight)
    assert not any(part.requires_grad for part in quantize_blocks(parameter, encoding, None))
    assert_same_bits(
        mllama_kernels.quantize(parameter, encoding).parts().values(),
        quantize_blocks(weight, encoding, None),
    )


@pytest.mark.parametrize("encoding", MADE)
def test_autocast_leaves_the_weight_as_it_is(device, encoding):
    weight = torch.randn(2, 256, device=device)
    expected = quantize_blocks(weight, encoding, None)
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(quantize_blocks(weight, encoding, None), expected)
        assert_same_bits(mllama_kernels.quantize(weight, encoding).parts().values(), expected)
        assert_same_bits(_quantize_torch.parts(weight, encoding, None), expected)


@pytest.mark.skipif(_library.simulated, reason="a simulated device does not use the host's threads")
@pytest.mark.parametrize("encoding", MADE)
def test_any_number_of_threads_gives_the_same_bits(encoding):
    weight = torch.randn(67, 1280 if ENCODINGS[encoding].block == 256 else 1248)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(quantize_blocks(weight, encoding, None))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_without_the_kernel(monkeypatch):
    weight = torch.randn(2, 256)
    expected = mllama_kernels.quantize(weight, "q4_k").blocks()
    monkeypatch.setattr(mllama_kernels._dispatch, "DISABLED", frozenset({"quantize"}))
    monkeypatch.setattr(torch.ops.mllama_kernels, "quantize_blocks", None)
    assert mllama_kernels.quantize(weight, "q4_k").blocks().equal(expected)
