"""linear_cross_entropy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    strided,
    takes_float64,
)
from torch import Tensor

import mllama_kernels
from mllama_kernels import _library, reference

OP = mllama_kernels.linear_cross_entropy
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01, "masked_token": 3, "ignore_index": 2},
    {"label_smoothing": 0.3, "z_loss": 1e-3, "masked_token": 10**6},
]


def set_chunk_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    module = sys.modules["mllama_kernels.linear_cross_entropy"]  # the function has its name
    monkeypatch.setattr(module, "CHUNK_BYTES", size)


def round_up(vocab: int) -> int:
    """To the elements that a row of logits takes."""
    return -(-vocab // 8) * 8


def make(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Any:
    """x, weight and labels, some ignored; logits have the spread of a language model's."""
    x = randn(rows, width, dtype=dtype, device=device)
    weight = randn(vocab, width, dtype=dtype, device=device, scale=2 * width**-0.5)
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[::5] = -100
    return x, weight, labels


def without_ignored(labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Labels that are ignored under the options, or classes."""
    return labels.masked_fill(labels == -100, options.get("ignore_index", -100))


def assert_all_no_worse(x: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    """Every row's loss, and the gradients of their sum, which are rounded once."""
    plain = reference.linear_cross_entropy
    each = {"reduction": "none", **options}
    losses = OP(x, weight, labels, **each)
    assert losses.dtype == torch.float32
    assert_no_worse(losses, plain, x, weight, labels, **each)

    def grads(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        args = (x.to(dtype), weight.to(dtype), labels)
        return gradients(function, args, [losses.new_ones(())], reduction="sum", **options)

    exact = grads(plain, torch.float64)
    for a, e, p in zip(grads(OP, x.dtype), exact, grads(plain, x.dtype), strict=True):
        compare(a, e, p)


@simulated_share(3)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "rows, width, vocab", grid([(256, 64, 301)], [(512, 40, 64), (128, 64, 1029)])
)
@pytest.mark.parametrize("chunk_rows", [64, 1000])
def test_matches_float64(device, monkeypatch, chunk_rows, dtype, rows, width, vocab, options):
    # Not a few rows: the library's products of two or three sum up less precisely.
    set_chunk_bytes(monkeypatch, chunk_rows * round_up(vocab) * dtype.itemsize)
    x, weight, labels = make(rows, width, vocab, dtype, device)
    assert_all_no_worse(x, weight, without_ignored(labels, options), **options)


@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions(device, dtype):
    """Of the same losses; the gradient by x is that of their sum, scaled and rounded once more."""
    x, weight, labels = make(60, 32, 90, dtype, device)
    labels[3], options = 17, {"masked_token": 17, "label_smoothing": 0.1, "z_loss": 0.01}

    def run(reduction: str, grad: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = OP(leaf, weight, labels, reduction=reduction, **options)
        return out.detach(), torch.autograd.grad(out, leaf, grad)[0]

    one, scales = torch.ones((), device=device), torch.randn(60, device=device)
    total, grad = run("sum", one)
    losses, scaled = run("none", scales)
    mean, averaged = run("mean", one)
    targets = ((labels != -100) & (labels != 17)).sum()
    assert total.equal(losses.sum()) and mean.equal(total / targets)
    assert scaled.equal((grad * scales.unsqueeze(-1)).to(dtype))
    assert averaged.equal((grad.float() * (1 / targets)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checkpoint_vocabulary(device, monkeypatch, dtype):
    """Rows longer than shared memory, in chunks of rows and of classes that do not divide."""
    set_chunk_bytes(monkeypatch, 10 * 128256 * dtype.itemsize)
    x, weight, labels = make(18, 16, 128256, dtype, device)
    threads = torch.get_num_threads()
    # With two, MKL adds up the 128256 products of 10 rows, not of 18, with fifty times the error.
    torch.set_num_threads(1)
    try:
        assert_all_no_worse(x, weight, labels, z_loss=1e-4)
    finally:
        torch.set_num_threads(threads)


def test_chunks_do_not_show(device, monkeypatch):
    x, weight, labels = make(300, 16, 515, torch.float32, device)
    results = []
    for size in (1, 3 * 4 * 520, 200_000, 1 << 28):
        set_chunk_bytes(monkeypatch, size)
        results.append(gradients(OP, (x, weight, labels), [torch.ones((), device=device)]))
    for result in results[:-1]:
        for actual, expected in zip(result, results[-1]):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [1, 5, 8, 33, 3001])
def test_extreme_logits(device, vocab):
    """With x = 1 the weight is a row of logits, and its gradient is theirs."""
    logits = 30 * torch.randn(vocab)
    logits[torch.rand(vocab) < 0.3] = -float("inf")
    logits[torch.rand(vocab) < 0.1] += 1e4
    label = vocab // 2
    logits[label] = logits.max().clamp(min=0) - 3
    weight = logits.unsqueeze(-1).to(device).requires_grad_()
    loss = OP(torch.ones(1, 1, device=device), weight, torch.tensor([label], device=device))
    loss.backward()
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, torch.tensor(label))
    expected.backward()
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.grad[:, 0].cpu().double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [1, 2, 33])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 1e-4}, {"z_loss": 1e-6}, {"label_smoothing": 0.1}]
)
def test_labels_that_are_all_but_certain(device, vocab, options):
    """Their gradient is what is left of p - 1: only z_loss, far below the rounding of 1."""
    logits = torch.linspace(-1, 1, vocab)
    logits[-1] = 40
    weight, x = logits.unsqueeze(-1).to(device), torch.ones(1, 1, device=device)
    labels = torch.tensor([vocab - 1], device=device)

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).detach().clone().requires_grad_()
        function(x.to(dtype), leaf, labels, **options).backward()
        return leaf.grad

    plain = reference.linear_cross_entropy
    exact, own = gradient(plain, torch.float64), gradient(OP, torch.float32)
    if device.type == "cuda" or _library.simulated:  # the terms are rounded before they are added
        torch.testing.assert_close(
            own.double(), exact, rtol=1e-5, atol=torch.finfo(torch.float32).eps
        )
    else:
        compare(own, exact, gradient(plain, torch.float32))


def test_nan_and_infinity_are_seen(device):
    x, weight, labels = make(6, 8, 100, torch.float32, device)
    x[1, 0], x[2] = float("nan"), torch.finfo(torch.float32).max
    losses = OP(x, weight, labels, reduction="none")
    assert (~losses.isfinite()).tolist() == [False, True, True, False, False, False]


def test_ignored_rows(device):
    """No loss, no gradient, and nothing of what they hold in the others'."""
    x, weight, labels = make(9, 8, 70, torch.float32, device)
    labels[4] = 69
    ignored = (labels == -100) | (labels == 69)
    x[ignored] = float("nan")
    options = {"masked_token": 69, "z_loss": 0.1, "label_smoothing": 0.1}
    x.requires_grad_()
    losses = OP(x, weight, labels, reduction="none", **options)
    assert losses[ignored].eq(0).all() and losses[~ignored].gt(0).all()
    OP(x, weight, labels, **options).backward()
    assert x.grad[ignored].eq(0).all() and x.grad.isfinite().all()
    (grad,) = gradients(
        lambda x: OP(x, weight, labels[~ignored], **options),
        (x[~ignored],),
        [torch.ones((), device=device)],
    )
    torch.testing.assert_close(x.grad[~ignored], grad)


def test_no_targets(device):
    x, weight, labels = make(4, 8, 50, torch.float32, device)
    for rows in (0, 4):
        args = (x[:rows], weight, torch.full_like(labels[:rows], -100))
        assert OP(*args).isnan() and OP(*args, reduction="sum") == 0
        for grad in gradients(OP, args, [torch.ones((), device=device)]):
            assert grad.eq(0).all()


@pytest.mark.parametrize("bad", [50, -1, -101, 2**40])
def test_label_that_is_no_class(device, bad):
    x, weight, labels = make(7, 8, 50, torch.float32, device)
    labels[3] = bad
    if device.type == "cpu" and takes_float64():
        with pytest.raises(RuntimeError, match=rf"or within 0\.\.49, got {bad} in row 3"):
            OP(x, weight, labels)
        return
    weight.requires_grad_(), x.requires_grad_()
    losses = OP(x, weight, labels, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[3]]
    losses.sum().backward()
    assert x.grad.isnan().any(-1).nonzero().tolist() == [[3]] and weight.grad.isnan().all()


def saved_by(run: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps for backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        run()
    return shapes


@pytest.mark.parametrize("one_chunk", [True, False])
def test_only_what_is_asked_for(device, monkeypatch, one_chunk):
    """Each gradient alone has the bits it has beside the other; for a frozen weight nothing is kept."""
    if not one_chunk:
        set_chunk_bytes(monkeypatch, 11 * 96 * 2 - 1)
    x, weight, labels = make(11, 8, 90, torch.bfloat16, device)
    both = gradients(OP, (x, weight, labels), [torch.tensor(2.0, device=device)])
    for index in range(2):
        args = [x, weight]
        args[index] = args[index].detach().clone().requires_grad_()
        saved = saved_by(lambda args=args: (2 * OP(*args, labels)).backward())
        assert args[index].grad.equal(both[index])
        assert (weight.shape in saved) == (index == 1 and not one_chunk)
        assert ((11, 90) in saved) == (index == 1 and one_chunk)
    x.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        assert not OP(x, weight, labels).requires_grad


def test_backward_twice(device):
    x, weight, labels = make(6, 8, 40, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    loss = OP(x, weight, labels)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    assert all(a.equal(b) for a, b in zip(first, second))


def test_small_gradients_survive_float16(device):
    """The mean's divisor is applied after the product with the weight, not to logits' gradients."""
    rows = 600
    x, weight, labels = make(rows, 16, 1000, torch.float16, device)
    labels[:] = 7
    grads = [
        gradients(f, (x.to(dtype), weight.to(dtype), labels), [torch.ones((), device=device)])[0]
        for f, dtype in ((OP, torch.float16), (reference.linear_cross_entropy, torch.float32))
    ]
    actual, exact = grads[0].float(), grads[1]
    assert (actual - exact).norm() < 0.005 * exact.norm()


def test_strided_and_torch_machinery(device):
    x, weight, labels = make(24, 16, 100, torch.float32, device)
    cubes = x.view(4, 6, 16).transpose(0, 1), labels.view(4, 6).t()
    losses = OP(cubes[0], weight, cubes[1], reduction="none")
    flat = OP(x, weight, labels, reduction="none").view(4, 6).t()
    torch.testing.assert_close(losses, flat)
    wide = torch.full((100, 24), float("nan"), device=device)
    wide[:, :16] = weight
    torch.testing.assert_close(OP(x, wide[:, :16], labels, reduction="none"), flat.t().flatten())
    torch.testing.assert_close(OP(x, weight.t().contiguous().t(), labels), OP(x, weight, labels))
    assert OP(x[0], weight, labels[0] * 0, reduction="none").shape == ()
    options = (-100, -100, 0.1, 1e-3)
    x.requires_grad_(), weight.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.mllama_kernels.linear_cross_entropy.default
    for kept in (False, True):
        args = (x, weight, labels, *options, True, kept, 3000)
        torch.library.opcheck(op, args, test_utils=tests)
        # The rest of the checks would differentiate by all results.
        opcheck("linear_cross_entropy", (x.detach(), weight.detach(), *args[2:]))
    x, weight = x.detach(), weight.detach()
    sums = torch.rand(2, 24, device=device)
    opcheck("linear_cross_entropy_backward", (sums[0], x, weight, labels, sums, *options, 3000))
    assert_compiles(OP, x.detach(), weight.detach(), labels, label_smoothing=0.1)


@pytest.mark.parametrize("width, vocab", [(17, 33), (100, 100), (38, 1004)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_lies_after_a_row_is_not_read(device, dtype, width, vocab):
    """The library multiplies 16 bits by blocks of columns, and these are no whole blocks."""
    x, weight, labels = make(100, width, vocab, dtype, device)
    grads = torch.ones_like(labels, dtype=torch.float32)
    held = []
    for rows in (x, strided(x, 7)):
        rows = rows.detach().requires_grad_()
        loss = OP(rows, weight, labels, reduction="none")
        held.append((loss, *torch.autograd.grad(loss, rows, grads)))
    for a, b in zip(*held):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_rows", [2, 6])
@pytest.mark.parametrize("options", [*OPTIONS, {"reduction": "none"}, {"reduction": "sum"}])
def test_trains(device, monkeypatch, options, chunk_rows):
    set_chunk_bytes(monkeypatch, chunk_rows * 24 * 8)  # of float64, for gradcheck
    x, weight, labels = make(6, 8, 20, torch.float32, device)
    labels = without_ignored(labels, options)
    assert_gradcheck(lambda x, w: OP(x, w, labels, **options), x, weight)
    assert_trains_compiled(OP, x, weight, labels, **options)


def test_autocast(device):
    x, weight, labels = make(12, 16, 50, torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = OP(x, weight, labels)
    loss.backward()
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.equal(OP(x.bfloat16(), weight.bfloat16(), labels))


def test_errors(device):
    x, weight, labels = make(4, 8, 50, torch.float32, device)
    with pytest.raises(RuntimeError, match=r"weight must be \(V, 8\), got shape \(50, 7\)"):
        OP(x, weight[:, :7], labels)
    with pytest.raises(RuntimeError, match=r"weight must be \(V, 8\), got shape \(\)"):
        OP(x, weight[0, 0], labels)
    with pytest.raises(RuntimeError, match="weight must have the dtype of x, float32"):
        OP(x, weight.bfloat16(), labels)
    with pytest.raises(RuntimeError, match=r"labels must have shape \(4,\), got \(3,\)"):
        OP(x, weight, labels[:3])
    with pytest.raises(RuntimeError, match="labels must be int64, got int32"):
        OP(x, weight, labels.int())
    with pytest.raises(RuntimeError, match=r"label_smoothing must be from 0 to 1, got 1\.5"):
        OP(x, weight, labels, label_smoothing=1.5)
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'avg\''):
        OP(x, weight, labels, reduction="avg")


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that was allocated at once within `run`, beyond what was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def training_peaks(args: Any, train_weight: bool, device: torch.device) -> tuple[int, int]:
    """Of a step, for the kernels and for plain PyTorch."""
    x, weight, labels = args

    def peak(function: Callable[..., Tensor]) -> int:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_(train_weight)
        return peak_bytes(lambda: function(*leaves, labels).backward(), device)

    return peak(OP), peak(reference.linear_cross_entropy)


@pytest.mark.skipif(_library.simulated, reason="memory is the same, and many rows take long")
@pytest.mark.parametrize("train_weight", [False, True])
def test_memory_is_a_quarter_at_most(monkeypatch, train_weight):
    """The shapes of 4096 tokens, E 4096 and vocabulary 128256, all a sixteenth but the tokens."""
    set_chunk_bytes(monkeypatch, (256 << 20) // 16)
    args = make(4096, 256, 8016, torch.bfloat16, torch.device("cpu"))
    ours, plain = training_peaks(args, train_weight, torch.device("cpu"))
    logits = 4096 * 8016
    assert plain >= 12 * logits  # float32: logits' log-softmax, two gradients
    assert 4 * ours <= plain, (ours, plain)
    chunk, grad_x, grad_weight = (256 << 20) // 16, 4096 * 256 * 2, 8016 * 256 * 2
    # Where the CPU has no bfloat16 products: a panel of an operand and one of the result, in float32.
    panels = 0 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 2 * (16 << 20)
    assert ours <= chunk + 4 * grad_x + train_weight * grad_weight + panels + (1 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("train_weight", [False, True])
def test_memory_of_the_checkpoint_is_a_quarter_at_most(train_weight):
    device = torch.device("cuda")
    args = make(4096, 4096, 128256, torch.bfloat16, device)
    training_peaks(args, train_weight, device)  # the library's workspaces
    ours, plain = training_peaks(args, train_weight, device)
    assert 4 * ours <= plain, (ours, plain)
