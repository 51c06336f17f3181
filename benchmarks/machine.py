"""What the figures were measured on: machine, versions, commit, and the GPU's clocks while measuring."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from mllama_kernels import _library

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "triton", "liger-kernel", "flashinfer-python", "numpy")
CPU_CACHE_MULTIPLE, L2_MULTIPLE = 3, 5
# By these variables libraries and kernels use fewer instructions than the CPU has.
NARROWING = (
    "MLLAMA_KERNELS_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)


def _command(*words: str) -> str | None:
    try:
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> dict[str, Any]:
    """The commit, and whether files that git knows differ from it."""
    status = _command("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _command("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.version.cuda else None
    found["compiler"] = _library.build_info().get("compiler")
    return found


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def last_level_cache() -> int:
    """Bytes of the largest CPU cache; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=2**25)


def cold_bytes(device: torch.device) -> int:
    """How much data must pass between two uses of a tensor for it to have left the cache."""
    if device.type == "cuda":
        return L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_CACHE_MULTIPLE * last_level_cache()


def describe(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "kind": device.type,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": _library.instruction_set(),
        "kept_to": {name: os.environ[name] for name in NARROWING if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine["gpu"] = gpu.name
        machine["compute_capability"] = f"{gpu.major}.{gpu.minor}"
        machine["sms"] = gpu.multi_processor_count
        machine["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        machine["cache_bytes"] = gpu.L2_cache_size
        machine |= query_gpu("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    else:
        machine["cache_bytes"] = last_level_cache()
    return machine


def query_gpu(*fields: str) -> dict[str, Any]:
    """Fields of nvidia-smi for the GPU that torch calls 0; nothing where it does not run."""
    gpu = str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else "0"
    answer = _command(
        *("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"),
        *("-i", gpu if gpu.startswith("GPU-") or gpu == "0" else f"GPU-{gpu}"),
    )
    if not answer:
        return {}
    values = (value.strip() for value in answer.splitlines()[0].split(","))
    return {field: _number(value) for field, value in zip(fields, values)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def state(device: torch.device) -> dict[str, Any]:
    """What changes while measuring: clocks, power and temperature of a GPU, load of a CPU."""
    if device.type == "cuda":
        return query_gpu("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
