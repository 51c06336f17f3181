"""Which modules of a model get which forward, and why others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mllama_kernels._dispatch import has_ops
from mllama_kernels.transformers.patch import Patch, replaced_by_others
from mllama_kernels.transformers.support import takes_heads
from mllama_kernels.transformers.wrappers import has_own_forward


class PatchPlan:
    """Collects patches; nothing is changed before :meth:`install`.

    Args:
        root: the model, of which modules have their names.
        ops: the switches that are on.
        semantics: "transformers" or "meta".
    """

    def __init__(self, root: nn.Module, ops: frozenset[str], semantics: str) -> None:
        self.ops, self.semantics = ops, semantics
        self._names = {module: name for name, module in root.named_modules()}
        self.patches: list[Patch] = []
        self.left: dict[str, str] = {}

    def name(self, module: nn.Module) -> str:
        return self._names[module] or type(module).__name__

    def add(self, op: str, module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
        if op in self.ops:
            self.patches.append(Patch(module, function, op, **options))

    def add_all(self, op: str, modules: list[nn.Module], function: Callable[..., Any]) -> None:
        """The modules that are free to be replaced; the others are left, one reason for all of them."""
        free = [module for module in modules if self.free(op, module)]
        for module in free:
            self.add(op, module, function)

    def free(self, op: str, *modules: nn.Module) -> bool:
        """Whether an op is asked for and none of the modules it needs has somebody else's forward."""
        return op in self.ops and self.replaceable(op, *modules)

    def replaceable(self, op: str, *modules: nn.Module) -> bool:
        for module in modules:
            if replaced_by_others(module) or not has_own_forward(type(module)):
                self.left.setdefault(op, f"{self.name(module)}: its forward is replaced already")
                return False
        return True

    def takes_heads(self, op: str, head_dim: int, tower: nn.Module) -> bool:
        """Whether there are kernels for a head dimension where the tower is now."""
        device = next((p.device for p in tower.parameters()), torch.device("cpu"))
        if op in self.ops and has_ops(device) and not takes_heads(head_dim, device):
            expected = "a multiple of 8" if device.type == "cpu" else "64, 80 or 128"
            self.left[op] = f"head dimension {head_dim}, the kernels take {expected}"
            return False
        return op in self.ops

    def replaced(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for patch in self.patches:
            for op in patch.ops:
                names.setdefault(op, []).append(self.name(patch.module))
        return names
