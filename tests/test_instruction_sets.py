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
# Ops whose kernels write past the cache, and those with most code of their own per vector width.
OPS = ("rms_norm", "gated_residual", "swiglu", "skinny_linear", "cross_attention", "quantize")


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
@pytest.mark.parametrize(
    "setting",
    [
        {"MLLAMA_KERNELS_CPU_ISA": "generic"},
        {"MLLAMA_KERNELS_CPU_ISA": "avx2"},
        {"MLLAMA_KERNELS_CPU_CACHE": "0"},
        {"MLLAMA_KERNELS_CPU_ISA": "avx2", "MLLAMA_KERNELS_CPU_CACHE": "0"},
    ],
    ids=lambda setting: "-".join(setting.values()),
)
def test_ops(setting, request):
    if "CPU_ISA" in "".join(setting) and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there is one instruction set")
    run_tests(request, setting, OPS)


@pytest.mark.skipif(library.simulated, reason="there the CUDA kernels run")
def test_products_where_the_library_has_none_of_16_bits(request):
    """oneDNN kept to AVX2 has no bfloat16, and PyTorch then says of this CPU that it has none."""
    setting = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run_tests(
        request, setting, ("linear_cross_entropy",), "-k", "matches_float64 or quarter or autocast"
    )
