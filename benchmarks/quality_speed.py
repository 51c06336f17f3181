"""How fast each encoding decodes and reads a prompt beside bfloat16: for the table of quality."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.case import OURS
from benchmarks.model import Contestant, inputs_of, measure
from benchmarks.quantized_model import PLAIN, TEXT, TEXT_SCENARIO, Row, build, text_of
from benchmarks.scenario import PAD, SMALL_VOCABULARY

DTYPE = torch.bfloat16


@torch.no_grad()
def compared(encodings: Iterable[str], seed: int, device: torch.device) -> dict[str, Any]:
    """Four text layers of the 11B's width in every encoding, in turn with the same weights decoded.

    The vocabulary is small, so that lm_head has about the share of a step that it has in the whole model.
    """
    rows: dict[str, Any] = {}
    for encoding in encodings:
        torch.manual_seed(seed)
        row = Row(encoding, TEXT, TEXT_SCENARIO)
        quantised, plain = build(row, DTYPE, device, SMALL_VOCABULARY)
        inputs = text_of(inputs_of(row.scenario, DTYPE, device, SMALL_VOCABULARY))
        options = {"eos_token_id": None, "pad_token_id": min(PAD, SMALL_VOCABULARY - 1)}
        found = [Contestant(OURS, quantised, options), Contestant(PLAIN, plain, options)]
        measured = measure(found, PLAIN, inputs, row.scenario, row.sizes, Budget(math.inf))
        ours, peer = measured["impls"]
        if ours["status"] != "timed":
            raise RuntimeError(f"{encoding}: {ours['status']}: {ours['reason']}")
        rows[encoding] = {
            "token_ms": ours["token_ms"],
            "prompt_ms": ours["first_token_ms"],
            "token_ms_bfloat16": peer["token_ms"],
            "prompt_ms_bfloat16": peer["first_token_ms"],
            "faster_token": peer["ours_is_faster_token"],
            "faster_prompt": peer["ours_is_faster_first_token"],
        }
        faster = rows[encoding]["faster_token"]["median"]
        print(f"  {encoding:9} decodes {faster:.2f} times as fast", flush=True)
    return {
        "layers": TEXT.text,
        "width": row.config(SMALL_VOCABULARY).text_config.hidden_size,
        "prompt": TEXT_SCENARIO.prompt,
        "new": TEXT_SCENARIO.new,
        "encodings": rows,
    }
