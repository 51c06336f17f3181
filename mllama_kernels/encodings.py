"""The encodings of a quantised weight: what each stores, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of int4's scale and zero, by the number that the ops know them by; 0: there is no such plane.
PLANE_TYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.uint8)


@dataclass(frozen=True)
class Encoding:
    """How the values of a weight (N, K) are stored, as `parts`: tensors that are the same on every device.

    ==================== =========================================================================
    q8_0 q6_k q4_k q4_0  `blocks` uint8 (N, K / block * bytes_per_block), the bytes of ggml
    int8, fp8            `data` int8 or float8_e4m3fn (N, K); `scale` float32 (N,): q * scale
    int4                 `data` uint8 (N, K / 2), the low nibble the even column; `scale` (N, K / group)
                         float32, float16 or bfloat16; `zero` likewise, or uint8: (q - zero) * scale
    nf4, fp4             `data` uint8 (N, K / 2), likewise; `absmax` float32 (N, K / group); `table`
                         float32 (16,): table[q] * absmax
    ==================== =========================================================================
    """

    name: str
    parts: tuple[str, ...]
    block: int  # columns that are encoded together: K is a multiple of it
    bytes_per_block: int  # of `blocks` or `data`
    groups: tuple[int, ...] = (0,)  # columns that share a scale; 0: told by the encoding
    is_made: bool = True  # by `mllama_kernels.quantize`; the others are read only

    def fits(self, columns: int) -> bool:
        """Whether rows of so many columns are whole blocks."""
        return columns > 0 and columns % self.block == 0

    def nbytes(self, rows: int, columns: int) -> int:
        """Of the parts of a weight, of an encoding that `quantize` makes."""
        scales = 4 * rows if "scale" in self.parts else 0
        return rows * (columns // self.block) * self.bytes_per_block + scales


# In the order of the numbers that the ops know them by.
ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding("q8_0", ("blocks",), 32, 34),
        Encoding("q6_k", ("blocks",), 256, 210),
        Encoding("q4_k", ("blocks",), 256, 144),
        Encoding("q4_0", ("blocks",), 32, 18),
        Encoding("int8", ("data", "scale"), 1, 1),
        Encoding("fp8", ("data", "scale"), 1, 1),
        Encoding("int4", ("data", "scale", "zero"), 32, 16, (32, 64, 128), is_made=False),
        Encoding("nf4", ("data", "absmax", "table"), 64, 32, (64,), is_made=False),
        Encoding("fp4", ("data", "absmax", "table"), 64, 32, (64,), is_made=False),
    )
}
# Of whole models, with the encodings of what they hold in blocks of 256.
MIXES = {"q4_k_m": ("q4_k", "q6_k")}
CODES = {name: code for code, name in enumerate(ENCODINGS)}
# Whose codes are integers, so that x may become integers too.
INTEGERS = frozenset(ENCODINGS) - {"fp8", "nf4", "fp4"}
GGML = frozenset(name for name, encoding in ENCODINGS.items() if encoding.parts == ("blocks",))


def encoding_of(name: str) -> Encoding:
    """Raises: ValueError for a name that is no encoding."""
    known_as = name if isinstance(name, str) else ""
    if known_as in MIXES:
        one = " or ".join(MIXES[name])
        raise ValueError(f"{name} is a mix for whole models; one weight is made as {one}")
    found = ENCODINGS.get(known_as)
    if found is None:
        known = ", ".join(ENCODINGS)
        raise ValueError(f"the encodings of a quantised weight are {known}; got {name!r:.60}")
    return found


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of parts one after another, as bytes: in an autocast region torch.cat casts numbers, and fails
    for those of 8 bits."""
    data = torch.cat([part.contiguous().view(torch.uint8) for part in parts])
    return data.view(parts[0].dtype)
