"""Arguments of `transformers`' from_pretrained and save_pretrained that mean nothing or cannot be met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllama.wording import quoted

# Accepted at any value. They choose how `transformers` loads or computes: here files are always mapped and
# copied one tensor at a time, the ops compute attention, and nothing that a checkpoint names is executed.
_WITHOUT_MEANING = frozenset(
    (
        "low_cpu_mem_usage",
        "attn_implementation",
        "trust_remote_code",
        "code_revision",
        "offload_folder",
        "offload_buffers",
        "offload_state_dict",
        "resume_download",
        "disable_mmap",
        "tqdm_class",
        "use_kernels",
        "allow_all_kernels",
        "kernel_config",
        "use_flash_attention_2",
        "mirror",
        "_fast_init",
        "_from_auto",
        "_from_pipeline",
        "_commit_hash",
    )
)
_QUANTISED = "quantised weights are not supported; `transformers`' own model can be loaded with it"
_SHARDED = (
    "a model lies on one device as a whole; to spread one, load `transformers`' own model and call "
    "mllama_kernels.transformers.accelerate() on it, or wrap the loaded one in FSDP"
)
_PICKLES = "pickle files are never loaded, for they can run any code: convert them to safetensors"
# What cannot be met: the values that ask for nothing, and what to do instead of the others.
_UNMET: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": ((None, True), _PICKLES),
    "weights_only": ((None, True), _PICKLES),
    "from_tf": ((None, False), _PICKLES),
    "from_flax": ((None, False), _PICKLES),
    "variant": (
        (None,),
        "only model.safetensors and its shards are read: rename the files of the variant",
    ),
    "gguf_file": ((None,), "only safetensors and Meta's original/ layout are read"),
    "quantization_config": ((None,), _QUANTISED),
    "load_in_4bit": ((None, False), _QUANTISED),
    "load_in_8bit": ((None, False), _QUANTISED),
    "max_memory": ((None,), _SHARDED),
    "tp_plan": ((None,), _SHARDED),
    "tp_size": ((None,), _SHARDED),
    "device_mesh": ((None,), _SHARDED),
    "distributed_config": ((None,), _SHARDED),
    "state_dict": ((None,), "make the model from its configuration and call load_state_dict()"),
    "ignore_mismatched_sizes": (
        (None, False),
        "every tensor must fit; resize_token_embeddings() changes the vocabulary of a loaded model",
    ),
    "output_loading_info": (
        (None, False),
        "a tensor that is missing, unexpected or of another shape is an error, so a model that loads has "
        "nothing to report",
    ),
    "key_mapping": ((None, {}), "tensors have their published names or those of a state_dict()"),
    "fusion_config": ((None, {}), "projections are fused as they are"),
    "experts_implementation": ((None,), "the model has no experts"),
    "adapter_kwargs": ((None, {}), "load an adapter with peft.PeftModel.from_pretrained()"),
    "adapter_name": ((None, "default"), "load an adapter with peft.PeftModel.from_pretrained()"),
    "proxies": ((None, {}), "huggingface_hub reads HTTPS_PROXY from the environment"),
    "use_auth_token": ((None,), "it is called token"),
}


# The same for `save_pretrained`.
_WITHOUT_MEANING_IN_SAVING = frozenset(("token", "save_function", "save_peft_format"))
_UNMET_BY_SAVING: dict[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": ((None, True), "weights are only written as safetensors"),
    "push_to_hub": ((None, False), "save into a folder and upload it with huggingface_hub"),
    "variant": ((None,), "the weights are written as model.safetensors and its shards"),
    "save_original_format": ((None, True), "tensors are written under their published names"),
    "distributed_checkpoint": ((None, False), "give the gathered state_dict"),
}


def check_other_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what `from_pretrained` has been given beyond its own arguments, or let it pass.

    Raises: ValueError for what cannot be met, saying what to do instead; TypeError naming what
        `transformers` does not know either.
    """
    _check("from_pretrained", arguments, _WITHOUT_MEANING, _UNMET)


def check_save_arguments(arguments: Mapping[str, Any]) -> None:
    """The same for `save_pretrained`."""
    _check("save_pretrained", arguments, _WITHOUT_MEANING_IN_SAVING, _UNMET_BY_SAVING)


def _check(
    call: str,
    arguments: Mapping[str, Any],
    without_meaning: frozenset[str],
    unmet: Mapping[str, tuple[tuple[Any, ...], str]],
) -> None:
    unknown = sorted(arguments.keys() - without_meaning - unmet.keys())
    if unknown:
        raise TypeError(f"{call}() got unknown arguments {unknown}")
    refused = []
    for name, value in arguments.items():
        neutral, instead = unmet.get(name, ((value,), ""))
        if not any(value is one or (type(value) is type(one) and value == one) for one in neutral):
            refused.append(f"{name}={quoted(value)}: {instead}")
    if refused:
        raise ValueError(f"{call}() cannot honour " + "; ".join(refused))
