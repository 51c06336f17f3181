"""One module per op: ``cases(setting)`` yields its rows, our implementation first, then the peers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import mllama_kernels
from benchmarks.case import Case, Setting

# Where an op's cases are; most have a module of their own name.
MODULES = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "gated_residual": "gated_residual",
    "swiglu": "swiglu",
    "rotary_attention": "rotary_attention",
    "rotary_attention_cached": "rotary_attention_cached",
    "cross_attention": "cross_attention",
    "vision_attention": "vision_attention",
    "patch_embed": "patch_embed",
    "skinny_linear": "skinny_linear",
    "linear_cross_entropy": "linear_cross_entropy",
    "sample": "sample",
}


def missing(op: str) -> str | None:
    """Why an op cannot be measured, if it cannot."""
    return None if hasattr(mllama_kernels, op) else f"mllama_kernels has no op {op}"


def cases(op: str, setting: Setting) -> Iterator[Case]:
    module = importlib.import_module(f"benchmarks.cases.{MODULES[op]}")
    return (case for case in module.cases(setting) if case.op == op)
