"""patch_embed."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    FLOATS,
    assert_compiles,
    assert_gradcheck,
    assert_no_worse,
    assert_trains_compiled,
    compare,
    gradients,
    grid,
    opcheck,
    randn,
    simulated_share,
)

import mllama_kernels
from mllama_kernels import _library, reference

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


@simulated_share(2)
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
    opcheck("patch_embed", (*args, 1e-5, 8, True))
    assert_compiles(mllama_kernels.patch_embed, *args)


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
def test_bad_id_spoils_only_its_image(device, dtype):
    """Where ids cannot be looked at before the launch, an image with a bad one becomes NaN."""
    if device.type == "cpu":
        pytest.skip("on the CPU a bad id is an error")
    args = make(2, 1, 42, 64, 14, dtype, device)
    bad = torch.stack([args[1][0], args[1][1] * 0 + 9])
    out = mllama_kernels.patch_embed(args[0], bad, *args[2:])
    assert torch.equal(out[0], mllama_kernels.patch_embed(*args)[0])
    assert out[1, :, :10].isnan().all()


# images, tiles, tile size, width, patch, aspect ratio ids
GRADIENT_CASES = grid(
    [(1, 2, 28, 40, 14, [3]), (3, 1, 42, 64, 14, [2, 0, 2])],
    [
        (1, 4, 56, 1280, 14, [8]),
        (5, 3, 42, 136, 14, [1, 4, 1, 1, 4]),
        (3, 2, 30, 33, 8, [0, 5, 0]),
        (1, 1, 14, 72, 14, [0]),
        (2, 1, 70, 644, 14, [7, 6]),
    ],
)


def make_gradient_case(images, tiles, size, width, patch, ids, dtype, device):
    args = list(make(images, tiles, size, width, patch, dtype, device))
    args[1] = torch.tensor(ids, device=device)
    return args


def assert_patch_gradients_no_worse(args, draws):
    """Gates have one element, a sum in which most cancels: its error is compared over several draws."""
    with torch.no_grad():
        out = reference.patch_embed(*args)
    grads = [torch.randn_like(out) for _ in range(draws)]

    def backward(function, convert, wanted, grads):
        """For each of `grads` the gradients of the arguments `wanted`."""
        leaves = [convert(a) if i != 1 else a for i, a in enumerate(args)]
        leaves = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(leaves)]
        out = function(*leaves)
        for grad in grads:
            yield torch.autograd.grad(
                out, [leaves[i] for i in wanted], grad.to(out.dtype), retain_graph=True
            )

    def run(function, convert):
        gates = zip(*backward(function, convert, [5, 8], grads), strict=True)
        (others,) = backward(function, convert, [0, 2, 3, 4, 6, 7, 9, 10], grads[:1])
        return [torch.cat(draws) for draws in gates] + list(others)

    actual = run(mllama_kernels.patch_embed, torch.clone)
    plain = run(reference.patch_embed, torch.clone)
    exact = run(reference.patch_embed, torch.Tensor.double)
    for a, e, p in zip(actual, exact, plain, strict=True):
        compare(a, e, p)


@simulated_share(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_match_float64(device, dtype, case):
    args = make_gradient_case(*case, dtype, device)
    assert_patch_gradients_no_worse(args, draws=16)


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_at_checkpoint_shape(device, dtype):
    assert_patch_gradients_no_worse(make(1, 4, 448, 1280, 14, dtype, device), draws=8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pad_to", [1, 64])
def test_gradient_of_zero_tokens_is_dropped(device, dtype, pad_to):
    """Whatever arrives there: a token that is constant has no gradient to give."""
    args = make_gradient_case(2, 2, 28, 40, 14, [1, 1], dtype, device)
    out = reference.patch_embed(*args, pad_to=pad_to)
    grad = torch.randn_like(out)
    expected = gradients(mllama_kernels.patch_embed, args, [grad], pad_to=pad_to)
    grad[:, :, 5:] = float("nan")
    actual = gradients(mllama_kernels.patch_embed, args, [grad], pad_to=pad_to)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


def test_gradients_of_tables_with_repeated_ids(device):
    """Rows that no image chose are zero; images that share a row add up; an image stands for itself."""
    args = make_gradient_case(3, 2, 28, 40, 14, [4, 0, 4], torch.float32, device)
    grad = torch.randn(3, 2, 8, 40, device=device)
    together = gradients(mllama_kernels.patch_embed, args, [grad])
    alone = [
        gradients(
            mllama_kernels.patch_embed,
            [args[0][i : i + 1], args[1][i : i + 1], *args[2:]],
            [grad[i : i + 1]],
        )
        for i in range(3)
    ]
    assert together[0].equal(torch.cat([a[0] for a in alone]))
    for table in (5, 6):  # tile_position_embedding, pre_tile_embedding
        assert not together[table][[1, 2, 3, 5, 6, 7, 8]].any()
        assert together[table][0].equal(alone[1][table][0])
        torch.testing.assert_close(together[table][4], alone[0][table][4] + alone[2][table][4])
    swapped = gradients(
        mllama_kernels.patch_embed,
        [args[0][[0, 2, 1]], args[1][[0, 2, 1]], *args[2:]],
        [grad[[0, 2, 1]]],
    )
    for one, other in zip(
        together[2:], swapped[2:], strict=True
    ):  # images with the same id kept their order
        assert one.equal(other)


def test_frozen_parameters(device):
    """Only what asks for a gradient gets one, with the bits it has when everything does."""
    args = make_gradient_case(2, 2, 30, 40, 14, [1, 0], torch.float32, device)
    floating = [i for i in range(len(args)) if i != 1]
    grad = torch.randn(2, 2, 8, 40, device=device)
    whole = dict(zip(floating, gradients(mllama_kernels.patch_embed, args, [grad]), strict=True))
    for wanted in ([0], [2], [3], [4, 5], [6], [7], [8], [9, 10], [5, 8]):
        leaves = [a.detach().clone().requires_grad_(i in wanted) for i, a in enumerate(args)]
        mllama_kernels.patch_embed(*leaves).backward(grad)
        for i, leaf in enumerate(leaves):
            assert leaf.grad.equal(whole[i]) if i in wanted else leaf.grad is None
    assert not mllama_kernels.patch_embed(*args).requires_grad


def test_trains(device):
    tiny = list(make(2, 2, 5, 6, 2, torch.float32, device, ratios=2))
    tiny[1] = torch.tensor([1, 1], device=device)
    assert_gradcheck(mllama_kernels.patch_embed, *tiny)
    args = make_gradient_case(2, 2, 30, 9, 14, [1, 1], torch.float32, device)
    assert_trains_compiled(mllama_kernels.patch_embed, *args)
    out, tokens = torch.ops.mllama_kernels.patch_embed(*args, 1e-5, 8, True)
    operands = (torch.randn_like(out), tokens, args[1], *args[4:10], 1e-5)
    opcheck("patch_embed_backward", (*operands, [True] * 9))
    opcheck("patch_embed_backward", (*operands, [i % 2 == 0 for i in range(9)]))


def test_gradients_of_no_images(device):
    args = make(2, 2, 28, 40, 14, torch.float32, device)
    none = (args[0][:0], args[1][:0], *args[2:])
    grads = gradients(mllama_kernels.patch_embed, none, [torch.empty(0, 2, 8, 40, device=device)])
    assert grads[0].shape == none[0].shape and not any(g.any() for g in grads[1:])


def test_gradient_bits_do_not_depend_on_threads(device):
    if device.type != "cpu":
        pytest.skip("threads of the CPU")
    args = make_gradient_case(2, 4, 56, 136, 14, [1, 1], torch.float32, device)
    grad = torch.randn(2, 4, 24, 136)
    threads = torch.get_num_threads()
    _, tokens = torch.ops.mllama_kernels.patch_embed(*args, 1e-5, 8, True)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(
            torch.ops.mllama_kernels.patch_embed_backward(
                grad, tokens, args[1], *args[4:10], 1e-5, [True] * 9
            )
        )
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(result, results[0], strict=True))


def test_backward_errors(device):
    args = make(1, 2, 28, 40, 14, torch.float32, device)
    out, tokens = torch.ops.mllama_kernels.patch_embed(*args, 1e-5, 8, True)
    operands, wanted = (args[1], *args[4:10], 1e-5), [True] * 9
    backward = torch.ops.mllama_kernels.patch_embed_backward
    with pytest.raises(
        RuntimeError, match=r"grad_out must have shape \(1, 2, 8, 40\), got \(1, 2, 8, 39\)"
    ):
        backward(out[..., 1:], tokens, *operands, wanted)
    with pytest.raises(
        RuntimeError, match="grad_out must have the dtype of tokens, float32, got bfloat16"
    ):
        backward(out.bfloat16(), tokens, *operands, wanted)
    with pytest.raises(RuntimeError, match="wanted must have 9 elements, got 8"):
        backward(out, tokens, *operands, wanted[1:])
    with pytest.raises(RuntimeError, match="patch_embed was called without with_tokens"):
        leaf = args[0].clone().requires_grad_()
        torch.ops.mllama_kernels.patch_embed(leaf, *args[1:], 1e-5, 8, False)[0].sum().backward()


def test_width_limit_of_cuda(device):
    args = make(1, 1, 14, 2568, 14, torch.float32, device)
    out = mllama_kernels.patch_embed(*args[:-1], args[-1].requires_grad_())
    if device.type == "cpu" and not _library.simulated:
        out.sum().backward()
        return
    with pytest.raises(
        RuntimeError, match="E must be at most 2560 on CUDA for gradients, got 2568"
    ):
        out.sum().backward()


@pytest.mark.parametrize("dtype", FLOATS)
def test_bad_id_spoils_the_gradients_of_its_image(device, dtype):
    """Nothing is written beyond the tables, and their rows are those of the other images."""
    if device.type == "cpu":
        pytest.skip("on the CPU a bad id is an error")
    args = make_gradient_case(2, 1, 42, 64, 14, [3, 9], dtype, device)
    grad = randn(2, 1, 16, 64, dtype=dtype, device=device)
    actual = gradients(mllama_kernels.patch_embed, args, [grad])
    alone = [args[0][:1], args[1][:1], *args[2:]]
    expected = gradients(mllama_kernels.patch_embed, alone, [grad[:1]])
    assert actual[5].equal(expected[5]) and actual[6].equal(expected[6])
    assert actual[0][:1].equal(expected[0]) and actual[0][1].isnan().all()
    assert actual[2].isnan().all() and actual[8].isnan().all()
