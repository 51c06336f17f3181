"""Machine code of CUDA kernels as `cuobjdump -sass` prints it: instructions, the order in which they
may run, and the registers they touch. Of sm_80 to sm_90a; what cannot be followed is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"\b0x([0-9a-f]+)$")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@P0", "@!UP1" or ""
    name: str  # "LDG.E.128"
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        match = _TARGET.search(self.operands[-1]) if self.operands else None
        return int(match[1], 16) if match else None

    @cached_property
    def registers(self) -> tuple[int, int]:
        """Bits of the registers that it reads or writes, and of those it writes."""
        touched = written = 0
        for place, operand in enumerate(self.operands):
            addresses = "".join(re.findall(r"\[[^]]*\]", operand))
            for number, wide in re.findall(r"\bR(\d+)(\.64)?", addresses):
                touched |= _bits(int(number), 2 if wide else 1)
            if addresses or not (match := re.match(r"[-~|!]*R(\d+)", operand)):
                continue
            bits = _bits(int(match[1]), self._width(place))
            touched |= bits
            if place == self._destination:
                written |= bits
        return touched, written

    @cached_property
    def _destination(self) -> int:
        """The operand that is written, -1 for none."""
        if re.match(r"ST|RED|BRA|BRX|RET|CALL|BAR|SYNCS|WARPSYNC|UTMA|UBLK|NANOSLEEP", self.opcode):
            return -1
        # Some have a predicate as their first result.
        return 1 if self.opcode in ("SHFL", "MATCH", "ATOM", "ATOMG", "ATOMS", "VOTE") else 0

    def _width(self, place: int) -> int:
        """Registers of an operand outside brackets; at least as many as there are."""
        name = self.name
        if self.opcode == "HGMMA":
            columns = int(re.match(r"HGMMA(?:\.SP)?\.\d+x(\d+)x", name)[1])
            return columns // 2 if place in (0, len(self.operands) - 1) or place == 2 else 4
        if self.opcode in ("HMMA", "IMMA"):
            return 2 if place == 2 else 4
        if self.opcode in ("LDSM", "STSM"):
            return int(re.search(r"\.([124])\b", name)[1]) if re.search(r"\.[124]\b", name) else 1
        if re.match(r"(LD|ST|ATOM|RED)", self.opcode):
            return 4 if ".128" in name else 2 if ".64" in name else 1
        if self.opcode == "CS2R":
            return 1 if name.endswith(".32") else 2
        if name.startswith("IMAD.WIDE"):
            return 2 if place in (0, 3) else 1
        if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)", self.opcode) or re.search(r"\.[FSU]64\b", name):
            return 2
        return 1


def _bits(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


class Kernel:
    def __init__(self, name: str, target: str, code: list[Instruction]) -> None:
        self.name, self.target, self.code = name, target, code
        self._at = {instruction.address: i for i, instruction in enumerate(code)}
        # Where threads that met at a BSYNC continue: as a BSSY of the same barrier says, which is right
        # after the BSYNC unless that has been moved away.
        self._ends: dict[str, set[int]] = {}
        for instruction in code:
            if instruction.opcode == "BSSY":
                self._ends.setdefault(instruction.operands[0], set()).add(self._target(instruction))

    def has(self, opcode: str) -> bool:
        return any(instruction.opcode == opcode for instruction in self.code)

    def _target(self, instruction: Instruction) -> int:
        if instruction.target not in self._at:
            raise ValueError(
                f"{self.name}: {instruction.address:#x}: {instruction.name} to nowhere"
            )
        return self._at[instruction.target]

    def successors(self, i: int) -> list[int]:
        """Which instructions may follow. A call is taken for both its target and its return."""
        instruction = self.code[i]
        following = [i + 1] if i + 1 < len(self.code) else []
        if instruction.opcode in ("EXIT", "RET"):
            return following if instruction.guard else []
        if instruction.opcode == "BRA":
            always = not instruction.guard and len(instruction.operands) == 1
            return [self._target(instruction)] + (
                [] if always and ".U" not in instruction.name else following
            )
        if instruction.name.startswith("CALL.REL"):
            return [self._target(instruction), *following]
        if instruction.opcode in ("BRX", "BRXU", "JMP", "JMX", "CALL"):
            raise ValueError(
                f"{self.name}: {instruction.address:#x}: cannot follow {instruction.name}"
            )
        if instruction.opcode == "BSYNC":
            ends = self._ends.get(instruction.operands[0], set())
            return following if i + 1 in ends else sorted({*following, *ends})
        return following

    def reachable(self, stop: str) -> Iterator[Instruction]:
        """What a thread may run before an unconditional `stop`, each instruction once."""
        seen, pending = {0}, [0]
        while pending:
            i = pending.pop()
            instruction = self.code[i]
            if instruction.opcode == stop and not instruction.guard:
                continue
            yield instruction
            for j in self.successors(i):
                if j not in seen:
                    seen.add(j)
                    pending.append(j)


def parse(text: str) -> list[Kernel]:
    kernels: list[tuple[str, str, list[Instruction]]] = []
    target = ""
    for line in text.splitlines():
        if match := re.match(r"\s*code for (\S+)", line):
            target = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernels.append((match[1], target, []))
        elif kernels and (match := _LINE.match(line)):
            operands = tuple(part.strip() for part in match[4].split(",")) if match[4] else ()
            kernels[-1][2].append(
                Instruction(int(match[1], 16), match[2] or "", match[3], operands)
            )
    return [Kernel(*parts) for parts in kernels]
