"""Loads the compiled ops, and says why when they cannot be loaded."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

INSTRUCTION_SETS = ("generic", "avx2", "avx512")
OPS: list[str] = []  # all of them, once mllama_kernels is imported: `_dispatch.public` enters each


def _load() -> tuple[Path | None, str | None]:
    """The library's path, or the reason it is not there.

    Raises: ValueError for an instruction set in MLLAMA_KERNELS_CPU_ISA that the library does not know.
    """
    wanted = os.environ.get("MLLAMA_KERNELS_CPU_ISA")
    if wanted and wanted not in INSTRUCTION_SETS:
        known = ", ".join(INSTRUCTION_SETS)
        raise ValueError(f"MLLAMA_KERNELS_CPU_ISA={wanted!r}; expected one of {known}")
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return None, "the compiled library is missing; run `pip install .` in the source tree"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} could not be loaded under torch {torch.__version__}: {error}"
    return found[0], None


path, missing = _load()


def build_info() -> dict[str, Any]:
    """Compiler, CUDA version and architectures of the compiled library; empty without one."""
    if path is None:
        return {}
    return json.loads(_text("build_info"))


def instruction_set() -> str | None:
    """What the CPU kernels use on this machine: generic, avx2, avx512, avx512 with amx; None without a
    library. MLLAMA_KERNELS_CPU_ISA can ask for a narrower one."""
    return None if path is None else _text("instruction_set")


def _text(name: str) -> str:
    function = getattr(ctypes.CDLL(str(path)), f"mllama_kernels_{name}")
    function.restype = ctypes.c_char_p
    return function().decode()


has_cuda = bool(build_info().get("cuda"))
simulated = bool(build_info().get("simulated"))


def unavailable(device: str) -> str | None:
    """Why this library has no kernels that run on a device ("cpu", "cuda:1"), or None.

    What the environment switches off is not known here: `_dispatch.why_not` is what to ask.
    """
    if missing:
        return missing
    kind = device.partition(":")[0]
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"there are kernels for CPU and CUDA, none for {kind}"
    if simulated:
        return "this build runs the CUDA kernels on CPU tensors (MLLAMA_KERNELS_SIMULATE=1)"
    if not has_cuda:
        return "the library was built without CUDA; reinstall with nvcc on PATH or CUDA_HOME set"
    if not (torch.cuda.is_initialized() or torch.cuda.is_available()):  # the first is quicker
        return "torch sees no CUDA device"
    return None
