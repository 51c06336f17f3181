"""Whether a call fits into memory, asked before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllama.generation.config import GenerationPlan
from mllama.generation.fields import MAX_ROWS
from mllama.memory import require_room

# Of a token in the lists of Python that the host keeps of prompts and answers.
_HOST_BYTES = 64


def require_rows(input_ids: Any, inputs: Mapping[str, Any], copies: int) -> None:
    """Check the rows of a call and their prompts, each of which is there ``copies`` times.

    Raises: ValueError with the numbers for too many, or more than there is memory for.
    """
    text = inputs.get("inputs_embeds") if input_ids is None else input_ids
    if not isinstance(text, Tensor) or text.dim() < 2:
        return  # refused by name elsewhere
    rows, columns = len(text) * copies, text.shape[1]
    if rows > MAX_ROWS:
        times = f" ({len(text)} times num_return_sequences={copies})" if copies > 1 else ""
        raise ValueError(f"a call takes at most {MAX_ROWS} rows, got {rows}{times}")
    what = f"the text of {rows} rows of {columns} tokens"
    require_room(torch.device("cpu"), _HOST_BYTES * rows * columns, what)
    if copies > 1:
        given = [x for x in (input_ids, *inputs.values()) if isinstance(x, Tensor)]
        repeated = copies * sum(x.numel() * x.itemsize for x in given)
        require_room(text.device, repeated, f"the prompts {copies} times (num_return_sequences)")


def require_outputs(
    plan: GenerationPlan, model: Any, prompts: tuple[int, int], vocab_size: int
) -> None:
    """Check what is kept of every step, if all tokens of the plan are made.

    Args:
        prompts: rows and columns.
    Raises: ValueError with the numbers for more than there is memory for.
    """
    rows, columns = prompts
    logits_bytes = 4 * vocab_size * len(plan.returns & {"scores", "logits"})
    config = model.config.get_text_config()
    states = (config.num_hidden_layers + 1) * config.hidden_size * model.dtype.itemsize
    states_bytes = states if "hidden_states" in plan.returns else 0
    nbytes = rows * (plan.max_new_tokens * (logits_bytes + states_bytes) + columns * states_bytes)
    if nbytes:
        names = ", ".join(f"output_{name}" for name in sorted(plan.returns))
        what = f"{names} of {rows} rows and {plan.max_new_tokens} new tokens"
        require_room(model.device, nbytes, what)
