"""Runs the cases on a simulated build and writes what the simulator counted; `__main__.py` starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.static.cases import cases
from mllama_kernels import _library


def moved(launch: dict[str, Any]) -> int:
    """Bytes between the memories beyond L1 and a multiprocessor. cp.async is among the loads."""
    sectors = launch["global_load"]["sectors"] + launch["global_store"]["sectors"]
    copies = ("bulk_g2s_bytes", "bulk_s2g_bytes", "tma_g2s_bytes", "tma_s2g_bytes")
    return 32 * sectors + sum(launch[key] for key in copies)


def summary(launch: dict[str, Any]) -> dict[str, Any]:
    shared = [launch[key] for key in ("shared_load", "shared_store", "ldmatrix")]
    return {
        "kernel": launch["kernel"],
        "grid": launch["grid"],
        "block": launch["block"],
        "cluster": launch["cluster"],
        "shared_bytes": launch["static_smem"] + launch["dynamic_smem"],
        "warp_instructions": launch["warp_insts"],
        "classes": launch["classes"],
        "requested_bytes": launch["global_load"]["bytes"] + launch["global_store"]["bytes"],
        "sectors": launch["global_load"]["sectors"] + launch["global_store"]["sectors"],
        "cp_async_bytes": launch["cp_async_bytes"],
        "bulk_bytes": launch["bulk_g2s_bytes"] + launch["bulk_s2g_bytes"],
        "tma_bytes": launch["tma_g2s_bytes"] + launch["tma_s2g_bytes"],
        "moved_bytes": moved(launch),
        "shared_wavefronts": sum(s["wavefronts"] for s in shared),
        "shared_conflicts": sum(s["conflict_extra"] for s in shared),
        "mma_flops": launch["mma_flops"],
        "wgmma_flops": launch["wgmma_flops"],
        "atomics": launch["atomics"],
    }


@torch.inference_mode()
def main() -> None:
    output, variant, *ops = sys.argv[1:]
    if not _library.simulated:
        raise SystemExit(f"{_library.path or _library.missing}: not a simulated build")
    arch = int(os.environ["CUDASIM_ARCH"])
    stats = Path(os.environ["CUDASIM_STATS"])
    torch.manual_seed(0)
    rows = []
    for case in cases(arch, variant):
        if ops and case.op not in ops:
            continue
        stats.write_text("")
        case.run()
        launches = [summary(json.loads(line)) for line in stats.read_text().splitlines()]
        if not launches:
            raise SystemExit(f"{case.op} {case.shape}: no kernel ran under the simulator")
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "arch": arch,
                "floor_bytes": case.floor,
                "again": case.again,
                "conflicts_reason": case.conflicts[0],
                "conflicts_allowed": case.conflicts[1],
                "useful_flops": case.flops,
                "launches": launches,
            }
        )
    Path(output).write_text(json.dumps({"build": _library.build_info(), "rows": rows}))


if __name__ == "__main__":
    main()
