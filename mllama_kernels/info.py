"""``python -m mllama_kernels.info``: versions, compiled architectures, and each op or why it cannot run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from mllama_kernels import _dispatch, _library


def collect() -> dict[str, Any]:
    """What this installation is and can do, ready for JSON."""
    device = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    return {
        "mllama_kernels": importlib.metadata.version("mllama-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "library": _library.path.name if _library.path else None,
        "build": _library.build_info(),
        "cpu": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "gpu": device,
        "backend": _dispatch.BACKEND,
        "ops": {
            name: {kind: _dispatch.why_not(name, kind) or "available" for kind in ("cpu", "cuda")}
            for name in _library.OPS
        },
    }


def as_text(info: dict[str, Any]) -> str:
    """The lines that `python -m mllama_kernels.info` prints."""
    build, gpu = info["build"], info["gpu"]
    cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build.get("cuda") else "no CUDA"
    lines = [
        f"mllama-kernels {info['mllama_kernels']}, Python {info['python']}",
        f"torch    {info['torch']} (CUDA {info['torch_cuda'] or 'none'})",
        f"library  {info['library'] or _library.missing}",
        f"built    {build.get('compiler', '-')}; {cuda}" + (", simulated" * _library.simulated),
        f"CPU      {info['cpu']['machine']}, {info['cpu']['threads']} threads",
        f"GPU      {gpu['name']}, {gpu['compute_capability']}" if gpu else "GPU      none",
        f"backend  {info['backend']}",
    ]
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
