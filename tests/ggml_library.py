"""llama.cpp's own quantisers, out of the library that `llama-cpp-python` brings along."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mllama_kernels.encodings import ENCODINGS

_TYPES = {"q4_0": 2, "q8_0": 8, "q4_k": 12, "q6_k": 14}


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("llama_cpp")  # importing it would load all of llama.cpp
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted((Path(folder) / "lib").glob("libggml-base*")):
            library = ctypes.CDLL(str(path))
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
            numbers, pointer = [ctypes.c_int64] * 3, ctypes.c_void_p
            library.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                pointer,
                pointer,
                *numbers,
                pointer,
            ]
            return library
    return None


def ggml_blocks(weight: Tensor, encoding: str, importance: Tensor | None = None) -> Tensor:
    """What ggml_quantize_chunk makes of a float32 weight (N, K); skips the test where it is not installed."""
    library = _library()
    if library is None:
        pytest.skip("llama-cpp-python is not installed")
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.float().numpy())
    chosen = ENCODINGS[encoding]
    out = np.empty((rows, columns // chosen.block * chosen.bytes_per_block), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance.float().numpy())
    place = None if weights is None else weights.ctypes.data
    written = library.ggml_quantize_chunk(
        _TYPES[encoding], source.ctypes.data, out.ctypes.data, 0, rows, columns, place
    )
    assert written == out.nbytes
    return torch.from_numpy(out)
