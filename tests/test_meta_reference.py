"""A synthetic `original/` folder in Meta's own code and in ours: the same logits.

Needs Meta's package and its tensor-parallel layers: pip install --no-deps llama-models fairscale.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from meta_writer import write_original
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

import mllama

pytestmark = pytest.mark.full
pytest.importorskip("fairscale", reason="Meta's package needs fairscale")
pytest.importorskip("llama_models", reason="Meta's package (llama-models) is not installed")

LENGTH, IMAGE_AT, WIDTH = 14, 4, 128
CONFIG = {
    "image_token_index": 512,
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "cross_attention_layers": [3, 8],
        "pad_token_id": 260,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "image_size": 28,
        "vision_output_dim": 6 * WIDTH,
    },
}


@pytest.fixture(scope="module")
def meta_code():
    """Meta's model module, with a process group of one. Its image transforms are not used here."""
    stubs = {}
    if "torchvision" not in sys.modules:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            stubs[name] = types.ModuleType(name)
        stubs["torchvision"].transforms = stubs["torchvision.transforms"]
        stubs["torchvision.transforms"].functional = stubs["torchvision.transforms.functional"]
    sys.modules.update(stubs)
    import fairscale.nn.model_parallel.initialize as parallel
    import torch.distributed as dist
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.multimodal import model as code

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    code.VariableSizeImageTransform = lambda size: lambda image: image
    yield code, ModelArgs
    parallel.destroy_model_parallel()
    dist.destroy_process_group()
    for name in stubs:
        del sys.modules[name]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    generator = torch.Generator().manual_seed(1)
    config = MllamaConfig(**CONFIG)
    with torch.device("meta"):
        names = MllamaForConditionalGeneration(config).state_dict()
    weights: dict[str, Tensor] = {}
    for name, tensor in names.items():
        value = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            value *= 0.15
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value *= 0.5
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        weights[name.replace("lm_head", "language_model.lm_head")] = value
    write_original(folder, weights, config.to_dict())
    return folder


def _inputs(side: int) -> dict[str, Tensor]:
    """Text before an image of two tiles, and text after it."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, 512, (1, LENGTH), generator=generator)
    ids[0, IMAGE_AT] = 512
    pixels = torch.zeros(1, 1, 4, 3, side, side)
    pixels[:, :, :2] = torch.randn(1, 1, 2, 3, side, side, generator=generator)
    mask = torch.zeros(1, LENGTH, 1, 4, dtype=torch.long)
    mask[:, IMAGE_AT:, :, :2] = 1
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
        "cross_attention_mask": mask,
    }


def _meta_logits(meta_code, folder: Path, params: dict) -> Tensor:
    code, model_args = meta_code
    model = code.CrossAttentionTransformer(model_args(max_batch_size=1, max_seq_len=64, **params))
    # Meta's tower is 1280 wide, whatever params.json says: a narrow one of its own takes the place.
    model.vision_model.vision_encoder = code.VisionEncoder(
        max_num_tiles=4,
        image_size=params["vision_chunk_size"],
        width=WIDTH,
        n_global_layers=8,
        global_model=True,
        return_intermediate=[3, 7, 15, 23, 30],
    )
    model.vision_model.vision_projection = nn.Linear(6 * WIDTH, params["dim"])
    model.load_state_dict(torch.load(folder / "consolidated.pth", weights_only=True))
    model.setup_cache(1, torch.device("cpu"), torch.float32)
    inputs = _inputs(params["vision_chunk_size"])
    with torch.no_grad():
        states = model.vision_model(inputs["pixel_values"], torch.tensor([[[1, 2]]]))
        layers = model.text_model.cross_attention_layers
        flat = states.view(1, -1, states.shape[-1])
        caches = torch.stack([layer.compute_xattn_kv_cache(flat) for layer in layers])
        masks = code._pad_masks([[[IMAGE_AT, LENGTH]]], [[2]], LENGTH, 4)
        bias, rows = model.text_model._get_xattn_mask(LENGTH, "cpu", torch.float32, states, masks)
        return model(torch.arange(LENGTH), inputs["input_ids"], bias, rows, caches)


@pytest.mark.parametrize("side", [28, 56])
def test_logits_of_metas_code(meta_code, original, tmp_path, side):
    """Side 56 resizes the position tables while loading."""
    params = json.loads((original / "params.json").read_text()) | {"vision_chunk_size": side}
    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "consolidated.pth").symlink_to(original / "consolidated.pth")
    expected = _meta_logits(meta_code, tmp_path, params)
    scale = expected.abs().max()

    def error(semantics: str) -> float:
        model = mllama.MllamaForConditionalGeneration.from_pretrained(
            tmp_path, backend="reference", semantics=semantics
        )
        with torch.no_grad():
            logits = model(**_inputs(side)).logits
        return ((logits - expected).abs().max() / scale).item()

    relative = error("auto")
    print(f"side {side}: largest difference to Meta's logits {relative:.1e} of the largest logit")
    assert relative < 1e-5
    assert error("transformers") > 1e-2
