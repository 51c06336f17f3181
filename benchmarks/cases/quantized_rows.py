"""Rows of a quantised embedding: what a decode step and a prompt read of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting
from benchmarks.shapes import E
from mllama_kernels import reference
from mllama_kernels.encodings import ENCODINGS

VOCAB = 8192  # of which any row may be read; more would change nothing but the time to make it


def make(setting: Setting, rows: int, encoding: str) -> Arguments:
    weight = ours.quantize(torch.randn(VOCAB, E, device=setting.device), encoding)
    ids = torch.randint(0, VOCAB, (rows,), device=setting.device)
    return ids, weight, setting.dtype


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.sizes([1, 512], [1, 512], [512]):
        for encoding in ("q4_k", "q6_k", "q8_0", "int8"):
            yield Case(
                op="quantized_rows",
                shape={"rows": rows, "dim": E, "encoding": encoding},
                dtype=setting.dtype,
                make=partial(make, setting, rows, encoding),
                truth=reference.quantized_rows,
                impls=(Impl(OURS, ours.quantized_rows), Impl(PLAIN, reference.quantized_rows)),
                bytes=ENCODINGS[encoding].nbytes(rows, E) + rows * E * setting.element,
            )
