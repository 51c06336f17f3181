"""What the compiler says of every kernel of a simulated build: registers, spills, shared memory.

The build embeds its PTX uncompressed (MLLAMA_KERNELS_SIMULATE=1); ptxas assembles that very PTX for
the real architectures, so the figures belong to the code that the simulator counted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TARGETS = {80: "sm_80", 90: "sm_90a"}
WARP = 32


@dataclass(frozen=True)
class Resources:
    registers: int
    spill_bytes: int  # stored and loaded, per thread


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, "Technical specifications")."""

    shared_bytes: int
    count: int  # on the GPU that is presented: A100, H200
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    reserved_shared: int = 1024  # per block, taken by the system


MULTIPROCESSORS = {80: Multiprocessor(164 * 1024, 108), 90: Multiprocessor(228 * 1024, 132)}


def blocks_per_sm(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks one multiprocessor holds at a time."""
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // WARP)
    warp_registers = -(-registers * WARP // 256) * 256  # handed out by 256
    # Each of the four partitions has a quarter of the registers and takes whole warps.
    by_registers = 4 * (sm.registers // 4 // warp_registers) // warps
    by_shared = sm.shared_bytes // (-(-shared_bytes // 128) * 128 + sm.reserved_shared)
    return min(sm.threads // (warps * WARP), sm.blocks, by_registers, by_shared)


def embedded_ptx(library: Path, target: str) -> list[bytes]:
    data = library.read_bytes()
    texts = []
    for match in re.finditer(rb"\.target " + target.encode() + rb"\b", data):
        text = data[data.rfind(b"\0", 0, match.start()) + 1 : data.find(b"\0", match.start())]
        if b".entry" in text:
            texts.append(text)
    if not texts:
        raise SystemExit(f"{library} holds no PTX for {target}: is it a simulated build?")
    return texts


def assemble(ptx: bytes, target: str) -> dict[str, Resources]:
    """By mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        # With what the simulation beside it leaves of the cores.
        command = ["nice", "ptxas", "-v", "-arch", target, source.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        found[part[: part.index("'")]] = Resources(
            int(registers[1]), int(spills[1]) + int(spills[2])
        )
    return found


def resources(library: Path) -> dict[int, dict[str, Resources]]:
    """Architecture, then mangled name, to what ptxas reports, for all kernels of the library."""
    jobs = [
        (arch, ptx, target)
        for arch, target in TARGETS.items()
        for ptx in embedded_ptx(library, target)
    ]
    found: dict[int, dict[str, Resources]] = {arch: {} for arch in TARGETS}
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda job: assemble(*job[1:]), jobs)
        for (arch, _, _), part in zip(jobs, parts):
            found[arch] |= part
    return found


def readable(names: list[str]) -> list[str]:
    """Mangled names as they stand in the sources, without namespaces and parameters."""
    text = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = []
    for name in text.splitlines():
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        short.append(re.sub(r"\bmllama::|\b__nv_(?=bfloat16)", "", name))
    return short
