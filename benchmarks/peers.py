"""Peers that several ops share: torch.compile, SDPA by backend, FlexAttention, other packages."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.case import Arguments, Impl, Setting, absent, unchanged

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What SDPA calls in each backend; the math backend is none of these.
_FUSED = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_efficient_attention": "efficient",
}


def compiled(call: Callable[..., Any], name: str = "torch.compile") -> Impl:
    """The line as inductor compiles it for these very shapes; on a GPU it searches for the best kernel."""

    @functools.cache
    def build() -> Callable[..., Any]:
        mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else None
        return torch.compile(call, dynamic=False, fullgraph=True, mode=mode)

    return Impl(name, lambda *args: build()(*args))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention on (B, L, H, D); k and v may have fewer heads."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **options).transpose(1, 2)


def with_every_head(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """k, v (B, L, Hkv, D) with each head as often as queries share it."""
    group = heads // k.shape[2]
    return k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


def sdpa_backends(
    setting: Setting,
    call: Callable[..., Any],
    prepare: Callable[..., Arguments] = unchanged,
    suffix: str = "",
    names: tuple[str, ...] = ("flash", "cudnn", "efficient", "math"),
) -> list[Impl]:
    """``call``, a use of SDPA, under each backend by itself; with the name "" as PyTorch dispatches it."""
    impls = []
    for name in names:
        label = f"sdpa {name}{suffix}" if name else f"sdpa{suffix}"
        if not name:
            impls.append(Impl(label, call, prepare))
            continue
        if name in ("cudnn", "efficient") and not setting.on_gpu:
            impls.append(absent(label, "a CUDA backend"))
            continue

        def forced(*args: Any, backend: SDPBackend = BACKENDS[name]) -> Any:
            with sdpa_kernel([backend]):
                return call(*args)

        impls.append(Impl(label, forced, prepare))
    return impls


class _AtenNames(TorchDispatchMode):
    """Collects the names of the ATen ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ writes to the terminal."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def longest_kernel(call: Callable[[], Any]) -> str | None:
    """The name of the CUDA kernel in which a call spends most time, by the profiler."""
    times: dict[str, float] = {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with _quiet(), torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us()
    return max(times, key=times.__getitem__)[:120] if times else None


def backend_used(name: str, call: Callable[[], Any], device: torch.device) -> dict[str, str]:
    """What ran: the backend that SDPA took, and on a GPU the kernel that took the longest."""
    used = {}
    if name.startswith("sdpa"):
        # In inference mode SDPA would reach the collector whole, before it has chosen.
        with torch.inference_mode(False), _AtenNames() as seen:
            call()
        used["sdpa"] = next((_FUSED[op] for op in sorted(seen.names) if op in _FUSED), "math")
    if device.type == "cuda" and (kernel := longest_kernel(call)):
        used["kernel"] = kernel
    return used


def wrong_backend(name: str, used: dict[str, str]) -> str | None:
    """Why an implementation that is called "sdpa <backend>" is not what its name says, if it is not."""
    words = name.split()
    if words[0] != "sdpa" or len(words) < 2 or words[1].strip(",") not in BACKENDS:
        return None
    wanted, got = words[1].strip(","), used.get("sdpa")
    return None if got == wanted else f"PyTorch ran {got or 'an unknown backend'} instead"


def flex(
    setting: Setting,
    mask_of: Callable[..., Callable[..., Tensor]],
    lengths: tuple[int, int],
    heads: Callable[..., tuple[Tensor, Tensor, Tensor]],
    head_dim: int,
    unavailable: str | None = None,
) -> Impl:
    """FlexAttention, compiled, with its block mask made outside the timed region.

    Args:
        mask_of: from the case's arguments to a mask_mod.
        lengths: queries, keys.
        heads: from the case's arguments to q, k, v (B, L, H, D).
        head_dim: D. FlexAttention rounds it up to a power of two inside; where it is none, zeros are
            appended outside the timed region, since it has read out of bounds with such sizes.
    """
    wide = 1 << (head_dim - 1).bit_length()
    name = "FlexAttention" if wide == head_dim else f"FlexAttention, padded to {wide}"
    if unavailable:
        return absent(name, unavailable)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(flex_attention, dynamic=False)

    def prepare(*args: Any) -> Arguments:
        q, k, v = (F.pad(t, (0, wide - head_dim)).transpose(1, 2) for t in heads(*args))
        mask = create_block_mask(mask_of(*args), q.shape[0], None, *lengths, device=setting.device)
        return q, k, v, mask

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        out = build()(q, k, v, block_mask=mask, scale=head_dim**-0.5, enable_gqa=gqa)
        return out[..., :head_dim].transpose(1, 2)

    return Impl(name, call, prepare)


def from_package(
    setting: Setting,
    name: str,
    module: str,
    make: Callable[[Any], Callable[..., Any]],
    prepare: Callable[..., Arguments] = unchanged,
) -> Impl:
    """An op of a package that may be there; CUDA only, as those packages are."""
    if not setting.on_gpu:
        return absent(name, "runs on CUDA only")
    try:
        return Impl(name, make(importlib.import_module(module)), prepare)
    except (ImportError, AttributeError, OSError) as error:
        return absent(name, f"{type(error).__name__}: {error}")
