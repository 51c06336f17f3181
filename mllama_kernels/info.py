"""``python -m mllama_kernels.info``: versions, compiled architectures, and each op or why it cannot run."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from mllama_kernels import _dispatch, _library

# Kernels are launched before the one ahead of them ends: in a CUDA graph that is an edge of a kind that
# drivers know since this version. Torch runs on older ones too.
_GRAPH_DRIVER = (12, 3)


def _driver() -> str | None:
    """The newest CUDA that the driver supports, as "12.8"; None where it does not tell."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _too_old(driver: str | None) -> bool:
    return driver is not None and tuple(map(int, driver.split("."))) < _GRAPH_DRIVER


def collect() -> dict[str, Any]:
    """What this installation is and can do, ready for JSON."""
    device = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
        }
    return {
        "mllama_kernels": importlib.metadata.version("mllama-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "library": _library.path.name if _library.path else None,
        "build": _library.build_info(),
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "instruction_set": _library.instruction_set(),
        },
        "gpu": device,
        "backend": _dispatch.BACKEND,
        "ops": {
            name: {kind: _dispatch.why_not(name, kind) or "available" for kind in ("cpu", "cuda")}
            for name in _library.OPS
        },
    }


def as_text(info: dict[str, Any]) -> str:
    """The lines that `python -m mllama_kernels.info` prints."""
    build, cpu, gpu = info["build"], info["cpu"], info["gpu"]
    cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build.get("cuda") else "no CUDA"
    lines = [
        f"mllama-kernels {info['mllama_kernels']}, Python {info['python']}",
        f"torch    {info['torch']} (CUDA {info['torch_cuda'] or 'none'})",
        f"library  {info['library'] or _library.missing}",
        f"built    {build.get('compiler', '-')}; {cuda}" + (", simulated" * _library.simulated),
        f"CPU      {cpu['machine']}, {cpu['threads']} threads, kernels for {cpu['instruction_set'] or '-'}",
        f"GPU      {gpu['name']}, {gpu['compute_capability']}" if gpu else "GPU      none",
        f"backend  {info['backend']}",
    ]
    if gpu and _too_old(gpu["driver"]):
        needed = ".".join(map(str, _GRAPH_DRIVER))
        lines.append(
            f"driver   for CUDA {gpu['driver']}: decoding runs without CUDA graphs, which need one for "
            f"CUDA {needed} or later"
        )
    for name, states in info["ops"].items():
        lines.append(f"{name:24} CPU: {states['cpu']}; CUDA: {states['cuda']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mllama_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else as_text(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
