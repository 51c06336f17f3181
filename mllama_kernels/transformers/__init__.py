"""The kernels inside models of the `transformers` library."""

from mllama_kernels.transformers.accelerate import accelerate, accelerated
from mllama_kernels.transformers.report import Report

__all__ = ["Report", "accelerate", "accelerated"]
