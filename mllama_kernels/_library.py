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


def quantized_packed_bytes(on_cpu: bool, form: tuple[int, ...]) -> int:
    """What `quantized_pack` makes of a weight, in the layout of a device: see `QuantizedTensor.form`.

    Raises: RuntimeError for numbers of no weight, and a device without kernels.
    """
    function = ctypes.CDLL(str(path)).mllama_kernels_quantized_packed_bytes
    function.restype = ctypes.c_int64
    found = function(ctypes.c_bool(on_cpu), *(ctypes.c_int64(number) for number in form))
    if found < 0:
        where = "CPU" if on_cpu else "CUDA"
        raise RuntimeError(f"mllama_kernels.quantized_pack: {form} is no weight on {where}")
    return found


def _tile_rows() -> dict[str, int]:
    if path is None:
        return {}
    function = ctypes.CDLL(str(path)).mllama_kernels_quantized_tile_rows
    function.restype = ctypes.c_int64
    return {
        device: function(ctypes.c_bool(device == "cpu" and not simulated))
        for device in ("cpu", "cuda")
    }


def _text(name: str) -> str:
    function = getattr(ctypes.CDLL(str(path)), f"mllama_kernels_{name}")
    function.restype = ctypes.c_char_p
    return function().decode()


has_cuda = bool(build_info().get("cuda"))
simulated = bool(build_info().get("simulated"))
# Rows of a quantised weight that its packed form keeps together, by device: whole tiles are a range of it.
TILE_ROWS = _tile_rows()


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
