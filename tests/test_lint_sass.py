"""The rules for machine code: each holds of code that keeps it and fails of code that breaks it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import lint_sass
import pytest
import sass

WAIT, START, END = "ACQBULK", "PREEXIT", "EXIT"
LOAD = "LDG.E.128 R{0}, desc[UR4][R2.64+{1:#x}]"


def kernel(*code: str, name: str = "some_kernel", target: str = "sm_90a") -> str:
    """As cuobjdump prints it. `code` may have labels ("end:") and jumps to them ("BRA end")."""
    labels = {line[:-1]: 16 * i for i, line in enumerate(code) if line.endswith(":")}
    lines = [f"\tcode for {target}", f"\t\tFunction : {name}"]
    for i, line in enumerate(code):
        line = "NOP" if line.endswith(":") else line
        for label, address in labels.items():
            line = line.replace(f" {label}", f" {address:#x}")
        lines += [f"        /*{16 * i:04x}*/    {line} ;   /* 0x00 */", " " * 40 + "/* 0x00 */"]
    return "\n".join(lines)


def messages(*code: str, **kwargs: str) -> list[str]:
    return lint_sass.failures(sass.parse(kernel(*code, **kwargs)))


def test_instructions_are_read():
    (parsed,) = sass.parse(kernel("@!P0 LDG.E.64 R8, desc[UR4][R2.64+0x10]", "BRA P1, end", "end:"))
    load, branch, _ = parsed.code
    assert (load.guard, load.opcode, load.address) == ("@!P0", "LDG", 0)
    assert load.registers == (0b11_0000_1100, 0b11_0000_0000)
    assert parsed.successors(1) == [2, 2] and branch.target == 0x20


@pytest.mark.parametrize(
    ("line", "touched", "written"),
    [
        ("STS.128 [R1], R24", {1, 24, 25, 26, 27}, set()),
        ("HMMA.16816.F32.BF16 R8, R4, R2, R8", {2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, {8, 9, 10, 11}),
        ("HGMMA.64x16x16.F32 R8, R4, gdesc[UR4], R8, gsb0", set(range(4, 16)), set(range(8, 16))),
        ("HGMMA.64x16x16.F32 R8, gdesc[UR4], RZ, !UPT", set(range(8, 16)), set(range(8, 16))),
        ("SHFL.BFLY PT, R5, R6, 0x1, 0x1f", {5, 6}, {5}),
        ("FADD R3, |R4|, -R5.reuse", {3, 4, 5}, {3}),
        ("IMAD.WIDE R2, R4, 0x2, R6", {2, 3, 4, 6, 7}, {2, 3}),
        ("CS2R R4, SRZ", {4, 5}, {4, 5}),
        ("ISETP.NE.AND P0, PT, R4, UR5, PT", {4}, set()),
        ("DFMA R4, R6, R8, R10", {4, 5, 6, 7, 8, 9, 10, 11}, {4, 5}),
        ("LDSM.16.M88.4 R4, [R2]", {2, 4, 5, 6, 7}, {4, 5, 6, 7}),
    ],
)
def test_registers(line, touched, written):
    (parsed,) = sass.parse(kernel(line))
    bits = parsed.code[0].registers
    assert bits == (sum(1 << n for n in touched), sum(1 << n for n in written))


def test_code_that_waits_holds():
    assert messages(WAIT, START, LOAD.format(4, 0), "STG.E [R2.64], R4", END) == []
    # Shared memory and parameters are the kernel's own; what counts is the order of running, not that
    # of the addresses.
    early = ("LDS R4, [R5]", "LDC R6, c[0x0][0x210]", "BRA wait", "back:", LOAD.format(4, 0), END)
    assert messages(*early, "wait:", WAIT, "BRA back") == []
    # Without overlap there is nothing to wait for.
    assert messages(LOAD.format(4, 0), END) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ((LOAD.format(4, 0), WAIT, END), "0x0000 LDG.E.128: global memory ahead"),
        (("STG.E [R2.64], R4", WAIT, END), "STG.E: global memory ahead"),
        (("LDGSTS.E.128 [R1], [R2.64]", WAIT, END), "LDGSTS"),
        (("RED.E.ADD [R2.64], R4", WAIT, END), "RED"),
        (("UTMALDG.3D [UR8], [UR4]", WAIT, END), "UTMALDG"),
        ((START, WAIT, END), "lets the next kernel start ahead"),
        ((START, END), "lets the next kernel start ahead"),
        # On one path only: by a jump over the wait, or a wait under a condition.
        (("@P0 BRA over", WAIT, "over:", LOAD.format(4, 0), END), "0x0030 LDG"),
        (("@P0 ACQBULK", LOAD.format(4, 0), END), "0x0010 LDG"),
        (("@P0 EXIT", WAIT, END), "0x0000 EXIT: ends without a wait"),
        # Code laid out after the wait that runs ahead of it.
        (
            ("BRA cold", "back:", WAIT, END, "cold:", "LDG.E R4, [R2.64]", "BRA back"),
            "0x0050 LDG.E",
        ),
        ((WAIT, "LDG.E.CONSTANT R4, desc[UR4][R2.64]", END), "may miss what the previous kernel"),
    ],
)
def test_code_that_does_not_wait_fails(code, words):
    found = messages(*code)
    assert any(words in message for message in found), found


def test_only_a_constant_weight_is_copied_early():
    early = ("UTMALDG.3D [UR8], [UR4]", WAIT, END)
    assert messages(*early, name="25skinny_linear_sm90_kernelIfLi9E") == []
    assert len(messages(*early, name="17rms_norm_kernelI")) == 1


NAME = "25skinny_linear_sm90_kernelI6__halfLi1EL"  # four loads at least
LOADS = [LOAD.format(8 + 4 * i, 16 * i) for i in range(4)]
USES = [f"FADD R0, R{8 + 4 * i}, R0" for i in range(4)]


def test_loads_that_travel_together_hold():
    assert messages(*LOADS, *USES, END, name=NAME) == []
    assert messages(*LOADS, *USES, *LOADS, *USES, END, name=NAME) == []
    assert messages(*LOADS, "IMAD R60, R61, R62, R63", *USES, END, name=NAME) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ([line for pair in zip(LOADS, USES) for line in pair], 1),
        ([*LOADS[:3], *USES[:3], LOADS[3], USES[3]], 3),
        ([*LOADS, *USES, LOADS[0], USES[0]], 1),  # one loop keeps the rule, another does not
        ([*LOADS[:2], "PRMT R9, R9, 0x1, R9", *LOADS[2:]], 2),  # a select of half an element
        ([LOADS[0], LOADS[0], *LOADS[1:]], 1),  # into a register that is still awaited
    ],
)
def test_loads_one_after_the_other_fail(code, count):
    found = messages(*code, END, name=NAME)
    assert any(f"{count} loads under way before the first use, not 4" in m for m in found), found


def test_vectors_that_the_compiler_has_split_fail():
    (message,) = messages("LDG.E.64 R8, [R2.64]", END, name=NAME)
    assert "no 16-byte loads" in message
    assert messages(END, name=NAME, target="sm_80") == []


@pytest.mark.parametrize("line", ["STL [R1], R4", "LDL.64 R4, [R1+0x8]", "@P0 STL.128 [R1], R4"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_spills_fail(line, target):
    (message,) = messages(line, END, target=target)
    assert "local memory" in message and message.startswith(target)


def product(accumulator: int, operand: int | None = None, last: bool = True) -> str:
    given = "" if operand is None else f"R{operand}, "
    end = ", gsb0" if last else ""
    return f"HGMMA.64x16x16.F32.BF16 R{accumulator}, {given}gdesc[UR4], R{accumulator}{end}"


FREE = "WARPGROUP.DEPBAR.LE gsb0, 0x{}".format


@pytest.mark.parametrize(
    "code",
    [
        (product(24), FREE(0), "FADD R0, R24, R25"),
        (product(24), "FADD R0, R32, R23", FREE(0), "FADD R0, R24, R25"),
        (product(24, last=False), product(24), FREE(0), "FADD R0, R24, R25"),  # into the same sums
        (product(24), product(40), FREE(1), "FADD R0, R24, R31"),  # the older group has retired
        (product(24, 8), "FADD R0, R8, R11", FREE(0), "MOV R8, R0"),  # reading an operand
        (FREE(0), product(24), "loop:", FREE(0), "FADD R0, R24, R0", product(24), "@P0 BRA loop"),
    ],
)
def test_products_that_are_left_alone_hold(code):
    assert messages(*code, END) == []


@pytest.mark.parametrize(
    ("code", "register"),
    [
        ((product(24), "FADD R0, R24, R25", FREE(0)), 24),
        ((product(24), "MOV R31, R0", FREE(0)), 31),
        ((product(24, last=False), "STS.64 [R1], R30", product(24), FREE(0)), 30),
        ((product(24), product(40), FREE(1), "FADD R0, R47, R0"), 47),
        ((product(24), FREE(1), "FADD R0, R24, R0"), 24),
        ((product(24, 8), "MOV R11, R0", FREE(0)), 11),  # writing an operand
        ((product(24), product(40, 24), FREE(0)), 24),  # sums as the operand of another
        (("@P0 BRA over", product(24), FREE(0), product(24), "over:", "FADD R0, R24, R0"), 24),
        (("loop:", "FADD R0, R24, R0", product(24), "@P0 BRA loop", FREE(0)), 24),  # around a loop
    ],
)
def test_touched_products_fail(code, register):
    (message,) = messages(*code, END)
    assert f"R{register} belongs to a product in flight" in message


def test_jumps_that_cannot_be_followed_are_errors():
    with pytest.raises(ValueError, match="cannot follow BRX"):
        messages(START, "BRX R2 -0x10", END)
    with pytest.raises(ValueError, match="to nowhere"):
        messages(START, "BRA 0x5000", END)


def test_a_library_without_what_the_rules_are_for_fails():
    found = lint_sass.missing(sass.parse(kernel(WAIT, START, END)))
    assert any("has HGMMA" in m for m in found) and any("skinny_linear" in m for m in found)
    assert not any("has ACQBULK" in m for m in found)
    assert any("has ACQBULK" in m for m in lint_sass.missing([]))


def test_a_wheel_is_unpacked_and_its_faults_end_the_program(monkeypatch, tmp_path: Path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/_C.abi3.so", "binary")
        archive.writestr("package/__init__.py", "")
    texts = []

    def fake(library: Path) -> str:
        texts.append(library.read_text())
        return kernel("LDG.E R4, [R2.64]", WAIT, END, name="early_kernel")

    monkeypatch.setattr(lint_sass, "disassemble", fake)
    monkeypatch.setattr(sys, "argv", ["lint_sass.py", str(wheel)])
    with pytest.raises(SystemExit, match=r"early_kernel: 0x0000 LDG\.E: global memory ahead"):
        lint_sass.main()
    assert texts == ["binary"]


def test_the_program_says_what_it_takes():
    run = subprocess.run([sys.executable, lint_sass.__file__], capture_output=True, text=True)
    assert run.returncode != 0 and "WHEEL_OR_LIBRARY" in run.stderr
