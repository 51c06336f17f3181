"""The kernels inside models of the `transformers` library.

Importing this makes ``attn_implementation="mllama_kernels"`` known; :func:`accelerate` does more.
"""

from mllama_kernels.transformers.accelerate import accelerate, accelerated
from mllama_kernels.transformers.attention_interface import register
from mllama_kernels.transformers.report import Report

register()

__all__ = ["Report", "accelerate", "accelerated"]
