"""The state of a run between two steps, in one file that is replaced in one moment."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllama.checkpoints.durable import replace_file
from mllama.checkpoints.torch_files import load
from mllama.wording import reason, shown

_ENTRIES = {"step", "parameters", "optimizer", "rng", "cuda_rng"}
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW, by parameter
# How torch's state of random numbers begins: seed, words that are left, whether seeded, the following word.
_TWISTER, _TWISTER_WORDS = struct.Struct("=QiiQ"), 624


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

    Returns: how many steps it has taken.
    Raises: ValueError when it is damaged, of another model, or holds more than tensors and plain containers.
    """
    state = load(path)
    where = shown(str(path))
    if not isinstance(state, dict) or state.keys() != _ENTRIES or type(state["step"]) is not int:
        raise ValueError(f"{where} is no state of a run")
    if state["step"] < 0 or not _is_rng(state["rng"]):
        raise ValueError(f"{where} is damaged: it has a step or random numbers that no run has")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if _outlines(state["parameters"]) != _outlines(trained):
        raise ValueError(f"{where} is the state of another model; its parameters differ")
    if not all(tensor.isfinite().all() for tensor in state["parameters"].values()):
        raise ValueError(f"{where} is damaged: it has parameters that are not finite")
    before, order = _hyperparameters(optimizer), _order(optimizer.state_dict())
    try:
        if _order(state["optimizer"]) != order:
            raise ValueError("its optimizer has its parameters in another order")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    except Exception as error:  # whatever a state of another kind makes the optimizer do
        raise ValueError(f"{where} cannot be resumed from: {reason(error)}") from None
    if _hyperparameters(optimizer) != before:  # `asked` is the same, so these are
        raise ValueError(f"{where} is the state of another run; its optimizer's options differ")
    _check_moments(where, optimizer)
    return state["step"]


def _outlines(tensors: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Shapes and dtypes by name; None for what is no dictionary of tensors."""
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        return None
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _is_rng(state: Any) -> bool:
    """Whether this is a state of torch's Mersenne twister whose place lies within its words.

    Torch checks the two numbers that make the place one by one, and reads past the words where their sum is
    too large.
    """
    size = len(torch.get_rng_state())
    if not torch.is_tensor(state) or state.dtype != torch.uint8 or tuple(state.shape) != (size,):
        return False
    _, left, _, following = _TWISTER.unpack_from(state.numpy().tobytes())
    return left > 0 and left + following <= _TWISTER_WORDS + 1


def _order(optimizer: dict[str, Any]) -> list[Any]:
    """The places of the parameters in the groups of an optimizer's state."""
    return [group["params"] for group in optimizer["param_groups"]]


def _hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group of parameters what never changes; the rate is set anew at every step."""
    left_out = ("params", "lr")
    return [{k: v for k, v in g.items() if k not in left_out} for g in optimizer.param_groups]


def _check_moments(where: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises: ValueError where an average of gradients is none of its parameter's."""
    for parameter, averages in optimizer.state.items():
        if not averages:  # it had no gradient yet
            continue
        if averages.keys() != _MOMENTS or not all(map(torch.is_tensor, averages.values())):
            raise ValueError(f"{where} is the state of another optimizer")
        shapes = {tuple(averages[name].shape) for name in _MOMENTS - {"step"}}
        if shapes != {tuple(parameter.shape)} or averages["step"].dim():
            raise ValueError(f"{where} is the state of another model; its optimizer's differs")
        finite = all(tensor.isfinite().all() for tensor in averages.values())
        if not finite or averages["step"] < 0 or (averages["exp_avg_sq"] < 0).any():
            raise ValueError(f"{where} is damaged: it has averages of gradients that cannot be")
