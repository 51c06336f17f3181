"""Vision gates, which GGUF files hold as tanh(gate), and those of the position tables as 1 - tanh(gate) too.

The published model stores the gate itself, in bfloat16. Its tanh in float32, undone in float64, determines it
up to 9: from there on float32 has no digits left, and any gate gives 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mllama.wording import listed

# Its tanh is 1 in float32, as every larger gate's is, and every dtype of a model has it exactly.
_SATURATED = 9.5
# What float32 and the tanh of a converter may be wrong by: a gate of bfloat16 that is as near is the gate.
_NOISE = 2.0**-22


def gate_of(stored: Tensor) -> Tensor:
    """float64 gates of their tanh: those of bfloat16 exactly. Raises: ValueError for what no tanh can be."""
    values = stored.double()
    if not bool((values.abs() <= 1).all()):
        raise ValueError("it is no tanh of a gate: it is beyond 1, or not a number")
    gates = torch.where(values.abs() < 1, values.atanh(), values * _SATURATED)
    short = gates.bfloat16().double()
    return torch.where((short.tanh() - values).abs() <= _NOISE, short, gates)


def position_problem(rest: Tensor, gate: Tensor) -> str | None:
    """Why the gates of the two position tables, 1 - tanh(gate) and tanh(gate), are not of one gate."""
    total = float(rest.double().sum() + gate.double().sum())
    if rest.numel() == gate.numel() == 1 and abs(total - 1) <= 1e-3:  # float16 has 3 digits
        return None
    return (
        "the gates of the two position tables must be 1 - tanh(gate) and tanh(gate), which make 1, not "
        f"{total:g}"
    )


def raw_problem(gates: Mapping[str, Tensor]) -> str | None:
    """Why the gates of the global layers are what Ollama 0.7.0 wrote: the gates themselves.

    Args:
        gates: by stored name. What shows it is a value beyond 1, or that all of them are numbers of
            bfloat16, as the published gates are and their tanh is not (but below 4e-4, where both are equal).
    """
    values = torch.cat([gate.flatten() for gate in gates.values()]) if gates else torch.zeros(0)
    beyond = [name for name, gate in gates.items() if bool((gate.abs() > 1).any())]
    is_short = values.dtype == torch.float32 and torch.equal(values.bfloat16().float(), values)
    differs = not torch.equal(values.double().tanh().float(), values)
    if not beyond and not (is_short and differs):
        return None
    which = f" ({listed(beyond, 3)} beyond 1)" if beyond else ""
    return (
        f"its gates of global layers are stored without tanh{which}, as Ollama 0.7.0's converter did, which "
        "left other rows in another order too: convert the model again with a later one, or load the folder "
        "it was made from"
    )
