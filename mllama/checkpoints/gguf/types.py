"""The element types of ggml: how many bytes they take, and what becomes of them here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mllama.checkpoints.gguf import decoders


@dataclass(frozen=True)
class GgmlType:
    """A type of ggml.

    Attributes:
        block: how many elements stand together; a row must be whole blocks.
        nbytes: of a block.
        dtype: of plain floating-point numbers.
        encoding: of blocks that are kept as they are, by the name that `mllama_kernels` has for them.
        decode: of blocks that have no kernel: (n, nbytes) uint8 to (n, block) float32.
    None of the three: a type that is known and not read.
    """

    name: str
    block: int
    nbytes: int
    dtype: torch.dtype | None = None
    encoding: str | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def is_read(self) -> bool:
        return (self.dtype, self.encoding, self.decode) != (None, None, None)


# By the numbers that files have for them. Missing are those that ggml no longer has, and Q8_1 and Q8_K, which
# are of activations.
TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4, torch.float32),
    1: GgmlType("F16", 1, 2, torch.float16),
    2: GgmlType("Q4_0", 32, 18, encoding="q4_0"),
    3: GgmlType("Q4_1", 32, 20, decode=decoders.q4_1),
    6: GgmlType("Q5_0", 32, 22, decode=decoders.q5_0),
    7: GgmlType("Q5_1", 32, 24, decode=decoders.q5_1),
    8: GgmlType("Q8_0", 32, 34, encoding="q8_0"),
    10: GgmlType("Q2_K", 256, 84, decode=decoders.q2_k),
    11: GgmlType("Q3_K", 256, 110, decode=decoders.q3_k),
    12: GgmlType("Q4_K", 256, 144, encoding="q4_k"),
    13: GgmlType("Q5_K", 256, 176, decode=decoders.q5_k),
    14: GgmlType("Q6_K", 256, 210, encoding="q6_k"),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18, decode=decoders.iq4_nl),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136, decode=decoders.iq4_xs),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8, torch.float64),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2, torch.bfloat16),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}
READ = ", ".join(kind.name for kind in TYPES.values() if kind.is_read)
