"""The info command and the switches that choose between kernel and reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import mllama_kernels._library as library


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_info_lists_every_op():
    out = subprocess.run(
        [sys.executable, "-m", "mllama_kernels.info", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    info = json.loads(out.stdout)
    assert set(info["ops"]) == set(library.OPS)
    assert all(state["cpu"] == "available" for state in info["ops"].values())
    text = subprocess.run(
        [sys.executable, "-m", "mllama_kernels.info"], capture_output=True, text=True, check=True
    ).stdout
    assert all(name in text for name in library.OPS) and info["torch"] in text


def test_reference_backend_and_disabled_ops_run_plain_pytorch():
    probe = (
        "import torch, mllama_kernels as k;"
        "x = torch.ones(1, 2, requires_grad=True); k.skinny_linear(x, torch.ones(1, 2)).sum().backward();"
        "print(x.grad is not None)"
    )
    assert run(probe).returncode != 0  # the kernel has no backward
    assert run(probe, MLLAMA_KERNELS_BACKEND="reference").stdout.strip() == "True"
    assert run(probe, MLLAMA_KERNELS_DISABLE="rms_norm,skinny_linear").stdout.strip() == "True"
    assert run(probe, MLLAMA_KERNELS_DISABLE="rms_norm").returncode != 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MLLAMA_KERNELS_BACKEND": "fast"}, "'fast'; expected auto, kernels or reference"),
        ({"MLLAMA_KERNELS_DISABLE": "softmax"}, "names softmax; the ops are rms_norm"),
    ],
)
def test_wrong_switches_are_named(environment, message):
    result = run("import mllama_kernels", **environment)
    assert result.returncode != 0 and message in result.stderr


def test_kernels_backend_says_why_it_cannot_run():
    code = (
        "import torch, mllama_kernels as k\n"
        "from mllama_kernels import _dispatch, _library\n"
        "_library.missing = 'because of a test'\n"
        "print(_dispatch.public(k.swiglu)(torch.ones(1, 2)))"
    )
    result = run(code, MLLAMA_KERNELS_BACKEND="kernels")
    assert "mllama_kernels.swiglu cannot run: because of a test" in result.stderr
    assert "0.7311" in run(code).stdout  # auto falls back to plain PyTorch
