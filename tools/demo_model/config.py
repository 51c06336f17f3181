"""The demo model's configuration files: Llama 3.2 Vision's architecture, with every dimension small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mllama.demo.shapes import IMAGE_SIZE, LAYOUTS
from tools.demo_model.tokenizer import BOS, EOM, EOS, EOT, PAD, vocab_size

WIDTH = 128  # of the shipped model
_HEAD = 64  # a head dimension the CUDA kernels have
_VISION_TAPS = [1, 2]


def model_config(tokenizer: Tokenizer, width: int = WIDTH) -> dict[str, Any]:
    """config.json. It names no transformers version: the vision taps are Meta's, as the model is trained.

    Args:
        width: of both towers, a multiple of 128; their MLPs are twice as wide.
    """
    bos, eos, pad = (tokenizer.token_to_id(token) for token in (BOS, EOT, PAD))
    size = vocab_size(tokenizer)
    text = {
        "model_type": "mllama_text_model",
        "vocab_size": size,
        "hidden_size": width,
        "hidden_act": "silu",
        "num_hidden_layers": 6,
        "num_attention_heads": width // _HEAD,
        "num_key_value_heads": width // (2 * _HEAD),
        "intermediate_size": 2 * width,
        "cross_attention_layers": [1, 4],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    vision = {
        "model_type": "mllama_vision_model",
        "hidden_size": width,
        "hidden_act": "gelu",
        "attention_heads": width // _HEAD,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "intermediate_size": 2 * width,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "num_channels": 3,
        "norm_eps": 1e-5,
        "max_num_tiles": 4,
        "intermediate_layers_indices": _VISION_TAPS,
        "vision_output_dim": width * (1 + len(_VISION_TAPS)),
        "supported_aspect_ratios": [list(layout) for layout in LAYOUTS],
        "initializer_range": 0.02,
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": size,
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: greedy (answers have one right form), with Llama 3's stop tokens."""
    return {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": [tokenizer.token_to_id(token) for token in (EOS, EOM, EOT)],
        "pad_token_id": tokenizer.token_to_id(PAD),
        "do_sample": False,
    }


def preprocessor_config() -> dict[str, Any]:
    """preprocessor_config.json, as published but for the tile size."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": 4,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def save_configs(tokenizer: Tokenizer, folder: Path, width: int = WIDTH) -> None:
    """Writes config.json, generation_config.json and preprocessor_config.json."""
    for name, content in (
        ("config.json", model_config(tokenizer, width)),
        ("generation_config.json", generation_config(tokenizer)),
        ("preprocessor_config.json", preprocessor_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
