"""What `accelerate` did to a model, and the way back."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field

import transformers

from mllama_kernels.transformers.patch import Patch
from mllama_kernels.transformers.wrappers import class_of


@dataclass
class Report:
    """What was replaced in a model, what was left, and why. Printing it gives the table.

    Attributes:
        model: class of the model.
        semantics: "transformers" or "meta".
        replaced: per op the names of the modules that now run on it.
        left: what could have been replaced and was not, and why.
        fallbacks: per op, calls that the module's own forward serves as before.
        version: of `transformers`.
    """

    model: str
    semantics: str
    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    version: str = transformers.__version__
    patches: list[Patch] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Give every module its own forward back; the model then computes the bits it computed before."""
        for patch in self.patches:
            patch.remove()
        self.patches.clear()

    def __str__(self) -> str:
        meant = {"transformers": "as transformers computes", "meta": "as Meta's code computes"}
        lines = [f"{self.model}, transformers {self.version}, {meant[self.semantics]}", "replaced"]
        classes: dict[str, Counter[str]] = {}
        for patch in self.patches:
            for op in patch.ops:
                classes.setdefault(op, Counter())[class_of(patch.module).__name__] += 1
        for op, names in self.replaced.items():
            counts = classes.get(op, Counter({"module": len(names)}))
            lines.append(f"  {op:18}" + ", ".join(f"{n} {name}" for name, n in counts.items()))
        if not self.replaced:
            lines.append("  nothing")
        if self.left:
            lines.append("left")
            lines += [f"  {what:18}{why}" for what, why in self.left.items()]
        if self.fallbacks:
            lines.append("the module's own forward serves")
            for op, calls in self.fallbacks.items():
                lines += textwrap.wrap(
                    calls, 100, initial_indent=f"  {op:18}", subsequent_indent=" " * 20
                )
        return "\n".join(lines)
