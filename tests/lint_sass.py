"""Rules of the CUDA kernels that only their machine code shows to be kept.

    python tests/lint_sass.py WHEEL_OR_LIBRARY

Needs `cuobjdump` and `nvdisasm` (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) on PATH.

- A kernel that starts before the previous one has ended waits for it on every path, before its end
  and before it loads or stores global memory; it lets the next one start only after that, and uses
  no load that may be served by a cache the previous kernel did not write through (sm90.cuh).
- Loads that a kernel says are under way together are requested before the first of them is used.
- Nothing spills to local memory.
- Nothing touches the accumulators of a wgmma product in flight, or writes its operands.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sass import Instruction, Kernel, parse

GLOBAL = r"(LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP|UBLKRED|UTMALDG|UTMASTG|UTMAREDG)$"
# Copies of a weight that its caller promises to be constant.
MAY_COPY_EARLY = r"skinny_linear_sm90_kernel|quantized_linear_(int8_)?kernel"
# Mangled name, and how many 16-byte loads are at least under way whenever one of them is used.
IN_FLIGHT = {
    # A chunk of x for one or two eights of rows, and of the norm's weight.
    r"skinny_linear_sm\d+_kernel.*Li1E": 4,
    r"skinny_linear_sm\d+_kernel.*Li2E": 6,
    # kVecs vectors of the row, of the residual if there is one, and of the weight.
    r"\d+rms_norm_kernelI.*Lb0ELi\d+ELi1E": 2,
    r"\d+rms_norm_kernelI.*Lb1ELi\d+ELi1E": 3,
    r"\d+rms_norm_kernelI.*Lb0ELi\d+ELi4E": 8,
    r"\d+rms_norm_kernelI.*Lb1ELi\d+ELi4E": 12,
}


def _at(instruction: Instruction, words: str) -> str:
    return f"{instruction.address:#06x} {instruction.name}: {words}"


def waits_first(kernel: Kernel) -> Iterator[str]:
    if not kernel.has("ACQBULK") and not kernel.has("PREEXIT"):
        return
    for instruction in kernel.reachable(stop="ACQBULK"):
        copies = instruction.opcode in ("UTMALDG", "UBLKCP")
        copies_early = copies and re.search(MAY_COPY_EARLY, kernel.name)
        if re.match(GLOBAL, instruction.opcode) and not copies_early:
            yield _at(instruction, "global memory ahead of the wait for the previous kernel")
        elif instruction.opcode == "PREEXIT":
            yield _at(
                instruction, "lets the next kernel start ahead of the wait for the previous one"
            )
        elif instruction.opcode == "EXIT":
            yield _at(instruction, "ends without a wait for the previous kernel")
    for instruction in kernel.code:
        if instruction.opcode == "LDG" and ".CONSTANT" in instruction.name:
            yield _at(instruction, "may miss what the previous kernel has written")


def batches(kernel: Kernel) -> Iterator[list[Instruction]]:
    """16-byte loads of global memory, as they are requested before the first of them is used."""
    batch: list[Instruction] = []
    pending = 0
    for instruction in kernel.code:
        touched, written = instruction.registers
        if touched & pending:
            yield batch
            batch, pending = [], 0
        if instruction.name.startswith("LDG.") and ".128" in instruction.name:
            batch.append(instruction)
            pending |= written
    if batch:
        yield batch


def loads_travel_together(kernel: Kernel) -> Iterator[str]:
    for name, least in IN_FLIGHT.items():
        empty = "_sm90_kernel" in kernel.name and kernel.target != "sm_90a"  # never launched there
        if empty or not re.search(name, kernel.name):
            continue
        found = list(batches(kernel))
        if not found:
            yield "has no 16-byte loads, where the lint expects some"
        for batch in found:
            if len(batch) < least:
                yield _at(
                    batch[0], f"{len(batch)} loads under way before the first use, not {least}"
                )


def keeps_to_registers(kernel: Kernel) -> Iterator[str]:
    for instruction in kernel.code:
        if instruction.opcode in ("STL", "LDL"):
            yield _at(instruction, "local memory")


Group = tuple[int, int]  # bits of the accumulators of a group of products, and of its operands
Flight = tuple[Group, ...]  # what is in flight: groups, oldest first, and the one being issued
MOST_GROUPS = 4


def _joined(a: Flight, b: Flight) -> Flight:
    """What may be in flight where two paths meet, counted from the youngest."""
    length = max(len(a), len(b))
    a, b = (((0, 0),) * (length - len(flight)) + flight for flight in (a, b))
    groups = [(x[0] | y[0], x[1] | y[1]) for x, y in zip(a, b)]
    while len(groups) > MOST_GROUPS:
        first, second, *rest = groups
        groups = [(first[0] | second[0], first[1] | second[1]), *rest]
    return tuple(groups)


def _issue(instruction: Instruction, flight: Flight) -> Flight:
    """What is in flight after an instruction. The last product of a group names the barrier gsb0."""
    if instruction.opcode == "HGMMA":
        touched, written = instruction.registers
        *groups, issued = flight
        groups.append((issued[0] | written, issued[1] | (touched & ~written)))
        return tuple(groups) + (((0, 0),) if "gsb0" in instruction.operands else ())
    if instruction.name.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands[-1], 16)
        return flight[max(len(flight) - 1 - left, 0) :]
    return flight


def leaves_products_alone(kernel: Kernel) -> Iterator[str]:
    if not kernel.has("HGMMA"):
        return
    flights: dict[int, Flight] = {0: ((0, 0),)}  # ahead of an instruction, over all paths to it
    pending = [0]
    while pending:
        i = pending.pop()
        after = _issue(kernel.code[i], flights[i])
        for j in kernel.successors(i):
            flight = _joined(flights.get(j, ((0, 0),)), after)
            if flights.get(j) != flight:
                flights[j] = flight
                pending.append(j)
    for i, flight in sorted(flights.items()):
        touched, written = kernel.code[i].registers
        accumulators = operands = 0
        for group in flight:
            accumulators, operands = accumulators | group[0], operands | group[1]
        if (
            kernel.code[i].opcode == "HGMMA"
        ):  # the hardware orders products into the same accumulators
            touched &= ~written
        if wrong := (touched & accumulators) | (written & operands):
            register = (wrong & -wrong).bit_length() - 1
            yield _at(kernel.code[i], f"R{register} belongs to a product in flight")


RULES: tuple[Callable[[Kernel], Iterator[str]], ...] = (
    waits_first,
    loads_travel_together,
    keeps_to_registers,
    leaves_products_alone,
)


def failures(kernels: list[Kernel]) -> list[str]:
    return [
        f"{kernel.target} {kernel.name}: {message}"
        for kernel in kernels
        for rule in RULES
        for message in rule(kernel)
    ]


def missing(kernels: list[Kernel]) -> list[str]:
    """What the rules are there for and the library does not have: they would hold of nothing."""
    hopper = [kernel for kernel in kernels if kernel.target == "sm_90a"]
    messages = [
        f"no kernel for sm_90a has {opcode}"
        for opcode in ("ACQBULK", "PREEXIT", "HGMMA")
        if not any(kernel.has(opcode) for kernel in hopper)
    ]
    for name in (MAY_COPY_EARLY, *IN_FLIGHT):
        if not any(re.search(name, kernel.name) for kernel in hopper):
            messages.append(f"no kernel for sm_90a is called {name}")
    return messages


def disassemble(library: Path) -> str:
    command = ["cuobjdump", "-sass", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                (member,) = [n for n in wheel.namelist() if re.search(r"/_C[^/]*\.so$", n)]
                path = Path(wheel.extract(member, folder))
        kernels = parse(disassemble(path))
    messages = missing(kernels) + failures(kernels)
    if messages:
        names = subprocess.run(
            ["c++filt", "-p"], input="\n".join(messages), capture_output=True, text=True
        )
        raise SystemExit(names.stdout)
    print(f"{len(kernels)} kernels keep the rules")


if __name__ == "__main__":
    main()
