"""Quantised weights as others store them in safetensors, one module per format."""

from __future__ import annotations

from mllama.checkpoints.published import (
    bitsandbytes_eight_bit,
    bitsandbytes_four_bit,
    compressed_tensors,
    compressed_tensors_packed,
    gptq,
    refused,
)
from mllama.checkpoints.stored_weights import Finder

# Each looks for its own; what two of them find is an error.
FINDERS: tuple[Finder, ...] = (
    bitsandbytes_four_bit.find_four_bit,
    bitsandbytes_eight_bit.find_eight_bit,
    compressed_tensors.find_eight_bit,
    compressed_tensors_packed.find_packed,
    gptq.find_gptq,
    refused.find_refused,
)
