"""A small random checkpoint whose text rows are whole blocks of 256, with the demo model's processor."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch

from mllama import MllamaConfig, MllamaForConditionalGeneration
from mllama.demo import checkpoint_path

_LEFT_OUT = ("model.safetensors", "config.json")


def write_wide_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes it into a folder that may be missing, and returns that."""
    entries = copy.deepcopy(json.loads((checkpoint_path() / "config.json").read_text()))
    entries["text_config"] |= {"hidden_size": 256, "intermediate_size": 512}
    entries["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(entries))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rpartition(".")[2] or name.endswith("gate"):
                parameter.fill_(0.5)  # closed ones would hide the cross-attention
            elif parameter.dim() > 1:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder)
    for path in checkpoint_path().iterdir():
        if path.name not in _LEFT_OUT:
            shutil.copy(path, folder / path.name)
    return folder
