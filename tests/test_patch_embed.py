"""patch_embed."""

from __future__ import annotations

import pytest
import torch
from numerics import FLOATS, assert_compiles, assert_no_worse, grid, opcheck, randn

import mllama_kernels
from mllama_kernels import reference

# images, tiles, tile size, width, patch
CASES = grid(
    [(1, 2, 28, 40, 14), (2, 1, 42, 64, 14)],
    [
        (1, 4, 56, 1280, 14),
        (2, 3, 70, 136, 14),
        (1, 2, 168, 360, 14),  # 288 patches; of the last 320 columns there are 40
        (1, 1, 32, 644, 8),  # patches of whole slices of 64 pixels
        (1, 1, 30, 33, 8),
        (1, 1, 14, 8, 14),
    ],
)


def make(images, tiles, size, width, patch, dtype, device, ratios=9):
    tokens = (size // patch) ** 2 + 1

    def draw(*shape, scale=1.0):
        return randn(*shape, dtype=dtype, device=device, scale=scale)

    ids = torch.randint(0, ratios, (images,), device=device)
    return (
        draw(images, tiles, 3, size, size),
        ids,
        draw(width, 3, patch, patch, scale=0.05),
        draw(width),
        draw(tokens, width),
        draw(1),
        draw(ratios, tiles * tokens * width),
        draw(ratios, tiles * width),
        draw(1),
        draw(width),
        draw(width),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(device, dtype, case):
    args = make(*case, dtype, device)
    assert_no_worse(mllama_kernels.patch_embed(*args), reference.patch_embed, *args)


@pytest.mark.parametrize("dtype", FLOATS)
def test_columns_of_different_means(device, dtype):
    """Statistics that are merged from parts of a row: most of the variance is between them."""
    args = list(make(1, 1, 28, 1280, 14, dtype, device))
    args[4] = args[4] + torch.linspace(-9, 9, 1280, device=device).to(dtype)
    args[5] = torch.full_like(args[5], 0.1)
    assert_no_worse(mllama_kernels.patch_embed(*args), reference.patch_embed, *args)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [448, 560])
def test_checkpoint_shape(device, dtype, size):
    args = make(1, 4, size, 1280, 14, dtype, device)
    assert_no_worse(mllama_kernels.patch_embed(*args), reference.patch_embed, *args)


def test_zero_tokens_and_pad_to(device):
    args = make(1, 2, 28, 40, 14, torch.float32, device)
    out = mllama_kernels.patch_embed(*args)
    assert out.shape == (1, 2, 8, 40) and not out[:, :, 5:].any()
    assert torch.equal(mllama_kernels.patch_embed(*args, pad_to=1), out[:, :, :5])


def test_gates_and_images_are_independent(device):
    """With closed gates tile embeddings do not matter; an image does not depend on its neighbours."""
    args = list(make(2, 2, 28, 40, 14, torch.float32, device))
    whole = mllama_kernels.patch_embed(*args)
    alone = mllama_kernels.patch_embed(args[0][1:], args[1][1:], *args[2:])
    assert torch.equal(alone, whole[1:])
    args[5] = args[8] = torch.zeros(1, device=device)
    closed = mllama_kernels.patch_embed(*args)
    args[6], args[7] = args[6] * 3, args[7] * 3
    assert torch.equal(mllama_kernels.patch_embed(*args), closed)


def test_strided_pixels(device):
    args = list(make(1, 2, 28, 40, 14, torch.bfloat16, device))
    expected = mllama_kernels.patch_embed(*args)
    args[0] = args[0].transpose(3, 4).contiguous().transpose(3, 4)
    assert torch.equal(mllama_kernels.patch_embed(*args), expected)


def test_empty_and_torch_machinery(device):
    args = make(1, 2, 28, 40, 14, torch.float32, device)
    none = (args[0][:0], args[1][:0], *args[2:])
    assert mllama_kernels.patch_embed(*none).shape == (0, 2, 8, 40)
    opcheck("patch_embed", (*args, 1e-5, 8))
    assert_compiles(mllama_kernels.patch_embed, *args)
    with pytest.raises(NotImplementedError, match="patch_embed has no backward kernel"):
        mllama_kernels.patch_embed(args[0].requires_grad_(), *args[1:]).sum().backward()


def test_errors(device):
    args = list(make(1, 2, 28, 40, 14, torch.float32, device))
    with pytest.raises(
        RuntimeError, match=r"position_embedding must have shape \(5, 40\), got \(4, 40\)"
    ):
        mllama_kernels.patch_embed(*args[:4], args[4][1:], *args[5:])
    with pytest.raises(RuntimeError, match="aspect_ratio_ids must be int64, got int32"):
        mllama_kernels.patch_embed(args[0], args[1].int(), *args[2:])
    bad = torch.tensor([9], device=device)
    if device.type == "cpu":
        with pytest.raises(
            RuntimeError, match=r"aspect_ratio_ids\[0\] is 9; the tables have ids 0 to 8"
        ):
            mllama_kernels.patch_embed(args[0], bad, *args[2:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_bad_id_spoils_its_image_alone(device, dtype):
    """Where ids cannot be looked at before the launch, an image with a bad one becomes NaN."""
    if device.type == "cpu":
        pytest.skip("on the CPU a bad id is an error")
    args = make(2, 1, 42, 64, 14, dtype, device)
    bad = torch.stack([args[1][0], args[1][1] * 0 + 9])
    out = mllama_kernels.patch_embed(args[0], bad, *args[2:])
    assert torch.equal(out[0], mllama_kernels.patch_embed(*args)[0])
    assert out[1, :, :10].isnan().all()
