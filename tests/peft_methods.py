"""The methods of PEFT, each with a configuration that fits the small models of the tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as _KINDS

LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
# What fits each method, if its configuration has it: linears of every tower, and sizes that divide theirs.
COMMON = {"target_modules": LINEARS, "r": 4, "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
SPECIAL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "C3A": {"block_size": 32},
    "CPT": {
        "cpt_token_ids": [4, 5, 6, 7],
        "cpt_mask": [1] * 4,
        "cpt_tokens_type_mask": [1, 2, 3, 4],
    },
    "FROD": {"target_modules": r".*language_model.*self_attn\.o_proj"},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {
        "target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]
        + ["q_norm", "k_norm", "layernorm_pre", "layernorm_post"]
    },
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "OFT": {"r": 0, "oft_block_size": 32},
    "ROAD": {"group_size": 32},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [*range(3, 40)]},
    "VBLORA": {"vector_length": 32, "num_vectors": 8, "topk": 2},
    "POLY": {"target_modules": r".*language_model.*self_attn\.(q|v)_proj"},
    "RANDLORA": {"randlora_alpha": 8},
    "XLORA": {"adapters": {}},
}
# The same method with another option that changes how a layer is computed.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("LORA", {"use_dora": True}),
    "rsLoRA": ("LORA", {"use_rslora": True}),
    "LoRA on everything": ("LORA", {"target_modules": "all-linear"}),
    "LoRA by a pattern": ("LORA", {"target_modules": r".*_proj"}),
    "LoRA on embeddings": (
        "LORA",
        {"target_modules": ["embed_tokens", "patch_embedding", "tile_embedding", "embedding"]},
    ),
    "LoRA with dropout": ("LORA", {"lora_dropout": 0.5}),
    "LoRA with a bias": ("LORA", {"lora_bias": True}),
    "LoRA and trained biases": ("LORA", {"bias": "all"}),
    "LoRA and trained copies": (
        "LORA",
        {"modules_to_save": ["q_norm", "input_layernorm", "mlp", "layernorm_pre"]},
    ),
    "LoRA and trained tokens": ("LORA", {"trainable_token_indices": [*range(3, 40)]}),
    "LoRA of parameters": ("LORA", {"target_parameters": ["gated_positional_embedding.embedding"]}),
}


def config_of(method: str) -> Any:
    """A configuration of one of METHODS."""
    kind, options = VARIANTS.get(method, (method, {}))
    cls = _KINDS[kind]
    fields = {field.name for field in dataclasses.fields(cls)}
    common = {name: value for name, value in COMMON.items() if name in fields}
    return cls(**(common | SPECIAL.get(kind, {}) | options))


METHODS = [*(kind.value for kind in _KINDS), *VARIANTS]
# They put something before a prompt, which Mllama of `transformers` cannot do, or know Llama only.
PROMPTS = ["ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"]
PROMPTS += ["PROMPT_TUNING", "P_TUNING"]
