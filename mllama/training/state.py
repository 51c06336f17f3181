"""The state of a run between two steps, in one file that is replaced in one moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllama.checkpoints.durable import replace_file


def save_state(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write everything that the steps after the first ``step`` depend on."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state = {
        "step": step,
        "parameters": trained,
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    replace_file(path, lambda new: torch.save(state, new))


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state in the place of the present one.

    Returns: how many steps it has behind it.
    Raises: ValueError when it is of another model.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    saved = {name: tuple(tensor.shape) for name, tensor in state["parameters"].items()}
    if saved != {name: tuple(p.shape) for name, p in trained.items()}:
        raise ValueError(f"{path} is the state of another model; its parameters differ")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"]
