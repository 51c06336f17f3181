"""Arguments of `transformers`' from_pretrained and save_pretrained that mean nothing or cannot be met."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllama.wording import quoted

logger = logging.getLogger("mllama")

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
    "gguf_file": ((None,), "give the path of the file in place of the folder's"),
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


# Fields of a `BitsAndBytesConfig`: what each must be, or None where any value is honoured or without meaning
# for weights that are quantised by the encodings of this package, and why another value is refused.
_BITS_FIELDS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "quant_method": (("bitsandbytes",), "only BitsAndBytesConfig is understood"),
    "load_in_4bit": ((True, False), "it is a flag"),
    "load_in_8bit": ((True, False), "it is a flag"),
    "bnb_4bit_quant_type": (None, ""),
    "bnb_4bit_use_double_quant": (None, ""),
    "bnb_4bit_compute_dtype": (None, ""),
    "bnb_4bit_quant_storage": (("uint8",), "weights are kept as bytes"),
    "llm_int8_threshold": (
        (6.0, 0.0),
        "no activation is quantised, so there are no outliers to keep",
    ),
    "llm_int8_enable_fp32_cpu_offload": ((False,), "a model lies on one device as a whole"),
    "llm_int8_has_fp16_weight": ((False,), "weights are kept quantised"),
    "llm_int8_skip_modules": (None, ""),
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


@dataclass(frozen=True)
class Wanted:
    """The quantisation that a call asks for.

    Attributes:
        encoding: what plain weights are brought to, or None.
        also: encodings that do as well for what is stored quantised already.
        skipped: modules that stay plain, by their names or the beginnings or ends of those.
    """

    encoding: str | None = None
    also: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()


# The arguments of `transformers` that ask for quantised weights.
QUANTIZING = ("quantization_config", "load_in_4bit", "load_in_8bit")
_FOUR_BITS = frozenset(("q4_k", "q4_k_m", "q4_0", "int4", "nf4", "fp4"))
_EIGHT_BITS = frozenset(("int8", "fp8", "q8_0"))


def quantization_of_call(arguments: dict[str, Any], quantization: str | None) -> Wanted:
    """What a call asks for, by our argument or by those of `transformers`, which are taken out of the others.

    ``load_in_4bit`` means "q4_k", ``load_in_8bit`` "int8", a `BitsAndBytesConfig` (or its entries) whichever
    of the two it has; a line is logged that says so.

    Raises: ValueError for several that differ, and for fields of the configuration that cannot be honoured.
    """
    given, four, eight = (arguments.pop(name, None) for name in QUANTIZING)
    flags = {"load_in_4bit": four, "load_in_8bit": eight}
    entries = _entries_of(given)
    for name, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise ValueError(f"from_pretrained() cannot honour {name}={quoted(flag)}: it is a flag")
        entries[name] = bool(entries.get(name)) or bool(flag)
    asked = [
        encoding
        for name, encoding in (("load_in_4bit", "q4_k"), ("load_in_8bit", "int8"))
        if entries.get(name)
    ]
    if len(asked) == 2:
        raise ValueError("from_pretrained() cannot honour load_in_4bit and load_in_8bit together")
    if given is not None and not asked:
        raise ValueError(
            "from_pretrained() cannot honour a quantization_config without load_in_4bit or load_in_8bit"
        )
    if not asked:
        return Wanted(quantization)
    encoding = asked[0]
    flag = "load_in_4bit" if encoding == "q4_k" else "load_in_8bit"
    if quantization not in (None, encoding):
        raise ValueError(
            f"from_pretrained() cannot honour quantization={quoted(quantization)} together with {flag}, "
            f"which means {encoding!r}"
        )
    logger.warning(
        "%s means quantization=%r for plain weights%s",
        flag,
        encoding,
        "; products are computed in the model's dtype" if given is not None else "",
    )
    also = _FOUR_BITS if encoding == "q4_k" else _EIGHT_BITS
    return Wanted(encoding, also, tuple(entries.get("llm_int8_skip_modules") or ()))


def _entries_of(config: Any) -> dict[str, Any]:
    """The fields of a `BitsAndBytesConfig`, checked."""
    if config is None:
        return {}
    entries = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(
            f"from_pretrained() cannot honour quantization_config={type(config).__name__}: only a "
            "BitsAndBytesConfig is understood; quantization= names an encoding"
        )
    refused = []
    for name, value in entries.items():
        if name.startswith("_"):
            continue
        allowed, why = _BITS_FIELDS.get(name, ((None,), "it is unknown"))
        value = str(getattr(value, "value", value)) if name == "quant_method" else value
        value = str(value).removeprefix("torch.") if name == "bnb_4bit_quant_storage" else value
        if allowed is not None and value is not None and value not in allowed:
            refused.append(f"quantization_config.{name}={quoted(value)}: {why}")
    if refused:
        raise ValueError("from_pretrained() cannot honour " + "; ".join(refused))
    return dict(entries)


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
