"""The CPU kernels as other machines run them: narrower vectors, and results written past the cache."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import mllama_kernels._library as library

TESTS = Path(__file__).parent
# Ops whose kernels write past the cache.
WRITING = ("rms_norm", "gated_residual", "swiglu")
# Those too with most code of their own per vector width.
OPS = (*WRITING, "skinny_linear", "cross_attention", "quantize")
OPS += ("quantized_linear", "quantized_linear_int8", "quantized_numerics", "quantized_rows")


def run_tests(request, setting: dict[str, str], ops: tuple[str, ...], *options: str) -> None:
    """The ops' tests in a process with these settings."""
    files = [str(TESTS / f"test_{op}.py") for op in ops]
    seed = str(request.config.getoption("--seed"))
    words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--seed", seed, *options, *files]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **setting, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""},
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.skipif(library.simulated, reason="there the CUDA kernels run")
@pytest.mark.parametrize("width", ["generic", "avx2"])
def test_narrower_vectors(width, request):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there is one instruction set")
    run_tests(request, {"MLLAMA_KERNELS_CPU_ISA": width, "MLLAMA_TEST_REDUCED": "1"}, OPS)


@pytest.mark.skipif(library.simulated, reason="there the CUDA kernels run")
@pytest.mark.parametrize("width", [None, "avx2"])
def test_results_written_past_the_cache(width, request):
    """No memory counts as a cache, so that every result is written past it."""
    setting = {"MLLAMA_KERNELS_CPU_CACHE": "0"}
    if width is not None:
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("there is one instruction set")
        setting["MLLAMA_KERNELS_CPU_ISA"] = width
    run_tests(request, setting, WRITING)


@pytest.mark.skipif(library.simulated, reason="there the CUDA kernels run")
@pytest.mark.parametrize("tests", ["matches_float64", "quarter and True", "autocast"])
def test_products_where_the_library_has_none_of_16_bits(tests, request):
    """oneDNN kept to AVX2 has no bfloat16, and PyTorch then says of this CPU that it has none."""
    setting = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run_tests(request, setting, ("linear_cross_entropy",), "-k", tests)
