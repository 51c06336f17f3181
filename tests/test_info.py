"""The info command and the switches that choose between kernel and reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_dispatch import set_build

import mllama_kernels._library as library
from mllama_kernels import _dispatch, info


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
    found = json.loads(out.stdout)
    assert set(found["ops"]) == set(library.OPS)
    assert all(state["cpu"] == "available" for state in found["ops"].values())
    text = subprocess.run(
        [sys.executable, "-m", "mllama_kernels.info"], capture_output=True, text=True, check=True
    ).stdout
    assert all(name in text for name in library.OPS) and found["torch"] in text


def test_reference_backend_and_disabled_ops_run_plain_pytorch():
    probe = (
        "import torch, mllama_kernels as k;"
        "x = torch.ones(1, 2, requires_grad=True); k.skinny_linear(x, torch.ones(1, 2)).sum().backward();"
        "print(x.grad is not None)"
    )
    assert run(probe).returncode != 0  # the kernel has no backward
    assert run(probe, MLLAMA_KERNELS_BACKEND="reference").stdout.strip() == "True"
    assert run(probe, MLLAMA_KERNELS_DISABLE="rms_norm,skinny_linear").stdout.strip() == "True"
    assert run(probe, MLLAMA_KERNELS_DISABLE="rms_norm, skinny_linear ").stdout.strip() == "True"
    assert run(probe, MLLAMA_KERNELS_DISABLE="rms_norm").returncode != 0
    assert run("import mllama_kernels", MLLAMA_KERNELS_BACKEND="").returncode == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MLLAMA_KERNELS_BACKEND": "fast"}, "'fast'; expected auto, kernels or reference"),
        ({"MLLAMA_KERNELS_CPU_ISA": "sse"}, "'sse'; expected one of generic, avx2, avx512"),
        (
            {"MLLAMA_KERNELS_DISABLE": "softmax"},
            "names softmax; the ops are cross_attention, gated_residual",
        ),
    ],
)
def test_wrong_switches_are_named(environment, message):
    result = run("import mllama_kernels", **environment)
    assert result.returncode != 0 and message in result.stderr
    command = run(
        "import sys; from mllama.cli import main; sys.exit(main(['info']))", **environment
    )
    assert command.returncode == 1 and message in command.stderr
    assert len(command.stderr.splitlines()) == 1 and not command.stdout


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


def test_info_names_the_instruction_set():
    code = "from mllama_kernels import info; print(info.collect()['cpu']['instruction_set'])"
    chosen = run(code).stdout.strip()
    assert chosen in ("generic", "avx2", "avx512", "avx512 with amx")
    assert run(code, MLLAMA_KERNELS_CPU_ISA="generic").stdout.strip() == "generic"
    if chosen != "generic":
        assert run(code, MLLAMA_KERNELS_CPU_ISA="avx2").stdout.strip() == "avx2"
    collected = info.collect()
    assert f"kernels for {collected['cpu']['instruction_set']}" in info.as_text(collected)


@pytest.mark.parametrize(
    ("driver", "is_old"),
    [("12.2", True), ("11.8", True), ("12.3", False), ("13.0", False), (None, False)],
)
def test_info_names_a_driver_too_old_for_graphs(driver, is_old):
    gpu = {"name": "a GPU", "compute_capability": "9.0", "memory_bytes": 1, "driver": driver}
    text = info.as_text({**info.collect(), "gpu": gpu})
    assert ("decoding runs without CUDA graphs" in text) == is_old
    assert not is_old or f"driver   for CUDA {driver}: " in text


@pytest.mark.parametrize("kind", ["reference", "disabled", "no library", "no such device"])
def test_info_gives_the_reason_dispatch_goes_by(monkeypatch, kind):
    set_build(monkeypatch, kind)
    collected = info.collect()
    for op, states in collected["ops"].items():
        assert states == {d: _dispatch.why_not(op, d) or "available" for d in ("cpu", "cuda")}
        assert states["cpu"] != "available" and states["cpu"] in info.as_text(collected)
