"""setup.py: what it decides, and what it says when something is missing or wrong."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch) -> types.ModuleType:
    """setup.py as a module, without running setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in (
        "MAX_JOBS",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CUDA_PATH",
        "CXX",
        "NVCC_THREADS",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLLAMA_KERNELS_CUDA", "MLLAMA_KERNELS_SIMULATE", "MLLAMA_KERNELS_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("mllama_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_torch(
    cuda: str | None = None, capability: tuple[int, int] | None = None, version="2.13.0"
):
    return types.SimpleNamespace(
        __version__=version,
        version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(
            is_available=lambda: capability is not None, get_device_capability=lambda: capability
        ),
    )


def fake_toolkit(
    folder: Path, release: str = "13.0", nvcc: bool = True, headers: bool = True
) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    if nvcc:
        program = folder / "bin" / "nvcc"
        program.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        )
        program.chmod(0o755)
    if headers:
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


def test_cuda_is_off_on_request(build, monkeypatch):
    monkeypatch.setenv("MLLAMA_KERNELS_CUDA", "0")
    assert build.find_cuda(fake_torch()) is None


def test_cuda_home_is_taken_without_a_gpu(build, monkeypatch, tmp_path):
    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.find_cuda(fake_torch()) == (home, "13.0")


def test_no_nvcc_builds_for_cpu_with_one_line(build, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.Path, "exists", lambda self: False)
    assert build.find_cuda(fake_torch()) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "no nvcc" in line and "CPU kernels only" in line


@pytest.mark.parametrize(
    ("environment", "toolkit", "torch", "words"),
    [
        ({"MLLAMA_KERNELS_CUDA": "yes"}, {}, fake_torch(), ["MLLAMA_KERNELS_CUDA=yes", "auto, 1 or 0"]),
        ({}, {"nvcc": False}, fake_torch(), ["without bin/nvcc", "CUDA >= 12.8", "CUDA_HOME"]),
        ({}, {"headers": False}, fake_torch(), ["without include/cuda_runtime.h"]),
        ({}, {"release": "12.4"}, fake_torch(), ["nvcc 12.4", "CUDA >= 12.8"]),
        ({}, {"release": "13.0"}, fake_torch(cuda="12.8"), ["torch for CUDA 12.8", "nvcc of CUDA 12"]),
    ],
)  # fmt: skip
def test_wrong_pieces_stop_with_a_remedy(
    build, monkeypatch, tmp_path, environment, toolkit, torch, words
):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", **toolkit)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        build.find_cuda(torch)
    for word in ["found:", "needed:", "remedy:", *words]:
        assert word in str(stop.value)


def test_missing_tools_stop_with_a_remedy(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match=r"no ninja on PATH[\s\S]*remedy: pip install ninja"):
        build.find_tool("ninja", "pip install ninja")


def test_old_torch_stops(build, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", fake_torch(version="2.10.1+cpu"))
    with pytest.raises(SystemExit, match=r"found:  torch 2.10.1\+cpu[\s\S]*needed: torch >= 2.11"):
        build.find_torch()


@pytest.mark.parametrize(
    ("listed", "capability", "name"),
    [
        (None, None, "sm_80/compute_80/sm_90a"),
        (None, (9, 0), "sm_90a"),
        (None, (8, 6), "sm_86"),
        ("8.0;9.0a", None, "sm_80/sm_90a"),
        ("8.9+PTX", (9, 0), "sm_89/compute_89"),
        ("10.0 12.0", None, "sm_100/sm_120"),
    ],
)
def test_architectures(build, monkeypatch, listed, capability, name):
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    flags, named = build.gencode(fake_torch(capability=capability))
    assert named == name and flags.count("-gencode") == len(name.split("/"))


@pytest.mark.parametrize("listed", ["7.5", "ninety", "8.0;7.0"])
def test_architectures_that_cannot_work(build, monkeypatch, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match=r"8\.0 or newer"):
        build.gencode(fake_torch())


def test_sanitizers_take_one_instruction_set(build, monkeypatch):
    cxx = build.find_tool("c++", "")
    assert build.sanitized_isa(cxx) is None
    for wanted in build.ISA_FLAGS:
        monkeypatch.setenv("MLLAMA_KERNELS_SANITIZE", wanted)
        assert build.sanitized_isa(cxx) == wanted
    monkeypatch.setenv("MLLAMA_KERNELS_SANITIZE", "1")
    isa = build.sanitized_isa(cxx)
    text = build.ninja_file(ROOT / "build", ROOT / "_C.so")
    assert f"-DMLLAMA_ONLY_ISA={isa}" in text and "nvcc -O3" not in text
    assert text.count("/cpu/rms_norm.cpp\n") == 1
    assert text.count("-fsanitize=address,undefined") == 2  # to compile and to link


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MLLAMA_KERNELS_SANITIZE": "yes"}, ["SANITIZE=yes", "0, 1, generic"]),
        ({"MLLAMA_KERNELS_SANITIZE": "1", "MLLAMA_KERNELS_CUDA": "1"}, ["unset MLLAMA_KERNELS_CUDA"]),
        ({"MLLAMA_KERNELS_SANITIZE": "1", "MLLAMA_KERNELS_SIMULATE": "1"}, ["unset MLLAMA_KERNELS_SIM"]),
    ],
)  # fmt: skip
def test_sanitizers_that_do_not_fit(build, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        build.sanitized_isa(build.find_tool("c++", ""))
    for word in ["found:", "needed:", "remedy:", *words]:
        assert word in str(stop.value)


def test_the_slowest_sources_start_first(build):
    """A file of one line may instantiate the largest templates: last, it keeps one core busy alone."""
    sources = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    names = [str(p.relative_to(ROOT / "csrc/cuda")) for p in build.slowest_first(sources)]
    assert sorted(names) == sorted(str(p.relative_to(ROOT / "csrc/cuda")) for p in sources)
    products = [i for i, name in enumerate(names) if name.startswith("quantized_linear/mma_")]
    assert len(products) == 6 and max(products) < len(names) / 3
    assert names[-1] == "common/device.cu"


def test_jobs(build, monkeypatch):
    assert build.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == 7
